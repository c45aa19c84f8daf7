//! Benchmarks inside a guest: fixed amounts of work, with `row NAME start` and `row NAME end` on the console around each.
//! The host takes the time of the marks, since a guest's own clock may be virtual.

#[path = "ftload_disk.rs"]
mod disk;

use std::hint::black_box;
use std::io::Write;
use std::process::Command;

extern "C" {
    fn getppid() -> i32;
    fn mmap(at: *mut u8, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn munmap(at: *mut u8, len: usize) -> i32;
    fn pipe(fds: *mut i32) -> i32;
    fn fork() -> i32;
    fn _exit(status: i32) -> !;
    fn read(fd: i32, to: *mut u8, len: usize) -> isize;
    fn write(fd: i32, from: *const u8, len: usize) -> isize;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
}

fn integer() -> u64 {
    let (mut x, mut y) = (1u64, 7u64);
    for i in 0..300_000_000u64 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i);
        y ^= x >> 29;
        y = y.rotate_left(9).wrapping_sub(x);
    }
    x ^ y
}

fn float() -> u64 {
    let (mut x, mut y) = (1.0f64, 0.5f64);
    for i in 0..16_000_000u64 {
        x = x * 1.000_000_1 + y / (1.0 + (i & 15) as f64);
        y = (x - y).abs().sqrt();
    }
    (x + y).to_bits()
}

/// Loops over arrays that the compiler turns into vector instructions.
fn vector() -> u64 {
    let a: Vec<f32> = (0..4096).map(|i| i as f32 * 0.5).collect();
    let b: Vec<u32> = (0..4096u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let (mut c, mut d) = (vec![0f32; 4096], vec![0u32; 4096]);
    for round in 0..12_000u32 {
        for ((c, a), i) in c.iter_mut().zip(&a).zip(0..) {
            *c = *c * 0.99 + a * (round & 7) as f32 + i as f32;
        }
        for (d, b) in d.iter_mut().zip(&b) {
            *d = (*d ^ b).wrapping_add(round) >> 1;
        }
        black_box((&c, &d));
    }
    c.iter().map(|v| u64::from(v.to_bits())).sum::<u64>() ^ d.iter().map(|v| u64::from(*v)).sum::<u64>()
}

fn copy() -> u64 {
    let from = vec![3u8; 1 << 20];
    let mut to = vec![0u8; 1 << 20];
    for i in 0..3000usize {
        to.copy_from_slice(&from);
        to[i & 0xFFFF] = i as u8;
        black_box(&to);
    }
    u64::from(to[77])
}

fn chase() -> u64 {
    const N: usize = 1 << 19;
    let mut next: Vec<u32> = (0..N as u32).collect();
    let mut r = 12345u64;
    for i in (1..N).rev() {
        r = r.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        next.swap(i, (r >> 33) as usize % i);
    }
    let mut at = 0u32;
    for _ in 0..12_000_000 {
        at = next[at as usize];
    }
    u64::from(at)
}

fn sort() -> u64 {
    let mut r = 1u64;
    let mut v: Vec<u64> = (0..4_000_000)
        .map(|_| {
            r = r.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            r >> 20
        })
        .collect();
    v.sort_unstable();
    v[v.len() / 2]
}

#[inline(never)]
fn fib(n: u32) -> u64 {
    if n < 2 {
        u64::from(n)
    } else {
        fib(black_box(n - 1)) + fib(n - 2)
    }
}

/// Calls through pointers that vary.
fn indirect() -> u64 {
    let table: [fn(u64) -> u64; 4] = [|x| x + 1, |x| x ^ 0x55, |x| x.rotate_left(3), |x| x.wrapping_mul(5)];
    let mut x = 1u64;
    for i in 0..40_000_000usize {
        x = black_box(table[(i ^ (i >> 3)) & 3])(x);
    }
    x
}

fn system_calls() -> u64 {
    // SAFETY: getppid has no arguments.
    (0..800_000).map(|_| unsafe { getppid() } as u64).sum()
}

fn fork_exec() -> u64 {
    (0..300).map(|_| Command::new("/bin/busybox").arg("true").status().map_or(0, |s| s.success() as u64)).sum()
}

fn switches() -> u64 {
    let (mut there, mut back) = ([0i32; 2], [0i32; 2]);
    let mut byte = 0u8;
    // SAFETY: the arrays hold two descriptors each; the child only reads, writes and ends.
    unsafe {
        pipe(there.as_mut_ptr());
        pipe(back.as_mut_ptr());
        let child = fork();
        if child == 0 {
            for _ in 0..15_000 {
                read(there[0], &mut byte, 1);
                write(back[1], &byte, 1);
            }
            _exit(0);
        }
        for i in 0..15_000u32 {
            byte = i as u8;
            write(there[1], &byte, 1);
            read(back[0], &mut byte, 1);
        }
        waitpid(child, std::ptr::null_mut(), 0);
    }
    u64::from(byte)
}

fn page_faults() -> u64 {
    const LEN: usize = 16 << 20;
    let mut sum = 0;
    for round in 0..24u8 {
        // SAFETY: a new private mapping, touched within its length and unmapped.
        unsafe {
            let p = mmap(std::ptr::null_mut(), LEN, 3, 0x22, -1, 0);
            for at in (0..LEN).step_by(4096) {
                p.add(at).write_volatile(round);
            }
            sum += u64::from(p.add(LEN - 4096).read_volatile());
            munmap(p, LEN);
        }
    }
    sum
}

/// Run every row; with a disk as the next argument of the program, the disk's.
pub fn run() {
    if let Some(path) = std::env::args().nth(2) {
        if let Err(e) = disk::run(&path) {
            println!("{path}: {e}");
            std::process::exit(1);
        }
        return;
    }
    let rows: [(&str, fn() -> u64); 12] = [
        ("integer", integer),
        ("floating point", float),
        ("vectors", vector),
        ("memory copy", copy),
        ("pointer chasing", chase),
        ("sorting", sort),
        ("calls", || fib(37)),
        ("indirect calls", indirect),
        ("system calls", system_calls),
        ("fork and exec", fork_exec),
        ("context switches", switches),
        ("page faults", page_faults),
    ];
    for (name, row) in rows {
        println!("row {name} start");
        let _ = std::io::stdout().flush();
        let result = black_box(row());
        println!("row {name} end {result:x}");
        let _ = std::io::stdout().flush();
    }
}
