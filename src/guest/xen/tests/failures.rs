//! Calls that fail, wherever they do.

use std::sync::Arc;

use crate::guest::xen::simulated::{DOMID, OLD, Simulated};
use crate::guest::xen::{Hypervisor, XenDomain};
use crate::guest::{DirtyLog, PageSource};
use crate::page::PAGE_SIZE;
use crate::sys::xen::tally::Call;

/// A migration with something in each of its parts, up to the first error.
fn migrate(simulated: &Arc<Simulated>) -> Result<(), Box<dyn std::error::Error>> {
    let domain = XenDomain::open(simulated.clone(), DOMID)?;
    let records = domain.static_records()?;
    domain.set_log_dirty(true)?;
    let (mut log, mut pages) = (domain.take_dirty_log()?, domain.page_source());
    let mut due = domain.populated().clone();
    for last in [false, true] {
        simulated.guest().replace(30);
        simulated.guest().add(0x7000 + u64::from(last));
        if last {
            log.get_and_clear_last(&mut due)?;
        } else {
            log.get_and_clear(&mut due)?;
        }
        for pfn in due.iter() {
            pages.copy(pfn, &mut [0; PAGE_SIZE]);
        }
        due.clear();
    }
    domain.check()?;
    assert!(!records.is_empty() && !domain.tail_records()?.is_empty());
    domain.set_log_dirty(false)?;
    Ok(())
}

#[test]
fn a_call_that_fails_anywhere_is_an_error_and_leaves_dirty_logging_off() {
    let counts = |simulated: &Simulated| {
        let calls = simulated.calls();
        [
            (Call::DomainInfo, calls.domain_info),
            (Call::MaximumGpfn, calls.maximum_gpfn),
            (Call::PageTypes, calls.page_types),
            (Call::LogDirtyClean, calls.log_dirty_clean),
            (Call::LogDirtyOff, calls.log_dirty_off),
            (Call::CpuPolicy, calls.cpu_policy),
            (Call::TscInfo, calls.tsc_info),
            (Call::HvmContext, calls.hvm_context),
            (Call::HvmParam, calls.hvm_param),
            (Call::MapBatch, calls.map_batch),
        ]
    };
    let simulated = Simulated::pvh(OLD, 60);
    migrate(&simulated).unwrap();
    assert!(!simulated.guest().is_logging());
    for (call, times) in counts(&simulated) {
        assert!(times > 0, "{call:?} is not part of the test");
        for successes in 0..times as u32 {
            let simulated = Simulated::pvh(OLD, 60);
            simulated.guest().fail(call, successes, libc::ENOMEM);
            assert!(migrate(&simulated).is_err(), "{call:?} failing after {successes} passes unnoticed");
            assert!(!simulated.guest().is_logging(), "{call:?} failing after {successes} leaves it on");
        }
    }
}

#[test]
fn logging_that_cannot_be_had_is_off_and_the_reason_is_told() {
    for (errno, reason) in [(libc::EINVAL, "PCI device"), (libc::EOPNOTSUPP, "shadow paging")] {
        let simulated = Simulated::pvh(OLD, 60);
        let domain = XenDomain::open(simulated.clone(), DOMID).unwrap();
        simulated.guest().fail(Call::LogDirtyEnable, 0, errno);
        domain.set_log_dirty(true).unwrap();
        domain.set_log_dirty(false).unwrap();
        simulated.guest().fail(Call::LogDirtyEnable, 0, errno);
        simulated.guest().fail(Call::LogDirtyEnable, 0, errno);
        let error = domain.set_log_dirty(true).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!simulated.guest().is_logging());
    }
}
