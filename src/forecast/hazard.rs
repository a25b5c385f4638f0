//! How likely pages of an age are to be written, learnt while the migration goes on.
//!
//! By rank a page is the safer the longer it has rested, as if a share of `c / a` of the pages of age `a` were written in each
//! unit of time. Buffers that a program uses in turn are not like that: those just written rest for a whole turn, and the
//! oldest come next. It shows in the histogram of ages, which the clairvoyant bound needs anyhow, so that nothing is kept for a page:
//! of `n` pages seen at age `a`, over all samples, `e` were dirty in the next one. With N the pages of the guest,
//!
//! ```text
//! c = sum of e / sum of n / a;   relative(a) = (e + N/2 c / a) / ((n + N/2) c / a)
//! correction(a) = -log2 of the mean of relative(a), (a + 1) and so on, four in all, weighted by 1 / a
//! ```
//!
//! The weight of the assumption, N/2, is large because writes come in bursts: a thousand pages written at once are one event
//! and not a thousand. Anything from N/10 to N does about as well on recorded traces.

use super::log2::{OCTAVE, in_units_q8, log2_q4};
use std::time::Duration;

/// Ages told apart, in units: 25 s at 50 ms. Older pages keep their rank.
const AGES: usize = 512;
/// So many times the pages of the guest the assumption weighs, in pages seen at each age.
const ASSUMPTION: f64 = 0.5;
/// Units that the correction looks ahead.
const HORIZON: usize = 4;
/// A correction is at most so much: eight octaves.
const MOST_Q4: i32 = 8 * OCTAVE;

/// What was seen of the pages of each age. Counts are floating point, but only added, multiplied and divided: every
/// machine decides alike.
pub(super) struct AgeHazard {
    unit: Duration,
    /// Pages last dirty in each sample, as of the last call.
    counts_before: Vec<u64>,
    /// By age in units: pages seen, and those of them that the next sample found dirty.
    seen: Vec<f64>,
    written: Vec<f64>,
    /// By age in units, in sixteenths of an octave.
    corrections_q4: Vec<i16>,
}

impl AgeHazard {
    /// Nothing is known. Ages are in `unit`s; at most `max_samples` samples are told apart at a time.
    pub(super) fn new(unit: Duration, max_samples: usize) -> Self {
        AgeHazard {
            unit,
            counts_before: Vec::with_capacity(max_samples + 1),
            seen: vec![0.0; AGES],
            written: vec![0.0; AGES],
            corrections_q4: vec![0; AGES],
        }
    }

    /// Takes in the latest sample: when each was taken, and the pages last dirty in each, entry 0 being those never
    /// written. Called again without a new sample it does nothing. A sample that it was not called for, or before which samples
    /// were merged, teaches nothing.
    pub(super) fn learn(&mut self, times: &[Duration], counts: &[u64]) {
        let known = self.counts_before.len();
        if counts.len() == known {
            return;
        }
        if counts.len() == known + 1 {
            for number in (1..known).rev() {
                let age = self.age(times[known].saturating_sub(times[number])).max(1);
                if age >= AGES {
                    break;
                }
                let before = self.counts_before[number];
                self.seen[age] += before as f64;
                self.written[age] += before.saturating_sub(counts[number]) as f64;
            }
            self.correct(counts.iter().sum());
        }
        self.counts_before.clear();
        self.counts_before.extend_from_slice(counts);
    }

    /// Adds to the log of the age of each sample's pages, as of the latest, what is known of that age. In sixteenths of an octave.
    pub(super) fn add_to(&self, log2_ages_q4: &mut [i16], times: &[Duration]) {
        let Some(latest) = times.last() else { return };
        for (log2_age, taken) in log2_ages_q4.iter_mut().zip(times).skip(1).rev() {
            // The age at which the next sample will find them.
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

    fn correct(&mut self, pages: u64) {
        let weight = |age: usize| 1.0 / age as f64;
        let expected: f64 = (1..AGES).map(|age| self.seen[age] * weight(age)).sum();
        let written: f64 = self.written.iter().sum();
        if expected == 0.0 || written == 0.0 {
            return;
        }
        let scale = written / expected;
        let assumption = ASSUMPTION * pages as f64;
        let relative = |age: usize| {
            let assumed = scale * weight(age);
            (self.written[age] + assumption * assumed) / ((self.seen[age] + assumption) * assumed)
        };
        for age in 1..AGES {
            let ahead = age..(age + HORIZON).min(AGES);
            let sum: f64 = ahead.clone().map(|age| relative(age) * weight(age)).sum();
            let mean = sum / ahead.map(weight).sum::<f64>();
            let octaves_q4 = log2_q4((mean * f64::from(1 << 24)) as u64) - 16 * OCTAVE;
            self.corrections_q4[age] = -octaves_q4.clamp(-MOST_Q4, MOST_Q4) as i16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Duration = Duration::from_millis(50);

    /// Feeds the histograms of ages of a guest in which `dirty(sample)` are the pages of each sample.
    fn learned(
        nr_pages: usize,
        samples: usize,
        dirty: impl Fn(usize) -> Vec<usize>,
    ) -> (AgeHazard, Vec<Duration>) {
        let mut hazard = AgeHazard::new(UNIT, samples);
        let mut last = vec![0; nr_pages];
        let mut times = vec![Duration::ZERO];
        for sample in 1..=samples {
            dirty(sample).into_iter().for_each(|page| last[page] = sample);
            times.push(UNIT * sample as u32);
            let mut counts = vec![0; sample + 1];
            last.iter().for_each(|last| counts[*last] += 1);
            hazard.learn(&times, &counts);
            // Asked twice about one sample it learns once.
            hazard.learn(&times, &counts);
        }
        (hazard, times)
    }

    #[test]
    fn of_buffers_used_in_turn_those_just_written_are_safe() {
        // Ten buffers of 100 pages, one after the other.
        let (hazard, times) =
            learned(1000, 200, |sample| (0..100).map(|page| sample % 10 * 100 + page).collect());
        let mut corrections = vec![0; times.len()];
        hazard.add_to(&mut corrections, &times);
        let of_age = |age: usize| corrections[times.len() - age];
        assert_eq!(corrections[0], 0, "never written has no age");
        // Of the ten ages the tenth is written; from the seventh on it is among the four that are looked at.
        assert!((1..=6).all(|age| of_age(age) > 3 * OCTAVE as i16), "{corrections:?}");
        assert!((7..=10).all(|age| of_age(age) < -2 * OCTAVE as i16), "{corrections:?}");
    }

    #[test]
    fn where_the_likelihood_falls_with_age_as_assumed_nothing_is_corrected() {
        let mut hazard = AgeHazard::new(UNIT, 300);
        let times: Vec<Duration> = (0..=300).map(|sample| UNIT * sample).collect();
        let mut counts = vec![1_000_000];
        for sample in 1..=300 {
            // Of the pages of age a one in 2 a is written, and a thousand that never were.
            let mut dirty = 1000;
            for (number, count) in counts.iter_mut().enumerate().skip(1) {
                let written = *count / (2 * (sample - number) as u64);
                *count -= written;
                dirty += written;
            }
            counts.push(dirty);
            hazard.learn(&times[..=sample], &counts);
        }
        let mut corrections = vec![0; times.len()];
        hazard.add_to(&mut corrections, &times);
        assert!(corrections.iter().all(|correction| correction.abs() <= 2), "{corrections:?}");
    }

    #[test]
    fn a_sample_that_was_missed_teaches_nothing() {
        let (mut hazard, mut times) = learned(1000, 50, |sample| vec![sample % 10]);
        let (seen, corrections) = (hazard.seen.clone(), hazard.corrections_q4.clone());
        times.extend([UNIT * 51, UNIT * 52]);
        let mut counts = vec![0; times.len()];
        counts[51] = 1000;
        hazard.learn(&times, &counts);
        assert_eq!((&hazard.seen, &hazard.corrections_q4), (&seen, &corrections));
        // As when samples are merged.
        hazard.learn(&times[..25], &counts[..25]);
        assert_eq!((&hazard.seen, &hazard.corrections_q4), (&seen, &corrections));
        hazard.learn(&times[..26], &counts[..26]);
        assert_ne!(hazard.counts_before.len(), 25, "and from there on it goes on");
    }

    #[test]
    fn an_idle_guest_and_one_that_writes_everything_are_left_alone() {
        for dirty in [0, 100] {
            let (hazard, times) = learned(100, 50, |_| (0..dirty).collect());
            let mut corrections = vec![0; times.len()];
            hazard.add_to(&mut corrections, &times);
            assert!(corrections.iter().all(|correction| correction.abs() <= 1), "{corrections:?}");
        }
    }
}
