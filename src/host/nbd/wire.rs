//! The NBD protocol's numbers and messages (the NBD project's `doc/proto.md`).

use std::io::{self, Read, Write};

/// The first bytes of a server, and what follows them: the newer negotiation. Also before every option.
pub const INIT: u64 = 0x4e42_444d_4147_4943;
pub const OPTION: u64 = 0x4948_4156_454F_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake flags, the server's and the client's alike.
pub const FIXED_NEWSTYLE: u16 = 1;
pub const NO_ZEROES: u16 = 2;

pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to options.
pub mod answer {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const UNSUPPORTED: u32 = 0x8000_0001;
    pub const POLICY: u32 = 0x8000_0002;
    pub const INVALID: u32 = 0x8000_0003;
    pub const UNKNOWN: u32 = 0x8000_0006;
}

/// Pieces of information about an export.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod export {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
}

/// Commands.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Kinds of structured replies' chunks; the last of a reply says so.
pub mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
}

/// The longest payload of a read or write, in bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The longest name or text.
pub const MAX_TEXT: usize = 4096;
/// The longest option: a name and some queries.
pub const MAX_OPTION: u32 = 1 << 20;

/// A client's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub handle: u64,
    pub offset: u64,
    pub len: u32,
}

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub fn u32_of(input: &mut impl Read) -> io::Result<u32> {
    Ok(u32::from_be_bytes(array(input)?))
}

/// Bytes of a length that a stranger said: memory is taken as they come.
pub fn bytes_of(input: &mut impl Read, len: u32) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    if input.take(u64::from(len)).read_to_end(&mut out)? < len as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(out)
}

impl Request {
    /// Read the next one; `None`: the client has gone.
    pub fn read(input: &mut impl Read) -> io::Result<Option<Request>> {
        let mut first = [0];
        if input.read(&mut first)? == 0 {
            return Ok(None);
        }
        let rest: [u8; 27] = array(input)?;
        let mut all = [0; 28];
        all[0] = first[0];
        all[1..].copy_from_slice(&rest);
        let number =
            |at: usize, len: usize| all[at..at + len].iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        if number(0, 4) != u64::from(REQUEST) {
            return Err(bad("a request begins with the wrong number"));
        }
        Ok(Some(Request {
            flags: number(4, 2) as u16,
            command: number(6, 2) as u16,
            handle: number(8, 8),
            offset: number(16, 8),
            len: number(24, 4) as u32,
        }))
    }
}

/// A client's option: its number and its data.
pub fn read_option(input: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    if u64::from_be_bytes(array(input)?) != OPTION {
        return Err(bad("an option begins with the wrong number"));
    }
    let number = u32_of(input)?;
    let len = u32_of(input)?;
    if len > MAX_OPTION {
        return Err(bad("an option is too long"));
    }
    Ok((number, bytes_of(input, len)?))
}

/// Answer an option.
pub fn answer(output: &mut impl Write, number: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut out = OPTION_REPLY.to_be_bytes().to_vec();
    out.extend(number.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    output.write_all(&out)
}

/// A simple reply, and a read's data.
pub fn simple(output: &mut impl Write, handle: u64, error: u32, data: &[u8]) -> io::Result<()> {
    let mut out = SIMPLE_REPLY.to_be_bytes().to_vec();
    out.extend(error.to_be_bytes());
    out.extend(handle.to_be_bytes());
    output.write_all(&out)?;
    output.write_all(data)
}

/// A chunk of a structured reply, its payload in two pieces.
pub fn structured(
    output: &mut impl Write,
    handle: u64,
    (flags, kind): (u16, u16),
    head: &[u8],
    data: &[u8],
) -> io::Result<()> {
    let mut out = STRUCTURED_REPLY.to_be_bytes().to_vec();
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(handle.to_be_bytes());
    out.extend(((head.len() + data.len()) as u32).to_be_bytes());
    out.extend(head);
    output.write_all(&out)?;
    output.write_all(data)
}

/// A text with its length in 32 bits at the beginning of `data`; it, and what follows.
pub fn text(data: &[u8]) -> Option<(String, &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    let len = u32::from_be_bytes(*len) as usize;
    if len > MAX_TEXT || len > rest.len() {
        return None;
    }
    let (text, rest) = rest.split_at(len);
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}
