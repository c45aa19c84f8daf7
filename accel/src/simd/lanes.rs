//! What unmasked overflow and underflow need to know of a packed result. The routines run with all
//! exceptions masked; a processor with one of these unmasked judges precision by the result with
//! an unbounded exponent (SDM vol. 1, section 11.5.2.4 to 11.5.2.6).

use super::{Map, Prefix, VecInsn};

pub(super) const OE: u32 = 8;
pub(super) const UE: u32 = 0x10;
pub(super) const PE: u32 = 0x20;

/// How result lanes follow from operand lanes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// No floating-point result that can overflow or underflow.
    None,
    /// Multiplication and division.
    Product,
    /// Addition and subtraction lane by lane.
    Sum,
    /// Horizontal addition and subtraction.
    Horizontal,
    /// Conversion of double to single precision.
    Narrow,
    /// Dot products: several roundings, looked at for tiny results only.
    Dot,
}

/// The lanes of a floating-point result that an operation computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Lanes {
    kind: Kind,
    double: bool,
    count: usize,
}

#[derive(Clone, Copy)]
struct Format {
    bytes: usize,
    fraction: u32,
    bias: u64,
}
const SINGLE: Format = Format { bytes: 4, fraction: 23, bias: 127 };
const DOUBLE: Format = Format { bytes: 8, fraction: 52, bias: 1023 };

impl Format {
    fn get(self, v: &[u8; 16], lane: usize) -> u64 {
        let mut b = [0; 8];
        b[..self.bytes].copy_from_slice(&v[lane * self.bytes..][..self.bytes]);
        u64::from_le_bytes(b)
    }
    fn set(self, v: &mut [u8; 16], lane: usize, bits: u64) {
        v[lane * self.bytes..][..self.bytes].copy_from_slice(&bits.to_le_bytes()[..self.bytes]);
    }
    fn fraction_of(self, bits: u64) -> u64 {
        bits & ((1 << self.fraction) - 1)
    }
    fn exponent_of(self, bits: u64) -> u64 {
        bits >> self.fraction & (2 * self.bias + 1)
    }
    fn tiny(self, bits: u64) -> bool {
        self.exponent_of(bits) == 0 && self.fraction_of(bits) != 0
    }
    fn zero(self, bits: u64) -> bool {
        self.exponent_of(bits) == 0 && self.fraction_of(bits) == 0
    }
    fn finite(self, bits: u64) -> bool {
        self.exponent_of(bits) != 2 * self.bias + 1
    }
    /// Infinite or the largest finite number, what an overflow gives.
    fn huge(self, bits: u64) -> bool {
        !self.finite(bits) && self.fraction_of(bits) == 0
            || self.exponent_of(bits) == 2 * self.bias && self.fraction_of(bits) == (1 << self.fraction) - 1
    }
    /// The same significand as a number from 1 to 2.
    fn significand(self, bits: u64) -> u64 {
        let sign = bits & 1 << (self.bytes * 8 - 1);
        let mut fraction = self.fraction_of(bits);
        if self.exponent_of(bits) == 0 && fraction != 0 {
            while fraction >> self.fraction == 0 {
                fraction <<= 1;
            }
        }
        sign | self.bias << self.fraction | self.fraction_of(fraction)
    }
    /// A quarter, for numbers so large that this is exact.
    fn quarter(self, bits: u64) -> u64 {
        if self.exponent_of(bits) > self.bias / 4 {
            bits - (2 << self.fraction)
        } else {
            bits
        }
    }
}

impl Lanes {
    pub const NONE: Lanes = Lanes { kind: Kind::None, double: false, count: 0 };

    pub fn of(insn: &VecInsn) -> Lanes {
        let kind = match (insn.map, insn.opcode) {
            (Map::M0F, 0x58 | 0x5C | 0xD0) => Kind::Sum,
            (Map::M0F, 0x59 | 0x5E) => Kind::Product,
            (Map::M0F, 0x7C | 0x7D) => Kind::Horizontal,
            (Map::M0F, 0x5A) if matches!(insn.prefix, Prefix::P66 | Prefix::F2) => Kind::Narrow,
            (Map::M0F3A, 0x40 | 0x41) => Kind::Dot,
            _ => return Lanes::NONE,
        };
        let packed_single = matches!(insn.opcode, 0x7C | 0x7D | 0xD0) && insn.prefix == Prefix::F2;
        let double = match kind {
            Kind::Narrow => false,
            Kind::Dot => insn.opcode == 0x41,
            _ => !packed_single && matches!(insn.prefix, Prefix::P66 | Prefix::F2),
        };
        let count = match (kind, insn.prefix) {
            (Kind::Narrow, Prefix::P66) => 2,
            _ if packed_single => 4,
            (_, Prefix::F3 | Prefix::F2) => 1,
            _ if double => 2,
            _ => 4,
        };
        Lanes { kind, double, count }
    }

    fn format(self) -> Format {
        if self.double {
            DOUBLE
        } else {
            SINGLE
        }
    }

    /// Whether a result is denormal.
    pub fn any_tiny(self, result: &[u8; 16]) -> bool {
        let f = self.format();
        (0..self.count).any(|i| f.tiny(f.get(result, i)))
    }

    /// Change the operands of lanes that overflowed or underflowed (as `unmasked` says) so that the
    /// same operation is inexact exactly if it is with an unbounded exponent.
    pub fn unbounded(
        self,
        dst: &mut [u8; 16],
        src: &mut [u8; 16],
        result: &[u8; 16],
        unmasked: u32,
        daz: bool,
    ) {
        let f = self.format();
        // Zero, or a denormal that counts as zero.
        let zero = |f: Format, v: u64| f.zero(v) || daz && f.tiny(v);
        for i in 0..self.count {
            let r = f.get(result, i);
            let tiny = unmasked & UE != 0 && (f.tiny(r) || f.exponent_of(r) <= 1);
            let huge = unmasked & OE != 0 && f.huge(r);
            match self.kind {
                Kind::Product if tiny || huge => {
                    let (a, b) = (f.get(dst, i), f.get(src, i));
                    if f.finite(a) && f.finite(b) && !zero(f, a) && !zero(f, b) {
                        f.set(dst, i, f.significand(a));
                        f.set(src, i, f.significand(b));
                    }
                }
                Kind::Narrow if tiny || huge => {
                    let a = DOUBLE.get(src, i);
                    if DOUBLE.finite(a) && !zero(DOUBLE, a) {
                        DOUBLE.set(src, i, DOUBLE.significand(a));
                    }
                }
                Kind::Sum if huge => {
                    let (a, b) = (f.get(dst, i), f.get(src, i));
                    if f.finite(a) && f.finite(b) {
                        f.set(dst, i, f.quarter(a));
                        f.set(src, i, f.quarter(b));
                    }
                }
                Kind::Horizontal if huge => {
                    let half = self.count / 2;
                    let from = if i < half { &mut *dst } else { &mut *src };
                    let at = i % half * 2;
                    let (a, b) = (f.get(from, at), f.get(from, at + 1));
                    if f.finite(a) && f.finite(b) {
                        f.set(from, at, f.quarter(a));
                        f.set(from, at + 1, f.quarter(b));
                    }
                }
                _ => {}
            }
        }
    }
}
