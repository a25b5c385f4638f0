//! A Xen domain that is to be migrated: an HVM or PVH guest, alive, with all of its pages found.
//!
//! Its suspension is libxl's business and not done here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::discovery::{DiscoveryCost, discover};
use super::hypervisor::{DomainInfo, Hypervisor};
use super::log::{LastDiscovery, XenDirtyLog};
use super::pages::XenPages;
use super::population::Population;
use super::shared::{FIRST_EPOCH, Shared};
use super::windows::{WindowCounts, WindowLimits};
use super::{XenError, records};
use crate::page_set::PageSet;
use crate::stream::{DomainHeader, GuestType};
use crate::sys::xen::abi::DomId;
use crate::sys::xen::abi::domctl::SHUTDOWN_SUSPEND;
use crate::sys::xen::tally::CallCounts;

/// The largest page-number space that is accepted: 4 TiB. It costs a bit of Xen and three here for each page number.
const MAX_PFNS: u64 = 1 << 30;

/// How often a domain that is dropped tries to turn dirty logging off, and how long it waits in between: Xen answers EBUSY
/// while another operation on the log is under way.
const OFF_TRIES: usize = 5;
const OFF_WAIT: Duration = Duration::from_millis(2);

/// When pages are mapped anew for the last time that they are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FinalMapping {
    /// If the guest was seen to give up or get pages since its windows were made.
    #[default]
    OnEvidence,
    /// In any case. Costs downtime: a mapping of every page that was mapped before.
    Always,
}

/// How a domain is to be read.
#[derive(Clone, Copy, Debug, Default)]
pub struct XenSettings {
    /// What each lane may keep mapped.
    pub windows: WindowLimits,
    /// When the windows are made anew at the end.
    pub final_mapping: FinalMapping,
    /// What becomes of the windows when a lane is done.
    pub windows_at_end: WindowsAtEnd,
}

/// What becomes of the windows when a lane is done: the guest stands still then, and waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WindowsAtEnd {
    /// They are unmapped.
    #[default]
    Unmapped,
    /// They are left to the end of the process, which is to follow at once, or of its heir ([`crate::sys::heir`]). A PV dom0's
    /// kernel takes an ending process's page tables back from Xen first and then clears them directly, where munmap has Xen
    /// emulate each entry.
    LeftToExit,
}

/// What migrating a domain has cost Xen and the kernel so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct XenCosts {
    /// Finding the pages at first.
    pub discovery: DiscoveryCost,
    /// Finding those that came later, if any could have.
    pub last_discovery: Option<DiscoveryCost>,
    /// What each lane may keep mapped.
    pub window_limits: WindowLimits,
    /// Windows of all lanes.
    pub windows: WindowCounts,
    /// All calls. If several domains share a hypervisor, those of all.
    pub calls: CallCounts,
}

/// A domain to be migrated. Dirty logging is off when it has been dropped, if that can be had.
pub struct XenDomain {
    shared: Arc<Shared>,
    settings: XenSettings,
    populated: PageSet,
    discovery: DiscoveryCost,
    last_discovery: LastDiscovery,
    log_taken: AtomicBool,
}

impl XenDomain {
    /// Opens a domain with the default settings.
    pub fn open(hypervisor: Arc<dyn Hypervisor>, domid: DomId) -> Result<Self, XenError> {
        Self::open_with(hypervisor, domid, XenSettings::default())
    }

    /// Opens a domain: looks at what it is and finds its pages.
    pub fn open_with(
        hypervisor: Arc<dyn Hypervisor>,
        domid: DomId,
        settings: XenSettings,
    ) -> Result<Self, XenError> {
        let info = hypervisor.domain_info(domid)?;
        if info.dying {
            return Err(XenError::Dying(domid));
        }
        if !info.hvm {
            return Err(XenError::Pv(domid));
        }
        let nr_pfns = hypervisor.maximum_gpfn(domid)?.saturating_add(1);
        if nr_pfns > MAX_PFNS {
            return Err(XenError::Size { domid, nr_pfns, limit: MAX_PFNS });
        }
        let mut population = Population::new(nr_pfns);
        let discovery = discover(hypervisor.as_ref(), domid, &mut population, FIRST_EPOCH)?;
        let populated = population.known().clone();
        let shared = Arc::new(Shared::new(hypervisor, domid, population, discovery.tot_pages));
        Ok(XenDomain {
            shared,
            settings,
            populated,
            discovery,
            last_discovery: Arc::default(),
            log_taken: AtomicBool::new(false),
        })
    }

    /// The domain's number.
    pub fn domid(&self) -> DomId {
        self.shared.domid
    }

    /// Size of the page-number space: most of it holes.
    pub fn nr_pfns(&self) -> u64 {
        self.shared.nr_pfns
    }

    /// The pages that were there when the domain was opened.
    pub fn populated(&self) -> &PageSet {
        &self.populated
    }

    /// What the stream says about the domain.
    pub fn header(&self) -> DomainHeader {
        let version = self.shared.hypervisor.version();
        DomainHeader { guest: GuestType::X86Hvm, xen_major: version.major, xen_minor: version.minor }
    }

    /// Starts or ends dirty logging.
    pub fn set_log_dirty(&self, on: bool) -> Result<(), XenError> {
        self.shared.set_log_dirty(on)
    }

    /// The dirty log. There is one: a second call is an error.
    pub fn take_dirty_log(&self) -> Result<XenDirtyLog, XenError> {
        if self.log_taken.swap(true, Ordering::AcqRel) {
            return Err(XenError::LogTaken(self.domid()));
        }
        let last_discovery = self.last_discovery.clone();
        Ok(XenDirtyLog::new(self.shared.clone(), self.settings.final_mapping, last_discovery))
    }

    /// The pages, for one lane.
    pub fn page_source(&self) -> XenPages {
        XenPages::new(self.shared.clone(), &self.settings)
    }

    /// Whether every page asked for could be read. To be asked after the last page was read and before the stream is
    /// ended: only earlier failures make a sample fail.
    pub fn check(&self) -> Result<(), XenError> {
        self.shared.check()
    }

    /// The domain as Xen sees it now.
    pub fn info(&self) -> Result<DomainInfo, XenError> {
        self.shared.hypervisor.domain_info(self.domid())
    }

    /// Why the domain has shut down, if it has.
    pub fn shutdown_reason(&self) -> Result<Option<u8>, XenError> {
        Ok(self.info()?.shutdown_reason)
    }

    /// Whether the domain is suspended: only then is what it holds final.
    pub fn is_suspended(&self) -> Result<bool, XenError> {
        Ok(self.shutdown_reason()? == Some(SHUTDOWN_SUSPEND))
    }

    /// The records in front of STATIC_DATA_END.
    pub fn static_records(&self) -> Result<Vec<u8>, XenError> {
        records::static_records(self.shared.hypervisor.as_ref(), self.domid())
    }

    /// The records between the last page and END, of the suspended domain.
    pub fn tail_records(&self) -> Result<Vec<u8>, XenError> {
        records::tail_records(self.shared.hypervisor.as_ref(), self.domid())
    }

    /// What all this has cost so far.
    pub fn costs(&self) -> XenCosts {
        XenCosts {
            discovery: self.discovery,
            last_discovery: *self.last_discovery.lock().unwrap_or_else(PoisonError::into_inner),
            window_limits: self.settings.windows,
            windows: self.shared.window_counts(),
            calls: self.shared.hypervisor.calls(),
        }
    }
}

impl Drop for XenDomain {
    fn drop(&mut self) {
        for _ in 0..OFF_TRIES {
            if self.shared.set_log_dirty(false).is_ok() {
                return;
            }
            std::thread::sleep(OFF_WAIT);
        }
        // Nobody is left to hear of an error. Whoever saves the domain next turns logging off first.
    }
}
