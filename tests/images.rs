//! What is done to images of running machines: snapshots, another size, the write cache.

mod common;

use std::process::Command;

use common::*;
use ftvm_harness::guests::run;
use ftvm_harness::libvirt::Console;
use ftvm_harness::vm::Vm;
use ftvm_harness::{Result, Scratch};
use serde_json::{json, Value};

/// A machine with a shell on its serial line.
fn with_shell(scratch: &Scratch, words: &str, more: &str) -> Result<(Vm, Console)> {
    let socket = scratch.path("tty");
    let mut args = tiny_args(words)?;
    args.extend(["-serial".to_owned(), format!("unix:{socket},server=on,wait=off")]);
    args.extend(more.split_whitespace().map(str::to_owned));
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let vm = start(scratch, "vm", &words)?;
    let mut console = Console::socket(&socket)?;
    console.until("tiny guest ready", LONG)?;
    Ok((vm, console))
}

fn says(text: &str, wanted: &str) -> Result<()> {
    match text.contains(wanted) {
        true => Ok(()),
        false => Err(format!("'{wanted}' is not in:\n{text}")),
    }
}

/// Snapshots of a running machine's disk, seen by QMP and by qemu-img; qemu-img goes back to one of them.
#[test]
fn snapshots_of_a_running_machines_disk() -> Result<()> {
    let scratch = Scratch::new("isnap")?;
    let (raw, image) = (ext4(&scratch, "disk.raw", 48)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let drive = format!("-net none -drive file={image},if=virtio,id=d0");
    let (mut vm, mut console) = with_shell(&scratch, "disk", &drive)?;
    let mut qmp = vm.qmp()?;
    console.run("echo first > /mnt/f; sync")?;
    qmp.command("blockdev-snapshot-internal-sync", json!({"device": "d0", "name": "one"}))?;
    console.run("echo second > /mnt/f; sync")?;
    qmp.command("blockdev-snapshot-internal-sync", json!({"device": "d0", "name": "two"}))?;
    qmp.command("blockdev-snapshot-internal-sync", json!({"device": "d0", "name": "three"}))?;
    let again = qmp.command("blockdev-snapshot-internal-sync", json!({"device": "d0", "name": "one"}));
    says(&again.unwrap_err(), "Snapshot with name 'one' already exists on device 'd0'")?;
    let gone =
        qmp.command("blockdev-snapshot-delete-internal-sync", json!({"device": "d0", "name": "two"}))?;
    assert_eq!(gone["id"], "2");
    let gone = qmp.command("blockdev-snapshot-delete-internal-sync", json!({"device": "d0", "id": "2"}));
    says(&gone.unwrap_err(), "Snapshot with id '2' and name 'null' does not exist on device 'd0'")?;
    let block = qmp.command("query-block", Value::Null)?;
    let shown = &block[0]["inserted"]["image"];
    let names: Vec<&str> =
        shown["snapshots"].as_array().into_iter().flatten().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(names, ["one", "three"], "{shown}");
    assert_eq!(shown["format-specific"]["data"]["refcount-bits"], 16);
    let list = qmp.command("human-monitor-command", json!({"command-line": "info snapshots"}))?;
    says(list.as_str().unwrap_or_default(), "List of partial (non-loadable) snapshots on 'd0':")?;
    console.run("echo third > /mnt/f; sync")?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    run("qemu-img", &["check", &image])?;
    for (snapshot, holds) in [("", "third"), ("one", "first"), ("three", "second")] {
        if !snapshot.is_empty() {
            run("qemu-img", &["snapshot", "-a", snapshot, &image])?;
        }
        run("qemu-img", &["convert", "-O", "raw", &image, &raw])?;
        // The snapshot is the disk as after a power cut.
        let _ = Command::new("e2fsck").args(["-fy", &raw]).output();
        says(&run("debugfs", &["-R", "cat /f", &raw])?, holds)?;
    }
    Ok(())
}

/// The guest sees the new size of its disk at once and uses it; a replay does too.
#[test]
fn a_guest_sees_the_new_size_of_its_disk() -> Result<()> {
    let scratch = Scratch::new("iresize")?;
    let (raw, image) = (ext4(&scratch, "disk.raw", 48)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let file = scratch.path("resize.rr");
    let drive =
        format!("-net none -drive file={image},if=virtio,id=d0 -icount shift=3,rr=record,rrfile={file}");
    let (mut vm, mut console) = with_shell(&scratch, "", &drive)?;
    let mut qmp = vm.qmp()?;
    qmp.command("block_resize", json!({"device": "d0", "size": 96 << 20}))?;
    console.run("sleep 1")?;
    says(&console.run("cat /sys/block/vda/size")?, "196608")?;
    let write = "yes ftvm | dd of=/dev/vda bs=64k seek=1500 count=4 conv=fsync iflag=fullblock";
    says(&console.run(write)?, "END:0")?;
    says(
        &qmp.command("block_resize", json!({"device": "d0", "size": 1000})).unwrap_err(),
        "multiple of 512",
    )?;
    let answer = qmp.command("human-monitor-command", json!({"command-line": "block_resize d0 64"}))?;
    assert_eq!(answer, "");
    says(&console.run("sleep 1; cat /sys/block/vda/size")?, "131072")?;
    let block = qmp.command("query-block", Value::Null)?;
    assert_eq!(block[0]["inserted"]["image"]["virtual-size"], 64 << 20);
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    run("qemu-img", &["check", &image])?;
    says(&run("qemu-img", &["info", &image])?, "virtual size: 64 MiB")?;
    let mut args = tiny_args("")?;
    let more = drive.replace("rr=record", "rr=replay");
    args.extend(["-serial", "null"].map(str::to_owned));
    args.extend(more.split_whitespace().map(str::to_owned));
    let mut vm = start(&scratch, "replay", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    ends_well(&mut vm)?;
    says(&vm.log(), "state hashes equal")
}

/// A guest that turns its disk's write cache off is told of a write when it is on stable storage.
#[test]
fn a_disk_without_a_write_cache_flushes_by_itself() -> Result<()> {
    let scratch = Scratch::new("iwce")?;
    let (raw, image) = (ext4(&scratch, "disk.raw", 16)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let drive = format!("-net none -drive file={image},if=virtio,id=d0");
    let (mut vm, mut console) = with_shell(&scratch, "", &drive)?;
    let mut qmp = vm.qmp()?;
    let mut flushes = || -> Result<u64> {
        let stats = qmp.command("query-blockstats", Value::Null)?;
        stats[0]["stats"]["flush_operations"].as_u64().ok_or_else(|| stats.to_string())
    };
    let write = "dd if=/dev/zero of=/dev/vda bs=4k count=8 seek=100 oflag=direct 2>/dev/null";
    console.run(write)?;
    let before = flushes()?;
    says(&console.run("cat /sys/block/vda/cache_type")?, "write back")?;
    console.run("echo 'write through' > /sys/block/vda/cache_type")?;
    says(&console.run("cat /sys/block/vda/cache_type")?, "write through")?;
    console.run(write)?;
    let through = flushes()?;
    assert!(through >= before + 8, "{before} flushes before, {through} after 8 writes through");
    vm.kill();
    // What was told of is there.
    run("qemu-img", &["compare", &image, &image])?;
    Ok(())
}
