//! pagecast moves a running guest from one host to another and forecasts, page by page, when each page will
//! be written next, so that it sends a page only when sending it is likely to be the last time.
//!
//! Where to look:
//!
//! * [`page`], [`page_set`]: page numbers and sets of pages, the words everything shares.
//! * [`forecast`]: the policies (`xen`, `xen-skip`, `paper`, `ar`), the state they keep, the stop rule and the
//!   clairvoyant bound. Pure: no I/O, no threads, no unsafe.
//! * [`stream`]: the libxc migration stream, version 3: writer and strict reader. Pure.
#![warn(missing_docs)]

pub mod forecast;
pub mod guest;
pub mod page;
pub mod page_set;
pub mod pipeline;
pub mod stream;
pub mod sys;
