//! Options of what is asked of recorded traces: links, budgets and starts.

use std::time::Duration;

use clap::Args;

use super::options::{Rate, parse_rate};
use super::units;
use crate::pipeline::scanner::WIRE_BYTES_PER_PAGE;
use crate::sys::console;
use crate::trace::trials::{LinkSpeed, Start};

/// A trace that lacks one round in so many is too fast to be passed over in silence.
const NOTABLE: u64 = 100;

/// The model's parameters; every combination of them is meant.
#[derive(Args, Clone, Debug)]
pub struct ModelOptions {
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
}

impl ModelOptions {
    /// The links.
    pub fn links(&self) -> Result<Vec<LinkSpeed>, String> {
        if self.bandwidth.is_empty() {
            if self.base.iter().any(Duration::is_zero) {
                return Err("--base is to be more than nothing".to_owned());
            }
            return Ok(self.base.iter().map(|base| LinkSpeed::Base(base.as_secs_f64())).collect());
        }
        let speed = |rate: &Rate| match rate.0 {
            Some(bytes_per_s) => Ok(LinkSpeed::PagesPerS(bytes_per_s as f64 / WIRE_BYTES_PER_PAGE)),
            None => Err("--bandwidth is to be a rate here, such as 2.5Gbit".to_owned()),
        };
        self.bandwidth.iter().map(speed).collect()
    }

    /// The downtime budgets, in seconds.
    pub fn budgets_s(&self) -> Vec<f64> {
        self.budget.iter().map(Duration::as_secs_f64).collect()
    }

    /// The starts.
    pub fn starts(&self) -> Vec<Start> {
        self.starts.clone()
    }
}

fn start(text: &str) -> Result<Start, String> {
    let parsed = match text.split_once('/') {
        None => text.parse().ok().map(Start::Round),
        Some((part, whole)) => match (part.parse::<u32>(), whole.parse::<u32>()) {
            (Ok(part), Ok(whole)) if part < whole => Some(Start::Fraction { part, whole }),
            _ => None,
        },
    };
    parsed.ok_or_else(|| {
        format!("{text:?} is no start; write a fraction below 1, such as 3/8, or a round, such as 150")
    })
}

/// Says that a replay of a trace is faster than what was recorded, if it lacks rounds.
pub fn warn_of_missed_rounds(trace: &str, missed: u64, rounds: usize) {
    if missed * NOTABLE > rounds as u64 {
        console::complain(format_args!(
            "pagecast: {trace}: {missed} rounds are missing between the {rounds} that there are, and are left out: in less time the \
             guest writes as much; record with a longer --period"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_fraction_or_a_round() {
        assert_eq!(start("3/8"), Ok(Start::Fraction { part: 3, whole: 8 }));
        assert_eq!(start("150"), Ok(Start::Round(150)));
        for wrong in ["8/8", "1/0", "half", "-1", "0.5"] {
            assert!(start(wrong).unwrap_err().contains("3/8"), "{wrong}");
        }
    }
}
