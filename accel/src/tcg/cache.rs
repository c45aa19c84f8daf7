//! The cache of decoded code: blocks by guest physical address and code mode, found through a small
//! table by linear address. Contents never show in results.

use super::large::{Kept, Large};
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

/// Of the keys of privilege level 3.
pub const USER_KEY: u64 = 4;

/// Sets of two of the table by linear address.
pub const JUMPS: usize = 1 << 15;
/// Blocks kept before all are dropped.
const MAX_BLOCKS: usize = 400_000;
/// In a block's key: it is one instruction that runs on into another page ([`Block::second`]).
pub const CROSSING: u64 = 1 << 59;

/// Two places for the addresses that share them, in one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct JumpSet(pub [Jump; 2]);

impl JumpSet {
    pub const EMPTY: JumpSet = JumpSet([Jump::NONE; 2]);
}

/// Where execution goes on at a linear address.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Jump {
    pub lin: u64,
    pub key: u64,
    /// In the cache, or null.
    pub block: *const Block,
    /// Where compiled code goes on (see `jit`).
    pub code: u64,
}

impl Jump {
    const NONE: Jump = Jump { lin: 0, key: u64::MAX, block: std::ptr::null(), code: 0 };
}

/// What is decoded of one physical page.
#[derive(Default)]
pub struct CodePage {
    /// Bit i: bytes 64i..64i+63 hold decoded code.
    mask: u64,
    /// (Boxed: a running block must not move.)
    blocks: Vec<Kept<Block>>,
    /// Keys and blocks (null: free), hashed by the keys; a power of two, at most half full.
    index: Large<(u64, *const Block)>,
    /// Pages whose crossing instruction ends in this one, and after how many bytes.
    tails: Vec<(u64, u32)>,
}

impl CodePage {
    fn home(&self, key: u64) -> usize {
        (key ^ key >> 7 ^ key >> 53) as usize & (self.index.len() - 1)
    }

    /// The block with a key.
    pub fn find(&self, key: u64) -> Option<*const Block> {
        if self.index.is_empty() {
            return None;
        }
        let mut at = self.home(key);
        loop {
            let (k, b) = self.index[at];
            if b.is_null() || k == key {
                return (!b.is_null()).then_some(b);
            }
            at = (at + 1) & (self.index.len() - 1);
        }
    }

    /// Add a block whose key is not there yet.
    fn add(&mut self, block: Kept<Block>) {
        self.blocks.push(block);
        if self.index.len() < 2 * self.blocks.len() {
            self.rebuild();
        } else {
            self.enter(self.blocks.len() - 1);
        }
    }

    fn rebuild(&mut self) {
        let size = (4 * self.blocks.len()).next_power_of_two().max(8);
        self.index = (0..size).map(|_| (0, std::ptr::null())).collect();
        for n in 0..self.blocks.len() {
            self.enter(n);
        }
    }

    fn enter(&mut self, n: usize) {
        let b: &Block = &self.blocks[n];
        let mut at = self.home(b.key);
        while !self.index[at].1.is_null() {
            at = (at + 1) & (self.index.len() - 1);
        }
        self.index[at] = (b.key, b);
    }

    /// Take out the blocks that a write of `size` bytes at `phys` changes, as long as nothing is compiled (a trace goes
    /// through several blocks) and no other page's instruction is hit; `None` then.
    fn take(&mut self, phys: u64, size: u64) -> Option<Vec<Kept<Block>>> {
        if self.blocks.iter().any(|b| !b.code.get().is_null())
            || self.tails.iter().any(|t| near(phys, size, 0, t.1))
        {
            return None;
        }
        let (hit, rest) = std::mem::take(&mut self.blocks)
            .into_iter()
            .partition::<Vec<_>, _>(|b| near(phys, size, b.key & 0xFFF, b.bytes));
        self.blocks = rest;
        self.mask = self.tails.iter().fold(0, |m, t| m | mask_of(0, t.1 as u64));
        for b in &self.blocks {
            self.mask |= mask_of(b.key, (b.bytes as u64).min(4096 - (b.key & 0xFFF)));
            b.unlink();
        }
        self.rebuild();
        Some(hit)
    }

    /// Whether a write of `size` bytes at `phys` changes decoded bytes. (An empty page need not be looked after.)
    fn holds(&self, phys: u64, size: u64) -> bool {
        self.mask == 0
            || self.mask & mask_of(phys, size) != 0
                && (self.blocks.iter().any(|b| near(phys, size, b.key & 0xFFF, b.bytes))
                    || self.tails.iter().any(|t| near(phys, size, 0, t.1)))
    }
}

/// Whether a write of `size` bytes at `phys` changes `bytes` bytes at offset `at` of the page.
fn near(phys: u64, size: u64, at: u64, bytes: u32) -> bool {
    let (first, end) = (phys & 0xFFF, (phys & 0xFFF) + size.max(1));
    at < end && first < at + bytes as u64
}

#[derive(Default)]
pub struct Cache {
    /// By guest physical address. Once made they stay until all code is dropped.
    pages: KeyMap<Kept<CodePage>>,
    blocks: usize,
    /// Blocks dropped while one of them may be running.
    pub graveyard: Vec<Kept<Block>>,
    /// Blocks dropped that the table by linear address may still have somewhere: their keys are [`DEAD`].
    limbo: Vec<Kept<Block>>,
    /// The page of code that was written last.
    recent: Option<(u64, std::ptr::NonNull<CodePage>)>,
    /// Room to decode into.
    pub ops: Vec<Op>,
}

impl Cache {
    /// The code of the page that holds a guest physical address.
    pub fn page(&mut self, phys: u64) -> *const CodePage {
        &**self.pages.entry(phys & !0xFFF).or_default()
    }
    /// The same where there is some. Guests write beside their code again and again.
    fn recent(&mut self, phys: u64) -> Option<&mut CodePage> {
        let key = phys & !0xFFF;
        if self.recent.is_none_or(|r| r.0 != key) {
            self.recent = Some((key, self.pages.get_mut(&key).map(|p| (&mut **p).into())?));
        }
        // SAFETY: pages stay where they are until all code is dropped, which forgets this one; the cache is borrowed.
        self.recent.map(|mut r| unsafe { r.1.as_mut() })
    }
    /// The block with a key.
    pub fn get(&self, key: u64) -> Option<&Block> {
        let found = self.pages.get(&(key & PHYS & !0xFFF))?.find(key)?;
        // SAFETY: it is in the cache, which is borrowed.
        Some(unsafe { &*found })
    }
    /// All blocks.
    pub fn all(&self) -> impl Iterator<Item = &Block> {
        self.pages.values().flat_map(|p| &p.blocks).map(|b| &**b)
    }
}

/// The key of a block that was dropped, where it may still be found.
pub const DEAD: u64 = u64::MAX;
/// So many of them are worth a look at the whole table.
const LIMBO: usize = 4096;

/// After so many epochs their short keys come again.
pub const SHORT: u64 = 1 << 28;
/// A short key that never holds.
pub const NO_KEY: u32 = 15;

/// A key of the table in 32 bits.
fn short_key(epoch: u64, mode: u64) -> u32 {
    ((epoch % SHORT) << 4 | mode) as u32
}

/// The guest physical address in a key.
const PHYS: u64 = CROSSING - 1;

fn mask_of(phys: u64, len: u64) -> u64 {
    let first = (phys & 0xFFF) >> 6;
    let last = ((phys & 0xFFF) + len.max(1) - 1).min(4095) >> 6;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl SoftCpu {
    /// Nothing in the table by linear address holds any more.
    pub(crate) fn new_epoch(&mut self) {
        for h in &mut self.highs {
            self.epochs += 1;
            h.epoch = self.epochs;
        }
        self.new_low_epoch();
    }

    /// Nothing in the table in the lower half of linear addresses holds any more.
    pub(crate) fn new_low_epoch(&mut self) {
        for s in &mut self.spaces {
            self.epochs += 1;
            s.epoch = self.epochs;
        }
        self.epochs += 1;
        self.epoch = self.epochs;
        self.update_key();
    }

    /// The table's keys: epoch, a salt, privilege and code mode.
    pub(crate) fn update_key(&mut self) {
        let mode = if self.cpl == 3 { USER_KEY } else { 0 } | self.code_mode as u64;
        let salt = self.epoch.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 52;
        self.more_slots[KEY - 32] = self.epoch << 16 | salt << 4 | mode;
        self.more_slots[KEY - 31] = self.highs[0].epoch << 16 | mode;
        let [low, high] = [self.epoch, self.highs[0].epoch].map(|epoch| short_key(epoch, mode) as u64);
        self.more_slots[SHORT_KEYS - 32] = low | high << 32;
    }

    /// Put a block into the table by linear address; `known`: it is there already.
    pub(crate) fn enter(&mut self, known: Option<usize>, lin: u64, b: &Block) {
        let code = self.far_entry(b, lin);
        let (place, key) = (self.place(lin), self.key_of(lin));
        let set = &mut self.jumps[place].0;
        // In front; what was there takes the other place, unless that is this one's.
        if known != Some(0) {
            set[1] = set[0];
        }
        set[0] = Jump { lin, key, block: b, code };
        let mut p = b.places.get();
        let n = p.count as usize;
        if n > p.sets.len() || p.sets[..n].contains(&(place as u16)) {
            return;
        }
        if n < p.sets.len() {
            p.sets[n] = place as u16;
        }
        p.count += 1;
        b.places.set(p);
    }

    pub(crate) fn insert_block(&mut self, block: Kept<Block>) -> *const Block {
        if self.cache.blocks >= MAX_BLOCKS {
            self.drop_all_code();
        }
        let (phys, bytes) = (block.key & PHYS, block.bytes as u64);
        let p: *const Block = &*block;
        let here = bytes.min(4096 - (phys & 0xFFF));
        let second = (bytes > here).then_some(block.second);
        let page = self.cache.pages.entry(phys & !0xFFF).or_default();
        page.mask |= mask_of(phys, here);
        page.add(block);
        self.cache.blocks += 1;
        if let Some(second) = second {
            let tail = (phys & !0xFFF, (bytes - here) as u32);
            let page = self.cache.pages.entry(second).or_default();
            page.mask |= mask_of(0, bytes - here);
            if !page.tails.contains(&tail) {
                page.tails.push(tail);
            }
        }
        for page in [Some(phys & !0xFFF), second].into_iter().flatten() {
            if self.mem().protect(page, CODE) {
                self.drop_writes(page);
            }
        }
        p
    }

    pub(crate) fn drop_all_code(&mut self) {
        self.cache.recent = None;
        for (_, mut page) in std::mem::take(&mut self.cache.pages) {
            self.cache.graveyard.append(&mut page.blocks);
        }
        self.cache.blocks = 0;
        self.jumps.fill(JumpSet::EMPTY);
        self.cache.graveyard.append(&mut self.cache.limbo);
        self.forget_entries();
        self.drop_fetches();
        self.end = std::ptr::null();
        self.new_epoch();
    }

    /// Drop the code decoded from one page.
    pub(crate) fn drop_code_page(&mut self, phys: u64) {
        let Some(page) = self.cache.pages.get_mut(&(phys & !0xFFF)) else { return };
        page.mask = 0;
        page.index = Large::default();
        let tails = std::mem::take(&mut page.tails);
        let blocks = std::mem::take(&mut page.blocks);
        if !blocks.is_empty() {
            self.cache.blocks -= blocks.len();
            self.end = std::ptr::null();
            for b in &blocks {
                self.close(b);
            }
            self.forget_blocks(blocks);
        }
        for (first, _) in tails {
            self.drop_code_page(first);
        }
    }

    /// Take blocks that were dropped out of the table by linear address.
    fn forget_blocks(&mut self, blocks: Vec<Kept<Block>>) {
        let miss = self.miss();
        for mut b in blocks {
            let p = b.places.get();
            if p.count as usize > p.sets.len() {
                b.key = DEAD;
                b.unlink();
                self.cache.limbo.push(b);
                continue;
            }
            for &place in &p.sets[..p.count as usize] {
                for j in &mut self.jumps[place as usize].0 {
                    if std::ptr::eq(j.block, &*b) {
                        *j = Jump { code: miss, ..Jump::NONE };
                    }
                }
            }
            self.cache.graveyard.push(b);
        }
        if self.cache.limbo.len() >= LIMBO {
            for j in self.jumps.iter_mut().flat_map(|set| &mut set.0) {
                // SAFETY: blocks in the table are in the cache or in limbo.
                if !j.block.is_null() && unsafe { (*j.block).key } == DEAD {
                    *j = Jump { code: miss, ..Jump::NONE };
                }
            }
            self.cache.graveyard.append(&mut self.cache.limbo);
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
        let page = self.cache.recent(phys);
        let hit = page.as_ref().is_none_or(|p| p.holds(phys, size));
        let some = page.filter(|p| hit && p.mask != 0).and_then(|p| p.take(phys, size));
        if let Some(blocks) = some {
            self.cache.blocks -= blocks.len();
            self.end = std::ptr::null();
            self.forget_blocks(blocks);
        } else if hit {
            self.drop_code_page(phys);
            self.mem().unprotect(phys, CODE);
        }
        self.announce(phys);
    }

    /// Hear what devices and other processors changed.
    pub(crate) fn sync_memory(&mut self) {
        self.forget_short_keys();
        if self.marks.too_many() {
            self.flush_tlb();
        }
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
