//! Devices that come and go while the machine runs, and what of the machine its users may look at.

use ftvm_accel::mem::GuestMemory;
use serde::{Deserialize, Serialize};

use super::saved::{gone, CHANGES_SECTION};
use super::{address, find_bus, in_use, Mapped, Pc, Slots, MAX_DEVICES, NONE};
use crate::audio::hda;
use crate::config::DeviceSpec;
use crate::ctx::{Ctx, Device, DeviceError};
use crate::door::{GuestEvent, Output, Plug};
use crate::pci::Bar;
use crate::registry::{self, Attach, Build};
use crate::usb;

/// A device that a user named, and where it is.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub spec: DeviceSpec,
    /// Its PCI bus among the machine's.
    pub bus: usize,
    pub devfn: Option<u8>,
    /// Its place among the devices; drives of the IDE controller have none.
    pub device: Option<u16>,
    /// What came with it, if it was plugged into the running machine.
    pub plug: Option<Plug>,
}

/// What the machine's users may know of a device.
#[derive(Clone, Debug)]
pub struct Inventory {
    pub spec: DeviceSpec,
    pub devfn: Option<u8>,
    /// The name of its bus.
    pub bus: String,
    /// It was plugged in after the start.
    pub hotplugged: bool,
    /// What the model itself tells (see [`Device::facts`]).
    pub facts: Vec<(String, i64)>,
}

/// A PCI function as the guest has set it up.
#[derive(Clone, Debug)]
pub struct FunctionView {
    /// The number of its bus, if the guest has given it one.
    pub bus: Option<u8>,
    pub devfn: u8,
    /// Configuration space.
    pub config: Vec<u8>,
    pub bars: [Bar; 6],
    /// The id of the user's device.
    pub id: Option<String>,
}

/// Start, length and device of a window of I/O ports or memory.
pub type WindowView = (u64, u64, String);

/// What was plugged in and pulled since the start: other machines of the same configuration become equal by it.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Changes {
    plugged: Vec<(u16, Plug)>,
    /// Devices that are gone, by their place.
    gone: Vec<u16>,
    /// Devices behind controllers, which have no place of their own.
    children: Vec<Plug>,
    /// Those of the configuration that are gone, by their ids.
    lost: Vec<String>,
}

/// Whether a device has its place behind another one and can come and go there.
pub(super) fn is_child(spec: &DeviceSpec) -> bool {
    registry::model(&spec.driver).is_ok_and(|m| matches!(m.attach, Attach::Scsi | Attach::Usb))
}

impl Changes {
    /// Where things were plugged in.
    pub fn places(&self) -> impl Iterator<Item = u16> + '_ {
        self.plugged.iter().map(|(at, _)| *at)
    }

    /// What was plugged in and pulled behind controllers.
    pub fn take_children(&mut self) -> (Vec<Plug>, Vec<String>) {
        (std::mem::take(&mut self.children), std::mem::take(&mut self.lost))
    }

    /// What was plugged in and where, and whether something was pulled.
    pub fn into_parts(self) -> (Vec<(u16, Plug)>, bool) {
        (self.plugged, !self.gone.is_empty())
    }
}

/// The place of a device that is gone.
struct Gone(String);

impl Device for Gone {
    fn name(&self) -> &str {
        &self.0
    }
    fn reset(&mut self, _ctx: &mut Ctx) {}
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn load(&mut self, _data: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Pc {
    /// Put a new device in; it has been checked by [`Self::check_plug`], so that it fits on every replica alike.
    pub(super) fn plug(&mut self, mem: &GuestMemory, now: u64, plug: &Plug) {
        match self.build_plug(plug) {
            Ok(device) => {
                let at = self.devices.len() as u16;
                self.devices.push(device);
                self.enter(at, plug);
                self.with(mem, now, at, |d, ctx| d.reset(ctx));
                self.board.remap = true;
                let (bus, slot) = (self.users.last().map_or(0, |u| u.bus as u8), plug.devfn >> 3);
                self.with(mem, now, self.pm, |d, ctx| d.announce(ctx, bus, slot));
            }
            Err(e) => log::error!("hot-plug of {}: {e}", plug.spec.driver),
        }
    }

    pub(super) fn build_plug(&mut self, plug: &Plug) -> Result<Box<dyn Device>, DeviceError> {
        let model = registry::model(&plug.spec.driver)?;
        model.check(&plug.spec)?;
        model.check_bus(&plug.spec, &self.config)?;
        if is_child(&plug.spec) {
            return Err(DeviceError::Config(format!("{} has no place of its own", plug.spec.driver)));
        }
        let fixed = |bus: &str| DeviceError::Config(format!("Bus '{bus}' does not support hotplugging"));
        let Some(build) = model.build.filter(|_| model.attach == Attach::Pci) else {
            // QEMU names the bus that there is.
            let codecs = hda::controller(&self.config, &plug.spec).and_then(|c| c.id.clone());
            let bus = codecs.filter(|_| model.attach == Attach::Hda).map(|id| format!("{id}.0"));
            return Err(fixed(&bus.unwrap_or_else(|| model.bus(self.config.root_bus()))));
        };
        let bus = &self.buses[find_bus(&self.buses, &plug.spec)?];
        if !bus.hotplug {
            return Err(fixed(&bus.name));
        }
        if ["Bridge", "Display"].contains(&model.category) {
            let text = "Parameter 'driver' expects a pluggable device type";
            return Err(DeviceError::Config(text.into()));
        }
        let place = bus.place.clone();
        if let Some(drive) = &plug.drive {
            self.config.drives.retain(|d| d.index != drive.index);
            self.config.drives.push(drive.clone());
        }
        if let Some(nic) = &plug.nic {
            self.config.nics.retain(|n| n.index != nic.index);
            self.config.nics.push(nic.clone());
        }
        // What is behind it finds it there.
        self.config.devices.push(plug.spec.clone());
        let spec = self.config.devices.last().unwrap_or(&plug.spec);
        let b = Build { config: &self.config, spec, devfn: plug.devfn, place };
        let built = build(&b).map(|device| b.finish(device));
        let device = built.inspect_err(|_| drop(self.config.devices.pop()))?;
        if self.devices.iter().any(|d| d.name() == device.name()) || self.devices.len() >= MAX_DEVICES {
            self.config.devices.pop();
            return Err(DeviceError::Config(format!("there can be only one device '{}'", device.name())));
        }
        Ok(device)
    }

    pub(super) fn enter(&mut self, at: u16, plug: &Plug) {
        let place = self.devices[usize::from(at)].pci().map_or(0, |p| p.place().bus);
        let bus = usize::from(place);
        self.buses[bus].functions[usize::from(plug.devfn)] = at;
        self.note_presence(bus);
        self.users.push(User {
            spec: plug.spec.clone(),
            bus,
            devfn: Some(plug.devfn),
            device: Some(at),
            plug: Some(plug.clone()),
        });
    }

    /// Whether a device could be plugged in, and where: its device and function number, a USB device's port.
    pub fn check_plug(&mut self, plug: &Plug) -> Result<u8, DeviceError> {
        if plug.spec.id.is_some() && self.users.iter().any(|u| u.spec.id == plug.spec.id) {
            let id = plug.spec.id.as_deref().unwrap_or_default();
            return Err(DeviceError::Config(format!("Duplicate device ID '{id}'")));
        }
        let model = registry::model(&plug.spec.driver)?;
        if is_child(&plug.spec) {
            model.check(&plug.spec)?;
            model.check_bus(&plug.spec, &self.config)?;
            let mut with = self.config.clone();
            with.devices.push(plug.spec.clone());
            with.drives.extend(plug.drive.clone());
            if model.attach == Attach::Usb {
                return usb::check(&with, &plug.spec);
            }
            if let Some(controller) = crate::scsi::controller(&with, &plug.spec) {
                crate::scsi::units(&with, controller)?;
            }
            return Ok(0);
        }
        // Only PCI devices name a PCI bus.
        let bus = if model.attach == Attach::Pci { find_bus(&self.buses, &plug.spec)? } else { 0 };
        let mut slots = if bus == 0 { Slots::board(&self.config) } else { Slots::port() };
        for devfn in self.users.iter().filter(|u| u.bus == bus).filter_map(|u| u.devfn) {
            slots.used[usize::from(devfn)] = true;
        }
        if let Some(devfn) = address(&plug.spec)? {
            if slots.used[usize::from(devfn)] {
                return Err(in_use(devfn, &plug.spec.driver));
            }
        }
        let devfn = if model.attach == Attach::Pci { slots.take(&plug.spec)? } else { 0 };
        let before = self.config.clone();
        let built = self.build_plug(&Plug { devfn, ..plug.clone() });
        self.config = before;
        built.map(|_| devfn)
    }

    /// Whether the device with this id can be pulled.
    pub fn check_unplug(&self, id: &str) -> Result<(), DeviceError> {
        let user = self.users.iter().find(|u| u.spec.id.as_deref() == Some(id));
        let user = user.ok_or_else(|| DeviceError::NoDevice(id.to_owned()))?;
        match registry::model(&user.spec.driver)?.attach {
            Attach::Scsi | Attach::Usb => Ok(()),
            Attach::Pci if self.buses[user.bus].hotplug => Ok(()),
            Attach::Pci => {
                let text = format!("Bus '{}' does not support hotplugging", self.buses[user.bus].name);
                Err(DeviceError::Config(text))
            }
            Attach::Isa => Err(DeviceError::Config("Bus 'isa.0' does not support hotplugging".into())),
            _ => Err(DeviceError::Config(format!("Device '{id}' cannot be pulled from its bus"))),
        }
    }

    /// The guest let go of a slot: what was in it is gone.
    pub(super) fn eject(&mut self, mem: &GuestMemory, now: u64, bus: usize, slot: u8) {
        if !self.buses.get(bus).is_some_and(|b| b.hotplug) {
            return;
        }
        for devfn in slot << 3..=(slot << 3 | 7) {
            let at = self.buses[bus].functions[usize::from(devfn)];
            let here = |u: &User| u.bus == bus && u.devfn == Some(devfn) && u.device == Some(at);
            let Some(i) = self.users.iter().position(here) else { continue };
            self.with(mem, now, at, |d, ctx| d.reset(ctx));
            let user = self.users.remove(i);
            while let Some(child) = self.behind(&user.spec) {
                self.remove_child(child, true);
            }
            self.config.devices.retain(|d| *d != user.spec);
            self.devices[usize::from(at)] = Box::new(Gone(gone(usize::from(at))));
            self.buses[bus].functions[usize::from(devfn)] = NONE;
            self.note_presence(bus);
            self.board.s.timers.retain(|(d, _), _| *d != at);
            self.board.find_deadline();
            self.board.remap = true;
            let event = GuestEvent::DeviceDeleted { spec: Box::new(user.spec) };
            self.board.s.outputs.push(Output::Event(event));
        }
    }

    /// A device that goes with a controller, by its place among the users'.
    fn behind(&self, controller: &DeviceSpec) -> Option<usize> {
        let of = |spec: &DeviceSpec| match registry::model(&spec.driver).map(|m| m.attach) {
            Ok(Attach::Usb) => usb::controller(&self.config, spec),
            Ok(Attach::Scsi) => crate::scsi::controller(&self.config, spec),
            Ok(Attach::Hda) => hda::controller(&self.config, spec),
            _ => None,
        };
        self.users.iter().position(|u| of(&u.spec) == Some(controller))
    }

    /// Tell the port in front of a bus whether there is something in its slot.
    pub(super) fn note_presence(&mut self, bus: usize) {
        let present = self.buses[bus].functions.iter().any(|f| *f != NONE);
        if let Some(bridge) = self.buses[bus].bridge {
            if let Some(pci) = self.devices[usize::from(bridge)].pci_mut() {
                pci.set_present(present);
            }
        }
    }

    /// The devices that users named, in order.
    pub fn inventory(&self) -> Vec<Inventory> {
        let one = |u: &User| Inventory {
            spec: u.spec.clone(),
            devfn: u.devfn,
            bus: match (registry::model(&u.spec.driver), u.spec.properties.get("bus")) {
                (_, Some(name)) => name.clone(),
                (Ok(model), None) => model.bus(self.config.root_bus()),
                (Err(_), None) => String::new(),
            },
            hotplugged: u.plug.is_some(),
            facts: u.device.map_or(Vec::new(), |d| self.devices[usize::from(d)].facts()),
        };
        self.users.iter().map(one).collect()
    }

    /// All PCI functions, in order.
    pub fn pci_functions(&self) -> Vec<FunctionView> {
        let mut out = Vec::new();
        for (bus, b) in self.buses.iter().enumerate() {
            let number = match b.bridge {
                None => Some(0),
                Some(d) => self.devices[usize::from(d)].pci().and_then(|p| Some(*p.bus_numbers()?.start())),
            };
            for (devfn, at) in b.functions.iter().enumerate() {
                let Some(pci) = self.devices.get(usize::from(*at)).and_then(|d| d.pci()) else { continue };
                let user = self.users.iter().find(|u| u.bus == bus && u.devfn == Some(devfn as u8));
                out.push(FunctionView {
                    bus: number,
                    devfn: devfn as u8,
                    config: pci.config().to_vec(),
                    bars: pci.bars(),
                    id: user.and_then(|u| u.spec.id.clone()),
                });
            }
        }
        out
    }

    /// The I/O and memory windows that devices decode now: start, length, device.
    pub fn windows(&self) -> (Vec<WindowView>, Vec<WindowView>) {
        let list = |maps: &[Mapped]| {
            let one = |m: &Mapped| (m.start, m.len, self.devices[usize::from(m.device)].name().to_owned());
            let mut out: Vec<_> = maps.iter().map(one).collect();
            out.sort();
            out
        };
        (list(&self.port_maps), list(&self.memory_maps))
    }

    pub(super) fn changes(&self) -> Changes {
        let is_gone = |i: &usize| self.devices[*i].name() == gone(*i);
        let lost: Vec<u16> = (0..self.devices.len()).filter(is_gone).map(|i| i as u16).collect();
        let plugged = |u: &User| Some((u.device?, u.plug.clone()?));
        let child = |u: &&User| is_child(&u.spec);
        Changes {
            plugged: self.users.iter().filter_map(plugged).collect(),
            gone: lost,
            children: self.users.iter().filter(child).filter_map(|u| u.plug.clone()).collect(),
            lost: self.lost.clone(),
        }
    }

    /// Put a device in behind its controller.
    pub(super) fn plug_child(&mut self, plug: &Plug, tell: bool) {
        if let Some(drive) = &plug.drive {
            self.config.drives.retain(|d| d.index != drive.index);
            self.config.drives.push(drive.clone());
        }
        self.config.devices.push(plug.spec.clone());
        self.users.push(User {
            spec: plug.spec.clone(),
            bus: 0,
            devfn: None,
            device: None,
            plug: Some(plug.clone()),
        });
        self.rescan(tell);
    }

    /// Take one out, if it is one.
    pub(super) fn unplug_child(&mut self, id: &str) -> bool {
        let here = |u: &User| u.spec.id.as_deref() == Some(id) && is_child(&u.spec);
        let Some(i) = self.users.iter().position(here) else { return false };
        self.remove_child(i, true);
        true
    }

    fn remove_child(&mut self, i: usize, tell: bool) {
        let user = self.users.remove(i);
        self.config.devices.retain(|d| *d != user.spec);
        if user.plug.is_none() {
            self.lost.extend(user.spec.id.clone());
        }
        self.rescan(tell);
        if tell {
            let event = GuestEvent::DeviceDeleted { spec: Box::new(user.spec) };
            self.board.s.outputs.push(Output::Event(event));
        }
    }

    fn rescan(&mut self, tell: bool) {
        for device in &mut self.devices {
            device.rescan(&self.config, tell);
        }
    }

    /// Become what another machine of this configuration is behind its controllers.
    pub(super) fn follow_children(&mut self, (plugged, lost): (Vec<Plug>, Vec<String>)) {
        for id in lost {
            // With their controllers others go, too, than those that go by themselves.
            if let Some(i) = self.users.iter().position(|u| u.spec.id.as_ref() == Some(&id)) {
                self.remove_child(i, false);
            }
        }
        for plug in plugged {
            // It may be part of this machine's configuration.
            if !self.users.iter().any(|u| u.spec.id.is_some() && u.spec.id == plug.spec.id) {
                self.plug_child(&plug, false);
            }
        }
    }

    /// Plug and pull what another machine of this configuration has seen plugged and pulled.
    pub(super) fn follow(&mut self, changes: Changes) -> Result<(), DeviceError> {
        let misfit = || DeviceError::Misfit(CHANGES_SECTION.into());
        let last = changes.plugged.iter().map(|(at, _)| *at).chain(changes.gone.iter().copied()).max();
        if last.is_some_and(|l| usize::from(l) >= MAX_DEVICES) {
            return Err(misfit());
        }
        while last.is_some_and(|l| usize::from(l) >= self.devices.len()) {
            let name = gone(self.devices.len());
            self.devices.push(Box::new(Gone(name)));
        }
        for at in changes.gone {
            self.pull(at)?;
        }
        for (at, plug) in changes.plugged {
            if self.users.iter().any(|u| u.device == Some(at)) {
                return Err(misfit());
            }
            self.devices[usize::from(at)] = self.build_plug(&plug)?;
            self.enter(at, &plug);
        }
        Ok(())
    }

    /// Take out what is in a place.
    pub(super) fn pull(&mut self, at: u16) -> Result<(), DeviceError> {
        if let Some(i) = self.users.iter().position(|u| u.device == Some(at)) {
            let user = self.users.remove(i);
            self.config.devices.retain(|d| *d != user.spec);
            let devfn = usize::from(user.devfn.ok_or_else(|| DeviceError::Misfit(CHANGES_SECTION.into()))?);
            self.buses[user.bus].functions[devfn] = NONE;
            self.note_presence(user.bus);
        }
        self.devices[usize::from(at)] = Box::new(Gone(gone(usize::from(at))));
        Ok(())
    }
}
