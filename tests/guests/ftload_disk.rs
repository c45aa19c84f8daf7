//! The disk's rows: 4 KiB spread over the disk and 1 MiB in a row, reads and writes, 1 and 16 requests in flight, by Linux's own
//! asynchronous I/O past the page cache. Marks as in `ftload_bench.rs`; the disk's contents are lost.

use std::ffi::c_long;
use std::fs::{File, OpenOptions};
use std::io::{Error, Result, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

const O_DIRECT: i32 = 0o40000;
const IO_SETUP: c_long = 206;
const IO_GETEVENTS: c_long = 208;
const IO_SUBMIT: c_long = 209;
const PREAD: u16 = 0;
const PWRITE: u16 = 1;

extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

/// Linux's `struct iocb` (include/uapi/linux/aio_abi.h).
#[repr(C)]
#[derive(Clone, Default)]
struct Request {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event_fd: u32,
}

/// Linux's `struct io_event`.
#[repr(C)]
#[derive(Clone, Default)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// A page-aligned buffer.
#[repr(align(4096))]
#[derive(Clone)]
struct Page {
    _bytes: [u8; 4096],
}

fn checked(result: c_long) -> Result<c_long> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

struct Disk {
    file: File,
    size: u64,
    context: u64,
}

impl Disk {
    fn open(path: &str) -> Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path)?;
        let size = file.seek(SeekFrom::End(0))?;
        let mut context = 0u64;
        // SAFETY: the kernel writes the context's number.
        checked(unsafe { syscall(IO_SETUP, 16 as c_long, &mut context) })?;
        Ok(Disk { file, size, context })
    }

    /// `count` requests of `block` bytes, `depth` of them in flight at any time.
    fn load(&self, block: u64, write: bool, depth: usize, count: u64) -> Result<()> {
        let mut buffers = vec![vec![Page { _bytes: [0xA5; 4096] }; block as usize / 4096]; depth];
        let mut requests: Vec<Request> = (0..depth)
            .map(|slot| Request {
                data: slot as u64,
                opcode: if write { PWRITE } else { PREAD },
                fd: self.file.as_raw_fd() as u32,
                buffer: buffers[slot].as_mut_ptr() as u64,
                len: block,
                ..Request::default()
            })
            .collect();
        let (blocks, mut state, mut submitted) = (self.size / block, 1u64, 0u64);
        let mut submit = |slot: usize| -> Result<()> {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = if block == 4096 { (state >> 33) % blocks } else { submitted % blocks };
            submitted += 1;
            requests[slot].offset = (at * block) as i64;
            let mut list = [&mut requests[slot] as *mut Request];
            // SAFETY: the request and its buffer live until `load` has seen it end (after an error the program ends).
            checked(unsafe { syscall(IO_SUBMIT, self.context, 1 as c_long, list.as_mut_ptr()) }).map(|_| ())
        };
        for slot in 0..depth.min(count as usize) {
            submit(slot)?;
        }
        let (mut ended, mut to_submit) = (0, count - depth.min(count as usize) as u64);
        let mut events = vec![Event::default(); depth];
        while ended < count {
            // SAFETY: there is room for `depth` events; no timeout.
            let got = unsafe {
                syscall(IO_GETEVENTS, self.context, 1 as c_long, depth as c_long, events.as_mut_ptr(), 0usize)
            };
            for event in &events[..checked(got)? as usize] {
                if event.result != block as i64 {
                    return Err(Error::other(format!("a request ended with {}", event.result)));
                }
                ended += 1;
                if to_submit > 0 {
                    to_submit -= 1;
                    submit(event.data as usize)?;
                }
            }
        }
        Ok(())
    }
}

/// Run every row on the disk `path`; a row's name begins with the number of its requests.
pub fn run(path: &str) -> Result<()> {
    let disk = Disk::open(path)?;
    for (size, block, count) in [("4 KiB", 4096, 8000), ("1 MiB", 1 << 20, 2000)] {
        for (what, write) in [("reads", false), ("writes", true)] {
            for depth in [1, 16] {
                let name = format!("{count} {what} of {size}, depth {depth}");
                // What comes first (the driver's own memory, code to be compiled) is not the disk's.
                disk.load(block, write, depth, count / 10)?;
                println!("row {name} start");
                std::io::stdout().flush()?;
                disk.load(block, write, depth, count)?;
                println!("row {name} end");
                std::io::stdout().flush()?;
            }
        }
    }
    Ok(())
}
