//! What QEMU's VGA cards have in common: IBM's VGA registers and memory modes, Bochs' display interface, a linear frame
//! buffer. The names of registers are those of the VGA (sequencer, graphics controller, CRT controller, attribute
//! controller, DAC).

use serde::{Deserialize, Serialize};

use super::dispi::{self, Dispi};
use super::{Picture, Screen};
use crate::ctx::{pack, DeviceError, Window};
use crate::pci::{Bar, PciFunction};
use crate::registry::Build;

/// Regions: the frame buffer (BAR 0), the registers in memory (BAR 2), the option ROM, the window at 0xA0000; as
/// ports the VGA's and those of the display interface.
const FRAME_BUFFER: u8 = 0;
pub const REGISTERS: u8 = 2;
const LEGACY: u8 = 8;
const VGA_PORTS: u8 = 0x10;
const DISPI_PORTS: u8 = 0x11;

const FIRST_PORT: u16 = 0x3B0;
const LEGACY_START: u64 = 0xA_0000;
const PAGE: usize = 4096;

/// Bits of the sequencer's registers that exist.
const SEQ_MASK: [u8; 8] = [0x03, 0x3D, 0x0F, 0x3F, 0x0E, 0, 0, 0xFF];
/// Bits of the graphics controller's registers that exist.
const GFX_MASK: [u8; 16] = [0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF, 0, 0, 0, 0, 0, 0, 0];
/// Attribute controller registers from 16 on.
const ATTR_MASK: [u8; 5] = [0xEF, 0xFF, 0x3F, 0x0F, 0x0F];

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Regs {
    pub misc: u8,
    feature: u8,
    /// Input status 1; its retrace bits change at each read.
    status: u8,
    seq_index: u8,
    pub seq: [u8; 8],
    gfx_index: u8,
    pub gfx: [u8; 16],
    crtc_index: u8,
    pub crtc: [u8; 32],
    /// Index of the attribute controller; bit 5: the screen is on.
    pub attr_index: u8,
    /// The next write to 0x3C0 is data.
    attr_data: bool,
    pub attr: [u8; 32],
    dac_mask: u8,
    /// What was written last: 0 the index for writing, 3 that for reading.
    dac_state: u8,
    dac_read: u8,
    dac_write: u8,
    dac_sub: u8,
    dac_cache: [u8; 3],
    /// Red, green and blue of each of 256 colours.
    pub palette: Vec<u8>,
    latch: u32,
    pub dispi: Dispi,
}

impl Default for Regs {
    fn default() -> Self {
        Regs {
            misc: 0,
            feature: 0,
            status: 0,
            seq_index: 0,
            seq: [0; 8],
            gfx_index: 0,
            gfx: [0; 16],
            crtc_index: 0,
            crtc: [0; 32],
            attr_index: 0,
            attr_data: false,
            attr: [0; 32],
            dac_mask: 0xFF,
            dac_state: 0,
            dac_read: 0,
            dac_write: 0,
            dac_sub: 0,
            dac_cache: [0; 3],
            palette: vec![0; 768],
            latch: 0,
            dispi: Dispi::default(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    regs: Regs,
    /// Numbers of the pages of video memory that are not zero; they follow.
    pages: Vec<u32>,
}

/// The part of a video card that is a VGA, without its PCI function.
pub struct Vga {
    pub(super) r: Regs,
    /// Video memory; in the planar modes plane `p` of address `a` is byte `4 * a + p`.
    pub(super) memory: Vec<u8>,
    /// Pages of video memory that may be other than zero.
    used: Vec<bool>,
    /// The video BIOS.
    rom: Vec<u8>,
    changes: u64,
}

/// A byte's low four bits as a mask over the four planes.
fn planes(bits: u8) -> u32 {
    (0..4).filter(|p| bits >> p & 1 != 0).fold(0, |m, p| m | 0xFF << (8 * p))
}

/// A byte in each plane.
fn spread(byte: u8) -> u32 {
    u32::from(byte) * 0x0101_0101
}

impl Vga {
    /// The VGA of the card that a `-device` names, with this much video memory.
    pub fn new(b: &Build, megabytes: u64) -> Vga {
        let size = (megabytes as usize).next_power_of_two() << 20;
        let rom = b.config.video_bios.get(&b.spec.driver).filter(|_| b.flag("rombar", true));
        Vga {
            r: Regs::default(),
            memory: vec![0; size],
            used: vec![false; size / PAGE],
            rom: rom.cloned().unwrap_or_default(),
            changes: 0,
        }
    }

    /// Define the frame buffer's base address register, and that of the video BIOS.
    pub fn define(&self, pci: &mut PciFunction) {
        pci.bar(FRAME_BUFFER.into(), Bar::Prefetchable(self.memory.len() as u32));
        if !self.rom.is_empty() {
            pci.rom(self.rom.len().next_power_of_two() as u32);
        }
    }

    /// Whether memory addresses count bytes, not bytes of planes.
    fn chained(&self) -> bool {
        match self.r.dispi.on() {
            true => self.r.dispi.bpp() > 4,
            false => self.r.seq[4] & 8 != 0,
        }
    }

    /// The planes that writes reach.
    fn plane_mask(&self) -> u8 {
        if self.r.dispi.on() {
            0xF
        } else {
            self.r.seq[2]
        }
    }

    /// Note a write of `len` bytes at `at`.
    fn touch(&mut self, at: usize, len: usize) {
        self.changes += 1;
        self.used[at / PAGE..=(at + len - 1) / PAGE].fill(true);
    }

    /// Where an address of the window at 0xA0000 lies, by the memory map that the graphics controller selects.
    fn legacy_place(&self, offset: u64) -> Option<usize> {
        let offset = offset as usize & 0x1_FFFF;
        let inside = |start: usize, len: usize| offset.checked_sub(start).filter(|a| *a < len);
        let bank = if self.r.dispi.on() { self.r.dispi.bank() } else { 0 };
        match self.r.gfx[6] >> 2 & 3 {
            0 => Some(offset),
            1 => inside(0, 0x1_0000).map(|a| a + bank),
            2 => inside(0x1_0000, 0x8000),
            _ => inside(0x1_8000, 0x8000),
        }
    }

    fn latch_at(&self, at: usize) -> Option<u32> {
        let bytes = self.memory.get(at.checked_mul(4)?..)?.get(..4)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn legacy_read(&mut self, offset: u64) -> u8 {
        let Some(at) = self.legacy_place(offset) else { return 0xFF };
        if self.chained() {
            return self.memory.get(at).copied().unwrap_or(0xFF);
        }
        if self.r.gfx[5] & 0x10 != 0 {
            // Odd and even addresses are two planes.
            let plane = usize::from(self.r.gfx[4] & 2) | (at & 1);
            return self.memory.get((at & !1) << 1 | plane).copied().unwrap_or(0xFF);
        }
        let Some(latch) = self.latch_at(at) else { return 0xFF };
        self.r.latch = latch;
        if self.r.gfx[5] & 8 == 0 {
            return (latch >> (8 * self.r.gfx[4])) as u8;
        }
        // Colour compare: a bit is set where all planes that count agree.
        let differ = (latch ^ planes(self.r.gfx[2])) & planes(self.r.gfx[7]);
        let differ = differ | differ >> 16;
        !((differ | differ >> 8) as u8)
    }

    fn legacy_write(&mut self, offset: u64, value: u8) {
        let Some(at) = self.legacy_place(offset) else { return };
        let mask = self.plane_mask();
        let odd_even = self.r.gfx[5] & 0x10 != 0;
        if self.chained() || odd_even {
            let (at, plane) = match self.chained() {
                true => (at, at & 3),
                false => {
                    let plane = usize::from(self.r.gfx[4] & 2) | (at & 1);
                    ((at & !1) << 1 | plane, plane)
                }
            };
            if mask >> plane & 1 != 0 && at < self.memory.len() {
                self.memory[at] = value;
                self.touch(at, 1);
            }
            return;
        }
        let Some(old) = self.latch_at(at) else { return };
        let new = self.planar(value);
        let mask = planes(mask);
        let new = old & !mask | new & mask;
        self.memory[4 * at..4 * at + 4].copy_from_slice(&new.to_le_bytes());
        self.touch(4 * at, 4);
    }

    /// What a write of `value` puts into the planes: the graphics controller's four write modes.
    fn planar(&self, value: u8) -> u32 {
        let (g, latch) = (&self.r.gfx, self.r.latch);
        let rotated = value.rotate_right(u32::from(g[3] & 7));
        let (data, bits) = match g[5] & 3 {
            0 => {
                let set = planes(g[1]);
                (spread(rotated) & !set | planes(g[0]) & set, g[8])
            }
            1 => return latch,
            2 => (planes(value & 15), g[8]),
            _ => (planes(g[0]), g[8] & rotated),
        };
        let data = match g[3] >> 3 & 3 {
            0 => data,
            1 => data & latch,
            2 => data | latch,
            _ => data ^ latch,
        };
        let bits = spread(bits);
        data & bits | latch & !bits
    }

    /// Whether the port is one of those that go with the other kind of monitor (monochrome 0x3Bx, colour 0x3Dx).
    fn other_monitor(&self, port: u16) -> bool {
        match self.r.misc & 1 {
            0 => (0x3D0..=0x3DF).contains(&port),
            _ => (0x3B0..=0x3BF).contains(&port),
        }
    }

    fn port_read(&mut self, port: u16) -> u8 {
        if self.other_monitor(port) {
            return 0xFF;
        }
        let r = &mut self.r;
        match port {
            0x3C0 => {
                if r.attr_data {
                    0
                } else {
                    r.attr_index
                }
            }
            0x3C1 => r.attr[usize::from(r.attr_index & 31)],
            0x3C2 => 0,
            0x3C4 => r.seq_index,
            0x3C5 => r.seq[usize::from(r.seq_index)],
            0x3C6 => r.dac_mask,
            0x3C7 => r.dac_state,
            0x3C8 => r.dac_write,
            0x3C9 => {
                let value = r.palette[usize::from(r.dac_read) * 3 + usize::from(r.dac_sub)];
                r.dac_sub += 1;
                if r.dac_sub == 3 {
                    r.dac_sub = 0;
                    r.dac_read = r.dac_read.wrapping_add(1);
                }
                value
            }
            0x3CA => r.feature,
            0x3CC => r.misc,
            0x3CE => r.gfx_index,
            0x3CF => r.gfx[usize::from(r.gfx_index)],
            0x3B4 | 0x3D4 => r.crtc_index,
            0x3B5 | 0x3D5 => r.crtc.get(usize::from(r.crtc_index)).copied().unwrap_or(0),
            0x3BA | 0x3DA => {
                // A guest that waits for the retrace sees it come and go.
                r.status ^= 9;
                r.attr_data = false;
                r.status
            }
            _ => 0,
        }
    }

    fn port_write(&mut self, port: u16, value: u8) {
        if self.other_monitor(port) {
            return;
        }
        self.changes += 1;
        let r = &mut self.r;
        match port {
            0x3C0 => {
                if !r.attr_data {
                    r.attr_index = value & 0x3F;
                } else {
                    let index = usize::from(r.attr_index & 31);
                    let mask =
                        if index < 16 { 0x3F } else { ATTR_MASK.get(index - 16).copied().unwrap_or(0) };
                    r.attr[index] = value & mask;
                }
                r.attr_data = !r.attr_data;
            }
            0x3C2 => r.misc = value & !0x10,
            0x3C4 => r.seq_index = value & 7,
            0x3C5 => {
                let index = usize::from(r.seq_index);
                r.seq[index] = value & SEQ_MASK[index];
            }
            0x3C6 => r.dac_mask = value,
            0x3C7 => {
                r.dac_read = value;
                r.dac_sub = 0;
                r.dac_state = 3;
            }
            0x3C8 => {
                r.dac_write = value;
                r.dac_sub = 0;
                r.dac_state = 0;
            }
            0x3C9 => {
                r.dac_cache[usize::from(r.dac_sub)] = value;
                r.dac_sub += 1;
                if r.dac_sub == 3 {
                    let at = usize::from(r.dac_write) * 3;
                    r.palette[at..at + 3].copy_from_slice(&r.dac_cache);
                    r.dac_sub = 0;
                    r.dac_write = r.dac_write.wrapping_add(1);
                }
            }
            0x3CE => r.gfx_index = value & 15,
            0x3CF => {
                let index = usize::from(r.gfx_index);
                r.gfx[index] = value & GFX_MASK[index];
            }
            0x3B4 | 0x3D4 => r.crtc_index = value,
            0x3B5 | 0x3D5 => {
                // Bit 7 of register 0x11 protects registers 0 to 7, but for one bit.
                let protected = r.crtc[0x11] & 0x80 != 0 && r.crtc_index <= 7;
                match (r.crtc.get_mut(usize::from(r.crtc_index)), protected) {
                    (Some(reg), false) => *reg = value,
                    (Some(reg), true) if r.crtc_index == 7 => *reg = *reg & !0x10 | value & 0x10,
                    _ => {}
                }
            }
            0x3BA | 0x3DA => r.feature = value & 0x10,
            _ => {}
        }
    }

    fn dispi_write(&mut self, index: usize, value: u16) {
        self.changes += 1;
        let before = self.r.dispi.on();
        let clear = self.r.dispi.write(index, value, self.memory.len());
        if clear > 0 {
            self.memory[..clear].fill(0);
        }
        if index == dispi::ENABLE && self.r.dispi.on() && !before {
            // The VGA shows graphics through the window at 0xA0000, as software that sets such modes expects.
            self.r.gfx[6] = self.r.gfx[6] & !0x0C | 5;
            self.r.crtc[0x17] |= 3;
        }
    }

    fn register_read(&mut self, offset: u64, size: u8) -> u64 {
        match offset {
            0x400..=0x41F => {
                let one = |v: &mut Vga, i: u64| u64::from(v.port_read((offset + i - 0x400) as u16 + 0x3C0));
                (0..u64::from(size.min(2))).fold(0, |out, i| out | one(self, i) << (8 * i))
            }
            0x500..=0x515 => self.r.dispi.read((offset - 0x500) as usize / 2, self.memory.len()).into(),
            // QEMU's own registers: their size and the order of bytes (little-endian).
            0x600 => 8,
            0x604 => 0x1E1E_1E1E,
            _ => 0,
        }
    }

    fn register_write(&mut self, offset: u64, size: u8, value: u64) {
        match offset {
            0x400..=0x41F => {
                for i in 0..u64::from(size.min(2)) {
                    self.port_write((offset + i - 0x400) as u16 + 0x3C0, (value >> (8 * i)) as u8);
                }
            }
            0x500..=0x515 => self.dispi_write((offset - 0x500) as usize / 2, value as u16),
            _ => {}
        }
    }
}

impl Vga {
    pub fn reset(&mut self) {
        self.r = Regs::default();
        self.changes += 1;
    }

    /// The state, behind what else a card saves.
    pub fn save(&self) -> Vec<u8> {
        let page = |n: usize| &self.memory[n * PAGE..(n + 1) * PAGE];
        let pages: Vec<u32> = (0..self.used.len())
            .filter(|n| self.used[*n] && page(*n).iter().any(|b| *b != 0))
            .map(|n| n as u32)
            .collect();
        let saved = Saved { regs: self.r.clone(), pages };
        let mut out = pack(&saved);
        saved.pages.iter().for_each(|n| out.extend_from_slice(page(*n as usize)));
        out
    }

    /// Restore what [`Self::save`] returned; `name` is the card's.
    pub fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        let (saved, rest): (Saved, _) =
            postcard::take_from_bytes(data).map_err(|e| DeviceError::BadSection(name.into(), e))?;
        let Saved { mut regs, pages } = saved;
        let ordered = pages.windows(2).all(|w| w[0] < w[1]);
        let inside = pages.last().is_none_or(|n| (*n as usize) < self.used.len());
        let bounded =
            regs.palette.len() == 768 && regs.dac_sub < 3 && regs.seq_index < 8 && regs.gfx_index < 16;
        if !ordered || !inside || !bounded || rest.len() != pages.len() * PAGE {
            return Err(DeviceError::Misfit(name.into()));
        }
        regs.dispi.fit(self.memory.len());
        self.r = regs;
        self.memory.fill(0);
        self.used.fill(false);
        for (n, bytes) in pages.iter().zip(rest.chunks_exact(PAGE)) {
            let n = *n as usize;
            self.memory[n * PAGE..(n + 1) * PAGE].copy_from_slice(bytes);
            self.used[n] = true;
        }
        self.changes += 1;
        Ok(())
    }

    pub fn ports(&self) -> Vec<Window> {
        vec![
            Window::bytes(VGA_PORTS, FIRST_PORT.into(), 0x30),
            Window { width: 2, ..Window::new(DISPI_PORTS, 0x1CE, 4) },
        ]
    }

    pub fn windows(&self) -> Vec<Window> {
        vec![Window::new(LEGACY, LEGACY_START, 0x2_0000)]
    }

    pub fn pio_read(&mut self, region: u8, offset: u16, size: u8) -> u32 {
        match (region, offset, size) {
            (VGA_PORTS, _, _) => self.port_read(FIRST_PORT + offset).into(),
            (DISPI_PORTS, 0, 2) => self.r.dispi.index.into(),
            (DISPI_PORTS, 1 | 2, 2) => self.r.dispi.read(self.r.dispi.index.into(), self.memory.len()).into(),
            _ => u32::MAX,
        }
    }

    pub fn pio_write(&mut self, region: u8, offset: u16, size: u8, value: u32) {
        match (region, offset, size) {
            (VGA_PORTS, _, _) => self.port_write(FIRST_PORT + offset, value as u8),
            (DISPI_PORTS, 0, 2) => self.r.dispi.index = value as u16,
            (DISPI_PORTS, 1 | 2, 2) => self.dispi_write(self.r.dispi.index.into(), value as u16),
            _ => {}
        }
    }

    pub fn mmio_read(&mut self, region: u8, offset: u64, size: u8) -> u64 {
        let linear = |bytes: &[u8]| {
            (0..usize::from(size)).fold(0, |out, i| {
                let byte = bytes.get(offset as usize + i).copied().unwrap_or(0);
                out | u64::from(byte) << (8 * i)
            })
        };
        match region {
            FRAME_BUFFER => linear(&self.memory),
            REGISTERS => self.register_read(offset, size),
            PciFunction::ROM_REGION => linear(&self.rom),
            _ => (0..u64::from(size))
                .fold(0, |out, i| out | u64::from(self.legacy_read(offset + i)) << (8 * i)),
        }
    }

    pub fn mmio_write(&mut self, region: u8, offset: u64, size: u8, value: u64) {
        let (at, len) = (offset as usize, usize::from(size));
        match region {
            FRAME_BUFFER => {
                if let Some(place) = self.memory.get_mut(at..at + len) {
                    place.copy_from_slice(&value.to_le_bytes()[..len]);
                    self.touch(at, len);
                }
            }
            REGISTERS => self.register_write(offset, size, value),
            LEGACY => (0..len).for_each(|i| self.legacy_write(offset + i as u64, (value >> (8 * i)) as u8)),
            _ => {}
        }
    }
}

impl Screen for Vga {
    fn changes(&self) -> u64 {
        self.changes
    }

    fn picture(&self) -> Picture {
        self.draw()
    }

    fn text(&self) -> Option<Vec<String>> {
        self.cells()
    }
}
