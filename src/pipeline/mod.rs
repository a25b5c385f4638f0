//! The pipeline: what moves pages from the scanner to the wire, one pinned thread a stage and no lock between them.
//!
//! * [`ring`]: the bounded queue between two stages.
//! * [`slots`]: the fixed pool of buffers that pages are copied into and sent from.
//! * [`ledger`]: which of those buffers the kernel may still read.
//! * [`pacer`]: when the next send may start under a bandwidth cap.
//! * [`sync`]: what the ring takes from std, or from loom when it is being model-checked.
//!
//! What always holds: a slot is in exactly one place (free ring, mapper, filled ring, ledger), because its handle
//! cannot be copied; it goes back to the free ring only when no request covers it any more; and nothing here
//! allocates once it has been made.

pub mod ledger;
pub mod pacer;
pub mod ring;
pub mod slots;
pub mod sync;

#[cfg(all(test, loom))]
mod loom_ring;
#[cfg(all(test, loom))]
mod loom_slots;
