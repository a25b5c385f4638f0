//! What is said on an arena guest's control socket: one JSON document a message, descriptors beside it, one answer
//! to each request.
//!
//! A connection that suspends the guest, slows it down or starts its dirty log holds a lease until it resumes the guest: meanwhile other
//! connections may only look on. When it closes before a hand-over, whoever held it is gone, and the guest ends its log
//! and runs on at full speed.

use serde::{Deserialize, Serialize};

use super::{CheckReport, Stats};

/// What a client may ask.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who are you? The answer comes with the guest's memory and page map.
    Hello,
    /// Let nobody else migrate the guest until this connection resumes it or ends.
    Claim,
    /// Start or end dirty logging.
    LogDirty {
        /// Start or end.
        on: bool,
    },
    /// Stop running.
    Suspend,
    /// Stand still for a share of the time.
    Throttle {
        /// The share in percent, 95 at most; 0: none.
        percent: u8,
    },
    /// End dirty logging and run on at full speed.
    Resume,
    /// What have you done so far?
    Stats,
    /// Check every page.
    Check,
    /// Say "go" on the connection that comes with this message, on which a destination is ready.
    HandOver {
        /// The migration's identity, by which the destination knows it.
        migration: String,
        /// Where to ask the destination if the connection breaks.
        destination: String,
    },
    /// The destination of a hand-over in doubt is gone for good: run the guest here again. If it is not gone, the guest
    /// will run twice.
    TakeBack,
    /// Stop, and end the process.
    Quit,
}

/// What the guest answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// To `Hello`; with two descriptors: the memory and the page map.
    Hello {
        /// Pages of memory.
        nr_pages: u64,
        /// Where the guest itself has its memory mapped: the address that the page map speaks of.
        base: u64,
        /// Its workload, for reports.
        workload: String,
        /// Its seed, for reports.
        seed: u64,
    },
    /// Done.
    Done,
    /// To `Stats`.
    Stats {
        /// The counters.
        stats: Stats,
        /// Whether the guest is running now.
        running: bool,
        /// Share of its time that it is made to stand still, in percent.
        throttle_percent: u8,
    },
    /// To `Check`.
    Check {
        /// What the check found.
        report: CheckReport,
    },
    /// To `HandOver`: the destination runs the guest.
    HandedOver,
    /// To `HandOver`: the destination does not and never will; the guest runs on here.
    TakenBack {
        /// Why.
        reason: String,
    },
    /// To anything: it cannot be done.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}
