//! Changes of the block graph: external snapshots, transactions, dirty bitmaps.
//!
//! An external snapshot happens between two requests of the guest: the drive's requests are held, what was written is
//! flushed, and from the next request on the overlay is in front. Of a transaction everything is prepared first, with
//! the requests of all its drives held; only when nothing can fail any more is it done.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, RwLockWriteGuard};

use ftvm_block::copy::Dirty;
use ftvm_block::node::Watch;
use ftvm_block::qcow2::CreateOptions;
use ftvm_block::queue::Settings;
use ftvm_block::{Image, Node, OpenOptions, Root, Snapshot, SnapshotChange};
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
fn follow(c: &Control, exchanges: Vec<(usize, Moved)>) -> Result<(), QmpError> {
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
        match DiskWorker::start(i, &drive.id, node, Settings::default(), rt.events.clone()) {
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

/// A bitmap in memory.
pub struct Bitmap {
    node: Arc<Node>,
    name: String,
    dirty: Arc<Dirty>,
    watch: Option<Arc<dyn Watch>>,
}

impl Bitmap {
    /// `BlockDirtyInfo`
    pub fn info(&self) -> Value {
        serde_json::json!({
            "name": self.name, "count": self.dirty.bytes(), "granularity": ftvm_block::copy::CHUNK,
            "recording": self.watch.is_some(), "busy": false, "persistent": false,
        })
    }
}

/// All bitmaps.
#[derive(Default)]
pub struct Bitmaps(Vec<Bitmap>);

impl Bitmaps {
    fn at(&self, node: &Arc<Node>, name: &str) -> Result<usize, QmpError> {
        let found = self.0.iter().position(|b| Arc::ptr_eq(&b.node, node) && b.name == name);
        found.ok_or_else(|| QmpError::generic(format!("Dirty bitmap '{name}' not found")))
    }

    /// Those of a node.
    pub fn of(&self, node: &Arc<Node>) -> Vec<Value> {
        self.0.iter().filter(|b| Arc::ptr_eq(&b.node, node)).map(Bitmap::info).collect()
    }

    fn add(&mut self, node: Arc<Node>, a: &Map<String, Value>) -> Result<(), QmpError> {
        let name = given(a, "name").ok_or_else(|| QmpError::generic("Bitmap name cannot be empty"))?;
        if self.at(&node, name).is_ok() {
            return fail(format!("Bitmap already exists: {name}"));
        }
        if a.get("persistent") == Some(&Value::Bool(true)) {
            return fail("persistent bitmaps are not kept: images of ftvm store none");
        }
        if a.get("granularity").and_then(Value::as_u64).is_some_and(|g| g != ftvm_block::copy::CHUNK) {
            return fail("the granularity of a bitmap is 65536");
        }
        let dirty = Dirty::new(node.size());
        let watch: Option<Arc<dyn Watch>> =
            (a.get("disabled") != Some(&Value::Bool(true))).then(|| Arc::clone(&dirty) as _);
        if let Some(watch) = &watch {
            node.watch(Arc::clone(watch));
        }
        self.0.push(Bitmap { node, name: name.to_owned(), dirty, watch });
        Ok(())
    }

    fn remove(&mut self, node: &Arc<Node>, name: &str) -> Result<Bitmap, QmpError> {
        let bitmap = self.0.remove(self.at(node, name)?);
        if let Some(watch) = &bitmap.watch {
            node.unwatch(watch);
        }
        Ok(bitmap)
    }

    fn put_back(&mut self, bitmap: Bitmap) {
        if let Some(watch) = &bitmap.watch {
            bitmap.node.watch(Arc::clone(watch));
        }
        self.0.push(bitmap);
    }
}

pub fn bitmap_add(c: &Control, call: &mut Call) -> Reply {
    let node = find(c, call.text("node"))?.node;
    c.bitmaps().add(node, call.arguments)?;
    done()
}

pub fn bitmap_remove(c: &Control, call: &mut Call) -> Reply {
    let node = find(c, call.text("node"))?.node;
    c.bitmaps().remove(&node, call.text("name"))?;
    done()
}

pub fn bitmap_clear(c: &Control, call: &mut Call) -> Reply {
    let node = find(c, call.text("node"))?.node;
    let bitmaps = c.bitmaps();
    bitmaps.0[bitmaps.at(&node, call.text("name"))?].dirty.clear();
    done()
}

/// An overlay to be made: its file, its node's name.
struct NewOverlay {
    file: String,
    format: String,
    node: Option<String>,
    existing: bool,
}

/// One action of a transaction, everything looked up.
enum Action {
    Snapshot { front: usize, node: Arc<Node>, overlay: Arc<Node> },
    Internal { node: Arc<Node>, name: String, device: String },
    AddBitmap { node: Arc<Node>, arguments: Map<String, Value> },
    RemoveBitmap { node: Arc<Node>, name: String },
    ClearBitmap { node: Arc<Node>, name: String },
    Abort,
}

/// Files that were made for actions that did not happen.
#[derive(Default)]
struct Made(Vec<String>);

impl Made {
    fn undo(self) {
        for file in self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

fn overlay_of(c: &Control, a: &Map<String, Value>) -> Result<(usize, Arc<Node>, Arc<Node>), QmpError> {
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
fn new_overlay(
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

fn action(c: &Control, kind: &str, a: &Map<String, Value>, made: &mut Made) -> Result<Action, QmpError> {
    let text = |key: &str| given(a, key).unwrap_or_default().to_owned();
    Ok(match kind {
        "blockdev-snapshot" => {
            let (front, node, overlay) = overlay_of(c, a)?;
            Action::Snapshot { front, node, overlay }
        }
        "blockdev-snapshot-sync" => {
            let (front, node, overlay) = new_overlay(c, a, made)?;
            Action::Snapshot { front, node, overlay }
        }
        "blockdev-snapshot-internal-sync" => {
            let (device, name) = (text("device"), text("name"));
            let node = find(c, &device)?.node;
            if node.format() != "qcow2" {
                return fail(format!(
                    "Block format '{}' used by device '{device}' does not support internal snapshots",
                    node.format()
                ));
            }
            if name.is_empty() {
                return fail("Name is empty");
            }
            if node.info().snapshots.iter().any(|s| s.name == name) {
                return fail(format!("Snapshot with name '{name}' already exists on device '{device}'"));
            }
            Action::Internal { node, name, device }
        }
        "block-dirty-bitmap-add" => {
            Action::AddBitmap { node: find(c, &text("node"))?.node, arguments: a.clone() }
        }
        "block-dirty-bitmap-remove" => {
            Action::RemoveBitmap { node: find(c, &text("node"))?.node, name: text("name") }
        }
        "block-dirty-bitmap-clear" => {
            Action::ClearBitmap { node: find(c, &text("node"))?.node, name: text("name") }
        }
        "abort" => Action::Abort,
        other => return fail(format!("the action '{other}' is not supported in a transaction")),
    })
}

/// How to take a step back.
enum Undo {
    Snapshot { overlay: Arc<Node> },
    Internal { node: Arc<Node>, name: String },
    AddedBitmap { node: Arc<Node>, name: String },
    RemovedBitmap(Bitmap),
}

fn prepare(
    c: &Control,
    action: &Action,
    held: &mut BTreeMap<usize, RwLockWriteGuard<'_, Arc<Node>>>,
    clock: u64,
) -> Result<Option<Undo>, QmpError> {
    let text = |e: ftvm_block::BlockError| QmpError::generic(e.to_string());
    Ok(match action {
        Action::Snapshot { front, node, overlay } => {
            free(c, node)?;
            free(c, overlay)?;
            let current = held.get(front).ok_or_else(|| QmpError::generic("the drive is gone"))?;
            if !Arc::ptr_eq(current, node) {
                return fail("a node can be overlaid once in a transaction");
            }
            node.flush().map_err(text)?;
            overlay.flush().map_err(text)?;
            overlay.set_backing(Some(Arc::clone(node))).map_err(text)?;
            Some(Undo::Snapshot { overlay: Arc::clone(overlay) })
        }
        Action::Internal { node, name, device } => {
            free(c, node)?;
            node.snapshot(&SnapshotChange::Create(Snapshot::new(name, clock))).map_err(|e| {
                QmpError::generic(format!("Failed to create snapshot '{name}' on device '{device}': {e}"))
            })?;
            Some(Undo::Internal { node: Arc::clone(node), name: name.clone() })
        }
        Action::AddBitmap { node, arguments } => {
            c.bitmaps().add(Arc::clone(node), arguments)?;
            let name = given(arguments, "name").unwrap_or_default().to_owned();
            Some(Undo::AddedBitmap { node: Arc::clone(node), name })
        }
        Action::RemoveBitmap { node, name } => Some(Undo::RemovedBitmap(c.bitmaps().remove(node, name)?)),
        Action::ClearBitmap { node, name } => {
            c.bitmaps().at(node, name)?;
            None
        }
        Action::Abort => return fail("Transaction aborted using Abort action"),
    })
}

fn undo(c: &Control, steps: Vec<Undo>) {
    for step in steps.into_iter().rev() {
        let result = match step {
            Undo::Snapshot { overlay } => overlay.set_backing(None).map_err(|e| e.to_string()),
            Undo::Internal { node, name } => {
                let change = SnapshotChange::Delete { id: None, name: Some(name) };
                node.snapshot(&change).map(|_| ()).map_err(|e| e.to_string())
            }
            Undo::AddedBitmap { node, name } => {
                c.bitmaps().remove(&node, &name).map(|_| ()).map_err(|e| e.to_string())
            }
            Undo::RemovedBitmap(bitmap) => {
                c.bitmaps().put_back(bitmap);
                Ok(())
            }
        };
        if let Err(e) = result {
            log::error!("a transaction could not be taken back: {e}");
        }
    }
}

/// All of it, or nothing.
fn transact(c: &Control, wanted: &[(&str, &Map<String, Value>)]) -> Result<(), QmpError> {
    no_pair(c)?;
    let clock = c.machine(|rt| rt.machine.stamp().ns)?;
    let mut made = Made::default();
    let actions = wanted.iter().map(|(kind, a)| action(c, kind, a, &mut made)).collect::<Result<Vec<_>, _>>();
    let actions = match actions {
        Ok(actions) => actions,
        Err(e) => {
            made.undo();
            return Err(e);
        }
    };
    let mut roots: BTreeMap<usize, Arc<Root>> = BTreeMap::new();
    for action in &actions {
        if let Action::Snapshot { front, .. } = action {
            if let Some(root) = c.outside.disk_root(*front) {
                roots.insert(*front, root);
            }
        }
    }
    // No request passes from here on, on any of the drives, so that their snapshots are of one moment.
    let mut held: BTreeMap<usize, _> = roots.iter().map(|(i, root)| (*i, root.hold())).collect();
    let mut steps = Vec::new();
    for action in &actions {
        match prepare(c, action, &mut held, clock) {
            Ok(step) => steps.extend(step),
            Err(e) => {
                drop(held);
                undo(c, steps);
                made.undo();
                return Err(e);
            }
        }
    }
    let mut exchanges = Vec::new();
    let mut behind = Vec::new();
    for action in &actions {
        match action {
            Action::Snapshot { front, node, overlay } => {
                // It may be the overlay of another action of this transaction: its old root is told below.
                behind.push((own_root_unheld(c, overlay, &roots), Arc::clone(node)));
                if let Some(slot) = held.get_mut(front) {
                    **slot = Arc::clone(overlay);
                }
                exchanges.push((*front, moved(overlay)));
            }
            Action::ClearBitmap { node, name } => {
                let bitmaps = c.bitmaps();
                if let Ok(at) = bitmaps.at(node, name) {
                    bitmaps.0[at].dirty.clear();
                }
            }
            _ => {}
        }
    }
    drop(held);
    for (root, node) in behind {
        if let Some(root) = root {
            *root.hold() = Arc::clone(&node);
        }
        to_the_back(&node);
    }
    if exchanges.is_empty() {
        return Ok(());
    }
    rename_legacy(c, &exchanges, &actions);
    follow(c, exchanges)
}

/// A drive that is no block node keeps its name: the node that was in front gets another.
fn rename_legacy(c: &Control, exchanges: &[(usize, Moved)], actions: &[Action]) {
    let backends = c.shared.backends();
    for (front, _) in exchanges {
        let legacy = backends.drives.get(*front).and_then(Option::as_ref).filter(|d| !d.node);
        for action in actions {
            if let (Some(_), Action::Snapshot { front: f, node, .. }) = (legacy, action) {
                if f == front {
                    node.rename(None);
                }
            }
        }
    }
}

/// The root that a node has as one that was added, found without looking into roots that are held.
fn own_root_unheld(c: &Control, node: &Arc<Node>, held: &BTreeMap<usize, Arc<Root>>) -> Option<Arc<Root>> {
    let count = c.shared.backends().drives.len();
    let roots = (0..count).filter(|i| !held.contains_key(i)).filter_map(|i| c.outside.disk_root(i));
    roots.into_iter().find(|root| Arc::ptr_eq(&root.node(), node))
}

/// A node that is only read from now on lets others open its file for reading.
pub fn to_the_back(node: &Node) {
    if let Err(e) = node.reopen(true) {
        log::info!("the node '{}' stays open for writing: {e}", node.name());
    }
}

pub fn snapshot(c: &Control, call: &mut Call) -> Reply {
    transact(c, &[("blockdev-snapshot", call.arguments)])?;
    done()
}

pub fn snapshot_sync(c: &Control, call: &mut Call) -> Reply {
    transact(c, &[("blockdev-snapshot-sync", call.arguments)])?;
    done()
}

pub fn transaction(c: &Control, call: &mut Call) -> Reply {
    let none = Map::new();
    let actions = call.arguments.get("actions").and_then(Value::as_array).cloned().unwrap_or_default();
    let wanted: Vec<(&str, &Map<String, Value>)> = actions
        .iter()
        .map(|a| (a["type"].as_str().unwrap_or_default(), a["data"].as_object().unwrap_or(&none)))
        .collect();
    transact(c, &wanted)?;
    done()
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
