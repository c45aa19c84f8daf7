//! Calls of KVM that the `kvm-ioctls` crate does not have.

use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::kvm_sregs2;
use kvm_ioctls::VcpuFd;

type Result<T> = std::io::Result<T>;

const KVM_INTERRUPT: libc::c_ulong = 0x4004_AE86;
const KVM_X86_SETUP_MCE: libc::c_ulong = 0x4008_AE9C;
const KVM_GET_SREGS2: libc::c_ulong = 0x8140_AECC;
const KVM_SET_SREGS2: libc::c_ulong = 0x4140_AECD;
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_AEE1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_AEE2;

/// `struct kvm_device_attr` with group and attribute 0: KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.
#[repr(C)]
struct TscOffset {
    flags: u32,
    group: u32,
    attribute: u64,
    address: u64,
}

/// # Safety
/// `argument` must be what the kernel reads or writes for `request`.
unsafe fn call<T>(fd: RawFd, request: libc::c_ulong, argument: *mut T) -> Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { libc::ioctl(fd, request, argument) } {
        0.. => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Queue the vector that an external interrupt controller gave; the processor is not in the guest.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<()> {
    let mut number = u32::from(vector);
    // SAFETY: `struct kvm_interrupt` is one u32, which lives across the call.
    unsafe { call(vcpu.as_raw_fd(), KVM_INTERRUPT, &mut number) }
}

/// Set the machine-check capabilities: `MCG_CAP`'s value.
pub fn setup_mce(vcpu: &VcpuFd, capabilities: u64) -> Result<()> {
    let mut value = capabilities;
    // SAFETY: the kernel reads one u64.
    unsafe { call(vcpu.as_raw_fd(), KVM_X86_SETUP_MCE, &mut value) }
}

/// Segments, tables and control registers, with PAE's page-directory pointers.
pub fn get_sregs(vcpu: &VcpuFd) -> Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills a structure of this type.
    unsafe { call(vcpu.as_raw_fd(), KVM_GET_SREGS2, &mut sregs) }?;
    Ok(sregs)
}

/// See [`get_sregs`].
pub fn set_sregs(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<()> {
    let mut sregs = *sregs;
    // SAFETY: the kernel reads a structure of this type.
    unsafe { call(vcpu.as_raw_fd(), KVM_SET_SREGS2, &mut sregs) }
}

/// What is added to the host's (scaled) TSC to give the guest's.
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64> {
    let mut value = 0u64;
    let mut attribute =
        TscOffset { flags: 0, group: 0, attribute: 0, address: std::ptr::from_mut(&mut value) as u64 };
    // SAFETY: the kernel writes one u64 at the address, which lives across the call.
    unsafe { call(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &mut attribute) }?;
    Ok(value)
}

/// See [`tsc_offset`].
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<()> {
    let value = offset;
    let mut attribute =
        TscOffset { flags: 0, group: 0, attribute: 0, address: std::ptr::from_ref(&value) as u64 };
    // SAFETY: the kernel reads one u64 at the address, which lives across the call.
    unsafe { call(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &mut attribute) }
}
