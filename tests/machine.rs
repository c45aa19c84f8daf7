//! A machine alone: a small Linux guest on its disks, networks and processors, and the ways it ends.

mod common;

use std::time::Duration;

use common::*;
use ftvm_harness::client::{get, Client, Line};
use ftvm_harness::guests::run;
use ftvm_harness::libvirt::Console;
use ftvm_harness::{Result, Scratch};
use serde_json::{json, Value};

#[test]
fn an_ide_disk_keeps_what_the_guest_wrote() -> Result<()> {
    let scratch = Scratch::new("ide")?;
    let image = ext4(&scratch, "disk.raw", 48)?;
    let mut vm = start_tiny(
        &scratch,
        "vm",
        "disk diskload halt",
        &format!("-net none -drive file={image},format=raw -cpu qemu64"),
    )?;
    vm.wait_console("disk=/dev/sda", LONG)?;
    vm.wait_console("disk: 8 MiB ok", LONG)?;
    ends_well(&mut vm)?;
    run("e2fsck", &["-fn", &image])?;
    let listing = run("debugfs", &["-R", "ls -l /", &image])?;
    assert!(listing.contains("pattern") && listing.contains("8388608"), "{listing}");
    Ok(())
}

#[test]
fn a_virtio_disk_in_qcow2_keeps_what_the_guest_wrote() -> Result<()> {
    let scratch = Scratch::new("vblk")?;
    let (raw, image) = (ext4(&scratch, "disk.raw", 48)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let mut vm = start_tiny(
        &scratch,
        "vm",
        "disk diskload halt",
        &format!("-net none -drive file={image},if=virtio -smp 2 -cpu max"),
    )?;
    vm.wait_console("disk=/dev/vda", LONG)?;
    vm.wait_console("disk: 8 MiB ok", LONG)?;
    ends_well(&mut vm)?;
    assert!(vm.text().contains("Brought up 1 node, 2 CPUs"), "{}", vm.text());
    run("qemu-img", &["check", &image])?;
    run("qemu-img", &["convert", "-O", "raw", &image, &raw])?;
    run("e2fsck", &["-fn", &raw])?;
    Ok(())
}

#[test]
fn services_answer_through_forwarded_ports_and_survive_stop_and_cont() -> Result<()> {
    let scratch = Scratch::new("net")?;
    let (tcp, http) = (free_port()?, free_port()?);
    let image = ext4(&scratch, "disk.raw", 32)?;
    let nic = format!(
        "-nic user,model=virtio,hostfwd=tcp:{tcp}-:7000,hostfwd=tcp:{http}-:8080 -smp 2 \
         -drive file={image},format=raw,if=virtio"
    );
    let mut vm = start_tiny(&scratch, "vm", "net disk serve", &nic)?;
    vm.wait_console("dhcp ok", LONG)?;
    vm.wait_console("ftload: http on 8080", LONG)?;
    vm.wait_console("ftload: serving on 7000", LONG)?;
    let mut qmp = vm.qmp()?;
    let session = Client::session(None, tcp, Duration::from_millis(5));
    let journal = Client::journal(None, tcp, "line", Duration::from_millis(5));
    let counter = Client::http(None, http, "200 OK", Duration::from_millis(20));
    let reaches = |n: u64| {
        ftvm_harness::wait_for("progress of the clients", LONG, || {
            [&session, &journal, &counter].iter().all(|c| c.answers() >= n).then_some(())
        })
    };
    reaches(20)?;
    qmp.command("stop", Value::Null)?;
    qmp.wait_event("STOP", LONG)?;
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "paused");
    std::thread::sleep(Duration::from_millis(300));
    let frozen = session.answers();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(session.answers(), frozen, "a stopped guest answers");
    qmp.command("cont", Value::Null)?;
    qmp.wait_event("RESUME", LONG)?;
    reaches(frozen + 20)?;
    for client in [session, journal, counter] {
        let seen = client.finish()?;
        assert!(seen.wrong.is_empty(), "{:?}", seen.wrong);
    }
    let (sum, _) = Line::connect(tcp)?.ask("sum")?;
    assert_ne!(sum, "00000000", "nothing was written");
    assert!(get(http).map_err(|e| e.to_string())?.contains("200 OK"));
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}

#[test]
fn four_processors_come_up_and_compute() -> Result<()> {
    let scratch = Scratch::new("smp4")?;
    let mut vm = start_tiny(&scratch, "vm", "halt", "-net none -smp 4 -cpu max")?;
    ends_well(&mut vm)?;
    let text = vm.text();
    assert!(text.contains("Brought up 1 node, 4 CPUs"), "{text}");
    assert!(!text.contains("soft lockup") && !text.contains("rcu_sched detected"), "{text}");
    Ok(())
}

#[test]
fn memory_above_4_gib_is_there_on_a_nehalem() -> Result<()> {
    let scratch = Scratch::new("mem")?;
    let mut vm = start_tiny(&scratch, "vm", "halt", "-net none -m 5G -cpu Nehalem")?;
    ends_well(&mut vm)?;
    let text = vm.text();
    assert!(text.contains("K/5242"), "the kernel counts 5 GiB: {text}");
    assert!(text.contains("[mem 0x0000000100000000-0x000000017fffffff] usable"), "{text}");
    assert!(text.contains("Nehalem"), "{text}");
    Ok(())
}

#[test]
fn a_reboot_is_a_reset_and_ends_the_program_with_no_reboot() -> Result<()> {
    let scratch = Scratch::new("reboot")?;
    let mut once = start_tiny(&scratch, "once", "reboot", "-net none -no-reboot")?;
    let mut qmp = once.qmp()?;
    let vm = start_tiny(&scratch, "vm", "reboot", "-net none")?;
    let mut again = vm.qmp()?;
    let event = qmp.wait_event("SHUTDOWN", LONG)?;
    assert_eq!(event["data"], json!({"guest": true, "reason": "guest-reset"}));
    ends_well(&mut once)?;
    let event = again.wait_event("RESET", LONG)?;
    assert_eq!(event["data"], json!({"guest": true, "reason": "guest-reset"}));
    ftvm_harness::wait_for("the kernel's second start", LONG, || {
        (vm.text().matches("Linux version").count() == 2).then_some(())
    })?;
    again.command("system_reset", Value::Null)?;
    assert_eq!(again.wait_event("RESET", LONG)?["data"]["guest"], false);
    ftvm_harness::wait_for("the kernel's third start", LONG, || {
        (vm.text().matches("Linux version").count() == 3).then_some(())
    })?;
    Ok(())
}

#[test]
fn with_no_shutdown_a_machine_that_is_off_stays_for_its_user() -> Result<()> {
    let scratch = Scratch::new("noshut")?;
    let mut vm = start_tiny(&scratch, "vm", "halt", "-net none -no-shutdown")?;
    let mut qmp = vm.qmp()?;
    let event = qmp.wait_event("SHUTDOWN", LONG)?;
    assert_eq!(event["data"], json!({"guest": true, "reason": "guest-shutdown"}));
    let status = qmp.command("query-status", Value::Null)?;
    assert_eq!((&status["running"], &status["status"]), (&json!(false), &json!("shutdown")));
    assert!(vm.is_running());
    qmp.command("system_reset", Value::Null)?;
    qmp.command("cont", Value::Null)?;
    ftvm_harness::wait_for("the kernel's second start", LONG, || {
        (vm.text().matches("Linux version").count() == 2).then_some(())
    })?;
    qmp.command("quit", Value::Null)?;
    assert_eq!(qmp.wait_event("SHUTDOWN", LONG)?["data"]["reason"], "host-qmp-quit");
    ends_well(&mut vm)
}

#[test]
fn debug_exit_gives_the_guests_status() -> Result<()> {
    let scratch = Scratch::new("exit")?;
    // mov al, 0x21; out 0xf4, al; hlt
    let rom = firmware(&scratch, "exit.rom", &[0xB0, 0x21, 0xE6, 0xF4, 0xF4])?;
    let device = "isa-debug-exit,iobase=0xf4,iosize=0x04";
    let mut vm = start(&scratch, "vm", &["-bios", &rom, "-net", "none", "-device", device])?;
    assert_eq!(vm.wait_exit(LONG)?, 0x21 << 1 | 1);
    Ok(())
}

#[test]
fn start_paused_waits_for_cont_and_a_signal_ends_the_machine() -> Result<()> {
    let scratch = Scratch::new("paused")?;
    let mut vm = start_tiny(&scratch, "vm", "", "-net none -S")?;
    let mut qmp = vm.qmp()?;
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "prelaunch");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vm.text(), "");
    qmp.command("cont", Value::Null)?;
    vm.wait_console("Linux version", LONG)?;
    vm.signal(nix::sys::signal::Signal::SIGTERM);
    let event = qmp.wait_event("SHUTDOWN", LONG)?;
    assert_eq!(event["data"], json!({"guest": false, "reason": "host-signal"}));
    ends_well(&mut vm)
}

#[test]
fn a_dump_is_a_core_file_with_memory_and_registers() -> Result<()> {
    let scratch = Scratch::new("dump")?;
    let mut vm = start_tiny(&scratch, "vm", "spin", "-net none -smp 2")?;
    vm.wait_console("tiny guest ready", LONG)?;
    let mut qmp = vm.qmp()?;
    qmp.command("stop", Value::Null)?;
    let (core, plain) = (scratch.path("core"), scratch.path("plain"));
    let arguments = json!({"paging": false, "protocol": format!("file:{core}"), "detach": true});
    qmp.command("dump-guest-memory", arguments)?;
    let event = qmp.wait_event("DUMP_COMPLETED", LONG)?;
    assert_eq!(event["data"]["result"]["status"], "completed", "{event}");
    assert_eq!(qmp.command("query-dump", Value::Null)?["completed"], 256 << 20);
    qmp.command("pmemsave", json!({"val": 0, "size": 256 << 20, "filename": plain}))?;
    let (core_bytes, plain) =
        (std::fs::read(&core).map_err(|e| e.to_string())?, std::fs::read(plain).map_err(|e| e.to_string())?);
    let headers = core_bytes.len() - plain.len();
    assert!(headers < 4096 && core_bytes[headers..] == plain[..], "the memory is another");
    let said = run("readelf", &["-ln", &core])?;
    assert_eq!(said.matches("NT_PRSTATUS").count(), 2, "{said}");
    assert_eq!(said.matches("  QEMU ").count(), 2, "{said}");
    assert!(said.contains("CORE (Core file)") && said.contains("LOAD"), "{said}");
    // The registers are those that the monitor shows: RIP of the first processor lies in its first note.
    let text = qmp.command("human-monitor-command", json!({"command-line": "info registers"}))?;
    let text = text.as_str().unwrap_or_default();
    let rip = text.split("RIP=").nth(1).and_then(|t| u64::from_str_radix(t.get(..16)?, 16).ok());
    let at = 64 + 2 * 56 + 20 + 112 + 16 * 8;
    let noted = core_bytes[at..at + 8].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    assert_eq!(Some(noted), rip, "{text}");
    let refused = qmp.command("dump-guest-memory", json!({"paging": true, "protocol": "file:/dev/null"}));
    assert!(refused.is_err_and(|e| e.contains("paging")));
    Ok(())
}

/// One socket for the guest's shell and the monitor: Ctrl-A leads from one to the other, and ends the machine.
#[test]
fn a_shell_and_the_monitor_share_a_socket() -> Result<()> {
    let scratch = Scratch::new("mux")?;
    let socket = scratch.path("tty");
    let image = scratch.path("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).map_err(|e| e.to_string())?;
    let more = format!(
        "-chardev socket,id=c,path={socket},server=on,wait=off,mux=on -serial chardev:c -mon chardev=c -net none \
         -snapshot -drive file={image},format=raw,if=virtio,id=d"
    );
    let mut vm = start_tiny(&scratch, "vm", "", &more)?;
    let mut line = Console::socket(&socket)?;
    line.until("tiny guest ready", LONG)?;
    assert!(line.run("echo sum $((20 + 3))")?.contains("sum 23"));
    line.send("\x01c")?;
    line.until("(ftvm) ", LONG)?;
    line.send("info status\r")?;
    line.until("VM status: running", LONG)?;
    line.send("\x01c")?;
    assert!(line.run("echo sum $((40 + 5))")?.contains("sum 45"));
    // What -snapshot holds is written into the image when it is wanted, by the key and in the monitor.
    let is_there = |text: &str| -> Result<bool> {
        Ok(std::fs::read(&image)
            .map_err(|e| e.to_string())?
            .windows(text.len())
            .any(|w| w == text.as_bytes()))
    };
    let write = |text: &str, at: u32| {
        format!("echo {text} | dd of=/dev/vda bs=64k seek={at} conv=sync,fsync 2>/dev/null; cat /proc/uptime")
    };
    line.run(&write("by-the-key", 1))?;
    assert!(!is_there("by-the-key")?, "the image is written to");
    line.send("\x01s")?;
    ftvm_harness::wait_for("the image to be written", LONG, || is_there("by-the-key").ok()?.then_some(()))?;
    line.run(&write("in-the-monitor", 5))?;
    let mut qmp = vm.qmp()?;
    let mut say = |line: &str| -> Result<String> {
        let said = qmp.command("human-monitor-command", json!({"command-line": line}))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    };
    assert!(say("commit nobody")?.contains("Device 'nobody' not found"));
    assert!(!is_there("in-the-monitor")?);
    assert_eq!(say("commit d")?, "");
    assert!(is_there("in-the-monitor")? && is_there("by-the-key")?);
    assert!(line
        .run("head -c 4 /dev/vda | wc -c; dd if=/dev/vda bs=64k skip=5 count=1 2>/dev/null | head -n 1")?
        .contains("in-the-monitor"));
    // A break is Linux' magic key.
    line.run("echo 1 > /proc/sys/kernel/sysrq")?;
    line.send("\x01b")?;
    std::thread::sleep(Duration::from_millis(300));
    line.send("h")?;
    line.until("sysrq: HELP", LONG)?;
    line.send("\x01h")?;
    let help = line.until("C-a C-a  sends C-a", LONG)?;
    assert!(
        help.contains("C-a x    exit emulator") && help.contains("C-a b    send break (magic sysrq)"),
        "{help}"
    );
    line.send("\x01x")?;
    ends_well(&mut vm)
}
