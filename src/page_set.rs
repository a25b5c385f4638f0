//! A set of guest pages: one bit a page, with a count for each 2 MiB chunk so that empty chunks cost nothing
//! to walk. The scanner's pending set, the log of a round and every dirty sample are such sets.

use crate::page::{CHUNK_PAGES, Pfn};

/// 64-bit words in a chunk: 512 bits, one cache line.
pub const CHUNK_WORDS: usize = CHUNK_PAGES / 64;

#[derive(Clone, Default)]
#[repr(align(64))]
struct ChunkBits([u64; CHUNK_WORDS]);

/// A set of pages out of `0..nr_pages`.
#[derive(Clone)]
pub struct PageSet {
    bits: Vec<ChunkBits>,
    counts: Vec<u16>,
    total: u64,
    nr_pages: u64,
}

impl PageSet {
    /// An empty set over `nr_pages` pages.
    pub fn empty(nr_pages: u64) -> Self {
        let chunks = (nr_pages as usize).div_ceil(CHUNK_PAGES);
        PageSet { bits: vec![ChunkBits::default(); chunks], counts: vec![0; chunks], total: 0, nr_pages }
    }

    /// The set of all `nr_pages` pages.
    pub fn full(nr_pages: u64) -> Self {
        let mut set = Self::empty(nr_pages);
        set.insert_run(Pfn(0), nr_pages);
        set
    }

    /// Makes the page-number space larger, to `nr_pages`; a smaller number changes nothing.
    pub fn grow(&mut self, nr_pages: u64) {
        let chunks = (nr_pages as usize).div_ceil(CHUNK_PAGES);
        if chunks > self.bits.len() {
            self.bits.resize(chunks, ChunkBits::default());
            self.counts.resize(chunks, 0);
        }
        self.nr_pages = self.nr_pages.max(nr_pages);
    }

    /// Size of the page-number space.
    pub fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// Number of 2 MiB chunks of the page-number space.
    pub fn nr_chunks(&self) -> usize {
        self.bits.len()
    }

    /// Pages in the set.
    pub fn len(&self) -> u64 {
        self.total
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Whether `pfn` is in the set; a page out of range is not.
    pub fn contains(&self, pfn: Pfn) -> bool {
        pfn.0 < self.nr_pages && self.bits[pfn.chunk()].0[pfn.in_chunk() / 64] >> (pfn.0 % 64) & 1 == 1
    }

    /// Adds `pfn`; true if it was not there. Panics if it is out of range.
    pub fn insert(&mut self, pfn: Pfn) -> bool {
        assert!(pfn.0 < self.nr_pages, "page {pfn} is outside 0..{:#x}", self.nr_pages);
        let word = &mut self.bits[pfn.chunk()].0[pfn.in_chunk() / 64];
        let bit = 1 << (pfn.0 % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.counts[pfn.chunk()] += u16::from(new);
        self.total += u64::from(new);
        new
    }

    /// Adds the pages `first .. first + count`. Panics if they reach out of range.
    pub fn insert_run(&mut self, first: Pfn, count: u64) {
        assert!(
            first.0.checked_add(count).is_some_and(|end| end <= self.nr_pages),
            "run {first}+{count} is outside 0..{:#x}",
            self.nr_pages
        );
        let mut at = first.0;
        let end = first.0 + count;
        while at < end {
            let in_word = at % 64;
            let take = (64 - in_word).min(end - at);
            let mask = (u64::MAX >> (64 - take)) << in_word;
            let pfn = Pfn(at);
            let word = &mut self.bits[pfn.chunk()].0[pfn.in_chunk() / 64];
            let added = (mask & !*word).count_ones();
            *word |= mask;
            self.counts[pfn.chunk()] += added as u16;
            self.total += u64::from(added);
            at += take;
        }
    }

    /// Takes `pfn` out; true if it was there.
    pub fn remove(&mut self, pfn: Pfn) -> bool {
        if !self.contains(pfn) {
            return false;
        }
        self.bits[pfn.chunk()].0[pfn.in_chunk() / 64] &= !(1 << (pfn.0 % 64));
        self.counts[pfn.chunk()] -= 1;
        self.total -= 1;
        true
    }

    /// Adds every page of `other`, which must be over the same page-number space.
    pub fn union(&mut self, other: &PageSet) {
        assert_eq!(self.nr_pages, other.nr_pages, "sets over different page-number spaces");
        for chunk in other.occupied_chunks() {
            let mut added = 0;
            for (mine, theirs) in self.bits[chunk].0.iter_mut().zip(other.bits[chunk].0) {
                added += (theirs & !*mine).count_ones();
                *mine |= theirs;
            }
            self.counts[chunk] += added as u16;
            self.total += u64::from(added);
        }
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        for chunk in 0..self.bits.len() {
            if self.counts[chunk] > 0 {
                self.bits[chunk] = ChunkBits::default();
                self.counts[chunk] = 0;
            }
        }
        self.total = 0;
    }

    /// Pages of `chunk` in the set.
    pub fn chunk_len(&self, chunk: usize) -> usize {
        usize::from(self.counts[chunk])
    }

    /// The bits of `chunk`; bit `i` of word `w` is the page `chunk * 512 + w * 64 + i`.
    pub fn chunk_words(&self, chunk: usize) -> &[u64; CHUNK_WORDS] {
        &self.bits[chunk].0
    }

    /// The chunks that hold at least one page of the set, ascending.
    pub fn occupied_chunks(&self) -> impl Iterator<Item = usize> + '_ {
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(chunk, _)| chunk)
    }

    /// The pages of one chunk that are in the set, ascending.
    pub fn pages_of_chunk(&self, chunk: usize) -> impl Iterator<Item = Pfn> + '_ {
        let base = (chunk * CHUNK_PAGES) as u64;
        self.bits[chunk].0.iter().enumerate().flat_map(move |(index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some(Pfn(base + index as u64 * 64 + u64::from(bit)))
            })
        })
    }

    /// All pages of the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.occupied_chunks().flat_map(|chunk| self.pages_of_chunk(chunk))
    }

    /// The pages of the set at or after `from`, ascending.
    pub fn iter_from(&self, from: Pfn) -> impl Iterator<Item = Pfn> + '_ {
        let start = from.chunk().min(self.bits.len());
        (start..self.bits.len())
            .filter(|chunk| self.counts[*chunk] > 0)
            .flat_map(|chunk| self.pages_of_chunk(chunk))
            .skip_while(move |pfn| *pfn < from)
    }

    /// The first page of the set at or after `from`.
    pub fn next_at_or_after(&self, from: Pfn) -> Option<Pfn> {
        if from.0 >= self.nr_pages {
            return None;
        }
        let first = self.pages_of_chunk(from.chunk()).find(|pfn| *pfn >= from);
        first.or_else(|| {
            let chunk = (from.chunk() + 1..self.bits.len()).find(|chunk| self.counts[*chunk] > 0)?;
            self.pages_of_chunk(chunk).next()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn listed(set: &PageSet) -> Vec<u64> {
        set.iter().map(|pfn| pfn.0).collect()
    }

    proptest! {
        #[test]
        fn behaves_as_an_ordered_set(
            nr_pages in 1u64..2000,
            steps in proptest::collection::vec((0u8..4, 0u64..2000, 0u64..700), 0..40),
        ) {
            let mut set = PageSet::empty(nr_pages);
            let mut model = BTreeSet::new();
            for (what, at, count) in steps {
                let at = at % nr_pages;
                match what {
                    0 => prop_assert_eq!(set.insert(Pfn(at)), model.insert(at)),
                    1 => prop_assert_eq!(set.remove(Pfn(at)), model.remove(&at)),
                    2 => {
                        let count = count.min(nr_pages - at);
                        set.insert_run(Pfn(at), count);
                        model.extend(at..at + count);
                    }
                    _ => {
                        let mut other = PageSet::empty(nr_pages);
                        other.insert_run(Pfn(at), count.min(nr_pages - at));
                        set.union(&other);
                        model.extend(other.iter().map(|pfn| pfn.0));
                    }
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert_eq!(
                    set.next_at_or_after(Pfn(at)).map(|pfn| pfn.0),
                    model.range(at..).next().copied()
                );
                prop_assert_eq!(
                    set.iter_from(Pfn(at)).map(|pfn| pfn.0).collect::<Vec<_>>(),
                    model.range(at..).copied().collect::<Vec<_>>()
                );
            }
            prop_assert_eq!(listed(&set), model.iter().copied().collect::<Vec<_>>());
            for chunk in 0..set.nr_chunks() {
                prop_assert_eq!(set.chunk_len(chunk), set.pages_of_chunk(chunk).count());
            }
            set.clear();
            prop_assert!(set.is_empty() && set.iter().next().is_none());
            prop_assert!(set.iter_from(Pfn(nr_pages + 512)).next().is_none());
        }
    }

    #[test]
    fn a_full_set_holds_every_page_and_no_more() {
        for nr_pages in [1, 63, 64, 65, 511, 512, 513, 1025] {
            let set = PageSet::full(nr_pages);
            assert_eq!(set.len(), nr_pages);
            assert_eq!(listed(&set), (0..nr_pages).collect::<Vec<_>>());
            assert!(!set.contains(Pfn(nr_pages)));
        }
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_page_out_of_range_is_refused() {
        PageSet::empty(100).insert(Pfn(100));
    }
}
