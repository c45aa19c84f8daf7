//! The network device (section 5.1): mergeable receive buffers, checksum and TCP segmentation for
//! the transmitter, receive filters over the control queue.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{gather, scatter, total, Chain, Io, Model, VERSION_1};
use crate::config::NicSpec;
use crate::ctx::{pack, unpack, DeviceError};
use crate::door::{GuestEvent, Input};
use crate::net::{finish_checksum, segment, Headers, MAX_FRAME, MAX_GSO};

const F_CSUM: u64 = 1;
const F_MAC: u64 = 1 << 5;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_CTRL_VLAN: u64 = 1 << 19;
const F_CTRL_RX_EXTRA: u64 = 1 << 20;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Frames that wait for receive buffers; more are lost.
const BACKLOG: usize = 256;
/// Addresses in a filter table; more means all pass.
const TABLE: usize = 64;
/// A control command's data at most.
const MAX_CTRL: usize = 8192;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    mac: [u8; 6],
    link: bool,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Vec<[u8; 6]>,
    multicast: Vec<[u8; 6]>,
    unicast_overflow: bool,
    multicast_overflow: bool,
    /// A bit for each VLAN that passes.
    vlans: Vec<u64>,
    backlog: VecDeque<Vec<u8>>,
}

/// A network card.
pub struct Net {
    spec: NicSpec,
    s: State,
}

impl Net {
    pub fn new(spec: NicSpec) -> Net {
        let s = Net::initial(&spec, true);
        Net { spec, s }
    }

    fn initial(spec: &NicSpec, link: bool) -> State {
        State {
            mac: spec.mac,
            link,
            // Until the driver says otherwise everything passes.
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            unicast_overflow: false,
            multicast_overflow: false,
            vlans: vec![u64::MAX; 64],
            backlog: VecDeque::new(),
        }
    }

    fn header_len(features: u64) -> usize {
        if features & (F_MRG_RXBUF | VERSION_1) != 0 {
            12
        } else {
            10
        }
    }

    fn passes(&self, frame: &[u8]) -> bool {
        let s = &self.s;
        if s.promiscuous {
            return true;
        }
        if frame.len() >= 16 && frame[12..14] == [0x81, 0] {
            let vid = usize::from(u16::from_be_bytes([frame[14], frame[15]]) & 0xFFF);
            if s.vlans[vid / 64] >> (vid % 64) & 1 == 0 {
                return false;
            }
        }
        let to = &frame[..6];
        if to == [0xFF; 6] {
            !s.no_broadcast
        } else if to[0] & 1 != 0 {
            !s.no_multicast
                && (s.all_multicast || s.multicast_overflow || s.multicast.iter().any(|m| m == to))
        } else {
            !s.no_unicast
                && (s.all_unicast || s.unicast_overflow || to == s.mac || s.unicast.iter().any(|m| m == to))
        }
    }

    /// Give waiting frames to the driver as far as it has buffers.
    fn receive(&mut self, io: &mut Io) {
        while let Some(frame) = self.s.backlog.front() {
            if !Net::deliver(io, frame) {
                break;
            }
            self.s.backlog.pop_front();
        }
    }

    /// Put a frame into receive buffers; false if there are not enough.
    fn deliver(io: &mut Io, frame: &[u8]) -> bool {
        use virtio_queue::QueueT;
        let ram = io.ram();
        let header = Net::header_len(io.features);
        let merge = io.features & F_MRG_RXBUF != 0;
        let need = (header + frame.len()) as u64;
        let start = io.queues[RX].queue.next_avail();
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < need {
            let Some(chain) = io.queues[RX].pop(ram) else {
                // What was taken stays available.
                io.queues[RX].queue.set_next_avail(start);
                io.queues[RX].rearm(ram);
                return false;
            };
            let size = total(&chain.writable);
            if !merge && size < need {
                // A buffer too small for the frame: the frame is lost, the buffer comes back empty.
                io.queues[RX].push(ram, chain.head, 0);
                return true;
            }
            room += size;
            chains.push(chain);
            if chains.len() > 64 {
                break;
            }
        }
        let mut data = vec![0u8; header];
        if header == 12 {
            data[10..12].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        }
        data.extend_from_slice(frame);
        let mut done = 0;
        for c in &chains {
            let n = scatter(io.ctx, &c.writable, 0, &data[done..]);
            done += n;
            io.queues[RX].push(ram, c.head, n as u32);
        }
        true
    }

    fn transmit(&mut self, io: &mut Io, chain: &Chain) {
        let header = Net::header_len(io.features);
        let h = gather(io.ctx, &chain.readable, 0, header);
        let len = total(&chain.readable);
        if h.len() < header || len <= header as u64 || len > (MAX_GSO + header) as u64 {
            return;
        }
        let mut frame = gather(io.ctx, &chain.readable, header as u64, MAX_GSO);
        if frame.len() < 14 || !self.s.link {
            return;
        }
        let word = |at: usize| usize::from(u16::from_le_bytes([h[at], h[at + 1]]));
        let (flags, gso, mss, start, offset) = (h[0], h[1], word(4), word(6), word(8));
        match gso & 0x7F {
            GSO_NONE => {
                if flags & NEEDS_CSUM != 0 {
                    let end = frame.len();
                    finish_checksum(&mut frame, start, start + offset, end);
                }
                if frame.len() <= MAX_FRAME {
                    io.ctx.net_tx(self.spec.index, frame);
                }
            }
            kind @ (GSO_TCPV4 | GSO_TCPV6) if flags & NEEDS_CSUM != 0 => {
                // csum_start is where TCP starts; its own header tells the payload.
                let Some(&at) = frame.get(start + 12) else { return };
                let payload = start + 4 * usize::from(at >> 4);
                let ip = network_header(&frame);
                let h = Headers { ip, l4: start, payload, v6: kind == GSO_TCPV6, tcp: true };
                // A guest that asks for tiny segments gets them, but not without bound.
                for f in segment(&frame, h, mss.max(64)) {
                    io.ctx.net_tx(self.spec.index, f);
                }
            }
            _ => {}
        }
    }

    /// A control command (5.1.6.5); true if it was obeyed.
    fn control(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        let s = &mut self.s;
        match (class, command) {
            (0, 0..=5) => {
                let Some(&value) = data.first() else { return false };
                let flag = match command {
                    0 => &mut s.promiscuous,
                    1 => &mut s.all_multicast,
                    2 => &mut s.all_unicast,
                    3 => &mut s.no_multicast,
                    4 => &mut s.no_unicast,
                    _ => &mut s.no_broadcast,
                };
                *flag = value != 0;
                true
            }
            (1, 0) => {
                let Some((unicast, rest)) = take_table(data) else { return false };
                let Some((multicast, _)) = take_table(rest) else { return false };
                s.unicast_overflow = unicast.len() > TABLE;
                s.multicast_overflow = multicast.len() > TABLE;
                s.unicast = if s.unicast_overflow { Vec::new() } else { unicast };
                s.multicast = if s.multicast_overflow { Vec::new() } else { multicast };
                true
            }
            (1, 1) if data.len() >= 6 => {
                s.mac.copy_from_slice(&data[..6]);
                true
            }
            (2, 0 | 1) if data.len() >= 2 => {
                let vid = usize::from(u16::from_le_bytes([data[0], data[1]]));
                if vid >= 4096 {
                    return false;
                }
                let bit = 1 << (vid % 64);
                if command == 0 {
                    s.vlans[vid / 64] |= bit;
                } else {
                    s.vlans[vid / 64] &= !bit;
                }
                true
            }
            _ => false,
        }
    }
}

/// Where the IP header starts, after VLAN tags.
fn network_header(frame: &[u8]) -> usize {
    let mut at = 12;
    while at < 20 && matches!(frame.get(at..at + 2), Some([0x81, 0] | [0x88, 0xA8])) {
        at += 4;
    }
    at + 2
}

fn take_table(data: &[u8]) -> Option<(Vec<[u8; 6]>, &[u8])> {
    let count = u32::from_le_bytes(data.get(..4)?.try_into().ok()?) as usize;
    let end = 4usize.checked_add(count.checked_mul(6)?)?;
    let macs = data.get(4..end)?;
    let list = macs.chunks_exact(6).map(|m| [m[0], m[1], m[2], m[3], m[4], m[5]]).collect();
    Some((list, &data[end..]))
}

impl Model for Net {
    fn kind(&self) -> u16 {
        1
    }
    fn class(&self) -> u32 {
        0x02_0000
    }
    fn features(&self) -> u64 {
        F_CSUM
            | F_MAC
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_MRG_RXBUF
            | F_STATUS
            | F_CTRL_VQ
            | F_CTRL_RX
            | F_CTRL_VLAN
            | F_CTRL_RX_EXTRA
            | F_CTRL_MAC_ADDR
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 64]
    }
    fn config(&self) -> Vec<u8> {
        let mut c = self.s.mac.to_vec();
        c.extend(u16::from(self.s.link).to_le_bytes());
        c.extend(1u16.to_le_bytes());
        c.extend(1500u16.to_le_bytes());
        c
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        // Legacy drivers set the address here.
        for (i, b) in data.iter().enumerate() {
            if let Some(slot) = self.s.mac.get_mut(offset + i) {
                *slot = *b;
            }
        }
    }
    fn reset(&mut self) {
        self.s = Net::initial(&self.spec, self.s.link);
    }
    fn notify(&mut self, io: &mut Io, queue: usize) {
        let ram = io.ram();
        match queue {
            RX => self.receive(io),
            TX => {
                while let Some(chain) = io.queues[TX].pop(ram) {
                    self.transmit(io, &chain);
                    io.queues[TX].push(ram, chain.head, 0);
                }
                io.queues[TX].rearm(ram);
            }
            CTRL => {
                let mut changed = false;
                while let Some(chain) = io.queues[CTRL].pop(ram) {
                    let command = gather(io.ctx, &chain.readable, 0, MAX_CTRL);
                    let done = command.len() >= 2 && self.control(command[0], command[1], &command[2..]);
                    changed |= done;
                    scatter(io.ctx, &chain.writable, 0, &[u8::from(!done)]);
                    io.queues[CTRL].push(ram, chain.head, 1);
                }
                if changed {
                    io.ctx.event(GuestEvent::NicRxFilterChanged { nic: self.spec.index });
                }
                io.queues[CTRL].rearm(ram);
            }
            _ => {}
        }
    }
    fn input(&mut self, io: &mut Io, input: &Input) {
        use virtio_queue::QueueT;
        match input {
            Input::NetRx { nic, frame } if *nic == self.spec.index => {
                let fits = (14..=MAX_FRAME).contains(&frame.len());
                let ready = io.queues[RX].queue.ready() && self.s.link;
                if fits && ready && self.passes(frame) && self.s.backlog.len() < BACKLOG {
                    self.s.backlog.push_back(frame.clone());
                    self.receive(io);
                }
            }
            Input::LinkState { nic, up } if *nic == self.spec.index && self.s.link != *up => {
                self.s.link = *up;
                io.config_changed = true;
            }
            _ => {}
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&self.s)
    }
    fn load(&mut self, name: &str, data: &[u8]) -> Result<(), DeviceError> {
        let s: State = unpack(name, data)?;
        if s.vlans.len() != 64 || s.backlog.iter().any(|f| f.len() < 14) {
            return Err(DeviceError::Misfit(name.into()));
        }
        self.s = s;
        Ok(())
    }
}
