//! A set of equal parts of an image, one bit each.

use sha2::{Digest, Sha256};

/// Parts of an image of a fixed size: those that were written, or are still to be copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bits {
    /// log2 of the bytes of a part.
    shift: u32,
    /// Bytes of the image.
    size: u64,
    words: Vec<u64>,
    count: u64,
}

impl Bits {
    /// None of an image of `size` bytes, in parts of `granularity` bytes (a power of two).
    pub fn new(size: u64, granularity: u64) -> Self {
        let shift = granularity.max(1).trailing_zeros();
        let words = size.div_ceil(1 << shift).div_ceil(64) as usize;
        Bits { shift, size, words: vec![0; words], count: 0 }
    }

    /// Bytes of a part; the last one of an image may be shorter.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many parts there are.
    pub fn len(&self) -> u64 {
        self.size.div_ceil(self.granularity())
    }

    /// Whether the image has no parts.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// How many are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes of those in the set, as QEMU counts them: the last one whole.
    pub fn bytes(&self) -> u64 {
        self.count << self.shift
    }

    /// Set all bits of a range of parts.
    fn fill(&mut self, first: u64, last: u64) {
        let (low, high) = ((first / 64) as usize, (last / 64) as usize);
        for word in low..=high.min(self.words.len().saturating_sub(1)) {
            let mut mask = u64::MAX;
            if word == low {
                mask &= u64::MAX << (first % 64);
            }
            if word == high {
                mask &= u64::MAX >> (63 - last % 64);
            }
            let Some(bits) = self.words.get_mut(word) else { return };
            self.count += u64::from((mask & !*bits).count_ones());
            *bits |= mask;
        }
    }

    /// Add the parts that a range of the image touches.
    pub fn add(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset < end {
            self.fill(offset >> self.shift, (end - 1) >> self.shift);
        }
    }

    /// Whether a part is in the set.
    pub fn has(&self, part: u64) -> bool {
        self.words.get((part / 64) as usize).is_some_and(|w| w >> (part % 64) & 1 != 0)
    }

    /// Take a part out; whether it was in the set.
    pub fn remove(&mut self, part: u64) -> bool {
        let had = self.has(part);
        if had {
            self.words[(part / 64) as usize] &= !(1 << (part % 64));
            self.count -= 1;
        }
        had
    }

    /// Take all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.count = 0;
    }

    /// The first part from `part` on whose bit is `set`.
    fn find(&self, part: u64, set: bool) -> Option<u64> {
        let first = (part / 64) as usize;
        let found = self.words.iter().enumerate().skip(first).find_map(|(i, word)| {
            let mut word = if set { *word } else { !*word };
            if i == first {
                word &= u64::MAX << (part % 64);
            }
            (word != 0).then(|| i as u64 * 64 + u64::from(word.trailing_zeros()))
        });
        found.filter(|at| *at < self.len())
    }

    /// The first part in the set from `part` on, or else the first of all.
    pub fn next(&self, part: u64) -> Option<u64> {
        self.find(part, true).or_else(|| self.find(0, true))
    }

    /// Take a run of neighbours out, of at most `limit` parts, from `from` on: (first, how many).
    pub fn take(&mut self, from: u64, limit: u64) -> Option<(u64, u64)> {
        let first = self.next(from)?;
        let mut n = 0;
        while n < limit && self.remove(first + n) {
            n += 1;
        }
        Some((first, n))
    }

    /// Whether the byte at `offset` lies in a part of the set, and for how many bytes of the image the answer holds.
    pub fn run(&self, offset: u64) -> (bool, u64) {
        let part = offset >> self.shift;
        let set = self.has(part);
        let end = self.find(part, !set).map_or(self.size, |p| p << self.shift);
        (set, end.min(self.size).saturating_sub(offset))
    }

    /// Add what another set of the same image has, whatever its parts are.
    pub fn merge(&mut self, other: &Bits) {
        if other.shift == self.shift && other.size == self.size {
            for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
                *mine |= theirs;
            }
            self.count = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
            return;
        }
        let mut at = other.find(0, true);
        while let Some(part) = at {
            let end = other.find(part, false).unwrap_or_else(|| other.len());
            self.add(part << other.shift, (end - part) << other.shift);
            at = other.find(end, true);
        }
    }

    /// The image has another size: parts behind its end are gone, new ones are not in the set.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        let parts = self.len();
        self.words.resize(parts.div_ceil(64) as usize, 0);
        if let (Some(last), rest @ 1..) = (self.words.last_mut(), parts % 64) {
            *last &= u64::MAX >> (64 - rest);
        }
        self.count = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
    }

    /// Bytes of [`Self::to_bytes`] for an image of `size` bytes.
    pub fn stored_len(size: u64, granularity: u64) -> u64 {
        size.div_ceil(granularity).div_ceil(8)
    }

    /// The bits from byte `from` on as qcow2 stores them: the first part is the lowest bit of the first byte.
    pub fn to_bytes(&self, from: u64, len: u64) -> Vec<u8> {
        let end = (from + len).min(self.words.len() as u64 * 8);
        (from..end).map(|i| (self.words[(i / 8) as usize] >> (i % 8 * 8)) as u8).collect()
    }

    /// Add the parts whose bits are set in `bytes`, which begin at byte `from` of all.
    pub fn add_bytes(&mut self, from: u64, bytes: &[u8]) {
        for (at, byte) in (from..).zip(bytes).filter(|(_, b)| **b != 0) {
            if let Some(word) = self.words.get_mut((at / 8) as usize) {
                *word |= u64::from(*byte) << (at % 8 * 8);
            }
        }
        // Bits behind the last part mean nothing.
        self.resize(self.size);
    }

    /// What QEMU's `x-debug-block-dirty-bitmap-sha256` says of such a bitmap.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let words: &[u64] = if self.words.is_empty() { &[0] } else { &self.words };
        words.iter().for_each(|w| hash.update(w.to_le_bytes()));
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation against a list of booleans.
    #[test]
    fn a_set_is_what_its_bits_say() {
        let mut seed = 7u64;
        let mut dice = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        for size in [0, 1, 511, 512, 64 * 512, 64 * 512 + 1, 1000 * 512 + 77] {
            let mut bits = Bits::new(size, 512);
            let mut model = vec![false; size.div_ceil(512) as usize];
            for _ in 0..200 {
                let (at, len) = (dice(size + 1), dice(40 * 512));
                if dice(3) > 0 {
                    bits.add(at, len);
                    let end = (at + len).min(size);
                    (at..end).for_each(|b| model[(b / 512) as usize] = true);
                } else if let Some((first, n)) = bits.take(at / 512, 9) {
                    assert!((first..first + n).all(|p| std::mem::take(&mut model[p as usize])));
                }
                assert_eq!(bits.count(), model.iter().filter(|b| **b).count() as u64);
            }
            let mut at = 0;
            while at < size {
                let (set, len) = bits.run(at);
                assert!(len > 0 && (at..at + len).all(|b| model[(b / 512) as usize] == set));
                at += len;
            }
            let stored = bits.to_bytes(0, Bits::stored_len(size, 512));
            let mut again = Bits::new(size, 512);
            again.add_bytes(0, &stored);
            assert_eq!(again, bits);
            // Into parts of another size and back: at least the same.
            let (mut coarse, mut fine) = (Bits::new(size, 4096), Bits::new(size, 512));
            coarse.merge(&bits);
            fine.merge(&coarse);
            fine.merge(&bits);
            assert_eq!(fine.count() == 0, bits.count() == 0);
            assert!((0..bits.len()).all(|p| !bits.has(p) || fine.has(p) && coarse.has(p / 8)));
        }
        let mut bits = Bits::new(70 * 512, 512);
        bits.add(0, u64::MAX);
        bits.resize(3 * 512);
        assert_eq!(bits.count(), 3);
        bits.resize(200 * 512);
        assert_eq!((bits.count(), bits.run(0)), (3, (true, 1536)));
    }
}
