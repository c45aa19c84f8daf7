//! The primary's side of a pair: it records, holds outputs by the Output Rule, and decides with the
//! lock when its backup is lost.

use std::collections::VecDeque;
use std::time::Duration;

use super::arbitration::Verdict;
use super::lag::LagControl;
use super::log::{Encoder, Entry};
use super::wire::{Epoch, Message};
use crate::machine::Stamp;

/// Where the primary stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No backup: outputs leave at once, nothing is logged.
    Unprotected,
    /// Memory is being copied to a backup: nothing is logged, outputs leave at once.
    Copying,
    /// The log is running, but the backup may not go live yet; outputs leave at once.
    Synchronizing,
    /// The Output Rule holds.
    Protected,
    /// The backup is suspected; outputs stay held until the lock has answered.
    Arbitrating,
    /// The backup won: this side must halt and let nothing out any more.
    Lost,
}

/// What the driver must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action<T> {
    /// Let these outputs leave, in order.
    Release(Vec<T>),
    /// Ask the lock (again, until it answers), and close the channel and stop the heartbeats: this pairing
    /// is over, and a peer that is alive must not wait for a side whose storage does not answer.
    Arbitrate(Epoch),
    /// The machine is protected now.
    NowProtected,
    /// The backup is gone for good; the machine goes on alone.
    NowUnprotected { reason: String },
    /// Halt at once: the other side is live (`planned`: as the user wished).
    Halt { reason: String, planned: bool },
    /// The backup ran to `stamp` with the same state.
    HashAgreed { stamp: Stamp },
    /// Say this to the backup.
    Send(Message),
}

struct Held<T> {
    /// Leaves when this many entries are acknowledged.
    needs: u64,
    item: T,
}

/// Times of the failure detector.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub heartbeat: Duration,
    pub timeout: Duration,
    pub max_lag: Duration,
}

/// The primary's state machine. `T` is an output. All times are since an arbitrary start.
pub struct Primary<T> {
    timing: Timing,
    phase: Phase,
    epoch: Option<Epoch>,
    encoder: Encoder,
    /// Entries written so far in this pairing.
    written: u64,
    acked: u64,
    /// Entries that the backup has executed.
    applied: u64,
    last_entry_horizon: Option<Stamp>,
    batch: Vec<u8>,
    /// Full batches: how many entries were written in all when each was closed.
    full: VecDeque<(u64, Vec<u8>)>,
    batch_first: u64,
    /// The machine is protected when this many entries are acknowledged.
    protected_at: Option<u64>,
    held: VecDeque<Held<T>>,
    released: u64,
    reported_released: u64,
    unacked: VecDeque<(u64, usize)>,
    unacked_bytes: usize,
    bytes_total: u64,
    last_heard: Duration,
    suspect_at: Option<Duration>,
    reason: String,
    lag: LagControl,
    handing_over: Option<HandOver>,
}

/// A planned switch under way: the machine stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HandOver {
    /// Until the backup has acknowledged all of the log and every output has left.
    Draining,
    /// The backup was told to go live. If it does not, the lock decides, as after any other loss.
    Told,
}

/// With this much of the log unacknowledged the primary must wait.
pub const LOG_BUFFER: usize = 64 << 20;
/// With this many outputs held the primary must wait.
pub const MAX_HELD: usize = 1 << 16;
/// A batch of this size is closed; with the largest entry it still fits a frame.
const BATCH: usize = 1 << 20;
/// Loading a state takes longer than a beat: how many timeouts a new backup may be silent.
const SYNC_PATIENCE: u32 = 5;

impl<T> Primary<T> {
    /// A primary without a backup.
    pub fn new(timing: Timing) -> Self {
        Primary {
            timing,
            phase: Phase::Unprotected,
            epoch: None,
            encoder: Encoder::default(),
            written: 0,
            acked: 0,
            applied: 0,
            last_entry_horizon: None,
            batch: Vec::new(),
            full: VecDeque::new(),
            batch_first: 0,
            protected_at: None,
            held: VecDeque::new(),
            released: 0,
            reported_released: 0,
            unacked: VecDeque::new(),
            unacked_bytes: 0,
            bytes_total: 0,
            last_heard: Duration::ZERO,
            suspect_at: None,
            reason: String::new(),
            lag: LagControl::new(timing.max_lag),
            handing_over: None,
        }
    }

    /// Where this side stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether inputs must be logged.
    pub fn is_logging(&self) -> bool {
        !matches!(self.phase, Phase::Unprotected | Phase::Copying | Phase::Lost)
    }

    /// Outputs waiting for an acknowledgement.
    pub fn held_count(&self) -> usize {
        self.held.len()
    }

    /// When the peer last showed a sign of life.
    pub fn last_heard(&self) -> Duration {
        self.last_heard
    }

    /// Bytes of log written in this pairing.
    pub fn log_bytes(&self) -> u64 {
        self.bytes_total
    }

    /// The lag and throttle of the pair.
    pub fn lag(&self) -> &LagControl {
        &self.lag
    }

    /// Whether the log buffer is full: the machine must not run on.
    pub fn must_wait(&self) -> bool {
        self.phase == Phase::Lost
            || self.handing_over.is_some()
            || self.is_logging() && (self.unacked_bytes > LOG_BUFFER || self.held.len() > MAX_HELD)
    }

    /// The user ends the pairing: the backup is asked to resign, and the machine goes on alone when it has promised
    /// never to go live (or is lost, and the lock says so). `again`: it is to join anew.
    pub fn dismiss(&mut self, reason: &str, again: bool) -> Vec<Action<T>> {
        match self.phase {
            Phase::Copying => self.go_alone(reason.to_owned()),
            Phase::Synchronizing | Phase::Protected => {
                vec![Action::Send(Message::Dismiss { reason: reason.to_owned(), again })]
            }
            _ => Vec::new(),
        }
    }

    /// The user wants the backup to take over. False: the machine is not protected now. From here on the machine
    /// stands still ([`Self::must_wait`]) until the backup is live or lost.
    pub fn hand_over(&mut self) -> bool {
        let able = self.phase == Phase::Protected && self.protected_at.is_none();
        if able {
            self.handing_over.get_or_insert(HandOver::Draining);
        }
        able
    }

    /// Memory is being copied to a backup, which shows signs of life meanwhile.
    pub fn copying(&mut self, now: Duration) {
        if self.phase == Phase::Unprotected {
            self.phase = Phase::Copying;
            self.last_heard = now;
        }
    }

    /// A backup was given the state at `start`: the log begins.
    pub fn begin(&mut self, epoch: Epoch, start: Stamp, now: Duration) {
        self.phase = Phase::Synchronizing;
        self.epoch = Some(epoch);
        self.encoder = Encoder::new(start);
        self.written = 0;
        self.acked = 0;
        self.applied = 0;
        self.batch.clear();
        self.full.clear();
        self.batch_first = 0;
        self.protected_at = None;
        self.released = 0;
        self.reported_released = 0;
        self.unacked.clear();
        self.unacked_bytes = 0;
        self.bytes_total = 0;
        self.last_heard = now;
        self.suspect_at = None;
        self.last_entry_horizon = None;
        self.lag = LagControl::new(self.timing.max_lag);
    }

    fn write(&mut self, entry: &Entry) {
        let before = self.batch.len();
        self.encoder.put(&mut self.batch, entry);
        let size = self.batch.len() - before;
        self.written += 1;
        self.unacked.push_back((self.written, size));
        self.unacked_bytes += size;
        self.bytes_total += size as u64;
        if self.batch.len() >= BATCH {
            self.full.push_back((self.written, std::mem::take(&mut self.batch)));
        }
        self.last_entry_horizon = match entry {
            Entry::Horizon { stamp } => Some(*stamp),
            _ => None,
        };
    }

    /// Log an input that is applied at `stamp`.
    pub fn input(&mut self, stamp: Stamp, payload: Vec<u8>) {
        if self.is_logging() {
            self.write(&Entry::Input { stamp, payload });
        }
    }

    /// Log an input whose contents the backup takes from the shared storage: the entry's number, from 1 on.
    pub fn fetch(&mut self, stamp: Stamp, payload: Vec<u8>) -> u64 {
        self.write(&Entry::Fetch { stamp, payload });
        self.written
    }

    /// Entries that the backup has executed.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Tell the backup that it may execute up to `stamp`.
    pub fn horizon(&mut self, stamp: Stamp, now: Duration) {
        if self.is_logging() && self.last_entry_horizon != Some(stamp) {
            self.write(&Entry::Horizon { stamp });
            self.lag.reached(stamp, now);
        }
    }

    /// Log the state hash at `stamp`.
    pub fn hash(&mut self, stamp: Stamp, payload: Vec<u8>) {
        if self.is_logging() {
            self.write(&Entry::Hash { stamp, payload });
        }
    }

    /// The machine ended.
    pub fn end(&mut self, stamp: Stamp, payload: Vec<u8>) {
        if self.is_logging() {
            self.write(&Entry::End { stamp, payload });
        }
    }

    /// The Output Rule: returns the output if it may leave now, else keeps it.
    pub fn output(&mut self, stamp: Stamp, item: T, now: Duration) -> Option<T> {
        match self.phase {
            Phase::Unprotected | Phase::Copying | Phase::Synchronizing => Some(item),
            Phase::Lost => None,
            Phase::Protected | Phase::Arbitrating => {
                self.horizon(stamp, now);
                self.held.push_back(Held { needs: self.written, item });
                None
            }
        }
    }

    /// The log written since the last call, as messages for the channel: call until there is none.
    pub fn take_batch(&mut self, stamp: Stamp) -> Option<Message> {
        if self.phase == Phase::Protected && self.released != self.reported_released && self.is_logging() {
            let count = self.released;
            self.reported_released = count;
            self.write(&Entry::Released { stamp, count });
        }
        let (end, entries) = match self.full.pop_front() {
            Some(full) => full,
            None if self.batch.is_empty() => return None,
            None => (self.written, std::mem::take(&mut self.batch)),
        };
        let first = self.batch_first;
        self.batch_first = end;
        Some(Message::Log { first, count: end - first, entries })
    }

    /// Whether [`Self::take_batch`] has entries to give (other than reports of releases).
    pub fn has_batch(&self) -> bool {
        !self.batch.is_empty() || !self.full.is_empty()
    }

    /// The peer showed a sign of life.
    pub fn heard(&mut self, now: Duration) {
        self.last_heard = self.last_heard.max(now);
    }

    /// A message came from the backup; `stamp` is where the machine is now.
    pub fn on_message(&mut self, message: &Message, stamp: Stamp, now: Duration) -> Vec<Action<T>> {
        self.heard(now);
        match message {
            Message::Loaded if self.phase == Phase::Synchronizing => {
                self.write(&Entry::Protected { stamp });
                self.phase = Phase::Protected;
                // Outputs wait from here on; the backup can take over when it has the entry.
                self.protected_at = Some(self.written);
                Vec::new()
            }
            Message::Ack { received, applied, executed } if self.is_logging() => {
                self.lag.executed(*executed, now);
                // An acknowledgement of what was never sent is a liar's: ignore what exceeds it.
                self.acked = self.acked.max((*received).min(self.batch_first));
                self.applied = self.applied.max((*applied).min(self.batch_first));
                while let Some((seq, size)) = self.unacked.front().copied() {
                    if seq > self.acked {
                        break;
                    }
                    self.unacked.pop_front();
                    self.unacked_bytes -= size;
                }
                if self.phase == Phase::Protected {
                    self.release_acked()
                } else {
                    Vec::new()
                }
            }
            Message::Resign { reason } if self.is_logging() => {
                // The backup promised never to go live, so no lock is needed.
                let reason = format!("the backup gave up: {reason}");
                self.go_alone(reason)
            }
            Message::HashAgrees { stamp } => vec![Action::HashAgreed { stamp: *stamp }],
            _ => Vec::new(),
        }
    }

    fn release_acked(&mut self) -> Vec<Action<T>> {
        let ready = self.held.iter().take_while(|h| h.needs <= self.acked).count();
        if ready == 0 {
            return Vec::new();
        }
        self.released += ready as u64;
        vec![Action::Release(self.held.drain(..ready).map(|h| h.item).collect())]
    }

    fn go_alone(&mut self, reason: String) -> Vec<Action<T>> {
        self.phase = Phase::Unprotected;
        self.epoch = None;
        // Nobody lags behind any more: a throttle left over would slow the machine for ever.
        self.lag = LagControl::new(self.timing.max_lag);
        self.batch.clear();
        self.full.clear();
        self.unacked.clear();
        self.unacked_bytes = 0;
        self.suspect_at = None;
        self.protected_at = None;
        self.handing_over = None;
        let held: Vec<T> = self.held.drain(..).map(|h| h.item).collect();
        let mut actions = Vec::new();
        if !held.is_empty() {
            actions.push(Action::Release(held));
        }
        actions.push(Action::NowUnprotected { reason });
        actions
    }

    /// The channel broke. The backup may live and go live: after a short grace for heartbeats, ask the lock.
    pub fn on_disconnect(&mut self, reason: &str, now: Duration) -> Vec<Action<T>> {
        match self.phase {
            Phase::Copying | Phase::Synchronizing => {
                self.go_alone(format!("the backup was lost while synchronizing: {reason}"))
            }
            Phase::Protected => {
                let at = now + self.timing.timeout.min(self.timing.heartbeat * 3);
                self.suspect_at = Some(self.suspect_at.map_or(at, |s| s.min(at)));
                self.reason = reason.to_owned();
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// Time passes: suspect a silent backup.
    pub fn tick(&mut self, now: Duration) -> Vec<Action<T>> {
        self.lag.tick(now);
        let silence = now.saturating_sub(self.last_heard);
        let silent = silence >= self.timing.timeout;
        let broken = self.suspect_at.is_some_and(|at| now >= at);
        match self.phase {
            Phase::Copying | Phase::Synchronizing if silence >= self.timing.timeout * SYNC_PATIENCE => {
                self.go_alone("the backup fell silent while synchronizing".to_owned())
            }
            Phase::Protected if silent || broken => {
                if !broken {
                    self.reason = format!("no sign of the backup for {} ms", self.timing.timeout.as_millis());
                }
                self.phase = Phase::Arbitrating;
                self.epoch.clone().map(Action::Arbitrate).into_iter().collect()
            }
            Phase::Protected if self.protected_at.is_some_and(|n| n <= self.acked) => {
                self.protected_at = None;
                vec![Action::NowProtected]
            }
            Phase::Protected
                if self.handing_over == Some(HandOver::Draining)
                    && self.held.is_empty()
                    && !self.has_batch()
                    && self.acked == self.written =>
            {
                self.handing_over = Some(HandOver::Told);
                vec![Action::Send(Message::HandOver { reason: "a planned switch".to_owned() })]
            }
            _ => Vec::new(),
        }
    }

    /// The lock answered.
    pub fn on_verdict(&mut self, verdict: Verdict) -> Vec<Action<T>> {
        if self.phase != Phase::Arbitrating {
            return Vec::new();
        }
        match verdict {
            Verdict::Won => {
                let reason = std::mem::take(&mut self.reason);
                self.go_alone(reason)
            }
            Verdict::Lost => {
                self.phase = Phase::Lost;
                self.held.clear();
                self.batch.clear();
                self.full.clear();
                let reason = "the backup has gone live and holds the lock".to_owned();
                vec![Action::Halt { reason, planned: self.handing_over == Some(HandOver::Told) }]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primary_that_goes_alone_is_not_throttled_by_its_lost_backup() {
        let ms = Duration::from_millis;
        let timing = Timing { heartbeat: ms(100), timeout: ms(1000), max_lag: ms(200) };
        let mut p: Primary<u32> = Primary::new(timing);
        let at = |n| Stamp { position: n, ns: n };
        p.begin(Epoch { number: 1, token: "t".into() }, at(0), ms(0));
        p.on_message(&Message::Loaded, at(0), ms(1));
        let mut asked = false;
        for t in 2..3000 {
            p.horizon(at(t), ms(t));
            while p.take_batch(at(t)).is_some() {}
            asked |= p.tick(ms(t)).iter().any(|a| matches!(a, Action::Arbitrate(_)));
        }
        assert!(asked && p.lag().throttle() > 0.5);
        p.on_verdict(Verdict::Won);
        for t in 3000..3100 {
            p.tick(ms(t));
        }
        assert_eq!(p.phase(), Phase::Unprotected);
        assert_eq!((p.lag().throttle(), p.lag().lag()), (0.0, Duration::ZERO));
    }
}
