//! `query-command-line-options`, made from the tables that the command line itself is read with.

use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::{Control, Reply};
use crate::cli::keys::{Value as Kind, KEYS};

pub fn query(_: &Control, call: &mut Call) -> Reply {
    let wanted = call.text("option");
    let mut out: Vec<Value> = Vec::new();
    for (option, keys) in KEYS {
        if !wanted.is_empty() && wanted != *option {
            continue;
        }
        let parameters = keys.iter().map(|(name, kind)| {
            let kind = match kind {
                Kind::Text => "string",
                Kind::Bool => "boolean",
                Kind::Number => "number",
                Kind::Size => "size",
            };
            json!({"name": name, "type": kind})
        });
        out.push(json!({"option": option, "parameters": parameters.collect::<Vec<_>>()}));
    }
    if !wanted.is_empty() && out.is_empty() {
        return Err(QmpError::generic(format!("invalid option name: {wanted}")));
    }
    Ok(json!(out))
}
