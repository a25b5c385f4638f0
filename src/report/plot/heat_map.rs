//! How long pages rest between two writes, over the id space: the darker, the more writes.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::panel::plain;
use super::{Area, Figure, PlotError, TEXT};
use crate::trace::intervals::Intervals;

/// Width of the scale of shades, in pixels.
const SCALE: i32 = 300;

/// Draws the intervals of a trace whose rounds took `period_s`.
pub fn heat_map(trace: &str, intervals: &Intervals, period_s: f64) -> Result<Figure, PlotError> {
    let (columns, rows) = intervals.size();
    let of = |column: usize| (0..rows).map(move |row| intervals.count(column, row));
    let most = (0..columns).flat_map(of).max().unwrap_or(0);
    let facts = vec![
        ("trace".to_owned(), trace.to_owned()),
        ("column".to_owned(), format!("{} pages", intervals.pages_a_column)),
        (
            "row".to_owned(),
            "intervals from a power of two of rounds to 1.5 times that, or from there to the next power"
                .to_owned(),
        ),
    ];
    let title = format!("intervals between two writes of a page: {trace}");
    Figure::draw(title, (1000, 560), facts, |area| {
        let (strip, below) = area.split_vertically(28);
        scale(&strip, most)?;
        let width = intervals.pages_a_column as f64 / 1e3;
        let bottom = Intervals::from_rounds(0) * period_s;
        let top = Intervals::from_rounds(rows) * period_s;
        let mut chart = ChartBuilder::on(&below)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(0.0..columns as f64 * width, (bottom..top).log_scale().base(2.0))?;
        for column in 0..columns {
            let cells = of(column).enumerate().filter(|(_, count)| *count > 0);
            chart.draw_series(cells.map(|(row, count)| {
                let (left, low) = (column as f64 * width, Intervals::from_rounds(row) * period_s);
                let high = Intervals::from_rounds(row + 1) * period_s;
                Rectangle::new([(left, low), (left + width, high)], shade(count, most).filled())
            }))?;
        }
        chart
            .configure_mesh()
            .disable_mesh()
            .x_desc("page by its id in the trace [thousands]")
            .y_desc("interval [s]")
            .label_style(TEXT)
            .axis_desc_style(TEXT)
            .x_label_formatter(&plain)
            .y_label_formatter(&plain)
            .draw()?;
        Ok(())
    })
}

/// White for none; from light grey for one to black for the most, by the logarithm.
fn shade(count: u64, most: u64) -> RGBColor {
    if count == 0 {
        return WHITE;
    }
    let depth = if most > 1 { (count as f64).ln() / (most as f64).ln() } else { 1.0 };
    let grey = (230.0 * (1.0 - depth)) as u8;
    RGBColor(grey, grey, grey)
}

fn scale(strip: &Area, most: u64) -> Result<(), PlotError> {
    let style = TEXT.into_text_style(strip).pos(Pos::new(HPos::Left, VPos::Center));
    let (left, y) = (220, 12);
    strip.draw(&Text::new("writes (white: none), 1", (72 - 20, y), style.clone()))?;
    for x in 0..SCALE {
        let count = (most.max(1) as f64).powf(f64::from(x) / f64::from(SCALE)).round() as u64;
        let bar = [(left + x, y - 7), (left + x + 1, y + 7)];
        strip.draw(&Rectangle::new(bar, shade(count, most).filled()))?;
    }
    strip.draw(&Text::new(format!("{most} (logarithmic)"), (left + SCALE + 6, y), style))?;
    Ok(())
}
