//! Disk images: formats over protocols.
//!
//! An [`Image`] is what a drive reads and writes. Its methods block; callers run them on threads of
//! their own. Requests that overlap in time may be served in any order, so the caller orders those
//! that touch the same bytes.

pub mod bitmap;
pub mod bits;
pub mod buffers;
pub mod copy;
pub mod crypto;
mod error;
#[cfg(feature = "etcd")]
mod etcd;
mod file;
pub mod files;
mod info;
pub mod iscsi;
mod lock;
pub mod nfs;
pub mod node;
pub mod qcow2;
pub mod queue;
pub mod raw;
mod store;
pub mod takeover;
mod tcp;
pub mod throttle;
pub mod track;

use bitmap::StoredBitmap;
pub use error::BlockError;
pub use info::{ImageInfo, Qcow2Bitmap, Qcow2Info, Snapshot, SnapshotChange};
pub use node::{Node, Root};
pub use queue::{Queue, Request};
use std::path::Path;
use std::sync::Arc;
pub use store::Store;

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
    /// Called now and then when there is nothing else to do: work in the background. Returns whether there
    /// is more of it.
    fn background(&self) -> bool {
        false
    }
    /// Where in the image's own file the bytes of a range lie, as (offset, length) in order, if all of them lie there as they
    /// are read, and will until something that overlaps them is written; `None`: they do not, or it is not known.
    fn extents(&self, _offset: u64, _len: u64) -> Option<Vec<(u64, u64)>> {
        None
    }
    /// Bytes that a write of a part of them may move as a whole (a power of two).
    fn grain(&self) -> u64 {
        512
    }
    /// Change the size (a multiple of 512): new bytes read as zero, what is cut off is gone. Durable when it returns.
    fn resize(&self, _size: u64) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image cannot change its size here", self.format())))
    }
    /// Make, apply or delete an internal snapshot: all of it has happened and is durable when this returns, or
    /// (whenever the program or the host ends) nothing has. Returns the snapshot.
    fn snapshot(&self, _change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        Err(BlockError::Unsupported(format!("a {} image has no internal snapshots", self.format())))
    }
    /// Store a piece of a machine's state, to be kept by the snapshot that is made next; `at` is a multiple of the cluster
    /// size, and so is the length of all pieces but the last.
    fn write_vm_state(&self, _at: u64, _data: &[u8]) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image cannot keep a machine's state", self.format())))
    }
    /// Give the space of what [`Self::write_vm_state`] stored back; snapshots keep theirs.
    fn drop_vm_state(&self) -> Result<(), BlockError> {
        Ok(())
    }
    /// Read a piece of the state that the snapshot with this id keeps.
    fn read_vm_state(&self, _id: &str, _at: u64, _buf: &mut [u8]) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image keeps no machine's state", self.format())))
    }
    /// What the image says of itself.
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }
    /// What lies before the data of an encrypted image: with it an overlay is made that has the same key.
    fn luks_area(&self) -> Option<Vec<u8>> {
        None
    }
    /// The image below.
    fn backing(&self) -> Option<Arc<Node>> {
        None
    }
    /// Stand on another image from now on, whose contents fit; the file still names the old one.
    fn set_backing(&self, _backing: Option<Arc<Node>>) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image has no backing file", self.format())))
    }
    /// Name another image below (its name and format) in the file; durable when it returns.
    fn name_backing(&self, _backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image has no backing file", self.format())))
    }
    /// Whether what lies at `offset` is in this image, not in the one below, and for how many bytes the answer holds.
    fn held(&self, offset: u64) -> Result<(Held, u64), BlockError> {
        check_range(self, offset, 1, false)?;
        Ok((Held::Whole, self.size() - offset))
    }
    /// Whether what lies at `offset` is known to read as zero without being read, and for how many bytes the answer holds.
    fn is_zero(&self, offset: u64) -> Result<(bool, u64), BlockError> {
        check_range(self, offset, 1, false)?;
        Ok((false, self.size() - offset))
    }
    /// Take the byte locks of a file that was opened without.
    fn lock_file(&self) -> Result<(), BlockError> {
        Ok(())
    }
    /// Note in the file that it is open for writing, where it says so (after [`OpenOptions::lock_later`], and after
    /// [`Self::keep_bitmaps`]).
    fn begin(&self) -> Result<(), BlockError> {
        Ok(())
    }
    /// The dirty bitmaps that the file keeps, as they were when it was opened.
    fn stored_bitmaps(&self) -> Result<Vec<StoredBitmap>, BlockError> {
        Ok(Vec::new())
    }
    /// Whether the file can keep one bitmap more, in parts of `granularity` bytes, beside these others.
    fn check_bitmap(&self, _name: &str, _granularity: u64, _others: &[String]) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image keeps no bitmaps", self.format())))
    }
    /// Have the file keep these bitmaps, in place of those with their names. Until [`Self::begin`] nothing may be written:
    /// they would be believed.
    fn keep_bitmaps(&self, _bitmaps: &[StoredBitmap]) -> Result<(), BlockError> {
        Err(BlockError::Unsupported(format!("a {} image keeps no bitmaps", self.format())))
    }
    /// Take a bitmap out of the file, if it is there.
    fn drop_bitmap(&self, _name: &str) -> Result<(), BlockError> {
        Ok(())
    }
}

/// How much of a range is in an image itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    None,
    Part,
    Whole,
}

impl<T: Image + ?Sized> Image for Arc<T> {
    fn size(&self) -> u64 {
        (**self).size()
    }
    fn read_only(&self) -> bool {
        (**self).read_only()
    }
    fn format(&self) -> &'static str {
        (**self).format()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        (**self).read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        (**self).write_at(offset, data)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        (**self).write_zeroes(offset, len, may_unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        (**self).discard(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        (**self).flush()
    }
    fn background(&self) -> bool {
        (**self).background()
    }
    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        (**self).extents(offset, len)
    }
    fn grain(&self) -> u64 {
        (**self).grain()
    }
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        (**self).resize(size)
    }
    fn snapshot(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        (**self).snapshot(change)
    }
    fn write_vm_state(&self, at: u64, data: &[u8]) -> Result<(), BlockError> {
        (**self).write_vm_state(at, data)
    }
    fn drop_vm_state(&self) -> Result<(), BlockError> {
        (**self).drop_vm_state()
    }
    fn read_vm_state(&self, id: &str, at: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        (**self).read_vm_state(id, at, buf)
    }
    fn info(&self) -> ImageInfo {
        (**self).info()
    }
    fn luks_area(&self) -> Option<Vec<u8>> {
        (**self).luks_area()
    }
    fn backing(&self) -> Option<Arc<Node>> {
        (**self).backing()
    }
    fn set_backing(&self, backing: Option<Arc<Node>>) -> Result<(), BlockError> {
        (**self).set_backing(backing)
    }
    fn name_backing(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        (**self).name_backing(backing)
    }
    fn held(&self, offset: u64) -> Result<(Held, u64), BlockError> {
        (**self).held(offset)
    }
    fn is_zero(&self, offset: u64) -> Result<(bool, u64), BlockError> {
        (**self).is_zero(offset)
    }
    fn lock_file(&self) -> Result<(), BlockError> {
        (**self).lock_file()
    }
    fn begin(&self) -> Result<(), BlockError> {
        (**self).begin()
    }
    fn stored_bitmaps(&self) -> Result<Vec<StoredBitmap>, BlockError> {
        (**self).stored_bitmaps()
    }
    fn check_bitmap(&self, name: &str, granularity: u64, others: &[String]) -> Result<(), BlockError> {
        (**self).check_bitmap(name, granularity, others)
    }
    fn keep_bitmaps(&self, bitmaps: &[StoredBitmap]) -> Result<(), BlockError> {
        (**self).keep_bitmaps(bitmaps)
    }
    fn drop_bitmap(&self, name: &str) -> Result<(), BlockError> {
        (**self).drop_bitmap(name)
    }
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// `raw`, `qcow2`; `None` looks at the file.
    pub format: Option<String>,
    pub read_only: bool,
    /// Take QEMU's byte locks.
    pub locking: bool,
    /// Take no lock and write nothing until [`Image::lock_file`] and [`Image::begin`].
    pub lock_later: bool,
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
    /// On a LUN: hold its reservation while it is open for writing.
    pub reserve: Reserve,
    /// The id of the secret that unlocks the image ([`crypto::secrets`]).
    pub key_secret: Option<String>,
    /// The id of the one that unlocks the images below, as the header names them.
    pub backing_key_secret: Option<String>,
}

/// Whether a LUN is reserved when it is opened for writing, and under which key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reserve {
    #[default]
    No,
    /// Only if nobody holds it.
    Free(u64),
    /// From whoever holds it.
    Seize(u64),
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            format: None,
            read_only: false,
            locking: true,
            lock_later: false,
            force_share: false,
            direct: false,
            no_flush: false,
            discard: false,
            detect_zeroes: false,
            reserve: Reserve::No,
            key_secret: None,
            backing_key_secret: None,
        }
    }
}

/// Open what `path` names, without looking at a format: for bytes whose places another host knows.
pub fn open_store(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Store>, BlockError> {
    store::open(path, options)
}

/// Open an image. Without a format the file is looked at: qcow2 by its magic number, else raw.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Image>, BlockError> {
    open_over(path, options, 0, None)
}

/// Backing chains longer than this are refused (a chain that refers to itself never ends).
const MAX_DEPTH: u32 = 100;

/// `given`: what the image stands on, instead of what its header names.
fn open_over(
    path: &Path,
    options: &OpenOptions,
    depth: u32,
    given: Option<Option<Arc<Node>>>,
) -> Result<Box<dyn Image>, BlockError> {
    if depth > MAX_DEPTH {
        return Err(BlockError::Format {
            path: path.to_owned(),
            reason: "the backing chain is too long".into(),
        });
    }
    match options.format.as_deref() {
        None | Some("raw" | "qcow2" | "luks") => {}
        Some(other) => return Err(BlockError::UnknownFormat(other.to_owned())),
    }
    let file = store::open(path, options)?;
    let mut magic = [0; 6];
    file.read_at(0, &mut magic)?;
    let looked = match &magic {
        m if &m[..4] == qcow2::MAGIC => "qcow2",
        m if m == crypto::luks::MAGIC => "luks",
        _ => "raw",
    };
    match options.format.as_deref().unwrap_or(looked) {
        "qcow2" => Ok(Box::new(qcow2::Qcow2::open(file, options, depth, given)?)),
        "luks" => Ok(Box::new(raw::Raw::unlock(file, options)?)),
        _ => Ok(Box::new(raw::Raw::over(file, options))),
    }
}

/// Check a new size.
fn check_resize(image: &dyn Image, size: u64) -> Result<(), BlockError> {
    if image.read_only() {
        return Err(BlockError::ReadOnly);
    }
    if !size.is_multiple_of(512) {
        return Err(BlockError::Unsupported("The new size must be a multiple of 512".into()));
    }
    if size > i64::MAX as u64 {
        return Err(BlockError::Unsupported(
            "Required too big image size, it must be not greater than 9223372036854775807".into(),
        ));
    }
    Ok(())
}

/// Check a request against an image's size and mode.
fn check_range<T: Image + ?Sized>(image: &T, offset: u64, len: u64, write: bool) -> Result<(), BlockError> {
    if write && image.read_only() {
        return Err(BlockError::ReadOnly);
    }
    match offset.checked_add(len) {
        Some(end) if end <= image.size() => Ok(()),
        _ => Err(BlockError::OutOfRange { offset, len, size: image.size() }),
    }
}
