//! Base-2 logarithms in fixed point: sixteenths of an octave ("Q4"), by leading zeros and a table.

use std::time::Duration;

/// One octave in the units of this module.
pub(super) const OCTAVE: i32 = 16;

/// `round(16 log2(1 + (i + 1/2) / 32))`.
const MANTISSA: [u8; 32] = [
    0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15,
    15, 16,
];

/// `log2(x / 256)` in sixteenths of an octave, to within one sixteenth; 0 counts as 1.
pub(super) const fn log2_q4(x_q8: u64) -> i32 {
    let x = if x_q8 == 0 { 1 } else { x_q8 };
    let exponent = 63 - x.leading_zeros();
    let mantissa = if exponent >= 5 { x >> (exponent - 5) } else { x << (5 - exponent) } & 31;
    (exponent as i32 - 8) * OCTAVE + MANTISSA[mantissa as usize] as i32
}

/// A time in 256ths of `unit`, saturating; a `unit` of zero counts as a nanosecond.
///
/// Times of less than half a year are divided in 64 bits: the division of 128 bits took 30 ns, and a plan does one for
/// each sample number.
#[inline]
pub(super) fn in_units_q8(time: Duration, unit: Duration) -> u64 {
    const SHORT_S: u64 = 1 << 24;
    if time.as_secs() < SHORT_S && unit.as_secs() < SHORT_S {
        let nanos = |time: Duration| time.as_secs() * 1_000_000_000 + u64::from(time.subsec_nanos());
        return nanos(time) * 256 / nanos(unit).max(1);
    }
    let scaled = time.as_nanos().saturating_mul(256) / unit.as_nanos().max(1);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// `2^-(i/256)` in 30 binary places.
static EXP2: [u32; 257] = {
    let mut table = [0; 257];
    let mut i = 0;
    while i <= 256 {
        // The series of e^-x for x up to log 2: after 20 terms the rest is below 1e-21.
        let x = i as f64 / 256.0 * std::f64::consts::LN_2;
        let (mut sum, mut term, mut n) = (1.0, 1.0, 1);
        while n <= 20 {
            term *= -x / n as f64;
            sum += term;
            n += 1;
        }
        table[i] = (sum * (1u64 << 30) as f64 + 0.5) as u32;
        i += 1;
    }
    table
};

/// `2^-(x / 65536)` in 30 binary places, to within one part in 10^5 of 1.
#[inline]
pub(super) fn exp2_neg_q30(x_q16: u64) -> u64 {
    let whole = x_q16 >> 16;
    if whole >= 31 {
        return 0;
    }
    let (index, rest) = ((x_q16 >> 8 & 255) as usize, x_q16 & 255);
    let (above, below) = (u64::from(EXP2[index]), u64::from(EXP2[index + 1]));
    (above - (((above - below) * rest) >> 8)) >> whole
}

/// `log2(1 + n)` for a saturating count of a byte.
pub(super) static LOG2_OF_COUNT: [u8; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        table[n] = log2_q4((n as u64 + 1) << 8) as u8;
        n += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_within_a_sixteenth_of_an_octave(x in 1u64..u64::MAX, shift in 0u32..63) {
            let x = (x >> shift).max(1);
            let exact = 16.0 * ((x as f64).log2() - 8.0);
            prop_assert!((f64::from(log2_q4(x)) - exact).abs() <= 1.0, "{} against {}", log2_q4(x), exact);
        }

        #[test]
        fn never_falls(x in 1u64..u64::MAX, shift in 0u32..63) {
            let x = (x >> shift).max(2);
            prop_assert!(log2_q4(x - 1) <= log2_q4(x));
        }
    }

    proptest! {
        #[test]
        fn exp2_is_within_a_hundred_thousandth(x in 0u64..40 << 16) {
            let exact = (-(x as f64) / 65536.0).exp2();
            prop_assert!((exp2_neg_q30(x) as f64 / (1u64 << 30) as f64 - exact).abs() < 1e-5);
        }

        #[test]
        fn a_short_time_is_divided_as_a_long_one(nanos in 0u64..1 << 50, unit in 0u64..1 << 40) {
            let expected = u128::from(nanos) * 256 / u128::from(unit.max(1));
            let units = in_units_q8(Duration::from_nanos(nanos), Duration::from_nanos(unit));
            prop_assert_eq!(u128::from(units), expected);
        }
    }

    #[test]
    fn powers_of_two_are_exact() {
        for exponent in 0..63 {
            assert_eq!(log2_q4(1 << exponent), (exponent - 8) * OCTAVE);
        }
        assert_eq!((LOG2_OF_COUNT[0], LOG2_OF_COUNT[1], LOG2_OF_COUNT[255]), (0, 16, 128));
    }

    #[test]
    fn times_scale_and_saturate() {
        let unit = Duration::from_millis(50);
        assert_eq!(in_units_q8(Duration::from_millis(100), unit), 512);
        assert_eq!(in_units_q8(Duration::MAX, Duration::ZERO), u64::MAX);
    }
}
