//! The engine against a model in memory, with qemu-img as the judge of what lies on disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{open, OpenOptions};

fn dir(name: &str) -> PathBuf {
    let d = std::env::temp_dir().join(format!("ftvm-qcow2-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&d);
    std::fs::create_dir_all(&d).unwrap();
    d
}

fn qemu_img(args: &[&str]) -> bool {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img (package qemu-utils)");
    if !out.status.success() {
        eprintln!(
            "{args:?}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    out.status.success()
}

struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn exercise(path: &Path, model: &mut [u8], seed: u64, ops: u32, discard: bool) {
    let options = OpenOptions { discard, detect_zeroes: seed.is_multiple_of(2), ..OpenOptions::default() };
    let mut image = open(path, &options).unwrap();
    assert_eq!(image.format(), "qcow2");
    let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let sectors = model.len() as u64 / 512;
    for n in 0..ops {
        let start = rng.below(sectors);
        let len = (1 + rng.below(300)).min(sectors - start);
        let (at, len) = ((start * 512) as usize, (len * 512) as usize);
        match rng.below(12) {
            0..=5 => {
                let byte = rng.next() as u8;
                let mut data = vec![byte; len];
                for (i, b) in data.iter_mut().enumerate().step_by(97) {
                    *b = i as u8;
                }
                image.write_at(at as u64, &data).unwrap();
                model[at..at + len].copy_from_slice(&data);
            }
            6 => {
                image.write_zeroes(at as u64, len as u64, true).unwrap();
                model[at..at + len].fill(0);
            }
            7 if discard => {
                image.discard(at as u64, len as u64).unwrap();
                let mut got = vec![0; len];
                image.read_at(at as u64, &mut got).unwrap();
                // Whole clusters read as zero afterwards; the rest keeps its contents.
                for (g, m) in got.iter().zip(&model[at..at + len]) {
                    assert!(*g == 0 || g == m);
                }
                model[at..at + len].copy_from_slice(&got);
            }
            8 => image.flush().unwrap(),
            9 if n % 7 == 0 => {
                drop(image);
                image = open(path, &options).unwrap();
            }
            _ => {
                let mut got = vec![0; len];
                image.read_at(at as u64, &mut got).unwrap();
                assert!(got == model[at..at + len], "read at {at}+{len} after {n} operations (seed {seed})");
            }
        }
    }
}

fn verify(path: &Path, model: &[u8]) {
    let p = path.to_str().unwrap();
    assert!(qemu_img(&["check", p]), "qemu-img check");
    let raw = path.with_extension("raw");
    std::fs::write(&raw, model).unwrap();
    assert!(qemu_img(&["compare", "-f", "qcow2", "-F", "raw", p, raw.to_str().unwrap()]), "qemu-img compare");
}

#[test]
fn random_operations_on_every_shape_of_image() {
    let d = dir("shapes");
    for (i, options) in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2M",
        "compat=0.10",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=4096,refcount_bits=2",
        "cluster_size=1024,refcount_bits=4",
        "cluster_size=1024,refcount_bits=64",
        "preallocation=metadata",
    ]
    .iter()
    .enumerate()
    {
        let path = d.join(format!("i{i}.qcow2"));
        let size = 5 * 1024 * 1024 + 512 * 7;
        assert!(qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            path.to_str().unwrap(),
            &size.to_string()
        ]));
        let mut model = vec![0u8; size];
        exercise(&path, &mut model, i as u64 + 1, 250, i % 2 == 0);
        verify(&path, &model);
    }
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn backing_compressed_and_snapshots() {
    let d = dir("layers");
    let size = 3 << 20;
    let mut model: Vec<u8> = (0..size).map(|i| (i / 1000) as u8).collect();
    let raw = d.join("base.raw");
    std::fs::write(&raw, &model).unwrap();
    let (raw, packed, top) = (raw.to_str().unwrap().to_owned(), d.join("packed.qcow2"), d.join("top.qcow2"));
    assert!(qemu_img(&["convert", "-q", "-c", "-O", "qcow2", &raw, packed.to_str().unwrap()]));
    // A compressed image, overwritten.
    let mut copy = model.clone();
    exercise(&packed, &mut copy, 77, 120, true);
    verify(&packed, &copy);
    // A longer overlay over it, over a relative name.
    let longer = size + (1 << 20);
    assert!(qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "packed.qcow2",
        "-F",
        "qcow2",
        top.to_str().unwrap(),
        &longer.to_string()
    ]));
    copy.resize(longer, 0);
    exercise(&top, &mut copy, 78, 200, true);
    verify(&top, &copy);
    // A snapshot stays what it was while the image changes.
    let snap = d.join("snap.qcow2");
    assert!(qemu_img(&["convert", "-q", "-O", "qcow2", &raw, snap.to_str().unwrap()]));
    assert!(qemu_img(&["snapshot", "-c", "one", snap.to_str().unwrap()]));
    let before = model.clone();
    exercise(&snap, &mut model, 79, 200, true);
    verify(&snap, &model);
    assert!(qemu_img(&["snapshot", "-a", "one", snap.to_str().unwrap()]));
    verify(&snap, &before);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn locks_are_qemus_own() {
    let d = dir("locks");
    let path = d.join("l.qcow2");
    super::create_overlay(&path, 1 << 20, None).unwrap();
    let p = path.to_str().unwrap();
    assert!(qemu_img(&["check", "-q", p]));
    let image = open(&path, &OpenOptions::default()).unwrap();
    assert!(!qemu_img(&["info", p]), "qemu-img refuses an image in use");
    assert!(qemu_img(&["info", "-U", p]));
    let e = open(&path, &OpenOptions::default()).err().unwrap().to_string();
    assert!(e.contains("Failed to get \"write\" lock"), "{e}");
    let shared = OpenOptions { read_only: true, force_share: true, ..OpenOptions::default() };
    open(&path, &shared).unwrap();
    drop(image);
    assert!(qemu_img(&["info", p]));
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn damaged_images_are_refused_or_read_without_harm() {
    let d = dir("damage");
    let path = d.join("x.qcow2");
    super::create_overlay(&path, 4 << 20, None).unwrap();
    {
        let image = open(&path, &OpenOptions::default()).unwrap();
        image.write_at(0, &vec![7; 1 << 20]).unwrap();
    }
    let good = std::fs::read(&path).unwrap();
    let mut rng = Rng(4242);
    for round in 0..400 {
        let mut bad = good.clone();
        for _ in 0..1 + rng.below(6) {
            // Header, refcount table, refcount block, L1, L2: the metadata of this image.
            let region = [(0, 112), (1 << 16, 64), (2 << 16, 64), (3 << 16, 64), (4 << 16, 256)]
                [rng.below(5) as usize];
            let at = region.0 + rng.below(region.1) as usize;
            bad[at] = rng.next() as u8;
        }
        std::fs::write(&path, &bad).unwrap();
        if let Ok(image) = open(&path, &OpenOptions::default()) {
            let mut buf = vec![0; 1 << 16];
            let size = image.size();
            for at in [0u64, 1 << 16, 1 << 20, 3 << 20] {
                if at + buf.len() as u64 <= size {
                    let _ = image.read_at(at, &mut buf);
                    let _ = image.write_at(at, &buf[..512]);
                }
            }
            let _ = image.flush();
        }
        assert!(std::fs::metadata(&path).unwrap().len() < 1 << 40, "round {round}");
    }
    std::fs::remove_dir_all(d).unwrap();
}

/// `kill -9` at any write: what was flushed is there, and the image has no errors (leaks are allowed).
#[test]
fn a_crash_after_any_flush_loses_nothing_flushed() {
    let d = dir("crash");
    let path = d.join("c.qcow2");
    super::create_overlay(&path, 8 << 20, None).unwrap();
    let mut model = vec![0u8; 8 << 20];
    let mut rng = Rng(99);
    let image = open(&path, &OpenOptions { discard: true, ..OpenOptions::default() }).unwrap();
    for round in 0..40u64 {
        for _ in 0..4 {
            let at = rng.below(16000) as usize * 512;
            let data = vec![rng.next() as u8; 1024];
            image.write_at(at as u64, &data).unwrap();
            model[at..at + 1024].copy_from_slice(&data);
        }
        if round % 5 == 4 {
            let at = rng.below(120) << 16;
            image.discard(at, 1 << 16).unwrap();
            model[at as usize..(at + (1 << 16)) as usize].fill(0);
        }
        image.flush().unwrap();
        // The state on disk now is what a crash would leave.
        let copy = d.join("copy.qcow2");
        std::fs::copy(&path, &copy).unwrap();
        let status = Command::new("qemu-img").args(["check", "-q", copy.to_str().unwrap()]).status().unwrap();
        assert!(matches!(status.code(), Some(0 | 3)), "round {round}: check gave {:?}", status.code());
        let mut got = vec![0; model.len()];
        let shared = OpenOptions { read_only: true, ..OpenOptions::default() };
        open(&copy, &shared).unwrap().read_at(0, &mut got).unwrap();
        assert!(got == model, "round {round}");
    }
    drop(image);
    verify(&path, &model);
    std::fs::remove_dir_all(d).unwrap();
}
