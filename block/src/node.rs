//! Block nodes: images with a name that others stand on, read or are copied from, and that can be opened anew in another
//! mode while they are in use; and the root that a device's requests go to, which can be led to another node.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::bitmap::{DirtyBitmap, StoredBitmap, Use, MAX_NAME};
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
    options: RwLock<OpenOptions>,
}

impl Origin {
    fn options(&self) -> OpenOptions {
        self.options.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A block node.
pub struct Node {
    name: RwLock<String>,
    origin: Option<Origin>,
    image: RwLock<Box<dyn Image>>,
    watches: RwLock<Vec<Arc<dyn Watch>>>,
    bitmaps: RwLock<Vec<Arc<DirtyBitmap>>>,
}

fn refused<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Unsupported(text.into()))
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
        let origin = Some(Origin { path: path.to_owned(), options: RwLock::new(options.clone()) });
        Self::new(name.to_owned(), origin, image)
    }

    pub(crate) fn open_depth(
        path: &Path,
        options: &OpenOptions,
        depth: u32,
    ) -> Result<Arc<Self>, BlockError> {
        let image = crate::open_over(path, options, depth, None)?;
        let origin = Some(Origin { path: path.to_owned(), options: RwLock::new(options.clone()) });
        Self::new(anonymous(), origin, image)
    }

    /// A node around an image that is not to be opened anew.
    pub fn around(image: Arc<dyn Image>) -> Arc<Self> {
        Self::with_bitmaps(anonymous(), None, Box::new(image), Vec::new())
    }

    /// A node in front of this one, around an image that passes everything on to it: it has the name, and from here on the
    /// bitmaps.
    pub fn behind(&self, image: Arc<dyn Image>) -> Arc<Self> {
        let bitmaps = std::mem::take(&mut *self.bitmaps.write().unwrap_or_else(PoisonError::into_inner));
        Self::with_bitmaps(self.name(), None, Box::new(image), bitmaps)
    }

    /// As [`Self::around`], with a name and with the bitmaps that the image keeps.
    pub fn named(name: &str, image: Box<dyn Image>) -> Result<Arc<Self>, BlockError> {
        Self::new(name.to_owned(), None, image)
    }

    fn new(name: String, origin: Option<Origin>, image: Box<dyn Image>) -> Result<Arc<Self>, BlockError> {
        let size = image.size();
        let stored = image.stored_bitmaps()?;
        let bitmaps = stored.into_iter().map(|b| Arc::new(DirtyBitmap::of_file(b, size))).collect();
        Ok(Self::with_bitmaps(name, origin, image, bitmaps))
    }

    fn with_bitmaps(
        name: String,
        origin: Option<Origin>,
        image: Box<dyn Image>,
        bitmaps: Vec<Arc<DirtyBitmap>>,
    ) -> Arc<Self> {
        let (name, image, bitmaps) = (RwLock::new(name), RwLock::new(image), RwLock::new(bitmaps));
        Arc::new(Node { name, origin, image, watches: RwLock::default(), bitmaps })
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

    /// Its dirty bitmaps.
    pub fn bitmaps(&self) -> Vec<Arc<DirtyBitmap>> {
        self.bitmaps.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The one of this name.
    pub fn bitmap(&self, name: &str) -> Result<Arc<DirtyBitmap>, BlockError> {
        let found = self.bitmaps().into_iter().find(|b| b.name() == name);
        found.ok_or_else(|| BlockError::Unsupported(format!("Dirty bitmap '{name}' not found")))
    }

    /// Bytes of a part of a bitmap for which nobody said it: QEMU's choice.
    pub fn default_granularity(&self) -> u64 {
        self.info().cluster_size.map_or(65536, |c| c.clamp(4096, 65536))
    }

    /// A new bitmap; what is written from here on is noted in it, if it is to record. A persistent one is in the image's file
    /// when the node has been closed.
    pub fn add_bitmap(
        &self,
        name: &str,
        granularity: Option<u64>,
        persistent: bool,
        recording: bool,
    ) -> Result<Arc<DirtyBitmap>, BlockError> {
        if name.is_empty() {
            return refused("Bitmap name cannot be empty");
        }
        if granularity.is_some_and(|g| g < 512 || !g.is_power_of_two()) {
            return refused("Granularity must be power of 2 and at least 512");
        }
        let granularity = granularity.unwrap_or_else(|| self.default_granularity());
        // The image first, as a request does.
        let image = self.image();
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        if bitmaps.iter().any(|b| b.name() == name) {
            return refused(format!("Bitmap already exists: {name}"));
        }
        if name.len() > MAX_NAME {
            return refused(format!("Bitmap name too long: {name}"));
        }
        if persistent {
            if image.format() != "qcow2" {
                return refused(format!("Can't store persistent bitmaps to {}", self.name()));
            }
            let others: Vec<String> =
                bitmaps.iter().filter(|b| b.is_persistent()).map(|b| b.name().to_owned()).collect();
            image.check_bitmap(name, granularity, &others).map_err(|e| {
                BlockError::Unsupported(format!(
                    "Can't make bitmap '{name}' persistent in '{}': {e}",
                    self.name()
                ))
            })?;
        }
        let bitmap = Arc::new(DirtyBitmap::new(name, image.size(), granularity, persistent, recording));
        bitmaps.push(Arc::clone(&bitmap));
        Ok(bitmap)
    }

    /// Take a bitmap away, out of the image's file, too.
    pub fn remove_bitmap(&self, name: &str) -> Result<Arc<DirtyBitmap>, BlockError> {
        let bitmap = self.usable_bitmap(name, Use::Remove)?;
        if bitmap.is_persistent() {
            self.image().drop_bitmap(name)?;
        }
        let mut bitmaps = self.bitmaps.write().unwrap_or_else(PoisonError::into_inner);
        bitmaps.retain(|b| !Arc::ptr_eq(b, &bitmap));
        Ok(bitmap)
    }

    /// Have one back that [`Self::remove_bitmap`] took away.
    pub fn put_bitmap_back(&self, bitmap: Arc<DirtyBitmap>) {
        self.bitmaps.write().unwrap_or_else(PoisonError::into_inner).push(bitmap);
    }

    /// The bitmap of this name, if it may be used like that.
    pub fn usable_bitmap(&self, name: &str, how: Use) -> Result<Arc<DirtyBitmap>, BlockError> {
        let bitmap = self.bitmap(name)?;
        bitmap.check(how, self.read_only())?;
        Ok(bitmap)
    }

    /// Have the image's file keep the persistent bitmaps. Nothing may be written after that before [`Image::begin`].
    fn keep(&self, image: &dyn Image) -> Result<(), BlockError> {
        let bitmaps = self.bitmaps();
        let kept: Vec<_> = bitmaps.iter().filter(|b| b.is_persistent()).map(|b| b.to_file()).collect();
        if image.read_only() || kept.is_empty() {
            return Ok(());
        }
        image.keep_bitmaps(&kept)
    }

    /// Another host writes the image: its bitmaps are none of this program's business any more.
    pub fn forget_bitmaps(&self) {
        self.bitmaps.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The image was written elsewhere, or is: nobody knows what its bitmaps should say.
    pub fn distrust_bitmaps(&self) {
        self.bitmaps().iter().for_each(|b| b.distrust());
    }

    /// Open the image for reading only, or for writing too; requests wait meanwhile. After an error it is as it was, unless
    /// that is impossible.
    pub fn reopen(&self, read_only: bool) -> Result<(), BlockError> {
        if self.read_only() == read_only {
            return Ok(());
        }
        self.reopen_as(|options| options.read_only = read_only)
    }

    /// As [`Self::reopen`], with other options: those that it has now, and what `change` makes of them.
    pub fn reopen_as(&self, change: impl FnOnce(&mut OpenOptions)) -> Result<(), BlockError> {
        let mut image = self.image_mut();
        let origin = self.origin.as_ref().ok_or_else(|| {
            BlockError::Unsupported(format!("the node '{}' cannot be opened in another mode", self.name()))
        })?;
        let mut options = OpenOptions { read_only: image.read_only(), ..origin.options() };
        change(&mut options);
        let opened = self.open_again(&mut image, &origin.path, &options);
        if opened.is_ok() {
            *origin.options.write().unwrap_or_else(PoisonError::into_inner) = options;
        } else if !image.read_only() {
            // It goes on being written.
            image.begin()?;
        }
        opened
    }

    fn open_again(
        &self,
        image: &mut Box<dyn Image>,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<(), BlockError> {
        if !image.read_only() {
            self.keep(image.as_ref())?;
            // Twice: the second writes what the first has freed.
            image.flush()?;
            image.flush()?;
        }
        let open = |read_only| {
            // Locks of this program's own conflict, too: they are taken when the other descriptor is gone.
            let unlocked = OpenOptions { read_only, locking: false, lock_later: true, ..options.clone() };
            crate::open_over(path, &unlocked, 0, Some(image.backing()))
        };
        let (new, again) = (open(options.read_only)?, open(true)?);
        let lock = options.locking && !options.force_share;
        // The old one lets its locks go.
        drop(std::mem::replace(image, new));
        let locked = if lock { image.lock_file() } else { Ok(()) }.and_then(|()| image.begin());
        if locked.is_err() {
            // Another program was faster, or has it open: as a reader there is place for both.
            *image = again;
            if let Err(e) = image.lock_file() {
                log::warn!("{}: {e}", path.display());
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
        for bitmap in self.bitmaps.read().unwrap_or_else(PoisonError::into_inner).iter() {
            bitmap.mark(offset, len);
        }
        result
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let image = self.image();
        if let Err(e) = self.keep(image.as_ref()) {
            log::error!("{}: the image's bitmaps are lost: {e}", self.name());
        }
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
        let image = self.image();
        let bitmaps = self.bitmaps();
        bitmaps.iter().try_for_each(|b| b.check(Use::Change, image.read_only()))?;
        image.resize(size)?;
        bitmaps.iter().for_each(|b| b.resize(size));
        Ok(())
    }
    fn snapshot(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        if matches!(change, SnapshotChange::Apply(_)) && !self.bitmaps().is_empty() {
            return refused("Device has active dirty bitmaps");
        }
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
    fn is_zero(&self, offset: u64) -> Result<(bool, u64), BlockError> {
        self.image().is_zero(offset)
    }
    fn check_bitmap(&self, name: &str, granularity: u64, others: &[String]) -> Result<(), BlockError> {
        self.image().check_bitmap(name, granularity, others)
    }
    fn keep_bitmaps(&self, bitmaps: &[StoredBitmap]) -> Result<(), BlockError> {
        self.image().keep_bitmaps(bitmaps)
    }
    fn drop_bitmap(&self, name: &str) -> Result<(), BlockError> {
        self.image().drop_bitmap(name)
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
