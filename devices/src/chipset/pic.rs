//! The 8259A interrupt controller pair (Intel 8259A datasheet; PIIX3 datasheet for ELCR).

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Pic {
    /// Line levels, latched requests, masked, in service.
    lines: u8,
    irr: u8,
    imr: u8,
    isr: u8,
    /// Edge/level control: set bits are level-triggered.
    elcr: u8,
    vector_base: u8,
    /// Lowest priority + 1: the line with the highest priority.
    priority_add: u8,
    /// 0: ready, else the ICW expected next (2, 3, 4).
    init: u8,
    need_icw4: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Pic {
    /// The priority (0 highest) of the strongest line in `mask`, or 8.
    fn priority(&self, mask: u8) -> u8 {
        if mask == 0 {
            return 8;
        }
        mask.rotate_right(u32::from(self.priority_add)).trailing_zeros() as u8
    }

    /// The line to be served, if any.
    fn pending(&self, master: bool) -> Option<u8> {
        let request = self.priority(self.irr & !self.imr);
        if request == 8 {
            return None;
        }
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && master {
            in_service &= !4;
        }
        if request < self.priority(in_service) {
            Some((request + self.priority_add) & 7)
        } else {
            None
        }
    }

    fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << line;
        if self.elcr & bit != 0 {
            if high {
                self.irr |= bit;
                self.lines |= bit;
            } else {
                self.irr &= !bit;
                self.lines &= !bit;
            }
        } else if high {
            if self.lines & bit == 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    fn acknowledge(&mut self, line: u8) {
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.priority_add = (line + 1) & 7;
            }
        } else {
            self.isr |= 1 << line;
        }
        // A level-triggered request stays as long as the line is high.
        if self.elcr & (1 << line) == 0 {
            self.irr &= !(1 << line);
        }
    }

    fn reset(&mut self) {
        let (lines, elcr) = (self.lines, self.elcr);
        *self = Pic { lines, elcr, ..Pic::default() };
        self.irr = lines & elcr;
    }

    fn write(&mut self, offset: u8, value: u8) {
        if offset == 0 {
            if value & 0x10 != 0 {
                self.reset();
                self.init = 2;
                self.need_icw4 = value & 1 != 0;
                self.single = value & 2 != 0;
            } else if value & 8 != 0 {
                self.poll |= value & 4 != 0;
                if value & 2 != 0 {
                    self.read_isr = value & 1 != 0;
                }
                if value & 0x40 != 0 {
                    self.special_mask = value & 0x20 != 0;
                }
            } else {
                self.ocw2(value);
            }
            return;
        }
        match self.init {
            2 => {
                self.vector_base = value & 0xF8;
                self.init = match (self.single, self.need_icw4) {
                    (false, _) => 3,
                    (true, true) => 4,
                    (true, false) => 0,
                };
            }
            3 => self.init = if self.need_icw4 { 4 } else { 0 },
            4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.init = 0;
            }
            _ => self.imr = value,
        }
    }

    fn ocw2(&mut self, value: u8) {
        let line = value & 7;
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            1 | 5 => {
                let p = self.priority(self.isr);
                if p != 8 {
                    let served = (p + self.priority_add) & 7;
                    self.isr &= !(1 << served);
                    if value >> 5 == 5 {
                        self.priority_add = (served + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << line),
            6 => self.priority_add = (line + 1) & 7,
            7 => {
                self.isr &= !(1 << line);
                self.priority_add = (line + 1) & 7;
            }
            _ => {}
        }
    }
}

/// Master and slave 8259A, the slave on the master's line 2.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicPair {
    chips: [Pic; 2],
}

impl PicPair {
    fn cascade(&mut self) {
        let out = self.chips[1].pending(false).is_some();
        self.chips[0].set_line(2, false);
        if out {
            self.chips[0].set_line(2, true);
        } else {
            self.chips[0].irr &= !4;
        }
    }

    /// Drive line `irq` (0..15).
    pub fn set_irq(&mut self, irq: u8, high: bool) {
        if irq < 8 {
            self.chips[0].set_line(irq, high);
        } else {
            self.chips[1].set_line(irq & 7, high);
            self.cascade();
        }
    }

    /// The INTR output.
    pub fn intr(&self) -> bool {
        self.chips[0].pending(true).is_some()
    }

    /// The interrupt acknowledge cycle: the vector (a spurious one if the request went away).
    pub fn ack(&mut self) -> u8 {
        let Some(line) = self.chips[0].pending(true) else {
            return self.chips[0].vector_base | 7;
        };
        self.chips[0].acknowledge(line);
        if line == 2 {
            let vector = match self.chips[1].pending(false) {
                Some(low) => {
                    self.chips[1].acknowledge(low);
                    self.chips[1].vector_base | low
                }
                None => self.chips[1].vector_base | 7,
            };
            self.cascade();
            vector
        } else {
            self.chips[0].vector_base | line
        }
    }

    /// Read a register: chip 0 or 1, offset 0 or 1.
    pub fn read(&mut self, chip: usize, offset: u8) -> u8 {
        let c = &mut self.chips[chip & 1];
        if c.poll {
            c.poll = false;
            let value = match c.pending(chip == 0) {
                Some(line) => {
                    c.acknowledge(line);
                    0x80 | line
                }
                None => 0,
            };
            self.cascade();
            return value;
        }
        match offset {
            0 if c.read_isr => c.isr,
            0 => c.irr,
            _ => c.imr,
        }
    }

    /// Write a register.
    pub fn write(&mut self, chip: usize, offset: u8, value: u8) {
        self.chips[chip & 1].write(offset, value);
        self.cascade();
    }

    /// ELCR (ports 0x4D0, 0x4D1).
    pub fn elcr(&self, chip: usize) -> u8 {
        self.chips[chip & 1].elcr
    }

    /// Write ELCR; lines 0, 1, 2, 8 and 13 are always edge-triggered.
    pub fn set_elcr(&mut self, chip: usize, value: u8) {
        self.chips[chip & 1].elcr = value & [0xF8, 0xDE][chip & 1];
    }

    /// System reset.
    pub fn reset(&mut self) {
        *self = PicPair::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> PicPair {
        let mut p = PicPair::default();
        for (chip, base, cascade) in [(0, 0x20, 4), (1, 0x28, 2)] {
            p.write(chip, 0, 0x11);
            p.write(chip, 1, base);
            p.write(chip, 1, cascade);
            p.write(chip, 1, 1);
            p.write(chip, 1, 0);
        }
        p
    }

    #[test]
    fn an_edge_is_latched_and_served_once() {
        let mut p = ready();
        p.set_irq(4, true);
        assert!(p.intr());
        assert_eq!(p.ack(), 0x24);
        assert!(!p.intr());
        p.write(0, 0, 0x20);
        assert!(!p.intr(), "the line is still high, but there was no new edge");
        p.set_irq(4, false);
        p.set_irq(4, true);
        assert!(p.intr());
    }

    #[test]
    fn the_slave_comes_through_line_two() {
        let mut p = ready();
        p.set_irq(14, true);
        assert_eq!(p.ack(), 0x2E);
        p.set_irq(8, true);
        assert!(!p.intr(), "line 2 is in service until EOI at the master");
        p.write(0, 0, 0x20);
        assert!(p.intr());
        assert_eq!(p.ack(), 0x28);
        p.write(1, 0, 0x20);
        p.write(0, 0, 0x20);
        p.write(1, 0, 0x20);
        p.write(0, 0, 0x0B);
        assert_eq!(p.read(0, 0), 0);
    }

    #[test]
    fn a_level_line_interrupts_until_it_falls() {
        let mut p = ready();
        p.set_elcr(1, 0x0C);
        p.set_irq(11, true);
        assert_eq!(p.ack(), 0x2B);
        p.write(1, 0, 0x20);
        p.write(0, 0, 0x20);
        assert!(p.intr());
        p.set_irq(11, false);
        assert!(!p.intr());
        assert_eq!(p.ack(), 0x27, "spurious");
    }

    #[test]
    fn a_higher_line_interrupts_a_lower_one() {
        let mut p = ready();
        p.set_irq(5, true);
        p.ack();
        p.set_irq(6, true);
        assert!(!p.intr());
        p.set_irq(1, true);
        assert_eq!(p.ack(), 0x21);
    }
}
