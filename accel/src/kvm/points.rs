//! Break- and watchpoints of a debugger: the four debug registers, and INT3 for the breakpoints that do not fit there.

use kvm_bindings::*;

use crate::debug::{DebugHit, DebugPoints, Watch};

/// Debug registers for addresses.
const REGISTERS: usize = 4;
/// DR7's bits that are always set (SDM vol. 3, section 18.2.4): GE, LE and a reserved one.
const DR7: u64 = 0x700;
/// DR6: the conditions of the debug registers.
const DR6_REGISTERS: u64 = 0xF;

/// What KVM tells of an exit for a debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugExit {
    /// 1: #DB, 3: #BP.
    pub exception: u32,
    /// Linear address of the next instruction (of INT3 itself).
    pub pc: u64,
    pub dr6: u64,
}

/// Where a processor is to stop, as the hardware has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What each debug register is for: an address, DR7's four bits for it, and whose it is.
    registers: Vec<(u64, u64, DebugHit)>,
    /// Linear addresses where INT3 is put.
    pub soft: Vec<u64>,
    /// No interrupts.
    pub hold_interrupts: bool,
}

/// The naturally aligned pieces of a range: address and length.
fn pieces(watch: &Watch) -> Vec<(u64, u64)> {
    let (mut at, mut left) = (watch.start, watch.len);
    let mut out = Vec::new();
    while left > 0 && out.len() <= REGISTERS {
        let len = [8, 4, 2, 1].into_iter().find(|n| at.is_multiple_of(*n) && *n <= left).unwrap_or(1);
        out.push((at, len));
        at = at.wrapping_add(len);
        left -= len;
    }
    out
}

/// Whether the processor itself executes guests. Where it cannot, KVM emulates every instruction, and then tells of no INT3 and of no
/// access that a debug register watches.
pub fn guests_are_executed() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & SVM != 0
}

impl Plan {
    /// `None`: the registers are not enough for the watchpoints, or one of them is for reads only; or it takes more than the
    /// four registers for breakpoints, and guests are not [executed](guests_are_executed).
    pub fn new(points: &DebugPoints, executed: bool) -> Option<Plan> {
        if !executed && !points.watches.is_empty() {
            return None;
        }
        let mut plan = Plan { hold_interrupts: points.hold_interrupts, ..Plan::default() };
        for watch in &points.watches {
            let kind = match (watch.reads, watch.writes) {
                (true, true) => 3,
                (false, true) => 1,
                _ => return None,
            };
            for (at, len) in pieces(watch) {
                let len = match len {
                    8 => 2,
                    n => n - 1,
                };
                plan.registers.push((at, kind | len << 2, DebugHit::Watch(*watch)));
            }
        }
        if plan.registers.len() > REGISTERS {
            return None;
        }
        for at in &points.breaks {
            match plan.registers.len() < REGISTERS {
                true => plan.registers.push((*at, 0, DebugHit::Break(*at))),
                false if executed => plan.soft.push(*at),
                false => return None,
            }
        }
        Some(plan)
    }

    /// Whether there is a breakpoint at this linear address.
    pub fn breaks_at(&self, at: u64) -> bool {
        self.soft.contains(&at) || self.registers.iter().any(|(_, _, hit)| *hit == DebugHit::Break(at))
    }

    /// The plan for KVM; `more`: further bits of what it is to do.
    pub fn guest_debug(&self, more: u32) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP | more,
            ..Default::default()
        };
        if self.hold_interrupts {
            debug.control |= KVM_GUESTDBG_BLOCKIRQ;
        }
        if !self.registers.is_empty() {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[7] = DR7;
            for (n, (at, bits, _)) in self.registers.iter().enumerate() {
                debug.arch.debugreg[n] = *at;
                debug.arch.debugreg[7] |= 2 << (2 * n) | bits << (16 + 4 * n);
            }
        }
        debug
    }

    /// Which point an exit is for; `None`: it is the guest's own.
    pub fn hit(&self, exit: DebugExit) -> Option<DebugHit> {
        if exit.exception == 3 {
            return self.soft.contains(&exit.pc).then_some(DebugHit::Break(exit.pc));
        }
        let set = |n: usize| exit.dr6 & DR6_REGISTERS & 1 << n != 0;
        let hit = self.registers.iter().enumerate().find(|(n, _)| set(*n));
        hit.map(|(_, (_, _, hit))| *hit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(start: u64, len: u64, reads: bool) -> Watch {
        Watch { start, len, reads, writes: true }
    }

    #[test]
    fn watchpoints_come_first_and_breakpoints_overflow_into_int3() {
        let points = DebugPoints {
            breaks: [0x10, 0x20, 0x30].into(),
            watches: vec![watch(0x1001, 3, false), watch(0x2000, 8, true)],
            hold_interrupts: true,
        };
        assert_eq!(Plan::new(&points, false), None);
        let plan = Plan::new(&points, true).unwrap();
        assert_eq!(plan.soft, [0x20, 0x30]);
        let debug = plan.guest_debug(0);
        assert_eq!(debug.arch.debugreg[..4], [0x1001, 0x1002, 0x2000, 0x10]);
        // Write a byte, write a word, read or write eight bytes, execute.
        assert_eq!(debug.arch.debugreg[7], 0x700 | 0xAA | 0x1 << 16 | 0x5 << 20 | 0xB << 24);
        assert_ne!(debug.control & KVM_GUESTDBG_BLOCKIRQ, 0);
        let exit = |exception, pc, dr6| plan.hit(DebugExit { exception, pc, dr6 });
        assert_eq!(exit(1, 0x99, 2), Some(DebugHit::Watch(points.watches[0])));
        assert_eq!(exit(1, 0x10, 8), Some(DebugHit::Break(0x10)));
        assert_eq!(exit(3, 0x30, 0), Some(DebugHit::Break(0x30)));
        assert_eq!(exit(3, 0x40, 0), None);
        assert_eq!(exit(1, 0x40, 1 << 14), None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let with = |watches: Vec<Watch>| Plan::new(&DebugPoints { watches, ..Default::default() }, true);
        assert!(with(vec![watch(0, 32, false)]).is_some());
        assert!(with(vec![watch(0, 33, false)]).is_none());
        assert!(with(vec![watch(0, 1 << 40, false)]).is_none());
        assert!(with(vec![Watch { start: 0, len: 1, reads: true, writes: false }]).is_none());
    }
}
