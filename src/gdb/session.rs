//! A server on a character device, and the sessions of the debuggers that connect to it, one after the other.

use std::collections::VecDeque;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, OnceLock};

use ftvm_accel::debug::Watch;
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as State;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::base::reverse_exec::ReplayLogPosition;
use gdbstub::target::ext::breakpoints::WatchKind;

use super::packets::{Filter, Passed};
use super::target::{thread, Debuggee};
use crate::cli::Char;
use crate::host::chars::{self, CharSink};
use crate::machine::Reason;
use crate::monitor::Control;
use crate::runtime::control::RunState;
use crate::runtime::debug::{News, What};
use crate::runtime::{Event, Quit};

/// What `-s` and `gdbserver` without a device mean.
pub const DEFAULT: &str = "tcp::1234";

/// What a session's thread hears.
enum Heard {
    /// Somebody takes the other end.
    Opened,
    Bytes(Vec<u8>),
    Closed,
    News(News),
    /// The server is taken away.
    Over,
}

/// A server that listens; it ends when dropped.
pub struct Server {
    sender: Sender<Heard>,
    sink: CharSink,
    /// What people are told of it.
    pub label: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.sender.send(Heard::Over);
        self.sink.close();
    }
}

impl Server {
    /// Listen on a character device.
    pub fn start(dev: &Char, control: &Arc<Control>) -> Result<Server, String> {
        let (sender, heard) = channel();
        let bytes = sender.clone();
        let typed = Box::new(move |data: &[u8]| {
            let _ = bytes.send(Heard::Bytes(data.to_vec()));
        });
        let opened = sender.clone();
        let opened = Box::new(move |open| {
            let _ = opened.send(if open { Heard::Opened } else { Heard::Closed });
        });
        let (control, news, out) = (Arc::clone(control), sender.clone(), Arc::new(OnceLock::new()));
        let outlet = Arc::clone(&out);
        std::thread::Builder::new()
            .name("gdb".into())
            .spawn(move || serve(&control, &news, &heard, &outlet))
            .map_err(|e| e.to_string())?;
        let sink = chars::open(dev, "gdb", typed, opened).map_err(|e| e.to_string())?;
        let _ = out.set(sink.clone());
        Ok(Server { sender, label: sink.label.clone(), sink })
    }
}

fn serve(control: &Arc<Control>, sender: &Sender<Heard>, heard: &Receiver<Heard>, out: &OnceLock<CharSink>) {
    let mut number = 0;
    while let Ok(first) = heard.recv() {
        match first {
            Heard::Opened => number += 1,
            Heard::Over => return,
            _ => continue,
        }
        // The sink is there a moment after the first client, or never.
        let Some(sink) = (0..500).find_map(|_| {
            out.get().cloned().or_else(|| {
                std::thread::sleep(std::time::Duration::from_millis(2));
                None
            })
        }) else {
            return;
        };
        let news = sender.clone();
        let listener = Box::new(move |n| {
            let _ = news.send(Heard::News(n));
        });
        let attached = control.machine(move |rt| rt.debug_attach(listener));
        match attached {
            Err(_) => return,
            Ok(Err(text)) => {
                log::warn!("gdb: {text}");
                sink.hang_up(number);
                continue;
            }
            Ok(Ok(())) => {}
        }
        let outcome = session(control, heard, &sink, number);
        let go_on = matches!(outcome, Ok(DisconnectReason::Disconnect));
        let over = matches!(outcome, Err(End::Over));
        match outcome {
            Err(End::Closed | End::Over) => {}
            Err(End::Error(text)) => {
                log::warn!("gdb: {text}");
                sink.hang_up(number);
            }
            Ok(DisconnectReason::Kill) => {
                log::info!("ended by gdb");
                let _ = control.events.send(Event::Quit(Quit::HostQmpQuit));
                return;
            }
            Ok(_) => sink.drain(),
        }
        if control.machine(move |rt| rt.debug_detach(go_on)).is_err() || over {
            return;
        }
    }
}

/// Why a session ended by itself.
enum End {
    Closed,
    Over,
    Error(String),
}

/// Bytes to GDB, a packet at a time.
struct Wire<'a> {
    sink: &'a CharSink,
    number: u64,
    packet: Vec<u8>,
}

impl Connection for Wire<'_> {
    type Error = std::convert::Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Self::Error> {
        self.packet.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Self::Error> {
        self.sink.write_to(self.number, &std::mem::take(&mut self.packet));
        Ok(())
    }
}

fn session(
    control: &Arc<Control>,
    heard: &Receiver<Heard>,
    sink: &CharSink,
    number: u64,
) -> Result<DisconnectReason, End> {
    let error = |e: &dyn std::fmt::Display| End::Error(e.to_string());
    let mut target = Debuggee::new(Arc::clone(control)).map_err(|e| error(&e))?;
    let stub = GdbStub::new(Wire { sink, number, packet: Vec::new() });
    let mut gdb = stub.run_state_machine(&mut target).map_err(|e| error(&e))?;
    let mut filter = Filter::default();
    let mut bytes = VecDeque::new();
    let mut heard_news = None;
    loop {
        gdb = match gdb {
            State::Disconnected(end) => return Ok(end.get_reason()),
            State::CtrlCInterrupt(interrupt) => {
                target.ask(|rt| rt.debug_interrupt()).map_err(|e| error(&e))?;
                let none = None::<MultiThreadStopReason<u64>>;
                interrupt.interrupt_handled(&mut target, none).map_err(|e| error(&e))?
            }
            State::Running(running) if heard_news.is_some() => match heard_news.take() {
                Some(News { run, what }) if run == target.run || matches!(what, What::Ended(..)) => {
                    let reason = stop_reason(&what, &target);
                    let reported = running.report_stop(&mut target, reason).map_err(|e| error(&e))?;
                    if let What::Ended(_, told) = what {
                        sink.drain();
                        let _ = told.send(());
                    }
                    reported
                }
                _ => State::Running(running),
            },
            waiting => match bytes.pop_front() {
                Some(byte) => match waiting {
                    State::Idle(idle) => idle.incoming_data(&mut target, byte).map_err(|e| error(&e))?,
                    State::Running(run) => run.incoming_data(&mut target, byte).map_err(|e| error(&e))?,
                    other => other,
                },
                None => {
                    match heard.recv().map_err(|_| End::Closed)? {
                        Heard::Opened => {}
                        Heard::Closed => return Err(End::Closed),
                        Heard::Over => return Err(End::Over),
                        Heard::News(n) if matches!(waiting, State::Running(_)) => heard_news = Some(n),
                        // GDB takes the machine for stopped.
                        Heard::News(_) => {}
                        Heard::Bytes(data) => {
                            for byte in data {
                                match filter.byte(byte, &mut target.modes) {
                                    Passed::On(on) => bytes.extend(on),
                                    Passed::Answered(answer) => sink.write_to(number, &answer),
                                }
                            }
                        }
                    }
                    waiting
                }
            },
        };
    }
}

fn stop_reason(what: &What, target: &Debuggee) -> MultiThreadStopReason<u64> {
    let kind = |w: &Watch| match (w.reads, w.writes) {
        (true, true) => WatchKind::ReadWrite,
        (true, false) => WatchKind::Read,
        _ => WatchKind::Write,
    };
    match what {
        What::Stopped(stop) => {
            let tid = thread(stop.cpu);
            match stop.reason {
                Reason::Step => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
                Reason::Break(at) if target.hard.contains(&at) => MultiThreadStopReason::HwBreak(tid),
                Reason::Break(_) => MultiThreadStopReason::SwBreak(tid),
                Reason::Begin => {
                    MultiThreadStopReason::ReplayLog { tid: Some(tid), pos: ReplayLogPosition::Begin }
                }
                Reason::End => {
                    MultiThreadStopReason::ReplayLog { tid: Some(tid), pos: ReplayLogPosition::End }
                }
                Reason::Watch(w) => MultiThreadStopReason::Watch { tid, kind: kind(&w), addr: w.start },
            }
        }
        What::State(state) => {
            // QEMU's signals.
            let signal = match state {
                RunState::Shutdown => Signal::SIGQUIT,
                RunState::IoError => Signal::SIGIO,
                RunState::InternalError => Signal::SIGABRT,
                RunState::GuestPanicked | RunState::Paused => Signal::SIGINT,
                _ => Signal::SIGINT,
            };
            let current = target.ask(|rt| rt.machine.current_cpu()).unwrap_or(0);
            MultiThreadStopReason::SignalWithThread { tid: thread(current), signal }
        }
        What::Ended(status, _) => MultiThreadStopReason::Exited(*status as u8),
    }
}
