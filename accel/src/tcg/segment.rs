//! Segment registers, descriptors, and what depends on the mode (SDM vol. 3, chapters 3 and 5).

use super::decode::{FLAT32, MODE16, MODE32, MODE64};
use super::flags::{IOPL, VM};
use super::op::*;
use super::paging::*;
use super::SoftCpu;
use crate::state::Segment;
use crate::Exception;

/// A descriptor as two words.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub lo: u32,
    pub hi: u32,
}

impl Desc {
    pub(crate) fn base(&self) -> u64 {
        (self.lo >> 16 | (self.hi & 0xFF) << 16 | self.hi & 0xFF00_0000) as u64
    }
    pub(crate) fn limit(&self) -> u32 {
        let l = self.lo & 0xFFFF | self.hi & 0xF_0000;
        if self.hi & 1 << 23 != 0 {
            l << 12 | 0xFFF
        } else {
            l
        }
    }
    pub(crate) fn attr(&self) -> u16 {
        (self.hi >> 8) as u16 & 0xF0FF
    }
    /// Type field with the S bit above it.
    pub(crate) fn kind(&self) -> u32 {
        self.hi >> 8 & 31
    }
    pub(crate) fn dpl(&self) -> u8 {
        (self.hi >> 13 & 3) as u8
    }
    pub(crate) fn present(&self) -> bool {
        self.hi & 0x8000 != 0
    }
    /// S set and type code.
    pub(crate) fn is_code(&self) -> bool {
        self.hi & 0x1800 == 0x1800
    }
    pub(crate) fn conforming(&self) -> bool {
        self.hi & 0x400 != 0
    }
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), attr: self.attr() }
    }
}

impl SoftCpu {
    pub(crate) fn protected(&self) -> bool {
        self.st.cr0 & CR0_PE != 0 && self.eflags & VM == 0
    }
    pub(crate) fn vm86(&self) -> bool {
        self.eflags & VM != 0 && self.st.cr0 & CR0_PE != 0
    }
    pub(crate) fn iopl(&self) -> u64 {
        (self.eflags & IOPL) >> 12
    }
    pub(crate) fn lma(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// Bring everything that is derived from CS, SS, CPL, CR0, EFER and RFLAGS up to date.
    pub(crate) fn update_mode(&mut self) {
        let cs = self.segs[CS].attr;
        self.long = self.lma() && cs & 0x2000 != 0;
        let mode = if self.long {
            MODE64
        } else if cs & 0x4000 == 0 {
            MODE16
        } else if self.flat() {
            FLAT32
        } else {
            MODE32
        };
        if mode != self.code_mode {
            self.code_mode = mode;
            // What follows is another block.
            self.end = std::ptr::null();
        }
        self.ip_mask = if self.long { u64::MAX } else { 0xFFFF_FFFF };
        self.sp_mask = if self.long {
            u64::MAX
        } else if self.segs[SS].attr & 0x4000 != 0 {
            0xFFFF_FFFF
        } else {
            0xFFFF
        };
        self.update_mmu();
    }

    /// See [`FLAT32`].
    fn flat(&self) -> bool {
        let whole = |s: &Segment| s.base == 0 && s.limit == u32::MAX;
        let data = |i: usize| whole(&self.segs[i]) && self.segs[i].attr & 0x9E == 0x92;
        self.protected()
            && whole(&self.segs[CS])
            && self.segs[SS].attr & 0x4000 != 0
            && [ES, SS, DS].into_iter().all(data)
    }

    /// Run `f`; if it faults, put the registers it may have changed back.
    pub(crate) fn atomically<X>(&mut self, f: impl FnOnce(&mut Self) -> R<X>) -> R<X> {
        let keep = (self.segs, self.ldtr, self.tr, self.cpl, self.eflags, self.f_res, self.f_aux, self.rip);
        let gpr = self.st.gpr;
        let cr3 = self.cr3;
        let r = f(self);
        if r.is_err() {
            (self.segs, self.ldtr, self.tr, self.cpl, self.eflags, self.f_res, self.f_aux, self.rip) = keep;
            self.st.gpr = gpr;
            if self.cr3 != cr3 {
                self.cr3 = cr3;
                self.flush_tlb();
            }
            self.flags_changed();
            self.update_mode();
        }
        r
    }

    /// Linear address of a selector's descriptor, or `None` beyond the table.
    pub(crate) fn desc_addr(&self, sel: u16, size: u64) -> Option<u64> {
        let (base, limit) = if sel & 4 != 0 {
            if self.ldtr.attr & 0x80 == 0 {
                return None;
            }
            (self.ldtr.base, self.ldtr.limit as u64)
        } else {
            (self.gdt.0, self.gdt.1 as u64)
        };
        let off = (sel & !7) as u64;
        (off + size - 1 <= limit).then(|| base.wrapping_add(off))
    }

    /// Read a descriptor; beyond the table is exception `vector` with the selector.
    pub(crate) fn read_desc(&mut self, sel: u16, vector: u8) -> R<Desc> {
        let Some(at) = self.desc_addr(sel, 8) else {
            return self.raise(Exception::with_error(vector, (sel & !3) as u32 | self.ext));
        };
        let at = self.wrap_lin(at);
        let v = self.as_system(|c| c.ld::<u64>(at))?;
        Ok(Desc { lo: v as u32, hi: (v >> 32) as u32 })
    }

    pub(crate) fn wrap_lin(&self, a: u64) -> u64 {
        if self.lma() {
            a
        } else {
            a & 0xFFFF_FFFF
        }
    }

    /// Set bits in the second word of a descriptor in memory (accessed, busy).
    pub(crate) fn mark_desc(&mut self, sel: u16, set: u32, clear: u32) -> R<()> {
        if let Some(at) = self.desc_addr(sel, 8) {
            let at = self.wrap_lin(at + 4);
            self.as_system(|c| {
                let v = c.ld::<u32>(at)? as u32;
                let n = v & !clear | set;
                if n != v {
                    c.wr::<u32>(at, n as u64)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// #GP, #NP, #SS or #TS naming a selector.
    pub(crate) fn sel_fault<T>(&mut self, vector: u8, sel: u16) -> R<T> {
        let e = (sel & !3) as u32 | self.ext;
        self.raise(Exception::with_error(vector, e))
    }

    /// Load ES, SS, DS, FS or GS.
    pub(crate) fn load_seg(&mut self, seg: usize, sel: u16) -> R<()> {
        if !self.protected() {
            let vm = self.vm86();
            let s = &mut self.segs[seg];
            s.selector = sel;
            s.base = (sel as u64) << 4;
            if vm {
                s.limit = 0xFFFF;
                s.attr = 0xF3;
            } else {
                // Limits stay what they were ("unreal" mode), unless there was no segment.
                if s.attr & 0x80 == 0 {
                    s.limit = 0xFFFF;
                    s.attr = 0;
                }
                s.attr = s.attr & 0xF000 | 0x93;
            }
            self.segment_changed(seg);
            return Ok(());
        }
        if sel & !3 == 0 {
            if seg == SS && !(self.long && self.cpl < 3 && (sel & 3) as u8 == self.cpl) {
                return self.gp(self.ext);
            }
            self.segs[seg] = Segment { selector: sel, base: 0, limit: 0, attr: 0 };
            if seg == SS {
                self.segs[seg].attr = (self.cpl as u16) << 5;
            }
            self.segment_changed(seg);
            return Ok(());
        }
        let d = self.read_desc(sel, 13)?;
        let rpl = (sel & 3) as u8;
        if seg == SS {
            if rpl != self.cpl || d.hi & 0x1A00 != 0x1200 || d.dpl() != self.cpl {
                return self.sel_fault(13, sel);
            }
            if !d.present() {
                return self.sel_fault(12, sel);
            }
        } else {
            let code = d.is_code();
            if d.hi & 0x1000 == 0 || code && d.hi & 0x200 == 0 {
                return self.sel_fault(13, sel);
            }
            if !(code && d.conforming()) && d.dpl() < self.cpl.max(rpl) {
                return self.sel_fault(13, sel);
            }
            if !d.present() {
                return self.sel_fault(11, sel);
            }
        }
        self.mark_accessed(sel, d)?;
        let mut s = d.segment(sel);
        s.attr |= 1;
        self.segs[seg] = s;
        self.segment_changed(seg);
        Ok(())
    }

    /// What the mode takes from a data segment follows it.
    fn segment_changed(&mut self, seg: usize) {
        if seg == SS || !self.long && matches!(seg, ES | DS) {
            self.update_mode();
        }
    }

    pub(crate) fn mark_accessed(&mut self, sel: u16, d: Desc) -> R<()> {
        if d.hi & 0x100 == 0 {
            self.mark_desc(sel, 0x100, 0)?;
        }
        Ok(())
    }

    /// CS from a checked descriptor; `cpl` becomes the privilege level.
    pub(crate) fn set_cs(&mut self, sel: u16, d: Desc, cpl: u8) -> R<()> {
        self.mark_accessed(sel, d)?;
        let mut s = d.segment(sel & !3 | cpl as u16);
        s.attr |= 1;
        self.segs[CS] = s;
        self.cpl = cpl;
        self.update_mode();
        Ok(())
    }

    /// CS in real and virtual-8086 mode.
    pub(crate) fn set_cs_real(&mut self, sel: u16) {
        let vm = self.vm86();
        let s = &mut self.segs[CS];
        s.selector = sel;
        s.base = (sel as u64) << 4;
        if vm {
            s.limit = 0xFFFF;
            s.attr = 0xF3;
        } else {
            s.attr = s.attr & 0xF000 | 0x93;
        }
        self.update_mode();
    }

    /// After entering virtual-8086 mode: all six segments by their selectors.
    pub(crate) fn set_vm86_segments(&mut self, sels: [u16; 6]) {
        for (s, sel) in self.segs.iter_mut().zip(sels) {
            *s = Segment { selector: sel, base: (sel as u64) << 4, limit: 0xFFFF, attr: 0xF3 };
        }
    }

    /// On a return to less privileged code: data segments that it may not use become null.
    pub(crate) fn drop_privileged_segments(&mut self) {
        for i in [ES, DS, FS, GS] {
            let s = self.segs[i];
            let dpl = (s.attr >> 5 & 3) as u8;
            let conforming = s.attr & 0x1C == 0x1C;
            if s.attr & 0x80 != 0 && dpl < self.cpl && !conforming {
                self.segs[i] = Segment { selector: 0, base: 0, limit: 0, attr: 0 };
            }
        }
        self.update_mode();
    }
}
