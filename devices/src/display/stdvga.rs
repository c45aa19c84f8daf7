//! QEMU's standard VGA (`-device VGA`) as a PCI card.

use super::vga::{self, Vga};
use super::Screen;
use crate::ctx::{pack, Ctx, Device, DeviceError, Window};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};
use crate::registry::Build;

/// The video card.
pub struct StdVga {
    name: String,
    pci: PciFunction,
    vga: Vga,
}

impl StdVga {
    /// The card that a `-device` names.
    pub fn new(b: &Build) -> Result<StdVga, DeviceError> {
        let megabytes = b.number("vgamem_mb", 16)?;
        if !(1..=256).contains(&megabytes) {
            return Err(b.bad("vgamem_mb"));
        }
        let id = PciId {
            vendor: 0x1234,
            device: 0x1111,
            revision: 2,
            class: 0x03_0000,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let vga = Vga::new(b, megabytes);
        let mut pci = PciFunction::new(b.devfn, id);
        vga.define(&mut pci);
        pci.bar(vga::REGISTERS.into(), Bar::Memory(4096));
        pci.seal();
        Ok(StdVga { name: b.pci_name(), pci, vga })
    }
}

impl Device for StdVga {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.vga.reset();
    }
    fn save(&self) -> Vec<u8> {
        [pack(&self.pci.save()), self.vga.save()].concat()
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let (pci, rest): (PciSaved, _) =
            postcard::take_from_bytes(data).map_err(|e| DeviceError::BadSection(self.name.clone(), e))?;
        if !self.pci.load(pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        self.vga.load(&self.name, rest)
    }
    fn ports(&self) -> Vec<Window> {
        self.vga.ports()
    }
    fn windows(&self) -> Vec<Window> {
        self.vga.windows()
    }
    fn pio_read(&mut self, _: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        self.vga.pio_read(region, offset, size)
    }
    fn pio_write(&mut self, _: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        self.vga.pio_write(region, offset, size, value);
    }
    fn mmio_read(&mut self, _: &mut Ctx, region: u8, offset: u64, size: u8) -> u64 {
        self.vga.mmio_read(region, offset, size)
    }
    fn mmio_write(&mut self, _: &mut Ctx, region: u8, offset: u64, size: u8, value: u64) {
        self.vga.mmio_write(region, offset, size, value);
    }
    fn screen(&self) -> Option<&dyn Screen> {
        Some(&self.vga)
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
}
