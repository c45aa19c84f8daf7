//! Maintenance: a host that is to be switched off gives its machines away first. A primary is switched over to its
//! backup as planned; a backup is made anew on another host.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::Value;

use super::wire::{Answer, Request};
use super::Cluster;
use crate::machine::{lock, Machine};
use crate::{Error, Result};

/// How often a host that is to be emptied looks at its machines.
const LOOK: Duration = Duration::from_millis(500);

type Listener = Box<dyn Fn(&str, &[String]) + Send + Sync>;

/// Whether this host is in maintenance.
pub struct Maintenance {
    /// Exists while it is wanted: it outlives a restart.
    file: PathBuf,
    wanted: AtomicBool,
    /// `off`, `entering` or `on`, and what keeps it from being `on`.
    told: Mutex<(String, Vec<String>)>,
    listener: OnceLock<Listener>,
}

impl Maintenance {
    pub fn new(file: PathBuf) -> Maintenance {
        let wanted = file.exists();
        let word = if wanted { "entering" } else { "off" };
        Maintenance {
            file,
            wanted: AtomicBool::new(wanted),
            told: Mutex::new((word.to_owned(), Vec::new())),
            listener: OnceLock::new(),
        }
    }

    /// Whether no machine is to come here.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// `off`, `entering` or `on`; and what keeps it from being `on`.
    pub fn state(&self) -> (String, Vec<String>) {
        lock(&self.told).clone()
    }

    /// Who is told when it changes.
    pub fn listen(&self, listener: impl Fn(&str, &[String]) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    fn tell(&self, state: &str, waits: Vec<String>) {
        let new = (state.to_owned(), waits);
        let old = std::mem::replace(&mut *lock(&self.told), new.clone());
        if old != new {
            if old.0 != new.0 {
                log::info!("maintenance: {state}");
            }
            new.1.iter().filter(|w| !old.1.contains(w)).for_each(|w| log::info!("maintenance: {w}"));
            if let Some(listener) = self.listener.get() {
                listener(&new.0, &new.1);
            }
        }
    }

    fn want(&self, wanted: bool) -> Result<()> {
        let file = |e| Error::File(self.file.display().to_string(), e);
        if wanted {
            self.file.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(file)?;
            std::fs::write(&self.file, "").map_err(file)?;
        } else if let Err(e) = std::fs::remove_file(&self.file) {
            if e.kind() != std::io::ErrorKind::NotFound {
                return Err(file(e));
            }
        }
        self.wanted.store(wanted, Ordering::Relaxed);
        Ok(())
    }
}

/// Empty this host whenever it is wanted.
pub fn start(cluster: &Arc<Cluster>) {
    let cluster = Arc::clone(cluster);
    std::thread::spawn(move || loop {
        std::thread::sleep(LOOK);
        if cluster.maintenance.is_wanted() {
            cluster.empty();
        }
    });
}

impl Cluster {
    /// Begin to empty this host, and take no machine any more.
    pub fn enter_maintenance(self: &Arc<Self>) -> Result<()> {
        self.maintenance.want(true)?;
        if self.maintenance.state().0 == "off" {
            self.maintenance.tell("entering", Vec::new());
        }
        self.tell_peers();
        Ok(())
    }

    /// Take machines again.
    pub fn leave_maintenance(self: &Arc<Self>) -> Result<()> {
        self.maintenance.want(false)?;
        self.maintenance.tell("off", Vec::new());
        self.tell_peers();
        Ok(())
    }

    fn empty(self: &Arc<Self>) {
        let mut waits = Vec::new();
        for machine in self.registry.all().into_iter().filter(|m| m.runs()) {
            match self.send_away(&machine) {
                Ok(()) => waits.push(format!("{} is moving", machine.name)),
                Err(e) => waits.push(format!("{}: {e}", machine.name)),
            }
        }
        // It may have been left meanwhile.
        if self.maintenance.is_wanted() {
            let state = if waits.is_empty() { "on" } else { "entering" };
            self.maintenance.tell(state, waits);
        }
    }

    /// The next step of a machine's way off this host.
    fn send_away(&self, machine: &Arc<Machine>) -> Result<()> {
        let status = machine.status();
        match (status.ft.role.as_str(), status.ft.state.as_str()) {
            ("backup", _) => {
                let uuid = machine.uuid();
                let primary = self.fresh(None).into_iter().find(|host| {
                    let is = |m: &super::MachineState| {
                        m.runs && m.role == "primary" && m.uuid.eq_ignore_ascii_case(&uuid)
                    };
                    host.machines.iter().any(is)
                });
                let host = primary.ok_or_else(|| {
                    Error::State(
                        "no peer says that it has the primary; end the backup, or the machine".into(),
                    )
                })?;
                let from = self.settings.name.clone();
                let request = Request::MoveBackup { uuid, from, to: None };
                match self.talk_to(&host.name)?.ask(&request)? {
                    Answer::Done => Ok(()),
                    other => Err(Error::Machine(format!("{}: an unexpected answer: {other:?}", host.name))),
                }
            }
            ("primary", "protected") => {
                machine.command("ft-test-failover", Value::Null)?;
                machine.wait(Duration::from_secs(10), |s| s.ft.role == "backup");
                Ok(())
            }
            ("primary", "synchronizing") => Ok(()),
            ("primary", _) if status.ft.suspended => {
                Err(Error::State("its fault tolerance is suspended: resume it, or shut it down".into()))
            }
            // Healing finds it a place.
            ("primary", _) => Err(Error::State("it has no backup that could take it over yet".into())),
            ("none", _) => {
                Err(Error::State("it is without fault tolerance: protect it, or shut it down".into()))
            }
            _ => Ok(()),
        }
    }
}
