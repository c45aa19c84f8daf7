//! The state of a machine beside its disk: in the clusters behind the disk's last L2 table, as QEMU keeps it
//! (`docs/interop/qcow2.txt`, "Snapshots": the VM state).
//!
//! It is written into the active tables, taken over by the snapshot that is made then, and dropped from the active tables.

use super::switch::Next;
use super::{Qcow2, ALL_ALLOCATED, COMPRESSED, OFFSET, ZERO};
use crate::{BlockError, Image};

impl Qcow2 {
    /// The guest offset at which the machine's state begins beside a disk of this size.
    fn vm_state_base(&self, size: u64) -> u64 {
        self.l1_entries(size) as u64 * self.table_span()
    }

    /// Store a piece of the machine's state: whole clusters, but for the last piece.
    pub(super) fn store_vm_state(&self, at: u64, data: &[u8]) -> Result<(), BlockError> {
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        if self.external {
            return Err(BlockError::Unsupported(
                "an image with an external data file has no snapshots".into(),
            ));
        }
        let cluster = self.cluster();
        if !at.is_multiple_of(cluster) {
            return Err(BlockError::Unsupported("a machine's state is written in whole clusters".into()));
        }
        let base = self.vm_state_base(self.size());
        let end = base + at + data.len() as u64;
        let entries = end.div_ceil(self.table_span()) as usize;
        if self.lock()?.l1.len() < entries {
            let _alone = self.quiesce()?;
            self.settle()?;
            let mut state = self.lock()?;
            let mut l1 = state.l1.clone();
            // Some more, so that it is not done again for the next piece.
            l1.resize(entries + entries / 2 + 8, 0);
            let snapshots = state.snapshots.entries.clone();
            self.switch(&mut state, Next { size: self.size(), l1, snapshots, ..Next::default() })?;
        }
        let _request = self.enter()?;
        self.relieve()?;
        let whole = data.len() - data.len() % cluster as usize;
        self.write_span(base + at, &data[..whole])?;
        if whole < data.len() {
            let mut last = data[whole..].to_vec();
            last.resize(cluster as usize, 0);
            self.write_span(base + at + whole as u64, &last)?;
        }
        Ok(())
    }

    /// Forget the state in the active tables.
    pub(super) fn forget_vm_state(&self) -> Result<(), BlockError> {
        let _request = self.enter()?;
        let base = self.vm_state_base(self.size());
        let mut state = self.lock()?;
        let first = self.l1_entries(self.size());
        let used: Vec<usize> = (first..state.l1.len()).filter(|i| state.l1[*i] & OFFSET != 0).collect();
        let span = self.table_span();
        for index in used {
            let table = base + (index - first) as u64 * span;
            for guest in (table..table + span).step_by(self.cluster() as usize) {
                if self.place(&mut state, guest)? != super::Place::Unallocated {
                    self.set_entry(&mut state, guest, 0)?;
                }
            }
        }
        drop(state);
        self.write_metadata()
    }

    /// Read a piece of the machine's state that a snapshot (by its id) has kept.
    pub(super) fn read_kept_vm_state(&self, id: &str, at: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let (entry, bits) = {
            let state = self.lock()?;
            let found = state.snapshots.entries.iter().find(|s| s.public.id == id).cloned();
            let missing = || BlockError::Unsupported(format!("snapshot '{id}' does not exist"));
            (found.ok_or_else(missing)?, self.header.cluster_bits)
        };
        let disk = if entry.public.disk_size == 0 { self.size() } else { entry.public.disk_size };
        let base = self.vm_state_base(disk);
        if at.saturating_add(buf.len() as u64) > entry.public.vm_state_size {
            return Err(BlockError::Unsupported("the machine's state ends before what is read of it".into()));
        }
        let l1 = self.read_l1(&entry)?;
        let mut table: Option<(usize, Vec<u64>)> = None;
        let mut rest = buf;
        for (guest, len) in self.pieces(base + at, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(len as usize);
            rest = later;
            let (index, word) = self.indices(guest);
            let offset = l1.get(index).copied().unwrap_or(0) & OFFSET;
            if offset == 0 {
                now.fill(0);
                continue;
            }
            if table.as_ref().is_none_or(|(i, _)| *i != index) {
                table = Some((index, self.stored_l2(offset)?));
            }
            let Some((_, entries)) = &table else { continue };
            let entry = entries[word];
            let mixed = self.header.has_subclusters() && entries[word + 1] != ALL_ALLOCATED;
            if entry & COMPRESSED != 0 || mixed {
                return Err(BlockError::Corrupt(
                    "the machine's state lies in clusters that hold none".into(),
                ));
            }
            if entry & OFFSET == 0 || entry & ZERO != 0 && !self.header.has_subclusters() {
                now.fill(0);
            } else {
                self.data.read_at((entry & OFFSET) + (guest & ((1 << bits) - 1)), now)?;
            }
        }
        Ok(())
    }
}
