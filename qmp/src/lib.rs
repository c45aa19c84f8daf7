//! QMP: the wire protocol of QEMU's machine monitor.
//!
//! This crate knows the protocol (greeting, capabilities negotiation, commands with ids, errors in
//! QEMU's classes, events); what a command does is the caller's, behind [`Handler`].

mod server;
mod session;

pub use server::{serve_listener, serve_stream, EventSink, Hub, Listener};
pub use session::{Session, Step};

use serde_json::{json, Map, Value};

/// An error as QMP reports it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound`, `DeviceNotActive` or `KVMMissingCap`.
    pub class: &'static str,
    pub desc: String,
}

impl QmpError {
    /// A `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        QmpError { class: "GenericError", desc: desc.into() }
    }

    /// `CommandNotFound` with QEMU's text.
    pub fn command_not_found(name: &str) -> Self {
        QmpError { class: "CommandNotFound", desc: format!("The command {name} has not been found") }
    }

    /// The error reply, with the request's id if it had one.
    pub fn reply(&self, id: Option<&Value>) -> Value {
        let mut reply = json!({"error": {"class": self.class, "desc": self.desc}});
        if let (Some(id), Some(map)) = (id, reply.as_object_mut()) {
            map.insert("id".into(), id.clone());
        }
        reply
    }
}

/// What executes commands.
pub trait Handler: Send + Sync {
    /// Execute `command` with checked-to-be-an-object `arguments`.
    fn execute(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError>;
    /// The `version` member of the greeting.
    fn version(&self) -> Value;
}

/// Fail on the first argument that is not in `known`, with QEMU's text.
pub fn only(arguments: &Map<String, Value>, known: &[&str]) -> Result<(), QmpError> {
    match arguments.keys().find(|k| !known.contains(&k.as_str())) {
        Some(key) => Err(QmpError::generic(format!("Parameter '{key}' is unexpected"))),
        None => Ok(()),
    }
}
