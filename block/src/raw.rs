//! The raw format: the file is the disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{BlockError, Image, OpenOptions};

/// A raw image on a file or block device.
pub struct Raw {
    file: File,
    size: u64,
    read_only: bool,
    no_flush: bool,
    discard: bool,
}

impl Raw {
    /// Open `path`.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, BlockError> {
        let file = File::options()
            .read(true)
            .write(!options.read_only)
            .open(path)
            .map_err(|source| BlockError::Open { path: path.to_owned(), source })?;
        let size = file.metadata()?.len() / 512 * 512;
        Ok(Raw {
            file,
            size,
            read_only: options.read_only,
            no_flush: options.no_flush,
            discard: options.discard,
        })
    }

    fn check(&self, offset: u64, len: u64, write: bool) -> Result<(), BlockError> {
        if write && self.read_only {
            return Err(BlockError::ReadOnly);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(BlockError::OutOfRange { offset, len, size: self.size }),
        }
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> bool {
        // SAFETY: fallocate on our own descriptor takes no pointers.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, len as i64) == 0 }
    }
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn format(&self) -> &'static str {
        "raw"
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.check(offset, buf.len() as u64, false)?;
        Ok(self.file.read_exact_at(buf, offset)?)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check(offset, data.len() as u64, true)?;
        Ok(self.file.write_all_at(data, offset)?)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.check(offset, len, true)?;
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        if may_unmap && self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | keep, offset, len)
            || self.fallocate(libc::FALLOC_FL_ZERO_RANGE | keep, offset, len)
        {
            return Ok(());
        }
        let zeroes = vec![0; 1 << 16];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..n as usize], offset + at)?;
            at += n;
        }
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.check(offset, len, true)?;
        if self.discard {
            self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len);
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), BlockError> {
        if !self.no_flush && !self.read_only {
            self.file.sync_data()?;
        }
        Ok(())
    }
}
