//! Models on the host's processor: what its hypervisor can show guests, and `-cpu host`, which is all of that.

use serde::{Deserialize, Serialize};

use super::features::{Word, FEATURES};
use super::{CpuModel, CpuidContext};

/// CPUID leaves as a hypervisor says that it can show them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpuid {
    /// Leaf, subleaf, and EAX to EDX.
    pub leaves: Vec<(u32, u32, [u32; 4])>,
}

impl HostCpuid {
    /// A leaf; zeros if there is none.
    pub fn leaf(&self, leaf: u32, sub: u32) -> [u32; 4] {
        self.leaves.iter().find(|l| (l.0, l.1) == (leaf, sub)).map_or([0; 4], |l| l.2)
    }

    /// The features of a word that guests can have.
    pub(super) fn word(&self, word: Word) -> u32 {
        let (leaf, sub, register, always) = match word {
            Word::D1 => (1, 0, 3, 0),
            // The kernel emulates the x2APIC and its timer's deadline mode.
            Word::C1 => (1, 0, 2, 1 << 31 | 1 << 24 | 1 << 21),
            Word::B7 => (7, 0, 1, 0),
            Word::C7 => (7, 0, 2, 0),
            Word::Xd1 => (0x8000_0001, 0, 3, 0),
            Word::Xc1 => (0x8000_0001, 0, 2, 0),
            Word::X7 => (0x8000_0007, 0, 3, 0),
            Word::S1 => (0xD, 1, 0, 0),
            // Its timers never stop.
            Word::A6 => (6, 0, 0, 1 << 2),
        };
        self.leaf(leaf, sub)[register] | always
    }

    /// The name and place of a feature that guests cannot have, as QEMU prints it.
    pub(super) fn place(word: Word, name: &str, bit: u32) -> String {
        let place = match word {
            Word::D1 => "CPUID.01H:EDX",
            Word::C1 => "CPUID.01H:ECX",
            Word::B7 => "CPUID.07H:EBX",
            Word::C7 => "CPUID.07H:ECX",
            Word::Xd1 => "CPUID.80000001H:EDX",
            Word::Xc1 => "CPUID.80000001H:ECX",
            Word::X7 => "CPUID.80000007H:EDX",
            Word::S1 => "CPUID.0DH:EAX",
            Word::A6 => "CPUID.06H:EAX",
        };
        format!("{place}.{name} [bit {bit}]")
    }
}

impl CpuModel {
    /// Make it `host`: everything that guests can have.
    pub(super) fn become_host(&mut self, host: &HostCpuid) {
        let [level, b, c, d] = host.leaf(0, 0);
        for (i, register) in [b, d, c].into_iter().enumerate() {
            self.vendor[4 * i..4 * i + 4].copy_from_slice(&register.to_le_bytes());
        }
        self.level = level.min(0x1F);
        self.signature = host.leaf(1, 0)[0];
        for f in FEATURES {
            self.words[f.1 as usize] |= host.word(f.1) & 1 << f.2;
        }
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| host.leaf(leaf, 0))
            .flat_map(u32::to_le_bytes)
            .take_while(|b| *b != 0)
            .collect();
        self.brand = String::from_utf8_lossy(&brand).trim().to_owned();
        self.host = Some(host.clone());
    }

    /// Leave out what guests on this host cannot have; the features that were wanted, as QEMU names them.
    pub(super) fn restrict(&mut self, host: &HostCpuid) -> Vec<String> {
        let mut lost = Vec::new();
        for (name, word, bit) in FEATURES {
            let slot = &mut self.words[*word as usize];
            if *slot >> bit & 1 != 0 && host.word(*word) >> bit & 1 == 0 {
                *slot &= !(1 << bit);
                lost.push(HostCpuid::place(*word, name, *bit));
                self.missing.push((*name).to_owned());
            }
        }
        lost
    }

    /// A leaf of `-cpu host`: the hypervisor's, with this machine's processors in it and without what was turned off.
    pub(super) fn host_leaf(
        &self,
        host: &HostCpuid,
        leaf: u32,
        sub: u32,
        at: CpuidContext,
    ) -> Option<[u32; 4]> {
        let mut r = host.leaf(leaf, sub);
        let mut keep = |register: usize, word: Word| {
            let named: u32 = FEATURES.iter().filter(|f| f.1 == word).map(|f| 1 << f.2).sum();
            let on = self.words[word as usize];
            r[register] = r[register] & !named | on & named;
        };
        match leaf {
            1 => {
                keep(2, Word::C1);
                keep(3, Word::D1);
                r[1] = at.apic_id << 24 | 8 << 8;
                r[3] &= !(1 << 28);
                if at.cpus > 1 {
                    r[3] |= 1 << 28;
                    r[1] |= at.cpus.next_power_of_two().min(255) << 16;
                }
            }
            6 => keep(0, Word::A6),
            7 if sub == 0 => {
                keep(1, Word::B7);
                keep(2, Word::C7);
            }
            0xD if sub == 1 => keep(0, Word::S1),
            0x8000_0001 => {
                keep(2, Word::Xc1);
                keep(3, Word::Xd1);
            }
            0x8000_0007 => keep(3, Word::X7),
            0x8000_0008 => r[2] = at.cpus.saturating_sub(1),
            7 | 0xD | 0x14 | 0x15 | 0x16 | 0x19 | 0x1D | 0x1E | 0x8000_0002..=0x8000_0006 | 0x8000_001D => {}
            0x8000_000A | 0x8000_001F => return Some([0; 4]),
            // The rest is this machine's own.
            _ => return None,
        }
        Some(r)
    }
}
