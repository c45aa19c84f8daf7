//! The objects on the bus. The comments of the members are what introspection and org.ftvm(5) say.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use serde_json::{json, Value};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{fdo, interface, Connection, OwnedObjectPath, OwnedVariant, Variant};

use crate::access::Bus;
use crate::cluster::Cluster;
use crate::machine::{Failover, Machine, Status};
use crate::registry::{self, Registry};
use crate::service::Publisher;
use crate::Error;

/// A dictionary of values.
pub type Dict = HashMap<String, OwnedVariant>;

/// Do blocking work on a thread of its own; the bus is served meanwhile.
pub async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> fdo::Result<T> {
    struct Slot<T>(Mutex<(Option<std::thread::Result<T>>, Option<Waker>)>);
    struct Job<T>(Arc<Slot<T>>);
    impl<T> Future for Job<T> {
        type Output = std::thread::Result<T>;
        fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
            let mut slot = self.0 .0.lock().unwrap_or_else(PoisonError::into_inner);
            match slot.0.take() {
                Some(value) => Poll::Ready(value),
                None => {
                    slot.1 = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        }
    }
    let slot = Arc::new(Slot(Mutex::new((None, None))));
    let theirs = Arc::clone(&slot);
    std::thread::Builder::new()
        .name("work".into())
        .spawn(move || {
            let value = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let mut slot = theirs.0.lock().unwrap_or_else(PoisonError::into_inner);
            slot.0 = Some(value);
            if let Some(waker) = slot.1.take() {
                waker.wake();
            }
        })
        .map_err(|e| fdo::Error::LimitsExceeded(format!("no thread: {e}")))?;
    Job(slot).await.map_err(|_| fdo::Error::Failed("an internal error; the log says more".into()))
}

/// `org.ftvm.Manager1`.
pub struct Manager {
    pub registry: Arc<Registry>,
    pub cluster: Arc<Cluster>,
    pub publisher: Arc<Publisher>,
    pub bus: Bus,
}

impl Manager {
    fn found(&self, machine: Option<Arc<Machine>>, what: &str) -> fdo::Result<OwnedObjectPath> {
        let machine = machine.ok_or_else(|| Error::Unknown(what.to_owned()))?;
        Ok(registry::path(&machine.name))
    }
}

/// The machines of this host.
#[interface(name = "org.ftvm.Manager1")]
impl Manager {
    /// Write the definition of a machine: ftvm's arguments, one a line. One that has no UUID gets one. A definition
    /// that exists is replaced; a running machine keeps its arguments until its next start.
    #[zbus(out_args("machine"))]
    async fn define(
        &self,
        name: String,
        definition: String,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<OwnedObjectPath> {
        self.bus.check(connection, &header, "define").await?;
        let (registry, publisher, path) =
            (Arc::clone(&self.registry), Arc::clone(&self.publisher), registry::path(&name));
        off_thread(move || registry.define(&name, &definition).map(|()| publisher.scan())).await??;
        Ok(path)
    }

    /// Remove the definition of a machine that is shut off. Its disks are left alone.
    async fn undefine(
        &self,
        name: String,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<()> {
        self.bus.check(connection, &header, "undefine").await?;
        let (registry, publisher) = (Arc::clone(&self.registry), Arc::clone(&self.publisher));
        off_thread(move || registry.undefine(&name).map(|()| publisher.scan())).await??;
        Ok(())
    }

    /// Start a machine by name.
    #[zbus(out_args("machine"))]
    async fn start(
        &self,
        name: String,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<OwnedObjectPath> {
        self.bus.check(connection, &header, "start").await?;
        let machine = self.registry.find(&name).ok_or_else(|| Error::Unknown(name.clone()))?;
        let cluster = Arc::clone(&self.cluster);
        off_thread(move || cluster.start_machine(&machine)).await??;
        Ok(registry::path(&name))
    }

    /// All machines: object, name and state.
    #[zbus(out_args("machines"))]
    async fn list(&self) -> Vec<(OwnedObjectPath, String, String)> {
        let machines = self.registry.all();
        machines.iter().map(|m| (registry::path(&m.name), m.name.clone(), m.status().state)).collect()
    }

    /// The object of the machine of this name.
    #[zbus(out_args("machine"))]
    async fn lookup_by_name(&self, name: String) -> fdo::Result<OwnedObjectPath> {
        self.found(self.registry.find(&name), &name)
    }

    /// The object of the machine of this UUID.
    #[zbus(out_args("machine"))]
    async fn lookup_by_uuid(&self, uuid: String) -> fdo::Result<OwnedObjectPath> {
        self.found(self.registry.find_uuid(&uuid), &uuid)
    }

    /// This host: host-name (s), kernel (s), processors (u), load (d: of the last minute), memory and memory-available
    /// (t: bytes), machines and running (u).
    #[zbus(out_args("inventory"))]
    async fn host_inventory(&self) -> fdo::Result<Dict> {
        let machines = self.registry.all();
        let running = machines.iter().filter(|m| m.status().pid != 0).count() as u32;
        let count = machines.len() as u32;
        let mut dict = off_thread(registry::inventory).await?;
        dict.insert("machines".into(), Variant::from(count));
        dict.insert("running".into(), Variant::from(running));
        owned(dict)
    }

    /// The other hosts, by name: address (s), answers (b), problem (s: why it does not answer), and of its last answer
    /// version (s), processors (u), load (d), memory and memory-available (t: bytes), maintenance (b), machines (as: those
    /// that run there).
    #[zbus(out_args("peers"))]
    async fn peers(&self) -> fdo::Result<HashMap<String, Dict>> {
        let one = |peer: Arc<crate::cluster::peers::Known>| Ok((peer.name.clone(), owned(peer_dict(&peer))?));
        self.cluster.peers().into_iter().map(one).collect()
    }

    /// Whether this host and a peer are fit to run a pair. Options: lock-dir (s: a directory of the shared storage, where
    /// both hosts then race for names), memory (t: of the machine, in MiB). Each finding: what was looked at, whether it is
    /// fit, what was seen or is wrong, and the mend.
    #[zbus(out_args("findings"))]
    async fn check_peer(
        &self,
        peer: String,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<Vec<(String, bool, String, String)>> {
        self.bus.check(connection, &header, "check-peer").await?;
        let (mut dir, mut memory) = (None, None);
        for (key, value) in options {
            match (key.as_str(), &*value) {
                ("lock-dir", Variant::Str(s)) => dir = Some(s.as_str().to_owned()),
                ("memory", Variant::U64(n)) => memory = Some(*n),
                _ => return Err(fdo::Error::InvalidArgs(format!("there is no option '{key}' of this type"))),
            }
        }
        let cluster = Arc::clone(&self.cluster);
        let work = move || crate::check::remote::run(&cluster, &peer, dir.as_deref(), memory);
        let findings = off_thread(work).await?;
        let one = |f: crate::check::Finding| match f.result {
            Ok(seen) => (f.what, true, seen, String::new()),
            Err((cause, mend)) => (f.what, false, cause, mend),
        };
        Ok(findings.into_iter().map(one).collect())
    }

    /// Give all machines away, and take none until LeaveMaintenance: primaries are switched over to their backups,
    /// backups are made anew on other hosts. Returns at once; see Maintenance.
    async fn enter_maintenance(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<()> {
        self.bus.check(connection, &header, "maintenance").await?;
        let cluster = Arc::clone(&self.cluster);
        Ok(off_thread(move || cluster.enter_maintenance()).await??)
    }

    /// Take machines again.
    async fn leave_maintenance(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<()> {
        self.bus.check(connection, &header, "maintenance").await?;
        let cluster = Arc::clone(&self.cluster);
        Ok(off_thread(move || cluster.leave_maintenance()).await??)
    }

    /// off, entering (machines are still here) or on (none is: the host may be switched off).
    #[zbus(property)]
    fn maintenance(&self) -> String {
        self.cluster.maintenance.state().0
    }

    /// What keeps Maintenance from being on, one sentence a machine.
    #[zbus(property)]
    fn maintenance_waits(&self) -> Vec<String> {
        self.cluster.maintenance.state().1
    }

    /// This host, as its peers name it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn host_name(&self) -> String {
        self.cluster.settings.name.clone()
    }

    /// The version of the service.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }
}

fn peer_dict(peer: &crate::cluster::peers::Known) -> BTreeMap<&'static str, Variant<'static>> {
    let problem = peer.problem();
    let mut dict = BTreeMap::from([("address", Variant::from(peer.address()))]);
    let state = peer.state();
    let answers = state.as_ref().is_some_and(|(_, at)| at.elapsed() < crate::cluster::FRESH);
    dict.insert("answers", Variant::from(answers));
    dict.insert("problem", Variant::from(problem));
    if let Some((state, _)) = state {
        let running = state.machines.into_iter().filter(|m| m.runs).map(|m| m.name);
        dict.insert("machines", Variant::from(running.collect::<Vec<String>>()));
        dict.insert("version", Variant::from(state.version));
        dict.insert("processors", Variant::from(state.processors));
        dict.insert("load", Variant::from(state.load));
        dict.insert("memory", Variant::from(state.memory));
        dict.insert("memory-available", Variant::from(state.available));
        dict.insert("maintenance", Variant::from(state.maintenance));
    }
    dict
}

/// Make a dictionary fit for the bus.
pub fn owned<K: Into<String>>(dict: BTreeMap<K, Variant<'_>>) -> fdo::Result<Dict> {
    let pair = |(key, value): (K, Variant<'_>)| {
        let value = value.try_into_owned().map_err(|e| fdo::Error::Failed(e.to_string()))?;
        Ok((key.into(), value))
    };
    dict.into_iter().map(pair).collect()
}

/// `org.ftvm.Machine1`.
pub struct MachineObject {
    pub machine: Arc<Machine>,
    pub cluster: Arc<Cluster>,
    pub bus: Bus,
}

/// A command of the machine, in QMP, after the check of the caller's rights.
async fn tell(
    machine: &Arc<Machine>,
    (bus, connection, header): (Bus, &Connection, &Header<'_>),
    (action, command): (&str, &'static str),
    arguments: Value,
) -> fdo::Result<()> {
    bus.check(connection, header, action).await?;
    let machine = Arc::clone(machine);
    off_thread(move || machine.command(command, arguments)).await??;
    Ok(())
}

/// A machine.
#[interface(name = "org.ftvm.Machine1")]
impl MachineObject {
    /// Start it. On return its process runs and its sockets listen.
    async fn start(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<()> {
        self.bus.check(connection, &header, "start").await?;
        let (machine, cluster) = (Arc::clone(&self.machine), Arc::clone(&self.cluster));
        off_thread(move || cluster.start_machine(&machine)).await??;
        Ok(())
    }

    /// Press its power button: the guest shuts down, if it will.
    async fn shutdown(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("shutdown", "system_powerdown"), Value::Null).await
    }

    /// Press its reset button.
    async fn reset(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("reset", "system_reset"), Value::Null).await
    }

    /// Let it stand still.
    async fn pause(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("pause", "stop"), Value::Null).await
    }

    /// Let it go on.
    async fn resume(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("resume", "cont"), Value::Null).await
    }

    /// Cut its power. Of a pair the backup ends as well. On return the process is gone.
    async fn destroy(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> fdo::Result<()> {
        self.bus.check(connection, &header, "destroy").await?;
        let machine = Arc::clone(&self.machine);
        off_thread(move || machine.destroy()).await??;
        Ok(())
    }

    /// shutoff, unknown (it does not answer), or what QMP's query-status says: running, paused, prelaunch, shutdown,
    /// inmigrate (a backup), internal-error, guest-panicked, io-error.
    #[zbus(property)]
    fn state(&self) -> String {
        self.machine.status().state
    }

    /// Its name, which is that of its definition.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.machine.name.clone()
    }

    /// Its UUID, or empty.
    #[zbus(property(emits_changed_signal = "false"))]
    fn uuid(&self) -> String {
        self.machine.uuid()
    }

    /// Its process, or 0.
    #[zbus(property)]
    fn pid(&self) -> u32 {
        self.machine.status().pid
    }

    /// Its QMP socket for other programs; empty, if this service did not start it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn qmp_socket(&self) -> String {
        self.machine.qmp_socket().map(|s| s.display().to_string()).unwrap_or_default()
    }

    /// defined (by a file of this host), backup (started for a peer, without a definition) or foreign (started by a person
    /// or another program; it can be looked at and controlled, but not started).
    #[zbus(property(emits_changed_signal = "false"))]
    fn origin(&self) -> &str {
        self.machine.kind()
    }

    /// The command line of its process, or the one with which it would be started.
    #[zbus(property(emits_changed_signal = "false"))]
    fn command_line(&self) -> fdo::Result<Vec<String>> {
        Ok(self.machine.command_line()?)
    }

    /// Of its process: cpu-time-ms, resident-bytes and run-time-ms (t); empty when it is shut off.
    #[zbus(property(emits_changed_signal = "false"))]
    fn statistics(&self) -> fdo::Result<Dict> {
        let mut dict = BTreeMap::new();
        if let Some((cpu, memory, run)) = self.machine.usage() {
            dict.insert("cpu-time-ms", Variant::from(cpu));
            dict.insert("resident-bytes", Variant::from(memory));
            dict.insert("run-time-ms", Variant::from(run));
        }
        owned(dict)
    }
}

/// `org.ftvm.FaultTolerance1`.
pub struct FaultTolerance {
    pub machine: Arc<Machine>,
    pub cluster: Arc<Cluster>,
    pub bus: Bus,
}

/// The pair that a machine is one of.
#[interface(name = "org.ftvm.FaultTolerance1")]
impl FaultTolerance {
    /// Make a running machine a primary that waits for its backup; where this host has peers, one of them starts it. Options
    /// as of -ft primary: listen and lock (s), heartbeat, timeout and max-lag (an integer: milliseconds). Without listen the
    /// machine gets a free port.
    async fn turn_on(
        &self,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        let mut arguments = json!({});
        for (key, value) in options {
            arguments[&key] = match &*value {
                Variant::Str(s) => json!(s.as_str()),
                Variant::U8(n) => json!(n),
                Variant::I16(n) => json!(n),
                Variant::U16(n) => json!(n),
                Variant::I32(n) => json!(n),
                Variant::U32(n) => json!(n),
                Variant::I64(n) => json!(n),
                Variant::U64(n) => json!(n),
                _ => return Err(fdo::Error::InvalidArgs(format!("'{key}' is to be a string or an integer"))),
            };
        }
        if arguments.get("listen").is_none() {
            arguments["listen"] =
                json!(format!("0.0.0.0:{}", self.cluster.registry.port(&self.machine.name)?));
        }
        tell(&self.machine, (self.bus, c, &h), ("ft-turn-on", "ft-turn-on"), arguments).await
    }

    /// Let the backup go; the machine runs on without fault tolerance.
    async fn turn_off(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("ft-turn-off", "ft-turn-off"), Value::Null).await
    }

    /// Let the backup go and refuse others until Resume.
    async fn suspend(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("ft-suspend", "ft-suspend"), Value::Null).await
    }

    /// Take backups again.
    async fn resume(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("ft-resume", "ft-resume"), Value::Null).await
    }

    /// A planned switch: the backup goes live, and this side becomes its backup.
    async fn test_failover(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("ft-test-failover", "ft-test-failover"), Value::Null).await
    }

    /// The backup gives up and joins anew.
    async fn test_restart(
        &self,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<()> {
        tell(&self.machine, (self.bus, c, &h), ("ft-test-restart", "ft-test-restart"), Value::Null).await
    }

    /// Have another host start a backup that takes the place of the present one: this peer, or where there is most room if it
    /// is empty. Which host it is now.
    #[zbus(out_args("host"))]
    async fn migrate_backup(
        &self,
        host: String,
        #[zbus(connection)] c: &Connection,
        #[zbus(header)] h: Header<'_>,
    ) -> fdo::Result<String> {
        self.bus.check(c, &h, "ft-migrate-backup").await?;
        let (machine, cluster) = (Arc::clone(&self.machine), Arc::clone(&self.cluster));
        let work = move || {
            let to = Some(host.as_str()).filter(|h| !h.is_empty());
            if let Some(to) = to {
                cluster.peer(to)?;
            }
            let from = cluster.backup_host(&machine.uuid()).unwrap_or_default();
            if to == Some(from.as_str()) {
                return Err(Error::State(format!("the backup is on {from} already")));
            }
            cluster.move_backup(&machine.uuid(), &from, to)
        };
        Ok(off_thread(work).await??)
    }

    /// The peer on which the other side runs, or empty.
    #[zbus(property(emits_changed_signal = "false"))]
    fn peer_host(&self) -> String {
        self.cluster.runs_elsewhere(&self.machine.uuid()).unwrap_or_default()
    }

    /// none, primary or backup.
    #[zbus(property)]
    fn role(&self) -> String {
        self.machine.status().ft.role
    }

    /// off, unprotected, synchronizing or protected (a primary), following (a backup), live (just taken over).
    #[zbus(property)]
    fn state(&self) -> String {
        self.machine.status().ft.state
    }

    /// The other side's address, or empty.
    #[zbus(property)]
    fn peer(&self) -> String {
        self.machine.status().ft.peer
    }

    /// How far the backup's execution is behind, in milliseconds.
    #[zbus(property)]
    fn lag(&self) -> f64 {
        self.machine.status().ft.lag
    }

    /// What the logging channel carries, in Mbit/s.
    #[zbus(property)]
    fn log_bandwidth(&self) -> f64 {
        self.machine.status().ft.bandwidth
    }

    /// By how much the primary is slowed for its backup, in per cent.
    #[zbus(property)]
    fn throttle(&self) -> f64 {
        self.machine.status().ft.throttle
    }

    /// The last failover to (or alone) here: reason (s), detected-ms and takeover-ms (d: from the last sign of life to
    /// the decision, and from there to being live), count (t); empty if there was none.
    #[zbus(property)]
    fn last_failover(&self) -> fdo::Result<Dict> {
        owned(last_failover(&self.machine.status()))
    }

    /// The role or state of this side changed. The pair's epoch grows with every backup.
    #[zbus(signal, name = "StateChanged")]
    pub async fn told_state(
        emitter: &SignalEmitter<'_>,
        role: &str,
        state: &str,
        epoch: u64,
        peer: &str,
    ) -> zbus::Result<()>;

    /// This side went on alone; times as in LastFailover.
    #[zbus(signal)]
    pub async fn failed_over(
        emitter: &SignalEmitter<'_>,
        reason: &str,
        detected_ms: f64,
        takeover_ms: f64,
    ) -> zbus::Result<()>;

    /// A machine that had lost its backup, or has taken over, is protected again.
    #[zbus(signal)]
    pub async fn reprotected(emitter: &SignalEmitter<'_>, epoch: u64, peer: &str) -> zbus::Result<()>;

    /// This backup's state differed from the primary's in these parts; it starts over.
    #[zbus(signal)]
    pub async fn diverged(emitter: &SignalEmitter<'_>, position: u64, parts: Vec<String>)
        -> zbus::Result<()>;
}

fn last_failover(status: &Status) -> BTreeMap<&'static str, Variant<'static>> {
    let mut dict = BTreeMap::new();
    if let Some(Failover { reason, detected, takeover }) = status.ft.last.clone() {
        dict.insert("reason", Variant::from(reason));
        dict.insert("detected-ms", Variant::from(detected));
        dict.insert("takeover-ms", Variant::from(takeover));
        dict.insert("count", Variant::from(status.ft.failovers));
    }
    dict
}

/// The values of the properties that PropertiesChanged tells, by interface.
pub fn properties(status: &Status) -> [(&'static str, BTreeMap<&'static str, Variant<'static>>); 2] {
    let ft = &status.ft;
    [
        (
            "org.ftvm.Machine1",
            BTreeMap::from([
                ("State", Variant::from(status.state.clone())),
                ("Pid", Variant::from(status.pid)),
            ]),
        ),
        (
            "org.ftvm.FaultTolerance1",
            BTreeMap::from([
                ("Role", Variant::from(ft.role.clone())),
                ("State", Variant::from(ft.state.clone())),
                ("Peer", Variant::from(ft.peer.clone())),
                ("Lag", Variant::from(ft.lag)),
                ("LogBandwidth", Variant::from(ft.bandwidth)),
                ("Throttle", Variant::from(ft.throttle)),
                ("LastFailover", Variant::from(last_failover(status))),
            ]),
        ),
    ]
}
