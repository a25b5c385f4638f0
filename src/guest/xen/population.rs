//! Which pages a domain has, as far as was asked.
//!
//! A small guest has a million page numbers and five in a hundred of them have a page, so nothing here asks for each.
//! What is known is kept with the time at which it was known: an *epoch* ends whenever the guest is seen to have given
//! up or got pages ([`super::shared`]), and what was asked in an earlier one counts as a guess.

use super::XenError;
use super::hypervisor::{Hypervisor, MAX_TYPES, is_ram};
use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::{CHUNK_WORDS, PageSet, for_each_place};
use crate::sys::xen::abi::DomId;

/// A bit for each page of a chunk.
pub(super) type ChunkMask = [u64; CHUNK_WORDS];

/// Pages in a mask.
pub(super) fn count(mask: &ChunkMask) -> usize {
    mask.iter().map(|word| word.count_ones() as usize).sum()
}

/// Whether a page of the chunk is in a mask.
pub(super) fn contains(mask: &ChunkMask, in_chunk: usize) -> bool {
    mask[in_chunk / 64] >> (in_chunk % 64) & 1 == 1
}

/// Pages of the mask in front of one.
pub(super) fn rank(mask: &ChunkMask, in_chunk: usize) -> usize {
    let whole: u32 = mask[..in_chunk / 64].iter().map(|word| word.count_ones()).sum();
    let part = mask[in_chunk / 64] & ((1 << (in_chunk % 64)) - 1);
    (whole + part.count_ones()) as usize
}

/// What is known of a domain's pages.
pub(super) struct Population {
    /// Pages that were there when last asked for.
    known: PageSet,
    /// The epoch in which all of a chunk was last known, for each chunk; 0: never.
    asked: Vec<u32>,
    /// Pages whose contents may have changed unseen by the dirty log; the next sample calls them dirty.
    unlogged: PageSet,
    /// Chunks of which pages were read through a mapping that has been let go since, for each chunk.
    let_go: Vec<bool>,
    /// Chunks mapped since the last sample.
    young: Vec<usize>,
    /// Those that were when the sample under way began.
    aging: Vec<usize>,
    /// Pages that were wanted and were not there.
    missed: PageSet,
}

/// What an answer about a page changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// There is a page where there was none.
    Came,
    /// There is none where there was one.
    Went,
}

impl Population {
    pub(super) fn new(nr_pfns: u64) -> Self {
        let known = PageSet::empty(nr_pfns);
        let chunks = known.nr_chunks();
        Population {
            asked: vec![0; chunks],
            unlogged: known.clone(),
            let_go: vec![false; chunks],
            young: Vec::new(),
            aging: Vec::new(),
            missed: known.clone(),
            known,
        }
    }

    /// Pages known to be there.
    pub(super) fn known(&self) -> &PageSet {
        &self.known
    }

    /// Whether all of a chunk was asked for in `epoch`.
    pub(super) fn is_asked(&self, chunk: usize, epoch: u32) -> bool {
        self.asked[chunk] == epoch
    }

    /// Notes that all of a chunk is known as of `epoch`.
    pub(super) fn set_asked(&mut self, chunk: usize, epoch: u32) {
        self.asked[chunk] = epoch;
    }

    /// Takes an answer in.
    pub(super) fn note(&mut self, pfn: Pfn, there: bool) -> Change {
        match there {
            true if self.known.insert(pfn) => Change::Came,
            false if self.known.remove(pfn) => Change::Went,
            _ => Change::None,
        }
    }

    /// Has the next sample call a page dirty.
    pub(super) fn mark_unlogged(&mut self, pfn: Pfn) {
        self.unlogged.insert(pfn);
    }

    /// Notes that a chunk's mapping was let go, so that whether its pages are the same can no longer be told.
    pub(super) fn note_let_go(&mut self, chunk: usize) {
        self.let_go[chunk] = true;
    }

    /// Notes that a chunk was mapped.
    pub(super) fn note_young(&mut self, chunk: usize) {
        self.young.push(chunk);
    }

    /// Notes that a sample begins. Chunks mapped from now on count as newly mapped for the next one too, because other
    /// threads may map them before or after the log is cleared.
    pub(super) fn begin_sample(&mut self) {
        self.aging.append(&mut self.young);
    }

    /// Notes that nothing speaks against the chunks mapped before the sample.
    pub(super) fn trust_aging(&mut self) {
        self.aging.clear();
    }

    /// Has the next sample call all pages dirty of which it cannot be told by comparison whether they are what was sent:
    /// those whose mapping was let go, and those that may have been replaced just before they were mapped.
    pub(super) fn mark_doubtful_unlogged(&mut self) {
        for chunk in self.aging.drain(..).chain(self.young.drain(..)) {
            self.let_go[chunk] = true;
        }
        for (chunk, doubtful) in self.let_go.iter_mut().enumerate() {
            if std::mem::take(doubtful) {
                for pfn in self.known.pages_of_chunk(chunk) {
                    self.unlogged.insert(pfn);
                }
            }
        }
    }

    /// Notes that a page was wanted and was not there.
    pub(super) fn note_missed(&mut self, pfn: Pfn) {
        self.missed.insert(pfn);
    }

    /// The pages that were wanted and were not there, and are not known to have come since.
    pub(super) fn missed(&self) -> Vec<Pfn> {
        self.missed.iter().filter(|pfn| !self.known.contains(*pfn)).collect()
    }

    /// Moves what the dirty log has missed into `dirty`.
    pub(super) fn take_unlogged(&mut self, dirty: &mut PageSet) {
        dirty.union(&self.unlogged);
        self.unlogged.clear();
    }

    /// The pages of a chunk, known or not, up to the end of the page-number space.
    pub(super) fn chunk_pages(&self, chunk: usize) -> impl DoubleEndedIterator<Item = Pfn> + use<> {
        let first = (chunk * CHUNK_PAGES) as u64;
        let end = (first + CHUNK_PAGES as u64).min(self.known.nr_pages());
        (first..end).map(Pfn)
    }

    /// Adds to `pages` those of a chunk that are not known to be there, up to the end of the page-number space.
    pub(super) fn list_unknown(&self, chunk: usize, pages: &mut Vec<Pfn>) {
        let first = (chunk * CHUNK_PAGES) as u64;
        for_each_place(&self.known.chunk_words(chunk).map(|word| !word), |place| {
            let pfn = Pfn(first + place as u64);
            if pfn.0 < self.known.nr_pages() {
                pages.push(pfn);
            }
        });
    }
}

/// Asks for many pages with as few calls as go. Its buffers are taken once.
pub(super) struct Asker {
    pfns: Vec<Pfn>,
    answers: Box<[u64; MAX_TYPES]>,
    /// Calls made.
    pub(super) calls: u64,
    /// Pages asked for.
    pub(super) frames: u64,
}

impl Asker {
    pub(super) fn new() -> Self {
        let pfns = Vec::with_capacity(MAX_TYPES);
        Asker { pfns, answers: Box::new([0; MAX_TYPES]), calls: 0, frames: 0 }
    }

    /// Asks for each of `pfns` and calls `answer` with it and with whether there is a page with data.
    pub(super) fn ask(
        &mut self,
        hypervisor: &dyn Hypervisor,
        domid: DomId,
        pfns: impl Iterator<Item = Pfn>,
        mut answer: impl FnMut(Pfn, bool),
    ) -> Result<(), XenError> {
        let mut pfns = pfns.peekable();
        while pfns.peek().is_some() {
            self.pfns.clear();
            self.pfns.extend(pfns.by_ref().take(MAX_TYPES));
            let answers = &mut self.answers[..self.pfns.len()];
            for (place, pfn) in answers.iter_mut().zip(&self.pfns) {
                *place = pfn.0;
            }
            self.calls += 1;
            self.frames += self.pfns.len() as u64;
            hypervisor.page_types(domid, answers)?;
            for (pfn, kind) in self.pfns.iter().zip(answers) {
                answer(*pfn, is_ram(*kind));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_rank_of_a_page_is_the_number_of_those_in_front_of_it(mask: ChunkMask, at in 0usize..512) {
            let before = (0..at).filter(|page| contains(&mask, *page)).count();
            prop_assert_eq!(rank(&mask, at), before);
            prop_assert_eq!(rank(&mask, 511) + usize::from(contains(&mask, 511)), count(&mask));
        }
    }

    proptest! {
        #[test]
        fn what_is_not_known_of_a_chunk_is_the_rest_of_it(
            nr_pfns in 513u64..1100,
            known in prop::collection::btree_set(0u64..1100, 0..600),
        ) {
            let mut population = Population::new(nr_pfns);
            for pfn in known.range(..nr_pfns) {
                population.note(Pfn(*pfn), true);
            }
            for chunk in 0..population.known().nr_chunks() {
                let rest = population.chunk_pages(chunk).filter(|pfn| !known.contains(&pfn.0));
                let mut listed = Vec::new();
                population.list_unknown(chunk, &mut listed);
                prop_assert_eq!(listed, rest.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn an_answer_is_a_change_only_if_it_was_not_known() {
        let mut population = Population::new(600);
        assert_eq!(population.note(Pfn(5), false), Change::None);
        assert_eq!(population.note(Pfn(5), true), Change::Came);
        assert_eq!(population.note(Pfn(5), true), Change::None);
        assert_eq!(population.note(Pfn(5), false), Change::Went);
        assert_eq!(
            population.chunk_pages(1).map(|pfn| pfn.0).collect::<Vec<_>>(),
            (512..600).collect::<Vec<_>>()
        );
    }

    #[test]
    fn what_the_log_missed_is_told_once() {
        let mut population = Population::new(600);
        population.note(Pfn(512), true);
        population.note(Pfn(599), true);
        population.note(Pfn(7), true);
        population.note_let_go(1);
        population.note_young(0);
        population.begin_sample();
        population.trust_aging();
        population.mark_doubtful_unlogged();
        population.mark_unlogged(Pfn(3));
        let mut dirty = PageSet::empty(600);
        population.take_unlogged(&mut dirty);
        assert_eq!(dirty.iter().map(|pfn| pfn.0).collect::<Vec<_>>(), [3, 512, 599]);
        dirty.clear();
        population.mark_doubtful_unlogged();
        population.take_unlogged(&mut dirty);
        assert!(dirty.is_empty());
        population.begin_sample();
        population.note_young(0);
        population.trust_aging();
        population.mark_doubtful_unlogged();
        population.take_unlogged(&mut dirty);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [Pfn(7)], "mapped in the middle of a sample");
    }

    #[test]
    fn a_page_missed_is_of_interest_until_it_is_known() {
        let mut population = Population::new(600);
        population.note_missed(Pfn(9));
        population.note_missed(Pfn(10));
        population.note(Pfn(9), true);
        assert_eq!(population.missed(), [Pfn(10)]);
    }
}
