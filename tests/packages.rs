//! The packages: made, found clean by lintian and rpmlint, installed in a clean root, run from there, removed.

mod common;

use std::path::Path;

use common::*;
use ftvm_harness::guests::{root, run, tiny};
use ftvm_harness::{Result, Scratch};

fn script(name: &str) -> Result<String> {
    run(&root().join("packaging").join(name).display().to_string(), &[])
}

/// lintian and rpmlint end with an error if there is a word to say.
#[test]
fn packages_are_made_and_clean() -> Result<()> {
    if !Path::new("/usr/bin/lintian").exists() || !Path::new("/usr/bin/rpmlint").exists() {
        println!("skipped: lintian or rpmlint is not installed");
        return Ok(());
    }
    let made = script("deb.sh")?;
    let deb = root().join(made.lines().next().unwrap_or_default());
    let text = script("rpm.sh")?;
    assert!(text.contains("0 errors, 0 warnings"), "{text}");
    if !long("the installation in a clean Debian root") {
        return Ok(());
    }
    let scratch = Scratch::new("packages")?;
    let clean = scratch.path("root");
    // What the package names as its dependencies, and nothing else; dpkg refuses it if that is not enough.
    let depends = run("dpkg-deb", &["-f", &deb.display().to_string(), "Depends"])?;
    let names: Vec<&str> = depends.split(',').filter_map(|d| d.split_whitespace().next()).collect();
    let include = format!("--include={}", names.join(","));
    run("mmdebstrap", &["--mode=root", "--variant=essential", &include, "bookworm", &clean])?;
    std::fs::copy(&deb, format!("{clean}/ftvm.deb")).map_err(|e| e.to_string())?;
    let (kernel, initrd) = tiny()?;
    std::fs::copy(kernel, format!("{clean}/vmlinuz")).map_err(|e| e.to_string())?;
    std::fs::copy(initrd, format!("{clean}/initrd")).map_err(|e| e.to_string())?;
    let inside = |command: &str| run("chroot", &[&clean, "sh", "-ec", command]);
    inside("dpkg -i /ftvm.deb")?;
    let version = inside("ftvm -version")?;
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let boot = inside(
        "ftvm -m 192 -kernel /vmlinuz -initrd /initrd -append 'console=ttyS0 quiet halt' -nographic -no-reboot \
         -nic none < /dev/null",
    )?;
    assert!(boot.contains("tiny guest ready"), "{boot}");
    inside("dpkg -r ftvm; ! command -v ftvm; test ! -e /usr/share/man/man1/ftvm.1.gz")?;
    Ok(())
}
