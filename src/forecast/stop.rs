//! When ranked sending ends.
//!
//! With S pages sent, N pages to send at all, B pages/s, base = N/B and K pages in the downtime budget, at each
//! sample:
//!
//! * backlog <= K: stop. Or send the rest first, where the user would rather have a shorter downtime (`linger`), if what is likely to
//!   be written meanwhile is a small enough share of it, and stop when it is sent, or at the latest after twice the time that
//!   this should take. That costs the migration as much time as it takes to send what was written, and saves the guest
//!   the time for the rest.
//! * Hopeless: the clairvoyant bound was above 2K in every sample of one base time, and S > 1.125 N. From then on
//!   take the first backlog that is no worse than the least since S > N.
//! * No progress: S > 1.15 N, the bound was near the budget over the last fifth of a base time (its mean at most 1.5K: a
//!   sender that knew the future could stop about now), and yet the backlog has not fallen so fast in that time that it
//!   would be within K before the cap. Take the first backlog within 5 % of the least. A bound above that asks for
//!   patience: the guest is in a phase in which nobody could stop, and such phases end.
//! * Cap: stop before S + backlog reaches 2.2 N, with room for one more sample, for the largest growth of
//!   the backlog in one sample, which fades within a base time, and for 0.02 N more. Without that room bursts went over the cap.
//! * When the deadline is nearer than half a base time, take the first backlog that is no worse than the least.
//!
//! Hopeless, no progress and cap are findings that pre-copy does not converge. What follows is the user's choice
//! ([`OnNoConvergence`]): the above is for `Stop`; under `Abort` each finding ends the migration at once; under
//! `Throttle` each has the guest slowed down until the backlog is within K, and nothing else but the deadline ends it.
//!
//! docs/forecast.md has what this came to on recorded traces, and what was tried.

use std::collections::VecDeque;

use super::policy::View;
use super::throttle::{Distance, Throttle};
use super::{Config, Convergence, OnNoConvergence, StopReason, Verdict};
use std::time::Duration;

/// The bound is out of reach above this multiple of the budget.
const HOPELESS_BUDGETS: f64 = 2.0;
/// No verdict of hopelessness before this multiple of the memory was sent.
const HOPELESS_SENT: f64 = 1.125;
/// Progress is looked for over this part of a base time,
const PROGRESS_BASES: f64 = 0.2;
/// and over three samples at least.
const PROGRESS_SAMPLES: usize = 3;
/// Samples kept for that at most; with more in the time, it is looked for over a shorter one.
const MAX_PROGRESS_SAMPLES: usize = 1024;
/// Progress is asked for once this multiple of the memory was sent,
const PROGRESS_SENT: f64 = 1.15;
/// and while the bound is on average within this multiple of the budget.
const WITHIN_REACH_BUDGETS: f64 = 1.5;
/// Without progress a backlog within this multiple of the least is as good as it gets.
const NEARLY_LEAST: f64 = 1.05;
/// Less of a rest than the link carries in this time is not worth lingering for.
const SHORT_ENOUGH: Duration = Duration::from_millis(10);
/// Never send more than this multiple of the memory.
const CAP: f64 = 2.2;
/// Room below the cap, in multiples of the memory, for a burst that is larger than those before.
const UNSEEN_BURST: f64 = 0.02;

/// What the latest sample shows.
#[derive(Clone, Copy)]
struct Findings {
    stuck: bool,
    capped: bool,
    deadline_near: bool,
}

/// The backlog and the bound over the last part of a base time.
struct Progress {
    samples: VecDeque<(Duration, u64, u64)>,
    /// The least backlog of all samples.
    least: u64,
}

impl Progress {
    fn new() -> Self {
        Progress { samples: VecDeque::with_capacity(MAX_PROGRESS_SAMPLES), least: u64::MAX }
    }

    /// Takes in a sample, and drops those that are more than `window_s` before it, but for the last of them.
    fn note(&mut self, now: Duration, backlog: u64, bound: u64, window_s: f64) {
        if self.samples.len() == MAX_PROGRESS_SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((now, backlog, bound));
        let is_old = |(at, ..): &(Duration, u64, u64)| now.saturating_sub(*at).as_secs_f64() >= window_s;
        while self.samples.len() > PROGRESS_SAMPLES + 1 && self.samples.get(1).is_some_and(is_old) {
            self.samples.pop_front();
        }
        self.least = self.least.min(backlog);
    }

    /// Whether the budget is about within reach of a sender that knows the future, and the backlog, at the speed at which it
    /// fell, is not within it after `room_s` seconds.
    fn is_too_slow(&self, budget: f64, room_s: f64) -> bool {
        let (Some((then, before, _)), Some((now, backlog, _))) = (self.samples.front(), self.samples.back())
        else {
            return false;
        };
        if self.samples.len() <= PROGRESS_SAMPLES {
            return false;
        }
        let bounds: u64 = self.samples.iter().map(|(.., bound)| bound).sum();
        let fell_per_s =
            (*before as f64 - *backlog as f64) / now.saturating_sub(*then).as_secs_f64().max(1e-6);
        bounds as f64 / self.samples.len() as f64 <= WITHIN_REACH_BUDGETS * budget
            && fell_per_s * room_s < *backlog as f64 - budget
    }
}

pub(super) struct StopRule {
    config: Config,
    samples_judged: u64,
    /// When the latest sample that was judged was taken.
    judged_at: Duration,
    out_of_reach_since: Option<Duration>,
    hopeless: bool,
    least_backlog: Option<u64>,
    progress: Progress,
    last_backlog: Option<u64>,
    rise: f64,
    throttle: Throttle,
    /// The rest was found to fit and is sent before the stop: until when at the latest.
    lingers_until: Option<Duration>,
    is_lingering: bool,
    verdict: Verdict,
}

impl StopRule {
    pub(super) fn new(config: Config) -> Self {
        StopRule {
            config,
            samples_judged: 0,
            judged_at: Duration::ZERO,
            out_of_reach_since: None,
            hopeless: false,
            least_backlog: None,
            progress: Progress::new(),
            last_backlog: None,
            rise: 0.0,
            throttle: Throttle::new(),
            lingers_until: None,
            is_lingering: false,
            verdict: Verdict::Continue,
        }
    }

    /// The verdict on the latest sample. Between samples the backlog only shrinks because the writes are not
    /// known yet, so the last verdict holds.
    pub(super) fn judge(&mut self, view: &View, convergence: &mut Convergence) -> Verdict {
        let pages_per_s = view.link.pages_per_s;
        if self.samples_judged == view.working_set.samples_taken()
            || pages_per_s.is_nan()
            || pages_per_s <= 0.0
        {
            if self.is_lingering && view.pending.is_empty() && view.link.in_flight == 0 {
                self.verdict = Verdict::Stop(StopReason::WithinBudget);
            }
            return self.verdict;
        }
        self.samples_judged = view.working_set.samples_taken();
        let backlog = view.pending.len() + view.link.in_flight;
        let pages = self.config.pages.saturating_sub(view.working_set.zero_unwritten());
        let base_s = pages as f64 / pages_per_s;

        let taken_at = view.working_set.last_sample_at();
        let interval_s = taken_at.saturating_sub(self.judged_at).as_secs_f64();
        self.judged_at = taken_at;
        let growth = self.last_backlog.map_or(0, |last| backlog.saturating_sub(last));
        self.rise = (self.rise * (1.0 - interval_s / base_s).max(0.0)).max(growth as f64);
        self.last_backlog = Some(backlog);
        self.judge_reach(view, pages as f64, base_s);
        convergence.note_reach(view.now, self.out_of_reach_since, self.hopeless);

        let sent = view.link.sent as f64;
        let cap = (CAP - UNSEEN_BURST) * pages as f64;
        let capped = sent + backlog as f64 + pages_per_s * interval_s + self.rise >= cap;
        let budget = self.config.pages_in_budget(pages_per_s);
        let room_s = (cap - sent - backlog as f64).max(0.0) / pages_per_s;
        self.progress.note(view.now, backlog, convergence.bound, PROGRESS_BASES * base_s);
        let stuck = sent > PROGRESS_SENT * pages as f64 && self.progress.is_too_slow(budget, room_s);
        let deadline_near = self.config.max_time.saturating_sub(view.now).as_secs_f64() < base_s / 2.0;
        let found = Findings { stuck, capped, deadline_near };
        let fits = backlog as f64 <= budget;
        self.is_lingering =
            fits && !capped && !deadline_near && self.is_worth_lingering(view, backlog, interval_s);
        self.verdict = if self.is_lingering {
            Verdict::Continue
        } else if fits {
            Verdict::Stop(StopReason::WithinBudget)
        } else {
            match self.config.on_no_convergence {
                OnNoConvergence::Stop => self.at_the_best_backlog(backlog, found),
                OnNoConvergence::Abort => self.called_off(found),
                OnNoConvergence::Throttle => {
                    let here = Distance { bound: convergence.bound as f64, backlog: backlog as f64, budget };
                    self.slowed_down(view.now, base_s, found, here)
                }
            }
        };
        if sent > pages as f64 {
            self.least_backlog = Some(self.least_backlog.map_or(backlog, |least| least.min(backlog)));
        }
        self.verdict
    }

    /// Whether the rest, which fits, is being sent before the stop.
    pub(super) fn is_lingering(&self) -> bool {
        self.is_lingering
    }

    /// Whether to send the rest before the stop although it fits.
    fn is_worth_lingering(&mut self, view: &View, backlog: u64, interval_s: f64) -> bool {
        let pages_per_s = view.link.pages_per_s;
        let takes_s = backlog as f64 / pages_per_s;
        if self.config.linger <= 0.0 || takes_s <= SHORT_ENOUGH.as_secs_f64() {
            return false;
        }
        let dirty_per_s = view.working_set.dirty_last() as f64 / interval_s.max(1e-6);
        let until =
            *self.lingers_until.get_or_insert_with(|| view.now + Duration::from_secs_f64(2.0 * takes_s));
        // A stop that the deadline forces in between would be another kind of stop.
        let until = until.min(self.config.max_time);
        // As much of the rest will be written meanwhile as the guest writes of what the link carries.
        view.now + Duration::from_secs_f64(takes_s) < until && dirty_per_s <= self.config.linger * pages_per_s
    }

    fn at_the_best_backlog(&self, backlog: u64, found: Findings) -> Verdict {
        let is_least = self.least_backlog.is_some_and(|least| backlog <= least);
        if is_least && (self.hopeless || found.deadline_near) {
            Verdict::Stop(StopReason::NoBetterBacklog)
        } else if found.stuck && backlog as f64 <= NEARLY_LEAST * self.progress.least as f64 {
            Verdict::Stop(StopReason::NoProgress)
        } else if found.capped {
            Verdict::Stop(StopReason::DirtyCap)
        } else {
            Verdict::Continue
        }
    }

    fn called_off(&self, found: Findings) -> Verdict {
        if self.hopeless {
            Verdict::Abort(StopReason::OutOfReach)
        } else if found.stuck {
            Verdict::Abort(StopReason::NoProgress)
        } else if found.capped {
            Verdict::Abort(StopReason::DirtyCap)
        } else {
            Verdict::Continue
        }
    }

    fn slowed_down(&mut self, now: Duration, base_s: f64, found: Findings, here: Distance) -> Verdict {
        if self.hopeless || found.stuck || found.capped || self.throttle.is_on() {
            Verdict::Throttle(self.throttle.judge(now, base_s, self.config.sample_interval, here))
        } else {
            Verdict::Continue
        }
    }

    /// Whether the budget was out of any policy's reach for a whole base time.
    fn judge_reach(&mut self, view: &View, pages: f64, base_s: f64) {
        let pages_per_s = view.link.pages_per_s;
        let bound = view.working_set.bound(view.now, pages_per_s) as f64;
        if bound <= HOPELESS_BUDGETS * self.config.pages_in_budget(pages_per_s) {
            self.out_of_reach_since = None;
            return;
        }
        let since = *self.out_of_reach_since.get_or_insert(view.now);
        let long_enough = view.now.saturating_sub(since).as_secs_f64() >= base_s;
        self.hopeless |= long_enough && view.link.sent as f64 > HOPELESS_SENT * pages;
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::{config, pages};
    use super::*;
    use crate::forecast::{Link, Sample, WorkingSet};
    use crate::page_set::PageSet;

    /// 1000 pages at 1000 pages/s: a base of 1 s, 300 pages in the budget, 50 pages a sample.
    struct Bench {
        rule: StopRule,
        convergence: Convergence,
        working_set: WorkingSet,
        now: Duration,
    }

    impl Bench {
        fn new() -> Self {
            Bench::with(OnNoConvergence::Stop)
        }

        fn with(on_no_convergence: OnNoConvergence) -> Self {
            let config = Config { on_no_convergence, ..config(1000) };
            Bench {
                rule: StopRule::new(config),
                convergence: Convergence::new(config),
                working_set: WorkingSet::new(&config),
                now: Duration::ZERO,
            }
        }

        /// A sample in which the first `dirty` pages were written, with `backlog` pending and `sent` sent.
        fn judge(&mut self, dirty: u64, backlog: u64, sent: u64) -> Option<StopReason> {
            match self.verdict(dirty, backlog, sent) {
                Verdict::Continue => None,
                Verdict::Stop(reason) => Some(reason),
                other => panic!("{other:?}"),
            }
        }

        fn verdict(&mut self, dirty: u64, backlog: u64, sent: u64) -> Verdict {
            self.now += Duration::from_millis(50);
            self.working_set.record(&Sample { at: self.now, dirty: &pages(1000, 0..dirty) });
            let link = Link { pages_per_s: 1000.0, in_flight: 0, sent };
            self.judge_again(&pages(1000, 0..backlog), link)
        }

        fn judge_again(&mut self, pending: &PageSet, link: Link) -> Verdict {
            let view = View { now: self.now, link: &link, pending, working_set: &self.working_set };
            self.convergence.observe(&view);
            self.rule.judge(&view, &mut self.convergence)
        }
    }

    #[test]
    fn a_backlog_within_the_budget_stops_it_and_in_flight_pages_count() {
        let mut bench = Bench::new();
        assert_eq!(bench.judge(0, 301, 0), None);
        assert_eq!(bench.judge(0, 300, 0), Some(StopReason::WithinBudget));
        let mut bench = Bench::new();
        bench.judge(0, 1000, 0);
        bench.working_set.record(&Sample { at: bench.now, dirty: &pages(1000, []) });
        let link = Link { pages_per_s: 1000.0, in_flight: 1, sent: 0 };
        assert_eq!(bench.judge_again(&pages(1000, 0..300), link), Verdict::Continue);
    }

    /// A bench that lingers while no more than a quarter is written again.
    fn lingering() -> Bench {
        let mut bench = Bench::new();
        bench.rule.config.linger = 0.25;
        bench
    }

    #[test]
    fn a_rest_that_is_hardly_written_again_is_sent_before_the_stop() {
        let mut bench = lingering();
        // 200 pages take 0.2 s, in which 48 are written at 12 a sample.
        assert_eq!(bench.judge(12, 200, 0), None);
        assert_eq!(bench.judge(12, 160, 0), None);
        let link = |in_flight| Link { pages_per_s: 1000.0, in_flight, sent: 0 };
        assert_eq!(bench.judge_again(&pages(1000, 0..1), link(0)), Verdict::Continue);
        assert_eq!(bench.judge_again(&pages(1000, []), link(1)), Verdict::Continue);
        let stop = Verdict::Stop(StopReason::WithinBudget);
        assert_eq!(
            bench.judge_again(&pages(1000, []), link(0)),
            stop,
            "all is sent: no sample is waited for"
        );
        assert_eq!(lingering().judge(13, 200, 0), Some(StopReason::WithinBudget), "52 of 200 are too many");
        assert_eq!(lingering().judge(0, 10, 0), Some(StopReason::WithinBudget), "10 ms are not worth it");
        assert_eq!(Bench::new().judge(0, 200, 0), Some(StopReason::WithinBudget), "nobody asked for it");
    }

    #[test]
    fn lingering_ends_in_time_and_never_exceeds_cap_or_deadline() {
        let mut bench = lingering();
        for step in 0..4 {
            assert_eq!(bench.judge(0, 200, 0), None, "step {step}: 0.2 s within twice 0.2 s");
        }
        assert_eq!(bench.judge(0, 200, 0), Some(StopReason::WithinBudget));
        assert_eq!(lingering().judge(0, 200, 1950), Some(StopReason::WithinBudget), "the cap is near");
        let mut bench = lingering();
        bench.rule.config.max_time = Duration::from_millis(500);
        assert_eq!(bench.judge(0, 200, 0), Some(StopReason::WithinBudget), "half a base time is left");
    }

    #[test]
    fn the_fixed_downtime_is_not_for_pages() {
        let mut bench = Bench::new();
        bench.rule.config.fixed_downtime = Duration::from_millis(100);
        assert_eq!(bench.judge(0, 201, 0), None);
        assert_eq!(bench.judge(0, 200, 0), Some(StopReason::WithinBudget));
    }

    #[test]
    fn between_samples_the_verdict_stands() {
        let mut bench = Bench::new();
        assert_eq!(bench.judge(0, 500, 0), None);
        let link = Link { pages_per_s: 1000.0, in_flight: 0, sent: 490 };
        assert_eq!(bench.judge_again(&pages(1000, 0..10), link), Verdict::Continue);
    }

    #[test]
    fn a_budget_out_of_reach_for_a_base_time_takes_the_least_backlog() {
        let mut bench = Bench::new();
        // All pages are written in each sample: the bound is 1000 - 50, above two budgets.
        for step in 0..21 {
            assert_eq!(bench.judge(1000, 760 - step, 1125), None, "not hopeless yet, or too little sent");
        }
        assert_eq!(bench.judge(1000, 745, 1126), None, "hopeless, but it has been lower");
        assert_eq!(bench.judge(1000, 740, 1126), Some(StopReason::NoBetterBacklog));
    }

    /// A second in which `dirty` pages are written in each sample: the bound is then 50 less; with 400 near the budget of 300.
    /// The backlog comes down by `fall` a sample, to `fall` above `backlog`.
    fn after_a_second(dirty: u64, backlog: u64, fall: u64) -> Bench {
        let mut bench = Bench::new();
        for step in 0..20 {
            assert_eq!(bench.judge(dirty, (backlog + fall * (20 - step)).min(1000), 0), None);
        }
        bench
    }

    #[test]
    fn a_backlog_that_no_longer_falls_is_taken_near_its_least() {
        let mut bench = after_a_second(400, 410, 0);
        assert_eq!(bench.judge(400, 410, 1150), None, "the memory was not sent 1.15 times");
        assert_eq!(bench.judge(400, 431, 1151), None, "it has been lower by more than 5 %");
        assert_eq!(bench.judge(400, 430, 1151), Some(StopReason::NoProgress));
    }

    #[test]
    fn a_backlog_that_will_be_within_the_budget_before_the_cap_is_waited_for() {
        let mut bench = after_a_second(400, 700, 62);
        for step in 0..6 {
            assert_eq!(bench.judge(400, 700 - 62 * step, 1151), None, "400 to go at 1240/s; step {step}");
        }
        let mut bench = after_a_second(400, 700, 40);
        let verdict = bench.judge(400, 700, 1151);
        assert_eq!(verdict, Some(StopReason::NoProgress), "400 to go at 800/s, and the cap is 0.329 s away");
    }

    #[test]
    fn a_phase_in_which_nobody_could_stop_is_waited_out() {
        let mut bench = after_a_second(650, 700, 0);
        for _ in 0..30 {
            assert_eq!(bench.judge(650, 700, 1151), None, "a bound of 600 is twice the budget");
        }
    }

    #[test]
    fn near_the_deadline_the_least_backlog_is_taken() {
        let mut bench = Bench::new();
        bench.rule.config.max_time = Duration::from_secs(1);
        for step in 1..=10 {
            assert_eq!(bench.judge(1000, 400 + step, 1001), None, "half a base time is left");
        }
        assert_eq!(bench.judge(1000, 402, 1001), None, "it has been lower");
        assert_eq!(bench.judge(1000, 401, 1001), Some(StopReason::NoBetterBacklog));
    }

    #[test]
    fn one_sample_within_reach_starts_the_clock_again() {
        let mut bench = Bench::new();
        for step in 0..60 {
            let dirty = if step % 15 >= 8 { 0 } else { 1000 };
            // After seven samples without writes the bound is 1000 - 8 * 50, two budgets exactly.
            assert_eq!(bench.judge(dirty, 900, 1201), None, "step {step}");
        }
    }

    #[test]
    fn the_cap_leaves_room_for_a_sample_for_the_largest_rise_and_for_an_unseen_one() {
        let mut bench = Bench::new();
        assert_eq!(bench.judge(0, 500, 1629), None);
        assert_eq!(bench.judge(0, 500, 1631), Some(StopReason::DirtyCap), "1631 + 500 + 50 > 2.18 * 1000");
        let mut bench = Bench::new();
        bench.judge(0, 400, 1000);
        assert_eq!(bench.judge(0, 500, 1529), None, "the rise of 100 has not faded yet");
        assert_eq!(bench.judge(0, 500, 1536), Some(StopReason::DirtyCap), "1536 + 500 + 50 + 95");
    }

    #[test]
    fn a_link_that_carries_nothing_decides_nothing() {
        let mut bench = Bench::new();
        bench.working_set.record(&Sample { at: bench.now, dirty: &pages(1000, []) });
        for pages_per_s in [0.0, -1.0, f64::NAN] {
            let link = Link { pages_per_s, in_flight: 0, sent: 9999 };
            assert_eq!(bench.judge_again(&pages(1000, 0..1), link), Verdict::Continue);
        }
    }

    /// Drives a guest that writes everything to where the budget is known to be out of reach; the last verdict.
    fn until_hopeless(bench: &mut Bench) -> Verdict {
        for step in 0..21 {
            assert_eq!(bench.verdict(1000, 760 - step, 1001), Verdict::Continue, "not hopeless yet");
        }
        bench.verdict(1000, 745, 1126)
    }

    #[test]
    fn out_of_reach_is_called_off_at_once_if_so_wanted_and_the_explanation_has_the_figures() {
        let mut bench = Bench::with(OnNoConvergence::Abort);
        assert_eq!(until_hopeless(&mut bench), Verdict::Abort(StopReason::OutOfReach));
        let seen = &bench.convergence;
        let time = seen.out_of_reach.expect("it is out of reach");
        assert_eq!(
            (time.least_bound, seen.least_bound),
            (950, 950),
            "all but what one sample interval carries"
        );
        assert_eq!((time.until, seen.established_at), (bench.now, Some(bench.now)));
        assert!(time.until - time.since >= Duration::from_secs(1), "one base time");
        assert_eq!((seen.sent, seen.pages, seen.backlog, seen.least_backlog), (1126, 1000, 745, 740));
    }

    #[test]
    fn the_cap_too_is_called_off_if_so_wanted() {
        let mut bench = Bench::with(OnNoConvergence::Abort);
        assert_eq!(bench.verdict(0, 500, 1650), Verdict::Abort(StopReason::DirtyCap));
        let mut bench = Bench::with(OnNoConvergence::Abort);
        assert_eq!(
            bench.verdict(0, 300, 1650),
            Verdict::Stop(StopReason::WithinBudget),
            "nothing to call off"
        );
    }

    #[test]
    fn a_throttle_is_raised_beyond_the_cap_until_the_backlog_is_within_budget() {
        let mut bench = Bench::with(OnNoConvergence::Throttle);
        assert_eq!(until_hopeless(&mut bench), Verdict::Throttle(20));
        let mut percents = vec![20];
        for step in 0..60 {
            let Verdict::Throttle(percent) = bench.verdict(1000, 760, 1300 + 50 * step) else {
                panic!("nothing but the budget ends it");
            };
            percents.push(percent);
        }
        percents.dedup();
        assert_eq!(percents, [20, 30, 40, 50, 60, 70, 80, 90, 95], "a step every quarter of a base time");
        assert_eq!(bench.verdict(0, 301, 5000), Verdict::Throttle(95), "it stays on");
        assert_eq!(bench.verdict(0, 300, 5000), Verdict::Stop(StopReason::WithinBudget));
    }
}
