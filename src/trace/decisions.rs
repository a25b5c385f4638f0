//! What a replayed policy sent and when it stopped, as text that an outsider can check against the trace without any of
//! this crate's code:
//!
//! ```text
//! t ROUND          the round of the trace, ascending; rounds in which nothing was sent are left out
//! s FIRST COUNT    pages FIRST .. FIRST + COUNT were sent in it; runs ascend, each page at most once a round
//! stop ROUND       last: at the start of this round it stopped, and the backlog was sent with the guest paused
//! ```
//!
//! Pages are those of the trace file, also when its chunks were shuffled for the replay.

use super::format::Run;
use super::replay::Observer;
use super::shuffle::Shuffle;
use crate::forecast::Engine;
use crate::page::Pfn;

/// Everything that was sent before the stop, round by round.
pub struct Decisions {
    shuffle: Shuffle,
    /// Round of the trace, and the pages sent in it as ascending runs.
    rounds: Vec<(usize, Vec<Run>)>,
}

impl Decisions {
    /// Of a replay of the trace that `shuffle` gave.
    pub fn new(shuffle: Shuffle) -> Self {
        Decisions { shuffle, rounds: Vec::new() }
    }

    /// All of it.
    pub fn text(&self, stop_round: usize) -> String {
        let mut text = String::new();
        for (round, runs) in self.rounds.iter().filter(|(_, runs)| !runs.is_empty()) {
            text += &format!("t {round}\n");
            runs.iter().for_each(|run| text += &format!("s {} {}\n", run.first, run.count));
        }
        text + &format!("stop {stop_round}\n")
    }
}

impl Observer for Decisions {
    fn round(&mut self, round: usize, sent: &[Pfn], _: &Engine) {
        self.rounds.push((round, self.shuffle.recorded(sent)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::PolicyKind;
    use crate::trace::replay::tests::{setting, trace_of};
    use crate::trace::replay::{StopAt, replay};
    use crate::trace::shuffle::Order;

    #[test]
    fn decisions_are_the_pages_sent_in_each_round() {
        let trace = trace_of(&[vec![1, 2], vec![], vec![]]);
        let mut decisions = Decisions::new(Shuffle::new(Order::Recorded, 1));
        let outcome = replay(&trace, &setting(PolicyKind::Xen, StopAt::Own), &mut decisions);
        assert_eq!((outcome.reason, outcome.converged, outcome.stop_round), (None, false, 3));
        assert_eq!(
            decisions.text(outcome.stop_round),
            "t 0\ns 0 20\nt 1\ns 20 21\nt 2\ns 41 20\nstop 3\n",
            "20.5 pages a round"
        );
    }
}
