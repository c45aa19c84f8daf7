//! Internal snapshots, with qemu-img as the other side.

use super::*;
use crate::{Image, Snapshot, SnapshotChange};

fn create(image: &dyn Image, name: &str) -> Snapshot {
    image.snapshot(&SnapshotChange::Create(Snapshot::new(name, 5_000_000_001))).unwrap()
}

fn delete(name: &str) -> SnapshotChange {
    SnapshotChange::Delete { id: None, name: Some(name.into()) }
}

/// The contents of a snapshot, as qemu-img reads them.
fn contents(path: &Path, name: &str) -> Vec<u8> {
    let raw = path.with_extension("snapshot");
    let (p, r) = (path.to_str().unwrap(), raw.to_str().unwrap());
    assert!(
        qemu_img(&["convert", "-q", "-l", &format!("snapshot.name={name}"), "-O", "raw", p, r]),
        "{name}"
    );
    std::fs::read(raw).unwrap()
}

/// Some writes all over an image and its model.
fn scribble(image: &dyn Image, model: &mut [u8], rng: &mut Rng) {
    for _ in 0..12 {
        let at = (rng.below(model.len() as u64 / 512 - 1) * 512) as usize;
        let len = (512 * (1 + rng.below(60)) as usize).min(model.len() - at);
        if rng.below(5) == 0 {
            image.write_zeroes(at as u64, len as u64, true).unwrap();
            model[at..at + len].fill(0);
        } else {
            let data = vec![rng.next() as u8; len];
            image.write_at(at as u64, &data).unwrap();
            model[at..at + len].copy_from_slice(&data);
        }
    }
}

#[test]
fn random_snapshots_on_every_shape_of_image() {
    let d = dir("snapshots");
    for (i, shape) in [
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=4",
        "cluster_size=4096,refcount_bits=64",
        "cluster_size=65536,lazy_refcounts=on",
        "compat=0.10",
        "extended_l2=on,cluster_size=16K",
        "preallocation=metadata,cluster_size=4096",
    ]
    .into_iter()
    .enumerate()
    {
        let path = d.join(format!("s{i}.qcow2"));
        let p = path.to_str().unwrap();
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, p, "2M"]));
        let options = OpenOptions { discard: i % 2 == 0, ..OpenOptions::default() };
        let mut rng = Rng(0xABCD + i as u64 * 99);
        let mut model = vec![0u8; 2 << 20];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        let mut image = open(&path, &options).unwrap();
        for step in 0..40 {
            scribble(image.as_ref(), &mut model, &mut rng);
            match rng.below(5) {
                0 | 1 if kept.len() < 8 => {
                    let name = format!("n{step}");
                    let made = create(image.as_ref(), &name);
                    assert!(made.disk_size == 2 << 20 && !made.id.is_empty());
                    kept.push((name, model.clone()));
                }
                2 if !kept.is_empty() => {
                    let (name, was) = &kept[rng.below(kept.len() as u64) as usize];
                    image.snapshot(&SnapshotChange::Apply(name.clone())).unwrap();
                    model.clone_from(was);
                }
                3 if !kept.is_empty() => {
                    let (name, _) = kept.remove(rng.below(kept.len() as u64) as usize);
                    image.snapshot(&delete(&name)).unwrap();
                }
                _ => {}
            }
            let mut got = vec![0; model.len()];
            image.read_at(0, &mut got).unwrap();
            assert!(got == model, "{shape} step {step}");
            if step % 8 == 7 {
                drop(image);
                verify(&path, &model);
                for (name, was) in &kept {
                    assert!(contents(&path, name) == *was, "{shape} step {step}: snapshot {name}");
                }
                image = open(&path, &options).unwrap();
                let names: Vec<String> = image.info().snapshots.into_iter().map(|s| s.name).collect();
                assert_eq!(names, kept.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>());
            }
        }
        // qemu-img applies and deletes what was made here.
        drop(image);
        for (name, was) in kept {
            assert!(qemu_img(&["snapshot", "-a", &name, p]));
            verify(&path, &was);
            assert!(qemu_img(&["snapshot", "-d", &name, p]));
            verify(&path, &was);
        }
        std::fs::remove_file(path).unwrap();
    }
    std::fs::remove_dir_all(d).unwrap();
}

/// qemu-img makes snapshots (of compressed clusters too, and deletes one between two others), ftvm applies and deletes them.
#[test]
fn snapshots_of_qemu_are_applied_and_deleted() {
    let d = dir("qemu-snapshots");
    let (raw, path) = (d.join("x.raw"), d.join("x.qcow2"));
    let first: Vec<u8> = (0..3usize << 20).map(|i| (i / 900) as u8).collect();
    std::fs::write(&raw, &first).unwrap();
    let p = path.to_str().unwrap();
    assert!(qemu_img(&[
        "convert",
        "-q",
        "-c",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=16K",
        raw.to_str().unwrap(),
        p
    ]));
    let mut states = vec![first];
    let mut rng = Rng(8);
    for name in ["a", "b", "c"] {
        assert!(qemu_img(&["snapshot", "-c", name, p]));
        let mut model = states.last().unwrap().clone();
        scribble(open(&path, &OpenOptions::default()).unwrap().as_ref(), &mut model, &mut rng);
        states.push(model);
    }
    assert!(qemu_img(&["snapshot", "-d", "b", p]));
    verify(&path, &states[3]);
    let image = open(&path, &OpenOptions::default()).unwrap();
    image.snapshot(&SnapshotChange::Apply("c".into())).unwrap();
    drop(image);
    verify(&path, &states[2]);
    let image = open(&path, &OpenOptions::default()).unwrap();
    image.snapshot(&SnapshotChange::Delete { id: Some("3".into()), name: None }).unwrap();
    let e = image.snapshot(&SnapshotChange::Delete { id: Some("3".into()), name: None }).unwrap_err();
    assert_eq!(e.to_string(), "snapshot '3' does not exist");
    image.snapshot(&SnapshotChange::Apply("1".into())).unwrap();
    drop(image);
    verify(&path, &states[0]);
    open(&path, &OpenOptions::default()).unwrap().snapshot(&delete("a")).unwrap();
    verify(&path, &states[0]);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn what_cannot_be_done_with_snapshots_is_said_and_changes_nothing() {
    let d = dir("no-snapshots");
    let path = d.join("x.qcow2");
    let p = path.to_str().unwrap();
    let message = |options: &str| {
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, p, "1M"]));
        let image = open(&path, &OpenOptions::default()).unwrap();
        image.write_at(0, &[1; 4096]).unwrap();
        let e = image.snapshot(&SnapshotChange::Create(Snapshot::new("x", 0))).unwrap_err();
        image.write_at(4096, &[2; 4096]).unwrap();
        drop(image);
        assert!(qemu_img(&["check", "-q", p]));
        e.to_string()
    };
    assert_eq!(
        message("refcount_bits=1"),
        "the image's reference counts of 1 bits cannot count another snapshot"
    );
    let data = format!("data_file={}/data", d.display());
    assert_eq!(message(&data), "an image with an external data file has no snapshots");
    std::fs::write(&path, [0; 4096]).unwrap();
    let raw = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let e = open(&path, &raw).unwrap().snapshot(&delete("x")).unwrap_err();
    assert_eq!(e.to_string(), "a raw image has no internal snapshots");
    std::fs::remove_dir_all(d).unwrap();
}

/// Power is cut at every write of making, applying and deleting snapshots: the image is the old one or the new one, and
/// consistent without a repair.
#[test]
fn a_power_cut_while_snapshots_change_leaves_the_old_image_or_the_new_one() {
    let d = dir("snapshot-power");
    let (path, copy) = (d.join("p.qcow2"), d.join("copy.qcow2"));
    let mut cuts = 0;
    for (round, shape) in ["cluster_size=512", "cluster_size=4096,refcount_bits=64"].into_iter().enumerate() {
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, path.to_str().unwrap(), "192K"]));
        let store = Volatile::new(&path);
        let options = OpenOptions { discard: true, locking: false, ..OpenOptions::default() };
        let engine = super::super::Qcow2::over(std::sync::Arc::clone(&store) as _, &options, 0).unwrap();
        let image: &dyn Image = &engine;
        let mut rng = Rng(77 + round as u64);
        let mut model = vec![0u8; 192 << 10];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for step in 0..10 {
            scribble(image, &mut model, &mut rng);
            image.flush().unwrap();
            let mut after = kept.clone();
            let mut contents_after = model.clone();
            let change = match step % 5 {
                0 | 1 | 3 => {
                    after.push((format!("s{step}"), model.clone()));
                    SnapshotChange::Create(Snapshot::new(&format!("s{step}"), 1))
                }
                2 => {
                    contents_after.clone_from(&kept[0].1);
                    SnapshotChange::Apply(kept[0].0.clone())
                }
                _ => {
                    let (name, _) = after.remove(rng.below(after.len() as u64) as usize);
                    delete(&name)
                }
            };
            *store.cuts.lock().unwrap() = Some((Rng(rng.next() | 1), Vec::new()));
            image.snapshot(&change).unwrap();
            let images = store.cuts.lock().unwrap().take().unwrap().1;
            let (before, old) = (kept, model);
            (kept, model) = (after, contents_after);
            let mut seen = [false; 2];
            let sample = (images.len() / 12).max(1);
            for (n, left) in
                images.iter().enumerate().filter(|(n, _)| n % sample == 0 || n + 3 > images.len())
            {
                cuts += 1;
                std::fs::write(&copy, left).unwrap();
                let shared = OpenOptions { read_only: true, ..OpenOptions::default() };
                let opened = open(&copy, &shared).unwrap();
                let names: Vec<String> = opened.info().snapshots.into_iter().map(|s| s.name).collect();
                let mut got = vec![0; old.len()];
                opened.read_at(0, &mut got).unwrap();
                drop(opened);
                let is = |list: &[(String, Vec<u8>)], contents: &[u8]| {
                    got == contents && list.iter().map(|(n, _)| n).eq(names.iter())
                };
                let new = is(&kept, &model);
                assert!(new || is(&before, &old), "round {round} step {step} cut {n}: {change:?}");
                seen[usize::from(new)] = true;
                // Leaks may come from the ordinary writes before.
                let status = Command::new("qemu-img").args(["check", "-q", copy.to_str().unwrap()]).status();
                let code = status.unwrap().code();
                assert!(
                    matches!(code, Some(0 | 3)),
                    "round {round} step {step} cut {n}: check gave {code:?}"
                );
                let list = if new { &kept } else { &before };
                if let Some((name, was)) = list.get(n % list.len().max(1)) {
                    assert!(contents(&copy, name) == *was, "round {round} step {step} cut {n}: {name}");
                }
            }
            assert_eq!(seen, [true; 2], "the cuts saw both sides of the switch");
        }
    }
    assert!(cuts > 150, "{cuts}");
    std::fs::remove_dir_all(d).unwrap();
}

/// Snapshots are made while four threads write: each is one moment of the disk.
#[test]
fn snapshots_beside_writers() {
    let d = dir("snapshot-side");
    let path = d.join("x.qcow2");
    super::super::create_overlay(&path, 8 << 20, None, None).unwrap();
    let image = open(&path, &OpenOptions::default()).unwrap();
    std::thread::scope(|s| {
        let image = image.as_ref();
        for t in 0..4u64 {
            s.spawn(move || {
                let mut rng = Rng(50 + t);
                for n in 0..1500u64 {
                    // Each thread writes a counter to two places, the first one first.
                    let at = t * (2 << 20) + rng.below(20) * 65536;
                    image.write_at(at, &[n as u8; 1024]).unwrap();
                    image
                        .write_at(t * (2 << 20) + (1 << 20) + (31 << 15), &n.to_be_bytes().repeat(64))
                        .unwrap();
                }
            });
        }
        for n in 0..6 {
            std::thread::sleep(std::time::Duration::from_millis(10));
            create(image, &format!("m{n}"));
            if n > 2 {
                image.snapshot(&delete(&format!("m{}", n - 2))).unwrap();
            }
        }
    });
    let mut model = vec![0; 8 << 20];
    image.read_at(0, &mut model).unwrap();
    assert_eq!(image.info().snapshots.len(), 3);
    image.snapshot(&SnapshotChange::Apply("m5".into())).unwrap();
    let mut then = vec![0; 8 << 20];
    image.read_at(0, &mut then).unwrap();
    image.write_at(0, &model).unwrap();
    drop(image);
    verify(&path, &model);
    assert!(contents(&path, "m5") == then);
    std::fs::remove_dir_all(d).unwrap();
}

#[test]
fn a_snapshot_keeps_a_machines_state_that_qemu_finds() {
    let d = dir("vmstate");
    for (i, shape) in [
        "cluster_size=512",
        "cluster_size=4096,refcount_bits=8",
        "cluster_size=65536",
        "compat=0.10",
        "extended_l2=on,cluster_size=16K",
    ]
    .into_iter()
    .enumerate()
    {
        let path = d.join(format!("v{i}.qcow2"));
        let p = path.to_str().unwrap();
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", shape, p, "2M"]));
        let mut rng = Rng(0x77 + i as u64);
        let mut model = vec![0u8; 2 << 20];
        let image = crate::open(&path, &OpenOptions { discard: true, ..OpenOptions::default() }).unwrap();
        scribble(image.as_ref(), &mut model, &mut rng);
        let cluster = image.info().cluster_size.unwrap();
        let mut states = Vec::new();
        for (n, size) in [300_000u64, 5 << 20].into_iter().enumerate() {
            let state: Vec<u8> = (0..size).map(|b| (b / 512 + n as u64 * 3) as u8 | 1).collect();
            let piece = (cluster as usize) * 3;
            for (k, part) in state.chunks(piece).enumerate() {
                image.write_vm_state((k * piece) as u64, part).unwrap();
            }
            let mut new = Snapshot::new(&format!("s{n}"), 7);
            new.vm_state_size = size;
            let id = image.snapshot(&SnapshotChange::Create(new)).unwrap().id;
            image.drop_vm_state().unwrap();
            scribble(image.as_ref(), &mut model, &mut rng);
            states.push((id, state));
        }
        for (id, state) in &states {
            let mut got = vec![0u8; state.len()];
            image.read_vm_state(id, 0, &mut got).unwrap();
            assert!(got == *state, "{shape}: the state of {id}");
            image.read_vm_state(id, 1000, &mut got[..70_000]).unwrap();
            assert!(got[..70_000] == state[1000..71_000], "{shape}: a piece of it");
            assert!(image.read_vm_state(id, state.len() as u64 - 1, &mut [0; 2]).is_err());
        }
        let mut now = vec![0u8; model.len()];
        image.read_at(0, &mut now).unwrap();
        assert!(now == model, "{shape}: the disk");
        drop(image);
        assert!(qemu_img(&["check", "-q", p]), "{shape}");
        assert!(qemu_img(&["snapshot", "-q", "-a", "s1", p]));
        let byte = |at: u64| (at / 512 + 3) as u8 | 1;
        let look = format!("read -b -P {} {} 512", byte(102_400), 102_400);
        let out =
            std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", &look, p]).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains("read 512/512") && !text.contains("verification failed"), "{shape}: {text}");
        assert!(qemu_img(&["snapshot", "-q", "-d", "s1", p]) && qemu_img(&["snapshot", "-q", "-d", "s0", p]));
        assert!(qemu_img(&["check", "-q", p]), "{shape}");
    }
}
