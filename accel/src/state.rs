//! The architectural state of a software processor that several parts of it share.

/// A segment register with its hidden part (SDM vol. 3, section 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    pub selector: u16,
    pub base: u64,
    /// In bytes, after granularity.
    pub limit: u32,
    /// Bits 8..23 of the descriptor's second word, shifted down by 8: type 0..3, S 4, DPL 5..6,
    /// P 7, AVL 12, L 13, D/B 14, G 15. Zero: a null (unusable) segment.
    pub attr: u16,
}

/// x87 state. Registers are kept as 80-bit images; `st[i]` is physical register i, not ST(i).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87 {
    /// 10 significant bytes each; MMX register i is the low 64 bits of `st[i]`.
    pub st: [[u8; 16]; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word without TOP (bits 11..13 are zero here).
    pub fsw: u16,
    /// Top of stack, 0..7.
    pub top: u8,
    /// Abridged tag: bit i set = physical register i is not empty (FXSAVE form).
    pub tag: u8,
    /// Last instruction's opcode (11 bits), code and data pointers.
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    pub fcs: u16,
    pub fds: u16,
}

impl Default for X87 {
    /// The state after FNINIT.
    fn default() -> Self {
        X87 { st: [[0; 16]; 8], fcw: 0x37F, fsw: 0, top: 0, tag: 0, fop: 0, fip: 0, fdp: 0, fcs: 0, fds: 0 }
    }
}

/// SSE/AVX state: sixteen 256-bit registers (the upper halves serve AVX) and MXCSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Vector {
    pub ymm: [[u8; 32]; 16],
    pub mxcsr: u32,
}

impl Default for Vector {
    fn default() -> Self {
        Vector { ymm: [[0; 32]; 16], mxcsr: 0x1F80 }
    }
}

/// The registers that the vector and x87 code shares with the core. The core's private state
/// (segment caches, control registers, MSRs, APIC, TLB) lies beside this in its own structure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15; the rest is the core's: 16 always reads 0 (no
    /// base or index register), 17 is the RIP that a block of decoded code started at.
    pub gpr: [u64; 32],
    pub x87: X87,
    pub vector: Vector,
    pub cr0: u64,
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
}
