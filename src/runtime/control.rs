//! What monitors ask, and what they are told.

use std::sync::{Arc, Mutex};

use ftvm_qmp::{only, EventSink, Handler, QmpError};
use serde::Serialize;
use serde_json::{json, Map, Value};

use super::{Event, Events, Quit};

/// A monitor's command to the machine thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Stop,
    Cont,
    Reset,
    Powerdown,
    Nmi,
    Ft(FtWish),
}

/// What the user wants of the pair, in vSphere's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FtWish {
    /// Let the backup go and take no other.
    Suspend,
    /// Take backups again.
    Resume,
    /// A planned switch: the backup goes live, this side becomes its backup.
    TestFailover,
    /// The backup joins anew.
    RestartBackup,
}

/// `query-status`'s states that ftvm reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    Prelaunch,
    Running,
    Paused,
    Shutdown,
    /// A backup that follows its primary.
    InMigrate,
    InternalError,
    GuestPanicked,
    /// A disk request failed and the drive's policy is to stop.
    IoError,
}

impl RunState {
    /// QEMU's word.
    pub fn word(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::Shutdown => "shutdown",
            RunState::InMigrate => "inmigrate",
            RunState::InternalError => "internal-error",
            RunState::GuestPanicked => "guest-panicked",
            RunState::IoError => "io-error",
        }
    }
}

/// The last failover, for `query-ft`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failover {
    pub reason: String,
    /// From the last sign of life to the decision to ask the lock.
    pub detected_ms: f64,
    /// From that decision to the machine being live (or alone).
    pub takeover_ms: f64,
}

/// The answer of `query-ft`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FtStatus {
    /// none, primary or backup
    pub role: &'static str,
    /// off, unprotected, synchronizing, protected, following or live
    pub state: &'static str,
    pub epoch: u64,
    pub peer: Option<String>,
    pub lag_ms: f64,
    pub log_mbps: f64,
    pub log_bytes: u64,
    pub outputs_held: usize,
    pub throttle_percent: f64,
    pub position: u64,
    pub failovers: u64,
    pub last_failover: Option<Failover>,
}

impl Default for FtStatus {
    fn default() -> Self {
        FtStatus {
            role: "none",
            state: "off",
            epoch: 0,
            peer: None,
            lag_ms: 0.0,
            log_mbps: 0.0,
            log_bytes: 0,
            outputs_held: 0,
            throttle_percent: 0.0,
            position: 0,
            failovers: 0,
            last_failover: None,
        }
    }
}

/// What all threads may look at.
pub struct Shared {
    pub events: EventSink,
    state: Mutex<RunState>,
    ft: Mutex<FtStatus>,
    registers: Mutex<String>,
}

impl Shared {
    /// Nothing runs yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Shared {
            events: EventSink::default(),
            state: Mutex::new(RunState::Prelaunch),
            ft: Mutex::new(FtStatus::default()),
            registers: Mutex::new(String::new()),
        })
    }

    /// The machine's state.
    pub fn state(&self) -> RunState {
        self.state.lock().map_or(RunState::InternalError, |s| *s)
    }

    /// Set the machine's state.
    pub fn set_state(&self, state: RunState) {
        if let Ok(mut s) = self.state.lock() {
            *s = state;
        }
    }

    /// A copy of the pair's status.
    pub fn ft(&self) -> FtStatus {
        self.ft.lock().map(|f| f.clone()).unwrap_or_default()
    }

    /// Change the pair's status; emits FT_STATE_CHANGED if role or state changed.
    pub fn update_ft(&self, change: impl FnOnce(&mut FtStatus)) {
        let Ok(mut ft) = self.ft.lock() else { return };
        let before = (ft.role, ft.state);
        change(&mut ft);
        if (ft.role, ft.state) != before {
            log::info!("ft: {} is {}", ft.role, ft.state);
            let data = json!({"role": ft.role, "state": ft.state, "epoch": ft.epoch, "peer": ft.peer});
            drop(ft);
            self.events.emit("FT_STATE_CHANGED", data);
        }
    }

    /// Keep the registers for `info registers` (set when the machine stops).
    pub fn set_registers(&self, text: String) {
        if let Ok(mut r) = self.registers.lock() {
            *r = text;
        }
    }
}

/// Executes monitor commands.
pub struct Control {
    pub shared: Arc<Shared>,
    pub events: Events,
    pub name: Option<String>,
    pub uuid: String,
}

/// QMP commands.
pub const COMMANDS: &[&str] = &[
    "qmp_capabilities",
    "query-commands",
    "query-status",
    "query-version",
    "query-name",
    "query-uuid",
    "query-ft",
    "ft-suspend",
    "ft-resume",
    "ft-test-failover",
    "ft-test-restart",
    "query-kvm",
    "stop",
    "cont",
    "system_reset",
    "system_powerdown",
    "inject-nmi",
    "quit",
    "human-monitor-command",
];

fn version() -> Value {
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {"major": 7, "minor": 2, "micro": 0},
        "package": format!("ftvm-{}", env!("CARGO_PKG_VERSION")),
        "ftvm": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": number(env!("CARGO_PKG_VERSION_PATCH")),
        },
    })
}

impl Control {
    fn send(&self, command: Command) -> Result<Value, QmpError> {
        self.events
            .send(Event::Command(command))
            .map(|()| json!({}))
            .map_err(|_| QmpError::generic("the machine has ended"))
    }

    /// A wish that makes sense for a primary in these states.
    fn ft(&self, wish: FtWish, states: &[&str]) -> Result<Value, QmpError> {
        let ft = self.shared.ft();
        if ft.role != "primary" {
            return Err(QmpError::generic(format!(
                "this side is no primary (role {}, {})",
                ft.role, ft.state
            )));
        }
        // A machine that has just gone live is without a backup.
        let state = if ft.state == "live" { "unprotected" } else { ft.state };
        if !states.contains(&state) {
            return Err(QmpError::generic(format!(
                "the machine is {}, not {}",
                ft.state,
                states.join(" or ")
            )));
        }
        self.send(Command::Ft(wish))
    }

    /// A line typed into the human monitor; returns its answer.
    pub fn human(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let run = |c: Command| self.send(c).map_or_else(|e| format!("Error: {e}\r\n"), |_| String::new());
        match words.as_slice() {
            [] => String::new(),
            ["info", "status"] => {
                let state = self.shared.state();
                let word = if state == RunState::Running { "running".into() } else { format!("paused ({})", state.word()) };
                format!("VM status: {word}\r\n")
            }
            ["info", "version"] => format!("ftvm {}\r\n", env!("CARGO_PKG_VERSION")),
            ["info", "name"] => self.name.clone().map_or(String::new(), |n| format!("{n}\r\n")),
            ["info", "uuid"] => format!("{}\r\n", self.uuid),
            ["info", "registers"] => {
                self.shared.registers.lock().map(|r| r.replace('\n', "\r\n")).unwrap_or_default()
            }
            ["info", "ft"] => {
                let f = self.shared.ft();
                format!(
                    "role: {}\r\nstate: {}\r\nepoch: {}\r\npeer: {}\r\nlag: {:.1} ms\r\nlog: {:.3} Mbit/s, {} bytes\r\noutputs held: {}\r\nthrottle: {:.0} %\r\nfailovers: {}\r\n",
                    f.role, f.state, f.epoch, f.peer.as_deref().unwrap_or("none"), f.lag_ms, f.log_mbps, f.log_bytes,
                    f.outputs_held, f.throttle_percent, f.failovers
                )
            }
            ["stop" | "s"] => run(Command::Stop),
            ["cont" | "c"] => run(Command::Cont),
            ["system_reset"] => run(Command::Reset),
            ["system_powerdown"] => run(Command::Powerdown),
            ["nmi"] => run(Command::Nmi),
            ["quit" | "q"] => {
                let _ = self.events.send(Event::Quit(Quit::HostQmpQuit));
                String::new()
            }
            ["help" | "?"] => "info status|version|name|uuid|registers|ft  show one thing\r\nstop, cont, system_reset, system_powerdown, nmi, quit\r\n".into(),
            _ => format!("unknown command: '{}'\r\n", words.join(" ")),
        }
    }
}

impl Handler for Control {
    fn execute(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        if !COMMANDS.contains(&command) {
            return Err(QmpError::command_not_found(command));
        }
        match command {
            "human-monitor-command" => {
                only(arguments, &["command-line", "cpu-index"])?;
                let line = arguments
                    .get("command-line")
                    .and_then(Value::as_str)
                    .ok_or_else(|| QmpError::generic("Parameter 'command-line' is missing"))?;
                return Ok(json!(self.human(line)));
            }
            _ => only(arguments, &[])?,
        }
        match command {
            "query-commands" => Ok(COMMANDS.iter().map(|name| json!({"name": name})).collect()),
            "query-status" => {
                let state = self.shared.state();
                Ok(
                    json!({"running": state == RunState::Running, "singlestep": false, "status": state.word()}),
                )
            }
            "query-version" => Ok(version()),
            "query-name" => Ok(self.name.as_ref().map_or_else(|| json!({}), |n| json!({"name": n}))),
            "query-uuid" => Ok(json!({"UUID": self.uuid})),
            "query-kvm" => Ok(json!({"enabled": false, "present": false})),
            "query-ft" => {
                serde_json::to_value(self.shared.ft()).map_err(|e| QmpError::generic(e.to_string()))
            }
            "ft-suspend" => self.ft(FtWish::Suspend, &["unprotected", "synchronizing", "protected"]),
            "ft-resume" => self.ft(FtWish::Resume, &["unprotected"]),
            "ft-test-failover" => self.ft(FtWish::TestFailover, &["protected"]),
            "ft-test-restart" => self.ft(FtWish::RestartBackup, &["synchronizing", "protected"]),
            "stop" => self.send(Command::Stop),
            "cont" => self.send(Command::Cont),
            "system_reset" => self.send(Command::Reset),
            "system_powerdown" => self.send(Command::Powerdown),
            "inject-nmi" => self.send(Command::Nmi),
            "quit" => {
                let _ = self.events.send(Event::Quit(Quit::HostQmpQuit));
                Ok(json!({}))
            }
            other => Err(QmpError::command_not_found(other)),
        }
    }

    fn version(&self) -> Value {
        version()
    }
}
