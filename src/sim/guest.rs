//! A small deterministic guest: a service that numbers requests, keeps them on the disk, and
//! answers when they are there. It runs in the real [`Machine`].

use std::collections::{BTreeMap, VecDeque};

use ftvm_accel::bus::Ipi;
use ftvm_accel::{ApicMessage, Bus, Exit, GuestMemory, Processor, RunResult};
use ftvm_devices::{DiskOp, Input, MachineRequest, Output};
use serde::{Deserialize, Serialize};

use crate::machine::{Chipset, Machine};

/// Guest memory in bytes.
const RAM: u64 = 32 << 10;
/// Sectors that the service writes.
pub const SECTORS: u64 = 12;

pub(super) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

/// What the service sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// Client to service: request number.
    Request(u64),
    /// Service to client: request `number` is on the disk; digests of the history before and with it.
    Reply { number: u64, before: u64, digest: u64 },
    /// Service to client, never repeated by the guest: a count and a digest.
    Note { count: u64, digest: u64 },
}

impl Frame {
    pub fn bytes(self) -> Vec<u8> {
        postcard::to_stdvec(&self).unwrap_or_default()
    }
    pub fn read(bytes: &[u8]) -> Option<Frame> {
        postcard::from_bytes(bytes).ok()
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Cpu {
    count: u64,
    acc: u64,
    halted: bool,
    /// The last instruction that faulted: its number.
    faulted: u64,
}

impl Processor for Cpu {
    fn run(&mut self, mem: &GuestMemory, bus: &mut dyn Bus, position: u64, budget: u64) -> RunResult {
        let mut retired = 0;
        if self.halted && bus.intr() {
            self.halted = false;
        }
        while retired < budget {
            if self.halted {
                return RunResult { exit: Exit::Halt, retired };
            }
            let next = self.count + 1;
            if next.is_multiple_of(20) && self.faulted != next {
                // It looks at a device and faults, and its handler comes first.
                self.faulted = next;
                self.acc = mix(self.acc, u64::from(bus.io_read(position + retired, 1, 4)));
                if bus.break_requested() {
                    return RunResult { exit: Exit::Break, retired };
                }
            }
            retired += 1;
            self.count = next;
            self.acc = mix(self.acc, self.count);
            let at = position + retired;
            if self.count.is_multiple_of(13) {
                let _ = mem.write((self.acc % (RAM / 8)) * 8, &self.acc.to_le_bytes());
            }
            if self.count.is_multiple_of(8) {
                self.acc = mix(self.acc, u64::from(bus.io_read(at, 1, 4)));
                if self.count.is_multiple_of(64) && !bus.intr() {
                    self.halted = true;
                }
                if bus.break_requested() {
                    return RunResult { exit: Exit::Break, retired };
                }
                if bus.end_wanted() {
                    return RunResult { exit: Exit::Budget, retired };
                }
            }
        }
        RunResult { exit: Exit::Budget, retired }
    }
    fn delivered(&self, _: u64) -> u32 {
        u32::from(self.faulted == self.count + 1)
    }
    fn reset(&mut self, _init: bool) {
        self.halted = false;
    }
    fn is_idle(&self, intr: bool) -> bool {
        self.halted && !intr
    }
    fn apic_message(&mut self, _: ApicMessage) -> bool {
        false
    }
    fn ipi(&mut self, _: Ipi) -> bool {
        false
    }
    fn nmi(&mut self) {}
    fn next_deadline(&self) -> Option<u64> {
        None
    }
    fn advance(&mut self, _: u64) {}
    fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }
    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        *self = postcard::from_bytes(saved).map_err(|e| e.to_string())?;
        Ok(())
    }
    fn describe(&self) -> String {
        format!("{self:?}")
    }
}

/// The service's devices and software in one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Service {
    inbox: VecDeque<u64>,
    /// The request in hand: number, and what its digest will be.
    current: Option<(u64, u64)>,
    waiting: bool,
    applied: u64,
    before: u64,
    digest: u64,
    notes: u64,
    next_id: u64,
    timer: u64,
    pending: BTreeMap<u64, (DiskOp, u64)>,
    /// What the disk must contain, as the guest was told.
    told: BTreeMap<u64, u64>,
    outputs: Vec<Output>,
}

fn data(value: u64) -> Vec<u8> {
    let mut d = vec![0; 16];
    d[..8].copy_from_slice(&value.to_le_bytes());
    d
}

pub(super) fn value(data: &[u8]) -> u64 {
    data.first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b))
}

impl Service {
    fn submit(&mut self, op: DiskOp, sector: u64) {
        self.next_id += 1;
        self.pending.insert(self.next_id, (op.clone(), sector));
        self.outputs.push(Output::Disk { id: self.next_id, drive: 0, op });
    }

    fn busy(&self, sector: u64) -> bool {
        self.pending.values().any(|(_, s)| *s == sector)
    }

    fn send(&mut self, frame: Frame) {
        self.outputs.push(Output::NetTx { nic: 0, frame: frame.bytes() });
    }

    fn write(&mut self, sector: u64, v: u64) {
        self.submit(DiskOp::Write { offset: sector * 512, data: data(v) }, sector);
    }

    fn note(&mut self) {
        self.notes += 1;
        self.send(Frame::Note { count: self.notes, digest: self.digest });
    }

    /// One step of the service's program.
    fn work(&mut self, now: u64) -> u32 {
        if self.current.is_some() {
            return 1;
        }
        let Some(number) = self.inbox.pop_front() else { return 0 };
        if number <= self.applied {
            if number == self.applied {
                let (before, digest) = (self.before, self.digest);
                self.send(Frame::Reply { number, before, digest });
            }
            return 2;
        }
        // Time makes the history depend on what only the log can tell.
        let digest = mix(mix(self.digest, number), now);
        self.current = Some((number, digest));
        self.note();
        let own = number % (SECTORS / 2);
        if !self.busy(own) {
            self.write(own, digest);
        } else {
            self.waiting = true;
        }
        let side = SECTORS / 2 + digest % (SECTORS / 2);
        if !self.busy(side) {
            self.write(side, digest ^ 1);
        }
        let read = mix(digest, 7) % SECTORS;
        if !self.busy(read) {
            self.submit(DiskOp::Read { offset: read * 512, len: 16 }, read);
        }
        3
    }

    fn done(&mut self, id: u64, result: &Result<Vec<u8>, i32>) {
        let Some((op, sector)) = self.pending.remove(&id) else { return };
        match op {
            DiskOp::Write { data, .. } => {
                let v = value(&data);
                self.told.insert(sector, v);
                if let Some((number, digest)) = self.current {
                    if v == digest {
                        self.before = self.digest;
                        self.digest = digest;
                        self.applied = number;
                        self.current = None;
                        self.send(Frame::Reply { number, before: self.before, digest });
                    } else if self.waiting && !self.busy(number % (SECTORS / 2)) {
                        self.waiting = false;
                        self.write(number % (SECTORS / 2), digest);
                    }
                }
            }
            DiskOp::Read { .. } => {
                let got = result.as_ref().map_or(u64::MAX, |d| value(d));
                let want = self.told.get(&sector).copied().unwrap_or(0);
                if got != want {
                    let bytes = format!("CORRUPT sector {sector}: {got:x} instead of {want:x}").into_bytes();
                    self.outputs.push(Output::CharOut { port: 0, bytes });
                }
                if let (true, Some((number, digest))) = (self.waiting, self.current) {
                    if !self.busy(number % (SECTORS / 2)) {
                        self.waiting = false;
                        self.write(number % (SECTORS / 2), digest);
                    }
                }
            }
            _ => {}
        }
    }
}

impl Chipset for Service {
    fn reset(&mut self, _: &GuestMemory, _: u64) {}
    fn io_read(&mut self, _: &GuestMemory, now: u64, _: u16, _: u8) -> u32 {
        self.work(now)
    }
    fn io_write(&mut self, _: &GuestMemory, _: u64, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: &GuestMemory, _: u64, _: u64, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: &GuestMemory, _: u64, _: u64, _: u8, _: u64) {}
    fn next_deadline(&self) -> Option<u64> {
        Some(self.timer + 5_000_000)
    }
    fn advance(&mut self, _: &GuestMemory, now: u64) {
        if now >= self.timer + 5_000_000 {
            self.timer = now;
            if mix(now, 3).is_multiple_of(4) {
                self.note();
            }
        }
    }
    fn input(&mut self, _: &GuestMemory, _: u64, input: &Input) {
        match input {
            Input::NetRx { frame, .. } => {
                if let Some(Frame::Request(n)) = Frame::read(frame) {
                    if self.inbox.len() < 8 {
                        self.inbox.push_back(n);
                    }
                }
            }
            Input::DiskDone { id, result } => self.done(*id, result),
            _ => {}
        }
    }
    fn intr(&self) -> bool {
        self.current.is_none() && !self.inbox.is_empty()
    }
    fn intr_ack(&mut self) -> u8 {
        0
    }
    fn eoi(&mut self, _: u8) {}
    fn take_messages(&mut self) -> Vec<ApicMessage> {
        Vec::new()
    }
    fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }
    fn take_request(&mut self) -> Option<MachineRequest> {
        None
    }
    fn has_work(&self) -> bool {
        !self.outputs.is_empty()
    }
    fn random(&mut self) -> u64 {
        0
    }
    fn save(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }
    fn load(&mut self, saved: &[u8]) -> Result<(), String> {
        *self = postcard::from_bytes(saved).map_err(|e| e.to_string())?;
        Ok(())
    }
    fn pending_disk(&self) -> Vec<Output> {
        self.pending.iter().map(|(id, (op, _))| Output::Disk { id: *id, drive: 0, op: op.clone() }).collect()
    }
    fn device_hashes(&self) -> Vec<(String, u64)> {
        let sum = self.save().iter().fold(0, |a, b| mix(a, u64::from(*b)));
        vec![("service".into(), sum)]
    }
}

/// A machine with this guest.
pub fn machine() -> Option<Machine> {
    let mem = GuestMemory::new(RAM).ok()?;
    Some(Machine::new(vec![Box::<Cpu>::default()], Box::<Service>::default(), mem, 10_000.0))
}
