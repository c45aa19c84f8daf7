//! `gdbserver`: the stub for GDB, at any time.

use std::sync::{Arc, PoisonError};

use ftvm_qmp::QmpError;

use super::Control;
use crate::cli::config::gdb_char;
use crate::cli::Char;
use crate::gdb::{Server, DEFAULT};

impl Control {
    /// Serve debuggers on this device from now on, and no more where they were served; `None`: nowhere.
    pub fn serve_gdb(self: &Arc<Self>, dev: Option<&Char>) -> Result<(), String> {
        let mut slot = self.gdb.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = None;
        if let Some(dev) = dev {
            *slot = Some(Server::start(&dev.resolve(&self.config.chardevs)?, self)?);
        }
        Ok(())
    }

    /// `gdbserver [DEVICE]`
    pub(super) fn gdbserver(&self, device: &str) -> Result<String, QmpError> {
        let device = if device.is_empty() { DEFAULT } else { device };
        let failed =
            |e: String| QmpError::generic(format!("Could not open gdbserver on device '{device}': {e}"));
        let dev = gdb_char(device).map_err(|e| failed(e.to_string()))?;
        if self.config.machine == "none" {
            return Err(failed("there is no machine".into()));
        }
        let this = self.this.upgrade().ok_or_else(|| failed("the program ends".into()))?;
        this.serve_gdb(dev.as_ref()).map_err(failed)?;
        Ok(match dev {
            None => "Disabled gdbserver\n".into(),
            Some(_) => format!("Waiting for gdb connection on device '{device}'\n"),
        })
    }
}
