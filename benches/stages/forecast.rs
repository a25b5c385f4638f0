//! The scanner's stages: taking in a raw dirty log, updating the forecast, ranking and handing out.

use std::hint::black_box;
use std::time::Duration;

use pagecast::forecast::{Config, Engine, Link, Next, OnNoConvergence, Peek, PolicyKind, Sample};
use pagecast::page::Pfn;
use pagecast::page_set::PageSet;
use pagecast::pipeline::batch::BATCH_PAGES;

use crate::{Used, measure, mix};

/// 16 GiB of guest.
const NR_PAGES: u64 = 1 << 22;
/// One page in so many is dirty in a sample, each by itself.
const ONE_IN: u64 = 100;
const INTERVAL: Duration = Duration::from_millis(50);
/// 10 Gbit/s in pages with their headers, and what that carries in one interval.
const PAGES_PER_S: f64 = 10e9 / 8.0 / 4104.25;
const PAGES_PER_SAMPLE: usize = (PAGES_PER_S * 0.05) as usize;
/// Different samples, taken in again and again.
const SAMPLES: usize = 4;

struct NoPeek;

impl Peek for NoPeek {
    fn peek(&mut self, _: Pfn, _: u64, _: &mut PageSet) {}
}

fn log(seed: u64) -> Vec<u64> {
    let dirty = |page: u64| mix(page ^ (seed << 40)).is_multiple_of(ONE_IN);
    let word = |word: u64| (0..64).filter(|bit| dirty(word * 64 + bit)).fold(0, |bits, bit| bits | 1 << bit);
    (0..NR_PAGES / 64).map(word).collect()
}

fn set(log: &[u64]) -> PageSet {
    let mut set = PageSet::empty(NR_PAGES);
    set.insert_bitmap(log);
    set
}

/// Measures the three stages.
pub fn measure_all() {
    let logs: Vec<_> = (0..SAMPLES as u64).map(|seed| log(seed + 1)).collect();
    let sets: Vec<_> = logs.iter().map(|log| set(log)).collect();
    let dirty = sets[0].len() as usize;
    scan(&logs, dirty);
    update(&sets, dirty);
    rank(&sets);
}

fn scan(logs: &[Vec<u64>], dirty: usize) {
    let (mut into, mut turn) = (PageSet::empty(NR_PAGES), 0);
    let mut real = || {
        turn += 1;
        let log = &logs[turn % SAMPLES];
        Used::by(|| {
            into.clear();
            into.insert_bitmap(black_box(log));
        })
    };
    let (mut copy, mut bare_turn) = (vec![0u64; NR_PAGES as usize / 64], 2);
    let mut bare = || {
        bare_turn += 1;
        let log = &logs[bare_turn % SAMPLES];
        Used::by(|| black_box(&mut copy).copy_from_slice(black_box(log)))
    };
    measure("scan", "memcpy of the bitmap", dirty, &mut real, Some(&mut bare));
}

/// A guest of which every page has been sent once.
fn engine() -> Engine {
    let config = Config {
        nr_pages: NR_PAGES,
        pages: NR_PAGES,
        downtime_budget: Duration::from_millis(300),
        sample_interval: INTERVAL,
        max_time: Duration::from_secs(3600),
        fixed_downtime: Duration::ZERO,
        on_no_convergence: OnNoConvergence::Stop,
        linger: 0.0,
    };
    let mut engine = Engine::new(PolicyKind::Ar, config);
    let link = Link { pages_per_s: 1e9, in_flight: 0, sent: 0 };
    let mut out = Vec::with_capacity(NR_PAGES as usize);
    while engine.next_batch(Duration::ZERO, NR_PAGES as usize, &link, &mut NoPeek, &mut out) == Next::Batch {}
    engine
}

fn update(sets: &[PageSet], dirty: usize) {
    let (mut engine, mut turn) = (engine(), 0);
    let mut real = || {
        turn += 1;
        let sample = Sample { at: INTERVAL * turn as u32, dirty: &sets[turn % SAMPLES] };
        Used::by(|| engine.on_sample(black_box(&sample)))
    };
    let (mut states, mut bare_turn) = (vec![0u16; NR_PAGES as usize], 2);
    let mut bare = || {
        bare_turn += 1;
        let set = &sets[bare_turn % SAMPLES];
        Used::by(|| set.iter().for_each(|pfn| states[pfn.index()] = states[pfn.index()].wrapping_add(1)))
    };
    measure("update", "one increment of 2 bytes for each dirty page", dirty, &mut real, Some(&mut bare));
    black_box(&states);
}

/// Hands out what the link carries in an interval; the bare operation takes as many pages out of a set, in that order.
fn rank(sets: &[PageSet]) {
    let (mut engine, mut turn) = (engine(), 0);
    let mut out = Vec::with_capacity(PAGES_PER_SAMPLE + BATCH_PAGES);
    let mut link = Link { pages_per_s: PAGES_PER_S, in_flight: 0, sent: 0 };
    let handed = std::cell::RefCell::new(Vec::new());
    let mut real = || {
        turn += 1;
        let now = INTERVAL * turn as u32;
        engine.on_sample(&Sample { at: now, dirty: &sets[turn % SAMPLES] });
        black_box(engine.verdict(now, &link));
        out.clear();
        let took = Used::by(|| {
            while out.len() < PAGES_PER_SAMPLE {
                let max = (PAGES_PER_SAMPLE - out.len()).min(BATCH_PAGES);
                if engine.next_batch(now, max, &link, &mut NoPeek, &mut out) != Next::Batch {
                    break;
                }
            }
        });
        link.sent += out.len() as u64;
        handed.borrow_mut().clone_from(&out);
        // What is held back shortens the list; the figure is for the pages that were asked for.
        took * (PAGES_PER_SAMPLE as f64 / out.len().max(1) as f64)
    };
    let mut bare = || {
        let handed = handed.borrow();
        let mut full = PageSet::full(NR_PAGES);
        let took = Used::by(|| handed.iter().for_each(|pfn| _ = full.remove(*pfn)));
        black_box(&full);
        took * (PAGES_PER_SAMPLE as f64 / handed.len().max(1) as f64)
    };
    let operation = "clearing the bits of the same pages in the same order";
    measure("rank", operation, PAGES_PER_SAMPLE, &mut real, Some(&mut bare));
}
