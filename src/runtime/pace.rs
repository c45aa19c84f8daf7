//! Keeps virtual time in step with real time on the live side.
//!
//! While the guest computes, virtual time follows the instruction count, at the rate of the fastest code of
//! late, so that it hardly runs ahead (then the machine must sleep); small jumps take up what slower code
//! leaves behind. All of it goes through the input door.

use std::time::{Duration, Instant};

use crate::machine::{Adjust, Machine, VirtualClock};

/// Behind by more than this, virtual time jumps.
const JUMP_FROM: u64 = 2_000_000;
/// Ahead by more than this, the machine sleeps.
const SLEEP_FROM: u64 = 1_000_000;
/// Over this time of execution the fastest speed is looked for, before the rate is raised again.
const WINDOW: Duration = Duration::from_millis(500);
/// Pieces of execution shorter than this say nothing about speed.
const PIECE: u64 = 20_000;

/// The host's clock against the machine's.
pub struct Pacer {
    start: Instant,
    start_ns: u64,
    /// The rate may change (`-icount shift=auto`, the default).
    adaptive: bool,
    busy: Duration,
    /// The fewest nanoseconds per instruction in this window.
    fastest: f64,
}

impl Pacer {
    /// Virtual time `machine.now()` is now.
    pub fn new(machine: &Machine, adaptive: bool) -> Self {
        Pacer {
            start: Instant::now(),
            start_ns: machine.now(),
            adaptive,
            busy: Duration::ZERO,
            fastest: f64::INFINITY,
        }
    }

    /// Start over from here: the machine was stopped for a while.
    pub fn restart(&mut self, machine: &Machine) {
        *self = Pacer::new(machine, self.adaptive);
    }

    /// What virtual time should be now.
    pub fn host_ns(&self) -> u64 {
        self.start_ns + self.start.elapsed().as_nanos() as u64
    }

    /// How long until virtual time `ns` is due.
    pub fn until(&self, ns: u64) -> Duration {
        Duration::from_nanos(ns.saturating_sub(self.host_ns()))
    }

    /// The machine executed `instructions` in `took`. Returns the adjustment to make, if any, and how
    /// long to sleep because virtual time is ahead.
    pub fn executed(
        &mut self,
        machine: &Machine,
        instructions: u64,
        took: Duration,
    ) -> (Option<Adjust>, Duration) {
        self.busy += took;
        let now = machine.now();
        let host = self.host_ns();
        if !self.adaptive {
            // A fixed rate is a promise to the guest: only hold it back, never jump.
            let ahead = now.saturating_sub(host);
            return (None, if ahead > SLEEP_FROM { Duration::from_nanos(ahead) } else { Duration::ZERO });
        }
        let current = machine.ns_per_instruction();
        let mut wanted = current;
        if instructions >= PIECE {
            // A little slower than measured: catching up by small jumps costs nothing, sleeping does.
            let real = (took.as_nanos() as f64 / instructions as f64 * 0.95).clamp(0.05, 200.0);
            self.fastest = self.fastest.min(real);
            if real < current * 0.9 && now > host {
                wanted = real;
            }
        }
        if self.busy >= WINDOW {
            if self.fastest.is_finite() && self.fastest > current * 1.1 {
                wanted = self.fastest;
            }
            self.busy = Duration::ZERO;
            self.fastest = f64::INFINITY;
        }
        let rate = if wanted == current { 0 } else { VirtualClock::rate_from(wanted) };
        let jump_ns = if host > now + JUMP_FROM { host - now } else { 0 };
        let adjust = (rate != 0 || jump_ns != 0).then_some(Adjust { jump_ns, rate });
        let ahead = now.saturating_sub(host);
        (adjust, if ahead > SLEEP_FROM { Duration::from_nanos(ahead) } else { Duration::ZERO })
    }
}
