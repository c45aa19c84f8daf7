//! Virtio over PCI (section 4.1), with the legacy interface of transitional devices (4.1.4.10).

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::{Io, Model, QueueState, VirtQueue, EVENT_IDX, INDIRECT_DESC, NO_VECTOR, VERSION_1};
use crate::ctx::{pack, unpack, Ctx, Device, DeviceError, Doorbell};
use crate::door::{DiskOp, Input};
use crate::pci::{Bar, Express, PciFunction, PciId, PciSaved};
use crate::registry::Build;

const LEGACY_BAR: u8 = 0;
const LEGACY_NOTIFY: u64 = 0x10;
/// Where the structures lie in the modern BAR, but for the first two.
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MODERN_SIZE: u64 = 0x4000;
const NOTIFY_MULTIPLIER: u32 = 4;

/// How a function's parts are laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// The class code, if it is not the model's.
    class: Option<u32>,
    /// The base address registers of MSI-X and of the structures.
    msix: u8,
    modern: u8,
    /// Where the common configuration and the interrupt status lie, and the bytes that each has there.
    common: u64,
    isr: u64,
    part: u64,
    /// There is no legacy interface, whatever the user says.
    modern_only: bool,
}

impl Layout {
    /// As most functions are.
    const USUAL: Layout =
        Layout { class: None, msix: 1, modern: 4, common: 0, isr: 0x1000, part: 0x1000, modern_only: false };
    /// As [`Self::USUAL`], of a device that has no legacy interface.
    pub const MODERN: Layout = Layout { modern_only: true, ..Layout::USUAL };

    /// Room for the registers of a VGA in the structures' first page, and for its frame buffer in BAR 0.
    pub const fn behind_vga(class: u32) -> Layout {
        Layout {
            class: Some(class),
            msix: 4,
            modern: 2,
            common: 0x1000,
            isr: 0x1800,
            part: 0x800,
            modern_only: true,
        }
    }
}

/// A structure in the modern BAR.
enum Part {
    Common,
    Isr,
    Device,
    Notify,
    Nothing,
}

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    status: u8,
    isr: u8,
    generation: u8,
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u16,
    config_vector: u16,
    /// Queues that the driver notified before it was ready (Linux's balloon driver does); a bit each.
    early: u64,
    /// Queue addresses as the driver writes them, before they are enabled.
    addresses: Vec<[u64; 3]>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    pci: PciSaved,
    s: State,
    queues: Vec<QueueState>,
    model: Vec<u8>,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    name: String,
    pci: PciFunction,
    model: Box<dyn Model>,
    queues: Vec<VirtQueue>,
    legacy: bool,
    modern: bool,
    layout: Layout,
    /// Notifications need not be waited for.
    doorbells: bool,
    /// Where the PCI configuration access capability lies.
    window: usize,
    s: State,
}

impl VirtioPci {
    /// Put `model` on the bus.
    pub fn new(b: &Build, model: Box<dyn Model>) -> Result<VirtioPci, DeviceError> {
        VirtioPci::with_layout(b, model, Layout::USUAL, |_| ())
    }

    /// Put `model` on the bus; `more` defines what else the function has.
    pub(crate) fn with_layout(
        b: &Build,
        model: Box<dyn Model>,
        layout: Layout,
        more: impl FnOnce(&mut PciFunction),
    ) -> Result<VirtioPci, DeviceError> {
        // The name says it, or the place does: there is no legacy interface behind a PCI Express port.
        let plain = !b.spec.driver.ends_with("-transitional");
        let modern_only = b.spec.driver.ends_with("-non-transitional") || b.behind_port() && plain;
        let legacy = !layout.modern_only && !b.flag("disable-legacy", modern_only);
        let modern = layout.modern_only || !b.flag("disable-modern", false);
        if !legacy && !modern {
            return Err(DeviceError::Config(
                "device cannot work as neither modern nor legacy mode is enabled".into(),
            ));
        }
        let kind = model.kind();
        let transitional = match kind {
            1 => 0x1000,
            2 => 0x1001,
            3 => 0x1003,
            5 => 0x1002,
            8 => 0x1004,
            4 => 0x1005,
            _ => 0x1040 + kind,
        };
        let id = PciId {
            vendor: 0x1AF4,
            device: if legacy { transitional } else { 0x1040 + kind },
            revision: u8::from(!legacy),
            class: layout.class.unwrap_or(model.class()),
            subsystem_vendor: 0x1AF4,
            subsystem: if legacy { kind } else { 0x1100 },
        };
        let mut pci = PciFunction::new(b.devfn, id);
        pci.pin(1);
        let vectors = b.number("vectors", u64::from(model.vectors()))?.min(128) as u16;
        if legacy {
            let size = (0x18 + model.config().len() as u32).next_power_of_two();
            pci.bar(usize::from(LEGACY_BAR), Bar::Io(size));
        }
        if vectors > 0 {
            pci.bar(usize::from(layout.msix), Bar::Memory(0x1000));
            pci.add_msix(layout.msix, vectors);
        }
        let mut window = 0;
        if modern {
            pci.bar(usize::from(layout.modern), Bar::Memory64(MODERN_SIZE));
            let capability = |kind: u8, offset: u64, size: u64, extra: &[u8]| {
                let mut body = vec![16 + extra.len() as u8, kind, layout.modern, 0, 0, 0];
                body.extend((offset as u32).to_le_bytes());
                body.extend((size as u32).to_le_bytes());
                body.extend(extra);
                body
            };
            pci.capability(9, &capability(1, layout.common, layout.part, &[]));
            pci.capability(9, &capability(3, layout.isr, layout.part, &[]));
            pci.capability(9, &capability(4, DEVICE, 0x1000, &[]));
            pci.capability(9, &capability(2, NOTIFY, 0x1000, &NOTIFY_MULTIPLIER.to_le_bytes()));
            // The window starts as nothing: BAR 0, offset 0, length 0.
            window = pci.capability(9, &[20, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            pci.allow(window + 4, &[0xFF]);
            pci.allow(window + 8, &[0xFF; 12]);
        }
        if b.behind_port() && modern {
            pci.add_express(Express::Endpoint);
        }
        more(&mut pci);
        pci.seal();
        let queues = model
            .queue_sizes()
            .iter()
            .map(|n| VirtQueue::new(*n))
            .collect::<Result<Vec<_>, DeviceError>>()?;
        let s = State { config_vector: NO_VECTOR, addresses: vec![[0; 3]; queues.len()], ..State::default() };
        let (name, doorbells) = (b.pci_name(), b.flag("ioeventfd", true));
        Ok(VirtioPci { name, pci, model, queues, legacy, modern, layout, doorbells, window, s })
    }

    fn offered(&self) -> u64 {
        let version = if self.modern { VERSION_1 } else { 0 };
        self.model.features() | INDIRECT_DESC | EVENT_IDX | version
    }

    fn reset_device(&mut self, ctx: &mut Ctx) {
        self.model.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.s = State {
            config_vector: NO_VECTOR,
            addresses: vec![[0; 3]; self.queues.len()],
            generation: self.s.generation,
            ..State::default()
        };
        self.pci.set_intx(ctx, false);
    }

    /// Call the model, then interrupt the driver as it asked for.
    fn run(&mut self, ctx: &mut Ctx, f: impl FnOnce(&mut dyn Model, &mut Io)) {
        let features = self.s.driver_features;
        let mut io = Io { ctx, queues: &mut self.queues, features, config_changed: false };
        f(&mut *self.model, &mut io);
        let config_changed = io.config_changed;
        let ram = ctx.mem.ram();
        for i in 0..self.queues.len() {
            if self.queues[i].wants_interrupt(ram) {
                let vector = self.queues[i].vector;
                self.interrupt(ctx, ISR_QUEUE, vector);
            }
        }
        if config_changed {
            self.s.generation = self.s.generation.wrapping_add(1);
            // Nobody is told before the driver is ready (3.1.1).
            if self.s.status & STATUS_DRIVER_OK != 0 {
                let vector = self.s.config_vector;
                self.interrupt(ctx, ISR_CONFIG | ISR_QUEUE, vector);
            }
        }
    }

    fn interrupt(&mut self, ctx: &mut Ctx, isr: u8, vector: u16) {
        if self.pci.msix_enabled() {
            if vector != NO_VECTOR {
                self.pci.msix_notify(ctx, vector);
            }
        } else {
            self.s.isr |= isr;
            self.pci.set_intx(ctx, true);
        }
    }

    fn notify(&mut self, ctx: &mut Ctx, queue: usize) {
        // A driver that is not ready, or a function that may not do DMA.
        if self.s.status & STATUS_DRIVER_OK == 0 && queue < 64 {
            self.s.early |= 1 << queue;
        }
        if queue < self.queues.len() && self.s.status & STATUS_DRIVER_OK != 0 && self.pci.master() {
            self.run(ctx, |m, io| m.notify(io, queue));
        }
    }

    fn set_driver_features(&mut self, value: u64) {
        self.s.driver_features = value & self.offered();
        let on = self.s.driver_features & EVENT_IDX != 0;
        self.queues.iter_mut().for_each(|q| q.queue.set_event_idx(on));
    }

    fn read_isr(&mut self, ctx: &mut Ctx) -> u8 {
        let isr = std::mem::take(&mut self.s.isr);
        self.pci.set_intx(ctx, false);
        isr
    }

    fn vector(&self, value: u16) -> u16 {
        if self.pci.has_vector(value) {
            value
        } else {
            NO_VECTOR
        }
    }

    fn write_status(&mut self, ctx: &mut Ctx, value: u8) {
        if value == 0 {
            self.reset_device(ctx);
        } else {
            self.s.status = value;
            if value & STATUS_DRIVER_OK != 0 {
                let early = std::mem::take(&mut self.s.early);
                for queue in (0..64).filter(|q| early >> q & 1 != 0) {
                    self.notify(ctx, queue);
                }
            }
        }
    }

    // The legacy interface.

    fn legacy_config_at(&self) -> u64 {
        if self.pci.msix_enabled() {
            0x18
        } else {
            0x14
        }
    }

    fn legacy_read(&mut self, ctx: &mut Ctx, offset: u64, size: u8) -> u32 {
        let q = self.queues.get(usize::from(self.s.queue_select));
        let config = self.legacy_config_at();
        match offset {
            0 => self.offered() as u32,
            4 => self.s.driver_features as u32,
            8 => q.map_or(0, |q| if q.queue.ready() { (q.queue.desc_table() >> 12) as u32 } else { 0 }),
            0x0C => q.map_or(0, |q| u32::from(q.queue.max_size())),
            0x0E => u32::from(self.s.queue_select),
            0x12 => u32::from(self.s.status),
            0x13 => u32::from(self.read_isr(ctx)),
            0x14 if config == 0x18 => u32::from(self.s.config_vector),
            0x16 if config == 0x18 => u32::from(q.map_or(NO_VECTOR, |q| q.vector)),
            _ if offset >= config => self.config_read(offset - config, size) as u32,
            _ => 0,
        }
    }

    fn legacy_write(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u32) {
        let n = usize::from(self.s.queue_select);
        let config = self.legacy_config_at();
        match offset {
            4 => self.set_driver_features(u64::from(value)),
            8 => {
                let Some(q) = self.queues.get_mut(n) else { return };
                if value == 0 {
                    q.reset();
                    return;
                }
                let size = u64::from(q.queue.max_size());
                let desc = u64::from(value) << 12;
                let avail = desc + 16 * size;
                let used = (avail + 6 + 2 * size).next_multiple_of(4096);
                q.queue.set_size(size as u16);
                q.set_addresses(desc, avail, used);
                q.queue.set_ready(true);
            }
            0x0E => self.s.queue_select = value as u16,
            LEGACY_NOTIFY => self.notify(ctx, usize::from(value as u16)),
            0x12 => self.write_status(ctx, value as u8),
            0x14 if config == 0x18 => self.s.config_vector = self.vector(value as u16),
            0x16 if config == 0x18 => {
                let vector = self.vector(value as u16);
                if let Some(q) = self.queues.get_mut(n) {
                    q.vector = vector;
                }
            }
            _ if offset >= config => self.config_write(ctx, offset - config, size, u64::from(value)),
            _ => {}
        }
    }

    fn config_read(&self, offset: u64, size: u8) -> u64 {
        let config = self.model.config();
        (0..u64::from(size))
            .map(|i| u64::from(config.get((offset + i) as usize).copied().unwrap_or(0)) << (8 * i))
            .sum()
    }

    fn config_write(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u64) {
        let bytes = value.to_le_bytes();
        let bytes = &bytes[..usize::from(size.min(8))];
        self.run(ctx, |m, io| m.config_written(io, offset as usize, bytes));
    }

    // The modern interface.

    fn common_read(&self, offset: u64) -> u64 {
        let n = usize::from(self.s.queue_select);
        let q = self.queues.get(n);
        let half = |select: u32, features: u64| match select {
            0 => features & 0xFFFF_FFFF,
            1 => features >> 32,
            _ => 0,
        };
        let address =
            |which: usize, shift: u32| self.s.addresses.get(n).map_or(0, |a| a[which] >> shift & 0xFFFF_FFFF);
        match offset {
            0 => u64::from(self.s.device_select),
            4 => half(self.s.device_select, self.offered()),
            8 => u64::from(self.s.driver_select),
            12 => half(self.s.driver_select, self.s.driver_features),
            16 => u64::from(self.s.config_vector),
            18 => self.queues.len() as u64,
            20 => u64::from(self.s.status),
            21 => u64::from(self.s.generation),
            22 => u64::from(self.s.queue_select),
            24 => q.map_or(0, |q| u64::from(q.queue.size())),
            26 => q.map_or(u64::from(NO_VECTOR), |q| u64::from(q.vector)),
            28 => q.map_or(0, |q| u64::from(q.queue.ready())),
            30 => self.s.queue_select.into(),
            32..=55 => address(((offset - 32) / 8) as usize, if offset & 4 != 0 { 32 } else { 0 }),
            _ => 0,
        }
    }

    fn common_write(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u64) {
        let n = usize::from(self.s.queue_select);
        match offset {
            0 => self.s.device_select = value as u32,
            8 => self.s.driver_select = value as u32,
            12 => {
                let old = self.s.driver_features;
                // Features are settled at FEATURES_OK.
                if self.s.status & STATUS_FEATURES_OK == 0 {
                    match self.s.driver_select {
                        0 => self.set_driver_features(old & !0xFFFF_FFFF | value & 0xFFFF_FFFF),
                        1 => self.set_driver_features(old & 0xFFFF_FFFF | value << 32),
                        _ => {}
                    }
                }
            }
            16 => self.s.config_vector = self.vector(value as u16),
            20 => self.write_status(ctx, value as u8),
            22 => self.s.queue_select = value as u16,
            24 => {
                if let Some(q) = self.queues.get_mut(n) {
                    q.queue.set_size(value as u16);
                }
            }
            26 => {
                let vector = self.vector(value as u16);
                if let Some(q) = self.queues.get_mut(n) {
                    q.vector = vector;
                }
            }
            28 => {
                if let (Some(q), Some(a)) = (self.queues.get_mut(n), self.s.addresses.get(n)) {
                    if value == 1 && !q.queue.ready() {
                        q.set_addresses(a[0], a[1], a[2]);
                        q.queue.set_ready(true);
                    }
                }
            }
            32..=55 => {
                if let Some(a) = self.s.addresses.get_mut(n) {
                    let slot = &mut a[((offset - 32) / 8) as usize];
                    *slot = match (offset & 4 != 0, size) {
                        (false, 8) => value,
                        (false, _) => *slot & !0xFFFF_FFFF | value & 0xFFFF_FFFF,
                        (true, _) => *slot & 0xFFFF_FFFF | value << 32,
                    };
                }
            }
            _ => {}
        }
    }

    /// The structure at an offset of the modern BAR, and the offset in it.
    fn part(&self, offset: u64) -> (Part, u64) {
        let l = &self.layout;
        let inside = |start: u64, len: u64| offset.checked_sub(start).filter(|at| *at < len);
        if let Some(at) = inside(l.common, l.part) {
            return (Part::Common, at);
        }
        if let Some(at) = inside(l.isr, l.part) {
            return (Part::Isr, at);
        }
        match offset & !0xFFF {
            DEVICE => (Part::Device, offset - DEVICE),
            NOTIFY => (Part::Notify, offset - NOTIFY),
            _ => (Part::Nothing, 0),
        }
    }

    fn modern_read(&mut self, ctx: &mut Ctx, offset: u64, size: u8) -> u64 {
        match self.part(offset) {
            (Part::Common, at) if size == 8 => self.common_read(at) | self.common_read(at + 4) << 32,
            (Part::Common, at) => self.common_read(at),
            (Part::Isr, _) => u64::from(self.read_isr(ctx)),
            (Part::Device, at) => self.config_read(at, size),
            _ => 0,
        }
    }

    fn modern_write(&mut self, ctx: &mut Ctx, offset: u64, size: u8, value: u64) {
        match self.part(offset) {
            (Part::Common, at) => self.common_write(ctx, at, size, value),
            (Part::Device, at) => self.config_write(ctx, at, size, value),
            (Part::Notify, at) => self.notify(ctx, (at / u64::from(NOTIFY_MULTIPLIER)) as usize),
            _ => {}
        }
    }

    /// The region of MSI-X's table.
    pub(crate) fn msix_region(&self) -> u8 {
        self.layout.msix
    }

    /// The BAR offset and size that the configuration access capability names (4.1.4.9).
    fn window_target(&self) -> Option<(u64, u8)> {
        let (bar, at) = (self.pci.get8(self.window + 4), u64::from(self.pci.get32(self.window + 8)));
        let size = self.pci.get32(self.window + 12);
        let ok = bar == self.layout.modern && matches!(size, 1 | 2 | 4) && at % u64::from(size) == 0;
        (ok && at < MODERN_SIZE).then_some((at, size as u8))
    }

    fn touches_window(&self, offset: u8, len: u8) -> bool {
        let data = self.window + 16;
        self.window != 0 && usize::from(offset) < data + 4 && usize::from(offset) + usize::from(len) > data
    }
}

impl Device for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }
    fn reset(&mut self, ctx: &mut Ctx) {
        self.reset_device(ctx);
        self.pci.reset(ctx);
    }
    fn doorbells(&self) -> Vec<Doorbell> {
        let mut out = Vec::new();
        for n in (0..self.queues.len() as u16).filter(|_| self.doorbells) {
            if self.modern {
                let offset = NOTIFY + u64::from(n) * u64::from(NOTIFY_MULTIPLIER);
                out.push(Doorbell { region: self.layout.modern, offset, value: None });
            }
            if self.legacy {
                out.push(Doorbell { region: LEGACY_BAR, offset: LEGACY_NOTIFY, value: Some(n) });
            }
        }
        out
    }
    fn ring(&mut self, ctx: &mut Ctx, n: usize) {
        // A queue has one for each interface.
        self.notify(ctx, n / (usize::from(self.modern) + usize::from(self.legacy)));
    }
    fn pio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8) -> u32 {
        if region == LEGACY_BAR && self.legacy {
            return self.legacy_read(ctx, u64::from(offset), size);
        }
        u32::MAX
    }
    fn pio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u16, size: u8, value: u32) {
        if region == LEGACY_BAR && self.legacy {
            self.legacy_write(ctx, u64::from(offset), size, value);
        }
    }
    fn mmio_read(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8) -> u64 {
        match region {
            r if r == self.layout.msix => self.pci.msix_read(offset, size),
            _ => self.modern_read(ctx, offset, size),
        }
    }
    fn mmio_write(&mut self, ctx: &mut Ctx, region: u8, offset: u64, size: u8, value: u64) {
        match region {
            r if r == self.layout.msix => self.pci.msix_write(ctx, offset, size, value),
            _ => self.modern_write(ctx, offset, size, value),
        }
    }
    fn input(&mut self, ctx: &mut Ctx, input: &Input) {
        self.run(ctx, |m, io| m.input(io, input));
    }
    fn disk_done(&mut self, ctx: &mut Ctx, id: u64, op: DiskOp, result: Result<&[u8], i32>) {
        self.run(ctx, |m, io| m.disk_done(io, id, op, result));
    }
    fn timer(&mut self, ctx: &mut Ctx, _id: u8) {
        self.run(ctx, |m, io| m.timer(io));
    }
    fn rescan(&mut self, config: &crate::config::PcConfig, tell: bool) {
        self.model.rescan(config, tell);
    }
    fn facts(&self) -> Vec<(String, i64)> {
        self.model.facts()
    }
    fn screen(&self) -> Option<&dyn crate::display::Screen> {
        self.model.screen()
    }
    fn pci(&self) -> Option<&PciFunction> {
        Some(&self.pci)
    }
    fn pci_mut(&mut self) -> Option<&mut PciFunction> {
        Some(&mut self.pci)
    }
    fn config_reading(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {
        if self.touches_window(offset, len) {
            if let Some((at, size)) = self.window_target() {
                let value = self.modern_read(ctx, at, size) as u32;
                self.pci.set32(self.window + 16, value);
            }
        }
    }
    fn config_written(&mut self, ctx: &mut Ctx, offset: u8, len: u8) {
        if self.touches_window(offset, len) {
            if let Some((at, size)) = self.window_target() {
                let value = self.pci.get32(self.window + 16);
                let value = value & (u32::MAX >> (32 - 8 * u32::from(size)));
                self.modern_write(ctx, at, size, u64::from(value));
            }
        }
    }
    fn save(&self) -> Vec<u8> {
        pack(&Saved {
            pci: self.pci.save(),
            s: self.s.clone(),
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            model: self.model.save(),
        })
    }
    fn load(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let s: Saved = unpack(&self.name, data)?;
        if s.queues.len() != self.queues.len()
            || s.s.addresses.len() != self.queues.len()
            || !self.pci.load(s.pci)
        {
            return Err(DeviceError::Misfit(self.name.clone()));
        }
        self.model.load(&self.name, &s.model)?;
        for (q, s) in self.queues.iter_mut().zip(&s.queues) {
            q.load(s);
        }
        self.s = s.s;
        Ok(())
    }
}
