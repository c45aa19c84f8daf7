//! The log (section 2.1 of the paper): what came in, and exactly where.
//!
//! An entry is a tag byte, the distance from the entry before in instructions and nanoseconds
//! (LEB128), and a payload where the kind has one. Entries are counted from 0 within a pairing; the
//! count is what the backup acknowledges.

use crate::machine::Stamp;

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// An input, applied at the stamp.
    Input { stamp: Stamp, payload: Vec<u8> },
    /// Nothing comes in before the stamp: the backup may execute up to it. Written when an output
    /// leaves (the paper's "special log entry" of the Output Rule) and now and then besides.
    Horizon { stamp: Stamp },
    /// From here on outputs wait for the backup: it may go live from now.
    Protected { stamp: Stamp },
    /// The primary's state hash at the stamp, to be compared.
    Hash { stamp: Stamp, payload: Vec<u8> },
    /// The machine ended (power-off): end, do not go live.
    End { stamp: Stamp, payload: Vec<u8> },
    /// The first `count` outputs of this pairing have left for good.
    Released { stamp: Stamp, count: u64 },
    /// An input at the stamp whose contents the backup takes from the shared storage itself (section 4.2 of the paper):
    /// the payload says where they are.
    Fetch { stamp: Stamp, payload: Vec<u8> },
}

impl Entry {
    /// Where the entry applies.
    pub fn stamp(&self) -> Stamp {
        match self {
            Entry::Input { stamp, .. }
            | Entry::Horizon { stamp }
            | Entry::Protected { stamp }
            | Entry::Hash { stamp, .. }
            | Entry::End { stamp, .. }
            | Entry::Released { stamp, .. }
            | Entry::Fetch { stamp, .. } => *stamp,
        }
    }
}

/// Errors of reading a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error("the log ends within an entry")]
    Truncated,
    #[error("the log has an entry of unknown kind {0}")]
    Kind(u8),
    #[error("a number in the log is too large")]
    Overflow,
    #[error("a log entry of {0} bytes is larger than the limit")]
    TooLarge(u64),
}

/// The largest payload of one entry: a disk read of 32 MiB and its envelope.
const MAX_PAYLOAD: u64 = 33 << 20;
/// The most entries of one batch: the smallest entry has three bytes, and a batch is closed at 1 MiB.
const MAX_ENTRIES: u64 = (1 << 20) / 3 + 1;

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn take_varint(data: &[u8], at: &mut usize) -> Result<u64, LogError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *data.get(*at).ok_or(LogError::Truncated)?;
        *at += 1;
        let bits = u64::from(byte & 0x7F);
        if shift == 63 && bits > 1 {
            return Err(LogError::Overflow);
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(LogError::Overflow)
}

/// Turns entries into bytes.
#[derive(Clone, Debug, Default)]
pub struct Encoder {
    last: Stamp,
}

impl Encoder {
    /// An encoder whose first entry is measured from `start`.
    pub fn new(start: Stamp) -> Self {
        Encoder { last: start }
    }

    /// Append an entry. Stamps never go back.
    pub fn put(&mut self, out: &mut Vec<u8>, entry: &Entry) {
        let stamp = entry.stamp();
        let (tag, payload): (u8, Option<&[u8]>) = match entry {
            Entry::Input { payload, .. } => (0, Some(payload)),
            Entry::Horizon { .. } => (1, None),
            Entry::Protected { .. } => (2, None),
            Entry::Hash { payload, .. } => (3, Some(payload)),
            Entry::End { payload, .. } => (4, Some(payload)),
            Entry::Released { .. } => (5, None),
            Entry::Fetch { payload, .. } => (6, Some(payload)),
        };
        out.push(tag);
        put_varint(out, stamp.position.wrapping_sub(self.last.position));
        put_varint(out, stamp.ns.wrapping_sub(self.last.ns));
        if let Some(payload) = payload {
            put_varint(out, payload.len() as u64);
            out.extend_from_slice(payload);
        }
        if let Entry::Released { count, .. } = entry {
            put_varint(out, *count);
        }
        self.last = stamp;
    }
}

/// Turns bytes into entries.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    last: Stamp,
}

impl Decoder {
    /// A decoder whose first entry is measured from `start`.
    pub fn new(start: Stamp) -> Self {
        Decoder { last: start }
    }

    /// Read all entries of a file's batch; a batch holds whole entries.
    pub fn take_all(&mut self, data: &[u8]) -> Result<Vec<Entry>, LogError> {
        let mut at = 0;
        let mut out = Vec::new();
        while at < data.len() {
            out.push(self.take(data, &mut at)?);
        }
        Ok(out)
    }

    /// Read a batch of `count` entries from a peer; a batch holds whole entries and nothing else.
    pub fn take_batch(&mut self, data: &[u8], count: u64) -> Result<Vec<Entry>, LogError> {
        if count > MAX_ENTRIES {
            return Err(LogError::TooLarge(count));
        }
        let mut at = 0;
        let mut out = Vec::new();
        while at < data.len() && (out.len() as u64) < count {
            out.push(self.take(data, &mut at)?);
        }
        if at != data.len() || out.len() as u64 != count {
            return Err(LogError::Truncated);
        }
        Ok(out)
    }

    /// Read one entry at `*at`.
    pub fn take(&mut self, data: &[u8], at: &mut usize) -> Result<Entry, LogError> {
        let tag = *data.get(*at).ok_or(LogError::Truncated)?;
        if tag > 6 {
            return Err(LogError::Kind(tag));
        }
        *at += 1;
        let position = self.last.position.wrapping_add(take_varint(data, at)?);
        let ns = self.last.ns.wrapping_add(take_varint(data, at)?);
        let stamp = Stamp { position, ns };
        let mut payload = || -> Result<Vec<u8>, LogError> {
            let len = take_varint(data, at)?;
            if len > MAX_PAYLOAD {
                return Err(LogError::TooLarge(len));
            }
            let end = at.checked_add(len as usize).ok_or(LogError::Overflow)?;
            let bytes = data.get(*at..end).ok_or(LogError::Truncated)?.to_vec();
            *at = end;
            Ok(bytes)
        };
        let entry = match tag {
            0 => Entry::Input { stamp, payload: payload()? },
            1 => Entry::Horizon { stamp },
            2 => Entry::Protected { stamp },
            3 => Entry::Hash { stamp, payload: payload()? },
            4 => Entry::End { stamp, payload: payload()? },
            5 => Entry::Released { stamp, count: take_varint(data, at)? },
            _ => Entry::Fetch { stamp, payload: payload()? },
        };
        self.last = stamp;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_trip_and_truncation_is_noticed() {
        let at = |position, ns| Stamp { position, ns };
        let entries = vec![
            Entry::Input { stamp: at(5, 50), payload: vec![1, 2, 3] },
            Entry::Horizon { stamp: at(1 << 40, 1 << 41) },
            Entry::Protected { stamp: at(1 << 40, 1 << 42) },
            Entry::Released { stamp: at(1 << 40, 1 << 42), count: 77 },
            Entry::Fetch { stamp: at(1 << 40, 1 << 42), payload: vec![4; 20] },
            Entry::Hash { stamp: at(1 << 41, 1 << 42), payload: vec![] },
            Entry::End { stamp: at(1 << 41, 1 << 42), payload: vec![9; 300] },
        ];
        let mut bytes = Vec::new();
        let mut encoder = Encoder::default();
        for e in &entries {
            encoder.put(&mut bytes, e);
        }
        let all = |data: &[u8], n| Decoder::default().take_batch(data, n);
        assert_eq!(all(&bytes, entries.len() as u64).unwrap(), entries);
        for cut in 0..bytes.len() {
            for n in 1..=entries.len() {
                if let Ok(got) = all(&bytes[..cut], n as u64) {
                    assert!(got.len() < entries.len() && entries.starts_with(&got));
                }
            }
        }
        assert!(all(&bytes, 6).is_err(), "more than announced");
        assert_eq!(all(&[99], 1), Err(LogError::Kind(99)));
        assert!(all(&[0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1], 1).is_err());
    }

    #[test]
    fn random_bytes_never_panic_nor_cost_memory() {
        let mut x = 1u64;
        let mut random = move || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 33) as u8
        };
        for round in 0..50_000u64 {
            let len = usize::from(random()) % 64;
            // Small bytes make valid tags and short numbers likely.
            let data: Vec<u8> =
                (0..len).map(|_| if round % 2 == 0 { random() % 8 } else { random() }).collect();
            for n in [0, 1, 2, 7, u64::MAX] {
                if let Ok(entries) = Decoder::default().take_batch(&data, n) {
                    assert!(entries.len() * 3 <= data.len());
                }
            }
        }
    }
}
