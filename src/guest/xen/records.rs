//! The records of a Xen guest that are no pages: the static ones in front of them and the tail behind.

use super::XenError;
use super::hypervisor::Hypervisor;
use crate::stream::{self, RecordType};
use crate::sys::xen::abi::DomId;
use crate::sys::xen::abi::hvm::SAVED_PARAMS;

/// CPUID_POLICY and MSR_POLICY, each unless it would be empty. STATIC_DATA_END is the stream's own.
pub(super) fn static_records(hypervisor: &dyn Hypervisor, domid: DomId) -> Result<Vec<u8>, XenError> {
    let policy = hypervisor.cpu_policy(domid)?;
    let mut bytes = Vec::new();
    for (kind, body) in
        [(RecordType::X86_CPUID_POLICY, policy.leaves), (RecordType::X86_MSR_POLICY, policy.msrs)]
    {
        if !body.is_empty() {
            bytes.extend(stream::record(kind, &body));
        }
    }
    Ok(bytes)
}

/// TSC_INFO, HVM_CONTEXT and HVM_PARAMS of the suspended guest, in the order of Xen's own saver. The parameters have to
/// come after the last page: a receiver clears the pages that they name when it sees them.
pub(super) fn tail_records(hypervisor: &dyn Hypervisor, domid: DomId) -> Result<Vec<u8>, XenError> {
    let mut bytes = stream::tsc_info(&hypervisor.tsc_info(domid)?);
    bytes.extend(stream::record(RecordType::HVM_CONTEXT, &hypervisor.hvm_context(domid)?));
    let mut params = Vec::with_capacity(SAVED_PARAMS.len());
    for index in SAVED_PARAMS {
        let value = hypervisor.hvm_param(domid, index)?;
        if value != 0 {
            params.push((u64::from(index), value));
        }
    }
    if !params.is_empty() {
        bytes.extend(stream::hvm_params(&params));
    }
    Ok(bytes)
}
