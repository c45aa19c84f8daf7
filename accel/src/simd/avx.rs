//! AVX, AVX2, FMA and F16C: the VEX-coded vector instructions (SDM vol. 2, section 2.3). Those that compute run as
//! the host's own instruction (see `avx_host`); moves, masked moves and gathers are done here.

use super::avx_host::{self, Form, Frame, Prepared};
use super::fxsave::{AVX, MXCSR_MASK, SSE};
use super::sse::{give_flags, Done};
use super::{approx, dot, Core, Handler, Map, Prefix, Rm, VecInsn};
use crate::fault::Exception;
use crate::state::CpuState;

const CR0_TS: u64 = 1 << 3;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;

/// What the VEX prefix says beyond what a legacy instruction has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vex {
    /// 256 bits.
    pub l: bool,
    /// The register in `vvvv`.
    pub v: u8,
}

/// #UD and #NM as every VEX-coded vector instruction checks them (SDM vol. 2, section 2.4).
fn check<C: Core>(c: &mut C) -> Done {
    let s = c.state();
    if s.cr4 & CR4_OSXSAVE == 0 || s.xcr0 & (SSE | AVX) != SSE | AVX {
        return Err(Exception::UD);
    }
    if s.cr0 & CR0_TS != 0 {
        return Err(Exception::NM);
    }
    Ok(())
}

fn vex(insn: &VecInsn) -> Vex {
    insn.vex.unwrap_or(Vex { l: false, v: 0 })
}

fn bytes(insn: &VecInsn) -> usize {
    if vex(insn).l {
        32
    } else {
        16
    }
}

fn ymm(s: &CpuState, i: u8) -> [u8; 32] {
    s.vector.ymm[(i & 15) as usize]
}

/// Write the low `len` bytes of a register and clear the rest.
fn set<C: Core>(c: &mut C, i: u8, value: &[u8; 32], len: usize) {
    let r = &mut c.state().vector.ymm[(i & 15) as usize];
    r[..len].copy_from_slice(&value[..len]);
    r[len..].fill(0);
}

/// The r/m operand: a whole register, or `len` bytes of memory followed by zeroes.
fn operand<C: Core>(c: &mut C, insn: &VecInsn, len: usize) -> Result<[u8; 32], Exception> {
    match insn.rm {
        Rm::Reg(r) => Ok(ymm(c.state(), r)),
        Rm::Mem => {
            let mut v = [0; 32];
            c.read(0, &mut v[..len])?;
            Ok(v)
        }
    }
}

/// The r/m operand of a general register's size, zero-extended.
fn general<C: Core>(c: &mut C, insn: &VecInsn, len: usize) -> Result<u64, Exception> {
    let mut v = [0; 8];
    match insn.rm {
        Rm::Reg(r) => v[..len].copy_from_slice(&c.state().gpr[(r & 15) as usize].to_le_bytes()[..len]),
        Rm::Mem => c.read(0, &mut v[..len])?,
    }
    Ok(u64::from_le_bytes(v))
}

/// Run the host's instruction; floating point under the guest's MXCSR, whose sticky flags are set. An unmasked
/// exception is #XM (#UD without CR4.OSXMMEXCPT) and stores nothing.
fn run<C: Core>(c: &mut C, p: &Prepared, frame: &mut Frame) -> Result<u64, Exception> {
    if !p.fp {
        return Ok(p.run(frame));
    }
    let guest = c.state().vector.mxcsr;
    // FTZ acts only while underflow is masked.
    let ftz = if guest & 0x800 == 0 { 0 } else { guest & 0x8000 };
    frame.mxcsr = guest & 0x7FC0 | ftz | 0x1F80;
    let out = p.run(frame);
    let mut flags = frame.mxcsr & 0x3F;
    let unmasked = !(guest >> 7) & 0x3F;
    if flags & unmasked & 7 != 0 {
        // An invalid, denormal or zero-divide stops the operation before it computes.
        flags &= 7;
    }
    c.state().vector.mxcsr = guest | flags;
    if flags & unmasked == 0 {
        return Ok(out);
    }
    Err(if c.state().cr4 & CR4_OSXMMEXCPT != 0 { Exception::XM } else { Exception::UD })
}

/// [`dot`]'s rule for each 128 bits of a result.
fn settle_dot(insn: &VecInsn, mxcsr: u32, frame: &mut Frame) {
    for at in (0..bytes(insn)).step_by(16) {
        let (mut a, mut b) = ([0; 16], [0; 16]);
        a.copy_from_slice(&frame.a[at..at + 16]);
        b.copy_from_slice(&frame.b[at..at + 16]);
        dot::settle_nan(insn, mxcsr, &a, &b, &mut frame.dst[at..at + 16]);
    }
}

/// Everything that a host routine computes.
fn native<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let p = insn.host.ok_or(Exception::UD)?;
    let mut frame = Frame::default();
    let size = p.size as usize;
    match p.form {
        Form::Rvm | Form::Rm | Form::Rvmr => {
            frame.b = operand(c, insn, size)?;
            let s = c.state();
            frame.dst = ymm(s, insn.reg);
            frame.a = ymm(s, vex(insn).v);
            frame.d = ymm(s, insn.imm >> 4 & if insn.long { 15 } else { 7 });
            run(c, &p, &mut frame)?;
            if dot::is_dot(insn) {
                settle_dot(insn, c.state().vector.mxcsr, &mut frame);
            }
            c.state().vector.ymm[(insn.reg & 15) as usize] = frame.dst;
        }
        Form::Vmi => {
            frame.b = operand(c, insn, size)?;
            run(c, &p, &mut frame)?;
            c.state().vector.ymm[(vex(insn).v & 15) as usize] = frame.dst;
        }
        Form::Mr => {
            frame.b = ymm(c.state(), insn.reg);
            if insn.rm == Rm::Mem {
                c.check_write(0, size)?;
            }
            run(c, &p, &mut frame)?;
            match insn.rm {
                Rm::Reg(r) => c.state().vector.ymm[(r & 15) as usize] = frame.dst,
                Rm::Mem => c.write(0, &frame.dst[..size])?,
            }
        }
        Form::Flags => {
            frame.b = operand(c, insn, size)?;
            frame.a = ymm(c.state(), insn.reg);
            let flags = run(c, &p, &mut frame)?;
            give_flags(c, flags);
        }
        Form::ToGpr => {
            frame.b = operand(c, insn, size)?;
            let value = run(c, &p, &mut frame)?;
            c.state().gpr[(insn.reg & 15) as usize] = value;
        }
        Form::FromGpr => {
            frame.general[0] = general(c, insn, size)?;
            frame.a = ymm(c.state(), vex(insn).v);
            run(c, &p, &mut frame)?;
            c.state().vector.ymm[(insn.reg & 15) as usize] = frame.dst;
        }
        Form::ExtractGpr => {
            frame.b = ymm(c.state(), insn.reg);
            let value = run(c, &p, &mut frame)?;
            match insn.rm {
                Rm::Reg(r) => c.state().gpr[(r & 15) as usize] = value,
                Rm::Mem => c.write(0, &value.to_le_bytes()[..size])?,
            }
        }
        Form::Strings => {
            frame.b = operand(c, insn, 16)?;
            let s = c.state();
            // Lengths saturate at 16, so a 64-bit one may be clamped to what the 32-bit form takes.
            let wide = insn.rex_w && insn.long;
            let length = |v: u64| if wide { (v as i64).clamp(-100, 100) as u64 } else { v };
            frame.general = [length(s.gpr[0]), length(s.gpr[2])];
            frame.a = ymm(s, insn.reg);
            p.run(&mut frame);
            if insn.opcode & 1 == 0 {
                c.state().vector.ymm[0] = frame.dst;
            } else {
                c.state().gpr[1] = frame.general[1] & 0xFFFF_FFFF;
            }
            give_flags(c, frame.general[0]);
        }
    }
    Ok(())
}

/// Loads of a whole register; SIZE bytes from memory, 0 for as many as the vector has.
fn load<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let len = if SIZE == 0 { bytes(insn) } else { SIZE };
    if ALIGN && insn.rm == Rm::Mem {
        c.check_align(len as u64)?;
    }
    let v = operand(c, insn, len)?;
    set(c, insn.reg, &v, len);
    Ok(())
}

fn store<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let len = if SIZE == 0 { bytes(insn) } else { SIZE };
    let v = ymm(c.state(), insn.reg);
    match insn.rm {
        Rm::Reg(r) => set(c, r, &v, len),
        Rm::Mem => {
            if ALIGN {
                c.check_align(len as u64)?;
            }
            c.write(0, &v[..len])?;
        }
    }
    Ok(())
}

/// VMOVSS and VMOVSD between registers: the low element of one, the rest of the other.
fn merge<C: Core, const SIZE: usize, const STORE: bool>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let Rm::Reg(rm) = insn.rm else { return Err(Exception::UD) };
    let (from, to) = if STORE { (insn.reg, rm) } else { (rm, insn.reg) };
    let s = c.state();
    let mut v = ymm(s, vex(insn).v);
    v[..SIZE].copy_from_slice(&ymm(s, from)[..SIZE]);
    set(c, to, &v, 16);
    Ok(())
}

/// VMOVLPS, VMOVLPD, VMOVHPS, VMOVHPD loads; register forms VMOVHLPS and VMOVLHPS.
fn load_half<C: Core, const HIGH: bool>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let mut half = [0; 8];
    match insn.rm {
        Rm::Reg(r) => half.copy_from_slice(&ymm(c.state(), r)[if HIGH { 0..8 } else { 8..16 }]),
        Rm::Mem => c.read(0, &mut half)?,
    }
    let mut v = ymm(c.state(), vex(insn).v);
    v[if HIGH { 8..16 } else { 0..8 }].copy_from_slice(&half);
    set(c, insn.reg, &v, 16);
    Ok(())
}

fn store_half<C: Core, const HIGH: bool>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let v = ymm(c.state(), insn.reg);
    c.write(0, &v[if HIGH { 8..16 } else { 0..8 }])
}

fn gpr_bytes(insn: &VecInsn) -> usize {
    if insn.rex_w && insn.long {
        8
    } else {
        4
    }
}

/// VMOVD and VMOVQ from a general register or memory.
fn from_general<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let mut v = [0; 32];
    v[..8].copy_from_slice(&general(c, insn, gpr_bytes(insn))?.to_le_bytes());
    set(c, insn.reg, &v, 16);
    Ok(())
}

fn to_general<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let (v, len) = (ymm(c.state(), insn.reg), gpr_bytes(insn));
    match insn.rm {
        Rm::Reg(r) => {
            let mut value = [0; 8];
            value[..len].copy_from_slice(&v[..len]);
            c.state().gpr[(r & 15) as usize] = u64::from_le_bytes(value);
        }
        Rm::Mem => c.write(0, &v[..len])?,
    }
    Ok(())
}

/// VZEROUPPER, and with L VZEROALL.
fn zero<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let count = if insn.long { 16 } else { 8 };
    let from = if vex(insn).l { 0 } else { 16 };
    c.state().vector.ymm[..count].iter_mut().for_each(|r| r[from..].fill(0));
    Ok(())
}

fn mxcsr<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    if insn.modrm >> 3 & 7 == 3 {
        let v = c.state().vector.mxcsr;
        return c.write(0, &v.to_le_bytes());
    }
    let mut v = [0; 4];
    c.read(0, &mut v)?;
    let v = u32::from_le_bytes(v);
    if v & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    c.state().vector.mxcsr = v;
    Ok(())
}

/// VRCPPS, VRCPSS, VRSQRTPS, VRSQRTSS: see [`approx`].
fn estimate<C: Core, const SCALAR: bool>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let all = if SCALAR { 4 } else { bytes(insn) };
    let src = operand(c, insn, all)?;
    let f = if insn.opcode == 0x52 { approx::rsqrt } else { approx::rcp };
    let mut v = if SCALAR { ymm(c.state(), vex(insn).v) } else { [0; 32] };
    for (d, x) in v.chunks_exact_mut(4).zip(src.chunks_exact(4)).take(all / 4) {
        d.copy_from_slice(&f(u32::from_le_bytes([x[0], x[1], x[2], x[3]])).to_le_bytes());
    }
    set(c, insn.reg, &v, if SCALAR { 16 } else { all });
    Ok(())
}

/// Bytes of an element of a masked move or gather.
fn element(insn: &VecInsn) -> usize {
    match insn.opcode {
        0x2C | 0x2E => 4,
        0x2D | 0x2F => 8,
        _ if insn.rex_w => 8,
        _ => 4,
    }
}

/// VMASKMOV and VPMASKMOV: elements whose mask has its top bit, no access to the others.
fn mask_load<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let (size, len) = (element(insn), bytes(insn));
    let mask = ymm(c.state(), vex(insn).v);
    let mut v = [0; 32];
    for at in (0..len).step_by(size) {
        if mask[at + size - 1] & 0x80 != 0 {
            c.read(at as u64, &mut v[at..at + size])?;
        }
    }
    set(c, insn.reg, &v, len);
    Ok(())
}

fn mask_store<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let (size, len) = (element(insn), bytes(insn));
    let (mask, v) = (ymm(c.state(), vex(insn).v), ymm(c.state(), insn.reg));
    let wanted = |at: &usize| mask[at + size - 1] & 0x80 != 0;
    for at in (0..len).step_by(size).filter(wanted) {
        c.check_write(at as u64, size)?;
    }
    for at in (0..len).step_by(size).filter(wanted) {
        c.write(at as u64, &v[at..at + size])?;
    }
    Ok(())
}

/// VGATHER and VPGATHER. `imm` holds the index register and, above it, the scale. A fault leaves the elements before
/// it done and their masks clear.
fn gather<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let (index, scale, mask) = (insn.imm & 15, insn.imm >> 4, vex(insn).v);
    let (size, wide_index) = (element(insn), insn.opcode & 1 != 0);
    let index_size = if wide_index { 8 } else { 4 };
    let count = bytes(insn) / size.max(index_size);
    let indices = ymm(c.state(), index);
    for i in 0..count {
        let top = i * size + size - 1;
        if c.state().vector.ymm[(mask & 15) as usize][top] & 0x80 != 0 {
            let mut x = [0; 8];
            x[..index_size].copy_from_slice(&indices[i * index_size..(i + 1) * index_size]);
            let mut x = u64::from_le_bytes(x);
            if !wide_index {
                x = x as i32 as u64;
            }
            let mut value = [0; 8];
            c.read(x << scale, &mut value[..size])?;
            c.state().vector.ymm[(insn.reg & 15) as usize][i * size..(i + 1) * size]
                .copy_from_slice(&value[..size]);
        }
        c.state().vector.ymm[(mask & 15) as usize][i * size..(i + 1) * size].fill(0);
    }
    let s = c.state();
    s.vector.ymm[(mask & 15) as usize].fill(0);
    s.vector.ymm[(insn.reg & 15) as usize][count * size..].fill(0);
    Ok(())
}

/// VBROADCASTF128 and VBROADCASTI128, which have no register form.
fn broadcast_half<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let mut v = [0; 32];
    c.read(0, &mut v[..16])?;
    v.copy_within(..16, 16);
    set(c, insn.reg, &v, 32);
    Ok(())
}

/// VMASKMOVDQU.
fn maskmov<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    check(c)?;
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    let (v, mask) = (ymm(c.state(), insn.reg), ymm(c.state(), r));
    for i in (0..16).filter(|i| mask[*i] & 0x80 != 0) {
        c.write_maskmov(i as u64, v[i])?;
    }
    Ok(())
}

/// Whether an opcode of map 0F38 is a gather, whose memory operand has a vector as its index.
pub(crate) fn is_gather(map: Map, opcode: u8) -> bool {
    map == Map::M0F38 && matches!(opcode, 0x90..=0x93)
}

/// What this module does itself.
fn moves<C: Core>(insn: &VecInsn) -> Option<Handler<C>> {
    use Prefix::{None as NP, F2, F3, P66};
    let v = vex(insn);
    let mem = insn.rm == Rm::Mem;
    // `vvvv` must be 1111b where no register is named there.
    let free = v.v == 0;
    let short = !v.l;
    let two = |f: Handler<C>| free.then_some(f);
    if insn.map == Map::M0F38 {
        return match (insn.opcode, insn.prefix) {
            (0x2A, P66) if mem => two(load::<C, 0, true>),
            (0x2C | 0x2D, P66) if mem && !insn.rex_w => Some(mask_load),
            (0x2E | 0x2F, P66) if mem && !insn.rex_w => Some(mask_store),
            (0x1A | 0x5A, P66) if mem && v.l && !insn.rex_w => two(broadcast_half),
            (0x8C, P66) if mem => Some(mask_load),
            (0x8E, P66) if mem => Some(mask_store),
            (0x90..=0x93, P66) if mem => {
                let index = insn.imm & 15;
                (insn.reg != index && insn.reg != v.v && index != v.v).then_some(gather)
            }
            _ => None,
        };
    }
    if insn.map != Map::M0F {
        return None;
    }
    match (insn.opcode, insn.prefix) {
        (0x10 | 0x11, NP | P66) => {
            two(if insn.opcode == 0x10 { load::<C, 0, false> } else { store::<C, 0, false> })
        }
        (0x10, F3) if mem => two(load::<C, 4, false>),
        (0x10, F2) if mem => two(load::<C, 8, false>),
        (0x10, F3) => Some(merge::<C, 4, false>),
        (0x10, F2) => Some(merge::<C, 8, false>),
        (0x11, F3) if mem => two(store::<C, 4, false>),
        (0x11, F2) if mem => two(store::<C, 8, false>),
        (0x11, F3) => Some(merge::<C, 4, true>),
        (0x11, F2) => Some(merge::<C, 8, true>),
        (0x12, NP) if short => Some(load_half::<C, false>),
        (0x12, P66) if short && mem => Some(load_half::<C, false>),
        (0x16, NP) if short => Some(load_half::<C, true>),
        (0x16, P66) if short && mem => Some(load_half::<C, true>),
        (0x13, NP | P66) if short && mem => two(store_half::<C, false>),
        (0x17, NP | P66) if short && mem => two(store_half::<C, true>),
        (0x28, NP | P66) | (0x6F, P66) => two(load::<C, 0, true>),
        (0x29, NP | P66) | (0x7F, P66) => two(store::<C, 0, true>),
        (0x2B, NP | P66) | (0xE7, P66) if mem => two(store::<C, 0, true>),
        (0x6F, F3) => two(load::<C, 0, false>),
        (0xF0, F2) if mem => two(load::<C, 0, false>),
        (0x7F, F3) => two(store::<C, 0, false>),
        (0x6E, P66) if short => two(from_general),
        (0x7E, P66) if short => two(to_general),
        (0x7E, F3) if short => two(load::<C, 8, false>),
        (0xD6, P66) if short => two(store::<C, 8, false>),
        (0x77, NP) => two(zero),
        (0xAE, NP) if short && mem && matches!(insn.modrm >> 3 & 7, 2 | 3) => two(mxcsr),
        (0x52 | 0x53, NP) => two(estimate::<C, false>),
        (0x52 | 0x53, F3) => Some(estimate::<C, true>),
        (0xF7, P66) if short && !mem => two(maskmov),
        _ => None,
    }
}

/// The handler of a VEX-coded instruction; fills [`VecInsn::host`] where a host routine computes it.
pub(crate) fn resolve<C: Core>(insn: &mut VecInsn) -> Option<Handler<C>> {
    if let Some(f) = moves(insn) {
        return Some(f);
    }
    insn.host = Some(avx_host::prepare(insn)?);
    Some(native)
}
