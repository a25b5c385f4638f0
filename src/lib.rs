//! pagecast moves a running guest from one host to another and forecasts, page by page, when each page will
//! be written next, so that it sends a page only when sending it is likely to be the last time.
//!
//! Where to look:
//!
//! * [`page`], [`page_set`]: page numbers and sets of pages, the words everything shares.
//! * [`guest`]: where pages come from: the traits, the embedded guest (`arena`), and unmodified processes (`process`).
//! * [`forecast`]: the policies (`xen`, `xen-skip`, `paper`, `heat`, `ar`), the state they keep, the stop rule and
//!   the clairvoyant bound. Pure: no I/O, no threads, no unsafe.
//! * [`pipeline`]: the source: control, and the pinned stages scanner, mapper and sender with their rings.
//! * [`stream`]: the libxc migration stream, version 3: writer and strict reader. Pure.
//! * [`transport`]: what two pagecasts say to each other around the stream.
//! * [`destination`]: the receive side.
//! * [`trace`]: recorded dirty-page traces, their replay and their clairvoyant bound.
//! * [`report`]: progress, tables, JSON lines, pictures.
//! * [`sys`]: the home of unsafe code and raw kernel interfaces; elsewhere only the ring, the slot pool and the sender
//!   have some.
//! * [`cli`]: one file for each subcommand.
//! * [`libxl`]: being libxl's save helper: its command line, its messages, and what goes to the stock helper.
//!
//! Dependencies point one way: cli and libxl, then pipeline, destination and report, then guest, forecast, stream and
//! transport, then sys.
#![warn(missing_docs)]

pub mod cli;
pub mod destination;
pub mod forecast;
pub mod guest;
pub mod libxl;
pub mod page;
pub mod page_set;
pub mod pipeline;
pub mod report;
pub mod stream;
pub mod sys;
pub mod trace;
pub mod transport;
