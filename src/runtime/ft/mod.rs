//! The pair in the running program: drives the state machines of [`crate::lockstep`] with real
//! sockets, clocks and storage.

pub mod disks;
mod follow;
mod join;
mod link;
mod primary;
mod reads;

pub use follow::{begin_own_writes, follow, own_write_ended, Follow, HostSide};
pub use join::{join, JoinError, Joined};
pub use link::{Link, Pulse};
pub use reads::{BackupReads, Fetch};

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ftvm_devices::Output;

use super::control::{Failover, FtStatus, FtWish, Shared};
use super::live::{is_held, Runtime};
use super::{Events, Outcome};
use crate::cli::ft::FtConfig;
use crate::host::Outside;
use crate::lockstep::primary::{Primary, Timing};
use crate::lockstep::wire::{Epoch, Message};
use crate::lockstep::{Arbiter, Side, Verdict};
use crate::machine::{Stamp, StateHash};

/// News of the pair for the machine thread.
pub enum FtEvent {
    /// A backup is ready for the machine's memory.
    BackupReady { link: Box<Link>, epoch: Epoch, port: u16 },
    /// A message that the machine thread must see.
    Message(u64, Message),
    /// The connection with this id ended.
    Disconnected(u64, String),
    /// The failure detector of a primary has something to say.
    Tick,
    /// The lock answered for the pairing with this token.
    Verdict(String, Verdict),
    /// The backup received log entries.
    Wake,
    /// A backup is here that takes the present one's place.
    Replace,
}

/// What is shared by both roles.
pub struct Common {
    pub config: FtConfig,
    pub lock: Arc<dyn Arbiter>,
    pub shared: Arc<Shared>,
    pub events: Events,
    /// What a backup is told of the machine (a serialized blueprint).
    pub blueprint: Arc<Vec<u8>>,
    pub start: Instant,
    /// This side's own images, where disks are separate.
    pub disks: disks::Disks,
    pub generations: Option<Arc<disks::Generations>>,
}

impl Common {
    /// Time for the state machines.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Where this side's pairings are made, for `query-ft`.
    pub fn tell_place(&self, ft: &mut FtStatus) {
        ft.listen = Some(self.config.listen.clone());
        ft.lock.clone_from(&self.config.lock);
    }

    /// The blueprint with the sizes that drives have now.
    pub fn blueprint_now(&self) -> Vec<u8> {
        let sizes = self.shared.backends().sizes.clone();
        let blueprint = postcard::from_bytes::<crate::assembly::Blueprint>(&self.blueprint);
        let Some(mut blueprint) = blueprint.ok().filter(|_| !sizes.is_empty()) else {
            return self.blueprint.to_vec();
        };
        for (drive, size) in sizes {
            if let Some(spec) = blueprint.pc.drives.get_mut(drive) {
                spec.size_bytes = size;
            }
        }
        postcard::to_stdvec(&blueprint).unwrap_or_else(|_| self.blueprint.to_vec())
    }

    /// This side goes on alone: with separate disks only its own are up to date from here on.
    pub fn alone(&self) {
        let Some(generations) = self.generations.clone() else { return };
        let Err(e) = generations.advance() else { return };
        log::error!("ft: cannot note that only this host's disks are up to date: {e}; trying again");
        let spawned = std::thread::Builder::new().name("ft-number".into()).spawn(move || {
            while generations.advance().is_err() {
                std::thread::sleep(Duration::from_millis(500));
            }
            log::info!("ft: noted that only this host's disks are up to date");
        });
        if let Err(e) = spawned {
            log::error!("ft: no thread for it: {e}");
        }
    }

    /// The failure detector's times.
    pub fn timing(&self) -> Timing {
        Timing {
            heartbeat: self.config.heartbeat,
            timeout: self.config.timeout,
            max_lag: self.config.max_lag,
        }
    }

    /// Ask the lock on a thread of its own until it answers.
    pub fn arbitrate(&self, epoch: Epoch, side: Side) {
        let (lock, events) = (Arc::clone(&self.lock), self.events.clone());
        let asked = Instant::now();
        log::warn!("ft: the peer is suspected; asking the lock {}", lock.describe());
        let spawned = std::thread::Builder::new().name("ft-lock".into()).spawn(move || loop {
            match lock.try_win(&epoch, side) {
                Ok(verdict) => {
                    log::warn!("ft: the lock says {verdict:?} after {:.1?}", asked.elapsed());
                    let _ = events.send(super::Event::Ft(FtEvent::Verdict(epoch.token.clone(), verdict)));
                    return;
                }
                Err(e) => {
                    log::warn!("ft: no answer from the shared storage ({e}); trying again");
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        });
        if let Err(e) = spawned {
            log::error!("ft: no thread for the lock: {e}");
        }
    }
}

/// The role of this side.
pub enum Role {
    Primary(Box<primary::PrimaryRole>),
    Backup(Box<Follow>),
}

/// The pair as the machine thread sees it.
pub struct FtSide {
    pub common: Arc<Common>,
    pub role: Role,
}

impl FtSide {
    /// A primary that waits for a backup on its `listen` address.
    pub fn primary(common: Arc<Common>) -> std::io::Result<Self> {
        let role = primary::PrimaryRole::start(&common, 0, false)?;
        Ok(FtSide { common, role: Role::Primary(Box::new(role)) })
    }

    /// Whether the log, not this host, drives the machine.
    pub fn is_following(&self) -> bool {
        matches!(self.role, Role::Backup(_))
    }

    fn core(&self) -> Option<&Arc<Mutex<Primary<Output>>>> {
        match &self.role {
            Role::Primary(p) => Some(&p.core),
            Role::Backup(_) => None,
        }
    }

    /// Whether inputs must be logged.
    pub fn is_logging(&self) -> bool {
        self.core().is_some_and(|c| c.lock().is_ok_and(|c| c.is_logging()))
    }

    /// Whether the machine must not run on now.
    pub fn must_wait(&self) -> bool {
        self.core().is_some_and(|c| c.lock().is_ok_and(|c| c.must_wait()))
    }

    /// The share of time that the machine should not run.
    pub fn throttle(&self) -> f64 {
        self.core().and_then(|c| c.lock().ok().map(|c| c.lag().throttle())).unwrap_or(0.0)
    }

    /// Log an input.
    pub fn log_input(&mut self, stamp: Stamp, payload: Vec<u8>) {
        if let Some(mut core) = self.core().and_then(|c| c.lock().ok()) {
            core.input(stamp, payload);
        }
    }

    /// Log the end of a read that the backup does itself; the entry's number, or `None` if there is no backup.
    pub fn log_fetch(&mut self, stamp: Stamp, fetch: &Fetch) -> Option<u64> {
        let payload = postcard::to_stdvec(fetch).ok()?;
        let mut core = self.core()?.lock().ok()?;
        core.is_logging().then(|| core.fetch(stamp, payload))
    }

    /// Log a state hash.
    pub fn log_hash(&mut self, stamp: Stamp, hash: &StateHash) {
        if let Some(mut core) = self.core().and_then(|c| c.lock().ok()) {
            core.hash(stamp, postcard::to_stdvec(hash).unwrap_or_default());
        }
    }

    /// An output leaves the machine: now, or when the backup has acknowledged.
    pub fn output(&mut self, stamp: Stamp, output: Output, outside: &Outside) {
        let now = self.common.now();
        let Role::Primary(p) = &self.role else { return };
        if let Ok(mut core) = p.core.lock() {
            // Where disks are separate each side writes its own, and nobody else sees that.
            let own = self.common.config.separate && matches!(output, Output::Disk { .. });
            if own || !is_held(&output) {
                outside.perform(output);
                return;
            }
            if let Some(output) = core.output(stamp, output, now) {
                outside.perform(output);
            } else if let Some(link) = &p.link {
                while let Some(batch) = core.take_batch(stamp) {
                    link.send(batch);
                }
            }
        }
    }

    /// Send what has been logged, and tell the backup how far it may execute.
    pub fn flush(&mut self, stamp: Stamp) {
        let common = Arc::clone(&self.common);
        if let Role::Primary(p) = &mut self.role {
            p.flush(&common, stamp);
        }
    }

    /// The machine ends in order: tell the backup so that it does not go live.
    pub fn end(&mut self, stamp: Stamp) {
        match &mut self.role {
            Role::Primary(p) => p.end(&self.common, stamp),
            Role::Backup(f) => f.close(),
        }
    }

    /// A backup gives up on purpose.
    pub fn resign(&mut self, reason: &str) {
        if let Role::Backup(f) = &mut self.role {
            f.resign(reason);
        }
    }
}

/// Handle news of the pair.
pub fn on_event(rt: &mut Runtime, event: FtEvent) -> Option<Outcome> {
    match rt.ft.as_ref().map(|f| &f.role) {
        Some(Role::Primary(_)) => primary::on_event(rt, event),
        Some(Role::Backup(_)) => follow::on_event(rt, event),
        None => None,
    }
}

/// Do what the user wants of the pair.
pub fn wish(rt: &mut Runtime, wish: FtWish) {
    primary::wish(rt, wish);
}

/// What a live side does beside running the machine: synchronize a new backup, keep the status.
pub fn live_work(rt: &mut Runtime) -> Option<Outcome> {
    primary::live_work(rt)
}

/// Report a failover.
pub fn note_failover(shared: &Shared, role: &'static str, state: &'static str, failover: Failover) {
    log::warn!(
        "ft: failover ({}): detected after {:.0} ms, {} {:.0} ms later",
        failover.reason,
        failover.detected_ms,
        state,
        failover.takeover_ms
    );
    let data = serde_json::to_value(&failover).unwrap_or_default();
    shared.update_ft(|ft| {
        ft.role = role;
        ft.state = state;
        ft.peer = None;
        ft.failovers += 1;
        ft.lag_ms = 0.0;
        ft.outputs_held = 0;
        ft.throttle_percent = 0.0;
        ft.last_failover = Some(failover);
    });
    shared.events.emit("FT_FAILOVER", data);
}

/// A random token.
pub fn token() -> std::io::Result<String> {
    let mut bytes = [0u8; 12];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}
