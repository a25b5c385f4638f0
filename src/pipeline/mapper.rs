//! The mapper: turns approved page numbers into records in slots.
//!
//! Staged, it copies each page into the slot and finds zero pages in the same pass. Direct, it lays out only the
//! record's head, and the sender takes the pages from guest memory. Either way the dirty bit of a page was cleared
//! before the page is read here, so that a write during or after the reading is seen by a later sample.
//!
//! A page that turns out not to be there is put aside, and looked for once more when the scanner has handed out its last
//! batch: the guest stands still then, and what is not there will not come any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::batch::{BATCH_PAGES, Batch, Chunk, FilledSlot, RecordInfo, Runs};
use super::lanes::Wire;
use super::latency::{Latencies, Stage};
use super::ring::{Consumer, PopError, Producer, PushError};
use super::shared::{Shared, Step};
use super::slots::Slot;
use crate::guest::{PageContent, PageSource};
use crate::page::{CHUNK_PAGES, Pfn};
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

impl MapMode {
    /// Whether the mapper copies.
    pub fn copies(self) -> bool {
        self == MapMode::Stage
    }
}

/// Which lane a mapper is of, and how it lays pages out.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Number of the lane.
    pub lane: usize,
    /// How pages come into records.
    pub mode: MapMode,
    /// What the other end understands.
    pub wire: Wire,
}

/// What a mapper leaves behind.
pub struct MapperReport {
    /// Transmissions of pages as zero, without data.
    pub zero_pages: u64,
    /// Pages last transmitted as zero.
    pub zero_set: PageSet,
    /// CPU time of the thread.
    pub cpu: Duration,
    /// How long batches took.
    pub latencies: Latencies,
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
    way: Way,
    batches: Consumer<Batch>,
    free: Consumer<Slot>,
    filled: Producer<FilledSlot>,
    zero_notes: Producer<Batch>,
    shared: Arc<Shared>,
    zero_pages: u64,
    zero_set: PageSet,
    /// A slot to be filled next.
    spare: Option<Slot>,
    /// A filled slot that has found no room yet.
    outgoing: Option<FilledSlot>,
    /// Handed out and not there.
    absent: PageSet,
    /// Of these, the ones to be looked for once more, from when the scanner has handed out its last batch.
    again: Option<PageSet>,
    latencies: Latencies,
}

impl Mapper {
    /// A mapper of one lane over a guest of `nr_pages` pages.
    pub fn new(
        source: Box<dyn PageSource>,
        way: Way,
        links: Links,
        shared: Arc<Shared>,
        nr_pages: u64,
    ) -> Self {
        let Links { batches, free, filled, zero_notes } = links;
        Mapper {
            source,
            way,
            batches,
            free,
            filled,
            zero_notes,
            shared,
            zero_pages: 0,
            zero_set: PageSet::empty(nr_pages),
            spare: None,
            outgoing: None,
            absent: PageSet::empty(nr_pages),
            again: None,
            latencies: Latencies::of(match way.mode {
                MapMode::Stage => &[Stage::Map, Stage::Copy],
                MapMode::Reference => &[Stage::Map],
            }),
        }
    }

    /// Runs until the scanner has handed out its last batch or the migration is aborted.
    pub fn run(mut self) -> MapperReport {
        let mut idle = self.shared.idle();
        while !self.shared.is_aborted() {
            match self.step() {
                Step::Done => break,
                step => idle.follow(step),
            }
        }
        self.report()
    }

    pub(super) fn report(self) -> MapperReport {
        MapperReport {
            zero_pages: self.zero_pages,
            zero_set: self.zero_set,
            cpu: cpu::thread_cpu_time(),
            latencies: self.latencies,
        }
    }

    /// Passes on what is filled, or fills a slot with a batch, if there are both.
    pub(super) fn step(&mut self) -> Step {
        if self.outgoing.is_some() {
            return self.pass_on();
        }
        let slot = match self.spare.take().map_or_else(|| self.free.pop(), Ok) {
            Ok(slot) => slot,
            Err(PopError::Empty) => return Step::Wait(Duration::MAX),
            Err(PopError::Closed) => return Step::Done,
        };
        match self.next_batch() {
            Ok(batch) => {
                self.serve(slot, &batch);
                self.pass_on()
            }
            Err(nothing) => {
                self.spare = Some(slot);
                if nothing == PopError::Closed { Step::Done } else { Step::Wait(Duration::MAX) }
            }
        }
    }

    /// The next batch, from the scanner or, when that has none any more, of pages that were not there: the guest stands still
    /// then, and they are there now or never.
    fn next_batch(&mut self) -> Result<Batch, PopError> {
        match self.batches.pop() {
            Err(PopError::Closed) => self.look_again().ok_or(PopError::Closed),
            other => other,
        }
    }

    fn look_again(&mut self) -> Option<Batch> {
        if self.again.is_none() && self.absent.is_empty() {
            return None;
        }
        let again = self.again.get_or_insert_with(|| {
            std::mem::replace(&mut self.absent, PageSet::empty(self.zero_set.nr_pages()))
        });
        let mut batch = Batch::new();
        again.iter().take(BATCH_PAGES).for_each(|pfn| batch.push(pfn));
        for pfn in batch.pages() {
            again.remove(*pfn);
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// Fills a slot with a batch; a batch always fits.
    fn serve(&mut self, mut slot: Slot, batch: &Batch) {
        let pages = batch.pages();
        let begun = Instant::now();
        let mut gathered = begun;
        if self.way.mode.copies() {
            self.source.gather(pages);
            gathered = Instant::now();
        }
        for pfn in pages.iter().take(PREFETCH) {
            self.source.prefetch(*pfn);
        }
        let mut layout = Layout::new(PageRecord::new(slot.bytes_mut()), batch.opens());
        let mut new_zeroes = Batch::new();
        for (index, pfn) in pages.iter().enumerate() {
            if let Some(ahead) = pages.get(index + PREFETCH) {
                self.source.prefetch(*ahead);
            }
            layout.open_up_to(*pfn);
            let content = match self.way.mode {
                MapMode::Stage => self.source.copy(*pfn, layout.record.next_page()),
                MapMode::Reference => self.source.inspect(*pfn),
            };
            match content {
                PageContent::Absent => {
                    self.absent.insert(*pfn);
                    layout.absent += 1;
                    continue;
                }
                PageContent::Zero if self.way.wire == Wire::Pagecast => {
                    layout.push_zero(*pfn);
                    self.zero_pages += 1;
                    if self.zero_set.insert(*pfn) {
                        new_zeroes.push(*pfn);
                    }
                }
                PageContent::Zero => {
                    layout.record.next_page().fill(0);
                    layout.push_data(*pfn, self.way.mode);
                }
                PageContent::Data => {
                    layout.push_data(*pfn, self.way.mode);
                    self.forget_zero(*pfn);
                }
            }
            if !self.absent.is_empty() {
                self.absent.remove(*pfn);
            }
        }
        if !new_zeroes.is_empty() {
            // A note that finds no room is no loss but to the stop rule's idea of the guest's size.
            let _ = self.zero_notes.push(new_zeroes);
        }
        if layout.absent > 0 {
            // Before the rest is on the wire: the scanner never takes too little to be on its way.
            self.shared.lanes[self.way.lane].absent.fetch_add(layout.absent, Ordering::Relaxed);
        }
        let Some((range, info)) = layout.finish() else {
            self.spare = Some(slot);
            return;
        };
        let done = Instant::now();
        self.latencies.note(Stage::Map, done - begun, 1);
        self.latencies.note(Stage::Copy, done - gathered, 1);
        match FilledSlot::new(slot, range, info) {
            Ok(filled) => self.outgoing = Some(filled),
            Err(_) => unreachable!("a record lies within the slot that it was laid out in"),
        }
    }

    fn forget_zero(&mut self, pfn: Pfn) {
        if !self.zero_set.is_empty() {
            self.zero_set.remove(pfn);
        }
    }

    fn pass_on(&mut self) -> Step {
        let Some(filled) = self.outgoing.take() else { return Step::Worked };
        match self.filled.push(filled) {
            Ok(()) => Step::Worked,
            Err(PushError::Closed(_)) => Step::Done,
            Err(PushError::Full(back)) => {
                self.outgoing = Some(back);
                Step::Wait(Duration::MAX)
            }
        }
    }
}

/// A record in the making, and what there is to say of it.
struct Layout<'a> {
    record: PageRecord<'a>,
    /// The chunk that the record opens, with the pages of it that are not named yet.
    opens: Option<Chunk>,
    entries: u32,
    absent: u64,
    external: Runs,
}

impl<'a> Layout<'a> {
    fn new(record: PageRecord<'a>, opens: Option<&Chunk>) -> Self {
        Layout { record, opens: opens.copied(), entries: 0, absent: 0, external: Runs::new() }
    }

    /// Names the pages of the chunk that come before `pfn`, without data.
    fn open_up_to(&mut self, pfn: Pfn) {
        if self.opens.is_some_and(|chunk| chunk.number == pfn.chunk()) {
            self.allocate(pfn.in_chunk());
            if let Some(chunk) = &mut self.opens {
                // It is named in its own right.
                chunk.words[pfn.in_chunk() / 64] &= !(1 << (pfn.in_chunk() % 64));
            }
        }
    }

    /// Names the pages of the chunk in front of place `end` that are not named yet.
    fn allocate(&mut self, end: usize) {
        let Some(chunk) = &mut self.opens else { return };
        for (index, word) in chunk.words.iter_mut().enumerate() {
            while *word != 0 {
                let place = index * 64 + word.trailing_zeros() as usize;
                if place >= end {
                    return;
                }
                *word &= *word - 1;
                let pfn = Pfn(Pfn::first_of(chunk.number).0 + place as u64);
                self.record.push_empty(pfn, PageKind::Alloc);
            }
        }
    }

    fn push_zero(&mut self, pfn: Pfn) {
        self.record.push_empty(pfn, PageKind::Alloc);
        self.entries += 1;
    }

    fn push_data(&mut self, pfn: Pfn, mode: MapMode) {
        match mode {
            MapMode::Stage => self.record.commit(pfn),
            MapMode::Reference => {
                self.record.push_external(pfn);
                self.external.push(pfn);
            }
        }
        self.entries += 1;
    }

    /// Where the record is, and what is in it; none if it names no page.
    fn finish(mut self) -> Option<(std::ops::Range<usize>, RecordInfo)> {
        self.allocate(CHUNK_PAGES);
        let Layout { record, entries, external, .. } = self;
        if record.is_empty() {
            return None;
        }
        let info = RecordInfo { entries, data_pages: record.data_pages() as u32, external };
        Some((record.finish(), info))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;
    use crate::stream::{DomainHeader, GuestType, HEADER_ROOM, Limits, PageEntry, StreamReader, stream_head};

    /// The entries of a record, read back.
    fn entries(record: &[u8]) -> Vec<PageEntry> {
        let domain = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };
        let stream = [&stream_head(&domain)[..], record].concat();
        let mut reader = StreamReader::open(&stream[..], Limits::new(4096)).unwrap();
        reader.next_record().unwrap();
        reader.next_record().unwrap();
        reader.entries().to_vec()
    }

    fn entry(pfn: u64, kind: PageKind) -> PageEntry {
        PageEntry { pfn: Pfn(pfn), kind }
    }

    /// The record of a batch of which `absent` are not there.
    fn lay_out(
        slot: &mut [u8],
        opens: Option<Chunk>,
        batch: &[u64],
        absent: &[u64],
    ) -> Option<Vec<PageEntry>> {
        let mut layout = Layout::new(PageRecord::new(slot), opens.as_ref());
        for pfn in batch {
            layout.open_up_to(Pfn(*pfn));
            if !absent.contains(pfn) {
                layout.push_data(Pfn(*pfn), MapMode::Stage);
            }
        }
        let (range, info) = layout.finish()?;
        assert_eq!(
            info.entries as usize,
            batch.len() - absent.len(),
            "what only opens the chunk does not count"
        );
        Some(entries(&slot[range]))
    }

    #[test]
    fn an_opening_record_names_every_page_of_the_chunk_in_order() {
        let mut slot = vec![0; HEADER_ROOM + BATCH_PAGES * PAGE_SIZE];
        let whole = Chunk { number: 2, words: [u64::MAX; 8] };
        let record = lay_out(&mut slot, Some(whole), &[1024, 1030, 1535], &[]).unwrap();
        assert_eq!(
            record.iter().map(|entry| entry.pfn.0).collect::<Vec<_>>(),
            (1024..1536).collect::<Vec<_>>()
        );
        let with_data: Vec<_> = record.iter().filter(|entry| entry.kind.carries_data()).collect();
        assert_eq!(with_data.iter().map(|entry| entry.pfn.0).collect::<Vec<_>>(), [1024, 1030, 1535]);
    }

    #[test]
    fn holes_of_a_chunk_are_not_named_and_pages_that_went_away_are_not_allocated() {
        let mut slot = vec![0; HEADER_ROOM + BATCH_PAGES * PAGE_SIZE];
        let mut words = [0; 8];
        words[0] = 0b1110;
        words[7] = 1 << 63;
        let chunk = Chunk { number: 0, words };
        let record = lay_out(&mut slot, Some(chunk), &[2, 3, 400], &[3]).unwrap();
        let (data, alloc) = (PageKind::NoTab, PageKind::Alloc);
        // Page 400 has come since the chunk was looked at.
        assert_eq!(record, [entry(1, alloc), entry(2, data), entry(400, data), entry(511, alloc)]);
    }

    #[test]
    fn a_batch_of_pages_that_are_not_there_makes_no_record() {
        let mut slot = vec![0; HEADER_ROOM + BATCH_PAGES * PAGE_SIZE];
        assert!(lay_out(&mut slot, None, &[7, 9], &[7, 9]).is_none());
    }
}
