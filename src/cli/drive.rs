//! `-drive`, `-blockdev` and their short forms.

use serde::{Deserialize, Serialize};

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

/// One drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveConfig {
    pub id: String,
    /// The image file; `None` for a CD-ROM drive without a disc.
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
    /// The name of the protocol node below (`-blockdev`).
    pub protocol: Option<String>,
    /// It is a block node (`-blockdev`), not a `-drive`.
    pub node: bool,
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
        Some(f @ ("raw" | "qcow2")) => Ok(Some(f.to_owned())),
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
    ])?;
    p.choice("aio", &["threads", "native", "io_uring"])?;
    for policy in ["werror", "rerror"] {
        p.choice(policy, &["report", "stop", "enospc", "ignore"])?;
        if matches!(p.get(policy), Some("stop" | "enospc" | "ignore")) {
            return Err(KeyvalError::Other(format!("Parameter '{policy}' supports only 'report' here")));
        }
    }
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
    if interface == Interface::Ide && index > 3 {
        return Err(KeyvalError::Other(format!("index {index} is too big: IDE has 4 places")));
    }
    if before.iter().any(|d| d.interface == interface && interface != Interface::None && d.index == index) {
        return Err(KeyvalError::Other(format!("drive with bus=0, unit={index} (index={index}) exists")));
    }
    let file = p.get("file").or(p.get("file.filename")).filter(|f| !f.is_empty()).map(str::to_owned);
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
    Ok(DriveConfig {
        id,
        file,
        format: format(p.get("format").or(p.get("driver")))?,
        interface,
        index,
        cdrom,
        read_only: p.bool("readonly")?.or(p.bool("read-only")?).unwrap_or(cdrom),
        snapshot: p.bool("snapshot")?.unwrap_or(false),
        cache: p.get("cache").map_or(Ok(Cache::Writeback), cache)?,
        discard: matches!(p.choice("discard", &["ignore", "off", "unmap", "on"])?, Some("unmap" | "on")),
        detect_zeroes: matches!(p.choice("detect-zeroes", &["off", "on", "unmap"])?, Some("on" | "unmap")),
        serial: p.get("serial").map(str::to_owned),
        locking: p.choice("file.locking", &["on", "off", "auto"])? != Some("off"),
        protocol: None,
        node: false,
    })
}

/// A `-blockdev`: protocol nodes (`driver=file`) are kept as drives until a format node takes them in.
pub fn add_blockdev(p: &Params, drives: &mut Vec<DriveConfig>) -> Result<(), KeyvalError> {
    p.only(&[
        "driver",
        "node-name",
        "filename",
        "file",
        "file.driver",
        "file.filename",
        "file.node-name",
        "file.locking",
        "locking",
        "read-only",
        "auto-read-only",
        "discard",
        "detect-zeroes",
        "cache.direct",
        "cache.no-flush",
        "backing",
        "aio",
        "file.aio",
        "force-share",
    ])?;
    let name = p.need("node-name")?.to_owned();
    if drives.iter().any(|d| d.id == name) {
        return Err(KeyvalError::Other(format!("Duplicate nodes with node-name='{name}'")));
    }
    let driver = p.need("driver")?;
    let cache = match (p.bool("cache.direct")?, p.bool("cache.no-flush")?) {
        (_, Some(true)) => Cache::Unsafe,
        (Some(true), _) => Cache::None,
        _ => Cache::Writeback,
    };
    let mut protocol = None;
    let (file, fmt, locking) = match driver {
        "file" | "host_device" => (p.need("filename")?.to_owned(), "raw", p.get("locking") != Some("off")),
        "raw" | "qcow2" => {
            if let Some(lower) = p.get("file") {
                let at = drives.iter().position(|d| d.id == lower).ok_or_else(|| {
                    KeyvalError::Other(format!("Cannot find device='' nor node-name='{lower}'"))
                })?;
                let node = drives.remove(at);
                protocol = Some(node.id);
                (node.file.unwrap_or_default(), driver, node.locking)
            } else {
                match p.get("file.driver") {
                    None | Some("file" | "host_device") => {}
                    Some(other) => return Err(KeyvalError::Other(format!("Unknown driver '{other}'"))),
                }
                (p.need("file.filename")?.to_owned(), driver, p.get("file.locking") != Some("off"))
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
        discard: p.choice("discard", &["ignore", "unmap"])? == Some("unmap"),
        detect_zeroes: matches!(p.choice("detect-zeroes", &["off", "on", "unmap"])?, Some("on" | "unmap")),
        serial: None,
        locking,
        protocol,
        node: true,
    });
    Ok(())
}
