//! Heat: age, write count and the activity of the chunk; no model of intervals. The bar that `ar` has to clear.
//!
//! `rank = log2(age) - log2(1 + n) - 1/4 log2(1 + A)`, n the samples in which the page was dirty; the activity A
//! of the chunk is subtracted by the plan.

use super::log2::{LOG2_OF_COUNT, OCTAVE, in_units_q8, log2_q4};
use super::ranked::{Clock, PageModel};
use std::time::Duration;

/// A page never written ranks as if it had rested for this much longer than it has been watched.
const HEAD_START: Duration = Duration::from_secs(1);

/// Samples in which the page was dirty, saturating.
#[derive(Clone, Copy, Default)]
pub(super) struct HeatPage {
    writes: u8,
}

impl PageModel for HeatPage {
    const ACTIVITY_DIVISOR: i32 = 4;
    const FOLLOWS_FRONTS: bool = false;
    const NEVER_WRITTEN: Self = HeatPage { writes: 0 };

    fn note_write(&mut self, _: Option<u8>) {
        self.writes = self.writes.saturating_add(1);
    }

    #[inline]
    fn rank(self, log2_age: i32, _: &Clock) -> i32 {
        log2_age - i32::from(LOG2_OF_COUNT[usize::from(self.writes)])
    }

    fn most_written(clock: &Clock) -> i32 {
        clock.log2_since_start - OCTAVE
    }

    fn log2_age_never_written(clock: &Clock) -> i32 {
        log2_q4(in_units_q8(clock.since_start + HEAD_START, clock.unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_raises_and_writes_lower_the_rank_octave_by_octave() {
        let unit = Duration::from_millis(50);
        let clock = Clock { since_start: Duration::from_secs(3), unit, log2_since_start: 0 };
        let written = |times| {
            let mut page = HeatPage::NEVER_WRITTEN;
            (0..times).for_each(|_| page.note_write(None));
            page
        };
        assert_eq!(written(3).rank(5 * OCTAVE, &clock), 3 * OCTAVE);
        assert_eq!(written(1).rank(5 * OCTAVE, &clock), 4 * OCTAVE);
        assert_eq!(
            written(1000).rank(5 * OCTAVE, &clock),
            5 * OCTAVE - 8 * OCTAVE,
            "255 is the most it counts"
        );
        // 3 s and the head start of 1 s are 80 units.
        assert_eq!(HeatPage::log2_age_never_written(&clock), log2_q4(80 * 256));
    }
}
