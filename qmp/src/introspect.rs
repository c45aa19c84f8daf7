//! `query-qmp-schema` and `query-commands`, made from the schema. As in QEMU, types other than the builtin ones are
//! numbered in the order in which they are met: their names are not part of the interface.

use std::collections::BTreeMap;

use serde_json::{json, Value};

use crate::schema::{Arguments, Definition, Member, Schema, Type};

/// Builtin types with the JSON type of their values.
const BUILTIN_JSON: &[(&str, &str)] = &[
    ("str", "string"),
    ("int", "int"),
    ("number", "number"),
    ("bool", "boolean"),
    ("null", "null"),
    ("any", "value"),
];

struct Walk<'a> {
    schema: &'a Schema,
    /// Numbers of named types and of anonymous argument lists.
    numbers: BTreeMap<String, usize>,
    next: usize,
    out: Vec<Value>,
    waiting: Vec<Type>,
}

impl Walk<'_> {
    fn name(&mut self, kind: &Type) -> String {
        let plain = match kind {
            Type::List(inner) => format!("[{}]", self.name(inner)),
            Type::Named(n) if BUILTIN_JSON.iter().any(|(b, _)| b == n) => n.clone(),
            Type::Named(n) => {
                if let Some(number) = self.numbers.get(n) {
                    return number.to_string();
                }
                let number = self.next;
                self.next += 1;
                self.numbers.insert(n.clone(), number);
                self.waiting.push(kind.clone());
                return number.to_string();
            }
        };
        if self.numbers.insert(plain.clone(), 0).is_none() {
            self.waiting.push(kind.clone());
        }
        plain
    }

    fn members(&mut self, members: &[Member]) -> Value {
        let mut list = Vec::new();
        for m in members {
            let mut entry = json!({"name": m.name, "type": self.name(&m.kind)});
            if m.optional {
                entry["default"] = Value::Null;
            }
            if !m.features.is_empty() {
                entry["features"] = json!(m.features);
            }
            list.push(entry);
        }
        Value::Array(list)
    }

    fn object(&mut self, members: &[Member]) -> String {
        let number = self.next.to_string();
        self.next += 1;
        let members = self.members(members);
        self.out.push(json!({"name": number, "meta-type": "object", "members": members}));
        number
    }

    fn arguments(&mut self, arguments: &Arguments, empty: &str) -> String {
        match arguments {
            Arguments::Members(list) if list.is_empty() => empty.to_owned(),
            Arguments::Members(list) => self.object(list),
            Arguments::Boxed(name) => self.name(&Type::Named(name.clone())),
        }
    }

    fn define(&mut self, kind: &Type, empty: &str) {
        let name = self.name(kind);
        let entry = match kind {
            Type::List(inner) => {
                let element = self.name(inner);
                json!({"name": name, "meta-type": "array", "element-type": element})
            }
            Type::Named(n) => match self.schema.types.get(n) {
                None => {
                    let json_type = BUILTIN_JSON.iter().find(|(b, _)| b == n).map_or("value", |(_, j)| j);
                    json!({"name": name, "meta-type": "builtin", "json-type": json_type})
                }
                Some(Definition::Enum(values)) => {
                    let members: Vec<Value> = values.iter().map(|v| json!({"name": v})).collect();
                    json!({"name": name, "meta-type": "enum", "members": members, "values": values})
                }
                Some(Definition::Struct(members)) => {
                    let members = self.members(members);
                    json!({"name": name, "meta-type": "object", "members": members})
                }
                Some(Definition::Alternate(types)) => {
                    let members: Vec<Value> = types.iter().map(|t| json!({"type": self.name(t)})).collect();
                    json!({"name": name, "meta-type": "alternate", "members": members})
                }
                Some(Definition::Union { members, tag, variants }) => {
                    let values = members
                        .iter()
                        .find(|m| &m.name == tag)
                        .and_then(|m| match &m.kind {
                            Type::Named(n) => self.schema.types.get(n),
                            Type::List(_) => None,
                        })
                        .map_or(Vec::new(), |d| match d {
                            Definition::Enum(values) => values.clone(),
                            _ => Vec::new(),
                        });
                    let members = self.members(members);
                    let mut cases = Vec::new();
                    for value in values {
                        let kind = match variants.iter().find(|(v, _)| *v == value) {
                            Some((_, s)) => self.name(&Type::Named(s.clone())),
                            None => empty.to_owned(),
                        };
                        cases.push(json!({"case": value, "type": kind}));
                    }
                    json!({"name": name, "meta-type": "object", "members": members, "tag": tag, "variants": cases})
                }
            },
        };
        self.out.push(entry);
    }
}

/// The answer of `query-qmp-schema`.
pub fn schema(schema: &Schema) -> Value {
    let mut walk = Walk { schema, numbers: BTreeMap::new(), next: 0, out: Vec::new(), waiting: Vec::new() };
    let empty = walk.object(&[]);
    for c in &schema.commands {
        let arguments = walk.arguments(&c.arguments, &empty);
        let returns = c.returns.as_ref().map_or(empty.clone(), |t| walk.name(t));
        let mut entry =
            json!({"name": c.name, "meta-type": "command", "arg-type": arguments, "ret-type": returns});
        if !c.features.is_empty() {
            entry["features"] = json!(c.features);
        }
        if c.oob {
            entry["allow-oob"] = json!(true);
        }
        walk.out.push(entry);
    }
    for e in &schema.events {
        let data = walk.arguments(&e.data, &empty);
        walk.out.push(json!({"name": e.name, "meta-type": "event", "arg-type": data}));
    }
    while let Some(kind) = walk.waiting.pop() {
        walk.define(&kind, &empty);
    }
    Value::Array(walk.out)
}

/// The answer of `query-commands`.
pub fn commands(schema: &Schema) -> Value {
    schema.commands.iter().map(|c| json!({"name": c.name})).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_is_named_is_described() {
        let answer = schema(Schema::get());
        let entries = answer.as_array().unwrap();
        let names: Vec<&str> = entries.iter().map(|e| e["name"].as_str().unwrap()).collect();
        let mut once = names.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), names.len(), "a name is there twice");
        let check = |kind: &Value| {
            let kind = kind.as_str().unwrap();
            assert!(names.contains(&kind), "{kind}");
        };
        for e in entries {
            for key in ["arg-type", "ret-type", "element-type"] {
                if let Some(kind) = e.get(key) {
                    check(kind);
                }
            }
            for list in ["members", "variants"] {
                for m in e[list].as_array().into_iter().flatten() {
                    if let Some(kind) = m.get("type") {
                        check(kind);
                    }
                }
            }
        }
        // What is said of the interface obeys the interface.
        let returns = Schema::get().command("query-qmp-schema").unwrap().returns.clone().unwrap();
        Schema::get().check("", &returns, &answer).unwrap();
    }
}
