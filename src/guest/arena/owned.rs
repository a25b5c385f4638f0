//! Owned pages: each carries its number, its version and a checksum over a body that no other version has.

use xxhash_rust::xxh3::xxh3_64;

use super::ram::{Page, set_word, word};
use super::rng::{GOLDEN, mix};
use crate::page::Pfn;

/// Words of the header. The checksum is that of everything after it.
const CHECKSUM: usize = 0;
const PFN: usize = 1;
const SEQ: usize = 2;

/// What a whole page says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label {
    /// The page it was written as.
    pub(super) pfn: Pfn,
    /// How often that page had been written, this time included.
    pub(super) seq: u64,
}

/// Writes version `label.seq` of a page, all of it.
pub(super) fn write(page: &mut Page, seed: u64, label: Label) {
    let Label { pfn, seq } = label;
    fill(page, mix(seed ^ mix(pfn.0 ^ mix(seq))));
    set_word(page, PFN, pfn.0);
    set_word(page, SEQ, seq);
    set_word(page, CHECKSUM, checksum(page));
}

/// The label of a page whose checksum is right.
pub(super) fn read(page: &Page) -> Option<Label> {
    (word(page, CHECKSUM) == checksum(page))
        .then(|| Label { pfn: Pfn(word(page, PFN)), seq: word(page, SEQ) })
}

fn checksum(page: &Page) -> u64 {
    xxh3_64(&page[(CHECKSUM + 1) * size_of::<u64>()..])
}

/// Fills the page with words that differ in every version. Only additions, shifts and exclusive-ors, because
/// baseline x86-64 has no vector multiplication of 64-bit words.
fn fill(page: &mut Page, key: u64) {
    let mut x = key;
    for word in page.as_chunks_mut().0 {
        x = x.wrapping_add(GOLDEN);
        let mut y = x ^ (x >> 29);
        y = y.wrapping_add(y << 25);
        y ^= y >> 32;
        *word = y.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;
    use std::collections::HashSet;

    fn version(seq: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        write(&mut page, 1, Label { pfn: Pfn(77), seq });
        page
    }

    #[test]
    fn a_page_reads_back_its_label() {
        assert_eq!(read(&version(5)), Some(Label { pfn: Pfn(77), seq: 5 }));
        assert_eq!(read(&[0; PAGE_SIZE]), None);
    }

    #[test]
    fn any_mixture_of_two_versions_is_torn() {
        let (old, new) = (version(1), version(2));
        for cut in (8..PAGE_SIZE).step_by(8) {
            let mut torn = new;
            torn[cut..].copy_from_slice(&old[cut..]);
            assert_eq!(read(&torn), None, "cut at {cut}");
        }
    }

    #[test]
    fn no_word_of_a_body_comes_twice() {
        let pages = [version(1), version(2), version(3)];
        let words: HashSet<[u8; 8]> =
            pages.iter().flat_map(|page| &page.as_chunks::<8>().0[3..]).copied().collect();
        assert_eq!(words.len(), 3 * 509);
    }
}
