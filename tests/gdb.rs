//! Debuggers: gdb with the kernel's symbols, and what the stub does on the wire and beside the monitors.

mod common;

use common::*;
use ftvm_harness::gdb::{gdb, symbols, Rsp};
use ftvm_harness::guests::{debian, run, tiny};
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{Result, Scratch};
use serde_json::{json, Value};

/// Whether `text` has these parts in this order.
fn in_order(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => panic!("'{part}' is not there, or not in its place:\n{text}"),
        }
    }
}

#[test]
fn a_kernel_is_debugged_by_its_symbols() -> Result<()> {
    let Some(elf) = symbols(&tiny()?.0)? else { return Ok(()) };
    let scratch = Scratch::new("gdb")?;
    let port = free_port()?;
    let mut vm = start_tiny(&scratch, "vm", "halt nokaslr", &format!("-nic none -S -smp 2 -gdb tcp:{port}"))?;
    let commands = [
        "info registers rip cr0",
        "break start_kernel",
        "continue",
        "bt 2",
        "stepi",
        "stepi",
        "info registers rip gs_base",
        "break do_sys_openat2",
        "continue",
        "x/s $rsi",
        "bt 2",
        "delete 2",
        "info threads",
        "watch *(unsigned long*)&jiffies",
        "continue",
        "p $cr4",
        "p/x $xmm0.uint128",
        "delete 3",
        "hbreak machine_power_off",
        "continue",
        "monitor info status",
        "detach",
    ];
    let text = gdb(Some(&elf), &port.to_string(), &commands, LONG)?;
    in_order(
        &text,
        &[
            "0xfff0",
            "[ ET NW CD ]",
            "hit Breakpoint 1, ",
            " in start_kernel ()",
            "#1 ",
            "secondary_startup_64",
            "__fentry__ ()",
            "__x86_return_thunk",
            "gs_base        0xffffffff8",
            "Breakpoint 2, ",
            " in do_sys_openat2 ()",
            "\"/",
            "__x64_sys_openat ()",
            "Thread 1.1 (CPU#0 [",
            "Thread 1.2 (CPU#1 [",
            "Hardware watchpoint 3: *(unsigned long*)&jiffies",
            "Old value = ",
            "New value = ",
            "PAE",
            "= 0x",
            "Breakpoint 4, ",
            " in machine_power_off ()",
        ],
    );
    assert!(text.contains("VM status: paused (debug)"), "{text}");
    ends_well(&mut vm)
}

/// mov cx,4; a: inc word [0x500]; loop a; mov al,0; out 0xf4,al; then the end by isa-debug-exit.
const LOOP: [u8; 15] = [0xB9, 4, 0, 0xFF, 0x06, 0x00, 0x05, 0xE2, 0xFA, 0xB0, 0x00, 0xE6, 0xF4, 0xEB, 0xFE];

fn small(scratch: &Scratch, name: &str, more: &[&str]) -> Result<ftvm_harness::vm::Vm> {
    let rom = firmware(scratch, &format!("{name}.rom"), &LOOP)?;
    let device = "isa-debug-exit,iobase=0xf4,iosize=0x04";
    let args = ["-bios", &rom, "-m", "16", "-net", "none", "-device", device, "-S"];
    start(scratch, name, &[&args, more].concat())
}

const RIP: usize = 16;

fn runs(qmp: &mut Qmp) -> Result<()> {
    ftvm_harness::wait_for("going on", LONG, || {
        qmp.command("query-status", Value::Null).is_ok_and(|s| s["running"] == true).then_some(())
    })
}

#[test]
fn monitors_see_a_debuggers_stops_and_the_debugger_sees_theirs() -> Result<()> {
    let scratch = Scratch::new("gdbmon")?;
    let port = free_port()?;
    let mut vm = small(&scratch, "vm", &[])?;
    let mut qmp = vm.qmp()?;
    let line = |text: &str| json!({"command-line": text});
    let said = qmp.command("human-monitor-command", line(&format!("gdbserver tcp:{port}")))?;
    assert!(said.as_str().is_some_and(|s| s.starts_with("Waiting for gdb connection")), "{said}");
    let mut rsp = Rsp::connect(port)?;
    assert!(rsp.ask("qSupported:multiprocess+;swbreak+;hwbreak+")?.contains("PacketSize="));
    assert_eq!(rsp.ask("Hgp1.1")?, "OK");
    assert_eq!(rsp.ask("m500,2")?, "0000");
    // The second time round; addresses are linear.
    assert_eq!(rsp.ask("Z0,f0003,1")?, "OK");
    for round in 0..2 {
        let stop = rsp.ask("vCont;c:p1.-1")?;
        assert!(stop.starts_with("T05") && stop.contains("swbreak"), "{stop}");
        assert_eq!((rsp.register(RIP)?, rsp.ask("m500,2")?), (3, format!("0{round}00")));
        qmp.wait_event("RESUME", LONG)?;
        qmp.wait_event("STOP", LONG)?;
    }
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "debug");
    assert_eq!(rsp.ask("z0,f0003,1")?, "OK");
    let stop = rsp.ask("vCont;s:p1.1;c:p1.-1")?;
    assert!(stop.starts_with("T05"), "{stop}");
    assert_eq!(rsp.register(RIP)?, 7);
    // A watchpoint stops behind the instruction.
    assert_eq!(rsp.ask("Z2,500,2")?, "OK");
    let stop = rsp.ask("vCont;c:p1.-1")?;
    assert!(stop.contains("watch:") && stop.contains("500;"), "{stop}");
    assert_eq!((rsp.register(RIP)?, rsp.ask("m500,2")?), (7, "0300".into()));
    // What others stop is told: here the machine waits in its last jump.
    assert_eq!(rsp.ask("z2,500,2")?, "OK");
    assert_eq!(rsp.ask("Pb=0000000000000000")?, "OK", "r11 can be set");
    assert_eq!(rsp.ask("P10=0d00000000000000")?, "OK", "and rip: to the jump to itself");
    rsp.send("vCont;c:p1.-1")?;
    runs(&mut qmp)?;
    qmp.command("stop", Value::Null)?;
    assert!(rsp.receive()?.is_some_and(|s| s.starts_with("T02")));
    rsp.send("vCont;c:p1.-1")?;
    rsp.raw(b"\x03")?;
    assert!(rsp.receive()?.is_some_and(|s| s.starts_with("T02")));
    assert_eq!(rsp.ask("M500,2:3412")?, "OK");
    assert_eq!(rsp.ask("m500,2")?, "3412");
    assert!(rsp.ask("M90000000,2:3412")?.starts_with('E'));
    // A detached machine goes on.
    assert_eq!(rsp.ask("D;1")?, "OK");
    runs(&mut qmp)?;
    drop(rsp);
    // One that loses its debugger stays as it is.
    let mut rsp = Rsp::connect(port)?;
    assert!(rsp.ask("?")?.contains("05"));
    drop(rsp);
    let said = qmp.command("human-monitor-command", line("gdbserver none"))?;
    assert_eq!(said, "Disabled gdbserver\r\n");
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "paused");
    assert!(std::net::TcpStream::connect(port).is_err());
    // The same port again; and the debugger ends the machine.
    qmp.command("human-monitor-command", line(&format!("gdbserver tcp:{port}")))?;
    let mut rsp = Rsp::connect(port)?;
    rsp.send("k")?;
    ends_well(&mut vm)
}

#[test]
fn the_end_is_told_and_a_recorded_machine_cannot_be_changed() -> Result<()> {
    let scratch = Scratch::new("gdbrec")?;
    let port = free_port()?;
    let gdb = format!("tcp:{port}");
    let file = scratch.path("run.rr");
    let icount = format!("shift=3,rr=record,rrfile={file}");
    let mut vm = small(&scratch, "vm", &["-gdb", &gdb, "-icount", &icount])?;
    let mut rsp = Rsp::connect(port)?;
    assert_eq!(rsp.ask("qqemu.sstepbits")?, "ENABLE=1");
    assert_eq!(rsp.ask("M500,2:3412")?, "E0e");
    assert_eq!(rsp.ask("Pb=0000000000000000")?, "E0e");
    assert_eq!(rsp.ask("Z1,f0009,1")?, "OK");
    assert!(rsp.ask("vCont;c:p1.-1")?.contains("hwbreak"));
    assert_eq!(rsp.ask("m500,2")?, "0400");
    assert_eq!(rsp.ask("z1,f0009,1")?, "OK");
    assert_eq!(rsp.ask("vCont;c:p1.-1")?, "W01");
    assert_eq!(vm.wait_exit(LONG)?, 1);
    assert!(vm.log().contains("a debugger may not change a machine that is protected, recorded or replayed"));
    // What was recorded under a debugger replays without one.
    let replay = format!("shift=3,rr=replay,rrfile={file}");
    let mut vm = small(&scratch, "vm", &["-icount", &replay])?;
    vm.qmp()?.command("cont", Value::Null)?;
    ends_well(&mut vm)?;
    assert!(vm.log().contains("replay ended"), "{}", vm.log());
    Ok(())
}

#[test]
fn nonsense_from_a_debugger_ends_its_connection_and_nothing_else() -> Result<()> {
    let scratch = Scratch::new("gdbbad")?;
    let port = free_port()?;
    let vm = small(&scratch, "vm", &["-gdb", &format!("tcp:{port}")])?;
    let mut seed = 1u64;
    for round in 0..40 {
        let mut rsp = Rsp::connect(port)?;
        let noise: Vec<u8> = (0..400)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if round % 2 == 0 {
                    (seed >> 33) as u8
                } else {
                    b"$#mMgGpPzZvCont;:,0123x"[(seed >> 33) as usize % 23]
                }
            })
            .collect();
        let _ = rsp.raw(&noise);
    }
    let mut rsp = Rsp::connect(port)?;
    assert_eq!(rsp.ask("m500,2")?, "0000");
    assert_eq!(vm.qmp()?.command("query-status", Value::Null)?["running"], false);
    Ok(())
}

/// Record a tiny guest's life; the arguments that replay it.
fn recorded(scratch: &Scratch, words: &str, more: &str) -> Result<String> {
    let file = scratch.path("run.rr");
    let rr = |mode: &str| format!("-nic none -no-reboot {more} -icount shift=3,rr={mode},rrfile={file}");
    let mut vm = start_tiny(scratch, "recorded", words, &rr("record"))?;
    ends_well(&mut vm)?;
    Ok(rr("replay"))
}

#[test]
fn a_replayed_kernel_goes_back_to_the_write_that_changed_a_value() -> Result<()> {
    let Some(elf) = symbols(&tiny()?.0)? else { return Ok(()) };
    let scratch = Scratch::new("gdbback")?;
    let words = "halt nokaslr";
    let replay = recorded(&scratch, words, "-smp 2")?;
    let port = free_port()?;
    let mut vm = start_tiny(&scratch, "vm", words, &format!("{replay} -S -gdb tcp:{port}"))?;
    let commands = [
        "break machine_power_off",
        "continue",
        "monitor info replay",
        "watch *(unsigned long*)&jiffies",
        "reverse-continue",
        "bt 1",
        "p/x $rip",
        "reverse-stepi",
        "stepi",
        "p/x $rip",
        "stepi",
        "reverse-continue",
        "delete 2",
        "tbreak start_kernel",
        "reverse-continue",
        "reverse-continue",
        "p/x $rip",
        "monitor info replay",
        "continue",
        "p *(unsigned long*)&jiffies",
        "delete",
        "continue",
        "detach",
    ];
    let text = gdb(Some(&elf), &port.to_string(), &commands, LONG)?;
    in_order(
        &text,
        &[
            "hit Breakpoint 1, ",
            " in machine_power_off ()",
            "Hardware watchpoint 2: *(unsigned long*)&jiffies",
            "hit Hardware watchpoint 2: *(unsigned long*)&jiffies",
            "Old value = ",
            "New value = ",
            " in tick_do_update_jiffies64 ()",
            "$1 = 0xffffffff",
            "$2 = 0xffffffff",
            "hit Hardware watchpoint 2: *(unsigned long*)&jiffies",
            "hit Hardware watchpoint 2: *(unsigned long*)&jiffies",
            "Temporary breakpoint 3",
            " in start_kernel ()",
            "No more reverse-execution history.",
            "$3 = 0xfff0",
            "hit Breakpoint 1, ",
            " in machine_power_off ()",
            "$4 = 4",
            "No more reverse-execution history.",
        ],
    );
    assert!(text.contains("instruction count = 0"), "{text}");
    let value = |what: &str| -> Vec<u64> {
        text.split(what).skip(1).filter_map(|t| t.lines().next()?.trim().parse().ok()).collect()
    };
    // Back, the one before; forth and back over the same write.
    let (old, new) = (value("Old value = "), value("New value = "));
    assert_eq!((old.len(), new.len()), (3, 3), "{text}");
    assert!(old[0] > new[0] && (old[1], new[1]) == (new[0], old[0]) && (old[2], new[2]) == (old[0], new[0]));
    let rip = |n: u32| text.split(&format!("${n} = ")).nth(1).and_then(|t| t.lines().next());
    assert_eq!(rip(1), rip(2), "one back and one forth");
    ends_well(&mut vm)?;
    assert!(
        vm.log().contains("replay ended at position") && vm.log().contains("state hashes equal"),
        "{}",
        vm.log()
    );
    Ok(())
}

#[test]
fn positions_of_a_replay_are_reached_exactly_from_both_sides() -> Result<()> {
    let scratch = Scratch::new("gdbseek")?;
    let port = free_port()?;
    let gdb = format!("tcp:{port}");
    let file = scratch.path("run.rr");
    let rr = |mode: &str| format!("shift=3,rr={mode},rrfile={file}");
    let mut vm = small(&scratch, "vm", &["-icount", &rr("record")])?;
    vm.qmp()?.command("cont", Value::Null)?;
    assert_eq!(vm.wait_exit(LONG)?, 1);
    let mut vm = small(&scratch, "vm", &["-icount", &rr("replay"), "-gdb", &gdb])?;
    let (mut qmp, mut rsp) = (vm.qmp()?, Rsp::connect(port)?);
    assert!(rsp.ask("qSupported:multiprocess+;swbreak+;hwbreak+")?.contains("ReverseContinue+"));
    assert_eq!(rsp.ask("Hgp1.1")?, "OK");
    let at = |qmp: &mut Qmp| {
        qmp.command("query-replay", Value::Null).map(|r| (r["mode"].clone(), r["icount"].clone()))
    };
    let (play, refused) = (json!("play"), "nothing else can happen to it");
    assert_eq!(at(&mut qmp)?, (play.clone(), json!(0)));
    assert!(qmp.command("system_reset", Value::Null).is_err_and(|e| e.contains(refused)));
    // The far jump, mov; then four times inc and loop.
    assert_eq!(rsp.ask("Z2,500,2")?, "OK");
    for round in 1..=4 {
        assert!(rsp.ask("vCont;c:p1.-1")?.contains("watch:"));
        assert_eq!(rsp.ask("m500,2")?, format!("0{round}00"));
    }
    for round in (0..4).rev() {
        assert!(rsp.ask("bc")?.contains("watch:"));
        assert_eq!((rsp.ask("m500,2")?, rsp.register(RIP)?), (format!("0{round}00"), 3));
        assert_eq!(at(&mut qmp)?.1, json!(2 + 2 * round));
    }
    assert!(rsp.ask("bc")?.contains("replaylog:begin"));
    assert_eq!((at(&mut qmp)?.1, rsp.register(RIP)?), (json!(0), 0xFFF0));
    assert!(rsp.ask("bs")?.contains("replaylog:begin"));
    assert_eq!(rsp.ask("z2,500,2")?, "OK");
    // A breakpoint at the loop: the third time, from both sides; steps.
    assert_eq!(rsp.ask("Z0,f0007,1")?, "OK");
    for _ in 0..3 {
        assert!(rsp.ask("vCont;c:p1.-1")?.contains("swbreak"));
    }
    assert_eq!(at(&mut qmp)?.1, json!(7));
    assert!(rsp.ask("vCont;s:p1.1;c:p1.-1")?.contains("05"));
    assert!(rsp.ask("bs")?.contains("05"));
    assert_eq!((at(&mut qmp)?.1, rsp.register(RIP)?), (json!(7), 7));
    assert!(rsp.ask("bc")?.contains("swbreak"));
    assert_eq!((at(&mut qmp)?.1, rsp.ask("m500,2")?), (json!(5), "0200".into()));
    assert_eq!(rsp.ask("M500,2:0000")?, "E0e");
    assert_eq!(rsp.ask("z0,f0007,1")?, "OK");
    // By the monitors, past the debugger.
    for icount in [9, 1, 10, 0] {
        qmp.command("replay-seek", json!({"icount": icount}))?;
        ftvm_harness::wait_for("the position", LONG, || {
            let still = qmp.command("query-status", Value::Null).is_ok_and(|s| s["running"] == false);
            (still && at(&mut qmp).is_ok_and(|a| a.1 == json!(icount))).then_some(())
        })?;
    }
    qmp.command("replay-break", json!({"icount": 4}))?;
    qmp.command("cont", Value::Null)?;
    ftvm_harness::wait_for("the break", LONG, || {
        qmp.command("query-status", Value::Null).is_ok_and(|s| s["status"] == "paused").then_some(())
    })?;
    assert_eq!(at(&mut qmp)?.1, json!(4));
    assert!(qmp.command("replay-break", json!({"icount": 3})).is_err_and(|e| e.contains("in the past")));
    assert!(rsp.ask("vCont;c:p1.-1")?.contains("replaylog:end"));
    drop(rsp);
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}

/// Debian's whole life, from its kernel's start to the power-off: back from there to each write of `system_state`.
#[test]
fn a_replayed_debian_goes_back_through_its_whole_life() -> Result<()> {
    if !long("debugging Debian backwards") {
        return Ok(());
    }
    let built = std::path::Path::new(&debian()?).parent().map(|d| d.to_path_buf()).unwrap_or_default();
    let path = |name: &str| built.join(name).display().to_string();
    let Some(elf) = symbols(&path("debian-vmlinuz"))? else { return Ok(()) };
    let scratch = Scratch::new("gdbdebian")?;
    let (file, image) = (scratch.path("run.rr"), scratch.path("vm.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &debian()?, &image])?;
    let drive = format!("file={image},if=virtio");
    let append = "root=UUID=f7f7f7f7-0000-4000-8000-000000000001 rw console=ttyS0 nokaslr";
    let (kernel, initrd) = (path("debian-vmlinuz"), path("debian-initrd"));
    let args =
        ["-m", "512M", "-smp", "2", "-drive", &drive, "-nic", "none", "-no-reboot", "-kernel", &kernel];
    let args = [&args[..], &["-initrd", &initrd, "-append", append]].concat();
    let rr = |mode: &str| format!("shift=auto,rr={mode},rrfile={file}");
    let mut vm = start(&scratch, "recorded", &[&args[..], &["-icount", &rr("record")]].concat())?;
    vm.wait_console("GUEST READY", 3 * LONG)?;
    vm.qmp()?.command("system_powerdown", Value::Null)?;
    ends_well(&mut vm)?;
    let port = free_port()?;
    let gdb_at = format!("tcp:{port}");
    let replay = ["-icount", &rr("replay"), "-S", "-gdb", &gdb_at];
    let mut vm = start(&scratch, "vm", &[&args[..], &replay].concat())?;
    let commands = [
        "break machine_power_off",
        "continue",
        "monitor info replay",
        "print *(int*)&system_state",
        "watch *(int*)&system_state",
        "reverse-continue",
        "bt 3",
        "reverse-stepi",
        "reverse-stepi",
        "stepi",
        "stepi",
        "reverse-continue",
        "bt 3",
        "monitor info replay",
        "delete",
        "break vfs_write",
        "continue",
        "delete",
        "monitor info replay",
        "detach",
    ];
    let started = std::time::Instant::now();
    let text = gdb(Some(&elf), &port.to_string(), &commands, 4 * LONG)?;
    println!("{text}\n{:.1} s with gdb", started.elapsed().as_secs_f64());
    in_order(
        &text,
        &[
            " in machine_power_off ()",
            "$1 = 5",
            "Hardware watchpoint 2: *(int*)&system_state",
            "Old value = 5",
            "New value = 3",
            "kernel_power_off ()",
            "Old value = 3",
            "New value = 2",
            " in kernel_init ()",
            " in vfs_write ()",
        ],
    );
    ends_well(&mut vm)?;
    println!("{}", vm.log());
    assert!(vm.log().contains("state hashes equal"), "{}", vm.log());
    Ok(())
}
