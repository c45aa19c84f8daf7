//! A processor's state as KVM has it, and its conversion from and to the form that both kinds of processors save.
//!
//! The conversion is a pair of functions of values. What KVM has no place for (machine-check banks of a host without
//! them, x87 selectors) is taken from the state that was loaded last, so a round trip changes nothing.

use kvm_bindings::*;

use super::lapic;
use super::xsave;
use crate::tcg::save::{Saved, Seg};

/// Flags of `kvm_vcpu_events`.
const EVENTS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
const FLAG_IF: u64 = 1 << 9;
const FLAG_VM: u64 = 1 << 17;
const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;

/// The MSRs that are plain storage on both sides.
pub const IA32_TSC: u32 = 0x10;
pub const IA32_TSC_DEADLINE: u32 = 0x6E0;
pub const IA32_TSC_ADJUST: u32 = 0x3B;
pub const KVM_SYSTEM_TIME: u32 = 0x4B56_4D01;
pub const KVM_WALL_CLOCK: u32 = 0x4B56_4D00;

/// Everything but guest memory, the TSC and what is due when.
#[derive(Clone)]
pub struct Raw {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs2,
    pub debug: kvm_debugregs,
    /// The first 4096 bytes of the XSAVE area in its standard form.
    pub xsave: Box<[u8; 4096]>,
    pub xcr0: u64,
    pub events: kvm_vcpu_events,
    pub mp_state: u32,
    pub lapic: kvm_lapic_state,
    pub msrs: Vec<(u32, u64)>,
}

/// Time, as far as the conversion depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Virtual time in ns.
    pub now: u64,
    /// What the TSC gains in a millisecond.
    pub tsc_khz: u32,
}

fn segment(s: Seg) -> kvm_segment {
    let (selector, base, limit, attr) = s;
    let bit = |n: u32| (attr >> n & 1) as u8;
    kvm_segment {
        base,
        limit,
        selector,
        type_: (attr & 15) as u8,
        present: bit(7),
        dpl: (attr >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: bit(7) ^ 1,
        padding: 0,
    }
}

fn unsegment(s: &kvm_segment, stack: bool) -> Seg {
    let set = |value: u8, n: u32| u16::from(value & 1) << n;
    let attr = if s.unusable != 0 || s.present == 0 {
        // A stack segment without a descriptor still has a privilege level.
        if stack {
            u16::from(s.dpl & 3) << 5
        } else {
            0
        }
    } else {
        u16::from(s.type_ & 15)
            | set(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | 1 << 7
            | set(s.avl, 12)
            | set(s.l, 13)
            | set(s.db, 14)
            | set(s.g, 15)
    };
    (s.selector, s.base, s.limit, attr)
}

/// The MSRs of a state, by number.
fn msrs(s: &Saved) -> Vec<(u32, u64)> {
    let m = &s.msr;
    let mut list = vec![
        (0x174, m.sysenter_cs),
        (0x175, m.sysenter_esp),
        (0x176, m.sysenter_eip),
        (0xC000_0081, m.star),
        (0xC000_0082, m.lstar),
        (0xC000_0083, m.cstar),
        (0xC000_0084, m.sfmask),
        (0xC000_0102, m.kernel_gs_base),
        (0xC000_0103, m.tsc_aux),
        (0x277, m.pat),
        (0x2FF, m.mtrr_def),
        (0x1A0, m.misc_enable),
        (0x3A, m.feature_control),
        (0x48, m.spec_ctrl),
        (0x1D9, m.debug_ctl),
        (0xDA0, m.xss),
        (0x8B, m.bios_sign),
        (0x17A, m.mcg_status),
        (0x17B, m.mcg_ctl),
        (IA32_TSC_ADJUST, m.tsc_adjust),
        (KVM_WALL_CLOCK, s.extra.kvm_clock[1]),
        (KVM_SYSTEM_TIME, s.extra.kvm_clock[0]),
    ];
    let fixed = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F];
    list.extend(fixed.into_iter().zip(m.mtrr_fixed));
    list.extend((0x200..).zip(m.mtrr_var));
    list.extend((0x400..).zip(m.mc.iter().copied()));
    list
}

fn set_msr(s: &mut Saved, number: u32, value: u64) {
    let m = &mut s.msr;
    match number {
        0x174 => m.sysenter_cs = value,
        0x175 => m.sysenter_esp = value,
        0x176 => m.sysenter_eip = value,
        0xC000_0081 => m.star = value,
        0xC000_0082 => m.lstar = value,
        0xC000_0083 => m.cstar = value,
        0xC000_0084 => m.sfmask = value,
        0xC000_0102 => m.kernel_gs_base = value,
        0xC000_0103 => m.tsc_aux = value,
        0x277 => m.pat = value,
        0x2FF => m.mtrr_def = value,
        0x1A0 => m.misc_enable = value,
        0x3A => m.feature_control = value,
        0x48 => m.spec_ctrl = value,
        0x1D9 => m.debug_ctl = value,
        0xDA0 => m.xss = value,
        0x8B => m.bios_sign = value,
        0x17A => m.mcg_status = value,
        0x17B => m.mcg_ctl = value,
        IA32_TSC_ADJUST => m.tsc_adjust = value,
        KVM_SYSTEM_TIME => s.extra.kvm_clock[0] = value,
        KVM_WALL_CLOCK => s.extra.kvm_clock[1] = value,
        0x250 => m.mtrr_fixed[0] = value,
        0x258 | 0x259 => m.mtrr_fixed[number as usize - 0x257] = value,
        0x268..=0x26F => m.mtrr_fixed[number as usize - 0x265] = value,
        0x200..=0x20F => m.mtrr_var[number as usize - 0x200] = value,
        _ => {
            if let Some(slot) = m.mc.get_mut((number as usize).wrapping_sub(0x400)) {
                *slot = value;
            }
        }
    }
}

/// The numbers of all MSRs of the saved form.
pub fn msr_numbers(s: &Saved) -> Vec<u32> {
    msrs(s).into_iter().map(|(number, _)| number).collect()
}

impl Raw {
    /// The state `s` as KVM wants it.
    pub fn from_saved(s: &Saved, at: Moment) -> Raw {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
        let regs = kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: s.rip,
            rflags: s.rflags | 2,
        };
        let [es, cs, ss, ds, fs, gs] = s.segs.map(segment);
        let table = |(base, limit): (u64, u16)| kvm_dtable { base, limit, padding: [0; 3] };
        let [cr0, cr2, cr3, cr4] = s.cr;
        let mut sregs = kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: segment(s.tr),
            ldt: segment(s.ldtr),
            gdt: table(s.gdt),
            idt: table(s.idt),
            cr0,
            cr2,
            cr3,
            cr4,
            cr8: s.lapic.cr8(),
            efer: s.efer,
            apic_base: s.lapic.base,
            flags: 0,
            pdptrs: [0; 4],
        };
        if cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && s.efer & EFER_LMA == 0 {
            sregs.flags = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
            sregs.pdptrs = s.pdpte;
        }
        let debug = kvm_debugregs {
            db: [s.dr[0], s.dr[1], s.dr[2], s.dr[3]],
            dr6: s.dr[6],
            dr7: s.dr[7],
            flags: 0,
            reserved: [0; 9],
        };
        let mp_state = match (s.wait_sipi, s.halted) {
            (true, _) => KVM_MP_STATE_INIT_RECEIVED,
            (_, true) => KVM_MP_STATE_HALTED,
            _ => KVM_MP_STATE_RUNNABLE,
        };
        let mut raw = Raw {
            regs,
            sregs,
            debug,
            xsave: xsave::from_saved(s),
            xcr0: s.xcr0,
            events: events(s),
            mp_state,
            lapic: lapic::from_saved(&s.lapic, at.now),
            msrs: msrs(s),
        };
        if let Some((14, _, cr2)) = s.extra.exception {
            raw.sregs.cr2 = cr2;
        }
        raw
    }

    /// What KVM has, as the saved form; `base` says what KVM does not know.
    pub fn to_saved(&self, base: &Saved, at: Moment) -> Saved {
        let mut s = base.clone();
        let r = &self.regs;
        s.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
            r.r14, r.r15,
        ];
        s.rip = r.rip;
        s.rflags = r.rflags;
        let q = &self.sregs;
        let seg = |s| unsegment(s, false);
        s.segs = [seg(&q.es), seg(&q.cs), unsegment(&q.ss, true), seg(&q.ds), seg(&q.fs), seg(&q.gs)];
        s.ldtr = seg(&q.ldt);
        s.tr = seg(&q.tr);
        s.gdt = (q.gdt.base, q.gdt.limit);
        s.idt = (q.idt.base, q.idt.limit);
        s.cr = [q.cr0, q.cr2, q.cr3, q.cr4];
        s.efer = q.efer;
        s.cpl = match (q.cr0 & CR0_PE != 0, r.rflags & FLAG_VM != 0) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => q.ss.dpl & 3,
        };
        if q.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
            s.pdpte = q.pdptrs;
        }
        for (to, from) in s.dr.iter_mut().zip(self.debug.db) {
            *to = from;
        }
        (s.dr[6], s.dr[7]) = (self.debug.dr6, self.debug.dr7);
        s.xcr0 = self.xcr0;
        xsave::to_saved(&self.xsave, &mut s);
        s.extra.xsave = (self.xcr0 & !7 != 0).then(|| self.xsave.to_vec());
        for (number, value) in &self.msrs {
            set_msr(&mut s, *number, *value);
        }
        s.extra.tsc_khz = at.tsc_khz;
        lapic::to_saved(&self.lapic, q.apic_base, at.now, &mut s.lapic);
        s.lapic.set_tpr(lapic::tpr(&self.lapic));
        s.halted = self.mp_state == KVM_MP_STATE_HALTED;
        s.wait_sipi = matches!(self.mp_state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED);
        take_events(&self.events, &mut s);
        s
    }
}

/// What waits to be delivered.
fn events(s: &Saved) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events { flags: EVENTS, ..Default::default() };
    if let Some((vector, error, _)) = s.extra.exception {
        e.exception.injected = 1;
        e.exception.nr = vector;
        e.exception.has_error_code = error.is_some().into();
        e.exception.error_code = error.unwrap_or(0);
    } else if s.pending_db != 0 {
        e.exception.pending = 1;
        e.exception.nr = 1;
        e.exception_has_payload = 1;
        e.exception_payload = s.pending_db;
        e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(vector) = s.extint_vector {
        e.interrupt.injected = 1;
        e.interrupt.nr = vector;
    }
    if s.shadow {
        // Processors know STI's shadow only while interrupts are on.
        e.interrupt.shadow = if s.rflags & FLAG_IF != 0 { SHADOW_STI } else { SHADOW_MOV_SS };
    }
    e.nmi.pending = s.nmi_pending.into();
    e.nmi.masked = s.nmi_blocked.into();
    if s.shutdown {
        e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        e.triple_fault.pending = 1;
    }
    e
}

/// See [`events`].
fn take_events(e: &kvm_vcpu_events, s: &mut Saved) {
    let x = &e.exception;
    s.pending_db = 0;
    s.extra.exception = None;
    // INT3 and INTO raise theirs again when they are executed again.
    if (x.injected != 0 || x.pending != 0) && !(x.injected != 0 && matches!(x.nr, 3 | 4)) {
        let payload = (e.exception_has_payload != 0).then_some(e.exception_payload);
        if x.nr == 1 && x.pending != 0 {
            s.pending_db = payload.unwrap_or(0) & 0xE00F;
        }
        if s.pending_db == 0 {
            if let (14, Some(address)) = (x.nr, payload) {
                s.cr[1] = address;
            }
            let error = (x.has_error_code != 0).then_some(x.error_code);
            s.extra.exception = Some((x.nr, error, if x.nr == 14 { s.cr[1] } else { 0 }));
        }
    }
    // INT n is executed again.
    s.extint_vector = (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(e.interrupt.nr);
    s.shadow = e.interrupt.shadow != 0;
    s.nmi_pending = e.nmi.pending != 0 || e.nmi.injected != 0;
    s.nmi_blocked = e.nmi.masked != 0 && e.nmi.injected == 0;
    s.shutdown = e.triple_fault.pending != 0;
}
