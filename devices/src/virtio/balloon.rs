//! The memory balloon (section 5.5): the guest is asked to give pages up, and tells how it stands. Pages that it
//! gives up keep their contents and their place in host memory.

use serde::{Deserialize, Serialize};

use super::{gather, total, Io, Model};
use crate::ctx::{pack, unpack, DeviceError};
use crate::door::{GuestEvent, Input};

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;

const STATS: usize = 2;
const PAGE: u64 = 4096;
/// Names of the statistics by their tag (5.5.6.3), as QEMU's `guest-stats` has them.
const NAMES: [&str; 10] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
];

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    /// Pages that the guest is to give up, and has given up.
    wanted: u32,
    actual: u32,
    /// The buffer with the statistics, kept until new ones are asked for.
    held: Option<u16>,
    stats: [Option<u64>; 10],
    /// Virtual time of the last statistics, in ns.
    updated: u64,
    /// Seconds between two questions; 0: none are asked.
    interval: u64,
}

/// The balloon of a machine with this much RAM.
pub struct Balloon {
    ram_size: u64,
    deflate_on_oom: bool,
    s: State,
}

impl Balloon {
    pub fn new(ram_size: u64, deflate_on_oom: bool) -> Balloon {
        Balloon { ram_size, deflate_on_oom, s: State::default() }
    }

    fn actual_bytes(&self) -> u64 {
        self.ram_size.saturating_sub(u64::from(self.s.actual) * PAGE)
    }

    fn set_timer(&self, io: &mut Io) {
        let at = (self.s.interval > 0).then(|| io.ctx.now + self.s.interval.min(1 << 32) * 1_000_000_000);
        io.ctx.set_timer(0, at);
    }
}

impl Model for Balloon {
    fn kind(&self) -> u16 {
        5
    }
    fn class(&self) -> u32 {
        0x00_FF00
    }
    fn features(&self) -> u64 {
        F_STATS_VQ | if self.deflate_on_oom { F_DEFLATE_ON_OOM } else { 0 }
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 128]
    }
    fn config(&self) -> Vec<u8> {
        [self.s.wanted.to_le_bytes(), self.s.actual.to_le_bytes()].concat()
    }
    fn config_written(&mut self, io: &mut Io, offset: usize, data: &[u8]) {
        let mut bytes = self.s.actual.to_le_bytes();
        for (i, b) in data.iter().enumerate() {
            if let Some(slot) = (offset + i).checked_sub(4).and_then(|at| bytes.get_mut(at)) {
                *slot = *b;
            }
        }
        let actual = u32::from_le_bytes(bytes);
        if actual != self.s.actual {
            self.s.actual = actual;
            io.ctx.event(GuestEvent::BalloonChange { actual: self.actual_bytes() });
        }
    }
    fn reset(&mut self) {
        self.s = State { wanted: self.s.wanted, interval: self.s.interval, ..State::default() };
    }
    fn notify(&mut self, io: &mut Io, queue: usize) {
        let ram = io.ram();
        while let Some(chain) = io.queues[queue].pop(ram) {
            if queue != STATS {
                io.queues[queue].push(ram, chain.head, 0);
                continue;
            }
            let length = total(&chain.readable).min(4096) as usize;
            for entry in gather(io.ctx, &chain.readable, 0, length).chunks_exact(10) {
                let tag = usize::from(u16::from_le_bytes([entry[0], entry[1]]));
                let mut value = [0; 8];
                value.copy_from_slice(&entry[2..]);
                if let Some(slot) = self.s.stats.get_mut(tag) {
                    *slot = Some(u64::from_le_bytes(value));
                }
            }
            self.s.updated = io.ctx.now;
            // The driver has one such buffer; should it offer more, the older ones go back.
            if let Some(old) = self.s.held.replace(chain.head) {
                io.queues[STATS].push(ram, old, 0);
            }
            self.set_timer(io);
        }
        io.queues[queue].rearm(ram);
    }
    fn timer(&mut self, io: &mut Io) {
        if let Some(head) = self.s.held.take() {
            io.queues[STATS].push(io.ram(), head, 0);
        }
    }
    fn input(&mut self, io: &mut Io, input: &Input) {
        match input {
            Input::Balloon { bytes } => {
                self.s.wanted = (self.ram_size.saturating_sub(*bytes) / PAGE) as u32;
                io.config_changed = true;
            }
            Input::BalloonStats { seconds } => {
                self.s.interval = *seconds;
                self.set_timer(io);
            }
            _ => {}
        }
    }
    fn facts(&self) -> Vec<(String, i64)> {
        let mut out = vec![
            ("actual".to_owned(), self.actual_bytes() as i64),
            ("updated-ns".to_owned(), self.s.updated as i64),
            ("guest-stats-polling-interval".to_owned(), self.s.interval as i64),
        ];
        for (name, value) in NAMES.iter().zip(self.s.stats) {
            out.push(((*name).to_owned(), value.map_or(-1, |v| v as i64)));
        }
        out
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        self.s = unpack(name, data)?;
        Ok(())
    }
}
