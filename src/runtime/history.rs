//! Moments of a replay to which it can go back: the machine's state, and the pages of memory that changed since the moment
//! before.
//!
//! A replay goes the same way each time, so moments stay good whichever way it is gone. The pages are compressed; when they
//! take more than the budget, moments are merged, the older the sparser.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ftvm_accel::mem::{DIRTY_MIGRATION, PAGE_SIZE};
use ftvm_accel::GuestMemory;

use super::record::Mark;
use crate::machine::{Machine, MachineState, StateError};

/// Memory for the pages of all moments: as much as the guest has, but not less than this.
const LEAST_BUDGET: usize = 256 << 20;
/// The time between two moments while the replay runs: not less than this, and ten times as long as one takes to keep.
const INTERVAL: Duration = Duration::from_millis(250);

/// What belongs to a moment besides the machine.
#[derive(Clone, Debug)]
pub struct Along {
    /// Where in the recording.
    pub log: Mark,
    /// State hashes compared so far.
    pub hashes: u64,
    /// Pieces of console output so far.
    pub outputs: u64,
}

struct Moment {
    position: u64,
    /// Of [`MachineState::to_bytes`], compressed.
    state: Vec<u8>,
    along: Along,
    /// By guest physical address; `None`: a page of zeros.
    pages: BTreeMap<u64, Option<Box<[u8]>>>,
}

/// The moments, in order.
pub struct History {
    moments: Vec<Moment>,
    /// The dirty flags of memory tell what changed since this one.
    at: usize,
    budget: usize,
    bytes: usize,
    last: Instant,
    interval: Duration,
}

/// Addresses of the pages that changed since the last call.
fn changed(mem: &GuestMemory) -> BTreeSet<u64> {
    let (mut all, mut cursor) = (BTreeSet::new(), 0);
    loop {
        let some = mem.take_dirty(DIRTY_MIGRATION, &mut cursor, 1 << 16);
        if some.is_empty() {
            return all;
        }
        all.extend(some);
    }
}

fn keep(mem: &GuestMemory, pages: BTreeSet<u64>, zeros: bool) -> BTreeMap<u64, Option<Box<[u8]>>> {
    let mut bytes = [0; PAGE_SIZE as usize];
    let kept = pages.into_iter().filter_map(|gpa| {
        mem.read(gpa, &mut bytes).ok()?;
        let zero = bytes.iter().all(|b| *b == 0);
        let page = (!zero).then(|| lz4_flex::compress(&bytes).into_boxed_slice());
        (zeros || !zero).then_some((gpa, page))
    });
    kept.collect()
}

fn state(machine: &Machine) -> Vec<u8> {
    lz4_flex::compress_prepend_size(&machine.state().to_bytes())
}

/// Bytes of a page in a tree, roughly.
fn page_size(page: &Option<Box<[u8]>>) -> usize {
    48 + page.as_ref().map_or(0, |p| p.len())
}

impl Moment {
    fn size(&self) -> usize {
        self.state.len() + self.pages.values().map(page_size).sum::<usize>()
    }
}

impl History {
    /// The present is the first moment.
    pub fn new(machine: &Machine, along: Along) -> History {
        let mem = machine.memory();
        changed(mem);
        let all = mem.ram_ranges().into_iter().flat_map(|(start, len)| (start..start + len).step_by(4096));
        let pages = keep(mem, all.collect(), false);
        let first = Moment { position: machine.stamp().position, state: state(machine), along, pages };
        let bytes = first.size();
        let budget = usize::try_from(mem.ram_size()).unwrap_or(usize::MAX).max(LEAST_BUDGET);
        History { moments: vec![first], at: 0, budget, bytes, last: Instant::now(), interval: INTERVAL }
    }

    /// How many moments there are, and how many bytes they take.
    pub fn size(&self) -> (usize, usize) {
        (self.moments.len(), self.bytes)
    }

    /// The last moment that is not behind `position`.
    pub fn before(&self, position: u64) -> usize {
        self.moments.partition_point(|m| m.position <= position).saturating_sub(1)
    }

    /// Where a moment is.
    pub fn position(&self, index: usize) -> u64 {
        self.moments.get(index).map_or(0, |m| m.position)
    }

    /// Whether it is time for a new moment, now that the machine has run on to `position`.
    pub fn is_due(&self, position: u64) -> bool {
        self.moments.last().is_some_and(|m| m.position < position) && self.last.elapsed() >= self.interval
    }

    /// Remember the present. (The same position as a moment's: nothing is done.)
    pub fn remember(&mut self, machine: &Machine, along: Along) {
        let position = machine.stamp().position;
        let index = self.moments.partition_point(|m| m.position < position);
        if self.moments.get(index).is_some_and(|m| m.position == position) {
            return;
        }
        let started = Instant::now();
        let pages = keep(machine.memory(), changed(machine.memory()), true);
        let moment = Moment { position, state: state(machine), along, pages };
        self.bytes += moment.size();
        self.moments.insert(index, moment);
        self.at = index;
        self.last = Instant::now();
        self.interval = INTERVAL.max(10 * started.elapsed());
        while self.bytes > self.budget && self.thin() {}
    }

    /// Merge the moment whose absence costs least: replaying to what lies behind it gets longer, which matters the less the
    /// further back it is.
    fn thin(&mut self) -> bool {
        let end = self.moments.last().map_or(0, |m| m.position);
        let cost = |i: &usize| {
            let gap = self.moments[i + 1].position - self.moments[i - 1].position;
            gap as f64 / (end - self.moments[*i].position + 1) as f64
        };
        let candidates = (1..self.moments.len().saturating_sub(1)).filter(|i| *i != self.at);
        let Some(i) = candidates.min_by(|a, b| cost(a).total_cmp(&cost(b))) else { return false };
        let gone = self.moments.remove(i);
        self.bytes -= gone.size();
        let next = &mut self.moments[i].pages;
        for (gpa, page) in gone.pages {
            if let std::collections::btree_map::Entry::Vacant(slot) = next.entry(gpa) {
                self.bytes += page_size(&page);
                slot.insert(page);
            }
        }
        self.at -= usize::from(self.at > i);
        true
    }

    /// Go back (or forward) to a moment.
    pub fn restore(&mut self, machine: &mut Machine, index: usize) -> Result<Along, StateError> {
        let (low, high) = (self.at.min(index), self.at.max(index));
        let mem = machine.memory();
        let mut pages = changed(mem);
        for m in &self.moments[low + 1..=high] {
            pages.extend(m.pages.keys());
        }
        let (mut old, mut new) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        for gpa in pages {
            new.fill(0);
            let version = self.moments[..=index].iter().rev().find_map(|m| m.pages.get(&gpa));
            if let Some(Some(packed)) = version {
                lz4_flex::decompress_into(packed, &mut new)
                    .map_err(|e| StateError::Format(format!("a page of a replay's history: {e}")))?;
            }
            let differs = mem.read(gpa, &mut old).is_ok() && old != new;
            if differs {
                mem.write(gpa, &new).map_err(|e| StateError::Format(e.to_string()))?;
            }
        }
        changed(mem);
        self.at = index;
        self.last = Instant::now();
        let state = lz4_flex::decompress_size_prepended(&self.moments[index].state);
        let state = state.map_err(|e| StateError::Format(format!("a replay's history: {e}")))?;
        machine.load(&MachineState::from_bytes(&state)?)?;
        Ok(self.moments[index].along.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{MachineInput, Stop};
    use crate::sim::guest::{self, Frame};
    use ftvm_devices::{DiskOp, Input, Output};

    fn along(outputs: u64) -> Along {
        Along { log: Mark::default(), hashes: 0, outputs }
    }

    /// Answer what left the machine, and ask its service for something when it is idle.
    fn serve(machine: &mut Machine, number: &mut u64) {
        let outputs = machine.take_outputs();
        if outputs.is_empty() {
            *number += 1;
            let input = Input::NetRx { nic: 0, frame: Frame::Request(*number).bytes() };
            machine.apply(&MachineInput::Device(input));
        }
        for (_, output) in outputs {
            if let Output::Disk { id, op, .. } = output {
                let data = if let DiskOp::Read { len, .. } = op { vec![0; len as usize] } else { Vec::new() };
                machine.apply(&MachineInput::Device(Input::DiskDone { id, result: Ok(data) }));
            }
        }
    }

    /// Run on; position and state hash at the start and at `count` moments that are remembered on the way.
    fn walk(machine: &mut Machine, history: &mut History, count: u64) -> Vec<(u64, u64)> {
        let mut seen = vec![(machine.stamp().position, machine.state_hash().total())];
        let mut number = 0;
        for n in 1..=count {
            while machine.stamp().position < n * 1_000 {
                let stop = machine.run(n * 1_000 - machine.stamp().position);
                if stop != Stop::Limit {
                    serve(machine, &mut number);
                }
            }
            machine.take_outputs();
            history.remember(machine, along(n));
            seen.push((machine.stamp().position, machine.state_hash().total()));
        }
        seen
    }

    #[test]
    fn every_moment_is_found_again_in_any_order() {
        let mut machine = guest::machine().unwrap();
        let mut history = History::new(&machine, along(0));
        let seen = walk(&mut machine, &mut history, 12);
        let mut x = 7u64;
        for _ in 0..200 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (position, hash) = seen[(x >> 33) as usize % seen.len()];
            let index = history.before(position + (x >> 60));
            assert_eq!(history.restore(&mut machine, index).unwrap().outputs, position / 1_000);
            assert_eq!((machine.stamp().position, machine.state_hash().total()), (position, hash));
            // It goes on from there for a while.
            machine.run(x >> 56);
            machine.take_outputs();
        }
    }

    #[test]
    fn a_small_budget_keeps_the_first_and_the_latest() {
        let mut machine = guest::machine().unwrap();
        let mut history = History::new(&machine, along(0));
        history.budget = 200_000;
        let seen = walk(&mut machine, &mut history, 60);
        let (count, bytes) = history.size();
        assert!(count > 3 && count < 60 && bytes <= history.budget, "{count} {bytes}");
        assert_eq!((history.position(0), history.position(count - 1)), (0, 60_000));
        for index in (0..count).rev().chain(0..count) {
            history.restore(&mut machine, index).unwrap();
            let here = (machine.stamp().position, machine.state_hash().total());
            assert!(seen.contains(&here));
        }
    }
}
