//! Encrypted images, ftvm on one side and QEMU on the other: the table in `block/README.md`.

use std::path::Path;
use std::process::Command;

use ftvm_block::crypto::{secrets, LuksOptions};
use ftvm_block::qcow2::{self, CreateOptions, Preallocation};
use ftvm_block::takeover::Takeover;
use ftvm_block::{open, raw, Image, OpenOptions, Snapshot, SnapshotChange};

const SIZE: u64 = 3 << 20;
const SECRET: &str = "a passphrase, with a comma";

struct Row {
    name: &'static str,
    format: &'static str,
    /// `qemu-img create -o`, without `encrypt.`
    luks: &'static str,
    /// The same, of qcow2.
    options: &'static str,
}

const fn row(name: &'static str, format: &'static str, luks: &'static str, options: &'static str) -> Row {
    Row { name, format, luks, options }
}

const ROWS: &[Row] = &[
    row("luks", "luks", "", ""),
    row("luks, aes-128 xts", "luks", "cipher-alg=aes-128", ""),
    row("luks, xts-plain", "luks", "ivgen-alg=plain", ""),
    row(
        "luks, aes-256 cbc-essiv, sha1",
        "luks",
        "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
        "",
    ),
    row(
        "luks, aes-128 cbc-plain64, sha512",
        "luks",
        "cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha512",
        "",
    ),
    row("luks, serpent-256 xts", "luks", "cipher-alg=serpent-256", ""),
    row("luks, twofish-256 xts", "luks", "cipher-alg=twofish-256", ""),
    row("luks, ripemd160", "luks", "hash-alg=ripemd160", ""),
    row("qcow2", "qcow2", "", ""),
    row(
        "qcow2, cbc-essiv, sha512",
        "qcow2",
        "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
        "",
    ),
    row("qcow2, clusters of 512 bytes", "qcow2", "", "cluster_size=512"),
    row("qcow2, clusters of 2 MiB", "qcow2", "", "cluster_size=2M"),
    row("qcow2, version 2", "qcow2", "", "compat=0.10"),
    row("qcow2, extended L2", "qcow2", "", "extended_l2=on,cluster_size=32K"),
    row("qcow2, external data file", "qcow2", "", "data_file=DIR/data"),
    row("qcow2, lazy reference counts", "qcow2", "", "lazy_refcounts=on"),
    row("qcow2, preallocated, full", "qcow2", "", "preallocation=full"),
];

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).output().expect("qemu-utils");
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() {
        Ok(text)
    } else {
        Err(text)
    }
}

fn object(secret: &str) -> String {
    format!("secret,id=s,data={}", secret.replace(',', ",,"))
}

fn image_opts(path: &str, format: &str) -> String {
    let prefix = if format == "qcow2" { "encrypt." } else { "" };
    format!("driver={format},{prefix}key-secret=s,file.driver=file,file.filename={path}")
}

/// QEMU's tool on the image that is encrypted.
fn qemu(program: &str, args: &[&str], path: &str, format: &str) -> Result<String, String> {
    let (object, image) = (object(SECRET), image_opts(path, format));
    let (first, rest): (&[&str], &[&str]) =
        if program == "qemu-img" { args.split_at(1) } else { (&[], args) };
    run(program, &[first, &["--object", &object, "--image-opts"], rest, &[&image]].concat())
}

fn options(format: &str) -> OpenOptions {
    OpenOptions { format: Some(format.into()), key_secret: Some("s".into()), ..OpenOptions::default() }
}

/// Where QEMU and ftvm write, and what.
fn by_qemu(path: &str, format: &str, model: &mut [u8]) {
    let mut commands = Vec::new();
    for (at, len, byte) in
        [(0usize, 4096usize, 0x11u8), (70_000 / 512 * 512, 150_016, 0x22), (SIZE as usize - 512, 512, 0x33)]
    {
        commands.push(format!("write -P {byte} {at} {len}"));
        model[at..at + len].fill(byte);
    }
    commands.push("write -z 128K 64K".into());
    model[128 << 10..192 << 10].fill(0);
    let commands: Vec<&str> = commands.iter().flat_map(|c| ["-c", c.as_str()]).collect();
    qemu("qemu-io", &commands, path, format).unwrap();
}

fn by_ftvm(image: &dyn Image, model: &mut [u8]) {
    for (at, len, byte) in [(512usize, 1024usize, 0x44u8), (1 << 20, 200_192, 0x55), (2 << 20, 512, 0x66)] {
        image.write_at(at as u64, &vec![byte; len]).unwrap();
        model[at..at + len].fill(byte);
    }
    image.write_zeroes(65536, 65536, true).unwrap();
    model[65536..131_072].fill(0);
    image.flush().unwrap();
}

fn read(path: &str, format: &str, model: &[u8], row: &str) {
    let image = open(Path::new(path), &OpenOptions { read_only: true, ..options(format) }).unwrap();
    assert_eq!(image.size(), model.len() as u64, "{row}");
    let mut got = vec![0; model.len()];
    image.read_at(0, &mut got).unwrap();
    assert!(got == model, "{row}: ftvm reads something else");
    // A part of a sector, too.
    image.read_at(1021, &mut got[..10]).unwrap();
    assert_eq!(got[..10], model[1021..1031], "{row}");
}

fn judge(path: &str, format: &str, model: &[u8], row: &str) {
    if format == "qcow2" {
        qemu("qemu-img", &["check"], path, format).unwrap_or_else(|e| panic!("{row}: {e}"));
    }
    let plain = format!("{path}.plain");
    std::fs::write(&plain, model).unwrap();
    let right = format!("driver=raw,file.driver=file,file.filename={plain}");
    qemu("qemu-img", &["compare", &right], path, format).unwrap_or_else(|e| panic!("{row}: {e}"));
    // What lies in the file is not the data.
    let all = std::fs::read(path).unwrap();
    assert!(!all.windows(512).any(|w| w == [0x55; 512]), "{row}: the file has the data as it is");
}

fn wrong_passphrase(path: &str, format: &str) {
    let theirs = run(
        "qemu-io",
        &["--object", &object("wrong"), "--image-opts", &image_opts(path, format), "-c", "read 0 512"],
    );
    let theirs = theirs.unwrap_err();
    secrets::keep("wrong", b"wrong".to_vec());
    for (secret, text) in [
        (Some("wrong"), "Invalid password, cannot unlock any keyslot"),
        (Some("absent"), "No secret with id 'absent'"),
        (None, "key-secret' is required for cipher"),
    ] {
        let options = OpenOptions { key_secret: secret.map(str::to_owned), ..options(format) };
        let ours = open(Path::new(path), &options).err().unwrap().to_string();
        assert!(ours.contains(text), "{ours}");
        assert!(secret != Some("wrong") || theirs.contains(text), "{theirs}");
    }
}

fn dir(name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("ftvm-luks-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    secrets::keep("s", SECRET.as_bytes().to_vec());
    dir
}

#[test]
fn what_qemu_makes() {
    let dir = dir("theirs");
    let d = dir.to_str().unwrap();
    // qemu-img measures the host for seconds before it makes an image: the short form has every fourth row.
    let step = if std::env::var_os("FTVM_LONG").is_some_and(|v| v != "0") { 1 } else { 4 };
    for row in ROWS.iter().step_by(step) {
        let path = format!("{d}/image");
        let _ = std::fs::remove_file(format!("{d}/data"));
        let _ = std::fs::remove_file(&path);
        let prefix = if row.format == "qcow2" { "encrypt." } else { "" };
        let mut all: Vec<String> = vec![format!("{prefix}key-secret=s"), format!("{prefix}iter-time=10")];
        all.extend(row.luks.split(',').filter(|o| !o.is_empty()).map(|o| format!("{prefix}{o}")));
        all.extend(row.options.split(',').filter(|o| !o.is_empty()).map(|o| o.replace("DIR", d)));
        if row.format == "qcow2" {
            all.insert(0, "encrypt.format=luks".into());
        }
        let (object, all, size) = (object(SECRET), all.join(","), SIZE.to_string());
        let make = || {
            run(
                "qemu-img",
                &["create", "-q", "--object", &object, "-f", row.format, "-o", &all, &path, &size],
            )
        };
        // It asks the kernel for its own processor time, which here and there is nothing.
        let made = (0..50)
            .map(|_| make())
            .find(|m| m.as_ref().err().is_none_or(|e| !e.contains("accurate CPU usage")));
        let made = made.expect("QEMU's clock stands still");
        match made {
            Err(e) if e.contains("not supported") => {
                println!("{}: QEMU here has not got it", row.name);
                continue;
            }
            other => drop(other.unwrap_or_else(|e| panic!("{}: {e}", row.name))),
        }
        let mut model = vec![0; SIZE as usize];
        if row.format == "luks" || row.options.contains("preallocation") {
            // What QEMU leaves as zeroes in the file is decrypted to something else.
            qemu("qemu-io", &["-c", "write -z 0 3M"], &path, row.format).unwrap();
        }
        by_qemu(&path, row.format, &mut model);
        read(&path, row.format, &model, row.name);
        by_ftvm(open(Path::new(&path), &options(row.format)).unwrap().as_ref(), &mut model);
        judge(&path, row.format, &model, row.name);
        read(&path, row.format, &model, row.name);
        wrong_passphrase(&path, row.format);
        println!("{}: yes", row.name);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn what_ftvm_makes() {
    let dir = dir("ours");
    let quick = LuksOptions { milliseconds: 10, ..LuksOptions::default() };
    let essiv =
        LuksOptions { mode: "cbc".into(), generator: "essiv".into(), hash: "sha1".into(), ..quick.clone() };
    for (n, luks) in [quick, essiv].into_iter().enumerate() {
        let path = dir.join(format!("{n}.luks"));
        let p = path.to_str().unwrap();
        std::fs::write(&path, b"").unwrap();
        raw::format_luks(&path, SIZE, &luks, "s").unwrap();
        qemu("qemu-io", &["-c", "write -z 0 3M"], p, "luks").unwrap();
        let mut model = vec![0; SIZE as usize];
        by_ftvm(open(&path, &options("luks")).unwrap().as_ref(), &mut model);
        by_qemu(p, "luks", &mut model);
        read(p, "luks", &model, "luks");
        judge(p, "luks", &model, "luks");
        for preallocation in [Preallocation::Off, Preallocation::Full] {
            let path = dir.join(format!("{n}.{preallocation:?}.qcow2"));
            let p = path.to_str().unwrap();
            let mut options_of = CreateOptions { preallocation, ..CreateOptions::new(SIZE) };
            options_of.encrypt(&luks, "s").unwrap();
            qcow2::create(&path, &options_of).unwrap();
            let mut model = vec![0; SIZE as usize];
            by_ftvm(open(&path, &options("qcow2")).unwrap().as_ref(), &mut model);
            by_qemu(p, "qcow2", &mut model);
            read(p, "qcow2", &model, "qcow2");
            judge(p, "qcow2", &model, "qcow2");
            let info = qemu("qemu-img", &["info"], p, "qcow2").unwrap();
            assert!(info.contains("encrypted: yes") && info.contains("cipher alg: aes-256"), "{info}");
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// Snapshots, another size, and what a takeover leaves are encrypted as the image is.
#[test]
fn snapshots_sizes_and_takeovers() {
    let dir = dir("more");
    for format in ["qcow2", "luks"] {
        let path = dir.join(format);
        let p = path.to_str().unwrap();
        let luks = LuksOptions { milliseconds: 10, ..LuksOptions::default() };
        if format == "qcow2" {
            let mut options_of = CreateOptions::new(SIZE);
            options_of.encrypt(&luks, "s").unwrap();
            qcow2::create(&path, &options_of).unwrap();
        } else {
            std::fs::write(&path, b"").unwrap();
            raw::format_luks(&path, SIZE, &luks, "s").unwrap();
            open(&path, &options(format)).unwrap().write_zeroes(0, SIZE, false).unwrap();
        }
        let mut model = vec![0; SIZE as usize];
        let old = Takeover::open(&path, &options(format), false).unwrap();
        by_ftvm(&old, &mut model);
        if format == "qcow2" {
            old.snapshot(&SnapshotChange::Create(Snapshot::new("before", 0))).unwrap();
            old.write_at(1 << 20, &[0x77; 4096]).unwrap();
            old.snapshot(&SnapshotChange::Apply("before".into())).unwrap();
        }
        old.resize(SIZE + 65536).unwrap();
        model.resize(SIZE as usize + 65536, 0);
        // It is held still: the other side works on an overlay.
        let new = Takeover::open(&path, &options(format), true).unwrap();
        new.write_at(4096, &[0x55; 8192]).unwrap();
        model[4096..12288].fill(0x55);
        new.flush().unwrap();
        let overlay = dir.join(format!("{format}.ft1"));
        let all = std::fs::read(&overlay).unwrap();
        assert!(!all.windows(512).any(|w| w == [0x55; 512]), "{format}: the overlay has the data as it is");
        let wrong = OpenOptions { key_secret: None, format: Some("qcow2".into()), ..options(format) };
        assert!(open(&overlay, &OpenOptions { locking: false, ..wrong }).is_err());
        drop(old);
        while new.background() {}
        assert!(!overlay.exists());
        drop(new);
        read(p, format, &model, format);
        judge(p, format, &model, format);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn encrypted_secrets() {
    let key = [7u8; 32];
    let dir = dir("secret");
    let (plain, hidden) = (dir.join("plain"), dir.join("hidden"));
    std::fs::write(&plain, SECRET).unwrap();
    let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let iv = [9u8; 16];
    run(
        "openssl",
        &[
            "enc",
            "-aes-256-cbc",
            "-K",
            &hex(&key),
            "-iv",
            &hex(&iv),
            "-in",
            plain.to_str().unwrap(),
            "-out",
            hidden.to_str().unwrap(),
        ],
    )
    .unwrap();
    let hidden = std::fs::read(hidden).unwrap();
    assert_eq!(secrets::decrypt(hidden.clone(), &key, &iv).unwrap(), SECRET.as_bytes());
    assert!(secrets::decrypt(hidden.clone(), &[8; 32], &iv).is_err() || hidden.is_empty());
    assert!(secrets::decrypt(hidden.clone(), &key[..31], &iv)
        .unwrap_err()
        .contains("Key should be 32 bytes"));
    assert!(secrets::decrypt(hidden, &key, &iv[1..]).unwrap_err().contains("IV should be 16 bytes"));
    std::fs::remove_dir_all(dir).unwrap();
}
