//! QEMU's `pc-testdev`, which kvm-unit-tests use: ports that echo, ports that drive interrupt
//! lines, and a page of memory.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};

/// Where the memory page lies.
const MEMORY: u64 = 0xFF00_0000;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    echo: u32,
    memory: Vec<u8>,
}

/// The device.
pub struct PcTestDev {
    s: State,
}

impl Default for PcTestDev {
    fn default() -> Self {
        PcTestDev { s: State { echo: 0, memory: vec![0; 0x1_0000] } }
    }
}

impl Device for PcTestDev {
    fn name(&self) -> &str {
        "pc-testdev"
    }
    fn reset(&mut self, _ctx: &mut Ctx) {}
    fn ports(&self) -> Vec<Window> {
        vec![Window::new(0, 0xE0, 4), Window::bytes(1, 0xE8, 4), Window::bytes(2, 0x2000, 24)]
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::new(0, MEMORY, 0x1_0000)]
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        match region {
            0 | 1 => self.s.echo >> (8 * (offset & 3)) & (u32::MAX >> (32 - 8 * u32::from(size.min(4)))),
            _ => 0xFFFF_FFFF,
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        match region {
            0 | 1 => {
                let shift = 8 * u32::from(offset & 3);
                let mask = (u32::MAX >> (32 - 8 * u32::from(size.min(4)))) << shift;
                self.s.echo = self.s.echo & !mask | value << shift & mask;
            }
            2 => ctx.set_irq(offset as u8, value != 0),
            _ => {}
        }
    }
    fn mmio_read(&mut self, _ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        let at = offset as usize;
        let mut out = 0;
        for i in (0..usize::from(size)).rev() {
            out = out << 8 | u64::from(self.s.memory.get(at + i).copied().unwrap_or(0xFF));
        }
        out
    }
    fn mmio_write(&mut self, _ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        for i in 0..usize::from(size) {
            if let Some(b) = self.s.memory.get_mut(offset as usize + i) {
                *b = (value >> (8 * i)) as u8;
            }
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: State = unpack("pc-testdev", data)?;
        if s.memory.len() != 0x1_0000 {
            return Err(DeviceError::Misfit("pc-testdev".into()));
        }
        self.s = s;
        Ok(())
    }
}
