//! What happens when a disk request fails: `werror=` and `rerror=` as QEMU defines them.

use ftvm_devices::{DiskOp, Input, Output};
use serde_json::json;

use super::control::RunState;
use super::live::Runtime;
use crate::cli::drive::{ErrorPolicy, OnError};
use crate::host::disk::DiskFailure;
use crate::machine::MachineInput;

/// Drives' policies, and the requests that stopped the machine.
#[derive(Default)]
pub struct DiskErrors {
    /// (name, policy) of each drive.
    pub drives: Vec<(String, ErrorPolicy)>,
    stopped: Vec<DiskFailure>,
}

impl DiskErrors {
    /// The requests that failed and wait for `cont`.
    pub fn stopped_ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.stopped.iter().map(|f| f.id)
    }

    /// Another state was loaded: what failed before is of no concern.
    pub fn forget(&mut self) {
        self.stopped.clear();
    }

    /// A drive's name and policy.
    pub fn set(&mut self, index: usize, name: &str, policy: ErrorPolicy) {
        if self.drives.len() <= index {
            self.drives.resize_with(index + 1, Default::default);
        }
        self.drives[index] = (name.to_owned(), policy);
    }
}

impl Runtime {
    /// Decide what the guest sees of a failed request.
    pub fn disk_failed(&mut self, failure: DiskFailure) {
        // Tried again, it is a new request; a backup never does what failed.
        self.outside.disk_ended(failure.id);
        let read = matches!(failure.op, DiskOp::Read { .. });
        let known = self.errors.drives.get(failure.drive as usize);
        let (name, policy) = known.cloned().unwrap_or_default();
        let nospace = failure.errno == libc::ENOSPC;
        let action = match if read { policy.read } else { policy.write } {
            OnError::Enospc if nospace => OnError::Stop,
            OnError::Enospc => OnError::Report,
            other => other,
        };
        let word = match action {
            OnError::Ignore => "ignore",
            OnError::Stop => "stop",
            _ => "report",
        };
        self.shared.events.emit(
            "BLOCK_IO_ERROR",
            json!({
                "device": name,
                "node-name": name,
                "operation": if read { "read" } else { "write" },
                "action": word,
                "nospace": nospace,
                "reason": failure.reason,
            }),
        );
        let result = match action {
            OnError::Stop => {
                self.errors.stopped.push(failure);
                if !self.machine.is_paused() {
                    self.input(MachineInput::Paused(true));
                    self.set_running(false, RunState::IoError);
                    self.shared.set_state(RunState::IoError);
                }
                return;
            }
            OnError::Ignore => match failure.op {
                DiskOp::Read { len, .. } => Ok(vec![0; len as usize]),
                _ => Ok(Vec::new()),
            },
            _ => Err(failure.errno),
        };
        self.input(MachineInput::Device(Input::DiskDone { id: failure.id, result }));
    }

    /// `cont`: try again what stopped the machine, in the order of submission.
    pub fn retry_failed(&mut self) {
        let mut again = std::mem::take(&mut self.errors.stopped);
        again.sort_by_key(|f| f.id);
        for f in again {
            self.outside.perform(Output::Disk { id: f.id, drive: f.drive, op: f.op });
        }
    }
}
