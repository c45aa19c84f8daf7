//! A recorded machine goes the same way whichever tier of the processor executes it: interpreted, compiled at once, or
//! the one or the other by chance. The recording's hashes of the whole state say so.

mod common;

use common::*;
use ftvm::assembly::Blueprint;
use ftvm::cli::{self, Request};
use ftvm::lockstep::log::Entry;
use ftvm::machine::{DebugStop, Machine, Reason};
use ftvm::runtime::live::{follow_entry, Followed};
use ftvm::runtime::record::Player;
use ftvm_accel::debug::Watch;
use ftvm_accel::tcg::Tier;
use ftvm_accel::DebugPoints;
use ftvm_harness::guests::{debian, run};
use ftvm_harness::{Result, Scratch};

/// Follow a recording to its end on one tier, in pieces of `chunk` instructions; how many hashes agreed.
fn follow(args: &[String], tier: Tier, chunk: u64) -> Result<u64> {
    follow_watched(args, tier, chunk, &mut |_, _| {})
}

/// As [`follow`]; `look` is called behind each piece, and where a debugger's points stopped it.
fn follow_watched(
    args: &[String],
    tier: Tier,
    chunk: u64,
    look: &mut dyn FnMut(&mut Machine, Option<DebugStop>),
) -> Result<u64> {
    let Request::Run(config) = cli::parse(args).map_err(|e| e.to_string())? else {
        return Err("help".into());
    };
    let path = config.machine.icount.replay.clone().ok_or("no recording")?;
    let (mut player, header) = Player::open(&path).map_err(|e| e.to_string())?;
    let mut blueprint = Blueprint::new(&config.machine, &config.host.firmware_dirs, &header.drive_sizes)
        .map_err(|e| e.to_string())?;
    blueprint.pc.random_seed = header.seed;
    blueprint.pc.rtc_base_unix = header.rtc_base;
    blueprint.ns_per_instruction = header.ns_per_instruction;
    let mut machine = blueprint.build_with(|cpu| cpu.set_tier(tier)).map_err(|e| e.to_string())?;
    let mut hashes = 0;
    while let Some(entry) = player.peek().map_err(|e| e.to_string())?.cloned() {
        loop {
            match follow_entry(&mut machine, &entry, chunk, &mut Vec::new()) {
                Followed::Done => break,
                Followed::NotYet | Followed::Asked(_) => look(&mut machine, None),
                Followed::Stopped(stop) => look(&mut machine, Some(stop)),
                Followed::Differs(parts) => {
                    let at = machine.stamp();
                    return Err(format!("{tier:?}: the state differs at {at:?} in {}", parts.join(", ")));
                }
                Followed::End(outcome) => return Err(format!("{tier:?}: {outcome:?}")),
            }
        }
        player.done();
        hashes += u64::from(matches!(entry, Entry::Hash { .. }));
        if matches!(entry, Entry::End { .. }) {
            return Ok(hashes);
        }
    }
    Err("the recording breaks off".into())
}

/// Record `args` until the guest powers off, by the power button if `ready` is shown; follow the recording on `tiers`.
fn story(args: &[&str], ready: Option<&str>, tiers: &[(Tier, u64)]) -> Result<()> {
    let scratch = Scratch::new(&format!("tiers-{}", args.len()))?;
    let file = scratch.path("run.rr");
    let rr = |how: &str| format!("shift=auto,rr={how},rrfile={file}");
    let mut vm = start(&scratch, "recorded", &[args, &["-icount", &rr("record")]].concat())?;
    if let Some(mark) = ready {
        vm.wait_console(mark, 3 * LONG)?;
        vm.qmp()?.command("system_powerdown", serde_json::Value::Null)?;
    }
    ends_well(&mut vm)?;
    let mut replay: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    // As the recorded one was started.
    replay.extend(["-display", "none", "-serial", "null", "-icount", &rr("replay")].map(str::to_owned));
    for (tier, chunk) in tiers {
        let hashes = follow(&replay, *tier, *chunk)?;
        assert!(hashes > 2, "only {hashes} hashes");
        println!("{tier:?} in pieces of {chunk}: {hashes} hashes equal");
    }
    Ok(())
}

#[test]
fn benchmarks_and_processes_of_every_kind() -> Result<()> {
    let args = tiny_args("quiet bench halt")?;
    let args: Vec<&str> = args.iter().map(String::as_str).chain(["-no-reboot", "-nic", "none"]).collect();
    story(&args, None, &[(Tier::AtOnce, 1 << 22), (Tier::Random(1), 30_000)])
}

/// Break- and watchpoints that are hit and passed thousands of times, over a whole life, change nothing of it.
#[test]
fn a_debugger_that_looks_on_changes_nothing() -> Result<()> {
    let scratch = Scratch::new("tiers-debug")?;
    let file = scratch.path("run.rr");
    let rr = |how: &str| format!("shift=3,rr={how},rrfile={file}");
    let args = tiny_args("quiet halt")?;
    let args: Vec<&str> =
        args.iter().map(String::as_str).chain(["-smp", "2", "-no-reboot", "-nic", "none"]).collect();
    let mut vm = start(&scratch, "recorded", &[&args[..], &["-icount", &rr("record")]].concat())?;
    ends_well(&mut vm)?;
    let mut replay: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
    replay.extend(["-display", "none", "-serial", "null", "-icount", &rr("replay")].map(str::to_owned));
    // Where the first processor comes by, and what it has on its stack then.
    let mut places = Vec::new();
    let hashes = follow_watched(&replay, Tier::After(30), 9_999_991, &mut |machine, _| {
        let view = machine.view(0).expect("registers");
        places.push((view.registers.rip, view.gpr[4] & !7));
    })?;
    let mut points = DebugPoints::default();
    for (n, (rip, stack)) in places.iter().enumerate() {
        points.breaks.insert(*rip);
        if n % 8 == 0 {
            points.watches.push(Watch { start: *stack, len: 8, reads: n % 16 == 0, writes: true });
        }
    }
    assert!(points.breaks.len() > 20, "{}", points.breaks.len());
    {
        let tier = Tier::After(30);
        // None stays for more than a thousand hits: some are in loops.
        let (mut points, mut hits, mut set) = (points.clone(), std::collections::HashMap::new(), false);
        let (mut breaks, mut watches) = (0, 0);
        let same = follow_watched(&replay, tier, 1 << 22, &mut |machine, stop| {
            let Some(stop) = stop else {
                if !std::mem::replace(&mut set, true) {
                    assert!(machine.set_debug(Some(&points)));
                }
                return;
            };
            let at = match stop.reason {
                Reason::Break(at) => {
                    breaks += 1;
                    let view = machine.view(stop.cpu).expect("registers");
                    assert_eq!(view.registers.rip, at);
                    at
                }
                Reason::Watch(watch) => {
                    watches += 1;
                    watch.start
                }
                Reason::Step | Reason::Begin | Reason::End => unreachable!(),
            };
            let count = hits.entry(at).or_insert(0);
            *count += 1;
            if *count == 1000 {
                points.breaks.remove(&at);
                points.watches.retain(|w| w.start != at);
                machine.set_debug(Some(&points));
            }
        })?;
        assert_eq!(same, hashes);
        println!("{tier:?}: {breaks} breakpoints, {watches} watchpoints, {same} hashes equal");
        assert!(breaks > 1000 && watches > 100);
    }
    Ok(())
}

/// Messages, memory-mapped configuration space, devices behind ports.
#[test]
fn a_q35() -> Result<()> {
    let scratch = Scratch::new("tiers-q35")?;
    let image = scratch.path("vm.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
    let drive = format!("file={image},if=none,id=d");
    let ports = ["one,chassis=1,addr=1.0,multifunction=on", "two,chassis=2,addr=1.1"];
    let ports = ports.map(|p| format!("pcie-root-port,id={p}"));
    let args = tiny_args("quiet spin halt")?;
    let more = ["-machine", "q35", "-smp", "2", "-no-reboot", "-nic", "none", "-drive", &drive, "-device"];
    let devices = [&ports[0], "-device", &ports[1], "-device", "virtio-blk-pci,bus=one,drive=d", "-device"];
    let usb = ["qemu-xhci,bus=two", "-device", "usb-tablet"];
    let args: Vec<&str> = args.iter().map(String::as_str).chain(more).chain(devices).chain(usb).collect();
    story(&args, None, &[(Tier::AtOnce, 1 << 22), (Tier::Random(1), 30_000)])
}

/// With `max` the C library takes its AVX2 routines.
#[test]
fn a_boot_of_debian() -> Result<()> {
    if !long("a boot of Debian on tiers chosen by chance") {
        return Ok(());
    }
    let scratch = Scratch::new("tiers-debian")?;
    let image = scratch.path("vm.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &debian()?, &image])?;
    let drive = format!("file={image},if=virtio");
    let args = ["-m", "512M", "-cpu", "max", "-smp", "2", "-drive", &drive, "-nic", "none", "-no-reboot"];
    story(&args, Some("GUEST READY"), &[(Tier::Random(7), 50_000), (Tier::Never, 1 << 22)])
}
