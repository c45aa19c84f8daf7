//! A protected machine and what can happen to it, with real processes on hosts that are network
//! namespaces, and clients that remember every acknowledged answer.

use std::io::Write;
use std::time::Duration;

use ftvm_harness::gdb::Rsp;
use ftvm_harness::hosts::Network;
use ftvm_harness::pair::{Clients, Guest, Pair, BITMAP};
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{bitmaps, guests, run_stories, wait_for, Result};
use serde_json::{json, Value};

const WAIT: Duration = Duration::from_secs(60);

fn clients(pair: &Pair, tag: &str) -> Clients {
    Clients::start(pair, 8080, "HTTP/1.1 200", tag)
}

/// Primary and backup are killed in turn; a new backup is made each time.
fn kills() -> Result<()> {
    let mut pair = Pair::start("kills", Guest::Tiny, "")?;
    let clients = clients(&pair, "kills");
    for round in 0..3 {
        let took = pair.protect()?;
        clients.wait_progress(30, WAIT)?;
        let ft = pair.kill_primary()?;
        println!("round {round}: protected in {took:.1?}, failover {}", ft["last-failover"]);
        clients.wait_progress(20, WAIT)?;
        pair.protect()?;
        clients.wait_progress(20, WAIT)?;
        pair.kill_backup()?;
        clients.wait_progress(20, WAIT)?;
    }
    for (name, seen) in clients.finish()? {
        println!("{name}: {} answers, longest pause {:.0?}", seen.answers, seen.longest);
    }
    pair.finish(false)
}

/// The primary is frozen for longer than the timeout; it must halt when it wakes, its late writes harmless.
fn stall() -> Result<()> {
    let mut pair = Pair::start("stall", Guest::Tiny, "")?;
    let clients = clients(&pair, "stall");
    pair.protect()?;
    clients.wait_progress(30, WAIT)?;
    pair.stall_backup(&clients)?;
    for _ in 0..2 {
        pair.protect()?;
        clients.wait_progress(30, WAIT)?;
        pair.stall_primary(Duration::from_secs(2))?;
        clients.wait_progress(30, WAIT)?;
    }
    clients.finish()?;
    pair.finish(false)
}

/// Where the guest handles this interrupt, by its interrupt descriptor table.
fn interrupt_handler(qmp: &mut Qmp, rsp: &mut Rsp, vector: u64) -> Result<u64> {
    let text = qmp.command("human-monitor-command", json!({"command-line": "info registers"}))?;
    let table = text.as_str().and_then(|t| t.split("IDT=").nth(1)?.get(..16)).unwrap_or_default();
    let table = u64::from_str_radix(table, 16).map_err(|e| format!("{text}: {e}"))?;
    let gate = rsp.ask(&format!("m{:x},10", table + 16 * vector))?;
    let byte = |i: usize| gate.get(2 * i..2 * i + 2).and_then(|b| u64::from_str_radix(b, 16).ok());
    let offset = [11, 10, 9, 8, 7, 6, 1, 0].into_iter().try_fold(0, |v, i| Some(v << 8 | byte(i)?));
    offset.ok_or_else(|| format!("interrupt {vector:#x} has the gate '{gate}'"))
}

/// A debugger stops both sides in the same place, and the pair stays one.
fn debugged() -> Result<()> {
    const RIP: usize = 16;
    let mut pair = Pair::start("debugged", Guest::Tiny, "")?;
    let clients = clients(&pair, "debugged");
    pair.protect()?;
    clients.wait_progress(30, WAIT)?;
    let socket = pair.scratch.path("gdb");
    let serve = json!({"command-line": format!("gdbserver unix:{socket},server=on,wait=off")});
    pair.qmp()?.command("human-monitor-command", serve)?;
    let mut rsp = Rsp::unix(&socket)?;
    assert!(rsp.ask("qSupported:multiprocess+;swbreak+;hwbreak+")?.contains("PacketSize="));
    let other = pair.other();
    let mut there = pair.hosts[other].as_ref().ok_or("there is no backup")?.qmp()?;
    let mut here = pair.qmp()?;
    let same_place = |here: &mut Qmp, there: &mut Qmp| -> Result<()> {
        assert_eq!(here.ft()?["state"], "protected");
        let registers = json!({"command-line": "info registers"});
        let ours = here.command("human-monitor-command", registers.clone())?;
        assert!(ours.as_str().is_some_and(|text| text.contains("RIP=")), "{ours}");
        let mut theirs = Value::Null;
        wait_for("the backup in the same place", WAIT, || {
            theirs = there.command("human-monitor-command", registers.clone()).ok()?;
            (ours == theirs).then_some(())
        })
        .map_err(|e| format!("{e}: {ours}\n{theirs}"))
    };
    // It stands still for longer than a side may be silent.
    std::thread::sleep(Duration::from_secs(2));
    same_place(&mut here, &mut there)?;
    // Where it happens to be, some times; to one of these places it comes again.
    let mut places = Vec::new();
    for _ in 0..6 {
        places.push(rsp.register(RIP)?);
        rsp.send("vCont;c:p1.-1")?;
        std::thread::sleep(Duration::from_millis(100));
        rsp.raw(b"\x03")?;
        assert!(rsp.receive()?.is_some_and(|s| s.starts_with("T02")));
    }
    places.sort_unstable();
    places.dedup();
    for at in &places {
        assert_eq!(rsp.ask(&format!("Z0,{at:x},1"))?, "OK");
    }
    for _ in 0..3 {
        let stop = rsp.ask("vCont;c:p1.-1")?;
        assert!(stop.starts_with("T05") && stop.contains("swbreak"), "{stop}");
        let rip = rsp.register(RIP)?;
        assert!(places.contains(&rip), "{rip:#x} is not of {places:x?}");
        same_place(&mut here, &mut there)?;
        assert!(rsp.ask("vCont;s:p1.1;c:p1.-1")?.starts_with("T05"));
        same_place(&mut here, &mut there)?;
    }
    assert_eq!(rsp.ask("P10=0d00000000000000")?, "E0e", "the backup would not have the change");
    for at in &places {
        assert_eq!(rsp.ask(&format!("z0,{at:x},1"))?, "OK");
    }
    // Where an interrupt has just been delivered, and no instruction has followed: at the handler of Linux' timer.
    let handler = interrupt_handler(&mut here, &mut rsp, 0xEC)?;
    assert_eq!(rsp.ask(&format!("Z0,{handler:x},1"))?, "OK");
    for _ in 0..3 {
        assert!(rsp.ask("vCont;c:p1.-1")?.starts_with("T05"));
        assert_eq!(rsp.register(RIP)?, handler);
        same_place(&mut here, &mut there)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(rsp.ask(&format!("z0,{handler:x},1"))?, "OK");
    assert_eq!(rsp.ask("D;1")?, "OK");
    drop((rsp, here, there));
    clients.wait_progress(20, WAIT)?;
    // And the backup takes over as ever.
    pair.kill_primary()?;
    clients.wait_progress(20, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// The hosts are cut from each other while both reach storage and clients.
fn cut() -> Result<()> {
    let mut pair = Pair::start("cut", Guest::Tiny, "")?;
    let clients = clients(&pair, "cut");
    for _ in 0..2 {
        pair.protect()?;
        clients.wait_progress(30, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
        pair.cut_apart()?;
        clients.wait_progress(30, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
    }
    clients.finish()?;
    pair.finish(false)
}

/// Backup and primary move round three hosts, and hosts die in between.
fn moves() -> Result<()> {
    let long = std::env::var_os("FTVM_LONG").is_some_and(|v| v != "0");
    let (guest, rounds) = if long { (Guest::Debian, 20) } else { (Guest::Tiny, 4) };
    let mut pair = Pair::start("pair-moves", guest, "")?;
    let clients = match guest {
        Guest::Debian => Clients::start(&pair, 80, "ftvm guest", "moves").with_ssh(&pair),
        Guest::Tiny | Guest::Screen => clients(&pair, "moves"),
    };
    pair.protect()?;
    for round in 0..rounds {
        clients.wait_progress(10, WAIT).map_err(|e| format!("round {round}: {e}\n{}", pair.logs()))?;
        let took = pair.move_backup().map_err(|e| format!("round {round}: {e}"))?;
        println!("round {round}: the backup moved within {took:.1?}");
        if round % 4 == 3 {
            clients.wait_progress(10, WAIT)?;
            pair.kill_primary()?;
            clients.wait_progress(10, WAIT)?;
            pair.protect()?;
        } else if round % 2 == 1 {
            // With the roles changed, the next move is the old primary's.
            pair.switch()?;
        }
    }
    for (name, seen) in clients.finish()? {
        println!("{name}: {} answers, longest pause {:.0?}", seen.answers, seen.longest);
    }
    pair.finish(guest == Guest::Debian)
}

/// The backup's host has bad memory: the difference is found, the backup made anew, and the new one is good.
fn divergence() -> Result<()> {
    let mut pair = Pair::start("divergence", Guest::Tiny, "")?;
    let clients = clients(&pair, "divergence");
    pair.protect()?;
    clients.wait_progress(30, WAIT)?;
    pair.corrupt_backup()?;
    clients.wait_progress(30, WAIT)?;
    pair.kill_primary()?;
    clients.wait_progress(30, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// What an operator does to a pair: planned switches there and back, a new backup, a pause of the protection.
fn operations() -> Result<()> {
    let mut pair = Pair::start("operations", Guest::Tiny, "")?;
    let clients = clients(&pair, "operations");
    let error = pair.qmp()?.command("ft-test-failover", serde_json::Value::Null).err().unwrap_or_default();
    if !error.contains("the machine is unprotected, not protected") {
        return Err(format!("a switch without a backup: {error:?}"));
    }
    pair.protect()?;
    for _ in 0..2 {
        clients.wait_progress(20, WAIT)?;
        let ft = pair.switch()?;
        println!("switched: {}", ft["last-failover"]);
        clients.wait_progress(20, WAIT)?;
    }
    pair.restart_backup()?;
    clients.wait_progress(20, WAIT)?;
    pair.suspend()?;
    clients.wait_progress(20, WAIT)?;
    let refused = pair.refused_backup()?;
    if !refused.contains("fault tolerance is suspended") {
        return Err(format!("a backup while suspended: {refused:?}"));
    }
    pair.qmp()?.command("ft-resume", serde_json::Value::Null)?;
    pair.protect()?;
    pair.kill_primary()?;
    clients.wait_progress(20, WAIT)?;
    for (name, seen) in clients.finish()? {
        println!("{name}: {} answers, longest pause {:.0?}", seen.answers, seen.longest);
    }
    pair.finish(false)
}

/// A machine that runs without protection is given it, and it is taken away again.
fn turned_on_and_off() -> Result<()> {
    let mut pair = Pair::start_plain("turned-on", Guest::Tiny)?;
    let clients = clients(&pair, "turned-on");
    clients.wait_progress(20, WAIT)?;
    let error = pair.qmp()?.command("ft-turn-off", serde_json::Value::Null).err().unwrap_or_default();
    if !error.contains("no primary") {
        return Err(format!("turned off what is not on: {error:?}"));
    }
    for _ in 0..2 {
        pair.qmp()?.command("ft-turn-on", serde_json::json!({"timeout": 800}))?;
        pair.protect()?;
        clients.wait_progress(20, WAIT)?;
        pair.turn_off()?;
        clients.wait_progress(20, WAIT)?;
    }
    pair.qmp()?.command("ft-turn-on", serde_json::Value::Null)?;
    pair.protect()?;
    clients.wait_progress(20, WAIT)?;
    // Its arguments do not speak of a pair; it becomes the other's backup all the same.
    pair.switch()?;
    clients.wait_progress(20, WAIT)?;
    pair.kill_primary()?;
    clients.wait_progress(20, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// Each host has a disk of its own: copied when the pair is made, written by both, brought up to date after a loss.
fn separate_disks() -> Result<()> {
    let mut pair = Pair::start_separate("separate", Guest::Tiny)?;
    let clients = clients(&pair, "separate");
    clients.wait_progress(20, WAIT)?;
    println!("protected in {:.1?}", pair.protect()?);
    clients.wait_progress(30, WAIT)?;
    pair.kill_primary()?;
    clients.wait_progress(30, WAIT)?;
    println!("protected again in {:.1?}", pair.protect()?);
    clients.wait_progress(20, WAIT)?;
    pair.switch()?;
    clients.wait_progress(20, WAIT)?;
    pair.kill_backup()?;
    clients.wait_progress(20, WAIT)?;
    pair.protect()?;
    pair.stall_primary(Duration::from_secs(2))?;
    clients.wait_progress(20, WAIT)?;
    pair.protect()?;
    clients.wait_progress(20, WAIT)?;
    clients.finish()?;
    pair.qmp()?.command("quit", serde_json::Value::Null)?;
    for host in [pair.live, pair.other()] {
        if let Some(vm) = &mut pair.hosts[host] {
            let status = vm.wait_exit(Duration::from_secs(30))?;
            if status != 0 {
                return Err(format!("host {host} ended with {status}\n{}", vm.log()));
            }
        }
    }
    pair.compare_images()
}

/// The bitmap that the image came with, as the monitor of the live side shows it.
fn bitmap(pair: &mut Pair) -> Result<Value> {
    let block = pair.qmp()?.command("query-block", Value::Null)?;
    let list = block[0]["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    Ok(list.into_iter().find(|b| b["name"] == BITMAP).unwrap_or_default())
}

/// A bitmap that the image keeps goes on while the machine stays on its host, with a backup and after the loss of one, and
/// has everything that was written. After a takeover nobody believes it; when the pair is over it can be taken away, and
/// another begun.
fn kept_bitmaps() -> Result<()> {
    let starts: [fn(&str) -> Result<Pair>; 2] =
        [|name| Pair::start(name, Guest::Tiny, ""), |name| Pair::start_separate(name, Guest::Tiny)];
    for (n, start) in starts.into_iter().enumerate() {
        let mut pair = start(&format!("bitmaps{n}"))?;
        let clients = clients(&pair, "bitmaps");
        for _ in 0..2 {
            pair.protect()?;
            clients.wait_progress(20, WAIT)?;
            pair.kill_backup()?;
            clients.wait_progress(20, WAIT)?;
        }
        pair.protect()?;
        let shown = bitmap(&mut pair)?;
        if shown["recording"] != true || shown["count"].as_u64() == Some(0) {
            return Err(format!("on the first host the bitmap is {shown}"));
        }
        clients.finish()?;
        let (before, image) = (pair.scratch.path("fs.raw"), pair.image.clone());
        pair.qmp()?.command("quit", Value::Null)?;
        pair.live_vm()?.wait_exit(WAIT)?;
        let differ = bitmaps::covers(&before, &image, BITMAP)?;
        println!("{differ} blocks were written, and the bitmap has them");
        if differ == 0 {
            return Err("the guest has written nothing".into());
        }
        pair.check_image()?;
        // Its network's addresses are those of the next.
        drop(pair);

        let mut pair = start(&format!("bitmaps{n}"))?;
        let clients = self::clients(&pair, "bitmaps");
        pair.protect()?;
        clients.wait_progress(20, WAIT)?;
        pair.kill_primary()?;
        clients.wait_progress(20, WAIT)?;
        let shown = bitmap(&mut pair)?;
        if shown["inconsistent"] != true || shown["recording"] != false {
            return Err(format!("after the takeover the bitmap is {shown}"));
        }
        let named = |name: &str| json!({"node": "virtio0", "name": name, "persistent": true});
        let only = |name: &str| json!({"node": "virtio0", "name": name});
        let refused = |pair: &mut Pair, command: &str, part: &str| {
            let said = pair.qmp()?.command(command, only(BITMAP)).err().unwrap_or_default();
            if said.contains(part) {
                Ok(())
            } else {
                Err(format!("{command}: '{said}' is not '{part}'"))
            }
        };
        refused(&mut pair, "block-dirty-bitmap-remove", "refused while fault tolerance is on")?;
        pair.protect()?;
        clients.wait_progress(20, WAIT)?;
        pair.turn_off()?;
        refused(&mut pair, "block-dirty-bitmap-enable", "is inconsistent and cannot be used")?;
        let mut qmp = pair.qmp()?;
        qmp.command("block-dirty-bitmap-remove", only(BITMAP))?;
        qmp.command("block-dirty-bitmap-add", named("next"))?;
        drop(qmp);
        clients.wait_progress(20, WAIT)?;
        clients.finish()?;
        let image = pair.image_of(pair.live).to_owned();
        pair.qmp()?.command("quit", Value::Null)?;
        pair.live_vm()?.wait_exit(WAIT)?;
        pair.check_image()?;
        let info = guests::run("qemu-img", &["info", "--output=json", &image])?;
        let flags = (bitmaps::flags(&info, BITMAP)?, bitmaps::flags(&info, "next")?);
        if flags != (None, Some(vec!["auto".to_owned()])) {
            return Err(format!("the old bitmap and the new one are {flags:?}"));
        }
    }
    Ok(())
}

/// What does not fit is refused with the difference, and the machine goes on.
fn refusals() -> Result<()> {
    let mut pair = Pair::start("refusals", Guest::Tiny, "")?;
    let peer = format!("backup,peer={}", Network::address(0));
    let other = pair.scratch.path("other.qcow2");
    guests::run("qemu-img", &["create", "-q", "-f", "qcow2", &other, "64M"])?;
    let drive = format!("file={other},if=virtio");
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec!["-m", "256M", "-ft", &peer], "-m differs"),
        (vec!["-smp", "2", "-ft", &peer], "-smp differs"),
        (vec!["-drive", &drive, "-ft", &peer], "drive 'virtio0'"),
        (vec!["-netdev", "tap,id=wrong,ifname=x", "-ft", &peer], "netdev 'wrong' differs"),
        (
            vec!["-netdev", "tap,id=n0,ifname=name-that-is-far-too-long", "-ft", &peer],
            "could not configure /dev/net/tun",
        ),
        (vec!["-ft", "backup,peer=10.77.0.11:1"], "cannot reach the primary"),
    ];
    for (args, part) in cases {
        let out = pair
            .net
            .on_host(1, &guests::ftvm()?)
            .args(&args)
            .args(["-display", "none", "-serial", "null"])
            .output()
            .map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        let last = text.lines().last().unwrap_or("");
        if out.status.code() != Some(1) || !text.contains(part) || !last.starts_with("ftvm: ") {
            return Err(format!("{args:?}: status {:?}, said {text}", out.status.code()));
        }
    }
    // Garbage on the logging channel.
    let client = pair.net.client();
    std::thread::spawn(move || -> Result<()> {
        client.enter()?;
        for junk in [
            &b"GET / HTTP/1.0\r\n\r\n"[..],
            b"ftvm-ft1\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"ftvm-ft1",
            b"",
        ] {
            let mut s = std::net::TcpStream::connect("10.77.0.11:8100").map_err(|e| e.to_string())?;
            let _ = s.write_all(junk);
        }
        Ok(())
    })
    .join()
    .map_err(|_| "panicked".to_owned())??;
    let clients = clients(&pair, "refusals");
    clients.wait_progress(10, WAIT)?;
    pair.protect()?;
    clients.wait_progress(10, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// The image gets a snapshot and another size while it is protected; the backup refuses both, takes over, and knows the
/// size, and so does a new backup.
fn images() -> Result<()> {
    let mut pair = Pair::start("images", Guest::Tiny, "")?;
    let clients = clients(&pair, "images");
    pair.protect()?;
    clients.wait_progress(20, WAIT)?;
    let mut backup = pair.hosts[pair.other()].as_ref().ok_or("no backup")?.qmp()?;
    let size = |mib: u64| serde_json::json!({"device": "virtio0", "size": mib << 20});
    let named = |name: &str| serde_json::json!({"device": "virtio0", "name": name});
    for (command, arguments) in
        [("block_resize", size(96)), ("blockdev-snapshot-internal-sync", named("never"))]
    {
        let error = backup.command(command, arguments).err().unwrap_or_default();
        if !error.contains("give the command to the primary") {
            return Err(format!("{command} on the backup: {error:?}"));
        }
    }
    drop(backup);
    let mut qmp = pair.qmp()?;
    qmp.command("blockdev-snapshot-internal-sync", named("before"))?;
    qmp.command("block_resize", size(96))?;
    clients.wait_progress(20, WAIT)?;
    let ft = qmp.ft()?;
    if ft["state"] != "protected" {
        return Err(format!("after the new size: {ft}"));
    }
    drop(qmp);
    pair.kill_primary()?;
    clients.wait_progress(20, WAIT)?;
    pair.protect()?;
    clients.wait_progress(20, WAIT)?;
    let block = pair.qmp()?.command("query-block", serde_json::Value::Null)?;
    let image = &block[0]["inserted"]["image"];
    if image["virtual-size"] != 96u64 << 20 || image["snapshots"][0]["name"] != "before" {
        return Err(format!("the new primary says {image}"));
    }
    pair.qmp()?.command("blockdev-snapshot-delete-internal-sync", named("before"))?;
    pair.kill_primary()?;
    clients.wait_progress(20, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// What the guest's driver draws on virtio's card is the same on both hosts, and it goes on drawing after a takeover; so
/// does a USB device that was plugged in on the way.
fn screen() -> Result<()> {
    if std::env::var_os("FTVM_LONG").is_none_or(|v| v == "0") {
        println!("skipped: the generic kernel takes a minute; FTVM_LONG=1 runs it");
        return Ok(());
    }
    let mut pair = Pair::start("screen", Guest::Screen, "")?;
    let clients = clients(&pair, "screen");
    pair.protect()?;
    clients.wait_progress(20, WAIT)?;
    fn shot(pair: &mut Pair) -> Result<Vec<u8>> {
        let path = pair.scratch.path("screen.ppm");
        pair.qmp()?.command("screendump", serde_json::json!({"filename": path}))?;
        std::fs::read(path).map_err(|e| e.to_string())
    }
    let usb = serde_json::json!({"command-line": "info usb"});
    let first = shot(&mut pair)?;
    pair.qmp()?.command("device_add", serde_json::json!({"driver": "usb-tablet", "id": "tab"}))?;
    // The kernel says so, and then is still.
    ftvm_harness::wait_for("the kernel's words on the screen", WAIT, || {
        (shot(&mut pair).ok()? != first).then_some(())
    })?;
    let mut before = shot(&mut pair)?;
    ftvm_harness::wait_for("a screen that is still", WAIT, || {
        std::thread::sleep(Duration::from_secs(2));
        let last = std::mem::replace(&mut before, shot(&mut pair).ok()?);
        (last == before).then_some(())
    })?;
    let lit = before.iter().skip(16).filter(|b| **b != 0).count();
    if !before.starts_with(b"P6\n1280 800\n") || lit < 10_000 {
        return Err(format!("a picture of {} bytes, {lit} of them not black", before.len()));
    }
    for round in 0..2 {
        let ft = pair.kill_primary()?;
        println!("screen: failover {}", ft["last-failover"]);
        if shot(&mut pair)? != before {
            return Err(format!("round {round}: after the takeover the picture is another"));
        }
        let said = pair.qmp()?.command("human-monitor-command", usb.clone())?;
        if !said.as_str().is_some_and(|t| t.contains("ID: tab")) {
            return Err(format!("round {round}: after the takeover: {said}"));
        }
        pair.qmp()?.command("inject-nmi", serde_json::Value::Null)?;
        ftvm_harness::wait_for("more on the screen", WAIT, || {
            (shot(&mut pair).ok()? != before).then_some(())
        })?;
        clients.wait_progress(20, WAIT)?;
        pair.protect()?;
        std::thread::sleep(Duration::from_secs(2));
        before = shot(&mut pair)?;
    }
    let mut qmp = pair.qmp()?;
    qmp.command("device_del", serde_json::json!({"id": "tab"}))?;
    qmp.wait_event("DEVICE_DELETED", WAIT)?;
    drop(qmp);
    clients.finish()?;
    pair.finish(false)
}

/// All in one process and one after the other: hosts have fixed addresses, and entering namespaces needs root.
fn main() {
    run_stories(
        "pair",
        &[
            ("kills", kills),
            ("stall", stall),
            ("debugged", debugged),
            ("cut", cut),
            ("moves", moves),
            ("divergence", divergence),
            ("operations", operations),
            ("separate_disks", separate_disks),
            ("turned_on_and_off", turned_on_and_off),
            ("images", images),
            ("kept_bitmaps", kept_bitmaps),
            ("refusals", refusals),
            ("screen", screen),
        ],
    );
}
