//! Hosts die, and a protected machine is protected again without a person: three hosts (network namespaces) with a
//! service each, shared storage, and clients of the guest that remember every acknowledged answer.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ftvm_harness::client::Client;
use ftvm_harness::etcd::Etcd;
use ftvm_harness::hosts::{become_root, Network, GUEST};
use ftvm_harness::service::{name, Hosts, Inventory, Process};
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

/// Etcd with a member on each host, which asks clients for a certificate, and the certificates in `etcd` of the scratch
/// directory.
fn start_etcd(net: &Network, scratch: &Scratch) -> Result<Etcd> {
    let (ftctl, tls) = (env!("CARGO_BIN_EXE_ftctl"), scratch.path("etcd"));
    guests::run(ftctl, &["cert", "ca", "--dir", &tls])?;
    let addresses: Vec<String> = (0..3).map(Network::address).collect();
    let mut args = vec!["cert", "host", "etcd"];
    args.extend(addresses.iter().map(String::as_str));
    args.extend(["--dir", &tls]);
    guests::run(ftctl, &args)?;
    Etcd::start(net, scratch, 3, Some(&tls))
}

/// Hosts find each other in etcd, one member of which dies with the first host and stays dead.
fn shared_inventory() -> Result<()> {
    if let Some(reason) = Etcd::unavailable() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let net = Network::new(3)?;
    let scratch = Scratch::new("inventory")?;
    let mut etcd = start_etcd(&net, &scratch)?;
    let urls = etcd.urls.clone();
    let tls = scratch.path("etcd");
    let programs = (env!("CARGO_BIN_EXE_ftvmd"), env!("CARGO_BIN_EXE_ftctl"));
    let mut hosts = Hosts::start(net, scratch, programs, 3, Inventory::Etcd(&urls, &tls))?;
    let know = |hosts: &Hosts, count: usize| {
        wait_for("the hosts' knowledge of each other", LONG, || {
            let all = hosts.up().into_iter().all(|i| {
                let peers = hosts.json(i, &["peers"]).unwrap_or_default();
                let ready = peers.as_object().into_iter().flatten().filter(|(_, p)| p["answers"] == true);
                ready.count() == count
            });
            all.then_some(())
        })
        .map_err(|e| format!("{e}\n{}", hosts.logs()))
    };
    know(&hosts, 2)?;
    start_web(&hosts, "-ft primary\n")?;
    kill_in_turn(&mut hosts, if long() { 10 } else { 2 }, |round| {
        if round == 0 {
            etcd.members[0].kill();
        }
        Ok(())
    })?;
    know(&hosts, 2)?;
    // A host that is gone is no longer listed when its lease is over.
    let (primary, backup) = hosts.wait_protected("web", LONG)?;
    let spare = 3 - primary - backup;
    hosts.kill(spare)?;
    wait_for("the end of the lease", LONG, || {
        let peers = hosts.json(primary, &["peers"]).ok()?;
        peers.get(name(spare)).is_none().then_some(())
    })
}

/// A host is emptied, and takes part again; a backup is moved; both hosts race for a lock.
fn maintenance() -> Result<()> {
    let mut hosts = hosts("maintenance", Inventory::Static, Network::new(3)?)?;
    start_web(&hosts, "")?;
    // A machine without fault tolerance cannot move.
    hosts.ftctl(0, &["protect", "web"])?;
    let (primary, backup) = hosts.wait_protected("web", LONG)?;
    assert_eq!(primary, 0);
    let clients = clients(&hosts);
    progress(&clients, &hosts)?;

    // The backup goes where it is told to, and back where there is room.
    let spare = 3 - primary - backup;
    assert!(hosts.ftctl(primary, &["move-backup", "web", "nowhere"]).is_err());
    let error = hosts.ftctl(primary, &["move-backup", "web", &name(backup)]).expect_err("it is there");
    assert!(error.contains("already"), "{error}");
    let said = hosts.ftctl(primary, &["move-backup", "web", &name(spare)])?;
    assert!(said.contains(&name(spare)), "{said}");
    assert_eq!(hosts.wait_protected("web", LONG)?, (primary, spare));
    progress(&clients, &hosts)?;

    // The primary's host is emptied: a planned switch, and a new backup elsewhere. Nothing is lost.
    let said = hosts.ftctl(primary, &["maintenance", "on"]).map_err(|e| format!("{e}\n{}", hosts.logs()))?;
    assert!(said.starts_with("on"), "{said}");
    assert!(hosts.machines(primary).is_empty(), "{}", hosts.logs());
    let (second, third) = hosts.wait_protected("web", LONG)?;
    assert!(second != primary && third != primary);
    progress(&clients, &hosts)?;
    let error = hosts.ftctl(primary, &["start", "web"]).expect_err("in maintenance");
    assert!(error.contains("maintenance"), "{error}");
    // It is remembered when the service starts anew, and no backup comes here meanwhile.
    hosts.kill_service(primary);
    hosts.power_on(primary)?;
    let on = || (hosts.json(primary, &["maintenance"]).ok()?["maintenance"] == "on").then_some(());
    wait_for("maintenance after the restart", LONG, on)?;
    let seen = || (hosts.json(second, &["peers"]).ok()?[name(primary)]["maintenance"] == true).then_some(());
    wait_for("the word of the maintenance", LONG, seen)?;
    let error = hosts.ftctl(second, &["move-backup", "web"]).expect_err("there is no other host");
    assert!(error.contains("no host can have"), "{error}");

    // A second host cannot be emptied while the first one takes nothing.
    let mut entering = hosts.spawn_ftctl(third, &["maintenance", "on"])?;
    let waits = || {
        let state = hosts.json(third, &["maintenance"]).ok()?;
        state["waits"].to_string().contains("no host can have").then_some(())
    };
    wait_for("the reason", LONG, waits).map_err(|e| format!("{e}\n{}", hosts.logs()))?;
    assert_eq!(hosts.wait_protected("web", LONG)?, (second, third), "nothing was let go");
    hosts.ftctl(primary, &["maintenance", "off"])?;
    let status = wait_for("the end", LONG, || entering.0.try_wait().ok().flatten())
        .map_err(|e| format!("{e}\n{}", hosts.logs()))?;
    assert!(status.success());
    assert_eq!(hosts.wait_protected("web", LONG)?, (second, primary));
    hosts.ftctl(third, &["maintenance", "off"])?;
    progress(&clients, &hosts)?;

    // Are two hosts fit? Both race for names on the storage.
    let (peer, ports) = (name(third), ["--port", "8199"]);
    let check = |args: &[&str]| hosts.json(second, &[&["check", "--peer", &peer], args, &ports].concat());
    let fit = check(&["--lock-dir", &hosts.scratch.path(""), "--memory", "192"])
        .map_err(|e| format!("{e}\n{}", hosts.logs()))?;
    let found = fit["checks"].as_array().cloned().unwrap_or_default();
    for what in [
        "service",
        "versions",
        "features",
        "their memory",
        "round trip",
        "clocks",
        "bandwidth",
        "shared lock",
    ] {
        let one = found.iter().find(|f| f["check"] == what).ok_or_else(|| format!("{what}: {fit:#}"))?;
        println!("{what}: {}", one["seen"]);
    }
    // A directory that each host has for itself is found out, and so is a machine that is too large.
    let error = check(&["--lock-dir", &hosts.private()]).expect_err("not the same storage");
    assert!(
        error.contains("both hosts won a race") && error.contains("use storage that both hosts see"),
        "{error}"
    );
    let error = check(&["--memory", "100000000"]).expect_err("too large");
    assert!(error.contains("their memory") && error.contains("less (-m)"), "{error}");
    finish(clients)?;

    // The service dies, its machines do not; the next one finds them, and heals.
    hosts.kill_service(second);
    hosts.power_on(second)?;
    assert_eq!(hosts.wait_protected("web", LONG)?, (second, primary));
    hosts.kill(primary)?;
    assert_eq!(hosts.wait_protected("web", LONG)?, (second, third));
    Ok(())
}

/// Each host has a disk, a definition and a port of its own: what is written on a host is what its backup is started with.
fn own_disks() -> Result<()> {
    let mut hosts = hosts("disks", Inventory::Static, Network::new(3)?)?;
    let (kernel, initrd) = guests::tiny()?;
    let lock = hosts.scratch.path("web.lock");
    for i in 0..3 {
        let image = hosts.path(i, "disk.qcow2");
        guests::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
        if i == 0 {
            let raw = hosts.scratch.path("fs.raw");
            guests::run("truncate", &["-s", "64M", &raw])?;
            guests::run("mke2fs", &["-q", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", &raw])?;
            guests::run("qemu-img", &["convert", "-q", "-O", "qcow2", &raw, &image])?;
        }
        let definition = format!(
            "-m 192\n-uuid 5d1c7f3e-0c59-4a5e-9f5e-6f6b2f6d0001\n-kernel {kernel}\n-initrd {initrd}\n\
             -append console=ttyS0 quiet net addr={GUEST}/24 disk serve\n-drive file={image},if=virtio\n\
             -netdev tap,id=n0,ifname=vmtap,script=no,downscript=no\n-device virtio-net-pci,netdev=n0\n\
             -serial file:web.console\n-display none\n\
             -ft primary,disks=separate,lock={lock},listen=0.0.0.0:{}\n",
            8200 + i
        );
        // Host b has none: it cannot have the backup.
        if i != 1 {
            let file = hosts.path(i, "web.conf");
            std::fs::write(&file, definition).map_err(|e| e.to_string())?;
            hosts.ftctl(i, &["define", "web", &file])?;
        }
    }
    hosts.ftctl(0, &["start", "web"])?;
    assert_eq!(hosts.wait_protected("web", LONG)?, (0, 2));
    let clients = clients(&hosts);
    progress(&clients, &hosts)?;
    hosts.kill(0)?;
    wait_for("the takeover", LONG, || hosts.primary("web").filter(|p| p.0 == 2))?;
    progress(&clients, &hosts)?;
    hosts.power_on(0)?;
    assert_eq!(hosts.wait_protected("web", LONG)?, (2, 0));
    progress(&clients, &hosts)?;
    finish(clients)?;
    assert!(!Path::new(&hosts.path(1, "machines/web.conf")).exists());
    hosts.ftctl(2, &["destroy", "web"])?;
    wait_for("the end", LONG, || (0..3).all(|i| hosts.machines(i).is_empty()).then_some(()))?;
    guests::run("qemu-img", &["compare", &hosts.path(0, "disk.qcow2"), &hosts.path(2, "disk.qcow2")])
        .map(drop)
}

/// A machine that a person started by hand is healed where the configuration says so; it has no definition anywhere.
fn by_hand() -> Result<()> {
    let mut hosts = hosts("hand", Inventory::Static, Network::new(3)?)?;
    for i in 0..3 {
        hosts.configure(i, "[heal]\nforeign = true\nwait = 1\n")?;
    }
    let (kernel, initrd) = guests::tiny()?;
    let lock = hosts.scratch.path("hand.lock");
    let append = format!("console=ttyS0 quiet net addr={GUEST}/24 serve");
    let child = hosts
        .command(0, "ftvm")
        .args(["-name", "hand", "-m", "192", "-kernel", &kernel, "-initrd", &initrd, "-append", &append])
        .args([
            "-netdev",
            "tap,id=n0,ifname=vmtap,script=no,downscript=no",
            "-device",
            "virtio-net-pci,netdev=n0",
        ])
        .args(["-uuid", "5d1c7f3e-0c59-4a5e-9f5e-6f6b2f6d0002", "-display", "none", "-serial", "null"])
        .args(["-ft", &format!("primary,lock={lock},listen=0.0.0.0:8300")])
        .env("FTVM_REGISTRY", hosts.path(0, "run/machines"))
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut process = Process(child);
    let (primary, backup) = hosts.wait_protected("hand", LONG)?;
    assert_eq!(primary, 0);
    assert_eq!(hosts.json(0, &["status", "hand"])?["origin"], "foreign");
    assert_eq!(hosts.json(backup, &["status", "hand"])?["origin"], "backup");
    let at = SocketAddr::new(GUEST.parse().unwrap_or([0, 0, 0, 0].into()), 7000);
    let clients = vec![Client::session(Some(hosts.net.client()), at, Duration::from_millis(10))];
    progress(&clients, &hosts)?;
    hosts.kill_service(0);
    process.kill();
    let (took, primary, second) = hosts.wait_healed("hand")?;
    println!("protected again after {took:.1?}");
    assert_eq!((primary, second), (backup, 3 - backup));
    progress(&clients, &hosts)?;
    finish(clients)
}

/// Pacemaker's part is played: it asks the resource agent, sees promotion scores, and promotes where the best one is.
fn resource_agent() -> Result<()> {
    let mut hosts = hosts("agent", Inventory::Static, Network::new(3)?)?;
    // What Pacemaker's tool is told.
    let bin = hosts.scratch.path("bin");
    std::fs::create_dir_all(&bin).map_err(|e| e.to_string())?;
    let tool = format!("{bin}/crm_attribute");
    let script = "#!/bin/sh\nfor last; do :; done\n[ \"$last\" = -D ] && last=none\necho \"$last\" > \"$HA_RSCTMP/score\"\n";
    std::fs::write(&tool, script).map_err(|e| e.to_string())?;
    guests::run("chmod", &["755", &tool])?;
    let agent = guests::root().join("packaging/ocf/ftvm").display().to_string();
    let ask = |hosts: &Hosts, i: usize, action: &str| -> Result<i32> {
        let mut command = hosts.command(i, "sh");
        let path = format!("PATH={bin}:$PATH; export PATH; exec \"$0\" \"$1\"");
        let out = command
            .args(["-c", &path, &agent, action])
            .envs([("OCF_RESKEY_name", "web"), ("OCF_RESKEY_shutdown_seconds", "2")])
            .env("HA_RSCTMP", hosts.path(i, "rsctmp"))
            .output()
            .map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if !said.is_empty() {
            println!("{action} on {}: {}", name(i), said.trim());
        }
        Ok(out.status.code().unwrap_or(-1))
    };
    let score = |hosts: &Hosts, i: usize| {
        std::fs::read_to_string(hosts.path(i, "rsctmp/score")).unwrap_or_default().trim().to_owned()
    };
    const PROMOTED: i32 = 8;
    start_web(&hosts, "-ft primary\n")?;
    hosts.ftctl(0, &["destroy", "web"])?;
    // A backup that was being made finds no primary.
    wait_for("the end", LONG, || (0..3).all(|i| hosts.machines(i).is_empty()).then_some(()))?;
    assert_eq!(ask(&hosts, 0, "meta-data")?, 0);
    for i in 0..3 {
        assert_eq!(ask(&hosts, i, "monitor")?, 7, "not started");
        assert_eq!(ask(&hosts, i, "start")?, 0);
        assert_eq!(ask(&hosts, i, "monitor")?, 0);
    }
    // Where the machine is defined it may be promoted.
    assert_eq!(score(&hosts, 0), "5");
    assert_eq!(ask(&hosts, 0, "promote")?, 0);
    assert_eq!(ask(&hosts, 0, "monitor")?, PROMOTED);
    let (_, backup) = hosts.wait_protected("web", LONG)?;
    assert_eq!((ask(&hosts, backup, "monitor")?, score(&hosts, backup).as_str()), (0, "100"));

    // Its host dies: the backup goes live by itself, asks to be promoted, and is.
    hosts.kill(0)?;
    wait_for("the takeover", LONG, || hosts.primary("web"))?;
    assert_eq!((ask(&hosts, backup, "monitor")?, score(&hosts, backup).as_str()), (0, "1000"));
    assert_eq!(ask(&hosts, backup, "promote")?, 0);
    assert_eq!(ask(&hosts, backup, "monitor")?, PROMOTED);
    hosts.power_on(0)?;
    // The one that comes back was promoted, and is not any more: it has failed, and is stopped and started.
    assert_eq!(ask(&hosts, 0, "monitor")?, 9);
    assert_eq!((ask(&hosts, 0, "demote")?, ask(&hosts, 0, "stop")?, ask(&hosts, 0, "start")?), (0, 0, 0));

    // Moved as planned: demoted here, promoted there; the guest goes on.
    let (primary, second) = hosts.wait_protected("web", LONG)?;
    assert_eq!(primary, backup);
    assert_eq!(ask(&hosts, primary, "demote")?, 0);
    assert_eq!(ask(&hosts, second, "promote")?, 0);
    assert_eq!((ask(&hosts, second, "monitor")?, ask(&hosts, primary, "monitor")?), (PROMOTED, 0));
    hosts.wait_protected("web", LONG)?;

    // Stopped everywhere, the backup first.
    for i in [primary, 3 - primary - second, second] {
        assert_eq!(ask(&hosts, i, "stop")?, 0);
        assert_eq!(ask(&hosts, i, "monitor")?, 7);
    }
    assert!((0..3).all(|i| hosts.machines(i).is_empty()), "{}", hosts.logs());
    Ok(())
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
    let tests: &[Test] = &[
        ("static_peers", static_peers),
        ("shared_inventory", shared_inventory),
        ("maintenance", maintenance),
        ("own_disks", own_disks),
        ("by_hand", by_hand),
        ("resource_agent", resource_agent),
    ];
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
