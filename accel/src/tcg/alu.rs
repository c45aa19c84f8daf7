//! Integer arithmetic and logic.

use super::flags::{AF, CF, DF, OF};
use super::op::*;
use super::undefined;
use super::SoftCpu;
use crate::Exception;

/// Column of the handler tables for an operand size.
pub fn size_index(osz: u8) -> usize {
    match osz {
        1 => 0,
        2 => 1,
        4 => 2,
        _ => 3,
    }
}

/// ADD OR ADC SBB AND SUB XOR CMP, by ModRM.reg's numbering. Operands are zero-extended.
#[inline(always)]
pub fn alu<const O: u8, T: Int>(c: &mut SoftCpu, a: u64, b: u64) -> u64 {
    match O {
        0 | 2 => {
            let cin = if O == 2 { c.cf() as u64 } else { 0 };
            let r = a.wrapping_add(b).wrapping_add(cin);
            c.set_arith::<T>(r, (a & b) | ((a | b) & !r));
            r
        }
        3 | 5 | 7 => {
            let bin = if O == 3 { c.cf() as u64 } else { 0 };
            let r = a.wrapping_sub(b).wrapping_sub(bin);
            c.set_arith::<T>(r, (!a & b) | ((!a | b) & r));
            r
        }
        _ => {
            let r = match O {
                1 => a | b,
                4 => a & b,
                _ => a ^ b,
            };
            c.set_logic::<T>(r);
            r
        }
    }
}

fn rr<const O: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = alu::<O, T>(c, c.get::<T>(op.rm), c.get::<T>(op.reg));
    if O != 7 {
        c.set::<T>(op.rm, r);
    }
    Ok(())
}
fn ri<const O: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = alu::<O, T>(c, c.get::<T>(op.rm), op.imm & T::MASK);
    if O != 7 {
        c.set::<T>(op.rm, r);
    }
    Ok(())
}
fn rm<const O: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, T::BYTES, false)?;
    let b = c.ld::<T>(lin)?;
    let r = alu::<O, T>(c, c.get::<T>(op.reg), b);
    if O != 7 {
        c.set::<T>(op.reg, r);
    }
    Ok(())
}
fn mr<const O: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = c.get::<T>(op.reg);
    to_mem::<O, T>(c, op, b)
}
fn mi<const O: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    to_mem::<O, T>(c, op, op.imm & T::MASK)
}
#[inline(always)]
fn to_mem<const O: u8, T: Int>(c: &mut SoftCpu, op: &Op, b: u64) -> R<()> {
    let lin = c.ea(op, T::BYTES, O != 7)?;
    if O == 7 {
        let a = c.ld::<T>(lin)?;
        alu::<O, T>(c, a, b);
        Ok(())
    } else {
        c.rmw::<T>(lin, |c, a| alu::<O, T>(c, a, b))
    }
}

macro_rules! table {
    ($f:ident) => {
        [table!($f 0), table!($f 1), table!($f 2), table!($f 3), table!($f 4), table!($f 5), table!($f 6), table!($f 7)]
    };
    ($f:ident $o:literal) => { [$f::<$o, u8> as Handler, $f::<$o, u16>, $f::<$o, u32>, $f::<$o, u64>] };
}
pub static RR: [[Handler; 4]; 8] = table!(rr);
pub static RI: [[Handler; 4]; 8] = table!(ri);
pub static RM: [[Handler; 4]; 8] = table!(rm);
pub static MR: [[Handler; 4]; 8] = table!(mr);
pub static MI: [[Handler; 4]; 8] = table!(mi);

macro_rules! cmov {
    ($($c:literal)*) => { [$([cmov::<$c, u16> as Handler, cmov::<$c, u16>, cmov::<$c, u32>, cmov::<$c, u64>]),*] };
}
pub static CMOV: [[Handler; 4]; 16] = cmov!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// Read the r/m operand.
#[inline(always)]
pub fn read_rm<T: Int>(c: &mut SoftCpu, op: &Op) -> R<u64> {
    if op.kind == K_REG {
        return Ok(c.get::<T>(op.rm));
    }
    let lin = c.ea(op, T::BYTES, false)?;
    c.ld::<T>(lin)
}

/// Change the r/m operand.
#[inline(always)]
pub fn change_rm<T: Int>(c: &mut SoftCpu, op: &Op, f: impl FnOnce(&mut SoftCpu, u64) -> u64) -> R<()> {
    if op.kind == K_REG {
        let v = c.get::<T>(op.rm);
        let r = f(c, v);
        c.set::<T>(op.rm, r);
        return Ok(());
    }
    let lin = c.ea(op, T::BYTES, true)?;
    c.rmw::<T>(lin, f)
}

fn cmov<const C: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    // A 32-bit destination's upper half is cleared either way.
    let v = if c.cond::<C>() { v } else { c.get::<T>(op.reg) };
    c.set::<T>(op.reg, v);
    Ok(())
}

pub fn test_rr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = c.get::<T>(op.rm) & c.get::<T>(op.reg);
    c.set_logic::<T>(r);
    Ok(())
}
pub fn test_mr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = read_rm::<T>(c, op)? & c.get::<T>(op.reg);
    c.set_logic::<T>(r);
    Ok(())
}
pub fn test_ri<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = c.get::<T>(op.rm) & op.imm & T::MASK;
    c.set_logic::<T>(r);
    Ok(())
}
pub fn test_mi<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = read_rm::<T>(c, op)? & op.imm & T::MASK;
    c.set_logic::<T>(r);
    Ok(())
}

#[inline(always)]
fn inc<T: Int>(c: &mut SoftCpu, a: u64) -> u64 {
    let cf = c.cf();
    let r = a.wrapping_add(1);
    c.set_arith::<T>(r, a & !r);
    c.set_cf(cf);
    r
}
#[inline(always)]
fn dec<T: Int>(c: &mut SoftCpu, a: u64) -> u64 {
    let cf = c.cf();
    let r = a.wrapping_sub(1);
    c.set_arith::<T>(r, !a & r);
    c.set_cf(cf);
    r
}
pub fn inc_r<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.get::<T>(op.rm);
    let r = inc::<T>(c, v);
    c.set::<T>(op.rm, r);
    Ok(())
}
pub fn dec_r<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.get::<T>(op.rm);
    let r = dec::<T>(c, v);
    c.set::<T>(op.rm, r);
    Ok(())
}
pub fn inc_m<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    change_rm::<T>(c, op, inc::<T>)
}
pub fn dec_m<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    change_rm::<T>(c, op, dec::<T>)
}
pub fn not<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    change_rm::<T>(c, op, |_, v| !v)
}
pub fn neg<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    change_rm::<T>(c, op, |c, v| alu::<5, T>(c, 0, v))
}

pub fn mul<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = read_rm::<T>(c, op)?;
    let r = c.get::<T>(0) as u128 * b as u128;
    let hi = (r >> T::BITS) as u64 & T::MASK;
    if T::BITS == 8 {
        c.set::<u16>(0, r as u64);
    } else {
        c.set::<T>(0, r as u64);
        c.set::<T>(2, hi);
    }
    undefined::mul_flags::<T>(c, r as u64, hi != 0);
    Ok(())
}
pub fn imul<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = read_rm::<T>(c, op)?;
    let r = (T::sx(c.get::<T>(0)) as i64 as i128) * (T::sx(b) as i64 as i128);
    if T::BITS == 8 {
        c.set::<u16>(0, r as u64);
    } else {
        c.set::<T>(0, r as u64);
        c.set::<T>(2, (r >> T::BITS) as u64);
    }
    let over = T::sx(r as u64) as i64 as i128 != r;
    undefined::mul_flags::<T>(c, r as u64, over);
    Ok(())
}
#[inline(always)]
fn imul_two<T: Int>(c: &mut SoftCpu, op: &Op, a: u64, b: u64) {
    let r = (T::sx(a) as i64 as i128) * (T::sx(b) as i64 as i128);
    c.set::<T>(op.reg, r as u64);
    let over = T::sx(r as u64) as i64 as i128 != r;
    undefined::mul_flags::<T>(c, r as u64, over);
}
pub fn imul2<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = read_rm::<T>(c, op)?;
    let a = c.get::<T>(op.reg);
    imul_two::<T>(c, op, a, b);
    Ok(())
}
pub fn imul3<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let a = read_rm::<T>(c, op)?;
    imul_two::<T>(c, op, a, op.imm);
    Ok(())
}

pub fn div<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = read_rm::<T>(c, op)? as u128;
    let a = if T::BITS == 8 {
        c.get::<u16>(0) as u128
    } else {
        (c.get::<T>(2) as u128) << T::BITS | c.get::<T>(0) as u128
    };
    if b == 0 {
        return c.raise(Exception::DE);
    }
    let (q, r) = if a >> 64 == 0 {
        ((a as u64 / b as u64) as u128, (a as u64 % b as u64) as u128)
    } else {
        (a / b, a % b)
    };
    if q > T::MASK as u128 {
        return c.raise(Exception::DE);
    }
    if T::BITS == 8 {
        c.set::<u16>(0, q as u64 | (r as u64) << 8);
    } else {
        c.set::<T>(0, q as u64);
        c.set::<T>(2, r as u64);
    }
    Ok(())
}
pub fn idiv<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = T::sx(read_rm::<T>(c, op)?) as i64 as i128;
    let a = if T::BITS == 8 {
        c.get::<u16>(0) as i16 as i128
    } else if T::BITS == 64 {
        ((c.get::<T>(2) as u128) << 64 | c.get::<T>(0) as u128) as i128
    } else {
        ((c.get::<T>(2) << T::BITS | c.get::<T>(0)) << (64 - 2 * T::BITS)) as i64 as i128
            >> (64 - 2 * T::BITS)
    };
    if b == 0 {
        return c.raise(Exception::DE);
    }
    // The one overflow of i128 division itself is far outside 64 bits.
    let (q, r) = (a.wrapping_div(b), a.wrapping_rem(b));
    if T::sx(q as u64) as i64 as i128 != q {
        return c.raise(Exception::DE);
    }
    if T::BITS == 8 {
        c.set::<u16>(0, q as u64 & 0xFF | (r as u64 & 0xFF) << 8);
    } else {
        c.set::<T>(0, q as u64);
        c.set::<T>(2, r as u64);
    }
    Ok(())
}

/// CBW, CWDE, CDQE.
pub fn cbw(c: &mut SoftCpu, op: &Op) -> R<()> {
    match op.osz {
        2 => c.set::<u16>(0, c.st.gpr[0] as i8 as u64),
        4 => c.set::<u32>(0, c.st.gpr[0] as i16 as u64),
        _ => c.set::<u64>(0, c.st.gpr[0] as i32 as i64 as u64),
    }
    Ok(())
}
/// CWD, CDQ, CQO.
pub fn cwd(c: &mut SoftCpu, op: &Op) -> R<()> {
    let a = c.st.gpr[0];
    match op.osz {
        2 => c.set::<u16>(2, (a as i16 >> 15) as u64),
        4 => c.set::<u32>(2, (a as i32 >> 31) as u64),
        _ => c.set::<u64>(2, (a as i64 >> 63) as u64),
    }
    Ok(())
}

pub fn clc(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.set_cf(false);
    Ok(())
}
pub fn stc(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.set_cf(true);
    Ok(())
}
pub fn cmc(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.set_cf(!c.cf());
    Ok(())
}
pub fn cld(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.eflags &= !DF;
    Ok(())
}
pub fn std(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.eflags |= DF;
    Ok(())
}
/// SALC (undocumented): AL = CF ? FF : 0.
pub fn salc(c: &mut SoftCpu, _: &Op) -> R<()> {
    let v = if c.cf() { 0xFF } else { 0 };
    c.set::<u8>(0, v);
    Ok(())
}

// Decimal adjustment. OF and the others that are undefined: see `undefined`.

pub fn daa(c: &mut SoftCpu, _: &Op) -> R<()> {
    decimal(c, false)
}
pub fn das(c: &mut SoftCpu, _: &Op) -> R<()> {
    decimal(c, true)
}
fn decimal(c: &mut SoftCpu, sub: bool) -> R<()> {
    let old = c.get::<u8>(0) as u8;
    let old_cf = c.cf();
    let mut al = old;
    let mut cf = false;
    let mut af = false;
    if al & 15 > 9 || c.af() {
        let (v, o) = if sub { al.overflowing_sub(6) } else { al.overflowing_add(6) };
        al = v;
        cf = old_cf || o;
        af = true;
    }
    if old > 0x99 || old_cf {
        al = if sub { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        cf = true;
    }
    c.set::<u8>(0, al as u64);
    c.set_logic::<u8>(al as u64);
    let f = c.arith_flags() & !(CF | AF | OF) | if cf { CF } else { 0 } | if af { AF } else { 0 };
    c.set_arith_flags(f);
    Ok(())
}
pub fn aaa(c: &mut SoftCpu, _: &Op) -> R<()> {
    ascii(c, false)
}
pub fn aas(c: &mut SoftCpu, _: &Op) -> R<()> {
    ascii(c, true)
}
fn ascii(c: &mut SoftCpu, sub: bool) -> R<()> {
    let ax = c.get::<u16>(0) as u16;
    let adjust = ax & 15 > 9 || c.af();
    let mut v = ax;
    if adjust {
        v = if sub { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) };
    }
    v &= 0xFF0F;
    c.set::<u16>(0, v as u64);
    undefined::ascii_flags(c, v as u8, adjust);
    Ok(())
}
pub fn aam(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = op.imm as u8;
    if b == 0 {
        return c.raise(Exception::DE);
    }
    let al = c.get::<u8>(0) as u8;
    c.set::<u16>(0, ((al / b) as u64) << 8 | (al % b) as u64);
    c.set_logic::<u8>((al % b) as u64);
    Ok(())
}
pub fn aad(c: &mut SoftCpu, op: &Op) -> R<()> {
    let ax = c.get::<u16>(0);
    let al = (ax & 0xFF).wrapping_add((ax >> 8).wrapping_mul(op.imm)) & 0xFF;
    c.set::<u16>(0, al);
    c.set_logic::<u8>(al);
    Ok(())
}
