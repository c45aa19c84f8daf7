//! The card through its queues, as a guest's driver uses it.

use crate::config::PcConfig;
use crate::display::{Picture, Screen};
use crate::door::Input;
use crate::tests::{device, Rig};

const DEVFN: u8 = 2 << 3;
const BAR: u64 = 0xE000_0000;
/// Where a virtio-vga has its structures.
const COMMON: u64 = BAR + 0x1000;
const CONFIG: u64 = BAR + 0x2000;
const NOTIFY: u64 = BAR + 0x3000;
/// The rings of queue n, a command and its answer.
const RINGS: [u64; 2] = [0x1_0000, 0x1_4000];
const COMMAND: u64 = 0x2_0000;
const ANSWER: u64 = 0x8_0000;
/// What the guest draws in.
const BACKING: u64 = 0x20_0000;

const OK: u32 = 0x1100;
const UNSPECIFIED: u32 = 0x1200;
const OUT_OF_MEMORY: u32 = 0x1201;
const SCANOUT_ID: u32 = 0x1202;
const RESOURCE_ID: u32 = 0x1203;
const PARAMETER: u32 = 0x1205;

struct Card {
    r: Rig,
    used: [u16; 2],
}

fn machine(properties: &[(&str, &str)]) -> Rig {
    Rig::of(PcConfig {
        ram_size: 16 << 20,
        cpus: 1,
        devices: vec![device("virtio-vga", properties)],
        ..PcConfig::default()
    })
}

impl Card {
    fn new(properties: &[(&str, &str)]) -> Card {
        let mut card = Card { r: machine(properties), used: [0; 2] };
        card.start();
        card
    }

    fn write(&mut self, at: u64, size: u8, value: u64) {
        self.r.pc.mmio_write(&self.r.mem, self.r.now, at, size, value);
    }

    /// What a driver does first.
    fn start(&mut self) {
        self.used = [0; 2];
        for (offset, value) in [(0x18, BAR as u32), (0x1C, 0), (0x10, 0xE100_0000), (4, 7)] {
            self.r.config_write(DEVFN, offset, value);
        }
        self.write(COMMON + 20, 1, 3);
        for (half, features) in [(0, 2), (1, 1)] {
            self.write(COMMON + 8, 4, half);
            self.write(COMMON + 12, 4, features);
        }
        self.write(COMMON + 20, 1, 11);
        for (n, rings) in RINGS.into_iter().enumerate() {
            self.r.mem.write(rings, &[0; 0x4000]).unwrap();
            self.write(COMMON + 22, 2, n as u64);
            for (at, address) in [(32, rings), (40, rings + 0x1000), (48, rings + 0x2000)] {
                self.write(COMMON + at, 8, address);
            }
            self.write(COMMON + 24, 2, 16);
            self.write(COMMON + 28, 2, 1);
        }
        self.write(COMMON + 20, 1, 15);
    }

    /// Put bytes into a queue; what came back.
    fn put(&mut self, queue: usize, command: &[u8]) -> Vec<u8> {
        let rings = RINGS[queue];
        self.r.mem.write(COMMAND, command).unwrap();
        for (i, (at, len, flags, next)) in
            [(COMMAND, command.len() as u32, 1u16, 1u16), (ANSWER, 0x1000, 2, 0)].into_iter().enumerate()
        {
            let mut d = at.to_le_bytes().to_vec();
            d.extend(len.to_le_bytes());
            d.extend(flags.to_le_bytes());
            d.extend(next.to_le_bytes());
            self.r.mem.write(rings + 16 * i as u64, &d).unwrap();
        }
        let n = self.used[queue];
        self.r.mem.write(rings + 0x1004 + 2 * u64::from(n % 16), &[0; 2]).unwrap();
        self.r.mem.write(rings + 0x1002, &(n + 1).to_le_bytes()).unwrap();
        self.write(NOTIFY + 4 * queue as u64, 2, queue as u64);
        let mut used = [0; 8];
        self.r.mem.read(rings + 0x2004 + 8 * u64::from(n % 16), &mut used).unwrap();
        let mut index = [0; 2];
        self.r.mem.read(rings + 0x2002, &mut index).unwrap();
        assert_eq!(u16::from_le_bytes(index), n + 1, "the command came back");
        self.used[queue] = n + 1;
        let mut answer = vec![0; u32::from_le_bytes([used[4], used[5], used[6], used[7]]) as usize];
        self.r.mem.read(ANSWER, &mut answer).unwrap();
        answer
    }

    fn words(&mut self, queue: usize, kind: u32, words: &[u32]) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.resize(24, 0);
        words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
        self.put(queue, &bytes)
    }

    /// A command with these words behind its header; the type of its answer.
    fn say(&mut self, kind: u32, words: &[u32]) -> u32 {
        word(&self.words(0, kind, words), 0)
    }

    fn create(&mut self, id: u32, format: u32, width: u32, height: u32) -> u32 {
        self.say(0x101, &[id, format, width, height])
    }

    /// Back a picture by pages that lie apart, in the wrong order.
    fn attach(&mut self, id: u32, pages: u32) -> u32 {
        let mut words = vec![id, pages];
        (0..pages).for_each(|n| words.extend([(BACKING as u32) + (pages - 1 - n) * 0x2000, 0, 0x1000, 0]));
        self.say(0x106, &words)
    }

    /// Draw a byte of a picture that is backed so.
    fn draw(&mut self, pages: u64, at: u64, bytes: &[u8]) {
        for (at, b) in (at..).zip(bytes) {
            let place = BACKING + (pages - 1 - at / 0x1000) * 0x2000 + at % 0x1000;
            self.r.mem.write(place, &[*b]).unwrap();
        }
    }

    fn screen(&self) -> &dyn Screen {
        self.r.pc.screen(None).unwrap()
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[test]
fn a_driver_learns_of_its_monitor() {
    let mut c = Card::new(&[("xres", "1024"), ("yres", "768"), ("max_outputs", "2")]);
    assert_eq!(c.r.config_read(DEVFN, 0), 0x1050_1AF4);
    assert_eq!(c.r.config_read(DEVFN, 8) >> 8, 0x03_0000);
    assert_eq!([0, 4, 8, 12].map(|at| c.r.read32(CONFIG + at)), [0, 0, 2, 0]);
    let info = c.words(0, 0x100, &[]);
    assert_eq!((word(&info, 0), info.len()), (0x1101, 408));
    assert_eq!([24, 28, 32, 36, 40].map(|at| word(&info, at)), [0, 0, 1024, 768, 1]);
    assert!(info[48..].iter().all(|b| *b == 0), "the second output has no monitor");
    let edid = c.words(0, 0x10A, &[0, 0]);
    assert_eq!((word(&edid, 0), word(&edid, 24), edid.len()), (0x1104, 128, 24 + 8 + 1024));
    assert_eq!(edid[32..160], crate::display::edid::describe(1024, 768));
    assert_eq!(c.say(0x10A, &[2, 0]), PARAMETER);
    // A fence comes back with its number and context.
    let mut fenced = vec![0, 1, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0];
    let answer = c.put(0, &fenced);
    assert_eq!(answer[4..20], fenced[4..20]);
    fenced[4] = 0;
    assert_eq!(c.put(0, &fenced)[4..24], [0; 20]);
}

#[test]
fn the_picture_is_what_the_guest_drew_wherever_its_memory_lies_and_a_vga_before_and_after() {
    let mut c = Card::new(&[]);
    let vga = c.screen().picture();
    assert!(!(vga.width == 40 && vga.height == 30));
    // 64 by 48 pixels are three pages.
    assert_eq!((c.create(7, 2, 64, 48), c.attach(7, 3)), (OK, OK));
    for y in 0..48u64 {
        for x in 0..64u64 {
            c.draw(3, (y * 64 + x) * 4, &[x as u8, y as u8, 0x80, 0xFF]);
        }
    }
    assert_eq!(c.say(0x105, &[0, 0, 64, 48, 0, 0, 7, 0]), OK);
    assert!(!c.screen().takes_size(), "nothing is shown: the VGA is");
    // A part of it is shown.
    assert_eq!(c.say(0x103, &[8, 10, 40, 30, 0, 7]), OK);
    let pixel = |x: u32, y: u32| 0x80 << 16 | y << 8 | x;
    let wanted: Vec<u32> = (10..40).flat_map(|y| (8..48).map(move |x| pixel(x, y))).collect();
    let mut wanted = Picture { width: 40, height: 30, pixels: wanted };
    assert_eq!(c.screen().picture(), wanted);
    // What is drawn later is there when it was copied, and only the part that was.
    c.draw(3, (20 * 64 + 20) * 4, &[1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(c.screen().picture(), wanted);
    let before = c.screen().changes();
    let offset = (20 * 64 + 20) * 4;
    assert_eq!(c.say(0x105, &[20, 20, 1, 2, offset, 0, 7, 0]), OK);
    assert_eq!(c.say(0x104, &[20, 20, 1, 2, 7, 0]), OK);
    assert_ne!(c.screen().changes(), before);
    wanted.pixels[10 * 40 + 12] = 0x03_0201;
    assert_eq!(c.screen().picture(), wanted);
    c.r.migrate();
    assert_eq!(c.screen().picture(), wanted);
    // The driver goes on there.
    assert_eq!(c.say(0x105, &[21, 20, 1, 1, offset + 4, 0, 7, 0]), OK);
    wanted.pixels[10 * 40 + 13] = 0x07_0605;
    assert_eq!(c.screen().picture(), wanted);
    // Off, and gone with its picture.
    assert_eq!(c.say(0x103, &[0, 0, 0, 0, 0, 0]), OK);
    assert_eq!(c.screen().picture(), Picture::black(640, 480));
    assert_eq!((c.say(0x103, &[0, 0, 64, 48, 0, 7]), c.say(0x102, &[7, 0])), (OK, OK));
    assert_eq!(c.screen().picture(), Picture::black(640, 480));
    c.write(COMMON + 20, 1, 0);
    assert_eq!(c.screen().picture(), vga);
}

#[test]
fn every_format_has_its_order_of_bytes() {
    let mut c = Card::new(&[]);
    for (format, wanted) in [
        (1, 0x03_0201),
        (2, 0x03_0201),
        (3, 0x02_0304),
        (4, 0x02_0304),
        (67, 0x01_0203),
        (134, 0x01_0203),
        (68, 0x04_0302),
        (121, 0x04_0302),
    ] {
        assert_eq!((c.create(1, format, 16, 16), c.attach(1, 1)), (OK, OK));
        c.draw(1, 0, &[1, 2, 3, 4]);
        assert_eq!(c.say(0x105, &[0, 0, 16, 16, 0, 0, 1, 0]), OK);
        assert_eq!(c.say(0x103, &[0, 0, 16, 16, 0, 1]), OK);
        assert_eq!(c.screen().picture().pixels[0], wanted, "format {format}");
        assert_eq!(c.say(0x102, &[1, 0]), OK);
    }
}

#[test]
fn what_a_driver_may_not_is_refused_as_the_specification_says() {
    let mut c = Card::new(&[("max_hostmem", "1M")]);
    assert_eq!((c.create(1, 1, 64, 64), c.create(2, 1, 16, 16)), (OK, OK));
    let refused: &[(u32, &[u32], u32)] = &[
        (0x101, &[0, 1, 8, 8], RESOURCE_ID),
        (0x101, &[1, 1, 8, 8], RESOURCE_ID),
        (0x101, &[3, 5, 8, 8], PARAMETER),
        (0x101, &[3, 1, 0, 8], PARAMETER),
        (0x101, &[3, 1, 512, 512], OUT_OF_MEMORY),
        (0x101, &[3, 1, u32::MAX, u32::MAX], OUT_OF_MEMORY),
        (0x102, &[9, 0], RESOURCE_ID),
        (0x103, &[0, 0, 64, 64, 1, 1], SCANOUT_ID),
        (0x103, &[0, 0, 64, 64, 0, 9], RESOURCE_ID),
        (0x103, &[1, 0, 64, 64, 0, 1], PARAMETER),
        (0x103, &[u32::MAX, 0, 16, 16, 0, 1], PARAMETER),
        (0x103, &[0, 0, 15, 64, 0, 1], PARAMETER),
        (0x104, &[0, 0, 64, 65, 1, 0], PARAMETER),
        (0x104, &[0, 0, 64, 64, 9, 0], RESOURCE_ID),
        // Nothing is behind it yet.
        (0x105, &[0, 0, 64, 64, 0, 0, 1, 0], RESOURCE_ID),
        (0x107, &[1, 0], RESOURCE_ID),
        (0x106, &[9, 0], RESOURCE_ID),
        // Fewer pieces than it says; more than there may be.
        (0x106, &[1, 2, 0, 0, 0x1000, 0], UNSPECIFIED),
        (0x106, &[1, 20_000], UNSPECIFIED),
        (0x108, &[0, 0], UNSPECIFIED),
        (0x0207, &[0, 0, 0, 0], UNSPECIFIED),
        (0x101, &[3], UNSPECIFIED),
    ];
    for (kind, words, answer) in refused {
        assert_eq!(c.say(*kind, words), *answer, "{kind:x} {words:?}");
    }
    assert_eq!(word(&c.put(0, &[1]), 0), UNSPECIFIED);
    assert_eq!((c.attach(1, 4), c.attach(1, 4)), (OK, UNSPECIFIED));
    assert_eq!(c.say(0x105, &[0, 0, 65, 1, 0, 0, 1, 0]), PARAMETER);
    // From behind the end of what backs it nothing is copied.
    assert_eq!(c.say(0x105, &[0, 0, 64, 64, u32::MAX, u32::MAX, 1, 0]), OK);
    assert_eq!(c.say(0x105, &[0, 0, 64, 64, 0x3F00, 0, 1, 0]), OK);
    assert_eq!((c.say(0x107, &[1, 0]), c.say(0x107, &[1, 0])), (OK, RESOURCE_ID));
    // A picture that is gone gives its memory back.
    assert_eq!(c.create(3, 1, 510, 510), OUT_OF_MEMORY);
    assert_eq!((c.say(0x102, &[1, 0]), c.create(3, 1, 510, 510)), (OK, OK));
}

#[test]
fn another_size_of_the_monitor_is_an_event_that_the_driver_clears() {
    let mut c = Card::new(&[]);
    c.r.input(Input::Display { head: 0, width: 1600, height: 900 });
    assert_eq!(c.r.read32(CONFIG), 1);
    assert_eq!(c.r.read32(BAR + 0x1800) & 2, 2, "a configuration interrupt");
    let info = c.words(0, 0x100, &[]);
    assert_eq!([32, 36, 40].map(|at| word(&info, at)), [1600, 900, 1]);
    c.r.migrate();
    c.r.write32(CONFIG + 4, 1);
    assert_eq!(c.r.read32(CONFIG), 0);
    // The same again is no news; an output that is not there has none.
    c.r.input(Input::Display { head: 0, width: 1600, height: 900 });
    c.r.input(Input::Display { head: 5, width: 1, height: 1 });
    assert_eq!(c.r.read32(CONFIG), 0);
    // A reset of the device does not change the monitor.
    c.write(COMMON + 20, 1, 0);
    c.start();
    assert_eq!(word(&c.words(0, 0x100, &[]), 32), 1600);
}

#[test]
fn the_pointer_has_the_shape_that_its_picture_had() {
    let mut c = Card::new(&[]);
    assert_eq!((c.create(3, 1, 64, 64), c.attach(3, 4)), (OK, OK));
    c.draw(4, 4, &[1, 2, 3, 0xFF]);
    assert_eq!(c.say(0x105, &[0, 0, 64, 64, 0, 0, 3, 0]), OK);
    assert_eq!(c.say(0x103, &[0, 0, 64, 64, 0, 3]), OK);
    assert_eq!(c.words(1, 0x300, &[0, 10, 20, 0, 3, 1, 2, 0]), []);
    let shape = c.screen().pointer().unwrap().clone();
    assert_eq!((shape.hot, shape.pixels[1], shape.pixels[0]), ((1, 2), 0xFF03_0201, 0));
    c.r.migrate();
    assert_eq!(c.screen().pointer(), Some(&shape));
    c.words(1, 0x301, &[0, 11, 20, 0, 0, 0, 0, 0]);
    assert_eq!(c.screen().pointer(), Some(&shape));
    c.words(1, 0x300, &[0, 10, 20, 0, 0, 0, 0, 0]);
    assert_eq!(c.screen().pointer(), None);
}

#[test]
fn properties_that_cannot_be_are_refused() {
    let refused = |property: &str, value: &str| {
        let config = PcConfig {
            ram_size: 1 << 20,
            cpus: 1,
            devices: vec![device("virtio-gpu-pci", &[(property, value)])],
            ..PcConfig::default()
        };
        let mem = ftvm_accel::mem::GuestMemory::new(1 << 20).unwrap();
        crate::pc::Pc::new(config, &mem).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(refused("max_outputs", "17").contains("max_outputs"));
    assert!(refused("xres", "0").contains("xres"));
    assert!(refused("blob", "on").contains("blob=off"));
    assert!(refused("max_hostmem", "lots").contains("max_hostmem"));
    assert_eq!(refused("max_hostmem", "1G"), "");
    let gl = crate::registry::model("virtio-vga-gl").err().map(|e| e.to_string()).unwrap_or_default();
    assert!(gl.contains("three dimensions"), "{gl}");
}

/// Commands at random, with fields that often fit: nothing panics, no more memory is taken than is allowed, and a machine
/// that is saved and loaded on the way does the same.
#[test]
fn a_driver_that_says_anything_breaks_nothing() {
    fn go(seed: u64, migrate: bool) -> (Vec<(String, u64)>, Picture) {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut dice = |n: u64| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_F491_4F6C_DD1D) % n
        };
        let mut c = Card::new(&[("max_hostmem", "2M"), ("max_outputs", "3")]);
        for i in 0..1500 {
            let kind = match dice(12) {
                n @ 0..=10 => 0x100 + n as u32,
                _ => dice(0x400) as u32,
            };
            let n = dice(16) as usize;
            let mut words: Vec<u32> = (0..n)
                .map(|_| match dice(8) {
                    0 => dice(1 << 32) as u32,
                    1 => u32::MAX - dice(3) as u32,
                    2 => 0,
                    3 => BACKING as u32 + dice(1 << 20) as u32,
                    _ => dice(70) as u32,
                })
                .collect();
            match kind {
                // Otherwise few would ever be made.
                0x101 if n >= 4 => {
                    (words[0], words[1]) = (dice(6) as u32, [1, 2, 3, 67, 68, 0][dice(6) as usize])
                }
                0x105 if n >= 8 => words[6] = dice(6) as u32,
                0x106 if n >= 2 => words[0] = dice(6) as u32,
                _ => {}
            }
            if dice(8) == 0 {
                c.words(1, 0x300 + dice(3) as u32, &words);
            } else {
                c.words(0, kind, &words);
            }
            if dice(100) == 0 {
                c.r.input(Input::Display {
                    head: dice(4) as u32,
                    width: dice(5000) as u32,
                    height: dice(5000) as u32,
                });
            }
            if migrate && i % 250 == 0 {
                c.r.migrate();
            }
            for head in 0..4 {
                assert_eq!(c.screen().head(head).is_some(), head == 0 || head < 3 && c.screen().takes_size());
            }
        }
        // The VGA's memory is untouched: what is saved is the pictures.
        assert!(c.r.pc.save().len() < 3 << 20);
        (c.r.pc.device_hashes(), c.screen().picture())
    }
    for seed in 0..6 {
        assert_eq!(go(seed, false), go(seed, true), "seed {seed}");
    }
}
