//! Hashes of the machine's state, memory incrementally by page.

use std::collections::BTreeMap;

use ftvm_accel::mem::{DIRTY_HASH, PAGE_SIZE};
use ftvm_accel::GuestMemory;
use serde::{Deserialize, Serialize};

/// A hash of each part of a machine: equal states have equal hashes on every host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateHash {
    /// By part: `cpuN`, each device, `clock`, `memory`.
    pub parts: BTreeMap<String, u64>,
}

impl StateHash {
    /// One value for all.
    pub fn total(&self) -> u64 {
        self.parts
            .iter()
            .fold(0, |acc, (name, value)| mix(acc ^ bytes(name.as_bytes())).wrapping_add(mix(*value)))
    }

    /// Names of the parts that differ.
    pub fn differences(&self, other: &StateHash) -> Vec<String> {
        self.parts
            .iter()
            .filter(|(name, value)| other.parts.get(*name) != Some(value))
            .map(|(name, _)| name.clone())
            .chain(other.parts.keys().filter(|n| !self.parts.contains_key(*n)).cloned())
            .collect()
    }
}

fn mix(mut x: u64) -> u64 {
    x ^= x >> 32;
    x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

/// A fast 64-bit hash of bytes (four lanes of multiply and rotate; not for adversaries).
pub fn bytes(data: &[u8]) -> u64 {
    const K: u64 = 0x9FB2_1C65_1E98_DF25;
    let mut lanes = [1u64, 2, 3, 4];
    let mut chunks = data.chunks_exact(32);
    for chunk in &mut chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let w =
                u64::from_le_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]);
            *lane = (*lane ^ w).wrapping_mul(K).rotate_left(31);
        }
    }
    let mut acc = data.len() as u64;
    for lane in lanes {
        acc = mix(acc ^ lane);
    }
    for byte in chunks.remainder() {
        acc = (acc ^ u64::from(*byte)).wrapping_mul(K).rotate_left(23);
    }
    mix(acc)
}

/// The sum of the hashes of all pages, kept up to date from the dirty flags.
pub(super) struct MemoryHash {
    /// (start, first index) of each region.
    regions: Vec<(u64, u64)>,
    pages: Vec<u64>,
    total: u64,
}

impl MemoryHash {
    pub fn new(mem: &GuestMemory) -> Self {
        let mut regions = Vec::new();
        let mut index = 0;
        for (start, len) in mem.ram_ranges() {
            regions.push((start, index));
            index += len / PAGE_SIZE;
        }
        mem.set_all_dirty(DIRTY_HASH);
        MemoryHash { regions, pages: vec![0; index as usize], total: 0 }
    }

    pub fn update(&mut self, mem: &GuestMemory) {
        let mut page = vec![0u8; PAGE_SIZE as usize];
        let mut cursor = 0;
        loop {
            let dirty = mem.take_dirty(DIRTY_HASH, &mut cursor, 1 << 16);
            if dirty.is_empty() {
                return;
            }
            for gpa in dirty {
                if mem.read(gpa, &mut page).is_err() {
                    continue;
                }
                let Some((start, first)) = self.regions.iter().rev().find(|r| gpa >= r.0) else { continue };
                let index = first + (gpa - start) / PAGE_SIZE;
                let new = mix(bytes(&page) ^ mix(index));
                let slot = &mut self.pages[index as usize];
                self.total = self.total.wrapping_sub(*slot).wrapping_add(new);
                *slot = new;
            }
        }
    }

    pub fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_incremental_hash_equals_a_fresh_one() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let mut hash = MemoryHash::new(&mem);
        hash.update(&mem);
        let empty = hash.total();
        mem.write(0x1234, b"hello").unwrap();
        hash.update(&mem);
        assert_ne!(hash.total(), empty);
        let mut fresh = MemoryHash::new(&mem);
        fresh.update(&mem);
        assert_eq!(fresh.total(), hash.total());
        mem.write(0x1234, &[0; 5]).unwrap();
        hash.update(&mem);
        assert_eq!(hash.total(), empty);
    }
}
