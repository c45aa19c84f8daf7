//! The deterministic software processor: an interpreter of cached, decoded blocks.
//!
//! `decode` turns bytes into [`op::Op`]s with a handler each; `cache` keeps straight runs of them as blocks
//! by physical address; the loop here runs blocks and, between them, looks at what needs attention
//! (interrupts, halts, the bus's wish to stop). `jit` compiles the blocks that are run often.

mod access;
mod alu;
mod bits;
mod cache;
mod ctl;
mod debug;
mod decode;
mod decode0f;
mod far;
mod find;
mod flags;
mod interrupt;
mod jit;
pub(crate) mod lapic;
mod large;
mod marks;
mod mov;
pub(crate) mod msr;
pub(crate) mod op;
mod paging;
mod points;
pub mod registers;
pub(crate) mod save;
mod segment;
mod shift;
mod string;
mod sys;
mod task;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_code;
#[cfg(test)]
mod tests_system;
mod tlb;
mod undefined;
mod vec;

pub use jit::Tier;
pub use registers::Registers;

use crate::bus::Ipi;
use crate::debug::{DebugHit, DebugPoints};
use crate::mem::GuestMemory;
use crate::state::{CpuState, Segment};
use crate::{ApicMessage, Bus, ClockLine, CpuModel, Exception, Exit, Processor, RunResult};
use cache::{Cache, JumpSet, JUMPS};
use flags::{IF, TF};
use jit::Left;
use lapic::Lapic;
use large::{Kept, Large};
use marks::Marks;
use msr::Msrs;
use op::*;
use paging::*;
use tlb::Tlb;

static IDLE: Op = decode::BLANK;

/// The TSC's rate on a machine that began here: one tick for each nanosecond of virtual time.
pub(crate) const TSC_KHZ: u32 = 1_000_000;

/// At most so many instructions in a block.
const MAX_BLOCK: usize = 48;

/// A software processor with its local APIC.
pub struct SoftCpu {
    // What the architecture defines.
    pub(crate) st: CpuState,
    pub(crate) rip: u64,
    /// See `flags`.
    f_res: u64,
    f_aux: u64,
    /// RFLAGS without the six arithmetic flags.
    eflags: u64,
    segs: [Segment; 6],
    ldtr: Segment,
    tr: Segment,
    gdt: (u64, u16),
    idt: (u64, u16),
    cr2: u64,
    cr3: u64,
    pdpte: [u64; 4],
    dr: [u64; 8],
    efer: u64,
    cpl: u8,
    msr: Msrs,
    lapic: Lapic,
    halted: bool,
    wait_sipi: bool,
    shutdown: bool,
    /// Interrupts wait until after the next instruction (STI, MOV SS).
    shadow: bool,
    nmi_pending: bool,
    nmi_blocked: bool,
    /// The vector of an ExtINT message, and 100h; or 0.
    extint: u16,
    /// Bits of DR6 for a #DB that is due before the next instruction.
    pending_db: u64,
    /// An exception whose delivery began on another processor, which could not end it.
    begun: Option<Exception>,
    /// What the TSC gains in a millisecond.
    tsc_khz: u32,
    /// kvmclock's MSRs: system time, wall clock.
    kvm_clock: [u64; 2],
    /// The guest began on KVM, and goes on finding it.
    found_kvm: bool,
    /// Deliveries since an instruction last retired, and where.
    deliveries: u32,
    delivery_at: u64,

    // Derived from the above.
    long: bool,
    code_mode: u8,
    ip_mask: u64,
    sp_mask: u64,
    mmu: usize,
    dr_watch: bool,
    dr_exec: bool,

    // The model.
    model: CpuModel,
    cpus: u32,
    phys_mask: u64,
    cr4_mask: u64,
    xcr0_mask: u64,

    // Of the instruction in hand.
    fault: Exception,
    db_bits: u64,
    ext: u32,
    implicit: bool,
    rep_again: bool,
    paused: bool,

    // Of the run in hand.
    mem: *const GuestMemory,
    bus: *mut dyn Bus,
    cur: *const Op,
    end: *const Op,
    pos: u64,
    limit: u64,
    /// The clock, as long as that is so; no rate: the bus knows it.
    clock: ClockLine,
    /// Where the TLBs for supervisor and user are.
    tlb_at: [u64; 2],
    attention: bool,
    brk: bool,
    single: bool,
    /// `run` ends behind so many deliveries at its position; 0: it goes on.
    deliver_only: u32,

    // Caches, never visible.
    tlb: [Tlb; 4],
    code_tlb: [Large<CodeEntry>; 2],
    /// Which entries of the two are in use.
    filled: Vec<(u8, u16)>,
    code_filled: Vec<(u8, u16)>,
    cache: Cache,
    jumps: Large<JumpSet>,
    /// Of the lower half of linear addresses, in the address space in use.
    epoch: u64,
    /// The last epoch that was given.
    epochs: u64,
    spaces: Vec<Space>,
    /// Upper halves of linear addresses, which address spaces share; the first is in use.
    highs: Vec<High>,
    /// What `highs` and `marks` were when the upper half of the address space in use was found in `highs`.
    noted: (u64, usize, u64),
    /// Where the table entry of each entry of `tlb` lies.
    leaves: [Large<u64>; 4],
    /// In which pages those lie.
    tables: Tables,
    marks: Marks,
    trails: Box<Trails>,
    /// The table that was written last, how often, and when.
    table_writes: (u64, u32, u64),
    /// Counts droppings of translations.
    changes: u64,
    switches: u64,
    /// See `lone_block`.
    lone: Option<Kept<Block>>,
    generation: u32,
    seen: u64,
    points: points::Points,
    jit: jit::Jit,
    /// More slots like those behind the registers in `gpr`.
    more_slots: [u64; 16],
    /// Where the returns of calls are expected to lead.
    returns: jit::Returns,
}

// SAFETY: the raw pointers `mem`, `bus`, `cur` and `end` mean something only within `run`; the others point
// into boxes that the value owns (or into guest memory, dropped with the TLB at the start of the next `run`
// when its generation differs).
unsafe impl Send for SoftCpu {}

/// Stands in for the bus outside `run`.
struct NoBus;
impl Bus for NoBus {
    fn io_read(&mut self, _: u64, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn io_write(&mut self, _: u64, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: u64, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: u64, _: u64, _: u8, _: u64) {}
    fn clock_ns(&mut self, _: u64) -> u64 {
        0
    }
    fn intr(&mut self) -> bool {
        false
    }
    fn intr_ack(&mut self, _: u64) -> u8 {
        0
    }
    fn eoi(&mut self, _: u64, _: u8) {}
    fn send_ipi(&mut self, _: Ipi) {}
    fn random(&mut self) -> u64 {
        0
    }
    fn break_requested(&self) -> bool {
        false
    }
}

impl SoftCpu {
    /// A processor after power-on. `apic_id` 0 is the boot processor; `cpus` is the machine's count.
    pub fn new(apic_id: u32, cpus: u32, model: &CpuModel) -> Self {
        let nobus: *mut dyn Bus = std::ptr::NonNull::<NoBus>::dangling().as_ptr();
        let mut c = SoftCpu {
            st: CpuState::default(),
            rip: 0,
            f_res: 0,
            f_aux: 0,
            eflags: 2,
            segs: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdt: (0, 0xFFFF),
            idt: (0, 0x3FF),
            cr2: 0,
            cr3: 0,
            pdpte: [0; 4],
            dr: [0; 8],
            efer: 0,
            cpl: 0,
            msr: Msrs::reset(),
            lapic: Lapic::new(apic_id),
            halted: false,
            wait_sipi: false,
            shutdown: false,
            shadow: false,
            nmi_pending: false,
            nmi_blocked: false,
            extint: 0,
            pending_db: 0,
            begun: None,
            tsc_khz: TSC_KHZ,
            kvm_clock: [0; 2],
            found_kvm: false,
            deliveries: 0,
            delivery_at: 0,
            long: false,
            code_mode: 0,
            ip_mask: 0,
            sp_mask: 0,
            mmu: 0,
            dr_watch: false,
            dr_exec: false,
            model: model.clone(),
            cpus,
            phys_mask: (1 << model.phys_bits()) - 1,
            cr4_mask: model.cr4_mask(),
            xcr0_mask: model.xcr0_mask(),
            fault: Exception::UD,
            db_bits: 0,
            ext: 0,
            implicit: false,
            rep_again: false,
            paused: false,
            mem: std::ptr::null(),
            bus: nobus,
            cur: &IDLE,
            end: std::ptr::null(),
            pos: 0,
            limit: 0,
            clock: ClockLine::default(),
            tlb_at: [0; 2],
            attention: true,
            brk: false,
            single: false,
            deliver_only: 0,
            tlb: new_tlb(),
            code_tlb: new_code_tlb(),
            filled: Vec::new(),
            code_filled: Vec::new(),
            cache: Cache::default(),
            jumps: (0..JUMPS).map(|_| JumpSet::EMPTY).collect(),
            epoch: 1,
            epochs: 2,
            spaces: Vec::new(),
            highs: vec![High::new(2)],
            noted: (0, 0, 0),
            leaves: new_leaves(),
            tables: Tables::NONE,
            marks: Marks::default(),
            trails: new_trails(),
            table_writes: (0, 0, 0),
            changes: 0,
            switches: 0,
            lone: None,
            generation: 0,
            seen: 0,
            points: points::Points::new(),
            jit: jit::Jit::new(),
            more_slots: [0; 16],
            returns: jit::Returns::NONE,
        };
        c.reset_state(false);
        c
    }

    fn reset_state(&mut self, init: bool) {
        let bsp = self.lapic.id == 0;
        let keep = (self.st.x87, self.st.vector, self.st.xcr0, self.st.cr0);
        self.st = CpuState::default();
        if init {
            (self.st.x87, self.st.vector, self.st.xcr0) = (keep.0, keep.1, keep.2);
            self.st.cr0 = keep.3 & (CR0_CD | CR0_NW) | 0x10;
        } else {
            self.st.cr0 = 0x6000_0010;
            self.st.xcr0 = 1;
            self.msr = Msrs::reset();
            self.st.x87.fcw = 0x40;
        }
        self.lapic.reset(init);
        self.st.gpr[RDX] = self.model.signature() as u64;
        self.rip = 0xFFF0;
        self.f_aux = 0;
        self.set_arith_flags(0);
        self.eflags = 2;
        for s in &mut self.segs {
            *s = Segment { selector: 0, base: 0, limit: 0xFFFF, attr: 0x93 };
        }
        self.segs[CS] = Segment { selector: 0xF000, base: 0xFFFF_0000, limit: 0xFFFF, attr: 0x9B };
        self.ldtr = Segment { selector: 0, base: 0, limit: 0xFFFF, attr: 0x82 };
        self.tr = Segment { selector: 0, base: 0, limit: 0xFFFF, attr: 0x8B };
        self.gdt = (0, 0xFFFF);
        self.idt = (0, 0xFFFF);
        self.cr2 = 0;
        self.cr3 = 0;
        self.efer = 0;
        self.cpl = 0;
        self.dr = [0; 8];
        self.dr[6] = 0xFFFF_0FF0;
        self.dr[7] = 0x400;
        self.halted = false;
        self.wait_sipi = !bsp;
        self.shutdown = false;
        self.shadow = false;
        self.nmi_pending = false;
        self.nmi_blocked = false;
        self.extint = 0;
        self.pending_db = 0;
        self.begun = None;
        if !init {
            self.kvm_clock = [0; 2];
            self.found_kvm = false;
        }
        self.debug_changed();
        self.flush_tlb();
        self.update_mode();
        self.attention = true;
    }

    pub(super) fn protected_or_vm(&self) -> bool {
        self.st.cr0 & CR0_PE != 0
    }

    /// #AC checks are on: CR0.AM, EFLAGS.AC, privilege level 3.
    fn alignment_checks(&self) -> bool {
        self.cpl == 3 && self.eflags & flags::AC != 0 && self.st.cr0 & CR0_AM != 0
    }

    /// After a change of RFLAGS outside the arithmetic flags.
    pub(super) fn flags_changed(&mut self) {
        self.update_mmu();
        self.attend();
    }

    // ---- the loop

    fn run_loop(&mut self, start: u64) -> RunResult {
        let done = |c: &Self, exit| RunResult { exit, retired: c.pos - start };
        self.sync_memory();
        self.attention = true;
        loop {
            if self.pos >= self.limit {
                // PAUSE as the last instruction of a budget is still reported: the schedule must not
                // depend on how the budget was divided.
                let exit = if self.points.hit.is_some() {
                    Exit::Debug
                } else if std::mem::take(&mut self.paused) {
                    Exit::Pause
                } else {
                    Exit::Budget
                };
                return done(self, exit);
            }
            if self.deliver_only != 0 && self.delivered(self.pos) >= self.deliver_only {
                return done(self, Exit::Budget);
            }
            if self.attention {
                if let Some(exit) = self.attend_to() {
                    return done(self, exit);
                }
                if self.pos >= self.limit {
                    return done(self, Exit::Budget);
                }
                if self.attention && !self.shadow {
                    // Something was delivered. What is due besides comes now, wherever blocks end.
                    continue;
                }
            }
            if !self.cache.graveyard.is_empty() {
                self.cache.graveyard.clear();
            }
            let shadow = self.shadow;
            let tf = self.eflags & TF != 0;
            self.single = shadow || tf || self.dr_exec;
            if self.dr_exec && self.check_exec_break() {
                self.fault = Exception::DB;
                self.deliver_exception();
                continue;
            }
            match self.find_block() {
                Ok(mut block) => {
                    let mut interpret = false;
                    let faulted = loop {
                        // SAFETY: the block is in the cache, or else in the graveyard until the loop above
                        // goes round.
                        let b = unsafe { &*block };
                        let watched = b.runs.get() == WATCHED;
                        if watched && self.at_break() {
                            return done(self, Exit::Debug);
                        }
                        let mut edge = None;
                        let fast = !interpret && self.compiled(b);
                        interpret = false;
                        if fast {
                            match self.run_code(b) {
                                Left::Go => {}
                                Left::Fault => break true,
                                Left::Interpret => interpret = true,
                                Left::Link(n) => edge = Some(n),
                            }
                        } else if watched {
                            if self.run_watched(b) {
                                break true;
                            }
                        } else if self.run_block(b) {
                            break true;
                        }
                        // Whatever makes the checks above necessary sets `attention`.
                        if self.attention
                            || self.single
                            || self.pos >= self.limit
                            || !self.cache.graveyard.is_empty()
                        {
                            break false;
                        }
                        let next = if fast { self.find_block() } else { self.follow(block) };
                        match next {
                            Ok(next) => block = next,
                            Err(Fault) => break true,
                        }
                        if let Some(n) = edge {
                            // SAFETY: as above.
                            self.link(n, unsafe { &*block });
                        }
                    };
                    if faulted {
                        self.shadow = false;
                        self.deliver_exception();
                        continue;
                    }
                }
                Err(Fault) => {
                    self.shadow = false;
                    self.deliver_exception();
                    continue;
                }
            }
            if self.single {
                self.eflags &= !flags::RF;
                if shadow {
                    self.shadow = false;
                    self.attention = true;
                }
                if tf {
                    self.pending_db |= 0x4000;
                }
                self.attention = true;
            }
        }
    }

    /// Run a block (or as much of it as the budget allows). Returns whether it ended with a fault.
    #[inline(always)]
    fn run_block(&mut self, b: &Block) -> bool {
        let len = b.ops().len();
        let room = self.limit - self.pos;
        let n_max = if self.single { 1 } else { (len as u64).min(room) as usize };
        let start = self.rip;
        self.st.gpr[BLOCKIP as usize] = start;
        self.rip = start.wrapping_add(b.bytes as u64) & self.ip_mask;
        let first = b.ops().as_ptr();
        let mut p = first;
        // SAFETY: n_max <= len.
        self.end = unsafe { first.add(n_max) };
        let faulted = loop {
            self.cur = p;
            // SAFETY: p lies within the block's ops: it is below `end`.
            let op = unsafe { &*p };
            match (op.f)(self, op) {
                Ok(()) => {
                    // SAFETY: at most one past the last op.
                    p = unsafe { p.add(1) };
                    if p >= self.end {
                        break false;
                    }
                }
                Err(Fault) => break true,
            }
        };
        let n = (p as usize - first as usize) / std::mem::size_of::<Op>();
        // SAFETY: `cur` points into the block.
        let cur = unsafe { &*self.cur };
        self.cur = &IDLE;
        self.pos += n as u64;
        if faulted {
            self.rip = start.wrapping_add(cur.off as u64) & self.ip_mask;
            return true;
        }
        if n < len {
            self.rip = start.wrapping_add(cur.off as u64 + cur.len as u64) & self.ip_mask;
        }
        if self.rep_again {
            self.rep_again = false;
            self.rip = start.wrapping_add(cur.off as u64) & self.ip_mask;
        }
        false
    }

    /// Whatever must be looked at between instructions. Some: `run` returns.
    fn attend_to(&mut self) -> Option<Exit> {
        self.attention = false;
        if self.points.hit.is_some() {
            self.attention = true;
            return Some(Exit::Debug);
        }
        if self.shutdown {
            self.attention = true;
            return Some(Exit::Shutdown);
        }
        if self.brk {
            self.brk = false;
            self.attention = true;
            return Some(Exit::Break);
        }
        if self.paused {
            self.paused = false;
            self.attention = true;
            return Some(Exit::Pause);
        }
        if self.wait_sipi {
            self.attention = true;
            return Some(Exit::Halt);
        }
        if let Some(exception) = self.begun.take() {
            self.fault = exception;
            self.halted = false;
            self.deliver_exception();
            self.attention = true;
            return None;
        }
        if self.pending_db != 0 && !self.shadow {
            self.db_bits = std::mem::take(&mut self.pending_db);
            self.fault = Exception::DB;
            self.halted = false;
            self.deliver_exception();
            self.attention = true;
            return None;
        }
        if self.shadow && !self.halted {
            self.attention = true;
            return None;
        }
        self.shadow = false;
        if self.points.hold_interrupts() && !self.halted {
            return None;
        }
        if self.nmi_pending && !self.nmi_blocked {
            self.nmi_pending = false;
            self.nmi_blocked = true;
            self.halted = false;
            self.deliver_interrupt(2);
            self.attention = true;
            return None;
        }
        if self.eflags & IF != 0 {
            let vector = if let Some(v) = self.extint_vector() {
                self.extint = 0;
                Some(v)
            } else if self.lapic.accepts_extint() && self.bus().intr() {
                let position = self.position();
                let v = self.bus().intr_ack(position);
                self.after_bus();
                Some(v)
            } else if let Some(v) = self.lapic.pending() {
                self.lapic.accept(v);
                Some(v)
            } else {
                None
            };
            if let Some(v) = vector {
                self.halted = false;
                self.deliver_interrupt(v);
                self.attention = true;
                return None;
            }
        }
        if self.halted {
            self.attention = true;
            return Some(Exit::Halt);
        }
        None
    }
}

impl Processor for SoftCpu {
    fn run(&mut self, mem: &GuestMemory, bus: &mut dyn Bus, position: u64, budget: u64) -> RunResult {
        if !std::ptr::eq(self.mem, mem) {
            self.mem = mem;
            self.drop_all_code();
            self.flush_tlb();
        }
        let bus_line = bus.clock_line(position);
        let p: *mut (dyn Bus + '_) = bus;
        // SAFETY: the pointer is used under this call only; `NoBus` replaces it before the return.
        self.bus = unsafe { std::mem::transmute::<*mut (dyn Bus + '_), *mut (dyn Bus + 'static)>(p) };
        self.clock = match self.tsc_khz {
            TSC_KHZ => bus_line,
            _ => ClockLine::default(),
        };
        self.find_tlbs();
        self.pos = position;
        // Compiled code takes what is left of it for a signed number.
        self.limit = position.saturating_add(budget.min(1 << 62));
        let r = self.run_loop(position);
        self.bus = std::ptr::NonNull::<NoBus>::dangling().as_ptr();
        r
    }

    fn delivered(&self, position: u64) -> u32 {
        if self.delivery_at == position {
            self.deliveries
        } else {
            0
        }
    }

    fn deliver(&mut self, mem: &GuestMemory, bus: &mut dyn Bus, position: u64, count: u32) -> RunResult {
        self.deliver_only = count;
        let result = self.run(mem, bus, position, 1);
        self.deliver_only = 0;
        result
    }

    fn reset(&mut self, init: bool) {
        self.reset_state(init);
    }

    fn is_idle(&self, intr: bool) -> bool {
        if self.wait_sipi {
            return true;
        }
        if !self.halted
            || self.shutdown
            || self.begun.is_some()
            || self.pending_db != 0
            || self.nmi_pending && !self.nmi_blocked
        {
            return false;
        }
        !(self.eflags & IF != 0
            && (self.lapic.pending().is_some() || self.extint != 0 || intr && self.lapic.accepts_extint()))
    }

    fn apic_message(&mut self, message: ApicMessage) -> bool {
        self.take_message(message)
    }

    fn ipi(&mut self, ipi: Ipi) -> bool {
        self.take_ipi(ipi)
    }

    fn nmi(&mut self) {
        self.nmi_pending = true;
        self.attention = true;
    }

    fn next_deadline(&self) -> Option<u64> {
        self.lapic.next_deadline()
    }

    fn advance(&mut self, now_ns: u64) {
        self.lapic.advance(now_ns);
        self.attention = true;
    }

    fn save(&self) -> Vec<u8> {
        self.saved().to_bytes()
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        self.load_state(saved)
    }

    fn describe(&self) -> String {
        self.saved().describe()
    }

    fn view(&self) -> Option<registers::View> {
        Some(SoftCpu::view(self))
    }

    fn set_view(&mut self, view: &registers::View) -> bool {
        SoftCpu::set_view(self, view);
        true
    }

    fn set_debug(&mut self, points: Option<&DebugPoints>) -> bool {
        self.set_points(points);
        true
    }

    fn take_debug_hit(&mut self) -> Option<DebugHit> {
        self.points.hit.take()
    }
}

impl SoftCpu {
    fn extint_vector(&self) -> Option<u8> {
        (self.extint != 0).then_some(self.extint as u8)
    }

    /// CPUID as this processor answers it now.
    fn cpuid_leaf(&self, leaf: u32, sub: u32) -> [u32; 4] {
        let at = crate::model::CpuidContext {
            apic_id: self.lapic.id,
            cpus: self.cpus,
            osxsave: self.st.cr4 & CR4_OSXSAVE != 0,
            apic_on: self.lapic.enabled(),
            xcr0: self.st.xcr0,
            kvm: self.found_kvm,
        };
        self.model.cpuid(leaf, sub, at)
    }
}
