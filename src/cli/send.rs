//! `pagecast send`: migrates a guest to where `pagecast receive` is waiting.

use std::path::PathBuf;

use clap::Args;

use super::options::{MigrationOptions, OutputOptions};
use super::{Exit, Failure, interrupted};
use crate::forecast::PolicyKind;
use crate::guest::GuestControl;
use crate::guest::arena::client::ArenaGuest;
use crate::pipeline::control::migrate;
use crate::pipeline::outcome::MigrationError;
use crate::report::progress::Display;
use crate::report::{Report, json, ms, table};
use crate::sys::console;

#[derive(Args)]
pub struct SendArguments {
    /// The control socket of the guest to move
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Where `pagecast receive` is waiting
    #[arg(value_name = "HOST:PORT")]
    destination: String,
    /// Which page goes next: ar, heat, paper, xen-skip or xen
    #[arg(long, default_value = "ar")]
    policy: PolicyKind,
    /// Compare every page at the switch-over, with the guest stopped
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    migration: MigrationOptions,
    #[command(flatten)]
    output: OutputOptions,
}

pub fn run(arguments: &SendArguments) -> Result<Exit, Failure> {
    let settings =
        arguments.migration.settings(arguments.policy, arguments.verify).map_err(Failure::usage)?;
    let mut guest = ArenaGuest::connect(&arguments.socket).map_err(Failure::failed)?;
    let abort = interrupted()?;
    let mut display = Display::new(arguments.output.json);
    let result = migrate(&mut guest, &settings, &arguments.destination, &abort, &mut display);
    display.done();
    let migration = result.map_err(|error| at_source(error, &mut guest, arguments.output.json))?;
    let report = Report {
        policy: arguments.policy,
        workload: guest.workload().to_owned(),
        seed: guest.seed(),
        budget_ms: ms(settings.downtime_budget),
        migration,
        guest: None,
    };
    if arguments.output.json {
        console::say(format_args!("{}", json::report(&report)));
    } else {
        console::say(format_args!("{}", table::one(&report)));
    }
    let _ = guest.quit();
    Ok(Exit::Done)
}

/// The failure, with what is known of the guest; as a line of JSON too if so wanted.
pub fn at_source(error: MigrationError, guest: &mut ArenaGuest, json: bool) -> Failure {
    let convergence = error.convergence().cloned();
    let mut failure = Failure::from(error);
    failure.message = match guest.work_done().and_then(|_| guest.stats()) {
        Ok((_, true)) => format!("{}; the guest runs on at the source", failure.message),
        Ok((_, false)) => format!("{}; the guest is suspended at the source", failure.message),
        Err(error) => format!("{}; and the source guest cannot be asked: {error}", failure.message),
    };
    if json {
        console::say(format_args!("{}", json::failed(&failure.message, convergence.as_ref())));
    }
    failure
}
