//! The decoder's two- and three-byte opcodes, VEX-coded integer instructions, and the hand-over of vector
//! and x87 instructions.

use super::decode::*;
use super::op::*;
use super::{alu, bits, ctl, mov, shift, sys, vec};
use crate::by_size;
use crate::simd::{is_gather, Map, Prefix, Rm, VecInsn, Vex};

impl Decoder<'_> {
    pub(super) fn two_byte(&mut self) -> D<Handler> {
        let b = self.u8()?;
        self.o.opcode = b;
        self.o.map = 1;
        let f: Handler = match b {
            0x00 => {
                self.modrm()?;
                self.ends = true;
                match self.modrm >> 3 & 7 {
                    0 => sys::sldt,
                    1 => sys::str,
                    2 => sys::lldt,
                    3 => sys::ltr,
                    4 => sys::verr,
                    5 => sys::verw,
                    _ => return Err(Stop::Undefined),
                }
            }
            0x01 => {
                self.modrm()?;
                self.ends = self.modrm != 0xF8;
                match (self.modrm >> 3 & 7, self.is_reg(), self.modrm) {
                    (0, false, _) => sys::sgdt,
                    (1, false, _) => sys::sidt,
                    (2, false, _) => sys::lgdt,
                    (3, false, _) => sys::lidt,
                    (7, false, _) => sys::invlpg,
                    (4, _, _) => sys::smsw,
                    (6, _, _) => sys::lmsw,
                    (_, true, 0xC8) => sys::monitor,
                    (_, true, 0xC9) => sys::mwait,
                    (_, true, 0xCA) => sys::clac,
                    (_, true, 0xCB) => sys::stac,
                    (_, true, 0xD0) => sys::xgetbv,
                    (_, true, 0xD1) => sys::xsetbv,
                    (_, true, 0xF8) if self.long() => sys::swapgs,
                    (_, true, 0xF9) => sys::rdtscp,
                    _ => return Err(Stop::Undefined),
                }
            }
            0x02 => {
                self.modrm()?;
                sys::lar
            }
            0x03 => {
                self.modrm()?;
                sys::lsl
            }
            0x05 => {
                self.ends = true;
                sys::syscall
            }
            0x06 => {
                self.ends = true;
                sys::clts
            }
            0x07 => {
                self.ends = true;
                sys::sysret
            }
            0x08 | 0x09 => {
                self.ends = true;
                sys::invd
            }
            0x0B => return Err(Stop::Undefined),
            0x0D | 0x18..=0x1F => {
                self.modrm()?;
                nop
            }
            0x20..=0x23 => {
                // Register operands whatever mod says.
                let m = self.u8()?;
                self.o.reg = (m >> 3 & 7) | (self.rex & 4) << 1;
                self.o.rm = (m & 7) | (self.rex & 1) << 3;
                self.ends = true;
                self.o.osz = if self.long() { 8 } else { 4 };
                if b & 1 == 0 && self.lock && self.o.reg == 0 {
                    // AMD's alternative encoding of CR8.
                    self.lock = false;
                    self.o.reg = 8;
                }
                match b {
                    0x20 => sys::mov_from_cr,
                    0x22 => sys::mov_to_cr,
                    0x21 => sys::mov_from_dr,
                    _ => sys::mov_to_dr,
                }
            }
            0x30 => {
                self.ends = true;
                sys::wrmsr
            }
            0x31 => {
                self.ends = true;
                sys::rdtsc
            }
            0x32 => {
                self.ends = true;
                sys::rdmsr
            }
            0x33 => {
                self.ends = true;
                sys::rdpmc
            }
            0x34 => {
                self.ends = true;
                sys::sysenter
            }
            0x35 => {
                self.ends = true;
                sys::sysexit
            }
            0x38 => return self.map38(),
            0x3A => return self.map3a(),
            0x40..=0x4F => {
                self.modrm()?;
                alu::CMOV[(b & 15) as usize][alu::size_index(self.o.osz)]
            }
            0x80..=0x8F => {
                let rel = if self.o.osz == 2 && !self.long() {
                    self.u16()? as i16 as i64 as u64
                } else {
                    self.u32()? as i32 as i64 as u64
                };
                return self.jcc(b & 15, rel);
            }
            0x90..=0x9F => {
                self.modrm_w(0)?;
                ctl::SETCC[(b & 15) as usize]
            }
            0xA0 | 0xA8 => {
                self.osz64();
                self.o.reg = if b == 0xA0 { FS } else { GS } as u8;
                self.o.seg = SS as u8;
                mov::push_seg
            }
            0xA1 | 0xA9 => {
                self.osz64();
                self.o.reg = if b == 0xA1 { FS } else { GS } as u8;
                self.o.seg = SS as u8;
                self.ends = true;
                mov::pop_seg
            }
            0xA2 => {
                self.ends = true;
                sys::cpuid
            }
            0xA3 | 0xAB | 0xB3 | 0xBB => {
                self.modrm()?;
                self.lockable = b != 0xA3;
                bits::bt_reg(b >> 3 & 3, self.o.osz)
            }
            0xBA => {
                self.modrm()?;
                let op = self.modrm >> 3 & 7;
                self.o.imm = self.u8()? as u64;
                if op < 4 {
                    return Err(Stop::Undefined);
                }
                self.lockable = op > 4;
                bits::bt_imm(op & 3, self.o.osz)
            }
            0xA4 | 0xAC => {
                self.modrm()?;
                self.o.imm = self.u8()? as u64;
                if b == 0xA4 {
                    by_size!(self.o.osz, shift::shld_i)
                } else {
                    by_size!(self.o.osz, shift::shrd_i)
                }
            }
            0xA5 | 0xAD => {
                self.modrm()?;
                if b == 0xA5 {
                    by_size!(self.o.osz, shift::shld_cl)
                } else {
                    by_size!(self.o.osz, shift::shrd_cl)
                }
            }
            0xAE => return self.group15(),
            0xAF => {
                self.modrm()?;
                by_size!(self.o.osz, alu::imul2)
            }
            0xB0 | 0xB1 => {
                self.modrm_w(b)?;
                self.lockable = true;
                by_size!(self.o.osz, bits::cmpxchg)
            }
            0xB2 | 0xB4 | 0xB5 => {
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                self.ends = true;
                self.o.imm = match b {
                    0xB2 => SS,
                    0xB4 => FS,
                    _ => GS,
                } as u64;
                mov::load_far
            }
            0xB6 | 0xBE => {
                let osz = self.o.osz;
                self.modrm()?;
                if self.is_reg() {
                    self.o.rm = self.breg(self.o.rm);
                }
                match (b, osz) {
                    (0xB6, 2) => mov::movzx::<u8, u16>,
                    (0xB6, 4) => mov::movzx::<u8, u32>,
                    (0xB6, _) => mov::movzx::<u8, u64>,
                    (_, 2) => mov::movsx::<u8, u16>,
                    (_, 4) => mov::movsx::<u8, u32>,
                    _ => mov::movsx::<u8, u64>,
                }
            }
            0xB7 | 0xBF => {
                self.modrm()?;
                match (b, self.o.osz) {
                    (0xB7, 2) => mov::movzx::<u16, u16>,
                    (0xB7, 4) => mov::movzx::<u16, u32>,
                    (0xB7, _) => mov::movzx::<u16, u64>,
                    (_, 2) => mov::movsx::<u16, u16>,
                    (_, 4) => mov::movsx::<u16, u32>,
                    _ => mov::movsx::<u16, u64>,
                }
            }
            0xB8 if self.o.rep == 0xF3 => {
                self.modrm()?;
                by_size!(self.o.osz, bits::popcnt)
            }
            0xB9 | 0xFF => {
                self.modrm()?;
                return Err(Stop::Undefined);
            }
            0xBC => {
                self.modrm()?;
                if self.o.rep == 0xF3 {
                    by_size!(self.o.osz, bits::tzcnt)
                } else {
                    by_size!(self.o.osz, bits::bsf)
                }
            }
            0xBD => {
                self.modrm()?;
                if self.o.rep == 0xF3 {
                    by_size!(self.o.osz, bits::lzcnt)
                } else {
                    by_size!(self.o.osz, bits::bsr)
                }
            }
            0xC0 | 0xC1 => {
                self.modrm_w(b)?;
                self.lockable = true;
                by_size!(self.o.osz, bits::xadd)
            }
            0xC3 if !self.p66 && self.o.rep == 0 => {
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                // 32 or 64 bits in every mode.
                self.o.osz = self.o.osz.max(4);
                by_size!(self.o.osz, mov::mov_mr)
            }
            0xC7 => {
                let at = self.p;
                self.modrm()?;
                match (self.modrm >> 3 & 7, self.is_reg()) {
                    (4, false) => {
                        self.p = at;
                        return self.vector(Map::M0F, 0xC7);
                    }
                    (1, false) => {
                        self.lockable = true;
                        if self.o.osz == 8 {
                            bits::cmpxchg16b
                        } else {
                            bits::cmpxchg8b
                        }
                    }
                    (6, true) | (7, true) if self.o.rep != 0xF3 => {
                        self.ends = true;
                        sys::rdrand
                    }
                    (7, true) => {
                        self.ends = true;
                        sys::rdpid
                    }
                    _ => return Err(Stop::Undefined),
                }
            }
            0xC8..=0xCF => {
                self.o.rm = (b & 7) | (self.rex & 1) << 3;
                bits::bswap
            }
            _ => return self.vector(Map::M0F, b),
        };
        Ok(f)
    }

    fn map38(&mut self) -> D<Handler> {
        let b = self.u8()?;
        self.o.opcode = b;
        self.o.map = 2;
        let f: Handler = match b {
            0xF0 | 0xF1 if self.o.rep == 0xF2 => {
                let osz = self.o.osz;
                self.modrm_w(b)?;
                if b == 0xF0 {
                    // The destination is a plain 32- or 64-bit register.
                    self.o.reg = (self.modrm >> 3 & 7) | (self.rex & 4) << 1;
                }
                let _ = osz;
                by_size!(self.o.osz, bits::crc32)
            }
            0xF0 | 0xF1 if self.o.rep == 0 => {
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                if b == 0xF0 {
                    by_size!(self.o.osz, bits::movbe_load)
                } else {
                    by_size!(self.o.osz, bits::movbe_store)
                }
            }
            0xF6 if self.p66 || self.o.rep == 0xF3 => {
                self.modrm()?;
                self.o.osz = if self.rex & 8 != 0 { 8 } else { 4 };
                if self.o.rep == 0xF3 {
                    by_size!(self.o.osz, bits::adox)
                } else {
                    by_size!(self.o.osz, bits::adcx)
                }
            }
            0x82 if self.p66 => {
                self.modrm()?;
                if self.is_reg() {
                    return Err(Stop::Undefined);
                }
                self.ends = true;
                sys::invpcid
            }
            _ => return self.vector(Map::M0F38, b),
        };
        Ok(f)
    }

    fn map3a(&mut self) -> D<Handler> {
        let b = self.u8()?;
        self.o.opcode = b;
        self.o.map = 3;
        self.vector(Map::M0F3A, b)
    }

    fn group15(&mut self) -> D<Handler> {
        let at = self.p;
        self.modrm()?;
        let op = self.modrm >> 3 & 7;
        if self.is_reg() {
            return Ok(match (op, self.o.rep) {
                (0..=3, 0xF3) if self.long() => {
                    self.ends = true;
                    sys::fsgsbase
                }
                (5..=7, 0) => nop,
                _ => return Err(Stop::Undefined),
            });
        }
        match op {
            7 => Ok(sys::clflush),
            6 if self.p66 => Ok(sys::clflush),
            _ => {
                self.p = at;
                self.vector(Map::M0F, 0xAE)
            }
        }
    }

    /// A vector instruction: ModRM, and an immediate where the opcode has one.
    fn vector(&mut self, map: Map, opcode: u8) -> D<Handler> {
        // EMMS is the only one without ModRM.
        let has_modrm = !(map == Map::M0F && opcode == 0x77);
        if has_modrm {
            self.modrm()?;
        }
        let prefix = match (self.o.rep, self.p66) {
            (0xF3, _) => Prefix::F3,
            (0xF2, _) => Prefix::F2,
            (_, true) => Prefix::P66,
            _ => Prefix::None,
        };
        let imm = if has_imm8(map, opcode) { self.u8()? } else { 0 };
        self.hand_over(map, prefix, opcode, imm, None)
    }

    pub(super) fn x87(&mut self, opcode: u8) -> D<Handler> {
        self.modrm()?;
        self.hand_over(Map::X87, Prefix::None, opcode, 0, None)
    }

    pub(super) fn x87_wait(&mut self) -> D<Handler> {
        Ok(sys::fwait)
    }

    fn hand_over(&mut self, map: Map, prefix: Prefix, opcode: u8, imm: u8, vex: Option<Vex>) -> D<Handler> {
        let mut insn = VecInsn {
            map,
            prefix,
            opcode,
            modrm: self.modrm,
            reg: self.o.reg,
            rm: if self.is_reg() { Rm::Reg(self.o.rm) } else { Rm::Mem },
            rex_w: self.rex & 8 != 0,
            long: self.long(),
            opsize16: self.o.osz == 2,
            imm,
            vex,
            host: None,
        };
        let f = vec::resolve(&mut insn).ok_or(Stop::Undefined)?;
        let v = Box::new(VecOp { insn, f });
        self.o.imm = &*v as *const VecOp as u64;
        self.o.map = VECTOR;
        self.vec = Some(v);
        Ok(vec::run)
    }

    /// VEX: the integer instructions of BMI1 and BMI2 (vvvv goes to `imm`), and the vector instructions.
    pub(super) fn vex(&mut self, first: u8) -> D<Handler> {
        if self.rex != 0 || self.p66 || self.o.rep != 0 || self.lock {
            return Err(Stop::Undefined);
        }
        let p1 = self.u8()?;
        let (map, p2) = if first == 0xC5 { (1, p1) } else { (p1 & 31, self.u8()?) };
        let mut rex = 0x40;
        if p1 & 0x80 == 0 {
            rex |= 4;
        }
        if first == 0xC4 {
            if p1 & 0x40 == 0 {
                rex |= 2;
            }
            if p1 & 0x20 == 0 {
                rex |= 1;
            }
            if p2 & 0x80 != 0 {
                rex |= 8;
            }
        }
        if !self.long() {
            rex = 0;
        }
        self.rex = rex;
        let vvvv = (!p2 >> 3 & 15) & if self.long() { 15 } else { 7 };
        let (l, pp) = (p2 >> 2 & 1, p2 & 3);
        let opcode = self.u8()?;
        self.o.opcode = opcode;
        self.o.map = 4 + map;
        self.o.osz = if rex & 8 != 0 { 8 } else { 4 };
        let integer = matches!((map, opcode), (2, 0xF2..=0xF7) | (3, 0xF0));
        if !integer {
            // Vector instructions have W outside 64-bit mode too.
            self.rex = rex | if first == 0xC4 { p2 >> 4 & 8 } else { 0 };
            return self.vex_vector(map, pp, opcode, Vex { l: l != 0, v: vvvv });
        }
        if l != 0 {
            return Err(Stop::Undefined);
        }
        self.modrm()?;
        let w = self.o.osz;
        self.o.imm = vvvv as u64;
        let f: Handler = match (map, opcode, pp) {
            (2, 0xF2, 0) => by_size!(w, bits::andn),
            (2, 0xF3, 0) => match self.modrm >> 3 & 7 {
                1 => by_size!(w, bits::blsr),
                2 => by_size!(w, bits::blsmsk),
                3 => by_size!(w, bits::blsi),
                _ => return Err(Stop::Undefined),
            },
            (2, 0xF5, 0) => by_size!(w, bits::bzhi),
            (2, 0xF5, 2) => by_size!(w, bits::pext),
            (2, 0xF5, 3) => by_size!(w, bits::pdep),
            (2, 0xF6, 3) => by_size!(w, bits::mulx),
            (2, 0xF7, 0) => by_size!(w, bits::bextr),
            (2, 0xF7, 1) => by_size!(w, bits::shlx),
            (2, 0xF7, 2) => by_size!(w, bits::sarx),
            (2, 0xF7, 3) => by_size!(w, bits::shrx),
            (3, 0xF0, 3) if vvvv == 0 => {
                self.o.imm = self.u8()? as u64;
                by_size!(w, bits::rorx)
            }
            _ => return Err(Stop::Undefined),
        };
        Ok(f)
    }

    fn vex_vector(&mut self, map: u8, pp: u8, opcode: u8, vex: Vex) -> D<Handler> {
        let map = match map {
            1 => Map::M0F,
            2 => Map::M0F38,
            3 => Map::M0F3A,
            _ => return Err(Stop::Undefined),
        };
        let prefix = [Prefix::None, Prefix::P66, Prefix::F3, Prefix::F2][pp as usize & 3];
        // VZEROUPPER and VZEROALL are the only ones without ModRM.
        let mut imm = 0;
        if !(map == Map::M0F && opcode == 0x77) {
            let at = self.p;
            self.modrm()?;
            if is_gather(map, opcode) {
                // The index is a vector register, number 4 too: the unit adds it.
                if self.is_reg() || self.modrm & 7 != 4 || self.o.asz == 2 {
                    return Err(Stop::Undefined);
                }
                let sib = self.b[at + 1];
                imm = (sib >> 3 & 7) | (self.rex & 2) << 2 | (sib >> 6) << 4;
                self.o.index = NOREG;
            }
        }
        if has_imm8(map, opcode) {
            imm = self.u8()?;
        }
        self.hand_over(map, prefix, opcode, imm, Some(vex))
    }
}

/// Vector opcodes with an immediate byte.
fn has_imm8(map: Map, opcode: u8) -> bool {
    match map {
        Map::M0F => matches!(opcode, 0x70..=0x73 | 0xC2 | 0xC4 | 0xC5 | 0xC6),
        Map::M0F3A => true,
        _ => false,
    }
}
