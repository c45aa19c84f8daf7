//! What fault tolerance costs: the same guest work alone, unprotected (`-ft primary` without a backup) and
//! protected (a backup follows on the same two cores), in turn, as ratios of medians. Because both hosts share one
//! machine here, a third figure tells what that alone costs: unprotected, while a second machine does the same work.
//!
//! `cargo bench --bench ft`; FTVM_BENCH_ROUNDS (default 3). The figures of the paper (Table 1: 0.94 to 0.99,
//! 1.5 to 18 Mbit/s) stand beside.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use ftvm_harness::client::{get, Line};
use ftvm_harness::hosts::{become_root, GUEST};
use ftvm_harness::pair::{Guest, Pair};
use ftvm_harness::vm::Vm;
use ftvm_harness::{guests, Result};

/// (name, command in the guest)
const WORK: &[(&str, &str)] = &[
    ("compute (sha256, 100 MB)", "head -c 100000000 /dev/zero | sha256sum"),
    ("compress (gzip, 8 MB)", "head -c 8000000 /usr/bin/gcc-12 /usr/lib/x86_64-linux-gnu/libc.so.6 2>/dev/null | gzip -6"),
    ("compile (gcc -O1, 400 functions)", "cd /tmp && i=0; while [ $i -lt 400 ]; do echo \"int f$i(int a,int b){int s=0;for(int k=0;k<a;k++){s+=(k*b)^(s>>3);if(s%7==$i%7)s-=k;}return s;}\"; i=$((i+1)); done > b.c && gcc -O1 -c b.c -o b.o"),
    ("database (sqlite, 200 commits)", "cd /root && rm -f b.db && (echo 'create table t(a,b);'; i=0; while [ $i -lt 200 ]; do echo \"insert into t values($i,hex(randomblob(64)));\"; i=$((i+1)); done) | sqlite3 b.db"),
    ("fork and exec (200)", "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done"),
];

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(0.0)
}

struct Row {
    name: String,
    off: Vec<f64>,
    beside: Vec<f64>,
    on: Vec<f64>,
    mbps: Vec<f64>,
}

/// How the machine runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Off,
    /// Unprotected, with a second machine that does the same.
    Beside,
    On,
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(GUEST.parse().unwrap_or([0, 0, 0, 0].into()), port)
}

/// Do a row's work; the sessions of the machine and of its HTTP server are given by address.
fn work(row: usize, line: &mut Line, http: SocketAddr) -> Result<()> {
    if let Some((name, command)) = WORK.get(row) {
        return match line.ask(&format!("run {command}"))?.0.starts_with("0 ") {
            true => Ok(()),
            false => Err(format!("{name}: the command failed in the guest")),
        };
    }
    match row - WORK.len() {
        0 => (0..500).try_for_each(|_| get(http).map(|_| ()).map_err(|e| e.to_string())),
        1 => (0..1000).try_for_each(|_| line.ask("inc").map(|_| ())),
        _ => {
            std::thread::sleep(Duration::from_secs(10));
            Ok(())
        }
    }
}

/// Seconds that a row took, and log megabits a second.
fn measure(pair: &mut Pair, row: usize, line: &mut Line) -> Result<(f64, f64)> {
    let before = pair.qmp()?.ft()?["log-bytes"].as_u64().unwrap_or(0);
    let start = Instant::now();
    work(row, line, at(80))?;
    let took = start.elapsed().as_secs_f64();
    std::thread::sleep(Duration::from_millis(200));
    let after = pair.qmp()?.ft()?["log-bytes"].as_u64().unwrap_or(0);
    Ok((took, after.saturating_sub(before) as f64 * 8.0 / took / 1e6))
}

/// A second machine, unprotected, that does the rows over and over.
struct Second {
    row: Arc<AtomicUsize>,
    thread: Option<JoinHandle<Result<()>>>,
    vm: Vm,
}

const STOP: usize = usize::MAX;
const REST: usize = usize::MAX - 1;

impl Second {
    fn start(pair: &Pair) -> Result<Second> {
        let image = pair.scratch.path("second.qcow2");
        std::fs::copy(guests::debian()?, &image).map_err(|e| e.to_string())?;
        let drive = format!("file={image},if=virtio");
        let nic = "user,model=virtio,hostfwd=tcp:127.0.0.1:17000-:7000,hostfwd=tcp:127.0.0.1:10080-:80";
        let command = std::process::Command::new(guests::ftvm()?);
        let args = ["-m", "512M", "-drive", &drive, "-nic", nic];
        let mut vm = Vm::start(command, &pair.scratch, "second", &args)?;
        vm.wait_console("GUEST READY", Duration::from_secs(900))?;
        let row = Arc::new(AtomicUsize::new(REST));
        let wanted = Arc::clone(&row);
        let thread = std::thread::spawn(move || {
            let mut line = Line::connect(SocketAddr::from(([127, 0, 0, 1], 17000)))?;
            loop {
                match wanted.load(Ordering::Relaxed) {
                    STOP => return Ok(()),
                    REST => std::thread::sleep(Duration::from_millis(5)),
                    row => work(row, &mut line, SocketAddr::from(([127, 0, 0, 1], 10080)))?,
                }
            }
        });
        Ok(Second { row, thread: Some(thread), vm })
    }

    fn stop(mut self) -> Result<()> {
        self.row.store(STOP, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        self.vm.kill();
        ended.map_or(Ok(()), |r| r.map_err(|_| "the second machine's client panicked".to_owned())?)
    }
}

fn bench() -> Result<()> {
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3usize);
    eprintln!("booting Debian ...");
    let mut pair = Pair::start("bench", Guest::Debian, "")?;
    let second = Second::start(&pair)?;
    pair.net.enter_client()?;
    let mut line = Line::connect(at(7000))?;
    let names = WORK.iter().map(|(n, _)| *n).chain([
        "HTTP (nginx, 500 requests)",
        "request latency (TCP, 1000)",
        "idle (10 s)",
    ]);
    let mut rows: Vec<Row> = names
        .map(|name| Row { name: name.into(), off: vec![], beside: vec![], on: vec![], mbps: vec![] })
        .collect();
    for row in 0..WORK.len() {
        work(row, &mut line, at(80))?;
    }
    for round in 0..rounds {
        for mode in [Mode::Off, Mode::Beside, Mode::On] {
            // Where it is not wanted it takes no time at all.
            second.vm.signal(if mode == Mode::Beside { Signal::SIGCONT } else { Signal::SIGSTOP });
            if mode == Mode::On {
                pair.protect()?;
                std::thread::sleep(Duration::from_secs(2));
            }
            for (i, row) in rows.iter_mut().enumerate() {
                if mode == Mode::Beside {
                    second.row.store(i, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(100));
                }
                let (took, mbps) = measure(&mut pair, i, &mut line)?;
                second.row.store(REST, Ordering::Relaxed);
                match mode {
                    Mode::Off => row.off.push(took),
                    Mode::Beside => row.beside.push(took),
                    Mode::On => {
                        row.on.push(took);
                        row.mbps.push(mbps);
                    }
                }
            }
            eprintln!("round {round}, {mode:?}: done");
        }
        pair.kill_backup()?;
    }
    second.vm.signal(Signal::SIGCONT);
    second.stop()?;
    println!("| work | FT off (s) | beside another (s) | FT on (s) | off/on | beside/on | log (Mbit/s) |");
    println!("|---|---|---|---|---|---|---|");
    for row in rows {
        let (off, beside, on) = (median(row.off), median(row.beside), median(row.on));
        println!(
            "| {} | {off:.2} | {beside:.2} | {on:.2} | {:.2} | {:.2} | {:.2} |",
            row.name,
            off / on,
            beside / on,
            median(row.mbps)
        );
    }
    pair.finish(false)
}

fn main() {
    if let Err(e) = become_root().and_then(|()| bench()) {
        eprintln!("bench: {e}");
        std::process::exit(1);
    }
}
