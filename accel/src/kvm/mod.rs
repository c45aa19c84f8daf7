//! Processors by the host's hardware, through Linux's KVM.
//!
//! Where the software processor is a function, this one is a device: it runs on threads of its own, in the host's
//! time, and nothing about it is deterministic. So this module, alone in the crate, knows threads and a file
//! (`/dev/kvm`), and a machine that runs on it can neither be protected nor recorded.
//!
//! - **Interrupts**: KVM's split irqchip. The local APICs are the kernel's, which is where speed matters (timers, IPIs,
//!   ends of interrupts); the 8259s, the I/O APIC, the PIT and the HPET stay the chipset's models, the same ones that
//!   the software processor uses. Their messages go in by KVM_SIGNAL_MSI; the 8259s' INTR reaches the boot processor by
//!   KVM_INTERRUPT when it can take one; the end of a level-triggered interrupt comes back as an exit.
//! - **Doorbells** (`bells`): where a write only says that there is work, KVM signals it and the guest goes on
//!   (KVM_IOEVENTFD); a thread of its own tells the device.
//! - **Threads** (`crew`): one for each processor. An exit uses the devices while the machine thread lends them
//!   (`desk`), that is, while it waits for events.
//! - **Memory** (`vm`): a slot for each run of addresses that [`GuestMemory`] backs, changed when its map changes.
//!   Pages that guests write come from KVM's bitmaps into the page flags, where migration finds them. A bitmap, not
//!   the ring: the flags are a bitmap already, and merging costs one pass for each round of a migration.
//! - **State** (`raw`): read and written in the software processor's saved form, so that a machine moves between the
//!   two. Virtual time is the same on both: kvmclock shows it, and the TSC is it at the TSC's rate plus IA32_TSC_ADJUST.
//!   Where the host can scale the TSC it runs at the software processor's 1 GHz; elsewhere at the host's rate, which
//!   a machine keeps when it moves to the software processor.
//!
//! The processors stand still ([`Kvm::stop`]) whenever their state is looked at or changed, and virtual time with them.

mod bells;
pub mod cpuid;
mod crew;
mod desk;
mod lapic;
mod points;
mod raw;
mod sys;
mod vcpu;
mod vm;
mod xsave;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kvm_ioctls::Kvm as System;

pub use bells::{Bell, BellPlace};
pub use crew::Trouble;
pub use desk::Board;

use crate::bus::Ipi;
use crate::debug::DebugPoints;
use crate::tcg::registers::View;
use crate::tcg::save::Saved;
use crate::{ApicMessage, Bus, CpuModel, Exit, GuestMemory, Processor, RunResult, SoftCpu};
use crew::{Crew, Seat};
use points::Plan;
use vcpu::{Entry, Vcpu};
use vm::Vm;

/// Why KVM does not do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("Could not access KVM kernel module: {0}")]
    Open(std::io::Error),
    #[error("the kernel's KVM has no {0}, which ftvm needs (Linux 5.12 or later has)")]
    Lacks(&'static str),
    #[error("the kernel's KVM has version {0} of its interface, not 12")]
    Version(i32),
    #[error("{0} processors are more than this KVM has ({1})")]
    Processors(u32, usize),
    #[error("{0}: {1}")]
    Call(&'static str, std::io::Error),
    #[error("KVM does not take {1:#x} for MSR {0:#x}")]
    Msr(u32, u64),
    #[error("too many entries for KVM")]
    TooMany,
    #[error("{0}")]
    Entry(String),
    #[error("{0}")]
    State(String),
}

impl KvmError {
    fn call(name: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
        move |e| KvmError::Call(name, e.into())
    }

    fn io(name: &'static str) -> impl Fn(std::io::Error) -> KvmError {
        move |e| KvmError::Call(name, e)
    }

    /// The host's error, as a number and as words, if it is one of `/dev/kvm` itself.
    pub fn open_error(&self) -> Option<&std::io::Error> {
        match self {
            KvmError::Open(e) => Some(e),
            _ => None,
        }
    }
}

/// Open `/dev/kvm`.
pub fn open() -> Result<System, KvmError> {
    let system = System::new().map_err(|e| KvmError::Open(e.into()))?;
    match system.get_api_version() {
        12 => Ok(system),
        other => Err(KvmError::Version(other)),
    }
}

/// What guests of this host's KVM can have of a processor.
pub fn host_cpuid() -> Result<crate::model::HostCpuid, KvmError> {
    cpuid::supported(&open()?)
}

/// The processors of a machine.
pub struct Kvm {
    crew: Arc<Crew>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// Virtual time while the processors stand still.
    now: Arc<AtomicU64>,
    running: bool,
}

impl Kvm {
    /// `cpus` processors of a model, after power-on and standing still, on `mem`. `wake` is called, on any thread, when
    /// the machine thread is to look at [`Self::trouble`] or at its devices.
    pub fn new(
        mem: &GuestMemory,
        model: &CpuModel,
        cpus: u32,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<(Kvm, Vec<Box<dyn Processor>>), KvmError> {
        let system = open()?;
        let most = system.get_max_vcpus();
        if cpus as usize > most {
            return Err(KvmError::Processors(cpus, most));
        }
        let vm = Vm::new(&system)?;
        vm.map(mem)?;
        let list = system.get_msr_index_list().map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
        let mut seats = Vec::new();
        for id in 0..cpus {
            let fd = vm.fd().create_vcpu(id.into()).map_err(KvmError::call("KVM_CREATE_VCPU"))?;
            let leaves = cpuid::leaves(model, id, cpus, true)?;
            fd.set_cpuid2(&leaves).map_err(KvmError::call("KVM_SET_CPUID2"))?;
            let khz = vcpu::choose_tsc_khz(&system, &fd)?;
            let reset = SoftCpu::new(id, cpus, model).saved();
            let vcpu = Vcpu::new(fd, reset, list.as_slice(), khz, (model.clone(), cpus))?;
            seats.push(Arc::new(Seat::new(id, vcpu)));
        }
        let crew = Crew::new(vm, seats, wake)?;
        let threads = crew.start()?;
        let now = Arc::new(AtomicU64::new(0));
        let processors = crew
            .seats()
            .iter()
            .map(|seat| {
                let (seat, now) = (Arc::clone(seat), Arc::clone(&now));
                Box::new(KvmCpu { seat, now, cpus, model: model.clone() }) as Box<dyn Processor>
            })
            .collect();
        Ok((Kvm { crew, threads, now, running: false }, processors))
    }

    /// The threads' ids, by processor.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.crew.seats().iter().map(|s| s.thread()).collect()
    }

    /// Whether the processors run.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Deliver what the devices want delivered.
    pub fn deliver(&self, board: &mut dyn Board) -> Result<(), KvmError> {
        // Whose ends are to be told is known before they are sent.
        self.crew.vm.set_pins(board.level_pins())?;
        self.crew.deliver(board)
    }

    /// Lend the devices to the processors while `work` waits, until virtual time `until` at most.
    pub fn lend<T>(&self, board: &mut dyn Board, until: Option<u64>, work: impl FnOnce() -> T) -> T {
        self.crew.lend(board, until, work)
    }

    /// Whoever has something for the machine thread from here on wakes it again.
    pub fn awake(&self) {
        self.crew.awake();
    }

    /// What went wrong with a processor, once.
    pub fn trouble(&self) -> Option<Trouble> {
        self.crew.trouble()
    }

    /// Make the processors stand still, and virtual time with them. `now` says what time it is; it is asked when they
    /// stand. Returns the time, which is later if a processor has seen a later one.
    pub fn stop(&mut self, board: &mut dyn Board, now: impl FnOnce() -> u64) -> Result<u64, KvmError> {
        if self.running {
            self.crew.halt(board);
            self.running = false;
        }
        let seen = self.crew.seats().iter().filter_map(|s| s.vcpu().tsc_time()).max();
        let now = now().max(seen.unwrap_or(0));
        self.now.store(now, Ordering::Relaxed);
        for seat in self.crew.seats() {
            seat.vcpu().freeze(now)?;
        }
        Ok(now)
    }

    /// Let the processors run from virtual time `now` on. `continued`: time went on since they stood still as it does
    /// on the host.
    pub fn go(&mut self, now: u64, continued: bool) -> Result<(), KvmError> {
        if self.running {
            return Ok(());
        }
        let mut common = None;
        let seats = self.crew.seats();
        if !continued || seats.iter().any(|s| s.vcpu().is_loaded()) {
            self.crew.vm.set_clock(now)?;
            for seat in seats {
                seat.vcpu().thaw(now, &mut common)?;
            }
        }
        self.crew.go();
        self.running = true;
        Ok(())
    }

    /// Execute one instruction of processor `index`, while all others stand still. Virtual time stands too, but for
    /// the TSC.
    pub fn step(&mut self, board: &mut dyn Board, index: usize) -> Result<(), KvmError> {
        let crew = &self.crew;
        let Some(seat) = crew.seats().get(index).filter(|_| !self.running) else {
            return Err(KvmError::State("a processor that runs cannot be stepped".into()));
        };
        match crew.lend(board, None, || seat.vcpu().step(crew, &|| true))? {
            Entry::Failed(text) => Err(KvmError::Entry(text)),
            Entry::Shutdown => Err(KvmError::Entry("triple fault".into())),
            Entry::Again | Entry::Stepped | Entry::Debug(_) => Ok(()),
        }
    }

    /// When they run again, this processor stops after one instruction, and no other does.
    pub fn set_step(&self, index: Option<usize>) {
        for (n, seat) in self.crew.seats().iter().enumerate() {
            seat.vcpu().set_stepping(index == Some(n));
        }
    }

    /// Linear addresses at which INT3 must be in the place of the instruction while processors run.
    pub fn soft_breaks(&self) -> Vec<u64> {
        self.crew.seats().first().map_or_else(Vec::new, |seat| seat.vcpu().soft_breaks())
    }

    /// The processors that stopped at such an address, and are to go on from it.
    pub fn at_soft_breaks(&self) -> Vec<usize> {
        let at = |seat: &Arc<Seat>| seat.vcpu().is_at_soft_break().unwrap_or(false);
        self.crew.seats().iter().enumerate().filter(|(_, seat)| at(seat)).map(|(n, _)| n).collect()
    }

    /// Virtual time stands at `now`: states that are loaded are of this moment.
    pub fn set_time(&self, now: u64) {
        self.now.store(now, Ordering::Relaxed);
    }

    /// Find out from now on which pages are written, or no more.
    pub fn track_dirty(&self, on: bool) -> Result<(), KvmError> {
        self.crew.vm.track_dirty(on)
    }

    /// Note in `mem` which pages were written.
    pub fn collect_dirty(&self, mem: &GuestMemory) -> Result<(), KvmError> {
        if self.crew.vm.is_tracking() {
            self.crew.vm.collect_dirty(mem)?;
        }
        Ok(())
    }

    /// Guest memory may lie elsewhere now.
    pub fn remap(&self, mem: &GuestMemory) -> Result<(), KvmError> {
        self.crew.vm.forget_map();
        self.crew.vm.map(mem)
    }
}

impl Drop for Kvm {
    fn drop(&mut self) {
        self.crew.quit();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A processor as the machine sees it. It is looked at and changed only while it stands still.
struct KvmCpu {
    seat: Arc<Seat>,
    now: Arc<AtomicU64>,
    cpus: u32,
    model: CpuModel,
}

impl KvmCpu {
    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn saved(&self) -> Result<Saved, KvmError> {
        self.seat.vcpu().saved(self.now())
    }
}

impl Processor for KvmCpu {
    fn run(&mut self, _: &GuestMemory, _: &mut dyn Bus, _: u64, _: u64) -> RunResult {
        log::error!("a processor of KVM runs by itself");
        RunResult { exit: Exit::Internal, retired: 0 }
    }

    fn reset(&mut self, init: bool) {
        if init {
            return;
        }
        let fresh = SoftCpu::new(self.seat.index, self.cpus, &self.model).saved();
        if let Err(e) = self.seat.vcpu().begin(fresh, self.now()) {
            log::error!("processor {}: reset: {e}", self.seat.index);
        }
    }

    fn is_idle(&self, _: bool) -> bool {
        false
    }

    fn apic_message(&mut self, _: ApicMessage) -> bool {
        false
    }

    fn ipi(&mut self, _: Ipi) -> bool {
        false
    }

    fn nmi(&mut self) {
        if let Err(e) = self.seat.vcpu().nmi() {
            log::error!("processor {}: {e}", self.seat.index);
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        None
    }

    fn advance(&mut self, _: u64) {}

    fn save(&self) -> Vec<u8> {
        match self.saved() {
            Ok(saved) => saved.to_bytes(),
            Err(e) => {
                // An empty state is one that nobody loads.
                log::error!("processor {}: cannot read its state: {e}", self.seat.index);
                Vec::new()
            }
        }
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        let saved = Saved::from_bytes(saved, self.seat.index, self.model.signature())?;
        self.seat.vcpu().load(saved, self.now()).map_err(|e| e.to_string())
    }

    fn describe(&self) -> String {
        self.saved().map_or_else(|e| format!("{e}\n"), |s| s.describe())
    }

    fn view(&self) -> Option<View> {
        self.saved().ok().map(|s| s.view())
    }

    fn set_view(&mut self, view: &View) -> bool {
        let set = || {
            let old = self.saved().map_err(|e| e.to_string())?;
            let mut soft = SoftCpu::new(self.seat.index, self.cpus, &self.model);
            soft.load(&old.to_bytes())?;
            soft.set_view(view);
            // What the two kinds of processors do not have in common stays.
            let mut new = soft.saved();
            let mut msr = old.msr;
            msr.kernel_gs_base = new.msr.kernel_gs_base;
            (new.extra, new.lapic, new.msr) = (old.extra, old.lapic, msr);
            self.seat.vcpu().load(new, self.now()).map_err(|e| e.to_string())
        };
        set().inspect_err(|e: &String| log::warn!("processor {}: {e}", self.seat.index)).is_ok()
    }

    fn set_debug(&mut self, points: Option<&DebugPoints>) -> bool {
        let plan = match points.map(|p| Plan::new(p, points::guests_are_executed())) {
            None => None,
            Some(Some(plan)) => Some(plan),
            Some(None) => return false,
        };
        let set = self.seat.vcpu().set_debug(plan);
        set.inspect_err(|e| log::warn!("processor {}: {e}", self.seat.index)).is_ok()
    }
}
