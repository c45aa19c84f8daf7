//! The PIIX3 ISA bridge (Intel 82371SB datasheet): PIRQ routing, reset control, and the port and
//! memory windows of the interrupt controllers.

use serde::{Deserialize, Serialize};

use super::ioapic;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::MachineRequest;
use crate::pci::{PciFunction, PciId, PciSaved};

const PIRQ_ROUTE: u8 = 0x60;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    reset_control: u8,
}

/// The ISA bridge, PCI 00:01.0.
pub struct IsaBridge {
    pci: PciFunction,
    reset_control: u8,
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
        IsaBridge { pci, reset_control: 0 }
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
        self.reset_control = 0;
        self.apply(ctx);
    }
    fn ports(&self) -> Vec<Window> {
        vec![
            Window::bytes(0, 0x20, 2),
            Window::bytes(1, 0xA0, 2),
            Window::bytes(2, 0x4D0, 2),
            // ISA DMA controllers: no device of this machine uses them.
            Window::bytes(4, 0x00, 0x10),
            Window::bytes(4, 0xC0, 0x20),
        ]
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::new(0, ioapic::BASE, 0x1000)]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, _size: u8) -> u32 {
        let pic = &mut ctx.board.s.pic;
        u32::from(match region {
            0 | 1 => pic.read(usize::from(region), offset as u8),
            2 => pic.elcr(usize::from(offset)),
            3 => self.reset_control,
            _ => 0,
        })
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, _size: u8, value: u32) {
        let value = value as u8;
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
    fn mmio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, _size: u8) -> u64 {
        u64::from(ctx.board.s.ioapic.read(offset & 0xFF))
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, _size: u8, value: u64) {
        let board = &mut ctx.board.s;
        board.ioapic.write(offset & 0xFF, value as u32, &mut board.messages);
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
        pack(&Saved { pci: self.pci.save(), reset_control: self.reset_control })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("PIIX3", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("PIIX3".into()));
        }
        self.reset_control = s.reset_control;
        Ok(())
    }
}
