//! What the dirty log and the page sources of one domain share. They run on different threads.
//!
//! **Ballooning.** A guest may give pages up and get others at the same numbers while it is migrated, and then a kept
//! mapping shows the old frame. Xen tells nobody, but counts: a frame that we have mapped stays counted among the
//! guest's when the guest gives it up, so every page that the guest gets makes `tot_pages` larger. It is asked for at
//! each sample. When it has changed, or a page was found gone, a new *epoch* begins: mappings made in an earlier one are
//! made anew before they are used, and what was asked for in an earlier one is asked again. At the last sample the
//! windows left over from earlier epochs are settled, and what is not known to be there is asked for once more.
//!
//! Frames that the guest has given up and our windows hold also count against the guest's limit (measured on 4.17.7: with
//! everything mapped, a guest that went from 160 to 120 MiB got 1 MiB back and no more). So a guest at its limit that
//! was seen to balloon has all windows settled at the next sample.
//!
//! **Releases that do not log changes of the p2m** (`XenVersion::logs_p2m_changes`). There a new page is not in the
//! dirty log, and neither is what is written to it until the log is cleared the next time. So a page that came counts as
//! dirty in the next sample. A page that was replaced is found by comparison: the window kept shows the frame that was
//! read, the new one the frame that is there. A chunk whose window was let go cannot be compared, and one that was mapped
//! since the log was last cleared may have shown the new frame already, with writes to it unlogged; both count as dirty
//! as a whole.
//!
//! What escapes: pages that come while exactly as many pages go of those that are *not* mapped, both between the same two
//! samples. (Xen's own saver maps each batch anew, but on a release that does not log changes it misses every page that
//! comes.)

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::XenError;
use super::hypervisor::Hypervisor;
use super::population::Population;
use super::windows::{WindowCounts, Windows};
use crate::sys::xen::abi::DomId;

/// The first epoch: what was found when the domain was opened.
pub(super) const FIRST_EPOCH: u32 = 1;

/// What the parts of a domain share.
pub(super) struct Shared {
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    pub(super) domid: DomId,
    pub(super) nr_pfns: u64,
    /// Changes of the p2m show in the dirty log.
    pub(super) logs_p2m_changes: bool,
    epoch: AtomicU32,
    /// By how much Xen's count was off from the pages found when the domain was opened: 0, unless somebody held frames
    /// that the guest had given up.
    pub(super) surplus: i64,
    /// As of the last sample.
    tot_pages: AtomicU64,
    /// Since the last sample a page was found gone, or frames of such pages were let go.
    page_went: AtomicBool,
    log_dirty: AtomicBool,
    population: Mutex<Population>,
    lanes: Mutex<Lanes>,
    failure: Mutex<Option<XenError>>,
}

/// The mappings of each lane, and what those that have ended have left behind.
#[derive(Default)]
struct Lanes {
    live: Vec<Weak<Mutex<Windows>>>,
    ended: WindowCounts,
}

impl Shared {
    pub(super) fn new(
        hypervisor: Arc<dyn Hypervisor>,
        domid: DomId,
        population: Population,
        tot_pages: u64,
    ) -> Self {
        Shared {
            logs_p2m_changes: hypervisor.version().logs_p2m_changes(),
            hypervisor,
            domid,
            nr_pfns: population.known().nr_pages(),
            surplus: tot_pages as i64 - population.known().len() as i64,
            epoch: AtomicU32::new(FIRST_EPOCH),
            tot_pages: AtomicU64::new(tot_pages),
            page_went: AtomicBool::new(false),
            log_dirty: AtomicBool::new(false),
            population: Mutex::new(population),
            lanes: Mutex::default(),
            failure: Mutex::new(None),
        }
    }

    /// The epoch now.
    pub(super) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Begins a new epoch.
    pub(super) fn begin_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Notes how many frames the guest has now; whether it gave up or got any since the last sample.
    pub(super) fn note_tot_pages(&self, tot_pages: u64) -> bool {
        let went = self.page_went.swap(false, Ordering::AcqRel);
        self.tot_pages.swap(tot_pages, Ordering::AcqRel) != tot_pages || went
    }

    /// Notes that a page known was found gone, or that frames of such pages are no longer held.
    pub(super) fn note_went(&self) {
        self.page_went.store(true, Ordering::Release);
    }

    /// What is known of the domain's pages.
    pub(super) fn population(&self) -> MutexGuard<'_, Population> {
        self.population.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a lane.
    pub(super) fn add_lane(&self, windows: &Arc<Mutex<Windows>>) {
        let live = &mut self.lanes().live;
        live.retain(|lane| lane.strong_count() > 0);
        live.push(Arc::downgrade(windows));
    }

    /// Notes what a lane that ends has done.
    pub(super) fn end_lane(&self, counts: WindowCounts) {
        let mut lanes = self.lanes();
        lanes.ended = lanes.ended + counts;
    }

    /// The mappings of each lane that there is.
    pub(super) fn each_lane(&self) -> Vec<Arc<Mutex<Windows>>> {
        self.lanes().live.iter().filter_map(Weak::upgrade).collect()
    }

    /// What all lanes have done.
    pub(super) fn window_counts(&self) -> WindowCounts {
        let live = self.each_lane();
        let ended = self.lanes().ended;
        live.iter().fold(ended, |sum, lane| sum + lock(lane).counts())
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that pages could not be read. The next sample fails because of it.
    pub(super) fn fail(&self, error: XenError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    /// Whether all pages asked for could be read so far; the first error if not.
    pub(super) fn check(&self) -> Result<(), XenError> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(XenError::Unread { domid: self.domid, reason: error.to_string() }),
            None => Ok(()),
        }
    }

    /// Turns dirty logging on or off. Whoever left it on before is overruled, as by Xen's own saver.
    pub(super) fn set_log_dirty(&self, on: bool) -> Result<(), XenError> {
        if !on {
            if self.log_dirty.load(Ordering::Acquire) {
                self.hypervisor.disable_log_dirty(self.domid)?;
                self.log_dirty.store(false, Ordering::Release);
            }
            return Ok(());
        }
        // From here on it may be on, whatever the call says.
        self.log_dirty.store(true, Ordering::Release);
        let enable = || self.hypervisor.enable_log_dirty(self.domid, self.nr_pfns);
        // It may be on already, left behind by a saver that was killed.
        let enabled = enable().or_else(|_| {
            self.hypervisor.disable_log_dirty(self.domid)?;
            enable()
        });
        enabled.map_err(|source| {
            let _ = self.set_log_dirty(false);
            XenError::LogDirty { domid: self.domid, source }
        })
    }
}

/// Locks a lane's mappings. A panic with them in hand ends the migration, and leaves nothing wrong in them.
pub(super) fn lock(windows: &Mutex<Windows>) -> MutexGuard<'_, Windows> {
    windows.lock().unwrap_or_else(PoisonError::into_inner)
}
