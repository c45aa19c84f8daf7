//! RCPSS and RSQRTSS. The architecture bounds their relative error by 1.5 * 2^-12 and leaves the
//! bits open, and vendors differ; ftvm defines them: the exact value rounded to a mantissa of 13
//! fraction bits (error at most 2^-14), computed in integers. Denormal inputs count as zero,
//! denormal results become zero (SDM vol. 2, RCPPS).

const SIGN: u32 = 0x8000_0000;
const INF: u32 = 0x7F80_0000;

/// A NaN becomes quiet and is returned.
fn special(bits: u32) -> Option<u32> {
    (bits & !SIGN > INF).then_some(bits | 0x0040_0000)
}

/// 1/x
pub(super) fn rcp(bits: u32) -> u32 {
    if let Some(nan) = special(bits) {
        return nan;
    }
    let sign = bits & SIGN;
    let exp = (bits >> 23 & 0xFF) as i32;
    if exp == 0 {
        return sign | INF;
    }
    if exp == 255 {
        return sign;
    }
    let mantissa = u64::from(bits & 0x7F_FFFF | 0x80_0000);
    // 1/m with m in [1, 2) lies in (1/2, 1]: 14 bits after the leading one of 2/m.
    let quotient = ((1u64 << 38) / mantissa + 1) >> 1; // (2/m) * 2^13, rounded
    let (fraction, exp) = if quotient >= 1 << 14 { (0, 254 - exp) } else { (quotient & 0x1FFF, 253 - exp) };
    if exp <= 0 {
        return sign;
    }
    sign | (exp as u32) << 23 | (fraction as u32) << 10
}

/// 1/sqrt(x)
pub(super) fn rsqrt(bits: u32) -> u32 {
    if let Some(nan) = special(bits) {
        return nan;
    }
    let exp = (bits >> 23 & 0xFF) as i32;
    if exp == 0 {
        return bits & SIGN | INF;
    }
    if bits & SIGN != 0 {
        return 0xFFC0_0000;
    }
    if exp == 255 {
        return 0;
    }
    let mut mantissa = u64::from(bits & 0x7F_FFFF | 0x80_0000);
    let mut power = exp - 127;
    if power & 1 != 0 {
        mantissa <<= 1;
        power -= 1;
    }
    // x = m * 2^power, m in [1, 4): 2/sqrt(m) in (1, 2], with 14 fraction bits first.
    // (2/sqrt(m)) * 2^14 = sqrt(2^30 / m) = sqrt(2^53 / mantissa).
    let root = (((1u64 << 53) / mantissa).isqrt() + 1) >> 1;
    let half = -power / 2;
    let (fraction, exp) = if root >= 1 << 14 { (0, 127 + half) } else { (root & 0x1FFF, 126 + half) };
    (exp as u32) << 23 | (fraction as u32) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_keep_the_architectures_bound() {
        let mut bits = 0x0080_0000u32;
        while bits < INF {
            let x = f64::from(f32::from_bits(bits));
            let r = f64::from(f32::from_bits(rcp(bits)));
            if r != 0.0 {
                assert!((r * x - 1.0).abs() < 1.5 / 4096.0, "rcp {bits:#x}");
            } else {
                assert!(1.0 / x < f64::from(f32::MIN_POSITIVE) * 1.01);
            }
            let q = f64::from(f32::from_bits(rsqrt(bits)));
            assert!((q * x.sqrt() - 1.0).abs() < 1.5 / 4096.0, "rsqrt {bits:#x}");
            bits += 997;
        }
        assert_eq!(rcp(0x8000_0001), 0xFF80_0000);
        assert_eq!(rsqrt(0xBF80_0000), 0xFFC0_0000);
        assert_eq!(rcp(0x3F80_0000), 0x3F80_0000);
        assert_eq!(rsqrt(0x3F80_0000), 0x3F80_0000);
    }
}
