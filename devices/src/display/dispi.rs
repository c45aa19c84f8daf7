//! The Bochs display interface: modes of any size and the linear frame buffer (QEMU's docs/specs/standard-vga.txt and
//! Bochs' vbe_display_api.txt).

use serde::{Deserialize, Serialize};

/// Register numbers.
const ID: usize = 0;
const XRES: usize = 1;
const YRES: usize = 2;
const BPP: usize = 3;
pub const ENABLE: usize = 4;
const BANK: usize = 5;
const VIRT_WIDTH: usize = 6;
const VIRT_HEIGHT: usize = 7;
const X_OFFSET: usize = 8;
const Y_OFFSET: usize = 9;
const MEMORY_64K: usize = 10;
/// Registers in all.
pub const COUNT: usize = 11;

/// Bits of the enable register.
const ENABLED: u16 = 1;
const GET_CAPS: u16 = 2;
const DAC_8BIT: u16 = 0x20;
const NO_CLEAR: u16 = 0x80;

/// The newest version of the interface.
const VERSION: u16 = 0xB0C5;
const MAX_X: u16 = 16_000;
const MAX_Y: u16 = 12_000;

/// The registers of the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispi {
    pub index: u16,
    regs: [u16; COUNT],
}

impl Default for Dispi {
    fn default() -> Self {
        let mut regs = [0; COUNT];
        regs[ID] = VERSION;
        Dispi { index: 0, regs }
    }
}

impl Dispi {
    /// A mode of this interface is on; otherwise the VGA registers say what is shown.
    pub fn on(&self) -> bool {
        self.regs[ENABLE] & ENABLED != 0
    }
    /// The palette has eight bits for each colour, not six.
    pub fn wide_dac(&self) -> bool {
        self.regs[ENABLE] & DAC_8BIT != 0
    }
    pub fn width(&self) -> usize {
        self.regs[XRES].into()
    }
    pub fn height(&self) -> usize {
        self.regs[YRES].into()
    }
    /// Bits of a pixel: 4, 8, 15, 16, 24 or 32.
    pub fn bpp(&self) -> usize {
        self.regs[BPP].into()
    }
    /// Where the window at 0xA0000 begins in video memory.
    pub fn bank(&self) -> usize {
        usize::from(self.regs[BANK]) << 16
    }
    /// Bits that a pixel takes in memory.
    fn bits(&self) -> usize {
        (self.bpp() + 1) & !1
    }
    /// Bytes from one line to the next; in 16-colour modes counted over all four planes.
    pub fn pitch(&self) -> usize {
        usize::from(self.regs[VIRT_WIDTH]) * self.bits() / 8
    }
    /// Where the picture begins in video memory.
    pub fn start(&self) -> usize {
        usize::from(self.regs[Y_OFFSET]) * self.pitch() + usize::from(self.regs[X_OFFSET]) * self.bits() / 8
    }

    /// Read a register.
    pub fn read(&self, index: usize, memory: usize) -> u16 {
        if index == MEMORY_64K {
            return (memory >> 16).min(0xFFFF) as u16;
        }
        let caps = self.regs[ENABLE] & GET_CAPS != 0;
        match (index, caps) {
            (XRES, true) => MAX_X,
            (YRES, true) => MAX_Y,
            (BPP, true) => 32,
            _ => self.regs.get(index).copied().unwrap_or(0),
        }
    }

    /// Write a register; returns the bytes of video memory, from its start, that are to be cleared.
    pub fn write(&mut self, index: usize, value: u16, memory: usize) -> usize {
        match index {
            ID if (0xB0C0..=VERSION).contains(&value) => self.regs[ID] = value,
            XRES | YRES | BPP | VIRT_WIDTH | X_OFFSET | Y_OFFSET => {
                self.regs[index] = value;
                self.fit(memory);
            }
            BANK => self.regs[BANK] = value & ((memory >> 16).saturating_sub(1) as u16),
            ENABLE => {
                let starts = value & ENABLED != 0 && !self.on();
                self.regs[ENABLE] = value;
                self.regs[BANK] = 0;
                if !starts {
                    return 0;
                }
                self.regs[VIRT_WIDTH] = 0;
                self.regs[X_OFFSET] = 0;
                self.regs[Y_OFFSET] = 0;
                self.fit(memory);
                if value & NO_CLEAR == 0 {
                    return (self.pitch() * self.height()).min(memory);
                }
            }
            _ => {}
        }
        0
    }

    /// Bring the registers of an active mode to values that fit into video memory, as QEMU does.
    pub fn fit(&mut self, memory: usize) {
        if !self.on() {
            return;
        }
        let r = &mut self.regs;
        if ![4, 8, 15, 16, 24, 32].contains(&r[BPP]) {
            r[BPP] = 8;
        }
        r[XRES] = r[XRES].clamp(8, MAX_X) & !7;
        r[VIRT_WIDTH] = (r[VIRT_WIDTH] & !7).clamp(r[XRES], MAX_X);
        let rows = memory / self.pitch().max(1);
        let r = &mut self.regs;
        r[YRES] = r[YRES].clamp(1, rows.clamp(1, MAX_Y.into()) as u16);
        r[VIRT_HEIGHT] = rows.min(0xFFFF) as u16;
        r[X_OFFSET] = r[X_OFFSET].min(MAX_X);
        r[Y_OFFSET] = r[Y_OFFSET].min(MAX_Y);
        if self.start() + self.pitch() * self.height() > memory {
            self.regs[X_OFFSET] = 0;
            let last = rows.saturating_sub(self.height()).min(0xFFFF) as u16;
            self.regs[Y_OFFSET] = self.regs[Y_OFFSET].min(last);
        }
    }
}
