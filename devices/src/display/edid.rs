//! What a monitor tells of itself (VESA E-EDID 1.4), for a monitor of any size.

/// Bytes of the one block that there is.
pub const SIZE: usize = 128;

/// Where the four descriptors are, of 18 bytes each.
const DESCRIPTORS: [usize; 4] = [54, 72, 90, 108];
/// The largest width and height that a detailed timing can say.
const MOST: u32 = 4095;
/// Blanking as VESA's CVT has it for flat panels, in pixels: all of it, in front of the pulse, the pulse.
const BLANK: (u32, u32, u32) = (160, 48, 32);
/// The same in lines, but for the whole: front porch and pulse.
const LINES: (u32, u32) = (3, 6);
/// Vertical blanking takes at least 460 us of the 16,667 us of a frame at 60 Hz.
const BLANK_US: u32 = 460;
const FRAME_US: u32 = 16_667;

/// Sizes among VESA's standard ones that are offered, as far as they fit: established timings (byte and bit), all at 60 Hz.
const ESTABLISHED: [(u32, u32, usize, u8); 3] = [(640, 480, 35, 5), (800, 600, 35, 0), (1024, 768, 36, 3)];
/// And standard timings: their aspect ratio's number.
const STANDARD: [(u32, u32, u8); 8] = [
    (1920, 1080, 3),
    (1920, 1200, 0),
    (1680, 1050, 0),
    (1600, 1200, 1),
    (1440, 900, 0),
    (1280, 1024, 2),
    (1280, 960, 1),
    (1280, 720, 3),
];

/// The description of a monitor that prefers `width` by `height` pixels. The larger ones that cannot be said here prefer
/// nothing.
pub fn describe(width: u32, height: u32) -> [u8; SIZE] {
    let mut e = [0; SIZE];
    e[..8].copy_from_slice(&[0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0]);
    // Manufacturer "RHT" (five bits a letter), product, week and year, version: as QEMU's monitor says.
    e[8..12].copy_from_slice(&[0x49, 0x14, 0x34, 0x12]);
    e[16..20].copy_from_slice(&[42, (2014 - 1990) as u8, 1, 4]);
    // Digital, 8 bits a colour, DisplayPort; size in cm at 100 dots an inch; gamma 2.2; sRGB, the first timing preferred.
    let cm = |pixels: u32| (pixels * 254 / 10_000).min(255) as u8;
    e[20..25].copy_from_slice(&[0xA5, cm(width), cm(height), 120, 0x06]);
    // The chromaticity of sRGB (IEC 61966-2-1), in parts of 1024.
    e[25..35].copy_from_slice(&[0xEE, 0x91, 0xA3, 0x54, 0x4C, 0x99, 0x26, 0x0F, 0x50, 0x54]);
    for (w, h, byte, bit) in ESTABLISHED {
        if w <= width && h <= height {
            e[byte] |= 1 << bit;
        }
    }
    let mut fitting = STANDARD.iter().filter(|(w, h, _)| *w <= width && *h <= height);
    for at in (38..54).step_by(2) {
        // 1, 1: nothing.
        let said = fitting.next().map_or([1, 1], |(w, _, aspect)| [(w / 8 - 31) as u8, aspect << 6]);
        e[at..at + 2].copy_from_slice(&said);
    }
    for at in DESCRIPTORS {
        // Nothing, until it is something.
        e[at + 3] = 0x10;
    }
    let mut free = DESCRIPTORS.into_iter();
    let mut put = |bytes: &[u8]| {
        if let Some(at) = free.next() {
            e[at..at + bytes.len()].copy_from_slice(bytes);
        }
    };
    if (64..=MOST).contains(&width) && (64..=MOST).contains(&height) {
        put(&timing(width, height));
    }
    // Ranges: 50 to 125 Hz, 30 to 160 kHz, 650 MHz; no secondary timing.
    put(&[0, 0, 0, 0xFD, 0, 50, 125, 30, 160, 65, 1, b'\n', b' ', b' ', b' ', b' ', b' ', b' ']);
    put(b"\0\0\0\xFC\0QEMU Monitor\n");
    let sum = e.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    e[SIZE - 1] = sum.wrapping_neg();
    e
}

/// A detailed timing (3.10.2) at about 60 Hz.
fn timing(width: u32, height: u32) -> [u8; 18] {
    let (blank, front, pulse) = BLANK;
    let lines = (BLANK_US * height / (FRAME_US - BLANK_US) + 1).max(LINES.0 + LINES.1 + 6);
    // In units of 10 kHz.
    let clock = ((width + blank) * (height + lines) * 6 / 1000).min(0xFFFF);
    let mm = |pixels: u32| pixels * 254 / 1000;
    let high = |a: u32, b: u32| ((a >> 8) << 4 | b >> 8) as u8;
    let mut d = [0; 18];
    d[..2].copy_from_slice(&(clock as u16).to_le_bytes());
    d[2..5].copy_from_slice(&[width as u8, blank as u8, high(width, blank)]);
    d[5..8].copy_from_slice(&[height as u8, lines as u8, high(height, lines)]);
    d[8..11].copy_from_slice(&[front as u8, pulse as u8, (LINES.0 << 4 | LINES.1) as u8]);
    d[12..15].copy_from_slice(&[mm(width) as u8, mm(height) as u8, high(mm(width), mm(height))]);
    // Digital, separate pulses, of which the horizontal one is positive.
    d[17] = 0x1A;
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_says_its_size_and_the_sum_is_zero() {
        for (width, height) in [(1280, 800), (640, 480), (1920, 1080), (4095, 4095), (64, 64)] {
            let e = describe(width, height);
            assert_eq!(e.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            let d = &e[54..72];
            let pair = |low: usize, high: usize, shift: u8| {
                u32::from(d[low]) | u32::from(d[high] >> shift & 15) << 8
            };
            assert_eq!((pair(2, 4, 4), pair(5, 7, 4)), (width, height));
            // The frame rate that a driver works out.
            let clock = u64::from(u16::from_le_bytes([d[0], d[1]])) * 10_000;
            let frame = u64::from(width + pair(3, 4, 0)) * u64::from(height + pair(6, 7, 0));
            let hertz = (clock * 10 / frame + 5) / 10;
            assert!(clock == 655_350_000 || hertz == 60, "{width}x{height} at {hertz} Hz");
        }
    }

    #[test]
    fn what_cannot_be_said_is_left_out() {
        let e = describe(10_000, 2000);
        assert_eq!(e[54..58], [0, 0, 0, 0xFD]);
        assert_eq!(describe(640, 480)[35..38], [0x20, 0, 0]);
        assert!(describe(640, 480)[38..54].iter().all(|b| *b == 1));
    }
}
