//! The code out of line of a trace.

use super::super::op::{LEFT, PAGE, RIP_OUT, TOUCHED};
use super::asm::*;
use super::block::{Access, Compiler, Slow};
use super::flags::Flags;
use super::stubs::{mem, HOST};
use super::{CHARGE, EDGE, INTERPRET};

/// Code out of line.
#[derive(Clone, Copy)]
pub enum Cold {
    /// Instruction `i` by its handler, then on at `join`.
    Step { from: Fix, i: usize, flags: Flags, join: Fix, loaded: u8 },
    /// Load the vector registers for instruction `i`, then on at `back`.
    Load { from: Fix, i: usize, flags: Flags, back: Fix, level: u8 },
    /// An edge without a link, and without budget.
    /// `inside`: registers are still where this trace has them.
    Edge { n: u32, link: Option<Fix>, budget: Fix, flags: Flags, target: i32, inside: bool },
    /// Fill the TLB for the group of leader `n`, and try `again`.
    Touch { from: Fix, again: Fix, n: usize, flags: Flags, tag: i32 },
    /// The budget has no room for a trace that was found in the table.
    Short { from: Fix },
    /// A jump to another page for which nothing is known (any more).
    Across { from: [Fix; 2], n: u32, target: i32 },
    /// What is known of a return from instruction `i`'s call does not lead anywhere yet.
    Return { from: Fix, n: u32, target: i32 },
    /// Instruction `i` jumps to RAX, of which nothing is known: it is canonical, or else the handler's.
    Astray { from: Fix, i: usize, by: Astray },
    /// Out of the trace, which instruction `i` ends here.
    Side { from: Fix, i: usize, flags: Flags, target: i64 },
}

/// A jump to where nobody expected.
#[derive(Clone, Copy)]
pub enum Astray {
    /// A return, of which the guest's stack pointer moves up by so many bytes.
    Return(i32),
    /// A jump with the site at this address.
    Jump(u64),
}

impl Compiler<'_> {
    pub fn out_of_line(&mut self) {
        self.a.apart(self.far);
        // What runs now and then lies together.
        let known = self.cold.len();
        for sides in [true, false] {
            for n in 0..known {
                let c = self.cold[n];
                if matches!(c, Cold::Side { .. }) == sides {
                    self.cold_code(c);
                }
            }
        }
        while self.cold.len() > known {
            let last = self.cold.pop();
            last.into_iter().for_each(|c| self.cold_code(c));
        }
    }

    fn cold_code(&mut self, cold: Cold) {
        self.host = self.placing.host;
        self.a.holds = None;
        match cold {
            Cold::Short { from } => {
                self.a.here(from);
                let start = self.a.at();
                self.a.alu_imm(8, 0, mem(LEFT), self.trace.count as i32);
                debug_assert_eq!(self.a.at() - start, CHARGE);
                self.leaves_for(self.trace.parts[0].at as i32);
                self.a.jmp_abs(self.stubs.miss);
            }
            Cold::Across { from, n, target } => {
                for f in from {
                    self.a.here(f);
                }
                self.a.load(8, RAX, mem(PAGE));
                self.a.lea(self.trace.word, RAX, Rm::M(RAX, target));
                self.a.constant(RDI, (EDGE + 2 * n) as u64);
                self.a.jmp_abs(self.stubs.ask);
                self.left_by(n);
            }
            Cold::Return { from, n, target } => {
                self.a.here(from);
                self.leaves_for(target);
                self.a.constant(RAX, (EDGE + 2 * n) as u64);
                self.leave(n);
            }
            Cold::Astray { from, i, by } => {
                self.a.here(from);
                let mut access = Access { slow: Slow::new(), i, flags: Flags::KEPT };
                self.check_target(&mut access);
                self.join(access);
                match by {
                    Astray::Return(bytes) => {
                        self.pop(bytes);
                        self.give_back();
                        self.a.jmp_abs(self.stubs.lookup);
                    }
                    Astray::Jump(site) => {
                        self.give_back();
                        self.a.lea_abs(RDI, site);
                        self.a.jmp_abs(self.stubs.fill);
                    }
                }
            }
            Cold::Side { from, i, flags, target } => {
                self.a.here(from);
                self.fl = flags;
                self.edge(i, target);
            }
            Cold::Step { from, i, flags, join, loaded } => {
                self.a.here(from);
                self.fl = Flags { host: 0, ..flags };
                if self.need[i] {
                    self.keep();
                }
                self.call_step(i, loaded);
                let back = self.a.jmp();
                self.a.to(back, join.end());
            }
            Cold::Touch { from, again, n, flags, tag } => {
                self.a.here(from);
                // The linear address again.
                self.a.alu_load(8, 6, RDI, Rm::M(RAX, tag));
                self.a.store(8, mem(TOUCHED), RDI);
                self.fl = Flags { host: 0, ..flags };
                self.keep();
                let plainly = self.a.jmp();
                self.a.here(plainly);
                self.leaders[n].jump_at = self.a.end_address(plainly.end()) - 4;
                self.give_back();
                self.a.constant(RAX, (self.first_leader + n) as u64);
                self.a.call_abs(self.stubs.touch);
                self.take_over();
                self.a.load(8, RDI, mem(TOUCHED));
                let back = self.a.jmp();
                self.a.to(back, again.end());
            }
            Cold::Load { from, i, flags, back, level } => {
                self.a.here(from);
                self.fl = Flags { host: 0, ..flags };
                self.keep();
                self.a.call_abs(self.stubs.load[level as usize]);
                let ok = self.a.jcc(cc::E);
                self.a.to(ok, back.end());
                self.give_back();
                let op = self.op(i);
                self.a.alu_imm(8, 0, mem(LEFT), self.trace.rest(i) as i32);
                self.leaves_for(self.trace.part(i).at as i32 + op.off as i32);
                self.a.constant(RAX, INTERPRET as u64);
                self.a.jmp_abs(self.stubs.exit);
            }
            Cold::Edge { n, link, budget, flags, target, inside } => {
                if !inside {
                    self.host = HOST;
                }
                let to_common = link.map(|link| {
                    self.a.here(link);
                    if !flags.kept {
                        self.fl = Flags { host: 0, ..flags };
                        self.keep();
                    }
                    self.a.constant(RAX, (EDGE + 2 * n) as u64);
                    self.a.jmp()
                });
                self.a.here(budget);
                if !flags.kept {
                    self.fl = Flags { host: 0, ..flags };
                    self.keep();
                }
                self.give_back();
                self.a.constant(RAX, (EDGE + 2 * n + 1) as u64);
                if let Some(f) = to_common {
                    self.a.here(f);
                }
                self.leaves_for(target);
                self.leave(n);
            }
        }
    }

    /// The guest address `target` bytes from the page's start into RIP_OUT. Uses RDI.
    fn leaves_for(&mut self, target: i32) {
        self.a.load(8, RDI, mem(PAGE));
        self.a.lea(self.trace.word, RDI, Rm::M(RDI, target));
        self.a.store(8, mem(RIP_OUT), RDI);
    }

    /// Leave by edge `n`, or wherever it leads instead.
    fn leave(&mut self, n: u32) {
        self.a.jmp_abs(self.stubs.exit);
        self.left_by(n);
    }
    /// What was compiled last is the jump that leaves by edge `n`.
    fn left_by(&mut self, n: u32) {
        self.edges[n as usize - self.first_edge].leave_at = self.a.end_address(self.a.at()) - 4;
    }
}
