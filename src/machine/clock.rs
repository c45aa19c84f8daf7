//! Virtual time: a function of position, plus logged adjustments.
//!
//! `now = base + position * rate`. The base moves only when the machine idles (time skips to the
//! next timer) and by [`Adjust`], which comes through the input door; so dividing the same
//! execution into different steps gives the same time at every position.

use ftvm_accel::ClockLine;
use serde::{Deserialize, Serialize};

/// Fractional bits of the rate.
const RATE_BITS: u32 = ClockLine::SHIFT;

/// A change of the clock, made at an exact position and logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adjust {
    /// Nanoseconds to jump forward.
    pub jump_ns: u64,
    /// New rate in nanoseconds per instruction, with 24 fractional bits; 0 keeps the rate.
    pub rate: u64,
}

/// The machine's clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualClock {
    base_ns: i128,
    rate: u64,
}

impl VirtualClock {
    /// A clock that shows 0 at position 0 and gains `ns_per_instruction` for each instruction.
    pub fn new(ns_per_instruction: f64) -> Self {
        VirtualClock { base_ns: 0, rate: Self::rate_from(ns_per_instruction) }
    }

    /// The fixed-point form of a rate, at least one unit.
    pub fn rate_from(ns_per_instruction: f64) -> u64 {
        ((ns_per_instruction * f64::from(1u32 << RATE_BITS)) as u64).max(1)
    }

    /// Nanoseconds per instruction.
    pub fn ns_per_instruction(&self) -> f64 {
        self.rate as f64 / f64::from(1u32 << RATE_BITS)
    }

    /// Virtual nanoseconds at `position`.
    pub fn now(&self, position: u64) -> u64 {
        let ran = (u128::from(position) * u128::from(self.rate)) >> RATE_BITS;
        (self.base_ns + ran as i128).max(0) as u64
    }

    /// The same as a function, which holds from `position` on.
    pub fn line(&self, position: u64) -> ClockLine {
        let ran = (u128::from(position) * u128::from(self.rate)) >> RATE_BITS;
        if self.base_ns + (ran as i128) < 0 {
            return ClockLine::default();
        }
        ClockLine { base_ns: self.base_ns as u64, rate: self.rate }
    }

    /// How many instructions from `position` on until the clock shows at least `deadline`; 0 if it does.
    pub fn instructions_until(&self, position: u64, deadline: u64) -> u64 {
        if self.now(position) >= deadline {
            return 0;
        }
        let ran = (i128::from(deadline) - self.base_ns).max(0) as u128;
        let target = (ran << RATE_BITS).div_ceil(u128::from(self.rate));
        u64::try_from(target).unwrap_or(u64::MAX).saturating_sub(position).max(1)
    }

    /// The machine idles: skip to `ns` (no effect if that is not later).
    pub fn skip_to(&mut self, position: u64, ns: u64) {
        let now = self.now(position);
        if ns > now {
            self.base_ns += i128::from(ns - now);
        }
    }

    /// Apply a logged adjustment at `position`.
    pub fn adjust(&mut self, position: u64, adjust: Adjust) {
        let now = self.now(position) + adjust.jump_ns;
        if adjust.rate != 0 {
            self.rate = adjust.rate;
        }
        let ran = (u128::from(position) * u128::from(self.rate)) >> RATE_BITS;
        self.base_ns = i128::from(now) - ran as i128;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dividing_an_idle_skip_changes_nothing() {
        let mut a = VirtualClock::new(7.3);
        let mut b = a.clone();
        a.skip_to(1000, 50_000);
        for ns in [10_000, 20_001, 50_000] {
            b.skip_to(1000, ns);
        }
        assert_eq!(a, b);
        assert_eq!(a.now(1000), 50_000);
    }

    #[test]
    fn the_deadline_is_reached_exactly_and_not_before() {
        let mut c = VirtualClock::new(3.7);
        c.skip_to(10, 12_345);
        for deadline in [12_346u64, 13_000, 99_999, 1_000_003] {
            let n = c.instructions_until(10, deadline);
            assert!(c.now(10 + n) >= deadline);
            assert!(c.now(10 + n - 1) < deadline);
        }
    }

    #[test]
    fn an_adjustment_is_continuous_but_for_its_jump() {
        let mut c = VirtualClock::new(10.0);
        let before = c.now(5_000_000);
        c.adjust(5_000_000, Adjust { jump_ns: 77, rate: VirtualClock::rate_from(2.5) });
        assert_eq!(c.now(5_000_000), before + 77);
        assert_eq!(c.now(5_000_004), before + 77 + 10);
    }
    #[test]
    fn the_function_of_the_position_is_the_clock() {
        let mut c = VirtualClock::new(7.3);
        c.skip_to(1000, 1 << 50);
        c.adjust(5_000_000, Adjust { jump_ns: 3, rate: VirtualClock::rate_from(0.37) });
        // Time runs faster than it did: the base lies before 0.
        let mut early = VirtualClock::new(1.0);
        early.adjust(1_000_000, Adjust { jump_ns: 0, rate: VirtualClock::rate_from(4.0) });
        for (c, from) in [(c, 5_000_000), (early, 1_000_000)] {
            let line = c.line(from);
            for position in [from, from + 1, from + 12_345_678, 1 << 60] {
                let ran = (u128::from(position) * u128::from(line.rate)) >> ClockLine::SHIFT;
                assert_eq!(line.base_ns.wrapping_add(ran as u64), c.now(position));
            }
        }
    }
}
