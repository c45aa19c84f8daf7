//! Whether a value is what the schema says, with QEMU's words for what is wrong.

use serde_json::{Map, Value};

use crate::schema::{Arguments, Command, Definition, Member, Schema, Type};
use crate::QmpError;

fn wrong_type(path: &str, expected: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
}

fn below(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// The kind of JSON value that begins values of a type.
fn json_type(schema: &Schema, kind: &Type) -> &'static str {
    match kind {
        Type::List(_) => "array",
        Type::Named(name) => match name.as_str() {
            "str" => "string",
            "int" => "integer",
            "number" => "number",
            "bool" => "boolean",
            "null" => "null",
            "any" => "value",
            name => match schema.types.get(name) {
                Some(Definition::Enum(_)) => "string",
                _ => "object",
            },
        },
    }
}

fn is_json_type(value: &Value, name: &str) -> bool {
    match value {
        Value::Null => name == "null",
        Value::Bool(_) => name == "boolean",
        Value::Number(n) => name == "number" || (name == "integer" && !n.is_f64()),
        Value::String(_) => name == "string",
        Value::Array(_) => name == "array",
        Value::Object(_) => name == "object",
    }
}

impl Schema {
    /// Check a command's arguments.
    pub fn check_command(&self, command: &Command, map: &Map<String, Value>) -> Result<(), QmpError> {
        match &command.arguments {
            Arguments::Members(list) if command.open => {
                list.iter().try_for_each(|m| self.check_member("", m, map))
            }
            arguments => self.check_arguments(arguments, map),
        }
    }

    /// Check arguments, or the data of an event.
    pub fn check_arguments(&self, arguments: &Arguments, map: &Map<String, Value>) -> Result<(), QmpError> {
        match arguments {
            Arguments::Members(members) => self.check_members("", &[members], map),
            Arguments::Boxed(name) => self.check_object("", name, map),
        }
    }

    /// Check a value of a type; `path` says where it is.
    pub fn check(&self, path: &str, kind: &Type, value: &Value) -> Result<(), QmpError> {
        let expected = json_type(self, kind);
        if let (Type::Named(name), Some(Definition::Alternate(types))) = (kind, self.definition(kind)) {
            let fits = types.iter().find(|t| is_json_type(value, json_type(self, t)));
            return match fits {
                Some(t) => self.check(path, t, value),
                None => Err(wrong_type(path, name.trim_end_matches("OrNull"))),
            };
        }
        if expected != "value" && !is_json_type(value, expected) {
            return Err(wrong_type(path, expected));
        }
        match (kind, value) {
            (Type::List(inner), Value::Array(list)) => {
                list.iter().enumerate().try_for_each(|(i, v)| self.check(&format!("{path}[{i}]"), inner, v))
            }
            (Type::Named(name), Value::Object(map)) if name != "any" => self.check_object(path, name, map),
            (_, Value::String(text)) => match self.definition(kind) {
                Some(Definition::Enum(values)) if !values.contains(text) => {
                    let member = path.rsplit('.').next().unwrap_or(path);
                    Err(QmpError::generic(format!("Parameter '{member}' does not accept value '{text}'")))
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn definition(&self, kind: &Type) -> Option<&Definition> {
        match kind {
            Type::Named(name) => self.types.get(name),
            Type::List(_) => None,
        }
    }

    fn check_object(&self, path: &str, name: &str, map: &Map<String, Value>) -> Result<(), QmpError> {
        match self.types.get(name) {
            Some(Definition::Struct(members)) => self.check_members(path, &[members], map),
            Some(Definition::Union { members, tag, variants }) => {
                // The tag first: it says which further members there are.
                let kind = members.iter().filter(|m| &m.name == tag);
                for m in kind {
                    self.check_member(path, m, map)?;
                }
                let value = map.get(tag).and_then(Value::as_str).unwrap_or_default();
                let variant = variants.iter().find(|(v, _)| v == value).and_then(|(_, s)| self.types.get(s));
                match variant {
                    Some(Definition::Struct(more)) => self.check_members(path, &[members, more], map),
                    _ => self.check_members(path, &[members], map),
                }
            }
            _ => Ok(()),
        }
    }

    fn check_member(&self, path: &str, m: &Member, map: &Map<String, Value>) -> Result<(), QmpError> {
        let path = below(path, &m.name);
        match map.get(&m.name) {
            Some(value) => self.check(&path, &m.kind, value),
            None if m.optional => Ok(()),
            None => Err(QmpError::generic(format!("Parameter '{path}' is missing"))),
        }
    }

    fn check_members(
        &self,
        path: &str,
        lists: &[&Vec<Member>],
        map: &Map<String, Value>,
    ) -> Result<(), QmpError> {
        for m in lists.iter().copied().flatten() {
            self.check_member(path, m, map)?;
        }
        let known = |key: &String| lists.iter().copied().flatten().any(|m| &m.name == key);
        match map.keys().find(|k| !known(k)) {
            Some(key) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", below(path, key)))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What QEMU 7.2 answers to the same arguments.
    #[test]
    fn wrong_arguments_get_qemus_words() {
        let schema = Schema::get();
        for (command, arguments, words) in [
            ("query-status", json!({"a": 1}), "Parameter 'a' is unexpected"),
            ("device_del", json!({}), "Parameter 'id' is missing"),
            ("device_del", json!({"id": 3}), "Invalid parameter type for 'id', expected: string"),
            ("balloon", json!({"value": "3"}), "Invalid parameter type for 'value', expected: integer"),
            ("balloon", json!({"value": 3.5}), "Invalid parameter type for 'value', expected: integer"),
            ("set_link", json!({"name": "a", "up": 1}), "Invalid parameter type for 'up', expected: boolean"),
            ("set-action", json!({"reboot": "nope"}), "Parameter 'reboot' does not accept value 'nope'"),
            ("send-key", json!({"keys": 3}), "Invalid parameter type for 'keys', expected: array"),
            ("send-key", json!({"keys": [3]}), "Invalid parameter type for 'keys[0]', expected: object"),
            ("send-key", json!({"keys": [{"type": "number"}]}), "Parameter 'keys[0].data' is missing"),
            (
                "send-key",
                json!({"keys": [{"type": "nope", "data": 1}]}),
                "Parameter 'type' does not accept value 'nope'",
            ),
            (
                "send-key",
                json!({"keys": [{"type": "number", "data": 1, "z": 2}]}),
                "Parameter 'keys[0].z' is unexpected",
            ),
            (
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "a", "file": 3}),
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                "blockdev-add",
                json!({"driver": "raw", "node-name": "a", "file": {"driver": "file"}}),
                "Parameter 'file.filename' is missing",
            ),
            (
                "query-cpu-model-expansion",
                json!({"type": "static", "model": {"name": "qemu64", "bad": 1}}),
                "Parameter 'model.bad' is unexpected",
            ),
        ] {
            let Value::Object(map) = arguments else { panic!("{command}") };
            let command = schema.command(command).unwrap();
            assert_eq!(schema.check_command(command, &map).unwrap_err().desc, words);
        }
    }
}
