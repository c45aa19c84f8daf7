//! External data representation (RFC 4506), as far as NFS needs it.

use std::io;

/// What the server sent is not what the protocol says.
pub fn bad() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "NFS: the server's answer is not readable")
}

/// Builds a call's arguments.
#[derive(Default)]
pub struct Out(pub Vec<u8>);

impl Out {
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    /// Bytes of a length that both sides know.
    pub fn fixed(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    /// A length and bytes, padded.
    pub fn opaque(self, bytes: &[u8]) -> Self {
        let mut out = self.u32(bytes.len() as u32);
        out.0.extend(bytes);
        out.0.resize(out.0.len().next_multiple_of(4), 0);
        out
    }
}

/// Takes an answer apart.
pub struct In<'a>(pub &'a [u8]);

impl<'a> In<'a> {
    pub fn fixed(&mut self, len: usize) -> io::Result<&'a [u8]> {
        if self.0.len() < len {
            return Err(bad());
        }
        let (now, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(now)
    }
    pub fn u32(&mut self) -> io::Result<u32> {
        let b = self.fixed(4)?;
        Ok(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }
    pub fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from(self.u32()?) << 32 | u64::from(self.u32()?))
    }
    pub fn opaque(&mut self, most: usize) -> io::Result<&'a [u8]> {
        let len = self.u32()? as usize;
        if len > most {
            return Err(bad());
        }
        let bytes = self.fixed(len)?;
        self.fixed(len.next_multiple_of(4) - len)?;
        Ok(bytes)
    }
    /// A file's attributes, if they are there: its size.
    pub fn attributes(&mut self) -> io::Result<Option<u64>> {
        if self.u32()? == 0 {
            return Ok(None);
        }
        self.size().map(Some)
    }
    /// fattr3 (RFC 1813, 2.6): the size.
    pub fn size(&mut self) -> io::Result<u64> {
        self.fixed(20)?;
        let size = self.u64()?;
        self.fixed(56)?;
        Ok(size)
    }
    /// wcc_data: attributes before and after.
    pub fn change(&mut self) -> io::Result<()> {
        if self.u32()? != 0 {
            self.fixed(24)?;
        }
        self.attributes().map(|_| ())
    }
}
