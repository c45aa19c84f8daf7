//! The conversion of states, over random ones.

use super::raw::{Moment, Raw};
use super::*;
use crate::tcg::lapic::Lapic;

/// A generator of test values (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
    fn flag(&mut self) -> bool {
        self.next() & 1 != 0
    }
    /// Mostly few bits, so that fields are told apart.
    fn value(&mut self) -> u64 {
        let shift = self.next() & 63;
        self.next() >> shift
    }
}

/// A state as the software processor could be in, with everything in it arbitrary that may be.
fn arbitrary(rng: &mut Rng, now: u64) -> Saved {
    let mut s = SoftCpu::new((rng.next() & 7) as u32, 8, &model()).saved();
    s.gpr = std::array::from_fn(|_| rng.value());
    s.rip = rng.value();
    s.rflags = rng.value() & 0x24_4FD5 | 2;
    let mut seg = |null: bool| match null {
        true => (rng.next() as u16, rng.value(), rng.next() as u32, 0),
        false => (rng.next() as u16, rng.value(), rng.next() as u32, rng.next() as u16 & 0xF0FF | 0x80),
    };
    s.segs = std::array::from_fn(|i| seg(i > 3));
    s.ldtr = seg(true);
    s.tr = seg(false);
    (s.gdt, s.idt) = ((rng.value(), rng.next() as u16), (rng.value(), rng.next() as u16));
    s.cr = [rng.value(), rng.value(), rng.value(), rng.value()];
    s.efer = rng.value();
    s.cpl = match (s.cr[0] & 1 != 0, s.rflags & 1 << 17 != 0) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => (s.segs[2].3 >> 5 & 3) as u8,
    };
    let pae = s.cr[0] >> 31 & 1 != 0 && s.cr[3] & 0x20 != 0 && s.efer & 0x400 == 0;
    s.pdpte = std::array::from_fn(|_| if pae { rng.value() } else { 0 });
    s.dr = [rng.value(), rng.value(), rng.value(), rng.value(), 0, 0, rng.value(), rng.value()];
    s.xcr0 = rng.next() & 7;
    s.top = (rng.next() & 7) as u8;
    s.tag = rng.next() as u8;
    s.fpu = [rng.next() as u16, rng.next() as u16 & !0x3800, rng.next() as u16 & 0x7FF, 7, 9];
    (s.fip, s.fdp) = (rng.value(), rng.value());
    for st in &mut s.st {
        st[..10].fill_with(|| rng.next() as u8);
    }
    for ymm in &mut s.ymm {
        ymm.fill_with(|| rng.next() as u8);
    }
    s.mxcsr = rng.next() as u32 & 0xFFFF;
    let m = &mut s.msr;
    for field in [&mut m.star, &mut m.lstar, &mut m.cstar, &mut m.sfmask, &mut m.kernel_gs_base, &mut m.pat] {
        *field = rng.value();
    }
    for field in
        [&mut m.sysenter_cs, &mut m.sysenter_esp, &mut m.sysenter_eip, &mut m.tsc_aux, &mut m.tsc_adjust]
    {
        *field = rng.value();
    }
    m.mtrr_fixed = std::array::from_fn(|_| rng.value());
    m.mtrr_var = std::array::from_fn(|_| rng.value());
    m.mc.iter_mut().for_each(|v| *v = rng.value());
    apic(rng, &mut s.lapic, now);
    s.halted = rng.flag();
    s.wait_sipi = rng.flag() && !s.halted;
    s.shadow = rng.flag();
    (s.nmi_pending, s.nmi_blocked) = (rng.flag(), rng.flag());
    s.extint_vector = rng.flag().then(|| rng.next() as u8);
    match rng.next() & 3 {
        0 => s.pending_db = 1 << (rng.next() & 3),
        1 => s.extra.exception = Some((13, Some(rng.next() as u32 & 0xFFFF), 0)),
        2 => s.extra.exception = Some((14, Some(2), s.cr[1])),
        _ => {}
    }
    s.shutdown = rng.flag();
    s.extra.kvm_clock = [rng.value(), rng.value()];
    s
}

fn apic(rng: &mut Rng, l: &mut Lapic, now: u64) {
    l.base |= if rng.flag() { 0x400 } else { 0 };
    l.tpr = rng.next() as u32 & 0xFF;
    l.ldr = rng.next() as u32 & 0xFF00_0000;
    l.svr = rng.next() as u32 & 0x1FF;
    for i in 0..8 {
        (l.isr[i], l.tmr[i], l.irr[i]) = (rng.next() as u32, rng.next() as u32, rng.next() as u32);
    }
    l.icr = rng.next() & !0x1000;
    l.lvt = std::array::from_fn(|_| rng.next() as u32 & 0x1_A7FF);
    l.divide = rng.next() as u32 & 0xB;
    if rng.flag() {
        l.lvt[0] = 0x2_0040;
        l.initial = rng.next() as u32 | 1;
        let left = 1 + rng.next() % u64::from(l.initial);
        l.deadline = Some(now + left * l.divisor());
        l.started = (now + left * l.divisor()).saturating_sub(u64::from(l.initial) * l.divisor());
    }
}

#[test]
fn no_state_changes_by_going_through_kvms_form() {
    let mut rng = Rng(7);
    for case in 0..5_000 {
        let now = 1 << 50 | rng.next() >> 20;
        let at = Moment { now, tsc_khz: 1_000_000 };
        let state = arbitrary(&mut rng, now);
        let raw = Raw::from_saved(&state, at);
        let back = raw.to_saved(&state, at);
        let (a, b) = (format!("{state:#x?}"), format!("{back:#x?}"));
        let lines: Vec<_> = a.lines().zip(b.lines()).filter(|(a, b)| a != b).collect();
        assert!(lines.is_empty(), "case {case}: {lines:?}");
        // What KVM says for itself: over a fresh processor's state, but for what it has no place for.
        let mut over = SoftCpu::new(state.lapic.id, 8, &model()).saved();
        (over.fip, over.fdp, over.fpu) = (state.fip, state.fdp, state.fpu);
        (over.msr.smbase, over.deliveries, over.delivery_at) = (0, 0, 0);
        over.lapic.ldr = state.lapic.ldr;
        over.pdpte = state.pdpte;
        (over.lapic.started, over.lapic.initial) = (state.lapic.started, state.lapic.initial);
        assert_eq!(raw.to_saved(&over, at), state, "case {case}");
    }
}

#[test]
fn an_older_versions_state_is_read() {
    let saved = SoftCpu::new(0, 1, &model()).saved();
    let mut bytes = saved.to_bytes();
    // No exception, the TSC's rate, two MSRs that are zero, no KVM, no more registers.
    bytes.truncate(bytes.len() - (1 + 3 + 2 + 1 + 1));
    bytes[0] = 1;
    let back = Saved::from_bytes(&bytes, 0, model().signature()).unwrap();
    assert_eq!(back, saved);
    bytes[0] = 3;
    assert!(Saved::from_bytes(&bytes, 0, model().signature()).is_err());
}
