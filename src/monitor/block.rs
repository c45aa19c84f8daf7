//! Block nodes, the devices in front of them, and the trays of CD drives.

use std::sync::Arc;

use ftvm_block::{Image, ImageInfo, Node};
use ftvm_devices::{Input, Inventory};
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Map, Value};

use super::{bitmaps, devices as hotplug, done, graph, limits, qom, snapshots, types, Control, Reply};
use crate::assembly::open_live;
use crate::assembly::queue_settings;
use crate::cli::drive::{self, Cache, DriveConfig};
use crate::cli::keyval::Params;
use crate::host::backends::{Backends, Tray};
use crate::host::disk::{Counters, DiskWorker};
use crate::machine::MachineInput;
use crate::runtime::live::Runtime;

/// A node's entry; `protocol`: the node below the format.
fn node(d: &DriveConfig, size: u64, info: Option<&ImageInfo>) -> Value {
    let protocol = info.is_none();
    let file = d.file.clone().unwrap_or_default();
    let format = match protocol {
        true => "file",
        false => d.format.as_deref().unwrap_or("raw"),
    };
    let disk_size = || std::fs::metadata(&file).map(|m| std::os::unix::fs::MetadataExt::blocks(&m) * 512);
    let mut image = json!({"filename": file, "format": format, "virtual-size": size, "dirty-flag": false});
    if let Ok(used) = disk_size() {
        image["actual-size"] = json!(used);
    }
    if protocol {
        if let Ok(meta) = std::fs::metadata(&file) {
            image["virtual-size"] = json!(meta.len());
        }
    }
    let depth = info.map_or(0, |i| i.depth);
    if let Some(info) = info {
        snapshots::describe(info, &mut image);
    }
    let name = match protocol {
        true => d.protocol.clone().unwrap_or_default(),
        false => d.id.clone(),
    };
    let mut node = json!({
        "file": file,
        "node-name": name,
        "ro": d.read_only,
        "drv": format,
        "backing_file_depth": depth,
        "encrypted": info.is_some_and(|i| i.luks.is_some()),
        "detect_zeroes": if d.detect_zeroes { "on" } else { "off" },
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": image,
        "cache": {
            "writeback": !matches!(d.cache, Cache::Writethrough | Cache::DirectSync),
            "direct": matches!(d.cache, Cache::None | Cache::DirectSync),
            "no-flush": d.cache == Cache::Unsafe,
        },
        "write_threshold": 0,
    });
    if let Some((_, whole, _)) = info.and_then(|i| i.backing.as_ref()) {
        node["backing_file"] = json!(whole);
    }
    node
}

/// What the image of drive `index` says of itself.
fn image_info(c: &Control, index: usize) -> ImageInfo {
    c.outside.disk_image(index).map_or_else(ImageInfo::default, |i| i.info())
}

fn size(c: &Control, index: usize) -> u64 {
    c.outside.disk_counters(index).map_or(0, |c| c.size)
}

fn backends(c: &Control) -> Backends {
    c.shared.backends().clone()
}

/// The devices that users named; none without a machine.
pub fn inventory(c: &Control) -> Result<Vec<Inventory>, QmpError> {
    if c.config.machine == "none" {
        return Ok(Vec::new());
    }
    c.machine(|rt| rt.machine.chipset().inventory())
}

/// The entry of an open node; `d` is the drive in whose chain it is.
fn open_node(d: &DriveConfig, of: &Arc<Node>, flat: bool) -> Value {
    let info = of.info();
    let own = DriveConfig {
        id: of.name(),
        file: of.path().map_or_else(|| d.file.clone(), |p| Some(p.to_string_lossy().into_owned())),
        format: Some(of.format().to_owned()),
        read_only: of.read_only(),
        ..d.clone()
    };
    let mut entry = node(&own, of.size(), Some(&info));
    if let Some(below) = of.backing() {
        // What it stands on, whatever the header names.
        entry["backing_file"] = json!(below.path());
        if !flat {
            entry["image"]["backing-image"] = open_node(d, &below, false)["image"].take();
        }
    }
    let bitmaps = bitmaps::describe(of);
    if !bitmaps.is_empty() {
        entry["dirty-bitmaps"] = json!(bitmaps);
    }
    entry
}

/// The entry of the node in front of drive number `index`.
fn front_node(c: &Control, index: usize, d: &DriveConfig, flat: bool) -> Value {
    let mut entry = match c.outside.disk_root(index) {
        Some(root) => open_node(d, &root.node(), flat),
        None => node(d, size(c, index), Some(&image_info(c, index))),
    };
    limits::describe(&d.limits, &mut entry);
    entry
}

pub fn nodes(c: &Control, call: &mut Call) -> Reply {
    let flat = call.bool("flat") == Some(true);
    let mut out = Vec::new();
    let backends = backends(c);
    let mut seen: Vec<String> = backends.drives.iter().flatten().map(|d| d.id.clone()).collect();
    for (i, d) in backends.drives.iter().enumerate() {
        let Some(d) = d.as_ref().filter(|d| d.file.is_some()) else { continue };
        out.push(front_node(c, i, d, flat));
        if d.protocol.is_some() {
            out.push(node(d, size(c, i), None));
        }
        let chain = c.outside.disk_root(i).map(|root| root.node().chain()).unwrap_or_default();
        for below in chain.iter().skip(1).filter(|n| n.path().is_some()) {
            if !seen.contains(&below.name()) {
                seen.push(below.name());
                out.push(open_node(d, below, flat));
            }
        }
    }
    Ok(json!(out))
}

/// A device that a medium or disk is behind.
struct Front {
    /// `-drive`'s id; empty for a node.
    device: String,
    qdev: String,
    drive: Option<usize>,
    /// The state of a CD drive's tray.
    tray: Option<Tray>,
}

fn fronts(c: &Control) -> Result<Vec<Front>, QmpError> {
    let backends = backends(c);
    let mut out = Vec::new();
    let mut anonymous = 0;
    for item in inventory(c)? {
        let spec = &item.spec;
        let path = qom::device_path(spec, anonymous);
        anonymous += usize::from(spec.id.is_none());
        let cd = matches!(spec.driver.as_str(), "ide-cd" | "scsi-cd");
        if spec.drive.is_none() && !cd {
            continue;
        }
        let qdev = match types::backend_type(&spec.driver) {
            Some(_) => format!("{path}/virtio-backend"),
            // As QEMU: the id of the device itself if it has one.
            None => spec.id.clone().unwrap_or(path),
        };
        let first = spec.drive.map(|d| d as usize);
        let tray = cd.then(|| {
            let id = spec.id.clone().unwrap_or_default();
            let medium = spec.drive.filter(|d| {
                backends.drives.get(*d as usize).is_some_and(|d| d.as_ref().is_some_and(|d| d.file.is_some()))
            });
            backends.trays.get(&id).cloned().unwrap_or(Tray { medium, open: false })
        });
        let drive = match &tray {
            Some(tray) => tray.medium.map(|m| m as usize),
            None => first,
        };
        let config = first.and_then(|i| backends.drives.get(i)).and_then(Option::as_ref);
        let legacy = config.filter(|d| d.protocol.is_none() && !d.node);
        out.push(Front { device: legacy.map_or(String::new(), |d| d.id.clone()), qdev, drive, tray });
    }
    Ok(out)
}

pub fn devices(c: &Control, _: &mut Call) -> Reply {
    let backends = backends(c);
    let mut out = Vec::new();
    for front in fronts(c)? {
        let mut entry = json!({
            "device": front.device,
            "qdev": front.qdev,
            "type": "unknown",
            "removable": front.tray.is_some(),
            "locked": false,
        });
        if let Some(tray) = &front.tray {
            entry["tray_open"] = json!(tray.open);
        }
        let config = front.drive.and_then(|i| Some((i, backends.drives.get(i)?.as_ref()?)));
        if let Some((i, d)) = config.filter(|(_, d)| d.file.is_some()) {
            entry["inserted"] = front_node(c, i, d, false);
            entry["io-status"] = json!("ok");
        }
        out.push(entry);
    }
    Ok(json!(out))
}

fn counters(c: &Counters) -> Value {
    json!({
        "rd_bytes": c.bytes[0], "wr_bytes": c.bytes[1], "unmap_bytes": c.bytes[3],
        "rd_operations": c.operations[0], "wr_operations": c.operations[1],
        "flush_operations": c.operations[2], "unmap_operations": c.operations[3],
        "rd_total_time_ns": c.nanoseconds[0], "wr_total_time_ns": c.nanoseconds[1],
        "flush_total_time_ns": c.nanoseconds[2], "unmap_total_time_ns": c.nanoseconds[3],
        "wr_highest_offset": c.highest,
        "rd_merged": 0, "wr_merged": 0, "unmap_merged": 0,
        "failed_rd_operations": c.failed[0], "failed_wr_operations": c.failed[1],
        "failed_flush_operations": c.failed[2], "failed_unmap_operations": c.failed[3],
        "invalid_rd_operations": 0, "invalid_wr_operations": 0,
        "invalid_flush_operations": 0, "invalid_unmap_operations": 0,
        "account_invalid": true, "account_failed": true,
        "timed_stats": [],
    })
}

pub fn stats(c: &Control, call: &mut Call) -> Reply {
    let backends = backends(c);
    let of = |i: usize| counters(&c.outside.disk_counters(i).unwrap_or_default());
    let mut out = Vec::new();
    if call.bool("query-nodes") == Some(true) {
        for (i, d) in backends.drives.iter().enumerate() {
            let Some(d) = d.as_ref().filter(|d| d.file.is_some()) else { continue };
            out.push(json!({"node-name": d.id, "stats": of(i)}));
            if let Some(protocol) = &d.protocol {
                out.push(json!({"node-name": protocol, "stats": of(i)}));
            }
        }
        return Ok(json!(out));
    }
    for front in fronts(c)? {
        let mut entry = json!({"device": front.device, "qdev": front.qdev});
        let stats = front.drive.map_or_else(|| counters(&Counters::default()), of);
        let config = front.drive.and_then(|i| backends.drives.get(i)?.as_ref());
        if let Some(d) = config {
            entry["node-name"] = json!(d.id);
            if d.protocol.is_some() {
                entry["parent"] = json!({"node-name": d.protocol, "stats": stats});
            }
        }
        entry["stats"] = stats;
        out.push(entry);
    }
    Ok(json!(out))
}

/// The keys and values of a block node, as the command line would have them.
pub fn flatten(prefix: &str, map: &Map<String, Value>, params: &mut Params) {
    for (key, value) in map {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Object(map) => flatten(&key, map, params),
            Value::String(s) => params.set(&key, s),
            Value::Bool(b) => params.set(&key, if *b { "on" } else { "off" }),
            Value::Number(n) => params.set(&key, &n.to_string()),
            // Nothing below, in the words of the command line.
            Value::Null if key == "backing" => params.set(&key, ""),
            _ => {}
        }
    }
}

/// Open a node's image on this host and put it among the drives; `None`: its place is dealt out.
fn attach(rt: &mut Runtime, config: DriveConfig, at: Option<usize>) -> Result<usize, QmpError> {
    // What one of a pair writes must be durable.
    let pair = rt.ft.is_some();
    if rt.ft.as_ref().is_some_and(|ft| ft.common.config.separate) && !config.read_only {
        return Err(QmpError::generic("disks cannot be plugged while each host of the pair has its own"));
    }
    let find = |name: &str| rt.outside.find_node(name).map(|(_, node)| node);
    let image = open_live(&config, pair, false, &find).map_err(|e| {
        let text = e.to_string();
        // The option's name means nothing to a monitor.
        let text = text
            .split_once(": ")
            .filter(|(head, _)| head.starts_with("-drive"))
            .map_or(text.as_str(), |t| t.1);
        let text = text.split(" (os error").next().unwrap_or(text);
        QmpError::generic(text.to_owned())
    })?;
    let index = at.unwrap_or_else(|| rt.shared.backends().drives.len());
    if let Some(image) = image {
        let settings = queue_settings(&config, pair);
        let worker =
            DiskWorker::start(index, &config.id, image, settings, rt.events.clone(), rt.outside.news())
                .map_err(|e| QmpError::generic(e.to_string()))?;
        rt.errors.set(index, &config.id, config.on_error);
        rt.outside.attach_disk(index, worker);
    }
    let mut backends = rt.shared.backends();
    match at {
        Some(at) => backends.drives[at] = Some(config),
        None => backends.drives.push(Some(config)),
    }
    Ok(index)
}

pub fn add(c: &Control, call: &mut Call) -> Reply {
    let name = call.text("node-name").to_owned();
    if name.is_empty() {
        return Err(QmpError::generic("'node-name' must be specified for the root node"));
    }
    if !hotplug::is_identifier(&name) {
        return Err(QmpError::generic("Invalid node-name: '".to_owned() + &name + "'"));
    }
    let mut params = Params::default();
    flatten("", call.arguments, &mut params);
    for key in ["filename", "file.filename"] {
        if let Some(path) = params.get(key) {
            let path = c.fdsets.resolve(path)?;
            params.set(key, &path);
        }
    }
    c.change(move |rt| {
        let before: Vec<Option<DriveConfig>> = rt.shared.backends().drives.clone();
        let below = params.get("file").map(str::to_owned);
        let mut known: Vec<DriveConfig> = before.iter().flatten().cloned().collect();
        drive::add_blockdev(&params, &mut known).map_err(|e| QmpError::generic(e.to_string()))?;
        let config = known.pop().ok_or_else(|| QmpError::generic("no block node"))?;
        // A format takes the place of the protocol node that it is put on.
        let at = below.and_then(|b| before.iter().position(|d| d.as_ref().is_some_and(|d| d.id == b)));
        if let Some(at) = at {
            let used = rt.machine.chipset().inventory().iter().any(|i| i.spec.drive == Some(at as u32));
            if used {
                return Err(QmpError::generic("the node below is used by a device"));
            }
            rt.outside.detach_disk(at);
        }
        if matches!(params.get("driver"), Some("file" | "host_device" | "host_cdrom")) {
            // A protocol node is opened when something is put on it.
            let file = config.file.clone().unwrap_or_default();
            std::fs::metadata(&file).map_err(|e| could_not_open(&file, &e.to_string()))?;
            rt.shared.backends().drives.push(Some(config));
        } else {
            attach(rt, config, at)?;
        }
        hotplug::note(rt);
        done()
    })
}

fn could_not_open(file: &str, why: &str) -> QmpError {
    let why = why.split(" (os error").next().unwrap_or(why);
    QmpError::generic(format!("Could not open '{file}': {why}"))
}

/// Open the image of drive number `index`, if it is not open.
pub fn ensure_open(rt: &mut Runtime, index: usize) -> Result<(), QmpError> {
    if rt.outside.disk_counters(index).is_some() {
        return Ok(());
    }
    let config = rt.shared.backends().drives.get(index).cloned().flatten();
    let config = config.ok_or_else(|| QmpError::generic("the block node is gone"))?;
    attach(rt, config, Some(index)).map(|_| ())
}

/// Whether a device or a tray uses drive number `index`.
fn is_used(rt: &Runtime, index: usize) -> bool {
    let backends = rt.shared.backends();
    let in_tray = backends.trays.values().any(|t| t.medium == Some(index as u32));
    let behind = |i: &Inventory| {
        let cd = i.spec.id.as_ref().is_some_and(|id| backends.trays.contains_key(id));
        i.spec.drive == Some(index as u32) && !cd
    };
    in_tray || rt.machine.chipset().inventory().iter().any(behind)
}

/// Neither a job nor another node may use a node that is deleted.
fn check_unused(rt: &Runtime, index: usize, name: &str) -> Result<(), QmpError> {
    let Some(node) = rt.outside.disk_root(index).map(|root| root.node()) else { return Ok(()) };
    if let Some(kind) = rt.shared.jobs.user_of(&node) {
        return Err(QmpError::generic(format!(
            "Node '{name}' is busy: block device is in use by block job: {kind}"
        )));
    }
    if rt.shared.exports.user_of(&node).is_some() {
        return Err(QmpError::generic(format!("Node {name} is in use")));
    }
    let count = rt.shared.backends().drives.len();
    let chains = (0..count).filter_map(|i| rt.outside.disk_root(i)).map(|root| root.node().chain());
    for chain in chains {
        if let Some(pair) = chain.windows(2).find(|pair| Arc::ptr_eq(&pair[1], &node)) {
            return Err(QmpError::generic(format!(
                "Node '{name}' is busy: node is used as backing hd of '{}'",
                pair[0].name()
            )));
        }
    }
    Ok(())
}

pub fn del(c: &Control, call: &mut Call) -> Reply {
    let name = call.text("node-name").to_owned();
    c.change(move |rt| {
        let backends = rt.shared.backends();
        let missing = || QmpError::generic(format!("Failed to find node with node-name='{name}'"));
        let Some(index) = backends.drive(&name) else {
            let above = backends.drives.iter().flatten().find(|d| d.protocol.as_ref() == Some(&name));
            let above = above.ok_or_else(missing)?;
            return Err(QmpError::generic(format!(
                "Node '{name}' is busy: node is used as 'file' of '{}'",
                above.id
            )));
        };
        drop(backends);
        if is_used(rt, index) {
            return Err(QmpError::generic(format!("Node {name} is in use")));
        }
        check_unused(rt, index, &name)?;
        rt.outside.detach_disk(index);
        let mut backends = rt.shared.backends();
        // The protocol node below stays until it is deleted itself.
        let below = backends.drives[index].take().and_then(|d| {
            d.protocol.clone().map(|id| DriveConfig { id, protocol: None, format: Some("raw".into()), ..d })
        });
        backends.drives[index] = below;
        drop(backends);
        graph::note(rt);
        done()
    })
}

/// The CD drive that a command names, with its tray.
fn tray(c: &Control, call: &Call) -> Result<(String, Tray), QmpError> {
    let (id, device) = (call.text("id"), call.text("device"));
    if id.is_empty() == device.is_empty() {
        return Err(QmpError::generic("Need exactly one of 'device' and 'id'"));
    }
    let name = if id.is_empty() { device } else { id };
    let items = inventory(c)?;
    let backends = backends(c);
    let by_drive = backends.drive(name).map(|i| i as u32);
    let item = items
        .iter()
        .find(|i| i.spec.id.as_deref() == Some(name) || (by_drive.is_some() && i.spec.drive == by_drive))
        .ok_or_else(|| QmpError::device_not_found(name))?;
    let Some(device) =
        item.spec.id.clone().filter(|_| matches!(item.spec.driver.as_str(), "ide-cd" | "scsi-cd"))
    else {
        return Err(QmpError::generic(format!("Device '{name}' is not removable")));
    };
    let first = item.spec.drive.filter(|d| {
        let drive = backends.drives.get(*d as usize);
        drive.is_some_and(|d| d.as_ref().is_some_and(|d| d.file.is_some()))
    });
    let tray = backends.trays.get(&device).cloned().unwrap_or(Tray { medium: first, open: false });
    Ok((device, tray))
}

/// Move the tray, or change what is in it.
fn change(c: &Control, device: String, tray: Tray) -> Reply {
    c.change(move |rt| {
        let size = |m: u32| rt.outside.disk_counters(m as usize).map_or(0, |c| c.size);
        let medium = tray.medium.map(|m| (m, size(m)));
        let open = tray.open;
        rt.shared.backends().trays.insert(device.clone(), tray);
        hotplug::note(rt);
        rt.input(MachineInput::Device(Input::Medium { device, open, medium }));
        done()
    })
}

pub fn open_tray(c: &Control, call: &mut Call) -> Reply {
    let (device, tray) = tray(c, call)?;
    change(c, device, Tray { open: true, ..tray })
}

pub fn close_tray(c: &Control, call: &mut Call) -> Reply {
    let (device, tray) = tray(c, call)?;
    change(c, device, Tray { open: false, ..tray })
}

pub fn remove_medium(c: &Control, call: &mut Call) -> Reply {
    let (device, tray) = tray(c, call)?;
    if !tray.open {
        return Err(QmpError::generic(format!("Tray of device '{device}' is not open")));
    }
    change(c, device, Tray { medium: None, ..tray })
}

pub fn insert_medium(c: &Control, call: &mut Call) -> Reply {
    let (device, tray) = tray(c, call)?;
    let name = call.text("node-name");
    let index = c.shared.backends().drive(name);
    let index =
        index.ok_or_else(|| QmpError::generic(format!("Failed to find node with node-name='{name}'")))?;
    if !tray.open {
        return Err(QmpError::generic(format!("Tray of device '{device}' is not open")));
    }
    if tray.medium.is_some() {
        return Err(QmpError::generic(format!("There already is a medium in device '{device}'")));
    }
    c.change(move |rt| ensure_open(rt, index))?;
    change(c, device, Tray { medium: Some(index as u32), ..tray })
}

pub fn eject(c: &Control, call: &mut Call) -> Reply {
    let (device, _) = tray(c, call)?;
    change(c, device, Tray { open: true, medium: None })
}

pub fn change_medium(c: &Control, call: &mut Call) -> Reply {
    let (device, _) = tray(c, call)?;
    let mut params = Params::default();
    params.set("driver", if call.text("format").is_empty() { "raw" } else { call.text("format") });
    params.set("file.filename", &c.fdsets.resolve(call.text("filename"))?);
    params.set("node-name", &format!("{device}-medium"));
    params.set("read-only", if call.text("read-only-mode") == "read-write" { "off" } else { "on" });
    let (name, index) = c.change(move |rt| {
        let mut backends = rt.shared.backends();
        let free = (0..).map(|n| format!("{}{n}", params.get("node-name").unwrap_or_default()));
        let name = free.into_iter().find(|n| backends.drive(n).is_none()).unwrap_or_default();
        params.set("node-name", &name);
        let mut known: Vec<DriveConfig> = backends.drives.iter_mut().flatten().map(|d| d.clone()).collect();
        drop(backends);
        drive::add_blockdev(&params, &mut known).map_err(|e| QmpError::generic(e.to_string()))?;
        let config = known.pop().ok_or_else(|| QmpError::generic("no block node"))?;
        Ok((name, attach(rt, config, None)? as u32))
    })?;
    log::debug!("the new medium of {device} is {name}");
    change(c, device.clone(), Tray { open: true, medium: None })?;
    change(c, device, Tray { open: false, medium: Some(index) })
}

/// `block_set_io_throttle`
pub fn set_io_throttle(c: &Control, call: &mut Call) -> Reply {
    let limits = limits::from_arguments(call.arguments)?;
    let (id, device) = (call.text("id"), call.text("device"));
    if id.is_empty() == device.is_empty() {
        return Err(QmpError::generic("Need exactly one of 'device' and 'id'"));
    }
    let front = fronts(c)?.into_iter().find(|f| {
        let own = f.qdev.trim_end_matches("/virtio-backend");
        if id.is_empty() {
            f.device == device
        } else {
            // The device by its path or its id.
            f.qdev == id || own == id || own.rsplit('/').next() == Some(id)
        }
    });
    let name = if id.is_empty() { device } else { id };
    let front = front.ok_or_else(|| QmpError::device_not_found(name))?;
    let index = front.drive.ok_or_else(|| QmpError::generic(format!("Device '{name}' has no medium")))?;
    c.change(move |rt| {
        if let Some(Some(drive)) = rt.shared.backends().drives.get_mut(index) {
            drive.limits = limits;
        }
        rt.outside.set_limits(index, limits);
        hotplug::note(rt);
        done()
    })
}
