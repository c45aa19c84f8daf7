//! libvirt drives ftvm as it drives QEMU: the real libvirtd, virsh, and a guest that is asked what it sees.

mod common;

use std::process::Command;

use common::*;
use ftvm_harness::certs::Authority;
use ftvm_harness::guests::{debian, generic, luks_options, make_encrypted, root, run, tiny};
use ftvm_harness::libvirt::{missing, share, Console, Libvirt};
use ftvm_harness::{wait_for, Result, Scratch};

/// The tiny guest with the modules of what libvirt adds.
fn guest(scratch: &Scratch) -> Result<(String, String)> {
    let (kernel, initrd) = tiny()?;
    let modules = root().join("build/guests/kernel/lib/modules");
    let script = format!(
        "set -e; mkdir -p {0}/extra; cd {0}; cp {1}/*/kernel/drivers/virtio/virtio_balloon.ko \
         {1}/*/kernel/drivers/char/virtio_console.ko {1}/*/kernel/drivers/scsi/sr_mod.ko {1}/*/kernel/drivers/scsi/virtio_scsi.ko \
         {1}/*/kernel/drivers/cdrom/cdrom.ko extra; find extra | cpio -o -H newc --quiet | gzip > {0}.gz",
        scratch.path("overlay"),
        modules.display()
    );
    run("sh", &["-c", &script])?;
    let both = scratch.path("initrd");
    run("sh", &["-c", &format!("cat {initrd} {}.gz > {both} && chmod 644 {both}", scratch.path("overlay"))])?;
    Ok((share(&kernel, &scratch.path("vmlinuz"), 0o644)?, both))
}

fn image(scratch: &Scratch, name: &str, mib: u32) -> Result<String> {
    let path = scratch.path(name);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, &format!("{mib}M")])?;
    run("chmod", &["666", &path])?;
    Ok(path)
}

/// The secret that libvirt has for encrypted disks, and what it protects.
const SECRET: &str = "5eb5eb5e-0000-4000-8000-000000000001";
const PASSPHRASE: &str = "only libvirt knows";

/// An image that is encrypted, and `<source>` of the disk: the format that is named is the one under the encryption.
fn encrypted_image(scratch: &Scratch, name: &str, format: &str, mib: u32) -> Result<(String, String)> {
    let (path, size) = (scratch.path(name), format!("{mib}M"));
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    make_encrypted(&[
        "create",
        "-q",
        "--object",
        &secret,
        "-f",
        format,
        "-o",
        luks_options(format),
        &path,
        &size,
    ])?;
    run("chmod", &["666", &path])?;
    let driver = if format == "luks" { "raw" } else { format };
    let source = format!(
        "<driver name='qemu' type='{driver}'/><source file='{path}'>
        <encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption></source>"
    );
    Ok((path, source))
}

/// Tell a libvirt the secret.
fn set_secret(v: &Libvirt, scratch: &Scratch, passphrase: &str) -> Result<()> {
    let (xml, value) = (scratch.path("secret.xml"), scratch.path("passphrase"));
    let text = format!(
        "<secret ephemeral='yes' private='yes'><uuid>{SECRET}</uuid><usage type='volume'><volume>v</volume></usage></secret>"
    );
    std::fs::write(&xml, text)
        .and_then(|()| std::fs::write(&value, passphrase))
        .map_err(|e| e.to_string())?;
    v.virsh(&["secret-define", &xml])?;
    v.virsh(&["secret-set-value", SECRET, "--plain", "--file", &value]).map(|_| ())
}

/// Whether the image, which is sound, holds this text, once it is decrypted.
fn decrypted_has(scratch: &Scratch, path: &str, format: &str, text: &str) -> Result<bool> {
    let key = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
    let (from, plain) = (format!("driver={format},{key}=s,file.filename={path}"), scratch.path("plain"));
    let secret = format!("secret,id=s,data={PASSPHRASE}");
    if format == "qcow2" {
        run("qemu-img", &["check", "--object", &secret, "--image-opts", &from])?;
    }
    run("qemu-img", &["convert", "--object", &secret, "--image-opts", &from, "-O", "raw", &plain])?;
    file_has(&plain, text)
}

fn file_has(path: &str, text: &str) -> Result<bool> {
    let data = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    Ok(data.windows(text.len()).any(|w| w == text.as_bytes()))
}

/// A domain as people write it: what libvirt adds by default is there.
fn domain(scratch: &Scratch, name: &str) -> Result<String> {
    let xml = description(scratch, name)?;
    let path = scratch.path(&format!("{name}.xml"));
    std::fs::write(&path, xml).map_err(|e| e.to_string())?;
    Ok(path)
}

/// A domain as virt-install writes it for Debian: a q35 with free ports for what is plugged in later.
/// Its disk is encrypted.
fn q35_description(scratch: &Scratch, name: &str) -> Result<String> {
    let emulator = share(env!("CARGO_BIN_EXE_ftvm"), &scratch.path("ftvm"), 0o755)?;
    let (kernel, initrd) = guest(scratch)?;
    let (_, disk) = encrypted_image(scratch, &format!("{name}.qcow2"), "qcow2", 64)?;
    let ports = "<controller type='pci' model='pcie-root-port'/>".repeat(14);
    Ok(format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>256</memory><vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0</cmdline><boot dev='hd'/></os>
  <features><acpi/><apic/></features>
  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/><timer name='pit' tickpolicy='delay'/>
    <timer name='hpet' present='no'/></clock>
  <pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>{disk}<target dev='vda' bus='virtio'/></disk>
    <controller type='usb' model='qemu-xhci' ports='15'/>
    <controller type='pci' model='pcie-root'/>{ports}
    <interface type='user'><mac address='52:54:00:aa:00:01'/><model type='virtio'/></interface>
    <console type='pty'/>
    <channel type='unix'><source mode='bind'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>"
    ))
}

fn description(scratch: &Scratch, name: &str) -> Result<String> {
    let emulator = share(env!("CARGO_BIN_EXE_ftvm"), &scratch.path("ftvm"), 0o755)?;
    let (kernel, initrd) = guest(scratch)?;
    let disk = image(scratch, &format!("{name}.qcow2"), 64)?;
    let (one, two) = (scratch.path("one.iso"), scratch.path("two.iso"));
    for (path, text) in [(&one, "first disc"), (&two, "second disc")] {
        let mut data = text.as_bytes().to_vec();
        data.resize(1 << 20, 0);
        std::fs::write(path, data).map_err(|e| e.to_string())?;
        run("chmod", &["644", path])?;
    }
    Ok(format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0</cmdline></os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{one}'/>
      <target dev='hdc' bus='ide'/><readonly/></disk>
    <interface type='user'><mac address='52:54:00:aa:00:01'/><model type='virtio'/></interface>
    <serial type='pty'><target port='0'/></serial>
    <console type='pty'><target type='serial' port='0'/></console>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>"
    ))
}

const MODULES: &str =
    "cd /extra; insmod virtio_balloon.ko; insmod virtio_console.ko; insmod cdrom.ko; insmod sr_mod.ko";

/// An agent of a few lines: answers the synchronisation, and a ping.
const AGENT: &str = r#"(exec 3<>$(ls /dev/vport*p1); while read -r l <&3; do case "$l" in *sync*) echo "{\"return\": $(echo "$l" | tr -cd 0-9)}" >&3;; *) echo '{"return": {}}' >&3;; esac; done) &
true"#;

#[test]
fn libvirt_runs_a_domain_on_the_hosts_processor() -> Result<()> {
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let root = nix::unistd::geteuid().is_root();
    let missing = missing().or_else(|| kvm.err().map(|e| format!("/dev/kvm: {e}")));
    if let Some(reason) = missing.or_else(|| (!root).then(|| "only root makes a /dev/kvm of its own".into()))
    {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("libvirtkvm")?;
    let xml = domain(&scratch, "hard")?;
    let text = std::fs::read_to_string(&xml).map_err(|e| e.to_string())?;
    let hard =
        text.replace("type='qemu'", "type='kvm'").replace("<os>", "<cpu mode='host-passthrough'/><os>");
    std::fs::write(&xml, hard).map_err(|e| e.to_string())?;
    let v = Libvirt::start_with_kvm(&scratch)?;
    let emulator = scratch.path("ftvm");
    for (kind, parts) in [
        ("kvm", ["<domain>kvm</domain>", "<mode name='host-passthrough' supported='yes'>", "qemu64</model>"]),
        ("qemu", ["<domain>qemu</domain>", "<mode name='custom' supported='yes'>", "qemu64</model>"]),
    ] {
        let args = ["domcapabilities", "--emulatorbin", &emulator, "--virttype", kind, "--machine", "pc"];
        let caps = v.virsh(&args)?;
        for part in parts {
            assert!(caps.contains(part), "{part} is not in\n{caps}");
        }
    }
    // What libvirt and the emulator think of /dev/kvm agrees: the answers were kept, not asked for again.
    let probes =
        || std::fs::read_to_string(scratch.path("libvirtd.log")).map(|l| l.matches("query-kvm").count());
    let asked = probes().map_err(|e| e.to_string())?;
    v.virsh(&["define", &xml])?;
    v.virsh(&["start", "hard"])?;
    v.wait_state("hard", "running", LONG)?;
    let kvm = v.virsh(&["qemu-monitor-command", "hard", r#"{"execute":"query-kvm"}"#])?;
    assert!(kvm.contains(r#""enabled":true"#), "{kvm}");
    let cpu = v.virsh(&["qemu-monitor-command", "hard", "--hmp", "info registers"])?;
    assert!(cpu.contains("RIP="), "{cpu}");
    v.virsh(&["suspend", "hard"])?;
    v.wait_state("hard", "paused", LONG)?;
    v.virsh(&["resume", "hard"])?;
    v.virsh(&["destroy", "hard"])?;
    // One for the domain's own question, and what it printed itself.
    let later = probes().map_err(|e| e.to_string())?;
    assert!(later <= asked + 8, "{asked} lines of the log about KVM, then {later}");
    Ok(())
}

#[test]
fn libvirt_probes_starts_and_manages_a_pc() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("libvirt")?;
    let xml = domain(&scratch, "one")?;
    let v = Libvirt::start(&scratch)?;
    let emulator = scratch.path("ftvm");

    let caps =
        v.virsh(&["domcapabilities", "--emulatorbin", &emulator, "--virttype", "qemu", "--machine", "pc"])?;
    for part in [
        "<domain>qemu</domain>",
        "<machine>pc-i440fx-7.2</machine>",
        "<value>virtio</value>",
        "qemu64</model>",
    ] {
        assert!(caps.contains(part), "{part} is not in\n{caps}");
    }
    let kvm = v.virsh(&["domcapabilities", "--emulatorbin", &emulator, "--virttype", "kvm"]);
    assert!(kvm.is_err(), "there is no kvm: {kvm:?}");

    v.virsh(&["define", &xml])?;
    let events = scratch.path("events");
    let mut watch = v.watch(&["qemu-monitor-event", "--loop", "--timeout", "120"], &events)?;
    v.virsh(&["start", "one"])?;
    v.wait_state("one", "running", LONG)?;
    let mut console = Console::open(&v, "one")?;
    console.until("tiny guest ready", LONG)?;
    console.until("Enter 'help'", LONG)?;
    let seen = console.run(&format!("{MODULES}; ls /dev/vport1p1 /dev/sr0 /dev/vda"))?;
    assert!(seen.contains("END:0"), "{seen}");

    // Look.
    let stats = v.virsh(&["domstats", "one"])?;
    assert!(
        stats.contains("balloon.current=262144") && stats.contains("block.1.capacity=1048576"),
        "{stats}"
    );
    assert!(v.virsh(&["domblkinfo", "one", "vda"])?.contains("67108864"));
    v.virsh(&["dommemstat", "one", "--period", "1", "--live"])?;
    wait_for("statistics of the guest's memory", LONG, || {
        v.virsh(&["dommemstat", "one"]).ok().filter(|s| s.contains("unused"))
    })?;

    // Stop and go on.
    v.virsh(&["suspend", "one"])?;
    v.wait_state("one", "paused (user)", LONG)?;
    v.virsh(&["resume", "one"])?;
    v.wait_state("one", "running", LONG)?;

    // Memory.
    v.virsh(&["setmem", "one", "160M", "--live"])?;
    let total = |console: &mut Console| console.run("grep MemTotal /proc/meminfo");
    let before = total(&mut console)?;
    wait_for("the balloon", LONG, || {
        v.virsh(&["dommemstat", "one"]).ok().filter(|s| s.contains("actual 163840"))
    })?;
    assert_ne!(before, "", "the guest says nothing");

    // A disk and a network card come and go.
    plug_and_pull(&v, "one", &scratch, &mut console)?;

    // Another disc.
    let disc = |console: &mut Console| console.run("head -c 11 /dev/sr0");
    assert!(disc(&mut console)?.contains("first disc"));
    v.virsh(&["change-media", "one", "hdc", &scratch.path("two.iso"), "--update"])?;
    let second = disc(&mut console)?;
    assert!(second.contains("second disc"), "{second}");
    v.virsh(&["change-media", "one", "hdc", "--eject"])?;
    assert!(disc(&mut console)?.contains("END:1"), "there is still a disc");

    // The agent's channel.
    console.run(AGENT)?;
    wait_for("the agent", LONG, || {
        v.virsh(&["qemu-agent-command", "one", "{\"execute\":\"guest-ping\"}", "--timeout", "5"]).ok()
    })?;

    // Keys reach the guest's keyboard.
    v.virsh(&["send-key", "one", "KEY_A", "KEY_B"])?;
    v.virsh(&["inject-nmi", "one"])?;

    // The human monitor.
    let info = v.virsh(&["qemu-monitor-command", "one", "--hmp", "info status"])?;
    assert!(info.contains("VM status: running"), "{info}");

    // A daemon that comes back finds its domain: two clients, one after the other, on one monitor.
    v.virsh(&["reset", "one"])?;
    console.until("tiny guest ready", LONG)?;
    console.until("Enter 'help'", LONG)?;
    console.run("true")?;

    // The guest powers off, and libvirt sees how.
    let _ = console.run("(sleep 1; poweroff -f) & true");
    v.wait_state("one", "shut off (shutdown)", LONG)?;
    v.virsh(&["undefine", "one"])?;
    let _ = watch.kill();
    let _ = watch.wait();
    let seen = std::fs::read_to_string(&events).unwrap_or_default();
    for event in [
        "RESUME",
        "STOP",
        "DEVICE_DELETED",
        "BALLOON_CHANGE",
        "VSERPORT_CHANGE",
        "DEVICE_TRAY_MOVED",
        "RESET",
        "SHUTDOWN",
    ] {
        assert!(seen.contains(&format!("event {event} ")), "no {event} in\n{seen}");
    }
    let log = std::fs::read_to_string(&v.log).unwrap_or_default();
    assert!(!log.contains("is not what the schema says"), "a reply or event disagrees with the schema");
    let out = Command::new("qemu-img").args(["check", &scratch.path("more.qcow2")]).output();
    assert!(out.is_ok_and(|o| o.status.success()));
    Ok(())
}

/// A screen of virtio's, which the guest's driver takes over, and USB devices that come and go.
#[test]
fn libvirt_gives_a_domain_a_virtio_screen_and_usb_devices() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("libvirt-screen")?;
    let (kernel, initrd) = generic()?;
    let kernel = share(&kernel, &scratch.path("generic-vmlinuz"), 0o644)?;
    let initrd = share(&initrd, &scratch.path("generic-initrd"), 0o644)?;
    let mut xml = description(&scratch, "screen")?;
    for (what, path) in [("kernel", &kernel), ("initrd", &initrd)] {
        let (from, to) = (format!("<{what}>"), format!("</{what}>"));
        let (head, rest) = xml.split_once(&from).ok_or("no kernel in the description")?;
        let (_, tail) = rest.split_once(&to).ok_or("no end of the kernel's name")?;
        xml = format!("{head}{from}{path}{to}{tail}");
    }
    let more = "<video><model type='virtio'/></video><graphics type='vnc' port='-1' autoport='yes'/>
        <controller type='usb' model='qemu-xhci'/></devices>";
    let words = "console=ttyS0 load=virtio-gpu,xhci-pci,usbhid,hid-generic,usb-storage";
    let xml = xml.replace("</devices>", more).replace("console=ttyS0", words);
    let path = scratch.path("screen.xml");
    std::fs::write(&path, xml).map_err(|e| e.to_string())?;
    let v = Libvirt::start(&scratch)?;
    let emulator = scratch.path("ftvm");
    let caps =
        v.virsh(&["domcapabilities", "--emulatorbin", &emulator, "--virttype", "qemu", "--machine", "pc"])?;
    let video = caps.split("<video").nth(1).and_then(|t| t.split("</video>").next()).unwrap_or_default();
    assert!(video.contains("<value>virtio</value>") && video.contains("<value>vga</value>"), "{caps}");
    v.virsh(&["define", &path])?;
    v.virsh(&["start", "screen"])?;
    let mut console = Console::open(&v, "screen")?;
    console.until("tiny guest ready", LONG)?;
    console.until("Enter 'help'", LONG)?;
    let shot = scratch.path("screen.ppm");
    v.virsh(&["screenshot", "screen", "--file", &shot])?;
    let picture = std::fs::read(&shot).map_err(|e| e.to_string())?;
    // PNG or PPM, whatever libvirt asks for.
    let size = match picture.starts_with(b"\x89PNG") {
        true => [16, 20].map(|at| u32::from_be_bytes([0, 1, 2, 3].map(|i| picture[at + i]))),
        false => [1280, if picture.starts_with(b"P6\n1280 800\n") { 800 } else { 0 }],
    };
    assert_eq!(size, [1280, 800]);

    let stick = scratch.path("stick.raw");
    let mut data = b"on the stick".to_vec();
    data.resize(4 << 20, 0);
    std::fs::write(&stick, data).map_err(|e| e.to_string())?;
    run("chmod", &["666", &stick])?;
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{stick}'/>\
         <target dev='sda' bus='usb'/></disk>"
    );
    for (name, device, there, gone) in [
        ("disk.xml", disk.as_str(), "head -c 12 /dev/sda", "on the stick"),
        ("mouse.xml", "<input type='mouse' bus='usb'/>", "cat /proc/bus/input/devices", "QEMU USB Mouse"),
    ] {
        let path = scratch.path(name);
        std::fs::write(&path, device).map_err(|e| e.to_string())?;
        v.virsh(&["attach-device", "screen", &path, "--live"])?;
        wait_for(&format!("{name} in the guest"), LONG, || {
            console.run(there).ok().filter(|s| s.contains(gone))
        })?;
        v.virsh(&["detach-device", "screen", &path, "--live"])?;
        wait_for(&format!("{name} to be gone"), LONG, || {
            console.run(there).ok().filter(|s| !s.contains(gone))
        })?;
        assert!(!v.virsh(&["dumpxml", "screen"])?.contains("stick.raw"));
    }
    v.virsh(&["destroy", "screen"])?;
    let log = std::fs::read_to_string(&v.log).unwrap_or_default();
    assert!(!log.contains("is not what the schema says"), "a reply or event disagrees with the schema");
    Ok(())
}

/// External snapshots, block jobs, limits and sizes through virsh, while the guest uses its disk.
#[test]
fn libvirt_changes_the_images_of_a_running_domain() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("libvirt-blocks")?;
    let xml = domain(&scratch, "blocks")?;
    let v = Libvirt::start(&scratch)?;
    v.virsh(&["define", &xml])?;
    v.virsh(&["start", "blocks"])?;
    v.wait_state("blocks", "running", LONG)?;
    let mut console = Console::open(&v, "blocks")?;
    console.until("tiny guest ready", LONG)?;
    console.until("Enter 'help'", LONG)?;
    // Each step writes a block of its own; all of them must be there at the end.
    let mut marks = 0;
    let mut mark = |console: &mut Console| -> Result<()> {
        marks += 1;
        let write = format!(
            "echo mark {marks} | dd of=/dev/vda bs=64k seek={} conv=sync,fsync 2>/dev/null",
            marks * 7
        );
        console.run(&write).map(|_| ())
    };
    let file = |name: &str| scratch.path(name);
    // The emulator is another user, and libvirt leaves owners alone here.
    for name in ["s1.qcow2", "s2.qcow2", "s3.qcow2", "moved.qcow2"] {
        std::fs::write(file(name), "").map_err(|e| e.to_string())?;
        run("chmod", &["666", &file(name)])?;
    }
    let source = || -> Result<String> {
        let list = v.virsh(&["domblklist", "blocks"])?;
        let line = list.lines().find(|l| l.trim_start().starts_with("vda")).unwrap_or_default();
        Ok(line.split_whitespace().nth(1).unwrap_or_default().to_owned())
    };
    mark(&mut console)?;
    for name in ["s1", "s2"] {
        let spec = format!("vda,snapshot=external,file={}", file(&format!("{name}.qcow2")));
        v.virsh(&[
            "snapshot-create-as",
            "blocks",
            name,
            "--disk-only",
            "--no-metadata",
            "--diskspec",
            &spec,
            "--diskspec",
            "hdc,snapshot=no",
        ])?;
        assert_eq!(source()?, file(&format!("{name}.qcow2")));
        mark(&mut console)?;
    }
    // The two overlays become one, and that goes into the first image.
    v.virsh(&[
        "blockcommit",
        "blocks",
        "vda",
        "--base",
        &file("s1.qcow2"),
        "--top",
        &file("s2.qcow2"),
        "--active",
        "--pivot",
        "--verbose",
    ])?;
    assert_eq!(source()?, file("s1.qcow2"));
    mark(&mut console)?;
    v.virsh(&["blockcommit", "blocks", "vda", "--active", "--pivot", "--verbose"])?;
    assert_eq!(source()?, file("blocks.qcow2"));
    mark(&mut console)?;
    // Another overlay takes everything in; then the disk moves.
    let spec = format!("vda,snapshot=external,file={}", file("s3.qcow2"));
    v.virsh(&[
        "snapshot-create-as",
        "blocks",
        "s3",
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        &spec,
        "--diskspec",
        "hdc,snapshot=no",
    ])?;
    mark(&mut console)?;
    v.virsh(&["blockpull", "blocks", "vda", "--wait", "--verbose"])?;
    let info = run("qemu-img", &["info", "-U", &file("s3.qcow2")])?;
    assert!(!info.contains("backing file"), "{info}");
    mark(&mut console)?;
    v.virsh(&[
        "blockcopy",
        "blocks",
        "vda",
        &file("moved.qcow2"),
        "--transient-job",
        "--wait",
        "--pivot",
        "--verbose",
    ])?;
    assert_eq!(source()?, file("moved.qcow2"));
    mark(&mut console)?;
    // Sizes and limits.
    v.virsh(&["blockresize", "blocks", "vda", "96M"])?;
    assert!(v.virsh(&["domblkinfo", "blocks", "vda"])?.contains("100663296"));
    wait_for("the new size in the guest", LONG, || {
        console.run("cat /sys/block/vda/size").ok().filter(|s| s.contains("196608"))
    })?;
    v.virsh(&["blkdeviotune", "blocks", "vda", "--total-iops-sec", "40", "--live"])?;
    assert!(v.virsh(&["blkdeviotune", "blocks", "vda"])?.contains("total_iops_sec : 40"));
    let timed = console.run(
        "t=$(date +%s); dd if=/dev/vda of=/dev/null bs=4k count=120 iflag=direct 2>/dev/null; echo took $(($(date +%s) - t))",
    )?;
    assert!(!timed.contains("took 0") && !timed.contains("took 1\r"), "{timed}");
    v.virsh(&["blkdeviotune", "blocks", "vda", "--total-iops-sec", "0", "--live"])?;
    let seen = console.run(&format!(
        "echo 3 > /proc/sys/vm/drop_caches; for i in $(seq 1 {marks}); do dd if=/dev/vda bs=64k skip=$((i*7)) count=1 \
         2>/dev/null | head -1; done"
    ))?;
    for i in 1..=marks {
        assert!(seen.contains(&format!("mark {i}")), "mark {i} is lost:\n{seen}");
    }
    v.virsh(&["destroy", "blocks"])?;
    run("qemu-img", &["check", &file("moved.qcow2")])?;
    let log = std::fs::read_to_string(&v.log).unwrap_or_default();
    assert!(!log.contains("is not what the schema says"), "a reply or event disagrees with the schema");
    Ok(())
}

/// Checkpoints and backups: pushed in full and by what changed, and pulled by another program.
#[test]
fn libvirt_backs_a_running_domain_up() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("libvirt-backup")?;
    let xml = domain(&scratch, "kept")?;
    let v = Libvirt::start(&scratch)?;
    run("chmod", &["777", &scratch.0.display().to_string()])?;
    v.virsh(&["define", &xml])?;
    v.virsh(&["start", "kept"])?;
    v.wait_state("kept", "running", LONG)?;
    let mut console = Console::open(&v, "kept")?;
    console.until("Enter 'help'", LONG)?;
    let file = |name: &str| scratch.path(name);
    let disk = file("kept.qcow2");
    let write = |console: &mut Console, at: u32| {
        console
            .run(&format!("dd if=/dev/urandom of=/dev/vda bs=64k seek={at} count=5 conv=fsync 2>/dev/null"))
    };
    // The emulator is another user, and libvirt leaves owners alone here.
    for name in ["full.qcow2", "inc.qcow2", "temporary.qcow2"] {
        image(&scratch, name, 64)?;
    }
    let idle = || {
        wait_for("the end of the backup", LONG, || {
            v.virsh(&["domjobinfo", "kept"]).ok().filter(|s| s.contains("None"))
        })
    };
    let begin = |backup: &str, checkpoint: Option<&str>| -> Result<String> {
        let (b, c) = (file("backup.xml"), file("checkpoint.xml"));
        std::fs::write(&b, backup).map_err(|e| e.to_string())?;
        let mut args = vec!["backup-begin", "kept", "--reuse-external", b.as_str()];
        if let Some(name) = checkpoint {
            let text = format!(
                "<domaincheckpoint><name>{name}</name><disks><disk name='vda' checkpoint='bitmap'/>\
                 <disk name='hdc' checkpoint='no'/></disks></domaincheckpoint>"
            );
            std::fs::write(&c, text).map_err(|e| e.to_string())?;
            args.push(&c);
        }
        v.virsh(&args)
    };
    let push = |target: &str, since: &str| {
        let since =
            if since.is_empty() { String::new() } else { format!("<incremental>{since}</incremental>") };
        format!(
            "<domainbackup mode='push'>{since}<disks><disk name='vda' type='file'><driver type='qcow2'/>\
             <target file='{}'/></disk></disks></domainbackup>",
            file(target)
        )
    };
    write(&mut console, 10)?;
    begin(&push("full.qcow2", ""), Some("c1"))?;
    idle()?;
    write(&mut console, 100)?;
    let spec = ["--diskspec", "vda,checkpoint=bitmap", "--diskspec", "hdc,checkpoint=no"];
    v.virsh(&[&["checkpoint-create-as", "kept", "c2"][..], &spec[..]].concat())?;
    write(&mut console, 200)?;
    let list = v.virsh(&["checkpoint-list", "kept", "--name"])?;
    assert!(list.contains("c1") && list.contains("c2"), "{list}");
    assert!(v.virsh(&["checkpoint-dumpxml", "kept", "c2"])?.contains("bitmap='c2'"));

    // What changed since the first, of a guest that stands still.
    v.virsh(&["suspend", "kept"])?;
    begin(&push("inc.qcow2", "c1"), Some("c3"))?;
    idle()?;
    run("qemu-img", &["rebase", "-u", "-b", &file("full.qcow2"), "-F", "qcow2", &file("inc.qcow2")])?;
    run("qemu-img", &["compare", "-U", &disk, &file("inc.qcow2")])?;
    let map = run("qemu-img", &["map", "--output=json", &file("inc.qcow2")])?;
    let own = map.lines().filter(|l| l.contains("\"depth\": 0") && l.contains("\"data\": true")).count();
    assert!((1..=4).contains(&own), "{map}");

    // Another program pulls what changed since the second, while the guest writes on.
    let moment = file("moment.raw");
    run("qemu-img", &["convert", "-U", "-O", "raw", &disk, &moment])?;
    let socket = file("nbd");
    let pull = format!(
        "<domainbackup mode='pull'><incremental>c2</incremental><server transport='unix' socket='{socket}'/>\
         <disks><disk name='vda' type='file' exportname='disk' exportbitmap='changed'><driver type='qcow2'/>\
         <scratch file='{}'/></disk></disks></domainbackup>",
        file("temporary.qcow2")
    );
    begin(&pull, None)?;
    v.virsh(&["resume", "kept"])?;
    write(&mut console, 10)?;
    write(&mut console, 300)?;
    let url = format!("nbd+unix:///disk?socket={socket}");
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &moment, &url])?;
    run("nbdcopy", &[&url, &file("pulled.raw")])?;
    run("cmp", &[&moment, &file("pulled.raw")])?;
    let changed = run("nbdinfo", &["--map=qemu:dirty-bitmap:changed", &url])?;
    let dirty: Vec<&str> = changed.lines().filter(|l| l.ends_with("dirty")).collect();
    assert!(dirty.len() == 1 && dirty[0].contains("13107200") && dirty[0].contains("327680"), "{changed}");
    v.virsh(&["domjobabort", "kept"])?;
    idle()?;

    // A checkpoint in the middle goes into the one before it.
    v.virsh(&["checkpoint-delete", "kept", "c2"])?;
    for name in ["c1", "c3"] {
        v.virsh(&["checkpoint-delete", "kept", name])?;
    }
    let _ = console.run("(sleep 1; poweroff -f) & true");
    v.wait_state("kept", "shut off (shutdown)", LONG)?;
    let check = run("qemu-img", &["check", &disk])?;
    assert!(check.contains("No errors"), "{check}");
    assert!(!run("qemu-img", &["info", &disk])?.contains("bitmaps:"), "a bitmap is left");
    let log = std::fs::read_to_string(&v.log).unwrap_or_default();
    assert!(!log.contains("is not what the schema says"), "a reply or event disagrees with the schema");
    Ok(())
}

/// A disk and a network card come and go, and the guest sees it.
fn plug_and_pull(v: &Libvirt, name: &str, scratch: &Scratch, console: &mut Console) -> Result<()> {
    let more = image(scratch, "more.qcow2", 32)?;
    v.virsh(&["attach-disk", name, &more, "vdb", "--driver", "qemu", "--subdriver", "qcow2"])?;
    wait_for("the disk in the guest", LONG, || {
        console.run("cat /sys/block/vdb/size").ok().filter(|s| s.contains("65536"))
    })?;
    let wrote = console.run("dd if=/dev/zero of=/dev/vdb bs=1M count=4; sync")?;
    assert!(wrote.contains("END:0"), "{wrote}");
    assert!(v.virsh(&["domblkstat", name, "vdb"])?.contains("wr_bytes 4194304"));
    v.virsh(&["detach-disk", name, "vdb"])?;
    assert!(!v.virsh(&["domblklist", name])?.contains("vdb"));
    assert!(console.run("test -e /dev/vdb")?.contains("END:1"), "the disk is still there");

    let card = scratch.path("card.xml");
    let text = "<interface type='user'><mac address='52:54:00:aa:00:02'/><model type='virtio'/></interface>";
    std::fs::write(&card, text).map_err(|e| e.to_string())?;
    v.virsh(&["attach-device", name, &card])?;
    let has = |console: &mut Console| console.run("grep -l 52:54:00:aa:00:02 /sys/class/net/*/address");
    wait_for("the card in the guest", LONG, || has(console).ok().filter(|s| s.contains("END:0")))?;
    v.virsh(&["detach-device", name, &card])?;
    assert!(!has(console)?.contains("END:0"), "the card is still there");
    Ok(())
}

/// Encrypted disks, of which libvirt keeps the secret, come and go.
fn plug_encrypted(v: &Libvirt, name: &str, scratch: &Scratch, console: &mut Console) -> Result<()> {
    for (format, mib) in [("qcow2", 20), ("luks", 16)] {
        let (disk, source) = encrypted_image(scratch, &format!("plugged.{format}"), format, mib)?;
        let xml = scratch.path("disk.xml");
        let text = format!("<disk type='file' device='disk'>{source}<target dev='vdb' bus='virtio'/></disk>");
        std::fs::write(&xml, text).map_err(|e| e.to_string())?;
        v.virsh(&["attach-device", name, &xml])?;
        let sectors = (mib << 11).to_string();
        wait_for("the encrypted disk in the guest", LONG, || {
            console.run("cat /sys/block/vdb/size").ok().filter(|s| s.contains(&sectors))
        })?;
        let wrote =
            console.run("echo what nobody may read | dd of=/dev/vdb bs=512 seek=9 conv=sync,fsync")?;
        assert!(wrote.contains("END:0"), "{wrote}");
        v.virsh(&["detach-device", name, &xml])?;
        assert!(console.run("test -e /dev/vdb")?.contains("END:1"), "the disk is still there");
        let text = "what nobody may read\n\0";
        assert!(decrypted_has(scratch, &disk, format, text)? && !file_has(&disk, text)?, "{format}");
    }
    Ok(())
}

#[test]
fn libvirt_runs_a_q35_as_virt_install_writes_it() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("libvirt-q35")?;
    let xml = scratch.path("q.xml");
    // With disks on the SCSI bus, too, the first of them encrypted.
    let (luks, source) = encrypted_image(&scratch, "q-scsi.luks", "luks", 48)?;
    let scsi = format!(
        "<disk type='file' device='disk'>{}<target dev='sda' bus='scsi'/><serial>SCSI0</serial></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='scsi'/><readonly/></disk>
    <controller type='scsi' model='virtio-scsi'/><controller type='usb'",
        source.replace("type='raw'", "type='raw' discard='unmap'")
    );
    let description = q35_description(&scratch, "q")?.replacen("<controller type='usb'", &scsi, 1);
    std::fs::write(&xml, description).map_err(|e| e.to_string())?;
    let v = Libvirt::start(&scratch)?;
    v.virsh(&["define", &xml])?;
    set_secret(&v, &scratch, "somebody else's")?;
    let refused = v.virsh(&["start", "q"]).err().unwrap_or_default();
    assert!(refused.contains("Invalid password, cannot unlock any keyslot"), "{refused}");
    set_secret(&v, &scratch, PASSPHRASE)?;
    v.virsh(&["start", "q"])?;
    v.wait_state("q", "running", LONG)?;
    let mut console = Console::open(&v, "q")?;
    console.until("Enter 'help'", LONG)?;
    // The disk is behind a port, and its interrupts are messages.
    let seen = console.run("readlink /sys/block/vda; grep virtio /proc/interrupts; nproc")?;
    assert!(seen.contains("/0000:00:02.") || seen.contains("/0000:00:01."), "{seen}");
    assert!(seen.contains("PCI-MSI") && seen.contains("req.0"), "{seen}");
    let seen =
        console.run("insmod /extra/virtio_balloon.ko; insmod /extra/virtio_console.ko; ls /dev/vport*")?;
    assert!(seen.contains("END:0"), "{seen}");
    console.run("insmod /extra/virtio_scsi.ko; sleep 1")?;
    assert!(console.run("cat /sys/block/sda/size /sys/block/sda/device/vendor")?.contains("98304"));
    assert!(v.virsh(&["domblkinfo", "q", "sda"])?.contains("50331648"));
    let write =
        |d: &str| format!("echo what {d} keeps to itself | dd of=/dev/{d} bs=512 seek=9 conv=sync,fsync");
    for disk in ["vda", "sda"] {
        assert!(console.run(&write(disk))?.contains("END:0"), "{disk}");
    }
    let hot = image(&scratch, "hot.qcow2", 24)?;
    v.virsh(&[
        "attach-disk",
        "q",
        &hot,
        "sdc",
        "--targetbus",
        "scsi",
        "--driver",
        "qemu",
        "--subdriver",
        "qcow2",
    ])?;
    wait_for("the SCSI disk in the guest", LONG, || {
        console.run("cat /sys/block/sd?/size").ok().filter(|s| s.contains("49152"))
    })?;
    v.virsh(&["detach-disk", "q", "sdc"])?;
    wait_for("the SCSI disk to be gone", LONG, || {
        console.run("cat /sys/block/sd?/size").ok().filter(|s| !s.contains("49152"))
    })?;
    plug_and_pull(&v, "q", &scratch, &mut console)?;
    plug_encrypted(&v, "q", &scratch, &mut console)?;
    console.run(AGENT)?;
    wait_for("the agent", LONG, || {
        v.virsh(&["qemu-agent-command", "q", "{\"execute\":\"guest-ping\"}", "--timeout", "5"]).ok()
    })?;
    let tree = v.virsh(&["qemu-monitor-command", "q", "--hmp", "info pci"])?;
    assert!(tree.contains("SATA controller: PCI device 8086:2922"), "{tree}");
    assert!(tree.contains("secondary bus 14.") && tree.contains("Bus  4, device   0, function 0:"), "{tree}");

    // Again from the start, with the slots that were used and are free again.
    v.virsh(&["reset", "q"])?;
    console.until("Enter 'help'", LONG)?;
    assert!(console.run("test -e /dev/vda -a ! -e /dev/vdb")?.contains("END:0"));
    let read = console.run("dd if=/dev/vda bs=512 skip=9 count=1 2>/dev/null")?;
    assert!(read.contains("what vda keeps to itself"), "{read}");
    let _ = console.run("(sleep 1; poweroff -f) & true");
    v.wait_state("q", "shut off (shutdown)", LONG)?;
    for (disk, format, name) in [(scratch.path("q.qcow2"), "qcow2", "vda"), (luks, "luks", "sda")] {
        let text = format!("what {name} keeps to itself\n");
        assert!(decrypted_has(&scratch, &disk, format, &text)? && !file_has(&disk, &text)?, "{name}");
    }
    Ok(())
}

/// The domain with an option of ftvm's own, as the README has it.
fn with_ft(xml: &str, value: &str) -> String {
    let option = format!(
        "<qemu:commandline><qemu:arg value='-ft'/><qemu:arg value='{value}'/></qemu:commandline></domain>"
    );
    xml.replace("</domain>", &option)
        .replace("<memory unit", "<uuid>5b0c5a52-0f3b-4c5e-9a53-3a6c4a1d7e10</uuid><memory unit")
}

#[test]
fn a_pair_of_libvirts_keeps_a_domain_when_one_side_dies() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let (one, two) = (Scratch::new("libvirt-a")?, Scratch::new("libvirt-b")?);
    let xml = q35_description(&one, "pair")?;
    run("chmod", &["777", &one.0.display().to_string()])?;
    let (first, second) = (free_port()?, free_port()?);
    let path = |s: &Scratch| s.path("pair.xml");
    let write = |s: &Scratch, text: String| std::fs::write(path(s), text).map_err(|e| e.to_string());
    write(&one, with_ft(&xml, &format!("primary,listen={first}")))?;
    write(&two, with_ft(&xml, &format!("backup,peer={first},listen={second}")))?;
    let (a, b) = (Libvirt::start(&one)?, Libvirt::start(&two)?);
    run("chmod", &["777", &one.0.display().to_string()])?;
    // Each of them knows the secret, which it gives its own emulator under a key of its own.
    set_secret(&a, &one, PASSPHRASE)?;
    set_secret(&b, &two, PASSPHRASE)?;
    a.virsh(&["define", &path(&one)])?;
    a.virsh(&["start", "pair"])?;
    let mut console = Console::open(&a, "pair")?;
    console.until("Enter 'help'", LONG)?;
    let ft = |v: &Libvirt| {
        v.virsh(&["qemu-monitor-command", "pair", "{\"execute\": \"query-ft\"}"]).unwrap_or_else(|e| e)
    };

    b.virsh(&["define", &path(&two)])?;
    let events = two.path("events");
    let mut watch = b.watch(&["qemu-monitor-event", "--loop", "--timeout", "120"], &events)?;
    b.virsh(&["start", "pair"])?;
    b.wait_state("pair", "running", LONG)?;
    wait_for("protection", LONG, || ft(&a).contains("\"protected\"").then_some(()))?;
    wait_for("the backup", LONG, || ft(&b).contains("\"following\"").then_some(()))?;

    // What is plugged in by libvirt on the primary is there on the backup.
    let more = image(&one, "more.qcow2", 32)?;
    a.virsh(&["attach-disk", "pair", &more, "vdb", "--driver", "qemu", "--subdriver", "qcow2"])?;
    wait_for("the disk in the guest", LONG, || {
        console.run("cat /sys/block/vdb/size").ok().filter(|s| s.contains("65536"))
    })?;
    console.run("export MARK=kept")?;
    let refused = b.virsh(&["suspend", "pair"]);
    assert!(refused.is_err_and(|e| e.contains("this is a backup")), "a backup was suspended");

    console.run("echo before > /dev/vda; sync")?;

    // The first side dies.
    let pid = std::fs::read_to_string(one.path("libvirt1/qemu/pair.pid")).map_err(|e| e.to_string())?;
    run("kill", &["-9", pid.trim()])?;
    wait_for("the takeover", LONG, || ft(&b).contains("\"live\"").then_some(()))?;
    b.wait_state("pair", "running", LONG)?;
    let mut console = Console::open(&b, "pair")?;
    wait_for("the guest's shell", LONG, || console.run("echo $MARK").ok().filter(|s| s.contains("kept")))?;
    let wrote = console.run("dd if=/dev/zero of=/dev/vdb bs=1M count=4; sync")?;
    assert!(wrote.contains("END:0"), "{wrote}");
    wait_for("what the encrypted disk keeps", LONG, || {
        console
            .run("echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/vda")
            .ok()
            .filter(|s| s.contains("before"))
    })?;
    console.run("echo after > /dev/vda; sync")?;
    b.virsh(&["suspend", "pair"])?;
    b.wait_state("pair", "paused", LONG)?;
    b.virsh(&["resume", "pair"])?;
    let _ = console.run("(sleep 1; poweroff -f) & true");
    b.wait_state("pair", "shut off (shutdown)", LONG)?;
    let _ = watch.kill();
    let _ = watch.wait();
    let seen = std::fs::read_to_string(&events).unwrap_or_default();
    assert!(decrypted_has(&two, &one.path("pair.qcow2"), "qcow2", "after\n")?);
    for event in ["FT_STATE_CHANGED", "FT_FAILOVER", "SHUTDOWN"] {
        assert!(seen.contains(&format!("event {event} ")), "no {event} in\n{seen}");
    }
    run("qemu-img", &["check", &more])?;
    Ok(())
}

#[test]
fn libvirt_saves_reverts_and_moves_a_domain() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let (one, two) = (Scratch::new("libvirt-from")?, Scratch::new("libvirt-to")?);
    let xml = one.path("moves.xml");
    std::fs::write(&xml, q35_description(&one, "moves")?).map_err(|e| e.to_string())?;
    let authority = Authority::new("hosts")?;
    for host in [&one, &two] {
        authority.issue(&host.path("tls"), "host.example", &["127.0.0.1", "host.example"])?;
    }
    let (a, b) = (Libvirt::start(&one)?, Libvirt::start(&two)?);
    run("chmod", &["777", &one.0.display().to_string()])?;
    set_secret(&a, &one, PASSPHRASE)?;
    set_secret(&b, &two, PASSPHRASE)?;
    a.virsh(&["define", &xml])?;
    a.virsh(&["start", "moves"])?;
    let mut console = Console::open(&a, "moves")?;
    console.until("Enter 'help'", LONG)?;
    console.run("MARK=first; modprobe virtio_blk; echo $MARK > /dev/vda; sync")?;
    let says = |v: &Libvirt, mark: &str| -> Result<Console> {
        let mut console = Console::open(v, "moves")?;
        let shell = wait_for("the guest's shell", LONG, || console.run("echo is:$MARK").ok());
        let shell = shell?;
        assert!(shell.contains(&format!("is:{mark}")), "{shell}");
        Ok(console)
    };

    // Into a file, and back.
    let file = one.path("state");
    a.virsh(&["save", "moves", &file])?;
    assert!(a.virsh(&["domstate", "moves"])?.starts_with("shut off"));
    a.virsh(&["restore", &file])?;
    a.wait_state("moves", "running", LONG)?;
    says(&a, "first")?;
    a.virsh(&["managedsave", "moves"])?;
    a.virsh(&["start", "moves"])?;
    a.wait_state("moves", "running", LONG)?;
    let mut console = says(&a, "first")?;

    // A core file, by libvirt and by the emulator.
    for (option, magic) in [("--memory-only", &b"\x7FELF"[..]), ("--live", &b"LibvirtQemudSave"[..4])] {
        let dump = one.path("dump");
        a.virsh(&["dump", "moves", &dump, option])?;
        let bytes = std::fs::read(&dump).map_err(|e| e.to_string())?;
        assert!(bytes.starts_with(magic) || option == "--live" && bytes.len() > 1 << 20, "{option}");
        std::fs::remove_file(&dump).map_err(|e| e.to_string())?;
        a.wait_state("moves", "running", LONG)?;
    }

    // A snapshot, and back.
    a.virsh(&["snapshot-create-as", "moves", "before"])?;
    assert!(a.virsh(&["snapshot-list", "moves"])?.contains("before"));
    console.run("MARK=second; echo $MARK > /dev/vda; sync")?;
    a.virsh(&["snapshot-revert", "moves", "before"])?;
    a.wait_state("moves", "running", LONG)?;
    let mut console = says(&a, "first")?;
    let disk = console.run("echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/vda")?;
    assert!(disk.contains("first") && !disk.contains("second"), "{disk}");
    a.virsh(&["snapshot-delete", "moves", "before"])?;

    // To another host and back, with a disk that was plugged in on the way.
    let more = image(&one, "more.qcow2", 32)?;
    a.virsh(&["attach-disk", "moves", &more, "vdb", "--driver", "qemu", "--subdriver", "qcow2"])?;
    wait_for("the disk in the guest", LONG, || {
        console.run("cat /sys/block/vdb/size").ok().filter(|s| s.contains("65536"))
    })?;
    let to = |from: &Libvirt, to: &Libvirt, more: &[&str]| {
        let uri = ["migrate", "--live", "--unsafe", "moves", to.uri(), "--migrateuri", "tcp://127.0.0.1"];
        from.virsh(&[&uri, more].concat())
    };
    let refused = to(&a, &b, &["--tls", "--tls-destination", "elsewhere.example"]).err().unwrap_or_default();
    assert!(refused.contains("Certificate does not match the hostname elsewhere.example"), "{refused}");
    a.wait_state("moves", "running", LONG)?;
    to(&a, &b, &["--tls"]).map_err(|e| format!("{e}\n{}", emulator_log(&two, "moves")))?;
    assert!(a.virsh(&["domstate", "moves"])?.starts_with("shut off"));
    b.wait_state("moves", "running", LONG)?;
    let mut console = says(&b, "first")?;
    let wrote = console.run("MARK=there; dd if=/dev/zero of=/dev/vdb bs=1M count=4; sync")?;
    assert!(wrote.contains("END:0"), "{wrote}");
    b.virsh(&["detach-disk", "moves", "vdb"])?;
    to(&b, &a, &["--postcopy", "--postcopy-after-precopy"])
        .map_err(|e| format!("{e}\n{}", emulator_log(&one, "moves")))?;
    a.wait_state("moves", "running", LONG)?;
    let mut console = says(&a, "there")?;
    assert!(console.run("test -e /dev/vdb")?.contains("END:1"), "the disk is back");
    // The disk is there under the name that this host has for it.
    let disk =
        console.run("echo home > /dev/vda; sync; echo 3 > /proc/sys/vm/drop_caches; head -n 1 /dev/vda")?;
    assert!(disk.contains("home"), "{disk}");
    assert!(a.virsh(&["domblkinfo", "moves", "vda"])?.contains("67108864"));
    let _ = console.run("(sleep 1; poweroff -f) & true");
    a.wait_state("moves", "shut off (shutdown)", LONG)?;
    run("qemu-img", &["check", &more])?;
    assert!(decrypted_has(&one, &one.path("moves.qcow2"), "qcow2", "home\n")?);
    Ok(())
}

/// What the emulator of a domain said.
fn emulator_log(scratch: &Scratch, name: &str) -> String {
    std::fs::read_to_string(scratch.path(&format!("libvirt4/qemu/{name}.log"))).unwrap_or_default()
}

/// `virt-install --import` of the Debian image with nothing said of graphics and controllers, for a guest that it knows, and
/// for one that it does not: what it adds is there, and there is a picture of it.
#[test]
fn virt_install_imports_debian_as_people_do() -> Result<()> {
    if let Some(reason) = missing() {
        eprintln!("skipped: {reason}");
        return Ok(());
    }
    let scratch = Scratch::new("virt-install")?;
    let emulator = share(env!("CARGO_BIN_EXE_ftvm"), &scratch.path("ftvm"), 0o755)?;
    let v = Libvirt::start(&scratch)?;
    for (name, osinfo, parts) in [
        ("known", "debian11", ["machine='pc-q35-7.2'", "qemu-xhci", "model type='virtio'", "type='tablet'"]),
        (
            "unknown",
            "generic",
            ["machine='pc-i440fx-7.2'", "ich9-uhci3", "model type='e1000'", "type='tablet'"],
        ),
    ] {
        let disk = share(&debian()?, &scratch.path(&format!("{name}.qcow2")), 0o666)?;
        let done = Command::new("timeout")
            .args([
                "100",
                "virt-install",
                "--connect",
                v.uri(),
                "--virt-type",
                "qemu",
                "--import",
                "--name",
                name,
            ])
            .args(["--osinfo", osinfo, "--memory", "768", "--vcpus", "2", "--network", "user"])
            .args(["--disk", &format!("path={disk},format=qcow2"), "--boot", &format!("emulator={emulator}")])
            .args(["--sound", "ich9", "--cpu", "host-model", "--noautoconsole"])
            .output()
            .map_err(|e| format!("virt-install: {e}"))?;
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let xml = v.virsh(&["dumpxml", name])?;
        for part in parts.iter().chain(&["<graphics type='vnc'"]) {
            assert!(xml.contains(part), "{part} is not in\n{xml}");
        }
        let shot = scratch.path(&format!("{name}.png"));
        let mut console = Console::open(&v, name)?;
        console.until("Debian 12", LONG)?;
        v.virsh(&["screenshot", name, "--file", &shot])?;
        let grub = std::fs::metadata(&shot).map_err(|e| e.to_string())?.len();
        console.until("login:", LONG)?;
        v.virsh(&["screenshot", name, "--file", &shot])?;
        let text = std::fs::metadata(&shot).map_err(|e| e.to_string())?.len();
        // An empty screen takes fewer.
        assert!(grub > 1_900 && text > 1_900, "pictures of {grub} and {text} bytes");
        assert!(v.virsh(&["vncdisplay", name])?.contains("127.0.0.1:"));
        // The guest shuts down, and begins anew.
        v.virsh(&["reboot", name])?;
        console.until("Debian 12", LONG)?;
        console.until("login:", LONG)?;
        v.virsh(&["shutdown", name])?;
        v.wait_state(name, "shut off (shutdown)", LONG)?;
        v.virsh(&["undefine", name])?;
        run("qemu-img", &["check", &disk])?;
    }
    Ok(())
}
