//! `qemu-xhci`: a USB 3 controller (eXtensible Host Controller Interface 1.0): its registers, command ring and event
//! ring. What is done for the devices is in [`super::slots`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::device::{load_all, name_of, save_all, UsbDevice};
use super::ports;
use super::slots::Slot;
use crate::config::{DeviceSpec, PcConfig};
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::door::{DiskOp, Input};
use crate::pci::{Bar, Express, PciFunction, PciId, PciSaved};
use crate::registry::{parse_number, Build};

/// Where the parts of BAR 0 lie.
const OPERATIONAL: u64 = 0x40;
const PORTS: u64 = 0x440;
const RUNTIME: u64 = 0x1000;
const DOORBELLS: u64 = 0x2000;
const SIZE: u64 = 0x4000;
const MSIX_BAR: u8 = 2;

const RUN: u32 = 1;
const RESET: u32 = 2;
const INTERRUPTS: u32 = 4;
const HALTED: u32 = 1;
const EVENT_PENDING: u32 = 8;
// Port status and control (5.4.8): connected, enabled, in reset, link state, powered, and what changed.
const CONNECTED: u32 = 1;
const PORT_ENABLED: u32 = 2;
const PORT_RESET: u32 = 0x10;
const LINK: u32 = 0x1E0;
const LINK_WRITE: u32 = 0x1_0000;
const LINK_POLLING: u32 = 7 << 5;
const LINK_EMPTY: u32 = 5 << 5;
const LINK_SUSPENDED: u32 = 3 << 5;
const LINK_RESUME: u32 = 15 << 5;
const POWERED: u32 = 0x200;
/// 480 Mbit/s.
const HIGH_SPEED: u32 = 3 << 10;
const CONNECT_CHANGED: u32 = 1 << 17;
const ENABLE_CHANGED: u32 = 1 << 18;
const RESET_CHANGED: u32 = 1 << 21;
const LINK_CHANGED: u32 = 1 << 22;
const CHANGES: u32 = 0x00FE_0000;
const WAKE_ON: u32 = 0x0E00_0000;
/// The interrupt is pending, and enabled (5.5.2.1).
const PENDING: u32 = 1;
const ENABLED: u32 = 2;

// Types of TRBs (6.4.6).
pub const LINK_TRB: u32 = 6;
const ENABLE_SLOT: u32 = 9;
const DISABLE_SLOT: u32 = 10;
const NOOP_COMMAND: u32 = 23;
pub const TRANSFER_EVENT: u32 = 32;
const COMMAND_COMPLETION: u32 = 33;
const PORT_CHANGE: u32 = 34;
// Completion codes (6.4.5).
pub const SUCCESS: u32 = 1;
pub const TRB_ERROR: u32 = 5;
pub const STALLED: u32 = 6;
const NO_SLOTS: u32 = 9;
const SLOT_NOT_ENABLED: u32 = 11;
pub const SHORT_PACKET: u32 = 13;
pub const PARAMETER_ERROR: u32 = 17;
pub const CONTEXT_ERROR: u32 = 19;
const RING_STOPPED: u32 = 24;
/// Device slots.
const SLOTS: u8 = 64;
/// Commands executed for one ring of the doorbell.
const MAX_COMMANDS: usize = 256;
/// A microframe in ns.
const MICROFRAME: u64 = 125_000;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    command: u32,
    status: u32,
    notifications: u32,
    contexts: u64,
    configure: u32,
    /// The command ring: where it goes on, its cycle bit, and whether it runs.
    ring: u64,
    ring_cycle: bool,
    ring_low: u32,
    since: u64,
    // Interrupter 0.
    management: u32,
    moderation: u32,
    table_size: u32,
    table: u64,
    dequeue: u64,
    // The event ring's one segment.
    events: u64,
    event_count: u32,
    event_at: u32,
    event_cycle: bool,
    /// The ports' status.
    ports: Vec<u32>,
    /// The device slots that are enabled.
    slots: BTreeMap<u8, Slot>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
    devices: Vec<Option<Vec<u8>>>,
}

/// Ports that this controller has for each speed, unless its user says otherwise.
const USUAL_PORTS: u64 = 4;

/// The ports for devices of USB 2 that a controller has. (All devices here are such.)
pub fn usb2_ports(controller: &DeviceSpec) -> usize {
    let given = controller.properties.get("p2").and_then(|p| parse_number(p));
    given.unwrap_or(USUAL_PORTS).min(15) as usize
}

/// The controller.
pub struct Xhci {
    name: String,
    bus: String,
    pci: PciFunction,
    /// Ports of USB 2 and of USB 3.
    ports: [u32; 2],
    /// What is in each port.
    devices: Vec<Option<UsbDevice>>,
    s: State,
}

/// The status of a port before the guest does anything with it.
fn filled(there: bool) -> u32 {
    match there {
        true => CONNECTED | LINK_POLLING | POWERED | HIGH_SPEED,
        false => LINK_EMPTY | POWERED,
    }
}

fn low(word: u64) -> u32 {
    word as u32
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !0xFFFF_FFFF | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & 0xFFFF_FFFF | u64::from(value) << 32;
}

impl Xhci {
    /// A controller with this many ports of each kind, 1 to 15.
    pub fn new(b: &Build, ports: [u32; 2]) -> Result<Xhci, DeviceError> {
        let id = PciId {
            vendor: 0x1B36,
            device: 0x000D,
            revision: 1,
            class: 0x0C_0330,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let mut pci = PciFunction::new(b.devfn, id);
        pci.pin(1);
        pci.set8(0x60, 0x30);
        pci.bar(0, Bar::Memory64(SIZE));
        pci.bar(usize::from(MSIX_BAR), Bar::Memory(0x1000));
        pci.add_msix(MSIX_BAR, 1);
        if b.behind_port() {
            pci.add_express(Express::Endpoint);
        }
        pci.seal();
        let mut devices: Vec<Option<UsbDevice>> = Vec::new();
        devices.resize_with((ports[0] + ports[1]) as usize, || None);
        let bus = ports::own_bus(b.config, b.spec);
        for (port, spec) in ports::on_bus(b.config, &bus, ports[0] as usize)? {
            devices[port] = Some(UsbDevice::new(b.config, spec, true)?);
        }
        Ok(Xhci { name: b.pci_name(), bus, pci, ports, devices, s: State::default() })
    }

    fn reset_registers(&mut self, ctx: &mut Ctx) {
        let changed = |d: &Option<UsbDevice>| if d.is_some() { CONNECT_CHANGED } else { 0 };
        let ports = self.devices.iter().map(|d| filled(d.is_some()) | changed(d)).collect();
        self.devices.iter_mut().flatten().for_each(UsbDevice::reset);
        self.s = State { status: HALTED, moderation: 4000, event_cycle: true, ports, ..State::default() };
        self.pci.set_intx(ctx, false);
    }

    fn capability(&self, offset: u64) -> u32 {
        let [two, three] = self.ports;
        match offset {
            0x00 => OPERATIONAL as u32 | 0x0100 << 16,
            // 64 slots, one interrupter.
            0x04 => (two + three) << 24 | 1 << 8 | u32::from(SLOTS),
            0x08 => 0x0F,
            // 64-bit addresses; extended capabilities at 0x20.
            0x10 => 0x0008_0001,
            0x14 => DOORBELLS as u32,
            0x18 => RUNTIME as u32,
            // Which ports speak which protocol (7.2).
            0x20 => 0x0200_0402,
            0x30 => 0x0300_0002,
            0x24 | 0x34 => u32::from_le_bytes(*b"USB "),
            0x28 => two << 8 | 1,
            0x38 => three << 8 | (two + 1),
            _ => 0,
        }
    }

    fn read_dword(&self, now: u64, offset: u64) -> u32 {
        let s = &self.s;
        match offset {
            0..OPERATIONAL => self.capability(offset),
            0x40 => s.command,
            0x44 => s.status,
            0x48 => 1,
            0x54 => s.notifications,
            // Only whether the ring runs can be read.
            0x58 => s.ring_low & 8,
            0x70 => low(s.contexts),
            0x74 => low(s.contexts >> 32),
            0x78 => s.configure,
            PORTS..RUNTIME => match (s.ports.get((offset - PORTS) as usize / 16), (offset - PORTS) % 16) {
                (Some(status), 0) => *status,
                _ => 0,
            },
            RUNTIME if s.command & RUN != 0 => ((now - s.since) / MICROFRAME) as u32 & 0x3FFF,
            0x1020 => s.management,
            0x1024 => s.moderation,
            0x1028 => s.table_size,
            0x1030 => low(s.table),
            0x1034 => low(s.table >> 32),
            0x1038 => low(s.dequeue),
            0x103C => low(s.dequeue >> 32),
            _ => 0,
        }
    }

    fn write_dword(&mut self, ctx: &mut Ctx, offset: u64, value: u32) {
        match offset {
            0x40 => self.write_command(ctx, value),
            0x44 => self.s.status &= !(value & 0x41C),
            0x54 => self.s.notifications = value & 0xFFFF,
            0x58 => {
                if self.s.ring_low & 8 == 0 {
                    self.s.ring_cycle = value & 1 != 0;
                    set_low(&mut self.s.ring, value & !0x3F);
                } else if value & 6 != 0 {
                    // Stop or abort.
                    self.s.ring_low &= !8;
                    let at = self.s.ring;
                    self.complete(ctx, at, RING_STOPPED, 0);
                }
            }
            0x5C if self.s.ring_low & 8 == 0 => set_high(&mut self.s.ring, value),
            0x70 => set_low(&mut self.s.contexts, value & !0x3F),
            0x74 => set_high(&mut self.s.contexts, value),
            0x78 => self.s.configure = value & 0xFF,
            0x1020 => {
                self.s.management = self.s.management & !(value & PENDING) & !ENABLED | value & ENABLED;
                self.drive(ctx);
            }
            0x1024 => self.s.moderation = value,
            0x1028 => self.s.table_size = value & 0xFFFF,
            0x1030 => set_low(&mut self.s.table, value & !0x3F),
            0x1034 => {
                set_high(&mut self.s.table, value);
                self.load_table(ctx);
            }
            0x1038 => {
                let busy = low(self.s.dequeue) & 8 & !value;
                set_low(&mut self.s.dequeue, value & !8 | busy);
            }
            0x103C => set_high(&mut self.s.dequeue, value),
            PORTS..RUNTIME if (offset - PORTS).is_multiple_of(16) => {
                self.write_port(ctx, (offset - PORTS) as usize / 16, value);
            }
            DOORBELLS => self.run_commands(ctx),
            0x2004.. => self.ring_doorbell(ctx, ((offset - DOORBELLS) / 4) as u8, value as u8),
            _ => {}
        }
    }

    fn write_command(&mut self, ctx: &mut Ctx, value: u32) {
        if value & RESET != 0 {
            return self.reset_registers(ctx);
        }
        if value & RUN != 0 && self.s.command & RUN == 0 {
            self.s.since = ctx.now;
            self.s.status &= !HALTED;
        } else if value & RUN == 0 {
            self.s.status |= HALTED;
            self.s.ring_low &= !8;
        }
        self.s.command = value & 0xC0D;
        self.drive(ctx);
    }

    /// The event ring segment table's first (and only) entry (6.5).
    fn load_table(&mut self, ctx: &Ctx) {
        let mut entry = [0u8; 16];
        if self.s.table_size == 0 || !ctx.dma_read(self.s.table, &mut entry) {
            return;
        }
        let mut base = [0; 8];
        base.copy_from_slice(&entry[..8]);
        self.s.events = u64::from_le_bytes(base) & !0x3F;
        self.s.event_count = u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]) & 0xFFFF;
        self.s.event_at = 0;
        self.s.event_cycle = true;
    }

    /// Tell the guest how the command at `command` ended, and for which slot.
    fn complete(&mut self, ctx: &mut Ctx, command: u64, code: u32, slot: u8) {
        self.post(ctx, command, code << 24, COMMAND_COMPLETION << 10 | u32::from(slot) << 24);
    }

    /// Put an event onto the event ring.
    fn post(&mut self, ctx: &mut Ctx, parameter: u64, status: u32, control: u32) {
        if self.s.event_count == 0 {
            return;
        }
        let mut trb = parameter.to_le_bytes().to_vec();
        trb.extend(status.to_le_bytes());
        trb.extend((control | u32::from(self.s.event_cycle)).to_le_bytes());
        ctx.dma_write(self.s.events.wrapping_add(16 * u64::from(self.s.event_at)), &trb);
        self.s.event_at += 1;
        if self.s.event_at >= self.s.event_count {
            self.s.event_at = 0;
            self.s.event_cycle = !self.s.event_cycle;
        }
        self.s.status |= EVENT_PENDING;
        self.s.management |= PENDING;
        self.s.dequeue |= 8;
        if self.pci.msix_enabled() {
            if self.s.management & ENABLED != 0 && self.s.command & INTERRUPTS != 0 {
                // A message is sent once; that clears the bit.
                self.s.management &= !PENDING;
                self.pci.msix_notify(ctx, 0);
            }
        } else {
            self.drive(ctx);
        }
    }

    fn write_port(&mut self, ctx: &mut Ctx, n: usize, value: u32) {
        let Some(port) = self.s.ports.get_mut(n) else { return };
        *port = *port & !(value & CHANGES) & !WAKE_ON | value & WAKE_ON;
        let connected = *port & CONNECTED != 0;
        let (enabled, link) = (*port & PORT_ENABLED != 0, *port & LINK);
        if value & PORT_RESET != 0 && connected {
            // Done at once: enabled, link in U0.
            *port = *port & !LINK | PORT_ENABLED;
            if let Some(d) = self.devices.get_mut(n).and_then(Option::as_mut) {
                d.reset();
            }
            self.port_changed(ctx, n, RESET_CHANGED);
        } else if value & PORT_ENABLED != 0 && enabled {
            *port = *port & !(PORT_ENABLED | LINK) | LINK_POLLING | ENABLE_CHANGED;
        } else if value & LINK_WRITE != 0 && enabled {
            match value & LINK {
                // U0: awake.
                0 if link != 0 => {
                    *port &= !LINK;
                    self.port_changed(ctx, n, LINK_CHANGED);
                }
                LINK_SUSPENDED if link < LINK_SUSPENDED => *port = *port & !LINK | LINK_SUSPENDED,
                _ => {}
            }
        }
    }

    fn port_changed(&mut self, ctx: &mut Ctx, n: usize, change: u32) {
        self.s.ports[n] |= change;
        self.post(ctx, (n as u64 + 1) << 24, SUCCESS << 24, PORT_CHANGE << 10);
    }

    /// A device came into a port, or left it.
    fn note_changes(&mut self, ctx: &mut Ctx) {
        for n in 0..self.devices.len() {
            let there = self.devices[n].is_some();
            if there == (self.s.ports[n] & CONNECTED != 0) {
                continue;
            }
            self.s.ports[n] = filled(there) | self.s.ports[n] & (CHANGES | WAKE_ON) | CONNECT_CHANGED;
            // A controller that stands still tells when it is asked.
            if self.s.command & RUN != 0 {
                self.port_changed(ctx, n, CONNECT_CHANGED);
            }
        }
    }

    /// The device in port `n` has something to say.
    fn wake(&mut self, ctx: &mut Ctx, n: usize) {
        if self.s.ports[n] & (LINK | PORT_ENABLED) == LINK_SUSPENDED | PORT_ENABLED {
            // A suspended device that may do so wakes its port; the guest asks it when it is awake.
            if self.devices[n].as_ref().is_some_and(UsbDevice::may_wake) {
                self.s.ports[n] = self.s.ports[n] & !LINK | LINK_RESUME;
                self.port_changed(ctx, n, LINK_CHANGED);
            }
            return;
        }
        // The slot that the guest gave it; endpoint 1 IN is number 3.
        let found = self.s.slots.iter().find(|(_, s)| usize::from(s.port) == n + 1 && s.is_running(3));
        if let Some(slot) = found.map(|(n, _)| *n) {
            self.ring_doorbell(ctx, slot, 3);
        }
    }

    fn ring_doorbell(&mut self, ctx: &mut Ctx, slot: u8, endpoint: u8) {
        if self.s.command & RUN == 0 || !self.pci.master() {
            return;
        }
        let Some(s) = self.s.slots.get_mut(&slot) else { return };
        let Some(device) = self.devices.get_mut(usize::from(s.port).wrapping_sub(1)).and_then(Option::as_mut)
        else {
            return;
        };
        let events = s.transfer(ctx, device, endpoint);
        for e in events {
            let control = TRANSFER_EVENT << 10 | u32::from(endpoint) << 16 | u32::from(slot) << 24;
            self.post(ctx, e.trb, e.code << 24 | e.residue & 0xFF_FFFF, control);
        }
    }

    fn drive(&mut self, ctx: &mut Ctx) {
        let wanted = self.s.management & (PENDING | ENABLED) == PENDING | ENABLED;
        self.pci.set_intx(ctx, wanted && self.s.command & INTERRUPTS != 0);
    }

    fn run_commands(&mut self, ctx: &mut Ctx) {
        if self.s.command & RUN == 0 || !self.pci.master() {
            return;
        }
        self.s.ring_low |= 8;
        for _ in 0..MAX_COMMANDS {
            let at = self.s.ring;
            let mut trb = [0u8; 16];
            if !ctx.dma_read(at, &mut trb) {
                return;
            }
            let word = |i: usize| u32::from_le_bytes([trb[i], trb[i + 1], trb[i + 2], trb[i + 3]]);
            let control = word(12);
            if (control & 1 != 0) != self.s.ring_cycle {
                return;
            }
            let kind = control >> 10 & 0x3F;
            if kind == LINK_TRB {
                self.s.ring = (u64::from(word(0)) | u64::from(word(4)) << 32) & !15;
                self.s.ring_cycle ^= control & 2 != 0;
                continue;
            }
            self.s.ring = at.wrapping_add(16);
            let parameter = u64::from(word(0)) | u64::from(word(4)) << 32;
            let (code, slot) = self.execute(ctx, kind, parameter, control);
            self.complete(ctx, at, code, slot);
        }
    }

    /// A command (4.6): how it ended, and the slot it was for.
    fn execute(&mut self, ctx: &mut Ctx, kind: u32, parameter: u64, control: u32) -> (u32, u8) {
        let slot = (control >> 24) as u8;
        match kind {
            NOOP_COMMAND => return (SUCCESS, 0),
            ENABLE_SLOT => {
                let most = (self.s.configure as u8).min(SLOTS);
                let Some(free) = (1..=most).find(|n| !self.s.slots.contains_key(n)) else {
                    return (NO_SLOTS, 0);
                };
                self.s.slots.insert(free, Slot::default());
                return (SUCCESS, free);
            }
            10..=17 => {}
            _ => return (TRB_ERROR, 0),
        }
        if kind == DISABLE_SLOT {
            let gone = self.s.slots.remove(&slot).is_some();
            return (if gone { SUCCESS } else { SLOT_NOT_ENABLED }, slot);
        }
        let mut output = [0; 8];
        ctx.dma_read(self.s.contexts.wrapping_add(8 * u64::from(slot)), &mut output);
        let connected: Vec<bool> = self.devices.iter().map(Option::is_some).collect();
        let Some(s) = self.s.slots.get_mut(&slot) else { return (SLOT_NOT_ENABLED, slot) };
        s.output = u64::from_le_bytes(output) & !0x3F;
        (s.command(ctx, kind, parameter, control, &connected), slot)
    }
}

impl Device for Xhci {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.reset_registers(ctx);
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8) -> u64 {
        if region == MSIX_BAR {
            return self.pci.msix_read(offset, size);
        }
        let first = u64::from(self.read_dword(ctx.now, offset & !3)) >> (8 * (offset & 3));
        match size {
            8 => first | u64::from(self.read_dword(ctx.now, (offset & !3) + 4)) << 32,
            _ => first,
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8, value: u64) {
        if region == MSIX_BAR {
            return self.pci.msix_write(ctx, offset, size, value);
        }
        // Registers are written whole (5.1).
        if size >= 4 && offset & 3 == 0 {
            self.write_dword(ctx, offset, value as u32);
            if size == 8 {
                self.write_dword(ctx, offset + 4, (value >> 32) as u32);
            }
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        if matches!(input, Input::Plug(_) | Input::Unplug { .. }) {
            self.note_changes(ctx);
        }
        for n in 0..self.devices.len() {
            if self.devices[n].as_mut().is_some_and(|d| d.input(input)) {
                self.wake(ctx, n);
            }
        }
    }
    fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        let mut devices = self.devices.iter_mut().enumerate();
        let ready = devices.find_map(|(n, d)| d.as_mut()?.disk_done(ctx, id, &op, &result).then_some(n));
        let slot =
            |n: usize| self.s.slots.iter().find(|(_, s)| usize::from(s.port) == n + 1).map(|(n, _)| *n);
        if let Some(slot) = ready.and_then(slot) {
            // What the guest asks for waits at endpoint 1 IN, what it sends at 2 OUT.
            for endpoint in [3, 4] {
                if self.s.slots.get(&slot).is_some_and(|s| s.is_running(endpoint)) {
                    self.ring_doorbell(ctx, slot, endpoint);
                }
            }
        }
    }
    fn rescan(&mut self, config: &PcConfig, _tell: bool) {
        let Ok(now) = ports::on_bus(config, &self.bus, self.ports[0] as usize) else { return };
        for (n, slot) in self.devices.iter_mut().enumerate() {
            let spec = now.iter().find(|(port, _)| *port == n).map(|(_, spec)| *spec);
            if slot.as_ref().map(UsbDevice::name) != spec.map(name_of).as_deref() {
                *slot = spec.and_then(|spec| UsbDevice::new(config, spec, true).ok());
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
        let devices = save_all(self.devices.iter().map(Option::as_ref));
        pack(&Saved { pci: self.pci.save(), s: self.s.clone(), devices })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        let same = s.s.ports.len() == self.devices.len()
            && load_all(self.devices.iter_mut().map(Option::as_mut), &s.devices);
        if !same || !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        self.s = s.s;
        Ok(())
    }
}
