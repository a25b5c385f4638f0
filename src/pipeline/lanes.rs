//! The threads of a migration: a mapper and a sender for each lane, and the scanner that feeds them all.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender as OrderSender, channel};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::batch::{BATCH_PAGES, FilledSlot};
use super::cadence::Cadence;
use super::clock::Clock;
use super::mapper::{self, MapMode, Mapper, MapperReport};
use super::openings::Openings;
use super::outcome::{MigrationError, Phase};
use super::outlet::Outlet;
use super::ring::{Consumer, Producer, ring};
use super::scanner::{self, Event, Order, Scanner, ScannerReport};
use super::sender::{SendError, Sender, SenderReport, SenderSetup};
use super::settings::{SendMode, Settings, SlotPages};
use super::shared::Shared;
use super::slots::{Slot, SlotPool};
use super::writer::{Writer, WriterSetup};
use crate::forecast::{Config, Engine};
use crate::guest::{GuestControl, PageSource};
use crate::page::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::stream::HEADER_ROOM;
use crate::sys::slot_memory::{Backing, SlotMemory};
use crate::sys::{cpu, uring};

/// Batches that wait for a mapper at most.
pub const BATCH_RING: usize = 16;

/// Batches of zero pages that wait for the scanner at most.
const ZERO_NOTES: usize = 256;

/// The part of the downtime budget that is not for pages: suspend, the last sample, the hand-over. A quarter of budgets too
/// small for that.
const FIXED_DOWNTIME: Duration = Duration::from_millis(30);

/// What the other end understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// It is pagecast: a page allocated without data is a page of zeroes.
    Pagecast,
    /// Any receiver of the migration stream. Zeroes are sent; in front of a chunk's first pages all of its pages are
    /// allocated, so that a receiver can build a superpage (Xen 4.21 and later do).
    Standard,
}

/// Control's line to the scanner.
pub struct Line {
    /// What it is to do.
    pub order: OrderSender<Order>,
    /// What it has to say.
    pub events: Receiver<Event>,
}

/// A started sender, and the ring ends that its mapper will have.
struct Lane {
    sender: JoinHandle<Result<SenderReport, SendError>>,
    mapper: Option<MapperParts>,
    mapping: Option<JoinHandle<MapperReport>>,
}

impl Lane {
    /// Those that run.
    fn threads(&self) -> impl Iterator<Item = Thread> {
        let mapper = self.mapping.as_ref().map(|mapper| mapper.thread().clone());
        mapper.into_iter().chain([self.sender.thread().clone()])
    }
}

struct MapperParts {
    source: Box<dyn PageSource>,
    free: Consumer<Slot>,
    filled: Producer<FilledSlot>,
}

/// All threads of a migration.
pub struct Lanes {
    lanes: Vec<Lane>,
    scanner: Option<JoinHandle<ScannerReport>>,
    /// What the threads share.
    pub shared: Arc<Shared>,
    /// How pages come into records.
    pub mode: MapMode,
    /// How pages get onto the wire, in a word.
    pub send: &'static str,
    /// What the slots are made of.
    pub backing: Backing,
    wire: Wire,
    outlets: Vec<Outlet>,
}

/// What the threads in front of the senders leave behind.
pub struct FeederReports {
    /// The scanner's report, if it was started.
    pub scanner: Option<ScannerReport>,
    /// The mappers' reports.
    pub mappers: Vec<MapperReport>,
}

impl Lanes {
    /// Sets buffers up and starts a sender for each of `outlets`, which registers them: that takes time and is not part of
    /// the migration.
    pub fn start<G: GuestControl + ?Sized>(
        guest: &mut G,
        settings: &Settings,
        outlets: &[Outlet],
        wire: Wire,
    ) -> Result<Self, MigrationError> {
        let shared = Arc::new(Shared::new(outlets.len(), settings.spin));
        let sendable = guest.page_source().sendable().filter(|_| wire == Wire::Pagecast);
        let over_sockets = outlets.iter().all(|outlet| matches!(outlet, Outlet::Socket(_)));
        let (mode, zero_copy, send) = if over_sockets {
            choose(settings.send, sendable.is_some())?
        } else {
            (MapMode::Stage, false, "writev")
        };
        let mut lanes = Vec::with_capacity(outlets.len());
        let mut backing = Backing::Small;
        for (index, outlet) in outlets.iter().enumerate() {
            let small = match settings.slot_pages {
                SlotPages::Auto => zero_copy,
                SlotPages::Small => true,
                SlotPages::Huge => false,
            };
            let bytes = settings.slots * slot_bytes();
            let memory = if small { SlotMemory::small(bytes) } else { SlotMemory::new(bytes) }
                .map_err(|error| MigrationError::Setup(error.to_string()))?;
            let (pool, slots) = SlotPool::new(memory, slot_bytes())
                .map_err(|error| MigrationError::Setup(error.to_string()))?;
            backing = pool.backing();
            let bytes_per_s = settings.bandwidth.map(|all| all.div_ceil(outlets.len() as u64));
            let core = settings.pins.send[index % settings.pins.send.len()];
            let ends = Ends::new(slots)?;
            let (free, filled) = (ends.free_out, ends.filled_in);
            let sender = match outlet {
                Outlet::Socket(socket) => {
                    let by_reference = mode == MapMode::Reference;
                    let setup = SenderSetup {
                        socket: socket.clone(),
                        lane: index,
                        pool,
                        guest: sendable.clone().filter(|_| by_reference),
                        zero_copy,
                        fixed_messages: zero_copy && by_reference && uring::takes_fixed_messages(),
                        may_fall_back: settings.send == SendMode::Auto,
                        bytes_per_s,
                    };
                    start_sender(setup, ends.filled_out, ends.free_in, core, shared.clone())?
                }
                Outlet::Stream(stream) => {
                    let setup = WriterSetup { stream: stream.clone(), lane: index, pool, bytes_per_s };
                    let writer = Writer::new(setup, ends.filled_out, ends.free_in, shared.clone());
                    spawn(format!("pc-send{index}"), core, shared.clone(), move || writer.run())?
                }
            };
            let mapper = MapperParts { source: guest.page_source(), free, filled };
            lanes.push(Lane { sender, mapper: Some(mapper), mapping: None });
        }
        let outlets = outlets.to_vec();
        Ok(Lanes { lanes, scanner: None, shared, mode, send, backing, wire, outlets })
    }

    /// Starts mappers and scanner: from here on pages flow, if the guest is `live`; else they wait for the order to send all.
    pub fn flow<G: GuestControl + ?Sized>(
        &mut self,
        guest: &mut G,
        settings: &Settings,
        live: bool,
        started: Instant,
    ) -> Result<Line, MigrationError> {
        let twice = || MigrationError::Setup("the pipeline was started twice".to_owned());
        let (order, orders) = channel();
        let (events_in, events) = channel();
        let prepare = |source| MigrationError::Guest { phase: Phase::Prepare, source };
        let nr_pages = guest.nr_pages();
        let mut batch_ends = Vec::with_capacity(self.lanes.len());
        let mut zero_notes = Vec::with_capacity(self.lanes.len());
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let (producer, batches) = ring(BATCH_RING);
            batch_ends.push(producer);
            let (notes, notes_out) = ring(ZERO_NOTES);
            zero_notes.push(notes_out);
            let parts = lane.mapper.take().ok_or_else(twice)?;
            let links = mapper::Links { batches, free: parts.free, filled: parts.filled, zero_notes: notes };
            let way = mapper::Way { lane: index, mode: self.mode, wire: self.wire };
            let mapper = Mapper::new(parts.source, way, links, self.shared.clone(), nr_pages);
            let core = settings.pins.map[index % settings.pins.map.len()];
            lane.mapping =
                Some(spawn(format!("pc-map{index}"), core, self.shared.clone(), move || mapper.run())?);
        }
        let mut log = guest.take_dirty_log().map_err(prepare)?;
        if live {
            // Arms the log. Every page is pending anyway, so what it says now is of no interest.
            log.get_and_clear(&mut PageSet::empty(nr_pages)).map_err(prepare)?;
        }
        let populated = guest.populated().map_err(prepare)?;
        let openings = (self.wire == Wire::Standard).then(|| Openings::new(populated.clone()));
        let config = Config {
            nr_pages,
            pages: populated.len(),
            downtime_budget: settings.downtime_budget,
            sample_interval: settings.sample_interval,
            max_time: settings.max_time,
            fixed_downtime: FIXED_DOWNTIME.min(settings.downtime_budget / 4),
            on_no_convergence: settings.on_no_convergence,
            linger: settings.linger,
        };
        let engine = Engine::sparse(settings.policy, config, populated);
        let cadence = Cadence {
            live,
            sample_interval: settings.sample_interval,
            share: settings.sample_share,
            bandwidth: settings.bandwidth,
        };
        let outlets = self.outlets.clone();
        let stages = self.lanes.iter().flat_map(Lane::threads).collect();
        let links =
            scanner::Links { lanes: batch_ends, zero_notes, outlets, orders, events: events_in, stages };
        let scanner = {
            let clock = Clock::Real(started);
            Scanner::new(log, engine, openings, links, self.shared.clone(), cadence, clock)
        };
        self.scanner =
            Some(spawn("pc-scan0".to_owned(), settings.pins.scan, self.shared.clone(), move || {
                scanner.run()
            })?);
        Ok(Line { order, events })
    }

    /// Waits for scanner and mappers, which end when the last page is in a slot or the migration is aborted.
    pub fn join_feeders(&mut self) -> FeederReports {
        let scanner = self.scanner.take().map(join);
        let mut mappers = Vec::new();
        for lane in &mut self.lanes {
            // A mapper that never started holds ring ends that its sender waits for.
            drop(lane.mapper.take());
            mappers.extend(lane.mapping.take().map(join));
        }
        FeederReports { scanner, mappers }
    }

    /// Waits for the senders, once the feeders are joined: until the kernel has let go of all that was sent. The first that
    /// broke says what happened.
    pub fn join_senders(&mut self) -> Result<Vec<SenderReport>, SendError> {
        let mut senders = Ok(Vec::new());
        for lane in self.lanes.drain(..) {
            match (join(lane.sender), &mut senders) {
                (Ok(report), Ok(reports)) => reports.push(report),
                (Err(error), Ok(_)) => senders = Err(error),
                (Err(error), Err(SendError::Aborted)) => senders = Err(error),
                (_, Err(_)) => {}
            }
        }
        senders
    }
}

/// Settles how pages get onto the wire, by what was asked for, whether the kernel can send from the guest's memory
/// (`sendable`), and which opcodes it has.
fn choose(wanted: SendMode, sendable: bool) -> Result<(MapMode, bool, &'static str), MigrationError> {
    let setup = |why: String| MigrationError::Setup(why);
    let opcodes = uring::probe_opcodes().map_err(|error| {
        setup(format!("no io_uring: {error}; is it disabled (sysctl kernel.io_uring_disabled, seccomp)?"))
    })?;
    let lacks = |there: bool, name: &str, since: &str| {
        let why = format!("this kernel has no {name} (Linux {since} has); use --send copy");
        if there { Ok(()) } else { Err(setup(why)) }
    };
    lacks(opcodes.send && opcodes.sendmsg, "IORING_OP_SEND and IORING_OP_SENDMSG", "5.6")?;
    let direct = lacks(opcodes.send_zc, "IORING_OP_SEND_ZC", "6.0")
        .and_then(|()| lacks(opcodes.sendmsg_zc, "IORING_OP_SENDMSG_ZC", "6.1"));
    let staged = lacks(opcodes.send_zc, "IORING_OP_SEND_ZC", "6.0");
    let copy = (if sendable { MapMode::Reference } else { MapMode::Stage }, false, "copy");
    match wanted {
        SendMode::Direct if !sendable => {
            Err(setup("the kernel cannot send from this guest's memory; use --send staged".to_owned()))
        }
        SendMode::Direct => direct.map(|()| (MapMode::Reference, true, "direct")),
        SendMode::Staged => staged.map(|()| (MapMode::Stage, true, "staged")),
        SendMode::StagedCopy => Ok((MapMode::Stage, false, "staged-copy")),
        SendMode::Copy => Ok(copy),
        SendMode::Auto if sendable && direct.is_ok() => Ok((MapMode::Reference, true, "direct")),
        SendMode::Auto if !sendable && staged.is_ok() => Ok((MapMode::Stage, true, "staged")),
        SendMode::Auto => Ok(copy),
    }
}

/// Bytes of a slot: the record's head and a batch of pages.
pub fn slot_bytes() -> usize {
    HEADER_ROOM + BATCH_PAGES * PAGE_SIZE
}

/// The ring ends between a mapper and its sender.
struct Ends {
    free_in: Producer<Slot>,
    free_out: Consumer<Slot>,
    filled_in: Producer<FilledSlot>,
    filled_out: Consumer<FilledSlot>,
}

impl Ends {
    /// Rings with room for all of `slots`, which are free.
    fn new(slots: Vec<Slot>) -> Result<Self, MigrationError> {
        let capacity = slots.len().next_power_of_two();
        let (mut free_in, free_out) = ring(capacity);
        let (filled_in, filled_out) = ring(capacity);
        for slot in slots {
            if free_in.push(slot).is_err() {
                return Err(MigrationError::Setup("the ring of free slots is too small".to_owned()));
            }
        }
        Ok(Ends { free_in, free_out, filled_in, filled_out })
    }
}

/// Starts a sender and waits until it is set up.
fn start_sender(
    setup: SenderSetup,
    filled: Consumer<FilledSlot>,
    free: Producer<Slot>,
    core: usize,
    shared: Arc<Shared>,
) -> Result<JoinHandle<Result<SenderReport, SendError>>, MigrationError> {
    let (ready, is_ready) = channel();
    let name = format!("pc-send{}", setup.lane);
    let sender = spawn(name, core, shared.clone(), move || match Sender::new(setup, filled, free, shared) {
        Ok(sender) => {
            let _ = ready.send(Ok(()));
            sender.run()
        }
        Err(error) => {
            let _ = ready.send(Err(error.to_string()));
            Err(error)
        }
    })?;
    match is_ready.recv() {
        Ok(Ok(())) => Ok(sender),
        Ok(Err(reason)) => Err(MigrationError::Setup(reason)),
        Err(_) => Err(MigrationError::Setup("a sender died at its start".to_owned())),
    }
}

/// Has the other stages end when the one that holds it panics.
struct Alarm(Arc<Shared>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort();
        }
    }
}

fn spawn<T: Send + 'static>(
    name: String,
    core: usize,
    shared: Arc<Shared>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, MigrationError> {
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        // A core that went away since it was chosen costs speed, nothing else.
        let _ = cpu::pin_to(core);
        let _alarm = Alarm(shared);
        cpu::sharpen_timers();
        work()
    });
    thread.map_err(|error| MigrationError::Setup(format!("cannot start a thread: {error}")))
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
