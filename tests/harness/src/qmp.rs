//! A QMP client.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{json, Value};

use crate::{wait_for, Result};

/// A QMP connection.
pub struct Qmp {
    stream: UnixStream,
    input: BufReader<UnixStream>,
    /// Events seen so far.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connect (waiting for the socket) and negotiate.
    pub fn connect(path: &str) -> Result<Qmp> {
        let stream = wait_for("the QMP socket", Duration::from_secs(20), || UnixStream::connect(path).ok())?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
        let input = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
        let mut qmp = Qmp { stream, input, events: Vec::new() };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            return Err(format!("not a QMP greeting: {greeting}"));
        }
        qmp.command("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.input.read_line(&mut line) {
            Ok(0) => Err("QMP connection closed".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|e| format!("{e}: {line}")),
            Err(e) => Err(format!("QMP: {e}")),
        }
    }

    /// Execute a command; its return value.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({"execute": name});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.stream.write_all(format!("{request}\n").as_bytes()).map_err(|e| format!("QMP: {e}"))?;
        loop {
            let reply = self.read()?;
            if reply.get("event").is_some() {
                self.events.push(reply);
            } else if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            } else {
                return Err(reply["error"]["desc"].as_str().unwrap_or("QMP error").to_owned());
            }
        }
    }

    /// Wait for an event of this name; events seen before it are dropped.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let start = std::time::Instant::now();
        loop {
            while !self.events.is_empty() {
                let event = self.events.remove(0);
                if event["event"] == name {
                    return Ok(event);
                }
            }
            let left = limit.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
            let message = self.read().map_err(|e| format!("waiting for {name}: {e}"))?;
            if message.get("event").is_some() {
                self.events.push(message);
            }
        }
    }

    /// `query-ft`.
    pub fn ft(&mut self) -> Result<Value> {
        self.command("query-ft", Value::Null)
    }

    /// Wait until `query-ft` shows `state`.
    pub fn wait_ft(&mut self, state: &str, limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let got = wait_for(&format!("ft state {state}"), limit, || match self.ft() {
            Ok(ft) if ft["state"] == state => Some(Ok(ft)),
            Ok(ft) => {
                last = ft;
                None
            }
            Err(e) => Some(Err(e)),
        });
        match got {
            Ok(result) => result,
            Err(e) => Err(format!("{e}; last: {last}")),
        }
    }
}
