//! Block jobs and external snapshots of running machines: the guest writes all the time, its file system holds what it
//! should, and qemu-img agrees on every image.

mod common;

use common::blocks::*;
use common::*;
use ftvm_harness::guests::{self, run};
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::{json, Value};

#[test]
fn snapshots_are_taken_and_committed_while_the_guest_writes() -> Result<()> {
    let scratch = Scratch::new("jcommit")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let file = |n: &str| scratch.path(&format!("{n}.qcow2"));
    for (name, below) in [("one", "disk"), ("two", "one"), ("three", "two")] {
        create(&mut qmp, &file(name), name, Some(&file(below)))?;
        let action = json!({"type": "blockdev-snapshot", "data": {"node": below, "overlay": name}});
        qmp.command("transaction", json!({"actions": [action]}))?;
        console.run(&format!("echo {name} > /mnt/{name}; sync"))?;
    }
    assert_eq!(front(&mut qmp)?, ("three".into(), 3));
    // What is below can be read by others meanwhile, and is not deleted.
    run("qemu-img", &["check", "-q", &file("one")])?;
    assert!(run("qemu-img", &["check", "-q", &file("three")]).is_err(), "the active image is locked");
    assert!(qmp.command("blockdev-del", json!({"node-name": "one"})).unwrap_err().contains("is busy"));
    // Two into one, in the middle of the chain.
    let middle = json!({"job-id": "c", "device": "three", "top-node": "two", "base-node": "one",
                        "auto-dismiss": false});
    qmp.command("block-commit", middle)?;
    dismiss(&mut qmp, "c")?;
    delete(&mut qmp, "two")?;
    std::fs::remove_file(file("two")).map_err(|e| e.to_string())?;
    assert_eq!(front(&mut qmp)?, ("three".into(), 2));
    // And the active image down to the first.
    let active = json!({"job-id": "a", "device": "three", "base-node": "disk", "auto-dismiss": false});
    qmp.command("block-commit", active)?;
    until(&mut qmp, "a", "ready")?;
    let busy = json!({"job-id": "b", "device": "three", "base-node": "disk"});
    assert!(qmp.command("block-commit", busy).unwrap_err().contains("in use by block job: commit"));
    console.run("echo late > /mnt/late; sync")?;
    qmp.command("job-complete", json!({"id": "a"}))?;
    dismiss(&mut qmp, "a")?;
    assert_eq!(front(&mut qmp)?, ("disk".into(), 0));
    for name in ["three", "one"] {
        delete(&mut qmp, name)?;
        std::fs::remove_file(file(name)).map_err(|e| e.to_string())?;
    }
    let seen =
        console.run("echo 3 > /proc/sys/vm/drop_caches; cat /mnt/one /mnt/two /mnt/three /mnt/late")?;
    for word in ["one", "two", "three", "late"] {
        assert!(seen.contains(word), "{word} is not in {seen}");
    }
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &file("disk"), lines)
}

#[test]
fn a_stream_makes_an_overlay_independent() -> Result<()> {
    let scratch = Scratch::new("jstream")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let file = |n: &str| scratch.path(&format!("{n}.qcow2"));
    for (node, name) in [("disk", "one"), ("one", "two")] {
        let sync = json!({"node-name": node, "snapshot-file": file(name), "snapshot-node-name": name});
        qmp.command("blockdev-snapshot-sync", sync)?;
        console.run(&format!("echo {name} > /mnt/{name}; sync"))?;
    }
    assert_eq!(front(&mut qmp)?, ("two".into(), 2));
    let above = json!({"job-id": "s", "device": "two", "base-node": "disk", "auto-dismiss": false});
    qmp.command("block-stream", above)?;
    dismiss(&mut qmp, "s")?;
    assert_eq!(front(&mut qmp)?, ("two".into(), 1));
    std::fs::remove_file(file("one")).map_err(|e| e.to_string())?;
    let info = run("qemu-img", &["info", "-U", &file("two")])?;
    assert!(info.contains(&format!("backing file: {}", file("disk"))), "{info}");
    qmp.command("block-stream", json!({"job-id": "s", "device": "two"}))?;
    wait_for("the end of the stream", LONG, || status(&mut qmp, "s").ok().filter(Value::is_null))?;
    assert_eq!(front(&mut qmp)?, ("two".into(), 0));
    std::fs::remove_file(file("disk")).map_err(|e| e.to_string())?;
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &file("two"), lines)
}

#[test]
fn a_disk_moves_to_another_image_and_is_backed_up() -> Result<()> {
    let scratch = Scratch::new("jmirror")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let file = |n: &str| scratch.path(&format!("{n}.qcow2"));
    // One that is given up, one that ends without the switch, one with it.
    create(&mut qmp, &file("copy"), "copy", None)?;
    let mirror = |id: &str| {
        json!({"job-id": id, "device": "disk", "target": "copy", "sync": "full",
                                   "auto-dismiss": false})
    };
    let mut slow = mirror("m1");
    slow["speed"] = json!(1 << 20);
    qmp.command("blockdev-mirror", slow)?;
    qmp.command("block-job-pause", json!({"device": "m1"}))?;
    until(&mut qmp, "m1", "paused")?;
    qmp.command("job-resume", json!({"id": "m1"}))?;
    until(&mut qmp, "m1", "running")?;
    let shown = qmp.command("query-block-jobs", Value::Null)?;
    assert_eq!((&shown[0]["type"], &shown[0]["speed"]), (&json!("mirror"), &json!(1 << 20)));
    qmp.command("block-job-set-speed", json!({"device": "m1", "speed": 2 << 20}))?;
    assert!(qmp.command("job-complete", json!({"id": "m1"})).unwrap_err().contains("cannot be completed"));
    assert!(qmp
        .command("blockdev-del", json!({"node-name": "copy"}))
        .unwrap_err()
        .contains("block job: mirror"));
    qmp.command("job-cancel", json!({"id": "m1"}))?;
    wait_for("the end of the job", LONG, || {
        status(&mut qmp, "m1").ok().filter(|s| s["status"] == "concluded")
    })?;
    qmp.command("job-dismiss", json!({"id": "m1"}))?;
    qmp.command("blockdev-mirror", mirror("m2"))?;
    until(&mut qmp, "m2", "ready")?;
    qmp.command("block-job-cancel", json!({"device": "m2"}))?;
    dismiss(&mut qmp, "m2")?;
    assert_eq!(front(&mut qmp)?, ("disk".into(), 0));
    qmp.command("blockdev-mirror", mirror("m3"))?;
    until(&mut qmp, "m3", "ready")?;
    console.run("echo moved > /mnt/moved; sync")?;
    qmp.command("job-complete", json!({"id": "m3"}))?;
    dismiss(&mut qmp, "m3")?;
    assert_eq!(front(&mut qmp)?, ("copy".into(), 0));
    delete(&mut qmp, "disk")?;
    std::fs::remove_file(file("disk")).map_err(|e| e.to_string())?;
    // A backup of one moment, while the guest writes on.
    console.run("echo before > /mnt/state; sync")?;
    let backup = json!({"job-id": "k", "device": "copy", "sync": "full", "target": scratch.path("kept.raw"),
                        "format": "raw"});
    qmp.command("drive-backup", backup)?;
    console.run("echo after > /mnt/state; sync")?;
    wait_for("the end of the backup", LONG, || status(&mut qmp, "k").ok().filter(Value::is_null))?;
    let kept = scratch.path("kept.raw");
    let _ = std::process::Command::new("e2fsck").args(["-fy", &kept]).output();
    assert!(run("debugfs", &["-R", "cat /state", &kept])?.contains("before"));
    // Limits at run time.
    let none = json!({"id": "vd", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
    let mut limits = none.clone();
    limits["iops"] = json!(50);
    qmp.command("block_set_io_throttle", limits)?;
    let block = qmp.command("query-block", Value::Null)?;
    assert_eq!(block[0]["inserted"]["iops"], 50);
    let timed = "t=$(date +%s); dd if=/dev/vda of=/dev/null bs=4k count=150 iflag=direct 2>/dev/null; \
                 echo took $(($(date +%s) - t))";
    let took = console.run(timed)?;
    assert!(!took.contains("took 0") && !took.contains("took 1\n"), "{took}");
    qmp.command("block_set_io_throttle", none)?;
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &file("copy"), lines)
}

#[test]
fn a_transaction_happens_as_a_whole_or_not_at_all() -> Result<()> {
    let scratch = Scratch::new("jtrans")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let file = |n: &str| scratch.path(&format!("{n}.qcow2"));
    let bitmap = json!({"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}});
    let internal =
        json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "disk", "name": "i"}});
    let external = json!({"type": "blockdev-snapshot-sync", "data":
        {"node-name": "disk", "snapshot-file": file("over"), "snapshot-node-name": "over"}});
    let abort = json!({"type": "abort", "data": {}});
    let all = [&bitmap, &internal, &external, &abort];
    let refused = qmp.command("transaction", json!({"actions": all})).unwrap_err();
    assert!(refused.contains("Transaction aborted using Abort action"), "{refused}");
    assert!(!std::path::Path::new(&file("over")).exists(), "the overlay's file is left");
    assert_eq!(front(&mut qmp)?, ("disk".into(), 0));
    let block = qmp.command("query-block", Value::Null)?;
    assert!(
        block[0]["inserted"]["dirty-bitmaps"].is_null()
            && block[0]["inserted"]["image"]["snapshots"].is_null()
    );
    qmp.command("transaction", json!({"actions": &all[..3]}))?;
    assert_eq!(front(&mut qmp)?, ("over".into(), 1));
    let nodes = qmp.command("query-named-block-nodes", Value::Null)?;
    let disk = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == "disk").cloned();
    let disk = disk.unwrap_or_default();
    assert_eq!(disk["image"]["snapshots"][0]["name"], "i", "{disk}");
    assert_eq!(disk["dirty-bitmaps"][0]["name"], "b", "{disk}");
    assert_eq!(disk["ro"], true, "{disk}");
    // What one of a pair would do alone is refused, both ways.
    let on = qmp.command("ft-turn-on", json!({"listen": "127.0.0.1:0"})).unwrap_err();
    assert!(on.contains("other images than it was started with"), "{on}");
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &file("over"), lines)?;
    run("qemu-img", &["check", "-q", &file("disk")])?;
    Ok(())
}

/// Encrypted images are made by jobs, opened with their secrets and no others, and read by qemu-img.
#[test]
fn encrypted_images_are_made_and_opened() -> Result<()> {
    let scratch = Scratch::new("jluks")?;
    let mut vm = start_tiny(
        &scratch,
        "vm",
        "",
        "-S -net none -object secret,id=master,data=12345678901234567890123456789012",
    )?;
    let mut qmp = vm.qmp()?;
    // Encrypted under the master secret by AES-256-CBC, as libvirt gives them: "a passphrase".
    let hidden =
        guests::openssl_hidden("12345678901234567890123456789012", "a passphrase", &scratch.path("p"))?;
    let secret = json!({
        "qom-type": "secret", "id": "s", "keyid": "master", "format": "base64", "data": hidden.0, "iv": hidden.1,
    });
    qmp.command("object-add", secret)?;
    qmp.command("object-add", json!({"qom-type": "secret", "id": "other", "data": "another"}))?;
    let quick = json!({"key-secret": "s", "iter-time": 20, "cipher-alg": "aes-128"});
    for format in ["qcow2", "luks"] {
        let (file, storage, job) =
            (scratch.path(format), format!("{format}-storage"), format!("make-{format}"));
        let options = json!({"driver": "file", "filename": file, "size": 0});
        qmp.command("blockdev-create", json!({"job-id": job, "options": options}))?;
        dismiss(&mut qmp, &job)?;
        qmp.command("blockdev-add", json!({"driver": "file", "filename": file, "node-name": storage}))?;
        let mut options = json!({"driver": format, "file": storage, "size": 4 << 20});
        let mut key = quick.clone();
        if format == "qcow2" {
            key["format"] = json!("luks");
            options["encrypt"] = key;
        } else {
            options
                .as_object_mut()
                .zip(key.as_object())
                .map(|(o, k)| o.extend(k.clone()))
                .ok_or("no object")?;
        }
        qmp.command("blockdev-create", json!({"job-id": job, "options": options}))?;
        dismiss(&mut qmp, &job)?;
        let node = |secret: &str| {
            let mut node = json!({"driver": format, "file": storage, "node-name": format});
            match format {
                "qcow2" => node["encrypt"] = json!({"format": "luks", "key-secret": secret}),
                _ => node["key-secret"] = json!(secret),
            }
            node
        };
        let wrong = qmp.command("blockdev-add", node("other")).unwrap_err();
        assert!(wrong.contains("Invalid password, cannot unlock any keyslot"), "{wrong}");
        let absent = qmp.command("blockdev-add", node("absent")).unwrap_err();
        assert!(absent.contains("No secret with id 'absent'"), "{absent}");
        qmp.command("blockdev-add", node("s"))?;
        let nodes = qmp.command("query-named-block-nodes", Value::Null)?;
        let ours = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == format).cloned();
        let ours = ours.unwrap_or_default();
        assert_eq!(
            (&ours["encrypted"], &ours["image"]["virtual-size"]),
            (&json!(true), &json!(4 << 20)),
            "{ours}"
        );
        let data = &ours["image"]["format-specific"]["data"];
        let luks = if format == "qcow2" { &data["encrypt"] } else { data };
        assert_eq!(luks["cipher-alg"], "aes-128", "{ours}");
        qmp.command("blockdev-del", json!({"node-name": format}))?;
        let key = if format == "qcow2" { "encrypt.key-secret" } else { "key-secret" };
        let opts = format!("driver={format},{key}=s,file.filename={file}");
        let said = run(
            "qemu-io",
            &["--object", "secret,id=s,data=a passphrase", "--image-opts", "-c", "read 0 4M", &opts],
        )?;
        assert!(said.contains("read 4194304/4194304"), "{said}");
    }
    qmp.command("object-del", json!({"id": "s"}))?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}

/// One of a pair does none of this: the other side would not find what it has to open.
#[test]
fn a_pair_keeps_its_images() -> Result<()> {
    let scratch = Scratch::new("jpair")?;
    let image = scratch.path("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "8M"])?;
    let more =
        format!("-S -net none -drive file={image},if=virtio,id=d0 -ft primary,listen={}", free_port()?);
    let mut vm = start_tiny(&scratch, "vm", "", &more)?;
    let mut qmp = vm.qmp()?;
    let over = scratch.path("over.qcow2");
    let sync = json!({"device": "d0", "snapshot-file": over});
    let mirror = json!({"device": "d0", "target": over, "sync": "full"});
    for (command, arguments) in [("blockdev-snapshot-sync", sync), ("drive-mirror", mirror)] {
        let refused = qmp.command(command, arguments).unwrap_err();
        assert!(refused.contains("refused while fault tolerance is on"), "{command}: {refused}");
    }
    assert!(!std::path::Path::new(&over).exists());
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)
}

#[test]
fn the_whole_machine_is_saved_and_loaded_by_jobs() -> Result<()> {
    let scratch = Scratch::new("jobsnap")?;
    let (mut vm, mut console) = machine(&scratch)?;
    let mut qmp = vm.qmp()?;
    let job = |qmp: &mut Qmp, verb: &str, id: &str, more: Value| -> Result<Value> {
        let mut arguments = json!({"job-id": id, "tag": "then", "devices": ["disk"]});
        for (key, value) in more.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        qmp.command(verb, arguments)?;
        let ended = wait_for("the end of the job", LONG, || {
            let jobs = qmp.command("query-jobs", Value::Null).ok()?;
            let job = jobs.as_array()?.iter().find(|j| j["id"] == id)?.clone();
            (job["status"] == "concluded").then_some(job)
        })?;
        qmp.command("job-dismiss", json!({"id": id}))?;
        Ok(ended)
    };
    let here = json!({"vmstate": "disk"});
    console.run("mark=before")?;
    let saved = job(&mut qmp, "snapshot-save", "s0", here.clone())?;
    assert!(saved["error"].is_null() && saved["type"] == "snapshot-save", "{saved}");
    let again = job(&mut qmp, "snapshot-save", "s1", here.clone())?;
    assert!(again["error"].as_str().is_some_and(|e| e.contains("already exists")), "{again}");
    console.run("mark=behind; echo changed > /mnt/changed; sync")?;
    let loaded = job(&mut qmp, "snapshot-load", "s2", here.clone())?;
    assert!(loaded["error"].is_null(), "{loaded}");
    let text = console.run("echo it is $mark; ls /mnt")?;
    assert!(text.contains("it is before") && !text.contains("changed"), "{text}");
    let refused =
        |r: Result<Value>, part: &str| assert!(r.as_ref().is_err_and(|e| e.contains(part)), "{r:?}");
    refused(job(&mut qmp, "snapshot-load", "s3", json!({"vmstate": "other"})), "'other' does not exist");
    refused(
        job(&mut qmp, "snapshot-delete", "s4", json!({"devices": ["other"]})),
        "No block device node 'other'",
    );
    let gone = job(&mut qmp, "snapshot-delete", "s5", json!({}))?;
    assert!(gone["error"].is_null(), "{gone}");
    let missing = job(&mut qmp, "snapshot-load", "s6", here)?;
    assert!(missing["error"].as_str().is_some_and(|e| e.contains("does not exist")), "{missing}");
    let lines = end(&mut vm, &mut console, qmp)?;
    check(&scratch, &scratch.path("disk.qcow2"), lines)
}
