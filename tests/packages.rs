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
    println!("lintian: {made}");
    let deb = root().join(made.lines().next().unwrap_or_default());
    let text = script("rpm.sh")?;
    println!("rpmlint: {text}");
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
    let tree = Tree(clean.clone());
    run("mount", &["-t", "proc", "proc", &format!("{clean}/proc")])?;
    use_installed(&clean, "dpkg -r ftvm")?;
    inside(
        "! command -v ftvm; test ! -e /usr/share/man/man1/ftvm.1.gz; test -e /etc/ftvm/machines/web.conf",
    )?;

    // The RPM, in the same root: rpm's own dependencies cannot be had on Debian, its scripts and files can be tried.
    let file = text.lines().find(|l| l.starts_with("build/ftvm-")).unwrap_or_default().to_owned();
    let rpm = root().join(file).display().to_string();
    let db = ["--root", &clean, "--dbpath", "/var/lib/rpm-test"];
    let rpm_run = |args: &[&str]| run("rpm", &[&db[..], args].concat());
    rpm_run(&["-i", "--nodeps", "--ignorearch", &rpm])?;
    rpm_run(&["-V", "--nodeps", "ftvm"])?;
    let erase = format!("rpm --root {clean} --dbpath /var/lib/rpm-test -e ftvm");
    use_installed(&clean, &erase)?;
    inside("! command -v ftvm; test -e /etc/ftvm/machines/web.conf")?;
    drop(tree);
    Ok(())
}

/// Unmounts what was mounted in a root.
struct Tree(String);

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = run("umount", &[&format!("{}/proc", self.0)]);
    }
}

/// The README's commands with the installed programs in a root: certificates, a service on a bus, a machine that is defined,
/// started and protected. The package cannot be removed while it runs, and can afterwards.
fn use_installed(clean: &str, remove: &str) -> Result<()> {
    use ftvm_harness::service::{bus, Process};
    use ftvm_harness::wait_for;
    let inside = |command: &str| run("chroot", &[clean, "sh", "-ec", command]);
    let remove = || match remove.strip_prefix("rpm ") {
        Some(args) => run("rpm", &args.split(' ').collect::<Vec<_>>()),
        None => inside(remove),
    };
    inside("ftvm -version; ftctl --version; ftvm-lock --help; rm -rf /ca; ftctl cert ca --dir /ca; ftctl cert host hostA --dir /ca")?;
    // /run is the host's business: tmpfiles.d says what is to be there.
    std::fs::create_dir_all(format!("{clean}/run")).map_err(|e| e.to_string())?;
    let _bus = Process(bus(&format!("{clean}/run"), "system")?);
    let service = std::process::Command::new("chroot")
        .args([clean, "env", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/bus", "ftvmd"])
        .spawn()
        .map_err(|e| e.to_string())?;
    let service = Process(service);
    let definition = "-m 192\n-kernel /vmlinuz\n-initrd /initrd\n-append console=ttyS0 quiet\n-nic none\n\
                      -serial file:/web.console\n-display none\n";
    std::fs::write(format!("{clean}/web.conf"), definition).map_err(|e| e.to_string())?;
    let ftctl = |args: &str| inside(&format!("DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/bus ftctl {args}"));
    wait_for("the service", LONG, || ftctl("list").ok())?;
    ftctl("define web /web.conf")?;
    ftctl("start web")?;
    ftctl("protect web --lock /web.lock")?;
    let ready = || {
        std::fs::read_to_string(format!("{clean}/web.console"))
            .ok()?
            .contains("tiny guest ready")
            .then_some(())
    };
    wait_for("the guest", LONG, ready)?;
    let status = ftctl("status web")?;
    assert!(status.contains("running") && status.contains("unprotected"), "{status}");
    let check = ftctl("check --lock-dir / --port 8190")?;
    assert!(!check.contains("WRONG"), "{check}");
    let refused = remove().expect_err("a machine runs");
    assert!(refused.contains("shut it down, or move it away"), "{refused}");
    inside("command -v ftvm")?;
    ftctl("destroy web")?;
    drop(service);
    remove()?;
    let left = inside("for exe in /proc/[0-9]*/exe; do readlink $exe || true; done")?;
    assert!(!left.lines().any(|l| l.starts_with("/usr/bin/ft") || l.starts_with("/usr/sbin/ft")), "{left}");
    Ok(())
}
