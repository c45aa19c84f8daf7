//! A machine that moves: between hosts that are network namespaces, into files and snapshots and back, with clients that
//! remember every acknowledged answer.

mod common;

use std::time::Duration;

use common::{ends_well, ext4, free_port, start_tiny, LONG};
use ftvm_harness::certs::Authority;
use ftvm_harness::client::Line;
use ftvm_harness::guests::run;
use ftvm_harness::moves::wait_migration;
use ftvm_harness::pair::{Clients, Guest, Pair};
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{run_stories, Result, Scratch};
use serde_json::{json, Value};

const WAIT: Duration = Duration::from_secs(60);

fn capability(name: &str) -> Value {
    json!({"capabilities": [{"capability": name, "state": true}]})
}

fn downtimes(mut all: Vec<u64>) -> String {
    all.sort_unstable();
    let at = |n: usize| all.get(n).copied().unwrap_or(0);
    format!("downtime median {} ms, longest {} ms", at(all.len() / 2), at(all.len().saturating_sub(1)))
}

/// Under load there and back again: every connection lives on, no answer is wrong or lost.
fn back_and_forth() -> Result<()> {
    let long = std::env::var_os("FTVM_LONG").is_some_and(|v| v != "0");
    let (guest, rounds) = if long { (Guest::Debian, 100) } else { (Guest::Tiny, 6) };
    let mut pair = Pair::start_plain("moves", guest)?;
    let clients = match guest {
        Guest::Debian => Clients::start(&pair, 80, "ftvm guest", "moves").with_ssh(&pair),
        Guest::Tiny | Guest::Screen => Clients::start(&pair, 8080, "HTTP/1.1 200", "moves"),
    };
    let mut stopped = Vec::new();
    for round in 0..rounds {
        clients.wait_progress(10, WAIT).map_err(|e| format!("round {round}: {e}\n{}", pair.logs()))?;
        let done = pair.move_machine().map_err(|e| format!("round {round}: {e}"))?;
        stopped.push(done["downtime"].as_u64().unwrap_or(u64::MAX));
    }
    clients.wait_progress(10, WAIT)?;
    println!("{rounds} moves under load: {}", downtimes(stopped));
    for (name, seen) in clients.finish()? {
        println!("{name}: {} answers, longest pause {:.0?}", seen.answers, seen.longest);
    }
    let mut idle = Vec::new();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(500));
        idle.push(pair.move_machine()?["downtime"].as_u64().unwrap_or(u64::MAX));
    }
    println!("3 moves of an idle guest: {}", downtimes(idle));
    pair.finish(guest == Guest::Debian)
}

/// Whatever goes wrong on the way, the machine goes on where it was.
fn failures_leave_the_source_running() -> Result<()> {
    let mut pair = Pair::start_plain("failures", Guest::Tiny)?;
    let clients = Clients::start(&pair, 8080, "HTTP/1.1 200", "failures");
    clients.wait_progress(10, WAIT)?;

    // Another machine is refused by what differs.
    pair.destination(&["-m", "256M"])?;
    let mut qmp = pair.begin_move()?;
    let failed = wait_migration(&mut qmp, WAIT)?;
    let text = failed["error-desc"].as_str().unwrap_or_default().to_owned();
    if failed["status"] != "failed" || !text.contains("memory was 192 MiB, is 256 MiB") {
        return Err(format!("another machine: {failed}"));
    }
    drop(qmp);
    let said = pair.expect_refusal()?;
    if !said.contains("memory was 192 MiB, is 256 MiB") {
        return Err(format!("the destination said: {said}"));
    }
    clients.wait_progress(10, WAIT)?;

    // The same memory but other devices is seen when the state arrives, after the source has let go of its image.
    pair.destination(&["-device", "virtio-rng-pci,id=more"])?;
    let mut qmp = pair.begin_move()?;
    let failed = wait_migration(&mut qmp, WAIT)?;
    if failed["status"] != "failed"
        || !failed["error-desc"].as_str().unwrap_or_default().contains("is missing")
    {
        return Err(format!("other devices: {failed}"));
    }
    drop(qmp);
    pair.expect_refusal()?;
    clients.wait_progress(10, WAIT)?;

    // The destination dies on the way.
    pair.destination(&[])?;
    pair.qmp()?.command("migrate-set-parameters", json!({"max-bandwidth": 8 << 20}))?;
    let mut qmp = pair.begin_move()?;
    std::thread::sleep(Duration::from_millis(300));
    let other = pair.other();
    if let Some(mut vm) = pair.hosts[other].take() {
        vm.kill();
    }
    let failed = wait_migration(&mut qmp, WAIT)?;
    if failed["status"] != "failed" {
        return Err(format!("the destination died: {failed}"));
    }
    drop(qmp);
    clients.wait_progress(10, WAIT)?;

    // The user changes his mind, twice: on the way, and when the machine stands still.
    for stop in [false, true] {
        pair.destination(&[])?;
        let mut qmp = pair.qmp()?;
        let capabilities = json!([
            {"capability": "pause-before-switchover", "state": stop},
            {"capability": "events", "state": true},
        ]);
        qmp.command("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        let bandwidth: u64 = if stop { 0 } else { 8 << 20 };
        qmp.command("migrate-set-parameters", json!({"max-bandwidth": bandwidth}))?;
        qmp.command("migrate", json!({"uri": pair.destination_uri()}))?;
        if stop {
            ftvm_harness::wait_for("pre-switchover", WAIT, || {
                (qmp.command("query-migrate", Value::Null).ok()?["status"] == "pre-switchover").then_some(())
            })?;
            let refused = qmp.command("cont", Value::Null).err().unwrap_or_default();
            if !refused.contains("not finalized") {
                return Err(format!("cont in the middle: {refused:?}"));
            }
        }
        qmp.command("migrate_cancel", Value::Null)?;
        let cancelled = wait_migration(&mut qmp, WAIT)?;
        if cancelled["status"] != "cancelled" {
            return Err(format!("cancelled: {cancelled}"));
        }
        drop(qmp);
        pair.expect_refusal()?;
        clients.wait_progress(10, WAIT)?;
    }

    // And then it moves after all, when it is told to go on.
    pair.destination(&[])?;
    let mut qmp = pair.begin_move()?;
    ftvm_harness::wait_for("pre-switchover", WAIT, || {
        (qmp.command("query-migrate", Value::Null).ok()?["status"] == "pre-switchover").then_some(())
    })?;
    qmp.command("migrate-continue", json!({"state": "pre-switchover"}))?;
    let done = wait_migration(&mut qmp, WAIT)?;
    if done["status"] != "completed" {
        return Err(format!("{done}\n{}", pair.logs()));
    }
    drop(qmp);
    pair.arrive()?;
    clients.wait_progress(10, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// Only those who show the right certificates send a machine or take one; the source goes on otherwise.
fn with_certificates() -> Result<()> {
    let mut pair = Pair::start_plain("certificates", Guest::Tiny)?;
    let (authority, other) = (Authority::new("trusted")?, Authority::new("unknown")?);
    let addresses = ["10.77.0.11", "10.77.0.12", "10.77.0.13", "moves.example"];
    let good = authority.issue(&pair.scratch.path("good"), "moves.example", &addresses)?;
    let bad = other.issue(&pair.scratch.path("bad"), "moves.example", &addresses)?;
    let object = format!("tls-creds-x509,id=tls0,dir={good},endpoint=server");
    let authz = "authz-simple,id=auth0,identity=O=ftvm tests,,CN=moves.example";
    let nobody = "authz-simple,id=auth1,identity=O=ftvm tests,,CN=somebody.example";
    pair.destination(&["-object", &object, "-object", authz, "-object", nobody])?;
    let other = pair.other();
    let mut there = pair.hosts[other].as_ref().ok_or("there is no destination")?.qmp()?;
    let mut here = pair.qmp()?;
    for (id, dir) in [("good", &good), ("bad", &bad)] {
        let client = json!({"qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": "client"});
        here.command("object-add", client)?;
    }
    let missing = json!({"qom-type": "tls-creds-x509", "id": "x", "dir": pair.scratch.path("none")});
    let refused = here.command("object-add", missing).err().unwrap_or_default();
    assert!(
        refused.starts_with("Unable to access credentials ") && refused.contains("ca-cert.pem"),
        "{refused}"
    );
    for (creds, why) in
        [("nothing", "No TLS credentials with id 'nothing'"), ("tls0", "No TLS credentials with id 'tls0'")]
    {
        here.command("migrate-set-parameters", json!({"tls-creds": creds}))?;
        let refused = here.command("migrate", json!({"uri": pair.destination_uri()})).err();
        assert_eq!(refused.as_deref(), Some(why));
    }
    there.command("migrate-set-parameters", json!({"tls-creds": "tls0"}))?;
    // Here: whose certificates, and for which host they are to be; there: who may come; and what becomes of it.
    for (creds, host, authz, text) in [
        ("", "", "", "hung up"),
        ("bad", "", "", "known issuer"),
        ("good", "elsewhere.example", "", "Certificate does not match the hostname elsewhere.example"),
        ("good", "", "auth1", "hung up"),
        ("good", "moves.example", "auth0", ""),
    ] {
        let case = format!("'{creds}' '{host}' '{authz}'");
        here.command("migrate-set-parameters", json!({"tls-creds": creds, "tls-hostname": host}))?;
        there.command("migrate-set-parameters", json!({"tls-authz": authz}))?;
        here.command("migrate", json!({"uri": pair.destination_uri()}))?;
        let done = wait_migration(&mut here, WAIT).map_err(|e| format!("{case}: {e}"))?;
        let said = done["error-desc"].as_str().unwrap_or_default();
        if text.is_empty() {
            assert_eq!(done["status"], "completed", "{case}: {done}\n{}", pair.logs());
            continue;
        }
        assert!(done["status"] == "failed" && (said.contains(text) || text == "hung up"), "{case}: {done}");
        assert_eq!(here.command("query-status", Value::Null)?["status"], "running", "{case}");
        assert_eq!(there.command("query-status", Value::Null)?["status"], "inmigrate", "{case}");
    }
    drop((here, there));
    pair.arrive()?;
    let clients = Clients::start(&pair, 8080, "HTTP/1.1 200", "certificates");
    clients.wait_progress(10, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

fn status(qmp: &mut Qmp) -> Option<String> {
    let answer = qmp.command("query-migrate", Value::Null).ok()?;
    Some(answer["status"].as_str().unwrap_or_default().to_owned())
}

fn wait_status(qmp: &mut Qmp, wanted: &str, pair: &Pair) -> Result<()> {
    let wait = || (status(qmp)? == wanted).then_some(());
    ftvm_harness::wait_for(&format!("the status {wanted}"), WAIT, wait)
        .map_err(|e| format!("{e}\n{}", pair.logs()))
}

/// Begin a move whose machine runs there long before its memory is there.
fn begin_postcopy(pair: &mut Pair) -> Result<(Qmp, Qmp)> {
    pair.destination(&[])?;
    let other = pair.other();
    let mut there = pair.hosts[other].as_ref().ok_or("there is no destination")?.qmp()?;
    there.command("migrate-set-capabilities", capability("postcopy-ram"))?;
    let mut here = pair.qmp()?;
    here.command("migrate-set-capabilities", capability("postcopy-ram"))?;
    here.command(
        "migrate-set-parameters",
        // The rest takes longer than what is asked meanwhile, also on a slow host; what the guest asks for comes at once.
        json!({"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 1 << 20}),
    )?;
    let uri = pair.destination_uri();
    here.command("migrate", json!({"uri": uri}))?;
    wait_status(&mut here, "active", pair)?;
    std::thread::sleep(Duration::from_millis(500));
    here.command("migrate-start-postcopy", Value::Null)?;
    wait_status(&mut here, "postcopy-active", pair)?;
    // The other side's word for it lies behind what was sent before.
    wait_status(&mut there, "postcopy-active", pair)?;
    Ok((here, there))
}

/// The machine runs on the other host while its memory comes: what it needs first is sent first, and nothing is lost.
fn postcopy() -> Result<()> {
    let mut pair = Pair::start_plain("postcopy", Guest::Tiny)?;
    let clients = Clients::start(&pair, 8080, "HTTP/1.1 200", "postcopy");
    clients.wait_progress(10, WAIT)?;
    let refused = pair.qmp()?.command("migrate-start-postcopy", Value::Null).err();
    let text = "Enable postcopy with migrate_set_capability before the start of migration";
    assert_eq!(refused.as_deref(), Some(text));
    let refused = pair.qmp()?.command("migrate-pause", Value::Null).err();
    let text = "migrate-pause is currently only supported during postcopy-active state";
    assert_eq!(refused.as_deref(), Some(text));

    let (mut here, mut there) = begin_postcopy(&mut pair)?;
    // There it works on what has come; what needs all of it waits.
    ftvm_harness::wait_for("the machine there", WAIT, || {
        (there.command("query-status", Value::Null).ok()?["status"] == "running").then_some(())
    })?;
    for (command, arguments) in [("ft-turn-on", Value::Null), ("migrate", json!({"uri": "file:/dev/null"}))] {
        let refused = there.command(command, arguments).err().unwrap_or_default();
        assert!(refused.contains("has not all come yet"), "{command}: {refused}");
    }
    assert_eq!(here.command("query-status", Value::Null)?["status"], "finish-migrate");
    here.command("migrate_cancel", Value::Null)?;
    assert_eq!(status(&mut here).as_deref(), Some("postcopy-active"), "it is too late to cancel");
    here.command("migrate-set-parameters", json!({"max-postcopy-bandwidth": 4 << 20}))?;
    clients.wait_progress(5, WAIT)?;
    // And then it may come as fast as it can.
    here.command("migrate-set-parameters", json!({"max-postcopy-bandwidth": 0}))?;
    let done = wait_migration(&mut here, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
    assert_eq!(done["status"], "completed", "{done}\n{}", pair.logs());
    wait_status(&mut there, "completed", &pair)?;
    let requests = done["ram"]["postcopy-requests"].as_u64().unwrap_or(0);
    assert!(requests > 0 && done["ram"]["postcopy-bytes"].as_u64() > Some(1 << 20), "{done}");
    println!("post-copy: stopped for {} ms, {requests} pages asked for", done["downtime"]);
    drop((here, there));
    pair.arrive()?;
    clients.wait_progress(10, WAIT)?;
    // Its next move is as any other.
    pair.move_machine()?;
    clients.wait_progress(10, WAIT)?;
    clients.finish()?;
    pair.finish(false)
}

/// A connection that breaks in post-copy costs time and nothing else.
fn a_postcopy_that_breaks_goes_on() -> Result<()> {
    let mut pair = Pair::start_plain("recover", Guest::Tiny)?;
    let clients = Clients::start(&pair, 8080, "HTTP/1.1 200", "recover");
    clients.wait_progress(10, WAIT)?;
    let (mut here, mut there) = begin_postcopy(&mut pair)?;
    let refused = here.command("migrate", json!({"uri": pair.destination_uri(), "resume": true})).err();
    assert_eq!(refused.as_deref(), Some("Cannot resume if there is no paused migration"));
    let refused = there.command("migrate-recover", json!({"uri": "unix:/nowhere/at/all"})).err();
    assert_eq!(refused.as_deref(), Some("Migrate recover can only be run when postcopy is paused."));
    for from_here in [true, false] {
        if from_here { &mut here } else { &mut there }.command("migrate-pause", Value::Null)?;
        wait_status(&mut here, "postcopy-paused", &pair)?;
        wait_status(&mut there, "postcopy-paused", &pair)?;
        // The monitor answers although the machine may wait for memory.
        assert_eq!(there.command("query-status", Value::Null)?["status"], "running");
        // Another place may be named, as long as nobody has come.
        let uri = pair.destination_uri();
        there.command("migrate-recover", json!({"uri": "tcp:127.0.0.1:0"}))?;
        there.command("migrate-recover", json!({"uri": uri}))?;
        here.command("migrate", json!({"uri": uri, "resume": true}))?;
        wait_status(&mut here, "postcopy-active", &pair)?;
        wait_status(&mut there, "postcopy-active", &pair)?;
        // What the guest wants of the memory that is not there yet comes slowly.
        clients.wait_progress(3, LONG).map_err(|e| format!("{e}\n{}", pair.logs()))?;
    }
    here.command("migrate-set-parameters", json!({"max-postcopy-bandwidth": 0}))?;
    let done = wait_migration(&mut here, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))?;
    assert_eq!(done["status"], "completed", "{done}");
    wait_status(&mut there, "completed", &pair)?;
    drop((here, there));
    pair.arrive()?;
    clients.wait_progress(10, WAIT)?;
    clients.finish()?;

    // Without its source it is no machine; but the program ends when it is told to.
    let (mut here, there) = begin_postcopy(&mut pair)?;
    here.command("migrate-pause", Value::Null)?;
    drop((here, there));
    let other = pair.other();
    let mut there = pair.hosts[other].take().ok_or("there is no destination")?;
    std::thread::sleep(Duration::from_millis(500));
    there.qmp()?.command("quit", Value::Null)?;
    there.wait_exit(WAIT)?;
    Ok(())
}

/// Into a compressed file and back; what is cut off or changed is refused, and the source goes on.
fn through_a_file() -> Result<()> {
    let scratch = Scratch::new("file")?;
    let (raw, image) = (ext4(&scratch, "disk.raw", 48)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let more = format!("-net none -smp 2 -drive file={image},if=virtio");
    let words = "disk spin";
    let mut vm = start_tiny(&scratch, "from", words, &more)?;
    vm.wait_console("tiny guest ready", LONG)?;
    let state = scratch.path("state.gz");
    let mut qmp = vm.qmp()?;
    qmp.command("migrate-set-capabilities", capability("compress"))?;
    qmp.command("migrate", json!({"uri": format!("exec:gzip -1 > {state}")}))?;
    let done = wait_migration(&mut qmp, WAIT)?;
    assert_eq!(done["status"], "completed", "{}", vm.log());
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "postmigrate");

    let whole = std::fs::read(&state).map_err(|e| e.to_string())?;
    let plain = scratch.path("state");
    std::fs::write(&plain, run_bytes("gzip", &["-dc", &state])?).map_err(|e| e.to_string())?;
    let plain_bytes = std::fs::read(&plain).map_err(|e| e.to_string())?;
    println!("the state has {} bytes, compressed {}", plain_bytes.len(), whole.len());
    let broken = scratch.path("broken");
    let cut = |n: usize| plain_bytes[..n].to_vec();
    let flip = |n: usize| {
        let mut bytes = plain_bytes.clone();
        bytes[n] ^= 1;
        bytes
    };
    let len = plain_bytes.len();
    for (bytes, what) in [
        (cut(10), "breaks off"),
        (cut(len / 2), "breaks off"),
        (cut(len - 1), "breaks off"),
        (flip(3), "no state of an ftvm machine"),
        (flip(len / 2), "damaged"),
        (flip(len - 20), ""),
    ] {
        std::fs::write(&broken, bytes).map_err(|e| e.to_string())?;
        let mut there = start_tiny(&scratch, "refused", words, &format!("{more} -incoming file:{broken}"))?;
        let status = there.wait_exit(LONG)?;
        let said = there.log();
        assert!(
            status == 1 && said.contains("the machine did not arrive") && said.contains(what),
            "{what}: {said}"
        );
    }

    // The source may go on, and then nobody else gets its image.
    qmp.command("cont", Value::Null)?;
    let mut there = start_tiny(&scratch, "second", words, &format!("{more} -incoming file:{plain}"))?;
    assert_eq!(there.wait_exit(LONG)?, 1);
    assert!(there.log().contains("lock"), "{}", there.log());
    qmp.command("stop", Value::Null)?;
    qmp.command("migrate", json!({"uri": format!("exec:gzip -1 > {state}")}))?;
    assert_eq!(wait_migration(&mut qmp, WAIT)?["status"], "completed");
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;

    // It was stopped: so it arrives, and goes on when it is told to.
    let args = format!("{more} -incoming defer");
    let mut there = start_tiny(&scratch, "to", words, &args)?;
    let mut qmp = there.qmp()?;
    assert_eq!(qmp.command("query-status", Value::Null)?["status"], "inmigrate");
    qmp.command("migrate-incoming", json!({"uri": format!("exec:gzip -dc < {state}")}))?;
    let paused = || (qmp.command("query-status", Value::Null).ok()?["status"] == "paused").then_some(());
    ftvm_harness::wait_for("the machine", WAIT, paused).map_err(|e| format!("{e}\n{}", there.log()))?;
    qmp.command("cont", Value::Null)?;
    qmp.wait_event("RESUME", WAIT)?;
    let icount = |qmp: &mut ftvm_harness::qmp::Qmp| {
        qmp.command("query-replay", Value::Null).ok().and_then(|r| r["icount"].as_u64())
    };
    let before = icount(&mut qmp);
    // Asleep between two ticks, it executes nothing for a moment.
    ftvm_harness::wait_for("instructions", WAIT, || (icount(&mut qmp) > before).then_some(()))?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut there)?;
    run("qemu-img", &["check", &image])?;
    Ok(())
}

/// The whole machine in a snapshot, and back: what came later never happened, in memory and on the disk.
fn snapshots() -> Result<()> {
    let scratch = Scratch::new("snapshots")?;
    let (raw, image) = (ext4(&scratch, "disk.raw", 48)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let tcp = free_port()?;
    let words = "net disk serve";
    let more = format!("-nic user,model=virtio,hostfwd=tcp:{tcp}-:7000 -smp 2 -drive file={image},if=virtio");
    let mut vm = start_tiny(&scratch, "first", words, &more)?;
    vm.wait_console("ftload: serving on 7000", LONG)?;
    let put = |text: &str| Line::connect(tcp)?.ask(&format!("put {text}")).map(|(answer, _)| answer);
    let get = |n: u32| Line::connect(tcp)?.ask(&format!("get {n}")).map(|(answer, _)| answer);
    let mut qmp = vm.qmp()?;
    let human = |qmp: &mut Qmp, line: &str| {
        let said = qmp.command("human-monitor-command", json!({"command-line": line}))?;
        Ok::<String, String>(said.as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(put("one")?, "ok 0");
    assert_eq!(human(&mut qmp, "savevm first")?, "");
    assert_eq!(put("two")?, "ok 1");
    assert_eq!(human(&mut qmp, "savevm \"second one\"")?, "");
    assert_eq!(put("three")?, "ok 2");
    let list = human(&mut qmp, "info snapshots")?;
    assert!(
        list.contains("present on all disks") && list.contains("first") && !list.contains("partial"),
        "{list}"
    );
    assert!(human(&mut qmp, "loadvm third")?.contains("Snapshot 'third' does not exist"));
    let status = qmp.command("query-status", Value::Null)?;
    assert_eq!(status["status"], "running", "a snapshot that is not there stops nothing");

    assert_eq!(human(&mut qmp, "loadvm first")?, "");
    assert_eq!((get(0)?, put("other")?), ("one".into(), "ok 1".into()));
    assert_eq!(human(&mut qmp, "loadvm \"second one\"")?, "");
    assert_eq!((get(1)?, put("more")?), ("two".into(), "ok 2".into()));
    assert_eq!(human(&mut qmp, "delvm \"second one\"")?, "");
    assert!(human(&mut qmp, "info snapshots")?.matches("one").count() == 0);
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    run("qemu-img", &["check", &image])?;
    let seen = run("qemu-img", &["snapshot", "-l", &image])?;
    assert!(seen.contains("first") && seen.contains("MiB"), "{seen}");

    // Another program goes on from it, stopped at first.
    let mut vm = start_tiny(&scratch, "again", words, &format!("{more} -loadvm first -S"))?;
    let mut qmp = vm.qmp()?;
    assert_eq!(qmp.command("query-status", Value::Null)?["running"], false);
    qmp.command("cont", Value::Null)?;
    assert_eq!((get(0)?, put("after")?), ("one".into(), "ok 1".into()));
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    let mut vm = start_tiny(&scratch, "other", words, &format!("{more} -m 128 -loadvm first"))?;
    assert_eq!(vm.wait_exit(LONG)?, 1);
    assert!(vm.log().contains("memory was 256 MiB, is 128 MiB"), "{}", vm.log());
    run("qemu-img", &["check", &image])?;
    Ok(())
}

fn run_bytes(program: &str, args: &[&str]) -> Result<Vec<u8>> {
    let out = std::process::Command::new(program).args(args).output().map_err(|e| e.to_string())?;
    match out.status.success() {
        true => Ok(out.stdout),
        false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
    }
}

fn main() {
    run_stories(
        "migration",
        &[
            ("back_and_forth", back_and_forth),
            ("failures_leave_the_source_running", failures_leave_the_source_running),
            ("with_certificates", with_certificates),
            ("postcopy", postcopy),
            ("a_postcopy_that_breaks_goes_on", a_postcopy_that_breaks_goes_on),
            ("through_a_file", through_a_file),
            ("snapshots", snapshots),
        ],
    );
}
