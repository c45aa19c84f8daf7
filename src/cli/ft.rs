//! `-ft primary|backup[,...]`.

use std::time::Duration;

use super::keyval::{KeyvalError, Params};

/// The default port of the logging channel (TCP) and the heartbeats (UDP).
pub const DEFAULT_PORT: u16 = 8100;

/// How the backup gets the data of disk reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// In the log (the default).
    Log,
    /// From the shared disk (section 4.2 of the paper).
    Disk,
}

/// `-ft`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FtConfig {
    /// The primary's `HOST:PORT` for a backup; `None` for a primary.
    pub peer: Option<String>,
    /// Where this side, when it is (or becomes) the primary, waits for a backup.
    pub listen: String,
    /// The lock's path; `None`: beside the first writable image.
    pub lock: Option<String>,
    /// Interval of heartbeats.
    pub heartbeat: Duration,
    /// Silence after which the peer is suspected.
    pub timeout: Duration,
    /// How far the backup's execution may fall behind before the primary is slowed.
    pub max_lag: Duration,
    /// A backup tries for so long to reach its primary.
    pub retry: Duration,
    pub reads: Reads,
    /// Each host has disks of its own (a backup hears of it from its primary).
    pub separate: bool,
}

impl FtConfig {
    /// The option's value with which this side joins the primary at `peer`: what belongs to this host or to the pair
    /// stays.
    pub fn of_backup(&self, peer: std::net::SocketAddr) -> String {
        let quoted = |s: &str| s.replace(',', ",,");
        let lock = self.lock.as_ref().map(|l| format!(",lock={}", quoted(l))).unwrap_or_default();
        let (listen, lag) = (quoted(&self.listen), self.max_lag.as_millis());
        // The new primary may take a moment until it listens.
        format!("backup,peer={peer},listen={listen}{lock},max-lag={lag},retry=60000")
    }

    /// Parse the option's value.
    pub fn parse(text: &str) -> Result<Self, KeyvalError> {
        let p = Params::parse(text, Some("role"))?;
        p.only(&[
            "role",
            "peer",
            "listen",
            "lock",
            "heartbeat",
            "timeout",
            "max-lag",
            "reads",
            "disks",
            "retry",
        ])?;
        let ms = |key: &str, default: u64, min: u64| -> Result<Duration, KeyvalError> {
            let n = p.number(key)?.unwrap_or(default);
            if n < min || n > 3_600_000 {
                return Err(KeyvalError::Expects(key.into(), format!("milliseconds from {min} to 3600000")));
            }
            Ok(Duration::from_millis(n))
        };
        let peer = match p.need("role")? {
            "primary" => {
                if let Some(key) = ["peer", "retry"].into_iter().find(|key| p.get(key).is_some()) {
                    return Err(KeyvalError::Other(format!(
                        "'{key}' belongs to -ft backup: a primary waits for its backup"
                    )));
                }
                None
            }
            "backup" => {
                let peer = p.need("peer")?;
                Some(
                    with_port(peer)
                        .ok_or_else(|| KeyvalError::Expects("peer".into(), "HOST[:PORT]".into()))?,
                )
            }
            other => {
                return Err(KeyvalError::Other(format!(
                    "Parameter 'role' does not accept value '{other}': primary or backup"
                )))
            }
        };
        let listen = match p.get("listen") {
            None => format!("0.0.0.0:{DEFAULT_PORT}"),
            Some(l) => {
                with_port(l).ok_or_else(|| KeyvalError::Expects("listen".into(), "ADDR:PORT".into()))?
            }
        };
        let heartbeat = ms("heartbeat", 100, 1)?;
        let timeout = ms("timeout", 1000, 10)?;
        if timeout < heartbeat * 2 {
            return Err(KeyvalError::Other("timeout must be at least twice heartbeat".into()));
        }
        let separate = p.choice("disks", &["shared", "separate"])? == Some("separate");
        if separate && p.get("lock").is_none() {
            return Err(KeyvalError::Other(
                "disks=separate needs lock=PATH on storage that both hosts see, or that a third host has"
                    .into(),
            ));
        }
        let reads = match p.choice("reads", &["log", "disk"])? {
            Some("disk") if separate => {
                return Err(KeyvalError::Other(
                    "reads=disk is for an image that both hosts see, not for disks=separate".into(),
                ))
            }
            Some("disk") => Reads::Disk,
            _ => Reads::Log,
        };
        Ok(FtConfig {
            peer,
            listen,
            lock: p.get("lock").map(str::to_owned),
            heartbeat,
            timeout,
            max_lag: ms("max-lag", 1000, 10)?,
            retry: ms("retry", 0, 0)?,
            reads,
            separate,
        })
    }
}

/// `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT` with the default port filled in.
fn with_port(text: &str) -> Option<String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((h, p)) if !h.contains(':') || h.ends_with(']') => (h, Some(p)),
        _ => (text, None),
    };
    if host.is_empty() && port.is_none() {
        return None;
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some(p) => p.parse().ok()?,
    };
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    Some(format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_roles() {
        let p = FtConfig::parse("primary").unwrap();
        assert_eq!((p.peer, p.listen.as_str()), (None, "0.0.0.0:8100"));
        let b = FtConfig::parse("backup,peer=hostA,timeout=500").unwrap();
        assert_eq!(b.peer.as_deref(), Some("hostA:8100"));
        assert_eq!(b.timeout, Duration::from_millis(500));
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, part) in [
            ("backup", "'peer' is missing"),
            ("primary,peer=x", "peer"),
            ("primary,bogus=1", "Invalid parameter 'bogus'"),
            ("both", "both"),
            ("primary,timeout=soon", "timeout"),
            ("primary,heartbeat=900", "twice"),
            ("primary,retry=5", "'retry' belongs to -ft backup"),
            ("backup,peer=h:port", "peer"),
            ("primary,disks=separate,lock=/x,reads=disk", "that both hosts see"),
        ] {
            let e = FtConfig::parse(text).unwrap_err().to_string();
            assert!(e.contains(part), "{text}: {e}");
        }
    }
}
