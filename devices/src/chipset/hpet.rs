//! The high precision event timer (IA-PC HPET specification 1.0a): 100 MHz, three comparators.

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Source, Window};

/// Where the HPET decodes.
pub const BASE: u64 = 0xFED0_0000;
/// Nanoseconds in a tick.
const TICK: u64 = 10;
const TIMERS: usize = 3;
/// Capabilities: 10 ns period in fs, vendor 8086, legacy route, 64 bits, three timers, revision 1.
pub const CAPABILITIES: u64 = (10_000_000 << 32) | 0x8086_A201;

const INT_LEVEL: u64 = 2;
const INT_ENABLE: u64 = 4;
const PERIODIC: u64 = 8;
const SET_ACCUMULATOR: u64 = 0x40;
const MODE_32: u64 = 0x100;
const WRITABLE: u64 = 0x3F4E;
/// Periodic and 64-bit capable.
const TIMER_CAPS: u64 = 0x30;
/// Interrupts a comparator may be routed to: I/O APIC pins 2, 8 and 16 to 23.
const ROUTES: u64 = 0x00FF_0104;

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Comparator {
    config: u64,
    compare: u64,
    period: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    config: u64,
    status: u64,
    /// Counter value at virtual time `since` (while enabled: counting from then).
    counter: u64,
    since: u64,
    timers: [Comparator; TIMERS],
}

/// The timer block.
pub struct Hpet {
    s: State,
}

impl Default for Hpet {
    fn default() -> Self {
        let t = Comparator { config: TIMER_CAPS | ROUTES << 32, compare: u64::MAX, period: 0 };
        Hpet { s: State { config: 0, status: 0, counter: 0, since: 0, timers: [t; TIMERS] } }
    }
}

impl Hpet {
    fn enabled(&self) -> bool {
        self.s.config & 1 != 0
    }

    fn counter(&self, now: u64) -> u64 {
        if self.enabled() {
            self.s.counter.wrapping_add(now.saturating_sub(self.s.since) / TICK)
        } else {
            self.s.counter
        }
    }

    fn line(&self, n: usize) -> u8 {
        if self.s.config & 2 != 0 && n < 2 {
            // Legacy replacement: timer 0 is IRQ 0 (pin 2), timer 1 is IRQ 8.
            [0, 8][n]
        } else {
            match (self.s.timers[n].config >> 9 & 31) as u8 {
                2 => 0,
                pin => pin,
            }
        }
    }

    /// Ticks until comparator `n` matches.
    fn distance(&self, n: usize, now: u64) -> u64 {
        let t = &self.s.timers[n];
        let counter = self.counter(now);
        let d = t.compare.wrapping_sub(counter);
        if t.config & MODE_32 != 0 {
            u64::from(d as u32)
        } else {
            d
        }
    }

    fn schedule(&self, ctx: &mut Ctx, n: usize) {
        let t = &self.s.timers[n];
        let mut at = None;
        if self.enabled() && (t.config & INT_ENABLE != 0 || t.config & PERIODIC != 0) {
            let mut d = self.distance(n, ctx.now);
            if d == 0 {
                d = if t.config & MODE_32 != 0 { 1 << 32 } else { u64::MAX };
            }
            // In 64-bit mode a comparator far ahead (one that has passed) does not fire in our time.
            if d < u64::MAX / TICK {
                let phase = (ctx.now - self.s.since.min(ctx.now)) % TICK;
                at = (ctx.now - phase).checked_add(d * TICK);
            }
        }
        ctx.set_timer(n as u8, at);
    }

    fn lower(&self, ctx: &mut Ctx, n: usize) {
        ctx.set_line(self.line(n), Source::Hpet, false);
    }

    fn write_word(&mut self, ctx: &mut Ctx, at: u64, shift: u32, mask: u64, value: u64) {
        let merge = |old: u64| old & !(mask << shift) | (value & mask) << shift;
        match at {
            0x10 => {
                let old = self.s.config;
                let new = merge(old) & 3;
                if (old ^ new) & 1 != 0 {
                    self.s.counter = self.counter(ctx.now);
                    self.s.since = ctx.now;
                }
                if old & 2 != new & 2 {
                    (0..2).for_each(|n| self.lower(ctx, n));
                    // From here on the PIT and the RTC do not drive these lines: none may stay high.
                    ctx.set_line(0, Source::Isa, false);
                    ctx.set_line(8, Source::Isa, false);
                }
                self.s.config = new;
                ctx.board.s.hpet_legacy = new & 2 != 0;
                if new & 2 != 0 {
                    // The interval timer and the clock are cut off from their lines.
                    ctx.set_irq(0, false);
                    ctx.set_irq(8, false);
                }
                (0..TIMERS).for_each(|n| self.schedule(ctx, n));
            }
            0x20 => {
                let clear = self.s.status & merge(0);
                for n in 0..TIMERS {
                    if clear >> n & 1 != 0 {
                        self.lower(ctx, n);
                    }
                }
                self.s.status &= !clear;
            }
            0xF0 if !self.enabled() => self.s.counter = merge(self.s.counter),
            0x100..=0x15F => {
                let n = ((at - 0x100) / 0x20) as usize;
                match at & 0x18 {
                    0 => {
                        let old = self.s.timers[n].config;
                        let new = merge(old) & WRITABLE | old & !WRITABLE;
                        if (old & INT_ENABLE != 0 && new & INT_ENABLE == 0) || (old ^ new) & 0x3E00 != 0 {
                            self.lower(ctx, n);
                        }
                        self.s.timers[n].config = new;
                        if new & MODE_32 != 0 {
                            self.s.timers[n].compare &= 0xFFFF_FFFF;
                            self.s.timers[n].period &= 0xFFFF_FFFF;
                        }
                        self.schedule(ctx, n);
                    }
                    8 => {
                        let t = &mut self.s.timers[n];
                        let value = if t.config & MODE_32 != 0 {
                            if shift != 0 {
                                return;
                            }
                            value & 0xFFFF_FFFF
                        } else {
                            value
                        };
                        let merged = |old: u64| old & !(mask << shift) | (value & mask) << shift;
                        if t.config & PERIODIC == 0 || t.config & SET_ACCUMULATOR != 0 {
                            t.compare = merged(t.compare);
                        }
                        if t.config & PERIODIC != 0 && t.config & SET_ACCUMULATOR == 0 {
                            t.period = merged(t.period);
                        }
                        t.config &= !SET_ACCUMULATOR;
                        self.schedule(ctx, n);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn read_word(&self, now: u64, at: u64) -> u64 {
        match at {
            0 => CAPABILITIES,
            0x10 => self.s.config,
            0x20 => self.s.status,
            0xF0 => self.counter(now),
            0x100..=0x15F => {
                let t = &self.s.timers[((at - 0x100) / 0x20) as usize];
                match at & 0x18 {
                    0 => t.config,
                    8 => t.compare,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }
}

impl Device for Hpet {
    fn name(&self) -> &str {
        "hpet"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        for n in 0..TIMERS {
            self.lower(ctx, n);
            ctx.set_timer(n as u8, None);
        }
        *self = Hpet::default();
        ctx.board.s.hpet_legacy = false;
    }
    fn windows(&self) -> Vec<Window> {
        vec![Window::new(0, BASE, 0x400)]
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        let word = self.read_word(ctx.now, offset & !7) >> (8 * (offset & 7));
        if size >= 8 {
            word
        } else {
            word & ((1 << (8 * u64::from(size))) - 1)
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        let mask = if size >= 8 { u64::MAX } else { (1 << (8 * u64::from(size))) - 1 };
        let shift = 8 * (offset & 7) as u32;
        self.write_word(ctx, offset & !7, shift, mask, value);
    }
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {
        let n = usize::from(id);
        if n >= TIMERS {
            return;
        }
        let counter = self.counter(ctx.now);
        let t = &mut self.s.timers[n];
        if t.config & PERIODIC != 0 && t.period != 0 {
            // Skip periods that passed unseen.
            let late = counter.wrapping_sub(t.compare);
            let late = if t.config & MODE_32 != 0 { u64::from(late as u32) } else { late };
            let steps = (late / t.period).wrapping_add(1);
            t.compare = t.compare.wrapping_add(steps.wrapping_mul(t.period));
            if t.config & MODE_32 != 0 {
                t.compare &= 0xFFFF_FFFF;
            }
        }
        let config = t.config;
        if config & INT_ENABLE != 0 {
            let line = self.line(n);
            if config & INT_LEVEL != 0 {
                self.s.status |= 1 << n;
                ctx.set_line(line, Source::Hpet, true);
            } else {
                ctx.pulse(line, Source::Hpet);
                ctx.set_line(line, Source::Hpet, false);
            }
        }
        self.schedule(ctx, n);
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack("hpet", data)?;
        Ok(())
    }
}
