//! What this host's Xen, and one of its domains, offer to a migration: for `pagecast probe`.

use std::io;
use std::sync::Arc;

use super::domain::XenDomain;
use super::hypervisor::Hypervisor;
use super::{XenError, XenSettings};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::xen::abi::DomId;
use crate::sys::xen::abi::domctl::{CPUID_LEAF_LEN, MSR_ENTRY_LEN};
use crate::sys::xen::abi::hvm::SAVED_PARAMS;
use crate::sys::xen::interface::Interface;
use crate::sys::xen::pinning::try_to_pin;

/// A name and what was found.
type Findings = Vec<(&'static str, String)>;

/// Looks at the Xen of this host, and at a domain of it if one is named. Reads only, but for turning the dirty logging of
/// the domain on and off, and not even that if it is on.
pub fn findings(domain: Option<DomId>, domctl_interface: Option<u32>) -> Findings {
    let interface = match Interface::open(domctl_interface) {
        Ok(interface) => Arc::new(interface),
        Err(error) => return vec![("xen", format!("no: {error}"))],
    };
    let mut findings = host(&interface);
    if let Some(domid) = domain {
        let hypervisor: Arc<dyn Hypervisor> = interface.clone();
        if let Err(error) = look_at(&hypervisor, domid, &mut findings) {
            findings.push(("domain", format!("no: {error}")));
        }
    }
    findings
}

fn host(interface: &Interface) -> Findings {
    let logged =
        if interface.version().logs_p2m_changes() { "yes" } else { "no; pages are compared instead" };
    let domctl = match interface.domain_info(0) {
        Ok(Some(_)) => format!("version {:#x} accepted", interface.domctl_interface()),
        Ok(None) => "no domain is to be seen".to_owned(),
        Err(error) => format!("no: {error}"),
    };
    let buffers = if interface.has_buffer_device() {
        "from /dev/xen/hypercall"
    } else {
        "locked memory: /dev/xen/hypercall is missing (Linux 4.18 has it)"
    };
    vec![
        ("xen", interface.version().to_string()),
        ("xen domctl", domctl),
        ("xen hypercall buffers", buffers.to_owned()),
        ("xen logs p2m changes", logged.to_owned()),
    ]
}

fn look_at(hypervisor: &Arc<dyn Hypervisor>, domid: DomId, findings: &mut Findings) -> Result<(), XenError> {
    let domain = XenDomain::open_with(hypervisor.clone(), domid, XenSettings::default())?;
    let info = domain.info()?;
    findings.push((
        "domain",
        format!("{domid}: HVM or PVH, {} pages of at most {}", info.tot_pages, info.max_pages),
    ));
    let cost = domain.costs().discovery;
    findings.push((
        "domain pages",
        format!(
            "{} of {} page numbers, {}; {} calls in place of {}, {:.3} s",
            cost.populated,
            cost.nr_pfns,
            if cost.proved { "proved by tot_pages" } else { "not equal to tot_pages: it balloons" },
            cost.calls,
            cost.calls_of_full_walk,
            cost.seconds
        ),
    ));
    findings.push(("domain policies", policies(hypervisor.as_ref(), domid)?));
    findings.push(("domain hvm parameters", params(hypervisor.as_ref(), domid)?));
    findings.push(("domain foreign pages", foreign(hypervisor.as_ref(), domid, domain.populated())?));
    findings.push(("domain dirty logging", dirty_logging(hypervisor.as_ref(), domid, domain.nr_pfns())));
    findings.push(("xen calls for this", calls(hypervisor.as_ref())));
    Ok(())
}

/// The calls that were made at all.
fn calls(hypervisor: &dyn Hypervisor) -> String {
    let counts = serde_json::to_value(hypervisor.calls()).unwrap_or_default();
    let counts = counts.as_object().into_iter().flatten();
    let made = counts.filter(|(_, count)| count.as_u64() != Some(0));
    made.map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

fn policies(hypervisor: &dyn Hypervisor, domid: DomId) -> Result<String, XenError> {
    let policy = hypervisor.cpu_policy(domid)?;
    let tsc = hypervisor.tsc_info(domid)?;
    Ok(format!(
        "{} CPUID leaves, {} MSRs; TSC mode {}, {} kHz, incarnation {}; HVM context of {} bytes",
        policy.leaves.len() / CPUID_LEAF_LEN,
        policy.msrs.len() / MSR_ENTRY_LEN,
        tsc.mode,
        tsc.khz,
        tsc.incarnation,
        hypervisor.hvm_context(domid)?.len()
    ))
}

fn params(hypervisor: &dyn Hypervisor, domid: DomId) -> Result<String, XenError> {
    let mut list = Vec::new();
    for index in SAVED_PARAMS {
        let value = hypervisor.hvm_param(domid, index)?;
        if value != 0 {
            list.push(format!("{index}={value:#x}"));
        }
    }
    Ok(list.join(" "))
}

/// Maps the pages of the first chunk that has any, reads them, and tries to pin one.
fn foreign(hypervisor: &dyn Hypervisor, domid: DomId, populated: &PageSet) -> Result<String, XenError> {
    let Some(chunk) = populated.occupied_chunks().next() else { return Ok("it has no pages".to_owned()) };
    let pfns: Vec<Pfn> = populated.pages_of_chunk(chunk).collect();
    let gfns: Vec<u64> = pfns.iter().map(|pfn| pfn.0).collect();
    let mut errors = vec![0; gfns.len()];
    let mapping = hypervisor.map(domid, &gfns, &mut errors)?;
    let there: Vec<usize> = (0..mapping.frames()).filter(|index| mapping.has(*index)).collect();
    let mut page = [0; PAGE_SIZE];
    let zero = there.iter().filter(|index| mapping.copy(**index, &mut page)).count();
    let pinned = match there.first() {
        None => "none to pin".to_owned(),
        Some(index) => {
            let pinning = try_to_pin(&mapping, *index);
            let said = |outcome: io::Result<()>| match outcome {
                Ok(()) => "yes".to_owned(),
                Err(error) => format!("no ({error})"),
            };
            format!(
                "pinned by io_uring: {}, by vmsplice: {}",
                said(pinning.register_buffers),
                said(pinning.vmsplice)
            )
        }
    };
    Ok(format!("{} of {} mapped, {zero} of them zero; {pinned}", there.len(), gfns.len()))
}

fn dirty_logging(hypervisor: &dyn Hypervisor, domid: DomId, nr_pfns: u64) -> String {
    if let Err(error) = hypervisor.enable_log_dirty(domid, nr_pfns) {
        return format!("no: {error}; it may be in use, or a PCI device may be assigned");
    }
    let ones = |words: &[u64]| words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    let look = || -> Result<(u32, u64, u64), XenError> {
        let (mut peeked, mut cleaned) = (0, 0);
        let told = hypervisor.dirty_count(domid, nr_pfns)?;
        hypervisor.peek(domid, nr_pfns, &mut |words| peeked = ones(words))?;
        hypervisor.clean(domid, nr_pfns, false, &mut |words| cleaned = ones(words))?;
        Ok((told, peeked, cleaned))
    };
    let looked = look();
    let off = hypervisor.disable_log_dirty(domid);
    match (looked, off) {
        (Ok((told, peeked, cleaned)), Ok(())) => {
            format!("yes: ENABLE, PEEK ({told} counted, {peeked} in the bitmap), CLEAN ({cleaned}), OFF")
        }
        (Err(error), Ok(())) => format!("no: {error}"),
        (_, Err(error)) => format!("on, and cannot be turned off again: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulated::{DOMID, OLD, Simulated};
    use super::*;
    use crate::sys::xen::tally::Call;

    #[test]
    fn a_domain_is_looked_at_and_left_as_it_was() {
        let simulated = Simulated::pvh(OLD, 600);
        let hypervisor: Arc<dyn Hypervisor> = simulated.clone();
        let mut findings = Vec::new();
        look_at(&hypervisor, DOMID, &mut findings).unwrap();
        let of = |name: &str| findings.iter().find(|(found, _)| *found == name).unwrap().1.clone();
        assert!(of("domain pages").starts_with("608 of 1044480 page numbers, proved"), "{findings:?}");
        assert!(
            of("domain foreign pages").starts_with("512 of 512 mapped, 512 of them zero"),
            "{findings:?}"
        );
        assert!(of("domain hvm parameters").contains("17=0xfefff"), "{findings:?}");
        assert!(of("domain dirty logging").starts_with("yes: ENABLE, PEEK (0"), "{findings:?}");
        assert!(of("xen calls for this").contains("hvm_param 16, "), "{findings:?}");
        assert!(!simulated.guest().is_logging());
    }

    #[test]
    fn dirty_logging_in_use_by_another_is_left_alone() {
        let simulated = Simulated::pvh(OLD, 600);
        simulated.enable_log_dirty(DOMID, 0xff000).unwrap();
        let said = dirty_logging(simulated.as_ref(), DOMID, 0xff000);
        assert!(said.starts_with("no: ") && simulated.guest().is_logging(), "{said}");
    }

    #[test]
    fn dirty_logging_is_off_again_whatever_fails_in_between() {
        let simulated = Simulated::pvh(OLD, 600);
        for call in [Call::LogDirtyPeek, Call::LogDirtyClean] {
            simulated.guest().fail(call, 0, libc::ENOMEM);
            assert!(dirty_logging(simulated.as_ref(), DOMID, 0xff000).starts_with("no: "));
            assert!(!simulated.guest().is_logging());
        }
    }
}
