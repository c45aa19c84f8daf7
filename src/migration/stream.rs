//! The form of a machine's state outside of its process: in a migration's stream, in a file, and in a snapshot.
//!
//! ```text
//! head    "FTVMSTAT", version (u32), flags (u32)
//! frame   kind (u8), length (u32), payload, CRC-32 of all three (u32)
//! ```
//!
//! Numbers are little-endian. The frames are one [`Frame::Machine`], any number of [`Frame::Pages`], one [`Frame::State`]
//! and [`Frame::End`]. Where the receiver can answer it does so by frames too ([`Answer`]). Nothing that was cut off, changed on
//! its way or written by a later version is taken for a state.
//!
//! A stream with the flag [`POSTCOPY`] has a [`Frame::Advise`] behind the machine, and may have the state before all pages are
//! sent: then [`Frame::Discard`] tells which of them are stale before it, [`Frame::Postcopy`] follows it, and more pages follow
//! that. When such a stream broke there, another one with the flag [`RESUME`] goes on: [`Frame::Resume`], pages, the end.

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use super::pages::Pages;

/// What every stream begins with.
pub const MAGIC: &[u8; 8] = b"FTVMSTAT";
/// Version of the form.
pub const VERSION: u32 = 1;
/// Flag: the sender waits for the receiver's answers.
pub const ANSWERS: u32 = 1;
/// Flag: pages may come behind the state.
pub const POSTCOPY: u32 = 2;
/// Flag: this goes on with a stream that broke behind its state.
pub const RESUME: u32 = 4;
/// The largest payload of a frame in bytes.
pub const MAX_PAYLOAD: usize = 256 << 20;
/// Bytes of a page of guest memory.
pub const PAGE: usize = 4096;
/// Pages of one frame at most.
pub const MAX_PAGES: usize = 4096;

/// A payload is read in steps of this many bytes; one of pages is not longer, most of the time.
const STEP: usize = 2 << 20;

const MACHINE: u8 = 1;
const PAGES: u8 = 2;
const STATE: u8 = 3;
const END: u8 = 4;
const PACKED_PAGES: u8 = 5;
const ADVISE: u8 = 6;
const DISCARD: u8 = 7;
const POSTCOPY_RUN: u8 = 8;
const RESUMES: u8 = 9;
const LOADED: u8 = 16;
const FAILED: u8 = 17;
const GO: u8 = 18;
const WANTED: u8 = 19;
const HAVE: u8 = 20;
const COMPLETE: u8 = 21;

/// Errors of a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("the stream of the machine's state breaks off")]
    Truncated,
    #[error("the stream of the machine's state failed: {0}")]
    Io(#[source] std::io::Error),
    #[error("this is no state of an ftvm machine")]
    Magic,
    #[error("the machine's state is in version {0} of its form, this program reads up to {VERSION}")]
    Version(u32),
    #[error("the stream of the machine's state has unknown flags {0:#x}")]
    Flags(u32),
    #[error("the stream of the machine's state is damaged: {0}")]
    Damaged(&'static str),
    #[error("the stream of the machine's state has an unknown part of kind {0}")]
    Unknown(u8),
}

impl From<std::io::Error> for StreamError {
    fn from(e: std::io::Error) -> Self {
        match e.kind() {
            std::io::ErrorKind::UnexpectedEof => StreamError::Truncated,
            _ => StreamError::Io(e),
        }
    }
}

/// What the machine is, so that a receiver sees whether it has the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// The program that wrote it.
    pub program: String,
    /// Lines `name: value` that must be equal.
    pub identity: String,
    /// The firmware's bytes, which the machine has mapped.
    pub firmware: Vec<u8>,
}

/// A part of a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    Machine(MachineInfo),
    Pages(Pages),
    /// Everything but the contents of RAM: [`crate::machine::MachineState`]; `running`: the processors ran until they were stopped
    /// for this.
    State {
        running: bool,
        state: Vec<u8>,
    },
    /// The stream is whole: so many frames came before this one.
    End {
        frames: u64,
    },
    /// The migration's number, by which it knows itself again.
    Advise(u64),
    /// Runs of pages (the first one's address, how many) that were sent and changed since, or that were not sent.
    Discard(Vec<(u64, u64)>),
    /// The machine may run, and asks for the pages that it has not.
    Postcopy,
    /// This goes on with the migration of that number.
    Resume(u64),
    /// In the midst of pages: [`Answer::Go`].
    Go,
}

/// What receiver and sender say to one another behind the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Receiver: the machine is complete here, its images are open.
    Loaded,
    /// Receiver: it is not, for this reason; the sender's machine goes on.
    Failed(String),
    /// Sender: the machine is the receiver's now.
    Go,
    /// Receiver: it waits for these pages.
    Wanted(Vec<u64>),
    /// Receiver: a bit for each page of RAM, in order, that is set if the page is there.
    Have(Vec<u8>),
    /// Receiver: every page is there.
    Complete,
}

/// The head of a stream.
pub fn head(flags: u32) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out
}

/// Read a head; returns the flags.
pub fn read_head(input: &mut impl Read) -> Result<u32, StreamError> {
    let mut raw = [0; 16];
    input.read_exact(&mut raw)?;
    if &raw[..8] != MAGIC {
        return Err(StreamError::Magic);
    }
    let version = word(&raw[8..]);
    if version == 0 || version > VERSION {
        return Err(StreamError::Version(version));
    }
    let flags = word(&raw[12..]);
    match flags & !(ANSWERS | POSTCOPY | RESUME) {
        0 => Ok(flags),
        other => Err(StreamError::Flags(other)),
    }
}

fn word(raw: &[u8]) -> u32 {
    raw.iter().take(4).rev().fold(0, |n, b| n << 8 | u32::from(*b))
}

fn long(raw: &[u8]) -> u64 {
    raw.iter().take(8).rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The bytes of a frame of any kind, with its checksum.
pub fn put(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 9);
    out.push(kind);
    out.extend((payload.len() as u32).to_le_bytes());
    out.extend(payload);
    let sum = crc32fast::hash(&out);
    out.extend(sum.to_le_bytes());
    out
}

fn take(input: &mut impl Read) -> Result<(u8, Vec<u8>), StreamError> {
    let mut head = [0; 5];
    input.read_exact(&mut head)?;
    let len = word(&head[1..]) as usize;
    if len > MAX_PAYLOAD {
        return Err(StreamError::Damaged("a part is too long"));
    }
    // Memory is taken as bytes come in, not as a stranger's length says.
    let mut payload = Vec::with_capacity(len.min(STEP));
    while payload.len() < len {
        let at = payload.len();
        payload.resize(len.min(at + STEP), 0);
        input.read_exact(&mut payload[at..])?;
    }
    let mut sum = [0; 4];
    input.read_exact(&mut sum)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(&payload);
    if hasher.finalize() != word(&sum) {
        return Err(StreamError::Damaged("a checksum is wrong"));
    }
    Ok((head[0], payload))
}

fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// What precedes the contents of pages in a frame's payload.
fn pages_heads(pages: &Pages) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + pages.len() * 8);
    out.extend((pages.len() as u32).to_le_bytes());
    out.extend(pages.heads().iter().flat_map(|head| head.to_le_bytes()));
    out
}

fn read_pages(raw: Vec<u8>) -> Result<Pages, StreamError> {
    let damaged = || StreamError::Damaged("pages of memory are not readable");
    let (count, rest) = raw.split_at_checked(4).ok_or_else(damaged)?;
    let count = word(count) as usize;
    if count > MAX_PAGES {
        return Err(damaged());
    }
    let (heads, _) = rest.split_at_checked(count * 8).ok_or_else(damaged)?;
    let heads = heads.chunks_exact(8).map(long).collect();
    Pages::from_parts(heads, raw, 4 + count * 8).ok_or_else(damaged)
}

impl Frame {
    /// The frame's bytes; `pack`: pages are compressed where that pays.
    pub fn to_bytes(&self, pack: bool) -> Vec<u8> {
        match self {
            Frame::Machine(info) => put(MACHINE, &postcard::to_stdvec(info).unwrap_or_default()),
            Frame::Pages(pages) => {
                let mut payload = pages_heads(pages);
                payload.extend(pages.contents());
                if pack {
                    let packed = lz4_flex::block::compress_prepend_size(&payload);
                    if packed.len() < payload.len() - payload.len() / 8 {
                        return put(PACKED_PAGES, &packed);
                    }
                }
                put(PAGES, &payload)
            }
            Frame::State { running, state } => {
                let mut payload = vec![u8::from(*running)];
                payload.extend(state);
                put(STATE, &payload)
            }
            Frame::End { frames } => put(END, &frames.to_le_bytes()),
            Frame::Advise(session) => put(ADVISE, &session.to_le_bytes()),
            Frame::Discard(runs) => {
                let words: Vec<u64> = runs.iter().flat_map(|(start, pages)| [*start, *pages]).collect();
                put(DISCARD, &to_bytes(&words))
            }
            Frame::Postcopy => put(POSTCOPY_RUN, &[]),
            Frame::Resume(session) => put(RESUMES, &session.to_le_bytes()),
            Frame::Go => put(GO, &[]),
        }
    }

    /// Write the frame's bytes; `pack` as for [`Self::to_bytes`]. Returns how many they are.
    pub fn write(&self, output: &mut dyn Write, pack: bool) -> std::io::Result<u64> {
        let pages = match self {
            Frame::Pages(pages) if !pack => pages,
            _ => {
                let bytes = self.to_bytes(pack);
                return output.write_all(&bytes).map(|()| bytes.len() as u64);
            }
        };
        // Contents go as they lie there.
        let (heads, contents) = (pages_heads(pages), pages.contents());
        let mut head = vec![PAGES];
        head.extend(((heads.len() + contents.len()) as u32).to_le_bytes());
        head.extend(heads);
        let mut sum = crc32fast::Hasher::new();
        sum.update(&head);
        sum.update(contents);
        output.write_all(&head)?;
        output.write_all(contents)?;
        output.write_all(&sum.finalize().to_le_bytes())?;
        Ok((head.len() + contents.len() + 4) as u64)
    }

    /// Read a frame.
    pub fn read(input: &mut impl Read) -> Result<Frame, StreamError> {
        let (kind, payload) = take(input)?;
        match kind {
            MACHINE => {
                let info = postcard::from_bytes(&payload);
                Ok(Frame::Machine(
                    info.map_err(|_| StreamError::Damaged("the machine's description is not readable"))?,
                ))
            }
            PAGES => Ok(Frame::Pages(read_pages(payload)?)),
            PACKED_PAGES => {
                let limit = 4 + MAX_PAGES * (8 + PAGE);
                let damaged = StreamError::Damaged("compressed pages are not readable");
                if payload.len() < 4 || word(&payload) as usize > limit {
                    return Err(damaged);
                }
                let raw = lz4_flex::block::decompress_size_prepended(&payload).map_err(|_| damaged)?;
                Ok(Frame::Pages(read_pages(raw)?))
            }
            STATE => match payload.split_first() {
                Some((running @ 0..=1, state)) => {
                    Ok(Frame::State { running: *running == 1, state: state.to_vec() })
                }
                _ => Err(StreamError::Damaged("the state of its devices is not readable")),
            },
            END => match payload.len() {
                8 => Ok(Frame::End { frames: long(&payload) }),
                _ => Err(StreamError::Damaged("its end is not readable")),
            },
            ADVISE if payload.len() == 8 => Ok(Frame::Advise(long(&payload))),
            RESUMES if payload.len() == 8 => Ok(Frame::Resume(long(&payload))),
            DISCARD if payload.len().is_multiple_of(16) => {
                let run = |raw: &[u8]| (long(raw), long(&raw[8..]));
                Ok(Frame::Discard(payload.chunks_exact(16).map(run).collect()))
            }
            POSTCOPY_RUN if payload.is_empty() => Ok(Frame::Postcopy),
            GO if payload.is_empty() => Ok(Frame::Go),
            ADVISE | RESUMES | DISCARD | POSTCOPY_RUN | GO => {
                Err(StreamError::Damaged("a part of a post-copy is not readable"))
            }
            other => Err(StreamError::Unknown(other)),
        }
    }
}

impl Answer {
    /// Say it.
    pub fn write(&self, output: &mut impl Write) -> Result<(), StreamError> {
        let bytes = match self {
            Answer::Loaded => put(LOADED, &[]),
            Answer::Failed(reason) => put(FAILED, reason.as_bytes()),
            Answer::Go => put(GO, &[]),
            Answer::Wanted(pages) => put(WANTED, &to_bytes(pages)),
            Answer::Have(bits) => put(HAVE, bits),
            Answer::Complete => put(COMPLETE, &[]),
        };
        output.write_all(&bytes)?;
        Ok(output.flush()?)
    }

    /// Hear it.
    pub fn read(input: &mut impl Read) -> Result<Answer, StreamError> {
        let (kind, payload) = take(input)?;
        match kind {
            LOADED => Ok(Answer::Loaded),
            FAILED => Ok(Answer::Failed(String::from_utf8_lossy(&payload).into_owned())),
            GO => Ok(Answer::Go),
            WANTED if payload.len().is_multiple_of(8) => {
                Ok(Answer::Wanted(payload.chunks_exact(8).map(long).collect()))
            }
            HAVE => Ok(Answer::Have(payload)),
            COMPLETE => Ok(Answer::Complete),
            other => Err(StreamError::Unknown(other)),
        }
    }
}

/// Reads a stream from its head to its end: each frame is where it belongs.
pub struct Reader<R> {
    input: R,
    frames: u64,
    at: Place,
    /// The sender waits for answers.
    pub answers: bool,
    /// Pages may come behind the state.
    pub postcopy: bool,
    /// It goes on with a stream that broke.
    pub resumes: bool,
}

/// How far a stream is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Begin,
    Memory,
    State,
    /// Pages behind the state.
    Rest,
}

impl<R: Read> Reader<R> {
    /// Read the head.
    pub fn new(mut input: R) -> Result<Self, StreamError> {
        let flags = read_head(&mut input)?;
        Ok(Reader {
            input,
            frames: 0,
            at: Place::Begin,
            answers: flags & ANSWERS != 0,
            postcopy: flags & POSTCOPY != 0,
            resumes: flags & RESUME != 0,
        })
    }

    /// The next frame; behind [`Frame::End`] there is none.
    pub fn frame(&mut self) -> Result<Frame, StreamError> {
        let frame = Frame::read(&mut self.input)?;
        let next = match (&frame, self.at) {
            (Frame::Machine(_), Place::Begin) if !self.resumes => Some(Place::Memory),
            (Frame::Resume(_), Place::Begin) if self.resumes => Some(Place::Rest),
            (Frame::Pages(_), Place::Memory) => Some(Place::Memory),
            (Frame::Advise(_) | Frame::Discard(_), Place::Memory) if self.postcopy => Some(Place::Memory),
            (Frame::State { .. }, Place::Memory) => Some(Place::State),
            (Frame::Postcopy, Place::State) if self.postcopy => Some(Place::Rest),
            (Frame::Pages(_) | Frame::Go, Place::Rest) => Some(Place::Rest),
            (Frame::End { frames }, Place::State | Place::Rest) if *frames == self.frames => Some(self.at),
            _ => None,
        };
        // What is said of the machine's owner is no part of what is sent.
        self.frames += u64::from(frame != Frame::Go);
        self.at = next.ok_or(StreamError::Damaged("its parts are not in their order"))?;
        Ok(frame)
    }

    /// The input, for the answers.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> MachineInfo {
        MachineInfo { program: "ftvm".into(), identity: "memory: 1".into(), firmware: vec![1, 2] }
    }

    fn stream(pack: bool) -> Vec<u8> {
        let mut pages = Pages::default();
        pages.push(0, |_| true);
        pages.push(0x5000, |page| {
            page.fill(7);
            page[9] = 1;
            true
        });
        pages.push(1 << 32, |page| {
            page.fill(3);
            true
        });
        let frames = [
            Frame::Machine(info()),
            Frame::Pages(pages),
            Frame::State { running: true, state: vec![1, 2, 3] },
            Frame::End { frames: 3 },
        ];
        let mut out = head(0);
        for frame in &frames {
            let before = out.len();
            let written = frame.write(&mut out, pack).unwrap();
            assert_eq!(out[before..], frame.to_bytes(pack));
            assert_eq!(written, (out.len() - before) as u64);
        }
        out
    }

    fn read(raw: &[u8]) -> Result<Vec<Frame>, StreamError> {
        let mut reader = Reader::new(raw)?;
        let mut frames = Vec::new();
        loop {
            let frame = reader.frame()?;
            let end = matches!(frame, Frame::End { .. });
            frames.push(frame);
            if end {
                return Ok(frames);
            }
        }
    }

    #[test]
    fn a_stream_is_read_as_it_was_written() {
        let (plain, packed) = (stream(false), stream(true));
        assert!(packed.len() < plain.len() / 2);
        let frames = read(&plain).unwrap();
        assert_eq!(frames, read(&packed).unwrap());
        assert_eq!(frames[0], Frame::Machine(info()));
        let Frame::Pages(pages) = &frames[1] else { panic!() };
        assert_eq!(pages.iter().nth(1).unwrap().1.unwrap()[9], 1);
    }

    #[test]
    fn cut_off_anywhere_or_changed_anywhere_it_is_refused() {
        for whole in [stream(false), stream(true)] {
            for at in 0..whole.len() {
                assert!(read(&whole[..at]).is_err(), "cut off at {at}");
                let mut changed = whole.clone();
                changed[at] ^= 0x10;
                assert!(read(&changed).is_err(), "changed at {at}");
            }
        }
    }

    #[test]
    fn later_versions_and_unknown_parts_are_named() {
        let mut later = head(0);
        later[8] = 2;
        assert!(Reader::new(&later[..]).err().unwrap().to_string().contains("version 2"));
        let mut unknown = head(0);
        unknown.extend(put(15, b"x"));
        assert!(read(&unknown).unwrap_err().to_string().contains("kind 15"));
        let mut order = head(0);
        order.extend(Frame::State { running: false, state: vec![] }.to_bytes(false));
        assert!(read(&order).unwrap_err().to_string().contains("order"));
    }

    #[test]
    fn pages_come_behind_the_state_where_that_was_said() {
        let page = || {
            let mut pages = Pages::default();
            pages.push(0x7000, |_| true);
            Frame::Pages(pages)
        };
        let before = [
            Frame::Machine(info()),
            Frame::Advise(77),
            page(),
            Frame::Discard(vec![(0x1000, 3), (1 << 32, 1)]),
            Frame::State { running: true, state: vec![1] },
        ];
        let behind = [Frame::Postcopy, page(), Frame::Go, page(), Frame::End { frames: 8 }];
        let with = |flags, frames: &[&[Frame]]| {
            let mut out = head(flags);
            frames.iter().copied().flatten().for_each(|f| out.extend(f.to_bytes(false)));
            read(&out)
        };
        assert_eq!(
            with(POSTCOPY | ANSWERS, &[&before, &behind]).unwrap(),
            [before.to_vec(), behind.to_vec()].concat()
        );
        assert!(with(ANSWERS, &[&before, &behind]).is_err());
        let rest = [Frame::Resume(77), page(), Frame::End { frames: 2 }];
        assert_eq!(with(POSTCOPY | RESUME, &[&rest]).unwrap(), rest);
        assert!(with(POSTCOPY, &[&rest]).is_err());
        assert!(with(POSTCOPY | RESUME, &[&before]).is_err());
    }

    #[test]
    fn answers_are_heard() {
        for answer in [
            Answer::Loaded,
            Answer::Failed("no".into()),
            Answer::Go,
            Answer::Wanted(vec![0x1000, 1 << 33]),
            Answer::Have(vec![0xF0]),
            Answer::Complete,
        ] {
            let mut raw = Vec::new();
            answer.write(&mut raw).unwrap();
            assert_eq!(Answer::read(&mut &raw[..]).unwrap(), answer);
        }
    }
}
