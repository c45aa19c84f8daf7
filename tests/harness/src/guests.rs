//! The guests that `tests/guests/build.sh` builds.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// The repository's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// The program under test: `FTVM`, or the release build.
pub fn ftvm() -> Result<String> {
    let path = match std::env::var("FTVM") {
        Ok(p) => PathBuf::from(p),
        Err(_) => {
            let target =
                std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
            target.join("release/ftvm")
        }
    };
    if !path.exists() {
        return Err(format!("{} is missing: cargo build --release", path.display()));
    }
    Ok(path.display().to_string())
}

fn built(name: &str, what: &str) -> Result<String> {
    let dir = root().join("build/guests");
    let path = dir.join(name);
    if !path.exists() {
        let status = Command::new(root().join("tests/guests/build.sh"))
            .arg(&dir)
            .arg(what)
            .status()
            .map_err(|e| format!("tests/guests/build.sh: {e}"))?;
        if !status.success() || !path.exists() {
            return Err(format!("the guest '{what}' could not be built"));
        }
    }
    Ok(path.display().to_string())
}

/// Kernel and initramfs of the tiny guest.
pub fn tiny() -> Result<(String, String)> {
    let initrd = built("tiny.cpio.gz", "tiny")?;
    Ok((built("vmlinuz", "tiny")?, initrd))
}

/// The same of the guest with Debian's kernel for all machines: drivers for screens, USB and sound.
pub fn generic() -> Result<(String, String)> {
    let initrd = built("generic.cpio.gz", "generic")?;
    Ok((built("generic-vmlinuz", "generic")?, initrd))
}

/// Whether `qemu-img check` complains of nothing but clusters that are counted and not used.
pub fn only_leaks(complaint: &str) -> bool {
    complaint.contains("waste of disk space, but no harm to data")
}

/// The Debian image (qcow2); copy it before use.
pub fn debian() -> Result<String> {
    built("debian.qcow2", "debian")
}

/// Run a command to its end; its output on failure.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() {
        Ok(text)
    } else {
        Err(format!("{program} {}: {}", args.join(" "), text.trim()))
    }
}

/// `-o` of `qemu-img` for an image of this format that is encrypted with the secret `s`, which is soon tried.
pub fn luks_options(format: &str) -> &'static str {
    match format {
        "luks" => "key-secret=s,iter-time=100",
        _ => "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100",
    }
}

/// Run `qemu-img` to make an encrypted image. It asks the kernel for its own processor time, which on some hosts is nothing now
/// and then, and gives up.
pub fn make_encrypted(args: &[&str]) -> Result<String> {
    let mut said = Err(String::new());
    for _ in 0..20 {
        said = run("qemu-img", args);
        if !said.as_ref().is_err_and(|e| e.contains("CPU usage")) {
            break;
        }
    }
    said
}

/// A text encrypted by AES-256-CBC under a key of 32 characters, and the initial vector, both in base64.
pub fn openssl_hidden(key: &str, text: &str, file: &str) -> Result<(String, String)> {
    std::fs::write(file, text).map_err(|e| e.to_string())?;
    let hex: String = key.bytes().map(|b| format!("{b:02x}")).collect();
    let iv = "00".repeat(16);
    let hidden = run("openssl", &["enc", "-aes-256-cbc", "-a", "-A", "-K", &hex, "-iv", &iv, "-in", file])?;
    Ok((hidden, "AAAAAAAAAAAAAAAAAAAAAA==".into()))
}
