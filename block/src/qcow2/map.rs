//! The tables: where guest clusters are, and changing it.

use super::{Place, Qcow2, State, ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, L2, L2_CACHE, OFFSET, ZERO};
use crate::{BlockError, Image};

/// Clusters that are looked at in one go at the most.
const RUN: u64 = 8192;

impl Qcow2 {
    /// Words in an L2 entry.
    fn stride(&self) -> usize {
        if self.header.has_subclusters() {
            2
        } else {
            1
        }
    }

    /// (index in L1, index of the entry's first word in L2) of a guest offset.
    pub(super) fn indices(&self, guest: u64) -> (usize, usize) {
        let l2_bits = self.header.cluster_bits - 2 - self.stride() as u32;
        let cluster = guest >> self.header.cluster_bits;
        ((cluster >> l2_bits) as usize, (cluster & ((1 << l2_bits) - 1)) as usize * self.stride())
    }

    /// Load the L2 table for L1 entry `index`; false if there is none.
    pub(super) fn load_l2(&self, state: &mut State, index: usize) -> Result<bool, BlockError> {
        if state.l2.contains_key(&index) {
            return Ok(true);
        }
        let entry =
            *state.l1.get(index).ok_or_else(|| BlockError::Corrupt("the L1 table is too short".into()))?;
        let offset = entry & OFFSET;
        if offset == 0 {
            return Ok(false);
        }
        self.check_host(state, offset, "an L2 table")?;
        if state.l2.len() << self.header.cluster_bits > L2_CACHE {
            // Changed tables stay; see `relieve`.
            let clean = state.l2.iter().find(|(_, t)| !t.dirty && !t.writing).map(|(i, _)| *i);
            if let Some(i) = clean {
                state.l2.remove(&i);
            }
        }
        let mut raw = vec![0u8; self.cluster() as usize];
        self.file.read_at(offset, &mut raw)?;
        state.l2.insert(index, L2 { entries: super::to_u64(&raw), ..L2::default() });
        Ok(true)
    }

    /// Before a change: write the tables if too many changed ones are in memory.
    pub(super) fn relieve(&self) -> Result<(), BlockError> {
        let full = {
            let state = self.lock()?;
            state.l2.len() << self.header.cluster_bits > L2_CACHE && {
                let kept = state.l2.values().filter(|t| t.dirty || t.writing).count();
                kept << self.header.cluster_bits > L2_CACHE
            }
        };
        if full {
            self.write_metadata()?;
        }
        Ok(())
    }

    /// A table or data cluster must be aligned and may not be the header or a table of the first rank.
    pub(super) fn check_host(&self, state: &State, offset: u64, what: &str) -> Result<(), BlockError> {
        let (table, len) = state.refs.table_extent();
        let within = |start: u64, len: u64| offset >= start && offset < start + len;
        if !offset.is_multiple_of(self.cluster())
            || offset == 0
            || within(state.l1_offset, state.l1.len() as u64 * 8)
            || within(table, len)
        {
            return Err(BlockError::Corrupt(format!("{what} lies at {offset:#x}")));
        }
        Ok(())
    }

    pub(super) fn place(&self, state: &mut State, guest: u64) -> Result<Place, BlockError> {
        let (l1, l2) = self.indices(guest);
        if !self.load_l2(state, l1)? {
            return Ok(Place::Unallocated);
        }
        let entry = state.l2[&l1].entries[l2];
        if entry & COMPRESSED != 0 {
            return Ok(Place::Compressed(entry));
        }
        let offset = entry & OFFSET;
        if self.external {
            if !offset.is_multiple_of(self.cluster()) || offset > self.size() {
                return Err(BlockError::Corrupt(format!("a cluster of the data file lies at {offset:#x}")));
            }
            if offset == 0 && entry & COPIED != 0 && entry & ZERO == 0 && !self.header.has_subclusters() {
                return Ok(Place::Data(0));
            }
        } else if offset != 0 {
            self.check_host(state, offset, "a data cluster")?;
        }
        if self.header.has_subclusters() {
            let bitmap = state.l2[&l1].entries[l2 + 1];
            let (allocated, zero) = (bitmap & ALL_ALLOCATED, bitmap >> 32);
            if allocated & zero != 0 || (allocated != 0 && offset == 0 && !self.external) {
                return Err(BlockError::Corrupt(format!(
                    "the subclusters at {guest:#x} are both zero and not"
                )));
            }
            return Ok(match bitmap {
                0 => Place::Unallocated,
                ALL_ZERO => Place::Zero(None),
                ALL_ALLOCATED => Place::Data(offset),
                _ => Place::Mixed(offset, bitmap),
            });
        }
        if entry & ZERO != 0 && self.header.version >= 3 {
            return Ok(Place::Zero((offset != 0 && entry & COPIED != 0).then_some(offset)));
        }
        Ok(if offset == 0 { Place::Unallocated } else { Place::Data(offset) })
    }

    /// Whether what lies at `guest` reads as zero by the tables, and for how many bytes the answer holds.
    pub(super) fn zero_run(&self, guest: u64) -> Result<(bool, u64), BlockError> {
        let end = |at: u64| ((at / self.cluster() + 1) * self.cluster()).min(self.size());
        let is_zero = |place: Place| matches!(place, Place::Zero(_) | Place::Unallocated);
        let mut state = self.lock()?;
        let first = self.place(&mut state, guest)?;
        if let Some(below) = self.below() {
            drop(state);
            let len = end(guest) - guest;
            return match first {
                Place::Zero(_) => Ok((true, len)),
                Place::Unallocated if guest >= below.size() => Ok((true, len)),
                Place::Unallocated => below.is_zero(guest).map(|(zero, run)| (zero, run.min(len))),
                _ => Ok((false, len)),
            };
        }
        // With nothing below, neighbours are looked at in one go.
        let mut at = end(guest);
        for _ in 1..RUN {
            if at >= self.size() || is_zero(self.place(&mut state, at)?) != is_zero(first) {
                break;
            }
            at = end(at);
        }
        Ok((is_zero(first), at - guest))
    }

    /// The host cluster of a guest cluster, if it may be overwritten (no snapshot shares it).
    pub(super) fn own(&self, state: &mut State, guest: u64) -> Result<Option<u64>, BlockError> {
        Ok(match self.place(state, guest)? {
            Place::Data(host) if self.is_own(state, guest) => Some(host),
            _ => None,
        })
    }

    /// Where a range lies in the file, if all of it is in clusters that are this image's own ([`crate::Image::extents`]).
    pub(super) fn own_extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        crate::check_range(self, offset, len, false).ok()?;
        if self.external || !self.data.is_plain() {
            return None;
        }
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut state = self.lock().ok()?;
        for (at, len) in self.pieces(offset, len) {
            let host = self.own(&mut state, at).ok()?? + (at & (self.cluster() - 1));
            match runs.last_mut() {
                Some((start, have)) if *start + *have == host => *have += len,
                _ => runs.push((host, len)),
            }
        }
        Some(runs)
    }

    /// Whether the host cluster of a data place may be overwritten (no snapshot shares it).
    pub(super) fn is_own(&self, state: &State, guest: u64) -> bool {
        let (l1, l2) = self.indices(guest);
        state.l1[l1] & COPIED != 0 && state.l2.get(&l1).is_some_and(|t| t.entries[l2] & COPIED != 0)
    }

    /// (offset, length) in the file of a compressed cluster's data.
    pub(super) fn compressed_extent(&self, entry: u64) -> (u64, u64) {
        compressed_extent(self.header.cluster_bits, entry)
    }

    /// The L2 table of a guest offset, made writable: allocated, or copied if a snapshot shares it.
    pub(super) fn writable_l2(&self, state: &mut State, l1: usize) -> Result<(), BlockError> {
        let exists = self.load_l2(state, l1)?;
        let old = state.l1[l1];
        if exists && old & COPIED != 0 {
            return Ok(());
        }
        let (host, _, _) = self.allocate(state, 1)?;
        if exists {
            state.unreferenced.push((old & OFFSET) >> self.header.cluster_bits);
        } else {
            let entries = vec![0; self.cluster() as usize / 8];
            state.l2.insert(l1, L2 { entries, dirty: true, writing: false });
        }
        if let Some(table) = state.l2.get_mut(&l1) {
            table.dirty = true;
            // What a shared table refers to is shared itself.
            let stride = if self.header.has_subclusters() { 2 } else { 1 };
            table
                .entries
                .iter_mut()
                .step_by(stride)
                .filter(|e| **e & COMPRESSED == 0)
                .for_each(|e| *e &= !COPIED);
        }
        state.l1[l1] = host | COPIED;
        state.l1_dirty = true;
        Ok(())
    }

    /// Set an L2 entry, dropping the reference of what it held.
    pub(super) fn set_entry(&self, state: &mut State, guest: u64, new: u64) -> Result<(), BlockError> {
        let (l1, l2) = self.indices(guest);
        self.writable_l2(state, l1)?;
        let bits = self.header.cluster_bits;
        let Some(table) = state.l2.get_mut(&l1) else { return Ok(()) };
        let (word, bitmap) = match new {
            _ if !self.header.has_subclusters() => (new, None),
            ZERO => (0, Some(ALL_ZERO)),
            0 => (0, Some(0)),
            _ => (new, Some(ALL_ALLOCATED)),
        };
        let old = std::mem::replace(&mut table.entries[l2], word);
        if let Some(bitmap) = bitmap {
            table.entries[l2 + 1] = bitmap;
        }
        table.dirty = true;
        if old & COMPRESSED != 0 {
            let (offset, len) = self.compressed_extent(old);
            state.unreferenced.extend(offset >> bits..=(offset + len - 1) >> bits);
        } else if old & OFFSET != 0 && old & OFFSET != new & OFFSET && !self.external {
            state.unreferenced.push((old & OFFSET) >> bits);
        }
        Ok(())
    }
}

/// (offset, length) in the file of a compressed cluster's data.
pub(super) fn compressed_extent(cluster_bits: u32, entry: u64) -> (u64, u64) {
    let shift = 62 - (cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
    (offset, sectors * 512 - (offset & 511))
}
