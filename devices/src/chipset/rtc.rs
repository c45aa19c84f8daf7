//! The MC146818 real-time clock with the PC's CMOS RAM (Motorola MC146818A datasheet).

use serde::{Deserialize, Serialize};

use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Window};
use crate::door::{GuestEvent, Input};

const SECOND: u64 = 1_000_000_000;
const REG_A: usize = 0x0A;
const REG_B: usize = 0x0B;
const REG_C: usize = 0x0C;
const REG_D: usize = 0x0D;
const CENTURY: usize = 0x32;
const SET: u8 = 0x80;
const PF: u8 = 0x40;
const AF: u8 = 0x20;
const UF: u8 = 0x10;
const DAY: i64 = 86_400;
/// How far from its base the clock can be, in seconds: more than the century register shows.
const FAR: i64 = 1 << 40;

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y - era * 400;
    let doy = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    (year, month, doy - (153 * mp + 2) / 5 + 1)
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    index: u8,
    cmos: Vec<u8>,
    /// Seconds between the configured base and what the clock shows at virtual time 0.
    offset: i64,
    /// What the guest set, beside [`Input::RtcAdjust`]; told in events.
    guest_offset: i64,
    /// Second up to which update and alarm flags were looked at.
    seen: i64,
    /// While SET is on: the time registers as written.
    frozen: Option<[u8; 8]>,
    /// Virtual time of the last periodic tick.
    periodic_from: u64,
}

/// The clock.
pub struct Rtc {
    base: i64,
    initial: Vec<u8>,
    s: State,
}

/// Time registers in the order of [`State::frozen`].
const TIME_REGS: [usize; 8] = [0, 2, 4, 6, 7, 8, 9, CENTURY];

impl Rtc {
    /// A clock that shows `base` (Unix seconds) at virtual time 0; `cmos` are (index, value) pairs.
    pub fn new(base: i64, contents: &[(u8, u8)]) -> Rtc {
        let mut cmos = vec![0; 128];
        cmos[REG_A] = 0x26;
        cmos[REG_B] = 0x02;
        cmos[REG_D] = 0x80;
        for &(index, value) in contents {
            cmos[usize::from(index & 127)] = value;
        }
        let s = State {
            index: 0,
            cmos: cmos.clone(),
            offset: 0,
            guest_offset: 0,
            seen: 0,
            frozen: None,
            periodic_from: 0,
        };
        Rtc { base, initial: cmos, s }
    }

    fn seconds(&self, now: u64) -> i64 {
        self.base.clamp(-FAR, FAR) + self.s.offset + (now / SECOND) as i64
    }

    fn encode(&self, value: i64) -> u8 {
        if self.s.cmos[REG_B] & 4 != 0 {
            value as u8
        } else {
            (((value / 10 % 10) << 4) | (value % 10)) as u8
        }
    }

    fn decode(&self, value: u8) -> i64 {
        if self.s.cmos[REG_B] & 4 != 0 {
            i64::from(value)
        } else {
            i64::from(value >> 4) * 10 + i64::from(value & 15)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.s.cmos[REG_B] & 2 != 0 {
            return self.encode(hour);
        }
        let h = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(h) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.s.cmos[REG_B] & 2 != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7F) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// The time registers for a Unix time.
    fn fields(&self, time: i64) -> [u8; 8] {
        let (days, rest) = (time.div_euclid(DAY), time.rem_euclid(DAY));
        let (year, month, day) = civil_from_days(days);
        [
            self.encode(rest % 60),
            self.encode(rest / 60 % 60),
            self.encode_hour(rest / 3600),
            self.encode((days + 4).rem_euclid(7) + 1),
            self.encode(day),
            self.encode(month),
            self.encode(year.rem_euclid(100)),
            self.encode(year.div_euclid(100).rem_euclid(100)),
        ]
    }

    fn time_of(&self, f: &[u8; 8]) -> i64 {
        let year = self.decode(f[7]) * 100 + self.decode(f[6]);
        let month = self.decode(f[5]).clamp(1, 12);
        days_from_civil(year, month, self.decode(f[4])) * DAY
            + self.decode_hour(f[2]) * 3600
            + self.decode(f[1]) * 60
            + self.decode(f[0])
    }

    fn set_time(&mut self, ctx: &mut Ctx, f: &[u8; 8]) {
        let change = self.time_of(f).saturating_sub(self.seconds(ctx.now));
        if change != 0 {
            self.s.offset = self.s.offset.saturating_add(change).clamp(-FAR, FAR);
            self.s.guest_offset = self.s.guest_offset.saturating_add(change);
            ctx.event(GuestEvent::RtcChange { offset: self.s.guest_offset });
        }
        self.s.seen = self.seconds(ctx.now);
        self.schedule(ctx);
    }

    fn alarm_matches(&self, time: i64) -> bool {
        let rest = time.rem_euclid(DAY);
        let c = &self.s.cmos;
        let hit = |reg: u8, value: i64| reg & 0xC0 == 0xC0 || self.decode(reg) == value;
        hit(c[1], rest % 60)
            && hit(c[3], rest / 60 % 60)
            && (c[5] & 0xC0 == 0xC0 || self.decode_hour(c[5]) == rest / 3600)
    }

    /// Bring the flags of register C up to date.
    fn catch_up(&mut self, ctx: &mut Ctx) {
        let now = self.seconds(ctx.now);
        if now > self.s.seen && self.s.cmos[REG_B] & SET == 0 {
            self.s.cmos[REG_C] |= UF;
            let from = self.s.seen.max(now - DAY);
            if self.s.cmos[REG_C] & AF == 0 && (from + 1..=now).any(|t| self.alarm_matches(t)) {
                self.s.cmos[REG_C] |= AF;
            }
        }
        self.s.seen = now;
        self.update_irq(ctx);
    }

    fn update_irq(&mut self, ctx: &mut Ctx) {
        let on = self.s.cmos[REG_B] & self.s.cmos[REG_C] & (PF | AF | UF) != 0;
        self.s.cmos[REG_C] = self.s.cmos[REG_C] & 0x70 | u8::from(on) << 7;
        ctx.set_irq(8, on && !ctx.board.s.hpet_legacy);
    }

    fn period(&self) -> Option<u64> {
        let a = self.s.cmos[REG_A];
        let rate = u32::from(a & 15);
        if rate == 0 || a & 0x70 > 0x20 || self.s.cmos[REG_B] & PF == 0 {
            return None;
        }
        let rate = if rate < 3 { rate + 7 } else { rate };
        Some((1u64 << (rate - 1)) * SECOND / 32_768)
    }

    fn schedule(&mut self, ctx: &mut Ctx) {
        let at = self.period().map(|p| {
            let passed = ctx.now.saturating_sub(self.s.periodic_from);
            self.s.periodic_from + (passed / p + 1) * p
        });
        ctx.set_timer(0, at);
        let b = self.s.cmos[REG_B];
        let c = self.s.cmos[REG_C];
        let next = if b & SET != 0 {
            None
        } else if b & UF != 0 && c & UF == 0 {
            Some(1)
        } else if b & AF != 0 && c & AF == 0 {
            let now = self.seconds(ctx.now);
            (1..=DAY).find(|d| self.alarm_matches(now + d)).map(|d| d as u64)
        } else {
            None
        };
        ctx.set_timer(1, next.map(|d| (ctx.now / SECOND + d) * SECOND));
    }

    fn write_register(&mut self, ctx: &mut Ctx, index: usize, value: u8) {
        if let Some(slot) = TIME_REGS.iter().position(|&r| r == index) {
            if let Some(frozen) = &mut self.s.frozen {
                frozen[slot] = value;
            } else {
                let mut f = self.fields(self.seconds(ctx.now));
                f[slot] = value;
                self.set_time(ctx, &f);
            }
            return;
        }
        match index {
            1 | 3 | 5 => {
                self.s.cmos[index] = value;
                self.schedule(ctx);
            }
            REG_A => {
                self.s.cmos[REG_A] = value & 0x7F;
                self.s.periodic_from = ctx.now;
                self.schedule(ctx);
            }
            REG_B => {
                self.catch_up(ctx);
                let old = self.s.cmos[REG_B];
                if value & SET != 0 && old & SET == 0 {
                    self.s.frozen = Some(self.fields(self.seconds(ctx.now)));
                }
                self.s.cmos[REG_B] = if value & SET != 0 { value & !UF } else { value };
                if old & PF == 0 && value & PF != 0 {
                    self.s.periodic_from = ctx.now;
                }
                if value & SET == 0 {
                    if let Some(f) = self.s.frozen.take() {
                        self.set_time(ctx, &f);
                    }
                }
                self.update_irq(ctx);
                self.schedule(ctx);
            }
            REG_C | REG_D => {}
            _ => self.s.cmos[index] = value,
        }
    }

    fn read_register(&mut self, ctx: &mut Ctx, index: usize) -> u8 {
        if let Some(slot) = TIME_REGS.iter().position(|&r| r == index) {
            return match &self.s.frozen {
                Some(f) => f[slot],
                None => self.fields(self.seconds(ctx.now))[slot],
            };
        }
        match index {
            REG_A => {
                // Update in progress shows 244 us before the update.
                let rest = SECOND - ctx.now % SECOND;
                let updating = self.s.frozen.is_none() && rest <= 244_000;
                self.s.cmos[REG_A] | u8::from(updating) << 7
            }
            REG_C => {
                self.catch_up(ctx);
                let value = self.s.cmos[REG_C];
                self.s.cmos[REG_C] = 0;
                self.update_irq(ctx);
                self.schedule(ctx);
                value
            }
            _ => self.s.cmos[index],
        }
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.s.cmos[REG_B] &= !(PF | AF | UF | 8);
        self.s.cmos[REG_C] = 0;
        self.s.index = 0;
        // What firmware reads at start (boot order, memory size) is put back.
        for (i, &v) in self.initial.iter().enumerate().skip(0x0E) {
            if v != 0 {
                self.s.cmos[i] = v;
            }
        }
        self.s.cmos[0x0F] = 0;
        self.s.seen = self.seconds(ctx.now);
        self.update_irq(ctx);
        self.schedule(ctx);
    }
    fn ports(&self) -> Vec<Window> {
        vec![Window::bytes(0, 0x70, 2)]
    }
    fn pio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, _size: u8) -> u32 {
        if offset == 0 {
            return 0xFF;
        }
        let index = usize::from(self.s.index & 127);
        u32::from(self.read_register(ctx, index))
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, _size: u8, value: u32) {
        if offset == 0 {
            self.s.index = value as u8 & 127;
        } else {
            let index = usize::from(self.s.index);
            self.write_register(ctx, index, value as u8);
        }
    }
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {
        if id == 0 {
            self.s.cmos[REG_C] |= PF;
            self.update_irq(ctx);
        } else {
            self.catch_up(ctx);
        }
        self.schedule(ctx);
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        if let Input::RtcAdjust { seconds } = input {
            self.s.offset = self.s.offset.saturating_add(*seconds).clamp(-FAR, FAR);
            self.schedule(ctx);
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: State = unpack("rtc", data)?;
        if s.cmos.len() != 128 {
            return Err(DeviceError::Misfit("rtc".into()));
        }
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_go_both_ways() {
        assert_eq!(days_from_civil(1970, 1, 1), 0);
        assert_eq!(days_from_civil(2000, 2, 29), 11_016);
        for d in [-719_468, -1, 0, 59, 60, 11_016, 20_000, 2_932_896] {
            let (y, m, day) = civil_from_days(d);
            assert_eq!(days_from_civil(y, m, day), d);
        }
    }

    #[test]
    fn the_clock_shows_the_base_in_bcd() {
        let r = Rtc::new(1_704_067_199, &[]); // 2023-12-31 23:59:59, a Sunday
        assert_eq!(r.fields(r.seconds(0)), [0x59, 0x59, 0x23, 1, 0x31, 0x12, 0x23, 0x20]);
        assert_eq!(r.fields(r.seconds(SECOND)), [0, 0, 0, 2, 1, 1, 0x24, 0x20]);
        assert_eq!(r.time_of(&r.fields(1_704_067_199)), 1_704_067_199);
    }
}
