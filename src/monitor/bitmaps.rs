//! Commands about dirty bitmaps.

use std::sync::Arc;

use ftvm_block::bitmap::{BitmapInfo, DirtyBitmap, Use};
use ftvm_block::bits::Bits;
use ftvm_block::{BlockError, Image, Node};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::graph::{find, given};
use super::{done, Control, Reply};

fn text(e: BlockError) -> QmpError {
    QmpError::generic(e.to_string())
}

/// QEMU's `BlockDirtyInfo` of each of a node's bitmaps.
pub fn describe(node: &Node) -> Vec<Value> {
    let one = |b: BitmapInfo| {
        let mut info = json!({
            "name": b.name, "recording": b.recording, "persistent": b.persistent, "busy": b.busy,
            "granularity": b.granularity, "count": b.count,
        });
        if b.inconsistent {
            info["inconsistent"] = json!(true);
        }
        info
    };
    node.bitmaps().iter().map(|b| one(b.info())).collect()
}

/// The node of a bitmap that is there already.
pub fn node_of(c: &Control, name: &str) -> Result<Arc<Node>, QmpError> {
    let found = find(c, name).map_err(|_| QmpError::generic(format!("Node '{name}' not found")))?;
    Ok(found.node)
}

/// What a bitmap notes is noted on one host only.
fn no_pair(c: &Control) -> Result<(), QmpError> {
    c.change(|rt| match rt.ft.is_some() {
        true => Err(QmpError::generic(
            "dirty bitmaps are refused while fault tolerance is on, because the other host would go live without what \
             they have noted: ft-turn-off ends that",
        )),
        false => Ok(()),
    })
}

/// `block-dirty-bitmap-add` on a node that was found.
pub fn add_to(node: &Node, a: &Map<String, Value>) -> Result<Arc<DirtyBitmap>, QmpError> {
    let yes = |key: &str| a.get(key) == Some(&Value::Bool(true));
    let granularity = match a.get("granularity") {
        None => None,
        Some(g) => Some(
            g.as_u64()
                .filter(|g| *g <= u64::from(u32::MAX))
                .ok_or_else(|| QmpError::generic("Parameter 'granularity' expects uint32_t"))?,
        ),
    };
    let name = given(a, "name").unwrap_or_default();
    node.add_bitmap(name, granularity, yes("persistent"), !yes("disabled")).map_err(text)
}

pub fn add(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    if call.text("name").is_empty() {
        return Err(QmpError::generic("Bitmap name cannot be empty"));
    }
    add_to(&find(c, call.text("node"))?.node, call.arguments)?;
    done()
}

pub fn remove(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    node_of(c, call.text("node"))?.remove_bitmap(call.text("name")).map_err(text)?;
    done()
}

/// A bitmap to be used, and what undoes it.
pub fn clear_of(node: &Node, name: &str) -> Result<(Arc<DirtyBitmap>, Bits), QmpError> {
    let bitmap = node.usable_bitmap(name, Use::Change).map_err(text)?;
    let had = bitmap.clear();
    Ok((bitmap, had))
}

pub fn clear(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    clear_of(node_of(c, call.text("node"))?.as_ref(), call.text("name"))?;
    done()
}

/// Let a bitmap record, or not; whether it did before.
pub fn record_of(node: &Node, name: &str, yes: bool) -> Result<(Arc<DirtyBitmap>, bool), QmpError> {
    let bitmap = node.usable_bitmap(name, Use::Read).map_err(text)?;
    let was = bitmap.info().recording;
    bitmap.record(yes);
    Ok((bitmap, was))
}

pub fn enable(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    record_of(node_of(c, call.text("node"))?.as_ref(), call.text("name"), true)?;
    done()
}

pub fn disable(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    record_of(node_of(c, call.text("node"))?.as_ref(), call.text("name"), false)?;
    done()
}

/// What `block-dirty-bitmap-merge` is about, its nodes found.
pub struct Merge {
    node: Arc<Node>,
    target: String,
    sources: Vec<(Arc<Node>, String)>,
}

impl Merge {
    pub fn wanted(c: &Control, a: &Map<String, Value>) -> Result<Self, QmpError> {
        let text = |a: &Map<String, Value>, key| given(a, key).unwrap_or_default().to_owned();
        let node = node_of(c, &text(a, "node"))?;
        let source = |source: &Value| match source.as_object() {
            None => Ok((Arc::clone(&node), source.as_str().unwrap_or_default().to_owned())),
            Some(external) => Ok((node_of(c, &text(external, "node"))?, text(external, "name"))),
        };
        let sources = a.get("bitmaps").and_then(Value::as_array).into_iter().flatten();
        let sources = sources.map(source).collect::<Result<_, QmpError>>()?;
        Ok(Merge { target: text(a, "target"), node, sources })
    }

    /// The drives' nodes that it is about.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// All of it or nothing; the target and what it had.
    pub fn run(&self) -> Result<(Arc<DirtyBitmap>, Bits), QmpError> {
        let target = self.node.bitmap(&self.target).map_err(text)?;
        let size = self.node.size();
        let mut merged = Bits::new(size, target.info().granularity);
        for (from, name) in &self.sources {
            let bits = from.usable_bitmap(name, Use::Read).map_err(text)?.bits();
            if bits.size() != size {
                return Err(QmpError::generic(format!(
                    "Bitmaps are of different sizes (destination size is {size}, source size is {}) and can't be \
                     merged",
                    bits.size()
                )));
            }
            merged.merge(&bits);
        }
        target.check(Use::Change, self.node.read_only()).map_err(text)?;
        let had = target.add(&merged);
        Ok((target, had))
    }
}

pub fn merge(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    Merge::wanted(c, call.arguments)?.run()?;
    done()
}

/// `x-debug-block-dirty-bitmap-sha256`
pub fn sha256(c: &Control, call: &mut Call) -> Reply {
    let bitmap = node_of(c, call.text("node"))?.bitmap(call.text("name")).map_err(text)?;
    Ok(json!({"sha256": bitmap.bits().sha256()}))
}
