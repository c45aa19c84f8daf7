//! A machine whose processors are the host's.
//!
//! They run on threads of their own while the machine thread waits ([`Machine::lend`]), and stand still
//! ([`Machine::still`]) when it looks at them. The position does not move; virtual time is the host's, counted from
//! where it was.

use std::time::{Duration, Instant};

use ftvm_accel::kvm::{Bell, Board, Kvm, KvmError, Trouble};
use ftvm_accel::{ApicMessage, GuestMemory, Processor};
use ftvm_devices::MachineRequest;

use super::{Chipset, DebugStop, Machine, Reason, Stop};

/// Virtual time while it follows the host's.
#[derive(Clone, Copy)]
struct HostClock {
    start: Instant,
    start_ns: u64,
}

impl HostClock {
    fn from(ns: u64) -> Self {
        HostClock { start: Instant::now(), start_ns: ns }
    }

    fn now(&self) -> u64 {
        self.start_ns + self.start.elapsed().as_nanos() as u64
    }
}

pub(super) struct Hardware {
    kvm: Kvm,
    clock: HostClock,
    /// Time stood since the processors last ran, or is another.
    shifted: bool,
    trouble: Option<String>,
    /// Where a debugger's INT3 is while they run, and what it hides: guest physical address, byte.
    patches: Vec<(u64, u8)>,
}

/// INT3.
const BREAKPOINT: u8 = 0xCC;

/// What the processors reach.
struct Lent<'a> {
    mem: &'a GuestMemory,
    chipset: &'a mut dyn Chipset,
    clock: HostClock,
}

impl Board for Lent<'_> {
    fn io_read(&mut self, port: u16, size: u8) -> u32 {
        self.chipset.io_read(self.mem, self.clock.now(), port, size)
    }
    fn io_write(&mut self, port: u16, size: u8, value: u32) {
        self.chipset.io_write(self.mem, self.clock.now(), port, size, value);
    }
    fn mmio_read(&mut self, address: u64, size: u8) -> u64 {
        self.chipset.mmio_read(self.mem, self.clock.now(), address, size)
    }
    fn mmio_write(&mut self, address: u64, size: u8, value: u64) {
        self.chipset.mmio_write(self.mem, self.clock.now(), address, size, value);
    }
    fn intr(&self) -> bool {
        self.chipset.intr()
    }
    fn intr_ack(&mut self) -> u8 {
        self.chipset.intr_ack()
    }
    fn eoi(&mut self, vector: u8) {
        self.chipset.eoi(vector);
    }
    fn take_messages(&mut self) -> Vec<ApicMessage> {
        self.chipset.take_messages()
    }
    fn level_pins(&self) -> Vec<Option<ApicMessage>> {
        self.chipset.level_pins()
    }
    fn has_news(&self) -> bool {
        self.chipset.has_news()
    }
    fn next_deadline(&self) -> Option<u64> {
        self.chipset.next_deadline()
    }
    fn memory(&self) -> &GuestMemory {
        self.mem
    }
    fn bells_version(&self) -> u64 {
        self.chipset.bells_version()
    }
    fn bells(&self) -> Vec<Bell> {
        self.chipset.bells()
    }
    fn ring(&mut self, token: u64) {
        self.chipset.ring(self.mem, self.clock.now(), token);
    }
}

/// The hardware and what it reaches, apart.
macro_rules! parts {
    ($machine:expr, $hardware:ident, $board:ident) => {
        let Some($hardware) = $machine.hardware.as_mut() else { return Default::default() };
        let mut $board =
            Lent { mem: &$machine.mem, chipset: $machine.chipset.as_mut(), clock: $hardware.clock };
    };
}

impl Hardware {
    pub fn new(kvm: Kvm, now: u64) -> Self {
        Hardware { kvm, clock: HostClock::from(now), shifted: true, trouble: None, patches: Vec::new() }
    }

    pub fn now(&self) -> Option<u64> {
        self.kvm.is_running().then(|| self.clock.now())
    }

    /// Virtual time stands at `now`, and what is loaded is of this moment.
    pub fn set_time(&mut self, now: u64) {
        self.kvm.set_time(now);
        self.shifted = true;
    }

    pub fn time_stood(&mut self) {
        self.shifted = true;
    }

    fn note(&mut self, result: Result<(), KvmError>) {
        if let Err(e) = result {
            self.trouble.get_or_insert(e.to_string());
        }
    }
}

impl Machine {
    /// Whether the processors are the host's.
    pub fn is_hardware(&self) -> bool {
        self.hardware.is_some()
    }

    /// The threads of the processors, where they have threads of their own.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.hardware.as_ref().map_or_else(Vec::new, |h| h.kvm.thread_ids())
    }

    /// Make the host's processors stand still, and time with them, until the machine is lent again.
    pub fn still(&mut self) {
        if self.hardware.as_ref().is_none_or(|h| !h.kvm.is_running()) {
            return;
        }
        let stopped = {
            parts!(self, hardware, board);
            let clock = hardware.clock;
            hardware.kvm.stop(&mut board, || clock.now())
        };
        self.take_patches();
        match stopped {
            Ok(now) => self.clock.skip_to(self.position, now),
            Err(e) => {
                if let Some(h) = &mut self.hardware {
                    let now = h.clock.now();
                    self.clock.skip_to(self.position, now);
                    h.note(Err(e));
                }
            }
        }
    }

    /// Let them run.
    fn go(&mut self) {
        let Some(h) = &mut self.hardware else { return };
        if h.kvm.is_running() {
            return;
        }
        self.put_patches();
        let Some(h) = &mut self.hardware else { return };
        let stood = self.clock.now(self.position);
        if h.shifted {
            h.clock = HostClock::from(stood);
        }
        let now = h.clock.now().max(stood);
        let done = h.kvm.go(now, !h.shifted);
        h.shifted = false;
        h.note(done);
    }

    /// Put INT3 where a debugger's breakpoints are that have no debug register. It is there only while the processors run: so
    /// whoever looks at memory that stands still, and whoever copies it to its end, sees the guest's own.
    fn put_patches(&mut self) {
        let Some(h) = &self.hardware else { return };
        let breaks = h.kvm.soft_breaks();
        if breaks.is_empty() {
            return;
        }
        for index in h.kvm.at_soft_breaks() {
            // Behind it, before it is hidden again.
            parts!(self, hardware, board);
            let done = hardware.kvm.step(&mut board, index);
            hardware.note(done);
        }
        let views: Vec<_> = self.cpus.iter().filter_map(|cpu| cpu.view()).collect();
        let mut patches = Vec::new();
        for at in breaks {
            let physical = views.iter().find_map(|view| ftvm_accel::debug::translate(view, &self.mem, at));
            let mut byte = [0];
            match physical.filter(|gpa| self.mem.read(*gpa, &mut byte).is_ok()) {
                Some(gpa) if patches.iter().all(|(p, _)| *p != gpa) => {
                    if self.mem.write(gpa, &[BREAKPOINT]).is_ok() {
                        patches.push((gpa, byte[0]));
                    }
                }
                Some(_) => {}
                None => log::warn!("gdb: there is no RAM at the breakpoint {at:#x} now"),
            }
        }
        if let Some(h) = &mut self.hardware {
            h.patches = patches;
        }
    }

    /// Put back what the breakpoints hid.
    fn take_patches(&mut self) {
        let Some(h) = &mut self.hardware else { return };
        for (gpa, byte) in std::mem::take(&mut h.patches) {
            let mut now = [0];
            // What the guest wrote there is its own.
            if self.mem.read(gpa, &mut now).is_ok() && now[0] == BREAKPOINT {
                let _ = self.mem.write(gpa, &[byte]);
            }
        }
    }

    /// Deliver what is due.
    pub(super) fn settle_hardware(&mut self) {
        let now = self.now();
        if self.chipset.next_deadline().is_some_and(|d| d <= now) {
            self.chipset.advance(&self.mem, now);
        }
        {
            parts!(self, hardware, board);
            let done = hardware.kvm.deliver(&mut board);
            hardware.note(done);
        }
        let stamp = self.stamp();
        self.outputs.extend(self.chipset.take_outputs().into_iter().map(|o| (stamp, o)));
    }

    /// Look after the devices of a machine whose processors run by themselves; [`Stop::Limit`]: nothing is to be done.
    pub fn attend(&mut self) -> Stop {
        if let Some(h) = &self.hardware {
            h.kvm.awake();
        }
        self.settle_hardware();
        if let Some(request) = self.chipset.take_request() {
            return Stop::Request(request);
        }
        if !self.outputs.is_empty() {
            return Stop::Output;
        }
        let Some(h) = &mut self.hardware else { return Stop::Limit };
        match h.kvm.trouble() {
            Some(Trouble::Shutdown) => {
                log::warn!("triple fault: resetting the machine");
                return Stop::Request(MachineRequest::Reset);
            }
            Some(Trouble::Failed(text)) => {
                h.trouble.get_or_insert(text);
            }
            Some(Trouble::Debug(cpu, hit)) => {
                let reason = hit.map_or(Reason::Step, Reason::from);
                self.set_step(None);
                return Stop::Debug(DebugStop { cpu: cpu as usize, reason });
            }
            None => {}
        }
        match &h.trouble {
            Some(_) => Stop::Dead,
            None => Stop::Limit,
        }
    }

    /// Why the processors cannot go on, once.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.hardware.as_mut()?.trouble.take()
    }

    /// Let the processors run and use the devices while `wait` waits for something to do, `at_most` so long.
    pub fn lend<T>(&mut self, at_most: Duration, wait: impl FnOnce(Duration) -> T) -> T {
        self.go();
        let now = self.now();
        let next = self.chipset.next_deadline();
        let at_most = next.map_or(at_most, |d| at_most.min(Duration::from_nanos(d.saturating_sub(now))));
        let Some(hardware) = self.hardware.as_mut() else { return wait(at_most) };
        let mut board = Lent { mem: &self.mem, chipset: self.chipset.as_mut(), clock: hardware.clock };
        let until = now.saturating_add(at_most.as_nanos() as u64);
        hardware.kvm.lend(&mut board, Some(until), || wait(at_most))
    }

    /// Find out which pages are written, or no more. The flags of the software processor's pages are always right.
    pub fn track_dirty(&mut self, on: bool) -> Result<(), String> {
        match &self.hardware {
            Some(h) => h.kvm.track_dirty(on).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    /// Bring the page flags up to date. Until [`Self::track_dirty`], nothing is known of the pages that the host's
    /// processors write.
    pub fn collect_dirty(&mut self) -> Result<(), String> {
        match &self.hardware {
            Some(h) => h.kvm.collect_dirty(&self.mem).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    /// As [`Machine::set_step`], of the host's processors.
    pub(super) fn step_hardware(&mut self, cpu: Option<usize>) {
        self.still();
        if let Some(h) = &self.hardware {
            h.kvm.set_step(cpu);
        }
    }

    /// Guest memory is mapped otherwise.
    pub(super) fn remap(&mut self) {
        if let Some(h) = &mut self.hardware {
            let done = h.kvm.remap(&self.mem);
            h.note(done);
        }
    }

    /// Put other processors into the place of these, in the state that these are in. `kvm` runs them, if they are the
    /// host's. On an error the machine is as it was.
    pub fn replace_processors(
        &mut self,
        mut cpus: Vec<Box<dyn Processor>>,
        kvm: Option<Kvm>,
    ) -> Result<(), String> {
        self.still();
        if let Some(trouble) = self.take_trouble() {
            return Err(trouble);
        }
        let now = self.clock.now(self.position);
        let mut hardware = kvm.map(|kvm| Hardware::new(kvm, now));
        if let Some(h) = &mut hardware {
            h.set_time(now);
        }
        for (new, old) in cpus.iter_mut().zip(&self.cpus) {
            new.load(&old.save())?;
        }
        self.cpus = cpus;
        self.hardware = hardware;
        // What the others knew of pages is not known to these.
        self.mem.forget_flags();
        self.ipis.clear();
        self.settle();
        Ok(())
    }
}
