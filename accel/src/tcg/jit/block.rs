//! Compiles one block: the order of things, memory operands, ways out.

use arrayvec::ArrayVec;

use super::super::cache::Cache;
use super::super::decode::MODE64;
use super::super::op::FS;
use super::super::tlb::{Way, TLB_SIZE, WRITES};
use super::super::SoftCpu;
use super::asm::*;
use super::cold::Cold;
use super::flags::Flags;
use super::groups::{Plan, Role};
use super::kind::{classify, leaves_flags, Kind, ALL};
use super::registers::Placing;
use super::stubs::{mem, Stubs, HOST, NONE};
use super::trace::Trace;
use super::ways::Edge;
use super::*;
use crate::state::Segment;

/// What is known while a block is compiled.
pub struct Compiler<'a> {
    pub a: Asm,
    /// Where code out of line goes.
    pub far: u64,
    pub trace: Trace<'a>,
    /// Whether somebody may look at the flags as they are before instruction i (and at the end).
    pub need: Vec<bool>,
    pub fl: Flags,
    /// Where guest registers are in the code in hand; [`HOST`] outside of it.
    pub host: [u8; 16],
    pub placing: Placing,
    /// Offset of what a loop of this trace leads back to.
    pub inner: usize,
    /// The vector registers are in the host's: 1 XMM, 2 YMM.
    loaded: u8,
    /// Where the memory operand in hand is, once its address is known.
    pub place: Rm,
    plan: Plan,
    /// Accesses compiled so far.
    asked: usize,
    /// One was not as planned.
    unplanned: bool,
    pub alone: bool,
    pub cache: &'a Cache,
    pub stubs: Stubs,
    /// The first site of the trace, and how many there are.
    pub first_site: u64,
    pub sites: usize,
    /// The half of linear addresses that the trace is in, as a rule.
    pub half: usize,
    pub cold: Vec<Cold>,
    pub edges: Vec<Edge>,
    pub first_edge: usize,
    pub leaders: Vec<Leader>,
    pub first_leader: usize,
    /// Its number among the traces with groups, should it have any.
    grouped: u32,
    /// Where the trace's start is: here, but for a trace without groups.
    pub home: u64,
    /// Instructions that are entered from the other code of the trace, and where.
    pub entries: Vec<(usize, u64)>,
}

/// Whether `block` may need the flags as they are before it.
pub fn needs_flags(block: &Block, alone: bool) -> bool {
    for op in block.ops().iter() {
        let kind = classify(op, block, alone);
        let e = kind.effects();
        if e.exits || e.reads != 0 || matches!(kind, Kind::Vector { .. }) {
            return true;
        }
        if e.writes == ALL {
            return false;
        }
    }
    true
}

/// See [`Compiler::need`].
fn needs(kinds: &[Kind], calm: &[bool], need: &mut Vec<bool>) {
    need.clear();
    // The first vector instruction may leave to the interpreter.
    let mut loaded = 0;
    for k in kinds {
        let level = match k {
            Kind::Vector { native, .. } => 1 + native.vex.is_some() as u8,
            _ => 0,
        };
        need.push(level > loaded);
        loaded = if *k == Kind::Handler { 0 } else { loaded.max(level) };
    }
    need.push(true);
    for (i, k) in kinds.iter().enumerate().rev() {
        let e = k.effects();
        let exits = e.exits && !calm.get(i).copied().unwrap_or_default();
        need[i] |= exits || e.reads != 0 || need[i + 1] && e.writes != ALL;
    }
}

/// What compiling fills again and again.
#[derive(Default)]
pub struct Room {
    code: Vec<u8>,
    need: Vec<bool>,
    plan: Plan,
    cold: Vec<Cold>,
    edges: Vec<Edge>,
    leaders: Vec<Leader>,
    entries: Vec<(usize, u64)>,
}

impl Room {
    fn clear(&mut self) {
        self.plan.clear();
        self.cold.clear();
        self.edges.clear();
        self.leaders.clear();
        self.entries.clear();
    }
}

impl SoftCpu {
    /// Compile `block`, with what mostly follows it; false when it cannot be.
    pub(super) fn compile(&mut self, block: &Block) -> bool {
        if block.key >> 60 != MODE64 as u64 && !block.is_flat32() {
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
            self.forget_entries();
        }
        for _ in 0..2 {
            let Some(base) = self.jit.memory.as_ref().map(CodeMemory::next) else { return false };
            let trace = Trace::new(block, &self.cache, self.cpus == 1);
            let room = std::mem::take(&mut self.jit.room);
            let mut c = Compiler::new(trace, base, self, room);
            c.plan.make(&c.trace);
            c.body();
            if !c.as_planned() {
                c.again();
            }
            c.out_of_line();
            let keys = c.plan.grouped.then(|| c.trace.keys());
            let made = c.finish();
            let (home, count) = (made.home, made.count);
            let first = self.jit.leaders.len();
            let leaders = first..first + made.room.leaders.len();
            if self.jit.take(made) {
                if let Some(keys) = keys {
                    self.jit.grouped.push(Grouped { keys, leaders, code: home, failures: 0 });
                }
                block.code.set(home as *const u8);
                block.code_count.set(count);
                block.half.set((self.rip >> 63) as u8);
                return true;
            }
            self.drop_compiled();
        }
        false
    }

    /// Compile a trace with groups once more without them, for the times when a group fails.
    pub(super) fn compile_plainly(&mut self, number: u32) {
        let Jit { memory: Some(memory), grouped, leaders, .. } = &self.jit else { return };
        let grouped = &grouped[number as usize];
        let mine = grouped.leaders.clone();
        let entries: Vec<_> = leaders[mine.clone()].iter().map(|l| (l.i, 0)).collect();
        let Some(trace) = Trace::of(&grouped.keys, &self.cache, self.cpus == 1) else { return };
        let (base, home) = (memory.next(), grouped.code);
        let room = std::mem::take(&mut self.jit.room);
        let mut c = Compiler::new(trace, base, self, room);
        (c.home, c.entries) = (home, entries);
        c.body();
        c.out_of_line();
        let made = c.finish();
        let entries = made.room.entries.clone();
        if !self.jit.take(made) {
            self.drop_compiled();
            return;
        }
        let Jit { memory: Some(memory), leaders, .. } = &mut self.jit else { return };
        for l in &leaders[mine] {
            if let Some((_, at)) = entries.iter().find(|e| e.0 == l.i) {
                memory.aim(l.jump_at, *at);
            }
        }
    }
}

/// What was compiled.
pub struct Made {
    room: Room,
    /// Where code out of line starts.
    apart: usize,
    sites: usize,
    home: u64,
    count: u32,
}

impl Jit {
    /// Add what was compiled; false when there is no room for it.
    fn take(&mut self, made: Made) -> bool {
        self.room = made.room;
        let Some(memory) = &mut self.memory else { return false };
        let (near, far) = self.room.code.split_at(made.apart);
        if !memory.take_sites(made.sites) || !memory.push(near, far) {
            return false;
        }
        self.edges.append(&mut self.room.edges);
        self.leaders.append(&mut self.room.leaders);
        true
    }
}

impl<'a> Compiler<'a> {
    fn new(trace: Trace<'a>, (base, far): (u64, u64), cpu: &'a SoftCpu, mut room: Room) -> Compiler<'a> {
        let (cache, jit, alone, half) = (&cpu.cache, &cpu.jit, cpu.cpus == 1, (cpu.rip >> 63) as usize);
        room.clear();
        Compiler {
            a: Asm::new(base, room.code),
            far,
            need: room.need,
            placing: Placing::of(&trace),
            trace,
            fl: Flags::KEPT,
            host: HOST,
            inner: 0,
            loaded: 0,
            place: Rm::M(RDI, 0),
            plan: room.plan,
            asked: 0,
            unplanned: false,
            alone,
            cache,
            stubs: jit.stubs,
            first_site: jit.memory.as_ref().map_or(0, |m| m.site(m.sites())),
            sites: 0,
            half,
            cold: room.cold,
            edges: room.edges,
            first_edge: jit.edges.len(),
            leaders: room.leaders,
            first_leader: jit.leaders.len(),
            grouped: jit.grouped.len() as u32,
            home: base,
            entries: room.entries,
        }
    }

    fn finish(self) -> Made {
        let apart = self.a.parts().0.len();
        let Compiler { a, need, plan, cold, edges, leaders, entries, .. } = self;
        let room = Room { code: a.buf, need, plan, cold, edges, leaders, entries };
        Made { room, apart, sites: self.sites, home: self.home, count: self.trace.count }
    }

    fn as_planned(&self) -> bool {
        !self.unplanned && self.asked == self.plan.roles.len()
    }

    /// Start anew without groups: accesses were not as planned, which would be a mistake in [`Plan`].
    #[cold]
    fn again(&mut self) {
        assert!(!cfg!(test) || self.as_planned(), "accesses are not as planned: {:?}", self.trace.kinds);
        self.a.clear();
        self.plan.clear();
        (self.fl, self.host, self.place, self.loaded) = (Flags::KEPT, HOST, Rm::M(RDI, 0), 0);
        self.asked = 0;
        self.cold.clear();
        self.edges.clear();
        self.leaders.clear();
        self.sites = 0;
        self.body();
    }

    fn body(&mut self) {
        needs(&self.trace.kinds, &self.plan.calm, &mut self.need);
        if self.entries.is_empty() {
            self.a.alu_imm(8, 5, mem(LEFT), self.trace.count as i32);
            let from = self.a.jcc(cc::S);
            debug_assert_eq!(self.a.at(), FAR as usize);
            self.home = self.a.here_is();
            self.cold.push(Cold::Short { from });
            self.take_over();
            self.inner = self.a.at();
        } else {
            self.host = self.placing.host;
        }
        let n = self.trace.len();
        for i in 0..n {
            if let Some(e) = self.entries.iter().position(|e| e.0 == i) {
                self.keep();
                (self.fl, self.loaded) = (Flags::KEPT, 0);
                self.entries[e].1 = self.a.here_is();
            }
            self.instruction(i);
        }
        if !self.trace.kinds[n - 1].branches() {
            self.edge(n - 1, self.trace.next(n - 1));
        }
    }

    pub fn op(&self, i: usize) -> &'a Op {
        self.trace.op(i)
    }

    /// Instruction `i`, which ends its part, goes to `target`: on in the trace, or out of it.
    pub fn go(&mut self, i: usize, target: i64) {
        if self.trace.onward(i).is_none_or(|at| at as i64 != target) {
            self.edge(i, target);
        }
    }

    /// To `taken` if `cc` holds, or else to `next`.
    pub fn choose(&mut self, i: usize, cc: u8, taken: i64, next: i64) {
        let on = self.trace.onward(i).map(|at| at as i64);
        // At the trace's end the way back is the more likely one.
        let taken_first = on.map_or(taken < next, |on| on == taken);
        let (cc, out, stay) = if taken_first { (cc ^ 1, next, taken) } else { (cc, taken, next) };
        let from = self.a.jcc(cc);
        self.cold.push(Cold::Side { from, i, flags: self.fl, target: out });
        self.go(i, stay);
    }

    // ---- handlers

    pub fn call_step(&mut self, i: usize, loaded: u8) {
        let neutral = match self.trace.kinds[i] {
            Kind::Handler => leaves_flags(self.op(i)),
            k => k.effects().reads | k.effects().writes == 0,
        };
        let neutral = if neutral { NEUTRAL } else { 0 };
        let grouped = if self.plan.grouped { GROUPED } else { 0 };
        // What follows in the code of these jumps, wherever they lead.
        let jumps = if self.trace.kinds[i].leads_anywhere() { JUMPS } else { 0 };
        let place = self.place_of(i) | neutral | jumps | grouped;
        let op = self.op(i) as *const Op as u64;
        self.give_back();
        self.a.constant(RAX, op);
        self.a.constant(RDI, place as u64);
        self.a.call_abs(self.stubs.step[loaded as usize]);
        self.take_over();
    }

    /// See [`step`].
    fn place_of(&self, i: usize) -> u32 {
        let part = self.trace.part(i);
        part.at as u32 | (self.trace.count - part.before) << 16
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
            return Some(Rm::M(RDI, (op.disp + self.trace.part(i).at as i64) as i32));
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

    /// Whether instruction `i` cannot fail and leaves the host's flags alone on its way to memory.
    pub fn calm(&self, i: usize) -> bool {
        self.plan.calm.get(i).copied().unwrap_or_default()
    }

    /// Of the next access, which is one of instruction `i`.
    fn role(&mut self, i: usize, size: u64, write: bool) -> Role {
        let n = self.asked;
        self.asked += 1;
        self.unplanned |= self.plan.requests.get(n).is_some_and(|r| !r.is(i, size, write));
        self.plan.roles.get(n).copied().unwrap_or(Role::Alone)
    }

    /// Make [`Compiler::place`] the host address of instruction `i`'s memory operand of `size` bytes. Uses RDI,
    /// RAX and the flags.
    pub fn operand(&mut self, i: usize, size: u64, write: bool) -> Access {
        let op = self.op(i);
        let mut role = Role::Alone;
        if op.asz == self.trace.word {
            role = self.role(i, size, write);
        }
        if let Role::Member { slot, at } = role {
            return self.member(i, slot, at);
        }
        self.linear(i, role.lead());
        self.translate(i, role, size, write)
    }

    /// The same for an operand whose host address is looked at itself.
    pub fn operand_alone(&mut self, i: usize, size: u64, write: bool) -> Access {
        self.linear(i, 0);
        self.translate(i, Role::Alone, size, write)
    }

    /// The same for the word of `size` bytes that has bit number `n` (a register) of the operand, which may lie before or
    /// after it.
    pub fn operand_beyond(&mut self, i: usize, size: u8, n: u8, write: bool) -> Access {
        self.linear(i, 0);
        let (shift, times) = if size == 8 { (6, 3) } else { (5, 2) };
        if size == 8 {
            self.a.load(8, RAX, self.at(n));
        } else {
            self.a.word(8, 0, 0x63, RAX, self.at(n)); // movsxd
        }
        self.a.shift(8, 7, Rm::R(RAX), shift);
        self.a.lea(8, RDI, Rm::X(RDI, RAX, times, 0));
        self.translate(i, Role::Alone, size as u64, write)
    }

    /// The same for a word of memory `disp` above the guest register that lives in the host's `h`.
    pub fn stack_slot(&mut self, i: usize, h: u8, disp: i32, write: bool) -> Access {
        self.slot_at(i, h, disp, self.trace.word, write)
    }

    /// The same for `size` bytes of memory.
    pub fn slot_at(&mut self, i: usize, h: u8, disp: i32, size: u8, write: bool) -> Access {
        let word = self.trace.word;
        let role = self.role(i, size as u64, write);
        match role {
            Role::Member { slot, at } => return self.member(i, slot, at),
            _ => match disp - role.lead() {
                0 => self.a.load(word, RDI, Rm::R(h)),
                disp => self.a.lea(word, RDI, Rm::M(h, disp)),
            },
        }
        self.translate(i, role, size as u64, write)
    }

    fn member(&mut self, i: usize, slot: usize, at: i32) -> Access {
        if self.a.holds != Some(slot) {
            self.a.load(8, RDI, mem(slot));
            self.a.holds = Some(slot);
        }
        self.place = Rm::M(RDI, at);
        Access { slow: Slow::new(), i, flags: self.fl }
    }

    /// The linear address `lead` bytes below instruction `i`'s memory operand into RDI. Uses RAX and the flags.
    fn linear(&mut self, i: usize, lead: i32) {
        let op = self.op(i);
        match self.offset(i).map(|rm| (rm, rm.below(lead))) {
            Some((_, Some(Rm::M(RDI, 0)))) => {}
            Some((_, Some(Rm::M(r, 0)))) => self.a.load(8, RDI, Rm::R(r)),
            Some((_, Some(rm))) => self.a.lea(8, RDI, rm),
            Some((rm, None)) => {
                self.a.lea(8, RDI, rm);
                self.a.lea(8, RDI, Rm::M(RDI, -lead));
            }
            None => self.a.constant(RDI, (op.disp - lead as i64) as u64),
        }
        if op.asz == 4 {
            self.a.load(4, RDI, Rm::R(RDI));
        }
        if op.seg >= FS as u8 {
            let base = offset_of!(SoftCpu, segs) + op.seg as usize * size_of::<Segment>();
            self.a.alu_load(8, 0, RDI, Rm::M(RBP, at(base + offset_of!(Segment, base))));
        }
    }

    /// The host address of linear address RDI into RDI: that of the group's start, for its leader. Uses RAX and the flags.
    fn translate(&mut self, i: usize, role: Role, size: u64, write: bool) -> Access {
        const SHIFT: u8 = 12 - size_of::<Way>().trailing_zeros() as u8;
        let (lead, len, plainly) = match role {
            Role::Leader { lead, len, write, .. } => (lead, len, write),
            _ => (0, size as u32, write),
        };
        let way = if plainly { WRITES as i32 } else { 0 };
        let (tag, host) = (way + offset_of!(Way, tag) as i32, way + offset_of!(Way, host) as i32);
        let a = &mut self.a;
        let again = Fix::at(a.at());
        if is_x86_feature_detected!("bmi2") {
            a.vex(3, false, false, 3, 0xF0, 0, RAX, Rm::R(RDI)); // rorx
            a.b(&[SHIFT]);
        } else {
            a.load(4, RAX, Rm::R(RDI));
            a.shift(4, 5, Rm::R(RAX), SHIFT);
        }
        a.alu_imm(4, 4, Rm::R(RAX), ((TLB_SIZE - 1) * size_of::<Way>()) as i32);
        a.alu_load(8, 0, RAX, mem(TLB));
        a.alu_load(8, 6, RDI, Rm::M(RAX, tag));
        a.alu_imm(8, 7, Rm::R(RDI), 4096 - len as i32);
        let from = a.jcc(cc::A);
        a.alu_load(8, 0, RDI, Rm::M(RAX, host));
        let flags = self.fl;
        self.fl.host = 0;
        self.place = Rm::M(RDI, lead);
        let Role::Leader { slot, .. } = role else {
            return Access { slow: Slow::from_iter([from]), i, flags };
        };
        a.store(8, mem(slot), RDI);
        a.holds = Some(slot);
        let n = self.leaders.len();
        let (op, place) = (self.op(i) as *const Op, self.place_of(i));
        self.leaders.push(Leader { grouped: self.grouped, i, op, place, len, write, plainly, jump_at: 0 });
        self.cold.push(Cold::Touch { from, again, n, flags, tag });
        Access { slow: Slow::new(), i, flags }
    }

    /// The instruction with this access is complete: slow ones come back here.
    pub fn join(&mut self, access: Access) {
        let join = Fix::at(self.a.at());
        if !access.slow.is_empty() {
            self.a.holds = None;
        }
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

    /// A guest register into a host register of ours, or where it already is.
    pub fn reg(&mut self, g: u8, scratch: u8) -> u8 {
        match self.host[g as usize] {
            NONE => {
                self.a.load(8, scratch, self.at(g));
                scratch
            }
            h => h,
        }
    }
}

/// The slow cases of an instruction.
pub type Slow = ArrayVec<Fix, 8>;

/// A memory access whose slow cases are still open.
pub struct Access {
    pub slow: Slow,
    pub i: usize,
    pub flags: Flags,
}
