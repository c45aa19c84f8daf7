//! A full-speed device seen from a controller that speaks in transactions: SETUP, IN and OUT packets (USB 2.0, 8.5).

use serde::{Deserialize, Serialize};

use super::device::{Answer, UsbDevice};
use crate::ctx::Ctx;

/// The control transfer that is under way at endpoint 0.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Control {
    setup: [u8; 8],
    /// What the device sends, or has been sent.
    data: Vec<u8>,
    sent: usize,
    stalled: bool,
}

/// A device with its address.
pub struct Pipe {
    pub device: UsbDevice,
    pub address: u8,
    control: Control,
}

/// What of it is saved, besides the device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PipeState {
    address: u8,
    control: Control,
}

/// Bytes of a control transfer at most.
const MAX_DATA: usize = 4096;

impl Pipe {
    pub fn new(device: UsbDevice) -> Pipe {
        Pipe { device, address: 0, control: Control::default() }
    }

    pub fn save(&self) -> PipeState {
        PipeState { address: self.address, control: self.control.clone() }
    }

    pub fn load(&mut self, s: PipeState) {
        (self.address, self.control) = (s.address, s.control);
    }

    /// A reset of its port.
    pub fn reset(&mut self) {
        self.device.reset();
        self.address = 0;
        self.control = Control::default();
    }

    /// A SETUP packet begins a control transfer.
    pub fn setup(&mut self, packet: [u8; 8]) -> Answer {
        self.control = Control { setup: packet, ..Control::default() };
        if packet[0] & 0x80 != 0 {
            match self.device.control(packet, &[]) {
                Ok(data) => self.control.data = data,
                Err(_) => self.control.stalled = true,
            }
        }
        Answer::Done(Vec::new())
    }

    /// An IN packet of at most `len` bytes.
    pub fn receive(&mut self, endpoint: u8, len: usize) -> Answer {
        if endpoint != 0 {
            return self.device.receive(endpoint, len);
        }
        let c = &mut self.control;
        if c.stalled {
            return Answer::Stall;
        }
        if c.setup[0] & 0x80 != 0 {
            let end = c.data.len().min(c.sent + len);
            let part = c.data.get(c.sent..end).unwrap_or_default().to_vec();
            c.sent = end;
            return Answer::Done(part);
        }
        // The status stage of what was sent to the device: it is done now.
        let (setup, data) = (c.setup, std::mem::take(&mut c.data));
        if self.device.control(setup, &data).is_err() {
            self.control.stalled = true;
            return Answer::Stall;
        }
        if setup[..2] == [0, 5] {
            self.address = setup[2] & 0x7F;
        }
        Answer::Done(Vec::new())
    }

    /// An OUT packet.
    pub fn send(&mut self, ctx: &mut Ctx, endpoint: u8, data: &[u8]) -> Answer {
        if endpoint != 0 {
            return self.device.send(ctx, endpoint, data);
        }
        if self.control.stalled {
            return Answer::Stall;
        }
        // Behind data that were read it is the status stage.
        let room = MAX_DATA - self.control.data.len().min(MAX_DATA);
        if self.control.setup[0] & 0x80 == 0 {
            self.control.data.extend(&data[..data.len().min(room)]);
        }
        Answer::Done(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DeviceSpec, PcConfig};

    #[test]
    fn a_control_transfer_goes_in_packets() {
        let spec = DeviceSpec { driver: "usb-kbd".into(), ..DeviceSpec::default() };
        let mut p = Pipe::new(UsbDevice::new(&PcConfig::default(), &spec, false).unwrap());
        assert_eq!(p.setup([0x80, 6, 0, 1, 0, 0, 18, 0]), Answer::Done(vec![]));
        let Answer::Done(first) = p.receive(0, 8) else { panic!() };
        let Answer::Done(second) = p.receive(0, 64) else { panic!() };
        assert_eq!((first.len(), second.len(), first[0]), (8, 10, 18));
        p.setup([0, 5, 9, 0, 0, 0, 0, 0]);
        assert_eq!((p.address, p.receive(0, 0), p.address), (0, Answer::Done(vec![]), 9));
        p.setup([0x80, 6, 0, 6, 0, 0, 10, 0]);
        assert_eq!(p.receive(0, 8), Answer::Stall);
        assert_eq!(p.receive(1, 8), Answer::Nak);
        assert_eq!(p.receive(2, 8), Answer::Stall);
    }
}
