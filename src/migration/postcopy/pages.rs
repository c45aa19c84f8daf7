//! Which pages of RAM are there.

use std::sync::atomic::{AtomicU64, Ordering};

use ftvm_accel::mem::RamBlocks;

use crate::migration::stream::PAGE;

/// A bit for each page of RAM.
pub struct PageSet {
    pub blocks: RamBlocks,
    bits: Vec<AtomicU64>,
}

impl PageSet {
    /// None of the pages.
    pub fn new(blocks: RamBlocks) -> PageSet {
        let words = blocks.pages().div_ceil(64);
        PageSet { bits: (0..words).map(|_| AtomicU64::new(0)).collect(), blocks }
    }

    fn word(&self, gpa: u64) -> Option<(&AtomicU64, u64)> {
        let n = self.blocks.number(gpa)?;
        Some((self.bits.get((n / 64) as usize)?, 1 << (n % 64)))
    }

    /// Put a page in. False: there is no such page.
    pub fn insert(&self, gpa: u64) -> bool {
        // Whoever sees the bit sees the page too.
        self.word(gpa).map(|(word, bit)| word.fetch_or(bit, Ordering::Release)).is_some()
    }

    /// Take a run of pages out.
    pub fn remove(&self, gpa: u64, pages: u64) {
        for n in 0..pages {
            if let Some((word, bit)) = self.word(gpa.wrapping_add(n * PAGE as u64)) {
                word.fetch_and(!bit, Ordering::Relaxed);
            }
        }
    }

    /// Whether a page is in.
    pub fn contains(&self, gpa: u64) -> bool {
        self.word(gpa).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// How many are in.
    pub fn count(&self) -> u64 {
        self.bits.iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Whether all are.
    pub fn is_full(&self) -> bool {
        self.count() == self.blocks.pages()
    }

    /// The bits, the first page's lowest in the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let len = self.blocks.pages().div_ceil(8) as usize;
        let mut out: Vec<u8> =
            self.bits.iter().flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes()).collect();
        out.truncate(len);
        out
    }
}

/// Whether page number `n` is in what [`PageSet::to_bytes`] returned.
pub fn is_in(bytes: &[u8], n: u64) -> bool {
    bytes.get((n / 8) as usize).is_some_and(|b| b >> (n % 8) & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ftvm_accel::GuestMemory;

    #[test]
    fn pages_come_and_go() {
        let mem = GuestMemory::split(100 << 12, 60 << 12).unwrap();
        let set = PageSet::new(mem.blocks());
        assert!(set.insert(0x3000) && set.insert((1 << 32) + 0x1000) && !set.insert(1 << 40));
        assert!(set.contains(0x3FFF) && !set.contains(0x4000));
        let bytes = set.to_bytes();
        assert_eq!(bytes.len(), 13);
        assert_eq!((0..200).filter(|n| is_in(&bytes, *n)).collect::<Vec<_>>(), [3, 61]);
        for n in 0..60 {
            set.insert(n << 12);
        }
        for n in 0..40 {
            set.insert((1 << 32) + (n << 12));
        }
        assert!(set.is_full());
        set.remove(0x1000, 2);
        assert_eq!((set.count(), set.contains(0x2000)), (98, false));
    }
}
