//! A drive's queue: requests that have left the machine, and their ends on the way back to it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ftvm_block::queue::{Done, Settings};
use ftvm_block::throttle::Limits;
use ftvm_block::{Image, Node, Queue, Request, Root};
use ftvm_devices::{DiskOp, Input};

use crate::lockstep::reads::{Reads, Span};
use crate::machine::MachineInput;
use crate::runtime::Event;

/// A request that failed; the drive's policy says what the guest sees of it.
#[derive(Debug)]
pub struct DiskFailure {
    pub drive: u32,
    pub id: u64,
    pub op: DiskOp,
    pub errno: i32,
    pub reason: String,
}

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

/// Counters, and when each request in flight was submitted.
#[derive(Default)]
struct Account {
    counters: Counters,
    since: HashMap<u64, Instant>,
}

/// A drive's queue and threads.
pub struct DiskWorker {
    queue: Queue,
    root: Arc<Root>,
    account: Arc<Mutex<Account>>,
    /// Which reads a backup does itself, and what waits for it.
    reads: Mutex<Reads<DiskOp>>,
    /// Whether there is such a backup.
    shares_reads: Arc<AtomicBool>,
}

impl DiskWorker {
    /// Start serving `node` as drive `index`; `news`: see [`Outside::news`].
    ///
    /// [`Outside::news`]: super::Outside::news
    pub fn start(
        index: usize,
        name: &str,
        node: Arc<Node>,
        settings: Settings,
        events: Sender<Event>,
        news: Arc<AtomicBool>,
    ) -> std::io::Result<Self> {
        let drive = index as u32;
        let root = Root::new(node);
        let image: Arc<dyn Image> = Arc::clone(&root) as _;
        let counters = Counters { size: image.size(), ..Counters::default() };
        let account = Arc::new(Mutex::new(Account { counters, since: HashMap::new() }));
        let count = Arc::clone(&account);
        let reads = Mutex::new(Reads::new(image.grain()));
        let shares_reads = Arc::new(AtomicBool::new(false));
        let (shares, places) = (Arc::clone(&shares_reads), Arc::clone(&image));
        let done = move |done: Done| {
            let Done { id, mut request, result } = done;
            if let Ok(mut a) = count.lock() {
                let took = a.since.remove(&id).map_or(Duration::ZERO, |t| t.elapsed());
                a.counters.count(&request, took, result.is_err());
            }
            if let (Request::Write { data, .. }, true) = (&mut request, result.is_ok()) {
                ftvm_block::buffers::give(std::mem::take(data));
            }
            let event = match result {
                Ok(data) if request.is_read() && shares.load(Ordering::Relaxed) => {
                    let extents = match &request {
                        Request::Read { offset, len } => places.extents(*offset, u64::from(*len)),
                        _ => None,
                    };
                    Event::DiskRead { drive, id, data, extents }
                }
                Ok(data) => Event::Input(MachineInput::Device(Input::DiskDone { id, result: Ok(data) })),
                Err(e) => Event::DiskFailed(DiskFailure {
                    drive,
                    id,
                    op: op(request),
                    errno: e.errno(),
                    reason: e.to_string(),
                }),
            };
            let _ = events.send(event);
            news.store(true, Ordering::Relaxed);
        };
        let queue = Queue::start(name, Box::new(image), settings, Box::new(done))?;
        Ok(DiskWorker { queue, root, account, reads, shares_reads })
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        self.account.lock().map_or_else(|_| Counters::default(), |a| a.counters)
    }

    /// The image, for what is asked of it beside the requests.
    pub fn image(&self) -> Arc<dyn Image> {
        self.queue.image()
    }

    /// What its requests go to.
    pub fn root(&self) -> Arc<Root> {
        Arc::clone(&self.root)
    }

    /// Other limits from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.queue.set_limits(limits);
    }

    /// The image has another size now.
    pub fn resized(&self, size: u64) {
        if let Ok(mut a) = self.account.lock() {
            a.counters.size = size;
        }
    }

    /// Queue a request, or let it wait for a backup.
    pub fn submit(&self, id: u64, op: DiskOp) {
        if !self.shares_reads.load(Ordering::Relaxed) {
            return self.enqueue(id, op);
        }
        let (span, writes) = span(&op);
        self.with_reads(|reads| reads.submit(id, span, writes, op).map(|op| (id, op)).into_iter().collect());
    }

    /// Change the book of reads, and queue what may be done now: in order, so under its lock.
    fn with_reads(&self, change: impl FnOnce(&mut Reads<DiskOp>) -> Vec<(u64, DiskOp)>) {
        let Ok(mut reads) = self.reads.lock() else { return };
        for (id, op) in change(&mut reads) {
            self.enqueue(id, op);
        }
    }

    /// From here on a backup does reads itself; `pending`: the machine's requests under way.
    pub fn share_reads(&self, pending: impl Iterator<Item = (u64, DiskOp)>) {
        let writes = pending.filter_map(|(id, op)| Some((id, span(&op).0)).filter(|_| span(&op).1));
        let Ok(mut reads) = self.reads.lock() else { return };
        reads.open(writes);
        self.shares_reads.store(true, Ordering::Relaxed);
    }

    /// There is no such backup any more.
    pub fn keep_reads(&self) {
        self.with_reads(|reads| {
            self.shares_reads.store(false, Ordering::Relaxed);
            reads.close()
        });
    }

    /// See [`Reads::may_share`].
    pub fn may_share(&self, id: u64) -> bool {
        self.reads.lock().is_ok_and(|reads| reads.may_share(id))
    }

    /// See [`Reads::logged`].
    pub fn read_logged(&self, id: u64, number: u64) {
        if let Ok(mut reads) = self.reads.lock() {
            reads.logged(id, number);
        }
    }

    /// See [`Reads::ended`].
    pub fn ended(&self, id: u64) {
        self.with_reads(|reads| reads.ended(id));
    }

    /// See [`Reads::executed`].
    pub fn backup_executed(&self, entries: u64) {
        self.with_reads(|reads| reads.executed(entries));
    }

    fn enqueue(&self, id: u64, op: DiskOp) {
        if let Ok(mut a) = self.account.lock() {
            a.since.insert(id, Instant::now());
        }
        self.queue.submit(id, request(op));
    }

    /// See [`Queue::set_durable`].
    pub fn set_durable(&self, durable: bool) -> Result<(), ftvm_block::BlockError> {
        self.queue.set_durable(durable)
    }

    /// Throw away what is queued and everything submitted from now on.
    pub fn abandon(&self) {
        self.root.node().forget_bitmaps();
        self.queue.abandon();
    }
}

impl Counters {
    fn count(&mut self, request: &Request, took: Duration, failed: bool) {
        let (kind, bytes) = match request {
            Request::Read { len, .. } => (0, u64::from(*len)),
            Request::Write { offset, data } => {
                self.highest = self.highest.max(offset + data.len() as u64);
                (1, data.len() as u64)
            }
            Request::Flush => (2, 0),
            Request::Discard { len, .. } | Request::WriteZeroes { len, .. } => (3, *len),
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

/// What a request touches, and whether it changes it.
fn span(op: &DiskOp) -> (Span, bool) {
    match op {
        DiskOp::Read { offset, len } => ((*offset, u64::from(*len)), false),
        DiskOp::Write { offset, data } => ((*offset, data.len() as u64), true),
        DiskOp::Flush => ((0, 0), false),
        DiskOp::Discard { offset, len } | DiskOp::WriteZeroes { offset, len, .. } => ((*offset, *len), true),
    }
}

fn request(op: DiskOp) -> Request {
    match op {
        DiskOp::Read { offset, len } => Request::Read { offset, len },
        DiskOp::Write { offset, data } => Request::Write { offset, data },
        DiskOp::Flush => Request::Flush,
        DiskOp::Discard { offset, len } => Request::Discard { offset, len },
        DiskOp::WriteZeroes { offset, len, may_unmap } => Request::WriteZeroes { offset, len, may_unmap },
    }
}

fn op(request: Request) -> DiskOp {
    match request {
        Request::Read { offset, len } => DiskOp::Read { offset, len },
        Request::Write { offset, data } => DiskOp::Write { offset, data },
        Request::Flush => DiskOp::Flush,
        Request::Discard { offset, len } => DiskOp::Discard { offset, len },
        Request::WriteZeroes { offset, len, may_unmap } => DiskOp::WriteZeroes { offset, len, may_unmap },
    }
}
