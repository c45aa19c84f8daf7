//! USB keyboard, mouse and tablet (USB 2.0, chapter 9; Device Class Definition for HID 1.11; HID Usage Tables 1.12).
//! A device knows nothing of the controller it is behind.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::device::{standard_request, string_descriptor, Stall};
use crate::door::Input;

/// What kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Keyboard,
    Mouse,
    Tablet,
}

/// Reports that wait for the guest at most; then newer movements are put onto the last one.
const MAX_WAITING: usize = 16;
/// The largest coordinate of a tablet.
const MAX_COORDINATE: u16 = 0x7FFF;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    configuration: u8,
    protocol: u8,
    idle: u8,
    remote_wakeup: bool,
    /// The keyboard's lamps, as the guest set them.
    lamps: u8,
    reports: VecDeque<Vec<u8>>,
    /// Modifier keys that are down (a bit each), and the other keys in the order they were pressed.
    modifiers: u8,
    keys: Vec<u8>,
    buttons: u8,
    x: u16,
    y: u16,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hid {
    kind: Kind,
    s: State,
}

const KEYBOARD_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x06, 0xA1, 0x01, // Generic desktop, keyboard, application
    0x75, 0x01, 0x95, 0x08, 0x05, 0x07, 0x19, 0xE0, 0x29, 0xE7, 0x15, 0x00, 0x25, 0x01, 0x81,
    0x02, // modifiers
    0x95, 0x01, 0x75, 0x08, 0x81, 0x01, // a byte that is reserved
    0x95, 0x05, 0x75, 0x01, 0x05, 0x08, 0x19, 0x01, 0x29, 0x05, 0x91, 0x02, // lamps
    0x95, 0x01, 0x75, 0x03, 0x91, 0x01, // padding
    0x95, 0x06, 0x75, 0x08, 0x15, 0x00, 0x25, 0xFF, 0x05, 0x07, 0x19, 0x00, 0x29, 0xFF, 0x81,
    0x00, // six keys
    0xC0,
];

const MOUSE_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x02, 0xA1, 0x01, 0x09, 0x01, 0xA1, 0x00, // mouse, pointer
    0x05, 0x09, 0x19, 0x01, 0x29, 0x05, 0x15, 0x00, 0x25, 0x01, 0x95, 0x05, 0x75, 0x01, 0x81,
    0x02, // buttons
    0x95, 0x01, 0x75, 0x03, 0x81, 0x01, // padding
    0x05, 0x01, 0x09, 0x30, 0x09, 0x31, 0x09, 0x38, // x, y, wheel
    0x15, 0x81, 0x25, 0x7F, 0x75, 0x08, 0x95, 0x03, 0x81, 0x06, // relative
    0xC0, 0xC0,
];

const TABLET_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x02, 0xA1, 0x01, 0x09, 0x01, 0xA1, 0x00, // mouse, pointer
    0x05, 0x09, 0x19, 0x01, 0x29, 0x05, 0x15, 0x00, 0x25, 0x01, 0x95, 0x05, 0x75, 0x01, 0x81,
    0x02, // buttons
    0x95, 0x01, 0x75, 0x03, 0x81, 0x01, // padding
    0x05, 0x01, 0x09, 0x30, 0x09, 0x31, 0x15, 0x00, 0x26, 0xFF, 0x7F, 0x35, 0x00, 0x46, 0xFF,
    0x7F, // x, y
    0x75, 0x10, 0x95, 0x02, 0x81, 0x02, // absolute
    0x05, 0x01, 0x09, 0x38, 0x15, 0x81, 0x25, 0x7F, 0x35, 0x00, 0x45, 0x00, 0x75, 0x08, 0x95, 0x01, 0x81,
    0x06, // wheel
    0xC0, 0xC0,
];

/// HID usages of the keys by number (set 1 code), from 1 on; 0: no such key.
#[rustfmt::skip]
const USAGES: &[u8] = &[
    0x29, 0x1E, 0x1F, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x2D, 0x2E, 0x2A, 0x2B, // esc to tab
    0x14, 0x1A, 0x08, 0x15, 0x17, 0x1C, 0x18, 0x0C, 0x12, 0x13, 0x2F, 0x30, 0x28, 0xE0, // q to enter, control
    0x04, 0x16, 0x07, 0x09, 0x0A, 0x0B, 0x0D, 0x0E, 0x0F, 0x33, 0x34, 0x35, 0xE1, 0x31, // a to quote, shift
    0x1D, 0x1B, 0x06, 0x19, 0x05, 0x11, 0x10, 0x36, 0x37, 0x38, 0xE5, 0x55, 0xE2, 0x2C, 0x39, // z to caps lock
    0x3A, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F, 0x40, 0x41, 0x42, 0x43, 0x53, 0x47, // F1 to F10, locks
    0x5F, 0x60, 0x61, 0x56, 0x5C, 0x5D, 0x5E, 0x57, 0x59, 0x5A, 0x5B, 0x62, 0x63, // keypad
    0, 0, 0x64, 0x44, 0x45, // print with alt, -, less, F11, F12
];

/// The same of keys behind 0xE0.
const EXTENDED: &[(u8, u8)] = &[
    (0x1C, 0x58),
    (0x1D, 0xE4),
    (0x35, 0x54),
    (0x37, 0x46),
    (0x38, 0xE6),
    (0x46, 0x48),
    (0x47, 0x4A),
    (0x48, 0x52),
    (0x49, 0x4B),
    (0x4B, 0x50),
    (0x4D, 0x4F),
    (0x4F, 0x4D),
    (0x50, 0x51),
    (0x51, 0x4E),
    (0x52, 0x49),
    (0x53, 0x4C),
    (0x5B, 0xE3),
    (0x5C, 0xE7),
    (0x5D, 0x65),
];

fn usage(number: u8) -> Option<u8> {
    let code = number & 0x7F;
    let found = match number & 0x80 {
        0 => USAGES.get(usize::from(code.checked_sub(1)?)).copied(),
        _ => EXTENDED.iter().find(|(c, _)| *c == code).map(|(_, u)| *u),
    };
    found.filter(|u| *u != 0)
}

impl Hid {
    pub fn new(kind: Kind) -> Hid {
        Hid { kind, s: State { protocol: 1, ..State::default() } }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// A bus reset: not configured, nothing waits. What is held down stays down.
    pub fn reset(&mut self) {
        let State { modifiers, keys, buttons, x, y, .. } = std::mem::take(&mut self.s);
        self.s = State { protocol: 1, modifiers, keys, buttons, x, y, ..State::default() };
    }

    /// Whether the guest lets the device wake it.
    pub fn may_wake(&self) -> bool {
        self.s.remote_wakeup
    }

    fn report_descriptor(&self) -> &'static [u8] {
        match self.kind {
            Kind::Keyboard => KEYBOARD_REPORT,
            Kind::Mouse => MOUSE_REPORT,
            Kind::Tablet => TABLET_REPORT,
        }
    }

    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Keyboard => "Keyboard",
            Kind::Mouse => "Mouse",
            Kind::Tablet => "Tablet",
        }
    }

    fn hid_descriptor(&self) -> Vec<u8> {
        let len = (self.report_descriptor().len() as u16).to_le_bytes();
        vec![9, 0x21, 0x11, 0x01, 0, 1, 0x22, len[0], len[1]]
    }

    fn descriptor(&self, kind: u8, index: u8) -> Result<Vec<u8>, Stall> {
        Ok(match (kind, index) {
            // Device: USB 2.0, 64 bytes at endpoint 0, 0627:0001, three strings, one configuration.
            (1, _) => {
                let mut d = vec![18, 1, 0, 2, 0, 0, 0, 64];
                d.extend([0x27, 0x06, 0x01, 0x00, 0, 0, 1, 2, 3, 1]);
                d
            }
            (2, 0) => {
                let (subclass, protocol, size): (u8, u8, u8) = match self.kind {
                    Kind::Keyboard => (1, 1, 8),
                    Kind::Mouse => (1, 2, 4),
                    Kind::Tablet => (0, 0, 8),
                };
                let hid = self.hid_descriptor();
                // Configuration (bus power, remote wake-up, 100 mA), interface, HID, endpoint 1 in every 8 microframes.
                let mut d = vec![9, 2, 0, 0, 1, 1, 4, 0xA0, 50];
                d.extend([9, 4, 0, 0, 1, 3, subclass, protocol, 0]);
                d.extend(hid);
                d.extend([7, 5, 0x81, 3, size, 0, 4]);
                d[2] = d.len() as u8;
                d
            }
            (3, 0) => vec![4, 3, 0x09, 0x04],
            (3, n) => {
                let text = match n {
                    1 => "QEMU".to_owned(),
                    2 => format!("QEMU USB {}", self.name()),
                    3 => "42".to_owned(),
                    4 => format!("HID {}", self.name()),
                    _ => return Err(Stall),
                };
                string_descriptor(&text)
            }
            _ => return Err(Stall),
        })
    }

    /// A request to endpoint 0 (9.3): what is read, at most as much as asked for.
    pub fn control(&mut self, setup: [u8; 8], data: &[u8]) -> Result<Vec<u8>, Stall> {
        let [kind, request, low, high, ..] = setup;
        let mut reply = match (kind, request) {
            (0x80, 0) => vec![u8::from(self.s.remote_wakeup) << 1, 0],
            (0x00, 1 | 3) if low == 1 => {
                self.s.remote_wakeup = request == 3;
                Vec::new()
            }
            (0x80, 6) => self.descriptor(high, low)?,
            // Of this class (HID 1.11, 7.1 and 7.2).
            (0x81, 6) if high == 0x21 => self.hid_descriptor(),
            (0x81, 6) if high == 0x22 => self.report_descriptor().to_vec(),
            (0xA1, 1) => self.report(0),
            (0xA1, 2) => vec![self.s.idle],
            (0xA1, 3) => vec![self.s.protocol],
            (0x21, 9) => {
                self.s.lamps = data.first().copied().unwrap_or(0);
                Vec::new()
            }
            (0x21, 10) => {
                self.s.idle = high;
                Vec::new()
            }
            (0x21, 11) => {
                self.s.protocol = low & 1;
                Vec::new()
            }
            _ => standard_request(setup, &mut self.s.configuration).ok_or(Stall)?,
        };
        reply.truncate(usize::from(u16::from_le_bytes([setup[6], setup[7]])));
        Ok(reply)
    }

    /// What endpoint 1 has to say.
    pub fn poll(&mut self) -> Option<Vec<u8>> {
        self.s.reports.pop_front()
    }

    /// The state as a report, the wheel turned by `wheel`.
    fn report(&self, wheel: i8) -> Vec<u8> {
        match self.kind {
            Kind::Keyboard => {
                let mut r = vec![0; 8];
                r[0] = self.s.modifiers;
                if self.s.keys.len() > 6 {
                    // Roll-over.
                    r[2..].fill(1);
                } else {
                    r[2..2 + self.s.keys.len()].copy_from_slice(&self.s.keys);
                }
                r
            }
            Kind::Mouse => vec![self.s.buttons, 0, 0, wheel as u8],
            Kind::Tablet => {
                let ([x0, x1], [y0, y1]) = (self.s.x.to_le_bytes(), self.s.y.to_le_bytes());
                vec![self.s.buttons, x0, x1, y0, y1, wheel as u8]
            }
        }
    }

    fn push(&mut self, report: Vec<u8>) {
        if self.s.reports.len() < MAX_WAITING {
            self.s.reports.push_back(report);
        } else if let Some(last) = self.s.reports.back_mut() {
            *last = report;
        }
    }

    /// Something comes in from outside; whether there is a new report.
    pub fn input(&mut self, input: &Input) -> bool {
        // Nobody asks a device that is not configured; what it is told still counts.
        let ready = self.s.configuration != 0;
        match (self.kind, input) {
            (Kind::Keyboard, Input::Key { number, down }) => {
                let Some(usage) = usage(*number) else { return false };
                if let modifier @ 0xE0..=0xE7 = usage {
                    let bit = 1 << (modifier & 7);
                    self.s.modifiers = self.s.modifiers & !bit | if *down { bit } else { 0 };
                } else {
                    self.s.keys.retain(|k| *k != usage);
                    if *down {
                        self.s.keys.push(usage);
                    }
                }
                if ready {
                    self.push(self.report(0));
                }
            }
            (Kind::Mouse, Input::Pointer { dx, dy, wheel, press, release, .. }) => {
                let before = self.s.buttons;
                self.s.buttons = self.s.buttons & !release | press & 0x1F;
                // Long ways are gone in steps.
                let (mut dx, mut dy, mut wheel) = (*dx, *dy, *wheel);
                let mut first = self.s.buttons != before;
                while ready && (first || dx != 0 || dy != 0 || wheel != 0) {
                    let step = |left: &mut i16| {
                        let now = (*left).clamp(-127, 127);
                        *left -= now;
                        now as i8 as u8
                    };
                    let (x, y) = (step(&mut dx), step(&mut dy));
                    self.push(vec![self.s.buttons, x, y, std::mem::take(&mut wheel) as u8]);
                    first = false;
                }
            }
            (Kind::Tablet, Input::Pointer { x, y, wheel, press, release, .. }) => {
                self.s.buttons = self.s.buttons & !release | press & 0x1F;
                self.s.x = x.unwrap_or(self.s.x).min(MAX_COORDINATE);
                self.s.y = y.unwrap_or(self.s.y).min(MAX_COORDINATE);
                if ready {
                    self.push(self.report(*wheel));
                }
            }
            _ => return false,
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(kind: Kind) -> Hid {
        let mut d = Hid::new(kind);
        d.control([0, 9, 1, 0, 0, 0, 0, 0], &[]).unwrap();
        d
    }

    #[test]
    fn every_key_number_has_its_usage() {
        assert_eq!(usage(0x1E), Some(0x04), "a");
        assert_eq!(usage(0x39), Some(0x2C), "space");
        assert_eq!(usage(0x58), Some(0x45), "F12");
        assert_eq!(usage(0x53), Some(0x63), "keypad's point");
        assert_eq!(usage(0xD3), Some(0x4C), "delete");
        assert_eq!(usage(0), None);
        assert_eq!(usage(0x54), None);
    }

    #[test]
    fn a_keyboard_reports_what_is_held_down() {
        let mut k = configured(Kind::Keyboard);
        for (number, down) in [(0x2A, true), (0x1E, true), (0x1E, false), (0x2A, false)] {
            assert!(k.input(&Input::Key { number, down }));
        }
        let reports: Vec<_> = std::iter::from_fn(|| k.poll()).map(|r| (r[0], r[2])).collect();
        assert_eq!(reports, [(2, 0), (2, 4), (2, 0), (0, 0)]);
    }

    #[test]
    fn a_tablet_says_where_it_is_and_a_mouse_how_far_it_went() {
        let point = |x, y, dx, press| Input::Pointer { x, y, dx, dy: 0, wheel: 0, press, release: 0 };
        let mut t = configured(Kind::Tablet);
        t.input(&point(Some(0x1234), Some(0xFFFF), 0, 1));
        assert_eq!(t.poll(), Some(vec![1, 0x34, 0x12, 0xFF, 0x7F, 0]));
        let mut m = configured(Kind::Mouse);
        m.input(&point(None, None, -200, 0));
        assert_eq!(m.poll(), Some(vec![0, (-127i8) as u8, 0, 0]));
        assert_eq!(m.poll(), Some(vec![0, (-73i8) as u8, 0, 0]));
        assert_eq!(m.poll(), None);
    }

    #[test]
    fn descriptors_have_the_lengths_they_name() {
        for kind in [Kind::Keyboard, Kind::Mouse, Kind::Tablet] {
            let mut d = Hid::new(kind);
            let mut get =
                |high: u8, low: u8, k: u8| d.control([k, 6, low, high, 0, 0, 0xFF, 0], &[]).unwrap();
            assert_eq!(get(1, 0, 0x80).len(), 18);
            let all = get(2, 0, 0x80);
            assert_eq!(all.len(), usize::from(all[2]));
            assert_eq!(all[25..27], (get(0x22, 0, 0x81).len() as u16).to_le_bytes());
            assert_eq!(get(3, 2, 0x80).len(), usize::from(get(3, 2, 0x80)[0]));
        }
        assert_eq!(Hid::new(Kind::Mouse).control([0x80, 6, 0, 6, 0, 0, 10, 0], &[]), Err(Stall));
    }
}
