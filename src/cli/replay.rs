//! `pagecast replay`: policies over recorded traces.

use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::options::{Rate, parse_rate};
use super::{Exit, Failure, units};
use crate::forecast::PolicyKind;
use crate::pipeline::scanner::WIRE_BYTES_PER_PAGE;
use crate::report::{replay as report, summary};
use crate::sys::{console, cpu};
use crate::trace::contender::Contender;
use crate::trace::decisions::Decisions;
use crate::trace::shuffle::Order;
use crate::trace::trials::{self, Audience, LinkSpeed, Plan, Start, Trial};

/// Stands for no limit: longer than any trace.
const NO_LIMIT_S: f64 = 1e9;

#[derive(Args)]
pub struct ReplayArguments {
    /// Traces: .pct or .pct.zst
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    /// Policies: xen, xen-skip, paper, heat, ar or all; NAME:own stops by the policy's own rule, NAME:budget as soon as
    /// the rest fits the budget [without a suffix: xen-skip:budget, the others own]
    #[arg(long, value_delimiter = ',', default_value = "xen,xen-skip,paper,ar")]
    policy: Vec<String>,
    /// Links, by the time that they take to send every page once
    #[arg(long, value_delimiter = ',', default_value = "3s", value_parser = units::time)]
    base: Vec<Duration>,
    /// Links, by their rate, instead of --base
    #[arg(long, value_delimiter = ',', value_parser = parse_rate, conflicts_with = "base")]
    bandwidth: Vec<Rate>,
    /// How long the guest may stand still
    #[arg(long, value_delimiter = ',', default_value = "300ms", value_parser = units::time)]
    budget: Vec<Duration>,
    /// Where in the trace the migration begins: a fraction (3/8) or a round
    #[arg(long, visible_alias = "start", value_delimiter = ',', default_value = "1/8", value_parser = start)]
    starts: Vec<Start>,
    /// Orders of the 2 MiB chunks: seeds for random ones, none for that of the file
    #[arg(long, value_name = "SEED", value_delimiter = ',', default_value = "none")]
    shuffle: Vec<Order>,
    /// After this time every policy stops [default: the trace's end]
    #[arg(long, value_parser = units::time)]
    max_time: Option<Duration>,
    /// Replays at a time [default: one for each core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// One JSON object for each replay instead of a table
    #[arg(long)]
    json: bool,
    /// After many replays only what they say of each policy; with --json as a last object. Replays xen and xen-skip as
    /// well, to compare with, if they are not among the policies
    #[arg(long, conflicts_with = "decisions")]
    summary: bool,
    /// Write what was sent in each round to a file, for tools/check-decisions; for a single replay
    #[arg(long, value_name = "FILE")]
    decisions: Option<PathBuf>,
}

fn start(text: &str) -> Result<Start, String> {
    let wrong =
        || format!("{text:?} is no start; write a fraction below 1, such as 3/8, or a round, such as 150");
    match text.split_once('/') {
        None => text.parse().map(Start::Round).map_err(|_| wrong()),
        Some((part, whole)) => {
            let (Ok(part), Ok(whole)) = (part.parse::<u32>(), whole.parse::<u32>()) else {
                return Err(wrong());
            };
            if part >= whole {
                return Err(wrong());
            }
            Ok(Start::Fraction(f64::from(part) / f64::from(whole)))
        }
    }
}

/// What the words stand for.
fn contenders(words: &[String]) -> Result<Vec<Contender>, String> {
    let mut contenders: Vec<Contender> = Vec::new();
    for word in words {
        match word.as_str() {
            "all" => contenders.extend(PolicyKind::ALL.map(Contender::plain)),
            word => contenders.push(word.parse()?),
        }
    }
    Ok(contenders)
}

impl ReplayArguments {
    fn plan(&self) -> Result<Plan, String> {
        let links = if self.bandwidth.is_empty() {
            if self.base.iter().any(|base| base.as_micros() == 0) {
                return Err("--base is to be more than nothing".to_owned());
            }
            self.base.iter().map(|base| LinkSpeed::Base(base.as_secs_f64())).collect()
        } else {
            let speed = |rate: &Rate| {
                let bytes_per_s =
                    rate.0.ok_or_else(|| "--bandwidth is to be a rate, such as 2.5Gbit".to_owned())?;
                Ok(LinkSpeed::PagesPerS(bytes_per_s as f64 / WIRE_BYTES_PER_PAGE))
            };
            self.bandwidth.iter().map(speed).collect::<Result<_, String>>()?
        };
        Ok(Plan {
            traces: self.traces.clone(),
            orders: self.shuffle.clone(),
            links,
            budgets_s: self.budget.iter().map(Duration::as_secs_f64).collect(),
            starts: self.starts.clone(),
            contenders: contenders(&self.policy)?,
            max_time_s: self.max_time.map_or(NO_LIMIT_S, |time| time.as_secs_f64()),
        })
    }

    fn threads(&self) -> usize {
        let cores = || cpu::allowed_cores().map_or(1, |cores| cores.len());
        self.jobs.map_or_else(cores, usize::from)
    }
}

pub fn run(arguments: &ReplayArguments) -> Result<Exit, Failure> {
    let mut plan = arguments.plan().map_err(Failure::usage)?;
    if let Some(path) = &arguments.decisions {
        let trial = observed(&plan, path)?;
        say_trials(arguments.json, &[&trial]);
        return Ok(Exit::Done);
    }
    let asked_for = plan.contenders.clone();
    if arguments.summary {
        for yardstick in [Contender::yardstick(), Contender::stock_xen()] {
            if !asked_for.iter().any(|contender| contender.same_as(&yardstick)) {
                plan.contenders.push(yardstick);
            }
        }
    }
    let mut show = Show { bar: bar(plan.trials()), lines: arguments.json, asked_for: &asked_for };
    let trials = trials::run(&plan, arguments.threads(), &mut show);
    show.bar.finish_and_clear();
    let trials = trials.map_err(Failure::failed)?;
    if !arguments.json && !arguments.summary {
        say_trials(false, &trials.iter().collect::<Vec<_>>());
    }
    let summaries = summary::summarise(&trials, &asked_for);
    match (arguments.json, arguments.summary) {
        (true, true) => console::say(format_args!("{}", json!({ "summary": summaries }))),
        (true, false) => {}
        (false, _) if arguments.summary || trials.len() > 1 => {
            console::say(format_args!("{}", summary::table(&summaries)));
        }
        (false, _) => {}
    }
    Ok(Exit::Done)
}

fn say_trials(json: bool, trials: &[&Trial]) {
    if json {
        trials.iter().for_each(|trial| say_line(trial));
    } else {
        console::say(format_args!("{}", report::table(trials)));
    }
}

fn say_line(trial: &Trial) {
    console::say(format_args!("{}", report::Line::of(trial).to_json()));
}

/// Runs the only trial and writes its decisions down.
fn observed(plan: &Plan, path: &Path) -> Result<Trial, Failure> {
    if plan.trials() != 1 {
        return Err(Failure::usage(format!(
            "--decisions is for a single replay and these are {}; name one trace, policy, base, budget, start and order",
            plan.trials()
        )));
    }
    let failed = |error| Failure::failed(format!("cannot write {}: {error}", path.display()));
    let file = std::fs::File::create(path).map_err(failed)?;
    let made = trials::run_one(plan, |_, shuffle, _| Decisions::new(shuffle.clone()));
    let (trial, decisions) = made.map_err(Failure::failed)?;
    decisions.write(trial.outcome.stop_round, &mut BufWriter::new(file)).map_err(failed)?;
    Ok(trial)
}

/// A progress bar on standard error, seen on a terminal only.
fn bar(trials: usize) -> ProgressBar {
    let template = "{wide_bar} {pos} of {len} replays, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is well-formed");
    ProgressBar::new(trials as u64).with_style(style)
}

struct Show<'a> {
    bar: ProgressBar,
    /// Whether to write JSON lines, and of whom.
    lines: bool,
    asked_for: &'a [Contender],
}

impl Audience for Show<'_> {
    fn one_done(&mut self) {
        self.bar.inc(1);
    }

    fn next(&mut self, trial: &Trial) {
        if self.lines && self.asked_for.contains(&trial.contender) {
            self.bar.suspend(|| say_line(trial));
        }
    }
}
