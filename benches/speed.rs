//! The processor's speed, side by side with QEMU's TCG on the same machine in the same run: guest work unprotected,
//! while it is recorded, and while the recording is replayed; and how much of a log the recording is. Ratios of medians.
//!
//! `cargo bench --bench speed`; FTVM_BENCH_ROUNDS (default 3). The table is printed, and written with a plot to
//! `build/bench/`, after each round. QEMU does not record user networking, so of Debian only ftvm's recording is there.

mod marked;

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ftvm_harness::client::{get, Line};
use ftvm_harness::{guests, wait_for, Result, Scratch};
use marked::{run_marked, Guard, Meter, Runs};

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    Ok(listener.local_addr().map_err(|e| e.to_string())?.port())
}

/// (name, command in the Debian guest)
const DEBIAN_WORK: &[(&str, &str)] = &[
    ("gcc -O1 (400 functions)", "cd /tmp && i=0; while [ $i -lt 400 ]; do echo \"int f$i(int a,int b){int s=0;for(int k=0;k<a;k++){s+=(k*b)^(s>>3);if(s%7==$i%7)s-=k;}return s;}\"; i=$((i+1)); done > b.c && gcc -O1 -c b.c -o b.o"),
    ("xz -1 (4 MB)", "head -c 4000000 /usr/lib/x86_64-linux-gnu/libcrypto.so.3 | xz -1 > /dev/null"),
    ("openssl (AES, SHA-256, RSA)", "head -c 12000000 /dev/zero | openssl enc -aes-128-cbc -K 00 -iv 00 > /dev/null && head -c 12000000 /dev/zero | openssl dgst -sha256 && for i in 1 2 3 4; do openssl dgst -sha256 -sign /tmp/rsa.der -out /tmp/signed /etc/passwd || exit 1; done"),
    ("sqlite (20,000 rows, index, 60 commits)", "cd /root && rm -f b.db && (echo 'create table t(a,b);begin;with recursive n(i) as (select 1 union all select i+1 from n where i<20000) insert into t select i,hex(randomblob(16)) from n;create index x on t(b);commit;'; i=0; while [ $i -lt 60 ]; do echo \"insert into t values($i,'x');\"; i=$((i+1)); done) | sqlite3 b.db"),
    ("disk write and read (48 MB)", "dd if=/dev/zero of=/root/f bs=1M count=48 conv=fsync && echo 3 > /proc/sys/vm/drop_caches && cat /root/f > /dev/null && rm /root/f"),
];

/// An RSA key for the Debian guest, the same for all: making one is work of random length.
const RSA_KEY: &str = "openssl genrsa 4096 2>/dev/null | openssl rsa -outform DER 2>/dev/null | base64 -w0";
/// The paper's logging bandwidth.
const PAPER: &str = "1.5 to 18; 0.5 to 1.5";

/// A row of the Debian guest's that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(600);
/// Requests to the Debian guest's services.
const HTTP: usize = 300;
const LATENCY: usize = 3000;

/// A way to run the guests, and what came of it.
struct Way {
    program: String,
    args: Vec<String>,
    /// QMP's, of an ftvm that records.
    socket: Option<String>,
    runs: Runs,
}

impl Way {
    fn new(program: &str, args: &[&str]) -> Way {
        let args = args.iter().map(|a| (*a).to_owned()).collect();
        Way { program: program.into(), args, socket: None, runs: Runs::default() }
    }

    /// Also asked how its log grows.
    fn metered(mut self, socket: String) -> Way {
        self.args.extend(["-qmp".into(), format!("unix:{socket},server=on,wait=off")]);
        self.socket = Some(socket);
        self
    }

    /// The benchmarks of the tiny guest.
    fn tiny(&mut self) -> Result<()> {
        let (kernel, initrd) = guests::tiny()?;
        let mut c = Command::new(&self.program);
        c.args(["-m", "256", "-nographic", "-no-reboot", "-nic", "none", "-kernel", &kernel]);
        c.args(["-initrd", &initrd, "-append", "console=ttyS0 quiet bench halt"]).args(&self.args);
        run_marked(c, self.socket.as_deref(), &mut self.runs)
    }

    /// Debian from its image: boot to login, and work whose length the client takes. The guest signs with `key`.
    fn debian(&mut self, scratch: &Scratch, key: &str) -> Result<()> {
        let (program, image) = (&self.program, scratch.path("debian.qcow2"));
        guests::run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &guests::debian()?, &image],
        )?;
        let (tcp, http) = (free_port()?, free_port()?);
        let nic =
            format!("user,model=virtio,hostfwd=tcp:127.0.0.1:{tcp}-:7000,hostfwd=tcp:127.0.0.1:{http}-:80");
        let console = scratch.path("console");
        let _ = std::fs::remove_file(&console);
        let start = Instant::now();
        let _child = Guard(
            Command::new(program)
                .args(["-m", "512M", "-display", "none", "-monitor", "none"])
                .args(["-serial", &format!("file:{console}")])
                .args(["-drive", &format!("file={image},if=virtio"), "-nic", &nic])
                .args(&self.args)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .map_err(|e| format!("{program}: {e}"))?,
        );
        let mut meter = Meter::new(&mut self.runs, self.socket.as_deref(), start)?;
        let text =
            || std::fs::read(&console).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        wait_for("Debian's ready mark", Duration::from_secs(600), || {
            text().contains("GUEST READY").then_some(())
        })?;
        meter.end("Debian: boot to login", Instant::now());
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let mut line = Line::connect_for(at(tcp), PATIENCE)?;
        let mut run = |name: &str, work: &str| match line.ask(&format!("run {work}"))?.0 {
            answer if answer.starts_with("0 ") => Ok(()),
            answer => Err(format!("{name}: failed in the guest ({answer})")),
        };
        run("the key", &format!("echo {key} | base64 -d > /tmp/rsa.der"))?;
        for (name, work) in DEBIAN_WORK {
            meter.start(None);
            run(name, work)?;
            meter.end(&format!("Debian: {name}"), Instant::now());
        }
        meter.start(None);
        for _ in 0..HTTP {
            get(at(http)).map_err(|e| e.to_string())?;
        }
        meter.end(&format!("Debian: nginx ({HTTP} requests)"), Instant::now());
        meter.start(None);
        for _ in 0..LATENCY {
            line.ask("inc")?;
        }
        meter.end(&format!("Debian: request latency ({LATENCY})"), Instant::now());
        Ok(())
    }
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

/// A figure with two digits that say something.
fn figure(value: f64) -> String {
    let places = (1.0 - value.max(1e-4).log10().floor()).max(0.0) as usize;
    format!("{value:.places$}")
}

/// Print and write what `rounds` rounds gave. So many of QEMU's replays `failed`; `sizes` are the recordings' in KB.
fn report(
    work: &[Way; 4],
    replays: &[Way; 2],
    rounds: usize,
    failed: usize,
    sizes: (f64, f64),
) -> Result<()> {
    let [theirs, plain, record, their_record] = work.each_ref().map(|way| &way.runs);
    let [replay, their_replay] = replays.each_ref().map(|way| &way.runs);
    let mut table = String::from(
        "| guest work | QEMU TCG (s) | ftvm (s) | times as fast | recording / plain | recording vs QEMU's | \
         replaying vs QEMU's | log (Mbit/s) | log (bytes per 1,000 instructions) |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let (mut ratios, mut bars) = ([vec![], vec![], vec![], vec![]], Vec::new());
    for row in &plain.seconds.order {
        let (Some(ours), Some(other)) = (plain.seconds.median(row), theirs.seconds.median(row)) else {
            continue;
        };
        let against = |a: &Runs, b: &Runs| Some(a.seconds.median(row)? / b.seconds.median(row)?);
        let all = [
            Some(other / ours),
            against(record, plain),
            against(their_record, record),
            against(their_replay, replay),
        ];
        let shown = all.map(|r| r.map_or("".into(), |r| format!("{r:.2}")));
        let log = [&record.log_rate, &record.log_density].map(|l| l.median(row).map_or("".into(), figure));
        let _ = writeln!(
            table,
            "| {row} | {other:.2} | {ours:.2} | {} | {} |",
            shown.join(" | "),
            log.join(" | ")
        );
        if row != "all of it, start to end" {
            for (list, ratio) in ratios.iter_mut().zip(all) {
                list.extend(ratio);
            }
        }
        bars.push((row.clone(), other / ours));
    }
    let mean = ratios.map(|r| format!("**{:.2}**", geometric(&r)));
    let _ = writeln!(table, "| **geometric mean** | | | {} | | |", mean.join(" | "));
    let _ = writeln!(table, "| the paper: its workloads; idle | | | | | | | {PAPER} | |");
    let _ = writeln!(
        table,
        "\nSize of the benchmarks' recording: ftvm {:.1} KB, QEMU {:.1} KB. Medians of {rounds} rounds; of QEMU's \
         replays {failed} did not come to their end.",
        sizes.0, sizes.1
    );
    marked::report(&table, &[("speed.md", &table), ("speed.svg", &plot(&bars))])
}

fn bench() -> Result<()> {
    let rounds = std::env::var("FTVM_BENCH_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3usize);
    let scratch = Scratch::new("speed")?;
    let (ftvm, qemu) = (guests::ftvm()?, "qemu-system-x86_64");
    let key = guests::run("sh", &["-c", RSA_KEY])?;
    let (log, their_log) = (scratch.path("ftvm.rr"), scratch.path("qemu.rr"));
    let rr = |how: &str, file: &str| format!("shift=auto,rr={how},rrfile={file}");
    // What is compared lies close together, and who goes first changes from round to round.
    let mut work = [
        Way::new(qemu, &["-accel", "tcg"]),
        Way::new(&ftvm, &[]),
        Way::new(&ftvm, &["-icount", &rr("record", &log)]).metered(scratch.path("qmp")),
        Way::new(qemu, &["-icount", &rr("record", &their_log)]),
    ];
    let mut replays = [
        Way::new(&ftvm, &["-icount", &rr("replay", &log)]),
        Way::new(qemu, &["-icount", &rr("replay", &their_log)]),
    ];
    let size = |path: &str| std::fs::metadata(path).map_or(0.0, |m| m.len() as f64 / 1e3);
    let mut failed = 0;
    for round in 0..rounds {
        let turns = |n: usize| (0..n).map(move |i| if round % 2 == 0 { i } else { n - 1 - i });
        turns(4).try_for_each(|i| work[i].tiny())?;
        for i in turns(2) {
            let done = replays[i].tiny();
            // QEMU's stands still for ever now and then.
            if let (Err(e), true) = (&done, replays[i].program == qemu) {
                eprintln!("round {round}: {e}");
                failed += 1;
            } else {
                done?;
            }
        }
        let sizes = (size(&log), size(&their_log));
        eprintln!("round {round}: benchmarks done");
        turns(3).try_for_each(|i| work[i].debian(&scratch, &key))?;
        eprintln!("round {round}: Debian done");
        report(&work, &replays, round + 1, failed, sizes)?;
    }
    Ok(())
}

fn main() {
    marked::end(bench());
}
