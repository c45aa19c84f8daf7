//! Which blocks are compiled as one: a hot block, and what mostly follows it in its page.
//!
//! The parts of a trace have one check of the budget and keep flags and vector registers in sight of each
//! other. Where a conditional branch leaves the trace, code out of line gives the rest of the budget back.

use super::super::cache::{Cache, CROSSING};
use super::super::op::{Block, Op, WATCHED};
use super::kind::{classify, Kind};
use super::HOT;

/// At most so many blocks, and instructions, in one.
const PARTS: usize = 8;
const LENGTH: usize = 64;
/// A trace of so many instructions is long enough.
const ENOUGH: u32 = 16;
/// Loops are unrolled to at most so many instructions.
const UNROLLED: usize = 32;

/// One block of a trace.
pub struct Part<'a> {
    pub block: &'a Block,
    /// Its offset in its page.
    pub at: u64,
    /// Instructions of the trace before it.
    pub before: u32,
}

/// A block and what follows it.
#[derive(Default)]
pub struct Trace<'a> {
    pub parts: Vec<Part<'a>>,
    pub kinds: Vec<Kind>,
    /// The part that each instruction belongs to.
    part_of: Vec<u8>,
    /// Instructions in all.
    pub count: u32,
    /// Bytes of an address, and of what the stack holds.
    pub word: u8,
}

/// How often a block ran, as far as was counted.
fn weight(block: &Block) -> u32 {
    if block.code.get().is_null() {
        block.runs.get()
    } else {
        block.runs.get().max(HOT)
    }
}

impl<'a> Trace<'a> {
    pub fn new(first: &'a Block, cache: &'a Cache, alone: bool) -> Trace<'a> {
        let mut t = Trace::default();
        t.add(first, alone);
        while let Some(next) = t.successor(cache) {
            if std::ptr::eq(next, first) {
                t.unroll(alone);
                break;
            }
            if t.parts.iter().any(|p| std::ptr::eq(p.block, next)) {
                break;
            }
            t.add(next, alone);
        }
        t
    }

    /// The trace leads back to its start: a short loop goes round more than once for one check of the budget.
    fn unroll(&mut self, alone: bool) {
        let body: Vec<&'a Block> = self.parts.iter().map(|p| p.block).collect();
        let length = self.count as usize;
        for _ in 1..UNROLLED / length {
            for b in &body {
                self.add(b, alone);
            }
        }
    }

    /// The same trace again, by the keys of its blocks.
    pub fn of(keys: &[u64], cache: &'a Cache, alone: bool) -> Option<Trace<'a>> {
        let mut t = Trace::default();
        for key in keys {
            t.add(cache.get(*key)?, alone);
        }
        (t.count > 0).then_some(t)
    }
    pub fn keys(&self) -> Vec<u64> {
        self.parts.iter().map(|p| p.block.key).collect()
    }

    fn add(&mut self, block: &'a Block, alone: bool) {
        let at = block.key & 0xFFF;
        self.word = if block.is_flat32() { 4 } else { 8 };
        self.kinds.extend(block.ops().iter().map(|op| classify(op, block, alone)));
        self.part_of.extend(block.ops().iter().map(|_| self.parts.len() as u8));
        self.parts.push(Part { block, at, before: self.count });
        self.count += block.count;
    }

    pub fn len(&self) -> usize {
        self.kinds.len()
    }
    pub fn part(&self, i: usize) -> &Part<'a> {
        &self.parts[self.part_of[i] as usize]
    }
    pub fn op(&self, i: usize) -> &'a Op {
        let p = self.part(i);
        &p.block.ops()[i - p.before as usize]
    }
    /// The offset, from the page's start, of what follows instruction `i` in memory.
    pub fn next(&self, i: usize) -> i64 {
        let op = self.op(i);
        self.part(i).at as i64 + op.off as i64 + op.len as i64
    }
    /// The offset of the part after the one that instruction `i` ends.
    pub fn onward(&self, i: usize) -> Option<u64> {
        (i + 1 < self.len()).then(|| self.part(i + 1).at)
    }
    /// Instructions from `i` on.
    pub fn rest(&self, i: usize) -> u32 {
        self.count - i as u32
    }

    /// The block to go on with.
    fn successor(&self, cache: &'a Cache) -> Option<&'a Block> {
        let last = self.len() - 1;
        if self.parts.len() == PARTS {
            return None;
        }
        let first = self.parts[0].block;
        let find = |target: i64| {
            let key = first.key & !CROSSING & !0xFFF | target as u64;
            let b = (0..4096).contains(&target).then(|| cache.get(key)).flatten()?;
            (b.runs.get() < WATCHED).then_some(b)
        };
        let next = self.next(last);
        let on = match self.kinds[last] {
            Kind::Jmp { rel } | Kind::Call { rel } => find(next + rel)?,
            Kind::Jcc { rel, .. } => {
                let (on, taken) = (find(next), find(next + rel));
                let heavier =
                    |a: Option<&Block>, b: Option<&Block>| a.map_or(0, weight) >= b.map_or(0, weight);
                if heavier(on, taken) {
                    on?
                } else {
                    taken?
                }
            }
            Kind::Handler => return None,
            kind if kind.leads_anywhere() => return None,
            _ => find(next)?,
        };
        if std::ptr::eq(on, first) {
            return Some(on);
        }
        // A trace that is long enough goes on in code that there is already: a busy guest has megabytes of it, and what
        // is compiled again and again crowds the host's caches.
        if self.count >= ENOUGH && !on.code.get().is_null() {
            return None;
        }
        let fits = self.count as usize + on.ops().len() <= LENGTH;
        // What rarely follows is not worth the room.
        (fits && weight(on) >= weight(first).min(HOT) / 3).then_some(on)
    }
}
