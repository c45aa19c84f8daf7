//! MXCSR and the FXSAVE and XSAVE images (SDM vol. 1, sections 10.5 and 13).

use super::sse::{sse_check, Done, FSW_ES};
use super::{Core, Handler, Map, Prefix, Rm, VecInsn};
use crate::fault::Exception;
use crate::state::{CpuState, X87};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSXSAVE: u64 = 1 << 18;
/// Writable bits of MXCSR, as the image's MXCSR_MASK tells them.
pub(super) const MXCSR_MASK: u32 = 0xFFFF;
const X87: u64 = 1;
pub(super) const SSE: u64 = 2;
pub(super) const AVX: u64 = 4;
/// Where the upper halves of the YMM registers lie in the standard format (CPUID.0DH.2).
const AVX_OFFSET: usize = 576;
/// Size of the largest image.
const IMAGE: usize = AVX_OFFSET + 256;

/// FSW as programs see it: with TOP, ES and B.
pub(super) fn full_fsw(x: &X87) -> u16 {
    x.fsw & !0x3800 | u16::from(x.top & 7) << 11
}

/// Set FSW from an image; ES and B follow from the flags and the masks.
pub(super) fn set_fsw(x: &mut X87, fsw: u16) {
    x.top = (fsw >> 11 & 7) as u8;
    x.fsw = fsw & !0x3800;
    update_es(x);
}

/// ES and B tell whether an unmasked exception is flagged.
pub(super) fn update_es(x: &mut X87) {
    x.fsw &= !(FSW_ES | 0x8000);
    if x.fsw & !x.fcw & 0x3F != 0 {
        x.fsw |= FSW_ES | 0x8000;
    }
}

/// The control word's fixed bits: bit 6 reads as one, 7 and 13..15 as zero.
pub(super) fn set_fcw(x: &mut X87, fcw: u16) {
    x.fcw = fcw & 0x1F3F | 0x40;
}

fn ldmxcsr<C: Core>(c: &mut C, _: &VecInsn) -> Done {
    sse_check(c)?;
    let mut buf = [0; 4];
    c.read(0, &mut buf)?;
    let value = u32::from_le_bytes(buf);
    if value & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    c.state().vector.mxcsr = value;
    Ok(())
}

fn stmxcsr<C: Core>(c: &mut C, _: &VecInsn) -> Done {
    sse_check(c)?;
    let value = c.state().vector.mxcsr;
    c.write(0, &value.to_le_bytes())
}

/// Bytes 0..24 and the eight registers at 32..160 of the image.
fn put_x87(s: &CpuState, image: &mut [u8], wide: bool) {
    let x = &s.x87;
    image[0..2].copy_from_slice(&x.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&full_fsw(x).to_le_bytes());
    image[4] = x.tag;
    image[5] = 0;
    image[6..8].copy_from_slice(&x.fop.to_le_bytes());
    if wide {
        image[8..16].copy_from_slice(&x.fip.to_le_bytes());
        image[16..24].copy_from_slice(&x.fdp.to_le_bytes());
    } else {
        for (at, offset, selector) in [(8, x.fip, x.fcs), (16, x.fdp, x.fds)] {
            image[at..at + 4].copy_from_slice(&(offset as u32).to_le_bytes());
            image[at + 4..at + 6].copy_from_slice(&selector.to_le_bytes());
            image[at + 6..at + 8].fill(0);
        }
    }
    for i in 0..8 {
        let at = 32 + i * 16;
        image[at..at + 10].copy_from_slice(&x.st[(i + x.top as usize) & 7][..10]);
        image[at + 10..at + 16].fill(0);
    }
}

fn word(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}
fn dword(image: &[u8], at: usize) -> u32 {
    u32::from(word(image, at)) | u32::from(word(image, at + 2)) << 16
}
fn qword(image: &[u8], at: usize) -> u64 {
    u64::from(dword(image, at)) | u64::from(dword(image, at + 4)) << 32
}

fn get_x87(s: &mut CpuState, image: &[u8], wide: bool) {
    let x = &mut s.x87;
    set_fcw(x, word(image, 0));
    set_fsw(x, word(image, 2));
    x.tag = image[4];
    x.fop = word(image, 6) & 0x7FF;
    if wide {
        x.fip = qword(image, 8);
        x.fdp = qword(image, 16);
        x.fcs = 0;
        x.fds = 0;
    } else {
        x.fip = dword(image, 8).into();
        x.fcs = word(image, 12);
        x.fdp = dword(image, 16).into();
        x.fds = word(image, 20);
    }
    for i in 0..8 {
        let at = 32 + i * 16;
        let r = &mut x.st[(i + x.top as usize) & 7];
        r[..10].copy_from_slice(&image[at..at + 10]);
    }
}

fn registers(insn: &VecInsn) -> usize {
    if insn.long {
        16
    } else {
        8
    }
}

fn wide(insn: &VecInsn) -> bool {
    insn.rex_w && insn.long
}

fn put_mxcsr(s: &CpuState, image: &mut [u8]) {
    image[24..28].copy_from_slice(&s.vector.mxcsr.to_le_bytes());
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

fn put_xmm(s: &CpuState, image: &mut [u8], count: usize) {
    for i in 0..count {
        image[160 + i * 16..176 + i * 16].copy_from_slice(&s.vector.ymm[i][..16]);
    }
}

fn get_xmm(s: &mut CpuState, image: &[u8], count: usize) {
    for i in 0..count {
        s.vector.ymm[i][..16].copy_from_slice(&image[160 + i * 16..176 + i * 16]);
    }
}

fn fx_check<C: Core>(c: &mut C) -> Done {
    if c.state().cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(Exception::NM);
    }
    c.check_align(16)
}

/// FXSAVE and FXSAVE64; the reserved bytes at the end stay as they were.
fn fxsave<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    fx_check(c)?;
    let mut image = [0u8; 416];
    let s = c.state();
    put_x87(s, &mut image, wide(insn));
    put_mxcsr(s, &mut image);
    put_xmm(s, &mut image, registers(insn));
    c.write(0, &image[..160 + 16 * registers(insn)])
}

fn fxrstor<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    fx_check(c)?;
    let mut image = [0u8; 512];
    c.read(0, &mut image)?;
    let mxcsr = dword(&image, 24);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    let s = c.state();
    get_x87(s, &image, wide(insn));
    s.vector.mxcsr = mxcsr;
    get_xmm(s, &image, registers(insn));
    Ok(())
}

/// Checks of the XSAVE family, and the requested components XCR0 & EDX:EAX.
fn xsave_check<C: Core>(c: &mut C) -> Result<u64, Exception> {
    let s = c.state();
    if s.cr4 & CR4_OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    if s.cr0 & CR0_TS != 0 {
        return Err(Exception::NM);
    }
    let requested = s.xcr0 & ((s.gpr[0] & 0xFFFF_FFFF) | s.gpr[2] << 32);
    c.check_align(64)?;
    Ok(requested)
}

/// Components that are not in their initial state. The architecture lets a processor report more;
/// ftvm reports exactly these.
fn in_use(s: &CpuState, registers: usize) -> u64 {
    let ymm = &s.vector.ymm[..registers];
    let mut mask = 0;
    if s.x87 != X87::default() {
        mask |= X87;
    }
    if ymm.iter().any(|r| r[..16] != [0; 16]) {
        mask |= SSE;
    }
    if ymm.iter().any(|r| r[16..] != [0; 16]) {
        mask |= AVX;
    }
    mask
}

/// XINUSE: the components of the processor that are not in their initial state.
pub(crate) fn components_in_use(s: &CpuState) -> u64 {
    in_use(s, 16)
}

/// Write one component's part(s) of the image.
fn write_component<C: Core>(c: &mut C, insn: &VecInsn, which: u64, avx_at: usize) -> Done {
    let mut image = [0u8; 416];
    match which {
        X87 => {
            put_x87(c.state(), &mut image, wide(insn));
            c.write(0, &image[..24])?;
            c.write(32, &image[32..160])
        }
        SSE => {
            let count = registers(insn);
            put_xmm(c.state(), &mut image, count);
            c.write(160, &image[160..160 + 16 * count])
        }
        _ => {
            let count = registers(insn);
            for i in 0..count {
                image[i * 16..i * 16 + 16].copy_from_slice(&c.state().vector.ymm[i][16..]);
            }
            c.write(avx_at as u64, &image[..16 * count])
        }
    }
}

/// XSAVE, XSAVEOPT (components in their initial state are not written) and XSAVEC (compacted). The
/// modified optimisation is not used: it would depend on what was restored before.
fn xsave<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let requested = xsave_check(c)?;
    let compact = insn.opcode == 0xC7;
    let optimise = compact || insn.modrm >> 3 & 7 == 6;
    let mut header = [0u8; 64];
    if !compact {
        c.read(512, &mut header)?;
    }
    let mut used = in_use(c.state(), registers(insn));
    if compact && c.state().vector.mxcsr != 0x1F80 {
        used |= SSE;
    }
    let write = if optimise { requested & used } else { requested };
    for which in [X87, SSE, AVX] {
        if write & which != 0 {
            write_component(c, insn, which, AVX_OFFSET)?;
        }
    }
    if requested & SSE != 0 || (requested & AVX != 0 && !compact) {
        let mut image = [0u8; 32];
        put_mxcsr(c.state(), &mut image);
        c.write(24, &image[24..32])?;
    }
    let old = qword(&header, 0);
    let bv = if compact { requested & used } else { old & !requested | requested & used };
    header[..8].copy_from_slice(&bv.to_le_bytes());
    if compact {
        header[8..16].copy_from_slice(&(requested | 1 << 63).to_le_bytes());
        c.write(512, &header[..16])
    } else {
        c.write(512, &header[..8])
    }
}

/// XRSTOR of both formats.
fn xrstor<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let requested = xsave_check(c)?;
    let mut image = [0u8; IMAGE];
    c.read(0, &mut image[..576])?;
    let xcr0 = c.state().xcr0;
    let (bv, comp) = (qword(&image, 512), qword(&image, 520));
    let compact = comp >> 63 != 0;
    let bad = if compact {
        comp & !(1 << 63) & !xcr0 != 0
            || bv & !comp != 0
            || bv >> 63 != 0
            || image[528..576].iter().any(|b| *b != 0)
    } else {
        bv & !xcr0 != 0 || image[520..536].iter().any(|b| *b != 0)
    };
    if bad {
        return Err(Exception::gp(0));
    }
    let load = requested & bv;
    let init = requested & !bv;
    let count = registers(insn);
    if load & AVX != 0 {
        let bytes = 16 * count;
        c.read(AVX_OFFSET as u64, &mut image[AVX_OFFSET..AVX_OFFSET + bytes])?;
    }
    // The standard form loads MXCSR with SSE or AVX whatever the header says; the compacted form
    // with SSE only, and initialises it when the component is absent.
    let mxcsr = dword(&image, 24);
    let load_mxcsr = if compact { load & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    if load_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    let s = c.state();
    if load_mxcsr {
        s.vector.mxcsr = mxcsr;
    } else if compact && init & SSE != 0 {
        s.vector.mxcsr = 0x1F80;
    }
    if load & X87 != 0 {
        get_x87(s, &image, wide(insn));
    } else if init & X87 != 0 {
        s.x87 = X87::default();
    }
    if load & SSE != 0 {
        get_xmm(s, &image, count);
    } else if init & SSE != 0 {
        s.vector.ymm[..count].iter_mut().for_each(|r| r[..16].fill(0));
    }
    if (load | init) & AVX != 0 {
        // Bytes that were not loaded are zero, the initial state.
        for i in 0..count {
            let at = AVX_OFFSET + i * 16;
            s.vector.ymm[i][16..].copy_from_slice(&image[at..at + 16]);
        }
    }
    Ok(())
}

pub(super) fn resolve<C: Core>(insn: &VecInsn) -> Option<Handler<C>> {
    if insn.rm != Rm::Mem || insn.map != Map::M0F || insn.prefix != Prefix::None {
        return None;
    }
    Some(match (insn.opcode, insn.modrm >> 3 & 7) {
        (0xAE, 0) => fxsave,
        (0xAE, 1) => fxrstor,
        (0xAE, 2) => ldmxcsr,
        (0xAE, 3) => stmxcsr,
        (0xAE, 4 | 6) | (0xC7, 4) => xsave,
        (0xAE, 5) => xrstor,
        _ => return None,
    })
}
