//! Dirty-page traces: which pages a guest or a process wrote, round by round. Recorded once, they let anybody compare
//! policies offline, on their own workloads, with the code that decides in a live migration.
//!
//! * [`mod@format`]: the file and its strict reader. [`writer`]: what writes it.
//! * [`record`]: a subject, recorded.
//! * [`replay`]: the model in which a policy is run over a trace. [`clairvoyant`]: the bound that no policy can beat in it.
//! * [`shuffle`]: other orders of a trace's chunks. [`decisions`]: what was sent when, for whoever wants to check.
//! * [`contender`]: a policy with a stop rule. [`trials`]: many replays on all cores.
//! * [`series`]: one replay over time. [`intervals`]: how long pages rest between two writes.

pub mod clairvoyant;
pub mod contender;
pub mod decisions;
pub mod format;
pub mod intervals;
pub mod record;
pub mod replay;
pub mod series;
pub mod shuffle;
pub mod trials;
pub mod writer;
