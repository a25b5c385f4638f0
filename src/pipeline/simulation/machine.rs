//! The simulated guest: its memory, who writes to it and when, and the log that its hypervisor keeps.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::guest::arena::rng::Rng;
use crate::guest::{DirtyLog, GuestError, PageContent, PageSource};
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::guest_memory::GuestMemory;

/// What the guest does.
#[derive(Clone, Debug)]
pub struct Load {
    /// Pages in each chunk; the rest are holes.
    pub pages: Vec<usize>,
    /// Writes in a second.
    pub writes_per_s: u32,
    /// Of a hundred writes, those that go to the first tenth of the pages.
    pub hot_percent: u64,
    /// Of a hundred writes, those that make a page all zero.
    pub zero_percent: u64,
    /// Of a thousand writes, those in whose place a page goes or comes.
    pub balloon_permille: u64,
}

/// The guest. One word stands for what a page holds, 0 for zeroes.
pub struct Machine {
    words: Vec<u64>,
    there: PageSet,
    dirty: PageSet,
    random: Rng,
    load: Load,
    written: u64,
    next_write: Duration,
    /// How many more clearings of the log succeed.
    clearings_left: u32,
}

/// The guest as all simulated parts share it.
pub type Shared = Arc<Mutex<Machine>>;

/// Locks the guest.
pub fn lock(machine: &Shared) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap()
}

impl Machine {
    /// A guest that has not run yet, whose log fails after so many clearings.
    pub fn new(load: &Load, seed: u64, clearings: u32) -> Self {
        let nr_pages = (load.pages.len() * CHUNK_PAGES) as u64;
        let mut there = PageSet::empty(nr_pages);
        for (chunk, pages) in load.pages.iter().enumerate() {
            for page in 0..*pages {
                // Some way apart, so that no record is one run.
                there.insert(Pfn((chunk * CHUNK_PAGES + page * 5 % CHUNK_PAGES) as u64));
            }
        }
        let mut random = Rng::at(seed);
        let words = (0..nr_pages).map(|_| random.below(4)).collect();
        Machine {
            words,
            there,
            dirty: PageSet::empty(nr_pages),
            random,
            load: load.clone(),
            written: 1000,
            next_write: Duration::ZERO,
            clearings_left: clearings,
        }
    }

    /// The pages that there are.
    pub fn populated(&self) -> &PageSet {
        &self.there
    }

    /// What a page holds.
    pub fn word(&self, pfn: Pfn) -> u64 {
        self.words[pfn.0 as usize]
    }

    /// Lets it run until `now`, standing still for `percent` of its time.
    pub fn run_until(&mut self, now: Duration, percent: u8) {
        let rate = f64::from(self.load.writes_per_s) * f64::from(100 - percent) / 100.0;
        let gap = Duration::from_secs_f64(1.0 / rate.max(1e-3));
        while self.next_write <= now {
            self.next_write += gap;
            self.write();
        }
    }

    fn write(&mut self) {
        let all = self.there.len();
        if all == 0 {
            return;
        }
        let range = if self.random.below(100) < self.load.hot_percent { all.div_ceil(10) } else { all };
        let nth = self.random.below(range) as usize;
        let Some(pfn) = self.there.iter().nth(nth) else { return };
        if self.random.below(1000) < self.load.balloon_permille {
            return self.balloon(pfn);
        }
        self.written += 1;
        let zero = self.random.below(100) < self.load.zero_percent;
        self.words[pfn.0 as usize] = if zero { 0 } else { self.written };
        self.dirty.insert(pfn);
    }

    /// A page goes, or one comes into a hole beside it; that one is in the log, as on new releases of Xen.
    fn balloon(&mut self, pfn: Pfn) {
        let beside = Pfn((pfn.0 + 1) % self.there.nr_pages());
        if self.there.contains(beside) {
            self.there.remove(pfn);
            return;
        }
        self.there.insert(beside);
        self.words[beside.0 as usize] = self.random.below(2);
        self.dirty.insert(beside);
    }
}

/// The guest's log. Looking at it takes time, in which the guest runs on unless it is suspended.
pub struct Log {
    /// The guest.
    pub machine: Shared,
    /// The clock, in nanoseconds.
    pub now: Arc<AtomicU64>,
    /// What a look takes.
    pub cost: Duration,
}

impl Log {
    fn spend(&self) {
        self.now.fetch_add(self.cost.as_nanos() as u64, Ordering::Relaxed);
    }
}

impl DirtyLog for Log {
    fn get_and_clear(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        let mut machine = lock(&self.machine);
        let Some(left) = machine.clearings_left.checked_sub(1) else {
            return Err(GuestError::Refused("the log fails".to_owned()));
        };
        machine.clearings_left = left;
        dirty.union(&machine.dirty);
        machine.dirty.clear();
        drop(machine);
        self.spend();
        Ok(())
    }

    fn peek(&mut self, range: Range<u64>, dirty: &mut PageSet) -> Result<(), GuestError> {
        let machine = lock(&self.machine);
        for pfn in machine.dirty.iter_from(Pfn(range.start)).take_while(|pfn| pfn.0 < range.end) {
            dirty.insert(pfn);
        }
        Ok(())
    }
}

/// The guest's pages as a mapper reads them.
pub struct Pages(pub Shared);

impl PageSource for Pages {
    fn copy(&mut self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) -> PageContent {
        let machine = lock(&self.0);
        if !machine.there.contains(pfn) {
            return PageContent::Absent;
        }
        let word = machine.word(pfn);
        if word == 0 {
            return PageContent::Zero;
        }
        into[..8].copy_from_slice(&word.to_le_bytes());
        PageContent::Data
    }

    fn inspect(&mut self, _: Pfn) -> PageContent {
        unreachable!("pages are copied")
    }

    fn prefetch(&self, _: Pfn) {}

    fn sendable(&self) -> Option<Arc<GuestMemory>> {
        None
    }
}
