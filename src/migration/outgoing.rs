//! The source: copies memory while the machine runs, stops it, hands it over.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_accel::mem::DIRTY_MIGRATION;
use ftvm_accel::GuestMemory;
use ftvm_devices::Output;
use serde_json::json;

use super::channel::Channel;
use super::status::{Migration, Status};
use super::stream::{self, Answer, Frame, MachineInfo, Pages, PAGE};
use crate::runtime::control::RunState;
use crate::runtime::live::{Runtime, Sink};
use crate::runtime::{Event, Events};

/// Pages in one frame, and frames that one step makes at most.
const PAGES: usize = 256;
const FRAMES: usize = 8;
/// Bytes that may wait for the channel; and when a pass over the memory has ended.
const WINDOW: usize = 16 << 20;
const CALM: usize = 512 << 10;
/// How often speed and what remains are measured.
const MEASURE_EVERY: Duration = Duration::from_millis(100);
/// The receiver's longest silence while it makes the machine complete.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How long a reason may take behind a connection that broke.
const REASON_WITHIN: Duration = Duration::from_millis(500);

/// What the sender's thread is to do.
enum Work {
    Frame(Frame),
    /// All frames are there: send what waits, and hear the answer.
    Finish,
    /// Give the machine away.
    Go,
}

/// What the sender's thread has to say.
enum News {
    /// Everything is on its way, and nobody answers.
    Written,
    Loaded,
    Given,
    Failed(String),
}

/// The thread that writes the stream, seen from the machine thread.
struct Writer {
    work: Sender<Work>,
    queued: Arc<AtomicUsize>,
    /// No limit of bandwidth any more: the machine stands still.
    hurry: Arc<AtomicBool>,
    stop: Arc<dyn Fn() + Send + Sync>,
    frames: u64,
}

impl Writer {
    fn send(&mut self, frame: Frame) {
        if let Frame::Pages(pages) = &frame {
            let bytes: usize = pages.iter().map(|(_, p)| 8 + p.as_ref().map_or(0, |_| PAGE)).sum();
            self.queued.fetch_add(bytes, Ordering::Relaxed);
        }
        self.frames += 1;
        let _ = self.work.send(Work::Frame(frame));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Memory is copied while the machine runs.
    Copying,
    /// It stands still until the user says go on.
    Waiting,
    /// It stands still until its disks are idle.
    Draining,
    /// The images are closed; the stream is finished, the receiver may answer.
    Handing,
    /// The receiver may have it: no way back.
    Given,
}

/// A machine on its way out.
pub struct Outgoing {
    id: u64,
    writer: Writer,
    phase: Phase,
    answers: bool,
    cursor: u64,
    /// The pass is over; the channel is to catch up.
    settling: bool,
    ran: bool,
    stopped_at: Option<Instant>,
    /// Images are closed here.
    away: bool,
    measured_at: Instant,
    measured_sent: u64,
    measured_pages: u64,
    dirtied: u64,
    /// Bytes a second that the channel takes.
    speed: f64,
    /// Bytes sent, and whether the guest outran them, when the last pass ended.
    pass_sent: u64,
    outrun: u32,
    throttle: u64,
}

impl Outgoing {
    /// The part of time that the guest stands still so that the copy gets ahead, 0 to 1.
    pub fn throttle(&self) -> f64 {
        match self.phase {
            Phase::Copying => self.throttle as f64 / 100.0,
            _ => 0.0,
        }
    }

    /// Whether there is something to send at once.
    pub fn is_hungry(&self) -> bool {
        let most = if self.settling { CALM } else { WINDOW };
        self.phase == Phase::Copying && self.writer.queued.load(Ordering::Relaxed) <= most
    }
}

fn set(rt: &Runtime, status: Status) {
    let migration = &rt.shared.migration;
    let mut state = migration.state();
    if state.status == status {
        return;
    }
    state.status = status;
    drop(state);
    if migration.has("events") {
        rt.shared.events.emit("MIGRATION", json!({"status": status.word()}));
    }
}

/// Why this machine cannot move now; `None`: it can.
pub fn blocked(rt: &Runtime) -> Option<String> {
    let reason = if rt.home.is_none() {
        "this machine cannot be moved"
    } else if rt.ft.is_some() {
        "the machine is one of a pair (ft-turn-off ends the pair)"
    } else if !matches!(rt.sink, Sink::None) {
        "the machine is recorded"
    } else if rt.shared.jobs.is_busy() {
        "a block job is under way"
    } else if rt.shared.backends().drives.iter().flatten().any(|d| d.snapshot && d.file.is_some()) {
        "a drive has snapshot=on: its temporary file is on this host only"
    } else if rt.shared.jobs.is_busy() {
        "a block job runs"
    } else if rt.shared.backends().is_rearranged() {
        "an external snapshot has given the drives other numbers than a new command line would (commit it, or start the machine \
         anew)"
    } else {
        return None;
    };
    Some(reason.into())
}

/// Begin.
pub fn start(rt: &mut Runtime, channel: Channel) -> Result<(), String> {
    if let Some(reason) = blocked(rt) {
        return Err(reason);
    }
    let Some(home) = &rt.home else { return Err("this machine cannot be moved".into()) };
    let info = MachineInfo {
        program: format!("ftvm {}", env!("CARGO_PKG_VERSION")),
        identity: home.identity.clone(),
        firmware: home.firmware.clone(),
    };
    let migration = Arc::clone(&rt.shared.migration);
    let total = rt.machine.memory().ram_size();
    rt.machine.track_dirty(true)?;
    {
        let mut s = migration.state();
        s.incoming = false;
        s.error = None;
        s.stats = Default::default();
        s.stats.total = total;
        s.stats.remaining = total;
        s.stats.dirty_sync_count = 1;
        s.started = Some(Instant::now());
        s.total_time = None;
        s.downtime = None;
    }
    migration.sent.store(0, Ordering::Relaxed);
    set(rt, Status::Setup);
    let answers = channel.answers();
    let id = rt.next_migration;
    rt.next_migration += 1;
    let mut writer = spawn(channel, id, &migration, rt.events.clone()).map_err(|e| {
        set(rt, Status::Failed);
        e.to_string()
    })?;
    writer.send(Frame::Machine(info));
    rt.machine.memory().set_all_dirty(DIRTY_MIGRATION);
    rt.outgoing = Some(Box::new(Outgoing {
        id,
        writer,
        phase: Phase::Copying,
        answers,
        cursor: 0,
        settling: false,
        ran: !rt.machine.is_paused(),
        stopped_at: None,
        away: false,
        measured_at: Instant::now(),
        measured_sent: 0,
        measured_pages: 0,
        dirtied: 0,
        speed: 0.0,
        pass_sent: 0,
        outrun: 0,
        throttle: 0,
    }));
    set(rt, Status::Active);
    pass_event(rt, 1);
    log::info!("migration: copying {} MiB", total >> 20);
    Ok(())
}

fn pass_event(rt: &Runtime, pass: u64) {
    if rt.shared.migration.has("events") {
        rt.shared.events.emit("MIGRATION_PASS", json!({"pass": pass}));
    }
}

/// Start the thread that writes.
fn spawn(channel: Channel, id: u64, migration: &Arc<Migration>, events: Events) -> std::io::Result<Writer> {
    let (work, queue) = mpsc::channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let hurry = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&channel.stop);
    let sender = Sending {
        queued: Arc::clone(&queued),
        hurry: Arc::clone(&hurry),
        sent: Arc::clone(&migration.sent),
        bandwidth: Arc::clone(&migration.bandwidth),
        pack: migration.has("compress"),
    };
    std::thread::Builder::new().name("migration".into()).spawn(move || {
        let say = teller(events.clone(), id);
        let mut channel = channel;
        let heard = Arc::new(AtomicBool::new(false));
        let listening = match channel.input.take().filter(|_| channel.output.is_some()) {
            Some(input) => listen(input, Arc::clone(&heard), teller(events, id)).map(|()| true),
            None => Ok(false),
        };
        let sent = listening
            .map_err(|e| e.to_string())
            .and_then(|answers| sender.run(channel, answers, &queue, &say));
        if let Err(e) = sent {
            // A destination that refuses says why, and hangs up: the reason counts.
            let until = Instant::now() + REASON_WITHIN;
            while !heard.load(Ordering::SeqCst) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            if !heard.load(Ordering::SeqCst) {
                say(News::Failed(e));
            }
        }
    })?;
    Ok(Writer { work, queued, hurry, stop, frames: 0 })
}

/// Tells the machine thread.
fn teller(events: Events, id: u64) -> impl Fn(News) + Send {
    move |news| drop(events.send(Event::Call(Box::new(move |rt| on_news(rt, id, news)))))
}

/// Hear the destination's answer whenever it comes.
fn listen(
    mut input: Box<dyn Read + Send>,
    heard: Arc<AtomicBool>,
    say: impl Fn(News) + Send + 'static,
) -> std::io::Result<()> {
    let hear = move || {
        let news = match Answer::read(&mut input) {
            Ok(Answer::Loaded) => News::Loaded,
            Ok(Answer::Failed(reason)) => {
                News::Failed(format!("the destination refuses the machine: {reason}"))
            }
            Ok(Answer::Go) => News::Failed("the destination gave an answer that makes no sense".into()),
            Err(e) => News::Failed(format!("the destination hung up: {e}")),
        };
        heard.store(true, Ordering::SeqCst);
        say(news);
    };
    std::thread::Builder::new().name("migration-answer".into()).spawn(hear).map(drop)
}

/// The sender's thread.
struct Sending {
    queued: Arc<AtomicUsize>,
    hurry: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    bandwidth: Arc<AtomicU64>,
    pack: bool,
}

impl Sending {
    fn run(
        &self,
        channel: Channel,
        answers: bool,
        queue: &Receiver<Work>,
        say: &dyn Fn(News),
    ) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| format!("the machine cannot be sent: {e}");
        let (Some(mut output), child) = (channel.output, channel.child) else {
            return Err("the channel has no way out".into());
        };
        self.put(output.as_mut(), &stream::head(if answers { stream::ANSWERS } else { 0 }))
            .map_err(|e| text(&e))?;
        let (mut window, mut in_window) = (Instant::now(), 0u64);
        while let Ok(work) = queue.recv() {
            match work {
                Work::Frame(frame) => {
                    let queued: usize = match &frame {
                        Frame::Pages(p) => p.iter().map(|(_, p)| 8 + p.as_ref().map_or(0, |_| PAGE)).sum(),
                        _ => 0,
                    };
                    let bytes = frame.to_bytes(self.pack);
                    drop(frame);
                    self.put(output.as_mut(), &bytes).map_err(|e| text(&e))?;
                    self.queued.fetch_sub(queued, Ordering::Relaxed);
                    in_window += bytes.len() as u64;
                    self.pace(&mut window, &mut in_window);
                }
                Work::Finish => {
                    output.flush().map_err(|e| text(&e))?;
                    if !answers {
                        drop(output);
                        Channel::finish(child)?;
                        say(News::Written);
                        return Ok(());
                    }
                }
                Work::Go => {
                    Answer::Go.write(&mut output).map_err(|e| text(&e))?;
                    say(News::Given);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn put(&self, output: &mut dyn Write, bytes: &[u8]) -> std::io::Result<()> {
        output.write_all(bytes)?;
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Keep to the bandwidth that the user allows.
    fn pace(&self, window: &mut Instant, in_window: &mut u64) {
        let limit = self.bandwidth.load(Ordering::Relaxed);
        if limit == 0 || self.hurry.load(Ordering::Relaxed) {
            return;
        }
        let due = Duration::from_secs_f64(*in_window as f64 / limit as f64);
        // In small pieces: the limit may change, and the machine may stop meanwhile.
        while window.elapsed() < due && !self.hurry.load(Ordering::Relaxed) {
            let left = due.saturating_sub(window.elapsed());
            std::thread::sleep(left.min(Duration::from_millis(5)));
            if self.bandwidth.load(Ordering::Relaxed) != limit {
                break;
            }
        }
        if window.elapsed() > MEASURE_EVERY {
            *window = Instant::now();
            *in_window = 0;
        }
    }
}

/// Take the pages that are dirty, `limit` at most, in address order from `cursor` on.
pub fn take_pages(mem: &GuestMemory, cursor: &mut u64, limit: usize) -> Pages {
    let addresses = mem.take_dirty(DIRTY_MIGRATION, cursor, limit);
    let mut pages = Vec::with_capacity(addresses.len());
    for gpa in addresses {
        let mut page = Box::new([0u8; PAGE]);
        // What is dirty is RAM.
        let read = mem.read(gpa, page.as_mut_slice()).is_ok();
        pages.push((gpa, Some(page).filter(|p| read && p.iter().any(|b| *b != 0))));
    }
    pages
}

/// The machine thread's part, in each of its rounds.
pub fn work(rt: &mut Runtime) {
    let Some(out) = &rt.outgoing else { return };
    match out.phase {
        Phase::Copying => {
            measure(rt);
            copy(rt);
        }
        Phase::Draining => drain(rt),
        Phase::Handing => {
            let late = out.stopped_at.is_some_and(|t| t.elapsed() > ANSWER_WITHIN);
            if late && out.answers && out.writer.queued.load(Ordering::Relaxed) == 0 {
                fail(rt, "the destination does not answer".into());
            }
        }
        Phase::Waiting | Phase::Given => {}
    }
}

fn measure(rt: &mut Runtime) {
    let Some(out) = &mut rt.outgoing else { return };
    let took = out.measured_at.elapsed();
    if took < MEASURE_EVERY {
        return;
    }
    let migration = &rt.shared.migration;
    let sent = migration.sent.load(Ordering::Relaxed);
    let bytes = sent - out.measured_sent;
    // While there was something to send, this is what the channel takes.
    if bytes > 0 {
        out.speed = bytes as f64 / took.as_secs_f64();
    }
    let remaining = rt.machine.memory().count_dirty(DIRTY_MIGRATION) * PAGE as u64;
    let mut s = migration.state();
    let pages = s.stats.normal + s.stats.duplicate;
    s.stats.mbps = out.speed * 8.0 / 1e6;
    s.stats.pages_per_second = ((pages - out.measured_pages) as f64 / took.as_secs_f64()) as u64;
    s.stats.remaining = remaining;
    if out.speed > 0.0 {
        s.stats.expected_downtime = Some(Duration::from_secs_f64(remaining as f64 / out.speed));
    }
    (out.measured_at, out.measured_sent, out.measured_pages) = (Instant::now(), sent, pages);
}

fn copy(rt: &mut Runtime) {
    let Some(out) = &mut rt.outgoing else { return };
    let mem = rt.machine.memory();
    for _ in 0..FRAMES {
        let queued = out.writer.queued.load(Ordering::Relaxed);
        if out.settling && queued <= CALM {
            out.settling = false;
            return pass_ends(rt);
        }
        if out.settling || queued > WINDOW {
            return;
        }
        let pages = take_pages(mem, &mut out.cursor, PAGES);
        if pages.is_empty() {
            out.settling = true;
            continue;
        }
        count(&rt.shared.migration, &pages);
        out.writer.send(Frame::Pages(pages));
    }
}

fn count(migration: &Migration, pages: &Pages) {
    let full = pages.iter().filter(|(_, p)| p.is_some()).count() as u64;
    let mut s = migration.state();
    s.stats.normal += full;
    s.stats.duplicate += pages.len() as u64 - full;
}

/// Every page was looked at: stop the machine if what is dirty by now can be sent within the limit.
fn pass_ends(rt: &mut Runtime) {
    if let Err(e) = rt.machine.collect_dirty() {
        return fail(rt, e);
    }
    let remaining = rt.machine.memory().count_dirty(DIRTY_MIGRATION) * PAGE as u64;
    let Some(out) = &mut rt.outgoing else { return };
    // What still waits for the channel counts too.
    let waiting = out.writer.queued.load(Ordering::Relaxed) as u64;
    let migration = Arc::clone(&rt.shared.migration);
    let sent = migration.sent.load(Ordering::Relaxed);
    let (limit, pass) = {
        let mut s = migration.state();
        s.stats.dirty_sync_count += 1;
        s.stats.remaining = remaining;
        let took = s.started.map_or(Duration::ZERO, |t| t.elapsed());
        out.dirtied += remaining / PAGE as u64;
        s.stats.dirty_pages_rate = (out.dirtied as f64 / took.as_secs_f64().max(0.001)) as u64;
        (Duration::from_millis(s.parameters.downtime_limit), s.stats.dirty_sync_count)
    };
    let speed = match out.speed {
        0.0 => migration.bandwidth.load(Ordering::Relaxed) as f64,
        measured => measured,
    };
    // A machine that stands still gets no better by waiting.
    let idle = rt.machine.is_paused();
    let fits = (remaining + waiting) as f64 <= speed * limit.as_secs_f64();
    if fits || idle && remaining == 0 {
        return stop(rt);
    }
    let sent_in_pass = sent.saturating_sub(out.pass_sent);
    out.pass_sent = sent;
    if migration.has("auto-converge") {
        let p = migration.state().parameters.clone();
        out.outrun =
            if remaining * 100 > sent_in_pass * p.throttle_trigger_threshold { out.outrun + 1 } else { 0 };
        if out.outrun >= 2 {
            out.outrun = 0;
            out.throttle = match out.throttle {
                0 => p.cpu_throttle_initial,
                t => (t + p.cpu_throttle_increment).min(p.max_cpu_throttle),
            };
            migration.state().stats.throttle = out.throttle;
            log::info!("migration: the guest is slowed by {} %", out.throttle);
        }
    }
    pass_event(rt, pass);
}

/// The machine stops.
fn stop(rt: &mut Runtime) {
    let Some(out) = &mut rt.outgoing else { return };
    out.stopped_at = Some(Instant::now());
    out.ran = !rt.machine.is_paused();
    out.writer.hurry.store(true, Ordering::Relaxed);
    let wait = rt.shared.migration.has("pause-before-switchover");
    out.phase = if wait { Phase::Waiting } else { Phase::Draining };
    rt.stop(RunState::FinishMigrate);
    rt.shared.set_state(RunState::FinishMigrate);
    set(rt, if wait { Status::PreSwitchover } else { Status::Device });
    drain(rt);
}

/// `migrate-continue`.
pub fn go_on(rt: &mut Runtime) -> Result<(), String> {
    match &mut rt.outgoing {
        Some(out) if out.phase == Phase::Waiting => {
            out.phase = Phase::Draining;
            set(rt, Status::Device);
            drain(rt);
            Ok(())
        }
        _ => Err("Migration not in expected state: pre-switchover".into()),
    }
}

/// No request of a disk is under way but those that failed and wait for `cont`.
pub fn disks_are_idle(rt: &Runtime) -> bool {
    let failed: BTreeSet<u64> = rt.errors.stopped_ids().collect();
    rt.machine.pending_disk().iter().all(|o| matches!(o, Output::Disk { id, .. } if failed.contains(id)))
}

fn drain(rt: &mut Runtime) {
    if rt.outgoing.as_ref().is_some_and(|o| o.phase == Phase::Draining) && disks_are_idle(rt) {
        if let Err(e) = hand_over(rt) {
            fail(rt, e);
        }
    }
}

/// Let go of the images, send the rest.
fn hand_over(rt: &mut Runtime) -> Result<(), String> {
    let Some(out) = &mut rt.outgoing else { return Ok(()) };
    // Nobody here sees the images any more.
    rt.shared.exports.stop();
    rt.outside.flush_disks()?;
    out.phase = Phase::Handing;
    out.away = true;
    rt.outside.close_disks();
    let migration = Arc::clone(&rt.shared.migration);
    migration.state().stats.precopy_bytes = migration.sent.load(Ordering::Relaxed);
    rt.machine.collect_dirty()?;
    let mut cursor = 0;
    loop {
        let pages = take_pages(rt.machine.memory(), &mut cursor, PAGES);
        if pages.is_empty() {
            break;
        }
        count(&migration, &pages);
        out.writer.send(Frame::Pages(pages));
    }
    let state = rt.machine.save().to_bytes();
    out.writer.send(Frame::State { running: out.ran, state });
    let frames = out.writer.frames;
    out.writer.send(Frame::End { frames });
    let _ = out.writer.work.send(Work::Finish);
    Ok(())
}

/// The sender's thread has news.
fn on_news(rt: &mut Runtime, id: u64, news: News) {
    let Some(out) = rt.outgoing.as_mut().filter(|o| o.id == id) else { return };
    match news {
        News::Failed(reason) if out.phase == Phase::Given => {
            // Whether the destination has heard it is not known: this side must not run.
            complete(rt);
            let text =
                format!("{reason}; the destination may run the machine, so it does not go on here by itself");
            log::error!("migration: {text}");
            rt.shared.migration.state().error = Some(text);
            set(rt, Status::Failed);
        }
        News::Failed(reason) => fail(rt, reason),
        News::Loaded if out.phase == Phase::Handing => {
            out.phase = Phase::Given;
            let _ = out.writer.work.send(Work::Go);
        }
        News::Written if out.phase == Phase::Handing => complete(rt),
        News::Given => complete(rt),
        News::Loaded | News::Written => fail(rt, "the destination answered out of turn".into()),
    }
}

fn complete(rt: &mut Runtime) {
    let Some(out) = rt.outgoing.take() else { return };
    let _ = rt.machine.track_dirty(false);
    let now = Instant::now();
    {
        let mut s = rt.shared.migration.state();
        s.total_time = s.started.map(|t| now - t);
        s.downtime = out.stopped_at.map(|t| now - t);
        s.stats.remaining = 0;
        let seconds = s.total_time.unwrap_or_default().as_secs_f64();
        s.stats.mbps =
            rt.shared.migration.sent.load(Ordering::Relaxed) as f64 * 8.0 / 1e6 / seconds.max(1e-6);
        log::info!(
            "migration: done in {:.2} s, stopped for {:.1} ms",
            seconds,
            s.downtime.unwrap_or_default().as_secs_f64() * 1000.0
        );
    }
    rt.images_away = true;
    rt.shared.set_state(RunState::PostMigrate);
    set(rt, Status::Completed);
}

/// It did not work, or is not wanted any more: the machine goes on here.
fn fail(rt: &mut Runtime, reason: String) {
    end(rt, Some(reason), Status::Failed);
}

fn end(rt: &mut Runtime, reason: Option<String>, status: Status) {
    let Some(out) = rt.outgoing.take() else { return };
    let _ = rt.machine.track_dirty(false);
    (out.writer.stop)();
    if let Some(reason) = &reason {
        log::warn!("migration: failed: {reason}");
    }
    {
        let mut s = rt.shared.migration.state();
        s.error = reason;
        s.stats.throttle = 0;
        s.total_time = s.started.map(|t| t.elapsed());
    }
    set(rt, status);
    if out.stopped_at.is_none() {
        return;
    }
    rt.images_away = out.away;
    if let Err(e) = rt.fetch_images() {
        log::error!("migration: the machine stays stopped: {e}");
        rt.shared.set_state(RunState::PostMigrate);
        return;
    }
    rt.shared.set_state(RunState::Paused);
    if out.ran {
        rt.cont();
    }
}

/// `migrate_cancel`: nothing happens when nothing moves, or when it is too late.
pub fn cancel(rt: &mut Runtime) {
    if rt.outgoing.as_ref().is_some_and(|o| o.phase != Phase::Given) {
        set(rt, Status::Cancelling);
        end(rt, None, Status::Cancelled);
    }
}
