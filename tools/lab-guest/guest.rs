//! The guest's loop.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use pagecast::guest::arena::{Fault, Machine, MachineError};
use pagecast::page::PAGE_SIZE;
use pagecast::sys::console::say;
use pagecast::sys::guest_memory::GuestMemory;

use crate::clocks::{Moment, Silence};
use crate::settings::Settings;

/// The longest sleep between two turns: it bounds how finely a silence is measured.
const LONGEST_NAP: Duration = Duration::from_millis(5);

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The kernel has not so much memory.
    #[error("cannot take {mib} MiB of memory: {source}; give the guest more, or say memory=…")]
    Memory {
        /// What was wanted.
        mib: u64,
        /// What the kernel says.
        source: io::Error,
    },
    /// The machine cannot be made so.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Runs until the time is over, if there is an end to it; returns the number of errors found.
pub fn run(settings: &Settings) -> Result<u64, GuestError> {
    let mib = settings.memory_bytes >> 20;
    let nr_pages = settings.memory_bytes / PAGE_SIZE as u64;
    let memory = GuestMemory::create(nr_pages).map_err(|source| GuestError::Memory { mib, source })?;
    // All of it now: too little memory is to be seen at the start, and not in the middle of a migration.
    memory.populate().map_err(|source| GuestError::Memory { mib, source })?;
    let mut writer = memory.writer().expect("a memory just made has no other writer");
    let mut machine = Machine::boot(writer.bytes(), &settings.spec)?;
    let spec = machine.spec();
    say(format_args!(
        "lab-guest: ready pages={nr_pages} owned={} workload={} rate={} seed={}",
        machine.owned_pages(),
        spec.workload,
        spec.effective_rate(),
        spec.seed
    ));

    let begin = Moment::now();
    let mut console = Console { begin, last_report: begin, sequence: 0, errors_told: 0, full_checks: 0 };
    let mut silence = Silence::default();
    let mut last = begin;
    loop {
        let now = Moment::now();
        let gap = now.since(last);
        last = now;
        let suspended = silence.add(gap);
        let advance = machine.advance(gap.awake, &mut || true);
        if suspended {
            // What is lost or stale after a move is found before the workload covers it up.
            console.full_check(&mut machine, &silence);
            last = Moment::now();
        }
        if suspended || now.since(console.last_report).all >= settings.report {
            console.report(&machine, now, &mut silence);
        }
        if settings.run_for.is_some_and(|time| now.since(begin).all >= time) {
            console.full_check(&mut machine, &silence);
            return Ok(machine.stats().errors);
        }
        sleep(advance.next_due_in.min(LONGEST_NAP));
    }
}

/// What has been said so far.
struct Console {
    begin: Moment,
    last_report: Moment,
    sequence: u64,
    errors_told: u64,
    full_checks: u64,
}

impl Console {
    fn report(&mut self, machine: &Machine, now: Moment, silence: &mut Silence) {
        self.tell_errors(machine);
        let stats = machine.stats();
        say(format_args!(
            "lab-guest: seq={} t_ms={} writes={} checked={} errors={} silence_ms={} awake_silence_ms={} \
             longest_silence_ms={} suspends={} full_checks={}",
            self.sequence,
            now.since(self.begin).all.as_millis(),
            stats.writes,
            stats.checks,
            stats.errors,
            silence.recent.as_millis(),
            silence.recent_awake.as_millis(),
            silence.longest.as_millis(),
            silence.suspends,
            self.full_checks,
        ));
        silence.reset_recent();
        self.sequence += 1;
        self.last_report = now;
    }

    /// A line for each error found since the last time. The machine keeps the first few in full and counts the rest.
    fn tell_errors(&mut self, machine: &Machine) {
        let stats = machine.stats();
        for number in self.errors_told..stats.errors {
            match stats.first_errors.get(number as usize) {
                Some(fault) => tell(fault),
                None => say(format_args!("lab-guest: error number {} (not kept in full)", number + 1)),
            }
        }
        self.errors_told = stats.errors;
    }

    fn full_check(&mut self, machine: &mut Machine, silence: &Silence) {
        let begin = Moment::now();
        let report = machine.check_all(&mut || true);
        self.full_checks += 1;
        self.tell_errors(machine);
        say(format_args!(
            "lab-guest: full-check pages={} errors={} took_ms={} suspends={}",
            report.pages,
            report.errors,
            Moment::now().since(begin).awake.as_millis(),
            silence.suspends,
        ));
    }
}

fn tell(fault: &Fault) {
    say(format_args!("lab-guest: error {fault}"));
}
