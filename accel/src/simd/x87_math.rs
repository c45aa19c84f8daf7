//! The x87 transcendental instructions (SDM vol. 1, section 8.3.6 and 8.3.7): operands, special
//! values and rounding; the functions themselves are in `wide`.

use super::wide::{self, Wide};
use super::x87::{F80, IE};

const DE: u16 = 2;
const ZE: u16 = 4;
const OE: u16 = 8;
const UE: u16 = 16;
const PE: u16 = 32;
const C1: u16 = 0x200;

/// A result and the status bits (exceptions and C1) it raises.
pub(super) struct Outcome {
    pub value: F80,
    pub status: u16,
}

impl Outcome {
    fn exact(value: F80) -> Outcome {
        Outcome { value, status: 0 }
    }
    fn invalid() -> Outcome {
        Outcome { value: F80::INDEFINITE, status: IE }
    }
    fn and(mut self, status: u16) -> Outcome {
        self.status |= status;
        self
    }
}

fn wide_of(v: F80) -> Wide {
    let exp = if v.exp == 0 { 1 } else { v.exp };
    Wide::new(v.neg, i32::from(exp) - 16383, u128::from(v.mant) << 64)
}

/// DE for denormal operands.
fn denormal(v: F80) -> u16 {
    if v.exp == 0 && v.mant != 0 {
        DE
    } else {
        0
    }
}

/// Round to 64 bits under the control word. `inexact`: bits below the mantissa are lost even if
/// none shows.
fn round(w: Wide, fcw: u16, inexact: bool) -> Outcome {
    if w.is_zero() {
        return Outcome::exact(F80 { neg: w.neg, exp: 0, mant: 0 });
    }
    let up = |mant: u64, rest: u128, sticky: bool| -> bool {
        let half = 1u128 << 127;
        match fcw >> 10 & 3 {
            0 => rest > half || rest == half && (sticky || mant & 1 != 0),
            1 => w.neg && (rest != 0 || sticky),
            2 => !w.neg && (rest != 0 || sticky),
            _ => false,
        }
    };
    let mut status = 0;
    let mut exp = w.exp + 16383;
    let (mut mant, mut rest) = ((w.mant >> 64) as u64, w.mant << 64);
    let mut sticky = inexact;
    // Tininess is detected after rounding with an unbounded exponent.
    let carries = mant == u64::MAX && up(mant, rest, sticky);
    if exp < 1 && !(exp == 0 && carries) {
        if fcw & UE == 0 {
            exp += 24576;
            status |= UE;
        } else {
            let shift = (1 - exp).min(128) as u32;
            let (all, lost) =
                if shift >= 128 { (0, true) } else { (w.mant >> shift, w.mant << (128 - shift) != 0) };
            sticky |= lost;
            (mant, rest) = ((all >> 64) as u64, all << 64);
            exp = 0;
            if rest != 0 || sticky {
                status |= UE;
            }
        }
    } else if exp == 0 {
        // Rounds up to the smallest normal number.
        if fcw & UE != 0 && exp < 1 {
            return Outcome { value: F80 { neg: w.neg, exp: 1, mant: 1 << 63 }, status: PE | C1 };
        }
    }
    if rest != 0 || sticky {
        status |= PE;
    }
    if up(mant, rest, sticky) {
        status |= C1;
        let (sum, carry) = mant.overflowing_add(1);
        mant = sum;
        if carry {
            mant = 1 << 63;
            exp += 1;
        } else if exp == 0 && mant >> 63 != 0 {
            exp = 1;
        }
    }
    if exp >= 0x7FFF {
        status |= OE;
        if fcw & OE == 0 {
            exp -= 24576;
        } else {
            let to_inf = match fcw >> 10 & 3 {
                0 => true,
                1 => w.neg,
                2 => !w.neg,
                _ => false,
            };
            status = OE | PE | if to_inf { C1 } else { 0 };
            (exp, mant) = if to_inf { (0x7FFF, 1 << 63) } else { (0x7FFE, u64::MAX) };
        }
    }
    Outcome { value: F80 { neg: w.neg, exp: exp as u16, mant }, status }
}

/// Whether an unmasked denormal exception stops the operation before it computes.
fn stops(de: u16, fcw: u16) -> bool {
    de & !fcw != 0
}

/// F2XM1; outside -1..1, where the result is undefined, the operand stays.
pub(super) fn f2xm1(x: F80, fcw: u16) -> Outcome {
    if x.is_zero() {
        return Outcome::exact(x);
    }
    if x.is_infinite() {
        return Outcome::exact(if x.neg { F80::one().with_sign(true) } else { x });
    }
    let de = denormal(x);
    if stops(de, fcw) || x.exp > 16383 || x.exp == 16383 && x.mant << 1 != 0 {
        return Outcome::exact(x).and(de);
    }
    if x.exp == 16383 {
        return Outcome::exact(if x.neg { F80 { neg: true, exp: 16382, mant: 1 << 63 } } else { x });
    }
    round(wide::exp2m1(wide_of(x)), fcw, true).and(de)
}

fn signed_infinity(neg: bool) -> F80 {
    F80 { neg, exp: 0x7FFF, mant: 1 << 63 }
}
fn signed_zero(neg: bool) -> F80 {
    F80 { neg, exp: 0, mant: 0 }
}

/// FYL2X: y * log2(x) (SDM vol. 2, table 3-48).
pub(super) fn fyl2x(y: F80, x: F80, fcw: u16) -> Outcome {
    if x.neg && !x.is_zero() {
        return Outcome::invalid();
    }
    let de = denormal(x) | denormal(y);
    if x.is_zero() {
        if y.is_zero() {
            return Outcome::invalid();
        }
        let status = if y.is_infinite() { 0 } else { ZE };
        return Outcome { value: signed_infinity(!y.neg), status };
    }
    if x.is_infinite() {
        return if y.is_zero() { Outcome::invalid() } else { Outcome::exact(signed_infinity(y.neg)).and(de) };
    }
    let is_one = x.exp == 16383 && x.mant == 1 << 63;
    let below_one = x.exp < 16383;
    if y.is_infinite() {
        return if is_one {
            Outcome::invalid()
        } else {
            Outcome::exact(signed_infinity(y.neg != below_one)).and(de)
        };
    }
    if is_one || y.is_zero() {
        return Outcome::exact(signed_zero(y.neg != below_one)).and(de);
    }
    if stops(de, fcw) {
        return Outcome::exact(y).and(de);
    }
    let w = wide_of(x);
    let exact = w.mant == 1 << 127;
    round(wide_of(y).mul(wide::log2(w)), fcw, !exact).and(de)
}

/// FYL2XP1: y * log2(x + 1); for x <= -1, which is undefined, invalid.
pub(super) fn fyl2xp1(y: F80, x: F80, fcw: u16) -> Outcome {
    let de = denormal(x) | denormal(y);
    if x.is_zero() {
        return if y.is_infinite() {
            Outcome::invalid()
        } else {
            Outcome::exact(signed_zero(x.neg != y.neg)).and(de)
        };
    }
    if x.neg && x.exp >= 16383 {
        return Outcome::invalid();
    }
    if x.is_infinite() {
        return if y.is_zero() { Outcome::invalid() } else { Outcome::exact(signed_infinity(y.neg)).and(de) };
    }
    if y.is_infinite() {
        return Outcome::exact(signed_infinity(x.neg != y.neg)).and(de);
    }
    if y.is_zero() {
        return Outcome::exact(signed_zero(x.neg != y.neg)).and(de);
    }
    if stops(de, fcw) {
        return Outcome::exact(y).and(de);
    }
    round(wide_of(y).mul(wide::log2_1p(wide_of(x))), fcw, true).and(de)
}

/// FPATAN: the angle of (x, y) (SDM vol. 2, table 3-30).
pub(super) fn fpatan(y: F80, x: F80, fcw: u16) -> Outcome {
    let de = denormal(x) | denormal(y);
    if stops(de, fcw) {
        return Outcome::exact(y).and(de);
    }
    let angle = if y.is_zero() || x.is_infinite() && !y.is_infinite() {
        if !x.neg {
            return Outcome::exact(signed_zero(y.neg)).and(de);
        }
        wide::PI
    } else if y.is_infinite() {
        match (x.is_infinite(), x.neg) {
            (true, false) => wide::QUARTER_PI,
            (true, true) => wide::THREE_QUARTER_PI,
            _ => wide::HALF_PI,
        }
    } else if x.is_zero() {
        wide::HALF_PI
    } else {
        let (wy, wx) = (wide_of(y), wide_of(x));
        let quotient = wy.with_sign(false).div(wx.with_sign(false));
        if quotient.exp < -16460 && !x.neg {
            // So small an angle is the quotient itself.
            return round(quotient.with_sign(y.neg), fcw, true).and(de);
        }
        // A quotient that is a 64-bit number is the largest value the angle can round to.
        return round(wide::atan2(wy, wx), fcw, true).and(de);
    };
    round(angle.with_sign(y.neg), fcw, true).and(de)
}

/// Which of the results of FSIN, FCOS, FSINCOS, FPTAN.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trig {
    Sin,
    Cos,
    Tan,
}

/// The operand is too large for the trigonometric instructions: C2 = 1, nothing changes.
pub(super) fn out_of_range(x: F80) -> bool {
    !x.is_infinite() && x.exp >= 16383 + 63
}

pub(super) fn trig(x: F80, which: Trig, fcw: u16) -> Outcome {
    if x.is_infinite() {
        return Outcome::invalid();
    }
    if x.is_zero() {
        return Outcome::exact(if which == Trig::Cos { F80::one() } else { x });
    }
    let de = denormal(x);
    if stops(de, fcw) {
        return Outcome::exact(x).and(de);
    }
    let w = wide_of(x);
    if which == Trig::Tan && w.exp < -64 {
        // tan x = x + x^3/3: just above x.
        return round(w, fcw, true).and(de);
    }
    let (sin, cos) = wide::sin_cos(w);
    let value = match which {
        Trig::Sin => sin,
        Trig::Cos => cos,
        Trig::Tan => sin.div(cos),
    };
    round(value, fcw, true).and(de)
}
