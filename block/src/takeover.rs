//! Taking an image over from a primary that may only be stalled.
//!
//! A paused or cut-off old primary may still have a write in its hands, past every check that it could
//! make, and that write lands whenever it runs again. So the new primary never writes an image whose
//! byte locks ([`crate::lock`]) another process still holds: those locks go exactly when the process
//! is gone and none of its system calls is left. While they are held, the new primary works on a fresh
//! qcow2 overlay (`IMAGE.ft1`, over a stalled overlay `IMAGE.ft2`, ...), which takes every reissued and
//! every new write; what the old one still writes into the image below is hidden by it, because each request
//! that was in flight is reissued into the overlay. When the locks below are free the overlay is merged
//! down, cluster by cluster: copied and flushed below, then forgotten and flushed above, so that a crash at any
//! moment leaves each cluster in at least one of both. Then it is removed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use crate::qcow2::{create_overlay, Qcow2};
use crate::{BlockError, Image, OpenOptions};

/// Clusters merged in one step.
const BATCH: usize = 32;
/// Overlays on top of each other at the most.
const MAX_LAYERS: u32 = 16;

enum Mode {
    /// The image itself, or an overlay below which nothing is merged yet (`below`: what it stands on).
    Top { top: Layer, below: Option<PathBuf> },
    /// The overlay is being merged into `base`.
    Merging { overlay: Box<Qcow2>, base: Arc<dyn Image>, base_path: PathBuf, next: u64 },
    /// An error in the middle of a change of modes.
    Broken,
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
    size: u64,
    format: &'static str,
    mode: RwLock<Mode>,
}

fn layer(base: &Path, n: u32) -> PathBuf {
    if n == 0 {
        return base.to_owned();
    }
    let mut name = base.as_os_str().to_owned();
    name.push(format!(".ft{n}"));
    name.into()
}

/// The topmost layer that exists.
fn topmost(base: &Path) -> u32 {
    (1..=MAX_LAYERS).take_while(|n| layer(base, *n).exists()).last().unwrap_or(0)
}

/// Whether takeovers have left overlays on an image.
pub fn has_overlays(path: &Path) -> bool {
    topmost(path) > 0
}

/// Whether another process holds the topmost layer of an image for writing.
pub fn is_held(path: &Path) -> Result<bool, BlockError> {
    let top = layer(path, topmost(path));
    match crate::file::HostFile::open(&top, &OpenOptions { read_only: true, ..OpenOptions::default() }) {
        Ok(_) => Ok(false),
        Err(BlockError::Locked { .. }) => Ok(true),
        Err(e) => Err(e),
    }
}

fn format_of(path: &Path) -> Result<&'static str, BlockError> {
    let look = OpenOptions { read_only: true, force_share: true, ..OpenOptions::default() };
    Ok(crate::open(path, &look)?.format())
}

impl Takeover {
    /// Open `path` with its overlays for writing. If the topmost layer is still locked by another process, and
    /// `over_stalled` is set (the pair's lock was won), a fresh overlay goes on top.
    pub fn open(path: &Path, options: &OpenOptions, over_stalled: bool) -> Result<Self, BlockError> {
        let n = topmost(path);
        let top = layer(path, n);
        let layer_options = |n: u32| {
            if n == 0 {
                options.clone()
            } else {
                OpenOptions { format: Some("qcow2".into()), ..options.clone() }
            }
        };
        let shared_below = |top: &Path, n: u32| -> Result<Qcow2, BlockError> {
            // What lies below is only read, whoever holds it.
            let file = crate::store::open(top, &layer_options(n))?;
            let below = OpenOptions { read_only: true, force_share: true, ..layer_options(n - 1) };
            let under = Arc::from(crate::open(&layer(path, n - 1), &below)?);
            Qcow2::over_with(file, &layer_options(n), under)
        };
        let opened = if n == 0 {
            crate::open(&top, options).map(|i| Layer::Image(Arc::from(i)))
        } else {
            shared_below(&top, n).map(|o| Layer::Overlay(Box::new(o)))
        };
        let (top, below) = match opened {
            Ok(top) => (top, (n > 0).then(|| layer(path, n - 1))),
            Err(BlockError::Locked { .. }) if over_stalled && n < MAX_LAYERS => {
                let fresh = layer(path, n + 1);
                let look = OpenOptions { read_only: true, force_share: true, ..layer_options(n) };
                let size = crate::open(&top, &look)?.size();
                let name = top.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
                create_overlay(&fresh, size, Some((&name, format_of(&top)?)))?;
                sync_dir(&fresh)?;
                log::warn!(
                    "{} is still held by the old primary: working on {}",
                    top.display(),
                    fresh.display()
                );
                (Layer::Overlay(Box::new(shared_below(&fresh, n + 1)?)), Some(top))
            }
            Err(e) => return Err(e),
        };
        let (size, format) = (top.image().size(), top.image().format());
        Ok(Takeover {
            options: options.clone(),
            base: path.to_owned(),
            size,
            format,
            mode: RwLock::new(Mode::Top { top, below }),
        })
    }

    /// Serve a request; many may be here at once.
    fn with<R>(&self, f: impl FnOnce(&Mode) -> Result<R, BlockError>) -> Result<R, BlockError> {
        let mode = self.mode.read().map_err(|_| failed())?;
        f(&mode)
    }

    /// One step of the background work: take the layer below over if it is free, or merge a batch.
    fn step(&self) -> Result<bool, BlockError> {
        if self.with(|mode| Ok(matches!(mode, Mode::Top { below: None, .. } | Mode::Broken)))? {
            return Ok(false);
        }
        // No request is under way while clusters change their place.
        let mut mode = self.mode.write().map_err(|_| failed())?;
        let mode = &mut *mode;
        match mode {
            Mode::Top { below: None, .. } | Mode::Broken => Ok(false),
            Mode::Top { below: Some(below), .. } => {
                let n = topmost(&self.base);
                let options = if *below == self.base {
                    self.options.clone()
                } else {
                    OpenOptions { format: Some("qcow2".into()), ..self.options.clone() }
                };
                let base: Arc<dyn Image> = match crate::open(below, &options) {
                    Ok(image) => Arc::from(image),
                    Err(BlockError::Locked { .. }) => return Ok(true),
                    Err(e) => return Err(e),
                };
                log::info!("{} is free: merging {} overlay(s) into it", below.display(), n);
                let below = below.clone();
                *mode = match std::mem::replace(mode, Mode::Broken) {
                    Mode::Top { top: Layer::Overlay(mut overlay), .. } => {
                        overlay.set_backing(Arc::clone(&base));
                        Mode::Merging { overlay, base, base_path: below, next: 0 }
                    }
                    other => other,
                };
                Ok(true)
            }
            Mode::Merging { overlay, base, base_path, next } => {
                let cluster = overlay.cluster();
                let mut batch = Vec::new();
                while *next < self.size && batch.len() < BATCH {
                    if overlay.holds(*next)? {
                        let mut data = vec![0u8; cluster.min(self.size - *next) as usize];
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
                if *next < self.size {
                    return Ok(true);
                }
                // Everything is below; the overlay holds nothing any more.
                let gone = overlay.path().to_owned();
                std::fs::remove_file(&gone)?;
                sync_dir(&gone)?;
                log::info!("{} is merged", gone.display());
                let base = Arc::clone(base);
                if *base_path == self.base {
                    *mode = Mode::Top { top: Layer::Image(base), below: None };
                    return Ok(false);
                }
                // The layer below was an overlay itself: go on with it.
                *mode = Mode::Broken;
                drop(base);
                let again = Takeover::open(&self.base, &self.options, false)?;
                *mode = again.mode.into_inner().unwrap_or(Mode::Broken);
                Ok(true)
            }
        }
    }
}

fn sync_dir(path: &Path) -> std::io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(dir)?.sync_all()
}

impl Image for Takeover {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        false
    }
    fn format(&self) -> &'static str {
        self.format
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.with(|mode| match mode {
            Mode::Top { top, .. } => top.image().read_at(offset, buf),
            Mode::Merging { overlay, .. } => overlay.read_at(offset, buf),
            Mode::Broken => Err(broken()),
        })
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
            // Discards are hints; while two layers exist they are not worth the trouble.
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
        assert!(!has_overlays(&path));
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
            assert!(has_overlays(&path));
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
            assert!(!has_overlays(&path));
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
        assert!(!has_overlays(&path));
        image.read_at(4096, &mut buf).unwrap();
        assert_eq!(buf, [7; 4096]);
        std::fs::remove_dir_all(d).unwrap();
    }
}
