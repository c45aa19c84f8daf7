//! VEX-coded operations as the host's own instructions: which there are, and a routine in machine code for each,
//! made when the decoder first meets it. A routine loads its operands from a [`Frame`], runs the one instruction, and
//! stores the result; nothing else of the host is seen.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use super::{host_supports, Feature, Map, Prefix, Rm, VecInsn};

/// Where operands come from and the result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// ModRM.reg = vvvv op r/m
    Rvm,
    /// ModRM.reg = op r/m
    Rm,
    /// r/m = op ModRM.reg
    Mr,
    /// vvvv = op r/m (the shifts by an immediate)
    Vmi,
    /// As `Rvm`, with a fourth register in the immediate
    Rvmr,
    /// RFLAGS = ModRM.reg op r/m
    Flags,
    /// A general register = op r/m
    ToGpr,
    /// ModRM.reg = vvvv op a general register or memory
    FromGpr,
    /// A general register or memory = op ModRM.reg
    ExtractGpr,
    /// PCMPxSTRx
    Strings,
}

/// A routine's operands and results.
#[repr(C, align(32))]
#[derive(Default)]
pub(super) struct Frame {
    /// The destination, before and after.
    pub dst: [u8; 32],
    /// `vvvv` (`Flags` and `Strings`: ModRM.reg).
    pub a: [u8; 32],
    /// r/m (`Mr` and `ExtractGpr`: ModRM.reg).
    pub b: [u8; 32],
    /// The fourth register.
    pub d: [u8; 32],
    /// MXCSR to run under; afterwards with the sticky flags.
    pub mxcsr: u32,
    saved: u32,
    /// A general source; `Strings`: RAX and RDX, afterwards RFLAGS and RCX.
    pub general: [u64; 2],
}

/// A routine and how it is used.
#[derive(Clone, Copy, Debug)]
pub struct Prepared {
    code: unsafe extern "sysv64" fn(*mut Frame) -> u64,
    pub(super) form: Form,
    /// Bytes of a memory operand.
    pub(super) size: u8,
    /// It reads and writes MXCSR.
    pub(super) fp: bool,
}

impl Prepared {
    /// Run it; what it left in RAX.
    pub(super) fn run(&self, frame: &mut Frame) -> u64 {
        // SAFETY: the routine was made by `emit` for this host, whose features `lookup` checked; it touches the frame,
        // caller-saved registers and its own stack slot only, and restores MXCSR.
        unsafe { (self.code)(frame) }
    }
}

/// Which vector lengths an operation has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    /// 128 and 256 bits
    Any,
    Short,
    Long,
    /// A scalar: the bit is ignored.
    Ignored,
}

/// What VEX.W must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wide {
    Ignored,
    Zero,
    One,
    /// It chooses between two operations.
    Chooses,
}

/// Bytes of a memory operand.
#[derive(Clone, Copy)]
enum Size {
    /// The vector, or a half, quarter, eighth of it.
    Part(u8),
    Fixed(u8),
    /// 4, or 8 with W.
    ByW,
}

#[derive(Clone, Copy)]
struct Op {
    form: Form,
    size: Size,
    length: Length,
    wide: Wide,
    fp: bool,
    imm: bool,
    /// No memory form.
    registers_only: bool,
    feature: Feature,
}

const V: Op = Op {
    form: Form::Rvm,
    size: Size::Part(1),
    length: Length::Any,
    wide: Wide::Ignored,
    fp: false,
    imm: false,
    registers_only: false,
    feature: Feature::Avx,
};
/// Integer operations, whose 256-bit forms are AVX2's.
const I: Op = Op { feature: Feature::Avx2, ..V };
const FP: Op = Op { fp: true, ..V };
const SS: Op = Op { size: Size::Fixed(4), length: Length::Ignored, ..FP };
const SD: Op = Op { size: Size::Fixed(8), length: Length::Ignored, ..FP };
const I2: Op = Op { form: Form::Rm, ..I };
const V2: Op = Op { form: Form::Rm, ..V };
const FP2: Op = Op { form: Form::Rm, ..FP };
const W0: Op = Op { wide: Wide::Zero, ..V };
/// Moves across 128-bit lanes.
const CROSS: Op = Op { length: Length::Long, wide: Wide::Zero, feature: Feature::Avx2, ..V };
const SHORT: Op = Op { length: Length::Short, size: Size::Fixed(16), ..V };

const fn imm(op: Op) -> Op {
    Op { imm: true, ..op }
}
const fn part(op: Op, n: u8) -> Op {
    Op { size: Size::Part(n), ..op }
}
const fn fixed(op: Op, n: u8) -> Op {
    Op { size: Size::Fixed(n), ..op }
}
const fn two(op: Op) -> Op {
    Op { form: Form::Rm, ..op }
}

fn lookup_0f(insn: &VecInsn) -> Option<Op> {
    use Prefix::{None as NP, F2, F3, P66};
    let group = insn.modrm >> 3 & 7;
    Some(match (insn.opcode, insn.prefix) {
        (0x12, F3) | (0x16, F3) => V2,
        (0x12, F2) if insn.vex.is_some_and(|v| v.l) => V2,
        (0x12, F2) => fixed(V2, 8),
        (0x14 | 0x15, NP | P66) => V,
        (0x2A, F3 | F2) => Op { form: Form::FromGpr, size: Size::ByW, wide: Wide::Chooses, ..SS },
        (0x2C | 0x2D, F3) => Op { form: Form::ToGpr, wide: Wide::Chooses, ..SS },
        (0x2C | 0x2D, F2) => Op { form: Form::ToGpr, wide: Wide::Chooses, ..SD },
        (0x2E | 0x2F, NP) => Op { form: Form::Flags, ..SS },
        (0x2E | 0x2F, P66) => Op { form: Form::Flags, ..SD },
        (0x50, NP | P66) => Op { form: Form::ToGpr, registers_only: true, ..V },
        (0x51, NP | P66) => FP2,
        (0x54..=0x57, NP | P66) => V,
        (0x58 | 0x59 | 0x5C..=0x5F, NP | P66) => FP,
        (0x51 | 0x58 | 0x59 | 0x5A | 0x5C..=0x5F, F3) => SS,
        (0x51 | 0x58 | 0x59 | 0x5A | 0x5C..=0x5F, F2) => SD,
        (0x5A, NP) => part(FP2, 2),
        (0x5A, P66) => FP2,
        (0x5B, NP | P66 | F3) => FP2,
        (0x60..=0x6D | 0x74..=0x76, P66) => I,
        (0x70, P66 | F3 | F2) => imm(I2),
        (0x71 | 0x72, P66) if matches!(group, 2 | 4 | 6) => {
            imm(Op { form: Form::Vmi, registers_only: true, ..I })
        }
        (0x73, P66) if matches!(group, 2 | 3 | 6 | 7) => {
            imm(Op { form: Form::Vmi, registers_only: true, ..I })
        }
        (0x7C | 0x7D | 0xD0, P66 | F2) => FP,
        (0xC2, NP | P66) => imm(FP),
        (0xC2, F3) => imm(SS),
        (0xC2, F2) => imm(SD),
        (0xC4, P66) => imm(Op { form: Form::FromGpr, ..fixed(SHORT, 2) }),
        (0xC5, P66) => imm(Op { form: Form::ToGpr, registers_only: true, ..SHORT }),
        (0xC6, NP | P66) => imm(V),
        (0xD1..=0xD3 | 0xE1 | 0xE2 | 0xF1..=0xF3, P66) => fixed(I, 16),
        (0xD4 | 0xD5 | 0xD8..=0xE0 | 0xE3..=0xE5 | 0xE8..=0xEF | 0xF4..=0xF6 | 0xF8..=0xFE, P66) => I,
        (0xD7, P66) => Op { form: Form::ToGpr, registers_only: true, ..I },
        (0xE6, F3) => part(FP2, 2),
        (0xE6, P66 | F2) => FP2,
        _ => return None,
    })
}

fn lookup_0f38(insn: &VecInsn) -> Option<Op> {
    if insn.prefix != Prefix::P66 {
        return None;
    }
    let fma = |scalar: bool| {
        let size = if scalar { Size::ByW } else { Size::Part(1) };
        let length = if scalar { Length::Ignored } else { Length::Any };
        Op { size, length, wide: Wide::Chooses, feature: Feature::Fma, ..FP }
    };
    let broadcast = |n| Op { wide: Wide::Zero, ..fixed(I2, n) };
    Some(match insn.opcode {
        0x00..=0x0B | 0x28 | 0x29 | 0x2B | 0x37..=0x40 => I,
        0x0C | 0x0D => W0,
        0x0E | 0x0F => Op { form: Form::Flags, ..W0 },
        0x13 => Op { wide: Wide::Zero, feature: Feature::F16c, ..part(FP2, 2) },
        0x16 | 0x36 => CROSS,
        0x17 => Op { form: Form::Flags, ..V },
        // From a register they are AVX2's.
        0x18 if insn.rm == Rm::Mem => fixed(two(W0), 4),
        0x18 => broadcast(4),
        0x19 if insn.rm == Rm::Mem => Op { length: Length::Long, ..fixed(two(W0), 8) },
        0x19 => Op { length: Length::Long, ..broadcast(8) },
        0x1C..=0x1E => I2,
        0x20 | 0x23 | 0x25 | 0x30 | 0x33 | 0x35 => part(I2, 2),
        0x21 | 0x24 | 0x31 | 0x34 => part(I2, 4),
        0x22 | 0x32 => part(I2, 8),
        0x41 => two(SHORT),
        0x45 | 0x47 => Op { wide: Wide::Chooses, feature: Feature::Avx2, length: Length::Any, ..I },
        0x46 => Op { wide: Wide::Zero, ..I },
        0x58 => broadcast(4),
        0x59 => broadcast(8),
        0x78 => broadcast(1),
        0x79 => broadcast(2),
        0x96..=0x98 | 0x9A | 0x9C | 0x9E => fma(false),
        0xA6..=0xA8 | 0xAA | 0xAC | 0xAE => fma(false),
        0xB6..=0xB8 | 0xBA | 0xBC | 0xBE => fma(false),
        0x99 | 0x9B | 0x9D | 0x9F | 0xA9 | 0xAB | 0xAD | 0xAF | 0xB9 | 0xBB | 0xBD | 0xBF => fma(true),
        0xDB => Op { feature: Feature::Aes, ..two(SHORT) },
        0xDC..=0xDF => Op { feature: Feature::Aes, ..SHORT },
        _ => return None,
    })
}

fn lookup_0f3a(insn: &VecInsn) -> Option<Op> {
    if insn.prefix != Prefix::P66 {
        return None;
    }
    let extract = |size| Op { form: Form::ExtractGpr, size, ..SHORT };
    Some(imm(match insn.opcode {
        0x00 | 0x01 => Op { wide: Wide::One, ..two(CROSS) },
        0x02 => Op { wide: Wide::Zero, ..I },
        0x04 | 0x05 => two(W0),
        0x06 => Op { feature: Feature::Avx, ..CROSS },
        0x08 | 0x09 => FP2,
        0x0A => SS,
        0x0B => SD,
        0x0C | 0x0D => V,
        0x0E | 0x0F | 0x42 => I,
        0x14 => extract(Size::Fixed(1)),
        0x15 => extract(Size::Fixed(2)),
        0x16 => Op { wide: Wide::Chooses, ..extract(Size::ByW) },
        0x17 => extract(Size::Fixed(4)),
        0x18 => Op { feature: Feature::Avx, ..fixed(CROSS, 16) },
        0x38 => fixed(CROSS, 16),
        0x19 => Op { form: Form::Mr, feature: Feature::Avx, ..fixed(CROSS, 16) },
        0x39 => Op { form: Form::Mr, ..fixed(CROSS, 16) },
        0x1D => Op { form: Form::Mr, wide: Wide::Zero, feature: Feature::F16c, ..part(FP, 2) },
        0x20 => Op { form: Form::FromGpr, ..fixed(SHORT, 1) },
        0x21 => fixed(SHORT, 4),
        0x22 => Op { form: Form::FromGpr, size: Size::ByW, wide: Wide::Chooses, ..SHORT },
        0x40 => FP,
        0x41 => Op { fp: true, ..SHORT },
        0x44 => Op { feature: Feature::Pclmul, ..SHORT },
        0x46 => CROSS,
        0x4A | 0x4B => Op { form: Form::Rvmr, ..W0 },
        0x4C => Op { form: Form::Rvmr, wide: Wide::Zero, ..I },
        0x60..=0x63 => Op { form: Form::Strings, wide: Wide::Chooses, ..SHORT },
        0xDF => Op { feature: Feature::Aes, ..two(SHORT) },
        _ => return None,
    }))
}

/// The routine of an instruction, if it is one of this module's, well formed, and the host has it.
pub(super) fn prepare(insn: &VecInsn) -> Option<Prepared> {
    let vex = insn.vex?;
    let op = match insn.map {
        Map::M0F => lookup_0f(insn),
        Map::M0F38 => lookup_0f38(insn),
        Map::M0F3A => lookup_0f3a(insn),
        Map::X87 => None,
    }?;
    let memory = insn.rm == Rm::Mem;
    if op.registers_only && memory {
        return None;
    }
    let long = match op.length {
        Length::Any => vex.l,
        Length::Short if vex.l => return None,
        Length::Long if !vex.l => return None,
        Length::Long => true,
        Length::Short | Length::Ignored => false,
    };
    // Outside 64-bit mode W does not choose a general register's width.
    let general = matches!(op.form, Form::FromGpr | Form::ToGpr | Form::ExtractGpr | Form::Strings);
    let w = insn.rex_w && (insn.long || !general);
    if insn.rex_w && !insn.long && matches!((insn.map, insn.opcode), (Map::M0F3A, 0x16 | 0x22)) {
        // VPINSRQ and VPEXTRQ are invalid there, not narrowed.
        return None;
    }
    let w = match op.wide {
        Wide::Ignored => false,
        Wide::Zero if insn.rex_w => return None,
        Wide::One if !insn.rex_w => return None,
        Wide::Zero => false,
        Wide::One => true,
        Wide::Chooses => w,
    };
    let uses_v = matches!(op.form, Form::Rvm | Form::Vmi | Form::Rvmr | Form::FromGpr);
    if !uses_v && vex.v != 0 {
        return None;
    }
    let feature = if op.feature == Feature::Avx2 && !vex.l && op.length == Length::Any && !avx2_only(insn) {
        Feature::Avx
    } else {
        op.feature
    };
    if !host_supports(Feature::Avx) || !host_supports(feature) {
        return None;
    }
    let imm = match op.form {
        Form::Rvmr => 0x30,
        // INSERTPS from memory has no source lane to choose.
        _ if insn.map == Map::M0F3A && insn.opcode == 0x21 && memory => insn.imm & 0x3F,
        _ => insn.imm,
    };
    let vector = if long { 32 } else { 16 };
    let size = match op.size {
        Size::Part(n) => vector / n,
        Size::Fixed(n) => n,
        Size::ByW => 4 << w as u8,
    };
    let key = Key {
        map: insn.map as u8,
        prefix: insn.prefix as u8,
        opcode: insn.opcode,
        group: if op.form == Form::Vmi { insn.modrm >> 3 & 7 } else { 0 },
        w,
        long,
        imm: op.imm.then_some(imm),
    };
    let code = routine(key, op.form, op.fp)?;
    Some(Prepared { code, form: op.form, size, fp: op.fp })
}

/// Operations that AVX2 brought for 128 bits too.
fn avx2_only(insn: &VecInsn) -> bool {
    match insn.map {
        Map::M0F38 => matches!(insn.opcode, 0x18 | 0x19 | 0x45..=0x47 | 0x58 | 0x59 | 0x78 | 0x79),
        Map::M0F3A => insn.opcode == 0x02,
        _ => false,
    }
}

/// What tells routines apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    map: u8,
    prefix: u8,
    opcode: u8,
    group: u8,
    w: bool,
    long: bool,
    imm: Option<u8>,
}

/// More than all routines there can be take.
const ARENA: usize = 16 << 20;

/// The routines made so far, in memory that is mapped twice: writable here, executable there.
struct Arena {
    write: *mut u8,
    execute: *const u8,
    used: usize,
    made: HashMap<Key, usize>,
}
// SAFETY: the mappings live as long as the program; writes happen under the lock that holds the arena.
unsafe impl Send for Arena {}

fn arena() -> Option<&'static Mutex<Arena>> {
    static ARENAS: OnceLock<Option<Mutex<Arena>>> = OnceLock::new();
    ARENAS
        .get_or_init(|| {
            // SAFETY: plain system calls on a descriptor of our own; the mappings are new.
            unsafe {
                let fd = libc::memfd_create(c"ftvm-vector".as_ptr(), libc::MFD_CLOEXEC);
                if fd < 0 || libc::ftruncate(fd, ARENA as i64) != 0 {
                    return None;
                }
                let map = |prot| libc::mmap(std::ptr::null_mut(), ARENA, prot, libc::MAP_SHARED, fd, 0);
                let write = map(libc::PROT_READ | libc::PROT_WRITE);
                let execute = map(libc::PROT_READ | libc::PROT_EXEC);
                libc::close(fd);
                if write == libc::MAP_FAILED || execute == libc::MAP_FAILED {
                    return None;
                }
                let (write, execute) = (write.cast(), execute.cast::<u8>().cast_const());
                Some(Mutex::new(Arena { write, execute, used: 0, made: HashMap::new() }))
            }
        })
        .as_ref()
}

fn routine(key: Key, form: Form, fp: bool) -> Option<unsafe extern "sysv64" fn(*mut Frame) -> u64> {
    let mut a = arena()?.lock().ok()?;
    let at = match a.made.get(&key) {
        Some(at) => *at,
        None => {
            let code = emit(&key, form, fp);
            let at = a.used;
            if at + code.len() > ARENA {
                return None;
            }
            // SAFETY: the bytes lie inside the mapping, behind every routine that was handed out.
            unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), a.write.add(at), code.len()) };
            a.used = (at + code.len()).next_multiple_of(16);
            a.made.insert(key, at);
            at
        }
    };
    // SAFETY: a routine of this signature starts at `at`, and the mapping stays.
    Some(unsafe {
        std::mem::transmute::<*const u8, unsafe extern "sysv64" fn(*mut Frame) -> u64>(a.execute.add(at))
    })
}

const DST: u8 = 0;
const A: u8 = 32;
const B: u8 = 64;
const D: u8 = 96;

/// vmovdqu ymm`reg`, [rdi + at] (or the store)
fn move_ymm(code: &mut Vec<u8>, opcode: u8, reg: u8, at: u8) {
    code.extend([0xC5, 0xFE, opcode, 0x87 | reg << 3, at, 0, 0, 0]);
}

/// MXCSR: store to [rdi + store], load from [rdi + load].
fn swap_mxcsr(code: &mut Vec<u8>, store: u8, load: u8) {
    code.extend([0xC5, 0xF8, 0xAE, 0x9F, store, 0, 0, 0, 0xC5, 0xF8, 0xAE, 0x97, load, 0, 0, 0]);
}

/// The frame comes in rdi. Registers: ymm0 destination, ymm1 `a`, ymm2 `b`, ymm3 `d`, rax the general one.
fn emit(key: &Key, form: Form, fp: bool) -> Vec<u8> {
    const MXCSR: u8 = 128;
    const SAVED: u8 = 132;
    const GENERAL: u8 = 136;
    const GENERAL2: u8 = 144;
    let mut c = Vec::with_capacity(128);
    if fp {
        swap_mxcsr(&mut c, SAVED, MXCSR);
    }
    for (reg, at) in [(0, DST), (1, A), (2, B), (3, D)] {
        move_ymm(&mut c, 0x6F, reg, at);
    }
    match form {
        Form::FromGpr => c.extend([0x48, 0x8B, 0x87, GENERAL, 0, 0, 0]), // mov rax, [rdi+GENERAL]
        Form::Strings => {
            c.extend([0x48, 0x8B, 0x87, GENERAL, 0, 0, 0]);
            c.extend([0x48, 0x8B, 0x97, GENERAL2, 0, 0, 0]); // mov rdx, [rdi+GENERAL2]
        }
        _ => {}
    }
    let (reg, v, rm) = match form {
        Form::Rvm | Form::Rvmr => (0, 1, 2),
        Form::Rm | Form::ToGpr => (0, 0, 2),
        Form::Mr | Form::ExtractGpr => (2, 0, 0),
        Form::Vmi => (key.group, 0, 2),
        Form::Flags | Form::Strings => (1, 0, 2),
        Form::FromGpr => (0, 1, 0),
    };
    let pp = match key.prefix {
        p if p == Prefix::P66 as u8 => 1,
        p if p == Prefix::F3 as u8 => 2,
        p if p == Prefix::F2 as u8 => 3,
        _ => 0,
    };
    // The two maps are numbered from 0 here and from 1 in the prefix.
    c.extend([0xC4, 0xE0 | (key.map + 1), (key.w as u8) << 7 | (!v & 15) << 3 | (key.long as u8) << 2 | pp]);
    c.extend([key.opcode, 0xC0 | reg << 3 | rm]);
    c.extend(key.imm);
    match form {
        Form::Flags => c.extend([0x9C, 0x58]), // pushfq; pop rax
        Form::Strings => {
            c.extend([0x9C, 0x58]);
            c.extend([0x48, 0x89, 0x87, GENERAL, 0, 0, 0]); // mov [rdi+GENERAL], rax
            c.extend([0x48, 0x89, 0x8F, GENERAL2, 0, 0, 0]); // mov [rdi+GENERAL2], rcx
        }
        _ => {}
    }
    move_ymm(&mut c, 0x7F, 0, DST);
    if fp {
        swap_mxcsr(&mut c, MXCSR, SAVED);
    }
    c.extend([0xC5, 0xF8, 0x77, 0xC3]); // vzeroupper; ret
    c
}
