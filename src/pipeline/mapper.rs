//! The mapper: turns approved page numbers into records in slots.
//!
//! Staged, it copies each page into the slot and finds zero pages in the same pass. Direct, it lays out only the
//! record's head, and the sender takes the pages from guest memory. Either way the dirty bit of a page was cleared
//! before the page is read here, so that a write during or after the reading is seen by a later sample.

use std::sync::Arc;
use std::time::Duration;

use super::batch::{Batch, FilledSlot, RecordInfo, Runs};
use super::ring::{Consumer, PopError, Producer, PushError};
use super::shared::Shared;
use super::slots::Slot;
use crate::guest::{PageContent, PageSource};
use crate::page::Pfn;
use crate::page_set::PageSet;
use crate::stream::records::PageKind;
use crate::stream::writer::PageRecord;
use crate::sys::cpu;

/// Pages asked for ahead of the one being read.
const PREFETCH: usize = 4;

/// How pages come into records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapMode {
    /// Copied into the slot.
    Stage,
    /// Named in the slot and sent from guest memory.
    Reference,
}

/// What a mapper leaves behind.
pub struct MapperReport {
    /// Transmissions of pages as zero, without data.
    pub zero_pages: u64,
    /// Pages last transmitted as zero.
    pub zero_set: PageSet,
    /// CPU time of the thread.
    pub cpu: Duration,
}

/// What joins a mapper to the other threads.
pub struct Links {
    /// From the scanner.
    pub batches: Consumer<Batch>,
    /// From the sender.
    pub free: Consumer<Slot>,
    /// To the sender.
    pub filled: Producer<FilledSlot>,
    /// To the scanner: pages that turned out to be zero.
    pub zero_notes: Producer<Batch>,
}

/// A mapper's state.
pub struct Mapper {
    source: Box<dyn PageSource>,
    mode: MapMode,
    batches: Consumer<Batch>,
    free: Consumer<Slot>,
    filled: Producer<FilledSlot>,
    zero_notes: Producer<Batch>,
    shared: Arc<Shared>,
    zero_pages: u64,
    zero_set: PageSet,
}

impl Mapper {
    /// A mapper of one lane over a guest of `nr_pages` pages.
    pub fn new(
        source: Box<dyn PageSource>,
        mode: MapMode,
        links: Links,
        shared: Arc<Shared>,
        nr_pages: u64,
    ) -> Self {
        let Links { batches, free, filled, zero_notes } = links;
        let zero_set = PageSet::empty(nr_pages);
        Mapper { source, mode, batches, free, filled, zero_notes, shared, zero_pages: 0, zero_set }
    }

    /// Runs until the scanner has handed out its last batch or the migration is aborted.
    pub fn run(mut self) -> MapperReport {
        let mut idle = self.shared.idle();
        while !self.shared.is_aborted() {
            match self.batches.pop() {
                Ok(batch) => {
                    idle.worked();
                    if !self.serve(&batch) {
                        break;
                    }
                }
                Err(PopError::Empty) => idle.wait(Duration::MAX),
                Err(PopError::Closed) => break,
            }
        }
        MapperReport { zero_pages: self.zero_pages, zero_set: self.zero_set, cpu: cpu::thread_cpu_time() }
    }

    /// Fills one slot with a batch; a batch always fits. False if the lane is at its end.
    fn serve(&mut self, batch: &Batch) -> bool {
        let Some(mut slot) = self.free_slot() else { return false };
        let mut external = Runs::new();
        let mut new_zeroes = Batch::new();
        let mut record = PageRecord::new(slot.bytes_mut());
        let pages = batch.pages();
        if self.mode == MapMode::Stage {
            self.source.gather(pages);
        }
        for pfn in pages.iter().take(PREFETCH) {
            self.source.prefetch(*pfn);
        }
        for (index, pfn) in pages.iter().enumerate() {
            if let Some(ahead) = pages.get(index + PREFETCH) {
                self.source.prefetch(*ahead);
            }
            let content = match self.mode {
                MapMode::Stage => self.source.copy(*pfn, record.next_page()),
                MapMode::Reference => self.source.inspect(*pfn),
            };
            match (content, self.mode) {
                (PageContent::Absent, _) => {
                    record.push_empty(*pfn, PageKind::Xtab);
                    continue;
                }
                (PageContent::Zero, _) => {
                    record.push_empty(*pfn, PageKind::Alloc);
                    self.zero_pages += 1;
                    if self.zero_set.insert(*pfn) {
                        new_zeroes.push(*pfn);
                    }
                    continue;
                }
                (PageContent::Data, MapMode::Stage) => record.commit(*pfn),
                (PageContent::Data, MapMode::Reference) => {
                    record.push_external(*pfn);
                    external.push(*pfn);
                }
            }
            self.forget_zero(*pfn);
        }
        if !new_zeroes.is_empty() {
            // A note that finds no room is no loss but to the stop rule's idea of the guest's size.
            let _ = self.zero_notes.push(new_zeroes);
        }
        let info =
            RecordInfo { entries: record.entries() as u32, data_pages: record.data_pages() as u32, external };
        let range = record.finish();
        match FilledSlot::new(slot, range, info) {
            Ok(filled) => self.pass_on(filled),
            Err(_) => unreachable!("a record lies within the slot that it was laid out in"),
        }
    }

    fn forget_zero(&mut self, pfn: Pfn) {
        if !self.zero_set.is_empty() {
            self.zero_set.remove(pfn);
        }
    }

    fn free_slot(&mut self) -> Option<Slot> {
        let mut idle = self.shared.idle();
        loop {
            match self.free.pop() {
                Ok(slot) => return Some(slot),
                Err(PopError::Closed) => return None,
                Err(PopError::Empty) if self.shared.is_aborted() => return None,
                Err(PopError::Empty) => idle.wait(Duration::MAX),
            }
        }
    }

    fn pass_on(&mut self, mut filled: FilledSlot) -> bool {
        let mut idle = self.shared.idle();
        loop {
            match self.filled.push(filled) {
                Ok(()) => return true,
                Err(PushError::Closed(_)) => return false,
                Err(PushError::Full(_)) if self.shared.is_aborted() => return false,
                Err(PushError::Full(back)) => filled = back,
            }
            idle.wait(Duration::MAX);
        }
    }
}
