//! iSCSI protocol data units (RFC 7143, section 11): the 48 bytes of the basic header.

use std::io::{self, Read};

/// What an initiator sends.
pub mod out {
    pub const NOP: u8 = 0x00;
    pub const COMMAND: u8 = 0x01;
    pub const LOGIN: u8 = 0x03;
    pub const DATA: u8 = 0x05;
    pub const LOGOUT: u8 = 0x06;
}

/// What a target sends.
pub mod inn {
    pub const NOP: u8 = 0x20;
    pub const RESPONSE: u8 = 0x21;
    pub const LOGIN: u8 = 0x23;
    pub const DATA: u8 = 0x25;
    pub const LOGOUT: u8 = 0x26;
    pub const R2T: u8 = 0x31;
    pub const ASYNC: u8 = 0x32;
    pub const REJECT: u8 = 0x3F;
}

/// No tag.
pub const NO_TAG: u32 = u32::MAX;
/// Longest data segment that is taken from a target; it is told so at login.
pub const MAX_DATA: usize = 256 << 10;

/// A basic header segment.
#[derive(Clone, Copy)]
pub struct Header(pub [u8; 48]);

impl Header {
    /// A header with opcode, flags and tag.
    pub fn new(opcode: u8, flags: u8, tag: u32) -> Self {
        let mut h = Header([0; 48]);
        h.0[0] = opcode;
        h.0[1] = flags;
        h.put32(16, tag);
        h
    }
    pub fn opcode(&self) -> u8 {
        self.0[0] & 0x3F
    }
    pub fn flags(&self) -> u8 {
        self.0[1]
    }
    pub fn get32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
    pub fn put32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    /// Initiator task tag.
    pub fn tag(&self) -> u32 {
        self.get32(16)
    }
    /// Length of the data segment without padding.
    pub fn data_len(&self) -> usize {
        (self.get32(4) & 0xFF_FFFF) as usize
    }
    pub fn set_data_len(&mut self, len: usize) {
        self.put32(4, len as u32 & 0xFF_FFFF);
    }
    /// Single-level LUN addressing (SAM-5, 4.7).
    pub fn set_lun(&mut self, lun: u16) {
        if lun < 256 {
            self.0[9] = lun as u8;
        } else {
            self.0[8] = 0x40 | (lun >> 8) as u8;
            self.0[9] = lun as u8;
        }
    }
}

/// Padding after a data segment.
pub fn padding(len: usize) -> usize {
    len.next_multiple_of(4) - len
}

/// Read a header and skip what is between it and the data segment; refuse impossible lengths.
pub fn read_header(input: &mut impl Read) -> io::Result<Header> {
    let mut h = Header([0; 48]);
    input.read_exact(&mut h.0)?;
    let mut extra = usize::from(h.0[4]) * 4;
    if h.data_len() > MAX_DATA {
        return Err(bad("a data segment is longer than agreed"));
    }
    let mut skipped = [0u8; 64];
    while extra > 0 {
        let n = extra.min(64);
        input.read_exact(&mut skipped[..n])?;
        extra -= n;
    }
    Ok(h)
}

/// Read a data segment with its padding.
pub fn read_data(input: &mut impl Read, h: &Header) -> io::Result<Vec<u8>> {
    let mut data = vec![0; h.data_len()];
    input.read_exact(&mut data)?;
    skip_padding(input, h)?;
    Ok(data)
}

/// Read the padding after a data segment.
pub fn skip_padding(input: &mut impl Read, h: &Header) -> io::Result<()> {
    let mut pad = [0u8; 3];
    input.read_exact(&mut pad[..padding(h.data_len())])
}

/// What the target sent is not iSCSI as agreed.
pub fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("iSCSI: {text}"))
}
