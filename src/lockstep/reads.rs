//! Disk reads on the backup (section 4.2 of the paper): the primary's book of them.
//!
//! A read that the backup does itself must find there what the primary found. So from its submission until the backup
//! has executed its completion
//!
//! * no write that overlaps it is done (the paper's racing requests): such a write waits, and whatever overlaps
//!   that write waits behind it, so that order is kept;
//! * and it is no such read at all, but has its data in the log, if a write under way (one that is not yet on stable
//!   storage) touches the same grains of the image: an image format may move a grain as a whole.
//!
//! A read that failed is not done by the backup either; its end is in the log.

use std::collections::{BTreeMap, HashMap, VecDeque};

/// First byte and length.
pub type Span = (u64, u64);

fn overlap(a: Span, b: Span) -> bool {
    a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

struct Waiting<T> {
    id: u64,
    span: Span,
    writes: bool,
    item: T,
}

/// The book of one drive. `T` is a request.
pub struct Reads<T> {
    on: bool,
    /// A power of two: what the image may move as a whole, in bytes.
    grain: u64,
    /// Writes under way.
    writes: HashMap<u64, Span>,
    /// Reads that the backup may do, and the log's entry that ends each, once there is one.
    reads: BTreeMap<u64, (Span, Option<u64>)>,
    waiting: VecDeque<Waiting<T>>,
}

impl<T> Reads<T> {
    /// A book that lets everything pass until it is opened.
    pub fn new(grain: u64) -> Self {
        let (writes, reads) = (HashMap::new(), BTreeMap::new());
        Reads { on: false, grain: grain.max(1), writes, reads, waiting: VecDeque::new() }
    }

    /// A backup follows from here on; `writes`: what is under way.
    pub fn open(&mut self, writes: impl IntoIterator<Item = (u64, Span)>) {
        self.on = true;
        self.writes = writes.into_iter().collect();
    }

    /// There is no backup any more; what was waiting, in order.
    pub fn close(&mut self) -> Vec<(u64, T)> {
        self.on = false;
        self.writes.clear();
        self.reads.clear();
        self.waiting.drain(..).map(|w| (w.id, w.item)).collect()
    }

    /// Whether there is a backup.
    pub fn is_open(&self) -> bool {
        self.on
    }

    /// A request is to be done: it may be done now, or `None`, later.
    pub fn submit(&mut self, id: u64, span: Span, writes: bool, item: T) -> Option<T> {
        if !self.on || span.1 == 0 {
            return Some(item);
        }
        let behind = |w: &Waiting<T>| (w.writes || writes) && overlap(w.span, span);
        if self.waiting.iter().any(behind) || writes && self.is_read(span) {
            self.waiting.push_back(Waiting { id, span, writes, item });
            return None;
        }
        self.admit(id, span, writes);
        Some(item)
    }

    fn is_read(&self, span: Span) -> bool {
        self.reads.values().any(|(r, _)| overlap(*r, span))
    }

    fn admit(&mut self, id: u64, span: Span, writes: bool) {
        if writes {
            self.writes.insert(id, span);
        } else if !self.is_written(span) {
            self.reads.insert(id, (span, None));
        }
    }

    /// Whether a write under way touches the same grains.
    fn is_written(&self, span: Span) -> bool {
        let start = span.0 / self.grain * self.grain;
        let end = span.0.saturating_add(span.1).next_multiple_of(self.grain);
        let wide = (start, end - start);
        self.writes.values().any(|w| overlap(*w, wide))
    }

    /// A read was done: whether the backup may do it too. Its place in the image was looked up before this.
    pub fn may_share(&self, id: u64) -> bool {
        self.reads.get(&id).is_some_and(|(span, _)| !self.is_written(*span))
    }

    /// The end of a read that the backup does itself is the log's entry `number` (they count from 1).
    pub fn logged(&mut self, id: u64, number: u64) {
        if let Some((_, entry)) = self.reads.get_mut(&id) {
            *entry = Some(number);
        }
    }

    /// A request ended, and the log says all of it; what may be done now, in order.
    pub fn ended(&mut self, id: u64) -> Vec<(u64, T)> {
        self.writes.remove(&id);
        match self.reads.remove(&id) {
            Some(_) => self.release(),
            None => Vec::new(),
        }
    }

    /// The backup has executed so many entries; what may be done now, in order.
    pub fn executed(&mut self, entries: u64) -> Vec<(u64, T)> {
        let before = self.reads.len();
        self.reads.retain(|_, (_, entry)| entry.is_none_or(|e| e > entries));
        if self.reads.len() == before {
            return Vec::new();
        }
        self.release()
    }

    fn release(&mut self) -> Vec<(u64, T)> {
        let mut ready = Vec::new();
        for w in std::mem::take(&mut self.waiting) {
            let behind = |b: &Waiting<T>| (b.writes || w.writes) && overlap(b.span, w.span);
            if self.waiting.iter().any(behind) || w.writes && self.is_read(w.span) {
                self.waiting.push_back(w);
            } else {
                self.admit(w.id, w.span, w.writes);
                ready.push((w.id, w.item));
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(v: Vec<(u64, &'static str)>) -> Vec<u64> {
        v.into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn a_write_waits_for_the_backups_read_and_what_follows_for_the_write() {
        let mut b = Reads::new(1);
        assert_eq!(b.submit(1, (0, 8), true, "w"), Some("w"));
        b.open([]);
        assert!(b.submit(2, (0, 8), false, "r").is_some());
        assert!(b.submit(3, (4, 8), true, "w").is_none());
        assert!(b.submit(4, (8, 4), false, "r behind the write").is_none());
        assert!(b.submit(5, (0, 4), false, "r beside it").is_some());
        assert!(b.submit(6, (100, 4), true, "elsewhere").is_some());
        assert!(b.may_share(2));
        b.logged(2, 7);
        assert!(b.executed(6).is_empty());
        assert_eq!(ids(b.executed(7)), [3, 4]);
        // What follows a write under way is read from the log.
        assert!(!b.may_share(4));
        assert!(b.ended(3).is_empty());
        assert!(b.submit(7, (4, 1), false, "r").is_some());
        assert!(b.may_share(7));
        assert!(b.submit(8, (4, 1), true, "w").is_none());
        assert_eq!(ids(b.close()), [8]);
        assert!(!b.is_open());
    }

    #[test]
    fn a_write_in_the_same_grain_keeps_a_read_in_the_log() {
        let mut b = Reads::new(64);
        b.open([(1, (0, 8))]);
        assert!(b.submit(2, (32, 8), false, "r").is_some());
        assert!(!b.may_share(2), "a write of before");
        assert!(b.submit(3, (64, 8), false, "r").is_some());
        assert!(b.may_share(3));
        assert!(b.submit(4, (96, 8), true, "w").is_some());
        assert!(!b.may_share(3), "a write since");
        assert!(b.submit(5, (64, 8), true, "w").is_none());
        assert_eq!(ids(b.ended(3)), [5]);
    }
}
