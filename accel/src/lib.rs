//! Processors for ftvm: guest memory, the interface between a processor and the machine around
//! it, the deterministic software processor (`tcg`), and the host's own through KVM (`kvm`).
//!
//! But for [`kvm`], nothing in this crate knows host time, a host thread, a file or a socket. A software
//! processor is a function from (state, guest memory, what [`Bus`] answers) to the next state.

pub mod bus;
pub mod debug;
pub mod fault;
pub mod kvm;
pub mod mem;
pub mod model;
pub mod simd;
pub mod state;
pub mod tcg;

pub use bus::{ApicMessage, Bus, ClockLine, Exit, Processor, RunResult};
pub use debug::{DebugHit, DebugPoints};
pub use fault::Exception;
pub use mem::GuestMemory;
pub use model::CpuModel;
pub use state::CpuState;
pub use tcg::SoftCpu;
