//! What the clairvoyant bound of a trace says, as text and as JSON. docs/replay.md defines every figure.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::trace::clairvoyant::Survey;
use crate::trace::trials::FEASIBLE_BASES;

/// The bound of one trace, link, budget and start.
#[derive(Clone, Debug, Serialize)]
pub struct Bound {
    /// The trace file's name without folder and extensions.
    pub trace: String,
    /// Time to send every page once.
    pub base_s: f64,
    /// Downtime budget.
    pub budget_s: f64,
    /// The round of the trace in which the migration begins.
    pub start_round: usize,
    /// Pages of the id space.
    pub pages: u64,
    /// Rounds that the trace lacks, by its clock.
    pub rounds_missed: u64,
    /// T*; null if the trace ends before it.
    pub t_star_s: Option<f64>,
    /// Rounds from the start to that stop.
    pub t_star_rounds: Option<usize>,
    /// The least downtime of all stops to the end of the trace.
    pub least_downtime_s: f64,
    /// The slowest link, by its base time and to within 2 %, that has a T*; only where this one has none.
    pub needed_base_s: Option<f64>,
    /// Whether T* exists and is within twice the base time.
    pub feasible: bool,
}

impl Bound {
    /// What it comes down to.
    pub fn verdict(&self) -> String {
        match (self.t_star_s, self.needed_base_s) {
            (Some(t_star_s), _) if self.feasible => {
                format!("can converge: T* {t_star_s:.3} s, {:.2} base", t_star_s / self.base_s)
            }
            (Some(t_star_s), _) => {
                format!(
                    "hardly: T* {t_star_s:.3} s is {:.2} base, beyond {FEASIBLE_BASES}",
                    t_star_s / self.base_s
                )
            }
            (None, needed) => {
                let least = format!("cannot: at best {:.0} ms of downtime", self.least_downtime_s * 1e3);
                match needed {
                    Some(base_s) => format!("{least}; a link of base {base_s:.2} s could"),
                    None => format!("{least}; no faster link helps"),
                }
            }
        }
    }
}

/// A row for each.
pub fn table(bounds: &[Bound]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "trace",
        "pages",
        "base s",
        "budget ms",
        "start",
        "T* s",
        "least downtime ms",
        "pre-copy within the budget",
    ]);
    for bound in bounds {
        table.add_row([
            bound.trace.clone(),
            bound.pages.to_string(),
            format!("{:.2}", bound.base_s),
            format!("{:.0}", bound.budget_s * 1e3),
            bound.start_round.to_string(),
            bound.t_star_s.map_or_else(|| "-".to_owned(), |t_star_s| format!("{t_star_s:.3}")),
            format!("{:.1}", bound.least_downtime_s * 1e3),
            bound.verdict(),
        ]);
    }
    align(&mut table, 1..7);
    table.to_string()
}

/// The working set of one survey at times that double, beside what the link carries.
pub fn working_set(survey: &Survey, pages: u64, period_s: f64, pages_per_round: f64) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["before the stop s", "pages written since", "link carries", "left at best"]);
    // Pages of the last k rounds have k - 1 rounds of link.
    let mut row = |rounds: usize, written: u64| {
        let carried = pages_per_round * rounds as f64;
        table.add_row([
            format!("{:.2}", rounds as f64 * period_s),
            written.to_string(),
            format!("{carried:.0}"),
            format!("{:.0}", (written as f64 - carried).max(0.0)),
        ]);
    };
    let mut next = 0;
    for (before, written) in survey.working_set.iter().enumerate() {
        if before == next {
            row(before, *written);
            next = (2 * next).max(1);
        }
    }
    row(survey.stop, pages);
    align(&mut table, 0..4);
    table.to_string()
}

fn align(table: &mut Table, right: std::ops::Range<usize>) {
    for column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
