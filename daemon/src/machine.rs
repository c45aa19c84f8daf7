//! One machine: its process, what is known of it, and what it can be told.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use crate::qmp::Link;
use crate::{definition, Error, Result};

/// How often a running machine is asked how it is.
const ASK: Duration = Duration::from_millis(500);
/// How long a machine may take to end after it was told so.
pub(crate) const END: Duration = Duration::from_secs(5);

/// The directories of a service.
#[derive(Clone, Debug)]
pub struct Dirs {
    /// Definitions.
    pub config: PathBuf,
    /// Sockets, pidfiles and logs.
    pub run: PathBuf,
    /// The program.
    pub ftvm: PathBuf,
    /// Where machines that others start make themselves known.
    pub registry: PathBuf,
}

/// Where a machine comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This service starts it.
    Service,
    /// A person or another program (libvirt) did.
    Foreign(Foreign),
}

/// A process that made itself known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    pub pid: u32,
    /// When it began, in ticks: the number alone may be another process's later.
    pub began: u64,
    pub socket: PathBuf,
}

/// What does not change while a process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub uuid: String,
    /// Bytes.
    pub memory: u64,
}

/// The state of the pair, as `query-ft` has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Ft {
    /// `none`, `primary` or `backup`.
    pub role: String,
    /// `off`, `unprotected`, `synchronizing`, `protected`, `following` or `live`.
    pub state: String,
    pub epoch: u64,
    /// `HOST:PORT`, or empty.
    pub peer: String,
    /// How far the backup's execution is behind, in milliseconds.
    pub lag: f64,
    /// Mbit/s.
    pub bandwidth: f64,
    /// Per cent.
    pub throttle: f64,
    pub failovers: u64,
    pub last: Option<Failover>,
    /// Where this side, as the primary, waits for a backup.
    pub listen: String,
    /// The lock's path, if it was given.
    pub lock: Option<String>,
    pub suspended: bool,
}

/// A failover.
#[derive(Clone, Debug, PartialEq)]
pub struct Failover {
    pub reason: String,
    /// Milliseconds from the last sign of life to the decision.
    pub detected: f64,
    /// Milliseconds from the decision to being live.
    pub takeover: f64,
}

impl Failover {
    fn parse(value: &Value) -> Option<Failover> {
        Some(Failover {
            reason: value.get("reason")?.as_str()?.to_owned(),
            detected: value["detected-ms"].as_f64().unwrap_or(0.0),
            takeover: value["takeover-ms"].as_f64().unwrap_or(0.0),
        })
    }
}

impl Default for Ft {
    fn default() -> Self {
        Ft {
            role: "none".into(),
            state: "off".into(),
            epoch: 0,
            peer: String::new(),
            lag: 0.0,
            bandwidth: 0.0,
            throttle: 0.0,
            failovers: 0,
            last: None,
            listen: String::new(),
            lock: None,
            suspended: false,
        }
    }
}

impl Ft {
    fn parse(value: &Value) -> Ft {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| value[key].as_f64().unwrap_or(0.0);
        Ft {
            role: text("role"),
            state: text("state"),
            epoch: value["epoch"].as_u64().unwrap_or(0),
            peer: text("peer"),
            lag: number("lag-ms"),
            bandwidth: number("log-mbps"),
            throttle: number("throttle-percent"),
            failovers: value["failovers"].as_u64().unwrap_or(0),
            last: Failover::parse(&value["last-failover"]),
            listen: text("listen"),
            lock: value["lock"].as_str().map(str::to_owned),
            suspended: value["suspended"] == true,
        }
    }
}

/// What is known of a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// `shutoff`, or what `query-status` says.
    pub state: String,
    /// 0 when it is shut off.
    pub pid: u32,
    pub ft: Ft,
}

impl Default for Status {
    fn default() -> Self {
        Status { state: "shutoff".into(), pid: 0, ft: Ft::default() }
    }
}

/// What the bus is told of a machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// From, to.
    Changed(Box<(Status, Status)>),
    FailedOver(Failover),
    /// Position, and the parts that differ.
    Diverged(u64, Vec<String>),
}

/// A machine.
pub struct Machine {
    pub name: String,
    pub origin: Origin,
    pub(crate) dirs: Dirs,
    status: Mutex<Status>,
    facts: Mutex<Facts>,
    link: Mutex<Option<Arc<Link>>>,
    /// One start at a time.
    pub(crate) starting: Mutex<()>,
    /// A start is under way.
    pub(crate) begun: AtomicBool,
    /// The UUID of the machine whose backup is being started.
    pub(crate) expected: Mutex<String>,
    removed: AtomicBool,
    /// How many failovers of the process have been told; `None`: it ran before this service did, and told them then.
    told: Mutex<Option<u64>>,
    notices: Sender<(Arc<Machine>, Notice)>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// A machine that is watched from now on; what happens to it is told to `notices`.
    pub fn new(
        name: &str,
        origin: Origin,
        dirs: &Dirs,
        notices: &Sender<(Arc<Machine>, Notice)>,
    ) -> Arc<Machine> {
        let machine = Arc::new(Machine {
            name: name.to_owned(),
            origin,
            dirs: dirs.clone(),
            status: Mutex::default(),
            facts: Mutex::default(),
            link: Mutex::default(),
            starting: Mutex::default(),
            begun: AtomicBool::new(false),
            expected: Mutex::default(),
            removed: AtomicBool::new(false),
            told: Mutex::new(Some(0)),
            notices: notices.clone(),
        });
        if machine.pid().is_some() {
            *lock(&machine.told) = None;
        }
        let watched = Arc::clone(&machine);
        std::thread::spawn(move || watched.watch());
        machine
    }

    /// Let go of it.
    pub fn remove(&self) {
        self.removed.store(true, Ordering::Relaxed);
    }

    /// Its definition.
    pub fn config_path(&self) -> PathBuf {
        self.dirs.config.join(format!("{}.conf", self.name))
    }

    pub(crate) fn run_path(&self, what: &str) -> PathBuf {
        self.dirs.run.join(format!("{}.{what}", self.name))
    }

    /// The QMP socket for others; the service has one of its own. Others' machines have what their starters gave them.
    pub fn qmp_socket(&self) -> Option<PathBuf> {
        (self.origin == Origin::Service).then(|| self.run_path("qmp"))
    }

    fn control_socket(&self) -> PathBuf {
        match &self.origin {
            Origin::Service => self.run_path("control"),
            Origin::Foreign(process) => process.socket.clone(),
        }
    }

    /// It has a process, or gets one.
    pub fn runs(&self) -> bool {
        self.begun.load(Ordering::Relaxed) || self.pid().is_some()
    }

    /// `defined`, `backup` (started for a peer, without a definition) or `foreign`.
    pub fn kind(&self) -> &'static str {
        match &self.origin {
            Origin::Foreign(_) => "foreign",
            Origin::Service if self.config_path().exists() => "defined",
            Origin::Service => "backup",
        }
    }

    /// What is known of it.
    pub fn status(&self) -> Status {
        lock(&self.status).clone()
    }

    /// The UUID of its process, or of its definition, or empty.
    pub fn uuid(&self) -> String {
        let running = lock(&self.facts).uuid.clone();
        let defined = || {
            let args = self.definition().ok()?;
            definition::value(&args, "uuid").map(str::to_owned)
        };
        match running.is_empty() {
            false => running,
            true => defined().unwrap_or_else(|| lock(&self.expected).clone()),
        }
    }

    /// The memory of its process's machine, in bytes.
    pub fn memory(&self) -> u64 {
        lock(&self.facts).memory
    }

    /// The arguments that its definition holds.
    pub fn definition(&self) -> Result<Vec<String>> {
        if self.origin != Origin::Service {
            return Err(Error::State(format!("'{}' was not started by this service", self.name)));
        }
        definition::read(&self.config_path())
    }

    /// The definition's text, if there is one.
    pub fn definition_text(&self) -> Option<String> {
        let ours = self.origin == Origin::Service;
        ours.then(|| std::fs::read_to_string(self.config_path()).ok()).flatten()
    }

    /// The process, if it lives and is this machine's.
    pub fn pid(&self) -> Option<u32> {
        if let Origin::Foreign(process) = &self.origin {
            return (began(process.pid) == Some(process.began)).then_some(process.pid);
        }
        let text = std::fs::read_to_string(self.run_path("pid")).ok()?;
        let pid: u32 = text.trim().parse().ok()?;
        // A process id may be another process's by now.
        let socket = format!("unix:{},", self.run_path("control").display());
        command_line(pid)?.iter().any(|word| word.starts_with(&socket)).then_some(pid)
    }

    /// Give it a QMP command.
    pub fn command(&self, name: &str, arguments: Value) -> Result<Value> {
        let link = lock(&self.link).clone();
        let link = link.ok_or_else(|| Error::State(format!("'{}' is not running", self.name)))?;
        link.command(name, arguments)
    }

    /// End it at once, as if its power were cut; on return it is gone.
    pub fn destroy(&self) -> Result<()> {
        let pid = self.pid().ok_or_else(|| Error::State(format!("'{}' is not running", self.name)))?;
        // In order, so that it releases its pair and its locks; a machine that does not answer is killed.
        if self.command("quit", Value::Null).is_err() || !self.gone_within(END) {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            if !self.gone_within(END) {
                return Err(Error::Machine(format!("'{}' (process {pid}) does not end", self.name)));
            }
        }
        Ok(())
    }

    /// Wait until its status is as wanted.
    pub fn wait(&self, limit: Duration, wanted: impl Fn(&Status) -> bool) -> bool {
        let until = Instant::now() + limit;
        while !wanted(&self.status()) {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    fn gone_within(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while self.pid().is_some() || self.status().pid != 0 {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    fn tell(self: &Arc<Self>, notice: Notice) {
        // No one listens when the service ends.
        let _ = self.notices.send((Arc::clone(self), notice));
    }

    fn set(self: &Arc<Self>, new: Status) {
        let old = std::mem::replace(&mut *lock(&self.status), new.clone());
        if old != new {
            self.tell(Notice::Changed(Box::new((old, new.clone()))));
        }
        // Counted rather than taken from the event: a failover may come before the connection.
        let told = lock(&self.told).replace(new.ft.failovers).unwrap_or(new.ft.failovers);
        if let Some(failover) = new.ft.last.filter(|_| new.ft.failovers > told) {
            self.tell(Notice::FailedOver(failover));
        }
    }

    fn watch(self: &Arc<Self>) {
        while !self.removed.load(Ordering::Relaxed) {
            let connected =
                self.pid().and_then(|pid| Some((pid, Link::connect(&self.control_socket()).ok()?)));
            match connected {
                None => {
                    let state = Status::default();
                    // A process that does not answer (yet) is there all the same.
                    match self.pid() {
                        Some(_) if lock(&self.told).is_none() => {}
                        Some(pid) => self.set(Status { pid, state: "unknown".into(), ..state }),
                        None => self.set(state),
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
                Some((pid, (link, events))) => {
                    let link = Arc::new(link);
                    *lock(&self.link) = Some(Arc::clone(&link));
                    self.follow(pid, &link, &events);
                    // What it said last.
                    events.try_iter().for_each(|event| self.happened(&event));
                    *lock(&self.link) = None;
                    if self.pid().is_none() {
                        *lock(&self.facts) = Facts::default();
                    }
                }
            }
        }
    }

    /// Follow a running machine until its connection ends.
    fn follow(self: &Arc<Self>, pid: u32, link: &Link, events: &Receiver<Value>) {
        let uuid = link.command("query-uuid", Value::Null).unwrap_or_default();
        let memory = link.command("query-memory-size-summary", Value::Null).unwrap_or_default();
        *lock(&self.facts) = Facts {
            uuid: uuid["UUID"].as_str().unwrap_or_default().to_owned(),
            memory: memory["base-memory"].as_u64().unwrap_or(0),
        };
        while !self.removed.load(Ordering::Relaxed) {
            let Ok(run) = link.command("query-status", Value::Null) else { return };
            let Ok(ft) = link.command("query-ft", Value::Null) else { return };
            let state = run["status"].as_str().unwrap_or("unknown").to_owned();
            self.set(Status { state, pid, ft: Ft::parse(&ft) });
            match events.recv_timeout(ASK) {
                Ok(event) => {
                    self.happened(&event);
                    while let Ok(event) = events.try_recv() {
                        self.happened(&event);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn happened(self: &Arc<Self>, event: &Value) {
        let data = &event["data"];
        match event["event"].as_str() {
            // The short states between two questions are told, too.
            Some("FT_STATE_CHANGED") => {
                let text = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
                let mut new = self.status();
                new.ft.role = text("role");
                new.ft.state = text("state");
                new.ft.peer = text("peer");
                new.ft.epoch = data["epoch"].as_u64().unwrap_or(new.ft.epoch);
                self.set(new);
            }
            Some("FT_DIVERGED") => {
                let parts = data["parts"].as_array().map(Vec::as_slice).unwrap_or_default();
                let parts = parts.iter().filter_map(|p| p.as_str().map(str::to_owned)).collect();
                self.tell(Notice::Diverged(data["position"].as_u64().unwrap_or(0), parts));
            }
            _ => {}
        }
    }

    /// Processor time in milliseconds, resident memory in bytes and run time in milliseconds of its process.
    pub fn usage(&self) -> Option<(u64, u64, u64)> {
        let pid = self.pid()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // proc(5): the name in parentheses may hold blanks; fields 14, 15, 22 and 24 are utime, stime, starttime, rss.
        let fields: Vec<u64> =
            stat.rsplit_once(')')?.1.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        let tick = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??.max(1) as u64;
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??.max(1) as u64;
        let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
        let up = std::fs::read_to_string("/proc/uptime").ok()?;
        let up: f64 = up.split_whitespace().next()?.parse().ok()?;
        let ms = |ticks: u64| ticks * 1000 / tick;
        let run = ((up * 1000.0) as u64).saturating_sub(ms(field(22)));
        Some((ms(field(14) + field(15)), field(24) * page, run))
    }
}

/// When a process began, in ticks since the host did.
pub(crate) fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // A zombie is gone, but for its parent.
    let state = fields.next()?;
    (state != "Z").then(|| fields.nth(18)?.parse().ok())?
}

/// A process's command line.
pub(crate) fn command_line(pid: u32) -> Option<Vec<String>> {
    let bytes = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let words: Vec<String> = text.trim_end_matches('\0').split('\0').map(str::to_owned).collect();
    (!text.is_empty()).then_some(words)
}
