//! SCSI logical units (SPC-3, SBC-3): `scsi-hd` and `scsi-cd`, whatever controller they are behind.

pub mod mmc;

use serde::{Deserialize, Serialize};

use crate::config::{DeviceSpec, DriveSpec, PcConfig};
use crate::ctx::DeviceError;
use crate::door::DiskOp;
use crate::pci::Place;
use crate::registry::{self, base_name, Build};

/// Bytes of data in one request at most.
pub const MAX_DATA: u64 = 32 << 20;
/// Blocks of 512 bytes that one UNMAP or WRITE SAME may name.
const MAX_SECTORS: u64 = 0x3F_FFFF;

/// Sense key, additional sense code and its qualifier (SPC-3, 4.5.6).
pub type Sense = (u8, u8, u8);
pub const LUN_NOT_SUPPORTED: Sense = (5, 0x25, 0);
pub const MEDIUM_ERROR: Sense = (3, 0x0C, 0);
const NO_MEDIUM: Sense = (2, 0x3A, 0);
const INVALID_OPCODE: Sense = (5, 0x20, 0);
const OUT_OF_RANGE: Sense = (5, 0x21, 0);
const INVALID_FIELD: Sense = (5, 0x24, 0);
const SAVING_PARAMETERS: Sense = (5, 0x39, 0);
const WRITE_PROTECTED: Sense = (7, 0x27, 0);
const REMOVAL_PREVENTED: Sense = (5, 0x53, 2);
pub const CAPACITY_CHANGED: Sense = (6, 0x2A, 9);
const MEDIUM_CHANGED: Sense = (6, 0x28, 0);

/// Sense data of fixed format (SPC-3, 4.5.3).
pub fn sense_bytes((key, code, qualifier): Sense) -> [u8; 18] {
    let mut s = [0; 18];
    (s[0], s[2], s[7], s[12], s[13]) = (0x70, key, 10, code, qualifier);
    s
}

/// What a command comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Act {
    /// GOOD, with these bytes for the initiator.
    Data(Vec<u8>),
    /// CHECK CONDITION.
    Check(Sense),
    /// A request of the drive; `fua`: it ends when it is on stable storage.
    Disk { op: DiskOp, fua: bool },
    /// The guest moves the tray: whether it is open now.
    Tray(bool),
}

/// What of a unit changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnitState {
    /// Target and logical unit.
    pub place: (u8, u16),
    /// The drive's number; a CD drive's is that of its medium.
    pub drive: u32,
    pub bytes: u64,
    write_back: bool,
    attention: Option<Sense>,
    pub open: bool,
    locked: bool,
}

/// A logical unit.
pub struct Unit {
    pub target: u8,
    pub lun: u16,
    /// The id of the device.
    pub device: String,
    cdrom: bool,
    read_only: bool,
    block: u64,
    device_id: String,
    serial: String,
    wwn: u64,
    vendor: String,
    product: String,
    version: String,
    rotation: u16,
    pub s: UnitState,
}

fn be16(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]))
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from(be16(b, at)) << 16 | u32::from(be16(b, at + 2))
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

/// Text in a field of blanks.
fn padded(text: &str, len: usize) -> Vec<u8> {
    let mut out: Vec<u8> = text.bytes().take(len).collect();
    out.resize(len, b' ');
    out
}

/// The bus that a SCSI controller gives: `ID.0`, or `scsi.N` of the Nth one without an id.
fn bus_name(config: &PcConfig, controller: &DeviceSpec) -> String {
    if let Some(id) = &controller.id {
        return format!("{id}.0");
    }
    let before = config.devices.iter().take_while(|d| *d != controller);
    format!("scsi.{}", before.filter(|d| is_controller(d) && d.id.is_none()).count())
}

fn is_controller(spec: &DeviceSpec) -> bool {
    base_name(&spec.driver) == "virtio-scsi-pci"
}

/// The controller that a SCSI device is plugged into: the one it names, or the first.
pub fn controller<'a>(config: &'a PcConfig, spec: &DeviceSpec) -> Option<&'a DeviceSpec> {
    let named = spec.properties.get("bus");
    config
        .devices
        .iter()
        .filter(|d| is_controller(d))
        .find(|d| named.is_none_or(|n| *n == bus_name(config, d)))
}

/// The units behind a controller, each with the device that it is.
pub fn units<'a>(config: &'a PcConfig, own: &DeviceSpec) -> Result<Vec<(&'a DeviceSpec, Unit)>, DeviceError> {
    let mut units: Vec<(&DeviceSpec, Unit)> = Vec::new();
    for spec in &config.devices {
        let is_scsi = matches!(spec.driver.as_str(), "scsi-hd" | "scsi-cd");
        if is_scsi && controller(config, spec) == Some(own) {
            let unit = Unit::new(config, spec, units.iter().map(|(_, u)| (u.target, u.lun)).collect())?;
            units.push((spec, unit));
        }
    }
    Ok(units)
}

impl Unit {
    /// A unit as `spec` says, beside those at the places `others`.
    pub(crate) fn new(
        config: &PcConfig,
        spec: &DeviceSpec,
        others: Vec<(u8, u16)>,
    ) -> Result<Unit, DeviceError> {
        let model = registry::model(&spec.driver)?;
        model.check(spec)?;
        let b = Build { config, spec, devfn: 0, place: Place::default() };
        let on_usb = spec.driver == "usb-storage";
        let cdrom = spec.driver == "scsi-cd" || on_usb && b.drive()?.cdrom;
        let drive = match (cdrom, spec.drive) {
            // A CD drive may be empty.
            (true, None) => DriveSpec { index: u32::MAX, read_only: true, ..DriveSpec::default() },
            _ => b.drive()?,
        };
        let wrong = |text: String| Err(DeviceError::Config(text));
        if b.number("channel", 0)? != 0 {
            return wrong("bad scsi channel id: only channel 0 is there".into());
        }
        let taken = |t: u64, l: u64| others.iter().any(|o| (u64::from(o.0), u64::from(o.1)) == (t, l));
        let lun = b.number("lun", 0)?;
        let target = match b.text("scsi-id") {
            Some(_) => b.number("scsi-id", 0)?,
            None => (0..256)
                .find(|t| !taken(*t, lun))
                .ok_or_else(|| DeviceError::Config("no free target".into()))?,
        };
        if target > 255 || lun > 16383 {
            return wrong(format!("bad scsi device id: {target}, lun {lun}"));
        }
        if taken(target, lun) {
            return wrong(format!("lun already used by '{target}:{lun}'"));
        }
        let own = |key: &str, default: &str| b.text(key).unwrap_or(default).to_owned();
        let serial = drive.serial.clone();
        let id = spec.id.clone().unwrap_or_else(|| format!("scsi0-0-{target}-{lun}"));
        Ok(Unit {
            target: target as u8,
            lun: lun as u16,
            cdrom,
            read_only: drive.read_only || cdrom,
            block: if cdrom { 2048 } else { u64::from(drive.logical_block_size.max(512)) },
            device_id: own("device_id", if serial.is_empty() { &id } else { &serial }),
            device: id,
            serial,
            wwn: b.number("wwn", 0)?,
            vendor: own("vendor", "QEMU"),
            product: own("product", if cdrom { "QEMU CD-ROM" } else { "QEMU HARDDISK" }),
            version: own("ver", "2.5+"),
            rotation: b.number("rotation_rate", 0)? as u16,
            s: UnitState {
                place: (target as u8, lun as u16),
                drive: drive.index,
                bytes: drive.size_bytes,
                write_back: b.flag("write-cache", true),
                attention: None,
                open: false,
                locked: false,
            },
        })
    }

    /// Move it to another target.
    pub fn move_to(&mut self, target: u8) {
        self.target = target;
        self.s.place.0 = target;
    }

    fn blocks(&self) -> Option<u64> {
        let blocks = self.s.bytes / self.block;
        (!self.cdrom || !self.s.open && blocks > 0).then_some(blocks)
    }

    /// Whether every write is to be on stable storage before it ends.
    pub fn writes_through(&self) -> bool {
        !self.s.write_back
    }

    /// As after power on.
    pub fn reset(&mut self) {
        (self.s.attention, self.s.locked) = (None, false);
    }

    /// The drive has another size.
    pub fn resized(&mut self, bytes: u64) {
        self.s.bytes = bytes;
        self.s.attention = Some(CAPACITY_CHANGED);
    }

    /// The tray was moved, or another medium put in.
    pub fn change_medium(&mut self, open: bool, medium: Option<(u32, u64)>) {
        let (drive, bytes) = medium.unwrap_or((u32::MAX, 0));
        self.s.open = open;
        if (drive, bytes) != (self.s.drive, self.s.bytes) {
            (self.s.drive, self.s.bytes) = (drive, bytes);
            self.s.attention = Some(MEDIUM_CHANGED);
        }
    }

    /// Carry out a command; `data` gets what the initiator sends, up to so many bytes. `sent` and `wanted` are the bytes
    /// that it sends and has room for.
    pub fn execute(&mut self, cdb: &[u8], sent: u64, wanted: u64, data: impl Fn(usize) -> Vec<u8>) -> Act {
        let op = cdb[0];
        if !matches!(op, 0x03 | 0x12 | 0xA0) {
            if let Some(attention) = self.s.attention.take() {
                return Act::Check(attention);
            }
        }
        match op {
            0x00 | 0x35 | 0x91 if self.blocks().is_none() => Act::Check(NO_MEDIUM),
            0x00 => Act::Data(Vec::new()),
            0x03 => Act::Data(limit(sense_bytes((0, 0, 0)).to_vec(), u64::from(cdb[4]))),
            0x12 => self.inquiry(cdb),
            0x15 | 0x55 => self.mode_select(cdb, &data),
            0x16 | 0x17 | 0x56 | 0x57 => Act::Data(Vec::new()),
            0x1A => self.mode_sense(cdb, u64::from(cdb[4]), false),
            0x5A => self.mode_sense(cdb, u64::from(be16(cdb, 7)), true),
            0x1B => self.start_stop(cdb),
            0x1E => {
                self.s.locked = cdb[4] & 1 != 0;
                Act::Data(Vec::new())
            }
            0x25 | 0x9E if self.blocks().is_none() => Act::Check(NO_MEDIUM),
            0x25 => {
                let last = self.blocks().unwrap_or(1).saturating_sub(1).min(0xFFFF_FFFF) as u32;
                let mut r = last.to_be_bytes().to_vec();
                r.extend((self.block as u32).to_be_bytes());
                Act::Data(r)
            }
            0x9E if cdb[1] & 0x1F == 0x10 => self.capacity16(cdb),
            0x35 | 0x91 => Act::Disk { op: DiskOp::Flush, fua: false },
            0x08 | 0x28 | 0xA8 | 0x88 => match self.range(cdb) {
                Ok((_, 0)) => Act::Data(Vec::new()),
                Ok((offset, len)) if len <= MAX_DATA && len <= wanted => {
                    Act::Disk { op: DiskOp::Read { offset, len: len as u32 }, fua: false }
                }
                Ok(_) => Act::Check(INVALID_FIELD),
                Err(sense) => Act::Check(sense),
            },
            0x0A | 0x2A | 0xAA | 0x8A | 0x2E | 0xAE | 0x8E => match self.range(cdb) {
                _ if self.read_only => Act::Check(WRITE_PROTECTED),
                Ok((_, 0)) => Act::Data(Vec::new()),
                Ok((offset, len)) if len <= MAX_DATA && len <= sent => {
                    let data = data(len as usize);
                    // WRITE(6) has no FUA bit; what WRITE AND VERIFY writes is to be there.
                    let fua = op != 0x0A && cdb[1] & 8 != 0 || matches!(op, 0x2E | 0xAE | 0x8E);
                    Act::Disk { op: DiskOp::Write { offset, data }, fua }
                }
                Ok(_) => Act::Check(INVALID_FIELD),
                Err(sense) => Act::Check(sense),
            },
            0x2F | 0xAF | 0x8F => match self.range(cdb) {
                Ok(_) if cdb[1] & 6 == 0 => Act::Data(Vec::new()),
                Ok(_) => Act::Check(INVALID_FIELD),
                Err(sense) => Act::Check(sense),
            },
            0x41 | 0x93 if !self.cdrom => self.write_same(cdb, &data),
            0x42 if !self.cdrom => self.unmap(cdb, &data),
            0x43 | 0x46 | 0x4A | 0x51 | 0xBD if self.cdrom => {
                let allowed = u64::from(be16(cdb, if op == 0xBD { 8 } else { 7 }));
                match mmc::command(cdb, self.blocks()) {
                    Ok(r) => Act::Data(limit(r, allowed)),
                    Err(sense) => Act::Check(sense),
                }
            }
            _ => Act::Check(INVALID_OPCODE),
        }
    }

    /// Byte offset and length of a command's blocks.
    fn range(&self, cdb: &[u8]) -> Result<(u64, u64), Sense> {
        let (lba, count) = match cdb[0] >> 5 {
            0 => {
                let lba = u64::from(be32(cdb, 0) & 0x1F_FFFF);
                (lba, if cdb[4] == 0 { 256 } else { u64::from(cdb[4]) })
            }
            1 | 2 => (u64::from(be32(cdb, 2)), u64::from(be16(cdb, 7))),
            4 => (be64(cdb, 2), u64::from(be32(cdb, 10))),
            _ => (u64::from(be32(cdb, 2)), u64::from(be32(cdb, 6))),
        };
        self.bytes_of(lba, count)
    }

    fn bytes_of(&self, lba: u64, count: u64) -> Result<(u64, u64), Sense> {
        let blocks = self.blocks().ok_or(NO_MEDIUM)?;
        match lba.checked_add(count) {
            Some(end) if end <= blocks => Ok((lba * self.block, count * self.block)),
            _ => Err(OUT_OF_RANGE),
        }
    }

    fn inquiry(&self, cdb: &[u8]) -> Act {
        let kind = if self.cdrom { 5 } else { 0 };
        let allowed = u64::from(be16(cdb, 3));
        if cdb[1] & 1 == 0 {
            if cdb[2] != 0 {
                return Act::Check(INVALID_FIELD);
            }
            // SPC-3, HiSup, 31 bytes follow, command queueing.
            let mut r = vec![kind, if self.cdrom { 0x80 } else { 0 }, 5, 0x12, 31, 0, 0, 0x12];
            r.extend(padded(&self.vendor, 8));
            r.extend(padded(&self.product, 16));
            r.extend(padded(&self.version, 4));
            return Act::Data(limit(r, allowed));
        }
        let body = match cdb[2] {
            0x00 => {
                let mut pages = vec![0x00];
                if !self.serial.is_empty() {
                    pages.push(0x80);
                }
                pages.push(0x83);
                if !self.cdrom {
                    pages.extend([0xB0, 0xB1, 0xB2]);
                }
                pages
            }
            0x80 if !self.serial.is_empty() => padded(&self.serial, self.serial.len().min(36)),
            0x83 => {
                let id: Vec<u8> = self.device_id.bytes().take(255 - 8).collect();
                let mut d = vec![2, 0, 0, id.len() as u8];
                d.extend(id);
                if self.wwn != 0 {
                    d.extend([1, 3, 0, 8]);
                    d.extend(self.wwn.to_be_bytes());
                }
                d
            }
            0xB0 if !self.cdrom => {
                let mut d = vec![0u8; 60];
                let most = (MAX_SECTORS * 512 / self.block) as u32;
                d[4..8].copy_from_slice(&((MAX_DATA / self.block) as u32).to_be_bytes());
                // Blocks in one UNMAP, and descriptors.
                d[16..20].copy_from_slice(&most.to_be_bytes());
                d[20..24].copy_from_slice(&1u32.to_be_bytes());
                d[24..28].copy_from_slice(&1u32.to_be_bytes());
                d[32..40].copy_from_slice(&u64::from(most).to_be_bytes());
                d
            }
            0xB1 if !self.cdrom => {
                let mut d = vec![0u8; 60];
                d[..2].copy_from_slice(&self.rotation.to_be_bytes());
                d
            }
            // UNMAP, WRITE SAME (16) and (10) unmap; thin.
            0xB2 if !self.cdrom => vec![0, 0xE0, 2, 0],
            _ => return Act::Check(INVALID_FIELD),
        };
        let mut r = vec![kind, cdb[2]];
        r.extend((body.len() as u16).to_be_bytes());
        r.extend(body);
        Act::Data(limit(r, allowed))
    }

    fn capacity16(&self, cdb: &[u8]) -> Act {
        let mut r = vec![0u8; 32];
        r[..8].copy_from_slice(&self.blocks().unwrap_or(1).saturating_sub(1).to_be_bytes());
        r[8..12].copy_from_slice(&(self.block as u32).to_be_bytes());
        if !self.cdrom {
            // Thin, and what is unmapped reads as zero only where the image says so: not promised.
            r[14] = 0x80;
        }
        Act::Data(limit(r, u64::from(be32(cdb, 10))))
    }

    fn start_stop(&mut self, cdb: &[u8]) -> Act {
        let open = cdb[4] & 1 == 0;
        if cdb[4] & 2 == 0 || !self.cdrom || self.s.open == open {
            return Act::Data(Vec::new());
        }
        if open && self.s.locked {
            return Act::Check(REMOVAL_PREVENTED);
        }
        self.s.open = open;
        if !open {
            self.s.attention = Some(MEDIUM_CHANGED);
        }
        Act::Tray(open)
    }

    /// A mode page; `changeable`: which of its bits can be set.
    fn page(&self, number: u8, changeable: bool) -> Option<Vec<u8>> {
        let mut p = vec![0u8; 2];
        match number {
            // Errors: automatic reallocation.
            0x01 => {
                p.resize(12, 0);
                if !changeable {
                    p[2] = 0x80;
                }
            }
            // Caching: the write cache.
            0x08 if !self.cdrom => {
                p.resize(20, 0);
                if changeable || self.s.write_back {
                    p[2] = 4;
                }
            }
            0x0E | 0x2A if self.cdrom && !changeable => return mmc::page(number, self.s.locked),
            _ => return None,
        }
        (p[0], p[1]) = (number, p.len() as u8 - 2);
        Some(p)
    }

    fn mode_sense(&self, cdb: &[u8], allowed: u64, long: bool) -> Act {
        let control = cdb[2] >> 6;
        if control == 3 {
            return Act::Check(SAVING_PARAMETERS);
        }
        let number = cdb[2] & 0x3F;
        let wanted: &[u8] = if number == 0x3F { &[0x01, 0x08, 0x0E, 0x2A] } else { &[number] };
        let pages: Vec<Vec<u8>> = wanted.iter().filter_map(|n| self.page(*n, control == 1)).collect();
        if pages.is_empty() {
            return Act::Check(INVALID_FIELD);
        }
        // FUA is understood; write protection.
        let flags = if self.cdrom { 0 } else { 0x10 | if self.read_only { 0x80 } else { 0 } };
        let blocks = self.blocks().unwrap_or(0).min(0xFF_FFFF) as u32;
        let descriptor = cdb[1] & 8 == 0 && !self.cdrom;
        let mut d = Vec::new();
        if descriptor {
            d.extend(blocks.to_be_bytes());
            d.extend((self.block as u32).to_be_bytes());
        }
        let medium = if self.cdrom && self.blocks().is_none() { 0x70 } else { 0 };
        let mut r = match long {
            true => vec![0, 0, medium, flags, 0, 0, 0, d.len() as u8],
            false => vec![0, medium, flags, d.len() as u8],
        };
        r.extend(d);
        r.extend(pages.concat());
        if long {
            let len = (r.len() - 2) as u16;
            r[..2].copy_from_slice(&len.to_be_bytes());
        } else {
            r[0] = (r.len() - 1) as u8;
        }
        Act::Data(limit(r, allowed))
    }

    fn mode_select(&mut self, cdb: &[u8], data: &impl Fn(usize) -> Vec<u8>) -> Act {
        let long = cdb[0] == 0x55;
        let len = if long { usize::from(be16(cdb, 7)) } else { usize::from(cdb[4]) };
        let list = data(len);
        if cdb[1] & 0x11 != 0x10 && len > 0 {
            return Act::Check(INVALID_FIELD);
        }
        let (header, descriptors) = match long {
            true => (8, usize::from(be16(&list, 6))),
            false => (4, usize::from(list.get(3).copied().unwrap_or(0))),
        };
        let mut at = header + descriptors;
        while let [number, size, ..] = list.get(at..).unwrap_or_default() {
            let (number, end) = (number & 0x3F, at + 2 + usize::from(*size));
            let Some(page) = list.get(at..end) else { return Act::Check((5, 0x1A, 0)) };
            match number {
                0x08 if !self.cdrom && page.len() >= 3 => self.s.write_back = page[2] & 4 != 0,
                _ if self.page(number, false).is_some_and(|p| p == page) => {}
                _ => return Act::Check((5, 0x26, 0)),
            }
            at = end;
        }
        Act::Data(Vec::new())
    }

    fn write_same(&self, cdb: &[u8], data: &impl Fn(usize) -> Vec<u8>) -> Act {
        let (lba, count) = match cdb[0] {
            0x41 => (u64::from(be32(cdb, 2)), u64::from(be16(cdb, 7))),
            _ => (be64(cdb, 2), u64::from(be32(cdb, 10))),
        };
        if self.read_only {
            return Act::Check(WRITE_PROTECTED);
        }
        // Neither anchors nor patterns made by the unit; no count means to the end, which is too much.
        if cdb[1] & 0x16 != 0 || count == 0 || count * self.block > MAX_SECTORS * 512 {
            return Act::Check(INVALID_FIELD);
        }
        let (offset, len) = match self.bytes_of(lba, count) {
            Ok(range) => range,
            Err(sense) => return Act::Check(sense),
        };
        let no_data = cdb[0] == 0x93 && cdb[1] & 1 != 0;
        let block = if no_data { Vec::new() } else { data(self.block as usize) };
        if !no_data && block.len() as u64 != self.block {
            return Act::Check(INVALID_FIELD);
        }
        if block.iter().all(|b| *b == 0) {
            let op = DiskOp::WriteZeroes { offset, len, may_unmap: cdb[1] & 8 != 0 };
            return Act::Disk { op, fua: false };
        }
        if len > 1 << 20 {
            return Act::Check(INVALID_FIELD);
        }
        Act::Disk { op: DiskOp::Write { offset, data: block.repeat(count as usize) }, fua: false }
    }

    fn unmap(&self, cdb: &[u8], data: &impl Fn(usize) -> Vec<u8>) -> Act {
        if self.read_only {
            return Act::Check(WRITE_PROTECTED);
        }
        let list = data(usize::from(be16(cdb, 7)).min(24));
        let described = usize::from(be16(&list, 2));
        if cdb[1] & 1 != 0 || described > 16 {
            return Act::Check(INVALID_FIELD);
        }
        if described < 16 || list.len() < 24 {
            return Act::Data(Vec::new());
        }
        let count = u64::from(be32(&list, 16));
        if count * self.block > MAX_SECTORS * 512 {
            return Act::Check(INVALID_FIELD);
        }
        match self.bytes_of(be64(&list, 8), count) {
            Ok((_, 0)) => Act::Data(Vec::new()),
            Ok((offset, len)) => Act::Disk { op: DiskOp::Discard { offset, len }, fua: false },
            Err(sense) => Act::Check(sense),
        }
    }
}

/// No more than the initiator allows.
fn limit(mut data: Vec<u8>, allowed: u64) -> Vec<u8> {
    data.truncate(allowed as usize);
    data
}
