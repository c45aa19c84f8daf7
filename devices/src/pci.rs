//! PCI functions: configuration space, base address registers, MSI and MSI-X (PCI 3.0, chapter 6), bridges
//! (PCI-to-PCI Bridge 1.2) and the PCI Express capability (PCI Express 3.0, 7.8).

use serde::{Deserialize, Serialize};

use crate::ctx::{Ctx, Window};

/// Offsets in configuration space.
pub const COMMAND: usize = 0x04;
pub const STATUS: usize = 0x06;
pub const INTERRUPT_LINE: usize = 0x3C;
pub const INTERRUPT_PIN: usize = 0x3D;
/// Command register: decode I/O, decode memory, bus master, INTx disable.
pub const COMMAND_IO: u16 = 1;
pub const COMMAND_MEMORY: u16 = 2;
pub const COMMAND_MASTER: u16 = 4;
pub const COMMAND_NO_INTX: u16 = 0x400;

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    None,
    Io(u32),
    Memory(u32),
    /// 64-bit, prefetchable; takes the next register too.
    Memory64(u64),
}

/// What tells a PCI function apart.
#[derive(Clone, Copy, Debug)]
pub struct PciId {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, sub-class, programming interface as one 24-bit number.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct PciState {
    config: Vec<u8>,
    intx: bool,
    msix: Option<MsixState>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct MsixState {
    table: Vec<[u32; 4]>,
    pending: Vec<u64>,
}

/// One PCI function's configuration space and interrupts.
pub struct PciFunction {
    /// Device number in bits 3..7, function in bits 0..2.
    pub devfn: u8,
    id: PciId,
    config: Vec<u8>,
    initial: Vec<u8>,
    writable: Vec<u8>,
    bars: [Bar; 6],
    intx: bool,
    next_cap: u8,
    last_cap: u8,
    msix: Option<MsixState>,
    msix_cap: usize,
    msix_bar: u8,
    /// Where the MSI capability lies; 0: there is none.
    msi_cap: usize,
    /// Where a root port's Express capability lies; 0: there is none.
    express_cap: usize,
    place: Place,
}

/// Where a function is: which of the machine's buses, and the bridges between that and the root bus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The bus by the machine's count (0: the root bus), which no guest can change.
    pub bus: u8,
    /// Device and function numbers of the bridges above, the nearest first.
    pub bridges: Vec<u8>,
}

impl Place {
    /// The device and function number on the root bus and the pin there that `pin` of `devfn` reaches: each
    /// bridge turns the pins by the slot below it (PCI-to-PCI Bridge 1.2, 9.1).
    fn at_root(&self, devfn: u8, pin: u8) -> (u8, u8) {
        self.bridges.iter().fold((devfn, pin), |(below, pin), bridge| {
            (*bridge, (pin.wrapping_sub(1).wrapping_add(below >> 3) & 3) + 1)
        })
    }
}

/// What an Express function is to the fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Express {
    Endpoint,
    /// A root port with a hot-plug slot of this number, and its own port number.
    RootPort {
        slot: u16,
        port: u8,
    },
}

impl PciFunction {
    /// A function at `devfn` with a type 0 header.
    pub fn new(devfn: u8, id: PciId) -> PciFunction {
        let mut f = PciFunction {
            devfn,
            id,
            config: vec![0; 256],
            initial: Vec::new(),
            writable: vec![0; 256],
            bars: [Bar::None; 6],
            intx: false,
            next_cap: 0x40,
            last_cap: 0x34,
            msix: None,
            msix_cap: 0,
            msix_bar: 0xFF,
            msi_cap: 0,
            express_cap: 0,
            place: Place::default(),
        };
        f.set16(0, id.vendor);
        f.set16(2, id.device);
        f.config[8] = id.revision;
        f.config[9..12].copy_from_slice(&id.class.to_le_bytes()[..3]);
        f.set16(0x2C, id.subsystem_vendor);
        f.set16(0x2E, id.subsystem);
        f.allow(COMMAND, &[0x47, 0x05]);
        f.allow(0x0C, &[0xFF, 0]);
        f.allow(INTERRUPT_LINE, &[0xFF]);
        f
    }

    /// A bridge at `devfn`, with a type 1 header.
    pub fn bridge(devfn: u8, id: PciId) -> PciFunction {
        let mut f = PciFunction::new(devfn, id);
        f.set8(0x0E, 1);
        f.set32(0x2C, 0);
        // I/O of 32 bits, prefetchable memory of 64.
        f.set16(0x1C, 0x0101);
        f.set32(0x24, 0x0001_0001);
        f.allow(COMMAND, &[0x47, 0x05]);
        f.allow(0x18, &[0xFF, 0xFF, 0xFF, 0xFF, 0xF0, 0xF0]);
        f.allow(0x20, &[0xF0, 0xFF, 0xF0, 0xFF, 0xF0, 0xFF, 0xF0, 0xFF]);
        f.allow(0x28, &[0xFF; 12]);
        f.allow(0x3E, &[0x7F, 0]);
        f
    }

    /// Whether there is a bus behind this function.
    pub fn is_bridge(&self) -> bool {
        self.config[0x0E] & 0x7F == 1
    }

    /// The bus numbers behind a bridge; none before the guest has dealt them out.
    pub fn bus_numbers(&self) -> Option<std::ops::RangeInclusive<u8>> {
        (self.is_bridge() && self.config[0x19] != 0).then(|| self.config[0x19]..=self.config[0x1A])
    }

    /// Whether a bridge passes accesses to this range of I/O ports on to the bus behind it.
    pub fn forwards_io(&self, start: u64, len: u64) -> bool {
        let base = u64::from(self.config[0x1C] & 0xF0) << 8 | u64::from(self.get16(0x30)) << 16;
        let limit = u64::from(self.config[0x1D] & 0xF0) << 8 | 0xFFF | u64::from(self.get16(0x32)) << 16;
        self.command() & COMMAND_IO != 0 && start >= base && start + len.max(1) - 1 <= limit
    }

    /// Whether a bridge passes accesses to this range of memory on to the bus behind it.
    pub fn forwards_memory(&self, start: u64, len: u64) -> bool {
        let Some(last) = start.checked_add(len.max(1) - 1) else { return false };
        let range = |at: usize, upper: [u32; 2]| {
            let base = u64::from(self.get16(at) & 0xFFF0) << 16 | u64::from(upper[0]) << 32;
            let limit = u64::from(self.get16(at + 2) & 0xFFF0) << 16 | 0xF_FFFF | u64::from(upper[1]) << 32;
            start >= base && last <= limit
        };
        let upper = [self.get32(0x28), self.get32(0x2C)];
        self.command() & COMMAND_MEMORY != 0 && (range(0x20, [0, 0]) || range(0x24, upper))
    }

    /// Say where the function is.
    pub fn put(&mut self, place: Place) {
        self.place = place;
    }

    /// Where the function is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The PCI Express capability, version 2.
    pub fn add_express(&mut self, what: Express) {
        let mut body = [0u8; 58];
        let mut put = |at: usize, bytes: &[u8]| body[at - 2..at - 2 + bytes.len()].copy_from_slice(bytes);
        let kind: u16 = match what {
            Express::Endpoint => 0,
            // A port with a slot.
            Express::RootPort { .. } => 4 << 4 | 1 << 8,
        };
        put(2, &(2 | kind).to_le_bytes());
        // Device: role-based error reporting.
        put(4, &0x8000u32.to_le_bytes());
        // Link: one lane at 2.5 GT/s, and what it came to.
        let port = match what {
            Express::Endpoint => 0,
            Express::RootPort { port, .. } => u32::from(port),
        };
        put(0x0C, &(port << 24 | 1 << 20 | 0x11).to_le_bytes());
        put(0x12, &0x11u16.to_le_bytes());
        if let Express::RootPort { slot, .. } = what {
            // Slot: hot-plug capable, surprise removal not.
            put(0x14, &(u32::from(slot) << 19 | 0x40).to_le_bytes());
        }
        let at = self.capability(0x10, &body);
        self.allow(at + 8, &[0x1F, 0]);
        self.allow(at + 0x10, &[0xC3, 0]);
        if matches!(what, Express::RootPort { .. }) {
            self.allow(at + 0x18, &[0xFF, 0x17]);
            self.allow(at + 0x1C, &[0x1F, 0]);
            self.express_cap = at;
        }
    }

    /// Say whether there is something in a root port's slot: presence detected, link up (7.8.8, 7.8.11).
    pub fn set_present(&mut self, present: bool) {
        let at = self.express_cap;
        if at == 0 {
            return;
        }
        let bits = |word: u16, bit: u16| if present { word | bit } else { word & !bit };
        let (link, slot) = (bits(self.get16(at + 0x12), 0x2000), bits(self.get16(at + 0x1A), 0x40));
        self.set16(at + 0x12, link);
        self.set16(at + 0x1A, slot);
        // So it stays over a reset.
        for at in [at + 0x12, at + 0x1A] {
            if self.initial.len() >= at + 2 {
                self.initial[at..at + 2].copy_from_slice(&self.config[at..at + 2]);
            }
        }
    }

    /// MSI with one vector and a 64-bit address (PCI 3.0, 6.8.1), at `at` of configuration space.
    pub fn add_msi(&mut self, at: u8) {
        let mut body = [0u8; 12];
        body[0] = 0x80;
        let at = self.capability_at(at, 5, &body);
        self.allow(at + 2, &[0x71, 0]);
        self.allow(at + 4, &[0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]);
        self.msi_cap = at;
    }

    /// Whether the guest turned MSI on.
    pub fn msi_enabled(&self) -> bool {
        self.msi_cap != 0 && self.config[self.msi_cap + 2] & 1 != 0
    }

    /// Send the function's message.
    pub fn msi_notify(&mut self, ctx: &mut Ctx) {
        if self.msi_enabled() && self.master() {
            let at = self.msi_cap;
            let address = u64::from(self.get32(at + 4)) | u64::from(self.get32(at + 8)) << 32;
            ctx.msi(address, u32::from(self.get16(at + 12)));
        }
    }

    /// Configuration bytes that a reset restores; call when the layout is complete.
    pub fn seal(&mut self) {
        self.initial = self.config.clone();
    }

    /// Make bits of configuration space writable.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    pub fn set8(&mut self, offset: usize, value: u8) {
        self.config[offset] = value;
    }
    pub fn set16(&mut self, offset: usize, value: u16) {
        self.config[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }
    pub fn set32(&mut self, offset: usize, value: u32) {
        self.config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    pub fn get8(&self, offset: usize) -> u8 {
        self.config[offset]
    }
    pub fn get16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.config[offset], self.config[offset + 1]])
    }
    pub fn get32(&self, offset: usize) -> u32 {
        u32::from(self.get16(offset)) | u32::from(self.get16(offset + 2)) << 16
    }
    /// The command register.
    pub fn command(&self) -> u16 {
        self.get16(COMMAND)
    }
    /// Whether the function may do DMA.
    pub fn master(&self) -> bool {
        self.command() & COMMAND_MASTER != 0
    }

    /// Define base address register `n`.
    pub fn bar(&mut self, n: usize, bar: Bar) {
        self.bars[n] = bar;
        let at = 0x10 + 4 * n;
        match bar {
            Bar::None => {}
            Bar::Io(size) => {
                self.set32(at, 1);
                self.allow(at, &(!(size.max(4) - 1) & !3).to_le_bytes());
            }
            Bar::Memory(size) => {
                self.set32(at, 0);
                self.allow(at, &(!(size.max(16) - 1) & !15).to_le_bytes());
            }
            Bar::Memory64(size) => {
                self.set32(at, 0xC);
                self.allow(at, &(!(size.max(16) - 1) & !15).to_le_bytes());
            }
        }
    }

    /// The interrupt pin: 1 = INTA.
    pub fn pin(&mut self, pin: u8) {
        self.set8(INTERRUPT_PIN, pin);
    }

    /// As [`Self::capability`], at `at` of configuration space.
    pub fn capability_at(&mut self, at: u8, id: u8, body: &[u8]) -> usize {
        self.next_cap = at;
        self.capability(id, body)
    }

    /// Append a capability of `body.len() + 2` bytes; returns its offset.
    pub fn capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_cap as usize;
        self.set8(at, id);
        self.set8(at + 1, 0);
        self.config[at + 2..at + 2 + body.len()].copy_from_slice(body);
        let last = self.last_cap as usize;
        self.set8(if last == 0x34 { 0x34 } else { last + 1 }, at as u8);
        self.last_cap = at as u8;
        self.next_cap = ((at + 2 + body.len() + 3) & !3) as u8;
        let status = self.get16(STATUS) | 0x10;
        self.set16(STATUS, status);
        at
    }

    /// MSI-X with `vectors` entries in BAR `bar`: table at 0, pending bits at 2048 (PCI 3.0, 6.8.2).
    pub fn add_msix(&mut self, bar: u8, vectors: u16) {
        let mut body = [0u8; 10];
        body[0..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(bar).to_le_bytes());
        body[6..10].copy_from_slice(&(u32::from(bar) | 0x800).to_le_bytes());
        let at = self.capability(0x11, &body);
        self.allow(at + 2, &[0, 0xC0]);
        self.msix_cap = at;
        self.msix_bar = bar;
        self.msix = Some(MsixState {
            table: vec![[0, 0, 0, 1]; vectors as usize],
            pending: vec![0; (vectors as usize).div_ceil(64)],
        });
    }

    /// The BAR that holds the MSI-X table (0xFF: none).
    pub fn msix_bar(&self) -> u8 {
        self.msix_bar
    }

    /// Whether there is an MSI-X vector of this number.
    pub fn has_vector(&self, vector: u16) -> bool {
        self.msix.as_ref().is_some_and(|m| usize::from(vector) < m.table.len())
    }

    /// Whether the guest turned MSI-X on.
    pub fn msix_enabled(&self) -> bool {
        self.msix.is_some() && self.config[self.msix_cap + 3] & 0x80 != 0
    }

    /// Read the MSI-X BAR.
    pub fn msix_read(&self, offset: u64, size: u8) -> u64 {
        let Some(m) = &self.msix else { return 0 };
        let word = |at: u64| -> u32 {
            if at >= 0x800 {
                let i = ((at - 0x800) / 4) as usize;
                m.pending.get(i / 2).map_or(0, |p| (p >> (32 * (i & 1))) as u32)
            } else {
                m.table.get((at / 16) as usize).map_or(0, |e| e[(at / 4 % 4) as usize])
            }
        };
        let low = word(offset & !3) >> (8 * (offset & 3));
        match size {
            8 => u64::from(low) | u64::from(word((offset & !3) + 4)) << 32,
            _ => u64::from(low),
        }
    }

    /// Write the MSI-X BAR.
    pub fn msix_write(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u64) {
        let Some(m) = &mut self.msix else { return };
        if offset & 3 != 0 || size < 4 {
            return;
        }
        for i in 0..u64::from(size / 4) {
            let at = offset + 4 * i;
            if at < 0x800 {
                if let Some(e) = m.table.get_mut((at / 16) as usize) {
                    e[(at / 4 % 4) as usize] = (value >> (32 * i)) as u32;
                }
            }
        }
        self.msix_flush(ctx);
    }

    /// Send what became unmasked.
    fn msix_flush(&mut self, ctx: &mut Ctx) {
        if !self.msix_enabled() || self.config[self.msix_cap + 3] & 0x40 != 0 {
            return;
        }
        let Some(m) = &mut self.msix else { return };
        for (i, e) in m.table.iter().enumerate() {
            let bit = 1u64 << (i % 64);
            if m.pending[i / 64] & bit != 0 && e[3] & 1 == 0 {
                m.pending[i / 64] &= !bit;
                ctx.msi(u64::from(e[0]) | u64::from(e[1]) << 32, e[2]);
            }
        }
    }

    /// Signal MSI-X vector `vector`.
    pub fn msix_notify(&mut self, ctx: &mut Ctx, vector: u16) {
        let masked = self.config[self.msix_cap + 3] & 0x40 != 0;
        if !self.msix_enabled() || !self.master() {
            return;
        }
        let Some(m) = &mut self.msix else { return };
        let Some(e) = m.table.get(vector as usize) else { return };
        if masked || e[3] & 1 != 0 {
            m.pending[vector as usize / 64] |= 1 << (vector % 64);
        } else {
            ctx.msi(u64::from(e[0]) | u64::from(e[1]) << 32, e[2]);
        }
    }

    /// Drive the INTx pin; the command register's disable bit and MSI-X gate it.
    pub fn set_intx(&mut self, ctx: &mut Ctx, level: bool) {
        self.intx = level;
        let status = self.get16(STATUS) & !8 | u16::from(level) << 3;
        self.set16(STATUS, status);
        self.drive_intx(ctx);
    }

    fn drive_intx(&mut self, ctx: &mut Ctx) {
        let on =
            self.intx && self.command() & COMMAND_NO_INTX == 0 && !self.msix_enabled() && !self.msi_enabled();
        let pin = self.get8(INTERRUPT_PIN);
        if pin != 0 {
            let key = u16::from(self.place.bus) << 8 | u16::from(self.devfn);
            let (devfn, pin) = self.place.at_root(self.devfn, pin);
            ctx.set_intx(key, devfn, pin, on);
        }
    }

    /// Configuration read of 1, 2 or 4 bytes.
    pub fn config_read(&self, offset: u8, size: u8) -> u32 {
        (0..size as usize)
            .map(|i| u32::from(self.config.get(offset as usize + i).copied().unwrap_or(0xFF)) << (8 * i))
            .sum()
    }

    /// Configuration write of 1, 2 or 4 bytes; true if BARs or decoding changed.
    pub fn config_write(&mut self, ctx: &mut Ctx, offset: u8, size: u8, value: u32) -> bool {
        // A bridge has further address registers behind the BARs' place.
        let header = if self.is_bridge() { 0x34 } else { 0x28 };
        let before: [u8; 0x34] = std::array::from_fn(|i| self.config[i]);
        for i in 0..size as usize {
            let at = offset as usize + i;
            if at < 256 {
                let new = (value >> (8 * i)) as u8;
                self.config[at] = self.config[at] & !self.writable[at] | new & self.writable[at];
            }
        }
        self.drive_intx(ctx);
        self.msix_flush(ctx);
        before[..header] != self.config[..header]
    }

    /// Reset: configuration space as at power-on.
    pub fn reset(&mut self, ctx: &mut Ctx) {
        if !self.initial.is_empty() {
            self.config = self.initial.clone();
        }
        if let Some(m) = &mut self.msix {
            m.table.fill([0, 0, 0, 1]);
            m.pending.fill(0);
        }
        self.intx = false;
        self.drive_intx(ctx);
        ctx.remap();
    }

    /// The I/O windows that the BARs decode now.
    pub fn io_windows(&self) -> Vec<Window> {
        let mut out = Vec::new();
        if self.command() & COMMAND_IO == 0 {
            return out;
        }
        for (n, bar) in self.bars.iter().enumerate() {
            if let Bar::Io(size) = bar {
                let base = self.get32(0x10 + 4 * n) & !3;
                if base != 0 && base < 0x1_0000 {
                    out.push(Window::new(n as u8, u64::from(base), u64::from(*size)));
                }
            }
        }
        out
    }

    /// The memory windows that the BARs decode now.
    pub fn memory_windows(&self) -> Vec<Window> {
        let mut out = Vec::new();
        if self.command() & COMMAND_MEMORY == 0 {
            return out;
        }
        for (n, bar) in self.bars.iter().enumerate() {
            let low = u64::from(self.get32(0x10 + 4 * n) & !15);
            let (base, len) = match bar {
                Bar::Memory(size) => (low, u64::from(*size)),
                Bar::Memory64(size) => (low | u64::from(self.get32(0x14 + 4 * n)) << 32, *size),
                _ => continue,
            };
            if base != 0 && base.checked_add(len).is_some() {
                out.push(Window::new(n as u8, base, len));
            }
        }
        out
    }

    /// Configuration space as it is now.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// What the base address registers decode.
    pub fn bars(&self) -> [Bar; 6] {
        self.bars
    }

    /// The function's identity.
    pub fn id(&self) -> PciId {
        self.id
    }

    /// For saving.
    pub fn save(&self) -> PciSaved {
        PciSaved(PciState { config: self.config.clone(), intx: self.intx, msix: self.msix.clone() })
    }

    /// Restore; false if it is the state of another kind of function.
    #[must_use]
    pub fn load(&mut self, saved: PciSaved) -> bool {
        let s = saved.0;
        let same = |a: &MsixState, b: &MsixState| {
            a.table.len() == b.table.len() && a.pending.len() == b.pending.len()
        };
        let fits = s.config.len() == 256
            && s.config[..4] == self.config[..4]
            && match (&s.msix, &self.msix) {
                (None, None) => true,
                (Some(a), Some(b)) => same(a, b),
                _ => false,
            };
        if fits {
            self.config = s.config;
            self.intx = s.intx;
            self.msix = s.msix;
        }
        fits
    }
}

/// The saved state of a [`PciFunction`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PciSaved(PciState);
