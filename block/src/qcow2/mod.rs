//! The qcow2 format: reading and writing guest clusters.
//!
//! # Order of metadata writes
//!
//! Guest data is written at once; changed metadata stays in memory until [`Image::flush`], which writes it
//! in steps with a barrier (fdatasync) between them:
//!
//! 1. reference counts of newly allocated clusters (and with the same barrier the data in them);
//! 2. L2 tables that refer to those clusters;
//! 3. the L1 table, where L2 tables were allocated or copied.
//!
//! So whatever a table on disk refers to has been counted and written before: a loss of power at any moment
//! leaves at most counts that are too high (leaked clusters), never a reference to a free cluster. The other
//! direction is delayed: a cluster that lost its reference is counted down, and may be reused, only after the
//! table without the reference is on stable storage.

mod create;
mod header;
mod refcount;

pub use create::create_overlay;
pub use header::{Header, MAGIC};

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex};

use crate::file::HostFile;
use crate::{check_range, BlockError, Image, OpenOptions};
use refcount::Refcounts;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
/// L2 tables kept in memory, in bytes.
const L2_CACHE: usize = 32 << 20;

struct L2 {
    entries: Vec<u64>,
    dirty: bool,
}

struct State {
    l1: Vec<u64>,
    l1_dirty: bool,
    l2: BTreeMap<usize, L2>,
    refs: Refcounts,
    /// Clusters that lose a reference when the tables without it are on stable storage.
    unreferenced: Vec<u64>,
    poisoned: bool,
}

/// A qcow2 image.
pub struct Qcow2 {
    file: HostFile,
    header: Header,
    backing: Option<Arc<dyn Image>>,
    read_only: bool,
    discard: bool,
    detect_zeroes: bool,
    state: Mutex<State>,
}

/// Where a guest cluster's contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the backing image, or zero where there is none.
    Unallocated,
    /// Zero; the host cluster kept for it, if any.
    Zero(Option<u64>),
    /// At a host offset.
    Data(u64),
    /// Compressed: the L2 entry.
    Compressed(u64),
}

fn to_u64(raw: &[u8]) -> Vec<u64> {
    raw.chunks_exact(8)
        .map(|c| u64::from_be_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
        .collect()
}

impl Qcow2 {
    /// The format over an open file; `depth` counts the backing chain.
    pub(crate) fn over(file: HostFile, options: &OpenOptions, depth: u32) -> Result<Self, BlockError> {
        Self::open(file, options, depth, None)
    }

    /// As [`Self::over`], with `backing` instead of what the header names.
    pub(crate) fn over_with(
        file: HostFile,
        options: &OpenOptions,
        backing: Arc<dyn Image>,
    ) -> Result<Self, BlockError> {
        Self::open(file, options, 0, Some(backing))
    }

    fn open(
        file: HostFile,
        options: &OpenOptions,
        depth: u32,
        given: Option<Arc<dyn Image>>,
    ) -> Result<Self, BlockError> {
        let header = Header::read(&file)?;
        let mut raw = vec![0u8; header.l1_size as usize * 8];
        file.read_at(header.l1_offset, &mut raw)?;
        let refs = Refcounts::read(
            &file,
            header.cluster_bits,
            header.refcount_order,
            header.refcount_offset,
            header.refcount_clusters,
        )?;
        let backing = match (&header.backing, given) {
            (_, Some(given)) => Some(given),
            (None, None) => None,
            (Some(path), None) => {
                let below = OpenOptions {
                    format: header.backing_format.clone().filter(|f| f == "raw" || f == "qcow2"),
                    read_only: true,
                    locking: options.locking,
                    force_share: options.force_share,
                    direct: options.direct,
                    no_flush: true,
                    discard: false,
                    detect_zeroes: false,
                };
                Some(Arc::from(crate::open_depth(path, &below, depth + 1)?))
            }
        };
        if !options.read_only && header.autoclear != 0 {
            // What these bits vouch for (bitmaps) is not kept up to date here.
            file.write_at(88, &0u64.to_be_bytes())?;
        }
        let state = State {
            l1: to_u64(&raw),
            l1_dirty: false,
            l2: BTreeMap::new(),
            refs,
            unreferenced: Vec::new(),
            poisoned: false,
        };
        Ok(Qcow2 {
            file,
            header,
            backing,
            read_only: options.read_only,
            discard: options.discard,
            detect_zeroes: options.detect_zeroes,
            state: Mutex::new(state),
        })
    }

    /// Size of a cluster in bytes.
    pub fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Read what is not in this image from `backing`, an image of the same contents as the one so far.
    pub(crate) fn set_backing(&mut self, backing: Arc<dyn Image>) {
        self.backing = Some(backing);
    }

    /// Whether the cluster at `guest` is in this image (not in its backing image).
    pub(crate) fn holds(&self, guest: u64) -> Result<bool, BlockError> {
        let mut state = self.lock()?;
        Ok(self.place(&mut state, guest)? != Place::Unallocated)
    }

    /// Forget the cluster at `guest`: it is read from the backing image from now on.
    pub(crate) fn forget(&self, guest: u64) -> Result<(), BlockError> {
        let mut state = self.lock()?;
        if self.place(&mut state, guest)? == Place::Unallocated {
            return Ok(());
        }
        self.set_entry(&mut state, guest, 0)
    }

    /// The file's path.
    pub(crate) fn path(&self) -> &std::path::Path {
        self.file.path()
    }

    fn lock(&self) -> Result<std::sync::MutexGuard<'_, State>, BlockError> {
        let state =
            self.state.lock().map_err(|_| BlockError::Corrupt("an earlier request failed badly".into()))?;
        if state.poisoned {
            return Err(BlockError::Corrupt(
                "metadata could not be written earlier; the image takes no more writes".into(),
            ));
        }
        Ok(state)
    }

    /// (index in L1, index in L2) of a guest offset.
    fn indices(&self, guest: u64) -> (usize, usize) {
        let l2_bits = self.header.cluster_bits - 3;
        let cluster = guest >> self.header.cluster_bits;
        ((cluster >> l2_bits) as usize, (cluster & ((1 << l2_bits) - 1)) as usize)
    }

    /// Load the L2 table for L1 entry `index`; false if there is none.
    fn load_l2(&self, state: &mut State, index: usize) -> Result<bool, BlockError> {
        if state.l2.contains_key(&index) {
            return Ok(true);
        }
        let entry =
            *state.l1.get(index).ok_or_else(|| BlockError::Corrupt("the L1 table is too short".into()))?;
        let offset = entry & OFFSET;
        if offset == 0 {
            return Ok(false);
        }
        self.check_host(offset, "an L2 table")?;
        if state.l2.len() << self.header.cluster_bits > L2_CACHE {
            let clean = state.l2.iter().find(|(_, t)| !t.dirty).map(|(i, _)| *i);
            match clean {
                Some(i) => {
                    state.l2.remove(&i);
                }
                None => self.write_metadata(state)?,
            }
        }
        let mut raw = vec![0u8; self.cluster() as usize];
        self.file.read_at(offset, &mut raw)?;
        state.l2.insert(index, L2 { entries: to_u64(&raw), dirty: false });
        Ok(true)
    }

    /// A table or data cluster must be aligned and may not be the header or a table of the first rank.
    fn check_host(&self, offset: u64, what: &str) -> Result<(), BlockError> {
        let h = &self.header;
        let within = |start: u64, len: u64| offset >= start && offset < start + len;
        if !offset.is_multiple_of(self.cluster())
            || offset == 0
            || within(h.l1_offset, u64::from(h.l1_size) * 8)
            || within(h.refcount_offset, u64::from(h.refcount_clusters) << h.cluster_bits)
        {
            return Err(BlockError::Corrupt(format!("{what} lies at {offset:#x}")));
        }
        Ok(())
    }

    fn place(&self, state: &mut State, guest: u64) -> Result<Place, BlockError> {
        let (l1, l2) = self.indices(guest);
        if !self.load_l2(state, l1)? {
            return Ok(Place::Unallocated);
        }
        let entry = state.l2[&l1].entries[l2];
        if entry & COMPRESSED != 0 {
            return Ok(Place::Compressed(entry));
        }
        let offset = entry & OFFSET;
        if offset != 0 {
            self.check_host(offset, "a data cluster")?;
        }
        if entry & ZERO != 0 && self.header.version >= 3 {
            return Ok(Place::Zero((offset != 0 && entry & COPIED != 0).then_some(offset)));
        }
        Ok(if offset == 0 { Place::Unallocated } else { Place::Data(offset) })
    }

    /// Whether the host cluster of a data place may be overwritten (no snapshot shares it).
    fn is_own(&self, state: &State, guest: u64) -> bool {
        let (l1, l2) = self.indices(guest);
        state.l1[l1] & COPIED != 0 && state.l2.get(&l1).is_some_and(|t| t.entries[l2] & COPIED != 0)
    }

    /// (offset, length) in the file of a compressed cluster's data.
    fn compressed_extent(&self, entry: u64) -> (u64, u64) {
        let shift = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
        (offset, sectors * 512 - (offset & 511))
    }

    fn read_compressed(&self, entry: u64) -> Result<Vec<u8>, BlockError> {
        let (offset, len) = self.compressed_extent(entry);
        let mut packed = vec![0u8; len as usize];
        self.file.read_at(offset, &mut packed)?;
        let mut out = vec![0u8; self.cluster() as usize];
        flate2::read::DeflateDecoder::new(packed.as_slice()).read_exact(&mut out).map_err(|e| {
            BlockError::Corrupt(format!("a compressed cluster at {offset:#x} is not readable: {e}"))
        })?;
        Ok(out)
    }

    fn read_backing(&self, guest: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let Some(backing) = &self.backing else {
            buf.fill(0);
            return Ok(());
        };
        let available = backing.size().saturating_sub(guest).min(buf.len() as u64) as usize;
        let (inside, past) = buf.split_at_mut(available);
        past.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        backing.read_at(guest, inside)
    }

    fn read_place(&self, place: Place, guest: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let within = guest & (self.cluster() - 1);
        match place {
            Place::Unallocated => self.read_backing(guest, buf),
            Place::Zero(_) => {
                buf.fill(0);
                Ok(())
            }
            Place::Data(host) => Ok(self.file.read_at(host + within, buf)?),
            Place::Compressed(entry) => {
                let data = self.read_compressed(entry)?;
                let at = within as usize;
                buf.copy_from_slice(&data[at..at + buf.len()]);
                Ok(())
            }
        }
    }

    /// The L2 table of a guest offset, made writable: allocated, or copied if a snapshot shares it.
    fn writable_l2(&self, state: &mut State, l1: usize) -> Result<(), BlockError> {
        let exists = self.load_l2(state, l1)?;
        let old = state.l1[l1];
        if exists && old & COPIED != 0 {
            return Ok(());
        }
        let cluster = state.refs.allocate(&self.file)?;
        if exists {
            state.unreferenced.push((old & OFFSET) >> self.header.cluster_bits);
        } else {
            state.l2.insert(l1, L2 { entries: vec![0; self.cluster() as usize / 8], dirty: true });
        }
        if let Some(table) = state.l2.get_mut(&l1) {
            table.dirty = true;
        }
        state.l1[l1] = cluster << self.header.cluster_bits | COPIED;
        state.l1_dirty = true;
        Ok(())
    }

    /// Set an L2 entry, dropping the reference of what it held.
    fn set_entry(&self, state: &mut State, guest: u64, new: u64) -> Result<(), BlockError> {
        let (l1, l2) = self.indices(guest);
        self.writable_l2(state, l1)?;
        let bits = self.header.cluster_bits;
        let Some(table) = state.l2.get_mut(&l1) else { return Ok(()) };
        let old = std::mem::replace(&mut table.entries[l2], new);
        table.dirty = true;
        if old & COMPRESSED != 0 {
            let (offset, len) = self.compressed_extent(old);
            state.unreferenced.extend(offset >> bits..=(offset + len - 1) >> bits);
        } else if old & OFFSET != 0 && old & OFFSET != new & OFFSET {
            state.unreferenced.push((old & OFFSET) >> bits);
        }
        Ok(())
    }

    /// Write within one guest cluster.
    fn write_cluster(&self, state: &mut State, guest: u64, data: &[u8]) -> Result<(), BlockError> {
        let size = self.cluster();
        let start = guest & !(size - 1);
        let within = (guest - start) as usize;
        let place = self.place(state, guest)?;
        if let Place::Data(host) = place {
            if self.is_own(state, guest) {
                return Ok(self.file.write_at(host + within as u64, data)?);
            }
        }
        // A new host cluster (or the one kept for zeroes) gets the whole contents.
        let mut whole;
        let contents = if data.len() as u64 == size {
            data
        } else {
            whole = vec![0u8; size as usize];
            // The last cluster of an image may reach past its end.
            let valid = (self.header.size - start).min(size) as usize;
            self.read_place(place, start, &mut whole[..valid])?;
            whole[within..within + data.len()].copy_from_slice(data);
            &whole
        };
        let host = match place {
            Place::Zero(Some(kept)) if self.is_own(state, guest) => kept,
            _ => state.refs.allocate(&self.file)? << self.header.cluster_bits,
        };
        self.file.write_at(host, contents)?;
        self.set_entry(state, guest, host | COPIED)
    }

    /// Make whole guest clusters read as zero.
    fn zero_cluster(&self, state: &mut State, guest: u64) -> Result<(), BlockError> {
        match self.place(state, guest)? {
            Place::Unallocated if self.backing.is_none() => Ok(()),
            Place::Zero(_) => Ok(()),
            _ if self.backing.is_none() => self.set_entry(state, guest, 0),
            _ if self.header.version >= 3 => self.set_entry(state, guest, ZERO),
            // Version 2 cannot say "zero" above a backing image.
            _ => self.write_cluster(state, guest & !(self.cluster() - 1), &vec![0; self.cluster() as usize]),
        }
    }

    /// Write all changed metadata; see the module's documentation for the order.
    fn write_metadata(&self, state: &mut State) -> Result<(), BlockError> {
        let result = self.try_write_metadata(state);
        if result.is_err() {
            // What is on disk is consistent, but memory is ahead of it: nothing may build on it.
            state.poisoned = true;
        }
        result
    }

    fn try_write_metadata(&self, state: &mut State) -> Result<(), BlockError> {
        let bits = self.header.cluster_bits;
        // Clusters that were allocated but not written (preallocated tables) must exist in the file.
        if state.refs.is_dirty() {
            if let Some((old, clusters)) = state.refs.write(&self.file)? {
                state.unreferenced.extend((old >> bits)..(old >> bits) + clusters);
            }
        }
        self.file.sync()?;
        let mut l2_written = false;
        for (index, table) in &mut state.l2 {
            if table.dirty {
                let raw: Vec<u8> = table.entries.iter().flat_map(|e| e.to_be_bytes()).collect();
                self.file.write_at(state.l1[*index] & OFFSET, &raw)?;
                table.dirty = false;
                l2_written = true;
            }
        }
        if l2_written {
            self.file.sync()?;
        }
        if state.l1_dirty {
            let raw: Vec<u8> = state.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            self.file.write_at(self.header.l1_offset, &raw)?;
            self.file.sync()?;
            state.l1_dirty = false;
        }
        for cluster in std::mem::take(&mut state.unreferenced) {
            if state.refs.release(&self.file, cluster)? == 0 && self.discard {
                self.file.punch(cluster << bits, 1 << bits);
            }
        }
        Ok(())
    }

    /// Walk a range in pieces that lie within one cluster each.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
        let size = self.cluster();
        let end = offset + len;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let next = ((at & !(size - 1)) + size).min(end);
            let piece = (at, next - at);
            at = next;
            Some(piece)
        })
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.header.size
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        check_range(self, offset, buf.len() as u64, false)?;
        let mut state =
            self.state.lock().map_err(|_| BlockError::Corrupt("an earlier request failed badly".into()))?;
        // Neighbouring clusters that lie side by side in the file are read in one go.
        let mut rest = buf;
        let mut run: Option<(u64, u64, usize)> = None;
        let mut guest = offset;
        let flush = |run: &mut Option<(u64, u64, usize)>, rest: &mut &mut [u8]| -> Result<(), BlockError> {
            if let Some((_, host, len)) = run.take() {
                let (now, later) = std::mem::take(rest).split_at_mut(len);
                self.file.read_at(host, now)?;
                *rest = later;
            }
            Ok(())
        };
        for (at, len) in self.pieces(offset, rest.len() as u64) {
            debug_assert_eq!(at, guest);
            guest = at + len;
            let place = self.place(&mut state, at)?;
            if let Place::Data(host) = place {
                let host = host + (at & (self.cluster() - 1));
                match &mut run {
                    Some((_, start, have)) if *start + *have as u64 == host => {
                        *have += len as usize;
                        continue;
                    }
                    _ => {
                        flush(&mut run, &mut rest)?;
                        run = Some((at, host, len as usize));
                        continue;
                    }
                }
            }
            flush(&mut run, &mut rest)?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len as usize);
            self.read_place(place, at, now)?;
            rest = later;
        }
        flush(&mut run, &mut rest)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        check_range(self, offset, data.len() as u64, true)?;
        let mut state = self.lock()?;
        let mut at = 0usize;
        for (guest, len) in self.pieces(offset, data.len() as u64) {
            let piece = &data[at..at + len as usize];
            at += len as usize;
            if self.detect_zeroes && len == self.cluster() && piece.iter().all(|b| *b == 0) {
                self.zero_cluster(&mut state, guest)?;
            } else {
                self.write_cluster(&mut state, guest, piece)?;
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<(), BlockError> {
        check_range(self, offset, len, true)?;
        let mut state = self.lock()?;
        for (guest, part) in self.pieces(offset, len) {
            let reaches_end = guest + part == self.header.size;
            if part == self.cluster() || (reaches_end && guest.is_multiple_of(self.cluster())) {
                self.zero_cluster(&mut state, guest)?;
            } else {
                self.write_cluster(&mut state, guest, &vec![0; part as usize])?;
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        check_range(self, offset, len, true)?;
        if !self.discard {
            return Ok(());
        }
        let mut state = self.lock()?;
        for (guest, part) in self.pieces(offset, len) {
            if part == self.cluster() {
                self.zero_cluster(&mut state, guest)?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        let mut state = self.lock()?;
        let changed = state.refs.is_dirty()
            || state.l1_dirty
            || !state.unreferenced.is_empty()
            || state.l2.values().any(|t| t.dirty);
        if changed {
            self.write_metadata(&mut state)
        } else {
            Ok(self.file.sync()?)
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.read_only {
            return;
        }
        // Twice: the first writes the tables, the second the counts of what they no longer refer to.
        for _ in 0..2 {
            if let Err(e) = self.flush() {
                log::error!("{}: the image's metadata could not be written: {e}", self.file.path().display());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
