//! CPUID feature bits by QEMU's names, and what the host must have for them.

use crate::simd::{host_supports, Feature};

/// Words of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
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
pub(super) const WORDS: usize = 9;

/// Name, word, bit of every feature that this processor has.
pub(super) const FEATURES: &[(&str, Word, u32)] = &[
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
    ("fma", Word::C1, 12),
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
    ("avx", Word::C1, 28),
    ("f16c", Word::C1, 29),
    ("rdrand", Word::C1, 30),
    ("hypervisor", Word::C1, 31),
    ("fsgsbase", Word::B7, 0),
    ("tsc-adjust", Word::B7, 1),
    ("bmi1", Word::B7, 3),
    ("avx2", Word::B7, 5),
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
    ("mmxext", Word::Xd1, 22),
    ("pdpe1gb", Word::Xd1, 26),
    ("rdtscp", Word::Xd1, 27),
    ("lm", Word::Xd1, 29),
    ("lahf-lm", Word::Xc1, 0),
    ("abm", Word::Xc1, 5),
    ("3dnowprefetch", Word::Xc1, 8),
    ("invtsc", Word::X7, 8),
    ("xsaveopt", Word::S1, 0),
    ("xsavec", Word::S1, 1),
    ("xgetbv1", Word::S1, 2),
    ("arat", Word::A6, 2),
];

/// Spellings that mean the same.
pub(super) const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("lzcnt", "abm"),
    ("sse4_1", "sse4.1"),
    ("sse4_2", "sse4.2"),
    ("sse4-1", "sse4.1"),
    ("sse4-2", "sse4.2"),
    ("tsc_adjust", "tsc-adjust"),
    ("lahf_lm", "lahf-lm"),
    ("sha_ni", "sha-ni"),
    ("tsc_deadline", "tsc-deadline"),
    ("pclmuldq", "pclmulqdq"),
    ("xd", "nx"),
    ("i64", "lm"),
];

/// Features that QEMU knows by name and this processor does not have.
pub(super) const ABSENT: &str =
    "3dnow 3dnowext ace2 ace2-en acpi amd-no-ssb amd-ssbd amd-stibp amx-bf16 amx-int8 amx-tile \
    arch-capabilities arch-lbr avic avx-vnni avx512-4fmaps avx512-4vnniw avx512-bf16 avx512-fp16 \
    avx512-vp2intersect avx512-vpopcntdq avx512bitalg avx512bw avx512cd avx512dq avx512er avx512f \
    avx512ifma avx512pf avx512vbmi avx512vbmi2 avx512vl avx512vnni bus-lock-detect cid cldemote \
    clzero cmp-legacy core-capability cr8legacy dca decodeassists ds ds-cpl dtes64 est extapic \
    flushbyasid fma4 fsrm full-width-write fxsr-opt gfni hle ht ia64 ibpb ibrs ibrs-all ibs intel-pt \
    intel-pt-lip la57 lbrv lwp md-clear mds-no misalignsse monitor movdir64b movdiri mpx nodeid-msr \
    npt nrip-save osvw pause-filter pbe pcommit pdcm perfctr-core perfctr-nb pfthreshold phe phe-en \
    pks pku pmm pmm-en pn pschange-mc-no rdctl-no rsba rtm serialize sgx sgx-debug sgx-exinfo sgx- \
    kss sgx-mode64 sgx-provisionkey sgx-tokenkey sgx1 sgx2 sgxlc skinit skip-l1dfl-vmentry smx spec- \
    ctrl split-lock-detect ss ssb-no ssbd sse4a stibp svm svm-lock svme-addr-chk taa-no tbm tce tm \
    tm2 topoext tsc-scale tsx-ctrl tsx-ldtrk v-vmsave-vmload vaes vgif virt-ssbd vmcb-clean vmx \
    vpclmulqdq waitpkg wbnoinvd wdt xcrypt xcrypt-en xfd xop xsaveerptr xsaves xstore xstore-en xtpr";

/// The host's extension that computes a feature's instructions.
fn host_feature(name: &str) -> Option<Feature> {
    Some(match name {
        "pni" => Feature::Sse3,
        "ssse3" => Feature::Ssse3,
        "sse4.1" => Feature::Sse41,
        "sse4.2" => Feature::Sse42,
        "aes" => Feature::Aes,
        "pclmulqdq" => Feature::Pclmul,
        "sha-ni" => Feature::Sha,
        "avx" => Feature::Avx,
        "avx2" => Feature::Avx2,
        "fma" => Feature::Fma,
        "f16c" => Feature::F16c,
        _ => return None,
    })
}

/// Whether this host can execute what a feature brings.
pub(super) fn on_this_host(name: &str) -> bool {
    host_feature(name).is_none_or(host_supports)
}

/// The name among [`FEATURES`] or [`ABSENT`] that a spelling stands for.
pub(super) fn canonical(name: &str) -> String {
    let name = ALIASES.iter().find(|a| a.0 == name).map_or(name, |a| a.1);
    name.replace('_', "-")
}

/// Word and bit of a feature that this processor has.
pub(super) fn find(name: &str) -> Option<(Word, u32)> {
    let name = canonical(name);
    FEATURES.iter().find(|f| f.0 == name).map(|f| (f.1, f.2))
}

/// Whether QEMU knows a feature that this processor lacks.
pub(super) fn is_absent(name: &str) -> bool {
    let name = canonical(name);
    ABSENT.split(' ').any(|a| a == name)
}
