//! The machine's sense of time: which operations are due.
//!
//! The clock decides when operations run, never which. The rate is a cap: a guest that was stopped or could
//! not keep up makes good at most [`MAX_BACKLOG_NS`] of it, so that a pause is not followed by a burst.

use std::time::Duration;

use super::machine::Machine;
use super::pattern::Pace;

/// Operations that are later than this are dropped: 50 ms.
const MAX_BACKLOG_NS: u64 = 50_000_000;

/// The most operations in one call of [`Machine::advance`]: about 0.3 ms, so that the caller is heard and the
/// clock is read often enough.
const SLICE_OPS: u32 = 256;

/// What a call of [`Machine::advance`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Operations done.
    pub ops: u32,
    /// Guest time until the next operation is due; zero where one is due now.
    pub next_due_in: Duration,
}

impl Machine<'_> {
    /// Lets `elapsed` pass in the guest and does the operations that are due by then, a slice of them at most;
    /// asks `keep_running` before each. The caller then sleeps for [`Advance::next_due_in`] and calls again
    /// with the time since this call began.
    pub fn advance(&mut self, elapsed: Duration, keep_running: &mut dyn FnMut() -> bool) -> Advance {
        let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let now_ns = self.cpu.guest_time_ns.saturating_add(elapsed_ns);
        let silent_since_ns = self.cpu.next_due_ns.max(self.cpu.last_op_ns);
        let silence_ns = now_ns.saturating_sub(silent_since_ns);
        self.cpu.guest_time_ns = now_ns;
        self.cpu.longest_silence_ns = self.cpu.longest_silence_ns.max(silence_ns);
        self.cpu.next_due_ns = self.cpu.next_due_ns.max(now_ns.saturating_sub(MAX_BACKLOG_NS));

        let mut ops = 0;
        while self.cpu.next_due_ns <= now_ns && ops < SLICE_OPS && keep_running() {
            let pace = self.operate();
            self.cpu.next_due_ns = self.cpu.next_due_ns.saturating_add(self.interval_ns(pace));
            self.cpu.last_op_ns = now_ns;
            self.store_cpu();
            ops += 1;
        }
        if ops == 0 {
            self.store_cpu();
        }
        Advance { ops, next_due_in: Duration::from_nanos(self.cpu.next_due_ns.saturating_sub(now_ns)) }
    }

    /// Lets `elapsed` pass in the guest while its processor is kept from running. What would have been due in that time is
    /// late by as much, and not made good: a guest that is slowed down does less.
    pub fn stand_still(&mut self, elapsed: Duration) {
        let elapsed_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        self.cpu.guest_time_ns = self.cpu.guest_time_ns.saturating_add(elapsed_ns);
        self.cpu.next_due_ns = self.cpu.next_due_ns.saturating_add(elapsed_ns);
        self.store_cpu();
    }

    fn interval_ns(&self, pace: Pace) -> u64 {
        match self.cpu.spec.effective_rate() {
            0 => 0,
            rate => pace.stretch(1_000_000_000) / u64::from(rate),
        }
    }
}
