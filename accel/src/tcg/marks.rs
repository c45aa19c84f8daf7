//! What depends on the entries of page tables: exactly, by table and entry, so that a change of an entry drops just that.
//!
//! An entry is marked when a walk goes through it or code is fetched by it. The mark goes when what depends on the entry is
//! dropped; all marks of a table go when nothing of it is kept.

use super::cache::KeyMap;

/// Entries of a table (of 8 bytes; those of 4 bytes are marked in pairs).
pub const ENTRIES: usize = 512;
/// So many address spaces, or entries of the third level, are told apart in one table.
const MANY: usize = 64;
/// Tables that are looked after before all marks are dropped, with what they are for.
pub const MOST: usize = 1 << 16;

#[derive(Clone, Copy, Default)]
struct Bits([u64; ENTRIES / 64]);

impl Bits {
    fn set(&mut self, n: usize) {
        self.0[n / 64] |= 1 << (n % 64);
    }
    fn has(&self, n: usize) -> bool {
        self.0[n / 64] >> (n % 64) & 1 != 0
    }
    /// Whether it was set.
    fn take(&mut self, n: usize) -> bool {
        let had = self.has(n);
        self.0[n / 64] &= !(1 << (n % 64));
        had
    }
    fn any(&self) -> bool {
        self.0.iter().any(|w| *w != 0)
    }
}

/// What an entry led walks to, but for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Led {
    /// From the top table (of four levels).
    Top,
    /// To a table of leaves: that table is all that depends on it.
    Leaves,
    /// To anything.
    On,
}

/// An entry of the third level that led to another table: in which address space, and from which 2^30 linear addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Third {
    n: usize,
    cr3: u64,
    base: u64,
}

/// Of one table.
#[derive(Default)]
struct Table {
    top: Bits,
    leaves: Bits,
    on: Bits,
    third: Vec<Third>,
    /// Code was fetched by it, in either half of linear addresses: the table of blocks outlives the fetch TLB's entries.
    code: [Bits; 2],
    /// Address spaces in whose lower half that was.
    spaces: Vec<u64>,
    /// There are more of them.
    all: bool,
}

impl Table {
    /// Entry `n` led to another table.
    fn leads(&self, n: usize) -> bool {
        self.top.has(n) || self.leaves.has(n) || self.on.has(n) || self.third.iter().any(|u| u.n == n)
    }
}

/// What depended on an entry that changes.
pub struct Depended {
    pub top: bool,
    pub leaves: bool,
    pub on: bool,
    /// Of address spaces, 2^30 linear addresses each.
    pub ranges: Vec<(u64, u64)>,
}

/// Address spaces whose code in the lower half depended on an entry, or on a table.
pub enum Spaces {
    None,
    /// By CR3.
    These(Vec<u64>),
    All,
}

impl Spaces {
    pub fn has(&self, cr3: u64) -> bool {
        match self {
            Spaces::None => false,
            Spaces::These(list) => list.contains(&cr3),
            Spaces::All => true,
        }
    }
}

/// Of all tables.
#[derive(Default)]
pub struct Marks {
    /// By the tables' physical addresses.
    tables: KeyMap<Table>,
    /// Counts what a mark of an entry of a top table may have gone by.
    tops: u64,
}

/// The table and the number of an entry.
fn parts(at: u64) -> (u64, usize) {
    (at & !0xFFF, (at >> 3) as usize % ENTRIES)
}

impl Marks {
    pub fn clear(&mut self) {
        self.tables.clear();
        self.tops += 1;
    }
    /// As long as it is the same, no entry of a top table has lost its mark.
    pub fn tops(&self) -> u64 {
        self.tops
    }
    /// There are so many that all should go.
    pub fn too_many(&self) -> bool {
        self.tables.len() > MOST
    }

    /// The entry at `at` led to another table.
    pub fn led(&mut self, at: u64, led: Led) {
        let (page, n) = parts(at);
        let t = self.tables.entry(page).or_default();
        match led {
            Led::Top => t.top.set(n),
            Led::Leaves => t.leaves.set(n),
            Led::On => t.on.set(n),
        }
    }

    /// The entry of the third level at `at` led to another table, in the address space `cr3` from the 2^30 addresses of
    /// `base`.
    pub fn led_from(&mut self, at: u64, cr3: u64, base: u64) {
        let (page, n) = parts(at);
        let t = self.tables.entry(page).or_default();
        let this = Third { n, cr3, base };
        if t.third.contains(&this) {
            return;
        }
        if t.third.len() < MANY {
            t.third.push(this);
        } else {
            t.on.set(n);
        }
    }

    /// Code was fetched by the entry at `at`, in a half of linear addresses, by the address space `cr3`.
    pub fn fetched(&mut self, at: u64, half: usize, cr3: u64) {
        let (page, n) = parts(at);
        let t = self.tables.entry(page).or_default();
        t.code[half].set(n);
        if half == 0 && !t.all && !t.spaces.contains(&cr3) {
            t.all = t.spaces.len() == MANY;
            t.spaces.push(cr3);
        }
    }

    /// Whether the entry at `at` led to another table.
    pub fn leads(&self, at: u64) -> bool {
        let (page, n) = parts(at);
        self.tables.get(&page).is_some_and(|t| t.leads(n))
    }

    /// The entries of the table `page` that led to other tables.
    pub fn leading(&self, page: u64) -> Vec<u64> {
        let Some(t) = self.tables.get(&page) else { return Vec::new() };
        if !(t.top.any() || t.leaves.any() || t.on.any() || !t.third.is_empty()) {
            return Vec::new();
        }
        (0..ENTRIES).filter(|&n| t.leads(n)).map(|n| page + 8 * n as u64).collect()
    }

    /// The entry at `at` changes, and what depends on it as one that led to another table is dropped.
    pub fn take(&mut self, at: u64) -> Option<Depended> {
        let (page, n) = parts(at);
        let t = self.tables.get_mut(&page)?;
        let (top, leaves, on) = (t.top.take(n), t.leaves.take(n), t.on.take(n));
        let ranges: Vec<_> = t.third.iter().filter(|u| u.n == n).map(|u| (u.cr3, u.base)).collect();
        if !ranges.is_empty() {
            t.third.retain(|u| u.n != n);
        }
        self.tops += top as u64;
        (top || leaves || on || !ranges.is_empty()).then_some(Depended { top, leaves, on, ranges })
    }

    /// What code was fetched by the entry at `at` is looked up anew: whether some was in the upper half, and where in the
    /// lower half.
    pub fn take_code(&mut self, at: u64) -> (bool, Spaces) {
        let (page, n) = parts(at);
        let Some(t) = self.tables.get_mut(&page) else { return (false, Spaces::None) };
        let [low, high] = [0, 1].map(|half| t.code[half].take(n));
        let spaces = match (low, t.all) {
            (false, _) => Spaces::None,
            (true, true) => Spaces::All,
            // Other entries may have served them too.
            (true, false) => Spaces::These(t.spaces.clone()),
        };
        (high, spaces)
    }

    /// The same for all entries of the table `page`.
    pub fn take_codes(&mut self, page: u64) -> (bool, Spaces) {
        let Some(t) = self.tables.get_mut(&page) else { return (false, Spaces::None) };
        let [low, high] = std::mem::take(&mut t.code).map(|bits| bits.any());
        let list = std::mem::take(&mut t.spaces);
        let spaces = match (low, std::mem::take(&mut t.all)) {
            (false, _) => Spaces::None,
            (true, true) => Spaces::All,
            (true, false) => Spaces::These(list),
        };
        (high, spaces)
    }

    /// Nothing that the table `page` led to is kept any more.
    pub fn forget(&mut self, page: u64) {
        self.tops += self.tables.remove(&page).is_some_and(|t| t.top.any()) as u64;
    }
}
