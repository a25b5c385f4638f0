//! The time of a migration, real or simulated.

use std::time::{Duration, Instant};

/// Tells how long a migration has run.
#[derive(Clone)]
pub enum Clock {
    /// The machine's clock, since this moment.
    Real(Instant),
    /// A clock that stands still until somebody sets it, in nanoseconds.
    #[cfg(test)]
    Simulated(std::sync::Arc<std::sync::atomic::AtomicU64>),
}

impl Clock {
    /// Time since the migration began.
    pub fn elapsed(&self) -> Duration {
        match self {
            Clock::Real(began) => began.elapsed(),
            #[cfg(test)]
            Clock::Simulated(now) => Duration::from_nanos(now.load(std::sync::atomic::Ordering::Relaxed)),
        }
    }
}
