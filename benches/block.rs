//! The block layer alone, side by side with QEMU's on the same image in the same run: 4 KiB spread over the
//! image and 1 MiB in a row, reads and writes, queue depths 1 and 16; and writes that are durable each.
//!
//! `cargo bench --bench block [-- IMAGE...]`: images are paths or URLs of qcow2 or raw images whose contents
//! may be destroyed; without one a qcow2 image of 1 GiB is made in the temporary directory. QEMU's side is
//! `qemu-img bench` with the same offsets. FTVM_BENCH_ROWS chooses rows by a part of their names. Each row is the best of FTVM_BENCH_ROUNDS (default 5) of each side in turn.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Instant;

// For its allocator.
use ftvm as _;
use ftvm_block::queue::Settings;
use ftvm_block::{buffers, OpenOptions, Queue, Request};

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
    let start = Instant::now();
    let mut offset = 0;
    let mut submit = |id: u64| {
        let request = if write {
            let mut data = buffers::take(block as usize);
            if id < depth {
                // Untouched memory would all be one page of zeroes. QEMU's buffers are filled once, too.
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
    let text = run("qemu-img", &args)?;
    let seconds = text.split("Run completed in ").nth(1).and_then(|t| t.split(' ').next());
    let seconds: f64 = seconds.and_then(|t| t.parse().ok()).ok_or_else(|| format!("qemu-img said {text}"))?;
    Ok(count as f64 / seconds)
}

fn main() -> Result<(), String> {
    let mut images: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let made = std::env::temp_dir().join(format!("ftvm-bench-{}.qcow2", std::process::id()));
    if images.is_empty() {
        let path = made.to_string_lossy().into_owned();
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1G"])?;
        images.push(path);
    }
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|v| v.parse().ok()).unwrap_or(5);
    for image in &images {
        println!(
            "{image}\n{:22} {:>3} {:>12} {:>12} {:>6}",
            "requests a second", "QD", "ftvm", "QEMU", "ratio"
        );
        // Both write where clusters exist already.
        ours(image, &("fill", 1 << 20, 1 << 20, true, false, 1024), 4)?;
        let wanted = std::env::var("FTVM_BENCH_ROWS").unwrap_or_default();
        for row in ROWS.iter().filter(|row| row.0.contains(&wanted)) {
            for depth in [1, 16] {
                let (mut a, mut b) = (Vec::new(), Vec::new());
                for _ in 0..rounds {
                    a.push(ours(image, row, depth)?);
                    b.push(theirs(image, row, depth)?);
                }
                // The best of each: what else runs on the host only takes away.
                let best = |v: Vec<f64>| v.into_iter().fold(0.0, f64::max);
                let (a, b) = (best(a), best(b));
                println!("{:22} {depth:>3} {a:>12.0} {b:>12.0} {:>6.2}", row.0, a / b);
            }
        }
    }
    let _ = std::fs::remove_file(made);
    Ok(())
}
