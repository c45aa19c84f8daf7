//! What fault tolerance costs: the same guest work alone, unprotected (`-ft primary` without a backup) and
//! protected (a backup follows on the same two cores), in turn, as ratios of medians.
//!
//! `cargo bench --bench ft`; FTVM_BENCH_ROUNDS (default 3). The figures of the paper (Table 1: 0.94 to 0.99,
//! 1.5 to 18 Mbit/s) stand beside.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ftvm_harness::client::{get, Line};
use ftvm_harness::hosts::{become_root, GUEST};
use ftvm_harness::pair::{Guest, Pair};
use ftvm_harness::Result;

/// (name, command in the guest)
const WORK: &[(&str, &str)] = &[
    ("compute (sha256, 32 MB)", "head -c 32000000 /dev/zero | sha256sum"),
    ("compress (gzip, 8 MB)", "head -c 8000000 /usr/bin/gcc-12 /usr/lib/x86_64-linux-gnu/libc.so.6 2>/dev/null | gzip -6"),
    ("compile (gcc -O1, 400 functions)", "cd /tmp && i=0; while [ $i -lt 400 ]; do echo \"int f$i(int a,int b){int s=0;for(int k=0;k<a;k++){s+=(k*b)^(s>>3);if(s%7==$i%7)s-=k;}return s;}\"; i=$((i+1)); done > b.c && gcc -O1 -c b.c -o b.o"),
    ("database (sqlite, 60 commits)", "cd /root && rm -f b.db && (echo 'create table t(a,b);'; i=0; while [ $i -lt 60 ]; do echo \"insert into t values($i,hex(randomblob(64)));\"; i=$((i+1)); done) | sqlite3 b.db"),
    ("fork and exec (200)", "i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done"),
];

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(0.0)
}

struct Row {
    name: String,
    off: Vec<f64>,
    on: Vec<f64>,
    mbps: Vec<f64>,
}

fn measure(pair: &mut Pair, name: &str, work: &mut dyn FnMut() -> Result<()>) -> Result<(f64, f64)> {
    let before = pair.qmp()?.ft()?["log-bytes"].as_u64().unwrap_or(0);
    let start = Instant::now();
    work().map_err(|e| format!("{name}: {e}"))?;
    let took = start.elapsed().as_secs_f64();
    std::thread::sleep(Duration::from_millis(200));
    let after = pair.qmp()?.ft()?["log-bytes"].as_u64().unwrap_or(0);
    Ok((took, after.saturating_sub(before) as f64 * 8.0 / took / 1e6))
}

fn bench() -> Result<()> {
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3usize);
    eprintln!("booting Debian ...");
    let mut pair = Pair::start("bench", Guest::Debian, "")?;
    pair.net.enter_client()?;
    let at = |port: u16| SocketAddr::new(GUEST.parse().unwrap_or([0, 0, 0, 0].into()), port);
    let mut line = Line::connect(at(7000))?;
    let mut rows: Vec<Row> = WORK
        .iter()
        .map(|(n, _)| (*n).to_owned())
        .chain([
            "HTTP (nginx, 150 requests)".into(),
            "request latency (TCP, 300)".into(),
            "idle (10 s)".into(),
        ])
        .map(|name| Row { name, off: vec![], on: vec![], mbps: vec![] })
        .collect();
    for (_, command) in WORK {
        line.ask(&format!("run {command}"))?;
    }
    for round in 0..rounds {
        for protected in [false, true] {
            if protected {
                pair.protect()?;
                std::thread::sleep(Duration::from_secs(2));
            }
            for (i, row) in rows.iter_mut().enumerate() {
                let mut work: Box<dyn FnMut() -> Result<()>> = match i {
                    i if i < WORK.len() => {
                        let command = WORK[i].1;
                        let line = &mut line;
                        Box::new(move || match line.ask(&format!("run {command}"))?.0.starts_with("0 ") {
                            true => Ok(()),
                            false => Err("the command failed in the guest".into()),
                        })
                    }
                    i if i == WORK.len() => Box::new(|| {
                        (0..150).try_for_each(|_| get(at(80)).map(|_| ()).map_err(|e| e.to_string()))
                    }),
                    i if i == WORK.len() + 1 => {
                        let line = &mut line;
                        Box::new(move || (0..300).try_for_each(|_| line.ask("inc").map(|_| ())))
                    }
                    _ => Box::new(|| {
                        std::thread::sleep(Duration::from_secs(10));
                        Ok(())
                    }),
                };
                let (took, mbps) = measure(&mut pair, &row.name.clone(), &mut work)?;
                if protected {
                    row.on.push(took);
                    row.mbps.push(mbps);
                } else {
                    row.off.push(took);
                }
            }
            eprintln!("round {round}, protected {protected}: done");
        }
        pair.kill_backup()?;
    }
    println!("| work | FT off (s) | FT on (s) | off/on | log (Mbit/s) |");
    println!("|---|---|---|---|---|");
    for row in rows {
        let (off, on) = (median(row.off), median(row.on));
        println!("| {} | {off:.2} | {on:.2} | {:.2} | {:.2} |", row.name, off / on, median(row.mbps));
    }
    pair.finish(false)
}

fn main() {
    if let Err(e) = become_root().and_then(|()| bench()) {
        eprintln!("bench: {e}");
        std::process::exit(1);
    }
}
