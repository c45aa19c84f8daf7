//! The PIIX4 power management function (Intel 82371AB datasheet, chapter 7; ACPI 1.0, chapter 4):
//! PM1 registers, the 3.579545 MHz timer, GPE0, APM ports, and an SMBus host without devices.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Source, Window};
use crate::door::{Input, MachineRequest};
use crate::pci::{PciFunction, PciId, PciSaved};

/// The ACPI timer's clock in Hz.
const HZ: u128 = 3_579_545;
const NS: u128 = 1_000_000_000;
/// The system control interrupt.
pub const SCI: u8 = 9;
/// Where GPE0 lies (QEMU's address; the FADT names it).
pub const GPE0: u64 = 0xAFE0;
/// The PCI hot-plug registers (QEMU's place): slots that were plugged in, slots to be let go, eject.
pub const HOTPLUG: u64 = 0xAE00;
/// The GPE0 bit that says that one of them changed.
const GPE_HOTPLUG: u16 = 2;
/// What the FADT's SMI_CMD port takes to turn ACPI on and off.
pub const ACPI_ENABLE: u8 = 0xF1;
pub const ACPI_DISABLE: u8 = 0xF0;

const TMR_STS: u16 = 1;
const PWRBTN: u16 = 0x100;
const RTC_STS: u16 = 0x400;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    sts: u16,
    en: u16,
    cnt: u16,
    gpe_sts: u16,
    gpe_en: u16,
    apm: [u8; 2],
    smb: [u8; 16],
    /// Timer half-period (2^23 ticks) up to which TMR_STS was looked at.
    half: u64,
    /// Slots with something new in them, not yet told to the guest.
    up: u32,
    /// Slots that the guest is asked to let go.
    down: u32,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
}

/// The power management function, PCI 00:01.3.
pub struct Pm {
    pci: PciFunction,
    s: State,
}

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * HZ / NS) as u64
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
        Pm { pci, s: State::default() }
    }
}

impl Pm {
    fn catch_up(&mut self, ctx: &Ctx) {
        let half = ticks(ctx.now) >> 23;
        if half != self.s.half {
            self.s.half = half;
            self.s.sts |= TMR_STS;
        }
    }

    fn update(&mut self, ctx: &mut Ctx) {
        let pm1 = self.s.sts & self.s.en & (TMR_STS | PWRBTN | RTC_STS | 0x220) != 0;
        let gpe = self.s.gpe_sts & self.s.gpe_en != 0;
        ctx.set_line(SCI, Source::Sci, (pm1 || gpe) && self.s.cnt & 1 != 0);
        let at = if self.s.en & TMR_STS != 0 && self.s.sts & TMR_STS == 0 {
            let next = u128::from(self.s.half + 1) << 23;
            Some((next * NS).div_ceil(HZ) as u64)
        } else {
            None
        };
        ctx.set_timer(0, at);
    }

    fn write_control(&mut self, ctx: &mut Ctx, value: u16) {
        self.s.cnt = value & !0x2000;
        if value & 0x2000 != 0 {
            match value >> 10 & 7 {
                0 => ctx.request(MachineRequest::Poweroff),
                1 => ctx.request(MachineRequest::Suspend),
                _ => {}
            }
        }
    }

    fn pm_byte(&mut self, ctx: &Ctx, offset: u16) -> u8 {
        let word = match offset & !1 {
            0 => self.s.sts,
            2 => self.s.en,
            4 => self.s.cnt,
            8 => ticks(ctx.now) as u16,
            10 => (ticks(ctx.now) >> 16) as u16 & 0xFF,
            _ => 0,
        };
        (word >> (8 * (offset & 1))) as u8
    }

    /// The guest let go of these slots.
    fn eject(&mut self, ctx: &mut Ctx, slots: u32) {
        for slot in (0..32u8).filter(|s| slots >> s & 1 != 0) {
            self.s.down &= !(1 << slot);
            ctx.eject(slot);
        }
    }

    fn smbus_write(&mut self, offset: usize, value: u8) {
        match offset {
            0 => self.s.smb[0] &= !(value & 0x1E),
            2 => {
                self.s.smb[2] = value & 0x1F;
                if value & 0x40 != 0 {
                    // No device answers: device error.
                    self.s.smb[0] |= 4;
                }
            }
            _ => self.s.smb[offset] = value,
        }
    }
}

impl Device for Pm {
    fn name(&self) -> &str {
        "PIIX4_PM"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        // What the guest was asked to let go, it has let go now.
        self.eject(ctx, self.s.down);
        self.s = State { half: ticks(ctx.now) >> 23, ..State::default() };
        self.update(ctx);
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
            0 => {
                self.catch_up(ctx);
                let mut out = 0;
                for i in 0..u16::from(size) {
                    out |= u32::from(self.pm_byte(ctx, offset + i)) << (8 * i);
                }
                out
            }
            1 => u32::from(self.s.smb[usize::from(offset & 15)]),
            2 => {
                let word = if offset < 2 { self.s.gpe_sts } else { self.s.gpe_en };
                u32::from(word >> (8 * (offset & 1)) & 0xFF)
            }
            4 => match offset {
                0 => std::mem::take(&mut self.s.up),
                4 => self.s.down,
                _ => 0,
            },
            _ => u32::from(self.s.apm[usize::from(offset & 1)]),
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        match region {
            0 => {
                self.catch_up(ctx);
                // The registers are words; a dword write covers status and enable.
                let mask = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
                let shift = 8 * u32::from(offset & 1);
                let merge = |old: u16, value: u32| -> u16 {
                    (u32::from(old) & !(mask << shift) | (value & mask) << shift) as u16
                };
                match offset & !1 {
                    0 => {
                        self.s.sts &= !merge(0, value);
                        if size == 4 {
                            self.s.en = (value >> 16) as u16;
                        }
                    }
                    2 => self.s.en = merge(self.s.en, value),
                    4 => {
                        let cnt = merge(self.s.cnt, value);
                        self.write_control(ctx, cnt);
                    }
                    _ => {}
                }
            }
            1 => self.smbus_write(usize::from(offset & 15), value as u8),
            2 => {
                let shift = 8 * (offset & 1);
                let byte = (value as u16 & 0xFF) << shift;
                if offset < 2 {
                    self.s.gpe_sts &= !byte;
                } else {
                    self.s.gpe_en = self.s.gpe_en & !(0xFF << shift) | byte;
                }
            }
            4 => {
                if offset == 8 {
                    self.eject(ctx, value);
                }
            }
            _ => {
                self.s.apm[usize::from(offset & 1)] = value as u8;
                // Without SMM the board itself does what the firmware's handler would.
                match (offset, value as u8) {
                    (0, ACPI_ENABLE) => self.s.cnt |= 1,
                    (0, ACPI_DISABLE) => self.s.cnt &= !1,
                    _ => {}
                }
            }
        }
        self.update(ctx);
    }
    fn ask_to_eject(&mut self, ctx: &mut Ctx, slot: u8) {
        self.s.down |= 1 << (slot & 31);
        self.s.gpe_sts |= GPE_HOTPLUG;
        self.update(ctx);
    }
    fn timer(&mut self, ctx: &mut Ctx, _id: u8) {
        self.catch_up(ctx);
        self.update(ctx);
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        match input {
            Input::Powerdown => self.s.sts |= PWRBTN,
            Input::Plug(plug) => {
                self.s.up |= 1 << (plug.devfn >> 3);
                self.s.gpe_sts |= GPE_HOTPLUG;
            }
            _ => return,
        }
        self.update(ctx);
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
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), s: self.s.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack("PIIX4_PM", data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit("PIIX4_PM".into()));
        }
        self.s = s.s;
        Ok(())
    }
}
