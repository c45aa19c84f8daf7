//! Every method, property and signal of the interfaces, driven by busctl and gdbus, with a protected machine on three
//! hosts behind them; and every method that changes something is denied to whom it is not allowed.

use std::collections::BTreeSet;
use std::time::Duration;

use ftvm_harness::hosts::{become_root, Network, GUEST};
use ftvm_harness::pair::flip_guest_memory;
use ftvm_harness::service::{name, Hosts, Inventory};
use ftvm_harness::{guests, wait_for, Result, Scratch};

const LONG: Duration = Duration::from_secs(120);
const NOBODY: u32 = 65534;
const ROOT: &str = "/org/ftvm";
const WEB: &str = "/org/ftvm/machine/web";
const MANAGER: &str = "org.ftvm.Manager1";
const MACHINE: &str = "org.ftvm.Machine1";
const FT: &str = "org.ftvm.FaultTolerance1";

/// Methods that only look.
const OPEN: &[&str] = &["List", "LookupByName", "LookupByUuid", "HostInventory", "Peers"];

/// Drives the service of one host and remembers what it drove.
struct Driver<'a> {
    hosts: &'a Hosts,
    used: BTreeSet<String>,
}

impl Driver<'_> {
    fn call_on(
        &mut self,
        host: usize,
        path: &str,
        interface: &str,
        method: &str,
        args: &[&str],
    ) -> Result<String> {
        self.used.insert(format!("{interface}.{method}"));
        let all = [&["call", "org.ftvm", path, interface, method], args].concat();
        let said = self.hosts.busctl(host, None, &all);
        said.map_err(|e| format!("{method}: {e}\n{}", self.hosts.logs()))
    }

    fn manager(&mut self, method: &str, args: &[&str]) -> Result<String> {
        self.call_on(0, ROOT, MANAGER, method, args)
    }

    fn machine(&mut self, method: &str) -> Result<String> {
        self.call_on(0, WEB, MACHINE, method, &[])
    }

    fn ft(&mut self, host: usize, method: &str, args: &[&str]) -> Result<String> {
        self.call_on(host, WEB, FT, method, args)
    }

    fn get(&mut self, host: usize, path: &str, interface: &str, property: &str) -> Result<String> {
        self.used.insert(format!("{interface}.{property}"));
        self.hosts.busctl(host, None, &["get-property", "org.ftvm", path, interface, property])
    }

    fn wait(&mut self, host: usize, interface: &str, property: &str, value: &str) -> Result<()> {
        let path = if interface == MANAGER { ROOT } else { WEB };
        let mut last = String::new();
        wait_for(&format!("{property} {value} on {}", name(host)), LONG, || {
            last = self.get(host, path, interface, property).unwrap_or_else(|e| e);
            (last == value).then_some(())
        })
        .map_err(|e| format!("{e}; last: {last}\n{}", self.hosts.logs()))
    }

    /// A signal of `interface` on a host, which gdbus saw after so many others of its kind.
    fn signal(
        &mut self,
        (host, file): (usize, &str),
        interface: &str,
        signal: &str,
        part: &str,
        seen: usize,
    ) -> Result<()> {
        self.used.insert(format!("{interface}.{signal}"));
        let mark = format!("{WEB}: {interface}.{signal} (");
        let count = || {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let found = text.lines().filter(|l| l.starts_with(&mark) && l.contains(part)).count();
            (found > seen).then_some(())
        };
        wait_for(&format!("{signal} {part} on {}", name(host)), LONG, count).map_err(|e| {
            format!("{e}\n{}\n{}", std::fs::read_to_string(file).unwrap_or_default(), self.hosts.logs())
        })
    }
}

fn long() -> bool {
    std::env::var_os("FTVM_LONG").is_some_and(|v| v != "0")
}

/// The definition of a guest with a disk; Debian where there is time, and what shows on its console when it is ready.
fn definition(hosts: &Hosts) -> Result<(String, &'static str)> {
    let image = hosts.scratch.path("web.qcow2");
    let rest = format!(
        "-drive file={image},if=virtio\n-netdev tap,id=n0,ifname=vmtap,script=no,downscript=no\n\
         -device virtio-net-pci,netdev=n0\n-serial file:web.console\n-display none\n"
    );
    if long() {
        std::fs::copy(guests::debian()?, &image).map_err(|e| e.to_string())?;
        return Ok((format!("-m 512\n{rest}"), "GUEST READY"));
    }
    let (kernel, initrd) = guests::tiny()?;
    guests::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
    let head = format!(
        "-m 192\n-kernel {kernel}\n-initrd {initrd}\n-append console=ttyS0 quiet net addr={GUEST}/24 serve\n"
    );
    Ok((head + &rest, "ftload: http on"))
}

fn members() -> Result<()> {
    let programs = (env!("CARGO_BIN_EXE_ftvmd"), env!("CARGO_BIN_EXE_ftctl"));
    let hosts = Hosts::start(Network::new(3)?, Scratch::new("members")?, programs, 3, Inventory::Static)?;
    let watches: Vec<_> = (0..3).map(|i| hosts.watch(i)).collect::<Result<_>>()?;
    let seen = |host: usize| (host, watches[host].1.as_str());
    let (text, ready) = definition(&hosts)?;
    let mut d = Driver { hosts: &hosts, used: BTreeSet::new() };

    // Defined, found, started.
    assert_eq!(d.manager("Define", &["ss", "web", &text])?, format!("o \"{WEB}\""));
    let uuid = d.get(0, WEB, MACHINE, "Uuid")?;
    let uuid = uuid.trim_start_matches("s ").trim_matches('"');
    assert_eq!(d.manager("LookupByName", &["s", "web"])?, format!("o \"{WEB}\""));
    assert_eq!(d.manager("LookupByUuid", &["s", uuid])?, format!("o \"{WEB}\""));
    assert_eq!(d.manager("List", &[])?, format!("a(oss) 1 \"{WEB}\" \"web\" \"shutoff\""));
    denied(&hosts)?;
    assert_eq!(d.manager("Start", &["s", "web"])?, format!("o \"{WEB}\""));
    d.wait(0, MACHINE, "State", "s \"running\"")?;
    let console = hosts.path(0, "run/web.console");
    let serves = || std::fs::read_to_string(&console).ok()?.contains(ready).then_some(());
    wait_for("the guest", Duration::from_secs(600), serves).map_err(|e| format!("{e}\n{}", hosts.logs()))?;
    let objects = hosts.busctl(
        0,
        None,
        &["call", "org.ftvm", ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"],
    )?;
    assert!(objects.contains(WEB) && objects.contains(FT), "{objects}");
    assert!(d.manager("HostInventory", &[])?.contains("\"running\" u 1"));
    let peers = d.manager("Peers", &[])?;
    assert!(peers.contains("\"host-b\"") && peers.contains("\"answers\" b true"), "{peers}");
    let dir = hosts.scratch.path("");
    let check =
        d.manager("CheckPeer", &["sa{sv}", "host-b", "2", "lock-dir", "s", &dir, "memory", "t", "192"])?;
    assert!(check.contains("\"shared lock\" true") && check.contains("\"their memory\" true"), "{check}");
    for (interface, property, part) in [
        (MANAGER, "Version", env!("CARGO_PKG_VERSION")),
        (MANAGER, "HostName", "host-a"),
        (MANAGER, "Maintenance", "off"),
        (MANAGER, "MaintenanceWaits", "as 0"),
        (MACHINE, "Name", "web"),
        (MACHINE, "Origin", "defined"),
        (MACHINE, "Pid", "u "),
        (MACHINE, "QmpSocket", "run/web.qmp"),
        (MACHINE, "CommandLine", "-daemonize"),
        (MACHINE, "Statistics", "cpu-time-ms"),
        (FT, "Role", "none"),
        (FT, "State", "off"),
        (FT, "LastFailover", "a{sv} 0"),
    ] {
        let path = if interface == MANAGER { ROOT } else { WEB };
        let value = d.get(0, path, interface, property)?;
        assert!(value.contains(part), "{property}: {value}");
    }
    d.machine("Pause")?;
    d.wait(0, MACHINE, "State", "s \"paused\"")?;
    d.machine("Resume")?;
    d.wait(0, MACHINE, "State", "s \"running\"")?;

    // Protected; a peer starts the backup.
    d.ft(0, "TurnOn", &["a{sv}", "1", "max-lag", "u", "900"])?;
    d.signal(seen(0), FT, "StateChanged", "'primary', 'unprotected'", 0)?;
    d.signal(seen(0), FT, "StateChanged", "'primary', 'protected'", 0)?;
    for (property, part) in [("Peer", "10.77.0."), ("Lag", "d "), ("LogBandwidth", "d "), ("Throttle", "d ")]
    {
        let value = d.get(0, WEB, FT, property)?;
        assert!(value.contains(part), "{property}: {value}");
    }
    let told = || (d.get(0, WEB, FT, "PeerHost").ok()?.contains("host-")).then_some(());
    wait_for("the name of the backup's host", LONG, told)?;
    let (_, backup) = hosts.wait_protected("web", LONG)?;
    let spare = 3 - backup;
    assert_eq!(d.ft(0, "MigrateBackup", &["s", &name(spare)])?, format!("s \"{}\"", name(spare)));
    d.signal(seen(0), FT, "Reprotected", "", 0)?;
    d.wait(0, FT, "State", "s \"protected\"")?;
    d.ft(0, "TestRestart", &[])?;
    d.signal(seen(0), FT, "Reprotected", "", 1)?;
    d.wait(0, FT, "State", "s \"protected\"")?;

    // The backup's memory goes bad: found, told, and made anew.
    let pid = hosts.machines(spare).first().copied().ok_or("there is no backup")?;
    flip_guest_memory(pid)?;
    d.signal(seen(spare), FT, "Diverged", "", 0)?;
    d.signal(seen(0), FT, "Reprotected", "", 2)?;

    // Suspended, no one makes a backup; resumed, a peer does.
    d.wait(0, FT, "State", "s \"protected\"")?;
    d.ft(0, "Suspend", &[])?;
    d.wait(0, FT, "State", "s \"unprotected\"")?;
    std::thread::sleep(Duration::from_secs(4));
    assert!((1..3).all(|i| hosts.machines(i).is_empty()), "{}", hosts.logs());
    d.ft(0, "Resume", &[])?;
    let (_, backup) = hosts.wait_protected("web", LONG)?;

    // A planned switch there and, by maintenance, on to a third host.
    d.ft(0, "TestFailover", &[])?;
    d.signal(seen(backup), FT, "FailedOver", "'a planned switch'", 0)?;
    assert_eq!(hosts.wait_protected("web", LONG)?, (backup, 0));
    assert!(d.get(backup, WEB, FT, "LastFailover")?.contains("\"count\" t 1"));
    d.call_on(backup, ROOT, MANAGER, "EnterMaintenance", &[])?;
    d.wait(backup, MANAGER, "Maintenance", "s \"on\"")?;
    d.call_on(backup, ROOT, MANAGER, "LeaveMaintenance", &[])?;
    d.wait(backup, MANAGER, "Maintenance", "s \"off\"")?;
    let (primary, backup) = hosts.wait_protected("web", LONG)?;
    assert_eq!(primary, 0, "it came back to its backup");
    d.ft(0, "TurnOff", &[])?;
    d.wait(0, FT, "State", "s \"off\"")?;
    wait_for("the backup's end", LONG, || hosts.machines(backup).is_empty().then_some(()))?;

    // Reset, shut down (Debian obeys; the tiny guest has nothing that would), started again, cut off.
    d.machine("Reset")?;
    d.machine("Shutdown")?;
    d.wait(0, MACHINE, "State", "s \"running\"")?;
    d.machine("Destroy")?;
    d.wait(0, MACHINE, "State", "s \"shutoff\"")?;
    // The peers must know, too.
    wait_for("a start", LONG, || hosts.busctl(0, None, &["call", "org.ftvm", WEB, MACHINE, "Start"]).ok())?;
    d.used.insert(format!("{MACHINE}.Start"));
    d.machine("Destroy")?;
    d.manager("Undefine", &["s", "web"])?;
    assert!(d.manager("LookupByName", &["s", "web"]).is_err());

    for (interface, xml) in ftvm_daemon::service::interfaces() {
        for (_, member) in declared(&xml) {
            assert!(d.used.contains(&format!("{interface}.{member}")), "{interface}.{member} was not driven");
        }
    }
    Ok(())
}

/// What an interface declares: kind and name.
fn declared(xml: &str) -> Vec<(&str, &str)> {
    fn one(line: &str) -> Option<(&str, &str)> {
        let (kind, rest) = line.trim_start().strip_prefix('<')?.split_once(" name=\"")?;
        ["method", "signal", "property"].contains(&kind).then(|| Some((kind, rest.split('"').next()?)))?
    }
    xml.lines().filter_map(one).collect()
}

/// Nobody may change anything; the refusal is AccessDenied (busctl says it in its own words).
fn denied(hosts: &Hosts) -> Result<()> {
    for (interface, xml) in ftvm_daemon::service::interfaces() {
        let path = if interface == MANAGER { ROOT } else { WEB };
        for (_, method) in declared(&xml).into_iter().filter(|(kind, _)| *kind == "method") {
            if OPEN.contains(&method) {
                continue;
            }
            let args: &[&str] = match method {
                "Define" => &["ss", "web", "-m 64"],
                "Undefine" | "MigrateBackup" => &["s", "web"],
                "Start" if interface == MANAGER => &["s", "web"],
                "CheckPeer" => &["sa{sv}", "host-b", "0"],
                "TurnOn" => &["a{sv}", "0"],
                _ => &[],
            };
            let all = [&["call", "org.ftvm", path, interface, method], args].concat();
            match hosts.busctl(0, Some(NOBODY), &all) {
                Ok(said) => return Err(format!("{interface}.{method} was not denied: {said}")),
                Err(e) if e.contains("Access denied") => {}
                Err(e) => return Err(format!("{interface}.{method}: {e}")),
            }
        }
    }
    let open = hosts.busctl(0, Some(NOBODY), &["call", "org.ftvm", ROOT, MANAGER, "List"])?;
    assert!(open.contains("web"), "{open}");
    Ok(())
}

fn main() {
    if let Err(e) = become_root().and_then(|()| members()) {
        eprintln!("members: {e}");
        std::process::exit(1);
    }
    println!("test members ... ok");
}
