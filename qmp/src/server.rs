//! Sessions over sockets, and the events that go to all of them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};

use crate::{Handler, Session, Step};

/// Messages that may wait for a slow reader before it is dropped.
const QUEUE: usize = 4096;

/// Sends events to every negotiated session.
#[derive(Clone, Default)]
pub struct EventSink {
    clients: Arc<Mutex<Vec<SyncSender<Value>>>>,
}

impl EventSink {
    /// Send the event `name` now.
    pub fn emit(&self, name: &str, data: Value) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = json!({"event": name, "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()}});
        if let (Some(map), false) = (event.as_object_mut(), data.is_null()) {
            map.insert("data".into(), data);
        }
        log::debug!("event {event}");
        if let Ok(mut clients) = self.clients.lock() {
            clients.retain(|c| {
                !matches!(
                    c.try_send(event.clone()),
                    Err(TrySendError::Disconnected(_) | TrySendError::Full(_))
                )
            });
        }
    }
}

/// What all sessions of a program share.
#[derive(Clone)]
pub struct Hub {
    pub handler: Arc<dyn Handler>,
    pub events: EventSink,
    /// Indent replies for people.
    pub pretty: bool,
}

/// A listening socket.
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A connected socket.
trait Stream: Read + Write + Send {
    fn duplicate(&self) -> std::io::Result<Box<dyn Stream>>;
    fn close(&self);
}

impl Stream for UnixStream {
    fn duplicate(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn close(&self) {
        let _ = self.shutdown(std::net::Shutdown::Both);
    }
}

impl Stream for TcpStream {
    fn duplicate(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }
    fn close(&self) {
        let _ = self.shutdown(std::net::Shutdown::Both);
    }
}

/// Accept clients for ever, one after the other, as QEMU does on one monitor socket.
pub fn serve_listener(listener: Listener, hub: &Hub) {
    loop {
        let stream: std::io::Result<Box<dyn Stream>> = match &listener {
            Listener::Unix(l) => l.accept().map(|(s, _)| Box::new(s) as Box<dyn Stream>),
            Listener::Tcp(l) => l.accept().map(|(s, _)| {
                let _ = s.set_nodelay(true);
                Box::new(s) as Box<dyn Stream>
            }),
        };
        match stream {
            Ok(stream) => serve(stream, hub),
            Err(e) => {
                log::warn!("QMP: accept failed: {e}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

/// Serve an already connected client until it goes.
pub fn serve_stream(stream: UnixStream, hub: &Hub) {
    serve(Box::new(stream), hub);
}

fn serve(mut stream: Box<dyn Stream>, hub: &Hub) {
    let Ok(mut out) = stream.duplicate() else { return };
    let (sender, receiver) = sync_channel::<Value>(QUEUE);
    let pretty = hub.pretty;
    let writer = std::thread::Builder::new().name("qmp-out".into()).spawn(move || {
        for value in receiver {
            let text = if pretty {
                serde_json::to_string_pretty(&value).unwrap_or_default()
            } else {
                value.to_string()
            };
            if out.write_all(format!("{text}\r\n").as_bytes()).is_err() {
                break;
            }
        }
        out.close();
    });
    if writer.is_err() {
        return;
    }
    let mut session = Session::new();
    let _ = sender.send(Session::greeting(hub.handler.as_ref()));
    let mut registered = false;
    let mut buf = [0u8; 65536];
    loop {
        let n = match stream.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for step in session.feed(&buf[..n], hub.handler.as_ref()) {
            match step {
                Step::Reply(value) => {
                    if sender.send(value).is_err() {
                        return;
                    }
                }
                Step::Overflow => {
                    log::warn!("QMP: a client sent too much without a complete request");
                    stream.close();
                    return;
                }
            }
            if session.is_negotiated() && !registered {
                registered = true;
                if let Ok(mut clients) = hub.events.clients.lock() {
                    clients.push(sender.clone());
                }
            }
        }
    }
    stream.close();
}
