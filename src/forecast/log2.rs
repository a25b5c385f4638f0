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
pub(super) fn in_units_q8(time: Duration, unit: Duration) -> u64 {
    let scaled = time.as_nanos().saturating_mul(256) / unit.as_nanos().max(1);
    u64::try_from(scaled).unwrap_or(u64::MAX)
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
