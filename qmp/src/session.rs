//! One client's conversation, without any I/O: bytes in, replies out.

use serde_json::{json, Map, Value};

use crate::{Handler, QmpError};

/// The longest request in bytes; more without a complete JSON value ends the session.
const MAX_REQUEST: usize = 64 << 20;

/// What [`Session::feed`] produced.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Send this value.
    Reply(Value),
    /// Too much input without a complete value: drop the client.
    Overflow,
}

/// The state of one QMP session.
pub struct Session {
    negotiated: bool,
    buffer: Vec<u8>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    scanned: usize,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A session before capabilities negotiation.
    pub fn new() -> Self {
        Session {
            negotiated: false,
            buffer: Vec::new(),
            depth: 0,
            in_string: false,
            escaped: false,
            scanned: 0,
        }
    }

    /// Whether events are sent to this client.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// The greeting.
    pub fn greeting(handler: &dyn Handler) -> Value {
        json!({"QMP": {"version": handler.version(), "capabilities": []}})
    }

    /// Feed bytes from the client.
    pub fn feed(&mut self, bytes: &[u8], handler: &dyn Handler) -> Vec<Step> {
        self.buffer.extend_from_slice(bytes);
        let mut out = Vec::new();
        while let Some(text) = self.next_value() {
            let reply = match serde_json::from_slice::<Value>(&text) {
                Ok(value) => self.request(value, handler),
                Err(_) => QmpError::generic("Invalid JSON syntax").reply(None),
            };
            out.push(Step::Reply(reply));
        }
        if self.buffer.len() > MAX_REQUEST {
            out.push(Step::Overflow);
        }
        out
    }

    /// Cut the next complete JSON value (or garbage up to a line's end) off the buffer.
    fn next_value(&mut self) -> Option<Vec<u8>> {
        while self.scanned < self.buffer.len() {
            let byte = self.buffer[self.scanned];
            self.scanned += 1;
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            let end = match byte {
                b'"' => {
                    self.in_string = true;
                    false
                }
                b'{' | b'[' => {
                    self.depth += 1;
                    false
                }
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.depth == 0
                }
                b'\n' => self.depth == 0,
                _ => false,
            };
            if end {
                let text: Vec<u8> = self.buffer.drain(..self.scanned).collect();
                self.scanned = 0;
                if text.iter().any(|b| !b.is_ascii_whitespace()) {
                    return Some(text);
                }
            }
        }
        None
    }

    fn request(&mut self, value: Value, handler: &dyn Handler) -> Value {
        let Value::Object(request) = value else {
            return QmpError::generic("QMP input must be a JSON object").reply(None);
        };
        let id = request.get("id").cloned();
        match self.execute(&request, handler) {
            Ok(result) => {
                let mut reply = json!({"return": result});
                if let (Some(id), Some(map)) = (id, reply.as_object_mut()) {
                    map.insert("id".into(), id);
                }
                reply
            }
            Err(e) => e.reply(id.as_ref()),
        }
    }

    fn execute(&mut self, request: &Map<String, Value>, handler: &dyn Handler) -> Result<Value, QmpError> {
        if let Some(key) = request.keys().find(|k| !["execute", "arguments", "id"].contains(&k.as_str())) {
            return Err(QmpError::generic(format!("QMP input member '{key}' is unexpected")));
        }
        let command = match request.get("execute") {
            None => return Err(QmpError::generic("QMP input lacks member 'execute'")),
            Some(Value::String(name)) => name,
            Some(_) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
        };
        let empty = Map::new();
        let arguments = match request.get("arguments") {
            None => &empty,
            Some(Value::Object(map)) => map,
            Some(_) => return Err(QmpError::generic("QMP input member 'arguments' must be an object")),
        };
        if command == "qmp_capabilities" {
            if self.negotiated {
                return Err(QmpError {
                    class: "CommandNotFound",
                    desc: "Capabilities negotiation is already complete, command ignored".into(),
                });
            }
            crate::only(arguments, &["enable"])?;
            if let Some(Value::Array(list)) = arguments.get("enable") {
                if let Some(name) = list.first() {
                    return Err(QmpError::generic(format!(
                        "Capability {} not available",
                        name.as_str().unwrap_or("?")
                    )));
                }
            }
            self.negotiated = true;
            return Ok(json!({}));
        }
        if !self.negotiated {
            return Err(QmpError {
                class: "CommandNotFound",
                desc: "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
            });
        }
        handler.execute(command, arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Handler for Echo {
        fn execute(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
            match command {
                "echo" => Ok(Value::Object(arguments.clone())),
                other => Err(QmpError::command_not_found(other)),
            }
        }
        fn version(&self) -> Value {
            json!({})
        }
    }

    fn talk(session: &mut Session, text: &str) -> Vec<String> {
        session
            .feed(text.as_bytes(), &Echo)
            .into_iter()
            .map(|s| match s {
                Step::Reply(v) => v.to_string(),
                Step::Overflow => "overflow".into(),
            })
            .collect()
    }

    #[test]
    fn negotiation_ids_and_pipelining() {
        let mut s = Session::new();
        assert!(talk(&mut s, "{\"execute\":\"echo\"}\n")[0].contains("Expecting capabilities"));
        assert_eq!(talk(&mut s, "{\"execute\":\"qmp_capabilities\",\"id\":1}"), ["{\"return\":{},\"id\":1}"]);
        let got = talk(
            &mut s,
            "{\"execute\":\"echo\",\"arguments\":{\"a\":\"}\\\"{\"}}{\"execute\":\"echo\",\"id\":\"x\"}",
        );
        assert_eq!(got.len(), 2);
        assert_eq!(got[0], "{\"return\":{\"a\":\"}\\\"{\"}}");
        assert!(talk(&mut s, "{\"exec").is_empty());
        assert_eq!(talk(&mut s, "ute\":\"echo\"}\r\n").len(), 1);
    }

    #[test]
    fn wrong_input_gets_qemus_errors() {
        let mut s = Session::new();
        talk(&mut s, "{\"execute\":\"qmp_capabilities\"}");
        for (input, part) in [
            ("[1]", "must be a JSON object"),
            ("{\"execute\":3}", "must be a string"),
            ("{}", "lacks member 'execute'"),
            ("{\"execute\":\"echo\",\"x\":1}", "member 'x' is unexpected"),
            ("{\"execute\":\"nope\"}", "The command nope has not been found"),
            ("garbage\n", "Invalid JSON"),
            ("{\"execute\":\"qmp_capabilities\"}", "already complete"),
        ] {
            let got = talk(&mut s, input);
            assert_eq!(got.len(), 1, "{input}");
            assert!(got[0].contains(part), "{input}: {}", got[0]);
        }
    }
}
