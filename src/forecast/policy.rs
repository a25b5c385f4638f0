//! What a policy is, and the one place where policies are registered.

use super::paper::Paper;
use super::ranked::{Ranked, Terms};
use super::working_set::Step;
use super::xen::Xen;
use super::xen_skip::XenSkip;
use super::{Config, Convergence, Link, Next, Peek, Sample, Verdict, WorkingSet};
use crate::page::Pfn;
use crate::page_set::PageSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What a policy sees of the migration when it is asked.
pub(super) struct View<'a> {
    /// Time since the start of dirty logging.
    pub now: Duration,
    /// The link as the caller measured it.
    pub link: &'a Link,
    /// Pages that have to be sent at some time.
    pub pending: &'a PageSet,
    /// When each page was last written.
    pub working_set: &'a WorkingSet,
}

/// A rule that orders the pending pages and says when to stop.
pub(super) trait Policy: Send {
    /// Takes a sample in. Neither `working_set` nor the pending set knows of it yet, so the ages in it are
    /// those of the writes before.
    fn on_sample(&mut self, sample: &Sample, working_set: &WorkingSet);

    /// Sees the chunks of the sample, in ascending order.
    fn on_chunk(&mut self, _dirty: &PageSet, _step: Step) {}

    /// All chunks of the sample are in, and `working_set` knows of it.
    fn end_sample(&mut self, _working_set: &WorkingSet) {}

    /// Appends to `out` at most `max` pages out of `view.pending`, in the order to send; each page once.
    fn next_batch(&mut self, view: &View, max: usize, peek: &mut dyn Peek, out: &mut Vec<Pfn>) -> Next;

    /// The pages that stay pending although they are handed out: those that a policy in rounds has in its copy
    /// of the hypervisor's log and will therefore send again in the next round, as Xen does.
    fn log(&self) -> Option<&PageSet> {
        None
    }

    /// Whether it has no use for samples but those that end its rounds.
    fn samples_by_round(&self) -> bool {
        false
    }

    /// Whether to go on. Asked after every sample and at the end of a round. `convergence` has the readings of the
    /// latest sample and takes what the policy makes of them.
    fn stop(&mut self, view: &View, convergence: &mut Convergence) -> Verdict;

    /// Whether what is left fits the budget, and is sent before the stop all the same.
    fn is_lingering(&self) -> bool {
        false
    }

    /// Pages out of `pending` that are held back now.
    fn deferred(&self, pending: &PageSet) -> u64;

    /// Bytes of state, the engine's own sets apart.
    fn state_bytes(&self) -> usize;

    /// Bytes of it in huge pages.
    fn huge_bytes(&self) -> usize {
        0
    }
}

/// The policies there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// Xen 4.6 and later: full rounds, at most 5, stop below 50 dirty pages.
    Xen,
    /// Xen 4.2 to 4.5: skip pages that are dirty again, 29 rounds, 50 pages, three times the memory.
    XenSkip,
    /// Chen, Zhang and Zhang 2013: linear AR(1) on a page's intervals, a constant threshold.
    Paper,
    /// Rank by age, write count and activity of the 2 MiB chunk.
    Heat,
    /// `heat` and all of [`Terms`]: the AR forecast of the chunk's activity, fronts, neighbours, the hazard of the ages.
    Ar,
    /// `heat` and some of them, to find out what each adds.
    HeatWith(Terms),
}

/// Between `heat` and `ar`: each term by itself, and all but one.
const ABLATIONS: [(&str, Terms); 8] = [
    ("heat+activity", Terms::ACTIVITY),
    ("heat+fronts", Terms::FRONTS),
    ("heat+neighbours", Terms::NEIGHBOURS),
    ("heat+hazard", Terms::HAZARD),
    ("ar-hazard", Terms::all().difference(Terms::HAZARD)),
    ("ar-activity", Terms::all().difference(Terms::ACTIVITY)),
    ("ar-fronts", Terms::all().difference(Terms::FRONTS)),
    ("ar-neighbours", Terms::all().difference(Terms::NEIGHBOURS)),
];

impl PolicyKind {
    /// Every policy, baselines first.
    pub const ALL: [PolicyKind; 5] =
        [PolicyKind::Xen, PolicyKind::XenSkip, PolicyKind::Paper, PolicyKind::Heat, PolicyKind::Ar];

    /// The word for it on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            PolicyKind::Xen => "xen",
            PolicyKind::XenSkip => "xen-skip",
            PolicyKind::Paper => "paper",
            PolicyKind::Heat => "heat",
            PolicyKind::Ar => "ar",
            PolicyKind::HeatWith(terms) => {
                let known = ABLATIONS.iter().find(|(_, known)| *known == terms);
                known.map_or("ar", |(name, _)| name)
            }
        }
    }

    /// The policy at the start, with the pages of `populated` to be sent.
    pub(super) fn build(self, config: &Config, populated: &PageSet) -> Box<dyn Policy> {
        match self {
            PolicyKind::Xen => Box::new(Xen::new(populated)),
            PolicyKind::XenSkip => Box::new(XenSkip::new(populated)),
            PolicyKind::Paper => Box::new(Paper::new(populated)),
            PolicyKind::Heat => Box::new(Ranked::new(*config, Terms::empty())),
            PolicyKind::Ar => Box::new(Ranked::new(*config, Terms::all())),
            PolicyKind::HeatWith(terms) => Box::new(Ranked::new(*config, terms)),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no policy's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no policy is called {0:?}; the policies are xen, xen-skip, paper, heat and ar, and between the last two heat+TERM and \
         ar-TERM, with activity, fronts, neighbours or hazard for the term"
)]
pub struct ParsePolicyError(String);

impl FromStr for PolicyKind {
    type Err = ParsePolicyError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let ablations = ABLATIONS.map(|(_, terms)| PolicyKind::HeatWith(terms));
        PolicyKind::ALL
            .into_iter()
            .chain(ablations)
            .find(|kind| kind.name() == name)
            .ok_or_else(|| ParsePolicyError(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_the_error_lists_them_all() {
        for kind in PolicyKind::ALL.into_iter().chain(ABLATIONS.map(|(_, terms)| PolicyKind::HeatWith(terms)))
        {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "Heat".parse::<PolicyKind>().unwrap_err().to_string();
        assert!(!error.contains('\n'));
        for kind in PolicyKind::ALL {
            assert!(error.contains(kind.name()), "{error}");
        }
    }
}
