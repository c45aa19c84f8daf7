//! The I/O APIC (Intel 82093AA datasheet) with 24 pins.

use ftvm_accel::ApicMessage;
use serde::{Deserialize, Serialize};

/// Where the I/O APIC decodes.
pub const BASE: u64 = 0xFEC0_0000;
const PINS: usize = 24;
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;

/// What a redirection entry sends.
fn message(entry: u64) -> ApicMessage {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let address = 0xFEE0_0000 | destination << 12 | logical << 2 | logical << 3;
    let trigger = entry >> 15 & 1;
    let data = (entry & 0x7FF) | trigger << 15 | 1 << 14;
    ApicMessage { address, data: data as u32 }
}

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApic {
    id: u8,
    select: u8,
    redirect: [u64; PINS],
    lines: u32,
    /// Edges that arrived while masked are kept, as in the 82093AA's interrupt request register.
    irr: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        IoApic { id: 0, select: 0, redirect: [MASKED; PINS], lines: 0, irr: 0 }
    }
}

impl IoApic {
    /// Drive input pin `pin`.
    pub fn set_pin(&mut self, pin: u8, high: bool, out: &mut Vec<ApicMessage>) {
        if pin as usize >= PINS {
            return;
        }
        let bit = 1 << pin;
        let entry = self.redirect[pin as usize];
        let was = self.lines & bit != 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if entry & LEVEL != 0 {
            if high {
                self.irr |= bit;
            } else {
                self.irr &= !bit;
            }
            self.serve(pin as usize, out);
        } else if high && !was && entry & MASKED == 0 {
            self.irr |= bit;
            self.serve(pin as usize, out);
        }
    }

    fn serve(&mut self, pin: usize, out: &mut Vec<ApicMessage>) {
        let bit = 1 << pin;
        let entry = self.redirect[pin];
        if self.irr & bit == 0 || entry & MASKED != 0 {
            return;
        }
        if entry & LEVEL != 0 {
            if entry & REMOTE_IRR != 0 {
                return;
            }
            // Delivery by message of fixed or lowest-priority mode waits for EOI.
            if matches!(entry >> 8 & 7, 0 | 1) {
                self.redirect[pin] |= REMOTE_IRR;
            }
        } else {
            self.irr &= !bit;
        }
        out.push(message(entry));
    }

    /// What each pin would send, for those that are not masked and level-triggered.
    pub fn level_pins(&self) -> Vec<Option<ApicMessage>> {
        self.redirect.iter().map(|&e| (e & (MASKED | LEVEL) == LEVEL).then(|| message(e))).collect()
    }

    /// A local APIC ended level-triggered interrupt `vector`.
    pub fn eoi(&mut self, vector: u8, out: &mut Vec<ApicMessage>) {
        for pin in 0..PINS {
            let entry = self.redirect[pin];
            if entry as u8 == vector && entry & (REMOTE_IRR | LEVEL) == REMOTE_IRR | LEVEL {
                self.redirect[pin] &= !REMOTE_IRR;
                self.serve(pin, out);
            }
        }
    }

    /// Read at an offset of the 4 KiB window.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            0 => u32::from(self.select),
            0x10 => match self.select {
                0 | 2 => u32::from(self.id) << 24,
                1 => 0x0017_0020,
                s @ 0x10..=0x3F => {
                    let entry = self.redirect[usize::from(s - 0x10) / 2];
                    (entry >> (32 * (s & 1))) as u32
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Write at an offset of the 4 KiB window.
    pub fn write(&mut self, offset: u64, value: u32, out: &mut Vec<ApicMessage>) {
        match (offset, self.select) {
            (0, _) => self.select = value as u8,
            (0x10, 0) => self.id = (value >> 24) as u8 & 15,
            (0x10, s @ 0x10..=0x3F) => {
                let pin = usize::from(s - 0x10) / 2;
                let shift = 32 * u32::from(s & 1);
                let old = self.redirect[pin];
                let mut new = old & !(0xFFFF_FFFF << shift) | u64::from(value) << shift;
                new = new & !(READ_ONLY | 0x00FF_FFFF_FFFE_0000) | old & READ_ONLY;
                // Linux clears a stuck remote IRR by switching the pin to edge mode and back.
                if new & LEVEL == 0 {
                    new &= !REMOTE_IRR;
                    if old & LEVEL != 0 {
                        self.irr &= !(1 << pin);
                    }
                } else if self.lines >> pin & 1 != 0 {
                    self.irr |= 1 << pin;
                } else {
                    self.irr &= !(1 << pin);
                }
                self.redirect[pin] = new;
                self.serve(pin, out);
            }
            (0x40, _) => self.eoi(value as u8, out),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(io: &mut IoApic, pin: u8, entry: u64, out: &mut Vec<ApicMessage>) {
        io.write(0, u32::from(0x11 + 2 * pin), out);
        io.write(0x10, (entry >> 32) as u32, out);
        io.write(0, u32::from(0x10 + 2 * pin), out);
        io.write(0x10, entry as u32, out);
    }

    #[test]
    fn an_edge_gives_one_message() {
        let (mut io, mut out) = (IoApic::default(), Vec::new());
        set(&mut io, 4, 0x0100_0000_0000_0044, &mut out);
        io.set_pin(4, true, &mut out);
        io.set_pin(4, true, &mut out);
        assert_eq!(out, vec![ApicMessage { address: 0xFEE0_1000, data: 0x4044 }]);
        io.set_pin(4, false, &mut out);
        io.set_pin(4, true, &mut out);
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn a_level_waits_for_eoi_and_comes_again() {
        let (mut io, mut out) = (IoApic::default(), Vec::new());
        set(&mut io, 11, LEVEL | 0x51, &mut out);
        io.set_pin(11, true, &mut out);
        io.set_pin(11, false, &mut out);
        io.set_pin(11, true, &mut out);
        assert_eq!(out, vec![ApicMessage { address: 0xFEE0_0000, data: 0xC051 }]);
        io.eoi(0x51, &mut out);
        assert_eq!(out.len(), 2);
        io.set_pin(11, false, &mut out);
        io.eoi(0x51, &mut out);
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn an_unmasked_high_level_line_is_delivered() {
        let (mut io, mut out) = (IoApic::default(), Vec::new());
        set(&mut io, 9, MASKED | LEVEL | 0x61, &mut out);
        io.set_pin(9, true, &mut out);
        assert!(out.is_empty());
        set(&mut io, 9, LEVEL | 0x61, &mut out);
        assert_eq!(out.len(), 1);
        assert_eq!(io.read(0x10), (LEVEL | REMOTE_IRR | 0x61) as u32);
    }
}
