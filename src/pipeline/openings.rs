//! The first record of each 2 MiB chunk: it names all pages of the chunk that there are, those that come later without data.
//!
//! A stock receiver from Xen 4.21 on builds a superpage if the 512 pages of an aligned 2 MiB chunk stand in one record when
//! they are named for the first time, and never later. So the pages that the forecast holds back are allocated (XALLOC)
//! together with the first that it lets go. Older receivers allocate them too, page by page.

use crate::page_set::{CHUNK_WORDS, PageSet};

/// The chunks that have not been opened.
pub struct Openings {
    populated: PageSet,
    opened: Vec<bool>,
}

impl Openings {
    /// For a guest with these pages, none of which has been sent.
    pub fn new(populated: PageSet) -> Self {
        let opened = vec![false; populated.nr_chunks()];
        Openings { populated, opened }
    }

    /// Opens a chunk: its pages, unless it is open or has none.
    pub fn open(&mut self, chunk: usize) -> Option<[u64; CHUNK_WORDS]> {
        let opened = std::mem::replace(&mut self.opened[chunk], true);
        (!opened && self.populated.chunk_len(chunk) > 0).then(|| *self.populated.chunk_words(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Pfn;

    #[test]
    fn a_chunk_is_opened_once_with_the_pages_that_there_are() {
        let mut populated = PageSet::empty(3 * 512);
        populated.insert_run(Pfn(512 + 3), 70);
        let mut openings = Openings::new(populated);
        assert_eq!(openings.open(0), None, "nothing but holes");
        assert_eq!(openings.open(1), Some([!0 << 3, (1 << 9) - 1, 0, 0, 0, 0, 0, 0]));
        assert_eq!(openings.open(1), None);
    }
}
