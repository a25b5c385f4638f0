//! What a policy would have done with a recorded trace, by the code that decides in a live migration.
//!
//! The model: time runs in rounds of the trace. The link carries B pages a round, a real number; a fraction of a page is
//! carried over, whole pages of credit that are not used are lost. At the start of a round the sender may stop: the backlog
//! is then sent with the guest paused. Otherwise, knowing the dirty sets of the rounds before, it sends pending pages; only
//! then do the pages of the round become pending, those just sent included. With the stop at the start of round T,
//! TMT = (T - start) period + backlog / B.
//!
//! A trace is what it is: a guest that is slowed down would have written otherwise. Under `OnNoConvergence::Throttle` a
//! replay goes on as if the throttle had no effect, to the budget, the time limit or the end of the trace.
//!
//! The backlog is what the model says is pending. A policy that sends in rounds, as Xen does, has a copy of the dirty log and
//! may hold more in it: pages that were written and then sent in the same round, which it will send once more. Such sends
//! count when they happen; with the guest paused nobody is charged for more than what is pending.
//!
//! The forecast's own cost, the network and the pause of a sample are not in the model.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use super::format::Trace;
use crate::forecast::{
    Config, Convergence, Engine, Link, Next, OnNoConvergence, Peek, PolicyKind, Sample, StopReason, Verdict,
};
use crate::page::Pfn;
use crate::page_set::PageSet;
use crate::sys::cpu::thread_cpu_time;

/// When a replayed migration ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StopAt {
    /// By the policy's own rule.
    Own,
    /// As soon as the backlog fits the downtime budget, and never otherwise.
    Budget,
}

impl fmt::Display for StopAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            StopAt::Own => "own",
            StopAt::Budget => "budget",
        })
    }
}

/// A migration to replay.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Which page goes next.
    pub policy: PolicyKind,
    /// When it ends.
    pub stop: StopAt,
    /// The round of the trace in which it begins, with every page pending.
    pub start: usize,
    /// Pages that the link carries in a round of the trace; more than 0.
    pub pages_per_round: f64,
    /// How long the guest may stand still, in seconds.
    pub budget_s: f64,
    /// After this time every policy stops, in seconds.
    pub max_time_s: f64,
    /// What the policy's own rule does if the budget is out of reach, and at the time limit.
    pub on_no_convergence: OnNoConvergence,
}

/// How a replayed migration went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The round of the trace at whose start it stopped; the number of rounds if it ran into the end of the trace.
    pub stop_round: usize,
    /// Why it stopped; none if the trace ended first.
    pub reason: Option<StopReason>,
    /// Whether it was called off then: nothing was sent with the guest paused, and the total time is that up to there.
    pub aborted: bool,
    /// What was decided, with its reasons.
    pub convergence: Convergence,
    /// Pages sent before the stop, each as often as it was sent.
    pub sent: u64,
    /// Pages left at the stop, sent with the guest paused unless it was called off.
    pub backlog: u64,
    /// Pages that the policy itself has left; more than the backlog only for one that sends in rounds.
    pub policy_backlog: u64,
    /// Total migration time in seconds, the stop phase included.
    pub tmt_s: f64,
    /// The stop phase in seconds.
    pub downtime_s: f64,
    /// Whether that is within the budget.
    pub converged: bool,
    /// Pages dirty in the rounds of the migration, counted each time.
    pub dirty_pages: u64,
    /// CPU time that the forecast took.
    pub forecast_time: Duration,
    /// Bytes of the forecast's state at the end.
    pub state_bytes: usize,
}

/// Looks on while a migration is replayed.
pub trait Observer {
    /// Round `round` of the trace has sent `sent`, in order, and its dirty pages are about to become pending.
    fn round(&mut self, round: usize, sent: &[Pfn], engine: &Engine);
}

/// An observer that does not look.
pub struct Unobserved;

impl Observer for Unobserved {
    fn round(&mut self, _: usize, _: &[Pfn], _: &Engine) {}
}

/// Two at once, each if it is there.
impl<A: Observer, B: Observer> Observer for (Option<A>, Option<B>) {
    fn round(&mut self, round: usize, sent: &[Pfn], engine: &Engine) {
        if let Some(first) = &mut self.0 {
            first.round(round, sent, engine);
        }
        if let Some(second) = &mut self.1 {
            second.round(round, sent, engine);
        }
    }
}

/// In a trace nothing is known of a round before it is over.
struct NothingToPeekAt;

impl Peek for NothingToPeekAt {
    fn peek(&mut self, _: Pfn, _: u64, _: &mut PageSet) {}
}

/// Pages asked for at a time, as the scanner of a live migration does at most.
const BATCH_PAGES: usize = 64;

/// Replays one migration.
///
/// Panics if the start is not a round of the trace or the link carries nothing.
pub fn replay(trace: &Trace, setting: &Setting, observer: &mut dyn Observer) -> Outcome {
    assert!(setting.start < trace.rounds().len(), "the start is beyond the trace");
    assert!(setting.pages_per_round > 0.0, "the link carries nothing");
    let mut run = Replay::new(trace, setting);
    let mut round = setting.start;
    let reason = loop {
        if let Some(reason) = run.verdict() {
            break Some(reason);
        }
        if round == trace.rounds().len() {
            break None;
        }
        run.send();
        observer.round(round, &run.sent_now, &run.engine);
        run.take_in(round);
        round += 1;
    };
    run.outcome(round, reason)
}

struct Replay<'a> {
    trace: &'a Trace,
    setting: &'a Setting,
    engine: Engine,
    link: Link,
    period: Duration,
    now: Duration,
    credit: f64,
    /// The pages whose last version was not sent.
    backlog: PageSet,
    dirty: PageSet,
    nothing: PageSet,
    sent_now: Vec<Pfn>,
    /// A policy in rounds waits for a sample that closes its round; there was one since it began.
    heard_of_since_round: bool,
    dirty_pages: u64,
    forecast_time: Duration,
}

impl<'a> Replay<'a> {
    fn new(trace: &'a Trace, setting: &'a Setting) -> Self {
        let period = Duration::from_micros(trace.period_us.into());
        let nr_pages = trace.nr_pages();
        let config = Config {
            nr_pages,
            pages: nr_pages,
            downtime_budget: Duration::from_secs_f64(setting.budget_s),
            sample_interval: period,
            max_time: Duration::from_secs_f64(setting.max_time_s),
            fixed_downtime: Duration::ZERO,
            on_no_convergence: setting.on_no_convergence,
            linger: 0.0,
        };
        let pages_per_s = setting.pages_per_round / trace.period_s();
        Replay {
            trace,
            setting,
            engine: Engine::new(setting.policy, config),
            link: Link { pages_per_s, in_flight: 0, sent: 0 },
            period,
            now: Duration::ZERO,
            credit: 0.0,
            backlog: PageSet::full(nr_pages),
            dirty: PageSet::empty(nr_pages),
            nothing: PageSet::empty(nr_pages),
            sent_now: Vec::new(),
            heard_of_since_round: false,
            dirty_pages: 0,
            forecast_time: Duration::ZERO,
        }
    }

    fn budget_pages(&self) -> f64 {
        self.setting.budget_s * self.link.pages_per_s
    }

    /// Whether to stop at the start of a round, and why.
    fn verdict(&mut self) -> Option<StopReason> {
        let began = thread_cpu_time();
        let verdict = self.engine.verdict(self.now, &self.link);
        self.forecast_time += thread_cpu_time().saturating_sub(began);
        match self.setting.stop {
            StopAt::Own => match verdict {
                Verdict::Stop(reason) | Verdict::Abort(reason) => Some(reason),
                Verdict::Continue | Verdict::Throttle(_) => None,
            },
            StopAt::Budget if self.backlog.len() as f64 <= self.budget_pages() => {
                Some(StopReason::WithinBudget)
            }
            StopAt::Budget => {
                (self.now.as_secs_f64() >= self.setting.max_time_s).then_some(StopReason::MaxTime)
            }
        }
    }

    /// Sends what the link carries in one round.
    fn send(&mut self) {
        let began = thread_cpu_time();
        self.sent_now.clear();
        self.credit = self.credit.fract() + self.setting.pages_per_round;
        let credit = self.credit as usize;
        let mut sent_before: Option<HashSet<Pfn>> = None;
        while self.sent_now.len() < credit {
            let max = (credit - self.sent_now.len()).min(BATCH_PAGES);
            let before = self.sent_now.len();
            let next =
                self.engine.next_batch(self.now, max, &self.link, &mut NothingToPeekAt, &mut self.sent_now);
            if let Some(sent_before) = &sent_before {
                let again = self.sent_now.split_off(before);
                self.sent_now.extend(again.into_iter().filter(|pfn| !sent_before.contains(pfn)));
            }
            self.link.sent += (self.sent_now.len() - before) as u64;
            match next {
                Next::Batch => {}
                Next::RoundEnd if self.heard_of_since_round => {
                    // A look at the log in the middle of a round of the trace finds what is known: that of the rounds before.
                    // What was sent since is in it too, but twice in a round of the trace nothing is sent.
                    sent_before = Some(self.sent_now.iter().copied().collect());
                    self.heard_of_since_round = false;
                    self.engine.on_sample(&Sample { at: self.now, dirty: &self.nothing });
                }
                Next::RoundEnd | Next::Idle => {
                    self.credit = 0.0;
                    break;
                }
            }
        }
        self.forecast_time += thread_cpu_time().saturating_sub(began);
        for pfn in &self.sent_now {
            self.backlog.remove(*pfn);
        }
    }

    /// What was written in `round` becomes pending.
    fn take_in(&mut self, round: usize) {
        self.dirty.clear();
        for run in self.trace.runs(round) {
            self.dirty.insert_run(Pfn(run.first.into()), run.count.into());
        }
        self.dirty_pages += self.dirty.len();
        self.now += self.period;
        let began = thread_cpu_time();
        self.engine.on_sample(&Sample { at: self.now, dirty: &self.dirty });
        self.forecast_time += thread_cpu_time().saturating_sub(began);
        self.heard_of_since_round = true;
        self.backlog.union(&self.dirty);
    }

    fn outcome(self, stop_round: usize, reason: Option<StopReason>) -> Outcome {
        let backlog = self.backlog.len();
        let convergence = self.engine.convergence().clone();
        let own = self.setting.stop == StopAt::Own;
        let aborted = own && convergence.decision.is_some_and(|decision| decision.aborted);
        let downtime_s = if aborted { 0.0 } else { backlog as f64 / self.link.pages_per_s };
        Outcome {
            stop_round,
            reason,
            aborted,
            convergence,
            sent: self.link.sent,
            backlog,
            policy_backlog: self.engine.pending().len(),
            tmt_s: (stop_round - self.setting.start) as f64 * self.trace.period_s() + downtime_s,
            downtime_s,
            converged: !aborted && backlog as f64 <= self.budget_pages(),
            dirty_pages: self.dirty_pages,
            forecast_time: self.forecast_time,
            state_bytes: self.engine.state_bytes(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::trace::clairvoyant::earliest;
    use crate::trace::format::runs_of;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// A trace of one chunk, 50 ms a round.
    pub(in crate::trace) fn trace_of(rounds: &[Vec<u32>]) -> Trace {
        let rounds = rounds.iter().enumerate().map(|(number, pages)| {
            let pages: BTreeSet<u32> = pages.iter().copied().collect();
            (number as u64 * 50_000_000, runs_of(pages).collect())
        });
        Trace::from_rounds("test", 50_000, vec![7], rounds)
    }

    pub(in crate::trace) fn setting(policy: PolicyKind, stop: StopAt) -> Setting {
        Setting {
            policy,
            stop,
            start: 0,
            pages_per_round: 20.5,
            budget_s: 0.1,
            max_time_s: 600.0,
            on_no_convergence: OnNoConvergence::Stop,
        }
    }

    #[derive(Default)]
    struct Checker {
        rounds: Vec<Vec<u64>>,
    }

    impl Observer for Checker {
        fn round(&mut self, round: usize, sent: &[Pfn], _: &Engine) {
            assert_eq!(round, self.rounds.len());
            self.rounds.push(sent.iter().map(|pfn| pfn.0).collect());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_model_is_kept_by_every_policy(
            rounds in proptest::collection::vec(proptest::collection::vec(0u32..512, 0..30), 1..60),
            policy in proptest::sample::select(PolicyKind::ALL.to_vec()),
            own: bool,
        ) {
            let trace = trace_of(&rounds);
            let setting = setting(policy, if own { StopAt::Own } else { StopAt::Budget });
            let mut checker = Checker::default();
            let outcome = replay(&trace, &setting, &mut checker);
            prop_assert_eq!(checker.rounds.len(), outcome.stop_round);
            // Sent at most what the link carries; pending is what is not sent since it was last dirty. A policy in rounds
            // sends a page again that was dirty in its round, even if it had not been sent yet then, as Xen does.
            let in_rounds = !matches!(policy, PolicyKind::Heat | PolicyKind::Ar);
            let mut pending: BTreeSet<u64> = (0..512).collect();
            let mut sent = 0;
            for (round, pages) in checker.rounds.iter().enumerate() {
                prop_assert!(pages.len() <= 21);
                prop_assert_eq!(pages.iter().collect::<BTreeSet<_>>().len(), pages.len(), "twice in a round");
                sent += pages.len() as u64;
                prop_assert!(sent as f64 <= 20.5 * (round + 1) as f64);
                for page in pages {
                    prop_assert!(pending.remove(page) || in_rounds, "page {} sent in vain", page);
                }
                pending.extend(rounds[round].iter().map(|page| u64::from(*page)));
            }
            let left = pending.len() as u64;
            prop_assert_eq!(sent, outcome.sent);
            prop_assert_eq!(outcome.backlog, left);
            prop_assert!(outcome.policy_backlog == left || in_rounds && outcome.policy_backlog > left);
            let tmt_s = 0.05 * (outcome.stop_round as f64 + outcome.backlog as f64 / 20.5);
            prop_assert!((outcome.tmt_s - tmt_s).abs() < 1e-9);
            prop_assert_eq!(outcome.converged, outcome.backlog <= 41);
            prop_assert!(outcome.reason.is_some() || outcome.stop_round == rounds.len());
            if outcome.converged {
                let bound = earliest(&trace, 0, 20.5, 41.0).expect("a policy has reached it");
                prop_assert!(bound.total_s < outcome.tmt_s + 1e-9, "{bound:?} {outcome:?}");
            }
        }
    }

    #[test]
    fn an_idle_guest_takes_the_base_time_under_every_policy() {
        let trace = trace_of(&vec![vec![]; 100]);
        for policy in PolicyKind::ALL {
            let outcome = replay(&trace, &setting(policy, StopAt::Budget), &mut Unobserved);
            assert_eq!((outcome.sent + outcome.backlog, outcome.converged), (512, true), "{policy}");
            assert!((outcome.tmt_s - 0.05 * 512.0 / 20.5).abs() < 0.003, "{policy}: {}", outcome.tmt_s);
        }
    }

    #[test]
    fn a_policy_in_rounds_goes_on_in_the_same_round_of_the_trace() {
        // Page 5 is written in every round; Xen's first round ends with the 25th round of the trace.
        let trace = trace_of(&vec![vec![5]; 100]);
        let outcome = replay(&trace, &setting(PolicyKind::Xen, StopAt::Own), &mut Unobserved);
        assert_eq!(outcome.reason, Some(StopReason::FewDirty));
        assert_eq!((outcome.stop_round, outcome.sent), (26, 513), "one page of a second round, and no third");
    }

    #[test]
    fn a_migration_that_is_called_off_is_charged_up_to_there_and_has_no_downtime() {
        let trace = trace_of(&vec![(0..512).collect(); 300]);
        let stopped = setting(PolicyKind::Ar, StopAt::Own);
        let aborted = Setting { on_no_convergence: OnNoConvergence::Abort, ..stopped };
        let (stopped, aborted) =
            (replay(&trace, &stopped, &mut Unobserved), replay(&trace, &aborted, &mut Unobserved));
        assert!(!stopped.aborted && stopped.downtime_s > 0.0 && !stopped.converged);
        let reasons = [Some(StopReason::OutOfReach), Some(StopReason::DirtyCap)];
        assert!(aborted.aborted && reasons.contains(&aborted.reason), "{:?}", aborted.reason);
        assert_eq!((aborted.converged, aborted.downtime_s), (false, 0.0));
        assert!((aborted.tmt_s - 0.05 * aborted.stop_round as f64).abs() < 1e-9);
        assert!(
            aborted.convergence.to_string().contains("no order of sending could have left less than"),
            "{}",
            aborted.convergence
        );
        let throttled =
            Setting { on_no_convergence: OnNoConvergence::Throttle, ..setting(PolicyKind::Ar, StopAt::Own) };
        let throttled = replay(&trace, &throttled, &mut Unobserved);
        assert_eq!((throttled.reason, throttled.stop_round), (None, 300), "the trace is what it is");
    }
}
