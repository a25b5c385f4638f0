//! An unmodified process, or a whole tree of them, as a source of pages: its memory is tracked from the outside, without
//! its co-operation, through a userfaultfd that it is made to open ([`attach`], [`crate::sys::ptrace`]).
//!
//! * [`proc`]: what /proc says of a process. [`areas`]: the stretches of memory worth tracking.
//! * [`attach`]: one process, attached to. [`ids`]: page numbers for memory that comes and goes.
//! * [`followed`]: its registered mappings and their page map.
//! * [`tracker`]: one or many attached processes, followed round by round: what `pagecast record` records.
//! * [`control`], [`log`], [`image`]: the same as a source guest for `pagecast mirror`: its power, its dirty log, its pages.
//!   [`homes`]: where those are to be read.
//! * [`history`], [`diagnosis`]: what has become of each page, and why one differs if it does.
//!
//! The target runs on when the tracking ends, in whatever way: nothing of it is held but descriptors.

pub mod areas;
pub mod attach;
pub mod control;
pub mod diagnosis;
pub mod followed;
pub mod history;
pub mod homes;
pub mod ids;
pub mod image;
#[cfg(all(test, target_arch = "x86_64"))]
mod image_tests;
pub mod log;
pub mod proc;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
pub mod tracker;
