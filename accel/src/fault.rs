//! Processor exceptions.

/// An exception raised by an instruction (SDM vol. 3, chapter 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0..31.
    pub vector: u8,
    /// The error code, for those vectors that push one.
    pub error: Option<u32>,
    /// For a page fault: the linear address (to CR2).
    pub cr2: u64,
}

impl Exception {
    /// #DE
    pub const DE: Exception = Exception::plain(0);
    /// #DB
    pub const DB: Exception = Exception::plain(1);
    /// #BP
    pub const BP: Exception = Exception::plain(3);
    /// #OF
    pub const OF: Exception = Exception::plain(4);
    /// #BR
    pub const BR: Exception = Exception::plain(5);
    /// #UD
    pub const UD: Exception = Exception::plain(6);
    /// #NM
    pub const NM: Exception = Exception::plain(7);
    /// #MF
    pub const MF: Exception = Exception::plain(16);
    /// #XM
    pub const XM: Exception = Exception::plain(19);

    const fn plain(vector: u8) -> Exception {
        Exception { vector, error: None, cr2: 0 }
    }
    /// An exception with an error code (#TS, #NP, #SS, #GP, #AC, #DF).
    pub const fn with_error(vector: u8, error: u32) -> Exception {
        Exception { vector, error: Some(error), cr2: 0 }
    }
    /// #GP(error)
    pub const fn gp(error: u32) -> Exception {
        Exception::with_error(13, error)
    }
    /// #SS(error)
    pub const fn ss(error: u32) -> Exception {
        Exception::with_error(12, error)
    }
    /// #PF at a linear address.
    pub const fn page_fault(error: u32, cr2: u64) -> Exception {
        Exception { vector: 14, error: Some(error), cr2 }
    }
}
