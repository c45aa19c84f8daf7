//! From a configuration to a machine: the blueprint (all that the guest can depend on, which a primary
//! sends to its backup) and what is opened on this host.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ftvm_accel::kvm::Kvm;
use ftvm_accel::model::CpuModel;
use ftvm_accel::tcg::SoftCpu;
use ftvm_accel::{ApicMessage, GuestMemory, Processor};
use ftvm_block::iscsi::{is_device, is_lun, LunLock};
use ftvm_block::{Image, Node, OpenOptions, Reserve};
use ftvm_devices::display::VGA_CARDS;
use ftvm_devices::registry::Attach;
use ftvm_devices::{
    DeviceError, DeviceSpec, DriveSpec, FunctionView, InitrdFile, Input, Inventory, KernelImages,
    MachineRequest, NicSpec, Output, Pc, PcConfig, Plug, SerialSpec, WindowView,
};
use serde::{Deserialize, Serialize};

use crate::cli::config::{Accel, Char, RtcBase};
use crate::cli::drive::{Backing, Cache, DriveConfig, Interface};
use crate::cli::net::{NetKind, NetdevConfig};
use crate::cli::object::is_host_own;
use crate::cli::MachineConfig;
use crate::machine::{Chipset, Machine};

/// Errors of putting a machine together.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("could not load {what} '{path}': {source}")]
    File { what: &'static str, path: String, source: std::io::Error },
    #[error("could not find firmware '{0}' (looked in {1}); on Debian: apt install seabios")]
    Firmware(String, String),
    #[error("-drive file={path}: {source}")]
    Drive { path: String, source: ftvm_block::BlockError },
    #[error("-cpu {0}: {1}")]
    Cpu(String, String),
    #[error("-device {0}: {1}")]
    Device(String, DeviceError),
    #[error("{0}")]
    Machine(#[from] DeviceError),
    #[error("-m: {0}")]
    Memory(#[from] ftvm_accel::mem::MemError),
    #[error("{0}")]
    Plain(String),
}

/// A machine's processors, and what runs them if they are the host's.
pub type Processors = (Vec<Box<dyn Processor>>, Option<Kvm>);

/// All that the guest can depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Blueprint {
    pub pc: PcConfig,
    /// What `-cpu` names, with the features that it has (of the primary's choice, where its host decides).
    pub cpu_model: CpuModel,
    pub ns_per_instruction: f64,
    /// The command line's view, for what belongs to a host (files, interfaces) and for comparing.
    pub config: MachineConfig,
    /// Which character device is connected to which target.
    pub chars: Vec<Char>,
    /// The name of each of them.
    pub labels: Vec<String>,
}

/// Nanoseconds per instruction before the host's speed is known: 100 million a second.
const DEFAULT_RATE: f64 = 10.0;

const FIRMWARE_DIRS: &[&str] = &["/usr/share/ftvm", "/usr/share/seabios", "/usr/share/qemu"];

fn load(what: &'static str, path: &str) -> Result<Vec<u8>, BuildError> {
    std::fs::read(path).map_err(|source| BuildError::File { what, path: path.to_owned(), source })
}

fn firmware(name: &str, dirs: &[String]) -> Result<Vec<u8>, BuildError> {
    if name.contains('/') || Path::new(name).exists() {
        return load("firmware", name);
    }
    let all: Vec<PathBuf> =
        dirs.iter().map(PathBuf::from).chain(FIRMWARE_DIRS.iter().map(PathBuf::from)).collect();
    for dir in &all {
        let path = dir.join(name);
        if path.exists() {
            return load("firmware", &path.to_string_lossy());
        }
    }
    let looked: Vec<String> = all.iter().map(|d| d.display().to_string()).collect();
    Err(BuildError::Firmware(name.to_owned(), looked.join(", ")))
}

fn seed() -> Result<[u8; 32], BuildError> {
    let mut seed = [0u8; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut seed))
        .map_err(|source| BuildError::File { what: "random numbers", path: "/dev/urandom".into(), source })?;
    Ok(seed)
}

/// The Unix time that the machine's clock shows at its start.
pub fn rtc_base(base: RtcBase) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    match base {
        RtcBase::Utc => now,
        RtcBase::Localtime => {
            // SAFETY: localtime_r reads the time and writes the tm, both live across the call.
            let offset = unsafe {
                let mut tm: libc::tm = std::mem::zeroed();
                libc::localtime_r(&now, &mut tm);
                tm.tm_gmtoff
            };
            now + offset
        }
        RtcBase::Fixed(t) => t,
    }
}

/// How a drive's queue serves; in a pair every write is durable before the guest is told.
pub fn queue_settings(drive: &DriveConfig, pair: bool) -> ftvm_block::queue::Settings {
    ftvm_block::queue::Settings { durable: pair || drive.is_durable(), limits: drive.limits }
}

/// Options for opening a drive's image on this host.
pub fn open_options(drive: &DriveConfig) -> OpenOptions {
    OpenOptions {
        format: drive.format.clone(),
        read_only: drive.read_only,
        locking: drive.locking,
        lock_later: false,
        force_share: false,
        direct: matches!(drive.cache, Cache::None | Cache::DirectSync),
        no_flush: drive.cache == Cache::Unsafe,
        discard: drive.discard,
        detect_zeroes: drive.detect_zeroes,
        reserve: Reserve::No,
        key_secret: drive.key_secret.clone(),
        backing_key_secret: drive.backing_key_secret.clone(),
    }
}

/// Open a drive's image; `None` for a drive without a medium. With `snapshot=on` writes go to a temporary
/// overlay that is gone with the program.
pub fn open_drive(drive: &DriveConfig, options: &OpenOptions) -> Result<Option<Box<dyn Image>>, BuildError> {
    let Some(path) = &drive.file else { return Ok(None) };
    if drive.snapshot {
        return open_snapshot(path, options)
            .map(Some)
            .map_err(|source| BuildError::Drive { path: ftvm_block::iscsi::hide_secret(path), source });
    }
    ftvm_block::open(Path::new(path), options)
        .map(Some)
        .map_err(|source| BuildError::Drive { path: ftvm_block::iscsi::hide_secret(path), source })
}

fn open_snapshot(path: &str, options: &OpenOptions) -> Result<Box<dyn Image>, ftvm_block::BlockError> {
    let below = OpenOptions { read_only: true, ..options.clone() };
    let base = ftvm_block::open(Path::new(path), &below)?;
    let (size, format) = (base.size(), base.format());
    let is_url = path.starts_with("nfs://") || path.starts_with("iscsi://");
    let whole = if is_url { PathBuf::from(path) } else { std::fs::canonicalize(path)? };
    let overlay = std::env::temp_dir()
        .join(format!("ftvm-snapshot-{}-{}", std::process::id(), whole.display()).replace('/', "_"));
    // Encrypted as the image is: it lies in a directory of everybody's.
    let name = whole.to_string_lossy();
    ftvm_block::qcow2::create_overlay(&overlay, size, Some((&name, format)), base.luks_area())?;
    let own = OpenOptions {
        format: Some("qcow2".into()),
        backing_key_secret: options.key_secret.clone(),
        ..options.clone()
    };
    let opened = ftvm_block::open(&overlay, &own);
    // The open file stays; its name need not.
    std::fs::remove_file(&overlay)?;
    opened
}

/// Finds a node that is open by its name.
pub type FindNode<'a> = &'a dyn Fn(&str) -> Option<Arc<Node>>;

fn named_node(drive: &DriveConfig, image: Option<Box<dyn Image>>) -> Result<Option<Arc<Node>>, BuildError> {
    let path = || ftvm_block::iscsi::hide_secret(drive.file.as_deref().unwrap_or_default());
    let named = image.map(|image| Node::named(&drive.id, image)).transpose();
    named.map_err(|source| BuildError::Drive { path: path(), source })
}

/// Open a drive's image as a node; `None` for a drive without a medium.
fn open_node(
    drive: &DriveConfig,
    options: &OpenOptions,
    find: FindNode,
) -> Result<Option<Arc<Node>>, BuildError> {
    let Some(path) = drive.file.as_deref().filter(|_| !drive.snapshot) else {
        return named_node(drive, open_drive(drive, options)?);
    };
    let backing = match &drive.backing {
        Backing::Header => None,
        Backing::Nothing => Some(None),
        Backing::Node(name) => Some(Some(
            find(name)
                .ok_or_else(|| BuildError::Plain(format!("Cannot find device='' nor node-name='{name}'")))?,
        )),
    };
    Node::open(&drive.id, Path::new(path), options, backing)
        .map(Some)
        .map_err(|source| BuildError::Drive { path: ftvm_block::iscsi::hide_secret(path), source })
}

/// Open a drive for a live machine: with the overlays that a takeover left, if there are any or the machine is
/// one of a pair; `over_stalled`: this side won the pair's lock, and the old primary may only be stalled.
/// In a pair an image stands on what its header names: both sides find that.
pub fn open_live(
    drive: &DriveConfig,
    pair: bool,
    over_stalled: bool,
    find: FindNode,
) -> Result<Option<Arc<Node>>, BuildError> {
    let mut options = open_options(drive);
    let Some(path) = drive.file.as_deref().map(Path::new) else { return Ok(None) };
    let named = |image: Option<Box<dyn Image>>| named_node(drive, image);
    if pair && !drive.read_only && is_device(path) {
        if let Err(e) = LunLock::open(&path.to_string_lossy()) {
            log::warn!(
                "drive '{}': {e}; with a lock elsewhere nothing keeps what a paused primary still writes from the device",
                drive.id
            );
            return open_drive(drive, &options).and_then(named);
        }
    }
    if pair && is_lun(path) {
        // The target refuses everybody else's writes from here on.
        let mut random = [0u8; 8];
        random.copy_from_slice(&seed()?[..8]);
        let key = crate::lockstep::lun_lock::alone(&format!("{:x}", u64::from_be_bytes(random)));
        options.reserve = if over_stalled { Reserve::Seize(key) } else { Reserve::Free(key) };
        return open_drive(drive, &options).and_then(named);
    }
    let overlay = if is_lun(path) { Ok(None) } else { ftvm_block::takeover::top_overlay(path) };
    let overlay = overlay.map_err(|source| BuildError::Drive { path: path.display().to_string(), source })?;
    if let Some(overlay) = overlay.as_ref().filter(|_| drive.read_only || drive.snapshot) {
        return Err(BuildError::Plain(format!(
            "drive '{}': a takeover has left data in '{}'; open the image for writing once, so that it is merged",
            drive.id,
            overlay.display()
        )));
    }
    if drive.read_only || drive.snapshot || !(pair || overlay.is_some()) {
        let own = DriveConfig { backing: Backing::Header, ..drive.clone() };
        return open_node(if pair { &own } else { drive }, &options, find);
    }
    ftvm_block::takeover::Takeover::open(path, &options, over_stalled)
        .map_err(|source| BuildError::Drive { path: path.display().to_string(), source })
        .and_then(|t| named(Some(Box::new(t))))
}

/// A backup must see the primary's byte locks on a writable image: they tell, after a takeover, whether the
/// old primary is gone or only stalled.
pub fn check_shared(drive: &DriveConfig) -> Result<(), String> {
    let Some(path) = drive.file.as_deref().filter(|_| !drive.read_only && drive.locking) else {
        return Ok(());
    };
    if is_device(Path::new(path)) && LunLock::open(path).is_err() {
        // That it is the same device is not to be seen.
        return Ok(());
    }
    if is_lun(Path::new(path)) {
        let fail = |e| format!("drive '{}': {e}", drive.id);
        let held = LunLock::open(path).and_then(|l| l.holder()).map_err(fail)?;
        return held.map(|_| ()).ok_or_else(|| {
            format!(
                "drive '{}': the primary's reservation of the LUN is not seen here: it is another LUN",
                drive.id
            )
        });
    }
    if ftvm_block::files::is_nfs(Path::new(path)) {
        // No locks there: that it is the same directory is seen by the pair's lock.
        return Ok(());
    }
    match ftvm_block::takeover::is_held(Path::new(path)) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "drive '{}': the primary's lock on '{path}' is not seen here: it is another file, or a file system whose locks do not reach other hosts",
            drive.id
        )),
        Err(e) => Err(e.to_string()),
    }
}

impl Blueprint {
    /// A new machine's blueprint; `sizes` are the drives' sizes in bytes (0: no medium).
    pub fn new(config: &MachineConfig, firmware_dirs: &[String], sizes: &[u64]) -> Result<Self, BuildError> {
        let mut chars = Vec::new();
        let mut labels = Vec::new();
        let mut serial_ports = Vec::new();
        for (index, dev) in config.serials.iter().enumerate() {
            if let Some(dev) = dev {
                serial_ports.push(SerialSpec { index: index as u32, port: chars.len() as u32 });
                labels.push(match dev {
                    Char::Id(id) => id.clone(),
                    _ => format!("serial{index}"),
                });
                chars.push(dev.clone());
            }
        }
        let given = config;
        let q35 = ftvm_devices::config::is_q35(given.machine_name());
        let mut config = given.clone();
        let mut drives = Vec::new();
        let mut devices: Vec<DeviceSpec> = Vec::new();
        for (i, (d, size)) in config.drives.iter().zip(sizes).enumerate() {
            drives.push(DriveSpec {
                index: i as u32,
                size_bytes: *size,
                read_only: d.read_only || d.cdrom,
                cdrom: d.cdrom,
                removable: d.cdrom,
                has_medium: d.file.is_some(),
                serial: d.serial.clone().unwrap_or_default(),
                logical_block_size: if d.cdrom { 2048 } else { 512 },
                device: String::new(),
            });
            let mut properties = BTreeMap::new();
            let driver = match d.interface {
                Interface::None => continue,
                Interface::Virtio => "virtio-blk-pci",
                Interface::Ide => {
                    // AHCI has one drive on each bus.
                    let units = if q35 { 1 } else { 2 };
                    properties.insert("bus".to_owned(), format!("ide.{}", d.index / units));
                    properties.insert("unit".to_owned(), (d.index % units).to_string());
                    if d.cdrom {
                        "ide-cd"
                    } else {
                        "ide-hd"
                    }
                }
            };
            devices.push(DeviceSpec {
                driver: driver.to_owned(),
                id: None,
                properties,
                drive: Some(i as u32),
                ..DeviceSpec::default()
            });
        }
        let mut nics = Vec::new();
        let mac =
            |given: Option<[u8; 6]>, n: usize| given.unwrap_or([0x52, 0x54, 0, 0x12, 0x34, 0x56 + n as u8]);
        let card = match config.vga.as_str() {
            "std" => Some("VGA"),
            "virtio" => Some("virtio-vga"),
            _ => None,
        };
        devices.extend(card.map(|card| DeviceSpec { driver: card.into(), ..DeviceSpec::default() }));
        for nic in &config.nics {
            let index = nics.len();
            nics.push(NicSpec { index: index as u32, mac: mac(nic.mac, index) });
            devices.push(DeviceSpec {
                driver: nic.model.clone(),
                nic: Some(index as u32),
                properties: BTreeMap::from([("netdev".to_owned(), nic.netdev.clone())]),
                ..DeviceSpec::default()
            });
        }
        for d in &given.devices {
            let mut spec = DeviceSpec { driver: d.driver.clone(), id: d.id.clone(), ..DeviceSpec::default() };
            for (key, value) in &d.props {
                spec.properties.insert(key.clone(), value.clone());
            }
            let fail = |text: String| BuildError::Device(d.driver.clone(), DeviceError::Config(text));
            if let Some(name) = spec.properties.get("drive") {
                let at = config.drives.iter().position(|x| &x.id == name);
                spec.drive =
                    Some(at.ok_or_else(|| {
                        fail(format!("Property '{}.drive' can't find value '{name}'", d.driver))
                    })? as u32);
            }
            let (werror, rerror) = (spec.properties.remove("werror"), spec.properties.remove("rerror"));
            if werror.is_some() || rerror.is_some() {
                let drive = spec.drive.and_then(|i| config.drives.get_mut(i as usize));
                let drive = drive.ok_or_else(|| fail("Property 'werror' needs a drive".into()))?;
                let set = drive.on_error.set(werror.as_deref(), rerror.as_deref());
                set.map_err(|e| fail(e.to_string()))?;
            }
            if let Some(name) = spec.properties.get("netdev") {
                if !config.netdevs.iter().any(|n| &n.id == name) {
                    return Err(fail(format!("Property '{}.netdev' can't find value '{name}'", d.driver)));
                }
                let index = nics.len();
                let given = spec.properties.get("mac").and_then(|m| crate::cli::net::parse_mac(m));
                nics.push(NicSpec { index: index as u32, mac: mac(given, index) });
                spec.nic = Some(index as u32);
            }
            if let Some(name) = spec.properties.get("chardev") {
                if !config.chardevs.iter().any(|(id, _)| id == name) {
                    return Err(fail(format!("Property '{}.chardev' can't find value '{name}'", d.driver)));
                }
                spec.chardev = Some(chars.len() as u32);
                labels.push(name.clone());
                if d.driver == "isa-serial" {
                    let index = spec.properties.get("index").and_then(|i| i.parse().ok());
                    let index = index.unwrap_or(serial_ports.len() as u32);
                    serial_ports.push(SerialSpec { index, port: chars.len() as u32 });
                }
                // By its name: another host has its own device of this name.
                chars.push(Char::Id(name.clone()));
            }
            if let Some(rng) = spec.properties.get("rng") {
                if !config.objects.iter().any(|(_, id)| id == rng) {
                    return Err(fail(format!("Property '{}.rng' can't find value '{rng}'", d.driver)));
                }
            }
            devices.push(spec);
        }
        if config.usb && q35 {
            let text = "usb=on: a q35 has no USB controller of its own here; add -device qemu-xhci";
            return Err(BuildError::Plain(text.into()));
        }
        if config.usb {
            devices.push(DeviceSpec {
                driver: "piix3-usb-uhci".into(),
                properties: BTreeMap::from([("addr".into(), "1.2".into())]),
                ..DeviceSpec::default()
            });
        }
        for global in &config.globals {
            let parts = global.split_once('=').and_then(|(k, v)| Some((k.rsplit_once('.')?, v)));
            let Some(((driver, key), value)) = parts else {
                return Err(BuildError::Plain(format!("-global {global}: expected driver.property=value")));
            };
            let model = ftvm_devices::registry::MODELS.iter().find(|m| m.name == driver);
            let mut used = model.is_some_and(|m| m.attach == Attach::Board);
            if let Some(m) = model.filter(|_| used) {
                m.check_global(key, value)?;
            }
            for spec in devices.iter_mut().filter(|d| d.driver == driver) {
                used = true;
                spec.properties.entry(key.to_owned()).or_insert_with(|| value.to_owned());
            }
            if !used {
                log::warn!("global {driver}.{key} has invalid class name or no device uses it");
            }
        }
        if let Some(dev) = &config.debugcon {
            devices.push(DeviceSpec {
                driver: "isa-debugcon".into(),
                chardev: Some(chars.len() as u32),
                properties: BTreeMap::from([("chardev".into(), "debugcon".into())]),
                ..DeviceSpec::default()
            });
            labels.push("debugcon".into());
            chars.push(dev.clone());
        }
        let kernel = match &config.kernel {
            None => None,
            Some(path) => {
                let mut initrds = Vec::new();
                let data = load("kernel", path)?;
                let multiboot = !matches!(data.get(0x202..0x206), Some(b"HdrS"));
                if let Some(list) = &config.initrd {
                    // Multiboot modules: "file args,file args"; anything else is one file.
                    let files: Vec<&str> = if multiboot { list.split(',').collect() } else { vec![list] };
                    for name in files {
                        let file = if multiboot { name.split(' ').next().unwrap_or(name) } else { name };
                        initrds.push(InitrdFile { name: name.to_owned(), data: load("initrd", file)? });
                    }
                }
                Some(KernelImages {
                    name: path.clone(),
                    kernel: data,
                    cmdline: config.append.clone().unwrap_or_default(),
                    initrds,
                })
            }
        };
        let mut video_bios = BTreeMap::new();
        for (card, file) in VGA_CARDS {
            if devices.iter().any(|d| d.driver == card) {
                video_bios.insert(card.to_owned(), firmware(file, firmware_dirs)?);
            }
        }
        let pc = PcConfig {
            ram_size: config.memory,
            cpus: config.cpus,
            firmware: firmware(&config.bios, firmware_dirs)?,
            video_bios,
            machine: config.machine_name().to_owned(),
            uuid: config.uuid,
            name: config.name.clone(),
            rtc_base_unix: config.rtc_base_unix,
            boot_order: config.boot_order.clone(),
            boot_menu: config.boot_menu,
            boot_splash_time: config.boot_splash_time,
            boot_strict: config.boot_strict,
            kernel,
            hpet: config.hpet,
            serial_ports,
            nographic: config.nographic,
            drives,
            nics,
            devices,
            random_seed: seed()?,
        };
        let host = match config.accel {
            Accel::Tcg => None,
            Accel::Kvm => {
                let host = ftvm_accel::kvm::host_cpuid();
                Some(host.map_err(|e| BuildError::Plain(format!("failed to initialize kvm: {e}")))?)
            }
        };
        let cpu_model = CpuModel::parse_on(&config.cpu_model, host.as_ref())
            .map_err(|e| BuildError::Cpu(config.cpu_model.clone(), e.to_string()))?;
        for place in cpu_model.lost() {
            log::warn!("host doesn't support requested feature: {place}");
        }
        // The default's SVM is not worth a word each time.
        if !cpu_model.missing().is_empty() && config.cpu_model != "qemu64" {
            let missing = cpu_model.missing().join(" ");
            log::warn!(
                "CPU model '{}' without what the processor does not have: {missing}",
                config.cpu_model
            );
        }
        let ns_per_instruction = config.icount.shift.map_or(DEFAULT_RATE, |s| f64::from(1u32 << s));
        Ok(Blueprint { pc, cpu_model, ns_per_instruction, config, chars, labels })
    }

    /// Build the machine.
    pub fn build(&self) -> Result<Machine, BuildError> {
        self.build_with(|_| ())
    }

    /// Build the machine, with each processor prepared by `prepare`.
    pub fn build_with(&self, prepare: impl Fn(&mut SoftCpu)) -> Result<Machine, BuildError> {
        let model = &self.cpu_model;
        model.check_host().map_err(|e| BuildError::Cpu(model.name().to_owned(), e.to_string()))?;
        let mem = GuestMemory::split(self.pc.ram_size, self.pc.low_ram())?;
        mem.set_firmware(self.pc.firmware.clone())?;
        let pc = Pc::new(self.pc.clone(), &mem)?;
        let cpus = self.soft_processors(prepare);
        Ok(Machine::new(cpus, Box::new(PcChipset(pc)), mem, self.ns_per_instruction))
    }

    fn soft_processors(&self, prepare: impl Fn(&mut SoftCpu)) -> Vec<Box<dyn Processor>> {
        let one = |i| {
            let mut cpu = SoftCpu::new(i, self.pc.cpus, &self.cpu_model);
            prepare(&mut cpu);
            Box::new(cpu) as Box<dyn Processor>
        };
        (0..self.pc.cpus).map(one).collect()
    }

    /// New processors of the machine, of this kind and on this memory.
    pub fn processors(
        &self,
        accel: Accel,
        mem: &GuestMemory,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Processors, BuildError> {
        match accel {
            Accel::Tcg => {
                self.cpu_model.check_software().map_err(BuildError::Plain)?;
                Ok((self.soft_processors(|_| ()), None))
            }
            Accel::Kvm => {
                let made = Kvm::new(mem, &self.cpu_model, self.pc.cpus, wake);
                let (kvm, cpus) =
                    made.map_err(|e| BuildError::Plain(format!("failed to initialize kvm: {e}")))?;
                Ok((cpus, Some(kvm)))
            }
        }
    }

    /// Build the machine on the host's processors; `wake` makes its thread look at it.
    pub fn build_on_kvm(&self, wake: Box<dyn Fn() + Send + Sync>) -> Result<Machine, BuildError> {
        let mem = GuestMemory::split(self.pc.ram_size, self.pc.low_ram())?;
        mem.set_firmware(self.pc.firmware.clone())?;
        let pc = Pc::new(self.pc.clone(), &mem)?;
        let (cpus, kvm) = self.processors(Accel::Kvm, &mem, wake)?;
        Ok(Machine::with_processors(cpus, kvm, Box::new(PcChipset(pc)), mem, self.ns_per_instruction))
    }

    /// What must be equal on both sides of a recording: a line of text for each thing, `name: value`.
    pub fn fingerprint(&self) -> String {
        let mut pc = self.pc.clone();
        let (memory, cpus) = (pc.ram_size >> 20, pc.cpus);
        (pc.ram_size, pc.cpus) = (0, 0);
        pc.random_seed = [0; 32];
        pc.rtc_base_unix = 0;
        let firmware = crc32fast::hash(&std::mem::take(&mut pc.firmware));
        let video: Vec<String> = std::mem::take(&mut pc.video_bios)
            .iter()
            .map(|(card, bios)| format!(" {card} {:08x}", crc32fast::hash(bios)))
            .collect();
        let video = video.concat();
        let kernel = pc.kernel.take().map_or("none".into(), |k| {
            let files: Vec<String> =
                k.initrds.iter().map(|i| format!("{:08x}", crc32fast::hash(&i.data))).collect();
            format!("{:08x} [{}] '{}'", crc32fast::hash(&k.kernel), files.join(" "), k.cmdline)
        });
        let devices = format!("{:?}", (std::mem::take(&mut pc.devices), std::mem::take(&mut pc.nics)));
        let drives = format!("{:?}", std::mem::take(&mut pc.drives));
        format!(
            "memory: {memory} MiB\nprocessors: {cpus}\ncpu: {}\nfirmware: {firmware:08x}{video}\nkernel: {kernel}\n\
             devices: {devices}\ndrives: {drives}\nboard: {pc:?}",
            self.cpu_model.describe()
        )
    }

    /// The first line in which two fingerprints differ, in words; `None` if they are equal.
    pub fn fingerprint_difference(was: &str, is: &str) -> Option<String> {
        if was == is {
            return None;
        }
        let found = was.lines().zip(is.lines()).find(|(a, b)| a != b).map(|(a, b)| {
            let (name, old) = a.split_once(": ").unwrap_or(("machine", a));
            format!("{name} was {old}, is {}", b.split_once(": ").map_or(b, |(_, v)| v))
        });
        Some(found.unwrap_or_else(|| "another description".into()))
    }

    /// The back end of each network card, by card number.
    pub fn netdevs(&self) -> Vec<Option<&NetdevConfig>> {
        self.pc.devices.iter().filter_map(|d| d.nic.map(|n| (n, d.properties.get("netdev")))).fold(
            vec![None; self.pc.nics.len()],
            |mut list, (n, name)| {
                if let (Some(slot), Some(name)) = (list.get_mut(n as usize), name) {
                    *slot = self.config.netdevs.iter().find(|d| &d.id == name);
                }
                list
            },
        )
    }

    /// Take over what differs on this host: files of drives, network back ends and character devices of the
    /// same id. Everything else that `given` says of the machine must agree; the first difference is returned.
    pub fn adapt(&mut self, here: &MachineConfig, given: &[String]) -> Result<(), String> {
        let mine = &mut self.config;
        let differs = |what: &str, here: String, there: String| {
            Err(format!("{what} differs: this backup says {here}, the primary {there}"))
        };
        macro_rules! same {
            ($option:literal, $field:ident) => {
                if given.iter().any(|g| g == $option) && here.$field != mine.$field {
                    return differs(
                        concat!("-", $option),
                        format!("{:?}", here.$field),
                        format!("{:?}", mine.$field),
                    );
                }
            };
        }
        same!("m", memory);
        same!("smp", cpus);
        same!("cpu", cpu_model);
        same!("machine", machine);
        same!("name", name);
        same!("uuid", uuid);
        same!("kernel", kernel);
        same!("initrd", initrd);
        same!("append", append);
        same!("bios", bios);
        same!("boot", boot_order);
        same!("rtc", rtc_base);
        same!("vga", vga);
        same!("icount", icount);
        same!("snapshot", snapshot);
        same!("device", devices);
        same!("global", globals);
        // Secrets and certificates are each host's own: they do not travel.
        mine.objects.retain(|(kind, _)| !is_host_own(kind));
        let is_other = |o: &&(String, String)| !is_host_own(&o.0);
        let others: Vec<_> = here.objects.iter().filter(is_other).cloned().collect();
        if !others.is_empty() && others != mine.objects {
            return differs("-object", format!("{others:?}"), format!("{:?}", mine.objects));
        }
        mine.objects.extend(here.objects.iter().filter(|o| is_host_own(&o.0)).cloned());
        if given.iter().any(|g| g == "no-hpet") && mine.hpet {
            return differs("-no-hpet", "off".into(), "on".into());
        }
        for d in &here.drives {
            let Some(theirs) = mine.drives.iter_mut().find(|t| t.id == d.id) else {
                return Err(format!("drive '{}' differs: the primary has none of this id", d.id));
            };
            // So are the secrets' names, where they are given.
            let key_secret = d.key_secret.clone().or(theirs.key_secret.clone());
            let backing_key_secret = d.backing_key_secret.clone().or(theirs.backing_key_secret.clone());
            let host_only = DriveConfig {
                file: theirs.file.clone(),
                locking: theirs.locking,
                key_secret: theirs.key_secret.clone(),
                backing_key_secret: theirs.backing_key_secret.clone(),
                ..d.clone()
            };
            if &host_only != theirs {
                return differs(
                    &format!("drive '{}'", d.id),
                    format!("{host_only:?}"),
                    format!("{theirs:?}"),
                );
            }
            *theirs = DriveConfig { key_secret, backing_key_secret, ..d.clone() };
        }
        for n in here.netdevs.iter().filter(|n| n.id != "__default") {
            let Some(theirs) = mine.netdevs.iter_mut().find(|t| t.id == n.id) else {
                return Err(format!("netdev '{}' differs: the primary has none of this id", n.id));
            };
            *theirs = n.clone();
        }
        for nic in here.nics.iter().filter(|n| n.netdev != "__default") {
            match mine.nics.iter().find(|t| t.netdev == nic.netdev) {
                Some(t) if t.model == nic.model && (nic.mac.is_none() || nic.mac == t.mac) => {}
                other => {
                    return differs(
                        &format!("network card '{}'", nic.netdev),
                        format!("{nic:?}"),
                        format!("{other:?}"),
                    )
                }
            }
        }
        for (id, dev) in &here.chardevs {
            let Some(theirs) = mine.chardevs.iter_mut().find(|(t, _)| t == id) else {
                return Err(format!("chardev '{id}' differs: the primary has none of this id"));
            };
            theirs.1 = dev.clone();
        }
        if given.iter().any(|g| g == "serial" || g == "nographic") {
            let devs: Vec<&Char> = here.serials.iter().flatten().collect();
            let count = self.pc.serial_ports.len();
            if devs.len() != count {
                return differs("the number of serial lines", devs.len().to_string(), count.to_string());
            }
            for (spec, dev) in self.pc.serial_ports.iter().zip(devs) {
                if let Some(slot) = self.chars.get_mut(spec.port as usize) {
                    *slot = dev.clone();
                }
            }
        }
        Ok(())
    }
}

/// Attach a network back end that delivers to `receive`.
pub fn open_net(
    dev: &NetdevConfig,
    receive: ftvm_net::Receive,
) -> Result<Box<dyn ftvm_net::Backend>, ftvm_net::NetError> {
    match &dev.kind {
        NetKind::Tap { fd: Some(fd), .. } => Ok(Box::new(ftvm_net::tap::Tap::from_fd(*fd, receive)?)),
        NetKind::Tap { ifname, script, downscript, .. } => Ok(Box::new(ftvm_net::tap::Tap::open(
            ifname.as_deref(),
            script.as_deref(),
            downscript.as_deref(),
            receive,
        )?)),
        NetKind::User { hostfwd, net, restrict, hostname } => {
            let ip = |text: &str| -> Result<Ipv4Addr, ftvm_net::NetError> {
                let text = if text.is_empty() { "0.0.0.0" } else { text };
                text.parse().map_err(|_| ftvm_net::NetError::User(format!("'{text}' is not an IPv4 address")))
            };
            let mut forwards = Vec::new();
            for f in hostfwd {
                let (host, guest) = ((ip(&f.host.0)?, f.host.1), (ip(&f.guest.0)?, f.guest.1));
                forwards.push(ftvm_net::user::Forward { udp: f.udp, host, guest });
            }
            let network = net.as_deref().map(|n| ip(n.split('/').next().unwrap_or(n))).transpose()?;
            let settings = ftvm_net::user::Settings {
                forwards,
                restricted: *restrict,
                hostname: hostname.clone(),
                network,
            };
            Ok(Box::new(ftvm_net::user::User::start(&settings, receive)?))
        }
    }
}

struct PcChipset(Pc);

impl Chipset for PcChipset {
    fn reset(&mut self, mem: &GuestMemory, now_ns: u64) {
        self.0.reset(mem, now_ns);
    }
    fn io_read(&mut self, mem: &GuestMemory, now_ns: u64, port: u16, size: u8) -> u32 {
        self.0.io_read(mem, now_ns, port, size)
    }
    fn io_write(&mut self, mem: &GuestMemory, now_ns: u64, port: u16, size: u8, value: u32) {
        self.0.io_write(mem, now_ns, port, size, value);
    }
    fn mmio_read(&mut self, mem: &GuestMemory, now_ns: u64, addr: u64, size: u8) -> u64 {
        self.0.mmio_read(mem, now_ns, addr, size)
    }
    fn mmio_write(&mut self, mem: &GuestMemory, now_ns: u64, addr: u64, size: u8, value: u64) {
        self.0.mmio_write(mem, now_ns, addr, size, value);
    }
    fn next_deadline(&self) -> Option<u64> {
        self.0.next_deadline()
    }
    fn advance(&mut self, mem: &GuestMemory, now_ns: u64) {
        self.0.advance(mem, now_ns);
    }
    fn input(&mut self, mem: &GuestMemory, now_ns: u64, input: &Input) {
        self.0.input(mem, now_ns, input);
    }
    fn intr(&self) -> bool {
        self.0.intr()
    }
    fn intr_ack(&mut self) -> u8 {
        self.0.intr_ack()
    }
    fn eoi(&mut self, vector: u8) {
        self.0.eoi(vector);
    }
    fn take_messages(&mut self) -> Vec<ApicMessage> {
        self.0.take_messages()
    }
    fn take_outputs(&mut self) -> Vec<Output> {
        self.0.take_outputs()
    }
    fn take_request(&mut self) -> Option<MachineRequest> {
        self.0.take_request()
    }
    fn has_work(&self) -> bool {
        self.0.has_work()
    }
    fn has_news(&self) -> bool {
        self.0.has_news()
    }
    fn level_pins(&self) -> Vec<Option<ApicMessage>> {
        self.0.level_pins()
    }
    fn bells_version(&self) -> u64 {
        self.0.map_version()
    }
    fn bells(&self) -> Vec<ftvm_accel::kvm::Bell> {
        self.0.bells()
    }
    fn ring(&mut self, mem: &GuestMemory, now_ns: u64, token: u64) {
        self.0.ring(mem, now_ns, token);
    }
    fn random(&mut self) -> u64 {
        self.0.random()
    }
    fn save(&self) -> Vec<u8> {
        self.0.save()
    }
    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        self.0.load(saved).map_err(|e| e.to_string())
    }
    fn pending_disk(&self) -> Vec<Output> {
        self.0.pending_disk()
    }
    fn device_hashes(&self) -> Vec<(String, u64)> {
        self.0.device_hashes()
    }
    fn inventory(&self) -> Vec<Inventory> {
        self.0.inventory()
    }
    fn screen(&self, id: Option<&str>) -> Option<&dyn ftvm_devices::Screen> {
        self.0.screen(id)
    }
    fn pci_functions(&self) -> Vec<FunctionView> {
        self.0.pci_functions()
    }
    fn windows(&self) -> (Vec<WindowView>, Vec<WindowView>) {
        self.0.windows()
    }
    fn check_plug(&mut self, plug: &Plug) -> Result<u8, String> {
        self.0.check_plug(plug).map_err(|e| e.to_string())
    }
    fn check_unplug(&self, id: &str) -> Result<(), String> {
        self.0.check_unplug(id).map_err(|e| e.to_string())
    }
}
