//! The pages of a Xen domain, read through windows that are kept: what a mapper has.

use std::sync::{Arc, Mutex};

use super::XenError;
use super::domain::{WindowsAtEnd, XenSettings};
use super::shared::{Shared, lock};
use super::windows::Windows;
use crate::guest::{PageContent, PageSource};
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::xen::foreign::ForeignMapping;

/// A lane's view of a domain's pages.
///
/// The windows are behind a lock because the last sample, on another thread, has to see to those that have become
/// doubtful; until then nobody else takes it.
pub struct XenPages {
    shared: Arc<Shared>,
    windows: Arc<Mutex<Windows>>,
    at_end: WindowsAtEnd,
}

impl XenPages {
    pub(super) fn new(shared: Arc<Shared>, settings: &XenSettings) -> Self {
        let nr_chunks = (shared.nr_pfns as usize).div_ceil(CHUNK_PAGES);
        let windows = Arc::new(Mutex::new(Windows::new(settings.windows, nr_chunks)));
        shared.add_lane(&windows);
        XenPages { shared, windows, at_end: settings.windows_at_end }
    }

    /// Calls `look` with the mapping of a page, if it is there. A page that cannot be read for another reason counts as
    /// absent here and as a failure of the domain, so that nothing is taken for a hole that is none.
    fn with_page<R>(&mut self, pfn: Pfn, content: impl FnOnce(&ForeignMapping, usize) -> R) -> Option<R> {
        if pfn.0 >= self.shared.nr_pfns {
            return None;
        }
        let mut windows = lock(&self.windows);
        let found: Result<_, XenError> = windows.window(&self.shared, pfn.chunk());
        match found {
            Ok(window) => {
                let page = window.and_then(|window| window.page(pfn.in_chunk()));
                if page.is_none() {
                    self.shared.population().note_missed(pfn);
                }
                page.map(|(mapping, index)| content(mapping, index))
            }
            Err(error) => {
                self.shared.fail(error);
                None
            }
        }
    }
}

fn content_of(zero: bool) -> PageContent {
    if zero { PageContent::Zero } else { PageContent::Data }
}

impl PageSource for XenPages {
    fn gather(&mut self, pfns: &[Pfn]) {
        let mut windows = lock(&self.windows);
        let mut last = None;
        for chunk in pfns.iter().filter(|pfn| pfn.0 < self.shared.nr_pfns).map(|pfn| pfn.chunk()) {
            if last != Some(chunk)
                && let Err(error) = windows.window(&self.shared, chunk)
            {
                self.shared.fail(error);
                return;
            }
            last = Some(chunk);
        }
    }

    fn copy(&mut self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) -> PageContent {
        let zero = self.with_page(pfn, |mapping, index| mapping.copy(index, into));
        zero.map_or(PageContent::Absent, content_of)
    }

    fn inspect(&mut self, pfn: Pfn) -> PageContent {
        self.with_page(pfn, ForeignMapping::is_zero).map_or(PageContent::Absent, content_of)
    }

    fn prefetch(&self, pfn: Pfn) {
        if let Some((mapping, index)) =
            lock(&self.windows).held(pfn.chunk()).and_then(|window| window.page(pfn.in_chunk()))
        {
            mapping.prefetch(index);
        }
    }

    fn sendable(&self) -> Option<Arc<GuestMemory>> {
        // The kernel does not pin foreign pages; `sys::xen::pinning` asks it.
        None
    }
}

impl Drop for XenPages {
    fn drop(&mut self) {
        let counts = lock(&self.windows).close(self.at_end);
        self.shared.end_lane(counts);
    }
}
