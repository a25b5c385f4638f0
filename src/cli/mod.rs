//! The command line: one file for each subcommand.
//!
//! Exit codes, the same for all subcommands, are those of [`Exit`].

mod bound;
mod children;
mod demo;
mod guest;
mod inspect;
mod mirror;
mod model;
mod options;
mod output;
mod probe;
mod receive;
mod record;
mod replay;
mod send;
mod take_back;
pub mod units;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};

use crate::pipeline::outcome::MigrationError;
use crate::sys::console;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: what was asked for was done.
    Done = 0,
    /// 1: it failed; a guest that was to move runs on at the source.
    Failed = 1,
    /// 2: the command line makes no sense; nothing was touched.
    Usage = 2,
    /// 3: interrupted, out of time or without hope to converge; the guest runs on at the source.
    Aborted = 3,
    /// 4: the guest found errors in its memory: pagecast has damaged it. This is a bug.
    Damaged = 4,
}

/// What was wrong, in one line, and how the run ends because of it.
struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    fn failed(message: impl std::fmt::Display) -> Self {
        Failure { exit: Exit::Failed, message: message.to_string() }
    }

    fn usage(message: impl std::fmt::Display) -> Self {
        Failure { exit: Exit::Usage, message: message.to_string() }
    }
}

impl From<MigrationError> for Failure {
    fn from(error: MigrationError) -> Self {
        let exit = match error {
            MigrationError::Aborted { .. } | MigrationError::NoConvergence { .. } => Exit::Aborted,
            _ => Exit::Failed,
        };
        Failure { exit, message: error.to_string() }
    }
}

const AFTER_HELP: &str = "\
Exit codes: 0 done; 1 failed, 3 interrupted, or called off by --on-no-convergence abort (in these cases the guest
runs on at the source); 2 bad usage; 4 the migrated guest found errors in its memory.";

/// Live migration that forecasts when each page will be written next
#[derive(Parser)]
#[command(name = "pagecast", version, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Try it: start a guest, migrate it live to a second process, check every page, compare the policies
    Demo(demo::DemoArguments),
    /// Run an embedded guest, to be migrated with `send`
    Guest(guest::GuestArguments),
    /// Migrate an embedded guest to a host where `receive` is waiting
    Send(send::SendArguments),
    /// Wait for a guest and run it
    Receive(receive::ReceiveArguments),
    /// Run a guest at the source again whose hand-over cannot be settled because the destination is gone for good
    TakeBack(take_back::TakeBackArguments),
    /// Run policies over recorded dirty-page traces and compare them with the least possible
    Replay(replay::ReplayArguments),
    /// Show what no policy could do better on a recorded trace, and whether pre-copy can converge at all
    Bound(bound::BoundArguments),
    /// Send the image of a running process through the whole pipeline and compare it at the stop
    Mirror(mirror::MirrorArguments),
    /// Record which pages a process, a command or a guest writes
    Record(record::RecordArguments),
    /// Check a migration stream by strict rules, say what is in it, and compare it with another
    Inspect(inspect::InspectArguments),
    /// Show what this host offers
    Probe(probe::ProbeArguments),
}

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    // What these say is all that they do.
    let tells = matches!(
        arguments.command,
        Command::Replay(_) | Command::Bound(_) | Command::Record(_) | Command::Inspect(_) | Command::Probe(_)
    );
    let result = match arguments.command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Guest(arguments) => guest::run(&arguments),
        Command::Send(arguments) => send::run(&arguments),
        Command::Receive(arguments) => receive::run(&arguments),
        Command::TakeBack(arguments) => take_back::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Bound(arguments) => bound::run(&arguments),
        Command::Mirror(arguments) => mirror::run(&arguments),
        Command::Record(arguments) => record::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Probe(arguments) => probe::run(&arguments),
    };
    let result = match console::lost() {
        Some(error) if tells && result.is_ok() => Err(Failure::failed(format!(
            "cannot write to standard output: {error}; not all of it was written"
        ))),
        _ => result,
    };
    let exit = result.unwrap_or_else(|failure| {
        console::complain(format_args!("pagecast: {}", failure.message));
        failure.exit
    });
    ExitCode::from(exit as u8)
}

/// Help and version as clap has them; an error as one line.
fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { Exit::Done as u8 });
    }
    let text = error.to_string();
    let said: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"))
        .filter(|l| !l.is_empty())
        .collect();
    let said = said.join("; ").replace("For more information, try '--help'.", "");
    let said = said.trim_start_matches("error: ").trim_end_matches("; ");
    console::complain(format_args!("pagecast: {said}; see `pagecast --help`"));
    ExitCode::from(Exit::Usage as u8)
}

/// How long after the first signal another is taken for the same one: many who start a program signal it and its group.
const ECHO: Duration = Duration::from_millis(100);

/// What a signal asks for after those that came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    ToEnd,
    Nothing,
    ToEndAtOnce,
}

/// What a signal that comes `now` asks for; `first` is when the first one came.
fn asked(first: &mut Option<Instant>, now: Instant) -> Asked {
    match first {
        None => {
            *first = Some(now);
            Asked::ToEnd
        }
        Some(first) if now.saturating_duration_since(*first) < ECHO => Asked::Nothing,
        Some(_) => Asked::ToEndAtOnce,
    }
}

/// A flag that Ctrl-C and SIGTERM set. Another one, later, ends the process on the spot; folders for sockets are removed.
fn interrupted() -> Result<Arc<AtomicBool>, Failure> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    let mut first = None;
    // Called by an ordinary thread.
    ctrlc::set_handler(move || match asked(&mut first, Instant::now()) {
        Asked::ToEnd => set.store(true, Ordering::SeqCst),
        Asked::Nothing => {}
        Asked::ToEndAtOnce => {
            console::complain(format_args!("pagecast: interrupted again: ends at once"));
            children::remove_folders(|| std::process::exit(Exit::Aborted as i32));
        }
    })
    .map_err(|error| Failure::failed(format!("cannot watch for Ctrl-C: {error}")))?;
    Ok(flag)
}

/// Ends this process when the one that started it ends.
fn die_with_parent() -> Result<(), Failure> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| Failure::failed(format!("cannot tie this process to its parent: {error}")))?;
    if rustix::process::getppid() != parent {
        return Err(Failure::failed("the process that started this one has gone"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_comes_twice_at_a_time_is_one_and_a_later_one_is_another() {
        let (mut first, start) = (None, Instant::now());
        let mut after = |ms| asked(&mut first, start + Duration::from_millis(ms));
        assert_eq!(after(0), Asked::ToEnd);
        assert_eq!(after(0), Asked::Nothing);
        assert_eq!(after(99), Asked::Nothing);
        assert_eq!(after(100), Asked::ToEndAtOnce);
    }
}
