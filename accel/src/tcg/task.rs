//! Hardware task switching (SDM vol. 3, chapter 7).

use super::flags::*;
use super::op::*;
use super::paging::*;
use super::segment::Desc;
use super::SoftCpu;

/// What started the switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    Jump,
    Call,
    Interrupt,
    Return,
}

impl SoftCpu {
    /// Through a task gate: the TSS must be in the GDT and available.
    pub(crate) fn task_gate(&mut self, tss: u16, why: Why, error: Option<u32>) -> R<()> {
        if tss & 4 != 0 || tss & !3 == 0 {
            return self.sel_fault(13, tss);
        }
        let d = self.read_desc(tss, 13)?;
        if !matches!(d.kind(), 1 | 9) {
            return self.sel_fault(13, tss);
        }
        if !d.present() {
            return self.sel_fault(11, tss);
        }
        self.task_switch(tss, d, why, error)
    }

    /// IRET with NT set.
    pub(crate) fn task_return(&mut self) -> R<()> {
        let base = self.tr.base;
        let link = self.as_system(|c| c.ld::<u16>(base))? as u16;
        if link & 4 != 0 || link & !3 == 0 {
            return self.sel_fault(10, link);
        }
        let d = self.read_desc(link, 10)?;
        if !matches!(d.kind(), 3 | 11) {
            return self.sel_fault(10, link);
        }
        if !d.present() {
            return self.sel_fault(11, link);
        }
        self.task_switch(link, d, Why::Return, None)
    }

    /// Switch to the task of TSS descriptor `d`; `self.rip` is where the old task resumes.
    pub(crate) fn task_switch(&mut self, sel: u16, d: Desc, why: Why, error: Option<u32>) -> R<()> {
        let wide = d.kind() & 8 != 0;
        let need = if wide { 0x67 } else { 0x2B };
        if d.limit() < need {
            return self.sel_fault(10, sel);
        }
        let old_wide = self.tr.attr & 8 != 0;
        let old_base = self.tr.base;
        let new_base = d.base();
        let mut flags = self.rflags();
        if why == Why::Return {
            flags &= !NT;
        }
        // Save the old task.
        let rip = self.rip;
        self.as_system(|c| {
            if old_wide {
                c.wr::<u32>(old_base + 0x20, rip)?;
                c.wr::<u32>(old_base + 0x24, flags)?;
                for i in 0..8 {
                    let v = c.st.gpr[i as usize];
                    c.wr::<u32>(old_base + 0x28 + 4 * i, v)?;
                }
                for i in 0..6 {
                    let v = c.segs[i as usize].selector as u64;
                    c.wr::<u16>(old_base + 0x48 + 4 * i, v)?;
                }
            } else {
                c.wr::<u16>(old_base + 0xE, rip)?;
                c.wr::<u16>(old_base + 0x10, flags)?;
                for i in 0..8 {
                    let v = c.st.gpr[i as usize];
                    c.wr::<u16>(old_base + 0x12 + 2 * i, v)?;
                }
                for i in 0..4 {
                    let v = c.segs[i as usize].selector as u64;
                    c.wr::<u16>(old_base + 0x22 + 2 * i, v)?;
                }
            }
            Ok(())
        })?;
        // Read the new one.
        let mut gpr = [0u64; 8];
        let mut sels = [0u16; 6];
        let (mut cr3, ip, mut new_flags, ldt, trap);
        if wide {
            (cr3, ip, new_flags, ldt, trap) = self.as_system(|c| {
                for (i, g) in gpr.iter_mut().enumerate() {
                    *g = c.ld::<u32>(new_base + 0x28 + 4 * i as u64)?;
                }
                for (i, s) in sels.iter_mut().enumerate() {
                    *s = c.ld::<u16>(new_base + 0x48 + 4 * i as u64)? as u16;
                }
                Ok((
                    c.ld::<u32>(new_base + 0x1C)?,
                    c.ld::<u32>(new_base + 0x20)?,
                    c.ld::<u32>(new_base + 0x24)?,
                    c.ld::<u16>(new_base + 0x60)? as u16,
                    c.ld::<u16>(new_base + 0x64)? & 1 != 0,
                ))
            })?;
        } else {
            (cr3, ip, new_flags, ldt, trap) = self.as_system(|c| {
                for (i, g) in gpr.iter_mut().enumerate() {
                    *g = c.ld::<u16>(new_base + 0x12 + 2 * i as u64)? | 0xFFFF_0000;
                }
                for (i, s) in sels[..4].iter_mut().enumerate() {
                    *s = c.ld::<u16>(new_base + 0x22 + 2 * i as u64)? as u16;
                }
                Ok((
                    c.cr3,
                    c.ld::<u16>(new_base + 0xE)?,
                    c.ld::<u16>(new_base + 0x10)?,
                    c.ld::<u16>(new_base + 0x2A)? as u16,
                    false,
                ))
            })?;
        }
        let old_tr = self.tr.selector;
        if matches!(why, Why::Jump | Why::Return) {
            self.mark_desc(old_tr, 0, 0x200)?;
        }
        if why != Why::Return {
            self.mark_desc(sel, 0x200, 0)?;
        }
        if matches!(why, Why::Call | Why::Interrupt) {
            self.as_system(|c| c.wr::<u16>(new_base, old_tr as u64))?;
            new_flags |= NT;
        }
        // Commit. Faults from here on belong to the new task.
        self.tr = d.segment(sel);
        self.tr.attr |= 2;
        self.st.cr0 |= CR0_TS;
        if wide && self.st.cr0 & CR0_PG != 0 {
            cr3 &= 0xFFFF_FFFF;
            if self.st.cr4 & CR4_PAE != 0 {
                self.load_pdptes(cr3)?;
            }
            self.cr3 = cr3;
            self.flush_tlb();
        }
        for (i, g) in gpr.iter().enumerate() {
            self.st.gpr[i] = *g;
        }
        self.set_rflags(new_flags | 2);
        self.rip = ip;
        self.dr[7] &= !0x155;
        self.debug_changed();
        self.ldtr = Default::default();
        self.ldtr.selector = ldt;
        for (s, sel) in self.segs.iter_mut().zip(sels) {
            *s = crate::state::Segment { selector: sel, base: 0, limit: 0, attr: 0 };
        }
        if new_flags & VM != 0 {
            self.cpl = 3;
            self.set_vm86_segments(sels);
            self.update_mode();
        } else {
            self.cpl = (sels[CS] & 3) as u8;
            if ldt & !3 != 0 {
                let l = self.read_desc(ldt, 10)?;
                if ldt & 4 != 0 || l.kind() != 2 || !l.present() {
                    return self.sel_fault(10, ldt);
                }
                self.ldtr = l.segment(ldt);
            }
            let cs = sels[CS];
            if cs & !3 == 0 {
                return self.sel_fault(10, cs);
            }
            let cd = self.read_desc(cs, 10)?;
            let rpl = (cs & 3) as u8;
            let fits = if cd.conforming() { cd.dpl() <= rpl } else { cd.dpl() == rpl };
            if !cd.is_code() || !fits {
                return self.sel_fault(10, cs);
            }
            if !cd.present() {
                return self.sel_fault(11, cs);
            }
            let cpl = self.cpl;
            self.load_ss(sels[SS], cpl, 10)?;
            self.set_cs(cs, cd, cpl)?;
            for i in [ES, DS, FS, GS] {
                if let Err(f) = self.load_seg(i, sels[i]) {
                    if self.fault.vector == 13 {
                        self.fault.vector = 10;
                    }
                    return Err(f);
                }
            }
        }
        if let Some(e) = error {
            self.push_sz(if wide { 4 } else { 2 }, e as u64)?;
        }
        if self.rip > self.segs[CS].limit as u64 {
            return self.gp(0);
        }
        if trap {
            self.pending_db |= 0x8000;
            self.attention = true;
        }
        self.flags_changed();
        Ok(())
    }
}
