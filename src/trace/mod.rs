//! Dirty-page traces: which pages a guest or a process wrote, round by round. Recorded once, they let anybody compare
//! policies offline, on their own workloads, with the code that decides in a live migration.
//!
//! * [`format`]: the file, its strict reader and its writer.

pub mod format;
