//! String instructions. Each iteration of a repeated one counts as an instruction and may be interrupted.

use super::alu::alu;
use super::flags::DF;
use super::op::*;
use super::SoftCpu;

/// Run `body` once, or under REP until the count is zero, `body` says stop, or the budget is used up.
#[inline(always)]
fn repeat(c: &mut SoftCpu, op: &Op, body: impl Fn(&mut SoftCpu) -> R<bool>) -> R<()> {
    repeat_bulk(c, op, |_, _| 0, body)
}

/// As `repeat`; `bulk` may do up to the given number of iterations at once, and says how many it did.
#[inline(always)]
fn repeat_bulk(
    c: &mut SoftCpu,
    op: &Op,
    bulk: impl Fn(&mut SoftCpu, u64) -> u64,
    body: impl Fn(&mut SoftCpu) -> R<bool>,
) -> R<()> {
    if op.rep == 0 {
        body(c)?;
        return Ok(());
    }
    let mut n = c.get_sz(RCX as u8, op.asz);
    if n == 0 {
        return Ok(());
    }
    loop {
        let room = c.limit - c.position();
        let mut done = 0;
        if n > 1 && room > 1 && !c.single {
            done = bulk(c, n.min(room));
        }
        let mut go_on = true;
        if done == 0 {
            go_on = body(c)?;
            done = 1;
        }
        c.pos += done - 1;
        n -= done;
        c.set_sz(RCX as u8, op.asz, n);
        if n == 0 || !go_on {
            return Ok(());
        }
        if c.end.is_null() || c.single || c.position() + 1 >= c.limit {
            c.rep_again = true;
            c.end = std::ptr::null();
            return Ok(());
        }
        c.pos += 1;
    }
}

#[inline(always)]
fn advance<T: Int>(c: &mut SoftCpu, op: &Op, r: usize) {
    let step = if c.eflags & DF != 0 { T::BYTES.wrapping_neg() } else { T::BYTES };
    let v = c.st.gpr[r].wrapping_add(step);
    match op.asz {
        8 => c.st.gpr[r] = v,
        4 => c.set::<u32>(r as u8, v),
        _ => c.set::<u16>(r as u8, v),
    }
}
#[inline(always)]
fn src<T: Int>(c: &mut SoftCpu, op: &Op) -> R<u64> {
    let off = c.get_sz(RSI as u8, op.asz);
    let lin = c.seg_lin(op.seg as usize, off, T::BYTES, false)?;
    c.ld::<T>(lin)
}
#[inline(always)]
fn dst_lin<T: Int>(c: &mut SoftCpu, op: &Op, write: bool) -> R<u64> {
    let off = c.get_sz(RDI as u8, op.asz);
    c.seg_lin(ES, off, T::BYTES, write)
}

/// How many elements from `seg:off` on lie in one page and within 16-bit or 32-bit offsets, at most `max`;
/// and their linear address. 0: go one by one.
#[inline(always)]
fn span<T: Int>(c: &mut SoftCpu, op: &Op, seg: usize, r: usize, max: u64, write: bool) -> (u64, u64) {
    let off = c.get_sz(r as u8, op.asz);
    let wrap = match op.asz {
        2 => 0x1_0000 - off,
        4 => 0x1_0000_0000 - off,
        _ => u64::MAX,
    };
    let Ok(lin) = c.seg_lin(seg, off, T::BYTES, write) else { return (0, 0) };
    let n = max.min((4096 - (lin & 0xFFF)).min(wrap) / T::BYTES);
    if n < 2 || c.seg_lin(seg, off, n * T::BYTES, write).is_err() {
        return (0, 0);
    }
    (n, lin)
}
fn bump<T: Int>(c: &mut SoftCpu, op: &Op, r: usize, n: u64) {
    let v = c.st.gpr[r].wrapping_add(n.wrapping_mul(T::BYTES));
    c.set_sz(r as u8, op.asz, v);
}
fn movs_bulk<T: Int>(c: &mut SoftCpu, op: &Op, max: u64) -> u64 {
    if c.eflags & DF != 0 {
        return movs_bulk_down::<T>(c, op, max);
    }
    let (n, from) = span::<T>(c, op, op.seg as usize, RSI, max, false);
    let (n, to) = span::<T>(c, op, ES, RDI, n, true);
    if n == 0 {
        return 0;
    }
    let (Some(s), Some(d)) = (c.host_read(from), c.host_write(to)) else { return 0 };
    let bytes = (n * T::BYTES) as usize;
    if (d as usize).wrapping_sub(s as usize) < bytes {
        // The destination follows closely: elements repeat, as if moved one by one.
        for i in 0..n as usize {
            // SAFETY: both runs lie within their pages.
            unsafe { d.cast::<T>().add(i).write_unaligned(s.cast::<T>().add(i).read_unaligned()) };
        }
    } else {
        // SAFETY: both runs lie within their pages; `copy` bears the overlap that is left.
        unsafe { std::ptr::copy(s, d, bytes) };
    }
    bump::<T>(c, op, RSI, n);
    bump::<T>(c, op, RDI, n);
    n
}
/// As `span`, downwards from `seg:off` on; the linear address is that of the last element.
#[inline(always)]
fn span_down<T: Int>(c: &mut SoftCpu, op: &Op, seg: usize, r: usize, max: u64, write: bool) -> (u64, u64) {
    let off = c.get_sz(r as u8, op.asz);
    let Ok(lin) = c.seg_lin(seg, off, T::BYTES, write) else { return (0, 0) };
    if (lin & 0xFFF) + T::BYTES > 4096 {
        return (0, 0);
    }
    let n = max.min((lin & 0xFFF).min(off) / T::BYTES + 1);
    if n < 2 {
        return (0, 0);
    }
    let down = (n - 1) * T::BYTES;
    if c.seg_lin(seg, off - down, n * T::BYTES, write).is_err() {
        return (0, 0);
    }
    (n, lin - down)
}
fn movs_bulk_down<T: Int>(c: &mut SoftCpu, op: &Op, max: u64) -> u64 {
    let (n, _) = span_down::<T>(c, op, op.seg as usize, RSI, max, false);
    let (n, to) = span_down::<T>(c, op, ES, RDI, n, true);
    let (n, from) = span_down::<T>(c, op, op.seg as usize, RSI, n, false);
    if n == 0 {
        return 0;
    }
    let (Some(s), Some(d)) = (c.host_read(from), c.host_write(to)) else { return 0 };
    let bytes = (n * T::BYTES) as usize;
    if (s as usize).wrapping_sub(d as usize).wrapping_sub(1) < bytes {
        // The destination lies closely below: elements repeat. (Moved onto itself nothing changes.)
        return 0;
    }
    // SAFETY: both runs lie within their pages; `copy` bears the overlap that is left.
    unsafe { std::ptr::copy(s, d, bytes) };
    bump::<T>(c, op, RSI, n.wrapping_neg());
    bump::<T>(c, op, RDI, n.wrapping_neg());
    n
}
fn stos_bulk<T: Int>(c: &mut SoftCpu, op: &Op, max: u64) -> u64 {
    if c.eflags & DF != 0 {
        return 0;
    }
    let (n, to) = span::<T>(c, op, ES, RDI, max, true);
    if n == 0 {
        return 0;
    }
    let Some(d) = c.host_write(to) else { return 0 };
    let v = c.get::<T>(0);
    if v == 0 {
        // Pages are cleared often.
        // SAFETY: the run lies within its page.
        unsafe { d.write_bytes(0, (n * T::BYTES) as usize) };
    } else {
        for i in 0..n as usize {
            // SAFETY: as above.
            unsafe { d.cast::<T>().add(i).write_unaligned(T::from64(v)) };
        }
    }
    bump::<T>(c, op, RDI, n);
    n
}

pub fn movs<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    repeat_bulk(
        c,
        op,
        |c, max| movs_bulk::<T>(c, op, max),
        |c| {
            let v = src::<T>(c, op)?;
            let lin = dst_lin::<T>(c, op, true)?;
            c.wr::<T>(lin, v)?;
            advance::<T>(c, op, RSI);
            advance::<T>(c, op, RDI);
            Ok(true)
        },
    )
}
pub fn stos<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    repeat_bulk(
        c,
        op,
        |c, max| stos_bulk::<T>(c, op, max),
        |c| {
            let lin = dst_lin::<T>(c, op, true)?;
            let v = c.get::<T>(0);
            c.wr::<T>(lin, v)?;
            advance::<T>(c, op, RDI);
            Ok(true)
        },
    )
}
pub fn lods<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    repeat(c, op, |c| {
        let v = src::<T>(c, op)?;
        c.set::<T>(0, v);
        advance::<T>(c, op, RSI);
        Ok(true)
    })
}
pub fn cmps<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    repeat(c, op, |c| {
        let a = src::<T>(c, op)?;
        let lin = dst_lin::<T>(c, op, false)?;
        let b = c.ld::<T>(lin)?;
        alu::<7, T>(c, a, b);
        advance::<T>(c, op, RSI);
        advance::<T>(c, op, RDI);
        Ok(c.zf() == (op.rep == 0xF3))
    })
}
pub fn scas<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    repeat(c, op, |c| {
        let lin = dst_lin::<T>(c, op, false)?;
        let b = c.ld::<T>(lin)?;
        let a = c.get::<T>(0);
        alu::<7, T>(c, a, b);
        advance::<T>(c, op, RDI);
        Ok(c.zf() == (op.rep == 0xF3))
    })
}
pub fn ins(c: &mut SoftCpu, op: &Op) -> R<()> {
    let port = c.get::<u16>(RDX as u8) as u16;
    repeat(c, op, |c| {
        c.check_io(port, op.osz)?;
        let off = c.get_sz(RDI as u8, op.asz);
        let lin = c.seg_lin(ES, off, op.osz as u64, true)?;
        c.check_write(lin, op.osz as u64)?;
        let v = c.port_in(port, op.osz);
        c.store_sz(lin, op.osz, v as u64)?;
        step(c, op, RDI);
        Ok(true)
    })
}
pub fn outs(c: &mut SoftCpu, op: &Op) -> R<()> {
    let port = c.get::<u16>(RDX as u8) as u16;
    repeat(c, op, |c| {
        c.check_io(port, op.osz)?;
        let off = c.get_sz(RSI as u8, op.asz);
        let lin = c.seg_lin(op.seg as usize, off, op.osz as u64, false)?;
        let v = c.load_sz(lin, op.osz)?;
        c.port_out(port, op.osz, v as u32);
        step(c, op, RSI);
        Ok(true)
    })
}
fn step(c: &mut SoftCpu, op: &Op, r: usize) {
    match op.osz {
        1 => advance::<u8>(c, op, r),
        2 => advance::<u16>(c, op, r),
        _ => advance::<u32>(c, op, r),
    }
}
pub fn xlat(c: &mut SoftCpu, op: &Op) -> R<()> {
    let off = c.st.gpr[RBX].wrapping_add(c.get::<u8>(0)) & (u64::MAX >> (64 - 8 * op.asz as u32));
    let lin = c.seg_lin(op.seg as usize, off, 1, false)?;
    let v = c.ld::<u8>(lin)?;
    c.set::<u8>(0, v);
    Ok(())
}
