//! A machine as it was asked for: its images, networks and lock; or the primary's, for a backup.

use std::sync::mpsc::Receiver;
use std::sync::Arc;
use std::time::Instant;

use ftvm_block::track::Tracked;
use ftvm_block::{Image, Node, OpenOptions};

use super::monitors::{control, open_outside, start_monitors};
use super::Prepared;
use crate::assembly::{
    check_shared, open_drive, open_live, open_net, open_options, queue_settings, Blueprint,
};
use crate::cli::config::Accel;
use crate::cli::drive::{Cache, DriveConfig, ErrorPolicy};
use crate::cli::ft::Reads;
use crate::cli::Config;
use crate::host::disk::DiskWorker;
use crate::host::{net_receiver, Outside};
use crate::lockstep::{Arbiter, FileLock, LunArbiter};
use crate::machine::{Machine, MachineInput};
use crate::migration::channel::Uri;
use crate::migration::incoming::{self, Incoming};
use crate::migration::snapshot::{self, Wish};
use crate::runtime::control::{RunState, Shared};
use crate::runtime::ft::disks::{Disks, Generations};
use crate::runtime::ft::{begin_own_writes, join, BackupReads, Common, FtSide, HostSide};
use crate::runtime::live::{Home, MakeProcessors, RunOptions, Runtime, Sink, TurnOn};
use crate::runtime::record::{Header, Player, Recorder};
use crate::runtime::replay::Replay;
use crate::runtime::{Event, Events};

/// A drive's open image, if it has a medium.
type Medium = Option<Arc<Node>>;

fn sizes(config: &Config) -> Result<(Vec<u64>, Vec<Medium>), String> {
    let mut sizes = Vec::new();
    let mut images: Vec<Medium> = Vec::new();
    for drive in &config.machine.drives {
        let mut drive = drive.clone();
        drive.snapshot |= config.machine.snapshot;
        // Overlays against late writes of others are for disks that others have.
        let shared = config.host.ft.as_ref().is_some_and(|f| !f.separate);
        let find = |name: &str| images.iter().flatten().find(|n| n.name() == name).cloned();
        let image = open_live(&drive, shared, false, &find).map_err(|e| e.to_string())?;
        sizes.push(image.as_ref().map_or(0, |i| i.size()));
        images.push(image);
    }
    Ok((sizes, images))
}

pub fn prepare(config: &Config, events: Events, receiver: Receiver<Event>) -> Result<Prepared, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let shared = Shared::new();
    let ends = Arc::clone(&shared);
    crate::host::signals::on_end(Box::new(move || ends.end_if_stuck()));
    if config.machine.machine == "none" {
        if config.host.ft.is_some() || !config.machine.devices.is_empty() {
            return Err("the machine 'none' has no devices and cannot be protected".into());
        }
        shared.backends().objects.clone_from(&config.machine.objects);
        shared.set_accel(config.machine.accel, Vec::new());
        let control = control(&config.machine, &shared, &events, Arc::default());
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
        let (outside, control) = open_outside(&blueprint, &shared, &events)?;
        start_monitors(config, &control)?;
        let held = config.host.start_paused;
        let replay = Replay::new(&machine, player, path.clone(), held);
        let mut runtime = Runtime::new(machine, outside, shared, events, receiver, RunOptions::default());
        runtime.replay = Some(Box::new(replay));
        if !held {
            runtime.set_running(true, RunState::Running);
        }
        return Ok(Prepared::Live(Box::new(runtime)));
    }
    if let Some(uri) = &config.host.incoming {
        return prepare_incoming(config, uri, &shared, events, receiver);
    }
    let (sizes, mut images) = sizes(config)?;
    let separate = config.host.ft.as_ref().is_some_and(|f| f.separate);
    let disks = if separate { track(&mut images) } else { Disks::new() };
    let blueprint =
        Blueprint::new(&config.machine, &config.host.firmware_dirs, &sizes).map_err(|e| text(&e))?;
    let machine = build(&blueprint, &shared, &events)?;
    let (outside, control) = open_outside(&blueprint, &shared, &events)?;
    attach_nets(&blueprint, &outside, &events)?;
    for (i, (image, drive)) in images.into_iter().zip(&config.machine.drives).enumerate() {
        if let Some(image) = image {
            attach_image(i, drive, image, config.host.ft.is_some() && !separate, &outside, &events)?;
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
    let options = run_options(config);
    let turn_on: Option<TurnOn> = config.host.ft.is_none().then(|| {
        let (blueprint, shared, events) = (blueprint.clone(), Arc::clone(&shared), events.clone());
        Arc::new(move |ft| {
            let files =
                blueprint.config.drives.iter().filter(|d| !d.read_only).filter_map(|d| d.file.as_ref());
            if let Some(url) = files.clone().find(|f| f.contains("://")) {
                let url = ftvm_block::iscsi::hide_secret(url);
                return Err(format!("a machine on {url} must be started with -ft primary"));
            }
            if blueprint.config.drives.iter().any(|d| d.cache == Cache::Unsafe) {
                return Err("cache=unsafe and fault tolerance exclude each other".into());
            }
            let common = common(ft, &blueprint, &shared, &events, Disks::new())?;
            FtSide::primary(common).map_err(|e| e.to_string())
        }) as TurnOn
    });
    let home = home(&blueprint, &machine, &shared);
    let processors = processors(&blueprint, &events);
    let mut runtime = Runtime::new(machine, outside, shared, events, receiver, options);
    runtime.home = Some(home);
    runtime.processors = Some(processors);
    runtime.home_accel = blueprint.config.accel;
    runtime.turn_on = turn_on;
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
    if let Some(name) = &config.host.loadvm {
        runtime.input(MachineInput::Paused(true));
        let (reply, done) = std::sync::mpsc::channel();
        let loaded = snapshot::begin(&mut runtime, Wish::Load { name: name.clone(), of: None }, reply);
        loaded.and_then(|()| done.recv().unwrap_or(Ok(()))).map_err(|e| format!("-loadvm {name}: {e}"))?;
        if !config.host.start_paused {
            runtime.cont();
        }
    } else if config.host.start_paused {
        runtime.input(MachineInput::Paused(true));
    } else {
        runtime.set_running(true, RunState::Running);
    }
    runtime.restart_pace();
    Ok(Prepared::Live(Box::new(runtime)))
}

/// The machine of a blueprint, on the accelerator that was chosen.
fn build(blueprint: &Blueprint, shared: &Shared, events: &Events) -> Result<Machine, String> {
    let machine = match blueprint.config.accel {
        Accel::Tcg => blueprint.build(),
        Accel::Kvm => blueprint.build_on_kvm(wake(events)),
    };
    let machine = machine.map_err(|e| e.to_string())?;
    shared.set_accel(blueprint.config.accel, machine.thread_ids());
    Ok(machine)
}

/// Makes other processors for the machine of a blueprint.
fn processors(blueprint: &Blueprint, events: &Events) -> MakeProcessors {
    let (blueprint, events) = (blueprint.clone(), events.clone());
    Box::new(move |accel, mem| blueprint.processors(accel, mem, wake(&events)).map_err(|e| e.to_string()))
}

/// Makes the machine thread look at a machine whose processors run by themselves.
fn wake(events: &Events) -> Box<dyn Fn() + Send + Sync> {
    let events = events.clone();
    Box::new(move || {
        let _ = events.send(Event::Woken);
    })
}

/// What the machine needs of this host when it moves.
fn home(blueprint: &Blueprint, machine: &Machine, shared: &Arc<Shared>) -> Home {
    let features = blueprint.cpu_model.features().join(" ");
    let shared = Arc::clone(shared);
    Home {
        identity: crate::migration::identity(machine, &blueprint.config, &features),
        firmware: blueprint.pc.firmware.clone(),
        open: Box::new(move |outside, events| open_images(&shared, outside, events)),
    }
}

/// Open the images of a machine that is not one of a pair, and the networks of cards that were plugged in, where they are not
/// open.
fn open_images(shared: &Shared, outside: &Arc<Outside>, events: &Events) -> Result<(), String> {
    let backends = shared.backends().clone();
    attach_hot_nets(&backends, outside, events)?;
    for (i, drive) in backends.from_below() {
        if outside.disk_image(i).is_some() {
            continue;
        }
        let find = |name: &str| outside.find_node(name).map(|(_, node)| node);
        if let Some(image) = open_live(drive, false, false, &find).map_err(|e| e.to_string())? {
            attach_image(i, drive, image, false, outside, events)?;
        }
    }
    Ok(())
}

fn attach_image(
    index: usize,
    drive: &DriveConfig,
    image: Arc<Node>,
    durable: bool,
    outside: &Outside,
    events: &Events,
) -> Result<(), String> {
    let settings = queue_settings(drive, durable);
    let worker = DiskWorker::start(index, &drive.id, image, settings, events.clone(), outside.news());
    outside.attach_disk(index, worker.map_err(|e| e.to_string())?);
    Ok(())
}

fn attach_hot_nets(
    backends: &crate::host::backends::Backends,
    outside: &Arc<Outside>,
    events: &Events,
) -> Result<(), String> {
    for (index, nic) in backends.hot_nics() {
        let Some(dev) = backends.netdevs.iter().find(|d| d.id == nic.netdev) else { continue };
        if outside.has_net(index) {
            continue;
        }
        let net = open_net(dev, net_receiver(index as u32, events.clone()))
            .map_err(|e| format!("-netdev {}: {e}", dev.id))?;
        outside.attach_net(index, net);
    }
    Ok(())
}

/// A machine that will come from elsewhere: everything is there but its images, which its source still writes.
fn prepare_incoming(
    config: &Config,
    uri: &Uri,
    shared: &Arc<Shared>,
    events: Events,
    receiver: Receiver<Event>,
) -> Result<Prepared, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    shared.set_state(RunState::InMigrate);
    shared.migration.state().incoming = true;
    let mut sizes = Vec::new();
    for drive in &config.machine.drives {
        let look = OpenOptions { read_only: true, force_share: true, ..open_options(drive) };
        let image = open_drive(drive, &look).map_err(|e| text(&e))?;
        sizes.push(image.map_or(0, |i| i.size()));
    }
    let blueprint =
        Blueprint::new(&config.machine, &config.host.firmware_dirs, &sizes).map_err(|e| text(&e))?;
    let machine = build(&blueprint, shared, &events)?;
    let (outside, control) = open_outside(&blueprint, shared, &events)?;
    attach_nets(&blueprint, &outside, &events)?;
    let options = run_options(config);
    let home = home(&blueprint, &machine, shared);
    let mut runtime = Runtime::new(machine, outside, Arc::clone(shared), events.clone(), receiver, options);
    runtime.home = Some(home);
    runtime.errors.drives = error_policies(&blueprint);
    runtime.incoming = Some(Incoming::default());
    runtime.autostart = !config.host.start_paused;
    runtime.images_away = true;
    runtime.input(MachineInput::Paused(true));
    if *uri != Uri::Defer {
        incoming::start(uri, shared, &events).map_err(|e| format!("-incoming: {e}"))?;
    }
    start_monitors(config, &control)?;
    Ok(Prepared::Live(Box::new(runtime)))
}

fn run_options(config: &Config) -> RunOptions {
    RunOptions {
        no_reboot: config.host.no_reboot,
        no_shutdown: config.host.no_shutdown,
        pause_on_panic: false,
        sleep: config.machine.icount.sleep,
        adaptive: config.machine.icount.shift.is_none(),
    }
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
            if ftvm_block::iscsi::is_lun(std::path::Path::new(f)) {
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
        let tracked = Tracked::new(Box::new(Arc::clone(&image)));
        *medium = Some(image.behind(Arc::clone(&tracked) as _));
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
    let lock: Arc<dyn Arbiter> = if ftvm_block::iscsi::is_lun(std::path::Path::new(&path)) {
        Arc::new(LunArbiter::open(&path, ftvm_block::iscsi::hide_secret(&path)).map_err(fail)?)
    } else {
        Arc::new(FileLock::new(&path).map_err(fail)?)
    };
    let file = |(drive, disk): (&DriveConfig, &Option<_>)| {
        disk.as_ref().and(drive.file.as_ref()).filter(|f| !f.contains("://")).map(std::path::PathBuf::from)
    };
    let images: Vec<_> = blueprint.config.drives.iter().zip(&disks).filter_map(file).collect();
    let generations = (ft.separate && !ftvm_block::iscsi::is_lun(std::path::Path::new(&path)))
        .then(|| Arc::new(Generations::new(std::path::Path::new(&path), &images)));
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
    let joined = join(&peer, &ft.listen, ft.retry).map_err(|e| text(&e))?;
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
    let reads = if joined.reads_disk { Reads::Disk } else { Reads::Log };
    if separate && ft.lock.is_none() {
        let reason =
            "the primary has disks=separate: the backup needs lock=PATH, where the primary's lock is";
        return Err(text(&joined.refuse(reason.into())));
    }
    let ft = crate::cli::ft::FtConfig {
        heartbeat: joined.timing.0,
        timeout: joined.timing.1,
        separate,
        reads,
        ..ft
    };
    let prepared = (|| {
        let machine = blueprint.build().map_err(|e| e.to_string())?;
        let (outside, control) = open_outside(&blueprint, shared, &events)?;
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
                let node = image.map(|image| Node::named(&drive.id, image)).transpose();
                images.push(node.map_err(|e| e.to_string())?);
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
        // What the other host has written is in them when this side goes live, and not what it has noted.
        images.iter().flatten().for_each(|node| node.distrust_bitmaps());
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
            attach_image(i, drive, image, false, &outside, &events)?;
        }
    }
    // Networks are opened now, so that a wrong name is found now; frames are taken when live.
    attach_nets(&blueprint, &outside, &events)?;
    let backends_of = Arc::clone(shared);
    let attach = move |outside: &Arc<Outside>, events: &Events| -> Result<(), String> {
        let backends = backends_of.backends().clone();
        attach_hot_nets(&backends, outside, events)?;
        for (i, drive) in backends.drives.iter().enumerate() {
            let Some(drive) = drive else { continue };
            if tracked.get(i) == Some(&true) {
                continue;
            }
            let find = |name: &str| outside.find_node(name).map(|(_, node)| node);
            let image = open_live(drive, !separate, !separate, &find);
            if let Some(image) = image.map_err(|e| e.to_string())? {
                attach_image(i, drive, image, !separate, outside, events)?;
            }
        }
        Ok(())
    };
    let macs = blueprint.pc.nics.iter().map(|n| n.mac).collect();
    let backends_of = Arc::clone(shared);
    let open = Box::new(move |drive| open_shared(&backends_of, drive));
    let reads = Arc::new(BackupReads::new(open, events.clone()));
    let host = HostSide { attach: Box::new(attach), macs, reads };
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

/// The file of a drive's image, for a backup's reads.
fn open_shared(shared: &Shared, drive: u32) -> Result<Arc<dyn ftvm_block::Store>, String> {
    let drives = shared.backends().drives.clone();
    let file = drives.get(drive as usize).and_then(|d| d.as_ref()?.file.clone());
    let file = file.ok_or_else(|| format!("drive {drive} has no image here"))?;
    let look = ftvm_block::OpenOptions { read_only: true, force_share: true, ..Default::default() };
    let direct = ftvm_block::OpenOptions { direct: true, ..look.clone() };
    let path = std::path::Path::new(&file);
    // What this host's cache holds may be old. Where it cannot be avoided, the checksum finds it.
    ftvm_block::open_store(path, &direct)
        .or_else(|_| ftvm_block::open_store(path, &look))
        .map_err(|e| e.to_string())
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
