//! What a page's rank owes to the time since its last write: a table by the sample of that write, so that nothing is computed for
//! a page.

use super::hazard::AgeHazard;
use super::log2::{OCTAVE, in_units_q8, log2_q4};
use super::working_set::max_samples;
use super::{Config, WorkingSet};
use std::time::Duration;

/// A page never written ranks as if it had rested for this much longer than it has been watched.
const HEAD_START: Duration = Duration::from_secs(1);
/// A page written within three units has just been passed by the front that comes to its chunk: the log of those and one.
const JUST_PASSED: i32 = 2 * OCTAVE;

/// By the number of a sample, of the pages last written in it; number 0 stands for those never written. Ranks are in
/// sixteenths of an octave.
pub(super) struct AgeRanks {
    unit: Duration,
    /// The log of the age, with what is known of pages of that age.
    ranks_q4: Vec<i16>,
    hazard: Option<AgeHazard>,
    most_written_q4: i32,
    /// The first sample whose pages a front has just passed, if one goes through their chunk.
    just_passed: u16,
}

impl AgeRanks {
    /// Ages are in sample intervals, corrected by the hazard of the ages or not.
    pub(super) fn new(config: &Config, with_hazard: bool) -> Self {
        AgeRanks {
            unit: config.sample_interval,
            ranks_q4: Vec::with_capacity(max_samples(config) + 1),
            hazard: with_hazard.then(|| AgeHazard::new(config)),
            most_written_q4: 0,
            just_passed: 0,
        }
    }

    /// A sample taken at `at` is about to be taken in. Until the next [`AgeRanks::refresh`] only [`AgeRanks::is_fresh`] means
    /// anything.
    pub(super) fn begin_sample(&mut self, working_set: &WorkingSet, at: Duration) {
        if let Some(hazard) = &mut self.hazard {
            hazard.begin_sample(working_set.counts());
        }
        self.fill(working_set, at, 0);
    }

    /// It is in.
    pub(super) fn end_sample(&mut self, working_set: &WorkingSet) {
        if let Some(hazard) = &mut self.hazard {
            hazard.end_sample(working_set.times(), working_set.counts());
        }
    }

    /// Brings the ranks up to the latest sample.
    pub(super) fn refresh(&mut self, working_set: &WorkingSet) {
        let at = working_set.last_sample_at();
        self.fill(working_set, at, 1);
        self.ranks_q4[0] = log2_q4(in_units_q8(at + HEAD_START, self.unit)) as i16;
        self.just_passed = self.ranks_q4.partition_point(|rank| i32::from(*rank) > JUST_PASSED) as u16;
        if let Some(hazard) = &self.hazard {
            hazard.add_to(&mut self.ranks_q4, working_set.times());
        }
        let of_written =
            self.ranks_q4.iter().zip(working_set.counts()).skip(1).filter(|(_, pages)| **pages > 0);
        self.most_written_q4 = of_written.map(|(rank, _)| i32::from(*rank)).max().unwrap_or(0);
    }

    /// What the age of a page counts for that was last written in this sample.
    #[inline(always)]
    pub(super) fn written_q4(&self, sample: u16) -> i32 {
        self.ranks_q4[usize::from(sample)].into()
    }

    /// The most that it counts for any written page.
    pub(super) fn most_written_q4(&self) -> i32 {
        self.most_written_q4
    }

    /// What stands for the age of a page that was never written.
    pub(super) fn never_written_q4(&self) -> i32 {
        self.ranks_q4[0].into()
    }

    /// Whether a page last written in this sample has just been passed by the front that comes to its chunk, if there is one.
    #[inline(always)]
    pub(super) fn is_just_passed(&self, sample: u16) -> bool {
        sample >= self.just_passed
    }

    /// Whether a page that is written again in the sample that is being taken in has rested for more than two units since
    /// this sample, or is written for the first time.
    #[inline(always)]
    pub(super) fn is_fresh(&self, sample: u16) -> bool {
        sample == 0 || self.written_q4(sample) > OCTAVE
    }

    /// Bytes in use.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.ranks_q4) + self.hazard.as_ref().map_or(0, AgeHazard::bytes)
    }

    /// Sets the ranks to the log of the time from each sample to `at`, plus `offset` units.
    fn fill(&mut self, working_set: &WorkingSet, at: Duration, offset: u64) {
        let unit = self.unit;
        let log2_age =
            |taken: &Duration| log2_q4(in_units_q8(at.saturating_sub(*taken), unit) + 256 * offset) as i16;
        self.ranks_q4.clear();
        self.ranks_q4.extend(working_set.times().iter().map(log2_age));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sample;
    use super::super::simulation::{config, pages};
    use super::*;

    /// After so many samples, a unit apart: page 0 was written in the first, page 1 in the last, page 2 three before that.
    fn after(samples: u64) -> (AgeRanks, WorkingSet) {
        let config = config(8);
        let (mut ranks, mut working_set) = (AgeRanks::new(&config, false), WorkingSet::new(&config));
        for number in 1..=samples {
            let at = config.sample_interval * number as u32;
            let dirty = match number {
                1 => pages(8, [0]),
                n if n == samples => pages(8, [1]),
                n if n + 3 == samples => pages(8, [2]),
                _ => pages(8, []),
            };
            ranks.begin_sample(&working_set, at);
            working_set.record(&Sample { at, dirty: &dirty });
            ranks.end_sample(&working_set);
        }
        ranks.refresh(&working_set);
        (ranks, working_set)
    }

    #[test]
    fn a_rank_is_the_log_of_the_age_and_one() {
        let (ranks, working_set) = after(16);
        let of = |page: usize| ranks.written_q4(working_set.ages(0).unwrap().0[page]);
        assert_eq!((of(1), of(2), of(0)), (0, 2 * OCTAVE, 4 * OCTAVE), "ages of 1, 4 and 16 units");
        assert_eq!(ranks.most_written_q4(), of(0));
        let head_start = HEAD_START.as_nanos() / config(8).sample_interval.as_nanos();
        assert_eq!(ranks.never_written_q4(), log2_q4(256 * (16 + head_start as u64)));
    }

    #[test]
    fn a_front_has_just_passed_what_was_written_within_three_units() {
        let (ranks, working_set) = after(16);
        let number = |page: usize| working_set.ages(0).unwrap().0[page];
        assert!(ranks.is_just_passed(number(1)) && ranks.is_just_passed(number(2)));
        assert!(!ranks.is_just_passed(number(2) - 1) && !ranks.is_just_passed(number(0)));
    }

    #[test]
    fn a_write_is_fresh_after_two_units_of_rest_and_the_first_time() {
        let (mut ranks, working_set) = after(16);
        let number = |page: usize| working_set.ages(0).unwrap().0[page];
        ranks.begin_sample(&working_set, config(8).sample_interval * 17);
        assert!(!ranks.is_fresh(number(1)), "written one unit before");
        assert!(ranks.is_fresh(number(2)) && ranks.is_fresh(0));
    }
}
