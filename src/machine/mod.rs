//! The machine: processors, chipset, memory and clock as one deterministic state machine.
//!
//! Its future follows from its state and from what [`Machine::apply`] is given at which
//! [`Stamp`]; nothing else. The same type runs in all roles: alone, as a primary, as a backup,
//! recording and replaying.

mod clock;
mod debug;
mod hardware;
mod hash;
mod run;
mod state;

pub use clock::{Adjust, VirtualClock};
pub use debug::{DebugStop, Reason};
pub use hash::StateHash;
pub use state::{MachineState, StateError};

use std::collections::BTreeMap;

use ftvm_accel::bus::Ipi;
use ftvm_accel::kvm::Kvm;
use ftvm_accel::tcg::registers::View;
use ftvm_accel::{GuestMemory, Processor};
use ftvm_devices::{FunctionView, Input, Inventory, MachineRequest, Output, Plug, Screen, WindowView};
use serde::{Deserialize, Serialize};

/// What the machine asks of a chipset (the PC's devices and buses). See `ftvm_devices::Pc`.
pub trait Chipset: Send {
    fn reset(&mut self, mem: &GuestMemory, now_ns: u64);
    fn io_read(&mut self, mem: &GuestMemory, now_ns: u64, port: u16, size: u8) -> u32;
    fn io_write(&mut self, mem: &GuestMemory, now_ns: u64, port: u16, size: u8, value: u32);
    fn mmio_read(&mut self, mem: &GuestMemory, now_ns: u64, addr: u64, size: u8) -> u64;
    fn mmio_write(&mut self, mem: &GuestMemory, now_ns: u64, addr: u64, size: u8, value: u64);
    fn next_deadline(&self) -> Option<u64>;
    fn advance(&mut self, mem: &GuestMemory, now_ns: u64);
    fn input(&mut self, mem: &GuestMemory, now_ns: u64, input: &Input);
    fn intr(&self) -> bool;
    fn intr_ack(&mut self) -> u8;
    fn eoi(&mut self, vector: u8);
    fn take_messages(&mut self) -> Vec<ftvm_accel::ApicMessage>;
    fn take_outputs(&mut self) -> Vec<Output>;
    fn take_request(&mut self) -> Option<MachineRequest>;
    fn has_work(&self) -> bool;
    /// Whether outputs or a request wait.
    fn has_news(&self) -> bool {
        true
    }
    /// What each pin of the I/O APIC would send, where it is level-triggered.
    fn level_pins(&self) -> Vec<Option<ftvm_accel::ApicMessage>> {
        Vec::new()
    }
    /// Changes whenever [`Self::bells`] does.
    fn bells_version(&self) -> u64 {
        0
    }
    /// Where writes only ring, as things are mapped now.
    fn bells(&self) -> Vec<ftvm_accel::kvm::Bell> {
        Vec::new()
    }
    /// A guest wrote where a bell of this token is, or was.
    fn ring(&mut self, _mem: &GuestMemory, _now_ns: u64, _token: u64) {}
    fn random(&mut self) -> u64;
    fn save(&self) -> Vec<u8>;
    fn load(&mut self, saved: &[u8]) -> Result<(), String>;
    fn pending_disk(&self) -> Vec<Output>;
    fn device_hashes(&self) -> Vec<(String, u64)>;
    /// The devices that users named.
    fn inventory(&self) -> Vec<Inventory> {
        Vec::new()
    }
    /// The screen of the first video card, or of the one with this id.
    fn screen(&self, _id: Option<&str>) -> Option<&dyn Screen> {
        None
    }
    fn pci_functions(&self) -> Vec<FunctionView> {
        Vec::new()
    }
    /// What answers I/O ports, and memory.
    fn windows(&self) -> (Vec<WindowView>, Vec<WindowView>) {
        Default::default()
    }
    /// Whether and where a device could be plugged in.
    fn check_plug(&mut self, _plug: &Plug) -> Result<u8, String> {
        Err("this machine has no hot-plug".into())
    }
    fn check_unplug(&self, id: &str) -> Result<(), String> {
        Err(format!("Device '{id}' not found"))
    }
}

/// An exact point in a machine's life. Points are ordered: by position, then by virtual time
/// (which moves at one position only while the machine idles).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// Retired instructions of all processors.
    pub position: u64,
    /// Virtual time in nanoseconds.
    pub ns: u64,
}

/// What passes through the input door, applied at an exact stamp.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineInput {
    /// For a device.
    Device(Input),
    /// The virtual clock is brought in step with real time.
    Clock(Adjust),
    /// `system_reset`, or the reset that a guest asked for.
    Reset,
    /// A non-maskable interrupt for every processor (`inject-nmi`).
    Nmi,
    /// The guest was stopped (`stop`) or resumed (`cont`); a role change keeps it so.
    Paused(bool),
    /// The hosts' note: see [`Machine::note`].
    Note(Vec<u8>),
    /// So many interrupts and exceptions are delivered before the next instruction: see [`Machine::delivered`].
    Deliver(u32),
}

/// Why [`Machine::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The limit was reached exactly.
    Limit,
    /// Every processor is idle; virtual time may skip to `next` (the next timer), if there is one.
    Idle { next: Option<u64> },
    /// Outputs are waiting in [`Machine::take_outputs`].
    Output,
    /// What [`Machine::run_until`] was given is set.
    News,
    /// The guest asks something of the machine as a whole.
    Request(MachineRequest),
    /// A debugger wanted to stop here.
    Debug(DebugStop),
    /// A processor cannot go on.
    Dead,
}

/// How often the scheduler moves on to the next runnable processor, in instructions.
const SLICE: u64 = 20_000;
/// The same where the others are idle: so long may one that is woken wait.
const LONE_SLICE: u64 = 100_000;

/// Deterministic round-robin of the processors on the machine thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Schedule {
    current: u32,
    slice_left: u64,
}

/// A virtual machine.
pub struct Machine {
    /// What runs the processors, if they are the host's. It goes before the memory that it maps.
    hardware: Option<hardware::Hardware>,
    cpus: Vec<Box<dyn Processor>>,
    chipset: Box<dyn Chipset>,
    mem: GuestMemory,
    clock: VirtualClock,
    position: u64,
    schedule: Schedule,
    paused: bool,
    ipis: Vec<Ipi>,
    outputs: Vec<(Stamp, Output)>,
    hashes: hash::MemoryHash,
    note: Vec<u8>,
    /// A debugger steps this processor. (Not part of the state, as nothing of debuggers is.)
    step: Option<usize>,
}

impl Machine {
    /// Put a machine together and reset it.
    pub fn new(
        cpus: Vec<Box<dyn Processor>>,
        chipset: Box<dyn Chipset>,
        mem: GuestMemory,
        ns_per_instruction: f64,
    ) -> Self {
        let hashes = hash::MemoryHash::new(&mem);
        let mut machine = Machine {
            cpus,
            chipset,
            mem,
            clock: VirtualClock::new(ns_per_instruction),
            position: 0,
            schedule: Schedule { current: 0, slice_left: SLICE },
            paused: false,
            ipis: Vec::new(),
            outputs: Vec::new(),
            hashes,
            note: Vec::new(),
            hardware: None,
            step: None,
        };
        machine.reset();
        machine
    }

    /// As [`Self::new`], with processors that `kvm` runs, if they are the host's.
    pub fn with_processors(
        cpus: Vec<Box<dyn Processor>>,
        kvm: Option<Kvm>,
        chipset: Box<dyn Chipset>,
        mem: GuestMemory,
        ns_per_instruction: f64,
    ) -> Self {
        let mut machine = Machine::new(cpus, chipset, mem, ns_per_instruction);
        machine.hardware = kvm.map(|kvm| hardware::Hardware::new(kvm, machine.now()));
        machine.settle();
        machine
    }

    fn reset(&mut self) {
        self.still();
        for cpu in &mut self.cpus {
            cpu.reset(false);
        }
        let now = self.now();
        self.chipset.reset(&self.mem, now);
        self.ipis.clear();
        self.schedule = Schedule { current: 0, slice_left: SLICE };
    }

    /// Where the machine is.
    pub fn stamp(&self) -> Stamp {
        Stamp { position: self.position, ns: self.now() }
    }

    /// Virtual time in nanoseconds.
    pub fn now(&self) -> u64 {
        let running = self.hardware.as_ref().and_then(hardware::Hardware::now);
        running.unwrap_or_else(|| self.clock.now(self.position))
    }

    /// Real time went by without the machine: virtual time goes on from where it stands.
    pub fn time_stood(&mut self) {
        if let Some(h) = &mut self.hardware {
            h.time_stood();
        }
    }

    /// The clock's rate in nanoseconds per instruction.
    pub fn ns_per_instruction(&self) -> f64 {
        self.clock.ns_per_instruction()
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// How many processors there are.
    pub fn cpu_count(&self) -> usize {
        self.cpus.len()
    }

    /// What each host of the machine wants the others to know (which image is behind which drive number, since something was
    /// plugged in). The machine carries it and does not read it.
    pub fn note(&self) -> &[u8] {
        &self.note
    }

    /// The chipset, to look at it.
    pub fn chipset(&self) -> &dyn Chipset {
        self.chipset.as_ref()
    }

    /// Whether and where a device could be plugged in: its PCI device and function number.
    pub fn check_plug(&mut self, plug: &Plug) -> Result<u8, String> {
        self.chipset.check_plug(plug)
    }

    /// Whether the guest is stopped by the user.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The registers of each processor for programs.
    pub fn views(&mut self) -> Vec<View> {
        self.still();
        self.cpus.iter().filter_map(|c| c.view()).collect()
    }

    /// The registers of processor `index` for people.
    pub fn describe_cpu(&mut self, index: usize) -> Option<String> {
        self.still();
        self.cpus.get(index).map(|c| c.describe())
    }

    /// The registers of all processors for people.
    pub fn describe_cpus(&mut self) -> String {
        let texts: Vec<String> = (0..self.cpu_count()).filter_map(|i| self.describe_cpu(i)).collect();
        texts.join("\n")
    }

    /// Apply an input now. The caller has logged it with [`Self::stamp`].
    pub fn apply(&mut self, input: &MachineInput) {
        if matches!(input, MachineInput::Device(Input::Nmi) | MachineInput::Nmi | MachineInput::Paused(true))
        {
            self.still();
        }
        match input {
            MachineInput::Device(Input::Nmi) | MachineInput::Nmi => {
                for cpu in &mut self.cpus {
                    cpu.nmi();
                }
            }
            MachineInput::Device(device) => {
                let now = self.now();
                self.chipset.input(&self.mem, now, device);
            }
            MachineInput::Clock(adjust) => self.clock.adjust(self.position, *adjust),
            MachineInput::Reset => self.reset(),
            MachineInput::Paused(paused) => self.paused = *paused,
            MachineInput::Note(note) => self.note.clone_from(note),
            MachineInput::Deliver(count) => self.deliver(*count),
        }
        self.settle();
    }

    /// Disk requests that were issued and have not completed, for reissue by a new primary.
    pub fn pending_disk(&self) -> Vec<Output> {
        self.chipset.pending_disk()
    }

    /// What left the machine since the last call, in order, each with the stamp at which it left.
    pub fn take_outputs(&mut self) -> Vec<(Stamp, Output)> {
        std::mem::take(&mut self.outputs)
    }

    /// Hash of each part of the state, to compare two replicas.
    pub fn state_hash(&mut self) -> StateHash {
        self.still();
        self.hashes.update(&self.mem);
        let mut parts = BTreeMap::new();
        for (i, cpu) in self.cpus.iter().enumerate() {
            parts.insert(format!("cpu{i}"), hash::bytes(&cpu.save()));
        }
        for (name, value) in self.chipset.device_hashes() {
            parts.insert(name, value);
        }
        let rest = (&self.clock, self.position, &self.schedule, self.paused, &self.note);
        parts.insert("clock".into(), hash::bytes(&postcard::to_stdvec(&rest).unwrap_or_default()));
        parts.insert("memory".into(), self.hashes.total());
        StateHash { parts }
    }
}
