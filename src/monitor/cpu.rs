//! Commands about processors.

use ftvm_accel::model::{CpuModel, HostCpuid, ModelError};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::{Control, Reply};
use crate::cli::config::Accel;

/// The type of a processor model's objects.
pub fn type_name(model: &str) -> String {
    format!("{model}-x86_64-cpu")
}

/// The object of processor `index`.
pub fn path(index: u32) -> String {
    format!("/machine/unattached/device[{index}]")
}

/// What guests can have of the host's processor, while the machine runs on it.
fn host(c: &Control) -> Option<HostCpuid> {
    (c.shared.accel() == Accel::Kvm).then(|| ftvm_accel::kvm::host_cpuid().ok()).flatten()
}

/// A model, on what the machine runs on.
pub fn parse_model(c: &Control, text: &str) -> Result<CpuModel, ModelError> {
    CpuModel::parse_on(text, host(c).as_ref())
}

/// The model's name in the machine's `-cpu`.
pub fn model_of(c: &Control) -> String {
    let name = c.config.cpu_model.split(',').next().unwrap_or_default();
    parse_model(c, name).map_or_else(|_| name.to_owned(), |m| m.name().to_owned())
}

/// The features that the machine's model names and its processors do not have.
pub fn unavailable(c: &Control) -> Vec<String> {
    parse_model(c, &c.config.cpu_model).map_or_else(|_| Vec::new(), |m| m.missing().to_vec())
}

pub fn definitions(c: &Control, _: &mut Call) -> Reply {
    let one = |(name, unavailable): (String, Vec<String>)| {
        json!({
            "name": name,
            "typename": type_name(&name),
            "unavailable-features": unavailable,
            "static": false,
            // What "max" is may change with the next version.
            "migration-safe": !["max", "host"].contains(&name.as_str()),
            "deprecated": false,
        })
    };
    Ok(CpuModel::definitions(host(c).as_ref()).into_iter().map(one).collect())
}

/// A model with its features as `-cpu` takes them.
fn parse(c: &Control, name: &str, props: &Map<String, Value>) -> Result<CpuModel, QmpError> {
    let mut text = name.to_owned();
    for (key, value) in props {
        let value = match value {
            Value::Bool(true) => "on",
            Value::Bool(false) => "off",
            Value::String(s) => s,
            _ => {
                return Err(QmpError::generic(format!(
                    "Invalid parameter type for '{key}', expected: boolean"
                )))
            }
        };
        text.push_str(&format!(",{key}={value}"));
    }
    parse_model(c, &text).map_err(|e| match e {
        ModelError::Unknown(_) => QmpError::generic(format!("CPU model '{name}' not found")),
        e => QmpError::generic(e.to_string()),
    })
}

pub fn expansion(c: &Control, call: &mut Call) -> Reply {
    let model = call.arguments.get("model").and_then(Value::as_object).cloned().unwrap_or_default();
    let name = model.get("name").and_then(Value::as_str).unwrap_or_default();
    let props = match model.get("props") {
        None => Map::new(),
        Some(Value::Object(map)) => map.clone(),
        Some(_) => {
            return Err(QmpError::generic("Invalid parameter type for 'model.props', expected: object"))
        }
    };
    // "base" is the model without features to which a static expansion leads.
    let (model, full) = match name {
        "base" => {
            let max = parse(c, "max", &Map::new())?;
            let off = max.all_features().map(|(f, _)| (f.to_owned(), json!(false)));
            let all: Map<String, Value> = off.chain(props).collect();
            (parse(c, "max", &all)?, "base".to_owned())
        }
        _ => (parse(c, name, &props)?, name.to_owned()),
    };
    let features: Map<String, Value> =
        model.all_features().map(|(f, on)| (f.to_owned(), json!(on))).collect();
    let name = if call.text("type") == "static" { "base".to_owned() } else { full };
    Ok(json!({"model": {"name": name, "props": features}}))
}

fn place(index: u32) -> Value {
    json!({"socket-id": index, "core-id": 0, "thread-id": 0})
}

pub fn hotpluggable(c: &Control, _: &mut Call) -> Reply {
    if c.config.machine == "none" {
        return Err(QmpError::generic("machine does not support hot-plugging CPUs"));
    }
    let kind = type_name(&model_of(c));
    let one = |i| json!({"type": kind, "vcpus-count": 1, "props": place(i), "qom-path": path(i)});
    Ok((0..c.config.cpus).map(one).collect())
}

pub fn fast(c: &Control, _: &mut Call) -> Reply {
    let count = if c.config.machine == "none" { 0 } else { c.config.cpus };
    let threads = c.shared.cpu_threads();
    let one = |i: u32| {
        json!({
            "cpu-index": i,
            "qom-path": path(i),
            "thread-id": threads.get(i as usize).copied().unwrap_or(c.machine_thread),
            "props": place(i),
            "target": "x86_64",
        })
    };
    Ok((0..count).map(one).collect())
}
