//! Which operations are run by the host's own instruction, and with what operands.

use super::{Feature, Map, Prefix};

/// How a routine takes its operands (see `host`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// xmm, xmm/m
    Xmm,
    /// mm, mm/m
    Mmx,
    /// xmm, mm/m64
    XmmMmx,
    /// mm, xmm/m
    MmxXmm,
    /// xmm, r/m32 or r/m64
    XmmGpr,
    /// r32 or r64, xmm/m
    GprXmm,
    /// Two xmm operands, the result in RFLAGS
    Flags,
    /// xmm, xmm/m, implicit XMM0
    Implicit,
    /// PCMPxSTRx
    Strings,
}

/// An operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub shape: Shape,
    /// Bytes of a memory operand.
    pub size: u8,
    /// The memory operand must be aligned to 16 bytes.
    pub align: bool,
    /// It reads and writes MXCSR.
    pub fp: bool,
    /// It has an immediate byte.
    pub imm: bool,
    /// Number of routines: immediates, or 2 for REX.W = 0 and 1.
    pub variants: u16,
    pub feature: Feature,
}

const BASE: Op = Op {
    shape: Shape::Xmm,
    size: 16,
    align: true,
    fp: false,
    imm: false,
    variants: 1,
    feature: Feature::Sse2,
};
const X: Op = BASE;
const FP: Op = Op { fp: true, ..BASE };
const SS: Op = Op { fp: true, size: 4, align: false, ..BASE };
const SD: Op = Op { fp: true, size: 8, align: false, ..BASE };
const M: Op = Op { shape: Shape::Mmx, size: 8, align: false, ..BASE };

const fn imm(op: Op, variants: u16) -> Op {
    Op { imm: true, variants, ..op }
}
const fn feature(op: Op, feature: Feature) -> Op {
    Op { feature, ..op }
}
const fn small(op: Op, size: u8) -> Op {
    Op { size, align: false, ..op }
}

/// The operation of an opcode, if a host routine computes it.
pub(super) fn lookup(map: Map, prefix: Prefix, opcode: u8) -> Option<Op> {
    match map {
        Map::M0F => lookup_0f(prefix, opcode),
        Map::M0F38 => lookup_0f38(prefix, opcode),
        Map::M0F3A => lookup_0f3a(prefix, opcode),
        Map::X87 => None,
    }
}

fn lookup_0f(prefix: Prefix, opcode: u8) -> Option<Op> {
    use Prefix::{None as NP, F2, F3, P66};
    Some(match (opcode, prefix) {
        (0x14 | 0x15, NP | P66) => X,
        (0x2A, NP | P66) => Op { shape: Shape::XmmMmx, ..SD },
        (0x2A, F3 | F2) => Op { shape: Shape::XmmGpr, variants: 2, ..SD },
        (0x2C | 0x2D, NP) => Op { shape: Shape::MmxXmm, ..SD },
        (0x2C | 0x2D, P66) => Op { shape: Shape::MmxXmm, ..FP },
        (0x2C | 0x2D, F3) => Op { shape: Shape::GprXmm, variants: 2, ..SS },
        (0x2C | 0x2D, F2) => Op { shape: Shape::GprXmm, variants: 2, ..SD },
        (0x2E | 0x2F, NP) => Op { shape: Shape::Flags, ..SS },
        (0x2E | 0x2F, P66) => Op { shape: Shape::Flags, ..SD },
        (0x51 | 0x58 | 0x59 | 0x5C..=0x5F, NP | P66) => FP,
        (0x51 | 0x58 | 0x59 | 0x5C..=0x5F, F3) => SS,
        (0x51 | 0x58 | 0x59 | 0x5C..=0x5F, F2) => SD,
        (0x54..=0x57, NP | P66) => X,
        (0x5A, NP) => SD,
        (0x5A, P66) => FP,
        (0x5A, F3) => SS,
        (0x5A, F2) => SD,
        (0x5B, NP | P66 | F3) => FP,
        (0x60..=0x62, NP) => small(M, 4),
        (0x63..=0x6B, NP) => M,
        (0x60..=0x6D, P66) => X,
        (0x70, NP) => imm(M, 256),
        (0x70, _) => imm(X, 256),
        (0x74..=0x76, NP) => M,
        (0x74..=0x76, P66) => X,
        (0x7C | 0x7D | 0xD0, P66 | F2) => feature(FP, Feature::Sse3),
        (0xC2, NP | P66) => imm(FP, 8),
        (0xC2, F3) => imm(SS, 8),
        (0xC2, F2) => imm(SD, 8),
        (0xC6, NP | P66) => imm(X, 256),
        (0xD1..=0xD5 | 0xD8..=0xE5 | 0xE8..=0xEF | 0xF1..=0xF6 | 0xF8..=0xFE, NP) => M,
        (0xD1..=0xD5 | 0xD8..=0xE5 | 0xE8..=0xEF | 0xF1..=0xF6 | 0xF8..=0xFE, P66) => X,
        (0xE6, P66 | F2) => FP,
        (0xE6, F3) => SD,
        _ => return None,
    })
}

fn lookup_0f38(prefix: Prefix, opcode: u8) -> Option<Op> {
    use Prefix::{None as NP, P66};
    let sse41 = feature(X, Feature::Sse41);
    Some(match (opcode, prefix) {
        (0x00..=0x0B | 0x1C..=0x1E, NP) => feature(M, Feature::Ssse3),
        (0x00..=0x0B | 0x1C..=0x1E, P66) => feature(X, Feature::Ssse3),
        (0x10 | 0x14 | 0x15, P66) => Op { shape: Shape::Implicit, ..sse41 },
        (0x17, P66) => Op { shape: Shape::Flags, ..sse41 },
        (0x20 | 0x23 | 0x25 | 0x30 | 0x33 | 0x35, P66) => small(sse41, 8),
        (0x21 | 0x24 | 0x31 | 0x34, P66) => small(sse41, 4),
        (0x22 | 0x32, P66) => small(sse41, 2),
        (0x28 | 0x29 | 0x2B | 0x38..=0x41, P66) => sse41,
        (0x37, P66) => feature(X, Feature::Sse42),
        (0xC8..=0xCA | 0xCC | 0xCD, NP) => feature(X, Feature::Sha),
        (0xCB, NP) => Op { shape: Shape::Implicit, ..feature(X, Feature::Sha) },
        (0xDB..=0xDF, P66) => feature(X, Feature::Aes),
        _ => return None,
    })
}

fn lookup_0f3a(prefix: Prefix, opcode: u8) -> Option<Op> {
    use Prefix::{None as NP, P66};
    let sse41 = feature(X, Feature::Sse41);
    Some(match (opcode, prefix) {
        (0x08 | 0x09, P66) => imm(feature(FP, Feature::Sse41), 16),
        (0x0A, P66) => imm(feature(SS, Feature::Sse41), 16),
        (0x0B, P66) => imm(feature(SD, Feature::Sse41), 16),
        (0x0C..=0x0E | 0x42, P66) => imm(sse41, 256),
        (0x0F, NP) => imm(feature(M, Feature::Ssse3), 256),
        (0x0F, P66) => imm(feature(X, Feature::Ssse3), 256),
        (0x21, P66) => imm(small(sse41, 4), 256),
        (0x40 | 0x41, P66) => imm(feature(FP, Feature::Sse41), 256),
        (0x44, P66) => imm(feature(X, Feature::Pclmul), 256),
        (0x60..=0x63, P66) => {
            imm(Op { shape: Shape::Strings, align: false, ..feature(X, Feature::Sse42) }, 256)
        }
        (0xCC, NP) => imm(feature(X, Feature::Sha), 256),
        (0xDF, P66) => imm(feature(X, Feature::Aes), 256),
        _ => return None,
    })
}

/// x87 operations (opcode, ModRM) that host routines compute; register forms name ST(1). Popping
/// forms are done as the non-popping one where that exists.
pub(super) fn x87_native() -> Vec<(u8, u8)> {
    let mut list = Vec::new();
    for reg in 0..8u8 {
        // Arithmetic and compares with ST(1), m32, m64, m32int, m16int.
        for opcode in [0xD8, 0xDA, 0xDC, 0xDE] {
            list.push((opcode, reg << 3));
        }
        list.push((0xD8, 0xC1 | reg << 3));
        list.push((0xDC, 0xC1 | reg << 3));
    }
    // FLD/FST m32, m64; FILD/FIST/FISTTP m16, m32, m64; FBSTP.
    for (opcode, regs) in
        [(0xD9u8, &[0u8, 2][..]), (0xDD, &[0, 1, 2]), (0xDB, &[0, 1, 2]), (0xDF, &[0, 1, 2, 5, 6, 7])]
    {
        list.extend(regs.iter().map(|r| (opcode, r << 3)));
    }
    // FUCOM ST(1) (DD E1), FTST, FXTRACT, FPREM1, FPREM, FSQRT, FRNDINT, FSCALE.
    list.extend([
        (0xDD, 0xE1),
        (0xD9, 0xE4),
        (0xD9, 0xF4),
        (0xD9, 0xF5),
        (0xD9, 0xF8),
        (0xD9, 0xFA),
        (0xD9, 0xFC),
        (0xD9, 0xFD),
    ]);
    list
}

/// Memory forms that push.
pub(super) fn x87_is_load(opcode: u8, reg: u8) -> bool {
    matches!((opcode, reg), (0xD9 | 0xDD | 0xDB | 0xDF, 0) | (0xDF, 5))
}

/// Memory forms that write memory.
pub(super) fn x87_is_store(opcode: u8, reg: u8) -> bool {
    matches!((opcode, reg), (0xD9, 2) | (0xDD | 0xDB | 0xDF, 1 | 2) | (0xDF, 6 | 7))
}
