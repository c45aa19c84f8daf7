//! ATA disks: commands and IDENTIFY (ATA/ATAPI-6).

use serde::{Deserialize, Serialize};

use super::channel::{Channel, Phase, ABORTED, BUSY, DRQ, NOT_FOUND, READY, SEEK};
use crate::config::DriveSpec;
use crate::ctx::Ctx;

/// Sectors in a DRQ block at most (READ/WRITE MULTIPLE).
const MAX_MULTIPLE: u8 = 16;

/// One drive's registers and settings. Register pairs are (newest, previous) values.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DriveState {
    pub status: u8,
    pub error: u8,
    pub feature: [u8; 2],
    pub count: [u8; 2],
    pub lba: [[u8; 2]; 3],
    /// Size of the medium in bytes.
    pub bytes: u64,
    multiple: u8,
    heads: u8,
    sectors: u8,
    /// Selected multiword and Ultra DMA modes, as IDENTIFY shows them.
    mwdma: u8,
    udma: u8,
    write_cache: bool,
    /// Packet devices: sense key and additional sense code, and a change of medium to be told.
    pub sense: u8,
    pub asc: u8,
    pub attention: bool,
    pub locked: bool,
    /// The drive number of the medium (or disk), and whether the tray is out.
    pub medium: u32,
    pub open: bool,
}

impl DriveState {
    pub fn new(spec: Option<&DriveSpec>) -> DriveState {
        let mut d = DriveState {
            bytes: spec.map_or(0, |s| s.size_bytes),
            medium: spec.map_or(u32::MAX, |s| s.index),
            heads: 16,
            sectors: 63,
            multiple: MAX_MULTIPLE,
            udma: 0x20,
            write_cache: true,
            ..DriveState::default()
        };
        d.signature(spec.is_some_and(|s| s.cdrom));
        d
    }

    /// What the registers show after a reset (9.12).
    pub fn signature(&mut self, cd: bool) {
        self.count = [1, 0];
        let (mid, high) = if cd { (0x14, 0xEB) } else { (0, 0) };
        self.lba = [[1, 0], [mid, 0], [high, 0]];
        self.error = 1;
        self.status = if cd { 0 } else { READY | SEEK };
    }

    fn total(&self) -> u64 {
        self.bytes / 512
    }

    fn cylinders(&self) -> u64 {
        (self.total() / (u64::from(self.heads.max(1)) * u64::from(self.sectors.max(1)))).min(16_383)
    }
}

/// ATA strings have their bytes swapped in each word and are padded with blanks.
pub fn put_string(words: &mut [u16], text: &str) {
    let mut bytes = text.bytes().chain(std::iter::repeat(b' '));
    for w in words {
        let (a, b) = (bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' '));
        *w = u16::from(a) << 8 | u16::from(b);
    }
}

pub fn to_bytes(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn identify(spec: &DriveSpec, d: &DriveState, sata: bool) -> Vec<u8> {
    let mut w = [0u16; 256];
    let total = d.total();
    let chs = d.cylinders() * u64::from(d.heads) * u64::from(d.sectors);
    w[0] = 0x40;
    w[1] = d.cylinders() as u16;
    w[3] = u16::from(d.heads);
    w[4] = 512 * u16::from(d.sectors & 0x7F);
    w[5] = 512;
    w[6] = u16::from(d.sectors);
    put_string(&mut w[10..20], &spec.serial);
    w[20] = 3;
    w[21] = 512;
    w[22] = 4;
    put_string(&mut w[23..27], "2.5+");
    put_string(&mut w[27..47], "QEMU HARDDISK");
    w[47] = 0x8000 | u16::from(MAX_MULTIPLE);
    w[48] = 1;
    // LBA, DMA, IORDY.
    w[49] = 0x0B00;
    w[51] = 0x200;
    w[52] = 0x200;
    w[53] = 7;
    w[54] = d.cylinders() as u16;
    w[55] = u16::from(d.heads);
    w[56] = u16::from(d.sectors);
    w[57] = chs as u16;
    w[58] = (chs >> 16) as u16;
    if d.multiple != 0 {
        w[59] = 0x100 | u16::from(d.multiple);
    }
    let lba28 = total.min(0x0FFF_FFFF);
    w[60] = lba28 as u16;
    w[61] = (lba28 >> 16) as u16;
    w[63] = 7 | u16::from(d.mwdma) << 8;
    w[64] = 3;
    w[65..69].fill(120);
    w[80] = 0xF0;
    w[81] = 0x16;
    // Write cache, NOP; 48-bit addresses, FLUSH CACHE (EXT).
    w[82] = 0x4020;
    w[83] = 0x7400;
    w[84] = 0x4000;
    w[85] = 0x4000 | u16::from(d.write_cache) << 5;
    w[86] = 0x3400;
    w[87] = 0x4000;
    w[88] = 0x3F | u16::from(d.udma) << 8;
    if sata {
        // Native command queuing, 32 deep; first generation speed.
        w[75] = 31;
        w[76] = 0x0102;
    } else {
        w[93] = 0x6001;
    }
    for i in 0..4 {
        w[100 + i] = (total >> (16 * i)) as u16;
    }
    to_bytes(&w)
}

impl Channel {
    /// Sector address and count of a command.
    fn address(&mut self, ext: bool) -> (u64, u64) {
        let device = self.s.device;
        let d = self.current();
        let [low, mid, high] = d.lba;
        if ext {
            let lba = [low[0], mid[0], high[0], low[1], mid[1], high[1], 0, 0];
            let n = u64::from(d.count[0]) | u64::from(d.count[1]) << 8;
            return (u64::from_le_bytes(lba), if n == 0 { 65_536 } else { n });
        }
        let n = if d.count[0] == 0 { 256 } else { u64::from(d.count[0]) };
        let lba = if device & 0x40 != 0 {
            u64::from(u32::from_le_bytes([low[0], mid[0], high[0], device & 15]))
        } else {
            let cylinder = u64::from(mid[0]) | u64::from(high[0]) << 8;
            let track = cylinder * u64::from(d.heads) + u64::from(device & 15);
            // Sector numbers start at 1; 0 lies nowhere.
            match (track * u64::from(d.sectors) + u64::from(low[0])).checked_sub(1) {
                Some(lba) if low[0] != 0 => lba,
                _ => u64::MAX,
            }
        };
        (lba, n)
    }

    /// Take a command's range; false (and the command failed) if it leaves the disk.
    fn range(&mut self, ctx: &mut Ctx, ext: bool) -> bool {
        let (lba, n) = self.address(ext);
        let total = self.current().total();
        if lba.checked_add(n).is_none_or(|end| end > total) {
            self.fail(ctx, NOT_FOUND | ABORTED);
            return false;
        }
        self.s.offset = lba * 512;
        self.s.left = n * 512;
        true
    }

    fn read_pio(&mut self, ctx: &mut Ctx, ext: bool, multiple: bool) {
        if self.is_port() {
            return self.start_dma(ctx, ext, false);
        }
        let Some(block) = self.pio_block(ctx, multiple) else { return };
        if self.range(ctx, ext) {
            self.s.block = block;
            self.s.dma = false;
            self.s.phase = Phase::In;
            self.fetch(ctx);
        }
    }

    fn write_pio(&mut self, ctx: &mut Ctx, ext: bool, multiple: bool) {
        if self.is_port() {
            return self.start_dma(ctx, ext, true);
        }
        let Some(block) = self.pio_block(ctx, multiple) else { return };
        if self.read_only() {
            return self.fail(ctx, ABORTED);
        }
        if self.range(ctx, ext) {
            self.s.block = block;
            self.s.dma = false;
            self.s.phase = Phase::Out;
            let size = self.s.left.min(u64::from(block)) as u32;
            self.accept(size);
        }
    }

    fn pio_block(&mut self, ctx: &mut Ctx, multiple: bool) -> Option<u32> {
        match (multiple, self.current().multiple) {
            (false, _) => Some(512),
            (true, 0) => {
                self.fail(ctx, ABORTED);
                None
            }
            (true, n) => Some(512 * u32::from(n)),
        }
    }

    fn read_only(&self) -> bool {
        self.spec[self.selected()].as_ref().is_some_and(|s| s.read_only)
    }

    fn start_dma(&mut self, ctx: &mut Ctx, ext: bool, write: bool) {
        if write && self.read_only() {
            return self.fail(ctx, ABORTED);
        }
        if self.range(ctx, ext) {
            self.s.dma = true;
            self.s.phase = if write { Phase::Out } else { Phase::In };
            self.current().status = READY | SEEK | DRQ;
            self.dma_start(ctx);
        }
    }

    pub fn ata_command(&mut self, ctx: &mut Ctx, command: u8) {
        self.s.dma = self.is_port();
        match command {
            0x20 | 0x21 => self.read_pio(ctx, false, false),
            0x24 => self.read_pio(ctx, true, false),
            0x29 => self.read_pio(ctx, true, true),
            0xC4 => self.read_pio(ctx, false, true),
            0x30 | 0x31 => self.write_pio(ctx, false, false),
            0x34 => self.write_pio(ctx, true, false),
            0x39 | 0xCE => self.write_pio(ctx, true, true),
            0xC5 => self.write_pio(ctx, false, true),
            0xC8 | 0xC9 => self.start_dma(ctx, false, false),
            0x25 => self.start_dma(ctx, true, false),
            0xCA | 0xCB => self.start_dma(ctx, false, true),
            0x35 | 0x3D => self.start_dma(ctx, true, true),
            0x40..=0x42 => {
                if self.range(ctx, command == 0x42) {
                    self.s.left = 0;
                    self.succeed(ctx);
                }
            }
            0x10..=0x1F | 0x70 => self.succeed(ctx),
            0x90 => {
                self.s.device &= !0x10;
                let present: Vec<bool> = self.spec.iter().map(Option::is_some).collect();
                for (d, (spec, here)) in self.s.drives.iter_mut().zip(self.spec.iter().zip(present)) {
                    if here {
                        d.signature(spec.as_ref().is_some_and(|s| s.cdrom));
                    }
                }
                self.raise(ctx);
            }
            0x91 => {
                let (heads, d) = ((self.s.device & 15) + 1, self.current());
                if d.count[0] == 0 {
                    return self.fail(ctx, ABORTED);
                }
                d.heads = heads;
                d.sectors = d.count[0];
                self.succeed(ctx);
            }
            0xC6 => {
                let d = self.current();
                let n = d.count[0];
                if n > MAX_MULTIPLE || (n != 0 && !n.is_power_of_two()) {
                    return self.fail(ctx, ABORTED);
                }
                d.multiple = n;
                self.succeed(ctx);
            }
            0xE0..=0xE3 | 0xE6 | 0x94..=0x97 | 0x99 => self.succeed(ctx),
            0xE5 | 0x98 => {
                // Active.
                self.current().count[0] = 0xFF;
                self.succeed(ctx);
            }
            0xE7 | 0xEA => self.flush(ctx),
            0xEC => {
                let sata = self.is_port();
                let Some((spec, d)) = self.drive() else { return };
                let data = identify(spec, d, sata);
                self.reply(ctx, data, 512);
            }
            0xEF => self.set_features(ctx),
            0xF8 | 0x27 => {
                let ext = command == 0x27;
                let d = self.current();
                let last = d.total().saturating_sub(1);
                let last = if ext { last } else { last.min(0x0FFF_FFFF) };
                let b = last.to_le_bytes();
                d.lba = [[b[0], b[3]], [b[1], b[4]], [b[2], b[5]]];
                if !ext {
                    self.s.device = self.s.device & 0xF0 | b[3] & 15;
                }
                self.succeed(ctx);
            }
            _ => self.fail(ctx, ABORTED),
        }
    }

    pub fn set_features(&mut self, ctx: &mut Ctx) {
        let d = self.current();
        match d.feature[0] {
            2 => d.write_cache = true,
            0x82 => {
                // What is cached reaches the disk first.
                d.write_cache = false;
                return self.flush(ctx);
            }
            3 => {
                let value = d.count[0];
                let bit = 1u8 << (value & 7);
                (d.mwdma, d.udma) = match value >> 3 {
                    0..=2 => (0, 0),
                    4 => (bit & 7, 0),
                    8 => (0, bit & 0x3F),
                    _ => return self.fail(ctx, ABORTED),
                };
            }
            0x05 | 0x85 | 0xAA | 0x55 | 0x42 | 0xC2 | 0xCC | 0x66 | 0x69 | 0x67 | 0x96 | 0x9A => {}
            _ => return self.fail(ctx, ABORTED),
        }
        self.succeed(ctx);
    }

    /// The transfer modes as IDENTIFY words 63 and 88.
    pub fn modes(&mut self) -> (u16, u16) {
        let d = self.current();
        (7 | u16::from(d.mwdma) << 8, 0x3F | u16::from(d.udma) << 8)
    }

    /// DEVICE RESET (packet devices).
    pub fn device_reset(&mut self) {
        self.stop();
        let d = self.current();
        d.status &= !BUSY;
        d.signature(true);
    }
}
