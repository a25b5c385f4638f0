//! Whether pre-copy converges: what the user wants done if not, and the explanation of what was decided.
//!
//! The engine takes the readings at every sample and records the decision; the stop rule adds since when it holds the
//! budget for out of reach. Reports and error messages are made of this and of nothing else.

use super::policy::View;
use super::{Config, StopReason, Verdict};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What is done when pre-copy cannot converge, or has not by the deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnNoConvergence {
    /// Suspend the guest at the best backlog that can be expected, and send the rest.
    #[default]
    Stop,
    /// Call the migration off; the guest runs on at the source.
    Abort,
    /// Slow the guest down until it converges; at the deadline as `Stop`.
    Throttle,
}

impl fmt::Display for OnNoConvergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            OnNoConvergence::Stop => "stop",
            OnNoConvergence::Abort => "abort",
            OnNoConvergence::Throttle => "throttle",
        })
    }
}

impl FromStr for OnNoConvergence {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "stop" => Ok(OnNoConvergence::Stop),
            "abort" => Ok(OnNoConvergence::Abort),
            "throttle" => Ok(OnNoConvergence::Throttle),
            _ => Err(format!("{name:?} is no way to end; choose stop, abort or throttle")),
        }
    }
}

/// A time in which the stop rule held the budget for out of any policy's reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutOfReach {
    /// The first sample of it, since the start.
    pub since: Duration,
    /// The last sample of it.
    pub until: Duration,
    /// The least that the bound was in it, in pages.
    pub least_bound: u64,
}

/// The guest was slowed down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleStep {
    /// When, since the start.
    pub at: Duration,
    /// Share of the guest's time that it stands still from then on, in percent.
    pub percent: u8,
    /// Pages left to send just then.
    pub backlog: u64,
}

/// How pre-copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// When, since the start.
    pub at: Duration,
    /// Why.
    pub reason: StopReason,
    /// Whether the migration was called off, and not the guest suspended.
    pub aborted: bool,
}

/// What was seen of the convergence of one migration, and what was decided.
#[derive(Clone, Debug)]
pub struct Convergence {
    config: Config,
    samples: u64,
    /// Pages that have to be sent at all: zero pages that were never written are not among them.
    pub pages: u64,
    /// Page transmissions up to the latest sample.
    pub sent: u64,
    /// The link at the latest sample.
    pub pages_per_s: f64,
    /// At the latest sample, the backlog in pages below which no policy could be.
    pub bound: u64,
    /// The least that it ever was.
    pub least_bound: u64,
    /// Pages left to send at the latest sample.
    pub backlog: u64,
    /// The least that it ever was.
    pub least_backlog: u64,
    /// The latest time out of reach; the one that settled it, once it is settled.
    pub out_of_reach: Option<OutOfReach>,
    /// When the stop rule was sure that the budget is out of reach.
    pub established_at: Option<Duration>,
    /// The least backlog before the guest was slowed down, if it was.
    pub least_unthrottled_backlog: u64,
    /// How the guest was slowed down.
    pub throttle_steps: Vec<ThrottleStep>,
    /// How pre-copy ended; none while it goes on.
    pub decision: Option<Decision>,
}

impl Convergence {
    pub(crate) fn new(config: Config) -> Self {
        Convergence {
            config,
            samples: 0,
            pages: config.pages,
            sent: 0,
            pages_per_s: 0.0,
            bound: config.pages,
            least_bound: config.pages,
            backlog: config.pages,
            least_backlog: config.pages,
            least_unthrottled_backlog: config.pages,
            out_of_reach: None,
            established_at: None,
            throttle_steps: Vec::new(),
            decision: None,
        }
    }

    /// Takes the readings of the latest sample, once.
    pub(super) fn observe(&mut self, view: &View) {
        let usable = view.link.pages_per_s > 0.0;
        if self.samples == view.working_set.samples_taken() || !usable {
            return;
        }
        self.samples = view.working_set.samples_taken();
        self.pages = self.config.pages.saturating_sub(view.working_set.zero_unwritten());
        self.sent = view.link.sent;
        self.pages_per_s = view.link.pages_per_s;
        self.bound = view.working_set.bound(view.now, view.link.pages_per_s);
        self.least_bound = self.least_bound.min(self.bound);
        self.backlog = view.pending.len() + view.link.in_flight;
        self.least_backlog = self.least_backlog.min(self.backlog);
        if self.throttle_steps.is_empty() {
            self.least_unthrottled_backlog = self.least_backlog;
        }
    }

    /// The stop rule's finding on the latest sample: since when the budget is out of reach, and whether it is sure. What is
    /// found of a guest that is slowed down already says nothing about the guest as it was.
    pub(super) fn note_reach(&mut self, now: Duration, since: Option<Duration>, sure: bool) {
        if !self.throttle_steps.is_empty() {
            return;
        }
        let settled = self.established_at.is_some();
        match (since, &mut self.out_of_reach) {
            (Some(since), Some(time)) if time.since == since => {
                time.until = now;
                time.least_bound = time.least_bound.min(self.bound);
            }
            (Some(since), _) if !settled => {
                self.out_of_reach = Some(OutOfReach { since, until: now, least_bound: self.bound });
            }
            (None, _) if !settled => self.out_of_reach = None,
            _ => {}
        }
        if sure && !settled {
            self.established_at = Some(now);
        }
    }

    /// Records a verdict when it is given. The latest decision counts: the caller may have asked once more.
    pub(super) fn note_verdict(&mut self, now: Duration, verdict: Verdict) {
        match verdict {
            Verdict::Continue => {}
            Verdict::Throttle(percent) => {
                if self.throttle_percent() != percent {
                    self.throttle_steps.push(ThrottleStep { at: now, percent, backlog: self.backlog });
                }
            }
            Verdict::Stop(reason) => self.decision = Some(Decision { at: now, reason, aborted: false }),
            Verdict::Abort(reason) => self.decision = Some(Decision { at: now, reason, aborted: true }),
        }
    }

    /// What was to be done without convergence.
    pub fn wanted(&self) -> OnNoConvergence {
        self.config.on_no_convergence
    }

    /// How much the guest was slowed down last, in percent; 0: not at all.
    pub fn throttle_percent(&self) -> u8 {
        self.throttle_steps.last().map_or(0, |step| step.percent)
    }

    /// Whether pre-copy ended with what was left within the budget, and the guest was never slowed down for it.
    pub fn is_plain(&self) -> bool {
        let within = self.backlog as f64 <= self.config.pages_in_budget(self.pages_per_s);
        within && self.throttle_steps.is_empty()
    }

    /// Transmissions over the pages that have to be sent.
    pub fn sent_over_memory(&self) -> f64 {
        self.sent as f64 / self.pages.max(1) as f64
    }

    /// The downtime of stopping with `pages` left, at the link's latest speed; `Duration::MAX` without a link.
    pub fn downtime(&self, pages: u64) -> Duration {
        let sending = pages as f64 / self.pages_per_s;
        let sending = if pages == 0 { Ok(Duration::ZERO) } else { Duration::try_from_secs_f64(sending) };
        sending.map_or(Duration::MAX, |time| time.saturating_add(self.config.fixed_downtime))
    }

    /// To the millisecond, as the table has it.
    fn downtime_ms(&self, pages: u64) -> u64 {
        (self.downtime(pages).as_secs_f64() * 1e3).round() as u64
    }

    fn budget_ms(&self) -> u128 {
        self.config.downtime_budget.as_millis()
    }

    /// What there is to show that the budget was not to be met.
    fn evidence(&self) -> String {
        let (ratio, budget) = (self.sent_over_memory(), self.budget_ms());
        match self.out_of_reach {
            Some(time) => format!(
                "for {:.1} s no order of sending could have left less than {} ms of downtime (budget {budget} ms); \
                 {ratio:.2} times the memory was sent",
                time.until.saturating_sub(time.since).as_secs_f64(),
                self.downtime_ms(time.least_bound),
            ),
            None => format!(
                "the least downtime to be had was {} ms (budget {budget} ms); {ratio:.2} times the memory was sent",
                self.downtime_ms(self.least_unthrottled_backlog),
            ),
        }
    }
}

/// What was decided and why, in one line.
impl fmt::Display for Convergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(Decision { reason, aborted, .. }) = self.decision else {
            return f.write_str("nothing is decided yet");
        };
        let evidence = self.evidence();
        match reason {
            StopReason::WithinBudget if self.throttle_steps.is_empty() => {
                return write!(f, "converged: {reason}");
            }
            StopReason::WithinBudget => {
                let percent = self.throttle_percent();
                return write!(
                    f,
                    "converged with the guest slowed down by {percent} %; before that, {evidence} in all"
                );
            }
            StopReason::MaxTime => {
                let limit = self.config.max_time.as_secs_f64();
                write!(f, "not converged within {limit} s (--max-time): {evidence}")?;
            }
            StopReason::OutOfReach | StopReason::NoBetterBacklog => {
                write!(f, "cannot converge: {evidence}")?;
            }
            _ => write!(f, "not converged: {reason}; {evidence}")?,
        }
        if aborted {
            return f.write_str(
                "; raise --budget or --bandwidth, or choose --on-no-convergence stop or throttle",
            );
        }
        write!(f, "; stopped with {} ms left, the least was ", self.downtime_ms(self.backlog))?;
        write!(f, "{} ms", self.downtime_ms(self.least_backlog))
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::config;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// 1000 pages at 1000 pages/s, 300 ms of budget.
    fn seen(on_no_convergence: OnNoConvergence) -> Convergence {
        let mut seen = Convergence::new(Config { on_no_convergence, ..config(1000) });
        (seen.pages_per_s, seen.sent, seen.bound) = (1000.0, 1430, 812);
        (seen.backlog, seen.least_backlog, seen.least_unthrottled_backlog) = (950, 905, 905);
        seen
    }

    #[test]
    fn names_read_back_and_a_wrong_one_is_told_the_right_ones() {
        for wanted in [OnNoConvergence::Stop, OnNoConvergence::Abort, OnNoConvergence::Throttle] {
            assert_eq!(wanted.to_string().parse(), Ok(wanted));
        }
        let error = "retry".parse::<OnNoConvergence>().unwrap_err();
        assert!(error.contains("stop, abort or throttle"), "{error}");
        assert_eq!(OnNoConvergence::default(), OnNoConvergence::Stop);
    }

    #[test]
    fn an_abort_says_for_how_long_how_far_and_what_to_do() {
        let mut seen = seen(OnNoConvergence::Abort);
        seen.note_reach(SECOND, Some(SECOND), false);
        seen.bound = 900;
        seen.note_reach(4 * SECOND, Some(SECOND), true);
        seen.note_verdict(4 * SECOND, Verdict::Abort(StopReason::OutOfReach));
        let said = seen.to_string();
        assert!(
            said.starts_with(
                "cannot converge: for 3.0 s no order of sending could have left less than 812 ms of downtime \
                 (budget 300 ms); 1.43 times the memory was sent; raise --budget"
            ),
            "{said}"
        );
        assert_eq!(seen.established_at, Some(4 * SECOND));
    }

    #[test]
    fn what_settled_it_is_kept_and_what_did_not_is_dropped() {
        let mut seen = seen(OnNoConvergence::Stop);
        seen.note_reach(SECOND, Some(SECOND), false);
        seen.note_reach(2 * SECOND, None, false);
        assert_eq!(seen.out_of_reach, None);
        seen.note_reach(3 * SECOND, Some(3 * SECOND), false);
        seen.note_reach(5 * SECOND, Some(3 * SECOND), true);
        seen.note_reach(6 * SECOND, None, true);
        seen.note_reach(7 * SECOND, Some(7 * SECOND), true);
        let settled = OutOfReach { since: 3 * SECOND, until: 5 * SECOND, least_bound: 812 };
        assert_eq!((seen.out_of_reach, seen.established_at), (Some(settled), Some(5 * SECOND)));
    }

    #[test]
    fn every_ending_is_one_line_with_figures() {
        use StopReason::*;
        for (reason, says) in [
            (NoBetterBacklog, "cannot converge: the least downtime to be had was 905 ms (budget 300 ms)"),
            (DirtyCap, "2.2 times the memory"),
            (MaxTime, "within 600 s (--max-time)"),
            (MaxRounds, "last round"),
        ] {
            let mut seen = seen(OnNoConvergence::Stop);
            seen.note_verdict(SECOND, Verdict::Stop(reason));
            let said = seen.to_string();
            assert!(said.contains(says) && said.contains("stopped with 950 ms left"), "{said}");
            assert!(!said.contains('\n') && !seen.is_plain());
        }
        let mut seen = seen(OnNoConvergence::Throttle);
        seen.note_verdict(SECOND, Verdict::Throttle(20));
        seen.note_verdict(SECOND, Verdict::Throttle(20));
        seen.note_verdict(2 * SECOND, Verdict::Throttle(30));
        seen.backlog = 200;
        seen.note_verdict(3 * SECOND, Verdict::Stop(WithinBudget));
        assert_eq!(seen.throttle_steps.iter().map(|step| step.percent).collect::<Vec<_>>(), [20, 30]);
        assert!(seen.to_string().contains("slowed down by 30 %"), "{seen}");
        assert!(!seen.is_plain(), "it did not simply converge");
    }
}
