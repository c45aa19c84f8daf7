//! Disk images: formats over protocols.
//!
//! An [`Image`] is what a drive reads and writes. Its methods block; callers run them on threads of
//! their own. Requests that overlap in time may be served in any order, so the caller orders those
//! that touch the same bytes.

mod error;
pub mod raw;

pub use error::BlockError;
use std::path::Path;

/// A disk image. Offsets and lengths are in bytes.
pub trait Image: Send + Sync {
    /// Virtual size in bytes.
    fn size(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Name of the format (`raw`, `qcow2`).
    fn format(&self) -> &'static str;
    /// Fill `buf` from `offset`; past the end is an error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError>;
    /// Store `data` at `offset`; past the end is an error.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError>;
    /// Make a range read as zeroes; `may_unmap` allows giving the space back.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError>;
    /// The guest does not need a range any more; what it reads afterwards is fixed by the format (never stale data of others).
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError>;
    /// Everything written before, and all metadata that leads to it, is on stable storage when this returns.
    fn flush(&self) -> Result<(), BlockError>;
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// `raw`, `qcow2`; `None` looks at the file.
    pub format: Option<String>,
    pub read_only: bool,
    /// Take QEMU's byte locks.
    pub locking: bool,
    /// Open even though another program writes the image: reads only, and nothing is cached (a backup before go-live).
    pub force_share: bool,
    /// Bypass the host's page cache (`cache=none`, `directsync`).
    pub direct: bool,
    /// Flushes do nothing (`cache=unsafe`).
    pub no_flush: bool,
    /// Pass discards down (`discard=unmap`).
    pub discard: bool,
    /// Turn writes of zeroes into [`Image::write_zeroes`].
    pub detect_zeroes: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            format: None,
            read_only: false,
            locking: true,
            force_share: false,
            direct: false,
            no_flush: false,
            discard: false,
            detect_zeroes: false,
        }
    }
}

/// Open an image.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Image>, BlockError> {
    match options.format.as_deref() {
        Some("raw") => Ok(Box::new(raw::Raw::open(path, options)?)),
        Some(other) => Err(BlockError::UnknownFormat(other.to_owned())),
        None => Ok(Box::new(raw::Raw::open(path, options)?)),
    }
}
