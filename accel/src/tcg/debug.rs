//! Debug registers (SDM vol. 3, chapter 17): execution and data breakpoints.

use super::flags::RF;
use super::op::CS;
use super::SoftCpu;

impl SoftCpu {
    /// DR7 or an address register changed.
    pub(crate) fn debug_changed(&mut self) {
        let on = self.dr[7] & 0xFF;
        self.dr_exec = false;
        self.dr_watch = self.debugger_watches(None);
        for i in 0..4 {
            if on >> (2 * i) & 3 != 0 {
                match self.dr[7] >> (16 + 4 * i) & 3 {
                    0 => self.dr_exec = true,
                    _ => self.dr_watch = true,
                }
            }
        }
        self.attend();
        self.flush_tlb();
        self.attention = true;
    }

    fn breakpoint(&self, i: usize) -> Option<(u64, u64, u64)> {
        if self.dr[7] >> (2 * i) & 3 == 0 {
            return None;
        }
        let kind = self.dr[7] >> (16 + 4 * i) & 3;
        let len = match self.dr[7] >> (18 + 4 * i) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        Some((kind, self.dr[i] & !(len - 1), len))
    }

    /// An instruction breakpoint at CS:RIP that RF does not hold back; its bits go to `db_bits`.
    pub(crate) fn check_exec_break(&mut self) -> bool {
        if self.eflags & RF != 0 {
            return false;
        }
        let lin = if self.long { self.rip } else { self.segs[CS].base.wrapping_add(self.rip) & 0xFFFF_FFFF };
        let mut hit = 0;
        for i in 0..4 {
            if let Some((0, _, _)) = self.breakpoint(i) {
                if self.dr[i] == lin {
                    hit |= 1 << i;
                }
            }
        }
        self.db_bits = hit;
        hit != 0
    }

    /// Whether no data breakpoint lies in the page, so that accesses may go straight to memory.
    pub(crate) fn watch_free(&self, page: u64) -> bool {
        !self.dr_watch
            || !self.debugger_watches(Some(page))
                && (0..4).all(|i| !matches!(self.breakpoint(i), Some((1..=3, a, _)) if a & !0xFFF == page))
    }

    /// A data access: note breakpoints for a trap after the instruction.
    pub(crate) fn check_watch(&mut self, lin: u64, size: u64, write: bool) {
        self.note_access(lin, size, write);
        for i in 0..4 {
            if let Some((kind, a, len)) = self.breakpoint(i) {
                let kind_hit = match kind {
                    1 => write,
                    3 => true,
                    _ => false,
                };
                if kind_hit && !self.implicit && lin < a.wrapping_add(len) && a < lin.wrapping_add(size) {
                    self.pending_db |= 1 << i;
                    self.attend();
                }
            }
        }
    }
}
