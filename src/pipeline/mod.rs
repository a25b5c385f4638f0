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
//! * [`scanner`], [`mapper`], [`sender`]: the stages, each a thread that owns what it works on; [`writer`]: the sender of a
//!   pipe or a file.
//! * [`cadence`], [`clock`]: when the log is looked at; `link_rate`, `log_peek`: what the scanner knows of the link, and how policies look into the log.
//! * [`dealer`], [`openings`]: how pages get from the scanner into batches of the right lane.
//! * [`latency`]: how long each stage takes.
//! * [`lanes`]: the threads, started and joined; [`live`]: a migration from the first page to the last.
//! * [`control`]: to another pagecast, from the first connection to the hand-over; [`save`]: into a stream that somebody
//!   else receives.
//!
//! What always holds: a slot is in exactly one place (free ring, mapper, filled ring, ledger), because its handle
//! cannot be copied; it goes back to the free ring only when no request covers it any more; and nothing on the way
//! of a page allocates once the migration has begun.

pub mod batch;
pub mod cadence;
pub mod clock;
pub mod control;
pub mod dealer;
pub mod lanes;
pub mod latency;
mod link_rate;
pub mod live;
mod log_peek;
pub mod mapper;
pub mod openings;
pub mod outcome;
pub mod outlet;
pub mod ring;
pub mod save;
pub mod scanner;
pub mod sender;
pub mod settings;
pub mod shared;
pub mod slots;
pub mod sync;
pub mod writer;

#[cfg(all(test, loom))]
mod loom_pages;
#[cfg(all(test, loom))]
mod loom_ring;
#[cfg(all(test, loom))]
mod loom_slots;
#[cfg(all(test, not(loom)))]
mod simulation;
