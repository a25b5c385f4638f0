//! The speed of the link, from what was sent between samples.

use std::time::Duration;

use super::scanner::WIRE_BYTES_PER_PAGE;

/// A guess at an unlimited link's speed, until it has been measured: 1 GB/s.
const FIRST_GUESS_PAGES_PER_S: f64 = 1e9 / WIRE_BYTES_PER_PAGE;

/// What is sent in a shorter time says nothing.
const SHORTEST: Duration = Duration::from_millis(5);

/// The speed of the link in pages: the cap, or less where less was measured while there was always work.
pub(super) struct LinkRate {
    cap: Option<f64>,
    measured: Option<f64>,
    sent_before: u64,
    entries_before: u64,
    was_idle: bool,
    /// The most that was sent in any interval: a link that was kept waiting can do more.
    shown: f64,
}

/// An interval counts if at least one in so many of the pages sent carried data. What is handed out ahead is counted in
/// pages of any kind, so where nearly all are zero the link waits for data; taking that for its speed would have even less
/// handed out, and the estimate would fall without end.
const LEAST_DATA_SHARE: u64 = 4;

impl LinkRate {
    /// Nothing is known but the cap.
    pub(super) fn new(bandwidth: Option<u64>) -> Self {
        let cap = bandwidth.map(|bytes_per_s| bytes_per_s as f64 / WIRE_BYTES_PER_PAGE);
        LinkRate { cap, measured: None, sent_before: 0, entries_before: 0, was_idle: false, shown: 0.0 }
    }

    /// There was nothing to send for a while.
    pub(super) fn note_idle(&mut self) {
        self.was_idle = true;
    }

    /// Takes what was sent since the last sample, `interval` ago, into account.
    pub(super) fn sample(&mut self, data_pages_sent: u64, entries_sent: u64, interval: Duration) {
        let sent = data_pages_sent - self.sent_before;
        let entries = entries_sent - self.entries_before;
        self.sent_before = data_pages_sent;
        self.entries_before = entries_sent;
        let was_idle = std::mem::take(&mut self.was_idle);
        if interval < SHORTEST {
            return;
        }
        let now = sent as f64 / interval.as_secs_f64();
        self.shown = self.shown.max(now);
        // An interval with nothing to send tells nothing more about the link than that.
        if !was_idle && sent > 0 && sent * LEAST_DATA_SHARE >= entries {
            self.measured = Some(self.measured.map_or(now, |before| before + 0.3 * (now - before)));
        }
    }

    /// The speed as far as there is proof of it: what was measured, or else the best that any interval has shown, be it too
    /// little. If `all_was_sent` and none of it was data, there is nothing that it could take long to send.
    pub(super) fn proved(&self, all_was_sent: bool) -> f64 {
        match self.measured {
            None if self.shown > 0.0 || !all_was_sent => self.shown,
            _ => self.pages_per_s(),
        }
    }

    /// The speed to hand pages out by.
    pub(super) fn pages_per_s(&self) -> f64 {
        match (self.cap, self.measured) {
            (Some(cap), Some(measured)) => cap.min(measured),
            (Some(cap), None) => cap,
            (None, Some(measured)) => measured,
            (None, None) => FIRST_GUESS_PAGES_PER_S,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_that_nobody_has_seen_proves_nothing() {
        let ms = Duration::from_millis;
        let mut rate = LinkRate::new(None);
        assert_eq!(rate.proved(false), 0.0);
        rate.sample(0, 0, ms(50));
        assert_eq!(
            (rate.proved(false), rate.pages_per_s()),
            (0.0, FIRST_GUESS_PAGES_PER_S),
            "it is handed out by"
        );
        rate.note_idle();
        rate.sample(25, 25, ms(50));
        assert_eq!(rate.proved(false), 500.0, "no less than that");
        rate.note_idle();
        rate.sample(26, 26, Duration::from_secs(1));
        assert_eq!(rate.proved(true), 500.0, "and idle time takes nothing away");
        rate.sample(226, 226, ms(100));
        assert_eq!((rate.proved(false), rate.pages_per_s()), (2000.0, 2000.0));
    }

    #[test]
    fn a_guest_of_zeroes_needs_no_proof_once_it_is_sent() {
        let mut rate = LinkRate::new(None);
        rate.sample(0, 5000, Duration::from_millis(50));
        assert_eq!((rate.proved(false), rate.proved(true)), (0.0, FIRST_GUESS_PAGES_PER_S));
    }

    #[test]
    fn stretches_of_zero_pages_are_not_taken_for_a_slow_link() {
        let interval = Duration::from_millis(50);
        let mut rate = LinkRate::new(None);
        let (mut data, mut entries) = (0, 0);
        for _ in 0..100 {
            entries += 5000;
            data += 40;
            rate.sample(data, entries, interval);
        }
        assert_eq!(rate.pages_per_s(), FIRST_GUESS_PAGES_PER_S);
        for _ in 0..100 {
            entries += 5000;
            data += 4000;
            rate.sample(data, entries, interval);
        }
        assert!((rate.pages_per_s() / 80_000.0 - 1.0).abs() < 0.01, "{}", rate.pages_per_s());
        rate.note_idle();
        rate.sample(data + 100, entries + 100, interval);
        assert!((rate.pages_per_s() / 80_000.0 - 1.0).abs() < 0.01, "{}", rate.pages_per_s());
    }
}
