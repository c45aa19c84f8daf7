//! One machine: its process, what is known of it, and what it can be told.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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
/// How long ftvm may take until its sockets listen.
const START: Duration = Duration::from_secs(60);
/// How long a machine may take to end after it was told so.
const END: Duration = Duration::from_secs(5);

/// The directories of a service.
#[derive(Clone, Debug)]
pub struct Dirs {
    /// Definitions.
    pub config: PathBuf,
    /// Sockets, pidfiles and logs.
    pub run: PathBuf,
    /// The program.
    pub ftvm: PathBuf,
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
    dirs: Dirs,
    status: Mutex<Status>,
    link: Mutex<Option<Arc<Link>>>,
    starting: Mutex<()>,
    removed: AtomicBool,
    /// How many failovers of the process have been told; `None`: it ran before this service did, and told them then.
    told: Mutex<Option<u64>>,
    notices: Sender<(Arc<Machine>, Notice)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// A machine that is watched from now on; what happens to it is told to `notices`.
    pub fn new(name: &str, dirs: &Dirs, notices: &Sender<(Arc<Machine>, Notice)>) -> Arc<Machine> {
        let machine = Arc::new(Machine {
            name: name.to_owned(),
            dirs: dirs.clone(),
            status: Mutex::default(),
            link: Mutex::default(),
            starting: Mutex::default(),
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

    fn run_path(&self, what: &str) -> PathBuf {
        self.dirs.run.join(format!("{}.{what}", self.name))
    }

    /// The QMP socket for others; the service has one of its own.
    pub fn qmp_socket(&self) -> PathBuf {
        self.run_path("qmp")
    }

    /// What is known of it.
    pub fn status(&self) -> Status {
        lock(&self.status).clone()
    }

    /// The defined UUID, or empty.
    pub fn uuid(&self) -> String {
        self.definition()
            .ok()
            .and_then(|a| definition::value(&a, "uuid").map(str::to_owned))
            .unwrap_or_default()
    }

    fn definition(&self) -> Result<Vec<String>> {
        definition::read(&self.config_path())
    }

    /// The process's command line, or the one that it would be started with.
    pub fn command_line(&self) -> Result<Vec<String>> {
        if let Some(pid) = self.pid() {
            if let Some(words) = command_line(pid) {
                return Ok(words);
            }
        }
        let mut words = vec![self.dirs.ftvm.display().to_string()];
        let args = self.definition()?;
        if definition::value(&args, "name").is_none() && !definition::is_backup(&args) {
            words.extend(["-name".to_owned(), self.name.clone()]);
        }
        words.extend(args);
        for what in ["control", "qmp"] {
            let socket = self.run_path(what).display().to_string().replace(',', ",,");
            words.extend(["-qmp".to_owned(), format!("unix:{socket},server=on,wait=off")]);
        }
        let path = |what| self.run_path(what).display().to_string();
        words.extend(["-daemonize", "-pidfile"].map(str::to_owned));
        words.extend([path("pid"), "-D".to_owned(), path("log")]);
        Ok(words)
    }

    /// The process, if it lives and is this machine's.
    pub fn pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.run_path("pid")).ok()?;
        let pid: u32 = text.trim().parse().ok()?;
        // A process id may be another process's by now.
        let socket = format!("unix:{},", self.run_path("control").display());
        command_line(pid)?.iter().any(|word| word.starts_with(&socket)).then_some(pid)
    }

    /// Start it; on return its sockets listen.
    pub fn start(&self) -> Result<()> {
        let _one = lock(&self.starting);
        if self.pid().is_some() {
            return Err(Error::State(format!("'{}' is running", self.name)));
        }
        let words = self.command_line()?;
        let messages = self.run_path("log");
        let file = |e| Error::File(messages.display().to_string(), e);
        let log = File::create(&messages).map_err(file)?;
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .current_dir(&self.dirs.run)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| Error::Machine(format!("{}: {e}", words[0])))?;
        let until = Instant::now() + START;
        let status = loop {
            match child.try_wait().map_err(file)? {
                Some(status) => break status,
                None if Instant::now() > until => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(Error::Machine(format!("ftvm did not start within {} s", START.as_secs())));
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        if !status.success() {
            let text = std::fs::read_to_string(&messages).unwrap_or_default();
            return Err(Error::Machine(format!("ftvm did not start: {}", text.trim())));
        }
        // The answer to the next question is to be true.
        let until = Instant::now() + END;
        while self.status().pid == 0 && self.pid().is_some() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
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
                self.pid().and_then(|pid| Some((pid, Link::connect(&self.run_path("control")).ok()?)));
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
                    *lock(&self.link) = None;
                }
            }
        }
    }

    /// Follow a running machine until its connection ends.
    fn follow(self: &Arc<Self>, pid: u32, link: &Link, events: &Receiver<Value>) {
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

/// A process's command line.
fn command_line(pid: u32) -> Option<Vec<String>> {
    let bytes = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let words: Vec<String> = text.trim_end_matches('\0').split('\0').map(str::to_owned).collect();
    (!text.is_empty()).then_some(words)
}
