//! The seam: what is asked of the hypervisor, in words that a simulation can answer as well.

use std::sync::Arc;

use super::XenError;
use crate::stream::TscInfo;
use crate::sys::xen::CallError;
use crate::sys::xen::abi::DomId;
use crate::sys::xen::abi::domctl::{DomainFlags, GetDomainInfo, MAX_FRAMES, page_type};
use crate::sys::xen::abi::version::XenVersion;
use crate::sys::xen::foreign::ForeignMapping;
use crate::sys::xen::interface::{CpuPolicy, Interface};
use crate::sys::xen::tally::{CallCounts, Tally};

/// The most frames of one [`Hypervisor::page_types`].
pub const MAX_TYPES: usize = MAX_FRAMES;

/// A domain as Xen sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// HVM or PVH.
    pub hvm: bool,
    /// It is being torn down.
    pub dying: bool,
    /// Why it has shut down, if it has.
    pub shutdown_reason: Option<u8>,
    /// Frames that belong to it: as many as it has RAM pages, and those that it has given up while they are mapped.
    pub tot_pages: u64,
    /// The most it may have.
    pub max_pages: u64,
}

/// Whether an answer of [`Hypervisor::page_types`] is that of a page that holds data.
pub fn is_ram(answer: u64) -> bool {
    answer & page_type::MASK == page_type::NOTAB
}

/// What a saver asks for. One call each, counted.
pub trait Hypervisor: Send + Sync {
    /// Xen's version.
    fn version(&self) -> XenVersion;
    /// About a domain; an error if there is none of that number.
    fn domain_info(&self, domid: DomId) -> Result<DomainInfo, XenError>;
    /// The highest page number that the domain has used.
    fn maximum_gpfn(&self, domid: DomId) -> Result<u64, CallError>;
    /// Replaces page numbers, [`MAX_TYPES`] at most, by what is there ([`is_ram`]).
    fn page_types(&self, domid: DomId, frames: &mut [u64]) -> Result<(), CallError>;
    /// Turns dirty logging of `nr_pfns` pages on.
    fn enable_log_dirty(&self, domid: DomId, nr_pfns: u64) -> Result<(), CallError>;
    /// Turns it off.
    fn disable_log_dirty(&self, domid: DomId) -> Result<(), CallError>;
    /// Shows `take` the dirty bitmap and clears it. `last`: the guest stands still for good. `take` must make no call.
    fn clean(
        &self,
        domid: DomId,
        nr_pfns: u64,
        last: bool,
        take: &mut dyn FnMut(&[u64]),
    ) -> Result<(), CallError>;
    /// Shows `take` the dirty bitmap of the first `nr_pfns` pages. `take` must make no call.
    fn peek(&self, domid: DomId, nr_pfns: u64, take: &mut dyn FnMut(&[u64])) -> Result<(), CallError>;
    /// Pages dirty since the last [`clean`](Self::clean).
    fn dirty_count(&self, domid: DomId, nr_pfns: u64) -> Result<u32, CallError>;
    /// Maps pages to be read; each gets 0 or a negative error number in `errors`.
    fn map(&self, domid: DomId, gfns: &[u64], errors: &mut [i32]) -> Result<ForeignMapping, CallError>;
    /// The CPU policy.
    fn cpu_policy(&self, domid: DomId) -> Result<CpuPolicy, CallError>;
    /// The time stamp counter.
    fn tsc_info(&self, domid: DomId) -> Result<TscInfo, CallError>;
    /// The state of vCPUs and platform.
    fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>, CallError>;
    /// An HVM parameter.
    fn hvm_param(&self, domid: DomId, index: u32) -> Result<u64, CallError>;
    /// Where the calls are counted.
    fn tally(&self) -> &Arc<Tally>;
    /// Calls so far.
    fn calls(&self) -> CallCounts {
        self.tally().counts()
    }
}

fn told(info: &GetDomainInfo) -> DomainInfo {
    let flags = DomainFlags::from_bits_truncate(info.flags);
    let reason = (info.flags >> 16) as u8;
    DomainInfo {
        hvm: flags.contains(DomainFlags::HVM_GUEST),
        dying: flags.contains(DomainFlags::DYING),
        shutdown_reason: flags.contains(DomainFlags::SHUTDOWN).then_some(reason),
        tot_pages: info.tot_pages,
        max_pages: info.max_pages,
    }
}

impl Hypervisor for Interface {
    fn version(&self) -> XenVersion {
        self.version()
    }

    fn domain_info(&self, domid: DomId) -> Result<DomainInfo, XenError> {
        // Xen answers with the next domain if there is none of this number.
        let info = self.domain_info(domid)?.filter(|info| info.domain == domid);
        info.map(|info| told(&info)).ok_or(XenError::NoDomain(domid))
    }

    fn maximum_gpfn(&self, domid: DomId) -> Result<u64, CallError> {
        self.maximum_gpfn(domid)
    }

    fn page_types(&self, domid: DomId, frames: &mut [u64]) -> Result<(), CallError> {
        self.page_types(domid, frames)
    }

    fn enable_log_dirty(&self, domid: DomId, nr_pfns: u64) -> Result<(), CallError> {
        self.enable_log_dirty(domid, nr_pfns)
    }

    fn disable_log_dirty(&self, domid: DomId) -> Result<(), CallError> {
        self.disable_log_dirty(domid)
    }

    fn clean(
        &self,
        domid: DomId,
        nr_pfns: u64,
        last: bool,
        take: &mut dyn FnMut(&[u64]),
    ) -> Result<(), CallError> {
        self.clean(domid, nr_pfns, last, take)
    }

    fn peek(&self, domid: DomId, nr_pfns: u64, take: &mut dyn FnMut(&[u64])) -> Result<(), CallError> {
        self.peek(domid, nr_pfns, take)
    }

    fn dirty_count(&self, domid: DomId, nr_pfns: u64) -> Result<u32, CallError> {
        self.dirty_count(domid, nr_pfns)
    }

    fn map(&self, domid: DomId, gfns: &[u64], errors: &mut [i32]) -> Result<ForeignMapping, CallError> {
        self.map(domid, gfns, errors)
    }

    fn cpu_policy(&self, domid: DomId) -> Result<CpuPolicy, CallError> {
        self.cpu_policy(domid)
    }

    fn tsc_info(&self, domid: DomId) -> Result<TscInfo, CallError> {
        let info = self.tsc_info(domid)?;
        Ok(TscInfo {
            mode: info.tsc_mode,
            khz: info.gtsc_khz,
            nsec: info.elapsed_nsec,
            incarnation: info.incarnation,
        })
    }

    fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>, CallError> {
        self.hvm_context(domid)
    }

    fn hvm_param(&self, domid: DomId, index: u32) -> Result<u64, CallError> {
        self.hvm_param(domid, index)
    }

    fn tally(&self) -> &Arc<Tally> {
        self.tally()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shutdown_reason_counts_only_for_a_domain_that_has_shut_down() {
        let info = |flags| told(&GetDomainInfo { flags, tot_pages: 5, ..GetDomainInfo::default() });
        let suspended = info(2 << 16 | 4 | 2);
        assert_eq!((suspended.hvm, suspended.dying, suspended.shutdown_reason), (true, false, Some(2)));
        assert_eq!(
            info(0x20 | 1),
            DomainInfo { hvm: false, dying: true, shutdown_reason: None, tot_pages: 5, max_pages: 0 }
        );
    }

    #[test]
    fn only_ordinary_pages_are_ram() {
        assert!(is_ram(page_type::NOTAB) && !is_ram(page_type::XTAB) && !is_ram(page_type::BROKEN));
    }
}
