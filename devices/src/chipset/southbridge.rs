//! The PIIX3 ISA bridge (Intel 82371SB datasheet): PIRQ routing, reset control, and the port and
//! memory windows of the interrupt controllers.

use serde::{Deserialize, Serialize};

use super::ioapic;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::MachineRequest;
use crate::pci::{PciFunction, PciId, PciSaved};

const PIRQ_ROUTE: u8 = 0x60;

/// What every ISA bridge decodes: interrupt controllers, reset control, the ISA DMA controllers (which no device
/// here uses). Regions 0 to 4.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Legacy {
    reset_control: u8,
}

impl Legacy {
    pub fn ports() -> Vec<Window> {
        vec![
            Window::bytes(0, 0x20, 2),
            Window::bytes(1, 0xA0, 2),
            Window::bytes(2, 0x4D0, 2),
            Window::bytes(4, 0x00, 0x10),
            Window::bytes(4, 0xC0, 0x20),
        ]
    }

    pub fn io_apic() -> Window {
        Window::new(0, ioapic::BASE, 0x1000)
    }

    pub fn read(&self, ctx: &mut Ctx, region: u8, offset: u16) -> u8 {
        let pic = &mut ctx.board.s.pic;
        match region {
            0 | 1 => pic.read(usize::from(region), offset as u8),
            2 => pic.elcr(usize::from(offset)),
            3 => self.reset_control,
            _ => 0,
        }
    }

    pub fn write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, value: u8) {
        let pic = &mut ctx.board.s.pic;
        match region {
            0 | 1 => pic.write(usize::from(region), offset as u8, value),
            2 => pic.set_elcr(usize::from(offset), value),
            3 => {
                // 0xCF9: bit 2 starts the reset that bit 1 chooses.
                if value & 4 != 0 {
                    ctx.request(MachineRequest::Reset);
                }
                self.reset_control = value & 2;
            }
            _ => {}
        }
        ctx.board.settle();
    }

    pub fn io_apic_read(ctx: &mut Ctx, offset: u64) -> u64 {
        u64::from(ctx.board.s.ioapic.read(offset & 0xFF))
    }

    pub fn io_apic_write(ctx: &mut Ctx, offset: u64, value: u64) {
        let board = &mut ctx.board.s;
        board.ioapic.write(offset & 0xFF, value as u32, &mut board.messages);
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    legacy: Legacy,
}

/// The ISA bridge, PCI 00:01.0.
pub struct IsaBridge {
    pci: PciFunction,
    legacy: Legacy,
}

impl Default for IsaBridge {
    fn default() -> Self {
        let mut pci = PciFunction::new(
            8,
            PciId {
                vendor: 0x8086,
                device: 0x7000,
                revision: 0,
                class: 0x06_0100,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.set8(0x0E, 0x80);
        pci.set16(0x04, 7);
        pci.set16(0x06, 0x0200);
        for (at, value) in [(0x4C, 0x4D), (0x4E, 0x03), (0x69, 0x02), (0x70, 0x80), (0x76, 0x0C)] {
            pci.set8(at, value);
        }
        for (at, value) in [(0x77, 0x0C), (0x78, 0x02), (0xA0, 0x08), (0xA8, 0x0F)] {
            pci.set8(at, value);
        }
        pci.allow(0x40, &[0xFF; 0x80]);
        for i in 0..4 {
            pci.set8(usize::from(PIRQ_ROUTE) + i, 0x80);
        }
        pci.seal();
        IsaBridge { pci, legacy: Legacy::default() }
    }
}

impl IsaBridge {
    fn apply(&self, ctx: &mut Ctx) {
        for i in 0..4 {
            ctx.board.s.pirq_route[i] = self.pci.get8(usize::from(PIRQ_ROUTE) + i);
        }
        ctx.board.route_pirqs();
    }
}

impl Device for IsaBridge {
    fn name(&self) -> &str {
        "PIIX3"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.legacy = Legacy::default();
        self.apply(ctx);
    }
    fn ports(&self) -> Vec<Window> {
        Legacy::ports()
    }
    fn windows(&self) -> Vec<Window> {
        vec![Legacy::io_apic()]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, _size: u8) -> u32 {
        u32::from(self.legacy.read(ctx, region, offset))
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, _size: u8, value: u32) {
        self.legacy.write(ctx, region, offset, value as u8);
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, _size: u8) -> u64 {
        Legacy::io_apic_read(ctx, offset)
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, _size: u8, value: u64) {
        Legacy::io_apic_write(ctx, offset, value);
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn config_written(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {
        if offset < PIRQ_ROUTE + 4 && offset.saturating_add(len) > PIRQ_ROUTE {
            self.apply(ctx);
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), legacy: self.legacy.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("PIIX3", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("PIIX3".into()));
        }
        self.legacy = s.legacy;
        Ok(())
    }
}
