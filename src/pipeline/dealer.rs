//! Deals approved pages to the lanes in batches.
//!
//! A page goes to the lane of its 2 MiB chunk for the whole migration, so that an older copy of it can never overtake a
//! newer one, and a chunk's first batch, where that matters, opens the chunk. What finds no room in a lane's ring waits here,
//! in order.

use std::collections::VecDeque;

use super::batch::{BATCH_PAGES, Batch, Chunk};
use super::openings::Openings;
use super::ring::{Producer, PushError};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// What is in the way of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// A mapper is behind.
    Full,
    /// A mapper is gone.
    Closed,
}

/// The scanner's ends of all lanes.
pub struct Dealer {
    lanes: Vec<Producer<Batch>>,
    openings: Option<Openings>,
    /// Batches that have found no room yet.
    outbox: VecDeque<(usize, Batch)>,
    last: Option<Last>,
}

/// The last pages, as far as they are not dealt yet.
struct Last {
    pages: PageSet,
    next_chunk: usize,
    /// A batch for each lane, not full yet.
    open: Vec<Batch>,
}

impl Dealer {
    /// Deals to these lanes. With `openings` the first batch of each chunk opens it.
    pub fn new(lanes: Vec<Producer<Batch>>, openings: Option<Openings>) -> Self {
        let outbox = VecDeque::with_capacity(BATCH_PAGES + lanes.len());
        Dealer { lanes, openings, outbox, last: None }
    }

    /// Passes on what waits; says what is in the way if not all of it goes, or if not one batch more would.
    pub fn make_room(&mut self) -> Result<(), Obstacle> {
        if self.lanes.iter().any(Producer::is_closed) {
            return Err(Obstacle::Closed);
        }
        self.empty_outbox()?;
        if self.lanes.iter().any(|lane| lane.free() == 0) { Err(Obstacle::Full) } else { Ok(()) }
    }

    /// Deals at most [`BATCH_PAGES`] pages, ascending: at most one batch to each lane, and one for each chunk that is opened.
    pub fn deal(&mut self, pages: &[Pfn]) -> Result<(), Obstacle> {
        let nr_lanes = self.lanes.len();
        for lane in 0..nr_lanes {
            let mut batch = Batch::new();
            let mut opening: Option<Batch> = None;
            for pfn in pages.iter().filter(|pfn| pfn.lane(nr_lanes) == lane) {
                let chunk = pfn.chunk();
                if opening.as_ref().and_then(Batch::opens).is_none_or(|opened| opened.number != chunk) {
                    self.outbox.extend(opening.take().map(|batch| (lane, batch)));
                    opening = self.open(chunk);
                }
                opening.as_mut().unwrap_or(&mut batch).push(*pfn);
            }
            self.outbox.extend(opening.map(|batch| (lane, batch)));
            if !batch.is_empty() {
                self.outbox.push_back((lane, batch));
            }
        }
        match self.empty_outbox() {
            Err(Obstacle::Full) => Ok(()),
            other => other,
        }
    }

    /// Begins to deal `pages`, the last there are.
    pub fn begin_last(&mut self, pages: PageSet) {
        self.last = Some(Last { pages, next_chunk: 0, open: vec![Batch::new(); self.lanes.len()] });
    }

    /// Deals the last pages as far as there is room for them; whether all are dealt.
    pub fn deal_last(&mut self) -> Result<bool, Obstacle> {
        loop {
            match self.empty_outbox() {
                Ok(()) => {}
                Err(Obstacle::Full) => return Ok(false),
                Err(Obstacle::Closed) => return Err(Obstacle::Closed),
            }
            let Some(mut last) = self.last.take() else { return Ok(true) };
            while last.next_chunk < last.pages.nr_chunks() && last.pages.chunk_len(last.next_chunk) == 0 {
                last.next_chunk += 1;
            }
            if last.next_chunk < last.pages.nr_chunks() {
                self.deal_chunk(&mut last);
                self.last = Some(last);
            } else {
                let open = last.open.into_iter().enumerate();
                self.outbox.extend(open.filter(|(_, batch)| !batch.is_empty()));
            }
        }
    }

    /// Puts the next chunk of the last pages into batches.
    fn deal_chunk(&mut self, last: &mut Last) {
        let chunk = last.next_chunk;
        last.next_chunk += 1;
        let nr_lanes = self.lanes.len();
        let lane = Pfn::first_of(chunk).lane(nr_lanes);
        let mut pages = last.pages.pages_of_chunk(chunk);
        if let Some(mut batch) = self.open(chunk) {
            pages.by_ref().take(BATCH_PAGES).for_each(|pfn| batch.push(pfn));
            self.outbox.push_back((lane, batch));
        }
        for pfn in pages {
            last.open[lane].push(pfn);
            if last.open[lane].is_full() {
                self.outbox.push_back((lane, std::mem::take(&mut last.open[lane])));
            }
        }
    }

    fn open(&mut self, chunk: usize) -> Option<Batch> {
        let words = self.openings.as_mut()?.open(chunk)?;
        Some(Batch::opening(Chunk { number: chunk, words }))
    }

    fn empty_outbox(&mut self) -> Result<(), Obstacle> {
        while let Some((lane, batch)) = self.outbox.pop_front() {
            match self.lanes[lane].push(batch) {
                Ok(()) => {}
                Err(PushError::Full(batch)) => {
                    self.outbox.push_front((lane, batch));
                    return Err(Obstacle::Full);
                }
                Err(PushError::Closed(_)) => return Err(Obstacle::Closed),
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pipeline::ring::{Consumer, ring};

    fn batches(lane: &mut Consumer<Batch>) -> Vec<(Option<usize>, Vec<u64>)> {
        let pages = |batch: &Batch| batch.pages().iter().map(|pfn| pfn.0).collect();
        std::iter::from_fn(|| lane.pop().ok())
            .map(|batch| (batch.opens().map(|chunk| chunk.number), pages(&batch)))
            .collect()
    }

    #[test]
    fn a_chunk_is_opened_by_a_batch_of_its_own_and_once() {
        let (to_lane, mut lane) = ring(8);
        let openings = Openings::new(PageSet::full(4 * 512));
        let mut dealer = Dealer::new(vec![to_lane], Some(openings));
        dealer.deal(&[1, 2, 600, 1024, 1030].map(Pfn)).unwrap();
        assert_eq!(
            batches(&mut lane),
            [(Some(0), vec![1, 2]), (Some(1), vec![600]), (Some(2), vec![1024, 1030])]
        );
        dealer.deal(&[0, 601, 2047].map(Pfn)).unwrap();
        assert_eq!(batches(&mut lane), [(Some(3), vec![2047]), (None, vec![0, 601])]);
    }

    #[test]
    fn what_finds_no_room_waits_and_keeps_its_order() {
        let (to_lane, mut lane) = ring(1);
        let mut dealer = Dealer::new(vec![to_lane], Some(Openings::new(PageSet::full(4 * 512))));
        dealer.deal(&[1, 600, 1100].map(Pfn)).unwrap();
        assert_eq!(dealer.make_room(), Err(Obstacle::Full));
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.extend(batches(&mut lane).into_iter().flat_map(|(_, pages)| pages));
            let _ = dealer.make_room();
        }
        assert_eq!(seen, [1, 600, 1100]);
        drop(lane);
        assert_eq!(dealer.make_room(), Err(Obstacle::Closed));
        assert_eq!(dealer.deal(&[Pfn(2)]), Err(Obstacle::Closed));
    }

    #[test]
    fn the_last_set_reaches_every_lane_whole_and_ascending() {
        let (to_lanes, mut lanes): (Vec<_>, Vec<_>) = (0..2).map(|_| ring(64)).unzip();
        let mut last = PageSet::empty(4 * 512);
        last.insert_run(Pfn(100), 1000);
        let mut dealer = Dealer::new(to_lanes, Some(Openings::new(PageSet::full(4 * 512))));
        dealer.begin_last(last);
        assert_eq!(dealer.deal_last(), Ok(true));
        let mut all: Vec<u64> = Vec::new();
        for (lane, ring) in lanes.iter_mut().enumerate() {
            for (opens, pages) in batches(ring) {
                assert!(
                    pages
                        .iter()
                        .all(|pfn| Pfn(*pfn).lane(2) == lane && opens.is_none_or(|c| Pfn(*pfn).chunk() == c))
                );
                assert!(pages.is_sorted() && pages.len() <= BATCH_PAGES);
                all.extend(pages);
            }
        }
        all.sort_unstable();
        assert!(all.into_iter().eq(100..1100));
    }
}
