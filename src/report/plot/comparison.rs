//! Many replays by policy: how much longer than the least possible, and how much more was sent.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Area, Figure, GREY, PlotError, TEXT};
use crate::report::summary::Summary;
use crate::trace::trials::Trial;

/// Half of the width, in pixels, over which the dots of a policy are spread at most.
const SPREAD: i32 = 36;
/// Room left of a panel and below it, in pixels.
const LEFT: i32 = 60;
const BELOW: i32 = 34;

/// A replay's dot.
struct Dot {
    policy: usize,
    /// Place among the dots of the policy, from -1 to 1: the same for the same pair.
    place: f64,
    value: f64,
    feasible: bool,
}

/// Draws the replays of `summaries`, which are of the same policies in the same order.
pub fn comparison(trials: &[&Trial], summaries: &[Summary]) -> Result<Figure, PlotError> {
    let pairs = trials.iter().map(|trial| trial.pair).max().map_or(1, |last| last + 1);
    let dots = |value: &dyn Fn(&Trial) -> Option<f64>| -> Vec<Dot> {
        let dot = |trial: &&Trial| {
            let policy = summaries.iter().position(|summary| summary.policy == trial.contender.word)?;
            let place = (2 * trial.pair + 1) as f64 / pairs as f64 - 1.0;
            Some(Dot { policy, place, value: value(trial)?, feasible: trial.feasible() })
        };
        trials.iter().filter_map(dot).collect()
    };
    let over = dots(&|trial| trial.feasible().then(|| trial.over_t_star()).flatten());
    let rho = dots(&|trial| (!trial.outcome.aborted).then(|| trial.rho()));
    let names: Vec<&str> = summaries.iter().map(|summary| summary.policy.as_str()).collect();
    let means = |of: fn(&Summary) -> Option<f64>| summaries.iter().map(of).collect::<Vec<_>>();
    let feasible = summaries.first().map_or(0, |summary| summary.feasible.pairs);
    let title = format!("{pairs} pairs of trace, order, link, budget and start, {feasible} of them feasible");
    let facts = summaries.iter().map(|summary| (summary.policy.clone(), figures(summary))).collect();
    Figure::draw(title, (1000, 720), facts, |area| {
        let (strip, panels) = area.split_vertically(26);
        explain(&strip)?;
        let (above, below) = panels.split_vertically(320);
        panel(&above, "TMT / T*", &names, &over, &means(|summary| summary.feasible.tmt_over_t_star))?;
        panel(&below, "rho: transmissions / pages", &names, &rho, &means(|summary| summary.feasible.rho))
    })
}

fn figures(summary: &Summary) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    format!(
        "feasible: TMT/T* {}, rho {}, {} of {} within the budget; else mean rho {}",
        number(summary.feasible.tmt_over_t_star),
        number(summary.feasible.rho),
        summary.feasible.within_budget,
        summary.feasible.pairs,
        number(summary.infeasible.rho_mean)
    )
}

fn explain(strip: &Area) -> Result<(), PlotError> {
    let style = TEXT.into_text_style(strip).pos(Pos::new(HPos::Left, VPos::Center));
    let y = 13;
    strip.draw(&Circle::new((70, y), 4, BLACK.stroke_width(1)))?;
    strip.draw(&Text::new("feasible pair (T* within 2 base)", (82, y), style.clone()))?;
    strip.draw(&Cross::new((330, y), 4, GREY.stroke_width(2)))?;
    strip.draw(&Text::new("other pair (rho only)", (342, y), style.clone()))?;
    strip.draw(&Rectangle::new([(520, y - 2), (560, y + 2)], BLACK.filled()))?;
    strip.draw(&Text::new("geometric mean of the feasible", (568, y), style))?;
    Ok(())
}

fn panel(
    area: &Area,
    label: &str,
    names: &[&str],
    dots: &[Dot],
    means: &[Option<f64>],
) -> Result<(), PlotError> {
    let y_max = 0.1 + 1.03 * dots.iter().map(|dot| dot.value).fold(1.5, f64::max);
    let columns = names.len().max(1);
    let mut chart = ChartBuilder::on(area)
        .margin_right(8)
        .x_label_area_size(BELOW)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(0.0..columns as f64, 0.9..y_max)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_desc(label)
        .label_style(TEXT)
        .axis_desc_style(TEXT)
        .bold_line_style(RGBColor(225, 225, 225))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let (width, height) = chart.plotting_area().dim_in_pixel();
    let spread = (width as i32 / columns as i32 / 2 - 12).clamp(0, SPREAD);
    let middle = |policy: usize| policy as f64 + 0.5;
    let anchor = |dot: &Dot| EmptyElement::at((middle(dot.policy), dot.value));
    let shift = |dot: &Dot| ((dot.place * f64::from(spread)) as i32, 0);
    chart.draw_series(
        dots.iter()
            .filter(|dot| !dot.feasible)
            .map(|dot| anchor(dot) + Cross::new(shift(dot), 4, GREY.stroke_width(2))),
    )?;
    chart.draw_series(
        dots.iter()
            .filter(|dot| dot.feasible)
            .map(|dot| anchor(dot) + Circle::new(shift(dot), 4, BLACK.stroke_width(1))),
    )?;
    chart.draw_series(means.iter().enumerate().filter_map(|(policy, mean)| {
        let at = EmptyElement::at((middle(policy), (*mean)?));
        Some(at + Rectangle::new([(-spread - 6, -2), (spread + 6, 2)], BLACK.filled()))
    }))?;
    let style = TEXT.into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
    for (policy, name) in names.iter().enumerate() {
        let x = LEFT + (middle(policy) / columns as f64 * f64::from(width)) as i32;
        area.draw(&Text::new(name.to_string(), (x, height as i32 + 8), style.clone()))?;
    }
    Ok(())
}
