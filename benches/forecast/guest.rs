//! The guests of the benchmarks: 64 GiB, with dirty logs of a given density, early and late in a migration.

use pagecast::forecast::{Config, Engine, Link, Next, OnNoConvergence, Peek, PolicyKind, Sample};
use pagecast::page::Pfn;
use pagecast::page_set::PageSet;
use std::time::Duration;

/// 64 GiB of guest.
pub const NR_PAGES: u64 = 1 << 24;
/// 10 Gbit/s in pages with their headers.
pub const PAGES_PER_S: f64 = 10e9 / 8.0 / 4104.25;
/// What that carries in one sample interval.
pub const PAGES_PER_SAMPLE: usize = (PAGES_PER_S * 0.05) as usize;
const INTERVAL: Duration = Duration::from_millis(50);
/// Pages asked for at a time, as the scanner does.
const BATCH_PAGES: usize = 64;
/// Different samples that a guest goes through again and again.
const SAMPLES: usize = 4;
/// The late guest's written pages are spread over the samples of its warm-up.
const WARM_UP_SAMPLES: u64 = 30;

/// When in the migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Regime {
    /// Nearly every page is pending and was never written; every chunk has some that were.
    Early,
    /// A third of all pages was written and is pending, in every chunk; the others have been sent.
    Late,
}

/// How dirty pages lie.
#[derive(Clone, Copy, Debug)]
pub enum Pattern {
    /// Each page by itself.
    Random,
    /// By whole chunks, as a writer leaves them that goes through memory.
    Runs,
}

/// A hash of `x` that looks random.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 27)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 32)
}

/// Whether something with probability `share` happens.
fn happens(key: u64, share: f64) -> bool {
    mix(key) as f64 <= share * u64::MAX as f64
}

/// A raw dirty log of `nr_pages` pages of which a share is dirty.
pub fn bitmap(nr_pages: u64, pattern: Pattern, share: f64, seed: u64) -> Vec<u64> {
    let dirty = |page: u64| match pattern {
        Pattern::Random => happens(page ^ (seed << 40), share),
        Pattern::Runs => happens((page / 512) ^ (seed << 40), share),
    };
    let word = |word: u64| {
        if share == 0.0 {
            return 0;
        }
        (0..64).filter(|bit| dirty(word * 64 + bit)).fold(0, |bits, bit| bits | 1 << bit)
    };
    (0..nr_pages / 64).map(word).collect()
}

/// Which warm-up sample of the late guest a page is dirty in, if in any.
fn warm_up_sample(page: u64) -> Option<u64> {
    let sample = mix(page ^ 0x5eed) % (3 * WARM_UP_SAMPLES);
    (sample < WARM_UP_SAMPLES).then_some(sample)
}

/// There is nothing to peek at between two samples.
pub struct NoPeek;

impl Peek for NoPeek {
    fn peek(&mut self, _: Pfn, _: u64, _: &mut PageSet) {}
}

/// A guest under migration, one tick at a time.
pub struct Guest {
    pub engine: Engine,
    pub dirty: PageSet,
    pub sent: Vec<Pfn>,
    link: Link,
    now: Duration,
    samples: Vec<Vec<u64>>,
    ticks: usize,
}

impl Guest {
    /// A guest with `share` of its pages dirty in each tick. `on_warm_up` sees each sample that it took before.
    pub fn new(policy: PolicyKind, regime: Regime, share: f64, mut on_warm_up: impl FnMut(&PageSet)) -> Self {
        let config = Config {
            nr_pages: NR_PAGES,
            pages: NR_PAGES,
            downtime_budget: Duration::from_millis(300),
            sample_interval: INTERVAL,
            max_time: Duration::from_secs(120),
            fixed_downtime: Duration::ZERO,
            on_no_convergence: OnNoConvergence::Stop,
            linger: 0.0,
        };
        let samples = (0..SAMPLES as u64).map(|seed| match regime {
            Regime::Early => bitmap(NR_PAGES, Pattern::Random, share, seed + 1),
            Regime::Late => {
                let mut words = bitmap(NR_PAGES, Pattern::Random, 3.0 * share, seed + 1);
                for (index, word) in words.iter_mut().enumerate() {
                    for bit in 0..64 {
                        if warm_up_sample(index as u64 * 64 + bit).is_none() {
                            *word &= !(1 << bit);
                        }
                    }
                }
                words
            }
        });
        let mut guest = Guest {
            engine: Engine::new(policy, config),
            dirty: PageSet::empty(NR_PAGES),
            sent: Vec::with_capacity(NR_PAGES as usize),
            link: Link { pages_per_s: PAGES_PER_S, in_flight: 0, sent: 0 },
            now: Duration::ZERO,
            samples: samples.collect(),
            ticks: 0,
        };
        if regime == Regime::Late {
            for sample in 0..WARM_UP_SAMPLES {
                let mut words = vec![0u64; NR_PAGES as usize / 64];
                for page in (0..NR_PAGES).filter(|page| warm_up_sample(*page) == Some(sample)) {
                    words[page as usize / 64] |= 1 << (page % 64);
                }
                guest.warm_up(&words, &mut on_warm_up);
            }
            guest.send_all_but(NR_PAGES / 3);
        }
        for sample in 0..SAMPLES {
            let words = std::mem::take(&mut guest.samples[sample]);
            guest.warm_up(&words, &mut on_warm_up);
            guest.samples[sample] = words;
        }
        guest
    }

    fn warm_up(&mut self, words: &[u64], on_warm_up: &mut impl FnMut(&PageSet)) {
        self.take_in(words);
        on_warm_up(&self.dirty);
    }

    /// Hands out pages, never-written ones first, until so many are left.
    fn send_all_but(&mut self, left: u64) {
        self.link.pages_per_s = 1e9;
        while self.engine.pending().len() > left {
            self.sent.clear();
            let max = (self.engine.pending().len() - left) as usize;
            self.engine.next_batch(self.now, max, &self.link, &mut NoPeek, &mut self.sent);
        }
        self.link.pages_per_s = PAGES_PER_S;
        self.sent.clear();
    }

    /// One sample of the dirty log and what the forecast makes of it at once.
    fn take_in(&mut self, words: &[u64]) {
        self.now += INTERVAL;
        self.dirty.clear();
        self.dirty.insert_bitmap(words);
        self.engine.on_sample(&Sample { at: self.now, dirty: &self.dirty });
    }

    /// The raw dirty log of the next tick.
    pub fn next_log(&self) -> &[u64] {
        &self.samples[self.ticks % SAMPLES]
    }

    /// The first half of a tick: the sample and the verdict.
    pub fn sample(&mut self) {
        let words = std::mem::take(&mut self.samples[self.ticks % SAMPLES]);
        self.take_in(&words);
        self.samples[self.ticks % SAMPLES] = words;
        self.ticks += 1;
        std::hint::black_box(self.engine.verdict(self.now, &self.link));
    }

    /// The second half: a plan, and the pages that the link carries in one sample interval.
    pub fn send(&mut self) {
        self.sent.clear();
        while self.sent.len() < PAGES_PER_SAMPLE {
            let max = (PAGES_PER_SAMPLE - self.sent.len()).min(BATCH_PAGES);
            let next = self.engine.next_batch(self.now, max, &self.link, &mut NoPeek, &mut self.sent);
            if next != Next::Batch {
                break;
            }
        }
    }

    /// A plan alone, and one page.
    pub fn plan(&mut self) {
        self.sent.clear();
        self.engine.next_batch(self.now, 1, &self.link, &mut NoPeek, &mut self.sent);
    }
}
