//! CPU models: what `-cpu` names. The named ones are QEMU's (`models.txt`), less what this processor does not
//! have; only features that the software processor has can be turned on.

mod cpuid;
mod features;
mod host;

pub use cpuid::CpuidContext;
use features::{canonical, find, is_absent, on_this_host, ABSENT, FEATURES, WORDS};
pub use host::HostCpuid;
use serde::{Deserialize, Serialize};

/// QEMU's models, a line each: name, aliases, description, vendor, family, model, stepping, highest leaf, brand, features.
const MODELS: &str = include_str!("models.txt");
/// The model that has everything.
const MAX: &str =
    "max||Enables all features supported by the accelerator|AuthenticAMD|15|107|1|13|FTVM Virtual CPU|";

struct Named {
    name: &'static str,
    aliases: &'static str,
    description: &'static str,
    vendor: &'static str,
    family: u32,
    model: u32,
    stepping: u32,
    level: u32,
    brand: &'static str,
    features: &'static str,
}

fn models() -> impl Iterator<Item = Named> {
    MODELS.lines().filter(|l| !l.starts_with('#')).chain([MAX]).map(|line| {
        let mut parts = line.split('|');
        let mut text = || parts.next().unwrap_or("");
        let (name, aliases, description, vendor) = (text(), text(), text(), text());
        let mut number = || text().parse().unwrap_or(0);
        let (family, model, stepping, level) = (number(), number(), number(), number());
        Named {
            name,
            aliases,
            description,
            vendor,
            family,
            model,
            stepping,
            level,
            brand: text(),
            features: text(),
        }
    })
}

/// A CPU model with its features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    name: String,
    brand: String,
    vendor: [u8; 12],
    signature: u32,
    level: u32,
    words: [u32; WORDS],
    hypervisor_leaf: bool,
    /// All that the host's processor has, for `-cpu host`.
    host: Option<HostCpuid>,
    /// Features of the named model that this processor does not have.
    missing: Vec<String>,
    /// Those of them that the host's processor lacks, with their places in CPUID.
    lost: Vec<String>,
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
    #[error("the processor does not have the feature '{1}' that is asked for with CPU model '{0}'")]
    Absent(String, String),
    #[error("this host's processor lacks what CPU model '{0}' needs: {1} (leave it out with '{2}', or use another model)")]
    Host(String, String, String),
    #[error("CPU model '{0}' has features that the processor does not have ({1}), and 'enforce' is given")]
    Enforced(String, String),
}

impl Default for CpuModel {
    fn default() -> Self {
        // qemu64 needs nothing that an x86-64 host can lack but SSE3.
        CpuModel::parse("qemu64").or_else(|_| CpuModel::parse("qemu64,-pni")).unwrap_or_else(|e| {
            log::error!("{e}");
            CpuModel::from_named(&NOTHING)
        })
    }
}

/// Stands in where the list of models is empty, which it is not.
const NOTHING: Named = Named {
    name: "none",
    aliases: "",
    description: "",
    vendor: "AuthenticAMD",
    family: 15,
    model: 107,
    stepping: 1,
    level: 1,
    brand: "",
    features: "",
};

impl CpuModel {
    fn from_named(n: &Named) -> CpuModel {
        let (base, ext) = if n.family > 15 { (15, n.family - 15) } else { (n.family, 0) };
        let mut vendor = [0; 12];
        let len = n.vendor.len().min(12);
        vendor[..len].copy_from_slice(&n.vendor.as_bytes()[..len]);
        let mut m = CpuModel {
            name: n.name.into(),
            brand: n.brand.into(),
            vendor,
            signature: ext << 20 | (n.model >> 4) << 16 | base << 8 | (n.model & 15) << 4 | n.stepping,
            level: n.level,
            words: [0; WORDS],
            hypervisor_leaf: true,
            host: None,
            missing: Vec::new(),
            lost: Vec::new(),
        };
        for name in n.features.split_whitespace() {
            match find(name) {
                Some((w, b)) => m.words[w as usize] |= 1 << b,
                None => m.missing.push(name.to_owned()),
            }
        }
        if n.name == "max" {
            for f in FEATURES.iter().filter(|f| on_this_host(f.0)) {
                m.words[f.1 as usize] |= 1 << f.2;
            }
        }
        m
    }

    /// Parse a `-cpu` argument: `NAME[,+feature][,-feature][,feature=on|off]`.
    pub fn parse(arg: &str) -> Result<CpuModel, ModelError> {
        CpuModel::parse_on(arg, None)
    }

    /// As [`Self::parse`], for the host's processor, whose hypervisor can show guests this much.
    pub fn parse_on(arg: &str, host: Option<&HostCpuid>) -> Result<CpuModel, ModelError> {
        let mut parts = arg.split(',');
        let name = parts.next().unwrap_or("");
        // "host" would make no sense for a deterministic processor: it is "max".
        let wanted = if name == "host" { "max" } else { name };
        let wanted = wanted.strip_suffix("-x86_64-cpu").unwrap_or(wanted);
        let named = models()
            .find(|m| m.name == wanted || m.aliases.split(' ').any(|a| a == wanted))
            .ok_or_else(|| ModelError::Unknown(name.to_string()))?;
        let mut m = CpuModel::from_named(&named);
        m.name = wanted.to_owned();
        if let Some(host) = host {
            if name == "host" || name == "host-x86_64-cpu" {
                m.become_host(host);
                m.name = "host".into();
            }
            if wanted == "max" {
                // It has what there is; nothing is missing.
                m.restrict(host);
                m.missing.clear();
            }
        }
        let (mut enforce, mut check) = (false, true);
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
                "check" => check = on,
                "migratable" => {}
                "kvm" if host.is_some() => m.hypervisor_leaf = on,
                "kvm" => {}
                "tcg-cpuid" if host.is_some() => {}
                "enforce" => enforce = on,
                "hv" | "tcg-cpuid" => m.hypervisor_leaf = on,
                _ => match find(key) {
                    Some((w, b)) if on => m.words[w as usize] |= 1 << b,
                    Some((w, b)) => m.words[w as usize] &= !(1 << b),
                    None if is_absent(key) && !on => m.missing.retain(|f| *f != canonical(key)),
                    None if is_absent(key) => {
                        return Err(ModelError::Absent(m.name.clone(), key.to_string()))
                    }
                    None => return Err(ModelError::Feature(m.name.clone(), key.to_string())),
                },
            }
        }
        if let Some(host) = host {
            let lost = m.restrict(host);
            if check || enforce {
                m.lost = lost;
            }
        }
        if enforce && !m.missing.is_empty() {
            return Err(ModelError::Enforced(m.name.clone(), m.missing.join(" ")));
        }
        if host.is_none() {
            m.check_host()?;
        }
        Ok(m)
    }

    /// Why the software processor cannot be this one, if it cannot.
    pub fn check_software(&self) -> Result<(), String> {
        if self.host.is_some() {
            return Err(
                "the machine has the host's processor (-cpu host), which the software processor is not: start it \
                 with another CPU model, as 'max'"
                    .into(),
            );
        }
        self.check_host().map_err(|e| e.to_string())
    }

    /// An error if this host cannot execute what the model offers. Both hosts of a pair need it.
    pub fn check_host(&self) -> Result<(), ModelError> {
        let lacking: Vec<&str> = self.features().into_iter().filter(|f| !on_this_host(f)).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let without: Vec<String> = lacking.iter().map(|f| format!("-{f}")).collect();
        Err(ModelError::Host(self.name.clone(), lacking.join(" "), without.join(",")))
    }

    /// Names of the features that are on.
    pub fn features(&self) -> Vec<&'static str> {
        FEATURES.iter().filter(|f| self.words[f.1 as usize] >> f.2 & 1 != 0).map(|f| f.0).collect()
    }

    /// Name and features in one line.
    pub fn describe(&self) -> String {
        format!("{} ({})", self.name, self.features().join(" "))
    }

    /// Every feature that has a name, and whether this model has it here.
    pub fn all_features(&self) -> impl Iterator<Item = (&'static str, bool)> + '_ {
        let can =
            FEATURES.iter().map(|(name, word, bit)| (*name, self.words[*word as usize] >> bit & 1 != 0));
        can.chain(ABSENT.split_whitespace().map(|name| (name, false)))
    }

    /// Features of the named model that no processor of this kind has; they are left out.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// What was asked for and the host's processor lacks, as QEMU writes it; nothing with `check=off`.
    pub fn lost(&self) -> &[String] {
        &self.lost
    }

    /// Names of all models, aliases included, and of their features those that cannot be had here.
    pub fn definitions(host: Option<&HostCpuid>) -> Vec<(String, Vec<String>)> {
        let mut all = Vec::new();
        if host.is_some() {
            all.push(("host".to_owned(), Vec::new()));
        }
        for named in models() {
            let mut m = CpuModel::from_named(&named);
            let unavailable: Vec<String> = match host {
                Some(_) if named.name == "max" => Vec::new(),
                Some(host) => {
                    m.restrict(host);
                    m.missing
                }
                None => {
                    let lacking = m.features().into_iter().filter(|f| !on_this_host(f)).map(str::to_owned);
                    lacking.chain(m.missing).collect()
                }
            };
            for name in named.aliases.split(' ').filter(|a| !a.is_empty()).chain([named.name]) {
                all.push((name.to_owned(), unavailable.clone()));
            }
        }
        all
    }

    /// Names and descriptions of the models, aliases included, in QEMU's order.
    pub fn list() -> Vec<(String, String)> {
        let mut all = Vec::new();
        for m in models() {
            for alias in m.aliases.split(' ').filter(|a| !a.is_empty()) {
                all.push((alias.to_owned(), format!("(alias of {})", m.name)));
            }
            all.push((m.name.to_owned(), m.description.to_owned()));
        }
        let max = all.pop();
        all.sort_by_key(|(name, _)| name.to_lowercase());
        all.extend(max);
        all
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What `-cpu help` prints.
    pub fn help() -> String {
        let mut o = String::from("Available CPUs:\n");
        for (name, description) in Self::list() {
            o.push_str(format!("x86 {name:<20}  {description}").trim_end());
            o.push('\n');
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
        find(name).is_some_and(|(w, b)| self.words[w as usize] >> b & 1 != 0)
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
    pub(crate) fn has_xgetbv1(&self) -> bool {
        self.has("xgetbv1")
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
        match (self.has("xsave"), self.has("avx")) {
            (true, true) => 7,
            (true, false) => 3,
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: CpuidContext =
        CpuidContext { apic_id: 0, cpus: 1, osxsave: false, apic_on: true, xcr0: 1, kvm: false };

    #[test]
    fn on_a_hypervisor_models_have_what_it_shows() {
        let host = HostCpuid {
            leaves: vec![
                (0, 0, [0xD, 0x756E_6547, 0x6C65_746E, 0x4965_6E69]),
                (1, 0, [0x306C4, 0, 1 | 1 << 26 | 1 << 5, 0x0783_FBFF]),
                (7, 0, [0, 1 << 16 | 1 << 5, 0, 0]),
                (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
                (0x8000_0001, 0, [0, 0, 0, 1 << 29]),
            ],
        };
        let m = CpuModel::parse_on("Haswell-noTSX,check=off", Some(&host)).unwrap();
        let c = m.cpuid(1, 0, AT);
        assert_eq!((c[2] & 1, c[2] >> 9 & 1, c[2] >> 31), (1, 0, 1), "pni, not ssse3");
        assert!(m.missing().contains(&"ssse3".to_owned()) && m.check_software().is_ok());
        assert!(matches!(
            CpuModel::parse_on("Haswell-noTSX,enforce", Some(&host)),
            Err(ModelError::Enforced(..))
        ));
        // AVX-512, which no model here names, and not VMX unless the hypervisor shows it.
        let m = CpuModel::parse_on("host,-avx2", Some(&host)).unwrap();
        assert_eq!(m.cpuid(7, 0, AT)[1], 1 << 16);
        assert_eq!(m.cpuid(1, 0, CpuidContext { apic_id: 3, cpus: 4, ..AT })[1], 3 << 24 | 4 << 16 | 8 << 8);
        assert_eq!((m.name(), m.cpuid(0, 0, AT)[1]), ("host", 0x756E_6547));
        assert!(m.check_software().is_err());
        assert_eq!(m.cpuid(0x4000_0000, 0, CpuidContext { kvm: true, ..AT })[1].to_le_bytes(), *b"KVMK");
        assert_eq!(m.cpuid(0x4000_0000, 0, AT)[1].to_le_bytes(), *b"TCGT");
        let names = CpuModel::definitions(Some(&host));
        assert_eq!(names[0], ("host".to_owned(), Vec::new()));
    }

    #[test]
    fn features_go_on_and_off_by_name() {
        let m = CpuModel::parse("qemu64,+x2apic,-sse2,aes=on").unwrap();
        let c = m.cpuid(1, 0, AT);
        assert_eq!((c[2] >> 21 & 1, c[2] >> 25 & 1, c[3] >> 26 & 1), (1, 1, 0));
        assert_eq!(CpuModel::parse("z80"), Err(ModelError::Unknown("z80".into())));
        assert_eq!(CpuModel::parse("max,+avx512f"), Err(ModelError::Absent("max".into(), "avx512f".into())));
        assert!(CpuModel::parse("max,-avx512f").is_ok());
        assert!(matches!(CpuModel::parse("max,+avx513"), Err(ModelError::Feature(..))));
        assert!(CpuModel::help().contains("qemu64"));
    }

    #[test]
    fn named_models_are_qemus() {
        let m = CpuModel::parse("Haswell").unwrap();
        // Family 6, model 60, stepping 4.
        assert_eq!(m.cpuid(1, 0, AT)[0], 0x306C4);
        assert_eq!(m.missing(), ["hle", "rtm"]);
        assert!(matches!(CpuModel::parse("Haswell,enforce"), Err(ModelError::Enforced(..))));
        assert!(CpuModel::parse("Haswell,enforce,-hle,-rtm").is_ok());
        assert!(CpuModel::parse("Haswell-noTSX,enforce").is_ok());
        for (name, _) in CpuModel::list() {
            match CpuModel::parse(&name) {
                Ok(_) | Err(ModelError::Host(..)) => {}
                Err(e) => panic!("{name}: {e}"),
            }
        }
    }
}
