//! The block layer alone, side by side with QEMU's on the same image in the same run: 4 KiB spread over the
//! image and 1 MiB in a row, reads and writes, queue depths 1 and 16; and writes that are durable each.
//!
//! `cargo bench --bench block [-- IMAGE...]`: images are paths or URLs of qcow2 or raw images whose contents
//! may be destroyed; without one a qcow2 image of 1 GiB is made in the temporary directory. QEMU's side is
//! `qemu-img bench` with the same offsets. FTVM_BENCH_ROWS chooses rows by a part of their names. Each row is the median of
//! FTVM_BENCH_ROUNDS (default 7) rounds in which both sides take turns, and of each round's ratio. The processor time of a request (user and
//! system, in microseconds) is the second witness where others use the machine too.
//!
//! `qemu-img bench` has one buffer for all its requests, however many are under way (strace shows it): at depth 16 it copies 1 MiB
//! that lies in the processor's cache again and again, which no machine's requests do. Where there is a C compiler, a
//! preloaded library gives each of them a buffer of its own, of those that it has set aside and filled for that.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Instant;

// For its allocator.
use ftvm as _;
use ftvm_block::queue::Settings;
use ftvm_block::{buffers, OpenOptions, Queue, Request};
use nix::sys::resource::{getrusage, UsageWho};

/// (name, block, step, write, durable, requests)
const ROWS: &[(&str, u64, u64, bool, bool, u64)] = &[
    ("4 KiB read", 4096, 16_781_312, false, false, 20_000),
    ("4 KiB write", 4096, 16_781_312, true, false, 20_000),
    ("4 KiB durable write", 4096, 16_781_312, true, true, 600),
    ("1 MiB read", 1 << 20, 1 << 20, false, false, 4000),
    ("1 MiB write", 1 << 20, 1 << 20, true, false, 4000),
];

/// What both write: the processor copies zeroes faster than anything else.
const PATTERN: u8 = 0xA5;

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr)));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn ours(image: &str, row: &(&str, u64, u64, bool, bool, u64), depth: u64) -> Result<f64, String> {
    let (_, block, step, write, durable, count) = *row;
    let opened = ftvm_block::open(Path::new(image), &OpenOptions::default()).map_err(|e| e.to_string())?;
    let size = opened.size();
    let (send, done) = channel();
    let settings = Settings { durable, ..Settings::default() };
    let on_done = move |d| {
        let _ = send.send(d);
    };
    let queue = Queue::start("bench", opened, settings, Box::new(on_done)).map_err(|e| e.to_string())?;
    // QEMU's buffers are there and filled before its clock starts, too. (Untouched memory would all be one page of zeroes.)
    let warm: Vec<Vec<u8>> = (0..depth).map(|_| buffers::take(block as usize)).collect();
    for mut buffer in warm {
        buffer.fill(PATTERN);
        buffers::give(buffer);
    }
    let start = Instant::now();
    let mut offset = 0;
    let mut submit = |id: u64| {
        let request = if write {
            let mut data = buffers::take(block as usize);
            if id < depth && data[0] != PATTERN {
                data.fill(PATTERN);
            }
            Request::Write { offset, data }
        } else {
            Request::Read { offset, len: block as u32 }
        };
        offset += step;
        if offset + block > size {
            offset %= size;
            if offset + block > size {
                offset = 0;
            }
        }
        queue.submit(id, request);
    };
    let mut submitted = depth.min(count);
    (0..submitted).for_each(&mut submit);
    for _ in 0..count {
        let d = done.recv().map_err(|e| e.to_string())?;
        buffers::give(d.result.map_err(|e| e.to_string())?);
        if let Request::Write { data, .. } = d.request {
            buffers::give(data);
        }
        if submitted < count {
            submit(submitted);
            submitted += 1;
        }
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// What to preload so that QEMU's requests of this size have a buffer each.
fn own_buffers(block: u64, depth: u64) -> Option<String> {
    let source = format!(
        r#"#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define CALL(name, pointer) \
    ssize_t name(int fd, pointer buf, size_t len, off_t at) {{ \
        static ssize_t (*real)(int, pointer, size_t, off_t); \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return real(fd, (char *)buf + (len == {block} ? at / {block} % {depth} * {block} : 0), len, at); \
    }}
CALL(pwrite64, const void *)
CALL(pread64, void *)
"#
    );
    let base = std::env::temp_dir().join(format!("ftvm-bench-{}-{depth}-{block}", std::process::id()));
    let (c, library) = (base.with_extension("c"), base.with_extension("so"));
    if !library.exists() {
        std::fs::write(&c, source).ok()?;
        let [from, to] = [&c, &library].map(|p| p.to_string_lossy().into_owned());
        let made = run("cc", &["-O2", "-shared", "-fPIC", "-w", "-o", &to, &from, "-ldl"]);
        if let Err(e) = made {
            eprintln!("QEMU's requests share a buffer: {e}");
            return None;
        }
    }
    Some(format!("LD_PRELOAD={}", library.display()))
}

fn theirs(image: &str, row: &(&str, u64, u64, bool, bool, u64), depth: u64) -> Result<f64, String> {
    let (_, block, step, write, durable, count) = *row;
    let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
    let (c, d, s, step) = (count.to_string(), depth.to_string(), block.to_string(), step.to_string());
    let mut args = vec!["bench", "-f", format, "-c", &c, "-d", &d, "-s", &s, "-S", &step];
    args.extend(["-t", if durable { "writethrough" } else { "writeback" }]);
    let pattern = format!("--pattern={PATTERN}");
    if write {
        args.extend(["-w", &pattern]);
    }
    args.push(image);
    let preload = own_buffers(block, depth);
    let mut env = vec!["-u", "LD_PRELOAD"];
    if let Some(preload) = preload.as_deref().filter(|_| block >= 1 << 20) {
        env = vec![preload];
    }
    env.push("qemu-img");
    env.extend(args);
    let text = run("env", &env)?;
    let seconds = text.split("Run completed in ").nth(1).and_then(|t| t.split(' ').next());
    let seconds: f64 = seconds.and_then(|t| t.parse().ok()).ok_or_else(|| format!("qemu-img said {text}"))?;
    Ok(count as f64 / seconds)
}

/// Seconds of processor time that this program, or what it has started and waited for, has used.
fn cpu(whose: UsageWho) -> f64 {
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    getrusage(whose).map_or(0.0, |u| seconds(u.user_time()) + seconds(u.system_time()))
}

/// Requests a second, and microseconds of processor time for each.
type Measured = (f64, f64);

/// Measure what `run` does.
fn measure(
    whose: UsageWho,
    count: u64,
    run: impl FnOnce() -> Result<f64, String>,
) -> Result<Measured, String> {
    let before = cpu(whose);
    let rate = run()?;
    Ok((rate, (cpu(whose) - before) * 1e6 / count as f64))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), String> {
    let mut images: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let made = std::env::temp_dir().join(format!("ftvm-bench-{}.qcow2", std::process::id()));
    if images.is_empty() {
        let path = made.to_string_lossy().into_owned();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1G"])?;
        images.push(path);
    }
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|v| v.parse().ok()).unwrap_or(7);
    for image in &images {
        println!(
            "{image}\n{:22} {:>3} {:>10} {:>10} {:>6}   {:>9} {:>9}",
            "requests a second", "QD", "ftvm", "QEMU", "ratio", "ftvm (us)", "QEMU (us)"
        );
        // Both write where clusters exist already.
        ours(image, &("fill", 1 << 20, 1 << 20, true, false, 1024), 4)?;
        let wanted = std::env::var("FTVM_BENCH_ROWS").unwrap_or_default();
        for row in ROWS.iter().filter(|row| row.0.contains(&wanted)) {
            for depth in [1, 16] {
                let mut all = Vec::new();
                for round in 0..rounds {
                    let ours = || measure(UsageWho::RUSAGE_SELF, row.5, || ours(image, row, depth));
                    let theirs = || measure(UsageWho::RUSAGE_CHILDREN, row.5, || theirs(image, row, depth));
                    // Neither is always the first.
                    all.push(if round % 2 == 0 {
                        (ours()?, theirs()?)
                    } else {
                        let second = theirs()?;
                        (ours()?, second)
                    });
                }
                let of = |f: fn(&(Measured, Measured)) -> f64| median(all.iter().map(f));
                println!(
                    "{:22} {depth:>3} {:>10.0} {:>10.0} {:>6.2}   {:>9.0} {:>9.0}",
                    row.0,
                    of(|r| r.0 .0),
                    of(|r| r.1 .0),
                    of(|r| r.0 .0 / r.1 .0),
                    of(|r| r.0 .1),
                    of(|r| r.1 .1)
                );
            }
        }
    }
    let _ = std::fs::remove_file(made);
    Ok(())
}
