//! The tree of objects: the machine, its devices, what `-object` and `-chardev` made. It is built from the
//! running machine whenever it is asked for.

use ftvm_devices::registry::{self, Attach, Kind};
use ftvm_devices::Inventory;
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::{cpu, types, Control, Reply};
use crate::machine::MachineInput;
use crate::runtime::live::Runtime;

/// An object.
pub struct Object {
    pub name: String,
    pub kind: String,
    /// Name, type and value.
    pub properties: Vec<(String, &'static str, Value)>,
    pub children: Vec<Object>,
}

impl Object {
    fn new(name: &str, kind: impl Into<String>) -> Object {
        Object { name: name.to_owned(), kind: kind.into(), properties: Vec::new(), children: Vec::new() }
    }

    fn with(mut self, name: &str, kind: &'static str, value: Value) -> Object {
        self.properties.push((name.to_owned(), kind, value));
        self
    }

    fn holding(mut self, children: Vec<Object>) -> Object {
        self.children = children;
        self
    }

    fn find(&self, path: &str) -> Option<&Object> {
        let mut at = self;
        for name in path.split('/').filter(|p| !p.is_empty()) {
            at = at.children.iter().find(|c| c.name == name)?;
        }
        Some(at)
    }
}

/// The path of a device.
pub fn device_path(spec: &ftvm_devices::DeviceSpec, anonymous: usize) -> String {
    match &spec.id {
        Some(id) => format!("/machine/peripheral/{id}"),
        None => format!("/machine/peripheral-anon/device[{anonymous}]"),
    }
}

fn value_of(kind: Kind, text: &str) -> Value {
    match kind {
        Kind::Bool => json!(matches!(text, "on" | "yes" | "true" | "1")),
        Kind::Number => registry::parse_number(text).map_or(json!(text), |n| json!(n)),
        Kind::Size => registry::parse_size(text).map_or(json!(text), |n| json!(n)),
        _ => json!(text),
    }
}

/// `guest-stats` of a balloon, with the second at which the guest told them.
fn guest_stats(facts: &[(String, i64)], rtc_base: i64) -> Value {
    let mut stats = Map::new();
    let mut updated = 0;
    for (name, value) in facts {
        if name.starts_with("stat-") {
            // QEMU shows what the guest did not tell as the largest number.
            let value = if *value < 0 { json!(u64::MAX) } else { json!(value) };
            stats.insert(name.clone(), value);
        } else if name == "updated-ns" && *value > 0 {
            updated = rtc_base + value / 1_000_000_000;
        }
    }
    json!({"stats": stats, "last-update": updated})
}

/// Whether such a device is plugged into a controller while the machine runs.
fn comes_and_goes(driver: &str) -> bool {
    registry::model(driver).is_ok_and(|m| matches!(m.attach, Attach::Scsi | Attach::Usb))
}

fn device(item: &Inventory, name: &str, rtc_base: i64) -> Object {
    let driver = &item.spec.driver;
    let mut object = Object::new(name, driver.clone())
        .with("realized", "bool", json!(true))
        .with("hotplugged", "bool", json!(item.hotplugged))
        .with("hotpluggable", "bool", json!(item.devfn.is_some() || comes_and_goes(driver)));
    if let Ok(model) = registry::model(driver) {
        for (property, kind, _) in model.all_properties() {
            let value = item.spec.properties.get(property).map(|text| value_of(kind, text));
            let value = match (property, item.devfn) {
                ("addr", Some(devfn)) => json!(format!("{:02x}.{:x}", devfn >> 3, devfn & 7)),
                ("bus", _) => value.unwrap_or_else(|| json!(item.bus)),
                (_, _) => value.unwrap_or_else(|| match kind {
                    Kind::Bool => json!(false),
                    Kind::Number | Kind::Size => json!(0),
                    _ => json!(""),
                }),
            };
            object = object.with(property, types::kind_name(kind), value);
        }
    }
    if driver.starts_with("virtio-balloon") {
        let interval =
            item.facts.iter().find(|(n, _)| n == "guest-stats-polling-interval").map_or(0, |f| f.1);
        object = object.with("guest-stats", "guest statistics", guest_stats(&item.facts, rtc_base)).with(
            "guest-stats-polling-interval",
            "int",
            json!(interval),
        );
    }
    if let Some(kind) = types::backend_type(driver) {
        let backend = Object::new("virtio-backend", kind).with("realized", "bool", json!(true)).with(
            "hotplugged",
            "bool",
            json!(item.hotplugged),
        );
        object = object.holding(vec![backend]);
    }
    object
}

/// What the tree is made of, taken from the machine thread.
struct Look {
    inventory: Vec<Inventory>,
    cpus: u32,
}

fn look(rt: &mut Runtime) -> Look {
    Look { inventory: rt.machine.chipset().inventory(), cpus: rt.machine.cpu_count() as u32 }
}

/// The whole tree.
pub fn tree(c: &Control) -> Object {
    let none = c.config.machine == "none";
    let look = match none {
        true => Look { inventory: Vec::new(), cpus: 0 },
        false => c.machine(look).unwrap_or(Look { inventory: Vec::new(), cpus: 0 }),
    };
    let rtc_base = c.config.rtc_base_unix;
    let (mut named, mut anonymous) = (Vec::new(), Vec::new());
    for item in &look.inventory {
        match &item.spec.id {
            Some(id) => named.push(device(item, id, rtc_base)),
            None => {
                let name = format!("device[{}]", anonymous.len());
                anonymous.push(device(item, &name, rtc_base));
            }
        }
    }
    let model = cpu::model_of(c);
    let features = cpu::parse_model(c, &c.config.cpu_model).ok();
    let cpus = (0..look.cpus).map(|i| {
        let mut object = Object::new(&format!("device[{i}]"), cpu::type_name(&model))
            .with("realized", "bool", json!(true))
            .with("hotplugged", "bool", json!(false))
            .with("unavailable-features", "strList", json!(super::cpu::unavailable(c)));
        for (feature, on) in features.iter().flat_map(|m| m.all_features()) {
            object = object.with(feature, "bool", json!(on));
        }
        object
    });
    let container = |name: &str| Object::new(name, "container");
    let kind = format!("{}-machine", c.config.machine_name());
    let machine = Object::new("machine", kind)
        .with("accel", "string", json!(c.shared.accel().name()))
        .with("hpet", "bool", json!(c.config.hpet))
        .with("memory-backend", "string", json!(c.config.memory_backend.as_deref().unwrap_or("pc.ram")))
        .with("usb", "bool", json!(c.config.usb))
        .holding(vec![
            container("unattached").holding(cpus.collect()),
            container("peripheral").holding(named),
            container("peripheral-anon").holding(anonymous),
        ]);
    let objects = c.shared.backends().objects.clone();
    let objects = objects.iter().map(|(kind, id)| Object::new(id, kind.clone())).collect();
    let chars = c.chars.lock().map(|c| c.clone()).unwrap_or_default();
    let chars = chars.iter().map(|v| Object::new(&v.label, v.kind())).collect();
    Object::new("", "container").holding(vec![
        machine,
        container("objects").holding(objects),
        container("chardevs").holding(chars),
    ])
}

pub fn list(c: &Control, call: &mut Call) -> Reply {
    let path = call.text("path");
    let tree = tree(c);
    let object = tree.find(path).ok_or_else(|| QmpError::device_not_found(path))?;
    let mut out = vec![json!({"name": "type", "type": "string"})];
    out.extend(object.properties.iter().map(|(n, k, _)| json!({"name": n, "type": k})));
    out.extend(object.children.iter().map(|o| json!({"name": o.name, "type": format!("child<{}>", o.kind)})));
    Ok(json!(out))
}

fn not_found(object: &Object, property: &str) -> QmpError {
    QmpError::generic(format!("Property '{}.{property}' not found", object.kind))
}

pub fn get(c: &Control, call: &mut Call) -> Reply {
    let (path, property) = (call.text("path"), call.text("property"));
    let tree = tree(c);
    let object = tree.find(path).ok_or_else(|| QmpError::device_not_found(path))?;
    if property == "type" {
        return Ok(json!(object.kind));
    }
    if let Some((_, _, value)) = object.properties.iter().find(|(n, ..)| n == property) {
        return Ok(value.clone());
    }
    match object.children.iter().find(|o| o.name == property) {
        Some(_) => Ok(json!(format!("{}/{property}", path.trim_end_matches('/')))),
        None => Err(not_found(object, property)),
    }
}

pub fn set(c: &Control, call: &mut Call) -> Reply {
    let (path, property) = (call.text("path"), call.text("property"));
    let tree = tree(c);
    let object = tree.find(path).ok_or_else(|| QmpError::device_not_found(path))?;
    if property == "guest-stats-polling-interval" && object.kind.starts_with("virtio-balloon") {
        let seconds = call.int("value").and_then(|v| u64::try_from(v).ok()).filter(|s| *s <= 1 << 31);
        let seconds = seconds
            .ok_or_else(|| QmpError::generic("timer value must be greater than zero and fit into 31 bits"))?;
        return c.change(move |rt| {
            rt.input(MachineInput::Device(ftvm_devices::Input::BalloonStats { seconds }));
            Ok(json!({}))
        });
    }
    if object.properties.iter().any(|(n, ..)| n == property) {
        return Err(QmpError::generic(format!("Property '{}.{property}' is not writable", object.kind)));
    }
    Err(not_found(object, property))
}
