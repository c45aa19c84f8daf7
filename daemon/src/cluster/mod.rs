//! This host among its peers: what is known of them, and what they may ask.

pub mod heal;
pub mod maintenance;
pub mod peers;
pub mod place;
pub mod server;
pub mod tls;
pub mod wire;

#[cfg(feature = "etcd")]
pub mod inventory;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::config::Settings;
use crate::machine::{lock, Machine};
use crate::registry::{self, Registry};
use crate::{Error, Result};
use peers::Known;
use tls::Identity;
use wire::{HostState, MachineState};

/// A peer whose last answer is older than this is not counted on.
pub const FRESH: Duration = Duration::from_secs(4);

/// What of the processor a machine may need: names as in /proc/cpuinfo.
pub const FEATURES: &[&str] = &[
    "pni",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "popcnt",
    "aes",
    "pclmulqdq",
    "sha_ni",
    "avx",
    "f16c",
    "avx2",
    "fma",
    "bmi1",
    "bmi2",
];

/// This host and its peers.
pub struct Cluster {
    pub settings: Settings,
    pub registry: Arc<Registry>,
    /// None: there are no peers.
    identity: Option<Identity>,
    peers: Mutex<BTreeMap<String, Arc<Known>>>,
    heal: heal::Book,
    pub maintenance: maintenance::Maintenance,
    features: Vec<String>,
}

impl Cluster {
    /// `state`: where the service keeps what it must know after a restart of the host.
    pub fn new(settings: Settings, registry: Arc<Registry>, state: &Path) -> Result<Arc<Cluster>> {
        let identity = match settings.is_alone() {
            true => None,
            false => Some(Identity::read(&settings.tls)?),
        };
        let file: PathBuf = state.join("maintenance");
        Ok(Arc::new(Cluster {
            registry,
            identity,
            peers: Mutex::default(),
            heal: heal::Book::default(),
            maintenance: maintenance::Maintenance::new(file),
            features: features(),
            settings,
        }))
    }

    /// Begin to speak with peers, to heal, and to empty this host when it is wanted.
    pub fn start(self: &Arc<Self>) -> Result<()> {
        if self.identity.is_some() {
            server::listen(self)?;
            for peer in self.settings.peer.iter().filter(|p| p.name != self.settings.name) {
                let address = peer.address.clone().unwrap_or_else(|| peer.name.clone());
                self.meet(&peer.name, &address, true);
            }
            #[cfg(feature = "etcd")]
            if let Some(etcd) = self.settings.etcd.clone() {
                inventory::start(self, etcd);
            }
            heal::start(self);
        }
        maintenance::start(self);
        Ok(())
    }

    fn identity(&self) -> Result<&Identity> {
        self.identity
            .as_ref()
            .ok_or_else(|| Error::State("this host has no peers: /etc/ftvm/ftvmd.conf names none".into()))
    }

    /// This host, as peers see it.
    pub fn own_state(&self) -> HostState {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let (memory, available) = registry::memory();
        let machine = |m: &Arc<Machine>| {
            let status = m.status();
            MachineState {
                name: m.name.clone(),
                uuid: m.uuid(),
                runs: m.runs(),
                role: status.ft.role,
                state: status.ft.state,
                memory: m.memory(),
            }
        };
        let address = self.settings.address.as_ref();
        HostState {
            language: wire::VERSION,
            name: self.settings.name.clone(),
            service: address.map(|a| peers::with_port(a, self.settings.port)).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").into(),
            features: self.features.clone(),
            processors: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            load: load.split_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0.0),
            memory,
            available,
            maintenance: self.maintenance.is_wanted(),
            machines: self.registry.all().iter().map(machine).collect(),
        }
    }

    /// All peers.
    pub fn peers(&self) -> Vec<Arc<Known>> {
        lock(&self.peers).values().cloned().collect()
    }

    /// A peer by name.
    pub fn peer(&self, name: &str) -> Result<Arc<Known>> {
        let found = lock(&self.peers).get(name).cloned();
        found.ok_or_else(|| Error::State(format!("there is no peer '{name}'")))
    }

    /// The peers that answer, with what they said, if it was after `since`.
    fn fresh(&self, since: Option<Instant>) -> Vec<HostState> {
        let one = |peer: Arc<Known>| {
            let (state, at) = peer.state()?;
            let answers = at.elapsed() < FRESH && peer.problem().is_empty();
            (answers && since.is_none_or(|since| at > since)).then_some(state)
        };
        self.peers().into_iter().filter_map(one).collect()
    }

    /// The peer on which this machine runs, so that it cannot be started here.
    pub fn runs_elsewhere(&self, uuid: &str) -> Option<String> {
        let runs = |host: &HostState| {
            host.machines.iter().any(|m| m.runs && !uuid.is_empty() && m.uuid.eq_ignore_ascii_case(uuid))
        };
        self.fresh(None).into_iter().find(runs).map(|host| host.name)
    }

    /// The peer that has this machine's backup.
    pub fn backup_host(&self, uuid: &str) -> Option<String> {
        let has = |host: &HostState| {
            let is = |m: &MachineState| m.runs && m.role != "primary" && m.uuid.eq_ignore_ascii_case(uuid);
            host.machines.iter().any(is)
        };
        self.fresh(None).into_iter().find(has).map(|host| host.name)
    }

    /// Start a machine that is defined here.
    pub fn start_machine(&self, machine: &Machine) -> Result<()> {
        if self.maintenance.is_wanted() {
            return Err(Error::State("this host is in maintenance".into()));
        }
        if !machine.runs() {
            if let Some(host) = self.runs_elsewhere(&machine.uuid()) {
                return Err(Error::State(format!("'{}' runs on {host}", machine.name)));
            }
        }
        machine.start(self.registry.port(&machine.name)?)
    }
}

/// What of `FEATURES` this host's processor has.
pub fn features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|l| l.strip_prefix("flags")?.split_once(':')).map_or("", |(_, f)| f);
    let has = |name: &&&str| flags.split_whitespace().any(|f| f == **name);
    FEATURES.iter().filter(has).map(|f| (*f).to_owned()).collect()
}
