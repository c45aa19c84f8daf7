//! Memory for compiled code: one file in memory mapped twice, once to write and once to run, so that no
//! page is ever both. Behind the view that runs lies the data that compiled code changes itself.
//!
//! Compiled code of a busy guest is many megabytes, which the host's processor runs well only from large pages.

use std::ptr::NonNull;

/// Bytes of the code cache. It is emptied as a whole when full.
pub const SIZE: usize = 128 << 20;
/// Of it, what is for code that runs often; the rest is for what seldom does.
const NEAR: usize = 72 << 20;
/// A large page of the host.
const LARGE: usize = 2 << 20;
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
    run: NonNull<u8>,
    write: NonNull<u8>,
    /// Where the mapping starts that `run` lies in, and its bytes.
    whole: (NonNull<u8>, usize),
    used: usize,
    /// Of the part for code that seldom runs.
    far: usize,
    /// Up to where both parts lie in large pages, if the host has them.
    large: [usize; 2],
    sites: usize,
}

// SAFETY: the mappings belong to this value alone; nothing else writes them.
unsafe impl Send for CodeMemory {}

/// `mmap`; `None` when it fails.
///
/// # Safety
/// As of `mmap`: with `MAP_FIXED`, what was there must be the caller's to replace.
unsafe fn map(at: *mut u8, size: usize, prot: i32, flags: i32, fd: i32) -> Option<NonNull<u8>> {
    // SAFETY: the caller's promise.
    let p = unsafe { libc::mmap(at.cast(), size, prot, flags, fd, 0) };
    if p == libc::MAP_FAILED {
        return None;
    }
    NonNull::new(p.cast())
}

impl CodeMemory {
    /// `None` when the host refuses such mappings.
    pub fn new() -> Option<CodeMemory> {
        const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
        let size = SIZE + DATA + LARGE;
        // SAFETY: plain system calls; what is mapped over another mapping lies within the first, which is ours, and the
        // descriptor is closed once both views exist.
        unsafe {
            let start = map(std::ptr::null_mut(), size, WRITE, ANONYMOUS, -1)?;
            let run = start.add(start.as_ptr().align_offset(LARGE));
            // A host without large pages says so, which changes nothing.
            libc::madvise(run.as_ptr().add(SIZE).cast(), DATA, libc::MADV_HUGEPAGE);
            let fd = libc::memfd_create(c"ftvm-code".as_ptr(), libc::MFD_CLOEXEC);
            let write = (fd >= 0 && libc::ftruncate(fd, SIZE as i64) == 0)
                .then(|| {
                    let execute = libc::PROT_READ | libc::PROT_EXEC;
                    map(run.as_ptr(), SIZE, execute, libc::MAP_SHARED | libc::MAP_FIXED, fd)?;
                    map(std::ptr::null_mut(), SIZE, WRITE, libc::MAP_SHARED, fd)
                })
                .flatten();
            if fd >= 0 {
                libc::close(fd);
            }
            let Some(write) = write else {
                libc::munmap(start.as_ptr().cast(), size);
                return None;
            };
            let whole = (start, size);
            Some(CodeMemory { run, write, whole, used: 0, far: NEAR, large: [0, NEAR], sites: 1 })
        }
    }

    /// Have the code up to offset `end` of a part in large pages.
    fn enlarge(&mut self, part: usize, end: usize) {
        while self.large[part] < end {
            let at = self.large[part];
            // SAFETY: the range is of whole large pages within the views. The call changes no contents, and a failure (an
            // older kernel, no large page to be had) nothing at all. It wants something of the page to be there.
            unsafe {
                self.write.as_ptr().add(at).write_volatile(0);
                self.run.as_ptr().add(at).read_volatile();
                libc::madvise(self.run.as_ptr().add(at).cast(), LARGE, libc::MADV_COLLAPSE);
            }
            self.large[part] += LARGE;
        }
    }

    /// Write at an offset.
    fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SIZE);
        // SAFETY: the range lies within the writable view.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.as_ptr().add(at), bytes.len()) };
    }

    /// Where the next code will run: what runs often, and what seldom does.
    pub fn next(&self) -> (u64, u64) {
        let run = self.run.as_ptr() as u64;
        (run + self.used as u64, run + self.far as u64)
    }

    /// Append code that was made for `next()`; false when it does not fit.
    pub fn push(&mut self, code: &[u8], far: &[u8]) -> bool {
        if code.len() > NEAR - self.used || far.len() > SIZE - self.far {
            return false;
        }
        self.enlarge(0, self.used + code.len());
        self.enlarge(1, self.far + far.len());
        self.write(self.used, code);
        self.write(self.far, far);
        self.used = (self.used + code.len()).next_multiple_of(16).min(NEAR);
        self.far += far.len();
        true
    }

    /// Overwrite code at `address`.
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - self.run.as_ptr() as u64) as usize;
        assert!(at + bytes.len() <= self.far);
        self.write(at, bytes);
    }
    /// Where the 32-bit field at `address`, the end of a jump or call, leads to.
    pub fn target(&self, address: u64) -> u64 {
        let at = (address - self.run.as_ptr() as u64) as usize;
        assert!(at + 4 <= self.far);
        // SAFETY: within the view.
        let distance = unsafe { self.run.as_ptr().add(at).cast::<i32>().read_unaligned() };
        (address + 4).wrapping_add(distance as i64 as u64)
    }
    /// Let a 32-bit field at `address`, the end of a jump or call, lead to `target`.
    pub fn aim(&mut self, address: u64, target: u64) {
        self.patch(address, &(target.wrapping_sub(address + 4) as i32).to_le_bytes());
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
        (self.used, self.far) = (keep, NEAR);
        // SAFETY: within the data, which nothing refers to.
        unsafe { std::ptr::write_bytes(self.run.as_ptr().add(SIZE), 0, self.sites * size_of::<Site>()) };
        self.sites = 1;
    }
    /// Bytes of code that runs often.
    pub fn used(&self) -> usize {
        self.used
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: the mappings have these sizes and nobody runs or writes them any more.
        unsafe {
            libc::munmap(self.whole.0.as_ptr().cast(), self.whole.1);
            libc::munmap(self.write.as_ptr().cast(), SIZE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_where_it_was_written_and_can_be_changed() {
        let mut memory = CodeMemory::new().expect("memory for code");
        let (near, far) = memory.next();
        // mov eax, 5; ret
        let code = [0xB8, 5, 0, 0, 0, 0xC3];
        assert!(memory.push(&code, &code));
        memory.patch(far + 1, &7u32.to_le_bytes());
        for (at, result) in [(near, 5), (far, 7)] {
            // SAFETY: a function of this type was just written there.
            let f = unsafe { std::mem::transmute::<u64, extern "sysv64" fn() -> u32>(at) };
            assert_eq!(f(), result);
        }
        assert!(!memory.push(&vec![0; NEAR], &[]), "there is no room for this");
    }
}
