//! What network cards share: finishing checksums and cutting large TCP segments, which guests
//! leave to the card.

pub mod e1000;
mod e1000_rings;

/// A frame that a card sends is never longer than this after segmentation.
pub const MAX_FRAME: usize = 65_550 + 14;
/// The largest TCP super-segment with its headers that a guest may hand over.
pub const MAX_GSO: usize = 65_536 + 256;

/// The Internet checksum's sum over `data`, folded (RFC 1071).
pub fn sum(data: &[u8], start: u32) -> u16 {
    let mut total = u64::from(start);
    let mut chunks = data.chunks_exact(2);
    for c in &mut chunks {
        total += u64::from(u16::from_be_bytes([c[0], c[1]]));
    }
    if let [last] = chunks.remainder() {
        total += u64::from(*last) << 8;
    }
    while total >> 16 != 0 {
        total = (total & 0xFFFF) + (total >> 16);
    }
    total as u16
}

/// Finish a checksum that covers `start..`, to be stored at `at`; the pseudo header's sum is there already.
/// Offsets outside the frame leave it as it is.
pub fn finish_checksum(frame: &mut [u8], start: usize, at: usize, end: usize) {
    let end = end.min(frame.len());
    if start >= end || at + 2 > end {
        return;
    }
    let value = !sum(&frame[start..end], 0);
    // UDP's zero means no checksum; all ones is the same sum.
    let value = if value == 0 { 0xFFFF } else { value };
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Where the headers of a TCP or UDP frame lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    pub ip: usize,
    pub l4: usize,
    /// First byte of payload.
    pub payload: usize,
    pub v6: bool,
    pub tcp: bool,
}

fn pair(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// Cut a TCP frame with `h` into segments of at most `mss` bytes of payload each (or a UDP frame: only its
/// lengths are set), with lengths, identification, sequence numbers, flags and checksums right.
pub fn segment(frame: &[u8], h: Headers, mss: usize) -> Vec<Vec<u8>> {
    let min_l4 = if h.tcp { 20 } else { 8 };
    if h.payload > frame.len()
        || h.ip + if h.v6 { 40 } else { 20 } > h.l4
        || h.l4 + min_l4 > h.payload
        || mss == 0
    {
        return Vec::new();
    }
    let payload = &frame[h.payload..];
    let id = if h.v6 { 0 } else { pair(frame, h.ip + 4) };
    let sequence = u32::from(pair(frame, h.l4 + 4)) << 16 | u32::from(pair(frame, h.l4 + 6));
    let count = payload.len().div_ceil(mss).max(1);
    let mut out = Vec::with_capacity(count);
    for i in 0..count {
        let part = &payload[i * mss..((i + 1) * mss).min(payload.len())];
        let mut f = frame[..h.payload].to_vec();
        f.extend_from_slice(part);
        let put = |f: &mut Vec<u8>, at: usize, v: u16| f[at..at + 2].copy_from_slice(&v.to_be_bytes());
        if h.v6 {
            let len = (f.len() - h.ip - 40) as u16;
            put(&mut f, h.ip + 4, len);
        } else {
            let len = (f.len() - h.ip) as u16;
            put(&mut f, h.ip + 2, len);
            put(&mut f, h.ip + 4, id.wrapping_add(i as u16));
            put(&mut f, h.ip + 10, 0);
            let check = !sum(&f[h.ip..h.l4], 0);
            put(&mut f, h.ip + 10, check);
        }
        if h.tcp {
            let seq = sequence.wrapping_add((i * mss) as u32).to_be_bytes();
            f[h.l4 + 4..h.l4 + 8].copy_from_slice(&seq);
            if i + 1 < count {
                // FIN and PSH belong to the last segment.
                f[h.l4 + 13] &= !0x09;
            }
            if i > 0 {
                // CWR belongs to the first.
                f[h.l4 + 13] &= !0x80;
            }
        } else {
            let len = (f.len() - h.l4) as u16;
            put(&mut f, h.l4 + 4, len);
        }
        l4_checksum(&mut f, h);
        out.push(f);
    }
    out
}

/// Compute the whole TCP or UDP checksum, pseudo header included.
fn l4_checksum(f: &mut [u8], h: Headers) {
    let at = h.l4 + if h.tcp { 16 } else { 6 };
    f[at..at + 2].fill(0);
    let addresses = if h.v6 { h.ip + 8..h.ip + 40 } else { h.ip + 12..h.ip + 20 };
    let length = (f.len() - h.l4) as u32;
    let start =
        u32::from(sum(&f[addresses], 0)) + if h.tcp { 6 } else { 17 } + (length >> 16) + (length & 0xFFFF);
    let value = !sum(&f[h.l4..], start);
    let value = if value == 0 && !h.tcp { 0xFFFF } else { value };
    f[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(payload: usize) -> Vec<u8> {
        let mut f = vec![0u8; 12];
        f.extend([8, 0]);
        f.extend([0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
        f.extend([0, 80, 1, 2, 0xFF, 0xFF, 0xFF, 0x00, 0, 0, 0, 0, 0x50, 0x19, 16, 0, 0, 0, 0, 0]);
        f.extend((0..payload).map(|i| i as u8));
        f
    }

    #[test]
    fn segments_are_whole_and_their_checksums_right() {
        let f = frame(3000);
        let h = Headers { ip: 14, l4: 34, payload: 54, v6: false, tcp: true };
        let parts = segment(&f, h, 1460);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 54 + 80]);
        let mut data: Vec<u8> = Vec::new();
        for (i, p) in parts.iter().enumerate() {
            assert_eq!(sum(&p[14..34], 0), 0xFFFF);
            let pseudo = u32::from(sum(&p[26..34], 0)) + 6 + (p.len() as u32 - 34);
            assert_eq!(sum(&p[34..], pseudo), 0xFFFF);
            assert_eq!(p[47] & 1 != 0, i == 2, "FIN only in the last");
            let seq = u32::from_be_bytes([p[38], p[39], p[40], p[41]]);
            assert_eq!(seq, 0xFFFF_FF00u32.wrapping_add(1460 * i as u32));
            data.extend(&p[54..]);
        }
        assert_eq!(data, f[54..]);
    }

    #[test]
    fn headers_outside_the_frame_give_nothing() {
        let h = Headers { ip: 14, l4: 34, payload: 5400, v6: false, tcp: true };
        assert!(segment(&frame(10), h, 100).is_empty());
        let mut f = vec![0; 20];
        finish_checksum(&mut f, 30, 40, 20);
        finish_checksum(&mut f, 10, 19, 20);
    }
}
