//! `snapshot-save`, `snapshot-load` and `snapshot-delete`: snapshots of the machine in images that the user names, as
//! jobs.

use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::time::Duration;

use ftvm_block::copy::{Step, Work};
use ftvm_block::BlockError;
use ftvm_qmp::{Call, QmpError};
use serde_json::Value;

use super::graph::{find, Found};
use super::{Control, Reply};
use crate::host::jobs::{Body, End};
use crate::migration::snapshot::{self, Chosen, Wish};
use crate::runtime::control::Shared;
use crate::runtime::live::Runtime;
use crate::runtime::{Event, Events};

/// What a job does on the machine thread; it answers when it is done.
type Task = Box<dyn FnOnce(&mut Runtime, std::sync::mpsc::Sender<Result<(), String>>) + Send>;

struct SnapshotJob {
    task: Option<Task>,
    events: Events,
    shared: Arc<Shared>,
}

impl Work for SnapshotJob {
    fn step(&mut self) -> Result<Step, BlockError> {
        Ok(Step::Done)
    }
    fn progress(&self) -> (u64, u64) {
        (u64::from(self.task.is_none()), 1)
    }
}

impl Body for SnapshotJob {
    fn end(&mut self, end: End) -> Result<(), String> {
        let Some(task) = self.task.take().filter(|_| end == End::Complete) else { return Ok(()) };
        let (reply, answer) = channel();
        self.events.send(Event::Call(Box::new(move |rt| task(rt, reply)))).map_err(|_| "the program ends")?;
        loop {
            match answer.recv_timeout(Duration::from_millis(50)) {
                Ok(done) => return done,
                Err(RecvTimeoutError::Timeout) if !self.shared.jobs.is_closing() => {}
                Err(_) => return Err("the program ends".into()),
            }
        }
    }
}

/// The drive at whose front a node is.
fn drive(c: &Control, name: &str) -> Result<usize, QmpError> {
    match find(c, name) {
        Ok(Found { front: Some(index), .. }) => Ok(index),
        _ => Err(QmpError::generic(format!("No block device node '{name}'"))),
    }
}

/// The images that the arguments name.
fn chosen(c: &Control, call: &Call) -> Result<Chosen, QmpError> {
    let names = call.arguments.get("devices").and_then(Value::as_array).cloned().unwrap_or_default();
    let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
    let mut drives = names.iter().map(|name| drive(c, name)).collect::<Result<Vec<_>, _>>()?;
    if let Some(keeper) = call.arguments.get("vmstate").and_then(Value::as_str) {
        let Some(at) = names.iter().position(|n| *n == keeper) else {
            return Err(QmpError::generic(format!("vmstate block device '{keeper}' does not exist")));
        };
        // The first one keeps the state.
        drives[..=at].rotate_right(1);
    }
    Ok(Chosen(drives))
}

fn start(c: &Control, call: &Call, kind: &'static str, task: Task) -> Reply {
    let body = SnapshotJob { task: Some(task), events: c.events.clone(), shared: Arc::clone(&c.shared) };
    super::jobs::begin(c, call, kind, Box::new(body))
}

fn wish(c: &Control, call: &Call, kind: &'static str, wish: Wish) -> Reply {
    let task: Task = Box::new(move |rt, reply| {
        if let Err(e) = snapshot::begin(rt, wish, reply.clone()) {
            let _ = reply.send(Err(e));
        }
    });
    start(c, call, kind, task)
}

pub fn save(c: &Control, call: &mut Call) -> Reply {
    let (name, of) = (call.text("tag").to_owned(), Some(chosen(c, call)?));
    wish(c, call, "snapshot-save", Wish::Save { name, of })
}

pub fn load(c: &Control, call: &mut Call) -> Reply {
    let (name, of) = (call.text("tag").to_owned(), Some(chosen(c, call)?));
    wish(c, call, "snapshot-load", Wish::Load { name, of })
}

pub fn delete(c: &Control, call: &mut Call) -> Reply {
    let (name, of) = (call.text("tag").to_owned(), chosen(c, call)?);
    let task: Task = Box::new(move |rt, reply| {
        let _ = reply.send(snapshot::forget(rt, &name, Some(&of)));
    });
    start(c, call, "snapshot-delete", task)
}
