//! Events: to every client that has negotiated, some of them at most once a second.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{json, Map, Value};

use crate::schema::Schema;

/// Bytes waiting for a client at which its next request waits.
const REPLIES: usize = 1 << 20;
/// Bytes waiting for a client at which an event makes it be dropped.
const EVENTS: usize = 16 << 20;
/// Events of the same kind (and of the same thing) come at most once in this time; the last one counts.
const PERIOD: Duration = Duration::from_secs(1);
/// Limited events (as QEMU's), with the member that tells the things apart.
const LIMITED: &[(&str, &str)] = &[("RTC_CHANGE", ""), ("BALLOON_CHANGE", ""), ("VSERPORT_CHANGE", "id")];

#[derive(Default)]
struct Queue {
    messages: VecDeque<Value>,
    /// About the size of what waits, in bytes of text.
    bytes: usize,
    closed: bool,
}

/// What waits to be sent to one client.
#[derive(Default)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    moved: Condvar,
}

fn size(value: &Value) -> usize {
    match value {
        Value::String(s) => s.len() + 8,
        Value::Array(list) => 8 + list.iter().map(size).sum::<usize>(),
        Value::Object(map) => 8 + map.iter().map(|(k, v)| k.len() + 8 + size(v)).sum::<usize>(),
        _ => 8,
    }
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Send a reply; waits while much is waiting for a slow reader. False: the client is gone.
    pub fn reply(&self, value: Value) -> bool {
        let mut queue = self.lock();
        while queue.bytes > REPLIES && !queue.closed {
            queue = self.moved.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        self.push(queue, value)
    }

    /// Send an event; never waits. False: the client is gone, or does not read and is given up.
    pub fn event(&self, value: Value) -> bool {
        let mut queue = self.lock();
        if queue.bytes > EVENTS {
            log::warn!("QMP: a client does not read its events: it is dropped");
            queue.closed = true;
            self.moved.notify_all();
            return false;
        }
        self.push(queue, value)
    }

    fn push(&self, mut queue: MutexGuard<'_, Queue>, value: Value) -> bool {
        if queue.closed {
            return false;
        }
        queue.bytes += size(&value);
        queue.messages.push_back(value);
        self.moved.notify_all();
        true
    }

    /// The next message; `None` when the outbox is closed and empty, or the client is given up.
    pub fn next(&self) -> Option<Value> {
        let mut queue = self.lock();
        loop {
            if let Some(value) = queue.messages.pop_front() {
                return Some(value);
            }
            if queue.closed {
                return None;
            }
            queue = self.moved.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What [`Self::next`] gave has left.
    pub fn sent(&self, value: &Value) {
        let mut queue = self.lock();
        queue.bytes = queue.bytes.saturating_sub(size(value));
        self.moved.notify_all();
    }

    /// Nothing more is taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.moved.notify_all();
    }
}

#[derive(Default)]
struct Limit {
    last: Option<Instant>,
    held: Option<Value>,
}

#[derive(Default)]
struct Sinks {
    clients: Vec<Arc<Outbox>>,
    limits: BTreeMap<String, Limit>,
}

/// Sends events to every negotiated session.
#[derive(Clone, Default)]
pub struct EventSink {
    sinks: Arc<Mutex<Sinks>>,
}

impl EventSink {
    fn lock(&self) -> MutexGuard<'_, Sinks> {
        self.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn join(&self, client: &Arc<Outbox>) {
        self.lock().clients.push(Arc::clone(client));
    }

    /// Send the event `name` now (or, if it is limited and one was just sent, a little later).
    pub fn emit(&self, name: &str, data: Value) {
        let empty = Map::new();
        let checked = Schema::get().event(name).map(|e| {
            Schema::get().check_arguments(&e.data, data.as_object().unwrap_or(&empty)).map_err(|e| e.desc)
        });
        match checked {
            Some(Ok(())) => {}
            wrong => log::error!("the event {name} is not what the schema says: {wrong:?}"),
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = json!({"event": name, "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()}});
        let id = LIMITED.iter().find(|(n, _)| *n == name).map(|(_, member)| data[*member].to_string());
        if let (Some(map), false) = (event.as_object_mut(), data.is_null()) {
            map.insert("data".into(), data);
        }
        log::debug!("event {event}");
        let mut sinks = self.lock();
        let Some(id) = id else {
            sinks.clients.retain(|c| c.event(event.clone()));
            return;
        };
        let key = format!("{name} {id}");
        let limit = sinks.limits.entry(key.clone()).or_default();
        let waited = limit.last.map_or(PERIOD, |t| t.elapsed());
        if waited < PERIOD {
            if limit.held.replace(event).is_none() {
                let sink = self.clone();
                let later = std::thread::Builder::new().name("qmp-event".into()).spawn(move || {
                    std::thread::sleep(PERIOD - waited);
                    sink.release(&key);
                });
                if let Err(e) = later {
                    log::warn!("QMP: no thread for a held event: {e}");
                }
            }
            return;
        }
        limit.last = Some(Instant::now());
        sinks.clients.retain(|c| c.event(event.clone()));
    }

    /// The program ends: wait until what was sent has left, but not for ever.
    pub fn drain(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let clients = self.lock().clients.clone();
        if !clients.is_empty() {
            // The reply of the command that ends the program may be on its way to its outbox.
            std::thread::sleep(Duration::from_millis(20));
        }
        for client in clients {
            let mut queue = client.lock();
            while queue.bytes > 0 && !queue.closed && Instant::now() < until {
                let wait = until.saturating_duration_since(Instant::now());
                let waited = client.moved.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner);
                queue = waited.0;
            }
        }
    }

    /// Send what was held back.
    fn release(&self, key: &str) {
        let mut sinks = self.lock();
        let Some(limit) = sinks.limits.get_mut(key) else { return };
        limit.last = Some(Instant::now());
        if let Some(event) = limit.held.take() {
            sinks.clients.retain(|c| c.event(event.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(outbox: &Outbox) -> Vec<Value> {
        outbox.lock().messages.drain(..).collect()
    }

    #[test]
    fn a_limited_event_comes_at_once_and_then_once_a_second_with_the_last_value() {
        let sink = EventSink::default();
        let outbox = Arc::new(Outbox::default());
        sink.join(&outbox);
        for actual in 0..10 {
            sink.emit("BALLOON_CHANGE", json!({"actual": actual}));
        }
        sink.emit("STOP", Value::Null);
        let got = drain(&outbox);
        assert_eq!(got.len(), 2, "{got:?}");
        assert_eq!(got[0]["data"]["actual"], 0);
        std::thread::sleep(PERIOD + Duration::from_millis(300));
        let got = drain(&outbox);
        assert_eq!(got.len(), 1, "{got:?}");
        assert_eq!(got[0]["data"]["actual"], 9);
    }

    #[test]
    fn a_client_that_does_not_read_is_dropped_and_holds_nobody_up() {
        let sink = EventSink::default();
        let outbox = Arc::new(Outbox::default());
        sink.join(&outbox);
        let parts: Vec<String> = vec!["x".repeat(1000); 100];
        for position in 0..500 {
            sink.emit("FT_DIVERGED", json!({"position": position, "parts": parts}));
        }
        assert!(outbox.lock().closed);
        assert!(outbox.lock().bytes < EVENTS + (1 << 20));
        assert!(sink.lock().clients.is_empty());
    }
}
