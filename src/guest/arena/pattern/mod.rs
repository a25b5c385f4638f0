//! Which page is written next: a pure function of the specification, the registers and the random numbers.
//!
//! Patterns speak of owned pages by their place `0..pages` in the order of page numbers. Whatever they have to
//! remember is in the machine's registers, and so in RAM; what they hold themselves is derived from the
//! specification. Periods are counted in operations. Registers can come from a hostile image: a pattern takes
//! any value and still names a page there is.

mod gc;
mod phases;
mod simple;
mod sweep;
#[cfg(test)]
mod tests;

use super::rng::{Purpose, Rng, mix};
use super::workload::{Spec, Workload};
use super::zipf::Zipf;

/// The number of [`Registers`].
pub(super) const REGISTERS: usize = 4;

/// What a pattern remembers from one operation to the next; all 0 at boot.
pub(super) type Registers = [u64; REGISTERS];

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    /// The owned page to write, `0..pages`.
    pub(super) page: u64,
    /// How soon the next operation is due.
    pub(super) pace: Pace,
}

/// The order in which owned pages are written.
pub(super) trait Pattern: Send {
    fn next(&self, registers: &mut Registers, rng: &mut Rng) -> Operation;
}

/// The pattern of a workload over `pages` owned pages.
pub(super) fn build(spec: &Spec, pages: u64) -> Box<dyn Pattern> {
    let ops_per_s = match spec.effective_rate() {
        // As fast as they go: periods are those of the workload's own rate.
        0 => spec.workload.default_rate(),
        rate => rate,
    };
    let frame = Frame { pages, ops_per_s: ops_per_s.into(), seed: spec.seed };
    match spec.workload {
        Workload::Idle => Box::new(simple::Idle::new(&frame)),
        Workload::Kv => Box::new(KeyValue::new(frame.all(), frame.seed)),
        Workload::Uniform | Workload::Storm => Box::new(simple::Uniform::new(&frame)),
        Workload::Sweep => Box::new(sweep::Sweep::new(&frame)),
        Workload::Gc => Box::new(gc::Gc::new(&frame)),
        Workload::Phases => Box::new(phases::Phases::new(&frame)),
    }
}

/// What a pattern is made to measure for.
struct Frame {
    /// Owned pages.
    pages: u64,
    /// Mean operations per second; 0 only for storm, which has no periods.
    ops_per_s: u64,
    seed: u64,
}

impl Frame {
    fn all(&self) -> Region {
        Region { start: 0, len: self.pages, pages: self.pages }
    }

    /// Divides all pages into two regions, the first of this length, at a place chosen by the seed.
    fn split(&self, len: u64) -> (Region, Region) {
        let start = Rng::new(self.seed, Purpose::Regions).below(self.pages);
        let first = Region { start, len, pages: self.pages };
        (first, Region { start: start + len, len: self.pages - len, pages: self.pages })
    }

    /// This share of the pages; at least one.
    fn percent(&self, percent: u64) -> u64 {
        (self.pages * percent / 100).max(1)
    }
}

/// Consecutive owned pages; past the last one they go on with the first.
#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    /// All owned pages.
    pages: u64,
}

impl Region {
    /// The page at this place in the region; places past its end go on at its start.
    fn page(&self, at: u64) -> u64 {
        (self.start + at % self.len) % self.pages
    }
}

/// Zipfian requests for keys that are hashed to the pages of a region.
struct KeyValue {
    region: Region,
    keys: Zipf,
    salt: u64,
}

impl KeyValue {
    const KEYS_PER_PAGE: u64 = 8;

    fn new(region: Region, seed: u64) -> Self {
        Self { region, keys: Zipf::new(region.len * Self::KEYS_PER_PAGE), salt: mix(seed) }
    }

    /// The place in the region that the next request writes.
    fn place(&self, rng: &mut Rng) -> u64 {
        mix(self.salt ^ self.keys.sample(rng)) % self.region.len
    }
}

impl Pattern for KeyValue {
    fn next(&self, _: &mut Registers, rng: &mut Rng) -> Operation {
        Operation { page: self.region.page(self.place(rng)), pace: Pace::MEAN }
    }
}

/// Time to the next operation, in 1024ths of what it is at the mean rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace(u32);

impl Pace {
    /// As the rate says.
    const MEAN: Self = Self(1024);

    const fn faster(times: u32) -> Self {
        Self(Self::MEAN.0 / times)
    }

    const fn slower(times: u32) -> Self {
        Self(Self::MEAN.0 * times)
    }

    /// The pace of the rest of a period that has `fast_ops` of its `ops` at pace `fast`, such that the period
    /// as a whole keeps to the mean rate.
    fn rest(fast: Self, fast_ops: u64, ops: u64) -> Self {
        let units = ops * u64::from(Self::MEAN.0) - fast_ops * u64::from(fast.0);
        Self((units / (ops - fast_ops)) as u32)
    }

    /// A time at this pace that would be `mean` at the mean rate.
    pub(super) fn stretch(self, mean: u64) -> u64 {
        mean * u64::from(self.0) / u64::from(Self::MEAN.0)
    }
}
