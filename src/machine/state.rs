//! The state door: the whole machine as bytes, for a backup, a snapshot or a migration.

use serde::{Deserialize, Serialize};

use super::{Machine, Schedule, VirtualClock};

/// Errors of loading a state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the machine state is not readable: {0}")]
    Format(String),
    #[error("the machine state has version {0}, this program reads version {VERSION}")]
    Version(u32),
    #[error("the machine state has {saved} processors, this machine {here}")]
    Processors { saved: usize, here: usize },
    #[error("the machine state does not fit this machine: {0}")]
    Device(String),
}

const VERSION: u32 = 2;

/// Everything but RAM contents (those travel page by page).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    version: u32,
    position: u64,
    clock: VirtualClock,
    schedule: Schedule,
    paused: bool,
    shadow: Vec<u8>,
    cpus: Vec<Vec<u8>>,
    chipset: Vec<u8>,
    note: Vec<u8>,
}

impl MachineState {
    /// The versioned byte form.
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Read what [`Self::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let (version, _) =
            postcard::take_from_bytes::<u32>(bytes).map_err(|e| StateError::Format(e.to_string()))?;
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        postcard::from_bytes(bytes).map_err(|e| StateError::Format(e.to_string()))
    }
}

impl Machine {
    /// The state of everything but RAM contents.
    pub fn save(&mut self) -> MachineState {
        self.still();
        self.state()
    }

    /// As [`Self::save`], of a machine whose processors stand still by themselves.
    pub fn state(&self) -> MachineState {
        MachineState {
            version: VERSION,
            position: self.position,
            clock: self.clock.clone(),
            schedule: self.schedule.clone(),
            paused: self.paused,
            shadow: self.mem.shadow_modes(),
            cpus: self.cpus.iter().map(|c| c.save()).collect(),
            chipset: self.chipset.save(),
            note: self.note.clone(),
        }
    }

    /// Load what [`Self::save`] returned, into a machine of the same configuration.
    pub fn load(&mut self, state: &MachineState) -> Result<(), StateError> {
        if state.cpus.len() != self.cpus.len() {
            return Err(StateError::Processors { saved: state.cpus.len(), here: self.cpus.len() });
        }
        self.still();
        if let Some(h) = &mut self.hardware {
            h.set_time(state.clock.now(state.position));
        }
        for (cpu, saved) in self.cpus.iter_mut().zip(&state.cpus) {
            cpu.load(saved).map_err(StateError::Device)?;
        }
        self.chipset.load(&state.chipset).map_err(StateError::Device)?;
        self.mem.set_shadow_modes(&state.shadow);
        self.position = state.position;
        self.clock = state.clock.clone();
        self.schedule = state.schedule.clone();
        self.paused = state.paused;
        self.note.clone_from(&state.note);
        self.ipis.clear();
        self.outputs.clear();
        self.remap();
        Ok(())
    }
}
