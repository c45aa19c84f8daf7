//! Memory for compiled code: one file in memory mapped twice, once to write and once to run, so that no
//! page is ever both. Behind the view that runs lies the data that compiled code changes itself.

use std::ptr::NonNull;

/// Bytes of the code cache. It is emptied as a whole when full.
pub const SIZE: usize = 96 << 20;
/// Jumps in it at most that remember where they led; likewise.
const SITES: usize = 512 << 10;
const DATA: usize = SITES * size_of::<Site>();

/// Where a jump led to last: valid for this target while the table's key is the same. (Key 0 never is.)
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Site {
    /// The target, a linear address.
    pub lin: u64,
    pub key: u64,
    /// Where its code charges the budget.
    pub code: u64,
    /// The target's page.
    pub page: u64,
}

/// The two views of the code cache.
pub struct CodeMemory {
    write: NonNull<u8>,
    run: NonNull<u8>,
    used: usize,
    sites: usize,
}

// SAFETY: the mappings belong to this value alone; nothing else writes them.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// `None` when the host refuses such mappings.
    pub fn new() -> Option<CodeMemory> {
        // SAFETY: plain system calls; the descriptor is closed once both views exist.
        unsafe {
            let fd = libc::memfd_create(c"ftvm-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return None;
            }
            let map = |at: *mut u8, size, prot, flags, fd| {
                let p = libc::mmap(at.cast(), size, prot, flags, fd, 0);
                if p == libc::MAP_FAILED {
                    None
                } else {
                    NonNull::new(p.cast::<u8>())
                }
            };
            let views = || {
                if libc::ftruncate(fd, SIZE as i64) != 0 {
                    return None;
                }
                let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                let (null, rw) = (std::ptr::null_mut(), libc::PROT_READ | libc::PROT_WRITE);
                let run = map(null, SIZE + DATA, rw, anonymous, -1)?;
                let x = libc::PROT_READ | libc::PROT_EXEC;
                let over = map(run.as_ptr(), SIZE, x, libc::MAP_SHARED | libc::MAP_FIXED, fd);
                let write = over.and_then(|_| map(null, SIZE, rw, libc::MAP_SHARED, fd));
                if write.is_none() {
                    libc::munmap(run.as_ptr().cast(), SIZE + DATA);
                }
                Some(CodeMemory { write: write?, run, used: 0, sites: 1 })
            };
            let memory = views();
            libc::close(fd);
            memory
        }
    }

    /// Where the next code will run.
    pub fn next(&self) -> u64 {
        self.run.as_ptr() as u64 + self.used as u64
    }

    /// Append code that was made for `next()`; false when it does not fit.
    pub fn push(&mut self, code: &[u8]) -> bool {
        if code.len() > SIZE - self.used {
            return false;
        }
        // SAFETY: the range lies within the writable view.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(self.used), code.len())
        };
        self.used = (self.used + code.len()).next_multiple_of(16).min(SIZE);
        true
    }

    /// Overwrite a 32-bit field of code at `address` of the running view.
    pub fn patch(&mut self, address: u64, value: i32) {
        let at = (address - self.run.as_ptr() as u64) as usize;
        assert!(at + 4 <= self.used);
        // SAFETY: the field lies within the used part of the writable view.
        unsafe { self.write.as_ptr().add(at).cast::<i32>().write_unaligned(value) };
    }

    /// The address of site `n`. Number 0 stands for none.
    pub fn site(&self, n: usize) -> u64 {
        self.run.as_ptr() as u64 + (SIZE + n * size_of::<Site>()) as u64
    }
    /// Sites given out so far.
    pub fn sites(&self) -> usize {
        self.sites
    }
    /// Give out `count` sites; false when there are too few.
    pub fn take_sites(&mut self, count: usize) -> bool {
        if count > SITES - self.sites {
            return false;
        }
        self.sites += count;
        true
    }

    /// Forget all code from offset `keep` on, and all sites.
    pub fn truncate(&mut self, keep: usize) {
        self.used = keep;
        // SAFETY: within the data, which nothing refers to.
        unsafe { std::ptr::write_bytes(self.run.as_ptr().add(SIZE), 0, self.sites * size_of::<Site>()) };
        self.sites = 1;
    }
    pub fn used(&self) -> usize {
        self.used
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both views were mapped with these sizes and nobody runs or writes them any more.
        unsafe {
            libc::munmap(self.write.as_ptr().cast(), SIZE);
            libc::munmap(self.run.as_ptr().cast(), SIZE + DATA);
        }
    }
}
