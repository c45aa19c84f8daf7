//! One process of the pair: what the runtime does around the state machines, step by step.

use std::collections::VecDeque;
use std::time::Duration;

use ftvm_accel::mem::DIRTY_MIGRATION;
use ftvm_devices::{DiskOp, Input, Output};

use super::guest;
use super::world::{World, MS};
use super::Mutation;
use crate::lockstep::backup::{self, Backup};
use crate::lockstep::heartbeat::{Heartbeat, Listener};
use crate::lockstep::log::Entry;
use crate::lockstep::primary::{self, Primary, Timing};
use crate::lockstep::reads::Reads;
use crate::lockstep::wire::{Epoch, Message};
use crate::lockstep::{Side, Verdict};
use crate::machine::{Machine, MachineInput, MachineState, Stamp, Stop};
use crate::runtime::ft::disks::OwnWrites;
use crate::runtime::live::{follow_entry, is_held, Followed};

pub const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(10),
    timeout: Duration::from_millis(50),
    max_lag: Duration::from_millis(40),
};

pub struct Copy {
    pub epoch: Epoch,
    cursor: u64,
    round: u32,
}

pub struct PrimaryRole {
    pub core: Primary<Output>,
    pub copy: Option<Copy>,
    pub epoch: Option<Epoch>,
    pub busy: bool,
    pub epochs: u64,
    last_horizon: u64,
    steps: u64,
}

pub struct BackupRole {
    pub core: Backup,
    pub epoch: Epoch,
    current: Option<Entry>,
    outputs: VecDeque<(u64, Output)>,
    made: u64,
    counting: bool,
    last_ack: u64,
    /// Writes of its own disk.
    own: Option<OwnWrites>,
}

pub enum Role {
    /// Takes the state; the lock's claim is made when the epoch is known.
    Joining {
        epoch: Option<Epoch>,
    },
    Primary(Box<PrimaryRole>),
    Backup(Box<BackupRole>),
    Ended(String),
}

/// A process.
pub struct Proc {
    pub host: usize,
    pub alive: bool,
    pub paused: bool,
    pub machine: Machine,
    pub role: Role,
    pub conn: Option<usize>,
    pub beats: Option<(Listener, u64, Side, String)>,
    /// Layers of the disk, lowest first; writes go to the last.
    pub chain: Vec<usize>,
    pub queue: VecDeque<(u64, DiskOp)>,
    pub serving: bool,
    pub abandoned: bool,
    pub clock: u64,
    /// Reads that the backup does itself.
    pub reads: Reads<DiskOp>,
    /// The number of the primary's disk when this host began to copy it.
    pub joined_generation: i64,
}

impl PrimaryRole {
    pub fn new(epochs: u64) -> Self {
        PrimaryRole {
            core: Primary::new(TIMING),
            copy: None,
            epoch: None,
            busy: false,
            epochs,
            last_horizon: 0,
            steps: 0,
        }
    }
}

impl World {
    pub(super) fn primary(&mut self, p: usize) -> Option<&mut PrimaryRole> {
        match &mut self.procs[p].role {
            Role::Primary(r) => Some(r),
            _ => None,
        }
    }

    fn backup(&mut self, p: usize) -> Option<&mut BackupRole> {
        match &mut self.procs[p].role {
            Role::Backup(r) => Some(r),
            _ => None,
        }
    }

    fn is_following(&self, p: usize) -> bool {
        matches!(&self.procs[p].role, Role::Backup(b) if b.core.phase() != backup::Phase::GoingLive)
    }

    fn local(&self, p: usize) -> Duration {
        Duration::from_micros(self.now + self.procs[p].clock)
    }

    fn send_log(&mut self, p: usize, stamp: Stamp) {
        while let Some(batch) = self.primary(p).and_then(|r| r.core.take_batch(stamp)) {
            self.send(p, batch);
        }
    }

    /// `FtSide::output`
    fn output(&mut self, p: usize, stamp: Stamp, output: Output) {
        let now = self.local(p);
        let own = self.options.separate && matches!(output, Output::Disk { .. });
        if own || !is_held(&output) {
            return self.perform(p, output);
        }
        let early = self.options.mutation == Some(Mutation::ReleaseEarly);
        let Some(r) = self.primary(p) else { return };
        let copy = early.then(|| output.clone());
        let direct = r.core.output(stamp, output, now);
        if let Some(output) = direct.or(copy) {
            self.perform(p, output);
        } else {
            self.send_log(p, stamp);
        }
    }

    fn route_outputs(&mut self, p: usize) {
        for (stamp, output) in self.procs[p].machine.take_outputs() {
            self.output(p, stamp, output);
        }
    }

    /// `Runtime::input`, and what happens to inputs of a side that is not live.
    pub(super) fn input(&mut self, p: usize, input: MachineInput) {
        if self.primary(p).is_none() {
            return;
        }
        let skip = self.rng.below(800_000);
        let m = &mut self.procs[p].machine;
        if m.is_idle() {
            let to = m.now() + skip;
            m.skip_to(to);
            self.route_outputs(p);
        }
        let stamp = self.procs[p].machine.stamp();
        let shared = self.is_shared_read(p, &input);
        let payload = postcard::to_stdvec(&input).unwrap_or_default();
        let Some(r) = self.primary(p) else { return };
        let number = match &shared {
            Some((_, fetch)) => r.core.fetch(stamp, fetch.clone()),
            None => {
                r.core.input(stamp, payload);
                0
            }
        };
        self.procs[p].machine.apply(&input);
        match (&shared, &input) {
            (Some((id, _)), _) => self.procs[p].reads.logged(*id, number),
            (None, MachineInput::Device(Input::DiskDone { id, .. })) => {
                let ready = self.procs[p].reads.ended(*id);
                self.enqueue(p, ready);
            }
            _ => {}
        }
        self.route_outputs(p);
    }

    fn flush(&mut self, p: usize) {
        let (now, local) = (self.now, self.local(p));
        let stamp = self.procs[p].machine.stamp();
        let Some(r) = self.primary(p) else { return };
        if !r.core.is_logging() {
            return;
        }
        let due = now >= r.last_horizon + 5 * MS;
        if due || r.core.has_batch() {
            if due {
                r.last_horizon = now;
            }
            r.core.horizon(stamp, local);
            self.send_log(p, stamp);
        }
    }

    /// One turn of the machine thread.
    pub(super) fn step(&mut self, p: usize) {
        match &self.procs[p].role {
            Role::Primary(_) => self.live_step(p),
            Role::Backup(_) => {
                // Some backups are slow, so that log is waiting at a failover.
                let behind = self.options.seed.is_multiple_of(3) && !self.is_healed() && self.is_following(p);
                let steps = if behind { u64::from(self.rng.chance(25)) } else { 64 };
                for _ in 0..steps {
                    if !self.follow(p) {
                        break;
                    }
                }
            }
            _ => {}
        }
    }

    fn live_step(&mut self, p: usize) {
        self.copy_step(p);
        let Some(r) = self.primary(p) else { return };
        if r.core.must_wait() {
            return self.flush(p);
        }
        r.steps += 1;
        let hash = r.steps.is_multiple_of(16);
        let limit = 20 + self.rng.below(120);
        let skip = self.rng.below(1_500_000);
        let m = &mut self.procs[p].machine;
        let stop = m.run(limit);
        self.route_outputs(p);
        let Some(r) = self.primary(p) else { return };
        if hash && r.core.is_logging() {
            let m = &mut self.procs[p].machine;
            let (stamp, payload) = (m.stamp(), postcard::to_stdvec(&m.state_hash()).unwrap_or_default());
            if let Some(r) = self.primary(p) {
                r.core.hash(stamp, payload);
            }
        }
        self.flush(p);
        if let Stop::Idle { next } = stop {
            let m = &mut self.procs[p].machine;
            let to = m.now() + skip;
            m.skip_to(next.map_or(to, |n| n.min(to)));
            self.route_outputs(p);
        }
    }

    /// A backup said hello: `welcome`, `prepare` and `BackupReady`.
    pub(super) fn accept(&mut self, p: usize, conn: usize) {
        let token = format!("t{}", self.rng.next());
        let storage = self.storage_ok(p);
        let Some(r) = self.primary(p) else { return self.reset(conn) };
        if r.busy || !storage || r.core.phase() == primary::Phase::Lost {
            return self.reset(conn);
        }
        r.busy = true;
        r.epochs += 1;
        let epoch = Epoch { number: r.epochs, token };
        self.locks.claim(&epoch, Side::Primary);
        self.procs[p].conn = Some(conn);
        let epoch2 = epoch.clone();
        self.expect_ready(p, epoch.token.clone());
        if let Some(r) = self.primary(p) {
            // Kept for the moment when the backup is ready.
            r.copy = None;
            r.epoch = Some(epoch);
        }
        let chain = postcard::to_stdvec(&self.procs[p].chain).unwrap_or_default();
        self.clear_dirty(p);
        self.send(
            p,
            Message::Config {
                epoch: epoch2,
                config: chain,
                heartbeat_ms: 10,
                timeout_ms: 50,
                separate_disks: self.options.separate,
                reads_disk: self.options.reads_disk,
            },
        );
    }

    fn copy_step(&mut self, p: usize) {
        let quick = self.rng.chance(50);
        let m = self.options.mutation;
        let Some(copy) = self.primary(p).and_then(|r| r.copy.as_mut()) else { return };
        let mut cursor = copy.cursor;
        let pages = self.pages(p, &mut cursor, 4);
        let ended = pages.is_empty();
        if !ended {
            self.send(p, Message::Pages { pages });
        }
        let near = !self.options.separate || self.send_sectors(p, 2);
        let dirty = self.procs[p].machine.memory().count_dirty(DIRTY_MIGRATION);
        let Some(copy) = self.primary(p).and_then(|r| r.copy.as_mut()) else { return };
        copy.cursor = cursor;
        if !ended {
            return;
        }
        copy.round += 1;
        copy.cursor = 0;
        if copy.round < 3 && dirty > 2 && !quick || !near && copy.round < 6 {
            return;
        }
        // The final stop.
        if m != Some(Mutation::NoDirtyPages) {
            let mut cursor = 0;
            let pages = self.pages(p, &mut cursor, usize::MAX);
            self.send(p, Message::Pages { pages });
        }
        if self.options.separate {
            self.send_sectors(p, usize::MAX);
        }
        let stamp = self.procs[p].machine.stamp();
        let state = self.procs[p].machine.save().to_bytes();
        self.share_reads(p);
        let now = self.local(p);
        self.send(p, Message::State { stamp, state });
        let Some(r) = self.primary(p) else { return };
        let Some(copy) = r.copy.take() else { return };
        r.core.begin(copy.epoch.clone(), stamp, now);
        let token = copy.epoch.token.clone();
        r.epoch = Some(copy.epoch);
        self.procs[p].beats = Some((Listener::new(&token, Side::Backup), 0, Side::Primary, token));
        self.note(p, "copied; the log begins");
    }

    fn pages(&mut self, p: usize, cursor: &mut u64, limit: usize) -> Vec<(u64, Vec<u8>)> {
        let mem = self.procs[p].machine.memory();
        let addresses = mem.take_dirty(DIRTY_MIGRATION, cursor, limit.min(1 << 16));
        addresses
            .into_iter()
            .map(|gpa| {
                let mut data = vec![0; 4096];
                let _ = mem.read(gpa, &mut data);
                (gpa, data)
            })
            .collect()
    }

    /// A message arrived on the channel.
    pub(super) fn message(&mut self, p: usize, message: Message) {
        let now = self.local(p);
        let stamp = self.procs[p].machine.stamp();
        match &mut self.procs[p].role {
            Role::Primary(r) => match message {
                Message::Ready => {
                    if let Some(epoch) = r.epoch.take() {
                        r.core.copying(now);
                        r.copy = Some(Copy { epoch, cursor: 0, round: 0 });
                        self.procs[p].machine.memory().set_all_dirty(DIRTY_MIGRATION);
                    }
                }
                Message::DiskDigests { digests, .. } => self.compare_digests(p, &digests),
                m => {
                    let actions = r.core.on_message(&m, stamp, now);
                    let applied = r.core.applied();
                    self.primary_actions(p, actions);
                    let ready = self.procs[p].reads.executed(applied);
                    self.enqueue(p, ready);
                }
            },
            Role::Backup(r) => {
                let late = matches!(r.core.phase(), backup::Phase::Arbitrating | backup::Phase::GoingLive);
                match r.core.on_message(&message, now) {
                    Ok(actions) => {
                        for action in actions {
                            if let backup::Action::Send(m) = action {
                                self.send(p, m);
                            }
                        }
                    }
                    Err(e) => self.violation(format!("the log was not usable: {e}")),
                }
                if late && self.options.mutation == Some(Mutation::AckAfterArbitration) {
                    if let Message::Log { first, count, .. } = message {
                        self.send(
                            p,
                            Message::Ack { received: first + count, applied: 0, executed: Stamp::default() },
                        );
                    }
                }
            }
            Role::Joining { epoch } => match message {
                Message::Config { epoch: e, config, .. } => {
                    *epoch = Some(e.clone());
                    self.send(p, Message::Alive);
                    self.procs[p].chain = postcard::from_bytes(&config).unwrap_or_default();
                    if !self.storage_ok(p) || !self.locks.sees_peer(&e, Side::Backup) {
                        return self.end(p, "the lock is not visible");
                    }
                    self.locks.claim(&e, Side::Backup);
                    if self.options.separate {
                        self.send_digests(p);
                    }
                    self.send(p, Message::Ready);
                }
                Message::Pages { pages } => {
                    for (gpa, data) in pages {
                        let _ = self.procs[p].machine.memory().write(gpa, &data);
                    }
                    self.send(p, Message::Alive);
                }
                Message::DiskChunks { chunks, .. } => self.store_sectors(p, &chunks),
                Message::State { stamp, state } => {
                    let Some(epoch) = epoch.take() else { return };
                    let loaded = MachineState::from_bytes(&state)
                        .map_err(|e| e.to_string())
                        .and_then(|s| self.procs[p].machine.load(&s).map_err(|e| e.to_string()));
                    if let Err(e) = loaded {
                        return self.violation(format!("the state is not loadable: {e}"));
                    }
                    let listener = Listener::new(&epoch.token, Side::Primary);
                    self.procs[p].beats = Some((listener, 0, Side::Backup, epoch.token.clone()));
                    self.procs[p].role = Role::Backup(Box::new(BackupRole {
                        core: Backup::new(TIMING, epoch.clone(), stamp, now),
                        epoch,
                        current: None,
                        outputs: VecDeque::new(),
                        made: 0,
                        counting: false,
                        last_ack: 0,
                        own: self.options.separate.then(OwnWrites::default),
                    }));
                    self.begin_own_writes(p);
                    self.send(p, Message::Loaded);
                }
                _ => {}
            },
            Role::Ended(_) => {}
        }
    }

    /// The channel to the peer ended.
    pub(super) fn disconnected(&mut self, p: usize, reason: &str) {
        let now = self.local(p);
        self.procs[p].conn = None;
        match &mut self.procs[p].role {
            Role::Primary(r) => {
                if r.core.phase() == primary::Phase::Unprotected {
                    return self.drop_pair(p);
                }
                let actions = r.core.on_disconnect(reason, now);
                self.primary_actions(p, actions);
            }
            Role::Backup(r) => {
                let actions = r.core.on_disconnect(reason, now);
                self.backup_actions(p, actions);
            }
            Role::Joining { .. } => self.end(p, reason),
            Role::Ended(_) => {}
        }
    }

    pub(super) fn tick(&mut self, p: usize) {
        let now = self.local(p);
        match &mut self.procs[p].role {
            Role::Primary(r) => {
                let actions = r.core.tick(now);
                self.primary_actions(p, actions);
            }
            Role::Backup(r) => {
                let actions = r.core.tick(now);
                self.backup_actions(p, actions);
            }
            _ => {}
        }
    }

    pub(super) fn heard(&mut self, p: usize, datagram: &[u8]) {
        let now = self.local(p);
        if !self.procs[p].beats.as_mut().is_some_and(|b| b.0.accept(datagram)) {
            return;
        }
        match &mut self.procs[p].role {
            Role::Primary(r) => r.core.heard(now),
            Role::Backup(r) => r.core.heard(now),
            _ => {}
        }
    }

    pub(super) fn beat(&mut self, p: usize) -> Option<Vec<u8>> {
        let (_, count, side, token) = self.procs[p].beats.as_mut()?;
        *count += 1;
        Some(Heartbeat { token: token.clone(), side: *side, count: *count }.encode())
    }

    pub(super) fn verdict(&mut self, p: usize, token: &str, verdict: Verdict) {
        match &mut self.procs[p].role {
            Role::Primary(r) if r.epoch.as_ref().is_some_and(|e| e.token == token) => {
                let actions = r.core.on_verdict(verdict);
                self.primary_actions(p, actions);
            }
            Role::Backup(r) if r.epoch.token == token => {
                let actions = r.core.on_verdict(verdict);
                self.backup_actions(p, actions);
            }
            _ => {}
        }
    }

    fn primary_actions(&mut self, p: usize, actions: Vec<primary::Action<Output>>) {
        use primary::Action;
        for action in actions {
            match action {
                Action::Release(outputs) => {
                    for output in outputs {
                        self.perform(p, output);
                    }
                }
                Action::Arbitrate(epoch) => {
                    self.hang_up(p);
                    self.arbitrate(p, epoch, Side::Primary);
                }
                Action::NowProtected => self.note(p, "protected"),
                Action::NowUnprotected { reason } => {
                    self.note(p, &format!("unprotected: {reason}"));
                    let epoch = self.primary(p).and_then(|r| r.epoch.clone());
                    if let Some(e) = epoch {
                        self.claim_machine(p, &e.token);
                    }
                    let copying = self.primary(p).is_some_and(|r| r.copy.is_some());
                    self.drop_pair(p);
                    let ready = self.procs[p].reads.close();
                    self.enqueue(p, ready);
                    if !copying {
                        self.alone(p);
                    }
                }
                Action::Send(m) => self.send(p, m),
                Action::Halt { reason, .. } => {
                    if self.options.mutation == Some(Mutation::IgnoreLoss) {
                        if let Some(r) = self.primary(p) {
                            r.core = Primary::new(TIMING);
                        }
                        continue;
                    }
                    self.procs[p].abandoned = true;
                    self.procs[p].queue.clear();
                    self.end(p, &reason);
                }
                Action::HashAgreed { .. } => self.report.hashes += 1,
            }
        }
    }

    /// Close the channel and stop the heartbeats.
    fn hang_up(&mut self, p: usize) {
        self.procs[p].beats = None;
        if let Some(conn) = self.procs[p].conn.take() {
            self.close(conn, p);
        }
    }

    /// The configuration was sent, and no backup became ready.
    pub(super) fn accept_timeout(&mut self, p: usize, token: &str) {
        let waits = self.primary(p).is_some_and(|r| {
            r.core.phase() == primary::Phase::Unprotected
                && r.copy.is_none()
                && r.epoch.as_ref().is_some_and(|e| e.token == token)
        });
        if waits {
            self.drop_pair(p);
        }
    }

    /// `drop_pair`
    fn drop_pair(&mut self, p: usize) {
        self.hang_up(p);
        let storage = self.storage_ok(p);
        let Some(r) = self.primary(p) else { return };
        let copy = r.copy.take();
        let epoch = r.epoch.take().or(copy.map(|c| c.epoch));
        r.busy = false;
        if let (Some(epoch), true) = (epoch, storage) {
            self.locks.retire(&epoch);
        }
    }

    fn backup_actions(&mut self, p: usize, actions: Vec<backup::Action>) {
        use backup::Action;
        for action in actions {
            match action {
                Action::Send(m) => self.send(p, m),
                Action::Arbitrate(epoch) => {
                    // With the rule to be broken, the channel must be there.
                    if self.options.mutation != Some(Mutation::AckAfterArbitration) {
                        self.hang_up(p);
                    }
                    self.arbitrate(p, epoch, Side::Backup);
                }
                Action::GoLive { reason } => self.note(p, &format!("takes over: {reason}")),
                Action::Halt { reason } => self.end(p, &reason),
                Action::Dismissed { reason, .. } => self.end(p, &reason),
            }
        }
    }

    /// The user wants a switch, or the backup to go.
    pub(super) fn wish(&mut self, p: usize, switch: bool) {
        let Some(r) = self.primary(p) else { return };
        if switch {
            if r.core.hand_over() {
                self.note(p, "hands over");
            }
            return;
        }
        let actions = r.core.dismiss("the user's wish", true);
        if !actions.is_empty() {
            // From here on nobody can carry on without this process, as the user wished.
            let token = self.primary(p).and_then(|r| r.epoch.as_ref().map(|e| e.token.clone()));
            self.dismissed.extend(token);
            self.note(p, "dismisses its backup");
        }
        self.primary_actions(p, actions);
    }

    /// One step of the backup's machine thread; false: nothing to do.
    fn follow(&mut self, p: usize) -> bool {
        let mutation = self.options.mutation;
        let chunk = 10 + self.rng.below(200);
        let now = self.now;
        let Some(f) = self.backup(p) else { return false };
        if f.current.is_none() {
            let skip = mutation == Some(Mutation::SkipReplay) && f.core.phase() == backup::Phase::GoingLive;
            while skip && f.core.done().is_some() {}
            let next = f.core.done();
            if next.is_none() {
                if f.core.is_ready_to_live() {
                    self.go_live(p);
                } else {
                    self.report_executed(p);
                }
                return false;
            }
            f.current = next;
        }
        let Some(entry) = f.current.take() else { return false };
        let done = disk_done(&entry).filter(|_| f.own.is_some());
        let busy = done.is_some_and(|id| f.own.as_ref().is_some_and(|o| o.is_busy(id)));
        let Some(mut entry) = self.fetched(p, entry) else { return false };
        let mut later = None;
        if busy && mutation != Some(Mutation::NoOwnWait) {
            let stamp = entry.stamp();
            later = Some(std::mem::replace(&mut entry, Entry::Horizon { stamp }));
        }
        let mut outputs = Vec::new();
        let followed = follow_entry(&mut self.procs[p].machine, &entry, chunk, &mut outputs);
        let waits = later.is_some() && matches!(followed, Followed::Done);
        if let Some(later) = later {
            entry = later;
        }
        let stamp = self.procs[p].machine.stamp();
        let Some(f) = self.backup(p) else { return false };
        let mut own_writes = Vec::new();
        for (_, output) in outputs {
            if let (Some(own), Output::Disk { .. }) = (&mut f.own, &output) {
                own_writes.extend(own.begin(output));
                continue;
            }
            if f.counting && is_held(&output) {
                f.made += 1;
                if !matches!(output, Output::Disk { .. }) {
                    f.outputs.push_back((f.made, output));
                }
            }
        }
        match followed {
            Followed::Done if waits => f.current = Some(entry),
            Followed::NotYet | Followed::Asked(_) | Followed::Stopped(_) => {
                f.core.executed(stamp);
                f.current = Some(entry);
            }
            Followed::Done => {
                f.core.executed(stamp);
                f.core.applied();
                if let (Some(own), Some(id)) = (&mut f.own, done) {
                    own.forget(id);
                }
                let released = f.core.released();
                while f.outputs.front().is_some_and(|(n, _)| *n <= released) {
                    f.outputs.pop_front();
                }
                match entry {
                    Entry::Protected { .. } => {
                        f.counting = true;
                        self.adopt(p);
                    }
                    Entry::Hash { stamp, .. } => self.send(p, Message::HashAgrees { stamp }),
                    _ => {}
                }
            }
            Followed::End(outcome) => self.violation(format!("the log ended the backup: {outcome:?}")),
            Followed::Differs(parts) => {
                self.violation(format!("the replicas differ at {stamp:?}: {}", parts.join(", ")));
            }
        }
        own_writes.into_iter().for_each(|o| self.perform(p, o));
        if let Some(f) = self.backup(p) {
            if now >= f.last_ack + 10 * MS {
                self.report_executed(p);
            }
        }
        !waits
    }

    fn report_executed(&mut self, p: usize) {
        let now = self.now;
        let Some(f) = self.backup(p) else { return };
        if now >= f.last_ack + 10 * MS
            && matches!(f.core.phase(), backup::Phase::Synchronizing | backup::Phase::Following)
        {
            f.last_ack = now;
            let ack = f.core.ack();
            self.send(p, ack);
        }
    }

    fn go_live(&mut self, p: usize) {
        if !self.options.separate && !self.storage_ok(p) {
            // The images cannot be opened: try again.
            return;
        }
        let mutation = self.options.mutation;
        let Some(f) = self.backup(p) else { return };
        let mut unsent: Vec<Output> = f.outputs.drain(..).map(|(_, o)| o).collect();
        f.core.live();
        let epoch = f.epoch.clone();
        let mut own = f.own.take();
        self.procs[p].beats = None;
        if let Some(conn) = self.procs[p].conn.take() {
            self.close(conn, p);
        }
        self.locks.retire(&epoch);
        self.claim_machine(p, &epoch.token);
        if self.options.overlay && !self.options.separate {
            let layer = self.disk.overlay();
            self.procs[p].chain.push(layer);
        }
        let mut pending = self.procs[p].machine.pending_disk();
        self.note(p, &format!("live; {} requests reissued, {} outputs resent", pending.len(), unsent.len()));
        if mutation == Some(Mutation::NoReissue) {
            pending.clear();
        }
        if mutation == Some(Mutation::NoResend) {
            unsent.clear();
        }
        self.procs[p].role = Role::Primary(Box::new(PrimaryRole::new(epoch.number)));
        self.alone(p);
        for output in pending.into_iter().chain(unsent) {
            match (&mut own, &output) {
                (Some(own), Output::Disk { id, op, .. }) if !matches!(op, DiskOp::Read { .. }) => {
                    let id = *id;
                    if own.take_ended(id).is_some() {
                        let done = Input::DiskDone { id, result: Ok(Vec::new()) };
                        self.input(p, MachineInput::Device(done));
                    } else if !own.is_busy(id) {
                        self.perform(p, output);
                    }
                }
                _ => self.perform(p, output),
            }
        }
        self.report.failovers += 1;
    }

    /// `begin_own_writes`
    fn begin_own_writes(&mut self, p: usize) {
        let pending = self.procs[p].machine.pending_disk();
        let Some(BackupRole { own: Some(own), .. }) = self.backup(p) else { return };
        let begun: Vec<Output> = pending.into_iter().filter_map(|o| own.begin(o)).collect();
        begun.into_iter().for_each(|o| self.perform(p, o));
    }

    /// A request of a backup's own disk ended.
    pub(super) fn own_write_ended(&mut self, p: usize, id: u64) {
        if let Some(BackupRole { own: Some(own), .. }) = self.backup(p) {
            own.ended(id, None);
        }
    }

    /// An entry whose contents are on the storage, with them; `None`: later. (Ahead of the execution, as the real one.)
    fn fetched(&mut self, p: usize, entry: Entry) -> Option<Entry> {
        if !matches!(entry, Entry::Fetch { .. }) {
            return Some(entry);
        }
        let read = self.fetch(p, entry.clone());
        if read.is_none() {
            self.backup(p)?.current = Some(entry);
        }
        read
    }

    /// The process ends.
    pub(super) fn end(&mut self, p: usize, reason: &str) {
        self.note(p, &format!("ends: {reason}"));
        self.procs[p].role = Role::Ended(reason.to_owned());
        self.procs[p].beats = None;
        self.procs[p].alive = false;
        if let Some(conn) = self.procs[p].conn.take() {
            self.close(conn, p);
        }
    }
}

/// The request that an entry completes.
fn disk_done(entry: &Entry) -> Option<u64> {
    let Entry::Input { payload, .. } = entry else { return None };
    match postcard::from_bytes(payload) {
        Ok(MachineInput::Device(Input::DiskDone { id, .. })) => Some(id),
        _ => None,
    }
}

/// A new process on `host`.
pub fn spawn(host: usize, clock: u64, role: Role) -> Option<Proc> {
    Some(Proc {
        host,
        alive: true,
        paused: false,
        machine: guest::machine()?,
        role,
        conn: None,
        beats: None,
        chain: vec![0],
        queue: VecDeque::new(),
        serving: false,
        abandoned: false,
        clock,
        reads: Reads::new(512),
        joined_generation: -1,
    })
}
