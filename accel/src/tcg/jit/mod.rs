//! The compiler of hot blocks.
//!
//! A block that was interpreted often enough becomes host code. While such code runs, twelve of the guest's
//! general registers live in host registers (the other four in [`CpuState::gpr`]), the guest's arithmetic
//! flags in the host's wherever possible, and its XMM registers in the host's once a block needs them.
//!
//! What keeps positions and results exact:
//! - A block is entered only when the budget has room for all of it; the rest is interpreted.
//! - Whatever cannot be done in a few host instructions (a TLB miss, a page crossing, a device, a fault, an
//!   instruction that is not compiled) is done by the interpreter's handler for that instruction, with the
//!   whole state in place ([`step`]).
//! - A hot block is compiled together with what mostly follows it in its page, as one trace.
//! - Traces of one guest page are linked directly; they are dropped together. Everything else goes through
//!   the table by linear address, whose key changes whenever a translation may have changed. What was found there is
//!   kept with the key: in the code of direct jumps out of the page ([`Way::Across`]), for other jumps in a [`Site`];
//!   a call leaves where its return leads ([`Returns`]).
//! - Code runs only in the half of linear addresses for which it was compiled: the keys of the halves differ.
//! - 32-bit code is compiled where its segments are flat, which is a mode of its own ([`FLAT32`]).
//!
//! [`CpuState::gpr`]: crate::state::CpuState::gpr

mod asm;
mod block;
mod cold;
mod flags;
mod groups;
mod int;
mod kind;
mod memory;
mod registers;
mod stubs;
mod system;
mod trace;
mod vector;
mod ways;

use super::access::canonical;
use super::decode::{FLAT32, MODE64};
use super::flags::{IF, RF, TF};
use super::op::{
    Block, Op, ASKED, BLOCKIP, CODE_AT, FLAGS, HOST_CSR, JUMP_TABLE, KEY, LEFT, LEVEL, NEVER, PAGE, RIP_OUT,
    SHORT_KEYS, SITE, TLB, TOUCHED, WANTED, WATCHED, XMM_LIVE,
};
use super::paging::Access;
use super::SoftCpu;
use memory::CodeMemory;
use std::mem::offset_of;
pub(super) use ways::Returns;
use ways::{Edge, Way, RETURNS};

/// When blocks are compiled. The guest cannot tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Interpret everything.
    Never,
    /// Compile a block before it first runs.
    AtOnce,
    /// Compile a block that was interpreted this often.
    After(u32),
    /// Choose at random by this seed, block by block and run by run (for tests).
    Random(u64),
}

/// Bytes before a trace's code that charge the budget for it: a subtraction and a jump.
const FAR: u64 = 11;
/// Bytes of an addition to LEFT.
const CHARGE: usize = 5;
/// So often may a trace's groups fail before the trace is compiled without them too.
const FAILURES: u32 = 4;

/// Interpreted runs before a block is compiled.
const HOT: u32 = 30;
/// The host's base register points here in the processor, so that one-byte displacements reach `gpr`.
const ORIGIN: usize = offset_of!(SoftCpu, st.gpr) + 128;

/// Displacement of a field of the processor from the base register.
const fn at(offset: usize) -> i32 {
    offset as i32 - ORIGIN as i32
}
/// Displacement of a slot of `gpr`.
const fn slot(n: usize) -> i32 {
    8 * n as i32 - 128
}

// Why compiled code came back.
/// The instruction is done; position, RIP and flags are in place.
const LEAVE: u32 = 1;
/// The instruction in hand faulted; position, RIP and flags are in place.
const FAULT: u32 = 2;
/// RIP_OUT, LEFT and FLAGS say where things stand.
const NEXT: u32 = 3;
/// The same; the interpreter must run the next instruction.
const INTERPRET: u32 = 4;
/// Go on at RIP_OUT by the table (only from [`step`]).
const JUMP: u32 = 5;
/// Plus twice the number of an edge: it leads to code that it is not linked with; plus one: the budget ends.
const EDGE: u32 = 16;

/// The first access of a group, which looks up the page for all of them.
#[derive(Clone, Copy)]
struct Leader {
    /// The trace it is in.
    grouped: u32,
    /// The instruction of that trace.
    i: usize,
    op: *const Op,
    /// See [`step`].
    place: u32,
    /// Bytes that the group reaches over.
    len: u32,
    /// It is a write.
    write: bool,
    /// The page must be plainly writable.
    plainly: bool,
    /// Of the displacement of a jump to the same instruction in the trace without groups.
    jump_at: u64,
}

/// A trace with groups.
struct Grouped {
    /// Its blocks.
    keys: Vec<u64>,
    /// Its leaders.
    leaders: std::ops::Range<usize>,
    code: u64,
    /// How often a group could not be translated as one.
    failures: u32,
}

/// What a return from compiled code asks for.
pub(super) enum Left {
    /// Go on at RIP.
    Go,
    /// Deliver the exception.
    Fault,
    /// Interpret the next block.
    Interpret,
    /// Go on at RIP, and link this edge with what is there.
    Link(u32),
}

/// The compiler's state.
pub(super) struct Jit {
    tier: Tier,
    memory: Option<CodeMemory>,
    stubs: stubs::Stubs,
    edges: Vec<Edge>,
    grouped: Vec<Grouped>,
    leaders: Vec<Leader>,
    room: block::Room,
    random: u64,
    /// The short keys when code asked for a link.
    asked_by: u64,
    /// Epochs when short keys were forgotten, in halves of [`SHORT`].
    era: u64,
    /// Calls of [`step`].
    #[cfg(test)]
    pub steps: u64,
}

impl Jit {
    pub fn new() -> Jit {
        Jit {
            tier: Tier::After(HOT),
            memory: None,
            stubs: stubs::Stubs::default(),
            edges: Vec::new(),
            grouped: Vec::new(),
            leaders: Vec::new(),
            room: block::Room::default(),
            random: 0,
            asked_by: 0,
            era: 0,
            #[cfg(test)]
            steps: 0,
        }
    }

    /// Bytes of compiled code.
    #[cfg(test)]
    pub fn compiled_bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, |m| m.used() - self.stubs.size())
    }

    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// Whether linear address `lin` is too close to the end of the lower half for direct branches to be
/// compiled: their targets might not be canonical.
pub(super) fn near_hole(lin: u64) -> bool {
    (0x7FFF_0000_0000..0xFFFF_8001_0000_0000).contains(&lin) && lin >= 0x7FFF_7FF0_0000
}

impl SoftCpu {
    /// Choose when blocks are compiled.
    pub fn set_tier(&mut self, tier: Tier) {
        self.jit.tier = tier;
        if let Tier::Random(seed) = tier {
            self.jit.random = seed | 1;
        }
        self.drop_all_code();
    }

    /// Whether to run `block` as compiled code now; compiles it when it is time.
    #[inline(always)]
    pub(super) fn compiled(&mut self, block: &Block) -> bool {
        if block.code.get().is_null() {
            let runs = block.runs.get();
            if runs >= WATCHED {
                return false;
            }
            block.runs.set(runs + 1);
            let hot = match self.jit.tier {
                Tier::After(n) => runs >= n,
                _ => true,
            };
            if !hot || !self.heat(block) {
                return false;
            }
        }
        if matches!(self.jit.tier, Tier::Random(_)) && self.jit.draw() & 3 == 0 {
            return false;
        }
        block.code_count.get() as u64 <= self.limit - self.pos
            && block.half.get() as u64 == self.rip >> 63
            && !self.single
            && !near_hole(self.rip)
            && self.plain_stack()
    }

    /// Compiled 32-bit code does not keep the upper half of RSP, and nothing in that mode sets it.
    fn plain_stack(&self) -> bool {
        self.long || self.st.gpr[super::op::RSP] >> 32 == 0
    }

    #[cold]
    fn heat(&mut self, block: &Block) -> bool {
        if let Tier::Random(_) = self.jit.tier {
            if self.jit.draw() & 7 != 0 {
                block.runs.set(0);
                return false;
            }
        }
        if self.jit.tier != Tier::Never && self.compile(block) {
            return true;
        }
        block.runs.set(NEVER);
        false
    }

    /// Run compiled code from the start of `block`, which the budget has room for.
    pub(super) fn run_code(&mut self, block: &Block) -> Left {
        let f = self.arith_flags();
        let g = &mut self.st.gpr;
        g[LEFT] = self.limit - self.pos - block.code_count.get() as u64;
        g[FLAGS] = raw_flags(f);
        g[TLB] = self.tlb[self.mmu].address();
        g[JUMP_TABLE] = self.jumps.as_ptr() as u64;
        g[PAGE] = self.rip & !0xFFF;
        let this: *mut SoftCpu = self;
        // SAFETY: `enter` follows the System V convention; the code of a block in the cache stands in code
        // memory and touches only this processor, its tables and guest memory.
        let reason = unsafe { (self.jit.stubs.enter())(this.cast::<u8>().add(ORIGIN), block.code.get()) };
        match reason {
            LEAVE => return Left::Go,
            FAULT => return Left::Fault,
            _ => {}
        }
        self.set_arith_flags(flags_from_raw(self.st.gpr[FLAGS]));
        self.rip = self.st.gpr[RIP_OUT];
        let left = self.st.gpr[LEFT];
        if reason < EDGE {
            self.pos = self.limit - left;
            return if reason == INTERPRET { Left::Interpret } else { Left::Go };
        }
        let n = (reason - EDGE) >> 1;
        if reason & 1 != 0 {
            let charged = match self.jit.edges[n as usize].way {
                Way::Within { count, .. } => count,
                _ => 0,
            };
            self.pos = self.limit - left.wrapping_add(charged as u64);
            return Left::Go;
        }
        self.pos = self.limit - left;
        self.jit.asked_by = self.more_slots[SHORT_KEYS - 32];
        Left::Link(n)
    }

    /// Where compiled code enters a block that it found in the table at `lin`: for a compiled one, just before its code,
    /// where the budget is charged.
    #[inline(always)]
    pub(super) fn far_entry(&self, block: &Block, lin: u64) -> u64 {
        match block.code.get() as u64 {
            code if code != 0 && block.half.get() as u64 == lin >> 63 => code - FAR,
            _ => self.jit.stubs.miss,
        }
    }

    /// Where compiled code goes that finds nothing in the table.
    pub(super) fn miss(&self) -> u64 {
        self.jit.stubs.miss
    }

    /// A group of a trace could not be translated as one.
    fn group_failed(&mut self, number: u32) {
        let g = &mut self.jit.grouped[number as usize];
        g.failures += 1;
        if g.failures == FAILURES {
            self.compile_plainly(number);
        }
    }

    /// Nothing in the table is compiled.
    pub(super) fn forget_entries(&mut self) {
        for j in self.jumps.iter_mut().flat_map(|set| &mut set.0) {
            j.code = self.jit.stubs.miss;
        }
    }

    /// Forget all compiled code.
    pub(super) fn drop_compiled(&mut self) {
        for b in self.cache.all() {
            b.code.set(std::ptr::null());
            if b.runs.get() != WATCHED {
                b.runs.set(0);
            }
        }
        self.forget_entries();
        self.new_epoch();
        if let Some(m) = &mut self.jit.memory {
            m.truncate(self.jit.stubs.size());
        }
        self.jit.edges.clear();
        self.jit.grouped.clear();
        self.jit.leaders.clear();
    }
}

/// How compiled code keeps the flags: OF in byte 0, what LAHF gives in byte 1.
fn raw_flags(f: u64) -> u64 {
    f >> 11 & 1 | (f & 0xD5 | 2) << 8
}
fn flags_from_raw(raw: u64) -> u64 {
    (raw & 1) << 11 | raw >> 8 & 0xD5
}

/// `place` of [`step`]: the instruction has nothing to do with the arithmetic flags.
const NEUTRAL: u32 = 1 << 15;
/// `place` of [`step`]: an indirect jump; even one to the next instruction does not just go on.
const JUMPS: u32 = 1 << 14;

/// `place` of [`step`]: the trace has groups, which hold only while no translation is dropped.
const GROUPED: u32 = 1 << 13;

/// Run one instruction by its handler. `place`: the offset of its block in its page (bits 0..11), [`NEUTRAL`], [`JUMPS`],
/// and the number of the block's instructions (from bit 16). Returns 0 to go on, or why to leave.
unsafe extern "sysv64" fn step(c: *mut SoftCpu, op: *const Op, place: u32) -> u32 {
    // SAFETY: compiled code passes the processor that `run_code` was called with, whose other references are
    // not in use meanwhile, and an instruction of the block that runs, which is kept until `run_loop` goes on.
    let (c, op) = unsafe { (&mut *c, &*op) };
    #[cfg(test)]
    {
        c.jit.steps += 1;
    }
    let count = (place >> 16) as u64;
    let start = c.st.gpr[PAGE].wrapping_add((place & 0xFFF) as u64);
    c.st.gpr[BLOCKIP as usize] = start;
    c.pos = c.limit - c.st.gpr[LEFT] - count;
    c.cur = op;
    c.end = op;
    c.rip = start.wrapping_add(op.off as u64 + op.len as u64) & c.ip_mask;
    let (changes, key) = (c.changes, c.key_of(start));
    let neutral = place & NEUTRAL != 0;
    if !neutral {
        c.set_arith_flags(flags_from_raw(c.st.gpr[FLAGS]));
    }
    // Whoever leaves needs them in any case.
    let settle = |c: &mut SoftCpu| {
        if neutral {
            c.set_arith_flags(flags_from_raw(c.st.gpr[FLAGS]));
        }
    };
    let keep = |c: &mut SoftCpu| {
        if !neutral {
            c.st.gpr[FLAGS] = raw_flags(c.arith_flags());
        }
    };
    let done = (op.f)(c, op);
    c.cur = &super::IDLE;
    if done.is_err() {
        settle(c);
        c.pos += op.idx as u64;
        c.rip = start.wrapping_add(op.off as u64);
        return FAULT;
    }
    let last = op.idx as u64 + 1 == count;
    if last && !c.rep_again {
        let next = start.wrapping_add(op.off as u64 + op.len as u64) & c.ip_mask;
        c.pos += count;
        // After STI nothing waits if nothing is pending: what becomes due by the next instruction is due after it in
        // any case. (Where the run ends here, the shadow is part of the state, and with it goes RF.)
        if c.shadow && op.map == 0 && op.opcode == 0xFB && c.pos < c.limit && c.eflags & RF == 0 {
            c.shadow = false;
            let attention = c.attention;
            if !c.settled() {
                (c.shadow, c.attention) = (true, attention);
            }
        }
        if !c.settled() {
            settle(c);
            return LEAVE;
        }
        let g = &mut c.st.gpr;
        // The position moved on if the instruction repeated.
        g[LEFT] = c.limit - c.pos;
        g[TLB] = c.tlb[c.mmu].address();
        g[RIP_OUT] = c.rip;
        let on = place & JUMPS == 0 && c.rip == next && !c.end.is_null() && key == c.key_of(start);
        keep(c);
        return if on { 0 } else { JUMP };
    }
    if c.end.is_null() {
        c.pos += op.idx as u64 + 1;
        if std::mem::take(&mut c.rep_again) {
            c.rip = start.wrapping_add(op.off as u64);
        }
        settle(c);
        return LEAVE;
    }
    if place & GROUPED != 0 && changes != c.changes {
        c.pos += op.idx as u64 + 1;
        settle(c);
        return LEAVE;
    }
    keep(c);
    0
}

/// Fill the TLB for the group of leader `n`: TOUCHED is the group's first linear address. Returns 0 to try again,
/// or why to leave.
unsafe extern "sysv64" fn touch(c: *mut SoftCpu, n: u32) -> u32 {
    // SAFETY: as in `step`.
    let c = unsafe { &mut *c };
    let l = c.jit.leaders[n as usize];
    // SAFETY: as in `step`: the leader's trace runs.
    let op = unsafe { &*l.op };
    let count = (l.place >> 16) as u64;
    let lin = c.st.gpr[TOUCHED];
    c.pos = c.limit - c.st.gpr[LEFT] - count;
    c.cur = op;
    c.end = op;
    let changes = c.changes;
    let mut good = false;
    if (lin & 0xFFF) + l.len as u64 <= 4096 && canonical(lin) {
        let access = if l.write { Access::Write } else { Access::Read };
        if let Ok(w) = c.walk(lin, access, c.mmu) {
            c.fill(lin, &w, c.mmu);
            let tlb = &c.tlb[c.mmu];
            let way = if l.plainly { tlb.write(lin) } else { tlb.read(lin) };
            good = way.tag == lin & !0xFFF && changes == c.changes && !c.end.is_null();
        }
    }
    c.cur = &super::IDLE;
    if good {
        return 0;
    }
    c.group_failed(l.grouped);
    let g = &mut c.st.gpr;
    let start = g[PAGE].wrapping_add((l.place & 0xFFF) as u64);
    g[LEFT] += count - op.idx as u64;
    g[RIP_OUT] = start.wrapping_add(op.off as u64);
    INTERPRET
}

impl SoftCpu {
    /// Whether 64-bit code just goes on, as `run_loop` would find; settles `attention` if so.
    fn settled(&mut self) -> bool {
        if self.eflags & TF != 0 || self.dr_exec {
            // `attention` stays: `run_loop` must not go on to another block before it steps through it.
            return false;
        }
        if self.attention {
            let due = self.points.hit.is_some()
                || self.shutdown
                || self.brk
                || self.paused
                || self.wait_sipi
                || self.pending_db != 0
                || self.shadow
                || self.nmi_pending && !self.nmi_blocked
                || self.halted;
            if due {
                return false;
            }
            if self.eflags & IF != 0
                && (self.extint != 0
                    || self.lapic.pending().is_some()
                    || self.lapic.accepts_extint() && self.bus().intr())
            {
                return false;
            }
            self.attention = false;
        }
        matches!(self.code_mode, MODE64 | FLAT32)
            && self.plain_stack()
            && self.cache.graveyard.is_empty()
            && !near_hole(self.rip)
    }
}
