//! `pagecast replay`: policies over recorded traces.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::model::{ModelOptions, warn_of_missed_rounds};
use super::output::Output;
use super::{Exit, Failure, units};
use crate::forecast::{OnNoConvergence, PolicyKind};
use crate::report::plot;
use crate::report::{replay as report, summary};
use crate::sys::{console, cpu};
use crate::trace::contender::Contender;
use crate::trace::decisions::Decisions;
use crate::trace::series::Series;
use crate::trace::shuffle::Order;
use crate::trace::trials::{self, Audience, Plan, Trial};

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
    #[command(flatten)]
    model: ModelOptions,
    /// Orders of the 2 MiB chunks: seeds for random ones, none for that of the file
    #[arg(long, value_name = "SEED", value_delimiter = ',', default_value = "none")]
    shuffle: Vec<Order>,
    /// After this time every policy stops [default: the trace's end]
    #[arg(long, value_parser = units::time)]
    max_time: Option<Duration>,
    /// What a policy does that finds that it cannot converge, and every policy at --max-time: stop (send the rest with
    /// the guest paused) or abort (call the migration off)
    #[arg(long, default_value = "stop")]
    on_no_convergence: OnNoConvergence,
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
    /// Draw a picture, .svg or .html: a single replay over time, or many by policy
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
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
        Ok(Plan {
            traces: self.traces.clone(),
            orders: self.shuffle.clone(),
            links: self.model.links()?,
            budgets_s: self.model.budgets_s(),
            starts: self.model.starts(),
            contenders: contenders(&self.policy)?,
            max_time_s: self.max_time.map_or(NO_LIMIT_S, |time| time.as_secs_f64()),
            on_no_convergence: self.on_no_convergence()?,
        })
    }

    fn on_no_convergence(&self) -> Result<OnNoConvergence, String> {
        match self.on_no_convergence {
            OnNoConvergence::Throttle => {
                Err("a trace cannot be slowed down: it holds what the guest wrote unthrottled; \
                                              choose --on-no-convergence stop or abort"
                    .to_owned())
            }
            choice => Ok(choice),
        }
    }

    fn threads(&self) -> usize {
        let cores = || cpu::allowed_cores().map_or(1, |cores| cores.len());
        self.jobs.map_or_else(cores, usize::from)
    }
}

pub fn run(arguments: &ReplayArguments) -> Result<Exit, Failure> {
    let plan = arguments.plan().map_err(Failure::usage)?;
    let is_one = plan.trials() == 1 && !arguments.summary;
    if arguments.decisions.is_some() && !is_one {
        return Err(Failure::usage(format!(
            "--decisions is for a single replay and these are {}; name one trace, policy, base, budget, start and order",
            plan.trials()
        )));
    }
    let picture = arguments.plot.as_deref().map(Output::picture).transpose()?;
    plan.look_for_traces().map_err(Failure::failed)?;
    if is_one { one(arguments, &plan, picture) } else { many(arguments, plan, picture) }
}

/// Runs the only replay and writes down or draws what it did.
fn one(arguments: &ReplayArguments, plan: &Plan, picture: Option<Output>) -> Result<Exit, Failure> {
    let file = arguments.decisions.as_deref().map(|path| Output::create(path, &plan.traces)).transpose()?;
    let made = trials::run_one(plan, |trace, shuffle| {
        let decisions = file.is_some().then(|| Decisions::new(shuffle.clone()));
        (decisions, picture.is_some().then(|| Series::new(trace)))
    });
    let (trial, (decisions, series)) = made.map_err(Failure::failed)?;
    warn(&[&trial]);
    if arguments.json {
        say_line(&trial);
    } else {
        console::say(format_args!("{}", report::table(&[&trial])));
    }
    if let (Some(file), Some(decisions)) = (file, decisions) {
        file.write(decisions.text(trial.outcome.stop_round).as_bytes())?;
    }
    if let (Some(picture), Some(series)) = (picture, series) {
        picture.draw(plot::over_time(&trial, &series))?;
    }
    Ok(Exit::Done)
}

/// Says of which traces the clock does not agree with the rounds.
fn warn(trials: &[&Trial]) {
    let mut said = None;
    for trial in trials {
        if said.replace(&trial.trace) != Some(&trial.trace) {
            warn_of_missed_rounds(&trial.trace, trial.rounds_missed, trial.rounds);
        }
    }
}

/// Runs all replays, shows each and what they come down to.
fn many(arguments: &ReplayArguments, mut plan: Plan, picture: Option<Output>) -> Result<Exit, Failure> {
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
    let summaries = summary::summarise(&trials, &asked_for);
    let shown: Vec<&Trial> = trials.iter().filter(|trial| asked_for.contains(&trial.contender)).collect();
    warn(&shown);
    match (arguments.json, arguments.summary) {
        (true, true) => console::say(format_args!("{}", json!({ "summary": summaries }))),
        (true, false) => {}
        (false, true) => console::say(format_args!("{}", summary::table(&summaries))),
        (false, false) => {
            console::say(format_args!("{}\n{}", report::table(&shown), summary::table(&summaries)));
        }
    }
    if let Some(picture) = picture {
        picture.draw(plot::comparison(&shown, &summaries))?;
    }
    Ok(Exit::Done)
}

fn say_line(trial: &Trial) {
    console::say(format_args!("{}", report::Line::of(trial).to_json()));
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
