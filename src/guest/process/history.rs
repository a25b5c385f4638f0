//! What has become of each page of an image so far, so that a difference at the end can be explained ([`super::diagnosis`]).
//!
//! Kept by 2 MiB chunk, and only for chunks of which something was ever populated or sent: 24 bytes a page. The log writes
//! what the surveys found and the mappers what they have read to be sent, each page by one of them at a time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::PageSet;

/// Stands for the digest of a page that is all zeroes, and of one that was never sent otherwise.
pub const ZEROES: u64 = 0;

/// What has become of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// The digest of what was last read of it to be sent, or [`ZEROES`].
    pub sent: u64,
    /// Surveys that were over when it was last read to be sent.
    pub sent_after: u32,
    /// The survey that first found it populated, counted from 1; 0: none has.
    pub populated: u32,
    /// Surveys that found it dirty.
    pub dirty: u32,
    /// The last of them, counted from 1.
    pub dirty_last: u32,
}

#[derive(Default)]
struct PageHistory {
    sent: AtomicU64,
    sent_after: AtomicU32,
    populated: AtomicU32,
    dirty: AtomicU32,
    dirty_last: AtomicU32,
}

type ChunkHistory = Box<[PageHistory]>;

/// What has become of each page.
pub struct History {
    chunks: Vec<OnceLock<ChunkHistory>>,
    surveys: AtomicU32,
}

impl History {
    /// That of an image of `nr_pages` pages to which nothing has happened yet.
    pub fn new(nr_pages: u64) -> Self {
        let chunks = (nr_pages as usize).div_ceil(CHUNK_PAGES);
        History { chunks: (0..chunks).map(|_| OnceLock::new()).collect(), surveys: AtomicU32::new(0) }
    }

    /// Surveys that are over.
    pub fn surveys(&self) -> u32 {
        self.surveys.load(Ordering::Acquire)
    }

    /// Notes what a survey found that is over now: the dirty pages, and by `fresh` those that no survey before it found
    /// populated.
    pub fn survey(&self, dirty: &PageSet, fresh: impl Iterator<Item = Pfn>) {
        let number = self.surveys() + 1;
        for pfn in fresh {
            let page = self.page(pfn);
            if page.populated.load(Ordering::Relaxed) == 0 {
                page.populated.store(number, Ordering::Relaxed);
            }
        }
        for pfn in dirty.iter() {
            let page = self.page(pfn);
            page.dirty.fetch_add(1, Ordering::Relaxed);
            page.dirty_last.store(number, Ordering::Relaxed);
        }
        self.surveys.store(number, Ordering::Release);
    }

    /// Notes that a page was read to be sent, after `surveys` of them; `digest` is that of what was read, or [`ZEROES`].
    pub fn sent(&self, pfn: Pfn, digest: u64, surveys: u32) {
        // Most of an image's room is never populated and goes out as zeroes once.
        if digest == ZEROES && self.chunks[pfn.chunk()].get().is_none() {
            return;
        }
        let page = self.page(pfn);
        page.sent.store(digest, Ordering::Relaxed);
        page.sent_after.store(surveys, Ordering::Relaxed);
    }

    /// What has become of a page.
    pub fn past(&self, pfn: Pfn) -> Past {
        let Some(chunk) = self.chunks[pfn.chunk()].get() else { return Past::default() };
        let page = &chunk[pfn.in_chunk()];
        Past {
            sent: page.sent.load(Ordering::Relaxed),
            sent_after: page.sent_after.load(Ordering::Relaxed),
            populated: page.populated.load(Ordering::Relaxed),
            dirty: page.dirty.load(Ordering::Relaxed),
            dirty_last: page.dirty_last.load(Ordering::Relaxed),
        }
    }

    fn page(&self, pfn: Pfn) -> &PageHistory {
        let fresh = || (0..CHUNK_PAGES).map(|_| PageHistory::default()).collect();
        &self.chunks[pfn.chunk()].get_or_init(fresh)[pfn.in_chunk()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_remembers_its_surveys_and_what_was_last_sent_of_it() {
        let history = History::new(3 * CHUNK_PAGES as u64);
        let mut dirty = PageSet::empty(3 * CHUNK_PAGES as u64);
        history.sent(Pfn(700), ZEROES, history.surveys());
        assert!(history.chunks[1].get().is_none(), "zeroes need no room");
        dirty.insert(Pfn(600));
        history.survey(&dirty, [Pfn(600), Pfn(601)].into_iter());
        history.sent(Pfn(600), 5, history.surveys());
        history.survey(&dirty, std::iter::empty());
        history.survey(&PageSet::empty(3 * CHUNK_PAGES as u64), [Pfn(600)].into_iter());
        history.sent(Pfn(600), 6, history.surveys());
        assert_eq!(
            history.past(Pfn(600)),
            Past { sent: 6, sent_after: 3, populated: 1, dirty: 2, dirty_last: 2 }
        );
        assert_eq!(history.past(Pfn(601)), Past { populated: 1, ..Past::default() });
        assert_eq!((history.past(Pfn(700)), history.past(Pfn(0))), (Past::default(), Past::default()));
        assert!(history.chunks[0].get().is_none() && history.chunks[2].get().is_none());
    }
}
