//! The pair in one process on a simulated network, clock and disk, driven by one seed.
//!
//! The state machines of [`crate::lockstep`] and the machine are the real ones; the program around them
//! ([`crate::runtime::ft`]) is mirrored in [`host`], call for call. Faults are injected while a client
//! uses the guest's service; [`run`] reports the first broken promise.

mod disks;
pub(crate) mod guest;
mod host;
mod world;

pub use guest::{Frame, SECTORS};
pub use world::{run, Report, World};

/// A rule broken on purpose, to see that the simulator notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Outputs leave before the backup has acknowledged.
    ReleaseEarly,
    /// A side whose lock does not answer goes live.
    LiveWithoutAnswer,
    /// Both sides win the lock.
    BothWin,
    /// A backup acknowledges log that it drops because it asks the lock.
    AckAfterArbitration,
    /// Received but not executed log is skipped at go-live.
    SkipReplay,
    /// Pending disk requests are not reissued.
    NoReissue,
    /// Outputs not reported as sent are not sent again.
    NoResend,
    /// A write's completion is told before the data is on the disk.
    EarlyCompletion,
    /// Pages written during the copy are not sent again.
    NoDirtyPages,
    /// A lost side goes on releasing.
    IgnoreLoss,
    /// A write does not wait for the backup's read of what it overlaps.
    NoHold,
    /// A backup does not wait for its own disk when the log says that a write has ended.
    NoOwnWait,
    /// What is written while a disk is copied is not copied again.
    NoDirtySectors,
    /// A side that goes on alone does not say so beside the lock.
    NoGeneration,
    /// A backup takes the lock's number when it is ready, not when it began.
    AdoptLate,
}

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub seed: u64,
    /// Go-live makes an overlay, so that late writes of the old primary stay below.
    pub overlay: bool,
    /// The backup does disk reads itself (`reads=disk`).
    pub reads_disk: bool,
    /// Each host has a disk of its own (`disks=separate`); the shared storage has the lock only.
    pub separate: bool,
    pub mutation: Option<Mutation>,
    /// Print every step.
    pub trace: bool,
}

impl Options {
    /// A faithful run of `seed`.
    pub fn new(seed: u64) -> Self {
        Options { seed, overlay: true, reads_disk: false, separate: false, mutation: None, trace: false }
    }
}
