//! HDA codecs (High Definition Audio Specification 1.0a, chapter 7), with the widgets that QEMU's have: a converter and a pin
//! for output, the same for input.

use serde::{Deserialize, Serialize};

/// Which codec it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Line out.
    Output,
    /// Line out and line in.
    Duplex,
    /// Speaker and microphone.
    Micro,
}

/// The nodes: root, function group, output converter and pin, input converter and pin.
const ROOT: u8 = 0;
const GROUP: u8 = 1;
const DAC: u8 = 2;
const OUT_PIN: u8 = 3;
const ADC: u8 = 4;
const IN_PIN: u8 = 5;
const NODES: usize = 6;

/// 16 bits at 16, 22.05, 32, 44.1, 48, 88.2 and 96 kHz (7.3.4.7).
const FORMATS: u32 = 1 << 17 | 0x1FC;
/// Mute, 75 steps of 1 dB, 0 dB at the last (7.3.4.10).
const AMPLIFIER: u32 = 1 << 31 | 3 << 16 | 0x4A << 8 | 0x4A;
/// Steps of gain, and the bit that mutes.
const GAIN: u16 = 0x7F;
const MUTE: u16 = 0x80;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Widget {
    /// Stream number and first channel (7.3.3.11).
    stream: u8,
    format: u16,
    pin: u8,
    power: u8,
    unsolicited: u8,
    /// Gain and mute, right and left.
    gain: [u16; 2],
}

/// A codec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Codec {
    kind: Kind,
    widgets: [Widget; NODES],
}

impl Codec {
    pub fn new(kind: Kind) -> Codec {
        let mut codec = Codec { kind, widgets: Default::default() };
        codec.reset();
        codec
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Power-on.
    pub fn reset(&mut self) {
        self.widgets = Default::default();
        self.widgets[usize::from(OUT_PIN)].pin = 0x40;
        self.widgets[usize::from(IN_PIN)].pin = 0x20;
        for n in [DAC, ADC] {
            self.widgets[usize::from(n)].gain = [0x4A; 2];
        }
    }

    fn last(&self) -> u8 {
        match self.kind {
            Kind::Output => OUT_PIN,
            _ => IN_PIN,
        }
    }

    /// Vendor and device.
    fn identity(&self) -> u32 {
        0x1AF4_0000
            | match self.kind {
                Kind::Output => 0x12,
                Kind::Duplex => 0x22,
                Kind::Micro => 0x32,
            }
    }

    /// The response to a command: node, verb and payload (7.3).
    pub fn command(&mut self, node: u8, verb: u32) -> u32 {
        if node > self.last() {
            return 0;
        }
        let (long, short) = (verb >> 16 & 15, verb >> 8 & 0xFFF);
        let (word, byte) = (verb as u16, verb as u8);
        let w = &mut self.widgets[usize::from(node)];
        match long {
            0x2 => {
                w.format = word;
                return 0;
            }
            0x3 => {
                let value = word & (MUTE | GAIN);
                if word & 0x1000 != 0 {
                    w.gain[0] = value;
                }
                if word & 0x2000 != 0 {
                    w.gain[1] = value;
                }
                return 0;
            }
            0xA => return w.format.into(),
            0xB => return w.gain[usize::from(word >> 13 & 1)].into(),
            _ => {}
        }
        match short {
            0xF00 => self.parameter(node, byte),
            0xF02 => u32::from(match (node, byte) {
                (OUT_PIN, 0) => DAC,
                (ADC, 0) => IN_PIN,
                _ => 0,
            }),
            0xF05 => u32::from(w.power) << 4 | u32::from(w.power),
            0x705 => {
                w.power = byte & 15;
                0
            }
            0xF06 => w.stream.into(),
            0x706 => {
                w.stream = byte;
                0
            }
            0xF07 => w.pin.into(),
            0x707 => {
                w.pin = byte;
                0
            }
            0xF08 => w.unsolicited.into(),
            0x708 => {
                w.unsolicited = byte;
                0
            }
            // Something is plugged in.
            0xF09 if matches!(node, OUT_PIN | IN_PIN) => 0x8000_0000,
            0xF1C => self.configuration(node),
            0xF20 => self.identity(),
            0x7FF if node == GROUP => {
                self.reset();
                0
            }
            _ => 0,
        }
    }

    /// What a pin is (7.3.3.31).
    fn configuration(&self, node: u8) -> u32 {
        match (node, self.kind) {
            // A fixed speaker and microphone, or jacks: green line out, blue line in.
            (OUT_PIN, Kind::Micro) => 2 << 30 | 1 << 20 | 4 << 12 | 0x10,
            (IN_PIN, Kind::Micro) => 2 << 30 | 0xA << 20 | 5 << 12 | 0x20,
            (OUT_PIN, _) => 1 << 16 | 4 << 12 | 0x10,
            (IN_PIN, _) => 8 << 20 | 1 << 16 | 3 << 12 | 0x20,
            _ => 0,
        }
    }

    fn parameter(&self, node: u8, id: u8) -> u32 {
        const STEREO: u32 = 1;
        const LIST: u32 = 1 << 8;
        const OWN: u32 = 1 << 4 | 1 << 3;
        match (node, id) {
            (ROOT, 0x00) => self.identity(),
            (ROOT, 0x02) => 0x0010_0101,
            (ROOT, 0x04) => u32::from(GROUP) << 16 | 1,
            (GROUP, 0x04) => u32::from(DAC) << 16 | u32::from(self.last() - GROUP),
            (GROUP, 0x05) => 1,
            // Widget capabilities (7.3.4.6): kind, and what the widget has of its own.
            (DAC, 0x09) => OWN | 1 << 2 | STEREO,
            (OUT_PIN, 0x09) => 4 << 20 | LIST | STEREO,
            (ADC, 0x09) => 1 << 20 | LIST | OWN | 1 << 1 | STEREO,
            (IN_PIN, 0x09) => 4 << 20 | STEREO,
            (GROUP | DAC | ADC, 0x0A) => FORMATS,
            (GROUP | DAC | ADC, 0x0B) => 1,
            (OUT_PIN, 0x0C) => 1 << 4,
            (IN_PIN, 0x0C) => 1 << 5,
            (ADC, 0x0D) | (DAC, 0x12) => AMPLIFIER,
            (OUT_PIN | ADC, 0x0E) => 1,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_finds_converters_and_pins() {
        let mut c = Codec::new(Kind::Duplex);
        let mut get = |node: u8, id: u32| c.command(node, 0xF0000 | id);
        assert_eq!((get(0, 0), get(0, 4)), (0x1AF4_0022, 0x1_0001));
        assert_eq!((get(1, 4), get(1, 5)), (0x2_0004, 1));
        assert_eq!((2..6).map(|n| get(n, 9) >> 20).collect::<Vec<_>>(), [0, 4, 1, 4]);
        assert_eq!(get(6, 9), 0, "no such node");
        assert_eq!(Codec::new(Kind::Output).command(1, 0xF0004), 0x2_0002);
    }

    #[test]
    fn settings_are_kept_until_a_reset() {
        let mut c = Codec::new(Kind::Duplex);
        for (set, get, value) in
            [(0x70610, 0xF0600, 0x10), (0x24011, 0xA0000, 0x4011), (0x3B020, 0xB2000, 0x20)]
        {
            assert_eq!(c.command(2, set), 0);
            assert_eq!(c.command(2, get), value, "{set:x}");
        }
        c.command(1, 0x7FF00);
        assert_eq!((c.command(2, 0xF0600), c.command(2, 0xB2000)), (0, 0x4A));
    }
}
