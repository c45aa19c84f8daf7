//! Machines whose disks are block nodes, and jobs on them.

use ftvm_harness::guests::run;
use ftvm_harness::libvirt::Console;
use ftvm_harness::qmp::Qmp;
use ftvm_harness::vm::Vm;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::{json, Value};

use super::*;

/// A machine with a shell, and a disk as a block node as libvirt makes it: `disk-storage` below `disk`.
pub fn machine(scratch: &Scratch) -> Result<(Vm, Console)> {
    let (raw, image) = (ext4(scratch, "disk.raw", 48)?, scratch.path("disk.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &image])?;
    let socket = scratch.path("tty");
    let mut args = tiny_args("disk")?;
    let more = format!(
        "-serial unix:{socket},server=on,wait=off -net none \
         -blockdev {{\"driver\":\"file\",\"filename\":\"{image}\",\"node-name\":\"disk-storage\"}} \
         -blockdev {{\"driver\":\"qcow2\",\"node-name\":\"disk\",\"file\":\"disk-storage\",\"backing\":null}} \
         -device virtio-blk-pci,drive=disk,id=vd"
    );
    args.extend(more.split_whitespace().map(str::to_owned));
    let vm = start(scratch, "vm", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    let mut console = Console::socket(&socket)?;
    console.until("tiny guest ready", LONG)?;
    // A writer that goes on until the file `stop` is there; every block carries its number.
    console.run(
        "(n=0; while ! [ -e /stop ]; do n=$((n+1)); echo line $n >> /mnt/log; [ $((n%20)) = 0 ] && sync; done; \
         sync; touch /stopped) & true",
    )?;
    Ok((vm, console))
}

/// End the writer; the log must be whole. Returns how many lines it has.
pub fn end(vm: &mut Vm, console: &mut Console, mut qmp: Qmp) -> Result<u64> {
    console.run("touch /stop; while ! [ -e /stopped ]; do sleep 0.1; done")?;
    let check = "awk '{n++; if ($2 != n) bad=1} END {print \"lines\", n, bad+0}' /mnt/log; umount /mnt";
    let text = console.run(check)?;
    qmp.command("quit", Value::Null)?;
    ends_well(vm)?;
    let words: Vec<&str> =
        text.lines().find(|l| l.starts_with("lines ")).unwrap_or(&text).split_whitespace().collect();
    match words[..] {
        [_, n, "0"] => n.parse().map_err(|_| text.clone()),
        _ => Err(format!("the log is torn: {text}")),
    }
}

/// The image is consistent, its file system is clean, and it has the log's lines.
pub fn check(scratch: &Scratch, image: &str, lines: u64) -> Result<()> {
    run("qemu-img", &["check", "-q", image])?;
    let raw = scratch.path("check.raw");
    run("qemu-img", &["convert", "-O", "raw", image, &raw])?;
    run("e2fsck", &["-fn", &raw])?;
    let log = run("debugfs", &["-R", "cat /log", &raw])?;
    let found = log.lines().filter(|l| l.starts_with("line ")).count() as u64;
    assert_eq!(found, lines, "lines in {image}");
    Ok(())
}

pub fn status(qmp: &mut Qmp, id: &str) -> Result<Value> {
    let jobs = qmp.command("query-jobs", Value::Null)?;
    let job = jobs.as_array().into_iter().flatten().find(|j| j["id"] == id).cloned();
    Ok(job.unwrap_or_default())
}

pub fn until(qmp: &mut Qmp, id: &str, wanted: &str) -> Result<()> {
    let mut last = Value::Null;
    let came = wait_for(&format!("job {id} to be {wanted}"), LONG, || {
        last = status(qmp, id).ok()?;
        (last["status"] == wanted || last["status"] == "concluded").then_some(())
    });
    came?;
    match last["status"] == wanted && last["error"].is_null() {
        true => Ok(()),
        false => Err(format!("job {id}: {last}")),
    }
}

/// A job that has ended well is forgotten.
pub fn dismiss(qmp: &mut Qmp, id: &str) -> Result<()> {
    until(qmp, id, "concluded")?;
    qmp.command("job-dismiss", json!({"id": id}))?;
    Ok(())
}

/// Make an image as libvirt does: file, storage node, format, format node.
pub fn create(qmp: &mut Qmp, file: &str, name: &str, below: Option<&str>) -> Result<()> {
    let storage = format!("{name}-storage");
    let job = format!("create-{name}");
    let options = json!({"driver": "file", "filename": file, "size": 0});
    qmp.command("blockdev-create", json!({"job-id": job, "options": options}))?;
    dismiss(qmp, &job)?;
    qmp.command("blockdev-add", json!({"driver": "file", "filename": file, "node-name": storage}))?;
    let mut options = json!({"driver": "qcow2", "file": storage, "size": 48 << 20});
    if let Some(below) = below {
        options["backing-file"] = json!(below);
        options["backing-fmt"] = json!("qcow2");
    }
    qmp.command("blockdev-create", json!({"job-id": job, "options": options}))?;
    dismiss(qmp, &job)?;
    qmp.command(
        "blockdev-add",
        json!({"driver": "qcow2", "file": storage, "node-name": name, "backing": null, "read-only": false}),
    )?;
    Ok(())
}

pub fn delete(qmp: &mut Qmp, name: &str) -> Result<()> {
    qmp.command("blockdev-del", json!({"node-name": name}))?;
    qmp.command("blockdev-del", json!({"node-name": format!("{name}-storage")}))?;
    Ok(())
}

/// What is in front of the disk, and how many images are below.
pub fn front(qmp: &mut Qmp) -> Result<(String, u64)> {
    let block = qmp.command("query-block", Value::Null)?;
    let inserted = &block[0]["inserted"];
    let depth = inserted["backing_file_depth"].as_u64().unwrap_or_default();
    Ok((inserted["node-name"].as_str().unwrap_or_default().to_owned(), depth))
}
