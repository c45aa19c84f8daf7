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
        off_thread(move || machine.start()).await??;
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
        let machines = self.registry.all();
        let found = machines.into_iter().find(|m| !uuid.is_empty() && m.uuid().eq_ignore_ascii_case(&uuid));
        self.found(found, &uuid)
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

    /// The version of the service.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }
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
        let machine = Arc::clone(&self.machine);
        off_thread(move || machine.start()).await??;
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

    /// Its UUID as defined, or empty.
    #[zbus(property(emits_changed_signal = "false"))]
    fn uuid(&self) -> String {
        self.machine.uuid()
    }

    /// Its process, or 0.
    #[zbus(property)]
    fn pid(&self) -> u32 {
        self.machine.status().pid
    }

    /// Its QMP socket for other programs.
    #[zbus(property(emits_changed_signal = "const"))]
    fn qmp_socket(&self) -> String {
        self.machine.qmp_socket().display().to_string()
    }

    /// The command line of its process, or that with which it would be started.
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
    pub bus: Bus,
}

/// The pair that a machine is one of.
#[interface(name = "org.ftvm.FaultTolerance1")]
impl FaultTolerance {
    /// Make a running machine a primary that waits for its backup. Options as of -ft primary: listen and lock (s),
    /// heartbeat, timeout and max-lag (an integer: milliseconds).
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

    /// The backup's state differed from the primary's in these parts; it starts over.
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
