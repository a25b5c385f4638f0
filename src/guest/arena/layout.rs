//! Which page of RAM is what. Derived from the size, the zero share and the seed; never changes.

use super::machine::MachineError;
use super::rng::{Purpose, Rng};
use super::table::{ENTRIES, Entry};
use crate::page::{CHUNK_PAGES, Pfn};

/// The CPU page.
pub(super) const CPU: Pfn = Pfn(0);

/// The fewest pages a machine can have: 4 MiB, so that every workload's regions have room.
const MIN_PAGES: u64 = 1024;

/// The most chunks, in percent, that can be zero pages.
const MAX_ZERO_SHARE_PERCENT: u8 = 90;

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Cpu,
    Table,
    /// Written at boot and by the workload.
    Owned(Entry),
    /// Never written.
    Zero(Entry),
}

/// The map of RAM.
pub(super) struct Layout {
    nr_pages: u64,
    /// Number of the first data page; the pages from 1 up to here are tables.
    first_data: u64,
    /// For each chunk, whether its pages are zero pages.
    zero_chunks: Vec<bool>,
    /// The chunks that hold owned pages, in order; the first is the one that `first_data` lies in.
    owned_chunks: Vec<u64>,
    nr_owned: u64,
}

impl Layout {
    pub(super) fn new(nr_pages: u64, zero_share_percent: u8, seed: u64) -> Result<Self, MachineError> {
        if nr_pages < MIN_PAGES {
            return Err(MachineError::TooSmall { pages: nr_pages, min_pages: MIN_PAGES });
        }
        if zero_share_percent > MAX_ZERO_SHARE_PERCENT {
            let max_percent = MAX_ZERO_SHARE_PERCENT;
            return Err(MachineError::ZeroShare { percent: zero_share_percent, max_percent });
        }
        // A table and the pages it counts are ENTRIES + 1 pages.
        let tables = (nr_pages - 1).div_ceil(ENTRIES as u64 + 1);
        let first_data = 1 + tables;
        let nr_chunks = nr_pages.div_ceil(CHUNK_PAGES as u64);
        let first_chunk = Pfn(first_data).chunk() as u64;

        let wanted = (nr_chunks * u64::from(zero_share_percent) + 50) / 100;
        let zero_chunks = choose(wanted, first_chunk + 1..nr_chunks, seed);
        let owned_chunks: Vec<u64> =
            (first_chunk..nr_chunks).filter(|&chunk| !zero_chunks[chunk as usize]).collect();
        let owned_ends = owned_chunks.iter().map(|chunk| chunk_start(chunk + 1).min(nr_pages));
        let nr_owned = owned_chunks
            .iter()
            .zip(owned_ends)
            .map(|(&chunk, end)| end - chunk_start(chunk).max(first_data))
            .sum();
        Ok(Self { nr_pages, first_data, zero_chunks, owned_chunks, nr_owned })
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    pub(super) fn tables(&self) -> impl Iterator<Item = Pfn> + use<> {
        (1..self.first_data).map(Pfn)
    }

    /// The number of owned pages.
    pub(super) fn nr_owned(&self) -> u64 {
        self.nr_owned
    }

    /// Owned page number `at` of `0..nr_owned`, in the order of page numbers.
    pub(super) fn owned(&self, at: u64) -> Pfn {
        // Of the owned chunks only the last can be cut short, and only the first can begin late.
        let from_first_chunk = at + Pfn(self.first_data).in_chunk() as u64;
        let chunk = self.owned_chunks[Pfn(from_first_chunk).chunk()];
        Pfn(chunk_start(chunk) + Pfn(from_first_chunk).in_chunk() as u64)
    }

    /// Where the count of a data page is.
    pub(super) fn entry(&self, pfn: Pfn) -> Entry {
        let data = pfn.0 - self.first_data;
        Entry { table: Pfn(1 + data / ENTRIES as u64), slot: (data % ENTRIES as u64) as usize }
    }

    pub(super) fn role(&self, pfn: Pfn) -> Role {
        if pfn == CPU {
            Role::Cpu
        } else if pfn.0 < self.first_data {
            Role::Table
        } else if self.zero_chunks[pfn.chunk()] {
            Role::Zero(self.entry(pfn))
        } else {
            Role::Owned(self.entry(pfn))
        }
    }
}

fn chunk_start(chunk: u64) -> u64 {
    chunk * CHUNK_PAGES as u64
}

/// Chooses `wanted` of the `eligible` chunks, or all; the answer has an entry for each chunk up to the last.
fn choose(wanted: u64, eligible: std::ops::Range<u64>, seed: u64) -> Vec<bool> {
    let mut chosen = vec![false; eligible.end as usize];
    let mut rng = Rng::new(seed, Purpose::Layout);
    let mut wanted = wanted;
    for chunk in eligible.clone() {
        // Selection sampling: chance = still wanted / still to come.
        if rng.below(eligible.end - chunk) < wanted {
            chosen[chunk as usize] = true;
            wanted -= 1;
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_pages_are_those_of_role_owned_in_order() {
        for (nr_pages, zero_share_percent) in [(1024, 0), (1024, 50), (1500, 25), (4096, 90), (9999, 30)] {
            let layout = Layout::new(nr_pages, zero_share_percent, 11).unwrap();
            let by_role: Vec<Pfn> =
                (0..nr_pages).map(Pfn).filter(|&pfn| matches!(layout.role(pfn), Role::Owned(_))).collect();
            let by_number: Vec<Pfn> = (0..layout.nr_owned()).map(|at| layout.owned(at)).collect();
            assert_eq!(by_role, by_number, "{nr_pages} pages");
        }
    }

    #[test]
    fn every_data_page_has_an_entry_of_its_own_in_an_existing_table() {
        for nr_pages in [1024, 1019 * 3, 1019 * 3 + 1, 1019 * 3 + 2, 131_072] {
            let layout = Layout::new(nr_pages, 25, 1).unwrap();
            let last_table = layout.tables().last().unwrap();
            let mut previous = None;
            for pfn in (layout.first_data..nr_pages).map(Pfn) {
                let entry = layout.entry(pfn);
                assert!(entry.table <= last_table && entry.slot < ENTRIES, "{nr_pages} pages: {entry:?}");
                let place = Some((entry.table, entry.slot));
                assert!(place > previous);
                previous = place;
            }
        }
    }

    #[test]
    fn the_zero_share_is_exact_scattered_and_chosen_by_the_seed() {
        let zero = |seed| Layout::new(131_072, 25, seed).unwrap().zero_chunks;
        let chunks = zero(1);
        assert_eq!(chunks.iter().filter(|&&zero| zero).count(), 64);
        for quarter in chunks.chunks(64) {
            let share = quarter.iter().filter(|&&zero| zero).count();
            assert!((4..=32).contains(&share), "{share} of 64 chunks");
        }
        assert_ne!(chunks, zero(2));
        assert_eq!(Layout::new(131_072, 25, 1).unwrap().nr_owned(), 131_072 - 64 * 512 - 130);
        assert!(!Layout::new(131_072, 0, 1).unwrap().zero_chunks.contains(&true));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(matches!(Layout::new(1023, 25, 1), Err(MachineError::TooSmall { pages: 1023, .. })));
        assert!(matches!(Layout::new(1024, 91, 1), Err(MachineError::ZeroShare { percent: 91, .. })));
    }
}
