//! The dirty bit: an image with lazy refcounts whose program crashed has counts that may be too low. Before it
//! is written, every cluster that a table refers to is counted again. Counts that are too high stay (leaks).

use std::collections::BTreeMap;

use super::header::Header;
use super::refcount::Refcounts;
use super::snapshots::SnapshotTable;
use super::{to_u64, COMPRESSED, OFFSET};
use crate::store::Store;
use crate::BlockError;

/// L1 tables looked at, in bytes: what a sane image has, many times over.
const MAX_TABLES: u64 = 64 << 20;

struct Count<'a> {
    file: &'a dyn Store,
    header: &'a Header,
    external: bool,
    uses: BTreeMap<u64, u64>,
    /// L2 tables, and by how many L1 entries each is used.
    tables: BTreeMap<u64, u64>,
    read: u64,
}

impl Count<'_> {
    fn range(&mut self, offset: u64, len: u64) {
        let bits = self.header.cluster_bits;
        if len > 0 {
            for cluster in offset >> bits..=(offset + len - 1) >> bits {
                *self.uses.entry(cluster).or_default() += 1;
            }
        }
    }

    fn l1(&mut self, offset: u64, entries: u32) -> Result<(), BlockError> {
        let len = u64::from(entries) * 8;
        self.read += len;
        if self.read > MAX_TABLES || offset.saturating_add(len) > self.file.length() {
            return Err(BlockError::Corrupt("an L1 table lies outside the image".into()));
        }
        let mut raw = vec![0; len as usize];
        self.file.read_at(offset, &mut raw)?;
        self.range(offset, len);
        for entry in to_u64(&raw) {
            if entry & OFFSET != 0 {
                *self.tables.entry(entry & OFFSET).or_default() += 1;
            }
        }
        Ok(())
    }

    fn l2_tables(&mut self) -> Result<(), BlockError> {
        let cluster = 1u64 << self.header.cluster_bits;
        let mut raw = vec![0; cluster as usize];
        for (offset, times) in std::mem::take(&mut self.tables) {
            if !offset.is_multiple_of(cluster) || offset >= self.file.length() {
                return Err(BlockError::Corrupt(format!("an L2 table lies at {offset:#x}")));
            }
            *self.uses.entry(offset >> self.header.cluster_bits).or_default() += times;
            self.file.read_at(offset, &mut raw)?;
            let stride = if self.header.has_subclusters() { 2 } else { 1 };
            for entry in to_u64(&raw).into_iter().step_by(stride) {
                let (at, len) = if entry & COMPRESSED != 0 {
                    super::map::compressed_extent(self.header.cluster_bits, entry)
                } else if entry & OFFSET != 0 && !self.external {
                    (entry & OFFSET, cluster)
                } else {
                    continue;
                };
                if at >= self.file.length().next_multiple_of(cluster) {
                    return Err(BlockError::Corrupt(format!("a data cluster lies at {at:#x}")));
                }
                for c in at >> self.header.cluster_bits..=(at + len - 1) >> self.header.cluster_bits {
                    *self.uses.entry(c).or_default() += times;
                }
            }
        }
        Ok(())
    }

    fn snapshots(&mut self, list: &SnapshotTable) -> Result<(), BlockError> {
        self.range(list.offset, list.length);
        list.entries.iter().try_for_each(|s| self.l1(s.l1_offset, s.l1_entries))
    }
}

/// Count again, raise what is too low, store it, and clear the dirty bit; `bitmaps`: the clusters that they use.
pub fn raise_counts(
    file: &dyn Store,
    header: &Header,
    refs: &mut Refcounts,
    (snapshots, bitmaps): (&SnapshotTable, &[u64]),
    external: bool,
) -> Result<(), BlockError> {
    let (uses, tables) = Default::default();
    let mut count = Count { file, header, external, uses, tables, read: 0 };
    count.range(0, 1);
    if let Some((offset, len)) = header.luks {
        count.range(offset, len);
    }
    for cluster in refs.own_clusters().iter().chain(bitmaps) {
        *count.uses.entry(*cluster).or_default() += 1;
    }
    count.l1(header.l1_offset, header.l1_size)?;
    count.snapshots(snapshots)?;
    count.l2_tables()?;
    let mut raised = 0u64;
    for (cluster, least) in &count.uses {
        raised += u64::from(refs.raise(file, *cluster, *least)?);
    }
    refs.write(file)?;
    file.sync()?;
    file.write_at(72, &(header.incompatible & !1).to_be_bytes())?;
    file.sync()?;
    log::info!("{}: {raised} reference counts repaired after a crash", file.path().display());
    Ok(())
}
