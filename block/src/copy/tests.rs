use super::*;
use crate::{qcow2, OpenOptions, Root};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

const SIZE: u64 = 8 << 20;

fn dir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("ftvm-copy-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn open(path: &Path, read_only: bool, below: Option<&Arc<Node>>) -> Arc<Node> {
    let options = OpenOptions { read_only, ..OpenOptions::default() };
    Node::open(&path.to_string_lossy(), path, &options, Some(below.cloned())).unwrap()
}

/// base <- mid <- top, each with a pattern of its own over parts of the one below.
fn chain(dir: &Path) -> (Arc<Node>, Arc<Node>, Arc<Node>) {
    let path = |n: &str| dir.join(n);
    qcow2::create_overlay(&path("base"), SIZE, None, None).unwrap();
    qcow2::create_overlay(&path("mid"), SIZE, Some(("base", "qcow2")), None).unwrap();
    qcow2::create_overlay(&path("top"), SIZE, Some(("mid", "qcow2")), None).unwrap();
    let base = open(&path("base"), false, None);
    base.write_at(0, &vec![1; 4 << 20]).unwrap();
    base.reopen(true).unwrap();
    let mid = open(&path("mid"), false, Some(&base));
    mid.write_at(1 << 20, &vec![2; 2 << 20]).unwrap();
    mid.reopen(true).unwrap();
    let top = open(&path("top"), false, Some(&mid));
    top.write_at((2 << 20) + 512, &vec![3; 2 << 20]).unwrap();
    (base, mid, top)
}

fn contents(image: &dyn Image) -> Vec<u8> {
    let mut all = vec![0; image.size() as usize];
    image.read_at(0, &mut all).unwrap();
    all
}

fn run(work: &mut dyn Work) -> Step {
    for _ in 0..10_000 {
        match work.step().unwrap() {
            Step::More(_) => {}
            end => return end,
        }
    }
    panic!("it does not end");
}

/// Writes all over `root` until told to stop, and keeps the contents that must result.
fn disturb(root: Arc<Root>, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<Vec<u8>> {
    let mut model = contents(root.as_ref());
    std::thread::spawn(move || {
        let mut seed = 7u64;
        let mut random = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 33
        };
        while !stop.load(Ordering::SeqCst) {
            let offset = random() % (SIZE / 512 - 64) * 512;
            let data = vec![random() as u8; (1 + random() % 63) as usize * 512];
            if random() % 8 == 0 {
                root.write_zeroes(offset, data.len() as u64, true).unwrap();
                model[offset as usize..][..data.len()].fill(0);
            } else {
                root.write_at(offset, &data).unwrap();
                model[offset as usize..][..data.len()].copy_from_slice(&data);
            }
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        model
    })
}

#[test]
fn a_mirror_of_a_written_disk_takes_its_place() {
    for full in [true, false] {
        let dir = dir(if full { "mirror" } else { "commit-active" });
        let (base, _mid, top) = chain(&dir);
        let root = Root::new(Arc::clone(&top));
        let stop = Arc::new(AtomicBool::new(false));
        let guest = disturb(Arc::clone(&root), Arc::clone(&stop));
        let (target, part) = if full {
            qcow2::create_overlay(&dir.join("copy"), SIZE, None, None).unwrap();
            (open(&dir.join("copy"), false, None), Part::Full)
        } else {
            base.reopen(false).unwrap();
            (Arc::clone(&base), Part::Above(base))
        };
        let mut mirror = Mirror::new(top, Arc::clone(&target), part).unwrap();
        assert_eq!(run(&mut mirror), Step::Ready);
        std::thread::sleep(std::time::Duration::from_millis(20));
        while !mirror.is_near() {
            mirror.step().unwrap();
        }
        {
            let mut node = root.hold();
            mirror.finish().unwrap();
            *node = Arc::clone(&target);
        }
        drop(mirror);
        std::thread::sleep(std::time::Duration::from_millis(10));
        stop.store(true, Ordering::SeqCst);
        let model = guest.join().unwrap();
        assert!(contents(target.as_ref()) == model, "full: {full}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn a_commit_leaves_the_contents_and_one_image_less() {
    let dir = dir("commit");
    let (base, mid, top) = chain(&dir);
    let before = contents(top.as_ref());
    base.reopen(false).unwrap();
    assert_eq!(run(&mut Commit::new(mid, Arc::clone(&base))), Step::Done);
    base.reopen(true).unwrap();
    top.name_backing(Some(("base", "qcow2"))).unwrap();
    top.set_backing(Some(base)).unwrap();
    assert!(contents(top.as_ref()) == before);
    drop(top);
    std::fs::remove_file(dir.join("mid")).unwrap();
    assert!(contents(crate::open(&dir.join("top"), &OpenOptions::default()).unwrap().as_ref()) == before);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_stream_makes_a_written_disk_independent() {
    for whole in [true, false] {
        let dir = dir(if whole { "stream" } else { "stream-base" });
        let (base, _mid, top) = chain(&dir);
        let root = Root::new(Arc::clone(&top));
        let stop = Arc::new(AtomicBool::new(false));
        let guest = disturb(Arc::clone(&root), Arc::clone(&stop));
        let base = (!whole).then_some(base);
        let mut stream = Stream::new(Arc::clone(&top), base);
        assert_eq!(run(&mut stream), Step::Done);
        top.name_backing(stream.base().map(|_| ("base", "qcow2"))).unwrap();
        top.set_backing(stream.base()).unwrap();
        stop.store(true, Ordering::SeqCst);
        let model = guest.join().unwrap();
        assert!(contents(root.as_ref()) == model);
        drop((stream, root, top));
        for file in if whole { &["base", "mid"][..] } else { &["mid"] } {
            std::fs::remove_file(dir.join(file)).unwrap();
        }
        let again = crate::open(&dir.join("top"), &OpenOptions::default()).unwrap();
        assert!(contents(again.as_ref()) == model, "whole: {whole}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn a_backup_has_the_contents_of_its_beginning() {
    let dir = dir("backup");
    let (_base, _mid, top) = chain(&dir);
    let root = Root::new(Arc::clone(&top));
    qcow2::create_overlay(&dir.join("copy"), SIZE, None, None).unwrap();
    let target = open(&dir.join("copy"), false, None);
    let before = contents(top.as_ref());
    let mut backup = Backup::new(top, Arc::clone(&target), &Part::Full, None).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let guest = disturb(Arc::clone(&root), Arc::clone(&stop));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(run(&mut backup), Step::Done);
    stop.store(true, Ordering::SeqCst);
    let model = guest.join().unwrap();
    assert!(contents(root.as_ref()) == model);
    assert!(contents(target.as_ref()) == before);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn the_name_of_the_image_below_is_changed_by_one_sector() {
    let dir = dir("names");
    let long = format!("{}/base", "x".repeat(200));
    let very_long = "y".repeat(1000);
    for cluster in [512u64, 65536] {
        let path = dir.join(format!("image{cluster}"));
        let options = qcow2::CreateOptions {
            cluster_size: cluster,
            backing: Some(("base".into(), "raw".into())),
            ..qcow2::CreateOptions::new(SIZE)
        };
        qcow2::create(&path, &options).unwrap();
        let image = open(&path, false, None);
        for (name, format) in [(long.as_str(), "qcow2"), (&very_long, "raw"), ("a", "raw")] {
            let result = image.name_backing(Some((name, format)));
            if name.len() > 500 && cluster == 512 {
                assert!(result.unwrap_err().to_string().contains("no room"));
                continue;
            }
            result.unwrap();
            let again = open_header(&path);
            assert_eq!(again, Some((name.to_owned(), Some(format.to_owned()))));
            assert_eq!(image.info().backing.map(|(n, _, f)| (n, f)), again);
        }
        image.name_backing(None).unwrap();
        assert_eq!(open_header(&path), None);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

fn open_header(path: &Path) -> Option<(String, Option<String>)> {
    let look = OpenOptions { read_only: true, force_share: true, ..OpenOptions::default() };
    let node = Node::open("look", path, &look, Some(None)).unwrap();
    node.info().backing.map(|(name, _, format)| (name, format))
}
