//! Device slots of an xHCI controller: contexts, endpoints and their transfer rings (xHCI 1.0, 4.5, 4.6, 4.11, 6.2).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::device::{Answer, Stall, UsbDevice};
use super::xhci::{CONTEXT_ERROR, LINK_TRB, PARAMETER_ERROR, SHORT_PACKET, STALLED, SUCCESS, TRB_ERROR};
use crate::ctx::Ctx;

// Commands for a slot.
const ADDRESS_DEVICE: u32 = 11;
const CONFIGURE: u32 = 12;
const EVALUATE: u32 = 13;
const RESET_ENDPOINT: u32 = 14;
const STOP_ENDPOINT: u32 = 15;
const SET_DEQUEUE: u32 = 16;
const RESET_DEVICE: u32 = 17;

// Slot states (6.2.2) and endpoint states (6.2.3).
const DEFAULT: u32 = 1;
const ADDRESSED: u32 = 2;
const CONFIGURED: u32 = 3;
const DISABLED: u32 = 0;
const RUNNING: u32 = 1;
const HALTED: u32 = 2;
const STOPPED: u32 = 3;

// Transfer TRBs and their flags (6.4.1).
const SETUP: u32 = 2;
const DATA: u32 = 3;
const STATUS: u32 = 4;
const CYCLE: u32 = 1;
const TOGGLE: u32 = 2;
const ON_SHORT: u32 = 4;
const CHAIN: u32 = 0x10;
const ON_COMPLETION: u32 = 0x20;
/// The data are in the TRB itself.
const IMMEDIATE: u32 = 0x40;

/// Bytes of a context.
const CONTEXT: u64 = 32;
/// TRBs that one transfer has at most, and transfers done for one ring of a doorbell.
const MAX_TRBS: usize = 256;
const MAX_TRANSFERS: usize = 64;
/// Bytes that one TRB moves at most.
const MAX_BYTES: u32 = 0x1_0000;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Endpoint {
    state: u32,
    ring: u64,
    cycle: bool,
}

/// A device slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The port of the device, from 1; 0: not known yet.
    pub port: u8,
    /// Where the guest wants the device context.
    pub output: u64,
    endpoints: BTreeMap<u8, Endpoint>,
}

/// How a transfer ended.
pub struct Event {
    pub trb: u64,
    pub code: u32,
    /// Bytes that were not moved.
    pub residue: u32,
}

#[derive(Clone, Copy)]
struct Trb {
    at: u64,
    parameter: u64,
    status: u32,
    control: u32,
}

impl Trb {
    fn kind(&self) -> u32 {
        self.control >> 10 & 0x3F
    }

    fn len(&self) -> u32 {
        (self.status & 0x1_FFFF).min(MAX_BYTES)
    }
}

fn dword(ctx: &Ctx, at: u64) -> u32 {
    let mut bytes = [0; 4];
    ctx.dma_read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

impl Slot {
    /// Execute a command for this slot. `connected` says which ports have a device.
    pub fn command(&mut self, ctx: &Ctx, kind: u32, parameter: u64, control: u32, connected: &[bool]) -> u32 {
        let endpoint = (control >> 16 & 0x1F) as u8;
        match kind {
            ADDRESS_DEVICE => {
                let port = (dword(ctx, parameter.wrapping_add(CONTEXT + 4)) >> 16) as u8;
                if !connected.get(usize::from(port).wrapping_sub(1)).is_some_and(|c| *c) {
                    return CONTEXT_ERROR;
                }
                self.port = port;
                self.endpoints.clear();
                self.copy_context(ctx, parameter, 0);
                self.enable(ctx, parameter, 1);
                let block = control & 0x200 != 0;
                self.set_state(ctx, if block { DEFAULT } else { ADDRESSED }, u32::from(!block && port != 0));
                SUCCESS
            }
            CONFIGURE => {
                let deconfigure = control & 0x200 != 0;
                let (drop, add) = match deconfigure {
                    true => (!3, 0),
                    false => (dword(ctx, parameter), dword(ctx, parameter.wrapping_add(4))),
                };
                for n in 2..32u8 {
                    if drop >> n & 1 != 0 && self.endpoints.remove(&n).is_some() {
                        self.write_endpoint(ctx, n);
                    }
                    if add >> n & 1 != 0 {
                        self.enable(ctx, parameter, n);
                    }
                }
                let address = dword(ctx, self.output.wrapping_add(12)) & 0xFF;
                self.set_state(ctx, if deconfigure { ADDRESSED } else { CONFIGURED }, address);
                SUCCESS
            }
            EVALUATE => {
                // Of what can change, only endpoint 0's largest packet means something to these devices, and that little.
                if dword(ctx, parameter.wrapping_add(4)) & 2 != 0 {
                    let size = dword(ctx, parameter.wrapping_add(2 * CONTEXT + 4)) & 0xFFFF_0000;
                    let at = self.output.wrapping_add(CONTEXT + 4);
                    let new = dword(ctx, at) & 0xFFFF | size;
                    ctx.dma_write(at, &new.to_le_bytes());
                }
                SUCCESS
            }
            RESET_ENDPOINT => self.change(ctx, endpoint, |e| match e.state {
                HALTED => {
                    e.state = STOPPED;
                    SUCCESS
                }
                _ => CONTEXT_ERROR,
            }),
            STOP_ENDPOINT => self.change(ctx, endpoint, |e| match e.state {
                RUNNING => {
                    e.state = STOPPED;
                    SUCCESS
                }
                _ => CONTEXT_ERROR,
            }),
            SET_DEQUEUE => {
                let cycle = parameter & 1 != 0;
                let parameter = parameter & !15;
                self.change(ctx, endpoint, |e| match e.state {
                    STOPPED => {
                        (e.ring, e.cycle) = (parameter, cycle);
                        SUCCESS
                    }
                    _ => CONTEXT_ERROR,
                })
            }
            RESET_DEVICE => {
                self.endpoints.retain(|n, _| *n == 1);
                for n in 2..32 {
                    self.write_endpoint(ctx, n);
                }
                self.set_state(ctx, DEFAULT, 0);
                SUCCESS
            }
            _ => TRB_ERROR,
        }
    }

    /// Whether an endpoint takes transfers without being asked to.
    pub fn is_running(&self, endpoint: u8) -> bool {
        self.endpoints.get(&endpoint).is_some_and(|e| e.state == RUNNING)
    }

    fn change(&mut self, ctx: &Ctx, endpoint: u8, f: impl FnOnce(&mut Endpoint) -> u32) -> u32 {
        let Some(e) = self.endpoints.get_mut(&endpoint) else { return PARAMETER_ERROR };
        let code = f(e);
        self.write_endpoint(ctx, endpoint);
        code
    }

    /// Copy a context from the input context (behind its control context) to the device context.
    fn copy_context(&self, ctx: &Ctx, input: u64, n: u8) {
        let mut bytes = [0; CONTEXT as usize];
        ctx.dma_read(input.wrapping_add(CONTEXT * (u64::from(n) + 1)), &mut bytes);
        ctx.dma_write(self.output.wrapping_add(CONTEXT * u64::from(n)), &bytes);
    }

    fn set_state(&self, ctx: &Ctx, state: u32, address: u32) {
        ctx.dma_write(self.output.wrapping_add(12), &(state << 27 | address).to_le_bytes());
    }

    fn enable(&mut self, ctx: &Ctx, input: u64, n: u8) {
        self.copy_context(ctx, input, n);
        let at = input.wrapping_add(CONTEXT * (u64::from(n) + 1));
        let (low, high) = (dword(ctx, at.wrapping_add(8)), dword(ctx, at.wrapping_add(12)));
        let ring = u64::from(low & !15) | u64::from(high) << 32;
        self.endpoints.insert(n, Endpoint { state: RUNNING, ring, cycle: low & CYCLE != 0 });
        self.write_endpoint(ctx, n);
    }

    /// Tell the guest an endpoint's state and how far its ring was used.
    fn write_endpoint(&self, ctx: &Ctx, n: u8) {
        let at = self.output.wrapping_add(CONTEXT * u64::from(n));
        let none = Endpoint { state: DISABLED, ..Endpoint::default() };
        let e = self.endpoints.get(&n).unwrap_or(&none);
        let first = dword(ctx, at) & !7 | e.state;
        ctx.dma_write(at, &first.to_le_bytes());
        if e.state != DISABLED {
            ctx.dma_write(at.wrapping_add(8), &(e.ring | u64::from(e.cycle)).to_le_bytes());
        }
    }

    /// The guest rang the doorbell of an endpoint, or its device has something to say: do all transfers that can be done.
    pub fn transfer(&mut self, ctx: &mut Ctx, device: &mut UsbDevice, n: u8) -> Vec<Event> {
        let mut events = Vec::new();
        let Some(e) = self.endpoints.get_mut(&n) else { return events };
        if e.state == STOPPED {
            e.state = RUNNING;
        }
        for _ in 0..MAX_TRANSFERS {
            if e.state != RUNNING {
                break;
            }
            let Some((trbs, next, cycle)) = e.next(ctx, n == 1) else { break };
            let done = match n {
                1 => control(ctx, device, &trbs, &mut events),
                // The context's number is twice the endpoint's, and one more for IN.
                _ => match move_data(ctx, device, n / 2, n & 1 != 0, &trbs, &mut events) {
                    Answer::Done(_) => Ok(()),
                    // Nothing to say: the transfer waits.
                    Answer::Nak => break,
                    Answer::Stall => Err(Stall),
                },
            };
            if done.is_err() {
                let last = trbs.last().map_or(e.ring, |t| t.at);
                let failed = trbs.iter().rev().find(|t| t.kind() != STATUS).map_or(last, |t| t.at);
                events.push(Event { trb: failed, code: STALLED, residue: 0 });
                e.state = HALTED;
            }
            (e.ring, e.cycle) = (next, cycle);
        }
        self.write_endpoint(ctx, n);
        events
    }
}

impl Endpoint {
    /// The TRBs of the next transfer, and where the ring goes on; `None` if it is not complete yet. A control transfer
    /// reaches to its status stage, any other to the end of a chain.
    fn next(&self, ctx: &Ctx, control: bool) -> Option<(Vec<Trb>, u64, bool)> {
        let (mut at, mut cycle) = (self.ring, self.cycle);
        let mut trbs = Vec::new();
        for _ in 0..MAX_TRBS {
            let mut b = [0u8; 16];
            if !ctx.dma_read(at, &mut b) {
                return None;
            }
            let word = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
            let parameter = u64::from(word(0)) | u64::from(word(4)) << 32;
            let trb = Trb { at, parameter, status: word(8), control: word(12) };
            if (trb.control & CYCLE != 0) != cycle {
                return None;
            }
            if trb.kind() == LINK_TRB {
                at = trb.parameter & !15;
                cycle ^= trb.control & TOGGLE != 0;
                continue;
            }
            at = at.wrapping_add(16);
            trbs.push(trb);
            let last = match control {
                true => trb.kind() == STATUS,
                false => trb.control & CHAIN == 0,
            };
            if last {
                return Some((trbs, at, cycle));
            }
        }
        None
    }
}

/// Put `data` where the TRBs say; the events that they ask for.
fn deliver(ctx: &Ctx, trbs: &[Trb], data: &[u8], events: &mut Vec<Event>) {
    let mut left = data;
    for t in trbs {
        let n = left.len().min(t.len() as usize);
        ctx.dma_write(t.parameter, &left[..n]);
        left = &left[n..];
        let residue = t.len() - n as u32;
        let short = residue > 0;
        if t.control & ON_COMPLETION != 0 || short && t.control & ON_SHORT != 0 {
            events.push(Event { trb: t.at, code: if short { SHORT_PACKET } else { SUCCESS }, residue });
        }
        if short {
            // A short packet ends the transfer.
            break;
        }
    }
}

fn control(ctx: &Ctx, device: &mut UsbDevice, trbs: &[Trb], events: &mut Vec<Event>) -> Result<(), Stall> {
    let setup = trbs.first().filter(|t| t.kind() == SETUP && t.control & IMMEDIATE != 0).ok_or(Stall)?;
    let request = setup.parameter.to_le_bytes();
    let stage: Vec<Trb> = trbs[1..].iter().copied().filter(|t| (1..=DATA).contains(&t.kind())).collect();
    if request[0] & 0x80 != 0 {
        let reply = device.control(request, &[])?;
        deliver(ctx, &stage, &reply, events);
    } else {
        device.control(request, &sent(ctx, &stage))?;
    }
    let asked = trbs.iter().filter(|t| t.kind() == STATUS && t.control & ON_COMPLETION != 0);
    events.extend(asked.map(|t| Event { trb: t.at, code: SUCCESS, residue: 0 }));
    Ok(())
}

/// A bulk or interrupt transfer of endpoint `endpoint`.
fn move_data(
    ctx: &mut Ctx,
    device: &mut UsbDevice,
    endpoint: u8,
    into_memory: bool,
    trbs: &[Trb],
    events: &mut Vec<Event>,
) -> Answer {
    if into_memory {
        let len = trbs.iter().map(|t| t.len() as usize).sum();
        let answer = device.receive(endpoint, len);
        if let Answer::Done(data) = &answer {
            deliver(ctx, trbs, data, events);
        }
        return answer;
    }
    let answer = device.send(ctx, endpoint, &sent(ctx, trbs));
    if let Answer::Done(_) = &answer {
        let asked = trbs.iter().filter(|t| t.control & ON_COMPLETION != 0);
        events.extend(asked.map(|t| Event { trb: t.at, code: SUCCESS, residue: 0 }));
    }
    answer
}

/// The bytes that the TRBs name.
fn sent(ctx: &Ctx, trbs: &[Trb]) -> Vec<u8> {
    let mut data = Vec::new();
    for t in trbs {
        let from = data.len();
        data.resize(from + t.len() as usize, 0);
        match t.control & IMMEDIATE {
            0 => {
                ctx.dma_read(t.parameter, &mut data[from..]);
            }
            _ => data[from..].iter_mut().zip(t.parameter.to_le_bytes()).for_each(|(d, b)| *d = b),
        }
    }
    data
}
