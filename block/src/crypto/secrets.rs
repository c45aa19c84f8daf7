//! Passphrases that options name by an id (`-object secret`): kept here, wiped when they go, never written anywhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use zeroize::Zeroizing;

use super::cipher::CipherSpec;

/// What a secret holds: any bytes.
pub type Secret = Arc<Zeroizing<Vec<u8>>>;

static SECRETS: Mutex<BTreeMap<String, Secret>> = Mutex::new(BTreeMap::new());

/// Have images find a secret under an id from now on.
pub fn keep(id: &str, bytes: Vec<u8>) {
    let secret = Arc::new(Zeroizing::new(bytes));
    SECRETS.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), secret);
}

/// Forget one; images that are open stay open.
pub fn forget(id: &str) {
    SECRETS.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
}

/// The secret with this id; the error is QEMU's.
pub fn find(id: &str) -> Result<Secret, String> {
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    secrets.get(id).cloned().ok_or_else(|| format!("No secret with id '{id}'"))
}

/// A secret that is itself encrypted (`keyid`, `iv`): AES-256 in CBC mode with padding, under a secret of 32 bytes.
pub fn decrypt(mut data: Vec<u8>, key: &[u8], iv: &[u8]) -> Result<Vec<u8>, String> {
    if key.len() != 32 {
        return Err(format!("Key should be 32 bytes in length, got {}", key.len()));
    }
    if iv.len() != 16 {
        return Err(format!("IV should be 16 bytes in length not {}", iv.len()));
    }
    if data.is_empty() || !data.len().is_multiple_of(16) {
        return Err("Incorrect number of padding bytes".into());
    }
    CipherSpec::decrypt_chain(key, iv, &mut data)?;
    let padding = usize::from(data.last().copied().unwrap_or(0));
    if padding == 0 || padding > 16 {
        return Err(format!("Incorrect number of padding bytes ({padding}) found on decrypted data"));
    }
    data.truncate(data.len() - padding);
    Ok(data)
}
