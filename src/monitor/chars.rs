//! Character devices.

use ftvm_qmp::Call;
use serde_json::json;

use super::{Control, Reply};

/// A character device as `query-chardev` shows it.
#[derive(Clone, Debug)]
pub struct CharView {
    pub label: String,
    /// `pty:/dev/pts/3`, `unix:PATH,server=on`, ...
    pub filename: String,
}

impl CharView {
    /// The type of its object.
    pub fn kind(&self) -> String {
        let kind = match self.filename.split(':').next().unwrap_or_default() {
            "unix" | "tcp" | "fd" | "disconnected" => "socket",
            "" => "null",
            other => other,
        };
        format!("chardev-{kind}")
    }
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    let chars = c.chars.lock().map(|c| c.clone()).unwrap_or_default();
    let one = |v: &CharView| json!({"label": v.label, "filename": v.filename, "frontend-open": true});
    Ok(chars.iter().map(one).collect())
}

pub fn backends(_: &Control, _: &mut Call) -> Reply {
    Ok(["file", "null", "pipe", "pty", "socket", "stdio"].iter().map(|n| json!({"name": n})).collect())
}
