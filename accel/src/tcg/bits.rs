//! Bit instructions, exchanges, BMI, ADX, CRC32.

use super::alu::{alu, change_rm, read_rm};
use super::op::*;
use super::SoftCpu;

/// BT BTS BTR BTC (0..3) on a value; returns the new value.
#[inline(always)]
fn bit<const K: u8>(c: &mut SoftCpu, v: u64, n: u64) -> u64 {
    c.set_cf(v >> n & 1 != 0);
    match K {
        0 => v,
        1 => v | 1 << n,
        2 => v & !(1 << n),
        _ => v ^ 1 << n,
    }
}
fn bt_r<const K: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let n = c.get::<T>(op.reg);
    if op.kind == K_REG {
        let n = n & (T::BITS as u64 - 1);
        let v = c.get::<T>(op.rm);
        let r = bit::<K>(c, v, n);
        if K != 0 {
            c.set::<T>(op.rm, r);
        }
        return Ok(());
    }
    // The bit number reaches beyond the operand.
    let delta = (T::sx(n) as i64 >> T::BITS.trailing_zeros()) * T::BYTES as i64;
    let mut o = *op;
    o.disp = o.disp.wrapping_add(delta);
    let n = n & (T::BITS as u64 - 1);
    let lin = c.ea(&o, T::BYTES, K != 0)?;
    if K == 0 {
        let v = c.ld::<T>(lin)?;
        bit::<K>(c, v, n);
        return Ok(());
    }
    c.rmw::<T>(lin, |c, v| bit::<K>(c, v, n))
}
fn bt_i<const K: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let n = op.imm & (T::BITS as u64 - 1);
    if K == 0 {
        let v = read_rm::<T>(c, op)?;
        bit::<K>(c, v, n);
        return Ok(());
    }
    change_rm::<T>(c, op, |c, v| bit::<K>(c, v, n))
}
macro_rules! kinds {
    ($f:ident, $k:expr, $sz:expr) => {
        match ($k, $sz) {
            (0, 2) => $f::<0, u16> as Handler,
            (0, 4) => $f::<0, u32>,
            (0, _) => $f::<0, u64>,
            (1, 2) => $f::<1, u16>,
            (1, 4) => $f::<1, u32>,
            (1, _) => $f::<1, u64>,
            (2, 2) => $f::<2, u16>,
            (2, 4) => $f::<2, u32>,
            (2, _) => $f::<2, u64>,
            (_, 2) => $f::<3, u16>,
            (_, 4) => $f::<3, u32>,
            _ => $f::<3, u64>,
        }
    };
}
/// BT family with the bit number in a register.
pub fn bt_reg(k: u8, osz: u8) -> Handler {
    kinds!(bt_r, k, osz)
}
/// BT family with an immediate.
pub fn bt_imm(k: u8, osz: u8) -> Handler {
    kinds!(bt_i, k, osz)
}

pub fn bsf<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    c.set_logic::<T>(v);
    if v != 0 {
        c.set::<T>(op.reg, v.trailing_zeros() as u64);
        zf_only(c, false);
    }
    Ok(())
}
pub fn bsr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    c.set_logic::<T>(v);
    if v != 0 {
        c.set::<T>(op.reg, 63 - v.leading_zeros() as u64);
        zf_only(c, false);
    }
    Ok(())
}
/// ZF as given, the other five clear but PF as of zero when ZF is set.
fn zf_only(c: &mut SoftCpu, zf: bool) {
    c.set_arith_flags(if zf { 0x44 } else { 0 });
}
fn count_flags(c: &mut SoftCpu, cf: bool, zf: bool) {
    c.set_arith_flags(cf as u64 | (zf as u64) << 6);
}
pub fn tzcnt<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let r = if v == 0 { T::BITS as u64 } else { v.trailing_zeros() as u64 };
    c.set::<T>(op.reg, r);
    count_flags(c, v == 0, r == 0);
    Ok(())
}
pub fn lzcnt<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let r = v.leading_zeros() as u64 - (64 - T::BITS as u64);
    c.set::<T>(op.reg, r);
    count_flags(c, v == 0, r == 0);
    Ok(())
}
pub fn popcnt<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    c.set::<T>(op.reg, v.count_ones() as u64);
    count_flags(c, false, v == 0);
    Ok(())
}

pub fn bswap(c: &mut SoftCpu, op: &Op) -> R<()> {
    match op.osz {
        8 => c.set::<u64>(op.rm, c.get::<u64>(op.rm).swap_bytes()),
        4 => c.set::<u32>(op.rm, (c.get::<u32>(op.rm) as u32).swap_bytes() as u64),
        _ => c.set::<u16>(op.rm, 0),
    }
    Ok(())
}
fn swap<T: Int>(v: u64) -> u64 {
    v.swap_bytes() >> (64 - T::BITS)
}
pub fn movbe_load<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    c.set::<T>(op.reg, swap::<T>(v));
    Ok(())
}
pub fn movbe_store<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, T::BYTES, true)?;
    let v = swap::<T>(c.get::<T>(op.reg));
    c.wr::<T>(lin, v)
}

pub fn xadd<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = c.get::<T>(op.reg);
    let mut old = 0;
    if op.kind == K_REG {
        let a = c.get::<T>(op.rm);
        let r = alu::<0, T>(c, a, b);
        c.set::<T>(op.reg, a);
        c.set::<T>(op.rm, r);
        return Ok(());
    }
    change_rm::<T>(c, op, |c, a| {
        old = a;
        alu::<0, T>(c, a, b)
    })?;
    c.set::<T>(op.reg, old);
    Ok(())
}

pub fn cmpxchg<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let acc = c.get::<T>(0);
    let new = c.get::<T>(op.reg);
    if op.kind == K_REG {
        let v = c.get::<T>(op.rm);
        alu::<7, T>(c, acc, v);
        if acc == v {
            c.set::<T>(op.rm, new);
        } else {
            c.set::<T>(0, v);
        }
        return Ok(());
    }
    let mut old = 0;
    change_rm::<T>(c, op, |c, v| {
        old = v;
        alu::<7, T>(c, acc, v);
        if acc == v {
            new
        } else {
            v
        }
    })?;
    if acc != old {
        c.set::<T>(0, old);
    }
    Ok(())
}

pub fn cmpxchg8b(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, 8, true)?;
    let expect = c.get::<u32>(0) | c.get::<u32>(2) << 32;
    let new = c.get::<u32>(3) | c.get::<u32>(1) << 32;
    let mut old = 0;
    c.rmw::<u64>(lin, |_, v| {
        old = v;
        if v == expect {
            new
        } else {
            v
        }
    })?;
    if old != expect {
        c.set::<u32>(0, old);
        c.set::<u32>(2, old >> 32);
    }
    c.set_zf(old == expect);
    Ok(())
}
pub fn cmpxchg16b(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, 16, true)?;
    if lin & 15 != 0 {
        return c.gp(0);
    }
    c.check_write(lin, 8)?;
    let lo = c.ld::<u64>(lin)?;
    let hi = c.ld::<u64>(lin + 8)?;
    let eq = lo == c.st.gpr[0] && hi == c.st.gpr[2];
    let (nl, nh) = if eq { (c.st.gpr[3], c.st.gpr[1]) } else { (lo, hi) };
    c.wr::<u64>(lin, nl)?;
    c.wr::<u64>(lin + 8, nh)?;
    if !eq {
        c.st.gpr[0] = lo;
        c.st.gpr[2] = hi;
    }
    c.set_zf(eq);
    Ok(())
}

// ADX

pub fn adcx<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = read_rm::<T>(c, op)?;
    let a = c.get::<T>(op.reg);
    let r = a as u128 + b as u128 + c.cf() as u128;
    c.set::<T>(op.reg, r as u64);
    c.set_cf(r >> T::BITS != 0);
    Ok(())
}
pub fn adox<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = read_rm::<T>(c, op)?;
    let a = c.get::<T>(op.reg);
    let r = a as u128 + b as u128 + c.of() as u128;
    c.set::<T>(op.reg, r as u64);
    c.set_of(r >> T::BITS != 0);
    Ok(())
}

// BMI; `imm` is vvvv.

pub fn andn<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = !c.get::<T>(op.imm as u8) & read_rm::<T>(c, op)?;
    c.set::<T>(op.reg, r);
    bmi_flags::<T>(c, r, false);
    Ok(())
}
/// SF and ZF from the result, CF as given, OF = AF = PF = 0.
fn bmi_flags<T: Int>(c: &mut SoftCpu, r: u64, cf: bool) {
    let r = r & T::MASK;
    c.set_arith_flags(cf as u64 | ((r == 0) as u64) << 6 | (r >> (T::BITS - 1) & 1) << 7);
}
pub fn blsr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let r = v & v.wrapping_sub(1);
    c.set::<T>(op.imm as u8, r);
    bmi_flags::<T>(c, r, v == 0);
    Ok(())
}
pub fn blsmsk<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let r = v ^ v.wrapping_sub(1);
    c.set::<T>(op.imm as u8, r);
    bmi_flags::<T>(c, r, v == 0);
    Ok(())
}
pub fn blsi<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let r = v & v.wrapping_neg();
    c.set::<T>(op.imm as u8, r);
    bmi_flags::<T>(c, r, v != 0);
    Ok(())
}
pub fn bextr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let k = c.get::<T>(op.imm as u8);
    let (start, len) = (k & 0xFF, k >> 8 & 0xFF);
    let mut r = if start >= 64 { 0 } else { v >> start };
    if len < 64 {
        r &= (1 << len) - 1;
    }
    c.set::<T>(op.reg, r);
    bmi_flags::<T>(c, r, false);
    Ok(())
}
pub fn bzhi<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let n = c.get::<u8>(op.imm as u8);
    let r = if n < T::BITS as u64 { v & ((1 << n) - 1) } else { v };
    c.set::<T>(op.reg, r);
    bmi_flags::<T>(c, r, n >= T::BITS as u64);
    Ok(())
}
pub fn pext<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let mut mask = read_rm::<T>(c, op)?;
    let v = c.get::<T>(op.imm as u8);
    let (mut r, mut k) = (0, 0);
    while mask != 0 {
        let low = mask & mask.wrapping_neg();
        r |= ((v & low != 0) as u64) << k;
        k += 1;
        mask &= mask - 1;
    }
    c.set::<T>(op.reg, r);
    Ok(())
}
pub fn pdep<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let mut mask = read_rm::<T>(c, op)?;
    let mut v = c.get::<T>(op.imm as u8);
    let mut r = 0;
    while mask != 0 {
        let low = mask & mask.wrapping_neg();
        if v & 1 != 0 {
            r |= low;
        }
        v >>= 1;
        mask &= mask - 1;
    }
    c.set::<T>(op.reg, r);
    Ok(())
}
pub fn mulx<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let r = read_rm::<T>(c, op)? as u128 * c.get::<T>(2) as u128;
    // With both destinations the same, the upper half stays.
    c.set::<T>(op.imm as u8, r as u64);
    c.set::<T>(op.reg, (r >> T::BITS) as u64);
    Ok(())
}
pub fn shlx<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let n = c.get::<T>(op.imm as u8) & (T::BITS as u64 - 1);
    c.set::<T>(op.reg, v << n);
    Ok(())
}
pub fn shrx<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let n = c.get::<T>(op.imm as u8) & (T::BITS as u64 - 1);
    c.set::<T>(op.reg, v >> n);
    Ok(())
}
pub fn sarx<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = T::sx(read_rm::<T>(c, op)?) as i64;
    let n = c.get::<T>(op.imm as u8) & (T::BITS as u64 - 1);
    c.set::<T>(op.reg, (v >> n) as u64);
    Ok(())
}
pub fn rorx<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let n = (op.imm & (T::BITS as u64 - 1)) as u32;
    let r = if n == 0 { v } else { v >> n | v << (T::BITS - n) };
    c.set::<T>(op.reg, r);
    Ok(())
}

/// CRC32 (polynomial 11EDC6F41, reflected); the destination is 32 bits wide, zero-extended.
pub fn crc32<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<T>(c, op)?;
    let mut crc = c.get::<u32>(op.reg) as u32;
    for i in 0..T::BYTES {
        crc ^= (v >> (8 * i)) as u8 as u32;
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82F6_3B78 } else { 0 };
        }
    }
    c.set::<u64>(op.reg, crc as u64);
    Ok(())
}
