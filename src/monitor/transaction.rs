//! Transactions: several changes of the block graph at one moment, all or none.
//!
//! Everything is looked up first; then, with the requests of all the drives held, it is prepared, each action on top of
//! those before it, and taken back if one fails. Only when nothing can fail any more do overlays come to the front
//! and jobs begin.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLockWriteGuard};

use ftvm_block::bitmap::DirtyBitmap;
use ftvm_block::bits::Bits;
use ftvm_block::{Image, Node, Root, Snapshot, SnapshotChange};
use ftvm_qmp::{Call, QmpError};
use serde_json::{Map, Value};

use super::backup::BackupWish;
use super::bitmaps::{self, Merge};
use super::graph::{find, follow, free, given, moved, new_overlay, no_pair, overlay_of, to_the_back, Made};
use super::{done, Control, Reply};
use crate::host::backends::Moved;
use crate::host::jobs::Prepared;

fn fail<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// One action of a transaction, everything looked up.
enum Action {
    Snapshot { front: usize, node: Arc<Node>, overlay: Arc<Node> },
    Internal { node: Arc<Node>, name: String, device: String },
    AddBitmap { node: Arc<Node>, arguments: Map<String, Value> },
    RemoveBitmap { node: Arc<Node>, name: String },
    ClearBitmap { node: Arc<Node>, name: String },
    RecordBitmap { node: Arc<Node>, name: String, yes: bool },
    MergeBitmaps(Merge),
    Backup(BackupWish),
    Abort,
}

impl Action {
    /// The node whose requests are held.
    fn node(&self) -> Option<&Arc<Node>> {
        match self {
            Action::Snapshot { node, .. }
            | Action::AddBitmap { node, .. }
            | Action::RemoveBitmap { node, .. }
            | Action::ClearBitmap { node, .. }
            | Action::RecordBitmap { node, .. } => Some(node),
            Action::MergeBitmaps(merge) => Some(merge.node()),
            Action::Backup(wish) => Some(wish.source()),
            Action::Internal { .. } | Action::Abort => None,
        }
    }
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
            Action::RemoveBitmap { node: bitmaps::node_of(c, &text("node"))?, name: text("name") }
        }
        "block-dirty-bitmap-clear" => {
            Action::ClearBitmap { node: bitmaps::node_of(c, &text("node"))?, name: text("name") }
        }
        "block-dirty-bitmap-enable" | "block-dirty-bitmap-disable" => Action::RecordBitmap {
            node: bitmaps::node_of(c, &text("node"))?,
            name: text("name"),
            yes: kind == "block-dirty-bitmap-enable",
        },
        "block-dirty-bitmap-merge" => Action::MergeBitmaps(Merge::wanted(c, a)?),
        "blockdev-backup" => Action::Backup(BackupWish::to_node(c, a)?),
        "drive-backup" => Action::Backup(BackupWish::to_file(c, a)?),
        "abort" => Action::Abort,
        other => return fail(format!("the action '{other}' is not supported in a transaction")),
    })
}

/// How to take a step back.
enum Undo {
    Snapshot { overlay: Arc<Node> },
    Internal { node: Arc<Node>, name: String },
    AddedBitmap { node: Arc<Node>, name: String },
    RemovedBitmap { node: Arc<Node>, bitmap: Arc<DirtyBitmap> },
    ChangedBitmap { bitmap: Arc<DirtyBitmap>, had: Bits },
    RecordedBitmap { bitmap: Arc<DirtyBitmap>, was: bool },
    Job(Prepared),
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
            let bitmap = bitmaps::add_to(node, arguments)?;
            Some(Undo::AddedBitmap { node: Arc::clone(node), name: bitmap.name().to_owned() })
        }
        Action::RemoveBitmap { node, name } => {
            let bitmap = node.remove_bitmap(name).map_err(text)?;
            Some(Undo::RemovedBitmap { node: Arc::clone(node), bitmap })
        }
        Action::ClearBitmap { node, name } => {
            let (bitmap, had) = bitmaps::clear_of(node, name)?;
            Some(Undo::ChangedBitmap { bitmap, had })
        }
        Action::RecordBitmap { node, name, yes } => {
            let (bitmap, was) = bitmaps::record_of(node, name, *yes)?;
            Some(Undo::RecordedBitmap { bitmap, was })
        }
        Action::MergeBitmaps(merge) => {
            let (bitmap, had) = merge.run()?;
            Some(Undo::ChangedBitmap { bitmap, had })
        }
        Action::Backup(wish) => Some(Undo::Job(wish.prepare(c)?)),
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
                node.remove_bitmap(&name).map(|_| ()).map_err(|e| e.to_string())
            }
            Undo::RemovedBitmap { node, bitmap } => {
                node.put_bitmap_back(bitmap);
                Ok(())
            }
            Undo::ChangedBitmap { bitmap, had } => {
                bitmap.replace(had);
                Ok(())
            }
            Undo::RecordedBitmap { bitmap, was } => {
                bitmap.record(was);
                Ok(())
            }
            Undo::Job(job) => c.shared.jobs.discard(job),
        };
        if let Err(e) = result {
            log::error!("a transaction could not be taken back: {e}");
        }
    }
}

/// All of it, or nothing.
pub fn transact(c: &Control, wanted: &[(&str, &Map<String, Value>)]) -> Result<(), QmpError> {
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
    let nodes: Vec<&Arc<Node>> = actions.iter().filter_map(Action::node).collect();
    for i in 0..c.shared.backends().drives.len() {
        let root = c.outside.disk_root(i).filter(|r| nodes.iter().any(|n| Arc::ptr_eq(n, &r.node())));
        roots.extend(root.map(|root| (i, root)));
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
        if let Action::Snapshot { front, node, overlay } = action {
            {
                // It may be the overlay of another action of this transaction: its old root is told below.
                behind.push((own_root_unheld(c, overlay, &roots), Arc::clone(node)));
                if let Some(slot) = held.get_mut(front) {
                    **slot = Arc::clone(overlay);
                }
                exchanges.push((*front, moved(overlay)));
            }
        }
    }
    drop(held);
    for step in steps {
        if let Undo::Job(job) = step {
            c.shared.jobs.launch(job);
        }
    }
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
