//! What can go wrong with a Xen domain.

use crate::page::Pfn;
use crate::sys::xen::CallError;
use crate::sys::xen::abi::DomId;

/// Why a domain cannot be migrated, or not any further.
#[derive(Debug, thiserror::Error)]
pub enum XenError {
    /// Xen cannot be talked to, or refused something.
    #[error(transparent)]
    Call(#[from] CallError),
    /// No such domain.
    #[error("there is no domain {0}; `xl list` shows those that there are")]
    NoDomain(DomId),
    /// Its memory is not what HVM and PVH guests have.
    #[error("domain {0} is a PV guest, which is left to Xen's own save helper")]
    Pv(DomId),
    /// It is being destroyed.
    #[error("domain {0} is being destroyed")]
    Dying(DomId),
    /// Its page-number space is absurd.
    #[error("domain {domid} has a page-number space of {nr_pfns:#x} pages; at most {limit:#x} are accepted")]
    Size {
        /// Which domain.
        domid: DomId,
        /// What Xen says.
        nr_pfns: u64,
        /// What is accepted.
        limit: u64,
    },
    /// Dirty logging cannot be had.
    #[error("cannot turn on dirty logging for domain {domid}: {source}{}", hint(source))]
    LogDirty {
        /// Which domain.
        domid: DomId,
        /// What the call said.
        source: CallError,
    },
    /// The dirty log has been handed out.
    #[error("the dirty log of domain {0} is in use; a domain has one")]
    LogTaken(DomId),
    /// A page is there and cannot be mapped.
    #[error("cannot map page {pfn} of domain {domid}: error {errno}")]
    Page {
        /// Which domain.
        domid: DomId,
        /// Which page.
        pfn: Pfn,
        /// Error number.
        errno: i32,
    },
    /// There are pages now where there were no page numbers when the migration began.
    #[error(
        "domain {domid} has got pages from {nr_pfns:#x} on, outside of its dirty log; let it run on and try again"
    )]
    Grown {
        /// Which domain.
        domid: DomId,
        /// The page-number space of the log.
        nr_pfns: u64,
    },
    /// Pages could not be read, as was said at the time.
    #[error("pages of domain {domid} could not be read: {reason}")]
    Unread {
        /// Which domain.
        domid: DomId,
        /// The error of that time.
        reason: String,
    },
}

/// What the error numbers of ENABLE_LOGDIRTY mean.
fn hint(error: &CallError) -> &'static str {
    match error.errno() {
        Some(libc::EINVAL) => "; has it a PCI device assigned? detach it",
        Some(libc::EBUSY) => "; its device model holds write-tracked pages (p2m_ioreq_server)",
        Some(libc::EOPNOTSUPP) => "; this needs a Xen with shadow paging",
        Some(libc::ENOMEM) => "; give it a larger paging pool (shadow_memory in its configuration)",
        _ => "",
    }
}
