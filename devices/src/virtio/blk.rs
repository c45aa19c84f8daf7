//! The block device (section 5.2).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{gather, scatter, total, Chain, Io, Model, Piece};
use crate::config::DriveSpec;
use crate::ctx::{pack, unpack, DeviceError};
use crate::door::{DiskOp, Input};

const F_SEG_MAX: u64 = 1 << 2;
const F_GEOMETRY: u64 = 1 << 4;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const QUEUE: u16 = 256;
/// Bytes of data in one request at most.
const MAX_DATA: u64 = 32 << 20;
/// Bytes in flight at which no further request is taken.
const MAX_IN_FLIGHT: u64 = 64 << 20;
/// 512-byte sectors in one discard or write-zeroes request.
const MAX_SECTORS: u32 = 0x3F_FFFF;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct InFlight {
    head: u16,
    /// Bytes that the request moves.
    bytes: u64,
    /// Where a read's data go.
    data: Vec<Piece>,
    status: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    bytes: u64,
    write_back: bool,
    in_flight: BTreeMap<u64, InFlight>,
}

/// A disk.
pub struct Blk {
    spec: DriveSpec,
    s: State,
}

impl Blk {
    pub fn new(spec: DriveSpec) -> Blk {
        let s = State { bytes: spec.size_bytes, write_back: true, in_flight: BTreeMap::new() };
        Blk { spec, s }
    }

    /// Take requests as long as what is in flight stays within bounds; the rest waits in the queue.
    fn drain(&mut self, io: &mut Io) {
        let ram = io.ram();
        while self.s.in_flight.values().map(|r| r.bytes).sum::<u64>() < MAX_IN_FLIGHT {
            let Some(chain) = io.queues[0].pop(ram) else { break };
            self.request(io, chain);
        }
        io.queues[0].rearm(ram);
    }

    fn request(&mut self, io: &mut Io, chain: Chain) {
        let Chain { head, readable, mut writable } = chain;
        // The status byte is the last byte of what the device writes.
        let status = match writable.last_mut() {
            Some(p) if p.len > 0 => {
                p.len -= 1;
                p.addr.wrapping_add(u64::from(p.len))
            }
            _ => {
                io.queues[0].push(io.ram(), head, 0);
                return;
            }
        };
        let header = gather(io.ctx, &readable, 0, 16);
        let end = |io: &mut Io, code: u8, len: u32| {
            io.ctx.dma_write(status, &[code]);
            io.queues[0].push(io.ram(), head, len + 1);
        };
        if header.len() < 16 {
            return end(io, S_IOERR, 0);
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let out_len = total(&readable) - 16;
        let in_len = total(&writable);
        let inside = |len: u64| {
            sector.checked_mul(512).and_then(|o| o.checked_add(len)).is_some_and(|e| e <= self.s.bytes)
        };
        let op = match kind {
            T_IN => {
                if in_len == 0 || !in_len.is_multiple_of(512) || in_len > MAX_DATA || !inside(in_len) {
                    return end(io, S_IOERR, 0);
                }
                DiskOp::Read { offset: sector * 512, len: in_len as u32 }
            }
            T_OUT => {
                let bad =
                    out_len == 0 || !out_len.is_multiple_of(512) || out_len > MAX_DATA || !inside(out_len);
                if bad || self.spec.read_only {
                    return end(io, S_IOERR, 0);
                }
                let data = gather(io.ctx, &readable, 16, out_len as usize);
                DiskOp::Write { offset: sector * 512, data }
            }
            T_FLUSH => DiskOp::Flush,
            T_GET_ID => {
                let mut id = [0u8; 20];
                let n = self.spec.serial.len().min(20);
                id[..n].copy_from_slice(&self.spec.serial.as_bytes()[..n]);
                let n = scatter(io.ctx, &writable, 0, &id);
                return end(io, S_OK, n as u32);
            }
            T_DISCARD | T_WRITE_ZEROES => match self.range(io, kind, &readable, out_len) {
                Ok(op) => op,
                Err(code) => return end(io, code, 0),
            },
            _ => return end(io, S_UNSUPP, 0),
        };
        let bytes = if kind == T_IN { in_len } else { out_len };
        let data = if kind == T_IN { writable } else { Vec::new() };
        let id = io.ctx.disk(self.spec.index, op);
        self.s.in_flight.insert(id, InFlight { head, bytes, data, status });
    }

    /// The one segment of a discard or write-zeroes request.
    fn range(&self, io: &Io, kind: u32, readable: &[Piece], len: u64) -> Result<DiskOp, u8> {
        if self.spec.read_only {
            return Err(S_IOERR);
        }
        if len != 16 {
            return Err(S_UNSUPP);
        }
        let b = gather(io.ctx, readable, 16, 16);
        if b.len() < 16 {
            return Err(S_IOERR);
        }
        let sector = u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        let count = u32::from_le_bytes([b[8], b[9], b[10], b[11]]);
        let unmap = b[12] & 1 != 0;
        if count > MAX_SECTORS || sector.checked_add(count.into()).is_none_or(|e| e > self.s.bytes / 512) {
            return Err(S_IOERR);
        }
        let (offset, len) = (sector * 512, u64::from(count) * 512);
        match (kind, unmap) {
            (T_DISCARD, false) => Ok(DiskOp::Discard { offset, len }),
            (T_DISCARD, true) => Err(S_UNSUPP),
            _ => Ok(DiskOp::WriteZeroes { offset, len, may_unmap: unmap }),
        }
    }
}

impl Model for Blk {
    fn kind(&self) -> u16 {
        2
    }
    fn class(&self) -> u32 {
        0x01_0000
    }
    fn features(&self) -> u64 {
        let ro = if self.spec.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | ro
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE]
    }
    fn config(&self) -> Vec<u8> {
        let sectors = self.s.bytes / 512;
        let mut c = vec![0u8; 60];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        put(12, &(u32::from(QUEUE) - 2).to_le_bytes());
        put(16, &((sectors / (16 * 63)).min(16_383) as u16).to_le_bytes());
        put(18, &[16, 63]);
        put(20, &self.spec.logical_block_size.max(512).to_le_bytes());
        put(32, &[u8::from(self.s.write_back)]);
        put(34, &1u16.to_le_bytes());
        put(36, &MAX_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &MAX_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        c
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        if offset == 32 && !data.is_empty() {
            self.s.write_back = data[0] & 1 != 0;
        }
    }
    fn reset(&mut self) {
        // Requests on their way end unseen.
        self.s.in_flight.clear();
        self.s.write_back = true;
    }
    fn notify(&mut self, io: &mut Io, _queue: usize) {
        self.drain(io);
    }
    fn input(&mut self, io: &mut Io, input: &Input) {
        if let Input::DriveResized { drive, size } = input {
            if *drive == self.spec.index {
                self.s.bytes = *size;
                io.config_changed = true;
            }
        }
    }
    fn disk_done(&mut self, io: &mut Io, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        let Some(r) = self.s.in_flight.remove(&id) else { return };
        let changes = !matches!(op, DiskOp::Read { .. } | DiskOp::Flush);
        if changes && result.is_ok() && !self.s.write_back {
            // The driver has turned the write cache off: it is told when the data is on stable storage.
            let flush = io.ctx.disk(self.spec.index, DiskOp::Flush);
            self.s.in_flight.insert(flush, r);
            return;
        }
        let (code, len) = match (&op, result) {
            (DiskOp::Read { len, .. }, Ok(data)) if data.len() == *len as usize => {
                (S_OK, scatter(io.ctx, &r.data, 0, data) as u32)
            }
            (DiskOp::Read { .. }, Ok(_)) | (_, Err(_)) => (S_IOERR, 0),
            _ => (S_OK, 0),
        };
        io.ctx.dma_write(r.status, &[code]);
        io.queues[0].push(io.ram(), r.head, len + 1);
        self.drain(io);
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack(name, data)?;
        Ok(())
    }
}
