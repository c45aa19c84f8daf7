//! Writing changed metadata; the module above says in which order.

use super::{Qcow2, State, OFFSET};
use crate::BlockError;

/// A copy of what a flush writes.
struct Changes {
    refcounts: Vec<(u64, Vec<u8>)>,
    /// (index, host offset, table)
    l2: Vec<(usize, u64, Vec<u8>)>,
    /// (host offset, table)
    l1: Option<(u64, Vec<u8>)>,
    unreferenced: Vec<u64>,
}

pub(super) fn bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|e| e.to_be_bytes()).collect()
}

impl Qcow2 {
    /// Write all changed metadata; data and metadata are on stable storage when this returns.
    pub(super) fn write_metadata(&self) -> Result<(), BlockError> {
        let _one = self.flushing.lock().map_err(super::broken)?;
        let changes = {
            let mut state = self.lock()?;
            self.take_changes(&mut state)?
        };
        let result = self.write_changes(&changes);
        let mut state = self.state.lock().map_err(super::broken)?;
        for (index, _, _) in &changes.l2 {
            if let Some(table) = state.l2.get_mut(index) {
                table.writing = false;
                table.dirty |= result.is_err();
            }
        }
        if let Err(e) = result {
            // What is on disk is consistent, and memory ahead of it: all of it is written the next time.
            state.refs.redo(&changes.refcounts);
            state.l1_dirty |= changes.l1.is_some();
            state.unreferenced.extend(changes.unreferenced);
            return Err(e);
        }
        if !changes.unreferenced.is_empty() {
            let next = state.next_request;
            state.limbo.push((next, changes.unreferenced));
        }
        let released = self.release_unreferenced(&mut state);
        if released.is_err() {
            // The counts are not what the tables say.
            state.poisoned = true;
        }
        released
    }

    /// Write until nothing in memory differs from what is on disk. No request may be under way.
    pub(super) fn settle(&self) -> Result<(), BlockError> {
        // The counts of what the tables no longer refer to follow the tables, and the table of counts may move.
        for _ in 0..8 {
            self.write_metadata()?;
            let state = self.lock()?;
            let dirty = state.l1_dirty || state.l2.values().any(|t| t.dirty) || !state.refs.is_clean();
            if !dirty && state.unreferenced.is_empty() && state.limbo.is_empty() {
                return Ok(());
            }
        }
        Err(BlockError::Corrupt("its metadata does not come to rest".into()))
    }

    fn take_changes(&self, state: &mut State) -> Result<Changes, BlockError> {
        let bits = self.header.cluster_bits;
        let refcounts = if state.refs.is_table_dirty() {
            // Rare: the table itself changed. All of it is written here, with the lock held.
            if let Some((old, clusters)) = state.refs.write(self.file.as_ref())? {
                state.unreferenced.extend((old >> bits)..(old >> bits) + clusters);
            }
            Vec::new()
        } else {
            state.refs.take_dirty()
        };
        let mut l2 = Vec::new();
        for (index, table) in &mut state.l2 {
            if table.dirty {
                table.dirty = false;
                table.writing = true;
                l2.push((*index, state.l1[*index] & OFFSET, bytes(&table.entries)));
            }
        }
        let l1 = std::mem::take(&mut state.l1_dirty).then(|| (state.l1_offset, bytes(&state.l1)));
        Ok(Changes { refcounts, l2, l1, unreferenced: std::mem::take(&mut state.unreferenced) })
    }

    fn write_changes(&self, changes: &Changes) -> Result<(), BlockError> {
        for (offset, block) in &changes.refcounts {
            self.file.write_at(*offset, block)?;
        }
        if self.external {
            self.data.sync()?;
        }
        self.file.sync()?;
        for (_, offset, table) in &changes.l2 {
            self.file.write_at(*offset, table)?;
        }
        if !changes.l2.is_empty() {
            self.file.sync()?;
        }
        if let Some((offset, l1)) = &changes.l1 {
            self.file.write_at(*offset, l1)?;
            self.file.sync()?;
        }
        Ok(())
    }

    /// Count down what no stored table refers to and no request under way may still look at.
    fn release_unreferenced(&self, state: &mut State) -> Result<(), BlockError> {
        let bits = self.header.cluster_bits;
        let oldest = state.active.first().copied().unwrap_or(u64::MAX);
        let (free, kept) = std::mem::take(&mut state.limbo).into_iter().partition(|(n, _)| *n <= oldest);
        state.limbo = kept;
        let free: Vec<(u64, Vec<u64>)> = free;
        for cluster in free.into_iter().flat_map(|(_, clusters)| clusters) {
            if state.refs.release(self.file.as_ref(), cluster)? == 0 && self.discard {
                self.file.punch(cluster << bits, 1 << bits);
            }
        }
        Ok(())
    }
}
