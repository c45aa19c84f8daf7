//! Ports for firmware and tests: POST codes, isa-debugcon, isa-debug-exit, pvpanic.

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::{GuestEvent, MachineRequest};

/// Port 80h, where POST codes go, and the DMA page registers around it, which only remember.
#[derive(Default)]
pub struct Post {
    /// 80h..8Fh.
    page: [u8; 16],
}

impl Device for Post {
    fn name(&self) -> &str {
        "post"
    }
    fn reset(&mut self, _ctx: &mut Ctx) {
        self.page = [0; 16];
    }
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, 0x80, 16)]
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, _region: u8, offset: u16, _size: u8) -> u32 {
        u32::from(self.page[usize::from(offset & 15)])
    }
    fn pio_write(&mut self, _ctx: &mut Ctx, _region: u8, offset: u16, _size: u8, value: u32) {
        self.page[usize::from(offset & 15)] = value as u8;
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.page)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.page = unpack("post", data)?;
        Ok(())
    }
}

/// `isa-debugcon`: every byte written goes to a character device; reads say that it is there.
pub struct DebugCon {
    name: String,
    pub iobase: u16,
    pub readback: u8,
    pub port: u32,
}

impl DebugCon {
    /// A debug console at `iobase`.
    pub fn new(iobase: u16, readback: u8, port: u32) -> DebugCon {
        DebugCon { name: format!("isa-debugcon@{iobase:x}"), iobase, readback, port }
    }
}

impl Device for DebugCon {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, _ctx: &mut Ctx) {}
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, u64::from(self.iobase), 1)]
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, _region: u8, _offset: u16, _size: u8) -> u32 {
        u32::from(self.readback)
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, _offset: u16, _size: u8, value: u32) {
        ctx.char_out(self.port, value as u8);
    }
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn load(&mut self, _data: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// `isa-debug-exit`: a write ends the program with status `value << 1 | 1`.
pub struct DebugExit {
    name: String,
    iobase: u16,
    iosize: u16,
}

impl DebugExit {
    /// At `iobase`, `iosize` ports.
    pub fn new(iobase: u16, iosize: u16) -> DebugExit {
        DebugExit { name: format!("isa-debug-exit@{iobase:x}"), iobase, iosize }
    }
}

impl Device for DebugExit {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, _ctx: &mut Ctx) {}
    fn ports(&self) -> Vec<Window> {
        vec![Window::new(0, u64::from(self.iobase), u64::from(self.iosize))]
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, _region: u8, _offset: u16, _size: u8) -> u32 {
        0
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, _offset: u16, _size: u8, value: u32) {
        ctx.request(MachineRequest::Exit((value << 1 | 1) as i32));
    }
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn load(&mut self, _data: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// `pvpanic` (QEMU's docs/specs/pvpanic): bit 0 the guest panicked, bit 1 a crash kernel is loaded.
pub struct PvPanic {
    pub ioport: u16,
    pub events: u8,
}

impl Device for PvPanic {
    fn name(&self) -> &str {
        "pvpanic"
    }
    fn reset(&mut self, _ctx: &mut Ctx) {}
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, u64::from(self.ioport), 1)]
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, _region: u8, _offset: u16, _size: u8) -> u32 {
        u32::from(self.events)
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, _offset: u16, _size: u8, value: u32) {
        if value & 1 != 0 {
            ctx.event(GuestEvent::Panicked);
        } else if value & 2 != 0 {
            ctx.event(GuestEvent::CrashLoaded);
        }
    }
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn load(&mut self, _data: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}
