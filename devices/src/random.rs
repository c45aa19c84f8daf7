//! The machine's random numbers: a generator in machine state, seeded through the input door, so
//! that primary and backup (and record and replay) draw the same numbers.

use serde::{Deserialize, Serialize};

/// ChaCha20 (RFC 8439, section 2.3) in counter mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Random {
    key: [u32; 8],
    counter: u64,
    /// Words of the current block not handed out yet.
    block: Vec<u64>,
}

impl Random {
    /// A generator from a seed.
    pub fn new(seed: [u8; 32]) -> Random {
        let mut key = [0; 8];
        for (word, bytes) in key.iter_mut().zip(seed.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Random { key, counter: 0, block: Vec::new() }
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        if let Some(word) = self.block.pop() {
            return word;
        }
        let words = block(&self.key, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.block = words.chunks_exact(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32).rev().collect();
        self.block.pop().unwrap_or(0)
    }
}

fn block(key: &[u32; 8], counter: u64) -> [u32; 16] {
    let mut init = [0u32; 16];
    init[..4].copy_from_slice(&[0x6170_7865, 0x3320_646E, 0x7962_2D32, 0x6B20_6574]);
    init[4..12].copy_from_slice(key);
    init[12] = counter as u32;
    init[13] = (counter >> 32) as u32;
    let mut x = init;
    for _ in 0..10 {
        for [a, b, c, d] in [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]] {
            quarter(&mut x, a, b, c, d);
        }
        for [a, b, c, d] in [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]] {
            quarter(&mut x, a, b, c, d);
        }
    }
    for (word, start) in x.iter_mut().zip(init) {
        *word = word.wrapping_add(start);
    }
    x
}

fn quarter(x: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    x[a] = x[a].wrapping_add(x[b]);
    x[d] = (x[d] ^ x[a]).rotate_left(16);
    x[c] = x[c].wrapping_add(x[d]);
    x[b] = (x[b] ^ x[c]).rotate_left(12);
    x[a] = x[a].wrapping_add(x[b]);
    x[d] = (x[d] ^ x[a]).rotate_left(8);
    x[c] = x[c].wrapping_add(x[d]);
    x[b] = (x[b] ^ x[c]).rotate_left(7);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_function_is_chacha20() {
        // The all-zero key and nonce, block 0 (RFC 8439, appendix A.1, test vector 1).
        let b = block(&[0; 8], 0);
        assert_eq!(b[0].to_le_bytes(), [0x76, 0xB8, 0xE0, 0xAD]);
    }

    #[test]
    fn a_saved_generator_goes_on_the_same_way() {
        let mut a = Random::new([7; 32]);
        a.next();
        let mut b: Random = postcard::from_bytes(&postcard::to_stdvec(&a).unwrap()).unwrap();
        for _ in 0..40 {
            assert_eq!(a.next(), b.next());
        }
    }
}
