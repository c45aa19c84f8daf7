use super::disks::LegacyQueue;
use super::*;
use crate::door::{GuestEvent, Plug};

const REQUEST: u64 = 0x4000;
const RESPONSE: u64 = 0x5000;
const DATA: u64 = 0x6000;
const HOST: u8 = 0x60;

/// Status, response, sense key and code, bytes not transferred.
type Answer = (u8, u8, (u8, u8), u32);

struct Host(LegacyQueue);

impl Host {
    fn start(r: &mut Rig) -> Host {
        Host(LegacyQueue::start(r, HOST, 0xD000, 2))
    }

    fn request(r: &mut Rig, target: u8, lun: u16, cdb: &[u8]) {
        let mut request = vec![1, target, (lun >> 8) as u8 | 0x40, lun as u8, 0, 0, 0, 0];
        request.extend(7u64.to_le_bytes());
        request.extend([0; 3]);
        request.extend(cdb);
        request.resize(51, 0);
        r.mem.write(REQUEST, &request).unwrap();
        r.mem.write(RESPONSE, &[0xEE; 108]).unwrap();
    }

    /// A command that answers with up to `room` bytes.
    fn read(&mut self, r: &mut Rig, place: (u8, u16), cdb: &[u8], room: u32) -> (Answer, Vec<u8>) {
        Host::request(r, place.0, place.1, cdb);
        r.mem.write(DATA, &vec![0xEE; room as usize]).unwrap();
        self.0.put(r, 2, &[(REQUEST, 51, false), (RESPONSE, 108, true), (DATA, room.max(1), true)]);
        r.serve();
        let answer = Host::answer(r);
        let mut data = vec![0; (room - answer.3.min(room)) as usize];
        r.mem.read(DATA, &mut data).unwrap();
        (answer, data)
    }

    fn write(&mut self, r: &mut Rig, place: (u8, u16), cdb: &[u8], data: &[u8]) -> Answer {
        Host::request(r, place.0, place.1, cdb);
        r.mem.write(DATA, data).unwrap();
        self.0.put(r, 2, &[(REQUEST, 51, false), (DATA, data.len() as u32, false), (RESPONSE, 108, true)]);
        r.serve();
        Host::answer(r)
    }

    fn answer(r: &Rig) -> Answer {
        let mut b = [0; 108];
        r.mem.read(RESPONSE, &mut b).unwrap();
        (b[10], b[11], (b[14], b[24]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]))
    }
}

const FINE: (u8, u8) = (0, 0);

#[test]
fn a_scan_finds_the_units_and_what_they_are() {
    let mut r = Rig::new();
    let mut h = Host::start(&mut r);
    let (a, luns) = h.read(&mut r, (0, 0), &[0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 64], 64);
    assert_eq!(((a.0, a.1), luns.len()), (FINE, 16));
    let (_, luns) = h.read(&mut r, (4, 0), &[0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 64], 64);
    assert_eq!((luns[3], luns[17]), (16, 1));
    let (_, disk) = h.read(&mut r, (0, 0), &[0x12, 0, 0, 0, 36], 36);
    assert_eq!((disk[0], &disk[8..15], &disk[16..29]), (0, &b"QEMU   "[..], &b"QEMU HARDDISK"[..]));
    let (_, cd) = h.read(&mut r, (4, 1), &[0x12, 0, 0, 0, 36], 36);
    assert_eq!((cd[0], cd[1]), (5, 0x80));
    let (_, none) = h.read(&mut r, (4, 0), &[0x12, 0, 0, 0, 36], 36);
    assert_eq!(none[0], 0x7F);
    assert_eq!(h.read(&mut r, (4, 0), &[0; 6], 0).0 .2, (5, 0x25));
    assert_eq!(h.read(&mut r, (9, 0), &[0; 6], 0).0 .1, 3, "there is no target 9");
    let (_, id) = h.read(&mut r, (0, 0), &[0x12, 1, 0x83, 0, 64], 64);
    assert_eq!(&id[4..10], [2, 0, 0, 2, b'S', b'3']);
    assert_eq!(&id[10..22], [1, 3, 0, 8, 0x50, 0, 0xC5, 0, 0x15, 0xEA, 0x71, 0xAC]);
    let (_, size) = h.read(&mut r, (0, 0), &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
    assert_eq!(size, [0, 0, 7, 0xFF, 0, 0, 2, 0]);
    let (_, size) = h.read(&mut r, (0, 0), &[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
    assert_eq!((size[6], size[7], size[14]), (7, 0xFF, 0x80));
    let (_, size) = h.read(&mut r, (4, 1), &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
    assert_eq!(size, [0, 0, 1, 0xFF, 0, 0, 8, 0]);
    assert_eq!(h.read(&mut r, (0, 0), &[0x4D, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8).0 .2, (5, 0x20));
}

#[test]
fn a_disk_reads_and_writes_and_survives_migration() {
    let mut r = Rig::new();
    let mut h = Host::start(&mut r);
    // READ (6), (10), (16) of two blocks.
    let cdbs: [&[u8]; 3] = [
        &[8, 0, 0, 5, 2, 0],
        &[0x28, 0, 0, 0, 0, 5, 0, 0, 2, 0],
        &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0],
    ];
    for cdb in cdbs {
        let (a, data) = h.read(&mut r, (0, 0), cdb, 1024);
        assert_eq!((a, &data), ((0, 0, (0, 0), 0), &r.disks[3][5 * 512..7 * 512].to_vec()));
    }
    // In flight over a migration.
    Host::request(&mut r, 0, 0, cdbs[1]);
    h.0.put(&mut r, 2, &[(REQUEST, 51, false), (RESPONSE, 108, true), (DATA, 1024, true)]);
    assert_eq!(r.pc.pending_disk().len(), 1);
    r.migrate();
    r.serve();
    assert_eq!(Host::answer(&r), (0, 0, (0, 0), 0));
    let data = vec![0x5A; 1024];
    assert_eq!(h.write(&mut r, (0, 0), &[0x2A, 0, 0, 0, 0, 9, 0, 0, 2, 0], &data), (0, 0, (0, 0), 0));
    assert_eq!(r.disks[3][9 * 512..11 * 512], data);
    // Past the end; more than was sent; a read-only medium.
    assert_eq!(h.read(&mut r, (0, 0), &[0x28, 0, 0, 0, 7, 0xFF, 0, 0, 2, 0], 1024).0 .2, (5, 0x21));
    assert_eq!(h.write(&mut r, (0, 0), &[0x2A, 0, 0, 0, 0, 9, 0, 0, 9, 0], &data).2, (5, 0x24));
    assert_eq!(h.write(&mut r, (4, 1), &[0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 2048]).2, (7, 0x27));
    let (_, data) = h.read(&mut r, (4, 1), &[0xA8, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0], 4096);
    assert_eq!(data, r.disks[4][3 * 2048..5 * 2048]);
}

#[test]
fn writes_through_are_flushed_before_they_end() {
    let mut r = Rig::new();
    let mut h = Host::start(&mut r);
    let page = |r: &mut Rig, h: &mut Host| h.read(r, (0, 0), &[0x1A, 8, 8, 0, 64], 64).1[4..7].to_vec();
    assert_eq!(page(&mut r, &mut h), [8, 18, 4]);
    let mut list = vec![0, 0, 0, 0, 8, 18, 0];
    list.resize(24, 0);
    assert_eq!(h.write(&mut r, (0, 0), &[0x15, 0x10, 0, 0, 24], &list).0, 0);
    assert_eq!(page(&mut r, &mut h), [8, 18, 0]);
    Host::request(&mut r, 0, 0, &[0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    h.0.put(&mut r, 2, &[(REQUEST, 51, false), (DATA, 512, false), (RESPONSE, 108, true)]);
    let out = r.pc.take_outputs();
    let Output::Disk { id, op: DiskOp::Write { .. }, .. } = out[0] else { panic!("{out:?}") };
    r.input(Input::DiskDone { id, result: Ok(Vec::new()) });
    let before = h.0.used(&r);
    assert!(matches!(&r.pc.pending_disk()[..], [Output::Disk { op: DiskOp::Flush, .. }]));
    r.serve();
    assert_eq!(h.0.used(&r), before + 1);
    // UNMAP of four blocks.
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(8u64.to_be_bytes());
    list.extend([0, 0, 0, 4, 0, 0, 0, 0]);
    Host::request(&mut r, 0, 0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]);
    r.mem.write(DATA, &list).unwrap();
    h.0.put(&mut r, 2, &[(REQUEST, 51, false), (DATA, 24, false), (RESPONSE, 108, true)]);
    let wanted = DiskOp::Discard { offset: 8 * 512, len: 4 * 512 };
    assert!(matches!(&r.pc.pending_disk()[..], [Output::Disk { op, drive: 3, .. }] if *op == wanted));
}

#[test]
fn a_change_of_size_or_medium_is_told_once() {
    let mut r = Rig::new();
    let mut h = Host::start(&mut r);
    let ready = [0u8; 6];
    r.input(Input::DriveResized { drive: 3, size: 1 << 19 });
    assert_eq!(h.read(&mut r, (0, 0), &ready, 0).0 .2, (6, 0x2A));
    assert_eq!(h.read(&mut r, (0, 0), &ready, 0).0 .0, 0);
    let (_, size) = h.read(&mut r, (0, 0), &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
    assert_eq!(size, [0, 0, 3, 0xFF, 0, 0, 2, 0]);
    // The guest's own hand: locked, then out.
    h.read(&mut r, (4, 1), &[0x1E, 0, 0, 0, 1, 0], 0);
    assert_eq!(h.read(&mut r, (4, 1), &[0x1B, 0, 0, 0, 2, 0], 0).0 .2, (5, 0x53));
    h.read(&mut r, (4, 1), &[0x1E, 0, 0, 0, 0, 0], 0);
    Host::request(&mut r, 4, 1, &[0x1B, 0, 0, 0, 2, 0]);
    h.0.put(&mut r, 2, &[(REQUEST, 51, false), (RESPONSE, 108, true)]);
    let told = r.serve();
    let moved = |o: &Output| matches!(o, Output::Event(GuestEvent::TrayMoved { open: true, .. }));
    assert!(told.iter().any(moved), "{told:?}");
    assert_eq!(h.read(&mut r, (4, 1), &ready, 0).0 .2, (2, 0x3A));
    r.input(Input::Medium { device: "scsi0-0-4-1".into(), open: false, medium: Some((1, 1 << 19)) });
    r.migrate();
    assert_eq!(h.read(&mut r, (4, 1), &ready, 0).0 .2, (6, 0x28));
    let (_, data) = h.read(&mut r, (4, 1), &[0x28, 0, 0, 0, 0, 3, 0, 0, 1, 0], 2048);
    assert_eq!(data, r.disks[1][3 * 2048..4 * 2048]);
}

#[test]
fn whatever_a_guest_sends_is_answered() {
    let mut r = Rig::new();
    let mut h = Host::start(&mut r);
    let mut seed = 5u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as u32
    };
    let known = [
        0x00u8, 0x03, 0x08, 0x0A, 0x12, 0x15, 0x1A, 0x1B, 0x1E, 0x25, 0x28, 0x2A, 0x2E, 0x2F, 0x35, 0x41,
        0x42, 0x43, 0x46, 0x4A, 0x51, 0x55, 0x5A, 0x88, 0x8A, 0x8F, 0x93, 0x9E, 0xA0, 0xA8, 0xAA, 0xBD,
    ];
    for n in 0..4000 {
        let mut cdb: Vec<u8> = (0..32).map(|_| if random() % 3 == 0 { random() as u8 } else { 0 }).collect();
        cdb[0] = if random() % 8 == 0 { random() as u8 } else { known[random() as usize % known.len()] };
        let place = [(0, 0), (4, 1), (4, 0)][random() as usize % 3];
        let before = h.0.used(&r);
        if random() % 2 == 0 {
            h.read(&mut r, place, &cdb, random() % 8192);
        } else {
            let data: Vec<u8> = (0..1 + random() % 4096).map(|_| (random() % 40) as u8).collect();
            h.write(&mut r, place, &cdb, &data);
        }
        assert_eq!(h.0.used(&r), before.wrapping_add(1), "command {n}: {cdb:x?}");
    }
    r.migrate();
}

#[test]
fn units_come_and_go_on_every_replica() {
    let mut r = Rig::new();
    let mut h = Host::start(&mut r);
    let plug = |id: &str, target: &str| {
        let mut spec = device("scsi-hd", &[("scsi-id", target)]);
        (spec.id, spec.drive) = (Some(id.into()), Some(2));
        Plug { spec, devfn: 0, drive: Some(drive(2, 1 << 20, false)), nic: None }
    };
    assert!(r.pc.check_plug(&plug("x", "0")).unwrap_err().to_string().contains("already used"));
    r.pc.check_plug(&plug("x", "7")).unwrap();
    r.input(Input::Plug(Box::new(plug("x", "7"))));
    let (a, data) = h.read(&mut r, (7, 0), &[0x28, 0, 0, 0, 0, 3, 0, 0, 1, 0], 512);
    assert_eq!((a.0, a.1, data), (0, 0, r.disks[2][3 * 512..4 * 512].to_vec()));
    r.migrate();
    assert_eq!(h.read(&mut r, (7, 0), &[0; 6], 0).0 .1, 0);
    assert!(r.pc.inventory().iter().any(|i| i.spec.id.as_deref() == Some("x") && i.hotplugged));
    // A read that is under way when its unit goes ends all the same.
    Host::request(&mut r, 7, 0, &[0x28, 0, 0, 0, 0, 3, 0, 0, 1, 0]);
    h.0.put(&mut r, 2, &[(REQUEST, 51, false), (RESPONSE, 108, true), (DATA, 512, true)]);
    let before = h.0.used(&r);
    r.pc.check_unplug("x").unwrap();
    r.input(Input::Unplug { id: "x".into() });
    let told = r.serve();
    let deleted = |o: &Output| matches!(o, Output::Event(GuestEvent::DeviceDeleted { .. }));
    assert!(told.iter().any(deleted), "{told:?}");
    assert_eq!(h.0.used(&r), before + 1);
    assert_eq!(h.read(&mut r, (7, 0), &[0; 6], 0).0 .1, 3);
    r.migrate();
    assert_eq!(h.read(&mut r, (7, 0), &[0; 6], 0).0 .1, 3);
    assert_eq!(h.read(&mut r, (0, 0), &[0; 6], 0).0 .1, 0);
}
