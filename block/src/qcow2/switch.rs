//! Changing all tables at once: prepared beside the old ones, and switched to by one write of the header (the module
//! above says why this is safe).

use std::collections::BTreeSet;

use super::flush::bytes;
use super::refcount::Refcounts;
use super::snapshots::{Entry, SnapshotTable};
use super::{to_u64, Qcow2, State, COMPRESSED, COPIED, OFFSET};
use crate::BlockError;

/// The largest L1 table: 32 MiB, as QEMU's.
pub(super) const MAX_L1: usize = 4 << 20;

/// What the image is to be.
#[derive(Default)]
pub(super) struct Next {
    pub size: u64,
    /// The active L1 table; its flags are found anew.
    pub l1: Vec<u64>,
    pub snapshots: Vec<Entry>,
    /// The last snapshot gets a copy of the active L1 table.
    pub copy_l1: bool,
    /// What this L1 table leads to gets one reference more.
    pub added: Option<Vec<u64>>,
    /// And what this one leads to, one less.
    pub removed: Option<Vec<u64>>,
    /// (offset, length) in the file of something that is not needed any more.
    pub dropped: Option<(u64, u64)>,
}

impl Qcow2 {
    pub(super) fn stored_l2(&self, offset: u64) -> Result<Vec<u64>, BlockError> {
        if !offset.is_multiple_of(self.cluster()) || offset >= self.file.length() {
            return Err(BlockError::Corrupt(format!("an L2 table lies at {offset:#x}")));
        }
        let mut raw = vec![0u8; self.cluster() as usize];
        self.file.read_at(offset, &mut raw)?;
        Ok(to_u64(&raw))
    }

    /// The L1 table of a snapshot, without flags.
    pub(super) fn read_l1(&self, entry: &Entry) -> Result<Vec<u64>, BlockError> {
        let len = u64::from(entry.l1_entries) * 8;
        if entry.l1_offset.saturating_add(len) > self.file.length().next_multiple_of(self.cluster()) {
            return Err(BlockError::Corrupt("a snapshot's L1 table lies outside the image".into()));
        }
        let mut raw = vec![0u8; len as usize];
        self.file.read_at(entry.l1_offset, &mut raw)?;
        Ok(to_u64(&raw).into_iter().map(|e| e & OFFSET).collect())
    }

    /// Take the flags out of L2 tables that only snapshots use: there they mean nothing, but some programs leave them.
    pub(super) fn clear_flags(&self, l1: &[u64]) -> Result<(), BlockError> {
        let mut changed = false;
        for entry in l1.iter().filter(|e| **e & OFFSET != 0) {
            let mut table = self.stored_l2(entry & OFFSET)?;
            if self.set_flags(&mut table, |_| Ok(false))? {
                self.file.write_at(entry & OFFSET, &bytes(&table))?;
                changed = true;
            }
        }
        if changed {
            self.file.sync()?;
        }
        Ok(())
    }

    /// Give each entry of an L2 table that has a cluster of its own the flag that `owned` says; whether one changed.
    fn set_flags(
        &self,
        table: &mut [u64],
        mut owned: impl FnMut(u64) -> Result<bool, BlockError>,
    ) -> Result<bool, BlockError> {
        let mut changed = false;
        let stride = if self.header.has_subclusters() { 2 } else { 1 };
        for entry in table.iter_mut().step_by(stride) {
            if *entry & COMPRESSED != 0 || *entry & OFFSET == 0 {
                continue;
            }
            let flag = if owned((*entry & OFFSET) >> self.header.cluster_bits)? { COPIED } else { 0 };
            if *entry & COPIED != flag {
                *entry = *entry & !COPIED | flag;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Call `f` for every cluster that an L1 table leads to, as often as it does.
    fn for_each_reference(
        &self,
        l1: &[u64],
        mut f: impl FnMut(u64) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        let bits = self.header.cluster_bits;
        let stride = if self.header.has_subclusters() { 2 } else { 1 };
        let mut seen = BTreeSet::new();
        for offset in l1.iter().map(|e| e & OFFSET).filter(|o| *o != 0) {
            if !seen.insert(offset) {
                return Err(BlockError::Corrupt(format!("the L2 table at {offset:#x} is used twice")));
            }
            f(offset >> bits)?;
            for entry in self.stored_l2(offset)?.into_iter().step_by(stride) {
                if entry & COMPRESSED != 0 {
                    let (at, len) = self.compressed_extent(entry);
                    (at >> bits..=(at + len - 1) >> bits).try_for_each(&mut f)?;
                } else if entry & OFFSET != 0 && !self.external {
                    f((entry & OFFSET) >> bits)?;
                }
            }
        }
        Ok(())
    }

    /// Write the image that is to be beside the one that is, and switch. Everything in memory must be stored, and no
    /// request be under way. After an error the image is what it was, unless the switch itself failed.
    pub(super) fn switch(&self, state: &mut State, mut next: Next) -> Result<(), BlockError> {
        if next.l1.len().max(self.l1_entries(next.size)) > MAX_L1 {
            return Err(BlockError::Unsupported("Image is too big".into()));
        }
        let file = self.file.as_ref();
        let mut refs = state.refs.prepare(file)?;
        if let Some(l1) = &next.added {
            self.for_each_reference(l1, |cluster| refs.add(file, cluster))?;
        }
        if let Some(l1) = &next.removed {
            self.for_each_reference(l1, |cluster| refs.release(file, cluster).map(|_| ()))?;
        }
        next.l1.resize(next.l1.len().max(self.l1_entries(next.size)), 0);
        self.place_l2(&mut refs, &mut next.l1, if next.copy_l1 { 2 } else { 1 })?;

        let l1_offset = self.store(&mut refs, &bytes(&next.l1))?;
        if let Some(last) = next.snapshots.last_mut().filter(|_| next.copy_l1) {
            let shared: Vec<u64> = next.l1.iter().map(|e| e & OFFSET).collect();
            last.l1_offset = self.store(&mut refs, &bytes(&shared))?;
            last.l1_entries = shared.len() as u32;
        }
        let mut snapshots = SnapshotTable { entries: next.snapshots, ..SnapshotTable::default() };
        let list = snapshots.bytes()?;
        if !list.is_empty() {
            snapshots.offset = self.store(&mut refs, &list)?;
            snapshots.length = list.len() as u64;
        }
        refs.relocate(file)?;
        // What is not needed any more: its clusters are not used again before the switch.
        let old = [
            Some((state.l1_offset, state.l1.len() as u64 * 8)),
            Some((state.snapshots.offset, state.snapshots.length)),
            next.dropped,
        ];
        for (offset, len) in old.into_iter().flatten().filter(|(_, len)| *len > 0) {
            let bits = self.header.cluster_bits;
            for cluster in offset >> bits..=(offset + len - 1) >> bits {
                refs.release(file, cluster)?;
            }
        }
        let (table, clusters) = refs.write_prepared(file)?;
        file.sync()?;

        let mut head = [0u8; 48];
        file.read_at(24, &mut head)?;
        let mut put = |at: usize, bytes: &[u8]| head[at - 24..at - 24 + bytes.len()].copy_from_slice(bytes);
        put(24, &next.size.to_be_bytes());
        put(36, &(next.l1.len() as u32).to_be_bytes());
        put(40, &l1_offset.to_be_bytes());
        put(48, &table.to_be_bytes());
        put(56, &clusters.to_be_bytes());
        put(60, &(snapshots.entries.len() as u32).to_be_bytes());
        put(64, &snapshots.offset.to_be_bytes());
        if let Err(e) = file.write_at(24, &head).and_then(|()| file.sync()) {
            // It may be the one image or the other.
            state.poisoned = true;
            return Err(e.into());
        }
        let freed = refs.adopt();
        state.refs = refs;
        state.l1 = next.l1;
        state.l1_offset = l1_offset;
        state.l2.clear();
        state.snapshots = snapshots;
        state.untouched = state.untouched.max(file.length());
        self.size.store(next.size, std::sync::atomic::Ordering::Relaxed);
        if self.discard {
            self.punch_runs(&freed);
        }
        Ok(())
    }

    /// Bytes of the disk that one L2 table leads to.
    pub(super) fn table_span(&self) -> u64 {
        let l2_bits = self.header.cluster_bits - if self.header.has_subclusters() { 4 } else { 3 };
        1 << (self.header.cluster_bits + l2_bits)
    }

    /// L1 entries that a disk of this size needs.
    pub(super) fn l1_entries(&self, size: u64) -> usize {
        size.div_ceil(self.table_span()) as usize
    }

    /// Store something in new clusters; its offset.
    fn store(&self, refs: &mut Refcounts, data: &[u8]) -> Result<u64, BlockError> {
        let clusters = (data.len() as u64).div_ceil(self.cluster()).max(1);
        let offset = refs.allocate_run(self.file.as_ref(), clusters)? << self.header.cluster_bits;
        let mut whole = data.to_vec();
        whole.resize((clusters * self.cluster()) as usize, 0);
        self.file.write_at(offset, &whole)?;
        Ok(offset)
    }

    /// Find the flags of the active tables by the new counts. An L2 table whose flags change goes to a new place; `ours`
    /// L1 tables that are being written may refer to it.
    fn place_l2(&self, refs: &mut Refcounts, l1: &mut [u64], ours: u64) -> Result<(), BlockError> {
        let (file, bits) = (self.file.as_ref(), self.header.cluster_bits);
        for entry in l1.iter_mut() {
            let offset = *entry & OFFSET;
            *entry = offset;
            if offset == 0 {
                continue;
            }
            let count = refs.get(file, offset >> bits)?;
            if count == 1 {
                *entry |= COPIED;
            }
            if self.external {
                // Data clusters are not counted.
                continue;
            }
            let mut table = self.stored_l2(offset)?;
            if !self.set_flags(&mut table, |cluster| Ok(count == 1 && refs.get(file, cluster)? == 1))? {
                continue;
            }
            if count > ours {
                // Shared, and yet with flags: they are wrong now already.
                self.file.write_at(offset, &bytes(&table))?;
            } else {
                let new = self.store(refs, &bytes(&table))?;
                for _ in 0..count {
                    refs.release(file, offset >> bits)?;
                }
                for _ in 1..count {
                    refs.add(file, new >> bits)?;
                }
                *entry = new | *entry & COPIED;
            }
        }
        Ok(())
    }

    /// Give clusters back to the file system, those side by side in one go.
    fn punch_runs(&self, clusters: &[u64]) {
        let bits = self.header.cluster_bits;
        for run in clusters.chunk_by(|a, b| a + 1 == *b) {
            self.file.punch(run[0] << bits, (run.len() as u64) << bits);
        }
    }
}
