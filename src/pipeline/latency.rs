//! How long the stages take, as HdrHistograms: one for each stage on each thread, added up when the threads have ended.
//!
//! A histogram belongs to its thread and has all of its memory from the start: noting a time takes no lock and allocates
//! nothing. Times are taken once or twice a batch and never for a single page, because reading the clock costs as much as
//! some of what is done to a page.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A get-and-clear of the dirty log, with the update of the forecast.
    Tick,
    /// A batch of pages into a record, mapping and copying included.
    Map,
    /// The copying of a staged batch, zero pages found in the same pass, without the mapping of its frames.
    Copy,
    /// A slot from its submission to the completion of its chain, or of the write that covered it.
    Send,
    /// A zero-copy send from its completion to its notification.
    Notify,
}

impl Stage {
    /// All of them, in the order of a page's way.
    pub const ALL: [Stage; 5] = [Stage::Tick, Stage::Map, Stage::Copy, Stage::Send, Stage::Notify];

    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Tick => "tick",
            Stage::Map => "map",
            Stage::Copy => "copy",
            Stage::Send => "send",
            Stage::Notify => "notify",
        }
    }
}

/// The least that is told apart, the most that is told, and the digits that are kept: some 25 KiB a histogram. What takes
/// longer counts as the most.
const LEAST_NS: u64 = 100;
const MOST_NS: u64 = 100_000_000_000;
const DIGITS: u8 = 2;

/// The times of one thread, or of all.
#[derive(Clone, Debug, Default)]
pub struct Latencies([Option<Histogram<u64>>; Stage::ALL.len()]);

impl Latencies {
    /// Room for the times of `stages`; those of others are not noted.
    pub fn of(stages: &[Stage]) -> Self {
        let mut latencies = Latencies::default();
        for stage in stages {
            latencies.0[*stage as usize] = Histogram::new_with_bounds(LEAST_NS, MOST_NS, DIGITS).ok();
        }
        latencies
    }

    /// Notes that each of `count` pieces of work took `took`.
    pub fn note(&mut self, stage: Stage, took: Duration, count: u64) {
        if let Some(histogram) = &mut self.0[stage as usize] {
            histogram.saturating_record_n(took.as_nanos() as u64, count);
        }
    }

    /// Adds the times of another thread.
    pub fn add(&mut self, other: &Latencies) {
        for (own, other) in self.0.iter_mut().zip(&other.0) {
            match (own.as_mut(), other) {
                // Histograms of the same bounds always go together.
                (Some(own), Some(other)) => own.add(other).unwrap_or_default(),
                (None, Some(other)) => *own = Some(other.clone()),
                (_, None) => {}
            }
        }
    }

    /// The stages that have run, with their times in nanoseconds.
    pub fn seen(&self) -> impl Iterator<Item = (Stage, &Histogram<u64>)> {
        let all = Stage::ALL.iter().map(|stage| (*stage, self.0[*stage as usize].as_ref()));
        all.filter_map(|(stage, histogram)| Some((stage, histogram.filter(|seen| !seen.is_empty())?)))
    }
}

/// When the last send of each slot was completed, for the time that its notification takes from there.
#[derive(Debug)]
pub struct Notified(Vec<Option<Instant>>);

impl Notified {
    /// For `slots` slots.
    pub fn new(slots: usize) -> Self {
        Notified(vec![None; slots])
    }

    /// A send of `slot` was completed at `now`.
    pub fn sent(&mut self, slot: usize, now: Instant) {
        self.0[slot] = Some(now);
    }

    /// How long ago a send of `slot` was completed last; zero if none was, as when its notification came first.
    pub fn since_sent(&self, slot: usize, now: Instant) -> Duration {
        self.0[slot].map_or(Duration::ZERO, |sent| now - sent)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn threads_add_up_and_only_stages_that_ran_are_seen() {
        let mut all = Latencies::default();
        for lane in 1..=2 {
            let mut thread = Latencies::of(&[Stage::Send, Stage::Notify]);
            thread.note(Stage::Send, Duration::from_micros(100 * lane), 4);
            thread.note(Stage::Tick, Duration::from_micros(1), 1);
            all.add(&thread);
        }
        let seen: Vec<_> = all.seen().collect();
        assert_eq!(seen.len(), 1, "no time of a notification, and no room for ticks");
        let (stage, histogram) = seen[0];
        assert_eq!((stage, histogram.len()), (Stage::Send, 8));
        let us = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        assert!((us(0.5) - 100.0).abs() < 1.5 && (us(0.99) - 200.0).abs() < 2.5, "two digits are kept");
    }

    #[test]
    fn what_is_out_of_bounds_counts_at_the_bound() {
        let mut latencies = Latencies::of(&[Stage::Map]);
        latencies.note(Stage::Map, Duration::ZERO, 1);
        latencies.note(Stage::Map, Duration::from_secs(1000), 1);
        let (_, histogram) = latencies.seen().next().unwrap();
        assert_eq!(histogram.len(), 2);
        assert!(histogram.max() >= MOST_NS && histogram.max() < 2 * MOST_NS);
    }
}
