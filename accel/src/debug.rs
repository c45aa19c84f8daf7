//! What a debugger asks of a processor, and how it looks at guest memory by linear addresses.
//!
//! Nothing here is part of the machine: whether a debugger watches never shows in a state, a position or guest memory.

use std::collections::BTreeSet;

use crate::mem::{GuestMemory, PAGE_SIZE};
use crate::tcg::registers::View;

/// Where a debugger wants a processor to stop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugPoints {
    /// Linear addresses of instructions before which [`Exit::Debug`](crate::Exit::Debug) is returned, once for each time
    /// that execution comes there. (Each iteration of a repeated string instruction is such a time.)
    pub breaks: BTreeSet<u64>,
    /// Data accesses after whose instruction it is returned.
    pub watches: Vec<Watch>,
    /// A running processor takes no interrupts and NMIs (QEMU's `SSTEP_NOIRQ`).
    pub hold_interrupts: bool,
}

/// Bytes that a debugger watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Linear address of the first byte.
    pub start: u64,
    /// Bytes, at least one.
    pub len: u64,
    pub reads: bool,
    pub writes: bool,
}

/// What a processor stopped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugHit {
    /// The next instruction is the one at this linear address.
    Break(u64),
    /// The last instruction accessed these bytes.
    Watch(Watch),
}

/// The guest physical address behind a linear one by the tables in use, whatever their permissions; accessed and
/// dirty bits stay as they are (SDM vol. 3, chapter 4). `None`: not mapped.
pub fn translate(view: &View, mem: &GuestMemory, lin: u64) -> Option<u64> {
    const PG: u64 = 1 << 31;
    const PSE: u64 = 1 << 4;
    const PAE: u64 = 1 << 5;
    const LMA: u64 = 1 << 10;
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    let r = &view.registers;
    if view.cr0 & PG == 0 {
        return Some(lin & 0xFFFF_FFFF);
    }
    let entry = |at: u64, size: usize| {
        let mut bytes = [0; 8];
        mem.peek(at, &mut bytes[..size]).then_some(u64::from_le_bytes(bytes)).filter(|e| e & 1 != 0)
    };
    if view.cr4 & PAE == 0 {
        let directory = entry(r.cr3 & 0xFFFF_F000 | lin >> 20 & 0xFFC, 4)?;
        if directory & LARGE != 0 && view.cr4 & PSE != 0 {
            return Some(directory & 0xFFC0_0000 | (directory >> 13 & 0xFF) << 32 | lin & 0x3F_FFFF);
        }
        return Some(entry(directory & 0xFFFF_F000 | lin >> 10 & 0xFFC, 4)? & 0xFFFF_F000 | lin & 0xFFF);
    }
    let long = r.efer & LMA != 0;
    let (mut table, mut level) = if long {
        if (lin as i64) << 16 >> 16 != lin as i64 {
            return None;
        }
        (r.cr3 & ADDRESS, 4)
    } else {
        (entry(r.cr3 & 0xFFFF_FFE0 | (lin >> 30 & 3) << 3, 8)? & ADDRESS, 2)
    };
    loop {
        let shift = 3 + 9 * level;
        let e = entry(table | (lin >> shift & 0x1FF) << 3, 8)?;
        if level == 1 || e & LARGE != 0 && (level == 2 || level == 3 && long) {
            let offset = (1 << shift) - 1;
            return Some(e & ADDRESS & !offset | lin & offset);
        }
        table = e & ADDRESS;
        level -= 1;
    }
}

/// Walk a range of linear addresses (of physical ones without a view) page by page: for each piece, its guest physical
/// address and its place in the range. Returns how many bytes `each` took before it said no or a page was missing.
fn pieces(
    view: Option<&View>,
    mem: &GuestMemory,
    start: u64,
    len: usize,
    mut each: impl FnMut(u64, std::ops::Range<usize>) -> bool,
) -> usize {
    let mut done = 0;
    while done < len {
        let at = start.wrapping_add(done as u64);
        let n = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(len - done);
        let phys = view.map_or(Some(at), |v| translate(v, mem, at));
        if !phys.is_some_and(|p| each(p, done..done + n)) {
            break;
        }
        done += n;
    }
    done
}

/// Read memory as a debugger does: RAM and firmware, no devices. `view`: by the linear addresses of that processor;
/// without, by physical ones. Returns how many bytes could be read.
pub fn read(view: Option<&View>, mem: &GuestMemory, start: u64, out: &mut [u8]) -> usize {
    pieces(view, mem, start, out.len(), |phys, range| mem.peek(phys, &mut out[range]))
}

/// Write RAM as a debugger does; see [`read`]. Nothing is written unless all of it can be.
pub fn write(view: Option<&View>, mem: &GuestMemory, start: u64, data: &[u8]) -> bool {
    let ram = |phys: u64, n: usize| mem.read(phys, &mut vec![0; n]).is_ok();
    if pieces(view, mem, start, data.len(), |phys, range| ram(phys, range.len())) < data.len() {
        return false;
    }
    pieces(view, mem, start, data.len(), |phys, range| mem.write(phys, &data[range]).is_ok()) == data.len()
}
