//! Values that matter: of registers, memory and floating-point numbers.

use super::case::{Mode, Regs, CODE, DATA, DATA_SIZE};

/// splitmix64: the whole test is a function of its seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// True once in n.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    pub fn integer(&mut self) -> u64 {
        let n = self.below(64);
        match self.below(10) {
            0 => self.pick(&[0, 1, 2, u64::MAX, i64::MAX as u64, 1 << 63]),
            1 => {
                self.pick(&[0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
            }
            2 => 1 << n,
            3 => (1 << n) - 1,
            4 => self.below(256),
            5 => self.below(65536),
            6 => self.below(1 << 32),
            7 => (self.next() as i32) as i64 as u64,
            _ => self.next(),
        }
    }

    fn f32(&mut self) -> u32 {
        let sign = (self.next() as u32) & 0x8000_0000;
        let special = [
            0,
            1,
            0x7F_FFFF,
            0x80_0000,
            0x80_0001,
            0x3F80_0000,
            0x3F80_0001,
            0x3F7F_FFFF,
            0x4000_0000,
            0x7F7F_FFFF,
            0x7F80_0000,
            0x7F80_0001,
            0x7FC0_0000,
            0x7FFF_FFFF,
            0x3F00_0000,
            0x4F00_0000,
            0x5F00_0000,
            0x4EFF_FFFF,
        ];
        let bits = match self.below(6) {
            0 | 1 => self.pick(&special),
            2 => (self.below(500) as f32 * 0.5).to_bits(),
            3 => (((127 - 20 + self.below(40)) << 23) + self.below(1 << 23)) as u32,
            4 => (self.next() as u32) & 0x7F_FFFF,
            _ => self.next() as u32,
        };
        bits & 0x7FFF_FFFF | sign
    }

    fn f64(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        let special = [
            0,
            1,
            0xF_FFFF_FFFF_FFFF,
            1 << 52,
            (1 << 52) + 1,
            1f64.to_bits(),
            1f64.to_bits() + 1,
            1f64.to_bits() - 1,
            2f64.to_bits(),
            f64::MAX.to_bits(),
            f64::INFINITY.to_bits(),
            f64::INFINITY.to_bits() + 1,
            f64::NAN.to_bits() & !(1 << 63),
            0x7FFF_FFFF_FFFF_FFFF,
            0.5f64.to_bits(),
            2147483648f64.to_bits(),
            2147483647.5f64.to_bits(),
            9223372036854775808f64.to_bits(),
            (f32::MIN_POSITIVE as f64).to_bits(),
            (f32::MIN_POSITIVE as f64).to_bits() - 1,
            (f32::MAX as f64).to_bits() + 1,
            1e-40f64.to_bits(),
        ];
        let bits = match self.below(6) {
            0 | 1 => self.pick(&special),
            2 => (self.below(500) as f64 * 0.5).to_bits(),
            3 => {
                1f64.to_bits().wrapping_add((self.below(140) << 52).wrapping_sub(70 << 52))
                    + self.below(1 << 52)
            }
            4 => self.below(1 << 52),
            _ => self.next(),
        };
        bits & i64::MAX as u64 | sign
    }

    pub fn f80(&mut self) -> [u8; 10] {
        let mut exp = match self.below(8) {
            0 => 0,
            1 => 0x7FFF,
            2 => self.pick(&[1, 0x7FFE, 0x3FFF, 0x3FFE, 0x4000, 0x403E, 0x401E]),
            3 => 0x3FFF - 140 + self.below(280),
            4 => self.below(0x8000),
            _ => 0x3FFF - 20 + self.below(40),
        } as u16;
        let mut mant = match self.below(5) {
            0 => 1 << 63,
            1 => self.pick(&[0, 1, 3 << 62, u64::MAX, (1 << 63) + 1, 1 << 62]),
            2 => (self.next() | 1 << 63) & !0xFF_FFFF_FFFF,
            3 => (self.next() | 1 << 63) & !0x7FF,
            _ => self.next(),
        };
        if exp != 0 && !self.one_in(30) {
            mant |= 1 << 63;
        }
        if exp == 0 && self.one_in(2) {
            mant = 0;
        }
        if self.one_in(2) {
            exp |= 0x8000;
        }
        let mut out = [0; 10];
        out[..8].copy_from_slice(&mant.to_le_bytes());
        out[8..].copy_from_slice(&exp.to_le_bytes());
        out
    }

    /// Sixteen bytes of one kind of value.
    pub fn vector(&mut self) -> [u8; 16] {
        let mut out = [0; 16];
        match self.below(5) {
            0 | 1 => out.chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&self.f32().to_le_bytes())),
            2 | 3 => out.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&self.f64().to_le_bytes())),
            _ => out.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&self.integer().to_le_bytes())),
        }
        out
    }
}

/// Random registers of a mode.
pub fn registers(rng: &mut Rng, mode: Mode) -> Regs {
    let long = mode == Mode::Long;
    let mut r = Regs::default();
    for n in 0..16 {
        let mut v =
            if rng.one_in(3) { DATA - mode.data_base() + rng.below(DATA_SIZE as u64) } else { rng.integer() };
        if rng.one_in(12) {
            v = CODE - mode.code_base() + rng.below(2000);
        }
        r.gpr[n] = if long { v } else { v & 0xFFFF_FFFF };
    }
    if !long {
        r.gpr[8..].fill(0);
    }
    r.flags = 0x202 | rng.next() & 0x8D5;
    if rng.one_in(4) {
        r.flags |= 0x400;
    }
    let fx = &mut r.fx;
    let all_masked = !rng.one_in(3);
    let mut fcw =
        0x40 | (rng.next() & 0xF00) as u16 | if all_masked { 0x3F } else { (rng.next() & 0x3F) as u16 };
    if fcw & 0x300 == 0x100 {
        // A reserved precision.
        fcw |= 0x300;
    }
    let mut fsw = (rng.next() & 0x7F00) as u16;
    if rng.one_in(2) {
        fsw |= (rng.next() & 0x7F) as u16;
        if !rng.one_in(8) {
            fsw &= fcw & 0x3F | 0xFF40;
        }
    }
    if fsw & !fcw & 0x3F != 0 {
        fsw |= 0x8080;
    }
    fx[0..2].copy_from_slice(&fcw.to_le_bytes());
    fx[2..4].copy_from_slice(&fsw.to_le_bytes());
    fx[4] = match rng.below(4) {
        0 => 0xFF,
        1 => rng.next() as u8,
        _ => {
            // ST(0) to ST(n) in use, as programs have it.
            let top = fsw >> 11 & 7;
            (0..1 + rng.below(7) as u16).fold(0, |t, i| t | 1 << ((top + i) & 7))
        }
    };
    for n in 0..8 {
        let v = if rng.one_in(8) {
            let mut m = [0xFF; 10];
            m[..8].copy_from_slice(&rng.integer().to_le_bytes());
            m
        } else {
            rng.f80()
        };
        fx[32 + n * 16..42 + n * 16].copy_from_slice(&v);
    }
    let masks = if all_masked || rng.one_in(2) { 0x1F80 } else { (rng.next() & 0x1F80) as u32 };
    let mut mxcsr = masks | (rng.next() & 0x6000) as u32 | (rng.next() & 0x3F) as u32;
    if rng.one_in(4) {
        mxcsr |= (rng.next() & 0x8040) as u32;
    }
    if rng.one_in(2) {
        mxcsr &= !0x3F;
    }
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for n in 0..if long { 16 } else { 8 } {
        let v = rng.vector();
        fx[160 + n * 16..176 + n * 16].copy_from_slice(&v);
        if super::case::has_avx() && !rng.one_in(4) {
            r.high[n * 16..n * 16 + 16].copy_from_slice(&rng.vector());
        }
    }
    r
}

pub fn fill_data(rng: &mut Rng, data: &mut [u8; DATA_SIZE]) {
    // A pool of values repeated: filling each byte afresh would be most of the time.
    let mut pool = [0u8; 640];
    for c in pool.chunks_exact_mut(16) {
        if rng.one_in(4) {
            c[..10].copy_from_slice(&rng.f80());
            c[10..].fill(rng.next() as u8);
        } else {
            c.copy_from_slice(&rng.vector());
        }
    }
    let shift = rng.below(40) as usize * 16;
    for (k, c) in data.chunks_exact_mut(16).enumerate() {
        let at = (shift + k * 16) % 640;
        c.copy_from_slice(&pool[at..at + 16]);
    }
}
