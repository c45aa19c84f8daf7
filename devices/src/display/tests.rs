//! The video card through its registers, as a guest's drivers use it.

use crate::tests::Rig;

/// The card of the full machine is in slot 10.
const DEVFN: u8 = 10 << 3;
const FRAME_BUFFER: u64 = 0xE060_0000;

fn rig() -> Rig {
    let mut r = Rig::new();
    r.config_write(DEVFN, 0x10, FRAME_BUFFER as u32);
    r.config_write(DEVFN, 0x18, 0xE070_0000);
    r.config_write(DEVFN, 4, 3);
    r
}

fn indexed(r: &mut Rig, port: u16, index: u8, value: u8) {
    r.outb(port, index);
    r.outb(port + 1, value);
}

fn dispi(r: &mut Rig, index: u16, value: u16) {
    r.outw(0x1CE, index);
    r.outw(0x1CF, value);
}

/// The BIOS' mode 3: 80 columns, 25 rows of text, cells of 9 by 16.
fn text_mode(r: &mut Rig) {
    r.outb(0x3C2, 0x67);
    for (i, v) in [3, 0, 3, 0, 2].into_iter().enumerate() {
        indexed(r, 0x3C4, i as u8, v);
    }
    for (i, v) in [(1, 79), (7, 0x1F), (9, 0x4F), (0x0A, 0x20), (0x12, 0x8F), (0x13, 0x28), (0x17, 0xA3)] {
        indexed(r, 0x3D4, i, v);
    }
    for (i, v) in [(5, 0x10), (6, 0x0E), (8, 0xFF)] {
        indexed(r, 0x3CE, i, v);
    }
    r.inb(0x3DA);
    for i in 0..16 {
        r.outb(0x3C0, i);
        r.outb(0x3C0, i);
    }
    [0x10, 4, 0x12, 15, 0x20].into_iter().for_each(|v| r.outb(0x3C0, v));
    r.outb(0x3C8, 0);
    for colour in 0..64u8 {
        (0..3).for_each(|c| r.outb(0x3C9, if c == 0 { colour } else { 63 - colour }));
    }
}

fn write8(r: &mut Rig, at: u64, value: u8) {
    r.pc.mmio_write(&r.mem, r.now, at, 1, value.into());
}

fn read8(r: &mut Rig, at: u64) -> u8 {
    r.pc.mmio_read(&r.mem, r.now, at, 1) as u8
}

/// Put a character's shape into plane 2, as the BIOS does.
fn load_glyph(r: &mut Rig, code: u8, rows: [u8; 16]) {
    for (port, i, v) in [(0x3C4, 2, 4), (0x3C4, 4, 6), (0x3CE, 5, 0), (0x3CE, 6, 4)] {
        indexed(r, port, i, v);
    }
    for (y, bits) in rows.into_iter().enumerate() {
        write8(r, 0xA_0000 + 32 * u64::from(code) + y as u64, bits);
    }
    for (port, i, v) in [(0x3C4, 2, 3), (0x3C4, 4, 2), (0x3CE, 5, 0x10), (0x3CE, 6, 0x0E)] {
        indexed(r, port, i, v);
    }
}

#[test]
fn text_is_drawn_with_the_font_in_plane_2() {
    let mut r = rig();
    text_mode(&mut r);
    let mut glyph = [0; 16];
    glyph[3] = 0b1000_0001;
    load_glyph(&mut r, b'A', glyph);
    load_glyph(&mut r, 0xC4, [0xFF; 16]);
    // Second row, third column: colour 2 on colour 1; next to it a line that goes on into the ninth column.
    r.pc.mmio_write(&r.mem, r.now, 0xB_8000 + 160 + 4, 4, 0x12C4_1241);
    assert_eq!(read8(&mut r, 0xB_8000 + 164), b'A');
    let screen = r.pc.screen(None).unwrap();
    assert_eq!(&screen.text().unwrap()[1][..5], "  A  ");
    let picture = screen.picture();
    assert_eq!((picture.width, picture.height), (720, 400));
    let at = |x: u32, y: u32| picture.pixels[(y * 720 + x) as usize];
    let colour = |c: u32| {
        let wide = |v: u32| (v << 2) | ((v & 1) * 3);
        wide(c) << 16 | wide(63 - c) << 8 | wide(63 - c)
    };
    let row: Vec<u32> = (18..27).map(|x| at(x, 16 + 3)).collect();
    let mut expected = vec![colour(1); 9];
    (expected[0], expected[7]) = (colour(2), colour(2));
    assert_eq!(row, expected);
    assert_eq!((at(27, 20), at(35, 20)), (colour(2), colour(2)));
    assert_eq!(at(0, 0), colour(0));
}

#[test]
fn planes_are_written_and_compared_through_the_graphics_controller() {
    let mut r = rig();
    text_mode(&mut r);
    for (port, i, v) in [(0x3C4, 2, 15), (0x3C4, 4, 6), (0x3CE, 5, 2), (0x3CE, 6, 5), (0x3CE, 8, 0xFF)] {
        indexed(&mut r, port, i, v);
    }
    // Write mode 2: colour 5 into eight pixels, then colour 10 into the left four, kept by the latch.
    write8(&mut r, 0xA_0000, 5);
    read8(&mut r, 0xA_0000);
    indexed(&mut r, 0x3CE, 8, 0xF0);
    write8(&mut r, 0xA_0000, 10);
    for (plane, seen) in [0x0F, 0xF0, 0x0F, 0xF0].into_iter().enumerate() {
        indexed(&mut r, 0x3CE, 4, plane as u8);
        assert_eq!(read8(&mut r, 0xA_0000), seen, "plane {plane}");
    }
    // Read mode 1: which pixels have colour 10?
    indexed(&mut r, 0x3CE, 5, 8);
    indexed(&mut r, 0x3CE, 2, 10);
    indexed(&mut r, 0x3CE, 7, 15);
    assert_eq!(read8(&mut r, 0xA_0000), 0xF0);
    let picture = r.pc.screen(None).unwrap().picture();
    assert_eq!(picture.width, 640);
    let colours: Vec<u32> = picture.pixels[..8].to_vec();
    assert!(colours[..4].iter().all(|c| *c == colours[0]) && colours[4..].iter().all(|c| *c == colours[4]));
    assert_ne!(colours[0], colours[4]);
}

#[test]
fn the_frame_buffer_is_shown_and_its_bank_is_in_the_window() {
    let mut r = rig();
    r.outw(0x1CE, 0);
    assert_eq!(r.inw(0x1CF), 0xB0C5);
    for (i, v) in [(1, 320), (2, 200), (3, 32), (4, 0x41)] {
        dispi(&mut r, i, v);
    }
    r.inb(0x3DA);
    r.outb(0x3C0, 0x20);
    r.write32(FRAME_BUFFER + 4 * (100 * 320 + 7), 0xFF12_3456);
    // The same memory in bank 1 of the window, and the same registers in memory.
    dispi(&mut r, 5, 1);
    assert_eq!(read8(&mut r, 0xA_0000 + u64::from(4 * (100 * 320 + 7) - 0x1_0000u32)), 0x56);
    assert_eq!(r.read32(0xE070_0500 + 2) & 0xFFFF, 320);
    let picture = r.pc.screen(None).unwrap().picture();
    assert_eq!((picture.width, picture.height), (320, 200));
    assert_eq!(picture.pixels[100 * 320 + 7], 0x12_3456);
    assert_eq!(picture.pixels.iter().filter(|p| **p != 0).count(), 1);
    // More lines than there is memory for are not shown.
    dispi(&mut r, 2, 12_000);
    r.outw(0x1CE, 2);
    assert_eq!(r.inw(0x1CF), 819, "1 MiB of lines of 1280 bytes");
}

#[test]
fn a_loaded_card_shows_the_same_and_a_damaged_state_is_refused() {
    let mut r = rig();
    text_mode(&mut r);
    load_glyph(&mut r, b'x', [0xA5; 16]);
    write8(&mut r, 0xB_8000, b'x');
    write8(&mut r, 0xB_8001, 0x2E);
    let saved = r.pc.save();
    let mut other = rig();
    other.write32(FRAME_BUFFER + 0x8_0000, 1);
    other.pc.load(&saved).unwrap();
    assert_eq!(other.pc.save(), saved);
    let shown = |r: &Rig| r.pc.screen(None).unwrap().picture();
    assert!(shown(&other) == shown(&r));
    for cut in [1, 100, 4096] {
        assert!(rig().pc.load(&saved[..saved.len() - cut]).is_err());
    }
}

#[test]
fn no_registers_make_the_picture_too_large_or_unreadable() {
    let mut r = rig();
    let mut dice = 0x9E37_79B9_7F4A_7C15u64;
    for _ in 0..60 {
        for _ in 0..40 {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (port, index, value) = ((dice >> 60) % 4, (dice >> 40) as u8 & 31, (dice >> 20) as u8);
            match port {
                0 => indexed(&mut r, 0x3C4, index, value),
                1 => indexed(&mut r, 0x3CE, index, value),
                2 => indexed(&mut r, 0x3D4, index, value),
                _ => dispi(&mut r, u16::from(index % 11), (dice >> 16) as u16),
            }
        }
        let picture = r.pc.screen(None).unwrap().picture();
        assert_eq!(picture.pixels.len(), (picture.width * picture.height) as usize);
        assert!(picture.pixels.len() <= 4096 * 8192, "{} by {}", picture.width, picture.height);
    }
}
