//! What travels between the stages: batches of page numbers, and slots filled with a record.

use crate::page::Pfn;
use crate::page_set::CHUNK_WORDS;

/// The most pages in a batch, and data pages in a slot.
pub const BATCH_PAGES: usize = 64;

/// Page numbers that the scanner has approved for sending, ascending.
#[derive(Clone)]
pub struct Batch {
    pages: [Pfn; BATCH_PAGES],
    len: usize,
    opens: Option<Chunk>,
}

/// A 2 MiB chunk and the pages that there are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its number.
    pub number: usize,
    /// A bit for each of its pages.
    pub words: [u64; CHUNK_WORDS],
}

impl Batch {
    /// A batch of no pages.
    pub const fn new() -> Self {
        Batch { pages: [Pfn(0); BATCH_PAGES], len: 0, opens: None }
    }

    /// A batch whose record is the first of a chunk: it will name all pages of the chunk. Only pages of the chunk may be
    /// added.
    pub const fn opening(chunk: Chunk) -> Self {
        Batch { opens: Some(chunk), ..Self::new() }
    }

    /// The chunk that it opens.
    pub fn opens(&self) -> Option<&Chunk> {
        self.opens.as_ref()
    }

    /// Adds a page. Panics when the batch is full.
    pub fn push(&mut self, pfn: Pfn) {
        self.pages[self.len] = pfn;
        self.len += 1;
    }

    /// The pages.
    pub fn pages(&self) -> &[Pfn] {
        &self.pages[..self.len]
    }

    /// Whether another page finds no room.
    pub fn is_full(&self) -> bool {
        self.len == BATCH_PAGES
    }

    /// Whether there is no page in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs of consecutive guest pages, in wire order.
#[derive(Clone)]
pub struct Runs {
    runs: [(Pfn, u32); BATCH_PAGES],
    len: usize,
}

impl Runs {
    /// No runs.
    pub const fn new() -> Self {
        Runs { runs: [(Pfn(0), 0); BATCH_PAGES], len: 0 }
    }

    /// Adds a page: to the last run if it continues that, else as a run of its own. Panics beyond
    /// [`BATCH_PAGES`] runs.
    pub fn push(&mut self, pfn: Pfn) {
        if let Some((first, count)) = self.runs[..self.len].last_mut()
            && first.0 + u64::from(*count) == pfn.0
        {
            *count += 1;
            return;
        }
        self.runs[self.len] = (pfn, 1);
        self.len += 1;
    }

    /// The runs: first page and number of pages.
    pub fn as_slice(&self) -> &[(Pfn, u32)] {
        &self.runs[..self.len]
    }
}

impl Default for Runs {
    fn default() -> Self {
        Self::new()
    }
}

/// What a mapper says of the record it laid out in a slot.
pub struct RecordInfo {
    /// Pages of the batch that the record names; what it names besides, to open a chunk, does not count.
    pub entries: u32,
    /// Pages that the record carries the data of.
    pub data_pages: u32,
    /// Pages whose data follows from guest memory; none when the slot holds the data itself.
    pub external: Runs,
}

/// A slot that holds a PAGE_DATA record, or the head of one whose pages are sent from guest memory.
pub type FilledSlot = super::slots::Filled<RecordInfo>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_pages_make_one_run() {
        let mut runs = Runs::new();
        for pfn in [3, 4, 5, 7, 8, 20] {
            runs.push(Pfn(pfn));
        }
        assert_eq!(runs.as_slice(), [(Pfn(3), 3), (Pfn(7), 2), (Pfn(20), 1)]);
    }
}
