//! A coordinate system with lines, and a strip above it that says which is which.

use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Area, GREY, PlotError, TEXT};

/// Height of the strip, in pixels.
const STRIP: i32 = 24;
/// Length of a line's sample in the strip.
const SAMPLE: i32 = 34;
/// About the width of a letter.
const LETTER: i32 = 7;
/// Left of the axis there is room for numbers and the label.
const LEFT: i32 = 72;

/// How a line looks; each differs from the others without colour.
#[derive(Clone, Copy)]
pub(super) enum Stroke {
    /// Black.
    Bold,
    /// Grey.
    Pale,
    /// Black dashes.
    Dashed,
    /// Black dots.
    Dotted,
    /// Grey long dashes.
    PaleDashed,
}

impl Stroke {
    fn style(self) -> ShapeStyle {
        match self {
            Stroke::Bold | Stroke::Dashed | Stroke::Dotted => BLACK.stroke_width(2),
            Stroke::Pale | Stroke::PaleDashed => GREY.stroke_width(2),
        }
    }

    /// Length and distance of its dashes in pixels, if it has any.
    fn dashes(self) -> Option<(u32, u32)> {
        match self {
            Stroke::Bold | Stroke::Pale => None,
            Stroke::Dashed => Some((8, 5)),
            Stroke::Dotted => Some((2, 4)),
            Stroke::PaleDashed => Some((14, 6)),
        }
    }
}

/// A line through points of the panel's coordinates.
pub(super) struct Line {
    pub label: String,
    pub stroke: Stroke,
    pub points: Vec<(f64, f64)>,
}

impl Line {
    pub fn new(label: impl Into<String>, stroke: Stroke, points: Vec<(f64, f64)>) -> Self {
        Line { label: label.into(), stroke, points }
    }

    /// From the bottom to the top at `x`.
    pub fn upright(label: impl Into<String>, stroke: Stroke, x: f64, top: f64) -> Self {
        Line::new(label, stroke, vec![(x, 0.0), (x, top)])
    }
}

/// A coordinate system from 0 to `x_max` and `y_max`.
pub(super) struct Panel<'a> {
    pub x_label: &'a str,
    pub y_label: &'a str,
    pub x_max: f64,
    pub y_max: f64,
    pub lines: Vec<Line>,
}

/// The highest ordinate of the points, with some room above; never 0.
pub(super) fn top_of<'a>(points: impl IntoIterator<Item = &'a (f64, f64)>) -> f64 {
    let highest = points.into_iter().map(|(_, y)| *y).fold(0.0, f64::max);
    if highest > 0.0 { 1.05 * highest } else { 1.0 }
}

impl Panel<'_> {
    pub fn draw(&self, area: &Area) -> Result<(), PlotError> {
        let (strip, below) = area.split_vertically(STRIP);
        self.strip(&strip)?;
        let mut chart = ChartBuilder::on(&below)
            .x_label_area_size(44)
            .y_label_area_size(LEFT)
            .build_cartesian_2d(0.0..self.x_max, 0.0..self.y_max)?;
        chart
            .configure_mesh()
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .label_style(TEXT)
            .axis_desc_style(TEXT)
            .bold_line_style(RGBColor(225, 225, 225))
            .light_line_style(TRANSPARENT)
            .x_labels(10)
            .y_labels(7)
            .x_label_formatter(&plain)
            .y_label_formatter(&plain)
            .draw()?;
        for line in &self.lines {
            let points = line.points.iter().copied();
            match line.stroke.dashes() {
                None => chart.draw_series(LineSeries::new(points, line.stroke.style()))?,
                Some((dash, gap)) => {
                    chart.draw_series(DashedLineSeries::new(points, dash, gap, line.stroke.style()))?
                }
            };
        }
        Ok(())
    }

    fn strip(&self, strip: &Area) -> Result<(), PlotError> {
        let mut x = LEFT;
        for line in self.lines.iter().filter(|line| !line.label.is_empty()) {
            let ends = [(x, STRIP / 2), (x + SAMPLE, STRIP / 2)];
            match line.stroke.dashes() {
                None => strip.draw(&PathElement::new(ends, line.stroke.style()))?,
                Some((dash, gap)) => {
                    strip.draw(&DashedPathElement::new(ends, dash, gap, line.stroke.style()))?;
                }
            }
            let style = TEXT.into_text_style(strip).pos(Pos::new(HPos::Left, VPos::Center));
            strip.draw(&Text::new(line.label.clone(), (x + SAMPLE + 6, STRIP / 2), style))?;
            x += SAMPLE + 30 + LETTER * line.label.chars().count() as i32;
        }
        Ok(())
    }
}

/// A number without superfluous digits.
pub(super) fn plain(value: &f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
