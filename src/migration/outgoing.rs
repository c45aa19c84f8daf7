//! The source: copies memory while the machine runs, stops it, hands it over.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_accel::mem::DIRTY_MIGRATION;
use ftvm_accel::GuestMemory;
use ftvm_devices::Output;
use serde_json::json;

use super::channel::{Channel, Client};
use super::pages::Pages;
use super::postcopy::pages::is_in;
use super::postcopy::{self, MISSING};
use super::sender::{spawn, News, Writer};
use super::status::{Migration, Status};
use super::stream::{self, Frame, MachineInfo, PAGE};
use crate::runtime::control::RunState;
use crate::runtime::live::{Runtime, Sink};

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
/// The same where the user may ask for post-copy at any time: what waits then delays the machine's start.
const SHORT_WINDOW: usize = 2 << 20;
/// Bytes that may wait for the channel in post-copy, where a page that is asked for is to come soon; pages in one frame there.
const POST_WINDOW: usize = 512 << 10;
const POST_PAGES: usize = 32;
/// Runs of stale pages in one frame.
const RUNS: usize = 1 << 16;

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
    /// The receiver runs it; the rest of its memory is sent.
    Posting,
    /// The same, and all is sent.
    Posted,
    /// The connection is broken; the receiver has not all of the memory.
    Paused,
    /// There is another one; the receiver says what it has.
    Recovering,
}

impl Phase {
    /// Behind the point of no return.
    fn is_given(self) -> bool {
        matches!(self, Phase::Given | Phase::Posting | Phase::Posted | Phase::Paused | Phase::Recovering)
    }
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
    /// The number of a migration that may come to post-copy.
    session: Option<u64>,
    /// It came to that: pages follow the state.
    posts: bool,
}

impl Outgoing {
    /// The part of time that the guest stands still so that the copy gets ahead, 0 to 1.
    pub fn throttle(&self) -> f64 {
        match self.phase {
            Phase::Copying => self.throttle as f64 / 100.0,
            _ => 0.0,
        }
    }

    fn window(&self) -> usize {
        if self.session.is_some() {
            SHORT_WINDOW
        } else {
            WINDOW
        }
    }

    /// How long to wait before looking again: in post-copy little waits for the channel, and is soon sent.
    pub fn nap(&self) -> Duration {
        match self.phase {
            Phase::Posting => Duration::from_micros(100),
            _ => Duration::from_millis(1),
        }
    }

    /// Whether there is something to send at once.
    pub fn is_hungry(&self) -> bool {
        let most = match self.phase {
            Phase::Copying if self.settling => CALM,
            Phase::Copying => self.window(),
            Phase::Posting => POST_WINDOW,
            _ => return false,
        };
        self.writer.queued.load(Ordering::Relaxed) <= most
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
    } else if rt.shared.migration.arriving().is_some() {
        MISSING
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
pub fn start(rt: &mut Runtime, channel: Channel, tls: Option<Client>) -> Result<(), String> {
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
    let answers = channel.answers();
    let post = migration.has("postcopy-ram");
    if post && !answers {
        return Err("a post-copy needs a channel that goes both ways: tcp:, unix: or a socket's fd:".into());
    }
    let session = post.then(|| std::hash::RandomState::new().build_hasher().finish());
    migration.start_postcopy.store(false, Ordering::Relaxed);
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
    let id = rt.next_migration;
    rt.next_migration += 1;
    let flags = if answers { stream::ANSWERS } else { 0 } | if post { stream::POSTCOPY } else { 0 };
    let mut writer = spawn(channel, tls, flags, id, &migration, rt.events.clone()).map_err(|e| {
        set(rt, Status::Failed);
        e.to_string()
    })?;
    writer.send(Frame::Machine(info));
    if let Some(session) = session {
        writer.send(Frame::Advise(session));
    }
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
        session,
        posts: false,
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

/// Take the pages that are dirty, `limit` at most, in address order from `cursor` on.
pub fn take_pages(mem: &GuestMemory, cursor: &mut u64, limit: usize) -> Pages {
    let addresses = mem.take_dirty(DIRTY_MIGRATION, cursor, limit);
    let mut pages = Pages::with_room(addresses.len());
    addresses.iter().for_each(|gpa| push(&mut pages, mem, *gpa));
    pages.trim();
    pages
}

fn push(pages: &mut Pages, mem: &GuestMemory, gpa: u64) {
    // What is dirty is RAM.
    pages.push(gpa, |page| mem.read(gpa, page).is_ok());
}

/// Break the connection of a post-copy; false: there is none here.
pub fn break_off(rt: &Runtime) -> bool {
    let posting = rt.outgoing.as_ref().filter(|o| matches!(o.phase, Phase::Posting | Phase::Posted));
    posting.map(|out| (out.writer.stop)()).is_some()
}

/// The machine thread's part, in each of its rounds.
pub fn work(rt: &mut Runtime) {
    let Some(out) = &rt.outgoing else { return };
    match out.phase {
        Phase::Copying if out.session.is_some() && wants_postcopy(rt) => {
            log::info!("migration: the rest goes in post-copy");
            stop(rt, true);
        }
        Phase::Copying => {
            measure(rt);
            copy(rt);
        }
        Phase::Posting => {
            measure(rt);
            post(rt);
        }
        Phase::Draining => drain(rt),
        Phase::Handing => {
            let late = out.stopped_at.is_some_and(|t| t.elapsed() > ANSWER_WITHIN);
            if late && out.answers && out.writer.queued.load(Ordering::Relaxed) == 0 {
                fail(rt, "the destination does not answer".into());
            }
        }
        Phase::Waiting | Phase::Given | Phase::Posted | Phase::Paused | Phase::Recovering => {}
    }
}

fn wants_postcopy(rt: &Runtime) -> bool {
    rt.shared.migration.start_postcopy.load(Ordering::Relaxed)
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
        if out.settling || queued > out.window() {
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
    let full = pages.full() as u64;
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
        return stop(rt, false);
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

/// The machine stops, with everything sent soon or (`posts`) with the rest of its memory to follow.
fn stop(rt: &mut Runtime, posts: bool) {
    let Some(out) = &mut rt.outgoing else { return };
    out.posts = posts;
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
    if out.posts {
        out.cursor = 0;
        let stale = rt.machine.memory().dirty_runs(DIRTY_MIGRATION);
        stale.chunks(RUNS).for_each(|runs| out.writer.send(Frame::Discard(runs.to_vec())));
    }
    while !out.posts {
        let pages = take_pages(rt.machine.memory(), &mut cursor, PAGES);
        if pages.is_empty() {
            break;
        }
        count(&migration, &pages);
        out.writer.send(Frame::Pages(pages));
    }
    let state = rt.machine.save().to_bytes();
    out.writer.send(Frame::State { running: out.ran, state });
    if out.posts {
        out.writer.posts.store(true, Ordering::SeqCst);
        out.writer.send(Frame::Postcopy);
        out.writer.finish();
    } else {
        out.writer.end();
    }
    Ok(())
}

/// Send what the receiver has not asked for yet.
fn post(rt: &mut Runtime) {
    let Some(out) = &mut rt.outgoing else { return };
    let release = rt.shared.migration.has("release-ram");
    while out.writer.queued.load(Ordering::Relaxed) <= POST_WINDOW {
        let from_start = out.cursor == 0;
        let pages = take_pages(rt.machine.memory(), &mut out.cursor, POST_PAGES);
        if pages.is_empty() {
            // The search goes on behind what was asked for last, so the beginning comes at the end.
            if from_start {
                out.phase = Phase::Posted;
                return out.writer.end();
            }
            continue;
        }
        count(&rt.shared.migration, &pages);
        if release {
            let blocks = rt.machine.memory().blocks();
            let runs: Vec<(u64, u64)> = pages.iter().map(|(gpa, _)| (gpa, 1)).collect();
            if let Err(e) = postcopy::discard(&blocks, &runs) {
                log::debug!("migration: {e}");
            }
        }
        out.writer.send(Frame::Pages(pages));
    }
}

/// The receiver waits for these pages.
fn wanted(rt: &mut Runtime, wanted: &[u64]) {
    let Some(out) = &mut rt.outgoing else { return };
    let mem = rt.machine.memory();
    rt.shared.migration.state().stats.postcopy_requests += wanted.len() as u64;
    for gpa in wanted {
        // One that is not dirty is on its way.
        if mem.take_dirty_page(DIRTY_MIGRATION, *gpa) {
            let mut pages = Pages::with_room(1);
            push(&mut pages, mem, *gpa);
            count(&rt.shared.migration, &pages);
            out.writer.send_first(pages);
        }
        // It will want what is near.
        out.cursor = mem.blocks().number(*gpa).unwrap_or(0);
    }
}

/// The receiver runs the machine now.
fn switched(rt: &mut Runtime) {
    let Some(out) = &mut rt.outgoing else { return };
    out.phase = Phase::Posting;
    let migration = &rt.shared.migration;
    {
        let mut s = migration.state();
        s.downtime = out.stopped_at.map(|t| t.elapsed());
        s.stats.switched_bytes = Some(migration.sent.load(Ordering::Relaxed));
        s.stats.remaining = rt.machine.memory().count_dirty(DIRTY_MIGRATION) * PAGE as u64;
    }
    set(rt, Status::PostcopyActive);
}

/// The connection is gone: nobody has the whole machine until there is another.
fn pause(rt: &mut Runtime, reason: String) {
    let Some(out) = &mut rt.outgoing else { return };
    out.phase = Phase::Paused;
    (out.writer.stop)();
    log::warn!("migration: paused: {reason}");
    rt.shared.migration.state().error = Some(reason);
    set(rt, Status::PostcopyPaused);
}

/// `migrate` with `resume`: go on over another connection.
pub fn resume(rt: &mut Runtime, channel: Channel, tls: Option<Client>) -> Result<(), String> {
    can_resume(rt)?;
    if !channel.answers() {
        return Err("a post-copy needs a channel that goes both ways: tcp:, unix: or a socket's fd:".into());
    }
    let migration = Arc::clone(&rt.shared.migration);
    let flags = stream::ANSWERS | stream::POSTCOPY | stream::RESUME;
    // What the threads of the connection before this one still say is not heard any more.
    let id = rt.next_migration;
    let mut writer =
        spawn(channel, tls, flags, id, &migration, rt.events.clone()).map_err(|e| e.to_string())?;
    rt.next_migration += 1;
    let Some(out) = &mut rt.outgoing else { return Ok(()) };
    writer.send(Frame::Resume(out.session.unwrap_or_default()));
    out.id = id;
    out.writer = writer;
    out.phase = Phase::Recovering;
    set(rt, Status::PostcopyRecover);
    Ok(())
}

/// Whether there is a migration that [`resume`] may go on with.
pub fn can_resume(rt: &Runtime) -> Result<(), String> {
    if rt.outgoing.as_ref().is_none_or(|o| o.phase != Phase::Paused) {
        return Err("Cannot resume if there is no paused migration".into());
    }
    if rt.shared.migration.has("release-ram") {
        return Err("Postcopy recovery cannot work when release-ram capability is set".into());
    }
    Ok(())
}

/// The receiver has these pages: the others are sent (again).
fn recovered(rt: &mut Runtime, has: &[u8]) {
    let Some(out) = &mut rt.outgoing else { return };
    rt.machine.memory().set_dirty_where(DIRTY_MIGRATION, |n| !is_in(has, n));
    (out.phase, out.cursor) = (Phase::Posting, 0);
    rt.shared.migration.state().error = None;
    log::info!("migration: it goes on");
    set(rt, Status::PostcopyActive);
}

/// The sender's threads have news.
pub fn on_news(rt: &mut Runtime, id: u64, news: News) {
    let Some(out) = rt.outgoing.as_mut().filter(|o| o.id == id) else { return };
    match news {
        News::Failed(reason) if out.posts && out.phase.is_given() => pause(rt, reason),
        News::Failed(reason) | News::NotGiven(reason) if out.phase == Phase::Given => {
            // Whether the destination has heard it is not known: this side must not run.
            complete(rt);
            let text =
                format!("{reason}; the destination may run the machine, so it does not go on here by itself");
            log::error!("migration: {text}");
            rt.shared.migration.state().error = Some(text);
            set(rt, Status::Failed);
        }
        News::Failed(reason) | News::NotGiven(reason) => fail(rt, reason),
        News::Loaded if out.phase == Phase::Handing => {
            out.phase = Phase::Given;
            out.writer.go();
        }
        News::Written if out.phase == Phase::Handing => complete(rt),
        News::Given if out.posts => switched(rt),
        News::Given => complete(rt),
        News::Wanted(pages) if out.posts && out.phase != Phase::Paused => wanted(rt, &pages),
        News::Have(pages) if out.phase == Phase::Recovering => recovered(rt, &pages),
        News::Complete if out.phase == Phase::Posted => complete(rt),
        _ if out.phase.is_given() => pause(rt, "the destination answered out of turn".into()),
        _ => fail(rt, "the destination answered out of turn".into()),
    }
}

fn complete(rt: &mut Runtime) {
    let Some(out) = rt.outgoing.take() else { return };
    let _ = rt.machine.track_dirty(false);
    let now = Instant::now();
    {
        let mut s = rt.shared.migration.state();
        s.total_time = s.started.map(|t| now - t);
        s.downtime = s.downtime.or(out.stopped_at.map(|t| now - t));
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
    if rt.outgoing.as_ref().is_some_and(|o| !o.phase.is_given()) {
        set(rt, Status::Cancelling);
        end(rt, None, Status::Cancelled);
    }
}
