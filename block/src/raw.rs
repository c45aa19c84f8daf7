//! The raw format: the file is the disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::store::Store;
use crate::{check_range, check_resize, BlockError, Image, OpenOptions};

/// A raw image on a file or block device.
pub struct Raw {
    file: Arc<dyn Store>,
    size: AtomicU64,
    read_only: bool,
    discard: bool,
    detect_zeroes: bool,
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
        }
    }
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn format(&self) -> &'static str {
        "raw"
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(self, offset, buf.len() as u64, false)?;
        Ok(self.file.read_at(offset, buf)?)
    }
    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        check_range(self, offset, len, false).ok()?;
        Some(vec![(offset, len)])
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
    fn lock_file(&self) -> Result<(), BlockError> {
        self.file.lock(!self.read_only)
    }
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        check_resize(self, size)?;
        self.file.set_length(size)?;
        self.file.sync()?;
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}
