//! Dirty bitmaps that the image keeps (QEMU's `docs/interop/qcow2.txt`, "Bitmaps").
//!
//! While an image is open for writing, each of its bitmaps is marked as in use on disk: a crash leaves it so, and a
//! bitmap that was in use is never believed again. The autoclear bit vouches for the whole extension; it is off while
//! the directory is changed in place. New contents go into new clusters, to which one write of the header's first
//! sector switches; the old ones are free after that.

use super::flush::bytes;
use super::header::{AUTOCLEAR_BITMAPS, MAX_BITMAPS, MAX_BITMAP_DIRECTORY};
use super::{to_u64, Header, Qcow2};
use crate::bitmap::{StoredBitmap, MAX_NAME};
use crate::bits::Bits;
use crate::store::Store;
use crate::{BlockError, Image};

const IN_USE: u32 = 1;
const AUTO: u32 = 2;
/// QEMU's bounds: entries of a table, bytes of a bitmap.
const MAX_TABLE: u32 = 0x800_0000;
const MAX_BITMAP: u64 = 0x2000_0000;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Bits of a table's entry: reserved ones, and "all ones" of one without a cluster.
const RESERVED: u64 = 0xFF00_0000_0000_01FE;
const ENTRY_OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const ALL_ONES: u64 = 1;

/// A bitmap's entry in the directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    flags: u32,
    granularity_bits: u8,
    table: u64,
    entries: u32,
    /// What it says can be believed: it was not in use when this program opened the image.
    good: bool,
}

/// The directory as it lies in the image.
#[derive(Clone, Debug, Default)]
pub(super) struct Directory {
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    pub entries: Vec<Entry>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |acc, b| acc << 8 | u64::from(*b))
}

impl Entry {
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Whether another program (or this one) has it open for writing, or had when it ended.
    pub fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    pub fn is_auto(&self) -> bool {
        self.flags & AUTO != 0
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.table.to_be_bytes().to_vec();
        out.extend(self.entries.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out.extend([1, self.granularity_bits]);
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend([0; 4]);
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    /// Whether the entry is what the format allows for an image of `size` bytes.
    fn is_sane(&self, size: u64, cluster: u64) -> bool {
        let stored = u64::from(self.entries) * cluster;
        GRANULARITY_BITS.contains(&self.granularity_bits)
            && self.entries != 0
            && self.entries <= MAX_TABLE
            && self.table != 0
            && self.table < 1 << 56
            && self.table.is_multiple_of(cluster)
            && self.flags & !(IN_USE | AUTO) == 0
            && stored <= MAX_BITMAP
            && (self.is_in_use() || u128::from(size) <= u128::from(stored * 8) << self.granularity_bits)
    }
}

impl Directory {
    /// Read the directory that the header names.
    pub fn read(file: &dyn Store, header: &Header) -> Result<Self, BlockError> {
        let Some(ext) = header.bitmaps else { return Ok(Self::default()) };
        let bad = |reason: String| BlockError::Format { path: file.path().to_owned(), reason };
        let broken = || bad("Broken bitmap directory".into());
        let mut raw = vec![0; ext.length as usize];
        if ext.offset.saturating_add(ext.length) > file.length() {
            return Err(broken());
        }
        file.read_at(ext.offset, &mut raw)?;
        let mut directory = Directory { offset: ext.offset, length: ext.length, entries: Vec::new() };
        let mut rest = raw.as_slice();
        while !rest.is_empty() {
            let head = rest.get(..24).ok_or_else(broken)?;
            let (name, extra) = (number(&head[18..20]) as usize, number(&head[20..24]) as usize);
            if extra != 0 {
                return Err(bad("Bitmap extra data is not supported".into()));
            }
            let len = (24 + name).next_multiple_of(8);
            let text = rest.get(24..24 + name).filter(|_| rest.len() >= len).ok_or_else(broken)?;
            let entry = Entry {
                name: String::from_utf8_lossy(text).into_owned(),
                flags: number(&head[12..16]) as u32,
                granularity_bits: head[17],
                table: number(&head[..8]),
                entries: number(&head[8..12]) as u32,
                good: number(&head[12..16]) as u32 & IN_USE == 0,
            };
            let known = head[16] == 1 && name <= MAX_NAME && entry.name.len() == name;
            if !known || !entry.is_sane(header.size, 1 << header.cluster_bits) {
                let text = format!("Bitmap '{}' doesn't satisfy the constraints", entry.name);
                return Err(bad(text));
            }
            directory.entries.push(entry);
            rest = &rest[len..];
        }
        if directory.entries.len() as u64 != u64::from(ext.count) {
            let which = if directory.entries.len() as u64 > u64::from(ext.count) { "More" } else { "Less" };
            return Err(bad(format!("{which} bitmaps found than specified in header extension")));
        }
        Ok(directory)
    }

    fn bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(Entry::bytes).collect()
    }

    /// The clusters of the directory, of the tables and of what they lead to.
    pub fn clusters(&self, file: &dyn Store, bits: u32) -> Result<Vec<u64>, BlockError> {
        let mut out = clusters(self.offset, self.length, bits);
        for entry in &self.entries {
            out.extend(entry.clusters(file, bits)?);
        }
        Ok(out)
    }
}

fn clusters(offset: u64, len: u64, bits: u32) -> Vec<u64> {
    if len == 0 {
        return Vec::new();
    }
    (offset >> bits..=(offset + len - 1) >> bits).collect()
}

impl Entry {
    fn read_table(&self, file: &dyn Store, bits: u32) -> Result<Vec<u64>, BlockError> {
        let len = u64::from(self.entries) * 8;
        let bad = || {
            BlockError::Corrupt(format!(
                "Could not read bitmap_table table from image for bitmap '{}'",
                self.name
            ))
        };
        if self.table.saturating_add(len) > file.length() {
            return Err(bad());
        }
        let mut raw = vec![0; len as usize];
        file.read_at(self.table, &mut raw)?;
        let table = to_u64(&raw);
        let is_good = |e: &u64| {
            let offset = e & ENTRY_OFFSET;
            e & RESERVED == 0 && offset.is_multiple_of(1 << bits) && (offset == 0 || e & ALL_ONES == 0)
        };
        table.iter().all(is_good).then_some(table).ok_or_else(bad)
    }

    fn clusters(&self, file: &dyn Store, bits: u32) -> Result<Vec<u64>, BlockError> {
        let mut out = clusters(self.table, u64::from(self.entries) * 8, bits);
        let data = self.read_table(file, bits)?;
        out.extend(data.iter().map(|e| (e & ENTRY_OFFSET) >> bits).filter(|c| *c != 0));
        Ok(out)
    }

    fn load(&self, file: &dyn Store, bits: u32, size: u64) -> Result<Bits, BlockError> {
        let cluster = 1u64 << bits;
        let bad = || BlockError::Corrupt(format!("Could not read bitmap '{}' from image", self.name));
        if Bits::stored_len(size, self.granularity()).div_ceil(cluster) != u64::from(self.entries) {
            return Err(bad());
        }
        let mut out = Bits::new(size, self.granularity());
        let mut data = vec![0; cluster as usize];
        for (n, entry) in self.read_table(file, bits)?.into_iter().enumerate() {
            match entry & ENTRY_OFFSET {
                0 if entry & ALL_ONES == 0 => continue,
                0 => data.fill(0xFF),
                offset if offset >= file.length() => return Err(bad()),
                offset => file.read_at(offset, &mut data)?,
            }
            out.add_bytes(n as u64 * cluster, &data);
        }
        Ok(out)
    }
}

impl Qcow2 {
    /// Mark every bitmap as in use: the image is about to be written.
    pub(super) fn begin_bitmaps(&self) -> Result<(), BlockError> {
        let mut directory = self.bitmaps.lock().map_err(super::broken)?;
        if !directory.entries.iter().any(|e| !e.is_in_use()) {
            return Ok(());
        }
        let kept = self.autoclear.load(std::sync::atomic::Ordering::Relaxed);
        let put = |bits: u64| -> Result<(), BlockError> {
            self.file.write_at(88, &bits.to_be_bytes())?;
            Ok(self.file.sync()?)
        };
        directory.entries.iter_mut().for_each(|e| e.flags |= IN_USE);
        put(kept & !AUTOCLEAR_BITMAPS)?;
        self.file.write_at(directory.offset, &directory.bytes())?;
        self.file.sync()?;
        put(kept)
    }

    /// Those that the file keeps, with their contents.
    pub(super) fn read_bitmaps(&self) -> Result<Vec<StoredBitmap>, BlockError> {
        let directory = self.bitmaps.lock().map_err(super::broken)?;
        let (file, bits) = (self.file.as_ref(), self.header.cluster_bits);
        let load = |e: &Entry| {
            Ok(StoredBitmap {
                name: e.name.clone(),
                granularity: e.granularity(),
                auto: e.is_auto(),
                bits: e.good.then(|| e.load(file, bits, self.size())).transpose()?,
            })
        };
        directory.entries.iter().map(load).collect()
    }

    /// Why a new bitmap could not be kept, in QEMU's words; `others`: the names of those that are to be.
    pub(super) fn check_new_bitmap(
        &self,
        name: &str,
        granularity: u64,
        others: &[String],
    ) -> Result<(), BlockError> {
        let fail = |text: String| Err(BlockError::Unsupported(text));
        if self.header.version < 3 {
            return fail("Cannot store dirty bitmaps in qcow2 v2 files".into());
        }
        let max = 1u64 << *GRANULARITY_BITS.end();
        if granularity > max {
            return fail(format!("Granularity exceeds maximum ({max} bytes)"));
        }
        let len = Bits::stored_len(self.size(), granularity);
        if len > MAX_BITMAP || len > u64::from(MAX_TABLE) * self.cluster() {
            return fail("Too much space will be occupied by the bitmap. Use larger granularity".into());
        }
        if name.len() > MAX_NAME {
            return fail(format!("Name length exceeds maximum ({MAX_NAME} characters)"));
        }
        let entry = |name: &str| (24 + name.len()).next_multiple_of(8) as u64;
        if others.len() as u64 >= u64::from(MAX_BITMAPS) {
            return fail("Maximum number of persistent bitmaps is already reached".into());
        }
        if others.iter().map(|n| entry(n)).sum::<u64>() + entry(name) > MAX_BITMAP_DIRECTORY {
            return fail("Not enough space in the bitmap directory".into());
        }
        Ok(())
    }

    /// Keep these with their contents (those without: what the file has of them); none of them is in use then.
    pub(super) fn store_bitmaps(&self, wanted: &[StoredBitmap]) -> Result<(), BlockError> {
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        let _alone = self.quiesce()?;
        let mut directory = self.bitmaps.lock().map_err(super::broken)?;
        let mut next = directory.entries.clone();
        next.retain(|e| !wanted.iter().any(|w| w.name == e.name));
        for bitmap in wanted {
            let name = &bitmap.name;
            match (&bitmap.bits, directory.entries.iter().find(|e| e.name == *name)) {
                (Some(bits), _) => next.push(self.store_bitmap(bitmap, bits)?),
                (None, Some(old)) => next.push(old.clone()),
                (None, None) => {}
            }
        }
        self.change_directory(&mut directory, next)
    }

    /// Take a bitmap out of the file, if it is there.
    pub(super) fn forget_bitmap(&self, name: &str) -> Result<(), BlockError> {
        let _alone = self.quiesce()?;
        let mut directory = self.bitmaps.lock().map_err(super::broken)?;
        if !directory.entries.iter().any(|e| e.name == name) {
            return Ok(());
        }
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        let next = directory.entries.iter().filter(|e| e.name != name).cloned().collect();
        self.change_directory(&mut directory, next)
    }

    /// Write a bitmap's contents and table into new clusters.
    fn store_bitmap(&self, bitmap: &StoredBitmap, bits: &Bits) -> Result<Entry, BlockError> {
        let cluster = self.cluster();
        let len = Bits::stored_len(self.size(), bits.granularity());
        let entries = len.div_ceil(cluster).max(1);
        let mut table = Vec::with_capacity(entries as usize);
        for n in 0..entries {
            let data = bits.to_bytes(n * cluster, cluster);
            table.push(if data.iter().all(|b| *b == 0) { 0 } else { self.store_whole(&data)? });
        }
        Ok(Entry {
            name: bitmap.name.clone(),
            flags: if bitmap.auto { AUTO } else { 0 },
            granularity_bits: bits.granularity().trailing_zeros() as u8,
            table: self.store_whole(&bytes(&table))?,
            entries: entries as u32,
            good: true,
        })
    }

    /// Store something in new clusters that lie side by side; its offset.
    fn store_whole(&self, data: &[u8]) -> Result<u64, BlockError> {
        let clusters = (data.len() as u64).div_ceil(self.cluster()).max(1);
        let offset = {
            let mut state = self.lock()?;
            let first = state.refs.allocate_run(self.file.as_ref(), clusters)?;
            state.untouched = state.untouched.max((first + clusters) << self.header.cluster_bits);
            first << self.header.cluster_bits
        };
        let mut whole = data.to_vec();
        whole.resize((clusters * self.cluster()) as usize, 0);
        self.file.write_at(offset, &whole)?;
        Ok(offset)
    }

    /// Write another directory beside the present one, switch to it, and let go of what only the old one led to. No
    /// request may be under way.
    fn change_directory(&self, directory: &mut Directory, entries: Vec<Entry>) -> Result<(), BlockError> {
        let mut next = Directory { entries, ..Directory::default() };
        let data = next.bytes();
        if !data.is_empty() {
            next.length = data.len() as u64;
            next.offset = self.store_whole(&data)?;
        }
        // The counts of the new clusters, and what is in them.
        self.settle()?;
        self.file.sync()?;
        self.name_bitmaps(&next)?;
        let (file, bits) = (self.file.as_ref(), self.header.cluster_bits);
        let mut left = clusters(directory.offset, directory.length, bits);
        for entry in directory.entries.iter().filter(|old| !next.entries.iter().any(|e| e.table == old.table))
        {
            // What cannot be read stays where it is: a leak.
            left.extend(entry.clusters(file, bits).unwrap_or_default());
        }
        *directory = next;
        self.lock()?.unreferenced.extend(left);
        self.settle()
    }
}
