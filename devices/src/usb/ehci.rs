//! The USB 2 controllers of ICH9 and their like (Enhanced Host Controller Interface 1.0). All devices here are full-speed
//! ones, which such a controller leaves to its companions (4.2): so its ports are always its companions', its schedules have nobody to
//! talk to, and none is executed. What a driver waits for (the schedules' status, the doorbell, the frame list's
//! rollover) happens.

use serde::{Deserialize, Serialize};

use super::ports;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};
use crate::registry::Build;

/// Ports of each controller.
pub const PORTS: u32 = 6;
/// Where the operational registers begin.
const OPERATIONAL: u64 = 0x20;
const SIZE: u32 = 0x1000;
/// The capability by which firmware hands the controller over (2.1.7), in configuration space.
const LEGACY: usize = 0x68;

// USBCMD (2.3.1)
const RUN: u32 = 1;
const RESET: u32 = 2;
const PERIODIC: u32 = 0x10;
const ASYNCHRONOUS: u32 = 0x20;
const DOORBELL: u32 = 0x40;
const COMMAND_RESET: u32 = 0x0008_0000;
// USBSTS (2.3.2)
const ROLLOVER: u32 = 8;
const ADVANCED: u32 = 0x20;
const HALTED: u32 = 0x1000;
const PERIODIC_RUNS: u32 = 0x4000;
const ASYNCHRONOUS_RUNS: u32 = 0x8000;
const INTERRUPTS: u32 = 0x3F;
// PORTSC (2.3.9)
const POWER: u32 = 0x1000;
const OWNER: u32 = 0x2000;

/// Eight microframes pass in a millisecond; the frame list has 1024 frames.
const MICROFRAME_NS: u64 = 125_000;
const LIST: u64 = 8 * 1024;
const ROLLOVER_TIMER: u8 = 0;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    command: u32,
    status: u32,
    enable: u32,
    /// Microframe at `since` (virtual time in ns).
    index: u32,
    since: u64,
    periodic: u32,
    asynchronous: u32,
    configured: u32,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
}

/// The controller.
pub struct Ehci {
    name: String,
    pci: PciFunction,
    companions: u32,
    s: State,
}

/// Whether a model is such a controller.
pub fn is_ehci(driver: &str) -> bool {
    matches!(driver, "ich9-usb-ehci1" | "ich9-usb-ehci2" | "usb-ehci")
}

impl Ehci {
    /// A controller; its companions name its bus as their `masterbus`.
    pub fn new(b: &Build, device: u16, revision: u8) -> Result<Ehci, DeviceError> {
        let mut pci = PciFunction::new(
            b.devfn,
            PciId {
                vendor: 0x8086,
                device,
                revision,
                class: 0x0C_0320,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.pin(4);
        pci.set8(0x60, 0x20);
        pci.set8(0x61, 0x20);
        pci.set8(LEGACY, 1);
        pci.bar(0, Bar::Memory(SIZE));
        pci.seal();
        let bus = ports::own_bus(b.config, b.spec);
        for (port, spec) in ports::on_bus(b.config, &bus, PORTS as usize)? {
            ports::has_companion(b.config, &bus, port, spec)?;
        }
        let companions = ports::companions(b.config, &bus).count() as u32;
        Ok(Ehci { name: b.pci_name(), pci, companions, s: State::default() })
    }

    fn reset_registers(&mut self, ctx: &mut Ctx) {
        self.s = State { command: COMMAND_RESET, status: HALTED, ..State::default() };
        ctx.set_timer(ROLLOVER_TIMER, None);
        self.drive(ctx);
    }

    fn index(&self, now: u64) -> u64 {
        let passed =
            if self.s.command & RUN != 0 { now.saturating_sub(self.s.since) / MICROFRAME_NS } else { 0 };
        (u64::from(self.s.index) + passed) % (2 * LIST)
    }

    fn drive(&mut self, ctx: &mut Ctx) {
        self.pci.set_intx(ctx, self.s.status & self.s.enable & INTERRUPTS != 0);
    }

    /// The next time that the frame list begins anew.
    fn expect_rollover(&self, ctx: &mut Ctx) {
        let left = LIST - self.index(ctx.now) % LIST;
        let running = self.s.command & RUN != 0;
        ctx.set_timer(ROLLOVER_TIMER, running.then_some(ctx.now + left * MICROFRAME_NS));
    }

    fn read_dword(&self, now: u64, offset: u64) -> u32 {
        let s = &self.s;
        match offset {
            0x00 => OPERATIONAL as u32 | 0x0100 << 16,
            // Ports, and their companions with two each.
            0x04 => PORTS | if self.companions > 0 { 2 << 8 | self.companions << 12 } else { 0 },
            0x08 => (LEGACY as u32) << 8,
            0x20 => s.command,
            0x24 => {
                let runs = |flag: u32, shown: u32| {
                    if s.command & (RUN | flag) == RUN | flag {
                        shown
                    } else {
                        0
                    }
                };
                s.status | runs(PERIODIC, PERIODIC_RUNS) | runs(ASYNCHRONOUS, ASYNCHRONOUS_RUNS)
            }
            0x28 => s.enable,
            0x2C => self.index(now) as u32,
            0x34 => s.periodic,
            0x38 => s.asynchronous,
            0x60 => s.configured,
            0x64..0x7C => POWER | OWNER,
            _ => 0,
        }
    }

    fn write_dword(&mut self, ctx: &mut Ctx, offset: u64, value: u32) {
        match offset {
            0x20 if value & RESET != 0 => return self.reset_registers(ctx),
            0x20 => {
                self.s.index = self.index(ctx.now) as u32;
                self.s.since = ctx.now;
                if value & DOORBELL != 0 && value & (RUN | ASYNCHRONOUS) == RUN | ASYNCHRONOUS {
                    self.s.status |= ADVANCED;
                }
                self.s.command = value & 0x00FF_0031;
                self.s.status = self.s.status & !HALTED | if value & RUN == 0 { HALTED } else { 0 };
                self.expect_rollover(ctx);
            }
            0x24 => self.s.status &= !(value & INTERRUPTS),
            0x28 => self.s.enable = value & INTERRUPTS,
            0x2C if self.s.command & RUN == 0 => self.s.index = value & 0x3FFF,
            0x34 => self.s.periodic = value & 0xFFFF_F000,
            0x38 => self.s.asynchronous = value & 0xFFFF_FFE0,
            0x60 => self.s.configured = value & 1,
            _ => {}
        }
        self.drive(ctx);
    }
}

impl Device for Ehci {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.reset_registers(ctx);
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        let whole = u64::from(self.read_dword(ctx.now, offset & !3)) >> (8 * (offset & 3));
        match size {
            8 => whole | u64::from(self.read_dword(ctx.now, (offset & !3) + 4)) << 32,
            _ => whole,
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        // Registers are written whole.
        if size >= 4 && offset & 3 == 0 {
            self.write_dword(ctx, offset, value as u32);
            if size == 8 {
                self.write_dword(ctx, offset + 4, (value >> 32) as u32);
            }
        }
    }
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {
        if id == ROLLOVER_TIMER {
            self.s.status |= ROLLOVER;
            self.expect_rollover(ctx);
            self.drive(ctx);
        }
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), s: self.s.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        if !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        self.s = s.s;
        Ok(())
    }
}
