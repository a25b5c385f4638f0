//! `pagecast mirror`: moves the image of a running process through the whole pipeline and compares it at the stop.

use std::path::PathBuf;

use clap::Args;

use super::children::{Folder, Process, start_receiver};
use super::options::{MemoryOptions, MigrationOptions, OutputOptions};
use super::{Exit, Failure, interrupted, units};
use crate::forecast::PolicyKind;
use crate::guest::process::control::ProcessGuest;
use crate::guest::process::proc;
use crate::pipeline::control::migrate;
use crate::pipeline::outcome::{Migration, MigrationError};
use crate::report::progress::Display;
use crate::report::{Report, json, ms, table};
use crate::sys::console;

const NOTES: &str = "\
The process runs on here, whatever happens: it is stopped (SIGSTOP) for the downtime and the comparison, and continued. Its
image cannot run at the far side: there it is compared page by page and dropped. docs/record.md says what the image is.";

#[derive(Args)]
#[command(after_help = NOTES)]
pub struct MirrorArguments {
    /// The running process
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Where `pagecast receive` is waiting [default: a receiver of our own on this host]
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<String>,
    /// Which page goes next: ar, heat, paper, xen-skip or xen
    #[arg(long, default_value = "ar")]
    policy: PolicyKind,
    #[command(flatten)]
    memory: MemoryOptions,
    /// Room for the image [default: what is mapped at the start and some growth]
    #[arg(long, value_parser = units::size)]
    image_size: Option<u64>,
    /// Write the stream, as it was received, to a file
    #[arg(long, value_name = "FILE", conflicts_with = "to")]
    capture: Option<PathBuf>,
    #[command(flatten)]
    migration: MigrationOptions,
    #[command(flatten)]
    output: OutputOptions,
}

pub fn run(arguments: &MirrorArguments) -> Result<Exit, Failure> {
    let settings = arguments.migration.settings(arguments.policy, true).map_err(Failure::usage)?;
    arguments.migration.check_capture(arguments.capture.as_deref())?;
    let abort = interrupted()?;
    let pid = arguments.pid;
    let name = proc::name(pid).unwrap_or_else(|| format!("process {pid}"));
    let json = arguments.output.json;
    let mut guest = ProcessGuest::attach(pid, arguments.memory.of_image(), arguments.image_size)
        .map_err(Failure::failed)?;
    let own: Option<(Folder, Process, String)> = match &arguments.to {
        Some(_) => None,
        None => {
            let folder = Folder::new()?;
            let (process, address) = start_receiver(&folder.0.join("image"), arguments.capture.as_deref())?;
            Some((folder, process, address))
        }
    };
    let destination = match (&arguments.to, &own) {
        (Some(address), _) | (None, Some((_, _, address))) => address.clone(),
        (None, None) => return Err(Failure::usage("there is nowhere to send to")),
    };
    let mut display = Display::new(json);
    let result = migrate(&mut guest, &settings, &destination, &abort, &mut display);
    display.done();
    let migration = result.map_err(|error| {
        explain(&guest, &error);
        let convergence = error.convergence().cloned();
        let mut failure = Failure::from(error);
        failure.message = format!("{}; process {pid} runs on", failure.message);
        if json {
            console::say(format_args!("{}", json::failed(&failure.message, convergence.as_ref())));
        }
        failure
    })?;
    let report = Report {
        policy: arguments.policy,
        workload: name,
        seed: 0,
        budget_ms: ms(settings.downtime_budget),
        migration,
        guest: None,
    };
    if json {
        console::say(format_args!("{}", json::report(&report)));
        console::say(format_args!("{}", json::mirrored(&mirrored(&guest, pid, &report.migration))));
    } else {
        console::say(format_args!("{}", table::one(&report)));
        let mirrored = mirrored(&guest, pid, &report.migration);
        console::say(format_args!(
            "image of process {pid} and {} more: {} pages populated, {} of {} compared, none differs; it runs on here",
            mirrored.processes.saturating_sub(1),
            mirrored.pages_populated,
            mirrored.pages_verified,
            report.migration.pages
        ));
        if mirrored.processes_not_attached > 0 || mirrored.mappings_skipped > 0 {
            console::say(format_args!(
                "NOT in the image: {} processes that could not be attached to, {} mappings that could not be tracked",
                mirrored.processes_not_attached, mirrored.mappings_skipped
            ));
        }
        console::say(format_args!("the destination says of the image: {}", mirrored.destination_said));
    }
    Ok(Exit::Done)
}

/// Says what is known of the pages that differ, if that is why the destination refused the image.
fn explain(guest: &ProcessGuest, error: &MigrationError) {
    let Some(lines) = guest.differences().filter(|_| matches!(error, MigrationError::Destination { .. }))
    else {
        return;
    };
    for line in lines {
        console::complain(format_args!("{line}"));
    }
    if lines.is_empty() {
        console::complain(format_args!(
            "every page was last sent as it was compared: what differs went wrong after it was read"
        ));
    }
}

fn mirrored(guest: &ProcessGuest, pid: i32, migration: &Migration) -> json::Mirrored {
    let toll = guest.image().toll();
    json::Mirrored {
        pid,
        processes: guest.image().processes().len(),
        processes_not_attached: toll.not_attached,
        mappings_skipped: toll.skipped_mappings,
        stopped_most_ms: ms(toll.stopped_most),
        pages_populated: guest.image().populated_pages(),
        pages_verified: migration.verified_pages,
        destination_said: guest.farewell().unwrap_or("nothing").to_owned(),
    }
}
