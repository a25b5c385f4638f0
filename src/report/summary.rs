//! What many replays say of each policy, in a table that decides between policies. docs/replay.md defines every figure.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::trace::contender::Contender;
use crate::trace::trials::Trial;

/// A pair is tractable if it is feasible and the yardstick needs at most this multiple of T*.
const TRACTABLE_T_STARS: f64 = 2.0;

/// One policy over all pairs.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The policy as the user wrote it.
    pub policy: String,
    /// Over the pairs whose T* exists and is at most twice the base time.
    pub feasible: Reachable,
    /// Over those of them in which `xen-skip:budget` needs at most twice T*; none if it was not replayed.
    pub tractable: Option<Reachable>,
    /// Over the other pairs.
    pub infeasible: OutOfReach,
}

/// Figures over pairs whose budget is in reach.
#[derive(Clone, Debug, Serialize)]
pub struct Reachable {
    /// How many pairs.
    pub pairs: usize,
    /// Geometric mean of TMT/T*; a replay that its trace's end cut off counts with the time up to there.
    pub tmt_over_t_star: Option<f64>,
    /// Geometric mean of rho.
    pub rho: Option<f64>,
    /// Replays that stopped within the budget.
    pub within_budget: usize,
    /// Replays that the end of the trace cut off.
    pub cut_off: usize,
    /// Replays that the policy called off. They have no total time and are in none of the means.
    pub called_off: usize,
    /// Geometric mean of TMT over that of `xen-skip:budget`; none if that was not replayed.
    pub tmt_over_xen_skip: Option<f64>,
    /// The pair in which that is highest.
    pub worst_over_xen_skip: Option<Worst>,
}

/// Figures over pairs whose budget is out of reach, or nearly.
#[derive(Clone, Debug, Serialize)]
pub struct OutOfReach {
    /// How many pairs.
    pub pairs: usize,
    /// Arithmetic mean of rho.
    pub rho_mean: Option<f64>,
    /// The highest rho.
    pub rho_max: Option<f64>,
    /// Replays that the policy called off, which are in none of the figures.
    pub called_off: usize,
    /// Pairs that have no T* at all.
    pub without_t_star: usize,
    /// In those, the geometric mean of the downtime over that of `xen:own`; none if that was not replayed.
    pub downtime_over_xen: Option<f64>,
    /// The pair in which that is highest.
    pub worst_downtime_over_xen: Option<Worst>,
}

/// A ratio and where it was found.
#[derive(Clone, Debug, Serialize)]
pub struct Worst {
    /// The ratio.
    pub ratio: f64,
    /// The pair.
    pub trace: String,
    /// The seed, if chunks were shuffled.
    pub shuffle: Option<u64>,
    /// Seconds.
    pub base_s: f64,
    /// Seconds.
    pub budget_s: f64,
    /// Round of the trace.
    pub start_round: usize,
}

/// The summary of each of `contenders` over trials that stand in the order of [`crate::trace::trials`].
pub fn summarise(trials: &[Trial], contenders: &[Contender]) -> Vec<Summary> {
    let pairs: Vec<&[Trial]> = trials.chunk_by(|one, other| one.pair == other.pair).collect();
    let summary = |contender: &Contender| {
        let mut feasible = Ratios::default();
        let (mut tractable, mut infeasible) = (Ratios::default(), Infeasible::default());
        for pair in &pairs {
            let Some(trial) = find(pair, contender) else { continue };
            let yardstick = find(pair, &Contender::yardstick());
            if !trial.feasible() {
                infeasible.add(trial, find(pair, &Contender::stock_xen()));
                continue;
            }
            feasible.add(trial, yardstick);
            if yardstick.is_some_and(tractable_by) {
                tractable.add(trial, yardstick);
            }
        }
        let yardstick = trials.iter().any(|trial| trial.contender.same_as(&Contender::yardstick()));
        Summary {
            policy: contender.word.clone(),
            feasible: feasible.summary(),
            tractable: yardstick.then(|| tractable.summary()),
            infeasible: infeasible.summary(),
        }
    };
    contenders.iter().map(summary).collect()
}

fn find<'a>(pair: &'a [Trial], contender: &Contender) -> Option<&'a Trial> {
    pair.iter().find(|trial| trial.contender.same_as(contender))
}

/// Whether the yardstick's replay makes its pair tractable. One that was cut off needs more than its trace can tell.
fn tractable_by(yardstick: &Trial) -> bool {
    yardstick.outcome.reason.is_some()
        && !yardstick.outcome.aborted
        && yardstick.over_t_star().is_some_and(|over| over <= TRACTABLE_T_STARS)
}

#[derive(Default)]
struct Ratios {
    over_t_star: Vec<f64>,
    rho: Vec<f64>,
    pairs: usize,
    within_budget: usize,
    cut_off: usize,
    called_off: usize,
    over_xen_skip: Vec<f64>,
    worst: Option<Worst>,
}

impl Ratios {
    fn add(&mut self, trial: &Trial, yardstick: Option<&Trial>) {
        self.pairs += 1;
        if trial.outcome.aborted {
            self.called_off += 1;
            return;
        }
        self.over_t_star.extend(trial.over_t_star());
        self.rho.push(trial.rho());
        self.within_budget += usize::from(trial.converged());
        self.cut_off += usize::from(trial.outcome.reason.is_none());
        if let Some(yardstick) = yardstick.filter(|yardstick| !yardstick.outcome.aborted) {
            let ratio = trial.outcome.tmt_s / yardstick.outcome.tmt_s;
            self.over_xen_skip.push(ratio);
            Worst::take(&mut self.worst, ratio, trial);
        }
    }

    fn summary(self) -> Reachable {
        Reachable {
            pairs: self.pairs,
            tmt_over_t_star: geometric_mean(&self.over_t_star),
            rho: geometric_mean(&self.rho),
            within_budget: self.within_budget,
            cut_off: self.cut_off,
            called_off: self.called_off,
            tmt_over_xen_skip: geometric_mean(&self.over_xen_skip),
            worst_over_xen_skip: self.worst,
        }
    }
}

#[derive(Default)]
struct Infeasible {
    pairs: usize,
    called_off: usize,
    rho: Vec<f64>,
    without_t_star: usize,
    downtime: Vec<f64>,
    worst: Option<Worst>,
}

impl Infeasible {
    fn add(&mut self, trial: &Trial, xen: Option<&Trial>) {
        self.pairs += 1;
        self.without_t_star += usize::from(trial.t_star.is_none());
        if trial.outcome.aborted {
            self.called_off += 1;
            return;
        }
        self.rho.push(trial.rho());
        if trial.t_star.is_some() {
            return;
        }
        // Where no T* exists every stop leaves more than the budget, so that no downtime is 0.
        if let Some(xen) = xen.filter(|xen| !xen.outcome.aborted) {
            let ratio = trial.outcome.downtime_s / xen.outcome.downtime_s;
            self.downtime.push(ratio);
            Worst::take(&mut self.worst, ratio, trial);
        }
    }

    fn summary(self) -> OutOfReach {
        let count = self.rho.len();
        OutOfReach {
            pairs: self.pairs,
            called_off: self.called_off,
            rho_mean: (count > 0).then(|| self.rho.iter().sum::<f64>() / count as f64),
            rho_max: self.rho.iter().copied().reduce(f64::max),
            without_t_star: self.without_t_star,
            downtime_over_xen: geometric_mean(&self.downtime),
            worst_downtime_over_xen: self.worst,
        }
    }
}

impl Worst {
    fn take(worst: &mut Option<Worst>, ratio: f64, trial: &Trial) {
        if worst.as_ref().is_none_or(|worst| ratio > worst.ratio) {
            *worst = Some(Worst {
                ratio,
                trace: trial.trace.clone(),
                shuffle: trial.order.seed(),
                base_s: trial.base_s,
                budget_s: trial.budget_s,
                start_round: trial.start_round,
            });
        }
    }

    fn place(&self) -> String {
        let shuffle = self.shuffle.map_or_else(String::new, |seed| format!(" shuffle {seed}"));
        format!("{}{shuffle} base {:.2} s start {}", self.trace, self.base_s, self.start_round)
    }
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    let logarithms: f64 = values.iter().map(|value| value.ln()).sum();
    (!values.is_empty()).then(|| (logarithms / values.len() as f64).exp())
}

/// All of it for people.
pub fn table(summaries: &[Summary]) -> String {
    let Some(first) = summaries.first() else { return String::new() };
    let mut parts = Vec::new();
    if first.feasible.pairs > 0 {
        let pairs = first.feasible.pairs;
        parts.push(format!("feasible: the {pairs} pairs with T* within 2 base; geometric means\n{}", {
            reachable(summaries, |summary| Some(&summary.feasible))
        }));
    }
    if let Some(tractable) = first.tractable.as_ref().filter(|tractable| tractable.pairs > 0) {
        parts.push(format!(
            "tractable: the {} of these in which xen-skip:budget needs at most 2 T*\n{}",
            tractable.pairs,
            reachable(summaries, |summary| summary.tractable.as_ref())
        ));
    }
    if first.infeasible.pairs > 0 {
        parts.push(format!(
            "the other {} pairs, of which {} have no T*; downtimes are of these\n{}",
            first.infeasible.pairs,
            first.infeasible.without_t_star,
            out_of_reach(summaries)
        ));
    }
    parts.join("\n")
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"))
}

fn ratio_and_place(worst: Option<&Worst>) -> [String; 2] {
    [number(worst.map(|worst| worst.ratio)), worst.map_or_else(String::new, Worst::place)]
}

fn reachable(summaries: &[Summary], of: impl Fn(&Summary) -> Option<&Reachable>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "policy",
        "TMT/T*",
        "rho",
        "within budget",
        "cut off",
        "called off",
        "TMT/xen-skip",
        "at worst",
        "where",
    ]);
    for summary in summaries {
        let Some(figures) = of(summary) else { continue };
        let mut row = vec![
            summary.policy.clone(),
            number(figures.tmt_over_t_star),
            number(figures.rho),
            figures.within_budget.to_string(),
            figures.cut_off.to_string(),
            figures.called_off.to_string(),
            number(figures.tmt_over_xen_skip),
        ];
        row.extend(ratio_and_place(figures.worst_over_xen_skip.as_ref()));
        table.add_row(row);
    }
    aligned(table, 1..8)
}

fn out_of_reach(summaries: &[Summary]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "policy",
        "mean rho",
        "highest rho",
        "called off",
        "downtime/xen",
        "at worst",
        "where",
    ]);
    for summary in summaries {
        let figures = &summary.infeasible;
        let mut row = vec![
            summary.policy.clone(),
            number(figures.rho_mean),
            number(figures.rho_max),
            figures.called_off.to_string(),
            number(figures.downtime_over_xen),
        ];
        row.extend(ratio_and_place(figures.worst_downtime_over_xen.as_ref()));
        table.add_row(row);
    }
    aligned(table, 1..6)
}

fn aligned(mut table: Table, right: std::ops::Range<usize>) -> String {
    for column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::{Config, Convergence, OnNoConvergence, StopReason};
    use crate::trace::clairvoyant::Earliest;
    use crate::trace::replay::Outcome;
    use crate::trace::shuffle::Order;
    use std::time::Duration;

    fn trial(pair: usize, word: &str, t_star_s: Option<f64>, tmt_s: f64, sent: u64) -> Trial {
        Trial {
            pair,
            trace: format!("trace-{pair}"),
            order: Order::Recorded,
            base_s: 1.0,
            budget_s: 0.3,
            start_round: 5,
            pages: 100,
            rounds: 20,
            rounds_missed: 0,
            contender: word.parse().unwrap(),
            t_star: t_star_s.map(|total_s| Earliest { rounds: 0, backlog: 0.0, total_s }),
            outcome: Outcome {
                stop_round: 0,
                aborted: false,
                convergence: Convergence::new(Config {
                    nr_pages: 100,
                    pages: 100,
                    downtime_budget: Duration::from_millis(300),
                    sample_interval: Duration::from_millis(50),
                    max_time: Duration::MAX,
                    fixed_downtime: Duration::ZERO,
                    on_no_convergence: OnNoConvergence::Stop,
                    linger: 0.0,
                }),
                reason: (tmt_s < 9.0).then_some(StopReason::WithinBudget),
                sent,
                backlog: 0,
                policy_backlog: 0,
                tmt_s,
                downtime_s: tmt_s / 10.0,
                converged: tmt_s < 9.0,
                dirty_pages: 0,
                forecast_time: Duration::ZERO,
                state_bytes: 0,
            },
        }
    }

    #[test]
    fn each_figure_is_over_its_own_pairs() {
        let trials = [
            trial(0, "xen", Some(1.0), 1.5, 150),
            trial(0, "xen-skip", Some(1.0), 1.0, 110),
            trial(0, "ar", Some(1.0), 2.0, 200),
            trial(1, "xen", Some(1.0), 9.0, 900),
            trial(1, "xen-skip", Some(1.0), 9.0, 900),
            trial(1, "ar", Some(1.0), 4.5, 800),
            trial(2, "xen", Some(3.0), 6.0, 600),
            trial(2, "xen-skip", Some(3.0), 6.0, 600),
            trial(2, "ar", Some(3.0), 6.0, 300),
            trial(3, "xen", None, 8.0, 600),
            trial(3, "xen-skip", None, 9.0, 600),
            trial(3, "ar", None, 4.0, 200),
        ];
        let contenders: Vec<Contender> = ["ar", "xen"].map(|word| word.parse().unwrap()).into();
        let summaries = summarise(&trials, &contenders);
        let ar = &summaries[0];
        assert_eq!((ar.policy.as_str(), ar.feasible.pairs, ar.feasible.within_budget), ("ar", 2, 2));
        assert!((ar.feasible.tmt_over_t_star.unwrap() - 3.0).abs() < 1e-9, "of 2 and 4.5");
        assert!((ar.feasible.rho.unwrap() - 4.0).abs() < 1e-9, "of 2 and 8");
        let worst = ar.feasible.worst_over_xen_skip.as_ref().unwrap();
        assert_eq!((worst.ratio, worst.trace.as_str()), (2.0, "trace-0"));
        let tractable = ar.tractable.as_ref().unwrap();
        assert_eq!(
            (tractable.pairs, tractable.tmt_over_t_star),
            (1, Some(2.0)),
            "xen-skip was cut off in pair 1"
        );
        assert_eq!((ar.infeasible.pairs, ar.infeasible.without_t_star), (2, 1));
        assert_eq!((ar.infeasible.rho_mean, ar.infeasible.rho_max), (Some(2.5), Some(3.0)));
        assert!((ar.infeasible.downtime_over_xen.unwrap() - 0.5).abs() < 1e-9);
        assert_eq!((summaries[1].feasible.cut_off, summaries[1].feasible.within_budget), (1, 1));
        assert!(table(&summaries).contains("tractable: the 1 of these"));
    }

    #[test]
    fn a_migration_that_was_called_off_is_counted_and_in_no_mean() {
        let called_off = |mut trial: Trial| {
            (trial.outcome.aborted, trial.outcome.converged) = (true, false);
            (trial.outcome.downtime_s, trial.outcome.backlog) = (0.0, 90);
            trial
        };
        let trials = [
            trial(0, "xen", Some(1.0), 1.5, 150),
            called_off(trial(0, "ar", Some(1.0), 0.5, 50)),
            trial(1, "xen", Some(1.0), 1.5, 150),
            trial(1, "ar", Some(1.0), 2.0, 200),
            trial(2, "xen", None, 1.5, 150),
            called_off(trial(2, "ar", None, 0.5, 50)),
        ];
        let ar = &summarise(&trials, &["ar".parse().unwrap()])[0];
        assert_eq!((ar.feasible.pairs, ar.feasible.called_off, ar.feasible.within_budget), (2, 1, 1));
        assert_eq!((ar.feasible.tmt_over_t_star, ar.feasible.rho), (Some(2.0), Some(2.0)));
        assert_eq!((ar.infeasible.pairs, ar.infeasible.called_off), (1, 1));
        assert_eq!((ar.infeasible.rho_max, ar.infeasible.downtime_over_xen), (None, None));
        assert_eq!(
            (trials[1].transmissions(), trials[1].pages_wasted()),
            (50, 50),
            "nothing has come of them"
        );
    }

    #[test]
    fn without_the_yardstick_nothing_is_compared_with_it() {
        let trials = [trial(0, "ar", Some(1.0), 2.0, 200)];
        let summaries = summarise(&trials, &["ar".parse().unwrap()]);
        assert!(summaries[0].tractable.is_none() && summaries[0].feasible.tmt_over_xen_skip.is_none());
        assert!(!table(&summaries).contains("tractable"));
    }
}
