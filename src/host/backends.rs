//! What is behind the machine's devices: which image is drive number n, which network back end belongs to card
//! n. It changes when something is plugged in or out; the change travels to a backup as the machine's note.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::assembly::Blueprint;
use crate::cli::drive::DriveConfig;
use crate::cli::net::NetdevConfig;

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
        }
    }

    /// The bytes for the machine's note.
    pub fn to_note(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Take over what another host of this machine noted; what belongs to this host (paths and interfaces of what the machine
    /// began with) stays.
    pub fn take_note(&mut self, note: &[u8]) {
        let Ok(mut theirs) = postcard::from_bytes::<Backends>(note) else { return };
        for (mine, theirs) in self.drives.iter().zip(&mut theirs.drives) {
            if let (Some(mine), Some(theirs)) = (mine, theirs) {
                if mine.id == theirs.id {
                    theirs.file.clone_from(&mine.file);
                    theirs.locking = mine.locking;
                }
            }
        }
        for dev in &mut theirs.netdevs {
            if let Some(mine) = self.netdevs.iter().find(|m| m.id == dev.id) {
                *dev = mine.clone();
            }
        }
        *self = theirs;
    }

    /// Whether every drive and network back end of another host's note is here too.
    pub fn has_all_of(&self, note: &[u8]) -> bool {
        let Ok(theirs) = postcard::from_bytes::<Backends>(note) else { return false };
        theirs.drives.iter().flatten().all(|d| self.drive(&d.id).is_some())
            && theirs.netdevs.iter().all(|d| self.netdevs.iter().any(|m| m.id == d.id))
    }

    /// The number of the drive whose node or id is `name`.
    pub fn drive(&self, name: &str) -> Option<usize> {
        let is = |d: &Option<DriveConfig>| d.as_ref().is_some_and(|d| d.id == name);
        self.drives.iter().position(is)
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
