//! The PIIX4 power management function (Intel 82371AB datasheet, chapter 7).

use serde::{Deserialize, Serialize};

use super::acpi_regs::AcpiRegisters;
use super::smbus::SmbusHost;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::Input;
use crate::pci::{PciFunction, PciId, PciSaved};

/// Where GPE0 lies (QEMU's address; the FADT names it).
pub const GPE0: u64 = 0xAFE0;
/// The PCI hot-plug registers (QEMU's place).
pub const HOTPLUG: u64 = 0xAE00;
/// What the FADT's SMI_CMD port takes to turn ACPI on and off.
pub const ACPI_COMMANDS: [u8; 2] = [0xF1, 0xF0];

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    acpi: AcpiRegisters,
    smbus: SmbusHost,
}

/// The power management function, PCI 00:01.3.
pub struct Pm {
    pci: PciFunction,
    acpi: AcpiRegisters,
    smbus: SmbusHost,
}

impl Default for Pm {
    fn default() -> Self {
        let mut pci = PciFunction::new(
            0x0B,
            PciId {
                vendor: 0x8086,
                device: 0x7113,
                revision: 3,
                class: 0x06_8000,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.set16(0x06, 0x0280);
        pci.pin(1);
        pci.set32(0x40, 1);
        pci.allow(0x40, &[0xC0, 0xFF]);
        pci.allow(0x48, &[0xFF; 0x48]);
        pci.set32(0x90, 1);
        pci.allow(0x90, &[0xF0, 0xFF]);
        pci.allow(0xD2, &[0xFF; 4]);
        // APMC_EN set: there is no SMM to be set up.
        pci.set8(0x5B, 2);
        pci.seal();
        Pm { pci, acpi: AcpiRegisters::default(), smbus: SmbusHost::default() }
    }
}

impl Device for Pm {
    fn name(&self) -> &str {
        "PIIX4_PM"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.acpi.reset(ctx);
        self.smbus = SmbusHost::default();
    }
    fn ports(&self) -> Vec<Window> {
        let mut out = vec![Window::bytes(2, GPE0, 4), Window::bytes(3, 0xB2, 2), Window::new(4, HOTPLUG, 12)];
        let pm = u64::from(self.pci.get32(0x40) & 0xFFC0);
        if self.pci.get8(0x80) & 1 != 0 && pm != 0 {
            out.push(Window::new(0, pm, 64));
        }
        let smb = u64::from(self.pci.get32(0x90) & 0xFFF0);
        if self.pci.get8(0xD2) & 1 != 0 && smb != 0 {
            out.push(Window::bytes(1, smb, 16));
        }
        out
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        match region {
            0 => self.acpi.pm_read(ctx, offset, size),
            1 => u32::from(self.smbus.read(offset)),
            2 => u32::from(self.acpi.gpe_read(offset >= 2, offset & 1)),
            4 => self.acpi.hotplug_read(offset),
            _ => u32::from(self.acpi.apm_read(offset)),
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        match region {
            0 => self.acpi.pm_write(ctx, offset, size, value),
            1 => self.smbus.write(offset, value as u8),
            2 => self.acpi.gpe_write(ctx, offset >= 2, offset & 1, value as u8),
            4 => self.acpi.hotplug_write(ctx, offset, value),
            _ => self.acpi.apm_write(ctx, offset, value as u8, ACPI_COMMANDS),
        }
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
        ctx.remap();
    }
    fn version(&self) -> u32 {
        2
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), acpi: self.acpi.clone(), smbus: self.smbus.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("PIIX4_PM", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("PIIX4_PM".into()));
        }
        (self.acpi, self.smbus) = (s.acpi, s.smbus);
        Ok(())
    }
}
