//! What changes an image as a whole: internal snapshots and another size.

use std::sync::Arc;

use ftvm_block::crypto::LuksInfo;
use ftvm_block::{BlockError, Image, ImageInfo, Qcow2Bitmap, Snapshot, SnapshotChange};
use ftvm_devices::Input;
use ftvm_qmp::{Call, QmpError};
use serde_json::{json, Value};

use super::{devices, done, graph, Control, Reply};
use crate::machine::MachineInput;
use crate::migration::snapshot::{self as snapshot_of_machine, Wish};

const SECOND: u64 = 1_000_000_000;

/// QEMU's `SnapshotInfo`.
fn snapshot(s: &Snapshot) -> Value {
    let mut value = json!({
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec / SECOND,
        "vm-clock-nsec": s.vm_clock_nsec % SECOND,
    });
    if let Some(icount) = s.icount {
        value["icount"] = json!(icount);
    }
    value
}

/// QEMU's `Qcow2BitmapInfo`.
fn bitmap(b: &Qcow2Bitmap) -> Value {
    let flags = [(b.in_use, "in-use"), (b.auto, "auto")];
    let flags: Vec<&str> = flags.iter().filter(|(on, _)| *on).map(|(_, flag)| *flag).collect();
    json!({"name": b.name, "granularity": b.granularity, "flags": flags})
}

/// Add to QEMU's `ImageInfo` what the image says of itself.
pub fn describe(info: &ImageInfo, image: &mut Value) {
    if let Some(size) = info.cluster_size {
        image["cluster-size"] = json!(size);
    }
    if !info.snapshots.is_empty() {
        image["snapshots"] = info.snapshots.iter().map(snapshot).collect();
    }
    if let Some((name, whole, format)) = &info.backing {
        image["backing-filename"] = json!(name);
        image["full-backing-filename"] = json!(whole);
        if let Some(format) = format {
            image["backing-filename-format"] = json!(format);
        }
    }
    if let Some(q) = &info.qcow2 {
        let mut data = json!({
            "compat": if q.version == 2 { "0.10" } else { "1.1" },
            "compression-type": if q.zstd { "zstd" } else { "zlib" },
            "refcount-bits": q.refcount_bits,
        });
        if q.version > 2 {
            data["lazy-refcounts"] = json!(q.lazy_refcounts);
            data["corrupt"] = json!(q.corrupt);
            data["extended-l2"] = json!(q.extended_l2);
        }
        if !q.bitmaps.is_empty() {
            data["bitmaps"] = q.bitmaps.iter().map(bitmap).collect();
        }
        if let Some(file) = &q.data_file {
            data["data-file"] = json!(file);
            data["data-file-raw"] = json!(q.data_file_raw);
        }
        if let Some(luks) = &info.luks {
            data["encrypt"] = describe_luks(luks);
            data["encrypt"]["format"] = json!("luks");
        }
        image["format-specific"] = json!({"type": "qcow2", "data": data});
    } else if let Some(luks) = &info.luks {
        image["format-specific"] = json!({"type": "luks", "data": describe_luks(luks)});
    }
    if info.luks.is_some() {
        image["encrypted"] = json!(true);
    }
}

/// `QCryptoBlockInfoLUKS`
fn describe_luks(luks: &LuksInfo) -> Value {
    let slot = |(active, iterations, offset): &(bool, u32, u64)| {
        let mut slot = json!({"active": active, "key-offset": offset});
        if *active {
            slot["iters"] = json!(iterations);
            slot["stripes"] = json!(4000);
        }
        slot
    };
    let mut data = json!({
        "cipher-alg": luks.algorithm,
        "cipher-mode": luks.mode,
        "ivgen-alg": luks.generator,
        "hash-alg": luks.hash,
        "payload-offset": luks.payload,
        "master-key-iters": luks.iterations,
        "uuid": luks.uuid,
        "slots": luks.slots.iter().map(slot).collect::<Vec<_>>(),
    });
    if let Some(hash) = &luks.generator_hash {
        data["ivgen-hash-alg"] = json!(hash);
    }
    data
}

/// The drive that a command names, and its image, which this host may change: not on a backup, and not where each host
/// of a pair has its own.
fn image(c: &Control, device: &str, node: &str) -> Result<(usize, Arc<dyn Image>), QmpError> {
    let name = if device.is_empty() { node } else { device };
    let index = c.shared.backends().drive(name);
    let index = index
        .ok_or_else(|| QmpError::generic(format!("Cannot find device='{device}' nor node-name='{node}'")))?;
    c.change(|rt| match rt.ft.as_ref().is_some_and(|ft| ft.common.config.separate) {
        true => Err(QmpError::generic(
            "an image cannot be changed as a whole while each host of the pair has its own (ft-turn-off ends the pair)",
        )),
        false => Ok(()),
    })?;
    if let Some(root) = c.outside.disk_root(index) {
        graph::free(c, &root.node())?;
    }
    let image = c.outside.disk_image(index);
    Ok((index, image.ok_or_else(|| QmpError::generic(format!("Device '{name}' has no medium")))?))
}

/// `blockdev-snapshot-internal-sync`
pub fn create(c: &Control, call: &mut Call) -> Reply {
    let (device, name) = (call.text("device"), call.text("name"));
    let (_, image) = image(c, device, device)?;
    let fail = |text: String| Err(QmpError::generic(text));
    if image.read_only() {
        return fail(format!("Device '{device}' is read only"));
    }
    let format = image.format();
    if format != "qcow2" {
        return fail(format!(
            "Block format '{format}' used by device '{device}' does not support internal snapshots"
        ));
    }
    if name.is_empty() {
        return fail("Name is empty".into());
    }
    if image.info().snapshots.iter().any(|s| s.name == name) {
        return fail(format!("Snapshot with name '{name}' already exists on device '{device}'"));
    }
    let clock = c.machine(|rt| rt.machine.stamp().ns)?;
    match image.snapshot(&SnapshotChange::Create(Snapshot::new(name, clock))) {
        Ok(_) => done(),
        Err(e) => fail(format!("Failed to create snapshot '{name}' on device '{device}': {e}")),
    }
}

/// `blockdev-snapshot-delete-internal-sync`
pub fn delete(c: &Control, call: &mut Call) -> Reply {
    let device = call.text("device");
    let given = |key: &str| call.arguments.get(key).and_then(Value::as_str).map(str::to_owned);
    let (id, name) = (given("id"), given("name"));
    let (_, image) = image(c, device, device)?;
    if id.is_none() && name.is_none() {
        return Err(QmpError::generic("Name or id must be provided"));
    }
    let is = |s: &Snapshot| {
        id.as_ref().is_none_or(|id| s.id == *id) && name.as_ref().is_none_or(|name| s.name == *name)
    };
    if !image.info().snapshots.iter().any(is) {
        let text = |t: &Option<String>| t.clone().unwrap_or_else(|| "null".into());
        return Err(QmpError::generic(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            text(&id),
            text(&name)
        )));
    }
    let gone = image.snapshot(&SnapshotChange::Delete { id, name });
    gone.map(|s| snapshot(&s)).map_err(|e| QmpError::generic(e.to_string()))
}

/// `block_resize`: the image first, then the machine, through the input door.
pub fn resize(c: &Control, call: &mut Call) -> Reply {
    let (index, image) = image(c, call.text("device"), call.text("node-name"))?;
    let size = call.arguments.get("size").and_then(Value::as_u64);
    let size = size.ok_or_else(|| QmpError::generic("Parameter 'size' expects a >0 size"))?;
    // Of a raw image the odd bytes at the end would not be seen.
    image.resize(size).map_err(|e| match e {
        BlockError::ReadOnly => QmpError::generic("Image is read-only"),
        e => QmpError::generic(e.to_string()),
    })?;
    c.change(move |rt| {
        rt.outside.disk_resized(index, size);
        rt.shared.backends().sizes.insert(index, size);
        devices::note(rt);
        rt.input(MachineInput::Device(Input::DriveResized { drive: index as u32, size }));
        done()
    })
}

/// `savevm`, `loadvm`, `delvm`: the whole machine.
pub fn vm(c: &Control, verb: &str, name: Option<&str>) -> Result<String, QmpError> {
    let name = match (name, verb) {
        (Some(name), _) => name.trim_matches('"').to_owned(),
        // As QEMU names them.
        (None, "savevm") => date(Snapshot::new("", 0).date_sec).replace(['-', ' ', ':'], ""),
        (None, _) => return Err(QmpError::generic(format!("{verb}: the snapshot's name is missing"))),
    };
    let wish = match verb {
        "savevm" => Wish::Save { name, of: None },
        "loadvm" => Wish::Load { name, of: None },
        _ => {
            c.change(move |rt| snapshot_of_machine::forget(rt, &name, None).map_err(QmpError::generic))?;
            return Ok(String::new());
        }
    };
    whole(c, wish)?;
    Ok(String::new())
}

/// Make or load a snapshot of the machine, and wait for it.
pub fn whole(c: &Control, wish: Wish) -> Result<(), QmpError> {
    let (reply, done) = std::sync::mpsc::channel();
    c.change(move |rt| snapshot_of_machine::begin(rt, wish, reply).map_err(QmpError::generic))?;
    let ended = done.recv().map_err(|_| QmpError::generic("the program ends"))?;
    ended.map_err(QmpError::generic)
}

/// `info snapshots`
pub fn list(c: &Control) -> Result<String, QmpError> {
    let drives = c.shared.backends().drives.clone();
    let mut all: Vec<(String, Vec<Snapshot>)> = Vec::new();
    for (i, drive) in drives.iter().enumerate() {
        if let (Some(drive), Some(image)) = (drive, c.outside.disk_image(i)) {
            if !image.read_only() {
                all.push((drive.id.clone(), image.info().snapshots));
            }
        }
    }
    let everywhere = |name: &str| all.iter().all(|(_, list)| list.iter().any(|s| s.name == name));
    let whole: Vec<&Snapshot> = all
        .iter()
        .flat_map(|(_, list)| list)
        .filter(|s| s.vm_state_size > 0 && everywhere(&s.name))
        .collect();
    let is_whole = |s: &Snapshot| whole.iter().any(|w| w.name == s.name);
    if all.iter().all(|(_, list)| list.is_empty()) {
        return Ok("There is no snapshot available.\n".into());
    }
    let mut out = "List of snapshots present on all disks:\n".to_owned();
    match whole.is_empty() {
        true => out += "None\n",
        false => out += &table(whole.iter().copied()),
    }
    for (device, list) in &all {
        if list.iter().any(|s| !is_whole(s)) {
            out += &format!("\nList of partial (non-loadable) snapshots on '{device}':\n");
            out += &table(list.iter().filter(|s| !is_whole(s)));
        }
    }
    Ok(out)
}

fn table<'a>(snapshots: impl Iterator<Item = &'a Snapshot>) -> String {
    let mut out = format!(
        "{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n",
        "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
    );
    for s in snapshots {
        let ms = s.vm_clock_nsec / 1_000_000;
        let (hours, minutes) = (ms / 3_600_000, ms / 60_000 % 60);
        let clock = format!("{hours:02}:{minutes:02}:{:02}.{:03}", ms / 1000 % 60, ms % 1000);
        let icount = s.icount.map_or(String::new(), |n| n.to_string());
        out += &format!(
            "{:<9} {:<16} {:>8}{:>20}{clock:>13}{icount:>11}\n",
            s.id,
            s.name,
            human(s.vm_state_size),
            date(s.date_sec),
        );
    }
    out
}

/// A number of bytes with three digits.
fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value >= 100.0 || value.fract() == 0.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit])
}

/// The host's local time.
fn date(seconds: u32) -> String {
    let time = libc::time_t::from(seconds);
    // SAFETY: localtime_r reads the time and writes the tm, both live across the call.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        libc::localtime_r(&time, &mut tm);
        tm
    };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}
