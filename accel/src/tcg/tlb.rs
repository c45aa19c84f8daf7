//! The software TLB for data: what a walk found, for the accesses that follow. (When entries must go is [`super::paging`]'s.)

use super::large::Large;

/// Entries of each TLB: as many pages as a compressor or a compiler goes to and fro over.
pub const TLB_SIZE: usize = 4096;
/// A tag that no address has whose entry is `slot`: compiled code finds the offset within a page by the
/// exclusive or of address and tag, which must be large then.
pub const fn no_tag(slot: usize) -> u64 {
    (slot as u64 ^ 1) << 12
}

/// A way from linear to host addresses of one page.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Way {
    /// Linear page, if accesses may go straight to memory.
    pub tag: u64,
    /// Host address of the page.
    pub host: *mut u8,
}

/// A TLB. What each access looks at lies close together, apart from the rest.
pub struct Tlb {
    /// For reads, then for writes.
    ways: Large<Way>,
    /// Guest physical pages; [`EMPTY`]: nothing was filled in.
    phys: Large<u64>,
}

/// No guest physical page.
const EMPTY: u64 = 1;
/// From where a TLB has the ways for reads to where it has those for writes, in bytes.
pub const WRITES: usize = TLB_SIZE * size_of::<Way>();

/// The entry for a linear address.
#[inline(always)]
pub fn slot_of(lin: u64) -> usize {
    (lin >> 12) as usize & (TLB_SIZE - 1)
}

impl Tlb {
    pub fn new() -> Tlb {
        let way = |slot: usize| Way { tag: no_tag(slot % TLB_SIZE), host: std::ptr::null_mut() };
        Tlb { ways: (0..2 * TLB_SIZE).map(way).collect(), phys: (0..TLB_SIZE).map(|_| EMPTY).collect() }
    }
    /// For compiled code.
    pub fn address(&self) -> u64 {
        self.ways.as_ptr() as u64
    }
    /// How to read at a linear address.
    #[inline(always)]
    pub fn read(&self, lin: u64) -> &Way {
        &self.ways[slot_of(lin)]
    }
    /// How to write.
    #[inline(always)]
    pub fn write(&self, lin: u64) -> &Way {
        &self.ways[TLB_SIZE + slot_of(lin)]
    }
    /// No write goes straight to memory.
    pub fn close_writes(&mut self, slot: usize) {
        self.ways[TLB_SIZE + slot].tag = no_tag(slot);
    }
    /// No access does.
    pub fn close(&mut self, slot: usize) {
        self.ways[slot].tag = no_tag(slot);
        self.close_writes(slot);
    }
    /// The entry is empty.
    pub fn clear(&mut self, slot: usize) {
        self.close(slot);
        self.phys[slot] = EMPTY;
    }
    /// Fill an entry: the tags for reads and writes, and the host and guest physical page. Returns whether it was empty.
    pub fn set(&mut self, slot: usize, [read, write]: [u64; 2], host: *mut u8, phys: u64) -> bool {
        self.ways[slot] = Way { tag: read, host };
        self.ways[TLB_SIZE + slot] = Way { tag: write, host };
        std::mem::replace(&mut self.phys[slot], phys) == EMPTY
    }
    /// The tags for reads and writes.
    pub fn tags(&self, slot: usize) -> [u64; 2] {
        [slot, TLB_SIZE + slot].map(|n| self.ways[n].tag)
    }
    /// The guest physical page.
    pub fn phys(&self, slot: usize) -> u64 {
        self.phys[slot]
    }
}
