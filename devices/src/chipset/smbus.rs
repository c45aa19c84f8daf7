//! An SMBus host without devices (Intel 82371AB and 82801I datasheets), and ICH9's function of it.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};

/// The host controller's registers. Nothing answers on the bus.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SmbusHost([u8; 16]);

impl SmbusHost {
    pub fn read(&self, offset: u16) -> u8 {
        self.0[usize::from(offset & 15)]
    }

    pub fn write(&mut self, offset: u16, value: u8) {
        match offset & 15 {
            0 => self.0[0] &= !(value & 0x1E),
            2 => {
                self.0[2] = value & 0x1F;
                if value & 0x40 != 0 {
                    // No device answers: device error.
                    self.0[0] |= 4;
                }
            }
            at => self.0[usize::from(at)] = value,
        }
    }
}

const BAR: u8 = 4;
/// Host configuration: the host controller is enabled.
const HOST_ENABLE: u8 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    host: SmbusHost,
}

/// ICH9's SMBus function, PCI 00:1f.3.
pub struct Ich9Smbus {
    pci: PciFunction,
    host: SmbusHost,
}

impl Default for Ich9Smbus {
    fn default() -> Self {
        let id = PciId {
            vendor: 0x8086,
            device: 0x2930,
            revision: 2,
            class: 0x0C_0500,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let mut pci = PciFunction::new(0xFB, id);
        pci.pin(1);
        pci.bar(usize::from(BAR), Bar::Io(64));
        pci.allow(0x40, &[0x1F]);
        pci.seal();
        Ich9Smbus { pci, host: SmbusHost::default() }
    }
}

impl Device for Ich9Smbus {
    fn name(&self) -> &str {
        "ICH9-SMB"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.host = SmbusHost::default();
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, _region: u8, offset: u16, size: u8) -> u32 {
        if self.pci.get8(0x40) & HOST_ENABLE == 0 {
            return u32::MAX;
        }
        (0..u16::from(size))
            .map(|i| {
                let byte = if offset + i < 16 { self.host.read(offset + i) } else { 0 };
                u32::from(byte) << (8 * i)
            })
            .sum()
    }
    fn pio_write(&mut self, _ctx: &mut Ctx, _region: u8, offset: u16, size: u8, value: u32) {
        if self.pci.get8(0x40) & HOST_ENABLE == 0 {
            return;
        }
        for i in (0..u16::from(size)).filter(|i| offset + i < 16) {
            self.host.write(offset + i, (value >> (8 * i)) as u8);
        }
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), host: self.host.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("ICH9-SMB", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("ICH9-SMB".into()));
        }
        self.host = s.host;
        Ok(())
    }
}
