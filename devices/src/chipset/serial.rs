//! The 16550A UART (National Semiconductor PC16550D datasheet). The line is infinitely fast: a
//! byte leaves at the write that sends it.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::Input;

const FIFO: usize = 16;
/// Bytes from outside that wait for room in the FIFO; more are lost, as on an overrun line.
const BACKLOG: usize = 1 << 20;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    /// Modem status delta bits.
    msr_delta: u8,
    divisor: u16,
    rx: VecDeque<u8>,
    backlog: VecDeque<u8>,
    overrun: bool,
    /// A break came in, and the guest has not looked yet.
    broken: bool,
    thre_pending: bool,
}

/// One serial line.
pub struct Serial {
    name: String,
    base: u16,
    irq: u8,
    port: u32,
    s: State,
}

impl Serial {
    /// COM `index` (0..3), connected to character device `port`.
    pub fn new(index: u32, port: u32) -> Serial {
        let (base, irq) = [(0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3)][(index & 3) as usize];
        let s = State { divisor: 12, ..State::default() };
        Serial { name: format!("serial{index}"), base, irq, port, s }
    }

    fn fifo_on(&self) -> bool {
        self.s.fcr & 1 != 0
    }

    fn trigger(&self) -> usize {
        if self.fifo_on() {
            [1, 4, 8, 14][usize::from(self.s.fcr >> 6)]
        } else {
            1
        }
    }

    fn refill(&mut self) {
        let room = if self.fifo_on() { FIFO } else { 1 };
        while self.s.rx.len() < room {
            match self.s.backlog.pop_front() {
                Some(byte) => self.s.rx.push_back(byte),
                None => break,
            }
        }
    }

    /// The interrupt identification without the FIFO bits (table 5 of the datasheet).
    fn iir(&self) -> u8 {
        let ier = self.s.ier;
        if ier & 4 != 0 && (self.s.overrun || self.s.broken) {
            6
        } else if ier & 1 != 0 && self.s.rx.len() >= self.trigger() {
            4
        } else if ier & 1 != 0 && !self.s.rx.is_empty() {
            // The character timeout has no duration here.
            0x0C
        } else if ier & 2 != 0 && self.s.thre_pending {
            2
        } else if ier & 8 != 0 && self.s.msr_delta != 0 {
            0
        } else {
            1
        }
    }

    fn update(&self, ctx: &mut Ctx) {
        // OUT2 gates the interrupt on a PC, but nobody relies on it being off; loopback cuts it.
        ctx.set_irq(self.irq, self.iir() & 1 == 0);
    }

    fn modem_lines(&self) -> u8 {
        if self.s.mcr & 0x10 != 0 {
            let m = self.s.mcr;
            (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
        } else {
            0xB0
        }
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        let backlog = std::mem::take(&mut self.s.backlog);
        self.s = State { divisor: 12, mcr: 8, lcr: 3, backlog, ..State::default() };
        self.refill();
        self.update(ctx);
    }
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, u64::from(self.base), 8)]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, _size: u8) -> u32 {
        let dlab = self.s.lcr & 0x80 != 0;
        let value = match offset {
            0 if dlab => self.s.divisor as u8,
            0 => {
                let byte = self.s.rx.pop_front().unwrap_or(0);
                self.refill();
                self.update(ctx);
                byte
            }
            1 if dlab => (self.s.divisor >> 8) as u8,
            1 => self.s.ier,
            2 => {
                let iir = self.iir();
                if iir == 2 {
                    self.s.thre_pending = false;
                    self.update(ctx);
                }
                iir | if self.fifo_on() { 0xC0 } else { 0 }
            }
            3 => self.s.lcr,
            4 => self.s.mcr,
            5 => {
                let value = 0x60
                    | u8::from(!self.s.rx.is_empty())
                    | u8::from(self.s.overrun) << 1
                    | u8::from(self.s.broken) << 4;
                (self.s.overrun, self.s.broken) = (false, false);
                self.update(ctx);
                value
            }
            6 => {
                let value = self.modem_lines() | self.s.msr_delta;
                self.s.msr_delta = 0;
                self.update(ctx);
                value
            }
            _ => self.s.scr,
        };
        u32::from(value)
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, _size: u8, value: u32) {
        let value = value as u8;
        let dlab = self.s.lcr & 0x80 != 0;
        match offset {
            0 if dlab => self.s.divisor = self.s.divisor & 0xFF00 | u16::from(value),
            0 => {
                if self.s.mcr & 0x10 != 0 {
                    if self.s.rx.len() < FIFO {
                        self.s.rx.push_back(value);
                    } else {
                        self.s.overrun = true;
                    }
                } else {
                    ctx.char_out(self.port, value);
                }
                self.s.thre_pending = true;
            }
            1 if dlab => self.s.divisor = self.s.divisor & 0xFF | u16::from(value) << 8,
            1 => {
                if value & 2 != 0 && self.s.ier & 2 == 0 {
                    self.s.thre_pending = true;
                }
                self.s.ier = value & 15;
            }
            2 => {
                if (value ^ self.s.fcr) & 1 != 0 || value & 2 != 0 {
                    self.s.rx.clear();
                }
                self.s.fcr = value & 0xC9;
                self.refill();
            }
            3 => self.s.lcr = value,
            4 => {
                let before = self.modem_lines();
                self.s.mcr = value & 0x1F;
                let after = self.modem_lines();
                let changed = (before ^ after) >> 4;
                // The ring indicator's delta marks only its trailing edge.
                let ring = before >> 6 & 1 & !(after >> 6);
                self.s.msr_delta |= changed & 0x0B | ring << 2;
            }
            7 => self.s.scr = value,
            _ => {}
        }
        self.update(ctx);
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        let bytes = match input {
            Input::CharIn { port, bytes } if *port == self.port => &bytes[..],
            Input::CharBreak { port } if *port == self.port => {
                // It comes with a character of zeros.
                self.s.broken = true;
                &[0]
            }
            _ => return,
        };
        let room = BACKLOG.saturating_sub(self.s.backlog.len());
        self.s.backlog.extend(bytes.iter().take(room));
        if self.s.mcr & 0x10 == 0 {
            self.refill();
        }
        self.update(ctx);
    }
    fn version(&self) -> u32 {
        2
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack(&self.name, data)?;
        Ok(())
    }
}
