//! The types of objects: what `qom-list-types` and the property lists answer, made from the device models, the
//! machines and the processor models.

use ftvm_accel::model::CpuModel;
use ftvm_devices::registry::{self, Attach, Kind, Model, MODELS};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::{Control, Reply};
use crate::cli::config::MACHINES;

/// A type.
pub struct Type {
    pub name: String,
    pub parent: &'static str,
    pub is_abstract: bool,
}

/// Types without objects of their own. `memory-backend-file` is here because libvirt asks for its properties without
/// looking whether it is there; no object of it can be made.
const ABSTRACT: &[(&str, &str)] = &[
    ("object", ""),
    ("device", "object"),
    ("pci-device", "device"),
    ("isa-device", "device"),
    ("ide-device", "device"),
    ("usb-device", "device"),
    ("scsi-device", "device"),
    ("hda-codec", "device"),
    ("virtio-serial-port", "device"),
    ("virtio-pci", "pci-device"),
    ("virtio-device", "device"),
    ("machine", "object"),
    ("accel", "object"),
    ("cpu", "device"),
    ("x86_64-cpu", "cpu"),
    ("memory-backend", "object"),
    ("memory-backend-file", "memory-backend"),
    ("rng-backend", "object"),
    ("secret_common", "object"),
    ("tls-creds", "object"),
    ("authz", "object"),
    ("chardev", "object"),
];

const CONCRETE: &[(&str, &str)] = &[
    ("container", "object"),
    ("tcg-accel", "accel"),
    ("kvm-accel", "accel"),
    ("host-x86_64-cpu", "max-x86_64-cpu"),
    ("memory-backend-ram", "memory-backend"),
    ("rng-random", "rng-backend"),
    ("rng-builtin", "rng-backend"),
    ("secret", "secret_common"),
    ("tls-creds-x509", "tls-creds"),
    ("authz-simple", "authz"),
    ("chardev-file", "chardev"),
    ("chardev-null", "chardev"),
    ("chardev-pipe", "chardev"),
    ("chardev-pty", "chardev"),
    ("chardev-socket", "chardev"),
    ("chardev-stdio", "chardev"),
];

fn parent(model: &Model) -> &'static str {
    match model.attach {
        _ if model.name.starts_with("virtio-") => "virtio-pci",
        Attach::Pci | Attach::Board => "pci-device",
        Attach::Isa => "isa-device",
        Attach::Ide => "ide-device",
        Attach::VirtioSerial => "virtio-serial-port",
        Attach::Usb => "usb-device",
        Attach::Scsi => "scsi-device",
        Attach::Hda => "hda-codec",
    }
}

/// The type of the device behind a virtio model's PCI function.
pub fn backend_type(driver: &str) -> Option<String> {
    let base = registry::base_name(driver);
    if base == "virtio-vga" {
        return Some("virtio-gpu-device".into());
    }
    let kind = base.strip_prefix("virtio-").and_then(|n| n.strip_suffix("-pci"))?;
    Some(format!("virtio-{kind}-device"))
}

/// All types.
pub fn all() -> Vec<Type> {
    let mut out = Vec::new();
    let mut push =
        |name: String, parent: &'static str, is_abstract| out.push(Type { name, parent, is_abstract });
    ABSTRACT.iter().for_each(|(n, p)| push((*n).to_owned(), p, true));
    CONCRETE.iter().for_each(|(n, p)| push((*n).to_owned(), p, false));
    MACHINES.iter().for_each(|m| push(format!("{}-machine", m.name), "machine", false));
    CpuModel::definitions(None).iter().for_each(|(n, _)| push(super::cpu::type_name(n), "x86_64-cpu", false));
    for m in MODELS {
        push(m.name.to_owned(), parent(m), false);
        if let Some(backend) = backend_type(m.name).filter(|_| m.name != "virtio-vga") {
            // (virtio-vga has that of virtio-gpu-pci.)
            push(backend, "virtio-device", false);
        }
        if registry::has_generations(m.name) {
            push(format!("{}-transitional", m.name), parent(m), false);
            push(format!("{}-non-transitional", m.name), parent(m), false);
        }
    }
    out
}

fn find<'a>(types: &'a [Type], name: &str) -> Option<&'a Type> {
    types.iter().find(|t| t.name == name)
}

fn is_a(types: &[Type], name: &str, ancestor: &str) -> bool {
    let mut at = find(types, name);
    while let Some(t) = at {
        if t.name == ancestor {
            return true;
        }
        at = find(types, t.parent);
    }
    false
}

pub fn list(_: &Control, call: &mut Call) -> Reply {
    let types = all();
    let implements = call.text("implements");
    let with_abstract = call.bool("abstract") != Some(false);
    let mut out = Vec::new();
    for t in &types {
        if (t.is_abstract && !with_abstract) || (!implements.is_empty() && !is_a(&types, &t.name, implements))
        {
            continue;
        }
        let mut entry = json!({"name": t.name});
        if t.is_abstract {
            entry["abstract"] = json!(true);
        }
        if !t.parent.is_empty() {
            entry["parent"] = json!(t.parent);
        }
        out.push(entry);
    }
    Ok(json!(out))
}

/// The word for a property's type.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "bool",
        Kind::Number => "uint32",
        Kind::Size => "size",
        Kind::Text | Kind::Mac | Kind::Drive | Kind::Netdev | Kind::Chardev => "str",
    }
}

fn property(name: &str, kind: &str, description: &str) -> Value {
    let mut entry = json!({"name": name, "type": kind});
    if !description.is_empty() {
        entry["description"] = json!(description);
    }
    entry
}

/// The properties of a device type; `None` if it is none.
fn of_device(name: &str) -> Option<Vec<Value>> {
    if let Ok(model) = registry::model(name) {
        let one = |(n, k, d): &(&str, Kind, &str)| property(n, kind_name(*k), d);
        return Some(model.all_properties().iter().map(one).collect());
    }
    if let Some(m) = MODELS.iter().find(|m| backend_type(m.name).as_deref() == Some(name)) {
        // What belongs to the bus is not the device's behind it.
        let bus = ["addr", "bus", "multifunction", "vectors", "disable-legacy", "disable-modern"];
        let own = m.all_properties().into_iter().filter(|(n, ..)| !bus.contains(n));
        return Some(own.map(|(n, k, d)| property(n, kind_name(k), d)).collect());
    }
    let name = if name == "host-x86_64-cpu" { "max-x86_64-cpu" } else { name };
    let (model, _) =
        CpuModel::definitions(None).into_iter().find(|(n, _)| super::cpu::type_name(n) == name)?;
    let model = CpuModel::parse(&model).ok()?;
    let mut out: Vec<Value> = model.all_features().map(|(f, _)| property(f, "bool", "")).collect();
    out.extend([
        property("check", "bool", ""),
        property("enforce", "bool", ""),
        property("migratable", "bool", ""),
        property("unavailable-features", "strList", ""),
    ]);
    Some(out)
}

pub fn device_properties(_: &Control, call: &mut Call) -> Reply {
    let name = call.text("typename");
    if let Some(list) = of_device(name) {
        return Ok(json!(list));
    }
    if find(&all(), name).is_none() {
        return Err(QmpError::device_not_found(name));
    }
    Err(QmpError::generic("Parameter 'typename' expects a non-abstract device type"))
}

pub fn qom_properties(_: &Control, call: &mut Call) -> Reply {
    let name = call.text("typename");
    let types = all();
    if find(&types, name).is_none() {
        let desc = format!("Class '{name}' not found");
        return Err(QmpError { class: "DeviceNotFound", desc });
    }
    let mut out = vec![property("type", "string", "")];
    out.extend(of_device(name).unwrap_or_default());
    if is_a(&types, name, "machine") && name != "none-machine" {
        out.extend([
            property("accel", "string", "Accelerator (tcg, kvm)"),
            property("hpet", "bool", "HPET (on)"),
            property("memory-backend", "string", "ID of the memory backend object"),
            property("usb", "bool", "USB controller (off)"),
        ]);
    }
    if name == "memory-backend-ram" {
        out.extend([
            property("prealloc", "bool", ""),
            property("share", "bool", ""),
            property("size", "int", ""),
        ]);
    }
    if name == "rng-random" {
        out.push(property("filename", "string", ""));
    }
    if name == "secret" {
        out.extend([
            property("data", "string", ""),
            property("file", "string", ""),
            property("format", "QCryptoSecretFormat", ""),
            property("iv", "string", ""),
            property("keyid", "string", ""),
        ]);
    }
    if name == "tls-creds-x509" {
        out.extend([
            property("dir", "string", ""),
            property("endpoint", "QCryptoTLSCredsEndpoint", ""),
            property("sanity-check", "bool", ""),
            property("verify-peer", "bool", ""),
        ]);
    }
    if name == "authz-simple" {
        out.push(property("identity", "string", ""));
    }
    Ok(json!(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_a_parent_that_is_there_and_a_name_of_its_own() {
        let types = all();
        for t in &types {
            assert!(t.parent.is_empty() || find(&types, t.parent).is_some(), "{}", t.name);
            assert!(is_a(&types, &t.name, "object"), "{}", t.name);
        }
        let mut names: Vec<&str> = types.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|w| w[0] != w[1]));
    }
}
