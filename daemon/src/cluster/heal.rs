//! Healing: a primary on this host that has lost its backup gets another one, on the peer that has the most room.
//!
//! The primary's host alone decides. There is one primary (the lock on storage sees to that), so no two hosts can heal
//! one machine; and a backup that joins the wrong side of a cut is refused by the lock, as one that a person starts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::place::{self, Need};
use super::wire::{Answer, Order, Request};
use super::Cluster;
use crate::machine::{lock, Machine, Origin, Status};
use crate::{definition, Error, Result};

/// How often machines are looked at.
const LOOK: Duration = Duration::from_millis(250);
/// After a planned switch the old primary becomes the backup by itself, and a backup that is made anew joins again by
/// itself: they are given this long.
const REJOIN: Duration = Duration::from_secs(10);
/// A host that refused a machine is not asked for it again for this long.
const REFUSED: Duration = Duration::from_secs(20);
/// How long a dismissed backup's host may take to see that it is gone.
const DISMISSED: Duration = Duration::from_secs(10);

/// What is known of machines without a backup.
#[derive(Default)]
pub struct Book {
    /// Since when a machine has been without one.
    since: Mutex<BTreeMap<String, Instant>>,
    /// Machines for which a host is being asked.
    placing: Mutex<BTreeSet<String>>,
    /// Which host refused which machine, and when.
    refused: Mutex<BTreeMap<(String, String), Instant>>,
}

/// Look after the machines from now on.
pub fn start(cluster: &Arc<Cluster>) {
    let cluster = Arc::clone(cluster);
    std::thread::spawn(move || loop {
        std::thread::sleep(LOOK);
        cluster.look();
    });
}

/// A primary that is without a backup, and should not be.
fn is_wounded(status: &Status) -> bool {
    status.pid != 0
        && status.ft.role == "primary"
        && ["unprotected", "live"].contains(&status.ft.state.as_str())
        && !status.ft.suspended
        && ["running", "paused", "io-error"].contains(&status.state.as_str())
}

/// Marks a machine as being placed, until it is dropped.
struct Placing<'a>(&'a Book, String);

impl<'a> Placing<'a> {
    fn begin(book: &'a Book, name: &str) -> Option<Placing<'a>> {
        lock(&book.placing).insert(name.to_owned()).then(|| Placing(book, name.to_owned()))
    }

    /// Wait for another one's end.
    fn wait(book: &'a Book, name: &str) -> Result<Placing<'a>> {
        let until = Instant::now() + DISMISSED;
        loop {
            match Self::begin(book, name) {
                Some(placing) => return Ok(placing),
                None if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
                None => return Err(Error::State(format!("'{name}' is getting a backup just now"))),
            }
        }
    }
}

impl Drop for Placing<'_> {
    fn drop(&mut self) {
        lock(&self.0.placing).remove(&self.1);
    }
}

impl Cluster {
    fn heals(&self, machine: &Machine) -> bool {
        let heal = &self.settings.heal;
        heal.enabled
            && !heal.except.contains(&machine.name)
            && (heal.foreign || machine.origin == Origin::Service)
    }

    fn look(self: &Arc<Self>) {
        let machines = self.registry.all();
        let mut since = lock(&self.heal.since);
        since.retain(|name, _| machines.iter().any(|m| &m.name == name && is_wounded(&m.status())));
        for machine in machines {
            let status = machine.status();
            if !is_wounded(&status) || !self.heals(&machine) {
                continue;
            }
            let begin = *since.entry(machine.name.clone()).or_insert_with(Instant::now);
            let planned = status.ft.last.as_ref().is_some_and(|f| f.reason.contains("planned"));
            let comes_back = planned || self.backup_host(&machine.uuid()).is_some();
            let wait = if comes_back { REJOIN } else { self.settings.heal.wait };
            if begin.elapsed() < wait || lock(&self.heal.placing).contains(&machine.name) {
                continue;
            }
            let cluster = Arc::clone(self);
            std::thread::spawn(move || {
                let Some(_placing) = Placing::begin(&cluster.heal, &machine.name) else { return };
                if let Err(e) = cluster.place(&machine, begin, None, None) {
                    log::warn!("{}: no new backup: {e}", machine.name);
                    // The log is not to fill while there is no host.
                    std::thread::sleep(Duration::from_secs(2));
                }
            });
        }
    }

    /// Have a host start a machine's backup: `to`, or the best one but `from`; the host's name.
    fn place(
        &self,
        machine: &Machine,
        since: Instant,
        from: Option<&str>,
        to: Option<&str>,
    ) -> Result<String> {
        let uuid = machine.uuid();
        if uuid.is_empty() {
            return Err(Error::State("it has no UUID by which hosts could know it".into()));
        }
        let need = Need { uuid: &uuid, memory: machine.memory(), version: env!("CARGO_PKG_VERSION") };
        let mut hosts = self.fresh(Some(since));
        let mut reasons = Vec::new();
        hosts.retain(|host| {
            let reason = if to.is_some_and(|to| to != host.name) || from == Some(&host.name) {
                return false;
            } else {
                place::reason_against(host, &need)
            };
            reasons.extend(reason.iter().map(|r| format!("{}: {r}", host.name)));
            reason.is_none()
        });
        let mut refused = lock(&self.heal.refused).clone();
        refused.retain(|_, at| at.elapsed() < REFUSED);
        hosts.retain(|h| to.is_some() || !refused.contains_key(&(machine.name.clone(), h.name.clone())));
        *lock(&self.heal.refused) = refused;
        let order = order(machine, &uuid, self.settings.address.as_deref().unwrap_or_default())?;
        for host in place::order(hosts, &need) {
            log::info!("{}: asking {} for a backup", machine.name, host.name);
            let asked =
                self.talk_to(&host.name).and_then(|mut t| t.ask(&Request::StartBackup(order.clone())));
            match asked {
                Ok(Answer::Done) => return Ok(host.name),
                Ok(other) => reasons.push(format!("{}: an unexpected answer: {other:?}", host.name)),
                Err(e) => {
                    log::warn!("{}: {}: {e}", machine.name, host.name);
                    reasons.push(format!("{}: {e}", host.name));
                    lock(&self.heal.refused).insert((machine.name.clone(), host.name), Instant::now());
                }
            }
        }
        Err(Error::State(match reasons.is_empty() {
            true => "no other host answers".into(),
            false => reasons.join("; "),
        }))
    }

    /// Have another host (not `from`) start a backup that takes the place of the present one; the host's name.
    pub fn move_backup(&self, uuid: &str, from: &str, to: Option<&str>) -> Result<String> {
        let machine = self.registry.find_uuid(uuid).ok_or_else(|| Error::Unknown(uuid.to_owned()))?;
        let status = machine.status();
        if status.ft.role != "primary" {
            return Err(Error::State(format!("'{}' is no primary here", machine.name)));
        }
        let _placing = Placing::wait(&self.heal, &machine.name)?;
        // Nothing is let go before there is a place.
        let need = Need { uuid, memory: machine.memory(), version: env!("CARGO_PKG_VERSION") };
        let elsewhere = |h: &super::HostState| h.name != from && to.is_none_or(|to| to == h.name);
        let hosts = self.fresh(None).into_iter().filter(elsewhere).collect();
        if place::order(hosts, &need).is_empty() {
            return Err(Error::State(format!("no host can have the backup of '{}'", machine.name)));
        }
        if !is_wounded(&status) {
            // The present backup protects until its successor is there.
            machine.command("ft-migrate-backup", serde_json::Value::Null)?;
        }
        // A peer may not have told yet that the old backup is gone: the answers from before do for the others.
        let recent = Instant::now().checked_sub(super::FRESH).unwrap_or_else(Instant::now);
        self.place(&machine, recent, Some(from), to)
    }
}

/// What a host must know to start a machine's backup; `address`: this host's, if it is configured.
fn order(machine: &Machine, uuid: &str, address: &str) -> Result<Order> {
    let ft = machine.status().ft;
    let port = ft.listen.rsplit_once(':').map(|(_, port)| port);
    let port = port.ok_or_else(|| Error::State("it does not tell where it waits for a backup".into()))?;
    let text = machine.definition_text();
    let args = text.as_deref().and_then(|t| definition::parse(t).ok()).unwrap_or_default();
    let keys = definition::value(&args, "ft").map(definition::ft_keys).unwrap_or_default();
    let address = match address.contains(':') {
        true => format!("[{address}]"),
        false => address.to_owned(),
    };
    Ok(Order {
        name: machine.name.clone(),
        uuid: uuid.to_owned(),
        // A definition of a backup says nothing of the machine.
        definition: text.filter(|_| !definition::is_backup(&args)),
        peer: format!("{address}:{port}"),
        lock: ft.lock,
        separate: keys.iter().any(|(k, v)| k == "disks" && v == "separate"),
        memory: machine.memory(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Ft;

    #[test]
    fn which_machines_are_wounded() {
        let status = |role: &str, state: &str, run: &str, suspended| Status {
            state: run.into(),
            pid: 1,
            ft: Ft { role: role.into(), state: state.into(), suspended, ..Ft::default() },
        };
        assert!(is_wounded(&status("primary", "unprotected", "running", false)));
        assert!(is_wounded(&status("primary", "live", "paused", false)));
        for (role, state, run, suspended) in [
            ("none", "off", "running", false),
            ("backup", "following", "inmigrate", false),
            ("primary", "protected", "running", false),
            ("primary", "synchronizing", "running", false),
            ("primary", "unprotected", "running", true),
            ("primary", "unprotected", "shutdown", false),
        ] {
            assert!(!is_wounded(&status(role, state, run, suspended)), "{role} {state} {run}");
        }
    }
}
