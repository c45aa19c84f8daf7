//! Tiny routines in host machine code, one for each SSE or MMX operation: load the operands, run the
//! operation itself, store the result. ftvm emulates x86 on x86, so whatever the architecture fixes
//! is computed by the host's own instruction, bit for bit. What it leaves open is never taken from here.

use std::sync::OnceLock;

use super::table::{self, Op, Shape};
use super::{Map, Prefix};

/// Bytes reserved for each routine.
const STRIDE: usize = 64;

/// A routine: (destination image, source image, context). What the context is depends on the shape:
/// `[mxcsr in/out, scratch]` for floating point, XMM0 for implicit operands, `[rax, rdx]` for PCMPESTRx.
pub(super) type Routine = unsafe extern "sysv64" fn(*mut u8, *mut u8, *mut u8) -> u64;

/// The executable mapping with all routines of operations that this host knows.
pub(super) struct Routines {
    base: *const u8,
    /// Offset in units of [`STRIDE`] plus one; zero: none.
    index: Box<[u32]>,
    x87: [u32; 8 * 64],
}

// SAFETY: the mapping is never written or unmapped after `build`.
unsafe impl Send for Routines {}
// SAFETY: as above; the routines themselves work on their arguments only.
unsafe impl Sync for Routines {}

pub(super) fn slot(map: Map, prefix: Prefix, opcode: u8) -> usize {
    ((map as usize & 3) << 10) | ((prefix as usize) << 8) | opcode as usize
}

impl Routines {
    /// The routine of an operation; `variant` is the immediate or REX.W. The operation must be one
    /// that [`has`](Self::has) confirmed.
    #[inline]
    pub fn get(&self, map: Map, prefix: Prefix, opcode: u8, variant: usize) -> Option<Routine> {
        let at = self.index[slot(map, prefix, opcode)] as usize;
        if at == 0 {
            return None;
        }
        // SAFETY: build() laid `variants` routines of STRIDE bytes from this offset on, and callers
        // pass a variant below that count.
        Some(unsafe { std::mem::transmute::<*const u8, Routine>(self.base.add((at - 1 + variant) * STRIDE)) })
    }

    /// The routine of an x87 operation: opcode byte (D8..DF), ModRM.reg, and whether it is the memory form.
    #[inline]
    pub fn x87(&self, opcode: u8, modrm: u8) -> Option<Routine> {
        let at = self.x87[x87_slot(opcode, modrm)] as usize;
        if at == 0 {
            return None;
        }
        // SAFETY: build() laid a routine at this offset.
        Some(unsafe { std::mem::transmute::<*const u8, Routine>(self.base.add((at - 1) * STRIDE)) })
    }

    pub fn has(&self, map: Map, prefix: Prefix, opcode: u8) -> bool {
        self.index[slot(map, prefix, opcode)] != 0
    }
}

/// Memory forms use slots 0..8 (by /reg), register forms 8..64: reg and, for the D9/DA groups
/// without operand, the rm field.
fn x87_slot(opcode: u8, modrm: u8) -> usize {
    let reg = (modrm >> 3 & 7) as usize;
    let op = (opcode & 7) as usize * 64;
    if modrm < 0xC0 {
        op + reg
    } else if opcode == 0xD9 && reg >= 4 {
        op + 16 + (reg - 4) * 8 + (modrm & 7) as usize
    } else {
        op + 8 + reg
    }
}

/// All routines, made on first use; `None` when the host refuses an executable mapping.
pub(super) fn routines() -> Option<&'static Routines> {
    static ROUTINES: OnceLock<Option<Routines>> = OnceLock::new();
    ROUTINES.get_or_init(build).as_ref()
}

fn build() -> Option<Routines> {
    let mut code: Vec<u8> = Vec::new();
    let mut index = vec![0u32; 4 * 1024].into_boxed_slice();
    for map in [Map::M0F, Map::M0F38, Map::M0F3A] {
        for prefix in [Prefix::None, Prefix::P66, Prefix::F3, Prefix::F2] {
            for opcode in 0..=255u8 {
                let Some(op) = table::lookup(map, prefix, opcode) else { continue };
                if !super::host_supports(op.feature) {
                    continue;
                }
                index[slot(map, prefix, opcode)] = (code.len() / STRIDE) as u32 + 1;
                for variant in 0..op.variants {
                    let start = code.len();
                    emit(&mut code, map, prefix, opcode, &op, variant);
                    debug_assert!(code.len() - start <= STRIDE);
                    code.resize(start + STRIDE, 0xCC);
                }
            }
        }
    }
    let mut x87 = [0u32; 8 * 64];
    for (opcode, modrm) in table::x87_native() {
        x87[x87_slot(opcode, modrm)] = (code.len() / STRIDE) as u32 + 1;
        let start = code.len();
        emit_x87(&mut code, opcode, modrm);
        debug_assert!(code.len() - start <= STRIDE);
        code.resize(start + STRIDE, 0xCC);
    }
    let len = code.len().next_multiple_of(4096);
    // SAFETY: a fresh private anonymous mapping, filled before it becomes executable.
    let base = unsafe {
        let p = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if p == libc::MAP_FAILED {
            return None;
        }
        std::ptr::copy_nonoverlapping(code.as_ptr(), p.cast::<u8>(), code.len());
        if libc::mprotect(p, len, libc::PROT_READ | libc::PROT_EXEC) != 0 {
            libc::munmap(p, len);
            return None;
        }
        p.cast::<u8>().cast_const()
    };
    Some(Routines { base, index, x87 })
}

// Arguments arrive in rdi (destination), rsi (source), rdx (context).
const LOAD_X0_DST: &[u8] = &[0xF3, 0x0F, 0x6F, 0x07];
const LOAD_X1_DST: &[u8] = &[0xF3, 0x0F, 0x6F, 0x0F];
const LOAD_X1_SRC: &[u8] = &[0xF3, 0x0F, 0x6F, 0x0E];
const LOAD_X2_SRC: &[u8] = &[0xF3, 0x0F, 0x6F, 0x16];
const LOAD_X0_CTX: &[u8] = &[0xF3, 0x0F, 0x6F, 0x02];
const STORE_X0_DST: &[u8] = &[0xF3, 0x0F, 0x7F, 0x07];
const STORE_X1_DST: &[u8] = &[0xF3, 0x0F, 0x7F, 0x0F];
const LOAD_M0_DST: &[u8] = &[0x0F, 0x6F, 0x07];
const LOAD_M1_SRC: &[u8] = &[0x0F, 0x6F, 0x0E];
const STORE_M0_DST: &[u8] = &[0x0F, 0x7F, 0x07];
const EMMS: &[u8] = &[0x0F, 0x77];
/// stmxcsr [rdx+4]; ldmxcsr [rdx]
const FP_ENTER: &[u8] = &[0x0F, 0xAE, 0x5A, 0x04, 0x0F, 0xAE, 0x12];
/// stmxcsr [rdx]; ldmxcsr [rdx+4]
const FP_LEAVE: &[u8] = &[0x0F, 0xAE, 0x1A, 0x0F, 0xAE, 0x52, 0x04];
/// pushfq; pop rax
const FLAGS_TO_RAX: &[u8] = &[0x9C, 0x58];

fn emit(code: &mut Vec<u8>, map: Map, prefix: Prefix, opcode: u8, op: &Op, variant: u16) {
    let wide = matches!(op.shape, Shape::XmmGpr | Shape::GprXmm) && variant == 1;
    let insn = |code: &mut Vec<u8>, modrm: u8| {
        match prefix {
            Prefix::None => {}
            Prefix::P66 => code.push(0x66),
            Prefix::F3 => code.push(0xF3),
            Prefix::F2 => code.push(0xF2),
        }
        if wide {
            code.push(0x48);
        }
        code.push(0x0F);
        match map {
            Map::M0F38 => code.push(0x38),
            Map::M0F3A => code.push(0x3A),
            _ => {}
        }
        code.extend([opcode, modrm]);
        if op.imm {
            code.push(variant as u8);
        }
    };
    let fp = op.fp;
    if fp {
        code.extend(FP_ENTER);
    }
    match op.shape {
        Shape::Xmm => {
            code.extend(LOAD_X0_DST);
            code.extend(LOAD_X1_SRC);
            insn(code, 0xC1);
            code.extend(STORE_X0_DST);
        }
        Shape::Mmx => {
            code.extend(LOAD_M0_DST);
            code.extend(LOAD_M1_SRC);
            insn(code, 0xC1);
            code.extend(STORE_M0_DST);
            code.extend(EMMS);
        }
        Shape::XmmMmx => {
            code.extend(LOAD_X0_DST);
            code.extend(LOAD_M1_SRC);
            insn(code, 0xC1);
            code.extend(STORE_X0_DST);
            code.extend(EMMS);
        }
        Shape::MmxXmm => {
            code.extend(LOAD_X1_SRC);
            insn(code, 0xC1);
            code.extend(STORE_M0_DST);
            code.extend(EMMS);
        }
        Shape::XmmGpr => {
            code.extend(LOAD_X0_DST);
            code.extend([0x48, 0x8B, 0x06]); // mov rax, [rsi]
            insn(code, 0xC0);
            code.extend(STORE_X0_DST);
        }
        Shape::GprXmm => {
            code.extend(LOAD_X1_SRC);
            insn(code, 0xC1);
        }
        Shape::Flags => {
            code.extend(LOAD_X0_DST);
            code.extend(LOAD_X1_SRC);
            insn(code, 0xC1);
            code.extend(FLAGS_TO_RAX);
        }
        Shape::Implicit => {
            code.extend(LOAD_X0_CTX);
            code.extend(LOAD_X1_DST);
            code.extend(LOAD_X2_SRC);
            insn(code, 0xCA);
            code.extend(STORE_X1_DST);
        }
        Shape::Strings => {
            code.extend([0x49, 0x89, 0xD0]); // mov r8, rdx
            code.extend(LOAD_X1_DST);
            code.extend(LOAD_X2_SRC);
            code.extend([0x49, 0x8B, 0x00]); // mov rax, [r8]
            code.extend([0x49, 0x8B, 0x50, 0x08]); // mov rdx, [r8+8]
            insn(code, 0xCA);
            code.extend([0x9C, 0x41, 0x8F, 0x00]); // pushfq; pop [r8]
            code.extend([0x49, 0x89, 0x48, 0x08]); // mov [r8+8], rcx
            code.extend(STORE_X0_DST);
        }
    }
    if fp {
        code.extend(FP_LEAVE);
    }
    code.push(0xC3);
}

/// x87 routines run under the guest's own control word: x87 exceptions are reported only by the
/// next waiting instruction, so an unmasked one shows in the status word and is cleared in time.
/// rdi: ST(0); rsi: ST(1) or the memory operand; rdx: control word in, status word out (at +2).
fn emit_x87(code: &mut Vec<u8>, opcode: u8, modrm: u8) {
    let memory = modrm < 0xC0;
    // FLD-like memory forms (D9 /0, DD /0, the FILDs, FBLD) push onto an empty stack.
    // Flags that host code may have left in the status word must not reach the guest's.
    code.extend([0xDB, 0xE3]); // fninit
    let load = memory && table::x87_is_load(opcode, modrm >> 3 & 7);
    if !memory {
        code.extend([0xDB, 0x2E]); // fld tbyte [rsi]
    }
    if !load {
        code.extend([0xDB, 0x2F]); // fld tbyte [rdi]
    }
    code.extend([0xD9, 0x2A]); // fldcw [rdx]
    code.extend([opcode, if memory { modrm & 0x38 | 6 } else { modrm }]);
    code.extend([0xDD, 0x7A, 0x02]); // fnstsw [rdx+2]
    code.extend([0xDB, 0xE2]); // fnclex
    code.extend([0x66, 0xC7, 0x02, 0x7F, 0x03]); // mov word [rdx], 0x37F
    code.extend([0xD9, 0x2A]); // fldcw [rdx]
    if !memory || !table::x87_is_store(opcode, modrm >> 3 & 7) {
        code.extend([0xDB, 0x3F]); // fstp tbyte [rdi]
        if !memory {
            code.extend([0xDB, 0x3E]); // fstp tbyte [rsi]
        }
    }
    code.extend([0xDB, 0xE3]); // fninit
    code.push(0xC3);
}
