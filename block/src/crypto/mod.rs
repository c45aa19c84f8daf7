//! Encryption of images: the raw driver `luks`, and qcow2 with `encrypt.format=luks`.
//!
//! A passphrase unlocks the volume's random master key, which costs a second or two by design. What has been unlocked once is
//! remembered by this process, so that a takeover, which opens the image again, does not wait for it: the key is found by a
//! hash of the header and the passphrase. Keys, passphrases and what they are derived by are wiped when they are not needed
//! any more.

mod cipher;
mod hash;
pub(crate) mod luks;
pub mod secrets;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use zeroize::Zeroizing;

use crate::store::Store;
use crate::BlockError;
use cipher::{SectorCipher, SECTOR};
pub use luks::LuksOptions;

/// Master keys remembered at the most.
const KEPT: usize = 32;

type Known = ([u8; 32], Arc<Zeroizing<Vec<u8>>>);

static KNOWN: Mutex<Vec<Known>> = Mutex::new(Vec::new());

/// Fill with random bytes of the host: for keys, which no guest sees.
fn random(buf: &mut [u8]) -> Result<(), String> {
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| io::Read::read_exact(&mut f, buf))
        .map_err(|e| format!("/dev/urandom: {e}"))
}

/// How an image is encrypted, for `query-block` and `qemu-img info`'s like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksInfo {
    /// `aes-256`
    pub algorithm: String,
    /// `xts`
    pub mode: String,
    /// `plain64`
    pub generator: String,
    /// The generator's hash.
    pub generator_hash: Option<String>,
    /// `sha256`
    pub hash: String,
    /// Bytes before the data.
    pub payload: u64,
    /// Rounds of the hash for the check of the master key.
    pub iterations: u32,
    pub uuid: String,
    /// (active, rounds, offset in bytes) of each place of a passphrase.
    pub slots: Vec<(bool, u32, u64)>,
}

/// An unlocked volume: its header and the cipher of its data.
pub(crate) struct Volume {
    header: luks::Header,
    /// All that lies before the data.
    area: Vec<u8>,
    cipher: Arc<dyn SectorCipher>,
}

/// Make all of a new volume that lies before its data, for the secret with the id `secret`.
pub(crate) fn format(options: &LuksOptions, secret: &str) -> Result<Vec<u8>, BlockError> {
    let secret = secrets::find(secret).map_err(BlockError::Unsupported)?;
    luks::format(options, &secret).map_err(BlockError::Unsupported)
}

impl Volume {
    /// Unlock the volume whose header lies at `offset` of a store, in at most `limit` bytes. `prefix` comes before
    /// `key-secret` where that is missing.
    pub(crate) fn unlock(
        store: &dyn Store,
        offset: u64,
        limit: u64,
        secret: Option<&str>,
        prefix: &str,
    ) -> Result<Self, BlockError> {
        let bad = |reason: String| BlockError::Format { path: store.path().to_owned(), reason };
        let mut raw = vec![0; luks::HEADER];
        store.read_at(offset, &mut raw)?;
        let header = luks::Header::parse(&raw).map_err(bad)?;
        let secret =
            secret.ok_or_else(|| bad(format!("Parameter '{prefix}key-secret' is required for cipher")))?;
        let passphrase = secrets::find(secret).map_err(bad)?;
        if header.payload > limit {
            return Err(bad("LUKS header is cut off".into()));
        }
        let mut area = vec![0; header.payload as usize];
        store.read_at(offset, &mut area)?;
        // Nobody may have changed it in between.
        let header = luks::Header::parse(&area).map_err(bad)?;
        let name = *blake3::Hasher::new()
            .update(&(passphrase.len() as u64).to_le_bytes())
            .update(&passphrase)
            .update(&area)
            .finalize()
            .as_bytes();
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known().iter().find(|(n, _)| *n == name).map(|(_, key)| Arc::clone(key));
        let key = match found {
            Some(key) => key,
            None => {
                let key = Arc::new(header.unlock(&area, &passphrase).map_err(bad)?);
                let mut known = known();
                if known.len() >= KEPT {
                    known.remove(0);
                }
                known.push((name, Arc::clone(&key)));
                key
            }
        };
        let cipher = Arc::from(header.cipher(&key).map_err(bad)?);
        Ok(Volume { header, area, cipher })
    }

    /// Bytes before the data of a volume of its own.
    pub(crate) fn payload(&self) -> u64 {
        self.header.payload
    }

    /// All that lies before the data: with it another image is made that has the same key and passphrases.
    pub(crate) fn area(&self) -> &[u8] {
        &self.area
    }

    /// What it says of itself.
    pub(crate) fn info(&self) -> LuksInfo {
        let h = &self.header;
        let (generator, generator_hash) = h.spec.generator();
        LuksInfo {
            algorithm: h.spec.algorithm(),
            mode: h.spec.mode().into(),
            generator: generator.into(),
            generator_hash: generator_hash.map(|h| h.name().into()),
            hash: h.hash.name().into(),
            payload: h.payload,
            iterations: h.digest_iterations,
            uuid: h.uuid.clone(),
            slots: h.slots.iter().map(|s| (s.active, s.iterations, s.offset)).collect(),
        }
    }

    /// The volume's data in a store from `base` on; a sector's number counts from there.
    pub(crate) fn over(&self, store: Arc<dyn Store>, base: u64) -> Arc<dyn Store> {
        Arc::new(Encrypted { store, base, cipher: Arc::clone(&self.cipher), patching: Mutex::new(()) })
    }
}

/// A store whose bytes are encrypted in another one.
struct Encrypted {
    store: Arc<dyn Store>,
    base: u64,
    cipher: Arc<dyn SectorCipher>,
    /// Held while a part of a sector is changed.
    patching: Mutex<()>,
}

impl Encrypted {
    /// The sectors around a range.
    fn around(offset: u64, len: usize) -> (u64, u64) {
        let sector = SECTOR as u64;
        (offset / sector * sector, (offset + len as u64).next_multiple_of(sector))
    }

    fn read_sectors(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.store.read_at(self.base + offset, buf)?;
        self.cipher.decrypt(offset / SECTOR as u64, buf);
        Ok(())
    }

    fn write_sectors(&self, offset: u64, mut data: Vec<u8>) -> io::Result<()> {
        self.cipher.encrypt(offset / SECTOR as u64, &mut data);
        let done = self.store.write_at(self.base + offset, &data);
        crate::buffers::give(data);
        done
    }
}

impl Store for Encrypted {
    fn path(&self) -> &Path {
        self.store.path()
    }
    fn length(&self) -> u64 {
        self.store.length().saturating_sub(self.base)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (start, end) = Self::around(offset, buf.len());
        if (start, end) == (offset, offset + buf.len() as u64) {
            return self.read_sectors(offset, buf);
        }
        let mut whole = crate::buffers::take((end - start) as usize);
        self.read_sectors(start, &mut whole)?;
        let at = (offset - start) as usize;
        buf.copy_from_slice(&whole[at..at + buf.len()]);
        crate::buffers::give(whole);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (start, end) = Self::around(offset, data.len());
        let mut whole = crate::buffers::take((end - start) as usize);
        let mut _patching = None;
        if whole.len() != data.len() {
            _patching = self.patching.lock().ok();
            self.read_sectors(start, &mut whole)?;
        }
        let at = (offset - start) as usize;
        whole[at..at + data.len()].copy_from_slice(data);
        self.write_sectors(start, whole)
    }
    fn grow(&self, length: u64) -> io::Result<()> {
        self.store.grow(self.base + length)
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.store.set_length(self.base + length)
    }
    fn set_aside(&self, offset: u64, len: u64) -> io::Result<()> {
        self.store.set_aside(self.base + offset, len)
    }
    fn grows_with_zeroes(&self) -> bool {
        false
    }
    fn is_plain(&self) -> bool {
        false
    }
    fn zero_range(&self, _offset: u64, _len: u64, _unmap: bool) -> bool {
        false
    }
    fn punch(&self, _offset: u64, _len: u64) {}
    fn lock(&self, write: bool) -> Result<(), BlockError> {
        self.store.lock(write)
    }
    fn sync(&self) -> io::Result<()> {
        self.store.sync()
    }
}

/// Parse a header of any bytes, and try a passphrase if that is quick (for a fuzz target).
pub fn fuzz(data: &[u8]) {
    let Ok(header) = luks::Header::parse(data) else { return };
    let rounds = |s: &luks::Slot| s.iterations.saturating_add(header.digest_iterations);
    if header.slots.iter().filter(|s| s.active).all(|s| rounds(s) < 64) {
        let _ = header.unlock(data, b"secret");
    }
}
