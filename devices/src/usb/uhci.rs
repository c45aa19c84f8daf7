//! The PIIX3's USB controller (Universal Host Controller Interface 1.1; 82371SB datasheet, 2.5). Its two ports are
//! empty: there are no USB devices, so a schedule has nobody to talk to and none is executed.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};

const RUN: u16 = 1;
const HC_RESET: u16 = 2;
const GLOBAL_RESET: u16 = 4;
const HALTED: u16 = 0x20;
/// A port register's fixed bit.
const PORT_FIXED: u16 = 0x80;
/// Frames are 1 ms apart; the counter has 11 bits.
const FRAME_NS: u64 = 1_000_000;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    command: u16,
    status: u16,
    enable: u16,
    /// Frame number at `since` (virtual time in ns, when the schedule was started).
    frame: u16,
    since: u64,
    base: u32,
    start_of_frame: u8,
    ports: [u16; 2],
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
}

/// The controller.
pub struct Uhci {
    name: String,
    pci: PciFunction,
    s: State,
}

impl Uhci {
    pub fn new(name: String, devfn: u8) -> Uhci {
        let mut pci = PciFunction::new(
            devfn,
            PciId {
                vendor: 0x8086,
                device: 0x7020,
                revision: 1,
                class: 0x0C_0300,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.pin(4);
        pci.set8(0x60, 0x10);
        pci.bar(4, Bar::Io(32));
        pci.seal();
        Uhci { name, pci, s: State::default() }
    }

    fn reset_registers(&mut self) {
        self.s = State { status: HALTED, start_of_frame: 64, ports: [PORT_FIXED; 2], ..State::default() };
    }

    fn frame(&self, now: u64) -> u16 {
        let passed = if self.s.command & RUN != 0 { (now - self.s.since) / FRAME_NS } else { 0 };
        (u64::from(self.s.frame) + passed) as u16 & 0x7FF
    }

    fn read_word(&self, now: u64, offset: u16) -> u16 {
        match offset {
            0 => self.s.command,
            2 => self.s.status,
            4 => self.s.enable,
            6 => self.frame(now),
            8 => self.s.base as u16,
            10 => (self.s.base >> 16) as u16,
            12 => u16::from(self.s.start_of_frame),
            16 | 18 => self.s.ports[usize::from((offset / 2) & 1)],
            // What is not there looks like a port that does not exist.
            _ => 0xFF7F,
        }
    }

    fn write_word(&mut self, now: u64, offset: u16, value: u16) {
        match offset {
            0 => {
                if value & (HC_RESET | GLOBAL_RESET) != 0 {
                    self.reset_registers();
                    self.s.command = value & GLOBAL_RESET;
                    return;
                }
                self.s.frame = self.frame(now);
                self.s.since = now;
                self.s.command = value & 0xFF;
                if value & RUN != 0 {
                    self.s.status &= !HALTED;
                } else {
                    self.s.status |= HALTED;
                }
            }
            2 => self.s.status &= !(value & 0x1F),
            4 => self.s.enable = value & 15,
            6 if self.s.status & HALTED != 0 => self.s.frame = value & 0x7FF,
            8 => self.s.base = self.s.base & 0xFFFF_0000 | u32::from(value & 0xF000),
            10 => self.s.base = self.s.base & 0xFFFF | u32::from(value) << 16,
            12 => self.s.start_of_frame = value as u8 & 0x7F,
            // Suspend, reset and resume-detect are kept; nothing is connected that could be enabled.
            16 | 18 => self.s.ports[usize::from((offset / 2) & 1)] = PORT_FIXED | value & 0x1240,
            _ => {}
        }
    }
}

impl Device for Uhci {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.reset_registers();
    }
    fn pio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, size: u8) -> u32 {
        let low = u32::from(self.read_word(ctx.now, offset & !1));
        match size {
            4 => low | u32::from(self.read_word(ctx.now, (offset & !1) + 2)) << 16,
            _ => low >> (8 * (offset & 1)),
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, size: u8, value: u32) {
        match size {
            1 if offset == 12 => self.write_word(ctx.now, 12, value as u16),
            1 => {}
            2 => self.write_word(ctx.now, offset & !1, value as u16),
            _ => {
                self.write_word(ctx.now, offset & !1, value as u16);
                self.write_word(ctx.now, (offset & !1) + 2, (value >> 16) as u16);
            }
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
