//! Taking an image over from a primary that may only be stalled.
//!
//! A paused or cut-off old primary may still have a write in its hands, past every check that it could
//! make, and that write lands whenever it runs again. So the new primary works on a fresh qcow2 overlay
//! (`IMAGE.ft1`, over a stalled overlay `IMAGE.ft2`, ...), which takes every reissued and every new write; what the
//! old one still writes into the image below is hidden by it, because each request that was in flight is
//! reissued into the overlay. How the overlay goes away again depends on what the storage can say of the old primary.
//!
//! **File systems with byte locks** ([`crate::lock`]): those locks go exactly when the process is gone and none of
//! its system calls is left. An image whose locks are free needs no overlay. While they are held, the new primary
//! works on one; when they are free it is merged down, cluster by cluster: copied and flushed below, then forgotten
//! and flushed above, so that a crash at any moment leaves each cluster in at least one of both. Then it is removed.
//!
//! **NFS servers** (`nfs://`) tell nothing: a write may sit in the old primary's socket, in the server, or be sent
//! again by a paused process, at any later time. But a write names a file by its handle, and a handle means one
//! file for ever. So a takeover always makes an overlay, and never writes the old file again: what only the old file
//! holds is copied up into the overlay while the machine runs, and when the overlay holds everything it is
//! renamed over the image. From then on the old primary's handle means a file without a name. A rename or
//! removal that the old primary itself had under way comes to the same, in whatever order: a layer that it renames
//! is complete, and layers are looked for by their numbers, with gaps.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use crate::files::{beside, beside_path, is_nfs, Files};
use crate::node::Node;
use crate::qcow2::{create_overlay, Qcow2};
use crate::{BlockError, Held, Image, ImageInfo, OpenOptions, Snapshot, SnapshotChange};

/// Clusters merged in one step.
const BATCH: usize = 16;
/// Overlays on top of each other at the most.
const MAX_LAYERS: u32 = 16;

enum Mode {
    /// The image itself, or an overlay of which nothing is merged yet.
    Top { top: Layer, rest: Rest },
    /// The overlay is being merged into `base`.
    Merging { overlay: Box<Qcow2>, base: Arc<dyn Image>, base_path: PathBuf, next: u64 },
    /// An error in the middle of a change of modes.
    Broken,
}

/// What is to be done with the layers below the top.
enum Rest {
    Nothing,
    /// The top stands on this one, which may be locked by another process.
    Locked(PathBuf),
    /// The top is layer `n`; what it does not hold of those below is copied up from `next` on.
    Below {
        n: u32,
        lower: Vec<Arc<Qcow2>>,
        next: u64,
    },
}

enum Layer {
    Image(Arc<dyn Image>),
    Overlay(Box<Qcow2>),
}

impl Layer {
    fn image(&self) -> &dyn Image {
        match self {
            Layer::Image(i) => i.as_ref(),
            Layer::Overlay(o) => o.as_ref(),
        }
    }
}

/// An image with whatever overlays takeovers have left on it.
pub struct Takeover {
    options: OpenOptions,
    base: PathBuf,
    size: AtomicU64,
    format: &'static str,
    mode: RwLock<Mode>,
}

fn layer(base: &Path, n: u32) -> PathBuf {
    match n {
        0 => base.to_owned(),
        n => beside_path(base, &format!(".ft{n}")),
    }
}

fn layer_name(name: &str, n: u32) -> String {
    match n {
        0 => name.to_owned(),
        n => format!("{name}.ft{n}"),
    }
}

/// The highest layer below `limit` that exists; the image itself is layer 0.
fn highest(files: &dyn Files, name: &str, limit: u32) -> Result<u32, BlockError> {
    for n in (1..limit).rev() {
        if files.exists(&layer_name(name, n))? {
            return Ok(n);
        }
    }
    Ok(0)
}

fn topmost(base: &Path) -> Result<u32, BlockError> {
    let (files, name) = beside(base)?;
    highest(files.as_ref(), &name, MAX_LAYERS + 1)
}

/// Whether takeovers have left overlays on an image.
pub fn has_overlays(path: &Path) -> Result<bool, BlockError> {
    Ok(topmost(path)? > 0)
}

/// Whether another process holds the topmost layer of an image for writing.
pub fn is_held(path: &Path) -> Result<bool, BlockError> {
    let top = layer(path, topmost(path)?);
    match crate::store::open(&top, &OpenOptions { read_only: true, ..OpenOptions::default() }) {
        Ok(_) => Ok(false),
        Err(BlockError::Locked { .. }) => Ok(true),
        Err(e) => Err(e),
    }
}

fn format_of(path: &Path) -> Result<&'static str, BlockError> {
    let look = OpenOptions { read_only: true, force_share: true, ..OpenOptions::default() };
    Ok(crate::open(path, &look)?.format())
}

/// Options for opening layer `n`.
fn layer_options(options: &OpenOptions, n: u32) -> OpenOptions {
    if n == 0 {
        options.clone()
    } else {
        OpenOptions { format: Some("qcow2".into()), ..options.clone() }
    }
}

/// Open layer `n` (which exists) and those below it for reading, the highest first.
fn lower_layers(base: &Path, options: &OpenOptions, n: u32) -> Result<Vec<Arc<Qcow2>>, BlockError> {
    let (files, name) = beside(base)?;
    let mut numbers = vec![n];
    while let Some(m) = numbers.last().copied().filter(|m| *m > 0) {
        numbers.push(highest(files.as_ref(), &name, m)?);
    }
    let mut stack: Vec<Arc<Qcow2>> = Vec::new();
    for n in numbers.into_iter().rev() {
        let look = OpenOptions { read_only: true, force_share: true, ..layer_options(options, n) };
        let file = crate::store::open(&layer(base, n), &look)?;
        let opened = match stack.first() {
            Some(below) => Qcow2::over_with(file, &look, Some(Node::around(Arc::clone(below) as _)))?,
            None => Qcow2::over(file, &look, 0)?,
        };
        stack.insert(0, Arc::new(opened));
    }
    Ok(stack)
}

/// An image on an NFS server must be one whose contents can be moved to a new file as a whole.
fn check_movable(base: &Path, options: &OpenOptions) -> Result<(), BlockError> {
    let bad = |reason: &str| {
        Err(BlockError::Format {
            path: base.to_owned(),
            reason: format!(
                "{reason} cannot be used by a pair on nfs://, where a takeover moves the image to a new file"
            ),
        })
    };
    if options.format.as_deref() == Some("raw") || format_of(base)? != "qcow2" {
        return bad("a raw image (only qcow2)");
    }
    let look = OpenOptions { read_only: true, ..options.clone() };
    if Qcow2::over(crate::store::open(base, &look)?, &look, 0)?.has_snapshots() {
        return bad("an image with internal snapshots");
    }
    Ok(())
}

impl Takeover {
    /// Open `path` with its overlays for writing. `over_stalled`: the pair's lock was won, and an old primary may
    /// still have writes under way; where it does (or may), a fresh overlay goes on top.
    pub fn open(path: &Path, options: &OpenOptions, over_stalled: bool) -> Result<Self, BlockError> {
        let mode = if is_nfs(path) {
            Self::open_moving(path, options, over_stalled)?
        } else {
            Self::open_locked(path, options, over_stalled)?
        };
        let (size, format) = match &mode {
            Mode::Top { top, .. } => (top.image().size(), top.image().format()),
            _ => return Err(broken()),
        };
        let (options, base, size) = (options.clone(), path.to_owned(), AtomicU64::new(size));
        Ok(Takeover { options, base, size, format, mode: RwLock::new(mode) })
    }

    /// Where nothing is known of the old primary.
    fn open_moving(path: &Path, options: &OpenOptions, over_stalled: bool) -> Result<Mode, BlockError> {
        check_movable(path, options)?;
        let mut n = topmost(path)?;
        if over_stalled {
            if n == MAX_LAYERS {
                return Err(BlockError::Format { path: path.to_owned(), reason: "too many overlays".into() });
            }
            let top = lower_layers(path, options, n)?;
            let size = top.first().map_or(0, |t| t.size());
            let (_, name) = beside(path)?;
            let fresh = layer(path, n + 1);
            create_overlay(&fresh, size, Some((&layer_name(&name, n), "qcow2")))?;
            log::warn!("working on {}, until the image is moved to a new file", fresh.display());
            n += 1;
        }
        if n == 0 {
            let top = Layer::Image(Arc::from(crate::open(path, options)?));
            return Ok(Mode::Top { top, rest: Rest::Nothing });
        }
        let (files, name) = beside(path)?;
        let lower = lower_layers(path, options, highest(files.as_ref(), &name, n)?)?;
        let own = layer_options(options, n);
        let file = crate::store::open(&layer(path, n), &own)?;
        let below = lower.first().cloned().ok_or_else(broken)?;
        let top = Layer::Overlay(Box::new(Qcow2::over_with(file, &own, Some(Node::around(below as _)))?));
        Ok(Mode::Top { top, rest: Rest::Below { n, lower, next: 0 } })
    }

    /// Where byte locks tell whether the old primary is gone.
    fn open_locked(path: &Path, options: &OpenOptions, over_stalled: bool) -> Result<Mode, BlockError> {
        let n = topmost(path)?;
        let top = layer(path, n);
        let shared_below = |top: &Path, n: u32, below: u32| -> Result<Qcow2, BlockError> {
            // What lies below is only read, whoever holds it.
            let file = crate::store::open(top, &layer_options(options, n))?;
            let look = OpenOptions { read_only: true, force_share: true, ..layer_options(options, below) };
            let under = Node::open_depth(&layer(path, below), &look, 0)?;
            Qcow2::over_with(file, &layer_options(options, n), Some(under))
        };
        let opened = if n == 0 {
            crate::open(&top, options).map(|i| Layer::Image(Arc::from(i)))
        } else {
            shared_below(&top, n, n - 1).map(|o| Layer::Overlay(Box::new(o)))
        };
        Ok(match opened {
            Ok(top) => {
                let rest = if n > 0 { Rest::Locked(layer(path, n - 1)) } else { Rest::Nothing };
                Mode::Top { top, rest }
            }
            Err(BlockError::Locked { .. }) if over_stalled && n < MAX_LAYERS => {
                let fresh = layer(path, n + 1);
                let look = OpenOptions { read_only: true, force_share: true, ..layer_options(options, n) };
                let size = crate::open(&top, &look)?.size();
                let name = top.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
                create_overlay(&fresh, size, Some((&name, format_of(&top)?)))?;
                log::warn!(
                    "{} is still held by the old primary: working on {}",
                    top.display(),
                    fresh.display()
                );
                let overlay = shared_below(&fresh, n + 1, n)?;
                Mode::Top { top: Layer::Overlay(Box::new(overlay)), rest: Rest::Locked(top) }
            }
            Err(e) => return Err(e),
        })
    }

    /// Serve a request; many may be here at once.
    fn with<R>(&self, f: impl Fn(&Mode) -> Result<R, BlockError>) -> Result<R, BlockError> {
        let result = f(&*self.mode.read().map_err(|_| failed())?);
        match result {
            // The old primary's own rename came late: what is below now has the same contents.
            Err(e) if e.errno() == libc::ESTALE => {
                self.look_again()?;
                f(&*self.mode.read().map_err(|_| failed())?)
            }
            other => other,
        }
    }

    /// Change the image as a whole, which no overlay may lie on.
    fn alone<R>(&self, f: impl Fn(&dyn Image) -> Result<R, BlockError>) -> Result<R, BlockError> {
        self.with(|mode| match mode {
            Mode::Top { top: Layer::Image(image), rest: Rest::Nothing } => f(image.as_ref()),
            Mode::Broken => Err(broken()),
            _ => Err(BlockError::Unsupported(
                "a takeover has left an overlay on the image, which is still being merged: try again later"
                    .into(),
            )),
        })
    }

    /// Open the layers below the top anew.
    fn look_again(&self) -> Result<(), BlockError> {
        let mut mode = self.mode.write().map_err(|_| failed())?;
        if let Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below { n, lower, .. } } = &mut *mode {
            let (files, name) = beside(&self.base)?;
            *lower = lower_layers(&self.base, &self.options, highest(files.as_ref(), &name, *n)?)?;
            overlay.set_backing(lower.first().map(|l| Node::around(Arc::clone(l) as _)))?;
        }
        Ok(())
    }

    /// One step of the background work: take the layer below over if it is free, or merge a batch.
    fn step(&self) -> Result<bool, BlockError> {
        let nothing = |mode: &Mode| Ok(matches!(mode, Mode::Top { rest: Rest::Nothing, .. } | Mode::Broken));
        if self.with(nothing)? {
            return Ok(false);
        }
        // No request is under way while clusters change their place.
        let mut mode = self.mode.write().map_err(|_| failed())?;
        let mode = &mut *mode;
        match mode {
            Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below { n, lower, next } } => {
                if !copy_up(overlay, lower, next, self.size())? {
                    return Ok(true);
                }
                let n = *n;
                self.finish_moving(mode, n)?;
                Ok(false)
            }
            Mode::Top { rest: Rest::Locked(below), .. } => {
                let options = layer_options(&self.options, u32::from(*below != self.base));
                let base: Arc<dyn Image> = match crate::open(below, &options) {
                    Ok(image) => Arc::from(image),
                    Err(BlockError::Locked { .. }) => return Ok(true),
                    Err(e) => return Err(e),
                };
                log::info!("{} is free: merging into it", below.display());
                let below = below.clone();
                *mode = match std::mem::replace(mode, Mode::Broken) {
                    Mode::Top { top: Layer::Overlay(overlay), .. } => {
                        overlay.set_backing(Some(Node::around(Arc::clone(&base))))?;
                        Mode::Merging { overlay, base, base_path: below, next: 0 }
                    }
                    other => other,
                };
                Ok(true)
            }
            Mode::Merging { overlay, base, base_path, next } => {
                let cluster = overlay.cluster();
                let mut batch = Vec::new();
                while *next < self.size() && batch.len() < BATCH {
                    if overlay.holds(*next)? {
                        let mut data = vec![0u8; cluster.min(self.size() - *next) as usize];
                        overlay.read_at(*next, &mut data)?;
                        base.write_at(*next, &data)?;
                        batch.push(*next);
                    }
                    *next += cluster;
                }
                base.flush()?;
                for guest in &batch {
                    overlay.forget(*guest)?;
                }
                overlay.flush()?;
                if *next < self.size() {
                    return Ok(true);
                }
                // Everything is below; the overlay holds nothing any more.
                let gone = overlay.path().to_owned();
                let (files, name) = beside(&gone)?;
                files.remove(&name)?;
                log::info!("{} is merged", gone.display());
                let base = Arc::clone(base);
                if *base_path == self.base {
                    *mode = Mode::Top { top: Layer::Image(base), rest: Rest::Nothing };
                    return Ok(false);
                }
                // The layer below was an overlay itself: go on with it.
                *mode = Mode::Broken;
                drop(base);
                *mode = Self::open_locked(&self.base, &self.options, false)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// The overlay holds everything: it becomes the image.
    fn finish_moving(&self, mode: &mut Mode, n: u32) -> Result<(), BlockError> {
        let Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below { lower, .. } } = mode else {
            return Ok(());
        };
        let own = lower.last().and_then(|image| image.backing_name());
        overlay.flush()?;
        overlay.rename_overlay(own.as_ref().map(|(name, format)| (name.as_str(), format.as_str())))?;
        let (files, name) = beside(&self.base)?;
        for m in 1..n {
            if files.exists(&layer_name(&name, m))? {
                files.remove(&layer_name(&name, m))?;
            }
        }
        files.rename(&layer_name(&name, n), &name)?;
        log::info!("{}: the image is a new file now", self.base.display());
        let backing = lower.last().and_then(|image| image.below());
        *mode = match std::mem::replace(mode, Mode::Broken) {
            Mode::Top { top: Layer::Overlay(overlay), .. } => {
                overlay.set_backing(backing)?;
                Mode::Top { top: Layer::Image(Arc::from(overlay as Box<dyn Image>)), rest: Rest::Nothing }
            }
            other => other,
        };
        Ok(())
    }
}

/// Copy a batch of clusters that the overlay does not hold but a layer below does; true at the end of the image.
fn copy_up(overlay: &Qcow2, lower: &[Arc<Qcow2>], next: &mut u64, size: u64) -> Result<bool, BlockError> {
    let cluster = overlay.cluster();
    let (mut copied, mut looked) = (0, 0);
    while *next < size && copied < BATCH && looked < 64 * BATCH {
        looked += 1;
        let len = cluster.min(size - *next);
        if !overlay.holds(*next)? {
            let mut below = false;
            for image in lower {
                let mut at = *next;
                while !below && at < *next + len {
                    below = image.holds(at)?;
                    at += image.cluster();
                }
            }
            if below {
                let mut data = vec![0u8; len as usize];
                overlay.read_at(*next, &mut data)?;
                if data.iter().all(|b| *b == 0) {
                    overlay.write_zeroes(*next, len, true)?;
                } else {
                    overlay.write_at(*next, &data)?;
                }
                copied += 1;
            }
        }
        *next += cluster;
    }
    Ok(*next >= size)
}

impl Image for Takeover {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
    fn read_only(&self) -> bool {
        false
    }
    fn format(&self) -> &'static str {
        self.format
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let buf = std::cell::RefCell::new(buf);
        self.with(|mode| match mode {
            Mode::Top { top, .. } => top.image().read_at(offset, &mut buf.borrow_mut()),
            Mode::Merging { overlay, .. } => overlay.read_at(offset, &mut buf.borrow_mut()),
            Mode::Broken => Err(broken()),
        })
    }
    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        // Only of the file that keeps the image's name from now on.
        match &*self.mode.read().ok()? {
            Mode::Top { top: Layer::Image(image), rest: Rest::Nothing } => image.extents(offset, len),
            _ => None,
        }
    }
    fn grain(&self) -> u64 {
        match self.mode.read().as_deref() {
            Ok(Mode::Top { top: Layer::Image(image), rest: Rest::Nothing }) => image.grain(),
            // Whatever becomes of the layers: that of the largest clusters.
            _ => 1 << 21,
        }
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.with(|mode| match mode {
            Mode::Top { top, .. } => top.image().write_at(offset, data),
            Mode::Merging { overlay, base, .. } => {
                for (at, len, above) in split(overlay, offset, data.len() as u64)? {
                    let piece = &data[(at - offset) as usize..(at - offset + len) as usize];
                    if above {
                        overlay.write_at(at, piece)?;
                    } else {
                        base.write_at(at, piece)?;
                    }
                }
                Ok(())
            }
            Mode::Broken => Err(broken()),
        })
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.with(|mode| match mode {
            Mode::Top { top, .. } => top.image().write_zeroes(offset, len, may_unmap),
            Mode::Merging { overlay, base, .. } => {
                for (at, len, above) in split(overlay, offset, len)? {
                    if above {
                        overlay.write_zeroes(at, len, may_unmap)?;
                    } else {
                        base.write_zeroes(at, len, may_unmap)?;
                    }
                }
                Ok(())
            }
            Mode::Broken => Err(broken()),
        })
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.with(|mode| match mode {
            Mode::Top { top: Layer::Image(i), .. } => i.discard(offset, len),
            // One that is reissued must hide what the old primary may still do below: it zeroes whole clusters.
            Mode::Top { top: Layer::Overlay(overlay), .. } => {
                let cluster = overlay.cluster();
                let (from, to) = (offset.next_multiple_of(cluster), (offset + len) / cluster * cluster);
                if from < to {
                    overlay.write_zeroes(from, to - from, true)?;
                }
                Ok(())
            }
            // Discards are hints; while two layers are merged they are not worth the trouble.
            _ => Ok(()),
        })
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.with(|mode| match mode {
            Mode::Top { top, .. } => top.image().flush(),
            Mode::Merging { overlay, base, .. } => {
                base.flush()?;
                overlay.flush()
            }
            Mode::Broken => Err(broken()),
        })
    }
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.alone(|image| image.resize(size).map(|()| self.size.store(size, Ordering::Relaxed)))
    }
    fn snapshot(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        if is_nfs(&self.base) {
            return Err(BlockError::Unsupported(
                "a pair on nfs:// cannot have internal snapshots, because a takeover moves the image to a new file".into(),
            ));
        }
        self.alone(|image| image.snapshot(change))
    }
    fn backing(&self) -> Option<Arc<Node>> {
        self.alone(|image| Ok(image.backing())).ok().flatten()
    }
    fn set_backing(&self, backing: Option<Arc<Node>>) -> Result<(), BlockError> {
        self.alone(|image| image.set_backing(backing.clone()))
    }
    fn name_backing(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        self.alone(|image| image.name_backing(backing))
    }
    fn held(&self, offset: u64) -> Result<(Held, u64), BlockError> {
        self.alone(|image| image.held(offset))
    }
    fn info(&self) -> ImageInfo {
        self.with(|mode| match mode {
            Mode::Top { top, .. } => Ok(top.image().info()),
            Mode::Merging { base, .. } => Ok(base.info()),
            Mode::Broken => Err(broken()),
        })
        .unwrap_or_default()
    }
    fn background(&self) -> bool {
        self.step().unwrap_or_else(|e| {
            log::error!("{}: merging stopped: {e}", self.base.display());
            true
        })
    }
}

fn failed() -> BlockError {
    BlockError::Corrupt("an earlier request failed badly".into())
}

fn broken() -> BlockError {
    BlockError::Corrupt("the image's layers could not be changed over".into())
}

/// Cut a range into pieces that are (true) or are not (false) in the overlay.
fn split(overlay: &Qcow2, offset: u64, len: u64) -> Result<Vec<(u64, u64, bool)>, BlockError> {
    let cluster = overlay.cluster();
    let mut out: Vec<(u64, u64, bool)> = Vec::new();
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let next = ((at / cluster + 1) * cluster).min(end);
        out.push((at, next - at, overlay.holds(at)?));
        at = next;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(name: &str) -> (PathBuf, PathBuf) {
        let d = std::env::temp_dir().join(format!("ftvm-takeover-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&d);
        std::fs::create_dir_all(&d).unwrap();
        let path = d.join("vm.qcow2");
        create_overlay(&path, 4 << 20, None).unwrap();
        (d, path)
    }

    #[test]
    fn a_free_image_is_opened_itself() {
        let (d, path) = setup("free");
        let image = Takeover::open(&path, &OpenOptions::default(), true).unwrap();
        image.write_at(0, &[1; 512]).unwrap();
        assert!(!image.background());
        assert!(!has_overlays(&path).unwrap());
        std::fs::remove_dir_all(d).unwrap();
    }

    #[test]
    fn a_late_write_of_a_stalled_owner_is_hidden_and_merged_away() {
        for raw in [false, true] {
            let (d, mut path) = setup(if raw { "late-raw" } else { "late" });
            if raw {
                path = d.join("vm.raw");
                std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
            }
            let old = crate::open(&path, &OpenOptions::default()).unwrap();
            old.write_at(0, &[0xA1; 4096]).unwrap();
            old.write_at(1 << 20, &[0xA2; 4096]).unwrap();
            old.flush().unwrap();
            assert!(matches!(
                Takeover::open(&path, &OpenOptions::default(), false),
                Err(BlockError::Locked { .. })
            ));
            let new = Takeover::open(&path, &OpenOptions::default(), true).unwrap();
            assert!(has_overlays(&path).unwrap());
            // The request that was in flight is reissued, and overwritten by the guest.
            new.write_at(0, &[0xB1; 4096]).unwrap();
            new.write_at(0, &[0xB2; 4096]).unwrap();
            new.flush().unwrap();
            assert!(new.background(), "waits for the old owner");
            // The old owner wakes up, and its write lands.
            old.write_at(0, &[0xA1; 4096]).unwrap();
            old.flush().unwrap();
            let mut buf = [0u8; 4096];
            new.read_at(0, &mut buf).unwrap();
            assert_eq!(buf, [0xB2; 4096]);
            drop(old);
            let mut n = 0u8;
            while new.background() {
                // Work goes on while merging.
                n += 1;
                new.write_at(2 << 20, &[n; 512]).unwrap();
                assert!(n < 100);
            }
            assert!(!has_overlays(&path).unwrap());
            for (at, want) in [(0u64, 0xB2u8), (1 << 20, 0xA2), (2 << 20, n)] {
                new.read_at(at, &mut buf[..512]).unwrap();
                assert_eq!(buf[..512], [want; 512], "at {at}");
            }
            drop(new);
            let again = crate::open(&path, &OpenOptions::default()).unwrap();
            again.read_at(0, &mut buf).unwrap();
            assert_eq!(buf, [0xB2; 4096]);
            std::fs::remove_dir_all(d).unwrap();
        }
    }

    #[test]
    fn an_overlay_that_was_left_is_found_and_merged_at_the_next_opening() {
        let (d, path) = setup("left");
        let old = crate::open(&path, &OpenOptions::default()).unwrap();
        let new = Takeover::open(&path, &OpenOptions::default(), true).unwrap();
        new.write_at(4096, &[7; 4096]).unwrap();
        new.flush().unwrap();
        drop(new);
        drop(old);
        let image = Takeover::open(&path, &OpenOptions::default(), false).unwrap();
        let mut buf = [0u8; 4096];
        image.read_at(4096, &mut buf).unwrap();
        assert_eq!(buf, [7; 4096]);
        while image.background() {}
        assert!(!has_overlays(&path).unwrap());
        image.read_at(4096, &mut buf).unwrap();
        assert_eq!(buf, [7; 4096]);
        std::fs::remove_dir_all(d).unwrap();
    }
}
