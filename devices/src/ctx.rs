//! What a device model sees: the [`Device`] trait it implements and the [`Ctx`] it is called with.

use std::cell::Cell;
use std::collections::BTreeMap;

use ftvm_accel::mem::GuestMemory;
use ftvm_accel::ApicMessage;
use serde::{Deserialize, Serialize};

use crate::chipset::ioapic::IoApic;
use crate::chipset::pic::PicPair;
use crate::door::{DiskOp, GuestEvent, Input, MachineRequest, Output};
use crate::pci::PciFunction;
use crate::random::Random;

/// Errors of device models and their configuration.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("'{0}' is not a valid device model name")]
    UnknownModel(String),
    #[error("Property '{0}.{1}' not found")]
    UnknownProperty(String, String),
    #[error("Property '{model}.{property}' doesn't take value '{value}'")]
    BadValue { model: String, property: String, value: String },
    #[error("{0}")]
    Config(String),
    #[error("Device '{0}' not found")]
    NoDevice(String),
    #[error("saved state: section '{0}' is of version {1}, this program knows up to {2}")]
    NewerSection(String, u32, u32),
    #[error("saved state: section '{0}' belongs to no device of this machine")]
    UnknownSection(String),
    #[error("saved state: section '{0}' is missing")]
    MissingSection(String),
    #[error("saved state: section '{0}' is damaged")]
    BadSection(String, #[source] postcard::Error),
    #[error("saved state: section '{0}' does not fit this machine's configuration")]
    Misfit(String),
    #[error("saved state: not a device state")]
    NotAState(#[source] postcard::Error),
}

/// A range of I/O ports or of memory that a device answers; `region` tells its ranges apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub region: u8,
    pub start: u64,
    pub len: u64,
    /// Wider accesses to I/O ports are split into accesses of this many bytes.
    pub width: u8,
}

impl Window {
    /// A window of `len` ports or bytes from `start` on.
    pub fn new(region: u8, start: u64, len: u64) -> Window {
        Window { region, start, len, width: 4 }
    }

    /// Ports of byte-wide registers.
    pub fn bytes(region: u8, start: u64, len: u64) -> Window {
        Window { region, start, len, width: 1 }
    }
}

/// Where a guest's write only says that there is work, in one of a device's windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    pub region: u8,
    /// The offset in the region.
    pub offset: u64,
    /// The 16-bit value that rings; `None`: any value of any size.
    pub value: Option<u16>,
}

/// A device model. Everything but `name`, `reset`, `save` and `load` is optional.
///
/// A model must be a function of its state and its calls: no host time, no randomness but
/// [`Ctx::random`], no iteration order of hash tables.
#[allow(unused_variables)]
pub trait Device: Send {
    /// Names the device in saved states and divergence reports; unique in the machine.
    fn name(&self) -> &str;
    /// Power-on or system reset.
    fn reset(&mut self, ctx: &mut Ctx);
    /// The whole state as bytes (postcard).
    fn save(&self) -> Vec<u8>;
    /// Restore what [`Self::save`] returned.
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError>;
    /// Version of the saved state.
    fn version(&self) -> u32 {
        1
    }
    /// Fixed or programmable I/O ports, besides PCI BARs (asked again after [`Ctx::remap`]).
    fn ports(&self) -> Vec<Window> {
        Vec::new()
    }
    /// Memory windows besides PCI BARs.
    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }
    /// Its doorbells, which do not change. A write there may reach it later than others that the guest made after it.
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }
    /// A guest wrote where the `n`-th of them is, or was before its window moved.
    fn ring(&mut self, ctx: &mut Ctx, n: usize) {}
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        u32::MAX
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {}
    fn mmio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8, value: u64) {}
    /// A timer set by [`Ctx::set_timer`] is due.
    fn timer(&mut self, ctx: &mut Ctx, id: u8) {}
    /// Something came in that is not the completion of a disk request.
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {}
    /// A disk request of this device ended.
    fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: DiskOp, result: Result<&[u8], i32>) {}
    /// The guest is to be asked to let go of slot `slot` of bus `bus` (only the power management function can).
    fn ask_to_eject(&mut self, ctx: &mut Ctx, bus: u8, slot: u8) {}
    /// Something was put into slot `slot` of bus `bus`; the guest is to be told (as above).
    fn announce(&mut self, ctx: &mut Ctx, bus: u8, slot: u8) {}
    /// The devices behind it may be others now; `tell`: the guest is to hear of it (with the next input).
    fn rescan(&mut self, config: &crate::config::PcConfig, tell: bool) {}
    /// Facts for people and management, by name (`guest-stats`, `actual`).
    fn facts(&self) -> Vec<(String, i64)> {
        Vec::new()
    }
    /// What the device shows, if it is a video card.
    fn screen(&self) -> Option<&dyn crate::display::Screen> {
        None
    }
    /// The PCI function, for devices on the PCI bus.
    fn pci(&self) -> Option<&PciFunction> {
        None
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        None
    }
    /// The guest is about to read `len` bytes of configuration space at `offset`.
    fn config_reading(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {}
    /// The guest wrote `len` bytes of configuration space at `offset` (already stored).
    fn config_written(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {}
}

/// Who drives a line of the interrupt controllers; lines are wired-OR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Isa = 1,
    Sci = 2,
    Hpet = 4,
    /// The first of eight.
    PirqA = 0x100,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PendingDisk {
    pub device: u16,
    pub drive: u32,
    pub op: DiskOp,
}

/// What belongs to the board as a whole: interrupt controllers and routing, timers, doors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BoardState {
    pub pic: PicPair,
    pub ioapic: IoApic,
    /// Bit mask of sources that drive each global system interrupt.
    pub lines: [u16; 24],
    /// PCI functions (bus, device and function number) that assert INTx, with the device and function number and the
    /// pin at the root bus.
    pub intx: BTreeMap<u16, (u8, u8)>,
    /// The ISA bridge's PIRQ route control registers; PIIX3 has four.
    pub pirq_route: [u8; 8],
    /// ICH9's device interrupt route registers, for slots 25 to 31: a nibble for each pin.
    pub device_route: [u16; 7],
    /// HPET's legacy replacement route is on: IRQ 0 and 8 belong to it.
    pub hpet_legacy: bool,
    pub a20: bool,
    pub timers: BTreeMap<(u16, u8), u64>,
    pub next_disk: u64,
    pub pending: BTreeMap<u64, PendingDisk>,
    pub random: Random,
    /// CONFIG_ADDRESS (0xCF8).
    pub config_address: u32,
    pub messages: Vec<ApicMessage>,
    pub outputs: Vec<Output>,
    pub request: Option<MachineRequest>,
}

pub(crate) struct Board {
    pub s: BoardState,
    pub remap: bool,
    /// Buses and slots whose devices are to be removed when the call in hand is over.
    pub ejected: Vec<(u8, u8)>,
    pub deadline: Option<u64>,
    pub changed: Cell<bool>,
    intr: bool,
    /// The interrupts of PCI go by ICH9's rules, not by PIIX3's.
    ich9: bool,
}

/// What ICH9's device interrupt route registers start with: each pin has its own PIRQ.
pub const DEVICE_ROUTE: u16 = 0x3210;

impl Board {
    pub fn new(seed: [u8; 32], ich9: bool) -> Board {
        Board {
            s: BoardState {
                pic: PicPair::default(),
                ioapic: IoApic::default(),
                lines: [0; 24],
                intx: BTreeMap::new(),
                pirq_route: [0x80; 8],
                device_route: [DEVICE_ROUTE; 7],
                hpet_legacy: false,
                a20: true,
                timers: BTreeMap::new(),
                next_disk: 1,
                pending: BTreeMap::new(),
                random: Random::new(seed),
                config_address: 0,
                messages: Vec::new(),
                outputs: Vec::new(),
                request: None,
            },
            remap: true,
            ejected: Vec::new(),
            deadline: None,
            changed: Cell::new(false),
            intr: false,
            ich9,
        }
    }

    /// Notice a moved INTR line.
    pub fn settle(&mut self) {
        let intr = self.s.pic.intr();
        if intr != self.intr {
            self.intr = intr;
            self.changed.set(true);
        }
    }

    pub fn find_deadline(&mut self) {
        let next = self.s.timers.values().min().copied();
        if let Some(t) = next {
            if self.deadline.is_none_or(|old| t < old) {
                self.changed.set(true);
            }
        }
        self.deadline = next;
    }

    pub fn set_line(&mut self, gsi: u8, source: u16, level: bool) {
        let Some(mask) = self.s.lines.get_mut(gsi as usize) else { return };
        let old = *mask;
        *mask = if level { old | source } else { old & !source };
        let new = *mask;
        if (old != 0) == (new != 0) {
            return;
        }
        let high = new != 0;
        if gsi < 16 {
            self.s.pic.set_irq(gsi, high);
        }
        let pin = if gsi == 0 { 2 } else { gsi };
        self.s.ioapic.set_pin(pin, high, &mut self.s.messages);
        self.settle();
    }

    /// The PIRQ that a pin (1..4) of a function on the root bus reaches.
    fn pirq(&self, devfn: u8, pin: u8) -> u8 {
        let (slot, pin) = (devfn >> 3, pin.wrapping_sub(1) & 3);
        if !self.ich9 {
            // PIIX: device 0's pin A reaches PIRQ D, device 1's pin A PIRQ A, and so on round.
            return slot.wrapping_add(pin).wrapping_sub(1) & 3;
        }
        match slot {
            25..=29 | 31 => (self.s.device_route[usize::from(slot - 25)] >> (4 * pin) & 7) as u8,
            // What is behind the DMI bridge, and all other slots: PIRQ E to H.
            30 => pin + 4,
            _ => ((slot + pin) & 3) + 4,
        }
    }

    /// Drive the lines that the PIRQs reach by the routing registers.
    pub fn route_pirqs(&mut self) {
        let mut wanted = [0u16; 24];
        for &(devfn, pin) in self.s.intx.values() {
            let pirq = self.pirq(devfn, pin);
            let bit = (Source::PirqA as u16) << pirq;
            let route = self.s.pirq_route[usize::from(pirq)];
            if route & 0x80 == 0 && route & 15 > 2 {
                wanted[usize::from(route & 15)] |= bit;
            }
            if self.ich9 {
                // Pins 16 to 23 of the I/O APIC are the PIRQs' own.
                wanted[16 + usize::from(pirq)] |= bit;
            }
        }
        for (gsi, want) in wanted.iter().enumerate() {
            for pirq in 0..8 {
                let source = (Source::PirqA as u16) << pirq;
                if (self.s.lines[gsi] ^ want) & source != 0 {
                    self.set_line(gsi as u8, source, want & source != 0);
                }
            }
        }
    }
}

/// What a device is called with.
pub struct Ctx<'a> {
    /// Virtual time in ns.
    pub now: u64,
    /// Guest memory, for DMA.
    pub mem: &'a GuestMemory,
    pub(crate) board: &'a mut Board,
    pub(crate) device: u16,
}

impl Ctx<'_> {
    /// Drive ISA interrupt line `irq` (0..15).
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        self.board.set_line(irq, Source::Isa as u16, level);
    }

    /// Drive a line as a particular source.
    pub fn set_line(&mut self, gsi: u8, source: Source, level: bool) {
        self.board.set_line(gsi, source as u16, level);
    }

    /// Give line `gsi` one rising edge and leave it high.
    pub fn pulse(&mut self, gsi: u8, source: Source) {
        self.board.set_line(gsi, source as u16, false);
        self.board.set_line(gsi, source as u16, true);
    }

    /// Drive the INTx pin of the PCI function that `key` names; `devfn` and `pin` (1..4 as configuration register
    /// 0x3D has it) say where it arrives at the root bus.
    pub(crate) fn set_intx(&mut self, key: u16, devfn: u8, pin: u8, level: bool) {
        if level {
            if self.board.s.intx.insert(key, (devfn, pin)).is_none() {
                self.board.route_pirqs();
            }
        } else if self.board.s.intx.remove(&key).is_some() {
            self.board.route_pirqs();
        }
    }

    /// Send a message-signalled interrupt.
    pub fn msi(&mut self, address: u64, data: u32) {
        self.board.s.messages.push(ApicMessage { address, data });
    }

    /// Set (or with `None` stop) this device's timer `id` to fire at a virtual time.
    pub fn set_timer(&mut self, id: u8, at: Option<u64>) {
        let key = (self.device, id);
        match at {
            Some(t) => self.board.s.timers.insert(key, t),
            None => self.board.s.timers.remove(&key),
        };
        self.board.find_deadline();
    }

    /// The I/O ports or memory windows of this device changed.
    pub fn remap(&mut self) {
        self.board.remap = true;
    }

    /// Remove what is in slot `slot` of bus `bus`, when the call in hand is over.
    pub(crate) fn eject(&mut self, bus: u8, slot: u8) {
        self.board.ejected.push((bus, slot));
    }

    /// Issue a disk request; [`Device::disk_done`] is called when it ends.
    pub fn disk(&mut self, drive: u32, op: DiskOp) -> u64 {
        let id = self.board.s.next_disk;
        self.board.s.next_disk += 1;
        self.board.s.pending.insert(id, PendingDisk { device: self.device, drive, op: op.clone() });
        self.board.s.outputs.push(Output::Disk { id, drive, op });
        id
    }

    /// Send an Ethernet frame.
    pub fn net_tx(&mut self, nic: u32, frame: Vec<u8>) {
        self.board.s.outputs.push(Output::NetTx { nic, frame });
    }

    /// Send a byte out of a character device.
    pub fn char_out(&mut self, port: u32, byte: u8) {
        if let Some(Output::CharOut { port: p, bytes }) = self.board.s.outputs.last_mut() {
            if *p == port {
                bytes.push(byte);
                return;
            }
        }
        self.board.s.outputs.push(Output::CharOut { port, bytes: vec![byte] });
    }

    /// Send bytes out of a character device.
    pub fn chars_out(&mut self, port: u32, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.char_out(port, *b));
    }

    /// Tell management something.
    pub fn event(&mut self, event: GuestEvent) {
        self.board.s.outputs.push(Output::Event(event));
    }

    /// Ask something of the machine as a whole; the first request stands until it is taken.
    pub fn request(&mut self, request: MachineRequest) {
        self.board.s.request.get_or_insert(request);
    }

    /// 64 random bits from the machine's generator.
    pub fn random(&mut self) -> u64 {
        self.board.s.random.next()
    }

    /// Read RAM; bytes outside RAM read as ones.
    pub fn dma_read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        let ok = gpa.checked_add(buf.len() as u64).is_some() && self.mem.read(gpa, buf).is_ok();
        if !ok {
            buf.fill(0xFF);
        }
        ok
    }

    /// Write RAM; writes outside RAM are lost.
    pub fn dma_write(&self, gpa: u64, buf: &[u8]) -> bool {
        gpa.checked_add(buf.len() as u64).is_some() && self.mem.write(gpa, buf).is_ok()
    }
}

/// Encode a saved state. The state types hold only plain data, so this cannot fail.
pub(crate) fn pack<T: Serialize>(state: &T) -> Vec<u8> {
    postcard::to_stdvec(state).unwrap_or_default()
}

/// Decode a saved state of section `name`.
pub(crate) fn unpack<T: for<'de> Deserialize<'de>>(name: &str, data: &[u8]) -> Result<T, DeviceError> {
    match postcard::take_from_bytes(data) {
        Ok((state, [])) => Ok(state),
        Ok(_) => Err(DeviceError::Misfit(name.to_string())),
        Err(e) => Err(DeviceError::BadSection(name.to_string(), e)),
    }
}
