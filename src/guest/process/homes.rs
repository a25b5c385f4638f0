//! Where the pages of an image are to be read: in which process, at which address.
//!
//! Private memory has one place. Shared memory has one in each process that maps it, but not every process that maps an object
//! maps all of it, and a process that has touched a page may have ended: a place is a mapping that is there, whether its
//! process has touched the page or not. Memory that nobody maps has no place, and is no part of the image.

use std::ops::Range;

use super::tracker::{Saw, Seen};
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Home {
    pid: i32,
    /// The address that the chunk's first page has or would have.
    va: u64,
    /// The pages of the chunk that can be read there.
    pages: Range<usize>,
}

/// The places of each 2 MiB chunk as one survey found them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Homes(Vec<Vec<Home>>);

impl Homes {
    /// No places, of an image of `nr_pages` pages.
    pub fn new(nr_pages: u64) -> Self {
        Homes(vec![Vec::new(); (nr_pages as usize).div_ceil(CHUNK_PAGES)])
    }

    /// Forgets all places.
    pub fn clear(&mut self) {
        self.0.iter_mut().for_each(Vec::clear);
    }

    /// Notes what a survey saw. Where several processes have a page the first of them is kept: they are seen in the order in
    /// which they were attached to, so that it is the one that has been there longest.
    pub fn note(&mut self, seen: &Seen) {
        let first = seen.first.in_chunk();
        let pages = match (seen.shared, seen.what) {
            // The number of private memory goes by its address.
            (false, _) => 0..CHUNK_PAGES,
            (true, Saw::Mapped) => first..first + seen.count as usize,
            (true, Saw::Populated | Saw::Written) => return,
        };
        let homes = &mut self.0[seen.first.chunk()];
        let has_it = |home: &Home| home.pages.start <= pages.start && pages.end <= home.pages.end;
        if !homes.iter().any(has_it) {
            let va = seen.va.wrapping_sub((first * PAGE_SIZE) as u64);
            homes.push(Home { pid: seen.pid, va, pages });
        }
    }

    /// The process and the address to read a page at.
    pub fn place(&self, pfn: Pfn) -> Option<(i32, u64)> {
        let home = self.0[pfn.chunk()].iter().find(|home| home.pages.contains(&pfn.in_chunk()))?;
        Some((home.pid, home.va.wrapping_add((pfn.in_chunk() * PAGE_SIZE) as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_its_place_in_the_first_mapping_that_covers_it() {
        let mut homes = Homes::new(2 * CHUNK_PAGES as u64);
        let page = PAGE_SIZE as u64;
        let mut map = |pid, first: u64, count, va| {
            homes.note(&Seen { first: Pfn(first), count, what: Saw::Mapped, shared: true, pid, va });
        };
        map(1, 522, 10, 100 * page);
        map(2, 512, 512, 200 * page);
        map(3, 512, 512, 300 * page);
        let place = |pfn| homes.place(Pfn(pfn)).map(|(pid, va)| (pid, va / page));
        assert_eq!(place(522 + 9), Some((1, 109)));
        assert_eq!(place(522 + 10), Some((2, 220)));
        assert_eq!(place(512), Some((2, 200)));
        assert_eq!(place(3), None);
        homes.clear();
        assert_eq!(homes.place(Pfn(512)), None);
    }
}
