//! Requests in flight: a drive's queue and the threads that serve it.
//!
//! Requests that touch the same bytes are served in the order of their submission (unless both read); all
//! others run side by side. Flushes are shared: while one runs, whatever else needs one gathers, and the next
//! one serves all of it (group commit).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::throttle::{Limits, Throttle};
use crate::{BlockError, Image};

/// Requests served side by side at the most.
const THREADS: usize = 16;
/// The longest that a thread which has just served looks out for the next request before it sleeps (what QEMU's
/// `poll-max-ns` is for its loops): to wake a thread takes longer than many a request does.
const LOOKOUT: Duration = Duration::from_micros(32);
/// The shortest, from which it grows while requests come.
const GLANCE: Duration = Duration::from_micros(4);
/// While requests take no longer than this, one thread serves them all: another's wake-up would take longer, and both would
/// wait for the file's lock in the kernel.
const QUICK: Duration = LOOKOUT;
/// What a quick request saves when it wakes nobody; a longer one costs the others its time.
const SAVED: Duration = Duration::from_micros(8);
/// Savings, in requests, from which on the next ones are expected to be quick, too; and what counts of them.
const QUICK_FROM: u32 = 64;
const QUICK_MOST: u32 = 128;
/// A request that was expected to be quick keeps others waiting for this long at the most.
const PATIENCE: Duration = Duration::from_millis(1);
/// An image that has work in the background gets to it at least this often.
const BACKGROUND: Duration = Duration::from_millis(20);

/// One request. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Read { offset: u64, len: u32 },
    Write { offset: u64, data: Vec<u8> },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, may_unmap: bool },
}

impl Request {
    /// (offset, length, whether it changes what lies there)
    fn span(&self) -> (u64, u64, bool) {
        match self {
            Request::Read { offset, len } => (*offset, u64::from(*len), false),
            Request::Write { offset, data } => (*offset, data.len() as u64, true),
            Request::Flush => (0, 0, false),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                (*offset, *len, true)
            }
        }
    }

    /// Whether it is a read.
    pub fn is_read(&self) -> bool {
        matches!(self, Request::Read { .. })
    }

    /// Serve it.
    fn perform(&self, image: &dyn Image) -> Result<Vec<u8>, BlockError> {
        match self {
            Request::Read { offset, len } => {
                let mut data = crate::buffers::take(*len as usize);
                image.read_at(*offset, &mut data).map(|()| data)
            }
            Request::Write { offset, data } => image.write_at(*offset, data).map(|()| Vec::new()),
            Request::Flush => Ok(Vec::new()),
            Request::Discard { offset, len } => image.discard(*offset, *len).map(|()| Vec::new()),
            Request::WriteZeroes { offset, len, may_unmap } => {
                image.write_zeroes(*offset, *len, *may_unmap).map(|()| Vec::new())
            }
        }
    }
}

fn conflict(a: (u64, u64, bool), b: (u64, u64, bool)) -> bool {
    (a.2 || b.2) && a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

/// A request that ended: `Ok` with a read's data, or the error.
pub struct Done {
    pub id: u64,
    pub request: Request,
    pub result: Result<Vec<u8>, BlockError>,
}

/// Told of every request that ended, from any of the queue's threads.
pub type OnDone = Box<dyn Fn(Done) + Send + Sync>;

/// How a queue serves.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Every write's completion waits until data and metadata are on stable storage.
    pub durable: bool,
    /// Rates that the guest may not exceed.
    pub limits: Limits,
}

/// Whether whoever serves now is enough: what quick requests saved, less what others cost, in [`SAVED`].
#[derive(Default)]
struct Haste(u32);

impl Haste {
    fn is_quick(&self) -> bool {
        self.0 >= QUICK_FROM
    }

    /// A request took this long.
    fn note(&mut self, took: Duration) {
        if took <= QUICK {
            self.0 = QUICK_MOST.min(self.0 + 1);
        } else {
            let cost = took.as_nanos() / SAVED.as_nanos();
            self.0 = self.0.saturating_sub(cost.min(u32::MAX.into()) as u32);
        }
    }
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Request)>,
    running: Vec<(u64, (u64, u64, bool))>,
    /// Ended but for a flush.
    commit: Vec<(u64, Request)>,
    committing: bool,
    /// Something was written since the last flush began.
    dirty: bool,
    /// Threads with nothing to do; the last one went to sleep last, and its caches are warm.
    idle: Vec<Thread>,
    /// Threads that are telling of an end and look for work right after.
    ending: usize,
    /// A thread looks out for a request.
    on_lookout: bool,
    /// For how long the next one does; nothing after a request that came late.
    lookout: Duration,
    /// When a thread last went to sleep.
    slept: Option<Instant>,
    haste: Haste,
    /// A thread sees to it that no request which keeps others waiting is a long one.
    watched: bool,
    threads: Vec<JoinHandle<()>>,
    closing: bool,
    throttle: Throttle,
}

struct Inner {
    name: String,
    /// Counts what is submitted: the one thing that a thread on the lookout looks at.
    submitted: AtomicU64,
    image: Arc<dyn Image>,
    durable: AtomicBool,
    abandoned: AtomicBool,
    state: Mutex<State>,
    done: OnDone,
}

/// A drive's queue.
pub struct Queue {
    inner: Arc<Inner>,
    background: Option<JoinHandle<()>>,
}

enum Next {
    Job(u64, Request),
    /// Nothing before this much time has gone by.
    Later(Duration),
    /// Whoever serves now gets to the next one, too.
    Served,
    Nothing,
}

impl State {
    fn wake_all(&mut self) {
        self.idle.drain(..).for_each(|thread| thread.unpark());
    }

    /// Whether a thread that has just served should look out for more. With others at work an end of theirs brings it.
    fn may_look_out(&self) -> bool {
        !(self.on_lookout || self.lookout.is_zero() || self.closing) && self.running.is_empty()
    }

    /// The first request that nothing before it is in the way of.
    fn next(&mut self) -> Next {
        if self.haste.is_quick() && !(self.running.is_empty() || self.waiting.is_empty()) {
            return Next::Served;
        }
        let mut before: Vec<(u64, u64, bool)> = Vec::new();
        let mut later: Option<Duration> = None;
        for i in 0..self.waiting.len() {
            let request = &self.waiting[i].1;
            let span = request.span();
            let blocked = before.iter().any(|b| conflict(*b, span))
                || self.running.iter().any(|(_, r)| conflict(*r, span));
            if !blocked {
                let wait = match request {
                    Request::Flush => None,
                    _ if later.is_some() => later,
                    _ => self.throttle.take(!request.is_read(), span.1, Instant::now()),
                };
                match wait {
                    None => {
                        if let Some((id, request)) = self.waiting.remove(i) {
                            self.running.push((id, span));
                            return Next::Job(id, request);
                        }
                    }
                    Some(time) => later = Some(time),
                }
            }
            before.push(span);
        }
        later.map_or(Next::Nothing, Next::Later)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::SeqCst)
    }

    fn finish(&self, id: u64, request: Request, result: Result<Vec<u8>, BlockError>) {
        if self.is_abandoned() {
            return;
        }
        if let Err(e) = &result {
            log::warn!("drive {}: {e}", self.name);
        }
        (self.done)(Done { id, request, result });
    }

    /// One more thread looks for work.
    fn summon(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
        let awake = state.ending + usize::from(state.on_lookout);
        if state.waiting.len() > state.idle.len() + awake && state.threads.len() < THREADS {
            let worker = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("disk-{}", self.name))
                .spawn(move || worker.serve())?;
            state.threads.push(thread);
        } else if let Some(thread) = state.idle.pop() {
            thread.unpark();
        }
        Ok(())
    }

    /// Threads for all that a request kept waiting, besides the one that asks.
    fn summon_all(self: &Arc<Self>, state: &mut State) {
        for _ in 1..state.waiting.len().min(THREADS) {
            let _ = self.summon(state);
        }
    }

    /// Wait a while, then see whether still the same request keeps others waiting.
    fn watch<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let first = state.running.first().map(|(id, _)| *id);
        state.watched = true;
        drop(state);
        std::thread::park_timeout(PATIENCE);
        let mut state = self.lock();
        state.watched = false;
        if state.haste.is_quick() && state.running.first().map(|(id, _)| *id) == first {
            state.haste = Haste::default();
            self.summon_all(&mut state);
        }
        state
    }

    fn serve(self: &Arc<Self>) {
        let mut state = self.lock();
        let mut served = false;
        loop {
            if self.is_abandoned() {
                return;
            }
            let (id, request) = match state.next() {
                Next::Job(id, request) => (id, request),
                Next::Nothing if state.closing && state.waiting.is_empty() => return,
                Next::Nothing if served && state.may_look_out() => {
                    served = false;
                    state = self.look_out(state);
                    continue;
                }
                Next::Served if !state.watched => {
                    state = self.watch(state);
                    continue;
                }
                other => {
                    let own = std::thread::current();
                    let id = own.id();
                    state.idle.push(own);
                    state.slept = Some(Instant::now());
                    drop(state);
                    match other {
                        Next::Later(time) => std::thread::park_timeout(time),
                        _ => std::thread::park(),
                    }
                    state = self.lock();
                    state.idle.retain(|t| t.id() != id);
                    continue;
                }
            };
            served = true;
            drop(state);
            let start = Instant::now();
            let result = request.perform(self.image.as_ref());
            let took = start.elapsed();
            let (span, flush) = (request.span(), request == Request::Flush);
            let writes = span.2;
            state = self.lock();
            state.running.retain(|(r, _)| *r != id);
            state.dirty |= writes;
            let was_quick = state.haste.is_quick();
            state.haste.note(took);
            if was_quick && !state.haste.is_quick() {
                self.summon_all(&mut state);
            }
            if state.waiting.iter().any(|(_, waits)| conflict(span, waits.span())) {
                // It may have waited for these bytes.
                state.wake_all();
            }
            if result.is_err() || !(flush || writes && self.durable.load(Ordering::SeqCst)) {
                state.ending += 1;
                drop(state);
                self.finish(id, request, result);
                state = self.lock();
                state.ending -= 1;
                continue;
            }
            state.commit.push((id, request));
            if state.committing {
                continue;
            }
            state.committing = true;
            if state.haste.is_quick() && !state.waiting.is_empty() {
                // Somebody else serves meanwhile.
                let _ = self.summon(&mut state);
            }
            while !state.commit.is_empty() && !self.is_abandoned() {
                let batch = std::mem::take(&mut state.commit);
                let dirty = std::mem::take(&mut state.dirty);
                drop(state);
                let result = if dirty { self.image.flush() } else { Ok(()) };
                if result.is_err() {
                    self.lock().dirty = true;
                }
                // None of the writes before is known to be safe if it failed.
                for (id, request) in batch {
                    let result = match &result {
                        Ok(()) => Ok(Vec::new()),
                        Err(e) => Err(e.again()),
                    };
                    self.finish(id, request, result);
                }
                state = self.lock();
            }
            state.committing = false;
        }
    }

    /// Wait a short while for a request, awake; for longer the next time if one came, for less if none did.
    fn look_out<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.on_lookout = true;
        let (time, seen) = (state.lookout, self.submitted.load(Ordering::Acquire));
        drop(state);
        let start = Instant::now();
        let mut came = false;
        while !came && start.elapsed() < time {
            for _ in 0..16 {
                std::hint::spin_loop();
            }
            came = self.submitted.load(Ordering::Acquire) != seen;
        }
        let mut state = self.lock();
        state.on_lookout = false;
        came |= self.submitted.load(Ordering::Acquire) != seen;
        if came {
            state.lookout = LOOKOUT.min(time * 2);
        }
        state
    }

    fn work_behind(&self) {
        loop {
            let busy = {
                let state = self.lock();
                if state.closing || self.is_abandoned() {
                    return;
                }
                !(state.running.is_empty() && state.waiting.is_empty())
            };
            let start = Instant::now();
            if !self.image.background() {
                return;
            }
            if busy || start.elapsed() < Duration::from_millis(1) {
                std::thread::sleep(BACKGROUND);
            }
        }
    }
}

impl Queue {
    /// Start serving `image`.
    pub fn start(
        name: &str,
        image: Box<dyn Image>,
        settings: Settings,
        done: OnDone,
    ) -> std::io::Result<Self> {
        let state = State { throttle: Throttle::new(settings.limits), ..State::default() };
        let inner = Arc::new(Inner {
            name: name.to_owned(),
            submitted: AtomicU64::new(0),
            image: Arc::from(image),
            durable: AtomicBool::new(settings.durable),
            abandoned: AtomicBool::new(false),
            state: Mutex::new(state),
            done,
        });
        let behind = Arc::clone(&inner);
        let background =
            std::thread::Builder::new().name(format!("merge-{name}")).spawn(move || behind.work_behind())?;
        Ok(Queue { inner, background: Some(background) })
    }

    /// Queue a request; it ends with a call of `done` with the same id.
    pub fn submit(&self, id: u64, request: Request) {
        let inner = &self.inner;
        let mut state = inner.lock();
        if state.closing || inner.is_abandoned() {
            return;
        }
        state.waiting.push_back((id, request));
        inner.submitted.fetch_add(1, Ordering::Release);
        if let Some(slept) = state.slept.take() {
            // Had a thread looked out for as long as it may, would it have seen this one?
            let late = slept.elapsed() > LOOKOUT;
            state.lookout = if late { Duration::ZERO } else { LOOKOUT.min(GLANCE.max(state.lookout * 2)) };
        }
        let awake = state.ending + usize::from(state.on_lookout);
        let served = state.haste.is_quick() && awake + state.running.len() > 0;
        if served && state.watched || state.waiting.len() <= awake {
            return;
        }
        if let Err(e) = inner.summon(&mut state) {
            // Those that there are will get to it.
            if state.threads.is_empty() {
                let taken = state.waiting.pop_back();
                drop(state);
                if let Some((id, request)) = taken {
                    inner.finish(id, request, Err(BlockError::Io(e)));
                }
            }
        }
    }

    /// Whether writes' completions wait for stable storage from now on; when they do, so has all that was written before
    /// at the return.
    pub fn set_durable(&self, durable: bool) -> Result<(), BlockError> {
        self.inner.durable.store(durable, Ordering::SeqCst);
        if durable && !self.inner.image.read_only() {
            self.inner.image.flush()?;
        }
        Ok(())
    }

    /// Other limits from now on, with empty buckets.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = self.inner.lock();
        state.throttle = Throttle::new(limits);
        // Whoever waits for a bucket looks again.
        state.wake_all();
    }

    /// The image, for what is asked of it beside the requests.
    pub fn image(&self) -> Arc<dyn Image> {
        Arc::clone(&self.inner.image)
    }

    /// Throw away what is queued and everything submitted from now on.
    pub fn abandon(&self) {
        self.inner.abandoned.store(true, Ordering::SeqCst);
        self.inner.lock().wake_all();
    }
}

impl Drop for Queue {
    /// Serves what is queued, flushes, closes the image.
    fn drop(&mut self) {
        let threads = {
            let mut state = self.inner.lock();
            state.closing = true;
            state.wake_all();
            std::mem::take(&mut state.threads)
        };
        for thread in threads {
            let _ = thread.join();
        }
        if let Some(thread) = self.background.take() {
            let _ = thread.join();
        }
        if !self.inner.is_abandoned() && !self.inner.image.read_only() {
            if let Err(e) = self.inner.image.flush() {
                log::error!("drive {}: the last flush failed: {e}", self.inner.name);
            }
        }
    }
}

#[cfg(test)]
mod tests;
