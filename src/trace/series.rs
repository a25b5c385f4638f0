//! One replay over time, for a picture.

use super::format::Trace;
use super::replay::Observer;
use crate::forecast::Engine;
use crate::page::Pfn;

/// A round of the trace during a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Pages pending at its start.
    pub backlog: u64,
    /// Pages pending at its start that the forecast held back in it.
    pub deferred: u64,
    /// Pages sent in it.
    pub sent: u64,
    /// Pages written in it.
    pub dirty: u64,
}

/// Every round of a replay.
pub struct Series {
    dirty: Vec<u32>,
    /// Seconds between two rounds.
    pub period_s: f64,
    /// From the start to the stop.
    pub moments: Vec<Moment>,
}

impl Series {
    /// Before a replay of `trace`.
    pub fn new(trace: &Trace) -> Self {
        let dirty = trace.rounds().iter().map(|round| round.dirty).collect();
        Series { dirty, period_s: trace.period_s(), moments: Vec::new() }
    }
}

impl Observer for Series {
    fn round(&mut self, round: usize, sent: &[Pfn], engine: &Engine) {
        let sent = sent.len() as u64;
        self.moments.push(Moment {
            backlog: engine.pending().len() + sent,
            deferred: engine.deferred(),
            sent,
            dirty: self.dirty[round].into(),
        });
    }
}
