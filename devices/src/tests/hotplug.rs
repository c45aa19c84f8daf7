//! Devices that come and go, and controllers without devices.

use super::{device, Rig};
use crate::door::{GuestEvent, Input, Output, Plug};

const UP: u16 = 0xAE00;
const DOWN: u16 = 0xAE04;
const EJECT: u16 = 0xAE08;

fn plug(rig: &mut Rig, id: &str) -> u8 {
    let mut spec = device("virtio-rng-pci", &[]);
    spec.id = Some(id.into());
    let mut plug = Plug { spec, devfn: 0, drive: None, nic: None };
    plug.devfn = rig.pc.check_plug(&plug).unwrap();
    let devfn = plug.devfn;
    rig.input(Input::Plug(Box::new(plug)));
    devfn
}

#[test]
fn a_device_is_announced_used_let_go_and_its_place_is_free_again() {
    let mut rig = Rig::new();
    let devfn = plug(&mut rig, "one");
    assert_eq!(rig.config_read(devfn, 0) & 0xFFFF, 0x1AF4);
    assert_eq!(rig.inl(UP), 1 << (devfn >> 3), "the guest is told of the slot");
    assert_eq!(rig.inl(UP), 0, "once");
    rig.migrate();
    assert_eq!(rig.config_read(devfn, 0) & 0xFFFF, 0x1AF4, "it is there after a migration");

    assert!(rig.pc.check_unplug("two").is_err());
    rig.pc.check_unplug("one").unwrap();
    rig.input(Input::Unplug { id: "one".into() });
    assert_eq!(rig.inl(DOWN), 1 << (devfn >> 3));
    assert_eq!(rig.config_read(devfn, 0) & 0xFFFF, 0x1AF4, "it stays until the guest lets it go");
    rig.outl(EJECT, 1 << (devfn >> 3));
    assert_eq!(rig.config_read(devfn, 0), u32::MAX);
    assert_eq!(rig.inl(DOWN), 0);
    let deleted = |o: &Output| matches!(o, Output::Event(GuestEvent::DeviceDeleted { spec }) if spec.id.as_deref() == Some("one"));
    assert!(rig.serve().iter().any(deleted));
    rig.migrate();
    assert_eq!(plug(&mut rig, "one"), devfn, "id and place are free");
    rig.migrate();
}

#[test]
fn a_device_that_is_to_go_is_gone_after_a_reset() {
    let mut rig = Rig::new();
    let devfn = plug(&mut rig, "one");
    rig.input(Input::Unplug { id: "one".into() });
    rig.pc.reset(&rig.mem, rig.now);
    assert_eq!(rig.config_read(devfn, 0), u32::MAX);
    // What was there from the start can go too.
    rig.input(Input::Unplug { id: "nobody".into() });
    assert_eq!(rig.inl(DOWN), 0);
}

#[test]
fn places_and_names_that_are_taken_are_refused() {
    let mut rig = Rig::new();
    plug(&mut rig, "one");
    let mut again = Plug { spec: device("virtio-rng-pci", &[]), devfn: 0, drive: None, nic: None };
    again.spec.id = Some("one".into());
    assert!(rig.pc.check_plug(&again).unwrap_err().to_string().contains("Duplicate device ID"));
    again.spec = device("virtio-rng-pci", &[("addr", "4")]);
    assert!(rig.pc.check_plug(&again).unwrap_err().to_string().contains("in use"));
    again.spec = device("isa-debugcon", &[]);
    assert!(rig.pc.check_plug(&again).unwrap_err().to_string().contains("does not support hotplugging"));
}

#[test]
fn the_xhci_command_ring_answers_though_nothing_is_connected() {
    const BAR: u64 = 0xE000_0000;
    let mut rig = Rig::new();
    rig.config_write(9 << 3, 0x10, BAR as u32);
    rig.config_write(9 << 3, 0x14, 0);
    rig.config_write(9 << 3, 0x04, 6);
    assert_eq!(rig.read32(BAR + 4) >> 24, 8, "ports");
    assert_eq!(rig.read32(BAR + 0x440), 0x2A0, "an empty port with power");
    // The event ring of 16 entries at 0x3000, its table at 0x2000; the command ring at 0x1000.
    rig.mem.write(0x2000, &0x3000u64.to_le_bytes()).unwrap();
    rig.mem.write(0x2008, &16u32.to_le_bytes()).unwrap();
    rig.write32(BAR + 0x1028, 1);
    rig.write32(BAR + 0x1030, 0x2000);
    rig.write32(BAR + 0x1034, 0);
    rig.write32(BAR + 0x58, 0x1001);
    rig.write32(BAR + 0x5C, 0);
    for (i, kind) in [23u32, 9].into_iter().enumerate() {
        rig.mem.write(0x1000 + 16 * i as u64 + 12, &(kind << 10 | 1).to_le_bytes()).unwrap();
    }
    rig.write32(BAR + 0x40, 1);
    assert_eq!(rig.read32(BAR + 0x44) & 1, 0, "it runs");
    rig.write32(BAR + 0x2000, 0);
    let mut event = [0u8; 32];
    rig.mem.read(0x3000, &mut event).unwrap();
    assert_eq!(event[0..2], [0x00, 0x10], "the first command");
    assert_eq!(event[11], 1, "a no-op succeeds");
    assert_eq!(event[12..14], [1, 33 << 2], "a command completion in this cycle");
    assert_eq!(event[27], 9, "there is no slot");
    assert_eq!(rig.read32(BAR + 0x44) & 8, 8);
    rig.migrate();
    assert_eq!(rig.read32(BAR + 0x44) & 8, 8);
}

#[test]
fn a_state_fits_a_machine_that_has_from_its_start_what_was_plugged_in_on_the_way() {
    let mut rig = Rig::new();
    let (one, two) = (plug(&mut rig, "one"), plug(&mut rig, "two"));
    // "one" goes again; a driver has set up "two".
    rig.input(Input::Unplug { id: "one".into() });
    rig.outl(EJECT, 1 << (one >> 3));
    rig.config_write(two, 0x3C, 0x0B);
    let saved = rig.pc.save();

    // The destination's command line has "two", at its address, and never had "one".
    let mut config = rig.config.clone();
    let mut spec = device("virtio-rng-pci", &[("addr", &(two >> 3).to_string())]);
    spec.id = Some("two".into());
    config.devices.push(spec);
    let mut there = Rig::of(config);
    there.pc.load(&saved).unwrap();
    assert_eq!(there.config_read(two, 0x3C) & 0xFF, 0x0B);
    assert_eq!(there.config_read(one, 0), u32::MAX);
    assert_eq!(there.pc.next_deadline(), rig.pc.next_deadline(), "timers are with their devices");
    let (here, there) = (rig.pc.device_hashes(), there.pc.device_hashes());
    let lost = |name: &str| name.starts_with("gone@") || name == "board" || name == "fw_cfg";
    for (name, hash) in here.iter().filter(|(name, _)| !lost(name)) {
        assert!(there.iter().any(|(n, h)| n == name && h == hash), "{name} differs");
    }

    // A machine that has never heard of "two" gets it; one that has more is refused.
    let mut without = Rig::new();
    without.pc.load(&saved).unwrap();
    assert_eq!(without.config_read(two, 0x3C) & 0xFF, 0x0B);
    let mut config = Rig::new().config;
    let mut spec = device("virtio-balloon-pci", &[]);
    spec.id = Some("more".into());
    config.devices.push(spec);
    let e = Rig::of(config).pc.load(&Rig::new().pc.save()).unwrap_err().to_string();
    assert!(e.contains("is missing"), "{e}");
}
