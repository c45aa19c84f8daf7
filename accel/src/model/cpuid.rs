//! The CPUID leaves of a model (SDM vol. 2, CPUID; AMD APM vol. 3, appendix E).

use super::features::Word;
use super::CpuModel;

impl CpuModel {
    /// CPUID: EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, leaf: u32, sub: u32, at: CpuidContext) -> [u32; 4] {
        let CpuidContext { apic_id, cpus, osxsave, apic_on, xcr0, .. } = at;
        let w = |x: Word| self.words[x as usize];
        let v = |i: usize| {
            u32::from_le_bytes([self.vendor[i], self.vendor[i + 1], self.vendor[i + 2], self.vendor[i + 3]])
        };
        let amd = &self.vendor == b"AuthenticAMD";
        let host_top = self.host.as_ref().map(|h| h.leaf(0x8000_0000, 0)[0].clamp(0x8000_0008, 0x8000_001F));
        let top_ext = if let Some(top) = host_top {
            top
        } else if self.has_long() || !self.brand.is_empty() {
            0x8000_0008
        } else {
            0x8000_0000
        };
        let leaf = if leaf >= 0x8000_0000 {
            if leaf > top_ext {
                return [0; 4];
            }
            leaf
        } else if leaf >= 0x4000_0000 {
            if !self.hypervisor_leaf || !self.has("hypervisor") || leaf > 0x4000_0001 {
                return [0; 4];
            }
            leaf
        } else if leaf > self.level {
            return [0; 4];
        } else {
            leaf
        };
        if let Some(own) = self.host.as_ref().and_then(|host| self.host_leaf(host, leaf, sub, at)) {
            return own;
        }
        match leaf {
            0 => [self.level, v(0), v(8), v(4)],
            1 => {
                let mut c = w(Word::C1);
                if osxsave {
                    c |= 1 << 27;
                }
                let mut d = w(Word::D1);
                if !apic_on {
                    d &= !(1 << 9);
                }
                let mut b = apic_id << 24 | 8 << 8;
                if cpus > 1 {
                    d |= 1 << 28;
                    b |= cpus.next_power_of_two().min(255) << 16;
                }
                [self.signature, b, c, d]
            }
            2 => [1, 0, 0x4D, 0x2C_307D],
            4 => {
                if amd {
                    return [0; 4];
                }
                let cores = (cpus.max(1) - 1).min(63) << 26;
                match sub {
                    0 => [0x121 | cores, 0x1C0_003F, 0x3F, 1],
                    1 => [0x122 | cores, 0x1C0_003F, 0x3F, 1],
                    2 => [0x143 | cores, 0x3C0_003F, 0xFFF, 1],
                    _ => [0; 4],
                }
            }
            6 => [w(Word::A6), 0, 0, 0],
            7 => {
                let on = if sub == 0 { u32::MAX } else { 0 };
                [0, w(Word::B7) & on, w(Word::C7) & on, 0]
            }
            0xB => {
                if !self.has_x2apic() {
                    return [0; 4];
                }
                let bits = cpus.max(1).next_power_of_two().trailing_zeros();
                match sub {
                    0 => [0, 1, 0x100, apic_id],
                    1 => [bits, cpus, 0x201, apic_id],
                    _ => [0, 0, sub & 0xFF, apic_id],
                }
            }
            0xD => {
                if !self.has("xsave") {
                    return [0; 4];
                }
                let all = self.xcr0_mask();
                // Legacy region and header, then the upper halves of the YMM registers.
                let area = |mask: u64| if mask & 4 != 0 { 0x340 } else { 0x240 };
                match sub {
                    0 => [all as u32, area(xcr0), area(all), 0],
                    // The compacted area has the same layout: AVX follows the header.
                    1 => [w(Word::S1), if self.has("xsavec") { area(xcr0) } else { 0 }, 0, 0],
                    2 if all & 4 != 0 => [256, 576, 0, 0],
                    _ => [0; 4],
                }
            }
            0x4000_0000 => {
                let (b, c, d) = match at.kvm {
                    true => (b"KVMK", b"VMKV", b"M\0\0\0"),
                    false => (b"TCGT", b"CGTC", b"GTCG"),
                };
                [0x4000_0001, u32::from_le_bytes(*b), u32::from_le_bytes(*c), u32::from_le_bytes(*d)]
            }
            // The clock by its present MSRs, and that it needs no look at other processors' clocks.
            0x4000_0001 if at.kvm => [1 << 3 | 1 << 24, 0, 0, 0],
            0x8000_0000 => [top_ext, v(0), v(8), v(4)],
            0x8000_0001 => {
                let mut d = w(Word::Xd1);
                let mut c = w(Word::Xc1);
                if amd {
                    // AMD repeats leaf 1's bits here.
                    let mut common = w(Word::D1) & 0x0183_F3FF;
                    if !apic_on {
                        common &= !(1 << 9);
                    }
                    d |= common;
                    if cpus > 1 {
                        c |= 2;
                    }
                }
                [self.signature, 0, c, d]
            }
            0x8000_0002..=0x8000_0004 => {
                let mut text = [0u8; 48];
                let n = self.brand.len().min(47);
                text[..n].copy_from_slice(&self.brand.as_bytes()[..n]);
                let at = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| {
                    let p = at + 4 * i;
                    u32::from_le_bytes([text[p], text[p + 1], text[p + 2], text[p + 3]])
                })
            }
            0x8000_0005 if amd => [0x01FF_01FF, 0x01FF_01FF, 0x4002_0140, 0x4002_0140],
            0x8000_0006 => [0, if amd { 0x4200_4200 } else { 0 }, 0x0200_8140, 0],
            0x8000_0007 => [0, 0, 0, w(Word::X7)],
            0x8000_0008 => {
                let lin = if self.has_long() { 48 } else { 32 };
                [lin << 8 | self.phys_bits(), 0, if amd && cpus > 1 { cpus - 1 } else { 0 }, 0]
            }
            _ => [0; 4],
        }
    }
}

/// What CPUID shows of the processor's place and state.
#[derive(Clone, Copy, Debug)]
pub struct CpuidContext {
    pub apic_id: u32,
    /// Processors in the machine.
    pub cpus: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// The local APIC is enabled.
    pub apic_on: bool,
    /// The guest found KVM when it began, and finds it again.
    pub kvm: bool,
    /// XCR0, on which the size of the XSAVE area depends.
    pub xcr0: u64,
}
