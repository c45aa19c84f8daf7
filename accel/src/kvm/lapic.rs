//! The local APIC's registers as a page (SDM vol. 3, section 11.4.1), and its timer.
//!
//! A saved APIC knows when its timer fires; the page, how many counts are left. [`from_saved`] and [`to_saved`] turn
//! one into the other at a moment of virtual time. The TSC-deadline mode's MSR is not part of the page.

use kvm_bindings::kvm_lapic_state;

use crate::tcg::lapic::{Lapic, BASE_X2};

const ID: usize = 0x20;
const VERSION: usize = 0x30;
const TPR: usize = 0x80;
const LDR: usize = 0xD0;
const DFR: usize = 0xE0;
const SVR: usize = 0xF0;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const ESR: usize = 0x280;
const ICR: usize = 0x300;
const ICR2: usize = 0x310;
const LVT: usize = 0x320;
const INITIAL: usize = 0x380;
const CURRENT: usize = 0x390;
const DIVIDE: usize = 0x3E0;

fn get(page: &kvm_lapic_state, at: usize) -> u32 {
    let mut bytes = [0u8; 4];
    for (to, from) in bytes.iter_mut().zip(&page.regs[at..]) {
        *to = *from as u8;
    }
    u32::from_le_bytes(bytes)
}

fn put(page: &mut kvm_lapic_state, at: usize, value: u32) {
    for (to, from) in page.regs[at..].iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

/// The task priority.
pub fn tpr(page: &kvm_lapic_state) -> u32 {
    get(page, TPR)
}

/// The registers of a saved APIC at virtual time `now`.
pub fn from_saved(l: &Lapic, now: u64) -> kvm_lapic_state {
    let mut p = kvm_lapic_state::default();
    let x2 = l.base & BASE_X2 != 0;
    put(&mut p, ID, if x2 { l.id } else { l.id << 24 });
    put(&mut p, VERSION, 0x0005_0014);
    put(&mut p, TPR, l.tpr);
    // In x2APIC mode it derives from the id.
    put(&mut p, LDR, if x2 { (l.id >> 4) << 16 | 1 << (l.id & 15) } else { l.ldr });
    put(&mut p, DFR, l.dfr);
    put(&mut p, SVR, l.svr);
    for i in 0..8 {
        put(&mut p, ISR + 16 * i, l.isr[i]);
        put(&mut p, TMR + 16 * i, l.tmr[i]);
        put(&mut p, IRR + 16 * i, l.irr[i]);
    }
    put(&mut p, ESR, l.esr);
    put(&mut p, ICR, l.icr as u32);
    put(&mut p, ICR2, (l.icr >> 32) as u32);
    for (i, lvt) in l.lvt.iter().enumerate() {
        put(&mut p, LVT + 16 * i, *lvt);
    }
    put(&mut p, DIVIDE, l.divide);
    set_timer(&mut p, l, now);
    p
}

/// Set the counts of the page so that the timer fires when the saved APIC's would.
pub fn set_timer(p: &mut kvm_lapic_state, l: &Lapic, now: u64) {
    let (initial, left) = match l.deadline {
        Some(at) if l.mode() != 2 => {
            let counts = at.saturating_sub(now).div_ceil(l.divisor()).clamp(1, u64::from(l.initial.max(1)));
            (l.initial, counts as u32)
        }
        // KVM would fire a timer with an initial count and nothing left again.
        _ => (0, 0),
    };
    put(p, INITIAL, initial);
    put(p, CURRENT, left);
}

/// What KVM's APIC is at virtual time `now`. The deadline of TSC-deadline mode is the caller's to set.
pub fn to_saved(p: &kvm_lapic_state, base: u64, now: u64, l: &mut Lapic) {
    let was = l.clone();
    l.base = base;
    let x2 = base & BASE_X2 != 0;
    l.tpr = get(p, TPR);
    if !x2 {
        l.ldr = get(p, LDR);
    }
    l.dfr = get(p, DFR);
    l.svr = get(p, SVR);
    for i in 0..8 {
        l.isr[i] = get(p, ISR + 16 * i);
        l.tmr[i] = get(p, TMR + 16 * i);
        l.irr[i] = get(p, IRR + 16 * i);
    }
    l.esr = get(p, ESR);
    l.icr = u64::from(get(p, ICR)) | u64::from(get(p, ICR2)) << 32;
    for (i, lvt) in l.lvt.iter_mut().enumerate() {
        *lvt = get(p, LVT + 16 * i);
    }
    l.divide = get(p, DIVIDE);
    take_timer(p, &was, now, l);
}

fn take_timer(p: &kvm_lapic_state, was: &Lapic, now: u64, l: &mut Lapic) {
    let (initial, left) = (get(p, INITIAL), get(p, CURRENT));
    if l.mode() == 2 {
        (l.initial, l.deadline) = (0, None);
        return;
    }
    l.tsc_deadline = 0;
    if initial == 0 {
        // It is at rest. If it was so before, the count that ran out is still to be read.
        if was.deadline.is_some() {
            l.initial = 0;
        }
        l.deadline = None;
        return;
    }
    l.initial = initial;
    if left == 0 && l.mode() == 0 {
        l.deadline = None;
        return;
    }
    l.deadline = Some(now.saturating_add(u64::from(left) * l.divisor()));
    l.started = l.deadline.unwrap_or(now).saturating_sub(u64::from(initial) * l.divisor());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_timer_keeps_its_deadline() {
        let mut l = Lapic::new(0);
        l.initial = 1000;
        l.divide = 0; // by 2
        l.started = 5_000;
        l.deadline = Some(7_000);
        let page = from_saved(&l, 6_000);
        let mut back = Lapic::new(0);
        to_saved(&page, l.base, 6_000, &mut back);
        assert_eq!(back, l);
        // Time went on without it: it is overdue, and fires at once.
        let page = from_saved(&l, 9_000);
        to_saved(&page, l.base, 9_000, &mut back);
        assert_eq!(back.deadline, Some(9_002));
    }

    #[test]
    fn a_timer_that_ran_out_does_not_fire_again() {
        let mut l = Lapic::new(3);
        l.initial = 77;
        let page = from_saved(&l, 10);
        assert_eq!((get(&page, INITIAL), get(&page, CURRENT)), (0, 0));
        let mut back = l.clone();
        to_saved(&page, l.base, 10, &mut back);
        assert_eq!(back, l);
    }
}
