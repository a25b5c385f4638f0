//! Saving a Xen domain for libxl: the domain, libxl and the pipeline brought together.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::abort::Abort;
use super::dom0;
use super::handle::{Libxl, LibxlError};
use super::save::{SaveError, SaveReport, SaveRequest};
use crate::guest::xen::windows::WindowLimits;
use crate::guest::xen::{Hypervisor, WindowsAtEnd, XenDomain, XenError, XenSettings, this_host};
use crate::guest::{DirtyLog, GuestControl, GuestError, PageSource};
use crate::libxl::Level;
use crate::page::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::pipeline::live::Observer;
use crate::pipeline::outcome::{Phase, Progress};
use crate::pipeline::save::{SavableGuest, save};
use crate::report::{ms, saved};
use crate::stream::{RecordType, headers, record};
use crate::sys::heir;
use crate::sys::xen::CallError;

/// Saves a domain of this host.
pub fn save_domain(request: &SaveRequest, libxl: &Libxl, abort: &Abort) -> Result<SaveReport, SaveError> {
    dom0::check()?;
    let hypervisor = this_host(None).map_err(save_error)?;
    save_on(&hypervisor, request, libxl, abort, &|| {
        if let Err(error) = heir::appoint() {
            // The save is none the worse for it, but for a downtime that is a little longer.
            libxl.log(
                Level::Debug,
                &format!("libxl has to wait for the guest's pages to be unmapped: {error}"),
            );
        }
    })
}

/// Saves a domain that `hypervisor` knows. Calls `is_ours` once it is clear that it is not left to the stock helper: this process
/// then ends with the save.
fn save_on(
    hypervisor: &Arc<dyn Hypervisor>,
    request: &SaveRequest,
    libxl: &Libxl,
    abort: &Abort,
    is_ours: &dyn Fn(),
) -> Result<SaveReport, SaveError> {
    let settings = &request.options.settings;
    let pages = (request.options.window_bytes as usize / PAGE_SIZE).max(1);
    let xen = XenSettings {
        windows: WindowLimits { pages, ..WindowLimits::default() },
        // The process ends with this save, and its heir, if it has one, takes them apart: libxl does not wait for that.
        windows_at_end: WindowsAtEnd::LeftToExit,
        ..XenSettings::default()
    };
    let open = || XenDomain::open_with(hypervisor.clone(), request.domid, xen).map_err(save_error);
    let mut domain = open()?;
    is_ours();
    let stream = request
        .stream
        .try_clone()
        .map_err(|error| SaveError::failed(libc::EMFILE, format!("cannot duplicate the stream: {error}")))?;
    if !request.live {
        suspend(&domain, libxl)?;
        // Which pages there are is certain only now.
        domain = open()?;
    }
    let discovery = domain.costs().discovery;
    libxl.log(
        Level::Info,
        &format!(
            "domain {}: {} pages among {} page numbers, found by {} calls for {} frames in {:.0} ms",
            request.domid,
            discovery.populated,
            discovery.nr_pfns,
            discovery.calls,
            discovery.frames_asked,
            discovery.seconds * 1e3
        ),
    );
    let mut guest = XenGuest { domain, libxl, suspended: !request.live };
    let mut display = Display { libxl, percent: 0 };
    let result = save(&mut guest, settings, stream, request.live, abort.flag(), &mut display);
    let migration = result.map_err(|error| {
        let error = SaveError::from(error);
        match error {
            SaveError::Failed { message, convergence, .. } if abort.is_raised() => SaveError::Failed {
                errno: libc::EINTR,
                message: format!("{message} ({})", abort.reason()),
                convergence,
            },
            other => other,
        }
    })?;
    let saved = saved::Saved {
        policy: settings.policy,
        live: request.live,
        budget_ms: ms(settings.downtime_budget),
        migration,
        costs: guest.domain.costs(),
    };
    // The guest stands still meanwhile: nothing is made that goes nowhere.
    let report = request.options.report.as_ref().map_or(Value::Null, |_| saved.json());
    Ok(SaveReport { report, summary: saved.summary() })
}

/// Has libxl suspend the domain, and makes sure that it is.
fn suspend(domain: &XenDomain, libxl: &Libxl) -> Result<(), SaveError> {
    if !libxl.suspend()? {
        return Err(SaveError::failed(
            libc::EIO,
            "libxl could not suspend the domain; what it logged says why",
        ));
    }
    match domain.is_suspended() {
        Ok(true) => Ok(()),
        Ok(false) => Err(SaveError::failed(
            libc::EIO,
            "the domain is not suspended although libxl says so: it has crashed or been shut down meanwhile",
        )),
        Err(error) => Err(save_error(error)),
    }
}

/// What the failure means for libxl: a kind of domain or of Xen that pagecast does not know is for the stock helper.
fn save_error(error: XenError) -> SaveError {
    match &error {
        XenError::Pv(_) => SaveError::NotOurs(error.to_string()),
        XenError::Call(CallError::UnknownRelease(_) | CallError::Interface { .. }) => {
            SaveError::NotOurs(error.to_string())
        }
        _ => SaveError::failed(libc::EIO, error),
    }
}

/// A domain that libxl suspends.
struct XenGuest<'a> {
    domain: XenDomain,
    libxl: &'a Libxl,
    suspended: bool,
}

impl From<LibxlError> for GuestError {
    fn from(error: LibxlError) -> Self {
        GuestError::Refused(error.to_string())
    }
}

impl GuestControl for XenGuest<'_> {
    fn nr_pages(&self) -> u64 {
        self.domain.nr_pfns()
    }

    fn populated(&mut self) -> Result<PageSet, GuestError> {
        Ok(self.domain.populated().clone())
    }

    fn set_log_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        if on {
            // Xen does not see what a device model writes: it logs that itself. It ends with the helper.
            self.libxl.switch_qemu_logdirty(self.domain.domid(), true)?;
        }
        Ok(self.domain.set_log_dirty(on)?)
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        if !self.suspended {
            suspend(&self.domain, self.libxl).map_err(|error| GuestError::Refused(error.to_string()))?;
            self.suspended = true;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        // That is libxl's, once it is told that the save has failed.
        Ok(())
    }

    fn work_done(&mut self) -> Result<Option<(u64, Duration)>, GuestError> {
        Ok(None)
    }

    fn take_dirty_log(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Ok(Box::new(self.domain.take_dirty_log()?))
    }

    fn page_source(&mut self) -> Box<dyn PageSource> {
        Box::new(self.domain.page_source())
    }
}

impl SavableGuest for XenGuest<'_> {
    fn head(&mut self) -> Result<Vec<u8>, GuestError> {
        let mut head = headers(&self.domain.header()).to_vec();
        head.extend(self.domain.static_records()?);
        head.extend(record(RecordType::STATIC_DATA_END, &[]));
        Ok(head)
    }

    fn tail(&mut self) -> Result<Vec<u8>, GuestError> {
        self.domain.check()?;
        Ok(self.domain.tail_records()?)
    }
}

/// Shows xl how far the save is. Never less far than before: xl begins a line of its own then.
struct Display<'a> {
    libxl: &'a Libxl,
    percent: u64,
}

impl Observer for Display<'_> {
    fn progress(&mut self, progress: &Progress) {
        let what = match progress.phase {
            Phase::Prepare | Phase::Precopy => "pre-copy",
            _ => "stop-and-copy",
        };
        let all = (progress.pages_sent + progress.pending).max(1);
        self.percent = self.percent.max(progress.pages_sent * 100 / all);
        self.libxl.progress(what, self.percent, 100);
    }
}

#[cfg(test)]
mod tests;
