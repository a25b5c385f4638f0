//! The engine that live migration and replay drive: it owns the pending set, the ages and one policy.
//!
//! Nothing is forgotten: a page becomes pending when a sample says it was written, and leaves the pending set
//! only into a batch. Get-and-clear destroys the hypervisor's bits, so this set is the only record.

use super::policy::{Policy, View};
use super::working_set::WorkingSet;
use super::{
    Config, Convergence, Link, Next, OnNoConvergence, Peek, PolicyKind, Sample, StopReason, Verdict,
};
use crate::page::Pfn;
use crate::page_set::PageSet;
use std::time::Duration;

/// Decides which page to send next and when to stop.
pub struct Engine {
    config: Config,
    pending: PageSet,
    working_set: WorkingSet,
    policy: Box<dyn Policy>,
    convergence: Convergence,
}

impl Engine {
    /// An engine at the start of dirty logging: every page is pending and none was ever written. All memory but
    /// the state of chunks is taken here. Panics if there are holes.
    pub fn new(kind: PolicyKind, config: Config) -> Self {
        Self::sparse(kind, config, PageSet::full(config.nr_pages))
    }

    /// An engine for a guest whose page-number space has holes: only the pages of `populated` are pending. A page that a
    /// sample names is taken to be there from then on. Panics if the set does not fit `config`.
    pub fn sparse(kind: PolicyKind, config: Config, populated: PageSet) -> Self {
        assert_eq!((config.nr_pages, config.pages), (populated.nr_pages(), populated.len()));
        Engine {
            config,
            policy: kind.build(&config, &populated),
            pending: populated,
            working_set: WorkingSet::new(&config),
            convergence: Convergence::new(config),
        }
    }

    /// Takes in one get-and-clear of the dirty log.
    pub fn on_sample(&mut self, sample: &Sample) {
        self.working_set.make_room();
        self.policy.on_sample(sample, &self.working_set);
        self.working_set.record_with(sample, |step| self.policy.on_chunk(sample.dirty, step));
        self.policy.end_sample(&self.working_set);
        self.pending.union(sample.dirty);
    }

    /// Appends to `out` up to `max` pages to send next, in the order to send, and takes them out of the pending
    /// set. `now` is since the start of dirty logging.
    pub fn next_batch(
        &mut self,
        now: Duration,
        max: usize,
        link: &Link,
        peek: &mut dyn Peek,
        out: &mut Vec<Pfn>,
    ) -> Next {
        let start = out.len();
        let view = View { now, link, pending: &self.pending, working_set: &self.working_set };
        let next = self.policy.next_batch(&view, max, peek, out);
        debug_assert!(out.len() - start <= max, "the policy returned more pages than it was asked for");
        let log = self.policy.log();
        let mut kept = start;
        for index in start..out.len() {
            let pfn = out[index];
            let stays = log.is_some_and(|log| log.contains(pfn));
            let was_pending = if stays { self.pending.contains(pfn) } else { self.pending.remove(pfn) };
            debug_assert!(was_pending, "the policy returned page {pfn}, which is not pending");
            if was_pending {
                out[kept] = pfn;
                kept += 1;
            }
        }
        out.truncate(kept);
        next
    }

    /// Whether to go on. To be asked after every sample and at the end of every round. Of a throttle it is taken for
    /// granted that the guest is slowed down as told.
    pub fn verdict(&mut self, now: Duration, link: &Link) -> Verdict {
        let view = View { now, link, pending: &self.pending, working_set: &self.working_set };
        self.convergence.observe(&view);
        let verdict = match self.policy.stop(&view, &mut self.convergence) {
            Verdict::Continue | Verdict::Throttle(_) if now >= self.config.max_time => self.at_deadline(),
            verdict => verdict,
        };
        self.convergence.note_verdict(now, verdict);
        verdict
    }

    fn at_deadline(&self) -> Verdict {
        match self.config.on_no_convergence {
            OnNoConvergence::Stop | OnNoConvergence::Throttle => Verdict::Stop(StopReason::MaxTime),
            OnNoConvergence::Abort => Verdict::Abort(StopReason::MaxTime),
        }
    }

    /// Whether what is left fits the budget, and is sent before the stop all the same ([`Config::linger`]). When it is sent the
    /// verdict is to be asked for again, without a sample.
    pub fn is_lingering(&self) -> bool {
        self.policy.is_lingering()
    }

    /// How far the budget is and was away, and what was decided.
    pub fn convergence(&self) -> &Convergence {
        &self.convergence
    }

    /// Whether the policy has no use for samples but those that end its rounds.
    pub fn samples_by_round(&self) -> bool {
        self.policy.samples_by_round()
    }

    /// Pages that there were at the start.
    pub fn pages(&self) -> u64 {
        self.config.pages
    }

    /// Pages that have to be sent again or for the first time.
    pub fn pending(&self) -> &PageSet {
        &self.pending
    }

    /// The pending set, to be joined with the final scan of the suspended guest. Empty afterwards.
    pub fn take_pending(&mut self) -> PageSet {
        std::mem::replace(&mut self.pending, PageSet::empty(self.config.nr_pages))
    }

    /// A page that was handed out turned out to be zero and cost the link nothing. Counts for the clairvoyant
    /// bound, and only if the page was never written.
    pub fn note_zero(&mut self, pfn: Pfn) {
        self.working_set.note_zero(pfn);
    }

    /// Pages that the forecast is holding back now: pending, but skipped in this round, within the threshold, or
    /// ranked below what the link can carry before the next sample.
    pub fn deferred(&self) -> u64 {
        self.policy.deferred(&self.pending)
    }

    /// The downtime if the guest were suspended now and wrote nothing since the last sample.
    pub fn forecast_downtime(&self, link: &Link) -> Duration {
        self.config.fixed_downtime.saturating_add(link.time_for(self.pending.len() + link.in_flight))
    }

    /// The ages of the pages and the clairvoyant bound.
    pub fn working_set(&self) -> &WorkingSet {
        &self.working_set
    }

    /// Bytes of the state that are in huge pages, as the kernel reports it; reads /proc/self/smaps.
    pub fn huge_bytes(&self) -> usize {
        self.working_set.huge_bytes() + self.policy.huge_bytes()
    }

    /// Bytes of state in use for pages: ages and the policy's own, without the pending set.
    pub fn state_bytes(&self) -> usize {
        self.working_set.state_bytes() + self.policy.state_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{Simulation, config};
    use super::*;
    use crate::forecast::Next;

    #[test]
    fn batches_are_appended_and_come_out_of_the_pending_set() {
        for kind in PolicyKind::ALL {
            let mut guest = Simulation::new(kind, config(100), 1000.0);
            let mut out = vec![Pfn(77)];
            let next = guest.engine.next_batch(Duration::ZERO, 10, &guest.link, &mut guest.log, &mut out);
            assert_eq!((next, out.len(), out[0]), (Next::Batch, 11, Pfn(77)), "{kind}");
            assert_eq!(guest.engine.pending().len(), 90);
            assert!(out[1..].iter().all(|pfn| !guest.engine.pending().contains(*pfn)));
            assert_eq!(guest.engine.take_pending().len(), 90);
            assert!(guest.engine.pending().is_empty());
        }
    }

    #[test]
    fn the_forecast_downtime_counts_what_is_in_flight_and_what_is_fixed() {
        let fixed = Config { fixed_downtime: Duration::from_millis(30), ..config(100) };
        let engine = Engine::new(PolicyKind::Ar, fixed);
        let link = Link { pages_per_s: 1000.0, in_flight: 20, sent: 0 };
        assert_eq!(engine.forecast_downtime(&link), Duration::from_millis(150));
        assert_eq!(engine.forecast_downtime(&Link::default()), Duration::MAX);
    }
}
