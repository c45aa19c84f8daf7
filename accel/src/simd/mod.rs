//! x87, MMX, SSE to SSE4.2, AES, PCLMULQDQ, AVX, AVX2, FMA, F16C: everything that computes on floating-point and vector
//! registers, and FXSAVE/XSAVE images. The core decodes and hands over a [`VecInsn`].

mod approx;
mod avx;
mod avx_host;
mod dot;
mod fxsave;
mod host;
mod lanes;
mod moves;
mod native;
mod sse;
mod table;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_x87;
mod wide;
mod x87;
mod x87_env;
mod x87_math;

pub(crate) use avx::is_gather;
pub use avx::Vex;
pub use avx_host::Prepared;
pub(crate) use fxsave::components_in_use;
pub(crate) use native::{native, Form, Native};
pub use x87::wait as x87_wait;

use crate::fault::Exception;
use crate::state::CpuState;

/// Where an instruction's r/m operand lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rm {
    /// Register number 0..15 (REX.B applied; x87/MMX use the low three bits).
    Reg(u8),
    /// Memory: the core has computed the segmented effective address; offsets are relative to it.
    Mem,
}

/// The mandatory prefix that selects among SSE opcodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    None,
    P66,
    F3,
    F2,
}

/// Opcode map of a vector instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// 0F xx
    M0F,
    /// 0F 38 xx
    M0F38,
    /// 0F 3A xx
    M0F3A,
    /// D8..DF (x87); `opcode` is the whole byte.
    X87,
}

/// A decoded vector or x87 instruction.
#[derive(Clone, Copy, Debug)]
pub struct VecInsn {
    pub map: Map,
    pub prefix: Prefix,
    pub opcode: u8,
    pub modrm: u8,
    /// ModRM.reg with REX.R applied.
    pub reg: u8,
    pub rm: Rm,
    /// REX.W
    pub rex_w: bool,
    /// The processor executes 64-bit code (FXSAVE64 and FIP/FDP forms, 64-bit GPR operands).
    pub long: bool,
    /// Operand size 16 (for FLDENV, FSAVE and so on).
    pub opsize16: bool,
    pub imm: u8,
    /// The rest of a VEX prefix, if it has one.
    pub vex: Option<Vex>,
    /// The host routine that computes it ([`resolve`] fills it for VEX-coded ones).
    pub host: Option<Prepared>,
}

/// What vector and x87 instructions need of the processor core.
///
/// `read` and `write` access the instruction's memory operand at `offset` bytes past its effective
/// address with all segment, paging and privilege checks. `write` either stores all bytes or none.
/// Alignment checks of legacy SSE (16 bytes, #GP(0)) are asked for with `check_align`.
pub trait Core {
    fn state(&mut self) -> &mut CpuState;
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Exception>;
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), Exception>;
    /// Raise what `write` of `len` bytes would raise, and change nothing.
    fn check_write(&mut self, offset: u64, len: usize) -> Result<(), Exception> {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..len.min(16)];
        self.read(offset, bytes).map_err(|e| match (e.vector, e.error) {
            (14, Some(error)) => Exception::page_fault(error | 2, e.cr2),
            _ => e,
        })?;
        self.write(offset, bytes)
    }
    /// #GP(0) unless the operand's linear address is a multiple of `align`.
    fn check_align(&mut self, align: u64) -> Result<(), Exception>;
    /// RFLAGS: set exactly ZF, PF, CF as given and clear OF, SF, AF (COMISS, PTEST, PCMPxSTRx set all six).
    fn set_flags(&mut self, cf: bool, pf: bool, af: bool, zf: bool, sf: bool, of: bool);
    /// The flags FCMOVcc reads: (CF, ZF, PF).
    fn flags_for_fcmov(&mut self) -> (bool, bool, bool);
    /// For x87: (CS selector, RIP of this instruction) and (segment selector, effective address) of
    /// its memory operand, kept in FIP/FDP.
    fn pointers(&mut self) -> ((u16, u64), (u16, u64));
    /// CPL, for instructions that care (XSETBV is the core's own).
    fn cpl(&mut self) -> u8;
    /// The linear memory operand [DS:RDI] of MASKMOVQ/MASKMOVDQU: write one byte at offset.
    fn write_maskmov(&mut self, offset: u64, byte: u8) -> Result<(), Exception>;
}

/// The function that executes a decoded instruction. On an error nothing has changed but, where
/// the architecture says so, the sticky exception flags.
pub type Handler<C> = fn(&mut C, &VecInsn) -> Result<(), Exception>;

/// Instruction set extensions whose results come from the host's own instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// x87, MMX, SSE, SSE2: every x86-64 host has them.
    Sse2,
    Sse3,
    Ssse3,
    Sse41,
    Sse42,
    Aes,
    Pclmul,
    Sha,
    Avx,
    Avx2,
    Fma,
    F16c,
}

/// Whether this host can execute an extension; the processor model offers no other.
pub fn host_supports(feature: Feature) -> bool {
    match feature {
        Feature::Sse2 => true,
        Feature::Sse3 => is_x86_feature_detected!("sse3"),
        Feature::Ssse3 => is_x86_feature_detected!("ssse3"),
        Feature::Sse41 => is_x86_feature_detected!("sse4.1"),
        Feature::Sse42 => is_x86_feature_detected!("sse4.2"),
        Feature::Aes => is_x86_feature_detected!("aes"),
        Feature::Pclmul => is_x86_feature_detected!("pclmulqdq"),
        Feature::Sha => is_x86_feature_detected!("sha"),
        Feature::Avx => is_x86_feature_detected!("avx"),
        Feature::Avx2 => is_x86_feature_detected!("avx2"),
        Feature::Fma => is_x86_feature_detected!("fma"),
        Feature::F16c => is_x86_feature_detected!("f16c"),
    }
}

/// The handler of an instruction; `None`: it is not one of this unit's (or not an instruction at all).
///
/// The core asks for: maps 0F, 0F38 and 0F3A with the opcodes of MMX, SSE to SSE4.2, AES,
/// PCLMULQDQ and SHA (0F C3 MOVNTI among them), 0F AE and 0F C7 with a memory operand (FXSAVE,
/// FXRSTOR, LDMXCSR, STMXCSR, XSAVE, XRSTOR, XSAVEOPT, XSAVEC), and D8..DF; and everything VEX-coded but the
/// integer instructions of BMI1 and BMI2.
pub fn resolve<C: Core>(insn: &mut VecInsn) -> Option<Handler<C>> {
    if insn.vex.is_some() {
        return avx::resolve(insn);
    }
    match insn.map {
        Map::X87 => x87::resolve(insn),
        _ => moves::resolve(insn).or_else(|| fxsave::resolve(insn)).or_else(|| sse::resolve(insn)),
    }
}
