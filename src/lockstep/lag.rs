//! How far the backup's execution is behind the primary's, and how much to slow the primary
//! (section 3.2 of the paper).

use std::collections::VecDeque;
use std::time::Duration;

use crate::machine::Stamp;

/// Lag measurement and throttle.
#[derive(Clone, Debug)]
pub struct LagControl {
    bound: Duration,
    /// When the primary was where, oldest first.
    history: VecDeque<(Stamp, Duration)>,
    executed: Stamp,
    lag: Duration,
    throttle: f64,
    last_tick: Duration,
}

impl LagControl {
    /// A control with this bound.
    pub fn new(bound: Duration) -> Self {
        LagControl {
            bound,
            history: VecDeque::new(),
            executed: Stamp::default(),
            lag: Duration::ZERO,
            throttle: 0.0,
            last_tick: Duration::ZERO,
        }
    }

    /// The primary told the backup to execute up to `stamp`, at time `now`.
    pub fn reached(&mut self, stamp: Stamp, now: Duration) {
        match self.history.back() {
            Some((_, at)) if now.saturating_sub(*at) < Duration::from_millis(1) => {}
            _ => self.history.push_back((stamp, now)),
        }
        if self.history.len() > 100_000 {
            self.history.pop_front();
        }
    }

    /// The backup has executed up to `stamp`.
    pub fn executed(&mut self, stamp: Stamp, now: Duration) {
        self.executed = self.executed.max(stamp);
        while self.history.front().is_some_and(|(s, _)| *s <= self.executed) {
            self.history.pop_front();
        }
        self.measure(now);
    }

    fn measure(&mut self, now: Duration) {
        self.lag = self.history.front().map_or(Duration::ZERO, |(_, at)| now.saturating_sub(*at));
    }

    /// Time passes; the throttle moves by at most 2 % every 10 ms.
    pub fn tick(&mut self, now: Duration) {
        self.measure(now);
        if now.saturating_sub(self.last_tick) < Duration::from_millis(10) {
            return;
        }
        self.last_tick = now;
        if self.lag > self.bound {
            self.throttle = (self.throttle + 0.02).min(0.95);
        } else if self.lag < self.bound / 2 {
            self.throttle = (self.throttle - 0.01).max(0.0);
        }
    }

    /// How far the backup is behind.
    pub fn lag(&self) -> Duration {
        self.lag
    }

    /// The share of time (0 to 0.95) that the primary should not run.
    pub fn throttle(&self) -> f64 {
        self.throttle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_throttle_rises_past_the_bound_and_falls_again() {
        let ms = Duration::from_millis;
        let at = |n| Stamp { position: n, ns: n };
        let mut lag = LagControl::new(ms(100));
        for t in 0..300 {
            lag.reached(at(t), ms(t));
            lag.tick(ms(t));
        }
        assert_eq!(lag.lag(), ms(299));
        assert!(lag.throttle() > 0.2);
        lag.executed(at(290), ms(300));
        assert!(lag.lag() < ms(15));
        for t in 300..1000 {
            lag.tick(ms(t));
            lag.executed(at(1000), ms(t));
        }
        assert_eq!(lag.throttle(), 0.0);
    }
}
