//! What the software processor computes, as a checksum for each instruction, to compare hosts.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use iced_x86::Code;

use super::case::{Mode, Outcome};

/// Checksums by mode and instruction.
#[derive(Default)]
pub struct Record(BTreeMap<String, u64>);

impl Record {
    /// Count what came out of an instruction in, every bit of it.
    pub fn add(&mut self, mode: Mode, code: Code, o: &Outcome) {
        // Not every host has these; where one has not, they are invalid.
        let name = format!("{mode:?} {code:?}");
        if name.contains(" Sha") {
            return;
        }
        let mut sum = 0xCBF2_9CE4_8422_2325u64;
        let mut add = |v: u64| sum = (sum ^ v).wrapping_mul(0x100_0000_01B3).rotate_left(23);
        [o.vector.into(), o.error.into(), o.cr2, o.regs.rip, o.regs.flags].into_iter().for_each(&mut add);
        o.regs.gpr.into_iter().for_each(&mut add);
        for bytes in [&o.regs.fx[..], &o.regs.high, &o.data] {
            for b in bytes.chunks_exact(8) {
                add(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
            }
        }
        let all = self.0.entry(name).or_insert(0);
        *all = all.wrapping_add(sum);
    }

    /// Write the file if there is none; otherwise what differs from it.
    pub fn compare_or_write(&self, path: &Path) -> Vec<String> {
        let mut text = String::new();
        for (name, sum) in &self.0 {
            let _ = writeln!(text, "{name} {sum:016x}");
        }
        match std::fs::read_to_string(path) {
            Ok(old) => {
                let (old, new) = (old.lines(), text.lines());
                let known: std::collections::BTreeSet<&str> = old.collect();
                new.filter(|line| !known.contains(line)).map(String::from).collect()
            }
            Err(_) => {
                std::fs::write(path, text).expect("the record cannot be written");
                Vec::new()
            }
        }
    }
}
