//! `-netdev`, `-nic` and `-net`.

use serde::{Deserialize, Serialize};

use super::keyval::{KeyvalError, Params};

/// A port forwarded from the host to the guest (`hostfwd=`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFwd {
    pub udp: bool,
    /// Address and port on the host; an empty address listens on all.
    pub host: (String, u16),
    /// Address (empty: the guest's default) and port in the guest.
    pub guest: (String, u16),
}

/// The kinds of network back ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetKind {
    User { hostfwd: Vec<HostFwd>, net: Option<String>, restrict: bool, hostname: Option<String> },
    Tap { ifname: Option<String>, fd: Option<i32>, script: Option<String>, downscript: Option<String> },
}

/// A network back end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetdevConfig {
    pub id: String,
    pub kind: NetKind,
}

/// A network card made by `-nic`, `-net nic` or by default; `-device` cards are devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicConfig {
    pub model: String,
    pub mac: Option<[u8; 6]>,
    pub netdev: String,
}

const BACKEND_KEYS: &[&str] = &[
    "type",
    "id",
    "hostfwd",
    "net",
    "restrict",
    "hostname",
    "ifname",
    "fd",
    "script",
    "downscript",
    "vhost",
    "ipv4",
    "ipv6",
];

/// Whether a device driver is a network card.
pub fn is_nic(driver: &str) -> bool {
    driver.starts_with("e1000") || driver.starts_with("virtio-net-pci")
}

/// Parse a MAC address.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let parts: Vec<u8> = text.split(':').map(|p| u8::from_str_radix(p, 16).ok()).collect::<Option<_>>()?;
    parts.try_into().ok()
}

fn hostfwd(text: &str) -> Result<HostFwd, KeyvalError> {
    let bad = || KeyvalError::Other(format!("Invalid host forwarding rule '{text}'"));
    let (host, guest) = text.split_once('-').ok_or_else(bad)?;
    let (proto, host) = host.split_once(':').ok_or_else(bad)?;
    let udp = match proto {
        "" | "tcp" => false,
        "udp" => true,
        _ => return Err(bad()),
    };
    let split = |s: &str| -> Option<(String, u16)> {
        let (addr, port) = s.rsplit_once(':')?;
        Some((addr.to_owned(), port.parse().ok()?))
    };
    Ok(HostFwd { udp, host: split(host).ok_or_else(bad)?, guest: split(guest).ok_or_else(bad)? })
}

fn kind(p: &Params) -> Result<NetKind, KeyvalError> {
    if p.bool("vhost")? == Some(true) {
        return Err(KeyvalError::Other(
            "vhost=on is not available: devices run in ftvm's own process".into(),
        ));
    }
    match p.need("type")? {
        "user" => {
            for key in ["ifname", "fd", "script", "downscript"] {
                if p.get(key).is_some() {
                    return Err(KeyvalError::Unknown(key.into()));
                }
            }
            Ok(NetKind::User {
                hostfwd: p.all("hostfwd").into_iter().map(hostfwd).collect::<Result<_, _>>()?,
                net: p.get("net").map(str::to_owned),
                restrict: p.bool("restrict")?.unwrap_or(false),
                hostname: p.get("hostname").map(str::to_owned),
            })
        }
        "tap" => {
            for key in ["hostfwd", "net", "restrict", "hostname"] {
                if p.get(key).is_some() {
                    return Err(KeyvalError::Unknown(key.into()));
                }
            }
            let script = |key: &str| p.get(key).filter(|s| *s != "no").map(str::to_owned);
            Ok(NetKind::Tap {
                ifname: p.get("ifname").map(str::to_owned),
                fd: p.number("fd")?.map(|n| n as i32),
                script: script("script"),
                downscript: script("downscript"),
            })
        }
        other => Err(KeyvalError::Other(format!("Parameter 'type' does not accept value '{other}'"))),
    }
}

/// `-netdev`.
pub fn netdev(p: &Params) -> Result<NetdevConfig, KeyvalError> {
    p.only(BACKEND_KEYS)?;
    Ok(NetdevConfig { id: p.need("id")?.to_owned(), kind: kind(p)? })
}

fn model(p: &Params) -> Result<(String, Option<[u8; 6]>), KeyvalError> {
    let model = match p.get("model") {
        None | Some("e1000") => "e1000",
        Some("virtio" | "virtio-net-pci") => "virtio-net-pci",
        Some(other) => return Err(KeyvalError::Other(format!("Unsupported NIC model: {other}"))),
    };
    let mac = match p.get("mac").or(p.get("macaddr")) {
        None => None,
        Some(m) => Some(
            parse_mac(m).ok_or_else(|| KeyvalError::Other("invalid syntax for ethernet address".into()))?,
        ),
    };
    Ok((model.to_owned(), mac))
}

/// `-nic`: card and back end in one.
pub fn nic(p: &Params, number: usize) -> Result<(NicConfig, NetdevConfig), KeyvalError> {
    let keys: Vec<&str> = BACKEND_KEYS.iter().copied().chain(["model", "mac", "macaddr"]).collect();
    p.only(&keys)?;
    let (model, mac) = model(p)?;
    let id = p.get("id").map_or_else(|| format!("__nic{number}"), str::to_owned);
    Ok((NicConfig { model, mac, netdev: id.clone() }, NetdevConfig { id, kind: kind(p)? }))
}

/// `-net nic` and `-net user|tap`: the next card and the next back end belong together.
pub fn legacy_net(
    p: &Params,
    nics: &mut Vec<NicConfig>,
    devs: &mut Vec<NetdevConfig>,
) -> Result<(), KeyvalError> {
    if p.get("type") == Some("nic") {
        p.only(&["type", "model", "macaddr", "id", "name"])?;
        let (model, mac) = model(p)?;
        let netdev = format!("__net{}", nics.len());
        nics.push(NicConfig { model, mac, netdev });
    } else {
        p.only(BACKEND_KEYS)?;
        let number = devs.iter().filter(|d| d.id.starts_with("__net")).count();
        devs.push(NetdevConfig { id: format!("__net{number}"), kind: kind(p)? });
    }
    Ok(())
}

/// What QEMU gives when nothing is said: an e1000 on user networking.
pub fn default_nic() -> (NicConfig, NetdevConfig) {
    let kind = NetKind::User { hostfwd: Vec::new(), net: None, restrict: false, hostname: None };
    (
        NicConfig { model: "e1000".into(), mac: None, netdev: "__default".into() },
        NetdevConfig { id: "__default".into(), kind },
    )
}
