//! The inside of the embedded guest: a small machine whose whole state lives in its RAM.
//!
//! A [`Machine`] runs on a region of plain memory. It executes operations; each checks one page and writes it
//! again, in an order that a [`Workload`] lays down. Everything that changes is in that memory, so a copy of it
//! taken between two operations goes on exactly as the original would have. And every page says which version
//! it is, so a migration that loses, tears or reorders so much as one page is found out.
//!
//! RAM, by page number:
//!
//! ```text
//! 0            CPU page: spec, program counter, registers, clock, counters     (cpu)
//! 1..=T        sequence tables: how often each data page has been written      (table)
//! T+1..        data, by 2 MiB chunk either
//!                owned pages: number, sequence number, seeded body, checksum   (owned)
//!                zero pages: never written, table entry 0
//! ```
//!
//! An operation writes its page, then the page's table entry, then the CPU page. Each vouches for the one
//! before, and all table entries together add up to the writes counted on the CPU page:
//!
//! | what went wrong | what gives it away |
//! |---|---|
//! | a torn or damaged page | its checksum |
//! | an old version of a page | its sequence number is behind its table entry |
//! | an old version of a table | the pages are ahead of it |
//! | an old CPU page | the tables add up to more than it has counted |
//! | a page in another's place | the page number it carries |
//! | a zero page that was written | it is not zero |
//!
//! One thread, the guest's only CPU, writes; another process may read the same memory through a mapping of its
//! own at any moment in order to migrate it. What it reads while a page is being written is torn, and is sent
//! again, because the page is then dirty.

//!
//! Around the machine: [`vcpu`], the thread that runs it; [`host`], the process that owns it and answers on its
//! control socket ([`protocol`]); [`client`], that guest as a migrator sees it; [`handover`], the switch-over.

mod check;
pub mod client;
mod cpu;
mod fault;
pub mod handover;
pub mod host;
mod layout;
mod machine;
mod owned;
mod pacing;
mod pattern;
pub mod protocol;
mod ram;
pub(crate) mod rng;
mod table;
#[cfg(test)]
mod tests;
pub mod vcpu;
mod workload;
mod zipf;

pub use check::CheckReport;
pub use fault::{Fault, FaultKind};
pub use machine::{Machine, MachineError, Stats, read_stats};
pub use pacing::Advance;
pub use workload::{Spec, UnknownWorkload, Workload};
