//! The 8254 interval timer and port 61h (Intel 8254 datasheet).

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Source, Window};

/// The 8254's clock in Hz.
pub const HZ: u64 = 1_193_182;
const NS: u128 = 1_000_000_000;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(HZ) / NS) as u64
}

/// The first ns at which `ticks` clocks have passed.
fn ns_of(ticks: u64) -> u64 {
    (u128::from(ticks) * NS).div_ceil(u128::from(HZ)) as u64
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    /// 0 stands for 65536 (or 10000 in BCD).
    count: u16,
    mode: u8,
    bcd: bool,
    /// 1 low byte, 2 high byte, 3 both.
    access: u8,
    latched: Option<u16>,
    /// Which byte of a latched or plain read comes next, and of a write.
    read_high: bool,
    write_low: Option<u8>,
    status: Option<u8>,
    gate: bool,
    /// Absolute tick at which the count was loaded.
    start: u64,
    null_count: bool,
    /// Mode 0 and 4: a count was written, so the output will go high once.
    armed: bool,
}

impl Channel {
    fn new(gate: bool) -> Channel {
        Channel {
            count: 0,
            mode: 3,
            bcd: false,
            access: 3,
            latched: None,
            read_high: false,
            write_low: None,
            status: None,
            gate,
            start: 0,
            null_count: false,
            armed: false,
        }
    }

    fn period(&self) -> u64 {
        match (self.count, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (c, false) => u64::from(c),
            (c, true) => (0..4).map(|i| u64::from(c >> (4 * i) & 15) * 10u64.pow(i)).sum::<u64>().max(1),
        }
    }

    fn counter(&self, now: u64) -> u16 {
        let passed = now.saturating_sub(self.start);
        let period = self.period();
        let value = match self.mode {
            0 | 1 | 4 | 5 => period.wrapping_sub(passed),
            3 => period - (2 * passed) % period,
            _ => period - passed % period,
        };
        if self.bcd {
            let v = value % 10_000;
            (0..4).map(|i| ((v / 10u64.pow(i) % 10) as u16) << (4 * i)).sum()
        } else {
            value as u16
        }
    }

    fn output(&self, now: u64) -> bool {
        let passed = now.saturating_sub(self.start);
        let period = self.period();
        match self.mode {
            0 | 1 => passed >= period,
            2 => passed % period != period - 1,
            3 => passed % period < period.div_ceil(2),
            _ => passed != period,
        }
    }

    /// The next tick after `now` at which the output rises.
    fn next_rise(&self, now: u64) -> Option<u64> {
        let passed = now.saturating_sub(self.start);
        let period = self.period();
        match self.mode {
            2 | 3 => Some(self.start + (passed / period + 1) * period),
            1 => None,
            _ if self.armed && passed < period => Some(self.start + period),
            _ => None,
        }
    }

    fn load(&mut self, count: u16, now: u64) {
        self.count = count;
        self.start = now;
        self.null_count = false;
        self.armed = true;
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    channels: [Channel; 3],
    speaker: bool,
    refresh: bool,
}

/// The timer with its speaker port.
pub struct Pit {
    s: State,
}

impl Default for Pit {
    fn default() -> Self {
        Pit {
            s: State {
                channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
                speaker: false,
                refresh: false,
            },
        }
    }
}

impl Pit {
    fn schedule(&self, ctx: &mut Ctx) {
        let at = self.s.channels[0].next_rise(ticks(ctx.now)).map(ns_of);
        ctx.set_timer(0, at);
    }

    fn control(&mut self, ctx: &mut Ctx, value: u8) {
        let now = ticks(ctx.now);
        let select = value >> 6;
        if select == 3 {
            for (i, c) in self.s.channels.iter_mut().enumerate() {
                if value & (2 << i) == 0 {
                    continue;
                }
                if value & 0x20 == 0 && c.latched.is_none() {
                    c.latched = Some(c.counter(now));
                }
                if value & 0x10 == 0 && c.status.is_none() {
                    let out = u8::from(c.output(now));
                    c.status = Some(
                        out << 7
                            | u8::from(c.null_count) << 6
                            | c.access << 4
                            | c.mode << 1
                            | u8::from(c.bcd),
                    );
                }
            }
            return;
        }
        let c = &mut self.s.channels[usize::from(select)];
        let access = value >> 4 & 3;
        if access == 0 {
            c.latched.get_or_insert(c.counter(now));
            return;
        }
        c.access = access;
        c.mode = match value >> 1 & 7 {
            m @ 6.. => m - 4,
            m => m,
        };
        c.bcd = value & 1 != 0;
        c.null_count = true;
        c.armed = false;
        c.latched = None;
        c.status = None;
        c.read_high = false;
        c.write_low = None;
        c.start = now;
        if select == 0 {
            // In mode 0 the output is low from now on, else high.
            ctx.set_line(0, Source::Isa, false);
            ctx.set_timer(0, None);
        }
    }

    fn write_count(&mut self, ctx: &mut Ctx, channel: usize, value: u8) {
        let now = ticks(ctx.now);
        let c = &mut self.s.channels[channel];
        let count = match c.access {
            1 => u16::from(value),
            2 => u16::from(value) << 8,
            _ => match c.write_low.take() {
                None => {
                    c.write_low = Some(value);
                    return;
                }
                Some(low) => u16::from(low) | u16::from(value) << 8,
            },
        };
        c.load(count, now);
        if channel == 0 {
            if c.mode == 0 {
                ctx.set_line(0, Source::Isa, false);
            }
            self.schedule(ctx);
        }
    }

    fn read_count(&mut self, now: u64, channel: usize) -> u8 {
        let c = &mut self.s.channels[channel];
        if let Some(status) = c.status.take() {
            return status;
        }
        let value = c.latched.unwrap_or_else(|| c.counter(now));
        match c.access {
            1 => {
                c.latched = None;
                value as u8
            }
            2 => {
                c.latched = None;
                (value >> 8) as u8
            }
            _ if c.read_high => {
                c.read_high = false;
                c.latched = None;
                (value >> 8) as u8
            }
            _ => {
                c.read_high = true;
                value as u8
            }
        }
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        "pit"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        *self = Pit::default();
        self.s.channels.iter_mut().for_each(|c| c.start = ticks(ctx.now));
        ctx.set_line(0, Source::Isa, false);
        ctx.set_timer(0, None);
    }
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, 0x40, 4), Window::bytes(1, 0x61, 1)]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, _size: u8) -> u32 {
        let now = ticks(ctx.now);
        if region == 0 {
            return match offset {
                0..=2 => u32::from(self.read_count(now, usize::from(offset))),
                _ => 0,
            };
        }
        self.s.refresh = !self.s.refresh;
        let c = &self.s.channels[2];
        u32::from(c.gate)
            | u32::from(self.s.speaker) << 1
            | u32::from(self.s.refresh) << 4
            | u32::from(c.output(now)) << 5
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, _size: u8, value: u32) {
        let value = value as u8;
        match (region, offset) {
            (0, 3) => self.control(ctx, value),
            (0, n) => self.write_count(ctx, usize::from(n), value),
            _ => {
                let gate = value & 1 != 0;
                self.s.speaker = value & 2 != 0;
                let c = &mut self.s.channels[2];
                // A rising gate restarts the count in every mode but 0 and 4.
                if gate && !c.gate && !matches!(c.mode, 0 | 4) {
                    c.start = ticks(ctx.now);
                }
                c.gate = gate;
            }
        }
    }
    fn timer(&mut self, ctx: &mut Ctx, _id: u8) {
        if !ctx.board.s.hpet_legacy {
            ctx.pulse(0, Source::Isa);
        }
        self.s.channels[0].armed = matches!(self.s.channels[0].mode, 2 | 3);
        self.schedule(ctx);
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack("pit", data)?;
        Ok(())
    }
}
