//! Intel's HDA controller (High Definition Audio Specification 1.0a, chapters 3 and 4): ICH6's and ICH9's, with four input and
//! four output streams. What is played goes nowhere, and what is recorded is silence; both take the time that they take.

use serde::{Deserialize, Serialize};

use super::codec::{Codec, Kind};
use crate::config::DeviceSpec;
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError};
use crate::pci::{Bar, PciFunction, PciId, PciSaved};
use crate::registry::Build;

const SIZE: u32 = 0x4000;
const STREAMS: usize = 8;
/// Streams that come in; the others go out.
const INPUTS: usize = 4;
/// Codec addresses.
const CODECS: usize = 15;
/// Where the streams' registers begin, and how many bytes each has.
const STREAM_AT: u64 = 0x80;
const STREAM_LEN: u64 = 0x20;

// GCTL, CORBCTL, RIRBCTL, RIRBSTS
const OUT_OF_RESET: u32 = 1;
const RUN: u8 = 2;
const RESPONSE_INTERRUPT: u8 = 1;
// Stream control and status
const STREAM_RESET: u32 = 1;
const STREAM_RUN: u32 = 2;
const ON_COMPLETION: u32 = 4;
const COMPLETED: u8 = 4;
const READY: u8 = 0x20;
/// Entries of the rings of commands and responses.
const RING: u16 = 256;
/// How often streams move on.
const TICK_NS: u64 = 1_000_000;
const TICK: u8 = 0;
/// Buffer descriptors that one stream finishes in one tick at most.
const MAX_ENTRIES: usize = 64;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Stream {
    control: u32,
    status: u8,
    position: u32,
    len: u32,
    last: u16,
    format: u16,
    list: u64,
    /// The buffer descriptor in work, and how far.
    entry: u16,
    within: u32,
    /// Nanoseconds of virtual time that are not moved as bytes yet, times bytes a second.
    rest: u64,
}

impl Stream {
    /// Bytes a second (3.7.1).
    fn rate(&self) -> u64 {
        let f = u64::from(self.format);
        let base = if f & 0x4000 != 0 { 44_100 } else { 48_000 };
        let rate = base * ((f >> 11 & 7) + 1) / ((f >> 8 & 7) + 1);
        let bytes = [1, 2, 4, 4, 4, 4, 4, 4][(f >> 4 & 7) as usize];
        rate * bytes * ((f & 15) + 1)
    }

    fn runs(&self) -> bool {
        self.control & (STREAM_RUN | STREAM_RESET) == STREAM_RUN
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    control: u32,
    wake_enable: u16,
    wake: u16,
    interrupts: u32,
    corb: u64,
    corb_write: u16,
    corb_read: u16,
    corb_control: u8,
    rirb: u64,
    rirb_write: u16,
    rirb_count: u16,
    rirb_control: u8,
    rirb_status: u8,
    /// Responses since the last interrupt.
    responses: u16,
    immediate: u32,
    immediate_response: u32,
    immediate_status: u16,
    positions: u64,
    synchronized: u32,
    streams: [Stream; STREAMS],
    /// When the streams moved on last.
    moved: u64,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
    codecs: Vec<Option<Codec>>,
}

/// The controller.
pub struct Hda {
    name: String,
    pci: PciFunction,
    codecs: Vec<Option<Codec>>,
    s: State,
}

fn codec_kind(driver: &str) -> Option<Kind> {
    Some(match driver {
        "hda-output" => Kind::Output,
        "hda-duplex" => Kind::Duplex,
        "hda-micro" => Kind::Micro,
        _ => return None,
    })
}

/// The controller that a codec is on: the one it names, or the first.
pub(crate) fn controller<'a>(
    config: &'a crate::config::PcConfig,
    spec: &DeviceSpec,
) -> Option<&'a DeviceSpec> {
    let named = spec.properties.get("bus");
    config.devices.iter().filter(|d| matches!(d.driver.as_str(), "intel-hda" | "ich9-intel-hda")).find(|d| {
        named.is_none_or(|bus| match &d.id {
            Some(id) => bus.strip_suffix(".0") == Some(id),
            None => bus == "hda.0",
        })
    })
}

fn set_low(word: &mut u64, value: u32, mask: u32) {
    *word = *word & !0xFFFF_FFFF | u64::from(value & mask);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & 0xFFFF_FFFF | u64::from(value) << 32;
}

impl Hda {
    /// ICH6's (`ich9` false) or ICH9's controller, with the codecs on its bus.
    pub fn new(b: &Build, ich9: bool) -> Result<Hda, DeviceError> {
        let id = PciId {
            vendor: 0x8086,
            device: if ich9 { 0x293E } else { 0x2668 },
            revision: if ich9 { 3 } else { 1 },
            class: 0x04_0300,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let mut pci = PciFunction::new(b.devfn, id);
        pci.pin(1);
        // The link is HDA, not AC'97.
        pci.set8(0x40, 1);
        pci.bar(0, Bar::Memory(SIZE));
        pci.seal();
        let mut codecs: Vec<Option<Codec>> = vec![None; CODECS];
        for spec in &b.config.devices {
            let Some(kind) = codec_kind(&spec.driver) else { continue };
            if !controller(b.config, spec).is_some_and(|c| std::ptr::eq(c, b.spec)) {
                continue;
            }
            let address = match spec.properties.get("cad") {
                Some(text) => crate::registry::parse_number(text).map(|n| n as usize),
                None => codecs.iter().position(Option::is_none),
            };
            let slot = address.and_then(|n| codecs.get_mut(n)).filter(|c| c.is_none());
            let full =
                || DeviceError::Config(format!("codec address of {} is taken, or is none", spec.driver));
            *slot.ok_or_else(full)? = Some(Codec::new(kind));
        }
        Ok(Hda { name: b.pci_name(), pci, codecs, s: State::default() })
    }

    fn reset_registers(&mut self, ctx: &mut Ctx) {
        self.codecs.iter_mut().flatten().for_each(Codec::reset);
        self.s = State::default();
        ctx.set_timer(TICK, None);
        self.drive(ctx);
    }

    /// Out of reset the codecs tell that they are there (4.3).
    fn leave_reset(&mut self) {
        self.s.control = OUT_OF_RESET;
        let there = self.codecs.iter().enumerate().filter(|(_, c)| c.is_some());
        self.s.wake = there.fold(0, |bits, (n, _)| bits | 1 << n);
    }

    fn status(&self) -> u32 {
        let s = &self.s;
        let streams = s.streams.iter().enumerate();
        let mut bits = streams.fold(0, |bits, (n, stream)| {
            bits | u32::from(stream.status & COMPLETED != 0 && stream.control & ON_COMPLETION != 0) << n
        });
        let responded = s.rirb_status & 1 != 0 && s.rirb_control & RESPONSE_INTERRUPT != 0;
        if responded || s.wake & s.wake_enable != 0 {
            bits |= 1 << 30;
        }
        match bits & s.interrupts & !(1 << 31) {
            0 => bits,
            _ => bits | 1 << 31,
        }
    }

    fn drive(&mut self, ctx: &mut Ctx) {
        let level = self.status() & 1 << 31 != 0 && self.s.interrupts & 1 << 31 != 0;
        self.pci.set_intx(ctx, level);
    }

    fn command(&mut self, word: u32) -> Option<u32> {
        let codec = self.codecs.get_mut((word >> 28) as usize)?.as_mut()?;
        // Indirect node numbers (bit 27) there are none.
        Some(codec.command((word >> 20 & 0x7F) as u8, word & 0xF_FFFF))
    }

    /// Commands from the ring, responses into the other (4.4).
    fn run_ring(&mut self, ctx: &mut Ctx) {
        for _ in 0..RING {
            let s = &self.s;
            let runs =
                s.control & OUT_OF_RESET != 0 && s.corb_control & RUN != 0 && s.rirb_control & RUN != 0;
            let limit = if s.rirb_count == 0 { RING } else { s.rirb_count };
            // The interrupt that was asked for has to be seen first.
            if !runs || s.corb_read == s.corb_write || s.responses >= limit || !self.pci.master() {
                break;
            }
            self.s.corb_read = (self.s.corb_read + 1) % RING;
            let mut raw = [0; 4];
            ctx.dma_read(self.s.corb + 4 * u64::from(self.s.corb_read), &mut raw);
            let word = u32::from_le_bytes(raw);
            let Some(response) = self.command(word) else { continue };
            self.s.rirb_write = (self.s.rirb_write + 1) % RING;
            let mut out = [0; 8];
            out[..4].copy_from_slice(&response.to_le_bytes());
            out[4..].copy_from_slice(&(word >> 28).to_le_bytes());
            ctx.dma_write(self.s.rirb + 8 * u64::from(self.s.rirb_write), &out);
            self.s.responses += 1;
            if self.s.responses >= limit || self.s.corb_read == self.s.corb_write {
                self.s.rirb_status |= 1;
            }
        }
        self.drive(ctx);
    }

    /// The streams move on to virtual time now.
    fn advance(&mut self, ctx: &mut Ctx) {
        let passed = ctx.now.saturating_sub(self.s.moved);
        self.s.moved = ctx.now;
        for n in 0..STREAMS {
            if self.s.streams[n].runs() && self.pci.master() {
                self.move_stream(ctx, n, passed);
            }
        }
    }

    fn move_stream(&mut self, ctx: &mut Ctx, n: usize, passed: u64) {
        let s = &mut self.s.streams[n];
        // After a long sleep it has not played for ever: a second at most.
        s.rest += passed.min(1_000_000_000) * s.rate();
        // Whole frames of samples only.
        let frame = 4;
        let mut left = s.rest / 1_000_000_000 / frame * frame;
        s.rest -= left * 1_000_000_000;
        for _ in 0..MAX_ENTRIES {
            if left == 0 || s.len == 0 {
                break;
            }
            let mut raw = [0; 16];
            if !ctx.dma_read(s.list.wrapping_add(16 * u64::from(s.entry)), &mut raw) {
                break;
            }
            let word = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
            let (address, len) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8));
            let here = left.min(u64::from(len.saturating_sub(s.within)));
            if n < INPUTS {
                silence(ctx, address.wrapping_add(s.within.into()), here);
            }
            s.within += here as u32;
            s.position = ((u64::from(s.position) + here) % u64::from(s.len)) as u32;
            left -= here;
            if s.within >= len {
                if word(12) & 1 != 0 {
                    s.status |= COMPLETED;
                }
                s.within = 0;
                s.entry = if s.entry >= s.last { 0 } else { s.entry + 1 };
            }
        }
        if self.s.positions & 1 != 0 {
            let at = (self.s.positions & !0x7F) + 8 * n as u64;
            ctx.dma_write(at, &self.s.streams[n].position.to_le_bytes());
        }
    }

    fn read_byte(&self, now: u64, offset: u64) -> u8 {
        let s = &self.s;
        let of = |value: u64, base: u64| (value >> (8 * (offset - base))) as u8;
        match offset {
            // Four streams out, four in, 64-bit addresses; version 1.0; the link's payload.
            0x00..0x04 => of(0x0100_4401, 0),
            0x04..0x08 => of(0x001D_003C, 4),
            0x08..0x0C => of(s.control.into(), 8),
            0x0C..0x0E => of(s.wake_enable.into(), 0x0C),
            0x0E..0x10 => of(s.wake.into(), 0x0E),
            0x20..0x24 => of(s.interrupts.into(), 0x20),
            0x24..0x28 => of(self.status().into(), 0x24),
            // 24 MHz.
            0x30..0x34 => of((u128::from(now) * 24 / 1000) as u64, 0x30),
            0x38..0x3C => of(s.synchronized.into(), 0x38),
            0x40..0x48 => of(s.corb, 0x40),
            0x48..0x4A => of(s.corb_write.into(), 0x48),
            0x4A..0x4C => of(s.corb_read.into(), 0x4A),
            0x4C => s.corb_control,
            0x4E | 0x5E => 0x42,
            0x50..0x58 => of(s.rirb, 0x50),
            0x58..0x5A => of(s.rirb_write.into(), 0x58),
            0x5A..0x5C => of(s.rirb_count.into(), 0x5A),
            0x5C => s.rirb_control,
            0x5D => s.rirb_status,
            0x60..0x64 => of(s.immediate.into(), 0x60),
            0x64..0x68 => of(s.immediate_response.into(), 0x64),
            0x68..0x6A => of(s.immediate_status.into(), 0x68),
            0x70..0x78 => of(s.positions, 0x70),
            STREAM_AT..0x180 => {
                let stream = &s.streams[((offset - STREAM_AT) / STREAM_LEN) as usize];
                let at = (offset - STREAM_AT) % STREAM_LEN;
                let of = |value: u64, base: u64| (value >> (8 * (at - base))) as u8;
                match at {
                    0..3 => of(stream.control.into(), 0),
                    3 => stream.status | if stream.runs() { READY } else { 0 },
                    4..8 => of(stream.position.into(), 4),
                    8..0x0C => of(stream.len.into(), 8),
                    0x0C..0x0E => of(stream.last.into(), 0x0C),
                    0x11 => 1,
                    0x12..0x14 => of(stream.format.into(), 0x12),
                    0x18..0x20 => of(stream.list, 0x18),
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    fn read(&self, now: u64, offset: u64, size: u8) -> u64 {
        (0..u64::from(size)).fold(0, |out, i| out | u64::from(self.read_byte(now, offset + i)) << (8 * i))
    }

    /// A register's new value where `size` bytes at `offset` were written: what it was, with them in place.
    fn merged(&self, now: u64, register: u64, len: u8, offset: u64, size: u8, value: u64) -> u32 {
        let mask = (1u64 << (8 * u64::from(size))) - 1;
        let shift = 8 * (offset - register);
        let old = self.read(now, register, len);
        (old & !(mask << shift) | (value & mask) << shift) as u32
    }

    fn write(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u64) {
        if self.s.control & OUT_OF_RESET == 0 && !(0x08..0x0C).contains(&offset) {
            return;
        }
        let now = ctx.now;
        let word = |hda: &Hda, register, len| hda.merged(now, register, len, offset, size, value);
        // Bits that are cleared by writing ones: those of the bytes that were written.
        let ones = |register: u64| {
            ((value & ((1u64 << (8 * u64::from(size))) - 1)) << (8 * (offset - register))) as u32
        };
        match offset {
            0x08..0x0C => match word(self, 0x08, 4) & OUT_OF_RESET {
                0 => self.reset_registers(ctx),
                _ if self.s.control & OUT_OF_RESET == 0 => self.leave_reset(),
                _ => {}
            },
            0x0C => self.s.wake_enable = word(self, 0x0C, 2) as u16 & 0x7FFF,
            0x0E..0x10 => self.s.wake &= !(ones(0x0E) as u16),
            0x20..0x24 => self.s.interrupts = word(self, 0x20, 4),
            0x38..0x3C => self.s.synchronized = word(self, 0x38, 4) & 0xFF,
            0x40 => set_low(&mut self.s.corb, value as u32, !0x7F),
            0x44 => set_high(&mut self.s.corb, value as u32),
            0x48..0x4A => self.s.corb_write = word(self, 0x48, 2) as u16 % RING,
            0x4A..0x4C => {
                // The reset is seen to be done, and to be over.
                let reset = word(self, 0x4A, 2) as u16 & 0x8000;
                self.s.corb_read = reset;
            }
            0x4C => self.s.corb_control = value as u8 & 3,
            0x50 => set_low(&mut self.s.rirb, value as u32, !0x7F),
            0x54 => set_high(&mut self.s.rirb, value as u32),
            0x58..0x5A if value & 0x8000 != 0 || offset == 0x59 && value & 0x80 != 0 => self.s.rirb_write = 0,
            0x5A..0x5C => self.s.rirb_count = word(self, 0x5A, 2) as u16 & 0xFF,
            0x5C => self.s.rirb_control = value as u8 & 7,
            0x5D => {
                self.s.rirb_status &= !(value as u8);
                if value & 1 != 0 {
                    self.s.responses = 0;
                }
            }
            0x60..0x64 => self.s.immediate = word(self, 0x60, 4),
            0x68..0x6A => {
                let new = word(self, 0x68, 2) as u16;
                self.s.immediate_status &= !(new & 2);
                if new & 1 != 0 {
                    self.s.immediate_response = self.command(self.s.immediate).unwrap_or(0);
                    self.s.immediate_status = 2;
                }
            }
            0x70 => set_low(&mut self.s.positions, value as u32, !0x7E),
            0x74 => set_high(&mut self.s.positions, value as u32),
            STREAM_AT..0x180 => self.write_stream(ctx, offset, size, value),
            _ => {}
        }
        self.run_ring(ctx);
    }

    fn write_stream(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u64) {
        let n = ((offset - STREAM_AT) / STREAM_LEN) as usize;
        let base = STREAM_AT + n as u64 * STREAM_LEN;
        let word = |hda: &Hda, at, len| hda.merged(ctx.now, base + at, len, offset, size, value);
        match offset - base {
            0..3 => {
                let control = word(self, 0, 4) & 0xFF_FFFF;
                if size == 4 {
                    self.s.streams[n].status &= !((value >> 24) as u8 & 0x1C);
                }
                self.advance(ctx);
                let s = &mut self.s.streams[n];
                if control & STREAM_RESET != 0 {
                    *s = Stream { control: STREAM_RESET, ..Stream::default() };
                } else {
                    s.control = control;
                }
                let runs = self.s.streams.iter().any(Stream::runs);
                ctx.set_timer(TICK, runs.then_some(ctx.now + TICK_NS));
            }
            3 => self.s.streams[n].status &= !(value as u8 & 0x1C),
            8..0x0C => self.s.streams[n].len = word(self, 8, 4),
            0x0C..0x0E => self.s.streams[n].last = word(self, 0x0C, 2) as u16 & 0xFF,
            0x12..0x14 => self.s.streams[n].format = word(self, 0x12, 2) as u16,
            0x18 => set_low(&mut self.s.streams[n].list, value as u32, !0x7F),
            0x1C => set_high(&mut self.s.streams[n].list, value as u32),
            _ => {}
        }
    }
}

fn silence(ctx: &Ctx, address: u64, len: u64) {
    const ZERO: [u8; 4096] = [0; 4096];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(4096);
        if !ctx.dma_write(address.wrapping_add(done), &ZERO[..n as usize]) {
            break;
        }
        done += n;
    }
}

impl Device for Hda {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.pci.reset(ctx);
        self.reset_registers(ctx);
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8) -> u64 {
        if (STREAM_AT..0x180).contains(&offset) {
            self.advance(ctx);
        }
        self.read(ctx.now, offset, size)
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, _region: u8, offset: u64, size: u8, value: u64) {
        match size {
            8 => {
                self.write(ctx, offset, 4, value & 0xFFFF_FFFF);
                self.write(ctx, offset + 4, 4, value >> 32);
            }
            // Two registers of 16 bits are often written together.
            4 if matches!(offset, 0x0C | 0x48 | 0x58) || offset & 0x1F == 0x0C && offset >= STREAM_AT => {
                self.write(ctx, offset, 2, value & 0xFFFF);
                self.write(ctx, offset + 2, 2, value >> 16);
            }
            _ => self.write(ctx, offset, size, value),
        }
    }
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {
        if id == TICK {
            self.advance(ctx);
            ctx.set_timer(TICK, Some(ctx.now + TICK_NS));
            self.drive(ctx);
        }
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved { pci: self.pci.save(), s: self.s.clone(), codecs: self.codecs.clone() })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        let kind = |c: &Option<Codec>| c.as_ref().map(Codec::kind);
        let same = s.codecs.iter().map(kind).eq(self.codecs.iter().map(kind));
        if !same || !self.pci.load(s.pci) {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        (self.s, self.codecs) = (s.s, s.codecs);
        Ok(())
    }
}
