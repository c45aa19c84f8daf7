//! fw_cfg (QEMU's docs/specs/fw_cfg.rst): how firmware learns about the machine.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};

/// Numbered items.
pub const SIGNATURE: u16 = 0;
pub const ID: u16 = 1;
pub const UUID: u16 = 2;
pub const RAM_SIZE: u16 = 3;
pub const NOGRAPHIC: u16 = 4;
pub const NB_CPUS: u16 = 5;
pub const KERNEL_ADDR: u16 = 7;
pub const KERNEL_SIZE: u16 = 8;
pub const INITRD_ADDR: u16 = 0x0A;
pub const INITRD_SIZE: u16 = 0x0B;
pub const NUMA: u16 = 0x0D;
pub const BOOT_MENU: u16 = 0x0E;
pub const MAX_CPUS: u16 = 0x0F;
pub const KERNEL_ENTRY: u16 = 0x10;
pub const KERNEL_DATA: u16 = 0x11;
pub const INITRD_DATA: u16 = 0x12;
pub const CMDLINE_ADDR: u16 = 0x13;
pub const CMDLINE_SIZE: u16 = 0x14;
pub const CMDLINE_DATA: u16 = 0x15;
pub const SETUP_ADDR: u16 = 0x16;
pub const SETUP_SIZE: u16 = 0x17;
pub const SETUP_DATA: u16 = 0x18;
pub const IRQ0_OVERRIDE: u16 = 0x8002;
const FILE_DIR: u16 = 0x19;
const FILE_FIRST: u16 = 0x20;
const DMA_SIGNATURE: u64 = 0x5145_4D55_2043_4647;
/// Guest bytes moved by one step of a transfer.
const STEP: usize = 64 << 10;

const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 2;
const DMA_SKIP: u32 = 4;
const DMA_SELECT: u32 = 8;
const DMA_WRITE: u32 = 16;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    select: u16,
    offset: u32,
    dma_address: u64,
}

/// The fw_cfg interface with its contents.
#[derive(Default)]
pub struct FwCfg {
    items: Vec<(u16, Vec<u8>)>,
    files: Vec<(String, Vec<u8>)>,
    directory: Vec<u8>,
    s: State,
}

impl FwCfg {
    /// Add a numbered item.
    pub fn item(&mut self, key: u16, data: impl Into<Vec<u8>>) {
        self.items.push((key, data.into()));
    }

    /// Add a named file (at most 55 bytes of name).
    pub fn file(&mut self, name: &str, data: impl Into<Vec<u8>>) {
        self.files.push((name.to_string(), data.into()));
    }

    /// Fix the contents: sort the files and write the directory.
    pub fn seal(&mut self) {
        self.item(SIGNATURE, *b"QEMU");
        self.item(ID, 3u32.to_le_bytes());
        self.files.sort();
        let mut dir = (self.files.len() as u32).to_be_bytes().to_vec();
        for (i, (name, data)) in self.files.iter().enumerate() {
            dir.extend((data.len() as u32).to_be_bytes());
            dir.extend((FILE_FIRST + i as u16).to_be_bytes());
            dir.extend([0, 0]);
            let mut field = [0; 56];
            let n = name.len().min(55);
            field[..n].copy_from_slice(&name.as_bytes()[..n]);
            dir.extend(field);
        }
        self.directory = dir;
    }

    fn data(&self) -> &[u8] {
        let key = self.s.select & 0xBFFF;
        if key == FILE_DIR {
            return &self.directory;
        }
        if (FILE_FIRST..0x8000).contains(&key) {
            return self.files.get(usize::from(key - FILE_FIRST)).map_or(&[], |(_, d)| d);
        }
        self.items.iter().find(|(k, _)| *k == key).map_or(&[], |(_, d)| d)
    }

    fn select(&mut self, key: u16) {
        self.s.select = key;
        self.s.offset = 0;
    }

    fn take_byte(&mut self) -> u8 {
        let byte = self.data().get(self.s.offset as usize).copied();
        if byte.is_some() {
            self.s.offset += 1;
        }
        byte.unwrap_or(0)
    }

    fn dma(&mut self, ctx: &mut Ctx) {
        let at = std::mem::take(&mut self.s.dma_address);
        let mut head = [0; 16];
        if !ctx.dma_read(at, &mut head) {
            return;
        }
        let word = |i: usize| u32::from_be_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let control = word(0);
        let length = word(4);
        let address = u64::from(word(8)) << 32 | u64::from(word(12));
        if control & DMA_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let mut result = 0;
        if control & DMA_READ != 0 {
            if !self.dma_read(ctx, address, u64::from(length)) {
                result = DMA_ERROR;
            }
        } else if control & DMA_WRITE != 0 {
            // Nothing here is writable.
            result = DMA_ERROR;
        } else if control & DMA_SKIP != 0 {
            self.s.offset = self.s.offset.saturating_add(length);
        }
        ctx.dma_write(at, &result.to_be_bytes());
    }

    /// Copy the item to memory; past its end come zeros. False if memory ends first.
    fn dma_read(&mut self, ctx: &mut Ctx, address: u64, length: u64) -> bool {
        let mut done = 0u64;
        while done < length {
            let n = (length - done).min(STEP as u64) as usize;
            let data = self.data();
            let from = (self.s.offset as usize).min(data.len());
            let have = &data[from..(from + n).min(data.len())];
            let Some(to) = address.checked_add(done) else { return false };
            let ok = if have.len() == n {
                ctx.dma_write(to, have)
            } else {
                let mut padded = have.to_vec();
                padded.resize(n, 0);
                ctx.dma_write(to, &padded)
            };
            if !ok {
                return false;
            }
            self.s.offset = self.s.offset.saturating_add(n as u32);
            done += n as u64;
        }
        true
    }
}

impl Device for FwCfg {
    fn name(&self) -> &str {
        "fw_cfg"
    }
    fn reset(&mut self, _ctx: &mut Ctx) {
        self.s = State::default();
    }
    fn ports(&self) -> Vec<Window> {
        vec![Window::new(0, 0x510, 2), Window::new(1, 0x514, 8)]
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        if region == 1 {
            let bytes = DMA_SIGNATURE.to_be_bytes();
            return (0..usize::from(size))
                .map(|i| u32::from(bytes[(usize::from(offset) + i) & 7]) << (8 * i))
                .sum();
        }
        match offset {
            1 => u32::from(self.take_byte()),
            _ => u32::from(self.s.select),
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        match (region, offset, size) {
            (0, 0, 2..) => self.select(value as u16),
            (1, 0, 4) => self.s.dma_address = u64::from(value.swap_bytes()) << 32,
            (1, 4, 4) => {
                self.s.dma_address |= u64::from(value.swap_bytes());
                self.dma(ctx);
            }
            _ => {}
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack("fw_cfg", data)?;
        Ok(())
    }
}
