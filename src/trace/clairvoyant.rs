//! The clairvoyant bound of a recorded trace: what a sender could do that knew every write to come.
//!
//! In the model of [`super::replay`] a page dirty in round `r` can be sent from round `r + 1` on. With the stop at the start
//! of round T, the pages last dirty in the `k` rounds before T have `k - 1` rounds of link, and the pages never written all T:
//!
//! ```text
//! backlog*(T) = max( max over k of W_T(k) - B (k - 1),  N - B T,  0 )
//! ```
//!
//! They are unit jobs with release times and a common deadline, so that is exact: some order reaches it, none can be below.

use super::format::Trace;

/// The backlogs that a sender with foresight would have, stop by stop.
pub struct Clairvoyant {
    /// Pages last dirty in each round since the start.
    counts: Vec<u64>,
    /// Pages never dirty since the start.
    untouched: u64,
    /// Round since the start in which each page was last dirty, plus one; 0 for never.
    last_dirty: Vec<u32>,
}

impl Clairvoyant {
    /// Before the first round: none of `nr_pages` pages was written.
    pub fn new(nr_pages: u64) -> Self {
        Clairvoyant { counts: Vec::new(), untouched: nr_pages, last_dirty: vec![0; nr_pages as usize] }
    }

    /// Takes in the next round of the trace.
    pub fn add_round(&mut self, trace: &Trace, round: usize) {
        let number = self.counts.len() as u32 + 1;
        let mut dirty = 0;
        for run in trace.runs(round) {
            for last in &mut self.last_dirty[run.first as usize..(run.first + run.count) as usize] {
                match std::mem::replace(last, number) {
                    0 => self.untouched -= 1,
                    before => self.counts[before as usize - 1] -= 1,
                }
            }
            dirty += u64::from(run.count);
        }
        self.counts.push(dirty);
    }

    /// Rounds taken in, T.
    pub fn rounds(&self) -> usize {
        self.counts.len()
    }

    /// `backlog*(T)` in pages, with a link of `pages_per_round`.
    pub fn backlog(&self, pages_per_round: f64) -> f64 {
        let (mut written, mut most) = (0, 0.0);
        for (rounds, count) in self.counts.iter().rev().enumerate() {
            written += count;
            most = f64::max(most, written as f64 - pages_per_round * rounds as f64);
        }
        f64::max(most, (written + self.untouched) as f64 - pages_per_round * self.counts.len() as f64)
    }

    /// `W_T(k)`: pages dirty at least once in the last `k` rounds, for `k` from 1 to T.
    pub fn working_set(&self) -> impl Iterator<Item = u64> + '_ {
        self.counts.iter().rev().scan(0, |written, count| {
            *written += count;
            Some(*written)
        })
    }
}

/// When a sender with foresight could have stopped first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Earliest {
    /// Rounds from the start to the stop.
    pub rounds: usize,
    /// Pages sent with the guest suspended.
    pub backlog: f64,
    /// T*: all of it, in seconds.
    pub total_s: f64,
}

/// T* of a migration that begins at `start` with a link of `pages_per_round` and may stop with `budget_pages` left. None if
/// the trace ends before that.
pub fn earliest(trace: &Trace, start: usize, pages_per_round: f64, budget_pages: f64) -> Option<Earliest> {
    let mut clairvoyant = Clairvoyant::new(trace.nr_pages());
    loop {
        let (rounds, backlog) = (clairvoyant.rounds(), clairvoyant.backlog(pages_per_round));
        if backlog <= budget_pages {
            let total_s = (rounds as f64 + backlog / pages_per_round) * trace.period_s();
            return Some(Earliest { rounds, backlog, total_s });
        }
        if start + rounds == trace.rounds().len() {
            return None;
        }
        clairvoyant.add_round(trace, start + rounds);
    }
}

/// What a sender with foresight could do at every stop there is.
pub struct Survey {
    /// `backlog*(T)` in pages for each T from 0 rounds after the start to the end of the trace.
    pub backlogs: Vec<f64>,
    /// The first stop within the budget.
    pub earliest: Option<Earliest>,
    /// The stop that `working_set` is of: the earliest within the budget, or where none is, the one with the least backlog.
    pub stop: usize,
    /// `W_T(k)` at that stop, for k from 1 to T.
    pub working_set: Vec<u64>,
}

impl Survey {
    /// Of a migration that begins at `start` with a link of `pages_per_round` and may stop with `budget_pages` left.
    pub fn new(trace: &Trace, start: usize, pages_per_round: f64, budget_pages: f64) -> Self {
        let mut clairvoyant = Clairvoyant::new(trace.nr_pages());
        let mut survey = Survey { backlogs: Vec::new(), earliest: None, stop: 0, working_set: Vec::new() };
        let mut least = f64::INFINITY;
        loop {
            let (rounds, backlog) = (clairvoyant.rounds(), clairvoyant.backlog(pages_per_round));
            survey.backlogs.push(backlog);
            if survey.earliest.is_none() && backlog < least {
                least = backlog;
                survey.stop = rounds;
                survey.working_set = clairvoyant.working_set().collect();
            }
            if survey.earliest.is_none() && backlog <= budget_pages {
                let total_s = (rounds as f64 + backlog / pages_per_round) * trace.period_s();
                survey.earliest = Some(Earliest { rounds, backlog, total_s });
            }
            if start + rounds == trace.rounds().len() {
                return survey;
            }
            clairvoyant.add_round(trace, start + rounds);
        }
    }

    /// The least backlog of all stops, in pages.
    pub fn least_backlog(&self) -> f64 {
        self.backlogs.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// The slowest link, in pages a round and to within 2 %, with which a sender with foresight could stop with so many rounds
/// of link left as the budget has. None if no link would do.
pub fn least_link(trace: &Trace, start: usize, pages_per_round: f64, budget_rounds: f64) -> Option<f64> {
    let enough = |link: f64| earliest(trace, start, link, budget_rounds * link).is_some();
    // This one sends everything within the budget, or, where there is none, within a round: a faster one does no better.
    let pages = trace.nr_pages() as f64;
    let fastest = if budget_rounds > 0.0 { pages / budget_rounds } else { pages };
    let (mut low, mut high) = (pages_per_round, pages_per_round);
    while !enough(high) {
        if high >= fastest {
            return None;
        }
        (low, high) = (high, (2.0 * high).min(fastest));
    }
    while high > 1.02 * low {
        let middle = (low * high).sqrt();
        if enough(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::replay::tests::trace_of;
    use proptest::prelude::*;

    /// The least backlog at the start of round `stop`, by the best order there is: latest release last.
    fn by_greedy(rounds: &[Vec<u32>], nr_pages: u32, stop: usize, pages_per_round: f64) -> f64 {
        let last = |page: u32| rounds[..stop].iter().rposition(|dirty| dirty.contains(&page));
        let mut released = vec![0u32; stop + 1];
        (0..nr_pages).for_each(|page| released[last(page).map_or(0, |round| round + 1)] += 1);
        // Fluid: each round sends what is there, up to its credit.
        let mut left = 0.0;
        for released in &released[..stop] {
            left = f64::max(0.0, left + f64::from(*released) - pages_per_round);
        }
        left + f64::from(released[stop])
    }

    proptest! {
        #[test]
        fn the_bound_is_what_the_best_order_reaches(
            rounds in proptest::collection::vec(proptest::collection::vec(0u32..512, 0..200), 1..12),
            pages_per_round in 1.0f64..300.0,
            budget in 0.0f64..200.0,
        ) {
            let trace = trace_of(&rounds);
            let mut clairvoyant = Clairvoyant::new(512);
            let mut first = None;
            for stop in 0..=rounds.len() {
                let least = by_greedy(&rounds, 512, stop, pages_per_round);
                prop_assert!((clairvoyant.backlog(pages_per_round) - least).abs() < 1e-6);
                if first.is_none() && clairvoyant.backlog(pages_per_round) <= budget {
                    first = Some(stop);
                }
                if stop < rounds.len() {
                    clairvoyant.add_round(&trace, stop);
                }
            }
            prop_assert_eq!(earliest(&trace, 0, pages_per_round, budget).map(|found| found.rounds), first);
        }
    }

    #[test]
    fn a_survey_has_the_earliest_stop_and_the_working_set_of_it() {
        // Pages 0 to 99 in every other round, the rest never.
        let rounds: Vec<Vec<u32>> =
            (0..60).map(|round| if round % 2 == 0 { (0..100).collect() } else { vec![] }).collect();
        let trace = trace_of(&rounds);
        let survey = Survey::new(&trace, 1, 20.0, 100.0);
        assert_eq!(survey.earliest, earliest(&trace, 1, 20.0, 100.0));
        let found = survey.earliest.unwrap();
        assert_eq!((survey.stop, survey.backlogs.len()), (found.rounds, 60));
        assert_eq!(survey.working_set.len(), survey.stop);
        assert_eq!(survey.working_set.last(), Some(&100));
        assert_eq!(survey.least_backlog(), 80.0, "one round to send what the last one wrote");
        let hopeless = Survey::new(&trace, 1, 20.0, 50.0);
        assert_eq!(hopeless.earliest, None);
        assert_eq!(hopeless.backlogs[hopeless.stop], 80.0);
        for slow in [20.0, 0.001] {
            let link = least_link(&trace, 1, slow, 2.5).unwrap();
            assert!((28.5..29.2).contains(&link), "100 pages are sent in a round and the budget: {link}");
        }
        let restless = trace_of(&vec![(0..100).collect(); 60]);
        assert_eq!(least_link(&restless, 1, 20.0, 0.0), None, "there is always something left");
        let link = least_link(&restless, 1, 20.0, 0.1).unwrap();
        assert!((990.0..1030.0).contains(&link), "100 pages are sent in a tenth of a round: {link}");
    }

    #[test]
    fn without_writes_everything_is_sent_once() {
        let trace = trace_of(&vec![vec![]; 40]);
        let found = earliest(&trace, 0, 51.2, 153.6).unwrap();
        assert_eq!(found.rounds, 7);
        assert!((found.total_s - 0.5).abs() < 1e-9, "512 pages at 51.2 a round of 50 ms: {found:?}");
    }
}
