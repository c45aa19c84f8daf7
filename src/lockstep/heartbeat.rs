//! UDP heartbeats beside the logging channel (section 2.3 of the paper).
//!
//! A heartbeat names its pairing and side and is counted, so that a stray or repeated datagram of
//! another machine or an older pairing is not taken for a sign of life.

use super::wire::Side;

const MAGIC: &[u8; 4] = b"ftHB";

/// One heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The pairing's token.
    pub token: String,
    /// Who sends.
    pub side: Side,
    /// Grows by one each.
    pub count: u64,
}

impl Heartbeat {
    /// The datagram.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.push(u8::from(self.side == Side::Backup));
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(self.token.as_bytes());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Read a datagram; `None` if it is none of ours.
    pub fn decode(data: &[u8]) -> Option<Self> {
        let (body, crc) = data.split_last_chunk::<4>()?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let body = body.strip_prefix(MAGIC)?;
        let (side, body) = body.split_first()?;
        let (count, token) = body.split_first_chunk::<8>()?;
        let side = match side {
            0 => Side::Primary,
            1 => Side::Backup,
            _ => return None,
        };
        let token = String::from_utf8(token.to_vec()).ok()?;
        Some(Heartbeat { token, side, count: u64::from_le_bytes(*count) })
    }
}

/// Tells fresh heartbeats of the peer from stale ones.
#[derive(Debug)]
pub struct Listener {
    token: String,
    peer: Side,
    last: Option<u64>,
}

impl Listener {
    /// Listens for `peer`'s heartbeats of the pairing `token`.
    pub fn new(token: &str, peer: Side) -> Self {
        Listener { token: token.to_owned(), peer, last: None }
    }

    /// Whether a datagram is a fresh heartbeat of the peer.
    pub fn accept(&mut self, data: &[u8]) -> bool {
        let Some(beat) = Heartbeat::decode(data) else { return false };
        if beat.token != self.token || beat.side != self.peer || self.last.is_some_and(|l| beat.count <= l) {
            return false;
        }
        self.last = Some(beat.count);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fresh_beats_of_the_right_peer_count() {
        let beat = |token: &str, side, count| Heartbeat { token: token.into(), side, count }.encode();
        let mut l = Listener::new("t1", Side::Backup);
        assert!(l.accept(&beat("t1", Side::Backup, 1)));
        assert!(!l.accept(&beat("t1", Side::Backup, 1)), "repeated");
        assert!(!l.accept(&beat("t0", Side::Backup, 9)), "older pairing");
        assert!(!l.accept(&beat("t1", Side::Primary, 9)), "own side");
        let mut bad = beat("t1", Side::Backup, 2);
        bad[6] ^= 1;
        assert!(!l.accept(&bad));
        assert!(!l.accept(&[]));
        assert!(l.accept(&beat("t1", Side::Backup, 3)));
    }
}
