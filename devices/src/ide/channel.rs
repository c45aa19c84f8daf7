//! An IDE channel: task file, data port, bus master, and the transfer in progress. A port of an AHCI controller is
//! such a channel with one drive, all of whose data go to and from the memory that the command names.

use serde::{Deserialize, Serialize};

use super::ata::DriveState;
use crate::config::DriveSpec;
use crate::ctx::Ctx;
use crate::door::{DiskOp, GuestEvent};
use crate::virtio::{self, Piece};

pub const ERR: u8 = 1;
pub const DRQ: u8 = 8;
pub const SEEK: u8 = 0x10;
pub const READY: u8 = 0x40;
pub const BUSY: u8 = 0x80;
pub const ABORTED: u8 = 4;
pub const NOT_FOUND: u8 = 0x10;
pub const UNCORRECTABLE: u8 = 0x40;

const BM_START: u8 = 1;
const BM_TO_MEMORY: u8 = 8;
const BM_ACTIVE: u8 = 1;
const BM_ERROR: u8 = 2;
const BM_IRQ: u8 = 4;

/// Bytes that one disk request moves at most.
const CHUNK: u64 = 1 << 20;
/// Entries of a PRD table, which must not cross 64 KiB.
const MAX_PRDS: u32 = 8192;

/// What the data port or the bus master is moving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    Idle,
    /// Data to the guest.
    In,
    /// Data from the guest to the disk.
    Out,
    /// A command packet from the guest.
    Packet,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChannelState {
    pub drives: [DriveState; 2],
    /// Device/head register (bit 4: which drive).
    pub device: u8,
    pub control: u8,
    pub phase: Phase,
    /// The command in hand is a packet command.
    pub packet: bool,
    /// The transfer uses the bus master.
    pub dma: bool,
    /// Byte offset on the disk of what comes next, and bytes still to be requested.
    pub offset: u64,
    pub left: u64,
    /// Bytes in a DRQ block.
    pub block: u32,
    pub buffer: Vec<u8>,
    /// Next byte of `buffer` at the data port, and the end of the DRQ block.
    pub at: u32,
    pub block_end: u32,
    /// The disk request that the channel waits for.
    pub request: Option<u64>,
    bm_command: u8,
    bm_status: u8,
    bm_table: u32,
    /// Bus master's place: next descriptor, address and bytes of the one in hand, whether it is the last.
    prd_next: u32,
    prd_address: u32,
    prd_left: u32,
    prd_last: bool,
    prd_count: u32,
    pub irq: bool,
    /// AHCI: the memory that the command names, and how many bytes of it were used.
    pub pieces: Vec<Piece>,
    pub moved: u64,
}

impl ChannelState {
    /// Whether indices of a loaded state lie inside its buffer.
    pub fn sound(&self) -> bool {
        let n = self.buffer.len();
        self.at as usize <= n && self.block_end as usize <= n && self.block != 0
    }
}

/// One channel.
pub struct Channel {
    pub spec: [Option<DriveSpec>; 2],
    /// The interrupt line; a port of an AHCI controller has none.
    line: Option<u8>,
    pub s: ChannelState,
}

impl Channel {
    pub fn new(spec: [Option<DriveSpec>; 2], line: Option<u8>) -> Channel {
        let drives = [DriveState::new(spec[0].as_ref()), DriveState::new(spec[1].as_ref())];
        let mut bm_status = 0;
        for (i, s) in spec.iter().enumerate() {
            // Drive can do DMA.
            bm_status |= u8::from(s.is_some()) << (5 + i);
        }
        let s = ChannelState {
            drives,
            device: 0xA0,
            control: 0,
            phase: Phase::Idle,
            packet: false,
            dma: false,
            offset: 0,
            left: 0,
            block: 512,
            buffer: Vec::new(),
            at: 0,
            block_end: 0,
            request: None,
            bm_command: 0,
            bm_status,
            bm_table: 0,
            prd_next: 0,
            prd_address: 0,
            prd_left: 0,
            prd_last: false,
            prd_count: 0,
            irq: false,
            pieces: Vec::new(),
            moved: 0,
        };
        Channel { spec, line, s }
    }

    /// System reset: everything as at power-on, but the media stay what they became.
    pub fn power_on(&mut self, ctx: &mut Ctx) {
        let media = [0, 1].map(|i| (self.s.drives[i].bytes, self.s.drives[i].medium, self.s.drives[i].open));
        *self = Channel::new(self.spec.clone(), self.line);
        for (d, medium) in self.s.drives.iter_mut().zip(media) {
            (d.bytes, d.medium, d.open) = medium;
        }
        self.drive_line(ctx, false);
    }

    /// Whether this is a port of an AHCI controller.
    pub fn is_port(&self) -> bool {
        self.line.is_none()
    }

    fn drive_line(&self, ctx: &mut Ctx, level: bool) {
        if let Some(line) = self.line {
            ctx.set_irq(line, level);
        }
    }

    /// AHCI: start the command in a register FIS, with its packet and the memory its data go to or come from.
    pub fn start(&mut self, ctx: &mut Ctx, fis: &[u8; 20], packet: &[u8], pieces: Vec<Piece>) {
        self.s.device = fis[7] & !0x10;
        let d = &mut self.s.drives[0];
        d.feature = [fis[3], fis[11]];
        d.lba = [[fis[4], fis[8]], [fis[5], fis[9]], [fis[6], fis[10]]];
        d.count = [fis[12], fis[13]];
        self.s.pieces = pieces;
        self.s.moved = 0;
        self.s.bm_status |= BM_ACTIVE;
        self.command(ctx, fis[2]);
        if self.s.phase == Phase::Packet {
            self.s.buffer = packet.to_vec();
            self.s.dma = true;
            self.packet(ctx);
        }
    }

    pub fn selected(&self) -> usize {
        usize::from(self.s.device >> 4 & 1)
    }

    /// The selected drive, if there is one.
    pub fn drive(&mut self) -> Option<(&DriveSpec, &mut DriveState)> {
        let n = self.selected();
        self.spec[n].as_ref().map(|spec| (spec, &mut self.s.drives[n]))
    }

    pub fn current(&mut self) -> &mut DriveState {
        let n = self.selected();
        &mut self.s.drives[n]
    }

    pub fn is_cd(&self) -> bool {
        self.spec[self.selected()].as_ref().is_some_and(|s| s.cdrom)
    }

    pub fn raise(&mut self, ctx: &mut Ctx) {
        self.s.bm_status |= BM_IRQ;
        self.s.irq = true;
        self.drive_line(ctx, self.s.control & 2 == 0);
    }

    fn lower(&mut self, ctx: &mut Ctx) {
        self.s.irq = false;
        self.drive_line(ctx, false);
    }

    /// The status register without its side effect.
    pub fn status(&self) -> u8 {
        let n = self.selected();
        match &self.spec[n] {
            None => 0,
            Some(_) => self.s.drives[n].status,
        }
    }

    pub fn register_read(&mut self, ctx: &mut Ctx, offset: u16) -> u8 {
        let n = self.selected();
        if self.spec[n].is_none() {
            return if offset == 6 && self.spec.iter().any(Option::is_some) { self.s.device } else { 0 };
        }
        let hob = self.s.control & 0x80 != 0;
        let d = &self.s.drives[n];
        let pair = |p: [u8; 2]| p[usize::from(hob)];
        match offset {
            1 => d.error,
            2 => pair(d.count),
            3 => pair(d.lba[0]),
            4 => pair(d.lba[1]),
            5 => pair(d.lba[2]),
            6 => self.s.device | 0xA0,
            7 => {
                self.lower(ctx);
                self.s.drives[n].status
            }
            _ => 0,
        }
    }

    pub fn register_write(&mut self, ctx: &mut Ctx, offset: u16, value: u8) {
        // Writing the task file makes the control register show the newest values again.
        self.s.control &= !0x80;
        let n = self.selected();
        if offset != 6 && offset != 7 && self.spec[n].is_some() && self.s.drives[n].status & BUSY != 0 {
            return;
        }
        match offset {
            1..=5 => {
                for d in &mut self.s.drives {
                    let pair = match offset {
                        1 => &mut d.feature,
                        2 => &mut d.count,
                        i => &mut d.lba[usize::from(i) - 3],
                    };
                    *pair = [value, pair[0]];
                }
            }
            6 => self.s.device = value,
            7 => self.command(ctx, value),
            _ => {}
        }
    }

    fn command(&mut self, ctx: &mut Ctx, value: u8) {
        self.lower(ctx);
        let cd = self.is_cd();
        let Some((_, d)) = self.drive() else { return };
        // A busy drive takes nothing but DEVICE RESET.
        if d.status & (BUSY | DRQ) != 0 && !(value == 8 && cd) {
            return;
        }
        d.error = 0;
        d.status = READY | SEEK;
        self.s.phase = Phase::Idle;
        self.s.packet = false;
        if cd {
            self.atapi_command(ctx, value);
        } else {
            self.ata_command(ctx, value);
        }
    }

    pub fn control_write(&mut self, ctx: &mut Ctx, value: u8) {
        let before = self.s.control;
        self.s.control = value;
        if value & 4 != 0 {
            for d in &mut self.s.drives {
                d.status = BUSY | SEEK;
            }
            self.stop();
        } else if before & 4 != 0 {
            self.software_reset();
        }
        self.drive_line(ctx, self.s.irq && value & 2 == 0);
    }

    /// Forget the transfer; a disk request on its way ends unseen.
    pub fn stop(&mut self) {
        self.s.phase = Phase::Idle;
        self.s.request = None;
        self.s.buffer.clear();
        self.s.at = 0;
        self.s.block_end = 0;
        self.s.left = 0;
        self.s.bm_status &= !BM_ACTIVE;
    }

    fn software_reset(&mut self) {
        self.stop();
        self.s.device = 0xA0;
        for (d, spec) in self.s.drives.iter_mut().zip(&self.spec) {
            d.signature(spec.as_ref().is_some_and(|s| s.cdrom));
        }
    }

    /// End a command without error.
    pub fn succeed(&mut self, ctx: &mut Ctx) {
        self.s.phase = Phase::Idle;
        let d = self.current();
        d.status = READY | SEEK;
        self.raise(ctx);
    }

    /// End a command with an error.
    pub fn fail(&mut self, ctx: &mut Ctx, error: u8) {
        self.stop();
        let d = self.current();
        d.status = READY | ERR;
        d.error = error;
        self.raise(ctx);
    }

    /// Offer the next DRQ block of `buffer` to the guest.
    pub fn offer(&mut self, ctx: &mut Ctx) {
        let len = self.s.buffer.len() as u32;
        self.s.block_end = (self.s.at + self.s.block).min(len);
        let (cd, size) = (self.s.packet, self.s.block_end - self.s.at);
        let d = self.current();
        d.status = READY | SEEK | DRQ;
        if cd {
            // Interrupt reason: data to the host; the byte count tells how much.
            d.count[0] = 2;
            d.lba[1][0] = size as u8;
            d.lba[2][0] = (size >> 8) as u8;
        }
        self.raise(ctx);
    }

    /// Take a DRQ block from the guest.
    pub fn accept(&mut self, size: u32) {
        self.s.buffer = vec![0; size as usize];
        self.s.at = 0;
        self.s.block_end = size;
        self.current().status = READY | SEEK | DRQ;
    }

    pub fn data_read(&mut self, ctx: &mut Ctx, size: u8) -> u32 {
        if self.s.phase != Phase::In || self.status() & DRQ == 0 {
            return 0;
        }
        let mut value = 0;
        for i in 0..u32::from(size) {
            if self.s.at < self.s.block_end {
                value |= u32::from(self.s.buffer[self.s.at as usize]) << (8 * i);
                self.s.at += 1;
            }
        }
        if self.s.at >= self.s.block_end {
            if (self.s.at as usize) < self.s.buffer.len() {
                self.offer(ctx);
            } else if self.s.left > 0 {
                self.fetch(ctx);
            } else {
                self.s.buffer.clear();
                self.s.at = 0;
                self.s.block_end = 0;
                if self.s.packet {
                    self.packet_succeed(ctx);
                } else {
                    self.s.phase = Phase::Idle;
                    let d = self.current();
                    d.status = READY | SEEK;
                    d.count[0] = 0;
                }
            }
        }
        value
    }

    pub fn data_write(&mut self, ctx: &mut Ctx, size: u8, value: u32) {
        if !matches!(self.s.phase, Phase::Out | Phase::Packet) || self.status() & DRQ == 0 {
            return;
        }
        for i in 0..u32::from(size) {
            if self.s.at < self.s.block_end {
                self.s.buffer[self.s.at as usize] = (value >> (8 * i)) as u8;
                self.s.at += 1;
            }
        }
        if self.s.at >= self.s.block_end {
            if self.s.phase == Phase::Packet {
                self.packet(ctx);
            } else {
                let data = std::mem::take(&mut self.s.buffer);
                self.s.at = 0;
                self.s.block_end = 0;
                self.current().status = BUSY | SEEK;
                self.store(ctx, data);
            }
        }
    }

    fn drive_index(&self) -> u32 {
        self.s.drives[self.selected()].medium
    }

    /// Request the next piece of a read.
    pub fn fetch(&mut self, ctx: &mut Ctx) {
        let len = self.s.left.min(CHUNK) as u32;
        self.current().status = BUSY | SEEK;
        self.s.request = Some(ctx.disk(self.drive_index(), DiskOp::Read { offset: self.s.offset, len }));
    }

    fn store(&mut self, ctx: &mut Ctx, data: Vec<u8>) {
        let op = DiskOp::Write { offset: self.s.offset, data };
        self.s.request = Some(ctx.disk(self.drive_index(), op));
    }

    pub fn flush(&mut self, ctx: &mut Ctx) {
        self.current().status = BUSY | SEEK;
        self.s.request = Some(ctx.disk(self.drive_index(), DiskOp::Flush));
    }

    pub fn disk_done(&mut self, ctx: &mut Ctx, op: DiskOp, result: Result<&[u8], i32>) {
        self.s.request = None;
        let data = match (result, &op) {
            (Err(_), _) => {
                if self.s.dma {
                    self.s.bm_status |= BM_ERROR;
                }
                return self.disk_failed(ctx);
            }
            // A short answer counts as an error of the disk.
            (Ok(data), DiskOp::Read { len, .. }) if data.len() != *len as usize => {
                return self.disk_failed(ctx);
            }
            (Ok(data), _) => data,
        };
        match op {
            DiskOp::Read { len, .. } => {
                self.s.offset += u64::from(len);
                self.s.left = self.s.left.saturating_sub(u64::from(len));
                if self.s.dma {
                    let fitted = self.scatter(ctx, data);
                    if fitted && self.s.left > 0 {
                        self.fetch(ctx);
                    } else {
                        self.dma_end(ctx);
                    }
                } else {
                    self.s.buffer = data.to_vec();
                    self.s.at = 0;
                    self.offer(ctx);
                }
            }
            DiskOp::Write { data, .. } => {
                let len = data.len() as u64;
                self.s.offset += len;
                self.s.left = self.s.left.saturating_sub(len);
                if self.s.left == 0 {
                    if self.s.dma {
                        self.dma_end(ctx);
                    } else {
                        self.current().count[0] = 0;
                        self.succeed(ctx);
                    }
                } else if self.s.dma {
                    self.dma_write(ctx);
                } else {
                    let size = self.s.left.min(u64::from(self.s.block)) as u32;
                    self.accept(size);
                    self.raise(ctx);
                }
            }
            _ => self.succeed(ctx),
        }
    }

    fn disk_failed(&mut self, ctx: &mut Ctx) {
        if self.is_cd() {
            self.packet_fail(ctx, 3, 0x11);
        } else {
            self.fail(ctx, UNCORRECTABLE);
        }
    }

    /// Data for the guest that needs no disk: IDENTIFY, packet replies.
    pub fn reply(&mut self, ctx: &mut Ctx, data: Vec<u8>, block: u32) {
        self.s.phase = Phase::In;
        self.s.left = 0;
        self.s.block = block.max(2);
        self.s.buffer = data;
        self.s.at = 0;
        if self.s.dma {
            self.current().status = READY | SEEK | DRQ;
            self.dma_start(ctx);
        } else {
            self.offer(ctx);
        }
    }

    // The bus master.

    pub fn bus_master_read(&self, offset: u16, size: u8) -> u32 {
        let bytes = self.s.bm_table.to_le_bytes();
        (0..u16::from(size))
            .map(|i| {
                let byte = match offset + i {
                    0 => self.s.bm_command,
                    2 => self.s.bm_status,
                    n @ 4..=7 => bytes[usize::from(n - 4)],
                    _ => 0,
                };
                u32::from(byte) << (8 * i)
            })
            .sum()
    }

    pub fn bus_master_write(&mut self, ctx: &mut Ctx, offset: u16, size: u8, value: u32) {
        for i in 0..u16::from(size) {
            let byte = (value >> (8 * i)) as u8;
            match offset + i {
                0 => {
                    let start = byte & BM_START != 0 && self.s.bm_command & BM_START == 0;
                    self.s.bm_command = byte & (BM_START | BM_TO_MEMORY);
                    if start {
                        self.s.bm_status |= BM_ACTIVE;
                        self.s.prd_next = self.s.bm_table;
                        self.s.prd_left = 0;
                        self.s.prd_last = false;
                        self.s.prd_count = 0;
                        self.dma_start(ctx);
                    } else if byte & BM_START == 0 {
                        self.s.bm_status &= !BM_ACTIVE;
                    }
                }
                2 => {
                    let keep = self.s.bm_status & BM_ACTIVE;
                    let cleared = self.s.bm_status & !byte & (BM_ERROR | BM_IRQ);
                    self.s.bm_status = keep | cleared | byte & 0x60;
                }
                n @ 4..=7 => {
                    let mut bytes = self.s.bm_table.to_le_bytes();
                    bytes[usize::from(n - 4)] = byte;
                    self.s.bm_table = u32::from_le_bytes(bytes) & !3;
                }
                _ => {}
            }
        }
    }

    /// Both sides are ready: the drive has a DMA command and the bus master is started.
    pub fn dma_start(&mut self, ctx: &mut Ctx) {
        if !self.s.dma || self.s.bm_status & BM_ACTIVE == 0 || self.s.request.is_some() {
            return;
        }
        match self.s.phase {
            Phase::In if self.s.left > 0 => self.fetch(ctx),
            Phase::In => {
                let data = std::mem::take(&mut self.s.buffer);
                self.s.at = 0;
                self.s.block_end = 0;
                self.scatter(ctx, &data);
                self.dma_end(ctx);
            }
            Phase::Out => self.dma_write(ctx),
            Phase::Idle | Phase::Packet => {}
        }
    }

    fn dma_end(&mut self, ctx: &mut Ctx) {
        self.s.bm_status &= !BM_ACTIVE;
        self.s.dma = false;
        self.s.left = 0;
        if self.is_cd() {
            self.packet_succeed(ctx);
        } else {
            self.current().count[0] = 0;
            self.succeed(ctx);
        }
    }

    /// Make a PRD with bytes left current; false at the end of the table.
    fn next_prd(&mut self, ctx: &Ctx) -> bool {
        while self.s.prd_left == 0 {
            if self.s.prd_last || self.s.prd_count >= MAX_PRDS {
                return false;
            }
            let mut prd = [0; 8];
            if !ctx.dma_read(u64::from(self.s.prd_next), &mut prd) {
                return false;
            }
            self.s.prd_count += 1;
            self.s.prd_next = self.s.prd_next.wrapping_add(8);
            self.s.prd_address = u32::from_le_bytes([prd[0], prd[1], prd[2], prd[3]]) & !1;
            let size = u32::from(u16::from_le_bytes([prd[4], prd[5]])) & !1;
            self.s.prd_left = if size == 0 { 0x1_0000 } else { size };
            self.s.prd_last = prd[7] & 0x80 != 0;
        }
        true
    }

    /// Write to the memory that the PRDs name; false if the table ended first.
    fn scatter(&mut self, ctx: &Ctx, mut data: &[u8]) -> bool {
        if self.is_port() {
            let n = virtio::scatter(ctx, &self.s.pieces, self.s.moved, data);
            self.s.moved += n as u64;
            return n == data.len();
        }
        while !data.is_empty() {
            if !self.next_prd(ctx) {
                return false;
            }
            let n = data.len().min(self.s.prd_left as usize);
            ctx.dma_write(u64::from(self.s.prd_address), &data[..n]);
            self.s.prd_address = self.s.prd_address.wrapping_add(n as u32);
            self.s.prd_left -= n as u32;
            data = &data[n..];
        }
        true
    }

    fn dma_write(&mut self, ctx: &mut Ctx) {
        let want = self.s.left.min(CHUNK) as usize;
        let mut data = Vec::new();
        if self.is_port() {
            data = virtio::gather(ctx, &self.s.pieces, self.s.moved, want);
            self.s.moved += data.len() as u64;
        }
        while !self.is_port() && data.len() < want && self.next_prd(ctx) {
            let n = (want - data.len()).min(self.s.prd_left as usize);
            let from = data.len();
            data.resize(from + n, 0);
            ctx.dma_read(u64::from(self.s.prd_address), &mut data[from..]);
            self.s.prd_address = self.s.prd_address.wrapping_add(n as u32);
            self.s.prd_left -= n as u32;
        }
        // Whole sectors only; a table that is too short ends the transfer.
        data.truncate(data.len() & !511);
        if data.is_empty() {
            return self.dma_end(ctx);
        }
        if data.len() < want {
            self.s.left = data.len() as u64;
        }
        self.current().status = BUSY | SEEK;
        self.store(ctx, data);
    }

    /// The user moved the tray of a CD drive, or changed what is in it.
    pub fn medium(&mut self, ctx: &mut Ctx, device: &str, open: bool, medium: Option<(u32, u64)>) {
        for (spec, d) in self.spec.iter().zip(&mut self.s.drives) {
            if !spec.as_ref().is_some_and(|s| s.cdrom && s.device == device) {
                continue;
            }
            let (number, bytes) = medium.unwrap_or((u32::MAX, 0));
            if (d.medium, d.bytes) != (number, bytes) || (d.open && !open) {
                d.attention = true;
            }
            (d.medium, d.bytes) = (number, bytes);
            if std::mem::replace(&mut d.open, open) != open {
                d.locked = false;
                ctx.event(GuestEvent::TrayMoved { device: device.to_owned(), open });
            }
        }
    }

    /// The medium has another size now.
    pub fn resized(&mut self, _ctx: &mut Ctx, drive: u32, size: u64) {
        for d in &mut self.s.drives {
            if d.medium == drive {
                d.bytes = size;
                // Medium may have changed.
                d.attention = true;
            }
        }
    }
}
