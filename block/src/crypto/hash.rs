//! The hashes that LUKS headers name.

use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

fn digest<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
    let mut hash = D::new();
    parts.iter().for_each(|p| hash.update(p));
    hash.finalize().to_vec()
}

impl Hash {
    /// By its name in a header.
    pub(super) fn parse(name: &str) -> Result<Self, String> {
        Ok(match name {
            "sha1" => Hash::Sha1,
            "sha224" => Hash::Sha224,
            "sha256" => Hash::Sha256,
            "sha384" => Hash::Sha384,
            "sha512" => Hash::Sha512,
            "ripemd160" => Hash::Ripemd160,
            other => return Err(format!("Hash algorithm '{other}' is not supported")),
        })
    }

    /// Its name in a header.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha224 => "sha224",
            Hash::Sha256 => "sha256",
            Hash::Sha384 => "sha384",
            Hash::Sha512 => "sha512",
            Hash::Ripemd160 => "ripemd160",
        }
    }

    /// Of the parts, one after the other.
    pub(super) fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        match self {
            Hash::Sha1 => digest::<Sha1>(parts),
            Hash::Sha224 => digest::<Sha224>(parts),
            Hash::Sha256 => digest::<Sha256>(parts),
            Hash::Sha384 => digest::<Sha384>(parts),
            Hash::Sha512 => digest::<Sha512>(parts),
            Hash::Ripemd160 => digest::<Ripemd160>(parts),
        }
    }

    /// PBKDF2 (RFC 8018) with HMAC of this hash.
    pub(super) fn derive(self, password: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        use pbkdf2::pbkdf2_hmac;
        match self {
            Hash::Sha1 => pbkdf2_hmac::<Sha1>(password, salt, iterations, key),
            Hash::Sha224 => pbkdf2_hmac::<Sha224>(password, salt, iterations, key),
            Hash::Sha256 => pbkdf2_hmac::<Sha256>(password, salt, iterations, key),
            Hash::Sha384 => pbkdf2_hmac::<Sha384>(password, salt, iterations, key),
            Hash::Sha512 => pbkdf2_hmac::<Sha512>(password, salt, iterations, key),
            Hash::Ripemd160 => pbkdf2_hmac::<Ripemd160>(password, salt, iterations, key),
        }
    }
}
