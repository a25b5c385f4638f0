//! Models of a page's way from the guest to the destination: the guest writes, the scanner samples and hands out, the mapper
//! copies, all at once. Engine, dealer, ring, mapper and slots are the real ones; the hypervisor is a few lines.
//!
//! A write and its dirty bit are one step for the clearing of the log, as they are on real machines: either the bit is there
//! when the log is cleared, or the page was protected again before the store and the store faults once more. The copying
//! does not wait for anything: it may see a page before, between or after writes.
//!
//! The counters of the pipeline's progress are std's and no part of the model; nothing here waits for them.

use std::ops::Range;
use std::sync::Arc as StdArc;
use std::time::Duration;

use loom::sync::Mutex;
use loom::thread;

use super::batch::{Batch, FilledSlot};
use super::dealer::Dealer;
use super::lanes::{Wire, slot_bytes};
use super::mapper::{Links, MapMode, Mapper, Way};
use super::ring::{Consumer, PopError, Producer, ring};
use super::shared::Shared;
use super::slots::{Slot, SlotPool};
use super::sync::{Arc, AtomicUsize, Ordering, UnsafeCell, yield_now};
use crate::forecast::{Config, Engine, Link, OnNoConvergence, Peek, PolicyKind, Sample};
use crate::guest::{DirtyLog, GuestError, PageContent, PageSource};
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::stream::{DomainHeader, GuestType, Limits, StreamReader, end, stream_head};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::slot_memory::SlotMemory;

/// Pages of the guest: the first of two chunks.
const PAGES: [Pfn; 2] = [Pfn(0), Pfn(CHUNK_PAGES as u64)];
const NR_PAGES: u64 = 2 * CHUNK_PAGES as u64;

/// What a page holds before the guest has written it, and when it is not there.
const FRESH: usize = 1;
const NOT_THERE: usize = 0;

/// The guest's memory and the log that the hypervisor keeps of it.
struct Machine {
    versions: [AtomicUsize; 2],
    /// Pages written since the log was cleared, a bit each.
    dirty: Mutex<usize>,
}

impl Machine {
    fn new(versions: [usize; 2]) -> Arc<Self> {
        Arc::new(Machine { versions: versions.map(AtomicUsize::new), dirty: Mutex::new(0) })
    }

    fn write(&self, page: usize, version: usize) {
        let mut dirty = self.dirty.lock().unwrap();
        self.versions[page].store(version, Ordering::Relaxed);
        *dirty |= 1 << page;
    }
}

struct Log(Arc<Machine>);

impl DirtyLog for Log {
    fn get_and_clear(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        let bits = std::mem::take(&mut *self.0.dirty.lock().unwrap());
        for page in PAGES.into_iter().filter(|page| bits >> page.chunk() & 1 == 1) {
            dirty.insert(page);
        }
        Ok(())
    }

    fn peek(&mut self, _: Range<u64>, _: &mut PageSet) -> Result<(), GuestError> {
        Ok(())
    }
}

impl Peek for Log {
    fn peek(&mut self, _: Pfn, _: u64, _: &mut PageSet) {}
}

struct Pages(Arc<Machine>);

impl PageSource for Pages {
    fn copy(&mut self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) -> PageContent {
        let version = self.0.versions[pfn.chunk()].load(Ordering::Relaxed);
        if version == NOT_THERE {
            return PageContent::Absent;
        }
        into.fill(0);
        into[0] = version as u8;
        PageContent::Data
    }

    fn inspect(&mut self, _: Pfn) -> PageContent {
        unreachable!("pages are copied")
    }

    fn prefetch(&self, _: Pfn) {}

    fn sendable(&self) -> Option<StdArc<GuestMemory>> {
        None
    }
}

/// The scanner's side, without its clock.
struct Scanner {
    log: Log,
    engine: Engine,
    dealer: Dealer,
    samples: u64,
    shared: StdArc<Shared>,
}

impl Scanner {
    fn new(machine: &Arc<Machine>, lanes: Vec<Producer<Batch>>, shared: &StdArc<Shared>) -> Self {
        let mut populated = PageSet::empty(NR_PAGES);
        for page in PAGES {
            populated.insert(page);
        }
        let config = Config {
            nr_pages: NR_PAGES,
            pages: PAGES.len() as u64,
            downtime_budget: Duration::from_millis(300),
            sample_interval: Duration::from_millis(50),
            max_time: Duration::from_secs(1),
            fixed_downtime: Duration::ZERO,
            on_no_convergence: OnNoConvergence::Stop,
            linger: 0.0,
        };
        Scanner {
            log: Log(machine.clone()),
            engine: Engine::sparse(PolicyKind::Heat, config, populated),
            dealer: Dealer::new(lanes, None),
            samples: 0,
            shared: shared.clone(),
        }
    }

    fn sample(&mut self) {
        let mut dirty = PageSet::empty(NR_PAGES);
        self.log.get_and_clear(&mut dirty).unwrap();
        self.samples += 1;
        let at = Duration::from_millis(50) * self.samples as u32;
        self.engine.on_sample(&Sample { at, dirty: &dirty });
    }

    /// Hands out one page, if any is pending and the mapper is there.
    fn hand_out(&mut self) {
        let link = Link { pages_per_s: 1e5, in_flight: 0, sent: 0 };
        let mut chosen = Vec::new();
        let now = Duration::from_millis(50) * self.samples as u32;
        self.engine.next_batch(now, 1, &link, &mut self.log, &mut chosen);
        if self.dealer.deal(&chosen).is_err() {
            assert!(self.shared.is_aborted(), "a mapper goes early only after an abort");
        }
    }

    /// The guest stands still: hands out all that is left.
    fn finish(mut self) {
        self.sample();
        assert!(self.deal_last());
    }

    /// Hands out all that is left; false if that was cut short by an abort.
    fn deal_last(&mut self) -> bool {
        self.dealer.begin_last(self.engine.take_pending());
        while !self.shared.is_aborted() {
            match self.dealer.deal_last() {
                Ok(true) => return true,
                Ok(false) => yield_now(),
                Err(_) => self.shared.abort(),
            }
        }
        false
    }
}

/// What a sender holds: what comes out of the mapper, and the way back for slots, which nobody goes here.
struct SenderEnds {
    filled: Consumer<FilledSlot>,
    _free: Producer<Slot>,
}

/// A mapper of the only lane, and where what it has filled comes out. It has slots for as many batches as there can be.
fn mapper(
    machine: &Arc<Machine>,
    slots: usize,
    batches: Consumer<Batch>,
    shared: &StdArc<Shared>,
) -> (Mapper, SenderEnds) {
    let memory = SlotMemory::new(slots * slot_bytes()).unwrap();
    let (_, all) = SlotPool::new(memory, slot_bytes()).unwrap();
    let (mut free_in, free) = ring(slots);
    all.into_iter().for_each(|slot| assert!(free_in.push(slot).is_ok()));
    let (filled, filled_out) = ring(slots);
    let (zero_notes, _) = ring(1);
    let links = Links { batches, free, filled, zero_notes };
    let way = Way { lane: 0, mode: MapMode::Stage, wire: Wire::Standard };
    let source = Box::new(Pages(machine.clone()));
    let mapper = Mapper::new(source, way, links, shared.clone(), NR_PAGES);
    (mapper, SenderEnds { filled: filled_out, _free: free_in })
}

/// The stages of one lane over a guest whose pages hold `versions`, with room for so many batches and as many slots.
fn one_lane(
    versions: [usize; 2],
    room: usize,
) -> (Arc<Machine>, StdArc<Shared>, Scanner, Mapper, SenderEnds) {
    let machine = Machine::new(versions);
    let shared = StdArc::new(Shared::new(1, false));
    let (to_lane, batches) = ring(room);
    let (mapper, ends) = mapper(&machine, room, batches, &shared);
    let scanner = Scanner::new(&machine, vec![to_lane], &shared);
    (machine, shared, scanner, mapper, ends)
}

/// What the destination holds of each page after the records have been applied in their order.
fn received(records: &[u8], into: &mut [usize; 2]) {
    let domain = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };
    let stream = [&stream_head(&domain)[..], records, &end()].concat();
    let mut reader = StreamReader::open(&stream[..], Limits::new(NR_PAGES)).unwrap();
    while let Ok(record) = reader.next_record() {
        match record {
            crate::stream::Record::PageData => {
                for (entry, page) in reader.read_copies() {
                    into[entry.pfn.chunk()] = page.map_or(NOT_THERE, |page| usize::from(page[0]));
                }
            }
            crate::stream::Record::End => break,
            _ => {}
        }
    }
}

/// Applies what comes out of a lane until it is closed.
fn apply(mut ends: SenderEnds, mut each: impl FnMut(&[u8])) {
    loop {
        match ends.filled.pop() {
            Ok(slot) => each(slot.bytes()),
            Err(PopError::Empty) => yield_now(),
            Err(PopError::Closed) => return,
        }
    }
}

/// Two pages, a write to each at any time while the first is handed out, a sample is taken and the second is handed out.
/// Invariants (clear before read; nothing is forgotten): whatever the order, the destination holds what the guest held when
/// it stopped.
#[test]
fn loom_pages_a_write_at_any_time_reaches_the_destination() {
    loom::model(|| {
        let (machine, _, mut scanner, mapper, ends) = one_lane([FRESH; 2], 4);
        let of_guest = machine.clone();
        let guest = thread::spawn(move || {
            of_guest.write(0, 2);
            of_guest.write(1, 3);
        });
        let mapping = thread::spawn(move || drop(mapper.run()));
        scanner.hand_out();
        scanner.sample();
        scanner.hand_out();
        guest.join().unwrap();
        scanner.finish();
        mapping.join().unwrap();
        let mut destination = [NOT_THERE; 2];
        apply(ends, |record| received(record, &mut destination));
        assert_eq!(destination, [2, 3], "the destination has an old page");
    });
}

/// A page that is not there when it is read first, and comes without the log saying so, as on releases of Xen whose log misses
/// changes of the p2m. Invariant: it is looked for again when the guest stands still.
#[test]
fn loom_pages_a_page_that_was_not_there_is_looked_for_again() {
    loom::model(|| {
        let (machine, _, mut scanner, mapper, ends) = one_lane([NOT_THERE, FRESH], 4);
        let of_guest = machine.clone();
        let guest = thread::spawn(move || of_guest.versions[0].store(4, Ordering::Relaxed));
        let mapping = thread::spawn(move || drop(mapper.run()));
        scanner.hand_out();
        guest.join().unwrap();
        scanner.finish();
        mapping.join().unwrap();
        let mut destination = [NOT_THERE; 2];
        apply(ends, |record| received(record, &mut destination));
        assert_eq!(destination, [4, FRESH]);
    });
}

/// Two lanes whose receivers are as fast or slow as they like, and a page that is sent twice. Invariant: both copies take the
/// same lane, so the older one is never applied last.
#[test]
fn loom_pages_an_older_copy_never_overtakes_a_newer_one() {
    // Two receivers that poll take loom past its limit with more than one forced switch.
    let mut one_switch = loom::model::Builder::new();
    one_switch.preemption_bound = Some(1);
    one_switch.check(|| {
        let machine = Machine::new([FRESH; 2]);
        let shared = StdArc::new(Shared::new(2, false));
        let (to_lanes, ends): (Vec<_>, Vec<_>) = (0..2).map(|_| ring::<Batch>(4)).unzip();
        let mut scanner = Scanner::new(&machine, to_lanes, &shared);
        // The page of the second lane is sent, written, and sent again.
        scanner.hand_out();
        scanner.hand_out();
        machine.write(1, 2);
        let destination = Arc::new([AtomicUsize::new(NOT_THERE), AtomicUsize::new(NOT_THERE)]);
        // What a batch carries is decided by its place: the first copy of page 1 was read before the write.
        let lanes = ends.into_iter().map(|mut batches| {
            let destination = destination.clone();
            thread::spawn(move || {
                let mut copies = [FRESH, FRESH];
                loop {
                    match batches.pop() {
                        Ok(batch) => {
                            for pfn in batch.pages() {
                                let old = destination[pfn.chunk()].load(Ordering::Relaxed);
                                let version = if old == NOT_THERE { copies[pfn.chunk()] } else { 2 };
                                copies[pfn.chunk()] = 2;
                                destination[pfn.chunk()].store(version, Ordering::Relaxed);
                            }
                        }
                        Err(PopError::Empty) => yield_now(),
                        Err(PopError::Closed) => return,
                    }
                }
            })
        });
        let lanes: Vec<_> = lanes.collect();
        scanner.finish();
        lanes.into_iter().for_each(|lane| lane.join().unwrap());
        let held: Vec<usize> = destination.iter().map(|page| page.load(Ordering::Relaxed)).collect();
        assert_eq!(held, [FRESH, 2], "the older copy was applied last");
    });
}

/// Two senders end, and control, which waits for both, writes the end of the stream behind what they wrote. Invariant: whoever is
/// told that all is sent sees each lane's last byte.
#[test]
fn loom_pages_the_end_of_the_stream_comes_after_each_lanes_last_page() {
    loom::model(|| {
        let shared = StdArc::new(Shared::new(2, false));
        let sockets: [_; 2] = std::array::from_fn(|_| Arc::new(UnsafeCell::new(0)));
        let senders: Vec<_> = (0..2)
            .map(|lane| {
                let (shared, socket) = (shared.clone(), sockets[lane].clone());
                thread::spawn(move || {
                    // SAFETY: nobody else comes here before the lane says that it has sent all.
                    socket.with_mut(|last| unsafe { *last = 1 });
                    shared.lanes[lane].note_all_sent();
                })
            })
            .collect();
        while !shared.all_sent() {
            yield_now();
        }
        for socket in &sockets {
            // SAFETY: the lanes have sent all, and write no more.
            assert_eq!(socket.with(|last| unsafe { *last }), 1);
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

/// An abort at any moment, with a ring that is full and a mapper that has no slot. Invariant: every stage ends.
#[test]
fn loom_pages_an_abort_ends_every_stage_wherever_it_is() {
    loom::model(|| {
        // One slot, which nobody gives back.
        let (_, shared, mut scanner, mapper, ends) = one_lane([FRESH; 2], 1);
        let aborting = shared.clone();
        let control = thread::spawn(move || aborting.abort());
        let mapping = thread::spawn(move || drop(mapper.run()));
        scanner.hand_out();
        let all_dealt = scanner.deal_last();
        drop(scanner);
        control.join().unwrap();
        mapping.join().unwrap();
        assert!(all_dealt || shared.is_aborted());
        drop(ends);
    });
}
