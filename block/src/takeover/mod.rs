//! Taking an image over from a primary that may only be stalled.
//!
//! A paused or cut-off old primary may still have a write in its hands, past every check that it could
//! make, and that write lands whenever it runs again. So the new primary works on a fresh qcow2 overlay
//! (`IMAGE.ft1`, over a stalled overlay `IMAGE.ft2`, ...; on NFS with larger numbers), which takes every reissued and every new write; what the
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
//! holds is copied into a new file while the machine runs, and when that has everything it is renamed over the
//! image. From then on the old primary's handle means a file without a name ([`moving`] has the details).

mod layers;
mod moving;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use crate::bitmap::StoredBitmap;
use crate::files::{beside, is_nfs};
use crate::node::Node;
use crate::qcow2::{create_overlay, Qcow2};
use crate::{BlockError, Held, Image, ImageInfo, OpenOptions, Snapshot, SnapshotChange};
use layers::{layer, layer_options, overlays, MAX_LAYERS};
use moving::Moving;

pub use layers::{has_overlays, is_held, top_overlay};

/// Clusters merged in one step.
const BATCH: usize = 16;

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
    /// What the top does not hold of those below is copied into a new file.
    Below(Moving),
}

impl Rest {
    /// Do with a new file that is being made what was done with the top.
    fn repeat(&self, change: impl FnOnce(&dyn Image) -> Result<(), BlockError>) -> Result<(), BlockError> {
        match self {
            Rest::Below(moving) => moving.repeat(change),
            _ => Ok(()),
        }
    }
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

    /// Where byte locks tell whether the old primary is gone.
    fn open_locked(path: &Path, options: &OpenOptions, over_stalled: bool) -> Result<Mode, BlockError> {
        let (n, below) = match overlays(path)?[..] {
            [] => (0, 0),
            [n] => (n, 0),
            [.., below, n] => (n, below),
        };
        let top = layer(path, n);
        let shared_below = |top: &Path, n: u64, below: u64| -> Result<Qcow2, BlockError> {
            // What lies below is only read, whoever holds it.
            let file = crate::store::open(top, &layer_options(options, n))?;
            let look = OpenOptions { read_only: true, force_share: true, ..layer_options(options, below) };
            let under = Node::open_depth(&layer(path, below), &look, 0)?;
            Qcow2::over_with(file, &layer_options(options, n), Some(under))
        };
        let opened = if n == 0 {
            crate::open(&top, options).map(|i| Layer::Image(Arc::from(i)))
        } else {
            shared_below(&top, n, below).map(|o| Layer::Overlay(Box::new(o)))
        };
        Ok(match opened {
            Ok(top) => {
                let rest = if n > 0 { Rest::Locked(layer(path, below)) } else { Rest::Nothing };
                Mode::Top { top, rest }
            }
            Err(BlockError::Locked { .. }) if over_stalled && n < MAX_LAYERS as u64 => {
                let fresh = layer(path, n + 1);
                let look = OpenOptions { read_only: true, force_share: true, ..layer_options(options, n) };
                let below = crate::open(&top, &look)?;
                let name = top.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
                create_overlay(&fresh, below.size(), Some((&name, below.format())), below.luks_area())?;
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
        if let Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below(moving) } = &mut *mode {
            moving.look_again(&self.base, &self.options, overlay)?;
        }
        Ok(())
    }

    /// One step of the background work: take the layer below over if it is free, or merge a batch.
    fn step(&self) -> Result<bool, BlockError> {
        let nothing = |mode: &Mode| {
            Ok(match mode {
                Mode::Top { rest: Rest::Nothing, .. } | Mode::Broken => true,
                Mode::Top { rest: Rest::Below(moving), .. } => moving.has_failed(),
                _ => false,
            })
        };
        if self.with(nothing)? {
            return Ok(false);
        }
        // No request is under way while clusters change their place.
        let mut mode = self.mode.write().map_err(|_| failed())?;
        let mode = &mut *mode;
        match mode {
            Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below(moving) } => {
                if !moving.copy(overlay, self.size())? {
                    return Ok(true);
                }
                self.finish_moving(mode)?;
                Ok(false)
            }
            Mode::Top { rest: Rest::Locked(below), .. } => {
                let options = layer_options(&self.options, u64::from(*below != self.base));
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
            Mode::Top { top, rest } => {
                top.image().write_at(offset, data)?;
                rest.repeat(|image| image.write_at(offset, data))
            }
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
            Mode::Top { top, rest } => {
                top.image().write_zeroes(offset, len, may_unmap)?;
                rest.repeat(|image| image.write_zeroes(offset, len, may_unmap))
            }
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
            // A raw file on an NFS server knows no discards.
            Mode::Top { rest: Rest::Below(moving), .. } if moving.is_raw() => Ok(()),
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
    fn write_vm_state(&self, at: u64, data: &[u8]) -> Result<(), BlockError> {
        self.alone(|image| image.write_vm_state(at, data))
    }
    fn drop_vm_state(&self) -> Result<(), BlockError> {
        self.alone(|image| image.drop_vm_state())
    }
    fn read_vm_state(&self, id: &str, at: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let buf = std::cell::RefCell::new(buf);
        self.alone(|image| image.read_vm_state(id, at, &mut buf.borrow_mut()))
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
    fn stored_bitmaps(&self) -> Result<Vec<StoredBitmap>, BlockError> {
        // Of an image that an overlay lies on nobody kept them: they stay marked as in use.
        self.with(|mode| match mode {
            Mode::Top { top: Layer::Image(image), rest: Rest::Nothing } => image.stored_bitmaps(),
            _ => Ok(Vec::new()),
        })
    }
    fn check_bitmap(&self, name: &str, granularity: u64, others: &[String]) -> Result<(), BlockError> {
        self.alone(|image| image.check_bitmap(name, granularity, others))
    }
    fn keep_bitmaps(&self, bitmaps: &[StoredBitmap]) -> Result<(), BlockError> {
        self.alone(|image| image.keep_bitmaps(bitmaps))
    }
    fn drop_bitmap(&self, name: &str) -> Result<(), BlockError> {
        self.alone(|image| image.drop_bitmap(name))
    }
    fn background(&self) -> bool {
        let done = match self.step() {
            // As for a request: what the old primary still did is complete.
            Err(e) if e.errno() == libc::ESTALE => self.look_again().map(|()| true),
            other => other,
        };
        done.unwrap_or_else(|e| {
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
mod tests;
