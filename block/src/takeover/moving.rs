//! Moving an image to a new file, where nothing tells whether the old primary can still write the old one.
//!
//! A qcow2 image: the overlay itself becomes the new file. What it does not hold is copied up into it; then it takes the
//! image's name.
//!
//! A raw image: the overlay cannot become it. So beside the overlay lies a second new file, `IMAGE.ft<number>.raw`, made before
//! the new primary goes live. Every write goes to both, and what lies below is copied into the new file while the
//! machine runs. When it has everything it takes the image's name, and then the overlays are removed, the
//! topmost last. A crash before the renaming leaves the overlays, which have everything; one after it leaves overlays on a
//! new file that has what they have, in each number of them that may be left.
//!
//! Numbers are never used twice (they are the time of the takeover in seconds, or the next higher number): so a renaming
//! or removal that a stalled old primary still has under way means its own files, which its successor has
//! removed, or whose contents are complete. A new raw file of an old primary's is removed before the successor's own takes
//! the name, and none is ever made while a machine runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::layers::{self, layer, layer_name, layer_options, lower_layers, numbers, overlays, MAX_LAYERS};
use super::{broken, Layer, Mode, Rest, Takeover, BATCH};
use crate::files::{beside, beside_path, Files};
use crate::node::Node;
use crate::qcow2::{create_overlay, Qcow2};
use crate::{BlockError, Held, Image, OpenOptions};
use std::path::Path;

/// Bytes of a raw image copied in one step, in which no request is served.
const STEP: u64 = 2 << 20;
/// In pieces of this size.
const PIECE: u64 = 512 << 10;

/// Copying what lies below layer `n`.
pub(super) struct Moving {
    n: u64,
    lower: Vec<Arc<dyn Image>>,
    next: u64,
    /// A raw image's new file.
    raw: Option<NewFile>,
}

struct NewFile {
    number: u64,
    image: Box<dyn Image>,
    /// It lacks a write.
    spoiled: AtomicBool,
    /// It has the image's name already.
    renamed: bool,
}

/// Nobody before has used this number.
fn fresh_number(last: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    now.max(last + 1)
}

/// An image with internal snapshots cannot be moved to a new file as a whole.
fn check_movable(base: &Path, options: &OpenOptions) -> Result<&'static str, BlockError> {
    let look = OpenOptions { read_only: true, ..options.clone() };
    let image = crate::open(base, &look)?;
    if image.info().snapshots.is_empty() {
        return Ok(image.format());
    }
    Err(BlockError::Format {
        path: base.to_owned(),
        reason:
            "an image with internal snapshots cannot be used by a pair on nfs://, where a takeover moves the image to a \
             new file"
                .into(),
    })
}

impl NewFile {
    /// `luks`: what lies before the data of an encrypted volume, which stays as it is.
    fn create(
        base: &Path,
        options: &OpenOptions,
        number: u64,
        size: u64,
        luks: Option<Vec<u8>>,
    ) -> Result<Self, BlockError> {
        let path = beside_path(base, &format!(".ft{number}.raw"));
        let (files, name) = beside(&path)?;
        files.create(&name, &[])?;
        let format = if luks.is_some() { "luks" } else { "raw" };
        let luks = luks.unwrap_or_default();
        let options = OpenOptions { format: Some(format.into()), ..options.clone() };
        let store = crate::store::open(&path, &options)?;
        store.grow(luks.len() as u64 + size)?;
        store.write_at(0, &luks)?;
        store.sync()?;
        let image = crate::open(&path, &options)?;
        Ok(NewFile { number, image, spoiled: AtomicBool::new(false), renamed: false })
    }

    fn name(&self, image: &str) -> String {
        format!("{image}.ft{}.raw", self.number)
    }
}

impl Moving {
    /// Do with the new file what has just been done with the overlay. It is not what the machine's requests depend on: when
    /// it fails, the overlay stays.
    pub(super) fn repeat(
        &self,
        change: impl FnOnce(&dyn Image) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        let Some(raw) = self.raw.as_ref() else { return Ok(()) };
        if raw.renamed {
            return change(raw.image.as_ref());
        }
        if raw.spoiled.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Err(e) = change(raw.image.as_ref()) {
            if !raw.spoiled.swap(true, Ordering::Relaxed) {
                log::error!(
                    "the image's new file cannot be written: {e}; the overlay stays until the next start"
                );
            }
        }
        Ok(())
    }

    /// Whether it is a raw image that moves.
    pub(super) fn is_raw(&self) -> bool {
        self.raw.is_some()
    }

    /// Whether there is no more to be done before the next start.
    pub(super) fn has_failed(&self) -> bool {
        self.raw.as_ref().is_some_and(|raw| raw.spoiled.load(Ordering::Relaxed))
    }

    /// Open the layers below the top anew.
    pub(super) fn look_again(
        &mut self,
        base: &Path,
        options: &OpenOptions,
        overlay: &Qcow2,
    ) -> Result<(), BlockError> {
        self.lower = lower_layers(base, options, self.n)?;
        overlay.set_backing(self.lower.first().map(|l| Node::around(Arc::clone(l))))
    }

    /// Copy a batch; true at the end of the image.
    pub(super) fn copy(&mut self, overlay: &Qcow2, size: u64) -> Result<bool, BlockError> {
        match &self.raw {
            Some(raw) => copy_over(overlay, raw, &mut self.next, size)?,
            None => copy_up(overlay, &self.lower, &mut self.next, size)?,
        }
        Ok(self.next >= size)
    }

    /// The image is complete in a new file: give that the image's name, and leave nothing else.
    pub(super) fn finish(&mut self, base: &Path, overlay: &Qcow2) -> Result<(), BlockError> {
        let (files, name) = beside(base)?;
        overlay.flush()?;
        let Some(raw) = &mut self.raw else {
            let below = self.lower.last().and_then(|image| image.info().backing);
            let below = below.map(|(text, _, format)| (text, format.unwrap_or_else(|| "raw".into())));
            overlay.rename_overlay(below.as_ref().map(|(name, format)| (name.as_str(), format.as_str())))?;
            for m in overlays(base)?.into_iter().filter(|m| *m < self.n) {
                remove(files.as_ref(), &layer_name(&name, m))?;
            }
            files.rename(&layer_name(&name, self.n), &name)?;
            return Ok(());
        };
        if !raw.renamed {
            raw.image.flush()?;
            for m in numbers(files.as_ref(), &name, ".raw")?.into_iter().filter(|m| *m < raw.number) {
                remove(files.as_ref(), &format!("{name}.ft{m}.raw"))?;
            }
            files.rename(&raw.name(&name), &name)?;
            raw.renamed = true;
        }
        // From the lowest on: those above have what is newer.
        for m in overlays(base)?.into_iter().filter(|m| *m <= self.n) {
            remove(files.as_ref(), &layer_name(&name, m))?;
        }
        Ok(())
    }
}

/// Remove a name that may be gone already.
fn remove(files: &dyn Files, name: &str) -> Result<(), BlockError> {
    match files.remove(name) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

impl Takeover {
    /// Open the image's layers, with a fresh one on top where a primary was left behind.
    pub(super) fn open_moving(
        path: &Path,
        options: &OpenOptions,
        over_stalled: bool,
    ) -> Result<Mode, BlockError> {
        let format = check_movable(path, options)?;
        let mut layers = overlays(path)?;
        if over_stalled {
            if layers.len() == MAX_LAYERS {
                return Err(BlockError::Format { path: path.to_owned(), reason: "too many overlays".into() });
            }
            let below = layers.last().copied().unwrap_or(0);
            let n = fresh_number(below);
            let top = lower_layers(path, options, n)?;
            let (size, luks) = top.first().map_or((0, None), |t| (t.size(), t.luks_area()));
            let (_, name) = beside(path)?;
            let fresh = layer(path, n);
            let below_format = if below == 0 { format } else { "qcow2" };
            create_overlay(&fresh, size, Some((&layer_name(&name, below), below_format)), luks)?;
            log::warn!("working on {}, until the image is moved to a new file", fresh.display());
            layers.push(n);
        }
        let Some(n) = layers.last().copied() else {
            let top = Layer::Image(Arc::from(crate::open(path, options)?));
            return Ok(Mode::Top { top, rest: Rest::Nothing });
        };
        let lower = lower_layers(path, options, n)?;
        let own = layer_options(options, n);
        let file = crate::store::open(&layers::layer(path, n), &own)?;
        let below = lower.first().cloned().ok_or_else(broken)?;
        let overlay = Qcow2::over_with(file, &own, Some(Node::around(below)))?;
        let raw = if format == "qcow2" {
            None
        } else {
            let number = if over_stalled { n } else { fresh_number(n) };
            let luks = lower.last().and_then(|image| image.luks_area());
            Some(NewFile::create(path, options, number, overlay.size(), luks)?)
        };
        let rest = Rest::Below(Moving { n, lower, next: 0, raw });
        Ok(Mode::Top { top: Layer::Overlay(Box::new(overlay)), rest })
    }

    /// Everything is in a new file: it becomes the image.
    pub(super) fn finish_moving(&self, mode: &mut Mode) -> Result<(), BlockError> {
        let Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below(moving) } = mode else {
            return Ok(());
        };
        moving.finish(&self.base, overlay)?;
        log::info!("{}: the image is a new file now", self.base.display());
        *mode = match std::mem::replace(mode, Mode::Broken) {
            Mode::Top { top: Layer::Overlay(overlay), rest: Rest::Below(moving) } => {
                let image: Box<dyn Image> = match moving.raw {
                    Some(raw) => raw.image,
                    None => {
                        overlay.set_backing(moving.lower.last().and_then(|image| image.backing()))?;
                        overlay
                    }
                };
                Mode::Top { top: Layer::Image(Arc::from(image)), rest: Rest::Nothing }
            }
            other => other,
        };
        Ok(())
    }
}

/// Copy a batch of a raw image into its new file, which reads as zero where nothing was written yet.
fn copy_over(overlay: &Qcow2, raw: &NewFile, next: &mut u64, size: u64) -> Result<(), BlockError> {
    let end = size.min(*next + STEP);
    while *next < end {
        let mut data = crate::buffers::take(PIECE.min(end - *next) as usize);
        let done = overlay.read_at(*next, &mut data).and_then(|()| {
            // Writes since have been made in both, those of zeroes too. Nothing written is not zero where it is encrypted.
            if raw.image.format() == "luks" || data.iter().any(|b| *b != 0) {
                raw.image.write_at(*next, &data)?;
            }
            Ok(())
        });
        *next += data.len() as u64;
        crate::buffers::give(data);
        done?;
    }
    Ok(())
}

/// Copy a batch of clusters that the overlay does not hold but a layer below does.
fn copy_up(overlay: &Qcow2, lower: &[Arc<dyn Image>], next: &mut u64, size: u64) -> Result<(), BlockError> {
    let cluster = overlay.cluster();
    let (mut copied, mut looked) = (0, 0);
    while *next < size && copied < BATCH && looked < 64 * BATCH {
        looked += 1;
        let len = cluster.min(size - *next);
        if !overlay.holds(*next)? && is_held(lower, *next, len)? {
            let mut data = vec![0u8; len as usize];
            overlay.read_at(*next, &mut data)?;
            if data.iter().all(|b| *b == 0) {
                overlay.write_zeroes(*next, len, true)?;
            } else {
                overlay.write_at(*next, &data)?;
            }
            copied += 1;
        }
        *next += cluster;
    }
    Ok(())
}

/// Whether any of the images holds any part of a range.
fn is_held(images: &[Arc<dyn Image>], offset: u64, len: u64) -> Result<bool, BlockError> {
    for image in images {
        let mut at = offset;
        while at < offset + len {
            let (held, n) = image.held(at)?;
            if held != Held::None {
                return Ok(true);
            }
            at += n.max(1);
        }
    }
    Ok(false)
}
