//! The plan of a policy that ranks pages: which ranks go before the next sample.
//!
//! Ranks are counted in buckets, the cut is the bucket in which the best pages that the link can carry end, and a walk in
//! ascending order hands out the pages above it. Of the pages in the bucket of the cut the first in that order go.

use crate::page::Pfn;

/// Ranks told apart: 64ths of an octave, 64 octaves.
const BUCKETS: usize = 4096;
/// In place of a bucket: there is no such page.
pub(super) const NOTHING: i16 = -1;

/// The bucket of a rank in 64ths of an octave.
#[inline]
pub(super) fn bucket_of(rank: i32) -> i16 {
    rank.clamp(0, BUCKETS as i32 - 1) as i16
}

/// What the plan says of one chunk: eight bytes, so that a walk over all chunks of a large guest stays in the cache.
#[derive(Clone, Copy, Default)]
pub(super) struct ChunkPlan {
    /// The bucket of its pending pages that were never written: they all rank alike. [`NOTHING`] if there are none.
    pub never_written: i16,
    /// The highest bucket of its pending pages that were written; [`NOTHING`] if there are none, or none is to go.
    pub written: i16,
    /// Added to the rank of each written page.
    pub shift_written: i16,
    /// Pending pages that were written.
    pub written_pages: u16,
}

/// Pages by bucket.
#[derive(Default)]
pub(super) struct Histogram(Vec<u32>);

impl Histogram {
    pub(super) fn new() -> Self {
        Histogram(vec![0; BUCKETS])
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }

    #[inline]
    pub(super) fn add(&mut self, bucket: i16, pages: u32) {
        self.0[bucket as usize] += pages;
    }

    /// Where the best `pages` end, or all there are.
    pub(super) fn cut(&self, pages: u64) -> Plan {
        let mut above = 0;
        for (bucket, count) in self.0.iter().enumerate().rev() {
            let count = u64::from(*count);
            if above + count >= pages {
                return Plan { cursor: Pfn(0), cut: bucket as i16, quota: pages - above, left: pages };
            }
            above += count;
        }
        Plan { cursor: Pfn(0), cut: 0, quota: u64::from(self.0[0]), left: above }
    }
}

/// What is left of a plan.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// The walk goes on here.
    pub cursor: Pfn,
    /// Pages in buckets above this go; of those in it, `quota`.
    pub cut: i16,
    quota: u64,
    /// Pages still to go.
    pub left: u64,
}

impl Plan {
    /// Whether the next page of `bucket` goes.
    #[inline]
    pub(super) fn takes(&self, bucket: i16) -> bool {
        bucket > self.cut || bucket == self.cut && self.quota > 0
    }

    /// A page of `bucket` has gone.
    #[inline]
    pub(super) fn note_taken(&mut self, bucket: i16) {
        self.quota -= u64::from(bucket == self.cut);
        self.left -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_cut_lets_through_exactly_the_best(
            buckets in proptest::collection::vec(0i16..512, 0..200),
            pages in 0u64..300,
        ) {
            let mut histogram = Histogram::new();
            buckets.iter().for_each(|bucket| histogram.add(*bucket, 1));
            let mut plan = histogram.cut(pages);
            prop_assert_eq!(plan.left, pages.min(buckets.len() as u64));
            let mut taken = Vec::new();
            for bucket in &buckets {
                if plan.takes(*bucket) {
                    plan.note_taken(*bucket);
                    taken.push(*bucket);
                }
            }
            prop_assert_eq!(plan.left, 0);
            let mut best = buckets.clone();
            best.sort_unstable_by(|a, b| b.cmp(a));
            best.truncate(pages as usize);
            taken.sort_unstable_by(|a, b| b.cmp(a));
            prop_assert_eq!(taken, best);
        }
    }

    #[test]
    fn no_rank_is_outside_the_buckets() {
        for (rank, bucket) in [(-1, 0), (i32::MIN, 0), (3, 3), (4094, 4094), (4096, 4095), (i32::MAX, 4095)] {
            assert_eq!(bucket_of(rank), bucket);
        }
        assert!(!Histogram::new().cut(5).takes(NOTHING));
    }
}
