//! The cache of decoded code: blocks by guest physical address and code mode, found through a small
//! table by linear address. Contents never show in results.

use super::op::*;
use super::SoftCpu;
use crate::mem::{PageEvent, CODE};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Multiplicative hashing of one u64.
#[derive(Default)]
pub struct KeyHasher(u64);
impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0.rotate_left(8) ^ *b as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
    fn write_u64(&mut self, v: u64) {
        let x = v.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = x ^ x >> 29;
    }
}
pub type KeyMap<V> = HashMap<u64, V, BuildHasherDefault<KeyHasher>>;

/// Sets of two of the table by linear address.
pub const JUMPS: usize = 1 << 15;
/// Blocks kept before all are dropped.
const MAX_BLOCKS: usize = 200_000;

/// Two places for the addresses that share them, in one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct JumpSet(pub [Jump; 2]);

/// Where execution goes on at a linear address.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Jump {
    pub lin: u64,
    pub key: u64,
    pub block: *const Block,
    /// Where compiled code goes on (see `jit`).
    pub code: u64,
}

/// Instructions that cross a page, kept by page.
pub const LONE: usize = 1024;

/// An instruction that crosses a page.
pub struct Lone {
    pub mode: u8,
    pub bytes: Vec<u8>,
    pub block: Box<Block>,
}

/// What is decoded of one physical page.
#[derive(Default)]
pub struct CodePage {
    /// Bit i: bytes 64i..64i+63 hold decoded code.
    mask: u64,
    /// Each block's key and length in bytes.
    blocks: Vec<(u64, u32)>,
}

impl CodePage {
    /// Whether a write of `size` bytes at `phys` changes decoded bytes.
    fn holds(&self, phys: u64, size: u64) -> bool {
        let (first, end) = (phys & 0xFFF, (phys & 0xFFF) + size.max(1));
        self.mask & mask_of(phys, size) != 0
            && self.blocks.iter().any(|&(key, bytes)| {
                let at = key & 0xFFF;
                at < end && first < at + bytes as u64
            })
    }
}

#[derive(Default)]
pub struct Cache {
    pub blocks: KeyMap<Box<Block>>,
    pages: KeyMap<CodePage>,
    /// Blocks dropped while one of them may be running.
    /// (Boxed: a running block must not move.)
    #[allow(clippy::vec_box)]
    pub graveyard: Vec<Box<Block>>,
}

fn mask_of(phys: u64, len: u64) -> u64 {
    let first = (phys & 0xFFF) >> 6;
    let last = ((phys & 0xFFF) + len.max(1) - 1).min(4095) >> 6;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl SoftCpu {
    /// Nothing in the table by linear address holds any more.
    pub(crate) fn new_epoch(&mut self) {
        for s in &mut self.spaces {
            self.epochs += 1;
            s.epoch = self.epochs;
        }
        self.epochs += 1;
        self.epoch = self.epochs;
        self.update_key();
    }

    /// The table's key: epoch, privilege and code mode.
    pub(crate) fn update_key(&mut self) {
        // The same code in different address spaces must not share a place.
        self.st.gpr[SALT] = self.epoch.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
        self.jump_key = self.epoch << 4 | ((self.cpl == 3) as u64) << 2 | self.code_mode as u64;
    }

    /// The set of a linear address in the table.
    #[inline(always)]
    pub(crate) fn place(&self, lin: u64) -> usize {
        (lin ^ lin >> 13 ^ self.st.gpr[SALT]) as usize & (JUMPS - 1)
    }

    pub(crate) fn insert_block(&mut self, block: Box<Block>) -> *const Block {
        if self.cache.blocks.len() >= MAX_BLOCKS {
            self.drop_all_code();
        }
        let phys = block.key & !(7 << 60);
        let p: *const Block = &*block;
        let page = self.cache.pages.entry(phys & !0xFFF).or_default();
        page.mask |= mask_of(phys, block.bytes as u64);
        page.blocks.push((block.key, block.bytes));
        if let Some(old) = self.cache.blocks.insert(block.key, block) {
            self.cache.graveyard.push(old);
        }
        if self.mem().protect(phys, CODE) {
            self.drop_writes(phys & !0xFFF);
        }
        p
    }

    pub(crate) fn drop_all_code(&mut self) {
        let old = std::mem::take(&mut self.cache.blocks);
        self.cache.graveyard.extend(old.into_values());
        self.cache.pages.clear();
        self.code_epoch += 1;
        self.end = std::ptr::null();
        self.new_epoch();
    }

    /// Drop the code decoded from one page.
    pub(crate) fn drop_code_page(&mut self, phys: u64) {
        if let Some(page) = self.cache.pages.remove(&(phys & !0xFFF)) {
            for (key, _) in page.blocks {
                if let Some(b) = self.cache.blocks.remove(&key) {
                    self.cache.graveyard.push(b);
                }
            }
            self.end = std::ptr::null();
            self.code_epoch += 1;
            self.new_epoch();
        }
    }

    /// Tell other processors that a page changed; this one has dealt with it.
    pub(crate) fn announce(&mut self, phys: u64) {
        if self.cpus > 1 {
            let mem = self.mem();
            let known = mem.event_count() == self.seen;
            mem.push_event(PageEvent::Changed(phys & !0xFFF));
            if known {
                self.seen += 1;
            }
        }
    }

    /// A page with decoded code is written at `phys`.
    pub(crate) fn code_written(&mut self, phys: u64, size: u64) {
        let hit = self.cache.pages.get(&(phys & !0xFFF)).is_none_or(|p| p.holds(phys, size));
        if hit {
            self.drop_code_page(phys);
            self.mem().unprotect(phys, CODE);
        }
        self.announce(phys);
    }

    /// Hear what devices and other processors changed.
    pub(crate) fn sync_memory(&mut self) {
        let mem = self.mem();
        if mem.has_stale_code() {
            mem.collect_stale();
        }
        let count = mem.event_count();
        if count != self.seen {
            match mem.events_since(self.seen) {
                Some(events) => {
                    let mut changed = false;
                    for e in events {
                        match e {
                            PageEvent::Changed(p) => {
                                self.drop_code_page(p);
                                changed = true;
                            }
                            PageEvent::Protected(p) => self.drop_writes(p),
                        }
                    }
                    if changed {
                        self.flush_tlb();
                    }
                }
                None => {
                    self.drop_all_code();
                    self.flush_tlb();
                }
            }
            self.seen = count;
        }
        if mem.generation() != self.generation {
            self.generation = mem.generation();
            // The legacy window and ROM may show other bytes now.
            for page in 0xA0..0x100u64 {
                self.drop_code_page(page << 12);
            }
            self.flush_tlb();
        }
    }
}
