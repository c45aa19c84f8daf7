//! The logging channel's frames: length, type, flags, CRC-32, payload; large payloads compressed.

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use crate::machine::Stamp;

/// Version of the protocol; both sides must have the same.
pub const PROTOCOL: u32 = 3;
/// What a peer sends first, so that a stranger is recognised at once.
pub const MAGIC: &[u8; 8] = b"ftvm-ft1";
/// The largest frame in bytes after decompression.
pub const MAX_FRAME: usize = 64 << 20;
/// Payloads shorter than this are not worth compressing.
const COMPRESS_FROM: usize = 256;

/// One side's part in a pairing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    Primary,
    Backup,
}

/// A pairing: one primary and one backup from synchronization to the end of either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Counts the pairings of a machine.
    pub number: u64,
    /// Random, so that no two pairings of any machines are confused.
    pub token: String,
}

/// Messages of the channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// Backup to primary: who asks, and on which port it will wait for a backup when it is live.
    Hello { protocol: u32, version: String, port: u16 },
    /// Either way: no, and why.
    Refuse { reason: String },
    /// Primary to backup: the machine's configuration and images, and the pairing.
    Config {
        epoch: Epoch,
        config: Vec<u8>,
        heartbeat_ms: u64,
        timeout_ms: u64,
        separate_disks: bool,
        /// The backup does disk reads itself; so it will ask of a backup of its own when it is live.
        reads_disk: bool,
    },
    /// Backup to primary: the machine is built and the lock reachable; send memory.
    Ready,
    /// Primary to backup: RAM pages: guest physical address and contents (empty: all zero).
    Pages { pages: Vec<(u64, Vec<u8>)> },
    /// Primary to backup: everything but RAM; the log starts at `stamp`.
    State { stamp: Stamp, state: Vec<u8> },
    /// Backup to primary: state loaded, following.
    Loaded,
    /// Primary to backup: log entries from number `first` on.
    Log { first: u64, count: u64, entries: Vec<u8> },
    /// Backup to primary: entries received, entries executed, and how far execution is.
    Ack { received: u64, applied: u64, executed: Stamp },
    /// Either way on the channel, when there is nothing else to say.
    Alive,
    /// Backup to primary: I give up and shall never go live (divergence, user's wish).
    Resign { reason: String },
    /// Backup to primary: state hash compared equal at the stamp.
    HashAgrees { stamp: Stamp },
    /// Primary to backup: the user ends this pairing; resign, and `again`: join anew.
    Dismiss { reason: String, again: bool },
    /// Primary to backup: a planned switch. This side has stopped, and you have all of the log: ask the lock and go live.
    HandOver { reason: String },
    /// Backup to primary, before it is ready, where disks are separate: digests of chunks from `first` on.
    DiskDigests { drive: u32, first: u64, digests: Vec<[u8; 16]> },
    /// Primary to backup: chunks of a disk by number (empty: all zero).
    DiskChunks { drive: u32, chunks: Vec<(u64, Vec<u8>)> },
}

/// Errors of the channel.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the channel failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("the peer does not speak ftvm's logging channel")]
    Magic,
    #[error("a frame on the channel is damaged (checksum)")]
    Checksum,
    #[error("a frame of {0} bytes is larger than the limit")]
    TooLarge(usize),
    #[error("a frame on the channel is not readable: {0}")]
    Format(String),
}

/// Put a message into a frame.
pub fn encode(message: &Message) -> Result<Vec<u8>, WireError> {
    let body = postcard::to_stdvec(message).map_err(|e| WireError::Format(e.to_string()))?;
    if body.len() > MAX_FRAME {
        return Err(WireError::TooLarge(body.len()));
    }
    let mut flags = 0u8;
    let mut payload = body;
    if payload.len() >= COMPRESS_FROM {
        let packed = lz4_flex::block::compress_prepend_size(&payload);
        if packed.len() < payload.len() - payload.len() / 8 {
            flags = 1;
            payload = packed;
        }
    }
    let mut out = Vec::with_capacity(payload.len() + 9);
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.push(flags);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[flags]);
    crc.update(&payload);
    out.extend_from_slice(&crc.finalize().to_le_bytes());
    out.extend_from_slice(&payload);
    Ok(out)
}

/// Read one frame; returns the message and how many bytes it took on the wire.
pub fn read(stream: &mut impl Read) -> Result<(Message, usize), WireError> {
    let mut head = [0u8; 9];
    read_exact(stream, &mut head)?;
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if len > MAX_FRAME {
        return Err(WireError::TooLarge(len));
    }
    // The length is not covered by the checksum: grow as bytes arrive, not by what a liar says.
    let mut payload = Vec::with_capacity(len.min(1 << 20));
    let got = stream.take(len as u64).read_to_end(&mut payload)?;
    if got != len {
        return Err(WireError::Closed);
    }
    Ok((decode(head[4], u32::from_le_bytes([head[5], head[6], head[7], head[8]]), &payload)?, len + 9))
}

/// Check and unpack a frame's payload.
pub fn decode(flags: u8, checksum: u32, payload: &[u8]) -> Result<Message, WireError> {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[flags]);
    crc.update(payload);
    if crc.finalize() != checksum {
        return Err(WireError::Checksum);
    }
    let message = match flags {
        0 => postcard::from_bytes(payload),
        1 => {
            let size = payload.first_chunk::<4>().map_or(usize::MAX, |b| u32::from_le_bytes(*b) as usize);
            // LZ4 packs 255 to 1 at best: a liar must not make us allocate.
            if size > MAX_FRAME || size > payload.len().saturating_mul(256) {
                return Err(WireError::TooLarge(size));
            }
            let body = lz4_flex::block::decompress_size_prepended(payload)
                .map_err(|e| WireError::Format(e.to_string()))?;
            postcard::from_bytes(&body)
        }
        other => return Err(WireError::Format(format!("unknown flags {other:#x}"))),
    };
    message.map_err(|e| WireError::Format(e.to_string()))
}

fn read_exact(stream: &mut impl Read, buf: &mut [u8]) -> Result<(), WireError> {
    stream.read_exact(buf).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => WireError::Closed,
        _ => WireError::Io(e),
    })
}

/// Exchange the magic bytes.
pub fn greet(stream: &mut (impl Read + Write)) -> Result<(), WireError> {
    stream.write_all(MAGIC)?;
    stream.flush()?;
    let mut got = [0u8; 8];
    read_exact(stream, &mut got)?;
    if &got != MAGIC {
        return Err(WireError::Magic);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_trip_and_every_flipped_bit_is_noticed() {
        let m = Message::Log { first: 7, count: 2, entries: vec![42; 5000] };
        let frame = encode(&m).unwrap();
        assert!(frame.len() < 1000, "compressed");
        assert_eq!(read(&mut frame.as_slice()).unwrap().0, m);
        for at in 0..frame.len() {
            let mut bad = frame.clone();
            bad[at] ^= 0x10;
            assert!(read(&mut bad.as_slice()).is_err(), "byte {at}");
        }
        for cut in 0..frame.len() {
            assert!(read(&mut &frame[..cut]).is_err());
        }
    }

    #[test]
    fn random_payloads_with_a_right_checksum_never_panic() {
        let mut x = 7u64;
        let mut random = move || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 33) as u8
        };
        for round in 0..50_000u64 {
            let len = usize::from(random()) % 80;
            let small = round % 2 == 0;
            let payload: Vec<u8> = (0..len).map(|_| if small { random() % 14 } else { random() }).collect();
            for flags in 0..3u8 {
                let mut crc = crc32fast::Hasher::new();
                crc.update(&[flags]);
                crc.update(&payload);
                let _ = decode(flags, crc.finalize(), &payload);
            }
        }
        let mut packed = (MAX_FRAME as u32).to_le_bytes().to_vec();
        packed.extend([0; 16]);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&[1]);
        crc.update(&packed);
        assert!(matches!(decode(1, crc.finalize(), &packed), Err(WireError::TooLarge(_))));
    }

    #[test]
    fn a_liar_about_the_size_costs_no_memory() {
        let mut bad = (u32::MAX).to_le_bytes().to_vec();
        bad.extend([0; 20]);
        assert!(matches!(read(&mut bad.as_slice()), Err(WireError::TooLarge(_))));
    }
}
