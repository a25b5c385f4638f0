//! Rounds, as Xen knows them, on top of samples that are taken at any time.
//!
//! The dirty log is read and cleared every few tens of milliseconds whatever the policy. A policy that sends in
//! rounds keeps its own copy of what the hypervisor's log would hold had it been cleared once per round:
//! `log |= dirty` at each sample, and `to_send = take(log)` at the sample that ends a round. PEEK is then that
//! copy joined with what the hypervisor holds since the last sample.

use super::policy::View;
use super::{Next, StopReason};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// What a round sends, where it is, and the log for the next.
pub(super) struct Rounds {
    to_send: PageSet,
    log: PageSet,
    cursor: Pfn,
    /// `RoundEnd` was returned and the sample that closes the round has not come yet.
    ended: bool,
    stop: Option<StopReason>,
}

impl Rounds {
    /// The first round sends all of `populated`.
    pub(super) fn new(populated: &PageSet) -> Self {
        Rounds {
            to_send: populated.clone(),
            log: PageSet::empty(populated.nr_pages()),
            cursor: Pfn(0),
            ended: false,
            stop: None,
        }
    }

    /// Adds a sample to the log; true if it closes a round, so that [`Rounds::begin`] is due.
    pub(super) fn note(&mut self, dirty: &PageSet) -> bool {
        self.log.union(dirty);
        self.ended
    }

    /// Starts the next round: `to_send = take(log)`. Returns the number of pages in it.
    pub(super) fn begin(&mut self) -> u64 {
        std::mem::swap(&mut self.to_send, &mut self.log);
        self.log.clear();
        self.cursor = Pfn(0);
        self.ended = false;
        self.to_send.len()
    }

    /// The pages written since the round began, as far as they were sampled.
    pub(super) fn log(&self) -> &PageSet {
        &self.log
    }

    /// Adds pages to be looked at again in the next round.
    pub(super) fn carry_over(&mut self, pages: &PageSet) {
        self.log.union(pages);
    }

    /// The round's pages that have not been looked at, ascending.
    pub(super) fn candidates(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.to_send.iter_from(self.cursor)
    }

    /// Everything up to and including `pfn` has been looked at.
    pub(super) fn advance_past(&mut self, pfn: Pfn) {
        self.cursor = Pfn(pfn.0 + 1);
    }

    /// All of the round was handed out; `stop` if it was the last.
    pub(super) fn end(&mut self, stop: Option<StopReason>) -> Next {
        self.ended = true;
        self.stop = self.stop.or(stop);
        Next::RoundEnd
    }

    /// There is no next round.
    pub(super) fn stop_now(&mut self, reason: StopReason) {
        self.stop = Some(reason);
    }

    /// What to answer without looking at any page: a round that has ended stays so until its sample has come,
    /// and after the last round there is nothing more to send.
    pub(super) fn settled(&self) -> Option<Next> {
        match (self.ended, self.stop) {
            (true, _) => Some(Next::RoundEnd),
            (false, Some(_)) => Some(Next::Idle),
            (false, None) => None,
        }
    }

    /// Why the rounds are over, if they are and the last of them is on the wire.
    pub(super) fn stop(&self, view: &View) -> Option<StopReason> {
        self.stop.filter(|_| !self.ended || view.link.in_flight == 0)
    }

    /// Bytes of the two sets.
    pub(super) fn bytes(&self) -> usize {
        2 * self.to_send.nr_chunks() * (size_of::<[u64; 8]>() + size_of::<u16>())
    }
}
