//! A libvirtd of its own: private directories in a mount namespace, a socket in the scratch directory.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::{wait_for, Result, Scratch};

/// Directories that libvirtd keeps its things in.
const PRIVATE: &[&str] =
    &["/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"];

/// A running libvirtd; ended when dropped.
pub struct Libvirt {
    child: Child,
    uri: String,
    /// Where the daemon's messages go.
    pub log: String,
}

/// Why libvirt cannot be tested here.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("libvirtd needs root".into());
    }
    for program in ["/usr/sbin/libvirtd", "/usr/bin/virsh"] {
        if !std::path::Path::new(program).exists() {
            return Some(format!("{program} is missing (packaging/setup.sh installs it)"));
        }
    }
    None
}

impl Libvirt {
    /// Start a daemon with its directories below `scratch`, on a host without KVM.
    pub fn start(scratch: &Scratch) -> Result<Libvirt> {
        // The emulator runs without, and libvirt must not think otherwise.
        let nothing = scratch.path("nothing");
        std::fs::write(&nothing, "").map_err(|e| e.to_string())?;
        set_mode(&nothing, 0)?;
        Self::start_on(scratch, &format!("[ ! -e /dev/kvm ] || mount --bind '{nothing}' /dev/kvm\n"))
    }

    /// As [`Self::start`], with a /dev/kvm that the emulator's user can open.
    pub fn start_with_kvm(scratch: &Scratch) -> Result<Libvirt> {
        let own = scratch.path("kvm");
        Self::start_on(scratch, &format!("mknod -m 666 '{own}' c 10 232\nmount --bind '{own}' /dev/kvm\n"))
    }

    fn start_on(scratch: &Scratch, kvm: &str) -> Result<Libvirt> {
        let text = |e: std::io::Error| e.to_string();
        // The emulator runs as another user.
        open_to_all(&scratch.0)?;
        // A host by itself: libvirt moves no machine between two of one name.
        let own = scratch.0.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut script = format!("set -e\necho '{own}' > /proc/sys/kernel/hostname\n");
        let uuid = host_uuid(&own);
        for (i, dir) in PRIVATE.iter().enumerate() {
            let own = scratch.path(&format!("libvirt{i}"));
            std::fs::create_dir_all(&own).map_err(text)?;
            std::fs::create_dir_all(dir).map_err(text)?;
            script.push_str(&format!("mount --bind '{own}' '{dir}'\n"));
        }
        let (conf, pid, log) =
            (scratch.path("libvirtd.conf"), scratch.path("libvirtd.pid"), scratch.path("libvirtd.log"));
        let sockets = scratch.path("sockets");
        std::fs::create_dir_all(&sockets).map_err(text)?;
        script.push_str(kvm);
        script.push_str(&format!("exec /usr/sbin/libvirtd -f '{conf}' -p '{pid}'\n"));
        std::fs::write(
            &conf,
            format!(
                "unix_sock_dir = \"{sockets}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
                 host_uuid = \"{uuid}\"\nlog_outputs = \"1:file:{log}\"\nlog_filters = \"1:qemu.qemu_monitor 1:qemu.qemu_capabilities\"\n"
            ),
        )
        .map_err(text)?;
        // Certificates that are there already are those of its migrations.
        let tls = scratch.path("tls");
        let tls = match std::path::Path::new(&tls).exists() {
            true => format!("migrate_tls_x509_cert_dir = \"{tls}\"\nmigrate_tls_x509_verify = 1\n"),
            false => String::new(),
        };
        std::fs::write(
            scratch.path("libvirt0/qemu.conf"),
            tls + "security_driver = \"none\"\ndynamic_ownership = 0\nremember_owner = 0\ncgroup_controllers = [ ]\n\
             namespaces = [ ]\nstdio_handler = \"file\"\nmax_core = 0\n",
        )
        .map_err(text)?;
        let child = Command::new("unshare")
            .args(["-m", "-u", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(scratch.path("libvirtd.err")).map_err(text)?)
            .spawn()
            .map_err(text)?;
        let uri = format!("qemu+unix:///system?socket={sockets}/libvirt-sock");
        let libvirt = Libvirt { child, uri, log };
        wait_for("libvirtd", Duration::from_secs(30), || libvirt.virsh(&["uri"]).ok()).map_err(|e| {
            format!("{e}\n{}", std::fs::read_to_string(scratch.path("libvirtd.err")).unwrap_or_default())
        })?;
        Ok(libvirt)
    }

    /// Run virsh; what it prints.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        let out = Command::new("timeout")
            .args(["60", "virsh", "-q", "-c", &self.uri])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("virsh: {e}"))?;
        let (good, bad) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if out.status.success() {
            return Ok(good.trim().to_owned());
        }
        Err(format!("virsh {}: {}{}", args.join(" "), good.trim(), bad.trim()))
    }

    /// A program that watches something, as `virsh event --loop`.
    pub fn watch(&self, args: &[&str], to: &str) -> Result<Child> {
        let file = std::fs::File::create(to).map_err(|e| e.to_string())?;
        Command::new("virsh")
            .args(["-q", "-c", &self.uri])
            .args(args)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("virsh: {e}"))
    }

    /// The connection, for other programs than virsh.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Wait until a domain is in a state.
    pub fn wait_state(&self, name: &str, state: &str, limit: Duration) -> Result<()> {
        let mut last = String::new();
        wait_for(&format!("the state '{state}' of {name}"), limit, || {
            last = self.virsh(&["domstate", name, "--reason"]).unwrap_or_else(|e| e);
            last.starts_with(state).then_some(())
        })
        .map_err(|e| format!("{e}; it is {last}"))
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        for name in self.virsh(&["list", "--name"]).unwrap_or_default().lines() {
            let _ = self.virsh(&["destroy", name]);
        }
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let gone =
            wait_for("libvirtd's end", Duration::from_secs(10), || self.child.try_wait().ok().flatten());
        if gone.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A UUID that depends on the name.
fn host_uuid(name: &str) -> String {
    let hash = |seed: u64| name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    let (a, b) = (hash(0xCBF2_9CE4_8422_2325), hash(0x9E37_79B9_7F4A_7C15));
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        a >> 16 & 0xFFFF,
        a & 0xFFF,
        b >> 52,
        b & 0xFFFF_FFFF_FFFF
    )
}

fn set_mode(path: &str, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|e| format!("{path}: {e}"))
}

fn open_to_all(path: &std::path::Path) -> Result<()> {
    set_mode(&path.display().to_string(), 0o755)
}

/// Copy a file to where every user may read (and `writable`: write) it.
pub fn share(from: &str, to: &str, mode: u32) -> Result<String> {
    std::fs::copy(from, to).map_err(|e| format!("{from}: {e}"))?;
    set_mode(to, mode)?;
    Ok(to.to_owned())
}

/// A guest's shell on its serial line.
pub struct Console {
    tty: std::fs::File,
    text: String,
}

impl Console {
    /// Take the console of a domain.
    pub fn open(libvirt: &Libvirt, domain: &str) -> Result<Console> {
        let path = libvirt.virsh(&["ttyconsole", domain])?;
        let open = std::fs::OpenOptions::new().read(true).write(true).open(&path);
        Ok(Console { tty: open.map_err(|e| format!("{path}: {e}"))?, text: String::new() })
    }

    /// The other end of a serial line that is a socket.
    pub fn socket(path: &str) -> Result<Console> {
        let stream =
            wait_for(path, Duration::from_secs(20), || std::os::unix::net::UnixStream::connect(path).ok())?;
        Ok(Console { tty: std::os::fd::OwnedFd::from(stream).into(), text: String::new() })
    }

    /// Read until `mark` is there; everything up to its end. What has come behind it stays for the next call.
    pub fn until(&mut self, mark: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut buf = [0u8; 4096];
        loop {
            if let Some(at) = self.text.find(mark) {
                let rest = self.text.split_off(at + mark.len());
                return Ok(std::mem::replace(&mut self.text, rest));
            }
            if Instant::now() > end {
                return Err(format!("'{mark}' did not come; the console says:\n{}", self.text));
            }
            let mut fds = [PollFd::new(self.tty.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(100u16)).unwrap_or(0) > 0 {
                let n = self.tty.read(&mut buf).map_err(|e| e.to_string())?;
                self.text.push_str(&String::from_utf8_lossy(&buf[..n]).replace('\r', ""));
            }
        }
    }

    /// Type something.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.tty.write_all(text.as_bytes()).map_err(|e| e.to_string())
    }

    /// Run a command in the guest's shell; what it prints.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.text.clear();
        // The echo of the line must not look like its end.
        let line = format!("{command}; echo E\"\"ND:$?\n");
        self.tty.write_all(line.as_bytes()).map_err(|e| e.to_string())?;
        let mut text = self.until("END:", Duration::from_secs(60))?;
        // The status is behind the mark.
        text.push_str(&self.until("\n", Duration::from_secs(60))?);
        Ok(text)
    }
}
