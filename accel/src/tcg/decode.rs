//! The instruction decoder: prefixes, ModRM, and the one-byte opcodes (SDM vol. 2, appendix A).

use super::op::*;
use super::{alu, ctl, far, flags, mov, shift, string, sys};
use crate::by_size;

/// Why no instruction could be decoded.
#[derive(Debug)]
pub enum Stop {
    /// The bytes given end within the instruction.
    Short,
    /// Longer than 15 bytes.
    TooLong,
    /// Not an instruction of this processor.
    Undefined,
}
pub type D<T> = Result<T, Stop>;

/// A decoded instruction, whether it must end its block, and a vector instruction's description.
pub struct Decoded {
    pub op: Op,
    pub ends: bool,
    pub vec: Option<Box<VecOp>>,
}

pub struct Decoder<'a> {
    pub b: &'a [u8],
    pub p: usize,
    /// 0: 16-bit, 1: 32-bit, 2: 64-bit code.
    pub mode: u8,
    pub rex: u8,
    pub seg: Option<u8>,
    pub p66: bool,
    pub p67: bool,
    pub modrm: u8,
    pub ends: bool,
    pub lockable: bool,
    pub lock: bool,
    pub vec: Option<Box<VecOp>>,
    pub o: Op,
}

pub const MODE16: u8 = 0;
pub const MODE32: u8 = 1;
pub const MODE64: u8 = 2;
/// 32-bit code in protected mode whose segments (but for FS and GS) are all of the linear addresses: what is compiled of
/// it need not look at them.
pub const FLAT32: u8 = 3;

/// An operation that does nothing, also what `cur` points to between blocks.
pub fn nop(_: &mut super::SoftCpu, _: &Op) -> R<()> {
    Ok(())
}

pub const BLANK: Op = Op {
    f: nop,
    imm: 0,
    disp: 0,
    base: NOREG,
    index: NOREG,
    scale: 0,
    seg: DS as u8,
    reg: 0,
    rm: 0,
    kind: K_REG,
    osz: 4,
    asz: 4,
    rep: 0,
    map: 0,
    idx: 0,
    off: 0,
    len: 0,
    opcode: 0,
};

/// Decode one instruction at the start of `b`.
pub fn decode(b: &[u8], mode: u8) -> D<Decoded> {
    let mut d = Decoder {
        b,
        p: 0,
        mode,
        rex: 0,
        seg: None,
        p66: false,
        p67: false,
        modrm: 0,
        ends: false,
        lockable: false,
        lock: false,
        vec: None,
        o: BLANK,
    };
    let f = match d.instruction() {
        Ok(f) if d.lock && !(d.lockable && d.o.kind != K_REG) => {
            let _ = f;
            d.ends = true;
            sys::ud
        }
        Ok(f) => f,
        Err(Stop::Undefined) => {
            d.ends = true;
            sys::ud
        }
        Err(Stop::TooLong) => {
            d.ends = true;
            sys::too_long
        }
        Err(e) => return Err(e),
    };
    d.o.f = f;
    d.o.len = d.p as u8;
    Ok(Decoded { op: d.o, ends: d.ends, vec: d.vec })
}

impl Decoder<'_> {
    pub fn u8(&mut self) -> D<u8> {
        if self.p >= 15 {
            return Err(Stop::TooLong);
        }
        let v = *self.b.get(self.p).ok_or(Stop::Short)?;
        self.p += 1;
        Ok(v)
    }
    pub fn u16(&mut self) -> D<u16> {
        Ok(u16::from_le_bytes([self.u8()?, self.u8()?]))
    }
    pub fn u32(&mut self) -> D<u32> {
        Ok(self.u16()? as u32 | (self.u16()? as u32) << 16)
    }
    pub fn u64(&mut self) -> D<u64> {
        Ok(self.u32()? as u64 | (self.u32()? as u64) << 32)
    }
    pub fn i8(&mut self) -> D<u64> {
        Ok(self.u8()? as i8 as i64 as u64)
    }
    /// Immediate of operand size, 32 bits sign-extended for 64.
    pub fn imm_z(&mut self, osz: u8) -> D<u64> {
        Ok(match osz {
            1 => self.u8()? as u64,
            2 => self.u16()? as u64,
            4 => self.u32()? as u64,
            _ => self.u32()? as i32 as i64 as u64,
        })
    }
    pub fn long(&self) -> bool {
        self.mode == MODE64
    }
    pub fn breg(&self, r: u8) -> u8 {
        if self.rex == 0 && (4..8).contains(&r) {
            HIGH | (r - 4)
        } else {
            r
        }
    }

    fn prefixes(&mut self) -> D<u8> {
        loop {
            let b = self.u8()?;
            match b {
                0x26 | 0x2E | 0x36 | 0x3E => {
                    if !self.long() {
                        self.seg = Some((b >> 3) & 3);
                    }
                }
                0x64 => self.seg = Some(FS as u8),
                0x65 => self.seg = Some(GS as u8),
                0x66 => self.p66 = true,
                0x67 => self.p67 = true,
                0xF0 => self.lock = true,
                0xF2 | 0xF3 => self.o.rep = b,
                0x40..=0x4F if self.long() => {
                    self.rex = b;
                    let next = self.u8()?;
                    // REX counts only right before the opcode.
                    if matches!(next, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
                        || next & 0xF0 == 0x40
                    {
                        self.rex = 0;
                        self.p -= 1;
                        continue;
                    }
                    return Ok(next);
                }
                _ => return Ok(b),
            }
        }
    }

    fn sizes(&mut self) {
        self.o.osz = match self.mode {
            MODE64 if self.rex & 8 != 0 => 8,
            MODE16 => {
                if self.p66 {
                    4
                } else {
                    2
                }
            }
            _ => {
                if self.p66 {
                    2
                } else {
                    4
                }
            }
        };
        self.o.asz = match (self.mode, self.p67) {
            (MODE64, false) => 8,
            (MODE64, true) | (MODE32, false) | (MODE16, true) => 4,
            _ => 2,
        };
        self.o.seg = self.seg.unwrap_or(DS as u8);
    }

    /// Operand size of instructions that default to 64 bits in 64-bit mode.
    pub fn osz64(&mut self) {
        if self.long() {
            self.o.osz = if self.p66 && self.rex & 8 == 0 { 2 } else { 8 };
        }
    }

    /// Parse ModRM, SIB and displacement.
    pub fn modrm(&mut self) -> D<()> {
        let m = self.u8()?;
        self.modrm = m;
        let md = m >> 6;
        let rm = m & 7;
        self.o.reg = (m >> 3 & 7) | (self.rex & 4) << 1;
        if md == 3 {
            self.o.kind = K_REG;
            self.o.rm = rm | (self.rex & 1) << 3;
            return Ok(());
        }
        self.o.base = NOREG;
        self.o.index = NOREG;
        let mut seg = DS;
        if self.o.asz == 2 {
            const BASE: [u8; 8] = [3, 3, 5, 5, NOREG, NOREG, 5, 3];
            const INDEX: [u8; 8] = [6, 7, 6, 7, 6, 7, NOREG, NOREG];
            self.o.base = BASE[rm as usize];
            self.o.index = INDEX[rm as usize];
            if md == 0 && rm == 6 {
                self.o.base = NOREG;
                self.o.disp = self.u16()? as i64;
            } else {
                if self.o.base == 5 {
                    seg = SS;
                }
                self.o.disp = match md {
                    1 => self.i8()? as i64,
                    2 => self.u16()? as i16 as i64,
                    _ => 0,
                };
            }
        } else {
            let mut none = false;
            if rm == 4 {
                let sib = self.u8()?;
                self.o.scale = sib >> 6;
                let index = (sib >> 3 & 7) | (self.rex & 2) << 2;
                if index != 4 {
                    self.o.index = index;
                }
                let base = sib & 7;
                if base == 5 && md == 0 {
                    none = true;
                } else {
                    self.o.base = base | (self.rex & 1) << 3;
                }
            } else if rm == 5 && md == 0 {
                none = true;
                if self.long() {
                    self.o.base = BLOCKIP;
                }
            } else {
                self.o.base = rm | (self.rex & 1) << 3;
            }
            if self.o.base == 4 || self.o.base == 5 {
                seg = SS;
            }
            self.o.disp = if none || md == 2 {
                self.u32()? as i32 as i64
            } else if md == 1 {
                self.i8()? as i64
            } else {
                0
            };
        }
        self.o.seg = self.seg.unwrap_or(seg as u8);
        self.o.kind = if self.long() && self.o.asz == 8 && self.o.seg < FS as u8 { K_FLAT } else { K_SEG };
        Ok(())
    }

    /// ModRM with byte registers on both sides.
    fn modrm8(&mut self) -> D<()> {
        self.o.osz = 1;
        self.modrm()?;
        self.o.reg = self.breg(self.o.reg);
        if self.o.kind == K_REG {
            self.o.rm = self.breg(self.o.rm);
        }
        Ok(())
    }

    /// ModRM; bytes if the opcode's low bit is clear.
    pub fn modrm_w(&mut self, opcode: u8) -> D<()> {
        if opcode & 1 == 0 {
            self.modrm8()
        } else {
            self.modrm()
        }
    }

    pub fn is_reg(&self) -> bool {
        self.o.kind == K_REG
    }

    fn not64(&self) -> D<()> {
        if self.long() {
            Err(Stop::Undefined)
        } else {
            Ok(())
        }
    }

    fn stack(&mut self) {
        self.osz64();
        self.o.seg = SS as u8;
    }

    fn instruction(&mut self) -> D<Handler> {
        let b = self.prefixes()?;
        self.sizes();
        self.o.opcode = b;
        let f: Handler = match b {
            0x00..=0x3F if b & 7 < 6 => {
                let op = (b >> 3) as usize;
                match b & 7 {
                    0..=3 => {
                        self.modrm_w(b)?;
                        let s = alu::size_index(self.o.osz);
                        if b & 2 == 0 {
                            self.lockable = op != 7;
                            if self.is_reg() {
                                alu::RR[op][s]
                            } else {
                                alu::MR[op][s]
                            }
                        } else if self.is_reg() {
                            std::mem::swap(&mut self.o.reg, &mut self.o.rm);
                            alu::RR[op][s]
                        } else {
                            alu::RM[op][s]
                        }
                    }
                    4 => {
                        self.o.osz = 1;
                        self.o.imm = self.u8()? as u64;
                        self.o.rm = 0;
                        alu::RI[op][0]
                    }
                    _ => {
                        self.o.imm = self.imm_z(self.o.osz)?;
                        alu::RI[op][alu::size_index(self.o.osz)]
                    }
                }
            }
            0x06 | 0x0E | 0x16 | 0x1E => {
                self.not64()?;
                self.o.seg = SS as u8;
                self.o.reg = b >> 3;
                mov::push_seg
            }
            0x07 | 0x17 | 0x1F => {
                self.not64()?;
                self.o.reg = b >> 3;
                self.ends = true;
                self.o.seg = SS as u8;
                mov::pop_seg
            }
            0x0F => return self.two_byte(),
            0x27 => return self.plain32(alu::daa),
            0x2F => return self.plain32(alu::das),
            0x37 => return self.plain32(alu::aaa),
            0x3F => return self.plain32(alu::aas),
            0x40..=0x4F => {
                self.o.rm = b & 7;
                if b < 0x48 {
                    by_size!(self.o.osz, alu::inc_r)
                } else {
                    by_size!(self.o.osz, alu::dec_r)
                }
            }
            0x50..=0x57 => {
                self.stack();
                self.o.rm = (b & 7) | (self.rex & 1) << 3;
                if self.long() && self.o.osz == 8 {
                    mov::push_r64
                } else {
                    mov::push_r
                }
            }
            0x58..=0x5F => {
                self.stack();
                self.o.rm = (b & 7) | (self.rex & 1) << 3;
                if self.long() && self.o.osz == 8 {
                    mov::pop_r64
                } else {
                    mov::pop_r
                }
            }
            0x60 => {
                self.not64()?;
                self.o.seg = SS as u8;
                mov::pusha
            }
            0x61 => {
                self.not64()?;
                self.o.seg = SS as u8;
                mov::popa
            }
            0x62 => {
                self.not64()?;
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                mov::bound
            }
            0x63 => {
                self.modrm()?;
                if self.long() {
                    match self.o.osz {
                        8 => mov::movsx::<u32, u64>,
                        4 => mov::movzx::<u32, u32>,
                        _ => mov::movzx::<u16, u16>,
                    }
                } else {
                    self.o.osz = 2;
                    self.lockable = false;
                    sys::arpl
                }
            }
            0x68 => {
                self.stack();
                self.o.imm = self.imm_z(self.o.osz)?;
                mov::push_i
            }
            0x6A => {
                self.stack();
                self.o.imm = self.i8()?;
                mov::push_i
            }
            0x69 | 0x6B => {
                self.modrm()?;
                self.o.imm = if b == 0x69 { self.imm_z(self.o.osz)? } else { self.i8()? };
                by_size!(self.o.osz, alu::imul3)
            }
            0x6C..=0x6F => {
                self.ends = true;
                if b & 1 == 0 {
                    self.o.osz = 1;
                } else if self.o.osz == 8 {
                    self.o.osz = 4;
                }
                if b < 0x6E {
                    string::ins
                } else {
                    string::outs
                }
            }
            0x70..=0x7F => {
                let rel = self.i8()?;
                return self.jcc(b & 15, rel);
            }
            0x80..=0x83 => {
                if b == 0x82 {
                    self.not64()?;
                }
                self.modrm_w(b)?;
                self.o.imm = if b == 0x81 { self.imm_z(self.o.osz)? } else { self.i8()? };
                let op = (self.modrm >> 3 & 7) as usize;
                self.lockable = op != 7;
                let s = alu::size_index(self.o.osz);
                if self.is_reg() {
                    alu::RI[op][s]
                } else {
                    alu::MI[op][s]
                }
            }
            0x84 | 0x85 => {
                self.modrm_w(b)?;
                if self.is_reg() {
                    by_size!(self.o.osz, alu::test_rr)
                } else {
                    by_size!(self.o.osz, alu::test_mr)
                }
            }
            0x86 | 0x87 => {
                self.modrm_w(b)?;
                self.lockable = true;
                if self.is_reg() {
                    by_size!(self.o.osz, mov::xchg_rr)
                } else {
                    by_size!(self.o.osz, mov::xchg_mr)
                }
            }
            0x88 | 0x89 => {
                self.modrm_w(b)?;
                if self.is_reg() {
                    by_size!(self.o.osz, mov::mov_rr)
                } else {
                    by_size!(self.o.osz, mov::mov_mr)
                }
            }
            0x8A | 0x8B => {
                self.modrm_w(b)?;
                if self.is_reg() {
                    std::mem::swap(&mut self.o.reg, &mut self.o.rm);
                    by_size!(self.o.osz, mov::mov_rr)
                } else {
                    by_size!(self.o.osz, mov::mov_rm)
                }
            }
            0x8C => {
                self.modrm()?;
                self.o.reg = self.modrm >> 3 & 7;
                if self.o.reg > 5 {
                    return Err(Stop::Undefined);
                }
                mov::mov_from_seg
            }
            0x8E => {
                self.modrm()?;
                self.o.reg = self.modrm >> 3 & 7;
                if self.o.reg > 5 || self.o.reg == CS as u8 {
                    return Err(Stop::Undefined);
                }
                self.ends = true;
                mov::mov_to_seg
            }
            0x8D => {
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                by_size!(self.o.osz, mov::lea)
            }
            0x8F => {
                self.osz64();
                self.modrm()?;
                if self.modrm >> 3 & 7 != 0 {
                    return Err(Stop::Undefined);
                }
                mov::pop_m
            }
            0x90 if self.rex & 1 == 0 => {
                if self.o.rep == 0xF3 {
                    self.ends = true;
                    ctl::pause
                } else {
                    nop
                }
            }
            0x90..=0x97 => {
                self.o.rm = (b & 7) | (self.rex & 1) << 3;
                self.o.reg = 0;
                by_size!(self.o.osz, mov::xchg_rr)
            }
            0x98 => alu::cbw,
            0x99 => alu::cwd,
            0x9A => {
                self.not64()?;
                return self.far_direct(far::call_direct);
            }
            0x9B => {
                return self.x87_wait();
            }
            0x9C => {
                self.stack();
                mov::pushf
            }
            0x9D => {
                self.stack();
                self.ends = true;
                mov::popf
            }
            0x9E => flags::sahf,
            0x9F => flags::lahf,
            0xA0..=0xA3 => {
                if b & 1 == 0 {
                    self.o.osz = 1;
                }
                self.o.disp = match self.o.asz {
                    2 => self.u16()? as i64,
                    4 => self.u32()? as i64,
                    _ => self.u64()? as i64,
                };
                self.o.kind =
                    if self.long() && self.o.asz == 8 && self.o.seg < FS as u8 { K_FLAT } else { K_SEG };
                self.o.reg = 0;
                if b < 0xA2 {
                    by_size!(self.o.osz, mov::mov_rm)
                } else {
                    by_size!(self.o.osz, mov::mov_mr)
                }
            }
            0xA4..=0xA7 | 0xAA..=0xAF => {
                if b & 1 == 0 {
                    self.o.osz = 1;
                }
                if self.o.rep != 0 {
                    self.ends = true;
                }
                match b & 0xFE {
                    0xA4 => by_size!(self.o.osz, string::movs),
                    0xA6 => by_size!(self.o.osz, string::cmps),
                    0xAA => by_size!(self.o.osz, string::stos),
                    0xAC => by_size!(self.o.osz, string::lods),
                    _ => by_size!(self.o.osz, string::scas),
                }
            }
            0xA8 | 0xA9 => {
                if b == 0xA8 {
                    self.o.osz = 1;
                }
                self.o.imm = self.imm_z(self.o.osz)?;
                by_size!(self.o.osz, alu::test_ri)
            }
            0xB0..=0xB7 => {
                self.o.osz = 1;
                self.o.rm = self.breg((b & 7) | (self.rex & 1) << 3);
                self.o.imm = self.u8()? as u64;
                mov::mov_ri::<u8>
            }
            0xB8..=0xBF => {
                self.o.rm = (b & 7) | (self.rex & 1) << 3;
                self.o.imm = if self.o.osz == 8 { self.u64()? } else { self.imm_z(self.o.osz)? };
                by_size!(self.o.osz, mov::mov_ri)
            }
            0xC0 | 0xC1 | 0xD0..=0xD3 => {
                self.modrm_w(b)?;
                let op = self.modrm >> 3 & 7;
                if b & 0xFE == 0xD2 {
                    shift::by_cl(op, self.o.osz, self.is_reg())
                } else {
                    self.o.imm = if b < 0xD0 { self.u8()? as u64 } else { 1 };
                    shift::by_imm(op, self.o.osz, self.is_reg())
                }
            }
            0xC2 | 0xC3 => {
                self.near();
                self.o.seg = SS as u8;
                if b == 0xC2 {
                    self.o.imm = self.u16()? as u64;
                }
                ctl::ret
            }
            0xC4 | 0xC5 => {
                let next = *self.b.get(self.p).ok_or(Stop::Short)?;
                if self.long() || next >= 0xC0 && self.mode != MODE16 {
                    return self.vex(b);
                }
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                self.ends = true;
                self.o.imm = if b == 0xC4 { ES } else { DS } as u64;
                mov::load_far
            }
            0xC6 | 0xC7 => {
                self.modrm_w(b)?;
                if self.modrm >> 3 & 7 != 0 {
                    return Err(Stop::Undefined);
                }
                self.o.imm = self.imm_z(self.o.osz)?;
                if self.is_reg() {
                    by_size!(self.o.osz, mov::mov_ri)
                } else {
                    by_size!(self.o.osz, mov::mov_mi)
                }
            }
            0xC8 => {
                self.stack();
                self.o.imm = self.u16()? as u64;
                self.o.reg = self.u8()?;
                mov::enter
            }
            0xC9 => {
                self.stack();
                mov::leave
            }
            0xCA | 0xCB => {
                self.o.seg = SS as u8;
                if b == 0xCA {
                    self.o.imm = self.u16()? as u64;
                }
                self.ends = true;
                far::ret_far
            }
            0xCC => {
                self.ends = true;
                sys::int3
            }
            0xCD => {
                self.o.imm = self.u8()? as u64;
                self.ends = true;
                sys::int_n
            }
            0xCE => {
                self.not64()?;
                self.ends = true;
                sys::into
            }
            0xCF => {
                self.o.seg = SS as u8;
                self.ends = true;
                far::iret
            }
            0xD4 | 0xD5 => {
                self.not64()?;
                self.o.imm = self.u8()? as u64;
                if b == 0xD4 {
                    alu::aam
                } else {
                    alu::aad
                }
            }
            0xD6 => return self.plain32(alu::salc),
            0xD7 => string::xlat,
            0xD8..=0xDF => return self.x87(b),
            0xE0..=0xE3 => {
                self.near();
                self.o.imm = self.i8()?;
                ctl::loops
            }
            0xE4 | 0xE5 | 0xEC | 0xED => {
                if b & 1 == 0 {
                    self.o.osz = 1;
                } else if self.o.osz == 8 {
                    self.o.osz = 4;
                }
                self.ends = true;
                if b < 0xE6 {
                    self.o.imm = self.u8()? as u64;
                    sys::in_imm
                } else {
                    sys::in_dx
                }
            }
            0xE6 | 0xE7 | 0xEE | 0xEF => {
                if b & 1 == 0 {
                    self.o.osz = 1;
                } else if self.o.osz == 8 {
                    self.o.osz = 4;
                }
                self.ends = true;
                if b < 0xE8 {
                    self.o.imm = self.u8()? as u64;
                    sys::out_imm
                } else {
                    sys::out_dx
                }
            }
            0xE8 | 0xE9 | 0xEB => {
                self.near();
                self.o.seg = SS as u8;
                self.o.imm = if b == 0xEB {
                    self.i8()?
                } else if self.o.osz == 2 {
                    self.u16()? as i16 as i64 as u64
                } else {
                    self.u32()? as i32 as i64 as u64
                };
                match (b, self.o.osz) {
                    (0xE8, 8) => ctl::call64,
                    (0xE8, _) => ctl::call,
                    (_, 8) => ctl::jmp64,
                    _ => ctl::jmp,
                }
            }
            0xEA => {
                self.not64()?;
                return self.far_direct(far::jmp_direct);
            }
            0xF1 => {
                self.ends = true;
                sys::int1
            }
            0xF4 => {
                self.ends = true;
                sys::hlt
            }
            0xF5 => alu::cmc,
            0xF6 | 0xF7 => {
                self.modrm_w(b)?;
                let op = self.modrm >> 3 & 7;
                if op < 2 {
                    self.o.imm = self.imm_z(self.o.osz)?;
                }
                self.lockable = op == 2 || op == 3;
                match op {
                    0 | 1 => {
                        if self.is_reg() {
                            by_size!(self.o.osz, alu::test_ri)
                        } else {
                            by_size!(self.o.osz, alu::test_mi)
                        }
                    }
                    2 => by_size!(self.o.osz, alu::not),
                    3 => by_size!(self.o.osz, alu::neg),
                    4 => by_size!(self.o.osz, alu::mul),
                    5 => by_size!(self.o.osz, alu::imul),
                    6 => by_size!(self.o.osz, alu::div),
                    _ => by_size!(self.o.osz, alu::idiv),
                }
            }
            0xF8 => alu::clc,
            0xF9 => alu::stc,
            0xFA => sys::cli,
            0xFB => {
                self.ends = true;
                sys::sti
            }
            0xFC => alu::cld,
            0xFD => alu::std,
            0xFE | 0xFF => {
                self.modrm_w(b)?;
                let op = self.modrm >> 3 & 7;
                self.lockable = op < 2;
                match op {
                    0 if self.is_reg() => by_size!(self.o.osz, alu::inc_r),
                    1 if self.is_reg() => by_size!(self.o.osz, alu::dec_r),
                    0 => by_size!(self.o.osz, alu::inc_m),
                    1 => by_size!(self.o.osz, alu::dec_m),
                    _ if b == 0xFE => return Err(Stop::Undefined),
                    2 => {
                        self.near();
                        ctl::call_rm
                    }
                    4 => {
                        self.near();
                        ctl::jmp_rm
                    }
                    3 | 5 => {
                        if self.is_reg() {
                            return Err(Stop::Undefined);
                        }
                        self.ends = true;
                        if op == 3 {
                            far::call_mem
                        } else {
                            far::jmp_mem
                        }
                    }
                    6 => {
                        self.osz64();
                        mov::push_m
                    }
                    _ => return Err(Stop::Undefined),
                }
            }
            _ => return Err(Stop::Undefined),
        };
        Ok(f)
    }

    fn plain32(&mut self, f: Handler) -> D<Handler> {
        self.not64()?;
        Ok(f)
    }

    /// Near branches: 64-bit in 64-bit mode whatever the prefix (as Intel has it), and ends the block.
    fn near(&mut self) {
        if self.long() {
            self.o.osz = 8;
        }
        self.ends = true;
    }

    pub fn jcc(&mut self, cc: u8, rel: u64) -> D<Handler> {
        self.near();
        self.o.imm = rel;
        Ok(if self.o.osz == 8 { ctl::JCC64[cc as usize] } else { ctl::JCC[cc as usize] })
    }

    fn far_direct(&mut self, f: Handler) -> D<Handler> {
        let off = if self.o.osz == 2 { self.u16()? as u64 } else { self.u32()? as u64 };
        self.o.disp = off as i64;
        self.o.imm = self.u16()? as u64;
        self.ends = true;
        Ok(f)
    }
}
