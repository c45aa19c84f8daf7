//! Tests on the host's KVM; where there is none, they say so and pass.

mod convert;
mod debug;
mod guests;
mod run;
mod step;

use super::*;
use crate::tcg::registers::Registers;

/// A board with ports and memory that echo, and an 8259 of one line.
pub struct TestBoard {
    pub mem: GuestMemory,
    /// Port or address, and value.
    pub written: Vec<(u64, u64)>,
    pub reads: u64,
    pub intr: Option<u8>,
    /// Raised by a write to port 0x55.
    pub next_intr: Option<u8>,
    pub ended: Vec<u8>,
    pub messages: Vec<ApicMessage>,
    pub pins: Vec<Option<ApicMessage>>,
    /// A write to port 0xF4.
    pub finished: bool,
    pub bells: (u64, Vec<Bell>),
    /// Tokens, as they rang.
    pub rung: Vec<u64>,
}

impl TestBoard {
    pub fn new(mem: GuestMemory) -> Self {
        TestBoard {
            mem,
            written: Vec::new(),
            reads: 0,
            intr: None,
            next_intr: None,
            ended: Vec::new(),
            messages: Vec::new(),
            pins: Vec::new(),
            finished: false,
            bells: Default::default(),
            rung: Vec::new(),
        }
    }
}

impl Board for TestBoard {
    fn io_read(&mut self, port: u16, _: u8) -> u32 {
        self.reads += 1;
        u32::from(port) ^ 0x5A5A_5A5A
    }
    fn io_write(&mut self, port: u16, size: u8, value: u32) {
        let value = value & (u32::MAX >> (32 - 8 * u32::from(size)));
        self.written.push((port.into(), value.into()));
        match port {
            0x55 => self.intr = self.next_intr.take(),
            0xF4 => self.finished = true,
            _ => {}
        }
    }
    fn mmio_read(&mut self, address: u64, _: u8) -> u64 {
        self.reads += 1;
        address ^ 0x0123_4567_89AB_CDEF
    }
    fn mmio_write(&mut self, address: u64, size: u8, value: u64) {
        self.written.push((address, value & (u64::MAX >> (64 - 8 * u32::from(size)))));
    }
    fn intr(&self) -> bool {
        self.intr.is_some()
    }
    fn intr_ack(&mut self) -> u8 {
        self.intr.take().unwrap_or(0xFF)
    }
    fn eoi(&mut self, vector: u8) {
        self.ended.push(vector);
    }
    fn take_messages(&mut self) -> Vec<ApicMessage> {
        std::mem::take(&mut self.messages)
    }
    fn level_pins(&self) -> Vec<Option<ApicMessage>> {
        self.pins.clone()
    }
    fn has_news(&self) -> bool {
        self.finished
    }
    fn next_deadline(&self) -> Option<u64> {
        None
    }
    fn memory(&self) -> &GuestMemory {
        &self.mem
    }
    fn bells_version(&self) -> u64 {
        self.bells.0
    }
    fn bells(&self) -> Vec<Bell> {
        self.bells.1.clone()
    }
    fn ring(&mut self, token: u64) {
        self.rung.push(token);
    }
}

/// The same answers for the software processor. Each write moves the clock, as time goes by.
impl Bus for TestBoard {
    fn io_read(&mut self, _: u64, port: u16, size: u8) -> u32 {
        Board::io_read(self, port, size)
    }
    fn io_write(&mut self, _: u64, port: u16, size: u8, value: u32) {
        Board::io_write(self, port, size, value);
    }
    fn mmio_read(&mut self, _: u64, address: u64, size: u8) -> u64 {
        Board::mmio_read(self, address, size)
    }
    fn mmio_write(&mut self, _: u64, address: u64, size: u8, value: u64) {
        Board::mmio_write(self, address, size, value);
    }
    fn clock_ns(&mut self, position: u64) -> u64 {
        position * 10
    }
    fn intr(&mut self) -> bool {
        Board::intr(self)
    }
    fn intr_ack(&mut self, _: u64) -> u8 {
        Board::intr_ack(self)
    }
    fn eoi(&mut self, _: u64, vector: u8) {
        Board::eoi(self, vector);
    }
    fn send_ipi(&mut self, _: Ipi) {}
    fn random(&mut self) -> u64 {
        42
    }
    fn break_requested(&self) -> bool {
        !self.messages.is_empty() || self.finished
    }
}

pub fn model() -> CpuModel {
    CpuModel::parse("max").unwrap()
}

/// A machine of KVM; `None`, with a word, where there is no KVM.
pub fn kvm(mem: &GuestMemory, cpus: u32) -> Option<(Kvm, Vec<Box<dyn Processor>>)> {
    match Kvm::new(mem, &model(), cpus, Box::new(|| ())) {
        Ok(made) => Some(made),
        Err(e @ (KvmError::Open(_) | KvmError::Lacks(_))) => {
            println!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Real mode at 0:`at`, with a stack below it.
pub fn real_mode(cpu: &mut SoftCpu, at: u64) {
    let mut r: Registers = cpu.registers();
    for s in &mut r.segs {
        (s.selector, s.base) = (0, 0);
    }
    r.rip = at;
    r.rflags = 2;
    r.idt = (0, 0x3FF);
    cpu.state_mut().gpr[4] = at;
    cpu.set_registers(&r);
}
