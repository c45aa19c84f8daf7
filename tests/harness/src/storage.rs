//! Real storage servers on a host of their own: nfs-ganesha and tgtd.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::hosts::Network;
use crate::{guests, wait_for, Result, Scratch};

/// Where a pair's image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory that both hosts see.
    Path,
    Nfs,
    Iscsi,
    /// Each host has a disk of its own; the lock lies on the NFS server of a third host.
    Separate,
    /// Each host has a disk of its own; the lock lies in etcd, which has a member on each of three hosts.
    Etcd,
}

impl Kind {
    /// The name on a command line.
    pub fn parse(text: &str) -> Result<Kind> {
        match text {
            "path" => Ok(Kind::Path),
            "nfs" => Ok(Kind::Nfs),
            "iscsi" => Ok(Kind::Iscsi),
            "separate" => Ok(Kind::Separate),
            "etcd" => Ok(Kind::Etcd),
            other => Err(format!("'{other}' is none of path, nfs, iscsi, separate, etcd")),
        }
    }
}

const IQN: &str = "iqn.2026-11.test:ft";
/// CHAP user and secret of the second LUN's target.
pub const CHAP: (&str, &str) = ("operator", "a-secret-of-16ch");

/// A server; ended when dropped.
pub struct Server {
    kind: Kind,
    dir: String,
    namespace: String,
    /// Keeps the mount namespace; rpcbind on an NFS server.
    keeper: Child,
    daemon: Option<Child>,
    /// Started again after a kill: the same LUNs.
    luns: Vec<String>,
}

fn missing(program: &str) -> bool {
    !["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|d| Path::new(d).join(program).exists())
}

impl Server {
    /// Why this kind of server cannot be had here, if so.
    pub fn unavailable(kind: Kind) -> Option<String> {
        let need: &[&str] = match kind {
            Kind::Path => &[],
            Kind::Etcd => &["etcd"],
            Kind::Nfs | Kind::Separate => &["ganesha.nfsd", "rpcbind"],
            Kind::Iscsi => &["tgtd", "tgtadm"],
        };
        if let Some(program) = need.iter().find(|p| missing(p)) {
            return Some(format!("{program} is not installed (packaging/setup.sh)"));
        }
        if matches!(kind, Kind::Nfs | Kind::Separate) && std::env::var_os("FTVM_UNSHARED").is_some() {
            return Some("nfs-ganesha needs real root".into());
        }
        None
    }

    /// Start a server on the network's storage host. `files` are put where it serves from: exported files, or LUNs
    /// from number 1 on (each made `spare` bytes longer).
    pub fn start(
        kind: Kind,
        net: &mut Network,
        scratch: &Scratch,
        files: &[&str],
        spare: u64,
    ) -> Result<Server> {
        let namespace = net.add_storage()?;
        let dir = scratch.path("server");
        std::fs::create_dir_all(format!("{dir}/export")).map_err(|e| e.to_string())?;
        let mut luns = Vec::new();
        for file in files {
            let name = Path::new(file).file_name().and_then(|n| n.to_str()).unwrap_or("image");
            let to = format!("{dir}/export/{name}");
            std::fs::rename(file, &to).map_err(|e| format!("{file}: {e}"))?;
            if kind == Kind::Iscsi {
                let f = File::options().write(true).open(&to).map_err(|e| e.to_string())?;
                let len = f.metadata().map_err(|e| e.to_string())?.len().next_multiple_of(1 << 20);
                f.set_len(len + spare).map_err(|e| e.to_string())?;
                luns.push(to);
            }
        }
        let log = |name: &str| File::create(format!("{dir}/{name}.log")).map_err(|e| e.to_string());
        let keep = match kind {
            Kind::Nfs => "mkdir -p /run/rpcbind /run/ganesha; exec rpcbind -f -w -i",
            _ => "mkdir -p /run/tgtd; exec sleep infinity",
        };
        let script = format!("mount --make-rprivate / && mount -t tmpfs tmpfs /run && {keep}");
        let keeper = Command::new("ip")
            .args(["netns", "exec", &namespace, "unshare", "-m", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log("keeper")?)
            .spawn()
            .map_err(|e| e.to_string())?;
        let mut server = Server { kind, dir, namespace, keeper, daemon: None, luns };
        wait_for("the server's namespace", Duration::from_secs(10), || {
            let comm =
                std::fs::read_to_string(format!("/proc/{}/comm", server.keeper.id())).unwrap_or_default();
            ["rpcbind", "sleep"].contains(&comm.trim()).then_some(())
        })?;
        server.launch()?;
        Ok(server)
    }

    /// A command within the server's namespaces.
    fn inside(&self, program: &str) -> Command {
        let mut c = Command::new("nsenter");
        c.args(["-t", &self.keeper.id().to_string(), "-m", "-n", program]);
        c
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let out = self.inside(program).args(args).output().map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(format!("{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr)));
        }
        Ok(())
    }

    /// Start the daemon (again).
    pub fn launch(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(format!("{}/daemon.log", self.dir))
            .map_err(|e| e.to_string())?;
        let quiet = |c: &mut Command| -> Result<Child> {
            let err = log.try_clone().map_err(|e| e.to_string())?;
            let out = log.try_clone().map_err(|e| e.to_string())?;
            c.stdin(Stdio::null()).stdout(out).stderr(err).spawn().map_err(|e| e.to_string())
        };
        match self.kind {
            Kind::Path | Kind::Separate | Kind::Etcd => Ok(()),
            Kind::Iscsi => {
                let portal = format!("portal={}:3260", Network::storage_address());
                self.daemon =
                    Some(quiet(self.inside("tgtd").args(["-D", "-C", "0", "-t", "4", "--iscsi", &portal]))?);
                let new =
                    ["--lld", "iscsi", "--mode", "target", "--op", "new", "--tid", "1", "--targetname", IQN];
                wait_for("tgtd", Duration::from_secs(10), || self.run("tgtadm", &new).ok())?;
                let chap = format!("{IQN}-chap");
                let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
                let mut commands =
                    vec![words(&format!("--mode target --op new --tid 2 --targetname {chap}"))];
                for (i, lun) in self.luns.iter().enumerate() {
                    for tid in [1, 2] {
                        commands.push(words(&format!(
                            "--mode logicalunit --op new --tid {tid} --lun {} --backing-store {lun} --bstype rdwr --bsoflags sync",
                            i + 1
                        )));
                    }
                }
                commands
                    .push(words(&format!("--mode account --op new --user {} --password {}", CHAP.0, CHAP.1)));
                commands.push(words(&format!("--mode account --op bind --tid 2 --user {}", CHAP.0)));
                commands.push(words("--mode target --op bind --tid 1 --initiator-address ALL"));
                commands.push(words("--mode target --op bind --tid 2 --initiator-address ALL"));
                for c in commands {
                    let args: Vec<&str> =
                        ["--lld", "iscsi"].into_iter().chain(c.iter().map(String::as_str)).collect();
                    self.run("tgtadm", &args)?;
                }
                Ok(())
            }
            Kind::Nfs => {
                let config = format!("{}/ganesha.conf", self.dir);
                let dir = &self.dir;
                std::fs::create_dir_all(format!("{dir}/recovery")).map_err(|e| e.to_string())?;
                let text = format!(
                    "NFS_CORE_PARAM {{ Protocols = 3,4; NFS_Port = 2049; MNT_Port = 20048; Bind_addr = 0.0.0.0; \
                     Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; mount_path_pseudo = false; \
                     Plugins_Dir = /usr/lib/x86_64-linux-gnu/ganesha; }}\n\
                     NFSv4 {{ Graceless = true; Grace_Period = 1; Lease_Lifetime = 5; RecoveryBackend = fs; \
                     RecoveryRoot = {dir}/recovery; Only_Numeric_Owners = true; }}\n\
                     EXPORT_DEFAULTS {{ Access_Type = RW; Squash = No_Root_Squash; SecType = sys,none; Transports = TCP; \
                     Protocols = 3,4; }}\n\
                     EXPORT {{ Export_Id = 1; Path = {dir}/export; Pseudo = /vmstore; FSAL {{ Name = VFS; }} }}\n\
                     LOG {{ Default_Log_Level = EVENT; }}\n"
                );
                std::fs::write(&config, text).map_err(|e| e.to_string())?;
                let (log, pid) = (format!("{dir}/ganesha.log"), format!("{dir}/ganesha.pid"));
                let args = ["-F", "-f", &config, "-L", &log, "-p", &pid];
                self.daemon = Some(quiet(self.inside("ganesha.nfsd").args(args))?);
                wait_for("nfs-ganesha", Duration::from_secs(20), || {
                    let out = self.inside("ss").args(["-Hltn", "sport", "=", "2049"]).output().ok()?;
                    (!out.stdout.is_empty()).then_some(())
                })
                .map_err(|e| format!("{e}: {}", std::fs::read_to_string(&log).unwrap_or_default()))
            }
        }
    }

    /// SIGKILL the daemon.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Send the daemon a signal (SIGSTOP, SIGCONT).
    pub fn signal(&self, signal: Signal) {
        if let Some(daemon) = &self.daemon {
            let _ = kill(Pid::from_raw(daemon.id() as i32), signal);
        }
    }

    /// The URL of a file (or of LUN 1) as hosts use it.
    pub fn url(&self, name: &str) -> String {
        let host = Network::storage_address();
        match self.kind {
            Kind::Path | Kind::Separate | Kind::Etcd => name.to_owned(),
            Kind::Nfs => format!("nfs://{host}{}/export/{name}", self.dir),
            Kind::Iscsi => format!("iscsi://{host}/{IQN}/1"),
        }
    }

    /// The URL of a LUN of the target that asks for a password.
    pub fn chap_url(&self, lun: u32, user: &str, secret: &str) -> String {
        format!("iscsi://{user}%{secret}@{}/{IQN}-chap/{lun}", Network::storage_address())
    }

    /// The URL of LUN `n`.
    pub fn lun(&self, n: u32) -> String {
        format!("iscsi://{}/{IQN}/{n}", Network::storage_address())
    }

    /// The directory that the server's files lie in.
    pub fn export(&self) -> String {
        format!("{}/export", self.dir)
    }

    /// What the daemon said.
    pub fn log(&self) -> String {
        ["daemon.log", "ganesha.log"]
            .iter()
            .filter_map(|n| std::fs::read_to_string(format!("{}/{n}", self.dir)).ok())
            .collect()
    }

    /// The namespace of the server's host.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(Signal::SIGCONT);
        self.kill();
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Run qemu-img on the client's host of a network.
pub fn qemu_img(net: &Network, args: &[&str]) -> Result<String> {
    let ns = net.client_name();
    let all: Vec<&str> = ["netns", "exec", &ns, "qemu-img"].into_iter().chain(args.iter().copied()).collect();
    guests::run("ip", &all)
}
