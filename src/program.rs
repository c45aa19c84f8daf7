//! The program: from a command line to a running machine.

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ftvm_block::track::Tracked;
use ftvm_devices::Input;
use ftvm_qmp::{serve_listener, Fds, Hub, Listener};

use crate::assembly::{
    check_shared, open_drive, open_live, open_net, open_options, queue_settings, Blueprint,
};
use crate::cli::config::Monitor;
use crate::cli::drive::{DriveConfig, ErrorPolicy};
use crate::cli::{Char, Config, Request};
use crate::host::backends::Backends;
use crate::host::chars::{self, CharSink, Escape, EscapeFilter, Opened};
use crate::host::disk::DiskWorker;
use crate::host::{net_receiver, signals, Outside};
use crate::lockstep::{Arbiter, FileLock, LunArbiter};
use crate::machine::MachineInput;
use crate::monitor::{CharView, Control};
use crate::runtime::control::{RunState, Shared};
use crate::runtime::ft::disks::{Disks, Generations};
use crate::runtime::ft::{begin_own_writes, join, Common, FtSide, HostSide};
use crate::runtime::live::{replay, RunOptions, Runtime, Sink};
use crate::runtime::record::{Header, Player, Recorder};
use crate::runtime::{Event, Events, Outcome, Quit};

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
    let outcome = start(&config);
    ftvm_block::iscsi::release_all();
    chars::restore_terminal();
    if let Some(path) = &config.host.pidfile {
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
        Ok(Outcome::Rejoin(peer)) => {
            eprintln!("ftvm: the machine lives at {peer}; this side becomes its backup");
            again(&as_backup_of(peer, args))
        }
    }
}

/// These arguments, with an `-ft` that joins the primary at `peer`.
fn as_backup_of(peer: std::net::SocketAddr, args: &[String]) -> Vec<String> {
    let mut out = Vec::with_capacity(args.len());
    let mut ft = false;
    for arg in args {
        if !std::mem::replace(&mut ft, matches!(arg.as_str(), "-ft" | "--ft")) {
            out.push(arg.clone());
            continue;
        }
        // What belongs to this host or to the pair stays.
        let own = |p: &&str| ["listen=", "lock=", "max-lag="].iter().any(|k| p.starts_with(k));
        let rest: String = arg.split(',').filter(own).map(|p| format!(",{p}")).collect();
        out.push(format!("backup,peer={peer}{rest}"));
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
    let (events, receiver) = channel();
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
    Replay(Box<Runtime>, Box<Player>),
    /// `-machine none`: only monitors.
    Idle(Arc<Shared>, Receiver<Event>),
}

impl Prepared {
    fn run(self) -> Outcome {
        match self {
            Prepared::Live(mut runtime) => runtime.run(),
            Prepared::Replay(mut runtime, mut player) => {
                let outside = Arc::clone(&runtime.outside);
                let outcome = replay(&mut runtime.machine, &mut player, &outside, &runtime.receiver);
                outside.drain_chars();
                outcome
            }
            Prepared::Idle(shared, receiver) => idle(&shared, &receiver),
        }
    }
}

/// A program without a machine waits for its end.
fn idle(shared: &Shared, receiver: &Receiver<Event>) -> Outcome {
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

/// A drive's open image, if it has a medium.
type Medium = Option<Box<dyn ftvm_block::Image>>;

fn sizes(config: &Config) -> Result<(Vec<u64>, Vec<Medium>), String> {
    let mut sizes = Vec::new();
    let mut images = Vec::new();
    for drive in &config.machine.drives {
        let mut drive = drive.clone();
        drive.snapshot |= config.machine.snapshot;
        // Overlays against late writes of others are for disks that others have.
        let shared = config.host.ft.as_ref().is_some_and(|f| !f.separate);
        let image = open_live(&drive, shared, false).map_err(|e| e.to_string())?;
        sizes.push(image.as_ref().map_or(0, |i| i.size()));
        images.push(image);
    }
    Ok((sizes, images))
}

fn prepare(config: &Config, events: Events, receiver: Receiver<Event>) -> Result<Prepared, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let shared = Shared::new();
    if config.machine.machine == "none" {
        if config.host.ft.is_some() || !config.machine.devices.is_empty() {
            return Err("the machine 'none' has no devices and cannot be protected".into());
        }
        shared.backends().objects.clone_from(&config.machine.objects);
        let control = control(config, &config.machine, &shared, &events, Arc::default());
        start_monitors(config, &control)?;
        return Ok(Prepared::Idle(shared, receiver));
    }
    if let Some(ft) = config.host.ft.clone().filter(|f| f.peer.is_some()) {
        return prepare_backup(config, ft, &shared, events, receiver);
    }
    if let Some(path) = &config.machine.icount.replay {
        let (player, header) = Player::open(path).map_err(|e| text(&e))?;
        let mut blueprint = Blueprint::new(&config.machine, &config.host.firmware_dirs, &header.drive_sizes)
            .map_err(|e| text(&e))?;
        let fingerprint = blueprint.fingerprint();
        if header.version != env!("CARGO_PKG_VERSION") {
            return Err(format!(
                "'{path}' was recorded by ftvm {}, this is ftvm {}",
                header.version,
                env!("CARGO_PKG_VERSION")
            ));
        }
        if let Some(difference) = Blueprint::fingerprint_difference(&header.machine, &fingerprint) {
            return Err(format!("'{path}' was recorded on another machine: {difference}"));
        }
        blueprint.pc.random_seed = header.seed;
        blueprint.pc.rtc_base_unix = header.rtc_base;
        blueprint.ns_per_instruction = header.ns_per_instruction;
        let machine = blueprint.build().map_err(|e| text(&e))?;
        let (outside, control) = open_outside(config, &blueprint, &shared, &events)?;
        start_monitors(config, &control)?;
        let runtime = Runtime::new(machine, outside, shared, events, receiver, RunOptions::default());
        return Ok(Prepared::Replay(Box::new(runtime), Box::new(player)));
    }
    let (sizes, mut images) = sizes(config)?;
    let separate = config.host.ft.as_ref().is_some_and(|f| f.separate);
    let disks = if separate { track(&mut images) } else { Disks::new() };
    let blueprint =
        Blueprint::new(&config.machine, &config.host.firmware_dirs, &sizes).map_err(|e| text(&e))?;
    let machine = blueprint.build().map_err(|e| text(&e))?;
    let (outside, control) = open_outside(config, &blueprint, &shared, &events)?;
    attach_nets(&blueprint, &outside, &events)?;
    for (i, (image, drive)) in images.into_iter().zip(&config.machine.drives).enumerate() {
        if let Some(image) = image {
            let worker = DiskWorker::start(
                i,
                &drive.id,
                image,
                queue_settings(drive, config.host.ft.is_some() && !separate),
                events.clone(),
            )
            .map_err(|e| text(&e))?;
            outside.attach_disk(i, worker);
        }
    }
    let ft = match &config.host.ft {
        None => None,
        Some(ft) => {
            let common = common(ft.clone(), &blueprint, &shared, &events, disks)?;
            if let Some(generations) = &common.generations {
                generations.check()?;
                generations.advance().map_err(|e| format!("-ft: the lock's directory: {e}"))?;
            }
            Some(FtSide::primary(common).map_err(|e| text(&e))?)
        }
    };
    start_monitors(config, &control)?;
    let options = RunOptions {
        no_reboot: config.host.no_reboot,
        no_shutdown: config.host.no_shutdown,
        pause_on_panic: false,
        sleep: config.machine.icount.sleep,
        adaptive: config.machine.icount.shift.is_none(),
    };
    let mut runtime = Runtime::new(machine, outside, shared, events, receiver, options);
    runtime.ft = ft;
    runtime.errors.drives = error_policies(&blueprint);
    if let Some(path) = &config.machine.icount.record {
        let header = Header {
            version: env!("CARGO_PKG_VERSION").into(),
            machine: blueprint.fingerprint(),
            seed: blueprint.pc.random_seed,
            rtc_base: blueprint.pc.rtc_base_unix,
            drive_sizes: sizes,
            ns_per_instruction: blueprint.ns_per_instruction,
        };
        runtime.sink = Sink::File(Box::new(Recorder::create(path, &header).map_err(|e| text(&e))?));
    }
    if config.host.start_paused {
        runtime.input(MachineInput::Paused(true));
    } else {
        runtime.set_running(true, RunState::Running);
    }
    runtime.restart_pace();
    Ok(Prepared::Live(Box::new(runtime)))
}

/// Each drive's name and what its errors do.
fn error_policies(blueprint: &Blueprint) -> Vec<(String, ErrorPolicy)> {
    blueprint.config.drives.iter().map(|d| (d.id.clone(), d.on_error)).collect()
}

fn lock_path(ft: &crate::cli::ft::FtConfig, blueprint: &Blueprint) -> Result<String, String> {
    if let Some(path) = &ft.lock {
        return Ok(path.clone());
    }
    blueprint
        .config
        .drives
        .iter()
        .find(|d| !d.read_only && d.file.is_some())
        .and_then(|d| d.file.as_ref())
        // A LUN's lock is its own reservation.
        .map(|f| {
            if f.starts_with("iscsi://") {
                f.clone()
            } else {
                ftvm_block::files::beside_path(std::path::Path::new(f), ".ftlock")
                    .to_string_lossy()
                    .into_owned()
            }
        })
        .ok_or_else(|| {
            "-ft needs a lock on shared storage: the machine has no writable disk image, so give lock=PATH"
                .into()
        })
}

/// Where disks are separate, follow what is written to them.
fn track(images: &mut [Medium]) -> Disks {
    let track = |medium: &mut Medium| {
        let image = medium.take_if(|i| !i.read_only())?;
        let tracked = Tracked::new(image);
        *medium = Some(Box::new(Arc::clone(&tracked)));
        Some(tracked)
    };
    images.iter_mut().map(track).collect()
}

fn common(
    ft: crate::cli::ft::FtConfig,
    blueprint: &Blueprint,
    shared: &Arc<Shared>,
    events: &Events,
    disks: Disks,
) -> Result<Arc<Common>, String> {
    let path = lock_path(&ft, blueprint)?;
    let fail = |e: std::io::Error| format!("-ft: the lock '{}': {e}", ftvm_block::iscsi::hide_secret(&path));
    let lock: Arc<dyn Arbiter> = if path.starts_with("iscsi://") {
        Arc::new(LunArbiter::open(&path, ftvm_block::iscsi::hide_secret(&path)).map_err(fail)?)
    } else {
        Arc::new(FileLock::new(&path).map_err(fail)?)
    };
    let file = |(drive, disk): (&DriveConfig, &Option<_>)| {
        disk.as_ref().and(drive.file.as_ref()).filter(|f| !f.contains("://")).map(std::path::PathBuf::from)
    };
    let images: Vec<_> = blueprint.config.drives.iter().zip(&disks).filter_map(file).collect();
    let generations = (ft.separate && !path.contains("://"))
        .then(|| Generations::new(std::path::Path::new(&path), &images));
    Ok(Arc::new(Common {
        config: ft,
        disks,
        generations,
        lock,
        shared: Arc::clone(shared),
        events: events.clone(),
        blueprint: Arc::new(postcard::to_stdvec(blueprint).map_err(|e| e.to_string())?),
        start: Instant::now(),
    }))
}

fn prepare_backup(
    config: &Config,
    ft: crate::cli::ft::FtConfig,
    shared: &Arc<Shared>,
    events: Events,
    receiver: Receiver<Event>,
) -> Result<Prepared, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let peer = ft.peer.clone().unwrap_or_default();
    shared.set_state(RunState::InMigrate);
    let joined = join(&peer, &ft.listen).map_err(|e| text(&e))?;
    let mut blueprint: Blueprint = match postcard::from_bytes(&joined.config) {
        Ok(b) => b,
        Err(e) => {
            return Err(text(&joined.refuse(format!("the primary's configuration is not readable: {e}"))))
        }
    };
    let given: Vec<String> = config.given.iter().map(|g| g.name.clone()).collect();
    if let Err(difference) = blueprint.adapt(&config.machine, &given) {
        return Err(text(&joined.refuse(difference)));
    }
    let separate = joined.separate;
    if separate && ft.lock.is_none() {
        let reason =
            "the primary has disks=separate: the backup needs lock=PATH, where the primary's lock is";
        return Err(text(&joined.refuse(reason.into())));
    }
    let ft =
        crate::cli::ft::FtConfig { heartbeat: joined.timing.0, timeout: joined.timing.1, separate, ..ft };
    let prepared = (|| {
        let machine = blueprint.build().map_err(|e| e.to_string())?;
        let (outside, control) = open_outside(config, &blueprint, shared, &events)?;
        let mut images = Vec::new();
        for (drive, spec) in blueprint.config.drives.iter().zip(&blueprint.pc.drives) {
            let options = open_options(drive);
            let image = if separate {
                open_drive(drive, &options)
            } else {
                open_drive(drive, &ftvm_block::OpenOptions { read_only: true, force_share: true, ..options })
            };
            let image = image.map_err(|e| e.to_string())?;
            let size = image.as_ref().map_or(0, |i| i.size());
            if separate {
                images.push(image);
            } else {
                drop(image);
                check_shared(drive)?;
            }
            if size != spec.size_bytes {
                return Err(format!(
                    "drive '{}' differs: the image here has {size} bytes, the primary's {}",
                    drive.id, spec.size_bytes
                ));
            }
        }
        let disks = track(&mut images);
        let common = common(ft, &blueprint, shared, &events, disks)?;
        Ok((machine, outside, control, common, images))
    })();
    let (mut machine, outside, control, common, images) = match prepared {
        Ok(p) => p,
        Err(e) => return Err(text(&joined.refuse(e))),
    };
    start_monitors(config, &control)?;
    let received = joined.receive(&common, &mut machine).map_err(|e| text(&e))?;
    let tracked: Vec<bool> = common.disks.iter().map(Option::is_some).collect();
    for (i, (image, drive)) in images.into_iter().zip(&blueprint.config.drives).enumerate() {
        if let Some(image) = image.filter(|_| tracked[i]) {
            let worker = DiskWorker::start(i, &drive.id, image, queue_settings(drive, false), events.clone())
                .map_err(|e| text(&e))?;
            outside.attach_disk(i, worker);
        }
    }
    // Networks are opened now, so that a wrong name is found now; frames are taken when live.
    attach_nets(&blueprint, &outside, &events)?;
    let backends_of = Arc::clone(shared);
    let attach = move |outside: &Arc<Outside>, events: &Events| -> Result<(), String> {
        let backends = backends_of.backends().clone();
        for (index, nic) in backends.hot_nics() {
            if let Some(dev) = backends.netdevs.iter().find(|d| d.id == nic.netdev) {
                let net = open_net(dev, net_receiver(index as u32, events.clone()))
                    .map_err(|e| format!("-netdev {}: {e}", dev.id))?;
                outside.attach_net(index, net);
            }
        }
        for (i, drive) in backends.drives.iter().enumerate() {
            let Some(drive) = drive else { continue };
            if tracked.get(i) == Some(&true) {
                continue;
            }
            let image = open_live(drive, !separate, !separate);
            if let Some(image) = image.map_err(|e| e.to_string())? {
                let settings = queue_settings(drive, !separate);
                let worker = DiskWorker::start(i, &drive.id, image, settings, events.clone())
                    .map_err(|e| e.to_string())?;
                outside.attach_disk(i, worker);
            }
        }
        Ok(())
    };
    let host = HostSide { attach: Box::new(attach), macs: blueprint.pc.nics.iter().map(|n| n.mac).collect() };
    let side = received.follow(common, host).map_err(|e| text(&e))?;
    let options = RunOptions {
        no_reboot: config.host.no_reboot,
        no_shutdown: config.host.no_shutdown,
        pause_on_panic: false,
        sleep: true,
        adaptive: blueprint.config.icount.shift.is_none(),
    };
    let mut runtime = Runtime::new(machine, outside, Arc::clone(shared), events, receiver, options);
    runtime.errors.drives = error_policies(&blueprint);
    runtime.ft = Some(side);
    begin_own_writes(&mut runtime);
    Ok(Prepared::Live(Box::new(runtime)))
}

fn attach_nets(blueprint: &Blueprint, outside: &Outside, events: &Events) -> Result<(), String> {
    for (i, dev) in blueprint.netdevs().into_iter().enumerate() {
        if let Some(dev) = dev {
            let net = open_net(dev, net_receiver(i as u32, events.clone()))
                .map_err(|e| format!("-netdev {}: {e}", dev.id))?;
            outside.attach_net(i, net);
        }
    }
    Ok(())
}

fn control(
    config: &Config,
    machine: &crate::cli::MachineConfig,
    shared: &Arc<Shared>,
    events: &Events,
    outside: Arc<Outside>,
) -> Arc<Control> {
    Arc::new(Control {
        shared: Arc::clone(shared),
        events: events.clone(),
        config: machine.clone(),
        outside,
        pair: config.host.ft.is_some(),
        chars: Mutex::default(),
        fdsets: Default::default(),
        machine_thread: nix::unistd::gettid().as_raw(),
    })
}

/// Open the character devices; the terminal may be shared between a serial line and the human monitor.
fn open_outside(
    config: &Config,
    blueprint: &Blueprint,
    shared: &Arc<Shared>,
    events: &Events,
) -> Result<(Arc<Outside>, Arc<Control>), String> {
    *shared.backends() = Backends::new(blueprint);
    let outside = Arc::new(Outside::default());
    let control = control(config, &blueprint.config, shared, events, Arc::clone(&outside));
    // Serial lines do not know who is at their other end; virtio-serial ports tell their guest.
    let opens: Vec<u32> = blueprint
        .pc
        .devices
        .iter()
        .filter(|d| matches!(d.driver.as_str(), "virtserialport" | "virtconsole"))
        .filter_map(|d| d.chardev)
        .collect();
    let mut sinks = Vec::new();
    for (port, dev) in blueprint.chars.iter().enumerate() {
        let dev = resolve(dev, &blueprint.config.chardevs)?;
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
        let sink = if matches!(dev, Char::Stdio { mux: true, .. }) {
            mux_terminal(&dev, deliver, &control)?
        } else {
            chars::open(&dev, &label, Box::new(deliver), opened).map_err(|e| e.to_string())?
        };
        if let Ok(mut chars) = control.chars.lock() {
            chars.push(CharView { label, filename: sink.label.clone() });
        }
        sinks.push(sink);
    }
    outside.set_chars(sinks);
    Ok((outside, control))
}

fn resolve(dev: &Char, chardevs: &[(String, Char)]) -> Result<Char, String> {
    match dev {
        Char::Id(id) => chardevs
            .iter()
            .find(|(n, _)| n == id)
            .map(|(_, d)| d.clone())
            .ok_or_else(|| format!("chardev '{id}' not found")),
        other => Ok(other.clone()),
    }
}

/// The terminal shared by a serial line and the human monitor: Ctrl-A c switches, Ctrl-A x ends.
fn mux_terminal(
    dev: &Char,
    deliver: impl Fn(&[u8]) + Send + 'static,
    control: &Arc<Control>,
) -> Result<CharSink, String> {
    let out: Arc<Mutex<Option<CharSink>>> = Arc::default();
    let echo = Arc::clone(&out);
    let control = Arc::clone(control);
    let mut filter = EscapeFilter::default();
    let mut in_monitor = false;
    let mut line = String::new();
    let say = move |text: &str| {
        if let Some(sink) = echo.lock().ok().and_then(|s| s.clone()) {
            sink.write(text.as_bytes());
        }
    };
    let typed = move |bytes: &[u8]| {
        let mut guest = Vec::new();
        for byte in bytes {
            match filter.byte(*byte) {
                Ok(None) => {}
                Ok(Some(b)) if !in_monitor => guest.push(b),
                Ok(Some(b'\r' | b'\n')) => {
                    say("\r\n");
                    let line = std::mem::take(&mut line);
                    say(&control.human(&line, &mut Fds::default()));
                    say("(ftvm) ");
                }
                Ok(Some(8 | 127)) => {
                    if line.pop().is_some() {
                        say("\x08 \x08");
                    }
                }
                Ok(Some(b)) if (32..127).contains(&b) => {
                    line.push(b as char);
                    say(&(b as char).to_string());
                }
                Ok(Some(_)) => {}
                Err(Escape::Exit) => {
                    let _ = control.events.send(Event::Quit(Quit::HostQmpQuit));
                }
                Err(Escape::Switch) => {
                    in_monitor = !in_monitor;
                    if in_monitor {
                        say(&format!(
                            "\r\nftvm {} monitor - type 'help'\r\n(ftvm) ",
                            env!("CARGO_PKG_VERSION")
                        ));
                    } else {
                        say("\r\n");
                    }
                }
                Err(Escape::Help) => {
                    say("\r\nC-a h  this help\r\nC-a x  end\r\nC-a c  switch to the monitor and back\r\nC-a C-a  send C-a\r\n");
                }
            }
        }
        if !guest.is_empty() {
            deliver(&guest);
        }
    };
    let opened = Box::new(|_| {});
    let sink = chars::open(dev, "serial0", Box::new(typed), opened).map_err(|e| e.to_string())?;
    if let Ok(mut slot) = out.lock() {
        *slot = Some(sink.clone());
    }
    Ok(sink)
}

fn start_monitors(config: &Config, control: &Arc<Control>) -> Result<(), String> {
    for (i, monitor) in config.host.monitors.iter().enumerate() {
        let dev = resolve(&monitor.dev, &config.machine.chardevs)?;
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
            start_human(&dev, &label, control)?;
        }
    }
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
    if let Ok(mut chars) = views.chars.lock() {
        chars.push(CharView { label: label.to_owned(), filename: sink.label.clone() });
    }
    if let Ok(mut slot) = out.lock() {
        *slot = Some(sink);
    }
    Ok(())
}
