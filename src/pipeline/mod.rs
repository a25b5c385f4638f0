//! The source's pipeline: control, one scanner, and a mapper and a sender for each lane, joined by bounded rings.
//!
//! ```text
//!     control        phases, stop rule, display, abort
//!        |
//!     scanner  --batches of PFNs-->  mapper  --filled slots-->  sender  --> socket
//!        |                             ^                          |
//!        +-- reads the dirty log       +------- free slots -------+
//! ```
//!
//! * [`ring`], [`slots`]: the lock-free core, model-checked with loom.
//! * [`scanner`], [`mapper`], [`sender`]: the stages, each a thread that owns what it works on.
//! * [`lanes`]: the threads, started and joined; [`control`]: one migration from first connection to hand-over.
//!
//! What always holds: a slot is in exactly one place (free ring, mapper, filled ring, ledger), because its handle
//! cannot be copied; it goes back to the free ring only when no request covers it any more; and nothing on the way
//! of a page allocates once the migration has begun.

pub mod batch;
pub mod control;
pub mod lanes;
pub mod mapper;
pub mod outcome;
pub mod ring;
pub mod scanner;
pub mod sender;
pub mod settings;
pub mod shared;
pub mod slots;
pub mod sync;

#[cfg(all(test, loom))]
mod loom_ring;
#[cfg(all(test, loom))]
mod loom_slots;
