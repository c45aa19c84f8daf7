//! Ciphers of sectors: a block cipher, a mode, and how a sector's number becomes its initial vector.

use aes::cipher::consts::U16;
use aes::cipher::{
    Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser,
    InnerIvInit, KeyInit,
};
use aes::{Aes128, Aes192, Aes256};
use serpent::Serpent;
use twofish::Twofish;

use super::hash::Hash;

/// Bytes that are encrypted under one initial vector.
pub(super) const SECTOR: usize = 512;

type Block = Array<u8, U16>;

/// Encrypts and decrypts sectors in place. The last one may be a part, of whole blocks of 16 bytes.
pub(crate) trait SectorCipher: Send + Sync {
    /// The sectors from number `first` on.
    fn encrypt(&self, first: u64, data: &mut [u8]);
    /// The other way.
    fn decrypt(&self, first: u64, data: &mut [u8]);
}

/// A block cipher of 16 bytes for both directions.
trait Cipher:
    BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Clone + Send + Sync
{
}

impl<T: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Clone + Send + Sync> Cipher
    for T
{
}

/// XTS (IEEE 1619). The crate for it (xts-mode) encrypts one block after the other; here all blocks of a sector go to the
/// cipher at once, which has several under way in the processor's AES unit.
struct Xts<C> {
    data: C,
    tweak: C,
}

/// Blocks of a sector.
const BLOCKS: usize = SECTOR / 16;

/// Times x in GF(2^128), as XTS orders the bits.
fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

impl<C: Cipher> Xts<C> {
    fn each(&self, first: u64, data: &mut [u8], work: impl Fn(&C, &mut [Block])) {
        for (sector, chunk) in (first..).zip(data.chunks_mut(SECTOR)) {
            let mut start = Block::from(u128::from(sector).to_le_bytes());
            self.tweak.encrypt_block(&mut start);
            let mut tweaks = [0u128; BLOCKS];
            let mut tweak = u128::from_le_bytes(start.0);
            for t in &mut tweaks {
                *t = tweak;
                tweak = double(tweak);
            }
            let (blocks, _) = Block::slice_as_chunks_mut(chunk);
            let mask = |blocks: &mut [Block]| {
                for (block, tweak) in blocks.iter_mut().zip(&tweaks) {
                    block.0 = (u128::from_le_bytes(block.0) ^ tweak).to_le_bytes();
                }
            };
            mask(blocks);
            work(&self.data, blocks);
            mask(blocks);
        }
    }
}

impl<C: Cipher> SectorCipher for Xts<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.each(first, data, |cipher, blocks| cipher.encrypt_blocks(blocks));
    }
    fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.each(first, data, |cipher, blocks| cipher.decrypt_blocks(blocks));
    }
}

/// Encrypts a block in place.
type Encrypt = Box<dyn Fn(&mut Block) + Send + Sync>;

/// How a sector's number becomes an initial vector.
enum Iv {
    /// Its lower 32 bits.
    Plain,
    Plain64,
    /// Encrypted with the key's hash.
    Essiv(Encrypt),
}

impl Iv {
    fn of(&self, sector: u64) -> Block {
        let number = match self {
            Iv::Plain => sector & 0xFFFF_FFFF,
            _ => sector,
        };
        let mut block = Block::from(u128::from(number).to_le_bytes());
        if let Iv::Essiv(encrypt) = self {
            encrypt(&mut block);
        }
        block
    }
}

struct Cbc<C> {
    cipher: C,
    iv: Iv,
}

impl<C: Cipher> SectorCipher for Cbc<C> {
    fn encrypt(&self, first: u64, data: &mut [u8]) {
        for (sector, chunk) in (first..).zip(data.chunks_mut(SECTOR)) {
            let iv = self.iv.of(sector);
            let (blocks, _) = Block::slice_as_chunks_mut(chunk);
            cbc::Encryptor::inner_iv_init(self.cipher.clone(), &iv).encrypt_blocks(blocks);
        }
    }
    fn decrypt(&self, first: u64, data: &mut [u8]) {
        for (sector, chunk) in (first..).zip(data.chunks_mut(SECTOR)) {
            let iv = self.iv.of(sector);
            let (blocks, _) = Block::slice_as_chunks_mut(chunk);
            cbc::Decryptor::inner_iv_init(self.cipher.clone(), &iv).decrypt_blocks(blocks);
        }
    }
}

/// A block cipher and its key's length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Aes(usize),
    Serpent(usize),
    Twofish(usize),
}

/// Which cipher: what LUKS calls `cipher-name` and `cipher-mode`, with the length of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CipherSpec {
    algorithm: Algorithm,
    /// `xts` or `cbc`.
    is_xts: bool,
    /// `plain`, `plain64`, `essiv`.
    generator: String,
    generator_hash: Option<Hash>,
}

impl CipherSpec {
    /// From the names in a header; an error names what is not known, in QEMU's words.
    pub(super) fn parse(name: &str, mode: &str, key_bytes: usize) -> Result<Self, String> {
        let (mode, generator) =
            mode.split_once('-').ok_or_else(|| format!("Unexpected cipher mode string format '{mode}'"))?;
        let is_xts = match mode {
            "xts" => true,
            "cbc" => false,
            other => return Err(format!("Block cipher mode '{other}' is not supported")),
        };
        let (generator, hash) = match generator.split_once(':') {
            Some((generator, hash)) => (generator, Some(Hash::parse(hash)?)),
            None => (generator, None),
        };
        if !["plain", "plain64", "essiv"].contains(&generator) {
            return Err(format!("IV generator '{generator}' is not supported"));
        }
        if generator == "essiv" && hash.is_none() {
            return Err("Missing IV generator hash specification".into());
        }
        let wrong = || format!("Algorithm '{name}' with key size {key_bytes} bytes not supported");
        if is_xts && !key_bytes.is_multiple_of(2) {
            return Err("XTS cipher key length should be a multiple of 2".into());
        }
        let bytes = if is_xts { key_bytes / 2 } else { key_bytes };
        let algorithm = match (name, bytes) {
            ("aes", 16 | 24 | 32) => Algorithm::Aes(bytes),
            ("serpent", 16 | 24 | 32) => Algorithm::Serpent(bytes),
            ("twofish", 16 | 24 | 32) => Algorithm::Twofish(bytes),
            _ => return Err(wrong()),
        };
        Ok(CipherSpec {
            algorithm,
            is_xts,
            generator: generator.into(),
            generator_hash: hash.filter(|_| generator == "essiv"),
        })
    }

    /// QEMU's name of the algorithm (`aes-256`).
    pub(super) fn algorithm(&self) -> String {
        match self.algorithm {
            Algorithm::Aes(n) => format!("aes-{}", n * 8),
            Algorithm::Serpent(n) => format!("serpent-{}", n * 8),
            Algorithm::Twofish(n) => format!("twofish-{}", n * 8),
        }
    }

    /// `xts` or `cbc`.
    pub(super) fn mode(&self) -> &'static str {
        if self.is_xts {
            "xts"
        } else {
            "cbc"
        }
    }

    /// How initial vectors are made, and by which hash.
    pub(super) fn generator(&self) -> (&str, Option<Hash>) {
        (&self.generator, self.generator_hash)
    }

    /// Length of the key in bytes.
    pub(super) fn key_bytes(&self) -> usize {
        let (Algorithm::Aes(n) | Algorithm::Serpent(n) | Algorithm::Twofish(n)) = self.algorithm;
        if self.is_xts {
            2 * n
        } else {
            n
        }
    }

    /// The cipher with a key of [`Self::key_bytes`] bytes.
    pub(super) fn cipher(&self, key: &[u8]) -> Result<Box<dyn SectorCipher>, String> {
        match self.algorithm {
            Algorithm::Aes(16) => self.with::<Aes128>(key),
            Algorithm::Aes(24) => self.with::<Aes192>(key),
            Algorithm::Aes(_) => self.with::<Aes256>(key),
            Algorithm::Serpent(_) => self.with::<Serpent>(key),
            Algorithm::Twofish(_) => self.with::<Twofish>(key),
        }
    }

    /// Decrypt one chain of blocks (AES-256, CBC).
    pub(super) fn decrypt_chain(key: &[u8], iv: &[u8], data: &mut [u8]) -> Result<(), String> {
        let cipher = Aes256::new_from_slice(key).map_err(|_| "the key has a wrong length".to_owned())?;
        let mut start = Block::default();
        start.copy_from_slice(iv);
        let (blocks, _) = Block::slice_as_chunks_mut(data);
        cbc::Decryptor::inner_iv_init(cipher, &start).decrypt_blocks(blocks);
        Ok(())
    }

    fn with<C: Cipher + KeyInit + 'static>(&self, key: &[u8]) -> Result<Box<dyn SectorCipher>, String> {
        let new = |key: &[u8]| C::new_from_slice(key).map_err(|_| "the key has a wrong length".to_owned());
        if self.is_xts {
            let (data, tweak) = key.split_at(key.len() / 2);
            return Ok(Box::new(Xts { data: new(data)?, tweak: new(tweak)? }));
        }
        let iv = match (self.generator.as_str(), self.generator_hash) {
            ("plain", _) => Iv::Plain,
            ("essiv", Some(hash)) => Iv::Essiv(self.essiv(&hash.digest(&[key]))?),
            _ => Iv::Plain64,
        };
        Ok(Box::new(Cbc { cipher: new(key)?, iv }))
    }

    /// The cipher of initial vectors, whose key is as long as the hash.
    fn essiv(&self, key: &[u8]) -> Result<Encrypt, String> {
        fn with<C: Cipher + KeyInit + 'static>(key: &[u8]) -> Result<Encrypt, String> {
            let cipher = C::new_from_slice(key)
                .map_err(|_| format!("No essiv cipher with key size {} bytes available", key.len()))?;
            Ok(Box::new(move |block| cipher.encrypt_block(block)))
        }
        match (self.algorithm, key.len()) {
            (Algorithm::Aes(_), 16) => with::<Aes128>(key),
            (Algorithm::Aes(_), 24) => with::<Aes192>(key),
            (Algorithm::Aes(_), _) => with::<Aes256>(key),
            (Algorithm::Serpent(_), _) => with::<Serpent>(key),
            (Algorithm::Twofish(_), _) => with::<Twofish>(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
    }

    /// IEEE 1619-2007, annex B, vectors 2 and 4.
    #[test]
    fn xts_vectors() {
        let spec = CipherSpec::parse("aes", "xts-plain64", 32).unwrap();
        let key = [[0x11; 16], [0x22; 16]].concat();
        let mut data = [0x44; 32];
        spec.cipher(&key).unwrap().encrypt(0x33_3333_3333, &mut data);
        assert_eq!(data.to_vec(), hex("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"));
        let key = hex("2718281828459045235360287471352631415926535897932384626433832795");
        let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let cipher = spec.cipher(&key).unwrap();
        cipher.encrypt(0, &mut data);
        assert_eq!(data[..16], hex("27a7479befa1d476489f308cd4cfa6e2"));
        assert_eq!(data[480..], hex("eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568")[..]);
        cipher.decrypt(0, &mut data);
        assert!(data.iter().enumerate().all(|(i, b)| *b == i as u8));
    }

    #[test]
    fn every_cipher_decrypts_what_it_has_encrypted_and_sectors_differ() {
        for (name, sizes) in [("aes", [16, 24, 32]), ("serpent", [16, 24, 32]), ("twofish", [16, 24, 32])] {
            for (mode, factor) in
                [("xts-plain64", 2), ("xts-plain", 2), ("cbc-plain64", 1), ("cbc-essiv:sha256", 1)]
            {
                for size in sizes {
                    let spec = CipherSpec::parse(name, mode, size * factor).unwrap();
                    let key: Vec<u8> = (0..size * factor).map(|i| i as u8).collect();
                    let cipher = spec.cipher(&key).unwrap();
                    let mut data = vec![7; 1536];
                    cipher.encrypt(5, &mut data);
                    assert_ne!(data[..512], data[512..1024], "{name} {mode}");
                    cipher.decrypt(6, &mut data[512..]);
                    cipher.decrypt(5, &mut data[..512]);
                    assert_eq!(data, vec![7; 1536], "{name} {mode} {size}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (name, mode, key, part) in [
            ("cast5", "cbc-plain64", 16, "Algorithm 'cast5' with key size 16"),
            ("aes", "xts-plain64", 48 - 1, "multiple of 2"),
            ("aes", "ctr-plain64", 32, "mode 'ctr'"),
            ("aes", "xts-benbi", 32, "generator 'benbi'"),
            ("aes", "cbc-essiv", 32, "Missing IV generator hash"),
            ("aes", "cbc-essiv:md5", 32, "'md5'"),
            ("aes", "xts", 32, "format 'xts'"),
        ] {
            let error = CipherSpec::parse(name, mode, key).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
