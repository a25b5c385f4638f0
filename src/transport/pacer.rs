//! The bandwidth cap: when the next send may start. The caller supplies the time, as elapsed since any fixed
//! origin ([`Pacer::since`] looks it up), and does the sleeping.
//!
//! What always holds: in any window of length `w` the bytes sent are at most `cap * (w + BURST)` and one send more,
//! if every send waits as [`Pacer::delay`] says; and a caller that sends whenever it may reaches the cap, even if
//! its sleeps end late by less than [`BURST`].

use std::time::{Duration, Instant};

/// How much unused time is kept as credit. Long enough to absorb a timer that fires late on a busy dom0, short
/// enough that the burst after it fits the queue of a switch port (10 ms of 10 Gbit/s is 12.5 MB).
pub const BURST: Duration = Duration::from_millis(10);

const NS_PER_S: u128 = 1_000_000_000;

/// Spaces sends out so that they keep to a cap.
///
/// It keeps one number, the time until which the bytes sent so far have used the link up. A send may start once
/// that time has come; each send moves it on by bytes / cap; it never falls further behind the clock than
/// [`BURST`], which is how credit expires.
#[derive(Debug, Clone)]
pub struct Pacer {
    /// Never 0; `None` is no cap.
    bytes_per_s: Option<u64>,
    /// Rounded down to a nanosecond.
    used_until: Duration,
    /// What the rounding cut off, in nanoseconds / `bytes_per_s`; below `bytes_per_s`. Without it a 64-byte send
    /// at 25 GB/s would count as 2 ns in place of 2.56.
    used_remainder: u64,
}

impl Pacer {
    /// A pacer that keeps to `bytes_per_s`. `None` and `Some(0)` mean no cap, as `--bwlimit=0` does for rsync.
    pub fn new(bytes_per_s: Option<u64>) -> Self {
        let bytes_per_s = bytes_per_s.filter(|&rate| rate > 0);
        Self { bytes_per_s, used_until: Duration::ZERO, used_remainder: 0 }
    }

    /// The time since `started`, or zero where there is no cap: it is of no matter then, and looking at the clock is a system
    /// call in the dom0 of the Xen lab.
    pub fn since(&self, started: Instant) -> Duration {
        self.bytes_per_s.map_or(Duration::ZERO, |_| started.elapsed())
    }

    /// How long to wait, from `now`, before the next send may start; zero if it may start at once.
    pub fn delay(&self, now: Duration) -> Duration {
        let rounded_up = Duration::from_nanos(u64::from(self.used_remainder > 0));
        self.used_until.saturating_add(rounded_up).saturating_sub(now)
    }

    /// Takes note that a send of `bytes` started at `now`. A send of any size may start once the delay is over;
    /// its whole length counts towards the next one.
    pub fn sent(&mut self, now: Duration, bytes: u64) {
        let Some(rate) = self.bytes_per_s else { return };
        let oldest_credit = now.saturating_sub(BURST);
        if self.used_until < oldest_credit {
            self.used_until = oldest_credit;
            self.used_remainder = 0;
        }
        let cost = u128::from(bytes) * NS_PER_S + u128::from(self.used_remainder);
        let cost_ns = u64::try_from(cost / u128::from(rate)).unwrap_or(u64::MAX);
        self.used_until = self.used_until.saturating_add(Duration::from_nanos(cost_ns));
        self.used_remainder = (cost % u128::from(rate)) as u64;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_a_cap_nothing_waits() {
        for cap in [None, Some(0)] {
            let mut pacer = Pacer::new(cap);
            pacer.sent(Duration::ZERO, u64::MAX);
            assert_eq!(pacer.delay(Duration::ZERO), Duration::ZERO);
        }
    }

    #[test]
    fn absurd_numbers_saturate() {
        for rate in [1, 3, u64::MAX] {
            let mut pacer = Pacer::new(Some(rate));
            for now in [Duration::MAX, Duration::ZERO, Duration::MAX] {
                pacer.sent(now, u64::MAX);
                assert!(pacer.delay(Duration::ZERO) > Duration::from_secs(1));
            }
        }
    }

    #[test]
    fn an_idle_hour_buys_one_burst() {
        let mut pacer = Pacer::new(Some(1_000_000));
        let now = Duration::from_secs(3600);
        let mut sent = 0;
        while pacer.delay(now).is_zero() {
            pacer.sent(now, 1000);
            sent += 1000;
        }
        // 10 ms worth, and the send that starts when the credit has just been used up.
        assert_eq!(sent, 10_000 + 1000);
    }

    /// Sends as soon as it may; each wake-up is late by what `late_ns` says. Returns (time, bytes) of each send.
    fn eager_sender(rate: u64, units: &[u64], late_ns: &[u64]) -> Vec<(Duration, u64)> {
        let mut pacer = Pacer::new(Some(rate));
        let mut now = Duration::from_secs(1);
        let mut sends = Vec::new();
        for (&unit, &late) in units.iter().zip(late_ns.iter().cycle()) {
            let delay = pacer.delay(now);
            if !delay.is_zero() {
                now += delay + Duration::from_nanos(late);
            }
            pacer.sent(now, unit);
            sends.push((now, unit));
        }
        sends
    }

    proptest! {
        #[test]
        fn no_window_holds_more_than_the_cap_and_a_burst(
            rate in 1_000u64..30_000_000_000,
            units in prop::collection::vec(1u64..2_000_000, 1..60),
            idle_ns in prop::collection::vec(prop_oneof![0u64..1000, 0u64..50_000_000], 1..60),
        ) {
            let sends = eager_sender(rate, &units, &idle_ns);
            let largest = u128::from(*units.iter().max().unwrap());
            for first in 0..sends.len() {
                let mut bytes = 0;
                for &(at, unit) in &sends[first..] {
                    bytes += u128::from(unit);
                    let window_ns = (at - sends[first].0 + BURST).as_nanos();
                    prop_assert!(bytes.saturating_sub(largest) * NS_PER_S <= u128::from(rate) * window_ns);
                }
            }
        }

        #[test]
        fn late_wake_ups_do_not_lower_the_rate(
            rate in 1_000_000u64..30_000_000_000,
            unit_ns in 100u64..20_000_000,
            late_ns in prop::collection::vec(0u64..8_000_000, 1..50),
        ) {
            let unit = ((u128::from(rate) * u128::from(unit_ns)) / NS_PER_S).max(1) as u64;
            // Two seconds' worth, so that the burst at the start is half a per cent.
            let count = (2 * rate / unit).clamp(200, 200_000) as usize;
            let sends = eager_sender(rate, &vec![unit; count], &late_ns);
            // Until the next send may start, so that the last one's time is counted too.
            let mut pacer = Pacer::new(Some(rate));
            sends.iter().for_each(|&(at, unit)| pacer.sent(at, unit));
            let last = sends[count - 1].0;
            let took = last + pacer.delay(last) - sends[0].0;
            let due_s = unit as f64 * count as f64 / rate as f64;
            let burst_s = BURST.as_secs_f64();
            prop_assert!(took.as_secs_f64() <= due_s * 1.01, "{took:?} in place of {due_s} s: too slow");
            prop_assert!(took.as_secs_f64() >= (due_s - burst_s) * 0.99, "{took:?} in place of {due_s} s: too fast");
        }
    }
}
