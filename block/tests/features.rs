//! The table of qcow2 features in `block/README.md`: each row with ftvm on one side and QEMU (and, where it can, qcow2-rs)
//! on the other.

use std::path::{Path, PathBuf};
use std::process::Command;

use ftvm_block::{open, Image, OpenOptions, Snapshot, SnapshotChange};

const SIZE: usize = (3 << 20) + 512 * 5;

struct Row {
    name: &'static str,
    /// `qemu-img create -o`; `DIR` is the row's directory.
    options: &'static str,
    kind: Kind,
    /// Whether qcow2-rs reads such images.
    second: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    /// Over a raw image.
    Backing,
    /// Over a qcow2 image over a raw one.
    Chain,
    /// Filled by `qemu-img convert -c`.
    Compressed,
    Snapshots,
    Resize,
}

const fn row(name: &'static str, options: &'static str, kind: Kind, second: bool) -> Row {
    Row { name, options, kind, second }
}

const ROWS: &[Row] = &[
    row("version 3", "compat=1.1", Kind::Plain, true),
    row("version 2", "compat=0.10", Kind::Plain, true),
    row("clusters of 512 bytes", "cluster_size=512", Kind::Plain, false),
    row("clusters of 1 KiB", "cluster_size=1K", Kind::Plain, false),
    row("clusters of 2 KiB", "cluster_size=2K", Kind::Plain, false),
    row("clusters of 4 KiB", "cluster_size=4K", Kind::Plain, true),
    row("clusters of 8 KiB", "cluster_size=8K", Kind::Plain, true),
    row("clusters of 16 KiB", "cluster_size=16K", Kind::Plain, true),
    row("clusters of 32 KiB", "cluster_size=32K", Kind::Plain, true),
    row("clusters of 64 KiB", "cluster_size=64K", Kind::Plain, true),
    row("clusters of 128 KiB", "cluster_size=128K", Kind::Plain, true),
    row("clusters of 256 KiB", "cluster_size=256K", Kind::Plain, true),
    row("clusters of 512 KiB", "cluster_size=512K", Kind::Plain, true),
    row("clusters of 1 MiB", "cluster_size=1M", Kind::Plain, true),
    row("clusters of 2 MiB", "cluster_size=2M", Kind::Plain, true),
    row("counts of 1 bit", "cluster_size=4K,refcount_bits=1", Kind::Plain, true),
    row("counts of 2 bits", "cluster_size=4K,refcount_bits=2", Kind::Plain, true),
    row("counts of 4 bits", "cluster_size=4K,refcount_bits=4", Kind::Plain, true),
    row("counts of 8 bits", "cluster_size=4K,refcount_bits=8", Kind::Plain, true),
    row("counts of 32 bits", "cluster_size=4K,refcount_bits=32", Kind::Plain, true),
    row("counts of 64 bits", "cluster_size=4K,refcount_bits=64", Kind::Plain, true),
    row("backing image, raw", "cluster_size=4K", Kind::Backing, false),
    row("backing chain", "cluster_size=16K", Kind::Chain, false),
    row("version 2, backing image", "compat=0.10,cluster_size=4K", Kind::Backing, false),
    row("compressed by zlib", "compression_type=zlib", Kind::Compressed, true),
    row("compressed by zstd", "compression_type=zstd", Kind::Compressed, false),
    row("lazy reference counts", "lazy_refcounts=on", Kind::Plain, true),
    row("extended L2", "extended_l2=on,cluster_size=32K", Kind::Plain, false),
    row("extended L2, backing image", "extended_l2=on,cluster_size=128K", Kind::Backing, false),
    row("external data file", "data_file=DIR/data", Kind::Plain, false),
    row("external data file, raw", "data_file=DIR/data,data_file_raw=on", Kind::Plain, false),
    row("preallocated metadata", "preallocation=metadata", Kind::Plain, true),
    row("preallocated, falloc", "preallocation=falloc", Kind::Plain, true),
    row("preallocated, full", "preallocation=full", Kind::Plain, true),
    row("internal snapshots", "cluster_size=4K", Kind::Snapshots, true),
    row("internal snapshots, version 2", "compat=0.10,cluster_size=4K", Kind::Snapshots, true),
    row("another size", "cluster_size=4K", Kind::Resize, true),
    row("another size, backing image", "cluster_size=512", Kind::Resize, false),
];

fn qemu(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().expect("qemu-utils");
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 as usize % n
    }
}

/// One change: (offset, length, byte; `None`: zeroes), and whether it is a discard of whole clusters.
fn changes(size: usize, dice: &mut Dice) -> Vec<(usize, usize, Option<u8>)> {
    let one = |_| {
        let at = dice.below(size / 512) * 512;
        let len = ((1 + dice.below(200)) * 512).min(size - at);
        let byte = (dice.below(4) > 0).then(|| 1 + dice.below(255) as u8);
        (at, len, byte)
    };
    (0..25).map(one).collect()
}

fn apply(model: &mut [u8], changes: &[(usize, usize, Option<u8>)]) {
    for (at, len, byte) in changes {
        model[*at..at + len].fill(byte.unwrap_or(0));
    }
}

fn by_qemu(path: &str, changes: &[(usize, usize, Option<u8>)]) {
    let command = |(at, len, byte): &(usize, usize, Option<u8>)| match byte {
        Some(byte) => format!("write -P {byte} {at} {len}"),
        // Zero clusters, some of them without their space.
        None if at % 1024 == 0 => format!("write -zu {at} {len}"),
        None => format!("write -z {at} {len}"),
    };
    let commands: Vec<String> = changes.iter().map(command).collect();
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for c in &commands {
        args.extend(["-c", c]);
    }
    args.push(path);
    qemu("qemu-io", &args);
}

fn by_ftvm(image: &dyn Image, changes: &[(usize, usize, Option<u8>)]) {
    for (at, len, byte) in changes {
        match byte {
            Some(byte) => image.write_at(*at as u64, &vec![*byte; *len]).unwrap(),
            None => image.write_zeroes(*at as u64, *len as u64, at % 1024 == 0).unwrap(),
        }
    }
}

/// What ftvm reads is the model.
fn read(path: &Path, model: &[u8], row: &str) {
    let image = open(path, &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
    assert_eq!(image.size(), model.len() as u64, "{row}");
    let mut got = vec![0; model.len()];
    image.read_at(0, &mut got).unwrap();
    assert!(got == model, "{row}: ftvm reads something else");
}

/// `qemu-img check`, `compare` and `map` have nothing to say against it; qcow2-rs reads the same.
fn judge(path: &Path, model: &[u8], row: &Row, second: Option<&Path>) {
    let (p, raw) = (path.to_str().unwrap(), path.with_extension("raw"));
    qemu("qemu-img", &["check", p]);
    qemu("qemu-img", &["map", "--output=json", p]);
    std::fs::write(&raw, model).unwrap();
    qemu("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", p, raw.to_str().unwrap()]);
    if let Some(reader) = second.filter(|_| row.second) {
        // It does not know that a file may end within its last cluster.
        let (out, padded) = (path.with_extension("second"), path.with_extension("padded"));
        std::fs::copy(path, &padded).unwrap();
        let file = std::fs::File::options().write(true).open(&padded).unwrap();
        file.set_len(file.metadata().unwrap().len().next_multiple_of(2 << 20)).unwrap();
        let [reader, from, to] = [reader, &padded, &out].map(|p| p.to_str().unwrap());
        qemu("timeout", &["20", reader, from, to]);
        assert!(std::fs::read(out).unwrap() == model, "{}: qcow2-rs reads something else", row.name);
    }
}

/// `build/second-reader`, which `make test` builds.
fn second_reader() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/second-reader/release/second-reader");
    if !path.exists() {
        eprintln!("without qcow2-rs: cargo build --release --manifest-path tests/second-reader/Cargo.toml --target-dir build/second-reader");
        return None;
    }
    Some(path)
}

fn serve(row: &Row, dir: &Path, second: Option<&Path>) {
    let path = dir.join("image.qcow2");
    let (p, d) = (path.to_str().unwrap(), dir.to_str().unwrap());
    let options = row.options.replace("DIR", d);
    let mut dice = Dice(0x5EED + row.name.len() as u64);
    let mut model = vec![0u8; SIZE];
    let size = SIZE.to_string();
    let over = row.kind == Kind::Backing || row.name == "another size, backing image";
    if over || matches!(row.kind, Kind::Chain | Kind::Compressed) {
        model = (0..SIZE).map(|i| (i / 3000) as u8 | 1).collect();
    }
    let (base, middle) = (dir.join("base.raw"), dir.join("middle.qcow2"));
    std::fs::write(&base, &model).unwrap();
    let (b, m) = (base.to_str().unwrap(), middle.to_str().unwrap());
    let make = |extra: &[&str], to: &str| {
        qemu("qemu-img", &[&["create", "-q", "-f", "qcow2", "-o", &options], extra, &[to, &size]].concat());
    };
    match row.kind {
        _ if over => make(&["-b", b, "-F", "raw"], p),
        Kind::Chain => {
            make(&["-b", b, "-F", "raw"], m);
            let layer = changes(SIZE, &mut dice);
            by_qemu(m, &layer);
            apply(&mut model, &layer);
            make(&["-b", m, "-F", "qcow2"], p);
        }
        Kind::Compressed => {
            qemu("qemu-img", &["convert", "-q", "-c", "-O", "qcow2", "-o", &options, b, p]);
        }
        _ => make(&[], p),
    }
    // QEMU writes, ftvm reads.
    let theirs = changes(SIZE, &mut dice);
    by_qemu(p, &theirs);
    apply(&mut model, &theirs);
    read(&path, &model, row.name);
    // ftvm writes, QEMU checks.
    let rw = OpenOptions { discard: true, ..OpenOptions::default() };
    let ours = changes(SIZE, &mut dice);
    let image = open(&path, &rw).unwrap();
    by_ftvm(image.as_ref(), &ours);
    apply(&mut model, &ours);
    image.flush().unwrap();
    drop(image);
    judge(&path, &model, row, second);
    match row.kind {
        Kind::Snapshots => {
            // Made by each and applied and deleted by the other.
            open(&path, &rw).unwrap().snapshot(&SnapshotChange::Create(Snapshot::new("ours", 0))).unwrap();
            let first = model.clone();
            let more = changes(SIZE, &mut dice);
            by_qemu(p, &more);
            apply(&mut model, &more);
            qemu("qemu-img", &["snapshot", "-c", "theirs", p]);
            let second_state = model.clone();
            let image = open(&path, &rw).unwrap();
            by_ftvm(image.as_ref(), &changes(SIZE, &mut dice));
            image.snapshot(&SnapshotChange::Apply("theirs".into())).unwrap();
            image.snapshot(&SnapshotChange::Delete { id: None, name: Some("theirs".into()) }).unwrap();
            drop(image);
            judge(&path, &second_state, row, second);
            qemu("qemu-img", &["snapshot", "-a", "ours", p]);
            read(&path, &first, row.name);
            qemu("qemu-img", &["snapshot", "-d", "ours", p]);
            judge(&path, &first, row, second);
        }
        Kind::Resize => {
            for (n, size) in [SIZE + (9 << 20), SIZE - (1 << 20) - 512, SIZE + 4096].into_iter().enumerate() {
                if n % 2 == 0 {
                    open(&path, &rw).unwrap().resize(size as u64).unwrap();
                } else {
                    qemu("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", p, &size.to_string()]);
                }
                model.resize(size, 0);
                read(&path, &model, row.name);
                judge(&path, &model, row, second);
            }
        }
        _ => {}
    }
}

#[test]
fn every_row_of_the_table() {
    let dir = std::env::temp_dir().join(format!("ftvm-features-{}", std::process::id()));
    let second = second_reader();
    for row in ROWS {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        serve(row, &dir, second.as_deref());
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// What is encrypted is not served without its secret, nor by the old method at all.
#[test]
fn encrypted_images_are_refused_with_the_reason() {
    let dir = std::env::temp_dir().join(format!("ftvm-refused-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (inside, whole) = (dir.join("inside.qcow2"), dir.join("whole.luks"));
    let says = |path: &Path, format: Option<&str>| {
        let options = OpenOptions { format: format.map(str::to_owned), ..OpenOptions::default() };
        open(path, &options).err().map(|e| e.to_string()).unwrap_or_default()
    };
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", inside.to_str().unwrap(), "1M"]);
    let mut raw = std::fs::read(&inside).unwrap();
    raw[32..36].copy_from_slice(&u32::to_be_bytes(1));
    std::fs::write(&inside, &raw).unwrap();
    let aes = "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators";
    assert!(says(&inside, None).ends_with(aes), "{}", says(&inside, None));
    for (path, format) in [(&inside, "qcow2"), (&whole, "luks")] {
        let options = match format {
            "luks" => "key-secret=s,iter-time=10",
            _ => "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        };
        let path = path.to_str().unwrap();
        let secret = "secret,id=s,data=word";
        let arguments = ["create", "-q", "--object", secret, "-f", format, "-o", options, path, "1M"];
        // Where processor time is counted coarsely, it now and then cannot measure its own key derivation.
        let made =
            (0..50).any(|_| Command::new("qemu-img").args(arguments).status().is_ok_and(|s| s.success()));
        assert!(made, "qemu-img does not make {path}");
    }
    for (path, format) in [(&inside, None), (&whole, Some("luks"))] {
        assert!(says(path, format).contains("secret"), "{}", says(path, format));
    }
    // As raw it is what the guest may decrypt itself.
    assert_eq!(says(&whole, Some("raw")), "");
    std::fs::remove_dir_all(dir).unwrap();
}

/// The rows of `block/README.md` are these.
#[test]
fn the_readme_has_the_table() {
    let text = include_str!("../README.md");
    let shown: Vec<&str> = text
        .lines()
        .skip_while(|l| !l.starts_with("|---"))
        .skip(1)
        .take_while(|l| l.starts_with('|'))
        .collect();
    let rows: Vec<String> = ROWS
        .iter()
        .map(|r| {
            let options = if r.options.is_empty() { String::new() } else { format!("`{}`", r.options) };
            format!("| {} | {options} | yes | yes | {} |", r.name, if r.second { "yes" } else { "" })
        })
        .collect();
    assert!(shown == rows, "the table is to be:\n{}", rows.join("\n"));
}
