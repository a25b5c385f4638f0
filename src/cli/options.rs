//! Options that several subcommands share. They keep their names everywhere.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::{Failure, units};
use crate::destination::ReceiveError;
use crate::forecast::{OnNoConvergence, PolicyKind};
use crate::guest::arena::{Spec, Workload};
use crate::guest::process::areas::Wanted;
use crate::guest::process::tracker::{Choice, MOST_CHUNKS};
use crate::page::PAGE_SIZE;
use crate::pipeline::settings::{Pins, SendMode, Settings, SlotPages};
use crate::sys::output_file::OutputFile;
use crate::sys::{cpu, memory_info, socket};

/// What kind of guest to start.
#[derive(Args, Clone, Debug)]
pub struct GuestOptions {
    /// What the guest does: idle, kv, uniform, sweep, gc, phases or storm
    #[arg(long, default_value = "kv")]
    pub workload: Workload,
    /// Chooses contents and order of the writes: the same seed, the same guest
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The guest's memory
    #[arg(long, default_value = "512MiB", value_parser = units::size)]
    pub memory: u64,
    /// Page writes per second; 0: as fast as they go [default: the workload's own]
    #[arg(long)]
    pub rate: Option<u32>,
    /// Share of the guest's memory that is zero pages, in percent
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u8).range(0..=90))]
    pub zero_share: u8,
}

impl GuestOptions {
    /// As the guest wants it.
    pub fn spec(&self) -> Spec {
        Spec {
            workload: self.workload,
            seed: self.seed,
            rate: self.rate,
            zero_share_percent: self.zero_share,
        }
    }

    /// Pages of memory.
    pub fn nr_pages(&self) -> Result<u64, String> {
        let pages = self.memory / PAGE_SIZE as u64;
        let enough = 4 << 20;
        if self.memory < enough || !self.memory.is_multiple_of(PAGE_SIZE as u64) {
            return Err("--memory is to be a whole number of 4 KiB pages, 4MiB at least".to_owned());
        }
        let available = memory_info::available_bytes().unwrap_or(u64::MAX);
        if self.memory > available {
            let mib = available >> 20;
            return Err(format!("--memory is more than the {mib} MiB that this machine has to spare"));
        }
        Ok(pages)
    }

    /// As arguments for another process.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            format!("--workload={}", self.workload),
            format!("--seed={}", self.seed),
            format!("--memory={}", self.memory),
            format!("--zero-share={}", self.zero_share),
        ];
        args.extend(self.rate.map(|rate| format!("--rate={rate}")));
        args
    }
}

/// How to migrate.
#[derive(Args, Clone, Debug)]
pub struct MigrationOptions {
    /// The most to send: 2.5Gbit, 300MB, none
    #[arg(long, default_value = "none", value_parser = parse_rate)]
    pub bandwidth: Rate,
    /// How long the guest may stand still
    #[arg(long, default_value = "300ms", value_parser = units::time)]
    pub budget: Duration,
    /// How long the guest may be migrated live
    #[arg(long, default_value = "60s", value_parser = units::time)]
    pub max_time: Duration,
    /// What to do then, or as soon as it is clear that the budget cannot be met: stop (suspend at the best moment to be
    /// expected and send the rest), abort (the guest stays), throttle (slow the guest down until it can, then stop)
    #[arg(long, value_name = "WHAT", default_value = "stop")]
    pub on_no_convergence: OnNoConvergence,
    /// Shorten the downtime below the budget, while hardly more than this share of what is sent for that is written again
    /// meanwhile; it costs as much time as sending that share
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = units::percent)]
    pub linger: f64,
    /// Connections, each with a mapper and a sender
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub lanes: u16,
    /// How pages get onto the wire: direct, staged, staged-copy, copy or auto
    #[arg(long, default_value = "auto")]
    pub send: SendMode,
    /// TCP congestion control of the connections, such as cubic or dctcp [default: the system's]. One that paces by
    /// timers (bbr) costs the sender much CPU time
    #[arg(long, value_parser = congestion)]
    pub congestion: Option<String>,
    /// Cores for the stages, such as map=0,scan=0,send=1 [default: by the number of cores]
    #[arg(long)]
    pub pin: Option<String>,
    /// Time between two samples of the dirty log
    #[arg(long, default_value = "50ms", value_parser = units::time)]
    pub sample: Duration,
    /// Slots of 264 KiB for each lane
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(4..=4096))]
    pub slots: u16,
    /// What the slots are made of: small (4 KiB) or huge pages, or auto: small ones for zero-copy sends
    #[arg(long, value_name = "PAGES", default_value = "auto")]
    pub slot_pages: SlotPages,
    /// Idle stages burn their cores instead of sleeping
    #[arg(long)]
    pub spin: bool,
}

/// A rate, or none.
#[derive(Clone, Copy, Debug)]
pub struct Rate(pub Option<u64>);

/// For clap.
pub fn parse_rate(text: &str) -> Result<Rate, String> {
    units::rate(text).map(Rate)
}

/// For clap.
fn congestion(name: &str) -> Result<String, String> {
    socket::check_congestion(name).map_err(|error| {
        format!("the kernel refuses it ({error}); it has those of sysctl net.ipv4.tcp_available_congestion_control")
    })?;
    Ok(name.to_owned())
}

impl MigrationOptions {
    /// Errs if what is to be captured cannot be. Nothing is made or opened: a pipe's reader would take that for the end.
    pub fn check_capture(&self, capture: Option<&Path>) -> Result<(), Failure> {
        let Some(capture) = capture else { return Ok(()) };
        if self.lanes > 1 {
            return Err(Failure::usage("--capture takes the stream of one lane; leave out --lanes"));
        }
        OutputFile::check(capture).map_err(|source| {
            Failure::failed(ReceiveError::Capture { path: capture.display().to_string(), source })
        })
    }

    /// As the pipeline wants it.
    pub fn settings(&self, policy: PolicyKind, verify: bool) -> Result<Settings, String> {
        let cores =
            cpu::allowed_cores().map_err(|error| format!("cannot tell which cores there are: {error}"))?;
        if cores.is_empty() {
            return Err("this process may use no core at all".to_owned());
        }
        if self.sample < Duration::from_millis(1) || self.sample > Duration::from_secs(10) {
            return Err("--sample is to be from 1ms to 10s".to_owned());
        }
        if self.budget < Duration::from_millis(1) {
            return Err(
                "--budget is to be 1ms at least; a guest cannot move without standing still".to_owned()
            );
        }
        if self.max_time.is_zero() {
            return Err("--max-time is to be more than nothing".to_owned());
        }
        let lanes = usize::from(self.lanes);
        let default = Pins::among(&cores, lanes);
        let pins = match &self.pin {
            Some(text) => Pins::parse(text, &default, &cores).map_err(|error| format!("--pin: {error}"))?,
            None => default,
        };
        Ok(Settings {
            policy,
            downtime_budget: self.budget,
            max_time: self.max_time,
            on_no_convergence: self.on_no_convergence,
            linger: self.linger,
            sample_interval: self.sample,
            sample_share: None,
            bandwidth: self.bandwidth.0,
            send: self.send,
            congestion: self.congestion.clone(),
            lanes,
            pins,
            spin: self.spin,
            slots: usize::from(self.slots),
            slot_pages: self.slot_pages,
            verify,
        })
    }
}

/// Which memory of a process counts.
#[derive(Args, Clone, Debug)]
pub struct MemoryOptions {
    /// Follow the descendants of the process too, also those that appear later
    #[arg(long)]
    pub children: bool,
    /// Include memory that can be shared: memfd, System V, /dev/shm, shared anonymous
    #[arg(long)]
    pub shared: bool,
    /// Include the main thread's stack
    #[arg(long)]
    pub stack: bool,
    /// Leave out mappings smaller than this [default: 256KiB to record, none to mirror]
    #[arg(long, value_parser = units::size)]
    pub min_mapping: Option<u64>,
}

impl MemoryOptions {
    /// As the tracker wants it.
    pub fn choice(&self, min_mapping: u64, read_only: bool) -> Choice {
        let wanted = Wanted {
            min_bytes: self.min_mapping.unwrap_or(min_mapping),
            shared: self.shared,
            stack: self.stack,
            read_only,
        };
        Choice { wanted, children: self.children, max_chunks: MOST_CHUNKS }
    }

    /// For an image: all private memory, also what cannot be written at the moment.
    pub fn of_image(&self) -> Choice {
        self.choice(0, true)
    }
}

/// How to show what happens.
#[derive(Args, Clone, Debug)]
pub struct OutputOptions {
    /// JSON lines on standard output instead of text
    #[arg(long)]
    pub json: bool,
}
