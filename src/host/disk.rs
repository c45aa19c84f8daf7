//! One thread a drive: serves requests in the order in which they were submitted, so that
//! overlapping requests are never raced.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ftvm_block::{BlockError, Image};
use ftvm_devices::{DiskOp, Input};

use crate::machine::MachineInput;
use crate::runtime::Event;

/// Requests taken together before the flush that makes them durable.
const BATCH: usize = 64;
/// Idle for this long, an image may work in the background (merge overlays).
const BACKGROUND: Duration = Duration::from_millis(20);

/// What a drive has done: bytes, operations, nanoseconds of reads, writes, flushes and discards; and its image's size.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Reads, writes, flushes, discards (and zeroed ranges).
    pub bytes: [u64; 4],
    pub operations: [u64; 4],
    pub nanoseconds: [u64; 4],
    pub failed: [u64; 4],
    /// The end of the write that reached furthest.
    pub highest: u64,
    pub size: u64,
}

/// A drive's thread.
pub struct DiskWorker {
    queue: Option<Sender<(u64, DiskOp)>>,
    abandoned: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    counters: Arc<Mutex<Counters>>,
}

impl DiskWorker {
    /// Start serving `image`. With `durable` every write's completion waits until it is on stable storage.
    pub fn start(
        name: &str,
        image: Box<dyn Image>,
        durable: bool,
        events: Sender<Event>,
    ) -> std::io::Result<Self> {
        let (queue, requests) = channel();
        let abandoned = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&abandoned);
        let counters = Arc::new(Mutex::new(Counters { size: image.size(), ..Counters::default() }));
        let count = Arc::clone(&counters);
        let thread = std::thread::Builder::new()
            .name(format!("disk-{name}"))
            .spawn(move || serve(image.as_ref(), &requests, durable, &flag, &events, &count))?;
        Ok(DiskWorker { queue: Some(queue), abandoned, thread: Some(thread), counters })
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        self.counters.lock().map_or_else(|_| Counters::default(), |c| *c)
    }

    /// Queue a request.
    pub fn submit(&self, id: u64, op: DiskOp) {
        if let Some(queue) = &self.queue {
            let _ = queue.send((id, op));
        }
    }

    /// Throw away what is queued and everything submitted from now on.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
    }
}

impl Drop for DiskWorker {
    /// Serves what is queued, flushes, closes the image.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    image: &dyn Image,
    requests: &Receiver<(u64, DiskOp)>,
    durable: bool,
    abandoned: &AtomicBool,
    events: &Sender<Event>,
    counters: &Mutex<Counters>,
) {
    let mut background = true;
    loop {
        let first = if background {
            match requests.recv_timeout(BACKGROUND) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    background = !abandoned.load(Ordering::SeqCst) && image.background();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        } else {
            match requests.recv() {
                Ok(first) => first,
                Err(_) => break,
            }
        };
        let mut batch = vec![first];
        while batch.len() < BATCH {
            match requests.try_recv() {
                Ok(next) => batch.push(next),
                Err(_) => break,
            }
        }
        let mut done = Vec::with_capacity(batch.len());
        let mut dirty = false;
        for (id, op) in batch {
            if abandoned.load(Ordering::SeqCst) {
                return;
            }
            dirty |= !matches!(op, DiskOp::Read { .. } | DiskOp::Flush);
            let started = Instant::now();
            let result = perform(image, &op);
            if let Ok(mut c) = counters.lock() {
                c.count(&op, started.elapsed(), result.is_err());
            }
            done.push((id, op, result));
        }
        if durable && dirty {
            if let Err(e) = image.flush() {
                // None of the writes before is known to be safe.
                log::error!("disk: flush failed: {e}");
                for (_, op, result) in &mut done {
                    if !matches!(op, DiskOp::Read { .. }) {
                        *result = Err(e.errno());
                    }
                }
            }
        }
        if abandoned.load(Ordering::SeqCst) {
            return;
        }
        for (id, _, result) in done {
            if events.send(Event::Input(MachineInput::Device(Input::DiskDone { id, result }))).is_err() {
                return;
            }
        }
    }
    if !abandoned.load(Ordering::SeqCst) && !image.read_only() {
        if let Err(e) = image.flush() {
            log::error!("disk: the last flush failed: {e}");
        }
    }
}

impl Counters {
    fn count(&mut self, op: &DiskOp, took: Duration, failed: bool) {
        let (kind, bytes) = match op {
            DiskOp::Read { len, .. } => (0, u64::from(*len)),
            DiskOp::Write { offset, data } => {
                self.highest = self.highest.max(offset + data.len() as u64);
                (1, data.len() as u64)
            }
            DiskOp::Flush => (2, 0),
            DiskOp::Discard { len, .. } | DiskOp::WriteZeroes { len, .. } => (3, *len),
        };
        if failed {
            self.failed[kind] += 1;
            return;
        }
        self.bytes[kind] += bytes;
        self.operations[kind] += 1;
        self.nanoseconds[kind] += took.as_nanos() as u64;
    }
}

fn perform(image: &dyn Image, op: &DiskOp) -> Result<Vec<u8>, i32> {
    let none = |r: Result<(), BlockError>| r.map(|()| Vec::new());
    let result = match op {
        DiskOp::Read { offset, len } => {
            let mut data = vec![0; *len as usize];
            image.read_at(*offset, &mut data).map(|()| data)
        }
        DiskOp::Write { offset, data } => none(image.write_at(*offset, data)),
        DiskOp::Flush => none(image.flush()),
        DiskOp::Discard { offset, len } => none(image.discard(*offset, *len)),
        DiskOp::WriteZeroes { offset, len, may_unmap } => none(image.write_zeroes(*offset, *len, *may_unmap)),
    };
    result.map_err(|e| {
        log::warn!("disk: {e}");
        e.errno()
    })
}
