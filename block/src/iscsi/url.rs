//! `iscsi://[USER[%PASSWORD]@]HOST[:PORT]/IQN/LUN`, as libiscsi and QEMU write it.

/// Where a LUN is, and who we are.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Target {
    pub host: String,
    pub port: u16,
    pub name: String,
    pub lun: u16,
    /// CHAP name and secret.
    pub user: Option<(String, String)>,
    pub initiator: String,
    /// Seconds after which a request that gets no answer fails.
    pub timeout: u64,
}

/// Below the 30 s after which Linux gives an IDE request up.
const TIMEOUT: u64 = 25;

/// Undo `%41` escapes.
pub fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let hex = [bytes.next()?, bytes.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

/// Escape what would end a part of a URL.
pub fn escape(text: &str) -> String {
    let mut out = String::new();
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~:,/".contains(&b) {
            out.push(b as char);
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

/// HOST[:PORT], with IPv6 addresses in brackets.
pub fn host_port(text: &str, default: u16) -> Option<(String, u16)> {
    let (host, port) = match text.rfind(':') {
        Some(at) if !text[at..].contains(']') => (&text[..at], text[at + 1..].parse().ok()?),
        _ => (text, default),
    };
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

impl Target {
    /// Take a URL apart.
    pub fn parse(url: &str) -> Result<Target, String> {
        let usage =
            "iSCSI URL must be of the form iscsi://[<user>[%<password>]@]<host>[:<port>]/<target-iqn>/<lun>";
        let rest = url.strip_prefix("iscsi://").ok_or(usage)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (place, path) = rest.split_once('/').ok_or(usage)?;
        let (user, place) = match place.rsplit_once('@') {
            None => (None, place),
            Some((user, place)) => {
                let (name, secret) = user.split_once('%').ok_or("iSCSI: a user needs a password")?;
                (Some((name.to_owned(), secret.to_owned())), place)
            }
        };
        let (host, port) = host_port(place, 3260).ok_or(usage)?;
        let (name, lun) = path.rsplit_once('/').ok_or(usage)?;
        let lun: u16 = lun
            .parse()
            .ok()
            .filter(|l| *l < 1 << 14)
            .ok_or_else(|| format!("iSCSI: '{lun}' is not a LUN"))?;
        if name.is_empty() {
            return Err(usage.into());
        }
        let mut target = Target {
            host,
            port,
            name: name.to_owned(),
            lun,
            user,
            initiator: default_initiator(),
            timeout: TIMEOUT,
        };
        for item in query.split('&').filter(|q| !q.is_empty()) {
            let (key, value) = item.split_once('=').unwrap_or((item, ""));
            let value = unescape(value).ok_or_else(|| format!("iSCSI: '{item}' is not readable"))?;
            match key {
                "initiator-name" if !value.is_empty() => target.initiator = value,
                "timeout" => {
                    target.timeout = value.parse().map_err(|_| "iSCSI: timeout is a number of seconds")?;
                }
                "user" => target.user = Some((value, target.user.map(|u| u.1).unwrap_or_default())),
                "password" => target.user = Some((target.user.map(|u| u.0).unwrap_or_default(), value)),
                _ => return Err(format!("Unknown iSCSI parameter name: {key}")),
            }
        }
        Ok(target)
    }
}

/// As QEMU, a name for this host; from its machine id, so that it stays the same.
fn default_initiator() -> String {
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let id = id.trim().get(..12).map_or_else(|| name.trim().to_owned(), str::to_owned);
    format!("iqn.2026-11.org.ftvm:{}", if id.is_empty() { "host".into() } else { id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_as_qemu_does() {
        let t = Target::parse("iscsi://10.0.0.1/iqn.2026-11.test:ft/1").ok().unwrap();
        assert_eq!(
            (t.host.as_str(), t.port, t.name.as_str(), t.lun),
            ("10.0.0.1", 3260, "iqn.2026-11.test:ft", 1)
        );
        let t = Target::parse("iscsi://me%se%cret@[::1]:3261/iqn.x:y/7?initiator-name=iqn.a%3Ab&timeout=9")
            .ok()
            .unwrap();
        assert_eq!((t.host.as_str(), t.port, t.lun, t.timeout), ("[::1]", 3261, 7, 9));
        assert_eq!((t.user, t.initiator), (Some(("me".into(), "se%cret".into())), "iqn.a:b".into()));
        for bad in [
            "iscsi://h",
            "iscsi://h/iqn",
            "iscsi://h/iqn/x",
            "iscsi:///iqn/1",
            "iscsi://h:x/iqn/1",
            "iscsi://h//1",
            "iscsi://u@h/i/1",
            "iscsi://h/i/1?x=1",
        ] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(unescape(&escape("a b%&=?/ü")).unwrap(), "a b%&=?/ü");
    }
}
