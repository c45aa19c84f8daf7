//! QMP: the wire protocol of QEMU's machine monitor.
//!
//! This crate knows the protocol (greeting, negotiation, commands with ids, errors in QEMU's classes, events, file
//! descriptors) and the [interface](schema) as data: arguments are checked and introspection is answered from it. What a
//! command does is the caller's, behind [`Handler`].

mod check;
mod events;
mod fds;
mod introspect;
pub mod manual;
pub mod schema;
mod server;
mod session;

pub use events::EventSink;
pub use fds::Fds;
pub use schema::Schema;
pub use server::{serve_listener, serve_stream, Hub, Listener};
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

    /// `DeviceNotFound` with QEMU's text.
    pub fn device_not_found(name: &str) -> Self {
        QmpError { class: "DeviceNotFound", desc: format!("Device '{name}' not found") }
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

/// A command to be executed; its arguments are what the schema says.
pub struct Call<'a> {
    pub command: &'a str,
    pub arguments: &'a Map<String, Value>,
    /// File descriptors that this client has passed.
    pub fds: &'a mut Fds,
}

impl Call<'_> {
    /// A string argument; empty if it is not given.
    pub fn text(&self, name: &str) -> &str {
        self.arguments.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// An integer argument.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.arguments.get(name).and_then(Value::as_i64)
    }

    /// A boolean argument.
    pub fn bool(&self, name: &str) -> Option<bool> {
        self.arguments.get(name).and_then(Value::as_bool)
    }
}

/// What executes commands.
pub trait Handler: Send + Sync {
    /// Execute a command of the [`Schema`].
    fn execute(&self, call: &mut Call) -> Result<Value, QmpError>;
    /// The `version` member of the greeting.
    fn version(&self) -> Value;
}
