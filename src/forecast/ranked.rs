//! Policies that rank the pending pages by how long they are likely to rest, and fill the link from the top.
//!
//! A plan is made at each sample, and again when it is used up: one pass over the pending chunks counts pages
//! by rank, the cut is where the count reaches what the link carries in one sample interval, and a second pass
//! hands out the pages above the cut in ascending order, which suits the copy stage. Nothing is listed or
//! sorted, and the link is never left idle while anything is pending: holding pages back cannot shorten a
//! migration. What is deferred is what ranks below the cut.
//!
//! A plan costs 0.1 to 0.3 ns a pending page where few chunks were ever written, since all pages of a chunk
//! without history rank alike, and 3 (`heat`) to 8 ns (`ar`) where every page has a history.

use super::chunks::Chunks;
use super::fronts::Fronts;
use super::log2::{OCTAVE, in_units_q8, log2_q4};
use super::policy::{Policy, View};
use super::stop::StopRule;
use super::working_set::{AgeChunk, max_samples};
use super::{Config, Convergence, Next, Peek, Sample, Verdict, WorkingSet};
use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::PageSet;
use std::ops::ControlFlow;
use std::time::Duration;

/// Time constant of the activity of a chunk. Anything from 0.25 to 4 s does as well.
const ACTIVITY_MEMORY_S: f64 = 1.0;
/// Ranks told apart: eighths of an octave, 64 octaves, and in each a class by [`tie_class`].
const BUCKETS: usize = 512 * TIE_CLASSES;
/// Added to a rank so that none is negative.
const RANK_OFFSET: i32 = 24 * OCTAVE;
/// Classes of chunks among pages of one rank.
const TIE_CLASSES: usize = 8;
/// A page that a front will reach in some time ranks this much below one that has rested for as long: one octave.
const BEFORE_A_FRONT: i32 = OCTAVE;
/// A page written within three units has just been passed by the front that comes to its chunk: the log of those and one.
const JUST_PASSED: i32 = 2 * OCTAVE;
/// A plan holds at least so many batches.
const MIN_BATCHES: usize = 2;

/// Times that ranks depend on, as of the latest sample.
pub(super) struct Clock {
    pub since_start: Duration,
    pub unit: Duration,
    /// log2 of the time since the start, in units, plus one.
    pub log2_since_start: i32,
}

/// What is known of one page, and how it ranks. Ranks are in 1/16 octave; the largest is sent first.
pub(super) trait PageModel: Copy + Send {
    /// The activity of the chunk counts with the inverse of this.
    const ACTIVITY_DIVISOR: i32;
    /// Whether pages that a front is about to reach are held back.
    const FOLLOWS_FRONTS: bool;
    /// A page without history.
    const NEVER_WRITTEN: Self;

    /// The page was dirty in a sample; with it log2 of the time since it last was, in units.
    fn note_write(&mut self, log2_interval: Option<u8>);

    /// The rank of the page; `log2_age` is the log of one unit plus the time since it was last written.
    fn rank(self, log2_age: i32, clock: &Clock) -> i32;

    /// What stands for the age of a page that was never written.
    fn log2_age_never_written(clock: &Clock) -> i32;
}

/// The models of a chunk's pages.
#[derive(Clone)]
#[repr(align(64))]
struct ModelChunk<M>([M; CHUNK_PAGES]);
const _: () = assert!(size_of::<ModelChunk<super::heat::HeatPage>>() == CHUNK_PAGES);
// With the age of the page, which is two bytes, eight bytes a page and 4 KiB a chunk.
const _: () = assert!(size_of::<ModelChunk<super::ar::ArPage>>() + size_of::<AgeChunk>() == 8 * CHUNK_PAGES);

/// What is left of the plan.
#[derive(Clone, Copy)]
struct Plan {
    cursor: Pfn,
    /// Pages in buckets above this go; of those in it, `quota`.
    cut: usize,
    quota: u64,
    left: u64,
}

impl Plan {
    #[inline]
    fn takes(&self, bucket: usize) -> bool {
        bucket > self.cut || bucket == self.cut && self.quota > 0
    }
}

/// A policy that ranks pages by the model `M`.
pub(super) struct Ranked<M> {
    config: Config,
    models: Chunks<ModelChunk<M>>,
    /// Dirty pages per unit in each chunk, exponential mean.
    activity: Chunks<f32>,
    /// For each sample number log2 of the time since it was taken; entry 0 stands for pages never written.
    log2_ages: Vec<i16>,
    fronts: Fronts,
    clock: Clock,
    /// A sample has come since ages and clock were set.
    stale: bool,
    histogram: Vec<u32>,
    plan: Option<Plan>,
    stop: StopRule,
}

/// What the pages of one chunk have in common.
struct ChunkRanks<'a, M> {
    /// None if no page of the chunk was ever written.
    known: Option<(&'a AgeChunk, &'a ModelChunk<M>)>,
    /// To be added to the rank of each page.
    shift: i32,
    /// A front is on its way: the rank of a page that it has not reached is this at most.
    most: Option<i32>,
    tie_class: usize,
}

impl<M: PageModel> Ranked<M> {
    pub(super) fn new(config: Config) -> Self {
        let nr_chunks = (config.nr_pages as usize).div_ceil(CHUNK_PAGES);
        Ranked {
            config,
            models: Chunks::new(nr_chunks),
            activity: Chunks::new(nr_chunks),
            log2_ages: Vec::with_capacity(max_samples(&config) + 1),
            fronts: Fronts::new(config.sample_interval),
            clock: Clock { since_start: Duration::ZERO, unit: config.sample_interval, log2_since_start: 0 },
            stale: true,
            histogram: vec![0; BUCKETS],
            plan: None,
            stop: StopRule::new(config),
        }
    }

    /// Sets `log2_ages` to the log of the time from each sample to `at`, plus `offset` units.
    fn fill_ages(&mut self, working_set: &WorkingSet, at: Duration, offset: u64) {
        let unit = self.config.sample_interval;
        self.log2_ages.clear();
        let log2_age =
            |taken: &Duration| log2_q4(in_units_q8(at.saturating_sub(*taken), unit) + 256 * offset) as i16;
        self.log2_ages.extend(working_set.times().iter().map(log2_age));
    }

    /// Brings ages and clock up to the latest sample.
    fn refresh(&mut self, working_set: &WorkingSet) {
        let at = working_set.last_sample_at();
        self.fill_ages(working_set, at, 1);
        self.clock.since_start = at;
        self.clock.log2_since_start = i32::from(self.log2_ages[0]);
        self.log2_ages[0] = M::log2_age_never_written(&self.clock) as i16;
        self.stale = false;
    }

    fn note_activity(&mut self, sample: &Sample, since_last: Duration) {
        let elapsed_s = since_last.as_secs_f64().max(1e-6);
        let keep = (-elapsed_s / ACTIVITY_MEMORY_S).exp();
        let gain = (1.0 - keep) * self.config.sample_interval.as_secs_f64() / elapsed_s;
        for activity in self.activity.iter_mut() {
            *activity *= keep as f32;
        }
        for chunk in sample.dirty.occupied_chunks() {
            *self.activity.get_or_insert(chunk, &0.0) += (gain * sample.dirty.chunk_len(chunk) as f64) as f32;
        }
    }

    fn ranks_of<'a>(&'a self, chunk: usize, working_set: &'a WorkingSet) -> ChunkRanks<'a, M> {
        let activity_q8 = self.activity.get(chunk).map_or(256, |activity| ((1.0 + activity) * 256.0) as u64);
        let arrival = self.fronts.arrival(chunk, self.clock.since_start);
        ChunkRanks {
            most: arrival.map(|time| log2_q4(256 + in_units_q8(time, self.clock.unit)) - BEFORE_A_FRONT),
            known: working_set.ages(chunk).zip(self.models.get(chunk)),
            shift: RANK_OFFSET - log2_q4(activity_q8) / M::ACTIVITY_DIVISOR,
            tie_class: tie_class(chunk),
        }
    }

    #[inline]
    fn bucket(&self, ranks: &ChunkRanks<M>, in_chunk: usize) -> usize {
        let (number, model) = match ranks.known {
            None => (0, M::NEVER_WRITTEN),
            Some((ages, models)) => (usize::from(ages.0[in_chunk]), models.0[in_chunk]),
        };
        let log2_age = i32::from(self.log2_ages[number]);
        let mut rank = model.rank(log2_age, &self.clock);
        if let Some(most) = ranks.most
            && (number == 0 || log2_age > JUST_PASSED)
        {
            rank = rank.min(most);
        }
        let eighths = ((rank + ranks.shift) / 2).clamp(0, (BUCKETS / TIE_CLASSES - 1) as i32);
        eighths as usize * TIE_CLASSES + ranks.tie_class
    }

    /// Finds the cut above which about `budget` pages rank.
    fn make_plan(&mut self, view: &View, budget: u64) -> Plan {
        if self.stale {
            self.refresh(view.working_set);
        }
        let mut histogram = std::mem::take(&mut self.histogram);
        histogram.fill(0);
        for chunk in view.pending.occupied_chunks() {
            let ranks = self.ranks_of(chunk, view.working_set);
            if ranks.known.is_none() {
                histogram[self.bucket(&ranks, 0)] += view.pending.chunk_len(chunk) as u32;
            } else {
                view.pending
                    .pages_of_chunk(chunk)
                    .for_each(|pfn| histogram[self.bucket(&ranks, pfn.in_chunk())] += 1);
            }
        }
        let left = budget.min(view.pending.len());
        let (mut cut, mut above) = (BUCKETS - 1, 0);
        while above + u64::from(histogram[cut]) < left {
            above += u64::from(histogram[cut]);
            cut -= 1;
        }
        self.histogram = histogram;
        Plan { cursor: Pfn(0), cut, quota: left - above, left }
    }

    /// Hands out the next pages of the plan.
    fn follow(&self, plan: &mut Plan, view: &View, max: usize, out: &mut Vec<Pfn>) {
        let (end, first_chunk) = (out.len() + max, plan.cursor.chunk());
        for chunk in first_chunk..view.pending.nr_chunks() {
            if plan.left == 0 {
                return;
            }
            if view.pending.chunk_len(chunk) == 0 {
                continue;
            }
            let ranks = self.ranks_of(chunk, view.working_set);
            if ranks.known.is_none() && !plan.takes(self.bucket(&ranks, 0)) {
                continue;
            }
            let cursor = plan.cursor;
            let full = view.pending.pages_of_chunk(chunk).try_for_each(|pfn| {
                let bucket = self.bucket(&ranks, pfn.in_chunk());
                if !plan.takes(bucket) || pfn < cursor {
                    return ControlFlow::Continue(());
                }
                if out.len() == end {
                    plan.cursor = pfn;
                    return ControlFlow::Break(());
                }
                plan.quota -= u64::from(bucket == plan.cut);
                plan.left -= 1;
                out.push(pfn);
                ControlFlow::Continue(())
            });
            if full.is_break() {
                return;
            }
        }
        plan.left = 0;
    }
}

/// Pages of one rank go by class of their chunk and only then by number, so that the first to be sent are not
/// simply the lowest: which never-written page goes first moves the result, and position says nothing about it.
fn tie_class(chunk: usize) -> usize {
    const FIBONACCI: u64 = 0x9e37_79b9_7f4a_7c15;
    ((chunk as u64).wrapping_mul(FIBONACCI) >> 32) as usize % TIE_CLASSES
}

impl<M: PageModel> Policy for Ranked<M> {
    fn on_sample(&mut self, sample: &Sample, working_set: &WorkingSet) {
        self.fill_ages(working_set, sample.at, 0);
        let empty = ModelChunk([M::NEVER_WRITTEN; CHUNK_PAGES]);
        for chunk in sample.dirty.occupied_chunks() {
            let ages = working_set.ages(chunk);
            let models = self.models.get_or_insert(chunk, &empty);
            let mut fresh = 0;
            for pfn in sample.dirty.pages_of_chunk(chunk) {
                let last = ages.map_or(0, |ages| usize::from(ages.0[pfn.in_chunk()]));
                let log2_interval = (last > 0).then(|| self.log2_ages[last].clamp(0, 255) as u8);
                models.0[pfn.in_chunk()].note_write(log2_interval);
                fresh += u32::from(log2_interval.is_none_or(|log2| i32::from(log2) > OCTAVE));
            }
            if M::FOLLOWS_FRONTS {
                self.fronts.note_chunk(chunk, sample.dirty.chunk_words(chunk), fresh);
            }
        }
        self.fronts.end_sample(sample.at);
        self.note_activity(sample, sample.at.saturating_sub(working_set.last_sample_at()));
        self.stale = true;
        self.plan = None;
    }

    fn next_batch(&mut self, view: &View, max: usize, _: &mut dyn Peek, out: &mut Vec<Pfn>) -> Next {
        if view.pending.is_empty() {
            return Next::Idle;
        }
        let per_sample = view.link.pages_per_s * self.config.sample_interval.as_secs_f64();
        let budget = (per_sample as u64).max((MIN_BATCHES * max) as u64);
        let mut plan = match self.plan.filter(|plan| plan.left > 0) {
            Some(plan) => plan,
            None => self.make_plan(view, budget),
        };
        self.follow(&mut plan, view, max, out);
        self.plan = Some(plan);
        Next::Batch
    }

    fn stop(&mut self, view: &View, convergence: &mut Convergence) -> Verdict {
        self.stop.judge(view, convergence)
    }

    fn deferred(&self, pending: &PageSet) -> u64 {
        self.plan.map_or(0, |plan| pending.len().saturating_sub(plan.left))
    }

    fn state_bytes(&self) -> usize {
        self.models.bytes()
            + self.activity.bytes()
            + size_of_val(&*self.histogram)
            + size_of_val(&*self.log2_ages)
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{Simulation, config};
    use crate::forecast::{Next, PolicyKind};
    use std::time::Duration;

    const RANKED: [PolicyKind; 2] = [PolicyKind::Heat, PolicyKind::Ar];

    /// 4096 pages after 20 samples; pages 0..64 were written in every one, 512..576 in the first only.
    fn with_history(kind: PolicyKind, pages_per_s: f64) -> Simulation {
        let mut guest = Simulation::new(kind, config(4096), pages_per_s);
        for step in 0..20 {
            (0..64).for_each(|page| guest.write(page));
            if step == 0 {
                (512..576).for_each(|page| guest.write(page));
            }
            guest.now += Duration::from_millis(50);
            guest.sample();
        }
        guest
    }

    #[test]
    fn cold_goes_before_hot_and_each_plan_ascends() {
        for kind in RANKED {
            let mut guest = with_history(kind, 2000.0);
            let mut sent = Vec::new();
            while let (Next::Batch, batch) = guest.batch(50) {
                assert!(batch.is_sorted(), "{kind}");
                sent.extend(batch);
            }
            let place = |page: u64| sent.iter().position(|sent| *sent == page).expect("all were sent");
            let (hot, once, never) = (place(10), place(520), place(3000));
            assert!(never < once && once < hot, "{kind}: {never} {once} {hot}");
            assert!(place(600) > never, "{kind}: a page never written takes its chance from its chunk");
            assert_eq!(sent.len(), 4096);
        }
    }

    #[test]
    fn the_link_is_never_idle_while_anything_is_pending() {
        for kind in RANKED {
            let mut guest = with_history(kind, 2000.0);
            while !guest.engine.pending().is_empty() {
                let (next, batch) = guest.batch(64);
                assert_eq!((next, batch.is_empty()), (Next::Batch, false), "{kind}");
            }
            assert_eq!(guest.batch(64), (Next::Idle, vec![]));
        }
    }

    #[test]
    fn what_ranks_below_the_cut_is_deferred() {
        for kind in RANKED {
            let mut guest = with_history(kind, 20_000.0);
            guest.batch(100);
            assert_eq!(guest.engine.deferred(), 4096 - 1000, "{kind}: a plan is 20000/s times 50 ms");
            assert_eq!(guest.engine.pending().len(), 4096 - 100);
        }
    }

    #[test]
    fn ties_do_not_go_by_position() {
        for kind in RANKED {
            let mut guest = Simulation::new(kind, config(512 * 64), 20_000.0);
            let first: Vec<u64> = guest.batch(1000).1;
            assert!(first.iter().any(|page| *page > 512 * 8), "{kind}: not simply the lowest");
        }
    }

    #[test]
    fn state_is_at_most_eight_bytes_a_written_page() {
        let mut guest = Simulation::new(PolicyKind::Ar, config(1 << 20), 2000.0);
        let before = guest.engine.state_bytes();
        (0..512 * 100).for_each(|page| guest.write(page));
        guest.now += Duration::from_millis(50);
        guest.sample();
        let per_page = (guest.engine.state_bytes() - before) as f64 / (512.0 * 100.0);
        assert!((8.0..8.1).contains(&per_page), "{per_page}");
    }
}
