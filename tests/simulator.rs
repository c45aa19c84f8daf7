//! The pair under faults, simulated: see [`ftvm::sim`].
//!
//! `FTVM_SIM_SEEDS=N` runs N seeds instead of the usual number, `FTVM_SIM_SEED=S` replays one with its trace.

use ftvm::sim::{run, Mutation, Options};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How many of `seeds` fail, and the first failure.
fn failures(seeds: std::ops::Range<u64>, change: impl Fn(&mut Options)) -> (u64, Option<(u64, String)>) {
    let (mut count, mut first) = (0, None);
    for seed in seeds {
        let mut options = Options::new(seed);
        change(&mut options);
        if let Err((text, _)) = run(options) {
            count += 1;
            first.get_or_insert((seed, text));
        }
    }
    (count, first)
}

/// Run all seeds (or the one wanted); none may break a promise.
fn all_well(test: &str, change: impl Fn(&mut Options)) {
    let options = |seed| {
        let mut options = Options::new(seed);
        change(&mut options);
        options
    };
    if let Some(seed) = number("FTVM_SIM_SEED") {
        let result = run(Options { trace: true, ..options(seed) });
        let (text, report) = match result {
            Ok(report) => (None, report),
            Err((text, report)) => (Some(text), report),
        };
        for line in &report.trace {
            println!("{line}");
        }
        assert_eq!(text, None, "seed {seed}");
        return;
    }
    let seeds = number("FTVM_SIM_SEEDS").unwrap_or(1000);
    let started = std::time::Instant::now();
    let (mut failovers, mut faults, mut pairings, mut replies, mut hashes, mut fetches) = (0, 0, 0, 0, 0, 0);
    let mut failed = Vec::new();
    for seed in 0..seeds {
        match run(options(seed)) {
            Ok(r) => {
                failovers += r.failovers;
                faults += r.faults;
                pairings += r.pairings;
                replies += r.replies;
                hashes += r.hashes;
                fetches += r.fetches;
            }
            Err((text, _)) => failed.push((seed, text)),
        }
    }
    println!(
        "{seeds} seeds in {:.1} s: {faults} faults, {failovers} failovers, {pairings} pairings, \
         {replies} replies, {hashes} equal hashes, {fetches} reads of backups",
        started.elapsed().as_secs_f64()
    );
    for (seed, text) in failed.iter().take(10) {
        println!("seed {seed}: {text}\n  replay: FTVM_SIM_SEED={seed} cargo test --test simulator {test} -- --nocapture");
    }
    assert!(failed.is_empty(), "{} of {seeds} seeds failed", failed.len());
    assert!(seeds < 100 || failovers > seeds / 4, "the simulation does not exercise failovers");
    assert!(seeds < 100 || options(0).reads_disk == (fetches > seeds), "backups read, if they are to");
}

#[test]
fn no_promise_is_broken_whatever_fails() {
    all_well("whatever_fails", |_| {});
}

#[test]
fn no_promise_is_broken_where_the_backup_reads_the_disk() {
    all_well("backup_reads", |o| o.reads_disk = true);
}

#[test]
fn no_promise_is_broken_with_separate_disks() {
    all_well("separate", |o| o.separate = true);
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..20 {
        let options = Options { trace: true, ..Options::new(seed) };
        let text = |r: Result<_, (String, _)>| match r {
            Ok(report) => (None, report),
            Err((t, report)) => (Some(t), report),
        };
        assert_eq!(text(run(options)), text(run(options)), "seed {seed}");
    }
}

#[test]
fn every_broken_rule_is_noticed() {
    use Mutation::*;
    for mutation in [
        ReleaseEarly,
        LiveWithoutAnswer,
        BothWin,
        AckAfterArbitration,
        SkipReplay,
        NoReissue,
        NoResend,
        EarlyCompletion,
        NoDirtyPages,
        IgnoreLoss,
    ] {
        let (count, first) = failures(0..300, |o| o.mutation = Some(mutation));
        println!("{mutation:?}: noticed in {count} of 300 seeds; first: {first:?}");
        assert!(count > 0, "{mutation:?} goes unnoticed");
    }
}

#[test]
fn every_broken_rule_of_disks_is_noticed() {
    use Mutation::*;
    let reads: &[Mutation] = &[NoHold, EarlyCompletion, NoReissue];
    let separate: &[Mutation] =
        &[NoOwnWait, NoDirtySectors, NoGeneration, AdoptLate, NoReissue, LiveWithoutAnswer, SkipReplay];
    for (is_separate, mutations) in [(false, reads), (true, separate)] {
        for mutation in mutations {
            let (count, first) = failures(0..300, |o| {
                o.mutation = Some(*mutation);
                (o.separate, o.reads_disk) = (is_separate, !is_separate);
            });
            println!(
                "separate {is_separate}, {mutation:?}: noticed in {count} of 300 seeds; first: {first:?}"
            );
            assert!(count > 0, "{mutation:?} goes unnoticed");
        }
    }
}

#[test]
fn without_an_overlay_late_writes_destroy() {
    let (count, first) = failures(0..1000, |o| o.overlay = false);
    println!("no overlay: {count} of 1000 seeds; first: {first:?}");
    assert!(count > 0, "late writes are not simulated");
}
