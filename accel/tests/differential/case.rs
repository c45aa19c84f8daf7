//! What a case is and what comes out of it.

/// Where the code lies, on the host and in the guest alike: one page, readable and executable.
pub const CODE: u64 = 0x0100_0000;
pub const CODE_SIZE: usize = 4096;
/// Operands and stack: two pages, writable, not executable. The pages around are not present.
pub const DATA: u64 = 0x0110_0000;
pub const DATA_SIZE: usize = 8192;
/// A page of zeros that cannot be written.
pub const READ_ONLY: u64 = 0x0120_0000;
/// DS, ES and SS; CS is 0x33 (64-bit) or 0x23 (compatibility), as Linux has them.
pub const STACK_SELECTOR: u64 = 0x2B;

/// The registers that a program sees; x87, XMM and MXCSR as an FXSAVE64 image.
#[derive(Clone, PartialEq, Eq)]
pub struct Regs {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub flags: u64,
    pub fx: [u8; 512],
}

impl Default for Regs {
    fn default() -> Self {
        Regs { gpr: [0; 16], rip: 0, flags: 2, fx: [0; 512] }
    }
}

impl Regs {
    pub fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.fx[at], self.fx[at + 1]])
    }
    pub fn mxcsr(&self) -> u32 {
        u32::from(self.word(24)) | u32::from(self.word(26)) << 16
    }
}

/// Code and the state to run it from. The code page is filled with INT3, which ends every case.
#[derive(Clone)]
pub struct Case {
    pub long: bool,
    pub code: [u8; CODE_SIZE],
    pub regs: Regs,
    pub data: [u8; DATA_SIZE],
    /// Offsets of the instructions in the code page.
    pub starts: Vec<u16>,
    /// RFLAGS bits that are undefined at the end.
    pub undefined: u64,
    /// How results are to be compared.
    pub compare: Compare,
    /// Data bytes (offset, length) that are not fixed by the architecture.
    pub open_bytes: Vec<(usize, usize)>,
}

/// What the architecture fixes of a case's results.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Compare {
    /// x87 results within two units in the last place.
    pub x87_close: bool,
    /// Single-precision XMM results within 2^-11.
    pub xmm_close: bool,
    /// The values of ST(0) and ST(1) are not compared at all.
    pub x87_open: bool,
    /// It is a call.
    pub call: bool,
    /// Which byte of a large operand faults is the implementation's choice.
    pub cr2_open: bool,
    /// x87 condition codes are partly undefined: these bits of FSW are not compared.
    pub fsw_open: u16,
    /// The instruction's destination is undefined for these operands: compare nothing but the exception.
    pub exception_only: bool,
}

/// The state at the exception that ended a case.
#[derive(Clone)]
pub struct Outcome {
    pub regs: Regs,
    pub vector: u8,
    pub error: u32,
    pub cr2: u64,
    pub signal: i32,
    pub data: [u8; DATA_SIZE],
}

impl Outcome {
    pub fn new() -> Outcome {
        Outcome { regs: Regs::default(), vector: 0, error: 0, cr2: 0, signal: 0, data: [0; DATA_SIZE] }
    }
}

impl Compare {
    /// Whether later instructions would compute with values that are not fixed.
    pub fn unusual(&self) -> bool {
        Compare { cr2_open: false, call: false, ..*self } != Compare::default()
    }
}
