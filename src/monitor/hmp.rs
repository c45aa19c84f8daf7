//! The human monitor: a line in, text out. What changes something goes through the QMP command of the same name.

use std::time::Duration;

use ftvm_qmp::{Call, Fds, Handler, QmpError, Schema};
use serde_json::{json, Map, Value};

use super::qom::Object;
use super::{input, migrate, pci, qom, snapshots, Control};
use crate::cli::config::{format_uuid, Accel};
use crate::cli::keyval::Params;
use crate::host::keys;
use crate::runtime::control::RunState;

/// What `help` and `info` show.
const HELP: &[(&str, &str)] = &[
    ("announce_self", "tell the network where the cards' MAC addresses are"),
    ("balloon MB", "how much memory the guest is to have"),
    ("block_resize DEVICE SIZE", "change the size of an image (MiB without a suffix)"),
    ("c|cont", "let the processors run"),
    ("delvm NAME", "delete a snapshot of the machine"),
    ("device_add DRIVER[,prop=value]", "plug a device in"),
    ("device_del ID", "ask the guest to let go of a device"),
    ("dump-guest-memory FILE", "write guest memory and registers to an ELF core file"),
    ("eject DEVICE", "take the medium out of a drive"),
    ("gdbserver [DEVICE]", "let gdb connect on a character device (tcp::1234; none: no more)"),
    ("help|?", "this help"),
    ("info ITEM", "show something; 'info' lists what"),
    ("loadvm NAME", "go back to a snapshot of the machine"),
    (
        "migrate [-d] [-r] URI",
        "send the machine elsewhere; -d: do not wait for it; -r: go on with a paused post-copy",
    ),
    ("migrate_cancel", "stop a migration"),
    ("migrate_continue STATE", "let a migration go on that waits in pre-switchover"),
    ("migrate_incoming URI", "with -incoming defer: where the machine comes from"),
    ("migrate_pause", "break the connection of a post-copy"),
    ("migrate_recover URI", "where the source of a paused post-copy goes on"),
    ("migrate_set_capability NAME on|off", "set a capability of migrations"),
    ("migrate_set_parameter NAME VALUE", "set a parameter of migrations"),
    ("migrate_start_postcopy", "let the destination run and get the rest of its memory while it does"),
    ("netdev_add TYPE,id=ID[,prop=value]", "create a network back end"),
    ("netdev_del ID", "delete a network back end"),
    ("nmi", "a non-maskable interrupt for every processor"),
    ("object_add TYPE,id=ID[,prop=value]", "create an object"),
    ("object_del ID", "delete an object"),
    ("pmemsave ADDRESS SIZE FILE", "write guest memory to a file"),
    ("q|quit", "end the program"),
    ("qom-get PATH PROPERTY", "show a property of an object"),
    ("qom-list PATH", "list the properties of an object"),
    ("qom-set PATH PROPERTY VALUE", "set a property of an object"),
    ("replay_break ICOUNT", "stop the replay at a position that lies ahead"),
    ("replay_delete_break", "do not stop it there"),
    ("replay_seek ICOUNT", "go to a position of the replay, ahead or back"),
    ("savevm [NAME]", "make a snapshot of the machine and its images"),
    (
        "commit DEVICE|all",
        "write what an image keeps in front of another one into that (with -snapshot: into the image)",
    ),
    ("screendump FILE [-f ppm|png] [DEVICE [HEAD]]", "a picture of the screen, in a file"),
    ("sendkey KEY[-KEY...] [HOLD_MS]", "press keys together"),
    ("set_link NAME on|off", "plug a network cable in or pull it"),
    ("snapshot_blkdev_internal DEVICE NAME", "make an internal snapshot of an image"),
    ("snapshot_delete_blkdev_internal DEVICE NAME [ID]", "delete an internal snapshot"),
    ("stop|s", "stop the processors"),
    ("system_powerdown", "press the power button"),
    ("system_reset", "press the reset button"),
];

type Info = fn(&Control) -> Result<String, QmpError>;

const INFO: &[(&str, &str, Info)] = &[
    ("balloon", "how much memory the guest has", balloon),
    ("block", "the block devices", block),
    ("blockstats", "counters of the block devices", blockstats),
    ("chardev", "the character devices", chardev),
    ("cpus", "the processors", cpus),
    ("ft", "the pair", ft),
    ("kvm", "whether KVM is used", |c| {
        let word = if c.shared.accel() == Accel::Kvm { "enabled" } else { "disabled" };
        Ok(format!("kvm support: {word}\n"))
    }),
    ("migrate", "how far the migration is", migrate::info),
    ("migrate_capabilities", "capabilities of migrations", migrate::info_capabilities),
    ("migrate_parameters", "parameters of migrations", migrate::info_parameters),
    ("mtree", "what answers memory and I/O addresses", mtree),
    ("name", "the machine's name", |c| {
        Ok(c.config.name.as_ref().map_or(String::new(), |n| format!("{n}\n")))
    }),
    ("network", "network cards and back ends", network),
    ("pci", "the PCI functions", pci_text),
    ("qom-tree", "the tree of objects", |c| Ok(qom_tree(&qom::tree(c)))),
    ("qtree", "the devices", qtree),
    ("registers", "registers of the processors", |c| Ok(c.machine(|rt| rt.machine.describe_cpus())? + "\n")),
    ("replay", "record and replay", replay),
    ("snapshots", "internal snapshots of the images", snapshots::list),
    ("status", "whether the machine runs", status),
    ("usb", "the USB devices", usb),
    ("uuid", "the machine's UUID", |c| Ok(format!("{}\n", format_uuid(&c.config.uuid)))),
    ("version", "the program's version", |_| Ok(format!("7.2.0 (ftvm {})\n", env!("CARGO_PKG_VERSION")))),
];

/// `info usb`: which device is in which port. (What the guest calls them is its own business here.)
fn usb(c: &Control) -> Result<String, QmpError> {
    let devices = c.machine(|rt| rt.machine.chipset().inventory())?;
    let mut text = String::new();
    for d in devices {
        let product = match d.spec.driver.as_str() {
            "usb-kbd" => "QEMU USB Keyboard",
            "usb-mouse" => "QEMU USB Mouse",
            "usb-tablet" => "QEMU USB Tablet",
            "usb-storage" => "QEMU USB HARDDRIVE",
            _ => continue,
        };
        let port = d.spec.properties.get("port").map_or("", String::as_str);
        let id = d.spec.id.map_or_else(String::new, |id| format!(", ID: {id}"));
        text += &format!("  Bus {}, Port {port}, Product {product}{id}\n", d.bus);
    }
    Ok(text)
}

impl Control {
    /// A line typed into the human monitor; returns its answer.
    pub fn human(&self, line: &str, fds: &mut Fds) -> String {
        let text = match self.line(line.trim(), fds) {
            Ok(text) => text,
            Err(e) => format!("Error: {e}\n"),
        };
        text.replace("\r\n", "\n").replace('\n', "\r\n")
    }

    /// `human-monitor-command`.
    pub fn command_line(&self, call: &mut Call) -> String {
        let line = call.text("command-line").to_owned();
        self.human(&line, call.fds)
    }

    /// A QMP command that returns nothing worth showing.
    pub(super) fn run(&self, command: &str, arguments: Value, fds: &mut Fds) -> Result<String, QmpError> {
        self.ask(command, arguments, fds).map(|_| String::new())
    }

    fn ask(&self, command: &str, arguments: Value, fds: &mut Fds) -> Result<Value, QmpError> {
        let arguments = arguments.as_object().cloned().unwrap_or_default();
        let schema = Schema::get();
        let known = schema.command(command).ok_or_else(|| QmpError::command_not_found(command))?;
        schema.check_command(known, &arguments)?;
        self.execute(&mut Call { command, arguments: &arguments, fds })
    }

    fn line(&self, line: &str, fds: &mut Fds) -> Result<String, QmpError> {
        let (verb, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let words: Vec<&str> = rest.split_whitespace().collect();
        let need = |n: usize| match words.get(n) {
            Some(word) => Ok(*word),
            None => Err(QmpError::generic(format!("{verb}: an argument is missing; see 'help'"))),
        };
        let number = |text: &str| {
            let n = crate::cli::keyval::parse_number(text);
            n.ok_or_else(|| QmpError::generic(format!("'{text}' is not a number")))
        };
        match verb {
            "" => Ok(String::new()),
            "info" => self.info(rest),
            "help" | "?" => Ok(HELP.iter().map(|(usage, about)| format!("{usage} -- {about}\n")).collect()),
            "stop" | "s" => self.run("stop", json!({}), fds),
            "cont" | "c" => self.run("cont", json!({}), fds),
            "quit" | "q" => self.run("quit", json!({}), fds),
            "nmi" => self.run("inject-nmi", json!({}), fds),
            "system_reset" | "system_powerdown" => self.run(verb, json!({}), fds),
            "balloon" => self.run("balloon", json!({"value": number(need(0)?)? << 20}), fds),
            "block_resize" => {
                let size = crate::cli::keyval::parse_size(need(1)?, 1 << 20);
                let size = size.ok_or_else(|| QmpError::generic("invalid size"))?;
                self.run("block_resize", json!({"device": need(0)?, "size": size}), fds)
            }
            "snapshot_blkdev_internal" => {
                let arguments = json!({"device": need(0)?, "name": need(1)?});
                self.run("blockdev-snapshot-internal-sync", arguments, fds)
            }
            "snapshot_delete_blkdev_internal" => {
                let mut arguments = json!({"device": need(0)?, "name": need(1)?});
                if let Some(id) = words.get(2) {
                    arguments["id"] = json!(id);
                }
                self.run("blockdev-snapshot-delete-internal-sync", arguments, fds)
            }
            "device_del" | "netdev_del" => self.run(verb, json!({"id": need(0)?}), fds),
            "object_del" => self.run("object-del", json!({"id": need(0)?}), fds),
            "commit" => super::commit::run(self, need(0)?),
            "eject" => {
                let name = words.iter().find(|w| **w != "-f").copied().unwrap_or_default();
                self.run("eject", json!({"id": name}), fds)
            }
            "set_link" => {
                let up = match need(1)? {
                    "on" => true,
                    "off" => false,
                    other => return Err(QmpError::generic(format!("'{other}' is neither on nor off"))),
                };
                self.run("set_link", json!({"name": need(0)?, "up": up}), fds)
            }
            "device_add" => self.run("device_add", object(rest, "driver")?, fds),
            "netdev_add" => self.run("netdev_add", object(rest, "type")?, fds),
            "object_add" => self.run("object-add", object(rest, "qom-type")?, fds),
            "pmemsave" => {
                let (val, size) = (number(need(0)?)?, number(need(1)?)?);
                let filename = need(2)?.trim_matches('"');
                self.run("pmemsave", json!({"val": val, "size": size, "filename": filename}), fds)
            }
            "dump-guest-memory" => {
                let protocol = format!("file:{}", need(0)?.trim_matches('"'));
                self.run("dump-guest-memory", json!({"paging": false, "protocol": protocol}), fds)
            }
            "screendump" => {
                let mut arguments = Map::new();
                let mut words = words.iter();
                let mut places = ["filename", "device", "head"].iter();
                while let Some(word) = words.next() {
                    if *word == "-f" {
                        let format = words.next().ok_or_else(|| QmpError::generic("-f needs a format"))?;
                        arguments.insert("format".into(), json!(format));
                        continue;
                    }
                    let name = places.next().ok_or_else(|| QmpError::generic("too many arguments"))?;
                    let value = match *name {
                        "head" => json!(number(word)?),
                        _ => json!(word.trim_matches('"')),
                    };
                    arguments.insert((*name).into(), value);
                }
                self.run("screendump", Value::Object(arguments), fds)
            }
            "sendkey" => {
                let hold = match words.get(1) {
                    Some(text) => number(text)?.min(10_000),
                    None => 100,
                };
                let mut pressed = Vec::new();
                for name in need(0)?.split('-') {
                    let key = match name.strip_prefix("0x") {
                        Some(_) => keys::by_number(number(name)?),
                        None => keys::by_name(name),
                    };
                    pressed.push(key.ok_or_else(|| QmpError::generic(format!("invalid parameter: {name}")))?);
                }
                input::press(self, pressed, Duration::from_millis(hold)).map(|_| String::new())
            }
            "qom-list" => {
                let list = self.ask("qom-list", json!({"path": need(0)?}), fds)?;
                let one = |p: &Value| {
                    format!("{} ({})\n", p["name"].as_str().unwrap_or(""), p["type"].as_str().unwrap_or(""))
                };
                Ok(list.as_array().into_iter().flatten().map(one).collect())
            }
            "qom-get" => {
                let value = self.ask("qom-get", json!({"path": need(0)?, "property": need(1)?}), fds)?;
                Ok(format!("{value}\n"))
            }
            "qom-set" => {
                let text = need(2)?;
                let value: Value = serde_json::from_str(text).unwrap_or_else(|_| json!(text));
                let arguments = json!({"path": need(0)?, "property": need(1)?, "value": value});
                self.run("qom-set", arguments, fds)
            }
            "replay_break" => self.run("replay-break", json!({"icount": number(need(0)?)?}), fds),
            "replay_seek" => self.run("replay-seek", json!({"icount": number(need(0)?)?}), fds),
            "replay_delete_break" => self.run("replay-delete-break", json!({}), fds),
            "gdbserver" => self.gdbserver(rest),
            "savevm" | "loadvm" | "delvm" => snapshots::vm(self, verb, Some(rest).filter(|r| !r.is_empty())),
            _ if verb.starts_with("migrate") || verb == "announce_self" => {
                migrate::line(self, verb, &words, fds)
            }
            _ => Ok(format!("unknown command: '{line}'\n")),
        }
    }

    fn info(&self, what: &str) -> Result<String, QmpError> {
        let name = what.split_whitespace().next().unwrap_or_default();
        if name.is_empty() {
            return Ok(INFO.iter().map(|(name, about, _)| format!("info {name} -- {about}\n")).collect());
        }
        match INFO.iter().find(|(n, ..)| *n == name) {
            Some((_, _, info)) => info(self),
            None => Ok(format!("unknown command: 'info {what}'\n")),
        }
    }

    /// The answer of a QMP command without arguments.
    pub(super) fn query(&self, command: &str) -> Result<Value, QmpError> {
        self.ask(command, json!({}), &mut Fds::default())
    }
}

/// `driver,key=value,...` as a command's arguments: numbers and booleans where the schema wants them.
fn object(text: &str, implied: &str) -> Result<Value, QmpError> {
    let params = Params::parse(text, Some(implied)).map_err(|e| QmpError::generic(e.to_string()))?;
    let mut map = Map::new();
    for (key, value) in params.iter() {
        let value = match (key, value) {
            ("restrict" | "ipv4" | "ipv6" | "vhost" | "share" | "prealloc", "on") => json!(true),
            ("restrict" | "ipv4" | "ipv6" | "vhost" | "share" | "prealloc", "off") => json!(false),
            ("size", text) => json!(crate::cli::keyval::parse_size(text, 1)),
            ("hostfwd", text) => {
                let mut list = map.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
                list.push(json!({"str": text}));
                json!(list)
            }
            (_, text) => json!(text),
        };
        map.insert(key.to_owned(), value);
    }
    Ok(Value::Object(map))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn status(c: &Control) -> Result<String, QmpError> {
    let state = c.shared.state();
    Ok(match state {
        RunState::Running => "VM status: running\n".into(),
        RunState::Paused => "VM status: paused\n".into(),
        other => format!("VM status: paused ({})\n", other.word()),
    })
}

fn replay(c: &Control) -> Result<String, QmpError> {
    let info = c.query("query-replay")?;
    let (file, count) = (text(&info, "filename"), &info["icount"]);
    Ok(match text(&info, "mode") {
        "play" => format!("Replaying execution '{file}': instruction count = {count}\n"),
        "record" => format!("Recording execution '{file}': instruction count = {count}\n"),
        _ => "Record/replay is not active\n".into(),
    })
}

fn balloon(c: &Control) -> Result<String, QmpError> {
    let actual = c.query("query-balloon")?["actual"].as_u64().unwrap_or(0);
    Ok(format!("balloon: actual={}\n", actual >> 20))
}

fn block(c: &Control) -> Result<String, QmpError> {
    let mut out = String::new();
    for b in items(&c.query("query-block")?) {
        let mut name = text(b, "device").to_owned();
        let node = text(&b["inserted"], "node-name");
        if !node.is_empty() && node != name {
            name = format!("{name}{}({node})", if name.is_empty() { "" } else { " " });
        }
        match b.get("inserted") {
            Some(i) => {
                let ro = if i["ro"] == true { ", read-only" } else { "" };
                out.push_str(&format!("{name}: {} ({}{ro})\n", text(i, "file"), text(i, "drv")));
            }
            None => out.push_str(&format!("{name}: [not inserted]\n")),
        }
        out.push_str(&format!("    Attached to:      {}\n", text(b, "qdev")));
        if b["removable"] == true {
            let tray = if b["tray_open"] == true { "open" } else { "closed" };
            out.push_str(&format!("    Removable device: not locked, tray {tray}\n"));
        }
        out.push('\n');
    }
    Ok(out)
}

fn blockstats(c: &Control) -> Result<String, QmpError> {
    let mut out = String::new();
    for b in items(&c.query("query-blockstats")?) {
        let name = if text(b, "device").is_empty() { text(b, "node-name") } else { text(b, "device") };
        let n = |key: &str| b["stats"][key].as_u64().unwrap_or(0);
        out.push_str(&format!(
            "{name}: rd_bytes={} wr_bytes={} rd_operations={} wr_operations={} flush_operations={} \
             wr_total_time_ns={} rd_total_time_ns={} flush_total_time_ns={}\n",
            n("rd_bytes"),
            n("wr_bytes"),
            n("rd_operations"),
            n("wr_operations"),
            n("flush_operations"),
            n("wr_total_time_ns"),
            n("rd_total_time_ns"),
            n("flush_total_time_ns")
        ));
    }
    Ok(out)
}

fn chardev(c: &Control) -> Result<String, QmpError> {
    let one = |v: &Value| format!("{}: filename={}\n", text(v, "label"), text(v, "filename"));
    Ok(items(&c.query("query-chardev")?).map(one).collect())
}

fn cpus(c: &Control) -> Result<String, QmpError> {
    let one = |v: &Value| {
        let mark = if v["cpu-index"] == 0 { "*" } else { " " };
        format!("{mark} CPU #{}: thread_id={}\n", v["cpu-index"], v["thread-id"])
    };
    Ok(items(&c.query("query-cpus-fast")?).map(one).collect())
}

fn ft(c: &Control) -> Result<String, QmpError> {
    let f = super::ft::status(c)?;
    Ok(format!(
        "role: {}\nstate: {}\nepoch: {}\npeer: {}\nlag: {:.1} ms\nlog: {:.3} Mbit/s, {} bytes\noutputs held: {}\nthrottle: {:.0} %\nfailovers: {}\n",
        f.role,
        f.state,
        f.epoch,
        f.peer.as_deref().unwrap_or("none"),
        f.lag_ms,
        f.log_mbps,
        f.log_bytes,
        f.outputs_held,
        f.throttle_percent,
        f.failovers
    ))
}

fn mtree(c: &Control) -> Result<String, QmpError> {
    if c.config.machine == "none" {
        return Ok(String::new());
    }
    let (ram, (ports, memory)) =
        c.machine(|rt| (rt.machine.memory().ram_ranges().to_vec(), rt.machine.chipset().windows()))?;
    let line = |start: u64, len: u64, name: &str| {
        format!("  {start:016x}-{:016x} (i/o): {name}\n", start + len.max(1) - 1)
    };
    let mut out = String::from("address-space: memory\n");
    for (start, len) in ram {
        out.push_str(&format!("  {start:016x}-{:016x} (ram): pc.ram\n", start + len.max(1) - 1));
    }
    memory.iter().for_each(|(start, len, name)| out.push_str(&line(*start, *len, name)));
    out.push_str("\naddress-space: I/O\n");
    ports.iter().for_each(|(start, len, name)| out.push_str(&line(*start, *len, name)));
    Ok(out)
}

fn network(c: &Control) -> Result<String, QmpError> {
    let mut out = String::new();
    let inventory = super::block::inventory(c)?;
    let backends = c.shared.backends().clone();
    let describe = |dev: &crate::cli::net::NetdevConfig| match &dev.kind {
        crate::cli::net::NetKind::User { net, restrict, .. } => format!(
            "{}: index=0,type=user,net={},restrict={}",
            dev.id,
            net.as_deref().map_or("10.0.2.0", |n| n.split('/').next().unwrap_or(n)),
            if *restrict { "on" } else { "off" }
        ),
        crate::cli::net::NetKind::Tap { ifname, fd, .. } => match (ifname, fd) {
            (_, Some(fd)) => format!("{}: index=0,type=tap,fd={fd}", dev.id),
            (name, None) => {
                format!("{}: index=0,type=tap,ifname={}", dev.id, name.as_deref().unwrap_or(""))
            }
        },
    };
    for (i, nic) in backends.nics.iter().enumerate() {
        let Some(nic) = nic else { continue };
        let item = inventory.iter().find(|d| d.spec.nic == Some(i as u32));
        let name = item.and_then(|d| d.spec.id.clone()).unwrap_or_else(|| format!("nic.{i}"));
        let model = item.map_or("nic", |d| d.spec.driver.as_str());
        let mac: Vec<String> = nic.mac.iter().map(|b| format!("{b:02x}")).collect();
        out.push_str(&format!("{name}: index=0,type=nic,model={model},macaddr={}\n", mac.join(":")));
        if let Some(dev) = backends.netdevs.iter().find(|d| d.id == nic.netdev) {
            out.push_str(&format!(" \\ {}\n", describe(dev)));
        }
    }
    for dev in &backends.netdevs {
        if !backends.nics.iter().flatten().any(|n| n.netdev == dev.id) {
            out.push_str(&format!("{}\n", describe(dev)));
        }
    }
    Ok(out)
}

fn pci_text(c: &Control) -> Result<String, QmpError> {
    let mut out = String::new();
    pci_lines(pci::functions(c)?.iter(), &mut out);
    Ok(out)
}

fn pci_lines<'a>(functions: impl Iterator<Item = &'a Value>, out: &mut String) {
    for f in functions {
        let (class, id) = (&f["class_info"], &f["id"]);
        out.push_str(&format!(
            "  Bus {:2}, device {:3}, function {}:\n",
            f["bus"].as_u64().unwrap_or(0),
            f["slot"].as_u64().unwrap_or(0),
            f["function"]
        ));
        let code = class["class"].as_u64().unwrap_or(0);
        let what = class["desc"].as_str().map_or(format!("Class {code:04x}"), str::to_owned);
        let n = |key: &str| id[key].as_u64().unwrap_or(0);
        out.push_str(&format!("    {what}: PCI device {:04x}:{:04x}\n", n("vendor"), n("device")));
        if id.get("subsystem").is_some() {
            out.push_str(&format!(
                "      PCI subsystem {:04x}:{:04x}\n",
                n("subsystem-vendor"),
                n("subsystem")
            ));
        }
        if let Some(irq) = f.get("irq") {
            let pin = (b'A' + f["irq_pin"].as_u64().unwrap_or(1).clamp(1, 4) as u8 - 1) as char;
            out.push_str(&format!("      IRQ {irq}, pin {pin}\n"));
        }
        if let Some(bridge) = f.get("pci_bridge") {
            let bus = &bridge["bus"];
            let range = |name: &str, width: usize| {
                let end = |key: &str| bus[name][key].as_u64().unwrap_or(0);
                format!("[{:#0width$x}, {:#0width$x}]", end("base"), end("limit"))
            };
            out.push_str(&format!(
                "      BUS {}.\n      secondary bus {}.\n      subordinate bus {}.\n      IO range {}\n      \
                 memory range {}\n      prefetchable memory range {}\n",
                bus["number"],
                bus["secondary"],
                bus["subordinate"],
                range("io_range", 6),
                range("memory_range", 10),
                range("prefetchable_range", 10)
            ));
        }
        for r in items(&f["regions"]) {
            let (address, size) = (r["address"].as_u64().unwrap_or(0), r["size"].as_u64().unwrap_or(0));
            let end = address + size.max(1) - 1;
            let line = match r["type"] == "io" {
                true => format!("I/O at {address:#06x} [{end:#06x}]"),
                false => {
                    let bits = if r["mem_type_64"] == true { 64 } else { 32 };
                    let kind = if r["prefetch"] == true { " prefetchable" } else { "" };
                    format!("{bits} bit{kind} memory at {address:#010x} [{end:#010x}]")
                }
            };
            out.push_str(&format!("      BAR{}: {line}.\n", r["bar"]));
        }
        out.push_str(&format!("      id \"{}\"\n", text(f, "qdev_id")));
        if let Some(behind) = f["pci_bridge"].get("devices") {
            let behind: Vec<&Value> = items(behind).collect();
            pci_lines(&mut behind.into_iter() as &mut dyn Iterator<Item = &Value>, out);
        }
    }
}

fn qom_tree(object: &Object) -> String {
    fn walk(object: &Object, depth: usize, out: &mut String) {
        out.push_str(&format!("{:1$}/{2} ({3})\n", "", 2 * depth, object.name, object.kind));
        object.children.iter().for_each(|c| walk(c, depth + 1, out));
    }
    let mut out = String::new();
    walk(object, 0, &mut out);
    out
}

fn qtree(c: &Control) -> Result<String, QmpError> {
    let tree = qom::tree(c);
    let mut out = String::from("bus: main-system-bus\n  type System\n");
    let devices = tree.children.iter().find(|o| o.name == "machine").into_iter().flat_map(|m| &m.children);
    for group in devices.filter(|g| g.name.starts_with("peripheral")) {
        for dev in &group.children {
            let id = if group.name == "peripheral" { dev.name.as_str() } else { "" };
            out.push_str(&format!("  dev: {}, id \"{id}\"\n", dev.kind));
            for (name, _, value) in &dev.properties {
                out.push_str(&format!("    {name} = {value}\n"));
            }
        }
    }
    Ok(out)
}
