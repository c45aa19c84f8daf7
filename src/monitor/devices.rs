//! Hot-plug of devices and objects, and the balloon.

use std::collections::BTreeMap;

use ftvm_devices::registry::{self, Attach, Kind};
use ftvm_devices::{DeviceSpec, DriveSpec, Input, NicSpec, Plug};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::{done, qom, types, Control, Reply};
use crate::assembly::open_net;
use crate::cli::keyval::Params;
use crate::cli::net::{NetKind, NetdevConfig};
use crate::cli::secret::SecretProperties;
use crate::host::backends::Nic;
use crate::host::net_receiver;
use crate::machine::MachineInput;
use crate::runtime::live::Runtime;

/// Whether a text can be an id.
pub fn is_identifier(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(fits)
}

/// An id that is given must be one.
pub fn check_id(id: &str) -> Result<(), QmpError> {
    if is_identifier(id) {
        return Ok(());
    }
    Err(QmpError::generic("Parameter 'id' expects an identifier"))
}

/// A property's value as the command line would have it.
fn text_of(value: &Value) -> Option<String> {
    Some(match value {
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        _ => return None,
    })
}

/// The specification of a device from a command's arguments.
fn specification(arguments: &Map<String, Value>) -> Result<DeviceSpec, QmpError> {
    let mut spec = DeviceSpec::default();
    for (key, value) in arguments {
        let text = text_of(value).ok_or_else(|| {
            QmpError::generic(format!("Invalid parameter type for '{key}', expected: string"))
        })?;
        match key.as_str() {
            "driver" => spec.driver = text,
            "id" => {
                check_id(&text)?;
                spec.id = Some(text);
            }
            _ => {
                spec.properties.insert(key.clone(), text);
            }
        }
    }
    let model = registry::model(&spec.driver).map_err(|e| QmpError::generic(e.to_string()))?;
    model.check(&spec).map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(spec)
}

/// The property of a model that names a back end of this kind, and its value.
fn named(spec: &DeviceSpec, kind: Kind) -> Option<(&'static str, &str)> {
    let model = registry::model(&spec.driver).ok()?;
    let (name, ..) = model.all_properties().into_iter().find(|(_, k, _)| *k == kind)?;
    Some((name, spec.properties.get(name)?))
}

fn cannot_find(spec: &DeviceSpec, property: &str, name: &str) -> QmpError {
    let owner = types::backend_type(&spec.driver).unwrap_or_else(|| spec.driver.clone());
    QmpError::generic(format!("Property '{owner}.{property}' can't find value '{name}'"))
}

fn in_use(spec: &DeviceSpec, property: &str, name: &str) -> QmpError {
    let owner = types::backend_type(&spec.driver).unwrap_or_else(|| spec.driver.clone());
    QmpError::generic(format!("Property '{owner}.{property}' can't take value '{name}', it's in use"))
}

/// Find the drive behind a device.
fn find_drive(rt: &mut Runtime, spec: &mut DeviceSpec) -> Result<Option<DriveSpec>, QmpError> {
    let Some((property, name)) = named(spec, Kind::Drive).map(|(p, n)| (p, n.to_owned())) else {
        return Ok(None);
    };
    let backends = rt.shared.backends();
    let index = backends.drive(&name).ok_or_else(|| cannot_find(spec, property, &name))?;
    let used = rt.machine.chipset().inventory().iter().any(|i| i.spec.drive == Some(index as u32));
    if used {
        return Err(in_use(spec, property, &name));
    }
    spec.drive = Some(index as u32);
    let config = backends.drives[index].clone();
    drop(backends);
    super::block::ensure_open(rt, index)?;
    let size = rt.outside.disk_counters(index).map_or(0, |c| c.size);
    Ok(config.map(|d| DriveSpec {
        index: index as u32,
        size_bytes: size,
        read_only: d.read_only,
        has_medium: true,
        serial: d.serial.unwrap_or_default(),
        logical_block_size: 512,
        ..DriveSpec::default()
    }))
}

/// Find the network back end behind a device.
fn find_nic(rt: &Runtime, spec: &mut DeviceSpec) -> Result<Option<(NicSpec, NetdevConfig)>, QmpError> {
    let Some((property, name)) = named(spec, Kind::Netdev).map(|(p, n)| (p, n.to_owned())) else {
        return Ok(None);
    };
    let backends = rt.shared.backends();
    let dev = backends.netdevs.iter().find(|n| n.id == name).cloned();
    let dev = dev.ok_or_else(|| cannot_find(spec, property, &name))?;
    if backends.nics.iter().flatten().any(|n| n.netdev == name) {
        return Err(in_use(spec, property, &name));
    }
    let index = backends.nics.len();
    let mac = match spec.properties.get("mac").and_then(|m| registry::parse_mac(m)) {
        Some(mac) => mac,
        None => (0x56u8..=0xFF)
            .map(|last| [0x52, 0x54, 0, 0x12, 0x34, last])
            .find(|m| !backends.nics.iter().flatten().any(|n| n.mac == *m))
            .unwrap_or([0x52, 0x54, 0, 0x12, 0x35, index as u8]),
    };
    spec.nic = Some(index as u32);
    Ok(Some((NicSpec { index: index as u32, mac }, dev)))
}

/// Open a network back end for a card that is plugged in; a descriptor stays open for the next card.
fn open_hot(dev: &NetdevConfig, index: usize, rt: &Runtime) -> Result<(), QmpError> {
    let mut dev = dev.clone();
    if let NetKind::Tap { fd: Some(fd), .. } = &mut dev.kind {
        // SAFETY: dup takes any number and says whether it is a descriptor.
        *fd = unsafe { libc::dup(*fd) };
    }
    let net = open_net(&dev, net_receiver(index as u32, rt.events.clone()))
        .map_err(|e| QmpError::generic(e.to_string()))?;
    rt.outside.attach_net(index, net);
    Ok(())
}

/// Plug a device into the running machine.
pub fn plug(rt: &mut Runtime, mut spec: DeviceSpec) -> Result<(), QmpError> {
    let drive = find_drive(rt, &mut spec)?;
    let nic = find_nic(rt, &mut spec)?;
    if let Some(rng) = spec.properties.get("rng") {
        if !rt.shared.backends().objects.iter().any(|(_, id)| id == rng) {
            return Err(QmpError::device_not_found(rng));
        }
    }
    if spec.properties.contains_key("chardev") {
        return Err(QmpError::generic("devices with a chardev cannot be plugged into a running machine"));
    }
    let mut plug = Plug { spec, devfn: 0, drive, nic: nic.as_ref().map(|(n, _)| n.clone()) };
    plug.devfn = rt.machine.check_plug(&plug).map_err(QmpError::generic)?;
    // Every replica puts it in the same place.
    match registry::model(&plug.spec.driver).map(|m| m.attach) {
        Ok(Attach::Pci) => {
            let place = format!("{:x}.{:x}", plug.devfn >> 3, plug.devfn & 7);
            plug.spec.properties.insert("addr".into(), place);
        }
        Ok(Attach::Usb) => {
            plug.spec.properties.insert("port".into(), plug.devfn.to_string());
        }
        _ => {}
    }
    if let Some((nic, dev)) = nic {
        open_hot(&dev, nic.index as usize, rt)?;
        let mut backends = rt.shared.backends();
        backends.nics.push(Some(Nic { netdev: dev.id, mac: nic.mac }));
    }
    note(rt);
    rt.input(MachineInput::Device(Input::Plug(Box::new(plug))));
    Ok(())
}

/// Let the other hosts of the machine know of this host's back ends.
pub fn note(rt: &mut Runtime) {
    let note = rt.shared.backends().to_note();
    rt.input(MachineInput::Note(note));
}

pub fn add(c: &Control, call: &mut Call) -> Reply {
    let spec = specification(call.arguments)?;
    c.change(move |rt| {
        plug(rt, spec)?;
        done()
    })
}

pub fn del(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("id").trim_start_matches("/machine/peripheral/").to_owned();
    c.change(move |rt| {
        rt.machine.chipset().check_unplug(&id).map_err(|e| match e {
            e if e.ends_with("not found") => QmpError { class: "DeviceNotFound", desc: e },
            e => QmpError::generic(e),
        })?;
        rt.input(MachineInput::Device(Input::Unplug { id }));
        done()
    })
}

/// The guest let go of a device: close what was behind it and tell the monitors.
pub fn deleted(rt: &mut Runtime, spec: &DeviceSpec) {
    if let Some(nic) = spec.nic {
        rt.outside.detach_net(nic as usize);
        if let Some(slot) = rt.shared.backends().nics.get_mut(nic as usize) {
            *slot = None;
        }
    }
    let path = qom::device_path(spec, 0);
    if types::backend_type(&spec.driver).is_some() {
        let data = json!({"path": format!("{path}/virtio-backend")});
        rt.shared.events.emit("DEVICE_DELETED", data);
    }
    let mut data = json!({"path": path});
    if let Some(id) = &spec.id {
        data["device"] = json!(id);
    }
    rt.shared.events.emit("DEVICE_DELETED", data);
}

pub fn object_add(c: &Control, call: &mut Call) -> Reply {
    let (kind, id) = (call.text("qom-type").to_owned(), call.text("id").to_owned());
    check_id(&id)?;
    let mut secret = None;
    if kind == "secret" {
        let given = |name: &str| call.arguments.get(name).and_then(Value::as_str);
        let properties = SecretProperties {
            data: given("data"),
            file: given("file"),
            format: given("format"),
            keyid: given("keyid"),
            iv: given("iv"),
        };
        secret = Some(properties.read().map_err(QmpError::generic)?);
    }
    let host_own = crate::cli::object::known(&kind).is_some();
    let properties = match host_own {
        true => Params::parse(&Value::Object(call.arguments.clone()).to_string(), None)
            .map_err(|e| QmpError::generic(e.to_string()))?,
        false => Params::default(),
    };
    c.change(move |rt| {
        let mut backends = rt.shared.backends();
        if backends.objects.iter().any(|(_, n)| *n == id) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        if let Some(secret) = secret {
            ftvm_block::crypto::secrets::keep(&id, secret);
        }
        crate::cli::object::make(&kind, &id, &properties).map_err(|e| QmpError::generic(e.to_string()))?;
        backends.objects.push((kind, id));
        drop(backends);
        note(rt);
        done()
    })
}

pub fn object_del(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("id").to_owned();
    let memory = c.config.memory_backend.clone();
    c.change(move |rt| {
        let used = |spec: &DeviceSpec| spec.properties.get("rng") == Some(&id);
        let in_use = rt.machine.chipset().inventory().iter().any(|i| used(&i.spec));
        let mut backends = rt.shared.backends();
        let at = backends.objects.iter().position(|(_, n)| *n == id);
        let at = at.ok_or_else(|| QmpError::generic(format!("object '{id}' not found")))?;
        if in_use || memory.as_ref() == Some(&id) {
            return Err(QmpError::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        let (kind, id) = backends.objects.remove(at);
        drop(backends);
        match kind.as_str() {
            "secret" => ftvm_block::crypto::secrets::forget(&id),
            _ => crate::host::tls::forget(&id),
        }
        note(rt);
        done()
    })
}

/// What the balloon of the machine tells.
fn balloon_facts(c: &Control) -> Result<BTreeMap<String, i64>, QmpError> {
    let none = || QmpError { class: "DeviceNotActive", desc: "No balloon device has been activated".into() };
    if c.config.machine == "none" {
        return Err(none());
    }
    let devices = c.machine(|rt| rt.machine.chipset().inventory())?;
    let balloon = devices.into_iter().find(|d| d.spec.driver.starts_with("virtio-balloon"));
    Ok(balloon.ok_or_else(none)?.facts.into_iter().collect())
}

pub fn query_balloon(c: &Control, _: &mut Call) -> Reply {
    let facts = balloon_facts(c)?;
    Ok(json!({"actual": facts.get("actual").copied().unwrap_or(0)}))
}

pub fn balloon(c: &Control, call: &mut Call) -> Reply {
    balloon_facts(c)?;
    let wanted = call.int("value").unwrap_or(0);
    if wanted <= 0 {
        return Err(QmpError::generic("Parameter 'target' expects a size"));
    }
    let bytes = (wanted as u64).min(c.config.memory);
    if bytes == c.config.memory && c.machine(|rt| rt.is_following())? {
        // libvirt says this to every program that it starts; all memory is what the guest has anyway.
        return done();
    }
    c.change(move |rt| {
        rt.input(MachineInput::Device(Input::Balloon { bytes }));
        done()
    })
}
