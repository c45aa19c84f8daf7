//! Which vector instructions a compiler of guest code may emit as they are, with guest XMM register n in host
//! XMM register n and MXCSR in the host's: those whose results the architecture fixes.

use super::table::{self, Shape};
use super::{host_supports, Feature, Map, Prefix, Rm, VecInsn};

/// What an instruction's operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// An XMM register (ModRM.reg) and an XMM register or memory; both ways.
    Xmm,
    /// The same, and all six arithmetic flags are set.
    Flags,
    /// To a general register (ModRM.reg).
    ToReg,
    /// From a general register or memory.
    FromRm,
    /// To a general register or memory.
    ToRm,
    /// ModRM.reg is part of the opcode; ModRM.rm an XMM register.
    Group,
    /// PCMPxSTRI and PCMPxSTRM: RAX, RDX and RCX are implicit, flags are set.
    Strings,
}

/// An instruction that the host runs for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Native {
    pub form: Form,
    /// Bytes of a memory operand.
    pub size: u8,
    /// The memory operand must be aligned to its 16 bytes.
    pub align: bool,
    /// The memory operand is written.
    pub write: bool,
    /// The immediate byte.
    pub imm: Option<u8>,
}

/// `None`: leave it to the instruction's handler.
pub(crate) fn native(insn: &VecInsn) -> Option<Native> {
    if insn.vex.is_some() {
        return None;
    }
    moves(insn).or_else(|| computes(insn))
}

fn computes(insn: &VecInsn) -> Option<Native> {
    let reg = insn.rm != Rm::Mem;
    if insn.map == Map::M0F {
        let group = insn.modrm >> 3 & 7;
        match (insn.opcode, insn.prefix) {
            // Estimates differ among processors.
            (0x52 | 0x53, _) => return None,
            (0x71..=0x73, Prefix::P66) => {
                let known = match insn.opcode {
                    0x73 => matches!(group, 2 | 3 | 6 | 7),
                    _ => matches!(group, 2 | 4 | 6),
                };
                return (reg && known).then_some(Native {
                    form: Form::Group,
                    size: 0,
                    align: false,
                    write: false,
                    imm: Some(insn.imm),
                });
            }
            _ => {}
        }
    }
    let op = table::lookup(insn.map, insn.prefix, insn.opcode)?;
    if !host_supports(op.feature) {
        return None;
    }
    let (form, size) = match op.shape {
        Shape::Xmm | Shape::Implicit => (Form::Xmm, op.size),
        Shape::Flags => (Form::Flags, op.size),
        Shape::GprXmm => (Form::ToReg, op.size),
        Shape::XmmGpr => (Form::FromRm, if insn.rex_w { 8 } else { 4 }),
        Shape::Strings => (Form::Strings, op.size),
        Shape::Mmx | Shape::XmmMmx | Shape::MmxXmm => return None,
    };
    let align = op.size == 16 && op.shape != Shape::Strings;
    let imm = op.imm.then(|| super::sse::variant(insn));
    Some(Native { form, size, align, write: false, imm })
}

fn moves(insn: &VecInsn) -> Option<Native> {
    use Prefix::{None as NP, F2, F3, P66};
    let mem = insn.rm == Rm::Mem;
    let wide = if insn.rex_w { 8 } else { 4 };
    let new = |form, size, align, write, imm| Some(Native { form, size, align, write, imm });
    let load = |size| new(Form::Xmm, size, false, false, None);
    let store = |size| new(Form::Xmm, size, false, true, None);
    if insn.map == Map::M0F3A {
        if insn.prefix != P66 || !host_supports(Feature::Sse41) {
            return None;
        }
        let imm = Some(insn.imm);
        return match insn.opcode {
            0x14 => new(Form::ToRm, 1, false, true, imm),
            0x15 => new(Form::ToRm, 2, false, true, imm),
            0x16 => new(Form::ToRm, wide, false, true, imm),
            0x17 => new(Form::ToRm, 4, false, true, imm),
            0x20 => new(Form::FromRm, 1, false, false, imm),
            0x22 => new(Form::FromRm, wide, false, false, imm),
            _ => None,
        };
    }
    if insn.map == Map::M0F38 {
        let movntdqa = insn.opcode == 0x2A && insn.prefix == P66 && mem && host_supports(Feature::Sse41);
        return if movntdqa { new(Form::Xmm, 16, true, false, None) } else { None };
    }
    if insn.map != Map::M0F {
        return None;
    }
    let sse3 = host_supports(Feature::Sse3);
    match (insn.opcode, insn.prefix, mem) {
        (0x10, NP | P66, _) | (0x6F, F3, _) => load(16),
        (0xF0, F2, true) if sse3 => load(16),
        (0x10, F3, _) => load(4),
        (0x10, F2, _) => load(8),
        (0x11, NP | P66, _) | (0x7F, F3, _) => store(16),
        (0x11, F3, _) => store(4),
        (0x11, F2, _) => store(8),
        (0x12 | 0x16, NP, _) | (0x12 | 0x16, P66, true) => load(8),
        (0x12, F2, _) if sse3 => load(8),
        (0x12 | 0x16, F3, _) if sse3 => new(Form::Xmm, 16, true, false, None),
        (0x13 | 0x17, NP | P66, true) => store(8),
        (0x28, NP | P66, _) | (0x6F, P66, _) => new(Form::Xmm, 16, true, false, None),
        (0x29, NP | P66, _) | (0x7F, P66, _) => new(Form::Xmm, 16, true, true, None),
        (0x2B, NP | P66, true) | (0xE7, P66, true) => new(Form::Xmm, 16, true, true, None),
        (0x50, NP | P66, false) | (0xD7, P66, false) => new(Form::ToReg, 0, false, false, None),
        (0x6E, P66, _) => new(Form::FromRm, wide, false, false, None),
        (0x7E, P66, _) => new(Form::ToRm, wide, false, true, None),
        (0x7E, F3, _) => load(8),
        (0xD6, P66, _) => store(8),
        (0xC4, P66, _) => new(Form::FromRm, 2, false, false, Some(insn.imm)),
        (0xC5, P66, false) => new(Form::ToReg, 0, false, false, Some(insn.imm)),
        _ => None,
    }
}
