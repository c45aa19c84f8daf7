use super::*;

fn select(r: &mut Rig, lba: u32, count: u8) {
    r.outb(0x1F6, 0xE0 | (lba >> 24) as u8);
    r.outb(0x1F2, count);
    r.outb(0x1F3, lba as u8);
    r.outb(0x1F4, (lba >> 8) as u8);
    r.outb(0x1F5, (lba >> 16) as u8);
}

#[test]
fn an_ide_disk_reads_sectors_by_its_data_port() {
    let mut r = Rig::new();
    select(&mut r, 5, 3);
    r.outb(0x1F7, 0x20);
    let mut data = Vec::new();
    for sector in 0..3 {
        r.serve();
        if sector == 1 {
            r.migrate();
        }
        assert_eq!(r.inb(0x1F7) & 0x89, 8);
        for _ in 0..128 {
            data.extend(r.inl(0x1F0).to_le_bytes());
        }
    }
    assert_eq!(data, r.disks[0][5 * 512..8 * 512]);
    assert_eq!(r.inb(0x1F7), 0x50);
}

#[test]
fn an_ide_disk_writes_by_its_data_port_and_flushes() {
    let mut r = Rig::new();
    select(&mut r, 9, 2);
    r.outb(0x1F7, 0x30);
    for i in 0..512u16 {
        if i == 256 {
            r.serve();
        }
        r.outw(0x1F0, i);
    }
    assert_eq!(r.pc.pending_disk().len(), 1);
    r.migrate();
    assert_eq!(r.inb(0x1F7) & 0x80, 0x80);
    r.serve();
    assert_eq!(r.inb(0x1F7), 0x50);
    let expected: Vec<u8> = (0..512u16).flat_map(u16::to_le_bytes).collect();
    assert_eq!(r.disks[0][9 * 512..11 * 512], expected);
    r.outb(0x1F7, 0xE7);
    assert!(matches!(&r.pc.pending_disk()[..], [Output::Disk { op: DiskOp::Flush, .. }]));
}

#[test]
fn bus_master_transfers_scatter_and_gather() {
    let mut r = Rig::new();
    r.config_write(9, 0x20, 0xC000);
    r.config_write(9, 4, 5);
    // Two pieces: 512 bytes at 0x5000, the rest at 0x8000.
    let prd = |at: u32, n: u16, last: bool| [u64::from(at) | u64::from(n) << 32 | u64::from(last) << 63];
    for (i, d) in [prd(0x5000, 512, false), prd(0x8000, 1536, true)].iter().enumerate() {
        r.mem.write(0x3000 + 8 * i as u64, &d[0].to_le_bytes()).unwrap();
    }
    for (command, direction) in [(0xC8, 8), (0xCA, 0)] {
        select(&mut r, 16, 4);
        r.outl(0xC004, 0x3000);
        r.outb(0xC002, 6);
        r.outb(0xC000, direction);
        r.outb(0x1F7, command);
        r.outb(0xC000, direction | 1);
        r.migrate();
        r.serve();
        assert_eq!(r.inb(0xC002) & 7, 4);
        assert_eq!(r.inb(0x1F7), 0x50);
        r.outb(0xC000, 0);
        let mut got = vec![0; 2048];
        r.mem.read(0x5000, &mut got[..512]).unwrap();
        r.mem.read(0x8000, &mut got[512..]).unwrap();
        assert_eq!(got, r.disks[0][16 * 512..20 * 512]);
        r.mem.write(0x8000, &[0xAA; 1536]).unwrap();
    }
    assert_eq!(r.disks[0][17 * 512..20 * 512], [0xAA; 1536]);
}

#[test]
fn what_lies_outside_the_disk_is_an_error() {
    let mut r = Rig::new();
    select(&mut r, 2047, 2);
    r.outb(0x1F7, 0x20);
    assert_eq!(r.inb(0x1F7) & 0x89, 1);
    assert_eq!(r.inb(0x1F1), 0x14);
    select(&mut r, 0, 1);
    r.outb(0x1F7, 0x20);
    let Some(Output::Disk { id, .. }) = r.pc.take_outputs().pop() else { panic!() };
    r.input(Input::DiskDone { id, result: Err(5) });
    assert_eq!((r.inb(0x1F7) & 0x89, r.inb(0x1F1)), (1, 0x40));
}

#[test]
fn the_cd_drive_answers_packets() {
    let mut r = Rig::new();
    let packet = |r: &mut Rig, cdb: [u8; 12]| -> Vec<u8> {
        r.outb(0x176, 0xA0);
        r.outb(0x171, 0);
        r.outb(0x174, 0);
        r.outb(0x175, 8);
        r.outb(0x177, 0xA0);
        for c in cdb.chunks(2) {
            r.outw(0x170, u16::from_le_bytes([c[0], c[1]]));
        }
        let mut data = Vec::new();
        loop {
            r.serve();
            if r.inb(0x177) & 8 == 0 {
                return data;
            }
            let n = u16::from(r.inb(0x174)) | u16::from(r.inb(0x175)) << 8;
            for _ in 0..n / 2 {
                data.extend(r.inw(0x170).to_le_bytes());
            }
        }
    };
    assert_eq!(&packet(&mut r, [0x12, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0])[8..12], b"QEMU");
    assert_eq!(packet(&mut r, [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), [0, 0, 1, 0xFF, 0, 0, 8, 0]);
    let data = packet(&mut r, [0x28, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0]);
    assert_eq!(data, r.disks[1][3 * 2048..5 * 2048]);
    assert!(packet(&mut r, [0x28, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]).is_empty());
    assert_eq!(r.inb(0x177) & 1, 1);
    let sense = packet(&mut r, [3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((sense[2], sense[12]), (5, 0x21));
}

/// Places in memory of a legacy queue of 256 entries.
const RING: u64 = 0x10_0000;

pub struct LegacyQueue {
    pub io: u16,
    next: u16,
}

impl LegacyQueue {
    pub fn start(r: &mut Rig, devfn: u8, io: u16, queue: u16) -> LegacyQueue {
        r.config_write(devfn, 0x10, io.into());
        r.config_write(devfn, 4, 7);
        r.outb(io + 0x12, 0);
        r.outb(io + 0x12, 3);
        r.outl(io + 4, 0);
        r.outw(io + 0x0E, queue);
        assert_eq!(r.inw(io + 0x0C), 256);
        r.outl(io + 8, (RING >> 12) as u32);
        r.outb(io + 0x12, 7);
        LegacyQueue { io, next: 0 }
    }

    /// Make a chain of (address, length, device writes) available and notify.
    pub fn put(&mut self, r: &mut Rig, queue: u16, pieces: &[(u64, u32, bool)]) {
        let avail = RING + 4096;
        for (i, (addr, len, write)) in pieces.iter().enumerate() {
            let flags = u16::from(i + 1 < pieces.len()) | u16::from(*write) << 1;
            let mut d = addr.to_le_bytes().to_vec();
            d.extend(len.to_le_bytes());
            d.extend(flags.to_le_bytes());
            d.extend((i as u16 + 1).to_le_bytes());
            r.mem.write(RING + 16 * i as u64, &d).unwrap();
        }
        r.mem.write(avail + 4 + 2 * u64::from(self.next % 256), &[0, 0]).unwrap();
        self.next += 1;
        r.mem.write(avail + 2, &self.next.to_le_bytes()).unwrap();
        r.outw(self.io + 0x10, queue);
    }

    pub fn used(&self, r: &Rig) -> u16 {
        let mut b = [0; 2];
        r.mem.read(RING + 8192 + 2, &mut b).unwrap();
        u16::from_le_bytes(b)
    }
}

#[test]
fn virtio_blk_reads_writes_and_survives_migration() {
    let mut r = Rig::new();
    let mut q = LegacyQueue::start(&mut r, 0x20, 0xD000, 0);
    let header = |kind: u32, sector: u64| {
        let mut h = kind.to_le_bytes().to_vec();
        h.extend([0; 4]);
        h.extend(sector.to_le_bytes());
        h
    };
    r.mem.write(0x4000, &header(0, 7)).unwrap();
    q.put(&mut r, 0, &[(0x4000, 16, false), (0x5000, 1000, true), (0x7000, 24, true), (0x4800, 1, true)]);
    assert_eq!(q.used(&r), 0);
    assert_eq!(r.pc.pending_disk().len(), 1);
    r.migrate();
    r.serve();
    assert_eq!(q.used(&r), 1);
    let mut got = vec![0; 1024];
    r.mem.read(0x5000, &mut got[..1000]).unwrap();
    r.mem.read(0x7000, &mut got[1000..]).unwrap();
    assert_eq!(got, r.disks[2][7 * 512..9 * 512]);
    assert_eq!(r.inb(q.io + 0x13), 1);

    r.mem.write(0x4000, &header(1, 20)).unwrap();
    q.put(&mut r, 0, &[(0x4000, 16, false), (0x5000, 512, false), (0x4800, 1, true)]);
    // The data was taken when the request was made.
    r.mem.write(0x5000, &[0; 512]).unwrap();
    r.serve();
    assert_eq!(r.disks[2][20 * 512..21 * 512], got[..512]);

    // Outside the disk, and an unknown request.
    for (kind, sector, status) in [(0, 1 << 40, 1), (99, 0, 2)] {
        r.mem.write(0x4000, &header(kind, sector)).unwrap();
        q.put(&mut r, 0, &[(0x4000, 16, false), (0x5000, 512, true), (0x4800, 1, true)]);
        r.serve();
        let mut s = [9];
        r.mem.read(0x4800, &mut s).unwrap();
        assert_eq!(s, [status]);
    }
    r.mem.write(0x4000, &header(8, 0)).unwrap();
    q.put(&mut r, 0, &[(0x4000, 16, false), (0x5000, 20, true), (0x4800, 1, true)]);
    let mut id = [1; 4];
    r.mem.read(0x5000, &mut id).unwrap();
    assert_eq!(id, *b"S2\0\0");
}

#[test]
fn virtio_rng_gives_the_machines_numbers() {
    let run = || {
        let mut r = Rig::new();
        let slot = (3..32).find(|s| r.config_read(s << 3, 0) == 0x1005_1AF4).unwrap();
        r.config_write(slot << 3, 0x10, 0xD100);
        r.config_write(slot << 3, 4, 7);
        r.outb(0xD112, 3);
        r.outl(0xD108, (RING >> 12) as u32);
        r.outb(0xD112, 7);
        r.mem.write(RING, &0x5000u64.to_le_bytes()).unwrap();
        r.mem.write(RING + 8, &[64, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        r.mem.write(RING + 16 * 8 + 2, &[1, 0]).unwrap();
        r.outw(0xD110, 0);
        let mut got = vec![0; 64];
        r.mem.read(0x5000, &mut got).unwrap();
        got
    };
    let a = run();
    assert_ne!(a, vec![0; 64]);
    assert_eq!(a, run());
}
