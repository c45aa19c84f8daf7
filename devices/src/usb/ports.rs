//! Which USB device is in which port of a controller.

use super::hid::Kind;
use crate::config::DeviceSpec;
use crate::ctx::DeviceError;
use crate::registry::{self, Build};

/// The devices on the bus of `controller`, which has `count` ports, each with its port, from 0.
pub fn on_bus(b: &Build, controller: &DeviceSpec, count: u32) -> Result<Vec<(usize, Kind)>, DeviceError> {
    let mut out: Vec<(usize, Kind)> = Vec::new();
    for (spec, kind) in registry::usb_devices(b.config) {
        if !registry::usb_controller(b.config, spec).is_some_and(|c| std::ptr::eq(c, controller)) {
            continue;
        }
        let free = |n: &usize| out.iter().all(|(m, _)| m != n);
        let port = match spec.properties.get("port") {
            None => (0..count as usize).find(free),
            Some(text) => {
                let n = text.parse::<usize>().ok().and_then(|n| n.checked_sub(1));
                Some(n.filter(|n| *n < count as usize && free(n)).ok_or_else(|| {
                    DeviceError::Config(format!(
                        "usb port {text} (bus {}) not found (in use?)",
                        controller.id.as_deref().unwrap_or("usb")
                    ))
                })?)
            }
        };
        let port = port.ok_or_else(|| {
            DeviceError::Config(format!(
                "tried to attach usb device {} to a bus with no free ports",
                spec.driver
            ))
        })?;
        out.push((port, kind));
    }
    Ok(out)
}
