//! QEMU's image locks: OFD byte locks on the image file (QEMU's `block/file-posix.c` documents them).
//!
//! Byte 100+n is locked (shared) by whoever uses permission n, byte 200+n by whoever does not let others
//! use it. An opener takes its locks first and looks for conflicts then, so of two one sees the other.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::BlockError;

const PERM_BASE: i64 = 100;
const SHARED_BASE: i64 = 200;
/// (bit, QEMU's name)
const CONSISTENT_READ: (i64, &str) = (0, "consistent read");
const WRITE: (i64, &str) = (1, "write");
const RESIZE: (i64, &str) = (3, "resize");

fn region(kind: libc::c_int, at: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(file: &File, kind: libc::c_int, at: i64) -> std::io::Result<()> {
    let lock = region(kind, at);
    // SAFETY: fcntl reads the flock, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == -1 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Whether someone else holds a lock on a byte.
fn is_taken(file: &File, at: i64) -> std::io::Result<bool> {
    let mut lock = region(libc::F_WRLCK, at);
    // SAFETY: fcntl reads and writes the flock, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } == -1 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Let every lock go. Closing alone would not do at once: a child that another thread is just starting has a
/// copy of every descriptor until it executes its program, and the locks live as long as the last copy.
pub fn release(file: &File) -> std::io::Result<()> {
    for bit in 0..4 {
        set(file, libc::F_UNLCK, PERM_BASE + bit)?;
        set(file, libc::F_UNLCK, SHARED_BASE + bit)?;
    }
    Ok(())
}

/// Lock an image for reading, or for reading and writing, until [`release`].
pub fn acquire(file: &File, path: &Path, write: bool) -> Result<(), BlockError> {
    let used: &[(i64, &'static str)] =
        if write { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    let unshared: &[(i64, &'static str)] = &[WRITE, RESIZE];
    for (bit, _) in used {
        set(file, libc::F_RDLCK, PERM_BASE + bit)?;
    }
    for (bit, _) in unshared {
        set(file, libc::F_RDLCK, SHARED_BASE + bit)?;
    }
    let locked =
        |lock: &'static str, shared: bool| BlockError::Locked { lock, shared, path: path.to_owned() };
    let mut conflict = None;
    for (bit, name) in used {
        if is_taken(file, SHARED_BASE + bit)? {
            conflict.get_or_insert(locked(name, false));
        }
    }
    for (bit, name) in unshared {
        if is_taken(file, PERM_BASE + bit)? {
            conflict.get_or_insert(locked(name, true));
        }
    }
    match conflict {
        None => Ok(()),
        Some(e) => {
            release(file)?;
            Err(e)
        }
    }
}
