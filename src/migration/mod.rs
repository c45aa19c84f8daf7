//! A machine that moves: to another process or host while it runs, into a file, into a snapshot, and back.
//!
//! The source copies memory while the machine runs ([`outgoing`]), stops it, waits until its disks are idle, lets go of the
//! images, and sends the rest and the state of the devices. Where the destination can answer, the machine is handed over in
//! three steps: the destination says that it has everything and holds the images; the source says go; the destination
//! runs. Before the source has said go, any failure leaves the machine with the source; behind it the source never runs it
//! again by itself. So there are never two, and a stream that breaks loses nothing.

pub mod channel;
pub mod incoming;
pub mod outgoing;
pub mod pages;
pub mod postcopy;
pub mod sender;
pub mod snapshot;
pub mod status;
pub mod stream;

use crate::machine::Machine;

/// Lines of what must be equal on both sides; devices and their states say the rest themselves.
pub fn identity(machine: &Machine, config: &crate::cli::MachineConfig, cpu: &str) -> String {
    format!(
        "machine: {}\nmemory: {} MiB\nprocessors: {}\ncpu: {cpu}",
        config.machine_name(),
        machine.memory().ram_size() >> 20,
        machine.cpu_count(),
    )
}
