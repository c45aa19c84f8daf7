//! Where an image says that its bytes lie, they lie, for another reader of the same file; and it says so only of
//! what is its own and plain.

use std::path::{Path, PathBuf};
use std::process::Command;

use ftvm_block::qcow2::create_overlay;
use ftvm_block::{open, open_store, OpenOptions};

fn qemu_img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("ftvm-extents-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// What another host reads there.
fn elsewhere(image: &Path, extents: &[(u64, u64)]) -> Vec<u8> {
    let look = OpenOptions { read_only: true, force_share: true, ..OpenOptions::default() };
    let store = open_store(image, &look).unwrap();
    let mut all = Vec::new();
    for (offset, len) in extents {
        let mut part = vec![0; *len as usize];
        store.read_at(*offset, &mut part).unwrap();
        all.extend(part);
    }
    all
}

fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((offset + i) * 7 % 251) as u8).collect()
}

#[test]
fn places_are_right_and_told_of_plain_clusters_only() {
    let dir = scratch("qcow2");
    let path = dir.join("vm.qcow2");
    let options = OpenOptions::default();
    create_overlay(&path, 16 << 20, None, None).unwrap();
    let image = open(&path, &options).unwrap();
    // Out of order, so that neighbours in the guest are none in the file.
    for offset in [5u64 << 16, 1 << 16, 2 << 16, 4 << 16, 3 << 16] {
        image.write_at(offset, &pattern(offset, 1 << 16)).unwrap();
    }
    image.flush().unwrap();
    let (from, len) = ((1 << 16) + 512, (4 << 16) + 1024);
    let extents = image.extents(from, len).unwrap();
    assert!(extents.len() > 1, "{extents:?}");
    assert_eq!(elsewhere(&path, &extents), pattern(from, len as usize));
    assert_eq!(image.extents(0, 512), None, "nothing is there");
    assert_eq!(image.extents(5 << 16, (1 << 16) + 512), None, "nothing is behind");
    image.write_zeroes(2 << 16, 1 << 16, true).unwrap();
    assert_eq!(image.extents(2 << 16, 512), None, "zero");
    assert_eq!(image.extents(16 << 20, 512), None, "past the end");
    drop(image);
    qemu_img(&["bench", "-q", "-c", "1", "-w", "-f", "qcow2", "-o", "6553600", path.to_str().unwrap()]);
    qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    let image = open(&path, &options).unwrap();
    assert_eq!(image.extents(100 << 16, 512), None, "shared with a snapshot: a write moves it");
    image.write_at(100 << 16, &[9; 512]).unwrap();
    assert!(image.extents(100 << 16, 512).is_some());
    image.flush().unwrap();
    drop(image);
    let packed = dir.join("packed.qcow2");
    qemu_img(&["convert", "-c", "-O", "qcow2", path.to_str().unwrap(), packed.to_str().unwrap()]);
    assert_eq!(open(&packed, &options).unwrap().extents(100 << 16, 512), None, "compressed");
    let above = dir.join("above.qcow2");
    create_overlay(&above, 16 << 20, Some(("packed.qcow2", "qcow2")), None).unwrap();
    assert_eq!(open(&above, &options).unwrap().extents(100 << 16, 512), None, "in the backing file");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_raw_image_is_its_own_map() {
    let dir = scratch("raw");
    let path = dir.join("vm.raw");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let raw = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let image = open(&path, &raw).unwrap();
    image.write_at(4096, &pattern(4096, 8192)).unwrap();
    let extents = image.extents(4096, 8192).unwrap();
    assert_eq!(elsewhere(&path, &extents), pattern(4096, 8192));
    assert_eq!(image.extents((1 << 20) - 512, 1024), None);
    std::fs::remove_dir_all(dir).unwrap();
}
