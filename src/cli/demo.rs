//! `pagecast demo`: a guest, a live migration and the proof, on one machine without Xen.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;

use super::children::{Folder, Process, pagecast, start_receiver};
use super::options::{GuestOptions, MigrationOptions, OutputOptions, Rate};
use super::send::at_source;
use super::{Exit, Failure, interrupted, units};
use crate::forecast::{OnNoConvergence, PolicyKind};
use crate::guest::arena::client::ArenaGuest;
use crate::pipeline::batch::BATCH_PAGES;
use crate::pipeline::control::migrate;
use crate::pipeline::lanes;
use crate::pipeline::settings::Settings;
use crate::report::progress::Display;
use crate::report::{GuestSide, Report, json, ms, table};
use crate::sys::console;

/// What the demonstration's link carries unless told otherwise: slow enough that the order of the pages matters.
const LINK: &str = "2.5Gbit";

/// How long a guest may take to start.
const START: Duration = Duration::from_secs(120);

/// What an interrupted demonstration says while its guest is where it was started.
const BEFORE: &str = "interrupted before the migration";

#[derive(Args)]
#[command(mut_arg("bandwidth", |option| option.default_value(LINK)))]
pub struct DemoArguments {
    #[command(flatten)]
    guest: GuestOptions,
    #[command(flatten)]
    migration: MigrationOptions,
    #[command(flatten)]
    output: OutputOptions,
    /// Migrate under this policy only: ar, heat, paper, xen-skip or xen
    #[arg(long, conflicts_with = "compare")]
    policy: Option<PolicyKind>,
    /// Migrate the same guest under ar, xen, xen-skip and paper and show them side by side
    #[arg(long)]
    compare: bool,
    /// How long the guest runs before it is migrated
    #[arg(long, default_value = "2s", value_parser = units::time)]
    warm_up: Duration,
    /// How long the guest runs on at the destination
    #[arg(long, default_value = "1s", value_parser = units::time)]
    run_on: Duration,
    /// Do not compare every page at the switch-over
    #[arg(long)]
    no_verify: bool,
    /// Write the stream, as it was received, to a file
    #[arg(long, value_name = "FILE")]
    capture: Option<PathBuf>,
}

impl DemoArguments {
    /// The policies to run, in this order.
    fn policies(&self) -> Vec<PolicyKind> {
        match self.policy {
            Some(policy) => vec![policy],
            None if self.compare => {
                vec![PolicyKind::Ar, PolicyKind::XenSkip, PolicyKind::Xen, PolicyKind::Paper]
            }
            None => vec![PolicyKind::Ar, PolicyKind::XenSkip, PolicyKind::Xen],
        }
    }
}

pub fn run(arguments: &DemoArguments) -> Result<Exit, Failure> {
    arguments.guest.nr_pages().map_err(Failure::usage)?;
    let migration = &arguments.migration;
    let settings = |policy| migration.settings(policy, !arguments.no_verify).map_err(Failure::usage);
    let settings = arguments.policies().into_iter().map(settings).collect::<Result<Vec<_>, _>>()?;
    migration.check_capture(arguments.capture.as_deref())?;
    let abort = interrupted()?;
    let mut reports = Vec::new();
    for (index, settings) in settings.iter().enumerate() {
        // The captured stream is that of the first policy.
        let capture = arguments.capture.as_deref().filter(|_| index == 0);
        if !arguments.output.json {
            introduce(arguments, settings, index == 0);
        }
        let report = one(arguments, settings, capture, &abort)?;
        if arguments.output.json {
            console::say(format_args!("{}", json::report(&report)));
        } else if index == 0 || report.guest.is_some_and(|guest| guest.errors > 0) {
            console::say(format_args!("{}", table::one(&report)));
        }
        reports.push(report);
    }
    if reports.len() > 1 && !arguments.output.json {
        console::say(format_args!(
            "\nthe same guest under each policy (!: longer than the downtime allowed)"
        ));
        console::say(format_args!("{}", table::side_by_side(&reports)));
        console::say(format_args!("{}", table::savings(&reports)));
    }
    let damaged = reports.iter().any(|report| report.guest.is_none_or(|guest| guest.errors > 0));
    Ok(if damaged { Exit::Damaged } else { Exit::Done })
}

fn introduce(arguments: &DemoArguments, settings: &Settings, first: bool) {
    if first {
        let guest = &arguments.guest;
        let link = match arguments.migration.bandwidth {
            Rate(Some(bytes_per_s)) => format!("{:.2} Gbit/s", bytes_per_s as f64 * 8.0 / 1e9),
            Rate(None) => "unlimited".to_owned(),
        };
        console::say(format_args!(
            "guest: {} MiB, {} % zero pages, workload {} ({}), seed {}",
            guest.memory >> 20,
            guest.zero_share,
            guest.workload,
            guest.workload.describe(),
            guest.seed
        ));
        console::say(format_args!(
            "link: {link}; downtime budget {:.0} ms; threads pinned {}",
            ms(settings.downtime_budget),
            settings.pins
        ));
        if settings.on_no_convergence != OnNoConvergence::Stop {
            console::say(format_args!(
                "if the budget cannot be met, or is not after {} s: {} (policies ar and heat; the others end by their own \
                 rules)",
                settings.max_time.as_secs_f64(),
                settings.on_no_convergence
            ));
        }
        console::say(format_args!(
            "limits: {} slots of {} KiB and rings of {} batches of {} pages a lane; forecast state 3 bytes a page of chunks that were written",
            settings.slots,
            lanes::slot_bytes() / 1024,
            lanes::BATCH_RING,
            BATCH_PAGES
        ));
    }
    console::say(format_args!(
        "\npolicy {}: starting the guest, migrating it after {:?}",
        settings.policy, arguments.warm_up
    ));
}

/// Starts a guest, migrates it under one policy and lets it run on.
fn one(
    arguments: &DemoArguments,
    settings: &Settings,
    capture: Option<&Path>,
    abort: &AtomicBool,
) -> Result<Report, Failure> {
    let folder = Folder::new()?;
    let (source, destination) = (folder.0.join("source"), folder.0.join("destination"));
    let mut command = pagecast("guest")?;
    command.args(arguments.guest.to_args()).arg("--socket").arg(&source).stdout(Stdio::null());
    let mut guest_process = Process::start(&mut command)?;
    let mut guest = wait_for_guest(&source, &mut guest_process, abort)?;
    let (receiver, address) = start_receiver(&destination, capture)?;

    sleep(arguments.warm_up / 4, abort, BEFORE)?;
    let (early, _) = guest.stats().map_err(Failure::failed)?;
    sleep(arguments.warm_up * 3 / 4, abort, BEFORE)?;
    let (before, _) = guest.stats().map_err(Failure::failed)?;
    let time = before.guest_time.saturating_sub(early.guest_time).as_secs_f64();
    let writes_per_s_before =
        if time > 0.0 { before.writes.saturating_sub(early.writes) as f64 / time } else { 0.0 };

    let mut display = Display::new(arguments.output.json);
    let result = migrate(&mut guest, settings, &address, abort, &mut display);
    display.done();
    let migration = result.map_err(|error| at_source(error, &mut guest, arguments.output.json))?;
    let _ = guest.quit();

    let moved = ArenaGuest::connect_within(&destination, START).map_err(Failure::failed)?;
    let (arrived, _) = moved.stats().map_err(Failure::failed)?;
    sleep(arguments.run_on, abort, "interrupted after the migration; the guest ran on at the destination")?;
    let check = moved.check().map_err(Failure::failed)?;
    let (after, running) = moved.stats().map_err(Failure::failed)?;
    if !running || !check.complete || after.writes <= arrived.writes {
        return Err(Failure::failed("the guest does not run at the destination"));
    }
    let _ = moved.quit();
    drop(receiver);
    Ok(Report {
        policy: settings.policy,
        workload: arguments.guest.workload.to_string(),
        seed: arguments.guest.seed,
        budget_ms: ms(settings.downtime_budget),
        migration,
        guest: Some(GuestSide {
            errors: after.errors,
            checked_pages: check.pages,
            writes_since: after.writes.saturating_sub(arrived.writes),
            writes_per_s_before,
        }),
    })
}

/// Connects to a guest as soon as it is there, or says why it will not be.
fn wait_for_guest(socket: &Path, process: &mut Process, abort: &AtomicBool) -> Result<ArenaGuest, Failure> {
    let since = Instant::now();
    loop {
        match ArenaGuest::connect(socket) {
            Ok(guest) => return Ok(guest),
            Err(error) if since.elapsed() > START => return Err(Failure::failed(error)),
            Err(_) => {}
        }
        if let Ok(Some(_)) = process.0.try_wait() {
            return Err(Failure::failed("the guest ended before it could be migrated"));
        }
        sleep(Duration::from_millis(10), abort, BEFORE)?;
    }
}

/// Errs with `interrupted` as soon as `abort` is set.
fn sleep(time: Duration, abort: &AtomicBool, interrupted: &str) -> Result<(), Failure> {
    let since = Instant::now();
    while since.elapsed() < time {
        if abort.load(Ordering::Acquire) {
            return Err(Failure { exit: Exit::Aborted, message: interrupted.to_owned() });
        }
        std::thread::sleep(Duration::from_millis(20).min(time.saturating_sub(since.elapsed())));
    }
    Ok(())
}
