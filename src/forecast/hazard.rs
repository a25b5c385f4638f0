//! How likely pages of an age are to be written, learnt while the migration goes on.
//!
//! By rank a page is the safer the longer it has rested, as if of the pages of age `a` the share `c / a` were written in each
//! unit of time. Buffers that a program uses in turn are not like that: those just written rest for a whole turn, and the
//! oldest come next. It shows in the histogram of ages, which the clairvoyant bound needs anyhow, so that nothing is kept for a
//! page. With `n(a)` the pages that were of age `a` over all samples, each for a unit of time, `e(a)` those of them that were
//! written in it, N the pages of the guest, and sums over `a` and the three ages after it,
//!
//! ```text
//! c = sum of all e(a) / sum of all n(a) / a
//! correction(a) = -log2((sum e(a) + N/2 sum c/a) / (sum c n(a)/a + N/2 sum c/a))
//! ```
//!
//! The weight of the assumption, N/2, is large because writes come in bursts: a thousand pages written at once are one event
//! and not a thousand. docs/forecast.md has what other weights came to.
//!
//! A sample that took several units stands for each of the ages that its pages went through, its writes spread evenly. The
//! ages of pages whose samples were merged count from the later one.
//!
//! Written pages are corrected against each other; that pages never written rank by the time since the start stays.

use super::Config;
use super::log2::{OCTAVE, in_units_q8, log2_q4};
use super::working_set::max_samples;
use std::time::Duration;

/// Ages told apart, in units: 25 s at 50 ms. Older pages keep their rank.
const AGES: usize = 512;
/// So many times the pages of the guest the assumption weighs, in pages seen at each age.
const ASSUMPTION: f64 = 0.5;
/// Ages that the correction of one sums over: as far as the forecast of a chunk's activity looks ahead.
const HORIZON: usize = 4;
/// A correction is at most so much: eight octaves.
const MOST_Q4: i32 = 8 * OCTAVE;

/// What was seen of the pages of each age. Counts are floating point, but only added, multiplied and divided: every
/// machine decides alike.
pub(super) struct AgeHazard {
    unit: Duration,
    /// The weight of the assumption, in pages seen at each age.
    assumption: f64,
    /// Pages last dirty in each sample, before the one that is being taken in.
    counts_before: Vec<u64>,
    /// By age in units: pages seen, in pages times units of time, and the writes to them.
    seen: Vec<f64>,
    written: Vec<f64>,
    /// By age in units, in sixteenths of an octave.
    corrections_q4: Vec<i16>,
}

impl AgeHazard {
    /// Nothing is known. Ages are in sample intervals.
    pub(super) fn new(config: &Config) -> Self {
        AgeHazard {
            unit: config.sample_interval,
            assumption: ASSUMPTION * config.pages as f64,
            counts_before: Vec::with_capacity(max_samples(config) + 1),
            seen: vec![0.0; AGES],
            written: vec![0.0; AGES],
            corrections_q4: vec![0; AGES],
        }
    }

    /// A sample is about to be taken in; `counts` are the pages last dirty in each of those before, entry 0 being those never
    /// written.
    pub(super) fn begin_sample(&mut self, counts: &[u64]) {
        self.counts_before.clear();
        self.counts_before.extend_from_slice(counts);
    }

    /// It is in: when each sample was taken, and the pages last dirty in each now.
    pub(super) fn end_sample(&mut self, times: &[Duration], counts: &[u64]) {
        let latest = self.counts_before.len();
        debug_assert_eq!((times.len(), counts.len()), (latest + 1, latest + 1));
        let units = in_units_q8(times[latest].saturating_sub(times[latest - 1]), self.unit) as f64 / 256.0;
        for number in (1..latest).rev() {
            let first = self.age(times[latest - 1].saturating_sub(times[number])) + 1;
            if first >= AGES {
                break;
            }
            let last = self.age(times[latest].saturating_sub(times[number])).max(first);
            let before = self.counts_before[number];
            let written = before.saturating_sub(counts[number]);
            let share = 1.0 / (last - first + 1) as f64;
            for age in first..=last.min(AGES - 1) {
                self.seen[age] += before as f64 * units * share;
                self.written[age] += written as f64 * share;
            }
        }
        self.correct();
    }

    /// Adds to the log of the age of each sample's pages, as of the latest, what is known of the ages that come next. In
    /// sixteenths of an octave.
    pub(super) fn add_to(&self, log2_ages_q4: &mut [i16], times: &[Duration]) {
        let Some(latest) = times.last() else { return };
        for (log2_age, taken) in log2_ages_q4.iter_mut().zip(times).skip(1).rev() {
            let age = self.age(latest.saturating_sub(*taken)) + 1;
            let Some(correction) = self.corrections_q4.get(age) else { break };
            *log2_age += correction;
        }
    }

    /// Bytes in use.
    pub(super) fn bytes(&self) -> usize {
        self.counts_before.capacity() * size_of::<u64>()
            + size_of_val(&*self.seen)
            + size_of_val(&*self.written)
            + size_of_val(&*self.corrections_q4)
    }

    /// In whole units.
    fn age(&self, time: Duration) -> usize {
        ((in_units_q8(time, self.unit) + 128) >> 8) as usize
    }

    fn correct(&mut self) {
        let expected: f64 = (1..AGES).map(|age| self.seen[age] / age as f64).sum();
        let written: f64 = self.written.iter().sum();
        if expected == 0.0 || written == 0.0 {
            return;
        }
        let scale = written / expected;
        let assumption = self.assumption;
        for age in 1..AGES {
            let (mut written, mut expected) = (0.0, 0.0);
            for age in age..(age + HORIZON).min(AGES) {
                let assumed = scale / age as f64;
                written += self.written[age] + assumption * assumed;
                expected += (self.seen[age] + assumption) * assumed;
            }
            let octaves_q4 = log2_q4((written / expected * f64::from(1 << 24)) as u64) - 16 * OCTAVE;
            self.corrections_q4[age] = (-octaves_q4).clamp(-MOST_Q4, MOST_Q4) as i16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{config, pages};
    use super::super::{Sample, WorkingSet};
    use super::*;

    const UNIT: Duration = Duration::from_millis(50);

    /// A guest whose pages are sampled at `times`, the start first, and what is learnt of it.
    struct Guest {
        hazard: AgeHazard,
        times: Vec<Duration>,
        counts: Vec<u64>,
        last: Vec<usize>,
    }

    impl Guest {
        fn new(nr_pages: usize) -> Self {
            Guest {
                hazard: AgeHazard::new(&config(nr_pages as u64)),
                times: vec![Duration::ZERO],
                counts: vec![nr_pages as u64],
                last: vec![0; nr_pages],
            }
        }

        /// A sample `units` after the one before.
        fn sample(&mut self, units: f64, dirty: impl IntoIterator<Item = usize>) {
            self.hazard.begin_sample(&self.counts);
            self.times.push(self.times[self.times.len() - 1] + UNIT.mul_f64(units));
            self.counts.push(0);
            for page in dirty {
                let number = std::mem::replace(&mut self.last[page], self.counts.len() - 1);
                self.counts[number] -= 1;
                *self.counts.last_mut().unwrap() += 1;
            }
            self.hazard.end_sample(&self.times, &self.counts);
        }

        /// What is added for each sample's pages.
        fn corrections(&self) -> Vec<i16> {
            let mut corrections = vec![0; self.times.len()];
            self.hazard.add_to(&mut corrections, &self.times);
            corrections
        }
    }

    #[test]
    fn of_buffers_used_in_turn_those_just_written_are_safe_however_seldom_one_looks() {
        // A turn takes 24 units; a sample finds what was written since the one before.
        for units in [1, 2, 3, 6] {
            let buffers = 24 / units;
            let mut guest = Guest::new(buffers * 100);
            for sample in 0..20 * buffers {
                let first = sample % buffers * 100;
                guest.sample(units as f64, first..first + 100);
            }
            let corrections = guest.corrections();
            let (resting, due) =
                (corrections[corrections.len() - buffers / 2], corrections[corrections.len() - buffers]);
            assert_eq!(corrections[0], 0, "never written has no age");
            assert!(resting > 2 * OCTAVE as i16, "every {units} units: {resting} after half a turn");
            assert!(due < -2 * OCTAVE as i16, "every {units} units: {due} after a whole one");
        }
    }

    #[test]
    fn samples_that_come_in_pairs_teach_the_same() {
        let mut guest = Guest::new(2400);
        for sample in 0..480 {
            let first = sample % 24 * 100;
            guest.sample(if sample % 2 == 0 { 0.5 } else { 1.5 }, first..first + 100);
        }
        let corrections = guest.corrections();
        assert!(corrections[corrections.len() - 12] > 2 * OCTAVE as i16, "{corrections:?}");
        assert!(corrections[corrections.len() - 24] < -OCTAVE as i16, "{corrections:?}");
    }

    #[test]
    fn where_the_likelihood_falls_with_age_as_assumed_nothing_is_corrected() {
        let mut hazard = AgeHazard::new(&config(1_000_000));
        let times: Vec<Duration> = (0..=300).map(|sample| UNIT * sample).collect();
        let mut counts = vec![1_000_000];
        for sample in 1..=300 {
            hazard.begin_sample(&counts);
            // Of the pages of age a one in 2 a is written, and a thousand that never were.
            let mut dirty = 1000;
            for (number, count) in counts.iter_mut().enumerate().skip(1) {
                let written = *count / (2 * (sample - number) as u64);
                *count -= written;
                dirty += written;
            }
            counts.push(dirty);
            hazard.end_sample(&times[..=sample], &counts);
        }
        let mut corrections = vec![0; times.len()];
        hazard.add_to(&mut corrections, &times);
        assert!(corrections.iter().all(|correction| correction.abs() <= 2), "{corrections:?}");
    }

    #[test]
    fn samples_that_are_merged_lose_nothing() {
        // The sample numbers run out at 64 and are merged two by two, again and again.
        let config = Config { max_time: Duration::ZERO, ..config(2400) };
        let mut hazard = AgeHazard::new(&config);
        let mut working_set = WorkingSet::new(&config);
        for sample in 0..480 {
            let dirty = pages(2400, sample % 24 * 100..sample % 24 * 100 + 100);
            working_set.make_room();
            hazard.begin_sample(working_set.counts());
            working_set.record(&Sample { at: UNIT * (sample as u32 + 1), dirty: &dirty });
            hazard.end_sample(working_set.times(), working_set.counts());
        }
        let written: f64 = hazard.written.iter().sum();
        assert!((written - 456.0 * 100.0).abs() < 0.1, "every write but the first to each page: {written}");
    }

    #[test]
    fn pages_older_than_the_ages_told_apart_keep_their_rank() {
        let mut guest = Guest::new(2000);
        for sample in 0..2 * AGES {
            let first = 1000 + sample % 10 * 100;
            guest.sample(1.0, (first..first + 100).chain((sample == 0).then_some(7)));
        }
        let corrections = guest.corrections();
        assert_eq!(corrections[1], 0, "page 7");
        assert!(corrections[corrections.len() - 5] > OCTAVE as i16);
    }

    #[test]
    fn an_idle_guest_and_one_that_writes_everything_are_left_alone() {
        for dirty in [0, 100] {
            let mut guest = Guest::new(100);
            (0..50).for_each(|_| guest.sample(1.0, 0..dirty));
            let corrections = guest.corrections();
            assert!(corrections.iter().all(|correction| correction.abs() <= 1), "{corrections:?}");
        }
    }
}
