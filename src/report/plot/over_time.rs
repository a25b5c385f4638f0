//! One replay over time: backlog and what is held back, pages written and pages sent.

use super::panel::{Line, Panel, Stroke, top_of};
use super::{Figure, PlotError};
use crate::trace::series::{Moment, Series};
use crate::trace::trials::Trial;

/// Draws one replay.
pub fn over_time(trial: &Trial, series: &Series) -> Result<Figure, PlotError> {
    let (moments, period_s) = (&series.moments, series.period_s);
    let at = |round: usize| round as f64 * period_s;
    let thousands = |of: fn(&Moment) -> u64, scale: f64| -> Vec<(f64, f64)> {
        moments.iter().enumerate().map(|(round, now)| (at(round), of(now) as f64 / 1e3 * scale)).collect()
    };
    let mut backlog = thousands(|now| now.backlog, 1.0);
    let stop_s = at(moments.len());
    // The stop phase: what is left goes down to nothing.
    backlog.extend([(stop_s, trial.outcome.backlog as f64 / 1e3), (trial.outcome.tmt_s, 0.0)]);
    let deferred = thousands(|now| now.deferred, 1.0);
    let dirty = thousands(|now| now.dirty, 1.0 / period_s);
    let sent = thousands(|now| now.sent, 1.0 / period_s);
    let (pages, rate) = (top_of(&backlog), top_of(dirty.iter().chain(&sent)));
    let t_star_s = trial.t_star.map(|bound| bound.total_s);
    let x_max = 1.02 * trial.outcome.tmt_s.max(t_star_s.unwrap_or(0.0)).max(period_s);

    let marks = |top: f64| {
        let ended = if trial.outcome.reason.is_some() { "stop" } else { "end of the trace" };
        let mut marks =
            vec![Line::upright(format!("{ended} {stop_s:.2} s"), Stroke::PaleDashed, stop_s, top)];
        match t_star_s {
            Some(t_star_s) => {
                marks.push(Line::upright(format!("T* {t_star_s:.2} s"), Stroke::Dotted, t_star_s, top));
            }
            None => marks.push(Line::new("no T* in this trace", Stroke::Dotted, vec![])),
        }
        marks
    };
    let mut upper = vec![
        Line::new("backlog", Stroke::Bold, backlog),
        Line::new("of it held back by the forecast", Stroke::Dashed, deferred),
    ];
    upper.extend(marks(pages));
    let mut lower = vec![Line::new("written", Stroke::Pale, dirty), Line::new("sent", Stroke::Bold, sent)];
    lower.extend(marks(rate));

    let title = format!(
        "{} over {}: TMT {:.2} s, rho {:.3}, downtime {:.0} ms",
        trial.contender.word,
        trial.trace,
        trial.outcome.tmt_s,
        trial.rho(),
        trial.outcome.downtime_s * 1e3
    );
    Figure::draw(title, (1000, 760), facts(trial), |area| {
        let (top, bottom) = area.split_vertically(370);
        let x_label = "time since the start of the migration [s]";
        Panel { x_label, y_label: "pages [thousands]", x_max, y_max: pages, lines: upper }.draw(&top)?;
        let y_label = "pages a second [thousands]";
        Panel { x_label, y_label, x_max, y_max: rate, lines: lower }.draw(&bottom)
    })
}

fn facts(trial: &Trial) -> Vec<(String, String)> {
    let bound = trial
        .t_star
        .map_or_else(|| "none in this trace".to_owned(), |bound| format!("{:.3} s", bound.total_s));
    let reason =
        trial.outcome.reason.map_or_else(|| "the trace ended".to_owned(), |reason| reason.to_string());
    [
        ("trace", trial.trace.clone()),
        ("policy", format!("{} (stop rule: {})", trial.contender.word, trial.contender.stop)),
        ("order of chunks (seed)", trial.order.to_string()),
        ("link", format!("{:.3} s to send all {} pages once", trial.base_s, trial.pages)),
        ("downtime budget", format!("{:.0} ms", trial.budget_s * 1e3)),
        ("start", format!("round {}", trial.start_round)),
        ("total migration time", format!("{:.3} s", trial.outcome.tmt_s)),
        ("least possible (T*)", bound),
        ("downtime", format!("{:.1} ms", trial.outcome.downtime_s * 1e3)),
        ("rho: transmissions over pages", format!("{:.4}", trial.rho())),
        ("pages wasted", trial.pages_wasted().to_string()),
        ("stopped because", reason),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}
