//! The q35: buses behind ports, configuration space in memory, AHCI, messages.

use super::*;
use crate::door::{GuestEvent, Plug};

/// Configuration space in memory, as firmware switches it on.
const MAPPED: u64 = 0xB000_0000;
const AHCI: u64 = 0xE000_0000;

/// A q35 with a disk and a CD behind AHCI, a disk behind the first of two root ports, and a USB controller.
pub fn q35_config() -> PcConfig {
    let mut disk = device("ide-hd", &[("bus", "ide.0")]);
    disk.drive = Some(0);
    let mut cd = device("ide-cd", &[("bus", "ide.2"), ("bootindex", "2")]);
    cd.drive = Some(1);
    let port = |id: &str, addr: &str| {
        let mut port = device("pcie-root-port", &[("addr", addr), ("chassis", "1"), ("multifunction", "on")]);
        port.id = Some(id.into());
        port
    };
    let mut blk = device("virtio-blk-pci", &[("bus", "one"), ("bootindex", "1")]);
    blk.drive = Some(2);
    PcConfig {
        machine: "pc-q35-7.2".into(),
        devices: vec![
            disk,
            cd,
            port("one", "2.0"),
            port("two", "2.1"),
            blk,
            device("qemu-xhci", &[("addr", "3")]),
            device("usb-kbd", &[]),
            device("usb-tablet", &[("port", "3")]),
            device("virtio-rng-pci", &[("addr", "4")]),
        ],
        ..full_config()
    }
}

impl Rig {
    pub fn q35() -> Rig {
        let mut r = Rig::of(q35_config());
        r.config_write(0, 0x60, MAPPED as u32 | 1);
        r.config_write(0xF8, 0x40, 0x601);
        r.config_write(0xF8, 0x44, 0x80);
        // The AHCI controller's registers, DMA, and its message.
        r.config_write(0xFA, 0x24, AHCI as u32);
        r.config_write(0xFA, 0x84, 0xFEE0_0000);
        r.config_write(0xFA, 0x8C, 0x41);
        r.config_write(0xFA, 0x80, 0x0001_0000);
        r.config_write(0xFA, 4, 7);
        // The ports: buses 1 and 2, with memory for the first.
        r.config_write(0x10, 0x18, 0x0001_0100);
        r.config_write(0x10, 0x20, 0xE210_E200);
        r.config_write(0x10, 4, 7);
        r.config_write(0x11, 0x18, 0x0002_0200);
        r
    }

    fn mapped(&self, bus: u64, devfn: u64, offset: u64) -> u64 {
        MAPPED + (bus << 20) + (devfn << 12) + offset
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.mem.write(at, bytes).unwrap();
    }

    pub(super) fn get<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.mem.read(at, &mut out).unwrap();
        out
    }

    /// Start port `n`: command list at 0x1000, received FISes at 0x2000.
    fn start_port(&mut self, n: u64) -> u64 {
        let port = AHCI + 0x100 + 0x80 * n;
        for (offset, value) in [(0x00, 0x1000), (0x04, 0), (0x08, 0x2000), (0x0C, 0), (0x14, 0x4000_000F)] {
            self.write32(port + offset, value);
        }
        self.write32(port + 0x10, u32::MAX);
        self.write32(port + 0x18, 0x11);
        self.write32(AHCI + 4, 0x8000_0002);
        port
    }

    /// A command in slot `slot` whose data are at `at`.
    fn command(&mut self, slot: u64, fis: &[u8; 20], packet: &[u8], at: u64, len: u32) {
        let table = 0x3000 + 0x100 * slot;
        self.put(table, fis);
        self.put(table + 0x40, packet);
        self.put(table + 0x80, &at.to_le_bytes());
        self.put(table + 0x8C, &(len - 1).to_le_bytes());
        let mut header = [0u8; 32];
        header[2] = 1;
        header[8..16].copy_from_slice(&table.to_le_bytes());
        self.put(0x1000 + 32 * slot, &header);
    }
}

fn fis(command: u8, lba: u8, count: u8, feature: u8) -> [u8; 20] {
    let mut f = [0; 20];
    f[..4].copy_from_slice(&[0x27, 0x80, command, feature]);
    f[4] = lba;
    f[7] = 0x40;
    f[12] = count;
    f
}

#[test]
fn configuration_space_is_reached_by_ports_and_by_memory_on_every_bus() {
    let mut r = Rig::q35();
    assert_eq!(r.config_read(0, 0), 0x29C0_8086);
    assert_eq!(r.read32(r.mapped(0, 0, 0)), 0x29C0_8086);
    assert_eq!(r.read32(r.mapped(0, 0xF8, 0)), 0x2918_8086);
    assert_eq!(r.read32(r.mapped(1, 0, 0)), 0x1042_1AF4, "a modern device: it is behind a port");
    assert_eq!(r.read32(r.mapped(1, 8, 0)), u32::MAX, "a port has one slot");
    assert_eq!(r.read32(r.mapped(2, 0, 0)), u32::MAX, "empty");
    assert_eq!(r.read32(r.mapped(7, 0, 0)), u32::MAX, "no bus of this number");
    assert_eq!(r.read32(r.mapped(1, 0, 0x100)), 0, "no extended capability");
    r.outl(0xCF8, 0x8001_0000);
    assert_eq!(r.inl(0xCFC), 0x1042_1AF4);
    r.migrate();
    assert_eq!(r.read32(r.mapped(1, 0, 0)), 0x1042_1AF4);
}

#[test]
fn what_is_behind_a_port_answers_only_where_the_port_passes_it_on() {
    let mut r = Rig::q35();
    // The common configuration of the virtio disk: its number of queues.
    let place = |r: &mut Rig, base: u32| {
        let bar = r.mapped(1, 0, 0x20);
        r.write32(bar, base);
        let command = r.mapped(1, 0, 4);
        r.write32(command, 6);
        r.pc.mmio_read(&r.mem, r.now, u64::from(base) + 0x12, 2)
    };
    assert_eq!(place(&mut r, 0xE200_0000), 1);
    assert_eq!(place(&mut r, 0xE300_0000), 0xFFFF, "outside the port's window");
    assert_eq!(place(&mut r, 0xE210_0000), 1);
    r.config_write(0x10, 4, 4);
    assert_eq!(r.read32(0xE210_0010), u32::MAX, "the port passes no memory on");
}

#[test]
fn a_pin_reaches_its_own_input_of_the_io_apic() {
    let mut r = Rig::q35();
    // The AHCI controller's pin, without its message: slot 31 pin A is PIRQ A, input 16.
    r.config_write(0xFA, 0x80, 0);
    r.write32(0xFEC0_0000, 0x10 + 32);
    r.write32(0xFEC0_0010, 0x8051);
    let port = r.start_port(0);
    r.command(0, &fis(0xEC, 0, 1, 0), &[], 0x8000, 512);
    r.write32(port + 0x38, 1);
    let messages = r.pc.take_messages();
    assert_eq!(messages.iter().map(|m| m.data & 0xFF).collect::<Vec<_>>(), [0x51]);
    // Slot 0 behind the port at 2.0 has pin A of slot 2: PIRQ G, input 22; and by the 8259 if it is routed there.
    r.config_write(0xF8, 0x68, 0x800B_8080);
    r.migrate();
    assert_eq!(r.read32(AHCI + 8), 1, "the port's interrupt is still pending");
}

#[test]
fn an_ahci_disk_says_what_it_is_reads_and_writes() {
    let mut r = Rig::q35();
    let port = r.start_port(0);
    assert_eq!(r.read32(AHCI + 0x0C), 0x3F);
    assert_eq!(r.read32(port + 0x28), 0x113, "a drive is there");
    assert_eq!(r.read32(port + 0x24), 0x0000_0101);
    assert_eq!(r.read32(port + 0x80 + 0x28), 0, "nothing in the second port");
    r.command(0, &fis(0xEC, 0, 1, 0), &[], 0x8000, 512);
    r.write32(port + 0x38, 1);
    let id: [u8; 512] = r.get(0x8000);
    assert_eq!(u16::from_le_bytes([id[152], id[153]]) & 0x100, 0x100, "native command queuing");
    assert_eq!(r.read32(port + 0x38), 0);
    assert_eq!(r.get::<2>(0x2040), [0x34, 0x40], "a register FIS");
    // READ DMA EXT of sectors 5 to 7, its disk request carried over to another host.
    r.command(1, &fis(0x25, 5, 3, 0), &[], 0x9000, 1536);
    r.write32(port + 0x38, 2);
    assert_eq!(r.read32(port + 0x38), 2);
    r.migrate();
    r.serve();
    assert_eq!(r.read32(port + 0x38), 0);
    assert_eq!(r.get::<1536>(0x9000), r.disks[0][5 * 512..8 * 512]);
    assert_eq!(r.get::<4>(0x1000 + 32 + 4), 1536u32.to_le_bytes(), "bytes moved");
    // WRITE DMA EXT.
    r.put(0xA000, &[7; 512]);
    r.command(2, &fis(0x35, 9, 1, 0), &[], 0xA000, 512);
    r.write32(port + 0x38, 4);
    r.serve();
    assert_eq!(r.disks[0][9 * 512..10 * 512], [7; 512]);
    assert!(r.pc.take_messages().iter().any(|m| m.data == 0x41), "its message came");
}

#[test]
fn queued_commands_are_in_flight_together_and_end_by_tag() {
    let mut r = Rig::q35();
    let port = r.start_port(0);
    for (slot, lba) in [(3u8, 20u8), (5, 40)] {
        r.command(slot.into(), &fis(0x60, lba, slot << 3, 2), &[], 0x8000 + 0x1000 * u64::from(slot), 1024);
    }
    r.write32(port + 0x34, 0x28);
    r.write32(port + 0x38, 0x28);
    assert_eq!(r.read32(port + 0x38), 0, "the drive has them");
    assert_eq!(r.read32(port + 0x34), 0x28);
    assert_eq!(r.pc.pending_disk().len(), 2);
    r.migrate();
    r.serve();
    assert_eq!(r.read32(port + 0x34), 0);
    assert_eq!(r.get::<1024>(0xB000), r.disks[0][20 * 512..22 * 512]);
    assert_eq!(r.get::<1024>(0xD000), r.disks[0][40 * 512..42 * 512]);
    assert_eq!(r.get::<2>(0x2058), [0xA1, 0x40], "set device bits");
    // Beyond the end: the task file says so, and nothing reaches the disk.
    let mut beyond = fis(0x60, 0, 0, 1);
    beyond[8] = 1;
    r.command(0, &beyond, &[], 0x8000, 512);
    r.write32(port + 0x34, 1);
    r.write32(port + 0x38, 1);
    assert_eq!(r.read32(port + 0x20) & 1, 1);
    assert_eq!(r.read32(port + 0x10) & 0x4000_0000, 0x4000_0000);
    assert!(r.pc.pending_disk().is_empty());
}

#[test]
fn a_cd_behind_ahci_takes_packets() {
    let mut r = Rig::q35();
    let port = r.start_port(2);
    assert_eq!(r.read32(port + 0x24), 0xEB14_0101);
    // READ(10) of block 3; a first command may be told of the medium.
    for _ in 0..2 {
        r.command(0, &fis(0xA0, 0, 0, 1), &[0x28, 0, 0, 0, 0, 3, 0, 0, 1, 0, 0, 0], 0x9000, 2048);
        r.write32(port + 0x10, u32::MAX);
        r.write32(port + 0x18, 0);
        r.write32(port + 0x18, 0x11);
        r.write32(port + 0x38, 1);
        r.serve();
    }
    assert_eq!(r.read32(port + 0x20) & 1, 0);
    assert_eq!(r.get::<2048>(0x9000), r.disks[1][3 * 2048..4 * 2048]);
}

#[test]
fn a_device_comes_and_goes_behind_a_port_and_not_on_the_root_bus() {
    const UP: u16 = 0xCC0;
    const DOWN: u16 = 0xCC4;
    const EJECT: u16 = 0xCC8;
    const BUS: u16 = 0xCD0;
    let mut r = Rig::q35();
    let spec = |bus: &str| {
        let mut spec = device("virtio-rng-pci", &[("bus", bus)]);
        spec.id = Some("new".into());
        Plug { spec, devfn: 0, drive: None, nic: None }
    };
    let refused = |r: &mut Rig, bus: &str| r.pc.check_plug(&spec(bus)).unwrap_err().to_string();
    assert!(refused(&mut r, "pcie.0").contains("does not support hotplugging"));
    assert!(refused(&mut r, "three").contains("Bus 'three' not found"));
    assert!(refused(&mut r, "one").contains("all in use"));
    let plug = spec("two");
    assert_eq!(r.pc.check_plug(&plug).unwrap(), 0);
    r.input(Input::Plug(Box::new(plug)));
    assert_eq!(r.read32(r.mapped(2, 0, 0)), 0x1044_1AF4);
    r.outl(BUS, 1);
    assert_eq!(r.inl(UP), 0);
    r.outl(BUS, 2);
    assert_eq!(r.inl(UP), 1, "the slot behind the second port");
    r.migrate();
    assert_eq!(r.read32(r.mapped(2, 0, 0)), 0x1044_1AF4);
    r.input(Input::Unplug { id: "new".into() });
    assert_eq!(r.inl(DOWN), 1);
    r.outl(EJECT, 1);
    assert_eq!(r.read32(r.mapped(2, 0, 0)), u32::MAX);
    let deleted = |o: &Output| matches!(o, Output::Event(GuestEvent::DeviceDeleted { .. }));
    assert!(r.serve().iter().any(deleted));
    r.migrate();
    assert!(r.pc.check_plug(&spec("two")).is_ok());
}

#[test]
fn a_usb_keyboard_is_addressed_asked_and_reports_its_keys() {
    const BAR: u64 = 0xE400_0000;
    let mut r = Rig::q35();
    for (offset, value) in [(0x10u8, BAR as u32), (0x14, 0), (4, 6)] {
        r.config_write(0x18, offset, value);
    }
    assert_eq!(r.read32(BAR + 0x440) & 3, 1, "something is in the first port");
    assert_eq!(r.read32(BAR + 0x450) & 1, 0, "nothing in the second");
    assert_eq!(r.read32(BAR + 0x460) & 1, 1, "the tablet in the third");
    r.write32(BAR + 0x440, 0x210);
    assert_eq!(r.read32(BAR + 0x440) & 0x20_0002, 0x20_0002, "enabled by a reset");
    // Contexts' array at 0x10000, event ring at 0x12000 (table 0x11000), command ring at 0x13000.
    r.put(0x11000, &0x12000u64.to_le_bytes());
    r.put(0x11008, &64u32.to_le_bytes());
    r.put(0x10008, &0x14000u64.to_le_bytes());
    let registers = [
        (0x1028, 1),
        (0x1030, 0x11000),
        (0x1034, 0),
        (0x70, 0x10000),
        (0x74, 0),
        (0x78, 8),
        (0x58, 0x13001),
        (0x5C, 0),
        (0x40, 1),
    ];
    registers.iter().for_each(|(at, value)| r.write32(BAR + at, *value));
    let mut command = 0u64;
    let mut event = 0u64;
    let trb = |r: &mut Rig, ring: u64, n: u64, words: [u32; 4]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        r.put(ring + 16 * n, &bytes);
    };
    // The next event: its code, what was not moved, its type.
    let mut next = |r: &mut Rig| {
        let e: [u8; 16] = r.get(0x12000 + 16 * event);
        event += 1;
        assert_eq!(e[12] & 1, 1, "event {event} is there");
        (e[11], e[8], e[13] >> 2)
    };
    let mut run = |r: &mut Rig, words: [u32; 4]| {
        trb(r, 0x13000, command, words);
        command += 1;
        r.write32(BAR + 0x2000, 0);
    };
    run(&mut r, [0, 0, 0, 9 << 10 | 1]);
    assert_eq!(next(&mut r), (1, 0, 33), "a slot");
    // Input context: slot 1 at port 1, endpoint 0's ring at 0x16000, endpoint 1's at 0x17000.
    for (at, value) in [
        (0x15004, 3u32),
        (0x15020, 1 << 27 | 3 << 20),
        (0x15024, 1 << 16),
        (0x15044, 64 << 16 | 4 << 3),
        (0x15048, 0x16001),
        (0x15084, 8 << 16 | 7 << 3),
        (0x15088, 0x17001),
    ] {
        r.put(at, &value.to_le_bytes());
    }
    run(&mut r, [0x15000, 0, 0, 1 << 24 | 11 << 10 | 1]);
    assert_eq!(next(&mut r), (1, 0, 33), "an address");
    assert_eq!(r.get::<4>(0x1400C), (2u32 << 27 | 1).to_le_bytes());
    // Asked for 64 bytes of its device descriptor, it has 18.
    trb(&mut r, 0x16000, 0, [0x0100_0680, 0x0040_0000, 8, 3 << 16 | 2 << 10 | 0x41]);
    trb(&mut r, 0x16000, 1, [0x18000, 0, 64, 1 << 16 | 3 << 10 | 5]);
    trb(&mut r, 0x16000, 2, [0, 0, 0, 4 << 10 | 0x21]);
    r.write32(BAR + 0x2004, 1);
    assert_eq!(next(&mut r), (13, 46, 32), "a short packet");
    assert_eq!(next(&mut r), (1, 0, 32));
    assert_eq!(r.get::<12>(0x18000), [18, 1, 0, 2, 0, 0, 0, 64, 0x27, 6, 1, 0]);
    // A request that it does not know stalls endpoint 0.
    trb(&mut r, 0x16000, 3, [0x0600_0680, 0x0040_0000, 8, 3 << 16 | 2 << 10 | 0x41]);
    trb(&mut r, 0x16000, 4, [0x18000, 0, 64, 1 << 16 | 3 << 10 | 5]);
    trb(&mut r, 0x16000, 5, [0, 0, 0, 4 << 10 | 0x21]);
    r.write32(BAR + 0x2004, 1);
    assert_eq!(next(&mut r).0, 6);
    run(&mut r, [0, 0, 0, 1 << 24 | 1 << 16 | 14 << 10 | 1]);
    run(&mut r, [0x16060 | 1, 0, 0, 1 << 24 | 1 << 16 | 16 << 10 | 1]);
    assert_eq!((next(&mut r).0, next(&mut r).0), (1, 1), "endpoint 0 goes on behind it");
    r.put(0x15004, &9u32.to_le_bytes());
    run(&mut r, [0x15000, 0, 0, 1 << 24 | 12 << 10 | 1]);
    assert_eq!(next(&mut r), (1, 0, 33), "endpoint 1");
    trb(&mut r, 0x16000, 6, [0x0001_0900, 0, 8, 2 << 10 | 0x41]);
    trb(&mut r, 0x16000, 7, [0, 0, 0, 1 << 16 | 4 << 10 | 0x21]);
    r.write32(BAR + 0x2004, 1);
    assert_eq!(next(&mut r), (1, 0, 32), "configured");
    // A transfer waits until a key is pressed; over a migration too.
    trb(&mut r, 0x17000, 0, [0x19000, 0, 8, 1 << 10 | 0x21]);
    r.write32(BAR + 0x2004, 3);
    r.migrate();
    r.input(Input::Key { number: 0x1E, down: true });
    assert_eq!(next(&mut r), (1, 0, 32));
    assert_eq!(r.get::<8>(0x19000), [0, 0, 4, 0, 0, 0, 0, 0]);
    r.migrate();
    // Suspended, it wakes its port if it may.
    trb(&mut r, 0x16000, 8, [0x0001_0300, 0, 8, 2 << 10 | 0x41]);
    trb(&mut r, 0x16000, 9, [0, 0, 0, 1 << 16 | 4 << 10 | 0x21]);
    r.write32(BAR + 0x2004, 1);
    assert_eq!(next(&mut r).2, 32);
    r.write32(BAR + 0x440, 0x1_0260);
    r.input(Input::Key { number: 0x1E, down: false });
    assert_eq!(next(&mut r).2, 34, "a change of the port");
    assert_eq!(r.read32(BAR + 0x440) & 0x40_01E0, 0x40_01E0, "it resumes");
    r.write32(BAR + 0x440, 0x41_0200);
    assert_eq!(next(&mut r).2, 34);
    assert_eq!(r.read32(BAR + 0x440) & 0x1E0, 0);
    trb(&mut r, 0x17000, 1, [0x19000, 0, 8, 1 << 10 | 0x21]);
    r.write32(BAR + 0x2004, 3);
    assert_eq!(next(&mut r), (1, 0, 32), "the key that was let go");
    assert_eq!(r.get::<8>(0x19000), [0; 8]);
}

#[test]
fn a_root_port_needs_an_express_bus() {
    let mut config = full_config();
    config.devices.push(device("pcie-root-port", &[]));
    let mem = GuestMemory::new(config.ram_size).unwrap();
    let refused = Pc::new(config, &mem).err().unwrap().to_string();
    assert!(refused.contains("needs a PCI Express bus"), "{refused}");
}
