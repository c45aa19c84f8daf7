//! The backup's machine thread: execute the log; go live when the lock is won.

use std::collections::VecDeque;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ftvm_devices::{DiskOp, Input, MachineRequest, Output};

use super::disks::OwnWrites;
use super::link::{Link, Pulse};
use super::primary::PrimaryRole;
use super::reads::{BackupReads, Fetch};
use super::{Common, FtEvent, FtSide, Role};
use crate::host::disk::DiskFailure;
use crate::host::Outside;
use crate::lockstep::backup::{Action, Backup, Phase};
use crate::lockstep::log::Entry;
use crate::lockstep::wire::{Epoch, Message};
use crate::lockstep::Side;
use crate::machine::{MachineInput, Stamp};
use crate::runtime::announce::{announce, Card};
use crate::runtime::control::{Failover, RunState};
use crate::runtime::live::{follow_entry, is_held, Followed, Runtime};
use crate::runtime::{Event, Events, Outcome};

/// Instructions executed between looks at the events.
const CHUNK: u64 = 100_000;
/// How often the primary is told how far execution is.
const ACK_EVERY: Duration = Duration::from_millis(10);
/// As often where a write of the primary may wait for it.
const ACK_READS_EVERY: Duration = Duration::from_millis(1);
/// A backup that cannot read the shared disk for so long is of no use to its primary, whose writes wait for it.
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// How long MAC addresses are announced after go-live: rounds and the pause between them.
const ANNOUNCE: (usize, Duration) = (6, Duration::from_millis(150));

/// Opens the images and attaches the networks of a machine that goes live.
pub type Attach = Box<dyn FnMut(&Arc<Outside>, &Events) -> Result<(), String> + Send>;

/// What a backup does on its host when it goes live.
pub struct HostSide {
    /// Open the images and attach the networks.
    pub attach: Attach,
    /// MAC address of each network card.
    pub macs: Vec<[u8; 6]>,
    /// Disk reads that this side does before.
    pub reads: Arc<BackupReads>,
}

/// The backup's part of [`FtSide`].
pub struct Follow {
    pub core: Arc<Mutex<Backup>>,
    pub link: Option<Link>,
    pub pulse: Option<Pulse>,
    pub epoch: Epoch,
    pub host: HostSide,
    current: Option<Entry>,
    /// Outputs made since the machine was protected, not yet reported as sent by the primary.
    outputs: VecDeque<(u64, Output)>,
    made: u64,
    counting: bool,
    /// What the guest asked of the machine, until its consequence comes in the log.
    asked: Option<MachineRequest>,
    last_tick: Instant,
    last_ack: Instant,
    last_status: Instant,
    asked_at: Option<(Duration, Duration)>,
    reason: String,
    /// The IPv4 address that each network card was last seen to use.
    addresses: Vec<Option<[u8; 4]>>,
    /// This side's writes to its own disks, where they are separate.
    own: Option<OwnWrites>,
    /// Since when the execution waits for a disk read of this side.
    reading_since: Option<Instant>,
    /// The current entry's data was read by this side.
    fetched: bool,
}

impl Follow {
    /// A backup that has loaded its state.
    pub fn new(
        core: Arc<Mutex<Backup>>,
        link: Link,
        pulse: Option<Pulse>,
        epoch: Epoch,
        host: HostSide,
        separate: bool,
    ) -> Self {
        let cards = host.macs.len();
        Follow {
            core,
            link: Some(link),
            pulse,
            epoch,
            host,
            current: None,
            outputs: VecDeque::new(),
            made: 0,
            counting: false,
            asked: None,
            last_tick: Instant::now(),
            last_ack: Instant::now(),
            last_status: Instant::now(),
            asked_at: None,
            reason: String::new(),
            addresses: vec![None; cards],
            own: separate.then(OwnWrites::default),
            reading_since: None,
            fetched: false,
        }
    }

    /// The user ends this backup: promise never to go live.
    pub fn resign(&mut self, reason: &str) {
        let actions = self.core.lock().map(|mut c| c.resign(reason)).unwrap_or_default();
        for action in actions {
            if let (Action::Send(message), Some(link)) = (action, &self.link) {
                link.send(message);
            }
        }
        self.close();
    }

    /// Let what is queued for the primary leave.
    pub fn close(&mut self) {
        let until = Instant::now() + Duration::from_millis(500);
        while self.link.as_ref().is_some_and(|l| l.queued() > 0) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn keep(&mut self, outputs: Vec<(Stamp, Output)>, outside: &Outside) {
        for (_, output) in outputs {
            if let (Some(own), Output::Disk { .. }) = (&mut self.own, &output) {
                own.begin(output).into_iter().for_each(|o| outside.perform(o));
                continue;
            }
            if let Output::NetTx { nic, frame } = &output {
                if let (Some(slot), Some(ip)) = (self.addresses.get_mut(*nic as usize), sender_ip(frame)) {
                    *slot = Some(ip);
                }
            }
            if self.counting && is_held(&output) {
                self.made += 1;
                // Disk requests are reissued from the machine's own state.
                if !matches!(output, Output::Disk { .. }) {
                    self.outputs.push_back((self.made, output));
                }
            }
        }
    }

    fn forget_released(&mut self, released: u64) {
        while self.outputs.front().is_some_and(|(n, _)| *n <= released) {
            self.outputs.pop_front();
        }
    }
}

/// The request that an entry completes, and whether it failed.
fn disk_done(entry: &Entry) -> Option<(u64, bool)> {
    let Entry::Input { payload, .. } = entry else { return None };
    match postcard::from_bytes(payload) {
        Ok(MachineInput::Device(Input::DiskDone { id, result })) => Some((id, result.is_err())),
        _ => None,
    }
}

/// A request of a backup's own disk ended.
pub fn own_write_ended(rt: &mut Runtime, id: u64, failure: Option<DiskFailure>) -> Option<Outcome> {
    let (f, _) = role(rt)?;
    let following = f.core.lock().is_ok_and(|c| matches!(c.phase(), Phase::Synchronizing | Phase::Following));
    match failure {
        Some(failure) if following => {
            let what = format!("a disk of this host failed: {}", failure.reason);
            f.resign(&what);
            Some(Outcome::Failed(format!("this backup ends: {what}")))
        }
        failure => {
            f.own.as_mut()?.ended(id, failure);
            None
        }
    }
}

/// The requests in flight when the state was copied: this side does them too.
pub fn begin_own_writes(rt: &mut Runtime) {
    let pending = rt.machine.pending_disk();
    let outside = Arc::clone(&rt.outside);
    let Some((Follow { own: Some(own), .. }, _)) = role(rt) else { return };
    pending.into_iter().filter_map(|o| own.begin(o)).for_each(|o| outside.perform(o));
}

/// The sender's IPv4 address in a frame (ARP or IPv4).
fn sender_ip(frame: &[u8]) -> Option<[u8; 4]> {
    let kind = frame.get(12..14)?;
    let at = match kind {
        [8, 0] => 26,
        [8, 6] => 28,
        _ => return None,
    };
    let ip: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    (ip != [0; 4]).then_some(ip)
}

fn role(rt: &mut Runtime) -> Option<(&mut Follow, Arc<Common>)> {
    let ft = rt.ft.as_mut()?;
    let common = Arc::clone(&ft.common);
    match &mut ft.role {
        Role::Backup(f) => Some((f, common)),
        Role::Primary(_) => None,
    }
}

/// News for a backup.
pub fn on_event(rt: &mut Runtime, event: FtEvent) -> Option<Outcome> {
    let (f, common) = role(rt)?;
    let now = common.now();
    let actions = match event {
        FtEvent::Disconnected(id, reason) if f.link.as_ref().is_some_and(|l| l.id == id) => {
            f.core.lock().map(|mut c| c.on_disconnect(&reason, now)).unwrap_or_default()
        }
        FtEvent::Tick => f.core.lock().map(|mut c| c.tick(now)).unwrap_or_default(),
        FtEvent::Verdict(token, verdict) if token == f.epoch.token => {
            f.core.lock().map(|mut c| c.on_verdict(verdict)).unwrap_or_default()
        }
        _ => Vec::new(),
    };
    for action in actions {
        match action {
            Action::Send(message) => {
                if let Some(link) = &f.link {
                    link.send(message);
                }
            }
            Action::Arbitrate(epoch) => {
                let heard = f.core.lock().map_or(now, |c| c.last_heard());
                f.asked_at = Some((heard, now));
                f.pulse = None;
                f.link = None;
                common.arbitrate(epoch, Side::Backup);
            }
            Action::GoLive { reason } => {
                log::warn!("ft: this side takes over: {reason}");
                f.reason = reason;
            }
            Action::Halt { reason } => return Some(Outcome::Failed(format!("this backup ends: {reason}"))),
            Action::Dismissed { reason, again } => {
                f.close();
                log::warn!("ft: the primary ends this pairing: {reason}");
                return Some(if again {
                    Outcome::Again(format!("this backup joins anew: {reason}"))
                } else {
                    Outcome::Done(0)
                });
            }
        }
    }
    None
}

/// One step of a backup's machine thread.
pub fn follow(rt: &mut Runtime) -> Option<Outcome> {
    if role(rt).is_some_and(|(f, _)| f.last_tick.elapsed() >= ACK_EVERY) {
        role(rt)?.0.last_tick = Instant::now();
        if let Some(outcome) = on_event(rt, FtEvent::Tick) {
            return Some(outcome);
        }
    }
    let (f, common) = role(rt)?;
    if f.current.is_none() {
        let (next, ready) = match f.core.lock() {
            Ok(mut core) => (core.done(), core.is_ready_to_live()),
            Err(_) => return Some(Outcome::Failed("internal lock".into())),
        };
        if next.is_none() {
            if ready {
                return go_live(rt);
            }
            report(f, &common, None);
            return wait(rt);
        }
        f.current = next;
    }
    let mut entry = f.current.take()?;
    let stamp = entry.stamp();
    // A completion is applied when this side's own disk has done the same.
    let done = f.own.is_some().then(|| disk_done(&entry)).flatten();
    let mut waits = matches!((&f.own, &done), (Some(own), Some((id, _))) if own.is_busy(*id));
    if let Entry::Fetch { payload, .. } = &entry {
        let Some(fetch) = Fetch::from_bytes(payload) else {
            return Some(Outcome::Failed("a disk read in the log is not readable".into()));
        };
        match f.host.reads.take(fetch.id) {
            Some(data) => {
                f.reading_since = None;
                f.fetched = true;
                let done = MachineInput::Device(Input::DiskDone { id: fetch.id, result: Ok(data) });
                let payload = postcard::to_stdvec(&done).unwrap_or_default();
                entry = Entry::Input { stamp, payload };
            }
            None => waits = true,
        }
    }
    // What the entry brings is not here yet: up to there meanwhile.
    let later = waits.then(|| std::mem::replace(&mut entry, Entry::Horizon { stamp }));
    let outside = Arc::clone(&rt.outside);
    let mut outputs = Vec::new();
    let followed = follow_entry(&mut rt.machine, &entry, CHUNK, &mut outputs);
    let stamp = rt.machine.stamp();
    let (f, common) = role(rt)?;
    f.keep(outputs, &outside);
    if let Some(later) = later {
        entry = later;
        if matches!(followed, Followed::Done) {
            if let Ok(mut core) = f.core.lock() {
                core.executed(stamp);
            }
            let reads = matches!(entry, Entry::Fetch { .. });
            f.current = Some(entry);
            if reads {
                return wait_for_read(rt);
            }
            report(f, &common, None);
            return wait(rt);
        }
    }
    match followed {
        Followed::NotYet | Followed::Asked(_) | Followed::Stopped(_) => {
            if let Followed::Asked(request) = followed {
                f.asked = Some(request);
            }
            if let Ok(mut core) = f.core.lock() {
                core.executed(stamp);
            }
            f.current = Some(entry);
            report(f, &common, Some(stamp));
            None
        }
        Followed::Done => {
            let released = f.core.lock().map_or(0, |mut c| {
                c.executed(stamp);
                c.applied();
                c.released()
            });
            if std::mem::take(&mut f.fetched) && f.last_ack.elapsed() >= ACK_READS_EVERY {
                report_now(f);
            }
            f.forget_released(released);
            if let (Some(own), Some((id, failed))) = (&mut f.own, done) {
                own.forget(id);
                if failed {
                    // This side's disk has what the primary's refused.
                    let what = "a disk of the primary failed";
                    f.resign(what);
                    return Some(Outcome::Again(format!("this backup is made anew: {what}")));
                }
            }
            match entry {
                Entry::Input { .. } => f.asked = None,
                Entry::Protected { .. } => {
                    f.counting = true;
                    if let Some(Err(e)) = common.generations.as_ref().map(|g| g.adopt()) {
                        log::error!("ft: cannot note that this host's disks are up to date: {e}");
                    }
                    common.shared.update_ft(|ft| ft.state = "following");
                }
                Entry::Hash { stamp, .. } => {
                    if let Some(link) = &f.link {
                        link.send(Message::HashAgrees { stamp });
                    }
                }
                Entry::End { .. } => {
                    log::info!("ft: the machine ended on the primary");
                    report_now(f);
                    f.close();
                    return Some(Outcome::Done(0));
                }
                _ => {}
            }
            report(f, &common, Some(stamp));
            None
        }
        Followed::End(outcome) => Some(outcome),
        Followed::Differs(parts) => {
            let what = format!("state differs at position {} in: {}", stamp.position, parts.join(", "));
            log::error!("ft: {what}");
            common
                .shared
                .events
                .emit("FT_DIVERGED", serde_json::json!({"position": stamp.position, "parts": parts}));
            let gave_up =
                f.core.lock().is_ok_and(|c| matches!(c.phase(), Phase::Synchronizing | Phase::Following));
            f.resign(&what);
            Some(if gave_up {
                Outcome::Again(format!("this backup is made anew: {what}"))
            } else {
                Outcome::Failed(format!("this backup ends: {what}"))
            })
        }
    }
}

/// The log's next entry needs a disk read of this side, which is not done yet.
fn wait_for_read(rt: &mut Runtime) -> Option<Outcome> {
    let (f, common) = role(rt)?;
    let since = *f.reading_since.get_or_insert_with(Instant::now);
    let following = f.core.lock().is_ok_and(|c| matches!(c.phase(), Phase::Synchronizing | Phase::Following));
    if following && since.elapsed() >= READ_PATIENCE {
        let what = format!("it cannot read the shared disk: {}", f.host.reads.error());
        f.resign(&what);
        return Some(Outcome::Failed(format!("this backup ends: {what}")));
    }
    report(f, &common, None);
    wait(rt)
}

fn report_now(f: &mut Follow) {
    f.last_ack = Instant::now();
    if let (Some(link), Ok(core)) = (&f.link, f.core.lock()) {
        link.send(core.ack());
    }
}

/// Tell the primary how far execution is, and keep the status.
fn report(f: &mut Follow, common: &Common, stamp: Option<Stamp>) {
    if f.last_ack.elapsed() >= ACK_EVERY
        && f.core.lock().is_ok_and(|c| matches!(c.phase(), Phase::Synchronizing | Phase::Following))
    {
        report_now(f);
    }
    if f.last_status.elapsed() >= Duration::from_millis(100) {
        f.last_status = Instant::now();
        if let Some(stamp) = stamp {
            common.shared.update_ft(|ft| ft.position = stamp.position);
        }
    }
}

/// Nothing to execute: wait for news.
fn wait(rt: &mut Runtime) -> Option<Outcome> {
    match rt.receiver.recv_timeout(ACK_EVERY) {
        Ok(event) => rt.follow_event(event),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => Some(Outcome::Failed("the program's threads ended".into())),
    }
}

/// The lock is won and the log executed: become the machine's live side (section 2.3 of the paper).
fn go_live(rt: &mut Runtime) -> Option<Outcome> {
    let outside = Arc::clone(&rt.outside);
    let events = rt.events.clone();
    rt.shared.backends().take_note(rt.machine.note());
    let (f, common) = role(rt)?;
    let (heard, asked) = f.asked_at.take().unwrap_or_else(|| (common.now(), common.now()));
    let opening = Instant::now();
    while let Err(e) = (f.host.attach)(&outside, &events) {
        log::error!("ft: cannot go live yet: {e}; trying again");
        std::thread::sleep(Duration::from_millis(200));
    }
    log::info!("ft: images and networks opened in {:.1?}", opening.elapsed());
    let mut own = f.own.take();
    let unsent: Vec<Output> = f.outputs.drain(..).map(|(_, o)| o).collect();
    let (mut macs, addresses) = (f.host.macs.clone(), f.addresses.clone());
    for (index, nic) in common.shared.backends().hot_nics() {
        macs.resize(macs.len().max(index + 1), nic.mac);
        macs[index] = nic.mac;
    }
    let request = f.asked.take();
    let (number, reason) = (f.epoch.number, std::mem::take(&mut f.reason));
    if let Ok(mut core) = f.core.lock() {
        core.live();
    }
    f.pulse = None;
    f.link = None;
    // The loser's claim is gone already; this side's may go too: nobody can win this pairing any more.
    common.lock.retire(&f.epoch);
    common.alone();
    let address = |i: usize| addresses.get(i).copied().flatten();
    let cards: Vec<Card> = macs.iter().enumerate().map(|(i, mac)| (i as u32, *mac, address(i))).collect();
    announce(&outside, &cards, vec![ANNOUNCE.1; ANNOUNCE.0 - 1]);
    let pending = rt.machine.pending_disk();
    log::info!("ft: live; {} disk requests reissued, {} outputs sent again", pending.len(), unsent.len());
    for output in pending.into_iter().chain(unsent) {
        match (&mut own, &output) {
            // What this side has written already, or is writing, is not repeated.
            (Some(own), Output::Disk { id, op, .. }) if !matches!(op, DiskOp::Read { .. }) => {
                let id = *id;
                match own.take_ended(id) {
                    Some(Some(failure)) => drop(events.send(Event::DiskFailed(failure))),
                    Some(None) => {
                        let done = Input::DiskDone { id, result: Ok(Vec::new()) };
                        drop(events.send(Event::Input(MachineInput::Device(done))));
                    }
                    None if own.is_busy(id) => {}
                    None => outside.perform(output),
                }
            }
            _ => outside.perform(output),
        }
    }
    let primary = match PrimaryRole::start(&common, number, true) {
        Ok(p) => p,
        Err(e) => return Some(Outcome::Failed(e.to_string())),
    };
    rt.ft = Some(FtSide { common: Arc::clone(&common), role: Role::Primary(Box::new(primary)) });
    rt.restart_pace();
    if rt.machine.is_paused() {
        rt.set_running(false, RunState::Paused);
        rt.shared.set_state(RunState::Paused);
    } else {
        rt.set_running(true, RunState::Running);
    }
    let now = common.now();
    let failover = Failover {
        reason,
        detected_ms: asked.saturating_sub(heard).as_secs_f64() * 1000.0,
        takeover_ms: now.saturating_sub(asked).as_secs_f64() * 1000.0,
    };
    super::note_failover(&common.shared, "primary", "live", failover);
    // The guest asked for a reset or the end, and the primary died before it could log it.
    request.and_then(|request| rt.request(request))
}

/// Hands a backup's messages to its state machine; used by the reader's thread.
pub fn reader(
    core: Arc<Mutex<Backup>>,
    common: Arc<Common>,
    reads: Arc<BackupReads>,
    send: impl Fn(Message) + Send + 'static,
    close: impl Fn(String) + Send + 'static,
) -> impl FnMut(Message) + Send + 'static {
    move |message| {
        let Ok(mut c) = core.lock() else { return };
        match c.on_message(&message, common.now()) {
            Ok(actions) => {
                let fetches = c.take_fetches();
                drop(c);
                fetches.iter().for_each(|f| reads.begin(f));
                for action in actions {
                    if let Action::Send(m) = action {
                        send(m);
                    }
                }
                let _ = common.events.send(Event::Ft(FtEvent::Wake));
            }
            Err(e) => {
                drop(c);
                log::error!("ft: the log is not usable: {e}");
                close(e.to_string());
            }
        }
    }
}
