//! What a case is and what comes out of it.

/// Where the code lies, on the host and in the guest alike: one page, readable and executable.
pub const CODE: u64 = 0x0100_0000;
pub const CODE_SIZE: usize = 4096;
/// Operands and stack: two pages, writable, not executable. The pages around are not present.
pub const DATA: u64 = 0x0110_0000;
pub const DATA_SIZE: usize = 8192;
/// A page of zeros that cannot be written.
pub const READ_ONLY: u64 = 0x0120_0000;
/// Whether the processor has YMM registers.
pub fn has_avx() -> bool {
    std::is_x86_feature_detected!("avx")
}
/// Where the entry code's own data lie. Returning to a 16-bit stack leaves bits 16..31 of ESP as they
/// were, so they are this address's.
pub const ENTRY: u64 = 0x01AB_0000;
/// Base of the data segments of [`LDT`]; offsets 0x1000 to 0x3000 are the data.
pub const DATA_BASE: u64 = DATA - 0x1000;

/// A segment of the local descriptor table, the same on the host (modify_ldt) and in the guest.
pub struct Descriptor {
    pub base: u64,
    pub limit: u32,
    /// 0 data, 1 expand-down data, 2 code.
    pub contents: u32,
    /// Data that cannot be written or code that cannot be read.
    pub restricted: bool,
    pub big: bool,
    pub present: bool,
}

const fn descriptor(base: u64, limit: u32, contents: u32, big: bool) -> Descriptor {
    Descriptor { base, limit, contents, restricted: false, big, present: true }
}

/// Entries 1 and on.
pub const LDT: [Descriptor; 8] = [
    descriptor(CODE, 0xFFF, 2, false),
    descriptor(DATA_BASE, 0x3FFF, 0, false),
    descriptor(CODE, 0xFFF, 2, true),
    descriptor(DATA_BASE, 0x3FFF, 0, true),
    Descriptor { restricted: true, ..descriptor(DATA_BASE, 0x2FFF, 0, false) },
    descriptor(DATA_BASE, 0x17FF, 1, true),
    Descriptor { restricted: true, ..descriptor(CODE, 0xFFF, 2, false) },
    Descriptor { present: false, ..descriptor(DATA_BASE, 0x3FFF, 0, false) },
];

/// The processor modes that a process of the host can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit mode.
    Long,
    /// Compatibility mode with flat 32-bit segments.
    Flat32,
    /// 32-bit segments with bases and limits.
    Segmented32,
    /// 16-bit segments with bases and limits.
    Segmented16,
}

impl Mode {
    pub const ALL: [Mode; 4] = [Mode::Long, Mode::Flat32, Mode::Segmented32, Mode::Segmented16];

    pub fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Segmented16 => 16,
            _ => 32,
        }
    }
    pub fn segmented(self) -> bool {
        matches!(self, Mode::Segmented32 | Mode::Segmented16)
    }
    pub fn code_base(self) -> u64 {
        if self.segmented() {
            CODE
        } else {
            0
        }
    }
    pub fn data_base(self) -> u64 {
        if self.segmented() {
            DATA_BASE
        } else {
            0
        }
    }
    /// CS as Linux has it, or of [`LDT`].
    pub fn code_selector(self) -> u16 {
        match self {
            Mode::Long => 0x33,
            Mode::Flat32 => 0x23,
            Mode::Segmented32 => 0x1F,
            Mode::Segmented16 => 0x0F,
        }
    }
    /// DS, ES and SS.
    pub fn data_selector(self) -> u16 {
        match self {
            Mode::Segmented32 => 0x27,
            Mode::Segmented16 => 0x17,
            _ => 0x2B,
        }
    }
}

/// The registers that a program sees; x87, XMM and MXCSR as an FXSAVE64 image.
#[derive(Clone, PartialEq, Eq)]
pub struct Regs {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub flags: u64,
    pub fx: [u8; 512],
    /// The upper halves of the YMM registers.
    pub high: [u8; 256],
    /// ES, CS, SS, DS (results only).
    pub selectors: [u16; 4],
}

impl Default for Regs {
    fn default() -> Self {
        Regs { gpr: [0; 16], rip: 0, flags: 2, fx: [0; 512], high: [0; 256], selectors: [0; 4] }
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
    pub mode: Mode,
    pub code: [u8; CODE_SIZE],
    pub regs: Regs,
    pub data: [u8; DATA_SIZE],
    /// Offsets of the instructions in the code page.
    pub starts: Vec<u16>,
    /// RFLAGS bits that are undefined at the end.
    pub undefined: u64,
    /// The same after each instruction.
    pub undefined_after: Vec<u64>,
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
    /// Elements of XMM results of this many bytes that are both a NaN count as equal; 0: none do.
    pub nan_open: u8,
    /// The values of ST(0) and ST(1) are not compared at all.
    pub x87_open: bool,
    /// The order of its faults is the implementation's choice.
    pub order_open: bool,
    /// Whether it reads before it writes is the implementation's choice.
    pub error_open: bool,
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
        Compare { cr2_open: false, order_open: false, ..*self } != Compare::default()
    }
}
