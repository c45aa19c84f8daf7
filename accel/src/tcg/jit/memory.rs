//! Memory for compiled code: one file in memory mapped twice, once to write and once to run, so that no
//! page is ever both.

use std::ptr::NonNull;

/// Bytes of the code cache. It is emptied as a whole when full.
pub const SIZE: usize = 48 << 20;

/// The two views of the code cache.
pub struct CodeMemory {
    write: NonNull<u8>,
    run: NonNull<u8>,
    used: usize,
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
            let map = |prot| {
                let p = libc::mmap(std::ptr::null_mut(), SIZE, prot, libc::MAP_SHARED, fd, 0);
                if p == libc::MAP_FAILED {
                    None
                } else {
                    NonNull::new(p.cast::<u8>())
                }
            };
            let views = if libc::ftruncate(fd, SIZE as i64) == 0 {
                match (map(libc::PROT_READ | libc::PROT_WRITE), map(libc::PROT_READ | libc::PROT_EXEC)) {
                    (Some(write), Some(run)) => Some((write, run)),
                    (a, b) => {
                        for p in [a, b].into_iter().flatten() {
                            libc::munmap(p.as_ptr().cast(), SIZE);
                        }
                        None
                    }
                }
            } else {
                None
            };
            libc::close(fd);
            views.map(|(write, run)| CodeMemory { write, run, used: 0 })
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

    /// Forget all code from offset `keep` on.
    pub fn truncate(&mut self, keep: usize) {
        self.used = keep;
    }
    pub fn used(&self) -> usize {
        self.used
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both views were mapped with this size and nobody runs or writes them any more.
        unsafe {
            libc::munmap(self.write.as_ptr().cast(), SIZE);
            libc::munmap(self.run.as_ptr().cast(), SIZE);
        }
    }
}
