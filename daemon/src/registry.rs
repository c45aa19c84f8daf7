//! The machines of this host: those that are defined, and those that run without a definition any more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbus::{ObjectPath, OwnedObjectPath, Variant};

use crate::foreign::{Finder, Found};
use crate::machine::{Dirs, Machine, Notice, Origin};
use crate::{definition, Error, Result, ROOT};

/// The machines by name.
pub struct Registry {
    dirs: Dirs,
    finder: Finder,
    /// The ports for logging channels, and which machine was given which.
    ports: (u16, u16),
    given: Mutex<BTreeMap<String, u16>>,
    /// Made between two scans.
    made: Mutex<Vec<Arc<Machine>>>,
    machines: Mutex<BTreeMap<String, Arc<Machine>>>,
    notices: Sender<(Arc<Machine>, Notice)>,
}

/// The object of a machine: every character that a path cannot have is `_` and two hexadecimal digits.
pub fn path(name: &str) -> OwnedObjectPath {
    let mut text = format!("{ROOT}/machine/");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() {
            text.push(byte as char);
        } else {
            text.push_str(&format!("_{byte:02x}"));
        }
    }
    if name.is_empty() {
        text.push('_');
    }
    ObjectPath::from_string_unchecked(text).into()
}

impl Registry {
    /// Make the directories, if they are not there.
    pub fn new(dirs: Dirs, ports: (u16, u16), notices: Sender<(Arc<Machine>, Notice)>) -> Result<Registry> {
        for dir in [&dirs.config, &dirs.run, &dirs.registry] {
            std::fs::create_dir_all(dir).map_err(|e| Error::File(dir.display().to_string(), e))?;
        }
        Ok(Self::unread(dirs, ports, notices))
    }

    /// A registry that has not looked into its directories.
    pub fn unread(dirs: Dirs, ports: (u16, u16), notices: Sender<(Arc<Machine>, Notice)>) -> Registry {
        let finder = Finder::new(&dirs.registry);
        let (given, made, machines) = (Mutex::default(), Mutex::default(), Mutex::default());
        Registry { dirs, finder, ports, given, made, machines, notices }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All machines, by name.
    pub fn all(&self) -> Vec<Arc<Machine>> {
        self.lock().values().cloned().collect()
    }

    /// A machine by name.
    pub fn find(&self, name: &str) -> Option<Arc<Machine>> {
        self.lock().get(name).cloned()
    }

    /// A machine by UUID.
    pub fn find_uuid(&self, uuid: &str) -> Option<Arc<Machine>> {
        let fits = |m: &Arc<Machine>| !uuid.is_empty() && m.uuid().eq_ignore_ascii_case(uuid);
        let machines = self.all();
        machines.iter().find(|m| fits(m) && m.runs()).or_else(|| machines.iter().find(|m| fits(m))).cloned()
    }

    /// A port for a machine's logging channel: the one that it had, or a free one.
    pub fn port(&self, name: &str) -> Result<u16> {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let listens = |m: &Arc<Machine>| m.status().ft.listen.rsplit_once(':')?.1.parse::<u16>().ok();
        let others = self.all().into_iter().filter(|m| m.name != name && m.runs());
        let mut taken: BTreeSet<u16> = BTreeSet::new();
        for machine in others {
            taken.extend(listens(&machine));
            taken.extend(given.get(&machine.name));
        }
        let free = |port: &u16| {
            let any = ("0.0.0.0", *port);
            !taken.contains(port) && TcpListener::bind(any).is_ok() && UdpSocket::bind(any).is_ok()
        };
        let had = given.get(name).copied();
        let port = had.into_iter().chain(self.ports.0..=self.ports.1).find(free).ok_or_else(|| {
            Error::State(format!("no port from {} to {} is free", self.ports.0, self.ports.1))
        })?;
        given.insert(name.to_owned(), port);
        Ok(port)
    }

    /// The machine whose backup is to be started here under this name; made, if there is none.
    pub fn for_backup(&self, name: &str, uuid: &str) -> Result<Arc<Machine>> {
        definition::check_name(name)?;
        let mut machines = self.lock();
        if let Some(machine) = machines.values().find(|m| m.uuid().eq_ignore_ascii_case(uuid) && m.runs()) {
            return Err(Error::State(format!("the machine runs here already, as '{}'", machine.name)));
        }
        let machine = match machines.get(name) {
            Some(machine) => {
                let own = machine.uuid();
                let backup = machine.definition().is_ok_and(|args| definition::is_backup(&args));
                if !own.is_empty() && !own.eq_ignore_ascii_case(uuid) && !backup {
                    return Err(Error::State(format!("another machine has the name '{name}' here")));
                }
                Arc::clone(machine)
            }
            None => {
                let machine = Machine::new(name, Origin::Service, &self.dirs, &self.notices);
                machines.insert(name.to_owned(), Arc::clone(&machine));
                crate::machine::lock(&self.made).push(Arc::clone(&machine));
                machine
            }
        };
        if machine.runs() {
            return Err(Error::State(format!("'{name}' is running")));
        }
        uuid.clone_into(&mut crate::machine::lock(&machine.expected));
        // It is kept until its start is over.
        machine.begun.store(true, Ordering::Relaxed);
        Ok(machine)
    }

    /// Take a machine that others started.
    fn adopt(&self, found: Found, machines: &mut BTreeMap<String, Arc<Machine>>) -> Option<Arc<Machine>> {
        let pid = found.process.pid;
        if machines.values().any(|m| m.pid() == Some(pid)) {
            return None;
        }
        let name = match machines.contains_key(&found.name) || self.is_defined(&found.name) {
            true => format!("{}-{pid}", found.name),
            false => found.name,
        };
        let machine = Machine::new(&name, Origin::Foreign(found.process), &self.dirs, &self.notices);
        machines.insert(name, Arc::clone(&machine));
        Some(machine)
    }

    fn is_defined(&self, name: &str) -> bool {
        self.dirs.config.join(format!("{name}.conf")).exists()
    }

    /// Look into the directories; the machines that are new and those that are gone.
    pub fn scan(&self) -> (Vec<Arc<Machine>>, Vec<Arc<Machine>>) {
        let found = self.finder.look();
        let mut names = names(&self.dirs.config, "conf");
        let processes = names_of_processes(&self.dirs.run, &names);
        let mut machines = self.lock();
        let mut added = std::mem::take(&mut *crate::machine::lock(&self.made));
        for name in names.iter().chain(&processes) {
            if !machines.contains_key(name) {
                let machine = Machine::new(name, Origin::Service, &self.dirs, &self.notices);
                if names.contains(name) || machine.pid().is_some() {
                    machines.insert(name.clone(), Arc::clone(&machine));
                    added.push(machine);
                } else {
                    machine.remove();
                }
            }
        }
        added.extend(found.into_iter().filter_map(|f| self.adopt(f, &mut machines)));
        names.extend(machines.values().filter(|m| m.runs()).map(|m| m.name.clone()));
        // A definition of the same name takes the place of a machine of others' that has ended.
        let over = |m: &Machine| m.origin != Origin::Service && !m.runs();
        let gone = machines.iter().filter(|(name, m)| !names.contains(*name) || over(m));
        let gone: Vec<String> = gone.map(|(name, _)| name.clone()).collect();
        let mut gone: Vec<_> = gone.iter().filter_map(|n| machines.remove(n)).collect();
        gone.iter().for_each(|m| m.remove());
        // One that came and went between two scans (a backup that could not be started) was never shown.
        gone.retain(|m| !added.iter().any(|a| Arc::ptr_eq(a, m)));
        added.retain(|a| machines.contains_key(&a.name));
        (added, gone)
    }

    /// Write a definition.
    pub fn define(&self, name: &str, text: &str) -> Result<()> {
        definition::check_name(name)?;
        definition::write(&self.dirs.config.join(format!("{name}.conf")), text)
    }

    /// Remove a definition.
    pub fn undefine(&self, name: &str) -> Result<()> {
        let machine = self.find(name).ok_or_else(|| Error::Unknown(name.to_owned()))?;
        if machine.runs() {
            return Err(Error::State(format!("'{name}' is running")));
        }
        let path = machine.config_path();
        std::fs::remove_file(&path).map_err(|e| Error::File(path.display().to_string(), e))
    }
}

/// The names of machines that have a file with this ending.
fn names(dir: &Path, ending: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|f| {
            let name = f.file_name().into_string().ok()?;
            let name = name.strip_suffix(ending)?.strip_suffix('.')?;
            definition::check_name(name).ok().map(|()| name.to_owned())
        })
        .collect()
}

/// Machines that may run without a definition.
fn names_of_processes(run: &Path, defined: &BTreeSet<String>) -> BTreeSet<String> {
    names(run, "pid").difference(defined).cloned().collect()
}

/// What this host has.
pub fn inventory() -> BTreeMap<String, Variant<'static>> {
    let mut dict = BTreeMap::new();
    let mut put = |key: &str, value: Variant<'static>| dict.insert(key.to_owned(), value);
    if let Ok(uts) = nix::sys::utsname::uname() {
        put("host-name", uts.nodename().to_string_lossy().into_owned().into());
        put("kernel", uts.release().to_string_lossy().into_owned().into());
    }
    put("processors", std::thread::available_parallelism().map_or(1, |n| n.get() as u32).into());
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0.0);
    put("load", load.into());
    let (memory, available) = memory();
    put("memory", memory.into());
    put("memory-available", available.into());
    dict
}

/// Memory of this host and how much of it is available, in bytes.
pub fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| -> u64 {
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    (kib("MemTotal") * 1024, kib("MemAvailable") * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn paths_are_valid_and_differ() {
        assert_eq!(super::path("web-1.a_b").as_str(), "/org/ftvm/machine/web_2d1_2ea_5fb");
        zbus::ObjectPath::try_from(super::path("0é").as_str()).unwrap();
    }
}
