//! The saved state of the board and its devices: named, versioned sections.

use serde::{Deserialize, Serialize};

use super::hotplug::Changes;
use super::Pc;
use crate::ctx::{pack, unpack, BoardState, DeviceError};
use crate::pci::PciFunction;

#[derive(Serialize, Deserialize)]
struct Section {
    name: String,
    version: u32,
    data: Vec<u8>,
}

pub(super) const BOARD_SECTION: &str = "board";
const BOARD_VERSION: u32 = 2;
pub(super) const CHANGES_SECTION: &str = "hotplug";

/// The name of the place of a device that is gone.
pub(super) fn gone(at: usize) -> String {
    format!("gone@{at}")
}

impl Pc {
    /// The state of all devices. Guest memory (with its shadow modes) is saved by its owner.
    pub fn save(&self) -> Vec<u8> {
        let mut sections =
            vec![Section { name: BOARD_SECTION.into(), version: BOARD_VERSION, data: pack(&self.board.s) }];
        let changes = pack(&self.changes());
        sections.push(Section { name: CHANGES_SECTION.into(), version: 2, data: changes });
        sections.extend(self.devices.iter().map(|d| Section {
            name: d.name().into(),
            version: d.version(),
            data: d.save(),
        }));
        pack(&sections)
    }

    /// Restore what [`Self::save`] returned on a machine of the same devices: what was plugged in on the way may be part of
    /// this machine's configuration, or is plugged in now. After an error the machine is to be thrown away.
    pub fn load(&mut self, saved: &[u8]) -> Result<(), DeviceError> {
        let (sections, rest): (Vec<Section>, _) =
            postcard::take_from_bytes(saved).map_err(DeviceError::NotAState)?;
        if !rest.is_empty() {
            return Err(DeviceError::Config("saved state: trailing bytes".into()));
        }
        let check = |s: &Section, known: u32| match s.version > known {
            true => Err(DeviceError::NewerSection(s.name.clone(), s.version, known)),
            false => Ok(()),
        };
        let mut changes = match sections.iter().find(|s| s.name == CHANGES_SECTION) {
            Some(s) => {
                check(s, 2)?;
                unpack(CHANGES_SECTION, &s.data)?
            }
            None => Changes::default(),
        };
        self.follow_children(changes.take_children());
        let is_device = |s: &&Section| s.name != CHANGES_SECTION && s.name != BOARD_SECTION;
        let names: Vec<&str> = sections.iter().filter(is_device).map(|s| s.name.as_str()).collect();
        // A replica has its devices in the same places: places are part of its state.
        let replica = self.is_replica(&names, &changes);
        if replica {
            self.follow(changes)?;
        } else {
            self.follow_by_name(changes, &names)?;
        }
        let mut seen = vec![false; self.devices.len()];
        let mut board: Option<BoardState> = None;
        let mut places = Vec::with_capacity(names.len());
        for s in sections.iter().filter(|s| s.name != CHANGES_SECTION) {
            if s.name == BOARD_SECTION {
                check(s, BOARD_VERSION)?;
                board = Some(unpack(BOARD_SECTION, &s.data)?);
                continue;
            }
            let found = self.devices.iter().position(|d| d.name() == s.name);
            if found.is_none() && !replica && s.name == gone(places.len()) {
                places.push(None);
                continue;
            }
            let Some(i) = found else { return Err(DeviceError::UnknownSection(s.name.clone())) };
            check(s, self.devices[i].version())?;
            self.devices[i].load(&s.data)?;
            seen[i] = true;
            places.push(Some(i as u16));
        }
        if let Some(i) = seen.iter().enumerate().position(|(i, s)| !s && self.devices[i].name() != gone(i)) {
            return Err(DeviceError::MissingSection(self.devices[i].name().into()));
        }
        let Some(mut board) = board else { return Err(DeviceError::MissingSection(BOARD_SECTION.into())) };
        if !replica {
            move_places(&mut board, &places)?;
        }
        let count = self.devices.len();
        let valid = board.timers.keys().all(|(d, _)| usize::from(*d) < count);
        if !valid {
            return Err(DeviceError::Misfit(BOARD_SECTION.into()));
        }
        self.board.s = board;
        self.board.deadline = None;
        self.board.settle();
        self.board.find_deadline();
        self.board.changed.set(true);
        self.remap();
        Ok(())
    }

    /// Whether the saver's devices were in the places that they have here.
    fn is_replica(&self, names: &[&str], changes: &Changes) -> bool {
        let here = |(i, name): (usize, &&str)| {
            self.devices.get(i).is_none_or(|d| d.name() == *name) || **name == gone(i)
        };
        self.devices.len() <= names.len()
            && names.iter().enumerate().all(here)
            && changes.places().all(|at| usize::from(at) >= self.devices.len())
    }

    /// Become what the saver was, wherever devices are: what it lost is pulled, what it got and is not here is plugged in.
    fn follow_by_name(&mut self, changes: Changes, names: &[&str]) -> Result<(), DeviceError> {
        let (plugged, pulled) = changes.into_parts();
        if pulled {
            let lost = |at: &u16, pc: &Pc| !names.contains(&pc.devices[usize::from(*at)].name());
            let can_go = |pc: &Pc, bus: usize| pc.buses[bus].hotplug;
            let users: Vec<u16> = self
                .users
                .iter()
                .filter(|u| can_go(self, u.bus))
                .filter_map(|u| u.device)
                .filter(|at| {
                    self.devices[usize::from(*at)].pci().is_some_and(|p: &PciFunction| !p.is_bridge())
                })
                .filter(|at| lost(at, self))
                .collect();
            for at in users {
                self.pull(at)?;
            }
        }
        for (at, plug) in plugged {
            let name = names.get(usize::from(at)).copied().unwrap_or_default();
            if !self.devices.iter().any(|d| d.name() == name) {
                let device = self.build_plug(&plug)?;
                self.devices.push(device);
                self.enter(self.devices.len() as u16 - 1, &plug);
            }
        }
        Ok(())
    }
}

/// Timers name their devices by place: `places` has the place here of each of the saver's.
fn move_places(board: &mut BoardState, places: &[Option<u16>]) -> Result<(), DeviceError> {
    if !board.pending.is_empty() {
        let text = "saved state: disk requests are under way, and the devices are in other places here";
        return Err(DeviceError::Config(text.into()));
    }
    let timers = std::mem::take(&mut board.timers);
    for ((device, timer), due) in timers {
        if let Some(Some(place)) = places.get(usize::from(device)) {
            board.timers.insert((*place, timer), due);
        }
    }
    Ok(())
}
