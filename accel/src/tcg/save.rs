//! Saved state: a type of its own, versioned, apart from the run-time structures.

use super::lapic::Lapic;
use super::msr::{Msrs, BANKS};
use super::op::*;
use super::registers::{Registers, View};
use super::{SoftCpu, TSC_KHZ};
use crate::state::{Segment, Vector, X87};
use serde::{Deserialize, Serialize};

/// Version 2 has [`Extra`] behind the rest.
const VERSION: u32 = 2;

/// A segment register: selector, base, limit in bytes, attributes as in [`Segment`].
pub(crate) type Seg = (u16, u64, u32, u16);

/// What came with version 2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extra {
    /// An exception whose delivery was begun: vector, error code, CR2.
    pub exception: Option<(u8, Option<u32>, u64)>,
    /// What the TSC gains in a millisecond of virtual time.
    pub tsc_khz: u32,
    /// kvmclock's MSRs: system time, wall clock.
    pub kvm_clock: [u64; 2],
    /// The guest found KVM when it began.
    pub found_kvm: bool,
    /// The XSAVE area of a processor with more than x87, SSE and AVX state.
    pub xsave: Option<Vec<u8>>,
}

impl Default for Extra {
    fn default() -> Self {
        Extra { exception: None, tsc_khz: TSC_KHZ, kvm_clock: [0; 2], found_kvm: false, xsave: None }
    }
}

/// A processor's state as both kinds of processors save and load it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segs: [Seg; 6],
    pub ldtr: Seg,
    pub tr: Seg,
    pub gdt: (u64, u16),
    pub idt: (u64, u16),
    pub cr: [u64; 4],
    pub xcr0: u64,
    pub efer: u64,
    pub cpl: u8,
    pub pdpte: [u64; 4],
    pub dr: [u64; 8],
    pub st: [[u8; 16]; 8],
    /// FCW, FSW, FOP, FCS, FDS.
    pub fpu: [u16; 5],
    pub top: u8,
    pub tag: u8,
    pub fip: u64,
    pub fdp: u64,
    pub ymm: [[u8; 32]; 16],
    pub mxcsr: u32,
    pub msr: Msrs,
    pub lapic: Lapic,
    pub halted: bool,
    pub wait_sipi: bool,
    pub shutdown: bool,
    pub shadow: bool,
    pub nmi_pending: bool,
    pub nmi_blocked: bool,
    pub extint_vector: Option<u8>,
    pub pending_db: u64,
    pub deliveries: u32,
    pub delivery_at: u64,
    pub cpu_signature: u32,
    #[serde(skip)]
    pub extra: Extra,
}

impl Saved {
    /// The versioned byte form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        match (postcard::to_stdvec(self), postcard::to_stdvec(&self.extra)) {
            (Ok(body), Ok(extra)) => {
                out.extend(body);
                out.extend(extra);
            }
            (Err(e), _) | (_, Err(e)) => log::error!("cannot save processor state: {e}"),
        }
        out
    }

    /// Read what [`Self::to_bytes`] of this or an older version wrote, for a processor of this number and model.
    pub fn from_bytes(bytes: &[u8], apic_id: u32, signature: u32) -> Result<Saved, String> {
        let (head, body) = bytes.split_first_chunk::<4>().ok_or("processor state is cut short")?;
        let version = u32::from_le_bytes(*head);
        if !(1..=VERSION).contains(&version) {
            return Err(format!("processor state has version {version}, this program knows {VERSION}"));
        }
        let fail = |e: postcard::Error| format!("processor state: {e}");
        let (mut s, rest): (Saved, _) = postcard::take_from_bytes(body).map_err(fail)?;
        if version > 1 {
            s.extra = postcard::from_bytes(rest).map_err(fail)?;
        }
        if s.cpl > 3
            || s.lapic.id != apic_id
            || s.msr.mc.len() != BANKS as usize * 4
            || s.top > 7
            || s.extra.tsc_khz == 0
            || s.extra.exception.is_some_and(|e| e.0 > 31)
            || s.extra.xsave.as_ref().is_some_and(|x| x.len() != 4096)
        {
            return Err("processor state is inconsistent or of another processor".into());
        }
        if s.cpu_signature != signature {
            return Err("processor state is of another CPU model".into());
        }
        Ok(s)
    }

    /// One line a register for people.
    pub fn describe(&self) -> String {
        use std::fmt::Write;
        const NAMES: [&str; 16] = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
            "R14", "R15",
        ];
        let mut o = String::new();
        for (i, n) in NAMES.iter().enumerate() {
            let _ = write!(o, "{n}={:016x}{}", self.gpr[i], if i % 4 == 3 { '\n' } else { ' ' });
        }
        let _ = writeln!(
            o,
            "RIP={:016x} RFL={:08x} CPL={} HLT={}",
            self.rip, self.rflags, self.cpl, self.halted as u8
        );
        for (i, n) in [(ES, "ES"), (CS, "CS"), (SS, "SS"), (DS, "DS"), (FS, "FS"), (GS, "GS")] {
            let s = unseg(self.segs[i]);
            let _ = writeln!(o, "{n} ={:04x} {:016x} {:08x} {:04x}", s.selector, s.base, s.limit, s.attr);
        }
        let _ = writeln!(o, "LDT={:04x} {:016x} {:08x}", self.ldtr.0, self.ldtr.1, self.ldtr.2);
        let _ = writeln!(o, "TR ={:04x} {:016x} {:08x}", self.tr.0, self.tr.1, self.tr.2);
        let _ = writeln!(o, "GDT={:016x} {:04x}", self.gdt.0, self.gdt.1);
        let _ = writeln!(o, "IDT={:016x} {:04x}", self.idt.0, self.idt.1);
        let _ = writeln!(
            o,
            "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}",
            self.cr[0], self.cr[1], self.cr[2], self.cr[3]
        );
        let _ = writeln!(
            o,
            "DR6={:08x} DR7={:08x} EFER={:016x} XCR0={:x}",
            self.dr[6], self.dr[7], self.efer, self.xcr0
        );
        o
    }
    /// The registers for programs.
    pub fn view(&self) -> View {
        View {
            gpr: self.gpr,
            registers: Registers {
                rip: self.rip,
                rflags: self.rflags,
                segs: self.segs.map(unseg),
                ldtr: unseg(self.ldtr),
                tr: unseg(self.tr),
                gdt: self.gdt,
                idt: self.idt,
                cr2: self.cr[1],
                cr3: self.cr[2],
                efer: self.efer,
                cpl: self.cpl,
                halted: self.halted,
            },
            cr0: self.cr[0],
            cr4: self.cr[3],
            kernel_gs_base: self.msr.kernel_gs_base,
            cr8: self.lapic.cr8(),
            x87: self.x87(),
            vector: Vector { ymm: self.ymm, mxcsr: self.mxcsr },
        }
    }

    fn x87(&self) -> X87 {
        let [fcw, fsw, fop, fcs, fds] = self.fpu;
        X87 {
            st: self.st,
            fcw,
            fsw,
            top: self.top,
            tag: self.tag,
            fop,
            fip: self.fip,
            fdp: self.fdp,
            fcs,
            fds,
        }
    }
}

fn seg(s: &Segment) -> Seg {
    (s.selector, s.base, s.limit, s.attr)
}
fn unseg(s: Seg) -> Segment {
    Segment { selector: s.0, base: s.1, limit: s.2, attr: s.3 }
}

impl SoftCpu {
    pub(crate) fn saved(&self) -> Saved {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.st.gpr[..16]);
        let x = &self.st.x87;
        Saved {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segs: std::array::from_fn(|i| seg(&self.segs[i])),
            ldtr: seg(&self.ldtr),
            tr: seg(&self.tr),
            gdt: self.gdt,
            idt: self.idt,
            cr: [self.st.cr0, self.cr2, self.cr3, self.st.cr4],
            xcr0: self.st.xcr0,
            efer: self.efer,
            cpl: self.cpl,
            pdpte: self.pdpte,
            dr: self.dr,
            st: x.st,
            fpu: [x.fcw, x.fsw, x.fop, x.fcs, x.fds],
            top: x.top,
            tag: x.tag,
            fip: x.fip,
            fdp: x.fdp,
            ymm: self.st.vector.ymm,
            mxcsr: self.st.vector.mxcsr,
            msr: self.msr.clone(),
            lapic: self.lapic.clone(),
            halted: self.halted,
            wait_sipi: self.wait_sipi,
            shutdown: self.shutdown,
            shadow: self.shadow,
            nmi_pending: self.nmi_pending,
            nmi_blocked: self.nmi_blocked,
            extint_vector: self.extint_vector(),
            pending_db: self.pending_db,
            deliveries: self.deliveries,
            delivery_at: self.delivery_at,
            cpu_signature: self.model.signature(),
            extra: Extra {
                exception: self.begun.map(|e| (e.vector, e.error, e.cr2)),
                tsc_khz: self.tsc_khz,
                kvm_clock: self.kvm_clock,
                found_kvm: self.found_kvm,
                xsave: None,
            },
        }
    }

    pub(crate) fn load_state(&mut self, bytes: &[u8]) -> Result<(), String> {
        let s = Saved::from_bytes(bytes, self.lapic.id, self.model.signature())?;
        if s.extra.xsave.is_some() {
            return Err("processor state has registers that the software processor does not have".into());
        }
        self.st.gpr[..16].copy_from_slice(&s.gpr);
        self.st.gpr[BLOCKIP as usize] = 0;
        self.rip = s.rip;
        self.segs = s.segs.map(unseg);
        self.ldtr = unseg(s.ldtr);
        self.tr = unseg(s.tr);
        self.gdt = s.gdt;
        self.idt = s.idt;
        [self.st.cr0, self.cr2, self.cr3, self.st.cr4] = s.cr;
        self.st.xcr0 = s.xcr0;
        self.efer = s.efer;
        self.cpl = s.cpl;
        self.pdpte = s.pdpte;
        self.dr = s.dr;
        let x = &mut self.st.x87;
        x.st = s.st;
        [x.fcw, x.fsw, x.fop, x.fcs, x.fds] = s.fpu;
        (x.top, x.tag, x.fip, x.fdp) = (s.top, s.tag, s.fip, s.fdp);
        self.st.vector.ymm = s.ymm;
        self.st.vector.mxcsr = s.mxcsr;
        self.msr = s.msr;
        self.lapic = s.lapic;
        self.halted = s.halted;
        self.wait_sipi = s.wait_sipi;
        self.shutdown = s.shutdown;
        self.shadow = s.shadow;
        self.nmi_pending = s.nmi_pending;
        self.nmi_blocked = s.nmi_blocked;
        self.extint = s.extint_vector.map_or(0, |v| 0x100 | u16::from(v));
        self.pending_db = s.pending_db;
        self.deliveries = s.deliveries;
        self.delivery_at = s.delivery_at;
        self.begun = s.extra.exception.map(|(vector, error, cr2)| crate::Exception { vector, error, cr2 });
        self.tsc_khz = s.extra.tsc_khz;
        self.kvm_clock = s.extra.kvm_clock;
        self.found_kvm = s.extra.found_kvm;
        self.set_arith_flags(s.rflags);
        self.eflags = s.rflags & !super::flags::ARITH | 2;
        self.brk = false;
        self.paused = false;
        self.attention = true;
        self.points.forget();
        // Guest memory may have been replaced wholesale.
        self.drop_all_code();
        self.cache.graveyard.clear();
        self.debug_changed();
        self.flush_tlb();
        self.update_mode();
        Ok(())
    }
}
