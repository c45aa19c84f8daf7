//! The 8042 keyboard controller with a PS/2 keyboard and mouse (IBM PS/2 technical reference).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::{Input, MachineRequest};

/// Bytes a PS/2 device keeps for the host.
const QUEUE: usize = 256;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Ps2 {
    queue: VecDeque<u8>,
    /// Command byte that waits for its argument.
    pending: u8,
    enabled: bool,
    leds: u8,
    rate: u8,
    resolution: u8,
    scancode_set: u8,
    last: u8,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    /// Controller command byte.
    mode: u8,
    /// Controller command that waits for its data byte.
    pending: u8,
    /// Output buffer, and whether it came from the mouse.
    out: Option<(u8, bool)>,
    /// Answers of the controller itself.
    own: VecDeque<(u8, bool)>,
    keyboard: Ps2,
    mouse: Ps2,
    outport: u8,
    /// Set-2 translation: an 0xF0 prefix was seen.
    released: bool,
    self_test_done: bool,
}

/// The controller.
#[derive(Default)]
pub struct I8042 {
    s: State,
}

/// Scan code set 2 to set 1, for codes below 0x85 (the table of the 8042's firmware).
#[rustfmt::skip]
const TO_SET1: [u8; 0x85] = [
    0xFF, 0x43, 0x41, 0x3F, 0x3D, 0x3B, 0x3C, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3E, 0x0F, 0x29, 0x59,
    0x65, 0x38, 0x2A, 0x70, 0x1D, 0x10, 0x02, 0x5A, 0x66, 0x71, 0x2C, 0x1F, 0x1E, 0x11, 0x03, 0x5B,
    0x67, 0x2E, 0x2D, 0x20, 0x12, 0x05, 0x04, 0x5C, 0x68, 0x39, 0x2F, 0x21, 0x14, 0x13, 0x06, 0x5D,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5E, 0x6A, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5F,
    0x6B, 0x33, 0x25, 0x17, 0x18, 0x0B, 0x0A, 0x60, 0x6C, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0C, 0x61,
    0x6D, 0x73, 0x28, 0x74, 0x1A, 0x0D, 0x62, 0x6E, 0x3A, 0x36, 0x1C, 0x1B, 0x75, 0x2B, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7A, 0x0E, 0x7B, 0x7C, 0x4F, 0x7D, 0x4B, 0x47, 0x7E, 0x7F, 0x6F,
    0x52, 0x53, 0x50, 0x4C, 0x4D, 0x48, 0x01, 0x45, 0x57, 0x4E, 0x51, 0x4A, 0x37, 0x49, 0x46, 0x54,
    0x80, 0x81, 0x82, 0x41, 0x54,
];

impl Ps2 {
    fn put(&mut self, bytes: &[u8]) {
        for &b in bytes {
            if self.queue.len() < QUEUE {
                self.queue.push_back(b);
            }
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.queue.clear();
        self.put(bytes);
    }

    fn keyboard_byte(&mut self, value: u8) {
        match std::mem::take(&mut self.pending) {
            0xED => {
                self.leds = value;
                return self.answer(&[0xFA]);
            }
            0xF3 => {
                self.rate = value;
                return self.answer(&[0xFA]);
            }
            0xF0 => {
                if value == 0 {
                    let set = self.scancode_set;
                    return self.answer(&[0xFA, set]);
                }
                if (1..=3).contains(&value) {
                    self.scancode_set = value;
                    return self.answer(&[0xFA]);
                }
                return self.answer(&[0xFE]);
            }
            _ => {}
        }
        match value {
            0xED | 0xF0 | 0xF3 => {
                self.pending = value;
                self.answer(&[0xFA]);
            }
            0xEE => self.answer(&[0xEE]),
            0xF2 => self.answer(&[0xFA, 0xAB, 0x83]),
            0xF4 => {
                self.enabled = true;
                self.answer(&[0xFA]);
            }
            0xF5 | 0xF6 => {
                self.enabled = value == 0xF6;
                self.leds = 0;
                self.scancode_set = 2;
                self.answer(&[0xFA]);
            }
            0xFE => {
                let last = self.last;
                self.answer(&[last]);
            }
            0xFF => {
                *self = Ps2 { enabled: true, scancode_set: 2, ..Ps2::default() };
                self.answer(&[0xFA, 0xAA]);
            }
            0xF7..=0xFD => self.answer(&[0xFA]),
            _ => self.answer(&[0xFE]),
        }
    }

    fn mouse_byte(&mut self, value: u8) {
        match std::mem::take(&mut self.pending) {
            0xF3 => {
                self.rate = value;
                return self.answer(&[0xFA]);
            }
            0xE8 => {
                self.resolution = value & 3;
                return self.answer(&[0xFA]);
            }
            _ => {}
        }
        match value {
            0xF3 | 0xE8 => {
                self.pending = value;
                self.answer(&[0xFA]);
            }
            0xE9 => {
                let status = u8::from(self.enabled) << 5;
                let (res, rate) = (self.resolution, self.rate);
                self.answer(&[0xFA, status, res, rate]);
            }
            0xEB => self.answer(&[0xFA, 8, 0, 0]),
            0xF2 => self.answer(&[0xFA, 0]),
            0xF4 | 0xF5 => {
                self.enabled = value == 0xF4;
                self.answer(&[0xFA]);
            }
            0xF6 => {
                *self = Ps2 { rate: 100, resolution: 2, ..Ps2::default() };
                self.answer(&[0xFA]);
            }
            0xFF => {
                *self = Ps2 { rate: 100, resolution: 2, ..Ps2::default() };
                self.answer(&[0xFA, 0xAA, 0]);
            }
            0xE6 | 0xE7 | 0xEA | 0xEC | 0xEE | 0xF0 => self.answer(&[0xFA]),
            _ => self.answer(&[0xFE]),
        }
    }
}

impl I8042 {
    /// The byte as the controller shows it: scan codes translated to set 1 if it is told to.
    fn translate(&mut self, byte: u8) -> Option<u8> {
        if self.s.mode & 0x40 == 0 {
            return Some(byte);
        }
        if byte == 0xF0 {
            self.s.released = true;
            return None;
        }
        let code = TO_SET1.get(usize::from(byte)).copied().unwrap_or(byte);
        Some(code | if std::mem::take(&mut self.s.released) { 0x80 } else { 0 })
    }

    /// Fill the output buffer and drive IRQ 1 and 12.
    fn update(&mut self, ctx: &mut Ctx) {
        while self.s.out.is_none() {
            if let Some(own) = self.s.own.pop_front() {
                self.s.out = Some(own);
            } else if self.s.mode & 0x10 == 0 && !self.s.keyboard.queue.is_empty() {
                let Some(byte) = self.s.keyboard.queue.pop_front() else { break };
                self.s.keyboard.last = byte;
                self.s.out = self.translate(byte).map(|b| (b, false));
            } else if self.s.mode & 0x20 == 0 && !self.s.mouse.queue.is_empty() {
                self.s.out = self.s.mouse.queue.pop_front().map(|b| (b, true));
            } else {
                break;
            }
        }
        let (kbd, aux) = match self.s.out {
            Some((_, aux)) => (!aux, aux),
            None => (false, false),
        };
        ctx.set_irq(1, kbd && self.s.mode & 1 != 0);
        ctx.set_irq(12, aux && self.s.mode & 2 != 0);
    }

    fn command(&mut self, ctx: &mut Ctx, value: u8) {
        match value {
            0x20..=0x3F => self.s.own.push_back((if value == 0x20 { self.s.mode } else { 0 }, false)),
            0x60 | 0xD1 | 0xD2 | 0xD3 | 0xD4 => self.s.pending = value,
            0xA7 => self.s.mode |= 0x20,
            0xA8 => self.s.mode &= !0x20,
            0xA9 | 0xAB => self.s.own.push_back((0, false)),
            0xAA => {
                self.s.self_test_done = true;
                self.s.own.push_back((0x55, false));
            }
            0xAD => self.s.mode |= 0x10,
            0xAE => self.s.mode &= !0x10,
            0xC0 => self.s.own.push_back((0x80, false)),
            0xD0 => {
                let port = self.s.outport & !2 | u8::from(ctx.board.s.a20) << 1;
                self.s.own.push_back((port, false));
            }
            0xDD | 0xDF => ctx.board.s.a20 = value == 0xDF,
            // A pulse on bit 0 of the output port is the reset line.
            0xF0..=0xFF if value & 1 == 0 => ctx.request(MachineRequest::Reset),
            _ => {}
        }
        // A guest cannot make the controller's own queue grow without reading it.
        self.s.own.truncate(16);
        self.update(ctx);
    }

    fn data(&mut self, ctx: &mut Ctx, value: u8) {
        match std::mem::take(&mut self.s.pending) {
            0 => {
                // Talking to the keyboard enables its interface.
                self.s.mode &= !0x10;
                self.s.keyboard.keyboard_byte(value);
            }
            0x60 => self.s.mode = value,
            0xD1 => {
                self.s.outport = value;
                ctx.board.s.a20 = value & 2 != 0;
                if value & 1 == 0 {
                    ctx.request(MachineRequest::Reset);
                }
            }
            0xD2 => self.s.own.push_back((value, false)),
            0xD3 => self.s.own.push_back((value, true)),
            _ => {
                self.s.mode &= !0x20;
                self.s.mouse.mouse_byte(value);
            }
        }
        self.s.own.truncate(16);
        self.update(ctx);
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.s = State { mode: 3, outport: 0xDF, ..State::default() };
        self.s.keyboard.scancode_set = 2;
        self.s.keyboard.enabled = true;
        self.s.mouse.rate = 100;
        self.s.mouse.resolution = 2;
        ctx.board.s.a20 = true;
        self.update(ctx);
    }
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, 0x60, 1), Window::bytes(1, 0x64, 1), Window::bytes(2, 0x92, 1)]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, _offset: u16, _size: u8) -> u32 {
        match region {
            0 => {
                let value = self.s.out.take().map_or(0, |(byte, _)| byte);
                // The line falls between two bytes, so that each makes an edge.
                ctx.set_irq(1, false);
                ctx.set_irq(12, false);
                self.update(ctx);
                u32::from(value)
            }
            1 => {
                let obf = match self.s.out {
                    Some((_, aux)) => 1 | u32::from(aux) << 5,
                    None => 0,
                };
                // Not inhibited; the system flag follows the command byte.
                0x18 | obf | u32::from(self.s.mode & 4)
            }
            _ => u32::from(ctx.board.s.a20) << 1,
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, _offset: u16, _size: u8, value: u32) {
        let value = value as u8;
        match region {
            0 => self.data(ctx, value),
            1 => self.command(ctx, value),
            _ => {
                ctx.board.s.a20 = value & 2 != 0;
                if value & 1 != 0 {
                    ctx.request(MachineRequest::Reset);
                }
            }
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        if let Input::Keyboard { bytes } = input {
            if self.s.keyboard.enabled {
                self.s.keyboard.put(bytes);
                self.update(ctx);
            }
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack("i8042", data)?;
        Ok(())
    }
}
