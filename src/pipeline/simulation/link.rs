//! The simulated link of a lane, and what becomes of the records behind it.

use std::sync::Arc;
use std::time::Duration;

use crate::guest::arena::rng::Rng;
use crate::pipeline::batch::FilledSlot;
use crate::pipeline::lanes::Wire;
use crate::pipeline::ring::{Consumer, PopError, Producer};
use crate::pipeline::shared::{Shared, Step};
use crate::pipeline::slots::{Slot, give_back};
use crate::stream::records::PageKind;
use crate::stream::{DomainHeader, GuestType, Limits, Record, StreamReader, end, stream_head};

/// A lane's link: it takes a record when the one before is through, and gives slots back some time later, in any order.
pub struct Link {
    /// From the mapper.
    pub filled: Consumer<FilledSlot>,
    /// To the mapper.
    pub free: Producer<Slot>,
    /// The lane's number.
    pub lane: usize,
    /// What it carries in a second.
    pub pages_per_s: f64,
    /// Records that go through until it breaks.
    pub records_left: u64,
    /// When the record on it is through.
    pub busy_until: Duration,
    /// Slots of records that went through, not given back yet.
    pub unnoticed: Vec<FilledSlot>,
}

impl Link {
    /// Takes a record onto the link, if there is one and the last is through; appends it to `received`.
    pub fn step(
        &mut self,
        now: Duration,
        shared: &Arc<Shared>,
        random: &mut Rng,
        received: &mut Vec<u8>,
    ) -> Step {
        self.notice(random);
        if now < self.busy_until {
            return Step::Wait(Duration::MAX);
        }
        let slot = match self.filled.pop() {
            Ok(slot) => slot,
            Err(PopError::Empty) => return Step::Wait(Duration::MAX),
            Err(PopError::Closed) => {
                while !self.unnoticed.is_empty() {
                    self.notice(random);
                }
                return Step::Done;
            }
        };
        let Some(left) = self.records_left.checked_sub(1) else {
            shared.abort();
            return Step::Done;
        };
        self.records_left = left;
        received.extend_from_slice(slot.bytes());
        let (entries, data_pages) = (slot.payload().entries, slot.payload().data_pages);
        shared.lanes[self.lane].note_sent(entries.into(), data_pages.into(), slot.bytes().len() as u64);
        self.busy_until = now + Duration::from_secs_f64(f64::from(data_pages) / self.pages_per_s);
        self.unnoticed.push(slot);
        Step::Worked
    }

    /// Gives some slot back, or none.
    fn notice(&mut self, random: &mut Rng) {
        if !self.unnoticed.is_empty() && random.below(3) == 0 {
            let slot = self.unnoticed.swap_remove(random.below(self.unnoticed.len() as u64) as usize);
            give_back(&mut self.free, slot);
        }
    }
}

/// What the receiver holds of each page when all records have been applied in their order; None where it has no page.
pub fn apply(records: &[u8], wire: Wire, nr_pages: u64) -> Vec<Option<u64>> {
    let domain = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };
    let stream = [&stream_head(&domain)[..], records, &end()].concat();
    let mut reader = StreamReader::open(&stream[..], Limits::new(nr_pages)).unwrap();
    let mut held = vec![None; nr_pages as usize];
    loop {
        match reader.next_record().unwrap() {
            Record::PageData => {}
            Record::End => return held,
            _ => continue,
        }
        for (entry, page) in reader.read_copies() {
            let place = &mut held[entry.pfn.index()];
            if let Some(page) = page {
                *place = Some(u64::from_le_bytes(page[..8].try_into().unwrap()));
            } else if entry.kind == PageKind::Alloc {
                // To a stock receiver a page that is there already stays as it is.
                *place = if wire == Wire::Pagecast { Some(0) } else { place.or(Some(0)) };
            }
        }
    }
}
