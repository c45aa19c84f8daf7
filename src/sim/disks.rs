//! Disks in the simulator beyond one that both sides write through the log: reads that the backup does itself
//! (`reads=disk`), and a disk on each host (`disks=separate`), as [`crate::host::disk`] and [`crate::runtime::ft`] do it.

use std::collections::{BTreeMap, BTreeSet};

use ftvm_devices::{DiskOp, Input, Output};

use super::guest::{value, SECTORS};
use super::host::Role;
use super::world::{World, HOSTS, MS};
use super::Mutation;
use crate::lockstep::log::Entry;
use crate::lockstep::reads::Span;
use crate::lockstep::wire::Message;
use crate::lockstep::Side;
use crate::machine::MachineInput;

/// A host's own disk, and what it is worth.
#[derive(Default)]
pub struct OwnDisk {
    pub sectors: BTreeMap<u64, u64>,
    /// Beside the image ([`crate::runtime::ft::disks::Generations`]).
    generation: i64,
    /// Sectors to be copied to a backup.
    dirty: BTreeSet<u64>,
}

/// All hosts' own disks, and the number beside the lock.
#[derive(Default)]
pub struct OwnDisks {
    pub hosts: [OwnDisk; HOSTS],
    generation: i64,
}

/// A request's span, and whether it writes.
pub fn span(op: &DiskOp) -> (Span, bool) {
    match op {
        DiskOp::Read { offset, len } => ((*offset, u64::from(*len)), false),
        DiskOp::Write { offset, data } => ((*offset, data.len() as u64), true),
        _ => ((0, 0), false),
    }
}

impl World {
    // Reads of the backup.

    /// `DiskWorker::share_reads`
    pub(super) fn share_reads(&mut self, p: usize) {
        self.newest = None;
        if self.options.reads_disk {
            let pending = self.procs[p].machine.pending_disk();
            let writes = pending.into_iter().filter_map(|output| match output {
                Output::Disk { id, op, .. } => Some((id, span(&op).0)).filter(|_| span(&op).1),
                _ => None,
            });
            self.procs[p].reads.open(writes);
        }
    }

    /// A request of a live side: done now, or when the backup has read what it overlaps.
    pub(super) fn submit(&mut self, p: usize, id: u64, op: DiskOp) {
        let (span, writes) = span(&op);
        let hold = self.options.mutation != Some(Mutation::NoHold);
        let proc = &mut self.procs[p];
        let now = if hold || !writes { proc.reads.submit(id, span, writes, op) } else { Some(op) };
        self.enqueue(p, now.map(|op| (id, op)));
    }

    pub(super) fn enqueue(&mut self, p: usize, ready: impl IntoIterator<Item = (u64, DiskOp)>) {
        self.procs[p].queue.extend(ready);
        self.serve(p);
    }

    /// `Runtime::disk_read`: whether the backup will read this itself.
    pub(super) fn is_shared_read(&self, p: usize, input: &MachineInput) -> Option<(u64, Vec<u8>)> {
        let MachineInput::Device(Input::DiskDone { id, result: Ok(data) }) = input else { return None };
        let logging = matches!(&self.procs[p].role, Role::Primary(r) if r.core.is_logging());
        if !logging || !self.procs[p].reads.may_share(*id) {
            return None;
        }
        let place = self.procs[p].machine.pending_disk().into_iter().find_map(|o| match o {
            Output::Disk { id: n, op: DiskOp::Read { offset, .. }, .. } if n == *id => Some(offset / 512),
            _ => None,
        })?;
        Some((*id, postcard::to_stdvec(&(*id, place, value(data))).unwrap_or_default()))
    }

    /// The backup reads what an entry of the log needs; `None`: the storage does not answer.
    pub(super) fn fetch(&mut self, p: usize, entry: Entry) -> Option<Entry> {
        let Entry::Fetch { stamp, payload } = &entry else { return Some(entry) };
        if !self.storage_ok(p) {
            return None;
        }
        let (id, sector, expected): (u64, u64, u64) = postcard::from_bytes(payload).ok()?;
        let got = self.disk.read(&self.procs[p].chain, sector);
        self.report.fetches += 1;
        if got != expected {
            // Where the primary has gone on alone it may: this side tries again until it finds that it has lost.
            let Role::Backup(r) = &self.procs[p].role else { return None };
            if self.locks.could_win(&r.epoch.clone(), Side::Backup) {
                self.violation(format!(
                    "the backup reads {got:x} in sector {sector}, the primary {expected:x}"
                ));
            }
            return None;
        }
        let done = MachineInput::Device(Input::DiskDone { id, result: Ok(got.to_le_bytes().to_vec()) });
        Some(Entry::Input { stamp: *stamp, payload: postcard::to_stdvec(&done).unwrap_or_default() })
    }

    // Separate disks.

    /// A request reaches a host's own disk.
    pub(super) fn land_own(&mut self, p: usize, op: &DiskOp) -> Vec<u8> {
        let own = &mut self.own.hosts[self.procs[p].host];
        match op {
            DiskOp::Write { offset, data } => {
                own.sectors.insert(offset / 512, value(data));
                if self.options.mutation != Some(Mutation::NoDirtySectors) {
                    own.dirty.insert(offset / 512);
                }
                Vec::new()
            }
            DiskOp::Read { offset, .. } => {
                own.sectors.get(&(offset / 512)).copied().unwrap_or(0).to_le_bytes().to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// `prepare`: what is written from here on is to be copied.
    pub(super) fn clear_dirty(&mut self, p: usize) {
        self.own.hosts[self.procs[p].host].dirty.clear();
    }

    /// `Joined::receive`: this host's image is about to be written over.
    pub(super) fn send_digests(&mut self, p: usize) {
        let own = &mut self.own.hosts[self.procs[p].host];
        own.generation = -1;
        let digest = |s: u64| {
            let mut d = [0; 16];
            d[..8].copy_from_slice(&own.sectors.get(&s).copied().unwrap_or(0).to_le_bytes());
            d
        };
        let digests = (0..SECTORS).map(digest).collect();
        self.procs[p].joined_generation = self.own.generation;
        self.send(p, Message::DiskDigests { drive: 0, first: 0, digests });
    }

    /// `disks::compare`
    pub(super) fn compare_digests(&mut self, p: usize, digests: &[[u8; 16]]) {
        let own = &mut self.own.hosts[self.procs[p].host];
        for (sector, theirs) in (0..).zip(digests) {
            if own.sectors.get(&sector).copied().unwrap_or(0) != value(theirs) {
                own.dirty.insert(sector);
            }
        }
    }

    /// Up to `limit` changed sectors to the backup; whether none is left.
    pub(super) fn send_sectors(&mut self, p: usize, limit: usize) -> bool {
        let own = &mut self.own.hosts[self.procs[p].host];
        let taken: Vec<u64> = own.dirty.iter().take(limit).copied().collect();
        own.dirty.retain(|s| !taken.contains(s));
        let content = |s: &u64| (*s, own.sectors.get(s).copied().unwrap_or(0).to_le_bytes().to_vec());
        let chunks: Vec<_> = taken.iter().map(content).collect();
        let left = own.dirty.is_empty();
        if !chunks.is_empty() {
            self.send(p, Message::DiskChunks { drive: 0, chunks });
        }
        left
    }

    pub(super) fn store_sectors(&mut self, p: usize, chunks: &[(u64, Vec<u8>)]) {
        let own = &mut self.own.hosts[self.procs[p].host];
        own.sectors.extend(chunks.iter().map(|(s, data)| (*s, value(data))));
    }

    /// `Generations::adopt`
    pub(super) fn adopt(&mut self, p: usize) {
        if self.options.separate {
            self.own.hosts[self.procs[p].host].generation = match self.options.mutation {
                Some(Mutation::AdoptLate) => self.own.generation,
                _ => self.procs[p].joined_generation,
            };
        }
        self.check_generations();
    }

    /// `Common::alone`: from here on only this host's disk is the newest.
    pub(super) fn alone(&mut self, p: usize) {
        let silent = self.options.mutation == Some(Mutation::NoGeneration) && self.own.generation > 0;
        if !self.options.separate || silent {
            return self.mark_alone(p);
        }
        if !self.storage_ok(p) {
            return self.again_alone(p, 5 * MS);
        }
        let next = self.own.hosts[self.procs[p].host].generation.max(self.own.generation) + 1;
        self.own.hosts[self.procs[p].host].generation = next;
        self.own.generation = next;
        self.mark_alone(p);
    }

    fn mark_alone(&mut self, p: usize) {
        // Not if a backup came while the lock's directory could not be reached.
        let busy = matches!(&self.procs[p].role, Role::Primary(r) if r.busy);
        if self.options.separate && !busy {
            self.newest = Some(self.procs[p].host);
        }
        self.check_generations();
    }

    /// While one side runs alone no other image may be taken for the newest.
    fn check_generations(&mut self) {
        let Some(newest) = self.newest else { return };
        let late = (0..HOSTS).find(|h| *h != newest && self.own.hosts[*h].generation >= self.own.generation);
        if let (Some(host), true) = (late, self.own.generation > 0) {
            self.violation(format!("the image of host {host} has missed writes and could be started"));
        }
    }
}
