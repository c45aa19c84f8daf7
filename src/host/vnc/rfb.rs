//! The RFB protocol (RFC 6143): what clients send, and what they are sent. Pure functions of bytes.

pub use ftvm_devices::{Picture, Pointer};

/// Encodings and pseudo-encodings.
pub const RAW: i32 = 0;
pub const DESKTOP_SIZE: i32 = -223;
/// The pointer's shape, for the client to draw.
pub const CURSOR: i32 = -239;
/// Sizes that go both ways (the RFB community's ExtendedDesktopSize).
pub const EXTENDED_SIZE: i32 = -308;
/// QEMU's: key events carry the key's number.
pub const EXTENDED_KEY: i32 = -258;

/// What is wrong with a client's bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RfbError {
    #[error("unknown message {0}")]
    Message(u8),
    #[error("a pixel of {0} bits, which is none of 8, 16 and 32")]
    Pixel(u8),
    #[error("pixels by a colour map")]
    ColourMap,
}

/// How a client wants its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelFormat {
    bits: u8,
    big_endian: bool,
    max: [u16; 3],
    shift: [u8; 3],
}

impl PixelFormat {
    /// What the server offers: 32 bits, blue in the lowest byte.
    pub const OWN: PixelFormat =
        PixelFormat { bits: 32, big_endian: false, max: [255; 3], shift: [16, 8, 0] };

    fn parse(b: &[u8; 16]) -> Result<PixelFormat, RfbError> {
        if !matches!(b[0], 8 | 16 | 32) {
            return Err(RfbError::Pixel(b[0]));
        }
        if b[3] == 0 {
            return Err(RfbError::ColourMap);
        }
        let word = |at: usize| u16::from_be_bytes([b[at], b[at + 1]]);
        let max = [word(4), word(6), word(8)];
        Ok(PixelFormat { bits: b[0], big_endian: b[2] != 0, max, shift: [b[10], b[11], b[12]] })
    }

    fn bytes(&self) -> [u8; 16] {
        let mut b = [0; 16];
        (b[0], b[1], b[2], b[3]) = (self.bits, 24, self.big_endian.into(), 1);
        for i in 0..3 {
            b[4 + 2 * i..6 + 2 * i].copy_from_slice(&self.max[i].to_be_bytes());
            b[10 + i] = self.shift[i];
        }
        b
    }

    /// Append a pixel 0x00RRGGBB.
    fn put(&self, out: &mut Vec<u8>, pixel: u32) {
        if *self == Self::OWN {
            out.extend_from_slice(&pixel.to_le_bytes());
            return;
        }
        let part = |i: usize, v: u32| {
            let scaled = ((v & 0xFF) * u32::from(self.max[i]) + 127) / 255;
            scaled.checked_shl(self.shift[i].into()).unwrap_or(0)
        };
        let value = part(0, pixel >> 16) | part(1, pixel >> 8) | part(2, pixel);
        let n = usize::from(self.bits / 8);
        match self.big_endian {
            true => out.extend_from_slice(&value.to_be_bytes()[4 - n..]),
            false => out.extend_from_slice(&value.to_le_bytes()[..n]),
        }
    }
}

/// A client's message.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    SetPixelFormat(PixelFormat),
    SetEncodings(Vec<i32>),
    /// `incremental`: only what changed.
    UpdateRequest {
        incremental: bool,
    },
    /// A key by X11's number for its symbol.
    Key {
        down: bool,
        symbol: u32,
    },
    /// A key by QEMU's number for it (0x80 added for keys behind 0xE0).
    KeyNumber {
        down: bool,
        number: u32,
    },
    Pointer {
        buttons: u8,
        x: u16,
        y: u16,
    },
    /// The client wants a screen of this size.
    SetDesktopSize {
        width: u16,
        height: u16,
    },
    /// Text that was cut: this many bytes follow, and are of no use.
    CutText {
        bytes: u32,
    },
}

/// The first message in `bytes` and its length; none: it is not all there.
pub fn parse(bytes: &[u8]) -> Result<Option<(Message, usize)>, RfbError> {
    let Some(kind) = bytes.first() else { return Ok(None) };
    let need = match kind {
        0 => 20,
        2 => 4,
        3 => 10,
        4 => 8,
        5 => 6,
        6 => 8,
        251 => 8,
        255 => 12,
        other => return Err(RfbError::Message(*other)),
    };
    if bytes.len() < need {
        return Ok(None);
    }
    let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
    let message = match kind {
        0 => {
            let mut format = [0; 16];
            format.copy_from_slice(&bytes[4..20]);
            Message::SetPixelFormat(PixelFormat::parse(&format)?)
        }
        2 => {
            let need = 4 + 4 * usize::from(word(2));
            if bytes.len() < need {
                return Ok(None);
            }
            let list = (4..need).step_by(4).map(|at| long(at) as i32).collect();
            return Ok(Some((Message::SetEncodings(list), need)));
        }
        3 => Message::UpdateRequest { incremental: bytes[1] != 0 },
        4 => Message::Key { down: bytes[1] != 0, symbol: long(4) },
        5 => Message::Pointer { buttons: bytes[1], x: word(2), y: word(4) },
        6 => Message::CutText { bytes: long(4) },
        251 => {
            // Behind the size come the screens, of 16 bytes each: there is one here, whatever the client says.
            let need = 8 + 16 * usize::from(bytes[6]);
            if bytes.len() < need {
                return Ok(None);
            }
            return Ok(Some((Message::SetDesktopSize { width: word(2), height: word(4) }, need)));
        }
        _ if bytes[1] != 0 => return Err(RfbError::Message(255)),
        _ => Message::KeyNumber { down: word(2) != 0, number: long(8) },
    };
    Ok(Some((message, need)))
}

/// ServerInit: size, pixel format and name.
pub fn server_init(width: u16, height: u16, name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(width.to_be_bytes());
    out.extend(height.to_be_bytes());
    out.extend(PixelFormat::OWN.bytes());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(name.as_bytes());
    out
}

/// The head of a FramebufferUpdate of so many rectangles.
pub fn update(rectangles: u16) -> Vec<u8> {
    let mut out = vec![0, 0];
    out.extend(rectangles.to_be_bytes());
    out
}

/// Append the head of a rectangle: x, y, width, height.
pub fn rectangle(out: &mut Vec<u8>, place: [u16; 4], encoding: i32) {
    place.iter().for_each(|v| out.extend(v.to_be_bytes()));
    out.extend(encoding.to_be_bytes());
}

/// Append an ExtendedDesktopSize rectangle: why it is sent (0: the server changed it, 1: this client asked) and what came
/// of it (0: done, 3: it cannot be, 4: it was passed on), with one screen of all of it.
pub fn extended_size(out: &mut Vec<u8>, why: u16, status: u16, width: u16, height: u16) {
    rectangle(out, [why, status, width, height], EXTENDED_SIZE);
    out.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(width.to_be_bytes());
    out.extend(height.to_be_bytes());
    out.extend([0; 4]);
}

/// Append a pointer's shape; none: it is hidden.
pub fn cursor(out: &mut Vec<u8>, pointer: Option<&Pointer>, format: &PixelFormat) {
    let Some(p) = pointer else { return rectangle(out, [0; 4], CURSOR) };
    rectangle(out, [p.hot.0 as u16, p.hot.1 as u16, p.width as u16, p.height as u16], CURSOR);
    p.pixels.iter().for_each(|pixel| format.put(out, pixel & 0xFF_FFFF));
    // Which pixels are there: a bit each, rows of whole bytes.
    for row in p.pixels.chunks(p.width.max(1) as usize) {
        out.extend(row.chunks(8).map(|eight| {
            eight.iter().enumerate().fold(0u8, |m, (i, pixel)| m | u8::from(pixel >> 31 != 0) << (7 - i))
        }));
    }
}

/// Append rows `from..to` of a picture, raw.
pub fn raw(out: &mut Vec<u8>, picture: &Picture, from: u32, to: u32, format: &PixelFormat) {
    let width = picture.width as usize;
    rectangle(out, [0, from as u16, width as u16, (to - from) as u16], RAW);
    let pixels = picture.pixels.get(from as usize * width..to as usize * width);
    pixels.unwrap_or_default().iter().for_each(|p| format.put(out, *p));
}

/// Bands of rows in which two pictures of one size differ.
pub fn differences(old: &Picture, new: &Picture) -> Vec<(u32, u32)> {
    /// Rows that are looked at together.
    const BAND: u32 = 16;
    let width = new.width as usize;
    let mut out: Vec<(u32, u32)> = Vec::new();
    for from in (0..new.height).step_by(BAND as usize) {
        let to = (from + BAND).min(new.height);
        let rows = from as usize * width..to as usize * width;
        if old.pixels.get(rows.clone()) == new.pixels.get(rows) {
            continue;
        }
        match out.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => out.push((from, to)),
        }
    }
    out
}

/// QEMU's name of the key that has this symbol on a US keyboard.
pub fn key_name(symbol: u32) -> Option<&'static str> {
    const PLAIN: &[(&str, &str)] = &[
        ("`~", "grave_accent"),
        ("1!", "1"),
        ("2@", "2"),
        ("3#", "3"),
        ("4$", "4"),
        ("5%", "5"),
        ("6^", "6"),
        ("7&", "7"),
        ("8*", "8"),
        ("9(", "9"),
        ("0)", "0"),
        ("-_", "minus"),
        ("=+", "equal"),
        ("[{", "bracket_left"),
        ("]}", "bracket_right"),
        ("\\|", "backslash"),
        (";:", "semicolon"),
        ("'\"", "apostrophe"),
        (",<", "comma"),
        (".>", "dot"),
        ("/?", "slash"),
        (" ", "spc"),
    ];
    const LETTERS: [&str; 26] = [
        "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t",
        "u", "v", "w", "x", "y", "z",
    ];
    const FUNCTION: [&str; 12] = ["f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9", "f10", "f11", "f12"];
    const KEYPAD: [&str; 10] =
        ["kp_0", "kp_1", "kp_2", "kp_3", "kp_4", "kp_5", "kp_6", "kp_7", "kp_8", "kp_9"];
    const OTHERS: &[(u32, &str)] = &[
        (0xFF08, "backspace"),
        (0xFF09, "tab"),
        (0xFF0D, "ret"),
        (0xFF14, "scroll_lock"),
        (0xFF1B, "esc"),
        (0xFF50, "home"),
        (0xFF51, "left"),
        (0xFF52, "up"),
        (0xFF53, "right"),
        (0xFF54, "down"),
        (0xFF55, "pgup"),
        (0xFF56, "pgdn"),
        (0xFF57, "end"),
        (0xFF63, "insert"),
        (0xFF67, "menu"),
        (0xFF7F, "num_lock"),
        (0xFF8D, "kp_enter"),
        (0xFFAA, "kp_multiply"),
        (0xFFAB, "kp_add"),
        (0xFFAD, "kp_subtract"),
        (0xFFAE, "kp_decimal"),
        (0xFFAF, "kp_divide"),
        (0xFFE1, "shift"),
        (0xFFE2, "shift_r"),
        (0xFFE3, "ctrl"),
        (0xFFE4, "ctrl_r"),
        (0xFFE5, "caps_lock"),
        (0xFFE9, "alt"),
        (0xFFEA, "alt_r"),
        (0xFE03, "alt_r"),
        (0xFFEB, "meta_l"),
        (0xFFEC, "meta_r"),
        (0xFFFF, "delete"),
    ];
    let entry = |list: &[&'static str], first: u32| list.get(symbol.checked_sub(first)? as usize).copied();
    if let Some(c) = char::from_u32(symbol).filter(char::is_ascii) {
        if c.is_ascii_alphabetic() {
            return LETTERS.get(usize::from(c.to_ascii_lowercase() as u8 - b'a')).copied();
        }
        return PLAIN.iter().find(|(signs, _)| signs.contains(c)).map(|(_, name)| *name);
    }
    let other = OTHERS.iter().find(|(s, _)| *s == symbol).map(|(_, name)| *name);
    other.or_else(|| entry(&FUNCTION, 0xFFBE)).or_else(|| entry(&KEYPAD, 0xFFB0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_whole_or_not_at_all() {
        let bytes = [4, 1, 0, 0, 0, 0, 0xFF, 0x0D];
        assert_eq!(parse(&bytes), Ok(Some((Message::Key { down: true, symbol: 0xFF0D }, 8))));
        (0..8).for_each(|n| assert_eq!(parse(&bytes[..n]), Ok(None)));
        let list = [2, 0, 0, 2, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x21];
        assert_eq!(parse(&list), Ok(Some((Message::SetEncodings(vec![RAW, DESKTOP_SIZE]), 12))));
        assert_eq!(parse(&list[..11]), Ok(None));
        let number = [255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x9C];
        assert_eq!(parse(&number), Ok(Some((Message::KeyNumber { down: false, number: 0x9C }, 12))));
        assert_eq!(parse(&[77]), Err(RfbError::Message(77)));
        let mut size = vec![251, 0, 4, 0, 3, 0, 1, 0];
        assert_eq!(parse(&size), Ok(None));
        size.extend([0; 16]);
        assert_eq!(parse(&size), Ok(Some((Message::SetDesktopSize { width: 1024, height: 768 }, 24))));
    }

    #[test]
    fn a_pointer_has_its_pixels_and_says_which_of_them_are_there() {
        let mut pixels = vec![0xFF11_2233; 9];
        pixels[1] = 0x0044_5566;
        let pointer = Pointer { width: 9, height: 1, hot: (3, 0), pixels };
        let mut out = Vec::new();
        cursor(&mut out, Some(&pointer), &PixelFormat::OWN);
        assert_eq!(out[..12], [0, 3, 0, 0, 0, 9, 0, 1, 0xFF, 0xFF, 0xFF, 0x11]);
        assert_eq!(
            (&out[12..20], &out[48..]),
            (&[0x33, 0x22, 0x11, 0, 0x66, 0x55, 0x44, 0][..], &[0xBF, 0x80][..])
        );
        out.clear();
        cursor(&mut out, None, &PixelFormat::OWN);
        assert_eq!(out, [0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x11]);
    }

    #[test]
    fn pixels_take_the_form_that_the_client_wants() {
        let format = |bits, max: [u16; 3], shift: [u8; 3]| PixelFormat { bits, big_endian: true, max, shift };
        let put = |f: PixelFormat| {
            let mut out = Vec::new();
            f.put(&mut out, 0x00FF_8000);
            out
        };
        assert_eq!(put(PixelFormat::OWN), [0, 0x80, 0xFF, 0]);
        assert_eq!(put(format(16, [31, 63, 31], [11, 5, 0])), [0xFC, 0x00]);
        assert_eq!(put(format(8, [7, 7, 3], [0, 3, 6])), [0b00_100_111]);
        assert_eq!(put(format(32, [255; 3], [200, 8, 0])), [0, 0, 0x80, 0]);
    }

    #[test]
    fn only_what_changed_is_sent() {
        let old = Picture { width: 4, height: 40, pixels: vec![0; 160] };
        let mut new = old.clone();
        assert!(differences(&old, &new).is_empty());
        new.pixels[4 * 39] = 1;
        assert_eq!(differences(&old, &new), [(32, 40)]);
        new.pixels[4 * 20] = 1;
        assert_eq!(differences(&old, &new), [(16, 40)]);
    }

    #[test]
    fn symbols_name_keys_that_there_are() {
        for symbol in (0x20..0x7F).chain(0xFF08..0x1_0000) {
            if let Some(name) = key_name(symbol) {
                assert!(crate::host::keys::by_name(name).is_some(), "{name}");
            }
        }
        assert_eq!(
            (key_name(0x41), key_name(0x3F), key_name(0xFFC9)),
            (Some("a"), Some("slash"), Some("f12"))
        );
    }
}
