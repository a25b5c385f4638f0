//! A set of guest pages: one bit a page, with a count for each 2 MiB chunk so that empty chunks cost nothing
//! to walk. The scanner's pending set, the log of a round and every dirty sample are such sets.

use crate::page::{CHUNK_PAGES, Pfn};
use crate::sys::simd::{Work, at_best};

/// 64-bit words in a chunk: 512 bits, one cache line.
pub const CHUNK_WORDS: usize = CHUNK_PAGES / 64;

/// Lines of a raw bitmap that are looked at together: 256 bytes, so that a clean stretch costs one branch for four lines.
const LINES_AT_ONCE: usize = 4;

#[derive(Clone, Default)]
#[repr(align(64))]
struct ChunkBits([u64; CHUNK_WORDS]);

impl ChunkBits {
    /// Adds the pages of `words`; returns how many were not there.
    #[inline(always)]
    fn insert(&mut self, words: &[u64; CHUNK_WORDS]) -> u32 {
        let mut added = 0;
        for (mine, theirs) in self.0.iter_mut().zip(words) {
            added += (theirs & !*mine).count_ones();
            *mine |= theirs;
        }
        added
    }
}

/// Calls `visit` with the place in its chunk of each page in `words`, ascending.
#[inline(always)]
pub fn for_each_place(words: &[u64; CHUNK_WORDS], mut visit: impl FnMut(usize)) {
    for (index, word) in words.iter().enumerate() {
        let mut rest = *word;
        while rest != 0 {
            visit(index * 64 + rest.trailing_zeros() as usize);
            rest &= rest - 1;
        }
    }
}

/// The places in their chunk of some pages, ascending: what has to be gone through more than once is listed once.
///
/// Going through the bits of a sparse chunk costs a mispredicted branch in every other word. Listing them does not:
/// four places of each word are written down whether they are there or not, and the next word's overwrite the rest.
#[derive(Clone)]
pub struct Places {
    len: usize,
    places: [u16; CHUNK_PAGES + Self::AT_ONCE],
}

impl Places {
    const AT_ONCE: usize = 4;

    /// No places.
    pub const NONE: Self = Places { len: 0, places: [0; CHUNK_PAGES + Self::AT_ONCE] };

    /// Lists the pages in `words`.
    #[inline(always)]
    pub fn list(&mut self, words: &[u64; CHUNK_WORDS]) {
        self.len = 0;
        for (index, word) in words.iter().enumerate() {
            let (mut rest, mut at) = (*word, self.len);
            self.len += word.count_ones() as usize;
            loop {
                for place in &mut self.places[at..at + Self::AT_ONCE] {
                    *place = (index * 64) as u16 + rest.trailing_zeros() as u16;
                    rest &= rest.wrapping_sub(1);
                }
                at += Self::AT_ONCE;
                if rest == 0 {
                    break;
                }
            }
        }
    }

    /// The places, each below [`CHUNK_PAGES`].
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.places[..self.len].iter().map(|place| usize::from(*place) % CHUNK_PAGES)
    }

    /// How many there are.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.len
    }
}

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
        at_best(InsertSet { set: self, other });
    }

    /// Adds the pages of a raw bitmap such as a hypervisor's dirty log: bit `i % 64` of word `i / 64` is page `i`. Bits
    /// beyond the page-number space are left out. Clean stretches are passed over at the speed of memory. Panics if
    /// the bitmap has not exactly the words that it takes.
    pub fn insert_bitmap(&mut self, words: &[u64]) {
        let expected = (self.nr_pages as usize).div_ceil(64);
        assert_eq!(words.len(), expected, "a bitmap of another page-number space");
        let whole = (self.nr_pages as usize) / CHUNK_PAGES;
        let (head, tail) = words.split_at(whole * CHUNK_WORDS);
        at_best(InsertLines { set: self, lines: head.as_chunks().0 });
        if !tail.is_empty() {
            let mut last = [0; CHUNK_WORDS];
            last[..tail.len()].copy_from_slice(tail);
            let beyond = self.nr_pages % 64;
            if beyond > 0 {
                last[tail.len() - 1] &= (1 << beyond) - 1;
            }
            let added = self.bits[whole].insert(&last);
            self.counts[whole] += added as u16;
            self.total += u64::from(added);
        }
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        if self.total == 0 {
            return;
        }
        for (bits, count) in self.bits.iter_mut().zip(&mut self.counts) {
            if *count > 0 {
                *bits = ChunkBits::default();
                *count = 0;
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
        let words = &self.bits[chunk].0;
        ChunkPages { words, index: 0, rest: words[0], base: (chunk * CHUNK_PAGES) as u64 }
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

/// Adds a set to another.
struct InsertSet<'a> {
    set: &'a mut PageSet,
    other: &'a PageSet,
}

impl Work for InsertSet<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let PageSet { bits, counts, total, .. } = self.set;
        let theirs = self.other.bits.iter().zip(&self.other.counts);
        for ((mine, count), (words, their_count)) in bits.iter_mut().zip(counts).zip(theirs) {
            if *their_count > 0 {
                let added = mine.insert(&words.0);
                *count += added as u16;
                *total += u64::from(added);
            }
        }
    }
}

/// Adds the lines of a raw bitmap, a chunk each, to a set.
struct InsertLines<'a> {
    set: &'a mut PageSet,
    lines: &'a [[u64; CHUNK_WORDS]],
}

impl InsertLines<'_> {
    #[inline(always)]
    fn insert(&mut self, chunk: usize, line: &[u64; CHUNK_WORDS]) {
        let added = self.set.bits[chunk].insert(line);
        self.set.counts[chunk] += added as u16;
        self.set.total += u64::from(added);
    }
}

impl Work for InsertLines<'_> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let (groups, rest) = self.lines.as_chunks::<LINES_AT_ONCE>();
        for (group, lines) in groups.iter().enumerate() {
            if lines.as_flattened().iter().fold(0, |all, word| all | word) != 0 {
                for (index, line) in lines.iter().enumerate() {
                    self.insert(group * LINES_AT_ONCE + index, line);
                }
            }
        }
        for (index, line) in rest.iter().enumerate() {
            self.insert(groups.len() * LINES_AT_ONCE + index, line);
        }
    }
}

/// The pages of one chunk, ascending.
struct ChunkPages<'a> {
    words: &'a [u64; CHUNK_WORDS],
    /// The word whose bits are in `rest`.
    index: usize,
    rest: u64,
    base: u64,
}

impl Iterator for ChunkPages<'_> {
    type Item = Pfn;

    #[inline]
    fn next(&mut self) -> Option<Pfn> {
        while self.rest == 0 {
            self.index += 1;
            self.rest = *self.words.get(self.index)?;
        }
        let bit = self.rest.trailing_zeros();
        self.rest &= self.rest - 1;
        Some(Pfn(self.base + self.index as u64 * 64 + u64::from(bit)))
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

    proptest! {
        #[test]
        fn a_bitmap_goes_in_as_if_page_by_page(
            nr_pages in 1u64..9000,
            runs in proptest::collection::vec((0u64..9000, 1u64..400), 0..12),
            before in proptest::collection::vec(0u64..9000, 0..40),
            garbage: u64,
        ) {
            let mut words = vec![0u64; (nr_pages as usize).div_ceil(64)];
            let mut expected = PageSet::empty(nr_pages);
            let mut set = PageSet::empty(nr_pages);
            for page in before {
                expected.insert(Pfn(page % nr_pages));
                set.insert(Pfn(page % nr_pages));
            }
            for page in runs.into_iter().flat_map(|(first, count)| first..first + count) {
                let page = page % nr_pages;
                words[page as usize / 64] |= 1 << (page % 64);
                expected.insert(Pfn(page));
            }
            if nr_pages % 64 > 0 {
                *words.last_mut().expect("at least one word") |= garbage << (nr_pages % 64);
            }
            set.insert_bitmap(&words);
            prop_assert_eq!(listed(&set), listed(&expected));
            prop_assert_eq!(set.len(), expected.len());
            for chunk in 0..set.nr_chunks() {
                prop_assert_eq!(set.chunk_len(chunk), expected.chunk_len(chunk));
                let mut places = Vec::new();
                for_each_place(set.chunk_words(chunk), |place| places.push(place));
                let pages: Vec<usize> = set.pages_of_chunk(chunk).map(Pfn::in_chunk).collect();
                prop_assert_eq!(&places, &pages);
                let mut list = Places::NONE;
                list.list(set.chunk_words(chunk));
                prop_assert_eq!((list.len(), list.iter().collect::<Vec<_>>()), (pages.len(), pages));
            }
        }
    }

    #[test]
    #[should_panic(expected = "another page-number space")]
    fn a_bitmap_of_another_size_is_refused() {
        PageSet::empty(100).insert_bitmap(&[0; 3]);
    }

    #[test]
    fn a_set_that_grows_keeps_its_pages_and_takes_new_ones() {
        let mut set = PageSet::empty(0);
        for (nr_pages, page) in [(1, 0), (512, 511), (600, 512), (5000, 4999)] {
            set.grow(nr_pages);
            assert!(set.insert(Pfn(page)) && set.nr_pages() == nr_pages);
        }
        set.grow(7);
        assert_eq!((set.nr_pages(), listed(&set)), (5000, vec![0, 511, 512, 4999]));
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
