//! Hosts as network namespaces: a switch, hosts with a bridge and a tap each, and a client.
//!
//! ```text
//!   hostA: vmbr0 = eth0 + vmtap          hostB: vmbr0 = eth0 + vmtap        client: eth0
//!            \______________________________ | ______________________________/
//!                                      switch: br0
//! ```

use std::fs::File;
use std::process::Command;

use crate::guests::run;
use crate::Result;

/// A network of hosts; taken down when dropped.
pub struct Network {
    prefix: String,
    names: Vec<String>,
}

/// The client's address; hosts are 10.77.0.11, .12, ...; the guest is 10.77.0.2.
pub const CLIENT: &str = "10.77.0.1";
/// The guest's address.
pub const GUEST: &str = "10.77.0.2";

fn ip(args: &str) -> Result<()> {
    run("ip", &args.split(' ').collect::<Vec<_>>()).map(|_| ())
}

impl Network {
    /// Make a switch, a client, and `hosts` hosts.
    pub fn new(hosts: usize) -> Result<Self> {
        let mut net = Network { prefix: format!("ft{}", std::process::id()), names: Vec::new() };
        net.add("sw")?;
        let sw = net.name("sw");
        ip(&format!("-n {sw} link add br0 type bridge stp_state 0 forward_delay 0"))?;
        ip(&format!("-n {sw} link set br0 up"))?;
        net.add("cl")?;
        net.connect("cl", "eth0")?;
        ip(&format!("-n {} addr add {CLIENT}/24 dev eth0", net.name("cl")))?;
        for i in 0..hosts {
            let short = Self::short(i);
            net.add(&short)?;
            net.connect(&short, "eth0")?;
            let ns = net.name(&short);
            ip(&format!("-n {ns} link add vmbr0 type bridge stp_state 0 forward_delay 0"))?;
            ip(&format!("-n {ns} link set eth0 master vmbr0"))?;
            ip(&format!("-n {ns} tuntap add dev vmtap mode tap"))?;
            ip(&format!("-n {ns} link set vmtap master vmbr0"))?;
            ip(&format!("-n {ns} link set vmtap up"))?;
            ip(&format!("-n {ns} link set vmbr0 up"))?;
            ip(&format!("-n {ns} addr add {}/24 dev vmbr0", Self::address(i)))?;
        }
        Ok(net)
    }

    /// Add the storage host; its namespace.
    pub fn add_storage(&mut self) -> Result<String> {
        self.add("st")?;
        self.connect("st", "eth0")?;
        let ns = self.name("st");
        ip(&format!("-n {ns} addr add {}/24 dev eth0", Self::storage_address()))?;
        Ok(ns)
    }

    /// Address of the storage host.
    pub fn storage_address() -> &'static str {
        "10.77.0.9"
    }

    /// The client's namespace.
    pub fn client_name(&self) -> String {
        self.name("cl")
    }

    /// Cut host `i` from the storage host (from nobody else), or join them again.
    pub fn cut_storage(&self, i: usize, cut: bool) -> Result<()> {
        let state = if cut { "on" } else { "off" };
        let sw = self.name("sw");
        for port in [format!("p-{}", Self::short(i)), "p-st".to_owned()] {
            run("ip", &["netns", "exec", &sw, "bridge", "link", "set", "dev", &port, "isolated", state])?;
        }
        Ok(())
    }

    /// Plug or unplug the storage host's cable at the switch.
    pub fn set_storage_link(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set p-st {state}", self.name("sw")))
    }

    fn short(i: usize) -> String {
        format!("h{}", (b'a' + i as u8) as char)
    }

    /// Address of host `i`.
    pub fn address(i: usize) -> String {
        format!("10.77.0.{}", 11 + i)
    }

    fn name(&self, short: &str) -> String {
        format!("{}{short}", self.prefix)
    }

    fn add(&mut self, short: &str) -> Result<()> {
        let name = self.name(short);
        ip(&format!("netns add {name}"))?;
        self.names.push(name.clone());
        ip(&format!("-n {name} link set lo up"))
    }

    fn connect(&self, short: &str, dev: &str) -> Result<()> {
        let (sw, ns) = (self.name("sw"), self.name(short));
        ip(&format!("-n {sw} link add p-{short} type veth peer name {dev} netns {ns}"))?;
        ip(&format!("-n {sw} link set p-{short} master br0"))?;
        ip(&format!("-n {sw} link set p-{short} up"))?;
        ip(&format!("-n {ns} link set {dev} up"))
    }

    /// Plug or unplug host `i`'s cable at the switch.
    pub fn set_link(&self, i: usize, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set p-{} {state}", self.name("sw"), Self::short(i)))
    }

    /// Cut hosts from each other (each still reaches the client), or join them again.
    pub fn set_isolated(&self, hosts: &[usize], isolated: bool) -> Result<()> {
        let state = if isolated { "on" } else { "off" };
        let sw = self.name("sw");
        for i in hosts {
            run(
                "ip",
                &[
                    "netns",
                    "exec",
                    &sw,
                    "bridge",
                    "link",
                    "set",
                    "dev",
                    &format!("p-{}", Self::short(*i)),
                    "isolated",
                    state,
                ],
            )?;
        }
        Ok(())
    }

    /// A command that runs on host `i`.
    pub fn on_host(&self, i: usize, program: &str) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.name(&Self::short(i)), program]);
        c
    }

    /// Move the calling thread into the client's network.
    pub fn enter_client(&self) -> Result<()> {
        let path = format!("/run/netns/{}", self.name("cl"));
        let file = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).map_err(|e| format!("setns: {e}"))
    }

    /// A handle that threads can use to enter the network of host `i`.
    pub fn host(&self, i: usize) -> ClientNet {
        ClientNet(format!("/run/netns/{}", self.name(&Self::short(i))))
    }

    /// A handle that threads can use to enter the client's network.
    pub fn client(&self) -> ClientNet {
        ClientNet(format!("/run/netns/{}", self.name("cl")))
    }
}

/// The client's network, for threads.
#[derive(Clone)]
pub struct ClientNet(String);

impl ClientNet {
    /// Move the calling thread there.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(&self.0).map_err(|e| format!("{}: {e}", self.0))?;
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).map_err(|e| format!("setns: {e}"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// Network namespaces need root: run this program again as root of its own user namespace if it is not.
pub fn become_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    if std::env::var_os("FTVM_UNSHARED").is_some() {
        return Err("not root in the new user namespace".into());
    }
    use std::os::unix::process::CommandExt;
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let error = Command::new("unshare")
        .args(["-r", "-n", "-m", "sh", "-c", "mount -t tmpfs none /run && exec \"$0\" \"$@\""])
        .arg(exe)
        .args(std::env::args().skip(1))
        .env("FTVM_UNSHARED", "1")
        .exec();
    Err(format!("unshare: {error}"))
}
