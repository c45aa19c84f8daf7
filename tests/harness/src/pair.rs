//! A protected machine on two hosts, and what can happen to it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{Client, Seen};
use crate::etcd::Etcd;
use crate::hosts::{Network, GUEST};
use crate::qmp::Qmp;
use crate::storage::{qemu_img, Kind, Server};
use crate::vm::Vm;
use crate::{bitmaps, guests, Result, Scratch};

/// A machine on hosts 0 and 1.
pub struct Pair {
    pub net: Network,
    pub scratch: Scratch,
    /// The image as the hosts name it.
    pub image: String,
    /// Where it lies, if not on a path.
    pub server: Option<Server>,
    /// Where the lock lies, if it is there.
    pub etcd: Option<Etcd>,
    /// Where in the network each of the two hosts is; there is a third that can take one's place.
    pub(crate) place: [usize; 2],
    /// The program on each host.
    pub hosts: [Option<Vm>; 2],
    /// The host on which the machine lives.
    pub live: usize,
    /// Added to `-ft` of both sides.
    pub ft_options: String,
    /// A primary's host died: one that dies while it allocates leaves clusters that are counted and not used, which is no
    /// harm to data, but `qemu-img check` tells of them.
    may_leak: bool,
    /// The image is encrypted, and both hosts have the secret.
    encrypted: bool,
    /// What follows the image's name.
    drive_options: String,
    /// The host on which the machine began has lost it.
    taken_over: bool,
    /// `qcow2`, `raw` or `luks`.
    format: &'static str,
    /// Host 1 has an image of its own (`disks=separate`).
    pub second_image: Option<String>,
    /// The machine's arguments, without `-ft`.
    pub(crate) args: Vec<String>,
    started: u32,
}

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    Tiny,
    Debian,
    /// As `Tiny`, with the kernel for all machines, a virtio-vga that its driver draws on, and a USB controller.
    Screen,
}

impl Pair {
    /// Start a primary on host 0 and wait until the guest serves.
    pub fn start(name: &str, guest: Guest, ft_options: &str) -> Result<Pair> {
        Self::start_on(name, guest, ft_options, Kind::Path, "")
    }

    /// As `start`, with the image on a storage server; `drive_options` follow its name.
    pub fn start_on(
        name: &str,
        guest: Guest,
        ft_options: &str,
        storage: Kind,
        drive_options: &str,
    ) -> Result<Pair> {
        let scratch = Scratch::new(name)?;
        let formats = ["raw", "luks"];
        let format =
            formats.into_iter().find(|f| drive_options.contains(&format!("format={f}"))).unwrap_or("qcow2");
        let mut image = scratch.path(&format!("vm.{format}"));
        let mut args: Vec<String> = Vec::new();
        let mark = match guest {
            Guest::Tiny | Guest::Screen => {
                let screen = guest == Guest::Screen;
                let (kernel, initrd) = if screen { guests::generic()? } else { guests::tiny()? };
                let raw = scratch.path("fs.raw");
                guests::run("truncate", &["-s", "64M", &raw])?;
                guests::run("mke2fs", &["-q", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file", &raw])?;
                let mut convert = vec!["convert", "-q", "-O", format];
                if drive_options.contains(KEY) {
                    convert.extend(["--object", SECRET, "-o", guests::luks_options(format), &raw, &image]);
                    guests::make_encrypted(&convert)?;
                } else {
                    convert.extend([raw.as_str(), &image]);
                    guests::run("qemu-img", &convert)?;
                }
                let console = match screen {
                    true => {
                        let card = ["-vga", "virtio", "-device", "qemu-xhci,id=usb"];
                        args.extend(card.map(str::to_owned));
                        "console=tty0 console=ttyS0 vt.global_cursor_default=0 load=virtio-gpu,xhci-pci,usbhid,hid-generic"
                    }
                    false => "console=ttyS0 quiet",
                };
                let append = format!("{console} net addr={GUEST}/24 disk serve");
                for a in ["-m", "192M", "-kernel", &kernel, "-initrd", &initrd, "-append", &append] {
                    args.push(a.to_owned());
                }
                "ftload: http on"
            }
            Guest::Debian => {
                match format {
                    "qcow2" => drop(std::fs::copy(guests::debian()?, &image).map_err(|e| e.to_string())?),
                    _ => drop(guests::run(
                        "qemu-img",
                        &["convert", "-q", "-O", format, &guests::debian()?, &image],
                    )?),
                }
                args.extend(["-m".to_owned(), "512M".to_owned()]);
                "GUEST READY"
            }
        };
        let encrypted = drive_options.contains(KEY);
        if format == "qcow2" {
            let opts = format!("driver=qcow2,encrypt.key-secret=s,file.filename={image}");
            let add = ["bitmap", "--add"];
            let (plain, opened) =
                ([image.as_str(), BITMAP], ["--object", SECRET, "--image-opts", &opts, BITMAP]);
            guests::run("qemu-img", &[&add[..], if encrypted { &opened[..] } else { &plain[..] }].concat())?;
        }
        if encrypted {
            args.extend(["-object".to_owned(), SECRET.to_owned()]);
        }
        let mut net = Network::new(3)?;
        let mut server = None;
        let (mut second_image, mut etcd) = (None, None);
        let mut ft_options = if ft_options == PLAIN { None } else { Some(ft_options.to_owned()) };
        match storage {
            Kind::Path => {}
            Kind::Nfs | Kind::Iscsi => {
                let started = Server::start(storage, &mut net, &scratch, &[&image], 2 << 30)?;
                image = started.url(&format!("vm.{format}"));
                server = Some(started);
            }
            Kind::Etcd => {
                let started = Etcd::start(&net, &scratch, 3, None)?;
                let lock = started.lock_url("locks/vm").replace(',', ",,");
                ft_options = ft_options.map(|o| format!("{o},disks=separate,lock={lock}"));
                second_image = Some(empty_like(&image, &scratch.path("second.qcow2"))?);
                etcd = Some(started);
            }
            Kind::Separate => {
                let started = Server::start(Kind::Nfs, &mut net, &scratch, &[], 0)?;
                let lock = format!(",disks=separate,lock={}", started.url("vm.lock"));
                ft_options = ft_options.map(|o| o + &lock);
                second_image = Some(empty_like(&image, &scratch.path("second.qcow2"))?);
                server = Some(started);
            }
        }
        for a in [
            "-drive",
            &format!("file={image}{drive_options},if=virtio"),
            "-netdev",
            TAP,
            "-device",
            "virtio-net-pci,netdev=n0",
        ] {
            args.push(a.to_owned());
        }
        let mut pair = Pair {
            net,
            scratch,
            image,
            server,
            etcd,
            place: [0, 1],
            hosts: [None, None],
            live: 0,
            ft_options: ft_options.clone().unwrap_or_default(),
            may_leak: false,
            encrypted,
            drive_options: drive_options.to_owned(),
            taken_over: false,
            format,
            second_image,
            args: args.clone(),
            started: 0,
        };
        if let Some(ft_options) = ft_options {
            args.extend(["-ft".to_owned(), format!("primary{ft_options}")]);
        }
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut vm = pair.spawn(0, &words)?;
        vm.wait_console(mark, Duration::from_secs(900))?;
        pair.hosts[0] = Some(vm);
        Ok(pair)
    }

    /// As `start`, without `-ft`.
    pub fn start_plain(name: &str, guest: Guest) -> Result<Pair> {
        Self::start(name, guest, PLAIN)
    }

    /// Turn fault tolerance off: the backup ends in order.
    pub fn turn_off(&mut self) -> Result<()> {
        self.dismiss("ft-turn-off", "off")
    }

    /// Give the primary a command that lets its backup go in order, and leaves the machine in `state`.
    fn dismiss(&mut self, command: &str, state: &str) -> Result<()> {
        let other = self.other();
        self.qmp()?.command(command, serde_json::Value::Null)?;
        let mut vm = self.hosts[other].take().ok_or("there is no backup")?;
        match vm.wait_exit(Duration::from_secs(30))? {
            0 => {}
            status => return Err(format!("the dismissed backup ended with {status}\n{}", vm.log())),
        }
        let left = self.qmp()?.wait_ft(state, Duration::from_secs(30));
        left.map(|_| ()).map_err(|e| format!("{e}\n{}", self.logs()))
    }

    /// As `start`, where each host has a disk of its own; host 1's is empty so far.
    pub fn start_separate(name: &str, guest: Guest) -> Result<Pair> {
        let lock = std::env::temp_dir().join(format!("ftvm-lock-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&lock);
        std::fs::create_dir_all(&lock).map_err(|e| e.to_string())?;
        let options = format!(",disks=separate,lock={}", lock.join("lock").display());
        let mut pair = Self::start(name, guest, &options)?;
        pair.second_image = Some(empty_like(&pair.image, &pair.scratch.path("second.qcow2"))?);
        Ok(pair)
    }

    /// The image as host `host` names it.
    pub fn image_of(&self, host: usize) -> &str {
        self.second_image.as_deref().filter(|_| host == 1).unwrap_or(&self.image)
    }

    /// Whether what `qemu-img check` says is all right.
    fn clean(&self, said: Result<String>) -> Result<()> {
        match said {
            Err(e) if self.may_leak && guests::only_leaks(&e) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Both hosts' own images are clean and hold the same.
    pub fn compare_images(&self) -> Result<()> {
        let (a, b) = (self.image_of(0), self.image_of(1));
        self.clean(guests::run("qemu-img", &["check", a]))?;
        self.clean(guests::run("qemu-img", &["check", b]))?;
        for (host, image) in [a, b].into_iter().enumerate() {
            let info = guests::run("qemu-img", &["info", "--output=json", image])?;
            check_bitmap(&info, !self.taken_over && host == self.live)?;
        }
        guests::run("qemu-img", &["compare", a, b]).map(|_| ())
    }

    pub(crate) fn spawn(&mut self, host: usize, args: &[&str]) -> Result<Vm> {
        self.started += 1;
        let name = format!("vm{}-host{host}", self.started);
        Vm::start(self.net.on_host(self.place[host], &guests::ftvm()?), &self.scratch, &name, args)
    }

    /// The host that does not (yet) run the machine.
    pub fn other(&self) -> usize {
        1 - self.live
    }

    /// The live side.
    pub fn live_vm(&mut self) -> Result<&mut Vm> {
        let live = self.live;
        self.hosts[live].as_mut().ok_or_else(|| "the live side is gone".to_owned())
    }

    /// QMP of the live side.
    pub fn qmp(&mut self) -> Result<Qmp> {
        self.live_vm()?.qmp()
    }

    /// Start a backup on the other host and wait until the machine is protected; how long it took.
    pub fn protect(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let other = self.other();
        let ft = format!("backup,peer={}{}", Network::address(self.place[self.live]), self.ft_options);
        // Each host calls the secret something else.
        let key = ["=s", "=t"][other];
        let options = self.drive_options.replace("=s", key);
        let drive = format!("file={}{options},if=virtio", self.image_of(other));
        let secret = SECRET.replace("=s", key);
        let mut args = vec!["-ft", &ft];
        if self.encrypted {
            args.extend(["-object", &secret]);
        }
        if self.encrypted || self.second_image.is_some() {
            args.extend(["-drive", &drive]);
        }
        let vm = self.spawn(other, &args)?;
        self.hosts[other] = Some(vm);
        self.wait_protected()?;
        Ok(start.elapsed())
    }

    /// Start a backup that the primary must refuse; what it says.
    pub fn refused_backup(&mut self) -> Result<String> {
        let ft = format!("backup,peer={}{}", Network::address(self.place[self.live]), self.ft_options);
        let mut vm = self.spawn(self.other(), &["-ft", &ft])?;
        match vm.wait_exit(Duration::from_secs(30))? {
            0 => Err(format!("the backup was not refused\n{}", vm.log())),
            _ => Ok(vm.log()),
        }
    }

    /// All programs' messages.
    pub fn logs(&self) -> String {
        self.hosts.iter().flatten().map(|vm| format!("--- {}\n{}", vm.messages, vm.log())).collect()
    }

    fn expect_takeover(&mut self) -> Result<serde_json::Value> {
        let other = self.other();
        let vm = self.hosts[other].as_ref().ok_or("there is no backup")?;
        let mut qmp = vm.qmp()?;
        // It need not be seen while it is `live`: the old primary may be its backup already.
        let ft = crate::wait_for("the takeover", Duration::from_secs(30), || {
            qmp.ft()
                .map(|ft| (ft["role"] == "primary" && !ft["last-failover"].is_null()).then_some(ft))
                .transpose()
        })
        .and_then(|ft| ft)
        .map_err(|e| format!("{e}\n{}", self.logs()))?;
        drop(qmp);
        self.live = other;
        self.taken_over = true;
        Ok(ft)
    }

    /// SIGKILL the primary; the backup must go live. Its `query-ft`.
    pub fn kill_primary(&mut self) -> Result<serde_json::Value> {
        let live = self.live;
        if let Some(mut vm) = self.hosts[live].take() {
            vm.kill();
        }
        self.may_leak = true;
        self.expect_takeover()
    }

    /// SIGKILL the backup; the primary must go on unprotected.
    pub fn kill_backup(&mut self) -> Result<serde_json::Value> {
        let other = self.other();
        if let Some(mut vm) = self.hosts[other].take() {
            vm.kill();
        }
        let result = self.qmp()?.wait_ft("unprotected", Duration::from_secs(30));
        result.map_err(|e| format!("{e}\n{}", self.logs()))
    }

    /// Freeze the primary for `time`: the backup must go live, and the old primary must find that it lost and end.
    pub fn stall_primary(&mut self, time: Duration) -> Result<serde_json::Value> {
        let old = self.live;
        let mut vm = self.hosts[old].take().ok_or("the live side is gone")?;
        vm.signal(Signal::SIGSTOP);
        self.may_leak = true;
        let ft = self.expect_takeover();
        std::thread::sleep(time);
        vm.signal(Signal::SIGCONT);
        let ft = ft?;
        let status = vm
            .wait_exit(Duration::from_secs(30))
            .map_err(|e| format!("the stalled primary: {e}\n{}", vm.log()))?;
        if status == 0 || !vm.log().contains("has lost its machine") {
            return Err(format!("the stalled primary ended with {status}:\n{}", vm.log()));
        }
        Ok(ft)
    }

    /// Unplug the primary's host from everything, for `time` after the backup went live: it must find that it lost
    /// when it is plugged in again, and end.
    pub fn unplug_primary(&mut self, time: Duration) -> Result<serde_json::Value> {
        let old = self.live;
        let mut vm = self.hosts[old].take().ok_or("the live side is gone")?;
        self.net.set_link(self.place[old], false)?;
        self.may_leak = true;
        let ft = self.expect_takeover();
        std::thread::sleep(time);
        self.net.set_link(self.place[old], true)?;
        let ft = ft?;
        let status = vm
            .wait_exit(Duration::from_secs(40))
            .map_err(|e| format!("the unplugged primary: {e}\n{}", vm.log()))?;
        if status == 0 || !vm.log().contains("has lost its machine") {
            return Err(format!("the unplugged primary ended with {status}:\n{}", vm.log()));
        }
        Ok(ft)
    }

    /// Freeze the backup: the primary must go on alone; the backup must find that it lost when it wakes.
    pub fn stall_backup(&mut self, clients: &Clients) -> Result<()> {
        let other = self.other();
        let mut vm = self.hosts[other].take().ok_or("there is no backup")?;
        vm.signal(Signal::SIGSTOP);
        let alone = self.qmp()?.wait_ft("unprotected", Duration::from_secs(30));
        let going_on = alone.and_then(|_| clients.wait_progress(20, Duration::from_secs(30)));
        vm.signal(Signal::SIGCONT);
        going_on.map_err(|e| format!("{e}\n{}", self.logs()))?;
        let status = vm.wait_exit(Duration::from_secs(30)).map_err(|e| format!("the stalled backup: {e}"))?;
        if status == 0 || !vm.log().contains("this backup ends") {
            return Err(format!("the stalled backup ended with {status}:\n{}", vm.log()));
        }
        Ok(())
    }

    /// A planned switch: the backup goes live, and the old primary becomes its backup by itself.
    pub fn switch(&mut self) -> Result<serde_json::Value> {
        self.qmp()?.command("ft-test-failover", serde_json::Value::Null)?;
        let ft = self.expect_takeover()?;
        self.wait_protected()?;
        Ok(ft)
    }

    /// The backup moves to the third host: the old one protects until the new one is there, and ends in order. How long
    /// it took.
    pub fn move_backup(&mut self) -> Result<Duration> {
        let other = self.other();
        let spare = 3 - self.place[0] - self.place[1];
        self.qmp()?.command("ft-migrate-backup", serde_json::Value::Null)?;
        let state = self.qmp()?.ft()?["state"].clone();
        if state != "protected" {
            return Err(format!("before the new backup is there the machine is {state}"));
        }
        let start = Instant::now();
        self.place[other] = spare;
        let ft = format!("backup,peer={}{}", Network::address(self.place[self.live]), self.ft_options);
        let new = self.spawn(other, &["-ft", &ft])?;
        let mut old = self.hosts[other].replace(new).ok_or("there is no backup")?;
        match old.wait_exit(Duration::from_secs(30))? {
            0 => {}
            status => return Err(format!("the old backup ended with {status}\n{}", old.log())),
        }
        let mut new = self.hosts[other].as_ref().ok_or("there is no backup")?.qmp()?;
        new.wait_ft("following", Duration::from_secs(120)).map_err(|e| format!("{e}\n{}", self.logs()))?;
        self.wait_protected()?;
        Ok(start.elapsed())
    }

    /// The backup is made anew on the user's wish.
    pub fn restart_backup(&mut self) -> Result<()> {
        let before = self.pairing()?;
        self.qmp()?.command("ft-test-restart", serde_json::Value::Null)?;
        self.wait_protected_anew(before)
    }

    /// Fault tolerance is suspended: the backup ends in order, and none is taken.
    pub fn suspend(&mut self) -> Result<()> {
        self.dismiss("ft-suspend", "unprotected")
    }

    fn wait_protected(&mut self) -> Result<()> {
        let result = self.qmp()?.wait_ft("protected", Duration::from_secs(120));
        result.map(|_| ()).map_err(|e| format!("{e}\n{}", self.logs()))
    }

    /// The number of the live side's pairing.
    fn pairing(&mut self) -> Result<u64> {
        Ok(self.qmp()?.ft()?["epoch"].as_u64().unwrap_or(0))
    }

    /// As `wait_protected`, where the machine is protected by pairing number `before` as far as the primary knows.
    fn wait_protected_anew(&mut self, before: u64) -> Result<()> {
        let mut qmp = self.qmp()?;
        let mut last = serde_json::Value::Null;
        crate::wait_for("protection by a new backup", Duration::from_secs(120), || {
            last = qmp.ft().ok()?;
            (last["state"] == "protected" && last["epoch"].as_u64() > Some(before)).then_some(())
        })
        .map_err(|e| format!("{e}; last: {last}\n{}", self.logs()))
    }

    /// Change the guest's memory on the backup's host behind the program's back, as broken hardware would: the
    /// backup must notice, and be made anew by itself; the primary goes on.
    pub fn corrupt_backup(&mut self) -> Result<()> {
        let other = self.other();
        let before = self.pairing()?;
        let vm = self.hosts[other].as_ref().ok_or("there is no backup")?;
        let seen = vm.log().matches("is made anew").count();
        flip_guest_memory(vm.pid())?;
        crate::wait_for("the divergence's discovery", Duration::from_secs(60), || {
            let vm = self.hosts[other].as_ref()?;
            (vm.log().matches("is made anew").count() > seen).then_some(())
        })
        .map_err(|e| format!("{e}\n{}", self.logs()))?;
        self.wait_protected_anew(before)
    }

    /// Cut the hosts from each other while both reach the storage and the clients: exactly one goes on.
    pub fn cut_apart(&mut self) -> Result<()> {
        self.net.set_isolated(&self.place, true)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        let ended = loop {
            let gone: Vec<usize> =
                (0..2).filter(|i| self.hosts[*i].as_mut().is_some_and(|vm| !vm.is_running())).collect();
            if let [one] = gone[..] {
                break one;
            }
            if gone.len() == 2 {
                return Err(format!("both sides ended\n{}", self.logs()));
            }
            if Instant::now() > deadline {
                return Err(format!("both sides still run\n{}", self.logs()));
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        self.hosts[ended] = None;
        self.taken_over |= self.live == ended;
        self.may_leak |= self.live == ended;
        self.live = 1 - ended;
        std::thread::sleep(Duration::from_secs(1));
        let mut qmp = self.qmp()?;
        let mut state = serde_json::Value::Null;
        let alone = crate::wait_for("a survivor that goes on alone", Duration::from_secs(30), || {
            state = qmp.ft().ok()?["state"].clone();
            (state == "unprotected" || state == "live").then_some(())
        });
        self.net.set_isolated(&self.place, false)?;
        alone.map_err(|e| format!("{e}; it is {state}\n{}", self.logs()))
    }

    /// Power off by ACPI (Debian) or `quit`, and check the image; after a power-off the file system too.
    pub fn finish(mut self, powerdown: bool) -> Result<()> {
        self.settle()?;
        let command = if powerdown { "system_powerdown" } else { "quit" };
        self.qmp()?.command(command, serde_json::Value::Null)?;
        let logs = self.logs();
        let status =
            self.live_vm()?.wait_exit(Duration::from_secs(240)).map_err(|e| format!("{e}\n{logs}"))?;
        if status != 0 {
            return Err(format!("the program ended with {status}\n{}", self.logs()));
        }
        self.check_image()?;
        if powerdown {
            self.check_file_system()?;
        }
        Ok(())
    }

    /// Where this host's tools see the image, if there can be overlays beside it.
    fn local_image(&self) -> Option<String> {
        match &self.server {
            _ if self.second_image.is_some() => None,
            Some(server) => Some(format!("{}/vm.{}", server.export(), self.format)),
            None => Some(self.image.clone()),
        }
    }

    fn has_overlays(&self) -> bool {
        let Some(image) = self.local_image() else { return false };
        let Some((dir, name)) = image.rsplit_once('/') else { return false };
        let is_layer = |file: &std::ffi::OsStr| {
            let file = file.to_string_lossy();
            let rest = file.strip_prefix(name).and_then(|f| f.strip_prefix(".ft"));
            rest.is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()))
        };
        std::fs::read_dir(dir).is_ok_and(|d| d.flatten().any(|e| is_layer(&e.file_name())))
    }

    /// Wait until what the last takeover left is merged into the image.
    pub fn settle(&mut self) -> Result<()> {
        crate::wait_for("merging", Duration::from_secs(60), || (!self.has_overlays()).then_some(()))
            .map_err(|e| format!("{e}\n{}", self.logs()))
    }

    fn qemu_img(&self, args: &[&str]) -> Result<String> {
        match self.server {
            Some(_) => qemu_img(&self.net, args),
            None => guests::run("qemu-img", args),
        }
    }

    /// `qemu-img check` finds nothing, and no overlay is left. An image of another format has nothing to check.
    pub fn check_image(&self) -> Result<()> {
        if self.has_overlays() {
            return Err(format!("an overlay was left\n{}", self.logs()));
        }
        if self.format == "qcow2" {
            let image = self.image_of(self.live);
            let file = match image.strip_prefix("nfs://").and_then(|url| url.split_once('/')) {
                Some((host, path)) => {
                    format!("file.driver=nfs,file.server.type=inet,file.server.host={host},file.path=/{path}")
                }
                None => format!("file.driver=file,file.filename={image}"),
            };
            let opts = format!("driver=qcow2,encrypt.key-secret=s,{file}");
            let plain = ["check", "-f", "qcow2", image];
            let encrypted = ["check", "--object", SECRET, "--image-opts", &opts];
            self.clean(self.qemu_img(if self.encrypted { &encrypted } else { &plain }))?;
            let info = self.qemu_img(&["info", "--output=json", "-f", "qcow2", image])?;
            check_bitmap(&info, !self.taken_over)?;
        }
        Ok(())
    }

    /// `e2fsck` finds nothing on the guest's file system; the machine has ended in order.
    pub fn check_file_system(&self) -> Result<()> {
        let raw = self.scratch.path("check.raw");
        self.qemu_img(&["convert", "-f", self.format, "-O", "raw", self.image_of(self.live), &raw])?;
        let start = first_partition(&raw)?;
        let name = format!("{raw}?offset={start}");
        let said = guests::run("e2fsck", &["-fn", &name]);
        std::fs::remove_file(&raw).map_err(|e| e.to_string())?;
        said.map(|_| ())
    }
}

/// Make an empty image of another one's size.
fn empty_like(image: &str, second: &str) -> Result<String> {
    let info = guests::run("qemu-img", &["info", "-U", "--output=json", image])?;
    let info: serde_json::Value = serde_json::from_str(&info).map_err(|e| e.to_string())?;
    guests::run("qemu-img", &["create", "-q", "-f", "qcow2", second, &info["virtual-size"].to_string()])?;
    guests::run("qemu-img", &["bitmap", "--add", second, BITMAP])?;
    Ok(second.to_owned())
}

/// After a clean end: the bitmap that the image came with is believed, or it is not (or the image is a new file, without it).
fn check_bitmap(info: &str, believed: bool) -> Result<()> {
    match bitmaps::flags(info, BITMAP)? {
        Some(flags) if believed && flags == ["auto"] => Ok(()),
        Some(flags) if !believed && flags.iter().any(|f| f == "in-use") => Ok(()),
        None if !believed => Ok(()),
        flags => Err(format!(
            "the bitmap is {flags:?}, which is {} to be believed",
            if believed { "" } else { "not " }
        )),
    }
}

/// Where the first partition of a raw image begins; 0 if the image is a file system itself.
fn first_partition(raw: &str) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(raw).map_err(|e| format!("{raw}: {e}"))?;
    let mut at = [0; 2];
    file.read_exact_at(&mut at, 1080).map_err(|e| format!("{raw}: {e}"))?;
    if at == [0x53, 0xEF] {
        return Ok(0);
    }
    let mut entry = [0; 16];
    file.read_exact_at(&mut entry, 446).map_err(|e| format!("{raw}: {e}"))?;
    Ok(512 * u64::from(u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]])))
}

/// Flip a bit in every page in use of the upper half of a process's largest mapping, which is the guest's memory.
pub fn flip_guest_memory(pid: i32) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| e.to_string())?;
    let range = |line: &str| {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        line.contains(" rw").then_some((from, to))
    };
    let largest = maps.lines().filter_map(range).max_by_key(|(from, to)| to - from);
    let (from, to) = largest.ok_or("the process has no memory")?;
    let mem = std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
    let mem = mem.map_err(|e| format!("/proc/{pid}/mem: {e}"))?;
    let mut page = [0; 4096];
    let mut flipped = false;
    for at in ((from + (to - from) / 2)..to).step_by(4096) {
        let done = mem.read_exact_at(&mut page, at).and_then(|()| {
            if page.iter().any(|b| *b != 0) {
                mem.write_all_at(&[page[512] ^ 16], at + 512)?;
                flipped = true;
            }
            Ok(())
        });
        match done {
            Ok(()) => {}
            // The difference is found already, and the memory given back.
            Err(_) if flipped => break,
            Err(e) => return Err(e.to_string()),
        }
    }
    Ok(())
}

/// Options that stand for no `-ft` at all.
const PLAIN: &str = "plain";

/// A dirty bitmap that all qcow2 images have from the start.
pub const BITMAP: &str = "kept";

/// What a drive's options have when the image is to be encrypted.
const KEY: &str = "key-secret=s";
const SECRET: &str = "secret,id=s,data=only-these-two-know";

const TAP: &str = "tap,id=n0,ifname=vmtap,script=no,downscript=no";

/// The clients of a machine: a session that counts, durable writes and HTTP; with Debian ssh and a database too.
pub struct Clients(Vec<(&'static str, Client)>);

impl Clients {
    /// Start them.
    pub fn start(pair: &Pair, http_port: u16, expect: &str, tag: &str) -> Clients {
        let at = |port: u16| SocketAddr::new(GUEST.parse().unwrap_or([0, 0, 0, 0].into()), port);
        let net = || Some(pair.net.client());
        let ms = Duration::from_millis;
        Clients(vec![
            ("session", Client::session(net(), at(7000), ms(5))),
            ("journal", Client::journal(net(), at(7000), tag, ms(10))),
            ("http", Client::http(net(), at(http_port), expect, ms(30))),
        ])
    }

    /// Add a shell over ssh and a database (what the Debian guest has).
    pub fn with_ssh(mut self, pair: &Pair) -> Clients {
        let net = || Some(pair.net.client());
        let ms = Duration::from_millis;
        self.0.push(("ssh", Client::shell(net(), GUEST.to_owned(), ms(20))));
        self.0.push(("database", Client::database(net(), GUEST.to_owned(), ms(20))));
        self
    }

    /// Wait until each has had `more` further answers.
    pub fn wait_progress(&self, more: u64, limit: Duration) -> Result<()> {
        let start: Vec<u64> = self.0.iter().map(|(_, c)| c.answers()).collect();
        let ended = || self.0.iter().any(|(_, c)| c.has_ended());
        let result = crate::wait_for("progress of the clients", limit, || {
            let enough = self.0.iter().zip(&start).all(|((_, c), s)| c.answers() >= s + more);
            (enough || ended()).then_some(())
        });
        let one = |((name, c), s): (&(&str, Client), &u64)| {
            format!("{name} {} more{}", c.answers() - s, if c.has_ended() { " and broke" } else { "" })
        };
        let state = self.0.iter().zip(&start).map(one).collect::<Vec<_>>().join(", ");
        if ended() {
            return Err(format!("a client ended: {state}"));
        }
        result.map_err(|e| format!("{e}: {state}"))
    }

    /// Stop them; each one's view, all of it correct.
    pub fn finish(self) -> Result<Vec<(&'static str, Seen)>> {
        let one = |(name, client): (&'static str, Client)| {
            let seen = client.finish().map_err(|e| format!("{name}: {e}"))?;
            match seen.wrong.first() {
                Some(wrong) => Err(format!("{name}: {} wrong answers, the first: {wrong}", seen.wrong.len())),
                None => Ok((name, seen)),
            }
        };
        self.0.into_iter().map(one).collect()
    }
}
