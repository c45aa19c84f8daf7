//! What a machine is made of, as the command line describes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The configuration of a `pc` machine. Two machines of equal configuration behave the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcConfig {
    /// Bytes of RAM.
    pub ram_size: u64,
    pub cpus: u32,
    /// The firmware image; the machine puts it into guest memory.
    pub firmware: Vec<u8>,
    /// The option ROMs of video cards, by model.
    pub video_bios: BTreeMap<String, Vec<u8>>,
    /// The machine's versioned name; it says which chipset it has.
    pub machine: String,
    pub uuid: [u8; 16],
    pub name: Option<String>,
    /// Unix time that the real-time clock shows at virtual time 0.
    pub rtc_base_unix: i64,
    /// `-boot order=`: a, c, d, n.
    pub boot_order: String,
    pub boot_menu: bool,
    /// Milliseconds the boot menu waits, if given.
    pub boot_splash_time: Option<u32>,
    pub boot_strict: bool,
    pub kernel: Option<KernelImages>,
    pub hpet: bool,
    pub serial_ports: Vec<SerialSpec>,
    /// Firmware's text goes to the first serial line.
    pub nographic: bool,
    pub drives: Vec<DriveSpec>,
    pub nics: Vec<NicSpec>,
    pub devices: Vec<DeviceSpec>,
    /// Seeds the machine's random numbers.
    pub random_seed: [u8; 32],
}

impl PcConfig {
    /// Whether this is Intel's Q35 with ICH9, not the i440FX with PIIX.
    pub fn is_q35(&self) -> bool {
        is_q35(&self.machine)
    }

    /// The name of the root PCI bus.
    pub fn root_bus(&self) -> &'static str {
        if self.is_q35() {
            "pcie.0"
        } else {
            "pci.0"
        }
    }

    /// RAM below 4 GiB: QEMU leaves more room for PCI on a q35.
    pub fn low_ram(&self) -> u64 {
        match (self.is_q35(), self.ram_size) {
            (true, size) if size >= 0xB000_0000 => 0x8000_0000,
            (false, size) if size >= 0xE000_0000 => 0xC000_0000,
            (_, size) => size,
        }
    }
}

/// Whether a machine of this name has Intel's Q35 chipset.
pub fn is_q35(machine: &str) -> bool {
    machine == "q35" || machine.starts_with("pc-q35-")
}

/// What `-kernel`, `-append` and `-initrd` gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelImages {
    /// The file's name, which multiboot kernels see in front of their command line.
    pub name: String,
    pub kernel: Vec<u8>,
    pub cmdline: String,
    /// One initial RAM disk; for multiboot any number of modules.
    pub initrds: Vec<InitrdFile>,
}

/// An initial RAM disk or multiboot module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitrdFile {
    /// The file's name with its arguments, as given ("file args").
    pub name: String,
    pub data: Vec<u8>,
}

/// A serial line COM`index + 1` connected to character device `port`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialSpec {
    pub index: u32,
    pub port: u32,
}

/// A drive that some device uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveSpec {
    /// Its number in `Output::Disk`.
    pub index: u32,
    pub size_bytes: u64,
    pub read_only: bool,
    pub cdrom: bool,
    pub removable: bool,
    /// A CD drive without a disc has none.
    pub has_medium: bool,
    pub serial: String,
    pub logical_block_size: u32,
    /// The id of the device in front of it (CD drives: their medium is changed by it).
    pub device: String,
}

/// A network back end's guest side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// Its number in `Output::NetTx`.
    pub index: u32,
    pub mac: [u8; 6],
}

/// One `-device` (or what a short option stands for).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    pub driver: String,
    pub id: Option<String>,
    /// Properties as given (`addr`, `bus`, `bootindex`, `mac`, ...), without `id`.
    pub properties: BTreeMap<String, String>,
    /// `DriveSpec::index` of what the `drive` property names.
    pub drive: Option<u32>,
    /// `NicSpec::index` of what the `netdev` property names.
    pub nic: Option<u32>,
    /// Character device number of what the `chardev` property names.
    pub chardev: Option<u32>,
}
