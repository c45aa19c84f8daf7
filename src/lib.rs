//! ftvm: a virtual machine monitor that survives the death of its host.

mod allocator;
pub mod assembly;
pub mod cli;
pub mod gdb;
pub mod host;
pub mod lockstep;
pub mod machine;
pub mod migration;
pub mod monitor;
pub mod program;
pub mod runtime;
pub mod sim;
