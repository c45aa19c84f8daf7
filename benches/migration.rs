//! Live migration side by side with QEMU's TCG in the same run: the same guest, over the loopback address, idle and while it
//! writes to its memory, and then in post-copy too.
//!
//! `cargo bench --bench migration`; FTVM_BENCH_ROUNDS (default 3). The guest is the tiny one with 512 MiB, of which 192 MiB hold
//! something; both programs have no limit of bandwidth and a downtime limit of 300 ms. The downtime is
//! the time between the source's event STOP and the destination's RESUME. The table is printed and written to `build/bench/`.

// Of it only the medians.
#[allow(dead_code)]
mod marked;

use std::fmt::Write as _;
use std::process::Command;
use std::time::Duration;

use ftvm_harness::libvirt::Console;
use ftvm_harness::moves::wait_migration;
use ftvm_harness::qmp::Qmp;
use ftvm_harness::vm::Vm;
use ftvm_harness::{guests, Result, Scratch};
use marked::Times;
use serde_json::{json, Value};

const LIMIT: Duration = Duration::from_secs(240);
/// MiB that are filled with something.
const FILLED: u32 = 192;
/// Writes to 16 MiB again and again.
const BUSY: &str =
    "(while :; do dd if=/tmp/fill of=/tmp/busy bs=64k count=256 conv=notrunc; done) >/dev/null 2>&1 & true";

fn start(program: &str, accel: &[&str], scratch: &Scratch, name: &str, more: &[&str]) -> Result<Vm> {
    let (kernel, initrd) = guests::tiny()?;
    let tty = format!("unix:{},server=on,wait=off", scratch.path(&format!("{name}.tty")));
    let args = ["-m", "512", "-nic", "none", "-kernel", &kernel, "-initrd", &initrd, "-serial", &tty];
    let args = [&args[..], &["-append", "console=ttyS0 quiet"], accel, more].concat();
    Vm::start(Command::new(program), scratch, name, &args)
}

/// Microseconds of an event's time.
fn time(event: &Value) -> f64 {
    let part = |name: &str| event["timestamp"][name].as_f64().unwrap_or_default();
    part("seconds") * 1e6 + part("microseconds")
}

/// What the guest does, and how it moves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    Idle,
    Busy,
    /// Busy, and the destination runs half a second after the beginning.
    Postcopy,
}

fn round(program: &str, accel: &[&str], case: Case, times: &mut Times) -> Result<()> {
    let busy = case != Case::Idle;
    let scratch = Scratch::new("bench-migration")?;
    let mut source = start(program, accel, &scratch, "source", &[])?;
    let mut console = Console::socket(&scratch.path("source.tty"))?;
    console.until("tiny guest ready", LIMIT)?;
    std::thread::sleep(Duration::from_millis(300));
    let fill = format!(
        "tr '\\0' x < /dev/zero | dd of=/tmp/fill bs=1M count={FILLED} iflag=fullblock; ls -l /tmp/fill"
    );
    let filled = console.run(&fill)?;
    if !filled.contains(&(FILLED << 20).to_string()) {
        return Err(format!("{program}: memory was not filled: {filled}"));
    }
    if busy {
        console.run(BUSY)?;
        std::thread::sleep(Duration::from_secs(1));
    }
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    let mut destination = start(program, accel, &scratch, "destination", &["-incoming", &uri])?;
    let (mut here, mut there) = (source.qmp()?, destination.qmp()?);
    ftvm_harness::wait_for("the destination", LIMIT, || {
        (there.command("query-status", Value::Null).ok()?["status"] == "inmigrate").then_some(())
    })?;
    let parameters = json!({"max-bandwidth": 16u64 << 30, "downtime-limit": 300});
    here.command("migrate-set-parameters", parameters)?;
    if case == Case::Postcopy {
        for side in [&mut here, &mut there] {
            let on = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
            side.command("migrate-set-capabilities", on)?;
        }
        // So that there is something left by then.
        here.command("migrate-set-parameters", json!({"max-bandwidth": 64 << 20}))?;
    }
    here.events.clear();
    here.command("migrate", json!({"uri": uri}))?;
    if case == Case::Postcopy {
        std::thread::sleep(Duration::from_millis(500));
        here.command("migrate-start-postcopy", Value::Null)?;
    }
    let done = wait_migration(&mut here, LIMIT)?;
    if done["status"] != "completed" {
        return Err(format!("{program}: {done}\n{}\n{}", source.log(), destination.log()));
    }
    let (stopped, resumed) = (event(&mut here, "STOP")?, event(&mut there, "RESUME")?);
    let row = match case {
        Case::Idle => "idle",
        Case::Busy => "busy",
        Case::Postcopy => "busy, post-copy",
    };
    times.add(&format!("{row}: downtime (ms)"), (time(&resumed) - time(&stopped)) / 1000.0);
    let number = |v: &Value| v.as_f64().unwrap_or_default();
    let (total, ram) = (number(&done["total-time"]), &done["ram"]);
    times.add(&format!("{row}: total time (ms)"), total);
    let sent = number(&ram["transferred"]);
    times.add(&format!("{row}: sent (MB)"), sent / 1e6);
    times.add(&format!("{row}: bandwidth (MB/s)"), sent / 1e3 / total.max(1.0));
    drop((here, there));
    // It lives on.
    let mut console = Console::socket(&scratch.path("destination.tty"))?;
    let text = console.run("sha256sum < /tmp/fill")?;
    if !text.contains("  -") {
        return Err(format!("{program}: the machine that arrived does not answer: {text}"));
    }
    source.kill();
    destination.kill();
    Ok(())
}

fn event(qmp: &mut Qmp, name: &str) -> Result<Value> {
    match qmp.events.iter().position(|e| e["event"] == name) {
        Some(at) => Ok(qmp.events.remove(at)),
        None => qmp.wait_event(name, LIMIT),
    }
}

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    listener.local_addr().map(|a| a.port()).map_err(|e| e.to_string())
}

fn bench() -> Result<()> {
    let qemu = "qemu-system-x86_64";
    if Command::new(qemu).arg("--version").output().is_err() {
        println!("skipped: there is no {qemu} to compare with");
        return Ok(());
    }
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3usize);
    let ftvm = guests::ftvm()?;
    let (mut ours, mut theirs) = (Times::default(), Times::default());
    for n in 0..rounds {
        for case in [Case::Idle, Case::Busy, Case::Postcopy] {
            round(&ftvm, &[], case, &mut ours)?;
            round(qemu, &["-accel", "tcg"], case, &mut theirs)?;
        }
        eprintln!("round {n} done");
    }
    let mut table = String::from("| guest | QEMU TCG | ftvm |\n|---|---|---|\n");
    for row in &ours.order {
        let (Some(a), Some(b)) = (ours.median(row), theirs.median(row)) else {
            return Err(format!("{row}: only one side has it"));
        };
        let _ = writeln!(table, "| {row} | {b:.1} | {a:.1} |");
    }
    let _ = writeln!(table, "\nMedians of {rounds} rounds of each in turn.");
    println!("{table}");
    let out = guests::root().join("build/bench");
    let fail = |e: std::io::Error| format!("{}: {e}", out.display());
    std::fs::create_dir_all(&out).map_err(fail)?;
    std::fs::write(out.join("migration.md"), &table).map_err(fail)?;
    println!("written to build/bench/migration.md");
    Ok(())
}

fn main() {
    if let Err(e) = bench() {
        eprintln!("bench: {e}");
        std::process::exit(1);
    }
}
