//! Record and replay to a file (`-icount ...,rr=record|replay,rrfile=F`): the input door of one run,
//! from reset to the end.
//!
//! File: 8 bytes of magic, the header (length, CRC-32, postcard), then batches of log entries (length,
//! CRC-32, entries). The last entry is the end, with the state hash.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::lockstep::log::{Decoder, Encoder, Entry, LogError};
use crate::machine::{Stamp, StateHash};

const MAGIC: &[u8; 8] = b"ftvm-rr1";
const BATCH: usize = 64 << 10;
const MAX_BATCH: usize = 64 << 20;

/// What must be equal to replay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// ftvm's version.
    pub version: String,
    /// The machine's configuration as far as the guest can see it, for people and for comparing.
    pub machine: String,
    pub seed: [u8; 32],
    pub rtc_base: i64,
    pub drive_sizes: Vec<u64>,
    pub ns_per_instruction: f64,
}

/// Errors of record/replay files.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("could not use '{0}': {1}")]
    Io(String, #[source] std::io::Error),
    #[error("'{0}' is not a record/replay file of ftvm")]
    Magic(String),
    #[error("'{0}' is damaged")]
    Damaged(String),
    #[error("'{0}' was recorded on another machine: {1}")]
    Mismatch(String, String),
    #[error("the recording is not readable: {0}")]
    Log(#[from] LogError),
}

/// Where inputs are logged.
pub enum Sink {
    None,
    File(Box<Recorder>),
}

/// Writes a recording.
pub struct Recorder {
    file: BufWriter<File>,
    name: String,
    encoder: Encoder,
    batch: Vec<u8>,
    last_horizon: Stamp,
    bytes: u64,
}

fn put(file: &mut impl Write, data: &[u8]) -> std::io::Result<()> {
    file.write_all(&(data.len() as u32).to_le_bytes())?;
    file.write_all(&crc32fast::hash(data).to_le_bytes())?;
    file.write_all(data)
}

impl Recorder {
    /// Start a recording.
    pub fn create(path: &str, header: &Header) -> Result<Self, RecordError> {
        let io = |e| RecordError::Io(path.to_owned(), e);
        let mut file = BufWriter::new(File::create(path).map_err(io)?);
        file.write_all(MAGIC).map_err(io)?;
        let head = postcard::to_stdvec(header).map_err(|_| RecordError::Damaged(path.to_owned()))?;
        put(&mut file, &head).map_err(io)?;
        Ok(Recorder {
            file,
            name: path.to_owned(),
            encoder: Encoder::default(),
            batch: Vec::new(),
            last_horizon: Stamp::default(),
            bytes: 0,
        })
    }

    /// Record an entry.
    pub fn put(&mut self, entry: &Entry) -> Result<(), RecordError> {
        if let Entry::Horizon { stamp } = entry {
            if *stamp == self.last_horizon {
                return Ok(());
            }
            self.last_horizon = *stamp;
        }
        self.encoder.put(&mut self.batch, entry);
        if self.batch.len() >= BATCH {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), RecordError> {
        self.bytes += self.batch.len() as u64;
        put(&mut self.file, &self.batch).map_err(|e| RecordError::Io(self.name.clone(), e))?;
        self.batch.clear();
        Ok(())
    }

    /// End the recording with the machine's last state.
    pub fn finish(&mut self, stamp: Stamp, hash: &StateHash) -> Result<(), RecordError> {
        let payload = postcard::to_stdvec(hash).unwrap_or_default();
        self.put(&Entry::End { stamp, payload })?;
        self.flush()?;
        self.file.flush().map_err(|e| RecordError::Io(self.name.clone(), e))
    }

    /// Bytes of log so far.
    pub fn bytes(&self) -> u64 {
        self.bytes + self.batch.len() as u64
    }
}

/// Reads a recording.
pub struct Player {
    file: BufReader<File>,
    name: String,
    decoder: Decoder,
    pending: std::collections::VecDeque<Entry>,
    /// The batch that `pending` is from, as far as it is done.
    mark: Mark,
}

/// A place in a recording.
#[derive(Clone, Debug, Default)]
pub struct Mark {
    /// Where its batch starts in the file, and how entries are told from there.
    batch: u64,
    decoder: Decoder,
    /// Entries of the batch before it.
    done: usize,
}

fn take(file: &mut impl Read, name: &str) -> Result<Option<Vec<u8>>, RecordError> {
    let mut head = [0u8; 8];
    match file.read_exact(&mut head) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other.map_err(|e| RecordError::Io(name.to_owned(), e))?,
    }
    let [a, b, c, d, e, f, g, h] = head;
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len > MAX_BATCH {
        return Err(RecordError::Damaged(name.to_owned()));
    }
    let mut data = Vec::new();
    file.take(len as u64).read_to_end(&mut data).map_err(|e| RecordError::Io(name.to_owned(), e))?;
    if data.len() != len || crc32fast::hash(&data) != u32::from_le_bytes([e, f, g, h]) {
        return Err(RecordError::Damaged(name.to_owned()));
    }
    Ok(Some(data))
}

impl Player {
    /// Open a recording.
    pub fn open(path: &str) -> Result<(Self, Header), RecordError> {
        let io = |e| RecordError::Io(path.to_owned(), e);
        let mut file = BufReader::new(File::open(Path::new(path)).map_err(io)?);
        let mut magic = [0u8; 8];
        if file.read_exact(&mut magic).is_err() || &magic != MAGIC {
            return Err(RecordError::Magic(path.to_owned()));
        }
        let head = take(&mut file, path)?.ok_or_else(|| RecordError::Damaged(path.to_owned()))?;
        let header = postcard::from_bytes(&head).map_err(|_| RecordError::Damaged(path.to_owned()))?;
        let mark = Mark { batch: file.stream_position().map_err(io)?, ..Mark::default() };
        let player = Player {
            file,
            name: path.to_owned(),
            decoder: Decoder::default(),
            pending: Default::default(),
            mark,
        };
        Ok((player, header))
    }

    /// The next entry; `None` where the recording breaks off.
    pub fn peek(&mut self) -> Result<Option<&Entry>, RecordError> {
        while self.pending.is_empty() {
            let batch = self.file.stream_position().map_err(|e| RecordError::Io(self.name.clone(), e))?;
            self.mark = Mark { batch, decoder: self.decoder.clone(), done: 0 };
            let Some(batch) = take(&mut self.file, &self.name)? else { return Ok(None) };
            self.pending.extend(self.decoder.take_all(&batch)?);
        }
        Ok(self.pending.front())
    }

    /// The entry that [`Self::peek`] returned is done.
    pub fn done(&mut self) -> Option<Entry> {
        self.mark.done += usize::from(!self.pending.is_empty());
        self.pending.pop_front()
    }

    /// Where the recording is read.
    pub fn mark(&self) -> Mark {
        self.mark.clone()
    }

    /// Read on from another place of the same recording.
    pub fn rewind(&mut self, mark: &Mark) -> Result<(), RecordError> {
        let seek = self.file.seek(std::io::SeekFrom::Start(mark.batch));
        seek.map_err(|e| RecordError::Io(self.name.clone(), e))?;
        self.pending.clear();
        self.decoder = mark.decoder.clone();
        if mark.done > 0 {
            self.peek()?;
            for _ in 0..mark.done {
                self.done();
            }
        }
        self.mark = mark.clone();
        Ok(())
    }
}
