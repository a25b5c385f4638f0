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
use super::homes::Homes;
use super::tracker::Toll;
use crate::guest::{PageContent, PageSource};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::{CHUNK_WORDS, PageSet};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::process_memory::{self, MAX_PAGES};

/// Pages that a process image is made of.
pub struct Image {
    nr_pages: u64,
    populated: Vec<AtomicU64>,
    homes: RwLock<Homes>,
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
            homes: RwLock::new(Homes::new(nr_pages)),
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

    /// Notes where pages can be read now.
    pub(super) fn settle(&self, homes: &Homes) {
        let mut settled = self.homes.write().expect("nobody panics with the homes in hand");
        if *settled != *homes {
            settled.clone_from(homes);
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

    /// The process and the address to read a page at, if there is one.
    pub(super) fn place(&self, pfn: Pfn) -> Option<(i32, u64)> {
        self.homes.read().expect("nobody panics with the homes in hand").place(pfn)
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

    /// Reads pages into `into`, one after the other; what is not populated is zeroes. Calls `unread` for those that could
    /// not be read, which are zeroes too.
    fn read(&self, pfns: &[Pfn], into: &mut [u8], unread: &mut dyn FnMut(Pfn)) {
        let mut places = [0u64; MAX_PAGES];
        let place = |pfn: &Pfn| self.place(*pfn).filter(|_| self.is_populated(*pfn));
        let mut at = 0;
        while at < pfns.len() {
            let Some((pid, first)) = place(&pfns[at]) else {
                into[at * PAGE_SIZE..][..PAGE_SIZE].fill(0);
                at += 1;
                continue;
            };
            // As many as can be read from the same process in one call.
            places[0] = first;
            let mut count = 1;
            let same = |pfn: &Pfn| place(pfn).filter(|(other, _)| *other == pid);
            for (_, address) in pfns[at + 1..].iter().take(MAX_PAGES - 1).map_while(same) {
                places[count] = address;
                count += 1;
            }
            let room = &mut into[at * PAGE_SIZE..][..count * PAGE_SIZE];
            let read = process_memory::read_pages(pid, &places[..count], room).unwrap_or(0);
            at += read;
            if read < count {
                let page = &mut into[at * PAGE_SIZE..][..PAGE_SIZE];
                if process_memory::read_page_by_force(pid, places[read], page).is_err() {
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
