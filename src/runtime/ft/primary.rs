//! The live side with `-ft`: waits for a backup, copies the machine to it, logs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ftvm_accel::mem::DIRTY_MIGRATION;
use ftvm_devices::Output;

use super::disks::{self, Copier};
use super::link::{Link, Pulse};
use super::{Common, FtEvent, Role};
use crate::cli::config::Accel;
use crate::cli::ft::Reads;
use crate::lockstep::primary::{Action, Phase, Primary};
use crate::lockstep::wire::{self, Epoch, Message, WireError, PROTOCOL};
use crate::lockstep::{Side, Verdict};
use crate::machine::Stamp;
use crate::runtime::control::{Failover, FtWish};
use crate::runtime::live::Runtime;
use crate::runtime::{Event, Outcome};

/// How often the backup is told how far it may execute, when no output says so.
const HORIZON_EVERY: Duration = Duration::from_millis(5);
/// How often the failure detector is asked.
const TICK_EVERY: Duration = Duration::from_millis(10);
/// Pages sent in one message, and messages in one step.
const PAGES: usize = 256;
const MESSAGES: usize = 8;
/// Bytes that may wait for the network while copying memory.
const COPY_WINDOW: usize = 16 << 20;
/// With at most this many dirty pages the copy is finished in one go.
const FINAL_PAGES: u64 = 2048;
/// Rounds after which it is finished whatever is left.
const ROUNDS: u32 = 12;
/// How long a backup may take to go when its successor is there.
const REPLACED_WITHIN: Duration = Duration::from_secs(8);
/// One that did not fit, and has ended, may be another thread's business still: for so long the next one waits.
const GONE_WITHIN: Duration = Duration::from_secs(1);
/// How often the status is brought up to date.
const STATUS_EVERY: Duration = Duration::from_millis(100);

struct Copy {
    epoch: Epoch,
    cursor: u64,
    round: u32,
    started: Instant,
    pages: u64,
    disks: Option<Copier>,
}

/// The primary's part of [`super::FtSide`].
pub struct PrimaryRole {
    pub core: Arc<Mutex<Primary<Output>>>,
    pub link: Option<Link>,
    pulse: Option<Pulse>,
    copy: Option<Copy>,
    epoch: Option<Epoch>,
    /// A pairing is under way: another backup is refused.
    busy: Arc<AtomicBool>,
    /// Whether the reader of the present connection may still act; one that lags behind from an older
    /// pairing must not acknowledge for this one.
    reading: Arc<AtomicBool>,
    last_tick: Instant,
    last_sent: Instant,
    last_horizon: Instant,
    last_status: Instant,
    rate: Rate,
    suspected_at: Option<(Duration, Duration)>,
    /// Where the backup will wait for a backup of its own when it is live.
    peer_waits_at: Option<SocketAddr>,
    /// The user suspended fault tolerance: backups are refused.
    suspended: Arc<AtomicBool>,
    /// The next backup takes the present one's place.
    replace: Arc<AtomicBool>,
    /// The user turned fault tolerance off: it ends when there is no backup any more.
    ending: bool,
    /// Tells the listener's thread to end, which is woken by a connection to its address.
    closed: Arc<AtomicBool>,
    port: u16,
}

impl Drop for PrimaryRole {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::SeqCst);
        for local in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            let _ =
                TcpStream::connect_timeout(&SocketAddr::new(local, self.port), Duration::from_millis(100));
        }
    }
}

/// Measures the log's bandwidth.
struct Rate {
    at: Instant,
    bytes: u64,
    mbps: f64,
}

impl PrimaryRole {
    /// Listen for backups. A `live` machine does not end because its port is not free: it tries again.
    pub fn start(common: &Arc<Common>, epoch_number: u64, live: bool) -> std::io::Result<Self> {
        let mut listener = match TcpListener::bind(&common.config.listen) {
            Ok(l) => Some(l),
            Err(e) => {
                let text = format!("cannot listen on {} for a backup: {e}", common.config.listen);
                if !live {
                    return Err(std::io::Error::new(e.kind(), text));
                }
                log::error!("ft: {text}; trying again");
                None
            }
        };
        let busy = Arc::new(AtomicBool::new(false));
        let epochs = Arc::new(Mutex::new(epoch_number));
        let suspended = Arc::new(AtomicBool::new(false));
        let replace = Arc::new(AtomicBool::new(false));
        let closed = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&closed);
        let port = common.config.listen.rsplit_once(':').and_then(|(_, p)| p.parse().ok()).unwrap_or(0);
        let (c, b, e, s) = (Arc::clone(common), Arc::clone(&busy), epochs, Arc::clone(&suspended));
        let r = Arc::clone(&replace);
        std::thread::Builder::new().name("ft-listen".into()).spawn(move || {
            let listener = loop {
                match listener.take().map_or_else(|| TcpListener::bind(&c.config.listen), Ok) {
                    Ok(l) => break l,
                    Err(_) if stop.load(Ordering::SeqCst) => return,
                    Err(_) => std::thread::sleep(Duration::from_secs(1)),
                }
            };
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let peer = stream.peer_addr().map_or_else(|_| "?".into(), |a| a.to_string());
                let (c, b, e, s) = (Arc::clone(&c), Arc::clone(&b), Arc::clone(&e), Arc::clone(&s));
                let r = Arc::clone(&r);
                let _ = std::thread::Builder::new().name("ft-hello".into()).spawn(move || {
                    if let Err(error) = welcome(stream, &c, &b, &e, &s, &r) {
                        log::warn!("ft: the backup at {peer} was not accepted: {error}");
                    }
                });
            }
        })?;
        common.shared.update_ft(|ft| {
            ft.role = "primary";
            ft.state = "unprotected";
            common.tell_place(ft);
        });
        Ok(PrimaryRole {
            core: Arc::new(Mutex::new(Primary::new(common.timing()))),
            link: None,
            pulse: None,
            copy: None,
            epoch: None,
            busy,
            reading: Arc::default(),
            last_tick: Instant::now(),
            last_sent: Instant::now(),
            last_horizon: Instant::now(),
            last_status: Instant::now(),
            rate: Rate { at: Instant::now(), bytes: 0, mbps: 0.0 },
            suspected_at: None,
            peer_waits_at: None,
            suspended,
            replace,
            ending: false,
            closed,
            port,
        })
    }

    /// Send what is logged; tell the horizon if it is time. A stopped guest has nothing to log, but the
    /// backup must hear of its primary on the channel too.
    pub fn flush(&mut self, common: &Common, stamp: Stamp) {
        let Some(link) = &self.link else { return };
        let Ok(mut core) = self.core.lock() else { return };
        if !core.is_logging() {
            return;
        }
        let due = self.last_horizon.elapsed() >= HORIZON_EVERY;
        if due || core.has_batch() {
            if due {
                self.last_horizon = Instant::now();
            }
            core.horizon(stamp, common.now());
            while let Some(batch) = core.take_batch(stamp) {
                link.send(batch);
                self.last_sent = Instant::now();
            }
        }
        if self.last_sent.elapsed() >= common.config.heartbeat {
            self.last_sent = Instant::now();
            link.send(Message::Alive);
        }
    }

    /// The machine ends: the backup must not go live.
    pub fn end(&mut self, common: &Common, stamp: Stamp) {
        let Some(link) = &self.link else { return };
        {
            let Ok(mut core) = self.core.lock() else { return };
            if !core.is_logging() {
                return;
            }
            core.end(stamp, Vec::new());
            while let Some(batch) = core.take_batch(stamp) {
                link.send(batch);
            }
        }
        // Outputs still held leave when the backup has acknowledged; wait a little for it.
        let until = Instant::now() + common.config.timeout;
        while Instant::now() < until {
            if self.core.lock().is_ok_and(|c| c.held_count() == 0) && link.queued() == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(epoch) = &self.epoch {
            common.lock.retire(epoch);
        }
    }

    fn status(&mut self, common: &Common, position: u64) {
        if self.last_status.elapsed() < STATUS_EVERY {
            return;
        }
        self.last_status = Instant::now();
        let Ok(core) = self.core.lock() else { return };
        let sent = self.link.as_ref().map_or(0, Link::sent);
        if self.rate.at.elapsed() >= Duration::from_secs(1) {
            let bits = sent.saturating_sub(self.rate.bytes) as f64 * 8.0;
            self.rate = Rate {
                mbps: bits / self.rate.at.elapsed().as_secs_f64() / 1e6,
                at: Instant::now(),
                bytes: sent,
            };
        }
        let mbps = if self.copy.is_some() { 0.0 } else { self.rate.mbps };
        common.shared.update_ft(|ft| {
            ft.position = position;
            ft.lag_ms = core.lag().lag().as_secs_f64() * 1000.0;
            ft.throttle_percent = core.lag().throttle() * 100.0;
            ft.outputs_held = core.held_count();
            ft.log_bytes = core.log_bytes();
            ft.log_mbps = mbps;
        });
    }
}

/// A backup connects: exchange versions, make the claim, send the configuration, wait until it is built.
fn welcome(
    mut stream: TcpStream,
    common: &Arc<Common>,
    busy: &AtomicBool,
    epochs: &Mutex<u64>,
    suspended: &AtomicBool,
    replace: &AtomicBool,
) -> Result<(), WireError> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    wire::greet(&mut stream)?;
    let refuse = |stream: &mut TcpStream, reason: String| -> Result<(), WireError> {
        std::io::Write::write_all(stream, &wire::encode(&Message::Refuse { reason: reason.clone() })?)?;
        Err(WireError::Format(reason))
    };
    let port = match wire::read(&mut stream)?.0 {
        Message::Hello { protocol: PROTOCOL, version, port: p } if version == env!("CARGO_PKG_VERSION") => p,
        Message::Hello { protocol, version, .. } => {
            return refuse(
                &mut stream,
                format!(
                    "the backup is ftvm {version} (protocol {protocol}), the primary {} (protocol {PROTOCOL}): both must be the same",
                    env!("CARGO_PKG_VERSION")
                ),
            );
        }
        _ => return Err(WireError::Format("the first message is not a greeting".into())),
    };
    if suspended.load(Ordering::SeqCst) {
        return refuse(
            &mut stream,
            "fault tolerance is suspended on the primary (ft-resume ends that)".into(),
        );
    }
    let mut taken = busy.swap(true, Ordering::SeqCst);
    let mut patience = GONE_WITHIN;
    if taken && replace.swap(false, Ordering::SeqCst) {
        // The successor is here: only now the present backup is let go.
        let _ = common.events.send(Event::Ft(FtEvent::Replace));
        patience = REPLACED_WITHIN;
    }
    let until = Instant::now() + patience;
    while taken && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
        taken = busy.swap(true, Ordering::SeqCst);
    }
    if taken {
        return refuse(&mut stream, "the primary already has a backup".into());
    }
    let result = prepare(stream, port, common, epochs);
    if result.is_err() {
        busy.store(false, Ordering::SeqCst);
    }
    result
}

fn prepare(
    mut stream: TcpStream,
    port: u16,
    common: &Arc<Common>,
    epochs: &Mutex<u64>,
) -> Result<(), WireError> {
    let number = {
        let mut n = epochs.lock().map_err(|_| WireError::Format("internal lock".into()))?;
        *n += 1;
        *n
    };
    let epoch = Epoch { number, token: super::token()? };
    if let Err(e) = common.lock.claim(&epoch, Side::Primary) {
        let reason = format!("the primary cannot make the lock '{}': {e}", common.lock.describe());
        std::io::Write::write_all(&mut stream, &wire::encode(&Message::Refuse { reason: reason.clone() })?)?;
        return Err(WireError::Format(reason));
    }
    let answer = (|| {
        let config = Message::Config {
            epoch: epoch.clone(),
            config: common.blueprint_now(),
            heartbeat_ms: common.config.heartbeat.as_millis() as u64,
            timeout_ms: common.config.timeout.as_millis() as u64,
            separate_disks: common.config.separate,
            reads_disk: common.config.reads == Reads::Disk,
        };
        std::io::Write::write_all(&mut stream, &wire::encode(&config)?)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        // Written from here on, or different from the backup's: to be copied.
        common.disks.iter().flatten().for_each(|d| d.clear());
        loop {
            return match wire::read(&mut stream)?.0 {
                Message::DiskDigests { drive, first, digests } => {
                    disks::compare(&common.disks, drive, first, &digests)
                        .map_err(|e| WireError::Format(format!("a disk of the primary: {e}")))?;
                    continue;
                }
                Message::Ready => Ok(()),
                Message::Refuse { reason } => Err(WireError::Format(reason)),
                _ => Err(WireError::Format("an unexpected message instead of readiness".into())),
            };
        }
    })();
    if let Err(e) = answer {
        common.lock.retire(&epoch);
        return Err(e);
    }
    stream.set_read_timeout(None)?;
    let link = Box::new(Link::start(stream)?);
    let _ = common.events.send(Event::Ft(FtEvent::BackupReady { link, epoch, port }));
    Ok(())
}

fn role(rt: &mut Runtime) -> Option<(&mut PrimaryRole, Arc<Common>)> {
    let ft = rt.ft.as_mut()?;
    let common = Arc::clone(&ft.common);
    match &mut ft.role {
        Role::Primary(p) => Some((p, common)),
        Role::Backup(_) => None,
    }
}

/// News for a primary.
pub fn on_event(rt: &mut Runtime, event: FtEvent) -> Option<Outcome> {
    let stamp = rt.machine.stamp();
    let outside = Arc::clone(&rt.outside);
    let (p, common) = role(rt)?;
    let now = common.now();
    match event {
        FtEvent::BackupReady { link, epoch, port } => {
            log::info!("ft: backup at {} is ready; copying the machine (epoch {})", link.peer, epoch.number);
            start_reader(p, &common, &link, &outside);
            let (peer, number) = (link.peer.to_string(), epoch.number);
            p.peer_waits_at = Some(SocketAddr::new(link.peer.ip(), port));
            p.link = Some(*link);
            if let Ok(mut core) = p.core.lock() {
                core.copying(now);
            }
            let mut disks = None;
            if let Some(link) = p.link.as_ref().filter(|_| common.config.separate) {
                let (events, id) = (common.events.clone(), link.id);
                let fail = move |reason| {
                    let _ = events.send(Event::Ft(FtEvent::Disconnected(id, format!("a disk: {reason}"))));
                };
                match Copier::start(common.disks.clone(), link.queue(), link.sender(), fail) {
                    Ok(copier) => disks = Some(copier),
                    Err(e) => link.fail(&common.events, e.to_string()),
                }
            }
            p.copy = Some(Copy { epoch, cursor: 0, round: 0, started: Instant::now(), pages: 0, disks });
            common.shared.update_ft(|ft| {
                ft.state = "synchronizing";
                ft.epoch = number;
                ft.peer = Some(peer);
            });
            rt.machine.memory().set_all_dirty(DIRTY_MIGRATION);
            None
        }
        FtEvent::Message(id, message) => {
            if p.link.as_ref().is_none_or(|l| l.id != id) {
                return None;
            }
            let actions = p.core.lock().map(|mut c| c.on_message(&message, stamp, now)).unwrap_or_default();
            actions.into_iter().find_map(|a| act(rt, a))
        }
        FtEvent::Disconnected(id, reason) => {
            if p.link.as_ref().is_none_or(|l| l.id != id) {
                return None;
            }
            let actions = p.core.lock().map(|mut c| c.on_disconnect(&reason, now)).unwrap_or_default();
            actions.into_iter().find_map(|a| act(rt, a))
        }
        FtEvent::Tick => {
            let actions = p.core.lock().map(|mut c| c.tick(now)).unwrap_or_default();
            actions.into_iter().find_map(|a| act(rt, a))
        }
        FtEvent::Verdict(token, verdict) => {
            if p.epoch.as_ref().is_none_or(|e| e.token != token) {
                return None;
            }
            let core = Arc::clone(&p.core);
            let Ok(mut core) = core.lock() else { return None };
            let actions = core.on_verdict(verdict);
            if verdict == Verdict::Won {
                let (heard, asked) = p.suspected_at.take().unwrap_or((now, now));
                let failover = Failover {
                    reason: "the backup was lost".into(),
                    detected_ms: asked.saturating_sub(heard).as_secs_f64() * 1000.0,
                    takeover_ms: now.saturating_sub(asked).as_secs_f64() * 1000.0,
                };
                super::note_failover(&common.shared, "primary", "unprotected", failover);
            }
            // Under the core's lock, so that no later output overtakes these.
            let outcome = actions.into_iter().find_map(|a| act(rt, a));
            drop(core);
            outcome
        }
        FtEvent::Replace => {
            let core = Arc::clone(&p.core);
            let actions = core.lock().map(|mut c| c.dismiss("another backup takes its place", false));
            actions.unwrap_or_default().into_iter().find_map(|a| act(rt, a))
        }
        FtEvent::Wake => None,
    }
}

fn start_reader(p: &mut PrimaryRole, common: &Arc<Common>, link: &Link, outside: &Arc<crate::host::Outside>) {
    let id = link.id;
    let (core, c, outside) = (Arc::clone(&p.core), Arc::clone(common), Arc::clone(outside));
    let c2 = Arc::clone(common);
    p.reading.store(false, Ordering::SeqCst);
    p.reading = Arc::new(AtomicBool::new(true));
    let reading = Arc::clone(&p.reading);
    let on_message = move |message: Message| {
        if matches!(message, Message::Ack { .. } | Message::Alive) {
            // Acknowledgements release outputs at once, whatever the machine thread is doing.
            // The flag is looked at under the lock that the next pairing needs to begin.
            if let Some(mut core) = core.lock().ok().filter(|_| reading.load(Ordering::SeqCst)) {
                for action in core.on_message(&message, Stamp::default(), c.now()) {
                    if let Action::Release(outputs) = action {
                        for output in outputs {
                            outside.perform(output);
                        }
                    }
                }
                outside.backup_executed(core.applied());
            }
        } else {
            if let Ok(mut core) = core.lock() {
                core.heard(c.now());
            }
            let _ = c.events.send(Event::Ft(FtEvent::Message(id, message)));
        }
    };
    let on_end = move |reason| {
        let _ = c2.events.send(Event::Ft(FtEvent::Disconnected(id, reason)));
    };
    if let Err(e) = link.read(on_message, on_end) {
        log::error!("ft: {e}");
        let _ = common.events.send(Event::Ft(FtEvent::Disconnected(id, e.to_string())));
    }
}

/// Do what the state machine says. The core's lock may be held by the caller.
fn act(rt: &mut Runtime, action: Action<Output>) -> Option<Outcome> {
    let outside = Arc::clone(&rt.outside);
    let (p, common) = role(rt)?;
    match action {
        Action::Release(outputs) => {
            for output in outputs {
                outside.perform(output);
            }
            None
        }
        Action::Arbitrate(epoch) => {
            let now = common.now();
            let heard = p.core.lock().map_or(now, |c| c.last_heard());
            p.suspected_at = Some((heard, now));
            p.pulse = None;
            if let Some(link) = p.link.take() {
                link.close();
            }
            common.arbitrate(epoch, Side::Primary);
            None
        }
        Action::NowProtected => {
            log::info!("ft: the machine is protected");
            common.shared.update_ft(|ft| ft.state = "protected");
            None
        }
        Action::NowUnprotected { reason } => {
            log::warn!("ft: unprotected: {reason}");
            if p.copy.is_none() {
                common.alone();
            }
            drop_pair(p, &common);
            outside.keep_reads();
            None
        }
        Action::Halt { reason, planned } => {
            outside.abandon();
            if let Some(epoch) = p.epoch.take() {
                log::error!("ft: this side lost pairing {}: {reason}", epoch.number);
            }
            match p.peer_waits_at {
                Some(peer) if planned => {
                    log::warn!("ft: the machine lives at {peer} now");
                    Some(Outcome::Rejoin(common.config.of_backup(peer)))
                }
                _ => Some(Outcome::Failed(format!("this primary has lost its machine: {reason}"))),
            }
        }
        Action::Send(message) => {
            if let Some(link) = &p.link {
                link.send(message);
            }
            None
        }
        Action::HashAgreed { stamp } => {
            log::debug!("ft: states equal at position {}", stamp.position);
            None
        }
    }
}

/// The pairing is over; wait for another backup.
fn drop_pair(p: &mut PrimaryRole, common: &Common) {
    p.reading.store(false, Ordering::SeqCst);
    p.pulse = None;
    let copied = p.copy.take().map(|c| c.epoch);
    if let Some(link) = p.link.take() {
        link.close();
    }
    if let Some(epoch) = p.epoch.take().or(copied) {
        common.lock.retire(&epoch);
    }
    p.busy.store(false, Ordering::SeqCst);
    common.shared.update_ft(|ft| {
        ft.state = "unprotected";
        ft.peer = None;
        ft.lag_ms = 0.0;
        ft.log_mbps = 0.0;
        ft.outputs_held = 0;
        ft.throttle_percent = 0.0;
    });
}

/// Copy memory to a new backup, keep the status.
pub fn live_work(rt: &mut Runtime) -> Option<Outcome> {
    let position = rt.machine.stamp().position;
    // The failure detector does not depend on the heartbeats' thread and its socket.
    if role(rt).is_some_and(|(p, _)| p.last_tick.elapsed() >= TICK_EVERY) {
        role(rt)?.0.last_tick = Instant::now();
        if let Some(outcome) = on_event(rt, FtEvent::Tick) {
            return Some(outcome);
        }
    }
    {
        let (p, common) = role(rt)?;
        if p.ending && p.core.lock().is_ok_and(|c| c.phase() == Phase::Unprotected) {
            turn_off(rt);
            return None;
        }
        p.status(&common, position);
        let link = p.link.as_ref().filter(|_| p.copy.is_some())?;
        if link.queued() > COPY_WINDOW {
            return None;
        }
    }
    copy_step(rt)
}

fn copy_step(rt: &mut Runtime) -> Option<Outcome> {
    let mut cursor;
    {
        let (p, _) = role(rt)?;
        let copy = p.copy.as_ref()?;
        // Disks first: memory changes faster.
        if copy.disks.as_ref().is_some_and(|d| !d.is_near()) {
            return None;
        }
        cursor = copy.cursor;
    }
    let mut finished_round = false;
    for _ in 0..MESSAGES {
        let addresses = rt.machine.memory().take_dirty(DIRTY_MIGRATION, &mut cursor, PAGES);
        if addresses.is_empty() {
            finished_round = true;
            break;
        }
        send_pages(rt, &addresses)?;
    }
    let dirty = if finished_round { rt.machine.memory().count_dirty(DIRTY_MIGRATION) } else { u64::MAX };
    let (p, _) = role(rt)?;
    let copy = p.copy.as_mut()?;
    copy.cursor = cursor;
    if finished_round {
        copy.round += 1;
        copy.cursor = 0;
        if dirty <= FINAL_PAGES || copy.round >= ROUNDS {
            finish_copy(rt);
        }
    }
    None
}

fn send_pages(rt: &mut Runtime, addresses: &[u64]) -> Option<()> {
    let mut pages = Vec::with_capacity(addresses.len());
    for gpa in addresses {
        let mut data = vec![0u8; 4096];
        rt.machine.memory().read(*gpa, &mut data).ok()?;
        if data.iter().all(|b| *b == 0) {
            data = Vec::new();
        }
        pages.push((*gpa, data));
    }
    let (p, _) = role(rt)?;
    p.copy.as_mut()?.pages += pages.len() as u64;
    p.link.as_ref()?.send(Message::Pages { pages });
    Some(())
}

/// The final stop: the rest of memory and the state; from here on everything is logged.
fn finish_copy(rt: &mut Runtime) -> Option<()> {
    let stop = Instant::now();
    let mut cursor = 0;
    loop {
        let rest = rt.machine.memory().take_dirty(DIRTY_MIGRATION, &mut cursor, PAGES);
        if rest.is_empty() {
            break;
        }
        send_pages(rt, &rest)?;
    }
    // What is written from here on is in the log, and what is in flight in the state.
    if let Some(copier) = role(rt)?.0.copy.as_mut()?.disks.take() {
        drop(copier);
        let (p, common) = role(rt)?;
        let link = p.link.as_ref()?;
        loop {
            match disks::next_chunks(&common.disks) {
                Ok(Some(message)) => link.send(message),
                Ok(None) => break,
                Err(e) => {
                    link.fail(&common.events, format!("a disk: {e}"));
                    break;
                }
            }
        }
    }
    let stamp = rt.machine.stamp();
    let state = rt.machine.save().to_bytes();
    if role(rt)?.1.config.reads == Reads::Disk {
        let drives = rt.shared.backends().drives.clone();
        // What a snapshot's overlay holds is on this host only.
        let shared = |i: usize| drives.get(i).is_some_and(|d| d.as_ref().is_some_and(|d| !d.snapshot));
        rt.outside.share_reads(&rt.machine.pending_disk(), shared);
    }
    let (p, common) = role(rt)?;
    let copy = p.copy.take()?;
    let link = p.link.as_ref()?;
    link.send(Message::State { stamp, state });
    p.core.lock().ok()?.begin(copy.epoch.clone(), stamp, common.now());
    let token = copy.epoch.token.clone();
    p.epoch = Some(copy.epoch);
    let (core, c) = (Arc::clone(&p.core), Arc::clone(&common));
    let c2 = Arc::clone(&common);
    let core2 = Arc::clone(&p.core);
    let listen = common.config.listen.clone();
    let pulse = {
        Pulse::start(
            move || UdpSocket::bind(&listen),
            token,
            Side::Primary,
            None,
            common.config.heartbeat,
            move || {
                if let Ok(mut core) = core.lock() {
                    core.heard(c.now());
                }
            },
            move || {
                // Only the machine thread acts; it is told when there may be something to do.
                if core2.lock().is_ok_and(|core| !matches!(core.phase(), Phase::Unprotected | Phase::Lost)) {
                    let _ = c2.events.send(Event::Ft(FtEvent::Tick));
                }
            },
        )
    };
    match pulse {
        Ok(pulse) => p.pulse = Some(pulse),
        Err(e) => log::warn!("ft: no heartbeats: {e}"),
    }
    log::info!(
        "ft: copied {} pages in {:.1} s ({} rounds); final stop {:.1} ms",
        copy.pages,
        copy.started.elapsed().as_secs_f64(),
        copy.round,
        stop.elapsed().as_secs_f64() * 1000.0
    );
    Some(())
}

/// There is no backup any more, and none is wanted.
fn turn_off(rt: &mut Runtime) {
    rt.ft = None;
    let shared = Arc::clone(&rt.shared);
    let drives = shared.backends().drives.clone();
    let durable = |i: usize| drives.get(i).is_some_and(|d| d.as_ref().is_some_and(|d| d.is_durable()));
    if let Err(e) = rt.outside.set_durable(durable) {
        log::warn!("ft: {e}");
    }
    shared.update_ft(|ft| *ft = Default::default());
    // Back to what it was started on.
    if rt.home_accel == Accel::Kvm {
        if let Err(e) = rt.change_processors(Accel::Kvm) {
            log::warn!("the machine stays on tcg: {e}");
        }
    }
}

/// What the user wants of the pair; the caller has looked whether the state allows it.
pub fn wish(rt: &mut Runtime, wish: FtWish) {
    let shared = Arc::clone(&rt.shared);
    let Some((p, _)) = role(rt) else { return };
    let Ok(mut core) = p.core.lock() else { return };
    let actions = match wish {
        FtWish::Suspend => {
            p.suspended.store(true, Ordering::SeqCst);
            shared.update_ft(|ft| ft.suspended = true);
            core.dismiss("fault tolerance is suspended", false)
        }
        FtWish::Resume => {
            p.suspended.store(false, Ordering::SeqCst);
            shared.update_ft(|ft| ft.suspended = false);
            Vec::new()
        }
        FtWish::TurnOff => {
            p.suspended.store(true, Ordering::SeqCst);
            p.ending = true;
            core.dismiss("fault tolerance is turned off", false)
        }
        FtWish::MigrateBackup => {
            p.replace.store(true, Ordering::SeqCst);
            Vec::new()
        }
        FtWish::RestartBackup => core.dismiss("a new backup is wanted", true),
        FtWish::TestFailover => {
            if !core.hand_over() {
                log::warn!("ft: no switch: the machine is not protected");
            }
            Vec::new()
        }
    };
    drop(core);
    for action in actions {
        act(rt, action);
    }
}
