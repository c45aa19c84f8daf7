//! Address translation: the page walk and the software TLB.
//!
//! The TLB is never visible to the guest: every page that a walk read is marked [`TABLE`], a write to an
//! entry that a walk used (its accessed bit is set) drops the TLB, so each access behaves as if it walked
//! the tables. That keeps accessed and dirty bits a function of the guest's instructions alone, whatever
//! the TLB holds (SDM vol. 3, sections 4.8 and 4.10 allow it).

use super::cache::CodePage;
use super::flags::AC;
use super::large::Large;
use super::marks::{Led, Spaces, ENTRIES};
use super::op::{Fault, R};
use super::tlb::{self, no_tag, Tlb, TLB_SIZE};
use super::SoftCpu;
use crate::mem::{Backing, TABLE};
use crate::Exception;

/// CR0 and CR4 bits.
pub const CR0_PE: u64 = 1;
pub const CR0_MP: u64 = 2;
pub const CR0_TS: u64 = 8;
pub const CR0_NE: u64 = 0x20;
pub const CR0_WP: u64 = 0x1_0000;
pub const CR0_AM: u64 = 0x4_0000;
pub const CR0_NW: u64 = 0x2000_0000;
pub const CR0_CD: u64 = 0x4000_0000;
pub const CR0_PG: u64 = 0x8000_0000;
pub const CR4_VME: u64 = 1;
pub const CR4_PVI: u64 = 2;
pub const CR4_TSD: u64 = 4;
pub const CR4_DE: u64 = 8;
pub const CR4_PSE: u64 = 0x10;
pub const CR4_PAE: u64 = 0x20;
pub const CR4_UMIP: u64 = 0x800;
pub const CR4_FSGSBASE: u64 = 0x1_0000;
pub const CR4_PCIDE: u64 = 0x2_0000;
pub const CR4_OSXSAVE: u64 = 0x4_0000;
pub const CR4_SMEP: u64 = 0x10_0000;
pub const CR4_SMAP: u64 = 0x20_0000;
pub const EFER_SCE: u64 = 1;
pub const EFER_LME: u64 = 0x100;
pub const EFER_LMA: u64 = 0x400;
pub const EFER_NXE: u64 = 0x800;

/// One entry of the fetch TLB.
#[derive(Clone, Copy)]
pub struct CodeEntry {
    pub tag: u64,
    pub host: *const u8,
    pub phys: u64,
    /// See [`Walk::leaf`].
    pub leaf: u64,
    /// The code of the physical page, where `host` is not null.
    pub page: *const CodePage,
}

pub const EMPTY_CODE: CodeEntry =
    CodeEntry { tag: 1, host: std::ptr::null(), phys: 0, leaf: NO_LEAF, page: std::ptr::null() };

/// Translations of an address space that is not in use, kept until it is again.
pub struct Space {
    cr3: u64,
    pub epoch: u64,
    /// When it was last in use.
    used: u64,
    tlb: [Tlb; 4],
    code_tlb: [Large<CodeEntry>; 2],
    filled: Vec<(u8, u16)>,
    code_filled: Vec<(u8, u16)>,
    leaves: [Large<u64>; 4],
    tables: Tables,
    /// Pages that `tlb` must no longer give write access to.
    protected: Vec<u64>,
    /// See [`SoftCpu::noted`].
    noted: (u64, usize, u64),
}

/// So many such pages are not worth remembering.
const PROTECTED: usize = 256;

impl Space {
    fn drain(&mut self) {
        self.protected.clear();
        drain(&mut self.tlb, &mut self.filled, &mut self.code_tlb, &mut self.code_filled, &mut self.tables);
    }

    /// It comes into use: drop direct write access to pages that became tables or code meanwhile.
    fn protect(&mut self) {
        for &page in &self.protected {
            self.tlb.iter_mut().for_each(|tlb| tlb.close_writes_to(page));
        }
        self.protected.clear();
    }
}

/// A filter of the pages that translations' last table entries lie in.
#[derive(Clone, Copy)]
pub struct Tables([u64; TABLES / 64]);

/// Bits of it.
const TABLES: usize = 1 << 12;

impl Tables {
    pub const NONE: Tables = Tables([0; TABLES / 64]);

    fn bit(leaf: u64) -> (usize, u64) {
        let n = (leaf >> 12).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - TABLES.trailing_zeros());
        ((n >> 6) as usize, 1 << (n & 63))
    }
    /// A last entry lies at `leaf`.
    fn add(&mut self, leaf: u64) {
        let (word, bit) = Self::bit(leaf);
        self.0[word] |= bit;
    }
    /// Whether one may lie in the page of `at`.
    fn may_have(&self, at: u64) -> bool {
        let (word, bit) = Self::bit(at);
        self.0[word] & bit != 0
    }
}

/// The upper half of linear addresses (the kernel's, as a rule), as far as code was fetched from it. Address spaces
/// whose top tables have the same entries for it share what the table of blocks knows.
pub struct High {
    pub epoch: u64,
    /// Top table entries that led to code: number and contents, accessed bit included.
    entries: Vec<(u16, u64)>,
}

impl High {
    pub fn new(epoch: u64) -> High {
        High { epoch, entries: Vec::new() }
    }
}

/// Upper halves kept beside the one in use.
const HIGHS: usize = 3;

/// Address spaces kept beside the one in use.
const SPACES: usize = 7;

/// What a walk through four levels found above a table of the first level, for 2^21 linear addresses, or above one of the
/// second, for 2^30. It holds for the same CR3 while no translation was dropped: whatever changes an entry that a walk used
/// drops some.
#[derive(Clone, Copy)]
pub struct Trail {
    /// Linear address >> 21, or >> 30.
    base: u64,
    cr3: u64,
    /// [`SoftCpu::changes`] then.
    changes: u64,
    /// The table below.
    table: u64,
    can_user: bool,
    can_write: bool,
    nx: bool,
}
impl Trail {
    const NONE: Trail =
        Trail { base: u64::MAX, cr3: 0, changes: 0, table: 0, can_user: false, can_write: false, nx: false };
}
/// As many are kept of each level.
const TRAILS: usize = 128;
/// For the first level, and for the second.
pub type Trails = [[Trail; TRAILS]; 2];
pub fn new_trails() -> Box<Trails> {
    Box::new([[Trail::NONE; TRAILS]; 2])
}

pub fn new_tlb() -> [Tlb; 4] {
    std::array::from_fn(|_| Tlb::new())
}
pub fn new_leaves() -> [Large<u64>; 4] {
    std::array::from_fn(|_| (0..TLB_SIZE).map(|_| NO_LEAF).collect())
}
/// Where `leaves` has what belongs to a slot of the TLB: what one table entry may have led to lies together.
const fn leaf_place(slot: usize) -> usize {
    (slot % ENTRIES) * (TLB_SIZE / ENTRIES) + slot / ENTRIES
}
/// Do something to the slots of TLBs whose last table entry, of a page of 4 KiB, lies at `at`: its number's low bits are
/// known.
fn at_leaf(tlb: &mut [Tlb], leaves: &[Large<u64>], at: u64, act: impl Fn(&mut Tlb, usize)) {
    for (tlb, leaves) in tlb.iter_mut().zip(leaves) {
        for slot in ((at >> 3) as usize % ENTRIES..TLB_SIZE).step_by(ENTRIES) {
            if leaves[leaf_place(slot)] == at {
                act(tlb, slot);
            }
        }
    }
}
/// Of each fetch TLB.
const CODE_TLB: usize = 256;

pub fn new_code_tlb() -> [Large<CodeEntry>; 2] {
    std::array::from_fn(|_| (0..CODE_TLB).map(|_| EMPTY_CODE).collect())
}

/// Empty the entries in use of both.
fn drain(
    tlb: &mut [Tlb; 4],
    filled: &mut Vec<(u8, u16)>,
    code_tlb: &mut [Large<CodeEntry>; 2],
    code_filled: &mut Vec<(u8, u16)>,
    tables: &mut Tables,
) {
    *tables = Tables::NONE;
    for (mmu, slot) in filled.drain(..) {
        tlb[mmu as usize].clear(slot as usize);
    }
    for (user, slot) in code_filled.drain(..) {
        code_tlb[user as usize][slot as usize] = EMPTY_CODE;
    }
}

/// Why memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read,
    Write,
    Exec,
}

/// What a walk found.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    pub phys: u64,
    /// Writes are permitted too and the dirty bit is set.
    pub writable: bool,
    /// Where the last table entry lies (to 8 bytes).
    pub leaf: u64,
}

/// No table entry.
pub const NO_LEAF: u64 = u64::MAX;

/// How an entry of a table changes, and how much that counts on the way to [`MANY_WRITES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// No walk used it.
    Unused = 4,
    /// All that changes is whether, and how, its page is written to. (Processes that fork do this to all their pages, and the
    /// code that the same table maps is in use again soon.)
    Writes = 1,
    Used = 32,
}
/// Writes to one table, each within so many instructions of the one before, count until nothing of it is kept and its
/// writes are free.
const MANY_WRITES: u32 = 64;
const WRITES_WITHIN: u64 = 1000;

/// Whether a word of a table may be an entry that a walk used, or two.
pub fn is_used(e: u64) -> bool {
    e & 0x21 == 0x21 || e >> 32 & 0x21 == 0x21
}

/// Supervisor; supervisor with EFLAGS.AC set under SMAP; user.
pub const MMU_SUP: usize = 0;
pub const MMU_SUP_AC: usize = 1;
pub const MMU_USER: usize = 2;
/// User with alignment checks: its TLB stays empty, so that every access is checked.
pub const MMU_USER_AC: usize = 3;

impl SoftCpu {
    /// Choose the TLB by privilege and AC.
    pub(crate) fn update_mmu(&mut self) {
        self.mmu = if self.cpl == 3 {
            MMU_USER + self.alignment_checks() as usize
        } else if self.st.cr4 & CR4_SMAP != 0 && self.eflags & AC != 0 {
            MMU_SUP_AC
        } else {
            MMU_SUP
        };
        self.update_key();
    }

    /// Drop all translations, of all address spaces.
    pub(crate) fn flush_tlb(&mut self) {
        let (filled, code_filled) = (&mut self.filled, &mut self.code_filled);
        drain(&mut self.tlb, filled, &mut self.code_tlb, code_filled, &mut self.tables);
        self.spaces.iter_mut().for_each(Space::drain);
        self.marks.clear();
        self.highs.truncate(1);
        self.highs[0].entries.clear();
        self.changes += 1;
        // The next instruction is fetched anew.
        self.end = std::ptr::null();
        self.new_epoch();
    }

    /// What it means that the entry at `at`, which a walk used, becomes `new`.
    pub(crate) fn kind_of_change(&self, at: u64, old: u64, new: u64) -> Change {
        // Writable, dirty, and what the processor ignores in four levels (SDM vol. 3, section 4.5.4; protection keys are
        // not there): where the page is, who may read it or fetch from it, and that it was accessed stay as they are. In
        // the entry of a large page, or one that leads to a table, more depends on it.
        const WRITES: u64 = 0x42 | 0xE00 | 0x7FF << 52;
        let page = old & 0xA1 == 0x21 && self.efer & EFER_LMA != 0;
        if page && (old ^ new) & !WRITES == 0 && !self.marks.leads(at) {
            Change::Writes
        } else {
            Change::Used
        }
    }

    /// A page that walks read is about to be written, namely the entry at `at`. Drops the translations that depend on it.
    /// True: none depends on the page any more.
    pub(crate) fn table_changes(&mut self, at: u64, change: Change) -> bool {
        let page = at & !0xFFF;
        let (last, count, since) = self.table_writes;
        let again = last == page && self.pos.wrapping_sub(since) < WRITES_WITHIN;
        let count = if again { count + change as u32 } else { 0 };
        self.table_writes = (page, count, self.pos);
        if change == Change::Used && self.entry_changes(at) {
            return true;
        }
        if count <= MANY_WRITES {
            match change {
                Change::Unused => {}
                Change::Writes => self.drop_leaf_writes(at),
                Change::Used => self.drop_leaf(at),
            }
            return false;
        }
        // The page is being filled, emptied, or no longer a table.
        for at in self.marks.leading(page) {
            if self.entry_changes(at) {
                return true;
            }
        }
        self.drop_leaves(page, |leaf| leaf & !0xFFF == page);
        self.drop_codes(page);
        self.marks.forget(page);
        true
    }

    /// The entry at `at` changes: drop what walks found through it in other tables. True: everything was dropped.
    fn entry_changes(&mut self, at: u64) -> bool {
        let Some(was) = self.marks.take(at) else { return false };
        self.changes += 1;
        if was.on {
            self.flush_tlb();
            return true;
        }
        if was.top {
            let (top, n) = (at & !0xFFF, at >> 3 & 0x1FF);
            for k in 0..self.spaces.len() {
                if self.spaces[k].cr3 & self.phys_mask & !0xFFF == top {
                    let cr3 = self.spaces[k].cr3;
                    self.drop_range(cr3, 0, 63);
                    self.drop_range(cr3, 1 << 63, 63);
                }
            }
            if self.cr3 & self.phys_mask & !0xFFF == top {
                if n >= 256 {
                    self.flush_tlb();
                    return true;
                }
                self.drop_range(self.cr3, n << 39, 39);
            }
        }
        for (cr3, base) in was.ranges {
            self.drop_range(cr3, base, 30);
        }
        if was.leaves {
            let table = self.phys_read(at, 8) & self.phys_mask & !0xFFF;
            self.drop_leaves(table, |leaf| leaf & !0xFFF == table);
            self.drop_codes(table);
        }
        false
    }

    /// Drop the translations of one address space whose linear addresses are those of `base` but for the low `bits`.
    fn drop_range(&mut self, cr3: u64, base: u64, bits: u32) {
        self.changes += 1;
        self.epochs += 1;
        let here = self.cr3 == cr3;
        let (tlb, filled, code_tlb, code_filled, epoch) = if here {
            (&mut self.tlb, &mut self.filled, &mut self.code_tlb, &self.code_filled, &mut self.epoch)
        } else if let Some(s) = self.spaces.iter_mut().find(|s| s.cr3 == cr3) {
            (&mut s.tlb, &mut s.filled, &mut s.code_tlb, &s.code_filled, &mut s.epoch)
        } else {
            return;
        };
        let hit = |tag: u64| (tag ^ base) >> bits == 0;
        // Processes that end have this done for one range after the other.
        filled.retain(|&(mmu, slot)| {
            let (tlb, slot) = (&mut tlb[mmu as usize], slot as usize);
            let hit = tlb.tags(slot).into_iter().any(hit);
            if hit {
                tlb.clear(slot);
            }
            !hit
        });
        for &(user, slot) in code_filled {
            let e = &mut code_tlb[user as usize][slot as usize];
            if hit(e.tag) {
                e.tag = 1;
            }
        }
        *epoch = self.epochs;
        if here {
            self.update_key();
            self.end = std::ptr::null();
        }
    }

    /// Close the translations for writes whose last table entry, of a page of 4 KiB, lies at `at`: the next write looks
    /// whether it is permitted, and sets the dirty bit. What else they say stays true.
    fn drop_leaf_writes(&mut self, at: u64) {
        let here = (&mut self.tlb, &self.leaves, &self.tables);
        let parked = self.spaces.iter_mut().map(|s| (&mut s.tlb, &s.leaves, &s.tables));
        for (tlb, leaves, tables) in parked.chain([here]) {
            if !tables.may_have(at) {
                continue;
            }
            at_leaf(tlb, leaves, at, Tlb::forbid_writes);
        }
        // Groups of accesses have looked already.
        self.changes += 1;
    }

    /// Drop the translations whose last table entry lies at `at`, where the old one still is.
    fn drop_leaf(&mut self, at: u64) {
        const LARGE: u64 = 0x80;
        if self.st.cr4 & CR4_PAE == 0 || self.phys_read(at, 8) & LARGE != 0 {
            self.drop_leaves(at, |leaf| leaf == at);
        } else {
            self.drop_small_leaf(at);
        }
        let code = self.marks.take_code(at);
        self.drop_code_keys(code);
    }

    /// The same of a page of 4 KiB, but for blocks.
    fn drop_small_leaf(&mut self, at: u64) {
        let n = (at >> 3) as usize % CODE_TLB;
        let here = (&mut self.tlb, &self.leaves, &mut self.code_tlb, &self.tables);
        let parked = self.spaces.iter_mut().map(|s| (&mut s.tlb, &s.leaves, &mut s.code_tlb, &s.tables));
        for (tlb, leaves, code_tlb, tables) in parked.chain([here]) {
            if !tables.may_have(at) {
                continue;
            }
            at_leaf(tlb, leaves, at, Tlb::close);
            for tlb in code_tlb {
                let e = &mut tlb[n];
                if e.leaf == at {
                    e.tag = 1;
                }
            }
        }
        self.changes += 1;
    }

    /// Drop translations by where their last table entry lies, all in one page.
    fn drop_leaves(&mut self, page: u64, which: impl Fn(u64) -> bool) {
        self.changes += 1;
        let here =
            (&mut self.tlb, &self.leaves, &self.filled, &mut self.code_tlb, &self.code_filled, &self.tables);
        let parked = self
            .spaces
            .iter_mut()
            .map(|s| (&mut s.tlb, &s.leaves, &s.filled, &mut s.code_tlb, &s.code_filled, &s.tables));
        for (tlb, leaves, filled, code_tlb, code_filled, tables) in parked.chain([here]) {
            if !tables.may_have(page) {
                continue;
            }
            for &(mmu, slot) in filled {
                if which(leaves[mmu as usize][leaf_place(slot as usize)]) {
                    tlb[mmu as usize].close(slot as usize);
                }
            }
            for &(user, slot) in code_filled {
                let e = &mut code_tlb[user as usize][slot as usize];
                if which(e.leaf) {
                    e.tag = 1;
                }
            }
        }
    }

    /// What code was fetched by entries of the table `page` is looked up anew.
    fn drop_codes(&mut self, page: u64) {
        let code = self.marks.take_codes(page);
        self.drop_code_keys(code);
    }

    /// The table of blocks holds no more for code in the upper half, and in the lower half of some address spaces. (Whatever
    /// it has got since by an entry marks it again.)
    fn drop_code_keys(&mut self, (high, low): (bool, Spaces)) {
        if high {
            self.new_epoch();
        } else {
            for s in self.spaces.iter_mut().filter(|s| low.has(s.cr3)) {
                self.epochs += 1;
                s.epoch = self.epochs;
            }
            if low.has(self.cr3) {
                self.epochs += 1;
                self.epoch = self.epochs;
                self.update_key();
            }
        }
        if high || !matches!(low, Spaces::None) {
            // The next instruction is fetched by the new tables.
            self.end = std::ptr::null();
        }
    }

    /// Empty the fetch TLBs.
    pub(crate) fn drop_fetches(&mut self) {
        let spaces = self.spaces.iter_mut().map(|s| (&mut s.code_tlb, &mut s.code_filled));
        for (tlb, filled) in spaces.chain([(&mut self.code_tlb, &mut self.code_filled)]) {
            for (user, slot) in filled.drain(..) {
                tlb[user as usize][slot as usize] = EMPTY_CODE;
            }
        }
    }

    /// Where the top table of the address space in use has entry `n`.
    fn top_entry(&self, n: u16) -> u64 {
        (self.cr3 & self.phys_mask & !0xFFF) + 8 * n as u64
    }

    /// Find the upper half of the address space that is now in use, among those known.
    fn choose_high(&mut self) {
        // They were found here before, and any change of them since would have been noticed.
        if self.noted == self.high_now() {
            return;
        }
        let fits = |c: &mut Self, at: usize| {
            (0..c.highs[at].entries.len()).all(|k| {
                let (n, value) = c.highs[at].entries[k];
                let place = c.top_entry(n);
                c.phys_read(place, 8) == value
            })
        };
        match (0..self.highs.len()).find(|&at| fits(self, at)) {
            Some(0) => {}
            Some(at) => self.highs[..=at].rotate_right(1),
            None => {
                self.highs.truncate(HIGHS);
                self.epochs += 1;
                self.highs.insert(0, High::new(self.epochs));
            }
        }
        // From now on these entries count as used by walks of this address space.
        for k in 0..self.highs[0].entries.len() {
            let place = self.top_entry(self.highs[0].entries[k].0);
            self.protect_table(place);
            self.marks.led(place, Led::Top);
        }
        self.noted = self.high_now();
    }

    fn high_now(&self) -> (u64, usize, u64) {
        (self.highs[0].epoch, self.highs[0].entries.len(), self.marks.tops())
    }

    /// Code was fetched at `lin` in the upper half.
    fn note_high(&mut self, lin: u64) {
        let n = (lin >> 39 & 0x1FF) as u16;
        let place = self.top_entry(n);
        let value = self.phys_read(place, 8);
        match self.highs[0].entries.iter().position(|e| e.0 == n) {
            None => self.highs[0].entries.push((n, value)),
            Some(k) if self.highs[0].entries[k].1 == value => {}
            Some(k) => {
                self.highs[0].entries[k].1 = value;
                self.epochs += 1;
                self.highs[0].epoch = self.epochs;
                self.update_key();
            }
        }
    }

    /// The walk to `lin` went through the third-level entry at `at`.
    fn note_upper(&mut self, at: u64, lin: u64) {
        if lin >> 63 == 0 {
            self.marks.led_from(at, self.cr3, lin & !0x3FFF_FFFF);
        } else {
            // All address spaces may have it.
            self.marks.led(at, Led::On);
        }
    }

    /// CR3 becomes `cr3`. Translations always agree with the tables, so none needs to be dropped: those of
    /// the address space that is left are put aside.
    pub(crate) fn switch_space(&mut self, cr3: u64) {
        if cr3 == self.cr3 {
            return;
        }
        self.switches += 1;
        if self.marks.too_many() {
            self.flush_tlb();
        }
        let known = self.spaces.iter().position(|s| s.cr3 == cr3);
        let fresh = known.is_none();
        let at = match known {
            Some(at) => at,
            None if self.spaces.len() < SPACES => {
                self.spaces.push(Space {
                    cr3,
                    epoch: 0,
                    used: 0,
                    tlb: new_tlb(),
                    code_tlb: new_code_tlb(),
                    filled: Vec::new(),
                    code_filled: Vec::new(),
                    leaves: new_leaves(),
                    tables: Tables::NONE,
                    protected: Vec::new(),
                    noted: (0, 0, 0),
                });
                self.spaces.len() - 1
            }
            None => (0..SPACES).min_by_key(|i| self.spaces[*i].used).unwrap_or(0),
        };
        let s = &mut self.spaces[at];
        if fresh {
            s.drain();
            s.noted = (0, 0, 0);
            self.epochs += 1;
            s.epoch = self.epochs;
        }
        s.protect();
        std::mem::swap(&mut self.tlb, &mut s.tlb);
        std::mem::swap(&mut self.code_tlb, &mut s.code_tlb);
        std::mem::swap(&mut self.leaves, &mut s.leaves);
        std::mem::swap(&mut self.tables, &mut s.tables);
        std::mem::swap(&mut self.filled, &mut s.filled);
        std::mem::swap(&mut self.code_filled, &mut s.code_filled);
        std::mem::swap(&mut self.epoch, &mut s.epoch);
        std::mem::swap(&mut self.noted, &mut s.noted);
        s.used = self.switches;
        s.cr3 = self.cr3;
        self.find_tlbs();
        self.cr3 = cr3;
        self.choose_high();
        self.update_key();
    }

    /// For compiled code.
    pub(crate) fn find_tlbs(&mut self) {
        self.tlb_at = [MMU_SUP, MMU_USER].map(|mmu| self.tlb[mmu].address());
    }

    /// Drop direct write access to one physical page.
    pub(crate) fn drop_writes(&mut self, page: u64) {
        self.changes += 1;
        self.tlb.iter_mut().for_each(|tlb| tlb.close_writes_to(page));
        // Of the others, many are never in use again.
        for s in self.spaces.iter_mut().filter(|s| !s.filled.is_empty()) {
            s.protected.push(page);
            if s.protected.len() > PROTECTED {
                s.drain();
            }
        }
    }

    /// The table entry of `size` bytes at `addr`, whose page is one that walks read from now on.
    #[inline]
    fn table_entry(&mut self, addr: u64, size: u8) -> u64 {
        let b = self.mem().backing(addr);
        // SAFETY: the flag byte lives as long as guest memory.
        let known = !b.flags.is_null()
            && unsafe { &*b.flags }.load(std::sync::atomic::Ordering::Relaxed) & TABLE != 0;
        if !known {
            self.protect_table(addr);
        }
        Self::read_from(&b, addr, size)
    }

    fn set_bits(&mut self, addr: u64, old: u64, new: u64, size: u8) {
        if old != new {
            self.phys_write_table(addr, size, new);
        }
    }

    fn protect_table(&mut self, addr: u64) {
        if self.mem().protect(addr, TABLE) {
            self.drop_writes(addr & !0xFFF);
        }
    }

    fn page_fault<T>(&mut self, lin: u64, access: Access, user: bool, present: bool, rsvd: bool) -> R<T> {
        let mut e = present as u32 | ((access == Access::Write) as u32) << 1 | (user as u32) << 2;
        if rsvd {
            e |= 8;
        }
        let nx = self.st.cr4 & CR4_PAE != 0 && self.efer & EFER_NXE != 0;
        if access == Access::Exec && (nx || self.st.cr4 & CR4_SMEP != 0) {
            e |= 16;
        }
        self.fault = Exception::page_fault(e, lin);
        Err(Fault)
    }

    /// Translate `lin`, setting accessed and dirty bits, or raise #PF (SDM vol. 3, chapter 4).
    pub(crate) fn walk(&mut self, lin: u64, access: Access, mmu: usize) -> R<Walk> {
        if self.st.cr0 & CR0_PG == 0 {
            return Ok(Walk { phys: lin & 0xFFFF_FFFF, writable: true, leaf: NO_LEAF });
        }
        let user = mmu >= MMU_USER;
        let write = access == Access::Write;
        let cr0 = self.st.cr0;
        let cr4 = self.st.cr4;
        let nxe = self.efer & EFER_NXE != 0;
        // Collected over the levels.
        let mut can_user = true;
        let mut can_write = true;
        let mut nx = false;
        let mut used: [(u64, u64); 4] = [(0, 0); 4];
        let mut n = 0;
        // What is new above the second level and above the first.
        let mut above = [None; 2];
        let mut whole = true;
        let (phys, size);
        if cr4 & CR4_PAE == 0 {
            let dir = self.cr3 & 0xFFFF_F000 | lin >> 20 & 0xFFC;
            let pde = self.table_entry(dir, 4);
            if pde & 1 == 0 {
                return self.page_fault(lin, access, user, false, false);
            }
            used[0] = (dir, pde);
            n = 1;
            can_user &= pde & 4 != 0;
            can_write &= pde & 2 != 0;
            if pde & 0x80 != 0 && cr4 & CR4_PSE != 0 {
                if pde & 0x20_0000 != 0 {
                    return self.page_fault(lin, access, user, true, true);
                }
                // PSE-36: bits 13..20 are address bits 32..39.
                let base = pde & 0xFFC0_0000 | (pde >> 13 & 0xFF) << 32;
                phys = base | lin & 0x3F_FFFF;
            } else {
                let at = pde & 0xFFFF_F000 | lin >> 10 & 0xFFC;
                let pte = self.table_entry(at, 4);
                if pte & 1 == 0 {
                    return self.page_fault(lin, access, user, false, false);
                }
                used[1] = (at, pte);
                n = 2;
                can_user &= pte & 4 != 0;
                can_write &= pte & 2 != 0;
                phys = pte & 0xFFFF_F000 | lin & 0xFFF;
            }
            size = 4;
        } else {
            size = 8;
            let long = self.efer & EFER_LMA != 0;
            let addr_mask = self.phys_mask & !0xFFF;
            let rsvd = !self.phys_mask & 0x000F_FFFF_FFFF_F000 | if nxe { 0 } else { 1 << 63 };
            let (mut table, mut level) = if long { (self.cr3 & addr_mask, 4) } else { (0, 2) };
            if !long {
                // The PDPTEs were loaded with CR3 (SDM vol. 3, section 4.4.1).
                let pdpte = self.pdpte[(lin >> 30 & 3) as usize];
                if pdpte & 1 == 0 {
                    return self.page_fault(lin, access, user, false, false);
                }
                table = pdpte & addr_mask;
            }
            for found in 1..=(if long { 2 } else { 0 }) {
                let base = lin >> (12 + 9 * found);
                let t = &self.trails[found - 1][base as usize & (TRAILS - 1)];
                if t.base == base && t.cr3 == self.cr3 && t.changes == self.changes {
                    (table, level) = (t.table, found);
                    (can_user, can_write, nx) = (t.can_user, t.can_write, t.nx);
                    whole = false;
                    break;
                }
            }
            loop {
                let shift = 3 + 9 * level;
                let at = table | (lin >> shift & 0x1FF) << 3;
                let e = self.table_entry(at, 8);
                if e & 1 == 0 {
                    return self.page_fault(lin, access, user, false, false);
                }
                let large = e & 0x80 != 0 && (level == 2 || level == 3 && long);
                let bad = e & rsvd != 0
                    || !long && e & 0x7FF0_0000_0000_0000 != 0
                    || e & 0x80 != 0 && (level == 4)
                    || large && e & ((1u64 << shift) - 1) & !0x1FFF != 0;
                if bad {
                    return self.page_fault(lin, access, user, true, true);
                }
                used[n] = (at, e);
                n += 1;
                can_user &= e & 4 != 0;
                can_write &= e & 2 != 0;
                nx |= nxe && e >> 63 != 0;
                if level == 1 || large {
                    let m = (1u64 << shift) - 1;
                    phys = e & addr_mask & !m | lin & m;
                    break;
                }
                table = e & addr_mask;
                level -= 1;
                if level <= 2 {
                    above[level - 1] = Some((table, can_user, can_write, nx));
                }
            }
        }
        // Permissions (SDM vol. 3, section 4.6).
        let write_ok = can_write || !user && cr0 & CR0_WP == 0;
        let ok = if user {
            can_user
                && match access {
                    Access::Read => true,
                    Access::Write => can_write,
                    Access::Exec => !nx,
                }
        } else {
            match access {
                Access::Exec => !(nx || can_user && cr4 & CR4_SMEP != 0),
                _ => (!can_user || cr4 & CR4_SMAP == 0 || mmu == MMU_SUP_AC) && (!write || write_ok),
            }
        };
        if !ok {
            return self.page_fault(lin, access, user, true, false);
        }
        let mut dirty = false;
        for (i, &(at, e)) in used[..n].iter().enumerate() {
            let mut new = e | 0x20;
            if i == n - 1 {
                if write {
                    new |= 0x40;
                }
                dirty = new & 0x40 != 0;
            }
            match (i + 1 < n, size, i) {
                (false, ..) => {}
                (_, 8, 0) if self.efer & EFER_LMA != 0 && whole => self.marks.led(at, Led::Top),
                (_, 8, _) if i + 2 == n => {
                    self.marks.led(at, Led::Leaves);
                    if n == 3 && whole {
                        // A trail may lead from here to tables of leaves.
                        self.note_upper(at, lin);
                    }
                }
                (_, 8, _) => self.note_upper(at, lin),
                _ => self.marks.led(at, Led::On),
            }
            self.set_bits(at, e, new, size);
        }
        if self.efer & EFER_LMA != 0 {
            for (k, above) in above.into_iter().enumerate() {
                let Some((table, can_user, can_write, nx)) = above else { continue };
                let (base, cr3, changes) = (lin >> (21 + 9 * k), self.cr3, self.changes);
                self.trails[k][base as usize & (TRAILS - 1)] =
                    Trail { base, cr3, changes, table, can_user, can_write, nx };
            }
        }
        Ok(Walk { phys, writable: dirty && write_ok, leaf: used[n - 1].0 & !7 })
    }

    /// Load the four PDPTEs of PAE paging; #GP(0) for reserved bits.
    pub(crate) fn load_pdptes(&mut self, cr3: u64) -> R<()> {
        let base = cr3 & 0xFFFF_FFE0;
        let mut new = [0; 4];
        for (i, e) in new.iter_mut().enumerate() {
            *e = self.phys_read(base + 8 * i as u64, 8);
            if *e & 1 != 0 && *e & (0x1E6 | !self.phys_mask) != 0 {
                return self.gp(0);
            }
        }
        self.pdpte = new;
        Ok(())
    }

    /// Fill the data TLB after a successful walk, if the page is plain memory.
    pub(crate) fn fill(&mut self, lin: u64, w: &Walk, mmu: usize) {
        let phys = w.phys & !0xFFF;
        if self.lapic.covers(phys) {
            return;
        }
        let b = self.mem().backing(phys);
        self.fill_from(&b, lin, w, mmu);
    }

    /// The same where it is not the local APIC's; `b` backs the page.
    pub(crate) fn fill_from(&mut self, b: &Backing, lin: u64, w: &Walk, mmu: usize) {
        let page = lin & !0xFFF;
        let phys = w.phys & !0xFFF;
        if b.read.is_null() || mmu == MMU_USER_AC {
            return;
        }
        let slot = tlb::slot_of(lin);
        let mut wtag = no_tag(slot);
        if w.writable && self.watch_free(page) && b.writes_are_free() {
            wtag = page;
        }
        let rtag = if self.watch_free(page) { page } else { no_tag(slot) };
        if self.tlb[mmu].set(slot, [rtag, wtag], b.read.cast_mut(), phys, w.writable) {
            self.filled.push((mmu as u8, slot as u16));
        }
        self.leaves[mmu][leaf_place(slot)] = w.leaf;
        self.tables.add(w.leaf);
    }

    /// Host page and guest physical page to fetch instructions of linear page `lin` from; the host page is
    /// null where it is not memory.
    pub(crate) fn fetch_page(&mut self, lin: u64) -> R<CodeEntry> {
        let page = lin & !0xFFF;
        let user = (self.mmu >= MMU_USER) as usize;
        let slot = (lin >> 12) as usize & (CODE_TLB - 1);
        let e = self.code_tlb[user][slot];
        if e.tag == page {
            return Ok(e);
        }
        let w = self.walk(lin, Access::Exec, self.mmu)?;
        let phys = w.phys & !0xFFF;
        self.cut_page(page, phys);
        let host = if self.lapic.covers(phys) { std::ptr::null() } else { self.mem().backing(phys).read };
        if w.leaf != NO_LEAF {
            let half = (lin >> 63) as usize;
            self.marks.fetched(w.leaf, half, self.cr3);
            if half == 1 {
                self.note_high(lin);
            }
        }
        let mut e = CodeEntry { tag: page, host, phys, leaf: w.leaf, page: std::ptr::null() };
        if !host.is_null() {
            e.page = self.cache.page(phys);
            if self.code_tlb[user][slot].host.is_null() {
                self.code_filled.push((user as u8, slot as u16));
            }
            self.code_tlb[user][slot] = e;
            self.tables.add(w.leaf);
        }
        Ok(e)
    }
}
