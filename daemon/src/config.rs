//! `ftvmd.conf`: this host among its peers. The file may be absent: the service then knows this host alone.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::{Error, Result};

/// Where services speak to each other.
pub const PORT: u16 = 8099;

/// A key, what it is by default, and what it says: for ftvmd.conf(5).
pub struct Key {
    /// `""` is the head of the file.
    pub table: &'static str,
    pub key: &'static str,
    pub default: &'static str,
    pub text: &'static str,
    /// A value as one writes it.
    pub example: &'static str,
}

const fn key(
    table: &'static str,
    key: &'static str,
    default: &'static str,
    example: &'static str,
    text: &'static str,
) -> Key {
    Key { table, key, default, text, example }
}

/// All keys.
pub const KEYS: &[Key] = &[
    key("", "name", "the host's name", "\"hostA\"", "This host, as its certificate and its peers name it."),
    key(
        "",
        "address",
        "the address from which peers are reached",
        "\"192.0.2.11\"",
        "Where peers reach this host: its service and the logging channels of its machines.",
    ),
    key("", "port", "8099", "8099", "The TCP port on which services speak to each other."),
    key(
        "",
        "ports",
        "8100-8163",
        "\"8100-8163\"",
        "The ports (TCP and UDP) for logging channels. A machine whose -ft has no listen= gets a free one.",
    ),
    key(
        "tls",
        "ca",
        "/etc/ftvm/tls/ca.crt",
        "\"/etc/ftvm/tls/ca.crt\"",
        "The authority that all hosts trust.",
    ),
    key(
        "tls",
        "certificate",
        "/etc/ftvm/tls/host.crt",
        "\"/etc/ftvm/tls/host.crt\"",
        "This host's certificate; one of its names must be this host's name.",
    ),
    key(
        "tls",
        "key",
        "/etc/ftvm/tls/host.key",
        "\"/etc/ftvm/tls/host.key\"",
        "The certificate's private key.",
    ),
    key("peer", "name", "", "\"hostB\"", "Another host; there is one table [[peer]] for each."),
    key("peer", "address", "its name", "\"192.0.2.12\"", "Where its service is: HOST or HOST:PORT."),
    key(
        "heal",
        "enabled",
        "true",
        "true",
        "Whether a primary on this host that has no backup gets one on a peer.",
    ),
    key(
        "heal",
        "wait",
        "2",
        "2",
        "For how many seconds a machine must be without a backup before another host is asked.",
    ),
    key("heal", "except", "[]", "[\"web\"]", "Machines that are left alone."),
    key(
        "heal",
        "foreign",
        "false",
        "false",
        "Whether this holds for machines too that neither this service nor a peer's started. Whoever may write to \
         /run/ftvm/machines (root, and the group kvm) then has backups started as root on the peers.",
    ),
    key(
        "etcd",
        "endpoints",
        "",
        "[\"https://192.0.2.21:2379\"]",
        "Members of an etcd cluster in which hosts find each other, instead of or besides [[peer]] tables.",
    ),
    key("etcd", "prefix", "/ftvm/", "\"/ftvm/\"", "What the keys begin with."),
    key(
        "etcd",
        "lease",
        "5",
        "5",
        "Seconds after which a host that does not renew its lease is no longer listed.",
    ),
    key("etcd", "user", "", "\"ftvm\"", "The user, where etcd asks for one."),
    key("etcd", "password", "", "\"secret\"", "The user's password."),
    key("etcd", "ca", "", "\"/etc/ftvm/etcd/ca.crt\"", "The authority of https:// members."),
    key("etcd", "certificate", "", "\"/etc/ftvm/etcd/host.crt\"", "This host's certificate for etcd."),
    key("etcd", "key", "", "\"/etc/ftvm/etcd/host.key\"", "Its private key."),
];

/// The file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub name: String,
    pub address: Option<String>,
    pub port: u16,
    #[serde(deserialize_with = "range")]
    pub ports: (u16, u16),
    pub tls: Tls,
    pub peer: Vec<Peer>,
    pub heal: Heal,
    pub etcd: Option<Etcd>,
}

/// `[tls]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// `[[peer]]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    pub name: String,
    pub address: Option<String>,
}

/// `[heal]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Heal {
    pub enabled: bool,
    #[serde(deserialize_with = "seconds")]
    pub wait: Duration,
    pub except: Vec<String>,
    pub foreign: bool,
}

/// `[etcd]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Etcd {
    pub endpoints: Vec<String>,
    #[serde(default = "prefix")]
    pub prefix: String,
    #[serde(default = "lease", deserialize_with = "seconds")]
    pub lease: Duration,
    pub user: Option<String>,
    pub password: Option<String>,
    pub ca: Option<PathBuf>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

fn prefix() -> String {
    "/ftvm/".into()
}

fn lease() -> Duration {
    Duration::from_secs(5)
}

fn seconds<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Duration, D::Error> {
    let value = f64::deserialize(from)?;
    match Duration::try_from_secs_f64(value) {
        Ok(time) if value <= 86400.0 => Ok(time),
        _ => Err(serde::de::Error::custom("seconds from 0 to 86400 are expected")),
    }
}

fn range<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<(u16, u16), D::Error> {
    let text = String::deserialize(from)?;
    let (first, last) = text.split_once('-').unwrap_or((&text, &text));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if 0 < first && first <= last => Ok((first, last)),
        _ => Err(serde::de::Error::custom("a range of ports like \"8100-8163\" is expected")),
    }
}

impl Default for Tls {
    fn default() -> Self {
        let file = |name| Path::new("/etc/ftvm/tls").join(name);
        Tls { ca: file("ca.crt"), certificate: file("host.crt"), key: file("host.key") }
    }
}

impl Default for Heal {
    fn default() -> Self {
        Heal { enabled: true, wait: Duration::from_secs(2), except: Vec::new(), foreign: false }
    }
}

impl Default for Settings {
    fn default() -> Self {
        let name = nix::sys::utsname::uname().ok().and_then(|u| u.nodename().to_owned().into_string().ok());
        Settings {
            name: name.unwrap_or_else(|| "localhost".into()),
            address: None,
            port: PORT,
            ports: (8100, 8163),
            tls: Tls::default(),
            peer: Vec::new(),
            heal: Heal::default(),
            etcd: None,
        }
    }
}

impl Settings {
    /// Read the file. Absent, it is as if it were empty.
    pub fn read(path: &Path) -> Result<Settings> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).map_err(|e| Error::Invalid(format!("{}: {e}", path.display()))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Settings::default()),
            Err(e) => Err(Error::File(path.display().to_string(), e)),
        }
    }

    fn parse(text: &str) -> std::result::Result<Settings, String> {
        let settings: Settings = toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
        let fine = |name: &str| {
            !name.is_empty() && rustls::pki_types::ServerName::try_from(name).is_ok() && !name.contains('/')
        };
        for name in settings.peer.iter().map(|p| &p.name).chain([&settings.name]) {
            if !fine(name) {
                return Err(format!("'{name}' is no name of a host"));
            }
        }
        if let Some(twice) = settings
            .peer
            .iter()
            .enumerate()
            .find_map(|(i, p)| settings.peer[..i].iter().any(|q| q.name == p.name).then_some(&p.name))
        {
            return Err(format!("there are two peers '{twice}'"));
        }
        if let Some(etcd) = &settings.etcd {
            if etcd.endpoints.is_empty() {
                return Err("[etcd] needs endpoints".into());
            }
            if settings.address.is_none() {
                return Err("[etcd] needs this host's address, which others find there".into());
            }
            if etcd.user.is_some() != etcd.password.is_some() {
                return Err("[etcd] needs both user and password, or neither".into());
            }
            if etcd.certificate.is_some() != etcd.key.is_some() {
                return Err("[etcd] needs both certificate and key, or neither".into());
            }
            if etcd.lease < Duration::from_secs(2) {
                return Err("[etcd] lease must be at least 2 seconds".into());
            }
            if cfg!(not(feature = "etcd")) {
                return Err("[etcd]: this ftvmd was built without etcd".into());
            }
        }
        Ok(settings)
    }

    /// Whether there are other hosts.
    pub fn is_alone(&self) -> bool {
        self.peer.iter().all(|p| p.name == self.name) && self.etcd.is_none()
    }
}

/// The addresses of `HOST` or `HOST:PORT`.
pub fn resolve(text: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<std::net::IpAddr>() {
        return Ok(vec![(ip, port).into()]);
    }
    match text.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok()) {
        true => Ok(text.to_socket_addrs()?.collect()),
        false => Ok((text, port).to_socket_addrs()?.collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_page_is_read_and_no_other() {
        let mut text = String::new();
        let mut table = "";
        for key in KEYS {
            if key.table != table {
                table = key.table;
                text += &if table == "peer" { format!("[[{table}]]\n") } else { format!("[{table}]\n") };
            }
            text += &format!("{} = {}\n", key.key, key.example);
        }
        let settings = Settings::parse(&text).unwrap();
        assert_eq!((settings.name.as_str(), settings.ports), ("hostA", (8100, 8163)));
        assert_eq!(settings.heal.except, ["web"]);
        // A key that the page lacks would not be in this list of what serde names.
        let error = Settings::parse("[heal]\nnonsense = 1\n").unwrap_err();
        for key in KEYS.iter().filter(|k| k.table == "heal") {
            assert!(error.contains(&format!("`{}`", key.key)), "{error}");
        }
        let named = error.matches('`').count() / 2;
        assert_eq!(named, 1 + KEYS.iter().filter(|k| k.table == "heal").count(), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (text, part) in [
            ("ports = \"9-8\"", "range of ports"),
            ("name = \"a b\"", "no name of a host"),
            ("[[peer]]\naddress = \"x\"", "missing field `name`"),
            ("[[peer]]\nname = \"b\"\n[[peer]]\nname = \"b\"", "two peers 'b'"),
            ("[etcd]\nendpoints = []", "endpoints"),
            ("[etcd]\nendpoints = [\"http://a:2379\"]", "address"),
            ("[heal]\nwait = -1", "seconds"),
        ] {
            let error = Settings::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(Settings::parse("").unwrap().is_alone());
        assert!(!Settings::parse("[[peer]]\nname = \"other.example\"").unwrap().is_alone());
    }

    #[test]
    fn an_address_may_have_a_port() {
        let one = |text| resolve(text, 8099).unwrap()[0].to_string();
        assert_eq!(one("192.0.2.1"), "192.0.2.1:8099");
        assert_eq!(one("192.0.2.1:1"), "192.0.2.1:1");
        assert_eq!(one("::1"), "[::1]:8099");
        assert_eq!(one("[::1]:7"), "[::1]:7");
    }
}
