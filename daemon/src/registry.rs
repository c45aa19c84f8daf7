//! The machines of this host: those that are defined, and those that run without a definition any more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbus::{ObjectPath, OwnedObjectPath, Variant};

use crate::machine::{Dirs, Machine, Notice};
use crate::{definition, Error, Result, ROOT};

/// The machines by name.
pub struct Registry {
    dirs: Dirs,
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
    pub fn new(dirs: Dirs, notices: Sender<(Arc<Machine>, Notice)>) -> Result<Registry> {
        for dir in [&dirs.config, &dirs.run] {
            std::fs::create_dir_all(dir).map_err(|e| Error::File(dir.display().to_string(), e))?;
        }
        Ok(Self::unread(dirs, notices))
    }

    /// A registry that has not looked into its directories.
    pub fn unread(dirs: Dirs, notices: Sender<(Arc<Machine>, Notice)>) -> Registry {
        Registry { dirs, machines: Mutex::default(), notices }
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

    /// Look into the directories; the machines that are new and those that are gone.
    pub fn scan(&self) -> (Vec<Arc<Machine>>, Vec<Arc<Machine>>) {
        let mut names = names(&self.dirs.config, "conf");
        let processes = names_of_processes(&self.dirs.run, &names);
        let mut machines = self.lock();
        let mut added = Vec::new();
        for name in names.iter().chain(&processes) {
            if !machines.contains_key(name) {
                let machine = Machine::new(name, &self.dirs, &self.notices);
                if names.contains(name) || machine.pid().is_some() {
                    machines.insert(name.clone(), Arc::clone(&machine));
                    added.push(machine);
                } else {
                    machine.remove();
                }
            }
        }
        names.extend(machines.values().filter(|m| m.pid().is_some()).map(|m| m.name.clone()));
        let gone: Vec<String> = machines.keys().filter(|n| !names.contains(*n)).cloned().collect();
        let gone: Vec<_> = gone.iter().filter_map(|n| machines.remove(n)).collect();
        gone.iter().for_each(|m| m.remove());
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
        if machine.pid().is_some() {
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
