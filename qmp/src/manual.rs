//! The interface for people: the commands and events of ftvm-qmp(7).

use crate::schema::{Arguments, Definition, Member, Schema, Type};

fn kind(schema: &Schema, kind: &Type) -> String {
    match kind {
        Type::List(inner) => format!("list of {}", self::kind(schema, inner)),
        Type::Named(name) => match schema.types.get(name) {
            Some(Definition::Enum(values)) if values.len() <= 8 => values.join("|"),
            _ => name.clone(),
        },
    }
}

fn members(schema: &Schema, list: &[Member]) -> String {
    let texts: Vec<String> = list
        .iter()
        .map(|m| {
            let text = format!("{}: {}", m.name, kind(schema, &m.kind));
            if m.optional {
                format!("[{text}]")
            } else {
                text
            }
        })
        .collect();
    texts.join(", ")
}

fn arguments(schema: &Schema, arguments: &Arguments) -> String {
    match arguments {
        Arguments::Members(list) => members(schema, list),
        Arguments::Boxed(name) => name.clone(),
    }
}

/// For each command: name, arguments, what it returns, and what it does.
pub fn commands(schema: &Schema) -> Vec<[String; 4]> {
    let one = |c: &crate::schema::Command| {
        let returns = c.returns.as_ref().map_or(String::new(), |t| kind(schema, t));
        [c.name.clone(), arguments(schema, &c.arguments), returns, c.about.clone()]
    };
    schema.commands.iter().map(one).collect()
}

/// For each event: name, data, and when it comes.
pub fn events(schema: &Schema) -> Vec<[String; 3]> {
    schema.events.iter().map(|e| [e.name.clone(), arguments(schema, &e.data), e.about.clone()]).collect()
}

/// The structs, unions and alternates that commands and events name, each with its members.
pub fn types(schema: &Schema) -> Vec<[String; 2]> {
    let one = |(name, definition): (&String, &Definition)| {
        let text = match definition {
            Definition::Enum(values) if values.len() <= 8 => return None,
            Definition::Enum(values) => values.join(", "),
            Definition::Struct(list) => members(schema, list),
            Definition::Union { members: list, tag, variants } => {
                let mut text = members(schema, list);
                for (value, more) in variants {
                    text.push_str(&format!("; with {tag} {value} also the members of {more}"));
                }
                text
            }
            Definition::Alternate(list) => {
                list.iter().map(|t| kind(schema, t)).collect::<Vec<_>>().join(" or ")
            }
        };
        Some([name.clone(), text])
    };
    schema.types.iter().filter_map(one).collect()
}
