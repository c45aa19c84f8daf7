//! `ftvmd`: the objects come and go with the machines, and what happens to these is told on the bus.

use std::path::Path;
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_lite::future::block_on;
use zbus::object_server::SignalEmitter;
use zbus::{fdo, Connection};

use crate::access::Bus;
use crate::bus::{properties, FaultTolerance, MachineObject, Manager};
use crate::cluster::Cluster;
use crate::config::Settings;
use crate::machine::{Dirs, Machine, Notice, Origin};
use crate::registry::{path, Registry};
use crate::{BUS_NAME, ROOT};

/// How often the directories are looked into for definitions that someone wrote or removed.
const SCAN: Duration = Duration::from_secs(1);

/// Brings machines to the bus and takes them from it.
pub struct Publisher {
    registry: Arc<Registry>,
    cluster: Arc<Cluster>,
    bus: Bus,
    /// One scan at a time; the connection once there is one.
    connection: Mutex<Option<Connection>>,
}

impl Publisher {
    /// Bring the bus up to what is in the directories.
    pub fn scan(&self) {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(connection) = &*connection else { return };
        let (added, gone) = self.registry.scan();
        let server = connection.object_server();
        let result: zbus::Result<()> = block_on(async {
            for machine in gone {
                let path = path(&machine.name);
                server.remove::<FaultTolerance, _>(&path).await?;
                server.remove::<MachineObject, _>(&path).await?;
            }
            for machine in added {
                let path = path(&machine.name);
                let (bus, cluster) = (self.bus, Arc::clone(&self.cluster));
                let object = MachineObject { machine: Arc::clone(&machine), cluster, bus };
                server.at(&path, object).await?;
                let cluster = Arc::clone(&self.cluster);
                server.at(&path, FaultTolerance { machine, cluster, bus }).await?;
            }
            Ok(())
        });
        if let Err(e) = result {
            log::error!("the bus: {e}");
        }
    }
}

/// Serve until the bus goes away. `state`: where it is kept what must outlive a restart of the host.
pub fn run(dirs: Dirs, settings: Settings, state: &Path, bus: Bus) -> Result<(), String> {
    let (sender, notices) = channel();
    let registry = Registry::new(dirs, settings.ports, sender).map_err(|e| e.to_string())?;
    let registry = Arc::new(registry);
    let cluster = Cluster::new(settings, Arc::clone(&registry), state).map_err(|e| e.to_string())?;
    let publisher = Arc::new(Publisher {
        registry: Arc::clone(&registry),
        cluster: Arc::clone(&cluster),
        bus,
        connection: Mutex::default(),
    });
    let manager = Manager { registry, cluster: Arc::clone(&cluster), publisher: Arc::clone(&publisher), bus };
    let builder = match bus {
        Bus::System => zbus::connection::Builder::system(),
        Bus::Session => zbus::connection::Builder::session(),
    };
    let text = |e: zbus::Error| format!("the bus: {e}");
    let connection =
        block_on(builder.serve_at(ROOT, fdo::ObjectManager).serve_at(ROOT, manager).build()).map_err(text)?;
    *publisher.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.clone());
    publisher.scan();
    let telling = connection.clone();
    std::thread::spawn(move || tell(&telling, &notices));
    let telling = connection.clone();
    cluster.maintenance.listen(move |state, waits| {
        if let Err(e) = block_on(tell_maintenance(&telling, state, waits)) {
            log::error!("the bus: {e}");
        }
    });
    cluster.start().map_err(|e| e.to_string())?;
    // The name comes last: who finds it finds the machines.
    block_on(connection.request_name(BUS_NAME)).map_err(text)?;
    log::info!("serving {BUS_NAME}");
    while !connection.is_closed() {
        std::thread::sleep(SCAN);
        publisher.scan();
    }
    Err("the bus: the connection was closed".into())
}

/// Tell the bus what happens, in order.
fn tell(connection: &Connection, notices: &Receiver<(Arc<Machine>, Notice)>) {
    while let Ok((machine, notice)) = notices.recv() {
        if let Err(e) = block_on(tell_one(connection, &machine, notice)) {
            log::error!("the bus: {}: {e}", machine.name);
        }
    }
}

async fn tell_maintenance(connection: &Connection, state: &str, waits: &[String]) -> zbus::Result<()> {
    let changed = std::collections::BTreeMap::from([
        ("Maintenance", zbus::Variant::from(state)),
        ("MaintenanceWaits", zbus::Variant::from(waits.to_vec())),
    ]);
    let body = ("org.ftvm.Manager1", changed, Vec::<&str>::new());
    let emitter = SignalEmitter::new(connection, ROOT)?;
    emitter.emit("org.freedesktop.DBus.Properties", "PropertiesChanged", &body).await
}

/// Machined may have to be started first: what happens is told meanwhile.
fn introduce(connection: &Connection, machine: &Arc<Machine>, pid: u32) {
    let (connection, machine) = (connection.clone(), Arc::clone(machine));
    std::thread::spawn(move || block_on(crate::machined::register(&connection, &machine, pid)));
}

async fn tell_one(connection: &Connection, machine: &Arc<Machine>, notice: Notice) -> zbus::Result<()> {
    let emitter = SignalEmitter::new(connection, path(&machine.name))?;
    match notice {
        Notice::Changed(change) => {
            let (old, new) = *change;
            if new.pid != 0 && new.pid != old.pid && machine.origin == Origin::Service {
                introduce(connection, machine, new.pid);
            }
            for ((interface, was), (_, is)) in properties(&old).into_iter().zip(properties(&new)) {
                let changed: std::collections::BTreeMap<_, _> =
                    is.into_iter().filter(|(key, value)| was.get(key) != Some(value)).collect();
                if !changed.is_empty() {
                    let body = (interface, changed, Vec::<&str>::new());
                    emitter.emit("org.freedesktop.DBus.Properties", "PropertiesChanged", &body).await?;
                }
            }
            let (old, ft) = (old.ft, new.ft);
            if (&old.role, &old.state) != (&ft.role, &ft.state) {
                FaultTolerance::told_state(&emitter, &ft.role, &ft.state, ft.epoch, &ft.peer).await?;
                // The first epoch of a pairing protects; a later one protects again.
                if ft.state == "protected" && (ft.epoch > 1 || ft.failovers > 0) {
                    FaultTolerance::reprotected(&emitter, ft.epoch, &ft.peer).await?;
                }
            }
            Ok(())
        }
        Notice::FailedOver(f) => {
            FaultTolerance::failed_over(&emitter, &f.reason, f.detected, f.takeover).await
        }
        Notice::Diverged(position, parts) => FaultTolerance::diverged(&emitter, position, parts).await,
    }
}

/// The command line of `ftvmd`.
pub fn command() -> clap::Command {
    let option = |name: &'static str, value: &'static str, default: &'static str, help: &'static str| {
        clap::Arg::new(name).long(name).value_name(value).default_value(default).help(help)
    };
    clap::Command::new("ftvmd")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The D-Bus service of the ftvm machines of this host")
        .arg(
            clap::Arg::new("session")
                .long("session")
                .action(clap::ArgAction::SetTrue)
                .help("Serve on the session bus instead of the system bus"),
        )
        .arg(option("config", "FILE", "/etc/ftvm/ftvmd.conf", "This host among its peers; may be absent"))
        .arg(option("config-dir", "DIR", "/etc/ftvm/machines", "Where the definitions are"))
        .arg(option("run-dir", "DIR", "/run/ftvm", "Where sockets, pidfiles and logs go"))
        .arg(option("state-dir", "DIR", "/var/lib/ftvm", "Where it is kept that this host is in maintenance"))
        .arg(option("ftvm", "PROGRAM", "ftvm", "The program that runs a machine"))
}

/// The objects' interfaces, as they are introspected: name and XML.
pub fn interfaces() -> Vec<(&'static str, String)> {
    let (sender, _) = channel();
    let nowhere = std::path::PathBuf::from("/nonexistent");
    let dirs = Dirs {
        config: nowhere.clone(),
        run: nowhere.clone(),
        ftvm: "ftvm".into(),
        registry: nowhere.clone(),
    };
    let bus = Bus::Session;
    let machine = Machine::new("name", Origin::Service, &dirs, &sender);
    machine.remove();
    let registry = Arc::new(Registry::unread(dirs, (1, 1), sender));
    // Of a host without peers.
    let Ok(cluster) = Cluster::new(Settings::default(), Arc::clone(&registry), &nowhere) else {
        return Vec::new();
    };
    let publisher = Arc::new(Publisher {
        registry: Arc::clone(&registry),
        cluster: Arc::clone(&cluster),
        bus,
        connection: Mutex::default(),
    });
    let xml = crate::page::interface_xml;
    let object = MachineObject { machine: Arc::clone(&machine), cluster: Arc::clone(&cluster), bus };
    vec![
        ("org.ftvm.Manager1", xml(&Manager { registry, cluster: Arc::clone(&cluster), publisher, bus })),
        ("org.ftvm.Machine1", xml(&object)),
        ("org.ftvm.FaultTolerance1", xml(&FaultTolerance { machine, cluster, bus })),
    ]
}
