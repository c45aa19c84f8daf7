//! Lockstep: two hosts run one machine (Scales, Nelson, Venkitachalam 2010).
//!
//! | module | section of the paper |
//! |---|---|
//! | [`log`] | 2.1 Deterministic replay: what is recorded |
//! | [`wire`] | 2.2, 3.2 The logging channel |
//! | [`primary`] | 2.2 The Output Rule, 3.2 lag control |
//! | [`backup`] | 2.1 replay, 2.3 go-live |
//! | [`heartbeat`] | 2.3 Detecting failure |
//! | [`arbitration`] | 2.3 The atomic test-and-set on shared storage |
//! | [`reads`] | 4.2 Disk reads on the backup |
//! | [`lag`] | 3.2 How far the backup is behind, and slowing the primary |
//!
//! The two sides, [`primary::Primary`] and [`backup::Backup`], are state machines without threads,
//! sockets or clocks: the program drives them with real ones, the simulator with simulated ones.
//! Nothing here knows what a device is: inputs and outputs are opaque.

pub mod arbitration;
pub mod backup;
pub mod heartbeat;
pub mod lag;
pub mod log;
pub mod lun_lock;
pub mod primary;
pub mod reads;
pub mod wire;

pub use arbitration::{Arbiter, FileLock, Verdict};
pub use lun_lock::LunArbiter;
pub use wire::{Epoch, Message, Side};
