//! Replays as a table for people and as JSON lines for programs. docs/replay.md defines every column and field.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::trace::trials::Trial;

/// One replay as a JSON object.
#[derive(Serialize)]
pub struct Line<'a> {
    trace: &'a str,
    policy: &'a str,
    stop: String,
    shuffle: Option<u64>,
    base_s: f64,
    budget_s: f64,
    start_round: usize,
    pages: u64,
    rounds_missed: u64,
    t_star_s: Option<f64>,
    t_star_rounds: Option<usize>,
    feasible: bool,
    tmt_s: f64,
    rho: f64,
    downtime_s: f64,
    converged: bool,
    aborted: bool,
    stop_round: usize,
    stop_reason: Option<String>,
    pages_sent: u64,
    backlog_pages: u64,
    policy_backlog_pages: u64,
    pages_wasted: u64,
    state_bytes: usize,
    forecast_ns_per_dirty_page: Option<f64>,
}

impl<'a> Line<'a> {
    /// The line of `trial`.
    pub fn of(trial: &'a Trial) -> Self {
        let outcome = &trial.outcome;
        Line {
            trace: &trial.trace,
            policy: &trial.contender.word,
            stop: trial.contender.stop.to_string(),
            shuffle: trial.order.seed(),
            base_s: trial.base_s,
            budget_s: trial.budget_s,
            start_round: trial.start_round,
            pages: trial.pages,
            rounds_missed: trial.rounds_missed,
            t_star_s: trial.t_star.map(|bound| bound.total_s),
            t_star_rounds: trial.t_star.map(|bound| bound.rounds),
            feasible: trial.feasible(),
            tmt_s: outcome.tmt_s,
            rho: trial.rho(),
            downtime_s: outcome.downtime_s,
            converged: trial.converged(),
            aborted: outcome.aborted,
            stop_round: outcome.stop_round,
            stop_reason: outcome.reason.map(|reason| reason.to_string()),
            pages_sent: outcome.sent,
            backlog_pages: outcome.backlog,
            policy_backlog_pages: outcome.policy_backlog,
            pages_wasted: trial.pages_wasted(),
            state_bytes: outcome.state_bytes,
            forecast_ns_per_dirty_page: trial.forecast_ns_per_dirty_page(),
        }
    }

    /// As text, without a line break.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings, numbers and truth values can always be written")
    }
}

/// All replays side by side.
pub fn table(trials: &[&Trial]) -> String {
    let shuffled = trials.iter().any(|trial| trial.order.seed().is_some());
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let mut header =
        vec!["trace", "base s", "budget ms", "start", "policy", "TMT s", "T* s", "TMT/T*", "rho"];
    header.extend(["downtime ms", "wasted", "ns/page", "stopped because"]);
    if shuffled {
        header.insert(1, "shuffle");
    }
    let columns = header.len();
    table.set_header(header);
    let mut last = None;
    for trial in trials {
        if last.is_some_and(|pair| pair != trial.pair) {
            table.add_row([""]);
        }
        last = Some(trial.pair);
        let mut row = row(trial);
        if shuffled {
            row.insert(1, trial.order.to_string());
        }
        table.add_row(row);
    }
    for column in (1..columns - 1).filter(|column| *column != if shuffled { 5 } else { 4 }) {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}

fn row(trial: &Trial) -> Vec<String> {
    let outcome = &trial.outcome;
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let over = if trial.converged() { "" } else { " !" };
    vec![
        trial.trace.clone(),
        format!("{:.2}", trial.base_s),
        format!("{:.0}", trial.budget_s * 1e3),
        trial.start_round.to_string(),
        trial.contender.word.clone(),
        format!("{:.3}", outcome.tmt_s),
        or_dash(trial.t_star.map(|bound| format!("{:.3}", bound.total_s))),
        or_dash(trial.over_t_star().map(|over| format!("{over:.3}"))),
        format!("{:.3}", trial.rho()),
        format!("{:.1}{over}", outcome.downtime_s * 1e3),
        trial.pages_wasted().to_string(),
        or_dash(trial.forecast_ns_per_dirty_page().map(|ns| format!("{ns:.0}"))),
        outcome.reason.map_or_else(|| "the trace ended".to_owned(), |reason| reason.to_string()),
    ]
}
