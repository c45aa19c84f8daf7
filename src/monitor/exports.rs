//! Commands about block exports.

use std::sync::Arc;

use ftvm_block::bitmap::{DirtyBitmap, Use};
use ftvm_block::{Image, Node};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::graph::{find, given, Found};
use super::jobs::is_used;
use super::{bitmaps, devices, done, Control, Reply};
use crate::host::nbd::wire::MAX_TEXT;
use crate::host::nbd::{Address, Source, Wanted};

fn fail<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// `nbd-server-start`
pub fn start(c: &Control, call: &mut Call) -> Reply {
    let a = call.arguments;
    if let Some(id) = given(a, "tls-creds") {
        crate::host::tls::find(id, true).map_err(QmpError::generic)?;
        return fail("NBD exports without TLS only: tls-creds is not supported here");
    }
    let none = Map::new();
    let addr = a.get("addr").and_then(Value::as_object).unwrap_or(&none);
    let data = addr.get("data").and_then(Value::as_object).unwrap_or(&none);
    let text = |key: &str| given(data, key).unwrap_or_default().to_owned();
    let address = match given(addr, "type") {
        Some("unix") => Address::Unix(text("path")),
        _ => Address::Tcp(text("host"), text("port")),
    };
    let max = a.get("max-connections").and_then(Value::as_u64).unwrap_or(0);
    c.shared.exports.start(&address, u32::try_from(max).unwrap_or(u32::MAX)).map_err(QmpError::generic)?;
    done()
}

/// The bitmap that an export names: of its node, or of one that this stands on; or of another node.
fn bitmap(
    c: &Control,
    node: &Arc<Node>,
    wanted: &Value,
    writable: bool,
) -> Result<Arc<DirtyBitmap>, QmpError> {
    let text = |e: ftvm_block::BlockError| QmpError::generic(e.to_string());
    let bitmap = match wanted.as_object() {
        Some(other) => {
            let of = bitmaps::node_of(c, given(other, "node").unwrap_or_default())?;
            of.bitmap(given(other, "name").unwrap_or_default()).map_err(text)?
        }
        None => {
            let name = wanted.as_str().unwrap_or_default();
            let found = node.chain().iter().find_map(|n| n.bitmap(name).ok());
            found.ok_or_else(|| QmpError::generic(format!("Bitmap '{name}' is not found")))?
        }
    };
    bitmap.check(Use::Read, false).map_err(text)?;
    if !writable && !node.read_only() && bitmap.info().recording {
        return fail(format!("Enabled bitmap '{}' incompatible with readonly export", bitmap.name()));
    }
    Ok(bitmap)
}

/// What is written from outside goes past the machine: nothing else may count on what it has written.
fn check_writable(c: &Control, found: &Found) -> Result<(), QmpError> {
    let name = found.node.name();
    if is_used(c, &found.node)? {
        return fail(format!(
            "Permission conflict on node '{name}': permissions 'write' are both required by an unnamed block device (uses \
             node '{name}' as 'root' child) and unshared by block device '{name}' (uses node '{name}' as 'root' child)."
        ));
    }
    c.change(|rt| match rt.ft.is_some() {
        true => fail(
            "writable exports are refused while fault tolerance is on, because the other host would not see what is \
             written through them: ft-turn-off ends that",
        ),
        false => Ok(()),
    })
}

/// Show a node, with QEMU's checks in QEMU's order; `a` is `block-export-add`'s.
fn add_to(c: &Control, a: &Map<String, Value>, found: Option<Found>) -> Result<(), QmpError> {
    let id = given(a, "id").unwrap_or_default();
    if !devices::is_identifier(id) {
        return fail("Invalid block export id");
    }
    if c.shared.exports.find(id).is_some() {
        return fail(format!("Block export id '{id}' is already in use"));
    }
    let node_name = given(a, "node-name").unwrap_or_default();
    let missing = || QmpError::generic(format!("Cannot find device='' nor node-name='{node_name}'"));
    let found = match found {
        Some(found) => found,
        None => find(c, node_name).map_err(|_| missing())?,
    };
    let yes = |key: &str| a.get(key) == Some(&Value::Bool(true));
    let node = &found.node;
    if let Some(thread) = given(a, "iothread") {
        return fail(format!("iothread \"{thread}\" not found"));
    }
    if yes("writable") && node.read_only() {
        return fail("Cannot export read-only node as writable");
    }
    if yes("writable") {
        check_writable(c, &found)?;
    }
    if !c.shared.exports.is_running() {
        return fail("NBD server not running");
    }
    let name = given(a, "name").unwrap_or(node_name);
    for (what, text) in [("export name", name), ("description", given(a, "description").unwrap_or_default())]
    {
        if text.len() > MAX_TEXT {
            return fail(format!("{what} '{text}' too long"));
        }
    }
    let bitmaps = a.get("bitmaps").and_then(Value::as_array).into_iter().flatten();
    let bitmaps: Vec<_> =
        bitmaps.map(|b| bitmap(c, node, b, yes("writable"))).collect::<Result<_, QmpError>>()?;
    let front = found.front.and_then(|i| c.outside.disk_root(i));
    let wanted = Wanted {
        id: id.to_owned(),
        name: name.to_owned(),
        description: given(a, "description").map(str::to_owned),
        source: front.map_or_else(|| Source::Node(Arc::clone(node)), Source::Front),
        writable: yes("writable"),
        writethrough: yes("writethrough"),
        depth: yes("allocation-depth"),
        bitmaps,
    };
    c.shared.exports.add(wanted).map_err(QmpError::generic)
}

/// `block-export-add`
pub fn add(c: &Control, call: &mut Call) -> Reply {
    add_to(c, call.arguments, None)?;
    done()
}

/// `nbd-server-add`: as [`add`], in older words.
pub fn server_add(c: &Control, call: &mut Call) -> Reply {
    let device = call.text("device");
    let found = find(c, device)?;
    let name = given(call.arguments, "name").unwrap_or(device);
    let mut a = Map::new();
    for (key, value) in [("id", name), ("name", name), ("node-name", found.node.name().as_str())] {
        a.insert(key.into(), json!(value));
    }
    if let Some(text) = given(call.arguments, "description") {
        a.insert("description".into(), json!(text));
    }
    // What cannot be written is shown for reading, without a word.
    let writable = call.bool("writable") == Some(true) && !found.node.read_only();
    a.insert("writable".into(), json!(writable));
    if let Some(bitmap) = given(call.arguments, "bitmap") {
        a.insert("bitmaps".into(), json!([bitmap]));
    }
    add_to(c, &a, Some(found))?;
    done()
}

fn remove(c: &Control, id: &str, mode: &str) -> Reply {
    let Some(export) = c.shared.exports.find(id) else {
        return fail(format!("Export '{id}' is not found"));
    };
    if export.is_closing() {
        return fail(format!("Export '{id}' is already shutting down"));
    }
    if mode != "hard" && export.is_used() {
        return fail(format!("export '{id}' still in use"));
    }
    c.shared.exports.remove(&export);
    done()
}

/// `block-export-del`
pub fn del(c: &Control, call: &mut Call) -> Reply {
    remove(c, call.text("id"), call.text("mode"))
}

/// `nbd-server-remove`
pub fn server_remove(c: &Control, call: &mut Call) -> Reply {
    remove(c, call.text("name"), call.text("mode"))
}

/// `nbd-server-stop`
pub fn stop(c: &Control, _: &mut Call) -> Reply {
    if !c.shared.exports.stop() {
        return fail("NBD server not running");
    }
    done()
}

/// `query-block-exports`
pub fn query(c: &Control, _: &mut Call) -> Reply {
    let one = |e: &Arc<crate::host::nbd::Export>| json!({"id": e.id, "type": "nbd", "node-name": e.node().name(), "shutting-down": e.is_closing()});
    // The newest first, as QEMU.
    Ok(c.shared.exports.all().iter().rev().map(one).collect())
}
