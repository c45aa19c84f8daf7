//! The backup's side of a pair: it receives the log, executes behind the primary, and goes live
//! when the primary is lost and the lock is won.

use std::collections::VecDeque;
use std::time::Duration;

use super::arbitration::Verdict;
use super::log::{Decoder, Entry, LogError};
use super::primary::Timing;
use super::wire::{Epoch, Message};
use crate::machine::Stamp;

/// Where the backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Following, but the primary still lets outputs go unheld: may not go live.
    Synchronizing,
    /// Following; may go live.
    Following,
    /// The primary is suspected; the lock is being asked.
    Arbitrating,
    /// The lock is won: execute what has been received, then go live.
    GoingLive,
    /// Live: this side is the primary now.
    Live,
    /// Out: halted, resigned, or the machine ended.
    Out,
}

/// What the driver must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Send(Message),
    /// Ask the lock until it answers, and close the channel and stop the heartbeats: a primary that is
    /// alive must not hold its outputs for a side whose storage does not answer.
    Arbitrate(Epoch),
    /// The lock is won.
    GoLive {
        reason: String,
    },
    /// End: this side never goes live.
    Halt {
        reason: String,
    },
    /// As `Halt`, by the primary's wish; `again`: join it anew.
    Dismissed {
        reason: String,
        again: bool,
    },
}

/// What the primary asked for, done at the next tick.
#[derive(Clone, Debug)]
enum Wish {
    Dismiss { reason: String, again: bool },
    HandOver { reason: String },
}

/// The backup's state machine.
pub struct Backup {
    timing: Timing,
    phase: Phase,
    epoch: Epoch,
    decoder: Decoder,
    entries: VecDeque<Entry>,
    received: u64,
    applied: u64,
    /// What is to be taken from the shared storage, as received.
    fetches: Vec<Vec<u8>>,
    horizon: Stamp,
    executed: Stamp,
    released: u64,
    last_heard: Duration,
    suspect_at: Option<Duration>,
    reason: String,
    wish: Option<Wish>,
}

impl Backup {
    /// A backup that has loaded the state at `start`.
    pub fn new(timing: Timing, epoch: Epoch, start: Stamp, now: Duration) -> Self {
        Backup {
            timing,
            phase: Phase::Synchronizing,
            epoch,
            decoder: Decoder::new(start),
            entries: VecDeque::new(),
            received: 0,
            applied: 0,
            fetches: Vec::new(),
            horizon: start,
            executed: start,
            released: 0,
            last_heard: now,
            suspect_at: None,
            reason: String::new(),
            wish: None,
        }
    }

    /// Where this side stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How far the received log reaches.
    pub fn horizon(&self) -> Stamp {
        self.horizon
    }

    /// When the peer last showed a sign of life.
    pub fn last_heard(&self) -> Duration {
        self.last_heard
    }

    /// Entries received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// How many outputs of this pairing the primary reported as having left.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// The next entry to execute towards.
    pub fn next(&self) -> Option<&Entry> {
        self.entries.front()
    }

    /// The entry returned by [`Self::next`] is done.
    pub fn done(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front();
        match &entry {
            Some(Entry::Released { count, .. }) => self.released = self.released.max(*count),
            Some(Entry::End { .. }) => self.phase = Phase::Out,
            _ => {}
        }
        entry
    }

    /// Execution reached `stamp`.
    pub fn executed(&mut self, stamp: Stamp) {
        self.executed = stamp;
    }

    /// The entry that [`Self::done`] gave was executed.
    pub fn applied(&mut self) {
        self.applied += 1;
    }

    /// Payloads of the entries received since the last call whose contents are on the shared storage. The storage holds them
    /// from now until they are acknowledged as executed.
    pub fn take_fetches(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.fetches)
    }

    /// The acknowledgement to send now.
    pub fn ack(&self) -> Message {
        Message::Ack { received: self.received, applied: self.applied, executed: self.executed }
    }

    /// The peer showed a sign of life.
    pub fn heard(&mut self, now: Duration) {
        self.last_heard = self.last_heard.max(now);
    }

    /// A message came from the primary.
    pub fn on_message(&mut self, message: &Message, now: Duration) -> Result<Vec<Action>, LogError> {
        self.heard(now);
        match message {
            Message::Dismiss { reason, again } => {
                self.wish = Some(Wish::Dismiss { reason: reason.clone(), again: *again });
            }
            Message::HandOver { reason } => self.wish = Some(Wish::HandOver { reason: reason.clone() }),
            _ => {}
        }
        let Message::Log { first, count, entries } = message else { return Ok(Vec::new()) };
        if !matches!(self.phase, Phase::Synchronizing | Phase::Following) {
            // The lock is asked or won: what comes now must not be acknowledged, or the primary
            // would let outputs out that this side might not have executed.
            return Ok(Vec::new());
        }
        if *first != self.received {
            return Err(LogError::Truncated);
        }
        // All of a batch or nothing: an entry that was not kept must not change what this side may do.
        let mut decoder = self.decoder.clone();
        let new = decoder.take_batch(entries, *count)?;
        let mut horizon = self.horizon;
        for entry in &new {
            if entry.stamp() < horizon {
                return Err(LogError::Overflow);
            }
            horizon = entry.stamp();
        }
        self.decoder = decoder;
        self.horizon = horizon;
        if new.iter().any(|e| matches!(e, Entry::Protected { .. })) {
            self.phase = Phase::Following;
        }
        for entry in &new {
            if let Entry::Fetch { payload, .. } = entry {
                self.fetches.push(payload.clone());
            }
        }
        self.received += count;
        self.entries.extend(new);
        Ok(vec![Action::Send(self.ack())])
    }

    /// The channel broke.
    pub fn on_disconnect(&mut self, reason: &str, now: Duration) -> Vec<Action> {
        match self.phase {
            Phase::Synchronizing => {
                self.halt(format!("the primary was lost before the machine was protected: {reason}"))
            }
            Phase::Following if self.has_end() => Vec::new(),
            Phase::Following => {
                let at = now + self.timing.timeout.min(self.timing.heartbeat * 3);
                self.suspect_at = Some(self.suspect_at.map_or(at, |s| s.min(at)));
                self.reason = reason.to_owned();
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn has_end(&self) -> bool {
        self.entries.iter().any(|e| matches!(e, Entry::End { .. }))
    }

    fn halt(&mut self, reason: String) -> Vec<Action> {
        self.phase = Phase::Out;
        vec![Action::Halt { reason }]
    }

    /// This side gives up for good, for example because its state differs.
    pub fn resign(&mut self, reason: &str) -> Vec<Action> {
        if matches!(self.phase, Phase::Live | Phase::GoingLive | Phase::Out) {
            return Vec::new();
        }
        self.phase = Phase::Out;
        vec![
            Action::Send(Message::Resign { reason: reason.to_owned() }),
            Action::Halt { reason: reason.to_owned() },
        ]
    }

    /// Time passes: suspect a silent primary.
    pub fn tick(&mut self, now: Duration) -> Vec<Action> {
        let silent = now.saturating_sub(self.last_heard) >= self.timing.timeout;
        // After a break of the channel heartbeats alone cannot protect anything: the pairing is over.
        let broken = self.suspect_at.is_some_and(|at| now >= at);
        if matches!(self.phase, Phase::Synchronizing | Phase::Following) {
            match self.wish.take() {
                Some(Wish::Dismiss { reason, again }) => {
                    self.phase = Phase::Out;
                    let resign = Message::Resign { reason: reason.clone() };
                    return vec![Action::Send(resign), Action::Dismissed { reason, again }];
                }
                Some(Wish::HandOver { reason }) if self.phase == Phase::Following => {
                    self.reason = reason;
                    self.phase = Phase::Arbitrating;
                    return vec![Action::Arbitrate(self.epoch.clone())];
                }
                _ => {}
            }
        }
        match self.phase {
            Phase::Synchronizing if silent => {
                self.halt("the primary fell silent before the machine was protected".to_owned())
            }
            Phase::Following if (silent || broken) && !self.has_end() => {
                if !broken {
                    self.reason =
                        format!("no sign of the primary for {} ms", self.timing.timeout.as_millis());
                }
                self.phase = Phase::Arbitrating;
                vec![Action::Arbitrate(self.epoch.clone())]
            }
            _ => Vec::new(),
        }
    }

    /// The lock answered.
    pub fn on_verdict(&mut self, verdict: Verdict) -> Vec<Action> {
        if self.phase != Phase::Arbitrating {
            return Vec::new();
        }
        match verdict {
            Verdict::Won => {
                self.phase = Phase::GoingLive;
                vec![Action::GoLive { reason: std::mem::take(&mut self.reason) }]
            }
            Verdict::Lost => self.halt("the primary is alive and holds the lock".to_owned()),
        }
    }

    /// Whether everything received has been executed and the machine may go live.
    pub fn is_ready_to_live(&self) -> bool {
        self.phase == Phase::GoingLive && self.entries.is_empty()
    }

    /// The machine is live.
    pub fn live(&mut self) {
        self.phase = Phase::Live;
    }
}
