//! The device models a user can name with `-device`. A new model is a new file and one entry here.

use std::collections::BTreeMap;

use crate::audio::hda::{self, Hda};
use crate::chipset::debug::{DebugCon, DebugExit, PvPanic};
use crate::chipset::testdev::PcTestDev;
use crate::config::{DeviceSpec, DriveSpec, NicSpec, PcConfig};
use crate::ctx::{Device, DeviceError};
use crate::display::{StdVga, VirtioVga};
use crate::net::e1000::E1000;
use crate::pci::Place;
use crate::rootport::RootPort;
use crate::usb;
use crate::usb::ehci::Ehci;
use crate::usb::uhci::{Chip, Uhci};
use crate::usb::xhci::Xhci;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::gpu::Gpu;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::scsi::Scsi;
use crate::virtio::serial::Serial;
use crate::virtio::{Layout, VirtioPci};

/// Where a model plugs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    Isa,
    Pci,
    /// A slot of the IDE controller; built by it.
    Ide,
    /// A port of a virtio-serial device; built by it.
    VirtioSerial,
    /// A port of a USB controller; built by it.
    Usb,
    /// A logical unit of a SCSI controller; built by it.
    Scsi,
    /// A codec of an HDA controller; built by it.
    Hda,
    /// Part of the board: always there, not to be named with `-device`.
    Board,
}

/// What values a property takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    Bool,
    Number,
    /// Bytes, with QEMU's suffixes.
    Size,
    Mac,
    /// The names of a back end; the machine resolves them.
    Drive,
    Netdev,
    Chardev,
}

type Builder = fn(&Build) -> Result<Box<dyn Device>, DeviceError>;

/// A device model.
pub struct Model {
    pub name: &'static str,
    pub attach: Attach,
    /// Heading in the list of devices.
    pub category: &'static str,
    pub description: &'static str,
    pub properties: &'static [(&'static str, Kind, &'static str)],
    pub(crate) build: Option<Builder>,
}

const PCI_PROPERTIES: &[(&str, Kind, &str)] = &[
    ("addr", Kind::Text, "Slot and optional function number, example: 06.0 or 06"),
    ("bus", Kind::Text, "The bus to plug into (pci.0; on a q35 pcie.0 or the id of a root port)"),
    ("multifunction", Kind::Bool, "on/off"),
];

const BLOCK: &[(&str, Kind, &str)] = &[
    ("drive", Kind::Drive, "Node name or ID of a block device to use as a backend"),
    ("bootindex", Kind::Number, "Place in the boot order"),
    ("serial", Kind::Text, "Serial number the guest sees"),
    ("logical_block_size", Kind::Number, "A power of two between 512 and 4096"),
    ("physical_block_size", Kind::Number, "A power of two between 512 and 4096"),
    ("write-cache", Kind::Text, "on/off/auto"),
    ("share-rw", Kind::Bool, "on/off"),
];

const NIC: &[(&str, Kind, &str)] = &[
    ("netdev", Kind::Netdev, "ID of a netdev to use as a backend"),
    ("mac", Kind::Mac, "Ethernet 6-byte MAC address, example: 52:54:00:12:34:56"),
    ("bootindex", Kind::Number, "Place in the boot order"),
    ("romfile", Kind::Text, "Option ROM (none is loaded)"),
    ("rombar", Kind::Text, "Option ROM BAR (none is shown)"),
];

const USB: &[(&str, Kind, &str)] =
    &[("bus", Kind::Text, "ID.0 of a USB controller"), ("port", Kind::Text, "Port, from 1")];

const COMPANION: &[(&str, Kind, &str)] = &[
    ("masterbus", Kind::Text, "Bus of the USB 2 controller whose companion this is"),
    ("firstport", Kind::Number, "First port of that bus that it serves"),
];

const SCSI: &[(&str, Kind, &str)] = &[
    ("bus", Kind::Text, "ID.0 of a virtio-scsi device"),
    ("channel", Kind::Number, "0"),
    ("scsi-id", Kind::Number, "Target, 0 to 255 (the next free one)"),
    ("lun", Kind::Number, "Logical unit, 0 to 16383 (0)"),
    ("device_id", Kind::Text, "Name in the identification page (the serial number, or the id)"),
    ("wwn", Kind::Number, "World wide name"),
    ("vendor", Kind::Text, "Vendor the guest sees (QEMU)"),
    ("product", Kind::Text, "Product the guest sees"),
    ("ver", Kind::Text, "Version the guest sees"),
    ("rotation_rate", Kind::Number, "Rotations a minute; 1: no rotating disk"),
];

const CODEC: &[(&str, Kind, &str)] = &[
    ("bus", Kind::Text, "ID.0 of an HDA controller"),
    ("cad", Kind::Number, "Codec address"),
    ("audiodev", Kind::Text, "ID of an audiodev to use as a backend"),
    ("mixer", Kind::Bool, "no effect"),
];

const VIRTIO: &[(&str, Kind, &str)] = &[
    ("disable-legacy", Kind::Text, "on/off/auto"),
    ("disable-modern", Kind::Bool, "on/off"),
    ("ioeventfd", Kind::Bool, "on kvm, the guest does not wait for what it notifies (on)"),
    ("vectors", Kind::Number, "MSI-X vectors"),
];

const GPU: &[(&str, Kind, &str)] = &[
    ("max_outputs", Kind::Number, "outputs, 1 to 16 (1)"),
    ("xres", Kind::Number, "pixels of the first output's monitor (1280)"),
    ("yres", Kind::Number, "lines of the first output's monitor (800)"),
    ("edid", Kind::Bool, "monitors describe themselves (on)"),
    ("max_hostmem", Kind::Size, "most memory for the guest's pictures (256M)"),
    ("blob", Kind::Bool, "off"),
];

const PORT: &[(&str, Kind, &str)] = &[
    ("bus", Kind::Text, "ID.0 of a virtio-serial device"),
    ("chardev", Kind::Chardev, "ID of a chardev to use as a backend"),
    ("name", Kind::Text, "Name the guest sees"),
    ("nr", Kind::Number, "Port number"),
];

const SLEEP: &[(&str, Kind, &str)] = &[
    ("disable_s3", Kind::Bool, "suspend to RAM is not offered (on)"),
    ("disable_s4", Kind::Bool, "suspend to disk is not offered (on)"),
];

/// All models, in the order of `-device help`.
pub static MODELS: &[Model] = &[
    Model {
        name: "ICH9-LPC",
        attach: Attach::Board,
        category: "Bridge",
        description: "ICH9 LPC bridge",
        properties: SLEEP,
        build: None,
    },
    Model {
        name: "PIIX4_PM",
        attach: Attach::Board,
        category: "Bridge",
        description: "power management",
        properties: SLEEP,
        build: None,
    },
    Model {
        name: "VGA",
        attach: Attach::Pci,
        category: "Display",
        description: "standard VGA",
        properties: &[
            ("vgamem_mb", Kind::Number, "MiB of video memory, 1 to 256 (16)"),
            ("rombar", Kind::Bool, "the video BIOS is shown to the firmware (on)"),
        ],
        build: Some(|b| Ok(Box::new(StdVga::new(b)?))),
    },
    Model {
        name: "e1000",
        attach: Attach::Pci,
        category: "Network",
        description: "Intel Gigabit Ethernet",
        properties: &[],
        build: Some(|b| Ok(Box::new(E1000::new(b.pci_name(), b.devfn, b.nic())))),
    },
    Model {
        name: "ide-cd",
        attach: Attach::Ide,
        category: "Storage",
        description: "virtual IDE CD-ROM",
        properties: &[("unit", Kind::Number, "0 master, 1 slave")],
        build: None,
    },
    Model {
        name: "ide-hd",
        attach: Attach::Ide,
        category: "Storage",
        description: "virtual IDE disk",
        properties: &[("unit", Kind::Number, "0 master, 1 slave")],
        build: None,
    },
    Model {
        name: "isa-debug-exit",
        attach: Attach::Isa,
        category: "Misc",
        description: "ends the program at a write",
        properties: &[("iobase", Kind::Number, "I/O port (0x501)"), ("iosize", Kind::Number, "ports (2)")],
        build: Some(|b| {
            let (base, size) = (b.port("iobase", 0x501)?, b.number("iosize", 2)?);
            Ok(Box::new(DebugExit::new(base, size.clamp(1, 4) as u16)))
        }),
    },
    Model {
        name: "isa-debugcon",
        attach: Attach::Isa,
        category: "Misc",
        description: "writes bytes to a character device",
        properties: &[
            ("iobase", Kind::Number, "I/O port (0xe9)"),
            ("readback", Kind::Number, "what reads give (0xe9)"),
            ("chardev", Kind::Chardev, "ID of a chardev to use as a backend"),
        ],
        build: Some(|b| {
            let port = b.spec.chardev.ok_or_else(|| {
                DeviceError::Config("Can't create isa-debugcon device, empty char device".into())
            })?;
            Ok(Box::new(DebugCon::new(b.port("iobase", 0xE9)?, b.number("readback", 0xE9)? as u8, port)))
        }),
    },
    Model {
        name: "isa-serial",
        attach: Attach::Isa,
        category: "Input",
        description: "serial line",
        properties: &[
            ("chardev", Kind::Chardev, "ID of a chardev to use as a backend"),
            ("index", Kind::Number, "0 COM1, 1 COM2, ..."),
        ],
        build: None,
    },
    Model {
        name: "pc-testdev",
        attach: Attach::Isa,
        category: "Misc",
        description: "for kvm-unit-tests",
        properties: &[],
        build: Some(|_| Ok(Box::<PcTestDev>::default())),
    },
    Model {
        name: "pcie-root-port",
        attach: Attach::Pci,
        category: "Bridge",
        description: "PCI Express Root Port",
        properties: &[
            ("port", Kind::Number, "port number"),
            ("chassis", Kind::Number, "chassis number"),
            ("slot", Kind::Number, "slot number"),
            ("hotplug", Kind::Bool, "what is behind it can be plugged and pulled (on)"),
        ],
        build: Some(|b| Ok(Box::new(RootPort::new(b)?))),
    },
    Model {
        name: "piix3-usb-uhci",
        attach: Attach::Pci,
        category: "USB",
        description: "PIIX3 USB controller",
        properties: COMPANION,
        build: Some(|b| Ok(Box::new(Uhci::new(b, Chip::Piix3)?))),
    },
    Model {
        name: "ich9-usb-uhci1",
        attach: Attach::Pci,
        category: "USB",
        description: "ICH9 USB controller",
        properties: COMPANION,
        build: Some(|b| Ok(Box::new(Uhci::new(b, Chip::Ich9(1))?))),
    },
    Model {
        name: "ich9-usb-uhci2",
        attach: Attach::Pci,
        category: "USB",
        description: "ICH9 USB controller",
        properties: COMPANION,
        build: Some(|b| Ok(Box::new(Uhci::new(b, Chip::Ich9(2))?))),
    },
    Model {
        name: "ich9-usb-uhci3",
        attach: Attach::Pci,
        category: "USB",
        description: "ICH9 USB controller",
        properties: COMPANION,
        build: Some(|b| Ok(Box::new(Uhci::new(b, Chip::Ich9(3))?))),
    },
    Model {
        name: "ich9-usb-ehci1",
        attach: Attach::Pci,
        category: "USB",
        description: "ICH9 USB 2 controller",
        properties: &[],
        build: Some(|b| Ok(Box::new(Ehci::new(b, 0x293A, 3)?))),
    },
    Model {
        name: "ich9-usb-ehci2",
        attach: Attach::Pci,
        category: "USB",
        description: "ICH9 USB 2 controller",
        properties: &[],
        build: Some(|b| Ok(Box::new(Ehci::new(b, 0x293C, 3)?))),
    },
    Model {
        name: "usb-ehci",
        attach: Attach::Pci,
        category: "USB",
        description: "USB 2 controller",
        properties: &[],
        build: Some(|b| Ok(Box::new(Ehci::new(b, 0x24CD, 0x10)?))),
    },
    Model {
        name: "qemu-xhci",
        attach: Attach::Pci,
        category: "USB",
        description: "USB 3 controller",
        properties: &[
            ("p2", Kind::Number, "USB 2 ports, 1 to 15 (4)"),
            ("p3", Kind::Number, "USB 3 ports, 1 to 15 (4)"),
        ],
        build: Some(|b| {
            let mut ports = [0; 2];
            for (slot, property) in ports.iter_mut().zip(["p2", "p3"]) {
                let n = b.number(property, 4)?;
                if !(1..=15).contains(&n) {
                    return Err(b.bad(property));
                }
                *slot = n as u32;
            }
            Ok(Box::new(Xhci::new(b, ports)?))
        }),
    },
    Model {
        name: "ich9-intel-hda",
        attach: Attach::Pci,
        category: "Sound",
        description: "Intel HD Audio controller (ICH9)",
        properties: &[
            ("msi", Kind::Text, "on/off/auto (none is shown)"),
            ("debug", Kind::Number, "no effect"),
        ],
        build: Some(|b| Ok(Box::new(Hda::new(b, true)?))),
    },
    Model {
        name: "intel-hda",
        attach: Attach::Pci,
        category: "Sound",
        description: "Intel HD Audio controller (ICH6)",
        properties: &[
            ("msi", Kind::Text, "on/off/auto (none is shown)"),
            ("debug", Kind::Number, "no effect"),
        ],
        build: Some(|b| Ok(Box::new(Hda::new(b, false)?))),
    },
    Model {
        name: "hda-duplex",
        attach: Attach::Hda,
        category: "Sound",
        description: "HDA codec: line out, line in (to nobody, of silence)",
        properties: CODEC,
        build: None,
    },
    Model {
        name: "hda-micro",
        attach: Attach::Hda,
        category: "Sound",
        description: "HDA codec: speaker, microphone (to nobody, of silence)",
        properties: CODEC,
        build: None,
    },
    Model {
        name: "hda-output",
        attach: Attach::Hda,
        category: "Sound",
        description: "HDA codec: line out (to nobody)",
        properties: CODEC,
        build: None,
    },
    Model {
        name: "scsi-cd",
        attach: Attach::Scsi,
        category: "Storage",
        description: "virtual SCSI CD-ROM",
        properties: SCSI,
        build: None,
    },
    Model {
        name: "scsi-hd",
        attach: Attach::Scsi,
        category: "Storage",
        description: "virtual SCSI disk",
        properties: SCSI,
        build: None,
    },
    Model {
        name: "usb-storage",
        attach: Attach::Usb,
        category: "Storage",
        description: "USB disk",
        properties: &[("removable", Kind::Bool, "the guest is told that the medium can be removed (off)")],
        build: None,
    },
    Model {
        name: "usb-kbd",
        attach: Attach::Usb,
        category: "Input",
        description: "USB keyboard",
        properties: &[],
        build: None,
    },
    Model {
        name: "usb-mouse",
        attach: Attach::Usb,
        category: "Input",
        description: "USB mouse",
        properties: &[],
        build: None,
    },
    Model {
        name: "usb-tablet",
        attach: Attach::Usb,
        category: "Input",
        description: "USB tablet",
        properties: &[],
        build: None,
    },
    Model {
        name: "virtconsole",
        attach: Attach::VirtioSerial,
        category: "Input",
        description: "console on a virtio-serial device",
        properties: PORT,
        build: None,
    },
    Model {
        name: "virtio-balloon-pci",
        attach: Attach::Pci,
        category: "Misc",
        description: "virtio memory balloon",
        properties: &[("deflate-on-oom", Kind::Bool, "the guest may take memory back when it has none")],
        build: Some(|b| {
            let balloon = Balloon::new(b.config.ram_size, b.flag("deflate-on-oom", false));
            Ok(Box::new(VirtioPci::new(b, Box::new(balloon))?))
        }),
    },
    Model {
        name: "virtio-blk-pci",
        attach: Attach::Pci,
        category: "Storage",
        description: "virtio disk",
        properties: &[],
        build: Some(|b| Ok(Box::new(VirtioPci::new(b, Box::new(Blk::new(b.drive()?)))?))),
    },
    Model {
        name: "virtio-gpu-pci",
        attach: Attach::Pci,
        category: "Display",
        description: "virtio graphics card",
        properties: GPU,
        build: Some(|b| {
            Ok(Box::new(VirtioPci::with_layout(b, Box::new(Gpu::new(b)?), Layout::MODERN, |_| ())?))
        }),
    },
    Model {
        name: "virtio-net-pci",
        attach: Attach::Pci,
        category: "Network",
        description: "virtio network card",
        properties: &[],
        build: Some(|b| Ok(Box::new(VirtioPci::new(b, Box::new(Net::new(b.nic())))?))),
    },
    Model {
        name: "virtio-rng-pci",
        attach: Attach::Pci,
        category: "Misc",
        description: "virtio random numbers",
        properties: &[("rng", Kind::Text, "ID of an rng object (the machine's own generator serves)")],
        build: Some(|b| Ok(Box::new(VirtioPci::new(b, Box::new(Rng))?))),
    },
    Model {
        name: "virtio-scsi-pci",
        attach: Attach::Pci,
        category: "Storage",
        description: "virtio SCSI controller",
        properties: &[("num_queues", Kind::Number, "request queues, 1 to 64 (1)")],
        build: Some(|b| Ok(Box::new(VirtioPci::new(b, Box::new(Scsi::new(b)?))?))),
    },
    Model {
        name: "virtio-serial-pci",
        attach: Attach::Pci,
        category: "Input",
        description: "virtio serial ports and consoles",
        properties: &[],
        build: Some(|b| Ok(Box::new(VirtioPci::new(b, Box::new(Serial::new(b)?))?))),
    },
    Model {
        name: "virtio-vga",
        attach: Attach::Pci,
        category: "Display",
        description: "virtio graphics card that is a VGA too",
        properties: GPU,
        build: Some(|b| Ok(Box::new(VirtioVga::new(b)?))),
    },
    Model {
        name: "virtserialport",
        attach: Attach::VirtioSerial,
        category: "Input",
        description: "port of a virtio-serial device",
        properties: PORT,
        build: None,
    },
    Model {
        name: "pvpanic",
        attach: Attach::Isa,
        category: "Misc",
        description: "tells that the guest panicked",
        properties: &[("ioport", Kind::Number, "I/O port (0x505)"), ("events", Kind::Number, "events (3)")],
        build: Some(|b| {
            let (ioport, events) = (b.port("ioport", 0x505)?, b.number("events", 3)? as u8);
            Ok(Box::new(PvPanic { ioport, events }))
        }),
    },
];

/// A virtio driver's name without what says which generations of the interface it has.
pub fn base_name(name: &str) -> &str {
    let stripped = name.strip_suffix("-non-transitional").or(name.strip_suffix("-transitional"));
    stripped.filter(|n| has_generations(n)).unwrap_or(name)
}

/// Whether a virtio model has names for the generations of its interface. (The graphics cards have only the modern one.)
pub fn has_generations(name: &str) -> bool {
    name.starts_with("virtio-") && name.ends_with("-pci") && name != "virtio-gpu-pci"
}

/// The model named `name`; virtio models have two further names, `-transitional` and `-non-transitional`.
pub fn model(name: &str) -> Result<&'static Model, DeviceError> {
    let base = base_name(name);
    if ["virtio-vga-gl", "virtio-gpu-gl-pci", "virtio-gpu-gl"].contains(&name) {
        return Err(DeviceError::Config(format!(
            "'{name}' is not available: nothing here draws in three dimensions (virgl); take virtio-vga or virtio-gpu-pci"
        )));
    }
    // QEMU's short name of the second.
    let base = if base == "virtio-gpu" { "virtio-gpu-pci" } else { base };
    MODELS.iter().find(|m| m.name == base).ok_or_else(|| DeviceError::UnknownModel(name.to_string()))
}

impl Model {
    /// Every property with its kind and description.
    pub fn all_properties(&self) -> Vec<(&'static str, Kind, &'static str)> {
        let mut out: Vec<_> = self.properties.to_vec();
        match self.attach {
            Attach::Pci => out.extend(PCI_PROPERTIES),
            Attach::Ide => out.push(("bus", Kind::Text, "ide.0 or ide.1, on a q35 up to ide.5")),
            Attach::Usb => out.extend(USB),
            Attach::Isa | Attach::VirtioSerial | Attach::Scsi | Attach::Hda | Attach::Board => {}
        }
        if self.category == "Storage" && self.name != "virtio-scsi-pci" {
            out.extend(BLOCK);
        }
        if self.category == "Network" {
            out.extend(NIC);
        }
        if self.name.starts_with("virtio-") {
            out.extend(VIRTIO);
        }
        out.sort_unstable_by_key(|(n, _, _)| *n);
        out
    }

    /// The bus that such a device plugs into on a machine with this root bus; empty for parts of the board.
    pub fn bus(&self, root: &str) -> String {
        match self.attach {
            Attach::Isa => "isa.0",
            Attach::Pci => root,
            Attach::Ide => "ide.0",
            Attach::VirtioSerial => "virtio-serial0.0",
            Attach::Usb => "usb.0",
            Attach::Scsi => "scsi.0",
            Attach::Hda => "hda.0",
            Attach::Board => "",
        }
        .to_owned()
    }

    /// The kind of bus, as `-device help` says it.
    pub fn bus_kind(&self) -> &'static str {
        match self.attach {
            Attach::Isa => "ISA",
            Attach::Pci => "PCI",
            Attach::Ide => "IDE",
            Attach::VirtioSerial => "virtio-serial-bus",
            Attach::Usb => "usb-bus",
            Attach::Scsi => "SCSI",
            Attach::Hda => "HDA",
            Attach::Board => "none",
        }
    }

    /// Whether the bus that `spec` names is there on a machine. PCI buses and those of the disk controller are
    /// looked for when a place on them is.
    pub fn check_bus(&self, spec: &DeviceSpec, config: &PcConfig) -> Result<(), DeviceError> {
        let all = &config.devices;
        let bus = spec.properties.get("bus").map(String::as_str);
        let serial = |d: &&DeviceSpec| base_name(&d.driver) == "virtio-serial-pci";
        let fits = match (self.attach, bus) {
            (Attach::Board, _) => {
                let text = "Parameter 'driver' expects a pluggable device type".into();
                return Err(DeviceError::Config(text));
            }
            (Attach::VirtioSerial, None) if !all.iter().any(|d| serial(&d)) => {
                let text = format!("No 'virtio-serial-bus' bus found for device '{}'", self.name);
                return Err(DeviceError::Config(text));
            }
            (Attach::Usb, None) if usb::bus_of(config, spec).is_none() => {
                return Err(DeviceError::Config(format!(
                    "No 'usb-bus' bus found for device '{}'",
                    self.name
                )));
            }
            (Attach::Scsi, None) if crate::scsi::controller(config, spec).is_none() => {
                return Err(DeviceError::Config(format!("No 'SCSI' bus found for device '{}'", self.name)));
            }
            (Attach::Hda, None) if hda::controller(config, spec).is_none() => {
                return Err(DeviceError::Config(format!("No 'HDA' bus found for device '{}'", self.name)));
            }
            (_, None) => true,
            (Attach::Hda, Some(_)) => hda::controller(config, spec).is_some(),
            (Attach::Scsi, Some(_)) => crate::scsi::controller(config, spec).is_some(),
            (Attach::Usb, Some(_)) => usb::bus_of(config, spec).is_some(),
            (Attach::Pci | Attach::Ide, Some(_)) => true,
            (Attach::Isa, Some(bus)) => bus == "isa.0",
            (Attach::VirtioSerial, Some(bus)) => all
                .iter()
                .filter(serial)
                .any(|d| d.id.as_ref().is_some_and(|id| bus.strip_suffix(".0") == Some(id))),
        };
        if fits {
            return Ok(());
        }
        Err(DeviceError::Config(format!("Bus '{}' not found", bus.unwrap_or_default())))
    }

    /// Whether a part of the board can have this value of a property: what is switched off there cannot be switched on.
    pub fn check_global(&self, key: &str, value: &str) -> Result<(), DeviceError> {
        let properties = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        self.check(&DeviceSpec { driver: self.name.into(), properties, ..DeviceSpec::default() })?;
        if key.starts_with("disable_s") && !matches!(value, "1" | "on" | "yes" | "true") {
            return Err(DeviceError::Config(format!(
                "{}.{key}={value}: this machine has no sleep states: only 1 is possible",
                self.name
            )));
        }
        Ok(())
    }

    /// Whether `spec` names only properties that exist, with values they take.
    pub fn check(&self, spec: &DeviceSpec) -> Result<(), DeviceError> {
        let known = self.all_properties();
        for (key, value) in &spec.properties {
            let Some((_, kind, _)) = known.iter().find(|(n, _, _)| n == key) else {
                return Err(DeviceError::UnknownProperty(self.name.into(), key.clone()));
            };
            let fine = match kind {
                Kind::Bool => {
                    matches!(value.as_str(), "on" | "off" | "yes" | "no" | "true" | "false" | "1" | "0")
                }
                Kind::Number => parse_number(value).is_some(),
                Kind::Size => parse_size(value).is_some(),
                Kind::Mac => parse_mac(value).is_some(),
                _ => true,
            };
            if !fine {
                return Err(DeviceError::BadValue {
                    model: self.name.into(),
                    property: key.clone(),
                    value: value.clone(),
                });
            }
        }
        Ok(())
    }
}

/// A decimal or 0x number.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Bytes: a number, with k, M, G or T behind it for powers of 1024.
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().last()?.to_ascii_lowercase() {
        b'b' if !text.starts_with("0x") => (&text[..text.len() - 1], 0),
        b'k' => (&text[..text.len() - 1], 10),
        b'm' => (&text[..text.len() - 1], 20),
        b'g' => (&text[..text.len() - 1], 30),
        b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    parse_number(number)?.checked_mul(1 << shift)
}

/// Six hexadecimal bytes between colons.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut out = [0; 6];
    let mut parts = text.split([':', '-']);
    for slot in &mut out {
        *slot = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// What a model is built from.
pub struct Build<'a> {
    pub config: &'a PcConfig,
    pub spec: &'a DeviceSpec,
    /// PCI device and function number, for PCI models.
    pub devfn: u8,
    /// The PCI bus, for PCI models.
    pub place: Place,
}

impl Build<'_> {
    /// A property's text.
    pub fn text(&self, property: &str) -> Option<&str> {
        self.spec.properties.get(property).map(String::as_str)
    }

    pub(crate) fn bad(&self, property: &str) -> DeviceError {
        DeviceError::BadValue {
            model: self.spec.driver.clone(),
            property: property.into(),
            value: self.text(property).unwrap_or("").into(),
        }
    }

    /// A numeric property.
    pub fn number(&self, property: &str, default: u64) -> Result<u64, DeviceError> {
        match self.text(property) {
            None => Ok(default),
            Some(text) => parse_number(text).ok_or_else(|| self.bad(property)),
        }
    }

    /// A property that says a number of bytes.
    pub fn size(&self, property: &str, default: u64) -> Result<u64, DeviceError> {
        match self.text(property) {
            None => Ok(default),
            Some(text) => parse_size(text).ok_or_else(|| self.bad(property)),
        }
    }

    /// An I/O port.
    pub fn port(&self, property: &str, default: u16) -> Result<u16, DeviceError> {
        u16::try_from(self.number(property, u64::from(default))?).map_err(|_| self.bad(property))
    }

    /// An on/off property; `auto` counts as the default.
    pub fn flag(&self, property: &str, default: bool) -> bool {
        match self.text(property) {
            Some("on" | "yes" | "true" | "1") => true,
            Some("off" | "no" | "false" | "0") => false,
            _ => default,
        }
    }

    /// The drive behind the device.
    pub fn drive(&self) -> Result<DriveSpec, DeviceError> {
        let found = self.spec.drive.and_then(|n| self.config.drives.iter().find(|d| d.index == n));
        let mut drive = found.cloned().ok_or_else(|| DeviceError::Config("drive property not set".into()))?;
        if let Some(serial) = self.text("serial") {
            drive.serial = serial.into();
        }
        let block = self.number("logical_block_size", u64::from(drive.logical_block_size.max(512)))?;
        if !block.is_power_of_two() || !(512..=4096).contains(&block) {
            return Err(self.bad("logical_block_size"));
        }
        drive.logical_block_size = block as u32;
        Ok(drive)
    }

    /// The network card behind the device, with its address.
    pub fn nic(&self) -> NicSpec {
        let found = self.spec.nic.and_then(|n| self.config.nics.iter().find(|d| d.index == n));
        let mut nic =
            found.cloned().unwrap_or(NicSpec { index: u32::MAX, mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56] });
        if let Some(mac) = self.text("mac").and_then(parse_mac) {
            nic.mac = mac;
        }
        nic
    }

    /// What is the same for all models.
    pub(crate) fn finish(&self, mut device: Box<dyn Device>) -> Box<dyn Device> {
        if let Some(pci) = device.pci_mut() {
            pci.put(self.place.clone());
            if self.flag("multifunction", false) {
                // Header type: there are further functions (PCI 3.0, 6.2.1).
                let header = pci.get8(0x0E) | 0x80;
                pci.set8(0x0E, header);
                pci.seal();
            }
        }
        device
    }

    /// The name of a PCI device in saved states.
    pub fn pci_name(&self) -> String {
        let bus = match self.place.bus {
            0 => String::new(),
            n => format!("{n}/"),
        };
        format!("{}@{bus}{:02x}.{}", self.spec.driver, self.devfn >> 3, self.devfn & 7)
    }

    /// Whether the device is behind a PCI Express port.
    pub fn behind_port(&self) -> bool {
        !self.place.bridges.is_empty()
    }
}

/// The text of `-device help`.
pub fn device_help() -> String {
    let mut out = String::new();
    let user = MODELS.iter().filter(|m| m.attach != Attach::Board);
    let mut categories: Vec<&str> = user.map(|m| m.category).collect();
    categories.sort_unstable();
    categories.dedup();
    for (i, category) in categories.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        out.push_str(&format!("{category} devices:\n"));
        for m in MODELS.iter().filter(|m| m.category == *category && m.attach != Attach::Board) {
            out.push_str(&format!("name \"{}\", bus {}, desc \"{}\"\n", m.name, m.bus_kind(), m.description));
        }
    }
    out
}

/// The text of `-device NAME,help`.
pub fn model_help(name: &str) -> Result<String, DeviceError> {
    let model = model(name)?;
    let mut out = format!("{name} options:\n");
    for (property, kind, description) in model.all_properties() {
        let kind = match kind {
            Kind::Bool => "bool",
            Kind::Number => "uint32",
            Kind::Size => "size",
            _ => "str",
        };
        let left = format!("  {property}=<{kind}>");
        out.push_str(&format!("{left:<25}- {description}\n"));
    }
    Ok(out)
}
