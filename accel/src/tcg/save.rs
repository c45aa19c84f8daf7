//! Saved state: a type of its own, versioned, apart from the run-time structures.

use super::lapic::Lapic;
use super::msr::Msrs;
use super::op::*;
use super::SoftCpu;
use crate::state::Segment;
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

type Seg = (u16, u64, u32, u16);

#[derive(Serialize, Deserialize)]
struct Saved {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    segs: [Seg; 6],
    ldtr: Seg,
    tr: Seg,
    gdt: (u64, u16),
    idt: (u64, u16),
    cr: [u64; 4],
    xcr0: u64,
    efer: u64,
    cpl: u8,
    pdpte: [u64; 4],
    dr: [u64; 8],
    st: [[u8; 16]; 8],
    /// FCW, FSW, FOP, FCS, FDS.
    fpu: [u16; 5],
    top: u8,
    tag: u8,
    fip: u64,
    fdp: u64,
    ymm: [[u8; 32]; 16],
    mxcsr: u32,
    msr: Msrs,
    lapic: Lapic,
    halted: bool,
    wait_sipi: bool,
    shutdown: bool,
    shadow: bool,
    nmi_pending: bool,
    nmi_blocked: bool,
    extint_vector: Option<u8>,
    pending_db: u64,
    deliveries: u32,
    delivery_at: u64,
    cpu_signature: u32,
}

fn seg(s: &Segment) -> Seg {
    (s.selector, s.base, s.limit, s.attr)
}
fn unseg(s: Seg) -> Segment {
    Segment { selector: s.0, base: s.1, limit: s.2, attr: s.3 }
}

impl SoftCpu {
    pub(crate) fn save_state(&self) -> Vec<u8> {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.st.gpr[..16]);
        let x = &self.st.x87;
        let s = Saved {
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
            extint_vector: self.extint_vector,
            pending_db: self.pending_db,
            deliveries: self.deliveries,
            delivery_at: self.delivery_at,
            cpu_signature: self.model.signature(),
        };
        let mut out = VERSION.to_le_bytes().to_vec();
        match postcard::to_stdvec(&s) {
            Ok(b) => out.extend(b),
            Err(e) => log::error!("cannot save processor state: {e}"),
        }
        out
    }

    pub(crate) fn load_state(&mut self, bytes: &[u8]) -> Result<(), String> {
        let (head, body) = bytes.split_first_chunk::<4>().ok_or("processor state is cut short")?;
        let version = u32::from_le_bytes(*head);
        if version != VERSION {
            return Err(format!("processor state has version {version}, this program knows {VERSION}"));
        }
        let s: Saved = postcard::from_bytes(body).map_err(|e| format!("processor state: {e}"))?;
        if s.cpl > 3 || s.lapic.id != self.lapic.id || s.msr.mc.len() != self.msr.mc.len() || s.top > 7 {
            return Err("processor state is inconsistent or of another processor".into());
        }
        if s.cpu_signature != self.model.signature() {
            return Err("processor state is of another CPU model".into());
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
        self.extint_vector = s.extint_vector;
        self.pending_db = s.pending_db;
        self.deliveries = s.deliveries;
        self.delivery_at = s.delivery_at;
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

    pub(crate) fn describe_registers(&self) -> String {
        use std::fmt::Write;
        const NAMES: [&str; 16] = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
            "R14", "R15",
        ];
        let mut o = String::new();
        for (i, n) in NAMES.iter().enumerate() {
            let _ = write!(o, "{n}={:016x}{}", self.st.gpr[i], if i % 4 == 3 { '\n' } else { ' ' });
        }
        let _ = writeln!(
            o,
            "RIP={:016x} RFL={:08x} CPL={} HLT={}",
            self.rip,
            self.rflags(),
            self.cpl,
            self.halted as u8
        );
        for (i, n) in [(ES, "ES"), (CS, "CS"), (SS, "SS"), (DS, "DS"), (FS, "FS"), (GS, "GS")] {
            let s = self.segs[i];
            let _ = writeln!(o, "{n} ={:04x} {:016x} {:08x} {:04x}", s.selector, s.base, s.limit, s.attr);
        }
        let _ = writeln!(o, "LDT={:04x} {:016x} {:08x}", self.ldtr.selector, self.ldtr.base, self.ldtr.limit);
        let _ = writeln!(o, "TR ={:04x} {:016x} {:08x}", self.tr.selector, self.tr.base, self.tr.limit);
        let _ = writeln!(o, "GDT={:016x} {:04x}", self.gdt.0, self.gdt.1);
        let _ = writeln!(o, "IDT={:016x} {:04x}", self.idt.0, self.idt.1);
        let _ = writeln!(
            o,
            "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}",
            self.st.cr0, self.cr2, self.cr3, self.st.cr4
        );
        let _ = writeln!(
            o,
            "DR6={:08x} DR7={:08x} EFER={:016x} XCR0={:x}",
            self.dr[6], self.dr[7], self.efer, self.st.xcr0
        );
        o
    }
}
