//! Replay of a recording, forwards and backwards.
//!
//! The machine goes as the recording says; what the user and a debugger stop is the replay, not the machine. It goes back by
//! a remembered moment ([`History`]) and forwards again from there.

use std::time::Instant;

use ftvm_devices::Output;

use super::control::RunState;
use super::history::{Along, History};
use super::live::{follow_entry, Followed, Runtime};
use super::record::Player;
use super::{Event, Outcome, Quit};
use crate::lockstep::log::Entry;
use crate::machine::{DebugStop, Reason};
use ftvm_accel::DebugPoints;

/// Instructions executed between two looks at events.
const SLICE: u64 = 1 << 20;
/// So far before the goal of a journey a moment is remembered, if the last one is further away: the next step back is
/// short then.
const CLOSE: u64 = 30_000;

/// A replay.
pub struct Replay {
    player: Player,
    file: String,
    started: Instant,
    hashes: u64,
    /// Pieces of console output so far, and how many have left.
    outputs: u64,
    shown: u64,
    held: bool,
    /// `replay-break`: the position where the replay stops.
    stop_at: Option<u64>,
    task: Task,
    history: History,
    /// Moments are remembered as the replay runs.
    remembers: bool,
}

/// What the replay is about.
#[derive(Clone, Copy, Debug)]
enum Task {
    /// On, to where somebody wants to stop.
    On,
    /// To a position, whatever lies on the way.
    To { position: u64, then: Arrival },
    /// To the last stop of the debugger's before a position.
    Search(Search),
    /// To the stop of this number from here.
    Find { left: u64, stop: DebugStop },
}

/// What is told on arrival.
#[derive(Clone, Copy, Debug)]
enum Arrival {
    State(RunState),
    Stop(DebugStop),
    /// The start of the recording is reached.
    Begin,
}

#[derive(Clone, Copy, Debug)]
struct Search {
    /// Where the search began.
    origin: u64,
    /// The end of the part of the recording that is looked at, which starts at moment `from`.
    end: u64,
    from: usize,
    /// Stops in that part so far, and the last one: its number, position and reason.
    seen: u64,
    last: Option<(u64, u64, DebugStop)>,
}

/// How far a slice came.
enum Slice {
    Going,
    Reached,
    Stopped(DebugStop),
    /// The recording's end.
    Ended,
    Over(Outcome),
}

impl Replay {
    /// A replay from the machine's start.
    pub fn new(machine: &crate::machine::Machine, player: Player, file: String, held: bool) -> Replay {
        let along = Along { log: player.mark(), hashes: 0, outputs: 0 };
        Replay {
            history: History::new(machine, along),
            player,
            file,
            started: Instant::now(),
            hashes: 0,
            outputs: 0,
            shown: 0,
            held,
            stop_at: None,
            task: Task::On,
            remembers: false,
        }
    }

    /// The recording's file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Whether it stands still.
    pub fn is_held(&self) -> bool {
        self.held
    }

    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Remember moments from now on.
    pub(super) fn remember(&mut self) {
        self.remembers = true;
    }
}

impl Runtime {
    /// The replay's step of the machine thread.
    pub(super) fn replay_step(&mut self) -> Option<Outcome> {
        while let Ok(event) = self.receiver.try_recv() {
            if let Some(outcome) = self.replay_event(event) {
                return Some(outcome);
            }
        }
        let replay = self.replay.as_ref()?;
        if replay.held {
            return match self.receiver.recv_timeout(super::live::NAP) {
                Ok(event) => self.replay_event(event),
                Err(_) => None,
            };
        }
        match replay.task {
            Task::On => self.replay_on(),
            Task::To { position, then } => self.replay_to(position, then),
            Task::Search(search) => self.replay_search(search),
            Task::Find { left, stop } => self.replay_find(left, stop),
        }
    }

    /// The world's inputs come from the recording: those of this host are dropped.
    fn replay_event(&mut self, event: Event) -> Option<Outcome> {
        match event {
            Event::Call(call) => {
                call(self);
                None
            }
            Event::Quit(quit)
                if quit == Quit::HostQmpQuit || self.replay.as_ref().is_some_and(|r| r.held) =>
            {
                Some(self.quit(quit))
            }
            Event::Quit(_) => Some(Outcome::Failed(format!(
                "the replay was ended at position {}",
                self.machine.stamp().position
            ))),
            Event::Fail(text) => Some(Outcome::Failed(text)),
            _ => None,
        }
    }

    /// Execute a slice, not past position `until`.
    fn replay_slice(&mut self, until: Option<u64>) -> Slice {
        let Runtime { machine, replay: Some(replay), outside, .. } = self else { return Slice::Ended };
        let position = machine.stamp().position;
        let room = until.map_or(SLICE, |u| u.saturating_sub(position));
        if room == 0 {
            return Slice::Reached;
        }
        let entry = match replay.player.peek() {
            Ok(Some(entry)) => entry,
            Ok(None) => {
                return Slice::Over(Outcome::Failed("the recording breaks off before its end".into()))
            }
            Err(e) => return Slice::Over(Outcome::Failed(e.to_string())),
        };
        let (hash, end) = (matches!(entry, Entry::Hash { .. }), matches!(entry, Entry::End { .. }));
        let mut outputs = Vec::new();
        let followed = follow_entry(machine, entry, room.min(SLICE), &mut outputs);
        for (_, output) in outputs {
            if matches!(output, Output::CharOut { .. }) {
                replay.outputs += 1;
                if replay.outputs > replay.shown {
                    replay.shown = replay.outputs;
                    outside.perform(output);
                }
            }
        }
        match followed {
            Followed::NotYet | Followed::Asked(_) => Slice::Going,
            Followed::Stopped(stop) => Slice::Stopped(stop),
            Followed::Done => {
                replay.hashes += u64::from(hash);
                // The end stays, to be met again.
                if end {
                    return Slice::Ended;
                }
                replay.player.done();
                Slice::Going
            }
            Followed::End(outcome) => Slice::Over(outcome),
            Followed::Differs(parts) => Slice::Over(Outcome::Failed(format!(
                "the replay differs from the recording at position {position}: {}",
                parts.join(", ")
            ))),
        }
    }

    fn replay_on(&mut self) -> Option<Outcome> {
        let until = self.replay.as_ref().and_then(|r| r.stop_at);
        let slice = self.replay_slice(until);
        let here = self.machine.stamp().position;
        let due = self.replay.as_ref().is_some_and(|r| r.remembers && r.history.is_due(here));
        if due && matches!(slice, Slice::Going) {
            self.replay_remember();
        }
        match slice {
            Slice::Going => None,
            Slice::Reached => {
                if let Some(replay) = &mut self.replay {
                    replay.stop_at = None;
                }
                self.replay_arrive(Arrival::State(RunState::Paused));
                None
            }
            Slice::Stopped(stop) => {
                self.replay_arrive(Arrival::Stop(stop));
                None
            }
            Slice::Ended => self.replay_end(),
            Slice::Over(outcome) => Some(outcome),
        }
    }

    /// At the recording's end the program ends, unless there is somebody who may want to go back.
    fn replay_end(&mut self) -> Option<Outcome> {
        let replay = self.replay.as_ref()?;
        let here = self.machine.stamp().position;
        if self.debugger.is_there() {
            let stop = DebugStop { cpu: self.machine.current_cpu(), reason: Reason::End };
            self.replay_arrive(Arrival::Stop(stop));
            return None;
        }
        eprintln!(
            "ftvm: replay ended at position {here} after {:.1} s, {} state hashes equal",
            replay.started.elapsed().as_secs_f64(),
            replay.hashes + 1
        );
        Some(Outcome::Done(0))
    }

    fn replay_remember(&mut self) {
        let Runtime { machine, replay: Some(replay), .. } = self else { return };
        let along = Along { log: replay.player.mark(), hashes: replay.hashes, outputs: replay.outputs };
        replay.history.remember(machine, along);
        let (moments, bytes) = replay.history.size();
        log::debug!("replay: {moments} moments in {} MiB", bytes >> 20);
    }

    /// Go to a remembered moment.
    fn replay_restore(&mut self, index: usize) -> Result<(), String> {
        let Runtime { machine, replay: Some(replay), .. } = self else { return Err("no replay".into()) };
        let along = replay.history.restore(machine, index).map_err(|e| e.to_string())?;
        replay.player.rewind(&along.log).map_err(|e| e.to_string())?;
        (replay.hashes, replay.outputs) = (along.hashes, along.outputs);
        Ok(())
    }

    /// The journey is over.
    fn replay_arrive(&mut self, arrival: Arrival) {
        if let Some(replay) = &mut self.replay {
            replay.task = Task::On;
        }
        self.debug_arm();
        match arrival {
            Arrival::State(state) => self.stop(state),
            Arrival::Stop(stop) => self.debug_stop(stop),
            Arrival::Begin => {
                self.debug_stop(DebugStop { cpu: self.machine.current_cpu(), reason: Reason::Begin });
            }
        }
    }

    /// Set out for a position: by a moment before it, if there is one that is nearer than the present.
    fn replay_set_out(&mut self, position: u64, then: Arrival) -> Result<(), String> {
        let here = self.machine.stamp().position;
        let replay = self.replay.as_mut().ok_or("this machine does not replay a recording")?;
        let from = replay.history.before(position);
        let far = replay.history.position(from);
        replay.task = Task::To { position, then };
        if position < here || far > here {
            self.replay_restore(from)?;
        }
        // Nothing stops it on the way.
        self.machine.set_step(None);
        self.machine.set_debug(Some(&DebugPoints::default()));
        Ok(())
    }

    fn replay_to(&mut self, position: u64, then: Arrival) -> Option<Outcome> {
        let here = self.machine.stamp().position;
        let close = position.saturating_sub(CLOSE);
        let until = if here < close { close } else { position };
        match self.replay_slice(Some(until)) {
            Slice::Reached if until < position => {
                self.replay_remember();
                None
            }
            Slice::Reached => {
                self.replay_arrive(then);
                None
            }
            Slice::Going | Slice::Stopped(_) => None,
            Slice::Ended => self.replay_end(),
            Slice::Over(outcome) => Some(outcome),
        }
    }

    /// Forwards from here.
    pub(super) fn replay_forward(&mut self) {
        if let Some(replay) = &mut self.replay {
            replay.task = Task::On;
        }
    }

    /// Begin to look for the debugger's last stop before here.
    pub(super) fn replay_back(&mut self) -> Result<(), String> {
        let origin = self.machine.stamp().position;
        let replay = self.replay.as_mut().ok_or("this machine does not replay a recording")?;
        let from = replay.history.before(origin.saturating_sub(1));
        replay.task = Task::Search(Search { origin, end: origin, from, seen: 0, last: None });
        self.replay_restore(from)?;
        self.debug_arm();
        Ok(())
    }

    /// One instruction back.
    pub(super) fn replay_step_back(&mut self, cpu: usize) -> Result<(), String> {
        let here = self.machine.stamp().position;
        let stop = DebugStop { cpu, reason: Reason::Step };
        match here {
            0 => self.replay_set_out(0, Arrival::Begin),
            _ => self.replay_set_out(here - 1, Arrival::Stop(stop)),
        }
    }

    /// Go to a position and stop there.
    pub fn replay_seek(&mut self, position: u64) -> Result<(), String> {
        self.replay_set_out(position, Arrival::State(RunState::Paused))?;
        if let Some(replay) = &mut self.replay {
            replay.remembers = true;
        }
        self.cont();
        Ok(())
    }

    /// Stop at a position that lies ahead; `None`: nowhere any more.
    pub fn replay_break(&mut self, position: Option<u64>) -> Result<(), String> {
        let here = self.machine.stamp().position;
        let replay = self.replay.as_mut().ok_or("this machine does not replay a recording")?;
        if position.is_some_and(|p| p < here) {
            return Err("cannot set breakpoint at the instruction in the past".into());
        }
        replay.stop_at = position;
        Ok(())
    }

    /// Break a journey off: back to where it began.
    pub(super) fn replay_interrupt(&mut self) {
        let origin = match self.replay.as_ref().map(|r| r.task) {
            Some(Task::Search(s)) => Some(s.origin),
            _ => None,
        };
        let set_out = origin.map(|o| self.replay_set_out(o, Arrival::State(RunState::Paused)));
        if !matches!(set_out, Some(Ok(()))) {
            self.replay_arrive(Arrival::State(RunState::Paused));
        }
    }

    fn replay_search(&mut self, search: Search) -> Option<Outcome> {
        let mut s = search;
        match self.replay_slice(Some(s.end)) {
            Slice::Stopped(stop) => {
                let here = self.machine.stamp().position;
                // A watchpoint's place, looking back, is before the instruction that made the access.
                let place = match stop.reason {
                    Reason::Watch(_) => here.saturating_sub(1),
                    _ => here,
                };
                s.seen += 1;
                if place < s.end {
                    s.last = Some((s.seen, place, stop));
                }
            }
            Slice::Going => {}
            Slice::Reached => return self.replay_searched(s),
            Slice::Ended => return self.replay_searched(s),
            Slice::Over(outcome) => return Some(outcome),
        }
        if let Some(replay) = &mut self.replay {
            replay.task = Task::Search(s);
        }
        None
    }

    /// A part of the recording was looked at.
    fn replay_searched(&mut self, s: Search) -> Option<Outcome> {
        let done = match s.last {
            Some((_, place, stop)) if matches!(stop.reason, Reason::Watch(_)) => {
                self.replay_set_out(place, Arrival::Stop(stop))
            }
            Some((number, _, stop)) => {
                let restored = self.replay_restore(s.from);
                if let Some(replay) = &mut self.replay {
                    replay.task = Task::Find { left: number, stop };
                }
                restored
            }
            None if s.from == 0 => self.replay_set_out(self.replay_start(), Arrival::Begin),
            None => {
                let (end, from) = (self.replay_position(s.from), s.from - 1);
                let restored = self.replay_restore(from);
                if let Some(replay) = &mut self.replay {
                    replay.task = Task::Search(Search { end, from, seen: 0, last: None, ..s });
                }
                restored
            }
        };
        done.err().map(Outcome::Failed)
    }

    fn replay_position(&self, moment: usize) -> u64 {
        self.replay.as_ref().map_or(0, |r| r.history.position(moment))
    }

    fn replay_start(&self) -> u64 {
        self.replay_position(0)
    }

    fn replay_find(&mut self, left: u64, stop: DebugStop) -> Option<Outcome> {
        match self.replay_slice(None) {
            Slice::Stopped(_) if left <= 1 => self.replay_arrive(Arrival::Stop(stop)),
            Slice::Stopped(_) => {
                if let Some(replay) = &mut self.replay {
                    replay.task = Task::Find { left: left - 1, stop };
                }
            }
            Slice::Going | Slice::Reached => {}
            Slice::Ended => return self.replay_end(),
            Slice::Over(outcome) => return Some(outcome),
        }
        None
    }
}
