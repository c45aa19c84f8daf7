//! `pcie-root-port`: a PCI Express root port with a slot (PCI Express 3.0, 7.8; QEMU's identity). What is plugged
//! into the slot and pulled from it goes by ACPI, as QEMU has it on a q35.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::pci::{Bar, Express, PciFunction, PciId, PciSaved};
use crate::registry::Build;

const MSIX_BAR: u8 = 0;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
}

/// A root port.
pub struct RootPort {
    name: String,
    pci: PciFunction,
}

impl RootPort {
    pub fn new(b: &Build) -> Result<RootPort, DeviceError> {
        if !b.config.is_q35() {
            let text = "pcie-root-port needs a PCI Express bus; this machine has none (see -machine q35)";
            return Err(DeviceError::Config(text.into()));
        }
        if b.behind_port() {
            let text = "pcie-root-port can only be plugged into the root bus pcie.0";
            return Err(DeviceError::Config(text.into()));
        }
        let id = PciId {
            vendor: 0x1B36,
            device: 0x000C,
            revision: 0,
            class: 0x06_0400,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut pci = PciFunction::bridge(b.devfn, id);
        pci.pin(1);
        pci.bar(usize::from(MSIX_BAR), Bar::Memory(0x1000));
        pci.add_msix(MSIX_BAR, 1);
        let (slot, port) = (b.number("slot", 0)? as u16 & 0x1FFF, b.number("port", 0)? as u8);
        pci.add_express(Express::RootPort { slot, port });
        b.number("chassis", 0)?;
        pci.seal();
        Ok(RootPort { name: b.pci_name(), pci })
    }
}

impl Device for RootPort {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
    }
    fn mmio_read(&mut self, _ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        self.pci.msix_read(offset, size)
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        self.pci.msix_write(ctx, offset, size, value);
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        Ok(())
    }
}
