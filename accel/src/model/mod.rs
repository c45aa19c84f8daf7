//! CPU models: what `-cpu` names. The named ones are QEMU's (`models.txt`), less what this processor does not
//! have; only features that the software processor has can be turned on.

mod cpuid;
mod features;

pub use cpuid::CpuidContext;
use features::{canonical, find, is_absent, on_this_host, ABSENT, FEATURES, WORDS};
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
    /// Features of the named model that this processor does not have.
    missing: Vec<String>,
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
            missing: Vec::new(),
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
        let mut enforce = false;
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
                "check" | "migratable" => {}
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
        if enforce && !m.missing.is_empty() {
            return Err(ModelError::Enforced(m.name.clone(), m.missing.join(" ")));
        }
        m.check_host()?;
        Ok(m)
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

    /// Names of all models, aliases included, and of their features those that cannot be had here.
    pub fn definitions() -> Vec<(String, Vec<String>)> {
        let mut all = Vec::new();
        for named in models() {
            let m = CpuModel::from_named(&named);
            let lacking = m.features().into_iter().filter(|f| !on_this_host(f)).map(str::to_owned);
            let unavailable: Vec<String> = lacking.chain(m.missing).collect();
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

    const AT: CpuidContext = CpuidContext { apic_id: 0, cpus: 1, osxsave: false, apic_on: true, xcr0: 1 };

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
