//! `usb-storage`: a disk behind the Bulk-Only Transport (USB Mass Storage Class, Bulk-Only Transport 1.0). Commands come to
//! endpoint 2, answers from endpoint 1; the SCSI unit is that of every SCSI controller.

use serde::{Deserialize, Serialize};

use super::device::{standard_request, string_descriptor, Answer, Stall};
use crate::config::{DeviceSpec, PcConfig};
use crate::ctx::{pack, Ctx, DeviceError};
use crate::door::{DiskOp, Input};
use crate::scsi::{self, sense_bytes, Act, Sense, Unit, UnitState};

/// Command block wrapper and command status wrapper (5.1, 5.2).
const COMMAND_SIGNATURE: &[u8; 4] = b"USBC";
const STATUS_SIGNATURE: &[u8; 4] = b"USBS";
const COMMAND_LEN: usize = 31;
const FAILED: u8 = 1;
/// SCSI commands that the transport answers itself.
const REQUEST_SENSE: u8 = 0x03;
const REPORT_LUNS: u8 = 0xA0;

/// Where a command is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// The next one is waited for.
    #[default]
    Command,
    /// Its data come in.
    Out,
    /// The disk is at work, and no data are asked for.
    Busy,
    /// Its data go out, as soon as the disk has them.
    In,
    /// The status goes out.
    Status,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    configuration: u8,
    phase: Phase,
    tag: u32,
    cdb: [u8; 16],
    /// Bytes that are still to be moved, by the host's count, and those of them that mean nothing.
    left: u32,
    residue: u32,
    status: u8,
    /// What came in, or goes out from `at` on.
    data: Vec<u8>,
    at: u32,
    /// The disk's request, and whether a flush follows it.
    request: Option<u64>,
    fua: bool,
    /// Why the last command failed.
    sense: Sense,
    unit: UnitState,
}

/// A disk in a port.
pub struct Storage {
    unit: Unit,
    serial: String,
    removable: bool,
    high: bool,
    /// Its unit's part is in `unit`.
    s: State,
}

impl Storage {
    pub fn new(config: &PcConfig, spec: &DeviceSpec, high: bool) -> Result<Storage, DeviceError> {
        let unit = Unit::new(config, spec, Vec::new())?;
        let own = |key: &str| spec.properties.get(key).cloned();
        let s = State {
            configuration: 0,
            phase: Phase::Command,
            tag: 0,
            cdb: [0; 16],
            left: 0,
            residue: 0,
            status: 0,
            data: Vec::new(),
            at: 0,
            request: None,
            fua: false,
            sense: (0, 0, 0),
            unit: unit.s.clone(),
        };
        let place = own("port").unwrap_or_default();
        Ok(Storage {
            serial: own("serial")
                .unwrap_or_else(|| format!("1-{}-{place}", spec.id.as_deref().unwrap_or("usb"))),
            removable: own("removable").is_some_and(|v| matches!(v.as_str(), "on" | "yes" | "true" | "1")),
            unit,
            high,
            s,
        })
    }

    /// A bus reset. What the disk does already is done unseen.
    pub fn reset(&mut self) {
        self.unit.reset();
        self.s.configuration = 0;
        self.forget();
    }

    fn forget(&mut self) {
        self.s.phase = Phase::Command;
        self.s.request = None;
        self.s.data = Vec::new();
        self.s.left = 0;
    }

    fn descriptor(&self, kind: u8, index: u8) -> Result<Vec<u8>, Stall> {
        Ok(match (kind, index) {
            // Device: USB 2.0, 64 bytes at endpoint 0, 46f4:0001, three strings, one configuration.
            (1, _) => vec![18, 1, 0, 2, 0, 0, 0, 64, 0xF4, 0x46, 1, 0, 0, 0, 1, 2, 3, 1],
            (2, 0) => {
                let [low, high] = if self.high { 512u16 } else { 64 }.to_le_bytes();
                // Configuration (self-powered), interface of SCSI behind the Bulk-Only Transport, endpoints 1 IN and 2 OUT.
                let mut d = vec![9, 2, 0, 0, 1, 1, 0, 0xC0, 0];
                d.extend([9, 4, 0, 0, 2, 8, 6, 0x50, 0]);
                d.extend([7, 5, 0x81, 2, low, high, 0]);
                d.extend([7, 5, 0x02, 2, low, high, 0]);
                d[2] = d.len() as u8;
                d
            }
            (3, 0) => vec![4, 3, 0x09, 0x04],
            (3, n) => {
                let text = match n {
                    1 => "QEMU",
                    2 => "QEMU USB HARDDRIVE",
                    3 => &self.serial,
                    _ => return Err(Stall),
                };
                string_descriptor(text)
            }
            // What it would be at the other speed.
            (6, _) if self.high => vec![10, 6, 0, 2, 0, 0, 0, 64, 1, 0],
            _ => return Err(Stall),
        })
    }

    /// A request to endpoint 0 (USB 2.0, 9.4, and 3 of the transport).
    pub fn control(&mut self, setup: [u8; 8]) -> Result<Vec<u8>, Stall> {
        let [kind, request, low, high, ..] = setup;
        let mut reply = match (kind, request) {
            (0x80, 0) => vec![1, 0],
            (0x00, 1 | 3) => Vec::new(),
            (0x80, 6) => self.descriptor(high, low)?,
            // Bulk-Only Mass Storage Reset, Get Max LUN.
            (0x21, 0xFF) => {
                self.forget();
                Vec::new()
            }
            (0xA1, 0xFE) => vec![0],
            _ => standard_request(setup, &mut self.s.configuration).ok_or(Stall)?,
        };
        reply.truncate(usize::from(u16::from_le_bytes([setup[6], setup[7]])));
        Ok(reply)
    }

    /// Bytes that the host sends.
    pub fn send(&mut self, ctx: &mut Ctx, data: &[u8]) -> Answer {
        match self.s.phase {
            Phase::Command => self.command(ctx, data),
            Phase::Out => {
                let n = data.len().min(self.s.left as usize);
                self.s.data.extend_from_slice(&data[..n]);
                self.s.left -= n as u32;
                if self.s.left == 0 {
                    self.execute(ctx, false, self.s.data.len() as u32);
                }
                Answer::Done(Vec::new())
            }
            Phase::Busy => Answer::Nak,
            // The host is out of step: it will reset the transport.
            Phase::In | Phase::Status => Answer::Stall,
        }
    }

    fn command(&mut self, ctx: &mut Ctx, block: &[u8]) -> Answer {
        let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let valid = block.len() == COMMAND_LEN && block.starts_with(COMMAND_SIGNATURE);
        if !valid || block[13] & 15 != 0 || !(1..=16).contains(&(block[14] & 31)) {
            return Answer::Stall;
        }
        let (len, reads) = (word(8), block[12] & 0x80 != 0);
        if !reads && u64::from(len) > scsi::MAX_DATA {
            return Answer::Stall;
        }
        let n = usize::from(block[14] & 31);
        self.s.cdb = [0; 16];
        self.s.cdb[..n].copy_from_slice(&block[15..15 + n]);
        (self.s.tag, self.s.left, self.s.residue) = (word(4), len, 0);
        (self.s.data, self.s.at) = (Vec::new(), 0);
        if len > 0 && !reads {
            self.s.phase = Phase::Out;
        } else {
            self.execute(ctx, reads, len);
        }
        Answer::Done(Vec::new())
    }

    /// Carry the command out; its data, if they go to the disk, are there.
    fn execute(&mut self, ctx: &mut Ctx, reads: bool, len: u32) {
        let mut cdb = [0; 32];
        cdb[..16].copy_from_slice(&self.s.cdb);
        let (sent, wanted) = if reads { (0, len) } else { (len, 0) };
        let act = match cdb[0] {
            REQUEST_SENSE => {
                let mut bytes = sense_bytes(std::mem::take(&mut self.s.sense)).to_vec();
                bytes.truncate(cdb[4].into());
                Act::Data(bytes)
            }
            REPORT_LUNS => {
                // One, number 0.
                let mut list = vec![0, 0, 0, 8];
                list.resize(16, 0);
                Act::Data(list)
            }
            _ => {
                let data = &self.s.data;
                let some = |n: usize| data[..n.min(data.len())].to_vec();
                self.unit.execute(&cdb, sent.into(), wanted.into(), some)
            }
        };
        self.s.left = wanted;
        self.s.status = 0;
        match act {
            Act::Data(mut data) => {
                if cdb[0] == 0x12 && cdb[1] & 1 == 0 && self.removable {
                    if let Some(flags) = data.get_mut(1) {
                        *flags |= 0x80;
                    }
                }
                self.answer(data);
            }
            Act::Check(sense) => self.fail(sense),
            Act::Tray(_) => self.answer(Vec::new()),
            Act::Disk { op, fua } => {
                let changes = !matches!(op, DiskOp::Read { .. } | DiskOp::Flush);
                self.s.fua = changes && (fua || self.unit.writes_through());
                self.s.data = Vec::new();
                self.s.request = Some(ctx.disk(self.unit.s.drive, op));
                self.s.phase = if wanted > 0 { Phase::In } else { Phase::Busy };
            }
        }
    }

    fn fail(&mut self, sense: Sense) {
        (self.s.sense, self.s.status) = (sense, FAILED);
        self.answer(Vec::new());
    }

    /// The command is done, with these bytes for the host; what it asked for besides is filled up with zeros (6.7.2).
    fn answer(&mut self, mut data: Vec<u8>) {
        data.truncate(self.s.left as usize);
        self.s.residue = self.s.left - data.len() as u32;
        (self.s.data, self.s.at) = (data, 0);
        self.s.phase = if self.s.left > 0 { Phase::In } else { Phase::Status };
    }

    /// At most `len` bytes for the host.
    pub fn receive(&mut self, len: usize) -> Answer {
        match self.s.phase {
            Phase::In if self.s.request.is_none() => {
                let n = len.min(self.s.left as usize);
                let rest = self.s.data.get(self.s.at as usize..).unwrap_or_default();
                let mut out = rest[..rest.len().min(n)].to_vec();
                out.resize(n, 0);
                self.s.at += n as u32;
                self.s.left -= n as u32;
                if self.s.left == 0 {
                    self.s.phase = Phase::Status;
                    self.s.data = Vec::new();
                }
                Answer::Done(out)
            }
            Phase::Status => {
                let mut out = STATUS_SIGNATURE.to_vec();
                out.extend(self.s.tag.to_le_bytes());
                out.extend(self.s.residue.to_le_bytes());
                out.push(self.s.status);
                self.s.phase = Phase::Command;
                out.truncate(len);
                Answer::Done(out)
            }
            Phase::Command | Phase::Out | Phase::Busy | Phase::In => Answer::Nak,
        }
    }

    /// A disk request ended; whether it was this one's.
    pub fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: &DiskOp, result: &Result<&[u8], i32>) -> bool {
        if self.s.request != Some(id) {
            return false;
        }
        if self.s.fua && result.is_ok() {
            self.s.fua = false;
            self.s.request = Some(ctx.disk(self.unit.s.drive, DiskOp::Flush));
            return false;
        }
        self.s.request = None;
        match (op, result) {
            (DiskOp::Read { len, .. }, Ok(data)) if data.len() == *len as usize => self.answer(data.to_vec()),
            (DiskOp::Read { .. }, Ok(_)) | (_, Err(_)) => self.fail(scsi::MEDIUM_ERROR),
            _ => self.answer(Vec::new()),
        }
        true
    }

    /// The disk changes.
    pub fn input(&mut self, input: &Input) {
        match input {
            Input::DriveResized { drive, size } if *drive == self.unit.s.drive => self.unit.resized(*size),
            Input::Medium { device, open, medium } if *device == self.unit.device => {
                self.unit.change_medium(*open, *medium);
            }
            _ => {}
        }
    }

    pub fn save(&self) -> Vec<u8> {
        pack(&State { unit: self.unit.s.clone(), ..self.s.clone() })
    }

    /// Restore what [`Self::save`] returned.
    #[must_use]
    pub fn load(&mut self, data: &[u8]) -> bool {
        let Ok(s) = postcard::from_bytes::<State>(data) else { return false };
        let fits = s.unit.place == self.unit.s.place && s.data.len() as u64 <= scsi::MAX_DATA;
        if fits {
            self.unit.s = s.unit.clone();
            self.s = s;
        }
        fits
    }
}
