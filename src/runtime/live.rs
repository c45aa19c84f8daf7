//! The machine thread's loop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ftvm_accel::GuestMemory;
use ftvm_devices::door::GuestEvent;
use ftvm_devices::{DiskOp, Input, MachineRequest, Output};
use serde_json::{json, Value};

use super::control::{RunState, Shared};
use super::debug::Debugger;
use super::disk_errors::DiskErrors;
use super::ft::{Fetch, FtSide};
use super::idle::Idle;
use super::pace::Pacer;
pub use super::record::Sink;
use super::replay::Replay;
use super::{Event, Events, Mailbox, Outcome, Quit};
use crate::assembly::Processors;
use crate::cli::config::Accel;
use crate::cli::ft::FtConfig;
use crate::host::Outside;
use crate::lockstep::log::Entry;
use crate::machine::{DebugStop, Machine, MachineInput, Stamp, StateHash, Stop};
use crate::migration::incoming::Incoming;
use crate::migration::outgoing::{self, Outgoing};
use crate::migration::snapshot;

/// How long the machine runs before it looks at its events.
const CHUNK: Duration = Duration::from_micros(500);
/// How often a recording gets a state hash, in virtual time.
const HASH_EVERY_NS: u64 = 1_000_000_000;
/// The longest sleep, so that the pair's business is looked at.
pub(super) const NAP: Duration = Duration::from_millis(20);

/// Options of the host that concern the run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    pub no_reboot: bool,
    pub no_shutdown: bool,
    /// A guest that says that it panicked is stopped.
    pub pause_on_panic: bool,
    /// Virtual time follows the host (`sleep=on`); off: idle time is skipped at once.
    pub sleep: bool,
    /// The rate of virtual time adapts to the host's speed.
    pub adaptive: bool,
}

/// The machine thread.
pub struct Runtime {
    pub machine: Machine,
    pub outside: Arc<Outside>,
    pub shared: Arc<Shared>,
    pub events: Events,
    pub receiver: Mailbox,
    pub options: RunOptions,
    pub sink: Sink,
    pub ft: Option<FtSide>,
    pub errors: DiskErrors,
    /// Makes this machine a primary while it runs (`ft-turn-on`).
    pub turn_on: Option<TurnOn>,
    /// Makes processors of another kind for this machine; `None`: it stays on those that it has.
    pub processors: Option<MakeProcessors>,
    /// What the machine was started on.
    pub home_accel: Accel,
    /// What a machine that moves needs of its host; `None`: it cannot move.
    pub home: Option<Home>,
    pub outgoing: Option<Box<Outgoing>>,
    /// A snapshot that is to be made or loaded.
    pub snapshotting: Option<Box<snapshot::Pending>>,
    pub next_migration: u64,
    /// The machine is to come from elsewhere.
    pub incoming: Option<Incoming>,
    /// It runs when it has come (no `-S`).
    pub autostart: bool,
    /// The images are closed, because another host may have them open.
    pub images_away: bool,
    pub debugger: Debugger,
    /// The machine does again what was recorded.
    pub replay: Option<Box<Replay>>,
    pacer: Pacer,
    idle: Idle,
    /// See [`Outside::news`].
    news: Arc<AtomicBool>,
    chunk: u64,
    next_hash_ns: u64,
    shutdown: bool,
}

/// What a machine that moves needs of its host.
pub struct Home {
    /// Lines that must be the same on the other host; see [`crate::migration::identity`].
    pub identity: String,
    pub firmware: Vec<u8>,
    /// Opens the images (and networks of cards that were plugged in) anew.
    pub open: OpenImages,
}

/// Opens a machine's images.
pub type OpenImages = Box<dyn Fn(&Arc<Outside>, &Events) -> Result<(), String> + Send>;

/// Makes processors of a kind for a machine with this memory.
pub type MakeProcessors = Box<dyn Fn(Accel, &GuestMemory) -> Result<Processors, String> + Send>;

/// Makes a running machine a primary.
pub type TurnOn = Arc<dyn Fn(FtConfig) -> Result<FtSide, String> + Send + Sync>;

/// Whether an output must wait for the backup: everything but reads of the disk.
pub fn is_held(output: &Output) -> bool {
    !matches!(output, Output::Disk { op: DiskOp::Read { .. }, .. })
}

impl Runtime {
    /// A machine thread around `machine`.
    pub fn new(
        machine: Machine,
        outside: Arc<Outside>,
        shared: Arc<Shared>,
        events: Events,
        receiver: Mailbox,
        options: RunOptions,
    ) -> Self {
        let pacer = Pacer::new(&machine, options.adaptive);
        let news = outside.news();
        Runtime {
            machine,
            outside,
            shared,
            events,
            receiver,
            options,
            sink: Sink::None,
            ft: None,
            errors: DiskErrors::default(),
            turn_on: None,
            processors: None,
            home_accel: Accel::Tcg,
            home: None,
            outgoing: None,
            snapshotting: None,
            next_migration: 0,
            incoming: None,
            autostart: true,
            images_away: false,
            debugger: Debugger::default(),
            replay: None,
            pacer,
            idle: Idle::default(),
            news,
            chunk: 20_000,
            next_hash_ns: 0,
            shutdown: false,
        }
    }

    /// Run to the end.
    pub fn run(&mut self) -> Outcome {
        loop {
            let outcome = if self.replay.is_some() {
                self.replay_step()
            } else if self.ft.as_ref().is_some_and(FtSide::is_following) {
                self.follow_step()
            } else {
                self.live_step()
            };
            if let Some(outcome) = outcome {
                self.debugger.ended(if let Outcome::Done(status) = &outcome { *status } else { 1 });
                self.finish();
                return outcome;
            }
        }
    }

    fn finish(&mut self) {
        let stamp = self.machine.stamp();
        if let Sink::File(recorder) = &mut self.sink {
            let hash = self.machine.state_hash();
            if let Err(e) = recorder.finish(stamp, &hash) {
                log::error!("{e}");
            }
        }
        if let Some(ft) = &mut self.ft {
            ft.end(stamp);
        }
        self.shared.exports.stop();
        self.shared.jobs.close();
        self.outside.close_disks();
        self.outside.drain_chars();
        self.shared.events.drain(Duration::from_secs(1));
    }

    /// Set state and tell monitors.
    pub fn set_running(&mut self, running: bool, state: RunState) {
        let was = self.shared.state();
        self.shared.set_state(if running { RunState::Running } else { state });
        if running && was != RunState::Running {
            self.shared.events.emit("RESUME", Value::Null);
        } else if !running && was == RunState::Running {
            self.shared.events.emit("STOP", Value::Null);
            self.debugger.stopped(state);
        }
    }

    /// Real time went by without the machine: virtual time goes on from where it is.
    pub fn restart_pace(&mut self) {
        self.machine.time_stood();
        self.pacer.restart(&self.machine);
    }

    /// Apply an input now, through the door.
    pub fn input(&mut self, input: MachineInput) {
        self.apply(input, None);
    }

    /// As [`Self::input`]; a backup takes the data of the read `fetch` from the shared storage itself.
    fn apply(&mut self, input: MachineInput, fetch: Option<(u32, Fetch)>) {
        let skips = self.options.sleep && !self.machine.is_hardware();
        if skips && !self.machine.is_paused() && self.machine.is_idle() {
            let now = self.pacer.host_ns();
            self.machine.skip_to(now);
            self.route_outputs();
        }
        let stamp = self.machine.stamp();
        let fetched = fetch.is_some_and(|(drive, fetch)| self.log_fetch(stamp, drive, &fetch));
        if !fetched {
            self.log_input(stamp, &input);
        }
        self.machine.apply(&input);
        if let MachineInput::Device(Input::DiskDone { id, result }) = input {
            if !fetched {
                self.outside.disk_ended(id);
            }
            if let Ok(data) = result {
                ftvm_block::buffers::give(data);
            }
        }
        self.route_outputs();
    }

    /// A read is done, and its bytes lie at these places in the image's file.
    fn disk_read(&mut self, drive: u32, id: u64, data: Vec<u8>, extents: Option<Vec<(u64, u64)>>) {
        let shared = extents.filter(|_| self.outside.may_share(drive, id));
        let fetch = shared.map(|extents| (drive, Fetch::new(id, drive, &data, extents)));
        self.apply(MachineInput::Device(Input::DiskDone { id, result: Ok(data) }), fetch);
    }

    fn log_fetch(&mut self, stamp: Stamp, drive: u32, fetch: &Fetch) -> bool {
        let number = self.ft.as_mut().and_then(|ft| ft.log_fetch(stamp, fetch));
        if let Some(number) = number {
            self.outside.read_logged(drive, fetch.id, number);
        }
        number.is_some()
    }

    fn log_input(&mut self, stamp: Stamp, input: &MachineInput) {
        let logging = self.ft.as_ref().is_some_and(FtSide::is_logging);
        if !logging && matches!(self.sink, Sink::None) {
            return;
        }
        let payload = postcard::to_stdvec(input).unwrap_or_default();
        if let Sink::File(recorder) = &mut self.sink {
            if let Err(e) = recorder.put(&Entry::Input { stamp, payload: payload.clone() }) {
                log::error!("recording stopped: {e}");
                self.sink = Sink::None;
            }
        }
        if let Some(ft) = &mut self.ft {
            ft.log_input(stamp, payload);
        }
    }

    fn route_outputs(&mut self) {
        for (stamp, output) in self.machine.take_outputs() {
            if let Output::Event(event) = &output {
                self.guest_event(event);
            }
            if let Some(ft) = &mut self.ft {
                ft.output(stamp, output, &self.outside);
            } else {
                self.outside.perform(output);
            }
        }
    }

    fn guest_event(&mut self, event: &GuestEvent) {
        match event {
            GuestEvent::RtcChange { offset } => {
                self.shared
                    .events
                    .emit("RTC_CHANGE", json!({"offset": offset, "qom-path": "/machine/unattached/rtc"}));
            }
            GuestEvent::Panicked => {
                let action = if self.options.pause_on_panic { "pause" } else { "run" };
                self.shared.events.emit("GUEST_PANICKED", json!({"action": action}));
                if self.options.pause_on_panic {
                    let _ = self.events.send(Event::Call(Box::new(|rt| {
                        rt.stop(RunState::GuestPanicked);
                    })));
                }
            }
            GuestEvent::CrashLoaded => self.shared.events.emit("GUEST_CRASHLOADED", json!({"action": "run"})),
            GuestEvent::NicRxFilterChanged { nic } => {
                self.shared
                    .events
                    .emit("NIC_RX_FILTER_CHANGED", json!({"path": format!("/machine/nic{nic}")}));
            }
            GuestEvent::DeviceDeleted { spec } => crate::monitor::devices::deleted(self, spec),
            GuestEvent::BalloonChange { actual } => {
                self.shared.events.emit("BALLOON_CHANGE", json!({"actual": actual}));
            }
            GuestEvent::PortChange { id, open } => {
                self.shared.events.emit("VSERPORT_CHANGE", json!({"id": id, "open": open}));
            }
            GuestEvent::TrayMoved { device, open } => {
                self.shared.backends().tray_moved(device, *open);
                self.shared
                    .events
                    .emit("DEVICE_TRAY_MOVED", json!({"device": "", "id": device, "tray-open": open}));
            }
        }
    }

    /// Handle an event; an outcome ends the run.
    fn event(&mut self, event: Event) -> Option<Outcome> {
        match event {
            Event::Input(input) => {
                if matches!(input, MachineInput::Device(Input::NetRx { .. })) && self.machine.is_paused() {
                    return None;
                }
                self.input(input);
                None
            }
            Event::DiskRead { drive, id, data, extents } => {
                self.disk_read(drive, id, data, extents);
                None
            }
            Event::DiskFailed(failure) => {
                self.disk_failed(failure);
                None
            }
            Event::Call(call) => {
                call(self);
                None
            }
            Event::Quit(quit) => Some(self.quit(quit)),
            Event::Fail(text) => Some(Outcome::Failed(text)),
            Event::Ft(event) => super::ft::on_event(self, event),
            Event::Woken => None,
        }
    }

    /// Open the images again that were given away.
    pub fn fetch_images(&mut self) -> Result<(), String> {
        if !self.images_away {
            return Ok(());
        }
        let home = self.home.as_ref().ok_or("this machine cannot move")?;
        (home.open)(&self.outside, &self.events)?;
        self.images_away = false;
        Ok(())
    }

    /// Stop the processors.
    pub fn stop(&mut self, state: RunState) {
        if let Some(replay) = &mut self.replay {
            if !replay.is_held() {
                replay.hold(true);
                self.set_running(false, state);
            }
        } else if !self.machine.is_paused() {
            self.input(MachineInput::Paused(true));
            self.set_running(false, state);
        }
    }

    /// Whether the user, or a debugger, has stopped the machine, or its replay.
    pub fn is_stopped(&self) -> bool {
        self.replay.as_ref().map_or(self.machine.is_paused(), |r| r.is_held())
    }

    /// Whether the processors may be let run, or what is in the way.
    pub fn may_run(&self) -> Result<(), &'static str> {
        match self.shared.state() {
            RunState::Shutdown | RunState::InternalError => Err("Resetting the Virtual Machine is required"),
            RunState::InMigrate => Err("the machine has not come yet"),
            RunState::FinishMigrate => Err("Migration is not finalized yet"),
            _ => Ok(()),
        }
    }

    /// Let the processors run (on).
    pub fn cont(&mut self) {
        if let Some(replay) = &mut self.replay {
            if replay.is_held() {
                replay.hold(false);
                self.set_running(true, RunState::Running);
            }
        } else if self.machine.is_paused() {
            self.retry_failed();
            self.input(MachineInput::Paused(false));
            self.shutdown = false;
            self.restart_pace();
            self.set_running(true, RunState::Running);
        }
    }

    /// Move the machine to another kind of processors, while it runs. Its clients notice a short pause.
    pub fn change_processors(&mut self, accel: Accel) -> Result<(), String> {
        if self.shared.accel() == accel {
            return Ok(());
        }
        let make = self.processors.as_ref().ok_or("this machine stays on the accelerator that it has")?;
        let start = Instant::now();
        let (cpus, kvm) = make(accel, self.machine.memory())?;
        let made = start.elapsed();
        self.machine.replace_processors(cpus, kvm)?;
        self.debug_arm();
        self.shared.set_accel(accel, self.machine.thread_ids());
        self.restart_pace();
        log::info!(
            "the machine has moved to {} in {:.1} ms, after {:.1} ms in which it ran on",
            accel.name(),
            (start.elapsed() - made).as_secs_f64() * 1e3,
            made.as_secs_f64() * 1e3,
        );
        Ok(())
    }

    /// The reset button.
    pub fn reset(&mut self) {
        self.input(MachineInput::Reset);
        if self.shared.state() != RunState::Running && self.shared.state() != RunState::Prelaunch {
            self.shared.set_state(RunState::Paused);
        }
        self.shared.events.emit("RESET", json!({"guest": false, "reason": "host-qmp-system-reset"}));
    }

    /// The power button.
    pub fn powerdown(&mut self) {
        self.input(MachineInput::Device(Input::Powerdown));
        self.shared.events.emit("POWERDOWN", Value::Null);
    }

    /// Whether this side is a backup that follows its primary's log.
    pub fn is_following(&self) -> bool {
        self.ft.as_ref().is_some_and(FtSide::is_following)
    }

    pub(super) fn quit(&mut self, quit: Quit) -> Outcome {
        let (guest, reason, status) = match quit {
            Quit::HostSignal => (false, "host-signal", 0),
            Quit::HostQmpQuit => (false, "host-qmp-quit", 0),
            Quit::GuestShutdown => (true, "guest-shutdown", 0),
            Quit::GuestReset => (true, "guest-reset", 0),
            Quit::GuestExit(status) => (true, "guest-shutdown", status),
        };
        self.shared.events.emit("SHUTDOWN", json!({"guest": guest, "reason": reason}));
        Outcome::Done(status)
    }

    /// Do what the guest asks of the machine as a whole.
    pub fn request(&mut self, request: MachineRequest) -> Option<Outcome> {
        log::debug!("the guest asks for {request:?}");
        match request {
            MachineRequest::Reset if self.options.no_reboot => Some(self.quit(Quit::GuestReset)),
            MachineRequest::Reset => {
                self.input(MachineInput::Reset);
                self.shared.events.emit("RESET", json!({"guest": true, "reason": "guest-reset"}));
                None
            }
            MachineRequest::Poweroff if self.options.no_shutdown => {
                if !self.shutdown {
                    self.shutdown = true;
                    // Who asks for the status on this event must find the new one.
                    let ran = self.shared.state() == RunState::Running;
                    self.shared.set_state(RunState::Shutdown);
                    self.shared.events.emit("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}));
                    self.input(MachineInput::Paused(true));
                    self.set_running(false, RunState::Shutdown);
                    if ran {
                        self.shared.events.emit("STOP", Value::Null);
                        self.debugger.stopped(RunState::Shutdown);
                    }
                }
                None
            }
            MachineRequest::Poweroff => Some(self.quit(Quit::GuestShutdown)),
            MachineRequest::Exit(status) => Some(self.quit(Quit::GuestExit(status))),
            MachineRequest::Suspend => {
                log::warn!("the guest asks for suspend to RAM, which this machine does not offer");
                None
            }
        }
    }

    fn drain(&mut self) -> Option<Outcome> {
        while let Ok(event) = self.receiver.try_recv() {
            if let Some(outcome) = self.event(event) {
                return Some(outcome);
            }
        }
        None
    }

    /// How long the thread may sleep when the machine has nothing to do.
    fn nap(&self) -> Duration {
        match &self.outgoing {
            Some(out) if out.is_hungry() => Duration::ZERO,
            Some(out) => out.nap(),
            None => NAP,
        }
    }

    fn sleep(&mut self, at_most: Duration) -> Option<Outcome> {
        if let Some(ft) = &mut self.ft {
            ft.flush(self.machine.stamp());
        }
        let came = self.idle.wait(&self.receiver, &self.outside, at_most);
        self.waited(came)
    }

    fn waited(&mut self, came: Result<Event, RecvTimeoutError>) -> Option<Outcome> {
        match came {
            Ok(event) => self.event(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Outcome::Failed("the program's threads ended".into()))
            }
        }
    }

    fn live_step(&mut self) -> Option<Outcome> {
        self.news.store(false, Ordering::Relaxed);
        if let Some(outcome) = self.drain() {
            return Some(outcome);
        }
        if let Some(outcome) = super::ft::live_work(self) {
            return Some(outcome);
        }
        outgoing::work(self);
        snapshot::work(self);
        if self.ft.as_ref().is_some_and(FtSide::is_following) {
            return None;
        }
        if self.machine.is_paused() || self.ft.as_ref().is_some_and(FtSide::must_wait) {
            let outcome = self.sleep(self.nap());
            self.restart_pace();
            return outcome;
        }
        if self.machine.is_hardware() {
            return self.hardware_step();
        }
        let started = Instant::now();
        let before = self.machine.stamp().position;
        let stop = self.machine.run_until(self.chunk, &self.news);
        let ran = self.machine.stamp().position - before;
        let took = started.elapsed();
        self.route_outputs();
        self.hash_point();
        self.idle.computed(&self.outside, stop == Stop::Limit);
        match stop {
            Stop::Limit | Stop::Output | Stop::News => {
                if stop == Stop::Limit {
                    // Aim the chunk at its time.
                    let scale = CHUNK.as_secs_f64() / took.as_secs_f64().max(1e-6);
                    self.chunk =
                        ((self.chunk as f64 * scale.clamp(0.5, 2.0)) as u64).clamp(1_000, 10_000_000);
                }
                if self.options.sleep {
                    let (adjust, ahead) = self.pacer.executed(&self.machine, ran, took);
                    if let Some(adjust) = adjust {
                        self.input(MachineInput::Clock(adjust));
                    }
                    if ahead > Duration::ZERO {
                        return self.sleep(ahead.min(NAP));
                    }
                }
                if let Some(ft) = &mut self.ft {
                    ft.flush(self.machine.stamp());
                }
                let ft = self.ft.as_ref().map_or(0.0, FtSide::throttle);
                let throttle = self.outgoing.as_ref().map_or(ft, |o| o.throttle());
                if throttle > 0.0 {
                    let nap = took.mul_f64((throttle / (1.0 - throttle)).min(100.0));
                    return self.sleep(nap);
                }
                None
            }
            Stop::Idle { next } => {
                if !self.options.sleep {
                    if let Some(next) = next {
                        self.machine.skip_to(next);
                        self.route_outputs();
                        return None;
                    }
                }
                let wait = next.map_or(NAP, |n| self.pacer.until(n)).min(self.nap());
                let outcome = if wait.is_zero() { None } else { self.sleep(wait) };
                if self.machine.is_idle() && !self.machine.is_paused() && self.options.sleep {
                    let now = self.pacer.host_ns();
                    self.machine.skip_to(next.map_or(now, |n| n.min(now)));
                    self.route_outputs();
                }
                outcome
            }
            Stop::Request(request) => self.request(request),
            Stop::Debug(stop) => {
                self.debug_stop(stop);
                None
            }
            Stop::Dead => {
                self.set_running(false, RunState::InternalError);
                Some(Outcome::Failed("the processor cannot go on (see the log)".into()))
            }
        }
    }

    /// The processors run by themselves: look after the devices, and wait.
    fn hardware_step(&mut self) -> Option<Outcome> {
        self.idle.leave(&self.outside);
        let stop = self.machine.attend();
        self.route_outputs();
        match stop {
            Stop::Limit => {
                let throttle = self.outgoing.as_ref().map_or(0.0, |o| o.throttle());
                if throttle > 0.0 {
                    self.machine.still();
                    let rest = CHUNK.mul_f64((throttle / (1.0 - throttle)).min(100.0));
                    if let Some(outcome) = self.sleep(rest) {
                        return Some(outcome);
                    }
                }
                let receiver = &self.receiver;
                let at_most = if throttle > 0.0 { CHUNK } else { self.nap() };
                let came = self.machine.lend(at_most, |wait| receiver.recv_timeout(wait));
                self.waited(came)
            }
            Stop::Request(request) => self.request(request),
            Stop::Dead => {
                let text = self.machine.take_trouble().unwrap_or_default();
                eprintln!("{text}");
                self.stop(RunState::InternalError);
                eprint!("{}", self.machine.describe_cpus());
                None
            }
            Stop::Debug(stop) => {
                self.debug_stop(stop);
                None
            }
            Stop::Output | Stop::News | Stop::Idle { .. } => None,
        }
    }

    /// Put a state hash into the recording now and then.
    fn hash_point(&mut self) {
        let stamp = self.machine.stamp();
        // Where a debugger stopped behind a delivery no replay compares.
        if stamp.ns < self.next_hash_ns || self.machine.delivered() > 0 {
            return;
        }
        self.next_hash_ns = stamp.ns + HASH_EVERY_NS;
        if let Sink::File(recorder) = &mut self.sink {
            let payload = postcard::to_stdvec(&self.machine.state_hash()).unwrap_or_default();
            if let Err(e) = recorder.put(&Entry::Hash { stamp, payload }) {
                log::error!("recording stopped: {e}");
                self.sink = Sink::None;
            }
        }
        if let Some(ft) = &mut self.ft {
            if ft.is_logging() {
                let hash = self.machine.state_hash();
                ft.log_hash(stamp, &hash);
            }
        }
    }

    /// A backup's step: execute towards the next entry of the log.
    fn follow_step(&mut self) -> Option<Outcome> {
        self.idle.leave(&self.outside);
        if let Some(outcome) = self.drain_following() {
            return Some(outcome);
        }
        super::ft::follow(self)
    }

    fn drain_following(&mut self) -> Option<Outcome> {
        while let Ok(event) = self.receiver.try_recv() {
            if let Some(outcome) = self.follow_event(event) {
                return Some(outcome);
            }
        }
        None
    }

    /// An event while following: the world's inputs come from the log, so those of this host are dropped.
    pub fn follow_event(&mut self, event: Event) -> Option<Outcome> {
        match event {
            // Of its own disks, where they are separate.
            Event::DiskFailed(failure) => super::ft::own_write_ended(self, failure.id, Some(failure)),
            Event::Input(MachineInput::Device(Input::DiskDone { id, .. })) => {
                super::ft::own_write_ended(self, id, None)
            }
            Event::Input(_) | Event::DiskRead { .. } | Event::Woken => None,
            Event::Call(call) => {
                self.shared.backends().take_note(self.machine.note());
                call(self);
                None
            }
            Event::Fail(text) => Some(Outcome::Failed(text)),
            Event::Quit(quit) => {
                if let Some(ft) = &mut self.ft {
                    ft.resign("ended by its user");
                }
                Some(self.quit(quit))
            }
            Event::Ft(event) => super::ft::on_event(self, event),
        }
    }
}

/// Execute towards an entry of a log and do it. Returns whether it is done, or an outcome.
pub enum Followed {
    /// The entry's stamp is not reached yet.
    NotYet,
    /// As `NotYet`, and the guest asked this; its consequence (a reset, the end) follows in the log.
    Asked(MachineRequest),
    /// As `NotYet`, and a debugger wanted to stop here.
    Stopped(DebugStop),
    /// The entry is done.
    Done,
    /// The guest or the log says that this is the end.
    End(Outcome),
    /// The state differs from the recorded one in these parts.
    Differs(Vec<String>),
}

/// One step towards `entry`: at most `limit` instructions. Outputs go to `outputs`.
pub fn follow_entry(
    machine: &mut Machine,
    entry: &Entry,
    limit: u64,
    outputs: &mut Vec<(Stamp, Output)>,
) -> Followed {
    let target = entry.stamp();
    let stop = machine.run_towards(target, limit);
    outputs.extend(machine.take_outputs());
    match stop {
        Some(Stop::Idle { next: None }) => {
            return Followed::Differs(vec!["the processors sleep for ever".into()]);
        }
        Some(Stop::Dead) => {
            return Followed::End(Outcome::Failed("the processor cannot go on (see the log)".into()))
        }
        // Its consequence is logged where it was asked (a wish to suspend has none).
        Some(Stop::Request(request)) => {
            let here = machine.stamp();
            if request != MachineRequest::Suspend && here.position < target.position {
                return Followed::Differs(vec![format!("the guest asks for {request:?} here only")]);
            }
            return Followed::Asked(request);
        }
        // A sleeping guest's time passes without instructions: it may never reach the target.
        Some(Stop::Debug(stop)) => return Followed::Stopped(stop),
        Some(Stop::Limit | Stop::Output | Stop::News | Stop::Idle { .. }) if machine.now() > target.ns => {
            return Followed::Differs(vec!["virtual time".into()]);
        }
        Some(Stop::Limit | Stop::Output | Stop::News | Stop::Idle { .. }) => return Followed::NotYet,
        None => {}
    }
    let here = machine.stamp();
    if here != target {
        return Followed::Differs(vec![format!("reached {here:?} instead of {target:?}")]);
    }
    match entry {
        Entry::Input { payload, .. } => match postcard::from_bytes::<MachineInput>(payload) {
            Ok(input) => machine.apply(&input),
            Err(e) => {
                return Followed::End(Outcome::Failed(format!("an input in the log is not readable: {e}")))
            }
        },
        Entry::Fetch { .. } => {
            return Followed::End(Outcome::Failed("the log has a disk read without its data".into()))
        }
        Entry::Hash { payload, .. } | Entry::End { payload, .. } if !payload.is_empty() => {
            let Ok(theirs) = postcard::from_bytes::<StateHash>(payload) else {
                return Followed::End(Outcome::Failed("a hash in the log is not readable".into()));
            };
            let ours = machine.state_hash();
            if ours != theirs {
                return Followed::Differs(theirs.differences(&ours));
            }
        }
        _ => {}
    }
    outputs.extend(machine.take_outputs());
    Followed::Done
}
