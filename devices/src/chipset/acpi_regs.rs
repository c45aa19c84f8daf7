//! The ACPI registers (ACPI 1.0, chapter 4) that PIIX4's power management function and ICH9's LPC bridge have
//! alike: PM1, the 3.579545 MHz timer, one general-purpose event block, the APM ports, and the registers of PCI
//! hot-plug as QEMU has them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ctx::{Ctx, Source};
use crate::door::MachineRequest;

/// The ACPI timer's clock in Hz.
const HZ: u128 = 3_579_545;
const NS: u128 = 1_000_000_000;
/// The system control interrupt.
pub const SCI: u8 = 9;
/// The event bit that says that something about PCI slots changed.
const GPE_HOTPLUG: u16 = 2;

const TMR_STS: u16 = 1;
const PWRBTN: u16 = 0x100;
const RTC_STS: u16 = 0x400;

/// What changed in the slots of a bus, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Slots {
    /// With something new in them, not yet told to the guest.
    up: u32,
    /// The guest is asked to let them go.
    down: u32,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AcpiRegisters {
    sts: u16,
    en: u16,
    cnt: u16,
    gpe_sts: u16,
    gpe_en: u16,
    apm: [u8; 2],
    /// Timer half-period (2^23 ticks) up to which TMR_STS was looked at.
    half: u64,
    /// Buses with changed slots; the guest says which it means by the register after them.
    slots: BTreeMap<u32, Slots>,
    selected: u32,
}

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * HZ / NS) as u64
}

impl AcpiRegisters {
    /// System reset. What the guest was asked to let go, it has let go now.
    pub fn reset(&mut self, ctx: &mut Ctx) {
        for (bus, slots) in &self.slots {
            (0..32u8).filter(|s| slots.down >> s & 1 != 0).for_each(|s| ctx.eject(*bus as u8, s));
        }
        *self = AcpiRegisters { half: ticks(ctx.now) >> 23, ..AcpiRegisters::default() };
        self.update(ctx);
    }

    fn catch_up(&mut self, ctx: &Ctx) {
        let half = ticks(ctx.now) >> 23;
        if half != self.half {
            self.half = half;
            self.sts |= TMR_STS;
        }
    }

    fn update(&mut self, ctx: &mut Ctx) {
        let pm1 = self.sts & self.en & (TMR_STS | PWRBTN | RTC_STS | 0x220) != 0;
        let gpe = self.gpe_sts & self.gpe_en != 0;
        ctx.set_line(SCI, Source::Sci, (pm1 || gpe) && self.cnt & 1 != 0);
        let at = if self.en & TMR_STS != 0 && self.sts & TMR_STS == 0 {
            let next = u128::from(self.half + 1) << 23;
            Some((next * NS).div_ceil(HZ) as u64)
        } else {
            None
        };
        ctx.set_timer(0, at);
    }

    fn write_control(&mut self, ctx: &mut Ctx, value: u16) {
        self.cnt = value & !0x2000;
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
            0 => self.sts,
            2 => self.en,
            4 => self.cnt,
            8 => ticks(ctx.now) as u16,
            10 => (ticks(ctx.now) >> 16) as u16 & 0xFF,
            _ => 0,
        };
        (word >> (8 * (offset & 1))) as u8
    }

    /// Read the PM1 and timer block.
    pub fn pm_read(&mut self, ctx: &Ctx, offset: u16, size: u8) -> u32 {
        self.catch_up(ctx);
        (0..u16::from(size)).map(|i| u32::from(self.pm_byte(ctx, offset + i)) << (8 * i)).sum()
    }

    /// Write the PM1 block.
    pub fn pm_write(&mut self, ctx: &mut Ctx, offset: u16, size: u8, value: u32) {
        self.catch_up(ctx);
        // The registers are words; a dword write covers status and enable.
        let mask = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
        let shift = 8 * u32::from(offset & 1);
        let merge = |old: u16, value: u32| -> u16 {
            (u32::from(old) & !(mask << shift) | (value & mask) << shift) as u16
        };
        match offset & !1 {
            0 => {
                self.sts &= !merge(0, value);
                if size == 4 {
                    self.en = (value >> 16) as u16;
                }
            }
            2 => self.en = merge(self.en, value),
            4 => {
                let cnt = merge(self.cnt, value);
                self.write_control(ctx, cnt);
            }
            _ => {}
        }
        self.update(ctx);
    }

    /// Read byte `at` of the event block's status or enable register.
    pub fn gpe_read(&self, enable: bool, at: u16) -> u8 {
        let word = if enable { self.gpe_en } else { self.gpe_sts };
        word.to_le_bytes().get(usize::from(at)).copied().unwrap_or(0)
    }

    /// Write byte `at` of the event block's status or enable register.
    pub fn gpe_write(&mut self, ctx: &mut Ctx, enable: bool, at: u16, value: u8) {
        if at > 1 {
            return;
        }
        let (shift, byte) = (8 * at, u16::from(value) << (8 * at));
        if enable {
            self.gpe_en = self.gpe_en & !(0xFF << shift) | byte;
        } else {
            self.gpe_sts &= !byte;
        }
        self.update(ctx);
    }

    /// Read an APM port.
    pub fn apm_read(&self, at: u16) -> u8 {
        self.apm[usize::from(at & 1)]
    }

    /// Write an APM port. `enable` and `disable` are what the FADT names; without SMM the board itself does what
    /// the firmware's handler would.
    pub fn apm_write(&mut self, ctx: &mut Ctx, at: u16, value: u8, [enable, disable]: [u8; 2]) {
        self.apm[usize::from(at & 1)] = value;
        match at {
            0 if value == enable => self.cnt |= 1,
            0 if value == disable => self.cnt &= !1,
            _ => {}
        }
        self.update(ctx);
    }

    /// Read the hot-plug registers.
    pub fn hotplug_read(&mut self, offset: u16) -> u32 {
        let selected = self.selected;
        match offset {
            0 => self.slots.get_mut(&selected).map_or(0, |s| std::mem::take(&mut s.up)),
            4 => self.slots.get(&selected).map_or(0, |s| s.down),
            // Every slot can be let go.
            12 => u32::MAX,
            16 => selected,
            _ => 0,
        }
    }

    /// Write the hot-plug registers.
    pub fn hotplug_write(&mut self, ctx: &mut Ctx, offset: u16, value: u32) {
        match offset {
            8 => {
                let bus = self.selected;
                for slot in (0..32u8).filter(|s| value >> s & 1 != 0) {
                    if let Some(s) = self.slots.get_mut(&bus) {
                        s.down &= !(1 << slot);
                    }
                    ctx.eject(bus as u8, slot);
                }
            }
            16 => self.selected = value & 0xFF,
            _ => {}
        }
    }

    /// Something was put into a slot.
    pub fn announce(&mut self, ctx: &mut Ctx, bus: u8, slot: u8) {
        self.slots.entry(bus.into()).or_default().up |= 1 << (slot & 31);
        self.gpe_sts |= GPE_HOTPLUG;
        self.update(ctx);
    }

    /// The guest is asked to let go of a slot.
    pub fn ask_to_eject(&mut self, ctx: &mut Ctx, bus: u8, slot: u8) {
        self.slots.entry(bus.into()).or_default().down |= 1 << (slot & 31);
        self.gpe_sts |= GPE_HOTPLUG;
        self.update(ctx);
    }

    /// The timer's carry.
    pub fn timer(&mut self, ctx: &mut Ctx) {
        self.catch_up(ctx);
        self.update(ctx);
    }

    /// The power button was pressed.
    pub fn power_button(&mut self, ctx: &mut Ctx) {
        self.sts |= PWRBTN;
        self.update(ctx);
    }
}
