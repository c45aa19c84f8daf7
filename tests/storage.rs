//! Protected machines on real storage servers: nfs-ganesha by `nfs://` and tgtd by `iscsi://`, each on a host of its
//! own (a network namespace). The primary is killed, cut off, and paused; servers are restarted.

use std::time::Duration;

use ftvm_harness::hosts::become_root;
use ftvm_harness::pair::{Clients, Guest, Pair};
use ftvm_harness::storage::{Kind, Server};
use ftvm_harness::Result;

const WAIT: Duration = Duration::from_secs(60);

fn clients(pair: &Pair, tag: &str) -> Clients {
    Clients::start(pair, 8080, "HTTP/1.1 200", tag)
}

/// The primary is killed, cut from its peer, and paused.
fn failovers(kind: Kind) -> Result<()> {
    let mut pair = Pair::start_on("storage", Guest::Tiny, "", kind, "")?;
    let clients = clients(&pair, "storage");
    let step = |pair: &Pair, more: u64| {
        clients.wait_progress(more, WAIT).map_err(|e| format!("{e}\n{}", pair.logs()))
    };
    pair.protect()?;
    step(&pair, 20)?;
    let ft = pair.kill_primary()?;
    println!("{kind:?}: killed, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    pair.protect()?;
    step(&pair, 10)?;
    let ft = pair.stall_primary(Duration::from_secs(2))?;
    println!("{kind:?}: paused, failover {}", ft["last-failover"]);
    step(&pair, 20)?;
    pair.protect()?;
    step(&pair, 10)?;
    pair.cut_apart()?;
    println!("{kind:?}: cut apart");
    step(&pair, 20)?;
    clients.finish()?;
    pair.settle()?;
    pair.finish(false)
}

fn iscsi_failovers() -> Result<()> {
    failovers(Kind::Iscsi)
}

fn nfs_failovers() -> Result<()> {
    failovers(Kind::Nfs)
}

type Test = (&'static str, Kind, fn() -> Result<()>);

fn main() {
    if let Err(e) = become_root() {
        println!("storage tests skipped: {e}");
        println!("0 passed, 0 failed");
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tests: [Test; 2] = [
        ("iscsi_failovers", Kind::Iscsi, iscsi_failovers),
        ("nfs_failovers", Kind::Nfs, nfs_failovers),
    ];
    let (mut passed, mut failed) = (0, 0);
    for (name, kind, test) in tests {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        if let Some(reason) = Server::unavailable(kind) {
            println!("test storage::{name} ... skipped: {reason}");
            continue;
        }
        let start = std::time::Instant::now();
        match test() {
            Ok(()) => {
                passed += 1;
                println!("test storage::{name} ... ok ({:.0?})", start.elapsed());
            }
            Err(e) => {
                failed += 1;
                println!("test storage::{name} ... FAILED\n{e}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}
