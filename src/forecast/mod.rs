//! Which page to send next, and when to stop.
//!
//! The scanner of a live migration and the replay of a recorded trace drive the same [`Engine`]: they give it
//! every sample of the dirty log, ask it for batches as long as the link has room, and ask it for a verdict
//! after every sample. Pure: no I/O, no clock of its own, no threads, no unsafe; the same calls give the same
//! answers.
//!
//! * [`engine`]: the pending set and the rule that nothing is forgotten; drives one policy.
//! * `policy`: the trait of the policies and the one place where they are registered.
//! * `xen`, `xen_skip`, `paper`: the policies that send in rounds (`rounds`, `legacy_loop`: what they share).
//! * `ranked`: the policies that rank pages, `heat` and `ar`; `plan`: the cut that a rank has to reach; `chunk_state`: what is
//!   known of a chunk as a whole; `ar`: the autoregressive forecast of its activity; `fronts`: writers that go through
//!   memory in order; `hazard`: how likely pages of an age are to be written.
//! * [`working_set`], `bound`: ages of the pages, and the clairvoyant bound that follows from them.
//! * `stop`: when ranked sending ends; `throttle`: by how much to slow a guest down that does not let it.
//! * [`convergence`]: what is wanted without convergence, and the explanation of what was decided.
//! * `log2`, `chunks`: fixed-point logarithm, state by 2 MiB chunk.

mod age_ranks;
mod ar;
mod bound;
mod chunk_state;
mod chunks;
pub mod convergence;
pub mod engine;
mod fronts;
mod hazard;
mod legacy_loop;
mod log2;
mod paper;
mod plan;
mod policy;
mod ranked;
mod rounds;
#[cfg(test)]
mod simulation;
mod stop;
mod throttle;
pub mod working_set;
mod xen;
mod xen_skip;

pub use bound::TStar;
pub use convergence::{Convergence, OnNoConvergence};
pub use engine::Engine;
pub use policy::{ParsePolicyError, PolicyKind};
pub use ranked::Terms;
pub use working_set::WorkingSet;

use crate::page::Pfn;
use crate::page_set::PageSet;
use std::fmt;
use std::time::Duration;

/// One get-and-clear of the dirty log.
pub struct Sample<'a> {
    /// When, since the start of dirty logging, the log was cleared. Never earlier than the sample before.
    pub at: Duration,
    /// The pages written since the sample before.
    pub dirty: &'a PageSet,
}

/// Looking at the dirty log without clearing it (Xen's `SHADOW_OP_PEEK`).
pub trait Peek {
    /// Adds to `into` the pages of `first .. first + count` written since the last get-and-clear.
    fn peek(&mut self, first: Pfn, count: u64, into: &mut PageSet);
}

/// What a forecast has to know before it starts.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Size of the page-number space.
    pub nr_pages: u64,
    /// Pages that there are in it, all pending at the start: `nr_pages` where there are no holes.
    pub pages: u64,
    /// How long the guest may stand still.
    pub downtime_budget: Duration,
    /// Time between two samples of the dirty log.
    pub sample_interval: Duration,
    /// After this time every policy stops.
    pub max_time: Duration,
    /// The part of the downtime that is not for pages: suspend, final scan, hand-over.
    pub fixed_downtime: Duration,
    /// What to do if the downtime budget turns out to be out of reach, and at `max_time`.
    pub on_no_convergence: OnNoConvergence,
    /// Policies that rank send a rest that fits the budget before they stop, if no more than this share of it, from 0 to 1, is
    /// likely to be written meanwhile. 0: they stop as soon as it fits.
    pub linger: f64,
}

impl Config {
    /// `K_eff`: pages that the stop phase can carry within the downtime budget.
    pub(crate) fn pages_in_budget(&self, pages_per_s: f64) -> f64 {
        self.downtime_budget.saturating_sub(self.fixed_downtime).as_secs_f64() * pages_per_s.max(0.0)
    }
}

/// What the link can do, as measured by the caller.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    /// Pages with data that it carries in a second.
    pub pages_per_s: f64,
    /// Pages handed out and not yet sent.
    pub in_flight: u64,
    /// Page transmissions so far; a page that turned out to be zero and cost the link nothing is none.
    pub sent: u64,
}

impl Link {
    /// Time to send `pages`; `Duration::MAX` if the link carries nothing.
    pub(crate) fn time_for(&self, pages: u64) -> Duration {
        if pages == 0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(pages as f64 / self.pages_per_s).unwrap_or(Duration::MAX)
    }
}

/// What the scanner does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send what was appended.
    Batch,
    /// The round is over: wait until all that was handed out has been sent, then get-and-clear and
    /// [`Engine::on_sample`]. That sample, and no other before it, begins the next round.
    RoundEnd,
    /// Nothing is worth sending before the next sample.
    Idle,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Keep sending.
    Continue,
    /// Suspend the guest and send what is left.
    Stop(StopReason),
    /// Call the migration off: the guest stays.
    Abort(StopReason),
    /// Keep sending, with the guest standing still for this share of its time, in percent.
    Throttle(u8),
}

impl From<Option<StopReason>> for Verdict {
    fn from(reason: Option<StopReason>) -> Self {
        reason.map_or(Verdict::Continue, Verdict::Stop)
    }
}

/// Why pre-copy ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// What is left fits the downtime budget.
    WithinBudget,
    /// Xen's rule: fewer than 50 pages in a round.
    FewDirty,
    /// Xen's rule: the last round that it allows.
    MaxRounds,
    /// Xen's rule up to 4.5: more than three times the memory was sent.
    MaxFactor,
    /// Going on would send more than 2.2 times the memory.
    DirtyCap,
    /// No policy could have come near the budget for a while, and the backlog is as low as it has been.
    NoBetterBacklog,
    /// The budget is about within reach, but the backlog does not fall fast enough to get there.
    NoProgress,
    /// No policy could have come near the budget for a while, and the migration is to be called off then.
    OutOfReach,
    /// The time limit.
    MaxTime,
    /// There was no pre-copy.
    NotLive,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopReason::WithinBudget => "the rest fits the downtime budget",
            StopReason::FewDirty => "fewer than 50 pages were dirty",
            StopReason::MaxRounds => "the last round allowed was sent",
            StopReason::MaxFactor => "more than three times the memory was sent",
            StopReason::DirtyCap => "sending on would exceed 2.2 times the memory",
            StopReason::NoProgress => "the backlog no longer fell towards the budget",
            StopReason::NoBetterBacklog => "the budget is out of reach and the backlog is at its lowest",
            StopReason::OutOfReach => "the budget is out of reach, whatever the order of sending",
            StopReason::MaxTime => "the time limit was reached",
            StopReason::NotLive => "the guest was suspended from the start",
        })
    }
}
