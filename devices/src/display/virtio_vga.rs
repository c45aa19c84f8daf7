//! `virtio-vga`: a VGA until the guest's driver takes the card over, and then a virtio GPU, as one PCI function.
//!
//! As with QEMU the second base address register has both: the VGA's registers in its first page, behind them
//! virtio's structures.

use super::vga::{self, Vga};
use super::Screen;
use crate::ctx::{pack, Ctx, Device, DeviceError, Doorbell, Window};
use crate::door::Input;
use crate::pci::PciFunction;
use crate::registry::Build;
use crate::virtio::gpu::Gpu;
use crate::virtio::{Layout, VirtioPci};

/// Video memory of the VGA part in MiB.
const MEGABYTES: u64 = 8;
/// Bytes of the VGA's registers, in front of virtio's structures.
const VGA_REGISTERS: u64 = 0x1000;
/// The class code of a VGA.
const CLASS: u32 = 0x03_0000;

/// The video card.
pub struct VirtioVga {
    vga: Vga,
    virtio: VirtioPci,
}

impl VirtioVga {
    /// The card that a `-device` names.
    pub fn new(b: &Build) -> Result<VirtioVga, DeviceError> {
        let vga = Vga::new(b, MEGABYTES);
        let gpu = Box::new(Gpu::new(b)?);
        let virtio = VirtioPci::with_layout(b, gpu, Layout::behind_vga(CLASS), |pci| vga.define(pci))?;
        Ok(VirtioVga { vga, virtio })
    }

    fn is_virtio(&self, region: u8, offset: u64) -> bool {
        region == self.virtio.msix_region() || region == vga::REGISTERS && offset >= VGA_REGISTERS
    }
}

impl Device for VirtioVga {
    fn name(&self) -> &str {
        self.virtio.name()
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.virtio.reset(ctx);
        self.vga.reset();
    }
    fn save(&self) -> Vec<u8> {
        [pack(&self.virtio.save()), self.vga.save()].concat()
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let name = self.virtio.name().to_owned();
        let (virtio, rest): (Vec<u8>, _) =
            postcard::take_from_bytes(data).map_err(|e| DeviceError::BadSection(name.clone(), e))?;
        self.virtio.load(&virtio)?;
        self.vga.load(&name, rest)
    }
    fn ports(&self) -> Vec<Window> {
        self.vga.ports()
    }
    fn windows(&self) -> Vec<Window> {
        self.vga.windows()
    }
    fn doorbells(&self) -> Vec<Doorbell> {
        self.virtio.doorbells()
    }
    fn ring(&mut self, ctx: &mut Ctx, n: usize) {
        self.virtio.ring(ctx, n);
    }
    fn pio_read(&mut self, _: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        self.vga.pio_read(region, offset, size)
    }
    fn pio_write(&mut self, _: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        self.vga.pio_write(region, offset, size, value);
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8) -> u64 {
        match self.is_virtio(region, offset) {
            true => self.virtio.mmio_read(ctx, region, offset, size),
            false => self.vga.mmio_read(region, offset, size),
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8, value: u64) {
        match self.is_virtio(region, offset) {
            true => self.virtio.mmio_write(ctx, region, offset, size, value),
            false => self.vga.mmio_write(region, offset, size, value),
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        self.virtio.input(ctx, input);
    }
    fn screen(&self) -> Option<&dyn Screen> {
        // The driver's picture, if it has shown one since the last reset.
        self.virtio.screen().filter(|s| s.is_used()).or(Some(&self.vga))
    }
    fn pci(&self) -> Option<&PciFunction> {
        self.virtio.pci()
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        self.virtio.pci_mut()
    }
    fn config_reading(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {
        self.virtio.config_reading(ctx, offset, len);
    }
    fn config_written(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {
        self.virtio.config_written(ctx, offset, len);
    }
}
