//! MMX and SSE operations that the host computes, and what surrounds them: availability checks,
//! operands, MXCSR.

use super::host::{routines, Routine};
use super::lanes::{Lanes, OE, PE, UE};
use super::table::{self, Op, Shape};
use super::{approx, dot, Core, Handler, Map, Prefix, Rm, VecInsn};
use crate::fault::Exception;
use crate::state::CpuState;

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// FSW.ES: an unmasked x87 exception is pending.
pub(super) const FSW_ES: u16 = 0x80;

pub(super) type Done = Result<(), Exception>;

/// #UD and #NM as every instruction on XMM registers checks them (SDM vol. 3, table 13-1).
#[inline]
pub(super) fn sse_check<C: Core>(c: &mut C) -> Done {
    let s = c.state();
    if s.cr0 & (CR0_EM | CR0_TS) == 0 && s.cr4 & CR4_OSFXSR != 0 {
        return Ok(());
    }
    Err(if s.cr0 & CR0_EM != 0 || s.cr4 & CR4_OSFXSR == 0 { Exception::UD } else { Exception::NM })
}

/// #UD, #NM and #MF as every MMX instruction checks them (SDM vol. 3, section 12.1 and 12.5).
#[inline]
pub(super) fn mmx_check<C: Core>(c: &mut C) -> Done {
    let s = c.state();
    if s.cr0 & CR0_EM != 0 {
        return Err(Exception::UD);
    }
    if s.cr0 & CR0_TS != 0 {
        return Err(Exception::NM);
    }
    if s.x87.fsw & FSW_ES != 0 {
        return Err(Exception::MF);
    }
    Ok(())
}

/// What every MMX instruction but EMMS does to the x87 state: TOP = 0, all registers valid.
#[inline]
pub(super) fn mmx_enter(s: &mut CpuState) {
    s.x87.top = 0;
    s.x87.tag = 0xFF;
}

#[inline]
pub(super) fn mmx_get(s: &CpuState, i: u8) -> u64 {
    let r = &s.x87.st[(i & 7) as usize];
    u64::from_le_bytes([r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]])
}

#[inline]
pub(super) fn mmx_set(s: &mut CpuState, i: u8, value: u64) {
    let r = &mut s.x87.st[(i & 7) as usize];
    r[..8].copy_from_slice(&value.to_le_bytes());
    r[8] = 0xFF;
    r[9] = 0xFF;
}

#[inline]
pub(super) fn xmm(s: &CpuState, i: u8) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&s.vector.ymm[(i & 15) as usize][..16]);
    out
}

#[inline]
pub(super) fn set_xmm(s: &mut CpuState, i: u8, value: &[u8; 16]) {
    s.vector.ymm[(i & 15) as usize][..16].copy_from_slice(value);
}

/// The source operand in xmm/m form, zero-extended when memory is shorter than a register.
#[inline]
fn xmm_source<C: Core, const SIZE: usize, const ALIGN: bool>(
    c: &mut C,
    insn: &VecInsn,
) -> Result<[u8; 16], Exception> {
    match insn.rm {
        Rm::Reg(r) => Ok(xmm(c.state(), r)),
        Rm::Mem => {
            let mut src = [0u8; 16];
            if ALIGN {
                c.check_align(16)?;
            }
            c.read(0, &mut src[..SIZE])?;
            Ok(src)
        }
    }
}

fn mmx_source<C: Core>(c: &mut C, insn: &VecInsn, size: usize) -> Result<[u8; 16], Exception> {
    let mut src = [0u8; 16];
    match insn.rm {
        Rm::Reg(r) => src[..8].copy_from_slice(&mmx_get(c.state(), r).to_le_bytes()),
        Rm::Mem => c.read(0, &mut src[..size])?,
    }
    Ok(src)
}

#[inline]
fn routine(insn: &VecInsn, variant: u8) -> Result<Routine, Exception> {
    routines().and_then(|r| r.get(insn.map, insn.prefix, insn.opcode, variant.into())).ok_or(Exception::UD)
}

/// The immediate with the bits that the operation ignores cleared.
pub(super) fn variant(insn: &VecInsn) -> u8 {
    match (insn.map, insn.opcode) {
        (Map::M0F, 0xC2) => insn.imm & 7,
        (Map::M0F, 0x70 | 0xC6) => insn.imm,
        (Map::M0F3A, 0x08..=0x0B) => insn.imm & 15,
        // INSERTPS from memory has no source lane to choose.
        (Map::M0F3A, 0x21) if insn.rm == Rm::Mem => insn.imm & 0x3F,
        (Map::M0F3A, _) => insn.imm,
        _ => 0,
    }
}

/// Run a floating-point routine under the guest's MXCSR and settle the exceptions: sticky flags
/// are set, an unmasked exception is #XM (#UD without CR4.OSXMMEXCPT) and stores nothing.
#[inline]
fn run_fp<C: Core>(
    c: &mut C,
    routine: Routine,
    dst: &mut [u8; 16],
    src: &mut [u8; 16],
    lanes: Lanes,
) -> Result<u64, Exception> {
    let guest = c.state().vector.mxcsr;
    let mut run = guest & 0xFFC0 | 0x1F80;
    if guest & 0x800 == 0 {
        // FTZ acts only while underflow is masked.
        run &= !0x8000;
    }
    let mut context = [run, 0];
    let before = (*dst, *src);
    // SAFETY: the routine reads and writes 16 bytes at most at dst and src and 8 at context.
    let out = unsafe { routine(dst.as_mut_ptr(), src.as_mut_ptr(), context.as_mut_ptr().cast()) };
    let mut flags = context[0] & 0x3F;
    let masks = guest >> 7 & 0x3F;
    if masks == 0x3F {
        c.state().vector.mxcsr = guest | flags;
        return Ok(out);
    }
    if flags & !masks & 7 != 0 {
        // An unmasked invalid, denormal or zero-divide stops the operation before it computes.
        flags &= 7;
    } else {
        if masks & UE == 0 && lanes.any_tiny(dst) {
            // Unmasked underflow is signalled for every tiny result, exact ones too.
            flags |= UE;
        }
        if flags & !masks & (OE | UE) != 0 && flags & PE != 0 {
            // Precision then tells whether the result with an unbounded exponent is inexact.
            let (mut a, mut b) = before;
            lanes.unbounded(&mut a, &mut b, dst, flags & !masks, guest & 0x40 != 0);
            context = [run, 0];
            // SAFETY: as above.
            unsafe { routine(a.as_mut_ptr(), b.as_mut_ptr(), context.as_mut_ptr().cast()) };
            flags = flags & !PE | context[0] & PE;
        }
    }
    c.state().vector.mxcsr = guest | flags;
    if flags & !masks == 0 {
        return Ok(out);
    }
    Err(if c.state().cr4 & CR4_OSXMMEXCPT != 0 { Exception::XM } else { Exception::UD })
}

fn xmm_int<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut src = xmm_source::<C, SIZE, ALIGN>(c, insn)?;
    let run = routine(insn, variant(insn))?;
    let dst = c.state().vector.ymm[(insn.reg & 15) as usize].as_mut_ptr();
    // SAFETY: the routine works on 16 bytes at each of dst and src.
    unsafe { run(dst, src.as_mut_ptr(), std::ptr::null_mut()) };
    Ok(())
}

fn xmm_fp<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut src = xmm_source::<C, SIZE, ALIGN>(c, insn)?;
    let run = routine(insn, variant(insn))?;
    let mut dst = xmm(c.state(), insn.reg);
    let first = dst;
    run_fp(c, run, &mut dst, &mut src, Lanes::of(insn))?;
    if dot::is_dot(insn) {
        dot::settle_nan(insn, c.state().vector.mxcsr, &first, &src, &mut dst);
    }
    set_xmm(c.state(), insn.reg, &dst);
    Ok(())
}

fn mmx_op<C: Core, const SIZE: usize>(c: &mut C, insn: &VecInsn) -> Done {
    mmx_check(c)?;
    let mut src = mmx_source(c, insn, SIZE)?;
    let run = routine(insn, variant(insn))?;
    let s = c.state();
    let mut dst = [0u8; 16];
    dst[..8].copy_from_slice(&mmx_get(s, insn.reg).to_le_bytes());
    // SAFETY: the routine works on 8 bytes at each of dst and src.
    unsafe { run(dst.as_mut_ptr(), src.as_mut_ptr(), std::ptr::null_mut()) };
    mmx_enter(s);
    mmx_set(s, insn.reg, low64(&dst));
    Ok(())
}

fn low64(b: &[u8; 16]) -> u64 {
    u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
}

/// CVTPI2PS and CVTPI2PD: a memory source leaves the x87 unit alone.
fn xmm_mmx<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let from_memory = insn.rm == Rm::Mem;
    if !from_memory {
        mmx_check(c)?;
    }
    let mut src = mmx_source(c, insn, 8)?;
    let run = routine(insn, 0)?;
    let mut dst = xmm(c.state(), insn.reg);
    let done = run_fp(c, run, &mut dst, &mut src, Lanes::NONE);
    if !from_memory {
        mmx_enter(c.state());
    }
    done?;
    set_xmm(c.state(), insn.reg, &dst);
    Ok(())
}

fn mmx_xmm<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    mmx_check(c)?;
    let mut src = xmm_source::<C, SIZE, ALIGN>(c, insn)?;
    let run = routine(insn, 0)?;
    let mut dst = [0u8; 16];
    // The transition to MMX state comes first: it stays when the conversion raises #XM.
    mmx_enter(c.state());
    run_fp(c, run, &mut dst, &mut src, Lanes::NONE)?;
    let s = c.state();
    mmx_set(s, insn.reg, low64(&dst));
    Ok(())
}

fn xmm_gpr<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let wide = insn.rex_w && insn.long;
    let mut src = [0u8; 16];
    match insn.rm {
        Rm::Reg(r) => {
            let value = c.state().gpr[(r & 15) as usize];
            let value = if wide { value } else { value & 0xFFFF_FFFF };
            src[..8].copy_from_slice(&value.to_le_bytes());
        }
        Rm::Mem => c.read(0, &mut src[..if wide { 8 } else { 4 }])?,
    }
    let run = routine(insn, wide.into())?;
    let mut dst = xmm(c.state(), insn.reg);
    run_fp(c, run, &mut dst, &mut src, Lanes::NONE)?;
    set_xmm(c.state(), insn.reg, &dst);
    Ok(())
}

fn gpr_xmm<C: Core, const SIZE: usize>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut src = xmm_source::<C, SIZE, false>(c, insn)?;
    let wide = insn.rex_w && insn.long;
    let run = routine(insn, wide.into())?;
    let value = run_fp(c, run, &mut [0; 16], &mut src, Lanes::NONE)?;
    c.state().gpr[(insn.reg & 15) as usize] = if wide { value } else { value & 0xFFFF_FFFF };
    Ok(())
}

pub(super) fn give_flags<C: Core>(c: &mut C, flags: u64) {
    let bit = |n: u32| flags >> n & 1 != 0;
    c.set_flags(bit(0), bit(2), bit(4), bit(6), bit(7), bit(11));
}

fn compare<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut src = xmm_source::<C, SIZE, ALIGN>(c, insn)?;
    let run = routine(insn, 0)?;
    let mut dst = xmm(c.state(), insn.reg);
    let flags = if SIZE == 16 {
        // SAFETY: PTEST's routine only reads its 16-byte operands.
        unsafe { run(dst.as_mut_ptr(), src.as_mut_ptr(), std::ptr::null_mut()) }
    } else {
        run_fp(c, run, &mut dst, &mut src, Lanes::NONE)?
    };
    give_flags(c, flags);
    Ok(())
}

fn implicit<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut src = xmm_source::<C, 16, true>(c, insn)?;
    let run = routine(insn, 0)?;
    let s = c.state();
    let mut mask = xmm(s, 0);
    let mut dst = xmm(s, insn.reg);
    // SAFETY: the routine works on 16 bytes at each argument.
    unsafe { run(dst.as_mut_ptr(), src.as_mut_ptr(), mask.as_mut_ptr()) };
    set_xmm(s, insn.reg, &dst);
    Ok(())
}

/// PCMPESTRM, PCMPESTRI, PCMPISTRM, PCMPISTRI (SDM vol. 2, section 4.1).
fn strings<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut src = xmm_source::<C, 16, false>(c, insn)?;
    let run = routine(insn, insn.imm)?;
    let wide = insn.rex_w && insn.long;
    let s = c.state();
    // Lengths saturate at 16, so a 64-bit one may be clamped to what the 32-bit form takes.
    let length = |v: u64| if wide { (v as i64).clamp(-100, 100) as i32 as u32 as u64 } else { v };
    let mut context = [length(s.gpr[0]), length(s.gpr[2])];
    let mut dst = xmm(s, insn.reg);
    // SAFETY: the routine works on 16 bytes at each argument.
    unsafe { run(dst.as_mut_ptr(), src.as_mut_ptr(), context.as_mut_ptr().cast()) };
    if insn.opcode & 1 == 0 {
        set_xmm(s, 0, &dst);
    } else {
        s.gpr[1] = context[1] & 0xFFFF_FFFF;
    }
    give_flags(c, context[0]);
    Ok(())
}

/// Groups 0F 71, 72, 73: shifts by an immediate, done as the shift by a register that counts the same.
fn shift_opcode(insn: &VecInsn) -> Option<u8> {
    let reg = insn.modrm >> 3 & 7;
    Some(match (insn.opcode, reg) {
        (0x71, 2) => 0xD1,
        (0x71, 4) => 0xE1,
        (0x71, 6) => 0xF1,
        (0x72, 2) => 0xD2,
        (0x72, 4) => 0xE2,
        (0x72, 6) => 0xF2,
        (0x73, 2) => 0xD3,
        (0x73, 6) => 0xF3,
        _ => return None,
    })
}

fn shift_imm<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    let mut count = [0u8; 16];
    count[0] = insn.imm;
    let opcode = shift_opcode(insn).ok_or(Exception::UD)?;
    let run = routine(&VecInsn { opcode, ..*insn }, 0)?;
    if insn.prefix == Prefix::P66 {
        sse_check(c)?;
        let dst = c.state().vector.ymm[(r & 15) as usize].as_mut_ptr();
        // SAFETY: the routine works on 16 bytes at each of dst and count.
        unsafe { run(dst, count.as_mut_ptr(), std::ptr::null_mut()) };
    } else {
        mmx_check(c)?;
        let s = c.state();
        let mut dst = [0u8; 16];
        dst[..8].copy_from_slice(&mmx_get(s, r).to_le_bytes());
        // SAFETY: the routine works on 8 bytes at each of dst and count.
        unsafe { run(dst.as_mut_ptr(), count.as_mut_ptr(), std::ptr::null_mut()) };
        mmx_enter(s);
        mmx_set(s, r, low64(&dst));
    }
    Ok(())
}

/// PSRLDQ and PSLLDQ.
fn shift_bytes<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    sse_check(c)?;
    let s = c.state();
    let value = u128::from_le_bytes(xmm(s, r));
    let bits = u32::from(insn.imm) * 8;
    let value = match insn.modrm >> 3 & 7 {
        3 => value.checked_shr(bits),
        _ => value.checked_shl(bits),
    };
    set_xmm(s, r, &value.unwrap_or(0).to_le_bytes());
    Ok(())
}

/// RCPPS, RCPSS, RSQRTPS, RSQRTSS: see [`approx`].
fn estimate<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let src = xmm_source::<C, SIZE, ALIGN>(c, insn)?;
    let s = c.state();
    let mut dst = xmm(s, insn.reg);
    let f = if insn.opcode == 0x52 { approx::rsqrt } else { approx::rcp };
    for (d, v) in dst.chunks_exact_mut(4).zip(src.chunks_exact(4)).take(SIZE / 4) {
        d.copy_from_slice(&f(u32::from_le_bytes([v[0], v[1], v[2], v[3]])).to_le_bytes());
    }
    set_xmm(s, insn.reg, &dst);
    Ok(())
}

pub(super) fn resolve<C: Core>(insn: &VecInsn) -> Option<Handler<C>> {
    if insn.map == Map::M0F {
        match (insn.opcode, insn.prefix) {
            (0x52 | 0x53, Prefix::None) => return Some(estimate::<C, 16, true>),
            (0x52 | 0x53, Prefix::F3) => return Some(estimate::<C, 4, false>),
            (0x73, Prefix::P66) if insn.rm != Rm::Mem && matches!(insn.modrm >> 3 & 7, 3 | 7) => {
                return Some(shift_bytes)
            }
            (0x71..=0x73, Prefix::None | Prefix::P66) => {
                return (insn.rm != Rm::Mem && shift_opcode(insn).is_some()).then_some(shift_imm)
            }
            _ => {}
        }
    }
    let op = table::lookup(insn.map, insn.prefix, insn.opcode)?;
    if !routines()?.has(insn.map, insn.prefix, insn.opcode) {
        return None;
    }
    handler(&op)
}

fn handler<C: Core>(op: &Op) -> Option<Handler<C>> {
    Some(match (op.shape, op.fp, op.size, op.align) {
        (Shape::Xmm, false, 16, _) => xmm_int::<C, 16, true>,
        (Shape::Xmm, false, 8, _) => xmm_int::<C, 8, false>,
        (Shape::Xmm, false, 4, _) => xmm_int::<C, 4, false>,
        (Shape::Xmm, false, 2, _) => xmm_int::<C, 2, false>,
        (Shape::Xmm, true, 16, _) => xmm_fp::<C, 16, true>,
        (Shape::Xmm, true, 8, _) => xmm_fp::<C, 8, false>,
        (Shape::Xmm, true, 4, _) => xmm_fp::<C, 4, false>,
        (Shape::Mmx, _, 4, _) => mmx_op::<C, 4>,
        (Shape::Mmx, _, _, _) => mmx_op::<C, 8>,
        (Shape::XmmMmx, ..) => xmm_mmx,
        (Shape::MmxXmm, _, 16, _) => mmx_xmm::<C, 16, true>,
        (Shape::MmxXmm, ..) => mmx_xmm::<C, 8, false>,
        (Shape::XmmGpr, ..) => xmm_gpr,
        (Shape::GprXmm, _, 4, _) => gpr_xmm::<C, 4>,
        (Shape::GprXmm, ..) => gpr_xmm::<C, 8>,
        (Shape::Flags, _, 4, _) => compare::<C, 4, false>,
        (Shape::Flags, _, 8, _) => compare::<C, 8, false>,
        (Shape::Flags, ..) => compare::<C, 16, true>,
        (Shape::Implicit, ..) => implicit,
        (Shape::Strings, ..) => strings,
        _ => return None,
    })
}
