//! A debugger's break- and watchpoints.
//!
//! Guest memory is not touched. An instruction at a breakpoint starts a block of its own, which is never compiled: compiled
//! code runs up to it at full speed and leaves there. Breakpoints are linear and code is kept by physical address, so when
//! instructions are fetched from a linear page with breakpoints, blocks of the physical page are cut at these offsets,
//! whatever else it is mapped to. Pages with watched bytes get no TLB entries, so their accesses go the slow way.

use std::collections::{BTreeMap, BTreeSet};

use super::op::{Block, CS, WATCHED};
use super::SoftCpu;
use crate::debug::{DebugHit, DebugPoints};

/// The debugger's side of a processor. Not part of its state.
pub(super) struct Points {
    set: DebugPoints,
    /// Addresses at which there were breakpoints. They outlive them: debuggers take their breakpoints out at each stop and
    /// put them in again.
    known: BTreeSet<u64>,
    /// Where blocks are cut: by physical page, its offsets.
    cuts: BTreeMap<u64, BTreeSet<u64>>,
    /// What is to be told.
    pub hit: Option<DebugHit>,
    /// The breakpoint that was told last: position and address. It is passed now.
    told: Option<(u64, u64)>,
}

impl Points {
    pub fn new() -> Points {
        Points {
            set: DebugPoints::default(),
            known: BTreeSet::new(),
            cuts: BTreeMap::new(),
            hit: None,
            told: None,
        }
    }

    /// Whether a block begins at this physical address.
    pub fn cut(&self, phys: u64) -> bool {
        !self.cuts.is_empty() && self.cuts.get(&(phys & !0xFFF)).is_some_and(|c| c.contains(&(phys & 0xFFF)))
    }

    pub fn hold_interrupts(&self) -> bool {
        self.set.hold_interrupts
    }

    /// Forget what concerns a state that is replaced.
    pub fn forget(&mut self) {
        (self.hit, self.told) = (None, None);
    }
}

impl SoftCpu {
    pub(super) fn set_points(&mut self, points: Option<&DebugPoints>) {
        let new = points.cloned().unwrap_or_default();
        match points {
            None if !self.points.known.is_empty() => {
                self.points.known.clear();
                self.points.cuts.clear();
                self.drop_all_code();
            }
            None => {}
            Some(_) if new.breaks.is_subset(&self.points.known) => {}
            Some(_) => {
                self.points.known.extend(&new.breaks);
                // Pages are fetched anew, by `cut_page`.
                self.drop_fetches();
                self.new_epoch();
                self.end = std::ptr::null();
            }
        }
        let watches = new.watches != self.points.set.watches;
        self.points.set = new;
        self.attention = true;
        if watches {
            self.debug_changed();
        }
    }

    /// Whether a debugger watches bytes, or bytes of this linear page.
    pub(super) fn debugger_watches(&self, page: Option<u64>) -> bool {
        let watches = &self.points.set.watches;
        match page {
            None => !watches.is_empty(),
            Some(page) => watches
                .iter()
                .any(|w| page.wrapping_sub(w.start & !0xFFF) <= ((w.start & 0xFFF) + (w.len - 1)) & !0xFFF),
        }
    }

    /// A data access of `size` bytes at `lin`.
    pub(super) fn note_access(&mut self, lin: u64, size: u64, write: bool) {
        let hit = |w: &&crate::debug::Watch| {
            (if write { w.writes } else { w.reads })
                && (w.start.wrapping_sub(lin) < size || lin.wrapping_sub(w.start) < w.len)
        };
        if let Some(watch) = self.points.set.watches.iter().find(hit) {
            self.points.hit.get_or_insert(DebugHit::Watch(*watch));
            self.attend();
        }
    }

    /// Whether to stop before the instruction at CS:RIP.
    #[cold]
    pub(super) fn at_break(&mut self) -> bool {
        let lin = if self.long { self.rip } else { self.segs[CS].base.wrapping_add(self.rip) & 0xFFFF_FFFF };
        let here = Some((self.pos, lin));
        if self.points.told == here || !self.points.set.breaks.contains(&lin) {
            return false;
        }
        self.points.told = here;
        self.points.hit = Some(DebugHit::Break(lin));
        self.attention = true;
        true
    }

    /// Run the first instruction of a block that begins at a cut; a repeated one once. Returns whether it faulted.
    #[cold]
    pub(super) fn run_watched(&mut self, b: &Block) -> bool {
        let single = std::mem::replace(&mut self.single, true);
        let faulted = self.run_block(b);
        self.single = single;
        // A breakpoint may lie at the rest of the instruction.
        self.attention = true;
        faulted
    }

    /// Instructions are fetched from linear page `lin`, which is physical page `phys`.
    pub(super) fn cut_page(&mut self, lin: u64, phys: u64) {
        let offsets: Vec<u64> = self.points.known.range(lin..=lin | 0xFFF).map(|a| a & 0xFFF).collect();
        if offsets.is_empty() {
            return;
        }
        let cuts = self.points.cuts.entry(phys).or_default();
        let before = cuts.len();
        cuts.extend(offsets);
        if cuts.len() > before {
            self.drop_code_page(phys);
        }
    }

    /// Mark a new block that begins at a cut; `phys` is where it does.
    pub(super) fn mark_cut(&self, b: &Block, phys: u64) {
        if self.points.cut(phys) {
            b.runs.set(WATCHED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::super::Tier;
    use super::*;
    use crate::debug::Watch;
    use crate::{Exit, Processor, RunResult};

    /// mov ecx,50; mov edi,3000h; a: inc qword [2000h]; push rcx; mov ecx,5; rep stosb; pop rcx; cmp byte [2000h],40;
    /// jne b; nop; b: dec ecx; jnz a; hlt
    const CODE: [u8; 45] = [
        0xB9, 50, 0, 0, 0, 0xBF, 0, 0x30, 0, 0, 0x48, 0xFF, 0x04, 0x25, 0, 0x20, 0, 0, 0x51, 0xB9, 5, 0, 0,
        0, 0xF3, 0xAA, 0x59, 0x80, 0x3C, 0x25, 0, 0x20, 0, 0, 40, 0x75, 1, 0x90, 0xFF, 0xC9, 0x75, 0xE0,
        0xF4, 0, 0,
    ];

    /// Run to HLT, going on after each stop: what it stopped for, and at which position.
    fn stops(m: &mut Machine, stride: u64) -> Vec<(u64, DebugHit)> {
        let mut seen = Vec::new();
        loop {
            match m.run(stride).exit {
                Exit::Budget => assert!(m.position < 10_000),
                Exit::Debug => seen.push((m.position, m.cpu.take_debug_hit().unwrap())),
                exit => {
                    assert_eq!(exit, Exit::Halt);
                    return seen;
                }
            }
        }
    }

    /// In every tier the same stops, and the same end as without a debugger.
    fn check(points: &DebugPoints, expected: usize) -> Vec<(u64, DebugHit)> {
        let mut plain = Machine::long(&CODE);
        assert_eq!(stops(&mut plain, 10_000), []);
        let mut first = None;
        for tier in [Tier::Never, Tier::AtOnce, Tier::After(3), Tier::Random(9)] {
            for stride in [1, 7, 10_000] {
                let mut m = Machine::long(&CODE);
                m.cpu.set_tier(tier);
                m.cpu.set_debug(Some(points));
                let seen = stops(&mut m, stride);
                assert_eq!(seen.len(), expected, "{tier:?} {stride}");
                assert_eq!(
                    (m.position, m.cpu.save()),
                    (plain.position, plain.cpu.save()),
                    "{tier:?} {stride}"
                );
                assert_eq!(*first.get_or_insert(seen.clone()), seen, "{tier:?} {stride}");
            }
        }
        first.unwrap_or_default()
    }

    fn at(breaks: &[u64]) -> DebugPoints {
        DebugPoints { breaks: breaks.iter().copied().collect(), ..Default::default() }
    }

    #[test]
    fn breakpoints_stop_each_time_in_every_tier_and_change_nothing() {
        // The second of two that lie in one block; the first instruction; one that is jumped over but once.
        let seen = check(&at(&[0x1012, 0x1013]), 100);
        assert_eq!(seen[..3].iter().map(|s| s.0).collect::<Vec<_>>(), [3, 4, 16]);
        assert_eq!(check(&at(&[0x1000, 0x1025]), 2)[0], (0, DebugHit::Break(0x1000)));
        // Not an instruction's first byte.
        check(&at(&[0x1014, 0x1001]), 0);
    }

    #[test]
    fn a_breakpoint_at_a_repeated_instruction_stops_for_each_iteration() {
        check(&at(&[0x1018]), 250);
    }

    #[test]
    fn watchpoints_stop_behind_the_access() {
        let watch = |start, len, reads, writes| DebugPoints {
            watches: vec![Watch { start, len, reads, writes }],
            ..Default::default()
        };
        let seen = check(&watch(0x2004, 2, false, true), 50);
        assert_eq!(seen[0].0, 3);
        // INC reads too, and CMP reads the first byte.
        check(&watch(0x2000, 1, true, false), 100);
        check(&watch(0x2001, 1, true, true), 50);
        // The 13th iteration of one of the string stores.
        let seen = check(&watch(0x300C, 1, false, true), 1);
        assert_eq!(seen[0].0, 2 + 2 * 13 + 3 + 3);
        // Page tables' accessed bits are not accesses of the program.
        check(&watch(0x1_3000, 0x1000, true, true), 0);
    }

    #[test]
    fn points_that_come_while_code_is_compiled_count_from_then_on() {
        for tier in [Tier::Never, Tier::AtOnce] {
            let mut m = Machine::long(&CODE);
            m.cpu.set_tier(tier);
            m.run(2 + 13 * 20);
            m.cpu.set_debug(Some(&at(&[0x1013])));
            m.run(1000);
            assert_eq!(
                (m.cpu.take_debug_hit(), m.cpu.rip),
                (Some(DebugHit::Break(0x1013)), 0x1013),
                "{tier:?}"
            );
            m.cpu.set_debug(None);
            assert_eq!(m.run(1000).exit, Exit::Halt);
        }
    }

    #[test]
    fn interrupts_are_held_while_a_debugger_steps() {
        let mut m = Machine::long(&CODE);
        m.cpu.nmi();
        m.cpu.set_debug(Some(&DebugPoints { hold_interrupts: true, ..Default::default() }));
        m.run(1);
        assert_eq!(m.cpu.rip, 0x1005);
        m.cpu.set_debug(Some(&DebugPoints::default()));
        assert_eq!(m.run(5).exit, Exit::Halt);
        assert_eq!(m.cpu.rip, 0xC021);
    }

    #[test]
    fn where_a_debugger_stops_behind_deliveries_is_found_again_without_one() {
        let mut code = CODE;
        // UD2 for the second instruction.
        code[5..7].copy_from_slice(&[0x0F, 0x0B]);
        for (set_out, handler, count) in [(0, 0xC020, 1), (1, 0xC060, 1)] {
            let make = || {
                let mut m = Machine::long(&code);
                m.run(set_out);
                if set_out == 0 {
                    m.cpu.nmi();
                }
                m
            };
            let (mut m, mut twin) = (make(), make());
            m.cpu.set_debug(Some(&at(&[handler])));
            assert_eq!((m.run(100).exit, m.cpu.rip), (Exit::Debug, handler));
            assert_eq!((m.position, m.cpu.delivered(m.position)), (set_out, count));
            assert_eq!(twin.cpu.delivered(set_out), 0);
            assert_ne!(m.cpu.save(), twin.cpu.save());
            assert_eq!(twin.deliver(count).retired, 0);
            assert_eq!(m.cpu.save(), twin.cpu.save());
            assert_eq!(m.cpu.take_debug_hit(), Some(DebugHit::Break(handler)));
            m.cpu.set_debug(None);
            assert_eq!(m.run(100), RunResult { exit: Exit::Halt, retired: 1 });
            assert_eq!(twin.run(100), RunResult { exit: Exit::Halt, retired: 1 });
            assert_eq!((m.cpu.delivered(m.position), m.cpu.save()), (0, twin.cpu.save()));
        }
    }

    fn cpu(watches: &[(u64, u64)]) -> SoftCpu {
        let mut c = SoftCpu::new(0, 1, &crate::CpuModel::parse("max").unwrap());
        let watches =
            watches.iter().map(|&(start, len)| Watch { start, len, reads: false, writes: true }).collect();
        c.set_points(Some(&DebugPoints { watches, ..Default::default() }));
        c
    }

    #[test]
    fn pages_of_watched_bytes_are_known_also_across_a_boundary_and_at_the_end() {
        let c = cpu(&[(0x1FFC, 8), (u64::MAX - 3, 4)]);
        let seen: Vec<u64> = [0, 0x1000, 0x2000, 0x3000, !0xFFF]
            .into_iter()
            .filter(|p| c.debugger_watches(Some(*p)))
            .collect();
        assert_eq!(seen, [0x1000, 0x2000, !0xFFF]);
    }

    #[test]
    fn an_access_hits_if_it_overlaps_and_is_of_the_kind() {
        for (lin, size, write, hit) in [
            (0xFF8, 8, true, false),
            (0xFF9, 8, true, true),
            (0x1003, 1, true, true),
            (0x1004, 8, true, false),
            (0x1000, 4, false, false),
        ] {
            let mut c = cpu(&[(0x1000, 4)]);
            c.note_access(lin, size, write);
            assert_eq!(c.points.hit.is_some(), hit, "{lin:#x} {size} {write}");
        }
    }
}
