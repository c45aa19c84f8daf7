//! Block nodes: images with a name that others stand on, read or are copied from, and that can be opened anew in another
//! mode while they are in use; and the root that a device's requests go to, which can be led to another node.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{BlockError, Held, Image, ImageInfo, OpenOptions, Snapshot, SnapshotChange};

/// Looks at every write to a node. Both are called in the middle of the request.
pub trait Watch: Send + Sync {
    /// A range is about to change in `image`.
    fn before(&self, _image: &dyn Image, _offset: u64, _len: u64) -> Result<(), BlockError> {
        Ok(())
    }
    /// It has changed, or part of it.
    fn after(&self, offset: u64, len: u64);
}

/// What is needed to open a node anew.
struct Origin {
    path: PathBuf,
    options: OpenOptions,
}

/// A block node.
pub struct Node {
    name: RwLock<String>,
    origin: Option<Origin>,
    image: RwLock<Box<dyn Image>>,
    watches: RwLock<Vec<Arc<dyn Watch>>>,
}

/// Names of nodes that nobody named, as QEMU's.
static ANONYMOUS: AtomicU64 = AtomicU64::new(100);

fn anonymous() -> String {
    format!("#block{}", ANONYMOUS.fetch_add(1, Ordering::Relaxed))
}

impl Node {
    /// Open an image; `backing` is what it stands on (`Some(None)`: nothing), or the header says it.
    pub fn open(
        name: &str,
        path: &Path,
        options: &OpenOptions,
        backing: Option<Option<Arc<Node>>>,
    ) -> Result<Arc<Self>, BlockError> {
        let image = crate::open_over(path, options, 0, backing)?;
        let origin = Some(Origin { path: path.to_owned(), options: options.clone() });
        Ok(Self::new(name.to_owned(), origin, image))
    }

    pub(crate) fn open_depth(
        path: &Path,
        options: &OpenOptions,
        depth: u32,
    ) -> Result<Arc<Self>, BlockError> {
        let image = crate::open_over(path, options, depth, None)?;
        let origin = Some(Origin { path: path.to_owned(), options: options.clone() });
        Ok(Self::new(anonymous(), origin, image))
    }

    /// A node around an image that is not to be opened anew.
    pub fn around(image: Arc<dyn Image>) -> Arc<Self> {
        Self::new(anonymous(), None, Box::new(image))
    }

    /// As [`Self::around`], with a name.
    pub fn named(name: &str, image: Box<dyn Image>) -> Arc<Self> {
        Self::new(name.to_owned(), None, image)
    }

    fn new(name: String, origin: Option<Origin>, image: Box<dyn Image>) -> Arc<Self> {
        let (name, image) = (RwLock::new(name), RwLock::new(image));
        Arc::new(Node { name, origin, image, watches: RwLock::default() })
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.name.read().map_or_else(|e| e.into_inner().clone(), |n| n.clone())
    }

    /// Call it otherwise; `None`: a name of its own making.
    pub fn rename(&self, name: Option<&str>) {
        let name = name.map_or_else(anonymous, str::to_owned);
        *self.name.write().unwrap_or_else(PoisonError::into_inner) = name;
    }

    /// Its image's file, if it was opened by name.
    pub fn path(&self) -> Option<&Path> {
        self.origin.as_ref().map(|o| o.path.as_path())
    }

    fn image(&self) -> RwLockReadGuard<'_, Box<dyn Image>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn image_mut(&self) -> RwLockWriteGuard<'_, Box<dyn Image>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Do something with the image while no request is under way in it.
    pub fn alone<R>(&self, f: impl FnOnce(&dyn Image) -> R) -> R {
        f(self.image_mut().as_ref())
    }

    /// Do something with the image beside its requests.
    pub fn with<R>(&self, f: impl FnOnce(&dyn Image) -> R) -> R {
        f(self.image().as_ref())
    }

    /// Have `watch` see every write from here on.
    pub fn watch(&self, watch: Arc<dyn Watch>) {
        // Requests hold the lock for reading while they last: those that began before have ended.
        self.watches.write().unwrap_or_else(PoisonError::into_inner).push(watch);
    }

    /// Have it see no more.
    pub fn unwatch(&self, watch: &Arc<dyn Watch>) {
        self.watches.write().unwrap_or_else(PoisonError::into_inner).retain(|w| !Arc::ptr_eq(w, watch));
    }

    /// The nodes from this one down.
    pub fn chain(self: &Arc<Self>) -> Vec<Arc<Node>> {
        let mut chain = vec![Arc::clone(self)];
        while let Some(below) = chain.last().and_then(|n| n.backing()) {
            chain.push(below);
        }
        chain
    }

    /// Open the image for reading only, or for writing too; requests wait meanwhile. After an error it is as it was, unless
    /// that is impossible.
    pub fn reopen(&self, read_only: bool) -> Result<(), BlockError> {
        let mut image = self.image_mut();
        if image.read_only() == read_only {
            return Ok(());
        }
        let origin = self.origin.as_ref().ok_or_else(|| {
            BlockError::Unsupported(format!("the node '{}' cannot be opened in another mode", self.name()))
        })?;
        if !image.read_only() {
            // Twice: the second writes what the first has freed.
            image.flush()?;
            image.flush()?;
        }
        let open = |read_only| {
            // Locks of this program's own conflict, too: they are taken when the other descriptor is gone.
            let unlocked = OpenOptions { read_only, locking: false, ..origin.options.clone() };
            crate::open_over(&origin.path, &unlocked, 0, Some(image.backing()))
        };
        let (new, again) = (open(read_only)?, open(true)?);
        let lock = origin.options.locking && !origin.options.force_share;
        // The old one lets its locks go.
        drop(std::mem::replace(&mut *image, new));
        if !lock {
            return Ok(());
        }
        let locked = image.lock_file();
        if locked.is_err() {
            // Another program was faster, or has it open: as a reader there is place for both.
            *image = again;
            if let Err(e) = image.lock_file() {
                log::warn!("{}: {e}", origin.path.display());
            }
        }
        locked
    }

    fn changed(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&dyn Image) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        let image = self.image();
        let watches = self.watches.read().unwrap_or_else(PoisonError::into_inner);
        for watch in watches.iter() {
            watch.before(image.as_ref(), offset, len)?;
        }
        let result = change(image.as_ref());
        for watch in watches.iter() {
            watch.after(offset, len);
        }
        result
    }
}

impl Image for Node {
    fn size(&self) -> u64 {
        self.image().size()
    }
    fn read_only(&self) -> bool {
        self.image().read_only()
    }
    fn format(&self) -> &'static str {
        self.image().format()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.image().read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.changed(offset, data.len() as u64, |i| i.write_at(offset, data))
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.changed(offset, len, |i| i.write_zeroes(offset, len, may_unmap))
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.changed(offset, len, |i| i.discard(offset, len))
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.image().flush()
    }
    fn background(&self) -> bool {
        self.image().background()
    }
    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        self.image().extents(offset, len)
    }
    fn grain(&self) -> u64 {
        self.image().grain()
    }
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.image().resize(size)
    }
    fn snapshot(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        self.image().snapshot(change)
    }
    fn write_vm_state(&self, at: u64, data: &[u8]) -> Result<(), BlockError> {
        self.image().write_vm_state(at, data)
    }
    fn drop_vm_state(&self) -> Result<(), BlockError> {
        self.image().drop_vm_state()
    }
    fn read_vm_state(&self, id: &str, at: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.image().read_vm_state(id, at, buf)
    }
    fn info(&self) -> ImageInfo {
        self.image().info()
    }
    fn backing(&self) -> Option<Arc<Node>> {
        self.image().backing()
    }
    fn set_backing(&self, backing: Option<Arc<Node>>) -> Result<(), BlockError> {
        self.image().set_backing(backing)
    }
    fn name_backing(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        self.image().name_backing(backing)
    }
    fn held(&self, offset: u64) -> Result<(Held, u64), BlockError> {
        self.image().held(offset)
    }
}

/// Where a device's requests go: a node, which can be exchanged between two requests.
pub struct Root(RwLock<Arc<Node>>);

impl Root {
    /// To `node`, for now.
    pub fn new(node: Arc<Node>) -> Arc<Self> {
        Arc::new(Root(RwLock::new(node)))
    }

    fn read(&self) -> RwLockReadGuard<'_, Arc<Node>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of the moment.
    pub fn node(&self) -> Arc<Node> {
        Arc::clone(&self.read())
    }

    /// Keep all requests out, those under way having ended, while the guard lives; the node can be exchanged through it.
    pub fn hold(&self) -> RwLockWriteGuard<'_, Arc<Node>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for Root {
    fn size(&self) -> u64 {
        self.read().size()
    }
    fn read_only(&self) -> bool {
        self.read().read_only()
    }
    fn format(&self) -> &'static str {
        self.read().format()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.read().read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.read().write_at(offset, data)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.read().write_zeroes(offset, len, may_unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.read().discard(offset, len)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.read().flush()
    }
    fn background(&self) -> bool {
        self.read().background()
    }
    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        self.read().extents(offset, len)
    }
    fn grain(&self) -> u64 {
        self.read().grain()
    }
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.read().resize(size)
    }
    fn snapshot(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        self.read().snapshot(change)
    }
    fn write_vm_state(&self, at: u64, data: &[u8]) -> Result<(), BlockError> {
        self.read().write_vm_state(at, data)
    }
    fn drop_vm_state(&self) -> Result<(), BlockError> {
        self.read().drop_vm_state()
    }
    fn read_vm_state(&self, id: &str, at: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.read().read_vm_state(id, at, buf)
    }
    fn info(&self) -> ImageInfo {
        self.read().info()
    }
    fn backing(&self) -> Option<Arc<Node>> {
        self.read().backing()
    }
}
