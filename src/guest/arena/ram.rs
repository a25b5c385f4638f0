//! The machine's memory, seen as pages of little-endian words.

use super::machine::MachineError;
use crate::page::{PAGE_SIZE, Pfn};

/// One page of RAM.
pub(super) type Page = [u8; PAGE_SIZE];

/// The whole of RAM, borrowed for as long as the machine runs: its only writer.
pub(super) struct Ram<'a> {
    pages: &'a mut [Page],
}

impl<'a> Ram<'a> {
    pub(super) fn new(bytes: &'a mut [u8]) -> Result<Self, MachineError> {
        let len = bytes.len();
        match bytes.as_chunks_mut() {
            (pages, []) => Ok(Self { pages }),
            _ => Err(MachineError::PartPage { bytes: len }),
        }
    }

    pub(super) fn nr_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    pub(super) fn page(&self, pfn: Pfn) -> &Page {
        &self.pages[pfn.index()]
    }

    pub(super) fn page_mut(&mut self, pfn: Pfn) -> &mut Page {
        &mut self.pages[pfn.index()]
    }
}

/// The page's 64-bit word number `at`.
pub(super) fn word(page: &Page, at: usize) -> u64 {
    u64::from_le_bytes(page.as_chunks().0[at])
}

/// Writes the page's 64-bit word number `at`.
pub(super) fn set_word(page: &mut Page, at: usize, value: u64) {
    page.as_chunks_mut().0[at] = value.to_le_bytes();
}
