//! Pages and their numbers: the few words that every part of pagecast shares.

use std::fmt;

/// Bytes in a guest page. Xen's x86 guests know no other size on the wire.
pub const PAGE_SIZE: usize = 4096;

/// Pages in a chunk: 2 MiB of guest memory, the unit in which state is kept and lanes are assigned.
pub const CHUNK_PAGES: usize = 512;

/// A guest pseudo-physical frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The first page of a 2 MiB chunk.
    pub fn first_of(chunk: usize) -> Self {
        Pfn((chunk * CHUNK_PAGES) as u64)
    }

    /// The 2 MiB chunk this page lies in.
    pub fn chunk(self) -> usize {
        (self.0 / CHUNK_PAGES as u64) as usize
    }

    /// The page's place within its chunk, `0..CHUNK_PAGES`.
    pub fn in_chunk(self) -> usize {
        (self.0 % CHUNK_PAGES as u64) as usize
    }

    /// Which of `lanes` connections the page goes over for the whole migration: by its 2 MiB chunk, so that an older
    /// copy of a page can never overtake a newer one.
    pub fn lane(self, lanes: usize) -> usize {
        self.chunk() % lanes
    }

    /// The page's number as an index into an array that has an entry for each page.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Whether every byte is zero; stops at the first 64 bytes that are not.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_set_bit_anywhere_makes_a_page_non_zero() {
        let mut page = [0u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page[at] = 0x80;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
