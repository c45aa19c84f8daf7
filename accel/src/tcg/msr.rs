//! Model-specific registers.

use super::access::canonical;
use super::lapic::{BASE_BSP, BASE_ENABLE, BASE_X2};
use super::op::*;
use super::paging::*;
use super::SoftCpu;
use serde::{Deserialize, Serialize};

/// MSRs that are plain storage here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    /// TSC minus virtual time.
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub feature_control: u64,
    pub mtrr_def: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [u64; 16],
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    /// CTL, STATUS, ADDR, MISC of ten banks.
    pub mc: Vec<u64>,
    pub spec_ctrl: u64,
    pub debug_ctl: u64,
    pub xss: u64,
    pub bios_sign: u64,
    pub smbase: u64,
}

/// kvmclock's MSRs, present and former.
const KVM_SYSTEM_TIME: u32 = 0x4B56_4D01;
const KVM_WALL_CLOCK: u32 = 0x4B56_4D00;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const KVM_WALL_CLOCK_OLD: u32 = 0x11;

/// Machine-check banks.
pub(crate) const BANKS: u32 = 10;

impl Msrs {
    pub(crate) fn reset() -> Self {
        Msrs {
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            mc: vec![0; BANKS as usize * 4],
            mcg_ctl: u64::MAX,
            ..Default::default()
        }
    }
}

fn fixed_index(n: u32) -> Option<usize> {
    match n {
        0x250 => Some(0),
        0x258 | 0x259 => Some(n as usize - 0x257),
        0x268..=0x26F => Some(n as usize - 0x265),
        _ => None,
    }
}

impl SoftCpu {
    pub(crate) fn read_msr(&mut self, n: u32) -> R<u64> {
        let m = &self.msr;
        Ok(match n {
            0x10 => self.tsc(),
            0x1B => self.lapic.base,
            0x3A => m.feature_control,
            0x3B => m.tsc_adjust,
            0x48 => m.spec_ctrl,
            0x8B => m.bios_sign,
            0x174 => m.sysenter_cs,
            0x175 => m.sysenter_esp,
            0x176 => m.sysenter_eip,
            0x17A => m.mcg_status,
            0x17B => m.mcg_ctl,
            0x1A0 => m.misc_enable,
            0x1D9 => m.debug_ctl,
            0x200..=0x20F => m.mtrr_var[n as usize - 0x200],
            0x277 => m.pat,
            0x2FF => m.mtrr_def,
            0x400..=0x47F if n - 0x400 < BANKS * 4 => m.mc[n as usize - 0x400],
            0x6E0 => self.lapic.read_tsc_deadline(),
            0x800..=0x8FF => match self.x2apic_read(n) {
                Some(v) => v,
                None => return self.gp(0),
            },
            0xDA0 => m.xss,
            0xC000_0080 => self.efer,
            0xC000_0081 => m.star,
            0xC000_0082 => m.lstar,
            0xC000_0083 => m.cstar,
            0xC000_0084 => m.sfmask,
            0xC000_0100 => self.segs[FS].base,
            0xC000_0101 => self.segs[GS].base,
            0xC000_0102 => m.kernel_gs_base,
            0xC000_0103 => m.tsc_aux,
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD if self.found_kvm => self.kvm_clock[0],
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD if self.found_kvm => self.kvm_clock[1],
            _ => match (fixed_index(n), constant(n)) {
                (Some(i), _) => m.mtrr_fixed[i],
                (None, Some(value)) => value,
                (None, None) => {
                    log::debug!("RDMSR {n:#x}: unknown");
                    return self.gp(0);
                }
            },
        })
    }

    pub(crate) fn write_msr(&mut self, n: u32, v: u64) -> R<()> {
        match n {
            0x10 => {
                let now = self.tsc().wrapping_sub(self.msr.tsc_adjust);
                self.msr.tsc_adjust = v.wrapping_sub(now);
            }
            0x1B => return self.write_apic_base(v),
            0x3A => self.msr.feature_control = v,
            0x3B => self.msr.tsc_adjust = v,
            0x48 => self.msr.spec_ctrl = v,
            0x8B => self.msr.bios_sign = v,
            0x174 => self.msr.sysenter_cs = v & 0xFFFF,
            0x175 if canonical(v) => self.msr.sysenter_esp = v,
            0x176 if canonical(v) => self.msr.sysenter_eip = v,
            0x17A => self.msr.mcg_status = v,
            0x17B => self.msr.mcg_ctl = v,
            0x1A0 => self.msr.misc_enable = v,
            0x1D9 => self.msr.debug_ctl = v & 0x3,
            0x200..=0x20F => self.msr.mtrr_var[n as usize - 0x200] = v,
            0x277 => {
                if v & 0xF8F8_F8F8_F8F8_F8F8 != 0 || v.to_le_bytes().iter().any(|b| matches!(b, 2 | 3)) {
                    return self.gp(0);
                }
                self.msr.pat = v;
            }
            0x2FF => self.msr.mtrr_def = v,
            0x400..=0x47F if n - 0x400 < BANKS * 4 => self.msr.mc[n as usize - 0x400] = v,
            0x6E0 => {
                let adjust = self.msr.tsc_adjust;
                self.lapic.write_tsc_deadline(v, adjust, self.tsc_khz);
                self.brk = true;
            }
            0x800..=0x8FF => {
                if !self.x2apic_write(n, v) {
                    return self.gp(0);
                }
            }
            0xDA0 => self.msr.xss = 0,
            0xC000_0080 => {
                let mut allowed = 0;
                if self.model.has_syscall() {
                    allowed |= EFER_SCE;
                }
                if self.model.has_long() {
                    allowed |= EFER_LME;
                }
                if self.model.has_nx() {
                    allowed |= EFER_NXE;
                }
                let old = self.efer;
                if v & !(allowed | EFER_LMA | 1 << 14) != 0
                    || (v ^ old) & EFER_LME != 0 && self.st.cr0 & CR0_PG != 0
                {
                    return self.gp(0);
                }
                self.efer = v & (allowed | 1 << 14) | old & EFER_LMA;
                self.flush_tlb();
                self.update_mode();
            }
            0xC000_0081 => self.msr.star = v,
            0xC000_0082 if canonical(v) => self.msr.lstar = v,
            0xC000_0083 if canonical(v) => self.msr.cstar = v,
            0xC000_0084 => self.msr.sfmask = v & 0xFFFF_FFFF,
            0xC000_0100 if canonical(v) => self.segs[FS].base = v,
            0xC000_0101 if canonical(v) => self.segs[GS].base = v,
            0xC000_0102 if canonical(v) => self.msr.kernel_gs_base = v,
            0xC000_0103 => self.msr.tsc_aux = v & 0xFFFF_FFFF,
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD if self.found_kvm => {
                self.kvm_clock[0] = v;
                self.write_kvm_clock();
            }
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD if self.found_kvm => self.kvm_clock[1] = v,
            _ => match fixed_index(n) {
                Some(i) => self.msr.mtrr_fixed[i] = v,
                None if is_ignored(n) => {}
                None => {
                    log::debug!("WRMSR {n:#x} = {v:#x}: unknown");
                    return self.gp(0);
                }
            },
        }
        Ok(())
    }

    /// Write kvmclock's structure (Linux's Documentation/virt/kvm/x86/msr.rst): virtual time as a function of the TSC.
    /// It holds for ever, since the TSC's rate does.
    fn write_kvm_clock(&mut self) {
        let at = self.kvm_clock[0];
        if at & 1 == 0 {
            return;
        }
        // Nanoseconds are (ticks << shift) * multiplier >> 32.
        let (mut shift, mut khz) = (0i8, u64::from(self.tsc_khz));
        while khz > 2_000_000 {
            (shift, khz) = (shift - 1, khz >> 1);
        }
        while khz <= 1_000_000 {
            (shift, khz) = (shift + 1, khz << 1);
        }
        let (ticks, ns) = (u128::from(self.tsc_khz), 1_000_000u128 << 32);
        let multiplier = if shift < 0 { (ns << -shift) / ticks } else { ns / (ticks << shift) } as u32;
        let tsc = self.tsc();
        let position = self.position();
        let now = self.bus().clock_ns(position);
        let mut page = [0u8; 32];
        page[0..4].copy_from_slice(&2u32.to_le_bytes());
        page[8..16].copy_from_slice(&tsc.to_le_bytes());
        page[16..24].copy_from_slice(&now.to_le_bytes());
        page[24..28].copy_from_slice(&multiplier.to_le_bytes());
        page[28] = shift as u8;
        page[29] = 1;
        if self.mem().write(at & !1, &page).is_err() {
            log::debug!("kvmclock: {at:#x} is not in RAM");
        }
    }

    fn write_apic_base(&mut self, v: u64) -> R<()> {
        let old = self.lapic.base;
        let x2 = v & BASE_X2 != 0;
        if v & !(self.phys_mask | 0xFFF) != 0
            || v & 0x2FF & !BASE_BSP != 0
            || x2 && (v & BASE_ENABLE == 0 || !self.model.has_x2apic())
            || old & BASE_X2 != 0 && !x2 && v & BASE_ENABLE != 0
        {
            return self.gp(0);
        }
        self.lapic.base = v & !BASE_BSP | old & BASE_BSP;
        self.flush_tlb();
        Ok(())
    }
}

/// The value of an MSR that always reads the same.
pub(crate) fn constant(n: u32) -> Option<u64> {
    Some(match n {
        0xCE => 0x8000_0000,
        0xFE => 0x508,
        0x179 => u64::from(BANKS) | 1 << 8,
        0x198 => 1 << 32 | 1,
        0x10A | 0x13C | 0x1D7 | 0x1D8 | 0x1DB..=0x1DE => 0,
        0x49 | 0x10B | 0x79 => return None,
        n if is_ignored(n) => 0,
        _ => return None,
    })
}

/// Whether what is written to an MSR is forgotten.
pub(crate) fn is_ignored(n: u32) -> bool {
    matches!(
        n,
        0x17 | 0x2A
            | 0x34
            | 0x49
            | 0x79
            | 0xC1..=0xC8
            | 0x10B
            | 0x122
            | 0x140
            | 0x186..=0x18D
            | 0x199..=0x19C
            | 0x1A2
            | 0x1B0
            | 0x309..=0x30B
            | 0x345
            | 0x38D..=0x390
            | 0x606
            | 0x611
            | 0x619
            | 0x639
            | 0x641
            | 0x64D
    ) || is_platform(n)
}

/// AMD's SYSCFG, HWCR, top of memory, NB_CFG, patch level, performance, SVM, IBS and others: they read as zero,
/// and what is written is forgotten.
fn is_platform(n: u32) -> bool {
    matches!(
        n,
        0xC001_0000..=0xC001_0007 | 0xC001_0010 | 0xC001_0015 | 0xC001_001A | 0xC001_001D | 0xC001_001F | 0xC001_0020 | 0xC001_0055 | 0xC001_0058 | 0xC001_0061..=0xC001_0074 | 0xC001_0111..=0xC001_0117 | 0xC001_0140 | 0xC001_0141 | 0xC001_1000..=0xC001_10FF
    )
}
