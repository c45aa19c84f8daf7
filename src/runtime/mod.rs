//! The running program: the machine thread and what feeds it.
//!
//! One thread runs the machine. Everything else (disks, networks, monitors, the pair's channel) is on
//! threads of its own and reaches it as [`Event`]s.

pub mod announce;
pub mod control;
pub mod debug;
pub mod disk_errors;
pub mod ft;
pub mod history;
mod idle;
pub mod live;
pub mod mail;
pub mod pace;
pub mod record;
pub mod replay;

use crate::machine::MachineInput;

pub use mail::{mailbox, Events, Mailbox};

/// What the machine thread is told.
pub enum Event {
    /// Something for the input door.
    Input(MachineInput),
    /// A read of the disk was done, and these are its bytes' places in the image's file, if a backup may use them.
    DiskRead { drive: u32, id: u64, data: Vec<u8>, extents: Option<Vec<(u64, u64)>> },
    /// A disk request failed.
    DiskFailed(crate::host::disk::DiskFailure),
    /// Work of a monitor that needs the machine.
    Call(Call),
    /// A processor that runs by itself has something for the machine thread.
    Woken,
    /// News of the pair.
    Ft(ft::FtEvent),
    /// End the program.
    Quit(Quit),
    /// End it with an error for the user.
    Fail(String),
}

/// What a monitor does with the machine, on the machine thread.
pub type Call = Box<dyn FnOnce(&mut live::Runtime) + Send>;

/// Why the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quit {
    HostSignal,
    HostQmpQuit,
    GuestShutdown,
    /// `-no-reboot` and the guest reset.
    GuestReset,
    /// isa-debug-exit: this exit status.
    GuestExit(i32),
}

/// How the program ended.
#[derive(Debug)]
pub enum Outcome {
    /// In order, with this exit status.
    Done(i32),
    /// With an error for the user.
    Failed(String),
    /// A backup's state differed from its primary's, and it gave up: it is to be made anew.
    Again(String),
    /// The machine was handed over to its backup, which waits for a backup of its own: this side becomes it, with this
    /// value of `-ft`.
    Rejoin(String),
}
