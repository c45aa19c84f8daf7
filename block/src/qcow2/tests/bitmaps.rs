//! Dirty bitmaps in the image, with QEMU's programs as the other side.

use super::*;
use crate::bitmap::Use;
use crate::{Image, Node};
use std::sync::Arc;

/// What a program prints; it must end well.
fn say(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {error}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn node(path: &Path, read_only: bool) -> Arc<Node> {
    Node::open("n", path, &OpenOptions { read_only, ..OpenOptions::default() }, None).unwrap()
}

/// The dirty ranges of a bitmap as QEMU reads them from the file (`[start, end)`).
fn qemus(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let context = format!("--map=qemu:dirty-bitmap:{name}");
    let file = path.to_str().unwrap();
    let args = ["--json", &context, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, file, "]"];
    let text = say("nbdinfo", &args);
    let field = |line: &str, key: &str| {
        let rest = &line[line.find(key)? + key.len()..];
        let digits: String =
            rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    };
    let mut out: Vec<(u64, u64)> = Vec::new();
    for item in text.split('{').filter(|i| i.contains("\"offset\"")) {
        let of = |key: &str| field(item, key).unwrap_or_else(|| panic!("no {key} in {item}"));
        let (at, len, kind) = (of("\"offset\""), of("\"length\""), of("\"type\""));
        match out.last_mut() {
            _ if kind & 1 == 0 => {}
            Some(last) if last.1 == at => last.1 += len,
            _ => out.push((at, at + len)),
        }
    }
    out
}

/// The same as this program has them.
fn ours(node: &Node, name: &str) -> Vec<(u64, u64)> {
    let bits = node.bitmap(name).unwrap().bits();
    let (mut at, mut out) = (0, Vec::new());
    while at < bits.size() {
        let (set, len) = bits.run(at);
        if set {
            out.push((at, at + len));
        }
        at += len;
    }
    out
}

/// The flags of a bitmap in the file.
fn flags(path: &Path, name: &str) -> String {
    let info = say("qemu-img", &["info", "-U", path.to_str().unwrap()]);
    let at = info.find(&format!("name: {name}\n")).unwrap_or_else(|| panic!("no {name} in {info}"));
    // The flags lie before the name.
    let start = info[..at].rfind("flags:").unwrap();
    info[start..at]
        .split_whitespace()
        .filter(|w| w.contains('-') || *w == "auto")
        .collect::<Vec<_>>()
        .join(" ")
}

/// Each side makes bitmaps, writes, and reads what the other has noted.
#[test]
fn both_sides_keep_the_same_bitmaps() {
    let d = dir("bitmaps");
    for (i, shape) in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=16K",
        "data_file=plain.dat",
        "lazy_refcounts=on,cluster_size=4096",
    ]
    .into_iter()
    .enumerate()
    {
        let path = d.join(format!("b{i}.qcow2"));
        let p = path.to_str().unwrap();
        let shape = shape.replace("data_file=", &format!("data_file={}/", d.display()));
        assert!(qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &shape,
            p,
            &(9 * 1024 * 1024 + 7 * 512).to_string()
        ]));
        assert!(qemu_img(&["bitmap", "--add", "-g", "512", p, "fine"]));
        assert!(qemu_img(&["bitmap", "--add", p, "coarse"]));
        assert!(qemu_img(&["bitmap", "--add", "--disable", p, "off"]));
        // What QEMU wrote is noted.
        say("qemu-io", &["-f", "qcow2", "-c", "write 1M 1k", "-c", "write 9437184 3584", p]);
        let node_a = node(&path, false);
        assert_eq!(ours(&node_a, "fine"), [(1 << 20, (1 << 20) + 1024), (9437184, 9437184 + 3584)]);
        assert!(flags(&path, "fine").contains("in-use"), "open for writing: {}", flags(&path, "fine"));
        let granularity = node_a.bitmap("coarse").unwrap().info().granularity;
        assert_eq!(node_a.bitmap("coarse").unwrap().info().count % granularity, 0);
        assert!(
            !node_a.bitmap("off").unwrap().info().recording
                && node_a.bitmap("off").unwrap().info().count == 0
        );
        // And what this program writes.
        let mut rng = Rng(11 + i as u64);
        for _ in 0..60 {
            let at = rng.below(18000) * 512;
            match rng.below(3) {
                0 => node_a.write_zeroes(at, 512, true).unwrap(),
                1 => node_a.discard(at, 1024).unwrap(),
                _ => node_a.write_at(at, &[7; 1536]).unwrap(),
            }
        }
        node_a.add_bitmap("new", Some(4096), true, true).unwrap();
        node_a.write_at(5 << 20, &[1; 4096]).unwrap();
        node_a.bitmap("off").unwrap().record(true);
        node_a.write_at(0, &[1; 512]).unwrap();
        assert!(node_a.remove_bitmap("absent").is_err());
        let noted = ["fine", "coarse", "off", "new"].map(|name| ours(&node_a, name));
        drop(node_a);
        assert!(say("qemu-img", &["check", p]).contains("No errors"));
        for (name, noted) in ["fine", "coarse", "off", "new"].iter().zip(&noted) {
            assert_eq!(flags(&path, name), "auto", "{name}");
            assert_eq!(&qemus(&path, name), noted, "{shape}: {name}");
        }
        // QEMU merges them, and takes one away; this program reads that and takes another.
        assert!(qemu_img(&["bitmap", "--merge", "new", p, "coarse"]));
        assert!(qemu_img(&["bitmap", "--remove", p, "fine"]));
        let merged = qemus(&path, "coarse");
        let before = std::fs::read(&path).unwrap();
        let looked = node(&path, true);
        assert_eq!(ours(&looked, "coarse"), merged);
        let refused = looked.remove_bitmap("new").err().unwrap().to_string();
        assert_eq!(refused, "Bitmap 'new' is readonly and cannot be modified");
        drop(looked);
        assert!(std::fs::read(&path).unwrap() == before, "looking changes nothing");
        let again = node(&path, false);
        again.remove_bitmap("off").unwrap();
        again.remove_bitmap("new").unwrap();
        again.bitmap("coarse").unwrap().clear();
        drop(again);
        assert_eq!(qemus(&path, "coarse"), []);
        node(&path, false).remove_bitmap("coarse").unwrap();
        assert!(!say("qemu-img", &["info", p]).contains("bitmaps:\n"));
        assert!(say("qemu-img", &["check", p]).contains("No errors"));
    }
    std::fs::remove_dir_all(d).unwrap();
}

/// What a crash leaves is known to be unknown, on both sides, and stays so until it is removed.
#[test]
fn a_crash_leaves_bitmaps_inconsistent() {
    let d = dir("bitmapcrash");
    let path = d.join("c.qcow2");
    let p = path.to_str().unwrap();
    assert!(qemu_img(&["create", "-q", "-f", "qcow2", p, "8M"]));
    assert!(qemu_img(&["bitmap", "--add", p, "b"]));
    let crashed = d.join("crashed.qcow2");
    {
        let image = node(&path, false);
        image.write_at(0, &[1; 4096]).unwrap();
        image.flush().unwrap();
        std::fs::copy(&path, &crashed).unwrap();
    }
    assert_eq!(flags(&path, "b"), "auto");
    assert_eq!(flags(&crashed, "b"), "in-use auto");
    for _ in 0..2 {
        let image = node(&crashed, false);
        let info = image.bitmap("b").unwrap().info();
        assert!(info.inconsistent && !info.recording && info.persistent);
        image.write_at(1 << 20, &[2; 4096]).unwrap();
        let refused = image.usable_bitmap("b", Use::Read).err().unwrap().to_string();
        assert_eq!(refused, "Bitmap 'b' is inconsistent and cannot be used");
        assert!(image.resize(16 << 20).is_err());
    }
    assert!(!qemu_img(&["bitmap", "--clear", crashed.to_str().unwrap(), "b"]), "QEMU does not use it either");
    node(&crashed, false).remove_bitmap("b").unwrap();
    assert!(say("qemu-img", &["check", crashed.to_str().unwrap()]).contains("No errors"));
    // A program without bitmaps has written the image: the bit that vouches for them is off.
    let mut raw = std::fs::read(&path).unwrap();
    raw[95] &= !1;
    std::fs::write(&path, raw).unwrap();
    assert!(node(&path, false).bitmaps().is_empty());
    std::fs::remove_dir_all(d).unwrap();
}

/// A node that goes to the back and comes to the front again keeps what it has noted.
#[test]
fn bitmaps_follow_a_node_through_its_modes() {
    let d = dir("bitmapmodes");
    let path = d.join("m.qcow2");
    super::super::create_overlay(&path, 4 << 20, None, None).unwrap();
    let image = node(&path, false);
    image.add_bitmap("b", None, true, true).unwrap();
    image.add_bitmap("memory", Some(512), false, true).unwrap();
    image.write_at(1 << 20, &[1; 512]).unwrap();
    image.reopen(true).unwrap();
    assert_eq!(flags(&path, "b"), "auto");
    assert_eq!(qemus(&path, "b"), [(1 << 20, (1 << 20) + 65536)]);
    assert!(
        image.usable_bitmap("b", Use::Change).is_err() && image.usable_bitmap("memory", Use::Change).is_ok()
    );
    // Another program has it: it is not touched.
    let other = node(&path, true);
    assert!(image.reopen(false).is_err());
    assert_eq!(flags(&path, "b"), "auto");
    drop(other);
    image.reopen(false).unwrap();
    assert_eq!(flags(&path, "b"), "in-use auto");
    image.write_at(2 << 20, &[1; 512]).unwrap();
    image.resize(5 << 20).unwrap();
    let want = [(1 << 20, (1 << 20) + 65536), (2 << 20, (2 << 20) + 65536), (4 << 20, 5 << 20)];
    assert_eq!(ours(&image, "b"), want);
    assert_eq!(image.bitmap("memory").unwrap().info().count, 512 * 2 + (1 << 20));
    let apply = crate::SnapshotChange::Apply("x".into());
    assert_eq!(image.snapshot(&apply).err().unwrap().to_string(), "Device has active dirty bitmaps");
    // Internal snapshots and another name of the image below leave them where they are.
    image.snapshot(&crate::SnapshotChange::Create(crate::Snapshot::new("s", 1))).unwrap();
    image.name_backing(Some((&format!("{}/{}", d.display(), "x".repeat(300)), "raw"))).unwrap();
    image.name_backing(None).unwrap();
    drop(image);
    assert_eq!(qemus(&path, "b"), want);
    assert!(say("qemu-img", &["check", path.to_str().unwrap()]).contains("No errors"));
    std::fs::remove_dir_all(d).unwrap();
}

/// Power is cut before and after every write: the image is consistent, and a bitmap that can be believed says the truth.
#[test]
fn a_power_cut_at_any_moment_leaves_no_wrong_bitmap() {
    let d = dir("bitmappower");
    let (path, copy) = (d.join("p.qcow2"), d.join("copy.qcow2"));
    let p = path.to_str().unwrap();
    for round in 0..3u64 {
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", p, "256K"]));
        for name in ["a", "b"] {
            assert!(qemu_img(&["bitmap", "--add", "-g", "512", p, name]));
        }
        say("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1k", p]);
        let (before, first) = {
            let image = node(&path, true);
            let mut all = vec![0; 256 << 10];
            image.read_at(0, &mut all).unwrap();
            (all, ours(&image, "a"))
        };
        let store = Volatile::new(&path);
        *store.cuts.lock().unwrap() = Some((Rng(99 + round), Vec::new()));
        let options = OpenOptions { discard: true, locking: false, ..OpenOptions::default() };
        let image = super::super::Qcow2::over(Arc::clone(&store) as _, &options, 0).unwrap();
        let image = Node::named("n", Box::new(image)).unwrap();
        let mut rng = Rng(5 + round);
        for _ in 0..8 {
            image.write_at(rng.below(500) * 512, &[2; 1024]).unwrap();
        }
        image.add_bitmap("c", Some(4096), true, true).unwrap();
        image.write_at(99 * 512, &[3; 512]).unwrap();
        image.remove_bitmap("b").unwrap();
        let last = ours(&image, "a");
        drop(image);
        let cuts = store.cuts.lock().unwrap().take().unwrap().1;
        let mut kept = [0; 2];
        for (i, cut) in cuts.iter().enumerate() {
            std::fs::write(&copy, cut).unwrap();
            if i % 7 == 0 || i + 3 > cuts.len() {
                let code = Command::new("qemu-img").args(["check", "-q", copy.to_str().unwrap()]).status();
                let code = code.unwrap().code();
                assert!(matches!(code, Some(0 | 3)), "round {round}, cut {i}: check gave {code:?}");
            }
            let image = node(&copy, true);
            let Ok(bitmap) = image.bitmap("a") else { continue };
            if bitmap.info().inconsistent {
                continue;
            }
            let mut now = vec![0; 256 << 10];
            image.read_at(0, &mut now).unwrap();
            if now == before && ours(&image, "a") == first {
                kept[0] += 1;
            } else {
                assert_eq!(ours(&image, "a"), last, "round {round}, cut {i}");
                kept[1] += 1;
            }
        }
        assert!(kept[1] > 0 && cuts.len() > 40, "{kept:?} of {}", cuts.len());
        std::fs::write(&path, store.now()).unwrap();
        assert_eq!(qemus(&path, "a"), last);
        assert!(say("qemu-img", &["check", p]).contains("No errors"));
    }
    std::fs::remove_dir_all(d).unwrap();
}
