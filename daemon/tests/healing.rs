//! Hosts die, and a protected machine is protected again without a person: three hosts (network namespaces) with a
//! service each, shared storage, and clients of the guest that remember every acknowledged answer.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use ftvm_harness::client::Client;
use ftvm_harness::hosts::{become_root, Network, GUEST};
use ftvm_harness::service::{name, Hosts, Inventory};
use ftvm_harness::{guests, wait_for, Result, Scratch};

const LONG: Duration = Duration::from_secs(60);
/// What the machine may be without protection after it went live.
const PROTECTED_WITHIN: Duration = Duration::from_secs(15);

fn long() -> bool {
    std::env::var_os("FTVM_LONG").is_some_and(|v| v != "0")
}

fn hosts(test: &str, inventory: Inventory<'_>, net: Network) -> Result<Hosts> {
    let programs = (env!("CARGO_BIN_EXE_ftvmd"), env!("CARGO_BIN_EXE_ftctl"));
    Hosts::start(net, Scratch::new(test)?, programs, 3, inventory)
}

/// Define a tiny guest with a disk on shared storage on the first host, and start it there.
fn start_web(hosts: &Hosts, ft: &str) -> Result<()> {
    let (kernel, initrd) = guests::tiny()?;
    let (raw, image) = (hosts.scratch.path("fs.raw"), hosts.scratch.path("web.qcow2"));
    guests::run("truncate", &["-s", "64M", &raw])?;
    guests::run("mke2fs", &["-q", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", &raw])?;
    guests::run("qemu-img", &["convert", "-q", "-O", "qcow2", &raw, &image])?;
    let definition = format!(
        "# a server\n-m 192\n-kernel {kernel}\n-initrd {initrd}\n\
         -append console=ttyS0 quiet net addr={GUEST}/24 disk serve\n-drive file={image},if=virtio\n\
         -netdev tap,id=n0,ifname=vmtap,script=no,downscript=no\n-device virtio-net-pci,netdev=n0\n\
         -serial file:web.console\n-display none\n{ft}"
    );
    let file = hosts.scratch.path("web.conf");
    std::fs::write(&file, definition).map_err(|e| e.to_string())?;
    hosts.ftctl(0, &["define", "web", &file])?;
    hosts.ftctl(0, &["start", "web"])?;
    let console = hosts.path(0, "run/web.console");
    let serves = || std::fs::read_to_string(&console).ok()?.contains("ftload: http on").then_some(());
    wait_for("the guest", LONG, serves).map_err(|e| format!("{e}\n{}", hosts.logs()))
}

/// A session that counts, and durable writes.
fn clients(hosts: &Hosts) -> Vec<Client> {
    let at = SocketAddr::new(GUEST.parse().unwrap_or([0, 0, 0, 0].into()), 7000);
    let ms = Duration::from_millis;
    vec![
        Client::session(Some(hosts.net.client()), at, ms(10)),
        Client::journal(Some(hosts.net.client()), at, "heal", ms(20)),
    ]
}

fn progress(clients: &[Client], hosts: &Hosts) -> Result<()> {
    let before: Vec<u64> = clients.iter().map(Client::answers).collect();
    let more = || clients.iter().zip(&before).all(|(c, b)| c.answers() >= b + 10).then_some(());
    wait_for("answers of the guest", LONG, more).map_err(|e| format!("{e}\n{}", hosts.logs()))
}

fn finish(clients: Vec<Client>) -> Result<()> {
    for client in clients {
        let seen = client.finish()?;
        if let Some(wrong) = seen.wrong.first() {
            return Err(format!("{} wrong answers, the first: {wrong}", seen.wrong.len()));
        }
        println!("{} answers, the longest pause {:.0?}", seen.answers, seen.longest);
    }
    Ok(())
}

/// Kill hosts in turn: the primary's, then the backup's; each comes back, and is the spare for the next.
fn kill_in_turn(
    hosts: &mut Hosts,
    rounds: usize,
    mut between: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let clients = clients(hosts);
    let (mut primary, mut backup) = hosts.wait_protected("web", LONG)?;
    for round in 0..rounds {
        progress(&clients, hosts)?;
        let victim = if round % 2 == 0 { primary } else { backup };
        let what = if victim == primary { "primary" } else { "backup" };
        hosts.kill(victim)?;
        let (took, p, b) = hosts.wait_healed("web")?;
        println!(
            "round {round}: {} (the {what}) died; protected again after {took:.1?}: {} with {}",
            name(victim),
            name(p),
            name(b)
        );
        if took > PROTECTED_WITHIN {
            return Err(format!("that took too long\n{}", hosts.logs()));
        }
        progress(&clients, hosts)?;
        hosts.power_on(victim)?;
        between(round)?;
        (primary, backup) = (p, b);
    }
    finish(clients)
}

/// Nobody does anything but kill hosts.
fn static_peers() -> Result<()> {
    let mut hosts = hosts("healing", Inventory::Static, Network::new(3)?)?;
    start_web(&hosts, "-ft primary\n")?;
    kill_in_turn(&mut hosts, if long() { 10 } else { 2 }, |_| Ok(()))?;
    // Wherever it ran its definition is kept.
    let kept = (0..3).filter(|i| std::path::Path::new(&hosts.path(*i, "machines/web.conf")).exists());
    assert_eq!(kept.count(), 3, "{}", hosts.logs());
    let (primary, _) = hosts.wait_protected("web", LONG)?;
    let other = (0..3).find(|i| hosts.pair(*i, "web").0 == "none").ok_or("no spare host")?;
    let error = hosts.ftctl(other, &["start", "web"]).expect_err("it runs elsewhere");
    assert!(error.contains("runs on host-"), "{error}");
    hosts.ftctl(primary, &["destroy", "web"])?;
    wait_for("the end of all sides", LONG, || (0..3).all(|i| hosts.machines(i).is_empty()).then_some(()))
}

type Test = (&'static str, fn() -> Result<()>);

fn main() {
    let result = become_root().and_then(|()| run());
    if let Err(e) = result {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let tests: &[Test] = &[("static_peers", static_peers)];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    for (name, test) in tests {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        print!("test {name} ... ");
        let _ = std::io::stdout().flush();
        test().map_err(|e| format!("FAILED\n{name}: {e}"))?;
        println!("ok");
    }
    Ok(())
}
