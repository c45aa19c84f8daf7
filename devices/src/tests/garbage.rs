//! A guest that pokes at random: whatever it does, nothing panics, and a machine that is saved
//! and loaded on the way does exactly the same.

use super::*;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

const PORTS: &[(u16, u16)] = &[
    (0x20, 2),
    (0x40, 4),
    (0x60, 5),
    (0x70, 2),
    (0x80, 16),
    (0xA0, 2),
    (0xB2, 2),
    (0xE0, 12),
    (0x170, 8),
    (0x1F0, 8),
    (0x2F8, 8),
    (0x376, 1),
    (0x3F6, 1),
    (0x3F8, 8),
    (0x402, 1),
    (0x4D0, 2),
    (0x505, 1),
    (0x510, 12),
    (0x600, 64),
    (0x700, 16),
    (0xAFE0, 4),
    (0xC000, 16),
    (0xD000, 64),
    (0xD100, 64),
    (0xD200, 64),
    (0xD300, 64),
];

const WINDOWS: &[(u64, u64)] = &[
    (0xFEC0_0000, 0x50),
    (0xFED0_0000, 0x160),
    (0xE000_0000, 0x6000),
    (0xE010_0000, 0x4000),
    (0xE020_0000, 0x4000),
    (0xE030_0000, 0x4000),
    (0xE040_0000, 0x1000),
    (0xE050_0000, 0x1000),
    (0xFF00_0000, 0x100),
];

/// Give every BAR a place, as firmware would.
fn place_bars(r: &mut Rig) {
    r.config_write(0x0B, 0x40, 0x601);
    r.config_write(0x0B, 0x80, 1);
    r.config_write(0x0B, 0x90, 0x701);
    r.config_write(0x0B, 0xD0, 0x1_0000);
    r.config_write(9, 0x20, 0xC000);
    let rng = (3..32).find(|s| r.config_read(s << 3, 0) == 0x1005_1AF4).unwrap() << 3;
    for (devfn, bars) in [
        (0x18, [(0x10, 0xE000_0000u32), (0x14, 0xD000), (0x14, 0xD000)]),
        (0x20, [(0x10, 0xD100), (0x14, 0xE040_0000), (0x20, 0xE010_0000)]),
        (0x28, [(0x10, 0xD200), (0x14, 0xE050_0000), (0x20, 0xE020_0000)]),
        (rng, [(0x10, 0xD300), (0x20, 0xE030_0000), (0x20, 0xE030_0000)]),
    ] {
        for (offset, value) in bars {
            r.config_write(devfn, offset, value);
        }
    }
    for devfn in [9, 0x18, 0x20, 0x28, rng] {
        r.config_write(devfn, 4, 7);
    }
}

/// An address that often lies in RAM, often near other structures, sometimes nowhere.
fn address(d: &mut Dice) -> u64 {
    match d.below(8) {
        0 => d.next(),
        1 => 0xFFFF_FFFF - d.below(64),
        2 => (16 << 20) - d.below(64),
        _ => d.below(256) * 4096 + d.pick(&[0, 0, 0, 8, 16, 4090]),
    }
}

fn value(d: &mut Dice) -> u64 {
    match d.below(6) {
        0 => d.next(),
        1 => 1 << d.below(64),
        2 => d.below(256),
        3 => u64::MAX,
        4 => address(d),
        _ => d.below(8),
    }
}

fn frame(d: &mut Dice) -> Vec<u8> {
    let n = d.pick(&[0, 1, 13, 14, 60, 64, 1514, 1518, 9000, 70_000]);
    let mut f: Vec<u8> = (0..n).map(|_| d.next() as u8).collect();
    if n >= 14 && d.below(2) == 0 {
        f[..6].fill(0xFF);
    }
    f
}

fn step(r: &mut Rig, d: &mut Dice) {
    match d.below(100) {
        0..=29 => {
            let (base, len) = d.pick(PORTS);
            let port = base + d.below(u64::from(len)) as u16;
            let v = value(d) as u32;
            r.pc.io_write(&r.mem, r.now, port, d.pick(&[1, 2, 4]), v);
        }
        30..=39 => {
            let (base, len) = d.pick(PORTS);
            let port = base + d.below(u64::from(len)) as u16;
            r.pc.io_read(&r.mem, r.now, port, d.pick(&[1, 2, 4]));
        }
        40..=59 => {
            let (base, len) = d.pick(WINDOWS);
            let size = d.pick(&[1u8, 2, 4, 4, 4, 8]);
            let at = base + (d.below(len) & !(u64::from(size) - 1));
            let v = value(d);
            r.pc.mmio_write(&r.mem, r.now, at, size, v);
        }
        60..=65 => {
            let (base, len) = d.pick(WINDOWS);
            let size = d.pick(&[1u8, 2, 4, 8]);
            let at = base + (d.below(len) & !(u64::from(size) - 1));
            r.pc.mmio_read(&r.mem, r.now, at, size);
        }
        66..=72 => {
            // The rings that drivers would have: registers that matter, with plausible values.
            let a = address(d);
            let queue = d.below(4) as u16;
            match d.below(6) {
                0 => {
                    let io = d.pick(&[0xD100u16, 0xD200, 0xD300]);
                    r.outw(io + 0x0E, queue);
                    r.outl(io + 8, (a >> 12) as u32);
                    r.outb(io + 0x12, 7);
                    r.outw(io + 0x10, queue);
                }
                1 => {
                    let bar = d.pick(&[0xE010_0000u64, 0xE020_0000, 0xE030_0000]);
                    r.write32(bar + 20, 0xF);
                    r.pc.mmio_write(&r.mem, r.now, bar + 22, 2, queue.into());
                    for (at, add) in [(32, 0), (40, 4096), (48, 8192)] {
                        r.pc.mmio_write(&r.mem, r.now, bar + at, 8, a.wrapping_add(add) & !15);
                    }
                    r.pc.mmio_write(&r.mem, r.now, bar + 28, 2, 1);
                    r.write32(bar + 0x3000 + 4 * u64::from(queue), queue.into());
                }
                2 => {
                    for (reg, v) in [(0x3800u64, a as u32), (0x3808, 128), (0x400, 2)] {
                        r.write32(0xE000_0000 + reg, v);
                    }
                    let tail = d.below(10) as u32;
                    r.write32(0xE000_3818, tail);
                }
                3 => {
                    for (reg, v) in [(0x2800u64, a as u32), (0x2808, 128), (0x2818, 7), (0x100, 0x801A)] {
                        r.write32(0xE000_0000 + reg, v);
                    }
                }
                4 => {
                    let base = d.pick(&[0x1F0u16, 0x170]);
                    r.outb(base + 6, d.pick(&[0xE0, 0xA0, 0xF0]));
                    let command =
                        d.pick(&[0x20, 0x30, 0xC8, 0xCA, 0xA0, 0xEC, 0xA1, 0x24, 0xC4, 0xC6, 0x25, 0x35]);
                    r.outb(base + 7, command);
                    let bm = if base == 0x1F0 { 0xC000 } else { 0xC008 };
                    r.outl(bm + 4, a as u32);
                    r.outb(bm, d.pick(&[1, 9]));
                    for _ in 0..d.below(300) {
                        let v = value(d) as u16;
                        r.outw(base, v);
                    }
                }
                _ => {
                    r.outl(0x514, 0);
                    r.outl(0x518, (a as u32).swap_bytes());
                }
            }
        }
        73..=80 => {
            let a = address(d);
            let bytes: Vec<u8> = (0..d.pick(&[1, 2, 16, 64, 512])).map(|_| value(d) as u8).collect();
            let _ = r.mem.write(a, &bytes);
        }
        81..=83 => {
            let devfn = d.pick(&[0u8, 8, 9, 0x0B, 0x18, 0x20, 0x28]);
            let offset = (d.below(64) * 4) as u8;
            if d.below(4) == 0 {
                let v = value(d) as u32;
                r.config_write(devfn, offset, v);
            } else {
                r.config_read(devfn, offset);
            }
        }
        84 => {
            if d.below(20) == 0 && !r.config.is_q35() {
                place_bars(r);
            }
        }
        85..=90 => {
            let ns = d.pick(&[1, 1000, 1_000_000, 30_000_000, 2_000_000_000]);
            r.now += ns;
            r.pc.advance(&r.mem, r.now);
        }
        91..=93 => {
            let input = match d.below(9) {
                0 => Input::Keyboard { bytes: vec![d.next() as u8; 3] },
                1 => Input::CharIn { port: d.below(2) as u32, bytes: vec![7; d.below(100) as usize] },
                2 => Input::Powerdown,
                3 => Input::LinkState { nic: d.below(2) as u32, up: d.below(2) == 0 },
                4 => Input::DiskDone { id: d.below(50), result: Ok(vec![1; d.below(5000) as usize]) },
                5 => Input::DiskDone { id: d.below(50), result: Err(5) },
                6 => Input::RtcAdjust { seconds: d.next() as i64 >> d.below(64) },
                7 => Input::DriveResized { drive: d.below(3) as u32, size: 512 * d.below(2048) },
                _ => Input::NetRx { nic: d.below(2) as u32, frame: frame(d) },
            };
            r.input(input);
        }
        94 => {
            if r.pc.intr() {
                r.pc.intr_ack();
            }
            r.pc.eoi(d.next() as u8);
        }
        95 => {
            r.pc.take_request();
            r.pc.take_messages();
        }
        96 if d.below(50) == 0 => r.pc.reset(&r.mem, r.now),
        _ => {
            for o in r.pc.take_outputs() {
                let Output::Disk { id, op, .. } = o else { continue };
                let result = match op {
                    _ if d.below(10) == 0 => Err(5),
                    DiskOp::Read { len, .. } => Ok(vec![id as u8; len as usize]),
                    _ => Ok(Vec::new()),
                };
                r.input(Input::DiskDone { id, result });
            }
        }
    }
}

/// What a driver of the q35's own devices would do: commands for the AHCI ports, slots, configuration space.
fn q35_step(r: &mut Rig, d: &mut Dice) {
    const AHCI: u64 = 0xE000_0000;
    let port = AHCI + 0x100 + 0x80 * d.pick(&[0, 0, 2, 5]);
    match d.below(8) {
        0 => {
            for (offset, value) in [(0x00, 0x1000), (0x08, address(d) as u32), (0x10, u32::MAX), (0x18, 0x11)]
            {
                r.write32(port + offset, value);
            }
        }
        1 => r.write32(port + 0x18, value(d) as u32),
        2 | 3 => {
            let slot = d.below(32);
            let table = 0x3000 + 0x100 * slot;
            let command =
                d.pick(&[0x60u8, 0x61, 0x25, 0x35, 0xC8, 0xCA, 0xA0, 0xEC, 0xA1, 0xE7, 0xEF, 0x20, 0x30]);
            let mut fis = [0u8; 20];
            fis[..3].copy_from_slice(&[0x27, d.pick(&[0x80, 0x80, 0x80, 0]), command]);
            fis[3..].iter_mut().for_each(|b| *b = value(d) as u8);
            let _ = r.mem.write(table, &fis);
            let _ = r.mem.write(table + 0x40, &[d.pick(&[0x28, 0x12, 0x43, 0x03, 0x1B, 0xBE]); 12]);
            let _ = r.mem.write(table + 0x80, &address(d).to_le_bytes());
            let _ = r.mem.write(table + 0x8C, &(d.below(0x8000) as u32).to_le_bytes());
            let mut header = [0u8; 32];
            header[2] = d.below(4) as u8;
            header[8..16].copy_from_slice(&table.to_le_bytes());
            let _ = r.mem.write(0x1000 + 32 * slot, &header);
            r.write32(port + 0x34, 1 << slot);
            r.write32(port + 0x38, 1 << slot);
        }
        4 if d.below(2) == 0 => {
            // The USB controller: rings and contexts anywhere, doorbells of slots, keys.
            const USB: u64 = 0xE400_0000;
            match d.below(6) {
                0 => {
                    for (offset, value) in [(0x10u8, USB as u32), (0x14, 0), (4, 6)] {
                        r.config_write(0x18, offset, value);
                    }
                    for (at, value) in [(0x1028, 1), (0x1030, 0x1_1000), (0x78, 64), (0x40, 1)] {
                        r.write32(USB + at, value);
                    }
                }
                1 => {
                    for at in [0x58, 0x70, 0x1030] {
                        r.write32(USB + at, address(d) as u32);
                    }
                }
                2 => {
                    let kind = d.pick(&[9u32, 10, 11, 12, 13, 14, 15, 16, 17, 1, 2, 3, 4, 6]);
                    let slot = d.pick(&[1u32, 1, 1, 2, 70]);
                    let endpoint = d.pick(&[1u32, 3, 3, 31]);
                    let at = 0x1000 * d.below(64);
                    let words = [address(d) as u32, 0, d.below(600) as u32];
                    let control = slot << 24 | endpoint << 16 | kind << 10 | d.below(0x200) as u32;
                    for (i, w) in words.iter().chain([&control]).enumerate() {
                        let _ = r.mem.write(at + 4 * i as u64, &w.to_le_bytes());
                    }
                    r.write32(USB + 0x58, at as u32 | control & 1);
                    r.write32(USB + 0x2000, 0);
                }
                3 => r.write32(USB + 0x2000 + 4 * d.pick(&[0u64, 1, 1, 2, 60]), d.pick(&[1, 3, 5])),
                4 => r.write32(USB + 0x440 + 16 * d.below(9), value(d) as u32),
                _ => {
                    r.input(Input::Key { number: d.next() as u8, down: d.below(2) == 0 });
                    let [x, y] = [0, 1].map(|_| Some(d.next() as u16));
                    r.input(Input::Pointer {
                        x,
                        y,
                        dx: d.next() as i16,
                        dy: 1,
                        wheel: 1,
                        press: 3,
                        release: 1,
                    });
                }
            }
        }
        4 => r.outl(0xCC0 + 4 * d.below(6) as u16, value(d) as u32),
        5 => {
            let at = 0xB000_0000 + (d.below(4) << 20) + (d.pick(&[0u64, 0x10, 0x11, 0xF8, 0xFA]) << 12);
            r.write32(at + 4 * d.below(80), value(d) as u32);
        }
        6 => {
            let _ = r.read32(AHCI + 4 * d.below(0x140));
        }
        _ => {
            for (offset, value) in [(0x24u8, AHCI as u32), (4, 7)] {
                r.config_write(0xFA, offset, value);
            }
        }
    }
}

fn run(seed: u64, steps: u32, migrate: bool) -> Vec<(String, u64)> {
    let mut r = Rig::new();
    place_bars(&mut r);
    go(r, seed, steps, migrate, |_, _| ())
}

fn run_q35(seed: u64, steps: u32, migrate: bool) -> Vec<(String, u64)> {
    go(Rig::q35(), seed, steps, migrate, q35_step)
}

fn go(mut r: Rig, seed: u64, steps: u32, migrate: bool, more: fn(&mut Rig, &mut Dice)) -> Vec<(String, u64)> {
    let mut d = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    for i in 0..steps {
        step(&mut r, &mut d);
        more(&mut r, &mut d);
        if migrate && i % 997 == 0 {
            r.migrate();
        }
    }
    r.pc.device_hashes()
}

#[test]
fn a_guest_that_pokes_at_random_breaks_nothing() {
    for seed in 0..60 {
        run(seed, 20_000, false);
    }
    for seed in 200..230 {
        run_q35(seed, 10_000, false);
    }
}

#[test]
fn migrating_on_the_way_changes_nothing() {
    for seed in 100..108 {
        assert_eq!(run(seed, 8_000, false), run(seed, 8_000, true), "seed {seed}");
        assert_eq!(run_q35(seed, 4_000, false), run_q35(seed, 4_000, true), "seed {seed}");
    }
}
