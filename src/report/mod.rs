//! What a person or a program is told: progress while a migration runs, a table or a JSON line when it is done; what replays
//! of traces come to (`replay`, `summary`, `bound`), and pictures of them (`plot`).

pub mod bound;
pub mod json;
pub mod plot;
pub mod progress;
pub mod recording;
pub mod replay;
pub mod saved;
pub mod summary;
pub mod table;

use serde::Serialize;

use crate::forecast::PolicyKind;
use crate::guest::arena::Workload;
use crate::pipeline::outcome::Migration;

/// A finished migration with all that is known about it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which policy chose the pages.
    pub policy: PolicyKind,
    /// The guest's workload.
    pub workload: String,
    /// The guest's seed.
    pub seed: u64,
    /// The downtime budget in milliseconds.
    pub budget_ms: f64,
    /// The pipeline's figures.
    pub migration: Migration,
    /// What the guest itself said, where it was asked.
    pub guest: Option<GuestSide>,
}

/// The guest's own view of its move.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GuestSide {
    /// Errors that its checks have found, before and after.
    pub errors: u64,
    /// Pages checked at the destination, after it ran on.
    pub checked_pages: u64,
    /// Writes at the destination so far.
    pub writes_since: u64,
    /// Writes per second before the migration.
    pub writes_per_s_before: f64,
}

impl Report {
    /// Whether every page was compared with the source's at the switch-over and none differed.
    pub fn verified(&self) -> bool {
        self.migration.verified_pages == self.migration.pages
    }

    /// How much slower the guest wrote while it was migrated live than before; 0 is not at all, 1 is a standstill. None
    /// for a guest whose rate changes by itself, since nothing can be told from comparing two stretches of that.
    pub fn slowdown(&self) -> Option<f64> {
        let steady = self.workload.parse().is_ok_and(Workload::is_steady);
        let before = self.guest?.writes_per_s_before;
        let live = self.migration.live_writes_per_s?;
        (steady && before > 0.0).then(|| (1.0 - live / before).max(0.0))
    }
}

/// Milliseconds, with a fraction.
pub fn ms(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A time as seconds of CPU for each GB (10^9 bytes) sent.
pub fn per_gb(time: std::time::Duration, bytes: u64) -> f64 {
    if bytes == 0 { 0.0 } else { time.as_secs_f64() / (bytes as f64 / 1e9) }
}
