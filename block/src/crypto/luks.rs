//! LUKS version 1, as QEMU and cryptsetup write it ("LUKS On-Disk Format Specification" 1.2.3).

use zeroize::Zeroizing;

use super::cipher::{CipherSpec, SectorCipher, SECTOR};
use super::hash::Hash;
use super::random;

/// The first six bytes of a volume.
pub(crate) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// Bytes of the header itself.
pub(crate) const HEADER: usize = 592;
const SLOTS: usize = 8;
const SLOT_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const ENABLED: u32 = 0x00AC_71F3;
const DISABLED: u32 = 0x0000_DEAD;
const STRIPES: usize = 4000;
const DIGEST: usize = 20;
const SALT: usize = 32;
/// Where QEMU puts the first key, and to what it rounds the places of the others.
const KEYS_AT: usize = 4096;
/// The longest key: two of 256 bits.
const MAX_KEY: usize = 64;
/// Bytes before the data at the most. cryptsetup's default is 2 or 16 MiB.
const MAX_PAYLOAD: u64 = 64 << 20;
/// A header may ask for as many rounds of its hash as it likes; more than this, over all its keys, would look like a
/// program that hangs.
const MAX_ROUNDS: u64 = 200_000_000;
const LEAST_ROUNDS: u32 = 1000;

/// One of the places of a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) active: bool,
    pub(crate) iterations: u32,
    salt: [u8; SALT],
    /// Where the encrypted key lies, in bytes.
    pub(crate) offset: u64,
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) spec: CipherSpec,
    pub(crate) hash: Hash,
    /// Where the data begins, in bytes.
    pub(crate) payload: u64,
    digest: [u8; DIGEST],
    digest_salt: [u8; SALT],
    pub(crate) digest_iterations: u32,
    pub(crate) uuid: String,
    pub(crate) slots: Vec<Slot>,
}

/// How a volume is encrypted; the names are those of `qemu-img create -o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksOptions {
    /// `cipher-alg`: aes-256 and its like.
    pub algorithm: String,
    /// `cipher-mode`: xts or cbc.
    pub mode: String,
    /// `ivgen-alg`: plain64, plain or essiv.
    pub generator: String,
    /// `ivgen-hash-alg`.
    pub generator_hash: Option<String>,
    /// `hash-alg`.
    pub hash: String,
    /// `iter-time`: milliseconds that a passphrase's check takes on this host.
    pub milliseconds: u64,
}

impl Default for LuksOptions {
    /// QEMU's.
    fn default() -> Self {
        LuksOptions {
            algorithm: "aes-256".into(),
            mode: "xts".into(),
            generator: "plain64".into(),
            generator_hash: None,
            hash: "sha256".into(),
            milliseconds: 2000,
        }
    }
}

fn be16(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).map_or(0, |s| u16::from_be_bytes([s[0], s[1]]))
}

fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).map_or(0, |s| u32::from_be_bytes([s[0], s[1], s[2], s[3]]))
}

fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(from) = b.get(at..at + N) {
        out.copy_from_slice(from);
    }
    out
}

fn name(b: &[u8], at: usize, len: usize) -> Result<String, String> {
    let field = &b[at..at + len];
    let end = field.iter().position(|c| *c == 0).ok_or("LUKS header string is not NUL terminated")?;
    String::from_utf8(field[..end].to_vec()).map_err(|_| "LUKS header string is not text".to_owned())
}

fn key_area(key_bytes: usize) -> usize {
    (key_bytes * STRIPES).next_multiple_of(KEYS_AT)
}

impl Header {
    /// From a volume's first [`HEADER`] bytes; an error says what is wrong.
    pub(crate) fn parse(raw: &[u8]) -> Result<Self, String> {
        if raw.len() < HEADER || &raw[..6] != MAGIC {
            return Err("Volume is not in LUKS format".into());
        }
        match be16(raw, 6) {
            1 => {}
            version => return Err(format!("LUKS version {version} is not supported")),
        }
        let (cipher, mode, hash) = (name(raw, 8, 32)?, name(raw, 40, 32)?, name(raw, 72, 32)?);
        let key_bytes = be32(raw, 108) as usize;
        if key_bytes == 0 || key_bytes > MAX_KEY {
            return Err(format!("LUKS master key of {key_bytes} bytes is not supported"));
        }
        let spec = CipherSpec::parse(&cipher, &mode, key_bytes)?;
        let payload = u64::from(be32(raw, 104)) * SECTOR as u64;
        if !(HEADER as u64..=MAX_PAYLOAD).contains(&payload) {
            return Err(format!("LUKS payload at {payload} is misplaced"));
        }
        let mut slots = Vec::with_capacity(SLOTS);
        for n in 0..SLOTS {
            let at = SLOT_AT + n * SLOT_BYTES;
            let active = match be32(raw, at) {
                ENABLED => true,
                DISABLED => false,
                _ => return Err(format!("Keyslot {n} state (active/disable) is corrupted")),
            };
            let slot = Slot {
                active,
                iterations: be32(raw, at + 4),
                salt: array(raw, at + 8),
                offset: u64::from(be32(raw, at + 40)) * SECTOR as u64,
            };
            let stripes = be32(raw, at + 44) as usize;
            if active && stripes != STRIPES {
                return Err(format!("Keyslot {n} is corrupted (stripes {stripes} != {STRIPES})"));
            }
            if active && slot.iterations == 0 {
                return Err(format!("Keyslot {n} iteration count is zero"));
            }
            let end = slot.offset + (key_bytes * STRIPES) as u64;
            if active && (slot.offset < HEADER as u64 || end > payload) {
                return Err(format!("Keyslot {n} is overlapping with the header or the encrypted payload"));
            }
            slots.push(slot);
        }
        let mut areas: Vec<u64> = slots.iter().filter(|s| s.active).map(|s| s.offset).collect();
        areas.sort_unstable();
        if areas.windows(2).any(|w| w[0] + (key_bytes * STRIPES) as u64 > w[1]) {
            return Err("Keyslots overlap".into());
        }
        let header = Header {
            spec,
            hash: Hash::parse(&hash)?,
            payload,
            digest: array(raw, 112),
            digest_salt: array(raw, 132),
            digest_iterations: be32(raw, 164),
            uuid: name(raw, 168, 40)?,
            slots,
        };
        if header.digest_iterations == 0 {
            return Err("Master key iteration count is zero".into());
        }
        let rounds = header.slots.iter().filter(|s| s.active);
        let rounds: u64 = rounds.map(|s| u64::from(s.iterations) + u64::from(header.digest_iterations)).sum();
        if rounds > MAX_ROUNDS {
            return Err(format!("LUKS header asks for {rounds} rounds of its hash, more than {MAX_ROUNDS}"));
        }
        Ok(header)
    }

    fn key_bytes(&self) -> usize {
        self.spec.key_bytes()
    }

    fn is_master(&self, key: &[u8]) -> bool {
        let mut digest = [0; DIGEST];
        self.hash.derive(key, &self.digest_salt, self.digest_iterations, &mut digest);
        digest == self.digest
    }

    /// Find the master key by a passphrase; `area` is all of the volume before its data.
    pub(crate) fn unlock(&self, area: &[u8], passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
        let len = self.key_bytes();
        for slot in self.slots.iter().filter(|s| s.active) {
            let at = slot.offset as usize;
            let material = area.get(at..at + len * STRIPES).ok_or("LUKS header is cut off")?;
            let mut derived = Zeroizing::new(vec![0; len]);
            self.hash.derive(passphrase, &slot.salt, slot.iterations, &mut derived);
            let mut split = Zeroizing::new(material.to_vec());
            self.spec.cipher(&derived)?.decrypt(0, &mut split);
            let master = merge(&split, len, self.hash);
            if self.is_master(&master) {
                return Ok(master);
            }
        }
        Err("Invalid password, cannot unlock any keyslot".into())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut raw = vec![0; HEADER];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(6, &1u16.to_be_bytes());
        let algorithm = self.spec.algorithm();
        put(8, algorithm.split('-').next().unwrap_or_default().as_bytes());
        let (generator, hash) = self.spec.generator();
        let hash = hash.map(|h| format!(":{}", h.name())).unwrap_or_default();
        put(40, format!("{}-{generator}{hash}", self.spec.mode()).as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &((self.payload / SECTOR as u64) as u32).to_be_bytes());
        put(108, &(self.key_bytes() as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, self.uuid.as_bytes());
        for (n, slot) in self.slots.iter().enumerate() {
            let at = SLOT_AT + n * SLOT_BYTES;
            put(at, &if slot.active { ENABLED } else { DISABLED }.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &((slot.offset / SECTOR as u64) as u32).to_be_bytes());
            put(at + 44, &(STRIPES as u32).to_be_bytes());
        }
        raw
    }
}

/// Rounds of the hash that take this many milliseconds here, for a key of `len` bytes.
fn rounds(hash: Hash, len: usize, milliseconds: u64) -> u32 {
    let mut key = Zeroizing::new(vec![0; len]);
    let mut count: u32 = 1 << 12;
    loop {
        let start = std::time::Instant::now();
        hash.derive(b"password", b"salt", count, &mut key);
        let took = start.elapsed().as_micros().max(1) as u64;
        if took >= 50_000 || count >= 1 << 26 {
            let all = u128::from(count) * u128::from(milliseconds) * 1000 / u128::from(took);
            return u32::try_from(all).unwrap_or(u32::MAX);
        }
        count *= 2;
    }
}

/// All of a new volume before its data, for one passphrase. It holds a new random key.
pub(crate) fn format(options: &LuksOptions, passphrase: &[u8]) -> Result<Vec<u8>, String> {
    let unknown = || format!("Parameter 'cipher-alg' does not accept value '{}'", options.algorithm);
    let (algorithm, bits) = options.algorithm.split_once('-').ok_or_else(unknown)?;
    let bytes = bits.parse::<usize>().map_err(|_| unknown())? / 8;
    let len = if options.mode == "xts" { bytes * 2 } else { bytes };
    let generator = match (&*options.generator, &options.generator_hash) {
        ("essiv", hash) => format!("essiv:{}", hash.as_deref().unwrap_or("sha256")),
        (other, _) => other.to_owned(),
    };
    let spec = CipherSpec::parse(algorithm, &format!("{}-{generator}", options.mode), len)?;
    let hash = Hash::parse(&options.hash)?;
    let mut master = Zeroizing::new(vec![0; len]);
    random(&mut master)?;
    let all = rounds(hash, len, options.milliseconds);
    let mut header = Header {
        spec,
        hash,
        payload: (KEYS_AT + SLOTS * key_area(len)) as u64,
        digest: [0; DIGEST],
        digest_salt: [0; SALT],
        // The check of a key costs an eighth of finding it, as with QEMU.
        digest_iterations: (all / 8).max(LEAST_ROUNDS),
        uuid: uuid()?,
        slots: Vec::new(),
    };
    for n in 0..SLOTS {
        let offset = (KEYS_AT + n * key_area(len)) as u64;
        header.slots.push(Slot { active: false, iterations: 0, salt: [0; SALT], offset });
    }
    random(&mut header.digest_salt)?;
    let mut digest = [0; DIGEST];
    hash.derive(&master, &header.digest_salt, header.digest_iterations, &mut digest);
    header.digest = digest;
    let slot = &mut header.slots[0];
    (slot.active, slot.iterations) = (true, all.clamp(LEAST_ROUNDS, (MAX_ROUNDS / 2) as u32));
    random(&mut slot.salt)?;
    let mut derived = Zeroizing::new(vec![0; len]);
    hash.derive(passphrase, &slot.salt, slot.iterations, &mut derived);
    let mut material = split(&master, hash)?;
    header.spec.cipher(&derived)?.encrypt(0, &mut material);
    let mut area = header.bytes();
    area.resize(header.payload as usize, 0);
    area[KEYS_AT..KEYS_AT + material.len()].copy_from_slice(&material);
    Ok(area)
}

fn uuid() -> Result<String, String> {
    let mut raw = [0u8; 16];
    random(&mut raw)?;
    raw[6] = raw[6] & 0x0F | 0x40;
    raw[8] = raw[8] & 0x3F | 0x80;
    let hex: String = raw.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// Spread each bit over the whole block, by a hash of its parts.
fn diffuse(block: &mut [u8], hash: Hash) {
    let size = hash.digest(&[]).len();
    for (n, part) in (0u32..).zip(block.chunks_mut(size)) {
        let digest = Zeroizing::new(hash.digest(&[&n.to_be_bytes(), part]));
        let len = part.len();
        part.copy_from_slice(&digest[..len]);
    }
}

fn xor(a: &mut [u8], b: &[u8]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a ^= b);
}

/// Split a key into parts all of which are needed to have it back (the anti-forensic splitter).
fn split(key: &[u8], hash: Hash) -> Result<Zeroizing<Vec<u8>>, String> {
    let len = key.len();
    let mut parts = Zeroizing::new(vec![0; len * STRIPES]);
    random(&mut parts[..len * (STRIPES - 1)])?;
    let mut block = Zeroizing::new(vec![0; len]);
    for part in parts[..len * (STRIPES - 1)].chunks(len) {
        xor(&mut block, part);
        diffuse(&mut block, hash);
    }
    xor(&mut block, key);
    parts[len * (STRIPES - 1)..].copy_from_slice(&block);
    Ok(parts)
}

/// The key of which these are the parts.
fn merge(parts: &[u8], len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; len]);
    let mut parts = parts.chunks(len).take(STRIPES).peekable();
    while let Some(part) = parts.next() {
        xor(&mut block, part);
        if parts.peek().is_some() {
            diffuse(&mut block, hash);
        }
    }
    block
}

impl Header {
    /// The cipher of the data, with the master key.
    pub(crate) fn cipher(&self, key: &[u8]) -> Result<Box<dyn SectorCipher>, String> {
        self.spec.cipher(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quick() -> LuksOptions {
        LuksOptions { milliseconds: 10, ..LuksOptions::default() }
    }

    #[test]
    fn a_new_volume_is_unlocked_by_its_passphrase_only() {
        for options in [
            quick(),
            LuksOptions { algorithm: "aes-128".into(), hash: "sha512".into(), ..quick() },
            LuksOptions {
                mode: "cbc".into(),
                generator: "essiv".into(),
                generator_hash: Some("sha256".into()),
                hash: "sha1".into(),
                ..quick()
            },
            LuksOptions { algorithm: "serpent-192".into(), mode: "cbc".into(), ..quick() },
        ] {
            let area = format(&options, b"secret").unwrap();
            let header = Header::parse(&area).unwrap();
            assert_eq!(header.bytes()[..], area[..HEADER], "{options:?}");
            assert_eq!(header.spec.algorithm(), options.algorithm);
            let key = header.unlock(&area, b"secret").unwrap();
            assert_eq!(key.len(), header.key_bytes());
            let wrong = header.unlock(&area, b"Secret").unwrap_err();
            assert_eq!(wrong, "Invalid password, cannot unlock any keyslot");
        }
    }

    #[test]
    fn a_header_that_asks_too_much_is_refused() {
        let area = format(&quick(), b"x").unwrap();
        let change = |at: usize, bytes: &[u8]| {
            let mut raw = area[..HEADER].to_vec();
            raw[at..at + bytes.len()].copy_from_slice(bytes);
            Header::parse(&raw).unwrap_err()
        };
        for (at, bytes, part) in [
            (0, &b"Luks"[..], "not in LUKS format"),
            (6, &[0, 2], "version 2"),
            (8, &[b'x'; 32], "NUL"),
            (104, &[0xFF; 4], "payload"),
            (104, &[0, 0, 0, 16], "overlapping"),
            (108, &[0, 0, 0, 0], "0 bytes"),
            (108, &[0xFF; 4], "bytes is not supported"),
            (164, &[0; 4], "zero"),
            (164, &[0xFF; 4], "rounds"),
            (SLOT_AT, &[1, 2, 3, 4], "corrupted"),
            (SLOT_AT + 4, &[0xFF; 4], "rounds"),
            (SLOT_AT + 40, &[0; 4], "overlapping"),
            (SLOT_AT + 40, &[0xFF; 4], "overlapping"),
            (SLOT_AT + 44, &[0; 4], "stripes"),
        ] {
            let error = change(at, bytes);
            assert!(error.contains(part), "{at}: {error}");
        }
    }
}
