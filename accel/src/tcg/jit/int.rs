//! The host code of each kind of integer instruction.

use super::super::flags::DF;
use super::super::op::{
    FLAGS, PAGE, RBP as GUEST_BP, RDI as GUEST_DI, RIP_OUT, RSI as GUEST_SI, RSP as GUEST_SP,
};
use super::super::SoftCpu;
use super::asm::*;
use super::at;
use super::block::{Access, Compiler, Slow};
use super::flags::{keep_host, Flags, Overflow, Recipe};
use super::kind::*;
use super::stubs::{mem, HOST, NONE};
use std::mem::offset_of;

/// Where a few guest registers live.
pub const AX: u8 = HOST[super::super::op::RAX];
pub const SP: u8 = HOST[GUEST_SP];
const BP: u8 = HOST[GUEST_BP];

impl Compiler<'_> {
    /// Emit instruction `i`.
    pub fn instruction(&mut self, i: usize) {
        let kind = self.trace.kinds[i];
        match kind {
            Kind::Handler => self.handler(i),
            Kind::Nop => {}
            Kind::Vector { native, mem, .. } => self.vector(i, native, mem),
            Kind::Mov { .. } | Kind::MovImm { .. } | Kind::Lea { .. } | Kind::Xchg { .. } => {
                self.before(i, false);
                self.move_registers(i);
                self.after(i, false);
            }
            Kind::Cbw(_) | Kind::Cwd(_) => {
                self.before(i, false);
                self.widen(kind);
                self.after(i, false);
            }
            Kind::FromSegment { seg, d } => {
                self.before(i, false);
                self.selector(seg, d);
                self.after(i, false);
            }
            Kind::Extend { s: Some(s), .. } => {
                self.before(i, false);
                self.extend(kind, self.at(s));
                self.after(i, false);
            }
            Kind::Extend { from, s: None, .. } => {
                self.before(i, true);
                let access = self.operand(i, from as u64, false);
                self.extend(kind, self.place);
                self.join(access);
                self.after(i, true);
            }
            Kind::Load { size, d } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, false);
                match self.host[d as usize] {
                    NONE => {
                        self.a.load(size, RAX, self.place);
                        self.put(size, d);
                    }
                    h => self.a.load(size, h, self.place),
                }
                self.join(access);
                self.after(i, true);
            }
            Kind::Store { size, s } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, true);
                match s {
                    Val::Imm(v) => self.a.store_imm(size, self.place, v),
                    Val::Reg(r) => {
                        let r = self.reg(r, RAX);
                        self.a.store(size, self.place, r);
                    }
                }
                self.join(access);
                self.after(i, true);
            }
            Kind::XchgMem { size, r } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, true);
                let h = self.reg(r, RAX);
                if h == RAX {
                    self.a.sized(size, 0, 0x86, RAX, self.place);
                    self.put(size, r);
                } else {
                    self.a.load(size, RAX, self.place);
                    self.a.store(size, self.place, h);
                    self.a.load(size, h, Rm::R(RAX));
                }
                self.join(access);
                self.after(i, true);
            }
            Kind::Alu { .. } | Kind::AluLoad { .. } | Kind::AluStore { .. } => self.arithmetic(i),
            Kind::Test { size, a, b } => {
                self.compare(8, size, a, b);
                self.fl = Flags::LOGIC.with(Some(Recipe::Test { size, a, b }));
            }
            Kind::TestMem { size, b } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, false);
                match b {
                    Val::Imm(v) => self.a.test_imm(size, self.place, v),
                    Val::Reg(r) => {
                        let r = self.reg(r, RAX);
                        self.a.test(size, self.place, r);
                    }
                }
                self.join(access);
                self.fl = Flags::LOGIC;
            }
            Kind::Inc { dec, size, d } => {
                let needed = self.need[i + 1];
                self.change(i, size, d, |c, rm| {
                    if needed {
                        debug_assert!(c.fl.host & CF != 0);
                    }
                    c.a.sized(size, 0, 0xFE, dec as u8, rm);
                    c.fl = Flags::HOST;
                });
            }
            Kind::Not { size, d } => self.change(i, size, d, |c, rm| c.a.sized(size, 0, 0xF6, 2, rm)),
            Kind::Neg { size, d } => self.change(i, size, d, |c, rm| {
                c.a.sized(size, 0, 0xF6, 3, rm);
                c.fl = Flags::HOST;
            }),
            Kind::Bit { .. } => self.bit(i),
            Kind::BitBeyond { .. } => self.bit_beyond(i),
            Kind::Cmpxchg { size, r } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, true);
                self.a.load(8, RAX, Rm::R(AX));
                self.a.sized(size, 1, 0xB0, self.host[r as usize], self.place);
                // The accumulator changes only when they differed.
                self.a.word(8, 1, 0x40 | cc::NE, AX, Rm::R(RAX));
                self.join(access);
                self.fl = Flags::HOST;
            }
            Kind::Xadd { size, r } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, true);
                let h = self.host[r as usize];
                self.a.load(size, RAX, self.place);
                self.a.alu(size, 0, self.place, h);
                self.a.load(size, h, Rm::R(RAX));
                self.join(access);
                self.fl = Flags::HOST;
            }
            Kind::Bswap { size, d } => {
                self.before(i, false);
                self.modify(d, |c, r| {
                    let rex = ((size == 8) as u8) << 3 | r >> 3;
                    if rex != 0 {
                        c.a.b(&[0x40 | rex]);
                    }
                    c.a.b(&[0x0F, 0xC8 | r & 7]);
                });
                self.after(i, false);
            }
            Kind::Div { .. } => self.divide(i),
            Kind::Scan { reverse, size, d, s } => {
                let access = self.source(i, s, size);
                self.a.word(size, 1, 0xBC | reverse as u8, RDI, self.from(s));
                // Of zero: the destination stays.
                self.modify(d, |c, r| c.a.word(8, 1, 0x40 | cc::NE, r, Rm::R(RDI)));
                if self.need[i + 1] {
                    self.a.setcc(cc::E, Rm::R(RAX));
                    self.a.b(&[0xF6, 0xD8]); // neg al
                    self.a.alu_imm(4, 4, Rm::R(RAX), 0x44); // ZF and PF
                    self.a.shift(4, 4, Rm::R(RAX), 8);
                    self.a.store(2, mem(FLAGS), RAX);
                }
                self.close(access);
                self.fl = Flags::KEPT;
            }
            Kind::Count { reverse, size, d, s } => {
                let access = self.source(i, s, size);
                let from = self.from(s);
                self.modify(d, |c, r| c.a.enc(0xF3, size == 8, 1, 0xBC | reverse as u8, r, from, false));
                if self.need[i + 1] {
                    // CF and ZF; the others are clear.
                    self.a.b(&[0x9F]); // lahf
                    self.a.b(&[0x80, 0xE4, 0x41]); // and ah, CF | ZF
                    self.a.b(&[0xB0, 0]); // mov al, 0
                    self.a.store(2, mem(FLAGS), RAX);
                }
                self.close(access);
                self.fl = Flags::KEPT;
            }
            Kind::Popcnt { size, d, s } => {
                let access = self.source(i, s, size);
                let from = self.from(s);
                self.modify(d, |c, r| {
                    let prefix = 0xF3;
                    if size == 2 {
                        c.a.b(&[0x66]);
                    }
                    c.a.enc(prefix, size == 8, 1, 0xB8, r, from, false);
                });
                self.close(access);
                self.fl = Flags::HOST;
            }
            Kind::SetccMem { cc } => {
                self.before(i, true);
                let access = self.operand(i, 1, true);
                self.want(condition(cc));
                self.a.setcc(cc, self.place);
                self.join(access);
                self.after(i, false);
            }
            Kind::ExtendHigh { signed, size, d, s } => {
                self.before(i, false);
                self.a.load(8, RAX, self.at(s));
                // From AH, which no REX prefix may go with.
                self.a.b(&[0x0F, 0xB6 | (signed as u8) << 3, 0xC4]);
                if signed && size == 8 {
                    self.a.word(8, 0, 0x63, RAX, Rm::R(RAX));
                }
                match self.host[d as usize] {
                    NONE => self.put(size, d),
                    h => self.a.load(size, h, Rm::R(RAX)),
                }
                self.after(i, false);
            }
            Kind::AluHigh { op, d, imm } => {
                if op == 2 || op == 3 {
                    self.want(CF);
                }
                self.a.load(8, RAX, self.at(d));
                if op == 8 {
                    self.a.b(&[0xF6, 0xC4, imm as u8]); // test ah, imm
                } else {
                    self.a.b(&[0x80, 0xC4 | op << 3, imm as u8]); // op ah, imm
                }
                if op < 7 {
                    self.a.store(8, self.at(d), RAX);
                }
                self.fl = if matches!(op, 1 | 4 | 6 | 8) { Flags::LOGIC } else { Flags::HOST };
            }
            Kind::Shift { op, size, d, count } => self.shift(i, op, size, d, count),
            Kind::ShiftMem { op, size, count } => {
                self.before(i, true);
                let access = self.operand(i, size as u64, true);
                self.a.shift(size, op, self.place, count);
                self.join(access);
                self.fl = shifted(op, count);
            }
            Kind::ShiftCl { op, size, d } => self.shift_cl(i, op, size, d),
            Kind::Imul { .. } | Kind::Mul { .. } => self.multiply(i),
            Kind::Push(_) | Kind::PushMem | Kind::Pop(_) | Kind::Leave => self.stack(i),
            Kind::Pushf => self.push_flags(i),
            Kind::Cli
            | Kind::Sti
            | Kind::Swapgs
            | Kind::Direction { .. }
            | Kind::FromControl { .. }
            | Kind::Rdtsc { .. } => self.system(i),
            Kind::Syscall => self.syscall(i),
            Kind::Sysret => self.sysret(i),
            Kind::Movs(size) | Kind::Stos(size) | Kind::Lods(size) => self.string(i, size),
            Kind::Setcc { cc, d } => {
                self.before(i, false);
                self.want(condition(cc));
                self.modify(d, |c, r| c.a.setcc(cc, Rm::R(r)));
                self.after(i, false);
            }
            Kind::Cmov { cc, size, d, s } => {
                self.before(i, s.is_none());
                let access = s.is_none().then(|| self.operand(i, size as u64, false));
                self.want(condition(cc));
                let from = self.from(s);
                self.modify(d, |c, r| c.a.word(size, 1, 0x40 | cc, r, from));
                if let Some(access) = access {
                    self.join(access);
                }
                self.after(i, false);
                // A slow access comes back with all of them; what is not known stays unknown.
            }
            _ => self.branch(i),
        }
    }

    /// Let `f` change guest register `d` in a host register. `f` must not use RAX otherwise.
    pub fn modify(&mut self, d: u8, f: impl FnOnce(&mut Self, u8)) {
        match self.host[d as usize] {
            NONE => {
                self.a.load(8, RAX, self.at(d));
                f(self, RAX);
                self.a.store(8, self.at(d), RAX);
            }
            h => f(self, h),
        }
    }

    /// The low `size` bytes of RAX into guest register `d`, which lives in its slot. Always writes all of it: a read
    /// that is wider than the write before it has to wait for that. Uses RDI.
    pub fn put(&mut self, size: u8, d: u8) {
        if size < 4 {
            self.a.load(8, RDI, self.at(d));
            self.a.load(size, RDI, Rm::R(RAX));
            self.a.store(8, self.at(d), RDI);
        } else {
            self.a.store(8, self.at(d), RAX);
        }
    }

    /// The host's CF into the kept flags. Uses RAX and RDI.
    fn keep_carry(&mut self) {
        self.a.setcc(cc::B, Rm::R(RAX));
        self.a.word(4, 1, 0xB7, RDI, mem(FLAGS)); // movzx
        self.a.word(4, 1, 0xB6, RAX, Rm::R(RAX)); // movzx
        self.a.shift(4, 4, Rm::R(RAX), 8);
        self.a.alu_imm(4, 4, Rm::R(RDI), !0x100);
        self.a.alu(4, 1, Rm::R(RDI), RAX);
        self.a.store(2, mem(FLAGS), RDI);
    }

    /// The host's condition `cc` into the kept OF. Uses RAX.
    fn keep_overflow(&mut self, cc: u8) {
        self.a.setcc(cc, Rm::R(RDI));
        self.a.word(4, 1, 0xB7, RAX, mem(FLAGS)); // movzx
        self.a.load(1, RAX, Rm::R(RDI));
        self.a.store(2, mem(FLAGS), RAX);
    }

    /// INC, DEC, NOT, NEG of a register or memory.
    fn change(&mut self, i: usize, size: u8, d: Option<u8>, f: impl FnOnce(&mut Self, Rm)) {
        self.before(i, d.is_none());
        let access = d.is_none().then(|| self.operand(i, size as u64, true));
        if matches!(self.trace.kinds[i], Kind::Inc { .. }) && self.need[i + 1] {
            self.want(CF);
        }
        match d {
            Some(d) => self.modify(d, |c, r| f(c, Rm::R(r))),
            None => f(self, self.place),
        }
        if let Some(access) = access {
            self.join(access);
        }
        self.after(i, false);
    }

    fn move_registers(&mut self, i: usize) {
        match self.trace.kinds[i] {
            Kind::Mov { size, d, s } => {
                let s = self.reg(s, RAX);
                match self.host[d as usize] {
                    NONE => {
                        if s != RAX || size == 4 {
                            self.a.load(size.max(4), RAX, Rm::R(s));
                        }
                        self.put(size, d);
                    }
                    h => self.a.load(size, h, Rm::R(s)),
                }
            }
            Kind::MovImm { size, d, imm } => match self.host[d as usize] {
                _ if size < 4 => self.modify(d, |c, r| c.a.store_imm(size, Rm::R(r), imm as i32)),
                NONE if imm as i64 == imm as i32 as i64 => self.a.store_imm(8, self.at(d), imm as i32),
                NONE => {
                    self.a.constant(RAX, imm);
                    self.a.store(8, self.at(d), RAX);
                }
                h => self.a.constant(h, imm),
            },
            Kind::Lea { size, d } => {
                let rm = self.offset(i);
                let h = self.host[d as usize];
                let to = if h == NONE { RAX } else { h };
                match rm {
                    Some(rm) => self.a.lea(size, to, rm),
                    None => {
                        let disp = self.op(i).disp as i32;
                        if size < 4 {
                            self.a.sized(size, 0, 0xC6, 0, Rm::R(to));
                            self.a.imm(size, disp);
                        } else {
                            let m = u64::MAX >> (64 - 8 * size as u32);
                            self.a.constant(to, disp as i64 as u64 & m);
                        }
                    }
                }
                if h == NONE {
                    self.put(size, d);
                }
            }
            Kind::Xchg { size, a, b } => {
                self.a.sized(size, 0, 0x86, self.host[a as usize], Rm::R(self.host[b as usize]));
            }
            _ => {}
        }
    }

    fn widen(&mut self, kind: Kind) {
        match kind {
            Kind::Cbw(8) => self.a.word(8, 0, 0x63, AX, Rm::R(AX)),
            Kind::Cbw(4) => self.a.word(4, 1, 0xBF, AX, Rm::R(AX)),
            Kind::Cbw(_) => self.a.word(2, 1, 0xBE, AX, Rm::R(AX)),
            Kind::Cwd(size) => {
                self.a.load(8, RAX, Rm::R(AX));
                self.a.b(match size {
                    8 => &[0x48, 0x99],
                    4 => &[0x99],
                    _ => &[0x66, 0x99],
                });
            }
            _ => {}
        }
    }

    fn extend(&mut self, kind: Kind, from_rm: Rm) {
        let Kind::Extend { signed, from, size, d, .. } = kind else { return };
        let h = self.host[d as usize];
        let to = if h == NONE { RAX } else { h };
        if from == 4 {
            self.a.word(size, 0, 0x63, to, from_rm);
        } else {
            let opcode = 0xB6 | (signed as u8) << 3 | (from == 2) as u8;
            let low8 = from == 1 && matches!(from_rm, Rm::R(r) if r >= 4);
            let prefix = if size == 2 { 0x66 } else { 0 };
            self.a.enc(prefix, size == 8, 1, opcode, to, from_rm, low8);
        }
        if h == NONE {
            self.put(size, d);
        }
    }

    fn arithmetic(&mut self, i: usize) {
        let kind = self.trace.kinds[i];
        let (op, size, access) = match kind {
            Kind::Alu { op, size, .. } => {
                if op == 2 || op == 3 {
                    self.want(CF);
                }
                (op, size, None)
            }
            Kind::AluLoad { op, size, .. } | Kind::AluStore { op, size, .. } => {
                self.before(i, true);
                let write = matches!(kind, Kind::AluStore { .. }) && op != 7;
                let access = self.operand(i, size as u64, write);
                if op == 2 || op == 3 {
                    self.want(CF);
                }
                (op, size, Some(access))
            }
            _ => return,
        };
        let logic = matches!(op, 1 | 4 | 6);
        let mut recipe = None;
        match kind {
            Kind::Alu { op: 7, size, d, s } => {
                self.compare(7, size, d, s);
                recipe = Some(Recipe::Cmp { size, a: d, b: s });
            }
            Kind::Alu { d, s, .. } => {
                self.modify(d, |c, r| c.alu_val(op, size, Rm::R(r), s));
                recipe = match op {
                    0 if s != Val::Reg(d) => Some(Recipe::Add { size, d, s }),
                    5 if s != Val::Reg(d) => Some(Recipe::Sub { size, d, s }),
                    _ => None,
                };
            }
            Kind::AluLoad { op: 7, d, .. } => {
                let r = self.reg(d, RAX);
                self.a.alu_load(size, 7, r, self.place);
            }
            Kind::AluLoad { d, .. } => self.modify(d, |c, r| c.a.alu_load(size, op, r, c.place)),
            Kind::AluStore { s: Val::Imm(v), .. } => self.a.alu_imm(size, op, self.place, v),
            Kind::AluStore { s: Val::Reg(r), .. } => {
                let r = self.reg(r, RAX);
                self.a.alu(size, op, self.place, r);
            }
            _ => {}
        }
        if let (true, Kind::Alu { d, .. } | Kind::AluLoad { d, .. }) = (logic, kind) {
            recipe = Some(Recipe::Test { size, a: d, b: Val::Reg(d) });
        }
        if let Some(access) = access {
            self.join(access);
        }
        self.fl = if logic { Flags::LOGIC } else { Flags::HOST }.with(recipe);
    }

    fn shift(&mut self, i: usize, op: u8, size: u8, d: u8, count: u8) {
        let rotate = op < 4;
        let needed = self.need[i + 1];
        if rotate && needed {
            self.keep();
        }
        self.modify(d, |c, r| c.a.shift(size, op, Rm::R(r), count));
        if !rotate {
            self.fl = shifted(op, count);
            return;
        }
        if needed {
            // CF as it came out; OF as for a count of one applied to the result.
            self.keep_carry();
            self.a.load(8, RAX, self.at(d));
            self.a.shift(size, op ^ 1, Rm::R(RAX), 1);
            self.keep_overflow(cc::O);
        }
        self.fl = Flags::KEPT;
    }

    fn shift_cl(&mut self, i: usize, op: u8, size: u8, d: u8) {
        let needed = self.need[i + 1];
        let mut skip = None;
        if needed {
            self.keep();
            if size == 4 {
                // The upper half is cleared even when nothing is shifted.
                self.modify(d, |c, r| c.a.load(4, r, Rm::R(r)));
            }
            self.a.test_imm(1, Rm::R(RCX), if size == 8 { 63 } else { 31 });
            skip = Some(self.a.jcc_short(cc::E));
        }
        self.modify(d, |c, r| c.a.sized(size, 0, 0xD2, op, Rm::R(r)));
        if let Some(skip) = skip {
            keep_host(&mut self.a, true, if op == 4 { Overflow::Shl } else { Overflow::Clear });
            if op == 5 {
                // The top bit before the last step is the second from the top now.
                self.a.word(size, 1, 0xBA, 4, self.at(d));
                self.a.b(&[8 * size - 2]);
                self.keep_overflow(cc::B);
            }
            self.a.short_here(skip);
        }
        self.fl = Flags::KEPT;
    }

    fn bit(&mut self, i: usize) {
        let Kind::Bit { op, size, d, n } = self.trace.kinds[i] else { return };
        let needed = self.need[i + 1];
        self.before(i, d.is_none());
        if needed {
            self.keep();
        }
        let access = d.is_none().then(|| self.operand(i, size as u64, op != 0));
        let emit = |c: &mut Self, rm: Rm| match n {
            Val::Imm(n) => {
                c.a.word(size, 1, 0xBA, 4 | op, rm);
                c.a.b(&[n as u8]);
            }
            Val::Reg(r) => {
                let r = c.reg(r, RDI);
                c.a.word(size, 1, 0xA3 | op << 3, r, rm);
            }
        };
        match d {
            Some(d) if op == 0 => {
                let r = self.reg(d, RAX);
                emit(self, Rm::R(r));
            }
            Some(d) => self.modify(d, |c, r| emit(c, Rm::R(r))),
            None => emit(self, self.place),
        }
        if needed {
            self.keep_carry();
        }
        self.close(access);
        self.fl = Flags::KEPT;
    }

    /// BT, BTS, BTR, BTC of memory by a register, which reaches beyond the operand.
    fn bit_beyond(&mut self, i: usize) {
        let Kind::BitBeyond { op, size, n } = self.trace.kinds[i] else { return };
        let needed = self.need[i + 1];
        self.before(i, true);
        if needed {
            self.keep();
        }
        let access = self.operand_beyond(i, size, n, op != 0);
        match self.host[n as usize] {
            NONE => {
                self.a.load(8, RAX, self.at(n));
                self.a.alu_imm(4, 4, Rm::R(RAX), 8 * size as i32 - 1);
                self.a.word(size, 1, 0xA3 | op << 3, RAX, self.place);
            }
            h => {
                self.a.load(size, RAX, self.place);
                self.a.word(size, 1, 0xA3 | op << 3, h, Rm::R(RAX));
                if op != 0 {
                    self.a.store(size, self.place, RAX);
                }
            }
        }
        if needed {
            self.keep_carry();
        }
        self.join(access);
        self.fl = Flags::KEPT;
    }

    fn divide(&mut self, i: usize) {
        let Kind::Div { signed, size, s } = self.trace.kinds[i] else { return };
        self.before(i, true);
        let mut access = match s {
            None => {
                let access = self.operand(i, size as u64, false);
                self.a.load(size, RDI, self.place);
                access
            }
            Some(s) => {
                self.a.load(size, RDI, self.at(s));
                Access { slow: Slow::new(), i, flags: self.fl }
            }
        };
        self.fl.host = 0;
        // Whatever might fault is the handler's: a quotient that may not fit, a divisor of 0 (or -1).
        if signed {
            self.a.load(size, RAX, Rm::R(AX));
            self.a.shift(size, 7, Rm::R(RAX), 8 * size - 1);
            self.a.alu(size, 7, Rm::R(RAX), RDX);
            access.slow.push(self.a.jcc(cc::NE));
            self.a.lea(size, RAX, Rm::M(RDI, 1));
            self.a.alu_imm(size, 7, Rm::R(RAX), 1);
            access.slow.push(self.a.jcc(cc::BE));
        } else {
            self.a.alu(size, 7, Rm::R(RDI), RDX);
            access.slow.push(self.a.jcc(cc::BE));
        }
        self.a.load(size, RAX, Rm::R(AX));
        self.a.sized(size, 0, 0xF6, 6 | signed as u8, Rm::R(RDI));
        self.a.load(size, AX, Rm::R(RAX));
        self.join(access);
        self.after(i, true);
    }

    fn multiply(&mut self, i: usize) {
        let (size, d) = match self.trace.kinds[i] {
            Kind::Imul { size, d, s, imm } => {
                let access = self.source(i, s, size);
                let from = self.from(s);
                self.modify(d, |c, r| match imm {
                    Some(v) => {
                        c.a.word(size, 0, 0x69, r, from);
                        c.a.imm(size, v);
                    }
                    None => c.a.word(size, 1, 0xAF, r, from),
                });
                self.overflow_only(i, size, d);
                self.close(access);
                (size, d)
            }
            Kind::Mul { signed, size, s } => {
                let access = self.source(i, s, size);
                self.a.load(8, RAX, Rm::R(AX));
                self.a.sized(size, 0, 0xF6, 4 | signed as u8, self.from(s));
                self.a.load(size, AX, Rm::R(RAX));
                self.overflow_only(i, size, 0);
                self.close(access);
                (size, 0)
            }
            _ => return,
        };
        let _ = (size, d);
        self.fl = Flags::KEPT;
    }

    /// The access to a memory source, if there is one.
    fn source(&mut self, i: usize, s: Option<u8>, size: u8) -> Option<Access> {
        if s.is_some() {
            return None;
        }
        self.before(i, true);
        Some(self.operand(i, size as u64, false))
    }
    fn close(&mut self, access: Option<Access>) {
        if let Some(access) = access {
            self.join(access);
        }
    }

    /// Keep the flags of a multiplication: CF and OF as they are, the others of the low half in `d`.
    fn overflow_only(&mut self, i: usize, size: u8, d: u8) {
        if !self.need[i + 1] {
            return;
        }
        self.a.setcc(cc::O, Rm::R(RDI));
        self.compare(8, size, d, Val::Reg(d));
        self.a.b(&[0x9F]); // lahf
        self.a.b(&[0x80, 0xE4, 0xEE]); // and ah, ~(AF | CF)
        self.a.load(1, RAX, Rm::R(RDI));
        self.a.b(&[0x08, 0xC4]); // or ah, al
        self.a.store(2, mem(FLAGS), RAX);
    }

    fn stack(&mut self, i: usize) {
        let word = self.trace.word;
        self.before(i, true);
        let access = match self.trace.kinds[i] {
            Kind::Push(v) => {
                let access = self.push_at(i);
                match v {
                    Val::Imm(v) => self.a.store_imm(word, self.place, v),
                    Val::Reg(r) => {
                        let r = self.reg(r, RAX);
                        self.a.store(word, self.place, r);
                    }
                }
                self.a.lea(word, SP, Rm::M(SP, -(word as i32)));
                access
            }
            Kind::PushMem => {
                let mut access = self.operand(i, word as u64, false);
                self.a.load(word, RAX, self.place);
                self.a.store(8, mem(RIP_OUT), RAX);
                access.slow.extend(self.push_at(i).slow);
                self.a.load(8, RAX, mem(RIP_OUT));
                self.a.store(word, self.place, RAX);
                self.a.lea(word, SP, Rm::M(SP, -(word as i32)));
                access
            }
            Kind::Pop(d) => {
                let access = self.stack_slot(i, SP, 0, false);
                match self.host[d as usize] {
                    SP => self.a.load(word, SP, self.place),
                    NONE => {
                        self.a.load(word, RAX, self.place);
                        self.a.store(8, self.at(d), RAX);
                        self.a.lea(word, SP, Rm::M(SP, word as i32));
                    }
                    h => {
                        self.a.load(word, h, self.place);
                        self.a.lea(word, SP, Rm::M(SP, word as i32));
                    }
                }
                access
            }
            _ => {
                // LEAVE
                let access = self.stack_slot(i, BP, 0, false);
                self.a.lea(word, SP, Rm::M(BP, word as i32));
                self.a.load(word, BP, self.place);
                access
            }
        };
        self.join(access);
        self.after(i, true);
    }

    /// MOVS, STOS, LODS upwards; downwards they are the handler's.
    fn string(&mut self, i: usize, size: u8) {
        let (word, kind) = (self.trace.word, self.trace.kinds[i]);
        self.before(i, true);
        let down = Rm::M(RBP, at(offset_of!(SoftCpu, eflags)));
        self.a.test_imm(4, down, DF as i32);
        let mut slow = Slow::from_iter([self.a.jcc(cc::NE)]);
        self.fl.host = 0;
        let flags = self.fl;
        let (from, to) = (!matches!(kind, Kind::Stos(_)), !matches!(kind, Kind::Lods(_)));
        if from {
            slow.extend(self.register_operand(i, GUEST_SI, size, false).slow);
            match kind {
                Kind::Lods(_) => self.a.load(size, AX, self.place),
                _ => {
                    self.a.load(size, RAX, self.place);
                    self.a.store(8, mem(RIP_OUT), RAX);
                }
            }
        }
        if to {
            slow.extend(self.register_operand(i, GUEST_DI, size, true).slow);
            match kind {
                Kind::Stos(_) => self.a.store(size, self.place, AX),
                _ => {
                    self.a.load(8, RAX, mem(RIP_OUT));
                    self.a.store(size, self.place, RAX);
                }
            }
        }
        for (r, moves) in [(GUEST_SI, from), (GUEST_DI, to)] {
            if moves {
                self.modify(r as u8, |c, h| c.a.lea(word, h, Rm::M(h, size as i32)));
            }
        }
        self.join(Access { slow, i, flags });
        self.after(i, true);
    }

    /// The access to memory at guest register `r`.
    fn register_operand(&mut self, i: usize, r: usize, size: u8, write: bool) -> Access {
        let h = self.reg(r as u8, RDI);
        self.slot_at(i, h, 0, size, write)
    }

    /// The access to the stack slot below the top.
    pub fn push_at(&mut self, i: usize) -> Access {
        self.stack_slot(i, SP, -(self.trace.word as i32), true)
    }

    /// Push the address of what follows instruction `i`.
    fn push_return(&mut self, i: usize) -> Access {
        let word = self.trace.word;
        let access = self.push_at(i);
        self.a.load(8, RAX, mem(PAGE));
        self.a.lea(word, RAX, Rm::M(RAX, self.trace.next(i) as i32));
        self.a.store(word, self.place, RAX);
        self.a.lea(word, SP, Rm::M(SP, -(word as i32)));
        access
    }

    fn branch(&mut self, i: usize) {
        let (next, word) = (self.trace.next(i), self.trace.word);
        match self.trace.kinds[i] {
            Kind::Jcc { cc, rel } => {
                self.want(condition(cc));
                self.choose(i, cc, next + rel, next);
            }
            Kind::Jmp { rel } => self.go(i, next + rel),
            Kind::Call { rel } => {
                self.before(i, true);
                let access = self.push_return(i);
                self.call_site(i);
                self.join(access);
                self.after(i, true);
                self.go(i, next + rel);
            }
            Kind::Ret { extra } => {
                self.keep();
                let access = self.stack_slot(i, SP, 0, false);
                self.a.load(word, RAX, self.place);
                self.join(access);
                self.back(i, word as i32 + extra);
            }
            Kind::Indirect { call, s } => {
                self.keep();
                let mut access = match s {
                    Some(s) => {
                        self.a.load(word, RAX, self.at(s));
                        Access { slow: Slow::new(), i, flags: self.fl }
                    }
                    None => {
                        let access = self.operand(i, word as u64, false);
                        self.a.load(word, RAX, self.place);
                        access
                    }
                };
                if call {
                    self.check_target(&mut access);
                    self.a.store(8, mem(RIP_OUT), RAX);
                    access.slow.extend(self.push_return(i).slow);
                    self.call_site(i);
                    self.a.load(8, RAX, mem(RIP_OUT));
                }
                self.join(access);
                self.indirect(i, !call);
            }
            _ => {}
        }
    }
}

/// The flags after SHL (4), SHR or SAR by a constant.
fn shifted(op: u8, count: u8) -> Flags {
    let (host, overflow) = match (count, op) {
        (1, _) => (CF | PF | ZF | SF | OF, Overflow::Host),
        (_, 4) => (CF | PF | ZF | SF, Overflow::Shl),
        _ => (CF | PF | ZF | SF, Overflow::Clear),
    };
    Flags { host, clear_af: true, overflow, kept: false, recipe: None }
}
