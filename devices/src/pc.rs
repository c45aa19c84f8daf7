//! QEMU's `pc` and `q35` machines as one deterministic object.

mod bells;
mod hotplug;
mod saved;

use ftvm_accel::mem::GuestMemory;
use ftvm_accel::ApicMessage;

use crate::acpi;
use crate::boot;
use crate::chipset::debug::Post;
use crate::chipset::fwcfg::{self, FwCfg};
use crate::chipset::hpet::Hpet;
use crate::chipset::i8042::I8042;
use crate::chipset::ich9::Ich9Lpc;
use crate::chipset::northbridge::{HostBridge, CONFIG_REGION};
use crate::chipset::pit::Pit;
use crate::chipset::pm::Pm;
use crate::chipset::rtc::Rtc;
use crate::chipset::serial::Serial;
use crate::chipset::smbus::Ich9Smbus;
use crate::chipset::southbridge::IsaBridge;
use crate::config::{DeviceSpec, DriveSpec, PcConfig};
use crate::ctx::{pack, Board, Ctx, Device, DeviceError};
use crate::display::VGA_CARDS;
use crate::door::{Input, MachineRequest, Output};
use crate::ide::ahci::{self, Ahci};
use crate::ide::Ide;
use crate::pci::{PciFunction, Place};
use crate::registry::{self, Attach, Build};
use crate::smbios;
use crate::usb;

use hotplug::User;
pub use hotplug::{FunctionView, Inventory, WindowView};

const CONFIG_ADDRESS: u16 = 0xCF8;
const RESET_CONTROL: u16 = 0xCF9;
const CONFIG_DATA: u16 = 0xCFC;
const NONE: u16 = u16::MAX;
/// Region of the ISA bridge that is port 0xCF9.
const RESET_REGION: u8 = 3;
/// Due timers that one call of [`Pc::advance`] fires at most; a guest cannot keep it busy for ever.
const MAX_FIRED: usize = 100_000;

#[derive(Clone, Copy)]
struct Mapped {
    start: u64,
    len: u64,
    device: u16,
    region: u8,
    width: u8,
}

/// A PCI bus. A machine's buses are those of its configuration, in that order; no bus comes or goes.
struct Bus {
    name: String,
    /// Where its functions are.
    place: Place,
    /// The bus above it.
    parent: usize,
    /// The bridge in front of it; the root bus has none.
    bridge: Option<u16>,
    hotplug: bool,
    /// The device at each device and function number, or [`NONE`].
    functions: Vec<u16>,
}

/// The machine without its processors and memory.
pub struct Pc {
    board: Board,
    devices: Vec<Box<dyn Device>>,
    /// For each I/O port an index into `port_maps`, or [`NONE`].
    ports: Vec<u16>,
    port_maps: Vec<Mapped>,
    memory_maps: Vec<Mapped>,
    map_version: u64,
    /// The PCI buses, the root bus first.
    buses: Vec<Bus>,
    bridge: u16,
    /// Where the power management function is among the devices.
    pm: u16,
    /// The machine's description, for what is plugged in later (without firmware and kernel).
    config: PcConfig,
    users: Vec<User>,
    /// Ids of devices of the configuration that were pulled from behind their controllers.
    lost: Vec<String>,
}

/// Devices at most, those that are gone counted.
const MAX_DEVICES: usize = 4096;

impl Pc {
    /// Build a machine. `mem` has `ram_size` bytes.
    pub fn new(mut config: PcConfig, mem: &GuestMemory) -> Result<Pc, DeviceError> {
        usb::fix_ports(&mut config);
        if config.cpus == 0 || config.cpus > 255 {
            return Err(DeviceError::Config(format!(
                "Invalid SMP CPUs {}. The min CPUs supported by machine 'pc' is 1 and the max is 255",
                config.cpus
            )));
        }
        let q35 = config.is_q35();
        let mut order = BootOrder::default();
        let disks = ide_drives(&config, &mut order)?;
        let (host, isa): (_, Box<dyn Device>) = match q35 {
            true => (HostBridge::mch(), Box::<Ich9Lpc>::default()),
            false => (HostBridge::i440fx(), Box::<IsaBridge>::default()),
        };
        let mut devices: Vec<Box<dyn Device>> = vec![
            Box::new(host),
            isa,
            Box::<Pit>::default(),
            Box::new(Rtc::new(config.rtc_base_unix, &cmos(&config, mem, &disks))),
            Box::<I8042>::default(),
            Box::<Post>::default(),
        ];
        let bridge = 1;
        // ICH9's power management is in its ISA bridge.
        let mut pm = bridge;
        if !q35 {
            pm = devices.len() as u16;
            devices.push(Box::<Pm>::default());
        }
        if config.hpet {
            devices.push(Box::<Hpet>::default());
        }
        for s in &config.serial_ports {
            if s.index > 3 {
                return Err(DeviceError::Config(format!("there is no serial line {}", s.index)));
            }
            devices.push(Box::new(Serial::new(s.index, s.port)));
        }
        let mut disks = disks.into_iter();
        let mut next = || disks.next().flatten();
        if q35 {
            devices.push(Box::new(Ahci::new(std::array::from_fn(|_| next()))));
            devices.push(Box::<Ich9Smbus>::default());
        } else {
            devices.push(Box::new(Ide::new(std::array::from_fn(|_| next()))));
        }
        let root = Bus {
            name: config.root_bus().into(),
            place: Place::default(),
            parent: 0,
            bridge: None,
            hotplug: !q35,
            functions: vec![NONE; 256],
        };
        let mut buses = vec![root];
        let mut slots = vec![Slots::root(&config)?];
        let mut users = Vec::new();
        for spec in &config.devices {
            let model = registry::model(&spec.driver)?;
            model.check(spec)?;
            model.check_bus(spec, &config)?;
            let mut user = User { spec: spec.clone(), bus: 0, devfn: None, device: None, plug: None };
            if let Some(build) = model.build {
                if model.attach == Attach::Pci {
                    user.bus = find_bus(&buses, spec)?;
                    user.devfn = Some(slots[user.bus].take(spec)?);
                }
                let place = buses[user.bus].place.clone();
                let b = Build { config: &config, spec, devfn: user.devfn.unwrap_or(0), place };
                order.add(&b)?;
                let at = devices.len() as u16;
                user.device = Some(at);
                let device = b.finish(build(&b)?);
                if device.pci().is_some_and(PciFunction::is_bridge) {
                    let bus = behind(&buses, &b, at)?;
                    buses.push(bus);
                    slots.push(Slots::port());
                }
                devices.push(device);
            }
            users.push(user);
        }
        devices.push(Box::new(firmware_config(&config, mem, order, &buses)?));

        let mut names: Vec<&str> = devices.iter().map(|d| d.name()).collect();
        names.sort_unstable();
        if let Some(w) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(DeviceError::Config(format!("there can be only one device '{}'", w[0])));
        }
        for (i, d) in devices.iter().enumerate() {
            if let Some(pci) = d.pci() {
                buses[usize::from(pci.place().bus)].functions[usize::from(pci.devfn)] = i as u16;
            }
        }
        let mut pc = Pc {
            board: Board::new(config.random_seed, q35),
            devices,
            ports: vec![NONE; 0x1_0000],
            port_maps: Vec::new(),
            memory_maps: Vec::new(),
            map_version: 0,
            buses,
            bridge,
            pm,
            config: PcConfig { firmware: Vec::new(), video_bios: Default::default(), kernel: None, ..config },
            users,
            lost: Vec::new(),
        };
        (0..pc.buses.len()).for_each(|bus| pc.note_presence(bus));
        pc.reset(mem, 0);
        Ok(pc)
    }

    /// System reset at virtual time `now_ns`.
    pub fn reset(&mut self, mem: &GuestMemory, now_ns: u64) {
        let s = &mut self.board.s;
        s.pic.reset();
        s.ioapic = Default::default();
        s.lines = [0; 24];
        s.intx.clear();
        s.hpet_legacy = false;
        s.timers.clear();
        s.config_address = 0;
        s.messages.clear();
        s.request = None;
        for i in 0..self.devices.len() {
            self.with(mem, now_ns, i as u16, |d, ctx| d.reset(ctx));
        }
        self.board.settle();
        self.board.find_deadline();
        self.remap();
    }

    fn with<R>(
        &mut self,
        mem: &GuestMemory,
        now: u64,
        device: u16,
        f: impl FnOnce(&mut dyn Device, &mut Ctx) -> R,
    ) -> R {
        let mut ctx = Ctx { now, mem, board: &mut self.board, device };
        let r = f(&mut *self.devices[usize::from(device)], &mut ctx);
        for (bus, slot) in std::mem::take(&mut self.board.ejected) {
            self.eject(mem, now, bus.into(), slot);
        }
        if self.board.remap {
            self.remap();
        }
        r
    }

    /// Rebuild the maps of ports and memory; earlier devices win where windows overlap.
    fn remap(&mut self) {
        self.board.remap = false;
        self.map_version += 1;
        self.ports.fill(NONE);
        self.port_maps.clear();
        self.memory_maps.clear();
        for (i, d) in self.devices.iter().enumerate() {
            let pci = d.pci();
            let mapped = |w: &crate::ctx::Window| Mapped {
                start: w.start,
                len: w.len,
                device: i as u16,
                region: w.region,
                width: w.width,
            };
            let mut io = pci.map_or(Vec::new(), |p| p.io_windows());
            let mut memory = pci.map_or(Vec::new(), |p| p.memory_windows());
            if let Some(pci) = pci.filter(|p| p.place().bus != 0) {
                // The bridges above must pass it on.
                let bus = usize::from(pci.place().bus);
                io.retain(|w| self.forwarded(bus, |b| b.forwards_io(w.start, w.len)));
                memory.retain(|w| self.forwarded(bus, |b| b.forwards_memory(w.start, w.len)));
            }
            for w in d.ports().iter().chain(&io) {
                let index = self.port_maps.len() as u16;
                self.port_maps.push(mapped(w));
                let end = (w.start + w.len).min(0x1_0000);
                for port in w.start..end {
                    let slot = &mut self.ports[port as usize];
                    if *slot == NONE {
                        *slot = index;
                    }
                }
            }
            for w in d.windows().iter().chain(&memory) {
                self.memory_maps.push(mapped(w));
            }
        }
    }

    /// Read `size` (1, 2, 4) bytes from an I/O port.
    pub fn io_read(&mut self, mem: &GuestMemory, now_ns: u64, port: u16, size: u8) -> u32 {
        let ones = u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4)));
        if port & !3 == CONFIG_DATA {
            let target = self.config_target(port);
            return self.config_read(mem, now_ns, target, size) & ones;
        }
        if port == CONFIG_ADDRESS && size == 4 {
            return self.board.s.config_address;
        }
        if port == RESET_CONTROL {
            let bridge = self.bridge;
            return self.with(mem, now_ns, bridge, |d, ctx| d.pio_read(ctx, RESET_REGION, 0, 1)) & ones;
        }
        let index = self.ports[usize::from(port)];
        if index == NONE {
            return ones;
        }
        let m = self.port_maps[usize::from(index)];
        let offset = u64::from(port) - m.start;
        if size > m.width || offset + u64::from(size) > m.len {
            if size == 1 {
                return ones;
            }
            let half = size / 2;
            let low = self.io_read(mem, now_ns, port, half);
            let high = self.io_read(mem, now_ns, port.wrapping_add(u16::from(half)), half);
            return low | high << (8 * half);
        }
        self.with(mem, now_ns, m.device, |d, ctx| d.pio_read(ctx, m.region, offset as u16, size)) & ones
    }

    /// Write `size` (1, 2, 4) bytes to an I/O port.
    pub fn io_write(&mut self, mem: &GuestMemory, now_ns: u64, port: u16, size: u8, value: u32) {
        let value = value & (u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4))));
        if port & !3 == CONFIG_DATA {
            let target = self.config_target(port);
            return self.config_write(mem, now_ns, target, size, value);
        }
        if port == CONFIG_ADDRESS && size == 4 {
            self.board.s.config_address = value;
            return;
        }
        if port == RESET_CONTROL {
            let bridge = self.bridge;
            return self.with(mem, now_ns, bridge, |d, ctx| d.pio_write(ctx, RESET_REGION, 0, 1, value));
        }
        let index = self.ports[usize::from(port)];
        if index == NONE {
            return;
        }
        let m = self.port_maps[usize::from(index)];
        let offset = u64::from(port) - m.start;
        if size > m.width || offset + u64::from(size) > m.len {
            if size > 1 {
                let half = size / 2;
                self.io_write(mem, now_ns, port, half, value);
                let high = port.wrapping_add(u16::from(half));
                self.io_write(mem, now_ns, high, half, value >> (8 * half));
            }
            return;
        }
        self.with(mem, now_ns, m.device, |d, ctx| d.pio_write(ctx, m.region, offset as u16, size, value));
    }

    /// Whether all bridges above a bus pass something on.
    fn forwarded(&self, bus: usize, passes: impl Fn(&PciFunction) -> bool) -> bool {
        let mut at = bus;
        while let Some(bridge) = self.buses[at].bridge {
            if !self.devices[usize::from(bridge)].pci().is_some_and(&passes) {
                return false;
            }
            at = self.buses[at].parent;
        }
        true
    }

    /// The bus that has this number by what the guest wrote into the bridges.
    fn numbered(&self, number: u8) -> Option<usize> {
        let mut at = 0;
        if number == 0 {
            return Some(at);
        }
        loop {
            let (child, numbers) = self.buses.iter().enumerate().skip(1).find_map(|(i, b)| {
                let bridge = self.devices[usize::from(b.bridge?)].pci()?;
                let numbers = bridge.bus_numbers().filter(|n| n.contains(&number))?;
                (b.parent == at).then_some((i, numbers))
            })?;
            if *numbers.start() == number {
                return Some(child);
            }
            at = child;
        }
    }

    /// The device at a bus number and a device and function number, if there is one.
    fn function(&self, number: u8, devfn: u8) -> Option<u16> {
        let device = self.buses[self.numbered(number)?].functions[usize::from(devfn)];
        (device != NONE).then_some(device)
    }

    /// The function and register that CONFIG_ADDRESS names, if there is one.
    fn config_target(&self, port: u16) -> Option<(u16, u16)> {
        let a = self.board.s.config_address;
        if a & 0x8000_0000 == 0 {
            return None;
        }
        let device = self.function((a >> 16) as u8, (a >> 8) as u8)?;
        Some((device, (a & 0xFC) as u16 | (port & 3)))
    }

    /// The function and register at an offset of memory-mapped configuration space (PCI Express 3.0, 7.2.2).
    fn mapped_target(&self, offset: u64) -> Option<(u16, u16)> {
        let device = self.function((offset >> 20) as u8, (offset >> 12) as u8)?;
        Some((device, offset as u16 & 0xFFF))
    }

    fn config_read(&mut self, mem: &GuestMemory, now: u64, target: Option<(u16, u16)>, size: u8) -> u32 {
        let Some((device, offset)) = target else { return u32::MAX };
        // No function has extended capabilities.
        let Ok(offset) = u8::try_from(offset) else { return 0 };
        self.with(mem, now, device, |d, ctx| {
            d.config_reading(ctx, offset, size);
            d.pci().map_or(u32::MAX, |p| p.config_read(offset, size))
        })
    }

    fn config_write(
        &mut self,
        mem: &GuestMemory,
        now: u64,
        target: Option<(u16, u16)>,
        size: u8,
        value: u32,
    ) {
        let Some((device, offset)) = target else { return };
        let Ok(offset) = u8::try_from(offset) else { return };
        // An access does not reach over the register's dword.
        let size = size.min(4 - (offset & 3));
        self.with(mem, now, device, |d, ctx| {
            if d.pci_mut().is_some_and(|p| p.config_write(ctx, offset, size, value)) {
                ctx.remap();
            }
            d.config_written(ctx, offset, size);
        });
    }

    fn memory_target(&self, addr: u64) -> Option<Mapped> {
        self.memory_maps.iter().find(|m| addr >= m.start && addr - m.start < m.len).copied()
    }

    /// Read `size` (1, 2, 4, 8) bytes of memory-mapped I/O; nothing there reads as ones.
    pub fn mmio_read(&mut self, mem: &GuestMemory, now_ns: u64, addr: u64, size: u8) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
        match self.memory_target(addr) {
            None => ones,
            Some(m) if m.region == CONFIG_REGION => {
                let mut part = |addr: u64, size: u8| {
                    let target = self.mapped_target(addr - m.start);
                    u64::from(self.config_read(mem, now_ns, target, size))
                };
                let low = part(addr, size.min(4));
                (if size > 4 { low | part(addr + 4, 4) << 32 } else { low }) & ones
            }
            Some(m) => {
                let offset = addr - m.start;
                self.with(mem, now_ns, m.device, |d, ctx| d.mmio_read(ctx, m.region, offset, size)) & ones
            }
        }
    }

    /// Write `size` (1, 2, 4, 8) bytes of memory-mapped I/O.
    pub fn mmio_write(&mut self, mem: &GuestMemory, now_ns: u64, addr: u64, size: u8, value: u64) {
        let value = value & (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))));
        if let Some(m) = self.memory_target(addr) {
            let offset = addr - m.start;
            if m.region == CONFIG_REGION {
                for i in 0..u64::from(size).div_ceil(4) {
                    let target = self.mapped_target(offset + 4 * i);
                    self.config_write(mem, now_ns, target, size.min(4), (value >> (32 * i)) as u32);
                }
                return;
            }
            self.with(mem, now_ns, m.device, |d, ctx| d.mmio_write(ctx, m.region, offset, size, value));
        }
    }

    /// The virtual time at which [`Self::advance`] must be called next.
    pub fn next_deadline(&self) -> Option<u64> {
        self.board.deadline
    }

    /// Fire the timers that are due at `now_ns`, in order of deadline, then device.
    pub fn advance(&mut self, mem: &GuestMemory, now_ns: u64) {
        for _ in 0..MAX_FIRED {
            let due = self.board.s.timers.iter().map(|(k, t)| (*t, *k)).min().filter(|(t, _)| *t <= now_ns);
            let Some((_, (device, id))) = due else { break };
            self.board.s.timers.remove(&(device, id));
            self.with(mem, now_ns, device, |d, ctx| d.timer(ctx, id));
        }
        self.board.find_deadline();
    }

    /// Something comes in from outside.
    pub fn input(&mut self, mem: &GuestMemory, now_ns: u64, input: &Input) {
        if let Input::DiskDone { id, result } = input {
            if let Some(p) = self.board.s.pending.remove(id) {
                if usize::from(p.device) < self.devices.len() {
                    let result = result.as_deref().map_err(|errno| *errno);
                    self.with(mem, now_ns, p.device, |d, ctx| d.disk_done(ctx, *id, p.op, result));
                }
            }
            return;
        }
        match input {
            Input::Plug(plug) if hotplug::is_child(&plug.spec) => self.plug_child(plug, true),
            Input::Plug(plug) => return self.plug(mem, now_ns, plug),
            Input::Unplug { id } if self.unplug_child(id) => {}
            Input::Unplug { id } => {
                let user = self.users.iter().find(|u| u.spec.id.as_deref() == Some(id));
                if let Some((bus, devfn)) = user.and_then(|u| Some((u.bus as u8, u.devfn?))) {
                    self.with(mem, now_ns, self.pm, |d, ctx| d.ask_to_eject(ctx, bus, devfn >> 3));
                }
                return;
            }
            _ => {}
        }
        for i in 0..self.devices.len() {
            self.with(mem, now_ns, i as u16, |d, ctx| d.input(ctx, input));
        }
    }

    /// The screen of the first video card, or of the one with this id; none: there is no such card.
    pub fn screen(&self, id: Option<&str>) -> Option<&dyn crate::display::Screen> {
        let named = |u: &&User| id.is_none_or(|id| u.spec.id.as_deref() == Some(id));
        let mut cards = self.users.iter().filter(named).filter_map(|u| u.device);
        cards.find_map(|d| self.devices[usize::from(d)].screen())
    }

    /// The 8259 pair's INTR output.
    pub fn intr(&self) -> bool {
        self.board.s.pic.intr()
    }

    /// The interrupt acknowledge cycle: the vector.
    pub fn intr_ack(&mut self) -> u8 {
        let vector = self.board.s.pic.ack();
        self.board.settle();
        vector
    }

    /// A local APIC ended the level-triggered interrupt `vector`.
    pub fn eoi(&mut self, vector: u8) {
        let s = &mut self.board.s;
        s.ioapic.eoi(vector, &mut s.messages);
    }

    /// Messages to local APICs, in order.
    pub fn take_messages(&mut self) -> Vec<ApicMessage> {
        std::mem::take(&mut self.board.s.messages)
    }

    /// What leaves the machine, in order.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.board.s.outputs)
    }

    /// What a device asks of the machine.
    pub fn take_request(&mut self) -> Option<MachineRequest> {
        self.board.s.request.take()
    }

    /// Whether there are messages, outputs or requests, or INTR moved or an earlier deadline was set since this was
    /// last asked.
    pub fn has_work(&self) -> bool {
        let s = &self.board.s;
        self.board.changed.take() || !s.messages.is_empty() || !s.outputs.is_empty() || s.request.is_some()
    }

    /// Whether outputs or a request wait.
    pub fn has_news(&self) -> bool {
        !self.board.s.outputs.is_empty() || self.board.s.request.is_some()
    }

    /// What each pin of the I/O APIC would send, for those that are level-triggered.
    pub fn level_pins(&self) -> Vec<Option<ApicMessage>> {
        self.board.s.ioapic.level_pins()
    }

    /// 64 random bits of the machine's generator.
    pub fn random(&mut self) -> u64 {
        self.board.s.random.next()
    }

    /// Whether address line 20 passes.
    pub fn a20(&self) -> bool {
        self.board.s.a20
    }

    /// Disk requests issued and not completed, for reissue after a failover.
    pub fn pending_disk(&self) -> Vec<Output> {
        let one = |(id, p): (&u64, &crate::ctx::PendingDisk)| Output::Disk {
            id: *id,
            drive: p.drive,
            op: p.op.clone(),
        };
        self.board.s.pending.iter().map(one).collect()
    }

    /// A hash (FNV-1a) of each device's saved state, to name a divergence.
    pub fn device_hashes(&self) -> Vec<(String, u64)> {
        let mut board = self.board.s.clone();
        // What is on its way out depends on when it was last taken.
        board.messages.clear();
        board.outputs.clear();
        let mut out = vec![(saved::BOARD_SECTION.to_string(), fnv(&pack(&board)))];
        out.extend(self.devices.iter().map(|d| (d.name().to_string(), fnv(&d.save()))));
        out
    }
}

fn fnv(data: &[u8]) -> u64 {
    data.iter().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01B3))
}

fn in_use(devfn: u8, driver: &str) -> DeviceError {
    let (slot, function) = (devfn >> 3, devfn & 7);
    DeviceError::Config(format!("PCI: slot {slot} function {function} not available for {driver}, in use"))
}

/// PCI slots handed out.
struct Slots {
    used: [bool; 256],
    /// This is the bus behind a port, which has one slot.
    port: bool,
    /// The display's slot.
    display: usize,
}

impl Slots {
    /// The root bus's, with what is taken by address.
    fn root(config: &PcConfig) -> Result<Slots, DeviceError> {
        let mut slots = Slots::board(config);
        for spec in &config.devices {
            let on_root = spec.properties.get("bus").is_none_or(|b| b == config.root_bus());
            if on_root && registry::model(&spec.driver)?.attach == Attach::Pci {
                if let Some(devfn) = address(spec)? {
                    if std::mem::replace(&mut slots.used[usize::from(devfn)], true) {
                        return Err(in_use(devfn, &spec.driver));
                    }
                }
            }
        }
        Ok(slots)
    }

    /// The root bus's, with the chipset's own functions.
    fn board(config: &PcConfig) -> Slots {
        let mut slots =
            Slots { used: [false; 256], port: false, display: if config.is_q35() { 1 } else { 2 } };
        let own: &[usize] =
            if config.is_q35() { &[0x00, 0xF8, 0xFA, 0xFB] } else { &[0x00, 0x08, 0x09, 0x0B] };
        own.iter().for_each(|devfn| slots.used[*devfn] = true);
        slots
    }

    /// The one slot behind a port.
    fn port() -> Slots {
        Slots { used: [false; 256], port: true, display: 0 }
    }

    fn take(&mut self, spec: &DeviceSpec) -> Result<u8, DeviceError> {
        if let Some(devfn) = address(spec)? {
            if self.port {
                if devfn >> 3 != 0 {
                    return Err(DeviceError::Config(format!(
                        "PCI: slot {} is not valid for {}, parent device only allows plugging into slot 0.",
                        devfn >> 3,
                        spec.driver
                    )));
                }
                if std::mem::replace(&mut self.used[usize::from(devfn)], true) {
                    return Err(in_use(devfn, &spec.driver));
                }
            }
            return Ok(devfn);
        }
        // The display's slot stays its own even on a machine without one, so that a slot does not depend on it.
        let range = match (self.port, VGA_CARDS.iter().any(|(model, _)| spec.driver == *model)) {
            (true, _) => 0..1,
            (false, true) => self.display..32,
            (false, false) => self.display + 1..32,
        };
        let free = range.into_iter().find(|s| self.used[8 * s..8 * s + 8].iter().all(|u| !u));
        let slot = free.ok_or_else(|| {
            DeviceError::Config(format!("PCI: no slot/function available for {}, all in use", spec.driver))
        })?;
        self.used[8 * slot] = true;
        Ok((slot * 8) as u8)
    }
}

/// The bus that a device names, or the root bus.
fn find_bus(buses: &[Bus], spec: &DeviceSpec) -> Result<usize, DeviceError> {
    let Some(name) = spec.properties.get("bus") else { return Ok(0) };
    let found = buses.iter().position(|b| b.name == *name);
    found.ok_or_else(|| DeviceError::Config(format!("Bus '{name}' not found")))
}

/// The bus behind a bridge that is built at place `at` of the devices.
fn behind(buses: &[Bus], b: &Build, at: u16) -> Result<Bus, DeviceError> {
    let name = b.spec.id.clone().unwrap_or_else(|| format!("pcie-port.{}", buses.len()));
    if buses.iter().any(|other| other.name == name) {
        return Err(DeviceError::Config(format!("there can be only one bus '{name}'")));
    }
    let bus = u8::try_from(buses.len()).map_err(|_| DeviceError::Config("too many PCI buses".into()))?;
    let bridges = std::iter::once(b.devfn).chain(b.place.bridges.iter().copied()).collect();
    Ok(Bus {
        name,
        place: Place { bus, bridges },
        parent: b.place.bus.into(),
        bridge: Some(at),
        hotplug: b.flag("hotplug", true),
        functions: vec![NONE; 256],
    })
}

/// The drives of the board's controller, by channel and unit: IDE has two channels of two, AHCI six ports of one.
fn ide_drives(config: &PcConfig, order: &mut BootOrder) -> Result<Vec<Option<DriveSpec>>, DeviceError> {
    let (channels, units) = if config.is_q35() { (ahci::PORTS, 1) } else { (2, 2) };
    let mut places = vec![None; channels * units];
    let wrong = |text: String| Err(DeviceError::Config(text));
    for spec in &config.devices {
        let model = registry::model(&spec.driver)?;
        if model.attach != Attach::Ide {
            continue;
        }
        model.check(spec)?;
        let b = Build { config, spec, devfn: 0, place: Place::default() };
        let bus = match b.text("bus") {
            None => None,
            Some(name) => {
                let found = (0..channels).find(|n| name == format!("ide.{n}"));
                Some(found.ok_or_else(|| DeviceError::Config(format!("Bus '{name}' not found")))?)
            }
        };
        let unit = match b.text("unit") {
            None => None,
            Some(_) => Some(b.number("unit", 0)? as usize),
        };
        let fits =
            |place: usize| bus.is_none_or(|b| place / units == b) && unit.is_none_or(|u| place % units == u);
        let free = (0..places.len()).find(|&p| fits(p) && places[p].is_none());
        let Some(place) = free else {
            return match (bus, unit) {
                (Some(bus), Some(unit)) if unit < units => {
                    wrong(format!("IDE unit {unit} is in use (bus ide.{bus})"))
                }
                (_, Some(unit)) if unit >= units => {
                    wrong(format!("Can't create IDE unit {unit}, bus supports only {units} units"))
                }
                _ => wrong("No free IDE unit".into()),
            };
        };
        let mut drive = match (spec.driver.as_str(), spec.drive) {
            // A CD drive may be empty.
            ("ide-cd", None) => DriveSpec { index: u32::MAX, ..DriveSpec::default() },
            _ => b.drive()?,
        };
        drive.cdrom = spec.driver == "ide-cd";
        let (channel, unit) = (place / units, place % units);
        drive.device = spec.id.clone().unwrap_or_else(|| format!("ide{channel}-{unit}"));
        if drive.serial.is_empty() {
            drive.serial = format!("QM{:05}", 2 * channel + unit + 1);
        }
        if b.text("bootindex").is_some() {
            let controller = if config.is_q35() { "pci8086,2922@1f,2" } else { "ide@1,1" };
            let path = format!("/pci@i0cf8/{controller}/drive@{channel}/disk@{unit}");
            order.insert(b.number("bootindex", 0)?, path)?;
        }
        places[place] = Some(drive);
    }
    Ok(places)
}

/// The `addr` property as device and function number.
fn address(spec: &DeviceSpec) -> Result<Option<u8>, DeviceError> {
    let Some(text) = spec.properties.get("addr") else { return Ok(None) };
    let hex = |t: &str| u8::from_str_radix(t.strip_prefix("0x").unwrap_or(t), 16).ok();
    let parsed = match text.split_once('.') {
        Some((slot, function)) => hex(slot).zip(hex(function)),
        None => hex(text).map(|s| (s, 0)),
    };
    match parsed {
        Some((slot @ 0..=31, function @ 0..=7)) => Ok(Some(slot << 3 | function)),
        _ => Err(DeviceError::BadValue {
            model: spec.driver.clone(),
            property: "addr".into(),
            value: text.clone(),
        }),
    }
}

/// What the CMOS holds for firmware (the RTC's own registers aside).
fn cmos(config: &PcConfig, mem: &GuestMemory, disks: &[Option<DriveSpec>]) -> Vec<(u8, u8)> {
    let low = mem.low_ram_size();
    let high = mem.ram_size() - low;
    let word = |at: u8, v: u64| [(at, v as u8), (at + 1, (v >> 8) as u8)];
    let mut out = Vec::new();
    out.extend(word(0x15, 640));
    let above_1m = ((low >> 10).saturating_sub(1024)).min(65_535);
    out.extend(word(0x17, above_1m));
    out.extend(word(0x30, above_1m));
    out.extend(word(0x34, (low.saturating_sub(16 << 20) >> 16).min(65_535)));
    out.extend([(0x5B, (high >> 16) as u8), (0x5C, (high >> 24) as u8), (0x5D, (high >> 32) as u8)]);
    out.push((0x5F, (config.cpus - 1) as u8));
    // FPU and PS/2 mouse; no floppy drive.
    out.push((0x14, 0x06));
    let codes: Vec<u8> = config
        .boot_order
        .chars()
        .filter_map(|c| match c {
            'a' | 'b' => Some(1),
            'c' => Some(2),
            'd' => Some(3),
            'n'..='p' => Some(4),
            _ => None,
        })
        .collect();
    let code = |i: usize| codes.get(i).copied().unwrap_or(0);
    out.push((0x3D, code(1) << 4 | code(0)));
    // Geometry translation of the IDE disks, two bits each: LBA for what CHS cannot reach.
    let mut translation = 0;
    for (place, drive) in disks.iter().enumerate().filter(|_| !config.is_q35()) {
        if drive.as_ref().is_some_and(|d| !d.cdrom && d.size_bytes > 1024 * 16 * 63 * 512) {
            translation |= 1 << (2 * place);
        }
    }
    out.push((0x39, translation));
    // The low bit skips the check of a floppy's signature.
    out.push((0x38, code(2) << 4));
    out
}

/// Devices with a `bootindex`, as Open Firmware paths.
#[derive(Default)]
struct BootOrder {
    entries: Vec<(u64, String)>,
}

impl BootOrder {
    fn add(&mut self, b: &Build) -> Result<(), DeviceError> {
        let unit = |devfn: u8| match (devfn >> 3, devfn & 7) {
            (slot, 0) => format!("{slot:x}"),
            (slot, function) => format!("{slot:x},{function:x}"),
        };
        let bridges = b.place.bridges.iter().rev().map(|d| format!("/pci-bridge@{}", unit(*d)));
        let (bridges, at): (String, _) = (bridges.collect(), unit(b.devfn));
        if registry::base_name(&b.spec.driver) == "virtio-scsi-pci" {
            for (spec, unit) in crate::scsi::units(b.config, b.spec)? {
                let b = Build { config: b.config, spec, devfn: 0, place: Place::default() };
                if b.text("bootindex").is_some() {
                    let place = format!("channel@0/disk@{:x},{:x}", unit.target, unit.lun);
                    let path = format!("/pci@i0cf8{bridges}/scsi@{at}/{place}");
                    self.insert(b.number("bootindex", 0)?, path)?;
                }
            }
        }
        for (port, spec) in usb::served(b.config, b.spec) {
            let b = Build { config: b.config, spec, devfn: 0, place: Place::default() };
            if b.text("bootindex").is_some() {
                let path = format!("/pci@i0cf8{bridges}/usb@{at}/storage@{}/channel@0/disk@0,0", port + 1);
                self.insert(b.number("bootindex", 0)?, path)?;
            }
        }
        if b.text("bootindex").is_none() {
            return Ok(());
        }
        let index = b.number("bootindex", 0)?;
        let path = match registry::base_name(&b.spec.driver) {
            "virtio-blk-pci" => format!("/pci@i0cf8{bridges}/scsi@{at}/disk@0,0"),
            _ => format!("/pci@i0cf8{bridges}/ethernet@{at}/ethernet-phy@0"),
        };
        self.insert(index, path)
    }

    fn insert(&mut self, index: u64, path: String) -> Result<(), DeviceError> {
        if self.entries.iter().any(|(i, _)| *i == index) {
            return Err(DeviceError::Config(format!("The bootindex {index} has already been used")));
        }
        self.entries.push((index, path));
        Ok(())
    }
}

/// Everything firmware is told through fw_cfg.
fn firmware_config(
    config: &PcConfig,
    mem: &GuestMemory,
    order: BootOrder,
    buses: &[Bus],
) -> Result<FwCfg, DeviceError> {
    let mut fw = FwCfg::default();
    let low = mem.low_ram_size();
    fw.item(fwcfg::UUID, config.uuid);
    fw.item(fwcfg::RAM_SIZE, mem.ram_size().to_le_bytes());
    fw.item(fwcfg::NOGRAPHIC, u16::from(config.nographic).to_le_bytes());
    fw.item(fwcfg::NB_CPUS, (config.cpus as u16).to_le_bytes());
    fw.item(fwcfg::MAX_CPUS, (config.cpus as u16).to_le_bytes());
    fw.item(fwcfg::BOOT_MENU, u16::from(config.boot_menu).to_le_bytes());
    fw.item(fwcfg::IRQ0_OVERRIDE, 1u32.to_le_bytes());
    // No NUMA nodes; one word of affinity for each processor.
    fw.item(fwcfg::NUMA, vec![0; 8 * (1 + config.cpus as usize)]);

    let mut e820 = Vec::new();
    for (start, len) in mem.ram_ranges() {
        e820.extend(start.to_le_bytes());
        e820.extend(len.to_le_bytes());
        e820.extend(1u32.to_le_bytes());
    }
    fw.file("etc/e820", e820);
    // S3 and S4 are not offered; S4's value is 2.
    fw.file("etc/system-states", [0x80, 0, 0, 1, 2, 0x80]);
    if config.nographic {
        fw.file("etc/sercon-port", 0x3F8u16.to_le_bytes());
    }
    if let Some(ms) = config.boot_splash_time {
        fw.file("etc/boot-menu-wait", (ms.min(65_535) as u16).to_le_bytes());
    }

    let mut paths: Vec<(u64, String)> = order.entries;
    paths.sort();
    let mut paths: Vec<String> = paths.into_iter().map(|(_, p)| p).collect();
    if let Some(kernel) = &config.kernel {
        boot::install(kernel, low, &mut fw)?;
        paths.insert(0, boot::BOOT_PATH.into());
    }
    if config.boot_strict {
        paths.push("HALT".into());
    }
    if !paths.is_empty() {
        let mut text = paths.join("\n").into_bytes();
        text.push(0);
        fw.file("bootorder", text);
    }

    let pvpanic = config.devices.iter().find(|d| d.driver == "pvpanic");
    let pvpanic = match pvpanic {
        Some(spec) => Some(Build { config, spec, devfn: 0, place: Place::default() }.port("ioport", 0x505)?),
        None => None,
    };
    let mut serial = [false; 4];
    config.serial_ports.iter().for_each(|s| serial[s.index as usize & 3] = true);
    // Ports whose slots can be filled and emptied: the bus, and where its bridge is on the root bus.
    let ports = buses.iter().filter(|b| b.hotplug && b.place.bridges.len() == 1);
    let ports = ports.map(|b| (b.place.bus, b.place.bridges[0])).collect();
    let board = acpi::Acpi {
        cpus: config.cpus,
        low_ram: low,
        hpet: config.hpet,
        pvpanic,
        serial,
        q35: config.is_q35(),
        ports,
    };
    acpi::install(&board, &mut fw);
    let machine = if config.machine.is_empty() { "pc-i440fx-7.2" } else { &config.machine };
    smbios::install(&mut fw, machine, &config.uuid, config.cpus, mem.ram_size());
    fw.seal();
    Ok(fw)
}
