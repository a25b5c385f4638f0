//! The autoregressive forecast of a chunk's activity: an AR(1) on the logarithm of the pages written in each sample.
//!
//! A 2 MiB chunk gives a number every sample, which is a series long enough to fit; a page gives a handful of intervals in a
//! whole migration, which is not (docs/forecast.md has the figures). With x = log2(1 + pages written per unit), m its mean,
//! v its variance and c its covariance with the sample before, all exponentially weighted over one second:
//!
//! ```text
//! d = x - m;  e = x_before - m
//! c <- c + a (d e - c);  v <- v + a (d^2 - v);  m <- m + a d
//! phi = clamp(c / (v + 1/4), 0, 0.95);   forecast = m + (x - m) (phi + phi^2 + phi^3 + phi^4) / 4
//! ```
//!
//! The forecast is the mean over the next four samples, 0.2 s at 50 ms. A chunk without writes has x = 0.

use super::log2::log2_q4;

/// One in 12 binary places.
const ONE_Q12: i32 = 1 << 12;
/// Prior variance in octave^2: without it a series that hardly moves would have any coefficient.
const PRIOR_VARIANCE_Q12: i32 = ONE_Q12 / 4;
const MAX_PHI_Q12: i32 = 3891;

/// The state of one series, 16 bytes. Octaves and their squares in 12 binary places.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Activity {
    mean_q12: i32,
    covariance_q12: i32,
    variance_q12: i32,
    last_q4: i16,
    forecast_q4: i16,
}

impl Activity {
    /// Takes in a sample: the pages written per unit, in 8 binary places, and the weight of it, in 16.
    #[inline]
    pub(super) fn observe(&mut self, pages_q8: u64, gain_q16: i64) {
        let x_q4 = log2_q4(256 + pages_q8);
        if x_q4 == 0 && *self == Self::default() {
            return;
        }
        let x = x_q4 << 8;
        let (d, e) = (x - self.mean_q12, (i32::from(self.last_q4) << 8) - self.mean_q12);
        self.covariance_q12 += toward(product(d, e) - self.covariance_q12, gain_q16);
        self.variance_q12 += toward(product(d, d) - self.variance_q12, gain_q16);
        self.mean_q12 += toward(d, gain_q16);
        self.last_q4 = x_q4 as i16;
        let phi = (i64::from(self.covariance_q12) << 12) / i64::from(self.variance_q12 + PRIOR_VARIANCE_Q12);
        let phi = (phi as i32).clamp(0, MAX_PHI_Q12);
        let square = product(phi, phi);
        let carried = (phi + square + product(square, phi) + product(square, square)) / 4;
        let forecast = self.mean_q12 + product(x - self.mean_q12, carried);
        self.forecast_q4 = (forecast.max(0) >> 8) as i16;
        if x == 0 && self.mean_q12 < 1 << 7 && self.variance_q12 < 1 << 7 {
            *self = Self::default();
        }
    }

    /// The forecast, in sixteenths of an octave; 0 or more.
    #[inline]
    pub(super) fn forecast_q4(self) -> i32 {
        self.forecast_q4.into()
    }
}

fn product(a_q12: i32, b_q12: i32) -> i32 {
    ((i64::from(a_q12) * i64::from(b_q12)) >> 12) as i32
}

/// The part of `distance` to go, to the nearest.
fn toward(distance: i32, gain_q16: i64) -> i32 {
    ((i64::from(distance) * gain_q16 + (1 << 15)) >> 16) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 1 - e^(-1/20) in 16 binary places.
    const GAIN_Q16: i64 = 3196;

    /// The formulas of the module in floating point.
    #[derive(Default)]
    struct Reference {
        mean: f64,
        covariance: f64,
        variance: f64,
        last: f64,
        forecast: f64,
    }

    impl Reference {
        fn observe(&mut self, pages: u64) {
            let x = (1.0 + pages as f64).log2();
            let a = GAIN_Q16 as f64 / 65536.0;
            let (d, e) = (x - self.mean, self.last - self.mean);
            self.covariance += a * (d * e - self.covariance);
            self.variance += a * (d * d - self.variance);
            self.mean += a * d;
            self.last = x;
            let phi = (self.covariance / (self.variance + 0.25)).clamp(0.0, 0.95);
            let carried = (phi + phi.powi(2) + phi.powi(3) + phi.powi(4)) / 4.0;
            self.forecast = (self.mean + (x - self.mean) * carried).max(0.0);
        }
    }

    proptest! {
        #[test]
        fn fixed_point_follows_floating_point_to_a_fifth_of_an_octave(
            series in proptest::collection::vec(prop_oneof![Just(0u64), 0u64..=512], 1..300),
        ) {
            let (mut fixed, mut reference) = (Activity::default(), Reference::default());
            for pages in series {
                fixed.observe(pages << 8, GAIN_Q16);
                reference.observe(pages);
                let forecast = f64::from(fixed.forecast_q4()) / 16.0;
                prop_assert!((forecast - reference.forecast).abs() < 0.2, "{forecast} and {}", reference.forecast);
            }
        }

        #[test]
        fn nothing_overflows(series in proptest::collection::vec((0u64..1 << 40, 0i64..=1 << 16), 1..200)) {
            let mut activity = Activity::default();
            for (pages_q8, gain_q16) in series {
                activity.observe(pages_q8, gain_q16);
                prop_assert!((0..1000).contains(&activity.forecast_q4()));
            }
        }
    }

    fn after(series: impl IntoIterator<Item = u64>) -> i32 {
        let mut activity = Activity::default();
        series.into_iter().for_each(|pages| activity.observe(pages << 8, GAIN_Q16));
        activity.forecast_q4()
    }

    #[test]
    fn a_phase_is_believed_to_last_and_an_alternation_is_not() {
        // Forty samples of rest, then forty of work: the mean alone is far behind.
        let phases = || (0..400).map(|n| if n / 40 % 2 == 0 { 0 } else { 64 });
        let (begun, over) = (after(phases().take(203)), after(phases().take(203 + 40)));
        assert!(begun > over + 16, "{begun} and {over}: an octave");
        let alternating = after((0..400).map(|n| if n % 2 == 0 { 0 } else { 64 }));
        let mean = 6 * 16 / 2;
        assert!((alternating - mean).abs() < 12, "{alternating} is near the mean {mean}");
    }

    #[test]
    fn a_chunk_at_rest_is_forgotten_entirely() {
        let mut activity = Activity::default();
        activity.observe(512 << 8, GAIN_Q16);
        (0..400).for_each(|_| activity.observe(0, GAIN_Q16));
        assert_eq!(activity, Activity::default());
    }
}
