//! The clairvoyant bound of a trace: what could be left at each stop, and the working set behind it.

use super::panel::{Line, Panel, Stroke, top_of};
use super::{Figure, PlotError};
use crate::trace::clairvoyant::Survey;

/// What the picture is of.
pub struct BoundPicture<'a> {
    /// The trace's name.
    pub trace: &'a str,
    /// What is known of it.
    pub survey: &'a Survey,
    /// Pages of its id space.
    pub pages: u64,
    /// Seconds between two rounds.
    pub period_s: f64,
    /// Time to send every page once, in seconds.
    pub base_s: f64,
    /// Downtime budget in seconds.
    pub budget_s: f64,
    /// Round of the trace in which the migration begins.
    pub start_round: usize,
    /// What it comes down to, in a line.
    pub verdict: &'a str,
}

/// Draws the bound.
pub fn bound(picture: &BoundPicture) -> Result<Figure, PlotError> {
    let title = format!(
        "the bound of {} (base {:.2} s, budget {:.0} ms, start at round {})",
        picture.trace,
        picture.base_s,
        picture.budget_s * 1e3,
        picture.start_round
    );
    let facts = [
        ("trace", picture.trace.to_owned()),
        ("verdict", picture.verdict.to_owned()),
        ("link", format!("{:.3} s to send all {} pages once", picture.base_s, picture.pages)),
        ("upper picture", "downtime of the best stop at each time, had all writes been known before".to_owned()),
        (
            "lower picture",
            "pages written in the time before the stop; where they are above the link's line they cannot have been \
             sent by then, and the most by which they are is the backlog of the best sender"
                .to_owned(),
        ),
    ];
    let facts = facts.map(|(name, value)| (name.to_owned(), value)).into();
    Figure::draw(title, (1000, 760), facts, |area| {
        let (top, bottom) = area.split_vertically(370);
        downtimes(picture).draw(&top)?;
        working_set(picture).draw(&bottom)
    })
}

fn downtimes<'a>(picture: &BoundPicture) -> Panel<'a> {
    let survey = picture.survey;
    let pages_per_s = picture.pages as f64 / picture.base_s;
    let at = |rounds: usize| rounds as f64 * picture.period_s;
    let least: Vec<(f64, f64)> =
        survey.backlogs.iter().enumerate().map(|(rounds, left)| (at(rounds), left / pages_per_s)).collect();
    let x_max = at(survey.backlogs.len().max(2) - 1);
    let y_max = top_of(&least).max(1.2 * picture.budget_s);
    let budget = vec![(0.0, picture.budget_s), (x_max, picture.budget_s)];
    let stop = Line::upright(mark(picture), Stroke::Dotted, at(survey.stop), y_max);
    Panel {
        x_label: "time from the start to the stop [s]",
        y_label: "least downtime [s]",
        x_max,
        y_max,
        lines: vec![
            Line::new("least downtime of a stop at that time", Stroke::Bold, least),
            Line::new("budget", Stroke::Dashed, budget),
            stop,
        ],
    }
}

fn mark(picture: &BoundPicture) -> String {
    match &picture.survey.earliest {
        Some(earliest) => format!("T* {:.2} s", earliest.total_s),
        None => "no T*: the stop that leaves least".to_owned(),
    }
}

fn working_set<'a>(picture: &BoundPicture) -> Panel<'a> {
    let survey = picture.survey;
    let thousands = |pages: f64| pages / 1e3;
    let at = |rounds: usize| rounds as f64 * picture.period_s;
    // Pages of the last k rounds have k - 1 rounds of link; those never written all the time there is.
    let mut written: Vec<(f64, f64)> = survey
        .working_set
        .iter()
        .enumerate()
        .map(|(before, pages)| (at(before), thousands(*pages as f64)))
        .collect();
    written.push((at(survey.stop), thousands(picture.pages as f64)));
    let x_max = at(survey.stop.max(1));
    let link = |time_s: f64| thousands(time_s / picture.base_s * picture.pages as f64);
    let y_max = top_of(&written);
    // The link and the budget, as far as the picture goes.
    let reach = |budget_s: f64| {
        let until = x_max.min(y_max / link(1.0) - budget_s).max(0.0);
        vec![(0.0, link(budget_s)), (until, link(until + budget_s))]
    };
    Panel {
        x_label: "time before that stop [s]",
        y_label: "pages [thousands]",
        x_max,
        y_max,
        lines: vec![
            Line::new("written within that time (at the end: all pages)", Stroke::Bold, written),
            Line::new("what the link carries in it", Stroke::Pale, reach(0.0)),
            Line::new("and in the budget", Stroke::Dashed, reach(picture.budget_s)),
        ],
    }
}
