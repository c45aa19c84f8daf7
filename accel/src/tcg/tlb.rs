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
    /// Guest physical pages, and [`PERMITTED`]; [`EMPTY`]: nothing was filled in.
    phys: Large<u64>,
    /// Chains of the entries that were filled in, by guest physical page: the first, and what follows each.
    first: Large<u16>,
    next: Large<u16>,
}

/// The tables permit writes, and have set the dirty bit, whether or not they go straight to memory.
const PERMITTED: u64 = 2;
/// Chains.
const CHAINS: usize = TLB_SIZE;
/// A chain's end.
const END: u16 = u16::MAX;

/// The chain of a guest physical page.
fn chain_of(phys: u64) -> usize {
    (phys >> 12 ^ phys >> 24) as usize & (CHAINS - 1)
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
        Tlb {
            ways: (0..2 * TLB_SIZE).map(way).collect(),
            phys: (0..TLB_SIZE).map(|_| EMPTY).collect(),
            first: (0..CHAINS).map(|_| END).collect(),
            next: (0..TLB_SIZE).map(|_| END).collect(),
        }
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
    /// The tables must be asked before the next write.
    pub fn forbid_writes(&mut self, slot: usize) {
        self.close_writes(slot);
        if self.phys[slot] != EMPTY {
            self.phys[slot] &= !PERMITTED;
        }
    }
    /// No access goes straight to memory, and the tables must be asked.
    pub fn close(&mut self, slot: usize) {
        self.ways[slot].tag = no_tag(slot);
        self.forbid_writes(slot);
    }
    /// Writes go straight to memory where reads do.
    pub fn open_writes(&mut self, slot: usize) {
        self.ways[TLB_SIZE + slot].tag = self.ways[slot].tag;
    }
    /// The guest physical page to write to at a linear address whose write the tables are known to permit.
    pub fn permitted(&self, lin: u64) -> Option<u64> {
        let slot = slot_of(lin);
        let phys = self.phys[slot];
        (self.ways[slot].tag == lin & !0xFFF && phys & PERMITTED != 0).then_some(phys & !0xFFF)
    }
    /// The entry is empty.
    pub fn clear(&mut self, slot: usize) {
        self.close(slot);
        self.unchain(slot);
        self.phys[slot] = EMPTY;
    }
    /// No write to a guest physical page goes straight to memory.
    pub fn close_writes_to(&mut self, page: u64) {
        let mut at = self.first[chain_of(page)];
        while at != END {
            let slot = at as usize;
            if self.phys[slot] & !0xFFF == page {
                self.close_writes(slot);
            }
            at = self.next[slot];
        }
    }
    fn unchain(&mut self, slot: usize) {
        if self.phys[slot] == EMPTY {
            return;
        }
        let chain = chain_of(self.phys[slot]);
        let after = self.next[slot];
        let mut at = self.first[chain];
        if at as usize == slot {
            self.first[chain] = after;
            return;
        }
        while at != END {
            let n = at as usize;
            if self.next[n] as usize == slot {
                self.next[n] = after;
                return;
            }
            at = self.next[n];
        }
    }
    /// Fill an entry: the tags for reads and writes, the host and guest physical page, and whether the tables permit writes.
    /// Returns whether it was empty.
    pub fn set(
        &mut self,
        slot: usize,
        [read, write]: [u64; 2],
        host: *mut u8,
        phys: u64,
        permitted: bool,
    ) -> bool {
        self.ways[slot] = Way { tag: read, host };
        self.ways[TLB_SIZE + slot] = Way { tag: write, host };
        let old = self.phys[slot];
        if old == EMPTY || old & !0xFFF != phys {
            self.unchain(slot);
            let first = &mut self.first[chain_of(phys)];
            self.next[slot] = std::mem::replace(first, slot as u16);
        }
        self.phys[slot] = phys | if permitted { PERMITTED } else { 0 };
        old == EMPTY
    }
    /// The tags for reads and writes.
    pub fn tags(&self, slot: usize) -> [u64; 2] {
        [slot, TLB_SIZE + slot].map(|n| self.ways[n].tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_to_a_physical_page_are_closed_wherever_it_is() {
        let (mut tlb, mut filled) = (Tlb::new(), vec![None; TLB_SIZE]);
        let mut random = 1u64;
        let mut draw = |n: u64| {
            random = random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            (random >> 33) % n
        };
        for _ in 0..20_000 {
            // Few slots and pages, some of which share a chain.
            let slot = draw(16) as usize;
            let page = draw(4) << 12 | draw(3) << 24;
            match draw(8) {
                0 => {
                    tlb.clear(slot);
                    filled[slot] = None;
                }
                1 => {
                    tlb.close_writes_to(page);
                    filled.iter_mut().flatten().for_each(|f: &mut (u64, bool)| f.1 &= f.0 != page);
                }
                _ => {
                    let tag = (slot as u64) << 12;
                    let was = tlb.set(slot, [tag, tag], std::ptr::null_mut(), page, false);
                    assert_eq!(was, filled[slot].replace((page, true)).is_none());
                }
            }
            for (slot, f) in filled.iter().enumerate().take(16) {
                let open = tlb.tags(slot)[1] == (slot as u64) << 12;
                assert_eq!(open, f.is_some_and(|f| f.1), "{slot}: {f:?}");
            }
        }
    }
}
