//! The clairvoyant bound: no policy, even one that knew every write to come, could have less to send.
//!
//! With the guest stopped at T, only the last write of each page matters, and the page has to be sent after it:
//! unit jobs with a release time, a common deadline and a link of B pages/s. What cannot be done in time is
//!
//! ```text
//! backlog*(T) = max over tau of [ W_T(tau) - B tau ]+,   W_T(tau) = pages last written within tau before T
//! ```
//!
//! For every B at once, this needs only the upper hull of W_T: the few pairs (tau, pages) that no line between
//! two others covers. One hull a sample is what is kept, so that T* can be found at the end, when B is known.

use std::time::Duration;

/// Corners kept of one hull. Beyond, every other one is dropped: the bound is then a little lower than it could
/// be, never too high. Recorded traces: 12 in the median, 95 at the 99th percentile, 129 at most.
pub(super) const MAX_CORNERS: usize = 128;

/// `pages` were last written within `tau_s` seconds before the sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Corner {
    pub tau_s: f64,
    pub pages: u64,
}

/// The earliest stop that fits a downtime budget, had the future been known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TStar {
    /// When the guest is suspended.
    pub at: Duration,
    /// T*: that, and the time to send the backlog.
    pub total: Duration,
    /// Pages sent with the guest suspended.
    pub backlog: u64,
}

/// What a sample says about the bound.
struct Recorded {
    at: Duration,
    unwritten: u64,
    corners_end: u32,
}

/// The hull at each sample, up to a number of samples fixed at the start; later samples only count for the
/// bound of the moment.
pub(super) struct Bounds {
    pages: u64,
    max_samples: usize,
    samples: Vec<Recorded>,
    corners: Vec<Corner>,
    latest: Vec<Corner>,
    latest_at: Duration,
    latest_unwritten: u64,
    scratch: Vec<Corner>,
}

impl Bounds {
    pub(super) fn new(pages: u64, max_samples: usize) -> Self {
        Bounds {
            pages,
            max_samples,
            samples: Vec::with_capacity(max_samples),
            corners: Vec::with_capacity(max_samples * MAX_CORNERS),
            latest: Vec::with_capacity(MAX_CORNERS),
            latest_at: Duration::ZERO,
            latest_unwritten: pages,
            scratch: Vec::with_capacity(max_samples + 1),
        }
    }

    /// Takes in the sample taken at `at`. `counts[k]` pages were last seen dirty in sample `k`, taken at
    /// `times[k]`; entry 0 stands for the start and for the pages never written. A page seen in sample `k` was
    /// written after sample `k - 1` was taken: that is its release time.
    pub(super) fn record(&mut self, times: &[Duration], counts: &[u64]) {
        let at = times[times.len() - 1];
        self.scratch.clear();
        self.scratch.push(Corner { tau_s: 0.0, pages: 0 });
        let mut pages = 0;
        for (count, release) in counts[1..].iter().zip(times).rev() {
            if *count > 0 {
                pages += count;
                push_to_hull(&mut self.scratch, Corner { tau_s: (at - *release).as_secs_f64(), pages });
            }
        }
        thin(&mut self.scratch);
        self.latest.clear();
        self.latest.extend_from_slice(&self.scratch);
        self.latest_at = at;
        self.latest_unwritten = counts[0];
        if self.samples.len() < self.max_samples {
            self.corners.extend_from_slice(&self.scratch);
            let corners_end = self.corners.len() as u32;
            self.samples.push(Recorded { at, unwritten: counts[0], corners_end });
        }
    }

    /// The backlog, in pages, below which no policy could be if the guest stopped at `now`.
    pub(super) fn now(&self, now: Duration, pages_per_s: f64, zero_unwritten: u64) -> u64 {
        let needed = self.pages - zero_unwritten.min(self.latest_unwritten);
        let elapsed_s = now.saturating_sub(self.latest_at).as_secs_f64();
        let written = least_backlog(&self.latest, pages_per_s, elapsed_s);
        let all = needed as f64 - pages_per_s * now.max(self.latest_at).as_secs_f64();
        written.max(all).floor() as u64
    }

    /// The first recorded sample at which the backlog fits `budget`; pages never written that are zero are free.
    pub(super) fn t_star(&self, pages_per_s: f64, budget: Duration, zero_unwritten: u64) -> Option<TStar> {
        if pages_per_s.is_nan() || pages_per_s <= 0.0 {
            return None;
        }
        let mut first_corner = 0;
        self.samples.iter().find_map(|sample| {
            let corners = &self.corners[first_corner..sample.corners_end as usize];
            first_corner = sample.corners_end as usize;
            let needed = self.pages - zero_unwritten.min(sample.unwritten);
            let all = needed as f64 - pages_per_s * sample.at.as_secs_f64();
            let backlog = least_backlog(corners, pages_per_s, 0.0).max(all);
            (backlog <= budget.as_secs_f64() * pages_per_s).then(|| TStar {
                at: sample.at,
                total: sample.at + Duration::from_secs_f64(backlog / pages_per_s),
                backlog: backlog.ceil() as u64,
            })
        })
    }

    /// Bytes in use.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.samples) + size_of_val(&*self.corners) + size_of_val(&*self.scratch)
    }
}

/// `max [pages - B (tau + elapsed)]+`.
fn least_backlog(corners: &[Corner], pages_per_s: f64, elapsed_s: f64) -> f64 {
    let over = |corner: &Corner| corner.pages as f64 - pages_per_s * (corner.tau_s + elapsed_s);
    corners.iter().map(over).fold(0.0, f64::max)
}

/// Adds a corner to the right of an upper hull and drops those that it covers.
fn push_to_hull(hull: &mut Vec<Corner>, corner: Corner) {
    while let [.., a, b] = hull[..] {
        let cross = (b.tau_s - a.tau_s) * (corner.pages - a.pages) as f64
            - (b.pages - a.pages) as f64 * (corner.tau_s - a.tau_s);
        if cross < 0.0 {
            break;
        }
        hull.pop();
    }
    hull.push(corner);
}

/// Drops every other inner corner until there are few enough.
fn thin(hull: &mut Vec<Corner>) {
    while hull.len() > MAX_CORNERS {
        let (mut index, last) = (0, hull.len() - 1);
        hull.retain(|_| {
            index += 1;
            (index - 1) % 2 == 0 || index - 1 == last
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hull_keeps_only_what_no_line_covers() {
        let mut hull = vec![Corner { tau_s: 0.0, pages: 0 }];
        for (tau_s, pages) in [(1.0, 10), (2.0, 12), (3.0, 20), (4.0, 21), (5.0, 40)] {
            push_to_hull(&mut hull, Corner { tau_s, pages });
        }
        assert_eq!(hull.iter().map(|corner| corner.pages).collect::<Vec<_>>(), [0, 10, 40]);
    }

    #[test]
    fn thinning_keeps_both_ends() {
        let mut hull: Vec<_> = (0..300).map(|n| Corner { tau_s: f64::from(n), pages: n as u64 }).collect();
        thin(&mut hull);
        assert!(hull.len() <= MAX_CORNERS);
        assert_eq!((hull[0].pages, hull[hull.len() - 1].pages), (0, 299));
    }
}
