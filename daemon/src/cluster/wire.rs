//! What services say to each other: a length in four bytes (big endian), and JSON.

use std::io::{Error, ErrorKind, Read, Result, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest message.
const MAX_MESSAGE: u32 = 4 << 20;
/// The version of this language. A peer of another one is told so.
pub const VERSION: u32 = 1;

/// A host, as it tells of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostState {
    pub language: u32,
    pub name: String,
    /// Where its service is: `HOST:PORT`; empty: where its answers come from.
    pub service: String,
    /// The version of ftvm.
    pub version: String,
    /// What its processor has of that which a machine may need.
    pub features: Vec<String>,
    pub processors: u32,
    /// Of the last minute.
    pub load: f64,
    /// Bytes.
    pub memory: u64,
    pub available: u64,
    /// It takes no machines.
    pub maintenance: bool,
    pub machines: Vec<MachineState>,
}

/// A machine, as its host tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    pub name: String,
    pub uuid: String,
    /// It has a process, or gets one.
    pub runs: bool,
    pub role: String,
    pub state: String,
    /// Bytes.
    pub memory: u64,
}

/// A backup is to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub name: String,
    pub uuid: String,
    /// The definition on the primary's host, if it has one.
    pub definition: Option<String>,
    /// The primary's logging channel: `HOST:PORT`, or `:PORT` where the host is the one that asks.
    pub peer: String,
    pub lock: Option<String>,
    /// Each side has disks of its own, so the host must have a definition of its own.
    pub separate: bool,
    /// Bytes.
    pub memory: u64,
}

/// A race for files, for `ftctl check`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Race {
    pub dir: String,
    /// Both racers' files begin with this.
    pub tag: String,
    /// `exclusive creation` or `link`.
    pub kind: String,
    pub rounds: u32,
}

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Tells of the asking host; answered in kind.
    State(Box<HostState>),
    StartBackup(Order),
    /// The primary's host is to move a machine's backup away from `from`, to `to` or where it finds a place.
    MoveBackup {
        uuid: String,
        from: String,
        to: Option<String>,
    },
    /// What time it is.
    Clock,
    /// Take part in a race: answered when ready, and run when `Go` comes, once for each round.
    Race(Race),
    /// A round begins.
    Go,
    /// So many bytes follow, to be thrown away.
    Sink(u64),
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    State(Box<HostState>),
    Done,
    /// Microseconds since 1970.
    Clock(u64),
    /// Whether the round was won.
    Won(bool),
    /// Still at it.
    Working,
    Refused(String),
}

/// Write a message.
pub fn send<T: Serialize>(out: &mut impl Write, message: &T) -> Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|n| *n <= MAX_MESSAGE);
    let length = length.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the message is too long"))?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(body);
    out.write_all(&frame)?;
    out.flush()
}

/// Read a message.
pub fn receive<T: DeserializeOwned>(input: &mut impl Read) -> Result<T> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if length > MAX_MESSAGE {
        return Err(Error::new(ErrorKind::InvalidData, format!("a message of {length} bytes is too long")));
    }
    let mut body = Vec::new();
    if input.take(u64::from(length)).read_to_end(&mut body)? as u64 != u64::from(length) {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&body).map_err(|e| Error::new(ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_as_it_went() {
        let mut bytes = Vec::new();
        send(&mut bytes, &Request::Sink(7)).unwrap();
        send(&mut bytes, &Request::Go).unwrap();
        let mut input = &bytes[..];
        assert!(matches!(receive(&mut input).unwrap(), Request::Sink(7)));
        assert!(matches!(receive(&mut input).unwrap(), Request::Go));
        assert!(receive::<Request>(&mut input).is_err());
    }

    #[test]
    fn nonsense_is_an_error() {
        let long = (MAX_MESSAGE + 1).to_be_bytes();
        assert!(receive::<Request>(&mut &long[..]).unwrap_err().to_string().contains("too long"));
        assert!(receive::<Request>(&mut &[0, 0, 0, 9, b'{'][..]).is_err());
        assert!(receive::<Request>(&mut &[0, 0, 0, 2, b'{', b'}'][..]).is_err());
    }
}
