//! The file protocol: a regular file or block device of this host.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;

use crate::iscsi::LunLock;
use crate::store::Store;
use crate::{lock, BlockError, OpenOptions, Reserve};

/// Alignment of buffers and requests with O_DIRECT.
const ALIGN: u64 = 4096;

/// An open image file.
pub struct HostFile {
    file: File,
    path: PathBuf,
    length: AtomicU64,
    direct: bool,
    no_flush: bool,
    locked: AtomicBool,
    /// A flush has failed.
    unsafe_cache: AtomicBool,
    /// A block device: it does not grow.
    device: bool,
    /// Held while the rest of a block is read and written back around a part of it (O_DIRECT).
    patching: Mutex<()>,
    /// The reservation of a LUN, given back when nothing here has it open any more.
    _lun: Option<LunLock>,
}

impl Drop for HostFile {
    fn drop(&mut self) {
        if self.locked.load(Ordering::SeqCst) {
            // If it fails the locks go with the descriptor.
            let _ = lock::release(&self.file);
        }
    }
}

impl HostFile {
    /// Open and lock.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, BlockError> {
        let fail = |source| BlockError::Open { path: path.to_owned(), source };
        let mut how = File::options();
        how.read(true).write(!options.read_only);
        let mut direct = options.direct;
        let file = if direct {
            match how.clone().custom_flags(libc::O_DIRECT).open(path) {
                // Some file systems have no O_DIRECT; QEMU refuses, and so does this.
                Err(e) => return Err(fail(e)),
                Ok(f) => f,
            }
        } else {
            how.open(path).map_err(fail)?
        };
        let meta = file.metadata().map_err(fail)?;
        if meta.is_dir() {
            return Err(fail(std::io::Error::from_raw_os_error(libc::EISDIR)));
        }
        let mut length = meta.len();
        if meta.file_type().is_block_device() {
            length = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0)).map_err(fail)?;
        } else if !meta.is_file() {
            direct = false;
        }
        let mut lun = None;
        if meta.file_type().is_block_device() && !options.read_only && options.reserve != Reserve::No {
            let lock = path.to_str().map(LunLock::open).transpose().map_err(fail)?;
            if let Some(lock) = &lock {
                lock.reserve(path, options.reserve)?;
            }
            lun = lock;
        }
        let locked = options.locking && !options.force_share && meta.is_file();
        if locked {
            lock::acquire(&file, path, !options.read_only)?;
        }
        Ok(HostFile {
            file,
            path: path.to_owned(),
            length: AtomicU64::new(length),
            direct,
            no_flush: options.no_flush || options.read_only,
            locked: AtomicBool::new(locked),
            device: !meta.is_file(),
            patching: Mutex::new(()),
            _lun: lun,
            unsafe_cache: AtomicBool::new(false),
        })
    }

    fn read_direct(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let start = offset / ALIGN * ALIGN;
        let end = (offset + buf.len() as u64).next_multiple_of(ALIGN);
        let mut bounce = Bounce::new((end - start) as usize);
        let area = bounce.slice();
        let mut done = 0;
        while done < area.len() {
            match self.file.read_at(&mut area[done..], start + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        area[done..].fill(0);
        let at = (offset - start) as usize;
        buf.copy_from_slice(&area[at..at + buf.len()]);
        Ok(())
    }
}

impl Store for HostFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> std::io::Result<()> {
        if self.direct {
            return self.read_direct(offset, buf);
        }
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        if self.direct {
            let start = offset / ALIGN * ALIGN;
            let end = (offset + data.len() as u64).next_multiple_of(ALIGN);
            let mut bounce = Bounce::new((end - start) as usize);
            let mut _patching = None;
            if start != offset || end != offset + data.len() as u64 {
                _patching = self.patching.lock().ok();
                self.read_direct(start, bounce.slice())?;
            }
            let at = (offset - start) as usize;
            bounce.slice()[at..at + data.len()].copy_from_slice(data);
            self.file.write_all_at(bounce.slice(), start)?;
            self.length.fetch_max(end, Ordering::Relaxed);
        } else {
            self.file.write_all_at(data, offset)?;
            self.length.fetch_max(offset + data.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn grow(&self, length: u64) -> std::io::Result<()> {
        if length > self.length() {
            self.file.set_len(length)?;
            self.length.fetch_max(length, Ordering::Relaxed);
        }
        Ok(())
    }

    fn set_length(&self, length: u64) -> std::io::Result<()> {
        if self.device {
            if length > self.length() {
                return Err(std::io::Error::other("Cannot grow device files"));
            }
            return Ok(());
        }
        self.file.set_len(length)?;
        self.length.store(length, Ordering::Relaxed);
        Ok(())
    }

    fn set_aside(&self, offset: u64, len: u64) -> std::io::Result<()> {
        // SAFETY: posix_fallocate on our own descriptor takes no pointers.
        match unsafe { libc::posix_fallocate(self.file.as_raw_fd(), offset as i64, len as i64) } {
            0 => {
                self.length.fetch_max(offset + len, Ordering::Relaxed);
                Ok(())
            }
            errno => Err(std::io::Error::from_raw_os_error(errno)),
        }
    }

    fn grows_with_zeroes(&self) -> bool {
        !self.device
    }

    fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> bool {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        let call = |mode: i32| {
            // SAFETY: fallocate on our own descriptor takes no pointers.
            unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) == 0 }
        };
        unmap && call(libc::FALLOC_FL_PUNCH_HOLE | keep) || call(libc::FALLOC_FL_ZERO_RANGE | keep)
    }

    fn hole(&self, offset: u64) -> Option<(bool, u64)> {
        let seek = |whence| {
            // SAFETY: lseek on our own descriptor takes no pointers; nothing here uses the place that it moves.
            let at = unsafe { libc::lseek(self.file.as_raw_fd(), offset as i64, whence) };
            u64::try_from(at).map_err(|_| std::io::Error::last_os_error().raw_os_error())
        };
        if self.device {
            return None;
        }
        match seek(libc::SEEK_DATA) {
            Ok(data) if data > offset => Some((true, data - offset)),
            Ok(_) => {
                seek(libc::SEEK_HOLE).ok().filter(|hole| *hole > offset).map(|hole| (false, hole - offset))
            }
            // Nothing but a hole up to the end.
            Err(Some(libc::ENXIO)) if offset < self.length() => Some((true, self.length() - offset)),
            Err(_) => None,
        }
    }

    fn punch(&self, offset: u64, len: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate on our own descriptor takes no pointers.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) };
    }

    fn lock(&self, write: bool) -> Result<(), BlockError> {
        if !self.device && !self.locked.load(Ordering::SeqCst) {
            lock::acquire(&self.file, &self.path, write)?;
            self.locked.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        if self.no_flush {
            return Ok(());
        }
        if self.unsafe_cache.load(Ordering::SeqCst) {
            return Err(std::io::Error::other("an earlier flush failed: the host may have lost data"));
        }
        // The kernel reports lost pages once and then takes them for clean: no later flush can be believed.
        self.file.sync_data().inspect_err(|_| self.unsafe_cache.store(true, Ordering::SeqCst))
    }
}

/// An aligned buffer for O_DIRECT.
struct Bounce {
    data: Vec<u8>,
    at: usize,
    len: usize,
}

impl Bounce {
    fn new(len: usize) -> Self {
        let data = vec![0; len + ALIGN as usize];
        let at = data.as_ptr().align_offset(ALIGN as usize);
        Bounce { data, at, len }
    }
    fn slice(&mut self) -> &mut [u8] {
        &mut self.data[self.at..self.at + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As between the fork and the exec of a child that another thread starts.
    #[test]
    fn closing_lets_the_locks_go_though_a_child_has_a_copy_of_the_descriptor() {
        let path = std::env::temp_dir().join(format!("ftvm-file-copy-{}", std::process::id()));
        std::fs::write(&path, [0; 512]).unwrap();
        let image = HostFile::open(&path, &OpenOptions::default()).unwrap();
        let copy = image.file.try_clone().unwrap();
        assert!(HostFile::open(&path, &OpenOptions::default()).is_err());
        drop(image);
        HostFile::open(&path, &OpenOptions::default()).unwrap();
        drop(copy);
        std::fs::remove_file(&path).unwrap();
    }
}
