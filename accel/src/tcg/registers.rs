//! The register file as plain data, for whoever looks at a processor from outside: debuggers,
//! tests, a machine that moves between `tcg` and `kvm`.

use super::op::*;
use super::SoftCpu;
use crate::state::{CpuState, Segment, Vector, X87};

/// The registers besides those in [`CpuState`], which [`SoftCpu::state`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segs: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdt: (u64, u16),
    pub idt: (u64, u16),
    pub cr2: u64,
    pub cr3: u64,
    pub efer: u64,
    pub cpl: u8,
    pub halted: bool,
}

/// What a debugger or a dump wants to know of a processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    pub registers: Registers,
    pub cr0: u64,
    pub cr4: u64,
    pub kernel_gs_base: u64,
    /// The task priority, which belongs to the local APIC: it is shown only.
    pub cr8: u64,
    pub x87: X87,
    pub vector: Vector,
}

impl SoftCpu {
    /// The registers as they are now.
    pub fn view(&self) -> View {
        self.saved().view()
    }

    /// Replace all of it; nothing is checked.
    pub(super) fn set_view(&mut self, view: &View) {
        self.st.gpr[..16].copy_from_slice(&view.gpr);
        let paging = (self.st.cr0, self.st.cr4) != (view.cr0, view.cr4);
        (self.st.cr0, self.st.cr4) = (view.cr0, view.cr4);
        self.msr.kernel_gs_base = view.kernel_gs_base;
        (self.st.x87, self.st.vector) = (view.x87, view.vector);
        let (shadow, pending) = (self.shadow, self.pending_db);
        self.set_registers(&view.registers);
        (self.shadow, self.pending_db) = (shadow, pending);
        if paging {
            self.flush_tlb();
        }
    }

    /// General, vector, x87 and control registers 0 and 4.
    pub fn state(&self) -> &CpuState {
        &self.st
    }

    /// As [`Self::state`], to change. Control registers are changed with [`Self::set_registers`] after
    /// it, which makes what derives from them follow.
    pub fn state_mut(&mut self) -> &mut CpuState {
        &mut self.st
    }

    /// The rest of the register file.
    pub fn registers(&self) -> Registers {
        Registers {
            rip: self.rip,
            rflags: self.rflags(),
            segs: self.segs,
            ldtr: self.ldtr,
            tr: self.tr,
            gdt: self.gdt,
            idt: self.idt,
            cr2: self.cr2,
            cr3: self.cr3,
            efer: self.efer,
            cpl: self.cpl,
            halted: self.halted,
        }
    }

    /// Set the rest of the register file; nothing is checked.
    pub fn set_registers(&mut self, r: &Registers) {
        let paging = (self.cr3, self.efer) != (r.cr3, r.efer);
        self.st.gpr[NOREG as usize] = 0;
        self.rip = r.rip;
        self.set_arith_flags(r.rflags);
        self.eflags = r.rflags & !super::flags::ARITH | 2;
        self.segs = r.segs;
        self.ldtr = r.ldtr;
        self.tr = r.tr;
        self.gdt = r.gdt;
        self.idt = r.idt;
        self.cr2 = r.cr2;
        self.cr3 = r.cr3;
        self.efer = r.efer;
        self.cpl = r.cpl & 3;
        self.halted = r.halted;
        self.shadow = false;
        self.pending_db = 0;
        self.attention = true;
        if paging {
            self.flush_tlb();
        }
        self.update_mode();
    }
}
