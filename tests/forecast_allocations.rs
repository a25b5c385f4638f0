//! Memory is taken at the start: once an engine is made, no tick of any policy allocates.

#[path = "../benches/stages/counting.rs"]
mod counting;

use pagecast::forecast::{Config, Engine, Link, Next, OnNoConvergence, Peek, PolicyKind, Sample};
use pagecast::page::Pfn;
use pagecast::page_set::PageSet;
use std::time::Duration;

struct NoPeek;

impl Peek for NoPeek {
    fn peek(&mut self, _: Pfn, _: u64, _: &mut PageSet) {}
}

/// 1 GiB of guest.
const NR_PAGES: u64 = 1 << 18;
/// More than the numbers that there are for samples, so that samples are merged on the way.
const TICKS: u64 = 400;

fn allocations_of(kind: PolicyKind) -> u64 {
    let interval = Duration::from_millis(50);
    let config = Config {
        nr_pages: NR_PAGES,
        pages: NR_PAGES,
        downtime_budget: Duration::from_millis(10),
        sample_interval: interval,
        max_time: Duration::from_secs(5),
        fixed_downtime: Duration::ZERO,
        on_no_convergence: OnNoConvergence::Stop,
        linger: 0.0,
    };
    let mut engine = Engine::new(kind, config);
    let mut dirty = PageSet::empty(NR_PAGES);
    let mut words = vec![0u64; NR_PAGES as usize / 64];
    let mut out = Vec::with_capacity(4096);
    let mut link = Link { pages_per_s: 40_000.0, in_flight: 0, sent: 0 };

    let before = counting::allocations();
    for tick in 1..=TICKS {
        // Scattered writes, and a run that moves.
        words.fill(0);
        (0..2000).for_each(|write: u64| {
            let page = (write * 7919 + tick * 104_729) % NR_PAGES;
            words[page as usize / 64] |= 1 << (page % 64);
        });
        let run = (tick as usize * 16) % (words.len() - 16);
        words[run..run + 16].fill(u64::MAX);
        dirty.clear();
        dirty.insert_bitmap(&words);
        let now = interval * tick as u32;
        engine.on_sample(&Sample { at: now, dirty: &dirty });
        engine.verdict(now, &link);
        out.clear();
        while out.len() < 2000 {
            if engine.next_batch(now, 64, &link, &mut NoPeek, &mut out) != Next::Batch {
                break;
            }
        }
        link.sent += out.len() as u64;
        out.iter().take(3).for_each(|pfn| engine.note_zero(*pfn));
        engine.deferred();
    }
    let allocations = counting::allocations() - before;
    assert!(link.sent > NR_PAGES / 2, "{kind}: it was at work");
    allocations
}

#[test]
fn no_tick_of_any_policy_allocates() {
    for kind in PolicyKind::ALL {
        assert_eq!(allocations_of(kind), 0, "{kind}");
    }
}
