//! The x87 unit (SDM vol. 1, chapter 8): stack, exceptions and instructions. Arithmetic that the
//! architecture fixes runs on the host's x87 unit; the transcendental functions are in `x87_math`.

use super::fxsave::{full_fsw, set_fcw, update_es};
use super::host::routines;
use super::sse::{Done, FSW_ES};
use super::x87_math::{self as math, Outcome, Trig};
use super::{x87_env, Core, Handler, Rm, VecInsn};
use crate::fault::Exception;
use crate::state::{CpuState, X87};

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;

pub(super) const IE: u16 = 1;
const DE: u16 = 2;
const ZE: u16 = 4;
const OE: u16 = 8;
const UE: u16 = 16;
const SF: u16 = 0x40;
const C0: u16 = 0x100;
const C1: u16 = 0x200;
const C2: u16 = 0x400;
const C3: u16 = 0x4000;
const CC: u16 = C0 | C1 | C2 | C3;
pub(super) const FCW_IM: u16 = 1;

/// An 80-bit number taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct F80 {
    pub neg: bool,
    pub exp: u16,
    pub mant: u64,
}

pub(super) type Image = [u8; 16];

impl F80 {
    /// The default NaN.
    pub const INDEFINITE: F80 = F80 { neg: true, exp: 0x7FFF, mant: 3 << 62 };

    pub const fn one() -> F80 {
        F80 { neg: false, exp: 16383, mant: 1 << 63 }
    }

    pub fn of(b: &Image) -> F80 {
        let top = u16::from_le_bytes([b[8], b[9]]);
        let mant = u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        F80 { neg: top >> 15 != 0, exp: top & 0x7FFF, mant }
    }

    pub fn image(self) -> Image {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.mant.to_le_bytes());
        b[8..10].copy_from_slice(&(self.exp | u16::from(self.neg) << 15).to_le_bytes());
        b
    }

    pub fn with_sign(self, neg: bool) -> F80 {
        F80 { neg, ..self }
    }
    pub fn is_zero(self) -> bool {
        self.exp == 0 && self.mant == 0
    }
    pub fn is_infinite(self) -> bool {
        self.exp == 0x7FFF && self.mant == 1 << 63
    }
    /// A NaN, or an encoding that is no number on this processor (unnormal, pseudo-NaN, pseudo-infinity).
    pub fn is_nan_or_unsupported(self) -> bool {
        self.exp == 0x7FFF && self.mant != 1 << 63 || self.exp != 0 && self.mant >> 63 == 0
    }
}

/// The constants of FLD1, FLDL2T, FLDL2E, FLDPI, FLDLG2, FLDLN2, FLDZ: sign and exponent, the
/// mantissa rounded down, and whether rounding to nearest goes up.
const CONSTANTS: [(u16, u64, bool); 7] = [
    (0x3FFF, 0x8000_0000_0000_0000, false),
    (0x4000, 0xD49A_784B_CD1B_8AFE, false),
    (0x3FFF, 0xB8AA_3B29_5C17_F0BB, true),
    (0x4000, 0xC90F_DAA2_2168_C234, true),
    (0x3FFD, 0x9A20_9A84_FBCF_F798, true),
    (0x3FFE, 0xB172_17F7_D1CF_79AB, true),
    (0, 0, false),
];

pub(super) fn available<C: Core>(c: &mut C) -> Done {
    if c.state().cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

/// What a waiting instruction checks besides: a pending exception.
pub(super) fn pending<C: Core>(c: &mut C) -> Done {
    if c.state().x87.fsw & FSW_ES != 0 {
        return Err(Exception::MF);
    }
    Ok(())
}

/// FWAIT (9B): #NM if CR0.MP and CR0.TS, then #MF if an unmasked exception is pending.
pub fn wait<C: Core>(c: &mut C) -> Result<(), Exception> {
    if c.state().cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(Exception::NM);
    }
    pending(c)
}

fn phys(x: &X87, i: u8) -> usize {
    (x.top.wrapping_add(i) & 7) as usize
}
fn empty(x: &X87, i: u8) -> bool {
    x.tag >> phys(x, i) & 1 == 0
}
fn get(x: &X87, i: u8) -> Image {
    let mut image = x.st[phys(x, i)];
    image[10..].fill(0);
    image
}
fn put(x: &mut X87, i: u8, mut value: Image) {
    value[10..].fill(0);
    let p = phys(x, i);
    x.st[p] = value;
    x.tag |= 1 << p;
}
fn pop(x: &mut X87) {
    x.tag &= !(1 << x.top);
    x.top = (x.top + 1) & 7;
}
fn push(x: &mut X87, value: Image) {
    x.top = x.top.wrapping_sub(1) & 7;
    put(x, 0, value);
}

/// Record exceptions and C1 of an operation; the other condition codes keep their values.
fn raise(x: &mut X87, status: u16) {
    x.fsw = x.fsw & !C1 | status & (0x7F | C1);
    update_es(x);
}

fn raise_cc(x: &mut X87, status: u16) {
    x.fsw = x.fsw & !CC | status & (0x7F | CC);
    update_es(x);
}

/// A stack fault (`c1`: overflow); whether the masked response is to be done.
fn stack_fault(x: &mut X87, c1: u16) -> bool {
    raise(x, IE | SF | c1);
    x.fcw & FCW_IM != 0
}

/// Run an operation on the host's x87 unit under the guest's control word. Returns the status word.
fn native(fcw: u16, opcode: u8, modrm: u8, a: &mut Image, b: &mut Image) -> u16 {
    let Some(run) = routines().and_then(|r| r.x87(opcode, modrm)) else { return IE };
    // Precision control 1 is reserved (SDM vol. 1, section 8.1.5.2); here, as on Intel's processors, it is extended.
    let fcw = if fcw & 0x300 == 0x100 { fcw | 0x300 } else { fcw };
    let mut context = [fcw, 0, 0, 0];
    // SAFETY: the routine accesses at most 10 bytes at each operand and 4 at the context.
    unsafe { run(a.as_mut_ptr(), b.as_mut_ptr(), context.as_mut_ptr().cast()) };
    context[1]
}

/// Exceptions in `status` that are unmasked and stop an operation before it writes its result.
fn blocked(x: &X87, status: u16, which: u16) -> bool {
    status & !x.fcw & which != 0
}

/// Keep the pointers of a non-control instruction. The rule is fixed: every one updates them.
fn note<C: Core>(c: &mut C, insn: &VecInsn) {
    let ((fcs, fip), (fds, fdp)) = c.pointers();
    let x = &mut c.state().x87;
    x.fop = u16::from(insn.opcode & 7) << 8 | u16::from(insn.modrm);
    x.fip = fip;
    x.fcs = fcs;
    if insn.rm == Rm::Mem {
        x.fdp = fdp;
        x.fds = fds;
    }
}

fn start<C: Core>(c: &mut C) -> Done {
    available(c)?;
    pending(c)
}

/// `op` is ModRM.reg: add, mul, com, comp, sub, subr, div, divr.
fn arithmetic(x: &mut X87, opcode: u8, modrm: u8, mut operand: Image) {
    let op = modrm >> 3 & 7;
    let compare = matches!(op, 2 | 3);
    if empty(x, 0) {
        let masked = stack_fault(x, 0);
        if compare {
            x.fsw |= C0 | C2 | C3;
        } else if masked {
            put(x, 0, F80::INDEFINITE.image());
        }
        if masked && op == 3 {
            pop(x);
        }
        return;
    }
    let mut a = get(x, 0);
    let modrm = if op == 3 { modrm & !8 } else { modrm };
    let status = native(x.fcw, opcode, modrm, &mut a, &mut operand);
    if compare {
        raise_cc(x, status & !C1);
        if op == 3 && !blocked(x, status, IE | DE) {
            pop(x);
        }
        return;
    }
    raise(x, status);
    if !blocked(x, status, IE | DE | ZE) {
        put(x, 0, a);
    }
}

/// D8, DC, DE with a register: ST(0) op ST(i), into ST(0) or ST(i), with or without a pop.
fn arithmetic_reg(x: &mut X87, opcode: u8, modrm: u8) {
    let (op, i) = (modrm >> 3 & 7, modrm & 7);
    let compare = matches!(op, 2 | 3);
    let to_sti = opcode != 0xD8 && !compare;
    let pops = if compare {
        if opcode == 0xDE && op == 3 {
            2
        } else {
            u8::from(op == 3 || opcode == 0xDE)
        }
    } else {
        u8::from(opcode == 0xDE)
    };
    if compare {
        compare_reg(x, if opcode == 0xDE && op == 3 { 1 } else { i }, false, pops);
        return;
    }
    let dst = if to_sti { i } else { 0 };
    if empty(x, 0) || empty(x, i) {
        if stack_fault(x, 0) {
            put(x, dst, F80::INDEFINITE.image());
            (0..pops).for_each(|_| pop(x));
        }
        return;
    }
    let (mut a, mut b) = (get(x, 0), get(x, i));
    let native_op = if to_sti { 0xDC } else { 0xD8 };
    let status = native(x.fcw, native_op, 0xC1 | op << 3, &mut a, &mut b);
    raise(x, status);
    if !blocked(x, status, IE | DE | ZE) {
        put(x, dst, if to_sti { b } else { a });
        (0..pops).for_each(|_| pop(x));
    }
}

/// FCOM and FUCOM with ST(i).
fn compare_reg(x: &mut X87, i: u8, unordered: bool, pops: u8) {
    if empty(x, 0) || empty(x, i) {
        let masked = stack_fault(x, 0);
        x.fsw |= C0 | C2 | C3;
        if masked {
            (0..pops).for_each(|_| pop(x));
        }
        return;
    }
    let (mut a, mut b) = (get(x, 0), get(x, i));
    let (opcode, modrm) = if unordered { (0xDD, 0xE1) } else { (0xD8, 0xD1) };
    let status = native(x.fcw, opcode, modrm, &mut a, &mut b);
    raise_cc(x, status & !C1);
    if !blocked(x, status, IE | DE) {
        (0..pops).for_each(|_| pop(x));
    }
}

/// FCOMI, FUCOMI, FCOMIP, FUCOMIP. The flags are written whether or not the exception is masked.
fn compare_flags<C: Core>(c: &mut C, i: u8, unordered: bool, pops: bool) {
    let x = &mut c.state().x87;
    let (codes, done) = if empty(x, 0) || empty(x, i) {
        (C0 | C2 | C3, stack_fault(x, 0))
    } else {
        let (mut a, mut b) = (get(x, 0), get(x, i));
        let (opcode, modrm) = if unordered { (0xDD, 0xE1) } else { (0xD8, 0xD1) };
        let status = native(x.fcw, opcode, modrm, &mut a, &mut b);
        x.fsw |= status & 0x3F;
        update_es(x);
        (status, !blocked(x, status, IE | DE))
    };
    if done && pops {
        pop(x);
    }
    c.set_flags(codes & C0 != 0, codes & C2 != 0, false, codes & C3 != 0, false, false);
}

/// FLD, FILD from memory already read.
fn load(x: &mut X87, opcode: u8, modrm: u8, operand: &mut Image) {
    if !empty(x, 7) {
        if stack_fault(x, C1) {
            push(x, F80::INDEFINITE.image());
        }
        return;
    }
    let mut value = [0; 16];
    let status = native(x.fcw, opcode, modrm, &mut value, operand);
    raise(x, status);
    if !blocked(x, status, IE | DE) {
        push(x, value);
    }
}

/// FST, FIST, FISTTP, FBSTP and the popping forms: `native_op` is the form the host runs.
fn store<C: Core>(c: &mut C, insn: &VecInsn, native_op: (u8, u8), size: usize, pops: bool) -> Done {
    let x = c.state().x87;
    let mut out = [0u8; 16];
    let mut status = IE | SF;
    if empty(&x, 0) {
        // The indefinite of the destination's type.
        match (insn.opcode, size) {
            (0xD9, _) => out[..4].copy_from_slice(&0xFFC0_0000u32.to_le_bytes()),
            (0xDD, 8) if insn.modrm >> 3 & 7 != 1 => {
                out[..8].copy_from_slice(&0xFFF8_0000_0000_0000u64.to_le_bytes())
            }
            (_, 10) => out[..10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0xC0, 0xFF, 0xFF]),
            _ => out[size - 1] = 0x80,
        }
    } else {
        let mut a = get(&x, 0);
        status = native(x.fcw, native_op.0, native_op.1, &mut a, &mut out);
    }
    let write = !blocked(&x, status, IE | OE | UE);
    if write {
        c.write(0, &out[..size])?;
    } else {
        c.check_write(0, size)?;
    }
    note(c, insn);
    let x = &mut c.state().x87;
    raise(x, status);
    if write && pops {
        pop(x);
    }
    Ok(())
}

/// Memory forms of D8..DF but the control instructions.
fn memory<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    start(c)?;
    let reg = insn.modrm >> 3 & 7;
    let modrm = reg << 3;
    let op = insn.opcode;
    let mut operand = [0u8; 16];
    if op & 1 == 0 {
        let size = match op {
            0xDC => 8,
            0xDE => 2,
            _ => 4,
        };
        c.read(0, &mut operand[..size])?;
        note(c, insn);
        arithmetic(&mut c.state().x87, op, modrm, operand);
        return Ok(());
    }
    let (size, is_load) = match (op, reg) {
        (0xD9, 0) | (0xDB, 0) => (4, true),
        (0xDD, 0) | (0xDF, 5) => (8, true),
        (0xDF, 0) => (2, true),
        (0xDF, 4) => return load_decimal(c, insn),
        (0xDB, 5) => return load_image(c, insn),
        (0xDB, 7) => return store_image(c, insn),
        (0xD9, 2 | 3) | (0xDB, 1..=3) => (4, false),
        (0xDD, 1..=3) | (0xDF, 7) => (8, false),
        (0xDF, 1..=3) => (2, false),
        (0xDF, 6) => (10, false),
        _ => return Err(Exception::UD),
    };
    if is_load {
        c.read(0, &mut operand[..size])?;
        note(c, insn);
        load(&mut c.state().x87, op, modrm, &mut operand);
        return Ok(());
    }
    // FSTP and FISTP run as FST and FIST where those exist.
    let native_reg = if reg == 3 { 2 } else { reg };
    store(c, insn, (op, native_reg << 3), size, reg != 2)
}

/// FLD m80: no exception but a stack fault.
fn load_image<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let mut value = [0; 16];
    c.read(0, &mut value[..10])?;
    note(c, insn);
    push_value(&mut c.state().x87, value);
    Ok(())
}

/// FBLD. Digits past nine, whose result is undefined (SDM vol. 2, FBLD), count as 10 to 15; no sum of eighteen of them is too
/// large to be exact.
fn load_decimal<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let mut b = [0; 16];
    c.read(0, &mut b[..10])?;
    note(c, insn);
    let digits = |sum: u64, b: &u8| sum * 100 + u64::from(b >> 4) * 10 + u64::from(b & 15);
    let value = b[..9].iter().rev().fold(0, digits);
    let zeros = value.leading_zeros();
    let exp = if value == 0 { 0 } else { 16383 + 63 - zeros as u16 };
    let mant = value.checked_shl(zeros).unwrap_or(0);
    push_value(&mut c.state().x87, F80 { neg: b[9] & 0x80 != 0, exp, mant }.image());
    Ok(())
}

fn push_value(x: &mut X87, value: Image) {
    if empty(x, 7) {
        raise(x, 0);
        push(x, value);
    } else if stack_fault(x, C1) {
        push(x, F80::INDEFINITE.image());
    }
}

/// FSTP m80.
fn store_image<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let x = c.state().x87;
    let mut status = 0;
    let mut value = get(&x, 0);
    if empty(&x, 0) {
        status = IE | SF;
        value = F80::INDEFINITE.image();
    }
    let write = !blocked(&x, status, IE);
    if write {
        c.write(0, &value[..10])?;
    } else {
        c.check_write(0, 10)?;
    }
    note(c, insn);
    let x = &mut c.state().x87;
    raise(x, status);
    if write {
        pop(x);
    }
    Ok(())
}

/// FST ST(i), FSTP ST(i).
fn store_reg(x: &mut X87, i: u8, pops: bool) {
    if empty(x, 0) {
        if !stack_fault(x, 0) {
            return;
        }
        put(x, i, F80::INDEFINITE.image());
    } else {
        raise(x, 0);
        let value = get(x, 0);
        put(x, i, value);
    }
    if pops {
        pop(x);
    }
}

fn exchange(x: &mut X87, i: u8) {
    if empty(x, 0) || empty(x, i) {
        if !stack_fault(x, 0) {
            return;
        }
        for r in [0, i] {
            if empty(x, r) {
                put(x, r, F80::INDEFINITE.image());
            }
        }
    } else {
        raise(x, 0);
    }
    let (a, b) = (get(x, 0), get(x, i));
    put(x, 0, b);
    put(x, i, a);
}

/// FLD ST(i).
fn load_reg(x: &mut X87, i: u8) {
    if empty(x, i) || !empty(x, 7) {
        let c1 = if empty(x, i) { 0 } else { C1 };
        if stack_fault(x, c1) {
            push(x, F80::INDEFINITE.image());
        }
        return;
    }
    raise(x, 0);
    let value = get(x, i);
    push(x, value);
}

fn constant(x: &mut X87, which: u8) {
    let (exp, mant, nearest_up) = CONSTANTS[which as usize];
    let inexact = !matches!(which, 0 | 6);
    let up = match x.fcw >> 10 & 3 {
        0 => nearest_up,
        2 => inexact,
        _ => false,
    };
    push_value(x, F80 { neg: false, exp, mant: mant + u64::from(up) }.image());
}

fn cmov<C: Core>(c: &mut C, insn: &VecInsn) {
    let (cf, zf, pf) = c.flags_for_fcmov();
    let condition = match insn.modrm >> 3 & 3 {
        0 => cf,
        1 => zf,
        2 => cf || zf,
        _ => pf,
    };
    let x = &mut c.state().x87;
    let i = insn.modrm & 7;
    if empty(x, 0) || empty(x, i) {
        if stack_fault(x, 0) {
            put(x, 0, F80::INDEFINITE.image());
        }
    } else if condition != (insn.opcode == 0xDB) {
        let value = get(x, i);
        put(x, 0, value);
    }
}

/// FXAM: class and sign of ST(0).
fn examine(x: &mut X87) {
    let v = F80::of(&get(x, 0));
    let mut codes = if empty(x, 0) {
        C0 | C3
    } else if v.exp == 0x7FFF && v.mant >> 63 != 0 {
        if v.is_infinite() {
            C0 | C2
        } else {
            C0
        }
    } else if v.is_nan_or_unsupported() {
        0
    } else if v.is_zero() {
        C3
    } else if v.exp == 0 {
        C2 | C3
    } else {
        C2
    };
    if v.neg {
        codes |= C1;
    }
    x.fsw = x.fsw & !CC | codes;
}

/// ST(0) alone is operand and result: FSQRT, FRNDINT; FTST compares.
fn unary(x: &mut X87, modrm: u8) {
    let test = modrm == 0xE4;
    if empty(x, 0) {
        let masked = stack_fault(x, 0);
        if test {
            x.fsw |= C0 | C2 | C3;
        } else if masked {
            put(x, 0, F80::INDEFINITE.image());
        }
        return;
    }
    let (mut a, mut b) = (get(x, 0), F80::one().image());
    let status = native(x.fcw, 0xD9, modrm, &mut a, &mut b);
    if test {
        raise_cc(x, status & !C1);
        return;
    }
    raise(x, status);
    if !blocked(x, status, IE | DE) {
        put(x, 0, a);
    }
}

/// FPREM, FPREM1, FSCALE: ST(0) from ST(0) and ST(1).
fn binary(x: &mut X87, modrm: u8) {
    if empty(x, 0) || empty(x, 1) {
        if modrm != 0xFD {
            x.fsw &= !C2;
        }
        if stack_fault(x, 0) {
            put(x, 0, F80::INDEFINITE.image());
        }
        return;
    }
    let (mut a, mut b) = (get(x, 0), get(x, 1));
    let (va, vb) = (F80::of(&a), F80::of(&b));
    let remainder = modrm != 0xFD;
    if remainder {
        if let Some(partial) = partial_remainder(va, vb) {
            // DE aside, the reduction is exact.
            let de = if vb.exp == 0 { DE } else { 0 };
            if blocked(x, de, DE) {
                raise(x, de);
                x.fsw &= !C2;
            } else {
                raise_cc(x, de | C2);
                put(x, 0, partial.image());
            }
            return;
        }
    }
    let status = native(x.fcw, 0xD9, modrm, &mut a, &mut b);
    let nan = va.is_nan_or_unsupported() || vb.is_nan_or_unsupported();
    if remainder && (nan || blocked(x, status, DE) || status & IE != 0) {
        // Without a quotient, C0 and C3 keep their values.
        raise(x, status);
        x.fsw &= !C2;
    } else if remainder {
        raise_cc(x, status);
    } else {
        raise(x, status);
    }
    if !blocked(x, status, IE | DE | ZE) {
        put(x, 0, a);
    }
}

/// The reduction of FPREM and FPREM1 when the exponents differ by 64 or more. By how much it reduces
/// is the implementation's choice between 32 and 63; ftvm takes 32 plus the difference modulo 32.
fn partial_remainder(a: F80, b: F80) -> Option<F80> {
    let special = |v: F80| v.is_nan_or_unsupported() || v.is_infinite() || v.is_zero();
    if special(a) || special(b) || a.exp == 0 {
        return None;
    }
    let shift = b.mant.leading_zeros();
    let b_exp = i32::from(b.exp.max(1)) - shift as i32;
    let divisor = u128::from(b.mant << shift);
    let difference = i32::from(a.exp) - b_exp;
    if difference < 64 {
        return None;
    }
    let n = (difference as u32 & 31) | 32;
    let rest = (u128::from(a.mant) << n) % divisor;
    // rest * 2^(difference - n) in units of b's exponent.
    if rest == 0 {
        return Some(F80 { neg: a.neg, exp: 0, mant: 0 });
    }
    let rest = rest as u64;
    let zeros = rest.leading_zeros();
    let exp = b_exp + difference - n as i32 - zeros as i32;
    Some(if exp >= 1 {
        F80 { neg: a.neg, exp: exp as u16, mant: rest << zeros }
    } else {
        F80 { neg: a.neg, exp: 0, mant: (rest << zeros) >> (1 - exp).min(63) }
    })
}

fn extract(x: &mut X87) {
    if empty(x, 0) || !empty(x, 7) {
        let c1 = if empty(x, 0) { 0 } else { C1 };
        if stack_fault(x, c1) {
            put(x, 0, F80::INDEFINITE.image());
            push(x, F80::INDEFINITE.image());
        }
        return;
    }
    let (mut a, mut b) = (get(x, 0), F80::one().image());
    let status = native(x.fcw, 0xD9, 0xF4, &mut a, &mut b);
    raise(x, status);
    if !blocked(x, status, IE | DE | ZE) {
        put(x, 0, b);
        push(x, a);
    }
}

/// NaN and unsupported operands: the host's addition applies the x87 rules for them.
fn propagate(x: &mut X87, a: Image, b: Image) -> Outcome {
    let (mut a, mut b) = (a, b);
    let status = native(x.fcw, 0xD8, 0xC1, &mut a, &mut b);
    Outcome { value: F80::of(&a), status }
}

/// FYL2X, FYL2XP1, FPATAN: ST(1) from ST(1) and ST(0), then pop.
fn binary_math(x: &mut X87, modrm: u8) {
    if empty(x, 0) || empty(x, 1) {
        if stack_fault(x, 0) {
            put(x, 1, F80::INDEFINITE.image());
            pop(x);
        }
        return;
    }
    let (a, b) = (get(x, 0), get(x, 1));
    let (va, vb) = (F80::of(&a), F80::of(&b));
    let out = if va.is_nan_or_unsupported() || vb.is_nan_or_unsupported() {
        propagate(x, a, b)
    } else {
        match modrm {
            0xF1 => math::fyl2x(vb, va, x.fcw),
            0xF3 => math::fpatan(vb, va, x.fcw),
            _ => math::fyl2xp1(vb, va, x.fcw),
        }
    };
    raise(x, out.status);
    if !blocked(x, out.status, IE | DE | ZE) {
        put(x, 1, out.value.image());
        pop(x);
    }
}

/// F2XM1, FSIN, FCOS, FSINCOS, FPTAN.
fn unary_math(x: &mut X87, modrm: u8) {
    let pushes = matches!(modrm, 0xF2 | 0xFB);
    if empty(x, 0) || pushes && !empty(x, 7) {
        let c1 = if empty(x, 0) { 0 } else { C1 };
        if modrm != 0xF0 {
            x.fsw &= !C2;
        }
        if stack_fault(x, c1) {
            put(x, 0, F80::INDEFINITE.image());
            if pushes {
                push(x, F80::INDEFINITE.image());
            }
        }
        return;
    }
    let a = get(x, 0);
    let v = F80::of(&a);
    let trigonometric = modrm != 0xF0;
    let (first, second) = if v.is_nan_or_unsupported() {
        let out = propagate(x, a, a);
        let value = out.value;
        (out, Some(Outcome { value, status: 0 }))
    } else if trigonometric && math::out_of_range(v) {
        x.fsw = x.fsw & !C1 | C2;
        return;
    } else {
        let fcw = x.fcw;
        match modrm {
            0xF0 => (math::f2xm1(v, fcw), None),
            0xF2 => {
                let out = math::trig(v, Trig::Tan, fcw);
                let pushed = if out.status & IE != 0 { out.value } else { F80::one() };
                (out, Some(Outcome { value: pushed, status: 0 }))
            }
            0xFE => (math::trig(v, Trig::Sin, fcw), None),
            0xFF => (math::trig(v, Trig::Cos, fcw), None),
            _ => (math::trig(v, Trig::Sin, fcw), Some(math::trig(v, Trig::Cos, fcw))),
        }
    };
    let mut status = first.status;
    if let (true, Some(s)) = (pushes, &second) {
        status = status & !C1 | s.status | if modrm == 0xF2 { status & C1 } else { 0 };
    }
    raise(x, status);
    if trigonometric {
        x.fsw &= !C2;
    }
    if blocked(x, status, IE | DE) {
        return;
    }
    put(x, 0, first.value.image());
    if let (true, Some(second)) = (pushes, second) {
        push(x, second.value.image());
    }
}

/// Register forms of D8..DF but the control instructions.
fn register<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    start(c)?;
    note(c, insn);
    let i = insn.modrm & 7;
    let reg = insn.modrm >> 3 & 7;
    match (insn.opcode, reg) {
        (0xDA | 0xDB, 0..=3) => {
            cmov(c, insn);
            return Ok(());
        }
        (0xDB | 0xDF, 5 | 6) => {
            compare_flags(c, i, reg == 5, insn.opcode == 0xDF);
            return Ok(());
        }
        _ => {}
    }
    let x = &mut c.state().x87;
    match (insn.opcode, reg) {
        (0xD8 | 0xDC | 0xDE, _) => arithmetic_reg(x, insn.opcode, insn.modrm),
        (0xD9, 0) => load_reg(x, i),
        (0xD9 | 0xDD | 0xDF, 1) => exchange(x, i),
        (0xD9, 3) => {
            // FSTPNCE: as FSTP, but an empty register is only popped.
            x.fsw &= !C1;
            if !empty(x, 0) {
                let value = get(x, 0);
                put(x, i, value);
            }
            pop(x);
        }
        (0xDD, 2 | 3) | (0xDF, 2 | 3) => store_reg(x, i, (insn.opcode, reg) != (0xDD, 2)),
        (0xDA, 5) => compare_reg(x, 1, true, 2),
        (0xDD, 4) => compare_reg(x, i, true, 0),
        (0xDD, 5) => compare_reg(x, i, true, 1),
        (0xDD | 0xDF, 0) => {
            let p = phys(x, i);
            x.tag &= !(1 << p);
            x.fsw &= !C1;
            if insn.opcode == 0xDF {
                pop(x);
            }
        }
        _ => match insn.modrm {
            0xE0 | 0xE1 => {
                if empty(x, 0) {
                    if stack_fault(x, 0) {
                        put(x, 0, F80::INDEFINITE.image());
                    }
                } else {
                    raise(x, 0);
                    let mut a = get(x, 0);
                    a[9] = if insn.modrm == 0xE0 { a[9] ^ 0x80 } else { a[9] & 0x7F };
                    put(x, 0, a);
                }
            }
            0xE4 | 0xFA | 0xFC => unary(x, insn.modrm),
            0xE5 => examine(x),
            0xE8..=0xEE => constant(x, insn.modrm - 0xE8),
            0xF0 | 0xF2 | 0xFB | 0xFE | 0xFF => unary_math(x, insn.modrm),
            0xF1 | 0xF3 | 0xF9 => binary_math(x, insn.modrm),
            0xF4 => extract(x),
            0xF5 | 0xF8 | 0xFD => binary(x, insn.modrm),
            0xF6 => {
                x.top = x.top.wrapping_sub(1) & 7;
                x.fsw &= !C1;
            }
            0xF7 => {
                x.top = (x.top + 1) & 7;
                x.fsw &= !C1;
            }
            // FNOP
            _ => {}
        },
    }
    Ok(())
}

/// FNINIT.
pub(super) fn init(s: &mut CpuState) {
    let st = s.x87.st;
    s.x87 = X87 { st, ..X87::default() };
}

/// FNCLEX, FNINIT, FNSTSW AX, and the 8087/287 relics FNENI, FNDISI, FNSETPM, which do nothing.
fn control<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    available(c)?;
    let s = c.state();
    match (insn.opcode, insn.modrm) {
        (0xDB, 0xE2) => {
            s.x87.fsw &= !0x80FF;
        }
        (0xDB, 0xE3) => init(s),
        (0xDF, _) => s.gpr[0] = s.gpr[0] & !0xFFFF | u64::from(full_fsw(&s.x87)),
        _ => {}
    }
    Ok(())
}

/// FLDCW
fn load_control<C: Core>(c: &mut C, _: &VecInsn) -> Done {
    start(c)?;
    let mut buf = [0; 2];
    c.read(0, &mut buf)?;
    let x = &mut c.state().x87;
    set_fcw(x, u16::from_le_bytes(buf));
    update_es(x);
    Ok(())
}

/// FNSTCW
fn store_control<C: Core>(c: &mut C, _: &VecInsn) -> Done {
    available(c)?;
    let fcw = c.state().x87.fcw;
    c.write(0, &fcw.to_le_bytes())
}

/// FNSTSW m16
fn store_status<C: Core>(c: &mut C, _: &VecInsn) -> Done {
    available(c)?;
    let fsw = full_fsw(&c.state().x87);
    c.write(0, &fsw.to_le_bytes())
}

pub(super) fn resolve<C: Core>(insn: &VecInsn) -> Option<Handler<C>> {
    let reg = insn.modrm >> 3 & 7;
    if insn.rm == Rm::Mem {
        return Some(match (insn.opcode, reg) {
            (0xD9, 4) => x87_env::load_env,
            (0xD9, 5) => load_control,
            (0xD9, 6) => x87_env::store_env,
            (0xD9, 7) => store_control,
            (0xDD, 4) => x87_env::restore,
            (0xDD, 6) => x87_env::save,
            (0xDD, 7) => store_status,
            (0xD9, 1) | (0xDB, 4 | 6) | (0xDD, 5) => return None,
            _ => memory,
        });
    }
    match (insn.opcode, insn.modrm) {
        (0xD9, 0xD1..=0xD7 | 0xE2 | 0xE3 | 0xE6 | 0xE7 | 0xEF) => None,
        (0xDA, 0xE0..=0xE8 | 0xEA..=0xFF) => None,
        (0xDB, 0xE0..=0xE4) => Some(control),
        (0xDB, 0xE5..=0xE7 | 0xF8..=0xFF) => None,
        (0xDD, 0xF0..=0xFF) => None,
        (0xDE, 0xD8 | 0xDA..=0xDF) => None,
        (0xDF, 0xE0) => Some(control),
        (0xDF, 0xE1..=0xE7 | 0xF8..=0xFF) => None,
        _ => Some(register),
    }
}
