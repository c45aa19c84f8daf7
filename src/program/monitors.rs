//! Monitors and character devices of a program.

use std::net::TcpListener;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use ftvm_devices::Input;
use ftvm_qmp::{serve_listener, Fds, Hub, Listener};

use crate::assembly::Blueprint;
use crate::cli::config::Monitor;
use crate::cli::vnc::{VncAddress, VncConfig};
use crate::cli::{Char, Config};
use crate::host::backends::Backends;
use crate::host::chars::{self, CharSink, Opened};
use crate::host::mux::{Front, Keys, Mux};
use crate::host::vnc::{Access, Vnc};
use crate::host::Outside;
use crate::machine::MachineInput;
use crate::monitor::{CharView, Control};
use crate::runtime::control::Shared;
use crate::runtime::{Event, Events, Quit};

pub fn control(
    machine: &crate::cli::MachineConfig,
    shared: &Arc<Shared>,
    events: &Events,
    outside: Arc<Outside>,
) -> Arc<Control> {
    Arc::new_cyclic(|this| Control {
        shared: Arc::clone(shared),
        events: events.clone(),
        config: machine.clone(),
        outside,
        chars: Mutex::default(),
        muxes: Mutex::default(),
        fdsets: Default::default(),
        gdb: Default::default(),
        vnc: Default::default(),
        machine_thread: nix::unistd::gettid().as_raw(),
        this: this.clone(),
    })
}

/// Open the character devices; the terminal may be shared between a serial line and the human monitor.
pub fn open_outside(
    blueprint: &Blueprint,
    shared: &Arc<Shared>,
    events: &Events,
) -> Result<(Arc<Outside>, Arc<Control>), String> {
    *shared.backends() = Backends::new(blueprint);
    let outside = Arc::new(Outside::default());
    let control = control(&blueprint.config, shared, events, Arc::clone(&outside));
    // Serial lines do not know who is at their other end; virtio-serial ports tell their guest.
    let opens: Vec<u32> = blueprint
        .pc
        .devices
        .iter()
        .filter(|d| matches!(d.driver.as_str(), "virtserialport" | "virtconsole"))
        .filter_map(|d| d.chardev)
        .collect();
    let mut sinks = Vec::new();
    for (port, given) in blueprint.chars.iter().enumerate() {
        let dev = given.resolve(&blueprint.config.chardevs)?;
        let send = events.clone();
        let port = port as u32;
        let deliver = move |bytes: &[u8]| {
            let input = Input::CharIn { port, bytes: bytes.to_vec() };
            let _ = send.send(Event::Input(MachineInput::Device(input)));
        };
        let send = events.clone();
        let opened: Opened = match opens.contains(&port) {
            false => Box::new(|_| {}),
            true => Box::new(move |open| {
                let input = Input::CharOpen { port, open };
                let _ = send.send(Event::Input(MachineInput::Device(input)));
            }),
        };
        let label = blueprint.labels.get(port as usize).cloned().unwrap_or_default();
        let sink = if let Some(mux) = mux(given, &dev, &label, &control)? {
            let send = events.clone();
            let broken = move || {
                let _ = send.send(Event::Input(MachineInput::Device(Input::CharBreak { port })));
            };
            let front =
                Front { typed: Box::new(deliver), opened, focus: Box::new(|_| {}), broken: Box::new(broken) };
            let sink = mux.attach(front, true).map_err(|e| format!("chardev '{label}': {e}"))?;
            if !matches!(given, Char::Id(_)) {
                // `mon:`: the monitor behind it has no option of its own.
                human_front(&mux, &control)?;
            }
            sink
        } else {
            chars::open(&dev, &label, Box::new(deliver), opened).map_err(|e| e.to_string())?
        };
        note(&control, &label, &sink);
        sinks.push(sink);
    }
    outside.set_chars(sinks);
    Ok((outside, control))
}

/// What `query-chardev` shows, once for each device.
fn note(control: &Control, label: &str, sink: &CharSink) {
    if let Ok(mut chars) = control.chars.lock() {
        if chars.iter().all(|c| c.label != label) {
            chars.push(CharView { label: label.to_owned(), filename: sink.label.clone() });
        }
    }
}

/// The multiplexer of a device that has one, open: the same for all that name its id.
fn mux(given: &Char, dev: &Char, label: &str, control: &Arc<Control>) -> Result<Option<Arc<Mux>>, String> {
    let Char::Mux(inner) = dev else { return Ok(None) };
    let mut known = control.muxes.lock().map_err(|_| "internal lock")?;
    if let Some(mux) = Some(given).and_then(|g| matches!(g, Char::Id(_)).then(|| known.get(label))?) {
        return Ok(Some(Arc::clone(mux)));
    }
    let events = control.events.clone();
    let exit = Box::new(move || {
        let _ = events.send(Event::Quit(Quit::HostQmpQuit));
    });
    let saver = Arc::downgrade(control);
    let commit = Box::new(move || match saver.upgrade() {
        Some(control) => control.human("commit all", &mut Fds::default()),
        None => String::new(),
    });
    let mux = Mux::open(inner, label, Keys { exit, commit }).map_err(|e| e.to_string())?;
    known.insert(label.to_owned(), Arc::clone(&mux));
    Ok(Some(mux))
}

/// A human monitor among the front ends of a device. It shows what is typed, and greets when it is first in front of somebody.
fn human_front(mux: &Arc<Mux>, control: &Arc<Control>) -> Result<CharSink, String> {
    struct Shown {
        sink: Option<CharSink>,
        greeted: bool,
    }
    let shown = Arc::new(Mutex::new(Shown { sink: None, greeted: false }));
    let sink_of = |shown: &Arc<Mutex<Shown>>| shown.lock().ok().and_then(|s| s.sink.clone());
    let echo = Arc::clone(&shown);
    let control = Arc::clone(control);
    let mut line = String::new();
    let typed = move |bytes: &[u8]| {
        let Some(sink) = sink_of(&echo) else { return };
        let say = |text: &str| sink.write(text.as_bytes());
        for byte in bytes {
            match byte {
                b'\r' | b'\n' => {
                    say("\r\n");
                    let line = std::mem::take(&mut line);
                    say(&control.human(&line, &mut Fds::default()));
                    say(PROMPT);
                }
                8 | 127 if line.pop().is_some() => say("\x08 \x08"),
                32..127 => {
                    line.push(*byte as char);
                    say(&(*byte as char).to_string());
                }
                _ => {}
            }
        }
    };
    let of = Arc::clone(&shown);
    let focus: Opened = Box::new(move |focus| {
        let Some(sink) = sink_of(&of) else { return };
        let greeted = of.lock().is_ok_and(|mut shown| {
            let before = shown.greeted;
            shown.greeted |= focus;
            before
        });
        sink.write(match (focus, greeted) {
            (true, false) => GREETING.as_bytes(),
            (true, true) => PROMPT.as_bytes(),
            (false, _) => b"\r\n",
        });
    });
    let front = Front { typed: Box::new(typed), opened: Box::new(|_| {}), focus, broken: Box::new(|| {}) };
    let sink = mux.attach(front, false)?;
    if let Ok(mut shown) = shown.lock() {
        shown.sink = Some(sink.clone());
    }
    if mux.is_alone() {
        mux.show(true);
    }
    Ok(sink)
}

pub fn start_monitors(config: &Config, control: &Arc<Control>) -> Result<(), String> {
    for (i, monitor) in config.host.monitors.iter().enumerate() {
        let dev = monitor.dev.resolve(&config.machine.chardevs)?;
        let label = match &monitor.dev {
            Char::Id(id) => id.clone(),
            _ => format!("compat_monitor{i}"),
        };
        if monitor.qmp {
            let filename = start_qmp(monitor, &dev, control)?;
            if let Ok(mut chars) = control.chars.lock() {
                chars.push(CharView { label, filename });
            }
        } else {
            if let Some(mux) = mux(&monitor.dev, &dev, &label, control)? {
                let sink = human_front(&mux, control).map_err(|e| format!("chardev '{label}': {e}"))?;
                note(control, &label, &sink);
                continue;
            }
            start_human(&dev, &label, control)?;
        }
    }
    control.serve_gdb(config.host.gdb.as_ref()).map_err(|e| format!("-gdb: {e}"))?;
    super::register::register(control);
    match &config.host.vnc {
        Some(vnc) => start_vnc(vnc, control),
        None => Ok(()),
    }
}

fn start_vnc(config: &VncConfig, control: &Arc<Control>) -> Result<(), String> {
    let access = match config.password {
        true => Access::Password(config.secret.clone()),
        false => Access::Everybody,
    };
    let server = Vnc::new(access);
    let console = Arc::clone(control) as _;
    let listens = match &config.address {
        VncAddress::Tcp { host, first, last } => server.listen_tcp(host, *first..=*last, console),
        VncAddress::Unix(path) => server.listen_unix(path, console),
    };
    listens.map_err(|e| format!("-vnc: cannot listen on {}: {e}", config.address))?;
    let _ = control.vnc.set(server);
    Ok(())
}

/// Serve QMP on `dev`; returns what people are told of it.
fn start_qmp(monitor: &Monitor, dev: &Char, control: &Arc<Control>) -> Result<String, String> {
    let hub = Hub {
        handler: Arc::clone(control) as _,
        events: control.shared.events.clone(),
        pretty: monitor.pretty,
    };
    let listener = match dev {
        Char::Unix { path, server: true, .. } => {
            let _ = std::fs::remove_file(path);
            Listener::Unix(UnixListener::bind(path).map_err(|e| format!("-qmp unix:{path}: {e}"))?)
        }
        Char::Tcp { addr, server: true, .. } => {
            Listener::Tcp(TcpListener::bind(addr).map_err(|e| format!("-qmp tcp:{addr}: {e}"))?)
        }
        // SAFETY: the descriptor was passed to this process as a listening socket for this use.
        Char::Fd { fd, server: true } => Listener::Unix(unsafe { UnixListener::from_raw_fd(*fd) }),
        other => {
            return Err(format!(
                "-qmp: {other:?} cannot carry QMP here: give unix:PATH,server=on or tcp:ADDR:PORT,server=on"
            ))
        }
    };
    let filename = match &listener {
        Listener::Unix(l) => {
            let path = l.local_addr().ok().and_then(|a| a.as_pathname().map(|p| p.display().to_string()));
            format!("unix:{},server=on", path.unwrap_or_default())
        }
        Listener::Tcp(l) => {
            format!("tcp:{},server=on", l.local_addr().map_or(String::new(), |a| a.to_string()))
        }
    };
    std::thread::Builder::new()
        .name("qmp".into())
        .spawn(move || serve_listener(listener, &hub))
        .map_err(|e| e.to_string())?;
    Ok(filename)
}

/// What a human monitor says first.
const GREETING: &str = concat!("ftvm ", env!("CARGO_PKG_VERSION"), " monitor - type 'help'\r\n(ftvm) ");
const PROMPT: &str = "(ftvm) ";

/// A human monitor of its own (not on a shared terminal).
fn start_human(dev: &Char, label: &str, control: &Arc<Control>) -> Result<(), String> {
    let views = Arc::clone(control);
    let out: Arc<Mutex<Option<CharSink>>> = Arc::default();
    let echo = Arc::clone(&out);
    let control = Arc::clone(control);
    let mut line = Vec::new();
    let typed = move |bytes: &[u8]| {
        let Some(sink) = echo.lock().ok().and_then(|s| s.clone()) else { return };
        for byte in bytes {
            if *byte == b'\n' || *byte == b'\r' {
                let text = String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned();
                let answer = control.human(&text, &mut Fds::default());
                sink.write(format!("{answer}(ftvm) ").as_bytes());
            } else {
                line.push(*byte);
            }
        }
    };
    let greet = Arc::clone(&out);
    let opened = Box::new(move |open| {
        if let Some(sink) = greet.lock().ok().and_then(|s| s.clone()).filter(|_| open) {
            sink.write(GREETING.as_bytes());
        }
    });
    let sink = chars::open(dev, label, Box::new(typed), opened).map_err(|e| e.to_string())?;
    note(&views, label, &sink);
    if let Ok(mut slot) = out.lock() {
        *slot = Some(sink);
    }
    Ok(())
}
