//! The stub for GDB: its remote protocol on a character device (`-s`, `-gdb`, `gdbserver`).
//!
//! The protocol is the `gdbstub` crate's. What GDB sees is what QEMU 7.2 shows it: a thread for each processor, memory by
//! the linear addresses of the thread at hand (or by physical ones), the system registers besides the program's.

mod arch;
mod packets;
mod session;
mod target;

pub use session::{Server, DEFAULT};
