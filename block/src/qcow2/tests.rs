//! The engine against a model in memory, with qemu-img as the judge of what lies on disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{open, OpenOptions};

mod bitmaps;
mod compressed;
mod resize;
mod snapshots;

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
        "lazy_refcounts=on",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16K",
        "data_file=plain.dat",
        "data_file=raw.dat,data_file_raw=on",
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
            &options.replace("data_file=", &format!("data_file={}/", d.display())),
            path.to_str().unwrap(),
            &size.to_string()
        ]));
        let mut model = vec![0u8; size];
        exercise(&path, &mut model, i as u64 + 1, 250, i % 2 == 0);
        verify(&path, &model);
        if options.contains("data_file_raw") {
            let data = std::fs::read(d.join("raw.dat")).unwrap();
            assert!(data[..size] == model, "the data file is a raw image of the same contents");
        }
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
    super::create_overlay(&path, 1 << 20, None, None).unwrap();
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
    super::create_overlay(&path, 4 << 20, None, None).unwrap();
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
    super::create_overlay(&path, 8 << 20, None, None).unwrap();
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

/// Threads that share clusters but no bytes, with flushes and discards between them.
#[test]
fn requests_side_by_side_lose_nothing() {
    let d = dir("side");
    for (i, (options, backing)) in [
        ("cluster_size=65536", false),
        ("cluster_size=4096,refcount_bits=8", true),
        ("cluster_size=2M", true),
    ]
    .into_iter()
    .enumerate()
    {
        let (base, path) = (d.join(format!("b{i}.raw")), d.join(format!("s{i}.qcow2")));
        let size = 16 << 20;
        let below: Vec<u8> = (0..size).map(|n| (n / 777) as u8).collect();
        std::fs::write(&base, &below).unwrap();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        let total = size.to_string();
        if backing {
            args.extend(["-b", base.to_str().unwrap(), "-F", "raw"]);
        }
        args.extend([path.to_str().unwrap(), &total]);
        assert!(qemu_img(&args));
        let image = open(&path, &OpenOptions { discard: true, ..OpenOptions::default() }).unwrap();
        let image = &*image;
        let model = std::sync::Mutex::new(if backing { below } else { vec![0; size] });
        let model = &model;
        std::thread::scope(|s| {
            for t in 0..4u64 {
                s.spawn(move || {
                    let mut rng = Rng(0x1234_5678 + t * 77);
                    for n in 0..1500 {
                        // Each thread has every fourth 1 KiB.
                        let at = ((rng.below(size as u64 / 4096) * 4 + t) * 1024) as usize;
                        match rng.below(20) {
                            0..=12 => {
                                let data = vec![rng.next() as u8; 1024];
                                image.write_at(at as u64, &data).unwrap();
                                model.lock().unwrap()[at..at + 1024].copy_from_slice(&data);
                            }
                            13 => image.flush().unwrap(),
                            14 if t == 0 && n % 5 == 0 => {
                                image.write_zeroes(at as u64, 1024, true).unwrap();
                                model.lock().unwrap()[at..at + 1024].fill(0);
                            }
                            _ => {
                                let mut got = vec![0; 1024];
                                image.read_at(at as u64, &mut got).unwrap();
                                assert!(got == model.lock().unwrap()[at..at + 1024], "at {at}");
                            }
                        }
                    }
                });
            }
        });
        let model = model.lock().unwrap().clone();
        let mut got = vec![0; size];
        image.read_at(0, &mut got).unwrap();
        assert!(got == model);
    }
    for i in 0..3 {
        assert!(qemu_img(&["check", "-q", d.join(format!("s{i}.qcow2")).to_str().unwrap()]));
    }
    std::fs::remove_dir_all(d).unwrap();
}

/// A disk with a volatile cache: at a power cut any part of what was not flushed may be missing, torn or there.
struct Volatile {
    path: PathBuf,
    safe: std::sync::Mutex<Vec<u8>>,
    cached: std::sync::Mutex<Vec<(u64, Vec<u8>)>>,
    /// What cuts before and after each write would have left, while there is a die.
    cuts: std::sync::Mutex<Option<(Rng, Vec<Vec<u8>>)>>,
}

impl Volatile {
    fn new(path: &Path) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Volatile {
            path: path.to_owned(),
            safe: std::sync::Mutex::new(std::fs::read(path).unwrap()),
            cached: Default::default(),
            cuts: Default::default(),
        })
    }
    fn cut(&self) {
        if let Some((rng, images)) = self.cuts.lock().unwrap().as_mut() {
            images.push(self.after_power_cut(rng));
        }
    }
    fn now(&self) -> Vec<u8> {
        let mut all = self.safe.lock().unwrap().clone();
        for (at, data) in self.cached.lock().unwrap().iter() {
            put(&mut all, *at, data);
        }
        all
    }
    /// What a power cut leaves: of each write since the last flush some sectors, in any order.
    fn after_power_cut(&self, rng: &mut Rng) -> Vec<u8> {
        let mut all = self.safe.lock().unwrap().clone();
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for (at, data) in self.cached.lock().unwrap().iter() {
            for (i, sector) in data.chunks(512).enumerate() {
                pieces.push((at + i as u64 * 512, sector.to_vec()));
            }
        }
        let mode = rng.below(4);
        for i in (1..pieces.len()).rev() {
            if mode == 3 {
                pieces.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        for (at, data) in pieces {
            if mode == 1 || (mode != 0 && rng.below(2) == 0) {
                put(&mut all, at, &data);
            }
        }
        all
    }
}

fn put(all: &mut Vec<u8>, at: u64, data: &[u8]) {
    let at = at as usize;
    if all.len() < at + data.len() {
        all.resize(at + data.len(), 0);
    }
    all[at..at + data.len()].copy_from_slice(data);
}

impl crate::Store for Volatile {
    fn path(&self) -> &Path {
        &self.path
    }
    fn length(&self) -> u64 {
        self.now().len() as u64
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let all = self.now();
        for (i, b) in buf.iter_mut().enumerate() {
            *b = all.get(offset as usize + i).copied().unwrap_or(0);
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.cached.lock().unwrap().push((offset, data.to_vec()));
        self.cut();
        Ok(())
    }
    fn grow(&self, length: u64) -> std::io::Result<()> {
        self.write_at(length - 1, &[0])
    }
    fn set_length(&self, length: u64) -> std::io::Result<()> {
        self.grow(length)
    }
    fn grows_with_zeroes(&self) -> bool {
        true
    }
    fn zero_range(&self, _: u64, _: u64, _: bool) -> bool {
        false
    }
    fn punch(&self, offset: u64, len: u64) {
        let _ = self.write_at(offset, &vec![0xDD; len as usize]);
    }
    fn sync(&self) -> std::io::Result<()> {
        let now = self.now();
        *self.safe.lock().unwrap() = now;
        self.cached.lock().unwrap().clear();
        self.cut();
        Ok(())
    }
}

/// Power is cut before every single write and at every flush: what was flushed before is there, whatever of the
/// rest the disk's cache let through, and no table refers to a free cluster.
#[test]
fn a_power_cut_at_any_moment_loses_nothing_flushed() {
    let d = dir("power");
    let path = d.join("p.qcow2");
    let copy = d.join("copy.qcow2");
    let mut rng = Rng(4711);
    for round in 0..6 {
        assert!(qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            if round % 2 == 0 { "cluster_size=512" } else { "cluster_size=4096,refcount_bits=64" },
            path.to_str().unwrap(),
            "256K",
        ]));
        let store = Volatile::new(&path);
        let options = OpenOptions { discard: true, locking: false, ..OpenOptions::default() };
        let image = super::Qcow2::over(std::sync::Arc::clone(&store) as _, &options, 0).unwrap();
        let image: &dyn crate::Image = &image;
        let mut durable = vec![0u8; 256 << 10];
        // What each sector may hold besides: everything written to it since the last flush.
        let mut since: Vec<(usize, Vec<u8>)> = Vec::new();
        for step in 0..40 {
            let at = rng.below(500) as usize * 512;
            let len = 512 * (1 + rng.below(12)) as usize;
            match rng.below(6) {
                0 => {
                    image.flush().unwrap();
                    for (at, data) in since.drain(..) {
                        durable[at..at + data.len()].copy_from_slice(&data);
                    }
                }
                1 => {
                    image.write_zeroes(at as u64, len as u64, true).unwrap();
                    since.push((at, vec![0; len]));
                }
                _ => {
                    let data = vec![1 + rng.below(255) as u8; len];
                    image.write_at(at as u64, &data).unwrap();
                    since.push((at, data));
                }
            }
            std::fs::write(&copy, store.after_power_cut(&mut rng)).unwrap();
            let status = Command::new("qemu-img").args(["check", "-q", copy.to_str().unwrap()]).status();
            let code = status.unwrap().code();
            assert!(matches!(code, Some(0 | 3)), "round {round} step {step}: check gave {code:?}");
            let shared = OpenOptions { read_only: true, ..OpenOptions::default() };
            let mut got = vec![0; durable.len()];
            open(&copy, &shared).unwrap().read_at(0, &mut got).unwrap();
            for sector in 0..durable.len() / 512 {
                let at = sector * 512;
                let is = &got[at..at + 512];
                let ok = is == &durable[at..at + 512]
                    || since.iter().any(|(start, data)| {
                        at >= *start && at < start + data.len() && is == &data[at - start..at - start + 512]
                    });
                assert!(ok, "round {round} step {step}: sector {sector} holds {:x?}", &is[..4]);
            }
        }
    }
    std::fs::remove_dir_all(d).unwrap();
}

/// A store on which every few calls fail, until it is mended.
struct Failing {
    below: Volatile,
    rng: std::sync::Mutex<Rng>,
    mended: std::sync::atomic::AtomicBool,
}

impl Failing {
    fn maybe(&self) -> std::io::Result<()> {
        let mended = self.mended.load(std::sync::atomic::Ordering::SeqCst);
        if !mended && self.rng.lock().unwrap().below(6) == 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

impl crate::Store for Failing {
    fn path(&self) -> &Path {
        self.below.path()
    }
    fn length(&self) -> u64 {
        self.below.length()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.below.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.maybe()?;
        self.below.write_at(offset, data)
    }
    fn grow(&self, length: u64) -> std::io::Result<()> {
        self.below.grow(length)
    }
    fn set_length(&self, length: u64) -> std::io::Result<()> {
        self.below.set_length(length)
    }
    fn grows_with_zeroes(&self) -> bool {
        true
    }
    fn zero_range(&self, _: u64, _: u64, _: bool) -> bool {
        false
    }
    fn punch(&self, offset: u64, len: u64) {
        self.below.punch(offset, len);
    }
    fn sync(&self) -> std::io::Result<()> {
        self.maybe()?;
        self.below.sync()
    }
}

/// Requests fail, at any step of theirs, and are tried again (`werror=stop` and `cont`): nothing is lost.
#[test]
fn what_failed_can_be_tried_again() {
    let d = dir("failing");
    let path = d.join("f.qcow2");
    for (round, shape) in ["cluster_size=512", "cluster_size=4096,refcount_bits=64"].into_iter().enumerate() {
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, path.to_str().unwrap(), "1M"]));
        let below = Volatile {
            path: path.clone(),
            safe: std::sync::Mutex::new(std::fs::read(&path).unwrap()),
            cached: Default::default(),
            cuts: Default::default(),
        };
        let rng = std::sync::Mutex::new(Rng(31 + round as u64));
        let store = std::sync::Arc::new(Failing { below, rng, mended: Default::default() });
        let options = OpenOptions { discard: true, locking: false, ..OpenOptions::default() };
        let image = super::Qcow2::over(std::sync::Arc::clone(&store) as _, &options, 0).unwrap();
        let mut model = vec![0u8; 1 << 20];
        let mut rng = Rng(77);
        let mut failed = 0;
        {
            let image: &dyn crate::Image = &image;
            let mut again = |what: &dyn Fn() -> Result<(), crate::BlockError>| {
                while what().is_err() {
                    failed += 1;
                    assert!(failed < 20_000);
                }
            };
            for _ in 0..400 {
                let at = rng.below(2000) as usize * 512;
                let len = (512 * (1 + rng.below(20)) as usize).min(model.len() - at);
                match rng.below(8) {
                    0 | 1 => again(&|| image.flush()),
                    2 => {
                        again(&|| image.write_zeroes(at as u64, len as u64, true));
                        model[at..at + len].fill(0);
                    }
                    _ => {
                        let data = vec![rng.next() as u8; len];
                        again(&|| image.write_at(at as u64, &data));
                        model[at..at + len].copy_from_slice(&data);
                    }
                }
            }
        }
        assert!(failed > 50, "{failed}");
        store.mended.store(true, std::sync::atomic::Ordering::SeqCst);
        drop(image);
        std::fs::write(&path, store.below.now()).unwrap();
        verify(&path, &model);
    }
    std::fs::remove_dir_all(d).unwrap();
}

/// QEMU writes with lazy reference counts and crashes; the counts are repaired before anything is written.
#[test]
fn a_dirty_image_is_repaired() {
    let d = dir("dirty");
    let path = d.join("d.qcow2");
    let p = path.to_str().unwrap();
    assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4096", p, "8M"]));
    assert!(qemu_img(&["snapshot", "-c", "before", p]));
    let commands = ["-c", "write -P 7 0 1M", "-c", "write -P 9 5M 64k", "-c", "flush", "-c", "abort"];
    let _ = Command::new("qemu-io").args(["-f", "qcow2"]).args(commands).arg(p).output().unwrap();
    let dirty = std::fs::read(&path).unwrap()[79] & 1;
    assert_eq!(dirty, 1, "qemu-io left the image dirty");
    let mut model = vec![0u8; 8 << 20];
    model[..1 << 20].fill(7);
    model[5 << 20..(5 << 20) + (64 << 10)].fill(9);
    let mut got = vec![0; model.len()];
    let shared = OpenOptions { read_only: true, ..OpenOptions::default() };
    open(&path, &shared).unwrap().read_at(0, &mut got).unwrap();
    assert!(got == model, "readable as it is");
    exercise(&path, &mut model, 91, 60, true);
    verify(&path, &model);
    assert!(qemu_img(&["snapshot", "-a", "before", p]));
    verify(&path, &vec![0; 8 << 20]);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn zstd_clusters_are_read_and_overwritten() {
    let d = dir("zstd");
    let mut model: Vec<u8> = (0..3 << 20).map(|i: usize| (i / 700) as u8 ^ (i % 7) as u8).collect();
    let (raw, packed) = (d.join("x.raw"), d.join("x.qcow2"));
    std::fs::write(&raw, &model).unwrap();
    let (raw, p) = (raw.to_str().unwrap(), packed.to_str().unwrap());
    assert!(qemu_img(&["convert", "-q", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw, p]));
    let mut got = vec![0; model.len()];
    open(&packed, &OpenOptions { read_only: true, ..OpenOptions::default() })
        .unwrap()
        .read_at(0, &mut got)
        .unwrap();
    assert!(got == model);
    exercise(&packed, &mut model, 55, 150, true);
    verify(&packed, &model);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let d = dir("refused");
    let path = d.join("r.qcow2");
    let p = path.to_str().unwrap().to_owned();
    let fails = |options: &OpenOptions| open(&path, options).err().map(|e| e.to_string()).unwrap_or_default();
    let patch = |at: usize, bytes: &[u8]| {
        let mut raw = std::fs::read(&path).unwrap();
        raw[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, raw).unwrap();
    };
    let write = OpenOptions::default();
    let read = OpenOptions { read_only: true, ..OpenOptions::default() };
    let create = || assert!(qemu_img(&["create", "-q", "-f", "qcow2", &p, "1M"]));
    create();
    patch(79, &[2]);
    assert!(fails(&write).contains("Image is corrupt; cannot be opened read/write"), "{}", fails(&write));
    open(&path, &read).unwrap();
    create();
    patch(72, &[0x40]);
    assert!(fails(&read).contains("Unsupported qcow2 feature(s): Unknown incompatible feature: bit 62"));
    create();
    patch(79, &[8]);
    patch(104, &[9]);
    assert!(fails(&read).contains("unknown compression type: 9"), "{}", fails(&read));
    let data = format!("data_file={}/sub/other.dat", d.display());
    std::fs::create_dir_all(d.join("sub")).unwrap();
    assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, &p, "1M"]));
    assert!(fails(&read).contains("not in the image's directory"), "{}", fails(&read));
    std::fs::remove_dir_all(d).unwrap();
}

/// QEMU writes single subclusters over a backing image; both read them, and ftvm writes among them.
#[test]
fn subclusters_are_those_of_qemu() {
    let d = dir("sub");
    let (base, path) = (d.join("base.raw"), d.join("top.qcow2"));
    let mut model: Vec<u8> = (0..4usize << 20).map(|i| (i / 4096) as u8 | 1).collect();
    std::fs::write(&base, &model).unwrap();
    let p = path.to_str().unwrap();
    let backing = ["-b", base.to_str().unwrap(), "-F", "raw", p, "4M"];
    for cluster in ["64K", "2M"] {
        let options = format!("extended_l2=on,cluster_size={cluster}");
        assert!(qemu_img(&[&["create", "-q", "-f", "qcow2", "-o", &options][..], &backing[..]].concat()));
        let mut rng = Rng(5);
        let mut commands = Vec::new();
        for _ in 0..60 {
            let at = rng.below(1020) * 4096;
            let len = 4096 * (1 + rng.below(3));
            let zero = rng.below(3) == 0;
            let byte = 1 + rng.below(254) as u8;
            commands.push("-c".to_owned());
            commands.push(if zero {
                format!("write -z {at} {len}")
            } else {
                format!("write -P {byte} {at} {len}")
            });
            model[at as usize..(at + len) as usize].fill(if zero { 0 } else { byte });
        }
        let out = Command::new("qemu-io").args(["-f", "qcow2"]).args(&commands).arg(p).output().unwrap();
        assert!(out.status.success());
        let mut got = vec![0; model.len()];
        open(&path, &OpenOptions { read_only: true, ..OpenOptions::default() })
            .unwrap()
            .read_at(0, &mut got)
            .unwrap();
        assert!(got == model, "{cluster}");
        exercise(&path, &mut model, 13, 120, true);
        verify(&path, &model);
        model = std::fs::read(&base).unwrap();
    }
    std::fs::remove_dir_all(d).unwrap();
}
