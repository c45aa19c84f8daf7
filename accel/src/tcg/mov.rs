//! Moves, stack instructions, LEA, segment register moves, ENTER and LEAVE.

use super::alu::{change_rm, read_rm};
use super::flags::*;
use super::op::*;
use super::SoftCpu;
use crate::Exception;

pub fn mov_rr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.get::<T>(op.reg);
    c.set::<T>(op.rm, v);
    Ok(())
}
pub fn mov_mr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, T::BYTES, true)?;
    let v = c.get::<T>(op.reg);
    c.wr::<T>(lin, v)
}
pub fn mov_rm<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, T::BYTES, false)?;
    let v = c.ld::<T>(lin)?;
    c.set::<T>(op.reg, v);
    Ok(())
}
pub fn mov_ri<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.set::<T>(op.rm, op.imm);
    Ok(())
}
pub fn mov_mi<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, T::BYTES, true)?;
    c.wr::<T>(lin, op.imm)
}
pub fn movzx<S: Int, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<S>(c, op)?;
    c.set::<T>(op.reg, v);
    Ok(())
}
pub fn movsx<S: Int, T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<S>(c, op)?;
    c.set::<T>(op.reg, S::sx(v));
    Ok(())
}
pub fn lea<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.offset(op);
    c.set::<T>(op.reg, v);
    Ok(())
}
pub fn xchg_rr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let (a, b) = (c.get::<T>(op.rm), c.get::<T>(op.reg));
    c.set::<T>(op.rm, b);
    c.set::<T>(op.reg, a);
    Ok(())
}
pub fn xchg_mr<T: Int>(c: &mut SoftCpu, op: &Op) -> R<()> {
    let b = c.get::<T>(op.reg);
    let mut old = 0;
    change_rm::<T>(c, op, |_, v| {
        old = v;
        b
    })?;
    c.set::<T>(op.reg, old);
    Ok(())
}

pub fn push_r64(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.st.gpr[(op.rm & 31) as usize];
    c.push::<u64>(v)
}
pub fn pop_r64(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.pop::<u64>()?;
    c.st.gpr[(op.rm & 31) as usize] = v;
    Ok(())
}
pub fn push_r(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.get_sz(op.rm, op.osz);
    c.push_sz(op.osz, v)
}
pub fn pop_r(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.pop_sz(op.osz)?;
    c.set_sz(op.rm, op.osz, v);
    Ok(())
}
pub fn push_i(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.push_sz(op.osz, op.imm)
}
pub fn push_m(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = if op.kind == K_REG {
        c.get_sz(op.rm, op.osz)
    } else {
        let lin = c.ea(op, op.osz as u64, false)?;
        c.load_sz(lin, op.osz)?
    };
    c.push_sz(op.osz, v)
}
pub fn pop_m(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.peek_sz(0, op.osz)?;
    if op.kind == K_REG {
        c.add_sp(op.osz as u64);
        c.set_sz(op.rm, op.osz, v);
        return Ok(());
    }
    // The address is computed with the stack pointer already moved (SDM, POP).
    let rsp = c.st.gpr[RSP];
    c.add_sp(op.osz as u64);
    let done = c.ea(op, op.osz as u64, true).and_then(|lin| c.store_sz(lin, op.osz, v));
    if done.is_err() {
        c.st.gpr[RSP] = rsp;
    }
    done
}
pub fn pusha(c: &mut SoftCpu, op: &Op) -> R<()> {
    let size = op.osz as u64;
    let rsp = c.st.gpr[RSP];
    let m = c.sp_mask;
    // All checks first: eight pushes, the lowest address last.
    for i in 1..=8u64 {
        let lin = c.seg_lin(SS, rsp.wrapping_sub(i * size) & m, size, true)?;
        c.check_write(lin, size)?;
    }
    for i in 1..=8u64 {
        let lin = c.seg_lin(SS, rsp.wrapping_sub(i * size) & m, size, true)?;
        let v = c.st.gpr[i as usize - 1];
        c.store_sz(lin, op.osz, v)?;
    }
    c.add_sp((8 * size).wrapping_neg());
    Ok(())
}
pub fn popa(c: &mut SoftCpu, op: &Op) -> R<()> {
    let size = op.osz as u64;
    let mut v = [0; 8];
    for (i, slot) in v.iter_mut().enumerate() {
        *slot = c.peek_sz(i as u64 * size, op.osz)?;
    }
    c.add_sp(8 * size);
    for (i, v) in v.iter().enumerate() {
        let r = 7 - i as u8;
        if r != 4 {
            c.set_sz(r, op.osz, *v);
        }
    }
    Ok(())
}

pub fn pushf(c: &mut SoftCpu, op: &Op) -> R<()> {
    let mut f = c.rflags() & !(VM | RF);
    if c.vm86() && c.iopl() < 3 {
        if c.st.cr4 & 1 == 0 || op.osz != 2 {
            return c.gp(0);
        }
        // VME: IF shows VIF, IOPL shows 3.
        f = f & !IF | if f & VIF != 0 { IF } else { 0 } | IOPL;
    }
    c.push_sz(op.osz, f)
}
pub fn popf(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.vm86() && c.iopl() < 3 {
        if c.st.cr4 & 1 == 0 || op.osz != 2 {
            return c.gp(0);
        }
        let v = c.peek::<u16>(0)?;
        if v & TF != 0 || v & IF != 0 && c.eflags & VIP != 0 {
            return c.gp(0);
        }
        c.add_sp(2);
        let keep = c.rflags();
        let f = keep & !0xFFFF & !VIF
            | v & 0xFFFF & !(IF | IOPL)
            | keep & (IF | IOPL)
            | if v & IF != 0 { VIF } else { 0 };
        c.set_rflags(f);
        return Ok(());
    }
    let v = c.pop_sz(op.osz)?;
    let old = c.rflags();
    let mut change = CF | PF | AF | ZF | SF | OF | TF | DF | NT;
    if op.osz != 2 {
        change |= AC | ID;
    }
    if c.cpl == 0 {
        change |= IOPL;
    }
    if c.cpl as u64 <= c.iopl() {
        change |= IF;
    }
    let mut f = old & !change | v & change;
    if op.osz != 2 {
        f &= !RF;
    }
    c.set_rflags(f);
    Ok(())
}

pub fn push_seg(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.segs[op.reg as usize].selector as u64;
    if op.osz == 4 {
        // Only the low 16 bits of the slot are written, as processors do.
        let rsp = c.st.gpr[RSP];
        let n = rsp.wrapping_sub(4) & c.sp_mask;
        let lin = c.seg_lin(SS, n, 4, true)?;
        c.wr::<u16>(lin, v)?;
        c.add_sp(4u64.wrapping_neg());
        return Ok(());
    }
    c.push_sz(op.osz, v)
}
pub fn pop_seg(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.peek::<u16>(0)?;
    c.load_seg(op.reg as usize, v as u16)?;
    c.add_sp(op.osz as u64);
    if op.reg as usize == SS {
        c.block_interrupts();
    }
    Ok(())
}
pub fn mov_from_seg(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.segs[op.reg as usize].selector as u64;
    if op.kind == K_REG {
        c.set_sz(op.rm, op.osz, v);
        return Ok(());
    }
    let lin = c.ea(op, 2, true)?;
    c.wr::<u16>(lin, v)
}
pub fn mov_to_seg(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = read_rm::<u16>(c, op)?;
    c.load_seg(op.reg as usize, v as u16)?;
    if op.reg as usize == SS {
        c.block_interrupts();
    }
    Ok(())
}
/// LES, LDS, LSS, LFS, LGS: `imm` names the segment register.
pub fn load_far(c: &mut SoftCpu, op: &Op) -> R<()> {
    let size = op.osz as u64;
    let lin = c.ea(op, size + 2, false)?;
    let off = c.load_sz(lin, op.osz)?;
    let sel = c.ld::<u16>(lin.wrapping_add(size))?;
    c.load_seg(op.imm as usize, sel as u16)?;
    c.set_sz(op.reg, op.osz, off);
    Ok(())
}

pub fn bound(c: &mut SoftCpu, op: &Op) -> R<()> {
    let size = op.osz as u64;
    let lin = c.ea(op, 2 * size, false)?;
    let (lo, hi) = (c.load_sz(lin, op.osz)?, c.load_sz(lin.wrapping_add(size), op.osz)?);
    let v = c.get_sz(op.reg, op.osz);
    let (v, lo, hi) = if op.osz == 2 {
        (v as i16 as i32, lo as i16 as i32, hi as i16 as i32)
    } else {
        (v as i32, lo as i32, hi as i32)
    };
    if v < lo || v > hi {
        return c.raise(Exception::BR);
    }
    Ok(())
}

/// ENTER: `imm` bytes of locals, nesting level in `reg`.
pub fn enter(c: &mut SoftCpu, op: &Op) -> R<()> {
    let level = op.reg & 31;
    let size = op.osz as u64;
    let rsp = c.st.gpr[RSP];
    let rbp = c.st.gpr[RBP];
    let m = c.sp_mask;
    let done = (|| {
        c.push_sz(op.osz, rbp)?;
        let frame = c.st.gpr[RSP];
        if level > 0 {
            let mut bp = rbp;
            for _ in 1..level {
                bp = bp.wrapping_sub(size);
                let lin = c.seg_lin(SS, bp & m, size, false)?;
                let v = c.load_sz(lin, op.osz)?;
                c.push_sz(op.osz, v)?;
            }
            c.push_sz(op.osz, frame)?;
        }
        c.add_sp(op.imm.wrapping_neg());
        // The new top of the stack must be writable (SDM, ENTER).
        let sp = c.st.gpr[RSP] & m;
        let lin = c.seg_lin(SS, sp, 1, true)?;
        c.check_write(lin, 1)?;
        Ok(frame)
    })();
    match done {
        Ok(frame) => {
            c.set_sz(RBP as u8, op.osz, frame);
            Ok(())
        }
        Err(f) => {
            c.st.gpr[RSP] = rsp;
            Err(f)
        }
    }
}
pub fn leave(c: &mut SoftCpu, op: &Op) -> R<()> {
    let m = c.sp_mask;
    let rsp = c.st.gpr[RSP];
    let rbp = c.st.gpr[RBP];
    c.st.gpr[RSP] = rsp & !m | rbp & m;
    match c.pop_sz(op.osz) {
        Ok(v) => {
            c.set_sz(RBP as u8, op.osz, v);
            Ok(())
        }
        Err(f) => {
            c.st.gpr[RSP] = rsp;
            Err(f)
        }
    }
}
