//! The graphics card (section 5.7), in two dimensions: the driver keeps pictures in guest memory, has them copied here, and
//! says which of them a monitor shows.

mod commands;
mod resource;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{gather, scatter, total, Io, Model};
use crate::ctx::{pack, DeviceError};
use crate::display::{Picture, Pointer, Screen};
use crate::door::Input;
use crate::registry::Build;
use resource::Resource;

const F_EDID: u64 = 1 << 1;
/// Outputs at most (5.7.6.8, GET_DISPLAY_INFO's answer).
const MAX_OUTPUTS: u64 = 16;
/// The queue of commands; the other one is the cursor's.
const CONTROL: usize = 0;
/// `events_read`: the monitors are others.
const EVENT_DISPLAY: u32 = 1;
/// Bytes of a command at most: one with 16384 pieces of memory.
const MAX_COMMAND: usize = 24 + 8 + 16 * resource::MAX_PIECES;
/// What is shown before the driver shows something.
const BLANK: (u32, u32) = (640, 480);
/// The longest side of a monitor.
const MAX_SIDE: u32 = 16_384;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Rect {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
}

impl Rect {
    /// Whether all of it lies in a picture of this size.
    fn is_in(&self, width: u32, height: u32) -> bool {
        u64::from(self.x) + u64::from(self.width) <= u64::from(width)
            && u64::from(self.y) + u64::from(self.height) <= u64::from(height)
    }
}

/// The pointer on a monitor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    x: u32,
    y: u32,
    /// The point of its picture that is at this place, and the picture; none: it is hidden.
    shape: Option<Pointer>,
}

/// Pixels of a pointer's picture, each way.
const POINTER: u32 = 64;

/// An output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// The size of its monitor; none: it has none.
    monitor: Option<(u32, u32)>,
    /// What of which resource it shows.
    shown: Option<(u32, Rect)>,
    cursor: Cursor,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    /// `events_read` of the configuration.
    events: u32,
    heads: Vec<Head>,
    /// The driver has shown something since the last reset.
    used: bool,
    resources: BTreeMap<u32, Resource>,
}

/// The card.
pub struct Gpu {
    edid: bool,
    /// Bytes of pictures at most.
    max_memory: u64,
    s: State,
    changes: u64,
}

impl Gpu {
    /// The card that a `-device` names.
    pub fn new(b: &Build) -> Result<Gpu, DeviceError> {
        let outputs = b.number("max_outputs", 1)?;
        if !(1..=MAX_OUTPUTS).contains(&outputs) {
            return Err(DeviceError::Config(format!("invalid max_outputs > {MAX_OUTPUTS} or 0: {outputs}")));
        }
        if b.flag("blob", false) {
            return Err(DeviceError::Config(format!(
                "{}: blob resources are not available: only blob=off is possible",
                b.spec.driver
            )));
        }
        let side = |property: &str, default: u64| {
            let size = b.number(property, default)?;
            match u32::try_from(size) {
                Ok(n @ 16..=MAX_SIDE) => Ok(n),
                _ => Err(b.bad(property)),
            }
        };
        let mut heads = vec![Head::default(); outputs as usize];
        heads[0].monitor = Some((side("xres", 1280)?, side("yres", 800)?));
        Ok(Gpu {
            edid: b.flag("edid", true),
            max_memory: b.size("max_hostmem", 256 << 20)?,
            s: State { heads, ..State::default() },
            // No number that a VGA on the same card comes to.
            changes: 1 << 63,
        })
    }

    /// What a head shows; none: nothing.
    fn shown(&self, head: &Head) -> Option<Picture> {
        let (resource, rect) = head.shown?;
        Some(self.s.resources.get(&resource)?.picture(rect))
    }
}

impl Model for Gpu {
    fn kind(&self) -> u16 {
        16
    }
    fn class(&self) -> u32 {
        0x03_8000
    }
    fn features(&self) -> u64 {
        if self.edid {
            F_EDID
        } else {
            0
        }
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 16]
    }
    fn config(&self) -> Vec<u8> {
        // events_read, events_clear, num_scanouts, num_capsets.
        [self.s.events, 0, self.s.heads.len() as u32, 0].iter().flat_map(|v| v.to_le_bytes()).collect()
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        // events_clear.
        for (i, b) in data.iter().enumerate() {
            if let at @ 4..8 = offset.saturating_add(i) {
                self.s.events &= !(u32::from(*b) << (8 * (at - 4)));
            }
        }
    }
    fn reset(&mut self) {
        let heads = self.s.heads.iter().map(|h| Head { monitor: h.monitor, ..Head::default() }).collect();
        self.s = State { heads, ..State::default() };
        self.changes += 1;
    }
    fn notify(&mut self, io: &mut Io, queue: usize) {
        let ram = io.ram();
        while let Some(chain) = io.queues[queue].pop(ram) {
            let length = total(&chain.readable).min(MAX_COMMAND as u64) as usize;
            let command = gather(io.ctx, &chain.readable, 0, length);
            let mut written = 0;
            if queue == CONTROL {
                let answer = self.command(io.ctx, &command);
                written = scatter(io.ctx, &chain.writable, 0, &answer);
            } else {
                self.cursor_command(&command);
            }
            io.queues[queue].push(ram, chain.head, written as u32);
        }
        io.queues[queue].rearm(ram);
    }
    fn input(&mut self, io: &mut Io, input: &Input) {
        let Input::Display { head, width, height } = *input else { return };
        let Some(head) = self.s.heads.get_mut(head as usize) else { return };
        let new = (width > 0 && height > 0).then(|| (width.min(MAX_SIDE), height.min(MAX_SIDE)));
        if head.monitor != new {
            head.monitor = new;
            self.s.events |= EVENT_DISPLAY;
            io.config_changed = true;
        }
    }
    fn screen(&self) -> Option<&dyn Screen> {
        Some(self)
    }
    fn save(&self) -> Vec<u8> {
        // The pixels follow, in the order of the resources' numbers: by far the most of it.
        let mut out = pack(&self.s);
        self.s.resources.values().for_each(|r| out.extend_from_slice(r.pixels()));
        out
    }
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        let misfit = || DeviceError::Misfit(name.to_owned());
        let (mut s, mut rest): (State, _) =
            postcard::take_from_bytes(data).map_err(|e| DeviceError::BadSection(name.to_owned(), e))?;
        let mut room = self.max_memory;
        for resource in s.resources.values_mut() {
            room = room.checked_sub(resource.bytes()).ok_or_else(misfit)?;
            rest = resource.restore(rest).ok_or_else(misfit)?;
        }
        let fits = |head: &Head| {
            head.shown.is_none_or(|(id, rect)| s.resources.get(&id).is_some_and(|r| r.has(rect)))
        };
        let drawn = |head: &Head| {
            head.cursor.shape.as_ref().is_none_or(|p| p.pixels.len() == (p.width * p.height) as usize)
        };
        let good = s.heads.iter().all(|h| fits(h) && drawn(h));
        if !rest.is_empty() || s.heads.len() != self.s.heads.len() || !good {
            return Err(misfit());
        }
        self.s = s;
        self.changes += 1;
        Ok(())
    }
}

impl Screen for Gpu {
    fn changes(&self) -> u64 {
        self.changes
    }
    fn picture(&self) -> Picture {
        self.head(0).unwrap_or_default()
    }
    fn text(&self) -> Option<Vec<String>> {
        None
    }
    fn head(&self, head: u32) -> Option<Picture> {
        let head = self.s.heads.get(head as usize)?;
        Some(self.shown(head).unwrap_or_else(|| Picture::black(BLANK.0, BLANK.1)))
    }
    fn is_used(&self) -> bool {
        self.s.used
    }
    fn takes_size(&self) -> bool {
        true
    }
    fn pointer(&self) -> Option<&Pointer> {
        self.s.heads.first()?.cursor.shape.as_ref()
    }
}
