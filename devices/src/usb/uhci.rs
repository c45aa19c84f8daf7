//! The USB controllers of PIIX3 and ICH9 (Universal Host Controller Interface 1.1; 82371SB datasheet, 2.5; ICH9 datasheet,
//! 16): two ports each, for full-speed devices.
//!
//! While the schedule runs, one frame of it is executed each millisecond of virtual time, whether or not a device is
//! there: the guest need not tell when it changes the schedule.

use serde::{Deserialize, Serialize};

use super::device::{load_all, name_of, save_all, Answer, UsbDevice};
use super::pipe::{Pipe, PipeState};
use super::ports;
use crate::config::{DeviceSpec, PcConfig};
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::door::{DiskOp, Input};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};
use crate::registry::Build;

// USBCMD
const RUN: u16 = 1;
const HC_RESET: u16 = 2;
const GLOBAL_RESET: u16 = 4;
const GLOBAL_SUSPEND: u16 = 8;
const FORCE_RESUME: u16 = 0x10;
// USBSTS
const INTERRUPT: u16 = 1;
const ERROR: u16 = 2;
const RESUME: u16 = 4;
const PROCESS_ERROR: u16 = 0x10;
const HALTED: u16 = 0x20;
// PORTSC
const CONNECTED: u16 = 1;
const CONNECT_CHANGED: u16 = 2;
const ENABLED: u16 = 4;
const ENABLE_CHANGED: u16 = 8;
/// The lines of a connected full-speed device that is idle.
const FULL_SPEED: u16 = 0x10;
const RESUMING: u16 = 0x40;
/// A port register's fixed bit.
const PORT_FIXED: u16 = 0x80;
const PORT_RESET: u16 = 0x200;
const SUSPENDED: u16 = 0x1000;
// Link pointers (3.1 to 3.3).
const TERMINATE: u32 = 1;
const QUEUE: u32 = 2;
const DEPTH: u32 = 4;
// The control word of a transfer descriptor (3.2.2).
const ACTIVE: u32 = 1 << 23;
const STALLED: u32 = 1 << 22;
const NAK: u32 = 1 << 19;
const TIMEOUT: u32 = 1 << 18;
const ON_COMPLETE: u32 = 1 << 24;
const SHORT_DETECT: u32 = 1 << 29;
const ERRORS: u32 = 3 << 27;
const STATUS: u32 = 0xFF << 16;
const LENGTH: u32 = 0x7FF;
// Packets.
const SETUP: u8 = 0x2D;
const IN: u8 = 0x69;
const OUT: u8 = 0xE1;

pub const PORTS: usize = 2;
/// Frames are 1 ms apart; the counter has 11 bits.
const FRAME_NS: u64 = 1_000_000;
/// Queue heads and transfer descriptors that one frame has at most, and bytes that it carries (a full-speed frame's).
const MAX_LINKS: usize = 256;
const MAX_BYTES: usize = 1280;
const FRAME_TIMER: u8 = 0;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    command: u16,
    status: u16,
    enable: u16,
    /// An interrupt because of a short packet, or on completion: both are one bit of the status.
    short: bool,
    complete: bool,
    /// Frame number at `since` (virtual time in ns, when the schedule was started).
    frame: u16,
    since: u64,
    base: u32,
    start_of_frame: u8,
    ports: [u16; PORTS],
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
    devices: Vec<Option<Vec<u8>>>,
    pipes: Vec<Option<PipeState>>,
}

/// Which chip's controller it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    Piix3,
    /// ICH9's number 1 to 3.
    Ich9(u8),
}

/// The controller.
pub struct Uhci {
    name: String,
    pci: PciFunction,
    /// The bus whose ports it serves, from which port on, and how many that bus has.
    bus: String,
    first: usize,
    count: usize,
    devices: [Option<Pipe>; PORTS],
    s: State,
}

/// What came of a transfer descriptor.
enum Outcome {
    /// Done: the queue goes on behind it.
    Done,
    /// The queue waits for the next frame.
    Wait,
}

fn dword(ctx: &Ctx, at: u32) -> Option<u32> {
    let mut bytes = [0; 4];
    ctx.dma_read(u64::from(at), &mut bytes).then(|| u32::from_le_bytes(bytes))
}

impl Uhci {
    /// A controller: by itself, or a companion of an EHCI controller (`masterbus`), whose devices from port `firstport` on it
    /// serves.
    pub fn new(b: &Build, chip: Chip) -> Result<Uhci, DeviceError> {
        let device = match chip {
            Chip::Piix3 => 0x7020,
            Chip::Ich9(n) => 0x2933 + u16::from(n),
        };
        let revision = if chip == Chip::Piix3 { 1 } else { 3 };
        let mut pci = PciFunction::new(
            b.devfn,
            PciId {
                vendor: 0x8086,
                device,
                revision,
                class: 0x0C_0300,
                subsystem_vendor: 0x1AF4,
                subsystem: 0x1100,
            },
        );
        pci.pin(match chip {
            Chip::Piix3 => 4,
            Chip::Ich9(n) => n,
        });
        pci.set8(0x60, 0x10);
        pci.bar(4, Bar::Io(32));
        pci.seal();
        let (mut bus, mut first, mut count) = (ports::own_bus(b.config, b.spec), 0, PORTS);
        if let Some(master) = b.text("masterbus") {
            let is_master =
                |d: &&DeviceSpec| super::ehci::is_ehci(&d.driver) && ports::own_bus(b.config, d) == master;
            if !b.config.devices.iter().any(|d| is_master(&d)) {
                return Err(DeviceError::Config(format!("USB bus '{master}' not found")));
            }
            (bus, first, count) =
                (master.to_owned(), b.number("firstport", 0)? as usize, super::ehci::PORTS as usize);
            if first.saturating_add(PORTS) > count {
                return Err(DeviceError::Config(format!(
                    "firstport must be between 0 and {} on masterbus {bus}",
                    count - PORTS
                )));
            }
        }
        let mut uhci =
            Uhci { name: b.pci_name(), pci, bus, first, count, devices: [None, None], s: State::default() };
        for (port, spec) in uhci.plugged(b.config)? {
            uhci.devices[port] = Some(Pipe::new(UsbDevice::new(b.config, spec, false)?));
        }
        Ok(uhci)
    }

    /// What of the configuration is in this controller's ports.
    fn plugged<'a>(&self, config: &'a PcConfig) -> Result<Vec<(usize, &'a DeviceSpec)>, DeviceError> {
        let all = ports::on_bus(config, &self.bus, self.count)?;
        let mine = all.into_iter().filter(|(n, _)| (self.first..self.first + PORTS).contains(n));
        Ok(mine.map(|(n, spec)| (n - self.first, spec)).collect())
    }

    fn reset_registers(&mut self, ctx: &mut Ctx) {
        self.s = State { status: HALTED, start_of_frame: 64, ..State::default() };
        for n in 0..PORTS {
            self.s.ports[n] = PORT_FIXED;
            if let Some(p) = &mut self.devices[n] {
                p.reset();
                self.s.ports[n] |= CONNECTED | CONNECT_CHANGED | FULL_SPEED;
            }
        }
        ctx.set_timer(FRAME_TIMER, None);
        self.drive(ctx);
    }

    fn frame(&self, now: u64) -> u16 {
        let passed = if self.s.command & RUN != 0 { now.saturating_sub(self.s.since) / FRAME_NS } else { 0 };
        (u64::from(self.s.frame) + passed) as u16 & 0x7FF
    }

    fn read_word(&self, now: u64, offset: u16) -> u16 {
        match offset {
            0 => self.s.command,
            2 => self.s.status,
            4 => self.s.enable,
            6 => self.frame(now),
            8 => self.s.base as u16,
            10 => (self.s.base >> 16) as u16,
            12 => u16::from(self.s.start_of_frame),
            16 | 18 => self.s.ports[usize::from((offset / 2) & 1)],
            // What is not there looks like a port that does not exist.
            _ => 0xFF7F,
        }
    }

    fn write_word(&mut self, ctx: &mut Ctx, offset: u16, value: u16) {
        match offset {
            0 => self.write_command(ctx, value),
            2 => {
                self.s.status &= !(value & 0x1F);
                if value & INTERRUPT != 0 {
                    (self.s.short, self.s.complete) = (false, false);
                }
                self.drive(ctx);
            }
            4 => {
                self.s.enable = value & 15;
                self.drive(ctx);
            }
            6 if self.s.status & HALTED != 0 => self.s.frame = value & 0x7FF,
            8 => self.s.base = self.s.base & 0xFFFF_0000 | u32::from(value & 0xF000),
            10 => self.s.base = self.s.base & 0xFFFF | u32::from(value) << 16,
            12 => self.s.start_of_frame = value as u8 & 0x7F,
            16 | 18 => self.write_port(usize::from((offset / 2) & 1), value),
            _ => {}
        }
    }

    fn write_command(&mut self, ctx: &mut Ctx, value: u16) {
        if value & (HC_RESET | GLOBAL_RESET) != 0 {
            self.reset_registers(ctx);
            self.s.command = value & GLOBAL_RESET;
            return;
        }
        let ran = self.s.command & RUN != 0;
        self.s.frame = self.frame(ctx.now);
        self.s.since = ctx.now;
        self.s.command = value & 0xFF;
        if value & RUN == 0 {
            self.s.status |= HALTED;
            ctx.set_timer(FRAME_TIMER, None);
        } else if !ran {
            self.s.status &= !HALTED;
            ctx.set_timer(FRAME_TIMER, Some(ctx.now + FRAME_NS));
        }
    }

    fn write_port(&mut self, n: usize, value: u16) {
        let old = self.s.ports[n];
        if value & PORT_RESET != 0 && old & PORT_RESET == 0 {
            if let Some(p) = &mut self.devices[n] {
                p.reset();
            }
        }
        let changes = old & (CONNECT_CHANGED | ENABLE_CHANGED) & !value;
        let mut new = PORT_FIXED
            | changes
            | old & (CONNECTED | FULL_SPEED)
            | value & (PORT_RESET | SUSPENDED | RESUMING);
        if old & CONNECTED != 0 && value & PORT_RESET == 0 {
            new |= value & ENABLED;
        }
        if value & RESUMING == 0 && old & RESUMING != 0 {
            // The resume ends, and so does the suspension.
            new &= !SUSPENDED;
        }
        self.s.ports[n] = new;
    }

    /// A device came into a port, or left it: the guest sees it when it looks, and is woken if all sleeps.
    fn note_changes(&mut self, ctx: &mut Ctx) {
        for n in 0..PORTS {
            let (port, there) = (self.s.ports[n], self.devices[n].is_some());
            if there == (port & CONNECTED != 0) {
                continue;
            }
            let mut new = port & !(CONNECTED | FULL_SPEED | ENABLED | SUSPENDED | RESUMING) | CONNECT_CHANGED;
            if there {
                new |= CONNECTED | FULL_SPEED;
            } else if port & ENABLED != 0 {
                new |= ENABLE_CHANGED;
            }
            self.s.ports[n] = new;
            if self.s.command & GLOBAL_SUSPEND != 0 {
                self.s.command |= FORCE_RESUME;
                self.s.status |= RESUME;
                self.drive(ctx);
            }
        }
    }

    /// The device in port `n` has something to say while it sleeps: it wakes the port, if it may.
    fn wake(&mut self, ctx: &mut Ctx, n: usize) {
        let port = self.s.ports[n];
        let sleeps = port & SUSPENDED != 0 || self.s.command & (GLOBAL_SUSPEND | RUN) != RUN;
        if port & ENABLED != 0 && sleeps && self.devices[n].as_ref().is_some_and(|p| p.device.may_wake()) {
            if port & SUSPENDED != 0 {
                self.s.ports[n] |= RESUMING;
            }
            if self.s.command & GLOBAL_SUSPEND != 0 {
                self.s.command |= FORCE_RESUME;
            }
            self.s.status |= RESUME;
            self.drive(ctx);
        }
    }

    fn drive(&mut self, ctx: &mut Ctx) {
        let (s, e) = (&self.s, self.s.enable);
        let level = s.status & INTERRUPT != 0 && (s.complete && e & 4 != 0 || s.short && e & 8 != 0)
            || s.status & ERROR != 0 && e & 1 != 0
            || s.status & RESUME != 0 && e & 2 != 0
            || s.status & PROCESS_ERROR != 0;
        self.pci.set_intx(ctx, level);
    }

    /// Execute one frame of the schedule (3.4).
    fn run_frame(&mut self, ctx: &mut Ctx) {
        let entry = self.s.base.wrapping_add(u32::from(self.frame(ctx.now) & 0x3FF) * 4);
        let Some(mut link) = dword(ctx, entry) else { return };
        let mut bytes = 0;
        for _ in 0..MAX_LINKS {
            if link & TERMINATE != 0 || bytes >= MAX_BYTES {
                break;
            }
            let at = link & !15;
            link = if link & QUEUE != 0 {
                match self.queue(ctx, at, &mut bytes) {
                    Some(next) => next,
                    None => break,
                }
            } else {
                let Some(next) = dword(ctx, at) else { break };
                self.descriptor(ctx, at, &mut bytes);
                next
            };
        }
        self.drive(ctx);
    }

    /// Execute a queue as far as it goes; the next link.
    fn queue(&mut self, ctx: &mut Ctx, at: u32, bytes: &mut usize) -> Option<u32> {
        let next = dword(ctx, at)?;
        for _ in 0..MAX_LINKS {
            let element = dword(ctx, at + 4)?;
            if element & TERMINATE != 0 || *bytes >= MAX_BYTES {
                break;
            }
            if element & QUEUE != 0 {
                // A queue within a queue.
                return Some(element);
            }
            let td = element & !15;
            let behind = dword(ctx, td)?;
            match self.descriptor(ctx, td, bytes) {
                Outcome::Wait => break,
                Outcome::Done => {
                    ctx.dma_write(u64::from(at + 4), &behind.to_le_bytes());
                    if behind & DEPTH == 0 {
                        break;
                    }
                }
            }
        }
        Some(next)
    }

    /// Execute a transfer descriptor.
    fn descriptor(&mut self, ctx: &mut Ctx, at: u32, bytes: &mut usize) -> Outcome {
        let (Some(control), Some(token), Some(buffer)) =
            (dword(ctx, at + 4), dword(ctx, at + 8), dword(ctx, at + 12))
        else {
            return Outcome::Wait;
        };
        if control & ACTIVE == 0 {
            return Outcome::Wait;
        }
        let (packet, address, endpoint) = (token as u8, (token >> 8 & 0x7F) as u8, (token >> 15 & 15) as u8);
        let len = (((token >> 21) + 1) & LENGTH) as usize;
        *bytes += len;
        let ports = self.s.ports;
        let enabled = |n: usize| ports[n] & (ENABLED | SUSPENDED) == ENABLED;
        let found = self.devices.iter_mut().enumerate().filter(|(n, _)| enabled(*n));
        let device = found.filter_map(|(_, d)| d.as_mut()).find(|d| d.address == address);
        let mut data = vec![0; len];
        let answer = match (packet, device) {
            (SETUP | IN | OUT, None) => None,
            (SETUP, Some(d)) if len == 8 => {
                ctx.dma_read(u64::from(buffer), &mut data);
                let mut setup = [0; 8];
                setup.copy_from_slice(&data);
                Some(d.setup(setup))
            }
            (IN, Some(d)) => Some(d.receive(endpoint, len)),
            (OUT, Some(d)) => {
                ctx.dma_read(u64::from(buffer), &mut data);
                Some(d.send(ctx, endpoint, &data))
            }
            _ => {
                // No packet that there is: the controller stops (2.1.2).
                self.s.status |= PROCESS_ERROR | HALTED;
                self.s.command &= !RUN;
                ctx.set_timer(FRAME_TIMER, None);
                return Outcome::Wait;
            }
        };
        let mut new = control & !STATUS & !LENGTH;
        let outcome = match answer {
            Some(Answer::Done(got)) => {
                let moved = if packet == IN { got.len() } else { len };
                ctx.dma_write(u64::from(buffer), if packet == IN { &got } else { &[] });
                new |= (moved as u32).wrapping_sub(1) & LENGTH;
                if control & ON_COMPLETE != 0 {
                    self.s.status |= INTERRUPT;
                    self.s.complete = true;
                }
                if packet == IN && moved < len && control & SHORT_DETECT != 0 {
                    // The queue stays at this descriptor.
                    self.s.status |= INTERRUPT;
                    self.s.short = true;
                    Outcome::Wait
                } else {
                    Outcome::Done
                }
            }
            Some(Answer::Nak) => {
                new = control | NAK;
                Outcome::Wait
            }
            Some(Answer::Stall) => {
                new |= STALLED | LENGTH;
                self.fail(control);
                Outcome::Wait
            }
            None => {
                // Nobody answers: tried again until the count of errors is used up; a count of 0 never is.
                new = control | TIMEOUT;
                if control & ERRORS != 0 {
                    new -= 1 << 27;
                    if new & ERRORS == 0 {
                        new = new & !ACTIVE | STALLED;
                        self.fail(control);
                    }
                }
                Outcome::Wait
            }
        };
        ctx.dma_write(u64::from(at + 4), &new.to_le_bytes());
        outcome
    }

    fn fail(&mut self, control: u32) {
        self.s.status |= ERROR;
        if control & ON_COMPLETE != 0 {
            self.s.status |= INTERRUPT;
            self.s.complete = true;
        }
    }
}

impl Device for Uhci {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.reset_registers(ctx);
    }
    fn pio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, size: u8) -> u32 {
        let low = u32::from(self.read_word(ctx.now, offset & !1));
        match size {
            4 => low | u32::from(self.read_word(ctx.now, (offset & !1) + 2)) << 16,
            _ => low >> (8 * (offset & 1)),
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, size: u8, value: u32) {
        match size {
            1 if offset == 12 => self.write_word(ctx, 12, value as u16),
            1 => {}
            2 => self.write_word(ctx, offset & !1, value as u16),
            _ => {
                self.write_word(ctx, offset & !1, value as u16);
                self.write_word(ctx, (offset & !1) + 2, (value >> 16) as u16);
            }
        }
    }
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {
        if id == FRAME_TIMER && self.s.command & RUN != 0 {
            ctx.set_timer(FRAME_TIMER, Some(ctx.now + FRAME_NS));
            if self.pci.master() && self.s.command & GLOBAL_SUSPEND == 0 {
                self.run_frame(ctx);
            }
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        if matches!(input, Input::Plug(_) | Input::Unplug { .. }) {
            self.note_changes(ctx);
        }
        for n in 0..PORTS {
            if self.devices[n].as_mut().is_some_and(|p| p.device.input(input)) {
                self.wake(ctx, n);
            }
        }
    }
    fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        // The guest asks again in the next frame.
        let _ = self.devices.iter_mut().flatten().any(|p| p.device.disk_done(ctx, id, &op, &result));
    }
    fn rescan(&mut self, config: &PcConfig, _tell: bool) {
        let Ok(now) = self.plugged(config) else { return };
        for (n, slot) in self.devices.iter_mut().enumerate() {
            let spec = now.iter().find(|(port, _)| *port == n).map(|(_, spec)| *spec);
            if slot.as_ref().map(|p| p.device.name()) != spec.map(name_of).as_deref() {
                let new = spec.and_then(|spec| UsbDevice::new(config, spec, false).ok());
                *slot = new.map(Pipe::new);
            }
        }
    }
    fn version(&self) -> u32 {
        3
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        let devices = save_all(self.devices.iter().map(|p| p.as_ref().map(|p| &p.device)));
        let pipes = self.devices.iter().map(|p| p.as_ref().map(Pipe::save)).collect();
        pack(&Saved { pci: self.pci.save(), s: self.s.clone(), devices, pipes })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        let devices = self.devices.iter_mut().map(|p| p.as_mut().map(|p| &mut p.device));
        if !load_all(devices, &s.devices) || s.pipes.len() != PORTS || !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        self.s = s.s;
        for (mine, theirs) in self.devices.iter_mut().zip(s.pipes) {
            if let Some((mine, theirs)) = mine.as_mut().zip(theirs) {
                mine.load(theirs);
            }
        }
        Ok(())
    }
}
