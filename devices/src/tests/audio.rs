//! The HDA controller as a driver talks to it.

use super::{device, full_config, Rig};

const BAR: u64 = 0xEA00_0000;
const CORB: u64 = 0x1_0000;
const RIRB: u64 = 0x1_1000;
const LIST: u64 = 0x1_2000;
const DATA: u64 = 0x2_0000;
const POSITIONS: u64 = 0x1_3000;
const MS: u64 = 1_000_000;

fn rig() -> Rig {
    let mut config = full_config();
    config.devices.push(device("ich9-intel-hda", &[("addr", "1b")]));
    config.devices.push(device("hda-duplex", &[("cad", "2")]));
    let mut r = Rig::of(config);
    r.config_write(0x1B << 3, 0x10, BAR as u32);
    r.config_write(0x1B << 3, 4, 6);
    r
}

fn write(r: &mut Rig, offset: u64, size: u8, value: u64) {
    r.pc.mmio_write(&r.mem, r.now, BAR + offset, size, value);
}

fn read(r: &mut Rig, offset: u64, size: u8) -> u64 {
    r.pc.mmio_read(&r.mem, r.now, BAR + offset, size)
}

#[test]
fn commands_are_answered_through_the_rings() {
    let mut r = rig();
    assert_eq!(read(&mut r, 8, 4), 0);
    write(&mut r, 8, 4, 1);
    assert_eq!((read(&mut r, 0, 4), read(&mut r, 8, 4), read(&mut r, 0x0E, 2)), (0x0100_4401, 1, 4));
    write(&mut r, 0x0E, 2, 4);
    assert_eq!(read(&mut r, 0x0E, 2), 0);
    for (at, size, value) in [
        (0x40, 4, CORB),
        (0x50, 4, RIRB),
        (0x4A, 2, 0x8000),
        (0x4A, 2, 0),
        (0x58, 2, 0x8000),
        (0x5A, 2, 2),
        (0x20, 4, 0xC000_0000),
        (0x4C, 1, 2),
        (0x5C, 1, 3),
    ] {
        write(&mut r, at, size, value);
    }
    // Vendor and nodes of the codec at address 2; nobody is at 1; a third command waits for the interrupt's end.
    for (n, word) in [0x200F_0000u32, 0x100F_0000, 0x200F_0004, 0x201F_0005].into_iter().enumerate() {
        r.put(CORB + 4 * (n as u64 + 1), &word.to_le_bytes());
    }
    write(&mut r, 0x48, 2, 4);
    assert_eq!(r.get::<16>(RIRB + 8), [0x22, 0, 0xF4, 0x1A, 2, 0, 0, 0, 1, 0, 1, 0, 2, 0, 0, 0]);
    assert_eq!((read(&mut r, 0x58, 2), read(&mut r, 0x24, 4)), (2, 0xC000_0000));
    r.migrate();
    write(&mut r, 0x5D, 1, 1);
    assert_eq!((read(&mut r, 0x58, 2), r.get::<4>(RIRB + 24)), (3, [1, 0, 0, 0]));
    // Without rings: one at a time.
    write(&mut r, 0x60, 4, 0x200F_0004);
    write(&mut r, 0x68, 2, 1);
    assert_eq!((read(&mut r, 0x68, 2), read(&mut r, 0x64, 4)), (2, 0x1_0001));
}

#[test]
fn sound_takes_its_time_and_tells_where_it_is() {
    let mut r = rig();
    write(&mut r, 8, 4, 1);
    // Two buffers of 10 ms at 48 kHz, 16 bits, two channels; the second interrupts.
    for (n, flags) in [(0u64, 0u32), (1, 1)] {
        r.put(LIST + 16 * n, &(DATA + 1920 * n).to_le_bytes());
        r.put(LIST + 16 * n + 8, &1920u32.to_le_bytes());
        r.put(LIST + 16 * n + 12, &flags.to_le_bytes());
    }
    r.put(DATA, &[0x55; 3840]);
    write(&mut r, 0x70, 4, POSITIONS | 1);
    write(&mut r, 0x20, 4, 0x8000_0011);
    // Stream 0 records, stream 4 plays.
    for base in [0x80, 0x100] {
        for (at, size, value) in
            [(8, 4, 3840), (0x0C, 2, 1), (0x12, 2, 0x11), (0x18, 4, LIST), (0, 4, 0x10_0006)]
        {
            write(&mut r, base + at, size, value);
        }
    }
    r.pass(5 * MS);
    assert_eq!((read(&mut r, 0x104, 4), r.get::<4>(POSITIONS + 32)), (960, 960u32.to_le_bytes()));
    assert_eq!(read(&mut r, 0x24, 4), 0);
    assert_eq!(r.get::<4>(DATA), [0; 4], "silence was recorded");
    assert_eq!(r.get::<4>(DATA + 1000), [0x55; 4], "only so far");
    r.migrate();
    r.pass(16 * MS);
    assert_eq!(read(&mut r, 0x104, 4), 192, "round the buffer");
    assert_eq!(read(&mut r, 0x24, 4), 0x8000_0011);
    write(&mut r, 0x103, 1, 4);
    write(&mut r, 0x83, 1, 4);
    assert_eq!(read(&mut r, 0x24, 4), 0);
    // Stopped, it stays; reset, it is empty.
    write(&mut r, 0x100, 4, 0);
    r.pass(5 * MS);
    assert_eq!(read(&mut r, 0x104, 4), 192);
    write(&mut r, 0x100, 1, 1);
    assert_eq!((read(&mut r, 0x100, 1), read(&mut r, 0x104, 4), read(&mut r, 0x108, 4)), (1, 0, 0));
    write(&mut r, 0x100, 1, 0);
    assert_eq!(read(&mut r, 0x100, 1), 0);
}
