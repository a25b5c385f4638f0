//! `pagecast record`: writes a dirty-page trace of a process, a command or a guest.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::Args;

use super::options::{MemoryOptions, OutputOptions};
use super::{Exit, Failure, interrupted, units};
use crate::guest::arena::client::ArenaGuest;
use crate::guest::process::proc;
use crate::guest::process::tracker::{Choice, Tracker};
use crate::report::progress::RecordingDisplay;
use crate::report::recording;
use crate::sys::{console, cpu, fault_cost};
use crate::trace::record::{GuestSubject, RecordError, Recording, Settings, Subject, record};
use crate::trace::writer::{Heading, TraceWriter};

/// How long a command may take to end when it is asked to.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Mappings below this are left out: 256 KiB.
const DEFAULT_MIN_MAPPING: u64 = 256 << 10;

const EXAMPLES: &str = "\
Examples:
  pagecast record --out redis.pct.zst --pid $(pidof redis-server) --duration 60s
  pagecast record --out java.pct.zst --period 20ms -- java -Xmx1g Churn
  pagecast record --out pg.pct.zst --pid $(head -1 postmaster.pid) --children --shared

The target runs on untouched, also when pagecast is killed: one of its threads is stopped for about a tenth of a
millisecond, and each page's first write in a round costs it a fault of about a microsecond. A command is ended with
SIGTERM when its time is up, unless it is to be left running. docs/record.md says what is seen and what is not.";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct RecordArguments {
    /// The file to write; compressed if its name ends in .zst
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    subject: SubjectOptions,
    /// For how long; Ctrl-C ends it sooner, with a complete file
    #[arg(long, default_value = "60s", value_parser = units::time)]
    duration: Duration,
    /// Time between two rounds
    #[arg(long, default_value = "50ms", value_parser = units::time)]
    period: Duration,
    #[command(flatten)]
    memory: MemoryOptions,
    /// What the trace says it is of [default: the target's name]
    #[arg(long)]
    name: Option<String>,
    /// Run before all other processes (SCHED_FIFO), for even rounds on a busy host
    #[arg(long)]
    realtime: bool,
    /// Leave the command running at the end
    #[arg(long, requires = "command")]
    leave_running: bool,
    #[command(flatten)]
    output: OutputOptions,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct SubjectOptions {
    /// A running process
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// An embedded guest, by its control socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A command to start, in a process group of its own; what it says goes to standard error
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub fn run(arguments: &RecordArguments) -> Result<Exit, Failure> {
    let abort = interrupted()?;
    if arguments.period < Duration::from_millis(1) || arguments.period > Duration::from_secs(60) {
        return Err(Failure::usage("--period is to be from 1ms to 60s"));
    }
    if arguments.duration < arguments.period {
        return Err(Failure::usage("--duration is to be one --period at least"));
    }
    let subject = &arguments.subject;
    if let Some(socket) = &subject.socket {
        let memory = &arguments.memory;
        if memory.children || memory.shared || memory.stack || memory.min_mapping.is_some() {
            return Err(Failure::usage(
                "--children, --shared, --stack and --min-mapping are for processes and not for a guest (--socket)",
            ));
        }
        let mut guest = ArenaGuest::connect(socket).map_err(Failure::failed)?;
        let name = format!("arena guest, {}, seed {}", guest.workload(), guest.seed());
        let writer = begin(arguments, &name)?;
        let mut subject = GuestSubject::start(&mut guest).map_err(Failure::failed)?;
        return run_on(arguments, &mut subject, writer, &abort).map(|_| Exit::Done);
    }
    if let Some(pid) = subject.pid {
        let name = proc::name(pid).unwrap_or_else(|| format!("process {pid}"));
        let writer = begin(arguments, &name)?;
        let mut tracker = Tracker::attach(pid, choice(&arguments.memory)).map_err(Failure::failed)?;
        return run_on(arguments, &mut tracker, writer, &abort).map(|_| Exit::Done);
    }
    run_command(arguments, &abort)
}

/// What can be written of it.
fn choice(memory: &MemoryOptions) -> Choice {
    memory.choice(DEFAULT_MIN_MAPPING, false)
}

/// Begins the trace, before anything is started or attached to for it.
fn begin(arguments: &RecordArguments, name: &str) -> Result<TraceWriter, Failure> {
    let heading = Heading {
        name: arguments.name.clone().unwrap_or_else(|| name.to_owned()),
        period_us: (arguments.period.as_micros() as u32).max(1),
    };
    TraceWriter::create(&arguments.out, &heading).map_err(Failure::failed)
}

fn run_on(
    arguments: &RecordArguments,
    subject: &mut dyn Subject,
    writer: TraceWriter,
    abort: &AtomicBool,
) -> Result<Recording, Failure> {
    let fault_cost = fault_cost::measure().ok();
    cpu::sharpen_timers();
    if arguments.realtime {
        cpu::run_in_real_time()
            .map_err(|error| Failure::failed(format!("cannot run in real time (--realtime): {error}")))?;
    }
    let settings = Settings { period: arguments.period, duration: arguments.duration };
    let json = arguments.output.json;
    let mut display = RecordingDisplay::new(json);
    let result = record(subject, &settings, writer, abort, &mut |status| display.status(status));
    display.done();
    let recording = result.map_err(|error| match error {
        RecordError::Interrupted => Failure { exit: Exit::Aborted, message: error.to_string() },
        _ => Failure::failed(error),
    })?;
    let path = arguments.out.display().to_string();
    let bytes = std::fs::metadata(&arguments.out).map_or(0, |file| file.len());
    if json {
        console::say(format_args!("{}", recording::report(&recording, &path, bytes, fault_cost)));
    } else {
        console::say(format_args!("{}", recording::table(&recording, &path, bytes, fault_cost)));
    }
    Ok(recording)
}

fn run_command(arguments: &RecordArguments, abort: &AtomicBool) -> Result<Exit, Failure> {
    let writer = begin(arguments, &arguments.subject.command.join(" "))?;
    let mut child = start(&arguments.subject.command)?;
    let pid = child.id() as i32;
    let result = Tracker::attach(pid, choice(&arguments.memory))
        .map_err(Failure::failed)
        .and_then(|mut tracker| run_on(arguments, &mut tracker, writer, abort));
    if arguments.leave_running {
        if let Ok(None) = child.try_wait() {
            console::complain(format_args!("pagecast record: the command runs on as process {pid}"));
        }
    } else {
        end(&mut child);
    }
    result.map(|_| Exit::Done)
}

fn start(command: &[String]) -> Result<Child, Failure> {
    let (program, arguments) =
        command.split_first().ok_or_else(|| Failure::usage("there is no command after --"))?;
    let cannot = |error| Failure::failed(format!("cannot start {program}: {error}"));
    let output = std::io::stderr().as_fd().try_clone_to_owned().map_err(cannot)?;
    std::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .process_group(0)
        .spawn()
        .map_err(cannot)
}

/// Asks the command's process group to end and waits until the command has.
fn end(child: &mut Child) {
    use rustix::process::{Pid, Signal, kill_process_group};
    let since = Instant::now();
    let mut asked = false;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                if !asked {
                    console::complain(format_args!("pagecast record: the command ended by itself, {status}"));
                }
                return;
            }
            Ok(None) if !asked => {
                // Not yet waited for, so its number is still its own.
                if let Some(group) = Pid::from_raw(child.id() as i32) {
                    let _ = kill_process_group(group, Signal::TERM);
                }
                asked = true;
            }
            Ok(None) if since.elapsed() > END_PATIENCE => {
                console::complain(format_args!(
                    "pagecast record: the command does not end; it is process {}",
                    child.id()
                ));
                return;
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => return,
        }
    }
}
