//! The order in which the 2 MiB chunks of a trace are numbered. A recorder numbers them as it first sees them, which says
//! something about the future that no guest tells; a shuffled replay tells how much of a result is owed to that.

use std::fmt;
use std::str::FromStr;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::format::{Run, Trace, runs_of};
use crate::page::{CHUNK_PAGES, Pfn};

/// How the chunks are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// As in the file.
    Recorded,
    /// At random: the same seed, the same order.
    Shuffled(u64),
}

impl Order {
    /// The seed, if chunks are shuffled.
    pub fn seed(self) -> Option<u64> {
        match self {
            Order::Recorded => None,
            Order::Shuffled(seed) => Some(seed),
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Recorded => f.pad("none"),
            Order::Shuffled(seed) => f.pad(&seed.to_string()),
        }
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Order::Recorded),
            _ => text.parse().map(Order::Shuffled).map_err(|_| {
                format!("{text:?} is no seed; write a whole number, or none for the order in the file")
            }),
        }
    }
}

/// A renumbering of the chunks, and the way back.
#[derive(Clone, Debug)]
pub struct Shuffle {
    /// The chunk of the file that each chunk of the replay is.
    recorded_at: Vec<usize>,
}

impl Shuffle {
    /// The numbering of `nr_chunks` chunks by `order`.
    pub fn new(order: Order, nr_chunks: usize) -> Self {
        let mut recorded_at: Vec<usize> = (0..nr_chunks).collect();
        if let Order::Shuffled(seed) = order {
            recorded_at.sort_by_cached_key(|chunk| {
                (xxh3_64_with_seed(&(*chunk as u64).to_le_bytes(), seed), *chunk)
            });
        }
        Shuffle { recorded_at }
    }

    /// The trace with its chunks renumbered.
    pub fn apply(&self, trace: &Trace) -> Trace {
        let mut place_of = vec![0; self.recorded_at.len()];
        for (place, recorded) in self.recorded_at.iter().enumerate() {
            place_of[*recorded] = place;
        }
        trace.with_chunks_renamed(|recorded| place_of[recorded])
    }

    /// The pages by their ids in the file, as ascending runs.
    pub fn recorded(&self, pages: &[Pfn]) -> Vec<Run> {
        let recorded = |pfn: &Pfn| (self.recorded_at[pfn.chunk()] * CHUNK_PAGES + pfn.in_chunk()) as u32;
        let mut pages: Vec<u32> = pages.iter().map(recorded).collect();
        pages.sort_unstable();
        runs_of(pages).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_order_and_it_can_be_undone() {
        let (one, again) = (Shuffle::new(Order::Shuffled(1), 300), Shuffle::new(Order::Shuffled(1), 300));
        assert_eq!(one.recorded_at, again.recorded_at);
        assert_ne!(one.recorded_at, Shuffle::new(Order::Shuffled(2), 300).recorded_at);
        let mut sorted = one.recorded_at.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..300).collect::<Vec<_>>());
        let kept = sorted.iter().zip(&one.recorded_at).filter(|(chunk, place)| chunk == place).count();
        assert!(kept < 10, "{kept} of 300 chunks stay in their place");
    }

    #[test]
    fn pages_go_back_to_the_ids_of_the_file() {
        let va_chunks: Vec<u64> = (0..9).collect();
        let dirty: Vec<u32> = vec![0, 1, 511, 512, 2000, 4607];
        let rounds = [(0, runs_of(dirty.clone()).collect::<Vec<_>>())];
        let trace = Trace::from_rounds("test", 50_000, va_chunks, rounds.into_iter());
        let shuffle = Shuffle::new(Order::Shuffled(7), 9);
        let shuffled = shuffle.apply(&trace);
        let pages: Vec<Pfn> = shuffled
            .runs(0)
            .iter()
            .flat_map(|run| run.first..run.first + run.count)
            .map(|page| Pfn(page.into()))
            .collect();
        assert_ne!(pages, dirty.iter().map(|page| Pfn((*page).into())).collect::<Vec<_>>());
        assert_eq!(shuffle.recorded(&pages), trace.runs(0));
    }

    #[test]
    fn orders_read_back() {
        for order in [Order::Recorded, Order::Shuffled(17)] {
            assert_eq!(order.to_string().parse(), Ok(order));
        }
        assert!("x".parse::<Order>().unwrap_err().contains("none"));
    }
}
