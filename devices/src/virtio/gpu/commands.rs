//! The commands of both queues (5.7.6.7 and 5.7.6.8).

use super::super::Piece;
use super::resource::{Format, Resource, MAX_PIECES};
use super::{Cursor, Gpu, Rect, MAX_OUTPUTS, POINTER};
use crate::ctx::Ctx;
use crate::display::{edid, Pointer};

const GET_DISPLAY_INFO: u32 = 0x100;
const RESOURCE_CREATE_2D: u32 = 0x101;
const RESOURCE_UNREF: u32 = 0x102;
const SET_SCANOUT: u32 = 0x103;
const RESOURCE_FLUSH: u32 = 0x104;
const TRANSFER_TO_HOST_2D: u32 = 0x105;
const RESOURCE_ATTACH_BACKING: u32 = 0x106;
const RESOURCE_DETACH_BACKING: u32 = 0x107;
const GET_EDID: u32 = 0x10A;
const UPDATE_CURSOR: u32 = 0x300;
const MOVE_CURSOR: u32 = 0x301;

const OK: u32 = 0x1100;
const OK_DISPLAY_INFO: u32 = 0x1101;
const OK_EDID: u32 = 0x1104;
/// The answer has a fence: everything is done when it is given.
const FENCE: u32 = 1;
/// Bytes in front of each command and answer.
const HEADER: usize = 24;
/// Room for a description of a monitor.
const EDID_ROOM: usize = 1024;
/// The smallest part of a picture that can be shown, each way.
const MIN_SHOWN: u32 = 16;
/// Pictures, and pieces of guest memory of all of them. Real drivers have a few, of some ten thousand pieces.
const MAX_RESOURCES: usize = 16_384;
const MAX_ALL_PIECES: usize = 1 << 20;

/// Why a command was not done: the type of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Refusal {
    Unspecified = 0x1200,
    OutOfMemory = 0x1201,
    ScanoutId = 0x1202,
    ResourceId = 0x1203,
    Parameter = 0x1205,
}

/// The fields of a command, read one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn word(&mut self) -> Result<u32, Refusal> {
        let (now, later) = self.0.split_first_chunk().ok_or(Refusal::Unspecified)?;
        self.0 = later;
        Ok(u32::from_le_bytes(*now))
    }
    fn long(&mut self) -> Result<u64, Refusal> {
        Ok(u64::from(self.word()?) | u64::from(self.word()?) << 32)
    }
    fn rect(&mut self) -> Result<Rect, Refusal> {
        Ok(Rect { x: self.word()?, y: self.word()?, width: self.word()?, height: self.word()? })
    }
}

impl Gpu {
    /// Do a command of the control queue; the answer.
    pub(super) fn command(&mut self, ctx: &Ctx, command: &[u8]) -> Vec<u8> {
        let mut f = Fields(command.get(HEADER..).unwrap_or_default());
        let word =
            |at: usize| command.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let (kind, body) = match self.execute(ctx, word(0), &mut f) {
            Ok(done) => done,
            Err(refusal) => (refusal as u32, Vec::new()),
        };
        let mut answer = kind.to_le_bytes().to_vec();
        answer.resize(HEADER, 0);
        if word(4) & FENCE != 0 && command.len() >= HEADER {
            answer[4] = FENCE as u8;
            // The fence's number and its context.
            answer[8..20].copy_from_slice(&command[8..20]);
        }
        answer.extend(body);
        answer
    }

    fn execute(&mut self, ctx: &Ctx, kind: u32, f: &mut Fields) -> Result<(u32, Vec<u8>), Refusal> {
        match kind {
            GET_DISPLAY_INFO => return Ok((OK_DISPLAY_INFO, self.display_info())),
            GET_EDID if self.edid => return Ok((OK_EDID, self.monitor_description(f.word()?)?)),
            RESOURCE_CREATE_2D => self.create(f)?,
            RESOURCE_UNREF => {
                let id = f.word()?;
                self.s.resources.remove(&id).ok_or(Refusal::ResourceId)?;
                self.s
                    .heads
                    .iter_mut()
                    .filter(|h| h.shown.is_some_and(|(r, _)| r == id))
                    .for_each(|h| h.shown = None);
                self.changes += 1;
            }
            SET_SCANOUT => self.set_scanout(f)?,
            RESOURCE_FLUSH => {
                let rect = f.rect()?;
                if !self.resource(f.word()?)?.has(rect) {
                    return Err(Refusal::Parameter);
                }
                self.changes += 1;
            }
            TRANSFER_TO_HOST_2D => {
                let (rect, offset) = (f.rect()?, f.long()?);
                let resource = self.resource(f.word()?)?;
                if resource.pieces() == 0 {
                    return Err(Refusal::ResourceId);
                }
                if !resource.has(rect) {
                    return Err(Refusal::Parameter);
                }
                if !resource.transfer(ctx, rect, offset) {
                    return Err(Refusal::OutOfMemory);
                }
            }
            RESOURCE_ATTACH_BACKING => self.attach(f)?,
            RESOURCE_DETACH_BACKING => {
                let resource = self.resource(f.word()?)?;
                if resource.pieces() == 0 {
                    return Err(Refusal::ResourceId);
                }
                resource.attach(Vec::new());
            }
            _ => return Err(Refusal::Unspecified),
        }
        Ok((OK, Vec::new()))
    }

    fn resource(&mut self, id: u32) -> Result<&mut Resource, Refusal> {
        self.s.resources.get_mut(&id).ok_or(Refusal::ResourceId)
    }

    fn display_info(&self) -> Vec<u8> {
        // For each output that there can be: a rectangle, whether there is a monitor, flags.
        let mut out = Vec::new();
        for head in self.s.heads.iter() {
            let (width, height) = head.monitor.unwrap_or_default();
            let words = [0, 0, width, height, head.monitor.is_some().into(), 0];
            out.extend(words.iter().flat_map(|w: &u32| w.to_le_bytes()));
        }
        out.resize(24 * MAX_OUTPUTS as usize, 0);
        out
    }

    fn monitor_description(&self, head: u32) -> Result<Vec<u8>, Refusal> {
        let head = self.s.heads.get(head as usize).ok_or(Refusal::Parameter)?;
        let (width, height) = head.monitor.unwrap_or((1024, 768));
        let mut out = (edid::SIZE as u32).to_le_bytes().to_vec();
        out.extend([0; 4]);
        out.extend(edid::describe(width, height));
        out.resize(8 + EDID_ROOM, 0);
        Ok(out)
    }

    fn create(&mut self, f: &mut Fields) -> Result<(), Refusal> {
        let (id, format, width, height) = (f.word()?, f.word()?, f.word()?, f.word()?);
        if id == 0 || self.s.resources.contains_key(&id) {
            return Err(Refusal::ResourceId);
        }
        let format = Format::of(format).filter(|_| width > 0 && height > 0).ok_or(Refusal::Parameter)?;
        let new = Resource::new(format, width, height);
        let used: u64 = self.s.resources.values().map(Resource::bytes).sum();
        if new.bytes() >= self.max_memory.saturating_sub(used) || self.s.resources.len() >= MAX_RESOURCES {
            return Err(Refusal::OutOfMemory);
        }
        self.s.resources.insert(id, new);
        Ok(())
    }

    fn attach(&mut self, f: &mut Fields) -> Result<(), Refusal> {
        let (id, entries) = (f.word()?, f.word()? as usize);
        let all: usize = self.s.resources.values().map(Resource::pieces).sum();
        let resource = self.resource(id)?;
        if resource.pieces() > 0 || entries > MAX_PIECES {
            return Err(Refusal::Unspecified);
        }
        if all + entries > MAX_ALL_PIECES {
            return Err(Refusal::OutOfMemory);
        }
        let mut backing = Vec::with_capacity(entries);
        for _ in 0..entries {
            let piece = Piece { addr: f.long()?, len: f.word()? };
            f.word()?;
            backing.push(piece);
        }
        resource.attach(backing);
        Ok(())
    }

    fn set_scanout(&mut self, f: &mut Fields) -> Result<(), Refusal> {
        let (rect, head, id) = (f.rect()?, f.word()? as usize, f.word()?);
        if head >= self.s.heads.len() {
            return Err(Refusal::ScanoutId);
        }
        let mut shown = None;
        if id != 0 {
            let fits = self.resource(id)?.has(rect) && rect.width >= MIN_SHOWN && rect.height >= MIN_SHOWN;
            if !fits {
                return Err(Refusal::Parameter);
            }
            shown = Some((id, rect));
        }
        self.s.heads[head].shown = shown;
        self.s.used = true;
        self.changes += 1;
        Ok(())
    }

    /// Do a command of the cursor's queue, which has no answers.
    pub(super) fn cursor_command(&mut self, command: &[u8]) {
        let mut kind = Fields(command);
        let mut f = Fields(command.get(HEADER..).unwrap_or_default());
        let mut word = || f.word().ok();
        let (Ok(kind), Some(head), Some(x), Some(y), Some(_), Some(resource), Some(hot_x), Some(hot_y)) =
            (kind.word(), word(), word(), word(), word(), word(), word(), word())
        else {
            return;
        };
        let Some(head) = self.s.heads.get_mut(head as usize) else { return };
        match kind {
            UPDATE_CURSOR => {
                let picture = self.s.resources.get(&resource).and_then(|r| r.pointer(POINTER, POINTER));
                let hot = (hot_x.min(POINTER - 1), hot_y.min(POINTER - 1));
                let shape = picture.map(|pixels| Pointer { width: POINTER, height: POINTER, hot, pixels });
                head.cursor = Cursor { x, y, shape };
                self.changes += 1;
            }
            MOVE_CURSOR => (head.cursor.x, head.cursor.y) = (x, y),
            _ => {}
        }
    }
}
