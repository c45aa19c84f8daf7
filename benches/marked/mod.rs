//! What the benches share: guests that print a mark before and after each row of work, of which the host takes the time, and
//! where tables go.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use ftvm_harness::{guests, Result};

/// Seconds by row, in the order in which the rows were met.
#[derive(Default)]
pub struct Times {
    /// The rows.
    pub order: Vec<String>,
    seconds: BTreeMap<String, Vec<f64>>,
}

impl Times {
    /// One more time of a row.
    pub fn add(&mut self, row: &str, seconds: f64) {
        if !self.seconds.contains_key(row) {
            self.order.push(row.to_owned());
        }
        self.seconds.entry(row.to_owned()).or_default().push(seconds);
    }

    /// The median of a row's times.
    pub fn median(&self, row: &str) -> Option<f64> {
        let mut v = self.seconds.get(row)?.clone();
        v.sort_by(f64::total_cmp);
        v.get(v.len() / 2).copied()
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

/// Run a guest that ends by itself; the host's clock at the marks on its console.
pub fn run_marked(mut command: Command, times: &mut Times) -> Result<()> {
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
    let mut begun = start;
    let mut finished = false;
    for line in BufReader::new(out).split(b'\n') {
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
            times.add("kernel boot to init", start.elapsed().as_secs_f64());
        } else if text.ends_with(" start") {
            begun = Instant::now();
        } else if let Some((name, _)) = text.split_once(" end") {
            times.add(name, begun.elapsed().as_secs_f64());
        }
    }
    let status = child.0.wait().map_err(|e| e.to_string())?;
    times.add("all of it, start to end", start.elapsed().as_secs_f64());
    if !finished || !status.success() {
        return Err(format!("{shown} did not come to its end ({status})"));
    }
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
