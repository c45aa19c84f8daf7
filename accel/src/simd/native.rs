//! Which vector instructions a compiler of guest code may emit as they are, with guest XMM register n in host
//! XMM register n and MXCSR in the host's: those whose results the architecture fixes.

use super::avx_host;
use super::dot;
use super::table::{self, Shape};
use super::{host_supports, Feature, Map, Prefix, Rm, VecInsn, Vex};

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
    /// No operands.
    Plain,
    /// PCMPxSTRI and PCMPxSTRM: RAX, RDX and RCX are implicit, flags are set.
    Strings,
}

/// An instruction that the host runs for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Native {
    pub form: Form,
    /// Bytes of a memory operand.
    pub size: u8,
    /// The memory operand must be aligned to its size.
    pub align: bool,
    /// The memory operand is written.
    pub write: bool,
    /// The immediate byte.
    pub imm: Option<u8>,
    /// The rest of the VEX prefix that it is to have.
    pub vex: Option<Vex>,
    /// REX.W or VEX.W.
    pub wide: bool,
}

/// `None`: leave it to the instruction's handler.
pub(crate) fn native(insn: &VecInsn) -> Option<Native> {
    if dot::is_dot(insn) {
        return None;
    }
    let native = form(insn)?;
    // Host code is 64-bit: what 32-bit code ignores must not be passed on.
    let general = matches!(native.form, Form::ToReg | Form::FromRm | Form::ToRm | Form::Strings);
    Some(Native { wide: insn.rex_w && (insn.long || !general), ..native })
}

fn form(insn: &VecInsn) -> Option<Native> {
    if let Some(vex) = insn.vex {
        return vex_moves(insn, vex).or_else(|| vex_computes(insn, vex));
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
                    vex: None,
                    wide: false,
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
    Some(Native { form, size, align, write: false, imm, vex: None, wide: false })
}

fn moves(insn: &VecInsn) -> Option<Native> {
    use Prefix::{None as NP, F2, F3, P66};
    let mem = insn.rm == Rm::Mem;
    let wide = if insn.rex_w { 8 } else { 4 };
    let new = |form, size, align, write, imm| {
        Some(Native { form, size, align, write, imm, vex: None, wide: false })
    };
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

/// VEX-coded instructions that `avx_host` has a routine for.
fn vex_computes(insn: &VecInsn, vex: Vex) -> Option<Native> {
    let p = insn.host?;
    let (form, write) = match p.form {
        avx_host::Form::Rvm | avx_host::Form::Rm | avx_host::Form::Rvmr => (Form::Xmm, false),
        avx_host::Form::Mr => (Form::Xmm, true),
        avx_host::Form::Vmi => (Form::Group, false),
        avx_host::Form::Flags => (Form::Flags, false),
        avx_host::Form::ToGpr => (Form::ToReg, false),
        avx_host::Form::FromGpr => (Form::FromRm, false),
        avx_host::Form::ExtractGpr => (Form::ToRm, true),
        avx_host::Form::Strings => (Form::Strings, false),
    };
    let has_imm = match insn.map {
        Map::M0F => matches!(insn.opcode, 0x70..=0x73 | 0xC2 | 0xC4..=0xC6),
        Map::M0F3A => true,
        _ => false,
    };
    // The length is ignored where there is one element.
    let vex = if p.fp && p.size <= 8 { Vex { l: false, ..vex } } else { vex };
    // The fourth register's number has three bits in 32-bit code.
    let imm = if p.form == avx_host::Form::Rvmr && !insn.long { insn.imm & 0x70 } else { insn.imm };
    let imm = has_imm.then_some(imm);
    Some(Native { form, size: p.size, align: false, write, imm, vex: Some(vex), wide: false })
}

/// VEX-coded moves, which the decoder has found well formed.
fn vex_moves(insn: &VecInsn, vex: Vex) -> Option<Native> {
    use Prefix::{None as NP, F2, F3, P66};
    let mem = insn.rm == Rm::Mem;
    let short = Some(Vex { l: false, ..vex });
    let all = if vex.l { 32 } else { 16 };
    let wide = if insn.rex_w && insn.long { 8 } else { 4 };
    let new = |form, size, align, write, vex| {
        Some(Native { form, size, align, write, imm: None, vex, wide: false })
    };
    let load = |size, align| new(Form::Xmm, size, align, false, Some(vex));
    let store = |size, align| new(Form::Xmm, size, align, true, Some(vex));
    if insn.map == Map::M0F38 {
        return match (insn.opcode, insn.prefix, mem) {
            (0x2A, P66, true) => load(all, true),
            (0x1A | 0x5A, P66, true) => load(16, false),
            _ => None,
        };
    }
    if insn.map != Map::M0F {
        return None;
    }
    match (insn.opcode, insn.prefix, mem) {
        (0x10, NP | P66, _) | (0x6F, F3, _) | (0xF0, F2, true) => load(all, false),
        (0x11, NP | P66, _) | (0x7F, F3, _) => store(all, false),
        (0x10, F3, _) => new(Form::Xmm, 4, false, false, short),
        (0x10, F2, _) => new(Form::Xmm, 8, false, false, short),
        (0x11, F3, _) => new(Form::Xmm, 4, false, true, short),
        (0x11, F2, _) => new(Form::Xmm, 8, false, true, short),
        (0x12 | 0x16, NP, _) | (0x12 | 0x16, P66, true) => load(8, false),
        (0x13 | 0x17, NP | P66, true) => store(8, false),
        (0x28, NP | P66, _) | (0x6F, P66, _) => load(all, true),
        (0x29, NP | P66, _) | (0x7F, P66, _) => store(all, true),
        (0x2B, NP | P66, true) | (0xE7, P66, true) => store(all, true),
        (0x6E, P66, _) => new(Form::FromRm, wide, false, false, Some(vex)),
        (0x7E, P66, _) => new(Form::ToRm, wide, false, true, Some(vex)),
        (0x7E, F3, _) => load(8, false),
        (0xD6, P66, _) => store(8, false),
        (0x77, NP, _) => new(Form::Plain, 0, false, false, Some(vex)),
        _ => None,
    }
}
