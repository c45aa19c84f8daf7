//! `make soak`: a protected Debian guest under load through many faults; every acknowledged answer is checked.
//!
//! FTVM_SOAK_ROUNDS: rounds (default 50); a round kills the primary and the backup once each, every fifth
//! round also freezes the primary, cuts the hosts apart and corrupts the backup's memory. FTVM_SOAK_SEED: the pauses between faults.

use std::time::{Duration, Instant};

use ftvm_harness::hosts::become_root;
use ftvm_harness::pair::{Clients, Guest, Pair};
use ftvm_harness::storage::{Kind, Server};
use ftvm_harness::Result;

struct Rng(u64);

impl Rng {
    /// A random pause up to `ms`.
    fn pause(&mut self, ms: u64) {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis((self.0 >> 33) % ms));
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// `--storage path|nfs|iscsi`: where the image lies.
fn storage() -> Result<Kind> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let kind = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Kind::Path,
        ["--storage", kind] => Kind::parse(kind)?,
        _ => return Err("usage: soak [--storage path|nfs|iscsi]".into()),
    };
    Server::unavailable(kind).map_or(Ok(kind), Err)
}

fn soak() -> Result<()> {
    let kind = storage()?;
    let rounds = number("FTVM_SOAK_ROUNDS", 50);
    let mut rng = Rng(number("FTVM_SOAK_SEED", 1));
    let limit = Duration::from_secs(60);
    println!("booting Debian ...");
    let mut pair = Pair::start_on("soak", Guest::Debian, "", kind, "")?;
    let clients = Clients::start(&pair, 80, "ftvm guest", "soak").with_ssh(&pair);
    clients.wait_progress(10, limit)?;
    let start = Instant::now();
    let (mut primaries, mut backups, mut stalls, mut cuts, mut divergences) = (0, 0, 0, 0, 0);
    let mut takeovers: Vec<f64> = Vec::new();
    for round in 0..rounds {
        let result = (|| -> Result<()> {
            pair.protect()?;
            rng.pause(1500);
            let ft = pair.kill_primary()?;
            primaries += 1;
            let last = &ft["last-failover"];
            takeovers.push(last["takeover-ms"].as_f64().unwrap_or(0.0));
            clients.wait_progress(3, limit)?;
            pair.protect()?;
            rng.pause(1500);
            pair.kill_backup()?;
            backups += 1;
            clients.wait_progress(3, limit)?;
            if round % 5 == 2 {
                pair.protect()?;
                rng.pause(1000);
                pair.corrupt_backup()?;
                divergences += 1;
                clients.wait_progress(3, limit)?;
                pair.kill_backup()?;
            }
            if round % 5 == 4 {
                pair.protect()?;
                rng.pause(1000);
                pair.stall_primary(Duration::from_millis(1500))?;
                stalls += 1;
                clients.wait_progress(3, limit)?;
                // A backup is taken again when the overlay is merged and the image's locks are this side's.
                std::thread::sleep(Duration::from_secs(1));
                pair.protect()?;
                rng.pause(1000);
                pair.cut_apart()?;
                cuts += 1;
                clients.wait_progress(3, limit)?;
            }
            Ok(())
        })();
        result.map_err(|e| format!("round {round}: {e}\n{}", pair.logs()))?;
        println!(
            "round {round}: {primaries} primaries and {backups} backups killed, {stalls} stalls, {cuts} cuts, {divergences} divergences, {:.0} s",
            start.elapsed().as_secs_f64()
        );
    }
    let seen = clients.finish()?;
    for (name, s) in &seen {
        println!(
            "{name:8} {:6} answers, none wrong or lost; longest pause {:.0} ms, median {:.1} ms, 99 % {:.1} ms",
            s.answers,
            s.longest.as_secs_f64() * 1000.0,
            s.percentile(0.5),
            s.percentile(0.99)
        );
    }
    takeovers.sort_by(f64::total_cmp);
    println!(
        "takeover (decision to live): median {:.1} ms, longest {:.1} ms",
        takeovers.get(takeovers.len() / 2).copied().unwrap_or(0.0),
        takeovers.last().copied().unwrap_or(0.0)
    );
    pair.settle()?;
    pair.finish(true)?;
    println!("image clean; 1 passed, 0 failed");
    Ok(())
}

fn main() {
    if let Err(e) = become_root().and_then(|()| soak()) {
        eprintln!("soak: {e}");
        std::process::exit(1);
    }
}
