//! From options to a machine's configuration. What describes the machine (and must be the same on
//! both hosts of a pair) is [`MachineConfig`]; what belongs to this host and process is [`HostConfig`].

use serde::{Deserialize, Serialize};

use super::ft::FtConfig;
use super::keys::keys;
use super::keyval::{parse_number, KeyvalError, Params};
use super::options::Given;
use super::secret::SecretProperties;
use super::vnc::VncConfig;
use super::{drive, net, CliError};
use crate::migration::channel::Uri;

/// A machine type.
pub struct MachineType {
    pub name: &'static str,
    pub alias: Option<&'static str>,
    pub description: &'static str,
    pub is_default: bool,
    pub max_cpus: u32,
}

/// Machine types.
pub const MACHINES: &[MachineType] = &[
    MachineType {
        name: "pc-i440fx-7.2",
        alias: Some("pc"),
        description: "Standard PC (i440FX + PIIX, 1996)",
        is_default: true,
        max_cpus: 255,
    },
    MachineType {
        name: "pc-q35-7.2",
        alias: Some("q35"),
        description: "Standard PC (Q35 + ICH9, 2009)",
        is_default: false,
        max_cpus: 255,
    },
    MachineType {
        name: "none",
        alias: None,
        description: "empty machine, for asking what there is",
        is_default: false,
        max_cpus: 1,
    },
];

impl Char {
    /// The back end itself, below a multiplexer.
    pub fn inner(&self) -> &Char {
        match self {
            Char::Mux(dev) => dev.inner(),
            other => other,
        }
    }
}

/// A character back end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Char {
    Null,
    /// The terminal; with `signal` Ctrl-C ends the program.
    Stdio {
        signal: bool,
    },
    /// Several front ends share it (Ctrl-A c switches, Ctrl-A x ends).
    Mux(Box<Char>),
    File {
        path: String,
        append: bool,
    },
    Pipe {
        path: String,
    },
    Pty,
    Unix {
        path: String,
        server: bool,
        wait: bool,
    },
    Tcp {
        addr: String,
        server: bool,
        wait: bool,
    },
    /// An inherited, already listening socket.
    Fd {
        fd: i32,
        server: bool,
    },
    /// Refers to `-chardev` of this id.
    Id(String),
}

impl Char {
    /// The back end itself, where an id of `-chardev` was given.
    pub fn resolve(&self, chardevs: &[(String, Char)]) -> Result<Char, String> {
        match self {
            Char::Id(id) => chardevs
                .iter()
                .find(|(n, _)| n == id)
                .map(|(_, d)| d.clone())
                .ok_or_else(|| format!("chardev '{id}' not found")),
            other => Ok(other.clone()),
        }
    }
}

/// A monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Monitor {
    pub dev: Char,
    /// QMP (`control`) or the human monitor (`readline`).
    pub qmp: bool,
    pub pretty: bool,
}

/// `-device`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    pub driver: String,
    pub id: Option<String>,
    /// All properties in the order given, without driver and id.
    pub props: Vec<(String, String)>,
}

/// How virtual time follows position, and record/replay.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Icount {
    /// Nanoseconds per instruction as a power of two; `None`: follow the host.
    pub shift: Option<u32>,
    pub record: Option<String>,
    pub replay: Option<String>,
    /// Let virtual time follow real time while idle (`sleep=on`, the default).
    pub sleep: bool,
}

/// What the guest can see of its machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineConfig {
    pub machine: String,
    pub hpet: bool,
    pub memory: u64,
    pub cpus: u32,
    pub cpu_model: String,
    pub name: Option<String>,
    pub uuid: [u8; 16],
    pub kernel: Option<String>,
    pub initrd: Option<String>,
    pub append: Option<String>,
    pub bios: String,
    pub boot_order: String,
    pub boot_menu: bool,
    /// Milliseconds that the boot menu waits.
    pub boot_splash_time: Option<u32>,
    pub boot_strict: bool,
    pub rtc_base: RtcBase,
    pub nographic: bool,
    pub vga: String,
    pub drives: Vec<drive::DriveConfig>,
    pub nics: Vec<net::NicConfig>,
    pub netdevs: Vec<net::NetdevConfig>,
    pub devices: Vec<DeviceConfig>,
    pub globals: Vec<String>,
    pub objects: Vec<(String, String)>,
    pub serials: Vec<Option<Char>>,
    pub debugcon: Option<Char>,
    pub chardevs: Vec<(String, Char)>,
    pub icount: Icount,
    pub snapshot: bool,
    /// `-machine usb=on`: the board's USB controller is there.
    pub usb: bool,
    /// `-machine memory-backend=`: the object that describes guest memory.
    pub memory_backend: Option<String>,
    /// The host's Unix time at the start, as `rtc_base` makes it.
    pub rtc_base_unix: i64,
    /// What the machine runs on (the choice among those that were asked for).
    pub accel: Accel,
}

/// What executes a machine's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// The deterministic software processor.
    #[default]
    Tcg,
    /// The host's processor.
    Kvm,
}

impl Accel {
    /// Its name in `-accel`.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Tcg => "tcg",
            Accel::Kvm => "kvm",
        }
    }
}

/// An accelerator that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccelWish {
    /// The option that names it alone, for messages; empty for a list of them.
    pub option: String,
    pub name: String,
}

impl Default for MachineConfig {
    /// What there is when nothing is said.
    fn default() -> Self {
        MachineConfig {
            machine: "pc".into(),
            hpet: true,
            memory: 128 << 20,
            cpus: 1,
            cpu_model: "qemu64".into(),
            name: None,
            uuid: [0; 16],
            kernel: None,
            initrd: None,
            append: None,
            bios: "bios-256k.bin".into(),
            boot_order: "cad".into(),
            boot_menu: false,
            boot_splash_time: None,
            boot_strict: false,
            rtc_base: RtcBase::Utc,
            nographic: false,
            vga: "none".into(),
            drives: Vec::new(),
            nics: Vec::new(),
            netdevs: Vec::new(),
            devices: Vec::new(),
            globals: Vec::new(),
            objects: Vec::new(),
            serials: Vec::new(),
            debugcon: None,
            chardevs: Vec::new(),
            icount: Icount { sleep: true, ..Icount::default() },
            snapshot: false,
            usb: false,
            memory_backend: None,
            accel: Accel::Tcg,
            rtc_base_unix: 0,
        }
    }
}

impl MachineConfig {
    /// The machine type's own name, whatever alias was given.
    pub fn machine_name(&self) -> &str {
        let found = MACHINES.iter().find(|m| m.name == self.machine || m.alias == Some(&self.machine));
        found.map_or(self.machine.as_str(), |m| m.name)
    }
}

/// `-rtc base=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RtcBase {
    Utc,
    Localtime,
    /// Seconds since 1970 at virtual time 0.
    Fixed(i64),
}

/// What belongs to this host and process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostConfig {
    pub monitors: Vec<Monitor>,
    pub ft: Option<FtConfig>,
    pub no_reboot: bool,
    pub no_shutdown: bool,
    pub start_paused: bool,
    pub daemonize: bool,
    pub pidfile: Option<String>,
    pub log_file: Option<String>,
    pub log_items: Vec<String>,
    pub timestamps: bool,
    pub firmware_dirs: Vec<String>,
    /// `-sandbox on`: system calls that are refused.
    pub sandbox: Option<crate::host::sandbox::Sandbox>,
    /// The screen is shown to VNC clients.
    pub vnc: Option<VncConfig>,
    /// `-overcommit mem-lock=on`: keep the program's memory in RAM.
    pub lock_memory: bool,
    /// The machine comes from elsewhere.
    pub incoming: Option<Uri>,
    /// The snapshot from which the machine goes on.
    pub loadvm: Option<String>,
    /// The accelerators that may be used, the preferred one first. None: tcg.
    pub accels: Vec<AccelWish>,
    /// Where debuggers connect.
    pub gdb: Option<Char>,
}

/// Both parts, and the options they came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub machine: MachineConfig,
    pub host: HostConfig,
    pub given: Vec<Given>,
}

/// Options that belong to the host, not to the machine.
pub const HOST_OPTIONS: &[&str] = &[
    "monitor",
    "qmp",
    "mon",
    "ft",
    "no-reboot",
    "no-shutdown",
    "S",
    "daemonize",
    "pidfile",
    "D",
    "d",
    "msg",
    "L",
    "no-user-config",
    "sandbox",
    "overcommit",
    "vnc",
    "display",
    "incoming",
    "loadvm",
    "s",
    "gdb",
];

fn at(option: &str, value: &str) -> impl Fn(KeyvalError) -> CliError {
    let (option, value) = (option.to_owned(), value.to_owned());
    move |e| CliError::Value(option.clone(), value.clone(), e.to_string())
}

/// The form of a character device that `-serial`, `-monitor`, `-qmp` and `-debugcon` take.
pub fn legacy_char(text: &str) -> Result<Option<Char>, KeyvalError> {
    let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
    let socket = |rest: &str, unix: bool| -> Result<Char, KeyvalError> {
        let (addr, opts) = rest.split_once(',').unwrap_or((rest, ""));
        let params = Params::parse(opts, None)?;
        params.only(&["server", "wait", "nodelay", "reconnect", "telnet"])?;
        let server = params.bool("server")?.unwrap_or(false);
        let wait = params.bool("wait")?.unwrap_or(true);
        if addr.is_empty() {
            return Err(KeyvalError::Missing("path".into()));
        }
        Ok(if unix {
            Char::Unix { path: addr.to_owned(), server, wait }
        } else {
            Char::Tcp { addr: addr.to_owned(), server, wait }
        })
    };
    Ok(Some(match kind {
        "none" if rest.is_empty() => return Ok(None),
        "null" if rest.is_empty() => Char::Null,
        "stdio" if rest.is_empty() => Char::Stdio { signal: true },
        // With a monitor of its own.
        "mon" if rest == "stdio" => Char::Mux(Box::new(Char::Stdio { signal: false })),
        "mon" => match legacy_char(rest)? {
            Some(Char::Id(_) | Char::Mux(_)) | None => {
                return Err(KeyvalError::Other(format!("'{text}' is not a valid char driver")))
            }
            Some(dev) => Char::Mux(Box::new(dev)),
        },
        "file" => Char::File { path: rest.to_owned(), append: false },
        "pipe" => Char::Pipe { path: rest.to_owned() },
        "pty" if rest.is_empty() => Char::Pty,
        "unix" => socket(rest, true)?,
        "tcp" => socket(rest, false)?,
        "chardev" => Char::Id(rest.to_owned()),
        _ => return Err(KeyvalError::Other(format!("'{text}' is not a valid char driver"))),
    }))
}

/// The device of a stub for GDB (`-gdb`, `gdbserver`): as [`legacy_char`], but TCP sockets listen and wait for nobody.
pub fn gdb_char(text: &str) -> Result<Option<Char>, KeyvalError> {
    let dev = match text.split_once(',') {
        None if text.starts_with("tcp:") => legacy_char(&format!("{text},server=on,wait=off"))?,
        _ => legacy_char(text)?,
    };
    Ok(match dev {
        Some(Char::Tcp { addr, .. }) => Some(Char::Tcp { addr, server: true, wait: false }),
        Some(Char::File { .. }) => {
            return Err(KeyvalError::Other(format!("'{text}': nobody can debug by a file")));
        }
        other => other,
    })
}

fn chardev(text: &str) -> Result<(String, Char), KeyvalError> {
    let p = Params::parse(text, Some("backend"))?;
    p.only(&keys("chardev"))?;
    if p.get("logfile").is_some() {
        return Err(KeyvalError::Other("logfile is not available here".into()));
    }
    let id = p.need("id")?.to_owned();
    let server = p.bool("server")?.unwrap_or(false);
    let wait = p.bool("wait")?.unwrap_or(true);
    let backend = p.need("backend")?;
    let mux = p.bool("mux")? == Some(true);
    let dev = match backend {
        "null" => Char::Null,
        "stdio" => Char::Stdio { signal: p.bool("signal")?.unwrap_or(true) },
        "file" => Char::File { path: p.need("path")?.to_owned(), append: p.bool("append")?.unwrap_or(false) },
        "pipe" => Char::Pipe { path: p.need("path")?.to_owned() },
        "pty" => Char::Pty,
        "socket" => {
            if let Some(fd) = p.number("fd")? {
                Char::Fd { fd: fd as i32, server }
            } else if let Some(path) = p.get("path") {
                Char::Unix { path: path.to_owned(), server, wait }
            } else {
                let host = p.get("host").unwrap_or("127.0.0.1");
                Char::Tcp { addr: format!("{host}:{}", p.need("port")?), server, wait }
            }
        }
        other => return Err(KeyvalError::Other(format!("'{other}' is not a valid char driver name"))),
    };
    Ok((id, if mux { Char::Mux(Box::new(dev)) } else { dev }))
}

/// Parse a UUID in the usual form.
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let hex: String = text.chars().filter(|c| *c != '-').collect();
    if hex.len() != 32 || text.len() != 36 || !hex.is_ascii() {
        return None;
    }
    let mut out = [0; 16];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

/// The usual form of a UUID.
pub fn format_uuid(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Days since 1970 of a civil date.
fn days_from_civil(y: i64, m: i64, d: i64) -> i64 {
    let y = if m <= 2 { y - 1 } else { y };
    let era = y.div_euclid(400);
    let yoe = y - era * 400;
    let doy = (153 * (m + if m > 2 { -3 } else { 9 }) + 2) / 5 + d - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

fn rtc_base(text: &str) -> Option<RtcBase> {
    match text {
        "utc" => return Some(RtcBase::Utc),
        "localtime" => return Some(RtcBase::Localtime),
        _ => {}
    }
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
    let nums = |s: &str, sep: char| s.split(sep).map(|w| w.parse::<i64>().ok()).collect::<Option<Vec<_>>>();
    match (nums(date, '-')?.as_slice(), nums(time, ':')?.as_slice()) {
        ([y, m @ 1..=12, d @ 1..=31], [h @ 0..=23, min @ 0..=59, s @ 0..=59]) => {
            Some(RtcBase::Fixed(days_from_civil(*y, *m, *d) * 86_400 + h * 3600 + min * 60 + s))
        }
        _ => None,
    }
}

impl Config {
    /// Build the configuration from options. `no image` and the like are checked later, when files are opened.
    pub fn from_given(given: &[Given]) -> Result<Config, CliError> {
        let mut m = MachineConfig::default();
        let mut h = HostConfig::default();
        let mut nodefaults = false;
        let mut net_none = false;
        let mut vnc: Option<String> = None;
        let mut secrets: Vec<(String, Vec<u8>)> = Vec::new();
        let mut monitor_given = false;
        let mut machine_accel = false;
        let mut accel_given = Vec::new();
        let mut memory_objects: Vec<(String, u64)> = Vec::new();
        for g in given {
            let v = g.value();
            let err = at(&g.name, v);
            let params = |implied: Option<&str>| Params::parse(v, implied).map_err(&err);
            match g.name.as_str() {
                "machine" => {
                    let p = params(Some("type"))?;
                    p.only(&keys("machine")).map_err(&err)?;
                    if let Some(t) = p.get("type") {
                        if !MACHINES.iter().any(|m| m.name == t || m.alias == Some(t)) {
                            return Err(CliError::Plain(format!(
                                "unsupported machine type '{t}'\nUse -machine help to list supported machines"
                            )));
                        }
                        m.machine = t.to_owned();
                    }
                    if let Some(a) = p.get("accel") {
                        machine_accel = true;
                        h.accels = accels("", a)?;
                    }
                    m.usb = p.bool("usb").map_err(&err)?.unwrap_or(m.usb);
                    if let Some(backend) = p.get("memory-backend") {
                        m.memory_backend = Some(backend.to_owned());
                    }
                    if p.bool("acpi").map_err(&err)? == Some(false) {
                        return Err(err(KeyvalError::Other("this machine always has ACPI".into())));
                    }
                    if let Some(hpet) = p.bool("hpet").map_err(&err)? {
                        m.hpet = hpet;
                    }
                }
                "accel" => {
                    let p = params(Some("accel"))?;
                    p.only(&keys("accel")).map_err(&err)?;
                    p.choice("kernel-irqchip", &["on", "off", "split"]).map_err(&err)?;
                    let name = p.need("accel").map_err(&err)?;
                    accel_given.extend(accels(&format!("-accel {v}"), name)?);
                }
                "enable-kvm" => {
                    accel_given.push(AccelWish { option: String::new(), name: "kvm".into() });
                }
                "cpu" => m.cpu_model = v.to_owned(),
                "smp" => {
                    let p = params(Some("cpus"))?;
                    p.only(&keys("smp")).map_err(&err)?;
                    let n = |k: &str| p.number(k).map_err(&err);
                    let mut shape = 1u64;
                    for level in ["sockets", "dies", "cores", "threads"] {
                        shape = shape.saturating_mul(n(level)?.unwrap_or(1));
                    }
                    let cpus = n("cpus")?.unwrap_or(shape);
                    let max = n("maxcpus")?.unwrap_or(cpus);
                    if cpus == 0 || cpus > 255 {
                        return Err(CliError::Plain(format!("Invalid SMP CPUs {cpus}. The min CPUs supported by machine '{}' is 1 and the max is 255", m.machine)));
                    }
                    if max != cpus {
                        return Err(err(KeyvalError::Other(
                            "processors cannot be hot-plugged: maxcpus must equal cpus".into(),
                        )));
                    }
                    m.cpus = cpus as u32;
                }
                "m" => {
                    let p = params(Some("size"))?;
                    p.only(&keys("memory")).map_err(&err)?;
                    if p.get("slots").is_some_and(|s| s != "0") || p.get("maxmem").is_some() {
                        let text = "memory cannot be hot-plugged: give no slots and no maxmem";
                        return Err(err(KeyvalError::Other(text.into())));
                    }
                    let size = p.size("size", 1 << 20).map_err(&err)?.unwrap_or(128 << 20);
                    if !(1 << 20..=1 << 40).contains(&size) {
                        return Err(err(KeyvalError::Other("guest memory must be between 1M and 1T".into())));
                    }
                    m.memory = size.next_multiple_of(8192);
                }
                "boot" => {
                    let p = params(Some("order"))?;
                    p.only(&keys("boot")).map_err(&err)?;
                    if let Some(order) = p.get("once").or(p.get("order")) {
                        if let Some(bad) = order.chars().find(|c| !('a'..='p').contains(c)) {
                            return Err(err(KeyvalError::Other(format!("Invalid boot device '{bad}'"))));
                        }
                        m.boot_order = order.to_owned();
                    }
                    m.boot_splash_time = p.number("splash-time").map_err(&err)?.map(|n| n.min(0xFFFF) as u32);
                    m.boot_menu = p.bool("menu").map_err(&err)?.unwrap_or(m.boot_menu);
                    m.boot_strict = p.bool("strict").map_err(&err)?.unwrap_or(m.boot_strict);
                }
                "name" => {
                    let p = params(Some("guest"))?;
                    p.only(&keys("name")).map_err(&err)?;
                    m.name = p.get("guest").map(str::to_owned);
                }
                "uuid" => {
                    m.uuid = parse_uuid(v).ok_or_else(|| err(KeyvalError::Other("invalid UUID".into())))?;
                }
                "device" => {
                    let p = params(Some("driver"))?;
                    let driver = p.need("driver").map_err(&err)?.to_owned();
                    let props = p
                        .iter()
                        .filter(|(k, _)| *k != "driver" && *k != "id")
                        .map(|(k, v)| (k.to_owned(), v.to_owned()))
                        .collect();
                    m.devices.push(DeviceConfig { driver, id: p.get("id").map(str::to_owned), props });
                }
                "global" => m.globals.push(v.to_owned()),
                "object" => {
                    let p = params(Some("qom-type"))?;
                    let kind = p.need("qom-type").map_err(&err)?;
                    let known: &[&str] = match kind {
                        "rng-random" => &["qom-type", "id", "filename"],
                        "rng-builtin" => &["qom-type", "id"],
                        "memory-backend-ram" => &["qom-type", "id", "size", "share", "prealloc"],
                        "secret" => &["qom-type", "id", "data", "file", "format", "keyid", "iv"],
                        other => match super::object::known(other) {
                            Some(known) => known,
                            None => {
                                let why = super::object::why_not(other);
                                let why = why.unwrap_or_else(|| format!("invalid object type: {other}"));
                                return Err(CliError::Plain(format!("-object {v}: {why}")));
                            }
                        },
                    };
                    p.only(known).map_err(&err)?;
                    super::object::make(kind, p.need("id").map_err(&err)?, &p).map_err(&err)?;
                    if kind == "secret" {
                        let id = p.need("id").map_err(&err)?;
                        let value = secret(&p).map_err(&err)?;
                        ftvm_block::crypto::secrets::keep(id, value.clone());
                        secrets.push((id.to_owned(), value));
                    }
                    if kind == "memory-backend-ram" {
                        let size = p.size("size", 1).map_err(&err)?;
                        let size = size.ok_or_else(|| err(KeyvalError::Missing("size".into())))?;
                        memory_objects.push((p.need("id").map_err(&err)?.to_owned(), size));
                    }
                    m.objects.push((kind.to_owned(), p.need("id").map_err(&err)?.to_owned()));
                }
                "rtc" => {
                    let p = params(None)?;
                    p.only(&keys("rtc")).map_err(&err)?;
                    p.choice("clock", &["host", "vm", "rt"]).map_err(&err)?;
                    if let Some(base) = p.get("base") {
                        m.rtc_base = rtc_base(base).ok_or_else(|| {
                            err(KeyvalError::Other(format!("invalid datetime format: '{base}'")))
                        })?;
                    }
                }
                "icount" => {
                    let p = params(Some("shift"))?;
                    p.only(&keys("icount")).map_err(&err)?;
                    if let Some(s) = p.get("shift").filter(|s| *s != "auto") {
                        let n = parse_number(s).filter(|n| *n <= 10).ok_or_else(|| {
                            err(KeyvalError::Other("icount: Invalid shift value: 0 to 10 or auto".into()))
                        })?;
                        m.icount.shift = Some(n as u32);
                    }
                    m.icount.sleep = p.bool("sleep").map_err(&err)?.unwrap_or(true);
                    if p.bool("align").map_err(&err)? == Some(true) {
                        return Err(err(KeyvalError::Other("align=on is not supported".into())));
                    }
                    if let Some(mode) = p.choice("rr", &["record", "replay"]).map_err(&err)? {
                        let file = p.get("rrfile").unwrap_or("replay.bin").to_owned();
                        if mode == "record" {
                            m.icount.record = Some(file);
                        } else {
                            m.icount.replay = Some(file);
                        }
                    }
                }
                "hda" | "hdb" | "hdc" | "hdd" => {
                    let mut p = Params::default();
                    p.set("file", v);
                    p.set("index", &(u32::from(g.name.as_bytes()[2]) - u32::from(b'a')).to_string());
                    p.set("media", "disk");
                    m.drives.push(drive::from_drive(&p, &m.drives).map_err(&err)?);
                }
                "cdrom" => {
                    let mut p = Params::default();
                    p.set("file", v);
                    p.set("index", "2");
                    p.set("media", "cdrom");
                    m.drives.push(drive::from_drive(&p, &m.drives).map_err(&err)?);
                }
                "drive" => m.drives.push(drive::from_drive(&params(None)?, &m.drives).map_err(&err)?),
                "blockdev" => drive::add_blockdev(&params(Some("driver"))?, &mut m.drives).map_err(&err)?,
                "snapshot" => m.snapshot = true,
                "netdev" => m.netdevs.push(net::netdev(&params(Some("type"))?).map_err(&err)?),
                "nic" => {
                    let p = params(Some("type"))?;
                    if p.get("type") == Some("none") {
                        net_none = true;
                    } else {
                        let (nic, dev) = net::nic(&p, m.nics.len()).map_err(&err)?;
                        m.nics.push(nic);
                        m.netdevs.push(dev);
                    }
                }
                "net" => {
                    let p = params(Some("type"))?;
                    if p.get("type") == Some("none") {
                        net_none = true;
                    } else {
                        net::legacy_net(&p, &mut m.nics, &mut m.netdevs).map_err(&err)?;
                    }
                }
                "chardev" => m.chardevs.push(chardev(v).map_err(&err)?),
                "serial" => m.serials.push(legacy_char(v).map_err(&err)?),
                "debugcon" => m.debugcon = legacy_char(v).map_err(&err)?,
                "monitor" | "qmp" | "qmp-pretty" => {
                    let qmp = g.name != "monitor";
                    monitor_given |= !qmp;
                    if let Some(dev) = legacy_char(v).map_err(&err)? {
                        h.monitors.push(Monitor { dev, qmp, pretty: g.name == "qmp-pretty" });
                    }
                }
                "sandbox" => {
                    let p = params(Some("enable"))?;
                    p.only(&keys("sandbox")).map_err(&err)?;
                    h.sandbox = crate::host::sandbox::Sandbox::parse(&p).map_err(&err)?;
                }
                "overcommit" => {
                    let p = params(None)?;
                    p.only(&keys("overcommit")).map_err(&err)?;
                    h.lock_memory = p.bool("mem-lock").map_err(&err)?.unwrap_or(false);
                    p.bool("cpu-pm").map_err(&err)?;
                }
                "audiodev" => {
                    let p = params(Some("driver"))?;
                    p.need("id").map_err(&err)?;
                    if p.need("driver").map_err(&err)? != "none" {
                        let text = "this machine has no sound: only the driver 'none' is available";
                        return Err(err(KeyvalError::Other(text.into())));
                    }
                }
                "mon" => {
                    let p = params(Some("chardev"))?;
                    p.only(&keys("mon")).map_err(&err)?;
                    let mode = p.choice("mode", &["readline", "control"]).map_err(&err)?;
                    h.monitors.push(Monitor {
                        dev: Char::Id(p.need("chardev").map_err(&err)?.to_owned()),
                        qmp: mode == Some("control"),
                        pretty: p.bool("pretty").map_err(&err)?.unwrap_or(false),
                    });
                }
                "kernel" => m.kernel = Some(v.to_owned()),
                "initrd" => m.initrd = Some(v.to_owned()),
                "append" => m.append = Some(v.to_owned()),
                "bios" => m.bios = v.to_owned(),
                "L" => h.firmware_dirs.push(v.to_owned()),
                "nographic" => m.nographic = true,
                "vnc" => vnc = Some(v.to_owned()),
                "display" => {
                    if let Some(place) = v.strip_prefix("vnc=") {
                        vnc = Some(place.to_owned());
                    } else if v != "none" {
                        return Err(err(KeyvalError::Other("only 'none' and 'vnc=' are available".into())));
                    }
                }
                "vga" => {
                    match v {
                        "none" | "std" | "virtio" => {}
                        "cirrus" | "vmware" | "qxl" => {
                            return Err(CliError::Plain(format!(
                                "vga type '{v}' is not available: give -vga std, virtio or none"
                            )));
                        }
                        _ => return Err(CliError::Plain(format!("unknown vga type: {v}"))),
                    }
                    m.vga = v.to_owned();
                }
                "no-reboot" => h.no_reboot = true,
                "no-shutdown" => h.no_shutdown = true,
                "S" => h.start_paused = true,
                "s" => h.gdb = gdb_char(crate::gdb::DEFAULT).map_err(&err)?,
                "gdb" => h.gdb = gdb_char(v).map_err(&err)?,
                "daemonize" => h.daemonize = true,
                "pidfile" => h.pidfile = Some(v.to_owned()),
                "D" => h.log_file = Some(v.to_owned()),
                "d" => h.log_items.extend(v.split(',').map(str::to_owned)),
                "nodefaults" => nodefaults = true,
                "no-user-config" => {}
                "no-hpet" => m.hpet = false,
                "msg" => {
                    let p = params(None)?;
                    p.only(&keys("msg")).map_err(&err)?;
                    h.timestamps = p.bool("timestamp").map_err(&err)?.unwrap_or(false);
                }
                "incoming" => {
                    h.incoming = Some(Uri::parse(v).map_err(|e| err(KeyvalError::Other(e.to_string())))?);
                }
                "loadvm" => h.loadvm = Some(v.to_owned()),
                "ft" => h.ft = Some(FtConfig::parse(v).map_err(&err)?),
                other => return Err(CliError::Plain(format!("-{other}: invalid option"))),
            }
        }
        if let Some(text) = vnc {
            h.vnc = VncConfig::parse(&text, &secrets).map_err(at("vnc", &text))?;
        }
        if !nodefaults {
            let stdio_free = !m.serials.iter().flatten().any(|c| matches!(c.inner(), Char::Stdio { .. }));
            if m.serials.is_empty() && !m.devices.iter().any(|d| d.driver == "isa-serial") {
                if m.nographic {
                    m.serials.push(Some(Char::Mux(Box::new(Char::Stdio { signal: false }))));
                } else {
                    m.serials.push(Some(Char::Null));
                }
            } else if m.nographic && !monitor_given && stdio_free && !h.daemonize {
                h.monitors.push(Monitor {
                    dev: Char::Mux(Box::new(Char::Stdio { signal: false })),
                    qmp: false,
                    pretty: false,
                });
            }
            if m.nics.is_empty()
                && m.netdevs.is_empty()
                && !net_none
                && !m.devices.iter().any(|d| net::is_nic(&d.driver))
            {
                let (nic, dev) = net::default_nic();
                m.nics.push(nic);
                m.netdevs.push(dev);
            }
        }
        if h.incoming.is_some() {
            let with = [
                ("-ft", h.ft.is_some()),
                ("-icount rr=", m.icount.record.is_some() || m.icount.replay.is_some()),
                ("snapshot=on", m.snapshot || m.drives.iter().any(|d| d.snapshot)),
                ("-machine none", m.machine == "none"),
            ];
            if let Some((name, _)) = with.iter().find(|(_, given)| *given) {
                return Err(CliError::Plain(format!("-incoming and {name} cannot be used together")));
            }
        }
        if h.loadvm.is_some() && (h.incoming.is_some() || h.ft.is_some() || m.machine == "none") {
            let text = "-loadvm cannot be used together with -incoming, -ft and -machine none";
            return Err(CliError::Plain(text.into()));
        }
        if h.gdb.is_some() && m.machine == "none" {
            return Err(CliError::Plain("-gdb: the machine 'none' has nothing to debug".into()));
        }
        if m.icount.record.is_some() && h.ft.is_some() {
            return Err(CliError::Plain(
                "-icount rr=record and -ft cannot be used together: -ft records already".into(),
            ));
        }
        for d in &mut m.drives {
            if let Some(file) = &mut d.file {
                *file = drive::resolve_secret(file, &secrets)
                    .map_err(|e| CliError::Plain(format!("drive '{}': {e}", d.id)))?;
            }
        }
        unique("netdev", m.netdevs.iter().map(|n| n.id.as_str()))?;
        unique("chardev", m.chardevs.iter().map(|(id, _)| id.as_str()))?;
        unique("object", m.objects.iter().map(|(_, id)| id.as_str()))?;
        unique("device", m.devices.iter().filter_map(|d| d.id.as_deref()))?;
        if h.ft.is_some() {
            if let Some(d) = m.drives.iter().find(|d| !d.read_only && d.cache == drive::Cache::Unsafe) {
                return Err(CliError::Plain(format!(
                    "drive '{}': cache=unsafe and -ft cannot be used together: a write must be durable before the guest is told",
                    d.id
                )));
            }
            if let Some(d) = m.drives.iter().find(|d| !d.read_only && !d.locking) {
                return Err(CliError::Plain(format!(
                    "drive '{}': file.locking=off and -ft cannot be used together: the image's locks tell a dead primary from a stalled one",
                    d.id
                )));
            }
            if m.icount.replay.is_some() {
                return Err(CliError::Plain("-icount rr=replay and -ft cannot be used together".into()));
            }
        }
        if h.ft.is_some() && (m.snapshot || m.drives.iter().any(|d| d.snapshot)) {
            return Err(CliError::Plain(
                "snapshot=on and -ft cannot be used together: a backup needs the shared image".into(),
            ));
        }
        if let Some(backend) = &m.memory_backend {
            let found = memory_objects.iter().find(|(id, _)| id == backend);
            let Some((_, size)) = found else {
                return Err(CliError::Plain(format!("Memory backend '{backend}' not found")));
            };
            if *size != m.memory {
                return Err(CliError::Plain(format!(
                    "Memory backend '{backend}' has {size} bytes, -m says {}",
                    m.memory
                )));
            }
        }
        m.rtc_base_unix = crate::assembly::rtc_base(m.rtc_base);
        if m.append.is_some() && m.kernel.is_none() {
            return Err(CliError::Plain("-append only allowed with -kernel option".into()));
        }
        if m.initrd.is_some() && m.kernel.is_none() {
            return Err(CliError::Plain("-initrd only allowed with -kernel option".into()));
        }
        if !accel_given.is_empty() {
            if machine_accel {
                return Err(CliError::Plain(
                    "The -accel and \"-machine accel=\" options are incompatible".into(),
                ));
            }
            h.accels = accel_given;
        }
        Ok(Config { machine: m, host: h, given: given.to_vec() })
    }
}

fn secret(p: &Params) -> Result<Vec<u8>, KeyvalError> {
    let properties = SecretProperties {
        data: p.get("data"),
        file: p.get("file"),
        format: p.get("format"),
        keyid: p.get("keyid"),
        iv: p.get("iv"),
    };
    properties.read().map_err(KeyvalError::Other)
}

/// Identifiers of one kind of thing must differ.
fn unique<'a>(kind: &str, ids: impl Iterator<Item = &'a str>) -> Result<(), CliError> {
    let mut seen = std::collections::BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(CliError::Plain(format!("Duplicate ID '{id}' for {kind}")));
        }
    }
    Ok(())
}

/// The accelerators of a list, in its order.
fn accels(option: &str, names: &str) -> Result<Vec<AccelWish>, CliError> {
    if names.is_empty() {
        return Err(CliError::Plain("no accelerator found".into()));
    }
    let option = if names.contains(':') { "" } else { option };
    Ok(names.split(':').map(|name| AccelWish { option: option.to_owned(), name: name.to_owned() }).collect())
}
