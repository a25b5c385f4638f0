//! `pagecast bound`: what no policy could do better on a recorded trace.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::model::{ModelOptions, warn_of_missed_rounds};
use super::output::Output;
use super::{Exit, Failure};
use crate::report::bound::{self, Bound};
use crate::report::plot::{self, BoundPicture};
use crate::sys::console;
use crate::trace::clairvoyant::{Survey, least_link};
use crate::trace::format::Trace;
use crate::trace::intervals::Intervals;
use crate::trace::trials::{FEASIBLE_BASES, LinkSpeed, Start, name_of};

/// Columns of the heat map, at most.
const MAP_COLUMNS: usize = 220;

#[derive(Args)]
pub struct BoundArguments {
    /// Traces: .pct or .pct.zst
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    /// One JSON object for each trace, link, budget and start instead of a table
    #[arg(long)]
    json: bool,
    /// Draw the bound and the working set, .svg or .html; for one trace, link, budget and start
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Draw a heat map of the intervals between two writes of a page, .svg or .html; for one trace
    #[arg(long, value_name = "FILE")]
    heatmap: Option<PathBuf>,
}

/// One combination and what is known of it.
struct Finding {
    bound: Bound,
    survey: Survey,
    period_s: f64,
    pages_per_round: f64,
}

pub fn run(arguments: &BoundArguments) -> Result<Exit, Failure> {
    let (links, budgets_s) = (arguments.model.links().map_err(Failure::usage)?, arguments.model.budgets_s());
    let starts = arguments.model.starts();
    let combinations = arguments.traces.len() * links.len() * budgets_s.len() * starts.len();
    if arguments.plot.is_some() && combinations > 1 {
        return Err(Failure::usage(format!(
            "--plot is for one trace, base, budget and start and these are {combinations} combinations"
        )));
    }
    if arguments.heatmap.is_some() && arguments.traces.len() > 1 {
        return Err(Failure::usage("--heatmap is for one trace; name one"));
    }
    let picture = arguments.plot.as_deref().map(Output::picture).transpose()?;
    let mut heat_map = arguments.heatmap.as_deref().map(Output::picture).transpose()?;
    arguments.traces.iter().try_for_each(|path| Trace::look_for(path)).map_err(Failure::failed)?;
    let mut findings = Vec::new();
    for path in &arguments.traces {
        let trace = Trace::open(path).map_err(Failure::failed)?;
        warn_of_missed_rounds(&name_of(path), trace.rounds_missed(), trace.rounds().len());
        if let Some(heat_map) = heat_map.take() {
            let intervals = Intervals::new(&trace, MAP_COLUMNS);
            heat_map.draw(plot::heat_map(&name_of(path), &intervals, trace.period_s()))?;
        }
        for link in &links {
            for budget_s in &budgets_s {
                for start in &starts {
                    let finding = find(path, &trace, *link, *budget_s, *start)?;
                    if arguments.json {
                        console::say(format_args!("{}", line(&finding.bound)));
                    }
                    findings.push(finding);
                }
            }
        }
    }
    if !arguments.json {
        say(&findings);
    }
    if let (Some(picture), [finding]) = (picture, findings.as_slice()) {
        draw(finding, picture)?;
    }
    Ok(Exit::Done)
}

fn find(
    path: &Path,
    trace: &Trace,
    link: LinkSpeed,
    budget_s: f64,
    start: Start,
) -> Result<Finding, Failure> {
    let start_round = start.round(path, trace).map_err(Failure::failed)?;
    let (pages, period_s) = (trace.nr_pages(), trace.period_s());
    let base_s = link.base_s(pages);
    let pages_per_round = link.pages_per_s(pages) * period_s;
    let budget_rounds = budget_s / period_s;
    let survey = Survey::new(trace, start_round, pages_per_round, budget_s * link.pages_per_s(pages));
    let t_star_s = survey.earliest.map(|earliest| earliest.total_s);
    let needed = || least_link(trace, start_round, pages_per_round, budget_rounds);
    let needed_base_s = match t_star_s {
        None => needed().map(|link| pages as f64 / link * period_s),
        Some(_) => None,
    };
    let bound = Bound {
        trace: name_of(path),
        base_s,
        budget_s,
        start_round,
        pages,
        rounds_missed: trace.rounds_missed(),
        t_star_s,
        t_star_rounds: survey.earliest.map(|earliest| earliest.rounds),
        least_downtime_s: survey.least_backlog() / link.pages_per_s(pages),
        needed_base_s,
        feasible: t_star_s.is_some_and(|t_star_s| t_star_s <= FEASIBLE_BASES * base_s),
    };
    Ok(Finding { bound, survey, period_s, pages_per_round })
}

fn line(bound: &Bound) -> String {
    let mut line = json!(bound);
    line["verdict"] = json!(bound.verdict());
    line.to_string()
}

fn say(findings: &[Finding]) {
    let bounds: Vec<Bound> = findings.iter().map(|finding| finding.bound.clone()).collect();
    console::say(format_args!("{}", bound::table(&bounds)));
    if let [finding] = findings {
        let stop_s = finding.survey.stop as f64 * finding.period_s;
        let what = if finding.survey.earliest.is_some() { "earliest stop" } else { "stop that leaves least" };
        console::say(format_args!("the working set at the {what}, {stop_s:.2} s after the start"));
        let table = bound::working_set(
            &finding.survey,
            finding.bound.pages,
            finding.period_s,
            finding.pages_per_round,
        );
        console::say(format_args!("{table}"));
    }
}

fn draw(finding: &Finding, picture: Output) -> Result<(), Failure> {
    let bound = &finding.bound;
    picture.draw(plot::bound(&BoundPicture {
        trace: &bound.trace,
        survey: &finding.survey,
        pages: bound.pages,
        period_s: finding.period_s,
        base_s: bound.base_s,
        budget_s: bound.budget_s,
        start_round: bound.start_round,
        verdict: &bound.verdict(),
    }))
}
