//! One processor: entering the guest, what an exit means, and its state.

use kvm_bindings::*;
use kvm_ioctls::{Cap, VcpuFd};

use super::crew::Crew;
use super::points::{DebugExit, Plan};
use super::raw::{self, Moment, Raw};
use super::{cpuid, lapic, sys, KvmError};
use crate::debug::DebugHit;
use crate::tcg::lapic::tsc_to_ns;
use crate::tcg::msr::{self, BANKS};
use crate::tcg::save::Saved;
use crate::CpuModel;

/// Where the I/O APIC decodes.
const IOAPIC: u64 = 0xFEC0_0000;

/// How an entry into the guest ended.
#[derive(Debug)]
pub enum Entry {
    /// Go on.
    Again,
    /// One instruction was executed, as [`Vcpu::step`] asked.
    Stepped,
    /// It stopped where a debugger wanted it to, or for a step's end.
    Debug(DebugExit),
    /// Triple fault.
    Shutdown,
    /// It cannot go on, and this is why.
    Failed(String),
}

/// A vector that was given to KVM, and where the processor was then.
type Queued = (u8, u64, u64);

/// What KVM keeps of a processor, with what it has no place for.
pub struct Vcpu {
    fd: VcpuFd,
    boot: bool,
    tsc_khz: u32,
    /// The MSRs of the saved form that this KVM has.
    msrs: Vec<u32>,
    has_xcrs: bool,
    /// The state as it was last loaded or read.
    base: Saved,
    /// KVM's IA32_TSC_ADJUST when `base.msr.tsc_adjust` was the adjustment. Not every processor that adjusts its TSC
    /// has the MSR, but KVM counts all adjustments in it.
    adjusted: Option<u64>,
    /// The TSC is what it was set to. Where guests read the host's own, it is not.
    tsc_obeys: bool,
    /// The last exit is complete only after the next entry.
    incomplete: bool,
    queued: Option<Queued>,
    /// A new state was loaded, whose clock does not run yet.
    loaded: bool,
    /// The model, and how many processors there are.
    model: (CpuModel, u32),
    /// CPUID names KVM.
    names_kvm: bool,
    /// The state came from elsewhere: its guest knows a TSC.
    foreign: bool,
    /// Where a debugger wants it to stop.
    plan: Option<Plan>,
    /// The linear address of the breakpoint at which it stopped last, if it has executed nothing since.
    stopped_at: Option<u64>,
    /// The debugger steps it.
    stepping: bool,
}

impl Vcpu {
    /// Around a new processor of KVM whose CPUID is set.
    pub fn new(
        fd: VcpuFd,
        reset: Saved,
        supported: &[u32],
        tsc_khz: u32,
        model: (CpuModel, u32),
    ) -> Result<Vcpu, KvmError> {
        // Banks that count nothing, as the software processor has.
        let _ = sys::setup_mce(&fd, u64::from(BANKS) | 1 << 8);
        let banks = 0x400..0x400 + BANKS * 4;
        let known = |n: &u32| {
            supported.contains(n)
                || banks.contains(n)
                || matches!(n, 0x200..=0x20F | 0x250..=0x26F | 0x277 | 0x2FF)
                || matches!(n, 0x17A | 0x17B | 0x8B | 0x1D9)
        };
        let msrs = raw::msr_numbers(&reset).into_iter().filter(known).collect();
        let mut vcpu = Vcpu {
            boot: reset.lapic.id == 0,
            fd,
            tsc_khz,
            msrs,
            has_xcrs: true,
            base: reset,
            adjusted: None,
            tsc_obeys: true,
            incomplete: false,
            queued: None,
            loaded: false,
            model,
            names_kvm: true,
            foreign: false,
            plan: None,
            stopped_at: None,
            stepping: false,
        };
        vcpu.has_xcrs = vcpu.fd.get_xcrs().is_ok();
        let reset = vcpu.base.clone();
        vcpu.begin(reset, 0)?;
        Ok(vcpu)
    }

    /// Where another thread sets that the next entry ends at once.
    pub fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    // ---- running

    /// Give KVM the 8259s' interrupt, if there is one and it can be taken now, or ask to hear when it can.
    pub fn offer_interrupt(&mut self, crew: &Crew) -> Result<(), KvmError> {
        if !self.boot {
            return Ok(());
        }
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = 0;
        if !crew.intr() {
            return Ok(());
        }
        if run.ready_for_interrupt_injection == 0 {
            run.request_interrupt_window = 1;
            return Ok(());
        }
        run.ready_for_interrupt_injection = 0;
        let vector = crew.with(|board| board.intr().then(|| board.intr_ack())).flatten();
        if let Some(vector) = vector {
            let regs = self.fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
            sys::interrupt(&self.fd, vector).map_err(KvmError::io("KVM_INTERRUPT"))?;
            self.queued = Some((vector, regs.rip, regs.rsp));
        }
        Ok(())
    }

    /// Enter the guest until its next exit, and do what that asks.
    pub fn enter(&mut self, crew: &Crew) -> Entry {
        let interrupted = match self.fd.run() {
            Ok(_) => false,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => true,
            Err(e) => return Entry::Failed(format!("KVM_RUN: {e}")),
        };
        self.incomplete = false;
        let run = self.fd.get_kvm_run();
        if interrupted {
            // A vector that waits makes KVM unready for another.
            if run.ready_for_interrupt_injection != 0 {
                self.queued = None;
            }
            return Entry::Again;
        }
        self.queued = None;
        match run.exit_reason {
            KVM_EXIT_IO => self.io(crew),
            KVM_EXIT_MMIO => self.mmio(crew),
            KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: this exit fills this member.
                let vector = unsafe { run.__bindgen_anon_1.eoi.vector };
                crew.with(|board| board.eoi(vector));
            }
            KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_INTR | KVM_EXIT_HLT => {}
            KVM_EXIT_X86_RDMSR => {
                self.incomplete = true;
                // SAFETY: this exit fills this member.
                let exit = unsafe { &mut run.__bindgen_anon_1.msr };
                match msr::constant(exit.index) {
                    Some(value) => (exit.data, exit.error) = (value, 0),
                    None => exit.error = 1,
                }
            }
            KVM_EXIT_X86_WRMSR => {
                self.incomplete = true;
                // SAFETY: this exit fills this member.
                let exit = unsafe { &mut run.__bindgen_anon_1.msr };
                exit.error = (!msr::is_ignored(exit.index)).into();
            }
            KVM_EXIT_DEBUG => {
                // SAFETY: this exit fills this member.
                let arch = unsafe { run.__bindgen_anon_1.debug.arch };
                return Entry::Debug(DebugExit { exception: arch.exception, pc: arch.pc, dr6: arch.dr6 });
            }
            KVM_EXIT_SHUTDOWN => return Entry::Shutdown,
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: this exit fills this member.
                let reason = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                return Entry::Failed(format!("KVM: entry failed, hardware error {reason:#x}"));
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: this exit fills this member.
                let error = unsafe { run.__bindgen_anon_1.internal };
                let mut text = format!("KVM internal error. Suberror: {}", error.suberror);
                if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
                    text.push_str(" (emulation failure)");
                }
                for word in error.data.iter().take(error.ndata as usize) {
                    text.push_str(&format!("\nextra data: {word:#018x}"));
                }
                return Entry::Failed(text);
            }
            other => return Entry::Failed(format!("KVM: unhandled exit {other}")),
        }
        Entry::Again
    }

    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), KvmError> {
        self.fd.set_guest_debug(debug).map_err(KvmError::call("KVM_SET_GUEST_DEBUG"))
    }

    /// Stop as the plan says from now on; `None`: nobody debugs.
    pub fn set_debug(&mut self, plan: Option<Plan>) -> Result<(), KvmError> {
        self.stepping &= plan.is_some();
        // A breakpoint that is taken away needs no stepping over.
        self.stopped_at = self.stopped_at.filter(|at| plan.as_ref().is_some_and(|p| p.breaks_at(*at)));
        self.plan = plan;
        self.arm(0)
    }

    fn arm(&self, more: u32) -> Result<(), KvmError> {
        match &self.plan {
            Some(plan) => self.set_guest_debug(&plan.guest_debug(more)),
            None => self.set_guest_debug(&kvm_guest_debug::default()),
        }
    }

    /// See [`Plan::soft`].
    pub fn soft_breaks(&self) -> Vec<u64> {
        self.plan.as_ref().map_or_else(Vec::new, |plan| plan.soft.clone())
    }

    /// Whether it stopped at one of them and has executed nothing since.
    pub fn is_at_soft_break(&self) -> Result<bool, KvmError> {
        match self.stopped_at {
            Some(at) if self.soft_breaks().contains(&at) => Ok(self.linear_pc()? == at),
            _ => Ok(false),
        }
    }

    /// Stop after one instruction, or do not.
    pub fn set_stepping(&mut self, on: bool) {
        self.stepping = on;
    }

    /// Whether the next instruction is to be executed by itself: the debugger wants that, or it stopped here, and goes on.
    pub fn steps(&mut self) -> Result<bool, KvmError> {
        if self.stepping || self.stopped_at.is_none() {
            return Ok(self.stepping);
        }
        let here = self.linear_pc()?;
        Ok(self.stopped_at == Some(here))
    }

    fn linear_pc(&self) -> Result<u64, KvmError> {
        let regs = self.fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
        let sregs = sys::get_sregs(&self.fd).map_err(KvmError::io("KVM_GET_SREGS2"))?;
        Ok(sregs.cs.base.wrapping_add(regs.rip))
    }

    /// An instruction was executed by itself: whether that is what the debugger waits for.
    pub fn stepped(&mut self) -> bool {
        self.stopped_at = None;
        self.stepping
    }

    /// What the debugger is to hear of an exit; `None`: nothing, it is the guest's own, which gets it.
    pub fn judge(&mut self, exit: DebugExit) -> Result<Option<DebugHit>, KvmError> {
        let hit = self.plan.as_ref().and_then(|plan| plan.hit(exit));
        match hit {
            Some(DebugHit::Break(at)) => self.stopped_at = Some(at),
            Some(DebugHit::Watch(_)) => {}
            None => {
                let inject =
                    if exit.exception == 3 { KVM_GUESTDBG_INJECT_BP } else { KVM_GUESTDBG_INJECT_DB };
                self.arm(inject)?;
                self.arm(0)?;
            }
        }
        Ok(hit)
    }

    /// Execute one instruction; interrupts are taken as ever. A halted processor waits for one, as long as `waits` says.
    pub fn step(&mut self, crew: &Crew, waits: &dyn Fn() -> bool) -> Result<Entry, KvmError> {
        let mut control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        if self.plan.as_ref().is_some_and(|p| p.hold_interrupts) {
            control |= KVM_GUESTDBG_BLOCKIRQ;
        }
        self.set_guest_debug(&kvm_guest_debug { control, ..Default::default() })?;
        self.fd.set_kvm_immediate_exit(0);
        let entry = loop {
            match self.enter(crew) {
                Entry::Debug(_) => break Entry::Stepped,
                Entry::Again if !self.incomplete && !waits() => break Entry::Again,
                // An instruction that left the guest ends with the next entry, which goes no further.
                Entry::Again if self.incomplete => {
                    self.fd.set_kvm_immediate_exit(1);
                    let end = self.enter(crew);
                    self.fd.set_kvm_immediate_exit(0);
                    match end {
                        Entry::Again if self.incomplete => {}
                        Entry::Again | Entry::Debug(_) => break Entry::Stepped,
                        other => break other,
                    }
                }
                Entry::Again => {}
                other => break other,
            }
        };
        self.arm(0)?;
        Ok(entry)
    }

    fn io(&mut self, crew: &Crew) {
        self.incomplete = true;
        let run = self.fd.get_kvm_run();
        // SAFETY: this exit fills this member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size.clamp(1, 4));
        // SAFETY: the kernel says that `count` items of `size` bytes lie there in the mapping that `run` begins.
        let data = unsafe {
            let start = std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
            std::slice::from_raw_parts_mut(start, size * io.count as usize)
        };
        let input = u32::from(io.direction) == KVM_EXIT_IO_IN;
        let done = crew.with(|board| {
            for item in data.chunks_exact_mut(size) {
                if input {
                    let value = board.io_read(io.port, size as u8).to_le_bytes();
                    item.copy_from_slice(&value[..size]);
                } else {
                    let mut value = [0; 4];
                    value[..size].copy_from_slice(item);
                    board.io_write(io.port, size as u8, u32::from_le_bytes(value));
                }
            }
        });
        if done.is_none() && input {
            data.fill(0xFF);
        }
    }

    fn mmio(&mut self, crew: &Crew) {
        self.incomplete = true;
        // SAFETY: this exit fills this member.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let (address, len) = (mmio.phys_addr, (mmio.len as usize).min(8));
        let data = &mut mmio.data[..len];
        if mmio.is_write != 0 {
            crew.with(|board| {
                // Writes to shadowed ROM go to the RAM behind it or nowhere.
                let backing = board.memory().backing(address);
                if !backing.write.is_null() {
                    let _ = board.memory().write(address, data);
                } else if backing.read.is_null() {
                    access(address, len, |at, from, size| {
                        let mut value = [0; 8];
                        value[..size].copy_from_slice(&data[from..from + size]);
                        board.mmio_write(at, size as u8, u64::from_le_bytes(value));
                    });
                    if address & !0xFFF == IOAPIC {
                        crew.set_pins(board);
                    }
                }
            });
        } else {
            data.fill(0xFF);
            crew.with(|board| {
                access(address, len, |at, from, size| {
                    let value = board.mmio_read(at, size as u8).to_le_bytes();
                    data[from..from + size].copy_from_slice(&value[..size]);
                });
            });
        }
    }

    /// Whether the last exit still waits for its end, which the next entry brings before anything else.
    pub fn is_incomplete(&self) -> bool {
        self.incomplete
    }

    /// Whether a vector was given to KVM that the guest has not taken: it is in no state that can be read.
    pub fn is_queued(&mut self) -> Result<bool, KvmError> {
        let Some((_, rip, rsp)) = self.queued else { return Ok(false) };
        let regs = self.fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
        let events = self.fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?;
        if events.interrupt.injected != 0 || (regs.rip, regs.rsp) != (rip, rsp) {
            self.queued = None;
        }
        Ok(self.queued.is_some())
    }

    // ---- state

    fn at(&self, now: u64) -> Moment {
        Moment { now, tsc_khz: self.tsc_khz }
    }

    fn read_msrs(&self, numbers: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        let mut out = Vec::with_capacity(numbers.len());
        // What this KVM does not have is left out.
        let mut rest = numbers;
        while !rest.is_empty() {
            let entries: Vec<_> =
                rest.iter().map(|n| kvm_msr_entry { index: *n, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::TooMany)?;
            let count = self.fd.get_msrs(&mut msrs).map_err(KvmError::call("KVM_GET_MSRS"))?;
            out.extend(msrs.as_slice()[..count].iter().map(|e| (e.index, e.data)));
            rest = &rest[(count + 1).min(rest.len())..];
        }
        Ok(out)
    }

    fn write_msrs(&self, list: &[(u32, u64)]) -> Result<(), KvmError> {
        let mut rest = list;
        while !rest.is_empty() {
            let entries: Vec<_> = rest
                .iter()
                .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
                .collect();
            let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::TooMany)?;
            let count = self.fd.set_msrs(&msrs).map_err(KvmError::call("KVM_SET_MSRS"))?;
            if let Some((number, value)) = rest.get(count) {
                // What KVM does not take, but has anyway, is well.
                if self.read_msrs(&[*number])?.first().is_some_and(|(_, has)| has != value) {
                    return Err(KvmError::Msr(*number, *value));
                }
            }
            rest = &rest[(count + 1).min(rest.len())..];
        }
        Ok(())
    }

    fn raw(&self) -> Result<Raw, KvmError> {
        let fd = &self.fd;
        // This one first: it makes KVM take a pending INIT or SIPI.
        let mp_state = fd.get_mp_state().map_err(KvmError::call("KVM_GET_MP_STATE"))?.mp_state;
        let xsave = fd.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?;
        let mut area = Box::new([0u8; 4096]);
        for (to, from) in area.chunks_exact_mut(4).zip(xsave.region) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        let xcr0 = match self.has_xcrs {
            true => fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?.xcrs[0].value,
            false => self.base.xcr0,
        };
        Ok(Raw {
            regs: fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?,
            sregs: sys::get_sregs(fd).map_err(KvmError::io("KVM_GET_SREGS2"))?,
            debug: fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?,
            xsave: area,
            xcr0,
            events: fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?,
            mp_state,
            lapic: fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?,
            msrs: self.read_msrs(&self.msrs)?,
        })
    }

    /// Read the state at virtual time `now`. The processor is not in the guest.
    fn read(&self, now: u64) -> Result<Saved, KvmError> {
        let mut saved = self.raw()?.to_saved(&self.base, self.at(now));
        saved.msr.tsc_adjust = self.adjustment()?;
        if saved.lapic.mode() == 2 {
            let deadline = self.read_msrs(&[raw::IA32_TSC_DEADLINE])?.first().map_or(0, |m| m.1);
            saved.lapic.tsc_deadline = deadline;
            saved.lapic.deadline =
                (deadline != 0).then(|| tsc_to_ns(deadline, saved.msr.tsc_adjust, self.tsc_khz));
        }
        Ok(saved)
    }

    /// What the TSC gains in so many nanoseconds.
    fn ticks(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.tsc_khz) / 1_000_000) as u64
    }

    /// The TSC at virtual time 0.
    fn adjustment(&self) -> Result<u64, KvmError> {
        let is = self.read_msrs(&[raw::IA32_TSC_ADJUST])?.first().map(|m| m.1);
        let since = is.zip(self.adjusted).map_or(0, |(is, was)| is.wrapping_sub(was));
        Ok(self.base.msr.tsc_adjust.wrapping_add(if self.loaded { 0 } else { since }))
    }

    /// The virtual time that the TSC shows.
    pub fn tsc_time(&self) -> Option<u64> {
        if self.loaded || !self.tsc_obeys {
            return None;
        }
        let adjust = self.adjustment().ok()?;
        let tsc = self.read_msrs(&[raw::IA32_TSC]).ok()?.first()?.1;
        Some(tsc_to_ns(tsc, adjust, self.tsc_khz))
    }

    /// Virtual time stops at `now`.
    pub fn freeze(&mut self, now: u64) -> Result<(), KvmError> {
        if !self.loaded {
            self.base = self.read(now)?;
            if !self.tsc_obeys {
                // What the guest sees is what goes on elsewhere.
                let tsc = self.read_msrs(&[raw::IA32_TSC])?.first().map_or(0, |m| m.1);
                self.base.msr.tsc_adjust = tsc.wrapping_sub(self.ticks(now));
            }
            self.adjusted = self.read_msrs(&[raw::IA32_TSC_ADJUST])?.first().map(|m| m.1);
        }
        Ok(())
    }

    /// The state while virtual time stands at `now`.
    pub fn saved(&self, now: u64) -> Result<Saved, KvmError> {
        let mut saved = self.read(now)?;
        // KVM's timers go on, the machine's do not.
        let (from, to) = (&self.base.lapic, &mut saved.lapic);
        (to.initial, to.started) = (from.initial, from.started);
        (to.deadline, to.tsc_deadline) = (from.deadline, from.tsc_deadline);
        saved.msr.tsc_adjust = self.base.msr.tsc_adjust;
        Ok(saved)
    }

    /// Take this state; virtual time stands at `now`.
    pub fn load(&mut self, saved: Saved, now: u64) -> Result<(), KvmError> {
        let raw = Raw::from_saved(&saved, self.at(now));
        if saved.extra.found_kvm != self.names_kvm {
            // A guest goes on with what it found. (A processor that has run keeps its CPUID.)
            let (model, cpus) = &self.model;
            let leaves = cpuid::leaves(model, saved.lapic.id, *cpus, saved.extra.found_kvm)?;
            if self.fd.set_cpuid2(&leaves).is_ok() {
                self.names_kvm = saved.extra.found_kvm;
            }
        }
        let fd = &self.fd;
        let mut xsave = kvm_xsave::default();
        for (to, from) in xsave.region.iter_mut().zip(raw.xsave.chunks_exact(4)) {
            *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        }
        // A state of a processor that is reset has no APIC mode in the way of the new one.
        sys::set_sregs(fd, &raw.sregs).map_err(KvmError::io("KVM_SET_SREGS2"))?;
        fd.set_regs(&raw.regs).map_err(KvmError::call("KVM_SET_REGS"))?;
        if self.has_xcrs {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0].value = raw.xcr0;
            fd.set_xcrs(&xcrs).map_err(KvmError::call("KVM_SET_XCRS"))?;
        }
        // SAFETY: the area is the plain 4096 bytes; no larger one was asked for (KVM_CAP_XSAVE2 is about features
        // that a process must ask its kernel for).
        unsafe { fd.set_xsave(&xsave) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(&raw.debug).map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
        let msrs: Vec<(u32, u64)> =
            raw.msrs.iter().copied().filter(|(number, _)| self.msrs.contains(number)).collect();
        self.write_msrs(&msrs)?;
        let mp_state = kvm_mp_state { mp_state: raw.mp_state };
        fd.set_mp_state(mp_state).map_err(KvmError::call("KVM_SET_MP_STATE"))?;
        fd.set_lapic(&raw.lapic).map_err(KvmError::call("KVM_SET_LAPIC"))?;
        fd.set_vcpu_events(&raw.events).map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
        if saved.extra.tsc_khz != self.tsc_khz {
            match fd.set_tsc_khz(saved.extra.tsc_khz) {
                Ok(()) => self.tsc_khz = saved.extra.tsc_khz,
                Err(_) => log::warn!(
                    "TSC frequency mismatch between VM ({} kHz) and host ({} kHz), and TSC scaling unavailable",
                    saved.extra.tsc_khz,
                    self.tsc_khz
                ),
            }
        }
        self.base = saved;
        self.incomplete = false;
        self.queued = None;
        self.loaded = true;
        self.foreign = true;
        let run = self.fd.get_kvm_run();
        run.ready_for_interrupt_injection = 0;
        run.request_interrupt_window = 0;
        Ok(())
    }

    /// Virtual time goes on from `now`. `common`: the TSC's offset without the adjustment, which all processors of a
    /// machine share; the first finds it.
    pub fn thaw(&mut self, now: u64, common: &mut Option<u64>) -> Result<(), KvmError> {
        let adjust = self.base.msr.tsc_adjust;
        let ticks = self.ticks(now);
        match sys::tsc_offset(&self.fd) {
            Ok(offset) => {
                let common = match common {
                    Some(common) => *common,
                    None => {
                        let tsc = self.read_msrs(&[raw::IA32_TSC])?.first().map_or(0, |m| m.1);
                        *common.insert(offset.wrapping_add(ticks).wrapping_sub(tsc))
                    }
                };
                let wanted = common.wrapping_add(adjust);
                sys::set_tsc_offset(&self.fd, wanted).map_err(KvmError::io("KVM_VCPU_TSC_OFFSET"))?;
            }
            Err(_) => self.write_msrs(&[(raw::IA32_TSC, ticks.wrapping_add(adjust))])?,
        }
        let mut page = self.fd.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?;
        lapic::set_timer(&mut page, &self.base.lapic, now);
        self.fd.set_lapic(&page).map_err(KvmError::call("KVM_SET_LAPIC"))?;
        if self.base.lapic.mode() == 2 {
            self.write_msrs(&[(raw::IA32_TSC_DEADLINE, self.base.lapic.tsc_deadline)])?;
        }
        self.check_tsc(ticks.wrapping_add(adjust))?;
        self.adjusted = self.read_msrs(&[raw::IA32_TSC_ADJUST])?.first().map(|m| m.1);
        self.loaded = false;
        Ok(())
    }

    /// Whether the TSC, which was set to `wanted` just now, is near it.
    fn check_tsc(&mut self, wanted: u64) -> Result<(), KvmError> {
        let is = self.read_msrs(&[raw::IA32_TSC])?.first().map_or(0, |m| m.1);
        let second = u64::from(self.tsc_khz) * 1000;
        let obeys = is.wrapping_sub(wanted).wrapping_add(second) < 2 * second;
        if !obeys && std::mem::take(&mut self.foreign) {
            log::warn!(
                "this host's KVM does not let the TSC be set: a guest that comes from elsewhere sees it jump"
            );
        }
        self.tsc_obeys = obeys;
        Ok(())
    }

    /// Whether a state was loaded since the processor last ran.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Take the state of a processor that begins here, with the TSC's rate that it has here.
    pub fn begin(&mut self, mut saved: Saved, now: u64) -> Result<(), KvmError> {
        saved.extra.tsc_khz = self.tsc_khz;
        saved.extra.found_kvm = self.names_kvm;
        self.load(saved, now)?;
        self.foreign = false;
        Ok(())
    }

    /// A non-maskable interrupt.
    pub fn nmi(&self) -> Result<(), KvmError> {
        self.fd.nmi().map_err(KvmError::call("KVM_NMI"))
    }
}

/// Cut an access into naturally aligned pieces of 1, 2, 4 or 8 bytes: address, offset, size.
fn access(address: u64, len: usize, mut piece: impl FnMut(u64, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = address + done as u64;
        let mut size = 8usize;
        while size > len - done || !at.is_multiple_of(size as u64) {
            size /= 2;
        }
        piece(at, done, size);
        done += size;
    }
}

/// The TSC's rate for a new processor: the software processor's, so that machines move freely, where KVM can scale.
pub fn choose_tsc_khz(system: &kvm_ioctls::Kvm, fd: &VcpuFd) -> Result<u32, KvmError> {
    if system.check_extension(Cap::TscControl) && fd.set_tsc_khz(crate::tcg::TSC_KHZ).is_ok() {
        return Ok(crate::tcg::TSC_KHZ);
    }
    fd.get_tsc_khz().map_err(KvmError::call("KVM_GET_TSC_KHZ"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn accesses_are_cut_at_their_natural_boundaries() {
        let mut pieces = Vec::new();
        super::access(0x1003, 7, |at, from, size| pieces.push((at, from, size)));
        assert_eq!(pieces, [(0x1003, 0, 1), (0x1004, 1, 4), (0x1008, 5, 2)]);
    }
}
