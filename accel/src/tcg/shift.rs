//! Shifts and rotates. Undefined flags: see `undefined`.

use super::alu::change_rm;
use super::op::*;
use super::SoftCpu;

#[inline(always)]
fn shift<const K: u8, T: Int>(c: &mut SoftCpu, v: u64, count: u64) -> u64 {
    let bits = T::BITS as u64;
    let n = count & if bits == 64 { 63 } else { 31 };
    if n == 0 {
        return v;
    }
    let top = bits - 1;
    match K {
        // ROL, ROR
        0 | 1 => {
            let s = (n % bits) as u32;
            let r = if s == 0 {
                v
            } else if K == 0 {
                (v << s | v >> (bits as u32 - s)) & T::MASK
            } else {
                (v >> s | v << (bits as u32 - s)) & T::MASK
            };
            let cf = if K == 0 { r & 1 } else { r >> top & 1 };
            let of = if K == 0 { cf ^ (r >> top & 1) } else { (r >> top ^ r >> (top - 1)) & 1 };
            c.set_cf(cf != 0);
            c.set_of(of != 0);
            r
        }
        // RCL, RCR: through CF, bits + 1 places.
        2 | 3 => {
            let width = bits + 1;
            let s = n % width;
            let mut r = v as u128 | (c.cf() as u128) << bits;
            let mask = (1u128 << width) - 1;
            if s != 0 {
                r = if K == 2 { r << s | r >> (width - s) } else { r >> s | r << (width - s) } & mask;
            }
            let cf = r >> bits & 1 != 0;
            let r = r as u64 & T::MASK;
            let of = if K == 2 { cf != (r >> top & 1 != 0) } else { (r >> top ^ r >> (top - 1)) & 1 != 0 };
            c.set_cf(cf);
            c.set_of(of);
            r
        }
        // SHL
        4 | 6 => {
            let r = if n >= 64 { 0 } else { v << n } & T::MASK;
            let cf = n <= bits && v >> (bits - n) & 1 != 0;
            c.set_res_co::<T>(r, cf, cf != (r >> top & 1 != 0));
            r
        }
        // SHR
        5 => {
            let r = v >> n;
            let cf = v >> (n - 1) & 1 != 0;
            let of = (v >> (n - 1)) >> top & 1 != 0;
            c.set_res_co::<T>(r, cf, of);
            r
        }
        // SAR
        _ => {
            let s = T::sx(v) as i64;
            let r = (s >> n) as u64 & T::MASK;
            let cf = s >> (n - 1) & 1 != 0;
            c.set_res_co::<T>(r, cf, false);
            r
        }
    }
}

fn imm_r<const K: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.get::<T>(op.rm);
    let r = shift::<K, T>(c, v, op.imm);
    c.set::<T>(op.rm, r);
    Ok(())
}
fn imm_m<const K: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    change_rm::<T>(c, op, |c, v| shift::<K, T>(c, v, op.imm))
}
fn cl_r<const K: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.get::<T>(op.rm);
    let n = c.get::<u8>(1);
    let r = shift::<K, T>(c, v, n);
    c.set::<T>(op.rm, r);
    Ok(())
}
fn cl_m<const K: u8, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let n = c.get::<u8>(1);
    change_rm::<T>(c, op, |c, v| shift::<K, T>(c, v, n))
}

macro_rules! pick {
    ($f:ident, $k:expr, $sz:expr) => {
        match $k {
            0 => pick!(@ $f, 0, $sz),
            1 => pick!(@ $f, 1, $sz),
            2 => pick!(@ $f, 2, $sz),
            3 => pick!(@ $f, 3, $sz),
            4 | 6 => pick!(@ $f, 4, $sz),
            5 => pick!(@ $f, 5, $sz),
            _ => pick!(@ $f, 7, $sz),
        }
    };
    (@ $f:ident, $k:literal, $sz:expr) => {
        match $sz {
            1 => $f::<$k, u8> as Handler,
            2 => $f::<$k, u16>,
            4 => $f::<$k, u32>,
            _ => $f::<$k, u64>,
        }
    };
}

/// Handler of a shift by an immediate count.
pub fn by_imm(k: u8, osz: u8, reg: bool) -> Handler {
    if reg {
        pick!(imm_r, k, osz)
    } else {
        pick!(imm_m, k, osz)
    }
}
/// Handler of a shift by CL.
pub fn by_cl(k: u8, osz: u8, reg: bool) -> Handler {
    if reg {
        pick!(cl_r, k, osz)
    } else {
        pick!(cl_m, k, osz)
    }
}

fn double<T: Int>(c: &mut SoftCpu, op: &Op, count: u64, left: bool) -> R<()> {
    let bits = T::BITS;
    let n = (count & if bits == 64 { 63 } else { 31 }) as u32;
    let b = c.get::<T>(op.reg);
    if n == 0 {
        // Still an access to the operand, and a 32-bit register's upper half is cleared.
        return change_rm::<T>(c, op, |_, v| v);
    }
    change_rm::<T>(c, op, |c, v| {
        let (r, cf);
        if left {
            // v:b:v for 16 bits, v:b else.
            let wide: u128 = if bits == 16 {
                (v as u128) << 32 | (b as u128) << 16 | v as u128
            } else {
                (v as u128) << bits | b as u128
            };
            let total = if bits == 16 { 48 } else { 2 * bits };
            r = (wide >> (total - bits).wrapping_sub(n)) as u64 & T::MASK;
            cf = wide >> (total - n) & 1 != 0;
        } else {
            let wide: u128 = if bits == 16 {
                (v as u128) << 32 | (b as u128) << 16 | v as u128
            } else {
                (b as u128) << bits | v as u128
            };
            r = (wide >> n) as u64 & T::MASK;
            cf = wide >> (n - 1) & 1 != 0;
        }
        let of = (r ^ v) >> (bits - 1) & 1 != 0;
        c.set_res_co::<T>(r, cf, of);
        r
    })
}
pub fn shld_i<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    double::<T>(c, op, op.imm, true)
}
pub fn shrd_i<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    double::<T>(c, op, op.imm, false)
}
pub fn shld_cl<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    double::<T>(c, op, c.st.gpr[1], true)
}
pub fn shrd_cl<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    double::<T>(c, op, c.st.gpr[1], false)
}
