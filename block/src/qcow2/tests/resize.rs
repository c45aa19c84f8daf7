//! Other sizes, and images made with every option.

use super::super::{create, CreateOptions, Preallocation};
use super::*;
use crate::{Image, Snapshot, SnapshotChange};

/// (virtual size, the rest of what `qemu-img info` says)
fn info(path: &Path) -> String {
    let out = Command::new("qemu-img").args(["info", "-U", path.to_str().unwrap()]).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn fill(image: &dyn Image, model: &mut [u8], rng: &mut Rng) {
    for _ in 0..20 {
        let at = (rng.below(model.len() as u64 / 512) * 512) as usize;
        let len = (512 * (1 + rng.below(200)) as usize).min(model.len() - at);
        let data = vec![1 + rng.below(255) as u8; len];
        image.write_at(at as u64, &data).unwrap();
        model[at..at + len].copy_from_slice(&data);
    }
}

#[test]
fn tables_of_counts_grow_with_the_image() {
    let d = dir("grow-table");
    let path = d.join("x.qcow2");
    create(&path, &CreateOptions { cluster_size: 512, ..CreateOptions::new(48 << 20) }).unwrap();
    let model: Vec<u8> = (0..48usize << 20).map(|i| (i / 512) as u8 | 1).collect();
    {
        let image = open(&path, &OpenOptions::default()).unwrap();
        for (n, piece) in model.chunks(1 << 18).enumerate() {
            image.write_at((n as u64) << 18, piece).unwrap();
            if n % 16 == 5 {
                image.flush().unwrap();
            }
        }
        image.snapshot(&SnapshotChange::Create(Snapshot::new("s", 0))).unwrap();
    }
    verify(&path, &model);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn random_sizes_on_every_shape_of_image() {
    let d = dir("sizes");
    let base = d.join("base.raw");
    let below: Vec<u8> = (0..3usize << 20).map(|i| (i / 4096) as u8 | 1).collect();
    std::fs::write(&base, &below).unwrap();
    for (i, (shape, backing)) in [
        ("cluster_size=512", false),
        ("cluster_size=512", true),
        ("cluster_size=4096,refcount_bits=1", false),
        ("cluster_size=65536", true),
        ("cluster_size=4096,compat=0.10", true),
        ("extended_l2=on,cluster_size=16K", true),
        ("data_file=DIR/d.dat", false),
        ("data_file=DIR/r.dat,data_file_raw=on", false),
    ]
    .into_iter()
    .enumerate()
    {
        let path = d.join(format!("s{i}.qcow2"));
        let p = path.to_str().unwrap();
        let shape = shape.replace("DIR", d.to_str().unwrap());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &shape];
        if backing {
            args.extend(["-b", base.to_str().unwrap(), "-F", "raw"]);
        }
        args.extend([p, "1M"]);
        assert!(qemu_img(&args));
        let mut model = if backing { below[..1 << 20].to_vec() } else { vec![0; 1 << 20] };
        let mut rng = Rng(0x77 + i as u64);
        for step in 0..10 {
            let image = open(&path, &OpenOptions::default()).unwrap();
            fill(image.as_ref(), &mut model, &mut rng);
            let size = (512 * (1 + rng.below(12_000)) as usize).max(8192);
            image.resize(size as u64).unwrap();
            model.resize(size, 0);
            assert_eq!(image.size(), size as u64);
            assert!(image.write_at(size as u64, &[0; 512]).is_err());
            let mut got = vec![0; size];
            image.read_at(0, &mut got).unwrap();
            assert!(got == model, "{shape} step {step}: size {size}");
            fill(image.as_ref(), &mut model, &mut rng);
            drop(image);
            verify(&path, &model);
            if step % 3 == 2 && !shape.contains("0.10") {
                // And by qemu-img (which cannot zero in version 2 over a backing file).
                let other = model.len().next_multiple_of(512) + 512 * rng.below(3000) as usize;
                assert!(qemu_img(&["resize", "-q", "-f", "qcow2", p, &other.to_string()]));
                model.resize(other, 0);
                verify(&path, &model);
            }
        }
    }
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn a_snapshot_brings_its_own_size_back() {
    let d = dir("snapshot-size");
    let path = d.join("x.qcow2");
    let p = path.to_str().unwrap();
    create(&path, &CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) }).unwrap();
    let image = open(&path, &OpenOptions::default()).unwrap();
    let mut model = vec![0; 1 << 20];
    fill(image.as_ref(), &mut model, &mut Rng(3));
    image.snapshot(&SnapshotChange::Create(Snapshot::new("small", 0))).unwrap();
    image.resize(5 << 20).unwrap();
    image.write_at(4 << 20, &[9; 4096]).unwrap();
    image.snapshot(&SnapshotChange::Create(Snapshot::new("large", 0))).unwrap();
    let mut large = model.clone();
    large.resize(5 << 20, 0);
    large[4 << 20..(4 << 20) + 4096].fill(9);
    image.snapshot(&SnapshotChange::Apply("small".into())).unwrap();
    assert_eq!(image.size(), 1 << 20);
    drop(image);
    verify(&path, &model);
    assert!(qemu_img(&["snapshot", "-a", "large", p]));
    verify(&path, &large);
    let e = open(&path, &OpenOptions::default()).unwrap().resize(1000).unwrap_err();
    assert_eq!(e.to_string(), "The new size must be a multiple of 512");
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn a_power_cut_while_the_size_changes_leaves_the_old_or_the_new_size() {
    let d = dir("size-power");
    let (base, path, copy) = (d.join("base.raw"), d.join("p.qcow2"), d.join("copy.qcow2"));
    std::fs::write(&base, vec![0x55; 300 << 10]).unwrap();
    let p = path.to_str().unwrap();
    let args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-F", "raw", "-b"];
    assert!(qemu_img(&[&args[..], &[base.to_str().unwrap(), p, "64K"]].concat()));
    let store = Volatile::new(&path);
    let options = OpenOptions { discard: true, locking: false, ..OpenOptions::default() };
    let engine = super::super::Qcow2::over(std::sync::Arc::clone(&store) as _, &options, 0).unwrap();
    let image: &dyn Image = &engine;
    let mut model = vec![0x55u8; 64 << 10];
    let mut rng = Rng(5);
    for size in [200 << 10, 96 << 10, 400 << 10, 64 << 10] {
        fill(image, &mut model, &mut rng);
        image.flush().unwrap();
        *store.cuts.lock().unwrap() = Some((Rng(rng.next() | 1), Vec::new()));
        image.resize(size as u64).unwrap();
        let images = store.cuts.lock().unwrap().take().unwrap().1;
        let mut seen = [false; 2];
        let sample = (images.len() / 25).max(1);
        for (n, left) in images.iter().enumerate().filter(|(n, _)| n % sample == 0 || n + 3 > images.len()) {
            std::fs::write(&copy, left).unwrap();
            let opened = open(&copy, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
            let now = opened.size() as usize;
            assert!(now == size || now == model.len(), "cut {n}: {now}");
            seen[usize::from(now == size)] = true;
            let mut got = vec![0; now];
            opened.read_at(0, &mut got).unwrap();
            drop(opened);
            // What is cut off may be gone before the size says so.
            let both = size.min(model.len());
            assert!(got[..both] == model[..both], "cut {n}");
            assert!(
                now <= model.len() || got[model.len()..].iter().all(|b| *b == 0),
                "cut {n}: new bytes are zero"
            );
            let code = Command::new("qemu-img").args(["check", "-q", copy.to_str().unwrap()]).status();
            assert!(matches!(code.unwrap().code(), Some(0 | 3)), "cut {n}");
        }
        assert_eq!(seen, [true; 2]);
        model.resize(size, 0);
    }
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn every_option_of_creation() {
    let d = dir("create");
    let size = 5 * 1024 * 1024 + 512 * 7;
    let base = CreateOptions::new(size);
    let with = |f: fn(&mut CreateOptions)| {
        let mut options = base.clone();
        f(&mut options);
        options
    };
    let mut all = vec![
        (with(|_| ()), "compat: 1.1"),
        (with(|o| o.version = 2), "compat: 0.10"),
        (with(|o| o.lazy_refcounts = true), "lazy refcounts: true"),
        (with(|o| o.extended_l2 = true), "extended l2: true"),
        (with(|o| o.zstd = true), "compression type: zstd"),
        (with(|o| o.data_file = Some("one.dat".into())), "one.dat"),
        (
            with(|o| {
                o.data_file = Some("two.dat".into());
                o.data_file_raw = true;
            }),
            "data file raw: true",
        ),
        (with(|o| o.preallocation = Preallocation::Metadata), "compat: 1.1"),
        (with(|o| o.preallocation = Preallocation::Falloc), "compat: 1.1"),
        (with(|o| o.preallocation = Preallocation::Full), "compat: 1.1"),
    ];
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let text: &str = Box::leak(format!("refcount bits: {bits}").into_boxed_str());
        all.push((CreateOptions { refcount_bits: bits, cluster_size: 4096, ..base.clone() }, text));
    }
    for bits in 9..=21 {
        let text: &str = Box::leak(format!("cluster_size: {}", 1 << bits).into_boxed_str());
        all.push((CreateOptions { cluster_size: 1 << bits, ..base.clone() }, text));
    }
    for (i, (options, text)) in all.into_iter().enumerate() {
        let path = d.join(format!("c{i}.qcow2"));
        create(&path, &options).unwrap();
        assert!(info(&path).contains(text), "{text}: {}", info(&path));
        let mut model = vec![0u8; size as usize];
        verify(&path, &model);
        let map =
            Command::new("qemu-img").args(["map", "--output=json", path.to_str().unwrap()]).output().unwrap();
        let map = String::from_utf8_lossy(&map.stdout).into_owned();
        let whole = options.preallocation != Preallocation::Off;
        assert_eq!(map.contains("\"offset\""), whole, "{text}: {map}");
        if options.preallocation == Preallocation::Full {
            use std::os::unix::fs::MetadataExt;
            assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= size);
        }
        exercise(&path, &mut model, 200 + i as u64, 40, true);
        verify(&path, &model);
        let e = create(&path, &options).unwrap_err();
        assert!(e.to_string().contains("File exists"), "{e}");
        std::fs::remove_file(path).unwrap();
    }
    let refused = |f: fn(&mut CreateOptions)| create(&d.join("no"), &with(f)).unwrap_err().to_string();
    assert!(refused(|o| o.cluster_size = 1000).starts_with("Cluster size must be a power of two"));
    assert!(refused(|o| o.refcount_bits = 3).starts_with("Refcount width"));
    assert!(refused(|o| (o.version, o.extended_l2) = (2, true)).starts_with("Extended L2"));
    assert!(refused(|o| o.data_file = Some("../x".into())).contains("in the image's directory"));
    assert!(refused(|o| (o.cluster_size, o.size) = (512, 1 << 42)).starts_with("The image size is too large"));
    assert!(!d.join("no").exists());
    std::fs::remove_dir_all(d).unwrap();
}
