//! `-vnc` and `-display vnc=`.

use super::keys::keys;
use super::keyval::{KeyvalError, Params};

/// Where a VNC server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VncAddress {
    /// The first free port of this range.
    Tcp {
        host: String,
        first: u16,
        last: u16,
    },
    Unix(String),
}

impl std::fmt::Display for VncAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            VncAddress::Tcp { host, first, last } if first == last => write!(f, "{host}:{first}"),
            VncAddress::Tcp { host, first, last } => write!(f, "{host}:{first} to {last}"),
            VncAddress::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// A VNC server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VncConfig {
    pub address: VncAddress,
    /// A password is asked for.
    pub password: bool,
    /// The password of `password-secret=`.
    pub secret: Option<String>,
}

/// The TCP port of display 0.
const FIRST_PORT: u64 = 5900;

impl VncConfig {
    /// Read `[HOST]:DISPLAY[,key=value...]`, `unix:PATH[,...]` or `none`.
    pub fn parse(text: &str, secrets: &[(String, Vec<u8>)]) -> Result<Option<VncConfig>, KeyvalError> {
        let p = Params::parse(text, Some("vnc"))?;
        p.only(&keys("vnc"))?;
        let place = p.need("vnc")?;
        if place == "none" {
            return Ok(None);
        }
        let address = match place.strip_prefix("unix:") {
            Some(path) => VncAddress::Unix(path.to_owned()),
            None => {
                let other = |t: &str| KeyvalError::Other(t.to_owned());
                let (host, display) = place.rsplit_once(':').ok_or_else(|| other("no vnc port specified"))?;
                let port = |n: u64| u16::try_from(n + FIRST_PORT).ok();
                let display: u64 =
                    display.parse().ok().filter(|n| *n < 0xFFFF).ok_or_else(|| other("Bad port number"))?;
                let first = port(display).ok_or_else(|| other("vnc port out of range"))?;
                let last = match p.number("to")? {
                    Some(to) => port(to.min(0xFFFF)).filter(|to| *to >= first),
                    None => Some(first),
                };
                let last = last.ok_or_else(|| other("vnc port out of range"))?;
                VncAddress::Tcp { host: host.to_owned(), first, last }
            }
        };
        let password = p.bool("password")?.unwrap_or(false);
        let secret = match p.get("password-secret") {
            None => None,
            Some(_) if password => {
                let text = "'password' flag is redundant with 'password-secret'";
                return Err(KeyvalError::Other(text.into()));
            }
            Some(id) => {
                let found = secrets.iter().find(|(name, _)| name == id);
                let found = found.ok_or_else(|| KeyvalError::Other(format!("No secret with id '{id}'")))?;
                let text = String::from_utf8(found.1.clone());
                Some(
                    text.map_err(|_| {
                        KeyvalError::Other(format!("Data from secret {id} is not valid UTF-8"))
                    })?,
                )
            }
        };
        p.choice("share", &["ignore", "force-shared"])?;
        Ok(Some(VncConfig { address, password: password || secret.is_some(), secret }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_are_ports_and_wrong_ones_are_refused() {
        let parse = |t: &str| VncConfig::parse(t, &[("s".into(), b"word".to_vec())]);
        let tcp = |host: &str, first, last| VncAddress::Tcp { host: host.into(), first, last };
        let plain = parse("127.0.0.1:1,audiodev=audio1").unwrap().unwrap();
        assert_eq!((plain.address, plain.password), (tcp("127.0.0.1", 5901, 5901), false));
        let secret = parse(":0,to=9,password-secret=s").unwrap().unwrap();
        assert_eq!((secret.address, secret.secret.as_deref()), (tcp("", 5900, 5909), Some("word")));
        assert_eq!(parse("unix:/run/x").unwrap().unwrap().address, VncAddress::Unix("/run/x".into()));
        assert_eq!(parse("none").unwrap(), None);
        for wrong in ["x", ":", ":70000", ":5,to=1", ":1,tls-creds=t", ":1,password-secret=t", ":1,share=x"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
