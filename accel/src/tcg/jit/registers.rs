//! Which guest registers live in host registers.
//!
//! As a rule [`HOST`] says so. A loop that uses the registers that have no place there more than others has them change
//! places while it runs: its trace takes them over at its start, and gives them back wherever it is left, or a handler is
//! called.

use super::super::op::{NOREG, RAX as GUEST_AX, VECTOR};
use super::asm::Rm;
use super::block::Compiler;
use super::kind::Kind;
use super::stubs::{mem, HOST, NONE};
use super::trace::Trace;

/// Uses that a change of places must save in one round.
const WORTH: u32 = 2;
/// Registers that may give up their place: the others' places are themselves part of what instructions do.
const MAY_YIELD: [u8; 7] = [3, 6, 7, 8, 9, 10, 12];

/// Where guest registers are while a trace runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placing {
    pub host: [u8; 16],
    /// The register that has no place as a rule, and the one whose place it has.
    swaps: Vec<(u8, u8)>,
}

impl Placing {
    /// What is best for a trace, which depends on its instructions alone.
    pub fn of(trace: &Trace) -> Placing {
        let mut placing = Placing { host: HOST, swaps: Vec::new() };
        let start = trace.parts[0].at as i64;
        let back = |i: usize| match trace.kinds[i] {
            Kind::Jcc { rel, .. } | Kind::Jmp { rel } => trace.next(i) + rel == start,
            _ => false,
        };
        if !(0..trace.len()).any(back) || trace.kinds.contains(&Kind::Handler) {
            return placing;
        }
        let mut uses = [0u32; 16];
        let mut fixed = 0u16;
        for (i, kind) in trace.kinds.iter().enumerate() {
            let op = trace.op(i);
            let operands = if op.map == VECTOR { [NOREG; 2] } else { [op.reg, op.rm] };
            for r in [op.base, op.index].into_iter().chain(operands) {
                if let Some(n) = uses.get_mut(r as usize) {
                    *n += 1;
                }
            }
            // Those that are known to have a place.
            fixed |= match *kind {
                Kind::Xchg { a, b, .. } => 1 << a | 1 << b,
                Kind::Cmpxchg { r, .. } | Kind::Xadd { r, .. } => 1 << r | 1 << GUEST_AX,
                _ => 0,
            };
        }
        let mut homeless: Vec<u8> = (0..16).filter(|&r| HOST[r as usize] == NONE).collect();
        homeless.sort_by_key(|&r| std::cmp::Reverse(uses[r as usize]));
        let mut yielding: Vec<u8> = MAY_YIELD.into_iter().filter(|r| fixed >> r & 1 == 0).collect();
        yielding.sort_by_key(|&r| uses[r as usize]);
        for (m, g) in homeless.into_iter().zip(yielding) {
            if uses[m as usize] >= uses[g as usize] + WORTH {
                placing.host[m as usize] = HOST[g as usize];
                placing.host[g as usize] = NONE;
                placing.swaps.push((m, g));
            }
        }
        placing
    }
}

impl Compiler<'_> {
    /// Where a guest register is.
    pub fn at(&self, g: u8) -> Rm {
        match self.host[g as usize] {
            NONE => mem(g as usize),
            h => Rm::R(h),
        }
    }
    /// A source: a register, or the memory operand in hand.
    pub fn from(&self, s: Option<u8>) -> Rm {
        s.map_or(self.place, |r| self.at(r))
    }

    /// From the rule's places to the trace's. Leaves the flags alone.
    pub fn take_over(&mut self) {
        for &(m, g) in &self.placing.swaps {
            let h = HOST[g as usize];
            self.a.store(8, mem(g as usize), h);
            self.a.load(8, h, mem(m as usize));
        }
        self.host = self.placing.host;
    }
    /// And back, in the code that follows; what is compiled next is still the trace's. Leaves the flags alone.
    pub fn give_back(&mut self) {
        if self.host == HOST {
            return;
        }
        for &(m, g) in &self.placing.swaps {
            let h = HOST[g as usize];
            self.a.store(8, mem(m as usize), h);
            self.a.load(8, h, mem(g as usize));
        }
    }
}
