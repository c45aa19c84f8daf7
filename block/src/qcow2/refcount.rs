//! Reference counts of host clusters, kept in memory as far as they are used and written by
//! [`Refcounts::write`].

use std::collections::BTreeMap;

use crate::store::Store;
use crate::BlockError;

#[derive(Clone)]
struct Block {
    data: Vec<u8>,
    dirty: bool,
}

/// The reference count table and its blocks.
#[derive(Clone)]
pub struct Refcounts {
    cluster_bits: u32,
    order: u32,
    table_offset: u64,
    table: Vec<u64>,
    table_dirty: bool,
    /// The table lies at a new place that the header does not name yet: (old offset, old clusters).
    moved: Option<(u64, u64)>,
    blocks: BTreeMap<usize, Block>,
    /// Below this cluster nothing is free.
    hint: u64,
    /// Counts on disk while these ones are prepared beside them: what they use is not free yet.
    old: Option<Box<Refcounts>>,
}

/// The largest table: 8 MiB, as QEMU's.
const MAX_TABLE: usize = 1 << 20;
/// Bytes of counts that are copied at the most.
const MAX_COPY: usize = 256 << 20;

impl Refcounts {
    /// Read the table.
    pub fn read(
        file: &dyn Store,
        cluster_bits: u32,
        order: u32,
        offset: u64,
        clusters: u32,
    ) -> Result<Self, BlockError> {
        let mut raw = vec![0u8; (u64::from(clusters) << cluster_bits) as usize];
        file.read_at(offset, &mut raw)?;
        let table: Vec<u64> = super::to_u64(&raw);
        let cluster = 1u64 << cluster_bits;
        if let Some(bad) = table.iter().find(|e| !e.is_multiple_of(cluster) || **e >= 1 << 56) {
            return Err(BlockError::Corrupt(format!("reference count block at {bad:#x} is not aligned")));
        }
        let mut blocks: Vec<u64> = table.iter().copied().filter(|e| *e != 0).collect();
        blocks.sort_unstable();
        if let Some(twice) = blocks.windows(2).find(|w| w[0] == w[1]) {
            return Err(BlockError::Corrupt(format!("reference count block {:#x} is used twice", twice[0])));
        }
        Ok(Refcounts {
            cluster_bits,
            order,
            table_offset: offset,
            table,
            table_dirty: false,
            moved: None,
            blocks: BTreeMap::new(),
            hint: 0,
            old: None,
        })
    }

    fn per_block(&self) -> u64 {
        (8u64 << self.cluster_bits) >> self.order
    }

    fn block(&mut self, file: &dyn Store, index: usize) -> Result<Option<&mut Block>, BlockError> {
        let offset = self.table.get(index).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&index) {
            let mut data = vec![0u8; 1 << self.cluster_bits];
            file.read_at(offset, &mut data)?;
            self.blocks.insert(index, Block { data, dirty: false });
        }
        Ok(self.blocks.get_mut(&index))
    }

    /// The count of a host cluster.
    pub fn get(&mut self, file: &dyn Store, cluster: u64) -> Result<u64, BlockError> {
        let (per, order) = (self.per_block(), self.order);
        let slot = (cluster % per) as usize;
        Ok(self.block(file, (cluster / per) as usize)?.map_or(0, |b| load(&b.data, order, slot)))
    }

    fn set(&mut self, file: &dyn Store, cluster: u64, value: u64) -> Result<(), BlockError> {
        let (per, order) = (self.per_block(), self.order);
        self.ensure_block(file, (cluster / per) as usize, cluster)?;
        let slot = (cluster % per) as usize;
        if let Some(block) = self.block(file, (cluster / per) as usize)? {
            store(&mut block.data, order, slot, value);
            block.dirty = true;
        }
        Ok(())
    }

    /// Make the block `index` exist; `taken` is a cluster that is being allocated and may not hold it.
    fn ensure_block(&mut self, file: &dyn Store, index: usize, taken: u64) -> Result<(), BlockError> {
        if index >= self.table.len() {
            self.grow_table(file, index, taken)?;
        }
        if self.table[index] != 0 {
            return Ok(());
        }
        let place = self.find_free(file, taken + 1)?;
        self.table[index] = place << self.cluster_bits;
        self.table_dirty = true;
        self.blocks.insert(index, Block { data: vec![0; 1 << self.cluster_bits], dirty: true });
        // The block's own count: in itself, or in another block that this creates in turn.
        self.set(file, place, 1)
    }

    fn grow_table(&mut self, file: &dyn Store, index: usize, taken: u64) -> Result<(), BlockError> {
        let per_cluster = (1usize << self.cluster_bits) / 8;
        // Half as large again as needed, so that growth is rare.
        let entries = ((index + 1) * 3 / 2).next_multiple_of(per_cluster);
        if entries > MAX_TABLE {
            return Err(BlockError::Io(std::io::Error::from_raw_os_error(libc::EFBIG)));
        }
        let old = (self.table_offset, (self.table.len() / per_cluster) as u64);
        let clusters = (entries / per_cluster) as u64;
        // Behind everything that any block covers or the file holds, and behind what is being taken: certainly free.
        let covered = self.table.len() as u64 * self.per_block();
        let end = if file.grows_with_zeroes() { file.length().div_ceil(1 << self.cluster_bits) } else { 0 };
        let start = covered.max(end).max(taken + 1);
        self.table.resize(entries, 0);
        self.place_table(file, start, clusters, old)
    }

    /// The table, as long as it is now, goes to `start`; it was at `old`.
    fn place_table(
        &mut self,
        file: &dyn Store,
        start: u64,
        clusters: u64,
        old: (u64, u64),
    ) -> Result<(), BlockError> {
        self.table_offset = start << self.cluster_bits;
        self.table_dirty = true;
        if self.moved.is_some() {
            // Nothing on disk has ever named that place.
            let first = old.0 >> self.cluster_bits;
            for cluster in first..first + old.1 {
                self.set(file, cluster, 0)?;
            }
        }
        self.moved.get_or_insert(old);
        self.claim(file, start, clusters)
    }

    /// Count clusters that lie side by side and are free; the blocks that this needs lie behind them.
    fn claim(&mut self, file: &dyn Store, first: u64, count: u64) -> Result<(), BlockError> {
        let (per, last) = (self.per_block(), first + count - 1);
        for index in first / per..=last / per {
            self.ensure_block(file, index as usize, last)?;
        }
        (first..=last).try_for_each(|cluster| self.set(file, cluster, 1))
    }

    fn is_free(&mut self, file: &dyn Store, cluster: u64) -> Result<bool, BlockError> {
        if self.get(file, cluster)? != 0 {
            return Ok(false);
        }
        self.old.as_mut().map_or(Ok(true), |old| Ok(old.get(file, cluster)? == 0))
    }

    fn find_free(&mut self, file: &dyn Store, from: u64) -> Result<u64, BlockError> {
        let mut cluster = from;
        while !self.is_free(file, cluster)? {
            cluster += 1;
        }
        Ok(cluster)
    }

    /// Allocate `count` clusters side by side: the first one's number.
    pub fn allocate_run(&mut self, file: &dyn Store, count: u64) -> Result<u64, BlockError> {
        let mut first = self.find_free(file, self.hint.max(1))?;
        let mut have = 1;
        while have < count {
            if self.is_free(file, first + have)? {
                have += 1;
            } else {
                first = self.find_free(file, first + have + 1)?;
                have = 1;
            }
        }
        self.claim(file, first, count.max(1))?;
        if count <= 1 {
            self.hint = first + 1;
        }
        Ok(first)
    }

    /// A copy, with all blocks in memory, in which new counts are prepared while these stay on disk. There must
    /// be no changes in memory.
    pub fn prepare(&mut self, file: &dyn Store) -> Result<Refcounts, BlockError> {
        if self.table.iter().filter(|e| **e != 0).count() << self.cluster_bits > MAX_COPY {
            return Err(BlockError::Unsupported("the image is too large for this".into()));
        }
        for index in 0..self.table.len() {
            self.block(file, index)?;
        }
        let mut copy = self.clone();
        copy.old = Some(Box::new(self.clone()));
        copy.hint = 0;
        Ok(copy)
    }

    /// Give the table and every block of a prepared copy a new place.
    pub fn relocate(&mut self, file: &dyn Store) -> Result<(), BlockError> {
        let mut left = Vec::new();
        for index in 0..self.table.len() {
            if self.table[index] != 0 {
                let new = self.allocate_run(file, 1)?;
                left.push(self.table[index] >> self.cluster_bits);
                self.table[index] = new << self.cluster_bits;
                if let Some(block) = self.blocks.get_mut(&index) {
                    block.dirty = true;
                }
            }
        }
        if self.moved.is_none() {
            let clusters = (self.table.len() as u64 * 8) >> self.cluster_bits;
            let start = self.allocate_run(file, clusters)?;
            // Taking the clusters may itself have moved a table that was full.
            if self.moved.is_none() {
                self.place_table(file, start, clusters, (self.table_offset, clusters))?;
            } else {
                (start..start + clusters).try_for_each(|c| self.set(file, c, 0))?;
            }
        }
        if let Some((offset, clusters)) = self.moved.take() {
            let first = offset >> self.cluster_bits;
            left.extend(first..first + clusters);
        }
        for cluster in left {
            self.release(file, cluster)?;
        }
        Ok(())
    }

    /// Write a prepared copy, all of it at new places: offset and clusters of the table.
    pub fn write_prepared(&mut self, file: &dyn Store) -> Result<(u64, u32), BlockError> {
        for (index, block) in &mut self.blocks {
            if std::mem::take(&mut block.dirty) {
                file.write_at(self.table[*index], &block.data)?;
            }
        }
        let raw: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
        file.write_at(self.table_offset, &raw)?;
        self.table_dirty = false;
        Ok((self.table_offset, (raw.len() as u64 >> self.cluster_bits) as u32))
    }

    /// The prepared copy is what the header names now: what only the old counts used is free. Those clusters.
    pub fn adopt(&mut self) -> Vec<u64> {
        let Some(old) = self.old.take() else { return Vec::new() };
        self.hint = 0;
        let (per, order) = (self.per_block(), self.order);
        let mut freed = Vec::new();
        for (index, was) in &old.blocks {
            let Some(now) = self.blocks.get(index).filter(|now| now.data != was.data) else { continue };
            for slot in 0..per as usize {
                if load(&was.data, order, slot) != 0 && load(&now.data, order, slot) == 0 {
                    freed.push(*index as u64 * per + slot as u64);
                }
            }
        }
        freed
    }

    /// One reference more.
    pub fn add(&mut self, file: &dyn Store, cluster: u64) -> Result<(), BlockError> {
        let count = self.get(file, cluster)?;
        if count == 0 {
            return Err(BlockError::Corrupt(format!("cluster {cluster} is used but has no reference")));
        }
        let max = if self.order == 6 { u64::MAX } else { (1 << (1u64 << self.order)) - 1 };
        if count == max {
            let bits = 1u32 << self.order;
            return Err(BlockError::Unsupported(format!(
                "the image's reference counts of {bits} bits cannot count another snapshot"
            )));
        }
        self.set(file, cluster, count + 1)
    }

    /// Allocate up to `want` clusters that lie side by side: (the first one's number, how many). Cluster 0
    /// (the header) is never given.
    pub fn allocate(&mut self, file: &dyn Store, want: u64) -> Result<(u64, u64), BlockError> {
        let first = self.find_free(file, self.hint.max(1))?;
        let mut got = 0;
        while got < want.max(1) && (got == 0 || self.is_free(file, first + got)?) {
            self.set(file, first + got, 1)?;
            got += 1;
        }
        self.hint = first + got;
        Ok((first, got))
    }

    /// Make a count at least `least`; whether it was lower.
    pub fn raise(&mut self, file: &dyn Store, cluster: u64, least: u64) -> Result<bool, BlockError> {
        let low = self.get(file, cluster)? < least;
        if low {
            if self.order < 6 && least >> (1u32 << self.order) != 0 {
                return Err(BlockError::Corrupt(format!("cluster {cluster} is used {least} times")));
            }
            self.set(file, cluster, least)?;
        }
        Ok(low)
    }

    /// The clusters of the table and of its blocks.
    pub fn own_clusters(&self) -> Vec<u64> {
        let table = self.table_offset >> self.cluster_bits;
        let clusters = (self.table.len() as u64 * 8) >> self.cluster_bits;
        let blocks = self.table.iter().filter(|e| **e != 0).map(|e| e >> self.cluster_bits);
        (table..table + clusters).chain(blocks).collect()
    }

    /// One reference less.
    pub fn release(&mut self, file: &dyn Store, cluster: u64) -> Result<u64, BlockError> {
        let count = self.get(file, cluster)?;
        if count == 0 {
            return Err(BlockError::Corrupt(format!("cluster {cluster} is freed but has no reference")));
        }
        self.set(file, cluster, count - 1)?;
        if count == 1 {
            self.hint = self.hint.min(cluster);
        }
        Ok(count - 1)
    }

    /// Offset and length in bytes of the table.
    pub fn table_extent(&self) -> (u64, u64) {
        (self.table_offset, self.table.len() as u64 * 8)
    }

    /// Whether nothing in memory differs from what is on disk.
    pub fn is_clean(&self) -> bool {
        !self.table_dirty && self.moved.is_none() && self.blocks.values().all(|b| !b.dirty)
    }

    /// Whether the table itself changed, so that [`Self::write`] is needed.
    pub fn is_table_dirty(&self) -> bool {
        self.table_dirty
    }

    /// Copies of the changed blocks and their offsets; they count as written.
    pub fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        let mut out = Vec::new();
        for (index, block) in &mut self.blocks {
            if std::mem::take(&mut block.dirty) {
                out.push((self.table[*index], block.data.clone()));
            }
        }
        out
    }

    /// Write what changed, in this order: blocks, barrier, table, barrier, header. A crash in between leaves at
    /// most counts that are too high (leaks). Ends without a barrier for the last step written.
    pub fn write(&mut self, file: &dyn Store) -> Result<Option<(u64, u64)>, BlockError> {
        let moved = self.moved;
        let result = self.try_write(file);
        if result.is_err() {
            // All of it again the next time.
            self.blocks.values_mut().for_each(|b| b.dirty = true);
            self.table_dirty = true;
            self.moved = moved;
        }
        result
    }

    /// Blocks of [`Self::take_dirty`] could not be written: they are changed still.
    pub fn redo(&mut self, written: &[(u64, Vec<u8>)]) {
        for (index, block) in &mut self.blocks {
            block.dirty |= written.iter().any(|(offset, _)| *offset == self.table[*index]);
        }
    }

    fn try_write(&mut self, file: &dyn Store) -> Result<Option<(u64, u64)>, BlockError> {
        for (index, block) in &mut self.blocks {
            if block.dirty {
                file.write_at(self.table[*index], &block.data)?;
                block.dirty = false;
            }
        }
        if self.table_dirty {
            file.sync()?;
            let raw: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write_at(self.table_offset, &raw)?;
            self.table_dirty = false;
            if let Some(old) = self.moved.take() {
                file.sync()?;
                let clusters = (raw.len() as u64) >> self.cluster_bits;
                let mut place = self.table_offset.to_be_bytes().to_vec();
                place.extend((clusters as u32).to_be_bytes());
                file.write_at(48, &place)?;
                return Ok(Some(old));
            }
        }
        Ok(None)
    }
}

/// Read count `slot` of a block with counts of `1 << order` bits.
fn load(data: &[u8], order: u32, slot: usize) -> u64 {
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let per_byte = 8 / bits;
            let byte = data[slot / per_byte];
            u64::from(byte >> (bits * (slot % per_byte))) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1usize << (order - 3);
            data[slot * bytes..(slot + 1) * bytes].iter().fold(0, |acc, b| acc << 8 | u64::from(*b))
        }
    }
}

pub(super) fn store(data: &mut [u8], order: u32, slot: usize, value: u64) {
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let per_byte = 8 / bits;
            let shift = bits * (slot % per_byte);
            let mask = ((1u16 << bits) - 1) as u8;
            let byte = &mut data[slot / per_byte];
            *byte = *byte & !(mask << shift) | (value as u8 & mask) << shift;
        }
        _ => {
            let bytes = 1usize << (order - 3);
            data[slot * bytes..(slot + 1) * bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6u32 {
            let mut data = vec![0u8; 512];
            let max = if order == 6 { u64::MAX } else { (1u64 << (1 << order)) - 1 };
            for slot in 0..32 {
                super::store(&mut data, order, slot, (slot as u64 * 3) & max);
            }
            for slot in 0..32 {
                assert_eq!(
                    super::load(&data, order, slot),
                    (slot as u64 * 3) & max,
                    "order {order} slot {slot}"
                );
            }
        }
    }
}
