//! How much to slow a guest down that pre-copy cannot keep up with.
//!
//! The first step is 20 %, each further one 10 % of the guest's time more, up to 95 %: QEMU's auto-converge has the
//! same first steps, raises them once a round, and ends at 99 %. There are no rounds here, so the pace follows from how
//! fast the bound can react. What was written before a step still counts after it, and at best, with the guest standing
//! still, ages out of the bound at B pages a second: a whole base time until all of it is gone, but a quarter of the
//! memory in a quarter of that time. So a quarter of a base time after each step tells whether it was enough: it was
//! if going down on at that pace would meet the budget within a base time more.
//!
//! A throttle is never lowered: with it the writes would come back that it holds off. It ends with pre-copy.

use std::time::Duration;

/// The first step, in percent of the guest's time.
const FIRST: u8 = 20;
/// What each further step adds.
const STEP: u8 = 10;
/// The guest is never slowed down by more: it has to answer its timers.
const MOST: u8 = 95;
/// A step is given this part of a base time to work.
const PATIENCE_BASES: f64 = 0.25;
/// And so many samples at least: fewer say little.
const PATIENCE_SAMPLES: u32 = 4;

/// How far away the budget is, at one sample.
#[derive(Clone, Copy, Debug)]
pub(super) struct Distance {
    /// Pages that no policy could be below.
    pub bound: f64,
    /// Pages left.
    pub backlog: f64,
    /// Pages that the budget allows.
    pub budget: f64,
}

/// The throttle's state.
pub(super) struct Throttle {
    percent: u8,
    since: Duration,
    then: Distance,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Throttle {
            percent: 0,
            since: Duration::ZERO,
            then: Distance { bound: 0.0, backlog: 0.0, budget: 0.0 },
        }
    }

    /// Whether the guest is being slowed down.
    pub(super) fn is_on(&self) -> bool {
        self.percent > 0
    }

    /// The share of its time, in percent, that the guest is to stand still from this sample on. The budget is out of
    /// reach, or was when the throttle was put on.
    pub(super) fn judge(&mut self, now: Duration, base_s: f64, interval: Duration, here: Distance) -> u8 {
        if self.is_on() {
            let patience_s = (base_s * PATIENCE_BASES).max((interval * PATIENCE_SAMPLES).as_secs_f64());
            let elapsed_s = now.saturating_sub(self.since).as_secs_f64();
            if elapsed_s < patience_s {
                return self.percent;
            }
            if !self.comes_down(here, base_s / elapsed_s) {
                self.percent = (self.percent + STEP).min(MOST);
            }
        } else {
            self.percent = FIRST;
        }
        self.since = now;
        self.then = here;
        self.percent
    }

    /// Whether the budget would be met if what was gained since the last step were gained `times` more. Where the bound
    /// allows that already, it is the backlog that has to come down.
    fn comes_down(&self, here: Distance, times: f64) -> bool {
        let (before, now) = if here.bound > here.budget {
            (self.then.bound, here.bound)
        } else {
            (self.then.backlog, here.backlog)
        };
        (before - now) * times >= now - here.budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    /// A base of 4 s, so that a step has one second; the percentage at each second for the bounds given.
    fn steps(bounds: &[f64]) -> Vec<u8> {
        let mut throttle = Throttle::new();
        let judge = |(second, bound): (usize, &f64)| {
            let here = Distance { bound: *bound, backlog: 1000.0, budget: 100.0 };
            throttle.judge(Duration::from_secs(second as u64), 4.0, INTERVAL, here)
        };
        bounds.iter().enumerate().map(judge).collect()
    }

    #[test]
    fn a_bound_that_does_not_come_down_raises_it_step_by_step_to_the_most() {
        assert_eq!(steps(&[900.0; 12]), [20, 30, 40, 50, 60, 70, 80, 90, 95, 95, 95, 95]);
    }

    #[test]
    fn a_bound_that_comes_down_fast_enough_does_not() {
        // 200 pages a second: four times that is more than what is left above the budget. 100 is not, at first.
        assert_eq!(steps(&[900.0, 700.0, 500.0, 300.0]), [20, 20, 20, 20]);
        assert_eq!(steps(&[900.0, 800.0, 700.0, 500.0]), [20, 30, 40, 40]);
    }

    #[test]
    fn a_backlog_that_stays_above_a_bound_within_budget_raises_it() {
        assert_eq!(steps(&[100.0, 90.0, 90.0]), [20, 30, 40]);
    }

    #[test]
    fn a_step_is_given_its_time() {
        let mut throttle = Throttle::new();
        let here = Distance { bound: 900.0, backlog: 1000.0, budget: 100.0 };
        let mut at = |ms| throttle.judge(Duration::from_millis(ms), 0.1, INTERVAL, here);
        assert_eq!([at(0), at(199), at(200), at(399), at(400)], [20, 20, 30, 30, 40]);
    }
}
