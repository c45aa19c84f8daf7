//! ICH9's LPC bridge (Intel 82801I datasheet, chapter 13): PIRQ routing, the ACPI registers, reset control, the
//! interrupt controllers' windows, and of the chipset's registers those that route the functions' interrupts.

use serde::{Deserialize, Serialize};

use super::acpi_regs::AcpiRegisters;
use super::southbridge::Legacy;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window, DEVICE_ROUTE};
use crate::door::Input;
use crate::pci::{PciFunction, PciId, PciSaved};

/// The ACPI registers' address.
const PM_BASE: usize = 0x40;
const ACPI_CONTROL: usize = 0x44;
/// PIRQ A to D, and E to H.
const PIRQ_ROUTE: [usize; 2] = [0x60, 0x68];
/// The root complex registers' address.
const RCBA: usize = 0xF0;
/// Within the ACPI registers: general-purpose events, SMI enable.
pub const GPE0: u16 = 0x20;
const SMI_ENABLE: u16 = 0x30;
/// Writes to the APM port make SMIs: tells firmware that there is nothing to be set up.
const APMC_ENABLE: u32 = 0x20;
/// The PCI hot-plug registers (QEMU's place).
pub const HOTPLUG: u64 = 0xCC0;
/// What the FADT's SMI_CMD port takes to turn ACPI on and off.
pub const ACPI_COMMANDS: [u8; 2] = [2, 3];
/// The device interrupt route registers of slots 25 to 31, from the root complex's base on; slot 30 has none.
const DEVICE_ROUTES: [u64; 7] = [0x3150, 0x314C, 0x3148, 0x3146, 0x3144, 0, 0x3140];

// Regions of ports, after those of `Legacy`; the root complex's of memory.
const ACPI: u8 = 8;
const APM: u8 = 9;
const SLOTS: u8 = 10;
const ROOT: u8 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    legacy: Legacy,
    acpi: AcpiRegisters,
}

/// The LPC bridge, PCI 00:1f.0.
pub struct Ich9Lpc {
    pci: PciFunction,
    legacy: Legacy,
    acpi: AcpiRegisters,
}

impl Default for Ich9Lpc {
    fn default() -> Self {
        let id = PciId {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: 0x06_0100,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let mut pci = PciFunction::new(0xF8, id);
        pci.set8(0x0E, 0x80);
        pci.set16(0x04, 7);
        pci.set16(0x06, 0x0210);
        pci.set32(PM_BASE, 1);
        pci.allow(PM_BASE, &[0x80, 0xFF]);
        pci.allow(ACPI_CONTROL, &[0x87]);
        for at in PIRQ_ROUTE {
            pci.set32(at, 0x8080_8080);
            pci.allow(at, &[0x8F; 4]);
        }
        pci.allow(0x80, &[0xFF; 0x20]);
        pci.allow(0xD0, &[0xFF; 0x10]);
        pci.allow(RCBA, &[0x01, 0xC0, 0xFF, 0xFF]);
        pci.seal();
        Ich9Lpc { pci, legacy: Legacy::default(), acpi: AcpiRegisters::default() }
    }
}

impl Ich9Lpc {
    fn apply(&self, ctx: &mut Ctx) {
        for i in 0..8 {
            ctx.board.s.pirq_route[i] = self.pci.get8(PIRQ_ROUTE[i / 4] + i % 4);
        }
        ctx.board.route_pirqs();
    }
}

impl Device for Ich9Lpc {
    fn name(&self) -> &str {
        "ICH9-LPC"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.legacy = Legacy::default();
        self.acpi.reset(ctx);
        ctx.board.s.device_route = [DEVICE_ROUTE; 7];
        self.apply(ctx);
    }
    fn ports(&self) -> Vec<Window> {
        let mut out = Legacy::ports();
        out.push(Window::bytes(APM, 0xB2, 2));
        out.push(Window::new(SLOTS, HOTPLUG, 0x18));
        let base = u64::from(self.pci.get32(PM_BASE) & 0xFF80);
        if self.pci.get8(ACPI_CONTROL) & 0x80 != 0 && base != 0 {
            out.push(Window::new(ACPI, base, 0x80));
        }
        out
    }
    fn windows(&self) -> Vec<Window> {
        let mut out = vec![Legacy::io_apic()];
        let root = self.pci.get32(RCBA);
        if root & 1 != 0 {
            out.push(Window::new(ROOT, u64::from(root & 0xFFFF_C000), 0x4000));
        }
        out
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        match (region, offset) {
            (ACPI, GPE0..0x30) => (0..u16::from(size))
                .map(|i| u32::from(self.acpi.gpe_read(offset >= GPE0 + 8, (offset + i) & 7)) << (8 * i))
                .sum(),
            (ACPI, SMI_ENABLE) => APMC_ENABLE,
            (ACPI, 0..GPE0) => self.acpi.pm_read(ctx, offset, size),
            (ACPI, _) => 0,
            (APM, _) => u32::from(self.acpi.apm_read(offset)),
            (SLOTS, _) => self.acpi.hotplug_read(offset),
            _ => u32::from(self.legacy.read(ctx, region, offset)),
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        match (region, offset) {
            (ACPI, GPE0..0x30) => {
                for i in 0..u16::from(size) {
                    let byte = (value >> (8 * i)) as u8;
                    self.acpi.gpe_write(ctx, offset >= GPE0 + 8, (offset + i) & 7, byte);
                }
            }
            (ACPI, 0..GPE0) => self.acpi.pm_write(ctx, offset, size, value),
            (ACPI, _) => {}
            (APM, _) => self.acpi.apm_write(ctx, offset, value as u8, ACPI_COMMANDS),
            (SLOTS, _) => self.acpi.hotplug_write(ctx, offset, value),
            _ => self.legacy.write(ctx, region, offset, value as u8),
        }
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8) -> u64 {
        if region != ROOT {
            return Legacy::io_apic_read(ctx, offset);
        }
        let byte = |at: u64| {
            let place = DEVICE_ROUTES.iter().position(|r| *r == at & !1 && *r != 0);
            place.map_or(0, |i| ctx.board.s.device_route[i].to_le_bytes()[(at & 1) as usize])
        };
        (0..u64::from(size)).map(|i| u64::from(byte(offset + i)) << (8 * i)).sum()
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8, value: u64) {
        if region != ROOT {
            return Legacy::io_apic_write(ctx, offset, value);
        }
        for i in 0..u64::from(size) {
            let at = offset + i;
            if let Some(n) = DEVICE_ROUTES.iter().position(|r| *r == at & !1 && *r != 0) {
                let route = &mut ctx.board.s.device_route[n];
                let mut bytes = route.to_le_bytes();
                bytes[(at & 1) as usize] = (value >> (8 * i)) as u8;
                *route = u16::from_le_bytes(bytes);
            }
        }
        ctx.board.route_pirqs();
    }
    fn ask_to_eject(&mut self, ctx: &mut Ctx, bus: u8, slot: u8) {
        self.acpi.ask_to_eject(ctx, bus, slot);
    }
    fn announce(&mut self, ctx: &mut Ctx, bus: u8, slot: u8) {
        self.acpi.announce(ctx, bus, slot);
    }
    fn timer(&mut self, ctx: &mut Ctx, _id: u8) {
        self.acpi.timer(ctx);
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        if *input == Input::Powerdown {
            self.acpi.power_button(ctx);
        }
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn config_written(&mut self, ctx: &mut Ctx, _offset: u8, _len: u8) {
        self.apply(ctx);
        ctx.remap();
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), legacy: self.legacy.clone(), acpi: self.acpi.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("ICH9-LPC", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("ICH9-LPC".into()));
        }
        (self.legacy, self.acpi) = (s.legacy, s.acpi);
        Ok(())
    }
}
