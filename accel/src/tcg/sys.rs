//! System instructions.

use super::access::canonical;
use super::alu::read_rm;
use super::flags::*;
use super::op::*;
use super::paging::*;
use super::SoftCpu;
use crate::state::Segment;
use crate::Exception;

pub fn ud(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.ud()
}
pub fn too_long(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.gp(0)
}

impl SoftCpu {
    fn need_cpl0(&mut self) -> R<()> {
        if self.cpl != 0 {
            return self.gp(0);
        }
        Ok(())
    }

    /// Opcode of the instruction in hand.
    pub(crate) fn cur_opcode(&self) -> u8 {
        // SAFETY: as in `position`.
        unsafe { (*self.cur).opcode }
    }

    /// The I/O permission check (SDM vol. 1, section 19.5).
    pub(crate) fn check_io(&mut self, port: u16, size: u8) -> R<()> {
        if self.st.cr0 & CR0_PE == 0 || (!self.vm86() && self.cpl as u64 <= self.iopl()) {
            return Ok(());
        }
        if self.tr.attr & 8 == 0 || self.tr.limit < 0x67 {
            return self.gp(0);
        }
        let base = self.tr.base;
        let limit = self.tr.limit as u64;
        let map = self.as_system(|c| c.ld::<u16>(base + 0x66))?;
        let at = map + port as u64 / 8;
        if at + 1 > limit {
            return self.gp(0);
        }
        let bits = self.as_system(|c| c.ld::<u16>(base + at))?;
        let mask = (1u64 << size) - 1;
        if bits >> (port & 7) & mask != 0 {
            return self.gp(0);
        }
        Ok(())
    }

    pub(crate) fn port_in(&mut self, port: u16, size: u8) -> u32 {
        let position = self.position();
        let v = self.bus().io_read(position, port, size);
        self.after_bus();
        v
    }
    pub(crate) fn port_out(&mut self, port: u16, size: u8, v: u32) {
        let position = self.position();
        self.bus().io_write(position, port, size, v);
        self.after_bus();
    }

    /// No interrupts until after the next instruction.
    pub(crate) fn block_interrupts(&mut self) {
        self.shadow = true;
        self.attend();
    }

    /// The time-stamp counter at the instruction in hand.
    /// Ticks of the TSC in so many nanoseconds.
    fn ticks(&self, ns: u64) -> u64 {
        match self.tsc_khz {
            super::TSC_KHZ => ns,
            khz => (u128::from(ns) * u128::from(khz) / 1_000_000) as u64,
        }
    }

    pub(crate) fn tsc(&mut self) -> u64 {
        let position = self.position();
        let now = self.bus().clock_ns(position);
        self.ticks(now).wrapping_add(self.msr.tsc_adjust)
    }

    fn set_cr0(&mut self, v: u64) -> R<()> {
        let old = self.st.cr0;
        if v >> 32 != 0 || v & CR0_PG != 0 && v & CR0_PE == 0 || v & CR0_NW != 0 && v & CR0_CD == 0 {
            return self.gp(0);
        }
        let new = v & 0xE005_003F | 0x10;
        if (old ^ new) & CR0_PG != 0 {
            if new & CR0_PG != 0 {
                if self.efer & EFER_LME != 0 {
                    if self.st.cr4 & CR4_PAE == 0 || self.segs[CS].attr & 0x2000 != 0 {
                        return self.gp(0);
                    }
                    self.efer |= EFER_LMA;
                } else if self.st.cr4 & CR4_PAE != 0 {
                    let cr3 = self.cr3;
                    self.load_pdptes(cr3)?;
                }
            } else {
                if self.long || self.st.cr4 & CR4_PCIDE != 0 {
                    return self.gp(0);
                }
                self.efer &= !EFER_LMA;
            }
        }
        self.st.cr0 = new;
        if (old ^ new) & (CR0_PG | CR0_PE | CR0_WP | CR0_AM) != 0 {
            if old & CR0_PE == 0 && new & CR0_PE != 0 {
                self.cpl = 0;
            }
            // Firmware and loaders change PE often, with paging off.
            if (old ^ new) & (CR0_PG | CR0_WP) != 0 {
                self.flush_tlb();
            }
            self.update_mode();
            self.flags_changed();
        }
        Ok(())
    }

    fn set_cr3(&mut self, v: u64) -> R<()> {
        let mut v = v;
        if self.st.cr4 & CR4_PCIDE != 0 {
            v &= !(1 << 63);
        }
        if self.lma() {
            if v & !(self.phys_mask | 0xFFF) != 0 {
                return self.gp(0);
            }
        } else {
            v &= 0xFFFF_FFFF;
            if self.st.cr0 & CR0_PG != 0 && self.st.cr4 & CR4_PAE != 0 {
                self.load_pdptes(v)?;
            }
            self.cr3 = v;
            self.flush_tlb();
            return Ok(());
        }
        self.switch_space(v);
        Ok(())
    }

    fn set_cr4(&mut self, v: u64) -> R<()> {
        let old = self.st.cr4;
        if v & !self.cr4_mask != 0 {
            return self.gp(0);
        }
        if self.lma() && v & CR4_PAE == 0 {
            return self.gp(0);
        }
        if (v & !old) & CR4_PCIDE != 0 && (!self.lma() || self.cr3 & 0xFFF != 0) {
            return self.gp(0);
        }
        if !self.lma() && self.st.cr0 & CR0_PG != 0 && v & CR4_PAE != 0 && old & CR4_PAE == 0 {
            let cr3 = self.cr3;
            self.load_pdptes(cr3)?;
        }
        self.st.cr4 = v;
        // Translations agree with the tables at all times: a guest that drops them, by PGE, has none dropped. These bits
        // change what the tables mean.
        if (old ^ v) & (CR4_PSE | CR4_PAE | CR4_SMEP | CR4_SMAP) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }
}

// ---- descriptor tables

/// SGDT, SIDT, SLDT, STR and SMSW above privilege level 0 fault under UMIP.
fn umip(c: &mut SoftCpu) -> R<()> {
    if c.st.cr4 & CR4_UMIP != 0 && c.cpl == 3 {
        return c.gp(0);
    }
    Ok(())
}
fn store_table(c: &mut SoftCpu, op: &Op, t: (u64, u16)) -> R<()> {
    umip(c)?;
    let lin = c.ea(op, if c.long { 10 } else { 6 }, true)?;
    let n = if c.long { 8 } else { 4 };
    c.check_write(lin.wrapping_add(2), n as u64)?;
    c.wr::<u16>(lin, t.1 as u64)?;
    c.store_sz(lin.wrapping_add(2), n, t.0)
}
pub fn sgdt(c: &mut SoftCpu, op: &Op) -> R<()> {
    store_table(c, op, c.gdt)
}
pub fn sidt(c: &mut SoftCpu, op: &Op) -> R<()> {
    store_table(c, op, c.idt)
}
fn load_table(c: &mut SoftCpu, op: &Op) -> R<(u64, u16)> {
    c.need_cpl0()?;
    let lin = c.ea(op, if c.long { 10 } else { 6 }, false)?;
    let limit = c.ld::<u16>(lin)? as u16;
    let n = if c.long { 8 } else { 4 };
    let mut base = c.load_sz(lin.wrapping_add(2), n)?;
    if !c.long && op.osz == 2 {
        base &= 0xFF_FFFF;
    }
    if !canonical(base) {
        return c.gp(0);
    }
    Ok((base, limit))
}
pub fn lgdt(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.gdt = load_table(c, op)?;
    Ok(())
}
pub fn lidt(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.idt = load_table(c, op)?;
    Ok(())
}
fn protected_only(c: &mut SoftCpu) -> R<()> {
    if !c.protected() {
        return c.ud();
    }
    Ok(())
}
fn store_sel(c: &mut SoftCpu, op: &Op, v: u64) -> R<()> {
    umip(c)?;
    if op.kind == K_REG {
        c.set_sz(op.rm, op.osz, v);
        return Ok(());
    }
    let lin = c.ea(op, 2, true)?;
    c.wr::<u16>(lin, v)
}
pub fn sldt(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    store_sel(c, op, c.ldtr.selector as u64)
}
pub fn str(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    store_sel(c, op, c.tr.selector as u64)
}
/// The upper half of a system descriptor's base in IA-32e mode.
fn system_base(c: &mut SoftCpu, sel: u16, base: u64) -> R<u64> {
    if !c.lma() {
        return Ok(base);
    }
    let Some(at) = c.desc_addr(sel, 16) else {
        return c.sel_fault(13, sel);
    };
    let (hi, kind) = c.as_system(|c| Ok((c.ld::<u32>(at + 8)?, c.ld::<u32>(at + 12)?)))?;
    let base = base | hi << 32;
    if kind & 0x1F00 != 0 || !canonical(base) {
        return c.sel_fault(13, sel);
    }
    Ok(base)
}
pub fn lldt(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    c.need_cpl0()?;
    let sel = read_rm::<u16>(c, op)? as u16;
    if sel & !3 == 0 {
        c.ldtr = Segment { selector: sel, ..Default::default() };
        return Ok(());
    }
    if sel & 4 != 0 {
        return c.sel_fault(13, sel);
    }
    let d = c.read_desc(sel, 13)?;
    if d.kind() != 2 {
        return c.sel_fault(13, sel);
    }
    if !d.present() {
        return c.sel_fault(11, sel);
    }
    let base = system_base(c, sel, d.base())?;
    c.ldtr = Segment { base, ..d.segment(sel) };
    Ok(())
}
pub fn ltr(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    c.need_cpl0()?;
    let sel = read_rm::<u16>(c, op)? as u16;
    if sel & !3 == 0 {
        return c.gp(0);
    }
    if sel & 4 != 0 {
        return c.sel_fault(13, sel);
    }
    let d = c.read_desc(sel, 13)?;
    let ok = if c.lma() { d.kind() == 9 } else { matches!(d.kind(), 1 | 9) };
    if !ok {
        return c.sel_fault(13, sel);
    }
    if !d.present() {
        return c.sel_fault(11, sel);
    }
    let base = system_base(c, sel, d.base())?;
    c.mark_desc(sel, 0x200, 0)?;
    let mut s = d.segment(sel);
    s.base = base;
    s.attr |= 2;
    c.tr = s;
    Ok(())
}
/// The descriptor that LAR, LSL, VERR and VERW look at, if it is visible.
fn visible(c: &mut SoftCpu, sel: u16) -> R<Option<super::segment::Desc>> {
    if sel & !3 == 0 || c.desc_addr(sel, 8).is_none() {
        return Ok(None);
    }
    let d = c.read_desc(sel, 13)?;
    let conforming = d.is_code() && d.conforming();
    if !conforming && d.dpl() < c.cpl.max((sel & 3) as u8) {
        return Ok(None);
    }
    Ok(Some(d))
}
fn ver(c: &mut SoftCpu, op: &Op, write: bool) -> R<()> {
    protected_only(c)?;
    let sel = read_rm::<u16>(c, op)? as u16;
    let d = visible(c, sel)?;
    let ok = d.is_some_and(|d| {
        d.hi & 0x1000 != 0
            && if write { !d.is_code() && d.hi & 0x200 != 0 } else { !d.is_code() || d.hi & 0x200 != 0 }
    });
    c.set_zf(ok);
    Ok(())
}
pub fn verr(c: &mut SoftCpu, op: &Op) -> R<()> {
    ver(c, op, false)
}
pub fn verw(c: &mut SoftCpu, op: &Op) -> R<()> {
    ver(c, op, true)
}
pub fn lar(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    let sel = read_rm::<u16>(c, op)? as u16;
    let lma = c.lma();
    let d = visible(c, sel)?.filter(|d| {
        d.hi & 0x1000 != 0
            || match d.kind() {
                2 | 9 | 11 | 12 => true,
                1 | 3 | 4 | 5 => !lma,
                _ => false,
            }
    });
    if let Some(d) = d {
        c.set_sz(op.reg, op.osz, (d.hi & 0x00FF_FF00) as u64);
    }
    c.set_zf(d.is_some());
    Ok(())
}
pub fn lsl(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    let sel = read_rm::<u16>(c, op)? as u16;
    let lma = c.lma();
    let d = visible(c, sel)?.filter(|d| {
        d.hi & 0x1000 != 0
            || match d.kind() {
                2 | 9 | 11 => true,
                1 | 3 => !lma,
                _ => false,
            }
    });
    if let Some(d) = d {
        c.set_sz(op.reg, op.osz, d.limit() as u64);
    }
    c.set_zf(d.is_some());
    Ok(())
}
pub fn arpl(c: &mut SoftCpu, op: &Op) -> R<()> {
    protected_only(c)?;
    let src = c.get::<u16>(op.reg);
    // The operand is written only when its RPL changes.
    let zf = read_rm::<u16>(c, op)? & 3 < src & 3;
    if zf {
        super::alu::change_rm::<u16>(c, op, |_, v| v & !3 | src & 3)?;
    }
    c.set_zf(zf);
    Ok(())
}

// ---- control and debug registers

pub fn smsw(c: &mut SoftCpu, op: &Op) -> R<()> {
    store_sel(c, op, c.st.cr0)
}
pub fn lmsw(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.need_cpl0()?;
    let v = read_rm::<u16>(c, op)?;
    let old = c.st.cr0;
    // PE can be set but not cleared.
    let new = old & !0xE | v & 0xF;
    c.set_cr0(new)?;
    c.attend();
    Ok(())
}
pub fn clts(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.need_cpl0()?;
    c.st.cr0 &= !CR0_TS;
    Ok(())
}
pub fn mov_from_cr(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.need_cpl0()?;
    let v = match op.reg {
        0 => c.st.cr0,
        2 => c.cr2,
        3 => c.cr3,
        4 => c.st.cr4,
        8 => c.lapic.cr8(),
        _ => return c.ud(),
    };
    c.set_sz(op.rm, op.osz, v);
    Ok(())
}
pub fn mov_to_cr(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.need_cpl0()?;
    let v = c.get_sz(op.rm, op.osz);
    c.attend();
    match op.reg {
        0 => c.set_cr0(v),
        2 => {
            c.cr2 = v;
            Ok(())
        }
        3 => c.set_cr3(v),
        4 => c.set_cr4(v),
        8 => {
            if v > 15 {
                return c.gp(0);
            }
            c.lapic.set_tpr((v as u32) << 4);
            Ok(())
        }
        _ => c.ud(),
    }
}
fn debug_reg(c: &mut SoftCpu, op: &Op) -> R<usize> {
    let n = op.reg as usize;
    if n > 7 {
        return c.ud();
    }
    if matches!(n, 4 | 5) {
        if c.st.cr4 & CR4_DE != 0 {
            return c.ud();
        }
        c.need_cpl0()?;
        return Ok(n + 2);
    }
    c.need_cpl0()?;
    if c.dr[7] & 0x2000 != 0 {
        // General detect.
        c.db_bits = 0x2000;
        return c.raise(Exception::DB);
    }
    Ok(n)
}
pub fn mov_from_dr(c: &mut SoftCpu, op: &Op) -> R<()> {
    let n = debug_reg(c, op)?;
    let v = c.dr[n];
    c.set_sz(op.rm, op.osz, v);
    Ok(())
}
pub fn mov_to_dr(c: &mut SoftCpu, op: &Op) -> R<()> {
    let n = debug_reg(c, op)?;
    let v = c.get_sz(op.rm, op.osz);
    if n >= 6 && v >> 32 != 0 {
        return c.gp(0);
    }
    c.dr[n] = match n {
        6 => v & 0xE00F | 0xFFFF_0FF0,
        7 => v & 0xFFFF_2BFF | 0x400,
        _ => v,
    };
    c.debug_changed();
    c.attend();
    Ok(())
}

// ---- interrupts

pub fn cli(c: &mut SoftCpu, _: &Op) -> R<()> {
    if c.protected_or_vm() && c.iopl() < c.cpl as u64 {
        if c.vm86() && c.st.cr4 & CR4_VME != 0 || !c.vm86() && c.cpl == 3 && c.st.cr4 & CR4_PVI != 0 {
            c.eflags &= !VIF;
            return Ok(());
        }
        return c.gp(0);
    }
    // Nothing becomes due.
    c.eflags &= !IF;
    Ok(())
}
pub fn sti(c: &mut SoftCpu, _: &Op) -> R<()> {
    if c.protected_or_vm() && c.iopl() < c.cpl as u64 {
        let virtual_if =
            c.vm86() && c.st.cr4 & CR4_VME != 0 || !c.vm86() && c.cpl == 3 && c.st.cr4 & CR4_PVI != 0;
        if virtual_if && c.eflags & VIP == 0 {
            c.eflags |= VIF;
            return Ok(());
        }
        return c.gp(0);
    }
    if c.eflags & IF == 0 {
        c.eflags |= IF;
        c.flags_changed();
        c.block_interrupts();
    }
    Ok(())
}
pub fn hlt(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.need_cpl0()?;
    c.halted = true;
    c.attend();
    Ok(())
}
fn soft_int(c: &mut SoftCpu, op: &Op, vector: u8) -> R<()> {
    let next = c.next_ip(op);
    c.attend();
    c.atomically(|c| {
        c.rip = next;
        c.interrupt(vector, true, None, false)
    })
}
pub fn int_n(c: &mut SoftCpu, op: &Op) -> R<()> {
    soft_int(c, op, op.imm as u8)
}
pub fn int3(c: &mut SoftCpu, op: &Op) -> R<()> {
    soft_int(c, op, 3)
}
pub fn into(c: &mut SoftCpu, op: &Op) -> R<()> {
    if !c.of() {
        return Ok(());
    }
    soft_int(c, op, 4)
}
/// INT1: like a hardware #DB, no privilege check.
pub fn int1(c: &mut SoftCpu, op: &Op) -> R<()> {
    let next = c.next_ip(op);
    c.attend();
    c.atomically(|c| {
        c.rip = next;
        c.interrupt(1, false, None, false)
    })
}

// ---- ports

pub fn in_imm(c: &mut SoftCpu, op: &Op) -> R<()> {
    input(c, op, op.imm as u16)
}
pub fn in_dx(c: &mut SoftCpu, op: &Op) -> R<()> {
    input(c, op, c.st.gpr[RDX] as u16)
}
fn input(c: &mut SoftCpu, op: &Op, port: u16) -> R<()> {
    c.check_io(port, op.osz)?;
    let v = c.port_in(port, op.osz);
    c.set_sz(0, op.osz, v as u64);
    Ok(())
}
pub fn out_imm(c: &mut SoftCpu, op: &Op) -> R<()> {
    output(c, op, op.imm as u16)
}
pub fn out_dx(c: &mut SoftCpu, op: &Op) -> R<()> {
    output(c, op, c.st.gpr[RDX] as u16)
}
fn output(c: &mut SoftCpu, op: &Op, port: u16) -> R<()> {
    c.check_io(port, op.osz)?;
    let v = c.get_sz(0, op.osz) as u32;
    c.port_out(port, op.osz, v);
    Ok(())
}

// ---- fast system calls. SYSCALL works in 64-bit mode only (as Intel's), SYSENTER in all protected modes.

fn flat(selector: u16, attr: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attr }
}
pub fn syscall(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.efer & EFER_SCE == 0 || !c.protected() {
        return c.ud();
    }
    // AMD's SYSCALL from compatibility mode is offered too (CSTAR); legacy mode is not.
    if !c.lma() {
        return c.ud();
    }
    let flags = c.rflags();
    c.st.gpr[RCX] = c.next_ip(op);
    c.st.gpr[11] = flags & !RF;
    let cs = (c.msr.star >> 32) as u16 & !3;
    c.rip = if c.long { c.msr.lstar } else { c.msr.cstar };
    c.cpl = 0;
    c.segs[CS] = flat(cs, 0xA09B);
    c.segs[SS] = flat(cs + 8, 0xC093);
    c.set_rflags(flags & !(c.msr.sfmask | RF) | 2);
    c.update_mode();
    c.attend();
    Ok(())
}
pub fn sysret(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.efer & EFER_SCE == 0 || !c.lma() {
        return c.ud();
    }
    c.need_cpl0()?;
    let base = (c.msr.star >> 48) as u16;
    if op.osz == 8 {
        let rip = c.st.gpr[RCX];
        if !canonical(rip) {
            return c.gp(0);
        }
        c.rip = rip;
        c.segs[CS] = flat(base.wrapping_add(16) | 3, 0xA0FB);
    } else {
        c.rip = c.st.gpr[RCX] & 0xFFFF_FFFF;
        c.segs[CS] = flat(base | 3, 0xC0FB);
    }
    c.segs[SS] = flat(base.wrapping_add(8) | 3, 0xC0F3);
    c.cpl = 3;
    let f = c.st.gpr[11] & 0x3C_7FD7 | 2;
    c.set_rflags(f);
    c.update_mode();
    c.attend();
    Ok(())
}
pub fn sysenter(c: &mut SoftCpu, _: &Op) -> R<()> {
    if !c.protected_or_vm() || c.msr.sysenter_cs & !3 == 0 {
        return c.gp(0);
    }
    let cs = c.msr.sysenter_cs as u16 & !3;
    let lma = c.lma();
    let f = c.rflags() & !(VM | IF | RF);
    c.set_rflags(f);
    c.cpl = 0;
    c.segs[CS] = flat(cs, if lma { 0xA09B } else { 0xC09B });
    c.segs[SS] = flat(cs + 8, 0xC093);
    let m = if lma { u64::MAX } else { 0xFFFF_FFFF };
    c.st.gpr[RSP] = c.msr.sysenter_esp & m;
    c.rip = c.msr.sysenter_eip & m;
    c.update_mode();
    c.attend();
    Ok(())
}
pub fn sysexit(c: &mut SoftCpu, op: &Op) -> R<()> {
    if !c.protected() || c.msr.sysenter_cs & !3 == 0 || c.cpl != 0 {
        return c.gp(0);
    }
    let cs = c.msr.sysenter_cs as u16 & !3;
    let long = op.osz == 8;
    let m = if long { u64::MAX } else { 0xFFFF_FFFF };
    let (ip, sp) = (c.st.gpr[RDX] & m, c.st.gpr[RCX] & m);
    if long && !(canonical(ip) && canonical(sp)) {
        return c.gp(0);
    }
    let cs = cs.wrapping_add(if long { 32 } else { 16 });
    c.segs[CS] = flat(cs | 3, if long { 0xA0FB } else { 0xC0FB });
    c.segs[SS] = flat(cs.wrapping_add(8) | 3, 0xC0F3);
    c.cpl = 3;
    c.rip = ip;
    c.st.gpr[RSP] = sp;
    c.update_mode();
    c.attend();
    Ok(())
}
pub fn swapgs(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.need_cpl0()?;
    std::mem::swap(&mut c.segs[GS].base, &mut c.msr.kernel_gs_base);
    Ok(())
}
pub fn fsgsbase(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.st.cr4 & CR4_FSGSBASE == 0 {
        return c.ud();
    }
    let seg = if op.modrm_reg() & 1 == 0 { FS } else { GS };
    if op.modrm_reg() & 2 == 0 {
        let v = c.segs[seg].base;
        c.set_sz(op.rm, op.osz, v);
    } else {
        let v = c.get_sz(op.rm, op.osz);
        if !canonical(v) {
            return c.gp(0);
        }
        c.segs[seg].base = v;
    }
    Ok(())
}
impl Op {
    fn modrm_reg(&self) -> u8 {
        self.reg & 7
    }
}

// ---- others

pub fn cpuid(c: &mut SoftCpu, _: &Op) -> R<()> {
    let (leaf, sub) = (c.st.gpr[RAX] as u32, c.st.gpr[RCX] as u32);
    let r = c.cpuid_leaf(leaf, sub);
    for (i, v) in [RAX, RBX, RCX, RDX].into_iter().zip(r) {
        c.st.gpr[i] = v as u64;
    }
    Ok(())
}
fn tsd(c: &mut SoftCpu) -> R<()> {
    if c.st.cr4 & CR4_TSD != 0 && c.cpl != 0 {
        return c.gp(0);
    }
    Ok(())
}
pub fn rdtsc(c: &mut SoftCpu, _: &Op) -> R<()> {
    tsd(c)?;
    let t = c.tsc();
    c.set::<u32>(0, t);
    c.set::<u32>(2, t >> 32);
    Ok(())
}
pub fn rdtscp(c: &mut SoftCpu, op: &Op) -> R<()> {
    rdtsc(c, op)?;
    c.st.gpr[RCX] = c.msr.tsc_aux & 0xFFFF_FFFF;
    Ok(())
}
pub fn rdpid(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.msr.tsc_aux & 0xFFFF_FFFF;
    c.set::<u64>(op.rm, v);
    Ok(())
}
/// There are no performance counters.
pub fn rdpmc(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.gp(0)
}
pub fn rdrand(c: &mut SoftCpu, op: &Op) -> R<()> {
    let v = c.bus().random();
    c.after_bus();
    c.set_sz(op.rm, op.osz, v);
    c.set_arith_flags(CF);
    Ok(())
}
pub fn invd(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.need_cpl0()
}
pub fn invlpg(c: &mut SoftCpu, _: &Op) -> R<()> {
    // Translations always agree with the tables: see `paging`.
    c.need_cpl0()
}
pub fn invpcid(c: &mut SoftCpu, op: &Op) -> R<()> {
    c.need_cpl0()?;
    let kind = c.get_sz(op.reg, if c.long { 8 } else { 4 });
    let lin = c.ea(op, 16, false)?;
    let lo = c.ld::<u64>(lin)?;
    let addr = c.ld::<u64>(lin.wrapping_add(8))?;
    if kind > 3 || lo >> 12 != 0 || kind == 0 && !canonical(addr) {
        return c.gp(0);
    }
    Ok(())
}
pub fn clflush(c: &mut SoftCpu, op: &Op) -> R<()> {
    let lin = c.ea(op, 1, false)?;
    c.ld::<u8>(lin)?;
    Ok(())
}
pub fn clac(c: &mut SoftCpu, _: &Op) -> R<()> {
    smap_only(c)?;
    c.eflags &= !AC;
    c.update_mmu();
    Ok(())
}
pub fn stac(c: &mut SoftCpu, _: &Op) -> R<()> {
    smap_only(c)?;
    c.eflags |= AC;
    c.update_mmu();
    Ok(())
}
fn smap_only(c: &mut SoftCpu) -> R<()> {
    if c.cpl != 0 || c.cr4_mask & CR4_SMAP == 0 {
        return c.ud();
    }
    Ok(())
}
pub fn monitor(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.cpl != 0 {
        return c.ud();
    }
    let off = c.get_sz(0, op.asz);
    let lin = c.seg_lin(op.seg as usize, off, 1, false)?;
    c.ld::<u8>(lin)?;
    Ok(())
}
/// MWAIT ends at once, which the architecture allows; a guest that waits in a loop sees PAUSE.
pub fn mwait(c: &mut SoftCpu, op: &Op) -> R<()> {
    if c.cpl != 0 {
        return c.ud();
    }
    super::ctl::pause(c, op)
}
pub fn xgetbv(c: &mut SoftCpu, _: &Op) -> R<()> {
    if c.st.cr4 & CR4_OSXSAVE == 0 {
        return c.ud();
    }
    let v = match c.st.gpr[RCX] as u32 {
        0 => c.st.xcr0,
        1 if c.model.has_xgetbv1() => c.st.xcr0 & crate::simd::components_in_use(&c.st),
        _ => return c.gp(0),
    };
    c.set::<u32>(0, v);
    c.set::<u32>(2, v >> 32);
    Ok(())
}
pub fn xsetbv(c: &mut SoftCpu, _: &Op) -> R<()> {
    if c.st.cr4 & CR4_OSXSAVE == 0 {
        return c.ud();
    }
    c.need_cpl0()?;
    let v = c.get::<u32>(0) | c.get::<u32>(2) << 32;
    if c.st.gpr[RCX] as u32 != 0 || v & 1 == 0 || v & 6 == 4 || v & !c.xcr0_mask != 0 {
        return c.gp(0);
    }
    c.st.xcr0 = v;
    Ok(())
}
/// FWAIT: #NM with both MP and TS, a pending x87 exception.
pub fn fwait(c: &mut SoftCpu, _: &Op) -> R<()> {
    if c.st.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return c.raise(Exception::NM);
    }
    let x = &c.st.x87;
    if x.fsw & !x.fcw & 0x3F != 0 && c.st.cr0 & CR0_NE != 0 {
        return c.raise(Exception::MF);
    }
    Ok(())
}
pub fn rdmsr(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.need_cpl0()?;
    let n = c.st.gpr[RCX] as u32;
    let v = c.read_msr(n)?;
    c.set::<u32>(0, v);
    c.set::<u32>(2, v >> 32);
    Ok(())
}
pub fn wrmsr(c: &mut SoftCpu, _: &Op) -> R<()> {
    c.need_cpl0()?;
    let n = c.st.gpr[RCX] as u32;
    let v = c.get::<u32>(0) | c.get::<u32>(2) << 32;
    c.attend();
    c.write_msr(n, v)
}
