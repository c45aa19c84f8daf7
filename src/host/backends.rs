//! What is behind the machine's devices: which image is drive number n, which network back end belongs to card
//! n. It changes when something is plugged in or out; the change travels to a backup as the machine's note.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::assembly::Blueprint;
use crate::cli::drive::{Backing, DriveConfig};
use crate::cli::net::NetdevConfig;
use crate::cli::object::is_host_own;

/// A network card's connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    pub netdev: String,
    pub mac: [u8; 6],
}

/// The tray of a CD drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tray {
    /// The drive number of the medium.
    pub medium: Option<u32>,
    pub open: bool,
}

/// A node that comes to a device's front.
#[derive(Clone, Debug)]
pub struct Moved {
    pub name: String,
    pub file: Option<String>,
    pub format: &'static str,
}

/// All of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Backends {
    /// By drive number; `None`: deleted.
    pub drives: Vec<Option<DriveConfig>>,
    pub netdevs: Vec<NetdevConfig>,
    /// By card number; `None`: unplugged.
    pub nics: Vec<Option<Nic>>,
    /// Kind and id of each object.
    pub objects: Vec<(String, String)>,
    /// By the CD drive's device id, once its tray was touched.
    pub trays: BTreeMap<String, Tray>,
    /// Sizes in bytes of drives that were resized.
    pub sizes: BTreeMap<usize, u64>,
    /// An image has taken another's place since the start.
    pub moved: bool,
    /// The number of drives and cards that the machine began with.
    cold: (usize, usize),
}

impl Backends {
    /// What a machine starts with.
    pub fn new(blueprint: &Blueprint) -> Self {
        let drives: Vec<_> = blueprint.config.drives.iter().cloned().map(Some).collect();
        let netdevs = blueprint.netdevs();
        let nic = |(spec, dev): (&ftvm_devices::NicSpec, &Option<&NetdevConfig>)| {
            Some(Nic { netdev: dev.map_or(String::new(), |d| d.id.clone()), mac: spec.mac })
        };
        let nics: Vec<_> = blueprint.pc.nics.iter().zip(&netdevs).map(nic).collect();
        Backends {
            cold: (drives.len(), nics.len()),
            drives,
            netdevs: blueprint.config.netdevs.clone(),
            nics,
            objects: blueprint.config.objects.clone(),
            trays: BTreeMap::new(),
            sizes: BTreeMap::new(),
            moved: false,
        }
    }

    /// The bytes for the machine's note.
    pub fn to_note(&self) -> Vec<u8> {
        let mut note = self.clone();
        note.objects.retain(|(kind, _)| !is_host_own(kind));
        postcard::to_stdvec(&note).unwrap_or_default()
    }

    /// Take over what another host of this machine noted; what belongs to this host (paths, names of secrets and interfaces of
    /// what the machine began with) stays.
    pub fn take_note(&mut self, note: &[u8]) {
        let Ok(mut theirs) = postcard::from_bytes::<Backends>(note) else { return };
        for (mine, theirs) in self.drives.iter().zip(&mut theirs.drives) {
            if let (Some(mine), Some(theirs)) = (mine, theirs) {
                if mine.id == theirs.id {
                    theirs.file.clone_from(&mine.file);
                    theirs.locking = mine.locking;
                    theirs.key_secret.clone_from(&mine.key_secret);
                    theirs.backing_key_secret.clone_from(&mine.backing_key_secret);
                }
            }
        }
        for dev in &mut theirs.netdevs {
            if let Some(mine) = self.netdevs.iter().find(|m| m.id == dev.id) {
                *dev = mine.clone();
            }
        }
        theirs.objects.extend(self.objects.drain(..).filter(|(kind, _)| is_host_own(kind)));
        *self = theirs;
    }

    /// Whether every drive and network back end of another host's note is here too. The same image may be called something
    /// else there: libvirt numbers those that a machine has when it starts.
    pub fn has_all_of(&self, note: &[u8]) -> bool {
        let Ok(theirs) = postcard::from_bytes::<Backends>(note) else { return false };
        let same_file = |d: &DriveConfig| {
            d.file.is_some() && self.drives.iter().flatten().any(|mine| mine.file == d.file)
        };
        theirs.drives.iter().flatten().all(|d| self.drive(&d.id).is_some() || same_file(d))
            && theirs.netdevs.iter().all(|d| self.netdevs.iter().any(|m| m.id == d.id))
    }

    /// The number of the drive whose node or id is `name`.
    pub fn drive(&self, name: &str) -> Option<usize> {
        let is = |d: &Option<DriveConfig>| d.as_ref().is_some_and(|d| d.id == name);
        self.drives.iter().position(is)
    }

    /// The image `to` is in front of drive number `index` now: it takes the place of the node that was, which takes its.
    pub fn exchange(&mut self, index: usize, to: &Moved) {
        self.moved = true;
        let Some(old) = self.drives.get(index).cloned().flatten() else { return };
        let at = self.drives.iter().position(|d| d.as_ref().is_some_and(|d| d.id == to.name));
        let node = at.and_then(|at| self.drives[at].clone()).unwrap_or_else(|| DriveConfig {
            id: to.name.clone(),
            file: to.file.clone(),
            format: Some(to.format.to_owned()),
            protocol: None,
            backing: Backing::Header,
            ..old.clone()
        });
        // What belongs to the device's side stays there.
        let mut new = DriveConfig {
            interface: old.interface,
            index: old.index,
            cdrom: old.cdrom,
            serial: old.serial.clone(),
            on_error: old.on_error,
            limits: old.limits,
            read_only: false,
            snapshot: false,
            node: old.node,
            backing: Backing::Header,
            ..node
        };
        if !old.node {
            new.id.clone_from(&old.id);
        }
        self.drives[index] = Some(new);
        let left = old.node.then_some(DriveConfig { read_only: true, ..old });
        match (at, left) {
            (Some(at), left) => self.drives[at] = left,
            (None, Some(left)) => self.drives.push(Some(left)),
            (None, None) => {}
        }
    }

    /// Drive number `index` stands on the node `below` now.
    pub fn stands_on(&mut self, index: usize, below: Option<&str>) {
        let named = below.filter(|b| self.drives.iter().flatten().any(|d| d.id == **b)).map(str::to_owned);
        if let Some(Some(drive)) = self.drives.get_mut(index).filter(|d| d.as_ref().is_some_and(|d| d.node)) {
            drive.backing = match (named, below) {
                (Some(named), _) => Backing::Node(named),
                (None, None) if drive.backing == Backing::Nothing => Backing::Nothing,
                // What has no place of its own is found by the header.
                _ => Backing::Header,
            };
        }
    }

    /// The drives, each behind the one whose node it stands on.
    pub fn from_below(&self) -> Vec<(usize, &DriveConfig)> {
        let mut left: Vec<_> =
            self.drives.iter().enumerate().filter_map(|(i, d)| Some((i, d.as_ref()?))).collect();
        let mut out: Vec<(usize, &DriveConfig)> = Vec::new();
        while !left.is_empty() {
            let waits = |d: &DriveConfig| match &d.backing {
                Backing::Node(below) => left.iter().any(|(_, l)| l.id == *below),
                _ => false,
            };
            let (later, now): (Vec<_>, Vec<_>) = left.iter().copied().partition(|(_, d)| waits(d));
            if now.is_empty() {
                out.extend(later);
                break;
            }
            out.extend(now);
            left = later;
        }
        out
    }

    /// Whether drives have other numbers than on a command line that names the same nodes.
    pub fn is_rearranged(&self) -> bool {
        self.moved && self.drives.iter().skip(self.cold.0).flatten().any(|d| d.node && d.read_only)
    }

    /// Cards that were plugged in after the start, with their numbers.
    pub fn hot_nics(&self) -> Vec<(usize, Nic)> {
        let hot = |(i, n): (usize, &Option<Nic>)| Some((i, n.clone()?));
        self.nics.iter().enumerate().skip(self.cold.1).filter_map(hot).collect()
    }

    /// Whether drive number `index` was added after the start.
    pub fn is_hot_drive(&self, index: usize) -> bool {
        index >= self.cold.0
    }

    /// The guest or the user moved a tray.
    pub fn tray_moved(&mut self, device: &str, open: bool) {
        self.trays.entry(device.to_owned()).or_default().open = open;
    }
}
