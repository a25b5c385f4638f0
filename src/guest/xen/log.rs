//! The dirty log of a Xen domain. Each sample pauses the domain for as long as Xen takes to copy the whole bitmap.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::XenError;
use super::discovery::{DiscoveryCost, discover_again};
use super::domain::FinalMapping;
use super::population::Asker;
use super::shared::{Shared, lock};
use crate::guest::{DirtyLog, GuestError};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// The most new page numbers that are asked for when a guest's space has grown.
const MAX_GROWTH: u64 = 1 << 20;

/// What the last sample found out.
pub(super) type LastDiscovery = Arc<Mutex<Option<DiscoveryCost>>>;

/// A domain's dirty log.
pub struct XenDirtyLog {
    shared: Arc<Shared>,
    final_mapping: FinalMapping,
    last_discovery: LastDiscovery,
    /// What the last clearing took.
    cleared_in: Duration,
}

/// What clearing the log came to.
struct Cleared {
    /// The guest gave up or got pages since the last sample.
    ballooned: bool,
    /// What Xen took for it, with the guest paused.
    took: Duration,
}

impl XenDirtyLog {
    pub(super) fn new(
        shared: Arc<Shared>,
        final_mapping: FinalMapping,
        last_discovery: LastDiscovery,
    ) -> Self {
        XenDirtyLog { shared, final_mapping, last_discovery, cleared_in: Duration::ZERO }
    }

    /// Pages dirty since the last get-and-clear, without their names. No bitmap is copied, but the domain is paused.
    pub fn dirty_count(&self) -> Result<u32, XenError> {
        Ok(self.shared.hypervisor.dirty_count(self.shared.domid, self.shared.nr_pfns)?)
    }

    /// Clears the log into `dirty`. If the guest gave up or got pages since the last sample, a new epoch has begun.
    ///
    /// When to ask how many pages the guest has depends on the release. If a page that came is in the log, it is asked after
    /// the clearing, so that no page that the clearing calls dirty is read through a window from before it came. If not,
    /// it is asked before: what came by then is logged from the clearing on, and can be compared from then on. In either
    /// case the epoch begins after the clearing.
    fn clear(&self, last: bool, dirty: &mut PageSet) -> Result<Cleared, XenError> {
        let shared = &self.shared;
        shared.check()?;
        shared.population().begin_sample();
        let ask = || shared.hypervisor.domain_info(shared.domid);
        let before = if shared.logs_p2m_changes { None } else { Some(ask()?) };
        let take = &mut |words: &[u64]| dirty.insert_bitmap(words);
        let since = Instant::now();
        shared.hypervisor.clean(shared.domid, shared.nr_pfns, last, take)?;
        let took = since.elapsed();
        let info = before.map_or_else(ask, Ok)?;
        let ballooned = shared.note_tot_pages(info.tot_pages);
        let mut population = shared.population();
        if ballooned {
            shared.begin_epoch();
            population.mark_doubtful_unlogged();
        } else {
            population.trust_aging();
        }
        drop(population);
        if last || (ballooned && info.tot_pages >= info.max_pages) {
            // In between, frames that our windows hold may be what keeps the guest from getting pages back.
            self.settle()?;
        }
        shared.population().take_unlogged(dirty);
        Ok(Cleared { ballooned, took })
    }

    /// Has no lane hold frames that the guest may have given up.
    fn settle(&self) -> Result<(), XenError> {
        self.shared.each_lane().iter().try_for_each(|lane| lock(lane).settle(&self.shared))
    }

    fn last_sample(&mut self, dirty: &mut PageSet) -> Result<(), XenError> {
        let Cleared { ballooned, took } = self.clear(true, dirty)?;
        self.cleared_in = took;
        let shared = &self.shared;
        let always = self.final_mapping == FinalMapping::Always;
        if always && !ballooned {
            shared.begin_epoch();
            self.settle()?;
        }
        self.check_growth()?;
        // Only answers of an epoch that began while the guest stands still are final.
        let final_epoch = (ballooned || always).then(|| shared.epoch());
        let mut population = shared.population();
        let came = &mut |pfn| {
            dirty.insert(pfn);
        };
        let cost = discover_again(shared, &mut population, final_epoch, came)?;
        population.take_unlogged(dirty);
        *self.last_discovery.lock().unwrap_or_else(PoisonError::into_inner) = Some(cost);
        Ok(())
    }

    /// Sees to it that no page lies beyond what the log covers: the page-number space was fixed at the start.
    fn check_growth(&self) -> Result<(), XenError> {
        let Shared { hypervisor, domid, nr_pfns, .. } = &*self.shared;
        let now = hypervisor.maximum_gpfn(*domid)?.saturating_add(1);
        let grown = XenError::Grown { domid: *domid, nr_pfns: *nr_pfns };
        if now.saturating_sub(*nr_pfns) > MAX_GROWTH {
            return Err(grown);
        }
        let mut found = false;
        let beyond = (*nr_pfns..now).map(Pfn);
        Asker::new().ask(hypervisor.as_ref(), *domid, beyond, |_, there| found |= there)?;
        if found { Err(grown) } else { Ok(()) }
    }
}

impl DirtyLog for XenDirtyLog {
    fn get_and_clear(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.cleared_in = self.clear(false, dirty)?.took;
        Ok(())
    }

    fn get_and_clear_last(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        Ok(self.last_sample(dirty)?)
    }

    /// The domain is paused while Xen copies its bitmap, not while windows are settled, which takes seconds when it balloons.
    fn held_up(&self) -> Option<Duration> {
        Some(self.cleared_in)
    }

    fn peek(&mut self, range: Range<u64>, dirty: &mut PageSet) -> Result<(), GuestError> {
        let shared = &self.shared;
        let end = range.end.min(shared.nr_pfns);
        if range.start >= end {
            return Ok(());
        }
        // There is no form for a range that begins elsewhere than at 0.
        let take = &mut |words: &[u64]| {
            for index in range.start / 64..end.div_ceil(64) {
                let mut word = words[index as usize];
                while word != 0 {
                    let page = index * 64 + u64::from(word.trailing_zeros());
                    word &= word - 1;
                    if (range.start..end).contains(&page) {
                        dirty.insert(Pfn(page));
                    }
                }
            }
        };
        shared.hypervisor.peek(shared.domid, end, take).map_err(XenError::from)?;
        Ok(())
    }
}
