//! Errors of images.

use std::path::PathBuf;

/// Errors of opening and using an image.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("Could not open '{}': {source}", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("Unknown driver '{0}'")]
    UnknownFormat(String),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the range {offset:#x}+{len:#x} lies outside the image of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error("the image is read-only")]
    ReadOnly,
    #[error("Failed to get {}\"{lock}\" lock\nIs another process using the image [{}]?", if *shared { "shared " } else { "" }, path.display())]
    Locked { lock: &'static str, shared: bool, path: PathBuf },
    #[error("Could not open '{}': {reason}", path.display())]
    Format { path: PathBuf, reason: String },
    #[error("the image is damaged: {0}")]
    Corrupt(String),
}

impl BlockError {
    /// The errno that a guest's request fails with.
    pub fn errno(&self) -> i32 {
        match self {
            BlockError::Io(e) | BlockError::Open { source: e, .. } => e.raw_os_error().unwrap_or(libc::EIO),
            BlockError::ReadOnly => libc::EROFS,
            BlockError::OutOfRange { .. } => libc::EINVAL,
            _ => libc::EIO,
        }
    }
}
