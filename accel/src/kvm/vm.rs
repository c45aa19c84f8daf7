//! The virtual machine as a whole: memory slots, interrupt messages, dirty pages.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::*;
use kvm_ioctls::{Cap, Kvm as System, VmFd};

use super::KvmError;
use crate::mem::Span;
use crate::{ApicMessage, GuestMemory};

/// Pins of the I/O APIC whose ends of interrupts are told.
pub const PINS: usize = 24;
/// Three pages that Intel's processors need for real mode, below the firmware where nothing else is; QEMU's place.
const IDENTITY_MAP: u64 = 0xFEFF_C000;
const TSS: usize = 0xFEFF_D000;

#[derive(Clone, Copy)]
struct Slot {
    number: u32,
    span: Span,
    logging: bool,
}

// SAFETY: a span's pointer is only handed to the kernel; the memory lives as long as the machine, which drops the
// VM first.
unsafe impl Send for Slot {}

#[derive(Default)]
struct Slots {
    list: Vec<Slot>,
    version: Option<u32>,
    tracking: bool,
    pins: Vec<Option<ApicMessage>>,
}

/// A virtual machine of KVM.
pub struct Vm {
    fd: VmFd,
    slots: Mutex<Slots>,
}

/// What a KVM must have.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];
const KVM_CAP_SREGS2: u64 = 200;

impl Vm {
    /// A machine without memory and processors.
    pub fn new(system: &System) -> Result<Vm, KvmError> {
        for (cap, name) in NEEDED {
            if !system.check_extension(*cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        if system.check_extension_raw(KVM_CAP_SREGS2) <= 0 {
            return Err(KvmError::Lacks("KVM_CAP_SREGS2"));
        }
        let fd = system.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
        let enable = |cap: u32, value: u64| {
            let mut arguments = kvm_enable_cap { cap, ..Default::default() };
            arguments.args[0] = value;
            fd.enable_cap(&arguments)
        };
        // Intel's processors run real mode in a task of their own; others ignore it.
        let _ = fd.set_identity_map_address(IDENTITY_MAP);
        fd.set_tss_address(TSS).map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
        // The local APICs are the kernel's; the 8259s, the I/O APIC and the timers stay the chipset's.
        enable(KVM_CAP_SPLIT_IRQCHIP, PINS as u64).map_err(KvmError::call("KVM_CAP_SPLIT_IRQCHIP"))?;
        if system.check_extension(Cap::X2ApicApi) {
            // 32-bit ids, and 0xFF is a broadcast to xAPICs only.
            enable(KVM_CAP_X2APIC_API, 3).map_err(KvmError::call("KVM_CAP_X2APIC_API"))?;
        }
        // Where these are missing, pending #DB and unknown MSRs are as the kernel has them.
        let _ = enable(KVM_CAP_EXCEPTION_PAYLOAD, 1);
        let _ = enable(KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_UNKNOWN));
        Ok(Vm { fd, slots: Mutex::default() })
    }

    /// The kernel's handle.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, slot: &Slot, len: u64) -> Result<(), KvmError> {
        let mut flags = 0;
        if !slot.span.writable {
            flags |= KVM_MEM_READONLY;
        }
        if slot.logging {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: slot.span.gpa,
            memory_size: len,
            userspace_addr: slot.span.host as u64,
        };
        // SAFETY: the span lies in guest memory or in a firmware image, which live as long as the machine and are
        // never accessed through Rust references while guests run.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Make the guest's memory what `mem` says, if that changed.
    pub fn map(&self, mem: &GuestMemory) -> Result<(), KvmError> {
        let mut slots = self.slots();
        if slots.version == Some(mem.map_version()) {
            return Ok(());
        }
        let wanted = mem.spans();
        let (keep, gone): (Vec<Slot>, Vec<Slot>) =
            slots.list.iter().copied().partition(|slot| wanted.contains(&slot.span));
        for slot in &gone {
            self.collect_slot(slot, mem)?;
            self.set(slot, 0)?;
        }
        slots.list = keep;
        for span in wanted {
            if slots.list.iter().any(|s| s.span == span) {
                continue;
            }
            let number =
                (0..).find(|n| slots.list.iter().all(|s| s.number != *n)).unwrap_or(slots.list.len() as u32);
            let slot = Slot { number, span, logging: slots.tracking && span.ram && span.writable };
            self.set(&slot, span.len)?;
            slots.list.push(slot);
        }
        slots.version = Some(mem.map_version());
        Ok(())
    }

    /// The memory is to be mapped anew: a firmware image may lie elsewhere.
    pub fn forget_map(&self) {
        self.slots().version = None;
    }

    fn collect_slot(&self, slot: &Slot, mem: &GuestMemory) -> Result<(), KvmError> {
        if slot.logging {
            let bitmap = self
                .fd
                .get_dirty_log(slot.number, slot.span.len as usize)
                .map_err(KvmError::call("KVM_GET_DIRTY_LOG"))?;
            mem.mark_written(slot.span.gpa, &bitmap);
        }
        Ok(())
    }

    /// Note in `mem` which pages guests wrote since this was last asked.
    pub fn collect_dirty(&self, mem: &GuestMemory) -> Result<(), KvmError> {
        self.slots().list.iter().try_for_each(|slot| self.collect_slot(slot, mem))
    }

    /// Find out, or do not, which pages guests write: see [`Self::collect_dirty`].
    pub fn track_dirty(&self, on: bool) -> Result<(), KvmError> {
        let mut slots = self.slots();
        if slots.tracking == on {
            return Ok(());
        }
        slots.tracking = on;
        for i in 0..slots.list.len() {
            let slot = &mut slots.list[i];
            slot.logging = on && slot.span.ram && slot.span.writable;
            let slot = *slot;
            self.set(&slot, slot.span.len)?;
        }
        Ok(())
    }

    /// Whether pages that guests write are found out.
    pub fn is_tracking(&self) -> bool {
        self.slots().tracking
    }

    /// Deliver an interrupt message.
    ///
    /// The devices run in this process and have decided by the time this is called, so the message is the whole
    /// story: an irqfd would be a second way to the same place, with a routing table to keep, and not a shorter one (a write
    /// to it took 445 ns on an AMD EPYC, this call 386).
    pub fn send(&self, message: ApicMessage) -> Result<(), KvmError> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // 0: no local APIC took it, which is the guest's affair.
        self.fd.signal_msi(msi).map(drop).map_err(KvmError::call("KVM_SIGNAL_MSI"))
    }

    /// Tell which level-triggered interrupts the I/O APIC sends, so that their ends are told to it.
    pub fn set_pins(&self, pins: Vec<Option<ApicMessage>>) -> Result<(), KvmError> {
        let mut slots = self.slots();
        if slots.pins == pins {
            return Ok(());
        }
        let entries: Vec<kvm_irq_routing_entry> = pins
            .iter()
            .enumerate()
            .map(|(pin, message)| {
                let message = message.unwrap_or(ApicMessage { address: 0xFEE0_0000, data: 0 });
                let mut entry = kvm_irq_routing_entry {
                    gsi: pin as u32,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi = kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::TooMany)?;
        self.fd.set_gsi_routing(&routing).map_err(KvmError::call("KVM_SET_GSI_ROUTING"))?;
        slots.pins = pins;
        Ok(())
    }

    /// Set kvmclock to virtual time.
    pub fn set_clock(&self, now: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data { clock: now, ..Default::default() };
        self.fd.set_clock(&clock).map_err(KvmError::call("KVM_SET_CLOCK"))
    }
}
