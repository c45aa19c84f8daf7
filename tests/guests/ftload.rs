//! The work that test guests do: small services whose every answer can be checked from outside.
//! One static binary without dependencies: `rustc -O -C target-feature=+crt-static ftload.rs`.
//!
//! `ftload serve PORT JOURNAL`   a line protocol over TCP, many connections:
//!     `inc`            -> `N`: how many `inc` this connection has sent (the state of a session)
//!     `put TEXT`       -> `ok N`: TEXT is line N of the journal, synced to disk before the answer
//!     `get N`          -> `TEXT` of line N
//!     `count`          -> lines in the journal
//!     `sum`            -> CRC-32 of the journal file as it lies on disk
//!     `time`           -> the guest's clock in ns
//!     `run COMMAND`    -> `STATUS SECONDS`: exit status of `sh -c COMMAND` and how long it took by the guest's clock
//! `ftload http PORT`            answers every GET with a counter that grows by one a request
//! `ftload spin SECONDS`         computes, prints a checksum
//! `ftload disk FILE MIB SEED`   writes a pattern, syncs, drops it from memory, reads it back
//! `ftload console N`            prints N numbered lines
//! `ftload bench`                runs the rows of `ftload_bench.rs`, with a mark before and after each

#[path = "ftload_bench.rs"]
mod bench;

use std::collections::hash_map::DefaultHasher;
use std::fs::{File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn crc32(data: &[u8], mut crc: u32) -> u32 {
    crc = !crc;
    for b in data {
        crc ^= u32::from(*b);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

struct Journal {
    file: File,
    lines: Vec<String>,
}

fn open_journal(path: &str) -> std::io::Result<Journal> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(Journal { lines: text.lines().map(str::to_owned).collect(), file })
}

fn session(stream: TcpStream, journal: &Mutex<Journal>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut out = stream.try_clone()?;
    let mut incs = 0u64;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = match verb {
            "inc" => {
                incs += 1;
                incs.to_string()
            }
            "put" => {
                let mut j = journal.lock().unwrap();
                j.file.write_all(format!("{rest}\n").as_bytes())?;
                j.file.sync_data()?;
                j.lines.push(rest.to_owned());
                format!("ok {}", j.lines.len() - 1)
            }
            "get" => {
                let j = journal.lock().unwrap();
                rest.parse::<usize>().ok().and_then(|n| j.lines.get(n).cloned()).unwrap_or_else(|| "none".into())
            }
            "count" => journal.lock().unwrap().lines.len().to_string(),
            "sum" => {
                let mut j = journal.lock().unwrap();
                let mut all = Vec::new();
                j.file.seek(SeekFrom::Start(0))?;
                j.file.read_to_end(&mut all)?;
                format!("{:08x}", crc32(&all, 0))
            }
            "time" => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos()).to_string(),
            "run" => {
                let start = Instant::now();
                let status = std::process::Command::new("sh")
                    .args(["-c", rest])
                    .stdin(std::process::Stdio::null())
                    .stdout(std::process::Stdio::null())
                    .stderr(std::process::Stdio::null())
                    .status()?;
                format!("{} {:.3}", status.code().unwrap_or(-1), start.elapsed().as_secs_f64())
            }
            _ => "what?".to_owned(),
        };
        out.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn serve(port: u16, path: &str) -> std::io::Result<()> {
    let journal = Arc::new(Mutex::new(open_journal(path)?));
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("ftload: serving on {port}");
    for stream in listener.incoming().flatten() {
        let journal = Arc::clone(&journal);
        std::thread::spawn(move || session(stream, &journal));
    }
    Ok(())
}

fn http(port: u16) -> std::io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    let count = Arc::new(Mutex::new(0u64));
    println!("ftload: http on {port}");
    for stream in listener.incoming().flatten() {
        let count = Arc::clone(&count);
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut out = stream.try_clone()?;
            let (mut first, mut last) = (true, false);
            for line in BufReader::new(stream).lines() {
                let line = line?;
                if first && !line.starts_with("GET ") {
                    return Ok(());
                }
                if first {
                    last = line.ends_with("HTTP/1.0");
                }
                first = false;
                if line.is_empty() {
                    let n = {
                        let mut c = count.lock().unwrap();
                        *c += 1;
                        *c
                    };
                    let body = format!("{n}\n");
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                    out.write_all(head.as_bytes())?;
                    if last {
                        return Ok(());
                    }
                    first = true;
                }
            }
            Ok(())
        });
    }
    Ok(())
}

fn spin(seconds: f64) {
    let start = Instant::now();
    let (mut rounds, mut x) = (0u64, 1u64);
    while start.elapsed() < Duration::from_secs_f64(seconds) {
        for i in 0..100_000u64 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i) ^ (x >> 29);
        }
        rounds += 1;
    }
    println!("spin {rounds} rounds, last {x:016x}");
}

fn disk(path: &str, mib: usize, seed: u64) -> std::io::Result<()> {
    let block = |i: usize| {
        let mut h = DefaultHasher::new();
        (seed, i).hash(&mut h);
        let mut x = h.finish();
        let mut data = vec![0u8; 1 << 16];
        for chunk in data.chunks_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            chunk.copy_from_slice(&x.to_le_bytes());
        }
        data
    };
    let mut f = File::create(path)?;
    for i in 0..mib * 16 {
        f.write_all(&block(i))?;
    }
    f.sync_all()?;
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    let mut f = File::open(path)?;
    let mut got = vec![0u8; 1 << 16];
    for i in 0..mib * 16 {
        f.read_exact(&mut got)?;
        if got != block(i) {
            println!("disk: block {i} differs");
            std::process::exit(1);
        }
    }
    println!("disk: {mib} MiB ok");
    Ok(())
}

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |i: usize| args.get(i).map_or("", String::as_str);
    let num = |i: usize| arg(i).parse::<u64>().unwrap_or(0);
    match arg(1) {
        "serve" => serve(num(2) as u16, arg(3)),
        "http" => http(num(2) as u16),
        "spin" => {
            spin(arg(2).parse().unwrap_or(1.0));
            Ok(())
        }
        "disk" => disk(arg(2), num(3) as usize, num(4)),
        "bench" => {
            bench::run();
            Ok(())
        }
        "console" => {
            for i in 0..num(2) {
                println!("line {i} of {}", num(2));
            }
            Ok(())
        }
        _ => {
            eprintln!("usage: ftload serve PORT JOURNAL | http PORT | spin SECONDS | disk FILE MIB SEED | console N | bench");
            std::process::exit(2);
        }
    }
}
