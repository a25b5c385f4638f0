//! What Xen 4.2 to 4.5 did (xc_domain_save.c): rounds that leave out a page that is dirty again. Before each
//! batch the dirty log is PEEKed into `to_skip`; a page found there keeps its bit in the log and so comes back
//! in the next round.
//!
//! In the first iteration of an HVM guest the stock saver does put such pages into the stream, as XALLOC
//! records without data, and counts them as sent. They cost the link next to nothing and still have to be sent
//! later, so here they are not handed out, but they count as sent in the conditions of the loop.

use super::legacy_loop::LegacyLoop;
use super::policy::{Policy, View};
use super::{Convergence, Next, Peek, Sample, Verdict, WorkingSet};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// `MAX_BATCH_SIZE` of the stock saver: a PEEK is at most this many pages old.
const MAX_BATCH_PAGES: usize = 1024;

pub(super) struct XenSkip {
    legacy: LegacyLoop,
    /// Dirty since the last sample: with the log, `to_skip`.
    peeked: PageSet,
    /// Pages of this round that were passed over.
    passed_over: u64,
}

impl XenSkip {
    pub(super) fn new(populated: &PageSet) -> Self {
        let peeked = PageSet::empty(populated.nr_pages());
        XenSkip { legacy: LegacyLoop::new(populated), peeked, passed_over: 0 }
    }

    /// Looks at the next `count` candidates; returns how many there were.
    fn take_window(&mut self, count: usize, peek: &mut dyn Peek, out: &mut Vec<Pfn>) -> usize {
        let rounds = &self.legacy.rounds;
        let Some(first) = rounds.candidates().next() else { return 0 };
        let (mut last, mut seen, start) = (first, 0, out.len());
        for pfn in rounds.candidates().take(count) {
            (last, seen) = (pfn, seen + 1);
        }
        self.peeked.clear();
        peek.peek(first, last.0 - first.0 + 1, &mut self.peeked);
        let to_skip = |pfn: &Pfn| rounds.log().contains(*pfn) || self.peeked.contains(*pfn);
        out.extend(rounds.candidates().take(count).filter(|pfn| !to_skip(pfn)));
        self.legacy.rounds.advance_past(last);
        let taken = out.len() - start;
        let skipped = (seen - taken) as u64;
        self.passed_over += skipped;
        self.legacy.sent_this_iteration += taken as u64;
        if self.legacy.iteration == 1 {
            self.legacy.sent_this_iteration += skipped;
        } else {
            self.legacy.skipped_this_iteration += skipped;
        }
        seen
    }
}

impl Policy for XenSkip {
    fn on_sample(&mut self, sample: &Sample, _: &WorkingSet) {
        if self.legacy.rounds.note(sample.dirty) {
            self.legacy.begin();
            self.passed_over = 0;
        }
    }

    fn next_batch(&mut self, _: &View, max: usize, peek: &mut dyn Peek, out: &mut Vec<Pfn>) -> Next {
        if let Some(next) = self.legacy.rounds.settled() {
            return next;
        }
        let start = out.len();
        let end = start + max.min(MAX_BATCH_PAGES);
        while out.len() < end && self.take_window(end - out.len(), peek, out) > 0 {}
        if out.len() > start || max == 0 { Next::Batch } else { self.legacy.end() }
    }

    fn log(&self) -> Option<&PageSet> {
        Some(self.legacy.rounds.log())
    }

    fn samples_by_round(&self) -> bool {
        true
    }

    fn stop(&mut self, view: &View, _: &mut Convergence) -> Verdict {
        self.legacy.rounds.stop(view).into()
    }

    fn deferred(&self, _: &PageSet) -> u64 {
        self.passed_over
    }

    fn state_bytes(&self) -> usize {
        self.legacy.rounds.bytes() + self.peeked.nr_chunks() * (size_of::<[u64; 8]>() + size_of::<u16>())
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{Simulation, config};
    use crate::forecast::{PolicyKind, StopReason, Verdict};

    fn xen_skip(nr_pages: u64) -> Simulation {
        Simulation::new(PolicyKind::XenSkip, config(nr_pages), 1000.0)
    }

    #[test]
    fn a_page_dirty_again_is_skipped_and_comes_back_in_the_next_round() {
        let mut guest = xen_skip(300);
        assert_eq!(guest.batch(100).1, (0..100).collect::<Vec<_>>());
        guest.write(150);
        guest.sample();
        guest.write(160);
        let sent = guest.rest_of_round();
        assert_eq!(sent.len(), 198);
        assert!(!sent.contains(&150), "it is in the log since the last sample");
        assert!(!sent.contains(&160), "PEEK sees it");
        assert_eq!(guest.engine.deferred(), 2);
        guest.sample();
        assert_eq!(guest.verdict(), Verdict::Continue);
        assert_eq!(guest.rest_of_round(), [150, 160]);
    }

    #[test]
    fn a_batch_is_full_although_pages_are_skipped() {
        let mut guest = xen_skip(300);
        (0..100).for_each(|page| guest.write(page));
        assert_eq!(guest.batch(50).1, (100..150).collect::<Vec<_>>());
    }

    #[test]
    fn it_stops_when_fewer_than_fifty_were_sent_or_skipped() {
        for (dirty, verdict) in [(49, Verdict::Stop(StopReason::FewDirty)), (50, Verdict::Continue)] {
            let mut guest = xen_skip(300);
            guest.rest_of_round();
            (0..dirty).for_each(|page| guest.write(page));
            guest.sample();
            // Half of them are dirty again, and skipped; they count.
            (0..dirty / 2).for_each(|page| guest.write(page));
            assert_eq!(guest.rest_of_round().len() as u64, dirty - dirty / 2);
            assert_eq!(guest.verdict(), verdict);
        }
    }

    #[test]
    fn it_stops_after_29_rounds() {
        let mut guest = xen_skip(2000);
        for round in 1..=29 {
            assert_eq!(guest.verdict(), Verdict::Continue, "before round {round}");
            guest.rest_of_round();
            (0..60).for_each(|page| guest.write(page));
            if round < 29 {
                guest.sample();
            }
        }
        assert_eq!(guest.verdict(), Verdict::Stop(StopReason::MaxRounds));
    }

    #[test]
    fn it_stops_beyond_three_times_the_memory() {
        let mut guest = xen_skip(1000);
        for _ in 1..=3 {
            guest.rest_of_round();
            assert_eq!(guest.verdict(), Verdict::Continue, "three times exactly is not beyond");
            (0..1000).for_each(|page| guest.write(page));
            guest.sample();
        }
        guest.rest_of_round();
        assert_eq!(guest.verdict(), Verdict::Stop(StopReason::MaxFactor));
    }

    #[test]
    fn pages_skipped_in_the_first_round_count_as_sent() {
        let mut guest = xen_skip(1000);
        (0..980).for_each(|page| guest.write(page));
        assert_eq!(guest.rest_of_round().len(), 20);
        guest.sample();
        assert_eq!(guest.verdict(), Verdict::Continue);
    }
}
