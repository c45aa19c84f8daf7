//! The program: from a command line to a running machine.

mod accel;
mod monitors;
mod prepare;
mod register;

use std::io::Write;
use std::sync::Arc;

use prepare::prepare;

use crate::cli::{Config, Request};
use crate::host::chars;
use crate::host::signals;
use crate::runtime::control::Shared;
use crate::runtime::live::Runtime;
use crate::runtime::{mailbox, Event, Mailbox, Outcome, Quit};

/// Run the program with these arguments (without its name); returns the exit status.
pub fn main(args: &[String]) -> i32 {
    let config = match crate::cli::parse(args) {
        Ok(Request::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            return 0;
        }
        Ok(Request::Run(config)) => config,
        Err(e) => return fail(&e.to_string()),
    };
    let mut config = config;
    config.machine.accel = match accel::choose(&config) {
        Ok(accel) => accel,
        Err(text) if text.is_empty() => return 1,
        Err(text) => return fail(&text),
    };
    let outcome = start(&config);
    ftvm_block::iscsi::release_all();
    chars::restore_terminal();
    register::forget();
    // One that starts anew keeps its file: whoever looks is to see that it is there.
    let over = !matches!(outcome, Ok(Outcome::Again(_) | Outcome::Rejoin(_)));
    if let Some(path) = config.host.pidfile.as_ref().filter(|_| over) {
        let _ = std::fs::remove_file(path);
    }
    match outcome {
        Ok(Outcome::Done(status)) => status,
        Ok(Outcome::Failed(text)) | Err(text) => fail(&text),
        Ok(Outcome::Again(text)) => {
            eprintln!("ftvm: {text}");
            // Not in a circle at full speed, should a difference come back each time.
            std::thread::sleep(std::time::Duration::from_secs(2));
            again(args)
        }
        Ok(Outcome::Rejoin(ft)) => {
            eprintln!("ftvm: the machine was handed over; this side becomes its backup");
            again(&with_ft(&ft, args))
        }
    }
}

/// These arguments, with this value of `-ft`: in the place of the one they have, or else (the machine was protected
/// while it ran) behind them.
fn with_ft(value: &str, args: &[String]) -> Vec<String> {
    let mut out = args.to_vec();
    match args.iter().position(|a| matches!(a.as_str(), "-ft" | "--ft")) {
        Some(at) if at + 1 < out.len() => out[at + 1] = value.to_owned(),
        _ => out.extend(["-ft".to_owned(), value.to_owned()]),
    }
    out
}

/// Start this program anew in its place.
fn again(args: &[String]) -> i32 {
    use std::os::unix::process::CommandExt;
    let error = std::process::Command::new("/proc/self/exe").args(args).exec();
    fail(&format!("cannot start anew: {error}"))
}

fn fail(text: &str) -> i32 {
    eprintln!("ftvm: {text}");
    1
}

fn logging(config: &Config) -> Result<(), String> {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(log::LevelFilter::Warn);
    for item in &config.host.log_items {
        match item.as_str() {
            "ft" => builder
                .filter_module("ftvm::runtime::ft", log::LevelFilter::Debug)
                .filter_module("ftvm::lockstep", log::LevelFilter::Debug),
            "disk" => builder
                .filter_module("ftvm_block", log::LevelFilter::Debug)
                .filter_module("ftvm::host::disk", log::LevelFilter::Debug),
            "net" => builder.filter_module("ftvm_net", log::LevelFilter::Debug),
            "cpu" => builder.filter_module("ftvm_accel", log::LevelFilter::Debug),
            "all" => builder.filter_level(log::LevelFilter::Debug),
            other => return Err(format!("-d {other}: unknown log item; known are ft, disk, net, cpu, all")),
        };
    }
    if config.host.ft.is_some() && config.host.log_items.is_empty() {
        builder.filter_module("ftvm::runtime::ft", log::LevelFilter::Info);
    }
    builder.parse_default_env();
    let stamps = config.host.timestamps || config.host.log_file.is_some();
    builder.format(move |out, record| {
        if stamps {
            write!(out, "{} ", out.timestamp_millis())?;
        }
        let level = match record.level() {
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            _ => "",
        };
        writeln!(out, "ftvm: {level}{}", record.args())
    });
    if let Some(path) = &config.host.log_file {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(|e| format!("-D {path}: {e}"))?;
        builder.target(env_logger::Target::Pipe(Box::new(file)));
    }
    builder.try_init().map_err(|e| e.to_string())
}

fn start(config: &Config) -> Result<Outcome, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    if config.machine.cpu_model == "help" {
        print!("{}", ftvm_accel::model::CpuModel::help());
        return Ok(Outcome::Done(0));
    }
    for d in &config.machine.devices {
        if ["help", "?"].contains(&d.driver.as_str()) {
            print!("{}", ftvm_devices::device_help());
            return Ok(Outcome::Done(0));
        }
        if d.props.iter().any(|(k, _)| k == "help") {
            print!("{}", ftvm_devices::model_help(&d.driver).map_err(|e| text(&e))?);
            return Ok(Outcome::Done(0));
        }
    }
    // Threads started before daemonizing would not survive it, so this process only waits for its child.
    let ready = if config.host.daemonize { Some(daemonize()?) } else { None };
    logging(config)?;
    let (events, receiver) = mailbox().map_err(|e| text(&e))?;
    signals::install(events.clone()).map_err(|e| text(&e))?;
    if config.host.lock_memory {
        use nix::sys::mman::{mlockall, MlockAllFlags};
        mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
            .map_err(|e| format!("-overcommit mem-lock=on: {e}"))?;
    }
    let prepared = prepare(config, events, receiver)?;
    if let Some(sandbox) = &config.host.sandbox {
        sandbox.enter(true).map_err(|e| format!("-sandbox: {e}"))?;
    }
    if let Some(path) = &config.host.pidfile {
        std::fs::write(path, format!("{}\n", std::process::id()))
            .map_err(|e| format!("-pidfile {path}: {e}"))?;
    }
    if let Some(ready) = ready {
        ready.done();
    }
    Ok(prepared.run())
}

/// The pipe on which the waiting foreground process hears of success.
struct Ready(std::fs::File);

impl Ready {
    fn done(mut self) {
        let _ = self.0.write_all(b"ok");
        if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
            let _ = nix::unistd::dup2_stdin(&null);
            let _ = nix::unistd::dup2_stdout(&null);
            let _ = nix::unistd::dup2_stderr(&null);
        }
    }
}

/// Fork; the parent waits until the child is ready (exit 0) or has ended (exit 1).
fn daemonize() -> Result<Ready, String> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| e.to_string())?;
    // SAFETY: no other thread exists yet.
    match unsafe { nix::unistd::fork() }.map_err(|e| format!("-daemonize: {e}"))? {
        nix::unistd::ForkResult::Parent { .. } => {
            drop(writer);
            let mut got = Vec::new();
            let _ = std::io::Read::read_to_end(&mut std::fs::File::from(reader), &mut got);
            std::process::exit(i32::from(got != b"ok"));
        }
        nix::unistd::ForkResult::Child => {
            drop(reader);
            nix::unistd::setsid().map_err(|e| e.to_string())?;
            Ok(Ready(std::fs::File::from(writer)))
        }
    }
}

enum Prepared {
    Live(Box<Runtime>),
    /// `-machine none`: only monitors.
    Idle(Arc<Shared>, Mailbox),
}

impl Prepared {
    fn run(self) -> Outcome {
        match self {
            Prepared::Live(mut runtime) => runtime.run(),
            Prepared::Idle(shared, receiver) => idle(&shared, &receiver),
        }
    }
}

/// A program without a machine waits for its end.
fn idle(shared: &Shared, receiver: &Mailbox) -> Outcome {
    while let Ok(event) = receiver.recv() {
        if let Event::Quit(quit) = event {
            let reason = if quit == Quit::HostSignal { "host-signal" } else { "host-qmp-quit" };
            shared.events.emit("SHUTDOWN", serde_json::json!({"guest": false, "reason": reason}));
            break;
        }
    }
    shared.events.drain(std::time::Duration::from_secs(1));
    Outcome::Done(0)
}
