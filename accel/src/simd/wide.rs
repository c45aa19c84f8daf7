//! Numbers with 128 bits of mantissa and the elementary functions on them. The x87 transcendental
//! instructions are computed here, so that they give the same bits on every host; the error stays
//! far below half a unit of the 64-bit result.

/// `(-1)^neg * mant / 2^127 * 2^exp`, normalised (top bit of `mant` set), or zero (`mant` = 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wide {
    pub neg: bool,
    pub exp: i32,
    pub mant: u128,
}

const fn constant(exp: i32, mant: u128) -> Wide {
    Wide { neg: false, exp, mant }
}

pub(super) const ZERO: Wide = constant(0, 0);
pub(super) const ONE: Wide = constant(0, 1 << 127);
pub(super) const PI: Wide = constant(1, 0xC90FDAA22168C234C4C6628B80DC1CD1);
pub(super) const HALF_PI: Wide = constant(0, 0xC90FDAA22168C234C4C6628B80DC1CD1);
pub(super) const QUARTER_PI: Wide = constant(-1, 0xC90FDAA22168C234C4C6628B80DC1CD1);
pub(super) const THREE_QUARTER_PI: Wide = constant(1, 0x96CBE3F9990E91A79394C9E8A0A5159C);
const LN_2: Wide = constant(-1, 0xB17217F7D1CF79ABC9E3B39803F2F6AF);
const LOG2_E: Wide = constant(0, 0xB8AA3B295C17F0BBBE87FED0691D3E88);
/// sqrt(2), to choose the range of the logarithm; precision does not matter.
const SQRT_2: u128 = 0xB504F333F9DE6484597D89B3754ABE9F;
/// 320 bits of 2/pi after the point, most significant word first.
const TWO_OVER_PI: [u64; 5] =
    [0xA2F9836E4E441529, 0xFC2757D1F534DDC0, 0xDB6295993C439041, 0xFE5163ABDEBBC561, 0xB7246E3A424DD2E0];
/// atan(k/8) for k = 1..8
const ATAN_EIGHTHS: [Wide; 8] = [
    constant(-4, 0xFEADD4D5617B6E32C897989F3E888EF7),
    constant(-3, 0xFADBAFC96406EB156DC79EF5F7A217E5),
    constant(-2, 0xB7B0CA0F26F784738AA32122DCFE4483),
    constant(-2, 0xED63382B0DDA7B456FE445ECBC3A8D03),
    constant(-1, 0x8F005D5EF7F59F9B5C835E1665C43747),
    constant(-1, 0xA4BC7D1934F7092419A87F2A457DAC9E),
    constant(-1, 0xB8053E2BC2319E73CB2DA55210A4443D),
    constant(-1, 0xC90FDAA22168C234C4C6628B80DC1CD1),
];

/// The 256-bit product (high, low).
fn product(a: u128, b: u128) -> (u128, u128) {
    let (a1, a0) = (a >> 64, a & u128::from(u64::MAX));
    let (b1, b0) = (b >> 64, b & u128::from(u64::MAX));
    let low = a0 * b0;
    let (mid, carry) = (a1 * b0).overflowing_add(a0 * b1);
    let (low, c) = low.overflowing_add(mid << 64);
    (a1 * b1 + (mid >> 64) + (u128::from(carry) << 64) + u128::from(c), low)
}

impl Wide {
    pub fn new(neg: bool, exp: i32, mant: u128) -> Wide {
        if mant == 0 {
            return Wide { neg, ..ZERO };
        }
        let shift = mant.leading_zeros();
        Wide { neg, exp: exp - shift as i32, mant: mant << shift }
    }

    pub fn integer(v: i64) -> Wide {
        Wide::new(v < 0, 127, v.unsigned_abs().into())
    }

    pub fn is_zero(self) -> bool {
        self.mant == 0
    }

    pub fn negate(self) -> Wide {
        Wide { neg: !self.neg, ..self }
    }

    pub fn with_sign(self, neg: bool) -> Wide {
        Wide { neg, ..self }
    }

    pub fn scale(self, by: i32) -> Wide {
        Wide { exp: self.exp + by, ..self }
    }

    pub fn mul(self, o: Wide) -> Wide {
        let neg = self.neg != o.neg;
        if self.is_zero() || o.is_zero() {
            return Wide { neg, ..ZERO };
        }
        let (high, low) = product(self.mant, o.mant);
        let exp = self.exp + o.exp + 1;
        if high >> 127 != 0 {
            Wide { neg, exp, mant: high }
        } else {
            Wide { neg, exp: exp - 1, mant: high << 1 | low >> 127 }
        }
    }

    /// Magnitudes are rounded toward zero, and a part of `o` too small to be seen still moves a
    /// difference below the larger operand: directed rounding of the final result relies on it.
    pub fn add(self, o: Wide) -> Wide {
        if self.is_zero() {
            return o;
        }
        if o.is_zero() {
            return self;
        }
        let (a, b) = if (self.exp, self.mant) >= (o.exp, o.mant) { (self, o) } else { (o, self) };
        let shift = (a.exp - b.exp) as u32;
        let aligned = b.mant.checked_shr(shift).unwrap_or(0);
        let lost = shift > 0 && (shift >= 128 || b.mant << (128 - shift) != 0);
        if a.neg == b.neg {
            let (sum, carry) = a.mant.overflowing_add(aligned);
            if carry {
                return Wide { neg: a.neg, exp: a.exp + 1, mant: sum >> 1 | 1 << 127 };
            }
            return Wide { mant: sum, ..a };
        }
        Wide::new(a.neg, a.exp, a.mant - aligned - u128::from(lost))
    }

    pub fn sub(self, o: Wide) -> Wide {
        self.add(o.negate())
    }

    /// The divisor must not be zero.
    pub fn div(self, o: Wide) -> Wide {
        let neg = self.neg != o.neg;
        if self.is_zero() || o.is_zero() {
            return Wide { neg, ..ZERO };
        }
        // Long division, one bit a step, of mant / o.mant in [1/2, 2).
        let mut rest = self.mant;
        let mut exp = self.exp - o.exp;
        let mut top = false;
        if rest < o.mant {
            exp -= 1;
            top = rest >> 127 != 0;
            rest <<= 1;
        }
        let mut quotient = 0u128;
        for _ in 0..128 {
            quotient <<= 1;
            if top || rest >= o.mant {
                rest = rest.wrapping_sub(o.mant);
                quotient |= 1;
            }
            top = rest >> 127 != 0;
            rest <<= 1;
        }
        Wide { neg, exp, mant: quotient }
    }

    fn cmp_magnitude(self, o: Wide) -> std::cmp::Ordering {
        match (self.is_zero(), o.is_zero()) {
            (true, true) => std::cmp::Ordering::Equal,
            (true, false) => std::cmp::Ordering::Less,
            (false, true) => std::cmp::Ordering::Greater,
            _ => (self.exp, self.mant).cmp(&(o.exp, o.mant)),
        }
    }
}

/// sum of first * ratio^n * factor(n); stops when terms no longer matter.
fn series(first: Wide, mut next: impl FnMut(Wide, i64) -> (Wide, Wide)) -> Wide {
    let mut sum = first;
    let mut power = first;
    for n in 1..200 {
        let (p, term) = next(power, n);
        power = p;
        if term.is_zero() || term.exp < sum.exp - 130 {
            // The last term's sign still decides on which side of `sum` the value lies.
            return sum.add(term);
        }
        sum = sum.add(term);
    }
    sum
}

/// 2^x - 1 for |x| <= 1.
pub(super) fn exp2m1(x: Wide) -> Wide {
    let y = x.mul(LN_2);
    series(y, |p, n| {
        let p = p.mul(y).div(Wide::integer(n + 1));
        (p, p)
    })
}

/// ln((1 + s) / (1 - s)) for small s.
fn twice_atanh(s: Wide) -> Wide {
    let square = s.mul(s);
    series(s, |p, n| {
        let p = p.mul(square);
        (p, p.div(Wide::integer(2 * n + 1)))
    })
    .scale(1)
}

/// log2(x) for x > 0; exact for powers of two.
pub(super) fn log2(x: Wide) -> Wide {
    let mut power = x.exp;
    let mut f = Wide { neg: false, exp: 0, mant: x.mant };
    if x.mant > SQRT_2 {
        f.exp = -1;
        power += 1;
    }
    let log = twice_atanh(f.sub(ONE).div(f.add(ONE))).mul(LOG2_E);
    Wide::integer(power.into()).add(log)
}

/// log2(1 + x) for x > -1.
pub(super) fn log2_1p(x: Wide) -> Wide {
    if x.exp >= -2 {
        return log2(ONE.add(x));
    }
    twice_atanh(x.div(x.add(ONE.scale(1)))).mul(LOG2_E)
}

/// (sin x, cos x) for |x| <= pi/4.
fn sin_cos_small(x: Wide) -> (Wide, Wide) {
    let square = x.mul(x).negate();
    let step = |p: Wide, a: i64, b: i64| {
        let p = p.mul(square).div(Wide::integer(a * b));
        (p, p)
    };
    (series(x, |p, n| step(p, 2 * n, 2 * n + 1)), series(ONE, |p, n| step(p, 2 * n - 1, 2 * n)))
}

/// The quadrant (multiple of pi/2 nearest to x) and the rest, |rest| <= pi/4; |x| < 2^64.
fn reduce(x: Wide) -> (u8, Wide) {
    if x.cmp_magnitude(QUARTER_PI) == std::cmp::Ordering::Less {
        return (0, x);
    }
    // x has 64 significant bits: x = top * 2^(exp - 63), exp in -1..=63. top * (2/pi) is a number
    // of 64 integer and 320 fraction bits, in six words with the most significant first.
    let top = (x.mant >> 64) as u64;
    let mut words = [0u64; 6];
    let mut carry = 0u64;
    for i in (0..5).rev() {
        let p = u128::from(top) * u128::from(TWO_OVER_PI[i]) + u128::from(carry);
        words[i + 1] = p as u64;
        carry = (p >> 64) as u64;
    }
    words[0] = carry;
    // Move the point: shift right by 63 - exp.
    let shift = (63 - x.exp).clamp(0, 64) as u32;
    let bit = |at: i32| -> u128 {
        // 128 bits that start `at` bits after the point of the unshifted number less `shift`.
        let start = 64 + at - shift as i32;
        let word = |i: i32| if (0..6).contains(&i) { u128::from(words[i as usize]) } else { 0 };
        let (i, s) = (start.div_euclid(64), start.rem_euclid(64) as u32);
        let pair = word(i) << 64 | word(i + 1);
        if s == 0 {
            pair
        } else {
            pair << s | word(i + 2) >> (64 - s)
        }
    };
    let quadrant = (bit(-64) >> 64) as u64;
    let (high, low) = (bit(0), bit(128));
    let (quadrant, neg, high, low) = if high >> 127 != 0 {
        // Round to the next quadrant: the rest is the fraction minus one.
        let low_neg = low.wrapping_neg();
        (quadrant.wrapping_add(1), true, if low == 0 { high.wrapping_neg() } else { !high }, low_neg)
    } else {
        (quadrant, false, high, low)
    };
    let zeros = high.leading_zeros();
    let mant = if zeros == 0 {
        high
    } else if zeros == 128 {
        low
    } else {
        high << zeros | low >> (128 - zeros)
    };
    let rest = Wide::new(neg, -1 - zeros as i32, mant).mul(HALF_PI);
    let quadrant = (quadrant & 3) as u8;
    if x.neg {
        ((4 - quadrant) & 3, rest.negate())
    } else {
        (quadrant, rest)
    }
}

/// (sin x, cos x) for |x| < 2^64 with at most 64 significant bits.
pub(super) fn sin_cos(x: Wide) -> (Wide, Wide) {
    let (quadrant, rest) = reduce(x);
    let (sin, cos) = sin_cos_small(rest);
    match quadrant {
        0 => (sin, cos),
        1 => (cos, sin.negate()),
        2 => (sin.negate(), cos.negate()),
        _ => (cos.negate(), sin),
    }
}

/// atan(y / x) in the quadrant of (x, y); neither is zero.
pub(super) fn atan2(y: Wide, x: Wide) -> Wide {
    let (ay, ax) = (y.with_sign(false), x.with_sign(false));
    let swap = ay.cmp_magnitude(ax) == std::cmp::Ordering::Greater;
    let t = if swap { ax.div(ay) } else { ay.div(ax) };
    // Nearest eighth, then atan(t) = atan(c) + atan((t - c) / (1 + t c)).
    let eighth = if t.exp < -4 { 0 } else { ((t.mant >> (123 - t.exp)) as u32 + 1) >> 1 };
    let mut angle = if eighth == 0 {
        atan_small(t)
    } else {
        let c = Wide::integer(eighth as i64).scale(-3);
        ATAN_EIGHTHS[eighth as usize - 1].add(atan_small(t.sub(c).div(ONE.add(t.mul(c)))))
    };
    if swap {
        angle = HALF_PI.sub(angle);
    }
    if x.neg {
        angle = PI.sub(angle);
    }
    angle.with_sign(y.neg)
}

fn atan_small(t: Wide) -> Wide {
    if t.is_zero() {
        return t;
    }
    let square = t.mul(t).negate();
    series(t, |p, n| {
        let p = p.mul(square);
        (p, p.div(Wide::integer(2 * n + 1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(v: f64) -> Wide {
        let bits = v.to_bits();
        let exp = (bits >> 52 & 0x7FF) as i32 - 1023;
        let mant = u128::from(bits & 0xF_FFFF_FFFF_FFFF | 1 << 52) << 75;
        if v == 0.0 {
            ZERO
        } else {
            Wide::new(v < 0.0, exp, mant)
        }
    }

    fn narrow(w: Wide) -> f64 {
        let v = (w.mant >> 64) as u64 as f64 * 2f64.powi(w.exp - 63);
        if w.neg {
            -v
        } else {
            v
        }
    }

    fn close(a: Wide, b: f64) {
        assert!((narrow(a) - b).abs() <= b.abs() * 4e-16, "{} {b}", narrow(a));
    }

    #[test]
    fn functions_agree_with_the_library() {
        let mut v = 1e-12f64;
        while v < 1e15 {
            for x in [v, -v] {
                close(sin_cos(wide(x)).0, x.sin());
                close(sin_cos(wide(x)).1, x.cos());
                close(atan2(wide(x), wide(0.37)), x.atan2(0.37));
                close(atan2(wide(x), wide(-3.1)), x.atan2(-3.1));
                if v < 1.0 {
                    close(exp2m1(wide(x)), (x * std::f64::consts::LN_2).exp_m1());
                    close(log2_1p(wide(x)), x.ln_1p() / std::f64::consts::LN_2);
                }
            }
            close(log2(wide(v)), v.log2());
            v *= 1.37;
        }
        assert_eq!(log2(wide(8.0)), Wide::integer(3));
    }

    /// sin^2 + cos^2 = 1 and tan(atan t) = t to 120 bits.
    #[test]
    fn identities_hold_to_nearly_all_bits() {
        for v in [1e-3, 0.1, 0.7, 1.6, 3.25, 22.0, 1e6, 1e15, 9e18] {
            let (s, c) = sin_cos(wide(v));
            let one = s.mul(s).add(c.mul(c)).sub(ONE);
            assert!(one.is_zero() || one.exp < -119, "{v} {}", one.exp);
        }
        for v in [1e-3, 0.1, 0.3, 0.7, 0.99, 1.6, 3.25, 22.0, 1e6] {
            let (s, c) = sin_cos_small_or_halved(atan2(wide(v), ONE));
            let diff = s.div(c).sub(wide(v));
            assert!(diff.is_zero() || diff.exp < wide(v).exp - 117 + 20, "{v} {}", diff.exp);
        }
    }

    /// sin and cos of an angle below pi/2 with all 128 bits.
    fn sin_cos_small_or_halved(x: Wide) -> (Wide, Wide) {
        let (s, c) = sin_cos_small(x.scale(-1));
        (s.mul(c).scale(1), c.mul(c).sub(s.mul(s)))
    }
}
