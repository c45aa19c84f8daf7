//! CPUID: a model's leaves as KVM takes them.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};

use super::KvmError;
use crate::model::{CpuidContext, HostCpuid};
use crate::CpuModel;

/// Leaves that have subleaves, and how many of them a model may fill.
const INDEXED: &[(u32, u32)] =
    &[(4, 5), (7, 3), (0xB, 3), (0xD, 20), (0x14, 2), (0x1D, 2), (0x1E, 2), (0x8000_001D, 5)];

/// What KVM can show guests.
pub fn supported(system: &kvm_ioctls::Kvm) -> Result<HostCpuid, KvmError> {
    let list = system
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    let leaves = list.as_slice().iter().map(|e| (e.function, e.index, [e.eax, e.ebx, e.ecx, e.edx]));
    Ok(HostCpuid { leaves: leaves.collect() })
}

/// What the processor `apic_id` of `cpus` answers. Bits that follow the processor's state (OSXSAVE, the size of the
/// XSAVE area) are the kernel's to keep.
pub fn leaves(model: &CpuModel, apic_id: u32, cpus: u32, kvm: bool) -> Result<CpuId, KvmError> {
    let at = CpuidContext { apic_id, cpus, osxsave: false, apic_on: true, xcr0: 1, kvm };
    let top = |first: u32| model.cpuid(first, 0, at)[0];
    let ranges =
        [0..=top(0), 0x4000_0000..=top(0x4000_0000).max(0x3FFF_FFFF), 0x8000_0000..=top(0x8000_0000)];
    let mut entries = Vec::new();
    for leaf in ranges.into_iter().flatten() {
        let subleaves = INDEXED.iter().find(|i| i.0 == leaf).map_or(1, |i| i.1);
        let flags = if subleaves > 1 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        for index in 0..subleaves {
            let [eax, ebx, ecx, edx] = model.cpuid(leaf, index, at);
            if index > 3 && [eax, ebx, ecx, edx] == [0; 4] {
                continue;
            }
            entries.push(kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::TooMany)
}
