//! QMP against QEMU's: the same schema, the same words for what is wrong; and clients that behave badly.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::*;
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{wait_for, Result, Scratch};
use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use serde_json::{json, Value};

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(mut command: Command, socket: &str, args: &[&str]) -> Result<Program> {
    let child = command
        .args(args)
        .args(["-qmp", &format!("unix:{socket},server=on,wait=off")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Ok(Program(child.map_err(|e| e.to_string())?))
}

/// The real QEMU, if it is installed.
fn qemu(socket: &str, args: &[&str]) -> Result<Option<Program>> {
    let program = "qemu-system-x86_64";
    match Command::new(program).arg("-version").output() {
        Ok(out) if String::from_utf8_lossy(&out.stdout).contains("version 7.2") => {
            start(Command::new(program), socket, args).map(Some)
        }
        _ => {
            eprintln!(
                "skipped: {program} 7.2 is not installed (packaging/setup.sh installs it on Debian 12)"
            );
            Ok(None)
        }
    }
}

/// What ftvm has not of QEMU's types, by the beginning of its path (command or event, members, `+variant`, `=value`), and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("GUEST_CRASHLOADED/info", "pvpanic tells nothing more"),
    ("GUEST_PANICKED/info", "pvpanic tells nothing more"),
    ("blockdev-add/driver=", "drivers that ftvm has not"),
    ("blockdev-add/+", "drivers that ftvm has not, and options of the others that it would not obey"),
    ("block-commit/filter-node-name", "jobs have no filter node"),
    ("block-stream/filter-node-name", "jobs have no filter node"),
    ("block-export-add/type=", "exports of other kinds"),
    ("block-export-add/+", "exports of other kinds"),
    ("nbd-server-start/addr/", "other kinds of sockets, and options that it would not obey"),
    ("block_set_io_throttle/group", "there are no groups of throttled disks"),
    ("blockdev-backup/filter-node-name", "jobs have no filter node"),
    ("blockdev-backup/x-perf", "it is unstable"),
    ("blockdev-create/options/", "images that ftvm does not make, and encryption"),
    ("blockdev-mirror/buf-size", "a job's buffer has a fixed size"),
    ("blockdev-mirror/filter-node-name", "jobs have no filter node"),
    ("drive-backup/filter-node-name", "jobs have no filter node"),
    ("drive-backup/x-perf", "it is unstable"),
    ("drive-mirror/buf-size", "a job's buffer has a fixed size"),
    ("human-monitor-command$", "savevm is not there"),
    ("migrate-set-parameters/", "parameters without an effect here"),
    ("query-migrate-parameters/", "parameters without an effect here"),
    ("query-migrate/", "ways of migration that ftvm has not"),
    ("netdev_add/type=", "network back ends that ftvm has not"),
    ("netdev_add/+", "network back ends that ftvm has not, and options of the others that it would not obey"),
    ("object-add/qom-type=", "objects that ftvm has not"),
    ("object-add/+", "objects that ftvm has not, and properties of the others that it would not obey"),
    ("query-block[]/inserted/image/format-specific/", "formats that ftvm has not, and encryption"),
    ("query-blockstats[]/driver-specific/+", "drivers that ftvm has not"),
    ("query-cpus-fast[]/target=", "other architectures"),
    ("query-cpus-fast[]/+", "other architectures"),
    ("BLOCK_JOB_CANCELLED/type=", "jobs that ftvm has not"),
    ("query-memory-devices[]/", "memory devices that ftvm has not"),
    ("query-tpm[]/", "there is no TPM"),
    ("query-tpm-types[]=", "there is no TPM"),
    ("transaction/properties", "actions do not end later than the transaction"),
];

type Entries = BTreeMap<String, Value>;

fn entries(schema: &Value) -> Entries {
    let list = schema.as_array().into_iter().flatten();
    list.map(|e| (e["name"].as_str().unwrap_or_default().to_owned(), e.clone())).collect()
}

/// Compares types of ours with QEMU's.
struct Compare {
    ours: Entries,
    theirs: Entries,
    seen: Vec<(String, String)>,
    wrong: Vec<String>,
    left_out: Vec<String>,
}

impl Compare {
    fn kind<'a>(of: &'a Entries, name: &str) -> &'a Value {
        static NOTHING: Value = Value::Null;
        of.get(name).unwrap_or(&NOTHING)
    }

    fn names(entry: &Value) -> Vec<String> {
        let list = entry["values"].as_array().into_iter().flatten();
        list.filter_map(|v| v.as_str().map(str::to_owned)).collect()
    }

    /// Our type must take nothing that QEMU's does not, and every member must be alike.
    fn types(&mut self, path: &str, ours: &str, theirs: &str) {
        let pair = (ours.to_owned(), theirs.to_owned());
        if self.seen.contains(&pair) {
            return;
        }
        self.seen.push(pair);
        let (a, b) = (Self::kind(&self.ours, ours).clone(), Self::kind(&self.theirs, theirs).clone());
        if a["meta-type"] != b["meta-type"] {
            self.wrong.push(format!("{path}: {} here, {} in QEMU", a["meta-type"], b["meta-type"]));
            return;
        }
        match a["meta-type"].as_str() {
            Some("builtin") => {
                if a["json-type"] != b["json-type"] {
                    self.wrong.push(format!("{path}: {} here, {} in QEMU", a["json-type"], b["json-type"]));
                }
            }
            Some("enum") => {
                let (theirs, ours) = (Self::names(&b), Self::names(&a));
                let missing = theirs.iter().filter(|v| !ours.contains(v));
                self.left_out.extend(missing.map(|v| format!("{path}={v}")));
                for value in Self::names(&a).iter().filter(|v| !theirs.contains(v)) {
                    self.wrong.push(format!("{path}: QEMU has no value {value}"));
                }
            }
            Some("array") => {
                let text = |e: &Value| e["element-type"].as_str().unwrap_or_default().to_owned();
                self.types(&format!("{path}[]"), &text(&a), &text(&b));
            }
            Some("object") => self.objects(path, &a, &b),
            Some("alternate") => {
                let mut rest: Vec<String> = members(&b).iter().map(|m| kind_of(m)).collect();
                for m in members(&a) {
                    let one = Self::kind(&self.ours, &kind_of(m))["meta-type"].clone();
                    let json = Self::kind(&self.ours, &kind_of(m))["json-type"].clone();
                    let found = rest.iter().position(|t| {
                        let other = Self::kind(&self.theirs, t);
                        other["meta-type"] == one && other["json-type"] == json
                    });
                    match found {
                        Some(i) => {
                            let other = rest.remove(i);
                            self.types(path, &kind_of(m), &other);
                        }
                        None => self.wrong.push(format!("{path}: QEMU has no alternative {one} {json}")),
                    }
                }
                self.left_out.extend(rest.iter().map(|_| format!("{path}|")));
            }
            other => self.wrong.push(format!("{path}: {other:?}")),
        }
    }

    fn objects(&mut self, path: &str, a: &Value, b: &Value) {
        for m in members(a) {
            let name = m["name"].as_str().unwrap_or_default();
            let path = format!("{path}/{name}");
            let Some(other) = members(b).into_iter().find(|o| o["name"] == name) else {
                if path != "query-version/ftvm" {
                    self.wrong.push(format!("{path}: QEMU has no such member"));
                }
                continue;
            };
            if m.get("default").is_some() != other.get("default").is_some() {
                self.wrong.push(format!("{path}: optional in one of the two"));
            }
            if m["features"] != other["features"] {
                self.wrong.push(format!("{path}: other features"));
            }
            self.types(&path, &kind_of(m), &kind_of(other));
        }
        for other in members(b) {
            let name = other["name"].as_str().unwrap_or_default();
            let here = members(a).into_iter().any(|m| m["name"] == name);
            if !here {
                self.left_out.push(format!("{path}/{name}"));
            }
        }
        if a["tag"] != b["tag"] {
            self.wrong.push(format!("{path}: tag {} here, {} in QEMU", a["tag"], b["tag"]));
        }
        for o in b["variants"].as_array().into_iter().flatten() {
            let here = a["variants"].as_array().into_iter().flatten().any(|v| v["case"] == o["case"]);
            if !here {
                self.left_out.push(format!("{path}/+{}", o["case"].as_str().unwrap_or_default()));
            }
        }
        for v in a["variants"].as_array().into_iter().flatten() {
            let case = &v["case"];
            let found = b["variants"].as_array().into_iter().flatten().find(|o| &o["case"] == case);
            match found {
                Some(o) => self.types(
                    &format!("{path}/+{}", case.as_str().unwrap_or_default()),
                    &kind_of(v),
                    &kind_of(o),
                ),
                None => self.wrong.push(format!("{path}: QEMU has no variant {case}")),
            }
        }
    }
}

fn members(entry: &Value) -> Vec<&Value> {
    entry["members"].as_array().into_iter().flatten().collect()
}

fn kind_of(member: &Value) -> String {
    member["type"].as_str().unwrap_or_default().to_owned()
}

const NONE: &[&str] = &["-S", "-nodefaults", "-display", "none", "-machine", "none,accel=tcg"];

#[test]
fn the_schema_is_qemus() -> Result<()> {
    let scratch = Scratch::new("schema")?;
    let (mine, other) = (scratch.path("ftvm.qmp"), scratch.path("qemu.qmp"));
    let Some(_qemu) = qemu(&other, NONE)? else { return Ok(()) };
    let _ftvm = start(ftvm(), &mine, NONE)?;
    let ask = |socket: &str| Qmp::connect(socket)?.command("query-qmp-schema", Value::Null);
    let (ours, theirs) = (entries(&ask(&mine)?), entries(&ask(&other)?));
    let mut compare = Compare {
        ours: ours.clone(),
        theirs: theirs.clone(),
        seen: Vec::new(),
        wrong: Vec::new(),
        left_out: Vec::new(),
    };
    let mut shared = 0;
    for (name, entry) in &ours {
        let kind = entry["meta-type"].as_str().unwrap_or_default();
        if kind != "command" && kind != "event" {
            continue;
        }
        let Some(other) = theirs.get(name) else {
            // ftvm's own begin so.
            assert!(
                name.starts_with("query-ft") || name.starts_with("ft-") || name.starts_with("FT_"),
                "QEMU has no {name}"
            );
            continue;
        };
        shared += 1;
        assert_eq!(other["meta-type"], kind, "{name}");
        let text = |e: &Value, key: &str| e[key].as_str().unwrap_or_default().to_owned();
        compare.types(name, &text(entry, "arg-type"), &text(other, "arg-type"));
        if kind == "command" {
            compare.types(name, &text(entry, "ret-type"), &text(other, "ret-type"));
            let ours: Vec<&Value> = entry["features"].as_array().into_iter().flatten().collect();
            let theirs: Vec<&Value> = other["features"].as_array().into_iter().flatten().collect();
            compare
                .left_out
                .extend(theirs.iter().filter(|f| !ours.contains(f)).map(|f| format!("{name}${f}")));
            if ours.iter().any(|f| !theirs.contains(f)) {
                compare.wrong.push(format!("{name}: features {ours:?} here, {theirs:?} in QEMU"));
            }
        }
    }
    assert!(shared > 80, "only {shared} commands and events are shared");
    assert!(compare.wrong.is_empty(), "{}", compare.wrong.join("\n"));
    // Every difference is meant, and every one that is named is there.
    let known = |path: &String| LEFT_OUT.iter().any(|(p, _)| path.starts_with(p));
    let unknown: Vec<String> = compare.left_out.iter().filter(|p| !known(p)).cloned().collect();
    assert!(unknown.is_empty(), "left out without a reason:\n{}", unknown.join("\n"));
    for (path, reason) in LEFT_OUT {
        assert!(compare.left_out.iter().any(|p| p.starts_with(path)), "{path} is not left out ({reason})");
    }
    Ok(())
}

/// Requests with something wrong in them.
const WRONG: &[&str] = &[
    "garbage",
    "[1]",
    r#"{"execute":3}"#,
    r#"{"exec-oob":"query-status"}"#,
    "{}",
    r#"{"execute":"query-status","x":1}"#,
    r#"{"execute":"nope","id":7}"#,
    r#"{"execute":"qmp_capabilities"}"#,
    r#"{"execute":"query-status","arguments":3}"#,
    r#"{"execute":"query-status","arguments":{"a":1}}"#,
    r#"{"execute":"device_del"}"#,
    r#"{"execute":"device_del","arguments":{"id":3}}"#,
    r#"{"execute":"device_del","arguments":{"id":"nope"}}"#,
    r#"{"execute":"balloon","arguments":{"value":"3"}}"#,
    r#"{"execute":"balloon","arguments":{"value":3}}"#,
    r#"{"execute":"set-action","arguments":{"reboot":"nope"}}"#,
    r#"{"execute":"send-key","arguments":{"keys":[{"type":"number"}]}}"#,
    r#"{"execute":"send-key","arguments":{"keys":[{"type":"nope","data":1}]}}"#,
    r#"{"execute":"send-key","arguments":{"keys":[{"type":"number","data":1,"z":2}]}}"#,
    r#"{"execute":"query-cpu-model-expansion","arguments":{"type":"static","model":{"name":"nope"}}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"a","file":3}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"nope","node-name":"a","file":"b"}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"a","filename":"/nope"}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"file","filename":"/dev/null"}}"#,
    r#"{"execute":"blockdev-del","arguments":{"node-name":"nope"}}"#,
    r#"{"execute":"block-dirty-bitmap-add","arguments":{"node":"nope","name":"b"}}"#,
    r#"{"execute":"block-dirty-bitmap-add","arguments":{"node":"nope","name":""}}"#,
    r#"{"execute":"block-dirty-bitmap-clear","arguments":{"node":"nope","name":"b"}}"#,
    r#"{"execute":"block-dirty-bitmap-merge","arguments":{"node":"nope","target":"b","bitmaps":["c"]}}"#,
    r#"{"execute":"nbd-server-stop"}"#,
    r#"{"execute":"nbd-server-remove","arguments":{"name":"nope"}}"#,
    r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"nope"}}"#,
    r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"9e","node-name":"nope"}}"#,
    r#"{"execute":"block-export-del","arguments":{"id":"nope"}}"#,
    r#"{"execute":"blockdev-reopen","arguments":{"options":[{"driver":"raw","file":"x"}]}}"#,
    r#"{"execute":"blockdev-reopen","arguments":{"options":[{"driver":"raw","node-name":"nope","file":"x"}]}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"nope"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-net-pci","nope":1}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-net-pci","id":"net0"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-blk-pci","id":"v0"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-blk-pci","id":"v0","drive":"nope"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-net-pci","id":"v0","netdev":"n0"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"v0","bus":"nope"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"v0","addr":"40"}}"#,
    r#"{"execute":"device_add","arguments":{"driver":"virtio-rng-pci","id":"9v"}}"#,
    r#"{"execute":"netdev_add","arguments":{"type":"user","id":"n0"}}"#,
    r#"{"execute":"netdev_add","arguments":{"type":"nope","id":"n1"}}"#,
    r#"{"execute":"netdev_add","arguments":{"type":"tap","id":"n5","fd":"nofd"}}"#,
    r#"{"execute":"netdev_del","arguments":{"id":"nope"}}"#,
    r#"{"execute":"set_link","arguments":{"name":"nope","up":true}}"#,
    r#"{"execute":"qom-get","arguments":{"path":"/machine/nope","property":"x"}}"#,
    r#"{"execute":"qom-get","arguments":{"path":"/machine","property":"nope"}}"#,
    r#"{"execute":"qom-list","arguments":{"path":"/nope"}}"#,
    r#"{"execute":"qom-list-properties","arguments":{"typename":"nope"}}"#,
    r#"{"execute":"device-list-properties","arguments":{"typename":"nope"}}"#,
    r#"{"execute":"device-list-properties","arguments":{"typename":"memory-backend-ram"}}"#,
    r#"{"execute":"object-del","arguments":{"id":"nope"}}"#,
    r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#,
    r#"{"execute":"closefd","arguments":{"fdname":"x"}}"#,
    r#"{"execute":"add-fd"}"#,
    r#"{"execute":"remove-fd","arguments":{"fdset-id":9}}"#,
    r#"{"execute":"eject","arguments":{"id":"nope"}}"#,
    r#"{"execute":"eject"}"#,
    r#"{"execute":"query-command-line-options","arguments":{"option":"nope"}}"#,
    r#"{"execute":"human-monitor-command","arguments":{"command-line":"info nope"}}"#,
    r#"{"execute":"human-monitor-command","arguments":{"command-line":"device_del nope"}}"#,
];

/// A connection without any help.
struct Raw {
    stream: UnixStream,
    input: BufReader<UnixStream>,
}

impl Raw {
    fn connect(path: &str) -> Result<Raw> {
        let stream = wait_for("the QMP socket", Duration::from_secs(20), || UnixStream::connect(path).ok())?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
        let input = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
        let mut raw = Raw { stream, input };
        assert!(raw.line()?.ends_with("\r\n"), "lines end as QEMU's");
        raw.ask(r#"{"execute":"qmp_capabilities"}"#)?;
        Ok(raw)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.input.read_line(&mut line) {
            Ok(0) => Err("the connection was closed".into()),
            Ok(_) => Ok(line),
            Err(e) => Err(e.to_string()),
        }
    }

    fn reply(&mut self) -> Result<Value> {
        loop {
            let value: Value = serde_json::from_str(&self.line()?).map_err(|e| e.to_string())?;
            if value.get("event").is_none() {
                return Ok(value);
            }
        }
    }

    fn ask(&mut self, request: &str) -> Result<Value> {
        self.stream.write_all(format!("{request}\r\n").as_bytes()).map_err(|e| e.to_string())?;
        self.reply()
    }

    /// Send a request with a file descriptor.
    fn ask_with(&mut self, request: &str, file: &std::fs::File) -> Result<Value> {
        let fds = [file.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&fds)];
        let text = [IoSlice::new(request.as_bytes())];
        sendmsg::<()>(self.stream.as_raw_fd(), &text, &message, MsgFlags::empty(), None)
            .map_err(|e| e.to_string())?;
        self.reply()
    }
}

const MACHINE: &[&str] = &[
    "-S",
    "-nodefaults",
    "-display",
    "none",
    "-machine",
    "pc,accel=tcg",
    "-netdev",
    "user,id=n0",
    "-device",
    "virtio-net-pci,id=net0,netdev=n0",
];

#[test]
fn wrong_requests_get_qemus_words() -> Result<()> {
    let scratch = Scratch::new("words")?;
    let (mine, other) = (scratch.path("ftvm.qmp"), scratch.path("qemu.qmp"));
    let Some(_qemu) = qemu(&other, MACHINE)? else { return Ok(()) };
    let _ftvm = start(ftvm(), &mine, MACHINE)?;
    let (mut ours, mut theirs) = (Raw::connect(&mine)?, Raw::connect(&other)?);
    let mut wrong = Vec::new();
    for request in WRONG {
        let (a, b) = (ours.ask(request)?, theirs.ask(request)?);
        if a != b {
            wrong.push(format!("{request}\n  here {a}\n  QEMU {b}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn descriptors_come_over_the_socket_and_clients_that_do_not_read_harm_nobody() -> Result<()> {
    let scratch = Scratch::new("clients")?;
    let (one, two) = (scratch.path("one.qmp"), scratch.path("two.qmp"));
    let monitor = format!("unix:{two},server=on,wait=off");
    let mut args = MACHINE.to_vec();
    args.extend(["-qmp-pretty", &monitor]);
    let _ftvm = start(ftvm(), &one, &args)?;

    // Descriptors: a name for one client, a set for all.
    let mut first = Raw::connect(&one)?;
    let path = scratch.path("disc");
    std::fs::write(&path, vec![0u8; 1 << 20]).map_err(|e| e.to_string())?;
    let file = std::fs::File::open(&path).map_err(|e| e.to_string())?;
    let get = r#"{"execute":"getfd","arguments":{"fdname":"mine"}}"#;
    assert_eq!(first.ask_with(get, &file)?["return"], json!({}));
    assert_eq!(first.ask(r#"{"execute":"closefd","arguments":{"fdname":"mine"}}"#)?["return"], json!({}));
    let set = first.ask_with(r#"{"execute":"add-fd","arguments":{"fdset-id":5,"opaque":"disc"}}"#, &file)?;
    assert_eq!(set["return"]["fdset-id"], 5, "{set}");
    std::fs::remove_file(&path).map_err(|e| e.to_string())?;
    let node = r#"{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"disc","read-only":true,"file":{"driver":"file","filename":"/dev/fdset/5"}}}"#;
    assert_eq!(first.ask(node)?["return"], json!({}));
    let nodes = first.ask(r#"{"execute":"query-named-block-nodes"}"#)?;
    assert_eq!(nodes["return"][0]["image"]["virtual-size"], 1 << 20, "{nodes}");

    // A client on the second monitor asks for much and reads nothing.
    let mut silent = Raw::connect_pretty(&two)?;
    silent.stream.set_nonblocking(true).map_err(|e| e.to_string())?;
    let request = b"{\"execute\":\"query-qmp-schema\"}\n";
    let mut sent = 0;
    while sent < 100_000 {
        match silent.stream.write(request) {
            Ok(_) => sent += 1,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e.to_string()),
        }
    }
    assert!(sent < 100_000, "the monitor reads on though nobody takes its answers");
    // The first one is served as before, and the machine runs.
    assert_eq!(first.ask(r#"{"execute":"cont"}"#)?["return"], json!({}));
    assert_eq!(first.ask(r#"{"execute":"query-status"}"#)?["return"]["status"], "running");
    let many: String = (0..3000).map(|i| format!("{{\"execute\":\"query-status\",\"id\":{i}}}")).collect();
    first.stream.write_all(many.as_bytes()).map_err(|e| e.to_string())?;
    for i in 0..3000 {
        assert_eq!(first.reply()?["id"], i);
    }
    // When it reads, nothing is missing.
    silent.stream.set_nonblocking(false).map_err(|e| e.to_string())?;
    let mut answers = 0;
    while answers < 3 {
        if silent.line()?.trim_end() == "}" {
            answers += 1;
        }
    }
    // A request that never ends is the end of its client only.
    let mut endless = UnixStream::connect(&one);
    drop(first);
    let endless = match &mut endless {
        Ok(s) => s,
        Err(e) => return Err(e.to_string()),
    };
    let piece = vec![b'['; 1 << 20];
    let ended = (0..200).any(|_| endless.write_all(&piece).is_err());
    assert!(ended, "200 MiB without an end were taken");
    let mut rest = Vec::new();
    let _ = endless.read_to_end(&mut rest);
    let mut again = Raw::connect(&one)?;
    assert_eq!(again.ask(r#"{"execute":"query-status"}"#)?["return"]["status"], "running");
    Ok(())
}

impl Raw {
    /// A pretty monitor's greeting has many lines.
    fn connect_pretty(path: &str) -> Result<Raw> {
        let stream = wait_for("the QMP socket", Duration::from_secs(20), || UnixStream::connect(path).ok())?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
        let input = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
        let mut raw = Raw { stream, input };
        while raw.line()?.trim_end() != "}" {}
        raw.stream.write_all(b"{\"execute\":\"qmp_capabilities\"}").map_err(|e| e.to_string())?;
        while raw.line()?.trim_end() != "}" {}
        Ok(raw)
    }
}
