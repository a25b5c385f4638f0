//! For the tests: a fluid link and a hypervisor's dirty log around an [`Engine`], which check at every step
//! that nothing is forgotten and that the clairvoyant bound holds.

use super::{
    Config, Convergence, Engine, Link, Next, OnNoConvergence, Peek, PolicyKind, Sample, StopReason, TStar,
    Verdict,
};
use crate::page::Pfn;
use crate::page_set::PageSet;
use proptest::prelude::*;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(50);
/// Writes are spread over as many parts of a sample interval.
const PARTS: usize = 5;

/// A configuration with a sample every 50 ms, 300 ms of downtime and no time limit to speak of.
pub(super) fn config(nr_pages: u64) -> Config {
    Config {
        nr_pages,
        pages: nr_pages,
        downtime_budget: Duration::from_millis(300),
        sample_interval: INTERVAL,
        max_time: Duration::from_secs(600),
        fixed_downtime: Duration::ZERO,
        on_no_convergence: OnNoConvergence::Stop,
        linger: 0.0,
    }
}

/// A set of the given pages.
pub(super) fn pages(nr_pages: u64, members: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(nr_pages);
    members.into_iter().for_each(|page| assert!(set.insert(Pfn(page)) || set.contains(Pfn(page))));
    set
}

/// What the hypervisor holds since the last get-and-clear.
pub(super) struct DirtyLog(pub PageSet);

impl Peek for DirtyLog {
    fn peek(&mut self, first: Pfn, count: u64, into: &mut PageSet) {
        self.0.iter_from(first).take_while(|pfn| pfn.0 < first.0 + count).for_each(|pfn| {
            into.insert(pfn);
        });
    }
}

/// A guest, its dirty log, and what the destination has.
pub(super) struct Simulation {
    pub engine: Engine,
    pub link: Link,
    pub log: DirtyLog,
    pub now: Duration,
    /// Share of the guest's time that it stands still, in percent.
    throttle: u64,
    version: Vec<u32>,
    sent_version: Vec<Option<u32>>,
}

/// How a simulated migration went.
#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub reason: Option<StopReason>,
    pub total_s: f64,
    pub resend_ratio: f64,
    pub final_pages: u64,
    pub t_star: Option<TStar>,
}

impl Simulation {
    pub(super) fn new(kind: PolicyKind, config: Config, pages_per_s: f64) -> Self {
        Simulation {
            engine: Engine::new(kind, config),
            link: Link { pages_per_s, in_flight: 0, sent: 0 },
            log: DirtyLog(PageSet::empty(config.nr_pages)),
            now: Duration::ZERO,
            throttle: 0,
            version: vec![0; config.nr_pages as usize],
            sent_version: vec![None; config.nr_pages as usize],
        }
    }

    pub(super) fn write(&mut self, page: u64) {
        self.version[page as usize] += 1;
        self.log.0.insert(Pfn(page));
    }

    /// Get-and-clear.
    pub(super) fn sample(&mut self) {
        self.engine.on_sample(&Sample { at: self.now, dirty: &self.log.0 });
        self.log.0.clear();
        self.check_that_nothing_is_forgotten();
    }

    /// Get-and-clear while the link is held to its speed, so that the bound must hold.
    fn sample_within_bound(&mut self) {
        self.sample();
        let backlog = self.engine.pending().len();
        let bound = self.engine.working_set().bound(self.now, self.link.pages_per_s);
        assert!(bound <= backlog, "bound {bound} above the backlog {backlog} at {:?}", self.now);
    }

    /// One batch, sent at once.
    pub(super) fn batch(&mut self, max: usize) -> (Next, Vec<u64>) {
        let mut out = Vec::new();
        let next = self.engine.next_batch(self.now, max, &self.link, &mut self.log, &mut out);
        assert!(out.len() <= max);
        for pfn in &out {
            self.sent_version[pfn.index()] = Some(self.version[pfn.index()]);
        }
        self.link.sent += out.len() as u64;
        (next, out.iter().map(|pfn| pfn.0).collect())
    }

    /// Batches up to the end of the round or until there is nothing to do.
    pub(super) fn rest_of_round(&mut self) -> Vec<u64> {
        let mut sent = Vec::new();
        loop {
            match self.batch(1024) {
                (Next::Batch, batch) => sent.extend(batch),
                _ => return sent,
            }
        }
    }

    pub(super) fn verdict(&mut self) -> Verdict {
        self.engine.verdict(self.now, &self.link)
    }

    /// A page is pending, in the log, or was handed out after its last write.
    fn check_that_nothing_is_forgotten(&self) {
        for (page, version) in self.version.iter().enumerate() {
            let pfn = Pfn(page as u64);
            assert!(
                self.sent_version[page] == Some(*version)
                    || self.engine.pending().contains(pfn)
                    || self.log.0.contains(pfn),
                "page {pfn} is forgotten"
            );
        }
    }

    /// The verdict, carried out: why pre-copy ends, if it does.
    fn ends(&mut self) -> Option<StopReason> {
        match self.verdict() {
            Verdict::Continue => None,
            Verdict::Stop(reason) | Verdict::Abort(reason) => Some(reason),
            Verdict::Throttle(percent) => {
                self.throttle = percent.into();
                None
            }
        }
    }

    /// As [`Simulation::run_explained`], without the explanation.
    pub(super) fn run(self, workload: impl Iterator<Item = Vec<u64>>) -> Outcome {
        self.run_explained(workload).0
    }

    /// Runs until the engine stops or `workload`, which gives the pages written in each sample interval, ends. A guest
    /// that is slowed down does the first of its writes only.
    fn run_explained(mut self, workload: impl Iterator<Item = Vec<u64>>) -> (Outcome, Convergence) {
        let (mut credit, mut reason) = (0.0, None);
        let part_s = INTERVAL.as_secs_f64() / PARTS as f64;
        'migration: for mut writes in workload {
            writes.truncate(writes.len() * (100 - self.throttle as usize) / 100);
            for part in 0..PARTS {
                writes.iter().skip(part).step_by(PARTS).for_each(|page| self.write(*page));
                self.now += INTERVAL / PARTS as u32;
                credit += self.link.pages_per_s * part_s;
                while credit >= 1.0 {
                    let (next, batch) = self.batch((credit as usize).min(64));
                    credit -= batch.len() as f64;
                    match next {
                        Next::Batch => {}
                        Next::Idle => credit = 0.0,
                        Next::RoundEnd => {
                            self.sample_within_bound();
                            reason = self.ends();
                            if reason.is_some() {
                                break 'migration;
                            }
                        }
                    }
                }
            }
            self.sample_within_bound();
            reason = self.ends();
            if reason.is_some() {
                break;
            }
        }
        let mut left = self.engine.take_pending();
        left.union(&self.log.0);
        let budget = Duration::from_millis(300);
        let outcome = Outcome {
            reason,
            total_s: self.now.as_secs_f64() + left.len() as f64 / self.link.pages_per_s,
            resend_ratio: (self.link.sent + left.len()) as f64 / left.nr_pages() as f64,
            final_pages: left.len(),
            t_star: self.engine.working_set().t_star(self.link.pages_per_s, budget, 0),
        };
        (outcome, self.engine.convergence().clone())
    }
}

/// A small generator, so that workloads are the same in every run.
pub(super) struct Rng(pub u64);

impl Rng {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

const NR_PAGES: u64 = 4096;

/// A hot set, a sweep over a quarter of memory, and a skewed rest.
fn mixed(step: u64, rng: &mut Rng) -> Vec<u64> {
    let hot = (0..40).map(|n| n * 3);
    let front = 1024 + step * 9 % 1024;
    let mut writes: Vec<u64> = hot.chain(front..front + 9).collect();
    writes.extend((0..20).map(|_| {
        let depth = 1 + rng.below(2047);
        2048 + rng.below(depth)
    }));
    writes
}

fn run_mixed(kind: PolicyKind) -> Outcome {
    let mut rng = Rng(7);
    Simulation::new(kind, config(NR_PAGES), 1500.0).run((0..600).map(|step| mixed(step, &mut rng)))
}

#[test]
fn ranking_beats_rounds_on_a_mixed_workload() {
    let outcome = PolicyKind::ALL.map(run_mixed);
    let [xen, xen_skip, _, heat, ar] = &outcome;
    for ranked in [heat, ar] {
        assert_eq!(ranked.reason, Some(StopReason::WithinBudget));
        assert!(ranked.resend_ratio < xen_skip.resend_ratio && ranked.resend_ratio < xen.resend_ratio);
        assert!(ranked.total_s < xen.total_s, "{outcome:#?}");
        assert!(ranked.total_s < 1.5 * ranked.t_star.expect("the workload leaves room").total.as_secs_f64());
    }
}

#[test]
fn the_same_calls_give_the_same_answers() {
    for kind in PolicyKind::ALL {
        assert_eq!(run_mixed(kind), run_mixed(kind));
    }
}

#[test]
fn a_guest_that_writes_everything_is_stopped_below_the_cap() {
    for kind in [PolicyKind::Heat, PolicyKind::Ar] {
        let everything = (0..2000).map(|_| (0..NR_PAGES).collect());
        let outcome = Simulation::new(kind, config(NR_PAGES), 1500.0).run(everything);
        assert!(
            matches!(outcome.reason, Some(StopReason::DirtyCap | StopReason::NoBetterBacklog)),
            "{outcome:?}"
        );
        assert!(outcome.resend_ratio <= 2.2 && outcome.t_star.is_none());
    }
}

/// Random writes all over memory at twice the speed of the link, some of them to the same page.
fn storm() -> impl Iterator<Item = Vec<u64>> {
    let mut rng = Rng(11);
    (0..4000).map(move |_| (0..150).map(|_| rng.below(NR_PAGES)).collect())
}

fn run_storm(kind: PolicyKind, on_no_convergence: OnNoConvergence) -> (Outcome, Convergence) {
    let config = Config { on_no_convergence, max_time: Duration::from_secs(60), ..config(NR_PAGES) };
    Simulation::new(kind, config, 1500.0).run_explained(storm())
}

#[test]
fn a_storm_is_stopped_called_off_or_slowed_down_until_it_converges() {
    for kind in [PolicyKind::Heat, PolicyKind::Ar] {
        let (stopped, seen) = run_storm(kind, OnNoConvergence::Stop);
        assert!(stopped.final_pages > 450 && stopped.resend_ratio <= 2.2, "{stopped:?}");
        assert!(!seen.is_plain() && seen.throttle_steps.is_empty(), "{seen}");

        let (aborted, seen) = run_storm(kind, OnNoConvergence::Abort);
        assert!(
            matches!(
                aborted.reason,
                Some(StopReason::OutOfReach | StopReason::NoProgress | StopReason::DirtyCap)
            ),
            "{aborted:?}"
        );
        assert!(
            seen.decision.expect("it is decided").aborted && aborted.total_s <= stopped.total_s,
            "{seen}"
        );

        let (throttled, seen) = run_storm(kind, OnNoConvergence::Throttle);
        assert_eq!(throttled.reason, Some(StopReason::WithinBudget), "{seen}");
        assert!(throttled.final_pages <= 450 && seen.throttle_percent() >= 20, "{throttled:?}");
    }
}

#[test]
fn a_guest_that_converges_is_never_slowed_down_or_called_off() {
    for wanted in [OnNoConvergence::Abort, OnNoConvergence::Throttle] {
        for kind in [PolicyKind::Heat, PolicyKind::Ar] {
            let config = Config { on_no_convergence: wanted, ..config(NR_PAGES) };
            let mut rng = Rng(7);
            let workload = (0..600).map(|step| mixed(step, &mut rng));
            let (outcome, seen) = Simulation::new(kind, config, 1500.0).run_explained(workload);
            assert_eq!(outcome, run_mixed(kind));
            assert!(seen.is_plain() && seen.established_at.is_none(), "{seen}");
        }
    }
}

#[test]
fn every_policy_is_called_off_at_the_time_limit_if_so_wanted() {
    for kind in PolicyKind::ALL {
        let max_time = Duration::from_millis(400);
        let limited = Config { max_time, on_no_convergence: OnNoConvergence::Abort, ..config(NR_PAGES) };
        let mut rng = Rng(7);
        let workload = (0..600).map(|step| mixed(step, &mut rng));
        let (outcome, seen) = Simulation::new(kind, limited, 500.0).run_explained(workload);
        assert_eq!(outcome.reason, Some(StopReason::MaxTime), "{kind}");
        assert!(seen.decision.is_some_and(|decision| decision.aborted), "{kind}");
        assert!(seen.to_string().contains("not converged within 0.4 s (--max-time)"), "{seen}");
    }
}

#[test]
fn an_idle_guest_is_sent_once() {
    for kind in PolicyKind::ALL {
        let outcome = Simulation::new(kind, config(NR_PAGES), 1500.0).run((0..200).map(|_| Vec::new()));
        assert_eq!(outcome.resend_ratio, 1.0, "{kind}");
        assert!(outcome.reason.is_some());
    }
}

#[test]
fn every_policy_keeps_the_time_limit() {
    for kind in PolicyKind::ALL {
        let limited = Config { max_time: Duration::from_millis(400), ..config(NR_PAGES) };
        let mut rng = Rng(7);
        let outcome = Simulation::new(kind, limited, 500.0).run((0..600).map(|step| mixed(step, &mut rng)));
        assert_eq!(outcome.reason, Some(StopReason::MaxTime), "{kind}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_is_forgotten_and_the_bound_holds(
        kind in proptest::sample::select(PolicyKind::ALL.to_vec()),
        nr_pages in 1u64..1600,
        pages_per_s in 1.0f64..20_000.0,
        steps in proptest::collection::vec(proptest::collection::vec((0u64..1600, 1u64..200), 0..6), 0..60),
    ) {
        let runs = steps.into_iter().map(|runs| {
            runs.into_iter().flat_map(|(at, len)| at % nr_pages..(at % nr_pages + len).min(nr_pages)).collect()
        });
        Simulation::new(kind, config(nr_pages), pages_per_s).run(runs);
    }

    #[test]
    fn nothing_is_forgotten_whatever_is_asked_for_when(
        kind in proptest::sample::select(PolicyKind::ALL.to_vec()),
        steps in proptest::collection::vec((0u8..3, 0u64..1300, 0usize..300), 0..200),
    ) {
        let nr_pages = 1300;
        let mut simulation = Simulation::new(kind, config(nr_pages), 4e9);
        for (what, at, count) in steps {
            simulation.now += Duration::from_millis(1);
            match what {
                0 => (at..(at + count as u64).min(nr_pages)).for_each(|page| simulation.write(page)),
                1 => drop(simulation.batch(count)),
                _ => simulation.sample(),
            }
            simulation.check_that_nothing_is_forgotten();
        }
    }
}
