//! `commit`: what an image keeps in front of the one below goes into that, while the guest waits for its disks.

use ftvm_block::{BlockError, Held, Image, Node};
use ftvm_qmp::QmpError;

use super::Control;
use crate::runtime::live::Runtime;

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

/// Copy what `top` holds itself into the image below.
fn copy(top: &Node) -> Result<(), BlockError> {
    let base = top.backing().ok_or_else(|| BlockError::Unsupported("Operation not supported".into()))?;
    top.flush()?;
    base.reopen(false)?;
    let done = fill(top, &base);
    // Nobody writes there but this.
    if let Err(e) = base.reopen(true) {
        log::warn!("{}: {e}", base.name());
    }
    done
}

fn fill(top: &Node, base: &Node) -> Result<(), BlockError> {
    if base.size() < top.size() {
        base.resize(top.size())?;
    }
    let mut at = 0;
    let mut piece = Vec::new();
    while at < top.size() {
        let (held, len) = top.held(at)?;
        let len = len.min(PIECE).min(top.size() - at);
        if held != Held::None {
            piece.resize(len as usize, 0);
            top.read_at(at, &mut piece)?;
            match piece.iter().all(|b| *b == 0) {
                true => base.write_zeroes(at, len, true)?,
                false => base.write_at(at, &piece)?,
            }
        }
        at += len;
    }
    base.flush()
}

/// Commit the image of a drive.
fn commit(rt: &mut Runtime, index: usize, name: &str) -> Result<(), QmpError> {
    let failed = |e: &dyn std::fmt::Display| QmpError::generic(format!("'commit' error for '{name}': {e}"));
    let root = rt
        .outside
        .disk_root(index)
        .ok_or_else(|| QmpError::generic(format!("Device '{name}' has no medium")))?;
    // Requests that are under way end first, others wait.
    let top = root.hold();
    if top.chain().iter().any(|node| rt.shared.jobs.user_of(node).is_some()) {
        return Err(failed(&"Device or resource busy"));
    }
    copy(&top).map_err(|e| failed(&e))
}

/// `commit NAME`, `commit all`.
pub fn run(c: &Control, name: &str) -> Result<String, QmpError> {
    super::graph::no_pair(c)?;
    let name = name.to_owned();
    c.control(move |rt| {
        let drives: Vec<(usize, String)> = {
            let backends = rt.shared.backends();
            let named =
                backends.drives.iter().enumerate().filter_map(|(i, d)| Some((i, d.as_ref()?.id.clone())));
            named.collect()
        };
        if name != "all" {
            let index = rt.shared.backends().drive(&name);
            let index = index.ok_or_else(|| QmpError::generic(format!("Device '{name}' not found")))?;
            return commit(rt, index, &name).map(|()| String::new());
        }
        for (index, id) in drives {
            let stands_on_another =
                rt.outside.disk_root(index).is_some_and(|root| root.node().backing().is_some());
            if stands_on_another {
                commit(rt, index, &id)?;
            }
        }
        Ok(String::new())
    })
}
