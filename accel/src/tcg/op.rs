//! Decoded instructions, blocks of them, and access to general registers by width.

use super::decode::FLAT32;
use super::large::Kept;
use super::SoftCpu;
use crate::simd::VecInsn;
use crate::Exception;
use std::cell::Cell;

/// An exception was raised; its details are in [`SoftCpu::fault`].
#[derive(Clone, Copy, Debug)]
pub struct Fault;
/// What handlers return. One register wide, which an `Exception` is not.
pub type R<T> = Result<T, Fault>;
/// Executes one decoded instruction.
pub type Handler = fn(&mut SoftCpu, &Op) -> R<()>;
/// Executes one vector or x87 instruction.
pub type VecHandler = fn(&mut SoftCpu, &VecInsn) -> Result<(), Exception>;

/// `Op::kind`: the r/m operand is a register.
pub const K_REG: u8 = 0;
/// The r/m operand is memory in 64-bit mode, without segment base or 32-bit address size.
pub const K_FLAT: u8 = 1;
/// Memory with a segment base or limit, or a short address size.
pub const K_SEG: u8 = 2;

/// No register (reads as zero).
pub const NOREG: u8 = 16;
/// RIP at the start of the block.
pub const BLOCKIP: u8 = 17;
/// Slots behind the registers that compiled code uses (see `jit`): instructions left of the budget, flags,
/// the TLB and the table by linear address, the linear page that runs, RIP on the way out,
/// whether the host's vector registers hold the guest's (1 XMM, 2 YMM), the host's MXCSR,
/// two for `touch`, the table's keys for both halves of linear addresses (and short forms of both in one slot), the key that is looked for,
/// the site that asks, the code that was found, how often jumps asked in vain; between
/// them the host addresses of groups.
pub const LEFT: usize = 18;
pub const FLAGS: usize = 19;
pub const TLB: usize = 20;
pub const JUMP_TABLE: usize = 21;
pub const PAGE: usize = 22;
pub const RIP_OUT: usize = 24;
pub const XMM_LIVE: usize = 25;
pub const HOST_CSR: usize = 26;
pub const TOUCHED: usize = 31;
pub const LEVEL: usize = 40;
pub const KEY: usize = 41;
pub const WANTED: usize = 43;
pub const SITE: usize = 44;
pub const CODE_AT: usize = 45;
pub const ASKED: usize = 46;
pub const SHORT_KEYS: usize = 47;
/// Marks the high-byte registers AH, CH, DH, BH (numbers 0..3).
pub const HIGH: u8 = 0x80;

pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const FS: usize = 4;
pub const GS: usize = 5;

pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;

/// `Op::map`: `imm` points to a [`VecOp`].
pub const VECTOR: u8 = 0x40;

/// One decoded instruction.
#[derive(Clone, Copy)]
pub struct Op {
    pub f: Handler,
    pub imm: u64,
    pub disp: i64,
    pub base: u8,
    pub index: u8,
    pub scale: u8,
    pub seg: u8,
    /// ModRM.reg with REX.R, as a register number.
    pub reg: u8,
    /// ModRM.rm with REX.B where `kind` is `K_REG`.
    pub rm: u8,
    pub kind: u8,
    /// Operand size in bytes.
    pub osz: u8,
    /// Address size in bytes.
    pub asz: u8,
    /// 0, 0xF2 or 0xF3.
    pub rep: u8,
    /// Opcode map: 0 one-byte, 1 0F, 2 0F38, 3 0F3A, 4 and up VEX; or [`VECTOR`].
    pub map: u8,
    /// Number within the block.
    pub idx: u8,
    /// First byte, relative to the block's start.
    pub off: u16,
    pub len: u8,
    pub opcode: u8,
}

/// A vector instruction's own description, which `Op::imm` points to.
pub struct VecOp {
    pub insn: VecInsn,
    pub f: VecHandler,
}

/// Straight-line decoded code: the unit of caching and of compilation. (What finding it again looks at comes first.)
#[repr(C, align(64))]
pub struct Block {
    /// Guest physical address of the first byte, with the code mode in the top bits; 0: a lone one.
    pub key: u64,
    /// Compiled code, or null.
    pub code: Cell<*const u8>,
    /// Instructions of that code, which may run on into other blocks.
    pub code_count: Cell<u32>,
    /// The half of linear addresses that the code is for.
    pub half: Cell<u8>,
    /// Instructions, once complete.
    pub count: u32,
    /// How often it was interpreted; `NEVER` and `WATCHED`: it is not to be compiled.
    pub runs: Cell<u32>,
    pub bytes: u32,
    /// Where the table by linear address has it, or had it.
    pub places: Cell<Places>,
    /// The guest physical page that its only instruction runs on into (see `cache::CROSSING`).
    pub second: u64,
    /// Its instructions, which lie behind it.
    ops: *const Op,
    /// Where execution went on from here (64-bit mode).
    pub links: [Cell<Link>; 2],
    /// Owns what the vector ops' `imm` points to.
    pub vecs: Box<[Box<VecOp>]>,
}

// What is looked at to interpret it is one line, and its instructions follow after the next.
const _: () = assert!(size_of::<Block>() == 128);

impl Block {
    /// The instructions of a block that is about to be looked at may be wanted at the same time: cold ones are in none of the
    /// host's caches.
    #[inline(always)]
    pub fn fetch_ahead(block: *const Block) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let ops = block.wrapping_add(1).cast::<i8>();
        // SAFETY: a hint, which may name any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ops);
            _mm_prefetch::<_MM_HINT_T0>(ops.wrapping_add(64));
        }
    }
}

/// Sets of the table by linear address.
#[derive(Clone, Copy, Default)]
pub struct Places {
    pub sets: [u16; 4],
    /// How many; more than there is room for: not all are known.
    pub count: u8,
}

/// See [`Block::runs`].
pub const NEVER: u32 = u32::MAX;
/// The same, and a debugger may want to stop before it (see `points`).
pub const WATCHED: u32 = u32::MAX - 1;

/// A block that followed another: it still does for the same RIP while the key (see `Jump`) is the same.
#[derive(Clone, Copy)]
pub struct Link {
    pub rip: u64,
    pub key: u64,
    pub block: *const Block,
}

impl Link {
    const NONE: Link = Link { rip: 0, key: u64::MAX, block: std::ptr::null() };
}

impl Block {
    /// An empty block.
    pub fn new(key: u64) -> Self {
        let links = [Cell::new(Link::NONE), Cell::new(Link::NONE)];
        Block {
            key,
            bytes: 0,
            ops: std::ptr::NonNull::dangling().as_ptr(),
            vecs: Box::default(),
            second: 0,
            places: Cell::default(),
            links,
            code: Cell::new(std::ptr::null()),
            code_count: Cell::new(0),
            half: Cell::new(0),
            count: 0,
            runs: Cell::new(0),
        }
    }

    /// It is [`FLAT32`] code.
    pub fn is_flat32(&self) -> bool {
        self.key >> 60 == FLAT32 as u64
    }

    /// Forget what followed.
    pub fn unlink(&self) {
        self.links.iter().for_each(|l| l.set(Link::NONE));
    }

    /// It is complete with these instructions.
    pub fn finish(mut self, ops: &[Op]) -> Kept<Block> {
        self.count = ops.len() as u32;
        Kept::with(self, ops, |b, ops| b.ops = ops)
    }

    /// Its instructions.
    #[inline(always)]
    pub fn ops(&self) -> &[Op] {
        // SAFETY: a block with a count was made by `finish`, which put so many there for as long as it is kept.
        unsafe { std::slice::from_raw_parts(self.ops, self.count as usize) }
    }
}

/// Operand widths.
pub trait Int: Copy + Eq + 'static {
    const BITS: u32;
    const BYTES: u64;
    const MASK: u64;
    fn from64(v: u64) -> Self;
    fn to64(self) -> u64;
    /// Sign-extended to 64 bits.
    fn sx(v: u64) -> u64;
}

macro_rules! int {
    ($t:ty, $s:ty) => {
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            const BYTES: u64 = (<$t>::BITS / 8) as u64;
            const MASK: u64 = <$t>::MAX as u64;
            #[inline(always)]
            fn from64(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sx(v: u64) -> u64 {
                v as $s as i64 as u64
            }
        }
    };
}
int!(u8, i8);
int!(u16, i16);
int!(u32, i32);
int!(u64, i64);

impl SoftCpu {
    /// Read a general register at width `T`, zero-extended.
    #[inline(always)]
    pub(crate) fn get<T: Int>(&self, r: u8) -> u64 {
        if T::BITS == 8 {
            let v = self.st.gpr[(r & 31) as usize];
            if r & HIGH != 0 {
                v >> 8 & 0xFF
            } else {
                v & 0xFF
            }
        } else {
            self.st.gpr[(r & 31) as usize] & T::MASK
        }
    }

    /// Write a general register at width `T` (32 bits clear the upper half).
    #[inline(always)]
    pub(crate) fn set<T: Int>(&mut self, r: u8, v: u64) {
        let slot = &mut self.st.gpr[(r & 31) as usize];
        match T::BITS {
            8 => {
                if r & HIGH != 0 {
                    *slot = *slot & !0xFF00 | (v & 0xFF) << 8;
                } else {
                    *slot = *slot & !0xFF | v & 0xFF;
                }
            }
            16 => *slot = *slot & !0xFFFF | v & 0xFFFF,
            32 => *slot = v & 0xFFFF_FFFF,
            _ => *slot = v,
        }
    }

    /// Write a general register with a width known at run time.
    pub(crate) fn set_sz(&mut self, r: u8, size: u8, v: u64) {
        match size {
            1 => self.set::<u8>(r, v),
            2 => self.set::<u16>(r, v),
            4 => self.set::<u32>(r, v),
            _ => self.set::<u64>(r, v),
        }
    }

    /// Read a general register with a width known at run time.
    pub(crate) fn get_sz(&self, r: u8, size: u8) -> u64 {
        match size {
            1 => self.get::<u8>(r),
            2 => self.get::<u16>(r),
            4 => self.get::<u32>(r),
            _ => self.get::<u64>(r),
        }
    }
}

/// Picks the instance of a generic handler by operand size.
#[macro_export]
#[doc(hidden)]
macro_rules! by_size {
    ($sz:expr, $($f:tt)+) => {
        match $sz {
            1 => $($f)+::<u8> as $crate::tcg::op::Handler,
            2 => $($f)+::<u16> as $crate::tcg::op::Handler,
            4 => $($f)+::<u32> as $crate::tcg::op::Handler,
            _ => $($f)+::<u64> as $crate::tcg::op::Handler,
        }
    };
}
