//! Naming something else in the header: another image below (`change-backing-file` and what block jobs do at their end),
//! other bitmaps.

use std::path::{Path, PathBuf};

use std::sync::atomic::Ordering;

use super::bitmaps::Directory;
use super::header::{AUTOCLEAR_BITMAPS, BITMAPS};
use super::Qcow2;
use crate::{BlockError, Image};

/// The image below as the header names it: its text, the path that it means, and its format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub text: String,
    pub path: PathBuf,
    pub format: Option<String>,
}

/// What a disk writes as a whole.
const SECTOR: usize = 512;
const BACKING_FORMAT: u32 = 0xE279_2ACA;
const FEATURE_NAMES: u32 = 0x6803_F857;

/// The path that a backing file's name means in an image at `image`.
pub(super) fn resolve(image: &Path, text: &str) -> PathBuf {
    let plain = PathBuf::from(text.strip_prefix("file:").unwrap_or(text));
    if text.starts_with("nfs://") || text.starts_with("iscsi://") {
        return plain;
    }
    image.parent().unwrap_or(Path::new("")).join(plain)
}

fn be32(b: &[u8], at: usize) -> usize {
    b.get(at..at + 4).map_or(0, |s| u32::from_be_bytes([s[0], s[1], s[2], s[3]]) as usize)
}

/// What a header is to name.
struct Names<'a> {
    /// The image below, and its format.
    backing: Option<(&'a str, Option<&'a str>)>,
    /// The extension about bitmaps.
    bitmaps: Option<[u8; 24]>,
    autoclear: u64,
}

/// The start of a header that names other things, from the first cluster of the image; the backing file's name lies at the
/// returned offset.
fn head(first: &[u8], names: &Names, with_features: bool) -> Option<(Vec<u8>, usize)> {
    let length = if be32(first, 4) == 2 { 72 } else { be32(first, 100) };
    let mut head = first.get(..length)?.to_vec();
    let mut extend = |kind: u32, body: &[u8]| {
        head.extend(kind.to_be_bytes());
        head.extend((body.len() as u32).to_be_bytes());
        head.extend(body);
        let padded = length + (head.len() - length).next_multiple_of(8);
        head.resize(padded, 0);
    };
    if let Some((_, Some(format))) = names.backing {
        extend(BACKING_FORMAT, format.as_bytes());
    }
    if let Some(body) = &names.bitmaps {
        extend(BITMAPS, body);
    }
    let mut at = length;
    while at + 8 <= first.len() {
        let (kind, len) = (be32(first, at) as u32, be32(first, at + 4));
        if kind == 0 {
            break;
        }
        if !matches!(kind, BACKING_FORMAT | BITMAPS) && (with_features || kind != FEATURE_NAMES) {
            extend(kind, first.get(at + 8..at + 8 + len)?);
        }
        at += 8 + len.next_multiple_of(8);
    }
    extend(0, &[]);
    let name = names.backing.map_or(0, |(name, _)| name.len());
    // What does not fit beside the header goes where the present header uses nothing.
    let behind = SECTOR.max(at + 8);
    let (old, end) = (be32(first, 12), be32(first, 12) + be32(first, 16));
    let place = match head.len() + name <= SECTOR {
        true => head.len(),
        false if old >= behind + name || end <= behind => behind,
        false => end,
    };
    let (offset, size) = if names.backing.is_some() { (place as u64, name as u32) } else { (0, 0) };
    head[8..16].copy_from_slice(&offset.to_be_bytes());
    head[16..20].copy_from_slice(&size.to_be_bytes());
    if length > 88 {
        head[88..96].copy_from_slice(&names.autoclear.to_be_bytes());
    }
    (head.len() <= SECTOR && place + name <= first.len()).then_some((head, place))
}

fn extension(directory: &Directory) -> Option<[u8; 24]> {
    let count = directory.entries.len() as u32;
    let mut body = [0; 24];
    body[..4].copy_from_slice(&count.to_be_bytes());
    body[8..16].copy_from_slice(&directory.length.to_be_bytes());
    body[16..].copy_from_slice(&directory.offset.to_be_bytes());
    (count > 0).then_some(body)
}

impl Qcow2 {
    /// Write other names into the header. One write of the first sector makes them valid; where the backing file's name does
    /// not fit there, it is written before, to a place that the present header does not use.
    fn rewrite_head(&self, names: &Names) -> Result<(), BlockError> {
        let mut first = vec![0u8; self.cluster() as usize];
        self.file.read_at(0, &mut first)?;
        // The names of features only make messages nicer.
        let (head, place) = head(&first, names, true)
            .or_else(|| head(&first, names, false))
            .ok_or_else(|| BlockError::Unsupported("the header has no room for what it is to name".into()))?;
        let name = names.backing.map_or(&[][..], |(name, _)| name.as_bytes());
        let mut sector = first[..SECTOR].to_vec();
        sector[..head.len()].copy_from_slice(&head);
        if place >= SECTOR {
            self.file.write_at(place as u64, name)?;
            self.file.sync()?;
        } else {
            sector[place..place + name.len()].copy_from_slice(name);
        }
        self.file.write_at(0, &sector)?;
        Ok(self.file.sync()?)
    }

    /// Name another image below.
    pub(super) fn rewrite_backing(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        if self.read_only() {
            return Err(BlockError::ReadOnly);
        }
        let _alone = self.quiesce()?;
        if backing.is_some_and(|(name, _)| name.len() > 1023) {
            return Err(BlockError::Unsupported("backing file name is too long".into()));
        }
        let directory = self.bitmaps.lock().map_err(super::broken)?;
        self.rewrite_head(&Names {
            backing: backing.map(|(name, format)| (name, Some(format))),
            bitmaps: extension(&directory),
            autoclear: self.autoclear.load(Ordering::Relaxed),
        })?;
        *self.named.write().map_err(super::broken)? = backing.map(|(text, format)| Named {
            text: text.to_owned(),
            path: resolve(self.file.path(), text),
            format: Some(format.to_owned()),
        });
        Ok(())
    }

    /// Name another directory of bitmaps. No request may be under way.
    pub(super) fn name_bitmaps(&self, directory: &Directory) -> Result<(), BlockError> {
        let mut autoclear = self.autoclear.load(Ordering::Relaxed) & !AUTOCLEAR_BITMAPS;
        if !directory.entries.is_empty() {
            autoclear |= AUTOCLEAR_BITMAPS;
        }
        let named = self.named.read().map_err(super::broken)?;
        let backing = named.as_ref().map(|n| (n.text.as_str(), n.format.as_deref()));
        self.rewrite_head(&Names { backing, bitmaps: extension(directory), autoclear })?;
        self.autoclear.store(autoclear, Ordering::Relaxed);
        Ok(())
    }
}
