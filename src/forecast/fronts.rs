//! Fronts: writers that go through memory in ascending order, such as an allocator, a copying collector or a sweep over
//! an array. The history of a page says nothing of a front that has not reached it yet; where the front stands and how
//! fast it moves does. A page that a front is about to reach is best sent after it has passed.
//!
//! Each sample's chunks that were written in long runs, and for the most part not in the sample before, make clusters.
//! A cluster that goes on where one of the last samples ended moves a front there. Nothing is predicted from a front
//! that has not been seen to move.

use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::CHUNK_WORDS;
use std::time::Duration;

/// Consecutive pages, on average, in a chunk that a front went through. Scattered writes make runs of one or two.
const MEAN_RUN: u32 = 16;
/// Pages newly written in such a chunk.
const FRESH: u32 = 64;
/// Chunks that a front may step over: memory that is not in use.
const GAP: u64 = 6;
/// Fronts followed at a time, and clusters looked at in a sample.
const MAX_FRONTS: usize = 8;
const MAX_CLUSTERS: usize = 32;
/// A front that has not moved for so many sample intervals is over.
const PATIENCE: u32 = 3;
/// No arrival is predicted further ahead.
const HORIZON_S: f64 = 2.0;

/// Pages written in order in one sample.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    first: Pfn,
    last: Pfn,
}

#[derive(Clone, Copy, Debug)]
struct Front {
    /// The last page it wrote.
    tip: Pfn,
    /// When that was seen.
    seen: Duration,
    /// How fast it moves through page numbers, holes included; unknown until it has been seen to.
    pages_per_s: Option<f64>,
    /// The last chunk in which an arrival is predicted; spares the arithmetic for all those beyond.
    reach: usize,
}

/// The fronts of a guest.
pub(super) struct Fronts {
    interval: Duration,
    fronts: Vec<Front>,
    clusters: Vec<Cluster>,
}

impl Fronts {
    pub(super) fn new(sample_interval: Duration) -> Self {
        Fronts {
            interval: sample_interval,
            fronts: Vec::with_capacity(MAX_FRONTS),
            clusters: Vec::with_capacity(MAX_CLUSTERS),
        }
    }

    /// A chunk of the sample under way, in ascending order: its dirty pages, and how many of them were not dirty just
    /// before.
    pub(super) fn note_chunk(&mut self, chunk: usize, words: &[u64; CHUNK_WORDS], fresh: u32) {
        if fresh < FRESH {
            return;
        }
        let (mut pages, mut runs, mut carry) = (0, 0, 0);
        for word in words {
            pages += word.count_ones();
            runs += (word & !(word << 1 | carry)).count_ones();
            carry = word >> 63;
        }
        if pages < runs * MEAN_RUN {
            return;
        }
        let base = (chunk * CHUNK_PAGES) as u64;
        let place = |word: usize, bit: u32| Pfn(base + word as u64 * 64 + u64::from(bit));
        let occupied = || words.iter().enumerate().filter(|(_, word)| **word != 0);
        let first = occupied().next().map(|(index, word)| place(index, word.trailing_zeros()));
        let last = occupied().next_back().map(|(index, word)| place(index, 63 - word.leading_zeros()));
        let (Some(first), Some(last)) = (first, last) else { return };
        let reach = (GAP + 1) * CHUNK_PAGES as u64;
        if let Some(cluster) = self.clusters.last_mut().filter(|cluster| first.0 <= cluster.last.0 + reach) {
            cluster.last = last;
        } else if self.clusters.len() < MAX_CLUSTERS {
            self.clusters.push(Cluster { first, last });
        }
    }

    /// The sample taken at `at` is complete.
    pub(super) fn end_sample(&mut self, at: Duration) {
        let patience = self.interval * PATIENCE;
        self.fronts.retain(|front| at.saturating_sub(front.seen) <= patience);
        for cluster in self.clusters.drain(..) {
            let moved = |front: &&mut Front| front.seen < at && front.is_moved_by(&cluster);
            if let Some(front) = self.fronts.iter_mut().find(moved) {
                front.advance(cluster.last, at);
            } else if self.fronts.len() < MAX_FRONTS {
                self.fronts.push(Front { tip: cluster.last, seen: at, pages_per_s: None, reach: 0 });
            }
        }
    }

    /// How long after `at` the first front will reach the chunk, if one is on its way there.
    #[inline]
    pub(super) fn arrival(&self, chunk: usize, at: Duration) -> Option<Duration> {
        let near = |front: &&Front| (front.tip.chunk()..=front.reach).contains(&chunk);
        let arrivals = self.fronts.iter().filter(near).filter_map(|front| {
            let speed = front.pages_per_s?;
            let distance = (chunk as u64 * CHUNK_PAGES as u64).saturating_sub(front.tip.0);
            let since = at.saturating_sub(front.seen).as_secs_f64();
            (distance as f64 / speed <= HORIZON_S).then(|| (distance as f64 / speed - since).max(0.0))
        });
        arrivals.reduce(f64::min).map(Duration::from_secs_f64)
    }
}

impl Front {
    /// Whether a cluster goes on where the front stood.
    fn is_moved_by(&self, cluster: &Cluster) -> bool {
        let chunk = CHUNK_PAGES as u64;
        cluster.last > self.tip
            && cluster.first.0 + chunk >= self.tip.0
            && cluster.first.0 <= self.tip.0 + (GAP + 1) * chunk
    }

    fn advance(&mut self, tip: Pfn, at: Duration) {
        let now = (tip.0 - self.tip.0) as f64 / (at - self.seen).as_secs_f64().max(1e-6);
        let speed = self.pages_per_s.map_or(now, |before| (before + now) / 2.0);
        self.pages_per_s = Some(speed);
        self.reach = Pfn(tip.0.saturating_add((speed * HORIZON_S) as u64)).chunk() + 1;
        (self.tip, self.seen) = (tip, at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::PageSet;

    const INTERVAL: Duration = Duration::from_millis(50);

    fn note(fronts: &mut Fronts, sample: u32, runs: &[(u64, u64)]) {
        let mut dirty = PageSet::empty(1 << 20);
        runs.iter().for_each(|(first, count)| dirty.insert_run(Pfn(*first), *count));
        for chunk in dirty.occupied_chunks() {
            fronts.note_chunk(chunk, dirty.chunk_words(chunk), dirty.chunk_len(chunk) as u32);
        }
        fronts.end_sample(INTERVAL * sample);
    }

    #[test]
    fn a_front_is_expected_where_it_will_be() {
        let mut fronts = Fronts::new(INTERVAL);
        note(&mut fronts, 1, &[(1000, 1000)]);
        assert_eq!(fronts.arrival(8, INTERVAL), None, "nothing is known of its speed yet");
        note(&mut fronts, 2, &[(2000, 1000)]);
        note(&mut fronts, 3, &[(3000, 1000)]);
        // It stands at 3999 and goes 1000 pages in a sample.
        let arrival = |chunk| fronts.arrival(chunk, INTERVAL * 3).map(|time| time.as_millis());
        assert_eq!(arrival(7), Some(0), "the chunk it is in");
        assert_eq!(arrival(8), Some(4));
        assert_eq!(arrival(17), Some(235));
        assert_eq!(arrival(6), None, "it has passed");
        assert_eq!(arrival(200), None, "beyond the horizon");
    }

    #[test]
    fn memory_that_is_not_in_use_is_stepped_over() {
        let mut fronts = Fronts::new(INTERVAL);
        note(&mut fronts, 1, &[(0, 512)]);
        note(&mut fronts, 2, &[(512 * 4, 512)]);
        assert!(fronts.arrival(6, INTERVAL * 2).is_some());
        let mut fronts = Fronts::new(INTERVAL);
        note(&mut fronts, 1, &[(0, 512)]);
        note(&mut fronts, 2, &[(512 * 40, 512)]);
        assert!(fronts.arrival(42, INTERVAL * 2).is_none(), "that far is another front");
    }

    #[test]
    fn scattered_and_repeated_writes_are_no_front() {
        let mut fronts = Fronts::new(INTERVAL);
        for sample in 1..20 {
            let scattered: Vec<_> = (0..2000).map(|page| (u64::from(sample) * 37 + page * 5, 1)).collect();
            note(&mut fronts, sample, &scattered);
            // The same run again and again does not move.
            note(&mut fronts, sample, &[(1 << 19, 400)]);
        }
        assert!((0..2048).all(|chunk| fronts.arrival(chunk, INTERVAL * 19).is_none()));
    }

    #[test]
    fn a_front_that_stands_still_is_forgotten() {
        let mut fronts = Fronts::new(INTERVAL);
        note(&mut fronts, 1, &[(0, 512)]);
        note(&mut fronts, 2, &[(512, 512)]);
        assert!(fronts.arrival(3, INTERVAL * 2).is_some());
        (3..6).for_each(|sample| note(&mut fronts, sample, &[]));
        assert!(fronts.arrival(3, INTERVAL * 5).is_some());
        note(&mut fronts, 6, &[]);
        assert!(fronts.arrival(3, INTERVAL * 6).is_none());
    }
}
