//! A debugger and the running machine.
//!
//! Looking, stopping and stepping change nothing that the machine is made of: a stop is what `stop` does. Changing
//! registers or memory is a change from outside of the input door, so it is refused wherever the door is logged.

use std::sync::mpsc::{channel, Sender};
use std::time::Duration;

use ftvm_accel::tcg::registers::View;
use ftvm_accel::DebugPoints;

use super::control::RunState;
use super::live::{Runtime, Sink};
use crate::machine::{DebugStop, MachineInput};

/// What a debugger hears.
pub struct News {
    /// The number of the `go` that it is about.
    pub run: u64,
    pub what: What,
}

/// What happened.
pub enum What {
    /// The machine stopped where the debugger wanted it to.
    Stopped(DebugStop),
    /// It was stopped by others, or by the debugger's interrupt.
    State(RunState),
    /// The program ends with this exit status; it waits a moment for the debugger to have been told.
    Ended(i32, Sender<()>),
}

/// Hears the news, on the machine thread.
pub type Listener = Box<dyn Fn(News) + Send>;

/// How to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    On,
    /// To the last stop before this one (of a replay).
    Back,
    /// One instruction back (of a replay).
    StepBack {
        cpu: usize,
    },
    /// One instruction of this processor.
    Step {
        cpu: usize,
        /// Without interrupts.
        hold_interrupts: bool,
    },
}

/// The debugger's side of the machine thread.
#[derive(Default)]
pub struct Debugger {
    listener: Option<Listener>,
    points: DebugPoints,
    run: u64,
    /// Why the machine is about to be stopped.
    reason: Option<DebugStop>,
}

impl Debugger {
    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.listener.is_some()
    }

    fn tell(&self, what: What) {
        if let Some(listener) = &self.listener {
            listener(News { run: self.run, what });
        }
    }

    /// The machine, which ran, is stopped.
    pub(super) fn stopped(&mut self, state: RunState) {
        match self.reason.take() {
            Some(stop) => self.tell(What::Stopped(stop)),
            // The machine goes on by itself behind these.
            None if matches!(state, RunState::SaveVm | RunState::RestoreVm | RunState::FinishMigrate) => {}
            None => self.tell(What::State(state)),
        }
    }

    /// The program ends.
    pub(super) fn ended(&self, status: i32) {
        if self.listener.is_some() {
            let (told, wait) = channel();
            self.tell(What::Ended(status, told));
            let _ = wait.recv_timeout(Duration::from_millis(300));
        }
    }
}

impl Runtime {
    /// A debugger comes: the machine stops.
    pub fn debug_attach(&mut self, listener: Listener) -> Result<(), String> {
        if self.is_following() {
            return Err("this is a backup, which does as its primary does: debug the primary".into());
        }
        if self.debugger.listener.is_some() {
            return Err("another debugger is connected".into());
        }
        if !self.machine.set_debug(Some(&DebugPoints::default())) {
            return Err("the accelerator of this machine cannot be debugged".into());
        }
        self.stop(RunState::Paused);
        if let Some(replay) = &mut self.replay {
            replay.remember();
        }
        self.debugger = Debugger { listener: Some(listener), ..Debugger::default() };
        Ok(())
    }

    /// The debugger leaves.
    pub fn debug_detach(&mut self, go_on: bool) {
        self.debugger = Debugger::default();
        self.machine.set_debug(None);
        if go_on && self.may_run().is_ok() {
            self.cont();
        }
    }

    /// Change where to stop. False: the processors cannot do this; then all is as it was.
    pub fn debug_points(&mut self, change: impl FnOnce(&mut DebugPoints)) -> bool {
        let old = self.debugger.points.clone();
        change(&mut self.debugger.points);
        let can = self.debug_arm();
        if !can {
            self.debugger.points = old;
            self.debug_arm();
        }
        can
    }

    /// Stop where the debugger wants to stop.
    pub(super) fn debug_arm(&mut self) -> bool {
        let points = self.debugger.is_there().then_some(&self.debugger.points);
        self.machine.set_debug(points)
    }

    /// Go on; news of this run have the number that is returned.
    pub fn debug_go(&mut self, go: Go) -> u64 {
        self.debugger.run += 1;
        if let Err(text) = self.may_run().map_err(str::to_owned).and_then(|()| self.fetch_images()) {
            log::warn!("the debugger cannot let the machine run: {text}");
            self.debugger.tell(What::State(self.shared.state()));
            return self.debugger.run;
        }
        let (step, hold) = match go {
            Go::On | Go::Back | Go::StepBack { .. } => (None, false),
            Go::Step { cpu, hold_interrupts } => (Some(cpu), hold_interrupts && !self.is_logged()),
        };
        self.machine.set_step(step);
        self.debug_points(|p| p.hold_interrupts = hold);
        let set_out = match go {
            Go::Back => self.replay_back(),
            Go::StepBack { cpu } => self.replay_step_back(cpu),
            _ => {
                self.replay_forward();
                Ok(())
            }
        };
        match set_out {
            Ok(()) => self.cont(),
            Err(text) => {
                log::warn!("gdb: {text}");
                self.debugger.tell(What::State(RunState::Paused));
            }
        }
        self.debugger.run
    }

    /// The debugger's interrupt key.
    pub fn debug_interrupt(&mut self) {
        if self.is_stopped() {
            self.debugger.tell(What::State(RunState::Paused));
        } else if self.replay.is_some() {
            self.replay_interrupt();
        } else {
            self.stop(RunState::Paused);
        }
    }

    /// The machine came to where the debugger wanted it to stop.
    pub fn debug_stop(&mut self, stop: DebugStop) {
        self.debugger.reason = Some(stop);
        let delivered = self.machine.delivered();
        if delivered > 0 && self.is_logged() && self.replay.is_none() {
            // It stopped behind a delivery, and whatever comes in while it stands still comes in there.
            self.input(MachineInput::Deliver(delivered));
        }
        self.stop(RunState::Debug);
    }

    /// Whether what comes in is logged, or from a log, so that it must all come by the input door.
    pub fn is_logged(&self) -> bool {
        self.replay.is_some() || self.ft.is_some() || !matches!(self.sink, Sink::None)
    }

    fn debug_change(&self) -> Result<(), String> {
        if self.is_logged() {
            return Err(
                "a debugger may not change a machine that is protected, recorded or replayed: the backup, or \
                        the replay, would not have the change"
                    .into(),
            );
        }
        Ok(())
    }

    /// Write RAM for the debugger, by a processor's linear addresses or physical ones.
    pub fn debug_write(&mut self, cpu: Option<usize>, start: u64, data: &[u8]) -> Result<(), String> {
        self.debug_change()?;
        match self.machine.write_as(cpu, start, data) {
            true => Ok(()),
            false => Err(format!("there is no RAM at {start:#x}")),
        }
    }

    /// Change registers for the debugger.
    pub fn debug_set_view(&mut self, cpu: usize, view: &View) -> Result<(), String> {
        self.debug_change()?;
        match self.machine.set_view(cpu, view) {
            true => Ok(()),
            false => Err("the registers of this processor cannot be changed".into()),
        }
    }
}
