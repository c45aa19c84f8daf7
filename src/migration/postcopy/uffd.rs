//! Linux's userfaultfd: whoever touches a page that is not there waits until another thread puts it there
//! (Documentation/admin-guide/mm/userfaultfd.rst, include/uapi/linux/userfaultfd.h).
//!
//! (The crate `userfaultfd` needs libclang to be built, for these five calls.)

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::migration::stream::PAGE;

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: i32 = 1;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of a `struct uffd_msg`, and where a fault's address is in it.
const MESSAGE: usize = 32;
const ADDRESS: std::ops::Range<usize> = 16..24;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

nix::ioctl_write_int_bad!(
    /// Make one, by the device.
    uffd_new,
    nix::request_code_none!(0xAA, 0x00)
);
nix::ioctl_readwrite!(
    /// Agree on a version.
    uffd_api,
    0xAA,
    0x3F,
    Api
);
nix::ioctl_readwrite!(
    /// Watch a range.
    uffd_register,
    0xAA,
    0x00,
    Register
);
nix::ioctl_read!(
    /// Watch it no more.
    uffd_unregister,
    0xAA,
    0x01,
    Range
);
nix::ioctl_read!(
    /// Let those go on that wait.
    uffd_wake,
    0xAA,
    0x02,
    Range
);
nix::ioctl_readwrite!(
    /// Put a page there.
    uffd_copy,
    0xAA,
    0x03,
    Copy
);
nix::ioctl_readwrite!(
    /// Put a page of zeros there.
    uffd_zero,
    0xAA,
    0x04,
    Zero
);

/// Pages of this process's memory that others must bring.
pub struct Uffd(OwnedFd);

fn by_system_call(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: a number goes in, a new descriptor or an error comes out.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn by_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: as above.
    let fd = unsafe { uffd_new(device.as_raw_fd(), libc::O_CLOEXEC | libc::O_NONBLOCK) }?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Uffd {
    /// `kernel`: the kernel may touch such pages too (KVM does), not only this program's own threads. That takes a
    /// privilege: access to /dev/userfaultfd, CAP_SYS_PTRACE, or the sysctl vm.unprivileged_userfaultfd.
    pub fn open(kernel: bool) -> io::Result<Uffd> {
        let mut made = by_device().or_else(|_| by_system_call(0));
        if !kernel {
            made = made.or_else(|_| by_system_call(UFFD_USER_MODE_ONLY));
        }
        let uffd = Uffd(made?);
        let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: the argument is of the call's type, and lives across it.
        unsafe { uffd_api(uffd.0.as_raw_fd(), &mut api) }?;
        Ok(uffd)
    }

    /// Watch a range of whole pages.
    pub fn register(&self, start: usize, len: usize) -> io::Result<()> {
        let range = Range { start: start as u64, len: len as u64 };
        let mut register = Register { range, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: the argument is of the call's type, and lives across it. What it names is not changed, only watched.
        unsafe { uffd_register(self.0.as_raw_fd(), &mut register) }?;
        Ok(())
    }

    /// Watch it no more; whoever waits there goes on, with pages of zeros.
    pub fn unregister(&self, start: usize, len: usize) -> io::Result<()> {
        let mut range = Range { start: start as u64, len: len as u64 };
        // SAFETY: as above.
        unsafe { uffd_unregister(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Put a page at `to` (a page boundary in a watched range), where there is none; who waits for it goes on. False: there is one.
    pub fn put(&self, to: usize, page: Option<&[u8; PAGE]>) -> io::Result<bool> {
        if let Some(page) = page {
            return self.put_run(to, page).map(|pages| pages > 0);
        }
        loop {
            let range = Range { start: to as u64, len: PAGE as u64 };
            let mut zero = Zero { range, mode: 0, zeroed: 0 };
            // SAFETY: as above. The kernel writes only where nothing was, in a range that `register` was called for: guest
            // memory, which no Rust reference is to.
            match unsafe { uffd_zero(self.0.as_raw_fd(), &mut zero) } {
                Ok(_) => return Ok(true),
                Err(nix::Error::EEXIST) => return Ok(false),
                // The map of memory is being changed.
                Err(nix::Error::EAGAIN) => std::thread::yield_now(),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// As [`Self::put`], pages one behind the other from `to` on. Returns how many were put: those before the first that is there.
    pub fn put_run(&self, to: usize, pages: &[u8]) -> io::Result<usize> {
        let len = (pages.len() - pages.len() % PAGE) as u64;
        loop {
            let mut copy = Copy { to: to as u64, from: pages.as_ptr() as u64, len, mode: 0, copied: 0 };
            // SAFETY: as above. The kernel reads `len` bytes from `from`, which are `pages`.
            match unsafe { uffd_copy(self.0.as_raw_fd(), &mut copy) } {
                Ok(_) => return Ok(pages.len() / PAGE),
                Err(nix::Error::EEXIST) => return Ok(0),
                // Some of them.
                Err(nix::Error::EAGAIN) if copy.copied > 0 => return Ok(copy.copied as usize / PAGE),
                Err(nix::Error::EAGAIN) => std::thread::yield_now(),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Let those go on that wait for the page at `at`, which is there.
    pub fn wake(&self, at: usize) -> io::Result<()> {
        let mut range = Range { start: at as u64, len: PAGE as u64 };
        // SAFETY: as above.
        unsafe { uffd_wake(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// The addresses that are waited for, as far as they were not told of yet; none after `within`.
    pub fn faults(&self, within: Duration) -> io::Result<Vec<usize>> {
        let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::Error::EINTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let mut raw = [0; 64 * MESSAGE];
        let n = match nix::unistd::read(&self.0, &mut raw) {
            Ok(n) => n,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let faults = raw[..n].chunks_exact(MESSAGE).filter(|m| m[0] == EVENT_PAGEFAULT);
        let address = |m: &[u8]| m[ADDRESS].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
        Ok(faults.map(address).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::MmapRegion;

    #[test]
    fn who_touches_a_missing_page_waits_for_it() {
        let Ok(uffd) = Uffd::open(false) else {
            eprintln!("skipped: this host gives no userfaultfd");
            return;
        };
        let map = MmapRegion::<()>::new(8 * PAGE).unwrap();
        let start = map.as_ptr() as usize;
        uffd.register(start, 8 * PAGE).unwrap();
        // SAFETY: the page lies in the mapping, which lives until the thread has ended.
        let touch = |n: usize| std::thread::spawn(move || unsafe { *((start + n * PAGE + 9) as *const u8) });
        let wait = || loop {
            if let Some(at) = uffd.faults(Duration::from_millis(50)).unwrap().first() {
                return *at;
            }
        };
        let toucher = touch(3);
        assert_eq!(wait() & !(PAGE - 1), start + 3 * PAGE);
        assert!(uffd.put(start + 3 * PAGE, Some(&[7; PAGE])).unwrap());
        assert_eq!(toucher.join().unwrap(), 7);
        assert!(!uffd.put(start + 3 * PAGE, Some(&[8; PAGE])).unwrap(), "what is there stays");
        assert_eq!(uffd.put_run(start + PAGE, &[9; 4 * PAGE]).unwrap(), 2, "up to what is there");
        assert_eq!(uffd.put_run(start + 3 * PAGE, &[9; PAGE]).unwrap(), 0);
        uffd.wake(start + 3 * PAGE).unwrap();
        let toucher = touch(4);
        wait();
        assert!(uffd.put(start + 4 * PAGE, None).unwrap());
        assert_eq!(toucher.join().unwrap(), 0);
        let toucher = touch(5);
        wait();
        uffd.unregister(start, 8 * PAGE).unwrap();
        assert_eq!(toucher.join().unwrap(), 0);
    }
}
