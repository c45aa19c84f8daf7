//! The host code of what kernels do often: interrupts on and off, flags, control registers, the clock.

use super::super::cache::USER_KEY;
use super::super::flags::{AC, ARITH, DF, IF, RF, TF, VM};
use super::super::op::{CS, FLAGS, GS, KEY, LEFT, PAGE, RDX as GUEST_DX, RIP_OUT, SHORT_KEYS, SS, TLB};
use super::super::paging::{CR4_TSD, EFER_SCE, MMU_SUP, MMU_USER};
use super::super::SoftCpu;
use super::asm::*;
use super::at;
use super::block::{Access, Compiler, Slow};
use super::flags::Flags;
use super::int::{AX, SP};
use super::kind::*;
use super::stubs::{mem, mem_at, HOST};
use crate::state::Segment;
use crate::ClockLine;
use std::mem::offset_of;

/// RFLAGS without the arithmetic flags.
const EFLAGS: Rm = Rm::M(RBP, at(offset_of!(SoftCpu, eflags)));

impl Compiler<'_> {
    pub fn system(&mut self, i: usize) {
        let access = match self.trace.kinds[i] {
            Kind::Direction { down } => {
                self.before(i, true);
                match down {
                    true => self.a.alu_imm(4, 1, EFLAGS, DF as i32),
                    false => self.a.alu_imm(4, 4, EFLAGS, !(DF as i32)),
                }
                return self.after(i, true);
            }
            Kind::Cli => {
                let access = self.supervisor(i);
                self.a.alu_imm(4, 4, EFLAGS, !(IF as i32));
                access
            }
            Kind::Sti => {
                let mut access = self.supervisor(i);
                self.a.test_imm(4, EFLAGS, IF as i32);
                let on = self.a.jcc(cc::NE);
                self.a.test_imm(4, EFLAGS, RF as i32);
                access.slow.push(self.a.jcc(cc::NE));
                if i + 1 == self.trace.len() {
                    // See `step`.
                    self.a.alu_imm(8, 7, mem(LEFT), 0);
                    access.slow.push(self.a.jcc(cc::E));
                }
                self.a.call_abs(self.stubs.quiet);
                access.slow.push(self.a.jcc(cc::NE));
                self.a.alu_imm(4, 1, EFLAGS, IF as i32);
                self.a.here(on);
                access
            }
            Kind::Swapgs => {
                let access = self.supervisor(i);
                let gs = offset_of!(SoftCpu, segs) + GS * size_of::<Segment>() + offset_of!(Segment, base);
                let bases = [gs, offset_of!(SoftCpu, msr.kernel_gs_base)].map(|n| Rm::M(RBP, at(n)));
                self.a.load(8, RAX, bases[0]);
                self.a.load(8, RDI, bases[1]);
                self.a.store(8, bases[0], RDI);
                self.a.store(8, bases[1], RAX);
                access
            }
            Kind::FromControl { n, d } => {
                let access = self.supervisor(i);
                let from = if n == 2 { offset_of!(SoftCpu, cr2) } else { offset_of!(SoftCpu, cr3) };
                self.a.load(8, RAX, Rm::M(RBP, at(from)));
                self.a.store(8, self.at(d), RAX);
                access
            }
            _ => self.rdtsc(i),
        };
        self.join(access);
        self.after(i, true);
    }

    /// A selector into a general register; the flags stay as they are.
    pub fn selector(&mut self, seg: u8, d: u8) {
        let selector = seg as usize * size_of::<Segment>() + offset_of!(Segment, selector);
        self.a.word(4, 1, 0xB7, RAX, Rm::M(RBP, at(offset_of!(SoftCpu, segs) + selector))); // movzx
        self.a.store(8, self.at(d), RAX);
    }

    /// The clock as a function of the position: see [`ClockLine`].
    fn rdtsc(&mut self, i: usize) -> Access {
        const DX: u8 = HOST[GUEST_DX];
        self.before(i, true);
        let field = |offset: usize| Rm::M(RBP, at(offset));
        self.a.alu_imm(8, 7, field(offset_of!(SoftCpu, clock.rate)), 0);
        let mut slow = Slow::from_iter([self.a.jcc(cc::E)]);
        self.a.test_imm(4, field(offset_of!(SoftCpu, st.cr4)), CR4_TSD as i32);
        slow.push(self.a.jcc(cc::NE));
        self.fl.host = 0;
        let flags = self.fl;
        self.a.load(8, RAX, field(offset_of!(SoftCpu, limit)));
        self.a.alu_load(8, 5, RAX, mem(LEFT));
        self.a.alu_imm(8, 5, Rm::R(RAX), self.trace.rest(i) as i32);
        self.a.word(8, 0, 0xF7, 4, field(offset_of!(SoftCpu, clock.rate))); // mul: RDX is the guest's
        self.a.word(8, 1, 0xAC, DX, Rm::R(RAX)); // shrd
        self.a.b(&[ClockLine::SHIFT as u8]);
        self.a.alu_load(8, 0, RAX, field(offset_of!(SoftCpu, clock.base_ns)));
        self.a.alu_load(8, 0, RAX, field(offset_of!(SoftCpu, msr.tsc_adjust)));
        self.a.load(4, AX, Rm::R(RAX));
        self.a.shift(8, 5, Rm::R(RAX), 32);
        self.a.load(8, DX, Rm::R(RAX));
        if let Kind::Rdtsc { aux: true } = self.trace.kinds[i] {
            self.a.load(4, RCX, field(offset_of!(SoftCpu, msr.tsc_aux)));
        }
        Access { slow, i, flags }
    }

    /// SYSCALL from privilege level 3.
    fn enter_kernel(&mut self, i: usize) -> Access {
        self.before(i, true);
        let field = |offset: usize| Rm::M(RBP, at(offset));
        self.a.alu_imm(1, 7, field(offset_of!(SoftCpu, cpl)), 3);
        let mut slow = Slow::from_iter([self.a.jcc(cc::NE)]);
        self.a.test_imm(4, field(offset_of!(SoftCpu, efer)), EFER_SCE as i32);
        slow.push(self.a.jcc(cc::E));
        // AC, which chooses a TLB, is cleared as a rule.
        self.a.load(8, RAX, field(offset_of!(SoftCpu, msr.sfmask)));
        self.a.word(8, 0, 0xF7, 2, Rm::R(RAX)); // not
        self.a.alu_load(8, 4, RAX, EFLAGS);
        self.a.test_imm(4, Rm::R(RAX), AC as i32);
        slow.push(self.a.jcc(cc::NE));
        self.fl.host = 0;
        Access { slow, i, flags: self.fl }
    }

    pub fn syscall(&mut self, i: usize) {
        self.keep();
        let access = self.enter_kernel(i);
        self.join(access);
        self.give_back();
        self.host = HOST;
        self.a.load(8, RCX, mem(PAGE));
        self.a.lea(8, RCX, Rm::M(RCX, self.trace.next(i) as i32));
        self.a.call_abs(self.stubs.syscall);
        self.a.load(8, RAX, Rm::M(RBP, at(offset_of!(SoftCpu, msr.lstar))));
        self.indirect_to(i, 1);
    }

    pub fn sysret(&mut self, i: usize) {
        let mut access = self.supervisor(i);
        self.a.test_imm(4, Rm::M(RBP, at(offset_of!(SoftCpu, efer))), EFER_SCE as i32);
        access.slow.push(self.a.jcc(cc::E));
        self.a.load(8, RAX, self.at(11));
        self.a.test_imm(4, Rm::R(RAX), (TF | AC) as i32);
        access.slow.push(self.a.jcc(cc::NE));
        self.a.load(8, RAX, Rm::R(RCX));
        self.check_target(&mut access);
        self.a.call_abs(self.stubs.quiet);
        access.slow.push(self.a.jcc(cc::NE));
        self.join(access);
        self.give_back();
        self.host = HOST;
        self.a.call_abs(self.stubs.sysret);
        self.a.load(8, RAX, Rm::R(RCX));
        self.indirect_to(i, 0);
    }

    /// Instruction `i` is the handler's but at privilege level 0.
    fn supervisor(&mut self, i: usize) -> Access {
        self.before(i, true);
        self.a.alu_imm(1, 7, Rm::M(RBP, at(offset_of!(SoftCpu, cpl))), 0);
        let slow = Slow::from_iter([self.a.jcc(cc::NE)]);
        self.fl.host = 0;
        Access { slow, i, flags: self.fl }
    }

    /// PUSHF, outside of virtual-8086 mode.
    pub fn push_flags(&mut self, i: usize) {
        self.before(i, true);
        self.keep();
        self.fl = Flags::KEPT;
        flags_image(&mut self.a);
        self.a.alu_imm(4, 4, Rm::R(RAX), !((RF | VM) as i32));
        self.a.store(8, mem(RIP_OUT), RAX);
        let access = self.push_at(i);
        self.a.load(8, RAX, mem(RIP_OUT));
        self.a.store(self.trace.word, self.place, RAX);
        self.a.lea(self.trace.word, SP, Rm::M(SP, -(self.trace.word as i32)));
        self.join(access);
        self.after(i, true);
    }
}

/// RFLAGS, of which the slot has the arithmetic flags, into RAX. Uses RDI.
fn flags_image(a: &mut Asm) {
    a.word(4, 1, 0xB7, RAX, mem(FLAGS)); // movzx
    a.b(&[0x0F, 0xB6, 0xFC]); // movzx edi, ah
    a.alu_imm(4, 4, Rm::R(RDI), 0xD5);
    a.word(4, 1, 0xB6, RAX, Rm::R(RAX)); // movzx
    a.shift(4, 4, Rm::R(RAX), 11);
    a.alu(4, 1, Rm::R(RAX), RDI);
    a.alu_load(4, 1, RAX, EFLAGS);
}

/// RDI becomes RFLAGS, but for bits that no program can set. Uses RAX.
fn set_flags(a: &mut Asm) {
    a.load(4, RAX, Rm::R(RDI));
    a.alu_imm(4, 4, Rm::R(RAX), (0x3F_7FD5 & !ARITH) as i32);
    a.alu_imm(4, 1, Rm::R(RAX), 2);
    a.store(8, EFLAGS, RAX);
    // As `raw_flags`.
    a.load(4, RAX, Rm::R(RDI));
    a.shift(4, 5, Rm::R(RAX), 11);
    a.alu_imm(4, 4, Rm::R(RAX), 1);
    a.alu_imm(4, 4, Rm::R(RDI), 0xD5);
    a.alu_imm(4, 1, Rm::R(RDI), 2);
    a.shift(4, 4, Rm::R(RDI), 8);
    a.alu(4, 1, Rm::R(RAX), RDI);
    a.store(8, mem(FLAGS), RAX);
}

/// Flat CS and SS, whose selectors are in AX and DI, and another privilege level. Uses RAX.
fn change_level(a: &mut Asm, user: bool) {
    let field = |offset: usize| Rm::M(RBP, at(offset));
    let attrs = if user { [0xA0FB, 0xC0F3] } else { [0xA09B, 0xC093] };
    for (seg, selector, attr) in [(CS, RAX, attrs[0]), (SS, RDI, attrs[1])] {
        let seg = offset_of!(SoftCpu, segs) + seg * size_of::<Segment>();
        a.store(2, field(seg + offset_of!(Segment, selector)), selector);
        a.store_imm(8, field(seg + offset_of!(Segment, base)), 0);
        a.store_imm(4, field(seg + offset_of!(Segment, limit)), -1);
        a.store_imm(2, field(seg + offset_of!(Segment, attr)), attr);
    }
    let (level, mmu) = if user { (3, MMU_USER) } else { (0, MMU_SUP) };
    a.store_imm(1, field(offset_of!(SoftCpu, cpl)), level);
    a.store_imm(8, field(offset_of!(SoftCpu, mmu)), mmu as i32);
    a.load(8, RAX, field(offset_of!(SoftCpu, tlb_at) + 8 * user as usize));
    a.store(8, mem(TLB), RAX);
    for key in [mem(KEY), mem(KEY + 1), mem(SHORT_KEYS), mem_at(SHORT_KEYS, 4)] {
        a.alu_imm(1, 6, key, USER_KEY as i32);
    }
}

/// SYSCALL, once it was looked at: RCX is set; not RIP.
pub fn syscall(a: &mut Asm) {
    flags_image(a);
    a.alu_imm(4, 4, Rm::R(RAX), !(RF as i32));
    a.store(8, mem(11), RAX);
    a.load(8, RDI, Rm::M(RBP, at(offset_of!(SoftCpu, msr.sfmask))));
    a.word(4, 0, 0xF7, 2, Rm::R(RDI)); // not
    a.alu(4, 4, Rm::R(RDI), RAX);
    set_flags(a);
    a.word(4, 1, 0xB7, RAX, Rm::M(RBP, at(offset_of!(SoftCpu, msr.star)) + 4)); // movzx
    a.alu_imm(4, 4, Rm::R(RAX), !3);
    a.lea(4, RDI, Rm::M(RAX, 8));
    change_level(a, false);
    a.b(&[0xC3]);
}

/// SYSRET to 64-bit code, once it was looked at; not RIP.
pub fn sysret(a: &mut Asm) {
    a.load(4, RDI, mem(11));
    a.alu_imm(4, 4, Rm::R(RDI), 0x3C_7FD7);
    set_flags(a);
    a.word(4, 1, 0xB7, RAX, Rm::M(RBP, at(offset_of!(SoftCpu, msr.star)) + 6)); // movzx
    a.lea(4, RDI, Rm::M(RAX, 8));
    a.alu_imm(4, 0, Rm::R(RAX), 16);
    a.alu_imm(4, 1, Rm::R(RDI), 3);
    a.alu_imm(4, 1, Rm::R(RAX), 3);
    change_level(a, true);
    a.b(&[0xC3]);
}
