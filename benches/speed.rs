//! The processor's speed, side by side with QEMU's TCG on the same machine in the same run: guest work unprotected,
//! while it is recorded, and while the recording is replayed. Ratios of medians.
//!
//! `cargo bench --bench speed`; FTVM_BENCH_ROUNDS (default 3). The table is printed, and written with a plot to
//! `build/bench/`.

mod marked;

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ftvm_harness::client::{get, Line};
use ftvm_harness::{guests, wait_for, Result, Scratch};
use marked::{run_marked, Guard, Times};

/// The guest's command line for either program.
fn tiny(program: &str, more: &[&str]) -> Result<Command> {
    let (kernel, initrd) = guests::tiny()?;
    let mut c = Command::new(program);
    c.args(["-m", "256", "-nographic", "-no-reboot", "-nic", "none", "-kernel", &kernel, "-initrd", &initrd]);
    c.args(["-append", "console=ttyS0 quiet bench halt"]).args(more);
    Ok(c)
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    Ok(listener.local_addr().map_err(|e| e.to_string())?.port())
}

/// (name, command in the Debian guest)
const DEBIAN_WORK: &[(&str, &str)] = &[
    ("gcc -O1 (400 functions)", "cd /tmp && i=0; while [ $i -lt 400 ]; do echo \"int f$i(int a,int b){int s=0;for(int k=0;k<a;k++){s+=(k*b)^(s>>3);if(s%7==$i%7)s-=k;}return s;}\"; i=$((i+1)); done > b.c && gcc -O1 -c b.c -o b.o"),
    ("xz -1 (4 MB)", "head -c 4000000 /usr/lib/x86_64-linux-gnu/libcrypto.so.3 | xz -1 > /dev/null"),
    ("openssl (AES, SHA-256, RSA)", "openssl speed -seconds 1 -bytes 4096 aes-128-cbc 2>/dev/null; head -c 30000000 /dev/zero | openssl dgst -sha256 && openssl genrsa 2048"),
    ("sqlite (20,000 rows, index, 60 commits)", "cd /root && rm -f b.db && (echo 'create table t(a,b);begin;with recursive n(i) as (select 1 union all select i+1 from n where i<20000) insert into t select i,hex(randomblob(16)) from n;create index x on t(b);commit;'; i=0; while [ $i -lt 60 ]; do echo \"insert into t values($i,'x');\"; i=$((i+1)); done) | sqlite3 b.db"),
    ("disk write and read (48 MB)", "dd if=/dev/zero of=/root/f bs=1M count=48 conv=fsync && echo 3 > /proc/sys/vm/drop_caches && cat /root/f > /dev/null && rm /root/f"),
];

/// Debian from its image: boot to login, and work whose length the client takes.
fn debian(program: &str, more: &[&str], scratch: &Scratch, times: &mut Times) -> Result<()> {
    let image = scratch.path("debian.qcow2");
    guests::run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &guests::debian()?, &image],
    )?;
    let (tcp, http) = (free_port()?, free_port()?);
    let nic = format!("user,model=virtio,hostfwd=tcp:127.0.0.1:{tcp}-:7000,hostfwd=tcp:127.0.0.1:{http}-:80");
    let console = scratch.path("console");
    let _ = std::fs::remove_file(&console);
    let start = Instant::now();
    let _child = Guard(
        Command::new(program)
            .args([
                "-m",
                "512M",
                "-display",
                "none",
                "-monitor",
                "none",
                "-serial",
                &format!("file:{console}"),
            ])
            .args(["-drive", &format!("file={image},if=virtio"), "-nic", &nic])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{program}: {e}"))?,
    );
    let text =
        || std::fs::read(&console).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    wait_for("Debian's ready mark", Duration::from_secs(600), || {
        text().contains("GUEST READY").then_some(())
    })?;
    times.add("Debian: boot to login", start.elapsed().as_secs_f64());
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let mut line = Line::connect(at(tcp))?;
    for (name, work) in DEBIAN_WORK {
        let start = Instant::now();
        let (answer, _) = line.ask(&format!("run {work}"))?;
        if !answer.starts_with("0 ") {
            return Err(format!("{name}: failed in the guest ({answer})"));
        }
        times.add(&format!("Debian: {name}"), start.elapsed().as_secs_f64());
    }
    let start = Instant::now();
    for _ in 0..100 {
        get(at(http)).map_err(|e| e.to_string())?;
    }
    times.add("Debian: nginx (100 requests)", start.elapsed().as_secs_f64());
    let start = Instant::now();
    for _ in 0..300 {
        line.ask("inc")?;
    }
    times.add("Debian: request latency (300)", start.elapsed().as_secs_f64());
    Ok(())
}

/// Bars of one ratio a row, on a logarithmic scale around 1.
fn plot(rows: &[(String, f64)]) -> String {
    let height = 24 * rows.len() + 50;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<text x=\"10\" y=\"18\" font-size=\"14\">Times as fast as QEMU's TCG (no fault \
         tolerance)</text>\n"
    );
    let x = |ratio: f64| 300.0 + 90.0 * ratio.clamp(0.1, 30.0).log2();
    for (i, (name, ratio)) in rows.iter().enumerate() {
        let y = 34 + 24 * i;
        let (from, to) = (x(1.0).min(x(*ratio)), x(1.0).max(x(*ratio)));
        let colour = if *ratio >= 1.0 { "#3a7d44" } else { "#b5483a" };
        let name = name.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{}\">{name}</text><rect x=\"{from:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"16\" \
             fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\">{ratio:.2}</text>",
            y + 13,
            (to - from).max(1.0),
            to + 4.0,
            y + 13
        );
    }
    let one = x(1.0);
    let _ =
        writeln!(svg, "<line x1=\"{one}\" y1=\"28\" x2=\"{one}\" y2=\"{height}\" stroke=\"#444\"/>\n</svg>");
    svg
}

fn geometric(v: &[f64]) -> f64 {
    (v.iter().map(|x| x.ln()).sum::<f64>() / v.len().max(1) as f64).exp()
}

fn bench() -> Result<()> {
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3usize);
    let scratch = Scratch::new("speed")?;
    let (ftvm, qemu) = (guests::ftvm()?, "qemu-system-x86_64".to_owned());
    let [mut plain, mut theirs, mut record, mut their_record, mut replay, mut their_replay]: [Times; 6] =
        Default::default();
    let (log, their_log) = (scratch.path("ftvm.rr"), scratch.path("qemu.rr"));
    let rr = |how: &str, file: &str| format!("shift=auto,rr={how},rrfile={file}");
    for round in 0..rounds {
        run_marked(tiny(&ftvm, &[])?, &mut plain)?;
        run_marked(tiny(&qemu, &["-accel", "tcg"])?, &mut theirs)?;
        run_marked(tiny(&ftvm, &["-icount", &rr("record", &log)])?, &mut record)?;
        run_marked(tiny(&qemu, &["-icount", &rr("record", &their_log)])?, &mut their_record)?;
        run_marked(tiny(&ftvm, &["-icount", &rr("replay", &log)])?, &mut replay)?;
        run_marked(tiny(&qemu, &["-icount", &rr("replay", &their_log)])?, &mut their_replay)?;
        eprintln!("round {round}: benchmarks done");
        debian(&ftvm, &[], &scratch, &mut plain)?;
        debian(&qemu, &["-accel", "tcg"], &scratch, &mut theirs)?;
        eprintln!("round {round}: Debian done");
    }
    let size = |path: &str| std::fs::metadata(path).map_or(0, |m| m.len());
    let mut table = String::from(
        "| guest work | QEMU TCG (s) | ftvm (s) | times as fast | recording / plain | recording vs QEMU's | \
         replaying vs QEMU's |\n|---|---|---|---|---|---|---|\n",
    );
    let (mut ratios, mut bars) = ([vec![], vec![], vec![], vec![]], Vec::new());
    for row in &plain.order {
        let (Some(ours), Some(other)) = (plain.median(row), theirs.median(row)) else { continue };
        let against = |a: &Times, b: &Times| Some(a.median(row)? / b.median(row)?);
        let all = [
            Some(other / ours),
            record.median(row).map(|r| r / ours),
            against(&their_record, &record),
            against(&their_replay, &replay),
        ];
        let shown = all.map(|r| r.map_or("".into(), |r| format!("{r:.2}")));
        let _ = writeln!(
            table,
            "| {row} | {other:.2} | {ours:.2} | {} | {} | {} | {} |",
            shown[0], shown[1], shown[2], shown[3]
        );
        if row != "all of it, start to end" {
            for (list, ratio) in ratios.iter_mut().zip(all) {
                list.extend(ratio);
            }
        }
        bars.push((row.clone(), other / ours));
    }
    let mean = ratios.map(|r| format!("**{:.2}**", geometric(&r)));
    let _ =
        writeln!(table, "| **geometric mean** | | | {} | {} | {} | {} |", mean[0], mean[1], mean[2], mean[3]);
    let _ = writeln!(
        table,
        "\nSize of the recording: ftvm {:.1} KB, QEMU {:.1} KB. Medians of {rounds} rounds.",
        size(&log) as f64 / 1e3,
        size(&their_log) as f64 / 1e3
    );
    marked::report(&table, &[("speed.md", &table), ("speed.svg", &plot(&bars))])
}

fn main() {
    marked::end(bench());
}
