//! Dirty-page traces: which pages a guest or a process wrote, round by round. Recorded once, they let anybody compare
//! policies offline, on their own workloads, with the code that decides in a live migration.
//!
//! * [`mod@format`]: the file, its strict reader and its writer.
//! * [`record`]: a subject, recorded.
//! * [`replay`]: the model in which a policy is run over a trace. [`clairvoyant`]: the bound that no policy can beat in it.

pub mod clairvoyant;
pub mod format;
pub mod record;
pub mod replay;
