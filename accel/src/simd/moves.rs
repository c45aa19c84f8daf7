//! Moves between vector, MMX and general registers and memory: no arithmetic, so done here.

use super::sse::{mmx_check, mmx_enter, mmx_get, mmx_set, set_xmm, sse_check, xmm, Done};
use super::{host_supports, Core, Feature, Handler, Map, Prefix, Rm, VecInsn};
use crate::fault::Exception;

/// Load SIZE bytes; a register source gives all 16. Memory loads clear the rest of the register.
fn load<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut value = [0u8; 16];
    match insn.rm {
        Rm::Reg(r) if SIZE == 16 => value = xmm(c.state(), r),
        // MOVSS and MOVSD merge; F3 0F 7E MOVQ clears (see `movq_load`).
        Rm::Reg(r) => {
            let s = c.state();
            value = xmm(s, insn.reg);
            value[..SIZE].copy_from_slice(&xmm(s, r)[..SIZE]);
        }
        Rm::Mem => {
            if ALIGN {
                c.check_align(16)?;
            }
            c.read(0, &mut value[..SIZE])?;
        }
    }
    set_xmm(c.state(), insn.reg, &value);
    Ok(())
}

fn store<C: Core, const SIZE: usize, const ALIGN: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let value = xmm(c.state(), insn.reg);
    match insn.rm {
        Rm::Reg(r) => {
            let s = c.state();
            let mut old = xmm(s, r);
            old[..SIZE].copy_from_slice(&value[..SIZE]);
            set_xmm(s, r, &old);
        }
        Rm::Mem => {
            if ALIGN {
                c.check_align(16)?;
            }
            c.write(0, &value[..SIZE])?;
        }
    }
    Ok(())
}

/// MOVLPS/MOVLPD (HIGH false) and MOVHPS/MOVHPD loads; register forms MOVHLPS and MOVLHPS.
fn load_half<C: Core, const HIGH: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut half = [0u8; 8];
    match insn.rm {
        Rm::Reg(r) => {
            let src = xmm(c.state(), r);
            half.copy_from_slice(if HIGH { &src[..8] } else { &src[8..] });
        }
        Rm::Mem => c.read(0, &mut half)?,
    }
    let s = c.state();
    let mut value = xmm(s, insn.reg);
    let at = if HIGH { 8 } else { 0 };
    value[at..at + 8].copy_from_slice(&half);
    set_xmm(s, insn.reg, &value);
    Ok(())
}

fn store_half<C: Core, const HIGH: bool>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let value = xmm(c.state(), insn.reg);
    c.write(0, if HIGH { &value[8..] } else { &value[..8] })
}

/// MOVSLDUP, MOVSHDUP, MOVDDUP.
fn duplicate<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let double = insn.prefix == Prefix::F2;
    let mut src = [0u8; 16];
    match insn.rm {
        Rm::Reg(r) => src = xmm(c.state(), r),
        Rm::Mem if double => c.read(0, &mut src[..8])?,
        Rm::Mem => {
            c.check_align(16)?;
            c.read(0, &mut src)?;
        }
    }
    let mut out = [0u8; 16];
    for (i, b) in out.iter_mut().enumerate() {
        *b = src[match (double, insn.opcode) {
            (true, _) => i & 7,
            (false, 0x12) => i & !4,
            _ => i | 4,
        }];
    }
    set_xmm(c.state(), insn.reg, &out);
    Ok(())
}

fn wide(insn: &VecInsn) -> bool {
    insn.rex_w && insn.long
}

/// The value of a r/m32 or r/m64 source.
fn gpr_source<C: Core>(c: &mut C, insn: &VecInsn, bytes: usize) -> Result<u64, Exception> {
    let mut buf = [0u8; 8];
    match insn.rm {
        Rm::Reg(r) => {
            let all = c.state().gpr[(r & 15) as usize].to_le_bytes();
            buf[..bytes].copy_from_slice(&all[..bytes]);
        }
        Rm::Mem => c.read(0, &mut buf[..bytes])?,
    }
    Ok(u64::from_le_bytes(buf))
}

/// Store to a r/m destination: a register gets the zero-extended value, memory `bytes` of it.
fn gpr_dest<C: Core>(c: &mut C, insn: &VecInsn, value: u64, bytes: usize) -> Done {
    match insn.rm {
        Rm::Reg(r) => c.state().gpr[(r & 15) as usize] = value,
        Rm::Mem => c.write(0, &value.to_le_bytes()[..bytes])?,
    }
    Ok(())
}

fn gpr_bytes(insn: &VecInsn) -> usize {
    if wide(insn) {
        8
    } else {
        4
    }
}

/// 66 0F 6E
fn movd_to_xmm<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let value = gpr_source(c, insn, gpr_bytes(insn))?;
    set_xmm(c.state(), insn.reg, &u128::from(value).to_le_bytes());
    Ok(())
}

/// 66 0F 7E, and PEXTRD/PEXTRQ, EXTRACTPS, PEXTRB, PEXTRW (0F 3A 14..17).
fn extract<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let value = u128::from_le_bytes(xmm(c.state(), insn.reg));
    let (bytes, lanes) = match (insn.map, insn.opcode) {
        (Map::M0F, _) => (gpr_bytes(insn), 1),
        (_, 0x14) => (1, 16),
        (_, 0x15) => (2, 8),
        (_, 0x16) => (gpr_bytes(insn), 16 / gpr_bytes(insn) as u32),
        _ => (4, 4),
    };
    let lane = u32::from(insn.imm) & (lanes - 1);
    let value = (value >> (lane * bytes as u32 * 8)) as u64;
    let value = if bytes == 8 { value } else { value & ((1 << (bytes * 8)) - 1) };
    gpr_dest(c, insn, value, bytes)
}

/// PINSRW (66 0F C4), PINSRB (0F 3A 20), PINSRD/PINSRQ (0F 3A 22).
fn insert<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let bytes = match (insn.map, insn.opcode) {
        (Map::M0F, _) => 2,
        (_, 0x20) => 1,
        _ => gpr_bytes(insn),
    };
    let value = gpr_source(c, insn, bytes)?;
    let s = c.state();
    let mut dst = xmm(s, insn.reg);
    let at = (insn.imm as usize & (16 / bytes - 1)) * bytes;
    dst[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    set_xmm(s, insn.reg, &dst);
    Ok(())
}

fn insert_mmx<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    mmx_check(c)?;
    let value = gpr_source(c, insn, 2)?;
    let s = c.state();
    mmx_enter(s);
    let shift = (insn.imm & 3) * 16;
    let old = mmx_get(s, insn.reg) & !(0xFFFF << shift);
    mmx_set(s, insn.reg, old | value << shift);
    Ok(())
}

/// PEXTRW r32, mm/xmm, imm8 (0F C5).
fn extract_word<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    let value = if insn.prefix == Prefix::P66 {
        sse_check(c)?;
        (u128::from_le_bytes(xmm(c.state(), r)) >> ((insn.imm & 7) * 16)) as u16
    } else {
        mmx_check(c)?;
        mmx_enter(c.state());
        (mmx_get(c.state(), r) >> ((insn.imm & 3) * 16)) as u16
    };
    c.state().gpr[(insn.reg & 15) as usize] = value.into();
    Ok(())
}

/// MOVMSKPS, MOVMSKPD, PMOVMSKB.
fn mask<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    let signs = |bytes: &[u8], step: usize| {
        bytes.chunks_exact(step).enumerate().fold(0u64, |m, (i, b)| m | u64::from(b[step - 1] >> 7) << i)
    };
    let value = match (insn.opcode, insn.prefix) {
        (0xD7, Prefix::None) => {
            mmx_check(c)?;
            mmx_enter(c.state());
            signs(&mmx_get(c.state(), r).to_le_bytes(), 1)
        }
        (op, prefix) => {
            sse_check(c)?;
            let step = match (op, prefix) {
                (0xD7, _) => 1,
                (_, Prefix::None) => 4,
                _ => 8,
            };
            signs(&xmm(c.state(), r), step)
        }
    };
    c.state().gpr[(insn.reg & 15) as usize] = value;
    Ok(())
}

/// F3 0F 7E
fn movq_load<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut value = [0u8; 16];
    match insn.rm {
        Rm::Reg(r) => value[..8].copy_from_slice(&xmm(c.state(), r)[..8]),
        Rm::Mem => c.read(0, &mut value[..8])?,
    }
    set_xmm(c.state(), insn.reg, &value);
    Ok(())
}

/// 66 0F D6
fn movq_store<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    sse_check(c)?;
    let mut value = [0u8; 16];
    value[..8].copy_from_slice(&xmm(c.state(), insn.reg)[..8]);
    match insn.rm {
        Rm::Reg(r) => set_xmm(c.state(), r, &value),
        Rm::Mem => c.write(0, &value[..8])?,
    }
    Ok(())
}

/// MOVQ2DQ and MOVDQ2Q.
fn movq_cross<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    sse_check(c)?;
    mmx_check(c)?;
    let s = c.state();
    mmx_enter(s);
    if insn.prefix == Prefix::F3 {
        let value = u128::from(mmx_get(s, r));
        set_xmm(s, insn.reg, &value.to_le_bytes());
    } else {
        let value = u128::from_le_bytes(xmm(s, r)) as u64;
        mmx_set(s, insn.reg, value);
    }
    Ok(())
}

/// 0F 6E and 0F 6F
fn mmx_load<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    mmx_check(c)?;
    let value = if insn.opcode == 0x6E {
        gpr_source(c, insn, gpr_bytes(insn))?
    } else {
        match insn.rm {
            Rm::Reg(r) => mmx_get(c.state(), r),
            Rm::Mem => gpr_source(c, insn, 8)?,
        }
    };
    let s = c.state();
    mmx_enter(s);
    mmx_set(s, insn.reg, value);
    Ok(())
}

/// 0F 7E, 0F 7F, 0F E7
fn mmx_store<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    mmx_check(c)?;
    let value = mmx_get(c.state(), insn.reg);
    match (insn.opcode, insn.rm) {
        (0x7E, _) => {
            let bytes = gpr_bytes(insn);
            gpr_dest(c, insn, if bytes == 8 { value } else { value & 0xFFFF_FFFF }, bytes)?;
        }
        (_, Rm::Reg(r)) => mmx_set(c.state(), r, value),
        (_, Rm::Mem) => c.write(0, &value.to_le_bytes())?,
    }
    mmx_enter(c.state());
    Ok(())
}

fn emms<C: Core>(c: &mut C, _: &VecInsn) -> Done {
    mmx_check(c)?;
    let x = &mut c.state().x87;
    x.top = 0;
    x.tag = 0;
    Ok(())
}

/// MOVNTI
fn movnti<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let value = c.state().gpr[(insn.reg & 15) as usize];
    c.write(0, &value.to_le_bytes()[..gpr_bytes(insn)])
}

/// MASKMOVQ and MASKMOVDQU: bytes whose mask has the sign bit set go to DS:[rDI].
fn maskmov<C: Core>(c: &mut C, insn: &VecInsn) -> Done {
    let Rm::Reg(r) = insn.rm else { return Err(Exception::UD) };
    let (value, mask, count) = if insn.prefix == Prefix::P66 {
        sse_check(c)?;
        (xmm(c.state(), insn.reg), xmm(c.state(), r), 16)
    } else {
        mmx_check(c)?;
        let s = c.state();
        let image = |v: u64| u128::from(v).to_le_bytes();
        (image(mmx_get(s, insn.reg)), image(mmx_get(s, r)), 8)
    };
    for i in 0..count {
        if mask[i] & 0x80 != 0 {
            c.write_maskmov(i as u64, value[i])?;
        }
    }
    if insn.prefix != Prefix::P66 {
        mmx_enter(c.state());
    }
    Ok(())
}

pub(super) fn resolve<C: Core>(insn: &VecInsn) -> Option<Handler<C>> {
    use Prefix::{None as NP, F2, F3, P66};
    let mem = insn.rm == Rm::Mem;
    if insn.map == Map::M0F3A {
        let known = insn.prefix == P66
            && matches!(insn.opcode, 0x14..=0x17 | 0x20 | 0x22)
            && host_supports(Feature::Sse41);
        return known.then_some(if insn.opcode < 0x20 { extract } else { insert });
    }
    if insn.map == Map::M0F38 {
        let movntdqa = (insn.opcode, insn.prefix, mem) == (0x2A, P66, true);
        return (movntdqa && host_supports(Feature::Sse41)).then_some(load::<C, 16, true>);
    }
    Some(match (insn.opcode, insn.prefix, mem) {
        (0x10, NP | P66, _) | (0x6F, F3, _) => load::<C, 16, false>,
        (0xF0, F2, true) => load::<C, 16, false>,
        (0x10, F3, _) => load::<C, 4, false>,
        (0x10, F2, _) => load::<C, 8, false>,
        (0x11, NP | P66, _) | (0x7F, F3, _) => store::<C, 16, false>,
        (0x11, F3, _) => store::<C, 4, false>,
        (0x11, F2, _) => store::<C, 8, false>,
        (0x12, NP, _) | (0x12, P66, true) => load_half::<C, false>,
        (0x16, NP, _) | (0x16, P66, true) => load_half::<C, true>,
        (0x12, F3 | F2, _) | (0x16, F3, _) => duplicate,
        (0x13, NP | P66, true) => store_half::<C, false>,
        (0x17, NP | P66, true) => store_half::<C, true>,
        (0x28, NP | P66, _) | (0x6F, P66, _) => load::<C, 16, true>,
        (0x29, NP | P66, _) | (0x7F, P66, _) => store::<C, 16, true>,
        (0x2B, NP | P66, true) | (0xE7, P66, true) => store::<C, 16, true>,
        (0x50, NP | P66, false) | (0xD7, NP | P66, false) => mask,
        (0x6E, P66, _) => movd_to_xmm,
        (0x7E, P66, _) => |c, insn| extract(c, &VecInsn { imm: 0, ..*insn }),
        (0x7E, F3, _) => movq_load,
        (0xD6, P66, _) => movq_store,
        (0xD6, F3 | F2, false) => movq_cross,
        (0x6E | 0x6F, NP, _) => mmx_load,
        (0x7E | 0x7F, NP, _) | (0xE7, NP, true) => mmx_store,
        (0x77, NP, _) => emms,
        (0xC3, NP, true) => movnti,
        (0xC4, P66, _) => insert,
        (0xC4, NP, _) => insert_mmx,
        (0xC5, NP | P66, false) => extract_word,
        (0xF7, NP | P66, false) => maskmov,
        _ => return None,
    })
}
