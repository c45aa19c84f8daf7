//! Hosts with the service on them: a bus, ftvmd and its directories each, in the network of hosts.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use crate::hosts::Network;
use crate::{guests, wait_for, Result, Scratch};

/// How long a step may take on a busy host.
const LONG: Duration = Duration::from_secs(60);

/// A process that ends with the test.
pub struct Process(pub Child);

impl Process {
    /// SIGKILL, and wait until it is gone.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A host with its service.
struct Host {
    dir: String,
    /// `None`: the host is down.
    service: Option<Process>,
    _bus: Process,
}

/// Hosts that know each other.
pub struct Hosts {
    pub net: Network,
    pub scratch: Scratch,
    /// Where ftvmd and ftctl are.
    programs: (String, String),
    hosts: Vec<Host>,
}

/// How hosts find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inventory<'a> {
    /// Each one's file names the others.
    Static,
    /// In etcd: its members, and the directory of the certificates for it (`etcd.crt`, `etcd.key`, `ca.crt`).
    Etcd(&'a [String], &'a str),
}

/// The name of host `i`.
pub fn name(i: usize) -> String {
    format!("host-{}", (b'a' + i as u8) as char)
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

impl Hosts {
    /// Start `count` hosts on a network.
    pub fn start(
        net: Network,
        scratch: Scratch,
        (ftvmd, ftctl): (&str, &str),
        count: usize,
        inventory: Inventory<'_>,
    ) -> Result<Hosts> {
        let programs = (ftvmd.to_owned(), ftctl.to_owned());
        let mut hosts = Hosts { net, scratch, programs, hosts: Vec::new() };
        let tls = hosts.scratch.path("tls");
        guests::run(ftctl, &["cert", "ca", "--dir", &tls])?;
        for i in 0..count {
            guests::run(ftctl, &["cert", "host", &name(i), "--dir", &tls])?;
            let dir = hosts.scratch.path(&name(i));
            std::fs::create_dir_all(format!("{dir}/machines")).map_err(text)?;
            let mut config = format!(
                "name = \"{0}\"\naddress = \"{1}\"\n[tls]\nca = \"{tls}/ca.crt\"\ncertificate = \"{tls}/{0}.crt\"\n\
                 key = \"{tls}/{0}.key\"\n",
                name(i),
                Network::address(i)
            );
            match inventory {
                Inventory::Static => {
                    for j in (0..count).filter(|j| *j != i) {
                        let (name, address) = (name(j), Network::address(j));
                        config += &format!("[[peer]]\nname = \"{name}\"\naddress = \"{address}\"\n");
                    }
                }
                Inventory::Etcd(members, tls) => {
                    config += &format!(
                        "[etcd]\nendpoints = {members:?}\nlease = 3\nca = \"{tls}/ca.crt\"\n\
                         certificate = \"{tls}/etcd.crt\"\nkey = \"{tls}/etcd.key\"\n"
                    );
                }
            }
            std::fs::write(format!("{dir}/ftvmd.conf"), config).map_err(text)?;
            let bus = Process(bus(&dir, "system")?);
            hosts.hosts.push(Host { dir, service: None, _bus: bus });
            hosts.power_on(i)?;
        }
        Ok(hosts)
    }

    /// Add lines to the configuration of host `i`'s service and start it anew.
    pub fn configure(&mut self, i: usize, lines: &str) -> Result<()> {
        let path = self.path(i, "ftvmd.conf");
        let old = std::fs::read_to_string(&path).map_err(text)?;
        std::fs::write(&path, format!("{old}{lines}")).map_err(text)?;
        self.kill_service(i);
        self.power_on(i)
    }

    /// A file of host `i`.
    pub fn path(&self, i: usize, what: &str) -> String {
        format!("{}/{what}", self.hosts[i].dir)
    }

    /// A directory of which the service of each host has its own: storage that is not shared.
    pub fn private(&self) -> String {
        self.scratch.path("private")
    }

    /// A command on host `i`, with its bus, ftvm and ftctl.
    pub fn command(&self, i: usize, program: &str) -> Command {
        let mut command = self.net.on_host(i, program);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}/bus", self.hosts[i].dir));
        let found = guests::ftvm().unwrap_or_default();
        let found = std::path::Path::new(&found).parent().unwrap_or(std::path::Path::new("/"));
        let path = std::env::var("PATH").unwrap_or_default();
        let ftctl = std::path::Path::new(&self.programs.1).parent().unwrap_or(found);
        command.env("PATH", format!("{}:{}:{path}", ftctl.display(), found.display()));
        command
    }

    /// Start the service of host `i` (again).
    pub fn power_on(&mut self, i: usize) -> Result<()> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path(i, "ftvmd.log"))
            .map_err(text)?;
        std::fs::create_dir_all(self.private()).map_err(text)?;
        let child = self
            .command(i, "sh")
            .args(["-c", "mount -t tmpfs none \"$0\" && exec \"$@\"", &self.private(), &self.programs.0])
            .args(["--config", &self.path(i, "ftvmd.conf"), "--config-dir", &self.path(i, "machines")])
            .args(["--run-dir", &self.path(i, "run"), "--state-dir", &self.path(i, "state")])
            .args(["--ftvm", &guests::ftvm()?])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("ftvmd: {e}"))?;
        self.hosts[i].service = Some(Process(child));
        wait_for(&format!("the service of {}", name(i)), LONG, || self.ftctl(i, &["list"]).ok())
            .map(drop)
            .map_err(|e| format!("{e}\n{}", self.logs()))
    }

    /// Whether the host is up.
    pub fn is_on(&self, i: usize) -> bool {
        self.hosts[i].service.is_some()
    }

    /// The hosts that are up.
    pub fn up(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|i| self.is_on(*i)).collect()
    }

    /// The ftvm processes that the service of host `i` started.
    pub fn machines(&self, i: usize) -> Vec<i32> {
        let files = std::fs::read_dir(self.path(i, "run")).into_iter().flatten().flatten();
        let pid = |path: std::path::PathBuf| -> Option<i32> {
            let pid = std::fs::read_to_string(&path).ok()?.trim().parse().ok()?;
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let ours = String::from_utf8_lossy(&line).contains(path.to_str()?);
            ours.then_some(pid)
        };
        files
            .map(|f| f.path())
            .filter(|p| p.extension().is_some_and(|e| e == "pid"))
            .filter_map(pid)
            .collect()
    }

    /// SIGKILL the service only.
    pub fn kill_service(&mut self, i: usize) {
        self.hosts[i].service = None;
    }

    /// The host dies: its service and its machines, at once.
    pub fn kill(&mut self, i: usize) -> Result<()> {
        let machines = self.machines(i);
        self.kill_service(i);
        for pid in &machines {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        wait_for("the end of the host's machines", LONG, || self.machines(i).is_empty().then_some(()))
    }

    /// What ftctl prints on host `i`.
    pub fn ftctl(&self, i: usize, args: &[&str]) -> Result<String> {
        let out = self.command(i, &self.programs.1).args(args).output().map_err(text)?;
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            false => Err(format!(
                "{}{}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            )),
        }
    }

    /// What busctl prints on host `i`'s bus, as root or as another user.
    pub fn busctl(&self, i: usize, user: Option<u32>, args: &[&str]) -> Result<String> {
        let address = format!("--address=unix:path={}/bus", self.hosts[i].dir);
        let mut command = Command::new(if user.is_some() { "setpriv" } else { "busctl" });
        if let Some(user) = user {
            command.args(["--reuid", &user.to_string(), "--clear-groups", "busctl"]);
        }
        // The answer to a request that moves machines takes its time.
        let out = command.args([&address, "--timeout=120", "--"]).args(args).output().map_err(text)?;
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
        }
    }

    /// gdbus writes the signals of host `i`'s service to a file, one a line.
    pub fn watch(&self, i: usize) -> Result<(Process, String)> {
        let file = self.path(i, "signals");
        let out = std::fs::File::create(&file).map_err(text)?;
        let child = Command::new("gdbus")
            .args(["monitor", "--address", &format!("unix:path={}/bus", self.hosts[i].dir)])
            .args(["--dest", "org.ftvm"])
            .stdin(Stdio::null())
            .stdout(out)
            .spawn()
            .map_err(|e| format!("gdbus: {e}"))?;
        let begun = || std::fs::read_to_string(&file).ok()?.contains("is owned by").then_some(());
        let watch = Process(child);
        wait_for("gdbus", LONG, begun)?;
        Ok((watch, file))
    }

    /// ftctl on host `i`, which takes its time.
    pub fn spawn_ftctl(&self, i: usize, args: &[&str]) -> Result<Process> {
        let mut command = self.command(i, &self.programs.1);
        let child = command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        child.map(Process).map_err(text)
    }

    /// What ftctl prints on host `i`, as JSON.
    pub fn json(&self, i: usize, args: &[&str]) -> Result<Value> {
        let mut all = args.to_vec();
        all.push("--json");
        serde_json::from_str(&self.ftctl(i, &all)?).map_err(text)
    }

    /// A machine on host `i`: role and state of its pair.
    pub fn pair(&self, i: usize, machine: &str) -> (String, String) {
        let list = self.json(i, &["list"]).unwrap_or_default();
        let row = list.as_array().into_iter().flatten().find(|row| row["name"] == machine);
        let word = |key: &str| row.and_then(|r| r[key].as_str()).unwrap_or_default().to_owned();
        (word("role"), word("ft-state"))
    }

    /// The host on which a machine's primary is, once it is there; with the pair's state.
    pub fn primary(&self, machine: &str) -> Option<(usize, String)> {
        self.up().into_iter().find_map(|i| {
            let (role, state) = self.pair(i, machine);
            (role == "primary").then_some((i, state))
        })
    }

    /// Wait until a machine is protected: hosts of primary and backup.
    pub fn wait_protected(&self, machine: &str, limit: Duration) -> Result<(usize, usize)> {
        let both = || {
            let (primary, state) = self.primary(machine)?;
            let backup = self.up().into_iter().find(|i| self.pair(*i, machine).0 == "backup")?;
            (state == "protected").then_some((primary, backup))
        };
        wait_for(&format!("'{machine}' protected"), limit, both).map_err(|e| format!("{e}\n{}", self.logs()))
    }

    /// Wait until a machine that has just lost a side is live; then until it is protected: how long that took.
    pub fn wait_healed(&self, machine: &str) -> Result<(Duration, usize, usize)> {
        wait_for("the takeover", LONG, || self.primary(machine).filter(|(_, state)| state != "protected"))
            .map_err(|e| format!("{e}\n{}", self.logs()))?;
        let live = Instant::now();
        let (primary, backup) = self.wait_protected(machine, LONG)?;
        Ok((live.elapsed(), primary, backup))
    }

    /// What the services and machines said.
    pub fn logs(&self) -> String {
        let mut out = String::new();
        for (i, host) in self.hosts.iter().enumerate() {
            let run = std::fs::read_dir(format!("{}/run", host.dir)).into_iter().flatten().flatten();
            let logs = run.map(|f| f.path()).filter(|p| p.extension().is_some_and(|e| e == "log"));
            for path in logs.chain([format!("{}/ftvmd.log", host.dir).into()]) {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                out += &format!("--- {}: {}\n{text}", name(i), path.display());
            }
        }
        out
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // Machines outlive their service, but not their test.
        for i in 0..self.hosts.len() {
            let _ = self.kill(i);
        }
    }
}

/// Start a bus in a directory; its address is `unix:path=DIR/bus`.
pub fn bus(dir: &str, kind: &str) -> Result<Child> {
    let (socket, config) = (format!("{dir}/bus"), format!("{dir}/bus.conf"));
    let text = format!(
        "<busconfig><type>{kind}</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>\
         <policy context=\"default\"><allow user=\"*\"/><allow own=\"*\"/><allow send_type=\"method_call\"/>\
         <allow send_destination=\"*\" eavesdrop=\"false\"/><allow receive_sender=\"*\"/></policy></busconfig>"
    );
    std::fs::write(&config, text).map_err(|e| e.to_string())?;
    let daemon = Command::new("dbus-daemon")
        .args(["--nofork", "--nosyslog", "--config-file", &config])
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("dbus-daemon: {e}"))?;
    wait_for("the bus", LONG, || std::os::unix::net::UnixStream::connect(&socket).ok())?;
    Ok(daemon)
}
