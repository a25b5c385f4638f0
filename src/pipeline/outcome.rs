//! What a migration came to: the figures of one that succeeded, and why one did not.

use std::time::Duration;

use serde::Serialize;

use super::latency::Latencies;
use crate::forecast::{Convergence, StopReason};
use crate::guest::GuestError;
use crate::transport::ledger::Counters;

/// The phases of a migration, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Connections, memory, buffers.
    Prepare,
    /// Sending with the guest running.
    Precopy,
    /// Stopping the guest.
    Suspend,
    /// Sending the rest with the guest stopped.
    FinalSend,
    /// Giving the guest away.
    HandOver,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Phase::Prepare => "prepare",
            Phase::Precopy => "pre-copy",
            Phase::Suspend => "suspend",
            Phase::FinalSend => "final send",
            Phase::HandOver => "hand-over",
        })
    }
}

/// A look at a migration under way.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Where it stands.
    pub phase: Phase,
    /// Time since dirty logging began.
    pub elapsed: Duration,
    /// Page transmissions so far.
    pub pages_sent: u64,
    /// Bytes sent so far.
    pub bytes_sent: u64,
    /// Pages pending at the last sample.
    pub pending: u64,
    /// Pages that the forecast holds back.
    pub deferred: u64,
    /// Pages dirty in a second.
    pub dirty_pages_per_s: u64,
    /// What stopping now would cost the guest.
    pub forecast_downtime: Duration,
    /// By how much the guest is slowed down, in percent.
    pub throttle_percent: u8,
}

/// Where the guest's stand-still went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Downtime {
    /// From the request to the guest's last instruction.
    pub suspend: Duration,
    /// Last look at the dirty log.
    pub final_scan: Duration,
    /// Sending what was left.
    pub final_send: Duration,
    /// Comparing every page. Not part of a migration without `--verify`, and not counted in [`Downtime::total`].
    pub verify: Duration,
    /// From the end of the stream to the destination's word that it is ready.
    pub hand_over: Duration,
    /// From "go" to the destination's word that the guest runs.
    pub resume: Duration,
}

impl Downtime {
    /// All of it but the verification.
    pub fn total(&self) -> Duration {
        self.suspend + self.final_scan + self.final_send + self.hand_over + self.resume
    }
}

/// CPU time by thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuTimes {
    /// The scanner.
    pub scan: Duration,
    /// All mappers.
    pub map: Duration,
    /// All senders.
    pub send: Duration,
    /// The control thread, during the migration.
    pub control: Duration,
    /// The receiver's process.
    pub receive: Duration,
}

/// The clairvoyant bound of a run.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// The least total time that any policy could have needed.
    pub total: Duration,
}

/// The figures of a migration that succeeded.
#[derive(Clone, Debug)]
pub struct Migration {
    /// Setting up: not part of the migration time.
    pub prepare: Duration,
    /// Total migration time: from the start of dirty logging to the destination running, verification left out.
    pub total: Duration,
    /// The guest's stand-still.
    pub downtime: Downtime,
    /// The least total time possible on this run, where one can be told.
    pub t_star: Option<Bound>,
    /// Pages of guest memory.
    pub pages: u64,
    /// Size of its page-number space: that, and the holes.
    pub nr_pfns: u64,
    /// Page transmissions, those without data included.
    pub transmissions: u64,
    /// Of those, transmissions as zero, without data.
    pub zero_pages: u64,
    /// Pages that were to be sent and were not there when they were read.
    pub absent_pages: u64,
    /// Pages in the final set.
    pub final_pages: u64,
    /// Page faults of this process from when the guest stood still to the last byte.
    pub faults_in_downtime: u64,
    /// The most pages that the forecast held back at a time.
    pub most_deferred: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Bytes by kind of send.
    pub by_send: Counters,
    /// System calls that sent.
    pub send_calls: u64,
    /// Zero-copy sends were given up because the kernel copied all the same.
    pub fell_back: bool,
    /// Bytes copied into slots by mappers.
    pub staged_bytes: u64,
    /// What the slots are made of.
    pub slot_backing: String,
    /// Whether the sends came from registered buffers.
    pub registered: bool,
    /// How pages got onto the wire: "direct", "staged", "staged-copy" or "copy", or "writev" into a pipe or a file.
    pub send: &'static str,
    /// The TCP congestion control of the connections, where they are such.
    pub congestion: Option<String>,
    /// Why pre-copy ended.
    pub stop_reason: StopReason,
    /// How far the budget was away, and what was done about it.
    pub convergence: Convergence,
    /// CPU time by thread.
    pub cpu: CpuTimes,
    /// Get-and-clears of the dirty log, and the time they took.
    pub samples: u64,
    /// Time that the samples took in all.
    pub sampling: Duration,
    /// The link as the scanner knew it last, in pages per second.
    pub link_pages_per_s: f64,
    /// Bytes of forecast state at the end.
    pub forecast_bytes: usize,
    /// Pages that the destination compared with the source's digests; 0 without verification.
    pub verified_pages: u64,
    /// How long the stages took.
    pub latencies: Latencies,
    /// The guest's writes per second while it was migrated live, where it can tell.
    pub live_writes_per_s: Option<f64>,
}

impl Migration {
    /// Page transmissions over pages.
    pub fn rho(&self) -> f64 {
        self.transmissions as f64 / self.pages as f64
    }

    /// Total migration time over the least possible on this run.
    pub fn over_t_star(&self) -> Option<f64> {
        let bound = self.t_star?.total.as_secs_f64();
        (bound > 0.0).then(|| self.total.as_secs_f64() / bound)
    }

    /// Whether the guest stood still no longer than it was allowed to.
    pub fn converged(&self, budget_ms: f64) -> bool {
        self.downtime.total().as_secs_f64() * 1e3 <= budget_ms
    }

    /// Transmissions that a later write made useless.
    pub fn wasted(&self) -> u64 {
        // Pages that have gone since the start were not all sent.
        self.transmissions.saturating_sub(self.pages)
    }
}

/// Why there was no migration. Whatever it is, the guest runs at the source, unless the message says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The guest does not do as it is told.
    #[error("{phase}: {source}")]
    Guest {
        /// When.
        phase: Phase,
        /// What it said.
        source: GuestError,
    },
    /// The destination cannot be reached.
    #[error("cannot reach the destination {destination}: {source}; is `pagecast receive` running there?")]
    Connect {
        /// Its address.
        destination: String,
        /// What the call said.
        source: std::io::Error,
    },
    /// The destination said no.
    #[error("{phase}: the destination gave up: {reason}")]
    Destination {
        /// When.
        phase: Phase,
        /// Why.
        reason: String,
    },
    /// Sending failed.
    #[error("{phase}: {reason}")]
    Send {
        /// When.
        phase: Phase,
        /// What failed.
        reason: String,
    },
    /// Slots, rings, threads or buffers are not to be had.
    #[error("cannot set up the pipeline: {0}")]
    Setup(String),
    /// Pre-copy cannot converge, or has not by the limit, and `--on-no-convergence abort` was asked for.
    #[error("{phase}: {convergence}")]
    NoConvergence {
        /// When.
        phase: Phase,
        /// What was seen.
        convergence: Box<Convergence>,
    },
    /// Ctrl-C.
    #[error("{phase}: {reason}")]
    Aborted {
        /// When.
        phase: Phase,
        /// By whom.
        reason: String,
    },
}

impl MigrationError {
    /// What was seen of the convergence of a migration that was called off for want of it.
    pub fn convergence(&self) -> Option<&Convergence> {
        match self {
            MigrationError::NoConvergence { convergence, .. } => Some(convergence),
            _ => None,
        }
    }
}
