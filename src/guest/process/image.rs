//! The memory of processes as a migration sees it: a fixed space of page numbers, of which some pages are populated and
//! the others read as zeroes.
//!
//! Shared by the log, which says what is populated and where ([`super::log`]), and the mappers, which read
//! ([`ImagePages`]). A page that is populated after the last survey reads as zero until the next, which will call it
//! written: that is no loss, since every survey comes before the copies that rely on it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::diagnosis::digest;
use super::history::{History, ZEROES};
use super::tracker::{Seen, Toll};
use crate::guest::{PageContent, PageSource};
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use crate::page_set::{CHUNK_WORDS, PageSet};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::process_memory::{self, MAX_PAGES};

/// Where the pages of a chunk are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Home {
    pid: i32,
    /// The address that the chunk's first page has or would have.
    va: u64,
}

/// Pages that a process image is made of.
pub struct Image {
    nr_pages: u64,
    populated: Vec<AtomicU64>,
    homes: RwLock<Vec<Option<Home>>>,
    /// Populated pages that could not be read when they were to be sent.
    unread: Mutex<HashSet<u64>>,
    processes: Mutex<Vec<i32>>,
    toll: Mutex<Toll>,
    history: History,
}

impl Image {
    /// An image of at most `nr_pages` pages, none of them populated.
    pub fn new(nr_pages: u64) -> Self {
        let words = (nr_pages as usize).div_ceil(64);
        Image {
            nr_pages,
            populated: (0..words).map(|_| AtomicU64::new(0)).collect(),
            homes: RwLock::new(vec![None; (nr_pages as usize).div_ceil(CHUNK_PAGES)]),
            unread: Mutex::new(HashSet::new()),
            processes: Mutex::new(Vec::new()),
            toll: Mutex::new(Toll::default()),
            history: History::new(nr_pages),
        }
    }

    /// Size of the number space.
    pub fn nr_pages(&self) -> u64 {
        self.nr_pages
    }

    /// What has become of its pages.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Pages populated at the last survey.
    pub fn populated_pages(&self) -> u64 {
        self.populated.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    fn is_populated(&self, pfn: Pfn) -> bool {
        self.populated[pfn.index() / 64].load(Ordering::Acquire) >> (pfn.0 % 64) & 1 == 1
    }

    /// Notes where a chunk can be read. A chunk of shared memory may have several such places: the latest counts, so
    /// that it is that of a process which is still there.
    pub(super) fn settle(&self, seen: &Seen) {
        let offset = (seen.first.in_chunk() * PAGE_SIZE) as u64;
        let home = Some(Home { pid: seen.pid, va: seen.va.wrapping_sub(offset) });
        let chunk = seen.first.chunk();
        if self.homes.read().expect("nobody panics with the homes in hand")[chunk] != home {
            self.homes.write().expect("nobody panics with the homes in hand")[chunk] = home;
        }
    }

    /// Notes what is populated now.
    pub(super) fn populate(&self, populated: &PageSet) {
        for chunk in 0..populated.nr_chunks() {
            for (index, word) in populated.chunk_words(chunk).iter().enumerate() {
                if let Some(place) = self.populated.get(chunk * CHUNK_WORDS + index) {
                    place.store(*word, Ordering::Release);
                }
            }
        }
    }

    /// The pages that could not be read since this was last asked.
    pub(super) fn take_unread(&self) -> HashSet<u64> {
        std::mem::take(&mut *self.unread.lock().expect("nobody panics with the list in hand"))
    }

    /// The process and the address to read a page at, if its chunk was ever seen.
    pub(super) fn place(&self, pfn: Pfn) -> Option<(i32, u64)> {
        let home = self.home(pfn)?;
        Some((home.pid, home.va.wrapping_add((pfn.in_chunk() * PAGE_SIZE) as u64)))
    }

    /// Notes who is tracked now, and what that has cost.
    pub(super) fn note_processes(&self, pids: impl Iterator<Item = i32>, toll: Toll) {
        *self.toll.lock().expect("nobody panics with the toll in hand") = toll;
        let mut processes = self.processes.lock().expect("nobody panics with the list in hand");
        processes.clear();
        processes.extend(pids);
    }

    /// What the tracking has cost, and what could not be tracked and is no part of the image.
    pub fn toll(&self) -> Toll {
        *self.toll.lock().expect("nobody panics with the toll in hand")
    }

    /// Who is tracked.
    pub fn processes(&self) -> Vec<i32> {
        self.processes.lock().expect("nobody panics with the list in hand").clone()
    }

    fn home(&self, pfn: Pfn) -> Option<Home> {
        self.homes.read().expect("nobody panics with the homes in hand")[pfn.chunk()]
    }

    /// Reads pages into `into`, one after the other; what is not populated is zeroes. Calls `unread` for those that could
    /// not be read, which are zeroes too.
    fn read(&self, pfns: &[Pfn], into: &mut [u8], unread: &mut dyn FnMut(Pfn)) {
        let mut places = [0u64; MAX_PAGES];
        let mut at = 0;
        while at < pfns.len() {
            let Some(home) = self.home(pfns[at]).filter(|_| self.is_populated(pfns[at])) else {
                into[at * PAGE_SIZE..][..PAGE_SIZE].fill(0);
                at += 1;
                continue;
            };
            // As many as can be read from the same process in one call.
            let same = |pfn: &Pfn| {
                let (pid, address) = self.place(*pfn).filter(|_| self.is_populated(*pfn))?;
                (pid == home.pid).then_some(address)
            };
            let mut count = 0;
            for address in pfns[at..].iter().take(MAX_PAGES).map_while(same) {
                places[count] = address;
                count += 1;
            }
            let room = &mut into[at * PAGE_SIZE..][..count * PAGE_SIZE];
            let read = process_memory::read_pages(home.pid, &places[..count], room).unwrap_or(0);
            at += read;
            if read < count {
                let page = &mut into[at * PAGE_SIZE..][..PAGE_SIZE];
                if process_memory::read_page_by_force(home.pid, places[read], page).is_err() {
                    page.fill(0);
                    unread(pfns[at]);
                }
                at += 1;
            }
        }
    }
}

/// Pages of a process image, read with as few calls as go.
pub struct ImagePages {
    image: Arc<Image>,
    /// What was read ahead, in the order in which it will be asked for.
    ahead: Vec<Pfn>,
    bytes: Vec<u8>,
    /// How much of that was asked for.
    taken: usize,
    /// Surveys that were over when it was read.
    surveys: u32,
}

impl ImagePages {
    /// The pages of `image`.
    pub fn new(image: Arc<Image>) -> Self {
        ImagePages { image, ahead: Vec::new(), bytes: vec![0; MAX_PAGES * PAGE_SIZE], taken: 0, surveys: 0 }
    }

    /// Calls `look` with every page of the image, ascending, and whether it could be read.
    pub fn each(&mut self, look: &mut dyn FnMut(Pfn, &[u8], bool)) {
        let mut missing = HashSet::new();
        let mut first = 0;
        while first < self.image.nr_pages() {
            let end = (first + MAX_PAGES as u64).min(self.image.nr_pages());
            let pfns: Vec<Pfn> = (first..end).map(Pfn).collect();
            self.image.read(&pfns, &mut self.bytes, &mut |pfn| {
                missing.insert(pfn);
            });
            for (page, pfn) in self.bytes.chunks(PAGE_SIZE).zip(&pfns) {
                look(*pfn, page, !missing.contains(pfn));
            }
            first = end;
        }
    }
}

impl ImagePages {
    /// Reads one page; None if it cannot be read. What was read ahead is lost.
    pub fn read_again(&mut self, pfn: Pfn) -> Option<&[u8]> {
        self.ahead.clear();
        let mut could_be_read = true;
        self.image.read(&[pfn], &mut self.bytes, &mut |_| could_be_read = false);
        could_be_read.then(|| &self.bytes[..PAGE_SIZE])
    }
}

impl PageSource for ImagePages {
    fn gather(&mut self, pfns: &[Pfn]) {
        self.surveys = self.image.history.surveys();
        self.taken = 0;
        self.ahead.clear();
        self.ahead.extend(pfns.iter().take(MAX_PAGES).filter(|pfn| self.image.is_populated(**pfn)));
        let image = &self.image;
        image.read(&self.ahead, &mut self.bytes, &mut |pfn| {
            // It may have vanished, or its process. The next survey knows, and it will be sent again.
            image.unread.lock().expect("nobody panics with the list in hand").insert(pfn.0);
        });
    }

    fn copy(&mut self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) -> PageContent {
        if self.ahead.get(self.taken) != Some(&pfn) {
            // Not populated when it was gathered.
            self.image.history.sent(pfn, ZEROES, self.surveys);
            return PageContent::Zero;
        }
        let page = &self.bytes[self.taken * PAGE_SIZE..][..PAGE_SIZE];
        self.taken += 1;
        let digest = digest(pfn, page);
        self.image.history.sent(pfn, digest, self.surveys);
        if digest == ZEROES {
            return PageContent::Zero;
        }
        into.copy_from_slice(page);
        PageContent::Data
    }

    fn inspect(&mut self, pfn: Pfn) -> PageContent {
        self.gather(&[pfn]);
        self.copy(pfn, &mut [0; PAGE_SIZE])
    }

    fn prefetch(&self, _: Pfn) {}

    fn sendable(&self) -> Option<Arc<GuestMemory>> {
        None
    }
}
