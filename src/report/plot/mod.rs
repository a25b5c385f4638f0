//! Pictures as SVG, alone or in an HTML page. They are to be read in black and white: lines differ by width, shade and
//! dashes, dots by shape, and nothing by colour.

mod bound;
mod comparison;
mod heat_map;
mod over_time;
mod panel;

pub use bound::{BoundPicture, bound};
pub use comparison::comparison;
pub use heat_map::heat_map;
pub use over_time::over_time;

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The name says nothing about the format.
    #[error("cannot tell the format of {}; give a name that ends in .svg or .html", path.display())]
    Format {
        /// The name.
        path: PathBuf,
    },
    /// The plotting library refused.
    #[error("cannot draw the picture: {0}; please report this with the command that was run")]
    Draw(String),
}

impl<E: std::error::Error + Send + Sync> From<DrawingAreaErrorKind<E>> for PlotError {
    fn from(error: DrawingAreaErrorKind<E>) -> Self {
        PlotError::Draw(error.to_string())
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const TITLE: (&str, i32) = ("sans-serif", 18);
const TEXT: (&str, i32) = ("sans-serif", 13);
const GREY: RGBColor = RGBColor(150, 150, 150);

/// A picture with what has to be said about it.
pub struct Figure {
    title: String,
    svg: String,
    /// Name and value of what it was made of.
    facts: Vec<(String, String)>,
}

impl Figure {
    /// Draws under a title; `size` in pixels.
    fn draw(
        title: String,
        size: (u32, u32),
        facts: Vec<(String, String)>,
        draw: impl FnOnce(&Area) -> Result<(), PlotError>,
    ) -> Result<Figure, PlotError> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            root.fill(&WHITE)?;
            let below = root.margin(8, 8, 8, 16).titled(&title, TITLE)?;
            draw(&below)?;
            root.present()?;
        }
        Ok(Figure { title, svg, facts })
    }

    /// Whether a picture can be written under that name.
    pub fn check_name(path: &Path) -> Result<(), PlotError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg" | "html") => Ok(()),
            _ => Err(PlotError::Format { path: path.to_owned() }),
        }
    }

    /// As SVG, or within a page, by the extension of the name under which it will be.
    pub fn text(&self, path: &Path) -> String {
        if path.extension().is_some_and(|extension| extension == "html") {
            self.page()
        } else {
            self.svg.clone()
        }
    }

    fn page(&self) -> String {
        let row = |(name, value): &(String, String)| {
            format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(value))
        };
        let rows: String = self.facts.iter().map(row).collect();
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{title}</title>\n<style>\n\
             body {{ font-family: sans-serif; margin: 1em; }}\n\
             th {{ text-align: left; font-weight: normal; padding-right: 2em; color: #555; }}\n\
             </style></head>\n<body>\n{svg}\n<table>\n{rows}</table>\n</body>\n</html>\n",
            title = escape(&self.title),
            svg = self.svg,
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_carries_the_picture_and_its_facts_and_escapes_names() {
        let facts = vec![("trace".to_owned(), "<b>&".to_owned())];
        let figure = Figure::draw("a < b".to_owned(), (100, 60), facts, |_| Ok(())).unwrap();
        let (svg, html) = (figure.text(Path::new("a.svg")), figure.text(Path::new("a.html")));
        assert!(svg.starts_with("<svg") && svg.contains("a &lt; b"), "{svg}");
        assert!(html.contains(&svg) && html.contains("&lt;b&gt;&amp;") && html.contains("<title>a &lt; b"));
    }

    #[test]
    fn a_name_without_a_known_ending_is_refused_before_work_is_done() {
        let error = Figure::check_name(Path::new("out.png")).unwrap_err().to_string();
        assert!(error.contains(".svg or .html"), "{error}");
    }
}
