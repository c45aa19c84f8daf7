//! The layers that takeovers leave: `IMAGE.ft<number>`, each standing on the one with the next lower number, the image itself
//! being number 0.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::files::{beside, beside_path, Files};
use crate::node::Node;
use crate::qcow2::Qcow2;
use crate::{BlockError, Image, OpenOptions};

/// Overlays on top of each other at the most.
pub(super) const MAX_LAYERS: usize = 16;

/// Path (or URL) of layer `n`.
pub(super) fn layer(base: &Path, n: u64) -> PathBuf {
    match n {
        0 => base.to_owned(),
        n => beside_path(base, &format!(".ft{n}")),
    }
}

/// The name of layer `n` of the image `name`.
pub(super) fn layer_name(name: &str, n: u64) -> String {
    match n {
        0 => name.to_owned(),
        n => format!("{name}.ft{n}"),
    }
}

/// The numbers of what lies beside an image as `NAME.ft<number><suffix>`, in order.
pub(super) fn numbers(files: &dyn Files, name: &str, suffix: &str) -> Result<Vec<u64>, BlockError> {
    let number = |file: String| {
        let digits = file.strip_prefix(name)?.strip_prefix(".ft")?.strip_suffix(suffix)?;
        digits.parse().ok().filter(|n: &u64| *n > 0 && n.to_string() == digits)
    };
    let mut numbers: Vec<u64> = files.list()?.into_iter().filter_map(number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The overlays of an image, the lowest first.
pub(super) fn overlays(base: &Path) -> Result<Vec<u64>, BlockError> {
    let (files, name) = beside(base)?;
    numbers(files.as_ref(), &name, "")
}

/// The number of the topmost layer: 0 is the image itself.
pub(super) fn topmost(base: &Path) -> Result<u64, BlockError> {
    Ok(overlays(base)?.last().copied().unwrap_or(0))
}

/// Whether takeovers have left overlays on an image.
pub fn has_overlays(path: &Path) -> Result<bool, BlockError> {
    Ok(topmost(path)? > 0)
}

/// The topmost overlay that takeovers have left on an image.
pub fn top_overlay(path: &Path) -> Result<Option<PathBuf>, BlockError> {
    Ok(Some(topmost(path)?).filter(|n| *n > 0).map(|n| layer(path, n)))
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

/// Options for opening layer `n`.
pub(super) fn layer_options(options: &OpenOptions, n: u64) -> OpenOptions {
    if n == 0 {
        options.clone()
    } else {
        OpenOptions { format: Some("qcow2".into()), ..options.clone() }
    }
}

/// Open the layers below number `below` for reading, the highest first.
pub(super) fn lower_layers(
    base: &Path,
    options: &OpenOptions,
    below: u64,
) -> Result<Vec<Arc<dyn Image>>, BlockError> {
    let numbers = std::iter::once(0).chain(overlays(base)?.into_iter().filter(|n| *n < below));
    let mut stack: Vec<Arc<dyn Image>> = Vec::new();
    for n in numbers {
        let look = OpenOptions { read_only: true, force_share: true, ..layer_options(options, n) };
        let opened = match stack.first() {
            Some(below) => {
                let file = crate::store::open(&layer(base, n), &look)?;
                let below = Node::around(Arc::clone(below));
                Arc::new(Qcow2::over_with(file, &look, Some(below))?) as Arc<dyn Image>
            }
            None => Arc::from(crate::open(&layer(base, n), &look)?),
        };
        stack.insert(0, opened);
    }
    Ok(stack)
}
