//! Dirty bitmaps, incremental backups and block exports of running machines, with QEMU's and libnbd's programs as the
//! other side.

mod common;

use common::blocks::*;
use common::*;
use ftvm_harness::guests::run;
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::{json, Value};

/// A bitmap of a node, as the monitor shows it.
fn bitmap(qmp: &mut Qmp, node: &str, name: &str) -> Result<Value> {
    let nodes = qmp.command("query-named-block-nodes", json!({"flat": true}))?;
    let node = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == node).cloned();
    let bitmaps = node.unwrap_or_default()["dirty-bitmaps"].take();
    Ok(bitmaps.as_array().into_iter().flatten().find(|b| b["name"] == name).cloned().unwrap_or_default())
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn refused(qmp: &mut Qmp, command: &str, arguments: Value, part: &str) {
    let said = qmp.command(command, arguments);
    assert!(said.as_ref().is_err_and(|e| e.contains(part)), "{command}: {said:?} is not '{part}'");
}

/// A qcow2 image over another, opened as the node `name`.
fn overlay(qmp: &mut Qmp, scratch: &Scratch, name: &str, below: Option<&str>) -> Result<()> {
    let file = scratch.path(&format!("{name}.qcow2"));
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    let below = below.map(|b| scratch.path(&format!("{b}.qcow2")));
    if let Some(below) = &below {
        args.extend(["-b", below, "-F", "qcow2"]);
    }
    args.extend([file.as_str(), "48M"]);
    run("qemu-img", &args)?;
    let storage = json!({"driver": "file", "filename": file, "node-name": format!("{name}-storage")});
    qmp.command("blockdev-add", storage)?;
    let format = json!({"driver": "qcow2", "file": format!("{name}-storage"), "node-name": name});
    qmp.command("blockdev-add", format)?;
    Ok(())
}

/// A backup is taken in full, then by what changed; the chain of it is the disk.
#[test]
fn incremental_backups_hold_what_the_guest_has_written() -> Result<()> {
    let scratch = Scratch::new("bincr")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let backup = |id: &str, sync: &str, target: &str, more: Value| {
        let mut a =
            json!({"job-id": id, "device": "disk", "target": target, "sync": sync, "auto-dismiss": false});
        more.as_object().into_iter().flatten().for_each(|(k, v)| a[k] = v.clone());
        a
    };
    overlay(&mut qmp, &scratch, "full", None)?;
    // A job that cannot begin takes the bitmap with it.
    let bad = [
        action("block-dirty-bitmap-add", json!({"node": "disk", "name": "b", "persistent": true})),
        action("blockdev-backup", backup("f", "incremental", "full", json!({"bitmap": "absent"}))),
    ];
    refused(&mut qmp, "transaction", json!({"actions": bad}), "Bitmap 'absent' could not be found");
    assert!(bitmap(&mut qmp, "disk", "b")?.is_null());
    assert_eq!(qmp.command("query-jobs", Value::Null)?, json!([]));
    let first = [
        action("block-dirty-bitmap-add", json!({"node": "disk", "name": "b", "persistent": true})),
        action("blockdev-backup", backup("f", "full", "full", Value::Null)),
    ];
    qmp.command("transaction", json!({"actions": first}))?;
    dismiss(&mut qmp, "f")?;
    delete(&mut qmp, "full")?;
    console.run("echo one > /mnt/one; sync")?;
    assert!(bitmap(&mut qmp, "disk", "b")?["count"].as_u64() > Some(0));

    // One that is cancelled leaves the bitmap as it was; what is written meanwhile is in it, too.
    overlay(&mut qmp, &scratch, "one", Some("full"))?;
    let by_bitmap = json!({"bitmap": "b", "speed": 1 << 16});
    qmp.command("blockdev-backup", backup("i", "incremental", "one", by_bitmap))?;
    let busy = bitmap(&mut qmp, "disk", "b")?;
    assert_eq!((&busy["busy"], &busy["recording"]), (&json!(true), &json!(true)), "{busy}");
    let name = json!({"node": "disk", "name": "b"});
    refused(&mut qmp, "block-dirty-bitmap-clear", name.clone(), "in use by another operation");
    refused(&mut qmp, "block-dirty-bitmap-remove", name.clone(), "in use by another operation");
    qmp.command("job-cancel", json!({"id": "i"}))?;
    wait_for("the end of the job", LONG, || {
        status(&mut qmp, "i").ok().filter(|s| s["status"] == "concluded")
    })?;
    qmp.command("job-dismiss", json!({"id": "i"}))?;
    let after = bitmap(&mut qmp, "disk", "b")?;
    assert!(after["busy"] == false && after["count"].as_u64() >= busy["count"].as_u64(), "{busy} {after}");
    qmp.command("blockdev-backup", backup("i", "incremental", "one", json!({"bitmap": "b"})))?;
    dismiss(&mut qmp, "i")?;
    delete(&mut qmp, "one")?;

    // The last one is of a machine that stands still.
    console.run("echo two > /mnt/two; sync")?;
    qmp.command("stop", Value::Null)?;
    overlay(&mut qmp, &scratch, "two", Some("one"))?;
    let kept = bitmap(&mut qmp, "disk", "b")?["count"].clone();
    let never = json!({"bitmap": "b", "bitmap-mode": "never"});
    qmp.command("blockdev-backup", backup("n", "bitmap", "two", never))?;
    dismiss(&mut qmp, "n")?;
    assert_eq!(bitmap(&mut qmp, "disk", "b")?["count"], kept);
    let always = json!({"bitmap": "b", "bitmap-mode": "always"});
    qmp.command("blockdev-backup", backup("a", "bitmap", "two", always))?;
    dismiss(&mut qmp, "a")?;
    assert_eq!(bitmap(&mut qmp, "disk", "b")?["count"], 0);
    delete(&mut qmp, "two")?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    let (disk, two) = (scratch.path("disk.qcow2"), scratch.path("two.qcow2"));
    run("qemu-img", &["compare", &disk, &two])?;
    run("qemu-img", &["check", "-q", &disk])?;
    let info = run("qemu-img", &["info", &disk])?;
    assert!(info.contains("name: b\n") && info.contains("auto") && !info.contains("in-use"), "{info}");
    Ok(())
}

/// Bitmaps are made, merged and switched, all of it or nothing; a killed machine leaves none that is wrong.
#[test]
fn bitmaps_are_merged_and_kept_and_a_crash_leaves_none_that_is_wrong() -> Result<()> {
    let scratch = Scratch::new("bmaps")?;
    let image = scratch.path("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "8M"])?;
    run("qemu-img", &["bitmap", "--add", &image, "old"])?;
    run("qemu-io", &["-f", "qcow2", "-c", "write 1M 64k", &image])?;
    let drive = format!(
        "-S -net none -drive file={image},if=none,id=d0,node-name=disk -device virtio-blk-pci,drive=d0"
    );
    let drive = drive.replace(",node-name=disk", "");
    let mut vm = start_tiny(&scratch, "vm", "", &drive)?;
    let mut qmp = vm.qmp()?;
    let on = |name: &str| json!({"node": "d0", "name": name});
    assert_eq!(bitmap(&mut qmp, "d0", "old")?["count"], 65536);
    qmp.command("block-dirty-bitmap-add", json!({"node": "d0", "name": "fine", "granularity": 512}))?;
    qmp.command("block-dirty-bitmap-add", json!({"node": "d0", "name": "off", "disabled": true}))?;
    qmp.command("block-dirty-bitmap-enable", on("off"))?;
    qmp.command("block-dirty-bitmap-disable", on("old"))?;
    let merge = json!({"node": "d0", "target": "fine", "bitmaps": ["old", {"node": "d0", "name": "off"}]});
    let all = [
        action("block-dirty-bitmap-merge", merge.clone()),
        action("block-dirty-bitmap-clear", on("old")),
        action("block-dirty-bitmap-disable", on("off")),
        action("block-dirty-bitmap-remove", on("off")),
        action("abort", json!({})),
    ];
    refused(&mut qmp, "transaction", json!({"actions": all}), "Transaction aborted");
    let shown = ["old", "fine", "off"].map(|n| bitmap(&mut qmp, "d0", n).unwrap_or_default());
    assert_eq!(shown.clone().map(|b| b["count"].clone()), [json!(65536), json!(0), json!(0)]);
    assert_eq!(shown.map(|b| b["recording"].clone()), [json!(false), json!(true), json!(true)]);
    qmp.command("block-dirty-bitmap-merge", merge)?;
    assert_eq!(bitmap(&mut qmp, "d0", "fine")?["count"], 65536);
    let digest = qmp.command("x-debug-block-dirty-bitmap-sha256", on("fine"))?["sha256"].clone();
    assert!(digest.as_str().is_some_and(|d| d.len() == 64), "{digest}");
    qmp.command("block-dirty-bitmap-add", json!({"node": "d0", "name": "new", "persistent": true}))?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    let info = run("qemu-img", &["info", "--output=json", &image])?;
    let info: Value = serde_json::from_str(&info).map_err(|e| e.to_string())?;
    let flags = |info: &Value, name: &str| {
        let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        list.into_iter().find(|b| b["name"] == name).map(|b| b["flags"].clone()).unwrap_or_default()
    };
    assert_eq!((flags(&info, "old"), flags(&info, "new")), (json!([]), json!(["auto"])), "{info}");

    // Killed: both are in use for ever, and say so.
    let mut vm = start_tiny(&scratch, "vm2", "", &drive)?;
    let mut qmp = vm.qmp()?;
    assert_eq!(bitmap(&mut qmp, "d0", "old")?["count"], 65536);
    let block = qmp.command("query-block", Value::Null)?;
    assert_eq!(flags(&block[0]["inserted"]["image"], "new"), json!(["in-use", "auto"]));
    drop(qmp);
    vm.kill();
    let mut vm = start_tiny(&scratch, "vm3", "", &drive)?;
    let mut qmp = vm.qmp()?;
    assert_eq!(bitmap(&mut qmp, "d0", "new")?["inconsistent"], true);
    refused(&mut qmp, "block-dirty-bitmap-enable", on("new"), "is inconsistent and cannot be used");
    qmp.command("block-dirty-bitmap-remove", on("new"))?;
    qmp.command("block-dirty-bitmap-remove", on("old"))?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    let info = run("qemu-img", &["info", &image])?;
    assert!(!info.contains("bitmaps"), "{info}");
    run("qemu-img", &["check", &image])?;

    // In a pair the image keeps them, and new ones are refused with the reason.
    run("qemu-img", &["bitmap", "--add", &image, "kept"])?;
    run("qemu-io", &["-f", "qcow2", "-c", "write 2M 64k", &image])?;
    let pair = format!("{drive} -ft primary,listen={}", free_port()?);
    let mut vm = start_tiny(&scratch, "vm4", "", &pair)?;
    let mut qmp = vm.qmp()?;
    assert_eq!(bitmap(&mut qmp, "d0", "kept")?["count"], 65536);
    refused(
        &mut qmp,
        "block-dirty-bitmap-add",
        on("x"),
        "dirty bitmaps are refused while fault tolerance is on",
    );
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    let info = run("qemu-img", &["info", &image])?;
    assert!(info.contains("name: kept\n") && !info.contains("in-use"), "{info}");
    Ok(())
}

/// A disk is read by others while its guest runs; what may be written is written.
#[test]
fn exports_show_disks_to_other_programs() -> Result<()> {
    let scratch = Scratch::new("bnbd")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let socket = scratch.path("nbd");
    let url = |name: &str| format!("nbd+unix:///{name}?socket={socket}");
    let start = json!({"addr": {"type": "unix", "data": {"path": socket}}, "max-connections": 8});
    let disk = json!({"type": "nbd", "id": "e0", "node-name": "disk", "name": "d", "bitmaps": ["b"],
                      "allocation-depth": true});
    refused(&mut qmp, "nbd-server-stop", Value::Null, "NBD server not running");
    refused(&mut qmp, "block-export-add", disk.clone(), "NBD server not running");
    qmp.command("nbd-server-start", start.clone())?;
    refused(&mut qmp, "nbd-server-start", start, "NBD server already running");
    refused(&mut qmp, "block-export-add", disk.clone(), "Bitmap 'b' is not found");
    qmp.command("block-dirty-bitmap-add", json!({"node": "disk", "name": "b", "granularity": 65536}))?;
    console.run("echo marked > /mnt/marked; sync")?;
    refused(
        &mut qmp,
        "block-export-add",
        disk.clone(),
        "Enabled bitmap 'b' incompatible with readonly export",
    );
    qmp.command("block-dirty-bitmap-disable", json!({"node": "disk", "name": "b"}))?;
    qmp.command("block-export-add", disk.clone())?;
    refused(&mut qmp, "block-export-add", disk.clone(), "Block export id 'e0' is already in use");
    let mut same = disk.clone();
    same["id"] = json!("e1");
    same["bitmaps"] = json!([]);
    refused(&mut qmp, "block-export-add", same.clone(), "NBD server already has export named 'd'");
    same["writable"] = json!(true);
    refused(&mut qmp, "block-export-add", same, "Permission conflict on node 'disk'");
    let held = bitmap(&mut qmp, "disk", "b")?;
    assert_eq!(held["busy"], true, "{held}");

    // While the guest stands still, what is seen is what the file holds.
    qmp.command("stop", Value::Null)?;
    let file = scratch.path("disk.qcow2");
    wait_for("the guest's writes", LONG, || {
        run("qemu-img", &["compare", "-U", "-f", "qcow2", "-F", "raw", &file, &url("d")]).ok()
    })?;
    let copy = scratch.path("copy.raw");
    run("nbdcopy", &[&url("d"), &copy])?;
    run("qemu-img", &["compare", "-U", "-f", "raw", "-F", "qcow2", &copy, &file])?;
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &url("d"), &scratch.path("converted.qcow2")])?;
    run("qemu-img", &["compare", "-U", &file, &scratch.path("converted.qcow2")])?;
    let info = run("nbdinfo", &[&url("d")])?;
    for part in ["export-size: 50331648", "is_read_only: true", "qemu:dirty-bitmap:b", "base:allocation"] {
        assert!(info.contains(part), "{part} is not in {info}");
    }
    let map = |context: &str, kind: &str| -> Result<u64> {
        let text = run("nbdinfo", &["--json", &format!("--map={context}"), &url("d")])?;
        let list: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let list = list.as_array().cloned().unwrap_or_default();
        let total: u64 = list.iter().filter_map(|e| e["length"].as_u64()).sum();
        assert_eq!(total, 48 << 20, "{text}");
        Ok(list.iter().filter(|e| e["description"] == kind).filter_map(|e| e["length"].as_u64()).sum())
    };
    assert_eq!(Some(map("qemu:dirty-bitmap:b", "dirty")?), held["count"].as_u64());
    let holes = map("base:allocation", "hole,zero")?;
    assert!(holes > 8 << 20 && holes < 48 << 20, "{holes} bytes of holes");
    assert_eq!(map("qemu:allocation-depth", "local")? + map("qemu:allocation-depth", "absent")?, 48 << 20);
    let io = |url: &str, command: &str| run("qemu-io", &["-f", "raw", "-c", command, url]);
    assert!(io(&url("d"), "write 0 4k").is_err(), "it is for reading");
    qmp.command("cont", Value::Null)?;

    // A node of nobody's is written, by bytes, too.
    overlay(&mut qmp, &scratch, "more", None)?;
    let more = json!({"type": "nbd", "id": "e2", "node-name": "more", "writable": true, "writethrough": true,
                      "description": "some more"});
    qmp.command("block-export-add", more)?;
    refused(&mut qmp, "blockdev-del", json!({"node-name": "more"}), "in use");
    for command in ["write -P 7 1000 3000", "write -z 2M 1M", "write -P 9 4M 64k", "discard 4M 32k", "flush"]
    {
        io(&url("more"), command)?;
    }
    io(&url("more"), "read -P 7 1000 3000")?;
    io(&url("more"), "read -P 0 4000 1000")?;
    assert!(io(&url("more"), "write 48M 512").is_err());
    run("nbdcopy", &[&copy, &url("more")])?;
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &copy, &url("more")])?;
    let list = run("nbdinfo", &["--list", &url("")])?;
    assert!(list.contains("export=\"d\"") && list.contains("description: some more"), "{list}");

    // A client keeps an export alive; it is let go when somebody insists.
    let exports = qmp.command("query-block-exports", Value::Null)?;
    let first = json!({"id": "e2", "type": "nbd", "node-name": "more", "shutting-down": false});
    assert_eq!(exports[0], first, "{exports}");
    let mut client = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 512", "-c", "sleep 100000", &url("more")])
        .stdout(std::process::Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    wait_for("the client", LONG, || {
        let said = qmp.command("block-export-del", json!({"id": "nope"}));
        assert!(said.is_err_and(|e| e.contains("Export 'nope' is not found")));
        let used = std::fs::read_to_string("/proc/net/unix").ok()?;
        (used.lines().filter(|l| l.ends_with(&socket)).count() > 1).then_some(())
    })?;
    wait_for("the client to choose", LONG, || {
        let said = qmp.command("block-export-del", json!({"id": "e2"}));
        match said {
            Err(e) if e.contains("export 'e2' still in use") => Some(()),
            // It was not there yet: once more.
            _ => {
                let again = json!({"type": "nbd", "id": "e2", "node-name": "more", "writable": true});
                let _ = qmp.command("block-export-add", again);
                None
            }
        }
    })?;
    qmp.events.clear();
    qmp.command("block-export-del", json!({"id": "e2", "mode": "hard"}))?;
    let gone = qmp.wait_event("BLOCK_EXPORT_DELETED", LONG)?;
    assert_eq!(gone["data"]["id"], "e2");
    let _ = client.kill();
    let _ = client.wait();
    delete(&mut qmp, "more")?;
    qmp.command("nbd-server-stop", Value::Null)?;
    assert_eq!(bitmap(&mut qmp, "disk", "b")?["busy"], false);
    assert!(!std::path::Path::new(&socket).exists());

    // Over TCP, in older words.
    let place = free_port()?;
    let addr = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": place.port().to_string()}});
    qmp.command("nbd-server-start", json!({"addr": addr}))?;
    qmp.command("nbd-server-add", json!({"device": "disk", "bitmap": "b"}))?;
    let size = run("nbdinfo", &["--size", &format!("nbd://{place}/disk")])?;
    assert_eq!(size.trim(), "50331648");
    qmp.command("nbd-server-remove", json!({"name": "disk"}))?;
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &file, lines)
}

/// A backup program pulls the contents of one moment out of a running machine, and what changed since another.
#[test]
fn a_moment_is_pulled_while_the_guest_writes_on() -> Result<()> {
    let scratch = Scratch::new("bpull")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let file = scratch.path("disk.qcow2");
    qmp.command("block-dirty-bitmap-add", json!({"node": "disk", "name": "since"}))?;
    console.run("dd if=/dev/urandom of=/mnt/noise bs=64k count=40 2>/dev/null; sync")?;
    // The moment: as the file holds it.
    qmp.command("stop", Value::Null)?;
    let moment = scratch.path("moment.raw");
    run("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "raw", &file, &moment])?;
    let temporary = scratch.path("temporary.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &file, "-F", "qcow2", "-u", &temporary, "48M"])?;
    let node = json!({"driver": "qcow2", "file": {"driver": "file", "filename": temporary}, "node-name": "temporary",
                      "backing": "disk"});
    qmp.command("blockdev-add", node)?;
    let job = json!({"job-id": "p", "device": "disk", "target": "temporary", "sync": "none"});
    let actions = [
        action("block-dirty-bitmap-disable", json!({"node": "disk", "name": "since"})),
        action("blockdev-backup", job),
    ];
    qmp.command("transaction", json!({"actions": actions}))?;
    let socket = scratch.path("nbd");
    let address = json!({"type": "unix", "data": {"path": socket}});
    qmp.command("nbd-server-start", json!({"addr": address}))?;
    let export =
        json!({"type": "nbd", "id": "x", "node-name": "temporary", "name": "m", "bitmaps": ["since"]});
    qmp.command("block-export-add", export)?;
    qmp.command("cont", Value::Null)?;
    console.run(
        "(for i in 1 2 3; do dd if=/dev/urandom of=/mnt/noise bs=64k count=40 conv=notrunc 2>/dev/null; sync; done; \
         touch /done) & true",
    )?;
    let url = format!("nbd+unix:///m?socket={socket}");
    let pulled = scratch.path("pulled.raw");
    for _ in 0..2 {
        run("nbdcopy", &[&url, &pulled])?;
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &moment, &pulled])?;
        console.run("while ! [ -e /done ]; do sleep 0.1; done")?;
    }
    let map = run("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:since", &url])?;
    assert!(map.contains("\"dirty\""), "{map}");
    qmp.command("nbd-server-stop", Value::Null)?;
    qmp.command("job-cancel", json!({"id": "p"}))?;
    wait_for("the end of the job", LONG, || status(&mut qmp, "p").ok().filter(Value::is_null))?;
    qmp.command("blockdev-del", json!({"node-name": "temporary"}))?;
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &file, lines)
}

/// Nodes get other options while they are in use; what cannot change is named.
#[test]
fn nodes_are_reopened_with_other_options() -> Result<()> {
    let scratch = Scratch::new("breopen")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    create(&mut qmp, &scratch.path("over.qcow2"), "over", Some(&scratch.path("disk.qcow2")))?;
    qmp.command("blockdev-snapshot", json!({"node": "disk", "overlay": "over"}))?;
    let options = |more: Value| {
        let mut o = json!({"driver": "qcow2", "node-name": "disk", "file": "disk-storage", "backing": null});
        more.as_object().into_iter().flatten().for_each(|(k, v)| o[k] = v.clone());
        json!({"options": [o]})
    };
    let shown = |qmp: &mut Qmp, name: &str| -> Result<Value> {
        let nodes = qmp.command("query-named-block-nodes", json!({"flat": true}))?;
        Ok(nodes
            .as_array()
            .into_iter()
            .flatten()
            .find(|n| n["node-name"] == name)
            .cloned()
            .unwrap_or_default())
    };
    assert_eq!(shown(&mut qmp, "disk")?["ro"], true);
    // A bitmap of an image at the back can be taken away when that is open for writing.
    qmp.command("blockdev-reopen", options(json!({"read-only": false})))?;
    assert_eq!(shown(&mut qmp, "disk")?["ro"], false);
    qmp.command("block-dirty-bitmap-add", json!({"node": "disk", "name": "b", "persistent": true}))?;
    qmp.command("blockdev-reopen", options(json!({"read-only": true})))?;
    assert_eq!(shown(&mut qmp, "disk")?["ro"], true);
    let name = json!({"node": "disk", "name": "b"});
    refused(&mut qmp, "block-dirty-bitmap-remove", name.clone(), "is readonly and cannot be modified");
    qmp.command("blockdev-reopen", options(json!({"discard": "unmap", "detect-zeroes": "unmap"})))?;
    let disk = shown(&mut qmp, "disk")?;
    assert_eq!((&disk["ro"], &disk["detect_zeroes"]), (&json!(false), &json!("on")), "{disk}");
    qmp.command("block-dirty-bitmap-remove", name)?;
    qmp.command("blockdev-reopen", options(json!({"read-only": true})))?;
    // What cannot be.
    let over = |more: Value| {
        let mut o =
            json!({"driver": "qcow2", "node-name": "over", "file": "over-storage", "backing": "disk"});
        more.as_object().into_iter().flatten().for_each(|(k, v)| o[k] = v.clone());
        json!({"options": [o]})
    };
    let busy = "Read-only block node 'over' cannot support read-write users";
    refused(&mut qmp, "blockdev-reopen", over(json!({"read-only": true})), busy);
    refused(&mut qmp, "blockdev-reopen", over(json!({"driver": "raw", "backing": null})), "");
    let mut without = over(Value::Null);
    without["options"][0].as_object_mut().map(|o| o.remove("backing"));
    refused(&mut qmp, "blockdev-reopen", without, "backing is missing for 'over'");
    let cycle = options(json!({"backing": "over"}));
    refused(
        &mut qmp,
        "blockdev-reopen",
        cycle,
        "Making 'over' a backing child of 'disk' would create a cycle",
    );
    let mut nowhere = over(Value::Null);
    nowhere["options"][0]["node-name"] = json!("nope");
    refused(&mut qmp, "blockdev-reopen", nowhere, "Failed to find node with node-name='nope'");
    qmp.command("blockdev-reopen", over(Value::Null))?;
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &scratch.path("over.qcow2"), lines)
}
