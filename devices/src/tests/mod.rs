//! Tests of the machine through its ports, as a guest would drive it.

mod audio;
mod board;
mod disks;
mod garbage;
mod hotplug;
mod nets;
mod q35;
mod scsi;
mod usb;

use ftvm_accel::mem::GuestMemory;

use crate::config::{DeviceSpec, DriveSpec, NicSpec, PcConfig, SerialSpec};
use crate::door::{DiskOp, Input, Output};
use crate::pc::Pc;

/// A machine with its memory and a clock.
pub struct Rig {
    pub pc: Pc,
    pub mem: GuestMemory,
    pub now: u64,
    pub config: PcConfig,
    /// What the disks hold, by drive number.
    pub disks: Vec<Vec<u8>>,
}

pub fn device(driver: &str, properties: &[(&str, &str)]) -> DeviceSpec {
    DeviceSpec {
        driver: driver.into(),
        properties: properties.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        ..DeviceSpec::default()
    }
}

fn drive(index: u32, size: u64, cdrom: bool) -> DriveSpec {
    DriveSpec {
        index,
        size_bytes: size,
        cdrom,
        removable: cdrom,
        has_medium: true,
        serial: format!("S{index}"),
        logical_block_size: 512,
        ..DriveSpec::default()
    }
}

/// Everything the machine can have.
pub fn full_config() -> PcConfig {
    let mut disk = device("ide-hd", &[("bus", "ide.0"), ("unit", "0")]);
    disk.drive = Some(0);
    let mut cd = device("ide-cd", &[("bus", "ide.1")]);
    cd.drive = Some(1);
    let mut blk = device("virtio-blk-pci", &[("addr", "4"), ("bootindex", "1")]);
    blk.drive = Some(2);
    let mut net = device("virtio-net-pci", &[("addr", "5")]);
    net.nic = Some(0);
    let mut e1000 = device("e1000", &[("addr", "3"), ("mac", "52:54:00:00:00:02")]);
    e1000.nic = Some(1);
    let mut con = device("isa-debugcon", &[("iobase", "0x402")]);
    con.chardev = Some(7);
    let mut port = device("virtserialport", &[("name", "agent")]);
    port.chardev = Some(8);
    let mut scsi_disk = device("scsi-hd", &[("bootindex", "2"), ("wwn", "0x5000c50015ea71ac")]);
    scsi_disk.drive = Some(3);
    let mut scsi_cd = device("scsi-cd", &[("scsi-id", "4"), ("lun", "1")]);
    scsi_cd.drive = Some(4);
    PcConfig {
        ram_size: 16 << 20,
        cpus: 2,
        hpet: true,
        boot_order: "cad".into(),
        rtc_base_unix: 1_704_067_199,
        serial_ports: vec![SerialSpec { index: 0, port: 0 }, SerialSpec { index: 1, port: 1 }],
        drives: (0..5).map(|i| drive(i, 1 << 20, i == 1 || i == 4)).collect(),
        nics: vec![
            NicSpec { index: 0, mac: [0x52, 0x54, 0, 0, 0, 1] },
            NicSpec { index: 1, mac: [0x52, 0x54, 0, 0, 0, 9] },
        ],
        devices: vec![
            disk,
            cd,
            blk,
            net,
            e1000,
            con,
            device("virtio-rng-pci", &[("addr", "6")]),
            device("virtio-balloon-pci", &[("addr", "7")]),
            device("virtio-serial-pci", &[("addr", "8")]),
            port,
            device("qemu-xhci", &[("addr", "9")]),
            device("VGA", &[("addr", "a"), ("vgamem_mb", "1")]),
            device("virtio-scsi-pci", &[("addr", "c")]),
            scsi_disk,
            scsi_cd,
            device("piix3-usb-uhci", &[("addr", "1.2")]),
            device("pvpanic", &[]),
            device("isa-debug-exit", &[]),
            device("pc-testdev", &[]),
        ],
        random_seed: [3; 32],
        ..PcConfig::default()
    }
}

impl Rig {
    pub fn new() -> Rig {
        Rig::of(full_config())
    }

    pub fn of(config: PcConfig) -> Rig {
        let mem = GuestMemory::new(config.ram_size).unwrap();
        let pc = Pc::new(config.clone(), &mem).unwrap();
        let pattern = |seed: usize| (0..1 << 20).map(|i: usize| (i / 512 * 7 + i + seed) as u8).collect();
        Rig { pc, mem, now: 0, config, disks: (0..5).map(pattern).collect() }
    }

    pub fn inb(&mut self, port: u16) -> u8 {
        self.pc.io_read(&self.mem, self.now, port, 1) as u8
    }
    pub fn inw(&mut self, port: u16) -> u16 {
        self.pc.io_read(&self.mem, self.now, port, 2) as u16
    }
    pub fn inl(&mut self, port: u16) -> u32 {
        self.pc.io_read(&self.mem, self.now, port, 4)
    }
    pub fn outb(&mut self, port: u16, value: u8) {
        self.pc.io_write(&self.mem, self.now, port, 1, value.into());
    }
    pub fn outw(&mut self, port: u16, value: u16) {
        self.pc.io_write(&self.mem, self.now, port, 2, value.into());
    }
    pub fn outl(&mut self, port: u16, value: u32) {
        self.pc.io_write(&self.mem, self.now, port, 4, value);
    }
    pub fn read32(&mut self, addr: u64) -> u32 {
        self.pc.mmio_read(&self.mem, self.now, addr, 4) as u32
    }
    pub fn write32(&mut self, addr: u64, value: u32) {
        self.pc.mmio_write(&self.mem, self.now, addr, 4, value.into());
    }
    pub fn config_read(&mut self, devfn: u8, offset: u8) -> u32 {
        self.outl(0xCF8, 0x8000_0000 | u32::from(devfn) << 8 | u32::from(offset & 0xFC));
        self.inl(0xCFC)
    }
    pub fn config_write(&mut self, devfn: u8, offset: u8, value: u32) {
        self.outl(0xCF8, 0x8000_0000 | u32::from(devfn) << 8 | u32::from(offset & 0xFC));
        self.outl(0xCFC, value);
    }

    /// Let time pass, firing every timer at its deadline.
    pub fn pass(&mut self, ns: u64) {
        let end = self.now + ns;
        while let Some(t) = self.pc.next_deadline().filter(|t| *t <= end) {
            self.now = self.now.max(t);
            self.pc.advance(&self.mem, self.now);
        }
        self.now = end;
    }

    pub fn input(&mut self, input: Input) {
        self.pc.input(&self.mem, self.now, &input);
    }

    /// Do what the disks are asked; everything else that came out is returned.
    pub fn serve(&mut self) -> Vec<Output> {
        let mut others = Vec::new();
        loop {
            let outputs = self.pc.take_outputs();
            if outputs.is_empty() {
                return others;
            }
            for o in outputs {
                let Output::Disk { id, drive, op } = o else {
                    others.push(o);
                    continue;
                };
                let disk = &mut self.disks[drive as usize];
                let result = match op {
                    DiskOp::Read { offset, len } => {
                        Ok(disk[offset as usize..offset as usize + len as usize].to_vec())
                    }
                    DiskOp::Write { offset, data } => {
                        disk[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
                        Ok(Vec::new())
                    }
                    _ => Ok(Vec::new()),
                };
                self.input(Input::DiskDone { id, result });
            }
        }
    }

    /// Save, load into a fresh machine and go on with that one.
    pub fn migrate(&mut self) {
        let saved = self.pc.save();
        let hashes = self.pc.device_hashes();
        let other = GuestMemory::new(self.config.ram_size).unwrap();
        let mut fresh = Pc::new(self.config.clone(), &other).unwrap();
        fresh.load(&saved).unwrap();
        assert_eq!(fresh.save(), saved);
        assert_eq!(fresh.device_hashes(), hashes);
        assert_eq!(fresh.next_deadline(), self.pc.next_deadline());
        assert_eq!(fresh.intr(), self.pc.intr());
        self.pc = fresh;
    }
}
