//! `-accel kvm`: a machine on the host's processor, with the firmware, a disk, monitors, and moves to the software
//! processor and back. The guest is a boot sector that needs little of a processor, since the KVM of a machine inside
//! a cloud may execute little; what needs hardware is run by `make test-kvm` (tests/kvm/run.sh).

mod common;

use std::time::{Duration, Instant};

use common::*;
use ftvm_harness::gdb::Rsp;
use ftvm_harness::vm::Vm;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::{json, Value};

core::arch::global_asm!(
    ".pushsection .rodata.ftvm_boot, \"a\"",
    ".global ftvm_boot_start",
    "ftvm_boot_start:",
    ".code16",
    // A counter in EBP, a generator in EBX; now and then a sector is read, and all three are printed.
    "cli; cld; xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7C00; sti; mov byte ptr [0x600], dl",
    "xor ebp, ebp; mov ebx, 1",
    "2: inc ebp; imul ebx, ebx, 1103515245; add ebx, 12345; test bp, 0xFF; jnz 2b",
    "mov dword ptr [0x610], 0x10010; mov dword ptr [0x614], 0x8000; mov dword ptr [0x618], 1",
    "mov dword ptr [0x61C], 0; mov dword ptr [0x8000], 0",
    "mov ah, 0x42; mov dl, byte ptr [0x600]; mov si, 0x610; pushad; int 0x13; popad",
    "mov al, 'R'; call 5f; mov eax, ebp; call 3f; mov eax, ebx; call 3f; mov eax, dword ptr [0x8000]; call 3f",
    "mov al, 10; call 5f; jmp 2b",
    "3: mov cx, 8",
    "4: rol eax, 4; push ax; and al, 15; add al, '0'; cmp al, '9'; jbe 6f; add al, 7",
    "6: call 5f; pop ax; loop 4b; mov al, ' '",
    "5: push ax; mov dx, 0x3FD",
    "7: in al, dx; test al, 0x20; jz 7b; mov dx, 0x3F8; pop ax; out dx, al; ret",
    ".global ftvm_boot_end",
    "ftvm_boot_end:",
    ".popsection",
);

extern "C" {
    static ftvm_boot_start: u8;
    static ftvm_boot_end: u8;
}

/// A disk image with the program in its boot sector.
fn disk(scratch: &Scratch) -> Result<String> {
    // SAFETY: both labels are of the block above, in this order, in one section.
    let code = unsafe {
        let (from, to) = (&raw const ftvm_boot_start, &raw const ftvm_boot_end);
        std::slice::from_raw_parts(from, to.offset_from(from) as usize)
    };
    let mut image = vec![0u8; 16 << 20];
    image[..code.len()].copy_from_slice(code);
    image[510..512].copy_from_slice(&[0x55, 0xAA]);
    image[512..516].copy_from_slice(b"FTVM");
    let path = scratch.path("disk.raw");
    std::fs::write(&path, image).map_err(|e| format!("{path}: {e}"))?;
    Ok(path)
}

/// Why these tests cannot run here.
fn missing() -> Option<String> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => None,
        Err(e) => Some(format!("/dev/kvm: {e}")),
    }
}

macro_rules! need_kvm {
    () => {
        if let Some(reason) = missing() {
            eprintln!("skipped: {reason}");
            return Ok(());
        }
    };
}

fn launch(scratch: &Scratch, name: &str, image: &str, more: &[&str]) -> Result<Vm> {
    let drive = format!("file={image},format=raw,if=virtio");
    launch_with(scratch, name, &["-drive", &drive], more)
}

fn launch_with(scratch: &Scratch, name: &str, disk: &[&str], more: &[&str]) -> Result<Vm> {
    let mut args = vec!["-m", "32", "-nodefaults"];
    args.extend(disk);
    args.extend(more);
    start(scratch, name, &args)
}

/// The counts that the guest has printed in whole lines, each checked: the generator's value belongs to the count, and
/// the sector was read.
fn counts(text: &str) -> Result<Vec<u32>> {
    let mut out: Vec<u32> = Vec::new();
    let (mut n, mut x) = (0u32, 1u32);
    let Some((whole, _)) = text.rsplit_once('\n') else { return Ok(out) };
    for line in whole.lines().filter_map(|l| l.trim_end().strip_prefix('R')) {
        let words: Vec<u32> =
            line.split_whitespace().filter_map(|w| u32::from_str_radix(w, 16).ok()).collect();
        let [count, value, sector] = words[..] else { return Err(format!("'{line}' in\n{text}")) };
        while n < count {
            n += 1;
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        }
        if n != count || x != value || sector != u32::from_le_bytes(*b"FTVM") {
            return Err(format!("'{line}': the generator is {x:x} at {n:x}"));
        }
        if out.last().is_some_and(|last| last + 0x100 != count) {
            return Err(format!("a line is missing before '{line}'"));
        }
        out.push(count);
    }
    Ok(out)
}

/// Wait until the guest has printed `more` lines than now.
fn progress(vm: &Vm, more: usize) -> Result<usize> {
    progress_after("", vm, more)
}

/// As [`progress`], of a guest that printed `before` elsewhere.
fn progress_after(before: &str, vm: &Vm, more: usize) -> Result<usize> {
    let all = || counts(&format!("{before}{}", vm.text()));
    let had = all()?.len();
    wait_for("more lines of the guest", LONG, || match all() {
        Ok(list) if list.len() < had + more => None,
        other => Some(other.map(|l| l.len())),
    })
    .map_err(|e| format!("{e}\n{}\n{}", vm.text(), vm.log()))?
}

/// How often the thread of the doorbells has slept.
fn doorbell_sleeps(vm: &Vm) -> Result<u64> {
    let tasks = format!("/proc/{}/task", vm.pid());
    for task in std::fs::read_dir(&tasks).map_err(|e| format!("{tasks}: {e}"))?.flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if read("comm").trim() == "doorbells" {
            let status = read("status");
            let count = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
            return count.and_then(|n| n.trim().parse().ok()).ok_or(format!("no count in {status}"));
        }
    }
    Err("there is no thread of the doorbells".into())
}

#[test]
fn the_guest_does_not_wait_for_what_it_notifies() -> Result<()> {
    need_kvm!();
    let scratch = Scratch::new("kvm-doorbells")?;
    let drive = format!("file={},format=raw,if=none,id=d", disk(&scratch)?);
    let mut rung = Vec::new();
    for on in ["on", "off"] {
        let device = format!("virtio-blk-pci,drive=d,ioeventfd={on}");
        let disk = ["-drive", &drive, "-device", &device];
        let mut vm = launch_with(&scratch, on, &disk, &["-accel", "kvm"])?;
        progress(&vm, 1)?;
        let before = doorbell_sleeps(&vm)?;
        // Each of these lines took a request of the disk.
        progress(&vm, 20)?;
        rung.push(doorbell_sleeps(&vm)? - before);
        // And none is lost when it stops, whenever that is.
        let mut qmp = vm.qmp()?;
        for _ in 0..10 {
            qmp.command("stop", Value::Null)?;
            qmp.command("cont", Value::Null)?;
            progress(&vm, 1)?;
        }
        vm.kill();
    }
    assert!(rung[0] > 0 && rung[1] == 0, "{rung:?}");
    Ok(())
}

#[test]
fn a_machine_on_the_hosts_processor_does_what_users_ask_of_it() -> Result<()> {
    need_kvm!();
    let scratch = Scratch::new("kvm")?;
    let image = disk(&scratch)?;
    let mut vm = launch(&scratch, "vm", &image, &["-accel", "kvm", "-smp", "2"])?;
    let mut qmp = vm.qmp()?;
    assert_eq!(qmp.command("query-kvm", Value::Null)?, json!({"enabled": true, "present": true}));
    progress(&vm, 3)?;
    let cpus = qmp.command("query-cpus-fast", Value::Null)?;
    for cpu in cpus.as_array().ok_or("no list")? {
        let thread = format!("/proc/{}/task/{}/comm", vm.pid(), cpu["thread-id"]);
        let name = std::fs::read_to_string(&thread).map_err(|e| format!("{thread}: {e}"))?;
        assert_eq!(name.trim(), format!("CPU {}/KVM", cpu["cpu-index"]));
    }
    let line = |q: &mut ftvm_harness::qmp::Qmp, text: &str| {
        q.command("human-monitor-command", json!({"command-line": text}))
    };
    assert_eq!(line(&mut qmp, "info kvm")?, "kvm support: enabled\r\n");
    // Registers of a guest that runs.
    let registers = line(&mut qmp, "info registers")?.as_str().unwrap_or_default().to_owned();
    assert!(registers.contains("CS =") && registers.matches("RIP=").count() == 2, "{registers}");
    // Stopped, it prints nothing.
    qmp.command("stop", Value::Null)?;
    let stood = counts(&vm.text())?.len();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(counts(&vm.text())?.len(), stood);
    qmp.command("cont", Value::Null)?;
    progress(&vm, 3)?;
    let dump = scratch.path("dump");
    qmp.command("dump-guest-memory", json!({"paging": false, "protocol": format!("file:{dump}")}))?;
    progress(&vm, 2)?;
    // After a reset it begins again.
    qmp.command("system_reset", Value::Null)?;
    qmp.wait_event("RESET", LONG)?;
    wait_for("the guest's second start", LONG, || {
        (vm.text().matches("R00000100 ").count() == 2).then_some(())
    })?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}

/// Move `from` to `to`, which waits at `socket`; the downtime in ms.
fn migrate(from: &Vm, to: &Vm, socket: &str) -> Result<u64> {
    let mut qmp = from.qmp()?;
    qmp.command("migrate", json!({"uri": format!("unix:{socket}")}))?;
    moved(&mut qmp, from, to).map(|status| status["downtime"].as_u64().unwrap_or_default())
}

/// The same with most of the memory to follow when it runs there.
fn migrate_postcopy(from: &Vm, to: &Vm, socket: &str) -> Result<Value> {
    let mut qmp = from.qmp()?;
    let post = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
    to.qmp()?.command("migrate-set-capabilities", post.clone())?;
    qmp.command("migrate-set-capabilities", post)?;
    // It does not end before.
    qmp.command("migrate-set-parameters", json!({"max-bandwidth": 64 << 10, "downtime-limit": 1}))?;
    qmp.command("migrate", json!({"uri": format!("unix:{socket}")}))?;
    wait_for("the copy's beginning", LONG, || {
        (qmp.command("query-migrate", Value::Null).ok()?["status"] == "active").then_some(())
    })?;
    qmp.command("migrate-start-postcopy", Value::Null)?;
    // How many pages the guest waits for is a matter of luck: those that it needs first are sent first.
    let status = moved(&mut qmp, from, to)?;
    match status["ram"]["postcopy-bytes"].as_u64() {
        Some(bytes) if bytes > 0 => Ok(status),
        _ => Err(format!("it was no post-copy: {status}")),
    }
}

fn moved(qmp: &mut ftvm_harness::qmp::Qmp, from: &Vm, to: &Vm) -> Result<Value> {
    let status = wait_for("the end of the migration", LONG, || {
        let info = qmp.command("query-migrate", Value::Null).ok()?;
        matches!(info["status"].as_str(), Some("completed" | "failed")).then_some(info)
    })?;
    if status["status"] != "completed" {
        return Err(format!("{status}\n{}\n{}", from.log(), to.log()));
    }
    Ok(status)
}

/// mov cx,4; a: inc word [0x500]; loop a; hlt.
const LOOP: [u8; 10] = [0xB9, 4, 0, 0xFF, 0x06, 0x00, 0x05, 0xE2, 0xFA, 0xF4];

#[test]
fn gdb_stops_and_steps_the_hosts_processor() -> Result<()> {
    need_kvm!();
    const RIP: usize = 16;
    let scratch = Scratch::new("kvmgdb")?;
    let rom = firmware(&scratch, "loop.rom", &LOOP)?;
    let port = free_port()?;
    let args =
        ["-accel", "kvm", "-bios", &rom, "-m", "16", "-net", "none", "-S", "-gdb", &format!("tcp:{port}")];
    let mut vm = start(&scratch, "vm", &args)?;
    let mut qmp = vm.qmp()?;
    let mut rsp = Rsp::connect(port)?;
    assert!(rsp.ask("qSupported:multiprocess+;swbreak+;hwbreak+")?.contains("PacketSize="));
    assert_eq!((rsp.register(RIP)?, rsp.ask("m500,2")?), (0xFFF0, "0000".into()));
    // The second time round; addresses are linear.
    assert_eq!(rsp.ask("Z1,f0003,1")?, "OK");
    for round in 0..2 {
        let stop = rsp.ask("vCont;c:p1.-1")?;
        assert!(stop.starts_with("T05") && stop.contains("hwbreak"), "{stop}");
        assert_eq!((rsp.register(RIP)?, rsp.ask("m500,2")?), (3, format!("0{round}00")));
    }
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "debug");
    // GDB takes its breakpoint away to step from it.
    assert_eq!(rsp.ask("z1,f0003,1")?, "OK");
    for (rip, count) in [(7, 2), (3, 2), (7, 3)] {
        let stop = rsp.ask("vCont;s:p1.1;c:p1.-1")?;
        assert!(stop.starts_with("T05"), "{stop}");
        assert_eq!((rsp.register(RIP)?, rsp.ask("m500,2")?), (rip, format!("0{count}00")));
    }
    // Registers and memory can be changed: the loop has another hundred rounds.
    assert_eq!(rsp.ask("P2=6400000000000000")?, "OK");
    assert_eq!(rsp.ask("M500,2:0000")?, "OK");
    assert_eq!(rsp.ask("Z1,f0009,1")?, "OK");
    assert!(rsp.ask("vCont;c:p1.-1")?.contains("hwbreak"));
    assert_eq!((rsp.register(RIP)?, rsp.ask("m500,2")?), (9, "6300".into()));
    // Asleep, it is stopped by the debugger's key.
    assert_eq!(rsp.ask("z1,f0009,1")?, "OK");
    let start = Instant::now();
    loop {
        rsp.send("vCont;c:p1.-1")?;
        wait_for("the guest runs", LONG, || {
            qmp.command("query-status", Value::Null).is_ok_and(|s| s["running"] == true).then_some(())
        })?;
        rsp.raw(b"\x03")?;
        assert!(rsp.receive()?.is_some_and(|s| s.starts_with("T02")));
        match rsp.register(RIP)? {
            // The key was quicker than the HLT.
            9 => assert!(start.elapsed() < LONG, "the guest does not go to sleep"),
            rip => {
                assert_eq!(rip, 10);
                break;
            }
        }
    }
    assert_eq!(rsp.ask("D;1")?, "OK");
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}

#[test]
fn a_machine_moves_from_tcg_to_kvm_and_back() -> Result<()> {
    need_kvm!();
    let scratch = Scratch::new("kvmmove")?;
    let raw = disk(&scratch)?;
    // Not every KVM shows SSE3.
    let cpu = "qemu64,-pni";
    let mut vm = launch(&scratch, "m0", &raw, &["-accel", "tcg", "-cpu", cpu])?;
    progress(&vm, 3)?;
    // What the guest has printed so far, in all places: every line must follow the one before, also over the seams.
    let mut printed = String::new();
    for (n, accel) in ["kvm", "tcg", "kvm"].into_iter().enumerate() {
        let socket = scratch.path(&format!("move{n}"));
        let uri = format!("unix:{socket}");
        let args = ["-accel", accel, "-cpu", cpu, "-incoming", &uri];
        let next = launch(&scratch, &format!("m{}", n + 1), &raw, &args)?;
        next.qmp()?;
        let downtime = migrate(&vm, &next, &socket)?;
        printed.push_str(&vm.text());
        vm.qmp()?.command("quit", Value::Null)?;
        vm.wait_exit(LONG)?;
        progress_after(&printed, &next, 4)?;
        eprintln!("to {accel}: downtime {downtime} ms");
        vm = next;
    }
    Ok(())
}

#[test]
fn a_machine_runs_on_kvm_while_its_memory_follows() -> Result<()> {
    need_kvm!();
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: userfaultfd for the kernel's own accesses is root's");
        return Ok(());
    }
    let scratch = Scratch::new("kvmpost")?;
    let raw = disk(&scratch)?;
    let cpu = "qemu64,-pni";
    let mut vm = launch(&scratch, "m0", &raw, &["-accel", "tcg", "-cpu", cpu])?;
    progress(&vm, 3)?;
    let mut printed = String::new();
    for (n, accel) in ["kvm", "kvm", "tcg"].into_iter().enumerate() {
        let socket = scratch.path(&format!("move{n}"));
        let args = ["-accel", accel, "-cpu", cpu, "-incoming", &format!("unix:{socket}")];
        let next = launch(&scratch, &format!("m{}", n + 1), &raw, &args)?;
        let ram = migrate_postcopy(&vm, &next, &socket)?["ram"].take();
        printed.push_str(&vm.text());
        vm.qmp()?.command("quit", Value::Null)?;
        vm.wait_exit(LONG)?;
        progress_after(&printed, &next, 4)?;
        eprintln!(
            "to {accel}: {} pages asked for, {} bytes behind",
            ram["postcopy-requests"], ram["postcopy-bytes"]
        );
        vm = next;
    }
    Ok(())
}

#[test]
fn turning_protection_on_moves_the_machine_to_tcg_in_place() -> Result<()> {
    need_kvm!();
    let scratch = Scratch::new("kvmft")?;
    let image = disk(&scratch)?;
    let mut vm = launch(&scratch, "vm", &image, &["-accel", "kvm"])?;
    let mut qmp = vm.qmp()?;
    progress(&vm, 3)?;
    let listen = free_port()?.to_string();
    for round in 0..2 {
        let start = Instant::now();
        qmp.command("ft-turn-on", json!({"listen": listen}))?;
        let took = start.elapsed();
        assert_eq!(qmp.command("query-kvm", Value::Null)?["enabled"], false);
        assert_eq!(qmp.command("query-ft", Value::Null)?["state"], "unprotected");
        progress(&vm, 5)?;
        let back = Instant::now();
        qmp.command("ft-turn-off", Value::Null)?;
        wait_for("the way back", LONG, || {
            let kvm = qmp.command("query-kvm", Value::Null).ok()?;
            (kvm["enabled"] == true).then_some(())
        })?;
        eprintln!("round {round}: to tcg in {took:.1?}, back in {:.1?}", back.elapsed());
        progress(&vm, 5)?;
    }
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}
