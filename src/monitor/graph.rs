//! The block graph: finding nodes, and what external snapshots need.
//!
//! An external snapshot happens between two requests of the guest: the drive's requests are held, what was written is
//! flushed, and from the next request on the overlay is in front.

use std::path::Path;
use std::sync::Arc;

use ftvm_block::qcow2::CreateOptions;
use ftvm_block::queue::Settings;
use ftvm_block::{Image, Node, OpenOptions};
use ftvm_qmp::{Call, QmpError};
use serde_json::{Map, Value};

use super::{devices, done, jobs, Control, Reply};
use crate::host::backends::Moved;
use crate::host::disk::DiskWorker;
use crate::runtime::live::Runtime;

/// A node that a command names, and the drive at whose front it is, if it is at one's.
pub struct Found {
    pub node: Arc<Node>,
    pub front: Option<usize>,
}

fn fail<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// The text of an argument that may be missing.
pub fn given<'a>(arguments: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    arguments.get(key).and_then(Value::as_str).filter(|t| !t.is_empty())
}

/// Find a node by its name, or by the name of the drive in front of which it is.
pub fn find(c: &Control, name: &str) -> Result<Found, QmpError> {
    let slot = c.shared.backends().drive(name);
    if let Some((i, root)) = slot.and_then(|i| Some((i, c.outside.disk_root(i)?))) {
        return Ok(Found { node: root.node(), front: Some(i) });
    }
    let found = c.outside.find_node(name).map(|(i, node)| {
        let front = c.outside.disk_root(i).is_some_and(|r| Arc::ptr_eq(&r.node(), &node));
        Found { node, front: front.then_some(i) }
    });
    found.ok_or_else(|| QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'")))
}

/// What changes images on this host alone has no place in a pair: the other side must find what it reopens.
pub fn no_pair(c: &Control) -> Result<(), QmpError> {
    c.change(|rt| match rt.ft.is_some() {
        true => fail(
            "block jobs and external snapshots are refused while fault tolerance is on, because the other host would go \
             live on the old images: ft-turn-off ends that",
        ),
        false => Ok(()),
    })
}

/// A node that no job uses.
pub fn free(c: &Control, node: &Arc<Node>) -> Result<(), QmpError> {
    match c.shared.jobs.user_of(node) {
        Some(kind) => {
            fail(format!("Node '{}' is busy: block device is in use by block job: {kind}", node.name()))
        }
        None => Ok(()),
    }
}

/// Whether another node stands on this one.
pub fn parent(c: &Control, node: &Arc<Node>) -> Option<Arc<Node>> {
    let count = c.shared.backends().drives.len();
    (0..count).find_map(|i| {
        let chain = c.outside.disk_root(i)?.node().chain();
        chain.windows(2).find(|w| Arc::ptr_eq(&w[1], node)).map(|w| Arc::clone(&w[0]))
    })
}

/// What the configuration is to know of a node.
pub fn moved(node: &Node) -> Moved {
    Moved {
        name: node.name(),
        file: node.path().map(|p| p.to_string_lossy().into_owned()),
        format: node.format(),
    }
}

/// The drives' configuration follows an exchange of nodes, and the machine's note with it.
pub fn follow(c: &Control, exchanges: Vec<(usize, Moved)>) -> Result<(), QmpError> {
    c.change(move |rt| {
        exchange(rt, &exchanges);
        Ok(())
    })
}

fn exchange(rt: &mut Runtime, exchanges: &[(usize, Moved)]) {
    for (index, to) in exchanges {
        rt.shared.backends().exchange(*index, to);
    }
    // A node that went to the back without a place of its own has got one.
    let drives = rt.shared.backends().drives.clone();
    for (i, drive) in drives.iter().enumerate() {
        let Some(drive) = drive.as_ref().filter(|d| d.node && rt.outside.disk_root(i).is_none()) else {
            continue;
        };
        let Some((_, node)) = rt.outside.find_node(&drive.id) else { continue };
        let (events, news) = (rt.events.clone(), rt.outside.news());
        match DiskWorker::start(i, &drive.id, node, Settings::default(), events, news) {
            Ok(worker) => rt.outside.attach_disk(i, worker),
            Err(e) => log::error!("drive {}: {e}", drive.id),
        }
    }
    note(rt);
}

/// Bring the configuration up to what stands on what, and the machine's note with it.
pub fn note(rt: &mut Runtime) {
    let count = rt.shared.backends().drives.len();
    for i in 0..count {
        if let Some(root) = rt.outside.disk_root(i) {
            let below = root.node().backing().map(|b| b.name());
            rt.shared.backends().stands_on(i, below.as_deref());
        }
    }
    devices::note(rt);
}

/// An overlay to be made: its file, its node's name.
struct NewOverlay {
    file: String,
    format: String,
    node: Option<String>,
    existing: bool,
}

/// Files that were made for actions that did not happen.
#[derive(Default)]
pub struct Made(pub Vec<String>);

impl Made {
    pub fn undo(self) {
        for file in self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

pub fn overlay_of(c: &Control, a: &Map<String, Value>) -> Result<(usize, Arc<Node>, Arc<Node>), QmpError> {
    let name = given(a, "node").unwrap_or_default();
    let found = find(c, name)?;
    let front = found.front.ok_or_else(|| {
        QmpError::generic(format!("Node '{name}' is busy: node is used as backing file of another"))
    })?;
    let overlay = find(c, given(a, "overlay").unwrap_or_default())?;
    if overlay.node.backing().is_some() {
        return fail("The overlay already has a backing image");
    }
    if overlay.node.format() != "qcow2" {
        return fail("The overlay does not support backing images");
    }
    if Arc::ptr_eq(&overlay.node, &found.node) {
        return fail("Making an image its own backing file would make a loop");
    }
    Ok((front, found.node, overlay.node))
}

/// `blockdev-snapshot-sync`: make the overlay's file and node.
pub fn new_overlay(
    c: &Control,
    a: &Map<String, Value>,
    made: &mut Made,
) -> Result<(usize, Arc<Node>, Arc<Node>), QmpError> {
    let (device, node_name) = (given(a, "device"), given(a, "node-name"));
    let name =
        device.or(node_name).ok_or_else(|| QmpError::generic("Cannot find device='' nor node-name=''"))?;
    let found = find(c, name)?;
    let front =
        found.front.ok_or_else(|| QmpError::generic(format!("Node '{name}' is not the active layer")))?;
    let new = NewOverlay {
        file: given(a, "snapshot-file").unwrap_or_default().to_owned(),
        format: given(a, "format").unwrap_or("qcow2").to_owned(),
        node: given(a, "snapshot-node-name").map(str::to_owned),
        existing: given(a, "mode") == Some("existing"),
    };
    if node_name.is_some() && device.is_none() && new.node.is_none() {
        return fail("New overlay node-name missing");
    }
    if let Some(name) = &new.node {
        if !devices::is_identifier(name) {
            return fail(format!("Invalid node-name: '{name}'"));
        }
        if find(c, name).is_ok() {
            return fail(format!("Duplicate nodes with node-name='{name}'"));
        }
    }
    if new.format != "qcow2" {
        return fail(format!("Unknown driver '{}' of an overlay: only qcow2", new.format));
    }
    if !new.existing {
        let below = found.node.path().map(|p| p.to_string_lossy().into_owned());
        let below = below.ok_or_else(|| QmpError::generic(format!("'{name}' has no file of its own")))?;
        make(&new.file, found.node.size(), Some((&below, found.node.format())), made)?;
    }
    let options = OpenOptions { format: Some(new.format), ..OpenOptions::default() };
    let overlay =
        Node::open(new.node.as_deref().unwrap_or_default(), Path::new(&new.file), &options, Some(None))
            .map_err(|e| QmpError::generic(e.to_string()))?;
    if new.node.is_none() {
        overlay.rename(None);
    }
    Ok((front, found.node, overlay))
}

/// Make a qcow2 image, in the place of a file that is there, as QEMU does.
fn make(file: &str, size: u64, below: Option<(&str, &str)>, made: &mut Made) -> Result<(), QmpError> {
    let below = below.map(|(f, t)| (absolute(f), t.to_owned()));
    let options = CreateOptions { backing: below, ..CreateOptions::new(size) };
    jobs::make_qcow2(file, &options).map_err(|e| QmpError::generic(e.to_string()))?;
    made.0.push(file.to_owned());
    Ok(())
}

/// A path that means the same from every directory.
pub fn absolute(path: &str) -> String {
    if path.contains("://") {
        return path.to_owned();
    }
    std::fs::canonicalize(path).map_or_else(|_| path.to_owned(), |p| p.to_string_lossy().into_owned())
}

/// A node that is only read from now on lets others open its file for reading.
pub fn to_the_back(node: &Node) {
    if let Err(e) = node.reopen(true) {
        log::info!("the node '{}' stays open for writing: {e}", node.name());
    }
}

/// `change-backing-file`: another name in the header, nothing else.
pub fn change_backing_file(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    let top = find(c, call.text("device"))?;
    let name = call.text("image-node-name");
    let node = top.node.chain().into_iter().find(|n| n.name() == name);
    let node = node.ok_or_else(|| QmpError::generic(format!("Cannot find node '{name}' in the chain")))?;
    free(c, &node)?;
    let Some(below) = node.backing() else {
        return fail("not allowing backing file change on an image without a backing file");
    };
    let write = |node: &Node| node.name_backing(Some((call.text("backing-file"), below.format())));
    let result = if node.read_only() {
        node.reopen(false).and_then(|()| {
            let result = write(&node);
            node.reopen(true)?;
            result
        })
    } else {
        write(&node)
    };
    result.map_err(|e| QmpError::generic(e.to_string()))?;
    done()
}

/// The machine's note is brought up to date from a job's thread.
pub fn note_from(
    events: &crate::runtime::Events,
    exchanges: Vec<(usize, Moved)>,
) -> std::sync::mpsc::Receiver<()> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let _ = events.send(crate::runtime::Event::Call(Box::new(move |rt| {
        exchange(rt, &exchanges);
        let _ = sender.send(());
    })));
    receiver
}
