//! Disk controllers of the board: ICH9's AHCI, and the PIIX3 IDE controller (Intel 82371SB datasheet; ATA/ATAPI-6; Programming Interface for Bus Master IDE
//! Controller 1.0): two channels, two drives on each.

pub mod ahci;
mod ata;
mod atapi;
mod channel;

use serde::{Deserialize, Serialize};

use crate::config::DriveSpec;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::{DiskOp, Input};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};
use channel::{Channel, ChannelState};

/// Regions: command blocks, control blocks; BAR 4 is the bus master's.
const COMMAND: u8 = 0x10;
const CONTROL: u8 = 0x12;
const BUS_MASTER: u8 = 4;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    channels: [ChannelState; 2],
}

/// The IDE function, PCI 00:01.1.
pub struct Ide {
    pci: PciFunction,
    channels: [Channel; 2],
}

impl Ide {
    /// A controller with drives in its four places (primary master, primary slave, ...).
    pub fn new(drives: [Option<DriveSpec>; 4]) -> Ide {
        let mut pci = PciFunction::new(
            9,
            PciId {
                vendor: 0x8086,
                device: 0x7010,
                revision: 0,
                class: 0x01_0180,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.set16(0x06, 0x0280);
        pci.bar(usize::from(BUS_MASTER), Bar::Io(16));
        pci.allow(0x40, &[0xFF; 8]);
        pci.seal();
        let [a, b, c, d] = drives;
        Ide { pci, channels: [Channel::new([a, b], Some(14)), Channel::new([c, d], Some(15))] }
    }
}

impl Device for Ide {
    fn name(&self) -> &str {
        "piix3-ide"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.channels.iter_mut().for_each(|c| c.power_on(ctx));
    }
    fn ports(&self) -> Vec<Window> {
        vec![
            Window::new(COMMAND, 0x1F0, 8),
            Window::new(COMMAND + 1, 0x170, 8),
            Window::bytes(CONTROL, 0x3F6, 1),
            Window::bytes(CONTROL + 1, 0x376, 1),
        ]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        if region == BUS_MASTER {
            let c = &self.channels[usize::from(offset >> 3 & 1)];
            return c.bus_master_read(offset & 7, size);
        }
        let c = &mut self.channels[usize::from(region & 1)];
        match (region & !1, offset) {
            (CONTROL, _) => u32::from(c.status()),
            (_, 0) => c.data_read(ctx, size),
            (_, n) => {
                let low = c.register_read(ctx, n);
                // Wider accesses to byte registers read the same register.
                u32::from(low)
            }
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        if region == BUS_MASTER {
            let c = &mut self.channels[usize::from(offset >> 3 & 1)];
            return c.bus_master_write(ctx, offset & 7, size, value);
        }
        let c = &mut self.channels[usize::from(region & 1)];
        match (region & !1, offset) {
            (CONTROL, _) => c.control_write(ctx, value as u8),
            (_, 0) => c.data_write(ctx, size, value),
            (_, n) => c.register_write(ctx, n, value as u8),
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        for c in &mut self.channels {
            match input {
                Input::DriveResized { drive, size } => c.resized(ctx, *drive, *size),
                Input::Medium { device, open, medium } => c.medium(ctx, device, *open, *medium),
                _ => {}
            }
        }
    }
    fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        for c in &mut self.channels {
            if c.s.request == Some(id) {
                c.disk_done(ctx, op, result);
                break;
            }
        }
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved {
            pci: self.pci.save(),
            channels: [self.channels[0].s.clone(), self.channels[1].s.clone()],
        })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("piix3-ide", data)?;
        if !s.channels.iter().all(ChannelState::sound) || !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("piix3-ide".into()));
        }
        for (c, s) in self.channels.iter_mut().zip(s.channels) {
            c.s = s;
        }
        Ok(())
    }
}
