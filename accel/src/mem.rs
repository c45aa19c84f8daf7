//! Guest physical memory: RAM (through `vm-memory`), firmware ROM, the PC's legacy window
//! between 640 KiB and 1 MiB, and one byte of flags for each page of RAM.
//!
//! The flags serve three readers: migration (which pages changed since they were last copied),
//! divergence hashing (which pages changed since they were last hashed) and the processor's cache
//! of decoded code (which pages hold decoded instructions).

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, AtomicU8, Ordering};
use std::sync::Arc;
use std::sync::Mutex;

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

/// Size of a page of guest memory in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Where RAM above 4 GiB starts.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Where the PC's legacy window (video memory, option ROMs, BIOS shadow) starts.
pub const LEGACY_START: u64 = 0xA_0000;
/// First byte after the legacy window.
pub const LEGACY_END: u64 = 0x10_0000;

/// The page was written since migration last took it.
pub const DIRTY_MIGRATION: u8 = 1;
/// The page was written since its contents were last hashed.
pub const DIRTY_HASH: u8 = 2;
/// The processor holds instructions decoded from this page.
pub const CODE: u8 = 4;
/// A processor's TLB holds translations that were read from this page.
pub const TABLE: u8 = 8;
/// Both dirty bits: with these set and [`CODE`] and [`TABLE`] clear a write needs no bookkeeping.
pub const WRITE_FREE: u8 = DIRTY_MIGRATION | DIRTY_HASH;

/// Errors of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    #[error("cannot allocate {0} bytes of guest memory")]
    Allocate(u64, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("guest memory size {0} is not a multiple of 4096 bytes or is zero")]
    Size(u64),
    #[error("guest physical range {0:#x}+{1:#x} is not in RAM")]
    Range(u64, u64),
    #[error(
        "a firmware image of {0} bytes does not fit: the size must be a multiple of 4096, at most 16 MiB"
    )]
    Firmware(usize),
}

struct FlagsInner {
    flags: Box<[AtomicU8]>,
    /// RAM page numbers (within this region) whose decoded code became stale by a device's write.
    stale: Mutex<Vec<u64>>,
    stale_count: AtomicU32,
}

/// One byte of flags for each page of a RAM region. It is the `vm-memory` bitmap of the region,
/// so whatever writes through `vm-memory` (virtio queues, DMA) keeps it right.
#[derive(Clone)]
pub struct PageFlags(Arc<FlagsInner>);

impl std::fmt::Debug for PageFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageFlags({} pages)", self.0.flags.len())
    }
}

impl Default for PageFlags {
    fn default() -> Self {
        Self::with_len(0)
    }
}

impl NewBitmap for PageFlags {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        PageFlags(Arc::new(FlagsInner {
            flags: (0..pages).map(|_| AtomicU8::new(WRITE_FREE)).collect(),
            stale: Mutex::new(Vec::new()),
            stale_count: AtomicU32::new(0),
        }))
    }
}

impl PageFlags {
    fn mark(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_SIZE as usize;
        let last = (offset.saturating_add(len - 1)) / PAGE_SIZE as usize;
        for page in first..=last.min(self.0.flags.len().wrapping_sub(1)) {
            if let Some(flag) = self.0.flags.get(page) {
                let old = flag.load(Ordering::Relaxed);
                if old == WRITE_FREE {
                    continue;
                }
                flag.store(WRITE_FREE, Ordering::Relaxed);
                if old & (CODE | TABLE) != 0 {
                    if let Ok(mut stale) = self.0.stale.lock() {
                        stale.push(page as u64);
                    }
                    self.0.stale_count.fetch_add(1, Ordering::Release);
                }
            }
        }
    }
}

/// A view of [`PageFlags`] from an offset on, as `vm-memory` asks for.
#[derive(Clone, Debug)]
pub struct PageFlagsSlice<'a> {
    flags: &'a PageFlags,
    base: usize,
}

impl WithBitmapSlice<'_> for PageFlagsSlice<'_> {
    type S = Self;
}
impl BitmapSlice for PageFlagsSlice<'_> {}
impl Bitmap for PageFlagsSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.flags.mark(self.base.wrapping_add(offset), len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.flags.dirty_at(self.base.wrapping_add(offset))
    }
    fn slice_at(&self, offset: usize) -> Self {
        PageFlagsSlice { flags: self.flags, base: self.base.wrapping_add(offset) }
    }
}
impl<'a> WithBitmapSlice<'a> for PageFlags {
    type S = PageFlagsSlice<'a>;
}
impl Bitmap for PageFlags {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.0
            .flags
            .get(offset / PAGE_SIZE as usize)
            .is_some_and(|f| f.load(Ordering::Relaxed) & DIRTY_MIGRATION != 0)
    }
    fn slice_at(&self, offset: usize) -> PageFlagsSlice<'_> {
        PageFlagsSlice { flags: self, base: offset }
    }
}

/// The `vm-memory` type of guest RAM; what `virtio-queue` works on.
pub type Ram = vm_memory::GuestMemoryMmap<PageFlags>;

/// How reads and writes of a 4 KiB page of the legacy window behave (i440fx/q35 PAM registers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shadow {
    /// Reads come from ROM (or MMIO below 0xC0000), writes go nowhere (or to MMIO).
    Rom,
    /// Reads come from RAM, writes go nowhere.
    ReadRam,
    /// Reads come from ROM, writes go to RAM.
    WriteRam,
    /// Plain RAM.
    Ram,
}

/// What backs one 4 KiB page of guest physical address space, for a processor's TLB.
#[derive(Clone, Copy, Debug)]
pub struct Backing {
    /// Host address of the page's first byte for reads and fetches; null: reads are MMIO.
    pub read: *const u8,
    /// Host address for writes; null: writes are MMIO (or are dropped, where `read` is not null).
    pub write: *mut u8,
    /// The page's flags, where `write` is RAM; null otherwise.
    pub flags: *const AtomicU8,
}

impl Backing {
    /// Writes may go straight to where reads come from: nobody needs to see them.
    pub(crate) fn writes_are_free(&self) -> bool {
        // SAFETY: the flag byte lives as long as guest memory.
        self.write.cast_const() == self.read
            && unsafe { self.flags.as_ref() }.is_some_and(|f| f.load(Ordering::Relaxed) == WRITE_FREE)
    }
}

/// Guest physical memory of one machine.
pub struct GuestMemory {
    ram: Ram,
    regions: Vec<Region>,
    size: u64,
    rom: RefCell<Rom>,
    shadow: RefCell<[Shadow; 96]>,
    generation: Cell<u32>,
    map: Cell<u32>,
    events: RefCell<Events>,
}

/// What processors tell one another about pages (each has its own TLB and decoded code).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageEvent {
    /// Bytes of the page changed: drop decoded code and translations that came from it.
    Changed(u64),
    /// The page's flags are no longer [`WRITE_FREE`]: drop direct write access to it.
    Protected(u64),
}

const EVENTS: usize = 256;

struct Events {
    ring: [PageEvent; EVENTS],
    count: u64,
}

struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
    flags: PageFlags,
}

// SAFETY: the host pointers lie in mappings owned by `ram`, which live as long as `self`. The
// machine thread is the only one that uses the interior-mutable fields; moving the whole value to
// that thread is sound. It is deliberately not Sync.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// RAM of `size` bytes: up to 3 GiB below the PCI hole, the rest from 4 GiB on (QEMU's `pc`
    /// rule: a machine with less than 3.5 GiB keeps all of it below).
    pub fn new(size: u64) -> Result<Self, MemError> {
        GuestMemory::split(size, if size >= 0xE000_0000 { 0xC000_0000 } else { size })
    }

    /// RAM of `size` bytes, `low` of them below the PCI hole, the rest from 4 GiB on.
    pub fn split(size: u64, low: u64) -> Result<Self, MemError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || low == 0 || low > size.min(HIGH_RAM_START) {
            return Err(MemError::Size(size));
        }
        let mut parts = vec![(0u64, low)];
        if size > low {
            parts.push((HIGH_RAM_START, size - low));
        }
        let mut list = Vec::new();
        let mut regions = Vec::new();
        for (start, len) in parts {
            let map = MmapRegion::<PageFlags>::new(len as usize)
                .map_err(|e| MemError::Allocate(len, Box::new(e)))?;
            // As QEMU does. A host that has none to give, or does not know them, says so, which changes nothing.
            // SAFETY: the range is the mapping that was just made.
            unsafe { libc::madvise(map.as_ptr().cast(), len as usize, libc::MADV_HUGEPAGE) };
            regions.push(Region { start, len, host: map.as_ptr(), flags: map.bitmap().clone() });
            let region = GuestRegionMmap::new(map, GuestAddress(start)).ok_or(MemError::Range(start, len))?;
            list.push(region);
        }
        let ram = Ram::from_regions(list).map_err(|e| MemError::Allocate(size, Box::new(e)))?;
        Ok(GuestMemory {
            ram,
            regions,
            size,
            rom: RefCell::default(),
            shadow: RefCell::new([Shadow::Rom; 96]),
            generation: Cell::new(1),
            map: Cell::new(1),
            events: RefCell::new(Events { ring: [PageEvent::Changed(0); EVENTS], count: 0 }),
        })
    }

    /// RAM as `vm-memory` sees it, for virtio queues and device DMA.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Bytes of RAM in all.
    pub fn ram_size(&self) -> u64 {
        self.size
    }

    /// Bytes of RAM below 4 GiB.
    pub fn low_ram_size(&self) -> u64 {
        self.regions[0].len
    }

    /// (start, length) of each RAM region in guest physical address space, in order.
    pub fn ram_ranges(&self) -> Vec<(u64, u64)> {
        self.regions.iter().map(|r| (r.start, r.len)).collect()
    }

    /// Put a firmware image so that it ends at 4 GiB; its last 128 KiB also show below 1 MiB.
    pub fn set_firmware(&self, image: Vec<u8>) -> Result<(), MemError> {
        if image.is_empty() || !image.len().is_multiple_of(PAGE_SIZE as usize) || image.len() > 16 << 20 {
            return Err(MemError::Firmware(image.len()));
        }
        *self.rom.borrow_mut() = Rom::new(&image);
        self.remapped();
        Ok(())
    }

    /// Changes whenever the map of physical addresses changed (and, unlike [`Self::generation`], only then).
    pub fn map_version(&self) -> u32 {
        self.map.get()
    }

    fn remapped(&self) {
        self.map.set(self.map.get().wrapping_add(1));
        self.bump();
    }

    /// Changes whenever the map of physical addresses changed or dirty bits were cleared: a
    /// processor that sees a new value drops its TLB.
    pub fn generation(&self) -> u32 {
        self.generation.get()
    }

    fn bump(&self) {
        self.generation.set(self.generation.get().wrapping_add(1));
    }

    /// Set how the legacy window's 4 KiB page at `addr` (0xA0000..0xFFFFF) behaves.
    pub fn set_shadow(&self, addr: u64, mode: Shadow) {
        if (LEGACY_START..LEGACY_END).contains(&addr) {
            self.shadow.borrow_mut()[((addr - LEGACY_START) / PAGE_SIZE) as usize] = mode;
            self.remapped();
        }
    }

    #[inline]
    fn region(&self, gpa: u64) -> Option<&Region> {
        self.regions.iter().find(|r| gpa >= r.start && gpa - r.start < r.len)
    }

    /// Host address and flags of the RAM page that holds `gpa`.
    #[inline]
    fn ram_page(&self, gpa: u64) -> Option<(*mut u8, *const AtomicU8)> {
        let r = self.region(gpa)?;
        let off = (gpa - r.start) & !(PAGE_SIZE - 1);
        let flag = &r.flags.0.flags[(off / PAGE_SIZE) as usize];
        // SAFETY: off lies inside the region's mapping.
        Some((unsafe { r.host.add(off as usize) }, flag))
    }

    /// Host address for reads of the ROM page that holds `gpa`, if firmware lies there.
    fn rom_page(&self, gpa: u64) -> Option<*const u8> {
        let rom = self.rom.borrow();
        let len = rom.len() as u64;
        let page = gpa & !(PAGE_SIZE - 1);
        let off = if (HIGH_RAM_START - len..HIGH_RAM_START).contains(&page) {
            page - (HIGH_RAM_START - len)
        } else if (0xE_0000..LEGACY_END).contains(&page) && len > 0 {
            let low = len.min(0x2_0000);
            if page < LEGACY_END - low {
                return None;
            }
            len - (LEGACY_END - page)
        } else {
            return None;
        };
        // SAFETY: off < rom.len(), a multiple of the page size.
        Some(unsafe { rom.as_ptr().add(off as usize) })
    }

    /// What backs the page that holds guest physical address `gpa`.
    #[inline]
    pub fn backing(&self, gpa: u64) -> Backing {
        const NONE: Backing =
            Backing { read: std::ptr::null(), write: std::ptr::null_mut(), flags: std::ptr::null() };
        if (LEGACY_START..LEGACY_END).contains(&gpa) {
            let mode = self.shadow.borrow()[((gpa - LEGACY_START) / PAGE_SIZE) as usize];
            let ram = self.ram_page(gpa);
            let rom = self.rom_page(gpa).unwrap_or(std::ptr::null());
            let (ram_ptr, flags) = ram.unwrap_or((std::ptr::null_mut(), std::ptr::null()));
            return match mode {
                Shadow::Rom => Backing { read: rom, ..NONE },
                Shadow::ReadRam => Backing { read: ram_ptr, ..NONE },
                Shadow::WriteRam => Backing { read: rom, write: ram_ptr, flags },
                Shadow::Ram => Backing { read: ram_ptr, write: ram_ptr, flags },
            };
        }
        if let Some((ptr, flags)) = self.ram_page(gpa) {
            return Backing { read: ptr, write: ptr, flags };
        }
        match self.rom_page(gpa) {
            Some(ptr) => Backing { read: ptr, ..NONE },
            None => NONE,
        }
    }

    /// Read RAM at `gpa` into `buf` (for devices, loaders and monitors).
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemError> {
        self.ram.read_slice(buf, GuestAddress(gpa)).map_err(|_| MemError::Range(gpa, buf.len() as u64))
    }

    /// Read what a processor would at `gpa`, within one page; false where a device answers, or nothing.
    pub fn peek(&self, gpa: u64, buf: &mut [u8]) -> bool {
        let at = (gpa % PAGE_SIZE) as usize;
        let from = self.backing(gpa).read;
        if from.is_null() || at + buf.len() > PAGE_SIZE as usize {
            return false;
        }
        // SAFETY: `from` is a whole page, and the range lies within it; nobody else writes it meanwhile, since this value
        // is of one thread.
        buf.copy_from_slice(unsafe { std::slice::from_raw_parts(from.add(at), buf.len()) });
        true
    }

    /// Write `buf` to RAM at `gpa`, keeping the page flags right.
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemError> {
        self.ram.write_slice(buf, GuestAddress(gpa)).map_err(|_| MemError::Range(gpa, buf.len() as u64))
    }

    /// Note that a processor decoded code ([`CODE`]) or read translations ([`TABLE`]) from the RAM page at
    /// `gpa` (no effect on ROM). Returns whether the page's writes were free until now; then other
    /// processors hear of it through [`Self::events_since`], and the caller drops its own write entries.
    pub fn protect(&self, gpa: u64, kind: u8) -> bool {
        let Some((_, flags)) = self.ram_page(gpa) else { return false };
        // SAFETY: the flag byte lives as long as self.
        let flags = unsafe { &*flags };
        if flags.load(Ordering::Relaxed) & kind != 0 {
            return false;
        }
        let old = flags.fetch_or(kind, Ordering::Relaxed);
        if old & (CODE | TABLE) == 0 {
            self.push_event(PageEvent::Protected(gpa & !(PAGE_SIZE - 1)));
            return true;
        }
        false
    }

    /// Tell the other processors.
    pub fn push_event(&self, event: PageEvent) {
        let mut e = self.events.borrow_mut();
        let slot = (e.count % EVENTS as u64) as usize;
        e.ring[slot] = event;
        e.count += 1;
    }

    /// How many events there were so far.
    pub fn event_count(&self) -> u64 {
        self.events.borrow().count
    }

    /// The events from number `seen` on; `None` when they are no longer all known.
    pub fn events_since(&self, seen: u64) -> Option<Vec<PageEvent>> {
        let e = self.events.borrow();
        if seen > e.count || e.count - seen > EVENTS as u64 {
            return None;
        }
        Some((seen..e.count).map(|n| e.ring[(n % EVENTS as u64) as usize]).collect())
    }

    /// Set the dirty bits of the RAM page at `gpa`, leaving [`CODE`] and [`TABLE`] as they are; returns
    /// the flags as they were.
    pub fn set_dirty(&self, gpa: u64) -> u8 {
        let Some((write, flags)) = self.ram_page(gpa) else { return WRITE_FREE };
        Self::set_dirty_at(&Backing { read: write, write, flags })
    }

    /// The same for the page that `b` backs, which is writable RAM.
    pub fn set_dirty_at(b: &Backing) -> u8 {
        if b.flags.is_null() {
            return WRITE_FREE;
        }
        // SAFETY: the flag byte lives as long as guest memory does.
        let flags = unsafe { &*b.flags };
        // Mostly they are set, and an atomic change is dear.
        let old = flags.load(Ordering::Relaxed);
        if old & WRITE_FREE == WRITE_FREE {
            return old;
        }
        flags.fetch_or(WRITE_FREE, Ordering::Relaxed)
    }

    /// Clear [`CODE`] or [`TABLE`] of the RAM page at `gpa`.
    pub fn unprotect(&self, gpa: u64, kind: u8) {
        if let Some((_, flags)) = self.ram_page(gpa) {
            // SAFETY: the flag byte lives as long as self.
            unsafe { &*flags }.fetch_and(!kind, Ordering::Relaxed);
        }
    }

    /// Whether device writes hit pages with decoded code since the last [`Self::take_stale_code`].
    pub fn has_stale_code(&self) -> bool {
        self.regions.iter().any(|r| r.flags.0.stale_count.load(Ordering::Acquire) != 0)
    }

    /// Turn what device writes made stale into events.
    pub fn collect_stale(&self) {
        for r in &self.regions {
            if r.flags.0.stale_count.swap(0, Ordering::AcqRel) == 0 {
                continue;
            }
            if let Ok(mut stale) = r.flags.0.stale.lock() {
                for p in stale.drain(..) {
                    self.push_event(PageEvent::Changed(r.start + p * PAGE_SIZE));
                }
            }
        }
    }

    /// Guest physical addresses of RAM pages with dirty bit `which` set, clearing it; at most
    /// `limit` pages, starting the search at `*cursor` (a page index over all regions), which is
    /// moved on. Returns an empty list when the search reached the end (the cursor goes to 0).
    pub fn take_dirty(&self, which: u8, cursor: &mut u64, limit: usize) -> Vec<u64> {
        let mut out = Vec::new();
        let mut index = 0u64;
        for r in &self.regions {
            let pages = r.len / PAGE_SIZE;
            if *cursor < index + pages {
                let first = (*cursor).max(index) - index;
                for p in first..pages {
                    let flag = &r.flags.0.flags[p as usize];
                    if flag.load(Ordering::Relaxed) & which != 0 {
                        if out.len() == limit {
                            *cursor = index + p;
                            self.bump();
                            return out;
                        }
                        flag.fetch_and(!which, Ordering::Relaxed);
                        out.push(r.start + p * PAGE_SIZE);
                    }
                }
            }
            index += pages;
        }
        *cursor = if out.is_empty() { 0 } else { index };
        if !out.is_empty() {
            self.bump();
        }
        out
    }

    /// Clear dirty bit `which` of the RAM page at `gpa`; whether it was set.
    pub fn take_dirty_page(&self, which: u8, gpa: u64) -> bool {
        let Some((_, flags)) = self.ram_page(gpa) else { return false };
        // SAFETY: the flag byte lives as long as self.
        let old = unsafe { &*flags }.fetch_and(!which, Ordering::Relaxed);
        if old & which != 0 {
            self.bump();
        }
        old & which != 0
    }

    /// Runs of RAM pages with dirty bit `which` set: the first one's address, and how many.
    pub fn dirty_runs(&self, which: u8) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        for r in &self.regions {
            for (p, flag) in r.flags.0.flags.iter().enumerate() {
                if flag.load(Ordering::Relaxed) & which == 0 {
                    continue;
                }
                let gpa = r.start + p as u64 * PAGE_SIZE;
                match out.last_mut() {
                    Some((start, pages)) if *start + *pages * PAGE_SIZE == gpa => *pages += 1,
                    _ => out.push((gpa, 1)),
                }
            }
        }
        out
    }

    /// Set dirty bit(s) `which` of exactly those RAM pages of which `is_dirty` says so by their number, counted over all
    /// of RAM.
    pub fn set_dirty_where(&self, which: u8, is_dirty: impl Fn(u64) -> bool) {
        let flags = self.regions.iter().flat_map(|r| r.flags.0.flags.iter());
        for (n, flag) in flags.enumerate() {
            match is_dirty(n as u64) {
                true => flag.fetch_or(which, Ordering::Relaxed),
                false => flag.fetch_and(!which, Ordering::Relaxed),
            };
        }
        self.bump();
    }

    /// Where RAM lies in this process.
    pub fn blocks(&self) -> RamBlocks {
        let block = |r: &Region| RamBlock { gpa: r.start, len: r.len, host: r.host as usize };
        RamBlocks { list: self.regions.iter().map(block).collect(), _ram: self.ram.clone() }
    }

    /// How many RAM pages have dirty bit `which` set.
    pub fn count_dirty(&self, which: u8) -> u64 {
        self.regions
            .iter()
            .flat_map(|r| r.flags.0.flags.iter())
            .filter(|f| f.load(Ordering::Relaxed) & which != 0)
            .count() as u64
    }

    /// Set dirty bit(s) `which` on every RAM page.
    pub fn set_all_dirty(&self, which: u8) {
        for r in &self.regions {
            for f in r.flags.0.flags.iter() {
                f.fetch_or(which, Ordering::Relaxed);
            }
        }
    }

    /// The shadow modes of the legacy window, for saving.
    pub fn shadow_modes(&self) -> Vec<u8> {
        self.shadow.borrow().iter().map(|m| *m as u8).collect()
    }

    /// Restore what [`Self::shadow_modes`] returned; wrong values count as ROM.
    pub fn set_shadow_modes(&self, modes: &[u8]) {
        let mut shadow = self.shadow.borrow_mut();
        for (slot, mode) in shadow.iter_mut().zip(modes) {
            *slot = match mode {
                1 => Shadow::ReadRam,
                2 => Shadow::WriteRam,
                3 => Shadow::Ram,
                _ => Shadow::Rom,
            };
        }
        drop(shadow);
        self.remapped();
    }

    /// What of the physical address space host memory backs, in order of addresses: what a hypervisor maps.
    /// Pages whose reads come from elsewhere than where their writes go are spans that cannot be written.
    pub fn spans(&self) -> Vec<Span> {
        let mut out: Vec<Span> = Vec::new();
        let mut add = |gpa: u64, len: u64, host: *mut u8, writable: bool, ram: bool| {
            if let Some(last) = out.last_mut() {
                let next = last.host.wrapping_add(last.len as usize);
                if (last.gpa + last.len, next, last.writable, last.ram) == (gpa, host, writable, ram) {
                    last.len += len;
                    return;
                }
            }
            out.push(Span { gpa, len, host, writable, ram });
        };
        for r in &self.regions {
            let end = r.start + r.len;
            if r.start > 0 {
                add(r.start, r.len, r.host, true, true);
                continue;
            }
            add(0, end.min(LEGACY_START), r.host, true, true);
            for gpa in (LEGACY_START..LEGACY_END).step_by(PAGE_SIZE as usize) {
                let b = self.backing(gpa);
                if !b.read.is_null() {
                    let writable = std::ptr::eq(b.read, b.write);
                    let ram = self.ram_page(gpa).is_some_and(|(host, _)| std::ptr::eq(host, b.read));
                    add(gpa, PAGE_SIZE, b.read.cast_mut(), writable, ram);
                }
            }
            if end > LEGACY_END {
                // SAFETY: the region is longer than that.
                let host = unsafe { r.host.add(LEGACY_END as usize) };
                add(LEGACY_END, end - LEGACY_END, host, true, true);
            }
        }
        let rom = self.rom.borrow();
        if rom.len() > 0 {
            let gpa = HIGH_RAM_START - rom.len() as u64;
            add(gpa, rom.len() as u64, rom.as_ptr().cast_mut(), false, false);
        }
        drop(rom);
        out.sort_by_key(|s| s.gpa);
        out
    }

    /// A processor that keeps no flags itself wrote to these pages of RAM: bit `n` of `bitmap` is page `n` from
    /// `gpa` on.
    pub fn mark_written(&self, gpa: u64, bitmap: &[u64]) {
        for (word, mut bits) in bitmap.iter().copied().enumerate() {
            while bits != 0 {
                let page = word as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                self.set_dirty(gpa + page * PAGE_SIZE);
            }
        }
    }

    /// Whatever processors knew of pages is forgotten: every page counts as written, and none holds code.
    pub fn forget_flags(&self) {
        for r in &self.regions {
            for f in r.flags.0.flags.iter() {
                f.store(WRITE_FREE, Ordering::Relaxed);
            }
            if let Ok(mut stale) = r.flags.0.stale.lock() {
                stale.clear();
            }
            r.flags.0.stale_count.store(0, Ordering::Release);
        }
        self.bump();
    }
}

/// Where RAM lies in this process, for other threads than the machine's. It stays there as long as this.
#[derive(Clone)]
pub struct RamBlocks {
    list: Vec<RamBlock>,
    _ram: Ram,
}

/// A block of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its first guest physical address.
    pub gpa: u64,
    /// Bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
    /// Its address in this process, at a page boundary.
    pub host: usize,
}

impl RamBlocks {
    /// The blocks, in order of addresses.
    pub fn iter(&self) -> impl Iterator<Item = &RamBlock> {
        self.list.iter()
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.list.iter().map(|b| b.len / PAGE_SIZE).sum()
    }

    /// The number of the page at `gpa`, counted over all blocks.
    pub fn number(&self, gpa: u64) -> Option<u64> {
        let mut before = 0;
        for b in &self.list {
            if gpa >= b.gpa && gpa - b.gpa < b.len {
                return Some(before + (gpa - b.gpa) / PAGE_SIZE);
            }
            before += b.len / PAGE_SIZE;
        }
        None
    }

    /// The address of `gpa` in this process.
    pub fn host(&self, gpa: u64) -> Option<usize> {
        let block = self.list.iter().find(|b| gpa >= b.gpa && gpa - b.gpa < b.len)?;
        Some(block.host + (gpa - block.gpa) as usize)
    }

    /// The guest physical address of one in this process.
    pub fn guest(&self, host: usize) -> Option<u64> {
        let block = self.list.iter().find(|b| host >= b.host && ((host - b.host) as u64) < b.len)?;
        Some(block.gpa + (host - block.host) as u64)
    }
}

/// A run of physical addresses that host memory backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first address.
    pub gpa: u64,
    /// Bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
    /// Where it lies in this process, at a page boundary.
    pub host: *mut u8,
    /// Guests may write to it; if not, their writes are for [`GuestMemory::backing`] to judge.
    pub writable: bool,
    /// It is RAM, so that writes to it count for migration.
    pub ram: bool,
}

/// A page of a firmware image: hypervisors map whole pages.
#[derive(Clone)]
#[repr(C, align(4096))]
struct RomPage([u8; PAGE_SIZE as usize]);

/// A firmware image at a page boundary of the host.
#[derive(Default)]
struct Rom(Vec<RomPage>);

impl Rom {
    fn new(image: &[u8]) -> Rom {
        let page = |bytes: &[u8]| {
            let mut page = RomPage([0; PAGE_SIZE as usize]);
            page.0[..bytes.len()].copy_from_slice(bytes);
            page
        };
        Rom(image.chunks(PAGE_SIZE as usize).map(page).collect())
    }

    fn len(&self) -> usize {
        self.0.len() * PAGE_SIZE as usize
    }

    fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_and_high_ram_split_at_the_pci_hole() {
        let mem = GuestMemory::new(4 << 30).unwrap();
        assert_eq!(mem.ram_ranges(), vec![(0, 0xC000_0000), (1 << 32, 1 << 30)]);
        assert!(mem.backing(0xC000_0000).read.is_null());
        assert!(!mem.backing(0x1_3FFF_F000).write.is_null());
        assert!(mem.backing(0x1_4000_0000).write.is_null());
    }

    #[test]
    fn firmware_shows_at_4g_and_below_1m_until_shadowed() {
        let mem = GuestMemory::new(1 << 24).unwrap();
        let mut image = vec![0u8; 0x4_0000];
        image[0x3_FFF0] = 0xEA;
        image[0x2_0000] = 0x55;
        mem.set_firmware(image).unwrap();
        let byte = |a: u64| {
            let b = mem.backing(a);
            assert!(!b.read.is_null() && b.write.is_null());
            // SAFETY: read points at a whole page.
            unsafe { *b.read.add((a & 0xFFF) as usize) }
        };
        assert_eq!(byte(0xFFFF_FFF0), 0xEA);
        assert_eq!(byte(0xF_FFF0), 0xEA);
        assert_eq!(byte(0xE_0000), 0x55);
        let old = mem.generation();
        mem.set_shadow(0xF_F000, Shadow::Ram);
        assert_ne!(mem.generation(), old);
        assert!(!mem.backing(0xF_F000).write.is_null());
    }

    #[test]
    fn a_device_write_marks_code_stale_and_pages_dirty() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let mut cursor = 0;
        while !mem.take_dirty(DIRTY_MIGRATION, &mut cursor, 64).is_empty() {}
        assert_eq!(mem.count_dirty(DIRTY_MIGRATION), 0);
        mem.protect(0x5000, CODE);
        let seen = mem.event_count();
        mem.write(0x4FFF, &[1, 2]).unwrap();
        assert!(mem.has_stale_code());
        mem.collect_stale();
        assert_eq!(mem.events_since(seen), Some(vec![PageEvent::Changed(0x5000)]));
        assert!(!mem.has_stale_code());
        let mut cursor = 0;
        assert_eq!(mem.take_dirty(DIRTY_MIGRATION, &mut cursor, 64), vec![0x4000, 0x5000]);
        assert!(mem.read((1 << 20) - 1, &mut [0; 2]).is_err());
    }

    #[test]
    fn runs_of_dirty_pages_and_single_ones() {
        let mem = GuestMemory::split(2 << 20, 1 << 20).unwrap();
        mem.set_dirty_where(DIRTY_MIGRATION, |n| matches!(n, 3 | 4 | 255..=257));
        let runs = [(0x3000, 2), (0xF_F000, 1), (1 << 32, 2)];
        assert_eq!(mem.dirty_runs(DIRTY_MIGRATION), runs);
        let blocks = mem.blocks();
        assert_eq!((blocks.pages(), blocks.number((1 << 32) + 0x1800)), (512, Some(257)));
        assert_eq!((blocks.number(1 << 20), blocks.host(1 << 20)), (None, None));
        let host = blocks.host(0x3010).unwrap();
        assert_eq!(
            (host as *const u8, blocks.guest(host)),
            (mem.backing(0x3000).read.wrapping_add(16), Some(0x3010))
        );
        assert!(mem.take_dirty_page(DIRTY_MIGRATION, 0x3000));
        assert!(!mem.take_dirty_page(DIRTY_MIGRATION, 0x3000));
        assert_eq!(mem.dirty_runs(DIRTY_MIGRATION)[0], (0x4000, 1));
    }

    #[test]
    fn spans_are_what_pages_are_backed_by() {
        let mem = GuestMemory::split(5 << 30, 2 << 30).unwrap();
        mem.set_firmware(vec![0x5A; 0x4_0000]).unwrap();
        let old = mem.map_version();
        for page in (0xC_0000..0xC_8000).step_by(4096) {
            mem.set_shadow(page, Shadow::Ram);
        }
        mem.set_shadow(0xC_8000, Shadow::ReadRam);
        mem.set_shadow(0xF_0000, Shadow::WriteRam);
        assert_ne!(mem.map_version(), old);
        let spans = mem.spans();
        let shape: Vec<_> = spans.iter().map(|s| (s.gpa, s.len, s.writable, s.ram)).collect();
        assert_eq!(
            shape,
            [
                (0, 0xA_0000, true, true),
                (0xC_0000, 0x8000, true, true),
                (0xC_8000, 0x1000, false, true),
                (0xE_0000, 0x2_0000, false, false),
                (0x10_0000, (2 << 30) - 0x10_0000, true, true),
                (0xFFFC_0000, 0x4_0000, false, false),
                (1 << 32, 3 << 30, true, true),
            ]
        );
        for s in &spans {
            assert_eq!(s.host as usize % 4096, 0);
            for gpa in [s.gpa, s.gpa + s.len - 4096] {
                let host = s.host.wrapping_add((gpa - s.gpa) as usize);
                assert!(std::ptr::eq(mem.backing(gpa).read, host), "{gpa:#x}");
            }
        }
    }

    #[test]
    fn a_bitmap_of_writes_sets_the_flags() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let mut cursor = 0;
        while !mem.take_dirty(DIRTY_MIGRATION, &mut cursor, 64).is_empty() {}
        mem.mark_written(0x1000, &[0b101, 1]);
        let mut cursor = 0;
        assert_eq!(mem.take_dirty(DIRTY_MIGRATION, &mut cursor, 64), vec![0x1000, 0x3000, 0x41000]);
    }
}
