//! Another size of the disk.

use super::switch::Next;
use super::{Place, Qcow2, State};
use crate::{check_resize, BlockError, Image};
use std::sync::atomic::Ordering;

/// L2 tables changed between two flushes.
const TABLES: usize = 64;

impl Qcow2 {
    /// Change the size. New bytes read as zero; the order of writes is such that they do so after an
    /// interruption too: what would be seen behind the old end is removed before the header names the new one.
    pub(super) fn change_size(&self, size: u64) -> Result<(), BlockError> {
        check_resize(self, size)?;
        let _alone = self.quiesce()?;
        self.settle()?;
        let old = self.size();
        if self.header.version < 3 && !self.info().snapshots.is_empty() {
            return Err(BlockError::Unsupported("Can't resize a v2 image which has snapshots".into()));
        }
        if size > old {
            {
                let mut state = self.lock()?;
                if self.l1_entries(size) > super::switch::MAX_L1 {
                    return Err(BlockError::Unsupported("Image is too big".into()));
                }
                if self.l1_entries(size) > state.l1.len() {
                    let mut l1 = state.l1.clone();
                    l1.resize(self.l1_entries(size), 0);
                    let snapshots = state.snapshots.entries.clone();
                    self.switch(&mut state, Next { size: old, l1, snapshots, ..Next::default() })?;
                }
            }
            if self.external {
                // An interrupted cut may have left something behind the end.
                self.data.set_length(old)?;
                self.data.set_length(size)?;
            }
            // The tables reach the new end already, the header does not.
            self.size.store(size, Ordering::Relaxed);
        }
        let done = self
            .empty(old.min(size), old.max(size), size > old)
            .and_then(|()| self.settle())
            .and_then(|()| {
                self.file.write_at(24, &size.to_be_bytes())?;
                self.file.sync()?;
                if self.external && size < old {
                    self.data.set_length(size)?;
                }
                Ok(())
            });
        self.size.store(if done.is_ok() { size } else { old }, Ordering::Relaxed);
        done
    }

    /// Make what lies behind `from` read as zero, up to `to` and the end of its cluster.
    fn empty(&self, from: u64, to: u64, grows: bool) -> Result<(), BlockError> {
        let size = self.cluster();
        let first = from.next_multiple_of(size);
        if first > from {
            let rest = first.min(self.size()) - from;
            let mut state = self.lock()?;
            let place = self.place(&mut state, from)?;
            drop(state);
            if !matches!(place, Place::Zero(_)) && (place != Place::Unallocated || self.reads_backing(from)) {
                self.write_span(from, &vec![0; rest as usize])?;
            }
        }
        let mut tables = 0;
        let mut guest = first;
        while guest < to {
            let mut state = self.lock()?;
            let (l1, _) = self.indices(guest);
            let backing = grows && self.reads_backing(guest);
            if !backing && state.l1.get(l1).is_none_or(|e| e & super::OFFSET == 0) {
                guest = self.next_table(guest);
                continue;
            }
            if backing {
                drop(state);
                self.zero_cluster(guest)?;
            } else {
                self.drop_cluster(&mut state, guest)?;
                drop(state);
            }
            guest += size;
            if guest == self.next_table(guest - size) {
                tables += 1;
                if tables % TABLES == 0 {
                    self.write_metadata()?;
                }
            }
        }
        Ok(())
    }

    /// The first guest offset of the next L2 table.
    fn next_table(&self, guest: u64) -> u64 {
        let covered = self.table_span();
        (guest / covered + 1) * covered
    }

    fn reads_backing(&self, guest: u64) -> bool {
        self.below().is_some_and(|b| b.size() > guest)
    }

    fn drop_cluster(&self, state: &mut State, guest: u64) -> Result<(), BlockError> {
        match self.place(state, guest)? {
            Place::Unallocated => Ok(()),
            _ => self.set_entry(state, guest, 0),
        }
    }
}
