//! Devices behind the controllers of USB 1 and 2, as a driver talks to them.

use super::{device, full_config, Rig};
use crate::config::PcConfig;
use crate::door::{GuestEvent, Input, Output, Plug};
use crate::pc::Pc;
use ftvm_accel::mem::GuestMemory;

const IO: u16 = 0xC000;
/// The schedule: the frame list, a queue, and transfer descriptors of 32 bytes with their data.
const LIST: u64 = 0x1_0000;
const QUEUE: u64 = 0x1_2000;
const TDS: u64 = 0x1_3000;
const DATA: u64 = 0x1_4000;
const FRAME: u64 = 1_000_000;

fn machine(devices: &[crate::config::DeviceSpec]) -> PcConfig {
    let mut config = full_config();
    config.devices.retain(|d| d.driver != "piix3-usb-uhci" && d.driver != "qemu-xhci");
    config.devices.extend(devices.iter().cloned());
    config
}

fn with_id(driver: &str, id: &str, properties: &[(&str, &str)]) -> crate::config::DeviceSpec {
    let mut spec = device(driver, properties);
    spec.id = Some(id.into());
    spec
}

/// Map a controller, enable its first port, and let the schedule run.
fn start(r: &mut Rig, devfn: u8) {
    r.config_write(devfn, 0x20, u32::from(IO));
    r.config_write(devfn, 4, 5);
    for frame in 0..1024 {
        r.put(LIST + 4 * frame, &(QUEUE as u32 | 2).to_le_bytes());
    }
    r.put(QUEUE, &1u32.to_le_bytes());
    r.put(QUEUE + 4, &1u32.to_le_bytes());
    assert_eq!(r.inw(IO + 0x10) & 3, 3, "connected, and that is new");
    r.outw(IO + 0x10, 0x202);
    r.outw(IO + 0x10, 0);
    r.outw(IO + 0x10, 4);
    assert_eq!(r.inw(IO + 0x10) & 0x207, 5, "enabled");
    r.outl(IO + 8, LIST as u32);
    r.outw(IO + 4, 15);
    r.outw(IO, 0xC1);
}

/// Queue packets (kind, toggle, data or length), and run a frame; the control words.
fn packets(r: &mut Rig, address: u32, endpoint: u32, list: &[(u32, &[u8], usize)]) -> Vec<u32> {
    for (n, (kind, data, len)) in list.iter().enumerate() {
        let (at, buffer) = (TDS + 32 * n as u64, DATA + 64 * n as u64);
        r.put(buffer, data);
        let last = n + 1 == list.len();
        let link = if last { 1 } else { (at as u32 + 32) | 4 };
        let control = 3 << 27 | 1 << 23 | if last { 1 << 24 } else { 0 };
        let token = (*len as u32).wrapping_sub(1) << 21 | endpoint << 15 | address << 8 | kind;
        for (i, word) in [link, control, token, buffer as u32].into_iter().enumerate() {
            r.put(at + 4 * i as u64, &word.to_le_bytes());
        }
    }
    r.put(QUEUE + 4, &(TDS as u32).to_le_bytes());
    r.pass(FRAME);
    (0..list.len()).map(|n| u32::from_le_bytes(r.get(TDS + 32 * n as u64 + 4))).collect()
}

const SETUP: u32 = 0x2D;
const IN: u32 = 0x69;
const OUT: u32 = 0xE1;

fn a_tablet_is_asked(r: &mut Rig, devfn: u8) {
    start(r, devfn);
    let ask = [0x80, 6, 0, 1, 0, 0, 64, 0];
    let done = packets(r, 0, 0, &[(SETUP, &ask, 8), (IN, &[], 64), (OUT, &[], 0)]);
    assert_eq!(done.iter().map(|c| c >> 16 & 0xFF).collect::<Vec<_>>(), [0, 0, 0], "{done:x?}");
    assert_eq!(done[1] & 0x7FF, 17, "18 bytes");
    assert_eq!(r.get::<12>(DATA + 64), [18, 1, 0, 2, 0, 0, 0, 64, 0x27, 6, 1, 0]);
    assert_eq!(r.inw(IO + 2) & 1, 1, "an interrupt on completion");
    r.outw(IO + 2, 1);
    // An address, a configuration; then the old address answers no more.
    packets(r, 0, 0, &[(SETUP, &[0, 5, 7, 0, 0, 0, 0, 0], 8), (IN, &[], 0)]);
    let done = packets(r, 7, 0, &[(SETUP, &[0, 9, 1, 0, 0, 0, 0, 0], 8), (IN, &[], 0)]);
    assert_eq!(done[1] >> 16 & 0xFF, 0);
    let lost = packets(r, 0, 0, &[(SETUP, &ask, 8)]);
    assert_eq!(lost[0] >> 16 & 0xC4, 0x84, "nobody answers, and it is tried again");
    r.pass(2 * FRAME);
    let given_up = u32::from_le_bytes(r.get(TDS + 4));
    assert_eq!(given_up >> 16 & 0xC4, 0x44, "three times");
    assert_eq!(r.inw(IO + 2) & 2, 2);
    r.outw(IO + 2, 3);
    // A request that it does not know stalls.
    let done = packets(r, 7, 0, &[(SETUP, &[0x80, 6, 0, 6, 0, 0, 10, 0], 8), (IN, &[], 10)]);
    assert_eq!(done[1] >> 16 & 0xFF, 0x40);
    r.outw(IO + 2, 3);
    // A report waits for the pointer, over a migration too.
    let waiting = packets(r, 7, 1, &[(IN, &[], 8)]);
    assert_eq!(waiting[0] >> 16 & 0xFF, 0x88, "nothing to say");
    r.migrate();
    r.input(Input::Pointer { x: Some(0x1234), y: Some(5), dx: 0, dy: 0, wheel: 0, press: 1, release: 0 });
    r.pass(FRAME);
    assert_eq!(r.get::<6>(DATA), [1, 0x34, 0x12, 5, 0, 0]);
    assert_eq!(u32::from_le_bytes(r.get(TDS + 4)) & 0x80_07FF, 5);
    assert_eq!(r.get::<4>(QUEUE + 4), 1u32.to_le_bytes(), "the queue is empty");
    r.migrate();
    // A packet of no known kind stops the controller.
    packets(r, 7, 1, &[(0x55, &[], 8)]);
    assert_eq!(r.inw(IO + 2) & 0x30, 0x30);
}

#[test]
fn a_tablet_behind_a_uhci_controller() {
    let mut r = Rig::of(machine(&[device("piix3-usb-uhci", &[("addr", "1.2")]), device("usb-tablet", &[])]));
    a_tablet_is_asked(&mut r, 1 << 3 | 2);
}

#[test]
fn a_tablet_on_a_bus_of_usb_2_is_its_companions() {
    let companions = |n: u8| {
        let (name, first) = (format!("ich9-usb-uhci{}", n + 1), (2 * n).to_string());
        let addr = format!("b.{n}");
        device(
            &name,
            &[("masterbus", "usb.0"), ("firstport", &first), ("addr", &addr), ("multifunction", "on")],
        )
    };
    let bus = |tablet| {
        machine(&[
            with_id("ich9-usb-ehci1", "usb", &[("addr", "b.7")]),
            companions(0),
            companions(1),
            companions(2),
            tablet,
        ])
    };
    // libvirt's way: port 3 is the second companion's first.
    let mut r = Rig::of(bus(device("usb-tablet", &[("bus", "usb.0"), ("port", "3")])));
    const BAR: u64 = 0xE800_0000;
    r.config_write(0xB << 3 | 7, 0x10, BAR as u32);
    r.config_write(0xB << 3 | 7, 4, 6);
    assert_eq!(r.read32(BAR + 4), 0x3206, "six ports, three companions of two");
    r.write32(BAR + 0x60, 1);
    r.write32(BAR + 0x20, 0x21);
    assert_eq!(r.read32(BAR + 0x24) & 0x9000, 0x8000, "runs");
    r.write32(BAR + 0x28, 0x20);
    r.write32(BAR + 0x20, 0x61);
    assert_eq!(
        (r.read32(BAR + 0x24) & 0x20, r.read32(BAR + 0x20) & 0x40),
        (0x20, 0),
        "the doorbell is answered"
    );
    r.write32(BAR + 0x24, 0x20);
    assert!((0..6).all(|n| r.read32(BAR + 0x64 + 4 * n) == 0x3000), "all ports are the companions'");
    r.pass(1100 * FRAME);
    assert_eq!(r.read32(BAR + 0x24) & 8, 8, "the frame list began anew");
    a_tablet_is_asked(&mut r, 0xB << 3 | 1);

    let alone = machine(&[with_id("usb-ehci", "usb", &[]), device("usb-tablet", &[])]);
    let mem = GuestMemory::new(alone.ram_size).unwrap();
    let refused = Pc::new(alone, &mem).err().unwrap().to_string();
    assert!(refused.contains("needs a companion"), "{refused}");
}

/// A command block wrapper.
fn command(tag: u8, len: u32, reads: bool, cdb: &[u8]) -> Vec<u8> {
    let mut block = b"USBC".to_vec();
    block.extend([tag, 0, 0, 0]);
    block.extend(len.to_le_bytes());
    block.extend([if reads { 0x80 } else { 0 }, 0, cdb.len() as u8]);
    block.extend(cdb);
    block.resize(31, 0);
    block
}

/// The status that comes behind a command: its residue and whether it failed.
fn status(r: &mut Rig, tag: u8) -> (u32, u8) {
    let done = packets(r, 5, 1, &[(IN, &[], 64)]);
    assert_eq!(done[0] >> 16 & 0xFF, 0, "the status is there");
    let s = r.get::<13>(DATA);
    assert_eq!((&s[..4], s[4]), (&b"USBS"[..], tag));
    (u32::from_le_bytes([s[8], s[9], s[10], s[11]]), s[12])
}

#[test]
fn a_disk_comes_into_a_port_and_goes() {
    let devfn = 1 << 3 | 2;
    let mut r = Rig::of(machine(&[with_id("piix3-usb-uhci", "usb", &[("addr", "1.2")])]));
    r.config_write(devfn, 0x20, u32::from(IO));
    r.config_write(devfn, 4, 5);
    assert_eq!(r.inw(IO + 0x10) & 3, 0, "the port is empty");
    let spec = |id: &str, port: &str| {
        let mut spec = with_id("usb-storage", id, &[("serial", "ABC"), ("removable", "on"), ("port", port)]);
        spec.drive = Some(0);
        spec
    };
    let disk = r.config.drives[0].clone();
    let mut plug = Plug { spec: spec("stick", "3"), devfn: 0, drive: Some(disk), nic: None };
    assert!(r.pc.check_plug(&plug).unwrap_err().to_string().contains("usb port 3 (bus usb.0) not found"));
    plug.spec = spec("stick", "1");
    assert_eq!(r.pc.check_plug(&plug).unwrap(), 1);
    r.input(Input::Plug(Box::new(plug.clone())));
    assert!(r.pc.check_plug(&plug).unwrap_err().to_string().contains("Duplicate"));
    plug.spec = spec("other", "1");
    assert!(r.pc.check_plug(&plug).unwrap_err().to_string().contains("in use"));
    start(&mut r, devfn);
    packets(&mut r, 0, 0, &[(SETUP, &[0, 5, 5, 0, 0, 0, 0, 0], 8), (IN, &[], 0)]);
    packets(&mut r, 5, 0, &[(SETUP, &[0, 9, 1, 0, 0, 0, 0, 0], 8), (IN, &[], 0)]);
    packets(&mut r, 5, 0, &[(SETUP, &[0x80, 6, 0, 2, 0, 0, 64, 0], 8), (IN, &[], 64), (OUT, &[], 0)]);
    let config = r.get::<32>(DATA + 64);
    assert_eq!(
        (config[2], &config[14..17], &config[18..23]),
        (32, &[8, 6, 0x50][..], &[7, 5, 0x81, 2, 64][..])
    );
    // INQUIRY: the medium can be removed.
    packets(&mut r, 5, 2, &[(OUT, &command(1, 36, true, &[0x12, 0, 0, 0, 36, 0]), 31)]);
    packets(&mut r, 5, 1, &[(IN, &[], 64)]);
    assert_eq!(r.get::<16>(DATA)[..16], *b"\x00\x80\x05\x12\x1f\0\0\x12QEMU    ");
    assert_eq!(status(&mut r, 1), (0, 0));
    // What is read waits for the disk, over a migration.
    packets(&mut r, 5, 2, &[(OUT, &command(2, 512, true, &[0x28, 0, 0, 0, 0, 3, 0, 0, 1, 0]), 31)]);
    let eight: Vec<(u32, &[u8], usize)> = vec![(IN, &[], 64); 8];
    assert_eq!(packets(&mut r, 5, 1, &eight)[0] >> 16 & 0xFF, 0x88, "nothing yet");
    r.migrate();
    r.serve();
    r.pass(2 * FRAME);
    assert_eq!(r.get::<512>(DATA)[..], r.disks[0][3 * 512..4 * 512]);
    assert_eq!(status(&mut r, 2), (0, 0));
    // What is written is there when the status is.
    packets(&mut r, 5, 2, &[(OUT, &command(3, 512, false, &[0x2A, 0, 0, 0, 0, 4, 0, 0, 1, 0]), 31)]);
    let new: Vec<u8> = (0..512).map(|i| (i * 3) as u8).collect();
    let parts: Vec<(u32, &[u8], usize)> = new.chunks(64).map(|c| (OUT, c, 64)).collect();
    packets(&mut r, 5, 2, &parts);
    assert_eq!(packets(&mut r, 5, 1, &[(IN, &[], 64)])[0] >> 16 & 0xFF, 0x88, "no status yet");
    r.migrate();
    r.serve();
    r.pass(2 * FRAME);
    assert_eq!(r.get::<13>(DATA)[12], 0);
    assert_eq!(r.disks[0][4 * 512..5 * 512], new);
    // What cannot be read is zeros, and the reason is asked for.
    packets(&mut r, 5, 2, &[(OUT, &command(4, 512, true, &[0x28, 0, 9, 0, 0, 0, 0, 0, 1, 0]), 31)]);
    packets(&mut r, 5, 1, &eight);
    assert_eq!(r.get::<512>(DATA), [0; 512]);
    assert_eq!(status(&mut r, 4), (512, 1));
    packets(&mut r, 5, 2, &[(OUT, &command(5, 18, true, &[3, 0, 0, 0, 18, 0]), 31)]);
    packets(&mut r, 5, 1, &[(IN, &[], 64)]);
    let sense = r.get::<18>(DATA);
    assert_eq!((sense[2], sense[12]), (5, 0x21));
    assert_eq!(status(&mut r, 5), (0, 0));
    // No command at all.
    assert_eq!(packets(&mut r, 5, 2, &[(OUT, &[7; 31], 31)])[0] >> 16 & 0xFF, 0x40);
    r.outw(IO + 2, 3);
    r.serve();
    r.pc.check_unplug("stick").unwrap();
    r.input(Input::Unplug { id: "stick".into() });
    assert_eq!(r.inw(IO + 0x10) & 15, 2 | 8, "gone, and enabled no more; both are new");
    let deleted = |o: &Output| matches!(o, Output::Event(GuestEvent::DeviceDeleted { spec }) if spec.id.as_deref() == Some("stick"));
    assert!(r.serve().iter().any(deleted));
    assert!(r.pc.check_unplug("stick").is_err());
    r.migrate();
    assert_eq!(r.pc.check_plug(&plug).unwrap(), 1, "the port is free");
}

#[test]
fn devices_stay_in_their_ports_when_others_go() {
    let all = [
        with_id("qemu-xhci", "x", &[("addr", "9")]),
        with_id("usb-tablet", "t", &[]),
        with_id("usb-kbd", "k", &[]),
        with_id("usb-mouse", "m", &[("port", "4")]),
    ];
    let mut r = Rig::of(machine(&all));
    const BAR: u64 = 0xE000_0000;
    r.config_write(9 << 3, 0x10, BAR as u32);
    r.config_write(9 << 3, 4, 6);
    let connected = |r: &mut Rig| [0, 1, 2, 3].map(|n| r.read32(BAR + 0x440 + 16 * n) & 1);
    assert_eq!(connected(&mut r), [1, 1, 0, 1]);
    r.input(Input::Unplug { id: "t".into() });
    assert_eq!(connected(&mut r), [0, 1, 0, 1]);
    assert_eq!(r.read32(BAR + 0x440), 0x2_02A0, "the change is noted");
    r.migrate();
    assert_eq!(connected(&mut r), [0, 1, 0, 1]);
    let plug = Plug { spec: with_id("usb-tablet", "t", &[]), devfn: 0, drive: None, nic: None };
    assert_eq!(r.pc.check_plug(&plug).unwrap(), 1, "the first that is free");
    // The whole controller goes, and what is behind it with it.
    r.input(Input::Unplug { id: "x".into() });
    r.outl(0xAE08, 1 << 9);
    let gone: Vec<String> = r
        .serve()
        .into_iter()
        .filter_map(|o| match o {
            Output::Event(GuestEvent::DeviceDeleted { spec }) => spec.id,
            _ => None,
        })
        .collect();
    assert_eq!(gone, ["t", "k", "m", "x"]);
    assert!(r.pc.check_plug(&plug).unwrap_err().to_string().contains("No 'usb-bus' bus found"));
    r.migrate();
    // It comes back, and so do devices.
    let mut plug = Plug { spec: with_id("qemu-xhci", "x", &[]), devfn: 0, drive: None, nic: None };
    plug.devfn = r.pc.check_plug(&plug).unwrap();
    let slot = plug.devfn;
    r.input(Input::Plug(Box::new(plug)));
    let spec = with_id("usb-kbd", "k", &[("bus", "x.0"), ("port", "2")]);
    let plug = Plug { spec, devfn: 2, drive: None, nic: None };
    assert_eq!(r.pc.check_plug(&plug).unwrap(), 2);
    r.input(Input::Plug(Box::new(plug)));
    r.migrate();
    r.config_write(slot, 0x10, BAR as u32);
    r.config_write(slot, 4, 6);
    assert_eq!(connected(&mut r), [0, 1, 0, 0]);
}
