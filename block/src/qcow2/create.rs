//! Making new images.

use std::path::Path;

use crate::BlockError;

/// Make an empty version 3 image of `size` bytes with 64 KiB clusters, over `backing` (and its format) if given.
pub fn create_overlay(path: &Path, size: u64, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
    let cluster = 65536u64;
    let l1_entries = size.div_ceil(cluster * cluster / 8).max(1);
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let head = head(path, size, l1_entries, cluster, backing)?;
    let mut all = vec![0u8; ((3 + l1_clusters) * cluster) as usize];
    all[..head.len()].copy_from_slice(&head);
    all[cluster as usize..cluster as usize + 8].copy_from_slice(&(2 * cluster).to_be_bytes());
    for i in 0..(3 + l1_clusters) as usize {
        let at = 2 * cluster as usize + 2 * i;
        all[at..at + 2].copy_from_slice(&1u16.to_be_bytes());
    }
    let open = |source| BlockError::Open { path: path.to_owned(), source };
    let (files, name) = crate::files::beside(path).map_err(open)?;
    files.create(&name, &all).map_err(open)?;
    Ok(())
}

/// The header of such an image, with what follows it in the first cluster.
pub(super) fn head(
    path: &Path,
    size: u64,
    l1_entries: u64,
    cluster: u64,
    backing: Option<(&str, &str)>,
) -> Result<Vec<u8>, BlockError> {
    let mut head = Vec::new();
    head.extend_from_slice(super::MAGIC);
    let put32 = |h: &mut Vec<u8>, v: u32| h.extend(v.to_be_bytes());
    let put64 = |h: &mut Vec<u8>, v: u64| h.extend(v.to_be_bytes());
    put32(&mut head, 3);
    let mut extensions = Vec::new();
    let mut name = Vec::new();
    if let Some((file, format)) = backing {
        put32(&mut extensions, 0xE279_2ACA);
        put32(&mut extensions, format.len() as u32);
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
        name = file.as_bytes().to_vec();
        if name.len() > 1023 {
            return Err(BlockError::Format {
                path: path.to_owned(),
                reason: "backing file name is too long".into(),
            });
        }
    }
    extensions.extend([0; 8]);
    let name_at = if name.is_empty() { 0 } else { 104 + extensions.len() as u64 };
    put64(&mut head, name_at);
    put32(&mut head, name.len() as u32);
    put32(&mut head, 16);
    put64(&mut head, size);
    put32(&mut head, 0);
    put32(&mut head, l1_entries as u32);
    put64(&mut head, 3 * cluster);
    put64(&mut head, cluster);
    put32(&mut head, 1);
    put32(&mut head, 0);
    put64(&mut head, 0);
    for _ in 0..3 {
        put64(&mut head, 0);
    }
    put32(&mut head, 4);
    put32(&mut head, 104);
    head.extend(extensions);
    head.extend(name);
    Ok(head)
}
