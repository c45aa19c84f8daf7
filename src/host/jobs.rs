//! Jobs: work on block nodes that goes on beside the machine, with QEMU's states and events (its
//! `docs/interop/bitmaps.rst` and `qapi/job.json` draw the graph of the states).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ftvm_block::copy::{Step, Work};
use ftvm_block::{BlockError, Node};
use ftvm_qmp::EventSink;
use serde_json::{json, Value};

/// `JobStatus`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    Waiting,
    Pending,
    Aborting,
    Concluded,
    Null,
}

impl Status {
    /// QEMU's word.
    pub fn word(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }
}

/// What a job does.
pub trait Body: Work {
    /// It ends well (`pivot`: the user asked for completion), or badly. What is not settled here was never done.
    fn end(&mut self, end: End) -> Result<(), String>;
}

/// How a job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It is done, or both sides are equal and the user wants the new one.
    Complete,
    /// Both sides are equal, and the user wants to keep the old one.
    Stop,
    /// It failed or was cancelled.
    Abort,
}

/// How a job was asked for.
pub struct Wanted {
    pub id: String,
    /// QEMU's `JobType`
    pub kind: &'static str,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    /// Bytes a second; 0: no limit.
    pub speed: u64,
    /// A failing request stops the job instead of ending it.
    pub stop_on_error: bool,
    /// Nodes that nothing else may change meanwhile.
    pub nodes: Vec<Arc<Node>>,
}

struct State {
    status: Status,
    progress: (u64, u64),
    error: Option<String>,
    failed: bool,
    paused: bool,
    /// Wanted by the user.
    cancel: Option<bool>,
    complete: bool,
    finalize: bool,
    speed: u64,
}

/// A job.
pub struct Job {
    pub wanted: Wanted,
    state: Mutex<State>,
    changed: Condvar,
    events: EventSink,
}

/// Why a request to a job is refused.
pub enum Refused {
    NoSuchJob,
    /// "Job 'x' in state 's' cannot accept command verb 'v'"
    State(Status),
    NotReady,
    Paused(bool),
}

/// All jobs.
#[derive(Default)]
pub struct Jobs {
    list: Arc<Mutex<Vec<Arc<Job>>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    closing: Arc<AtomicBool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether it is one of `query-block-jobs`.
    pub fn is_block(&self) -> bool {
        self.wanted.kind != "create" && !self.is_of_the_machine()
    }

    /// Whether it is about the whole machine, not its images.
    fn is_of_the_machine(&self) -> bool {
        self.wanted.kind.starts_with("snapshot-")
    }

    fn set(&self, status: Status) {
        let mut state = self.state();
        if state.status == status {
            return;
        }
        state.status = status;
        drop(state);
        self.events.emit("JOB_STATUS_CHANGE", json!({"id": self.wanted.id, "status": status.word()}));
        self.changed.notify_all();
    }

    fn tell(&self, event: &str, error: Option<&str>) {
        if !self.is_block() {
            return;
        }
        let state = self.state();
        let (offset, len) = state.progress;
        let mut data = json!({
            "type": self.wanted.kind, "device": self.wanted.id, "len": len, "offset": offset, "speed": state.speed,
        });
        drop(state);
        if let Some(error) = error {
            data["error"] = json!(error);
        }
        self.events.emit(event, data);
    }

    /// `JobInfo`
    pub fn info(&self) -> Value {
        let state = self.state();
        let mut info = json!({
            "id": self.wanted.id,
            "type": self.wanted.kind,
            "status": state.status.word(),
            "current-progress": state.progress.0,
            "total-progress": state.progress.1,
        });
        if let Some(error) = &state.error {
            info["error"] = json!(error);
        }
        info
    }

    /// `BlockJobInfo`
    pub fn block_info(&self) -> Value {
        let state = self.state();
        let mut info = json!({
            "type": self.wanted.kind,
            "device": self.wanted.id,
            "len": state.progress.1,
            "offset": state.progress.0,
            "busy": matches!(state.status, Status::Running | Status::Ready) && !state.paused,
            "paused": state.paused,
            "speed": state.speed,
            "io-status": if state.failed { "failed" } else { "ok" },
            "ready": matches!(state.status, Status::Ready | Status::Standby),
            "status": state.status.word(),
            "auto-finalize": self.wanted.auto_finalize,
            "auto-dismiss": self.wanted.auto_dismiss,
        });
        if let Some(error) = &state.error {
            info["error"] = json!(error);
        }
        info
    }

    fn run(&self, body: &mut dyn Body, closing: &AtomicBool) {
        self.set(Status::Running);
        let end = self.work(body, closing);
        if let Ok(end) = end {
            self.set(Status::Waiting);
            self.set(Status::Pending);
            if !self.wanted.auto_finalize {
                let data = json!({"type": self.wanted.kind, "id": self.wanted.id});
                self.events.emit("BLOCK_JOB_PENDING", data);
            }
            let mut state = self.state();
            while !(self.wanted.auto_finalize || state.finalize || state.cancel.is_some()) {
                if closing.load(Ordering::SeqCst) {
                    state.cancel = Some(true);
                    break;
                }
                state = self.wait(state, Duration::from_millis(100));
            }
            let given_up = !(self.wanted.auto_finalize || state.finalize);
            drop(state);
            let result = if given_up { Err(None) } else { body.end(end).map_err(Some) };
            self.state().progress = body.progress();
            match result {
                Ok(()) => self.tell("BLOCK_JOB_COMPLETED", None),
                Err(error) => self.fail(body, error),
            }
        } else if let Err(error) = end {
            self.fail(body, error);
        }
        self.set(Status::Concluded);
    }

    /// `None`: it was cancelled.
    fn fail(&self, body: &mut dyn Body, error: Option<String>) {
        self.set(Status::Aborting);
        if let Err(e) = body.end(End::Abort) {
            log::error!("job {}: {e}", self.wanted.id);
        }
        match error {
            None => {
                self.state().error = Some("Operation canceled".into()).filter(|_| !self.is_block());
                self.tell("BLOCK_JOB_CANCELLED", None);
            }
            Some(text) => {
                log::warn!("job {}: {text}", self.wanted.id);
                self.state().error = Some(text.clone());
                self.tell("BLOCK_JOB_COMPLETED", Some(&text));
            }
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Steps until the end; how it ends, an error, or `None`: it was cancelled.
    fn work(&self, body: &mut dyn Body, closing: &AtomicBool) -> Result<End, Option<String>> {
        let mut ready = false;
        loop {
            let mut state = self.state();
            state.progress = body.progress();
            if closing.load(Ordering::SeqCst) {
                return Err(None);
            }
            match state.cancel {
                Some(force) if force || !ready => return Err(None),
                Some(_) => return Ok(End::Stop),
                None => {}
            }
            if state.paused {
                drop(state);
                self.set(if ready { Status::Standby } else { Status::Paused });
                let mut state = self.state();
                while state.paused && state.cancel.is_none() && !closing.load(Ordering::SeqCst) {
                    state = self.wait(state, Duration::from_millis(100));
                }
                drop(state);
                self.set(if ready { Status::Ready } else { Status::Running });
                continue;
            }
            if state.complete && ready {
                return Ok(End::Complete);
            }
            let speed = state.speed;
            drop(state);
            let started = Instant::now();
            match body.step() {
                Ok(Step::Done) => return Ok(End::Complete),
                Ok(Step::More(bytes)) => {
                    let wanted = match speed {
                        0 if bytes == 0 => Duration::from_millis(1),
                        0 => continue,
                        speed => Duration::from_secs_f64((bytes as f64 / speed as f64).min(3600.0)),
                    };
                    self.rest(wanted.saturating_sub(started.elapsed()), speed, closing);
                }
                Ok(Step::Ready) => {
                    if !ready {
                        ready = true;
                        self.state().progress = body.progress();
                        self.set(Status::Ready);
                        self.tell("BLOCK_JOB_READY", None);
                    }
                    let state = self.state();
                    if !state.complete && state.cancel.is_none() && !state.paused {
                        drop(self.wait(state, Duration::from_millis(20)));
                    }
                }
                Err(e) => self.failed_step(&e)?,
            }
        }
    }

    /// Wait, unless the user wants something else.
    fn rest(&self, time: Duration, speed: u64, closing: &AtomicBool) {
        let until = Instant::now() + time;
        let mut state = self.state();
        while !(state.cancel.is_some() || state.paused || state.speed != speed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || closing.load(Ordering::SeqCst) {
                return;
            }
            state = self.wait(state, left.min(Duration::from_millis(100)));
        }
    }

    fn failed_step(&self, e: &BlockError) -> Result<(), Option<String>> {
        let stops = self.wanted.stop_on_error;
        let data = json!({
            "device": self.wanted.id,
            "operation": if self.wanted.kind == "stream" { "read" } else { "write" },
            "action": if stops { "stop" } else { "report" },
        });
        self.events.emit("BLOCK_JOB_ERROR", data);
        if !stops {
            return Err(Some(e.to_string()));
        }
        let mut state = self.state();
        state.paused = true;
        state.failed = true;
        Ok(())
    }
}

/// A job that is to begin, or to be forgotten.
pub struct Prepared {
    job: Arc<Job>,
    body: Box<dyn Body>,
}

impl Jobs {
    /// Start a job, or run a short one; the id must be free.
    pub fn start(&self, wanted: Wanted, events: &EventSink, body: Box<dyn Body>) -> Result<(), String> {
        self.launch(self.prepare(wanted, events, || Ok(body))?);
        Ok(())
    }

    /// Give a job its place, and make what it does if it has got one; the id must be free.
    pub fn prepare(
        &self,
        wanted: Wanted,
        events: &EventSink,
        make: impl FnOnce() -> Result<Box<dyn Body>, String>,
    ) -> Result<Prepared, String> {
        let job = Arc::new(Job {
            state: Mutex::new(State {
                status: Status::Null,
                progress: (0, 0),
                error: None,
                failed: false,
                paused: false,
                cancel: None,
                complete: false,
                finalize: false,
                speed: wanted.speed,
            }),
            wanted,
            changed: Condvar::new(),
            events: events.clone(),
        });
        let mut list = lock(&self.list);
        if list.iter().any(|j| j.wanted.id == job.wanted.id) {
            return Err(format!("Job ID '{}' already in use", job.wanted.id));
        }
        if self.closing.load(Ordering::SeqCst) {
            return Err("the machine ends".into());
        }
        let body = make()?;
        list.push(Arc::clone(&job));
        Ok(Prepared { job, body })
    }

    /// Forget a job that has not begun.
    pub fn discard(&self, prepared: Prepared) -> Result<(), String> {
        let Prepared { job, mut body } = prepared;
        lock(&self.list).retain(|j| !Arc::ptr_eq(j, &job));
        body.end(End::Abort)
    }

    /// Let it begin.
    pub fn launch(&self, prepared: Prepared) {
        let Prepared { job, mut body } = prepared;
        job.set(Status::Created);
        let (own, closing) = (Arc::clone(&job), Arc::clone(&self.closing));
        let list = Arc::clone(&self.list);
        let thread = std::thread::Builder::new().name(format!("job-{}", job.wanted.kind)).spawn(move || {
            own.run(body.as_mut(), &closing);
            drop(body);
            if own.wanted.auto_dismiss {
                lock(&list).retain(|j| !Arc::ptr_eq(j, &own));
                own.set(Status::Null);
            }
        });
        match thread {
            Ok(thread) => {
                let mut threads = lock(&self.threads);
                threads.retain(|t| !t.is_finished());
                threads.push(thread);
            }
            Err(e) => {
                log::error!("job {}: no thread: {e}", job.wanted.id);
                job.state().error = Some(e.to_string());
                job.set(Status::Concluded);
            }
        }
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Job>> {
        lock(&self.list).clone()
    }

    /// Whether there are jobs on images that have not ended.
    pub fn is_busy(&self) -> bool {
        self.all().iter().filter(|j| !j.is_of_the_machine()).any(|j| j.state().status != Status::Concluded)
    }

    /// The kind of the job that uses a node.
    pub fn user_of(&self, node: &Arc<Node>) -> Option<&'static str> {
        let uses = |j: &&Arc<Job>| {
            j.state().status != Status::Concluded && j.wanted.nodes.iter().any(|n| Arc::ptr_eq(n, node))
        };
        self.all().iter().find(uses).map(|j| j.wanted.kind)
    }

    /// The job with this id.
    pub fn find(&self, id: &str) -> Option<Arc<Job>> {
        self.all().into_iter().find(|j| j.wanted.id == id)
    }

    fn tell(
        &self,
        id: &str,
        allowed: &[Status],
        change: impl FnOnce(&mut State) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let job = self.find(id).ok_or(Refused::NoSuchJob)?;
        let mut state = job.state();
        if !allowed.contains(&state.status) {
            return Err(Refused::State(state.status));
        }
        change(&mut state)?;
        drop(state);
        job.changed.notify_all();
        Ok(())
    }

    /// End it; `force`: without making both sides equal.
    pub fn cancel(&self, id: &str, force: bool) -> Result<(), Refused> {
        use Status::{Created, Paused, Pending, Ready, Running, Standby, Waiting};
        self.tell(id, &[Created, Running, Paused, Ready, Standby, Waiting, Pending], |s| {
            s.cancel = Some(force || s.cancel == Some(true));
            Ok(())
        })
    }

    /// Switch over to the new side.
    pub fn complete(&self, id: &str) -> Result<(), Refused> {
        use Status::{Created, Paused, Ready, Running, Standby};
        let ready = self.find(id).is_some_and(|j| matches!(j.state().status, Ready | Standby));
        self.tell(id, &[Created, Running, Paused, Ready, Standby], |s| {
            if !ready {
                return Err(Refused::NotReady);
            }
            s.complete = true;
            Ok(())
        })
    }

    /// Pause it, or let it go on.
    pub fn pause(&self, id: &str, pause: bool) -> Result<(), Refused> {
        use Status::{Created, Paused, Ready, Running, Standby};
        self.tell(id, &[Created, Running, Paused, Ready, Standby], |s| {
            if s.paused == pause {
                return Err(Refused::Paused(pause));
            }
            s.paused = pause;
            s.failed &= pause;
            Ok(())
        })
    }

    /// Settle a job without `auto-finalize`.
    pub fn finalize(&self, id: &str) -> Result<(), Refused> {
        self.tell(id, &[Status::Pending], |s| {
            s.finalize = true;
            Ok(())
        })
    }

    /// Other limit in bytes a second.
    pub fn set_speed(&self, id: &str, speed: u64) -> Result<(), Refused> {
        use Status::{Created, Paused, Pending, Ready, Running, Standby, Waiting};
        self.tell(id, &[Created, Running, Paused, Ready, Standby, Waiting, Pending], |s| {
            s.speed = speed;
            Ok(())
        })
    }

    /// Forget a job that has ended.
    pub fn dismiss(&self, id: &str) -> Result<(), Refused> {
        self.tell(id, &[Status::Concluded], |_| Ok(()))?;
        let gone = {
            let mut list = lock(&self.list);
            let at = list.iter().position(|j| j.wanted.id == id);
            at.map(|at| list.remove(at))
        };
        if let Some(job) = gone {
            job.set(Status::Null);
        }
        Ok(())
    }

    /// Cancel everything and wait for it.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        for job in lock(&self.list).iter() {
            job.changed.notify_all();
        }
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Whether jobs are being ended because the machine ends.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests;
