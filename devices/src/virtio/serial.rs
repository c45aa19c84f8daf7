//! Serial ports and consoles (section 5.3): `virtserialport` and `virtconsole` on a `virtio-serial-pci`.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{gather, scatter, total, Io, Model};
use crate::ctx::{pack, unpack, DeviceError};
use crate::door::{GuestEvent, Input};
use crate::registry::Build;

const F_MULTIPORT: u64 = 1 << 1;
/// Ports at most; each has two queues, and the control channel two more.
const MAX_PORTS: u32 = 31;
const QUEUES: usize = 2 * (MAX_PORTS as usize + 1);
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
/// Bytes that wait for a guest that does not read; more are lost.
const BACKLOG: usize = 1 << 20;
/// Bytes taken out of one transmit buffer.
const MAX_SEND: usize = 1 << 20;

// Control events (5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A port as configured.
struct Port {
    number: u32,
    console: bool,
    name: String,
    id: String,
    /// Character device number; a port may have none.
    chardev: Option<u32>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct PortState {
    guest_open: bool,
    host_open: bool,
    backlog: VecDeque<u8>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    ports: Vec<PortState>,
    /// Control messages that wait for a buffer.
    control: VecDeque<Vec<u8>>,
}

/// The device.
pub struct Serial {
    ports: Vec<Port>,
    s: State,
}

impl Serial {
    /// A device with the ports that name it as their bus (`ID.0`), or name none.
    pub fn new(b: &Build) -> Result<Serial, DeviceError> {
        let own = b.spec.id.as_ref().map(|id| format!("{id}.0"));
        let mut ports: Vec<Port> = Vec::new();
        for spec in &b.config.devices {
            let console = spec.driver == "virtconsole";
            if !console && spec.driver != "virtserialport" {
                continue;
            }
            let bus = spec.properties.get("bus");
            // Without a bus a port belongs to the first controller.
            let first = b.config.devices.iter().find(|d| d.driver.starts_with("virtio-serial-pci"));
            if bus.map_or(first.is_some_and(|f| f != b.spec), |bus| Some(bus) != own.as_ref()) {
                continue;
            }
            let wrong = |text: String| Err(DeviceError::Config(text));
            let taken = |n: u32| ports.iter().any(|p| p.number == n);
            let number = match spec.properties.get("nr") {
                Some(text) => crate::registry::parse_number(text).map_or(u32::MAX, |n| n as u32),
                // Port 0 is for a console, by tradition.
                None => (u32::from(!console)..MAX_PORTS).find(|n| !taken(*n)).unwrap_or(u32::MAX),
            };
            if number >= MAX_PORTS {
                return wrong(format!(
                    "virtio-serial-bus: Out-of-range port id specified, max. allowed: {}",
                    MAX_PORTS - 1
                ));
            }
            if taken(number) {
                return wrong(format!("virtio-serial-bus: A port already exists at id {number}"));
            }
            if number == 0 && !console {
                return wrong("Port number 0 on virtio-serial devices reserved for virtconsole devices for backward compatibility.".into());
            }
            ports.push(Port {
                number,
                console,
                name: spec.properties.get("name").cloned().unwrap_or_default(),
                id: spec.id.clone().unwrap_or_default(),
                chardev: spec.chardev,
            });
        }
        let s = State { ports: vec![PortState::default(); ports.len()], ..State::default() };
        Ok(Serial { ports, s })
    }

    fn rx_queue(number: u32) -> usize {
        if number == 0 {
            0
        } else {
            2 + 2 * number as usize
        }
    }

    fn tell(&mut self, io: &mut Io, number: u32, event: u16, value: u16, text: &[u8]) {
        let mut message = number.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(text);
        // A guest that takes none of its messages gets no more of them.
        if self.s.control.len() < 1024 {
            self.s.control.push_back(message);
        }
        self.flush_control(io);
    }

    fn flush_control(&mut self, io: &mut Io) {
        let ram = io.ram();
        while !self.s.control.is_empty() {
            let Some(chain) = io.queues[CONTROL_RX].pop(ram) else { break };
            let message = self.s.control.pop_front().unwrap_or_default();
            let n = scatter(io.ctx, &chain.writable, 0, &message);
            io.queues[CONTROL_RX].push(ram, chain.head, n as u32);
        }
        io.queues[CONTROL_RX].rearm(ram);
    }

    fn control(&mut self, io: &mut Io, message: &[u8]) {
        let word = |at: usize| u16::from_le_bytes([message[at], message[at + 1]]);
        let number = u32::from(word(0)) | u32::from(word(2)) << 16;
        let (event, value) = (word(4), word(6));
        if event == DEVICE_READY {
            if value != 0 {
                for number in self.ports.iter().map(|p| p.number).collect::<Vec<_>>() {
                    self.tell(io, number, PORT_ADD, 1, &[]);
                }
            }
            return;
        }
        let Some(i) = self.ports.iter().position(|p| p.number == number) else { return };
        match event {
            PORT_READY if value != 0 => {
                if self.ports[i].console {
                    self.tell(io, number, CONSOLE_PORT, 1, &[]);
                }
                if !self.ports[i].name.is_empty() {
                    let name = format!("{}\0", self.ports[i].name);
                    self.tell(io, number, PORT_NAME, 1, name.as_bytes());
                }
                if self.s.ports[i].host_open {
                    self.tell(io, number, PORT_OPEN, 1, &[]);
                }
            }
            PORT_OPEN => self.guest_open(io, i, value != 0),
            _ => {}
        }
    }

    fn guest_open(&mut self, io: &mut Io, i: usize, open: bool) {
        if std::mem::replace(&mut self.s.ports[i].guest_open, open) != open && !self.ports[i].console {
            io.ctx.event(GuestEvent::PortChange { id: self.ports[i].id.clone(), open });
        }
        if !open {
            self.s.ports[i].backlog.clear();
        }
    }

    /// Give waiting bytes to the guest as far as it has buffers.
    fn deliver(&mut self, io: &mut Io, i: usize) {
        let ram = io.ram();
        let queue = Serial::rx_queue(self.ports[i].number);
        while !self.s.ports[i].backlog.is_empty() {
            let Some(chain) = io.queues[queue].pop(ram) else { break };
            let n = (total(&chain.writable) as usize).min(self.s.ports[i].backlog.len());
            let bytes: Vec<u8> = self.s.ports[i].backlog.drain(..n).collect();
            let n = scatter(io.ctx, &chain.writable, 0, &bytes);
            io.queues[queue].push(ram, chain.head, n as u32);
        }
        io.queues[queue].rearm(ram);
    }

    fn transmit(&mut self, io: &mut Io, queue: usize, port: Option<usize>) {
        let ram = io.ram();
        while let Some(chain) = io.queues[queue].pop(ram) {
            let length = (total(&chain.readable) as usize).min(MAX_SEND);
            let bytes = gather(io.ctx, &chain.readable, 0, length);
            if let Some((state, Some(chardev))) = port.map(|i| (&self.s.ports[i], self.ports[i].chardev)) {
                if state.host_open {
                    io.ctx.chars_out(chardev, &bytes);
                }
            }
            io.queues[queue].push(ram, chain.head, 0);
        }
        io.queues[queue].rearm(ram);
    }
}

impl Model for Serial {
    fn kind(&self) -> u16 {
        3
    }
    fn class(&self) -> u32 {
        0x07_8000
    }
    fn features(&self) -> u64 {
        F_MULTIPORT
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[128; QUEUES]
    }
    fn vectors(&self) -> u16 {
        MAX_PORTS as u16 + 1
    }
    fn config(&self) -> Vec<u8> {
        let mut c = vec![0; 4];
        c.extend(MAX_PORTS.to_le_bytes());
        c.extend([0; 4]);
        c
    }
    fn reset(&mut self) {
        for p in &mut self.s.ports {
            *p = PortState { host_open: p.host_open, ..PortState::default() };
        }
        self.s.control.clear();
    }
    fn notify(&mut self, io: &mut Io, queue: usize) {
        let ram = io.ram();
        match queue {
            CONTROL_RX => self.flush_control(io),
            CONTROL_TX => {
                while let Some(chain) = io.queues[CONTROL_TX].pop(ram) {
                    let message = gather(io.ctx, &chain.readable, 0, 8);
                    if message.len() == 8 {
                        self.control(io, &message);
                    }
                    io.queues[CONTROL_TX].push(ram, chain.head, 0);
                }
                io.queues[CONTROL_TX].rearm(ram);
            }
            _ => {
                let number = if queue < 2 { 0 } else { (queue as u32 - 2) / 2 };
                let port = self.ports.iter().position(|p| p.number == number);
                if queue % 2 == 1 {
                    self.transmit(io, queue, port);
                } else if let Some(i) = port {
                    self.deliver(io, i);
                }
            }
        }
    }
    fn input(&mut self, io: &mut Io, input: &Input) {
        match input {
            Input::CharIn { port, bytes } => {
                let Some(i) = self.ports.iter().position(|p| p.chardev == Some(*port)) else { return };
                // Bytes for a port that nobody has opened are lost; a console is always open.
                if self.s.ports[i].guest_open || self.ports[i].console {
                    let room = BACKLOG.saturating_sub(self.s.ports[i].backlog.len());
                    self.s.ports[i].backlog.extend(bytes.iter().take(room));
                    self.deliver(io, i);
                }
            }
            Input::CharOpen { port, open } => {
                let Some(i) = self.ports.iter().position(|p| p.chardev == Some(*port)) else { return };
                if std::mem::replace(&mut self.s.ports[i].host_open, *open) != *open {
                    self.tell(io, self.ports[i].number, PORT_OPEN, u16::from(*open), &[]);
                }
            }
            _ => {}
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        let s: State = unpack(name, data)?;
        if s.ports.len() != self.ports.len() {
            return Err(DeviceError::Misfit(name.into()));
        }
        self.s = s;
        Ok(())
    }
}
