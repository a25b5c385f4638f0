//! Policies that rank the pending pages by how long they are likely to rest, and fill the link from the top.
//!
//! A plan is made at each sample, and again when it is used up: pages are counted by rank, the cut is where the count
//! reaches what the link carries in one sample interval, and a walk over the chunks hands out the pages above the cut in
//! ascending order, which suits the copy stage. Nothing is listed or sorted, and the link is never left idle while
//! anything is pending: holding pages back cannot shorten a migration. What is deferred is what ranks below the cut.
//!
//! What a plan costs: the never-written pages of a chunk rank alike and are counted as one. The others are looked at one
//! by one only in chunks where one of them could rank above a cut through the never-written alone; and if there are very
//! many, only in every n-th such chunk, another one with each plan. docs/forecast-speed.md has the figures.

use super::age_ranks::AgeRanks;
use super::chunk_state::{ChunkState, Fade};
use super::chunks::Chunks;
use super::fronts::Fronts;
use super::log2::{LOG2_OF_COUNT, OCTAVE, in_units_q8, log2_q4};
use super::plan::{ChunkPlan, Histogram, NOTHING, Plan, bucket_of};
use super::policy::{Policy, View};
use super::stop::StopRule;
use super::working_set::{AgeChunk, SPARSE, Step};
use super::{Config, Convergence, Next, Peek, Sample, Verdict, WorkingSet};
use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::{CHUNK_WORDS, PageSet, Places, for_each_place};
use crate::sys::simd::{Work, at_best, prefetch};
use bitflags::bitflags;
use std::time::Duration;

/// Time constant of the activity of a chunk. Anything from 0.25 to 4 s does as well.
const ACTIVITY_MEMORY_S: f64 = 1.0;
/// Buckets in a sixteenth of an octave: chunks are told apart by less than pages are.
const BUCKETS_IN_A_RANK: i32 = 4;
/// Added to a rank so that none is negative.
const RANK_OFFSET: i32 = 24 * OCTAVE * BUCKETS_IN_A_RANK;
/// A page that a front will reach in some time ranks this much below one that has rested for as long: one octave.
const BEFORE_A_FRONT: i32 = OCTAVE;
/// A plan holds at least so many batches.
const MIN_BATCHES: usize = 2;
/// Written pages that a plan looks at one by one, about, where there are more: so many,
const LOOKS: u64 = 1 << 18;
/// and at least so many for each page that the link carries in a sample interval.
const LOOKS_PER_PAGE: u64 = 8;
/// Chunks to be looked at whose state is asked for before it is needed.
const CHUNKS_AHEAD: usize = 2;

bitflags! {
    /// What a rank is made of, besides age, write count and activity of the chunk, which are `heat`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Terms: u8 {
        /// The activity of the chunk as an AR(1) forecasts it, instead of its mean.
        const ACTIVITY = 1;
        /// Pages that a front is about to reach are held back.
        const FRONTS = 1 << 1;
        /// How active the chunks near by are: where there is writing, more will come.
        const NEIGHBOURS = 1 << 2;
        /// What the guest's writes so far say of how likely pages of an age are to be written.
        const HAZARD = 1 << 3;
    }
}

/// The activity of the chunk counts with the inverse of this.
const ACTIVITY_DIVISOR: i32 = 4;
/// The activity of the chunks near by counts with the inverse of this: hardly more than to tell apart chunks of which else
/// nothing is known. On recorded traces anything from 1/50 to 1/4 did as well.
const NEIGHBOURS_DIVISOR: i32 = 16;
/// A chunk's activity counts for its neighbours with a weight that falls by the inverse of two to this with each step.
const NEIGHBOURS_SHIFT: u32 = 3;

/// Times that ranks depend on, as of the latest sample.
struct Clock {
    since_start: Duration,
    unit: Duration,
}

/// The samples in which each page of a chunk was dirty, saturating.
#[derive(Clone)]
#[repr(align(64))]
struct CountChunk([u8; CHUNK_PAGES]);
// With the age of the page, which is two bytes, three bytes a page.
const _: () = assert!(size_of::<CountChunk>() + size_of::<AgeChunk>() == 3 * CHUNK_PAGES);

/// Room to make a plan in.
#[derive(Default)]
struct Scratch {
    histogram: Histogram,
    /// By chunk; what it says of a chunk without pending pages means nothing.
    chunks: Vec<ChunkPlan>,
    /// Chunks to be looked at.
    looked_at: Vec<u32>,
}

/// A policy that ranks pages. A page written `n` times ranks by
///
/// ```text
/// log2(age) - log2(1 + n) - 1/4 activity [- 1/16 activity near by]
/// ```
///
/// with `activity` the log of one plus the pages of its chunk that are written per unit; a page never written has the time
/// since the start and a second for its age. What is beyond that is by [`Terms`].
pub(super) struct Ranked {
    config: Config,
    terms: Terms,
    counts: Chunks<CountChunk>,
    states: Chunks<ChunkState>,
    age_ranks: AgeRanks,
    fronts: Fronts,
    /// For each chunk the activity around it, in 256ths of an octave; empty without [`Terms::NEIGHBOURS`].
    nearby_q8: Vec<i32>,
    fade: Fade,
    clock: Clock,
    /// A sample has come since ages and clock were set.
    stale: bool,
    scratch: Scratch,
    looks: u64,
    /// Plans made that looked at a part of the chunks.
    turn: u64,
    plan: Option<Plan>,
    stop: StopRule,
}

/// The pages of one chunk, and what they have in common.
struct Members<'a> {
    ages: &'a AgeChunk,
    counts: &'a CountChunk,
    /// To be added to the rank of each page.
    shift: i32,
    /// A front is on its way: the rank of a page that it has not reached is this at most.
    most: Option<i32>,
}

impl Ranked {
    pub(super) fn new(config: Config, terms: Terms) -> Self {
        let nr_chunks = (config.nr_pages as usize).div_ceil(CHUNK_PAGES);
        Ranked {
            config,
            terms,
            counts: Chunks::new(nr_chunks),
            states: Chunks::new(nr_chunks),
            age_ranks: AgeRanks::new(&config, terms.contains(Terms::HAZARD)),
            fronts: Fronts::new(config.sample_interval),
            nearby_q8: vec![0; if terms.contains(Terms::NEIGHBOURS) { nr_chunks } else { 0 }],
            fade: Fade::new(ACTIVITY_MEMORY_S, config.sample_interval),
            clock: Clock { since_start: Duration::ZERO, unit: config.sample_interval },
            stale: true,
            scratch: Scratch {
                histogram: Histogram::new(),
                chunks: vec![ChunkPlan::default(); nr_chunks],
                looked_at: Vec::with_capacity(nr_chunks),
            },
            looks: LOOKS,
            turn: 0,
            plan: None,
            stop: StopRule::new(config),
        }
    }

    /// Brings ages and clock up to the latest sample.
    fn refresh(&mut self, working_set: &WorkingSet) {
        self.age_ranks.refresh(working_set);
        self.clock.since_start = working_set.last_sample_at();
        self.look_around();
        self.stale = false;
    }

    /// The most that a page which a front is about to reach can rank, if one is on its way to the chunk.
    #[inline(always)]
    fn most(&self, chunk: usize) -> Option<i32> {
        let arrival = self.fronts.arrival(chunk, self.clock.since_start)?;
        Some(log2_q4(256 + in_units_q8(arrival, self.clock.unit)) - BEFORE_A_FRONT)
    }

    /// log2 of one plus the pages of a chunk that are written per unit.
    #[inline(always)]
    fn activity_q4(&self, state: &ChunkState) -> i32 {
        if self.terms.contains(Terms::ACTIVITY) {
            return state.forecast.forecast_q4();
        }
        log2_q4(256 + (state.activity.now_q16(&self.fade) >> 8))
    }

    /// What the state of a chunk, and what lies around it, say of its pages: to be added to their ranks, in buckets.
    #[inline(always)]
    fn shift(&self, chunk: usize, state: &ChunkState) -> i32 {
        let nearby_q8 = self.nearby_q8.get(chunk).copied().unwrap_or(0);
        let nearby = nearby_q8 * BUCKETS_IN_A_RANK / NEIGHBOURS_DIVISOR / 16;
        -(self.activity_q4(state) * BUCKETS_IN_A_RANK / ACTIVITY_DIVISOR + nearby)
    }

    /// Sets `nearby_q8` to the activity around each chunk: an exponential mean of that to the left, without the chunk itself,
    /// plus one of that to the right.
    fn look_around(&mut self) {
        let mut nearby = std::mem::take(&mut self.nearby_q8);
        let step = |mean: &mut i32, chunk: usize| {
            let before = *mean;
            let activity_q8 = self.states.get(chunk).map_or(0, |state| self.activity_q4(state) * 16);
            *mean += (activity_q8 - before) >> NEIGHBOURS_SHIFT;
            before
        };
        let mut left = 0;
        for (chunk, nearby) in nearby.iter_mut().enumerate() {
            *nearby = step(&mut left, chunk);
        }
        let mut right = 0;
        for (chunk, nearby) in nearby.iter_mut().enumerate().rev() {
            *nearby += step(&mut right, chunk);
        }
        self.nearby_q8 = nearby;
    }

    #[inline(always)]
    fn members<'a>(&'a self, chunk: usize, shift: i32, working_set: &'a WorkingSet) -> Option<Members<'a>> {
        let (ages, counts) = (working_set.ages(chunk)?, self.counts.get(chunk)?);
        Some(Members { ages, counts, shift, most: self.most(chunk) })
    }

    /// The bucket of a written page.
    #[inline(always)]
    fn bucket(&self, members: &Members, place: usize) -> i16 {
        let last = members.ages.0[place];
        let count = usize::from(members.counts.0[place]);
        let mut rank = self.age_ranks.written_q4(last) - i32::from(LOG2_OF_COUNT[count]);
        if let Some(most) = members.most
            && !self.age_ranks.is_just_passed(last)
        {
            rank = rank.min(most);
        }
        bucket_of(rank * BUCKETS_IN_A_RANK + members.shift)
    }

    /// Finds the cut above which about `budget` pages rank.
    fn make_plan(&mut self, view: &View, budget: u64) -> Plan {
        if self.stale {
            self.refresh(view.working_set);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        at_best(CountNeverWritten { ranked: self, pending: view.pending, scratch: &mut scratch });
        let floor = scratch.histogram.cut(budget).cut;
        self.choose_chunks(view.pending, floor, budget, &mut scratch);
        at_best(CountWritten { ranked: self, view, scratch: &mut scratch });
        let plan = scratch.histogram.cut(budget);
        self.scratch = scratch;
        plan
    }

    /// Counts the pending pages that were never written, and notes for each chunk how many others there are and in which
    /// bucket they are at most.
    #[inline(always)]
    fn count_never_written(&self, pending: &PageSet, scratch: &mut Scratch) {
        scratch.histogram.clear();
        let rank_never = self.age_ranks.never_written_q4();
        // A written page has been dirty in one sample at least. As low as it can be: by it a plan leaves out the chunks whose
        // written pages cannot come above the cut.
        let most_written = self.age_ranks.most_written_q4() - OCTAVE;
        let idle = ChunkState::default();
        for chunk in pending.occupied_chunks() {
            let state = self.states.get(chunk).unwrap_or(&idle);
            let shift = self.shift(chunk, state) + RANK_OFFSET;
            let pages = pending.chunk_words(chunk).iter().zip(&state.written);
            let written_pages: u32 = pages.map(|(pending, written)| (pending & written).count_ones()).sum();
            let never_pages = pending.chunk_len(chunk) as u32 - written_pages;
            let rank = self.most(chunk).map_or(rank_never, |most| rank_never.min(most));
            let never_written = bucket_of(rank * BUCKETS_IN_A_RANK + shift);
            scratch.histogram.add(never_written, never_pages);
            scratch.chunks[chunk] = ChunkPlan {
                never_written: if never_pages > 0 { never_written } else { NOTHING },
                written: if written_pages > 0 {
                    bucket_of(most_written * BUCKETS_IN_A_RANK + shift)
                } else {
                    NOTHING
                },
                shift_written: shift as i16,
                written_pages: written_pages as u16,
            };
        }
    }

    /// Chooses the chunks whose written pages are looked at: those where one may reach `floor`, or a part of them in
    /// turn. A page that waits for its turn waits for a small part of the time that it takes to send them all.
    fn choose_chunks(&mut self, pending: &PageSet, floor: i16, budget: u64, scratch: &mut Scratch) {
        let Scratch { chunks, looked_at, .. } = scratch;
        looked_at.clear();
        let mut pages = 0;
        for chunk in pending.occupied_chunks() {
            let plan = &mut chunks[chunk];
            if plan.written_pages > 0 && plan.written >= floor {
                looked_at.push(chunk as u32);
                pages += u64::from(plan.written_pages);
            } else {
                plan.written = NOTHING;
            }
        }
        let parts = pages.div_ceil(self.looks.max(LOOKS_PER_PAGE * budget)).min(looked_at.len() as u64);
        if parts <= 1 {
            return;
        }
        let (turn, mut index) = (self.turn % parts, 0);
        self.turn += 1;
        looked_at.retain(|chunk| {
            let is_its_turn = index % parts == turn;
            index += 1;
            if !is_its_turn {
                chunks[*chunk as usize].written = NOTHING;
            }
            is_its_turn
        });
    }

    /// Counts the pending written pages of the chosen chunks, and notes the best of each.
    #[inline(always)]
    fn count_written(&self, view: &View, scratch: &mut Scratch) {
        let Scratch { histogram, chunks, looked_at } = scratch;
        for (index, chunk) in looked_at.iter().map(|chunk| *chunk as usize).enumerate() {
            if let Some(ahead) = looked_at.get(index + CHUNKS_AHEAD) {
                let ahead = *ahead as usize;
                if usize::from(chunks[ahead].written_pages) <= SPARSE
                    && let Some(members) = self.members(ahead, 0, view.working_set)
                {
                    for_each_place(&self.pending_written(ahead, view.pending), |place| {
                        prefetch(&members.ages.0[place]);
                        prefetch(&members.counts.0[place]);
                    });
                }
            }
            let plan = &mut chunks[chunk];
            let shift = i32::from(plan.shift_written);
            plan.written = NOTHING;
            let Some(members) = self.members(chunk, shift, view.working_set) else { continue };
            for_each_place(&self.pending_written(chunk, view.pending), |place| {
                let bucket = self.bucket(&members, place);
                histogram.add(bucket, 1);
                plan.written = plan.written.max(bucket);
            });
        }
    }

    #[inline(always)]
    fn pending_written(&self, chunk: usize, pending: &PageSet) -> [u64; CHUNK_WORDS] {
        let mut words = *pending.chunk_words(chunk);
        match self.states.get(chunk) {
            Some(state) => words.iter_mut().zip(&state.written).for_each(|(word, written)| *word &= written),
            None => words = [0; CHUNK_WORDS],
        }
        words
    }

    /// Hands out the next pages of the plan.
    fn follow(&self, plan: &mut Plan, view: &View, max: usize, out: &mut Vec<Pfn>) {
        let end = out.len() + max;
        for chunk in plan.cursor.chunk()..view.pending.nr_chunks() {
            if plan.left == 0 {
                return;
            }
            let ranks = self.scratch.chunks[chunk];
            if view.pending.chunk_len(chunk) == 0
                || !plan.takes(ranks.never_written) && !plan.takes(ranks.written)
            {
                continue;
            }
            if self.follow_chunk(plan, chunk, view, end, out).is_none() {
                return;
            }
        }
        plan.left = 0;
    }

    /// Hands out the plan's pages in one chunk; none if `out` is full before its end.
    fn follow_chunk(
        &self,
        plan: &mut Plan,
        chunk: usize,
        view: &View,
        end: usize,
        out: &mut Vec<Pfn>,
    ) -> Option<()> {
        let ranks = self.scratch.chunks[chunk];
        let members = self.members(chunk, i32::from(ranks.shift_written), view.working_set);
        let written = self.states.get(chunk).map_or([0; CHUNK_WORDS], |state| state.written);
        let first = if chunk == plan.cursor.chunk() { plan.cursor.in_chunk() } else { 0 };
        let words = view.pending.chunk_words(chunk).iter().zip(&written).enumerate();
        for (index, (pending, written)) in words.skip(first / 64) {
            let mut rest = *pending;
            if !plan.takes(ranks.never_written) {
                rest &= written;
            }
            if !plan.takes(ranks.written) {
                rest &= !written;
            }
            if index == first / 64 {
                rest &= u64::MAX << (first % 64);
            }
            while rest != 0 {
                let place = index * 64 + rest.trailing_zeros() as usize;
                let is_written = written >> (place % 64) & 1 == 1;
                rest &= rest - 1;
                let bucket = match &members {
                    Some(members) if is_written => self.bucket(members, place),
                    _ => ranks.never_written,
                };
                if !plan.takes(bucket) {
                    continue;
                }
                let pfn = Pfn((chunk * CHUNK_PAGES + place) as u64);
                if out.len() == end {
                    plan.cursor = pfn;
                    return None;
                }
                plan.note_taken(bucket);
                out.push(pfn);
            }
        }
        Some(())
    }

    /// Asks for the state of a chunk of the sample that comes soon.
    #[inline(always)]
    fn expect(&self, chunk: usize, places: &Places) {
        if let Some(state) = self.states.get(chunk) {
            prefetch(&state.written);
            prefetch(&state.forecast);
        }
        if places.len() <= SPARSE
            && let Some(counts) = self.counts.get(chunk)
        {
            places.iter().for_each(|place| prefetch(&counts.0[place]));
        }
    }

    /// Takes in a chunk of the sample: `words` and `places` are its dirty pages.
    #[inline(always)]
    fn take_in(&mut self, chunk: usize, words: &[u64; CHUNK_WORDS], places: &Places, ages: &AgeChunk) {
        let state = self.states.get_or_insert_with(chunk, ChunkState::default);
        state.written.iter_mut().zip(words).for_each(|(written, word)| *written |= word);
        state.note_written(places.len(), &self.fade);
        let counts = self.counts.get_or_insert_with(chunk, || CountChunk([0; CHUNK_PAGES]));
        let mut fresh = 0;
        for place in places.iter() {
            fresh += u32::from(self.age_ranks.is_fresh(ages.0[place]));
            counts.0[place] = counts.0[place].saturating_add(1);
        }
        if self.terms.contains(Terms::FRONTS) {
            self.fronts.note_chunk(chunk, words, fresh);
        }
    }
}

/// [`Ranked::count_never_written`].
struct CountNeverWritten<'a> {
    ranked: &'a Ranked,
    pending: &'a PageSet,
    scratch: &'a mut Scratch,
}

impl Work for CountNeverWritten<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.ranked.count_never_written(self.pending, self.scratch);
    }
}

/// [`Ranked::count_written`].
struct CountWritten<'a> {
    ranked: &'a Ranked,
    view: &'a View<'a>,
    scratch: &'a mut Scratch,
}

impl Work for CountWritten<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.ranked.count_written(self.view, self.scratch);
    }
}

impl Policy for Ranked {
    fn on_sample(&mut self, sample: &Sample, working_set: &WorkingSet) {
        self.age_ranks.begin_sample(working_set, sample.at);
        self.fade.begin_sample(sample.at, sample.at.saturating_sub(working_set.last_sample_at()));
        self.stale = true;
        self.plan = None;
    }

    fn on_chunk(&mut self, dirty: &PageSet, step: Step) {
        match step {
            Step::Expect { chunk, places } => self.expect(chunk, places),
            Step::TakeIn { chunk, places, ages } => {
                self.take_in(chunk, dirty.chunk_words(chunk), places, ages)
            }
        }
    }

    fn end_sample(&mut self, working_set: &WorkingSet) {
        self.fronts.end_sample(working_set.last_sample_at());
        self.age_ranks.end_sample(working_set);
        if self.terms.contains(Terms::ACTIVITY) {
            self.states.iter_mut().for_each(|state| state.end_sample(&self.fade));
        }
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

    fn is_lingering(&self) -> bool {
        self.stop.is_lingering()
    }

    fn deferred(&self, pending: &PageSet) -> u64 {
        self.plan.map_or(0, |plan| pending.len().saturating_sub(plan.left))
    }

    fn state_bytes(&self) -> usize {
        self.counts.bytes()
            + self.states.bytes()
            + size_of_val(&*self.scratch.chunks)
            + self.scratch.looked_at.capacity() * size_of::<u32>()
            + size_of_val(&*self.nearby_q8)
            + self.age_ranks.bytes()
    }

    fn huge_bytes(&self) -> usize {
        self.counts.huge_bytes() + self.states.huge_bytes()
    }
}

#[cfg(test)]
mod tests;
