//! The loop of Xen's saver up to 4.5 (xc_domain_save.c): what it counts and when it makes the last iteration.

use super::StopReason;
use super::rounds::Rounds;
use crate::page_set::PageSet;

/// `DEF_MAX_ITERS`.
const MAX_ITERATIONS: u32 = 29;
/// `DEF_MAX_FACTOR`: pages sent, in multiples of the guest's. (There the page-number space counts, with its holes.)
const MAX_FACTOR: u64 = 3;
/// Fewer pages than this, sent or skipped, make the next iteration the last.
const FEW_PAGES: u64 = 50;

/// Rounds with the counters of the legacy saver.
pub(super) struct LegacyLoop {
    pub rounds: Rounds,
    /// Iterations begun, the current one included.
    pub iteration: u32,
    pub sent_this_iteration: u64,
    pub skipped_this_iteration: u64,
    total_sent: u64,
    pages: u64,
}

impl LegacyLoop {
    pub(super) fn new(populated: &PageSet) -> Self {
        LegacyLoop {
            rounds: Rounds::new(populated),
            iteration: 1,
            sent_this_iteration: 0,
            skipped_this_iteration: 0,
            total_sent: 0,
            pages: populated.len(),
        }
    }

    /// Ends the iteration and finds out whether what is left is sent with the guest suspended.
    pub(super) fn end(&mut self) -> super::Next {
        self.total_sent += self.sent_this_iteration;
        let stop = if self.iteration >= MAX_ITERATIONS {
            Some(StopReason::MaxRounds)
        } else if self.sent_this_iteration + self.skipped_this_iteration < FEW_PAGES {
            Some(StopReason::FewDirty)
        } else {
            (self.total_sent > self.pages * MAX_FACTOR).then_some(StopReason::MaxFactor)
        };
        self.rounds.end(stop)
    }

    /// Starts the next iteration with what is in the log.
    pub(super) fn begin(&mut self) {
        self.rounds.begin();
        self.iteration += 1;
        self.sent_this_iteration = 0;
        self.skipped_this_iteration = 0;
    }
}
