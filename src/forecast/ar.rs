//! The autoregressive forecast: an AR(1) on the logarithm of a page's write intervals, in six bytes a page.
//!
//! With y = log2 of the interval in samples, m its mean, v its variance and c its covariance with the one
//! before, all exponentially weighted:
//!
//! ```text
//! a = max(1/4, 1/(n+1));  d = y - m;  e = y_before - m
//! c <- (1-a)(c + a d e);  v <- (1-a)(v + a d^2);  m <- m + a d;  n <- n + 1
//! phi = clamp(c / (v + 1/4), 0, 3/4) n / (n + 4);   forecast = m + phi (y - m)
//! ```
//!
//! The forecast changes only when the page is written, so it is kept; ranking a page is then two additions. A
//! page that is overdue is not about to be written, on the contrary: with mixed rates the expected rest grows
//! with the age. So the rank adds the forecast to the age, as twice the log of a weighted geometric mean would,
//! and takes the write count and the activity of the chunk as `heat` does.

use super::log2::{LOG2_OF_COUNT, OCTAVE};
use super::ranked::{Clock, PageModel};

/// Prior variance, 1/4 octave^2, in 1/32 octave^2.
const PRIOR_VARIANCE: i32 = 8;
/// Largest coefficient, 3/4, in 1/256.
const MAX_PHI: i32 = 192;
/// Intervals' worth of doubt about the coefficient.
const SHRINKAGE: i32 = 4;
/// The newest interval weighs at least one in this many.
const MEMORY: i32 = 4;

/// Weight of the forecast against the age: one in this many. The write count already carries most of what the
/// intervals say. Mean TMT/T* of 54 simulated runs that have a T* of at most twice the base (42 of recorded
/// traces, 12 of synthetic workloads): 1.2451 without the forecast, which is `heat`, 1.2463 with a weight of 1/4,
/// 1.2476 with 1/2, 1.2521 with 1, and 1.2549 with 1 and without the count; below 0.003 is noise.
const FORECAST_DIVISOR: i32 = 4;

/// What is known of one page. Logarithms in 1/16 octave, second moments in 1/32 octave^2, all saturating.
#[derive(Clone, Copy, Default)]
pub(super) struct ArPage {
    /// Samples in which the page was dirty; one more than there are intervals.
    writes: u8,
    last: u8,
    mean: u8,
    forecast: u8,
    covariance: i8,
    variance: u8,
}

impl ArPage {
    fn note_interval(&mut self, y: i32) {
        let intervals = i32::from(self.writes);
        let weight = intervals.min(MEMORY);
        let d = y - i32::from(self.mean);
        let e = i32::from(self.last) - i32::from(self.mean);
        let moments = [(i32::from(self.covariance), d * e), (i32::from(self.variance), d * d)];
        // The divisors are known to the compiler, which then needs none: three of five divisions are gone.
        let ([covariance, variance], mean_step) = match weight {
            ..=1 => decay::<1>(moments, d),
            2 => decay::<2>(moments, d),
            3 => decay::<3>(moments, d),
            _ => decay::<MEMORY>(moments, d),
        };
        self.covariance = covariance.clamp(i8::MIN.into(), i8::MAX.into()) as i8;
        self.variance = variance.min(u8::MAX.into()) as u8;
        self.mean = (i32::from(self.mean) + mean_step).clamp(0, 255) as u8;
        self.last = y as u8;

        let ratio = 256 * i32::from(self.covariance) / (i32::from(self.variance) + PRIOR_VARIANCE);
        let phi = ratio.clamp(0, MAX_PHI) * intervals / (intervals + SHRINKAGE);
        let mean = i32::from(self.mean);
        self.forecast = (mean + round_div(phi * (y - mean), 256)).clamp(0, 255) as u8;
    }
}

/// `(1-a)(c + a d e)` for each of two moments, with `a = 1/weight`, and the step of the mean. Products of two logarithms
/// are in 1/256, eight times as fine as the moments.
#[inline(always)]
fn decay<const WEIGHT: i32>(moments: [(i32, i32); 2], d: i32) -> ([i32; 2], i32) {
    let decayed = moments.map(|(moment, product)| {
        round_div((WEIGHT - 1) * (8 * moment * WEIGHT + product), 8 * WEIGHT * WEIGHT)
    });
    (decayed, round_div(d, WEIGHT))
}

/// `a / b` to the nearest, for positive `b`.
#[inline(always)]
fn round_div(a: i32, b: i32) -> i32 {
    (a + b / 2).div_euclid(b)
}

impl PageModel for ArPage {
    const ACTIVITY_DIVISOR: i32 = 4;
    const FOLLOWS_FRONTS: bool = true;
    const NEVER_WRITTEN: Self =
        ArPage { writes: 0, last: 0, mean: 0, forecast: 0, covariance: 0, variance: 0 };

    fn note_write(&mut self, log2_interval: Option<u8>) {
        if let Some(y) = log2_interval {
            self.note_interval(i32::from(y));
        }
        self.writes = self.writes.saturating_add(1);
    }

    /// `log2(age) - log2(1 + n) + 1/4 forecast`; a page without an interval is taken to rest for twice the time
    /// it has been watched.
    #[inline]
    fn rank(self, log2_age: i32, clock: &Clock) -> i32 {
        let unknown = clock.log2_since_start + OCTAVE;
        let forecast = if self.writes > 1 { i32::from(self.forecast) } else { unknown };
        log2_age - i32::from(LOG2_OF_COUNT[usize::from(self.writes)]) + forecast / FORECAST_DIVISOR
    }

    /// Neither an age nor an interval, and so no forecast, is longer than the time since the start.
    fn most_written(clock: &Clock) -> i32 {
        clock.log2_since_start - OCTAVE + (clock.log2_since_start + OCTAVE) / FORECAST_DIVISOR
    }

    fn log2_age_never_written(clock: &Clock) -> i32 {
        clock.log2_since_start + OCTAVE / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    /// The formulas of the module in floating point; second moments saturate where a byte does.
    #[derive(Default)]
    struct Reference {
        n: f64,
        last: f64,
        mean: f64,
        covariance: f64,
        variance: f64,
        forecast: f64,
    }

    impl Reference {
        fn note_interval(&mut self, y: f64) {
            let a = f64::max(0.25, 1.0 / (self.n + 1.0));
            let (d, e) = (y - self.mean, self.last - self.mean);
            self.covariance = ((1.0 - a) * (self.covariance + a * d * e)).clamp(-4.0, 127.0 / 32.0);
            self.variance = ((1.0 - a) * (self.variance + a * d * d)).min(255.0 / 32.0);
            self.mean += a * d;
            self.n += 1.0;
            let phi = (self.covariance / (self.variance + 0.25)).clamp(0.0, 0.75) * self.n / (self.n + 4.0);
            self.last = y;
            self.forecast = self.mean + phi * (y - self.mean);
        }
    }

    fn clock(since_start: Duration) -> Clock {
        let unit = Duration::from_millis(50);
        Clock { since_start, unit, log2_since_start: log2_of(since_start) }
    }

    fn log2_of(age: Duration) -> i32 {
        super::super::log2::log2_q4(256 + super::super::log2::in_units_q8(age, Duration::from_millis(50)))
    }

    fn page_with_intervals(log2_intervals: &[u8]) -> ArPage {
        let mut page = ArPage::NEVER_WRITTEN;
        page.note_write(None);
        log2_intervals.iter().for_each(|y| page.note_write(Some(*y)));
        page
    }

    proptest! {
        /// Intervals up to 100 times each other. The mean is rounded to 1/16 octave at each of some four steps
        /// that still count, and the coefficient is at most 3/4.
        #[test]
        fn the_forecast_is_within_a_third_of_an_octave_of_floating_point(
            intervals in proptest::collection::vec(0u8..107, 1..300),
        ) {
            let page = page_with_intervals(&intervals);
            let mut reference = Reference::default();
            intervals.iter().for_each(|y| reference.note_interval(f64::from(*y) / 16.0));
            let forecast = f64::from(page.forecast) / 16.0;
            prop_assert!((forecast - reference.forecast).abs() <= 1.0 / 3.0, "{forecast} and {}", reference.forecast);
            prop_assert!((f64::from(page.mean) / 16.0 - reference.mean).abs() <= 0.25);
        }

        #[test]
        fn no_history_overflows(intervals in proptest::collection::vec(0u8..=255, 0..400)) {
            let page = page_with_intervals(&intervals);
            let spread = intervals.iter().max().unwrap_or(&0) - intervals.iter().min().unwrap_or(&0);
            if spread == 0 && !intervals.is_empty() {
                prop_assert_eq!(page.forecast, intervals[0]);
            }
        }
    }

    #[test]
    fn a_steady_page_is_forecast_at_its_interval_and_a_trend_is_followed() {
        assert_eq!(page_with_intervals(&[40; 20]).forecast, 40);
        let slowing: Vec<u8> = (0..20).map(|n| 5 * n).collect();
        let page = page_with_intervals(&slowing);
        assert!(page.forecast > page.mean && page.forecast < 95, "{} {}", page.forecast, page.mean);
    }

    #[test]
    fn an_overdue_page_ranks_as_finished_not_as_imminent() {
        let page = page_with_intervals(&[32; 10]);
        let clock = clock(Duration::from_secs(60));
        let ranks: Vec<i32> = [100, 200, 400, 1600, 30_000]
            .map(|age_ms| page.rank(log2_of(Duration::from_millis(age_ms)), &clock))
            .to_vec();
        assert!(ranks.is_sorted() && ranks[0] < ranks[4], "{ranks:?}");
    }

    #[test]
    fn hot_ranks_below_cold_below_never_written() {
        let clock = clock(Duration::from_secs(5));
        let rank = |page: ArPage, age_ms| page.rank(log2_of(Duration::from_millis(age_ms)), &clock);
        let hot = rank(page_with_intervals(&[0; 50]), 50);
        let slow = rank(page_with_intervals(&[64; 5]), 50);
        let once = rank(page_with_intervals(&[]), 50);
        let rested = rank(page_with_intervals(&[]), 3000);
        assert!(hot < slow && slow < once && once < rested, "{hot} {slow} {once} {rested}");
        assert!(rested < ArPage::NEVER_WRITTEN.rank(ArPage::log2_age_never_written(&clock), &clock));
    }
}
