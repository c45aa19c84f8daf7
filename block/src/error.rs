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
    #[error("{0}")]
    Unsupported(String),
    #[error("the image is damaged: {0}")]
    Corrupt(String),
}

/// The number of an error that did not come from the kernel.
fn by_kind(kind: std::io::ErrorKind) -> i32 {
    match kind {
        std::io::ErrorKind::StorageFull => libc::ENOSPC,
        std::io::ErrorKind::ReadOnlyFilesystem => libc::EROFS,
        std::io::ErrorKind::TimedOut => libc::ETIMEDOUT,
        _ => libc::EIO,
    }
}

/// The words and the number of an error that several requests share.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Again {
    text: String,
    errno: i32,
}

impl BlockError {
    /// The same error for another request that shares its cause.
    pub fn again(&self) -> BlockError {
        let kind = std::io::Error::from_raw_os_error(self.errno());
        BlockError::Io(std::io::Error::new(
            kind.kind(),
            Again { text: self.to_string(), errno: self.errno() },
        ))
    }

    /// The errno that a guest's request fails with.
    pub fn errno(&self) -> i32 {
        match self {
            BlockError::Io(e) | BlockError::Open { source: e, .. } => e.raw_os_error().unwrap_or_else(|| {
                let again = e.get_ref().and_then(|inner| inner.downcast_ref::<Again>());
                again.map_or_else(|| by_kind(e.kind()), |a| a.errno)
            }),
            BlockError::ReadOnly => libc::EROFS,
            BlockError::OutOfRange { .. } => libc::EINVAL,
            BlockError::Unsupported(_) => libc::ENOTSUP,
            _ => libc::EIO,
        }
    }
}
