//! The local APIC: xAPIC registers, x2APIC MSRs, the timer in virtual nanoseconds (SDM vol. 3, chapter 11).
//! The timer's bus clock is 1 GHz, so one count at divider 1 is one nanosecond.

use super::SoftCpu;
use crate::bus::Ipi;
use crate::ApicMessage;
use serde::{Deserialize, Serialize};

pub const BASE_ENABLE: u64 = 0x800;
pub const BASE_X2: u64 = 0x400;
pub const BASE_BSP: u64 = 0x100;

const TIMER: usize = 0;
pub const LINT0: usize = 3;
pub const MASKED: u32 = 1 << 16;

/// Registers of one local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lapic {
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    pub tpr: u32,
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: [u32; 8],
    pub tmr: [u32; 8],
    pub irr: [u32; 8],
    pub esr: u32,
    pub icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    pub divide: u32,
    pub initial: u32,
    /// When the count was written (or the last period began).
    pub started: u64,
    /// Virtual time at which the timer fires.
    pub deadline: Option<u64>,
    pub tsc_deadline: u64,
}

/// What a register write asks of the processor around the APIC.
pub enum Effect {
    None,
    /// A timer was set: the machine must look at `next_deadline`.
    Deadline,
    Eoi(u8),
    Send(Ipi),
}

impl Lapic {
    pub fn new(id: u32) -> Self {
        let mut l = Lapic {
            id,
            base: 0,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            icr: 0,
            lvt: [0; 6],
            divide: 0,
            initial: 0,
            started: 0,
            deadline: None,
            tsc_deadline: 0,
        };
        l.reset(false);
        l
    }

    /// Power-on reset, or INIT, which keeps the base register and the id.
    pub fn reset(&mut self, init: bool) {
        let base = if init {
            self.base
        } else {
            0xFEE0_0000 | BASE_ENABLE | if self.id == 0 { BASE_BSP } else { 0 }
        };
        let id = self.id;
        *self = Lapic {
            id,
            base,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xFF,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            icr: 0,
            lvt: [MASKED; 6],
            divide: 0,
            initial: 0,
            started: 0,
            deadline: None,
            tsc_deadline: 0,
        };
        if id == 0 {
            // As firmware would set it: the 8259's interrupts reach the boot processor.
            self.lvt[LINT0] = 0x700;
        }
    }

    pub fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }
    pub fn x2apic(&self) -> bool {
        self.base & BASE_X2 != 0
    }
    /// Whether the xAPIC registers lie in the page of `phys`.
    #[inline]
    pub fn covers(&self, phys: u64) -> bool {
        (phys ^ self.base) & 0x000F_FFFF_FFFF_F000 == 0 && self.enabled() && !self.x2apic()
    }
    fn soft_enabled(&self) -> bool {
        self.enabled() && self.svr & 0x100 != 0
    }
    pub fn cr8(&self) -> u64 {
        (self.tpr >> 4) as u64
    }
    pub fn set_tpr(&mut self, v: u32) {
        self.tpr = v & 0xFF;
    }
    /// Whether the 8259's INTR reaches the processor.
    pub fn accepts_extint(&self) -> bool {
        !self.enabled() || self.lvt[LINT0] & (MASKED | 0x700) == 0x700
    }

    fn highest(v: &[u32; 8]) -> Option<u8> {
        (0..8).rev().find(|&i| v[i] != 0).map(|i| (i as u32 * 32 + 31 - v[i].leading_zeros()) as u8)
    }
    fn ppr(&self) -> u32 {
        let isr = Self::highest(&self.isr).unwrap_or(0) as u32;
        if self.tpr & 0xF0 >= isr & 0xF0 {
            self.tpr
        } else {
            isr & 0xF0
        }
    }
    /// The vector that would be delivered now.
    pub fn pending(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        let v = Self::highest(&self.irr)?;
        (v as u32 & 0xF0 > self.ppr() & 0xF0).then_some(v)
    }
    /// The processor takes `v`.
    pub fn accept(&mut self, v: u8) {
        let (i, b) = ((v >> 5) as usize, 1 << (v & 31));
        self.irr[i] &= !b;
        self.isr[i] |= b;
    }
    /// An interrupt arrives.
    pub fn raise(&mut self, v: u8, level: bool) {
        if !self.soft_enabled() {
            return;
        }
        if v < 16 {
            self.esr |= 0x40;
            return;
        }
        let (i, b) = ((v >> 5) as usize, 1 << (v & 31));
        self.irr[i] |= b;
        if level {
            self.tmr[i] |= b;
        } else {
            self.tmr[i] &= !b;
        }
    }

    fn logical(&self, dest: u32) -> bool {
        if self.x2apic() {
            let ldr = self.x2_ldr();
            return dest >> 16 == ldr >> 16 && dest & ldr & 0xFFFF != 0;
        }
        let mda = dest & 0xFF;
        let ldr = self.ldr >> 24;
        if self.dfr >> 28 == 0xF {
            mda & ldr != 0
        } else {
            mda >> 4 == ldr >> 4 && mda & ldr & 15 != 0
        }
    }
    fn x2_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }
    /// Whether a destination field names this APIC.
    pub fn matches(&self, dest: u32, logical: bool, x2: bool) -> bool {
        let all = if x2 { u32::MAX } else { 0xFF };
        if logical {
            // An 8-bit logical broadcast reaches x2APICs too.
            return dest == all || self.logical(dest);
        }
        dest == all || dest == self.id
    }

    // ---- timer

    pub fn divisor(&self) -> u64 {
        let v = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((v + 1) & 7)
    }
    pub fn mode(&self) -> u32 {
        self.lvt[TIMER] >> 17 & 3
    }
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadline
    }
    fn arm(&mut self, now: u64) {
        self.started = now;
        self.deadline = (self.initial != 0).then(|| now.saturating_add(self.initial as u64 * self.divisor()));
    }
    /// Virtual time is `now`.
    pub fn advance(&mut self, now: u64) {
        let Some(d) = self.deadline else { return };
        if d > now {
            return;
        }
        let lvt = self.lvt[TIMER];
        if lvt & MASKED == 0 {
            self.raise(lvt as u8, false);
        }
        match self.mode() {
            1 => {
                let period = (self.initial as u64 * self.divisor()).max(1);
                let passed = (now - d) / period;
                self.started = d + passed * period;
                self.deadline = Some(self.started + period);
            }
            2 => {
                self.deadline = None;
                self.tsc_deadline = 0;
            }
            _ => self.deadline = None,
        }
    }
    fn current(&self, now: u64) -> u32 {
        if self.mode() == 2 {
            return 0;
        }
        match self.deadline {
            Some(d) => (d.saturating_sub(now) / self.divisor()) as u32,
            None => 0,
        }
    }
    pub fn read_tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }
    /// Write IA32_TSC_DEADLINE; `adjust` is the TSC at virtual time 0, which gains `khz` in a millisecond.
    pub fn write_tsc_deadline(&mut self, v: u64, adjust: u64, khz: u32) {
        if self.mode() != 2 {
            return;
        }
        self.tsc_deadline = v;
        self.deadline = (v != 0).then(|| tsc_to_ns(v, adjust, khz));
    }

    // ---- registers

    /// Read register number `n` (offset / 16).
    pub fn read(&self, n: u32, now: u64) -> u32 {
        match n {
            0x02 => {
                if self.x2apic() {
                    self.id
                } else {
                    self.id << 24
                }
            }
            0x03 => 0x0105_0014,
            0x08 => self.tpr,
            0x09 => 0,
            0x0A => self.ppr(),
            0x0D => {
                if self.x2apic() {
                    self.x2_ldr()
                } else {
                    self.ldr
                }
            }
            0x0E => self.dfr,
            0x0F => self.svr,
            0x10..=0x17 => self.isr[n as usize & 7],
            0x18..=0x1F => self.tmr[n as usize & 7],
            0x20..=0x27 => self.irr[n as usize & 7],
            0x28 => self.esr,
            0x30 => self.icr as u32,
            0x31 => (self.icr >> 32) as u32,
            0x32..=0x37 => self.lvt[n as usize - 0x32],
            0x38 => self.initial,
            0x39 => self.current(now),
            0x3E => self.divide,
            _ => 0,
        }
    }

    /// Write register number `n`.
    pub fn write(&mut self, n: u32, v: u32, now: u64) -> Effect {
        match n {
            0x08 => self.tpr = v & 0xFF,
            0x0B => {
                if let Some(vec) = Self::highest(&self.isr) {
                    let (i, b) = ((vec >> 5) as usize, 1 << (vec & 31));
                    self.isr[i] &= !b;
                    if self.tmr[i] & b != 0 && self.svr & 0x1000 == 0 {
                        return Effect::Eoi(vec);
                    }
                }
            }
            0x0D if !self.x2apic() => self.ldr = v & 0xFF00_0000,
            0x0E if !self.x2apic() => self.dfr = v | 0x0FFF_FFFF,
            0x0F => self.svr = v & 0x13FF,
            0x28 => self.esr = 0,
            0x30 => {
                self.icr = self.icr & !0xFFFF_FFFF | (v & !0x1000) as u64;
                return self.send();
            }
            0x31 => self.icr = self.icr & 0xFFFF_FFFF | (v as u64) << 32,
            0x32 => {
                let old = self.mode();
                self.lvt[TIMER] = v & 0x710FF;
                if old != self.mode() && (old == 2 || self.mode() == 2) {
                    self.deadline = None;
                    self.tsc_deadline = 0;
                    self.initial = 0;
                }
                return Effect::Deadline;
            }
            0x33..=0x37 => self.lvt[n as usize - 0x32] = v & 0x1A7FF,
            0x38 if self.mode() != 2 => {
                self.initial = v;
                self.arm(now);
                return Effect::Deadline;
            }
            0x3E => {
                // The count goes on from where it is at the new rate.
                let left = self.current(now);
                self.divide = v & 0xB;
                if self.deadline.is_some() && self.mode() != 2 {
                    self.deadline = Some(now + left as u64 * self.divisor());
                    return Effect::Deadline;
                }
            }
            _ => {}
        }
        Effect::None
    }

    /// Write the whole ICR (x2APIC).
    pub fn write_icr(&mut self, v: u64) -> Effect {
        self.icr = v & !0x1000;
        self.send()
    }

    fn send(&mut self) -> Effect {
        let icr = self.icr as u32;
        let x2apic = self.x2apic();
        let destination = if x2apic { (self.icr >> 32) as u32 } else { (self.icr >> 56) as u32 };
        if icr >> 18 & 3 == 1 {
            // Self: fixed only.
            self.raise(icr as u8, false);
            return Effect::None;
        }
        Effect::Send(Ipi { source: self.id, icr, destination, x2apic })
    }
}

/// The virtual time at which the TSC shows `v`; see [`Lapic::write_tsc_deadline`].
pub(crate) fn tsc_to_ns(v: u64, adjust: u64, khz: u32) -> u64 {
    // What is before the epoch of virtual time is past.
    if v < adjust && adjust < 1 << 63 {
        return 0;
    }
    let ticks = v.wrapping_sub(adjust);
    match khz {
        super::TSC_KHZ => ticks,
        khz => (u128::from(ticks) * 1_000_000).div_ceil(u128::from(khz)).min(u128::from(u64::MAX)) as u64,
    }
}

impl SoftCpu {
    fn now(&mut self) -> u64 {
        let position = self.position();
        self.bus().clock_ns(position)
    }

    fn lapic_effect(&mut self, e: Effect) {
        self.attend();
        match e {
            Effect::None => {}
            Effect::Deadline => self.brk = true,
            Effect::Eoi(v) => {
                let position = self.position();
                self.bus().eoi(position, v);
                self.after_bus();
            }
            Effect::Send(ipi) => {
                self.bus().send_ipi(ipi);
                self.after_bus();
            }
        }
    }

    pub(super) fn lapic_mmio_read(&mut self, phys: u64, size: u8) -> u64 {
        let off = (phys & 0xFFF) as u32;
        let now = self.now();
        let v = if off & 15 < 4 { self.lapic.read(off >> 4, now) as u64 } else { 0 };
        (v >> (8 * (off & 3))) & (u64::MAX >> (64 - 8 * size.min(8) as u32))
    }

    pub(super) fn lapic_mmio_write(&mut self, phys: u64, size: u8, v: u64) {
        let off = (phys & 0xFFF) as u32;
        if off & 15 != 0 || size < 4 {
            return;
        }
        let now = self.now();
        let e = self.lapic.write(off >> 4, v as u32, now);
        self.lapic_effect(e);
    }

    /// RDMSR of an x2APIC register; `None`: no such register.
    pub(super) fn x2apic_read(&mut self, msr: u32) -> Option<u64> {
        let n = msr & 0x3FF;
        if !self.lapic.x2apic() || matches!(n, 0x0B | 0x0E | 0x31 | 0x3F) || n > 0x3F {
            return None;
        }
        let now = self.now();
        let lo = self.lapic.read(n, now) as u64;
        Some(if n == 0x30 { lo | (self.lapic.read(0x31, now) as u64) << 32 } else { lo })
    }

    /// WRMSR of an x2APIC register; false: #GP.
    pub(super) fn x2apic_write(&mut self, msr: u32, v: u64) -> bool {
        let n = msr & 0x3FF;
        if !self.lapic.x2apic() {
            return false;
        }
        if n == 0x30 {
            let e = self.lapic.write_icr(v);
            self.lapic_effect(e);
            return true;
        }
        if v >> 32 != 0 {
            return false;
        }
        if n == 0x3F {
            self.lapic.raise(v as u8, false);
            self.attend();
            return true;
        }
        if !matches!(n, 0x08 | 0x0B | 0x0F | 0x28 | 0x32..=0x38 | 0x3E) {
            return false;
        }
        let now = self.now();
        let e = self.lapic.write(n, v as u32, now);
        self.lapic_effect(e);
        true
    }

    /// Deliver by ICR delivery mode; the destination is this processor.
    fn deliver_mode(&mut self, mode: u32, vector: u8, level: bool) {
        match mode {
            0 | 1 => self.lapic.raise(vector, level),
            4 => self.nmi_pending = true,
            5 => super::Processor::reset(self, true),
            6 if self.wait_sipi => {
                self.wait_sipi = false;
                self.halted = false;
                self.set_cs_real((vector as u16) << 8);
                self.rip = 0;
            }
            7 => self.extint = 0x100 | u16::from(vector),
            _ => {}
        }
        self.attention = true;
    }

    pub(super) fn take_ipi(&mut self, ipi: Ipi) -> bool {
        let mine = match ipi.icr >> 18 & 3 {
            0 => self.lapic.matches(ipi.destination, ipi.icr & 0x800 != 0, ipi.x2apic),
            1 => ipi.source == self.lapic.id,
            2 => true,
            _ => ipi.source != self.lapic.id,
        };
        if !mine || !self.lapic.enabled() {
            return false;
        }
        let mode = ipi.icr >> 8 & 7;
        // INIT de-assert does nothing.
        if mode == 5 && ipi.icr & 0xC000 == 0x8000 {
            return true;
        }
        self.deliver_mode(mode, ipi.icr as u8, false);
        true
    }

    pub(super) fn take_message(&mut self, m: ApicMessage) -> bool {
        let dest = (m.address >> 12 & 0xFF) as u32 | (m.address >> 32) as u32 & 0xFFFF_FF00;
        if !self.lapic.enabled() || !self.lapic.matches(dest, m.address & 4 != 0, false) {
            return false;
        }
        let mode = m.data >> 8 & 7;
        if mode < 2 && !self.lapic.soft_enabled() {
            return false;
        }
        self.deliver_mode(mode, m.data as u8, m.data & 0x8000 != 0);
        true
    }
}
