//! What users set and see of a migration: capabilities, parameters, progress. Names and defaults are QEMU 7.2's.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::channel::{Client, Server, Uri};
use super::postcopy::arriving::Arriving;
use crate::host::tls;

/// Capabilities that this program has, and whether they can be turned off.
pub const CAPABILITIES: &[(&str, bool)] = &[
    ("auto-converge", true),
    ("compress", true),
    ("events", true),
    ("late-block-activate", true),
    ("pause-before-switchover", true),
    ("postcopy-ram", true),
    ("release-ram", true),
    ("return-path", true),
    ("zero-blocks", true),
];

/// What a migration is doing (QEMU's `MigrationStatus`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    #[default]
    None,
    Setup,
    Cancelling,
    Cancelled,
    Active,
    Completed,
    Failed,
    PreSwitchover,
    Device,
    /// The destination runs; pages still come.
    PostcopyActive,
    /// The same, and the connection is broken.
    PostcopyPaused,
    /// Another connection is there.
    PostcopyRecover,
}

impl Status {
    /// QEMU's word.
    pub fn word(self) -> &'static str {
        match self {
            Status::None => "none",
            Status::Setup => "setup",
            Status::Cancelling => "cancelling",
            Status::Cancelled => "cancelled",
            Status::Active => "active",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::PreSwitchover => "pre-switchover",
            Status::Device => "device",
            Status::PostcopyActive => "postcopy-active",
            Status::PostcopyPaused => "postcopy-paused",
            Status::PostcopyRecover => "postcopy-recover",
        }
    }

    /// Whether a migration is under way.
    pub fn is_busy(self) -> bool {
        matches!(
            self,
            Status::Setup
                | Status::Cancelling
                | Status::Active
                | Status::PreSwitchover
                | Status::Device
                | Status::PostcopyActive
                | Status::PostcopyPaused
                | Status::PostcopyRecover
        )
    }
}

/// Parameters (QEMU's `MigrationParameters`) that have an effect here.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    pub announce_initial: u64,
    pub announce_max: u64,
    pub announce_rounds: u64,
    pub announce_step: u64,
    /// Percent of new dirty memory to what was sent, from which `auto-converge` slows the guest.
    pub throttle_trigger_threshold: u64,
    /// Percent.
    pub cpu_throttle_initial: u64,
    pub cpu_throttle_increment: u64,
    pub max_cpu_throttle: u64,
    /// Milliseconds.
    pub downtime_limit: u64,
    /// Objects of TLS, and the name that the destination's certificate must have; empty: none.
    pub tls_creds: String,
    pub tls_hostname: String,
    pub tls_authz: String,
    /// Which names bitmaps have on the way (`block-bitmap-mapping`), once it was said.
    pub bitmap_mapping: Option<Value>,
}

impl Default for Parameters {
    fn default() -> Self {
        Parameters {
            announce_initial: 50,
            announce_max: 550,
            announce_rounds: 5,
            announce_step: 100,
            throttle_trigger_threshold: 50,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            max_cpu_throttle: 99,
            downtime_limit: 300,
            tls_creds: String::new(),
            tls_hostname: String::new(),
            tls_authz: String::new(),
            bitmap_mapping: None,
        }
    }
}

/// QEMU's default of `max-bandwidth` in bytes a second.
const MAX_BANDWIDTH: u64 = 128 << 20;

/// Counters of a migration, in bytes, pages and so on as `MigrationStats` has them.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub total: u64,
    pub remaining: u64,
    pub duplicate: u64,
    pub normal: u64,
    pub dirty_pages_rate: u64,
    pub mbps: f64,
    pub pages_per_second: u64,
    pub dirty_sync_count: u64,
    pub throttle: u64,
    pub expected_downtime: Option<Duration>,
    /// Bytes that were sent when the machine was stopped, and when the destination ran in post-copy.
    pub precopy_bytes: u64,
    pub switched_bytes: Option<u64>,
    /// Pages that the destination asked for.
    pub postcopy_requests: u64,
}

/// One program's migrations.
#[derive(Default)]
pub struct State {
    pub status: Status,
    /// This machine comes from elsewhere.
    pub incoming: bool,
    pub capabilities: Vec<&'static str>,
    pub parameters: Parameters,
    pub stats: Stats,
    pub error: Option<String>,
    pub started: Option<Instant>,
    pub setup: Duration,
    pub total_time: Option<Duration>,
    pub downtime: Option<Duration>,
    /// Where an incoming migration is awaited, as QEMU's `SocketAddress`.
    pub addresses: Vec<Value>,
}

/// What all threads share of it.
#[derive(Default)]
pub struct Migration {
    state: Mutex<State>,
    /// Bytes a second; 0: no limit.
    pub bandwidth: Arc<AtomicU64>,
    /// Bytes that the present (or last) migration has put on its way.
    pub sent: Arc<AtomicU64>,
    /// The same for pages in post-copy that nobody waits for.
    pub postcopy_bandwidth: Arc<AtomicU64>,
    /// The user wants no more passes: `migrate-start-postcopy`.
    pub start_postcopy: AtomicBool,
    /// A machine that runs here while its memory comes.
    arriving: Mutex<Option<Arc<Arriving>>>,
}

impl Migration {
    /// Nothing has moved yet.
    pub fn new() -> Self {
        let migration = Migration::default();
        migration.bandwidth.store(MAX_BANDWIDTH, Ordering::Relaxed);
        migration
    }

    /// The state, to look at or to change.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine that runs here while its memory comes, if there is one.
    pub fn arriving(&self) -> Option<Arc<Arriving>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// See [`Self::arriving`].
    pub fn set_arriving(&self, arriving: Option<Arc<Arriving>>) {
        *self.arriving.lock().unwrap_or_else(PoisonError::into_inner) = arriving;
    }

    /// Whether the machine here may wait for memory that nobody brings.
    pub fn is_stuck(&self) -> bool {
        self.arriving().is_some() && self.state().status != Status::PostcopyActive
    }

    /// Whether the user turned this capability on.
    pub fn has(&self, capability: &str) -> bool {
        self.state().capabilities.contains(&capability)
    }

    /// The answer of `query-migrate`.
    pub fn query(&self) -> Value {
        let s = self.state();
        if s.status == Status::None {
            return json!({});
        }
        let mut out = json!({"status": s.status.word()});
        if s.incoming {
            if !s.addresses.is_empty() {
                out["socket-address"] = json!(s.addresses);
            }
            if let Some(error) = &s.error {
                out["error-desc"] = json!(error);
            }
            return out;
        }
        let ms = |d: Duration| d.as_millis() as u64;
        if s.status == Status::Failed {
            out["error-desc"] = json!(s.error);
            return out;
        }
        if matches!(s.status, Status::Setup | Status::Cancelled) {
            return out;
        }
        let elapsed = s.total_time.or(s.started.map(|t| t.elapsed())).unwrap_or_default();
        out["total-time"] = json!(ms(elapsed));
        out["setup-time"] = json!(ms(s.setup));
        match s.status {
            Status::Completed => out["downtime"] = json!(ms(s.downtime.unwrap_or_default())),
            _ => {
                let expected = s.expected();
                out["expected-downtime"] = json!(ms(expected));
            }
        }
        let sent = self.sent.load(Ordering::Relaxed);
        let stats = &s.stats;
        let precopy = if stats.precopy_bytes > 0 { stats.precopy_bytes } else { sent };
        let switched = stats.switched_bytes.unwrap_or(sent);
        out["ram"] = json!({
            "transferred": sent,
            "remaining": if s.status == Status::Completed { 0 } else { stats.remaining },
            "total": stats.total,
            "duplicate": stats.duplicate,
            "skipped": 0,
            "normal": stats.normal,
            "normal-bytes": stats.normal * 4096,
            "dirty-pages-rate": stats.dirty_pages_rate,
            "mbps": stats.mbps,
            "dirty-sync-count": stats.dirty_sync_count,
            "postcopy-requests": stats.postcopy_requests,
            "page-size": 4096,
            "multifd-bytes": 0,
            "pages-per-second": stats.pages_per_second,
            "precopy-bytes": precopy,
            "downtime-bytes": switched - precopy.min(switched),
            "postcopy-bytes": sent - switched.min(sent),
            "dirty-sync-missed-zero-copy": 0,
        });
        if stats.throttle > 0 {
            out["cpu-throttle-percentage"] = json!(stats.throttle);
        }
        out
    }

    /// How a migration to this place is to be kept secret, if it is.
    pub fn tls_client(&self, uri: &Uri) -> Result<Option<Client>, String> {
        let p = self.state().parameters.clone();
        if p.tls_creds.is_empty() {
            return Ok(None);
        }
        let credentials = tls::find(&p.tls_creds, false)?;
        let host = Some(p.tls_hostname.as_str()).filter(|h| !h.is_empty()).or(uri.host());
        let host = host.ok_or("No hostname available for TLS")?.to_owned();
        Ok(Some(Client { credentials, host }))
    }

    /// As [`Self::tls_client`], for one that comes.
    pub fn tls_server(&self) -> Result<Option<Server>, String> {
        let p = self.state().parameters.clone();
        if p.tls_creds.is_empty() {
            return Ok(None);
        }
        let credentials = tls::find(&p.tls_creds, true)?;
        let identity = match p.tls_authz.as_str() {
            "" => None,
            id => Some(tls::find_identity(id)?),
        };
        Ok(Some(Server { credentials, identity }))
    }

    /// The answer of `query-migrate-parameters`.
    pub fn query_parameters(&self) -> Value {
        let s = self.state();
        let p = &s.parameters;
        let mut all = json!({
            "announce-initial": p.announce_initial,
            "announce-max": p.announce_max,
            "announce-rounds": p.announce_rounds,
            "announce-step": p.announce_step,
            "throttle-trigger-threshold": p.throttle_trigger_threshold,
            "cpu-throttle-initial": p.cpu_throttle_initial,
            "cpu-throttle-increment": p.cpu_throttle_increment,
            "max-cpu-throttle": p.max_cpu_throttle,
            "tls-creds": p.tls_creds,
            "tls-hostname": p.tls_hostname,
            "tls-authz": p.tls_authz,
            "max-bandwidth": self.bandwidth.load(Ordering::Relaxed),
            "max-postcopy-bandwidth": self.postcopy_bandwidth.load(Ordering::Relaxed),
            "downtime-limit": p.downtime_limit,
        });
        if let Some(mapping) = &p.bitmap_mapping {
            all["block-bitmap-mapping"] = mapping.clone();
        }
        all
    }

    /// `migrate-set-parameters`: all of them or none.
    pub fn set_parameters(&self, given: &serde_json::Map<String, Value>) -> Result<(), String> {
        let mut p = self.state().parameters.clone();
        let (mut bandwidth, mut postcopy_bandwidth) = (None, None);
        let number = |name: &str, value: &Value, low: u64, high: u64, what: &str| {
            value
                .as_u64()
                .filter(|n| (low..=high).contains(n))
                .ok_or_else(|| format!("Parameter '{name}' expects {what}"))
        };
        for (name, value) in given {
            let percent = |low, high| {
                number(name, value, low, high, &format!("an integer in the range of {low} to {high}"))
            };
            let any = |high, what: &str| number(name, value, 0, high, what);
            let text = || value.as_str().unwrap_or_default().to_owned();
            match name.as_str() {
                "announce-initial" => p.announce_initial = any(100_000, "a value between 0 and 100000")?,
                "announce-max" => p.announce_max = any(100_000, "a value between 0 and 100000")?,
                "announce-rounds" => p.announce_rounds = any(1000, "a value between 0 and 1000")?,
                "announce-step" => {
                    p.announce_step = number(name, value, 1, 10_000, "a value between 1 and 10000")?
                }
                "throttle-trigger-threshold" => p.throttle_trigger_threshold = percent(1, 100)?,
                "cpu-throttle-initial" => p.cpu_throttle_initial = percent(1, 99)?,
                "cpu-throttle-increment" => p.cpu_throttle_increment = percent(1, 99)?,
                "max-cpu-throttle" => p.max_cpu_throttle = percent(p.cpu_throttle_initial, 99)?,
                "downtime-limit" => {
                    p.downtime_limit = any(2_000_000, "an integer in the range of 0 to 2000 seconds")?;
                }
                "max-bandwidth" | "max-postcopy-bandwidth" => {
                    let what = "an integer in the range of 0 to 18446744073709551615 bytes/second";
                    let value = Some(any(u64::MAX, what)?);
                    match name.as_str() {
                        "max-bandwidth" => bandwidth = value,
                        _ => postcopy_bandwidth = value,
                    }
                }
                "tls-creds" => p.tls_creds = text(),
                "tls-hostname" => p.tls_hostname = text(),
                "tls-authz" => p.tls_authz = text(),
                "block-bitmap-mapping" => p.bitmap_mapping = Some(value.clone()),
                other => return Err(format!("the migration parameter '{other}' has no effect here")),
            }
        }
        self.state().parameters = p;
        if let Some(bandwidth) = bandwidth {
            self.bandwidth.store(bandwidth, Ordering::Relaxed);
        }
        if let Some(bandwidth) = postcopy_bandwidth {
            self.postcopy_bandwidth.store(bandwidth, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl State {
    /// The stop that is to be expected if it came now.
    fn expected(&self) -> Duration {
        self.stats.expected_downtime.unwrap_or(Duration::from_millis(self.parameters.downtime_limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_set_all_or_none() {
        let m = Migration::new();
        assert_eq!(m.query_parameters()["max-bandwidth"], 134_217_728);
        let set = |v: Value| m.set_parameters(v.as_object().unwrap());
        set(json!({"downtime-limit": 20, "max-bandwidth": 0, "tls-creds": ""})).unwrap();
        assert_eq!(m.query_parameters()["downtime-limit"], 20);
        let e = set(json!({"downtime-limit": 30, "cpu-throttle-initial": 0})).unwrap_err();
        assert!(e.contains("cpu-throttle-initial") && e.contains("1 to 99"), "{e}");
        assert_eq!(m.query_parameters()["downtime-limit"], 20);
        assert!(set(json!({"multifd-channels": 4})).unwrap_err().contains("multifd-channels"));
    }

    #[test]
    fn a_migration_is_told_of_in_qemus_words() {
        let m = Migration::new();
        assert_eq!(m.query(), json!({}));
        m.state().status = Status::Active;
        m.state().stats.total = 8192;
        m.sent.store(100, Ordering::Relaxed);
        let q = m.query();
        assert_eq!(
            (&q["status"], &q["ram"]["transferred"], &q["ram"]["total"]),
            (&json!("active"), &json!(100), &json!(8192))
        );
        m.state().status = Status::Failed;
        m.state().error = Some("gone".into());
        assert_eq!(m.query(), json!({"status": "failed", "error-desc": "gone"}));
    }
}
