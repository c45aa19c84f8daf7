//! What the machine thread and the monitors share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ftvm_qmp::EventSink;
use serde::Serialize;
use serde_json::json;

use crate::cli::config::Accel;
use crate::host::backends::Backends;
use crate::host::jobs::Jobs;
use crate::host::nbd::Exports;
use crate::migration::status::Migration;
use crate::monitor::dump::Progress;

/// How long a machine that waits for its memory may take to end.
const END_WITHIN: Duration = Duration::from_secs(1);

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
    /// The next backup that joins takes the present one's place.
    MigrateBackup,
    /// Let the backup go, and be no primary any more.
    TurnOff,
}

/// `query-status`'s states that ftvm reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    Prelaunch,
    Running,
    Paused,
    /// Stopped by a debugger's break- or watchpoint, or behind its step.
    Debug,
    Shutdown,
    /// A backup that follows its primary.
    InMigrate,
    InternalError,
    GuestPanicked,
    /// A disk request failed and the drive's policy is to stop.
    IoError,
    /// Stopped for the last part of a migration.
    FinishMigrate,
    /// The machine was given away.
    PostMigrate,
    /// A snapshot is made or loaded.
    SaveVm,
    RestoreVm,
}

impl RunState {
    /// QEMU's word.
    pub fn word(self) -> &'static str {
        match self {
            RunState::Prelaunch => "prelaunch",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::Debug => "debug",
            RunState::Shutdown => "shutdown",
            RunState::InMigrate => "inmigrate",
            RunState::InternalError => "internal-error",
            RunState::GuestPanicked => "guest-panicked",
            RunState::IoError => "io-error",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
            RunState::SaveVm => "save-vm",
            RunState::RestoreVm => "restore-vm",
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
    /// Where this side, when it is the primary, waits for a backup.
    pub listen: Option<String>,
    /// The lock's path, if it was given.
    pub lock: Option<String>,
    /// The user suspended fault tolerance: backups are refused.
    pub suspended: bool,
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
            listen: None,
            lock: None,
            suspended: false,
        }
    }
}

/// What all threads may look at.
pub struct Shared {
    pub events: EventSink,
    /// How far a machine on its way is, and what the user wants of it.
    pub migration: Arc<Migration>,
    state: Mutex<RunState>,
    ft: Mutex<FtStatus>,
    /// The processors' threads, where they have threads of their own.
    cpu_threads: Mutex<Vec<i32>>,
    accel: Mutex<Accel>,
    dump: Mutex<Progress>,
    backends: Mutex<Backends>,
    /// Work on block nodes.
    pub jobs: Jobs,
    /// Block nodes that are shown to other programs.
    pub exports: Exports,
}

impl Shared {
    /// Nothing runs yet.
    pub fn new() -> Arc<Self> {
        let events = EventSink::default();
        Arc::new(Shared {
            exports: Exports::new(events.clone()),
            events,
            migration: Arc::new(Migration::new()),
            state: Mutex::new(RunState::Prelaunch),
            ft: Mutex::new(FtStatus::default()),
            cpu_threads: Mutex::default(),
            accel: Mutex::default(),
            dump: Mutex::default(),
            backends: Mutex::default(),
            jobs: Jobs::default(),
        })
    }

    /// The program is told to end. A machine that runs here while its memory comes may wait for a page that nobody brings,
    /// and its thread with it; then it ends as by a loss of power, which is what is left of it without its source.
    pub fn end_if_stuck(self: &Arc<Self>) {
        if !self.migration.is_stuck() {
            return;
        }
        let shared = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("end".into()).spawn(move || {
            std::thread::sleep(END_WITHIN);
            if shared.migration.is_stuck() {
                log::error!("the machine waits for memory that its source has: it ends as it is");
                std::process::exit(1);
            }
        });
        if let Err(e) = spawned {
            log::error!("{e}");
        }
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

    /// How far the dump of guest memory is.
    pub fn dump(&self) -> Progress {
        self.dump.lock().map_or_else(|_| Progress::default(), |d| *d)
    }

    /// See [`Self::dump`].
    pub fn set_dump(&self, progress: Progress) {
        if let Ok(mut dump) = self.dump.lock() {
            *dump = progress;
        }
    }

    /// What is behind the machine's devices on this host.
    pub fn backends(&self) -> MutexGuard<'_, Backends> {
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The threads of the processors, where they have threads of their own.
    pub fn cpu_threads(&self) -> Vec<i32> {
        self.cpu_threads.lock().map(|t| t.clone()).unwrap_or_default()
    }

    /// What the machine runs on now.
    pub fn accel(&self) -> Accel {
        self.accel.lock().map_or(Accel::Tcg, |a| *a)
    }

    /// See [`Self::accel`] and [`Self::cpu_threads`].
    pub fn set_accel(&self, accel: Accel, threads: Vec<i32>) {
        if let (Ok(mut a), Ok(mut t)) = (self.accel.lock(), self.cpu_threads.lock()) {
            (*a, *t) = (accel, threads);
        }
    }
}
