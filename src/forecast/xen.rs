//! What Xen 4.6 and later does (`send_memory_live` and `simple_precopy_policy` in xg_sr_save.c): full rounds in
//! ascending page order, whether or not a page is dirty again.
//!
//! The stock policy is asked twice a round: at the top, when the number of dirty pages is known, and after
//! sending, when it is not. It stops at 5 rounds sent or below 50 dirty pages; in the second case those few
//! pages are still sent before the guest is suspended.

use super::policy::{Policy, View};
use super::rounds::Rounds;
use super::{Convergence, Next, Peek, Sample, StopReason, Verdict, WorkingSet};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// `SPP_MAX_ITERATIONS`: one full round and at most four of dirty pages.
const MAX_ITERATIONS: u32 = 5;
/// `SPP_TARGET_DIRTY_COUNT`.
const TARGET_DIRTY_COUNT: u64 = 50;

pub(super) struct Xen {
    rounds: Rounds,
    iteration: u32,
    /// The round now being sent began below the target and is the last.
    few_dirty: bool,
}

impl Xen {
    pub(super) fn new(populated: &PageSet) -> Self {
        Xen { rounds: Rounds::new(populated), iteration: 0, few_dirty: populated.len() < TARGET_DIRTY_COUNT }
    }
}

impl Policy for Xen {
    fn on_sample(&mut self, sample: &Sample, _: &WorkingSet) {
        if self.rounds.note(sample.dirty) {
            let dirty_count = self.rounds.begin();
            self.few_dirty = dirty_count < TARGET_DIRTY_COUNT;
            if dirty_count == 0 {
                self.rounds.stop_now(StopReason::FewDirty);
            }
        }
    }

    fn next_batch(&mut self, _: &View, max: usize, _: &mut dyn Peek, out: &mut Vec<Pfn>) -> Next {
        if let Some(next) = self.rounds.settled() {
            return next;
        }
        let start = out.len();
        out.extend(self.rounds.candidates().take(max));
        if out.len() > start {
            self.rounds.advance_past(out[out.len() - 1]);
            return Next::Batch;
        }
        self.iteration += 1;
        self.rounds.end(if self.few_dirty {
            Some(StopReason::FewDirty)
        } else {
            (self.iteration >= MAX_ITERATIONS).then_some(StopReason::MaxRounds)
        })
    }

    fn log(&self) -> Option<&PageSet> {
        Some(self.rounds.log())
    }

    fn samples_by_round(&self) -> bool {
        true
    }

    fn stop(&mut self, view: &View, _: &mut Convergence) -> Verdict {
        self.rounds.stop(view).into()
    }

    fn deferred(&self, _: &PageSet) -> u64 {
        0
    }

    fn state_bytes(&self) -> usize {
        self.rounds.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{Simulation, config};
    use super::*;
    use crate::forecast::{PolicyKind, Verdict};

    fn xen(nr_pages: u64) -> Simulation {
        Simulation::new(PolicyKind::Xen, config(nr_pages), 1000.0)
    }

    #[test]
    fn five_rounds_and_then_the_final_set() {
        let mut guest = xen(200);
        for round in 1..=5 {
            let sent = guest.rest_of_round();
            let expected: Vec<u64> = if round == 1 { (0..200).collect() } else { (100..160).collect() };
            assert_eq!(sent, expected, "round {round}");
            (100..160).for_each(|page| guest.write(page));
            let over = if round == 5 { Verdict::Stop(StopReason::MaxRounds) } else { Verdict::Continue };
            assert_eq!(guest.verdict(), over, "after round {round}");
            guest.sample();
        }
        assert_eq!(guest.verdict(), Verdict::Stop(StopReason::MaxRounds));
        assert_eq!(guest.batch(10), (Next::Idle, vec![]));
        assert_eq!(guest.engine.take_pending().len(), 60);
    }

    #[test]
    fn below_fifty_pages_the_few_are_sent_and_then_it_stops() {
        for (dirty, verdict) in [(49, Verdict::Stop(StopReason::FewDirty)), (50, Verdict::Continue)] {
            let mut guest = xen(200);
            guest.rest_of_round();
            (0..dirty).for_each(|page| guest.write(page));
            guest.sample();
            assert_eq!(guest.verdict(), Verdict::Continue, "the few are still to be sent");
            assert_eq!(guest.rest_of_round().len() as u64, dirty);
            assert_eq!(guest.verdict(), verdict);
        }
    }

    #[test]
    fn without_a_dirty_page_it_stops_at_once() {
        let mut guest = xen(200);
        guest.rest_of_round();
        guest.sample();
        assert_eq!(guest.verdict(), Verdict::Stop(StopReason::FewDirty));
    }

    #[test]
    fn the_last_round_is_on_the_wire_before_the_guest_stops() {
        let mut guest = xen(20);
        guest.rest_of_round();
        guest.link.in_flight = 1;
        assert_eq!(guest.verdict(), Verdict::Continue);
        guest.link.in_flight = 0;
        assert_eq!(guest.verdict(), Verdict::Stop(StopReason::FewDirty));
    }

    #[test]
    fn a_page_written_before_it_is_sent_in_a_round_is_sent_again_in_the_next() {
        let mut guest = xen(200);
        guest.batch(100);
        (0..200).for_each(|page| guest.write(page));
        guest.sample();
        assert_eq!(guest.rest_of_round(), (100..200).collect::<Vec<_>>());
        assert_eq!(guest.engine.pending().len(), 200, "the log has them all");
        assert_eq!(guest.batch(1), (Next::RoundEnd, vec![]));
        guest.sample();
        assert_eq!(guest.rest_of_round().len(), 200);
    }
}
