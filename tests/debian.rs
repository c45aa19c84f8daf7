//! An unmodified Debian 12 from its qcow2 image, to a login, a shell, and off by the power button.
//!
//! One way of booting runs always; `FTVM_LONG=1` runs them all.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;

use common::*;
use ftvm_harness::client::{get, Client};
use ftvm_harness::guests::{debian, root, run};
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::Value;

/// The first serial line, as a socket.
struct Terminal {
    stream: UnixStream,
    seen: std::sync::Arc<std::sync::Mutex<String>>,
}

impl Terminal {
    fn connect(path: &str) -> Result<Terminal> {
        let stream = wait_for("the terminal", LONG, || UnixStream::connect(path).ok())?;
        let mut input = stream.try_clone().map_err(|e| e.to_string())?;
        let seen = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let text = std::sync::Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = std::io::Read::read(&mut input, &mut buffer) {
                if let Ok(mut t) = text.lock() {
                    t.push_str(&String::from_utf8_lossy(&buffer[..n]));
                }
            }
        });
        Ok(Terminal { stream, seen })
    }

    fn text(&self) -> String {
        self.seen.lock().map(|t| t.clone()).unwrap_or_default()
    }

    fn wait(&self, mark: &str) -> Result<()> {
        let limit = 3 * LONG;
        wait_for(&format!("'{mark}'"), limit, || self.text().contains(mark).then_some(())).map_err(|e| {
            let text = self.text();
            let tail: String = text.chars().skip(text.chars().count().saturating_sub(800)).collect();
            format!("{e}\n{tail}")
        })
    }

    fn enter(&mut self, line: &str) -> Result<()> {
        self.stream.write_all(format!("{line}\r").as_bytes()).map_err(|e| e.to_string())
    }
}

/// Boot, log in, use the services, press the power button; `marks` must show on the way.
fn story(name: &str, drive: &str, nic: &str, more: &[&str], generic: bool, marks: &[&str]) -> Result<()> {
    let scratch = Scratch::new(name)?;
    let (image, serial) = (scratch.path("vm.qcow2"), scratch.path("serial"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &debian()?, &image])?;
    let (tcp, http) = (free_port()?, free_port()?);
    let nic = format!("user,{nic}hostfwd=tcp:{tcp}-:7000,hostfwd=tcp:{http}-:80");
    let started = std::time::Instant::now();
    let drive = format!("file={image},{drive}");
    let qmp = scratch.path("qmp");
    let mut child = Guard(
        ftvm()
            .args(["-m", "1G", "-nographic", "-monitor", "none", "-drive", &drive, "-nic", &nic])
            .args(["-serial", &format!("unix:{serial},server=on,wait=on")])
            .args(["-qmp", &format!("unix:{qmp},server=on,wait=off")])
            .args(more)
            .spawn()
            .map_err(|e| e.to_string())?,
    );
    let mut terminal = Terminal::connect(&serial)?;
    if generic {
        terminal.wait("Debian 12 (generic kernel)")?;
        terminal.stream.write_all(b"\x1b[B").map_err(|e| e.to_string())?;
        std::thread::sleep(std::time::Duration::from_millis(500));
        terminal.enter("")?;
    }
    for mark in marks {
        terminal.wait(mark)?;
    }
    terminal.wait("ftvm-guest login:")?;
    terminal.wait("GUEST READY")?;
    let say = |what: &str| eprintln!("{name}: {what} after {:.1} s", started.elapsed().as_secs_f64());
    say("ready");
    let session = Client::session(None, tcp, std::time::Duration::from_millis(20));
    let journal = Client::journal(None, tcp, "line", std::time::Duration::from_millis(20));
    terminal.enter("root")?;
    terminal.wait("Password:")?;
    terminal.enter("root")?;
    terminal.wait("root@ftvm-guest")?;
    say("logged in");
    terminal.enter("echo sum $((6 * 7)); systemctl is-system-running; sha256sum /bin/bash | wc -c")?;
    terminal.wait("sum 42")?;
    if more.contains(&"max") && std::is_x86_feature_detected!("avx2") {
        // Both processors; and what the C library chooses for it has carried the boot so far.
        terminal.enter("echo avx2 on $(grep -cw avx2 /proc/cpuinfo)")?;
        terminal.wait("avx2 on 2")?;
    }
    assert!(get(http).map_err(|e| e.to_string())?.contains("ftvm guest"));
    for client in [session, journal] {
        let seen = client.finish()?;
        assert!(seen.wrong.is_empty() && seen.answers > 0, "{:?}", seen.wrong);
    }
    say("power button");
    ftvm_harness::qmp::Qmp::connect(&qmp)?.command("system_powerdown", Value::Null)?;
    terminal.wait("Power down")?;
    let status = wait_for("the end", LONG, || child.0.try_wait().ok().flatten())?;
    assert_eq!(status.code(), Some(0));
    run("qemu-img", &["check", &image])?;
    say("off");
    Ok(())
}

struct Guard(std::process::Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn through_seabios_and_grub_on_virtio() -> Result<()> {
    story(
        "debian-virtio",
        "if=virtio",
        "model=virtio,",
        &["-smp", "2", "-cpu", "max"],
        false,
        &["SeaBIOS (version", "Booting from Hard Disk", "Debian 12 (cloud kernel)", "cloud-amd64"],
    )
}

#[test]
fn the_generic_kernel_on_the_ide_disk_with_the_default_network_card() -> Result<()> {
    if !long("the generic kernel's boot from the IDE disk") {
        return Ok(());
    }
    // With the USB controllers that virt-install gives a guest it does not know.
    let marks = [
        "SeaBIOS (version",
        "Debian 12 (generic kernel)",
        "e1000: Intel(R) PRO/1000",
        "ehci-pci 0000:00:0b.7: USB 2.0 started",
        "Product: QEMU USB Tablet",
        "hid-generic",
        "snd_hda_codec_generic hdaudioC0D0: autoconfig",
    ];
    let companion =
        |n: u8, addr| format!("ich9-usb-uhci{n},masterbus=usb.0,firstport={},{addr}", 2 * (n - 1));
    let companions =
        [companion(1, "multifunction=on,addr=b.0"), companion(2, "addr=b.1"), companion(3, "addr=b.2")];
    let mut more = vec!["-device", "ich9-usb-ehci1,id=usb,addr=b.7"];
    companions.iter().for_each(|c| more.extend(["-device", c]));
    more.extend(["-device", "usb-tablet,bus=usb.0,port=1", "-device", "usb-kbd,bus=usb.0,port=4"]);
    more.extend(["-device", "ich9-intel-hda", "-device", "hda-duplex"]);
    story("debian-ide", "if=ide", "", &more, true, &marks)
}

#[test]
fn the_generic_kernel_on_the_ahci_disk_of_a_q35() -> Result<()> {
    if !long("the generic kernel's boot from the AHCI disk of a q35") {
        return Ok(());
    }
    let marks = ["SeaBIOS (version", "Debian 12 (generic kernel)", "ahci 0000:00:1f.2", "QEMU USB Tablet"];
    let more = ["-machine", "q35", "-device", "qemu-xhci", "-device", "usb-tablet"];
    story("debian-ahci", "if=ide", "model=virtio,", &more, true, &marks)
}

#[test]
fn with_kernel_and_initrd_given() -> Result<()> {
    if !long("the boot with -kernel and -initrd") {
        return Ok(());
    }
    debian()?;
    let dir = root().join("build/guests");
    let path = |name: &str| dir.join(name).display().to_string();
    let append = "root=UUID=f7f7f7f7-0000-4000-8000-000000000001 rw console=ttyS0";
    story(
        "debian-kernel",
        "if=ide",
        "model=virtio,",
        &["-kernel", &path("debian-vmlinuz"), "-initrd", &path("debian-initrd"), "-append", append],
        false,
        &["Linux version"],
    )
}
