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

/// A text encrypted by AES-256-CBC under a key of 32 characters, and the initial vector, both in base64.
pub fn openssl_hidden(key: &str, text: &str, file: &str) -> Result<(String, String)> {
    std::fs::write(file, text).map_err(|e| e.to_string())?;
    let hex: String = key.bytes().map(|b| format!("{b:02x}")).collect();
    let iv = "00".repeat(16);
    let hidden = run("openssl", &["enc", "-aes-256-cbc", "-a", "-A", "-K", &hex, "-iv", &iv, "-in", file])?;
    Ok((hidden, "AAAAAAAAAAAAAAAAAAAAAA==".into()))
}
