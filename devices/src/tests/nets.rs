use super::*;

const BAR: u64 = 0xE000_0000;
const E1000: u8 = 0x18;

fn e1000(r: &mut Rig) {
    r.config_write(E1000, 0x10, BAR as u32);
    r.config_write(E1000, 4, 6);
    for (reg, value) in [
        (0x2800u64, 0x1_0000u32),
        (0x2808, 128),
        (0x2818, 7),
        (0x3800, 0x2_0000),
        (0x3808, 128),
        (0x0100, 0x0400_8002), // EN, BAM, SECRC
        (0x0400, 2),
        (0x00D0, 0x81),
    ] {
        r.write32(BAR + reg, value);
    }
    for i in 0..8u64 {
        r.mem.write(0x1_0000 + 16 * i, &(0x3_0000 + 2048 * i).to_le_bytes()).unwrap();
    }
}

#[test]
fn the_eeprom_holds_the_address_and_the_right_sum() {
    let mut r = Rig::new();
    e1000(&mut r);
    let mut words = Vec::new();
    for address in 0..64u32 {
        // Microwire: start bit, opcode 10, six bits of address, then 16 bits come back.
        let cycle = |r: &mut Rig, bit: u32| -> u32 {
            r.write32(BAR + 0x10, 0x42 | bit << 2);
            r.write32(BAR + 0x10, 0x43 | bit << 2);
            let out = r.read32(BAR + 0x10) >> 3 & 1;
            r.write32(BAR + 0x10, 0x42 | bit << 2);
            out
        };
        for i in (0..9).rev() {
            cycle(&mut r, (0b110 << 6 | address) >> i & 1);
        }
        words.push((0..16).fold(0u16, |w, _| w << 1 | cycle(&mut r, 0) as u16));
        r.write32(BAR + 0x10, 0x40);
    }
    assert_eq!(words[..3], [0x5452, 0, 0x0200]);
    assert_eq!(words.iter().fold(0u16, |a, w| a.wrapping_add(*w)), 0xBABA);
}

#[test]
fn the_e1000_receives_what_its_filter_passes() {
    let mut r = Rig::new();
    e1000(&mut r);
    let mut frame = vec![0xFF; 6];
    frame.extend([2; 54]);
    r.input(Input::NetRx { nic: 1, frame: frame.clone() });
    let mut other = frame.clone();
    other[0..6].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 3]);
    r.input(Input::NetRx { nic: 1, frame: other.clone() });
    other[5] = 2;
    r.input(Input::NetRx { nic: 1, frame: other.clone() });
    r.migrate();
    assert_eq!(r.read32(BAR + 0x2810), 2, "broadcast and its own address");
    let mut got = vec![0; 60];
    r.mem.read(0x3_0800, &mut got).unwrap();
    assert_eq!(got, other);
    let mut d = [0; 16];
    r.mem.read(0x1_0000, &mut d).unwrap();
    assert_eq!((d[8], d[12] & 3), (60, 3));
    assert_eq!(r.read32(BAR + 0xC0) & 0x80, 0x80);
    // With the ring full frames wait.
    for _ in 0..10 {
        r.input(Input::NetRx { nic: 1, frame: frame.clone() });
    }
    assert_eq!(r.read32(BAR + 0x2810), 7);
    r.migrate();
    r.write32(BAR + 0x2818, 4);
    assert_eq!(r.read32(BAR + 0x2810), 4);
}

#[test]
fn the_e1000_sends_and_segments() {
    let mut r = Rig::new();
    e1000(&mut r);
    let mut f = vec![0u8; 12];
    f.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    f.extend([0, 80, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 16, 0, 0, 0, 0, 0]);
    f.resize(54 + 2500, 0x77);
    r.mem.write(0x4_0000, &f).unwrap();
    // Context: IP at 14, TCP at 34, TSO with 54 bytes of header and an MSS of 1000.
    let mut context = vec![14, 24, 33, 0, 34, 50, 0, 0, 0, 0, 0, 0x27, 0, 54];
    context.extend(1000u16.to_le_bytes());
    let mut data = 0x4_0000u64.to_le_bytes().to_vec();
    data.extend((f.len() as u16).to_le_bytes());
    data.extend([0x10, 0x2D, 0, 3, 0, 0]);
    r.mem.write(0x2_0000, &context).unwrap();
    r.mem.write(0x2_0010, &data).unwrap();
    r.write32(BAR + 0x3818, 2);
    let frames: Vec<Vec<u8>> = r
        .serve()
        .into_iter()
        .map(|o| match o {
            Output::NetTx { nic: 1, frame } => frame,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(frames.iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
    let mut done = [0];
    r.mem.read(0x2_001C, &mut done).unwrap();
    assert_eq!(done[0] & 1, 1);
    assert_eq!(r.read32(BAR + 0xC0) & 3, 3);
}

#[test]
fn a_link_change_reaches_the_driver() {
    let mut r = Rig::new();
    e1000(&mut r);
    assert_eq!(r.read32(BAR + 8) & 2, 2);
    r.input(Input::LinkState { nic: 1, up: false });
    assert_eq!(r.read32(BAR + 8) & 2, 0);
    assert_eq!(r.read32(BAR + 0xC0) & 4, 4);
}
