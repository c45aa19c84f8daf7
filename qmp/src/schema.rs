//! The interface as data: commands, events and their types, read from the texts in `schema/`.
//!
//! ```text
//! # a comment
//! enum NAME { value, value }
//! struct NAME { member: type, optional?: type }
//! union NAME { member: type, ... } by member { value: Struct, ... }
//! alternate NAME { type, type }
//! ## One sentence on what follows.
//! command NAME { member: type } -> type
//! command NAME : Type
//! command NAME { member: type } open
//! command NAME { member: type } oob
//! event NAME { member: type }
//! ```
//!
//! A type is one of [`BUILTINS`], a name, or a list `[type]`. Names in brackets behind a member, a command or an event are
//! its features. These texts are the only description of the interface: what is accepted, what introspection answers and what
//! the manual page says are made from them.

use std::collections::BTreeMap;
use std::sync::OnceLock;

/// Types that need no definition.
pub const BUILTINS: &[&str] = &["str", "int", "number", "bool", "null", "any"];

const TEXTS: &[&str] = &[
    include_str!("../schema/protocol.txt"),
    include_str!("../schema/machine.txt"),
    include_str!("../schema/objects.txt"),
    include_str!("../schema/backends.txt"),
    include_str!("../schema/jobs.txt"),
    include_str!("../schema/migration.txt"),
    include_str!("../schema/ft.txt"),
    include_str!("../schema/events.txt"),
];

/// A type as it is written: a name, or a list of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    Named(String),
    List(Box<Type>),
}

/// A member of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub optional: bool,
    pub kind: Type,
    pub features: Vec<String>,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Definition {
    Enum(Vec<String>),
    Struct(Vec<Member>),
    /// Common members, the member that tells the variant, and for its values the struct of further members.
    Union {
        members: Vec<Member>,
        tag: String,
        variants: Vec<(String, String)>,
    },
    /// One of several types.
    Alternate(Vec<Type>),
}

/// What a command takes or an event carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arguments {
    Members(Vec<Member>),
    /// An object of this type.
    Boxed(String),
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub name: String,
    pub about: String,
    pub arguments: Arguments,
    /// It takes members that are not named here (`open` behind the arguments).
    pub open: bool,
    /// It may be executed before others that wait (`oob` behind the arguments).
    pub oob: bool,
    /// What it returns; `None`: an empty object.
    pub returns: Option<Type>,
    pub features: Vec<String>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub name: String,
    pub about: String,
    pub data: Arguments,
}

/// The whole interface, everything in the order of its text.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    pub types: BTreeMap<String, Definition>,
    pub commands: Vec<Command>,
    pub events: Vec<Event>,
}

/// An error in a schema text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("schema: {0}")]
pub struct SchemaError(String);

impl Schema {
    /// The interface of this program.
    pub fn get() -> &'static Schema {
        static SCHEMA: OnceLock<Schema> = OnceLock::new();
        // The texts are part of the program, and a test reads them: they cannot be wrong here.
        SCHEMA.get_or_init(|| Schema::parse(TEXTS).unwrap_or_default())
    }

    /// The command named `name`.
    pub fn command(&self, name: &str) -> Option<&Command> {
        self.commands.iter().find(|c| c.name == name)
    }

    /// The event named `name`.
    pub fn event(&self, name: &str) -> Option<&Event> {
        self.events.iter().find(|e| e.name == name)
    }

    /// Read schema texts.
    pub fn parse(texts: &[&str]) -> Result<Schema, SchemaError> {
        let mut schema = Schema::default();
        for text in texts {
            Parser { words: words(text), at: 0 }.file(&mut schema)?;
        }
        schema.resolve()?;
        Ok(schema)
    }

    /// Every name that is used must be defined.
    fn resolve(&self) -> Result<(), SchemaError> {
        let known = |kind: &Type, place: &str| -> Result<(), SchemaError> {
            let mut kind = kind;
            while let Type::List(inner) = kind {
                kind = inner;
            }
            match kind {
                Type::Named(n) if !BUILTINS.contains(&n.as_str()) && !self.types.contains_key(n) => {
                    Err(SchemaError(format!("{place} uses '{n}', which is not defined")))
                }
                _ => Ok(()),
            }
        };
        let members = |list: &[Member], place: &str| list.iter().try_for_each(|m| known(&m.kind, place));
        let arguments = |a: &Arguments, place: &str| match a {
            Arguments::Members(list) => members(list, place),
            Arguments::Boxed(name) => known(&Type::Named(name.clone()), place),
        };
        for (name, definition) in &self.types {
            match definition {
                Definition::Enum(_) => {}
                Definition::Struct(list) => members(list, name)?,
                Definition::Alternate(list) => list.iter().try_for_each(|t| known(t, name))?,
                Definition::Union { members: list, tag, variants } => {
                    members(list, name)?;
                    let Some(Definition::Enum(values)) =
                        list.iter().find(|m| &m.name == tag).and_then(|m| match &m.kind {
                            Type::Named(n) => self.types.get(n),
                            Type::List(_) => None,
                        })
                    else {
                        return Err(SchemaError(format!("{name}: '{tag}' is no member that is an enum")));
                    };
                    for (value, kind) in variants {
                        if !values.contains(value) {
                            return Err(SchemaError(format!("{name}: there is no value '{value}'")));
                        }
                        known(&Type::Named(kind.clone()), name)?;
                    }
                }
            }
        }
        for c in &self.commands {
            arguments(&c.arguments, &c.name)?;
            c.returns.iter().try_for_each(|t| known(t, &c.name))?;
        }
        self.events.iter().try_for_each(|e| arguments(&e.data, &e.name))
    }
}

/// Cut a text into words, punctuation and `##` sentences.
fn words(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for line in text.lines() {
        if let Some(sentence) = line.strip_prefix("## ") {
            out.push(format!("##{sentence}"));
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let line = line.replace("->", " > ");
        let mut word = String::new();
        for c in line.chars() {
            if c.is_alphanumeric() || c == '-' || c == '_' {
                word.push(c);
                continue;
            }
            if !word.is_empty() {
                out.push(std::mem::take(&mut word));
            }
            if !c.is_whitespace() {
                out.push(c.to_string());
            }
        }
        if !word.is_empty() {
            out.push(word);
        }
    }
    out
}

struct Parser {
    words: Vec<String>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &str {
        self.words.get(self.at).map_or("", String::as_str)
    }

    fn next(&mut self) -> Result<String, SchemaError> {
        let word = self.words.get(self.at).cloned();
        self.at += 1;
        word.ok_or_else(|| SchemaError("the text breaks off".into()))
    }

    fn accept(&mut self, word: &str) -> bool {
        let hit = self.peek() == word;
        self.at += usize::from(hit);
        hit
    }

    fn expect(&mut self, word: &str) -> Result<(), SchemaError> {
        let found = self.next()?;
        if found == word {
            return Ok(());
        }
        Err(SchemaError(format!("expected '{word}', found '{found}'")))
    }

    /// Items between braces, each followed by a comma or the end.
    fn list<T>(
        &mut self,
        open: &str,
        close: &str,
        mut item: impl FnMut(&mut Self) -> Result<T, SchemaError>,
    ) -> Result<Vec<T>, SchemaError> {
        let mut out = Vec::new();
        self.expect(open)?;
        while !self.accept(close) {
            out.push(item(self)?);
            if !self.accept(",") {
                self.expect(close)?;
                break;
            }
        }
        Ok(out)
    }

    fn kind(&mut self) -> Result<Type, SchemaError> {
        if self.accept("[") {
            let inner = self.kind()?;
            self.expect("]")?;
            return Ok(Type::List(Box::new(inner)));
        }
        Ok(Type::Named(self.next()?))
    }

    fn features(&mut self) -> Result<Vec<String>, SchemaError> {
        if self.peek() == "[" {
            return self.list("[", "]", Self::next);
        }
        Ok(Vec::new())
    }

    fn member(&mut self) -> Result<Member, SchemaError> {
        let name = self.next()?;
        let optional = self.accept("?");
        self.expect(":")?;
        Ok(Member { name, optional, kind: self.kind()?, features: self.features()? })
    }

    fn members(&mut self) -> Result<Vec<Member>, SchemaError> {
        self.list("{", "}", Self::member)
    }

    fn arguments(&mut self) -> Result<Arguments, SchemaError> {
        if self.accept(":") {
            return Ok(Arguments::Boxed(self.next()?));
        }
        Ok(Arguments::Members(if self.peek() == "{" { self.members()? } else { Vec::new() }))
    }

    fn file(&mut self, schema: &mut Schema) -> Result<(), SchemaError> {
        let mut about = String::new();
        while self.at < self.words.len() {
            let word = self.next()?;
            if let Some(sentence) = word.strip_prefix("##") {
                about = sentence.to_owned();
                continue;
            }
            let name = self.next()?;
            let definition = match word.as_str() {
                "command" => {
                    let arguments = self.arguments()?;
                    let open = self.accept("open");
                    let oob = self.accept("oob");
                    let returns = if self.accept(">") { Some(self.kind()?) } else { None };
                    let features = self.features()?;
                    let about = std::mem::take(&mut about);
                    if about.is_empty() || schema.command(&name).is_some() {
                        return Err(SchemaError(format!("'{name}' has no sentence or is there twice")));
                    }
                    schema.commands.push(Command { name, about, arguments, open, oob, returns, features });
                    continue;
                }
                "event" => {
                    let data = self.arguments()?;
                    let about = std::mem::take(&mut about);
                    if about.is_empty() || schema.event(&name).is_some() {
                        return Err(SchemaError(format!("'{name}' has no sentence or is there twice")));
                    }
                    schema.events.push(Event { name, about, data });
                    continue;
                }
                "enum" => Definition::Enum(self.list("{", "}", Self::next)?),
                "struct" => Definition::Struct(self.members()?),
                "alternate" => Definition::Alternate(self.list("{", "}", Self::kind)?),
                "union" => {
                    let members = self.members()?;
                    self.expect("by")?;
                    let tag = self.next()?;
                    let variants = self.list("{", "}", |p| {
                        let value = p.next()?;
                        p.expect(":")?;
                        Ok((value, p.next()?))
                    })?;
                    Definition::Union { members, tag, variants }
                }
                other => return Err(SchemaError(format!("'{other}' is no kind of definition"))),
            };
            if schema.types.insert(name.clone(), definition).is_some() {
                return Err(SchemaError(format!("'{name}' is defined twice")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_own_texts_are_right() {
        let schema = Schema::parse(TEXTS).unwrap();
        assert!(schema.command("query-status").is_some());
        assert!(schema.event("STOP").is_some());
    }

    #[test]
    fn wrong_texts_are_refused() {
        for (text, part) in [
            ("struct A { b: C }", "'C', which is not defined"),
            ("enum A { x", "breaks off"),
            ("command a", "no sentence"),
            ("thing A {}", "no kind of definition"),
            ("enum A {} enum A {}", "twice"),
            ("enum E { x } struct S {} union U { t: E } by t { y: S }", "no value 'y'"),
        ] {
            let e = Schema::parse(&[text]).unwrap_err().to_string();
            assert!(e.contains(part), "{text}: {e}");
        }
    }
}
