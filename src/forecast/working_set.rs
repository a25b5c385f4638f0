//! When each page was last written, and the histogram of these ages that the clairvoyant bound needs.
//!
//! A page's age is the number of the sample in which it was last dirty: two bytes. When the numbers run out,
//! neighbouring samples are merged and numbered anew, so that a migration may last as long as it likes: ages
//! then lose resolution, the bound becomes a little lower, and both stay true.

use super::bound::{Bounds, TStar};
use super::chunks::Chunks;
use super::{Config, Sample};
use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::{PageSet, Places};
use crate::sys::simd::{Work, at_best, prefetch};
use std::time::Duration;

/// Samples told apart at one time, at most: 13 minutes at 50 ms. Even, and well below what a `u16` holds.
const MAX_SAMPLES: usize = 16384;

/// State is asked for about so many dirty pages before it is needed, and a few chunks at least and at most. A miss takes
/// as long as some tens of pages.
const PAGES_AHEAD: u64 = 64;
const CHUNKS_AHEAD: (u64, u64) = (2, 15);
/// Chunks whose dirty pages are listed at a time.
const LISTS: usize = 16;
const _: () = assert!((CHUNKS_AHEAD.1 as usize) < LISTS);
/// With more dirty pages than this in a chunk its state is walked through, and the hardware sees it coming.
pub(super) const SPARSE: usize = 64;

/// The number of the sample in which each page of a chunk was last dirty; 0: never.
#[derive(Clone)]
#[repr(align(64))]
pub(super) struct AgeChunk(pub [u16; CHUNK_PAGES]);
const _: () = assert!(size_of::<AgeChunk>() == 2 * CHUNK_PAGES);

const NEVER_WRITTEN: AgeChunk = AgeChunk([0; CHUNK_PAGES]);

/// Ages of all pages.
pub struct WorkingSet {
    nr_pages: u64,
    max_samples: usize,
    chunks: Chunks<AgeChunk>,
    /// When sample `k` was taken; entry 0 is the start.
    times: Vec<Duration>,
    /// Pages last dirty in sample `k`; entry 0 are those never written.
    counts: Vec<u64>,
    samples_taken: u64,
    zero_unwritten: u64,
    bounds: Bounds,
    /// Dirty pages of the chunks that are looked ahead to.
    lists: Vec<Places>,
}

impl WorkingSet {
    /// No page was ever written.
    pub fn new(config: &Config) -> Self {
        Self::with_room_for(config.nr_pages, config.pages, max_samples(config))
    }

    fn with_room_for(nr_pages: u64, pages: u64, max_samples: usize) -> Self {
        assert!(max_samples.is_multiple_of(2) && (2..=MAX_SAMPLES).contains(&max_samples));
        let mut times = Vec::with_capacity(max_samples + 1);
        let mut counts = Vec::with_capacity(max_samples + 1);
        times.push(Duration::ZERO);
        counts.push(pages);
        WorkingSet {
            nr_pages,
            max_samples,
            chunks: Chunks::new((nr_pages as usize).div_ceil(CHUNK_PAGES)),
            times,
            counts,
            samples_taken: 0,
            zero_unwritten: 0,
            bounds: Bounds::new(pages, max_samples),
            lists: vec![Places::NONE; LISTS],
        }
    }

    /// Frees a number for the next sample. Numbers and times that are read between this and the sample stay true.
    pub(super) fn make_room(&mut self) {
        if self.times.len() > self.max_samples {
            self.merge_samples();
        }
    }

    /// Takes in a sample, and tells `observe` of each of its chunks in ascending order before it is taken in.
    pub(super) fn record_with(&mut self, sample: &Sample, observe: impl FnMut(Step)) {
        debug_assert!(sample.at >= self.last_sample_at(), "samples come in the order of time");
        assert_eq!(sample.dirty.nr_pages(), self.nr_pages, "a sample of another page-number space");
        self.make_room();
        at_best(TakeIn { working_set: self, dirty: sample.dirty, observe });
        self.times.push(sample.at.max(self.last_sample_at()));
        self.counts.push(sample.dirty.len());
        self.samples_taken += 1;
        self.bounds.record(&self.times, &self.counts);
    }

    /// Takes in a sample.
    #[cfg(test)]
    pub(super) fn record(&mut self, sample: &Sample) {
        self.record_with(sample, |_| {});
    }

    /// Merges samples 1 and 2 into 1, 3 and 4 into 2, and so on; each pair keeps the time of its later sample.
    /// One pass over the state, once in `max_samples / 2` samples.
    fn merge_samples(&mut self) {
        let halved = self.times.len() / 2;
        for number in 1..=halved {
            self.times[number] = self.times[2 * number];
            self.counts[number] = self.counts[2 * number - 1] + self.counts[2 * number];
        }
        self.times.truncate(halved + 1);
        self.counts.truncate(halved + 1);
        for ages in self.chunks.iter_mut() {
            for number in &mut ages.0 {
                *number = number.div_ceil(2);
            }
        }
    }

    /// When the sample in which `pfn` was last dirty was taken; none if it was never written.
    pub fn last_written(&self, pfn: Pfn) -> Option<Duration> {
        let number = self.chunks.get(pfn.chunk())?.0[pfn.in_chunk()];
        (number > 0).then(|| self.times[usize::from(number)])
    }

    /// Pages that no sample has shown dirty.
    pub fn never_written(&self) -> u64 {
        self.counts[0]
    }

    /// Samples so far.
    pub fn samples_taken(&self) -> u64 {
        self.samples_taken
    }

    /// Pages dirty in the latest sample; all before the first.
    pub(super) fn dirty_last(&self) -> u64 {
        self.counts[self.counts.len() - 1]
    }

    /// When the latest sample was taken; zero before the first.
    pub fn last_sample_at(&self) -> Duration {
        self.times[self.times.len() - 1]
    }

    /// `U(now)`: the least backlog, in pages, that any policy could have reached if the guest stopped at `now`.
    /// Pages never written that are zero count until [`WorkingSet::note_zero`] has been told of them.
    pub fn bound(&self, now: Duration, link_pages_per_s: f64) -> u64 {
        self.bounds.now(now, link_pages_per_s, self.zero_unwritten)
    }

    /// The first sample at which a clairvoyant policy could have stopped with at most `budget` of downtime for
    /// pages. `zero_unwritten` pages are zero and were never written: they cost nothing. None if there is no
    /// such sample among the first ones for which there was room (twice the time limit over the interval, at
    /// most 16384).
    pub fn t_star(&self, link_pages_per_s: f64, budget: Duration, zero_unwritten: u64) -> Option<TStar> {
        self.bounds.t_star(link_pages_per_s, budget, zero_unwritten)
    }

    /// `pfn` is zero; if it was never written, it is not part of what has to be sent. To be called once a page.
    pub fn note_zero(&mut self, pfn: Pfn) {
        self.zero_unwritten += u64::from(self.last_written(pfn).is_none());
    }

    /// Pages that were zero, and never written, when they were noted.
    pub fn zero_unwritten(&self) -> u64 {
        self.zero_unwritten
    }

    /// Bytes in use.
    pub fn state_bytes(&self) -> usize {
        self.chunks.bytes() + size_of_val(&*self.times) + size_of_val(&*self.counts) + self.bounds.bytes()
    }

    /// Bytes in huge pages, as the kernel reports it.
    pub(super) fn huge_bytes(&self) -> usize {
        self.chunks.huge_bytes()
    }

    /// The sample numbers of a chunk's pages, if any of them was written.
    pub(super) fn ages(&self, chunk: usize) -> Option<&AgeChunk> {
        self.chunks.get(chunk)
    }

    /// Pages last dirty in each sample; entry 0 are those never written.
    pub(super) fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// When each sample number was taken; entry 0 is the start.
    pub(super) fn times(&self) -> &[Duration] {
        &self.times
    }
}

/// What [`WorkingSet::record_with`] tells of a chunk of a sample.
pub(super) enum Step<'a> {
    /// It will be taken in soon: a chance to ask for its state.
    Expect { chunk: usize, places: &'a Places },
    /// It is taken in now. `places` are those of its dirty pages, `ages` those of before.
    TakeIn { chunk: usize, places: &'a Places, ages: &'a AgeChunk },
}

/// The chunks of a sample on their way into a working set.
struct TakeIn<'a, F> {
    working_set: &'a mut WorkingSet,
    dirty: &'a PageSet,
    observe: F,
}

impl<F: FnMut(Step)> Work for TakeIn<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let number = self.working_set.times.len() as u16;
        let ahead = chunks_ahead(self.dirty);
        let mut soon = self.dirty.occupied_chunks();
        let mut now = self.dirty.occupied_chunks();
        let mut expected = 0;
        let mut taken = 0;
        loop {
            while expected <= taken + ahead {
                let Some(chunk) = soon.next() else { break };
                self.expect(chunk, expected % LISTS);
                expected += 1;
            }
            let Some(chunk) = now.next() else { break };
            self.take_in(chunk, taken % LISTS, number);
            taken += 1;
        }
    }
}

impl<F: FnMut(Step)> TakeIn<'_, F> {
    #[inline(always)]
    fn expect(&mut self, chunk: usize, list: usize) {
        let WorkingSet { chunks, lists, .. } = self.working_set;
        let places = &mut lists[list];
        places.list(self.dirty.chunk_words(chunk));
        if places.len() <= SPARSE
            && let Some(ages) = chunks.get(chunk)
        {
            places.iter().for_each(|place| prefetch(&ages.0[place]));
        }
        (self.observe)(Step::Expect { chunk, places });
    }

    #[inline(always)]
    fn take_in(&mut self, chunk: usize, list: usize, number: u16) {
        let WorkingSet { chunks, lists, counts, .. } = self.working_set;
        let places = &lists[list];
        let ages = chunks.get_or_insert(chunk, &NEVER_WRITTEN);
        (self.observe)(Step::TakeIn { chunk, places, ages });
        for place in places.iter() {
            let last = std::mem::replace(&mut ages.0[place], number);
            // A page that was a hole at the start is one more than were counted.
            counts[usize::from(last)] = counts[usize::from(last)].saturating_sub(1);
        }
    }
}

/// How many of the chunks of a sample to look ahead, below [`LISTS`].
fn chunks_ahead(dirty: &PageSet) -> usize {
    let chunks = dirty.occupied_chunks().count() as u64;
    (PAGES_AHEAD * chunks / dirty.len().max(1)).clamp(CHUNKS_AHEAD.0, CHUNKS_AHEAD.1) as usize
}

/// The number of samples told apart at one time.
pub(super) fn max_samples(config: &Config) -> usize {
    let wanted = config.max_time.as_nanos() / config.sample_interval.as_nanos().max(1);
    // Twice: a policy in rounds takes a sample at the end of each, too.
    wanted.saturating_mul(2).saturating_add(64).min(MAX_SAMPLES as u128) as usize
}

#[cfg(test)]
mod tests {
    use super::super::simulation::pages;
    use super::*;
    use proptest::prelude::*;

    fn sample(working_set: &mut WorkingSet, at_ms: u64, dirty: impl IntoIterator<Item = u64>) {
        let dirty = pages(working_set.nr_pages, dirty);
        working_set.record(&Sample { at: Duration::from_millis(at_ms), dirty: &dirty });
    }

    /// The backlog at the latest sample from the release time of every page, over all cuts.
    fn backlog_by_hand(releases: &[Option<f64>], now: f64, pages_per_s: f64, zero: u64) -> f64 {
        let cuts = releases.iter().flatten().chain(&[0.0]);
        cuts.map(|cut| {
            let later = releases.iter().flatten().filter(|release| *release >= cut).count();
            let unwritten = releases.iter().filter(|release| release.is_none()).count() as u64;
            let old = if *cut == 0.0 { unwritten - zero.min(unwritten) } else { 0 };
            (later as u64 + old) as f64 - pages_per_s * (now - cut)
        })
        .fold(0.0, f64::max)
    }

    proptest! {
        #[test]
        fn bound_and_t_star_are_what_the_last_writes_say(
            steps in proptest::collection::vec((1u64..90, proptest::collection::vec(0u64..60, 0..30)), 1..25),
            pages_per_s in 1.0f64..2000.0,
            budget_ms in 0u64..400,
            zero in 0u64..60,
        ) {
            let nr_pages = 60;
            let mut working_set = WorkingSet::with_room_for(nr_pages, nr_pages, 64);
            let mut releases = vec![None; nr_pages as usize];
            let budget = Duration::from_millis(budget_ms);
            let (mut at_ms, mut expected) = (0, None);
            for (gap_ms, dirty) in steps {
                let before_s = at_ms as f64 / 1e3;
                at_ms += gap_ms;
                dirty.iter().for_each(|page| releases[*page as usize] = Some(before_s));
                sample(&mut working_set, at_ms, dirty);
                let now_s = at_ms as f64 / 1e3;
                let bound = backlog_by_hand(&releases, now_s, pages_per_s, 0);
                let now = Duration::from_millis(at_ms);
                prop_assert!(working_set.bound(now, pages_per_s).abs_diff(bound as u64) <= 1);
                let backlog = backlog_by_hand(&releases, now_s, pages_per_s, zero);
                if expected.is_none() && backlog <= budget.as_secs_f64() * pages_per_s {
                    expected = Some((now, backlog));
                }
            }
            let found = working_set.t_star(pages_per_s, budget, zero);
            prop_assert_eq!(found.map(|t_star| t_star.at), expected.map(|(at, _)| at));
            if let (Some(found), Some((at, backlog))) = (found, expected) {
                prop_assert!((found.backlog as f64 - backlog).abs() <= 1.0);
                prop_assert!((found.total.as_secs_f64() - at.as_secs_f64() - backlog / pages_per_s).abs() < 1e-6);
            }
        }

        #[test]
        fn merging_samples_keeps_the_histogram_and_lowers_the_bound_at_most(
            steps in proptest::collection::vec(proptest::collection::vec(0u64..60, 0..20), 1..200),
            pages_per_s in 1.0f64..500.0,
        ) {
            let mut exact = WorkingSet::with_room_for(60, 60, 1024);
            let mut merged = WorkingSet::with_room_for(60, 60, 8);
            for (step, dirty) in steps.into_iter().enumerate() {
                let at_ms = 50 * (step as u64 + 1);
                sample(&mut exact, at_ms, dirty.iter().copied());
                sample(&mut merged, at_ms, dirty);
                prop_assert_eq!(merged.counts.iter().sum::<u64>(), 60);
                prop_assert!(merged.times.len() <= 9 && merged.times.is_sorted());
                let now = exact.last_sample_at();
                prop_assert_eq!(merged.last_sample_at(), now);
                prop_assert!(merged.bound(now, pages_per_s) <= exact.bound(now, pages_per_s));
                for page in (0..60).map(Pfn) {
                    let (one, other) = (exact.last_written(page), merged.last_written(page));
                    prop_assert_eq!(one.is_none(), other.is_none());
                    prop_assert!(other >= one, "a merged age is at most too young");
                }
            }
        }
    }

    #[test]
    fn a_zero_page_counts_until_it_is_noted_and_only_if_it_was_never_written() {
        let mut working_set = WorkingSet::with_room_for(100, 100, 64);
        sample(&mut working_set, 10, [5]);
        let now = Duration::from_millis(10);
        assert_eq!(working_set.bound(now, 100.0), 99);
        working_set.note_zero(Pfn(5));
        assert_eq!((working_set.zero_unwritten(), working_set.bound(now, 100.0)), (0, 99));
        working_set.note_zero(Pfn(6));
        assert_eq!((working_set.zero_unwritten(), working_set.bound(now, 100.0)), (1, 98));
        assert_eq!(working_set.never_written(), 99);
        assert_eq!(working_set.last_written(Pfn(5)), Some(now));
    }

    #[test]
    fn before_the_first_sample_the_bound_is_what_the_link_could_not_carry() {
        let working_set = WorkingSet::with_room_for(100, 100, 64);
        assert_eq!(working_set.bound(Duration::from_millis(500), 100.0), 50);
        assert_eq!(working_set.bound(Duration::from_secs(5), 100.0), 0);
        assert_eq!(working_set.t_star(100.0, Duration::from_secs(1), 0), None);
    }

    #[test]
    fn memory_is_taken_for_written_chunks_only() {
        let nr_chunks = 1000;
        let nr_pages = (nr_chunks * CHUNK_PAGES) as u64;
        let mut working_set = WorkingSet::with_room_for(nr_pages, nr_pages, 64);
        let before = working_set.state_bytes();
        sample(&mut working_set, 10, [1, 2, 511]);
        let grown = working_set.state_bytes() - before;
        assert!((1024..1200).contains(&grown), "{grown}");
    }
}
