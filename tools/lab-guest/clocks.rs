//! Two clocks, and what they say together.
//!
//! Linux stops CLOCK_MONOTONIC while it is suspended, and the TSC that a migrated guest reads goes on where it was.
//! CLOCK_BOOTTIME is moved on by what Xen's wall clock says has passed, so it sees a migration, as exactly as the wall
//! clocks of the two hosts agree. A difference between the two clocks that grows is thus the mark of a suspend.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A suspend is at least so long: what is left of the difference between the readings of the two clocks is less.
const SHORTEST_SUSPEND: Duration = Duration::from_millis(20);

/// The readings are taken again if the guest was kept from running between them for longer than this.
const LONGEST_READING: Duration = Duration::from_millis(1);
const MOST_READINGS: u32 = 10;

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Time in which the guest could run.
    pub awake: Duration,
    /// The same, with the time in which it was suspended.
    pub all: Duration,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let mut readings = 1;
        loop {
            let awake = read(ClockId::Monotonic);
            let all = read(ClockId::Boottime);
            let took = read(ClockId::Monotonic) - awake;
            if took <= LONGEST_READING || readings == MOST_READINGS {
                return Self { awake, all };
            }
            readings += 1;
        }
    }

    /// How far both have moved since then.
    pub fn since(self, earlier: Self) -> Self {
        Self { awake: self.awake.saturating_sub(earlier.awake), all: self.all.saturating_sub(earlier.all) }
    }
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// The longest gaps between two turns of the guest's loop.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// Since the last report, by each clock.
    pub recent: Duration,
    /// The same by the clock that stops.
    pub recent_awake: Duration,
    /// Over the guest's whole life.
    pub longest: Duration,
    /// How often the guest was suspended.
    pub suspends: u64,
}

impl Silence {
    /// Takes in a gap; tells whether there was a suspend in it.
    pub fn add(&mut self, gap: Moment) -> bool {
        self.recent = self.recent.max(gap.all);
        self.recent_awake = self.recent_awake.max(gap.awake);
        self.longest = self.longest.max(gap.all);
        let suspended = gap.all > gap.awake + SHORTEST_SUSPEND;
        self.suspends += u64::from(suspended);
        suspended
    }

    /// Begins a new report.
    pub fn reset_recent(&mut self) {
        self.recent = Duration::ZERO;
        self.recent_awake = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(awake_ms: u64, all_ms: u64) -> Moment {
        Moment { awake: Duration::from_millis(awake_ms), all: Duration::from_millis(all_ms) }
    }

    #[test]
    fn a_gap_that_only_one_clock_sees_is_a_suspend() {
        let mut silence = Silence::default();
        assert!(!silence.add(gap(900, 900)));
        assert!(!silence.add(gap(10, 15)));
        assert!(silence.add(gap(10, 500)));
        assert_eq!(silence.suspends, 1);
        assert_eq!((silence.recent, silence.recent_awake), (gap(0, 900).all, gap(900, 0).awake));
    }

    #[test]
    fn a_report_begins_with_silence_forgotten_but_the_longest_kept() {
        let mut silence = Silence::default();
        silence.add(gap(50, 700));
        silence.reset_recent();
        silence.add(gap(3, 3));
        assert_eq!((silence.recent, silence.longest), (gap(0, 3).all, gap(0, 700).all));
    }

    #[test]
    fn time_does_not_go_backwards_between_two_moments() {
        let first = Moment::now();
        let second = Moment::now();
        assert!(second.awake >= first.awake && second.all >= first.all);
        assert_eq!(first.since(second).awake, first.awake.saturating_sub(second.awake));
    }
}
