//! Hand-over of vector and x87 instructions to `simd`.

use super::op::*;
use super::SoftCpu;
use crate::simd::{self, Core, VecInsn};
use crate::state::CpuState;
use crate::Exception;

/// The implementation of a vector or x87 instruction.
pub fn resolve(insn: &mut VecInsn) -> Option<VecHandler> {
    simd::resolve::<SoftCpu>(insn)
}

/// Run the vector instruction that `op.imm` points to.
pub fn run(c: &mut SoftCpu, op: &Op) -> R<()> {
    // SAFETY: the block that holds `op` owns the VecOp and lives until the block has ended.
    let v = unsafe { &*(op.imm as *const VecOp) };
    (v.f)(c, &v.insn).map_err(|e| {
        c.fault = e;
        Fault
    })
}

/// Whether `len` bytes from `lin` on lie in one page.
fn in_page(lin: u64, len: usize) -> bool {
    (lin & 0xFFF) as usize + len <= 4096
}

impl SoftCpu {
    fn op(&self) -> &'static Op {
        // SAFETY: `cur` is the instruction in hand, kept until its block ends; see `position`.
        unsafe { &*self.cur }
    }
    fn vec_lin(&mut self, offset: u64, len: u64, write: bool) -> R<u64> {
        let op = self.op();
        if op.kind == K_FLAT {
            return self.ea(op, len, write).map(|a| a.wrapping_add(offset));
        }
        let m = u64::MAX >> (64 - 8 * op.asz as u32);
        let off = self.offset(op).wrapping_add(offset) & m;
        self.seg_lin(op.seg as usize, off, len, write)
    }
}

impl Core for SoftCpu {
    fn state(&mut self) -> &mut CpuState {
        &mut self.st
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Exception> {
        let r = self.vec_lin(offset, buf.len() as u64, false).and_then(|lin| {
            if let Some(from) = self.host_read(lin).filter(|_| in_page(lin, buf.len())) {
                // SAFETY: the run lies within the page, which is guest memory.
                unsafe { std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
                return Ok(());
            }
            let mut at = 0;
            while at < buf.len() {
                let a = lin.wrapping_add(at as u64);
                let left = buf.len() - at;
                if left >= 8 {
                    buf[at..at + 8].copy_from_slice(&self.ld::<u64>(a)?.to_le_bytes());
                    at += 8;
                } else if left >= 4 {
                    buf[at..at + 4].copy_from_slice(&(self.ld::<u32>(a)? as u32).to_le_bytes());
                    at += 4;
                } else if left >= 2 {
                    buf[at..at + 2].copy_from_slice(&(self.ld::<u16>(a)? as u16).to_le_bytes());
                    at += 2;
                } else {
                    buf[at] = self.ld::<u8>(a)? as u8;
                    at += 1;
                }
            }
            Ok(())
        });
        r.map_err(|_| self.fault)
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), Exception> {
        let len = buf.len() as u64;
        let r = self.vec_lin(offset, len, true).and_then(|lin| {
            if let Some(to) = self.host_write(lin).filter(|_| in_page(lin, buf.len())) {
                // SAFETY: the run lies within the page, which is plain guest memory.
                unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), to, buf.len()) };
                return Ok(());
            }
            if len > 8 {
                // All or nothing: the only places where it can fail are the pages it touches.
                SoftCpu::check_write(self, lin, 1)?;
                let last = lin.wrapping_add(len - 1);
                if last & !0xFFF != lin & !0xFFF {
                    SoftCpu::check_write(self, last & !0xFFF, 1)?;
                }
            }
            let mut at = 0;
            while at < buf.len() {
                let a = lin.wrapping_add(at as u64);
                let left = buf.len() - at;
                let mut v = [0u8; 8];
                let n = if left >= 8 {
                    8
                } else if left >= 4 {
                    4
                } else if left >= 2 {
                    2
                } else {
                    1
                };
                v[..n].copy_from_slice(&buf[at..at + n]);
                self.store_sz(a, n as u8, u64::from_le_bytes(v))?;
                at += n;
            }
            Ok(())
        });
        r.map_err(|_| self.fault)
    }
    fn check_write(&mut self, offset: u64, len: usize) -> Result<(), Exception> {
        let r = self
            .vec_lin(offset, len as u64, true)
            .and_then(|lin| SoftCpu::check_write(self, lin, len as u64));
        r.map_err(|_| self.fault)
    }
    fn check_align(&mut self, align: u64) -> Result<(), Exception> {
        // Alignment comes before the segment's limit.
        let op = self.op();
        let base = if self.long && op.seg < FS as u8 { 0 } else { self.segs[op.seg as usize].base };
        if base.wrapping_add(self.offset(op)) & (align - 1) != 0 {
            return Err(Exception::gp(0));
        }
        Ok(())
    }
    fn set_flags(&mut self, cf: bool, pf: bool, af: bool, zf: bool, sf: bool, of: bool) {
        let bit = |b: bool, n: u32| (b as u64) << n;
        self.set_arith_flags(bit(cf, 0) | bit(pf, 2) | bit(af, 4) | bit(zf, 6) | bit(sf, 7) | bit(of, 11));
    }
    fn flags_for_fcmov(&mut self) -> (bool, bool, bool) {
        (self.cf(), self.zf(), self.pf())
    }
    fn pointers(&mut self) -> ((u16, u64), (u16, u64)) {
        let op = self.op();
        let ip = self.st.gpr[17].wrapping_add(op.off as u64) & self.ip_mask;
        let data =
            if op.kind == K_REG { (0, 0) } else { (self.segs[op.seg as usize].selector, self.offset(op)) };
        ((self.segs[CS].selector, ip), data)
    }
    fn cpl(&mut self) -> u8 {
        self.cpl
    }
    fn write_maskmov(&mut self, offset: u64, byte: u8) -> Result<(), Exception> {
        let op = self.op();
        let m = u64::MAX >> (64 - 8 * op.asz as u32);
        let off = self.st.gpr[RDI].wrapping_add(offset) & m;
        let r = self.seg_lin(op.seg as usize, off, 1, true).and_then(|lin| self.wr::<u8>(lin, byte as u64));
        r.map_err(|_| self.fault)
    }
}
