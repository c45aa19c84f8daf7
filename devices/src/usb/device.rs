//! What is plugged into a port, of whatever kind. A device knows nothing of the controller it is behind.

use serde::{Deserialize, Serialize};

use super::hid::{self, Hid};
use super::storage::Storage;
use crate::config::{DeviceSpec, PcConfig};
use crate::ctx::{pack, Ctx, DeviceError};
use crate::door::{DiskOp, Input};

/// The request cannot be done: the endpoint stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall;

/// What a device answers to data that are asked for or sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The data of an IN packet; empty for OUT and SETUP.
    Done(Vec<u8>),
    /// Nothing to say now: ask again.
    Nak,
    Stall,
}

/// The answer to a request that all devices have alike (USB 2.0, 9.4): halts, address, configuration, interface. `None`: it is
/// another one.
pub fn standard_request(setup: [u8; 8], configuration: &mut u8) -> Option<Vec<u8>> {
    let [kind, request, low, ..] = setup;
    Some(match (kind, request) {
        (0x81 | 0x82, 0) => vec![0, 0],
        (0x02, 1) | (0x00, 5) => Vec::new(),
        (0x80, 8) => vec![*configuration],
        (0x00, 9) if low < 2 => {
            *configuration = low;
            Vec::new()
        }
        (0x81, 10) => vec![0],
        (0x01, 11) if low == 0 => Vec::new(),
        _ => return None,
    })
}

/// A string descriptor (USB 2.0, 9.6.7), of as much as it has room for.
pub fn string_descriptor(text: &str) -> Vec<u8> {
    let units: Vec<u8> = text.encode_utf16().take(126).flat_map(u16::to_le_bytes).collect();
    [vec![units.len() as u8 + 2, 3], units].concat()
}

enum Kind {
    Hid(Hid),
    Storage(Box<Storage>),
}

#[derive(Serialize, Deserialize)]
enum Saved {
    Hid(Hid),
    Storage(Vec<u8>),
}

/// A device in a port.
pub struct UsbDevice {
    /// The id that its user gave it, or what stands for it.
    name: String,
    kind: Kind,
}

/// The kind of human interface device that a model is.
fn hid_kind(driver: &str) -> Option<hid::Kind> {
    Some(match driver {
        "usb-kbd" => hid::Kind::Keyboard,
        "usb-mouse" => hid::Kind::Mouse,
        "usb-tablet" => hid::Kind::Tablet,
        _ => return None,
    })
}

/// What tells a device from another one in the same port.
pub fn name_of(spec: &DeviceSpec) -> String {
    spec.id.clone().unwrap_or_else(|| spec.driver.clone())
}

impl UsbDevice {
    /// The device that `spec` names; `high`: behind a port of high speed, not of full speed.
    pub fn new(config: &PcConfig, spec: &DeviceSpec, high: bool) -> Result<UsbDevice, DeviceError> {
        let kind = match hid_kind(&spec.driver) {
            Some(kind) => Kind::Hid(Hid::new(kind)),
            None => Kind::Storage(Box::new(Storage::new(config, spec, high)?)),
        };
        Ok(UsbDevice { name: name_of(spec), kind })
    }

    /// See [`name_of`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A bus reset.
    pub fn reset(&mut self) {
        match &mut self.kind {
            Kind::Hid(d) => d.reset(),
            Kind::Storage(d) => d.reset(),
        }
    }

    /// Whether the guest lets the device wake it.
    pub fn may_wake(&self) -> bool {
        match &self.kind {
            Kind::Hid(d) => d.may_wake(),
            Kind::Storage(_) => false,
        }
    }

    /// A request to endpoint 0: what is read, at most as much as asked for.
    pub fn control(&mut self, setup: [u8; 8], data: &[u8]) -> Result<Vec<u8>, Stall> {
        match &mut self.kind {
            Kind::Hid(d) => d.control(setup, data),
            Kind::Storage(d) => d.control(setup),
        }
    }

    /// At most `len` bytes from endpoint `endpoint`, not 0.
    pub fn receive(&mut self, endpoint: u8, len: usize) -> Answer {
        match &mut self.kind {
            Kind::Hid(d) if endpoint == 1 => d.poll().map_or(Answer::Nak, |mut report| {
                report.truncate(len);
                Answer::Done(report)
            }),
            Kind::Storage(d) if endpoint == 1 => d.receive(len),
            _ => Answer::Stall,
        }
    }

    /// Bytes for endpoint `endpoint`, not 0.
    pub fn send(&mut self, ctx: &mut Ctx, endpoint: u8, data: &[u8]) -> Answer {
        match &mut self.kind {
            Kind::Storage(d) if endpoint == 2 => d.send(ctx, data),
            _ => Answer::Stall,
        }
    }

    /// Something comes in from outside; whether the device has something to say now.
    pub fn input(&mut self, input: &Input) -> bool {
        match &mut self.kind {
            Kind::Hid(d) => d.input(input),
            Kind::Storage(d) => {
                d.input(input);
                false
            }
        }
    }

    /// A disk request ended; whether it was this device's, which may have something to say now.
    pub fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: &DiskOp, result: &Result<&[u8], i32>) -> bool {
        match &mut self.kind {
            Kind::Hid(_) => false,
            Kind::Storage(d) => d.disk_done(ctx, id, op, result),
        }
    }

    pub fn save(&self) -> Vec<u8> {
        pack(&match &self.kind {
            Kind::Hid(d) => Saved::Hid(d.clone()),
            Kind::Storage(d) => Saved::Storage(d.save()),
        })
    }

    /// Restore what [`Self::save`] returned; false if it is the state of another device.
    #[must_use]
    pub fn load(&mut self, data: &[u8]) -> bool {
        match (&mut self.kind, postcard::from_bytes(data)) {
            (Kind::Hid(d), Ok(Saved::Hid(s))) if s.kind() == d.kind() => {
                *d = s;
                true
            }
            (Kind::Storage(d), Ok(Saved::Storage(s))) => d.load(&s),
            _ => false,
        }
    }
}

/// The devices in a controller's ports as bytes.
pub fn save_all<'a>(ports: impl Iterator<Item = Option<&'a UsbDevice>>) -> Vec<Option<Vec<u8>>> {
    ports.map(|d| d.map(UsbDevice::save)).collect()
}

/// Restore what [`save_all`] returned; false if there are other devices in the ports.
#[must_use]
pub fn load_all<'a>(
    ports: impl ExactSizeIterator<Item = Option<&'a mut UsbDevice>>,
    saved: &[Option<Vec<u8>>],
) -> bool {
    ports.len() == saved.len()
        && ports.zip(saved).all(|pair| match pair {
            (None, None) => true,
            (Some(d), Some(s)) => d.load(s),
            _ => false,
        })
}
