//! The entry points of `fuzz/` on their committed corpus and on seeded random changes of it: the same inputs in
//! every run. `FTVM_FUZZ_ROUNDS` changes how many (a few thousand for each entry point).

#[path = "../fuzz/entries.rs"]
mod entries;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// No single input may take longer (a slow machine and a debug build are allowed for).
const LIMIT: Duration = Duration::from_secs(10);

/// xorshift64*: enough to choose places and bytes.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }
}

/// Values at which lengths and offsets go wrong.
const EDGES: [u64; 8] =
    [0, 1, 0x7F, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF];

fn change(seed: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..1 + dice.below(4) {
        let at = dice.below(data.len());
        match dice.below(8) {
            0 => data.truncate(at),
            1 => data.insert(at.min(data.len()), dice.next() as u8),
            2 | 3 if !data.is_empty() => data[at] ^= 1 << dice.below(8),
            4 if !data.is_empty() => data[at] = dice.next() as u8,
            5 => {
                let from = dice.below(other.len());
                let piece = &other[from..(from + dice.below(64)).min(other.len())];
                data.splice(at..at, piece.iter().copied());
            }
            6 => {
                // The fields of headers are near the beginning.
                let edge = EDGES[dice.below(EDGES.len())];
                let size = 1 << dice.below(4);
                let bytes = if dice.below(2) == 0 {
                    edge.to_le_bytes()[..size].to_vec()
                } else {
                    edge.to_be_bytes()[8 - size..].to_vec()
                };
                let near = dice.below(data.len().min(128)) / size * size;
                for (slot, byte) in data.iter_mut().skip(near).zip(bytes) {
                    *slot = byte;
                }
            }
            _ => {
                let end = (at + dice.below(16)).min(data.len());
                data.drain(at.min(end)..end);
            }
        }
    }
    data
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    files.into_iter().map(|f| (f.clone(), std::fs::read(&f).unwrap())).collect()
}

fn fuzz(name: &str, rounds: u64) {
    let entry = entries::ALL.iter().find(|(n, _)| *n == name).expect("an entry point of that name").1;
    let seeds = corpus(name);
    let run = |data: &[u8], what: &str| {
        let started = Instant::now();
        if let Err(panic) = std::panic::catch_unwind(|| entry(data)) {
            let path = std::env::temp_dir().join(format!("ftvm-fuzz-{name}-{}", std::process::id()));
            let _ = std::fs::write(&path, data);
            eprintln!("{name}: {what}; the input is kept in {}", path.display());
            std::panic::resume_unwind(panic);
        }
        assert!(started.elapsed() < LIMIT, "{name}: {what} took {:?}", started.elapsed());
    };
    entry(&[]);
    for (path, data) in &seeds {
        run(data, &path.display().to_string());
    }
    let rounds = std::env::var("FTVM_FUZZ_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(rounds);
    for round in 0..rounds {
        let mut dice = Dice(0x9E37_79B9_7F4A_7C15 ^ (round + 1).wrapping_mul(0xD1B5_4A32_D192_ED03));
        let (seed, other) = (&seeds[dice.below(seeds.len())].1, &seeds[dice.below(seeds.len())].1);
        run(&change(seed, other, &mut dice), &format!("round {round}"));
    }
}

macro_rules! entry_points {
    ($($name:ident $rounds:literal)*) => {
        $(#[test] fn $name() { fuzz(stringify!($name), $rounds); })*

        #[test]
        fn every_entry_point_is_tested() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(tested.as_slice(), entries::ALL.iter().map(|(n, _)| *n).collect::<Vec<_>>());
        }
    };
}

entry_points! {
    log 5000
    wire 5000
    heartbeat 5000
    qmp 4000
    qcow2 3000
    snapshots 2000
    command_line 5000
    recording 3000
    processor 4000
    iscsi 2000
    nfs 5000
    luks 3000
    rfb 5000
    migration 5000
    nbd 3000
}
