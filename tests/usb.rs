//! USB devices and a sound card come and go while Linux runs, behind controllers of USB 3, 1 and 2.

mod common;

use common::*;
use ftvm_harness::guests::generic;
use ftvm_harness::libvirt::Console;
use ftvm_harness::qmp::Qmp;
use ftvm_harness::{wait_for, Result, Scratch};
use serde_json::json;

/// Wait until a command in the guest prints something.
fn until(line: &mut Console, command: &str, wanted: &str) -> Result<()> {
    let mut last = String::new();
    wait_for(&format!("'{wanted}' from '{command}'"), LONG, || {
        last = line.run(command).unwrap_or_else(|e| e);
        last.contains(wanted).then_some(())
    })
    .map_err(|e| format!("{e}; it says\n{last}"))
}

fn error(qmp: &mut Qmp, command: &str, arguments: serde_json::Value) -> String {
    qmp.command(command, arguments).err().unwrap_or_default()
}

/// What the guest counts of input devices and disks behind USB.
const COUNT: &str =
    "echo has $(grep -c 'QEMU USB' /proc/bus/input/devices) $(ls -d /sys/block/sd* 2>/dev/null | wc -l)";

#[test]
fn usb_devices_and_a_sound_card_come_and_go() -> Result<()> {
    let scratch = Scratch::new("usb")?;
    let (kernel, initrd) = generic()?;
    let (socket, file) = (scratch.path("tty"), scratch.path("usb.rr"));
    let more = format!(
        "-m 256 -kernel {kernel} -initrd {initrd} -net none -serial unix:{socket},server=on,wait=off \
         -device qemu-xhci,id=three -device piix3-usb-uhci,id=one -device usb-tablet,bus=one.0,id=first \
         -device ich9-usb-ehci1,id=two,addr=b.7 \
         -device ich9-usb-uhci1,masterbus=two.0,firstport=0,multifunction=on,addr=b.0"
    );
    let replayed = long("the same from a recording");
    let more = if replayed { format!("{more} -icount shift=3,rr=record,rrfile={file}") } else { more };
    let mut args: Vec<&str> = more.split_whitespace().collect();
    let words =
        "console=ttyS0 load=xhci-pci,ehci-pci,uhci-hcd,usbhid,hid-generic,evdev,usb-storage,snd-hda-intel";
    args.extend(["-append", words]);
    let mut vm = start(&scratch, "vm", &args)?;
    let mut qmp = vm.qmp()?;
    let mut line = Console::socket(&socket)?;
    line.until("tiny guest ready", LONG)?;
    until(&mut line, COUNT, "has 1 0")?;
    for (bus, driver) in [("three.0", "usb-kbd"), ("one.0", "usb-mouse"), ("two.0", "usb-tablet")] {
        let image = scratch.path(bus);
        let mut data = format!("behind {bus}").into_bytes();
        data.resize(4 << 20, 0);
        std::fs::write(&image, data).map_err(|e| e.to_string())?;
        qmp.command("device_add", json!({"driver": driver, "id": "in", "bus": bus}))?;
        if bus == "one.0" {
            // It has two ports, and both are taken.
            let full = error(&mut qmp, "device_add", json!({"driver": "usb-kbd", "id": "x", "bus": bus}));
            assert!(full.contains("to a bus with no free ports"), "{full}");
            qmp.command("device_del", json!({"id": "first"}))?;
            qmp.wait_event("DEVICE_DELETED", LONG)?;
        }
        let node =
            json!({"driver": "raw", "node-name": "stick", "file": {"driver": "file", "filename": image}});
        qmp.command("blockdev-add", node)?;
        let stick =
            json!({"driver": "usb-storage", "id": "stick", "bus": bus, "drive": "stick", "removable": true});
        qmp.command("device_add", stick)?;
        until(&mut line, COUNT, if bus == "three.0" { "has 2 1" } else { "has 1 1" })?;
        until(&mut line, "head -c 13 /dev/sd?", &format!("behind {}", &bus[..5]))?;
        assert!(line.run("cat /sys/block/sd?/removable")?.contains("\n1\n"));
        let copy = "dd if=/bin/busybox of=/dev/sd? bs=4k seek=1 count=200 conv=fsync; echo 3 > /proc/sys/vm/drop_caches; \
                    head -c 819200 /bin/busybox > /tmp/f; tail -c +4097 /dev/sd? | head -c 819200 | cmp - /tmp/f && echo the same";
        let copy = copy.replace("/dev/sd?", "$(ls /dev/sd?)");
        let seen = line.run(&copy)?;
        assert!(seen.contains("\nthe same\n"), "{seen}");
        let usb = qmp.command("human-monitor-command", json!({"command-line": "info usb"}))?;
        assert!(usb.as_str().is_some_and(|t| t.contains("ID: stick") && t.contains("ID: in")), "{usb}");
        for id in ["stick", "in"] {
            qmp.command("device_del", json!({"id": id}))?;
            let event = qmp.wait_event("DEVICE_DELETED", LONG)?;
            assert_eq!(event["data"]["device"], id);
        }
        qmp.command("blockdev-del", json!({"node-name": "stick"}))?;
        until(&mut line, COUNT, if bus == "three.0" { "has 1 0" } else { "has 0 0" })?;
    }
    let refused = error(&mut qmp, "device_add", json!({"driver": "usb-tablet", "bus": "two.0", "port": "5"}));
    assert!(refused.contains("needs a companion"), "{refused}");

    // The sound card is a PCI device; its bus takes no codecs later, as with QEMU.
    qmp.command("device_add", json!({"driver": "intel-hda", "id": "sound"}))?;
    until(&mut line, "cat /proc/interrupts; ls /sys/bus/pci/drivers/snd_hda_intel", "0000:00:")?;
    let refused = error(&mut qmp, "device_add", json!({"driver": "hda-duplex", "bus": "sound.0"}));
    assert!(refused.contains("Bus 'sound.0' does not support hotplugging"), "{refused}");
    qmp.command("device_del", json!({"id": "sound"}))?;
    assert_eq!(qmp.wait_event("DEVICE_DELETED", LONG)?["data"]["device"], "sound");
    qmp.command("quit", json!({}))?;
    ends_well(&mut vm)?;
    if !replayed {
        return Ok(());
    }
    // All of it once more, from the recording.
    let args: Vec<String> = args
        .iter()
        .map(|a| {
            a.replace("rr=record", "rr=replay").replace(&format!("unix:{socket},server=on,wait=off"), "null")
        })
        .collect();
    let mut vm = start(&scratch, "replay", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    ends_well(&mut vm)?;
    assert!(vm.log().contains("state hashes equal"), "{}", vm.log());
    Ok(())
}

/// SeaBIOS finds a disk behind USB, where the boot order wants it.
#[test]
fn firmware_boots_from_a_usb_disk() -> Result<()> {
    let scratch = Scratch::new("usb-boot")?;
    let (one, two) =
        (boot_sector(&scratch, "one", "first disk")?, boot_sector(&scratch, "two", "second disk")?);
    for controller in ["qemu-xhci", "piix3-usb-uhci"] {
        let serial = scratch.path(controller);
        let more = format!(
            "-m 64 -net none -serial file:{serial} -device {controller},id=usb \
             -drive file={one},if=none,id=a,format=raw -device usb-storage,drive=a,bootindex=2 \
             -drive file={two},if=none,id=b,format=raw -device usb-storage,drive=b,bootindex=1"
        );
        let mut vm = start(&scratch, "vm", &more.split_whitespace().collect::<Vec<_>>())?;
        let said = wait_for("the boot sector's word", LONG, || {
            std::fs::read_to_string(&serial).ok().filter(|s| s.contains("disk"))
        })?;
        assert!(said.contains("second disk"), "{controller}: {said}");
        vm.kill();
    }
    Ok(())
}
