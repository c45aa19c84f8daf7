//! The raw format: the file is the disk; and `luks`: what follows the header of an encrypted volume is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::crypto::{LuksOptions, Volume};
use crate::store::Store;
use crate::{check_range, check_resize, BlockError, Image, ImageInfo, OpenOptions};
use std::path::Path;

/// A raw image on a file or block device.
pub struct Raw {
    file: Arc<dyn Store>,
    size: AtomicU64,
    read_only: bool,
    discard: bool,
    detect_zeroes: bool,
    volume: Option<Volume>,
}

impl Raw {
    /// The raw format over an open file.
    pub fn over(file: Arc<dyn Store>, options: &OpenOptions) -> Self {
        let size = file.length() / 512 * 512;
        Raw {
            file,
            size: AtomicU64::new(size),
            read_only: options.read_only,
            discard: options.discard,
            detect_zeroes: options.detect_zeroes,
            volume: None,
        }
    }

    /// The data of an encrypted volume.
    pub fn unlock(file: Arc<dyn Store>, options: &OpenOptions) -> Result<Self, BlockError> {
        let secret = options.key_secret.as_deref();
        let volume = Volume::unlock(file.as_ref(), 0, file.length(), secret, "")?;
        let data = volume.over(file, volume.payload());
        Ok(Raw { volume: Some(volume), ..Self::over(data, options) })
    }
}

/// Make an encrypted volume for a disk of `size` bytes, with the secret whose id is `secret`; the file exists.
pub fn format_luks(path: &Path, size: u64, options: &LuksOptions, secret: &str) -> Result<(), BlockError> {
    let area = crate::crypto::format(options, secret)?;
    let how = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let store = crate::store::open(path, &how)?;
    store.set_length(0)?;
    store.set_length(area.len() as u64 + size)?;
    store.write_at(0, &area)?;
    Ok(store.sync()?)
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn format(&self) -> &'static str {
        if self.volume.is_some() {
            "luks"
        } else {
            "raw"
        }
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(self, offset, buf.len() as u64, false)?;
        Ok(self.file.read_at(offset, buf)?)
    }
    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        check_range(self, offset, len, false).ok()?;
        self.file.is_plain().then(|| vec![(offset, len)])
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        check_range(self, offset, data.len() as u64, true)?;
        if self.detect_zeroes && data.iter().all(|b| *b == 0) {
            return self.write_zeroes(offset, data.len() as u64, self.discard);
        }
        Ok(self.file.write_at(offset, data)?)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        check_range(self, offset, len, true)?;
        if self.file.zero_range(offset, len, may_unmap) {
            return Ok(());
        }
        let zeroes = vec![0; 1 << 16];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(zeroes.len() as u64);
            self.file.write_at(offset + at, &zeroes[..n as usize])?;
            at += n;
        }
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        check_range(self, offset, len, true)?;
        if self.discard {
            self.file.punch(offset, len);
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), BlockError> {
        Ok(self.file.sync()?)
    }
    fn is_zero(&self, offset: u64) -> Result<(bool, u64), BlockError> {
        check_range(self, offset, 1, false)?;
        let left = self.size() - offset;
        Ok(self.file.hole(offset).map_or((false, left), |(hole, len)| (hole, len.min(left))))
    }
    fn lock_file(&self) -> Result<(), BlockError> {
        self.file.lock(!self.read_only)
    }
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        check_resize(self, size)?;
        let old = self.size();
        self.file.set_length(size)?;
        self.size.store(size, Ordering::Relaxed);
        if size > old && !self.file.is_plain() {
            // What the file system gives as zeroes would be decrypted to something else.
            self.write_zeroes(old, size - old, false)?;
        }
        Ok(self.file.sync()?)
    }
    fn luks_area(&self) -> Option<Vec<u8>> {
        self.volume.as_ref().map(|v| v.area().to_vec())
    }
    fn info(&self) -> ImageInfo {
        ImageInfo { luks: self.volume.as_ref().map(Volume::info), ..ImageInfo::default() }
    }
}
