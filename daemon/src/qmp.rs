//! A QMP client of one machine: commands from any thread, events to one receiver.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use crate::{Error, Result};

/// How long a machine may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The longest message that is read.
const MAX_LINE: u64 = 16 << 20;

/// A connection.
pub struct Link {
    inner: Mutex<Inner>,
}

struct Inner {
    stream: UnixStream,
    replies: Receiver<Value>,
    next_id: u64,
}

impl Link {
    /// Connect and negotiate; the events that follow come on the receiver, which ends with the connection.
    pub fn connect(path: &Path) -> std::io::Result<(Link, Receiver<Value>)> {
        Self::negotiate(UnixStream::connect(path)?)
    }

    /// As `connect`, over a connection that there is.
    pub fn negotiate(stream: UnixStream) -> std::io::Result<(Link, Receiver<Value>)> {
        stream.set_write_timeout(Some(ANSWER))?;
        let input = stream.try_clone()?;
        let (to_replies, replies) = channel();
        let (to_events, events) = channel();
        std::thread::Builder::new().name("qmp".into()).spawn(move || read(input, &to_replies, &to_events))?;
        let link = Link { inner: Mutex::new(Inner { stream, replies, next_id: 0 }) };
        link.command("qmp_capabilities", Value::Null).map_err(std::io::Error::other)?;
        Ok((link, events))
    }

    /// Execute a command; its return value, or the sentence of its refusal.
    pub fn command(&self, name: &str, arguments: Value) -> Result<Value> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let id = inner.next_id;
        inner.next_id += 1;
        let mut request = json!({"execute": name, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let failed = |e: String| Error::Machine(format!("{name}: {e}"));
        inner.stream.write_all(format!("{request}\n").as_bytes()).map_err(|e| failed(e.to_string()))?;
        let until = Instant::now() + ANSWER;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let reply = inner.replies.recv_timeout(left).map_err(|e| {
                failed(match e {
                    RecvTimeoutError::Timeout => {
                        format!("the machine did not answer within {} s", ANSWER.as_secs())
                    }
                    RecvTimeoutError::Disconnected => "the machine has ended".into(),
                })
            })?;
            // The late answer to a command that was given up.
            if reply["id"] != id {
                continue;
            }
            return match reply.get("return") {
                Some(value) => Ok(value.clone()),
                None => {
                    Err(Error::Machine(reply["error"]["desc"].as_str().unwrap_or("QMP error").to_owned()))
                }
            };
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The reading thread ends with the connection.
        let _ = inner.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn read(input: UnixStream, replies: &Sender<Value>, events: &Sender<Value>) {
    let mut input = BufReader::new(input);
    let mut line = Vec::new();
    loop {
        line.clear();
        match input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { return };
        let gone = if message.get("event").is_some() {
            events.send(message).is_err()
        } else if message.get("QMP").is_none() {
            replies.send(message).is_err()
        } else {
            false
        };
        if gone {
            return;
        }
    }
}
