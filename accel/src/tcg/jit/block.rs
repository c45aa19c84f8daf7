//! Compiles one block: the order of things, memory operands, ways out.

use super::super::cache::Cache;
use super::super::decode::MODE64;
use super::super::op::FS;
use super::super::paging::{TlbEntry, TLB_SIZE};
use super::super::SoftCpu;
use super::asm::*;
use super::flags::{place, Flags};
use super::kind::{classify, leaves_flags, Kind, ALL};
use super::stubs::{mem, Stubs, HOST, NONE};
use super::*;
use crate::state::Segment;

/// Code out of line.
enum Cold {
    /// Instruction `i` by its handler, then on at `join`.
    Step { from: Fix, i: usize, flags: Flags, join: Fix, loaded: u8 },
    /// Load the vector registers for instruction `i`, then on at `back`.
    Load { from: Fix, i: usize, flags: Flags, back: Fix, level: u8 },
    /// An edge without a link, and without budget.
    Edge { n: u32, link: Option<Fix>, budget: Fix, flags: Flags, target: i32 },
}

/// What is known while a block is compiled.
pub struct Compiler<'a> {
    pub a: Asm,
    pub kinds: Vec<Kind>,
    /// Whether somebody may look at the flags as they are before instruction i (and at the end).
    pub need: Vec<bool>,
    pub fl: Flags,
    /// The vector registers are in the host's: 1 XMM, 2 YMM.
    loaded: u8,
    block: &'a Block,
    /// The block's offset in its page.
    at: u64,
    alone: bool,
    cache: &'a Cache,
    stubs: Stubs,
    cold: Vec<Cold>,
    edges: Vec<Edge>,
    first_edge: usize,
}

fn classes(block: &Block, alone: bool) -> Vec<Kind> {
    let at = block.key & 0xFFF;
    block.ops.iter().map(|op| classify(op, at, alone)).collect()
}

/// See [`Compiler::need`].
fn needs(kinds: &[Kind]) -> Vec<bool> {
    let mut need = vec![true; kinds.len() + 1];
    // The first vector instruction may leave to the interpreter.
    let mut loaded = 0;
    let mut first = Vec::with_capacity(kinds.len());
    for k in kinds {
        let level = match k {
            Kind::Vector { native, .. } => 1 + native.vex.is_some() as u8,
            _ => 0,
        };
        first.push(level > loaded);
        loaded = if *k == Kind::Handler { 0 } else { loaded.max(level) };
    }
    for (i, k) in kinds.iter().enumerate().rev() {
        let e = k.effects();
        need[i] = e.exits || first[i] || e.reads != 0 || need[i + 1] && e.writes != ALL;
    }
    need
}

impl SoftCpu {
    /// Compile `block`; false when it cannot be.
    pub(super) fn compile(&mut self, block: &Block) -> bool {
        if block.key >> 60 != MODE64 as u64 || block.key == 0 {
            return false;
        }
        if self.jit.memory.is_none() {
            let Some(mut memory) = CodeMemory::new() else {
                log::warn!("the host refuses memory for compiled code: everything is interpreted");
                self.jit.tier = Tier::Never;
                return false;
            };
            self.jit.stubs = Stubs::build(&mut memory);
            self.jit.memory = Some(memory);
        }
        for _ in 0..2 {
            let Some(memory) = &mut self.jit.memory else { return false };
            let base = memory.next();
            let mut c = Compiler {
                a: Asm::new(base),
                kinds: classes(block, self.cpus == 1),
                alone: self.cpus == 1,
                need: Vec::new(),
                fl: Flags::KEPT,
                loaded: 0,
                block,
                at: block.key & 0xFFF,
                cache: &self.cache,
                stubs: self.jit.stubs,
                cold: Vec::new(),
                edges: Vec::new(),
                first_edge: self.jit.edges.len(),
            };
            c.need = needs(&c.kinds);
            c.body();
            c.out_of_line();
            let (code, edges) = (c.a.buf, c.edges);
            if memory.push(&code) {
                self.jit.edges.extend(edges);
                block.code.set(base as *const u8);
                return true;
            }
            self.drop_compiled();
        }
        false
    }
}

impl Compiler<'_> {
    fn body(&mut self) {
        let n = self.kinds.len();
        for i in 0..n {
            self.instruction(i);
        }
        let last = self.kinds[n - 1];
        if !last.branches() {
            self.edge(self.at as i64 + self.block.bytes as i64);
        }
    }

    pub fn op(&self, i: usize) -> &'static Op {
        // SAFETY: the reference does not outlive the compiler, which borrows the block.
        unsafe { &*(&self.block.ops[i] as *const Op) }
    }

    /// The offset, from the page's start, of what follows instruction `i`.
    pub fn next(&self, i: usize) -> i64 {
        let op = &self.block.ops[i];
        self.at as i64 + op.off as i64 + op.len as i64
    }

    // ---- handlers

    fn call_step(&mut self, i: usize, loaded: u8) {
        let neutral = match self.kinds[i] {
            Kind::Handler => leaves_flags(self.op(i)),
            k => k.effects().reads | k.effects().writes == 0,
        };
        let neutral = if neutral { NEUTRAL } else { 0 };
        // What follows in the code of these jumps, wherever they lead.
        let jumps = matches!(self.kinds[i], Kind::Ret { .. } | Kind::Indirect { .. });
        let jumps = if jumps { JUMPS } else { 0 };
        let place = (self.at as u32) | neutral | jumps | self.block.count << 16;
        let op = &self.block.ops[i] as *const Op as u64;
        self.a.constant(RAX, op);
        self.a.constant(RDI, place as u64);
        self.a.call_abs(self.stubs.step[loaded as usize]);
    }

    /// Instruction `i` by its handler.
    pub fn handler(&mut self, i: usize) {
        self.keep();
        self.call_step(i, 0);
        self.loaded = 0;
        self.fl = Flags::KEPT;
    }

    // ---- memory

    /// The offset part of instruction `i`'s memory operand, as an operand for LEA; `None`: its displacement
    /// alone. Uses RDI and RAX, leaves the flags alone.
    pub fn offset(&mut self, i: usize) -> Option<Rm> {
        let op = self.op(i);
        let disp = op.disp as i32;
        let (base, index) = (op.base as usize, op.index as usize);
        if op.base == BLOCKIP {
            self.a.load(8, RDI, mem(PAGE));
            return Some(Rm::M(RDI, (op.disp + self.at as i64) as i32));
        }
        if index >= 16 {
            return (base < 16).then(|| Rm::M(self.reg(op.base, RDI), disp));
        }
        let x = self.reg(op.index, RDI);
        if base >= 16 {
            return Some(Rm::I(x, op.scale & 3, disp));
        }
        Some(Rm::X(self.reg(op.base, RAX), x, op.scale & 3, disp))
    }

    /// The host address of instruction `i`'s memory operand of `size` bytes into RDI. Uses RAX and the flags.
    pub fn operand(&mut self, i: usize, size: u64, write: bool) -> Access {
        let op = self.op(i);
        match self.offset(i) {
            Some(Rm::M(RDI, 0)) => {}
            Some(rm) => self.a.lea(8, RDI, rm),
            None => self.a.constant(RDI, op.disp as u64),
        }
        if op.asz == 4 {
            self.a.load(4, RDI, Rm::R(RDI));
        }
        if op.seg >= FS as u8 {
            let base = offset_of!(SoftCpu, segs) + op.seg as usize * size_of::<Segment>();
            self.a.alu_load(8, 0, RDI, Rm::M(RBP, at(base + offset_of!(Segment, base))));
        }
        self.translate(i, size, write)
    }

    /// The host address of linear address RDI into RDI. Uses RAX and the flags.
    pub fn translate(&mut self, i: usize, size: u64, write: bool) -> Access {
        const SHIFT: u8 = 12 - size_of::<TlbEntry>().trailing_zeros() as u8;
        let tag = if write { offset_of!(TlbEntry, wtag) } else { offset_of!(TlbEntry, rtag) };
        let a = &mut self.a;
        a.load(4, RAX, Rm::R(RDI));
        a.shift(4, 5, Rm::R(RAX), SHIFT);
        a.alu_imm(4, 4, Rm::R(RAX), ((TLB_SIZE - 1) * size_of::<TlbEntry>()) as i32);
        a.alu_load(8, 0, RAX, mem(TLB));
        a.alu_load(8, 6, RDI, Rm::M(RAX, tag as i32));
        a.alu_imm(8, 7, Rm::R(RDI), 4096 - size as i32);
        let slow = a.jcc(cc::A);
        a.alu_load(8, 0, RDI, Rm::M(RAX, offset_of!(TlbEntry, host) as i32));
        let flags = self.fl;
        self.fl.host = 0;
        Access { slow: vec![slow], i, flags }
    }

    /// The instruction with this access is complete: slow ones come back here.
    pub fn join(&mut self, access: Access) {
        let join = Fix::at(self.a.at());
        for from in access.slow {
            self.cold.push(Cold::Step { from, i: access.i, flags: access.flags, join, loaded: self.loaded });
        }
    }

    /// The vector registers are in the host's from instruction `i` on. Clobbers the flags.
    pub fn load_vectors(&mut self, i: usize, level: u8) {
        if self.loaded >= level {
            return;
        }
        self.a.alu_imm(1, 7, mem(XMM_LIVE), level as i32);
        let from = self.a.jcc(cc::B);
        let back = Fix::at(self.a.at());
        self.cold.push(Cold::Load { from, i, flags: self.fl, back, level });
        self.fl.host = 0;
        self.loaded = level;
    }
    pub fn loaded(&self) -> u8 {
        self.loaded
    }

    // ---- ways out

    /// On at an offset from the page's start.
    pub fn edge(&mut self, target: i64) {
        if !(0..4096).contains(&target) {
            self.keep();
            self.a.load(8, RAX, mem(PAGE));
            self.a.lea(8, RAX, Rm::M(RAX, target as i32));
            self.a.jmp_abs(self.stubs.lookup);
            return;
        }
        let key = self.block.key & !0xFFF | target as u64;
        let (mut count, mut code, mut need) = (0, 0, true);
        if key == self.block.key {
            (count, code, need) = (self.block.count, self.a.base, self.need[0]);
        } else if let Some(b) = self.cache.blocks.get(&key) {
            need = needs(&classes(b, self.alone))[0];
            if !b.code.get().is_null() {
                (count, code) = (b.count, b.code.get() as u64);
            }
        }
        if need || self.fl.recipe.is_none() {
            self.keep();
        }
        let n = (self.first_edge + self.edges.len()) as u32;
        self.a.word(8, 0, 0x81, 5, mem(LEFT)); // sub
        self.a.d32(count as i32);
        let count_at = self.a.base + self.a.at() as u64 - 4;
        let budget = self.a.jcc(cc::B);
        let link = if code != 0 {
            self.a.jmp_abs(code);
            None
        } else {
            Some(self.a.jmp())
        };
        let jump_at = self.a.base + self.a.at() as u64 - 4;
        self.edges.push(Edge { count_at, jump_at, count });
        self.cold.push(Cold::Edge { n, link, budget, flags: self.fl, target: target as i32 });
    }

    /// On at the guest address in RAX; the flags are kept.
    pub fn indirect(&mut self) {
        self.a.jmp_abs(self.stubs.lookup);
    }

    /// The target in RAX is canonical, or else the handler deals with instruction `i`. Uses RDI.
    pub fn check_target(&mut self, access: &mut Access) {
        self.a.load(8, RDI, Rm::R(RAX));
        self.a.shift(8, 7, Rm::R(RDI), 47);
        self.a.alu_imm(8, 0, Rm::R(RDI), 1);
        self.a.alu_imm(8, 7, Rm::R(RDI), 1);
        access.slow.push(self.a.jcc(cc::A));
    }

    fn out_of_line(&mut self) {
        for c in std::mem::take(&mut self.cold) {
            match c {
                Cold::Step { from, i, flags, join, loaded } => {
                    self.a.here(from);
                    self.fl = Flags { host: 0, ..flags };
                    if self.need[i] {
                        self.keep();
                    }
                    self.call_step(i, loaded);
                    let back = self.a.jmp();
                    self.a.to(back, join.end());
                }
                Cold::Load { from, i, flags, back, level } => {
                    self.a.here(from);
                    self.fl = Flags { host: 0, ..flags };
                    self.keep();
                    self.a.call_abs(self.stubs.load[level as usize]);
                    let ok = self.a.jcc(cc::E);
                    self.a.to(ok, back.end());
                    let op = self.op(i);
                    self.a.word(8, 0, 0x81, 0, mem(LEFT)); // add
                    self.a.d32((self.block.count as usize - i) as i32);
                    self.a.load(8, RDI, mem(PAGE));
                    self.a.lea(8, RDI, Rm::M(RDI, self.at as i32 + op.off as i32));
                    self.a.store(8, mem(RIP_OUT), RDI);
                    self.a.constant(RAX, INTERPRET as u64);
                    self.a.jmp_abs(self.stubs.exit);
                }
                Cold::Edge { n, link, budget, flags, target } => {
                    let to_common = link.map(|link| {
                        self.a.here(link);
                        if !flags.kept {
                            self.fl = Flags { host: 0, ..flags };
                            self.keep();
                        }
                        self.a.constant(RAX, (EDGE + 2 * n) as u64);
                        self.a.jmp()
                    });
                    self.a.here(budget);
                    if !flags.kept {
                        self.fl = Flags { host: 0, ..flags };
                        self.keep();
                    }
                    self.a.constant(RAX, (EDGE + 2 * n + 1) as u64);
                    if let Some(f) = to_common {
                        self.a.here(f);
                    }
                    self.a.load(8, RDI, mem(PAGE));
                    self.a.lea(8, RDI, Rm::M(RDI, target));
                    self.a.store(8, mem(RIP_OUT), RDI);
                    self.a.jmp_abs(self.stubs.exit);
                }
            }
        }
    }

    /// A guest register into a host register of ours, or where it already is.
    pub fn reg(&mut self, g: u8, scratch: u8) -> u8 {
        match HOST[g as usize] {
            NONE => {
                self.a.load(8, scratch, place(g));
                scratch
            }
            h => h,
        }
    }
}

/// A memory access whose slow cases are still open.
pub struct Access {
    pub slow: Vec<Fix>,
    pub i: usize,
    pub flags: Flags,
}
