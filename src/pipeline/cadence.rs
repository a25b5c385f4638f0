//! How often the scanner looks at the dirty log.

use std::time::Duration;

use crate::forecast::Engine;

/// How the scanner is to work.
#[derive(Clone, Copy)]
pub struct Cadence {
    /// There is a pre-copy; else the scanner waits for the order to send everything.
    pub live: bool,
    /// Time between two samples.
    pub sample_interval: Duration,
    /// The share of the time that looks at the log may take: the time between two grows to keep to it, and a policy that
    /// has no use for samples between its rounds gets none.
    pub share: Option<f64>,
    /// The cap on what is sent, in bytes per second.
    pub bandwidth: Option<u64>,
}

impl Cadence {
    /// The least time between two looks at the log that take `took` each.
    pub(super) fn rest(&self, took: Duration) -> Duration {
        self.share.map_or(Duration::ZERO, |share| took.div_f64(share.max(1e-6)))
    }

    /// When the next sample is due after one at `at` that took `took`. Half of the share is kept for samples that are taken
    /// early.
    pub(super) fn next_sample(&self, at: Duration, took: Duration, engine: &Engine) -> Duration {
        if self.share.is_some() && engine.samples_by_round() {
            return Duration::MAX;
        }
        at + self.sample_interval.max(2 * self.rest(took))
    }

    /// Whether a sample may be taken before it is due, because all that is known to be dirty has been sent: the next one is
    /// then all that the end of pre-copy waits for. `samples` were taken so far, in `sampling`.
    pub(super) fn may_be_early(
        &self,
        since_last: Duration,
        now: Duration,
        samples: u64,
        sampling: Duration,
    ) -> bool {
        let Some(share) = self.share else { return false };
        let another = sampling / samples.max(1) as u32;
        since_last >= self.sample_interval && sampling + another <= now.mul_f64(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_keep_to_their_share_of_the_time_and_some_of_it_is_left_for_the_end() {
        let ms = Duration::from_millis;
        let cadence = Cadence { live: true, sample_interval: ms(50), share: Some(0.02), bandwidth: None };
        assert!(!cadence.may_be_early(ms(400), ms(400), 0, ms(10)), "more than the share is spent");
        // One sample of 10 ms a second leaves half of the share.
        assert!(cadence.may_be_early(ms(500), ms(10_000), 10, ms(100)));
        assert!(!cadence.may_be_early(ms(40), ms(10_000), 10, ms(100)), "sooner than any sample");
        let (mut now, mut samples, mut sampling) = (ms(10_000), 10, ms(100));
        while cadence.may_be_early(ms(50), now, samples, sampling) {
            (now, samples, sampling) = (now + ms(50), samples + 1, sampling + ms(10));
        }
        assert_eq!(samples, 21, "another eleven, since time goes on");
        assert!(sampling <= now.mul_f64(0.02));
        assert_eq!(cadence.rest(ms(10)), ms(500));
        let free = Cadence { share: None, ..cadence };
        assert!(!free.may_be_early(ms(500), ms(10_000), 10, ms(100)), "where it costs nothing none is early");
    }
}
