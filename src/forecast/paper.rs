//! The published policy, as far as its abstract fixes it (Chen, Zhang, Zhang, Computer Science 40(9), 2013):
//! "according to all recorded intervals in which a memory page is modified, predicts the next modification time
//! of the page, and retransmits the page when the next modification time is greater than a threshold".
//!
//! What it leaves open is settled here in the most literal way: times are the starts of rounds, the predictor
//! is a linear AR(1) by Yule-Walker over the page's whole history, a page that is overdue counts as imminent,
//! and a page without an interval is sent. The loop around it is the one of its time, Xen's up to 4.5. This is
//! a baseline to be beaten: a constant threshold starves, and rounds give a page few intervals.

use super::chunks::Chunks;
use super::legacy_loop::LegacyLoop;
use super::policy::{Policy, View};
use super::{Convergence, Next, Peek, Sample, Verdict, WorkingSet};
use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::PageSet;
use std::time::Duration;

/// A page is sent if its next write is forecast to be further away than this. The order of one round of a
/// migration that takes a few seconds; the abstract gives no value.
const THRESHOLD_S: f64 = 1.0;

/// Rounds that a page's history can hold: more than the loop ever makes.
const MAX_ROUNDS: usize = 32;

/// For each page the rounds at whose start it was found modified, one bit a round: all recorded intervals.
#[derive(Clone)]
#[repr(align(64))]
struct HistoryChunk([u32; CHUNK_PAGES]);
const _: () = assert!(size_of::<HistoryChunk>() == 4 * CHUNK_PAGES);

const NO_HISTORY: HistoryChunk = HistoryChunk([0; CHUNK_PAGES]);

pub(super) struct Paper {
    legacy: LegacyLoop,
    histories: Chunks<HistoryChunk>,
    /// Start of each round, in seconds; entry 0 is the start of the first, at which nothing was modified yet.
    round_starts: Vec<f64>,
    /// Pages held back in this round.
    held_back: PageSet,
    /// This round sent nothing, and a sample has come since: the next round may begin.
    rested: bool,
}

impl Paper {
    pub(super) fn new(populated: &PageSet) -> Self {
        let held_back = PageSet::empty(populated.nr_pages());
        let mut round_starts = Vec::with_capacity(MAX_ROUNDS);
        round_starts.push(0.0);
        Paper {
            legacy: LegacyLoop::new(populated),
            histories: Chunks::new(held_back.nr_chunks()),
            round_starts,
            held_back,
            rested: false,
        }
    }

    fn begin_round(&mut self, at: Duration) {
        let round = self.round_starts.len();
        if round < MAX_ROUNDS {
            self.round_starts.push(at.as_secs_f64());
            let log = self.legacy.rounds.log();
            for chunk in log.occupied_chunks() {
                let history = self.histories.get_or_insert(chunk, &NO_HISTORY);
                for pfn in log.pages_of_chunk(chunk) {
                    history.0[pfn.in_chunk()] |= 1 << round;
                }
            }
        }
        self.legacy.rounds.carry_over(&self.held_back);
        self.held_back.clear();
        self.legacy.begin();
        self.rested = false;
    }

    /// Looks at candidates until `max` of them are worth sending.
    fn choose(&mut self, now_s: f64, max: usize, out: &mut Vec<Pfn>) {
        let end = out.len() + max;
        let mut last = None;
        for pfn in self.legacy.rounds.candidates() {
            let history = self.histories.get(pfn.chunk()).map_or(0, |chunk| chunk.0[pfn.in_chunk()]);
            let next_s = forecast_next(history, &self.round_starts);
            if next_s.is_none_or(|next_s| next_s - now_s > THRESHOLD_S) {
                out.push(pfn);
            } else {
                self.held_back.insert(pfn);
            }
            last = Some(pfn);
            if out.len() == end {
                break;
            }
        }
        if let Some(last) = last {
            self.legacy.rounds.advance_past(last);
        }
    }
}

/// The time of the next write by a linear AR(1) on the intervals between the rounds in `history`; none if there
/// are fewer than two such rounds.
fn forecast_next(history: u32, round_starts: &[f64]) -> Option<f64> {
    let mut intervals = [0.0; MAX_ROUNDS];
    let (mut count, mut last) = (0, None);
    let mut rest = history;
    while rest != 0 {
        let at = round_starts[rest.trailing_zeros() as usize];
        if let Some(before) = last {
            intervals[count] = at - before;
            count += 1;
        }
        last = Some(at);
        rest &= rest - 1;
    }
    let intervals = &intervals[..count];
    let mean = intervals.iter().sum::<f64>() / count as f64;
    let variance: f64 = intervals.iter().map(|x| (x - mean).powi(2)).sum();
    let covariance: f64 = intervals.windows(2).map(|pair| (pair[0] - mean) * (pair[1] - mean)).sum();
    let phi = if variance > 0.0 { covariance / variance } else { 0.0 };
    Some(last? + mean + phi * (intervals.last()? - mean))
}

impl Policy for Paper {
    fn on_sample(&mut self, sample: &Sample, _: &WorkingSet) {
        if self.legacy.rounds.note(sample.dirty) {
            self.begin_round(sample.at);
        } else {
            self.rested = true;
        }
    }

    fn next_batch(&mut self, view: &View, max: usize, _: &mut dyn Peek, out: &mut Vec<Pfn>) -> Next {
        if let Some(next) = self.legacy.rounds.settled() {
            return next;
        }
        if max == 0 {
            return Next::Batch;
        }
        let start = out.len();
        self.choose(view.now.as_secs_f64(), max, out);
        if out.len() > start {
            self.legacy.sent_this_iteration += (out.len() - start) as u64;
            self.rested = false;
            return Next::Batch;
        }
        if self.legacy.sent_this_iteration == 0 && !self.rested {
            return Next::Idle;
        }
        self.legacy.skipped_this_iteration = self.held_back.len();
        self.legacy.end()
    }

    fn log(&self) -> Option<&PageSet> {
        Some(self.legacy.rounds.log())
    }

    fn stop(&mut self, view: &View, _: &mut Convergence) -> Verdict {
        self.legacy.rounds.stop(view).into()
    }

    fn deferred(&self, _: &PageSet) -> u64 {
        self.held_back.len()
    }

    fn state_bytes(&self) -> usize {
        let set_bytes = self.held_back.nr_chunks() * (size_of::<[u64; 8]>() + size_of::<u16>());
        self.histories.bytes() + self.legacy.rounds.bytes() + set_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{Simulation, config};
    use super::*;
    use crate::forecast::{PolicyKind, StopReason, Verdict};

    #[test]
    fn the_forecast_is_a_linear_ar1_on_all_intervals() {
        let starts = [0.0, 1.0, 2.0, 4.0, 5.0, 7.0];
        assert_eq!(forecast_next(0, &starts), None);
        assert_eq!(forecast_next(0b10, &starts), None, "one write makes no interval");
        assert_eq!(forecast_next(0b110, &starts), Some(3.0));
        assert_eq!(forecast_next(0b10_0010, &starts), Some(13.0));
        // Intervals 1, 2, 1, 2: mean 1.5, phi = -3/4, so 7 + 1.5 - 0.75 * 0.5.
        assert_eq!(forecast_next(0b11_1110, &starts), Some(8.125));
    }

    /// A guest of 300 pages with three rounds behind it, 2 s apart; pages 0..100 were written in each, pages
    /// 100..160 before the last only.
    fn after_three_rounds() -> Simulation {
        let mut guest = Simulation::new(PolicyKind::Paper, config(300), 1000.0);
        for round in 1..=3 {
            guest.rest_of_round();
            (0..if round == 3 { 160 } else { 100 }).for_each(|page| guest.write(page));
            guest.now += Duration::from_secs(2);
            guest.sample();
        }
        guest
    }

    #[test]
    fn a_page_whose_next_write_is_further_than_the_threshold_is_sent() {
        let mut guest = after_three_rounds();
        assert_eq!(guest.rest_of_round(), (0..160).collect::<Vec<_>>(), "2 s ahead, and no interval yet");
    }

    #[test]
    fn a_page_that_is_due_or_overdue_is_held_back_and_stays_pending() {
        for late in [Duration::from_millis(1100), Duration::from_secs(60)] {
            let mut guest = after_three_rounds();
            guest.now += late;
            assert_eq!(guest.rest_of_round(), (100..160).collect::<Vec<_>>());
            assert_eq!(guest.engine.deferred(), 100);
            assert_eq!(guest.engine.pending().len(), 100);
        }
    }

    #[test]
    fn a_round_that_sends_nothing_waits_for_a_sample_and_the_rounds_end() {
        let mut guest = after_three_rounds();
        guest.now += Duration::from_secs(60);
        guest.rest_of_round();
        guest.sample();
        for round in 5..=29 {
            assert_eq!(guest.verdict(), Verdict::Continue);
            assert_eq!(guest.batch(10), (Next::Idle, vec![]), "round {round}");
            assert_eq!(guest.batch(10), (Next::Idle, vec![]), "round {round}");
            guest.now += Duration::from_millis(50);
            guest.sample();
            assert_eq!(guest.batch(10), (Next::RoundEnd, vec![]), "round {round}");
            guest.sample();
        }
        assert_eq!(guest.verdict(), Verdict::Stop(StopReason::MaxRounds));
        assert_eq!(guest.engine.take_pending().len(), 100);
    }
}
