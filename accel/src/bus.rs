//! The interface between a processor and the machine around it.

use crate::debug::{DebugHit, DebugPoints};
use crate::mem::GuestMemory;
use serde::{Deserialize, Serialize};

/// An interrupt message as PCI MSI and the I/O APIC send it to the local APICs (SDM vol. 3,
/// section 11.11): the address names destination and mode, the data vector and delivery mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApicMessage {
    /// 0xFEExxxxx: bits 12..19 destination, bit 3 redirection hint, bit 2 destination mode.
    pub address: u64,
    /// Bits 0..7 vector, 8..10 delivery mode, 14 level, 15 trigger mode.
    pub data: u32,
}

/// An inter-processor interrupt, as a local APIC's ICR describes it (SDM vol. 3, section 11.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipi {
    /// The sender's APIC id.
    pub source: u32,
    /// The low 32 bits of the ICR: vector, delivery mode, destination mode, level, trigger, shorthand.
    pub icr: u32,
    /// Destination field (8 bits in xAPIC mode, 32 in x2APIC mode).
    pub destination: u32,
    /// The sender was in x2APIC mode, so `destination` has x2APIC form.
    pub x2apic: bool,
}

/// Virtual time by position: `base_ns + (position * rate >> SHIFT)`, whose carries out of 64 bits are lost. No rate: no such
/// function is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockLine {
    pub base_ns: u64,
    pub rate: u64,
}

impl ClockLine {
    /// Fractional bits of the rate.
    pub const SHIFT: u32 = 24;
}

/// What a processor reaches outside guest RAM and itself. Every call carries `position`, the exact
/// global count of retired instructions at the access, from which the machine derives virtual time.
pub trait Bus {
    /// Read `size` (1, 2, 4) bytes from an I/O port. An unclaimed port reads all ones.
    fn io_read(&mut self, position: u64, port: u16, size: u8) -> u32;
    /// Write `size` (1, 2, 4) bytes to an I/O port.
    fn io_write(&mut self, position: u64, port: u16, size: u8, value: u32);
    /// Read `size` (1, 2, 4, 8) bytes of memory-mapped I/O; never crosses a page.
    fn mmio_read(&mut self, position: u64, addr: u64, size: u8) -> u64;
    /// Write `size` (1, 2, 4, 8) bytes of memory-mapped I/O; never crosses a page.
    fn mmio_write(&mut self, position: u64, addr: u64, size: u8, value: u64);
    /// Virtual time in nanoseconds at `position`; the TSC (1 GHz) before TSC_ADJUST.
    fn clock_ns(&mut self, position: u64) -> u64;
    /// The same as a function that holds from `position` on as long as the processor runs, if there is one.
    fn clock_line(&self, _position: u64) -> ClockLine {
        ClockLine::default()
    }
    /// The 8259 pair's INTR line (it feeds LINT0 of the boot processor).
    fn intr(&mut self) -> bool;
    /// Interrupt acknowledge cycle of the 8259 pair: the vector.
    fn intr_ack(&mut self, position: u64) -> u8;
    /// A local APIC ended a level-triggered interrupt: broadcast to the I/O APIC.
    fn eoi(&mut self, position: u64, vector: u8);
    /// A local APIC sends an IPI; the machine delivers it when the processor has left `run`.
    fn send_ipi(&mut self, ipi: Ipi);
    /// 64 random bits for RDRAND and RDSEED: from machine state, seeded through the input door.
    fn random(&mut self) -> u64;
    /// Ask whether `run` must return after the instruction in hand: an earlier deadline was set, an
    /// interrupt line moved, an IPI is to be delivered, the machine asks for a stop. Checked after every
    /// access through this trait.
    fn break_requested(&self) -> bool;
    /// Whether `run` is to end at the next chance just as if its budget did, because somebody outside waits to change the
    /// machine. Asked after accesses; the answer may change at any time, and never shows in results.
    fn end_wanted(&self) -> bool {
        false
    }
}

/// Why [`Processor::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The budget is used up exactly.
    Budget,
    /// [`Bus::break_requested`] said so.
    Break,
    /// HLT (or MWAIT): nothing to do until an interrupt.
    Halt,
    /// PAUSE: the guest spins; the scheduler may give another processor its turn.
    Pause,
    /// A debugger's break- or watchpoint: see [`Processor::take_debug_hit`].
    Debug,
    /// Triple fault: the machine resets.
    Shutdown,
    /// The processor cannot go on (an internal inconsistency); the machine stops with the text in the log.
    Internal,
}

/// What one call of [`Processor::run`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunResult {
    /// Why it returned.
    pub exit: Exit,
    /// Instructions retired (each iteration of a REP string instruction counts as one; an
    /// instruction that faults retires nothing, delivery of an exception or interrupt retires nothing).
    pub retired: u64,
}

/// A virtual processor with its local APIC.
///
/// Determinism: the state after `run` is a function of the state before, guest memory, and what the
/// bus answered. It never depends on the budget's division into calls: running 1,000 then 500
/// instructions equals running 1,500.
pub trait Processor: Send {
    /// Run at most `budget` instructions from global position `position`. Pending interrupts of the
    /// local APIC and the 8259 are taken at instruction boundaries as the architecture says.
    fn run(&mut self, mem: &GuestMemory, bus: &mut dyn Bus, position: u64, budget: u64) -> RunResult;
    /// How many interrupts and exceptions were delivered at `position` that no instruction has followed yet. No budget ends
    /// there; [`Self::deliver`] leads there.
    fn delivered(&self, _position: u64) -> u32 {
        0
    }
    /// As [`Self::run`], to where `count` interrupts and exceptions were delivered at `position` and nothing was retired.
    fn deliver(&mut self, _: &GuestMemory, _: &mut dyn Bus, _position: u64, _count: u32) -> RunResult {
        RunResult { exit: Exit::Internal, retired: 0 }
    }
    /// Power-on reset (`init` false) or INIT (`init` true: keeps what SDM vol. 3 table 10-1 keeps).
    fn reset(&mut self, init: bool);
    /// Whether the processor is halted or waits for SIPI and has no interrupt to wake it.
    fn is_idle(&self, intr: bool) -> bool;
    /// An interrupt message arrived. Returns whether this processor's APIC is a destination and took it.
    fn apic_message(&mut self, message: ApicMessage) -> bool;
    /// An IPI arrived; the machine offers every IPI to every processor in APIC-id order. Returns
    /// whether this processor is a destination.
    fn ipi(&mut self, ipi: Ipi) -> bool;
    /// An NMI (from QMP `inject-nmi` or port 61h).
    fn nmi(&mut self);
    /// The virtual time in ns when the local APIC's timer fires next.
    fn next_deadline(&self) -> Option<u64>;
    /// Virtual time is `now_ns`: fire the local APIC's timer if due.
    fn advance(&mut self, now_ns: u64);
    /// The whole state: registers, MSRs, FPU and vector registers, local APIC, as bytes of a versioned format.
    fn save(&self) -> Vec<u8>;
    /// Restore what [`Self::save`] returned; an error says what is wrong and leaves the state as it was.
    fn load(&mut self, saved: &[u8]) -> Result<(), String>;
    /// One line a register for people (`info registers`).
    fn describe(&self) -> String;
    /// The registers for programs (dumps, debuggers), if they can be had.
    fn view(&self) -> Option<crate::tcg::registers::View> {
        None
    }
    /// Replace what [`Self::view`] shows; nothing is checked. Returns false if this cannot be done.
    fn set_view(&mut self, _view: &crate::tcg::registers::View) -> bool {
        false
    }
    /// Stop as a debugger wants from now on; `None`: there is no debugger any more. Returns false if this processor
    /// cannot.
    fn set_debug(&mut self, _points: Option<&DebugPoints>) -> bool {
        false
    }
    /// After [`Exit::Debug`], why.
    fn take_debug_hit(&mut self) -> Option<DebugHit> {
        None
    }
}
