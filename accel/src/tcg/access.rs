//! Memory access: effective addresses, segment checks, loads and stores, physical access.

use super::op::*;
use super::paging::*;
use super::tlb;
use super::SoftCpu;
use crate::mem::{Backing, GuestMemory, CODE, TABLE, WRITE_FREE};
use crate::{Bus, Exception};

impl SoftCpu {
    #[inline(always)]
    pub(crate) fn mem(&self) -> &'static GuestMemory {
        // SAFETY: `run` sets `mem` to a reference that outlives the call, and only code under `run` comes
        // here; the 'static lifetime never leaves that code.
        unsafe { &*self.mem }
    }

    #[inline(always)]
    pub(crate) fn bus(&mut self) -> &'static mut dyn Bus {
        // SAFETY: as for `mem`; no two of these references live at the same time, since each is used for
        // one call.
        unsafe { &mut *self.bus }
    }

    /// The exact count of instructions retired before the one in hand.
    #[inline]
    pub(crate) fn position(&self) -> u64 {
        // SAFETY: `cur` points into the running block, which is kept until the block ends, or at the
        // static idle instruction.
        self.pos + unsafe { (*self.cur).idx } as u64
    }

    /// Leave the block after the instruction in hand and look at what happened.
    #[inline]
    pub(crate) fn attend(&mut self) {
        self.end = std::ptr::null();
        self.attention = true;
    }

    /// After every access to the bus.
    pub(crate) fn after_bus(&mut self) {
        if self.bus().break_requested() {
            self.brk = true;
            self.attend();
        }
        if self.bus().end_wanted() {
            // After the instruction in hand, unless it faults; after the next one where something is being delivered.
            self.limit = self.limit.min(self.position() + 1);
            self.end = std::ptr::null();
        }
        if self.mem().has_stale_code() || self.mem().generation() != self.generation {
            self.sync_memory();
            self.end = std::ptr::null();
        }
    }

    pub(crate) fn gp<T>(&mut self, error: u32) -> R<T> {
        self.fault = Exception::gp(error);
        Err(Fault)
    }
    pub(crate) fn raise<T>(&mut self, e: Exception) -> R<T> {
        self.fault = e;
        Err(Fault)
    }
    pub(crate) fn ud<T>(&mut self) -> R<T> {
        self.raise(Exception::UD)
    }

    // ---- effective addresses

    /// Offset part of the memory operand.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        let g = &self.st.gpr;
        let e = g[(op.base & 31) as usize]
            .wrapping_add(g[(op.index & 31) as usize] << (op.scale & 3))
            .wrapping_add(op.disp as u64);
        match op.asz {
            8 => e,
            4 => e & 0xFFFF_FFFF,
            _ => e & 0xFFFF,
        }
    }

    /// Linear address of the memory operand for `size` bytes.
    #[inline(always)]
    pub(crate) fn ea(&mut self, op: &Op, size: u64, write: bool) -> R<u64> {
        if op.kind == K_FLAT {
            let g = &self.st.gpr;
            return Ok(g[(op.base & 31) as usize]
                .wrapping_add(g[(op.index & 31) as usize] << (op.scale & 3))
                .wrapping_add(op.disp as u64));
        }
        let off = self.offset(op);
        self.seg_lin(op.seg as usize, off, size, write)
    }

    /// Linear address of `size` bytes at `seg:off`, with the checks of SDM vol. 3, section 5.3 to 5.5.
    #[inline]
    pub(crate) fn seg_lin(&mut self, seg: usize, off: u64, size: u64, write: bool) -> R<u64> {
        let s = &self.segs[seg];
        if self.long {
            return Ok(if seg >= FS { s.base.wrapping_add(off) } else { off });
        }
        let last = off.wrapping_add(size - 1);
        // Writable expand-up data, present: the common case.
        if s.attr & 0x9E == 0x92 && last <= s.limit as u64 {
            return Ok(s.base.wrapping_add(off) & 0xFFFF_FFFF);
        }
        self.seg_slow(seg, off, size, write)
    }

    #[cold]
    fn seg_slow(&mut self, seg: usize, off: u64, size: u64, write: bool) -> R<u64> {
        let s = self.segs[seg];
        let last = off.wrapping_add(size - 1);
        let t = s.attr;
        let protected = self.protected();
        let mut ok = t & 0x80 != 0;
        if protected {
            if t & 8 != 0 {
                ok &= !write && t & 2 != 0;
            } else if write {
                ok &= t & 2 != 0;
            }
        }
        if t & 0xC == 4 {
            let top = if t & 0x4000 != 0 { 0xFFFF_FFFF } else { 0xFFFF };
            ok &= off > s.limit as u64 && last <= top;
        } else {
            ok &= last <= s.limit as u64;
        }
        if !ok {
            self.fault = if seg == SS { Exception::ss(0) } else { Exception::gp(0) };
            return Err(Fault);
        }
        Ok(s.base.wrapping_add(off) & 0xFFFF_FFFF)
    }

    // ---- linear access

    #[inline(always)]
    pub(crate) fn ld<T: Int>(&mut self, lin: u64) -> R<u64> {
        let e = self.tlb[self.mmu].read(lin);
        if e.tag == lin & !0xFFF && lin & 0xFFF <= 4096 - T::BYTES {
            // SAFETY: a matching tag says that `host` is a host page of guest memory, and the access
            // lies within the page.
            return Ok(unsafe { e.host.add((lin & 0xFFF) as usize).cast::<T>().read_unaligned() }.to64());
        }
        self.load_slow(lin, T::BYTES)
    }

    #[inline(always)]
    pub(crate) fn wr<T: Int>(&mut self, lin: u64, v: u64) -> R<()> {
        let e = self.tlb[self.mmu].write(lin);
        if e.tag == lin & !0xFFF && lin & 0xFFF <= 4096 - T::BYTES {
            // SAFETY: as in `load`; a write tag is only given to writable RAM.
            unsafe { e.host.add((lin & 0xFFF) as usize).cast::<T>().write_unaligned(T::from64(v)) };
            return Ok(());
        }
        self.store_slow(lin, T::BYTES, v)
    }

    /// Host address to read at `lin`, if the TLB has its page.
    #[inline(always)]
    pub(crate) fn host_read(&self, lin: u64) -> Option<*const u8> {
        let e = self.tlb[self.mmu].read(lin);
        (e.tag == lin & !0xFFF).then(|| e.host.wrapping_add((lin & 0xFFF) as usize).cast_const())
    }

    /// Host address to write at `lin`, if the TLB has its page for plain writes.
    #[inline(always)]
    pub(crate) fn host_write(&self, lin: u64) -> Option<*mut u8> {
        let e = self.tlb[self.mmu].write(lin);
        (e.tag == lin & !0xFFF).then(|| e.host.wrapping_add((lin & 0xFFF) as usize))
    }

    /// Read, change and write back. Faults as a write before anything changes; `f` cannot fail.
    #[inline(always)]
    pub(crate) fn rmw<T: Int>(&mut self, lin: u64, f: impl FnOnce(&mut Self, u64) -> u64) -> R<()> {
        let e = self.tlb[self.mmu].write(lin);
        if e.tag == lin & !0xFFF && lin & 0xFFF <= 4096 - T::BYTES {
            let p = e.host.wrapping_add((lin & 0xFFF) as usize).cast::<T>();
            // SAFETY: as in `store`.
            let v = unsafe { p.read_unaligned() }.to64();
            let n = f(self, v);
            // SAFETY: as in `store`; `f` touches registers only.
            unsafe { p.write_unaligned(T::from64(n)) };
            return Ok(());
        }
        self.check_write(lin, T::BYTES)?;
        let v = self.ld::<T>(lin)?;
        let n = f(self, v);
        self.store_slow(lin, T::BYTES, n)
    }

    fn canonical_check(&mut self, lin: u64, size: u64) -> R<()> {
        if self.long || self.efer & EFER_LMA != 0 {
            let last = lin.wrapping_add(size - 1);
            if !canonical(lin) || !canonical(last) {
                // SAFETY: as in `position`.
                let op = unsafe { &*self.cur };
                let stack = op.seg as usize == SS;
                return self.raise(if stack { Exception::ss(0) } else { Exception::gp(0) });
            }
        }
        if size > 1 && lin & (size - 1) != 0 && self.alignment_checks() && !self.implicit {
            return self.raise(Exception::with_error(17, 0));
        }
        Ok(())
    }

    fn next_page(&self, lin: u64) -> u64 {
        let n = (lin & !0xFFF).wrapping_add(0x1000);
        if self.efer & EFER_LMA != 0 {
            n
        } else {
            n & 0xFFFF_FFFF
        }
    }

    /// Raise what a write of `size` bytes would raise.
    pub(crate) fn check_write(&mut self, lin: u64, size: u64) -> R<()> {
        let crosses = (lin & 0xFFF) + size > 4096;
        if !crosses && self.tlb[self.mmu].permitted(lin).is_some() {
            return Ok(());
        }
        self.canonical_check(lin, size)?;
        self.walk(lin, Access::Write, self.mmu)?;
        if crosses {
            self.walk(self.next_page(lin), Access::Write, self.mmu)?;
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn load_slow(&mut self, lin: u64, size: u64) -> R<u64> {
        self.canonical_check(lin, size)?;
        let w = self.walk(lin, Access::Read, self.mmu)?;
        if self.dr_watch {
            self.check_watch(lin, size, false);
        }
        let first = 4096 - (lin & 0xFFF);
        if first < size {
            let next = self.next_page(lin);
            let w2 = self.walk(next, Access::Read, self.mmu)?;
            let lo = self.phys_load(w.phys, first as u8);
            let hi = self.phys_load(w2.phys, (size - first) as u8);
            return Ok(lo | hi << (8 * first));
        }
        self.fill(lin, &w, self.mmu);
        Ok(self.phys_load(w.phys, size as u8))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn store_slow(&mut self, lin: u64, size: u64, v: u64) -> R<()> {
        let first = 4096 - (lin & 0xFFF);
        if let (Some(page), true) = (self.tlb[self.mmu].permitted(lin), first >= size && !self.dr_watch) {
            // A page whose writes must be seen, as a rule: that of a table, or of code.
            let (b, phys) = (self.mem().backing(page), page | lin & 0xFFF);
            let changes = self.changes;
            self.store_to(&b, phys, size as u8, v);
            if changes == self.changes && b.writes_are_free() {
                self.tlb[self.mmu].open_writes(tlb::slot_of(lin));
            }
            return Ok(());
        }
        self.canonical_check(lin, size)?;
        let w = self.walk(lin, Access::Write, self.mmu)?;
        if first < size {
            let next = self.next_page(lin);
            let w2 = self.walk(next, Access::Write, self.mmu)?;
            if self.dr_watch {
                self.check_watch(lin, size, true);
            }
            self.phys_store(w.phys, first as u8, v);
            self.phys_store(w2.phys, (size - first) as u8, v >> (8 * first));
            return Ok(());
        }
        if self.dr_watch {
            self.check_watch(lin, size, true);
        }
        if self.lapic.covers(w.phys) {
            self.lapic_mmio_write(w.phys, size as u8, v);
            return Ok(());
        }
        let changes = self.changes;
        let b = self.mem().backing(w.phys);
        self.store_to(&b, w.phys, size as u8, v);
        // The store may have changed the tables; fill only with what still holds.
        if changes == self.changes {
            self.fill_from(&b, lin, &w, self.mmu);
        }
        Ok(())
    }

    /// Load by a size known at run time.
    pub(crate) fn load_sz(&mut self, lin: u64, size: u8) -> R<u64> {
        match size {
            1 => self.ld::<u8>(lin),
            2 => self.ld::<u16>(lin),
            4 => self.ld::<u32>(lin),
            _ => self.ld::<u64>(lin),
        }
    }

    /// Store by a size known at run time.
    pub(crate) fn store_sz(&mut self, lin: u64, size: u8, v: u64) -> R<()> {
        match size {
            1 => self.wr::<u8>(lin, v),
            2 => self.wr::<u16>(lin, v),
            4 => self.wr::<u32>(lin, v),
            _ => self.wr::<u64>(lin, v),
        }
    }

    /// Run `f` with supervisor privilege, as accesses to descriptor tables and the TSS are made.
    pub(crate) fn as_system<X>(&mut self, f: impl FnOnce(&mut Self) -> X) -> X {
        let (mmu, implicit) = (self.mmu, self.implicit);
        self.mmu = MMU_SUP;
        self.implicit = true;
        let x = f(self);
        self.mmu = mmu;
        self.implicit = implicit;
        x
    }

    // ---- physical access

    /// Read guest physical memory as the page walk does (no side effects; what is not memory reads ones).
    pub(crate) fn phys_read(&mut self, phys: u64, size: u8) -> u64 {
        Self::read_from(&self.mem().backing(phys), phys, size)
    }

    /// The same; `b` backs the page.
    #[inline]
    pub(crate) fn read_from(b: &Backing, phys: u64, size: u8) -> u64 {
        if b.read.is_null() {
            return u64::MAX >> (64 - 8 * size as u32);
        }
        // SAFETY: table entries are aligned, so the access lies within the page.
        unsafe {
            let p = b.read.add((phys & 0xFFF) as usize);
            if size == 4 {
                p.cast::<u32>().read_unaligned() as u64
            } else {
                p.cast::<u64>().read_unaligned()
            }
        }
    }

    /// Write an accessed or dirty bit.
    pub(crate) fn phys_write_table(&mut self, phys: u64, size: u8, v: u64) {
        let b = self.mem().backing(phys);
        if b.write.is_null() {
            return;
        }
        if GuestMemory::set_dirty_at(&b) & CODE != 0 {
            self.code_written(phys, size as u64);
        }
        // SAFETY: as in `phys_read`; the page is RAM.
        unsafe {
            let p = b.write.add((phys & 0xFFF) as usize);
            if size == 4 {
                p.cast::<u32>().write_unaligned(v as u32);
            } else {
                p.cast::<u64>().write_unaligned(v);
            }
        }
    }

    /// Read up to 8 bytes within a page.
    pub(crate) fn phys_load(&mut self, phys: u64, size: u8) -> u64 {
        if self.lapic.covers(phys) {
            return self.lapic_mmio_read(phys, size);
        }
        let b = self.mem().backing(phys);
        if !b.read.is_null() {
            // SAFETY: the caller keeps within the page.
            return unsafe {
                let p = b.read.add((phys & 0xFFF) as usize);
                match size {
                    1 => u64::from(*p),
                    2 => u64::from(p.cast::<u16>().read_unaligned()),
                    4 => u64::from(p.cast::<u32>().read_unaligned()),
                    8 => p.cast::<u64>().read_unaligned(),
                    _ => {
                        let mut v = [0u8; 8];
                        std::ptr::copy_nonoverlapping(p, v.as_mut_ptr(), size as usize);
                        u64::from_le_bytes(v)
                    }
                }
            };
        }
        let position = self.position();
        let v = if size.is_power_of_two() {
            self.bus().mmio_read(position, phys, size)
        } else {
            (0..size as u64)
                .fold(0, |v, i| v | (self.bus().mmio_read(position, phys + i, 1) & 0xFF) << (8 * i))
        };
        self.after_bus();
        v
    }

    /// Write up to 8 bytes within a page.
    pub(crate) fn phys_store(&mut self, phys: u64, size: u8, v: u64) {
        if self.lapic.covers(phys) {
            self.lapic_mmio_write(phys, size, v);
            return;
        }
        let b = self.mem().backing(phys);
        self.store_to(&b, phys, size, v);
    }

    /// The same where it is not the local APIC's; `b` backs the page.
    fn store_to(&mut self, b: &Backing, phys: u64, size: u8, v: u64) {
        if !b.write.is_null() {
            let old = GuestMemory::set_dirty_at(b);
            if old & !WRITE_FREE != 0 {
                if old & TABLE != 0 {
                    self.table_written(phys, size as u64, v);
                }
                if old & CODE != 0 {
                    self.code_written(phys, size as u64);
                }
            }
            // SAFETY: the caller keeps within the page, which is RAM.
            unsafe {
                let p = b.write.add((phys & 0xFFF) as usize);
                match size {
                    1 => *p = v as u8,
                    2 => p.cast::<u16>().write_unaligned(v as u16),
                    4 => p.cast::<u32>().write_unaligned(v as u32),
                    8 => p.cast::<u64>().write_unaligned(v),
                    _ => std::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), p, size as usize),
                }
            };
            return;
        }
        if !b.read.is_null() {
            return;
        }
        let position = self.position();
        if size.is_power_of_two() {
            self.bus().mmio_write(position, phys, size, v);
        } else {
            for i in 0..size as u64 {
                self.bus().mmio_write(position, phys + i, 1, v >> (8 * i) & 0xFF);
            }
        }
        self.after_bus();
    }

    /// A page that walks read is written: if an entry changes that a walk used, translations are stale.
    fn table_written(&mut self, phys: u64, size: u64, v: u64) {
        let first = phys & !7;
        let last = (phys + size - 1) & !7;
        let (mut used, mut free) = (false, true);
        let mut at = first;
        while at <= last {
            let e = self.phys_read(at, 8);
            let mut change = if is_used(e) { Change::Used } else { Change::Unused };
            if change == Change::Used && first == last {
                let shift = 8 * (phys - first);
                let mask = u64::MAX >> (64 - 8 * size) << shift;
                let new = e & !mask | v << shift & mask;
                change = self.kind_of_change(at, e, new);
            }
            used |= change != Change::Unused;
            free &= self.table_changes(at, change);
            at += 8;
        }
        if free {
            self.mem().unprotect(phys, TABLE);
        }
        if used || free {
            self.announce(phys);
        }
    }

    // ---- stack

    /// A stack address that is not canonical is #SS, whatever segment the instruction's operand has.
    #[cold]
    fn stack_fault(&mut self, f: Fault) -> Fault {
        if self.fault.vector == 13 {
            self.fault.vector = 12;
        }
        f
    }

    /// Push `size` bytes.
    #[inline(always)]
    pub(crate) fn push<T: Int>(&mut self, v: u64) -> R<()> {
        let rsp = self.st.gpr[RSP];
        if self.long {
            let n = rsp.wrapping_sub(T::BYTES);
            self.wr::<T>(n, v).map_err(|f| self.stack_fault(f))?;
            self.st.gpr[RSP] = n;
            return Ok(());
        }
        let m = self.sp_mask;
        let n = rsp.wrapping_sub(T::BYTES) & m;
        let lin = self.seg_lin(SS, n, T::BYTES, true)?;
        self.wr::<T>(lin, v)?;
        self.st.gpr[RSP] = rsp & !m | n;
        Ok(())
    }

    /// Pop `size` bytes.
    #[inline(always)]
    pub(crate) fn pop<T: Int>(&mut self) -> R<u64> {
        let v = self.peek::<T>(0)?;
        self.add_sp(T::BYTES);
        Ok(v)
    }

    /// Read the stack `delta` bytes above its top.
    #[inline(always)]
    pub(crate) fn peek<T: Int>(&mut self, delta: u64) -> R<u64> {
        let rsp = self.st.gpr[RSP];
        if self.long {
            return self.ld::<T>(rsp.wrapping_add(delta)).map_err(|f| self.stack_fault(f));
        }
        let off = rsp.wrapping_add(delta) & self.sp_mask;
        let lin = self.seg_lin(SS, off, T::BYTES, false)?;
        self.ld::<T>(lin)
    }

    /// Move the stack pointer at its own width.
    #[inline(always)]
    pub(crate) fn add_sp(&mut self, n: u64) {
        let m = self.sp_mask;
        let rsp = self.st.gpr[RSP];
        self.st.gpr[RSP] = rsp & !m | rsp.wrapping_add(n) & m;
    }

    pub(crate) fn push_sz(&mut self, size: u8, v: u64) -> R<()> {
        match size {
            2 => self.push::<u16>(v),
            4 => self.push::<u32>(v),
            _ => self.push::<u64>(v),
        }
    }
    pub(crate) fn pop_sz(&mut self, size: u8) -> R<u64> {
        match size {
            2 => self.pop::<u16>(),
            4 => self.pop::<u32>(),
            _ => self.pop::<u64>(),
        }
    }
    pub(crate) fn peek_sz(&mut self, delta: u64, size: u8) -> R<u64> {
        match size {
            2 => self.peek::<u16>(delta),
            4 => self.peek::<u32>(delta),
            _ => self.peek::<u64>(delta),
        }
    }
}

/// Bits 47..63 are all alike.
#[inline]
pub fn canonical(a: u64) -> bool {
    ((a as i64) << 16 >> 16) as u64 == a
}
