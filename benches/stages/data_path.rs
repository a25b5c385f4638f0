//! The mapper, by reference and with its copy, over an embedded guest's memory. Rings and the layout of records are included.

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use pagecast::guest::arena::client::ArenaPages;
use pagecast::page::{PAGE_SIZE, Pfn};
use pagecast::pipeline::batch::{BATCH_PAGES, Batch};
use pagecast::pipeline::lanes::{Wire, slot_bytes};
use pagecast::pipeline::latency::{Latencies, Stage};
use pagecast::pipeline::mapper::{Links, MapMode, Mapper, Way};
use pagecast::pipeline::ring::ring;
use pagecast::pipeline::shared::Shared;
use pagecast::pipeline::slots::{Slot, SlotPool};
use pagecast::stream::HEADER_ROOM;
use pagecast::sys::guest_memory::GuestMemory;
use pagecast::sys::slot_memory::SlotMemory;

use crate::{Used, measure, mix};

/// 512 MiB of guest: far more than any cache.
const NR_PAGES: u64 = 1 << 17;
/// Batches at a time, and slots: each batch has its own.
pub const BATCHES: usize = 64;
const PAGES: usize = BATCHES * BATCH_PAGES;

/// Every fourth page or so is zero.
fn is_zero(pfn: u64) -> bool {
    mix(pfn).is_multiple_of(4)
}

/// Slots for all batches.
pub fn slots() -> (SlotPool, Vec<Slot>) {
    let memory = SlotMemory::new(BATCHES * slot_bytes()).expect("memory for the slots");
    SlotPool::new(memory, slot_bytes()).expect("slots of whole pages")
}

/// Goes through all pages of a kind, far from each other, in batches in ascending order.
struct Scatter {
    pages: Vec<Pfn>,
    next: usize,
}

impl Scatter {
    fn new(zero: bool) -> Self {
        let mut pages: Vec<_> = (0..NR_PAGES).filter(|pfn| is_zero(*pfn) == zero).map(Pfn).collect();
        pages.sort_unstable_by_key(|pfn| mix(pfn.0 ^ 0x5eed_5eed));
        Scatter { pages, next: 0 }
    }

    fn batch(&mut self) -> Batch {
        let mut some: Vec<_> =
            (0..BATCH_PAGES).map(|index| self.pages[(self.next + index) % self.pages.len()]).collect();
        self.next += BATCH_PAGES;
        some.sort_unstable();
        let mut batch = Batch::new();
        some.into_iter().for_each(|pfn| batch.push(pfn));
        batch
    }

    fn batches(&mut self) -> Vec<Batch> {
        (0..BATCHES).map(|_| self.batch()).collect()
    }
}

/// Has a mapper serve `batches` and gives the slots back.
fn map(memory: &Arc<GuestMemory>, mode: MapMode, batches: Vec<Batch>, slots: &mut Vec<Slot>) -> Used {
    let (mut to_mapper, batches_out) = ring(BATCHES);
    let (mut free_in, free) = ring(BATCHES);
    let (filled, mut filled_out) = ring(BATCHES);
    let (zero_notes, _notes) = ring(BATCHES);
    batches.into_iter().for_each(|batch| _ = to_mapper.push(batch));
    slots.drain(..).for_each(|slot| _ = free_in.push(slot));
    drop((to_mapper, free_in));
    let way = Way { lane: 0, mode, wire: Wire::Pagecast };
    let links = Links { batches: batches_out, free, filled, zero_notes };
    let source = Box::new(ArenaPages::new(memory.clone()));
    let mapper = Mapper::new(source, way, links, Arc::new(Shared::new(1, false)), NR_PAGES);
    let took = Used::by(|| _ = black_box(mapper.run()));
    slots.extend(std::iter::from_fn(|| filled_out.pop().ok()).map(|filled| filled.into_parts().0));
    assert_eq!(slots.len(), BATCHES, "the mapper filled a slot for each batch");
    took
}

/// Measures the mapper on pages with data and on zero pages.
pub fn measure_all() {
    let memory = Arc::new(GuestMemory::create(NR_PAGES).expect("memory for the guest"));
    memory.populate().expect("memory for the guest");
    {
        let mut writer = memory.writer().expect("nobody else writes it");
        for (pfn, page) in writer.bytes().chunks_exact_mut(PAGE_SIZE).enumerate() {
            if !is_zero(pfn as u64) {
                page.fill(pfn as u8 | 1);
            }
        }
    }
    let (_pool, slots) = slots();
    let slots = RefCell::new(slots);
    for zero in [false, true] {
        let pages = RefCell::new(Scatter::new(zero));
        let kind = if zero { "zero pages" } else { "data pages" };
        let batches = || pages.borrow_mut().batches();
        let mut real = || map(&memory, MapMode::Reference, batches(), &mut slots.borrow_mut());
        let mut bare = || read(&memory, &batches(), if zero { PAGE_SIZE } else { 64 });
        let operation = if zero { "reading each page" } else { "reading a cache line of each page" };
        measure(&format!("map by reference, {kind}"), operation, PAGES, &mut real, Some(&mut bare));
        let mut real = || map(&memory, MapMode::Stage, batches(), &mut slots.borrow_mut());
        let mut bare = || copy(&memory, &batches(), &mut slots.borrow_mut());
        let stage = format!("copy + zero detection, {kind}");
        measure(&stage, "memcpy of such pages into the slots", PAGES, &mut real, Some(&mut bare));
    }
    latencies();
}

/// What a mapper that copies spends on its latencies: it reads the clock three times a batch and notes two times.
fn latencies() {
    let mut latencies = Latencies::of(&[Stage::Map, Stage::Copy]);
    let mut real = || {
        Used::by(|| {
            for _ in 0..BATCHES {
                let begun = black_box(Instant::now());
                let gathered = black_box(Instant::now());
                let done = black_box(Instant::now());
                latencies.note(Stage::Map, done - begun, 1);
                latencies.note(Stage::Copy, done - gathered, 1);
            }
        })
    };
    measure("latencies of a batch", "none", PAGES, &mut real, None);
    black_box(&latencies);
}

fn read(memory: &GuestMemory, batches: &[Batch], bytes: usize) -> Used {
    let mut writer = memory.writer().expect("nobody else writes it");
    let all = &*writer.bytes();
    Used::by(|| {
        for pfn in batches.iter().flat_map(Batch::pages) {
            let page = &all[pfn.index() * PAGE_SIZE..][..bytes];
            black_box(page.as_chunks::<8>().0.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word)));
        }
    })
}

fn copy(memory: &GuestMemory, batches: &[Batch], slots: &mut [Slot]) -> Used {
    Used::by(|| {
        for (batch, slot) in batches.iter().zip(slots) {
            let (pages, _) = slot.bytes_mut()[HEADER_ROOM..].as_chunks_mut();
            batch.pages().iter().zip(pages).for_each(|(pfn, page)| memory.copy_page(*pfn, page));
        }
    })
}
