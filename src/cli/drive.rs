//! `-drive`, `-blockdev` and their short forms.

use serde::{Deserialize, Serialize};

use ftvm_block::iscsi::escape;
use ftvm_block::throttle::{Limit, Limits};

use super::keyval::{KeyvalError, Params};

/// The interface a `-drive` is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Interface {
    Ide,
    Virtio,
    /// `if=none` and `-blockdev`: a `-device` names it.
    None,
}

/// How host caching is used (`cache=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cache {
    Writeback,
    Writethrough,
    None,
    DirectSync,
    Unsafe,
}

/// What happens when a request fails (`werror=`, `rerror=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnError {
    /// The guest sees the error.
    Report,
    /// The guest sees success.
    Ignore,
    /// The machine stops; `cont` tries the request again.
    Stop,
    /// `Stop` when there is no space left, else `Report`.
    Enospc,
}

impl OnError {
    fn parse(text: &str, read: bool) -> Result<Self, KeyvalError> {
        Ok(match text {
            "report" => OnError::Report,
            "ignore" => OnError::Ignore,
            "stop" => OnError::Stop,
            "enospc" if !read => OnError::Enospc,
            other => {
                let kind = if read { "read" } else { "write" };
                return Err(KeyvalError::Other(format!("'{other}' invalid {kind} error action")));
            }
        })
    }
}

/// What happens when a drive's requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorPolicy {
    pub write: OnError,
    pub read: OnError,
}

impl Default for ErrorPolicy {
    fn default() -> Self {
        ErrorPolicy { write: OnError::Enospc, read: OnError::Report }
    }
}

impl ErrorPolicy {
    /// Set what is given (`werror`, `rerror`).
    pub fn set(&mut self, werror: Option<&str>, rerror: Option<&str>) -> Result<(), KeyvalError> {
        if let Some(text) = werror.filter(|t| *t != "auto") {
            self.write = OnError::parse(text, false)?;
        }
        if let Some(text) = rerror.filter(|t| *t != "auto") {
            self.read = OnError::parse(text, true)?;
        }
        Ok(())
    }
}

/// What a node's image stands on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// What the image's header names.
    #[default]
    Header,
    /// Nothing, whatever the header names (`backing: null`).
    Nothing,
    /// The node of this name.
    Node(String),
}

/// One drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveConfig {
    pub id: String,
    /// The image: a path, `nfs://` or `iscsi://`; `None` for a CD-ROM drive without a disc.
    pub file: Option<String>,
    /// `raw`, `qcow2` or `None` to look at the file.
    pub format: Option<String>,
    pub interface: Interface,
    /// IDE: 0 primary master, 1 primary slave, 2 secondary master, 3 secondary slave.
    pub index: u32,
    pub cdrom: bool,
    pub read_only: bool,
    pub snapshot: bool,
    pub cache: Cache,
    pub discard: bool,
    pub detect_zeroes: bool,
    pub serial: Option<String>,
    /// Byte locks as QEMU's (`file.locking=off` turns them off).
    pub locking: bool,
    pub on_error: ErrorPolicy,
    pub limits: Limits,
    /// The name of the protocol node below (`-blockdev`).
    pub protocol: Option<String>,
    /// It is a block node (`-blockdev`), not a `-drive`.
    pub node: bool,
    pub backing: Backing,
    /// The id of the secret that unlocks the image.
    pub key_secret: Option<String>,
    /// The id of the one that unlocks those below.
    pub backing_key_secret: Option<String>,
}

impl DriveConfig {
    /// Whether `cache=` makes every write durable.
    pub fn is_durable(&self) -> bool {
        matches!(self.cache, Cache::Writethrough | Cache::DirectSync)
    }
}

fn next_index(interface: Interface, drives: &[DriveConfig]) -> u32 {
    (0..).find(|i| !drives.iter().any(|d| d.interface == interface && d.index == *i)).unwrap_or(0)
}

fn cache(text: &str) -> Result<Cache, KeyvalError> {
    Ok(match text {
        "writeback" => Cache::Writeback,
        "writethrough" => Cache::Writethrough,
        "none" | "off" => Cache::None,
        "directsync" => Cache::DirectSync,
        "unsafe" => Cache::Unsafe,
        _ => return Err(KeyvalError::Other("invalid cache option".into())),
    })
}

fn format(text: Option<&str>) -> Result<Option<String>, KeyvalError> {
    match text {
        None => Ok(None),
        Some(f @ ("raw" | "qcow2" | "luks")) => Ok(Some(f.to_owned())),
        Some(other) => Err(KeyvalError::Other(format!("Unknown driver '{other}'"))),
    }
}

/// A `-drive`; `before` are the drives given so far.
pub fn from_drive(p: &Params, before: &[DriveConfig]) -> Result<DriveConfig, KeyvalError> {
    p.only(&[
        "file",
        "if",
        "index",
        "media",
        "format",
        "id",
        "cache",
        "aio",
        "snapshot",
        "readonly",
        "read-only",
        "discard",
        "detect-zeroes",
        "serial",
        "werror",
        "rerror",
        "unit",
        "bus",
        "file.filename",
        "file.locking",
        "driver",
        "cache.direct",
        "cache.no-flush",
        "cache.writeback",
        "throttling.",
        "file.",
        "bps",
        "bps_rd",
        "bps_wr",
        "iops",
        "iops_rd",
        "iops_wr",
        "bps_max",
        "bps_rd_max",
        "bps_wr_max",
        "iops_max",
        "iops_rd_max",
        "iops_wr_max",
        "iops_size",
        "copy-on-read",
        "key-secret",
        "encrypt.format",
        "encrypt.key-secret",
        "backing.key-secret",
        "backing.encrypt.format",
        "backing.encrypt.key-secret",
    ])?;
    if p.bool("copy-on-read")? == Some(true) {
        return Err(KeyvalError::Other("copy-on-read=on is not supported".into()));
    }
    let cache = match p.get("cache") {
        Some(text) => cache(text)?,
        None => cache_flags(p)?,
    };
    check_aio(p, "aio", cache)?;
    let mut on_error = ErrorPolicy::default();
    on_error.set(p.get("werror"), p.get("rerror"))?;
    let interface = match p.get("if") {
        None | Some("ide") => Interface::Ide,
        Some("virtio") => Interface::Virtio,
        Some("none") => Interface::None,
        Some(other) => return Err(KeyvalError::Other(format!("unsupported bus type '{other}'"))),
    };
    let cdrom = p.choice("media", &["disk", "cdrom"])? == Some("cdrom");
    let place = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let index = match (p.number("index")?, p.number("unit")?) {
        (Some(i), _) => place(i),
        (None, Some(unit)) => place(p.number("bus")?.unwrap_or(0).saturating_mul(2).saturating_add(unit)),
        (None, None)
            if cdrom
                && interface == Interface::Ide
                && !before.iter().any(|d| d.interface == interface && d.index == 2) =>
        {
            2
        }
        (None, None) => next_index(interface, before),
    };
    if interface == Interface::Ide && index > 5 {
        let text = format!("index {index} is too big: IDE has 4 places, the AHCI of a q35 6");
        return Err(KeyvalError::Other(text));
    }
    if before.iter().any(|d| d.interface == interface && interface != Interface::None && d.index == index) {
        return Err(KeyvalError::Other(format!("drive with bus=0, unit={index} (index={index}) exists")));
    }
    let file = match p.get("file") {
        Some(file) => Some(file.to_owned()),
        None => nested_file(p)?,
    };
    let file = file.filter(|f| !f.is_empty());
    if file.is_none() && !cdrom {
        return Err(KeyvalError::Other("A block device must be specified for \"file\"".into()));
    }
    let id = match p.get("id") {
        Some(id) => id.to_owned(),
        None => match interface {
            Interface::Ide if cdrom => format!("ide{}-cd{}", index / 2, index % 2),
            Interface::Ide => format!("ide{}-hd{}", index / 2, index % 2),
            Interface::Virtio => format!("virtio{index}"),
            Interface::None => format!("none{index}"),
        },
    };
    if before.iter().any(|d| d.id == id) {
        return Err(KeyvalError::Other(format!("Duplicate ID '{id}' for drive")));
    }
    let format = format(p.get("format").or(p.get("driver")))?;
    Ok(DriveConfig {
        id,
        file,
        key_secret: key_secret(p, "", format.as_deref())?,
        backing_key_secret: key_secret(p, "backing.", None)?,
        format,
        interface,
        index,
        cdrom,
        read_only: p.bool("readonly")?.or(p.bool("read-only")?).unwrap_or(cdrom),
        snapshot: p.bool("snapshot")?.unwrap_or(false),
        cache,
        discard: discard(p)?,
        detect_zeroes: detect_zeroes(p)?,
        serial: p.get("serial").map(str::to_owned),
        locking: p.choice("file.locking", &["on", "off", "auto"])? != Some("off"),
        on_error,
        limits: limits(p)?,
        protocol: None,
        node: false,
        backing: Backing::Header,
    })
}

/// The secret of an image of this format (`None`: it is not known yet).
fn key_secret(p: &Params, prefix: &str, format: Option<&str>) -> Result<Option<String>, KeyvalError> {
    let get = |key: &str| p.get(&format!("{prefix}{key}"));
    let refuse = |key: &str, of: &str| match format {
        Some(format) if format != of && get(key).is_some() => Err(KeyvalError::Other(format!(
            "Block format '{format}' does not support the option '{prefix}{key}'"
        ))),
        _ => Ok(()),
    };
    refuse("key-secret", "luks")?;
    refuse("encrypt.format", "qcow2")?;
    refuse("encrypt.key-secret", "qcow2")?;
    match get("encrypt.format") {
        None | Some("luks") => {}
        Some("aes") => {
            return Err(KeyvalError::Other(
                "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators".into(),
            ))
        }
        Some(other) => {
            return Err(KeyvalError::Other(format!(
                "Parameter 'encrypt.format' does not accept value '{other}'"
            )))
        }
    }
    Ok(get("key-secret").or(get("encrypt.key-secret")).map(str::to_owned))
}

fn cache_flags(p: &Params) -> Result<Cache, KeyvalError> {
    let (direct, through) =
        (p.bool("cache.direct")? == Some(true), p.bool("cache.writeback")? == Some(false));
    Ok(match (p.bool("cache.no-flush")? == Some(true), direct, through) {
        (true, _, _) => Cache::Unsafe,
        (_, true, true) => Cache::DirectSync,
        (_, true, false) => Cache::None,
        (_, false, true) => Cache::Writethrough,
        _ => Cache::Writeback,
    })
}

fn check_aio(p: &Params, key: &str, cache: Cache) -> Result<(), KeyvalError> {
    let aio = p.choice(key, &["threads", "native", "io_uring"])?;
    if aio == Some("native") && !matches!(cache, Cache::None | Cache::DirectSync) {
        return Err(KeyvalError::Other(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.".into(),
        ));
    }
    Ok(())
}

fn discard(p: &Params) -> Result<bool, KeyvalError> {
    Ok(matches!(p.choice("discard", &["ignore", "off", "unmap", "on"])?, Some("unmap" | "on")))
}

fn detect_zeroes(p: &Params) -> Result<bool, KeyvalError> {
    let mode = p.choice("detect-zeroes", &["off", "on", "unmap"])?;
    if mode == Some("unmap") && !discard(p)? {
        return Err(KeyvalError::Other(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap".into(),
        ));
    }
    Ok(matches!(mode, Some("on" | "unmap")))
}

/// The limits of `throttling.*` and their short forms (`bps`, `iops_rd`, `bps_wr_max`, ...).
pub fn limits(p: &Params) -> Result<Limits, KeyvalError> {
    let mut limits = Limits::default();
    let mut known = vec!["throttling.iops-size".to_owned()];
    let mut number = |long: String, short: String| -> Result<u64, KeyvalError> {
        let value = p.number(&long)?.or(p.number(&short)?).unwrap_or(0);
        known.push(long);
        if value > 1_000_000_000_000_000 {
            return Err(KeyvalError::Other(
                "bps/iops/max values must be within [0, 1000000000000000]".into(),
            ));
        }
        Ok(value)
    };
    for (what, list) in [("bps", &mut limits.bytes), ("iops", &mut limits.requests)] {
        for (i, (long, short)) in [("total", ""), ("read", "_rd"), ("write", "_wr")].iter().enumerate() {
            let name = format!("throttling.{what}-{long}");
            list[i] = Limit {
                average: number(name.clone(), format!("{what}{short}"))?,
                max: number(format!("{name}-max"), format!("{what}{short}_max"))?,
                length: number(format!("{name}-max-length"), String::new())?,
            };
            if list[i].max > 0 && list[i].average == 0 {
                return Err(KeyvalError::Other(
                    "bps_max/iops_max require corresponding bps/iops values".into(),
                ));
            }
            if list[i].max > 0 && list[i].max < list[i].average {
                return Err(KeyvalError::Other("bps_max/iops_max cannot be lower than bps/iops".into()));
            }
            if list[i].length > 1 && list[i].max == 0 {
                return Err(KeyvalError::Other("burst length set without burst rate".into()));
            }
        }
        let each = list[1].average > 0 || list[2].average > 0;
        if list[0].average > 0 && each {
            return Err(KeyvalError::Other(
                "bps/iops/max total values and read/write values cannot be used at the same time".into(),
            ));
        }
    }
    limits.request_size = p.number("throttling.iops-size")?.or(p.number("iops_size")?).unwrap_or(0);
    if let Some((key, _)) =
        p.iter().find(|(k, _)| k.starts_with("throttling.") && !known.iter().any(|n| n == k))
    {
        return Err(KeyvalError::Unknown(key.to_owned()));
    }
    Ok(limits)
}

/// The image of a format node's `file.*` options.
fn nested_file(p: &Params) -> Result<Option<String>, KeyvalError> {
    let common =
        ["driver", "node-name", "read-only", "auto-read-only", "discard", "cache.direct", "cache.no-flush"];
    let driver = p.get("file.driver").unwrap_or("file");
    let keys = protocol_keys(driver)?;
    let unknown = p
        .iter()
        .find(|(k, _)| k.strip_prefix("file.").is_some_and(|k| !common.contains(&k) && !keys.contains(&k)));
    if let Some((key, _)) = unknown {
        return Err(KeyvalError::Unknown(key.to_owned()));
    }
    protocol_file(p, "file.", driver)
}

/// Options of a protocol node.
fn protocol_keys(driver: &str) -> Result<&'static [&'static str], KeyvalError> {
    Ok(match driver {
        "file" | "host_device" | "host_cdrom" => &["filename", "locking", "aio"],
        "nfs" => &[
            "server.type",
            "server.host",
            "path",
            "user",
            "group",
            "tcp-syn-count",
            "readahead-size",
            "page-cache-size",
            "debug",
            "filename",
        ],
        "iscsi" => &[
            "transport",
            "portal",
            "target",
            "lun",
            "user",
            "password-secret",
            "initiator-name",
            "header-digest",
            "timeout",
            "filename",
        ],
        other => return Err(KeyvalError::Other(format!("Unknown driver '{other}'"))),
    })
}

/// The path or URL that a protocol node's options (each with `prefix` before it) mean.
fn protocol_file(p: &Params, prefix: &str, driver: &str) -> Result<Option<String>, KeyvalError> {
    let get = |key: &str| p.get(&format!("{prefix}{key}"));
    let need = |key: &str| get(key).ok_or_else(|| KeyvalError::Missing(key.to_owned()));
    if let Some(name) = get("filename") {
        return Ok(Some(name.to_owned()));
    }
    let mut query: Vec<String> = Vec::new();
    let mut option = |key: &str, name: &str| {
        if let Some(value) = get(key) {
            query.push(format!("{name}={}", escape(value)));
        }
    };
    let url = match driver {
        "nfs" => {
            if get("server.type").is_some_and(|t| t != "inet") {
                return Err(KeyvalError::Other(
                    "Parameter 'server.type' does not accept another value than 'inet'".into(),
                ));
            }
            option("user", "uid");
            option("group", "gid");
            option("tcp-syn-count", "tcp-syncnt");
            option("readahead-size", "readahead");
            option("page-cache-size", "pagecache");
            option("debug", "debug");
            let path = need("path")?;
            format!("nfs://{}/{}", need("server.host")?, escape(path.strip_prefix('/').unwrap_or(path)))
        }
        "iscsi" => {
            match get("transport") {
                None | Some("tcp") => {}
                Some(other) => {
                    return Err(KeyvalError::Other(format!("iSCSI: transport '{other}' is not supported")))
                }
            }
            if get("header-digest").is_some_and(|d| !matches!(d, "none" | "none-crc32c" | "crc32c-none")) {
                return Err(KeyvalError::Other("iSCSI: header-digest=crc32c is not supported".into()));
            }
            option("user", "user");
            option("password-secret", "password-secret");
            option("initiator-name", "initiator-name");
            option("timeout", "timeout");
            format!("iscsi://{}/{}/{}", need("portal")?, need("target")?, get("lun").unwrap_or("0"))
        }
        _ => return Ok(None),
    };
    Ok(Some(if query.is_empty() { url } else { format!("{url}?{}", query.join("&")) }))
}

/// Put the password of `-object secret` where a drive names it.
pub fn resolve_secret(file: &str, secrets: &[(String, Vec<u8>)]) -> Result<String, KeyvalError> {
    let Some((url, query)) = file.split_once('?').filter(|(u, _)| u.starts_with("iscsi://")) else {
        return Ok(file.to_owned());
    };
    let mut items = Vec::new();
    for item in query.split('&') {
        items.push(match item.strip_prefix("password-secret=") {
            None => item.to_owned(),
            Some(id) => {
                let found = secrets.iter().find(|(name, _)| escape(name) == id);
                let (_, value) =
                    found.ok_or_else(|| KeyvalError::Other(format!("No secret with id '{id}'")))?;
                let value = std::str::from_utf8(value)
                    .map_err(|_| KeyvalError::Other(format!("Data from secret {id} is not valid UTF-8")))?;
                format!("password={}", escape(value))
            }
        });
    }
    Ok(format!("{url}?{}", items.join("&")))
}

/// A `-blockdev`: protocol nodes (`driver=file`) are kept as drives until a format node takes them in.
pub fn add_blockdev(p: &Params, drives: &mut Vec<DriveConfig>) -> Result<(), KeyvalError> {
    let common = [
        "driver",
        "node-name",
        "read-only",
        "auto-read-only",
        "discard",
        "detect-zeroes",
        "cache.direct",
        "cache.no-flush",
        "force-share",
    ];
    let driver = p.need("driver")?;
    let own: &[&str] = match driver {
        "raw" => &["file", "file.", "backing"],
        "luks" => &["file", "file.", "key-secret"],
        "qcow2" => &["file", "file.", "backing", "encrypt.format", "encrypt.key-secret"],
        other => protocol_keys(other)?,
    };
    p.only(&[&common, own].concat())?;
    let name = p.need("node-name")?.to_owned();
    if drives.iter().any(|d| d.id == name) {
        return Err(KeyvalError::Other(format!("Duplicate nodes with node-name='{name}'")));
    }
    let driver = p.need("driver")?;
    let backing = match p.get("backing") {
        None => Backing::Header,
        Some(_) if driver == "raw" => return Err(KeyvalError::Unknown("backing".into())),
        Some("") => Backing::Nothing,
        Some(node) if drives.iter().any(|d| d.id == node) => Backing::Node(node.to_owned()),
        Some(node) => {
            return Err(KeyvalError::Other(format!("Cannot find device='' nor node-name='{node}'")));
        }
    };
    let mut cache = cache_flags(p)?;
    let mut protocol = None;
    let (file, fmt, locking) = match driver {
        "file" | "host_device" | "host_cdrom" | "nfs" | "iscsi" => {
            check_aio(p, "aio", cache)?;
            let locking = p.choice("locking", &["on", "off", "auto"])? != Some("off");
            let file =
                protocol_file(p, "", driver)?.ok_or_else(|| KeyvalError::Missing("filename".into()))?;
            (file, "raw", locking)
        }
        "raw" | "qcow2" | "luks" => {
            if let Some(lower) = p.get("file") {
                let at = drives.iter().position(|d| d.id == lower).ok_or_else(|| {
                    KeyvalError::Other(format!("Cannot find device='' nor node-name='{lower}'"))
                })?;
                let node = drives.remove(at);
                // What the node below was told of the host's cache holds for both.
                if cache == Cache::Writeback {
                    cache = node.cache;
                }
                protocol = Some(node.id);
                (node.file.unwrap_or_default(), driver, node.locking)
            } else {
                let file = nested_file(p)?.ok_or_else(|| KeyvalError::Missing("file".into()))?;
                let locking = p.choice("file.locking", &["on", "off", "auto"])? != Some("off");
                (file, driver, locking)
            }
        }
        other => return Err(KeyvalError::Other(format!("Unknown driver '{other}'"))),
    };
    drives.push(DriveConfig {
        id: name,
        file: Some(file),
        format: Some(fmt.to_owned()),
        interface: Interface::None,
        index: next_index(Interface::None, drives),
        cdrom: false,
        read_only: p.bool("read-only")?.unwrap_or(false),
        snapshot: false,
        cache,
        discard: discard(p)?,
        detect_zeroes: detect_zeroes(p)?,
        serial: None,
        locking,
        on_error: ErrorPolicy::default(),
        limits: Limits::default(),
        protocol,
        node: true,
        backing,
        key_secret: key_secret(p, "", Some(driver))?,
        backing_key_secret: None,
    });
    Ok(())
}
