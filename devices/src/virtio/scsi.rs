//! The SCSI host device (section 5.6), with the logical units behind it.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::{gather, scatter, total, Chain, Io, Model, Piece};
use crate::config::{DeviceSpec, PcConfig};
use crate::ctx::{pack, unpack, DeviceError};
use crate::door::{DiskOp, GuestEvent, Input};
use crate::registry::Build;
use crate::scsi::{self, sense_bytes, Act, Sense, Unit, UnitState};

const F_HOTPLUG: u64 = 1 << 1;
const F_CHANGE: u64 = 1 << 2;

const CONTROL: usize = 0;
const EVENT: usize = 1;
const REQUEST: usize = 2;
/// Request queues at most.
const MAX_QUEUES: usize = 64;
const QUEUE: u16 = 256;
/// Bytes in flight at which no further request is taken.
const MAX_IN_FLIGHT: u64 = 64 << 20;

// Responses (5.6.6.1).
const S_OK: u8 = 0;
const S_OVERRUN: u8 = 1;
const S_BAD_TARGET: u8 = 3;
const S_FAILURE: u8 = 9;
const S_FUNCTION_REJECTED: u8 = 11;
const S_INCORRECT_LUN: u8 = 12;
const GOOD: u8 = 0;
const CHECK_CONDITION: u8 = 2;

// Task management (5.6.6.2).
const T_TMF: u32 = 0;
const T_AN_QUERY: u32 = 1;
const T_AN_SUBSCRIBE: u32 = 2;
const ABORT_TASK: u32 = 0;
const I_T_NEXUS_RESET: u32 = 4;
const QUERY_TASK: u32 = 6;
const QUERY_TASK_SET: u32 = 7;

const EVENT_TRANSPORT_RESET: u32 = 1;
const EVENT_PARAM_CHANGE: u32 = 3;
const RESCAN: u32 = 1;
const REMOVED: u32 = 2;
const EVENTS_MISSED: u32 = 1 << 31;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct InFlight {
    queue: u16,
    head: u16,
    target: u8,
    lun: u16,
    tag: u64,
    bytes: u64,
    /// All that the device writes: the response, then a read's data.
    writable: Vec<Piece>,
    /// A flush follows.
    fua: bool,
}

/// A task management function that waits for requests to end.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Tmf {
    head: u16,
    response: Vec<Piece>,
    waits: Vec<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    units: Vec<UnitState>,
    sense_size: u32,
    cdb_size: u32,
    in_flight: BTreeMap<u64, InFlight>,
    tmfs: Vec<Tmf>,
    /// Events that wait for a buffer: event, target, lun, reason.
    events: VecDeque<(u32, u8, u16, u32)>,
    missed: bool,
}

/// The host.
pub struct Scsi {
    spec: DeviceSpec,
    queues: usize,
    units: Vec<Unit>,
    s: State,
}

impl Scsi {
    /// A host with the units of the configuration that are behind it.
    pub fn new(b: &Build) -> Result<Scsi, DeviceError> {
        let queues = b.number("num_queues", 1)? as usize;
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(b.bad("num_queues"));
        }
        let units = scsi::units(b.config, b.spec)?.into_iter().map(|(_, unit)| unit).collect();
        let s = State {
            units: Vec::new(),
            sense_size: 96,
            cdb_size: 32,
            in_flight: BTreeMap::new(),
            tmfs: Vec::new(),
            events: VecDeque::new(),
            missed: false,
        };
        Ok(Scsi { spec: b.spec.clone(), queues, units, s })
    }

    fn drain(&mut self, io: &mut Io) {
        let ram = io.ram();
        for queue in REQUEST..REQUEST + self.queues {
            while self.s.in_flight.values().map(|r| r.bytes).sum::<u64>() < MAX_IN_FLIGHT {
                let Some(chain) = io.queues[queue].pop(ram) else { break };
                self.request(io, queue, chain);
            }
            io.queues[queue].rearm(ram);
        }
    }

    /// Target and logical unit of the eight bytes of an address (5.6.6.1: one level, flat space).
    fn address(lun: &[u8]) -> Option<(u8, u16)> {
        match lun {
            [1, target, high, low, ..] => Some((*target, u16::from_be_bytes([*high, *low]) & 0x3FFF)),
            _ => None,
        }
    }

    fn answer(&self, io: &mut Io, r: &InFlight, response: u8, status: u8, sense: Option<Sense>, data: &[u8]) {
        let head = 12 + u64::from(self.s.sense_size);
        let room = total(&r.writable).saturating_sub(head);
        let n = scatter(io.ctx, &r.writable, head, data) as u64;
        let mut reply = Vec::with_capacity(head as usize);
        let mut bytes = sense.map_or(Vec::new(), |s| sense_bytes(s).to_vec());
        bytes.truncate(self.s.sense_size as usize);
        reply.extend((bytes.len() as u32).to_le_bytes());
        // What was expected and did not come.
        reply.extend((room.saturating_sub(n) as u32).to_le_bytes());
        reply.extend([0, 0, status, response]);
        reply.extend(&bytes);
        reply.resize(head as usize, 0);
        scatter(io.ctx, &r.writable, 0, &reply);
        io.queues[usize::from(r.queue)].push(io.ram(), r.head, (head + n) as u32);
    }

    fn request(&mut self, io: &mut Io, queue: usize, chain: Chain) {
        let cdb_size = self.s.cdb_size as usize;
        let head = 19 + cdb_size;
        let Chain { head: index, readable, writable } = chain;
        let header = gather(io.ctx, &readable, 0, head);
        let room = 12 + u64::from(self.s.sense_size);
        if header.len() < head || total(&writable) < room {
            // Not even the response fits.
            io.queues[queue].push(io.ram(), index, 0);
            return;
        }
        let mut tag = [0; 8];
        tag.copy_from_slice(&header[8..16]);
        let address = Scsi::address(&header[..8]);
        let (target, lun) = address.unwrap_or((0, 0));
        let mut r = InFlight {
            queue: queue as u16,
            head: index,
            target,
            lun,
            tag: u64::from_le_bytes(tag),
            bytes: 0,
            writable,
            fua: false,
        };
        if address.is_none() || !self.units.iter().any(|u| u.target == target) {
            return self.answer(io, &r, S_BAD_TARGET, GOOD, None, &[]);
        }
        let mut cdb = [0u8; 32];
        let n = cdb_size.min(32);
        cdb[..n].copy_from_slice(&header[19..19 + n]);
        if cdb[0] == 0xA0 {
            let luns = self.report_luns(target, &cdb);
            return self.answer(io, &r, S_OK, GOOD, None, &luns);
        }
        let sent = total(&readable).saturating_sub(head as u64);
        let wanted = total(&r.writable).saturating_sub(room);
        let Some(unit) = self.units.iter_mut().find(|u| (u.target, u.lun) == (target, lun)) else {
            if cdb[0] == 0x12 && cdb[1] & 1 == 0 {
                // No such unit here, but there could be one.
                let mut none = vec![0x7F, 0, 5, 2, 31];
                none.resize(36, 0);
                none.truncate(usize::from(u16::from_be_bytes([cdb[3], cdb[4]])));
                return self.answer(io, &r, S_OK, GOOD, None, &none);
            }
            return self.answer(io, &r, S_OK, CHECK_CONDITION, Some(scsi::LUN_NOT_SUPPORTED), &[]);
        };
        let ctx = &*io.ctx;
        let act = unit.execute(&cdb, sent, wanted, |n| gather(ctx, &readable, head as u64, n));
        match act {
            Act::Data(data) => {
                let response = if data.len() as u64 > wanted { S_OVERRUN } else { S_OK };
                self.answer(io, &r, response, GOOD, None, &data);
            }
            Act::Check(sense) => self.answer(io, &r, S_OK, CHECK_CONDITION, Some(sense), &[]),
            Act::Tray(open) => {
                let device = unit.device.clone();
                io.ctx.event(GuestEvent::TrayMoved { device, open });
                self.answer(io, &r, S_OK, GOOD, None, &[]);
            }
            Act::Disk { op, fua } => {
                let changes = !matches!(op, DiskOp::Read { .. } | DiskOp::Flush);
                r.fua = changes && (fua || unit.writes_through());
                r.bytes = match &op {
                    DiskOp::Read { len, .. } => u64::from(*len),
                    DiskOp::Write { data, .. } => data.len() as u64,
                    _ => 0,
                };
                let id = io.ctx.disk(unit.s.drive, op);
                self.s.in_flight.insert(id, r);
            }
        }
    }

    /// REPORT LUNS (SPC-3, 6.21): unit 0 always, so that a scan finds the others.
    fn report_luns(&self, target: u8, cdb: &[u8]) -> Vec<u8> {
        let mut luns: Vec<u16> = self.units.iter().filter(|u| u.target == target).map(|u| u.lun).collect();
        luns.push(0);
        luns.sort_unstable();
        luns.dedup();
        let mut r = (8 * luns.len() as u32).to_be_bytes().to_vec();
        r.extend([0; 4]);
        for lun in luns {
            // Peripheral addressing up to 255, flat above.
            let lun = if lun < 256 { lun } else { 0x4000 | lun };
            r.extend(lun.to_be_bytes());
            r.extend([0; 6]);
        }
        r.truncate(u32::from_be_bytes([cdb[6], cdb[7], cdb[8], cdb[9]]) as usize);
        r
    }

    fn control(&mut self, io: &mut Io, chain: Chain) {
        let request = gather(io.ctx, &chain.readable, 0, 24);
        let word = |at: usize| request.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let reply = |io: &mut Io, bytes: &[u8]| {
            let n = scatter(io.ctx, &chain.writable, 0, bytes);
            io.queues[CONTROL].push(io.ram(), chain.head, n as u32);
        };
        match (word(0), request.len()) {
            // No asynchronous notifications are there to be asked for.
            (Some(T_AN_QUERY | T_AN_SUBSCRIBE), 16..) => reply(io, &[0, 0, 0, 0, S_OK]),
            (Some(T_TMF), 24) => {
                let function = word(4).unwrap_or(u32::MAX);
                let mut tag = [0; 8];
                tag.copy_from_slice(&request[16..24]);
                let tag = u64::from_le_bytes(tag);
                let Some((target, lun)) = Scsi::address(&request[8..16]) else {
                    return reply(io, &[S_FAILURE]);
                };
                if !self.units.iter().any(|u| u.target == target) {
                    return reply(io, &[S_BAD_TARGET]);
                }
                let whole = function == I_T_NEXUS_RESET;
                if !whole && !self.units.iter().any(|u| (u.target, u.lun) == (target, lun)) {
                    return reply(io, &[S_INCORRECT_LUN]);
                }
                let one = matches!(function, ABORT_TASK | QUERY_TASK);
                let meant =
                    self.s.in_flight.iter().filter(|(_, r)| {
                        r.target == target && (whole || r.lun == lun) && (!one || r.tag == tag)
                    });
                let waits: Vec<u64> = meant.map(|(id, _)| *id).collect();
                match function {
                    // "Function succeeded" means that there is one.
                    QUERY_TASK | QUERY_TASK_SET => reply(io, &[if waits.is_empty() { 0 } else { 10 }]),
                    0 | 1 | 3..=5 if waits.is_empty() => reply(io, &[0]),
                    // What is on its way to the disk is not called back: it ends, and then this does.
                    0 | 1 | 3..=5 => {
                        self.s.tmfs.push(Tmf { head: chain.head, response: chain.writable.clone(), waits });
                    }
                    _ => reply(io, &[S_FUNCTION_REJECTED]),
                }
            }
            _ => reply(io, &[]),
        }
    }

    fn settle_tmfs(&mut self, io: &mut Io, id: u64) {
        for tmf in &mut self.s.tmfs {
            tmf.waits.retain(|w| *w != id);
        }
        let (done, left) =
            std::mem::take(&mut self.s.tmfs).into_iter().partition(|t: &Tmf| t.waits.is_empty());
        self.s.tmfs = left;
        for tmf in done {
            let n = scatter(io.ctx, &tmf.response, 0, &[0]);
            io.queues[CONTROL].push(io.ram(), tmf.head, n as u32);
        }
    }

    /// Note for the driver what happened to a unit.
    fn note(&mut self, event: u32, (target, lun): (u8, u16), reason: u32) {
        if self.s.events.len() < 64 {
            self.s.events.push_back((event, target, lun, reason));
        } else {
            self.s.missed = true;
        }
    }

    fn flush_events(&mut self, io: &mut Io) {
        let ram = io.ram();
        while let Some((event, target, lun, reason)) = self.s.events.front().copied() {
            let Some(chain) = io.queues[EVENT].pop(ram) else { break };
            self.s.events.pop_front();
            let missed = if std::mem::take(&mut self.s.missed) { EVENTS_MISSED } else { 0 };
            let mut bytes = (event | missed).to_le_bytes().to_vec();
            bytes.extend([1, target]);
            bytes.extend((lun | if lun >= 256 { 0x4000 } else { 0 }).to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(reason.to_le_bytes());
            let n = scatter(io.ctx, &chain.writable, 0, &bytes);
            io.queues[EVENT].push(ram, chain.head, n as u32);
        }
        io.queues[EVENT].rearm(ram);
    }
}

impl Model for Scsi {
    fn kind(&self) -> u16 {
        8
    }
    fn class(&self) -> u32 {
        0x01_0000
    }
    fn features(&self) -> u64 {
        F_HOTPLUG | F_CHANGE
    }
    fn queue_sizes(&self) -> &'static [u16] {
        const SIZES: &[u16] = &[QUEUE; REQUEST + MAX_QUEUES];
        &SIZES[..REQUEST + self.queues]
    }
    fn config(&self) -> Vec<u8> {
        let mut c = Vec::with_capacity(36);
        for word in [self.queues as u32, u32::from(QUEUE) - 2, 0xFFFF, 128, 16] {
            c.extend(word.to_le_bytes());
        }
        c.extend(self.s.sense_size.to_le_bytes());
        c.extend(self.s.cdb_size.to_le_bytes());
        c.extend(0u16.to_le_bytes());
        c.extend(255u16.to_le_bytes());
        c.extend(16383u32.to_le_bytes());
        c
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        let [a, b, c, d] = *data else { return };
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            20 if value <= 65536 => self.s.sense_size = value,
            24 if (1..=256).contains(&value) => self.s.cdb_size = value,
            _ => {}
        }
    }
    fn reset(&mut self) {
        // Requests on their way end unseen.
        self.s.in_flight.clear();
        self.s.tmfs.clear();
        self.s.events.clear();
        (self.s.missed, self.s.sense_size, self.s.cdb_size) = (false, 96, 32);
        self.units.iter_mut().for_each(Unit::reset);
    }
    fn notify(&mut self, io: &mut Io, queue: usize) {
        match queue {
            CONTROL => {
                let ram = io.ram();
                while let Some(chain) = io.queues[CONTROL].pop(ram) {
                    self.control(io, chain);
                }
                io.queues[CONTROL].rearm(ram);
            }
            EVENT => self.flush_events(io),
            _ => self.drain(io),
        }
    }
    fn input(&mut self, io: &mut Io, input: &Input) {
        match input {
            Input::DriveResized { drive, size } => {
                let Some(unit) = self.units.iter_mut().find(|u| u.s.drive == *drive) else { return };
                unit.resized(*size);
                let place = unit.s.place;
                let (_, code, qualifier) = scsi::CAPACITY_CHANGED;
                let reason = u32::from(code) | u32::from(qualifier) << 8;
                self.note(EVENT_PARAM_CHANGE, place, reason);
            }
            Input::Medium { device, open, medium } => {
                if let Some(unit) = self.units.iter_mut().find(|u| u.device == *device) {
                    unit.change_medium(*open, *medium);
                }
            }
            _ => {}
        }
        if !self.s.events.is_empty() {
            self.flush_events(io);
        }
    }
    fn rescan(&mut self, config: &PcConfig, tell: bool) {
        let Ok(now) = scsi::units(config, &self.spec) else { return };
        let gone: Vec<(u8, u16)> = {
            let is_gone = |u: &&Unit| !now.iter().any(|(_, n)| n.device == u.device);
            self.units.iter().filter(is_gone).map(|u| u.s.place).collect()
        };
        self.units.retain(|u| !gone.contains(&u.s.place));
        let mut events: Vec<_> = gone.into_iter().map(|place| (place, REMOVED)).collect();
        for (_, mut unit) in now {
            if self.units.iter().any(|u| u.device == unit.device) {
                continue;
            }
            // Those that stayed keep their places.
            let free = |t: &u8| !self.units.iter().any(|u| u.s.place == (*t, unit.lun));
            if !free(&unit.target) {
                let Some(target) = (0..=255).find(free) else { continue };
                unit.move_to(target);
            }
            events.push((unit.s.place, RESCAN));
            self.units.push(unit);
        }
        for (place, reason) in events.into_iter().filter(|_| tell) {
            self.note(EVENT_TRANSPORT_RESET, place, reason);
        }
    }
    fn disk_done(&mut self, io: &mut Io, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        let Some(mut r) = self.s.in_flight.remove(&id) else { return };
        let drive = self.units.iter().find(|u| u.s.place == (r.target, r.lun)).map(|u| u.s.drive);
        if let (true, true, Some(drive)) = (r.fua, result.is_ok(), drive) {
            r.fua = false;
            let flush = io.ctx.disk(drive, DiskOp::Flush);
            for tmf in &mut self.s.tmfs {
                tmf.waits.iter_mut().filter(|w| **w == id).for_each(|w| *w = flush);
            }
            self.s.in_flight.insert(flush, r);
            return;
        }
        match (&op, result) {
            (DiskOp::Read { len, .. }, Ok(data)) if data.len() == *len as usize => {
                self.answer(io, &r, S_OK, GOOD, None, data);
            }
            (DiskOp::Read { .. }, Ok(_)) | (_, Err(_)) => {
                self.answer(io, &r, S_OK, CHECK_CONDITION, Some(scsi::MEDIUM_ERROR), &[]);
            }
            _ => self.answer(io, &r, S_OK, GOOD, None, &[]),
        }
        self.settle_tmfs(io, id);
        self.drain(io);
    }
    fn save(&self) -> Vec<u8> {
        let units = self.units.iter().map(|u| u.s.clone()).collect();
        pack(&State { units, ..self.s.clone() })
    }
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        let s: State = unpack(name, data)?;
        if s.units.len() != self.units.len() || s.cdb_size > 256 || s.sense_size > 65536 {
            return Err(DeviceError::Misfit(name.into()));
        }
        for state in &s.units {
            let unit = self.units.iter_mut().find(|u| u.s.place == state.place);
            unit.ok_or_else(|| DeviceError::Misfit(name.into()))?.s = state.clone();
        }
        self.s = s;
        Ok(())
    }
}
