//! A Xen domain as a guest: HVM and PVH, read from dom0 while it runs.
//!
//! * [`domain`]: opens a domain; hands out its log, its pages and the records that are no pages.
//! * [`log`]: the dirty log.
//! * [`pages`]: the pages, read through [`windows`] that are kept.
//! * [`discovery`]: which of a million page numbers have a page.
//! * [`hypervisor`]: the seam to Xen, which a simulation can take.
//! * [`probe`]: what a host and a domain offer.
//!
//! What always holds: a page's dirty bit is cleared before the page is read, a frame that is not mapped is never touched,
//! and dirty logging ends with the domain's [`domain::XenDomain`], however that ends.

pub mod discovery;
pub mod domain;
mod error;
pub mod hypervisor;
pub mod log;
pub mod pages;
mod population;
pub mod probe;
mod records;
mod shared;
pub mod windows;

#[cfg(test)]
pub(crate) mod simulated;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use domain::{FinalMapping, WindowsAtEnd, XenCosts, XenDomain, XenSettings};
pub use error::XenError;
pub use hypervisor::Hypervisor;
pub use log::XenDirtyLog;
pub use pages::XenPages;

use crate::sys::xen::interface::Interface;

/// The Xen that this dom0 runs on. `domctl_interface` overrules the version that belongs to the release.
pub fn this_host(domctl_interface: Option<u32>) -> Result<Arc<dyn Hypervisor>, XenError> {
    Ok(Arc::new(Interface::open(domctl_interface)?))
}
