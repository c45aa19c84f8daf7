//! Delivery of interrupts and exceptions (SDM vol. 3, chapter 6).

use super::access::canonical;
use super::flags::*;
use super::op::*;
use super::paging::*;
use super::task::Why;
use super::SoftCpu;
use crate::Exception;

fn contributory(v: u8) -> bool {
    matches!(v, 0 | 10..=13)
}

impl SoftCpu {
    /// Deliver the exception in `self.fault`, with double and triple faults. `self.rip` is the address to
    /// return to.
    pub(crate) fn deliver_exception(&mut self) {
        let mut e = self.fault;
        loop {
            if e.vector == 14 {
                self.cr2 = e.cr2;
            }
            if e.vector == 1 {
                self.dr[6] |= self.db_bits;
                self.db_bits = 0;
                self.dr[7] &= !0x2000;
            }
            // Faults push RF set, so that the instruction may resume.
            let rf = !matches!(e.vector, 1 | 3 | 4 | 8);
            self.note_delivery();
            self.ext = 1;
            let r = self.atomically(|c| c.interrupt(e.vector, false, e.error, rf));
            self.ext = 0;
            if r.is_ok() {
                return;
            }
            let second = self.fault;
            if second.vector == 14 {
                self.cr2 = second.cr2;
            }
            if e.vector == 8 {
                self.shutdown = true;
                self.attention = true;
                return;
            }
            let double = contributory(e.vector) && contributory(second.vector)
                || e.vector == 14 && (contributory(second.vector) || second.vector == 14);
            e = if double { Exception::with_error(8, 0) } else { second };
        }
    }

    /// Deliver an external interrupt or NMI.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) {
        self.note_delivery();
        self.ext = 1;
        let r = self.atomically(|c| c.interrupt(vector, false, None, false));
        self.ext = 0;
        if r.is_err() {
            self.deliver_exception();
        }
    }

    /// A guest that only ever takes exceptions retires nothing; let its clock tick all the same.
    fn note_delivery(&mut self) {
        if self.delivery_at != self.pos {
            self.delivery_at = self.pos;
            self.deliveries = 0;
        }
        self.deliveries += 1;
        if self.deliveries >= 64 {
            self.pos += 1;
        }
    }

    /// Transfer control to the handler of `vector`. `soft`: INT n, INT3, INTO.
    pub(crate) fn interrupt(&mut self, vector: u8, soft: bool, error: Option<u32>, rf: bool) -> R<()> {
        if self.st.cr0 & CR0_PE == 0 {
            return self.interrupt_real(vector);
        }
        let idt_error = (vector as u32) << 3 | 2 | self.ext;
        if self.vm86() && soft && self.iopl() < 3 {
            if self.st.cr4 & CR4_VME != 0 && !self.vme_trapped(vector)? {
                return self.interrupt_vme(vector);
            }
            if vector != 3 || self.cur_opcode() == 0xCD {
                return self.gp(0);
            }
        } else if self.vm86() && soft && self.st.cr4 & CR4_VME != 0 && !self.vme_trapped(vector)? {
            return self.interrupt_real(vector);
        }
        if self.lma() {
            return self.interrupt_long(vector, soft, error, rf);
        }
        if vector as u64 * 8 + 7 > self.idt.1 as u64 {
            return self.gp(idt_error);
        }
        let at = self.idt.0.wrapping_add(vector as u64 * 8) & 0xFFFF_FFFF;
        let g = self.as_system(|c| c.ld::<u64>(at))?;
        let hi = (g >> 32) as u32;
        let kind = hi >> 8 & 31;
        if !matches!(kind, 5 | 6 | 7 | 14 | 15) || soft && ((hi >> 13 & 3) as u8) < self.cpl {
            return self.gp(idt_error);
        }
        if hi & 0x8000 == 0 {
            return self.raise(Exception::with_error(11, idt_error));
        }
        let sel = (g >> 16) as u16;
        if kind == 5 {
            return self.task_gate(sel, Why::Interrupt, error);
        }
        let size = if kind & 8 != 0 { 4u8 } else { 2 };
        let mut off = g & 0xFFFF;
        if size == 4 {
            off |= (hi & 0xFFFF_0000) as u64;
        }
        if sel & !3 == 0 {
            return self.gp(self.ext);
        }
        let d = self.read_desc(sel, 13)?;
        if !d.is_code() || d.dpl() > self.cpl {
            return self.sel_fault(13, sel);
        }
        if !d.present() {
            return self.sel_fault(11, sel);
        }
        let flags = self.rflags() | if rf { RF } else { 0 };
        let (cs, ip) = (self.segs[CS].selector, self.rip);
        let vm = self.vm86();
        if !d.conforming() && d.dpl() < self.cpl {
            let (ss, sp) = (self.segs[SS].selector, self.st.gpr[RSP]);
            if vm && d.dpl() != 0 {
                return self.sel_fault(13, sel);
            }
            let sp = if vm {
                sp
            } else {
                sp & if self.sp_mask == 0xFFFF && size == 2 { 0xFFFF } else { 0xFFFF_FFFF }
            };
            let old = self.segs;
            if vm {
                self.eflags &= !VM;
            }
            self.switch_stack(d.dpl())?;
            self.set_cs(sel, d, d.dpl())?;
            if vm {
                for i in [GS, FS, DS, ES] {
                    self.push_sz(size, old[i].selector as u64)?;
                    self.segs[i] = Default::default();
                }
                self.update_mode();
            }
            self.push_sz(size, ss as u64)?;
            self.push_sz(size, sp)?;
        } else {
            if vm || !d.conforming() && d.dpl() != self.cpl {
                return self.sel_fault(13, sel);
            }
            let cpl = self.cpl;
            self.set_cs(sel, d, cpl)?;
        }
        self.push_sz(size, flags)?;
        self.push_sz(size, cs as u64)?;
        self.push_sz(size, ip)?;
        if let Some(e) = error {
            self.push_sz(size, e as u64)?;
        }
        if off > d.limit() as u64 {
            return self.gp(self.ext);
        }
        self.rip = off;
        let mut f = self.rflags() & !(TF | NT | RF | VM);
        if kind & 1 == 0 {
            f &= !IF;
        }
        self.set_rflags(f);
        self.attention = true;
        Ok(())
    }

    fn interrupt_long(&mut self, vector: u8, soft: bool, error: Option<u32>, rf: bool) -> R<()> {
        let idt_error = (vector as u32) << 3 | 2 | self.ext;
        if vector as u64 * 16 + 15 > self.idt.1 as u64 {
            return self.gp(idt_error);
        }
        let at = self.idt.0.wrapping_add(vector as u64 * 16);
        let (g, top) = self.as_system(|c| Ok((c.ld::<u64>(at)?, c.ld::<u64>(at + 8)?)))?;
        let hi = (g >> 32) as u32;
        let kind = hi >> 8 & 31;
        if !matches!(kind, 14 | 15) || soft && ((hi >> 13 & 3) as u8) < self.cpl {
            return self.gp(idt_error);
        }
        if hi & 0x8000 == 0 {
            return self.raise(Exception::with_error(11, idt_error));
        }
        let sel = (g >> 16) as u16;
        let off = g & 0xFFFF | (hi & 0xFFFF_0000) as u64 | top << 32;
        let ist = (hi & 7) as u64;
        if sel & !3 == 0 {
            return self.gp(self.ext);
        }
        let d = self.read_desc(sel, 13)?;
        if !d.is_code() || d.dpl() > self.cpl || d.hi >> 21 & 3 != 1 {
            return self.sel_fault(13, sel);
        }
        if !d.present() {
            return self.sel_fault(11, sel);
        }
        let flags = self.rflags() | if rf { RF } else { 0 };
        let (cs, ip) = (self.segs[CS].selector, self.rip);
        let (ss, old_sp) = (self.segs[SS].selector, self.st.gpr[RSP]);
        let inner = !d.conforming() && d.dpl() < self.cpl;
        let new_cpl = if d.conforming() { self.cpl } else { d.dpl() };
        if !inner && new_cpl != self.cpl {
            return self.sel_fault(13, sel);
        }
        let mut sp = old_sp;
        if ist != 0 {
            sp = self.tss64(0x1C + 8 * ist)?;
        } else if inner {
            sp = self.tss64(4 + 8 * new_cpl as u64)?;
        }
        if !canonical(sp) {
            return self.raise(Exception::ss(self.ext));
        }
        if inner {
            self.segs[SS] = crate::state::Segment {
                selector: new_cpl as u16,
                base: 0,
                limit: 0,
                attr: (new_cpl as u16) << 5,
            };
        }
        self.set_cs(sel, d, new_cpl)?;
        self.st.gpr[RSP] = sp & !15;
        self.push::<u64>(ss as u64)?;
        self.push::<u64>(old_sp)?;
        self.push::<u64>(flags)?;
        self.push::<u64>(cs as u64)?;
        self.push::<u64>(ip)?;
        if let Some(e) = error {
            self.push::<u64>(e as u64)?;
        }
        if !canonical(off) {
            return self.gp(self.ext);
        }
        self.rip = off;
        let mut f = self.rflags() & !(TF | NT | RF | VM);
        if kind & 1 == 0 {
            f &= !IF;
        }
        self.set_rflags(f);
        self.attention = true;
        Ok(())
    }

    fn interrupt_real(&mut self, vector: u8) -> R<()> {
        let (base, limit) = if self.vm86() { (0, 0x3FF) } else { (self.idt.0, self.idt.1 as u64) };
        if vector as u64 * 4 + 3 > limit {
            return self.gp((vector as u32) << 3 | 2 | self.ext);
        }
        let at = base.wrapping_add(vector as u64 * 4) & 0xFFFF_FFFF;
        let v = if self.vm86() { self.ld::<u32>(at)? } else { self.as_system(|c| c.ld::<u32>(at))? };
        let flags = self.rflags();
        let (cs, ip) = (self.segs[CS].selector as u64, self.rip);
        self.push::<u16>(flags)?;
        self.push::<u16>(cs)?;
        self.push::<u16>(ip)?;
        self.set_cs_real((v >> 16) as u16);
        self.rip = v & 0xFFFF;
        self.set_rflags(flags & !(IF | TF | AC | RF));
        self.attention = true;
        Ok(())
    }

    /// VME: whether the interrupt redirection bitmap sends INT n to the protected-mode handler.
    fn vme_trapped(&mut self, vector: u8) -> R<bool> {
        let base = self.tr.base;
        if self.tr.attr & 8 == 0 || self.tr.limit < 0x67 {
            return Ok(true);
        }
        let limit = self.tr.limit as u64;
        self.as_system(|c| {
            let map = c.ld::<u16>(base + 0x66)?;
            if map < 32 {
                return Ok(true);
            }
            let at = map - 32 + vector as u64 / 8;
            if at > limit {
                return Ok(true);
            }
            Ok(c.ld::<u8>(base + at)? >> (vector & 7) & 1 != 0)
        })
    }

    /// VME with IOPL < 3: through the virtual-8086 program's own table, with VIF in the place of IF.
    fn interrupt_vme(&mut self, vector: u8) -> R<()> {
        let v = self.ld::<u32>(vector as u64 * 4)?;
        let f = self.rflags();
        let image = f & !IF | if f & VIF != 0 { IF } else { 0 } | IOPL;
        let (cs, ip) = (self.segs[CS].selector as u64, self.rip);
        self.push::<u16>(image)?;
        self.push::<u16>(cs)?;
        self.push::<u16>(ip)?;
        self.set_cs_real((v >> 16) as u16);
        self.rip = v & 0xFFFF;
        self.set_rflags(f & !(VIF | TF));
        Ok(())
    }
}
