//! The service on a real bus of its own, with real machines behind it.

use std::collections::HashMap;
use std::net::TcpListener;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ftvm_daemon::ctl::client::{arguments, Client, FT, MACHINE};
use ftvm_harness::service::Process;
use ftvm_harness::{guests, wait_for, Result, Scratch};
use futures_lite::{future::block_on, StreamExt};
use serde_json::{json, Value};
use zbus::{OwnedObjectPath, Variant};

const LONG: Duration = Duration::from_secs(60);

/// A bus with the service on it.
struct Host {
    scratch: Scratch,
    bus: &'static str,
    address: String,
    service: Option<Process>,
    _daemon: Process,
}

impl Host {
    fn start(name: &str, bus: &'static str) -> Result<Host> {
        let scratch = Scratch::new(name)?;
        let address = format!("unix:path={}", scratch.path("bus"));
        let daemon = Process(ftvm_harness::service::bus(&scratch.0.display().to_string(), bus)?);
        let mut host = Host { scratch, bus, address, service: None, _daemon: daemon };
        host.serve()?;
        Ok(host)
    }

    /// Start the service (again) and wait until it has its name.
    fn serve(&mut self) -> Result<()> {
        self.service = None;
        let mut command = Command::new(env!("CARGO_BIN_EXE_ftvmd"));
        if self.bus == "session" {
            command.arg("--session");
        }
        let child = command
            .args(["--config-dir", &self.scratch.path("machines"), "--run-dir", &self.scratch.path("run")])
            .args(["--config", &self.scratch.path("ftvmd.conf"), "--state-dir", &self.scratch.path("state")])
            .args(["--ftvm", &guests::ftvm()?])
            .envs(self.environment())
            .spawn()
            .map_err(|e| format!("ftvmd: {e}"))?;
        self.service = Some(Process(child));
        let client = self.client()?;
        let list = || client.manager::<_, Vec<(OwnedObjectPath, String, String)>>("List", &()).ok();
        wait_for("the service", LONG, list).map(drop)
    }

    fn environment(&self) -> [(&'static str, &str); 2] {
        let address = self.address.as_str();
        [("DBUS_SESSION_BUS_ADDRESS", address), ("DBUS_SYSTEM_BUS_ADDRESS", address)]
    }

    fn client(&self) -> Result<Client> {
        let builder = zbus::connection::Builder::address(self.address.as_str());
        Ok(Client { connection: block_on(builder.build()).map_err(|e| e.to_string())? })
    }

    /// What ftctl prints, as root or as another user.
    fn ftctl(&self, user: Option<u32>, args: &[&str]) -> Result<String> {
        let mut command = match user {
            None => Command::new(env!("CARGO_BIN_EXE_ftctl")),
            Some(user) => {
                let program = self.scratch.path("ftctl");
                std::fs::copy(env!("CARGO_BIN_EXE_ftctl"), &program).map_err(|e| e.to_string())?;
                let mut command = Command::new("setpriv");
                command.args(["--reuid", &user.to_string(), "--clear-groups", &program]);
                command
            }
        };
        if self.bus == "session" {
            command.arg("--session");
        }
        let out = command.args(args).envs(self.environment()).output().map_err(|e| e.to_string())?;
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
        }
    }

    /// Define a tiny guest.
    fn define(&self, name: &str, more: &str) -> Result<String> {
        let (kernel, initrd) = guests::tiny()?;
        let text = format!(
            "# a tiny guest\n-m 192\n-kernel {kernel}\n-initrd {initrd}\n-append console=ttyS0 quiet\n-nic none\n\
             -display none\n-serial file:{}\n{more}",
            self.scratch.path(&format!("{name}.console"))
        );
        let path: OwnedObjectPath = self.client()?.manager("Define", &(name, text))?;
        Ok(path.as_str().to_owned())
    }

    fn wait(&self, path: &str, interface: &str, key: &str, value: &str) -> Result<()> {
        let client = self.client()?;
        let mut last = Value::Null;
        let result = wait_for(&format!("{key} {value} of {path}"), LONG, || {
            last = client.properties(path, interface).unwrap_or_default();
            (last[key] == value).then_some(())
        });
        result.map_err(|e| format!("{e}; last: {last}"))
    }

    fn wait_ready(&self, name: &str) -> Result<()> {
        let console = self.scratch.path(&format!("{name}.console"));
        let ready = || std::fs::read_to_string(&console).ok()?.contains("tiny guest ready").then_some(());
        wait_for("the guest", LONG, ready)
    }

    /// All signals of the service from now on: object, member, arguments.
    fn listen(&self) -> Result<Arc<Mutex<Vec<Value>>>> {
        let client = self.client()?;
        let rule = zbus::MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .path_namespace(ftvm_daemon::ROOT)
            .build()
            .map_err(|e| e.to_string())?;
        let stream = zbus::MessageStream::for_match_rule(rule, &client.connection, None);
        let mut stream = block_on(stream).map_err(|e| e.to_string())?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&seen);
        std::thread::spawn(move || {
            while let Some(Ok(message)) = block_on(stream.next()) {
                let header = message.header();
                let signal = json!([
                    header.path().map(|p| p.as_str()),
                    header.member().map(|m| m.as_str()),
                    arguments(&message)
                ]);
                list.lock().unwrap().push(signal);
            }
        });
        Ok(seen)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Machines outlive their service, but not their test.
        if let Ok(client) = self.client() {
            let machines: Vec<(OwnedObjectPath, String, String)> =
                client.manager("List", &()).unwrap_or_default();
            for (path, ..) in machines {
                let _ = client.call::<_, ()>(path.as_str(), MACHINE, "Destroy", &());
            }
        }
    }
}

fn wait_signal(
    seen: &Mutex<Vec<Value>>,
    path: &str,
    member: &str,
    like: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let found = || {
        let seen = seen.lock().unwrap();
        seen.iter().find(|s| s[0] == path && s[1] == member && like(&s[2])).map(|s| s[2].clone())
    };
    wait_for(&format!("the signal {member} of {path}"), LONG, found)
        .map_err(|e| format!("{e}; seen: {:#}", json!(*seen.lock().unwrap())))
}

#[test]
fn a_machine_lives_on_the_bus_and_outlives_its_service() -> Result<()> {
    let mut host = Host::start("dbus-machine", "session")?;
    let client = host.client()?;
    let seen = host.listen()?;
    let path = host.define("web-1", "")?;
    assert_eq!(path, "/org/ftvm/machine/web_2d1");
    wait_signal(&seen, ftvm_daemon::ROOT, "InterfacesAdded", |a| a[0] == path)?;
    let objects: HashMap<OwnedObjectPath, HashMap<String, HashMap<String, zbus::OwnedVariant>>> =
        client.call(ftvm_daemon::ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", &())?;
    assert!(objects.iter().any(|(p, i)| p.as_str() == path && i.contains_key(MACHINE) && i.contains_key(FT)));

    // Found by name and by the UUID that it was given.
    let off = client.properties(&path, MACHINE)?;
    assert_eq!((off["State"].as_str(), off["Pid"].as_u64()), (Some("shutoff"), Some(0)));
    let uuid = off["Uuid"].as_str().unwrap_or_default().to_owned();
    let by_uuid: OwnedObjectPath = client.manager("LookupByUuid", &uuid)?;
    assert_eq!(by_uuid.as_str(), path);
    assert_eq!(client.find("web-1")?, path);
    assert!(client.find("none").unwrap_err().contains("no machine 'none'"));
    assert!(client.call::<_, ()>(&path, MACHINE, "Pause", &()).unwrap_err().contains("not running"));

    let started: OwnedObjectPath = client.manager("Start", &"web-1")?;
    assert_eq!(started.as_str(), path);
    assert!(client.call::<_, ()>(&path, MACHINE, "Start", &()).unwrap_err().contains("is running"));
    assert!(client.manager::<_, ()>("Undefine", &"web-1").unwrap_err().contains("is running"));
    host.wait(&path, MACHINE, "State", "running")?;
    wait_signal(&seen, &path, "PropertiesChanged", |a| a[1]["State"] == "running" && a[1]["Pid"] != 0)?;
    host.wait_ready("web-1")?;
    client.call::<_, ()>(&path, MACHINE, "Pause", &())?;
    host.wait(&path, MACHINE, "State", "paused")?;
    client.call::<_, ()>(&path, MACHINE, "Resume", &())?;
    host.wait(&path, MACHINE, "State", "running")?;
    client.call::<_, ()>(&path, MACHINE, "Shutdown", &())?;
    client.call::<_, ()>(&path, MACHINE, "Reset", &())?;

    // Protected or not while it runs.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string())?;
    let (listen, lock) = (port.to_string(), host.scratch.path("lock"));
    let wrong = HashMap::from([("heartbeat", Variant::from(0u32))]);
    assert!(client.call::<_, ()>(&path, FT, "TurnOn", &wrong).unwrap_err().contains("heartbeat"));
    let options =
        HashMap::from([("listen", Variant::from(listen.as_str())), ("lock", Variant::from(lock.as_str()))]);
    client.call::<_, ()>(&path, FT, "TurnOn", &options)?;
    wait_signal(&seen, &path, "StateChanged", |s| s[0] == "primary" && s[1] == "unprotected")?;
    client.call::<_, ()>(&path, FT, "TurnOff", &())?;
    host.wait(&path, FT, "State", "off")?;

    let on = client.properties(&path, MACHINE)?;
    assert!(on["Statistics"]["resident-bytes"].as_u64() > Some(0), "{on}");
    assert!(on["CommandLine"].as_array().is_some_and(|l| l.contains(&json!("web-1"))), "{on}");
    let qmp = on["QmpSocket"].as_str().unwrap_or_default();
    let mut qmp = ftvm_harness::qmp::Qmp::connect(qmp)?;
    assert_eq!(qmp.command("query-uuid", Value::Null)?["UUID"], uuid);
    let inventory: HashMap<String, zbus::OwnedVariant> = client.manager("HostInventory", &())?;
    assert!(matches!(&*inventory["running"], Variant::U32(1)), "{inventory:?}");
    let manager = client.properties(ftvm_daemon::ROOT, "org.ftvm.Manager1")?;
    assert_eq!(manager["Version"], env!("CARGO_PKG_VERSION"));

    // Another service finds the same process.
    host.serve()?;
    host.wait(&path, MACHINE, "State", "running")?;
    assert_eq!(client.properties(&path, MACHINE)?["Pid"], on["Pid"]);
    let listed: Value =
        serde_json::from_str(&host.ftctl(None, &["list", "--json"])?).map_err(|e| e.to_string())?;
    assert_eq!(listed[0]["state"], "running");
    assert!(host.ftctl(None, &["status", "web-1"])?.contains(&uuid));

    client.call::<_, ()>(&path, MACHINE, "Destroy", &())?;
    assert_eq!(client.properties(&path, MACHINE)?["State"], "shutoff");
    client.manager::<_, ()>("Undefine", &"web-1")?;
    wait_signal(&seen, ftvm_daemon::ROOT, "InterfacesRemoved", |a| a[0] == path)?;
    assert!(client.find("web-1").is_err());
    Ok(())
}

#[test]
fn a_definition_that_cannot_be_is_refused_with_the_reason() -> Result<()> {
    let host = Host::start("dbus-refused", "session")?;
    let path = host.define("bad", "-nonsense\n")?;
    let error = host.client()?.call::<_, ()>(&path, MACHINE, "Start", &()).unwrap_err();
    assert!(error.contains("nonsense"), "{error}");
    for (name, text, part) in [("../x", "", "no machine name"), ("x", "-daemonize", "-daemonize")] {
        let client = host.client()?;
        let error = client.manager::<_, OwnedObjectPath>("Define", &(name, text)).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    // Written by hand.
    std::fs::write(host.scratch.path("machines/hand.conf"), "-m 64\n").map_err(|e| e.to_string())?;
    wait_for("the machine written by hand", LONG, || host.client().ok()?.find("hand").ok()).map(drop)
}

#[test]
fn a_pair_is_made_switched_and_let_go() -> Result<()> {
    let host = Host::start("dbus-pair", "session")?;
    let client = host.client()?;
    let port = || TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map_err(|e| e.to_string());
    let (first, second, lock) = (port()?.to_string(), port()?, host.scratch.path("lock"));
    let a = host.define("a", &format!("-ft primary,listen={first},lock={lock}\n"))?;
    client.call::<_, ()>(&a, MACHINE, "Start", &())?;
    host.wait_ready("a")?;
    let seen = host.listen()?;
    let ft = |path: &str, method: &str| client.call::<_, ()>(path, FT, method, &());
    assert!(ft(&a, "TestFailover").unwrap_err().contains("not protected"));

    let definition = format!(
        "-display none\n-serial file:{}\n-ft backup,peer={first},listen={second},lock={lock}\n",
        host.scratch.path("b.console")
    );
    let b: OwnedObjectPath = client.manager("Define", &("b", definition))?;
    let b = b.as_str();
    client.call::<_, ()>(b, MACHINE, "Start", &())?;
    host.wait(&a, FT, "State", "protected")?;
    host.wait(b, FT, "Role", "backup")?;
    wait_signal(&seen, &a, "StateChanged", |s| s[1] == "protected")?;
    let pair = client.properties(&a, FT)?;
    assert!(pair["Lag"].is_f64() && pair["LogBandwidth"].is_f64() && pair["Throttle"].is_f64(), "{pair}");
    assert!(pair["Peer"].as_str().is_some_and(|p| p.starts_with("127.0.0.1:")), "{pair}");

    // The backup joins anew; the machine is protected again.
    ft(&a, "TestRestart")?;
    wait_signal(&seen, &a, "Reprotected", |_| true)?;
    host.wait(&a, FT, "State", "protected")?;

    // A planned switch: b is the primary, a becomes its backup.
    ft(&a, "TestFailover")?;
    wait_signal(&seen, b, "FailedOver", |_| true)?;
    host.wait(b, FT, "Role", "primary")?;
    host.wait(b, FT, "State", "protected")?;
    assert!(client.properties(b, FT)?["LastFailover"]["count"].as_u64() > Some(0));

    ft(b, "Suspend")?;
    host.wait(b, FT, "State", "unprotected")?;
    ft(b, "Resume")?;
    ft(b, "TurnOff")?;
    host.wait(b, FT, "State", "off")
}

/// No polkit on this bus: only root may change anything, others may look.
#[test]
fn denied_without_rights() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can be another user");
        return Ok(());
    }
    let host = Host::start("dbus-denied", "system")?;
    host.define("mine", "")?;
    let nobody = Some(65534);
    assert!(host.ftctl(nobody, &["list"])?.contains("mine"));
    let file = host.scratch.path("other.conf");
    std::fs::write(&file, "-m 64\n").map_err(|e| e.to_string())?;
    for args in [
        &["start", "mine"][..],
        &["undefine", "mine"],
        &["define", "x", &file],
        &["destroy", "mine"],
        &["protect", "mine"],
    ] {
        let error = host.ftctl(nobody, args).expect_err("a stranger is refused");
        assert!(error.contains("access denied: org.ftvm."), "{args:?}: {error}");
    }
    assert!(host.ftctl(None, &["undefine", "mine"]).is_ok());
    Ok(())
}

/// What a registration says.
type Registration = (String, Vec<u8>, String, String, u32);

/// Stands in for systemd-machined, which needs systemd as process 1.
struct Machined(Arc<Mutex<Vec<Registration>>>);

#[zbus::interface(name = "org.freedesktop.machine1.Manager")]
impl Machined {
    #[allow(clippy::too_many_arguments)]
    async fn create_machine(
        &self,
        name: String,
        id: Vec<u8>,
        service: String,
        class: String,
        leader: u32,
        _root: String,
        _properties: Vec<(String, zbus::OwnedVariant)>,
    ) -> OwnedObjectPath {
        self.0.lock().unwrap().push((name, id, service, class, leader));
        zbus::ObjectPath::try_from("/org/freedesktop/machine1/machine/x").unwrap().into()
    }
}

/// Machines are registered with systemd-machined under their process and UUID. (All other tests are without it.)
#[test]
fn machines_are_known_to_machined() -> Result<()> {
    let host = Host::start("dbus-machined", "system")?;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let _machined = block_on(
        zbus::connection::Builder::address(host.address.as_str())
            .serve_at("/org/freedesktop/machine1", Machined(Arc::clone(&seen)))
            .name("org.freedesktop.machine1")
            .build(),
    )
    .map_err(|e| e.to_string())?;
    let path = host.define("known_1", "-uuid 00112233-4455-6677-8899-aabbccddeeff\n")?;
    let client = host.client()?;
    client.call::<_, ()>(&path, MACHINE, "Start", &())?;
    let pid = client.properties(&path, MACHINE)?["Pid"].as_u64();
    let first = || seen.lock().unwrap().first().cloned();
    let (name, id, service, class, leader) = wait_for("the registration", LONG, first)?;
    assert_eq!((name.as_str(), service.as_str(), class.as_str()), ("ftvm-known-1", "ftvm", "vm"));
    assert_eq!((id.len(), id[1], Some(u64::from(leader))), (16, 0x11, pid));
    Ok(())
}

/// Polkit's own daemon decides: an administrator's rule lets one user start machines, and nothing else.
#[test]
fn polkit_decides() -> Result<()> {
    let polkitd = "/usr/lib/polkit-1/polkitd";
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new(polkitd).exists() {
        println!("skipped: it needs root, and polkitd");
        return Ok(());
    }
    let host = Host::start("dbus-polkit", "system")?;
    // Its directories are its own: the actions of this tree, and a rule.
    let (actions, rules) = (host.scratch.path("actions"), host.scratch.path("rules"));
    std::fs::create_dir_all(&actions).map_err(|e| e.to_string())?;
    std::fs::create_dir_all(&rules).map_err(|e| e.to_string())?;
    let policy = guests::root().join("packaging/dbus/org.ftvm.policy");
    std::fs::copy(policy, format!("{actions}/org.ftvm.policy")).map_err(|e| e.to_string())?;
    let rule = "polkit.addRule(function(action, subject) {\n\
                if (action.id == 'org.ftvm.start' && subject.user == 'nobody') return polkit.Result.YES;\n});\n";
    std::fs::write(format!("{rules}/10-test.rules"), rule).map_err(|e| e.to_string())?;
    let log = std::fs::File::create(host.scratch.path("polkit.log")).map_err(|e| e.to_string())?;
    let script = format!(
        "mount --bind '{actions}' /usr/share/polkit-1/actions && mount --bind '{rules}' /etc/polkit-1/rules.d && \
         exec {polkitd} --no-debug"
    );
    let child = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .envs(host.environment())
        .stdout(log.try_clone().map_err(|e| e.to_string())?)
        .stderr(log)
        .spawn()
        .map_err(|e| e.to_string())?;
    let _polkit = Process(child);
    host.define("shared", "")?;
    let nobody = Some(65534);
    let said = || std::fs::read_to_string(host.scratch.path("polkit.log")).unwrap_or_default();
    wait_for("polkit's yes", LONG, || host.ftctl(nobody, &["start", "shared"]).ok())
        .map_err(|e| format!("{e}\n{}\n{}", said(), host.ftctl(nobody, &["start", "shared"]).unwrap_err()))?;
    host.wait("/org/ftvm/machine/shared", MACHINE, "State", "running")?;
    for verb in ["pause", "destroy", "protect"] {
        let error = host.ftctl(nobody, &[verb, "shared"]).expect_err("there is no rule for it");
        assert!(error.contains("polkit refuses it"), "{verb}: {error}");
    }
    host.ftctl(None, &["destroy", "shared"]).map(drop)
}

/// A machine that a person started appears, is controlled, and goes; a socket that lies about its process does not.
#[test]
fn machines_that_others_start_appear() -> Result<()> {
    let host = Host::start("dbus-foreign", "session")?;
    let client = host.client()?;
    let seen = host.listen()?;
    let registry = host.scratch.path("run/machines");
    let (kernel, initrd) = guests::tiny()?;
    let hand = |name: &str| {
        Command::new(guests::ftvm()?)
            .args(["-name", name, "-m", "192", "-kernel", &kernel, "-initrd", &initrd, "-nic", "none"])
            .args(["-append", "console=ttyS0 quiet", "-display", "none", "-serial", "null"])
            .args(["-uuid", "00112233-4455-6677-8899-aabbccddee00"])
            .env("FTVM_REGISTRY", &registry)
            .spawn()
            .map(Process)
            .map_err(|e| e.to_string())
    };
    let mut process = hand("by hand")?;
    let path = "/org/ftvm/machine/by_5fhand";
    wait_signal(&seen, ftvm_daemon::ROOT, "InterfacesAdded", |a| a[0] == path)?;
    host.wait(path, MACHINE, "State", "running")?;
    let known = client.properties(path, MACHINE)?;
    assert_eq!(
        (known["Origin"].as_str(), known["Pid"].as_u64()),
        (Some("foreign"), Some(process.0.id().into()))
    );
    assert_eq!(known["Uuid"], "00112233-4455-6677-8899-aabbccddee00");
    client.call::<_, ()>(path, MACHINE, "Pause", &())?;
    host.wait(path, MACHINE, "State", "paused")?;
    client.call::<_, ()>(path, MACHINE, "Resume", &())?;
    let lock = host.scratch.path("lock");
    let options = HashMap::from([("lock", Variant::from(lock.as_str()))]);
    client.call::<_, ()>(path, FT, "TurnOn", &options)?;
    host.wait(path, FT, "State", "unprotected")?;
    let error = client.call::<_, ()>(path, MACHINE, "Start", &()).unwrap_err();
    assert!(error.contains("was not started by this service"), "{error}");

    // A socket under the name of a process that is not at its other end.
    let other = Process(Command::new("sleep").arg("60").spawn().map_err(|e| e.to_string())?);
    let lie = format!("{registry}/{}.qmp", other.0.id());
    let liar = std::os::unix::net::UnixListener::bind(&lie).map_err(|e| e.to_string())?;
    let taken = std::thread::spawn(move || liar.accept().map(drop));
    taken.join().map_err(|_| "the liar")?.map_err(|e| e.to_string())?;
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(client.manager::<_, Vec<(OwnedObjectPath, String, String)>>("List", &())?.len(), 1);

    // Killed, it leaves its socket; the service takes both away.
    let socket = format!("{registry}/{}.qmp", process.0.id());
    assert!(std::path::Path::new(&socket).exists());
    process.kill();
    wait_signal(&seen, ftvm_daemon::ROOT, "InterfacesRemoved", |a| a[0] == path)?;
    wait_for("the socket's end", LONG, || (!std::path::Path::new(&socket).exists()).then_some(()))?;

    // One that ends in order takes its socket away itself; a definition of its name takes its place.
    let mut process = hand("orderly")?;
    host.wait("/org/ftvm/machine/orderly", MACHINE, "State", "running")?;
    host.define("orderly", "")?;
    assert_eq!(client.properties("/org/ftvm/machine/orderly", MACHINE)?["Origin"], "foreign");
    let socket = format!("{registry}/{}.qmp", process.0.id());
    client.call::<_, ()>("/org/ftvm/machine/orderly", MACHINE, "Destroy", &())?;
    let _ = process.0.wait();
    assert!(!std::path::Path::new(&socket).exists());
    host.wait("/org/ftvm/machine/orderly", MACHINE, "Origin", "defined")
}

/// A machine of libvirt's appears beside the service's own, and libvirt sees what is done to it.
#[test]
fn machines_of_libvirt_appear() -> Result<()> {
    use ftvm_harness::libvirt::{missing, share, Libvirt};
    if let Some(why) = missing() {
        println!("skipped: {why}");
        return Ok(());
    }
    let host = Host::start("dbus-libvirt", "session")?;
    let libvirt = Libvirt::start(&host.scratch)?;
    let registry = host.scratch.path("run/machines");
    // libvirt's emulator runs as a user of its own: the packages give the directory to its group.
    for dir in [host.scratch.path("run"), registry.clone()] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        std::fs::set_permissions(dir, mode).map_err(|e| e.to_string())?;
    }
    let (kernel, initrd) = guests::tiny()?;
    let kernel = share(&kernel, &host.scratch.path("vmlinuz"), 0o644)?;
    let initrd = share(&initrd, &host.scratch.path("initrd"), 0o644)?;
    let emulator = share(&guests::ftvm()?, &host.scratch.path("ftvm"), 0o755)?;
    let xml = format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>theirs</name>\
         <memory unit='MiB'>192</memory><os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel>\
         <initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet</cmdline></os><features><acpi/></features><devices><emulator>{emulator}</emulator>\
         <serial type='pty'/><memballoon model='none'/></devices><qemu:commandline>\
         <qemu:env name='FTVM_REGISTRY' value='{registry}'/></qemu:commandline></domain>"
    );
    let file = host.scratch.path("theirs.xml");
    std::fs::write(&file, xml).map_err(|e| e.to_string())?;
    libvirt.virsh(&["define", &file])?;
    libvirt.virsh(&["start", "theirs"])?;
    let path = "/org/ftvm/machine/theirs";
    host.wait(path, MACHINE, "State", "running")?;
    let client = host.client()?;
    assert_eq!(client.properties(path, MACHINE)?["Origin"], "foreign");
    client.call::<_, ()>(path, MACHINE, "Pause", &())?;
    libvirt.wait_state("theirs", "paused", LONG)?;
    libvirt.virsh(&["resume", "theirs"])?;
    host.wait(path, MACHINE, "State", "running")?;
    libvirt.virsh(&["destroy", "theirs"])?;
    wait_for("its end", LONG, || client.find("theirs").is_err().then_some(()))
}

/// What is installed is what the service is.
#[test]
fn the_generated_files_are_those_of_the_interfaces() {
    let root = guests::root();
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap_or_default();
    let interfaces = ftvm_daemon::service::interfaces();
    for (name, xml) in &interfaces {
        assert_eq!(
            &read(&format!("packaging/dbus/{name}.xml")),
            xml,
            "cargo run -p ftvm-daemon --example generate"
        );
    }
    let xml: Vec<String> = interfaces.into_iter().map(|(_, xml)| xml).collect();
    assert_eq!(read("man/org.ftvm.5"), ftvm_daemon::page::interfaces_page(&xml));
    assert_eq!(read("man/ftctl.1"), ftvm_daemon::page::ftctl_page(&ftvm_daemon::ctl::command()));
    assert_eq!(read("man/ftvmd.conf.5"), ftvm_daemon::page::configuration_page());
    assert_eq!(read("man/ftvmd.8"), ftvm_daemon::page::ftvmd_page(&ftvm_daemon::service::command()));
    assert_eq!(read("packaging/dbus/org.ftvm.policy"), ftvm_daemon::access::policy());
}
