//! The processor that runs these tests is the oracle: generated instructions run on it and on
//! ftvm's software processor, and registers, defined flags, memory and exceptions must agree.
//!
//! `FTVM_DIFF_CASES=5000000` runs more cases, `FTVM_DIFF_SEED` others. `FTVM_DIFF_RECORD=FILE` writes what the software processor
//! computed into a file, or compares with what another host wrote there: the software processor runs much on the host's own
//! instructions, and results must not depend on whose they are.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "differential/case.rs"]
mod case;
#[path = "differential/compare.rs"]
mod compare;
#[path = "differential/generate.rs"]
mod generate;
#[path = "differential/native.rs"]
mod native;
#[path = "differential/record.rs"]
mod record;
#[path = "differential/soft.rs"]
mod soft;
#[path = "differential/soft_state.rs"]
mod soft_state;
#[path = "differential/values.rs"]
mod values;
#[path = "differential/vendors.rs"]
mod vendors;

use ftvm_accel::tcg::Tier;
use std::collections::{BTreeMap, BTreeSet};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn generated_instructions_agree_with_this_processor() {
    let cases = number("FTVM_DIFF_CASES", 400_000);
    let seed = number("FTVM_DIFF_SEED", 1);
    let mut real = native::Native::new();
    let mut soft = soft::Soft::new(Tier::Never);
    let mut compiled = soft::Soft::new(Tier::AtOnce);
    let single = std::env::var_os("FTVM_DIFF_SINGLE").is_some();
    let (mut covered, mut executed) = (BTreeSet::new(), BTreeSet::new());
    // The model is of AMD's processors.
    let amd = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|c| c.contains("AuthenticAMD"));
    let mut known: BTreeMap<&str, u64> = BTreeMap::new();
    let mut ended = 0u64;
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let (mut run, mut unstable) = (0u64, 0u64);
    let mut record = record::Record::default();
    for mode in case::Mode::ALL {
        let mut generator = generate::Generator::new(mode, |_| true);
        println!("{mode:?}: {} forms", generator.forms.len());
        let (mut a, mut b) = (case::Outcome::new(), case::Outcome::new());
        let mut c = case::Outcome::new();
        for n in 0..cases / 4 {
            let mut rng = values::Rng(seed.wrapping_mul(0x1_0000_0001) ^ n << 1 ^ (mode as u64) << 60);
            // Three in four are single instructions, the others sequences.
            let count = if n % 4 == 3 && !single { 2 + rng.below(5) as usize } else { 1 };
            let case = generator.case(&mut rng, count);
            if !soft.run(&case, &mut b) {
                if generate::jumps_anywhere(&case) {
                    // By a register or a stack that points back into the case.
                    continue;
                }
                let text = format!("does not end\n{}", compare::describe(&case));
                failures.entry("endless".into()).or_insert((0, text)).0 += 1;
                continue;
            }
            if let [code] = generate::codes(&case)[..] {
                record.add(mode, code, &b);
            }
            // Compiled code must agree in every bit, undefined ones too.
            compiled.run(&case, &mut c);
            if let Some(difference) = compare::exact(&b, &c) {
                let key = format!("compiled {:?}", generate::codes(&case).last());
                let entry = failures
                    .entry(key)
                    .or_insert_with(|| (0, format!("case {n}\n{}{difference}", compare::describe(&case))));
                entry.0 += 1;
            }
            real.run(&case, &mut a);
            run += 1;
            if a.vector == native::ENDLESS {
                // A nested hypervisor may loop on a page fault that it does not understand.
                unstable += 1;
                continue;
            }
            let codes = generate::codes(&case);
            if let Some(difference) = compare::difference(&case, &a, &b) {
                // A hypervisor below may have got in the way: only what happens twice counts.
                let first = a.clone();
                real.run(&case, &mut a);
                if compare::difference(&case, &first, &a).is_some() {
                    unstable += 1;
                    continue;
                }
                let explained = if amd { None } else { vendors::explain(&case, &mut real, &mut soft) };
                if let Some(name) = explained {
                    *known.entry(name).or_insert(0) += 1;
                } else {
                    let key = format!("{:?}", codes.last());
                    let text = || (0, format!("case {n}\n{}{difference}", compare::describe(&case)));
                    failures.entry(key).or_insert_with(text).0 += 1;
                }
            }
            if a.vector == 3 || a.vector == 0 || n % 4 == 3 {
                executed.extend(codes.iter().copied());
            }
            if a.vector == 3 {
                ended += 1;
            }
            covered.extend(codes);
        }
    }
    println!("{run} cases, {} opcodes, {unstable} not repeatable on the processor", covered.len());
    println!("{ended} cases ran to their end");
    if std::env::var_os("FTVM_DIFF_LIST").is_some() {
        for code in covered.difference(&executed) {
            println!("never got past a fault: {code:?}");
        }
        for code in iced_x86::Code::values().filter(|c| !covered.contains(c)) {
            println!("not generated: {code:?} {:?}", code.cpuid_features());
        }
    }
    if let Some(path) = std::env::var_os("FTVM_DIFF_RECORD") {
        let different = record.compare_or_write(path.as_ref());
        assert!(different.is_empty(), "other results than the host of the record has: {different:?}");
    }
    let shown = number("FTVM_DIFF_SHOW", 5) as usize;
    for (code, (count, text)) in failures.iter().take(shown) {
        println!("{code}: {count} failures, the first:\n{text}");
    }
    for (code, (count, _)) in &failures {
        println!("{code}: {count}");
    }
    let compiled = failures.keys().filter(|k| k.starts_with("compiled")).count();
    assert_eq!(compiled, 0, "compiled code differs from the interpreter");
    for difference in &vendors::TABLE {
        if let Some(count) = known.get(difference.name) {
            println!("{}: {count} known ({})", difference.name, difference.reason);
        }
    }
    let all: u64 = failures.values().map(|f| f.0).sum();
    assert!(failures.is_empty(), "{} opcodes differ in {all} cases", failures.len());
}

#[test]
fn compiled_code_agrees_with_the_interpreter_wherever_it_stops() {
    let cases = number("FTVM_DIFF_CASES", 400_000) / 40;
    let seed = number("FTVM_DIFF_SEED", 1);
    let mut interpreter = soft::Soft::new(Tier::Never);
    let mut tiers =
        [Tier::AtOnce, Tier::After(1), Tier::Random(seed)].map(|tier| (tier, soft::Soft::new(tier)));
    // Code of both sizes is compiled.
    for mode in [case::Mode::Long, case::Mode::Flat32] {
        let mut generator = generate::Generator::new(mode, |_| true);
        for n in 0..cases {
            let mut rng = values::Rng(seed.wrapping_mul(0x1_0000_0003) ^ n << 1 ^ (mode as u64) << 60);
            let count = 1 + rng.below(6) as usize;
            let mut case = generator.case(&mut rng, count);
            // Now and then it goes round, so that blocks are linked.
            if n % 3 == 0 {
                let last = case.starts.len() - 1;
                let end = case.starts[last] as usize + generate::instruction(&case, last).len();
                let back = i32::from(case.starts[0]) - (end as i32 + 5);
                case.code[end] = 0xE9;
                case.code[end + 1..end + 5].copy_from_slice(&back.to_le_bytes());
            }
            let mut stops: Vec<u64> = (0..6).map(|_| 1 + rng.below(120)).collect();
            stops.sort_unstable();
            stops.dedup();
            let expected = interpreter.states(&case, &stops);
            for (tier, soft) in &mut tiers {
                let states = soft.states(&case, &stops);
                for (at, (a, b)) in expected.iter().zip(&states).enumerate() {
                    assert!(
                        a == b,
                        "{mode:?} case {n}, {tier:?}: after {} instructions (of {stops:?}) the states differ\n{}",
                        stops[at],
                        compare::describe(&case)
                    );
                }
            }
        }
    }
}
