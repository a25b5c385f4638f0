//! Many replays: every policy over every trace, order, link, budget and start, on all cores.
//!
//! Trials are numbered trace by trace and, within a trace, with the policy changing fastest, so that those of one pair (trace,
//! order, link, budget, start) stand together. They are handed over in that order, however they were run. A trace is
//! loaded once, when the first trial needs it, and let go after the last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

use super::clairvoyant::{Earliest, earliest};
use super::contender::Contender;
use super::format::{Trace, TraceError};
use super::replay::{Observer, Outcome, Setting, Unobserved, replay};
use super::shuffle::{Order, Shuffle};
use crate::forecast::OnNoConvergence;

/// A pair is feasible if T* exists and is at most this multiple of the base time.
pub const FEASIBLE_BASES: f64 = 2.0;

/// How fast the link is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LinkSpeed {
    /// It sends every page once in this time, in seconds.
    Base(f64),
    /// It carries so many pages a second.
    PagesPerS(f64),
}

impl LinkSpeed {
    /// Pages a second, with a guest of `nr_pages`.
    pub fn pages_per_s(self, nr_pages: u64) -> f64 {
        match self {
            LinkSpeed::Base(seconds) => nr_pages as f64 / seconds,
            LinkSpeed::PagesPerS(pages) => pages,
        }
    }

    /// Seconds to send each of `nr_pages` once.
    pub fn base_s(self, nr_pages: u64) -> f64 {
        match self {
            LinkSpeed::Base(seconds) => seconds,
            LinkSpeed::PagesPerS(pages) => nr_pages as f64 / pages,
        }
    }
}

/// Where in a trace a migration begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At this round.
    Round(usize),
    /// After `part / whole` of the rounds, rounded down; below 1.
    Fraction {
        /// So many parts.
        part: u32,
        /// Of so many.
        whole: u32,
    },
}

impl Start {
    /// The round, of a trace at `path`.
    pub fn round(self, path: &Path, trace: &Trace) -> Result<usize, TrialError> {
        let nr_rounds = trace.rounds().len();
        let round = match self {
            Start::Round(round) => round,
            Start::Fraction { part, whole } => {
                (nr_rounds as u128 * u128::from(part) / u128::from(whole)) as usize
            }
        };
        if round < nr_rounds {
            Ok(round)
        } else {
            Err(TrialError::NoSuchRound { path: path.to_owned(), round, nr_rounds })
        }
    }
}

/// What to replay: every combination.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Trace files.
    pub traces: Vec<PathBuf>,
    /// Orders of their chunks.
    pub orders: Vec<Order>,
    /// Links.
    pub links: Vec<LinkSpeed>,
    /// Downtime budgets in seconds.
    pub budgets_s: Vec<f64>,
    /// Where to begin.
    pub starts: Vec<Start>,
    /// Policies with their stop rules.
    pub contenders: Vec<Contender>,
    /// After this time every policy stops, in seconds.
    pub max_time_s: f64,
    /// What a policy does that finds that it cannot converge; a trace cannot be throttled.
    pub on_no_convergence: OnNoConvergence,
}

impl Plan {
    /// How many replays it is.
    pub fn trials(&self) -> usize {
        self.traces.len() * self.orders.len() * self.pairs() * self.contenders.len()
    }

    /// Whether each trace can be opened, before any work is done for the others.
    pub fn look_for_traces(&self) -> Result<(), TrialError> {
        Ok(self.traces.iter().try_for_each(|path| Trace::look_for(path))?)
    }

    /// Pairs of a trace in one order.
    fn pairs(&self) -> usize {
        self.links.len() * self.budgets_s.len() * self.starts.len()
    }
}

/// Why trials cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// A trace cannot be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A start that a trace does not have.
    #[error("{} has the rounds 0 to {}, so that no migration can begin at {round}; give another start", path.display(), nr_rounds - 1)]
    NoSuchRound {
        /// The trace file.
        path: PathBuf,
        /// The start asked for.
        round: usize,
        /// Rounds of the trace.
        nr_rounds: usize,
    },
}

/// One replay and what came of it.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Number of its pair; trials with the same number differ in the policy alone.
    pub pair: usize,
    /// The trace file's name without folder and extensions.
    pub trace: String,
    /// Order of the chunks.
    pub order: Order,
    /// Time to send every page once, in seconds.
    pub base_s: f64,
    /// Downtime budget in seconds.
    pub budget_s: f64,
    /// The round of the trace in which it begins.
    pub start_round: usize,
    /// Pages of the trace's id space.
    pub pages: u64,
    /// Rounds of the trace.
    pub rounds: usize,
    /// Rounds that the trace lacks, by its clock.
    pub rounds_missed: u64,
    /// The policy.
    pub contender: Contender,
    /// What a sender with foresight could have done; none if the trace ends before it.
    pub t_star: Option<Earliest>,
    /// What the policy did.
    pub outcome: Outcome,
}

impl Trial {
    /// Transmissions, those of the stop phase included; there is none if the migration was called off.
    pub fn transmissions(&self) -> u64 {
        self.outcome.sent + if self.outcome.aborted { 0 } else { self.outcome.backlog }
    }

    /// Transmissions for each page of the guest.
    pub fn rho(&self) -> f64 {
        self.transmissions() as f64 / self.pages as f64
    }

    /// Transmissions that a later write made useless; all of them if the migration was called off. A run that its trace's end
    /// cut off has not sent every page yet, but its backlog holds what is missing.
    pub fn pages_wasted(&self) -> u64 {
        let useful = if self.outcome.aborted { 0 } else { self.pages };
        self.transmissions().saturating_sub(useful)
    }

    /// Whether it stopped by itself, within the budget.
    pub fn converged(&self) -> bool {
        self.outcome.converged && self.outcome.reason.is_some()
    }

    /// Whether T* exists and is no longer than [`FEASIBLE_BASES`].
    pub fn feasible(&self) -> bool {
        self.t_star.is_some_and(|bound| bound.total_s <= FEASIBLE_BASES * self.base_s)
    }

    /// Total time over the least possible; none if the migration was called off.
    pub fn over_t_star(&self) -> Option<f64> {
        let bound = self.t_star.filter(|_| !self.outcome.aborted);
        bound.map(|bound| self.outcome.tmt_s / bound.total_s)
    }

    /// What the forecast cost for each page of a dirty set.
    pub fn forecast_ns_per_dirty_page(&self) -> Option<f64> {
        let pages = self.outcome.dirty_pages;
        (pages > 0).then(|| self.outcome.forecast_time.as_nanos() as f64 / pages as f64)
    }
}

/// Hears of trials.
pub trait Audience {
    /// One more is done, in whatever order.
    fn one_done(&mut self) {}

    /// The next one in order.
    fn next(&mut self, _trial: &Trial) {}
}

/// Runs all of them on `threads` threads and returns them in order.
pub fn run(plan: &Plan, threads: usize, audience: &mut dyn Audience) -> Result<Vec<Trial>, TrialError> {
    let total = plan.trials();
    let shelf = Shelf::new(plan);
    let (shelf, next) = (&shelf, &AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let (send, results) = mpsc::channel();
        for _ in 0..threads.clamp(1, total.max(1)) {
            let send = send.clone();
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= total || send.send((number, shelf.trial(number))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        let (mut early, mut done) = (BTreeMap::new(), Vec::with_capacity(total));
        for (number, result) in results {
            let trial = result.inspect_err(|_| next.store(total, Ordering::Relaxed))?;
            audience.one_done();
            early.insert(number, trial);
            while let Some(trial) = early.remove(&done.len()) {
                audience.next(&trial);
                done.push(trial);
            }
        }
        Ok(done)
    })
}

/// Runs a plan of a single trial while an observer looks on. What it sees are pages of the shuffled trace; the observer is
/// made with the way back.
pub fn run_one<O: Observer>(
    plan: &Plan,
    observer: impl FnOnce(&Trace, &Shuffle) -> O,
) -> Result<(Trial, O), TrialError> {
    assert_eq!(plan.trials(), 1, "one trial was to be observed");
    let shelf = Shelf::new(plan);
    let place = shelf.place(0);
    let (trace, shuffle) = shelf.shuffled(&place)?;
    let setting = shelf.setting(&place, &trace)?;
    let mut observer = observer(&trace, &shuffle);
    let outcome = replay(&trace, &setting, &mut observer);
    Ok((shelf.label(&place, &trace, &setting, outcome), observer))
}

/// Something that many need, made by the first who asks and let go after the last.
struct Shared<T> {
    value: Mutex<Option<Arc<T>>>,
    uses_left: AtomicUsize,
}

impl<T> Shared<T> {
    fn new(uses: usize) -> Self {
        Shared { value: Mutex::new(None), uses_left: AtomicUsize::new(uses) }
    }

    fn take<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = match &*value {
            Some(shared) => shared.clone(),
            None => Arc::new(make()?),
        };
        let last = self.uses_left.fetch_sub(1, Ordering::Relaxed) == 1;
        *value = (!last).then(|| shared.clone());
        Ok(shared)
    }
}

/// A trial's place in the plan.
#[derive(Clone, Copy)]
struct Place {
    trace: usize,
    order: usize,
    link: usize,
    budget: usize,
    start: usize,
    contender: usize,
    pair: usize,
    /// The pair among those of its trace and order: T* does not depend on the order.
    bound: usize,
}

struct Shelf<'a> {
    plan: &'a Plan,
    recorded: Vec<Shared<Trace>>,
    shuffled: Vec<Shared<(Arc<Trace>, Shuffle)>>,
    bounds: Vec<OnceLock<Option<Earliest>>>,
}

impl<'a> Shelf<'a> {
    fn new(plan: &'a Plan) -> Self {
        let (traces, orders) = (plan.traces.len(), plan.orders.len());
        let uses = plan.pairs() * plan.contenders.len();
        Shelf {
            plan,
            recorded: (0..traces).map(|_| Shared::new(orders)).collect(),
            shuffled: (0..traces * orders).map(|_| Shared::new(uses)).collect(),
            bounds: (0..traces * plan.pairs()).map(|_| OnceLock::new()).collect(),
        }
    }

    fn place(&self, number: usize) -> Place {
        let mut rest = number;
        let mut digit = |base: usize| {
            let digit = rest % base;
            rest /= base;
            digit
        };
        let plan = self.plan;
        let contender = digit(plan.contenders.len());
        let (start, budget) = (digit(plan.starts.len()), digit(plan.budgets_s.len()));
        let (link, order) = (digit(plan.links.len()), digit(plan.orders.len()));
        let trace = rest;
        let pair = number / plan.contenders.len();
        let bound = trace * plan.pairs() + pair % plan.pairs();
        Place { trace, order, link, budget, start, contender, pair, bound }
    }

    fn shuffled(&self, place: &Place) -> Result<(Arc<Trace>, Shuffle), TraceError> {
        let shared = self.shuffled[place.trace * self.plan.orders.len() + place.order].take(|| {
            let recorded = self.recorded[place.trace].take(|| Trace::open(&self.plan.traces[place.trace]))?;
            let order = self.plan.orders[place.order];
            let shuffle = Shuffle::new(order, recorded.va_chunks.len());
            let trace = match order {
                Order::Recorded => recorded,
                Order::Shuffled(_) => Arc::new(shuffle.apply(&recorded)),
            };
            Ok::<_, TraceError>((trace, shuffle))
        })?;
        Ok((*shared).clone())
    }

    fn setting(&self, place: &Place, trace: &Trace) -> Result<Setting, TrialError> {
        let start = self.plan.starts[place.start].round(&self.plan.traces[place.trace], trace)?;
        let contender = &self.plan.contenders[place.contender];
        let pages_per_s = self.plan.links[place.link].pages_per_s(trace.nr_pages());
        Ok(Setting {
            policy: contender.policy,
            stop: contender.stop,
            start,
            pages_per_round: pages_per_s * trace.period_s(),
            budget_s: self.plan.budgets_s[place.budget],
            max_time_s: self.plan.max_time_s,
            on_no_convergence: self.plan.on_no_convergence,
        })
    }

    fn trial(&self, number: usize) -> Result<Trial, TrialError> {
        let place = self.place(number);
        let (trace, _) = self.shuffled(&place)?;
        let setting = self.setting(&place, &trace)?;
        let outcome = replay(&trace, &setting, &mut Unobserved);
        Ok(self.label(&place, &trace, &setting, outcome))
    }

    fn label(&self, place: &Place, trace: &Trace, setting: &Setting, outcome: Outcome) -> Trial {
        let pages_per_s = setting.pages_per_round / trace.period_s();
        let t_star = *self.bounds[place.bound].get_or_init(|| {
            earliest(trace, setting.start, setting.pages_per_round, setting.budget_s * pages_per_s)
        });
        Trial {
            pair: place.pair,
            trace: name_of(&self.plan.traces[place.trace]),
            order: self.plan.orders[place.order],
            base_s: self.plan.links[place.link].base_s(trace.nr_pages()),
            budget_s: setting.budget_s,
            start_round: setting.start,
            pages: trace.nr_pages(),
            rounds: trace.rounds().len(),
            rounds_missed: trace.rounds_missed(),
            contender: self.plan.contenders[place.contender].clone(),
            t_star,
            outcome,
        }
    }
}

/// A trace file's name without folder and extensions.
pub fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    name.trim_end_matches(".zst").trim_end_matches(".pct").to_owned()
}
