//! The dirty log of a process image: a survey for each sample.
//!
//! Besides what was written, a page is dirty that
//!
//! * was populated and is so no more: it reads as zeroes now;
//! * was not populated and is: shared memory has contents that no process followed has touched, such as what one that has
//!   ended wrote, and is populated by whoever first reads it, which is no write;
//! * has left the page tables of all processes. A page of shared memory keeps its contents then, and stays in the image as
//!   long as somebody maps it, but it may have been punched out of its object, which is no write either;
//! * is of shared memory when something may have been written to that which nothing tells, such as what a process that has
//!   ended wrote last.

use std::ops::Range;
use std::sync::Arc;

use super::homes::Homes;
use super::image::Image;
use super::tracker::{Saw, Tracker};
use crate::guest::{DirtyLog, GuestError};
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::TrackingError;

/// The dirty log of an [`Image`].
pub struct ImageLog {
    tracker: Tracker,
    image: Arc<Image>,
    /// Populated at the last survey.
    before: PageSet,
    /// Populated at this one.
    now: PageSet,
    /// Of those before, the pages that were in a page table.
    touched: PageSet,
    /// Pages of shared memory seen so far that somebody maps.
    shared: PageSet,
    /// Pages of shared memory that somebody maps now.
    mapped: PageSet,
    /// Where pages can be read now.
    homes: Homes,
}

impl ImageLog {
    /// The log of what `tracker` tracks.
    pub fn new(tracker: Tracker, image: Arc<Image>) -> Self {
        let (empty, homes) = (PageSet::empty(image.nr_pages()), Homes::new(image.nr_pages()));
        let (before, now, touched) = (empty.clone(), empty.clone(), empty.clone());
        ImageLog { tracker, image, before, now, touched, shared: empty.clone(), mapped: empty, homes }
    }
}

impl DirtyLog for ImageLog {
    fn get_and_clear(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        let (image, now, shared) = (&self.image, &mut self.now, &mut self.shared);
        let (mapped, homes) = (&mut self.mapped, &mut self.homes);
        now.clear();
        mapped.clear();
        homes.clear();
        let found = self.tracker.survey(&mut |seen| {
            homes.note(seen);
            if seen.what == Saw::Mapped {
                mapped.insert_run(seen.first, seen.count);
                return;
            }
            now.insert_run(seen.first, seen.count);
            if seen.shared {
                shared.insert_run(seen.first, seen.count);
            }
            if seen.what == Saw::Written {
                dirty.insert_run(seen.first, seen.count);
            }
        })?;
        let given_up: Vec<Pfn> = without(shared, mapped).collect();
        for pfn in given_up {
            shared.remove(pfn);
        }
        image.note_processes(self.tracker.pids(), self.tracker.toll());
        if found.alive == 0 {
            return Err(TrackingError::Target("the process has ended".to_owned()).into());
        }
        if found.untold {
            dirty.union(shared);
        }
        for left in without(&self.touched, now) {
            dirty.insert(left);
        }
        self.touched.clear();
        self.touched.union(now);
        now.union(shared);
        for changed in without(&self.before, now).chain(without(now, &self.before)) {
            dirty.insert(changed);
        }
        for unread in image.take_unread() {
            dirty.insert(Pfn(unread));
        }
        image.settle(homes);
        image.populate(now);
        image.history().survey(dirty, without(now, &self.before));
        std::mem::swap(&mut self.before, &mut self.now);
        Ok(())
    }

    fn peek(&mut self, range: Range<u64>, dirty: &mut PageSet) -> Result<(), GuestError> {
        let mut first = range.start;
        while first < range.end.min(self.image.nr_pages()) {
            let chunk_end = (Pfn(first).chunk() as u64 + 1) * CHUNK_PAGES as u64;
            let end = range.end.min(chunk_end);
            // Of shared memory this asks one of its mappings only. A peek that misses a write costs a page sent again.
            if let Some((pid, va)) = self.image.place(Pfn(first)) {
                let page = PAGE_SIZE as u64;
                let stop = va + (end - first) * page;
                self.tracker.peek(pid, va..stop, &mut |from, to| {
                    let (from, to) = (from.max(va), to.min(stop));
                    dirty.insert_run(Pfn(first + (from - va) / page), to.saturating_sub(from) / page);
                });
            }
            first = end;
        }
        Ok(())
    }
}

/// The pages of one set that are not in another.
fn without<'a>(set: &'a PageSet, other: &'a PageSet) -> impl Iterator<Item = Pfn> + 'a {
    let differs = |chunk: &usize| set.chunk_words(*chunk) != other.chunk_words(*chunk);
    let pages = |chunk| set.pages_of_chunk(chunk).filter(|pfn| !other.contains(*pfn));
    set.occupied_chunks().filter(differs).flat_map(pages)
}
