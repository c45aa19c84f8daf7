//! `make soak`: a protected Debian guest under load through many faults; every acknowledged answer is checked.
//!
//! `soak [--storage path|nfs|iscsi|separate] [--fault kill,cut,pause] [--ft OPTIONS] [--drive OPTIONS]`
//!
//! Without `--fault` a round kills the primary and the backup once each, every fifth round also freezes the primary, cuts
//! the hosts apart and corrupts the backup's memory. With it each named fault strikes the primary in every round: it is
//! killed, cut off from its peer, the storage and the clients (on a path, which cannot be cut off: from its peer), or
//! paused and continued. FTVM_SOAK_ROUNDS: rounds (default 50). FTVM_SOAK_SEED: the pauses between faults.

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

/// What strikes the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    Cut,
    Pause,
}

/// What is wanted.
struct Wish {
    kind: Kind,
    faults: Vec<Fault>,
    ft: String,
    drive: String,
}

const USAGE: &str = "usage: soak [--storage path|nfs|iscsi|separate] [--fault kill,cut,pause] [--ft OPTIONS] [--drive OPTIONS]";

fn wish() -> Result<Wish> {
    let mut wish = Wish { kind: Kind::Path, faults: Vec::new(), ft: String::new(), drive: String::new() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or(USAGE)?;
        match arg.as_str() {
            "--storage" => wish.kind = Kind::parse(&value)?,
            "--ft" => wish.ft = format!(",{value}"),
            "--drive" => wish.drive = format!(",{value}"),
            "--fault" => {
                for word in value.split(',') {
                    wish.faults.push(match word {
                        "kill" => Fault::Kill,
                        "cut" => Fault::Cut,
                        "pause" => Fault::Pause,
                        _ => return Err(USAGE.into()),
                    });
                }
            }
            _ => return Err(USAGE.into()),
        }
    }
    Server::unavailable(wish.kind).map_or(Ok(wish), Err)
}

/// What was done, and how long takeovers took from the decision on, in ms.
#[derive(Default)]
struct Score {
    done: std::collections::BTreeMap<&'static str, u64>,
    takeovers: Vec<f64>,
}

impl Score {
    fn count(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn takeover(&mut self, pair: &Pair, ft: &serde_json::Value) {
        let took = ft["last-failover"]["takeover-ms"].as_f64().unwrap_or(0.0);
        if took > 500.0 {
            println!("a slow takeover: {}\n{}", ft["last-failover"], pair.logs());
        }
        self.takeovers.push(took);
    }

    fn text(&self) -> String {
        self.done.iter().map(|(what, n)| format!("{n} {what}")).collect::<Vec<_>>().join(", ")
    }
}

const LIMIT: Duration = Duration::from_secs(60);

/// A round of everything.
fn mixed(pair: &mut Pair, clients: &Clients, rng: &mut Rng, score: &mut Score, round: u64) -> Result<()> {
    pair.protect()?;
    rng.pause(1500);
    let ft = pair.kill_primary()?;
    score.count("primaries killed");
    score.takeover(pair, &ft);
    clients.wait_progress(3, LIMIT)?;
    pair.protect()?;
    rng.pause(1500);
    pair.kill_backup()?;
    score.count("backups killed");
    clients.wait_progress(3, LIMIT)?;
    if round % 5 == 2 {
        pair.protect()?;
        rng.pause(1000);
        pair.corrupt_backup()?;
        score.count("divergences");
        clients.wait_progress(3, LIMIT)?;
        pair.kill_backup()?;
    }
    if round % 5 == 4 {
        pair.protect()?;
        rng.pause(1000);
        pair.stall_primary(Duration::from_millis(1500))?;
        score.count("stalls");
        clients.wait_progress(3, LIMIT)?;
        // A backup is taken again when the overlay is merged and the image's locks are this side's.
        pair.settle()?;
        pair.protect()?;
        rng.pause(1000);
        pair.cut_apart()?;
        score.count("cuts");
        clients.wait_progress(3, LIMIT)?;
    }
    Ok(())
}

/// One fault of the primary.
fn strike(pair: &mut Pair, rng: &mut Rng, score: &mut Score, fault: Fault) -> Result<()> {
    pair.protect()?;
    rng.pause(1500);
    let ft = match fault {
        Fault::Kill => {
            score.count("primaries killed");
            pair.kill_primary()?
        }
        Fault::Pause => {
            score.count("primaries paused");
            pair.stall_primary(Duration::from_millis(1500))?
        }
        Fault::Cut => {
            score.count("primaries cut off");
            if pair.server.is_none() {
                // Either side may win the lock, which both reach.
                return pair.cut_apart();
            }
            pair.unplug_primary(Duration::from_millis(1000))?
        }
    };
    score.takeover(pair, &ft);
    Ok(())
}

fn soak() -> Result<()> {
    let wish = wish()?;
    let rounds = number("FTVM_SOAK_ROUNDS", 50);
    let mut rng = Rng(number("FTVM_SOAK_SEED", 1));
    println!("booting Debian ...");
    let mut pair = Pair::start_on("soak", Guest::Debian, &wish.ft, wish.kind, &wish.drive)?;
    let clients = Clients::start(&pair, 80, "ftvm guest", "soak").with_ssh(&pair);
    clients.wait_progress(10, LIMIT)?;
    let start = Instant::now();
    let mut score = Score::default();
    for round in 0..rounds {
        let result = if wish.faults.is_empty() {
            mixed(&mut pair, &clients, &mut rng, &mut score, round)
        } else {
            wish.faults.iter().try_for_each(|fault| {
                strike(&mut pair, &mut rng, &mut score, *fault)?;
                clients.wait_progress(3, LIMIT)?;
                pair.settle()
            })
        };
        result.map_err(|e| format!("round {round}: {e}\n{}", pair.logs()))?;
        println!("round {round}: {}, {:.0} s", score.text(), start.elapsed().as_secs_f64());
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
    let mut takeovers = score.takeovers;
    takeovers.sort_by(f64::total_cmp);
    println!(
        "takeover (decision to live): median {:.1} ms, longest {:.1} ms",
        takeovers.get(takeovers.len() / 2).copied().unwrap_or(0.0),
        takeovers.last().copied().unwrap_or(0.0)
    );
    pair.finish(true)?;
    println!("image and guest file system clean; 1 passed, 0 failed");
    Ok(())
}

fn main() {
    if let Err(e) = become_root().and_then(|()| soak()) {
        eprintln!("soak: {e}");
        std::process::exit(1);
    }
}
