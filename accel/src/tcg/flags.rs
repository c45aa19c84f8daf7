//! Lazy arithmetic flags.
//!
//! Two words hold all six: `f_res`, the last result sign-extended to 64 bits (ZF, SF, PF), and `f_aux`:
//! bit 63 the carry out of the operand, bit 62 the carry into its top bit (OF is their difference), bit 3
//! the carry out of bit 3 (AF), bits 8..15 a difference to the result's low byte for PF, bit 16 one to SF.

use super::op::{Int, Op};
use super::SoftCpu;

pub const CF: u64 = 1;
pub const PF: u64 = 4;
pub const AF: u64 = 0x10;
pub const ZF: u64 = 0x40;
pub const SF: u64 = 0x80;
pub const TF: u64 = 0x100;
pub const IF: u64 = 0x200;
pub const DF: u64 = 0x400;
pub const OF: u64 = 0x800;
pub const IOPL: u64 = 0x3000;
pub const NT: u64 = 0x4000;
pub const RF: u64 = 0x1_0000;
pub const VM: u64 = 0x2_0000;
pub const AC: u64 = 0x4_0000;
pub const VIF: u64 = 0x8_0000;
pub const VIP: u64 = 0x10_0000;
pub const ID: u64 = 0x20_0000;
/// The six lazy ones.
pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;

const TOP2: u64 = 3 << 62;

impl SoftCpu {
    /// Flags from a result and the vector of carries out of each bit.
    #[inline(always)]
    pub(crate) fn set_arith<T: Int>(&mut self, r: u64, carries: u64) {
        self.f_res = T::sx(r);
        self.f_aux = (carries << (64 - T::BITS)) & TOP2 | carries & 8;
    }

    /// Flags of AND, OR, XOR, TEST: CF = OF = AF = 0.
    #[inline(always)]
    pub(crate) fn set_logic<T: Int>(&mut self, r: u64) {
        self.f_res = T::sx(r);
        self.f_aux = 0;
    }

    /// ZF, SF, PF from a result; CF and OF as given; AF = 0.
    #[inline(always)]
    pub(crate) fn set_res_co<T: Int>(&mut self, r: u64, cf: bool, of: bool) {
        self.f_res = T::sx(r);
        self.f_aux = (cf as u64) << 63 | ((cf ^ of) as u64) << 62;
    }

    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        self.f_aux >> 63 != 0
    }
    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        (self.f_aux ^ self.f_aux << 1) >> 63 != 0
    }
    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        self.f_res == 0
    }
    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        (self.f_res >> 63 ^ self.f_aux >> 16) & 1 != 0
    }
    #[inline(always)]
    pub(crate) fn pf(&self) -> bool {
        ((self.f_res ^ self.f_aux >> 8) as u8).count_ones() & 1 == 0
    }
    #[inline(always)]
    pub(crate) fn af(&self) -> bool {
        self.f_aux & 8 != 0
    }

    /// Change CF alone.
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.f_aux = self.f_aux & !TOP2 | (cf as u64) << 63 | ((cf ^ of) as u64) << 62;
    }
    /// Change OF alone.
    #[inline(always)]
    pub(crate) fn set_of(&mut self, of: bool) {
        let cf = self.cf();
        self.f_aux = self.f_aux & !TOP2 | (cf as u64) << 63 | ((cf ^ of) as u64) << 62;
    }
    /// Change ZF alone.
    pub(crate) fn set_zf(&mut self, zf: bool) {
        let f = self.arith_flags() & !ZF;
        self.set_arith_flags(if zf { f | ZF } else { f });
    }

    /// The six arithmetic flags as bits of RFLAGS.
    pub(crate) fn arith_flags(&self) -> u64 {
        // Without branches, which would be foreseen badly.
        let bit = |b: bool, mask: u64| b as u64 * mask;
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Set the six arithmetic flags from bits of RFLAGS.
    pub(crate) fn set_arith_flags(&mut self, f: u64) {
        let bit = |mask: u64| (f & mask != 0) as u64;
        self.f_res = (1 - bit(ZF)) << 8;
        self.f_aux =
            bit(CF) << 63 | (bit(CF) ^ bit(OF)) << 62 | bit(AF) << 3 | (1 - bit(PF)) << 8 | bit(SF) << 16;
    }

    /// RFLAGS as a whole.
    pub(crate) fn rflags(&self) -> u64 {
        self.eflags & !ARITH | 2 | self.arith_flags()
    }

    /// Set RFLAGS as a whole; keeps what depends on IF, TF, AC and VM in step.
    pub(crate) fn set_rflags(&mut self, f: u64) {
        self.set_arith_flags(f);
        let old = self.eflags;
        self.eflags = f & 0x3F_7FD5 & !ARITH | 2;
        if (old ^ self.eflags) & (IF | TF | AC | VM | RF | VIF | VIP) != 0 {
            self.flags_changed();
        }
    }

    /// Condition code `C` (0..15) of Jcc, SETcc, CMOVcc.
    #[inline(always)]
    pub(crate) fn cond<const C: u8>(&self) -> bool {
        let v = match C >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() | (self.sf() != self.of()),
        };
        v != (C & 1 != 0)
    }
}

/// LAHF.
pub fn lahf(c: &mut SoftCpu, _: &Op) -> super::op::R<()> {
    let f = c.rflags();
    c.set::<u8>(super::op::HIGH, f & 0xD7 | 2);
    Ok(())
}
/// SAHF.
pub fn sahf(c: &mut SoftCpu, _: &Op) -> super::op::R<()> {
    let f = c.get::<u8>(super::op::HIGH) & (SF | ZF | AF | PF | CF);
    let of = c.arith_flags() & OF;
    c.set_arith_flags(f | of);
    Ok(())
}
