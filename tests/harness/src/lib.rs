//! Whole-machine tests: programs under test as real processes, hosts as network namespaces, real
//! guests, and clients that remember every acknowledged answer.

pub mod client;
pub mod guests;
pub mod hosts;
pub mod libvirt;
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
