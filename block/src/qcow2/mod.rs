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
//! table without the reference is on stable storage, and when no request that began before is under way.
//!
//! # Snapshots and other lengths
//!
//! Internal snapshots and longer tables change counts, tables and flags in many places at once. No order of writes in
//! place is safe: a flag (`COPIED`) on disk must always fit a count that lies elsewhere. So all of it is prepared
//! beside what is there, in clusters that the stored counts call free: every block of counts, the table of counts,
//! the L2 tables whose flags change, the L1 tables, the list of snapshots. After a barrier one write of the
//! header's first sector (bytes 24 to 72) makes them the image's. Before that write the image is what it was,
//! without even a leak; after it, it is the new one. Both are consistent by themselves, so an interruption
//! needs no repair. Meanwhile no request is under way.
//!
//! # Requests side by side
//!
//! The tables are behind one lock, which is held to look up and to change them, not while guest data moves. A
//! cluster that is being allocated is marked busy until its table entry is set: others that need the same
//! cluster wait for it. A flush writes a copy of the changed tables and lets other requests go on.

mod bitmaps;
mod cluster;
mod create;
mod describe;
mod flush;
mod header;
mod map;
mod naming;
mod refcount;
mod repair;
mod resize;
mod snapshots;
mod switch;
mod vmstate;

pub use create::{create, create_overlay, format, CreateOptions, Preallocation};
pub use header::{Header, MAGIC};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::bitmap::StoredBitmap;
use crate::crypto::Volume;
use crate::node::Node;
use crate::store::Store;
use crate::{check_range, BlockError, Held, Image, ImageInfo, OpenOptions, Snapshot, SnapshotChange};
use refcount::Refcounts;
use snapshots::SnapshotTable;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Extended L2 entries: each of 32 subclusters is in the host cluster (low half), or zero (high half).
const SUBCLUSTERS: u64 = 32;
const ALL_ALLOCATED: u64 = 0xFFFF_FFFF;
const ALL_ZERO: u64 = 0xFFFF_FFFF << 32;
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
/// L2 tables kept in memory, in bytes.
const L2_CACHE: usize = 32 << 20;

#[derive(Default)]
struct L2 {
    entries: Vec<u64>,
    dirty: bool,
    /// A flush is writing a copy of it.
    writing: bool,
}

struct State {
    l1: Vec<u64>,
    l1_offset: u64,
    l1_dirty: bool,
    l2: BTreeMap<usize, L2>,
    refs: Refcounts,
    snapshots: SnapshotTable,
    /// Clusters that lose a reference when the tables without it are on stable storage.
    unreferenced: Vec<u64>,
    /// Clusters without which the tables are stored, and the first request that cannot know them any more.
    limbo: Vec<(u64, Vec<u64>)>,
    /// Requests under way, by number.
    active: BTreeSet<u64>,
    next_request: u64,
    /// Guest clusters that are being allocated.
    busy: BTreeSet<u64>,
    /// From this host offset on nothing was ever written.
    untouched: u64,
    poisoned: bool,
}

/// A qcow2 image.
pub struct Qcow2 {
    file: Arc<dyn Store>,
    /// Where guest data lies: the same, or an external data file.
    data: Arc<dyn Store>,
    external: bool,
    volume: Option<Volume>,
    header: Header,
    /// Virtual size in bytes.
    size: AtomicU64,
    /// The image below as the header names it.
    named: RwLock<Option<naming::Named>>,
    /// Changed only while no request is under way.
    backing: RwLock<Option<Arc<Node>>>,
    read_only: bool,
    discard: bool,
    detect_zeroes: bool,
    /// The autoclear bits that hold while the image is open.
    autoclear: AtomicU64,
    bitmaps: Mutex<bitmaps::Directory>,
    state: Mutex<State>,
    unpacked: cluster::Unpacked,
    /// A busy cluster was settled.
    settled: Condvar,
    /// One flush at a time.
    flushing: Mutex<()>,
    /// Held for reading by requests, for writing by what may not meet any.
    gate: RwLock<()>,
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
    /// Subclusters of a host cluster: the host offset and the bitmap (extended L2).
    Mixed(u64, u64),
}

/// A request under way: clusters that it may look at are not reused before it ends.
struct Active<'a> {
    image: &'a Qcow2,
    number: u64,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.image.state.lock() {
            state.active.remove(&self.number);
        }
    }
}

fn to_u64(raw: &[u8]) -> Vec<u64> {
    raw.chunks_exact(8)
        .map(|c| u64::from_be_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
        .collect()
}

fn broken<T>(_: T) -> BlockError {
    BlockError::Corrupt("an earlier request failed badly".into())
}

impl Qcow2 {
    /// The format over an open file; `depth` counts the backing chain.
    pub(crate) fn over(file: Arc<dyn Store>, options: &OpenOptions, depth: u32) -> Result<Self, BlockError> {
        Self::open(file, options, depth, None)
    }

    /// As [`Self::over`], with `backing` instead of what the header names.
    pub(crate) fn over_with(
        file: Arc<dyn Store>,
        options: &OpenOptions,
        backing: Option<Arc<Node>>,
    ) -> Result<Self, BlockError> {
        Self::open(file, options, 0, Some(backing))
    }

    pub(crate) fn open(
        file: Arc<dyn Store>,
        options: &OpenOptions,
        depth: u32,
        given: Option<Option<Arc<Node>>>,
    ) -> Result<Self, BlockError> {
        let header = Header::read(file.as_ref())?;
        let bad = |reason: &str| BlockError::Format { path: file.path().to_owned(), reason: reason.into() };
        if header.is_corrupt() && !options.read_only {
            return Err(bad("Image is corrupt; cannot be opened read/write"));
        }
        let mut raw = vec![0u8; header.l1_size as usize * 8];
        file.read_at(header.l1_offset, &mut raw)?;
        let refs = Refcounts::read(
            file.as_ref(),
            header.cluster_bits,
            header.refcount_order,
            header.refcount_offset,
            header.refcount_clusters,
        )?;
        let backing = match (&header.backing, given) {
            (_, Some(given)) => given,
            (None, None) => None,
            (Some(path), None) => {
                let below = OpenOptions {
                    format: header.backing_format.clone().filter(|f| f == "raw" || f == "qcow2"),
                    read_only: true,
                    locking: options.locking,
                    lock_later: false,
                    force_share: options.force_share,
                    direct: options.direct,
                    no_flush: true,
                    discard: false,
                    detect_zeroes: false,
                    reserve: crate::Reserve::No,
                    key_secret: options.backing_key_secret.clone(),
                    backing_key_secret: options.backing_key_secret.clone(),
                };
                Some(Node::open_depth(path, &below, depth + 1)?)
            }
        };
        let data = match &header.data_file {
            Some(name) if header.has_data_file() => {
                // The image's maker chose the name: it must not reach just any file of the host.
                let dir = file.path().parent().unwrap_or(std::path::Path::new(""));
                let named = std::path::Path::new(name);
                let parent = named.parent().unwrap_or(std::path::Path::new(""));
                let real = |p: &std::path::Path| {
                    std::fs::canonicalize(if p.as_os_str().is_empty() { ".".as_ref() } else { p }).ok()
                };
                let inside =
                    parent.as_os_str().is_empty() || real(parent).is_some_and(|p| Some(p) == real(dir));
                let (Some(leaf), true) = (named.file_name(), inside) else {
                    return Err(bad("an external data file that is not in the image's directory is refused"));
                };
                Some(crate::store::open(
                    &dir.join(leaf),
                    &OpenOptions { reserve: crate::Reserve::No, ..options.clone() },
                )?)
            }
            _ => None,
        };
        let volume = match header.luks {
            Some((offset, len)) => {
                let secret = options.key_secret.as_deref();
                Some(Volume::unlock(file.as_ref(), offset, len, secret, "encrypt.")?)
            }
            None => None,
        };
        // What the other bits vouch for is not kept up to date here.
        let mut kept = 0;
        if data.is_some() {
            kept |= header.autoclear & header::AUTOCLEAR_RAW_DATA;
        }
        if header.bitmaps.is_some() {
            kept |= header::AUTOCLEAR_BITMAPS;
        }
        // Another program that writes the image may be changing them.
        let directory = if options.force_share {
            bitmaps::Directory::default()
        } else {
            bitmaps::Directory::read(file.as_ref(), &header)?
        };
        let mut refs = refs;
        let snapshots = SnapshotTable::read(file.as_ref(), &header)?;
        if header.is_dirty() && !options.read_only {
            let more = directory.clusters(file.as_ref(), header.cluster_bits)?;
            repair::raise_counts(file.as_ref(), &header, &mut refs, (&snapshots, &more), data.is_some())?;
        }
        let state = State {
            l1: to_u64(&raw),
            l1_offset: header.l1_offset,
            snapshots,
            l1_dirty: false,
            l2: BTreeMap::new(),
            refs,
            unreferenced: Vec::new(),
            limbo: Vec::new(),
            active: BTreeSet::new(),
            next_request: 0,
            busy: BTreeSet::new(),
            untouched: file.length(),
            poisoned: false,
        };
        let external = data.is_some();
        let data = data.unwrap_or_else(|| Arc::clone(&file));
        let image =
            Qcow2 {
                // A sector's number is that of its place in the file.
                data: volume.as_ref().map_or_else(|| Arc::clone(&data), |v| v.over(Arc::clone(&data), 0)),
                external,
                volume,
                file,
                backing: RwLock::new(backing),
                read_only: options.read_only,
                discard: options.discard,
                detect_zeroes: options.detect_zeroes,
                autoclear: AtomicU64::new(kept),
                bitmaps: Mutex::new(directory),
                state: Mutex::new(state),
                unpacked: cluster::Unpacked::default(),
                settled: Condvar::new(),
                flushing: Mutex::new(()),
                gate: RwLock::new(()),
                size: AtomicU64::new(header.size),
                named: RwLock::new(
                    header.backing_text.clone().zip(header.backing.clone()).map(|(text, path)| {
                        naming::Named { text, path, format: header.backing_format.clone() }
                    }),
                ),
                header,
            };
        if !options.lock_later {
            Image::begin(&image)?;
        }
        Ok(image)
    }

    /// Size of a cluster in bytes.
    pub fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// The image below, if there is one.
    pub(crate) fn below(&self) -> Option<Arc<Node>> {
        self.backing.read().map_or(None, |b| b.clone())
    }

    /// Name another image below (or none) in the header of an image that [`create_overlay`] made. The write is one
    /// sector, or several of which only the first counts: it is there or not.
    pub(crate) fn rename_overlay(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        let (path, h) = (self.file.path(), &self.header);
        let mut raw = vec![0u8; 104];
        self.file.read_at(0, &mut raw)?;
        let backing = backing.map(|(name, format)| (name.to_owned(), format.to_owned()));
        let options = CreateOptions { backing, ..CreateOptions::new(h.size) };
        let mut head = create::head(path, &options, h.luks)?;
        // Tables may have moved since.
        head[36..64].copy_from_slice(&raw[36..64]);
        self.file.write_at(0, &head)?;
        Ok(self.file.sync()?)
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

    /// Let a request pass.
    fn enter(&self) -> Result<RwLockReadGuard<'_, ()>, BlockError> {
        self.gate.read().map_err(broken)
    }

    /// Wait until no request is under way, and let none in.
    fn quiesce(&self) -> Result<RwLockWriteGuard<'_, ()>, BlockError> {
        self.gate.write().map_err(broken)
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>, BlockError> {
        let state = self.state.lock().map_err(broken)?;
        if state.poisoned {
            return Err(BlockError::Corrupt(
                "reference counts do not fit the tables; the image takes no more writes".into(),
            ));
        }
        Ok(state)
    }

    /// Note that a request begins that may look at what the tables refer to now.
    fn begin(&self, state: &mut State) -> Active<'_> {
        let number = state.next_request;
        state.next_request += 1;
        state.active.insert(number);
        Active { image: self, number }
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
        self.size.load(Ordering::Relaxed)
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        let _request = self.enter()?;
        check_range(self, offset, buf.len() as u64, false)?;
        // Neighbouring clusters that lie side by side in the file are read in one go.
        let mut runs: Vec<(Place, u64, usize)> = Vec::new();
        let mut state = self.state.lock().map_err(broken)?;
        for (at, len) in self.pieces(offset, buf.len() as u64) {
            let mut place = self.place(&mut state, at)?;
            if let Place::Data(host) = &mut place {
                *host += at & (self.cluster() - 1);
            }
            match (runs.last_mut(), place) {
                (Some((Place::Data(start), _, have)), Place::Data(host)) if *start + *have as u64 == host => {
                    *have += len as usize;
                }
                (Some((Place::Unallocated, _, have)), Place::Unallocated) => *have += len as usize,
                _ => runs.push((place, at, len as usize)),
            }
        }
        let _active = self.begin(&mut state);
        drop(state);
        let mut rest = buf;
        for (place, at, len) in runs {
            let (now, later) = rest.split_at_mut(len);
            match place {
                Place::Data(host) => self.data.read_at(host, now)?,
                other => self.read_place(other, at, now)?,
            }
            rest = later;
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        self.own_extents(offset, len)
    }
    fn grain(&self) -> u64 {
        self.cluster()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let _request = self.enter()?;
        check_range(self, offset, data.len() as u64, true)?;
        self.relieve()?;
        if !self.detect_zeroes {
            return self.write_span(offset, data);
        }
        let mut at = 0usize;
        let mut from = 0usize;
        for (guest, len) in self.pieces(offset, data.len() as u64) {
            let piece = &data[at..at + len as usize];
            if len == self.cluster() && piece.iter().all(|b| *b == 0) {
                self.write_span(offset + from as u64, &data[from..at])?;
                self.zero_cluster(guest)?;
                from = at + len as usize;
            }
            at += len as usize;
        }
        self.write_span(offset + from as u64, &data[from..])
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<(), BlockError> {
        let _request = self.enter()?;
        check_range(self, offset, len, true)?;
        self.relieve()?;
        for (guest, part) in self.pieces(offset, len) {
            let reaches_end = guest + part == self.size();
            if part == self.cluster() || (reaches_end && guest.is_multiple_of(self.cluster())) {
                self.zero_cluster(guest)?;
            } else {
                self.write_span(guest, &vec![0; part as usize])?;
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        let _request = self.enter()?;
        check_range(self, offset, len, true)?;
        if !self.discard {
            return Ok(());
        }
        self.relieve()?;
        for (guest, part) in self.pieces(offset, len) {
            if part == self.cluster() {
                self.zero_cluster(guest)?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        let _request = self.enter()?;
        self.write_metadata()
    }

    fn resize(&self, size: u64) -> Result<(), BlockError> {
        self.change_size(size)
    }

    fn luks_area(&self) -> Option<Vec<u8>> {
        self.volume.as_ref().map(|v| v.area().to_vec())
    }

    fn backing(&self) -> Option<Arc<Node>> {
        self.below()
    }

    fn set_backing(&self, backing: Option<Arc<Node>>) -> Result<(), BlockError> {
        let _alone = self.quiesce()?;
        *self.backing.write().map_err(broken)? = backing;
        Ok(())
    }

    fn name_backing(&self, backing: Option<(&str, &str)>) -> Result<(), BlockError> {
        self.rewrite_backing(backing)
    }

    fn held(&self, offset: u64) -> Result<(Held, u64), BlockError> {
        check_range(self, offset, 1, false)?;
        let mut state = self.lock()?;
        let held = match self.place(&mut state, offset)? {
            Place::Unallocated => Held::None,
            Place::Mixed(_, bitmap) if (bitmap | bitmap >> 32) & ALL_ALLOCATED != ALL_ALLOCATED => Held::Part,
            _ => Held::Whole,
        };
        let end = (offset / self.cluster() + 1) * self.cluster();
        Ok((held, end.min(self.size()) - offset))
    }

    fn is_zero(&self, offset: u64) -> Result<(bool, u64), BlockError> {
        check_range(self, offset, 1, false)?;
        self.zero_run(offset)
    }

    fn lock_file(&self) -> Result<(), BlockError> {
        self.file.lock(!self.read_only)
    }

    fn begin(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        let kept = self.autoclear.load(Ordering::Relaxed);
        if self.header.autoclear & !kept != 0 {
            self.file.write_at(88, &kept.to_be_bytes())?;
        }
        self.begin_bitmaps()
    }

    fn stored_bitmaps(&self) -> Result<Vec<StoredBitmap>, BlockError> {
        self.read_bitmaps()
    }

    fn check_bitmap(&self, name: &str, granularity: u64, others: &[String]) -> Result<(), BlockError> {
        self.check_new_bitmap(name, granularity, others)
    }

    fn keep_bitmaps(&self, bitmaps: &[StoredBitmap]) -> Result<(), BlockError> {
        self.store_bitmaps(bitmaps)
    }

    fn drop_bitmap(&self, name: &str) -> Result<(), BlockError> {
        self.forget_bitmap(name)
    }

    fn snapshot(&self, change: &SnapshotChange) -> Result<Snapshot, BlockError> {
        self.change_snapshots(change)
    }

    fn write_vm_state(&self, at: u64, data: &[u8]) -> Result<(), BlockError> {
        self.store_vm_state(at, data)
    }

    fn drop_vm_state(&self) -> Result<(), BlockError> {
        self.forget_vm_state()
    }

    fn read_vm_state(&self, id: &str, at: u64, buf: &mut [u8]) -> Result<(), BlockError> {
        self.read_kept_vm_state(id, at, buf)
    }

    fn info(&self) -> ImageInfo {
        self.describe()
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
