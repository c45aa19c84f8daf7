//! The code that all blocks share: the way in and out, calls of handlers, XMM registers, jumps through the
//! table by linear address.

use super::super::cache::{Jump, JumpSet, JUMPS};
use super::super::lapic::{BASE_ENABLE, LINT0, MASKED};
use super::super::SoftCpu;
use super::asm::*;
use super::memory::{CodeMemory, Site};
use super::*;

/// Where guest registers live: a host register, or 0xFF for their slot. RAX and RDI are scratch, RBP points
/// at the processor, RSP at the host's stack. RCX and RDX are themselves for shifts and multiplications.
pub const HOST: [u8; 16] = [14, RCX, RDX, RBX, 15, 13, RSI, 11, 8, 9, 10, NONE, 12, NONE, NONE, NONE];
pub const NONE: u8 = 0xFF;

/// A slot of `gpr` as an operand; from 32 on, of those that it has no room for.
pub fn mem(n: usize) -> Rm {
    mem_at(n, 0)
}
/// The same, from byte `more` on.
pub fn mem_at(n: usize, more: i32) -> Rm {
    match n.checked_sub(32) {
        None => Rm::M(RBP, slot(n) + more),
        Some(n) => Rm::M(RBP, at(offset_of!(SoftCpu, more_slots)) + 8 * n as i32 + more),
    }
}
/// The element with index RDI of a field of [`Returns`], whose elements have `size` bytes.
pub fn returns(field: usize, half: usize, size: usize) -> Rm {
    let start = offset_of!(SoftCpu, returns) + field + half * RETURNS * size;
    Rm::X(RBP, RDI, size.trailing_zeros() as u8, at(start))
}
const CSR: Rm = Rm::M(RBP, at(offset_of!(SoftCpu, st.vector.mxcsr)));
fn vector_slot(i: u8) -> Rm {
    Rm::M(RBP, at(offset_of!(SoftCpu, st.vector.ymm)) + 32 * i as i32)
}

type Enter = unsafe extern "sysv64" fn(*mut u8, *const u8) -> u32;

/// Addresses of the shared code.
#[derive(Default, Clone, Copy)]
pub struct Stubs {
    enter: u64,
    size: usize,
    /// Leave; EAX says why. Guest registers are still in host registers.
    pub exit: u64,
    /// Call the handler of the instruction in RAX, EDI describes its place; returns when execution goes on,
    /// with the guest's flags in the host's.
    /// The vector registers are loaded again: none, XMM, YMM.
    pub step: [u64; 3],
    /// Call [`touch`] for leader number EAX; returns when it is to be tried again.
    pub touch: u64,
    /// SYSCALL and SYSRET, once they were looked at, but for RIP. Guest registers but RCX are still in host registers. Use RAX
    /// and RDI.
    pub syscall: u64,
    pub sysret: u64,
    /// Returns with ZF set if no interrupt can be due, whatever IF is. Uses RAX.
    pub quiet: u64,
    /// Load the XMM registers (1), or the YMM registers (2) of which the XMM registers may be loaded already;
    /// returns with ZF clear when the interpreter must have a look.
    pub load: [u64; 3],
    /// Jump to the guest address in RAX.
    pub lookup: u64,
    /// The same, for the site in RDI.
    pub fill: u64,
    /// The same, to where the site in RDI led.
    pub refill: u64,
    /// Jump to the guest address in RIP_OUT.
    pub far: u64,
    /// Leave for the guest address in RAX; EDI says why.
    pub ask: u64,
    /// Jump to the guest address in RAX; it may be time to link the edge for which EDI asks once more.
    pub across: u64,
    /// Jump to where the return in place RDI leads, of each half.
    pub returned: [u64; 2],
    /// Leave; RIP_OUT says where to go on.
    pub miss: u64,
}

impl Stubs {
    pub fn enter(&self) -> Enter {
        // SAFETY: `build` put a routine of this type there before any block was compiled.
        unsafe { std::mem::transmute::<u64, Enter>(self.enter) }
    }
    pub fn size(&self) -> usize {
        self.size
    }

    /// Lay the shared code at the start of `memory`.
    pub fn build(memory: &mut CodeMemory) -> Stubs {
        let base = memory.next().0;
        let mut a = Asm::new(base, Vec::new());
        let mut s = Stubs::default();
        let address = |a: &Asm| base + a.at() as u64;
        const SAVED: [u8; 6] = [RBX, RBP, 12, 13, 14, 15];

        s.enter = address(&a);
        for r in SAVED {
            push(&mut a, r);
        }
        a.alu_imm(8, 5, Rm::R(RSP), 8);
        a.store(8, Rm::R(RBP), RDI);
        a.store(8, Rm::R(RAX), RSI);
        reload(&mut a);
        a.b(&[0xFF, 0xE0]); // jmp rax

        let avx = is_x86_feature_detected!("avx");
        let save_xmm = address(&a);
        a.alu_imm(1, 7, mem(XMM_LIVE), 2);
        let whole = a.jcc(cc::E);
        for i in 0..16 {
            a.enc(0, false, 1, 0x29, i, vector_slot(i), false); // movaps
        }
        let low = a.jmp();
        a.here(whole);
        if avx {
            for i in 0..16 {
                a.vex(0, false, true, 1, 0x29, 0, i, vector_slot(i)); // vmovaps
            }
            a.b(&[0xC5, 0xF8, 0x77]); // vzeroupper
        }
        a.here(low);
        a.enc(0, false, 1, 0xAE, 3, CSR, false); // stmxcsr
        a.enc(0, false, 1, 0xAE, 2, mem(HOST_CSR), false); // ldmxcsr
        a.store_imm(1, mem(XMM_LIVE), 0);
        a.b(&[0xC3]);

        for level in 1..=2 {
            s.load[level] = address(&a);
            // EM, TS, OSFXSR (and OSXSAVE), unmasked exceptions (and XCR0).
            let mut wrong = Vec::new();
            let mut want = |a: &mut Asm, rm: Rm, mask: i32, value: i32| {
                a.load(4, RAX, rm);
                a.alu_imm(4, 4, Rm::R(RAX), mask);
                a.alu_imm(4, 7, Rm::R(RAX), value);
                wrong.push(a.jcc(cc::NE));
            };
            let cr4 = if level == 2 { 0x4_0200 } else { 0x200 };
            want(&mut a, Rm::M(RBP, at(offset_of!(SoftCpu, st.cr0))), 0xC, 0);
            want(&mut a, Rm::M(RBP, at(offset_of!(SoftCpu, st.cr4))), cr4, cr4);
            want(&mut a, CSR, 0x1F80, 0x1F80);
            if level == 2 {
                want(&mut a, Rm::M(RBP, at(offset_of!(SoftCpu, st.xcr0))), 6, 6);
            }
            a.alu_imm(1, 7, mem(XMM_LIVE), 0);
            let live = a.jcc(cc::NE);
            a.enc(0, false, 1, 0xAE, 3, mem(HOST_CSR), false);
            a.enc(0, false, 1, 0xAE, 2, CSR, false);
            for i in 0..16 {
                if level == 2 && avx {
                    a.vex(0, false, true, 1, 0x28, 0, i, vector_slot(i));
                } else {
                    a.enc(0, false, 1, 0x28, i, vector_slot(i), false);
                }
            }
            let done = a.jmp();
            a.here(live);
            if level == 2 && avx {
                for i in 0..16 {
                    // vinsertf128 ymm, ymm, the upper half, 1
                    let Rm::M(base, disp) = vector_slot(i) else { continue };
                    a.vex(1, false, true, 3, 0x18, i, i, Rm::M(base, disp + 16));
                    a.b(&[1]);
                }
            }
            a.here(done);
            a.store_imm(1, mem(XMM_LIVE), level as i32);
            a.alu(4, 6, Rm::R(RAX), RAX); // ZF
            for f in wrong {
                a.here(f);
            }
            a.b(&[0xC3]);
        }

        s.exit = address(&a);
        spill(&mut a);
        let exit2 = address(&a);
        a.alu_imm(1, 7, mem(XMM_LIVE), 0);
        let none = a.jcc_short(cc::E);
        a.call_abs(save_xmm);
        a.short_here(none);
        a.alu_imm(8, 0, Rm::R(RSP), 8);
        for r in SAVED.iter().rev() {
            pop(&mut a, *r);
        }
        a.b(&[0xC3]);

        s.quiet = address(&a);
        quiet(&mut a);
        s.syscall = address(&a);
        system::syscall(&mut a);
        s.sysret = address(&a);
        system::sysret(&mut a);

        s.touch = address(&a);
        a.alu_imm(8, 5, Rm::R(RSP), 8);
        spill(&mut a);
        a.store(4, Rm::R(RSI), RAX);
        a.load(1, RAX, mem(XMM_LIVE));
        a.store(1, mem(LEVEL), RAX);
        a.alu_imm(1, 7, mem(XMM_LIVE), 0);
        let none = a.jcc_short(cc::E);
        a.call_abs(save_xmm);
        a.short_here(none);
        a.lea(8, RDI, Rm::M(RBP, -(ORIGIN as i32)));
        a.constant(RAX, touch as *const () as u64);
        a.b(&[0xFF, 0xD0]); // call rax
        a.test(4, Rm::R(RAX), RAX);
        let bail = a.jcc(cc::NE);
        reload(&mut a);
        for level in [1, 2] {
            a.alu_imm(1, 7, mem(LEVEL), level as i32);
            let other = a.jcc(cc::NE);
            a.call_abs(s.load[level]);
            a.here(other);
        }
        a.lea(8, RSP, Rm::M(RSP, 8));
        a.b(&[0xC3]);
        a.here(bail);
        a.alu_imm(8, 0, Rm::R(RSP), 16);
        a.jmp_abs(exit2);

        let mut jumps = Vec::new();
        for level in 0..3 {
            s.step[level] = address(&a);
            a.alu_imm(8, 5, Rm::R(RSP), 8);
            spill(&mut a);
            a.store(8, Rm::R(RSI), RAX);
            a.store(4, Rm::R(RDX), RDI);
            a.alu_imm(1, 7, mem(XMM_LIVE), 0);
            let none = a.jcc_short(cc::E);
            a.call_abs(save_xmm);
            a.short_here(none);
            a.lea(8, RDI, Rm::M(RBP, -(ORIGIN as i32)));
            a.constant(RAX, step as *const () as u64);
            a.b(&[0xFF, 0xD0]); // call rax
            a.test(4, Rm::R(RAX), RAX);
            let leave = a.jcc(cc::NE);
            reload(&mut a);
            if level > 0 {
                // No load or store changes what it looks at.
                a.call_abs(s.load[level]);
            }
            restore_flags(&mut a);
            a.lea(8, RSP, Rm::M(RSP, 8));
            a.b(&[0xC3]);
            a.here(leave);
            a.alu_imm(8, 0, Rm::R(RSP), 16);
            a.alu_imm(4, 7, Rm::R(RAX), JUMP as i32);
            jumps.push(a.jcc(cc::E));
            a.jmp_abs(exit2);
        }

        s.miss = address(&a);
        a.constant(RAX, NEXT as u64);
        a.jmp_abs(s.exit);

        for f in jumps {
            a.here(f);
        }
        reload(&mut a);
        s.far = address(&a);
        a.load(8, RAX, mem(RIP_OUT));
        s.lookup = address(&a);
        lookup(&mut a, s.miss, false);
        // A jump may have many targets: of its misses only some change the site.
        s.fill = address(&a);
        a.alu_imm(1, 0, mem(ASKED), 64);
        a.jcc_abs(cc::B ^ 1, s.lookup);
        let some = a.jmp();
        s.refill = address(&a);
        a.load(8, RAX, Rm::M(RDI, offset_of!(Site, lin) as i32));
        a.here(some);
        a.store(8, mem(SITE), RDI);
        lookup(&mut a, s.miss, true);

        // A link costs as much as to look many times, and processes that start and end soon need none.
        s.across = address(&a);
        a.alu_imm(1, 0, mem(ASKED), 8);
        a.jcc_abs(cc::B ^ 1, s.lookup);
        s.ask = address(&a);
        a.store(8, mem(RIP_OUT), RAX);
        a.load(4, RAX, Rm::R(RDI));
        a.jmp_abs(s.exit);

        for half in 0..2 {
            s.returned[half] = address(&a);
            a.load(8, RAX, returns(offset_of!(Returns, lin), half, 8));
            a.jmp_abs(s.lookup);
        }

        memory.push(&a.buf, &[]);
        s.size = memory.used();
        s
    }
}

/// Go on at the guest address in RAX by the table, or else at `miss`; with `fill`, let the site in SITE know.
fn lookup(a: &mut Asm, miss: u64, fill: bool) {
    a.store(8, mem(RIP_OUT), RAX);
    a.store(8, Rm::R(RDI), RAX);
    a.shift(8, 5, Rm::R(RDI), 63);
    let Rm::M(base, keys) = mem(KEY) else { unreachable!() };
    a.load(8, RDI, Rm::X(base, RDI, 3, keys));
    a.store(8, mem(WANTED), RDI);
    // As `SoftCpu::place`.
    a.alu(4, 6, Rm::R(RDI), RAX);
    a.shift(8, 5, Rm::R(RAX), 13);
    a.alu(4, 6, Rm::R(RDI), RAX);
    a.alu_imm(4, 4, Rm::R(RDI), JUMPS as i32 - 1);
    a.shift(4, 4, Rm::R(RDI), size_of::<JumpSet>().trailing_zeros() as u8);
    a.alu_load(8, 0, RDI, mem(JUMP_TABLE));
    let (lin, key) = (offset_of!(Jump, lin) as i32, offset_of!(Jump, key) as i32);
    let (code, second) = (offset_of!(Jump, code) as i32, size_of::<Jump>() as i32);
    a.load(8, RAX, mem(RIP_OUT));
    a.alu_load(8, 7, RAX, Rm::M(RDI, lin));
    let m1 = a.jcc(cc::NE);
    a.load(8, RAX, mem(WANTED));
    a.alu_load(8, 7, RAX, Rm::M(RDI, key));
    let m2 = a.jcc(cc::NE);
    let found = a.at();
    if fill {
        a.load(8, RAX, Rm::M(RDI, code));
        a.store(8, mem(CODE_AT), RAX);
        // What is not compiled yet may be soon.
        a.lea_abs(RDI, miss);
        a.alu(8, 7, Rm::R(RAX), RDI);
        a.jcc_abs(cc::E, miss);
        a.load(8, RDI, mem(SITE));
        a.store(8, Rm::M(RDI, offset_of!(Site, code) as i32), RAX);
        a.load(8, RAX, mem(WANTED));
        a.store(8, Rm::M(RDI, offset_of!(Site, key) as i32), RAX);
        a.load(8, RAX, mem(RIP_OUT));
        a.store(8, Rm::M(RDI, offset_of!(Site, lin) as i32), RAX);
        a.alu_imm(8, 4, Rm::R(RAX), -4096);
        a.store(8, Rm::M(RDI, offset_of!(Site, page) as i32), RAX);
        a.store(8, mem(PAGE), RAX);
        a.word(4, 0, 0xFF, 4, mem(CODE_AT)); // jmp
    } else {
        a.load(8, RAX, mem(RIP_OUT));
        a.alu_imm(8, 4, Rm::R(RAX), -4096);
        a.store(8, mem(PAGE), RAX);
        a.word(4, 0, 0xFF, 4, Rm::M(RDI, code)); // jmp
    }
    for m in [m1, m2] {
        a.here(m);
    }
    a.load(8, RAX, mem(RIP_OUT));
    a.alu_load(8, 7, RAX, Rm::M(RDI, second + lin));
    a.jcc_abs(cc::NE, miss);
    a.load(8, RAX, mem(WANTED));
    a.alu_load(8, 7, RAX, Rm::M(RDI, second + key));
    a.jcc_abs(cc::NE, miss);
    a.alu_imm(8, 0, Rm::R(RDI), second);
    let back = a.jmp();
    a.to(back, found);
}

/// See [`Stubs::quiet`] and `SoftCpu::settled`.
fn quiet(a: &mut Asm) {
    let field = |offset: usize| Rm::M(RBP, at(offset));
    let irr = offset_of!(SoftCpu, lapic.irr);
    a.load(8, RAX, field(irr));
    for n in 1..4 {
        a.alu_load(8, 1, RAX, field(irr + 8 * n));
    }
    let mut loud = vec![a.jcc_short(cc::NE)];
    a.alu_imm(2, 7, field(offset_of!(SoftCpu, extint)), 0);
    loud.push(a.jcc_short(cc::NE));
    // LINT0 is masked, or no ExtINT.
    a.test_imm(4, field(offset_of!(SoftCpu, lapic.base)), BASE_ENABLE as i32);
    let off = a.jcc_short(cc::E);
    a.load(4, RAX, field(offset_of!(SoftCpu, lapic.lvt) + 4 * LINT0));
    a.alu_imm(4, 4, Rm::R(RAX), (MASKED | 0x700) as i32);
    a.alu_imm(4, 7, Rm::R(RAX), 0x700);
    let direct = a.jcc_short(cc::E);
    a.alu(4, 6, Rm::R(RAX), RAX); // ZF
    a.b(&[0xC3]);
    a.short_here(off);
    a.short_here(direct);
    a.test(8, Rm::R(RBP), RBP); // not zero
    loud.into_iter().for_each(|f| a.short_here(f));
    a.b(&[0xC3]);
}

fn push(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.b(&[0x41]);
    }
    a.b(&[0x50 | r & 7]);
}
fn pop(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.b(&[0x41]);
    }
    a.b(&[0x58 | r & 7]);
}
fn spill(a: &mut Asm) {
    for (g, &h) in HOST.iter().enumerate() {
        if h != NONE {
            a.store(8, mem(g), h);
        }
    }
}
fn reload(a: &mut Asm) {
    for (g, &h) in HOST.iter().enumerate() {
        if h != NONE {
            a.load(8, h, mem(g));
        }
    }
}

/// The kept flags into the host's.
pub fn restore_flags(a: &mut Asm) {
    a.enc(0, false, 1, 0xB7, RAX, mem(FLAGS), false); // movzx eax, word
    a.b(&[0x04, 0x7F]); // add al, 127: OF from 1
    a.b(&[0x9E]); // sahf
}
