//! Objects of `-object` and `object-add` that are the host's own, not the machine's.

use super::keyval::{KeyvalError, Params};
use crate::host::tls::{self, Credentials, X509Properties};

/// Kinds of objects that each host of a machine has for itself: they are not compared, and do not travel.
pub const HOST_OWN: &[&str] = &["secret", "tls-creds-x509", "authz-simple"];

/// Whether an object of this kind is the host's own.
pub fn is_host_own(kind: &str) -> bool {
    HOST_OWN.contains(&kind)
}

/// The keys of the kinds that [`make`] makes.
pub fn known(kind: &str) -> Option<&'static [&'static str]> {
    match kind {
        "tls-creds-x509" => Some(&["qom-type", "id", "dir", "endpoint", "verify-peer", "sanity-check"]),
        "authz-simple" => Some(&["qom-type", "id", "identity"]),
        _ => None,
    }
}

/// Why there is no object of a kind that QEMU has for the same purpose.
pub fn why_not(kind: &str) -> Option<String> {
    let why = match kind {
        "tls-creds-psk" => "the TLS library has no keys that are shared beforehand",
        "tls-creds-anon" => "it would protect against no active attacker",
        "authz-list" | "authz-list-file" | "authz-pam" => return Some(format!("{kind}: use authz-simple")),
        _ => return None,
    };
    Some(format!("{kind}: {why}; use tls-creds-x509"))
}

/// Make one of them, if it is such a kind.
pub fn make(kind: &str, id: &str, p: &Params) -> Result<(), KeyvalError> {
    match kind {
        "tls-creds-x509" => {
            p.bool("sanity-check")?;
            let properties = X509Properties {
                dir: p.get("dir"),
                endpoint: p.get("endpoint"),
                verify_peer: p.bool("verify-peer")?,
            };
            tls::keep(id, Credentials::read(&properties).map_err(KeyvalError::Other)?);
        }
        "authz-simple" => tls::keep_identity(id, p.need("identity")?),
        _ => {}
    }
    Ok(())
}
