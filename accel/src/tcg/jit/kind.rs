//! What an instruction is to the compiler: its operands, and what it does with the flags.

use super::super::op::*;
use super::stubs::{HOST, NONE};
use crate::simd::{native, Form, Map, Native, Rm};

/// A register (by the guest's number) or a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Val {
    Reg(u8),
    Imm(i32),
}

/// An instruction that the compiler knows. `size` is the operand size in bytes; `None` as a source is the
/// memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By the interpreter's handler.
    Handler,
    Nop,
    /// A vector instruction; the general registers that it changes.
    Vector {
        native: Native,
        mem: bool,
        changes: u16,
    },
    Mov {
        size: u8,
        d: u8,
        s: u8,
    },
    MovImm {
        size: u8,
        d: u8,
        imm: u64,
    },
    Load {
        size: u8,
        d: u8,
    },
    Store {
        size: u8,
        s: Val,
    },
    Extend {
        signed: bool,
        from: u8,
        size: u8,
        d: u8,
        s: Option<u8>,
    },
    Lea {
        size: u8,
        d: u8,
    },
    Alu {
        op: u8,
        size: u8,
        d: u8,
        s: Val,
    },
    AluLoad {
        op: u8,
        size: u8,
        d: u8,
    },
    AluStore {
        op: u8,
        size: u8,
        s: Val,
    },
    Test {
        size: u8,
        a: u8,
        b: Val,
    },
    TestMem {
        size: u8,
        b: Val,
    },
    Inc {
        dec: bool,
        size: u8,
        d: Option<u8>,
    },
    Not {
        size: u8,
        d: Option<u8>,
    },
    Neg {
        size: u8,
        d: Option<u8>,
    },
    /// Group 2: 0 ROL, 1 ROR, 4 SHL, 5 SHR, 7 SAR; the count is below the width and not zero.
    Shift {
        op: u8,
        size: u8,
        d: u8,
        count: u8,
    },
    ShiftCl {
        op: u8,
        size: u8,
        d: u8,
    },
    /// SHL, SHR, SAR of memory.
    ShiftMem {
        op: u8,
        size: u8,
        count: u8,
    },
    Imul {
        size: u8,
        d: u8,
        s: Option<u8>,
        imm: Option<i32>,
    },
    Mul {
        signed: bool,
        size: u8,
        s: Option<u8>,
    },
    Cli,
    Sti,
    /// CLD, STD.
    Direction {
        down: bool,
    },
    Swapgs,
    Pushf,
    /// MOV from CR2 or CR3.
    FromControl {
        n: u8,
        d: u8,
    },
    /// MOV from a segment register to a general one, whose upper part becomes zero.
    FromSegment {
        seg: u8,
        d: u8,
    },
    /// RDTSC, RDTSCP.
    Rdtsc {
        aux: bool,
    },
    Syscall,
    /// To 64-bit code.
    Sysret,
    Push(Val),
    PushMem,
    Pop(u8),
    Leave,
    Setcc {
        cc: u8,
        d: u8,
    },
    Cmov {
        cc: u8,
        size: u8,
        d: u8,
        s: Option<u8>,
    },
    Cbw(u8),
    Cwd(u8),
    Xchg {
        size: u8,
        a: u8,
        b: u8,
    },
    XchgMem {
        size: u8,
        r: u8,
    },
    Jcc {
        cc: u8,
        rel: i64,
    },
    Jmp {
        rel: i64,
    },
    Call {
        rel: i64,
    },
    Ret {
        extra: i32,
    },
    /// BT BTS BTR BTC (0 to 3) of a register, or of memory by an immediate.
    Bit {
        op: u8,
        size: u8,
        d: Option<u8>,
        n: Val,
    },
    /// The same of memory by a register.
    BitBeyond {
        op: u8,
        size: u8,
        n: u8,
    },
    Cmpxchg {
        size: u8,
        r: u8,
    },
    Xadd {
        size: u8,
        r: u8,
    },
    Bswap {
        size: u8,
        d: u8,
    },
    Div {
        signed: bool,
        size: u8,
        s: Option<u8>,
    },
    Scan {
        reverse: bool,
        size: u8,
        d: u8,
        s: Option<u8>,
    },
    Popcnt {
        size: u8,
        d: u8,
        s: Option<u8>,
    },
    /// TZCNT or LZCNT (`reverse`).
    Count {
        reverse: bool,
        size: u8,
        d: u8,
        s: Option<u8>,
    },
    SetccMem {
        cc: u8,
    },
    /// MOVZX or MOVSX from AH, CH, DH or BH.
    ExtendHigh {
        signed: bool,
        size: u8,
        d: u8,
        s: u8,
    },
    /// An operation of group 1, or TEST (8), of AH, CH, DH or BH with a constant.
    AluHigh {
        op: u8,
        d: u8,
        imm: i32,
    },
    /// MOVS, STOS or LODS without REP.
    Movs(u8),
    Stos(u8),
    Lods(u8),
    /// JMP or CALL through a register or memory.
    Indirect {
        call: bool,
        s: Option<u8>,
    },
}

/// Masks of flags.
pub const CF: u8 = 1;
pub const PF: u8 = 2;
pub const AF: u8 = 4;
pub const ZF: u8 = 8;
pub const SF: u8 = 16;
pub const OF: u8 = 32;
pub const ALL: u8 = 63;

/// The flags that a condition looks at.
pub fn condition(cc: u8) -> u8 {
    match cc >> 1 {
        0 => OF,
        1 => CF,
        2 => ZF,
        3 => CF | ZF,
        4 => SF,
        5 => PF,
        6 => SF | OF,
        _ => ZF | SF | OF,
    }
}

/// What an instruction does with the flags, and whether it may need the interpreter.
pub struct Effects {
    pub reads: u8,
    pub writes: u8,
    pub exits: bool,
}

impl Kind {
    pub fn effects(&self) -> Effects {
        let (reads, writes, exits) = match *self {
            Kind::Handler => (ALL, ALL, true),
            Kind::Vector { native, mem, .. } => {
                let flags = matches!(native.form, Form::Flags | Form::Strings);
                (0, if flags { ALL } else { 0 }, mem)
            }
            Kind::Load { .. } | Kind::Store { .. } | Kind::XchgMem { .. } => (0, 0, true),
            Kind::Extend { s, .. } => (0, 0, s.is_none()),
            Kind::Push(_) | Kind::PushMem | Kind::Pop(_) | Kind::Leave => (0, 0, true),
            Kind::Movs(_) | Kind::Stos(_) | Kind::Lods(_) | Kind::Cli | Kind::Swapgs => (0, 0, true),
            Kind::Sti | Kind::FromControl { .. } | Kind::Rdtsc { .. } => (0, 0, true),
            Kind::Direction { .. } => (0, 0, false),
            Kind::Syscall => (ALL, ALL, true),
            Kind::Sysret => (0, ALL, true),
            Kind::ShiftMem { .. } => (0, ALL, true),
            Kind::BitBeyond { .. } => (0, CF, true),
            Kind::Pushf => (ALL, 0, true),
            Kind::Alu { op, .. } => (if op == 2 || op == 3 { CF } else { 0 }, ALL, false),
            Kind::AluLoad { op, .. } | Kind::AluStore { op, .. } => {
                (if op == 2 || op == 3 { CF } else { 0 }, ALL, true)
            }
            Kind::Test { .. } => (0, ALL, false),
            Kind::TestMem { .. } => (0, ALL, true),
            Kind::Inc { d, .. } => (0, ALL & !CF, d.is_none()),
            Kind::Not { d, .. } => (0, 0, d.is_none()),
            Kind::Neg { d, .. } => (0, ALL, d.is_none()),
            Kind::Shift { op, .. } => (0, if op < 4 { CF | OF } else { ALL }, false),
            // A count of zero leaves the flags alone.
            Kind::ShiftCl { .. } => (0, 0, false),
            Kind::Imul { s, .. } | Kind::Mul { s, .. } => (0, ALL, s.is_none()),
            // All but CF stay.
            Kind::Bit { d, .. } => (0, CF, d.is_none()),
            Kind::Cmpxchg { .. } | Kind::Xadd { .. } => (0, ALL, true),
            Kind::Div { .. } => (0, 0, true),
            Kind::Scan { s, .. } | Kind::Popcnt { s, .. } | Kind::Count { s, .. } => (0, ALL, s.is_none()),
            Kind::SetccMem { cc } => (condition(cc), 0, true),
            Kind::AluHigh { op, .. } => (if op == 2 || op == 3 { CF } else { 0 }, ALL, false),
            Kind::Setcc { cc, .. } => (condition(cc), 0, false),
            Kind::Cmov { cc, s, .. } => (condition(cc), 0, s.is_none()),
            Kind::Jcc { cc, .. } => (condition(cc), 0, true),
            Kind::Jmp { .. } | Kind::Call { .. } | Kind::Ret { .. } | Kind::Indirect { .. } => (0, 0, true),
            Kind::Nop
            | Kind::Mov { .. }
            | Kind::MovImm { .. }
            | Kind::Lea { .. }
            | Kind::Cbw(_)
            | Kind::Cwd(_)
            | Kind::Bswap { .. }
            | Kind::FromSegment { .. }
            | Kind::ExtendHigh { .. }
            | Kind::Xchg { .. } => (0, 0, false),
        };
        Effects { reads, writes, exits }
    }

    /// The guest's general registers that it changes, as a mask.
    pub fn changes(&self) -> u16 {
        let bit = |r: u8| 1u16 << (r & 15);
        match *self {
            Kind::Handler => 0xFFFF,
            Kind::Vector { changes, .. } => changes,
            Kind::Mov { d, .. }
            | Kind::MovImm { d, .. }
            | Kind::Load { d, .. }
            | Kind::Extend { d, .. }
            | Kind::Lea { d, .. }
            | Kind::Alu { d, .. }
            | Kind::AluLoad { d, .. }
            | Kind::Shift { d, .. }
            | Kind::ShiftCl { d, .. }
            | Kind::Imul { d, .. }
            | Kind::Setcc { d, .. }
            | Kind::Cmov { d, .. } => bit(d),
            Kind::Inc { d, .. } | Kind::Not { d, .. } | Kind::Neg { d, .. } => d.map_or(0, bit),
            Kind::Bit { op, d, .. } if op != 0 => d.map_or(0, bit),
            Kind::Cmpxchg { .. } => bit(RAX as u8),
            Kind::FromControl { d, .. } | Kind::FromSegment { d, .. } => bit(d),
            Kind::Syscall => bit(RCX as u8) | bit(11),
            Kind::Xadd { r, .. } => bit(r),
            Kind::Bswap { d, .. }
            | Kind::Scan { d, .. }
            | Kind::Popcnt { d, .. }
            | Kind::Count { d, .. }
            | Kind::ExtendHigh { d, .. }
            | Kind::AluHigh { d, .. } => bit(d),
            Kind::Mul { .. } | Kind::Div { .. } => bit(RAX as u8) | bit(RDX as u8),
            Kind::Rdtsc { aux } => bit(RAX as u8) | bit(RDX as u8) | (aux as u16) << RCX,
            Kind::Push(_) | Kind::PushMem | Kind::Pushf | Kind::Call { .. } | Kind::Ret { .. } => {
                bit(RSP as u8)
            }
            Kind::Indirect { call, .. } => (call as u16) << RSP,
            Kind::Pop(d) => bit(d) | bit(RSP as u8),
            Kind::Leave => bit(RSP as u8) | bit(RBP as u8),
            Kind::Movs(_) => bit(RSI as u8) | bit(RDI as u8),
            Kind::Stos(_) => bit(RDI as u8),
            Kind::Lods(_) => bit(RSI as u8) | bit(RAX as u8),
            Kind::Cbw(_) => bit(RAX as u8),
            Kind::Cwd(_) => bit(RDX as u8),
            Kind::Xchg { a, b, .. } => bit(a) | bit(b),
            Kind::XchgMem { r, .. } => bit(r),
            _ => 0,
        }
    }

    /// What follows in memory says nothing of where it leads.
    pub fn leads_anywhere(&self) -> bool {
        matches!(self, Kind::Ret { .. } | Kind::Indirect { .. } | Kind::Syscall | Kind::Sysret)
    }

    /// Ends its block itself.
    pub fn branches(&self) -> bool {
        matches!(
            self,
            Kind::Jcc { .. }
                | Kind::Jmp { .. }
                | Kind::Call { .. }
                | Kind::Ret { .. }
                | Kind::Indirect { .. }
                | Kind::Syscall
                | Kind::Sysret
        )
    }
}

/// An immediate as the sign-extended constant of a host instruction.
fn constant(size: u8, imm: u64) -> i32 {
    match size {
        1 => imm as i8 as i32,
        2 => imm as i16 as i32,
        _ => imm as i32,
    }
}

/// ModRM.reg of a group opcode.
fn group(op: &Op) -> u8 {
    if op.reg & HIGH != 0 {
        op.reg & 3 | 4
    } else {
        op.reg & 7
    }
}

/// The host has TZCNT and LZCNT.
fn counts() -> bool {
    std::arch::is_x86_feature_detected!("bmi1") && std::arch::is_x86_feature_detected!("lzcnt")
}

fn here(r: u8) -> bool {
    HOST[r as usize] != NONE
}

/// Whether the handler of `op` neither reads nor writes the arithmetic flags.
pub fn leaves_flags(op: &Op) -> bool {
    if op.map == VECTOR {
        // SAFETY: `imm` points to what the block owns.
        let insn = unsafe { &(*(op.imm as *const VecOp)).insn };
        // FCMOVcc, FCOMI and the like; what vector instructions set flags is compiled or rare.
        return insn.map == Map::X87
            && (insn.modrm < 0xC0 || matches!(insn.opcode, 0xD8 | 0xD9 | 0xDC | 0xDD | 0xDE));
    }
    match op.map {
        0 => matches!(op.opcode, 0x8C | 0x8E | 0xA4 | 0xA5 | 0xAA..=0xAD | 0xE4..=0xE7 | 0xEC..=0xEF | 0xFA),
        1 => matches!(op.opcode, 0x20 | 0x22 | 0x30..=0x32 | 0xA2 | 0xAE),
        _ => false,
    }
}

/// XCHG of registers that both live in the host's.
fn exchange(size: u8, a: u8, b: u8) -> Option<Kind> {
    (here(a) && here(b)).then_some(Kind::Xchg { size, a, b })
}

fn vector(op: &Op) -> Option<Kind> {
    // SAFETY: `imm` points to what the block owns.
    let insn = unsafe { &(*(op.imm as *const VecOp)).insn };
    let native = native(insn)?;
    let changes = match (native.form, insn.rm) {
        (Form::ToReg, _) => 1 << (insn.reg & 15),
        (Form::ToRm, Rm::Reg(r)) => 1 << (r & 15),
        (Form::Strings, _) if insn.opcode & 1 != 0 => 1 << RCX,
        _ => 0,
    };
    let mem = insn.rm == Rm::Mem && native.form != Form::Plain;
    Some(Kind::Vector { native, mem, changes })
}

/// The kind of an instruction of `block`; `alone` says that the machine has one processor.
pub fn classify(op: &Op, block: &Block, alone: bool) -> Kind {
    known(op, block.key & 0xFFF, block.is_flat32(), alone).unwrap_or(Kind::Handler)
}

fn known(op: &Op, at: u64, flat: bool, alone: bool) -> Option<Kind> {
    let size = op.osz;
    // Of addresses, and of what the stack holds.
    let word = if flat { 4 } else { 8 };
    // The distance of a near branch.
    let rel = if flat { op.imm as i32 as i64 } else { op.imm as i64 };
    let reg = op.kind == K_REG;
    let o = op.opcode;
    // A memory operand whose address can be computed in a register or two.
    if !reg && o != 0x8D {
        let rip = if op.base == BLOCKIP { at as i64 } else { 0 };
        // Constants of 32-bit addresses are sign-extended or not.
        let disp = if flat { op.disp as u32 as i32 as i64 } else { op.disp };
        if !matches!(op.asz, 8 | 4) || i32::try_from(disp + rip).is_err() {
            return None;
        }
        // Where these lie is looked at each time.
        if flat && (op.asz != 4 || op.seg as usize == CS || op.seg >= FS as u8) {
            return None;
        }
    }
    if op.map == VECTOR {
        return vector(op);
    }
    // The high halves of registers are left to the interpreter.
    let low = |r: u8| (r & HIGH == 0).then_some(r & 15);
    let rm = || if reg { low(op.rm).map(Some) } else { Some(None) };
    let imm = Val::Imm(constant(size, op.imm));
    Some(match (op.map, o) {
        (0, 0x00..=0x3F) if o & 7 < 6 => {
            let n = o >> 3;
            match (o & 7, reg) {
                (0..=3, true) => Kind::Alu { op: n, size, d: low(op.rm)?, s: Val::Reg(low(op.reg)?) },
                (0 | 1, false) => Kind::AluStore { op: n, size, s: Val::Reg(low(op.reg)?) },
                (2 | 3, false) => Kind::AluLoad { op: n, size, d: low(op.reg)? },
                _ => Kind::Alu { op: n, size, d: 0, s: imm },
            }
        }
        (0, 0x40..=0x4F) if flat => Kind::Inc { dec: o >= 0x48, size, d: Some(op.rm) },
        (0, 0x50..=0x57) if size == word => Kind::Push(Val::Reg(op.rm)),
        (0, 0x58..=0x5F) if size == word => Kind::Pop(op.rm),
        (0, 0x63) if size == 8 && !flat => Kind::Extend { signed: true, from: 4, size, d: op.reg, s: rm()? },
        (0, 0x68 | 0x6A) if size == word => Kind::Push(imm),
        (0, 0x69 | 0x6B) => Kind::Imul { size, d: op.reg, s: rm()?, imm: Some(constant(size, op.imm)) },
        (0, 0x70..=0x7F) | (1, 0x80..=0x8F) if size == word => Kind::Jcc { cc: o & 15, rel },
        (0, 0x80 | 0x81 | 0x83) if reg && op.rm & HIGH == 0 => {
            Kind::Alu { op: group(op), size, d: low(op.rm)?, s: imm }
        }
        (0, 0x80 | 0x81 | 0x83) if !reg => Kind::AluStore { op: group(op), size, s: imm },
        (0, 0x84 | 0x85) if reg => Kind::Test { size, a: low(op.rm)?, b: Val::Reg(low(op.reg)?) },
        (0, 0x84 | 0x85) => Kind::TestMem { size, b: Val::Reg(low(op.reg)?) },
        (0, 0x86 | 0x87) if reg => exchange(size, low(op.rm)?, low(op.reg)?)?,
        (0, 0x86 | 0x87) => Kind::XchgMem { size, r: low(op.reg)? },
        (0, 0x88..=0x8B) if reg => Kind::Mov { size, d: low(op.rm)?, s: low(op.reg)? },
        (0, 0x88 | 0x89) => Kind::Store { size, s: Val::Reg(low(op.reg)?) },
        (0, 0x8A | 0x8B) => Kind::Load { size, d: low(op.reg)? },
        (0, 0x8D) => {
            let rip = if op.base == BLOCKIP { at as i64 } else { 0 };
            let disp = if flat { op.disp as u32 as i32 as i64 } else { op.disp };
            if op.asz != word || i32::try_from(disp + rip).is_err() {
                return None;
            }
            Kind::Lea { size, d: op.reg }
        }
        // PAUSE does nothing where no other processor waits for its turn.
        (0, 0x90) if (op.rep != 0xF3 || alone) && op.rm == 0 => Kind::Nop,
        (0, 0x91..=0x97) => exchange(size, op.rm, 0)?,
        (0, 0x8C) if reg && op.osz >= 4 => Kind::FromSegment { seg: op.reg, d: op.rm },
        (0, 0x98) => Kind::Cbw(size),
        (0, 0x99) => Kind::Cwd(size),
        (0, 0xA0 | 0xA1) => Kind::Load { size, d: 0 },
        (0, 0xA2 | 0xA3) => Kind::Store { size, s: Val::Reg(0) },
        (0, 0xA4 | 0xA5 | 0xAA..=0xAD) if op.rep == 0 && op.asz == word => {
            // Where the source lies is looked at each time, but in segments that start at 0.
            if op.seg >= FS as u8 || flat && op.seg as usize == CS {
                return None;
            }
            match o & 0xFE {
                0xA4 => Kind::Movs(size),
                0xAA => Kind::Stos(size),
                _ => Kind::Lods(size),
            }
        }
        (0, 0x9C) if size == word => Kind::Pushf,
        (0, 0xFA) => Kind::Cli,
        (0, 0xFB) => Kind::Sti,
        (0, 0xFC | 0xFD) => Kind::Direction { down: o & 1 != 0 },
        (1, 0x20) if matches!(op.reg, 2 | 3) && !flat => Kind::FromControl { n: op.reg, d: op.rm },
        (1, 0x31) => Kind::Rdtsc { aux: false },
        (1, 0x01) if reg && op.reg & 7 == 7 && op.rm & 7 == 1 => Kind::Rdtsc { aux: true },
        (1, 0x05) if !flat => Kind::Syscall,
        (1, 0x07) if !flat && size == 8 => Kind::Sysret,
        (1, 0x01) if reg && op.reg & 7 == 7 && op.rm & 7 == 0 && !flat => Kind::Swapgs,
        (0, 0xA8 | 0xA9) => Kind::Test { size, a: 0, b: imm },
        (0, 0xB0..=0xBF) => Kind::MovImm { size, d: low(op.rm)?, imm: op.imm },
        (0, 0xC0 | 0xC1 | 0xD0 | 0xD1) => {
            let n = group(op);
            let count = (op.imm & if size == 8 { 63 } else { 31 }) as u8;
            if matches!(n, 2 | 3) || count == 0 || count >= 8 * size || !reg && n < 4 {
                return None;
            }
            let n = if n == 6 { 4 } else { n };
            if reg {
                Kind::Shift { op: n, size, d: low(op.rm)?, count }
            } else {
                Kind::ShiftMem { op: n, size, count }
            }
        }
        (0, 0xD3) if reg && size >= 4 && matches!(group(op), 4..=7) => {
            Kind::ShiftCl { op: if group(op) == 6 { 4 } else { group(op) }, size, d: low(op.rm)? }
        }
        (0, 0xC2 | 0xC3) if size == word => Kind::Ret { extra: op.imm as i32 },
        (0, 0xC6 | 0xC7) if reg => {
            let imm = if size == 8 { op.imm } else { op.imm & (u64::MAX >> (64 - 8 * size as u32)) };
            Kind::MovImm { size, d: low(op.rm)?, imm }
        }
        (0, 0xC6 | 0xC7) => Kind::Store { size, s: imm },
        (0, 0xC9) if size == word => Kind::Leave,
        (0, 0xE8) if size == word => Kind::Call { rel },
        (0, 0xE9 | 0xEB) if size == word => Kind::Jmp { rel },
        (0, 0x80) if reg => Kind::AluHigh { op: group(op), d: op.rm & 3, imm: constant(1, op.imm) },
        (0, 0xF6) if reg && op.rm & HIGH != 0 && group(op) < 2 => {
            Kind::AluHigh { op: 8, d: op.rm & 3, imm: constant(1, op.imm) }
        }
        (0, 0xF6 | 0xF7) => match (group(op), reg) {
            (0 | 1, true) => Kind::Test { size, a: low(op.rm)?, b: imm },
            (0 | 1, false) => Kind::TestMem { size, b: imm },
            (2, _) => Kind::Not { size, d: rm()? },
            (3, _) => Kind::Neg { size, d: rm()? },
            (n @ (6 | 7), _) if size >= 4 => Kind::Div { signed: n == 7, size, s: rm()? },
            (n @ (4 | 5), _) if size >= 4 => Kind::Mul { signed: n == 5, size, s: rm()? },
            _ => return None,
        },
        (0, 0xFE | 0xFF) => match group(op) {
            n @ (0 | 1) => Kind::Inc { dec: n == 1, size, d: rm()? },
            2 if size == word => Kind::Indirect { call: true, s: rm()? },
            4 if size == word => Kind::Indirect { call: false, s: rm()? },
            6 if size == word && !reg => Kind::PushMem,
            6 if size == word => Kind::Push(Val::Reg(op.rm)),
            _ => return None,
        },
        (1, 0x0D | 0x18..=0x1F) => Kind::Nop,
        // MOVNTI
        (1, 0xC3) if !reg => Kind::Store { size, s: Val::Reg(op.reg) },
        (1, 0x40..=0x4F) => Kind::Cmov { cc: o & 15, size, d: op.reg, s: rm()? },
        (1, 0x90..=0x9F) if !reg => Kind::SetccMem { cc: o & 15 },
        (1, 0x90..=0x9F) => Kind::Setcc { cc: o & 15, d: low(op.rm)? },
        // Fences: everything happens in order.
        (1, 0xAE) if reg && op.rep == 0 && matches!(op.reg & 7, 5..=7) => Kind::Nop,
        (1, 0xA3 | 0xAB | 0xB3 | 0xBB) if reg => {
            Kind::Bit { op: o >> 3 & 3, size, d: Some(op.rm), n: Val::Reg(op.reg) }
        }
        (1, 0xA3 | 0xAB | 0xB3 | 0xBB) if size >= 4 && op.asz == 8 => {
            Kind::BitBeyond { op: o >> 3 & 3, size, n: op.reg }
        }
        (1, 0xBA) => {
            let n = Val::Imm((op.imm & (8 * size as u64 - 1)) as i32);
            Kind::Bit { op: op.reg & 3, size, d: rm()?, n }
        }
        (1, 0xB0 | 0xB1) if !reg && here(low(op.reg)?) => Kind::Cmpxchg { size, r: op.reg },
        (1, 0xC0 | 0xC1) if !reg && here(low(op.reg)?) => Kind::Xadd { size, r: op.reg },
        (1, 0xC8..=0xCF) if size >= 4 => Kind::Bswap { size, d: op.rm },
        (1, 0xBC | 0xBD) if op.rep != 0xF3 && size >= 4 => {
            Kind::Scan { reverse: o & 1 != 0, size, d: op.reg, s: rm()? }
        }
        (1, 0xBC | 0xBD) if op.rep == 0xF3 && size >= 4 && counts() => {
            Kind::Count { reverse: o & 1 != 0, size, d: op.reg, s: rm()? }
        }
        (1, 0xB8) if op.rep == 0xF3 && std::arch::is_x86_feature_detected!("popcnt") => {
            Kind::Popcnt { size, d: op.reg, s: rm()? }
        }
        (1, 0xB6 | 0xBE) if reg && op.rm & HIGH != 0 => {
            Kind::ExtendHigh { signed: o & 8 != 0, size, d: op.reg, s: op.rm & 3 }
        }
        (1, 0xAF) => Kind::Imul { size, d: op.reg, s: rm()?, imm: None },
        (1, 0xB6 | 0xB7 | 0xBE | 0xBF) => {
            Kind::Extend { signed: o & 8 != 0, from: 1 + (o & 1), size, d: op.reg, s: rm()? }
        }
        _ => return None,
    })
}
