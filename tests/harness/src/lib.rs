//! Whole-machine tests: programs under test as real processes, hosts as network namespaces, real
//! guests, and clients that remember every acknowledged answer.

pub mod bitmaps;
pub mod certs;
pub mod client;
pub mod etcd;
pub mod gdb;
pub mod guests;
pub mod hosts;
pub mod libvirt;
pub mod moves;
pub mod pair;
pub mod qmp;
pub mod service;
pub mod storage;
pub mod vm;

use std::time::{Duration, Instant};

/// A result with a sentence for people.
pub type Result<T> = std::result::Result<T, String>;

/// Try `check` until it gives a value or `limit` has passed.
pub fn wait_for<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = check() {
            return Ok(value);
        }
        if start.elapsed() > limit {
            return Err(format!("{what} did not happen within {:.0} s", limit.as_secs_f64()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A test that tells a story.
pub type Story = fn() -> Result<()>;

/// Run the stories of a test file whose names have one of the program's arguments in them (or all), as root of a user
/// namespace where that is needed; ends the program.
pub fn run_stories(file: &str, stories: &[(&str, Story)]) -> ! {
    if let Err(e) = hosts::become_root() {
        println!("{file} tests skipped: {e}");
        println!("0 passed, 0 failed");
        std::process::exit(0);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let (mut passed, mut failed) = (0, 0);
    for (name, story) in stories {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        let start = Instant::now();
        match std::panic::catch_unwind(story).unwrap_or_else(|_| Err("it panicked".into())) {
            Ok(()) => {
                passed += 1;
                println!("test {file}::{name} ... ok ({:.0?})", start.elapsed());
            }
            Err(e) => {
                failed += 1;
                println!("test {file}::{name} ... FAILED\n{e}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}

/// A scratch directory of this process, removed when dropped (unless FTVM_KEEP is set).
pub struct Scratch(pub std::path::PathBuf);

impl Scratch {
    /// Make one.
    pub fn new(name: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("ftvm-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Scratch(dir))
    }

    /// A path within.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os("FTVM_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
