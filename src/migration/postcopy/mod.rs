//! Post-copy: the machine runs at its destination while pages of its memory are still at the source
//! (`postcopy-ram`; QEMU's docs/devel/migration.rst tells of the same).
//!
//! The source stops the machine at any time, tells which pages are stale or were never sent, and sends the state. The
//! destination makes those pages missing (userfaultfd), takes the state, and the machine is handed over as ever. From there on a
//! thread that touches a missing page waits; [`arriving`] hears of it and asks the source, which sends such pages before the
//! others. When every page is there the migration is complete. A connection that breaks on the way stops nothing but who needs a
//! missing page: both sides are `postcopy-paused` until another connection goes on (`migrate-recover` there, `migrate` with
//! `resume` here). Neither side alone has the whole machine until then.
//!
//! **Nothing deadlocks**, whoever touches a missing page, and whatever lock it holds meanwhile. The machine thread may (its
//! processors, device models, loaders, the monitors' commands that run on it), and so may threads of KVM's processors, with the
//! desk's lock, and the kernel on their behalf. What brings the page depends on none of them:
//! - The threads `postcopy-fault` and `postcopy-listen` never access guest memory (they give pages to the kernel, which puts them
//!   there), never wait for the machine thread, and take only the locks of this module and those of the migration's status and of
//!   the event queue, which are held for moments, by nobody who touches guest memory meanwhile.
//! - Data of disks and networks pass through buffers of their own, so that no other thread of the host touches guest memory.
//! - The source's machine stands still; its answers need its machine thread, which touches memory that is all there.
//!
//! What needs all of the memory or all of the machine at once (another migration, a snapshot, fault tolerance) is refused until
//! the last page is there.

pub mod arriving;
pub mod pages;
pub mod uffd;

use ftvm_accel::mem::RamBlocks;
use vm_memory::MmapRegion;

use super::stream::PAGE;
use crate::runtime::live::Runtime;
use uffd::Uffd;

/// Why what was asked is refused while pages are missing.
pub const MISSING: &str = "the machine's memory has not all come yet (post-copy)";

/// Whether this host can take a machine before its memory, or why not. It is tried on a few pages.
pub fn supported(kernel: bool) -> Result<(), String> {
    let not = |why: String| format!("Postcopy is not supported: {why}");
    let uffd = Uffd::open(kernel).map_err(|e| {
        not(format!(
            "this host gives no userfaultfd ({e}){}",
            if kernel {
                "; KVM needs access to /dev/userfaultfd, or vm.unprivileged_userfaultfd=1"
            } else {
                ""
            }
        ))
    })?;
    let map = MmapRegion::<()>::new(4 * PAGE).map_err(|e| not(e.to_string()))?;
    let start = map.as_ptr() as usize;
    uffd.register(start, 4 * PAGE).map_err(|e| not(format!("userfaultfd: {e}")))?;
    drop_pages(start, 4 * PAGE)
        .map_err(|e| not(format!("guest memory cannot be dropped ({e}); is it locked?")))
}

/// Make pages that lie there missing.
fn drop_pages(start: usize, len: usize) -> std::io::Result<()> {
    advise(start, len, libc::MADV_DONTNEED)
}

fn advise(start: usize, len: usize, advice: i32) -> std::io::Result<()> {
    // SAFETY: the callers name mappings that exist, private and anonymous, which no Rust references are to (guest memory, and
    // one of a test's own).
    match unsafe { libc::madvise(start as *mut _, len, advice) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// One page at a time is brought from now on, or no more.
fn small_pages(blocks: &RamBlocks, on: bool) {
    let advice = if on { libc::MADV_NOHUGEPAGE } else { libc::MADV_HUGEPAGE };
    for b in blocks.iter() {
        // A host without huge pages says so, which is as well.
        let _ = advise(b.host, b.len as usize, advice);
    }
}

/// A migration that may come in post-copy begins: whether it can, and where its memory is to be.
pub fn prepare(rt: &mut Runtime) -> Result<RamBlocks, String> {
    supported(rt.machine.is_hardware())?;
    let blocks = rt.machine.memory().blocks();
    small_pages(&blocks, true);
    Ok(blocks)
}

/// These runs of pages (the first one's address, how many) are stale.
pub fn discard(blocks: &RamBlocks, runs: &[(u64, u64)]) -> Result<(), String> {
    for (gpa, pages) in runs {
        let len = pages.checked_mul(PAGE as u64).filter(|len| *len > 0);
        let last = len.and_then(|len| gpa.checked_add(len - 1));
        // The whole run lies in one block.
        let ends = last.and_then(|last| Some((blocks.host(*gpa)?, blocks.host(last)?)));
        let (Some((start, end)), Some(len)) = (ends, len) else {
            return Err(format!("it discards pages at {gpa:#x} where there is no RAM"));
        };
        if end - start + 1 != len as usize || !gpa.is_multiple_of(PAGE as u64) {
            return Err(format!("it discards pages at {gpa:#x} where there is no RAM"));
        }
        drop_pages(start, len as usize).map_err(|e| format!("stale pages cannot be dropped: {e}"))?;
    }
    Ok(())
}
