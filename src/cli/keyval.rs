//! QEMU's `key=value,key=value` syntax: `,,` stands for a comma, a bare key is a boolean, the
//! first bare word may belong to an implied key, and `{...}` is JSON where QEMU takes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An error in an option's value; the caller puts the option before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyvalError {
    #[error("Invalid parameter '{0}'")]
    Unknown(String),
    #[error("Expected '=' after parameter '{0}'")]
    NoValue(String),
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    #[error("Parameter '{0}' expects {1}")]
    Expects(String, String),
    #[error("invalid JSON: {0}")]
    Json(String),
    #[error("{0}")]
    Other(String),
}

/// Parsed parameters of one option.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Params {
    values: BTreeMap<String, String>,
    order: Vec<(String, String)>,
}

fn split(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut current = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' {
            if chars.peek() == Some(&',') {
                chars.next();
                current.push(',');
            } else {
                out.push(std::mem::take(&mut current));
            }
        } else {
            current.push(c);
        }
    }
    if !current.is_empty() || !text.is_empty() {
        out.push(current);
    }
    out
}

impl Params {
    /// Parse `text`; `implied` is the key of a first word without `=`.
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Self, KeyvalError> {
        if text.trim_start().starts_with('{') {
            return Self::parse_json(text);
        }
        let mut params = Params::default();
        for (i, part) in split(text).into_iter().enumerate() {
            if part.is_empty() {
                continue;
            }
            let (key, value) = match part.split_once('=') {
                Some((k, v)) => (k.to_owned(), v.to_owned()),
                None if i == 0 && implied.is_some() => (implied.unwrap_or_default().to_owned(), part),
                None => match part.strip_prefix("no").filter(|k| k.len() > 1 && BOOLEAN_KEYS.contains(k)) {
                    Some(key) => (key.to_owned(), "off".to_owned()),
                    None => (part, "on".to_owned()),
                },
            };
            params.put(key, value);
        }
        Ok(params)
    }

    fn parse_json(text: &str) -> Result<Self, KeyvalError> {
        let value: Value = serde_json::from_str(text).map_err(|e| KeyvalError::Json(e.to_string()))?;
        let mut params = Params::default();
        params.flatten("", &value)?;
        Ok(params)
    }

    fn flatten(&mut self, prefix: &str, value: &Value) -> Result<(), KeyvalError> {
        match value {
            Value::Object(map) => {
                for (k, v) in map {
                    let key = if prefix.is_empty() { k.clone() } else { format!("{prefix}.{k}") };
                    self.flatten(&key, v)?;
                }
            }
            Value::Array(list) => {
                for (i, v) in list.iter().enumerate() {
                    self.flatten(&format!("{prefix}.{i}"), v)?;
                }
            }
            Value::Bool(b) => self.put(prefix.to_owned(), if *b { "on" } else { "off" }.to_owned()),
            Value::String(s) => self.put(prefix.to_owned(), s.clone()),
            Value::Number(n) => self.put(prefix.to_owned(), n.to_string()),
            // Nothing below, in the words of the command line.
            Value::Null if prefix == "backing" => self.put(prefix.to_owned(), String::new()),
            Value::Null => {}
        }
        Ok(())
    }

    fn put(&mut self, key: String, value: String) {
        self.order.push((key.clone(), value.clone()));
        self.values.insert(key, value);
    }

    /// Set a value as if it had been given last.
    pub fn set(&mut self, key: &str, value: &str) {
        self.put(key.to_owned(), value.to_owned());
    }

    /// Fail on the first key, in the order given, that is not in `known` (`x.` there stands for any `x.…`).
    pub fn only(&self, known: &[&str]) -> Result<(), KeyvalError> {
        for (key, _) in &self.order {
            if !known.iter().any(|k| k == key || (k.ends_with('.') && key.starts_with(k))) {
                return Err(KeyvalError::Unknown(key.clone()));
            }
        }
        Ok(())
    }

    /// The last value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// All values of a key that may be given more than once.
    pub fn all(&self, key: &str) -> Vec<&str> {
        self.order.iter().filter(|(k, _)| k == key).map(|(_, v)| v.as_str()).collect()
    }

    /// All pairs in the order given.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.order.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// The value of a key that must be there.
    pub fn need(&self, key: &str) -> Result<&str, KeyvalError> {
        self.get(key).ok_or_else(|| KeyvalError::Missing(key.to_owned()))
    }

    /// A boolean: on/off, yes/no, true/false, y/n.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, KeyvalError> {
        match self.get(key) {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(KeyvalError::Expects(key.to_owned(), "'on' or 'off'".to_owned())),
        }
    }

    /// A number, decimal or 0x.
    pub fn number(&self, key: &str) -> Result<Option<u64>, KeyvalError> {
        self.get(key)
            .map(|v| {
                parse_number(v).ok_or_else(|| KeyvalError::Expects(key.to_owned(), "a number".to_owned()))
            })
            .transpose()
    }

    /// A size with an optional suffix; without one it counts in units of `default_unit` bytes.
    pub fn size(&self, key: &str, default_unit: u64) -> Result<Option<u64>, KeyvalError> {
        self.get(key)
            .map(|v| {
                parse_size(v, default_unit).ok_or_else(|| {
                    KeyvalError::Expects(
                        key.to_owned(),
                        "a non-negative number below 2^64; optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta- and exabytes, respectively".to_owned(),
                    )
                })
            })
            .transpose()
    }

    /// One of a few words.
    pub fn choice<'a>(&'a self, key: &str, words: &[&str]) -> Result<Option<&'a str>, KeyvalError> {
        match self.get(key) {
            Some(v) if !words.contains(&v) => {
                Err(KeyvalError::Other(format!("Parameter '{key}' does not accept value '{v}'")))
            }
            v => Ok(v),
        }
    }
}

/// Keys whose old negative short form (`nowait`, `noserver`) people still type.
const BOOLEAN_KEYS: [&str; 3] = ["wait", "server", "delay"];

/// A number, decimal or 0x.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A size such as `512M`, `1.5G`, `4096` (times `default_unit`).
pub fn parse_size(text: &str, default_unit: u64) -> Option<u64> {
    let last = text.chars().last()?;
    let unit = match last.to_ascii_lowercase() {
        'b' => 1,
        'k' => 1 << 10,
        'm' => 1 << 20,
        'g' => 1 << 30,
        't' => 1 << 40,
        'p' => 1 << 50,
        'e' => 1 << 60,
        _ => return parse_number(text)?.checked_mul(default_unit),
    };
    let body = &text[..text.len() - 1];
    if let Some(n) = parse_number(body) {
        return n.checked_mul(unit);
    }
    let n: f64 = body.parse().ok()?;
    let bytes = n * unit as f64;
    (n >= 0.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_booleans_and_the_implied_key() {
        let p = Params::parse("a,,b,if=virtio,snapshot,nowait", Some("file")).unwrap();
        assert_eq!(p.get("file"), Some("a,b"));
        assert_eq!(p.get("if"), Some("virtio"));
        assert_eq!(p.bool("snapshot"), Ok(Some(true)));
        assert_eq!(p.bool("wait"), Ok(Some(false)));
        assert_eq!(p.only(&["file", "if", "wait"]), Err(KeyvalError::Unknown("snapshot".into())));
    }

    #[test]
    fn json_is_flattened_as_qemu_does() {
        let p = Params::parse(
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"a,b"},"read-only":true}"#,
            None,
        )
        .unwrap();
        assert_eq!(p.get("file.filename"), Some("a,b"));
        assert_eq!(p.bool("read-only"), Ok(Some(true)));
        assert!(Params::parse("{nonsense", None).is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("2G", 1 << 20), Some(2 << 30));
        assert_eq!(parse_size("256", 1 << 20), Some(256 << 20));
        assert_eq!(parse_size("1.5k", 1), Some(1536));
        assert_eq!(parse_size("x", 1), None);
        assert_eq!(parse_size("-1", 1), None);
        assert_eq!(parse_size("99999999999E", 1), None);
    }
}
