//! Protocols: where an image's bytes lie.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::file::HostFile;
use crate::{BlockError, OpenOptions};

/// A row of bytes that an image format lies in. Calls block and may come from several threads at once; those
/// that overlap in bytes are ordered by the caller.
pub trait Store: Send + Sync {
    /// Where it lies: a path or a URL.
    fn path(&self) -> &Path;
    /// Length in bytes.
    fn length(&self) -> u64;
    /// Fill `buf`; what lies past the end reads as zero.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Write all of `data`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Grow so that there are at least `length` bytes; the new ones read as zero.
    fn grow(&self, length: u64) -> io::Result<()>;
    /// Make it `length` bytes long; new ones read as zero. A store of a fixed size says so.
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Have the space of a range set aside, where the store knows how.
    fn set_aside(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
    /// Whether bytes past the end, once written around, read as zero (a file; not a LUN).
    fn grows_with_zeroes(&self) -> bool;
    /// Whether bytes lie in the path's file at their offsets as they are read (not if they are encrypted).
    fn is_plain(&self) -> bool {
        true
    }
    /// Make a range read as zero by the store's own means; false if it has none.
    fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> bool;
    /// Whether nothing was ever written at `offset`, and for how many bytes the answer holds; `None`: it is not known.
    fn hole(&self, _offset: u64) -> Option<(bool, u64)> {
        None
    }
    /// Give a range back, if the store takes it. What is read there afterwards is not defined.
    fn punch(&self, offset: u64, len: u64);
    /// Take the byte locks of a file that was opened without, for reading or for writing, too.
    fn lock(&self, _write: bool) -> Result<(), BlockError> {
        Ok(())
    }
    /// All that was written is on stable storage when this returns.
    fn sync(&self) -> io::Result<()>;
}

/// Open what `path` names.
pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Store>, BlockError> {
    match path.to_str() {
        Some(url) if url.starts_with("iscsi://") => Ok(Arc::new(crate::iscsi::Lun::open(url, options)?)),
        Some(url) if url.starts_with("nfs://") => Ok(Arc::new(crate::nfs::NfsFile::open(url, options)?)),
        _ => Ok(Arc::new(HostFile::open(path, options)?)),
    }
}
