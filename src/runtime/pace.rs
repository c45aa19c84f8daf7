//! Keeps virtual time in step with real time on the live side.
//!
//! While the guest computes, virtual time follows the instruction count; its rate is adjusted to how
//! fast the host really executes, and small jumps take up the rest. All of it goes through the input door.

use std::time::{Duration, Instant};

use crate::machine::{Adjust, Machine, VirtualClock};

/// Behind by more than this, virtual time jumps.
const JUMP_FROM: u64 = 2_000_000;
/// Ahead by more than this, the machine sleeps.
const SLEEP_FROM: u64 = 1_000_000;
/// How long busy execution is measured before the rate is looked at.
const WINDOW: Duration = Duration::from_millis(100);

/// The host's clock against the machine's.
pub struct Pacer {
    start: Instant,
    start_ns: u64,
    /// The rate may change (`-icount shift=auto`, the default).
    adaptive: bool,
    busy: Duration,
    busy_instructions: u64,
}

impl Pacer {
    /// Virtual time `machine.now()` is now.
    pub fn new(machine: &Machine, adaptive: bool) -> Self {
        Pacer {
            start: Instant::now(),
            start_ns: machine.now(),
            adaptive,
            busy: Duration::ZERO,
            busy_instructions: 0,
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
        self.busy_instructions += instructions;
        let now = machine.now();
        let host = self.host_ns();
        if !self.adaptive {
            // A fixed rate is a promise to the guest: only hold it back, never jump.
            let ahead = now.saturating_sub(host);
            return (None, if ahead > SLEEP_FROM { Duration::from_nanos(ahead) } else { Duration::ZERO });
        }
        let mut rate = 0;
        if self.busy >= WINDOW && self.busy_instructions > 10_000 {
            let real = self.busy.as_nanos() as f64 / self.busy_instructions as f64;
            let current = machine.ns_per_instruction();
            // Aim a little slow, so that catching up is by small jumps rather than by sleeping.
            let wanted = (real * 0.95).clamp(0.05, 200.0);
            if (wanted / current - 1.0).abs() > 0.10 {
                rate = VirtualClock::rate_from(current + (wanted - current) * 0.7);
            }
            self.busy = Duration::ZERO;
            self.busy_instructions = 0;
        }
        let jump_ns = if host > now + JUMP_FROM { host - now } else { 0 };
        let adjust = (rate != 0 || jump_ns != 0).then_some(Adjust { jump_ns, rate });
        let ahead = now.saturating_sub(host);
        (adjust, if ahead > SLEEP_FROM { Duration::from_nanos(ahead) } else { Duration::ZERO })
    }
}
