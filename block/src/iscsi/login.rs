//! The login phase (RFC 7143, section 6), with CHAP (RFC 1994).

use std::io::{self, Write};
use std::net::TcpStream;

use super::pdu::{self, inn, out, Header};
use super::url::Target;

/// What both sides agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Agreed {
    /// Longest data segment that the target takes.
    pub max_send: usize,
    /// Data that may go with a write command itself.
    pub immediate: usize,
    pub cmd_sn: u32,
    pub exp_stat_sn: u32,
    pub max_cmd_sn: u32,
}

/// Stages.
const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL: u8 = 3;

fn text(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, value) in pairs {
        out.extend(key.as_bytes());
        out.push(b'=');
        out.extend(value.as_bytes());
        out.push(0);
    }
    out
}

/// The value of a key in a text segment.
pub fn value<'a>(data: &'a [u8], key: &str) -> Option<&'a str> {
    data.split(|b| *b == 0).find_map(|item| {
        let item = std::str::from_utf8(item).ok()?;
        let (k, v) = item.split_once('=')?;
        (k == key).then_some(v)
    })
}

/// A binary value: `0x...` (hexadecimal) or `0b...` (base64, which no target here sends and is refused).
pub fn binary(text: &str) -> Option<Vec<u8>> {
    let hex = text.strip_prefix("0x").or(text.strip_prefix("0X"))?;
    let padded = if hex.len() % 2 == 1 { format!("0{hex}") } else { hex.to_owned() };
    padded.as_bytes().chunks(2).map(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 16).ok()).collect()
}

struct Login<'a> {
    stream: &'a TcpStream,
    isid: [u8; 6],
    exp_stat_sn: u32,
    max_cmd_sn: u32,
}

impl Login<'_> {
    /// One request and the whole of its answer: (next stage if the target moves on, text).
    fn ask(&mut self, stage: u8, next: u8, pairs: &[(&str, &str)]) -> io::Result<(Option<u8>, Vec<u8>)> {
        let mut body = text(pairs);
        // To stay in a stage is to have more to say.
        let mut flags = if next == stage { stage << 2 } else { 0x80 | stage << 2 | next };
        let mut answer = Vec::new();
        for _ in 0..16 {
            let mut h = Header::new(out::LOGIN | 0x40, flags, 1);
            h.0[8..14].copy_from_slice(&self.isid);
            h.put32(24, 1);
            h.put32(28, self.exp_stat_sn);
            h.set_data_len(body.len());
            let mut frame = h.0.to_vec();
            frame.extend(&body);
            frame.resize(frame.len() + pdu::padding(body.len()), 0);
            (&*self.stream).write_all(&frame)?;
            let reply = pdu::read_header(&mut &*self.stream)?;
            let data = pdu::read_data(&mut &*self.stream, &reply)?;
            if reply.opcode() != inn::LOGIN {
                return Err(pdu::bad("the target answers the login with something else"));
            }
            let (class, detail) = (reply.0[36], reply.0[37]);
            if class != 0 {
                return Err(refused(class, detail));
            }
            self.exp_stat_sn = reply.get32(24).wrapping_add(1);
            self.max_cmd_sn = reply.get32(32);
            answer.extend(data);
            if answer.len() > 64 << 10 {
                break;
            }
            let more = reply.flags() & 0x40 != 0;
            if !more {
                let moved = reply.flags() & 0x80 != 0;
                return Ok((moved.then_some(reply.flags() & 3), answer));
            }
            (body, flags) = (Vec::new(), stage << 2);
        }
        Err(pdu::bad("the login does not end"))
    }
}

fn refused(class: u8, detail: u8) -> io::Error {
    let (kind, why) = match (class, detail) {
        (1, _) => (io::ErrorKind::Unsupported, "the target has moved to another address"),
        (2, 1) => (io::ErrorKind::PermissionDenied, "the target does not accept the user or password"),
        (2, 2) => (io::ErrorKind::PermissionDenied, "the target does not allow this initiator"),
        (2, 3) => (io::ErrorKind::NotFound, "the target does not exist"),
        (2, _) => (io::ErrorKind::InvalidInput, "the target refuses the login"),
        _ => (io::ErrorKind::Other, "the target cannot serve now"),
    };
    io::Error::new(kind, format!("iSCSI: {why} (login status {class:02x}{detail:02x})"))
}

/// Log in; the stream's read timeout bounds it.
pub fn login(stream: &TcpStream, target: &Target, isid: [u8; 6]) -> io::Result<Agreed> {
    let mut login = Login { stream, isid, exp_stat_sn: 0, max_cmd_sn: 1 };
    let method = if target.user.is_some() { "CHAP,None" } else { "None" };
    let first = [
        ("InitiatorName", target.initiator.as_str()),
        ("TargetName", &target.name),
        ("SessionType", "Normal"),
        ("AuthMethod", method),
    ];
    let (mut moved, answer) = login.ask(SECURITY, OPERATIONAL, &first)?;
    if value(&answer, "AuthMethod") == Some("CHAP") {
        let Some((user, secret)) = &target.user else {
            return Err(pdu::bad("the target wants a user and a password"));
        };
        let (_, challenge) = login.ask(SECURITY, SECURITY, &[("CHAP_A", "5")])?;
        let id = value(&challenge, "CHAP_I").and_then(|i| i.parse::<u8>().ok());
        let nonce = value(&challenge, "CHAP_C").and_then(binary);
        let (Some(id), Some(nonce), Some("5")) = (id, nonce, value(&challenge, "CHAP_A")) else {
            return Err(pdu::bad("the target's CHAP challenge is not readable"));
        };
        let response = chap(id, secret.as_bytes(), &nonce);
        (moved, _) = login.ask(SECURITY, OPERATIONAL, &[("CHAP_N", user), ("CHAP_R", &response)])?;
    }
    let keys = [
        ("HeaderDigest", "None"),
        ("DataDigest", "None"),
        ("InitialR2T", "Yes"),
        ("ImmediateData", "Yes"),
        ("MaxRecvDataSegmentLength", "262144"),
        ("MaxBurstLength", "1048576"),
        ("FirstBurstLength", "262144"),
        ("MaxConnections", "1"),
        ("MaxOutstandingR2T", "1"),
        ("ErrorRecoveryLevel", "0"),
        ("DefaultTime2Wait", "0"),
        ("DefaultTime2Retain", "0"),
        ("DataPDUInOrder", "Yes"),
        ("DataSequenceInOrder", "Yes"),
    ];
    let mut all = answer;
    if moved != Some(FULL) {
        if moved != Some(OPERATIONAL) {
            return Err(pdu::bad("the target does not end the security stage"));
        }
        let (last, answer) = login.ask(OPERATIONAL, FULL, &keys)?;
        moved = last;
        all = answer;
    }
    if moved != Some(FULL) {
        return Err(pdu::bad("the target does not end the login"));
    }
    for digest in ["HeaderDigest", "DataDigest"] {
        if value(&all, digest).is_some_and(|v| v != "None") {
            return Err(pdu::bad("the target insists on digests"));
        }
    }
    let number = |key: &str, default: usize| value(&all, key).and_then(|v| v.parse().ok()).unwrap_or(default);
    // Defaults of RFC 7143, section 13.
    let max_send = number("MaxRecvDataSegmentLength", 8192).clamp(512, 1 << 20);
    let immediate = match value(&all, "ImmediateData") {
        Some("No") => 0,
        _ => number("FirstBurstLength", 65536).min(max_send),
    };
    Ok(Agreed {
        max_send,
        immediate,
        cmd_sn: 1,
        exp_stat_sn: login.exp_stat_sn,
        max_cmd_sn: login.max_cmd_sn,
    })
}

/// The response to a CHAP challenge.
fn chap(id: u8, secret: &[u8], nonce: &[u8]) -> String {
    let mut message = vec![id];
    message.extend(secret);
    message.extend(nonce);
    let digest = md5::compute(&message);
    format!("0x{digest:x}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn text_and_numbers() {
        let data = super::text(&[("A", "1"), ("Bc", "x=y")]);
        assert_eq!(super::value(&data, "Bc"), Some("x=y"));
        assert_eq!(super::value(&data, "B"), None);
        assert_eq!(super::binary("0x10aF3"), Some(vec![0x01, 0x0a, 0xf3]));
        assert_eq!(super::binary("0xzz"), None);
        // MD5 of 01 "secret" 0a 0b.
        assert_eq!(super::chap(1, b"secret", &[10, 11]).len(), 34);
    }
}
