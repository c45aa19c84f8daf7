//! The run loop: which processor executes, how far, and what happens between instructions.

use std::sync::atomic::{AtomicBool, Ordering};

use ftvm_accel::bus::Ipi;
use ftvm_accel::{Bus, ClockLine, Exit, GuestMemory, Processor, RunResult};

use super::{Chipset, DebugStop, Machine, Reason, Stamp, Stop, VirtualClock, LONE_SLICE, SLICE};

/// What a running processor sees of the machine.
struct MachineBus<'a> {
    mem: &'a GuestMemory,
    chipset: &'a mut dyn Chipset,
    clock: &'a VirtualClock,
    ipis: &'a mut Vec<Ipi>,
    /// This processor is the one whose LINT0 the 8259 drives.
    boot_processor: bool,
    news: &'a AtomicBool,
}

impl Bus for MachineBus<'_> {
    fn io_read(&mut self, position: u64, port: u16, size: u8) -> u32 {
        self.chipset.io_read(self.mem, self.clock.now(position), port, size)
    }
    fn io_write(&mut self, position: u64, port: u16, size: u8, value: u32) {
        self.chipset.io_write(self.mem, self.clock.now(position), port, size, value);
    }
    fn mmio_read(&mut self, position: u64, addr: u64, size: u8) -> u64 {
        self.chipset.mmio_read(self.mem, self.clock.now(position), addr, size)
    }
    fn mmio_write(&mut self, position: u64, addr: u64, size: u8, value: u64) {
        self.chipset.mmio_write(self.mem, self.clock.now(position), addr, size, value);
    }
    fn clock_ns(&mut self, position: u64) -> u64 {
        self.clock.now(position)
    }
    fn clock_line(&self, position: u64) -> ClockLine {
        self.clock.line(position)
    }
    fn intr(&mut self) -> bool {
        self.boot_processor && self.chipset.intr()
    }
    fn intr_ack(&mut self, _position: u64) -> u8 {
        self.chipset.intr_ack()
    }
    fn eoi(&mut self, _position: u64, vector: u8) {
        self.chipset.eoi(vector);
    }
    fn send_ipi(&mut self, ipi: Ipi) {
        self.ipis.push(ipi);
    }
    fn random(&mut self) -> u64 {
        self.chipset.random()
    }
    fn break_requested(&self) -> bool {
        !self.ipis.is_empty() || self.chipset.has_work()
    }
    fn end_wanted(&self) -> bool {
        self.news.load(Ordering::Relaxed)
    }
}

impl Machine {
    /// Deliver what is due at this point: timers, interrupt messages, IPIs; collect outputs.
    pub(super) fn settle(&mut self) {
        if self.is_hardware() {
            return self.settle_hardware();
        }
        let stamp = self.stamp();
        for cpu in &mut self.cpus {
            if cpu.next_deadline().is_some_and(|d| d <= stamp.ns) {
                cpu.advance(stamp.ns);
            }
        }
        if self.chipset.next_deadline().is_some_and(|d| d <= stamp.ns) {
            self.chipset.advance(&self.mem, stamp.ns);
        }
        for message in self.chipset.take_messages() {
            for cpu in &mut self.cpus {
                cpu.apic_message(message);
            }
        }
        for ipi in std::mem::take(&mut self.ipis) {
            for cpu in &mut self.cpus {
                cpu.ipi(ipi);
            }
        }
        self.outputs.extend(self.chipset.take_outputs().into_iter().map(|o| (stamp, o)));
    }

    /// Virtual time at which the next timer fires.
    fn next_deadline(&self) -> Option<u64> {
        self.cpus.iter().filter_map(|c| c.next_deadline()).chain(self.chipset.next_deadline()).min()
    }

    fn idle(&self, index: usize) -> bool {
        self.cpus[index].is_idle(index == 0 && self.chipset.intr())
    }

    /// Whether every processor is idle.
    pub fn is_idle(&self) -> bool {
        (0..self.cpus.len()).all(|i| self.idle(i))
    }

    /// The machine is idle and time passes: skip to `ns`, firing the timers that are due on the way,
    /// in order; stops early at the first one that wakes a processor. Returns the time reached.
    pub fn skip_to(&mut self, ns: u64) -> u64 {
        while self.is_idle() {
            match self.next_deadline() {
                Some(deadline) if deadline <= ns => {
                    self.clock.skip_to(self.position, deadline);
                    self.settle();
                }
                _ => {
                    self.clock.skip_to(self.position, ns);
                    break;
                }
            }
        }
        self.now()
    }

    /// Execute at most `limit` instructions; see [`Stop`]. A paused machine must not be run.
    pub fn run(&mut self, limit: u64) -> Stop {
        self.run_until(limit, &AtomicBool::new(false))
    }

    /// The same; where the guest looks at a device (for what it waits for, perhaps), it ends early once `news` is set.
    pub fn run_until(&mut self, limit: u64, news: &AtomicBool) -> Stop {
        let end = self.position.saturating_add(limit);
        let mut ended = false;
        loop {
            self.settle();
            // Between a delivery and the next instruction no budget ends, and so no replay: nothing may be put in there.
            if self.delivered() == 0 {
                if let Some(request) = self.chipset.take_request() {
                    return Stop::Request(request);
                }
                if !self.outputs.is_empty() {
                    return Stop::Output;
                }
            }
            if self.position >= end {
                return Stop::Limit;
            }
            if ended && news.load(Ordering::Relaxed) {
                return Stop::News;
            }
            if !self.pick() {
                return Stop::Idle { next: self.next_deadline() };
            }
            let timer =
                self.next_deadline().map_or(u64::MAX, |d| self.clock.instructions_until(self.position, d));
            // A processor that is alone has no turns, each of whose ends would cost time.
            let turns = self.cpus.len() > 1;
            let slice = if turns { self.schedule.slice_left } else { u64::MAX };
            let budget = (end - self.position).min(timer.max(1)).min(slice);
            let index = self.schedule.current as usize;
            let stepped = self.step == Some(index);
            let budget = if stepped { budget.min(1) } else { budget };
            let result =
                self.with_cpu(index, news, |cpu, mem, bus, position| cpu.run(mem, bus, position, budget));
            // A break, too, may come between a delivery and the next instruction.
            ended = result.exit == Exit::Budget;
            match result.exit {
                Exit::Budget | Exit::Break | Exit::Halt => {}
                Exit::Pause => {
                    if turns {
                        self.schedule.slice_left = 0;
                    }
                }
                Exit::Shutdown => {
                    log::warn!("triple fault at position {}: resetting the machine", self.position);
                    // What led to it counts as an instruction, or else a replay could not come to where it lies behind.
                    self.position += 1;
                    return Stop::Request(ftvm_devices::MachineRequest::Reset);
                }
                Exit::Debug => {
                    if let Some(hit) = self.cpus[index].take_debug_hit() {
                        self.step = None;
                        return Stop::Debug(DebugStop { cpu: index, reason: hit.into() });
                    }
                }
                Exit::Internal => return Stop::Dead,
            }
            if stepped && result.retired > 0 {
                self.step = None;
                return Stop::Debug(DebugStop { cpu: index, reason: Reason::Step });
            }
        }
    }

    fn with_cpu(
        &mut self,
        index: usize,
        news: &AtomicBool,
        work: impl FnOnce(&mut dyn Processor, &GuestMemory, &mut dyn Bus, u64) -> RunResult,
    ) -> RunResult {
        let mut bus = MachineBus {
            mem: &self.mem,
            chipset: self.chipset.as_mut(),
            clock: &self.clock,
            ipis: &mut self.ipis,
            boot_processor: index == 0,
            news,
        };
        let result = work(self.cpus[index].as_mut(), &self.mem, &mut bus, self.position);
        self.position += result.retired;
        if self.cpus.len() > 1 {
            self.schedule.slice_left = self.schedule.slice_left.saturating_sub(result.retired);
        }
        result
    }

    /// How many interrupts and exceptions were delivered here that no instruction has followed yet. A debugger may stop there;
    /// a replay comes there by [`MachineInput::Deliver`] only.
    ///
    /// [`MachineInput::Deliver`]: super::MachineInput::Deliver
    pub fn delivered(&self) -> u32 {
        self.cpus.iter().map(|c| c.delivered(self.position)).max().unwrap_or(0)
    }

    /// Deliver what is due here, up to that many.
    pub(super) fn deliver(&mut self, count: u32) {
        self.settle();
        while self.delivered() < count && self.pick() {
            let (index, news) = (self.schedule.current as usize, AtomicBool::new(false));
            let result = self.with_cpu(index, &news, |cpu, mem, bus, at| cpu.deliver(mem, bus, at, count));
            self.settle();
            // Not so: a log that says what was not.
            if result.retired > 0 || !matches!(result.exit, Exit::Break | Exit::Budget) {
                return;
            }
        }
    }

    /// Make the schedule point at a runnable processor with a slice; false if all are idle.
    fn pick(&mut self) -> bool {
        let count = self.cpus.len() as u32;
        if self.schedule.slice_left > 0 && !self.idle(self.schedule.current as usize) {
            return true;
        }
        for step in 1..=count {
            let candidate = (self.schedule.current + step) % count;
            if !self.idle(candidate as usize) {
                // The end of a turn costs time, and nobody waits for this one's.
                let lone = (0..count).all(|c| c == candidate || self.idle(c as usize));
                let slice_left = if lone { LONE_SLICE } else { SLICE };
                self.schedule = super::Schedule { current: candidate, slice_left };
                return true;
            }
        }
        false
    }

    /// Run towards `target`: execute, and skip idle time, but never past it. Returns when it is reached
    /// (`None`) or earlier for outputs or a request. No input may be due before `target`.
    pub fn run_towards(&mut self, target: Stamp, limit: u64) -> Option<Stop> {
        if self.position < target.position {
            let stop = self.run(limit.min(target.position - self.position));
            return match stop {
                Stop::Limit => Some(Stop::Limit),
                Stop::Idle { next: Some(next) } => {
                    self.skip_to(next);
                    Some(Stop::Limit)
                }
                other => Some(other),
            };
        }
        self.settle();
        if !self.outputs.is_empty() {
            return Some(Stop::Output);
        }
        if self.now() < target.ns && self.is_idle() {
            self.skip_to(target.ns);
            if !self.outputs.is_empty() {
                return Some(Stop::Output);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::guest;

    #[test]
    fn news_end_a_run_where_the_guest_looks_at_a_device() {
        let mut machine = guest::machine().unwrap();
        let news = AtomicBool::new(true);
        // It does at every eighth instruction.
        for n in 1..=3 {
            assert_eq!(machine.run_until(1_000, &news), Stop::News);
            assert_eq!(machine.stamp().position, 8 * n);
        }
        assert_eq!(machine.run_until(3, &news), Stop::Limit);
        let mut twin = guest::machine().unwrap();
        assert_eq!(twin.run(27), Stop::Limit);
        assert_eq!(machine.state_hash(), twin.state_hash());
        news.store(false, Ordering::Relaxed);
        assert!(matches!(machine.run_until(1_000, &news), Stop::Idle { .. }));
        assert_eq!(machine.stamp().position, 64);
    }
}
