//! One client's conversation, without any I/O: bytes in, replies out.

use serde_json::{json, Map, Value};

use crate::{introspect, Call, Fds, Handler, QmpError, Schema};

/// The longest request in bytes; more without a complete JSON value ends the session.
const MAX_REQUEST: usize = 64 << 20;
/// How deep a request's objects and arrays may be nested.
const MAX_DEPTH: usize = 100;

/// What [`Session::step`] produced.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Send this value.
    Reply(Value),
    /// Send this value and drop the client: its input cannot be followed any more.
    Last(Value),
}

/// The state of one QMP session.
#[derive(Default)]
pub struct Session {
    negotiated: bool,
    oob: bool,
    buffer: Vec<u8>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    scanned: usize,
    fds: Fds,
}

impl Session {
    /// A session before capabilities negotiation.
    pub fn new() -> Self {
        Session::default()
    }

    /// Whether events are sent to this client.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// The descriptors that the client passed.
    pub fn fds(&mut self) -> &mut Fds {
        &mut self.fds
    }

    /// The greeting.
    pub fn greeting(handler: &dyn Handler) -> Value {
        json!({"QMP": {"version": handler.version(), "capabilities": ["oob"]}})
    }

    /// Feed bytes from the client; [`Self::step`] then executes what is complete.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Execute the next complete request, if there is one.
    pub fn step(&mut self, handler: &dyn Handler) -> Option<Step> {
        let Some(text) = self.next_value() else {
            if self.buffer.len() > MAX_REQUEST {
                let error = QmpError::generic("JSON token size limit exceeded");
                return Some(Step::Last(error.reply(None)));
            }
            return None;
        };
        Some(Step::Reply(match serde_json::from_slice::<Value>(&text) {
            Ok(value) => self.request(value, handler),
            Err(_) => QmpError::generic(syntax_error(&text)).reply(None),
        }))
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
                let rest = self.buffer.split_off(self.scanned);
                let text = std::mem::replace(&mut self.buffer, rest);
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
        let mut verb = None;
        for (key, value) in request {
            let known = match key.as_str() {
                "execute" => true,
                "exec-oob" => self.oob,
                "arguments" => {
                    if !value.is_object() {
                        return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
                    }
                    continue;
                }
                "id" => continue,
                _ => false,
            };
            if !known {
                return Err(QmpError::generic(format!("QMP input member '{key}' is unexpected")));
            }
            if !value.is_string() {
                return Err(QmpError::generic(format!("QMP input member '{key}' must be a string")));
            }
            if verb.is_some() {
                return Err(QmpError::generic("QMP input member 'execute' clashes with 'exec-oob'"));
            }
            verb = Some((key == "exec-oob", value.as_str().unwrap_or_default()));
        }
        let Some((oob, name)) = verb else {
            return Err(QmpError::generic("QMP input lacks member 'execute'"));
        };
        let empty = Map::new();
        let arguments = request.get("arguments").and_then(Value::as_object).unwrap_or(&empty);
        if !self.negotiated && name != "qmp_capabilities" {
            return Err(QmpError {
                class: "CommandNotFound",
                desc: "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
            });
        }
        if self.negotiated && name == "qmp_capabilities" {
            return Err(QmpError {
                class: "CommandNotFound",
                desc: "Capabilities negotiation is already complete, command ignored".into(),
            });
        }
        let schema = Schema::get();
        let command = schema.command(name).ok_or_else(|| QmpError::command_not_found(name))?;
        if oob && !command.oob {
            return Err(QmpError::generic(format!("The command {name} does not support OOB")));
        }
        schema.check_command(command, arguments)?;
        let mut call = Call { command: name, arguments, fds: &mut self.fds };
        let value = match name {
            "qmp_capabilities" => {
                let wanted = arguments.get("enable").and_then(Value::as_array);
                self.oob = wanted.is_some_and(|list| list.iter().any(|c| c == "oob"));
                self.negotiated = true;
                json!({})
            }
            "query-commands" => introspect::commands(schema),
            "query-qmp-schema" => introspect::schema(schema),
            "getfd" => {
                let name = call.text("fdname").to_owned();
                call.fds.keep(&name)?;
                json!({})
            }
            "closefd" => {
                let name = call.text("fdname").to_owned();
                call.fds.close(&name)?;
                json!({})
            }
            _ => handler.execute(&mut call)?,
        };
        let checked = match &command.returns {
            Some(kind) => schema.check("", kind, &value).map_err(|e| e.desc),
            None if value == json!({}) => Ok(()),
            None => Err("a value where there is none".into()),
        };
        if let Err(e) = checked {
            log::error!("the reply of {name} is not what the schema says: {e}");
        }
        Ok(value)
    }
}

/// QEMU's words for text that is not JSON.
fn syntax_error(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let depth = text.bytes().scan(0usize, |d, b| {
        *d = match b {
            b'{' | b'[' => *d + 1,
            b'}' | b']' => d.saturating_sub(1),
            _ => *d,
        };
        Some(*d)
    });
    if depth.max().unwrap_or(0) > MAX_DEPTH {
        return "JSON nesting depth limit exceeded".into();
    }
    let word: String = text.trim_start().chars().take_while(char::is_ascii_alphanumeric).take(200).collect();
    if word.starts_with(|c: char| c.is_ascii_lowercase()) {
        return format!("JSON parse error, invalid keyword '{word}'");
    }
    "JSON parse error, expecting value".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Handler for Echo {
        fn execute(&self, call: &mut Call) -> Result<Value, QmpError> {
            match call.command {
                "human-monitor-command" => Ok(json!(call.text("command-line"))),
                other => Err(QmpError::generic(other)),
            }
        }
        fn version(&self) -> Value {
            json!({})
        }
    }

    fn talk(session: &mut Session, text: &str) -> Vec<String> {
        session.feed(text.as_bytes());
        std::iter::from_fn(|| session.step(&Echo))
            .map(|s| match s {
                Step::Reply(v) => v.to_string(),
                Step::Last(v) => format!("{v} and the end"),
            })
            .collect()
    }

    fn echo(text: &str) -> String {
        json!({"execute": "human-monitor-command", "arguments": {"command-line": text}}).to_string()
    }

    #[test]
    fn negotiation_ids_and_pipelining() {
        let mut s = Session::new();
        assert!(talk(&mut s, "{\"execute\":\"stop\"}\n")[0].contains("Expecting capabilities"));
        assert_eq!(talk(&mut s, "{\"execute\":\"qmp_capabilities\",\"id\":1}"), ["{\"return\":{},\"id\":1}"]);
        let got = talk(&mut s, &(echo("}\"{") + "{\"execute\":\"query-commands\",\"id\":\"x\"}"));
        assert_eq!(got.len(), 2);
        assert_eq!(got[0], "{\"return\":\"}\\\"{\"}");
        assert!(talk(&mut s, "{\"exec").is_empty());
        assert_eq!(talk(&mut s, "ute\":\"query-commands\"}\r\n").len(), 1);
    }

    #[test]
    fn wrong_input_gets_qemus_errors() {
        let mut s = Session::new();
        talk(&mut s, "{\"execute\":\"qmp_capabilities\"}");
        let deep = format!("{}{}\n", "[".repeat(2000), "]".repeat(2000));
        for (input, part) in [
            ("[1]", "must be a JSON object"),
            ("{\"execute\":3}", "must be a string"),
            ("{}", "lacks member 'execute'"),
            ("{\"execute\":\"stop\",\"x\":1}", "member 'x' is unexpected"),
            ("{\"exec-oob\":\"stop\"}", "member 'exec-oob' is unexpected"),
            ("{\"execute\":\"nope\"}", "The command nope has not been found"),
            ("garbage\n", "JSON parse error, invalid keyword 'garbage'"),
            (deep.as_str(), "JSON nesting depth limit exceeded"),
            ("{\"execute\":\"stop\",\"arguments\":{\"x\":1}}", "Parameter 'x' is unexpected"),
            ("{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"x\"}}", "No file descriptor supplied"),
            ("{\"execute\":\"qmp_capabilities\"}", "already complete"),
        ] {
            let got = talk(&mut s, input);
            assert_eq!(got.len(), 1, "{input}");
            assert!(got[0].contains(part), "{input}: {}", got[0]);
        }
    }

    #[test]
    fn thousands_of_pipelined_commands_are_all_answered() {
        let mut s = Session::new();
        talk(&mut s, "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}");
        let all: String = (0..5000).map(|i| echo(&i.to_string())).collect();
        let got = talk(&mut s, &all);
        assert_eq!(got.len(), 5000);
        assert_eq!(got[4999], "{\"return\":\"4999\"}");
        assert!(talk(&mut s, "{\"exec-oob\":\"stop\",\"id\":1}")[0].contains("does not support OOB"));
    }
}
