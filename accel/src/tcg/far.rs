//! Far jumps, calls, returns and IRET (SDM vol. 3, section 5.8; vol. 2 for each).

use super::access::canonical;
use super::flags::*;
use super::op::*;
use super::segment::Desc;
use super::SoftCpu;
use crate::Exception;

impl SoftCpu {
    /// New instruction pointer within a code segment about to be loaded.
    fn check_target(&mut self, d: Desc, off: u64) -> R<()> {
        if self.lma() && d.hi & 1 << 21 != 0 {
            if !canonical(off) {
                return self.gp(self.ext);
            }
        } else if off > d.limit() as u64 {
            return self.gp(self.ext);
        }
        Ok(())
    }

    /// In IA-32e mode a code segment must not have both L and D.
    fn bad_ld(&self, d: Desc) -> bool {
        self.lma() && d.hi >> 21 & 3 == 3
    }

    fn far_transfer(&mut self, sel: u16, off: u64, osz: u8, call: bool, next: u64) -> R<()> {
        if !self.protected() {
            if off > self.segs[CS].limit as u64 && off > 0xFFFF {
                return self.gp(0);
            }
            if call {
                let cs = self.segs[CS].selector as u64;
                self.push_sz(osz, cs)?;
                self.push_sz(osz, next)?;
            }
            self.set_cs_real(sel);
            self.rip = off;
            return Ok(());
        }
        if sel & !3 == 0 {
            return self.gp(0);
        }
        let d = self.read_desc(sel, 13)?;
        if d.hi & 0x1000 != 0 {
            if !d.is_code() || self.bad_ld(d) {
                return self.sel_fault(13, sel);
            }
            let rpl = (sel & 3) as u8;
            let ok =
                if d.conforming() { d.dpl() <= self.cpl } else { rpl <= self.cpl && d.dpl() == self.cpl };
            if !ok {
                return self.sel_fault(13, sel);
            }
            if !d.present() {
                return self.sel_fault(11, sel);
            }
            if call {
                let cs = self.segs[CS].selector as u64;
                self.push_sz(osz, cs)?;
                self.push_sz(osz, next)?;
            }
            self.check_target(d, off)?;
            let cpl = self.cpl;
            self.set_cs(sel, d, cpl)?;
            self.rip = off;
            return Ok(());
        }
        let rpl = (sel & 3) as u8;
        if d.dpl() < self.cpl.max(rpl) {
            return self.sel_fault(13, sel);
        }
        match d.kind() {
            12 => self.call_gate(sel, d, call, next),
            4 if !self.lma() => self.call_gate(sel, d, call, next),
            1 | 9 if !self.lma() => {
                if !d.present() {
                    return self.sel_fault(11, sel);
                }
                self.rip = next;
                self.task_switch(
                    sel,
                    d,
                    if call { super::task::Why::Call } else { super::task::Why::Jump },
                    None,
                )
            }
            5 if !self.lma() => {
                if !d.present() {
                    return self.sel_fault(11, sel);
                }
                let tss = (d.lo >> 16) as u16;
                self.rip = next;
                self.task_gate(tss, if call { super::task::Why::Call } else { super::task::Why::Jump }, None)
            }
            _ => self.sel_fault(13, sel),
        }
    }

    fn call_gate(&mut self, gate_sel: u16, g: Desc, call: bool, next: u64) -> R<()> {
        if !g.present() {
            return self.sel_fault(11, gate_sel);
        }
        let lma = self.lma();
        let sel = (g.lo >> 16) as u16;
        let mut off = (g.lo & 0xFFFF | g.hi & 0xFFFF_0000) as u64;
        let wide = g.kind() == 12;
        if !wide {
            off &= 0xFFFF;
        }
        if lma {
            let Some(at) = self.desc_addr(gate_sel, 16) else {
                return self.sel_fault(13, gate_sel);
            };
            let (hi, kind) = self.as_system(|c| Ok((c.ld::<u32>(at + 8)?, c.ld::<u32>(at + 12)?)))?;
            if kind & 0x1F00 != 0 {
                return self.sel_fault(13, gate_sel);
            }
            off |= hi << 32;
        }
        if sel & !3 == 0 {
            return self.gp(0);
        }
        let d = self.read_desc(sel, 13)?;
        if !d.is_code() || d.dpl() > self.cpl || lma && d.hi >> 21 & 3 != 1 {
            return self.sel_fault(13, sel);
        }
        if !d.present() {
            return self.sel_fault(11, sel);
        }
        if !d.conforming() && d.dpl() < self.cpl {
            if !call {
                return self.sel_fault(13, sel);
            }
            let new = d.dpl();
            let size = if lma {
                8
            } else if wide {
                4
            } else {
                2
            };
            let (old_ss, old_sp) = (self.segs[SS].selector, self.st.gpr[RSP] & self.sp_mask);
            let old_cs = self.segs[CS].selector;
            let mut params = [0u64; 31];
            let count = if lma { 0 } else { (g.hi & 31) as usize };
            for (i, p) in params[..count].iter_mut().enumerate() {
                *p = self.peek_sz(i as u64 * size as u64, size)?;
            }
            self.switch_stack(new)?;
            self.set_cs(sel, d, new)?;
            self.push_sz(size, old_ss as u64)?;
            self.push_sz(size, old_sp)?;
            for p in params[..count].iter().rev() {
                self.push_sz(size, *p)?;
            }
            self.push_sz(size, old_cs as u64)?;
            self.push_sz(size, next)?;
        } else {
            if !call && !d.conforming() && d.dpl() != self.cpl {
                return self.sel_fault(13, sel);
            }
            let size = if lma {
                8
            } else if wide {
                4
            } else {
                2
            };
            if call {
                let cs = self.segs[CS].selector as u64;
                self.push_in(size, cs, lma)?;
                self.push_in(size, next, lma)?;
            }
            let cpl = self.cpl;
            self.set_cs(sel, d, cpl)?;
        }
        self.check_target(d, off)?;
        self.rip = off;
        Ok(())
    }

    /// Push with the stack of 64-bit mode even where the old code segment is a compatibility one.
    fn push_in(&mut self, size: u8, v: u64, long: bool) -> R<()> {
        let (old_long, old_mask) = (self.long, self.sp_mask);
        if long {
            self.long = true;
            self.sp_mask = u64::MAX;
        }
        let r = self.push_sz(size, v);
        self.long = old_long;
        self.sp_mask = old_mask;
        r
    }

    /// SS:RSP for privilege level `cpl` from the TSS.
    pub(crate) fn switch_stack(&mut self, cpl: u8) -> R<()> {
        if self.lma() {
            let rsp = self.tss64(4 + 8 * cpl as u64)?;
            if !canonical(rsp) {
                return self.raise(Exception::ss(self.ext));
            }
            self.segs[SS] =
                crate::state::Segment { selector: cpl as u16, base: 0, limit: 0, attr: (cpl as u16) << 5 };
            self.st.gpr[RSP] = rsp;
            return Ok(());
        }
        let wide = self.tr.attr & 8 != 0;
        let tr = self.tr.selector;
        let (at, len) = if wide { (4 + 8 * cpl as u64, 8) } else { (2 + 4 * cpl as u64, 4) };
        if at + len - 1 > self.tr.limit as u64 {
            return self.sel_fault(10, tr);
        }
        let base = self.tr.base + at;
        let (sp, ss) = self.as_system(|c| {
            if wide {
                Ok((c.ld::<u32>(base)?, c.ld::<u16>(base + 4)? as u16))
            } else {
                Ok((c.ld::<u16>(base)?, c.ld::<u16>(base + 2)? as u16))
            }
        })?;
        self.load_ss(ss, cpl, 10)?;
        let m = self.ss_mask();
        self.st.gpr[RSP] = self.st.gpr[RSP] & !m & 0xFFFF_FFFF | sp & m;
        Ok(())
    }

    fn ss_mask(&self) -> u64 {
        if self.segs[SS].attr & 0x4000 != 0 {
            0xFFFF_FFFF
        } else {
            0xFFFF
        }
    }

    /// Load SS for another privilege level; faults are `vector` (or #SS for not present).
    pub(crate) fn load_ss(&mut self, sel: u16, cpl: u8, vector: u8) -> R<()> {
        if sel & !3 == 0 {
            return self.sel_fault(vector, sel);
        }
        let d = self.read_desc(sel, vector)?;
        if (sel & 3) as u8 != cpl || d.hi & 0x1A00 != 0x1200 || d.dpl() != cpl {
            return self.sel_fault(vector, sel);
        }
        if !d.present() {
            return self.sel_fault(12, sel);
        }
        self.mark_accessed(sel, d)?;
        let mut s = d.segment(sel);
        s.attr |= 1;
        self.segs[SS] = s;
        Ok(())
    }

    /// A quadword of the 64-bit TSS.
    pub(crate) fn tss64(&mut self, at: u64) -> R<u64> {
        if at + 7 > self.tr.limit as u64 {
            let tr = self.tr.selector;
            return self.sel_fault(10, tr);
        }
        let a = self.tr.base.wrapping_add(at);
        self.as_system(|c| c.ld::<u64>(a))
    }

    /// Far return to `cs:ip`, popped from the stack at `osz`; `extra` more bytes are released.
    fn far_return(&mut self, osz: u8, extra: u64, iret: bool) -> R<()> {
        let size = osz as u64;
        let ip = self.peek_sz(0, osz)?;
        let cs = self.peek_sz(size, osz)? as u16;
        let flags = if iret { self.peek_sz(2 * size, osz)? } else { 0 };
        let words = if iret { 3 } else { 2 };
        if iret && !self.lma() && flags & VM != 0 && self.cpl == 0 && osz == 4 {
            return self.iret_to_vm86(ip, cs, flags);
        }
        if cs & !3 == 0 {
            return self.gp(0);
        }
        let d = self.read_desc(cs, 13)?;
        let rpl = (cs & 3) as u8;
        if !d.is_code() || rpl < self.cpl || self.bad_ld(d) {
            return self.sel_fault(13, cs);
        }
        if d.conforming() && d.dpl() > rpl || !d.conforming() && d.dpl() != rpl {
            return self.sel_fault(13, cs);
        }
        if !d.present() {
            return self.sel_fault(11, cs);
        }
        let old_cpl = self.cpl;
        let old_iopl = self.iopl();
        let long_iret = iret && self.long;
        if rpl > self.cpl || long_iret {
            let at = words * size + extra;
            let sp = self.peek_sz(at, osz)?;
            let ss = self.peek_sz(at + size, osz)? as u16;
            let to_long = self.lma() && d.hi & 1 << 21 != 0;
            self.check_target(d, ip)?;
            // SS is checked against the new privilege level.
            if ss & !3 == 0 {
                if !(to_long && rpl < 3 && (ss & 3) as u8 == rpl) {
                    return self.gp(0);
                }
                self.segs[SS] =
                    crate::state::Segment { selector: ss, base: 0, limit: 0, attr: (rpl as u16) << 5 };
            } else {
                self.load_ss(ss, rpl, 13)?;
            }
            self.set_cs(cs, d, rpl)?;
            let m = self.sp_mask;
            let keep = if self.lma() { 0 } else { self.st.gpr[RSP] & 0xFFFF_FFFF & !m };
            self.st.gpr[RSP] = keep | sp & m;
            if !iret {
                self.add_sp(extra);
            }
            if rpl > old_cpl {
                self.drop_privileged_segments();
            }
        } else {
            self.check_target(d, ip)?;
            self.add_sp(words * size + extra);
            self.set_cs(cs, d, rpl)?;
        }
        self.rip = ip;
        if iret {
            let mut change = CF | PF | AF | ZF | SF | OF | TF | DF | NT;
            if osz != 2 {
                change |= RF | AC | ID;
            }
            if old_cpl == 0 {
                change |= IOPL;
                if osz != 2 {
                    change |= VIF | VIP;
                }
            }
            if old_cpl as u64 <= old_iopl {
                change |= IF;
            }
            let f = self.rflags() & !change | flags & change;
            self.set_rflags(f);
        }
        Ok(())
    }

    fn iret_to_vm86(&mut self, ip: u64, cs: u16, flags: u64) -> R<()> {
        let mut v = [0; 6];
        for (i, x) in v.iter_mut().enumerate() {
            *x = self.peek::<u32>(12 + 4 * i as u64)?;
        }
        let [esp, ss, es, ds, fs, gs] = v;
        self.set_rflags(flags | VM);
        self.cpl = 3;
        self.set_vm86_segments([es as u16, cs, ss as u16, ds as u16, fs as u16, gs as u16]);
        self.st.gpr[RSP] = esp;
        self.rip = ip & 0xFFFF;
        self.update_mode();
        Ok(())
    }

    fn iret_real(&mut self, osz: u8) -> R<()> {
        let size = osz as u64;
        let ip = self.peek_sz(0, osz)?;
        let cs = self.peek_sz(size, osz)? as u16;
        let f = self.peek_sz(2 * size, osz)?;
        if ip > self.segs[CS].limit as u64 {
            return self.gp(0);
        }
        let vm = self.vm86();
        if vm && self.iopl() < 3 {
            if self.st.cr4 & 1 == 0 || osz != 2 {
                return self.gp(0);
            }
            if f & TF != 0 || f & IF != 0 && self.eflags & VIP != 0 {
                return self.gp(0);
            }
            self.add_sp(6);
            let keep = self.rflags();
            self.set_rflags(
                keep & !0xFFFF & !VIF
                    | f & 0xFFFF & !(IF | IOPL)
                    | keep & (IF | IOPL)
                    | if f & IF != 0 { VIF } else { 0 },
            );
        } else {
            self.add_sp(3 * size);
            let mut change = CF | PF | AF | ZF | SF | OF | TF | IF | DF | NT;
            if !vm {
                change |= IOPL;
            }
            if osz == 4 {
                change |= RF | AC | ID;
            }
            let n = self.rflags() & !change | f & change;
            self.set_rflags(n);
        }
        self.set_cs_real(cs);
        self.rip = ip;
        Ok(())
    }
}

pub fn jmp_direct(c: &mut SoftCpu, op: &Op) -> R<()> {
    let next = c.next_ip(op);
    c.attend();
    c.atomically(|c| c.far_transfer(op.imm as u16, op.disp as u64, op.osz, false, next))
}
pub fn call_direct(c: &mut SoftCpu, op: &Op) -> R<()> {
    let next = c.next_ip(op);
    c.attend();
    c.atomically(|c| c.far_transfer(op.imm as u16, op.disp as u64, op.osz, true, next))
}
fn pointer(c: &mut SoftCpu, op: &Op) -> R<(u16, u64)> {
    let size = op.osz as u64;
    let lin = c.ea(op, size + 2, false)?;
    let off = c.load_sz(lin, op.osz)?;
    let sel = c.ld::<u16>(lin.wrapping_add(size))?;
    Ok((sel as u16, off))
}
pub fn jmp_mem(c: &mut SoftCpu, op: &Op) -> R<()> {
    let (sel, off) = pointer(c, op)?;
    let next = c.next_ip(op);
    c.attend();
    c.atomically(|c| c.far_transfer(sel, off, op.osz, false, next))
}
pub fn call_mem(c: &mut SoftCpu, op: &Op) -> R<()> {
    let (sel, off) = pointer(c, op)?;
    let next = c.next_ip(op);
    c.attend();
    c.atomically(|c| c.far_transfer(sel, off, op.osz, true, next))
}
pub fn ret_far(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.attend();
    c.atomically(|c| {
        if c.protected() {
            return c.far_return(op.osz, op.imm, false);
        }
        let ip = c.peek_sz(0, op.osz)?;
        let cs = c.peek_sz(op.osz as u64, op.osz)?;
        if ip > 0xFFFF && ip > c.segs[CS].limit as u64 {
            return c.gp(0);
        }
        c.add_sp(2 * op.osz as u64 + op.imm);
        c.set_cs_real(cs as u16);
        c.rip = ip;
        Ok(())
    })
}
pub fn iret(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.attend();
    c.atomically(|c| {
        if !c.protected() {
            c.iret_real(op.osz)?;
        } else if c.eflags & NT != 0 {
            if c.lma() {
                return c.gp(0);
            }
            let next = c.next_ip(op);
            c.rip = next;
            c.task_return()?;
        } else {
            c.far_return(op.osz, 0, true)?;
        }
        Ok(())
    })?;
    c.nmi_blocked = false;
    Ok(())
}
