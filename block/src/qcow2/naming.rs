//! Naming another image below in the header (`change-backing-file` and what block jobs do at their end).

use std::path::{Path, PathBuf};

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

/// The start of a header that names `backing`, from the first cluster of the image; the name lies at the returned offset.
fn head(first: &[u8], backing: Option<(&str, &str)>, with_names: bool) -> Option<(Vec<u8>, usize)> {
    let length = if be32(first, 4) == 2 { 72 } else { be32(first, 100) };
    let mut head = first.get(..length)?.to_vec();
    let mut extend = |kind: u32, body: &[u8]| {
        head.extend(kind.to_be_bytes());
        head.extend((body.len() as u32).to_be_bytes());
        head.extend(body);
        let padded = length + (head.len() - length).next_multiple_of(8);
        head.resize(padded, 0);
    };
    if let Some((_, format)) = backing {
        extend(BACKING_FORMAT, format.as_bytes());
    }
    let mut at = length;
    while at + 8 <= first.len() {
        let (kind, len) = (be32(first, at) as u32, be32(first, at + 4));
        if kind == 0 {
            break;
        }
        if kind != BACKING_FORMAT && (with_names || kind != FEATURE_NAMES) {
            extend(kind, first.get(at + 8..at + 8 + len)?);
        }
        at += 8 + len.next_multiple_of(8);
    }
    extend(0, &[]);
    // Behind everything that the present header uses, if it does not fit beside it.
    let used = at + 8 + be32(first, 16);
    let name = backing.map_or(0, |(name, _)| name.len());
    let place = if head.len() + name <= SECTOR { head.len() } else { used.max(SECTOR) };
    let (offset, size) = if backing.is_some() { (place as u64, name as u32) } else { (0, 0) };
    head[8..16].copy_from_slice(&offset.to_be_bytes());
    head[16..20].copy_from_slice(&size.to_be_bytes());
    (head.len() <= SECTOR && place + name <= first.len()).then_some((head, place))
}

impl Qcow2 {
    /// Write another name into the header. One write of the first sector makes it valid; where the name does not fit
    /// there, it is written before, to a place that the present header does not use.
    pub(super) fn rewrite_backing(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        if self.read_only() {
            return Err(BlockError::ReadOnly);
        }
        let _alone = self.quiesce()?;
        if backing.is_some_and(|(name, _)| name.len() > 1023) {
            return Err(BlockError::Unsupported("backing file name is too long".into()));
        }
        let mut first = vec![0u8; self.cluster() as usize];
        self.file.read_at(0, &mut first)?;
        // The names of features only make messages nicer.
        let (head, place) =
            head(&first, backing, true).or_else(|| head(&first, backing, false)).ok_or_else(|| {
                BlockError::Unsupported("the header has no room for the name of the backing file".into())
            })?;
        let name = backing.map_or(&[][..], |(name, _)| name.as_bytes());
        let mut sector = first[..SECTOR].to_vec();
        sector[..head.len()].copy_from_slice(&head);
        if place >= SECTOR {
            self.file.write_at(place as u64, name)?;
            self.file.sync()?;
        } else {
            sector[place..place + name.len()].copy_from_slice(name);
        }
        self.file.write_at(0, &sector)?;
        self.file.sync()?;
        *self.named.write().map_err(super::broken)? = backing.map(|(text, format)| Named {
            text: text.to_owned(),
            path: resolve(self.file.path(), text),
            format: Some(format.to_owned()),
        });
        Ok(())
    }
}
