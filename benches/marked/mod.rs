//! What the benches share: guests that print a mark before and after each row of work, of which the host takes the time (and
//! what the log grew by, if the machine is recorded), and where tables go.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant};

use ftvm_harness::qmp::Qmp;
use ftvm_harness::{guests, Result};

/// Figures by row (seconds, for the most part), in the order in which the rows were met.
#[derive(Default)]
pub struct Times {
    /// The rows.
    pub order: Vec<String>,
    figures: BTreeMap<String, Vec<f64>>,
}

impl Times {
    /// One more figure of a row.
    pub fn add(&mut self, row: &str, figure: f64) {
        if !self.figures.contains_key(row) {
            self.order.push(row.to_owned());
        }
        self.figures.entry(row.to_owned()).or_default().push(figure);
    }

    /// The median of a row's figures.
    pub fn median(&self, row: &str) -> Option<f64> {
        let mut v = self.figures.get(row)?.clone();
        v.sort_by(f64::total_cmp);
        v.get(v.len() / 2).copied()
    }
}

/// What came of runs of one kind.
#[derive(Default)]
pub struct Runs {
    /// Seconds.
    pub seconds: Times,
    /// Mbit/s of the log, of runs that ftvm recorded.
    pub log_rate: Times,
    /// Bytes of the log for 1,000 instructions of the guest.
    pub log_density: Times,
}

/// A moment of a run: instructions executed and bytes of log, where they are known.
#[derive(Clone, Copy)]
struct Moment {
    at: Instant,
    log: Option<(f64, f64)>,
}

/// Looks at a run where its rows start and end.
pub struct Meter<'a> {
    runs: &'a mut Runs,
    qmp: Option<Qmp>,
    begin: Moment,
    last: Moment,
}

impl<'a> Meter<'a> {
    /// For a run that began at `at`; with the QMP socket of an ftvm that records, its log too.
    pub fn new(runs: &'a mut Runs, socket: Option<&str>, at: Instant) -> Result<Meter<'a>> {
        let qmp = socket.map(Qmp::connect).transpose()?;
        let begin = Moment { at, log: qmp.is_some().then_some((0.0, 0.0)) };
        Ok(Meter { runs, qmp, begin, last: begin })
    }

    fn look(&mut self, at: Option<Instant>) {
        // A machine may have ended before it answers: then this is not known.
        let ft = self.qmp.as_mut().and_then(|qmp| qmp.ft().ok());
        let log = ft.and_then(|ft| Some((ft["position"].as_f64()?, ft["log-bytes"].as_f64()?)));
        self.last = Moment { at: at.unwrap_or_else(Instant::now), log };
    }

    fn add(&mut self, row: &str, from: Moment) {
        let to = self.last;
        let seconds = (to.at - from.at).as_secs_f64();
        self.runs.seconds.add(row, seconds);
        if let (Some((i, from)), Some((j, to))) = (from.log, to.log) {
            self.runs.log_rate.add(row, (to - from) * 8.0 / 1e6 / seconds);
            self.runs.log_density.add(row, (to - from) * 1e3 / (j - i));
        }
    }

    /// A row starts: it did at `at`, or it does when this is done.
    pub fn start(&mut self, at: Option<Instant>) {
        self.look(at);
    }

    /// It ends; the first one without a start began with the run.
    pub fn end(&mut self, row: &str, at: Instant) {
        let from = self.last;
        self.look(Some(at));
        self.add(row, from);
    }

    /// All of the run, which is over; what was logged after the last row is not counted.
    pub fn over(&mut self, row: &str) {
        self.last.at = Instant::now();
        self.add(row, self.begin);
    }
}

/// Ends the program when dropped.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest that shows no mark for so long hangs.
const SILENCE: Duration = Duration::from_secs(120);

/// Run a guest that ends by itself; the host's clock at the marks on its console. `socket` is as for [`Meter::new`].
pub fn run_marked(mut command: Command, socket: Option<&str>, runs: &mut Runs) -> Result<()> {
    let shown = format!("{command:?}");
    let start = Instant::now();
    let mut child = Guard(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{shown}: {e}"))?,
    );
    let out = child.0.stdout.take().ok_or("no standard output")?;
    // On a thread of its own, so that a look at the log delays no mark.
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        BufReader::new(out).split(b'\n').try_for_each(|line| sender.send((Instant::now(), line)))
    });
    let mut meter = Meter::new(runs, socket, start)?;
    let mut finished = false;
    loop {
        let (at, line) = match lines.recv_timeout(SILENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => return Err(format!("{shown} hangs")),
        };
        let line = line.map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&line);
        let Some(text) =
            text.split("row ").nth(1).or_else(|| text.contains("tiny guest ready").then_some("boot"))
        else {
            finished |= text.contains("rows done");
            continue;
        };
        let text = text.trim_end();
        if text == "boot" {
            meter.end("kernel boot to init", at);
        } else if text.ends_with(" start") {
            meter.start(Some(at));
        } else if let Some((name, _)) = text.split_once(" end") {
            meter.end(name, at);
        }
    }
    let status = child.0.wait().map_err(|e| e.to_string())?;
    if !finished || !status.success() {
        return Err(format!("{shown} did not come to its end ({status})"));
    }
    meter.over("all of it, start to end");
    Ok(())
}

/// Print the table, and write it and what goes with it (names and contents) to `build/bench`.
pub fn report(table: &str, files: &[(&str, &str)]) -> Result<()> {
    println!("{table}");
    let out = guests::root().join("build/bench");
    let fail = |e: std::io::Error| format!("{}: {e}", out.display());
    std::fs::create_dir_all(&out).map_err(fail)?;
    for (name, text) in files {
        std::fs::write(out.join(name), text).map_err(fail)?;
        println!("written to build/bench/{name}");
    }
    Ok(())
}

/// The bench's end: what went wrong, if anything did.
pub fn end(result: Result<()>) {
    if let Err(e) = result {
        eprintln!("bench: {e}");
        std::process::exit(1);
    }
}
