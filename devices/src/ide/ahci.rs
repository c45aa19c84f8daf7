//! ICH9's AHCI controller (Serial ATA AHCI 1.0; Serial ATA 2.6 for the FISes; ATA8-ACS for NCQ): six ports, a drive
//! on each. Commands that are not queued go through the port's [`Channel`], one at a time.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::channel::{Channel, ChannelState, ABORTED, BUSY, DRQ, ERR, READY, SEEK};
use crate::config::DriveSpec;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::door::{DiskOp, Input};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};
use crate::virtio::{gather, scatter, total, Piece};

/// Ports of the board's controller.
pub const PORTS: usize = 6;
/// The pair of an index and a data register, and the registers themselves.
const INDEX_BAR: u8 = 4;
const BAR: u8 = 5;

const GHC_RESET: u32 = 1;
const GHC_INTERRUPTS: u32 = 2;
const GHC_AHCI: u32 = 1 << 31;
/// Six ports, 32 commands, first generation, AHCI only, NCQ, 64-bit addresses.
const CAPABILITIES: u32 = (PORTS as u32 - 1) | 31 << 8 | 1 << 18 | 1 << 20 | 1 << 30 | 1 << 31;

// Port command register.
const START: u32 = 1;
const SPIN_UP: u32 = 2;
const POWER_ON: u32 = 4;
const OVERRIDE: u32 = 8;
const RECEIVE: u32 = 0x10;
const RECEIVING: u32 = 0x4000;
const RUNNING: u32 = 0x8000;
// Port interrupts: a register FIS, a set device bits FIS, a change of connection, an error in the task file.
const DHR: u32 = 1;
const SDB: u32 = 8;
const CONNECTED: u32 = 0x40;
const TASK_FILE_ERROR: u32 = 1 << 30;

/// Bytes of queued commands in flight at which no further one is taken.
const MAX_IN_FLIGHT: u64 = 64 << 20;

/// A queued command whose disk request is on its way.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Queued {
    tag: u8,
    bytes: u64,
    /// Where a read's data go.
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct PortState {
    list: u64,
    fis: u64,
    interrupts: u32,
    enable: u32,
    command: u32,
    signature: u32,
    control: u32,
    errors: u32,
    active: u32,
    issued: u32,
    /// The slot whose command the channel executes.
    current: Option<u8>,
    /// Queued commands by disk request.
    queued: BTreeMap<u64, Queued>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    control: u32,
    index: u32,
    ports: Vec<(PortState, ChannelState)>,
}

struct Port {
    s: PortState,
    channel: Channel,
}

/// The controller, PCI 00:1f.2.
pub struct Ahci {
    pci: PciFunction,
    /// Global host control.
    control: u32,
    index: u32,
    ports: Vec<Port>,
}

/// What a command header and its table say (4.2.2, 4.2.3).
struct Command {
    header: u64,
    fis: [u8; 20],
    packet: [u8; 12],
    pieces: Vec<Piece>,
}

impl Port {
    fn present(&self) -> bool {
        self.channel.spec[0].is_some()
    }

    /// The drive's status and error registers.
    fn task_file(&self) -> u32 {
        let d = &self.channel.s.drives[0];
        match self.present() {
            true => u32::from(d.status) | u32::from(d.error) << 8,
            false => 0x7F,
        }
    }

    /// What the drive says of itself after a reset.
    fn read_signature(&mut self) {
        let d = &self.channel.s.drives[0];
        self.s.signature = match self.present() {
            true => u32::from_le_bytes([d.count[0], d.lba[0][0], d.lba[1][0], d.lba[2][0]]),
            false => u32::MAX,
        };
    }

    /// COMRESET.
    fn reset_link(&mut self, ctx: &mut Ctx) {
        self.s.queued.clear();
        self.s.current = None;
        self.s.active = 0;
        self.s.issued = 0;
        self.channel.power_on(ctx);
        let d = &mut self.channel.s.drives[0];
        // Diagnostics passed; a packet drive is ready too as far as the link goes.
        d.status = READY | SEEK;
        self.read_signature();
        if self.present() {
            self.s.interrupts |= CONNECTED;
            self.s.errors |= 1 << 26;
            self.send_registers(ctx);
        }
    }

    /// A register FIS from the device (Serial ATA 2.6, 10.3.5) to where the guest wants such.
    fn send_registers(&mut self, ctx: &mut Ctx) {
        let d = &self.channel.s.drives[0];
        let [low, mid, high] = d.lba;
        let device = self.channel.s.device;
        let mut fis = [0u8; 20];
        fis[..4].copy_from_slice(&[0x34, 0x40, d.status, d.error]);
        fis[4..8].copy_from_slice(&[low[0], mid[0], high[0], device]);
        fis[8..14].copy_from_slice(&[low[1], mid[1], high[1], 0, d.count[0], d.count[1]]);
        let failed = d.status & ERR != 0;
        if self.s.command & RECEIVE != 0 {
            ctx.dma_write(self.s.fis.wrapping_add(0x40), &fis);
            self.s.interrupts |= DHR;
        }
        if failed {
            self.s.interrupts |= TASK_FILE_ERROR;
        }
    }

    fn read_command(&self, ctx: &Ctx, slot: u8) -> Option<Command> {
        let header = self.s.list.wrapping_add(32 * u64::from(slot));
        let mut h = [0u8; 32];
        if !ctx.dma_read(header, &mut h) {
            return None;
        }
        let quad = |b: &[u8], at: usize| {
            let mut q = [0u8; 8];
            q.copy_from_slice(&b[at..at + 8]);
            u64::from_le_bytes(q)
        };
        let table = quad(&h, 8) & !0x7F;
        let mut fis = [0u8; 20];
        let mut packet = [0u8; 12];
        if !ctx.dma_read(table, &mut fis) || !ctx.dma_read(table.wrapping_add(0x40), &mut packet) {
            return None;
        }
        let count = usize::from(u16::from_le_bytes([h[2], h[3]]));
        let mut list = vec![0u8; 16 * count];
        if !ctx.dma_read(table.wrapping_add(0x80), &mut list) {
            return None;
        }
        let pieces = list.chunks_exact(16).map(|e| {
            let len = u32::from_le_bytes([e[12], e[13], e[14], e[15]]) & 0x3F_FFFF;
            Piece { addr: quad(e, 0), len: len + 1 }
        });
        Some(Command { header, fis, packet, pieces: pieces.collect() })
    }

    /// Take what the guest issued, as far as it can be taken now.
    fn run(&mut self, ctx: &mut Ctx) {
        for slot in 0..32u8 {
            let bit = 1 << slot;
            if self.s.command & START == 0 || self.s.issued & bit == 0 || self.s.current == Some(slot) {
                continue;
            }
            // After an error the guest has to start anew.
            if self.task_file() as u8 & ERR != 0 && self.s.interrupts & TASK_FILE_ERROR != 0 {
                return;
            }
            let Some(command) = self.read_command(ctx, slot) else {
                self.fail(ctx);
                return;
            };
            let queued = matches!(command.fis[2], 0x60 | 0x61) && command.fis[1] & 0x80 != 0;
            if queued {
                if self.s.queued.values().map(|q| q.bytes).sum::<u64>() >= MAX_IN_FLIGHT {
                    return;
                }
                self.queue(ctx, slot, command);
            } else if self.s.current.is_none() {
                self.execute(ctx, slot, command);
            }
        }
    }

    fn fail(&mut self, ctx: &mut Ctx) {
        let d = &mut self.channel.s.drives[0];
        d.status = READY | SEEK | ERR;
        d.error = ABORTED;
        self.send_registers(ctx);
    }

    /// READ and WRITE FPDMA QUEUED (ATA8-ACS, 7.30 and 7.69).
    fn queue(&mut self, ctx: &mut Ctx, slot: u8, command: Command) {
        let f = &command.fis;
        let write = f[2] == 0x61;
        let tag = f[12] >> 3;
        let lba = u64::from_le_bytes([f[4], f[5], f[6], f[8], f[9], f[10], 0, 0]);
        let count = match u64::from(f[3]) | u64::from(f[11]) << 8 {
            0 => 65_536,
            n => n,
        };
        let (bytes, spec) = (512 * count, self.channel.spec[0].as_ref());
        let disk = spec.filter(|s| !(s.cdrom || write && s.read_only)).map(|s| s.index);
        let size = self.channel.s.drives[0].bytes / 512;
        let fits = lba.checked_add(count).is_some_and(|e| e <= size) && total(&command.pieces) >= bytes;
        let (Some(disk), true) = (disk, fits && tag < 32) else { return self.fail(ctx) };
        let op = match write {
            true => {
                DiskOp::Write { offset: 512 * lba, data: gather(ctx, &command.pieces, 0, bytes as usize) }
            }
            false => DiskOp::Read { offset: 512 * lba, len: bytes as u32 },
        };
        let pieces = if write { Vec::new() } else { command.pieces };
        let id = ctx.disk(disk, op);
        self.s.queued.insert(id, Queued { tag, bytes, pieces });
        // The drive has it: the slot is free, the tag is not.
        self.s.issued &= !(1 << slot);
        ctx.dma_write(command.header + 4, &(bytes as u32).to_le_bytes());
    }

    fn queued_done(&mut self, ctx: &mut Ctx, q: Queued, op: &DiskOp, result: Result<&[u8], i32>) {
        let good = match (op, result) {
            (DiskOp::Read { len, .. }, Ok(data)) if data.len() == *len as usize => {
                scatter(ctx, &q.pieces, 0, data);
                true
            }
            (DiskOp::Write { .. }, Ok(_)) => true,
            _ => false,
        };
        let d = &mut self.channel.s.drives[0];
        (d.status, d.error) = if good { (READY | SEEK, 0) } else { (READY | SEEK | ERR, ABORTED) };
        // Set device bits (Serial ATA 2.6, 10.3.6): the tags that are done.
        let done = if good { 1u32 << q.tag } else { 0 };
        let mut fis = [0xA1, 0x40, d.status & 0x77, d.error, 0, 0, 0, 0];
        fis[4..].copy_from_slice(&done.to_le_bytes());
        self.s.active &= !done;
        if self.s.command & RECEIVE != 0 {
            ctx.dma_write(self.s.fis.wrapping_add(0x58), &fis);
            self.s.interrupts |= SDB;
        }
        if !good {
            self.s.interrupts |= TASK_FILE_ERROR;
        }
        self.run(ctx);
    }

    fn execute(&mut self, ctx: &mut Ctx, slot: u8, command: Command) {
        if command.fis[1] & 0x80 == 0 {
            // Device control: a software reset.
            let before = self.channel.s.control;
            self.channel.control_write(ctx, command.fis[15]);
            self.s.issued &= !(1 << slot);
            if before & 4 != 0 && command.fis[15] & 4 == 0 {
                self.read_signature();
                self.channel.s.drives[0].status = READY | SEEK;
                self.send_registers(ctx);
            }
            return;
        }
        if !self.present() {
            return;
        }
        self.s.current = Some(slot);
        self.channel.start(ctx, &command.fis, &command.packet, command.pieces);
        self.settle(ctx);
    }

    /// The channel's command may have ended.
    fn settle(&mut self, ctx: &mut Ctx) {
        let Some(slot) = self.s.current else { return };
        if self.channel.s.drives[0].status & (BUSY | DRQ) != 0 {
            return;
        }
        self.s.current = None;
        self.channel.s.irq = false;
        let header = self.s.list.wrapping_add(32 * u64::from(slot));
        ctx.dma_write(header.wrapping_add(4), &(self.channel.s.moved as u32).to_le_bytes());
        if self.channel.s.drives[0].status & ERR == 0 {
            self.s.issued &= !(1 << slot);
        }
        self.channel.s.pieces.clear();
        self.send_registers(ctx);
    }

    fn read(&self, offset: u64) -> u32 {
        let s = &self.s;
        match offset {
            0x00 => s.list as u32,
            0x04 => (s.list >> 32) as u32,
            0x08 => s.fis as u32,
            0x0C => (s.fis >> 32) as u32,
            0x10 => s.interrupts,
            0x14 => s.enable,
            0x18 => s.command,
            0x20 => self.task_file(),
            0x24 => s.signature,
            // A device, at the first generation's speed, active.
            0x28 if self.present() => 0x113,
            0x2C => s.control,
            0x30 => s.errors,
            0x34 => s.active,
            0x38 => s.issued,
            _ => 0,
        }
    }

    fn write(&mut self, ctx: &mut Ctx, offset: u64, value: u32) {
        let low = |word: u64, mask: u32| word & !0xFFFF_FFFF | u64::from(value & mask);
        let high = |word: u64| word & 0xFFFF_FFFF | u64::from(value) << 32;
        let s = &mut self.s;
        match offset {
            0x00 => s.list = low(s.list, !0x3FF),
            0x04 => s.list = high(s.list),
            0x08 => s.fis = low(s.fis, !0xFF),
            0x0C => s.fis = high(s.fis),
            0x10 => s.interrupts &= !value,
            0x14 => s.enable = value & 0xFDC0_00FF,
            0x18 => self.write_command(ctx, value),
            0x2C => {
                if value & 15 == 0 && s.control & 15 == 1 {
                    self.reset_link(ctx);
                }
                self.s.control = value;
            }
            0x30 => s.errors &= !value,
            0x34 if s.command & START != 0 => s.active |= value,
            0x38 if s.command & START != 0 => {
                s.issued |= value;
                self.run(ctx);
            }
            _ => {}
        }
    }

    fn write_command(&mut self, ctx: &mut Ctx, value: u32) {
        let was = self.s.command;
        let mut new = value & (START | RECEIVE) | SPIN_UP | POWER_ON;
        if value & START != 0 {
            new |= RUNNING;
        } else if was & START != 0 {
            // Stopped: what was issued is forgotten; disk requests on their way end unseen.
            self.s.issued = 0;
            self.s.active = 0;
            self.s.queued.clear();
            if self.s.current.take().is_some() {
                self.channel.stop();
                self.channel.s.drives[0].status = READY | SEEK;
            }
        }
        if value & RECEIVE != 0 {
            new |= RECEIVING;
        }
        if value & OVERRIDE != 0 {
            let d = &mut self.channel.s.drives[0];
            d.status &= !(BUSY | DRQ);
        }
        self.s.command = new;
        if new & RECEIVE != 0 && was & RECEIVE == 0 && self.present() {
            // The FIS with the signature waited until there was a place for it.
            self.send_registers(ctx);
            self.s.interrupts &= !DHR;
        }
        self.run(ctx);
    }
}

impl Ahci {
    /// A controller with these drives.
    pub fn new(drives: [Option<DriveSpec>; PORTS]) -> Ahci {
        let id = PciId {
            vendor: 0x8086,
            device: 0x2922,
            revision: 2,
            class: 0x01_0601,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let mut pci = PciFunction::new(0xFA, id);
        pci.pin(1);
        pci.bar(usize::from(INDEX_BAR), Bar::Io(32));
        pci.bar(usize::from(BAR), Bar::Memory(0x1000));
        pci.add_msi(0x80);
        // Serial ATA capability: the index and data registers at offset 16 of BAR 4.
        pci.capability_at(0xA8, 0x12, &[0x10, 0, 0x48, 0, 0, 0]);
        // AHCI is the only mode.
        pci.set8(0x90, 0x40);
        pci.seal();
        let port = |drive| Port { s: PortState::default(), channel: Channel::new([drive, None], None) };
        Ahci { pci, control: GHC_AHCI, index: 0, ports: drives.into_iter().map(port).collect() }
    }

    /// Ports that want to interrupt.
    fn pending(&self) -> u32 {
        let wants = |p: &Port| p.s.interrupts & p.s.enable != 0;
        self.ports.iter().enumerate().filter(|(_, p)| wants(p)).map(|(i, _)| 1 << i).sum()
    }

    fn interrupt(&mut self, ctx: &mut Ctx) {
        let wanted = self.pending() != 0 && self.control & GHC_INTERRUPTS != 0;
        if self.pci.msi_enabled() {
            if wanted {
                self.pci.msi_notify(ctx);
            }
        } else {
            self.pci.set_intx(ctx, wanted);
        }
    }

    fn reset_all(&mut self, ctx: &mut Ctx) {
        self.control = GHC_AHCI;
        self.index = 0;
        for port in &mut self.ports {
            port.s = PortState { command: SPIN_UP | POWER_ON, ..PortState::default() };
            port.reset_link(ctx);
            port.s.interrupts = 0;
        }
        self.pci.set_intx(ctx, false);
    }

    fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => CAPABILITIES,
            0x04 => self.control,
            0x08 => self.pending(),
            0x0C => (1 << PORTS) - 1,
            0x10 => 0x0001_0000,
            0x100.. => self.ports.get((offset as usize - 0x100) / 0x80).map_or(0, |p| p.read(offset & 0x7C)),
            _ => 0,
        }
    }

    fn write(&mut self, ctx: &mut Ctx, offset: u64, value: u32) {
        match offset {
            0x04 if value & GHC_RESET != 0 => self.reset_all(ctx),
            0x04 => self.control = value & GHC_INTERRUPTS | GHC_AHCI,
            0x100.. => {
                if let Some(p) = self.ports.get_mut((offset as usize - 0x100) / 0x80) {
                    p.write(ctx, offset & 0x7C, value);
                }
            }
            // The status of the ports says it all: clearing there clears here.
            _ => {}
        }
        self.interrupt(ctx);
    }
}

impl Device for Ahci {
    fn name(&self) -> &str {
        "ich9-ahci"
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.reset_all(ctx);
    }
    fn pio_read(&mut self, _ctx: &mut Ctx, _region: u8, offset: u16, _size: u8) -> u32 {
        match offset {
            16 => self.index,
            20 => self.read(u64::from(self.index & 0xFFC)),
            _ => 0,
        }
    }
    fn pio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u16, _size: u8, value: u32) {
        match offset {
            16 => self.index = value & 0xFFC,
            20 => self.write(ctx, u64::from(self.index), value),
            _ => {}
        }
    }
    fn mmio_read(&mut self, _ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        let first = u64::from(self.read(offset & !3)) >> (8 * (offset & 3));
        match size {
            8 => first | u64::from(self.read((offset & !3) + 4)) << 32,
            _ => first,
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        // Registers are written whole.
        if size >= 4 && offset & 3 == 0 {
            self.write(ctx, offset, value as u32);
            if size == 8 {
                self.write(ctx, offset + 4, (value >> 32) as u32);
            }
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        for p in &mut self.ports {
            match input {
                Input::DriveResized { drive, size } => p.channel.resized(ctx, *drive, *size),
                Input::Medium { device, open, medium } => p.channel.medium(ctx, device, *open, *medium),
                _ => {}
            }
        }
    }
    fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        for p in &mut self.ports {
            if let Some(q) = p.s.queued.remove(&id) {
                p.queued_done(ctx, q, &op, result);
                break;
            }
            if p.channel.s.request == Some(id) {
                p.channel.disk_done(ctx, op, result);
                p.settle(ctx);
                p.run(ctx);
                break;
            }
        }
        self.interrupt(ctx);
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved {
            pci: self.pci.save(),
            control: self.control,
            index: self.index,
            ports: self.ports.iter().map(|p| (p.s.clone(), p.channel.s.clone())).collect(),
        })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(self.name(), data)?;
        let sound = |(p, c): &(PortState, ChannelState)| {
            c.sound() && p.current.is_none_or(|s| s < 32) && p.queued.values().all(|q| q.tag < 32)
        };
        if s.ports.len() != PORTS || !s.ports.iter().all(sound) || !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name().into()));
        }
        (self.control, self.index) = (s.control, s.index & 0xFFC);
        for (port, (state, channel)) in self.ports.iter_mut().zip(s.ports) {
            port.s = state;
            port.channel.s = channel;
        }
        Ok(())
    }
}
