//! CPU models: what `-cpu` names, and the CPUID leaves that follow (SDM vol. 2, CPUID; AMD APM vol. 3,
//! appendix E). Only features that the software processor has can be turned on.

/// Words of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    D1,
    C1,
    B7,
    C7,
    Xd1,
    Xc1,
    X7,
    S1,
    A6,
}
const WORDS: usize = 9;

/// Name, word, bit of every feature that this processor has.
const FEATURES: &[(&str, Word, u32)] = &[
    ("fpu", Word::D1, 0),
    ("vme", Word::D1, 1),
    ("de", Word::D1, 2),
    ("pse", Word::D1, 3),
    ("tsc", Word::D1, 4),
    ("msr", Word::D1, 5),
    ("pae", Word::D1, 6),
    ("mce", Word::D1, 7),
    ("cx8", Word::D1, 8),
    ("apic", Word::D1, 9),
    ("sep", Word::D1, 11),
    ("mtrr", Word::D1, 12),
    ("pge", Word::D1, 13),
    ("mca", Word::D1, 14),
    ("cmov", Word::D1, 15),
    ("pat", Word::D1, 16),
    ("pse36", Word::D1, 17),
    ("clflush", Word::D1, 19),
    ("mmx", Word::D1, 23),
    ("fxsr", Word::D1, 24),
    ("sse", Word::D1, 25),
    ("sse2", Word::D1, 26),
    ("pni", Word::C1, 0),
    ("pclmulqdq", Word::C1, 1),
    ("ssse3", Word::C1, 9),
    ("cx16", Word::C1, 13),
    ("pcid", Word::C1, 17),
    ("sse4.1", Word::C1, 19),
    ("sse4.2", Word::C1, 20),
    ("x2apic", Word::C1, 21),
    ("movbe", Word::C1, 22),
    ("popcnt", Word::C1, 23),
    ("tsc-deadline", Word::C1, 24),
    ("aes", Word::C1, 25),
    ("xsave", Word::C1, 26),
    ("rdrand", Word::C1, 30),
    ("hypervisor", Word::C1, 31),
    ("fsgsbase", Word::B7, 0),
    ("tsc_adjust", Word::B7, 1),
    ("bmi1", Word::B7, 3),
    ("smep", Word::B7, 7),
    ("bmi2", Word::B7, 8),
    ("erms", Word::B7, 9),
    ("invpcid", Word::B7, 10),
    ("rdseed", Word::B7, 18),
    ("adx", Word::B7, 19),
    ("smap", Word::B7, 20),
    ("clflushopt", Word::B7, 23),
    ("clwb", Word::B7, 24),
    ("sha-ni", Word::B7, 29),
    ("umip", Word::C7, 2),
    ("rdpid", Word::C7, 22),
    ("syscall", Word::Xd1, 11),
    ("nx", Word::Xd1, 20),
    ("pdpe1gb", Word::Xd1, 26),
    ("rdtscp", Word::Xd1, 27),
    ("lm", Word::Xd1, 29),
    ("lahf_lm", Word::Xc1, 0),
    ("abm", Word::Xc1, 5),
    ("3dnowprefetch", Word::Xc1, 8),
    ("invtsc", Word::X7, 8),
    ("xsaveopt", Word::S1, 0),
    ("arat", Word::A6, 2),
];

/// Spellings that mean the same.
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("lzcnt", "abm"),
    ("sse4_1", "sse4.1"),
    ("sse4_2", "sse4.2"),
    ("sse4-1", "sse4.1"),
    ("sse4-2", "sse4.2"),
    ("tsc-adjust", "tsc_adjust"),
    ("lahf-lm", "lahf_lm"),
    ("sha_ni", "sha-ni"),
    ("tsc_deadline", "tsc-deadline"),
];

const BASE32: &str =
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
                      sse sse2 hypervisor";
const BASE64: &str =
    "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
                      sse sse2 pni cx16 hypervisor syscall nx lm lahf_lm";
const NEHALEM: &str = "ssse3 sse4.1 sse4.2 popcnt";

struct Named {
    name: &'static str,
    description: &'static str,
    brand: &'static str,
    intel: bool,
    family: u32,
    model: u32,
    stepping: u32,
    level: u32,
    features: &'static [&'static str],
}

const MODELS: &[Named] = &[
    Named {
        name: "qemu64",
        description: "QEMU Virtual CPU version 2.5+",
        brand: "QEMU Virtual CPU version 2.5+",
        intel: false,
        family: 15,
        model: 107,
        stepping: 1,
        level: 0xD,
        features: &[BASE64],
    },
    Named {
        name: "qemu32",
        description: "QEMU Virtual CPU version 2.5+",
        brand: "QEMU Virtual CPU version 2.5+",
        intel: true,
        family: 6,
        model: 6,
        stepping: 3,
        level: 4,
        features: &[BASE32, "pni"],
    },
    Named {
        name: "kvm64",
        description: "Common KVM processor",
        brand: "Common KVM processor",
        intel: true,
        family: 15,
        model: 6,
        stepping: 1,
        level: 0xD,
        features: &[BASE64],
    },
    Named {
        name: "pentium3",
        description: "Intel Pentium III",
        brand: "",
        intel: true,
        family: 6,
        model: 8,
        stepping: 3,
        level: 3,
        features: &[
            "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 mmx fxsr sse hypervisor",
        ],
    },
    Named {
        name: "pentium",
        description: "Intel Pentium",
        brand: "",
        intel: true,
        family: 5,
        model: 4,
        stepping: 3,
        level: 1,
        features: &["fpu vme de pse tsc msr mce cx8 apic mmx hypervisor"],
    },
    Named {
        name: "486",
        description: "Intel 486",
        brand: "",
        intel: true,
        family: 4,
        model: 8,
        stepping: 0,
        level: 1,
        features: &["fpu vme pse hypervisor"],
    },
    Named {
        name: "Conroe",
        description: "Intel Celeron_4x0 (Conroe/Merom Class Core 2)",
        brand: "Intel Celeron_4x0 (Conroe/Merom Class Core 2)",
        intel: true,
        family: 6,
        model: 15,
        stepping: 3,
        level: 10,
        features: &[BASE64, "ssse3"],
    },
    Named {
        name: "Penryn",
        description: "Intel Core 2 Duo P9xxx (Penryn Class Core 2)",
        brand: "Intel Core 2 Duo P9xxx (Penryn Class Core 2)",
        intel: true,
        family: 6,
        model: 23,
        stepping: 3,
        level: 10,
        features: &[BASE64, "ssse3 sse4.1"],
    },
    Named {
        name: "Nehalem",
        description: "Intel Core i7 9xx (Nehalem Class Core i7)",
        brand: "Intel Core i7 9xx (Nehalem Class Core i7)",
        intel: true,
        family: 6,
        model: 26,
        stepping: 3,
        level: 11,
        features: &[BASE64, NEHALEM],
    },
    Named {
        name: "Westmere",
        description: "Westmere E56xx/L56xx/X56xx (Nehalem-C)",
        brand: "Westmere E56xx/L56xx/X56xx (Nehalem-C)",
        intel: true,
        family: 6,
        model: 44,
        stepping: 1,
        level: 11,
        features: &[BASE64, NEHALEM, "pclmulqdq aes arat"],
    },
    Named {
        name: "Opteron_G3",
        description: "AMD Opteron 23xx (Gen 3 Class Opteron)",
        brand: "AMD Opteron 23xx (Gen 3 Class Opteron)",
        intel: false,
        family: 16,
        model: 2,
        stepping: 3,
        level: 5,
        features: &[BASE64, "popcnt abm rdtscp"],
    },
    Named {
        name: "max",
        description: "Enables all features supported by the accelerator",
        brand: "FTVM Virtual CPU",
        intel: false,
        family: 15,
        model: 107,
        stepping: 1,
        level: 0xD,
        features: &["*"],
    },
];

/// A CPU model with its features.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    name: String,
    brand: String,
    vendor: [u8; 12],
    signature: u32,
    level: u32,
    words: [u32; WORDS],
    hypervisor_leaf: bool,
}

/// Why a `-cpu` argument is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelError {
    #[error("unable to find CPU model '{0}'")]
    Unknown(String),
    #[error("Property '{0}-x86_64-cpu.{1}' not found")]
    Feature(String, String),
    #[error("Property '{0}-x86_64-cpu.{1}' cannot take value '{2}'")]
    Value(String, String, String),
}

impl Default for CpuModel {
    fn default() -> Self {
        CpuModel::from_named(&MODELS[0])
    }
}

fn feature(name: &str) -> Option<(Word, u32)> {
    let name = ALIASES.iter().find(|a| a.0 == name).map_or(name, |a| a.1);
    FEATURES.iter().find(|f| f.0 == name).map(|f| (f.1, f.2))
}

impl CpuModel {
    fn from_named(n: &Named) -> CpuModel {
        let (base, ext) = if n.family > 15 { (15, n.family - 15) } else { (n.family, 0) };
        let mut m = CpuModel {
            name: n.name.into(),
            brand: n.brand.into(),
            vendor: *if n.intel { b"GenuineIntel" } else { b"AuthenticAMD" },
            signature: ext << 20 | (n.model >> 4) << 16 | base << 8 | (n.model & 15) << 4 | n.stepping,
            level: n.level,
            words: [0; WORDS],
            hypervisor_leaf: true,
        };
        for name in n.features.iter().flat_map(|f| f.split_whitespace()) {
            if name == "*" {
                for f in FEATURES {
                    m.words[f.1 as usize] |= 1 << f.2;
                }
            } else if let Some((w, b)) = feature(name) {
                m.words[w as usize] |= 1 << b;
            }
        }
        m
    }

    /// Parse a `-cpu` argument: `NAME[,+feature][,-feature][,feature=on|off]`.
    pub fn parse(arg: &str) -> Result<CpuModel, ModelError> {
        let mut parts = arg.split(',');
        let name = parts.next().unwrap_or("");
        // "base" and "host" make no sense for a deterministic processor: "host" is "max".
        let wanted = if name == "host" { "max" } else { name };
        let wanted = wanted.strip_suffix("-x86_64-cpu").or(wanted.strip_suffix("-v1")).unwrap_or(wanted);
        let named =
            MODELS.iter().find(|m| m.name == wanted).ok_or_else(|| ModelError::Unknown(name.to_string()))?;
        let mut m = CpuModel::from_named(named);
        for p in parts.filter(|p| !p.is_empty()) {
            let (key, on) = if let Some(k) = p.strip_prefix('+') {
                (k, true)
            } else if let Some(k) = p.strip_prefix('-') {
                (k, false)
            } else {
                let (k, v) = p.split_once('=').unwrap_or((p, "on"));
                match v {
                    "on" | "yes" | "true" | "y" => (k, true),
                    "off" | "no" | "false" | "n" => (k, false),
                    _ => return Err(ModelError::Value(m.name.clone(), k.into(), v.into())),
                }
            };
            match key {
                "check" | "enforce" | "migratable" => {}
                "hv" | "tcg-cpuid" => m.hypervisor_leaf = on,
                _ => {
                    let (w, b) =
                        feature(key).ok_or_else(|| ModelError::Feature(m.name.clone(), key.to_string()))?;
                    if on {
                        m.words[w as usize] |= 1 << b;
                    } else {
                        m.words[w as usize] &= !(1 << b);
                    }
                }
            }
        }
        Ok(m)
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of all models.
    pub fn names() -> impl Iterator<Item = &'static str> {
        MODELS.iter().map(|m| m.name)
    }

    /// Every feature that the processor can have, and whether this model has it.
    pub fn features(&self) -> impl Iterator<Item = (&'static str, bool)> + '_ {
        FEATURES.iter().map(|(name, word, bit)| (*name, self.words[*word as usize] >> bit & 1 != 0))
    }

    /// What `-cpu help` prints.
    pub fn help() -> String {
        let mut o = String::from("Available CPUs:\n");
        for m in MODELS {
            o.push_str(&format!("x86 {:<20}  {}\n", m.name, m.description));
        }
        o.push_str("\nRecognized CPUID flags:\n");
        let mut names: Vec<&str> = FEATURES.iter().map(|f| f.0).collect();
        names.sort_unstable();
        let mut line = String::from(" ");
        for n in names {
            if line.len() + n.len() > 75 {
                o.push_str(&line);
                o.push('\n');
                line = String::from(" ");
            }
            line.push(' ');
            line.push_str(n);
        }
        o.push_str(&line);
        o.push('\n');
        o
    }

    fn has(&self, name: &str) -> bool {
        feature(name).is_some_and(|(w, b)| self.words[w as usize] >> b & 1 != 0)
    }
    pub(crate) fn signature(&self) -> u32 {
        self.signature
    }
    /// Physical address bits.
    pub fn phys_bits(&self) -> u32 {
        if self.has_long() {
            40
        } else if self.has("pae") || self.has("pse36") {
            36
        } else {
            32
        }
    }
    pub(crate) fn has_syscall(&self) -> bool {
        self.has("syscall")
    }
    pub(crate) fn has_long(&self) -> bool {
        self.has("lm")
    }
    pub(crate) fn has_nx(&self) -> bool {
        self.has("nx")
    }
    pub(crate) fn has_x2apic(&self) -> bool {
        self.has("x2apic")
    }
    /// Bits of CR4 that may be set.
    pub(crate) fn cr4_mask(&self) -> u64 {
        // PCE is harmless without counters.
        let mut m = 1 << 8;
        for (name, bits) in [
            ("vme", 3u64),
            ("tsc", 4),
            ("de", 8),
            ("pse", 0x10),
            ("pae", 0x20),
            ("mce", 0x40),
            ("pge", 0x80),
            ("fxsr", 0x200),
            ("sse", 0x400),
            ("umip", 0x800),
            ("fsgsbase", 1 << 16),
            ("pcid", 1 << 17),
            ("xsave", 1 << 18),
            ("smep", 1 << 20),
            ("smap", 1 << 21),
        ] {
            if self.has(name) {
                m |= bits;
            }
        }
        m
    }
    pub(crate) fn xcr0_mask(&self) -> u64 {
        if self.has("xsave") {
            3
        } else {
            1
        }
    }

    /// CPUID: EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, leaf: u32, sub: u32, at: CpuidContext) -> [u32; 4] {
        let CpuidContext { apic_id, cpus, osxsave, apic_on } = at;
        let w = |x: Word| self.words[x as usize];
        let v = |i: usize| {
            u32::from_le_bytes([self.vendor[i], self.vendor[i + 1], self.vendor[i + 2], self.vendor[i + 3]])
        };
        let amd = &self.vendor == b"AuthenticAMD";
        let top_ext = if self.has_long() || !self.brand.is_empty() { 0x8000_0008 } else { 0x8000_0000 };
        let leaf = if leaf >= 0x8000_0000 {
            if leaf > top_ext {
                return [0; 4];
            }
            leaf
        } else if leaf >= 0x4000_0000 {
            if !self.hypervisor_leaf || !self.has("hypervisor") || leaf > 0x4000_0001 {
                return [0; 4];
            }
            leaf
        } else if leaf > self.level {
            return [0; 4];
        } else {
            leaf
        };
        match leaf {
            0 => [self.level, v(0), v(8), v(4)],
            1 => {
                let mut c = w(Word::C1);
                if osxsave {
                    c |= 1 << 27;
                }
                let mut d = w(Word::D1);
                if !apic_on {
                    d &= !(1 << 9);
                }
                let mut b = apic_id << 24 | 8 << 8;
                if cpus > 1 {
                    d |= 1 << 28;
                    b |= cpus.next_power_of_two().min(255) << 16;
                }
                [self.signature, b, c, d]
            }
            2 => [1, 0, 0x4D, 0x2C_307D],
            4 => {
                if amd {
                    return [0; 4];
                }
                let cores = (cpus.max(1) - 1).min(63) << 26;
                match sub {
                    0 => [0x121 | cores, 0x1C0_003F, 0x3F, 1],
                    1 => [0x122 | cores, 0x1C0_003F, 0x3F, 1],
                    2 => [0x143 | cores, 0x3C0_003F, 0xFFF, 1],
                    _ => [0; 4],
                }
            }
            6 => [w(Word::A6), 0, 0, 0],
            7 => {
                let on = if sub == 0 { u32::MAX } else { 0 };
                [0, w(Word::B7) & on, w(Word::C7) & on, 0]
            }
            0xB => {
                if !self.has_x2apic() {
                    return [0; 4];
                }
                let bits = cpus.max(1).next_power_of_two().trailing_zeros();
                match sub {
                    0 => [0, 1, 0x100, apic_id],
                    1 => [bits, cpus, 0x201, apic_id],
                    _ => [0, 0, sub & 0xFF, apic_id],
                }
            }
            0xD => {
                if !self.has("xsave") {
                    return [0; 4];
                }
                match sub {
                    0 => [self.xcr0_mask() as u32, 0x240, 0x240, 0],
                    1 => [w(Word::S1), 0, 0, 0],
                    _ => [0; 4],
                }
            }
            0x4000_0000 => {
                let t = u32::from_le_bytes(*b"TCGT");
                let c = u32::from_le_bytes(*b"CGTC");
                let g = u32::from_le_bytes(*b"GTCG");
                [0x4000_0001, t, c, g]
            }
            0x8000_0000 => [top_ext, v(0), v(8), v(4)],
            0x8000_0001 => {
                let mut d = w(Word::Xd1);
                let mut c = w(Word::Xc1);
                if amd {
                    // AMD repeats leaf 1's bits here.
                    let mut common = w(Word::D1) & 0x0183_F3FF;
                    if !apic_on {
                        common &= !(1 << 9);
                    }
                    d |= common;
                    if cpus > 1 {
                        c |= 2;
                    }
                }
                [self.signature, 0, c, d]
            }
            0x8000_0002..=0x8000_0004 => {
                let mut text = [0u8; 48];
                let n = self.brand.len().min(47);
                text[..n].copy_from_slice(&self.brand.as_bytes()[..n]);
                let at = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| {
                    let p = at + 4 * i;
                    u32::from_le_bytes([text[p], text[p + 1], text[p + 2], text[p + 3]])
                })
            }
            0x8000_0005 if amd => [0x01FF_01FF, 0x01FF_01FF, 0x4002_0140, 0x4002_0140],
            0x8000_0006 => [0, if amd { 0x4200_4200 } else { 0 }, 0x0200_8140, 0],
            0x8000_0007 => [0, 0, 0, w(Word::X7)],
            0x8000_0008 => {
                let lin = if self.has_long() { 48 } else { 32 };
                [lin << 8 | self.phys_bits(), 0, if amd && cpus > 1 { cpus - 1 } else { 0 }, 0]
            }
            _ => [0; 4],
        }
    }
}

/// What CPUID shows of the processor's place and state.
#[derive(Clone, Copy, Debug)]
pub struct CpuidContext {
    pub apic_id: u32,
    /// Processors in the machine.
    pub cpus: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// The local APIC is enabled.
    pub apic_on: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_go_on_and_off_by_name() {
        let m = CpuModel::parse("qemu64,+x2apic,-sse2,aes=on").unwrap();
        let c = m.cpuid(1, 0, CpuidContext { apic_id: 0, cpus: 1, osxsave: false, apic_on: true });
        assert_eq!((c[2] >> 21 & 1, c[2] >> 25 & 1, c[3] >> 26 & 1), (1, 1, 0));
        assert_eq!(CpuModel::parse("z80"), Err(ModelError::Unknown("z80".into())));
        assert!(CpuModel::parse("max,+avx512").is_err());
        assert!(CpuModel::help().contains("qemu64"));
    }
}
