//! Saving a domain: what is asked for, and what comes of it.

use std::os::fd::OwnedFd;

use serde_json::Value;

use super::abort::Abort;
use super::config::Options;
use super::handle::{Libxl, LibxlError};
use crate::forecast::Convergence;
use crate::pipeline::outcome::MigrationError;

/// A domain to save, and how.
#[derive(Debug)]
pub struct SaveRequest {
    /// The domain.
    pub domid: u16,
    /// Whether it is to run while its memory is sent; else it is suspended first.
    pub live: bool,
    /// Where the stream goes. Under xl a pipe or a file, under libvirt a socket. It is not to be changed, not even to be
    /// made non-blocking, before it is clear that the domain is not left to the stock helper.
    pub stream: OwnedFd,
    /// What is configured.
    pub options: Options,
}

/// How a save went.
#[derive(Clone, Debug)]
pub struct SaveReport {
    /// An object for the report, which gets the domain's number and whether it was live as well; null if none is configured.
    pub report: Value,
    /// For people: a few lines, each of which also goes to xl's log.
    pub summary: String,
}

/// Why a domain was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It is one that pagecast does not save, for this reason: a PV guest, an unknown version of Xen. Only to be said
    /// before anything was written to the stream or asked of libxl, and with the domain and this process as they were:
    /// the stock helper is then put in this one's place.
    #[error("{0}")]
    NotOurs(String),
    /// It failed. The domain is as it was before, log-dirty off; if it was suspended, libxl resumes it.
    #[error("{message}")]
    Failed {
        /// For libxl, which says it in words.
        errno: i32,
        /// One line that says what failed and what to do.
        message: String,
        /// What was seen of the convergence, if it failed for want of it.
        convergence: Option<Box<Convergence>>,
    },
}

impl SaveError {
    /// It failed, for a reason that has nothing to do with convergence.
    pub fn failed(errno: i32, message: impl std::fmt::Display) -> Self {
        SaveError::Failed { errno, message: message.to_string(), convergence: None }
    }
}

impl From<LibxlError> for SaveError {
    fn from(error: LibxlError) -> Self {
        let errno = match error {
            LibxlError::Gone(_) => libc::EPIPE,
            LibxlError::Aborted { .. } => libc::EINTR,
            LibxlError::Failed(_) | LibxlError::Completed(_) => libc::EIO,
        };
        SaveError::failed(errno, error)
    }
}

impl From<MigrationError> for SaveError {
    fn from(error: MigrationError) -> Self {
        let errno = match error {
            MigrationError::Aborted { .. } => libc::EINTR,
            MigrationError::NoConvergence { .. } => libc::ETIME,
            _ => libc::EIO,
        };
        let convergence = error.convergence().cloned().map(Box::new);
        SaveError::Failed { errno, message: error.to_string(), convergence }
    }
}

/// Whoever saves domains.
pub trait SaveDomain {
    /// Saves one: everything between libxl's headers and its own records, suspending the guest included.
    ///
    /// `abort` is to be looked at all the time: once it is raised the save is to fail, after everything is undone that was
    /// done to the domain. Libxl may be asked from any thread.
    fn save(&mut self, request: &SaveRequest, libxl: &Libxl, abort: &Abort) -> Result<SaveReport, SaveError>;
}

impl<F: FnMut(&SaveRequest, &Libxl, &Abort) -> Result<SaveReport, SaveError>> SaveDomain for F {
    fn save(&mut self, request: &SaveRequest, libxl: &Libxl, abort: &Abort) -> Result<SaveReport, SaveError> {
        self(request, libxl, abort)
    }
}
