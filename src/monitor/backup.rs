//! Backups: the contents of one moment, all of them or what a dirty bitmap says.

use std::sync::Arc;

use ftvm_block::bitmap::{DirtyBitmap, Use};
use ftvm_block::copy::{Backup, Part, Step, Work};
use ftvm_block::{BlockError, Node};
use ftvm_qmp::{Call, QmpError};
use serde_json::{Map, Value};

use super::graph::{free, given, no_pair};
use super::jobs::{active, drive_target, part, target, wanted};
use super::{done, Control, Reply};
use crate::host::jobs::{Body, End, Prepared};

fn fail<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// What becomes of a job's bitmap at its end (QEMU's `BitmapSyncMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OnSuccess,
    Never,
    Always,
}

/// A bitmap that a job works on or brings up to date.
struct Synced {
    bitmap: Arc<DirtyBitmap>,
    mode: Mode,
}

struct BackupJob {
    work: Backup,
    synced: Option<Synced>,
}

impl Work for BackupJob {
    fn step(&mut self) -> Result<Step, BlockError> {
        self.work.step()
    }
    fn progress(&self) -> (u64, u64) {
        self.work.progress()
    }
}

impl Body for BackupJob {
    fn end(&mut self, end: End) -> Result<(), String> {
        let Some(Synced { bitmap, mode }) = self.synced.take() else { return Ok(()) };
        match (end, mode) {
            (_, Mode::Never) | (End::Abort, Mode::OnSuccess) => bitmap.thaw(false, None),
            // What was copied is dealt with, the rest is not.
            (End::Abort, Mode::Always) => bitmap.thaw(true, Some(&self.work.left())),
            _ => bitmap.thaw(true, None),
        }
        Ok(())
    }
}

/// A backup that is asked for, its nodes found.
pub struct BackupWish {
    front: usize,
    source: Arc<Node>,
    target: Arc<Node>,
    arguments: Map<String, Value>,
}

/// The bitmap that the arguments name, and whether it says what is copied; QEMU's checks in QEMU's order.
fn bitmap(source: &Node, a: &Map<String, Value>) -> Result<Option<(Synced, bool)>, QmpError> {
    let sync = given(a, "sync").unwrap_or_default();
    let (name, mut mode) = (given(a, "bitmap"), given(a, "bitmap-mode"));
    let by_bitmap = matches!(sync, "bitmap" | "incremental");
    if by_bitmap && name.is_none() {
        return fail(format!("must provide a valid bitmap name for '{sync}' sync mode"));
    }
    if sync == "incremental" {
        if mode.is_some_and(|m| m != "on-success") {
            return fail("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
        }
        mode = Some("on-success");
    }
    let Some(name) = name else {
        return match mode {
            Some(_) => fail("Cannot specify bitmap sync mode without a bitmap"),
            None => Ok(None),
        };
    };
    let found = source.bitmap(name);
    let bitmap = found.map_err(|_| QmpError::generic(format!("Bitmap '{name}' could not be found")))?;
    let Some(text) = mode else { return fail("Bitmap sync mode must be given when providing a bitmap") };
    bitmap.check(Use::Read, false).map_err(|e| QmpError::generic(e.to_string()))?;
    if sync == "none" {
        return fail(format!("sync mode '{sync}' does not produce meaningful bitmap outputs"));
    }
    let mode = match text {
        "never" => Mode::Never,
        "always" => Mode::Always,
        _ => Mode::OnSuccess,
    };
    if mode == Mode::Never && !by_bitmap {
        return fail(format!(
            "Bitmap sync mode '{text}' has no meaningful effect when combined with sync mode '{sync}'"
        ));
    }
    Ok(Some((Synced { bitmap, mode }, by_bitmap)))
}

impl BackupWish {
    /// `blockdev-backup`
    pub fn to_node(c: &Control, a: &Map<String, Value>) -> Result<Self, QmpError> {
        let (front, source) = active(c, given(a, "device").unwrap_or_default())?;
        let target = target(c, given(a, "target").unwrap_or_default(), &source)?;
        Ok(BackupWish { front, source, target, arguments: a.clone() })
    }

    /// `drive-backup`
    pub fn to_file(c: &Control, a: &Map<String, Value>) -> Result<Self, QmpError> {
        let device = given(a, "device").unwrap_or_default();
        let (front, source) = active(c, device)?;
        let target = drive_target(c, a, device)?;
        Ok(BackupWish { front, source, target, arguments: a.clone() })
    }

    /// What is copied.
    pub fn source(&self) -> &Arc<Node> {
        &self.source
    }

    /// Everything but the beginning of the work; the moment of which the contents are saved. The caller keeps requests out.
    pub fn prepare(&self, c: &Control) -> Result<Prepared, QmpError> {
        let a = &self.arguments;
        let (source, target) = (&self.source, &self.target);
        free(c, source)?;
        free(c, target)?;
        let nodes = vec![Arc::clone(source), Arc::clone(target)];
        let wanted = wanted("backup", a, given(a, "device").unwrap_or_default(), nodes)?;
        let found = bitmap(source, a)?;
        let part =
            if found.as_ref().is_some_and(|(_, by_bitmap)| *by_bitmap) { Part::Full } else { part(a)? };
        let make = || -> Result<Box<dyn Body>, String> {
            let only = found.as_ref().filter(|(_, by_bitmap)| *by_bitmap).map(|(s, _)| s.bitmap.bits());
            let work = Backup::new(Arc::clone(source), Arc::clone(target), &part, only.as_ref());
            let work = work.map_err(|e| e.to_string())?;
            let synced = found.map(|(synced, _)| synced);
            if let Some(synced) = &synced {
                synced.bitmap.freeze();
            }
            Ok(Box::new(BackupJob { work, synced }))
        };
        c.shared.jobs.prepare(wanted, &c.shared.events, make).map_err(QmpError::generic)
    }
}

fn begin(c: &Control, wish: &BackupWish) -> Reply {
    let root = c.outside.disk_root(wish.front).ok_or_else(|| QmpError::generic("the drive is gone"))?;
    // It begins between two requests.
    let prepared = {
        let _held = root.hold();
        wish.prepare(c)?
    };
    c.shared.jobs.launch(prepared);
    done()
}

pub fn backup(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    begin(c, &BackupWish::to_node(c, call.arguments)?)
}

pub fn drive_backup(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    begin(c, &BackupWish::to_file(c, call.arguments)?)
}
