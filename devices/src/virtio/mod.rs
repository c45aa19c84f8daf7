//! Virtio devices (Virtual I/O Device specification 1.2) on the PCI transport.

pub mod balloon;
pub mod blk;
pub mod gpu;
pub mod net;
pub mod rng;
pub mod scsi;
pub mod serial;
mod transport;

use ftvm_accel::mem::Ram;
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::ctx::{Ctx, DeviceError};
use crate::door::{DiskOp, Input};

pub(crate) use transport::Layout;
pub use transport::VirtioPci;

/// Feature bits of the transport.
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
/// Descriptors of a chain that are looked at.
const MAX_DESCRIPTORS: usize = 1024;

/// A virtqueue's state in a form that can be saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QueueState {
    size: u16,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    vector: u16,
}

/// A virtqueue and the MSI-X vector it uses.
pub struct VirtQueue {
    pub queue: Queue,
    vector: u16,
    /// Used entries were added since the driver was last considered for an interrupt.
    added: bool,
}

const NO_VECTOR: u16 = 0xFFFF;

/// A piece of guest memory that a descriptor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    pub addr: u64,
    pub len: u32,
}

/// A chain of descriptors: what the device reads, then what it writes.
#[derive(Clone, Debug)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<Piece>,
    pub writable: Vec<Piece>,
}

/// The sum of the pieces' lengths.
pub fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|p| u64::from(p.len)).sum()
}

/// Read up to `limit` bytes of what the pieces hold, from `skip` on.
pub fn gather(ctx: &Ctx, pieces: &[Piece], skip: u64, limit: usize) -> Vec<u8> {
    // In one piece from the start: growing it copies a large request's data once more.
    let mut out = Vec::with_capacity(total(pieces).saturating_sub(skip).min(limit as u64) as usize);
    let mut skip = skip;
    for p in pieces {
        let len = u64::from(p.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = ((len - skip) as usize).min(limit - out.len());
        let from = out.len();
        out.resize(from + n, 0);
        ctx.dma_read(p.addr.wrapping_add(skip), &mut out[from..]);
        skip = 0;
        if out.len() == limit {
            break;
        }
    }
    out
}

/// Write `data` over the pieces from `skip` on; returns how many bytes fitted.
pub fn scatter(ctx: &Ctx, pieces: &[Piece], skip: u64, data: &[u8]) -> usize {
    let mut skip = skip;
    let mut done = 0;
    for p in pieces {
        let len = u64::from(p.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = ((len - skip) as usize).min(data.len() - done);
        ctx.dma_write(p.addr.wrapping_add(skip), &data[done..done + n]);
        done += n;
        skip = 0;
        if done == data.len() {
            break;
        }
    }
    done
}

impl VirtQueue {
    /// A queue of at most `max` entries, a power of two.
    pub fn new(max: u16) -> Result<VirtQueue, DeviceError> {
        let queue = Queue::new(max).map_err(|e| DeviceError::Config(format!("a virtqueue of {max}: {e}")))?;
        Ok(VirtQueue { queue, vector: NO_VECTOR, added: false })
    }

    fn reset(&mut self) {
        self.queue.reset();
        self.vector = NO_VECTOR;
        self.added = false;
    }

    fn save(&self) -> QueueState {
        QueueState {
            size: self.queue.size(),
            ready: self.queue.ready(),
            desc: self.queue.desc_table(),
            avail: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            event_idx: self.queue.event_idx_enabled(),
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            vector: self.vector,
        }
    }

    fn load(&mut self, s: &QueueState) {
        self.reset();
        self.queue.set_size(s.size);
        self.set_addresses(s.desc, s.avail, s.used);
        self.queue.set_event_idx(s.event_idx);
        self.queue.set_next_avail(s.next_avail);
        self.queue.set_next_used(s.next_used);
        self.queue.set_ready(s.ready);
        self.vector = s.vector;
    }

    fn set_addresses(&mut self, desc: u64, avail: u64, used: u64) {
        let halves = |v: u64| (Some(v as u32), Some((v >> 32) as u32));
        let (low, high) = halves(desc);
        self.queue.set_desc_table_address(low, high);
        let (low, high) = halves(avail);
        self.queue.set_avail_ring_address(low, high);
        let (low, high) = halves(used);
        self.queue.set_used_ring_address(low, high);
    }

    /// The next chain the driver made available.
    pub fn pop(&mut self, ram: &Ram) -> Option<Chain> {
        if !self.queue.ready() {
            return None;
        }
        let chain = self.queue.iter(ram).ok()?.next()?;
        let head = chain.head_index();
        let mut out = Chain { head, readable: Vec::new(), writable: Vec::new() };
        for d in chain.take(MAX_DESCRIPTORS) {
            let piece = Piece { addr: d.addr().0, len: d.len() };
            if d.is_write_only() {
                out.writable.push(piece);
            } else {
                out.readable.push(piece);
            }
        }
        Some(out)
    }

    /// Give a chain back with `len` bytes written.
    pub fn push(&mut self, ram: &Ram, head: u16, len: u32) {
        if self.queue.ready() && self.queue.add_used(ram, head, len).is_ok() {
            self.added = true;
        }
    }

    /// Ask the driver to notify about the next chain.
    pub fn rearm(&mut self, ram: &Ram) {
        if self.queue.ready() && self.queue.event_idx_enabled() {
            // An error means rings outside memory: nothing to ask for there.
            let _ = self.queue.enable_notification(ram);
        }
    }

    /// Whether the driver wants an interrupt for what was added.
    fn wants_interrupt(&mut self, ram: &Ram) -> bool {
        std::mem::take(&mut self.added) && self.queue.needs_notification(ram).unwrap_or(false)
    }
}

/// What a virtio device model is called with.
pub struct Io<'a, 'b> {
    pub ctx: &'a mut Ctx<'b>,
    pub queues: &'a mut [VirtQueue],
    /// Features that the driver accepted.
    pub features: u64,
    /// Set by a model whose configuration space changed.
    pub config_changed: bool,
}

impl<'b> Io<'_, 'b> {
    /// Guest RAM.
    pub fn ram(&self) -> &'b Ram {
        self.ctx.mem.ram()
    }
}

/// A virtio device model behind a transport.
#[allow(unused_variables)]
pub trait Model: Send {
    /// Virtio device type (section 5).
    fn kind(&self) -> u16;
    /// PCI class code.
    fn class(&self) -> u32;
    /// Device features, without the transport's.
    fn features(&self) -> u64;
    /// The sizes of the queues.
    fn queue_sizes(&self) -> &'static [u16];
    /// The device configuration space.
    fn config(&self) -> Vec<u8>;
    fn config_write(&mut self, offset: usize, data: &[u8]) {}
    /// As [`Self::config_write`], for models that do something about it.
    fn config_written(&mut self, io: &mut Io, offset: usize, data: &[u8]) {
        self.config_write(offset, data);
    }
    /// MSI-X vectors, unless the user says otherwise.
    fn vectors(&self) -> u16 {
        self.queue_sizes().len() as u16 + 1
    }
    /// The timer that was set by [`Ctx::set_timer`] is due.
    fn timer(&mut self, io: &mut Io) {}
    /// See [`crate::ctx::Device::facts`].
    fn facts(&self) -> Vec<(String, i64)> {
        Vec::new()
    }
    /// See [`crate::ctx::Device::screen`].
    fn screen(&self) -> Option<&dyn crate::display::Screen> {
        None
    }
    /// See [`crate::ctx::Device::rescan`].
    fn rescan(&mut self, config: &crate::config::PcConfig, tell: bool) {}
    fn reset(&mut self);
    /// The driver notified queue `queue`.
    fn notify(&mut self, io: &mut Io, queue: usize);
    fn input(&mut self, io: &mut Io, input: &Input) {}
    fn disk_done(&mut self, io: &mut Io, id: u64, op: DiskOp, result: Result<&[u8], i32>) {}
    fn save(&self) -> Vec<u8>;
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError>;
}
