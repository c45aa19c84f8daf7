//! virtio-scsi: Linux's driver uses disks and CD drives behind it, and SeaBIOS boots from them.

mod common;

use common::*;
use ftvm_harness::guests::{root, run, tiny};
use ftvm_harness::libvirt::Console;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::{json, Value};

/// The tiny guest's initial RAM disk with the modules for SCSI in /extra.
fn initrd(scratch: &Scratch) -> Result<String> {
    let (_, tiny) = tiny()?;
    let modules = root().join("build/guests/kernel/lib/modules");
    let (dir, both) = (scratch.path("overlay"), scratch.path("initrd"));
    let script = format!(
        "set -e; mkdir -p {dir}/extra; cd {dir}; cp {0}/*/kernel/drivers/scsi/virtio_scsi.ko \
         {0}/*/kernel/drivers/scsi/sr_mod.ko {0}/*/kernel/drivers/cdrom/cdrom.ko extra; \
         find extra | cpio -o -H newc --quiet | gzip > {dir}.gz; cat {tiny} {dir}.gz > {both}",
        modules.display()
    );
    run("sh", &["-c", &script])?;
    Ok(both)
}

fn says(text: &str, wanted: &str) -> Result<()> {
    match text.contains(wanted) {
        true => Ok(()),
        false => Err(format!("'{wanted}' is not in:\n{text}")),
    }
}

#[test]
fn linux_uses_a_disk_and_a_cd_drive() -> Result<()> {
    let scratch = Scratch::new("scsi")?;
    let (kernel, _) = tiny()?;
    let (image, disc, other) = (scratch.path("disk.qcow2"), scratch.path("one.iso"), scratch.path("two.iso"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"])?;
    for (path, text) in [(&disc, "first disc"), (&other, "second disc")] {
        let mut data = text.as_bytes().to_vec();
        data.resize(1 << 20, 0);
        std::fs::write(path, data).map_err(|e| e.to_string())?;
    }
    let more_disk = scratch.path("more.raw");
    std::fs::write(&more_disk, vec![0; 8 << 20]).map_err(|e| e.to_string())?;
    let socket = scratch.path("tty");
    let more = format!(
        "-m 256 -kernel {kernel} -initrd {} -append console=ttyS0 -serial unix:{socket},server=on,wait=off -net none \
         -device virtio-scsi-pci,id=scsi0 -drive file={image},if=none,id=d,discard=unmap \
         -device scsi-hd,drive=d,bus=scsi0.0,id=hd,serial=ABC -drive file={disc},if=none,id=c,format=raw,readonly=on \
         -device scsi-cd,drive=c,bus=scsi0.0,id=cd",
        initrd(&scratch)?
    );
    let file = scratch.path("scsi.rr");
    let record = format!("{more} -icount shift=3,rr=record,rrfile={file}");
    let mut vm = start(&scratch, "vm", &record.split_whitespace().collect::<Vec<_>>())?;
    let mut console = Console::socket(&socket)?;
    console.until("tiny guest ready", LONG)?;
    console.run("cd /extra; insmod virtio_scsi.ko; insmod cdrom.ko; insmod sr_mod.ko")?;
    let ready = "n=0; until [ -b /dev/sda ] && [ -b /dev/sr0 ]; do sleep 0.1; n=$((n+1)); [ $n -gt 100 ] && break; done";
    says(
        &console.run(&format!("{ready}; cat /sys/block/sda/size /sys/block/sda/queue/write_cache"))?,
        "131072",
    )?;
    // Written, read back past the cache, and given back.
    console.run(
        "dd if=/bin/busybox of=/dev/sda bs=64k conv=fsync 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches",
    )?;
    let same = console.run("head -c $(wc -c < /bin/busybox) /dev/sda | cmp - /bin/busybox")?;
    says(&same, "END:0")?;
    let mut qmp = vm.qmp()?;
    let used = |qmp: &mut ftvm_harness::qmp::Qmp| -> Result<u64> {
        let block = qmp.command("query-block", Value::Null)?;
        let disk =
            block.as_array().into_iter().flatten().find(|b| b["qdev"] == "hd").cloned().unwrap_or_default();
        disk["inserted"]["image"]["actual-size"].as_u64().ok_or_else(|| block.to_string())
    };
    assert!(used(&mut qmp)? > 500_000);
    says(&console.run("cat /sys/block/sda/queue/discard_max_bytes")?, "2147483136")?;
    says(&console.run("blkdiscard /dev/sda || /bin/busybox blkdiscard /dev/sda")?, "END:0")?;
    says(&console.run("head -c 1048576 /dev/sda | tr -d '\\0' | wc -c")?, "\n0\n")?;
    // The medium changes.
    says(&console.run("head -c 10 /dev/sr0")?, "first disc")?;
    qmp.command("blockdev-change-medium", json!({"id": "cd", "filename": other, "format": "raw"}))?;
    says(&console.run("head -c 11 /dev/sr0")?, "second disc")?;
    qmp.command("eject", json!({"id": "cd"}))?;
    says(&console.run("head -c 11 /dev/sr0")?, "END:1")?;
    // Another disk comes and goes; the guest hears of it by itself.
    let node = json!({"driver": "raw", "node-name": "m", "file": {"driver": "file", "filename": more_disk}});
    qmp.command("blockdev-add", node)?;
    qmp.command(
        "device_add",
        json!({"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": 9, "drive": "m", "id": "hot"}),
    )?;
    wait_for("the disk in the guest", LONG, || {
        console.run("cat /sys/block/sdb/size").ok().filter(|s| s.contains("16384"))
    })?;
    says(&console.run("echo hot | dd of=/dev/sdb bs=512 conv=sync,fsync 2>/dev/null")?, "END:0")?;
    qmp.command("device_del", json!({"id": "hot"}))?;
    qmp.wait_event("DEVICE_DELETED", LONG)?;
    qmp.command("blockdev-del", json!({"node-name": "m"}))?;
    wait_for("the disk to be gone", LONG, || {
        console.run("test ! -e /sys/block/sdb").ok().filter(|s| s.contains("END:0"))
    })?;
    assert!(std::fs::read(&more_disk).is_ok_and(|d| d.starts_with(b"hot")), "what was written is lost");
    // So does the size: the guest hears of it by itself.
    qmp.command("block_resize", json!({"device": "d", "size": 96 << 20}))?;
    wait_for("the new size", LONG, || {
        console.run("cat /sys/block/sda/size").ok().filter(|s| s.contains("196608"))
    })?;
    qmp.command("quit", Value::Null)?;
    ends_well(&mut vm)?;
    run("qemu-img", &["check", &image])?;
    // All of it once more, from the recording.
    let replay = record
        .replace("rr=record", "rr=replay")
        .replace(&format!("unix:{socket},server=on,wait=off"), "null");
    let mut vm = start(&scratch, "replay", &replay.split_whitespace().collect::<Vec<_>>())?;
    ends_well(&mut vm)?;
    says(&vm.log(), "state hashes equal")
}

#[test]
fn firmware_boots_from_the_unit_that_is_wanted() -> Result<()> {
    let scratch = Scratch::new("scsi-boot")?;
    for machine in ["pc", "q35"] {
        let (one, two) =
            (boot_sector(&scratch, "one", "first unit")?, boot_sector(&scratch, "two", "second unit")?);
        let more = format!(
            "-machine {machine} -m 64 -net none -serial file:{0} -device virtio-scsi-pci,id=scsi0 \
             -drive file={one},if=none,id=a,format=raw -device scsi-hd,drive=a,bootindex=2 \
             -drive file={two},if=none,id=b,format=raw -device scsi-hd,drive=b,scsi-id=5,lun=3,bootindex=1",
            scratch.path("serial")
        );
        let mut vm = start(&scratch, "vm", &more.split_whitespace().collect::<Vec<_>>())?;
        wait_for("the boot sector's word", LONG, || {
            std::fs::read_to_string(scratch.path("serial")).ok().filter(|s| s.contains("unit"))
        })?;
        let said = std::fs::read_to_string(scratch.path("serial")).map_err(|e| e.to_string())?;
        says(&said, "second unit")?;
        vm.kill();
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_by_name() -> Result<()> {
    let wrong = |args: &str| -> Result<String> {
        let mut all = vec!["-S", "-display", "none", "-net", "none"];
        all.extend(args.split_whitespace());
        let out = ftvm().args(all).output().map_err(|e| e.to_string())?;
        assert!(!out.status.success(), "{args}");
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    };
    says(&wrong("-device virtio-scsi-pci -device scsi-block")?, "'scsi-block'")?;
    says(&wrong("-device scsi-cd")?, "No 'SCSI' bus found for device 'scsi-cd'")?;
    says(&wrong("-device virtio-scsi-pci,id=s -device scsi-cd,bus=x.0")?, "Bus 'x.0' not found")?;
    let twice = "-device virtio-scsi-pci -device scsi-cd,scsi-id=1 -device scsi-cd,scsi-id=1";
    says(&wrong(twice)?, "lun already used")?;
    says(&wrong("-device virtio-scsi-pci -device scsi-hd")?, "drive property not set")?;
    says(&wrong("-device virtio-scsi-pci,num_queues=99")?, "num_queues")
}
