//! Hosts, network, storage, client, faults and the promises that are checked.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ftvm_devices::{DiskOp, Input, Output};

use super::disks::OwnDisks;
use super::guest::{value, Frame};
use super::host::{spawn, PrimaryRole, Proc, Role};
use super::{Mutation, Options};
use crate::lockstep::wire::{Epoch, Message};
use crate::lockstep::{backup, primary, Side, Verdict};
use crate::machine::MachineInput;

/// Simulated time is in microseconds.
pub const MS: u64 = 1000;
pub const HOSTS: usize = 3;
/// Faults stop here, and everything is healed.
const HEALED: u64 = 1200 * MS;
/// Everything must be well here.
const END: u64 = 2000 * MS;
/// After this the client's progress counts.
const PROGRESS: u64 = 1700 * MS;

/// A small random generator (splitmix64).
pub struct Rng(u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What happened in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub failovers: u64,
    pub pairings: u64,
    pub faults: u64,
    pub replies: u64,
    pub hashes: u64,
    /// Disk reads that a backup did itself.
    pub fetches: u64,
    pub trace: Vec<String>,
}

/// The lock files of all pairings ([`crate::lockstep::FileLock`] as an atomic object).
#[derive(Default)]
pub struct Locks {
    claims: BTreeSet<(String, bool)>,
    winners: BTreeMap<String, Side>,
}

fn key(epoch: &Epoch, side: Side) -> (String, bool) {
    (epoch.token.clone(), side == Side::Backup)
}

impl Locks {
    pub fn claim(&mut self, epoch: &Epoch, side: Side) {
        self.claims.insert(key(epoch, side));
    }
    pub fn sees_peer(&self, epoch: &Epoch, side: Side) -> bool {
        self.claims.contains(&(epoch.token.clone(), side != Side::Backup))
    }
    fn try_win(&mut self, epoch: &Epoch, side: Side) -> Verdict {
        if self.claims.contains(&key(epoch, side)) {
            self.winners.entry(epoch.token.clone()).or_insert(side);
        }
        if self.winners.get(&epoch.token) != Some(&side) {
            return Verdict::Lost;
        }
        self.claims.remove(&(epoch.token.clone(), side != Side::Backup));
        Verdict::Won
    }
    pub fn retire(&mut self, epoch: &Epoch) {
        for side in [Side::Primary, Side::Backup] {
            self.claims.remove(&key(epoch, side));
        }
        self.winners.remove(&epoch.token);
    }
    pub fn could_win(&self, epoch: &Epoch, side: Side) -> bool {
        match self.winners.get(&epoch.token) {
            Some(winner) => *winner == side,
            None => self.claims.contains(&key(epoch, side)),
        }
    }
}

/// The shared disk: a base and the overlays made at go-lives.
pub struct Disk {
    layers: Vec<BTreeMap<u64, u64>>,
}

impl Disk {
    pub fn overlay(&mut self) -> usize {
        self.layers.push(BTreeMap::new());
        self.layers.len() - 1
    }
    pub fn read(&self, chain: &[usize], sector: u64) -> u64 {
        chain.iter().rev().find_map(|l| self.layers[*l].get(&sector)).copied().unwrap_or(0)
    }
}

struct Conn {
    ends: [usize; 2],
    /// Towards each end: messages in order; `None` is the end of the stream.
    queues: [VecDeque<Option<Message>>; 2],
    last: [u64; 2],
    open: [bool; 2],
}

#[derive(Clone, Debug)]
enum Event {
    Step(usize),
    Pulse(usize),
    Accept(usize, usize),
    Channel(usize, usize),
    Datagram(usize, usize, Vec<u8>),
    Land(usize, u64, DiskOp, bool),
    Done(usize, u64, Result<Vec<u8>, i32>),
    Lock(usize, Epoch, Side),
    Alone(usize),
    Verdict(usize, String, Verdict),
    JoinTimeout(usize),
    AcceptTimeout(usize, String),
    ToService(usize, Vec<u8>),
    ToClient(Vec<u8>),
    Client,
    Operator,
    Fault,
    FaultAt(usize),
    Resume(usize),
    Heal(usize, usize),
}

impl Event {
    /// The process on which it happens, if a stopped process delays it.
    fn proc(&self, conns: &[Conn]) -> Option<usize> {
        match self {
            Event::Step(p)
            | Event::Pulse(p)
            | Event::Accept(p, _)
            | Event::Datagram(_, p, _)
            | Event::Done(p, ..)
            | Event::Lock(p, ..)
            | Event::Alone(p)
            | Event::Verdict(p, ..)
            | Event::JoinTimeout(p)
            | Event::AcceptTimeout(p, _)
            | Event::ToService(p, _) => Some(*p),
            Event::Channel(c, end) => Some(conns[*c].ends[*end]),
            _ => None,
        }
    }
}

#[derive(Default)]
struct Client {
    next: u64,
    sent_at: u64,
    acked: BTreeMap<u64, u64>,
    notes: BTreeMap<u64, u64>,
    at_progress: u64,
    notes_at_progress: u64,
}

/// The simulated world.
pub struct World {
    pub now: u64,
    pub options: Options,
    pub rng: Rng,
    pub procs: Vec<Proc>,
    pub locks: Locks,
    pub disk: Disk,
    pub own: OwnDisks,
    /// The only host whose own disk has everything.
    pub newest: Option<usize>,
    pub report: Report,
    conns: Vec<Conn>,
    events: BTreeMap<(u64, u64), Event>,
    seq: u64,
    stalled: Vec<(usize, Event)>,
    /// Cuts between hosts; index `HOSTS` is the storage.
    cuts: BTreeSet<(usize, usize)>,
    client: Client,
    /// Who was made the only live side of a pairing.
    owners: BTreeMap<String, usize>,
    failure: Option<String>,
    /// Pairings that the user ended.
    pub dismissed: BTreeSet<String>,
}

/// Run one seed. An error is the first broken promise.
pub fn run(options: Options) -> Result<Report, (String, Report)> {
    let mut w = World {
        now: 0,
        options,
        rng: Rng(options.seed.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ 0x5DEE_CE66),
        procs: Vec::new(),
        locks: Locks::default(),
        disk: Disk { layers: vec![BTreeMap::new()] },
        own: OwnDisks::default(),
        newest: None,
        report: Report::default(),
        conns: Vec::new(),
        events: BTreeMap::new(),
        seq: 0,
        stalled: Vec::new(),
        cuts: BTreeSet::new(),
        client: Client { next: 1, ..Client::default() },
        owners: BTreeMap::new(),
        failure: None,
        dismissed: BTreeSet::new(),
    };
    w.start(0, Role::Primary(Box::new(PrimaryRole::new(0))));
    w.alone(0);
    w.at(0, Event::Operator);
    w.at(MS, Event::Client);
    w.at(30 * MS, Event::Fault);
    let mut healed = false;
    let mut measured = false;
    while let Some(((time, _), event)) = w.events.pop_first() {
        if time > END || w.failure.is_some() {
            break;
        }
        w.now = time;
        if !healed && time >= HEALED {
            healed = true;
            w.heal();
        }
        if !measured && time >= PROGRESS {
            measured = true;
            w.client.at_progress = w.client.next;
            w.client.notes_at_progress = w.client.notes.last_key_value().map_or(0, |(n, _)| *n);
        }
        w.dispatch(event);
    }
    if w.failure.is_none() {
        w.judge();
    }
    match w.failure.take() {
        Some(f) => Err((f, w.report)),
        None => Ok(w.report),
    }
}

impl World {
    fn at(&mut self, delay: u64, event: Event) {
        self.seq += 1;
        self.events.insert((self.now + delay, self.seq), event);
    }

    /// A line of the trace; a moment at which faults like to strike.
    pub fn note(&mut self, p: usize, text: &str) {
        self.say(&format!("process {p} on host {}: {text}", self.procs[p].host));
        if self.now < HEALED && self.rng.chance(12) {
            let delay = self.rng.below(3 * MS);
            self.at(delay, Event::FaultAt(p));
        }
    }

    fn say(&mut self, text: &str) {
        if self.options.trace {
            self.report.trace.push(format!("{:>9.3} ms  {text}", self.now as f64 / 1000.0));
        }
    }

    pub fn violation(&mut self, text: String) {
        self.say(&format!("VIOLATION: {text}"));
        self.failure.get_or_insert(format!("at {:.3} ms: {text}", self.now as f64 / 1000.0));
    }

    fn start(&mut self, host: usize, role: Role) -> Option<usize> {
        let clock = self.rng.below(1 << 40);
        let Some(proc) = spawn(host, clock, role) else {
            self.violation("no memory for a machine".into());
            return None;
        };
        self.procs.push(proc);
        let p = self.procs.len() - 1;
        self.at(0, Event::Step(p));
        self.at(1, Event::Pulse(p));
        Some(p)
    }

    pub fn is_healed(&self) -> bool {
        self.now >= HEALED
    }

    fn cut(&self, a: usize, b: usize) -> bool {
        a != b && self.cuts.contains(&(a.min(b), a.max(b)))
    }

    pub fn storage_ok(&self, p: usize) -> bool {
        !self.cut(self.procs[p].host, HOSTS)
    }

    /// This process is the only live side of a pairing now.
    pub fn claim_machine(&mut self, p: usize, token: &str) {
        let owner = *self.owners.entry(token.to_owned()).or_insert(p);
        if owner != p {
            self.violation(format!("processes {owner} and {p} are both live after pairing {token}"));
        }
    }

    // The network.

    pub fn send(&mut self, p: usize, message: Message) {
        let Some(c) = self.procs[p].conn else { return };
        let end = usize::from(self.conns[c].ends[0] == p);
        if self.conns[c].open[1 - end] {
            self.push(c, end, Some(message));
        }
    }

    fn push(&mut self, c: usize, end: usize, message: Option<Message>) {
        let delay = if self.rng.chance(3) { self.rng.range(MS, 30 * MS) } else { self.rng.range(50, 600) };
        let conn = &mut self.conns[c];
        let time = (self.now + delay).max(conn.last[end] + 1);
        conn.last[end] = time;
        conn.queues[end].push_back(message);
        let delay = time - self.now;
        self.at(delay, Event::Channel(c, end));
    }

    /// `p` closes its end.
    pub fn close(&mut self, c: usize, p: usize) {
        let end = usize::from(self.conns[c].ends[0] == p);
        self.conns[c].open[1 - end] = false;
        if self.conns[c].open[end] {
            self.push(c, end, None);
        }
    }

    /// The connection breaks; what is on the way is lost.
    pub fn reset(&mut self, c: usize) {
        for end in 0..2 {
            if self.conns[c].open[end] {
                let keep = self.rng.below(self.conns[c].queues[end].len() as u64 + 1) as usize;
                // The events of what is lost find an empty queue.
                self.conns[c].queues[end].truncate(keep);
                self.push(c, end, None);
            }
        }
    }

    fn channel(&mut self, c: usize, end: usize) {
        let [a, b] = self.conns[c].ends;
        if self.cut(self.procs[a].host, self.procs[b].host) {
            return self.at(MS, Event::Channel(c, end));
        }
        let p = self.conns[c].ends[end];
        let Some(message) = self.conns[c].queues[end].pop_front() else { return };
        if !self.conns[c].open[end] || self.procs[p].conn != Some(c) {
            return;
        }
        match message {
            Some(m) => self.message(p, m),
            None => {
                self.conns[c].open = [false, false];
                self.disconnected(p, "the peer closed the connection");
            }
        }
    }

    // Storage.

    pub fn perform(&mut self, p: usize, output: Output) {
        if !self.procs[p].alive || matches!(self.procs[p].role, Role::Ended(_)) {
            return self.violation(format!("process {p} let an output out after its end"));
        }
        match output {
            Output::Disk { id, op, .. } => {
                if !self.procs[p].abandoned {
                    self.submit(p, id, op);
                }
            }
            Output::NetTx { frame, .. } => {
                let delay = self.rng.range(50, 2 * MS);
                self.at(delay, Event::ToClient(frame));
            }
            Output::CharOut { bytes, .. } => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                self.violation(format!("process {p}: the guest says: {text}"));
            }
            Output::Event(_) => {}
        }
    }

    /// Say later that this side goes on alone.
    pub fn again_alone(&mut self, p: usize, delay: u64) {
        self.at(delay, Event::Alone(p));
    }

    pub fn serve(&mut self, p: usize) {
        if self.procs[p].serving {
            return;
        }
        let Some((id, op)) = self.procs[p].queue.pop_front() else { return };
        self.procs[p].serving = true;
        let time =
            if self.rng.chance(5) { self.rng.range(3 * MS, 40 * MS) } else { self.rng.range(100, 2 * MS) };
        let early =
            self.options.mutation == Some(Mutation::EarlyCompletion) && matches!(op, DiskOp::Write { .. });
        if early {
            self.at(50, Event::Done(p, id, Ok(Vec::new())));
        }
        self.at(time, Event::Land(p, id, op, !early));
    }

    /// A request reaches the storage; a stopped or dead process does not prevent it.
    fn land(&mut self, p: usize, id: u64, op: DiskOp, tell: bool) {
        if self.options.separate {
            // The image's lock is gone only when nothing of a dead process is under way.
            if self.procs[p].alive {
                let result = self.land_own(p, &op);
                if tell {
                    self.at(0, Event::Done(p, id, Ok(result)));
                }
            }
            return;
        }
        if !self.storage_ok(p) {
            return self.at(MS, Event::Land(p, id, op, tell));
        }
        if !self.procs[p].alive && self.rng.chance(50) {
            return;
        }
        let chain = &self.procs[p].chain;
        let result = match &op {
            DiskOp::Write { offset, data } => {
                if let Some(top) = chain.last() {
                    self.disk.layers[*top].insert(offset / 512, value(data));
                }
                Vec::new()
            }
            DiskOp::Read { offset, .. } => self.disk.read(chain, offset / 512).to_le_bytes().to_vec(),
            _ => Vec::new(),
        };
        if tell {
            self.at(0, Event::Done(p, id, Ok(result)));
        }
    }

    /// A backup that was sent the configuration must be ready in time.
    pub fn expect_ready(&mut self, p: usize, token: String) {
        self.at(150 * MS, Event::AcceptTimeout(p, token));
    }

    pub fn arbitrate(&mut self, p: usize, epoch: Epoch, side: Side) {
        self.note(p, "asks the lock");
        let delay = if self.rng.chance(20) { self.rng.below(60 * MS) } else { self.rng.range(100, 3 * MS) };
        self.at(delay, Event::Lock(p, epoch, side));
    }

    fn ask_lock(&mut self, p: usize, epoch: Epoch, side: Side) {
        let verdict = if self.storage_ok(p) {
            self.locks.try_win(&epoch, side)
        } else if self.options.mutation == Some(Mutation::LiveWithoutAnswer) {
            Verdict::Won
        } else {
            return self.at(5 * MS, Event::Lock(p, epoch, side));
        };
        let verdict = if self.options.mutation == Some(Mutation::BothWin) { Verdict::Won } else { verdict };
        self.note(p, &format!("the lock answers {verdict:?}"));
        let delay = if self.rng.chance(10) { self.rng.below(30 * MS) } else { self.rng.below(MS) };
        self.at(delay, Event::Verdict(p, epoch.token, verdict));
    }

    // Events.

    fn dispatch(&mut self, event: Event) {
        if let Some(p) = event.proc(&self.conns) {
            if !self.procs[p].alive {
                return;
            }
            if self.procs[p].paused {
                self.stalled.push((p, event));
                return;
            }
        }
        match event {
            Event::Step(p) => {
                self.step(p);
                let delay = self.rng.range(300, 1700);
                self.at(delay, Event::Step(p));
            }
            Event::Pulse(p) => {
                if let (Some(beat), Some(c)) = (self.beat(p), self.procs[p].conn) {
                    let to = self.conns[c].ends[usize::from(self.conns[c].ends[0] == p)];
                    if !self.rng.chance(10) {
                        let delay = self.rng.range(50, 2 * MS);
                        self.at(delay, Event::Datagram(p, to, beat));
                    }
                }
                self.tick(p);
                let delay = self.rng.range(3 * MS, 10 * MS);
                self.at(delay, Event::Pulse(p));
            }
            Event::Accept(p, c) => self.accept(p, c),
            Event::Channel(c, end) => self.channel(c, end),
            Event::Datagram(from, to, bytes) => {
                if !self.cut(self.procs[from].host, self.procs[to].host) {
                    self.heard(to, &bytes);
                }
            }
            Event::Land(p, id, op, tell) => self.land(p, id, op, tell),
            Event::Done(p, id, result) => {
                self.procs[p].serving = false;
                self.own_write_ended(p, id);
                self.input(p, MachineInput::Device(Input::DiskDone { id, result }));
                self.serve(p);
            }
            Event::Alone(p) => self.alone(p),
            Event::Lock(p, epoch, side) => self.ask_lock(p, epoch, side),
            Event::Verdict(p, token, verdict) => self.verdict(p, &token, verdict),
            Event::AcceptTimeout(p, token) => self.accept_timeout(p, &token),
            Event::JoinTimeout(p) => {
                if matches!(self.procs[p].role, Role::Joining { .. }) {
                    self.end(p, "joining took too long");
                }
            }
            Event::ToService(p, frame) => {
                self.input(p, MachineInput::Device(Input::NetRx { nic: 0, frame }));
            }
            Event::ToClient(frame) => self.client_hears(&frame),
            Event::Client => self.client_turn(),
            Event::Operator => self.operator(),
            Event::Fault => self.fault(),
            Event::FaultAt(p) => self.fault_at(p),
            Event::Resume(p) => self.resume(p),
            Event::Heal(a, b) => {
                self.say(&format!("{a} and {b} reach each other again"));
                self.cuts.remove(&(a, b));
            }
        }
    }

    // The client.

    fn client_turn(&mut self) {
        if self.client.sent_at == 0 || self.now >= self.client.sent_at + 25 * MS {
            self.client.sent_at = self.now;
            let frame = Frame::Request(self.client.next).bytes();
            for p in 0..self.procs.len() {
                if matches!(self.procs[p].role, Role::Primary(_)) {
                    let delay = self.rng.range(50, 2 * MS);
                    self.at(delay, Event::ToService(p, frame.clone()));
                }
            }
        }
        let delay = self.rng.range(500, 3 * MS);
        self.at(delay, Event::Client);
    }

    fn client_hears(&mut self, frame: &[u8]) {
        match Frame::read(frame) {
            Some(Frame::Reply { number, before, digest }) => {
                if self.client.acked.get(&number).is_some_and(|d| *d != digest) {
                    return self.violation(format!("the reply to request {number} is contradicted"));
                }
                if number > 1 && self.client.acked.get(&(number - 1)) != Some(&before) {
                    return self.violation(format!("request {} was acknowledged and is lost", number - 1));
                }
                if number > self.client.next {
                    return self.violation(format!("a reply to request {number}, which was never sent"));
                }
                if number == self.client.next {
                    self.client.acked.insert(number, digest);
                    self.client.next += 1;
                    self.client.sent_at = 0;
                    self.report.replies += 1;
                }
            }
            Some(Frame::Note { count, digest })
                if *self.client.notes.entry(count).or_insert(digest) != digest =>
            {
                self.violation(format!("note {count} is contradicted"));
            }
            _ => {}
        }
    }

    // People and faults.

    fn operator(&mut self) {
        let delay = self.rng.range(5 * MS, 30 * MS);
        self.at(delay, Event::Operator);
        for p in 0..self.procs.len() {
            if !self.procs[p].alive || self.procs[p].paused {
                continue;
            }
            if !self.is_healed() && self.rng.chance(8) {
                let switch = self.rng.chance(60);
                self.wish(p, switch);
            }
            let free =
                self.primary(p).is_some_and(|r| !r.busy && r.core.phase() == primary::Phase::Unprotected);
            let host = (self.procs[p].host + 1 + self.rng.below(HOSTS as u64 - 1) as usize) % HOSTS;
            // An image on a host of its own is locked as long as a process there lives.
            let held = self.options.separate && self.procs.iter().any(|q| q.alive && q.host == host);
            if !free || held || self.cut(self.procs[p].host, host) || self.rng.chance(30) {
                continue;
            }
            let Some(q) = self.start(host, Role::Joining { epoch: None }) else { return };
            self.conns.push(Conn { ends: [p, q], queues: Default::default(), last: [0; 2], open: [true; 2] });
            let c = self.conns.len() - 1;
            self.procs[q].conn = Some(c);
            self.report.pairings += 1;
            self.note(q, &format!("joins process {p}"));
            self.at(300, Event::Accept(p, c));
            self.at(150 * MS, Event::JoinTimeout(q));
        }
    }

    /// Whether somebody can carry on without `p`.
    fn dispensable(&self, p: usize) -> bool {
        self.procs.iter().enumerate().any(|(q, proc)| {
            q != p
                && proc.alive
                && match &proc.role {
                    Role::Primary(r) => match r.core.phase() {
                        primary::Phase::Unprotected | primary::Phase::Synchronizing => true,
                        primary::Phase::Lost => false,
                        _ => r.epoch.as_ref().is_some_and(|e| self.locks.could_win(e, Side::Primary)),
                    },
                    Role::Backup(r) => match r.core.phase() {
                        backup::Phase::Following | backup::Phase::Arbitrating => {
                            !self.dismissed.contains(&r.epoch.token)
                                && self.locks.could_win(&r.epoch, Side::Backup)
                        }
                        backup::Phase::GoingLive => true,
                        _ => false,
                    },
                    _ => false,
                }
        })
    }

    fn fault(&mut self) {
        if self.now >= HEALED {
            return;
        }
        let delay = self.rng.range(10 * MS, 220 * MS);
        self.at(delay, Event::Fault);
        let p = self.rng.below(self.procs.len() as u64) as usize;
        let p = (0..self.procs.len()).map(|i| (p + i) % self.procs.len()).find(|p| self.procs[*p].alive);
        if let Some(p) = p {
            self.fault_at(p);
        }
    }

    fn fault_at(&mut self, p: usize) {
        if !self.procs[p].alive || self.now >= HEALED {
            return;
        }
        self.report.faults += 1;
        let conn = self.procs[p].conn;
        match self.rng.below(8) {
            0..=2 if self.dispensable(p) => {
                let power = self.rng.chance(40);
                self.say(&format!(
                    "FAULT: process {p} is killed{}",
                    if power { " with its host" } else { "" }
                ));
                self.procs[p].alive = false;
                self.procs[p].queue.clear();
                if let (Some(c), false) = (conn, power) {
                    self.close(c, p);
                }
                self.procs[p].conn = None;
            }
            0..=3 => {
                let time =
                    if self.rng.chance(50) { self.rng.below(60 * MS) } else { self.rng.below(250 * MS) };
                self.say(&format!("FAULT: process {p} is stopped for {} ms", time / MS));
                self.procs[p].paused = true;
                self.at(time, Event::Resume(p));
            }
            4 => {
                if let Some(c) = conn {
                    self.say(&format!("FAULT: the connection of process {p} breaks"));
                    self.reset(c);
                }
            }
            kind => {
                let host = self.procs[p].host;
                let others: Vec<usize> = match kind {
                    5 => vec![HOSTS],
                    6 => (0..HOSTS).filter(|h| *h != host).collect(),
                    _ => (0..=HOSTS).filter(|h| *h != host).collect(),
                };
                let time =
                    if self.rng.chance(50) { self.rng.below(60 * MS) } else { self.rng.below(250 * MS) };
                self.say(&format!(
                    "FAULT: host {host} is cut from {others:?} (storage is {HOSTS}) for {} ms",
                    time / MS
                ));
                for other in others {
                    let pair = (host.min(other), host.max(other));
                    self.cuts.insert(pair);
                    self.at(time, Event::Heal(pair.0, pair.1));
                }
            }
        }
    }

    fn resume(&mut self, p: usize) {
        if !self.procs[p].alive || !std::mem::take(&mut self.procs[p].paused) {
            return;
        }
        self.say(&format!("process {p} goes on"));
        // Its threads wake up in any order.
        let (mine, rest) = std::mem::take(&mut self.stalled).into_iter().partition(|(q, _)| *q == p);
        self.stalled = rest;
        let mine: Vec<(usize, Event)> = mine;
        for (_, event) in mine {
            let delay = self.rng.below(500);
            self.at(delay, event);
        }
    }

    fn heal(&mut self) {
        self.say("everything is healed");
        self.cuts.clear();
        for p in 0..self.procs.len() {
            self.resume(p);
        }
    }

    /// At the end everything must be well again.
    fn judge(&mut self) {
        let live: Vec<usize> = (0..self.procs.len())
            .filter(|p| self.procs[*p].alive && matches!(self.procs[*p].role, Role::Primary(_)))
            .collect();
        if live.len() != 1 {
            return self.violation(format!("{} live machines in the end: {live:?}", live.len()));
        }
        let state = self.primary(live[0]).map(|r| (r.core.phase(), r.busy));
        if state.is_none_or(|(phase, _)| phase != primary::Phase::Protected) {
            return self.violation(format!("no new backup in the end: {state:?}"));
        }
        if self.client.next < self.client.at_progress + 5 {
            return self.violation("the service does not answer in the end".into());
        }
        for n in 1..=self.client.notes_at_progress {
            if !self.client.notes.contains_key(&n) {
                return self.violation(format!("note {n} was lost"));
            }
        }
    }
}
