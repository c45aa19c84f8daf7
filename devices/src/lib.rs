//! Device models of the PC. A device model knows guest memory, the virtual clock, its interrupt
//! line and the doors ([`door`]); it never names a file, a socket, a thread or a host clock.

pub mod door;

pub use door::{DiskOp, Input, MachineRequest, Output};
