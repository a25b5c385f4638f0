//! Windows: the mapped pages of one chunk each, kept for as long as there is room.
//!
//! Mapping is what a saver spends most of its time on, and unmapping costs three times as much, so a window is made
//! once, with the pages of its chunk that are known to be there and no others: the first MMAPBATCH of a mapping has to
//! cover all of it, and asking for a hole costs more than asking for a page (in a PV dom0 it breaks the kernel's batch of
//! 16). Pages are found in it by their rank among those of the chunk.
//!
//! A page that is gone by the time it is mapped is a hole from then on. Mapping, like asking for a type, allocates
//! a page that the guest has on demand only (PoD). When the limit is reached, the window goes that was used longest ago.

use std::ops::Add;

use serde::Serialize;

use super::XenError;
use super::domain::WindowsAtEnd;
use super::population::{Asker, Change, ChunkMask, contains, count, rank};
use super::shared::Shared;
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use crate::sys::xen::foreign::ForeignMapping;

/// How much one lane may keep mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WindowLimits {
    /// Pages. At least a chunk's are allowed always.
    pub pages: usize,
    /// Windows; each is a mapping, of which the kernel gives a process 65,530 (vm.max_map_count).
    pub windows: usize,
}

impl Default for WindowLimits {
    /// 1 GiB, in at most 16,384 windows.
    fn default() -> Self {
        WindowLimits { pages: (1 << 30) / PAGE_SIZE, windows: 1 << 14 }
    }
}

/// What became of windows so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WindowCounts {
    /// Windows made, those made anew included.
    pub made: u64,
    /// Of these, in the place of one that had become doubtful because the guest gave up or got pages.
    pub renewed: u64,
    /// Let go because others needed the room.
    pub evicted: u64,
    /// There now.
    pub kept: u64,
    /// Pages mapped now.
    pub pages: u64,
    /// The most pages mapped at a time in each lane, summed.
    pub most_pages: u64,
    /// Pages that were gone when they were to be mapped.
    pub vanished: u64,
    /// Pages compared with what their new mapping shows.
    pub compared: u64,
    /// Of these, pages that were not the same.
    pub replaced: u64,
}

impl Add for WindowCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        WindowCounts {
            made: self.made + other.made,
            renewed: self.renewed + other.renewed,
            evicted: self.evicted + other.evicted,
            kept: self.kept + other.kept,
            pages: self.pages + other.pages,
            most_pages: self.most_pages + other.most_pages,
            vanished: self.vanished + other.vanished,
            compared: self.compared + other.compared,
            replaced: self.replaced + other.replaced,
        }
    }
}

/// The mapped pages of a chunk.
pub(super) struct Window {
    chunk: usize,
    /// The epoch that it was made in.
    epoch: u32,
    /// The pages that were asked for, in whose order they are mapped.
    mask: ChunkMask,
    mapping: ForeignMapping,
    last_used: u64,
}

impl Window {
    /// The mapping, and which of its frames a page of the chunk is; None if it is not there.
    pub(super) fn page(&self, in_chunk: usize) -> Option<(&ForeignMapping, usize)> {
        if !contains(&self.mask, in_chunk) {
            return None;
        }
        let index = rank(&self.mask, in_chunk);
        self.mapping.has(index).then_some((&self.mapping, index))
    }
}

/// The windows of one lane.
pub(super) struct Windows {
    limits: WindowLimits,
    /// For each chunk, 1 + its place in `windows`, or 0.
    places: Vec<u32>,
    windows: Vec<Window>,
    pages: usize,
    clock: u64,
    counts: WindowCounts,
    asker: Asker,
    gfns: Vec<u64>,
    errors: Vec<i32>,
}

impl Windows {
    pub(super) fn new(limits: WindowLimits, nr_chunks: usize) -> Self {
        let limits = WindowLimits { pages: limits.pages.max(CHUNK_PAGES), windows: limits.windows.max(1) };
        Windows {
            limits,
            places: vec![0; nr_chunks],
            windows: Vec::with_capacity(limits.windows.min(nr_chunks)),
            pages: 0,
            clock: 0,
            counts: WindowCounts::default(),
            asker: Asker::new(),
            gfns: Vec::with_capacity(CHUNK_PAGES),
            errors: Vec::with_capacity(CHUNK_PAGES),
        }
    }

    /// What became of the windows so far.
    pub(super) fn counts(&self) -> WindowCounts {
        WindowCounts { kept: self.windows.len() as u64, pages: self.pages as u64, ..self.counts }
    }

    /// The window of a chunk as it is, doubtful or not.
    pub(super) fn held(&self, chunk: usize) -> Option<&Window> {
        let place = *self.places.get(chunk)? as usize;
        self.windows.get(place.checked_sub(1)?)
    }

    /// The window of a chunk, made or made anew if need be; None if the chunk has no pages.
    pub(super) fn window(&mut self, shared: &Shared, chunk: usize) -> Result<Option<&Window>, XenError> {
        let epoch = shared.epoch();
        if self.held(chunk).is_none_or(|window| window.epoch != epoch) {
            self.renew(shared, chunk, epoch)?;
        }
        self.clock += 1;
        let Some(place) = (self.places[chunk] as usize).checked_sub(1) else { return Ok(None) };
        let window = &mut self.windows[place];
        window.last_used = self.clock;
        Ok(Some(window))
    }

    /// Sees to it that no window is left which may show frames that are no longer the guest's: compares what has to be
    /// compared, and lets the rest go.
    pub(super) fn settle(&mut self, shared: &Shared) -> Result<(), XenError> {
        let epoch = shared.epoch();
        let doubtful: Vec<usize> =
            self.windows.iter().filter(|window| window.epoch != epoch).map(|window| window.chunk).collect();
        for chunk in doubtful {
            if shared.logs_p2m_changes {
                drop(self.take(chunk));
            } else {
                self.renew(shared, chunk, epoch)?;
            }
        }
        Ok(())
    }

    /// Makes the window of a chunk, in the place of the one that there may be.
    fn renew(&mut self, shared: &Shared, chunk: usize, epoch: u32) -> Result<(), XenError> {
        let mask = self.ask(shared, chunk, epoch)?;
        let old = self.take(chunk);
        let pages = count(&mask);
        if pages == 0 {
            return release(shared, old);
        }
        self.make_room(shared, pages)?;
        let mapping = self.map(shared, chunk, &mask)?;
        self.clock += 1;
        let window = Window { chunk, epoch, mask, mapping, last_used: self.clock };
        self.counts.made += 1;
        if !shared.logs_p2m_changes {
            shared.population().note_young(chunk);
        }
        if let Some(old) = &old {
            self.counts.renewed += 1;
            if !shared.logs_p2m_changes {
                self.compare(shared, old, &window);
            }
        }
        self.pages += pages;
        self.counts.most_pages = self.counts.most_pages.max(self.pages as u64);
        self.windows.push(window);
        self.places[chunk] = self.windows.len() as u32;
        release(shared, old)
    }

    /// Which pages of a chunk are there, asked for if that was not done in this epoch.
    fn ask(&mut self, shared: &Shared, chunk: usize, epoch: u32) -> Result<ChunkMask, XenError> {
        let mut population = shared.population();
        if !population.is_asked(chunk, epoch) {
            let pages = population.chunk_pages(chunk);
            self.asker.ask(shared.hypervisor.as_ref(), shared.domid, pages, |pfn, there| {
                match population.note(pfn, there) {
                    Change::Went => shared.note_went(),
                    // Either what the guest does to it is logged from the next clearing on only, or that it came was in
                    // the log, and was of no use while the page was thought to be a hole.
                    Change::Came => population.mark_unlogged(pfn),
                    Change::None => {}
                }
            })?;
            population.set_asked(chunk, epoch);
        }
        Ok(*population.known().chunk_words(chunk))
    }

    fn map(&mut self, shared: &Shared, chunk: usize, mask: &ChunkMask) -> Result<ForeignMapping, XenError> {
        let first = (chunk * CHUNK_PAGES) as u64;
        self.gfns.clear();
        crate::page_set::for_each_place(mask, |place| self.gfns.push(first + place as u64));
        self.errors.clear();
        self.errors.resize(self.gfns.len(), 0);
        let mapping = shared.hypervisor.map(shared.domid, &self.gfns, &mut self.errors)?;
        for (gfn, error) in self.gfns.iter().zip(&self.errors) {
            match -error {
                0 => {}
                // The guest has given it up since it was asked for.
                libc::EINVAL => {
                    shared.population().note(Pfn(*gfn), false);
                    shared.note_went();
                    self.counts.vanished += 1;
                }
                errno => return Err(XenError::Page { domid: shared.domid, pfn: Pfn(*gfn), errno }),
            }
        }
        Ok(mapping)
    }

    /// Finds the pages that were replaced since `old` was made.
    fn compare(&mut self, shared: &Shared, old: &Window, new: &Window) {
        let mut population = shared.population();
        crate::page_set::for_each_place(&old.mask, |place| {
            if let (Some((before, at)), Some((now, now_at))) = (old.page(place), new.page(place)) {
                self.counts.compared += 1;
                if !before.is_same(at, now, now_at) {
                    self.counts.replaced += 1;
                    population.mark_unlogged(Pfn((old.chunk * CHUNK_PAGES + place) as u64));
                }
            }
        });
    }

    /// Lets windows go until there is room for one of `pages`.
    fn make_room(&mut self, shared: &Shared, pages: usize) -> Result<(), XenError> {
        while self.windows.len() >= self.limits.windows || self.pages + pages > self.limits.pages {
            let oldest = self.windows.iter().min_by_key(|window| window.last_used).map(|window| window.chunk);
            let Some(chunk) = oldest else { break };
            let window = self.take(chunk);
            self.counts.evicted += 1;
            if !shared.logs_p2m_changes {
                shared.population().note_let_go(chunk);
            }
            release(shared, window)?;
        }
        Ok(())
    }

    /// Takes a chunk's window out.
    fn take(&mut self, chunk: usize) -> Option<Window> {
        let place = (self.places[chunk] as usize).checked_sub(1)?;
        self.places[chunk] = 0;
        let window = self.windows.swap_remove(place);
        if let Some(moved) = self.windows.get(place) {
            self.places[moved.chunk] = place as u32 + 1;
        }
        self.pages -= window.mapping.frames();
        Some(window)
    }

    /// Lets everything go, and hands over the counts.
    pub(super) fn close(&mut self, at_end: WindowsAtEnd) -> WindowCounts {
        match at_end {
            WindowsAtEnd::Unmapped => self.windows.clear(),
            WindowsAtEnd::LeftToExit => self.windows.drain(..).for_each(std::mem::forget),
        }
        self.places.fill(0);
        self.pages = 0;
        std::mem::take(&mut self.counts)
    }
}

/// Unmaps a window. If it was the last that held frames which the guest has given up, Xen ceases to count them, which
/// could hide just as many that the guest has got; so it is asked before and after, and a difference is noted.
fn release(shared: &Shared, window: Option<Window>) -> Result<(), XenError> {
    let Some(window) = window else { return Ok(()) };
    let before = shared.hypervisor.domain_info(shared.domid)?.tot_pages;
    drop(window);
    if shared.hypervisor.domain_info(shared.domid)?.tot_pages != before {
        shared.note_went();
    }
    Ok(())
}
