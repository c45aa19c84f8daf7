//! `blockdev-reopen`: block nodes with other options, while they are in use.

use std::sync::Arc;

use ftvm_block::{Image, Node};
use ftvm_qmp::{Call, QmpError};
use serde_json::{Map, Value};

use super::block::flatten;
use super::graph::{self, find, free, given, no_pair};
use super::jobs::is_used;
use super::{done, Control, Reply};
use crate::assembly::open_options;
use crate::cli::drive::{self, Backing, DriveConfig};
use crate::cli::keyval::Params;
use crate::runtime::live::Runtime;

fn fail<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// A node, and what it is to be.
struct Change {
    index: usize,
    node: Arc<Node>,
    old: DriveConfig,
    new: DriveConfig,
    /// What it is to stand on, if that is another than now.
    backing: Option<Option<Arc<Node>>>,
}

/// The drives by their numbers, as they are configured.
fn drives(c: &Control) -> Vec<Option<DriveConfig>> {
    c.shared.backends().drives.clone()
}

/// Read the options as `blockdev-add` does; the node must be there, and nothing may be said that cannot change.
fn change(c: &Control, options: &Map<String, Value>) -> Result<Option<Change>, QmpError> {
    let name = given(options, "node-name").ok_or_else(|| QmpError::generic("node-name not specified"))?;
    let all = drives(c);
    let cannot = |key: &str| fail(format!("Cannot change the option '{key}'"));
    let mut params = Params::default();
    flatten("", options, &mut params);
    if let Some(path) = params.get("filename").map(str::to_owned) {
        params.set("filename", &c.fdsets.resolve(&path)?);
    }
    let with_protocol = all.iter().flatten().find(|d| d.protocol.as_deref() == Some(name));
    if let Some(above) = with_protocol {
        // The node below a format: the format's mode is its own.
        if params.get("driver").is_some_and(|d| !matches!(d, "file" | "host_device" | "host_cdrom")) {
            return cannot("driver");
        }
        return match params.get("filename") == above.file.as_deref() {
            true => Ok(None),
            false => cannot("filename"),
        };
    }
    let missing = || QmpError::generic(format!("Failed to find node with node-name='{name}'"));
    let index =
        all.iter().position(|d| d.as_ref().is_some_and(|d| d.node && d.id == name)).ok_or_else(missing)?;
    let old = all[index].clone().ok_or_else(missing)?;
    let node = find(c, name).map_err(|_| missing())?.node;
    let mut known: Vec<DriveConfig> = all.iter().flatten().filter(|d| d.id != name).cloned().collect();
    if let Some(protocol) = &old.protocol {
        known.push(DriveConfig {
            id: protocol.clone(),
            protocol: None,
            format: Some("raw".into()),
            cache: drive::Cache::Writeback,
            ..old.clone()
        });
    }
    drive::add_blockdev(&params, &mut known).map_err(|e| QmpError::generic(e.to_string()))?;
    let new = known.pop().ok_or_else(missing)?;
    for (key, same) in [
        ("driver", new.format == old.format),
        ("file", new.file == old.file && (new.protocol == old.protocol || new.protocol.is_none())),
        ("encrypt.key-secret", new.key_secret == old.key_secret),
        ("locking", new.locking == old.locking),
    ] {
        if !same {
            return cannot(key);
        }
    }
    let backing = match (&new.backing, node.backing()) {
        (Backing::Header, Some(_)) => return fail(format!("backing is missing for '{name}'")),
        (Backing::Header | Backing::Nothing, None) => None,
        (Backing::Nothing, Some(_)) => Some(None),
        (Backing::Node(below), now) => {
            let below = find(c, below)?.node;
            match now {
                Some(now) if Arc::ptr_eq(&now, &below) => None,
                _ if below.chain().iter().any(|n| Arc::ptr_eq(n, &node)) => {
                    return fail(format!(
                        "Making '{}' a backing child of '{name}' would create a cycle",
                        below.name()
                    ));
                }
                _ => Some(Some(below)),
            }
        }
    };
    Ok(Some(Change { index, node, old, new, backing }))
}

impl Change {
    fn check(&self, c: &Control) -> Result<(), QmpError> {
        free(c, &self.node)?;
        let closes = self.new.read_only && !self.node.read_only();
        if closes
            && (is_used(c, &self.node)? || c.shared.exports.user_of(&self.node).is_some_and(|e| e.writable))
        {
            let name = self.node.name();
            return fail(format!("Read-only block node '{name}' cannot support read-write users"));
        }
        Ok(())
    }

    /// From one configuration to the other; what the node stood on before.
    fn apply(
        &self,
        to: &DriveConfig,
        backing: Option<&Option<Arc<Node>>>,
    ) -> Result<Option<Arc<Node>>, QmpError> {
        let text = |e: ftvm_block::BlockError| QmpError::generic(e.to_string());
        let below = self.node.backing();
        if let Some(backing) = backing {
            self.node.set_backing(backing.clone()).map_err(text)?;
        }
        let wanted = open_options(to);
        let same = (self.old.cache, self.old.discard, self.old.detect_zeroes)
            == (self.new.cache, self.new.discard, self.new.detect_zeroes);
        let opened = match same {
            true => self.node.reopen(to.read_only),
            false => self.node.reopen_as(|o| {
                o.read_only = wanted.read_only;
                (o.direct, o.no_flush) = (wanted.direct, wanted.no_flush);
                (o.discard, o.detect_zeroes) = (wanted.discard, wanted.detect_zeroes);
            }),
        };
        if opened.is_err() && backing.is_some() {
            self.node.set_backing(below.clone()).map_err(text)?;
        }
        opened.map(|()| below).map_err(text)
    }
}

/// The configuration follows.
fn note(rt: &mut Runtime, changes: Vec<(usize, DriveConfig)>) {
    for (index, to) in changes {
        if let Some(Some(drive)) = rt.shared.backends().drives.get_mut(index) {
            drive.read_only = to.read_only;
            drive.cache = to.cache;
            drive.discard = to.discard;
            drive.detect_zeroes = to.detect_zeroes;
            drive.backing = to.backing;
        }
        rt.outside
            .set_durable_of(index, matches!(to.cache, drive::Cache::Writethrough | drive::Cache::DirectSync));
    }
    graph::note(rt);
}

pub fn reopen(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    let list = call.arguments.get("options").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut changes = Vec::new();
    for options in list.iter().filter_map(Value::as_object) {
        changes.extend(change(c, options)?);
    }
    changes.iter().try_for_each(|change| change.check(c))?;
    let mut undone: Vec<(&Change, Option<Arc<Node>>)> = Vec::new();
    for change in &changes {
        match change.apply(&change.new, change.backing.as_ref()) {
            Ok(below) => undone.push((change, below)),
            Err(e) => {
                for (change, below) in undone.into_iter().rev() {
                    let backing = change.backing.as_ref().map(|_| below);
                    if let Err(e) = change.apply(&change.old, backing.as_ref()) {
                        log::error!("blockdev-reopen could not be taken back: {}", e.desc);
                    }
                }
                return Err(e);
            }
        }
    }
    let noted = changes.into_iter().map(|change| (change.index, change.new)).collect();
    c.change(move |rt| {
        note(rt, noted);
        done()
    })
}
