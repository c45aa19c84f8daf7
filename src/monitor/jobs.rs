//! Commands about jobs, and what block jobs do at their ends.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ftvm_block::copy::{Commit, Mirror, Part, Step, Stream, Work};
use ftvm_block::crypto::LuksOptions;
use ftvm_block::qcow2::{CreateOptions, Preallocation};
use ftvm_block::{BlockError, Image, Node, OpenOptions, Root};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::graph::{self, find, free, given, moved, no_pair, to_the_back, Found};
use super::{done, Control, Reply};
use crate::host::backends::Moved;
use crate::host::jobs::{Body, End, Refused, Wanted};
use crate::host::Outside;
use crate::runtime::control::Shared;
use crate::runtime::Events;

fn fail<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

fn text(e: BlockError) -> String {
    e.to_string()
}

/// What the end of a job reaches for.
struct Place {
    outside: Arc<Outside>,
    shared: Arc<Shared>,
    events: Events,
}

impl Place {
    fn of(c: &Control) -> Self {
        Place { outside: Arc::clone(&c.outside), shared: Arc::clone(&c.shared), events: c.events.clone() }
    }

    /// `to` is in front of drive `front` now: the configuration follows.
    fn exchanged(&self, front: usize, to: Moved) {
        self.follow(vec![(front, to)]);
    }

    fn follow(&self, exchanges: Vec<(usize, Moved)>) {
        let answer = graph::note_from(&self.events, exchanges);
        while !self.shared.jobs.is_closing() {
            match answer.recv_timeout(Duration::from_millis(50)) {
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        }
    }

    /// The root of a node that was added by name.
    fn root_of(&self, node: &Arc<Node>, front: usize) -> Option<Arc<Root>> {
        let count = self.shared.backends().drives.len();
        let roots = (0..count).filter(|i| *i != front).filter_map(|i| self.outside.disk_root(i));
        roots.into_iter().find(|root| Arc::ptr_eq(&root.node(), node))
    }

    fn is_legacy(&self, front: usize) -> bool {
        self.shared.backends().drives.get(front).and_then(Option::as_ref).is_some_and(|d| !d.node)
    }
}

/// A mirror, and a commit of the active image: at the end the target takes the source's place.
struct MirrorJob {
    work: Mirror,
    place: Place,
    front: usize,
    source: Arc<Node>,
    target: Arc<Node>,
    /// The target is in the source's chain and was opened for writing for this.
    into_base: bool,
}

impl Work for MirrorJob {
    fn step(&mut self) -> Result<Step, BlockError> {
        self.work.step()
    }
    fn progress(&self) -> (u64, u64) {
        self.work.progress()
    }
}

impl Body for MirrorJob {
    fn end(&mut self, end: End) -> Result<(), String> {
        if end == End::Abort {
            if self.into_base {
                self.target.flush().map_err(text)?;
                to_the_back(&self.target);
            }
            return Ok(());
        }
        let root = self.place.outside.disk_root(self.front).ok_or("the drive is gone")?;
        let mut front = root.hold();
        self.work.finish().map_err(text)?;
        if end == End::Stop {
            drop(front);
            if self.into_base {
                to_the_back(&self.target);
            }
            return Ok(());
        }
        if !Arc::ptr_eq(&front, &self.source) {
            return Err("another image has come in front of the one that is copied".into());
        }
        let behind = self.place.root_of(&self.target, self.front);
        *front = Arc::clone(&self.target);
        drop(front);
        if let Some(behind) = behind {
            *behind.hold() = Arc::clone(&self.source);
        }
        to_the_back(&self.source);
        if self.place.is_legacy(self.front) {
            self.source.rename(None);
        }
        self.place.exchanged(self.front, moved(&self.target));
        Ok(())
    }
}

/// A commit of images that are not written.
struct CommitJob {
    work: Commit,
    /// What stands on the topmost of them.
    above: Arc<Node>,
    base: Arc<Node>,
    name: String,
    place: Place,
}

impl Work for CommitJob {
    fn step(&mut self) -> Result<Step, BlockError> {
        self.work.step()
    }
    fn progress(&self) -> (u64, u64) {
        self.work.progress()
    }
}

/// Name another image below, then stand on it: a crash between leaves two names for the same contents.
fn stand_on(above: &Node, base: Option<&Arc<Node>>, name: &str) -> Result<(), BlockError> {
    let closed = above.read_only();
    if closed {
        above.reopen(false)?;
    }
    let result =
        above.name_backing(base.map(|b| (name, b.format()))).and_then(|()| above.set_backing(base.cloned()));
    if closed {
        to_the_back(above);
    }
    result
}

impl Body for CommitJob {
    fn end(&mut self, end: End) -> Result<(), String> {
        let mut result = Ok(());
        if end == End::Complete {
            result = stand_on(&self.above, Some(&self.base), &self.name).map_err(text);
            self.place.follow(Vec::new());
        }
        to_the_back(&self.base);
        result
    }
}

struct StreamJob {
    work: Stream,
    top: Arc<Node>,
    closed: bool,
    name: String,
    place: Place,
}

impl Work for StreamJob {
    fn step(&mut self) -> Result<Step, BlockError> {
        self.work.step()
    }
    fn progress(&self) -> (u64, u64) {
        self.work.progress()
    }
}

impl Body for StreamJob {
    fn end(&mut self, end: End) -> Result<(), String> {
        let mut result = Ok(());
        if end == End::Complete {
            result = stand_on(&self.top, self.work.base().as_ref(), &self.name).map_err(text);
            self.place.follow(Vec::new());
        }
        if self.closed {
            to_the_back(&self.top);
        }
        result
    }
}

/// `blockdev-create`
struct CreateJob {
    work: Option<Box<dyn FnOnce() -> Result<(), BlockError> + Send>>,
}

impl Work for CreateJob {
    fn step(&mut self) -> Result<Step, BlockError> {
        if let Some(work) = self.work.take() {
            work()?;
        }
        Ok(Step::Done)
    }
    fn progress(&self) -> (u64, u64) {
        (u64::from(self.work.is_none()), 1)
    }
}

impl Body for CreateJob {
    fn end(&mut self, _: End) -> Result<(), String> {
        Ok(())
    }
}

/// Arguments that QEMU has and this does not obey are refused, if they say something else than what happens.
fn refuse(a: &Map<String, Value>, keys: &[(&str, &[&str])]) -> Result<(), QmpError> {
    for (key, fine) in keys {
        let said = match a.get(*key) {
            None => continue,
            Some(Value::String(s)) => s.clone(),
            Some(other) => other.to_string(),
        };
        if !fine.contains(&said.as_str()) {
            return fail(format!("the argument '{key}={said}' is not supported"));
        }
    }
    Ok(())
}

pub(super) fn wanted(
    kind: &'static str,
    a: &Map<String, Value>,
    default_id: &str,
    nodes: Vec<Arc<Node>>,
) -> Result<Wanted, QmpError> {
    refuse(
        a,
        &[
            ("granularity", &["0", "65536"]),
            ("copy-mode", &["background"]),
            ("replaces", &[]),
            ("compress", &["false"]),
            ("unmap", &["true"]),
        ],
    )?;
    let mut stop_on_error = false;
    for key in ["on-error", "on-source-error", "on-target-error"] {
        match given(a, key) {
            None | Some("report" | "auto") => {}
            Some("stop") => stop_on_error = true,
            Some(other) => return fail(format!("the argument '{key}={other}' is not supported")),
        }
    }
    let id = given(a, "job-id").unwrap_or(default_id);
    if !super::devices::is_identifier(id) {
        return fail(format!("Invalid job ID '{id}'"));
    }
    let speed = a.get("speed").map_or(Some(0), Value::as_u64);
    let yes = |key: &str| a.get(key).and_then(Value::as_bool).unwrap_or(true);
    Ok(Wanted {
        id: id.to_owned(),
        kind,
        auto_finalize: yes("auto-finalize"),
        auto_dismiss: yes("auto-dismiss"),
        speed: speed.ok_or_else(|| QmpError::generic("Parameter 'speed' expects a non-negative value"))?,
        stop_on_error,
        nodes,
    })
}

fn start(c: &Control, wanted: Wanted, body: Box<dyn Body>) -> Reply {
    c.shared.jobs.start(wanted, &c.shared.events, body).map_err(QmpError::generic)?;
    done()
}

/// The drive whose active image a command names.
pub(super) fn active(c: &Control, name: &str) -> Result<(usize, Arc<Node>), QmpError> {
    let Found { node, front } = find(c, name)?;
    let front = front.ok_or_else(|| QmpError::generic(format!("'{name}' is not at the front of a drive")))?;
    Ok((front, node))
}

/// A node of a chain by its name or its file.
fn in_chain(chain: &[Arc<Node>], name: Option<&str>, file: Option<&str>) -> Result<Option<usize>, QmpError> {
    let at = match (name, file) {
        (Some(_), Some(_)) => return fail("a node and a file cannot be specified at the same time"),
        (Some(name), None) => chain.iter().position(|n| n.name() == name),
        (None, Some(file)) => {
            let file = graph::absolute(file);
            chain.iter().position(|n| n.path().is_some_and(|p| graph::absolute(&p.to_string_lossy()) == file))
        }
        (None, None) => return Ok(None),
    };
    let what = name.or(file).unwrap_or_default();
    at.map(Some).ok_or_else(|| QmpError::generic(format!("Can't find '{what}' in the backing chain")))
}

fn file_of(node: &Node) -> String {
    node.path().map_or_else(String::new, |p| graph::absolute(&p.to_string_lossy()))
}

pub fn commit(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    let a = call.arguments;
    let device = call.text("device");
    let (front, active) = active(c, device)?;
    let chain = active.chain();
    let top = in_chain(&chain, given(a, "top-node"), given(a, "top"))?.unwrap_or(0);
    let base = in_chain(&chain, given(a, "base-node"), given(a, "base"))?.unwrap_or(chain.len() - 1);
    if base <= top {
        return fail(if chain.len() == 1 {
            format!("'{device}' has no backing image")
        } else {
            format!("Base '{}' is not below top '{}'", chain[base].name(), chain[top].name())
        });
    }
    let used: Vec<Arc<Node>> = chain[top.saturating_sub(1)..=base].to_vec();
    for node in &used {
        free(c, node)?;
    }
    let wanted = wanted("commit", a, device, used)?;
    let (top_node, base_node) = (Arc::clone(&chain[top]), Arc::clone(&chain[base]));
    base_node.reopen(false).map_err(|e| QmpError::generic(e.to_string()))?;
    let grown = if base_node.size() < top_node.size() { base_node.resize(top_node.size()) } else { Ok(()) };
    let body = grown.map_err(text).and_then(|()| -> Result<Box<dyn Body>, String> {
        if top > 0 {
            let name = given(a, "backing-file").map_or_else(|| file_of(&base_node), str::to_owned);
            let work = Commit::new(top_node, Arc::clone(&base_node));
            let above = Arc::clone(&chain[top - 1]);
            let (base, place) = (Arc::clone(&base_node), Place::of(c));
            return Ok(Box::new(CommitJob { work, above, base, name, place }));
        }
        let part = Part::Above(Arc::clone(&base_node));
        let work = Mirror::new(Arc::clone(&active), Arc::clone(&base_node), part).map_err(text)?;
        let (source, target) = (Arc::clone(&active), Arc::clone(&base_node));
        Ok(Box::new(MirrorJob { work, place: Place::of(c), front, source, target, into_base: true }))
    });
    let started = body.map_err(QmpError::generic).and_then(|body| start(c, wanted, body));
    if started.is_err() {
        to_the_back(&base_node);
    }
    started
}

pub fn stream(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    let a = call.arguments;
    let device = call.text("device");
    let top = find(c, device)?.node;
    let chain = top.chain();
    let base = in_chain(&chain, given(a, "base-node"), given(a, "base"))?;
    let base = match given(a, "bottom") {
        Some(_) if base.is_some() => return fail("'base' and 'bottom' cannot be specified at the same time"),
        Some(bottom) => in_chain(&chain, Some(bottom), None)?.map(|at| at + 1).filter(|at| *at < chain.len()),
        None => base,
    };
    if base == Some(0) {
        return fail(format!("Can't find base '{}' in the backing chain", chain[0].name()));
    }
    let used: Vec<Arc<Node>> = chain[..base.unwrap_or(chain.len())].to_vec();
    for node in &used {
        free(c, node)?;
    }
    let base = base.map(|at| Arc::clone(&chain[at]));
    let name = given(a, "backing-file")
        .map_or_else(|| base.as_deref().map_or_else(String::new, file_of), str::to_owned);
    let wanted = wanted("stream", a, device, used)?;
    let closed = top.read_only();
    if closed {
        top.reopen(false).map_err(|e| QmpError::generic(e.to_string()))?;
    }
    let work = Stream::new(Arc::clone(&top), base);
    let started = start(
        c,
        wanted,
        Box::new(StreamJob { work, top: Arc::clone(&top), closed, name, place: Place::of(c) }),
    );
    if started.is_err() && closed {
        to_the_back(&top);
    }
    started
}

/// What `sync` says is copied.
pub(super) fn part(a: &Map<String, Value>) -> Result<Part, QmpError> {
    Ok(match given(a, "sync") {
        Some("full") => Part::Full,
        Some("top") => Part::Top,
        Some("none") => Part::New,
        other => return fail(format!("sync={} is not supported", other.unwrap_or_default())),
    })
}

/// A node that a copy goes to.
pub(super) fn target(c: &Control, name: &str, source: &Arc<Node>) -> Result<Arc<Node>, QmpError> {
    let target = find(c, name)?.node;
    free(c, &target)?;
    if source.chain().iter().any(|n| Arc::ptr_eq(n, &target)) {
        return fail("Can't mirror node into itself");
    }
    if graph::parent(c, &target).is_some() || is_used(c, &target)? {
        return fail(format!("Node '{name}' is busy: it is used by a device or another node"));
    }
    if target.read_only() {
        return fail(format!("Block node is read-only: '{name}'"));
    }
    Ok(target)
}

/// Whether a device has a node in front.
pub(super) fn is_used(c: &Control, node: &Arc<Node>) -> Result<bool, QmpError> {
    let drives: Vec<u32> = super::block::inventory(c)?.iter().filter_map(|i| i.spec.drive).collect();
    Ok(drives
        .into_iter()
        .filter_map(|d| c.outside.disk_root(d as usize))
        .any(|r| Arc::ptr_eq(&r.node(), node)))
}

fn mirror_to(c: &Control, a: &Map<String, Value>, device: &str, target: Arc<Node>) -> Reply {
    let (front, source) = active(c, device)?;
    free(c, &source)?;
    let wanted = wanted("mirror", a, device, vec![Arc::clone(&source), Arc::clone(&target)])?;
    let work = Mirror::new(Arc::clone(&source), Arc::clone(&target), part(a)?);
    let work = work.map_err(|e| QmpError::generic(e.to_string()))?;
    let body = MirrorJob { work, place: Place::of(c), front, source, target, into_base: false };
    start(c, wanted, Box::new(body))
}

pub fn mirror(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    let (_, source) = active(c, call.text("device"))?;
    let target = target(c, call.text("target"), &source)?;
    mirror_to(c, call.arguments, call.text("device"), target)
}

/// The file of `drive-mirror` and `drive-backup`, made if it is wanted, and its node.
pub(super) fn drive_target(c: &Control, a: &Map<String, Value>, device: &str) -> Result<Arc<Node>, QmpError> {
    let (_, source) = active(c, device)?;
    let file = given(a, "target").unwrap_or_default();
    let format = given(a, "format").unwrap_or(source.format());
    let text = |e: BlockError| QmpError::generic(e.to_string());
    let over = (given(a, "sync") == Some("top")).then(|| source.backing()).flatten();
    if given(a, "mode") != Some("existing") {
        match format {
            "qcow2" => {
                let backing = over.as_ref().map(|b| (file_of(b), b.format().to_owned()));
                make_qcow2(file, &CreateOptions { backing, ..CreateOptions::new(source.size()) })
                    .map_err(text)?;
            }
            "raw" => make_raw(file, source.size()).map_err(|e| text(e.into()))?,
            other => return fail(format!("Unknown driver '{other}'")),
        }
    }
    let options = OpenOptions { format: Some(format.to_owned()), ..OpenOptions::default() };
    let name = given(a, "node-name").unwrap_or_default();
    // Below it is what is below the source: it need not be opened again.
    let backing = if format == "qcow2" { Some(over) } else { None };
    let node = Node::open(name, Path::new(file), &options, backing).map_err(text)?;
    if name.is_empty() {
        node.rename(None);
    }
    Ok(node)
}

pub fn drive_mirror(c: &Control, call: &mut Call) -> Reply {
    no_pair(c)?;
    let target = drive_target(c, call.arguments, call.text("device"))?;
    mirror_to(c, call.arguments, call.text("device"), target)
}

/// Make a qcow2 image; what is there is written over, as QEMU does.
pub fn make_qcow2(file: &str, options: &CreateOptions) -> Result<(), BlockError> {
    let path = Path::new(file);
    if !file.contains("://") && !path.exists() {
        return ftvm_block::qcow2::create(path, options);
    }
    ftvm_block::qcow2::format(path, options)
}

/// An empty file of this size.
fn make_raw(file: &str, size: u64) -> std::io::Result<()> {
    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
    let made = std::fs::File::options().write(true).create(true).truncate(false).open(file)?;
    drop(made);
    let store = ftvm_block::open_store(Path::new(file), &options).map_err(std::io::Error::other)?;
    store.set_length(0)?;
    store.set_length(size)?;
    store.sync()
}

fn preallocation(a: &Map<String, Value>) -> Preallocation {
    match given(a, "preallocation") {
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        _ => Preallocation::Off,
    }
}

/// The file of the node that `file` names.
fn file_of_node(c: &Control, o: &Map<String, Value>) -> Result<String, QmpError> {
    let name = given(o, "file").unwrap_or_default();
    let backends = c.shared.backends();
    let drive = backends.drives.iter().flatten().find(|d| d.id == name);
    drive
        .and_then(|d| d.file.clone())
        .ok_or_else(|| QmpError::generic(format!("Cannot find device='' nor node-name='{name}'")))
}

/// How a new image is encrypted, and for which secret.
fn luks_options(o: &Map<String, Value>) -> Result<(LuksOptions, String), QmpError> {
    let secret = given(o, "key-secret")
        .ok_or_else(|| QmpError::generic("Parameter 'key-secret' is required for cipher"))?;
    let of = LuksOptions::default();
    let text = |key: &str, default: String| given(o, key).map_or(default, str::to_owned);
    let options = LuksOptions {
        algorithm: text("cipher-alg", of.algorithm),
        mode: text("cipher-mode", of.mode),
        generator: text("ivgen-alg", of.generator),
        generator_hash: given(o, "ivgen-hash-alg").map(str::to_owned),
        hash: text("hash-alg", of.hash),
        milliseconds: o.get("iter-time").and_then(Value::as_u64).unwrap_or(of.milliseconds),
    };
    Ok((options, secret.to_owned()))
}

/// The work of `blockdev-create`.
fn creation(
    c: &Control,
    o: &Map<String, Value>,
) -> Result<Box<dyn FnOnce() -> Result<(), BlockError> + Send>, QmpError> {
    let size = o.get("size").and_then(Value::as_u64).unwrap_or(0);
    match given(o, "driver") {
        Some("file") => {
            let file = c.fdsets.resolve(given(o, "filename").unwrap_or_default())?;
            let how = preallocation(o);
            if how == Preallocation::Metadata {
                return fail("Unsupported preallocation mode 'metadata'");
            }
            Ok(Box::new(move || {
                make_raw(&file, size)?;
                if how != Preallocation::Off && size > 0 {
                    let options = OpenOptions { format: Some("raw".into()), ..OpenOptions::default() };
                    let store = ftvm_block::open_store(Path::new(&file), &options)?;
                    store.set_aside(0, size)?;
                    let zeroes = vec![0u8; 1 << 20];
                    let mut at = 0;
                    while how == Preallocation::Full && at < size {
                        let n = (size - at).min(zeroes.len() as u64);
                        store.write_at(at, &zeroes[..n as usize])?;
                        at += n;
                    }
                    store.sync()?;
                }
                Ok(())
            }))
        }
        Some("qcow2") => {
            let file = file_of_node(c, o)?;
            let number = |key: &str, default: u64| o.get(key).and_then(Value::as_u64).unwrap_or(default);
            let yes = |key: &str| o.get(key) == Some(&Value::Bool(true));
            let backing = given(o, "backing-file")
                .map(|f| (f.to_owned(), given(o, "backing-fmt").unwrap_or("raw").to_owned()));
            if o.contains_key("backing-fmt") && backing.is_none() {
                return fail("Backing format cannot be used without backing file");
            }
            let luks = o.get("encrypt").and_then(Value::as_object).map(luks_options).transpose()?;
            let mut options = CreateOptions {
                size,
                version: if given(o, "version") == Some("v2") { 2 } else { 3 },
                cluster_size: number("cluster-size", 65536),
                refcount_bits: u32::try_from(number("refcount-bits", 16)).unwrap_or(u32::MAX),
                lazy_refcounts: yes("lazy-refcounts"),
                extended_l2: yes("extended-l2"),
                zstd: given(o, "compression-type") == Some("zstd"),
                preallocation: preallocation(o),
                backing,
                data_file: None,
                data_file_raw: false,
                ..CreateOptions::new(size)
            };
            Ok(Box::new(move || {
                if let Some((luks, secret)) = &luks {
                    options.encrypt(luks, secret)?;
                }
                make_qcow2(&file, &options)
            }))
        }
        Some("luks") => {
            let file = file_of_node(c, o)?;
            let (luks, secret) = luks_options(o)?;
            if preallocation(o) != Preallocation::Off {
                return fail("Preallocated LUKS images cannot be made");
            }
            Ok(Box::new(move || ftvm_block::raw::format_luks(Path::new(&file), size, &luks, &secret)))
        }
        other => fail(format!("Driver '{}' does not support creation", other.unwrap_or_default())),
    }
}

/// Start a job that is of no image's node, and that stays until it is dismissed.
pub(super) fn begin(c: &Control, call: &Call, kind: &'static str, body: Box<dyn Body>) -> Reply {
    let wanted = Wanted {
        id: call.text("job-id").to_owned(),
        kind,
        auto_finalize: true,
        auto_dismiss: false,
        speed: 0,
        stop_on_error: false,
        nodes: Vec::new(),
    };
    if !super::devices::is_identifier(&wanted.id) {
        return fail(format!("Invalid job ID '{}'", wanted.id));
    }
    start(c, wanted, body)
}

pub fn create(c: &Control, call: &mut Call) -> Reply {
    let none = Map::new();
    let options = call.arguments.get("options").and_then(Value::as_object).unwrap_or(&none);
    let work = creation(c, options)?;
    begin(c, call, "create", Box::new(CreateJob { work: Some(work) }))
}

pub fn query(c: &Control, _: &mut Call) -> Reply {
    Ok(c.shared.jobs.all().iter().map(|j| j.info()).collect())
}

pub fn query_block(c: &Control, _: &mut Call) -> Reply {
    Ok(c.shared.jobs.all().iter().filter(|j| j.is_block()).map(|j| j.block_info()).collect())
}

/// QEMU's words; `block`: a command about block jobs, whose id is called a device.
fn settle(result: Result<(), Refused>, id: &str, verb: &str, block: bool) -> Reply {
    match result {
        Ok(()) => Ok(json!({})),
        Err(Refused::NoSuchJob) if block => {
            Err(QmpError { class: "DeviceNotActive", desc: format!("Block job '{id}' not found") })
        }
        Err(Refused::NoSuchJob) => fail("Job not found"),
        Err(Refused::State(status)) => {
            fail(format!("Job '{id}' in state '{}' cannot accept command verb '{verb}'", status.word()))
        }
        Err(Refused::NotReady) => fail(format!("The active block job '{id}' cannot be completed")),
        Err(Refused::Paused(true)) => fail("Job is already paused"),
        Err(Refused::Paused(false)) => fail("Job is not paused"),
    }
}

pub fn cancel(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("id");
    settle(c.shared.jobs.cancel(id, true), id, "cancel", false)
}

pub fn block_cancel(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("device");
    settle(c.shared.jobs.cancel(id, call.bool("force") == Some(true)), id, "cancel", true)
}

pub fn complete(c: &Control, call: &mut Call) -> Reply {
    let (block, id) = which(call);
    settle(c.shared.jobs.complete(&id), &id, "complete", block)
}

pub fn pause(c: &Control, call: &mut Call) -> Reply {
    let (block, id) = which(call);
    settle(c.shared.jobs.pause(&id, true), &id, "pause", block)
}

pub fn resume(c: &Control, call: &mut Call) -> Reply {
    let (block, id) = which(call);
    settle(c.shared.jobs.pause(&id, false), &id, "resume", block)
}

pub fn finalize(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("id");
    settle(c.shared.jobs.finalize(id), id, "finalize", call.command.starts_with("block-"))
}

pub fn dismiss(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("id");
    settle(c.shared.jobs.dismiss(id), id, "dismiss", call.command.starts_with("block-"))
}

pub fn set_speed(c: &Control, call: &mut Call) -> Reply {
    let id = call.text("device");
    let Ok(speed) = u64::try_from(call.int("speed").unwrap_or(0)) else {
        return fail("Parameter 'speed' expects a non-negative value");
    };
    settle(c.shared.jobs.set_speed(id, speed), id, "set-speed", true)
}

/// Whether a command is one about block jobs, and the job's id.
fn which(call: &Call) -> (bool, String) {
    let block = call.command.starts_with("block-");
    (block, call.text(if block { "device" } else { "id" }).to_owned())
}
