//! What `-object secret` and `object-add` hold.

use base64::prelude::{Engine, BASE64_STANDARD};
use ftvm_block::crypto::secrets;

/// The properties of a secret.
#[derive(Clone, Copy, Debug, Default)]
pub struct SecretProperties<'a> {
    pub data: Option<&'a str>,
    pub file: Option<&'a str>,
    /// `raw` (or nothing), `base64`
    pub format: Option<&'a str>,
    /// The secret with which this one is encrypted.
    pub keyid: Option<&'a str>,
    /// The initial vector of the encryption, in base64.
    pub iv: Option<&'a str>,
}

impl SecretProperties<'_> {
    /// What it holds: any bytes (libvirt gives each machine a key so). The errors are QEMU's.
    pub fn read(&self) -> Result<Vec<u8>, String> {
        let input = match (self.data, self.file) {
            (Some(data), None) => data.as_bytes().to_vec(),
            (None, Some(file)) => std::fs::read(file).map_err(|e| format!("Unable to read {file}: {e}"))?,
            (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".into()),
            (None, None) => return Err("Must provide 'file' or 'data'".into()),
        };
        let input = match self.format {
            None | Some("raw") => input,
            Some("base64") => decode(&input)?,
            Some(other) => return Err(format!("Parameter 'format' does not accept value '{other}'")),
        };
        match (self.keyid, self.iv) {
            (None, None) => Ok(input),
            (Some(keyid), Some(iv)) => {
                let key = secrets::find(keyid)?;
                secrets::decrypt(input, &key, &decode(iv.as_bytes())?)
            }
            (Some(_), None) => Err("IV is required to decrypt secret".into()),
            (None, Some(_)) => Err("'iv' is for a secret that is encrypted, by 'keyid'".into()),
        }
    }
}

/// Lines of base64.
fn decode(text: &[u8]) -> Result<Vec<u8>, String> {
    let text: Vec<u8> = text.iter().copied().filter(|c| !c.is_ascii_whitespace()).collect();
    BASE64_STANDARD.decode(text).map_err(|e| format!("Base64 data is not valid: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_base64_and_wrong_ones() {
        let read = |properties: SecretProperties| properties.read();
        let base = SecretProperties { data: Some("c2VjcmV0\n"), ..SecretProperties::default() };
        assert_eq!(read(base).unwrap(), b"c2VjcmV0\n");
        assert_eq!(read(SecretProperties { format: Some("base64"), ..base }).unwrap(), b"secret");
        for (wrong, part) in [
            (SecretProperties::default(), "Must provide"),
            (SecretProperties { file: Some("/x"), ..base }, "mutually exclusive"),
            (SecretProperties { data: Some("!"), format: Some("base64"), ..base }, "Base64"),
            (SecretProperties { keyid: Some("x"), ..base }, "IV is required"),
            (SecretProperties { keyid: Some("x"), iv: Some("AAAA"), ..base }, "No secret with id 'x'"),
        ] {
            let error = read(wrong).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
