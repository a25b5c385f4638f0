//! Sequence tables: how often each data page has been written.
//!
//! A table is a header {page number, updates, checksum} and 32-bit counts. The checksum is a sum over (entry,
//! count), so that an update is constant time; the updates are the sum of the counts. A count has room for
//! 2^32 - 1 writes of one page: twelve days of the hottest page of the kv workload at its default rate.

use super::ram::{Page, set_word, word};
use super::rng::mix;
use crate::page::{PAGE_SIZE, Pfn};

/// Words of the header.
const PFN: usize = 0;
const UPDATES: usize = 1;
const CHECKSUM: usize = 2;

const HEADER_BYTES: usize = 3 * size_of::<u64>();

/// Counts in a table.
pub(super) const ENTRIES: usize = (PAGE_SIZE - HEADER_BYTES) / size_of::<u32>();

/// Where a data page's count is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The table's page.
    pub(super) table: Pfn,
    /// The entry within the table, `0..ENTRIES`.
    pub(super) slot: usize,
}

/// Makes the page a table whose counts are all 0.
pub(super) fn format(page: &mut Page, pfn: Pfn) {
    page.fill(0);
    set_word(page, PFN, pfn.0);
    set_word(page, CHECKSUM, sums(page).1);
}

/// The count in `slot`.
pub(super) fn count(page: &Page, slot: usize) -> u32 {
    u32::from_le_bytes(counts(page)[slot])
}

/// Adds one to the count in `slot`.
pub(super) fn increment(page: &mut Page, slot: usize) {
    let old = count(page, slot);
    let new = old.wrapping_add(1);
    page[HEADER_BYTES..].as_chunks_mut().0[slot] = new.to_le_bytes();
    set_word(page, UPDATES, word(page, UPDATES).wrapping_add(1));
    let checksum = word(page, CHECKSUM).wrapping_sub(term(slot, old)).wrapping_add(term(slot, new));
    set_word(page, CHECKSUM, checksum);
}

/// The writes a table holds, or nothing where it contradicts itself or belongs elsewhere.
pub(super) fn updates(page: &Page, pfn: Pfn) -> Option<u64> {
    let header = [word(page, PFN), word(page, UPDATES), word(page, CHECKSUM)];
    let (updates, checksum) = sums(page);
    (header == [pfn.0, updates, checksum]).then_some(updates)
}

fn counts(page: &Page) -> &[[u8; 4]] {
    page[HEADER_BYTES..].as_chunks().0
}

/// The sum of the counts, and the checksum over them.
fn sums(page: &Page) -> (u64, u64) {
    counts(page).iter().enumerate().fold((0, 0u64), |(updates, checksum), (slot, count)| {
        let count = u32::from_le_bytes(*count);
        (updates + u64::from(count), checksum.wrapping_add(term(slot, count)))
    })
}

/// What one entry adds to the checksum.
fn term(slot: usize, count: u32) -> u64 {
    mix((slot as u64) << 32 | u64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_keep_the_sums_and_any_flipped_bit_breaks_them() {
        let mut page = [0xff; PAGE_SIZE];
        format(&mut page, Pfn(3));
        assert_eq!(updates(&page, Pfn(3)), Some(0));
        for write in 0..5_000 {
            increment(&mut page, write * 7 % ENTRIES);
        }
        assert_eq!(updates(&page, Pfn(3)), Some(5_000));
        assert_eq!(updates(&page, Pfn(4)), None);
        assert_eq!(count(&page, 0) + count(&page, 7), 10);
        for bit in (0..PAGE_SIZE * 8).step_by(5) {
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(updates(&page, Pfn(3)), None, "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
