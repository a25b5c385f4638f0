//! The threads of a migration: a mapper and a sender for each lane, and the scanner that feeds them all.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender as EventSender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::batch::{BATCH_PAGES, FilledSlot};
use super::mapper::{self, MapMode, Mapper, MapperReport};
use super::outcome::{MigrationError, Phase};
use super::ring::{Consumer, Producer, ring};
use super::scanner::{self, Cadence, Event, Order, Scanner, ScannerReport};
use super::sender::{SendError, Sender, SenderReport, SenderSetup};
use super::settings::{SendMode, Settings};
use super::shared::Shared;
use super::slots::{Slot, SlotPool};
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

/// A started sender, and the ring ends that its mapper will have.
struct Lane {
    sender: JoinHandle<Result<SenderReport, SendError>>,
    mapper: Option<MapperParts>,
    mapping: Option<JoinHandle<MapperReport>>,
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
}

/// What the threads leave behind. The first sender that broke says what happened.
pub struct Joined {
    /// The scanner's report, if it was started.
    pub scanner: Option<ScannerReport>,
    /// The mappers' reports.
    pub mappers: Vec<MapperReport>,
    /// The senders' reports.
    pub senders: Result<Vec<SenderReport>, SendError>,
}

impl Lanes {
    /// Sets buffers up and starts the senders, which register them: that takes time and is not part of the migration.
    pub fn start(
        guest: &mut dyn GuestControl,
        settings: &Settings,
        connections: &[Arc<TcpStream>],
    ) -> Result<Self, MigrationError> {
        let shared = Arc::new(Shared::new(settings.lanes, settings.spin));
        let sendable = guest.page_source().sendable();
        let (mode, zero_copy, send) = choose(settings.send, sendable.is_some())?;
        let fixed_messages = zero_copy && mode == MapMode::Reference && uring::takes_fixed_messages();
        let mut lanes = Vec::with_capacity(settings.lanes);
        let mut backing = Backing::Small;
        for (index, connection) in connections.iter().enumerate() {
            let memory = SlotMemory::new(settings.slots * slot_bytes())
                .map_err(|error| MigrationError::Setup(error.to_string()))?;
            let (pool, slots) = SlotPool::new(memory, slot_bytes())
                .map_err(|error| MigrationError::Setup(error.to_string()))?;
            backing = pool.backing();
            let setup = SenderSetup {
                socket: connection.clone(),
                lane: index,
                pool,
                guest: if mode == MapMode::Reference { sendable.clone() } else { None },
                zero_copy,
                fixed_messages,
                may_fall_back: settings.send == SendMode::Auto,
                bytes_per_s: settings.bandwidth.map(|all| all.div_ceil(settings.lanes as u64)),
            };
            lanes.push(start_sender(setup, slots, settings, guest.page_source(), shared.clone())?);
        }
        Ok(Lanes { lanes, scanner: None, shared, mode, send, backing })
    }

    /// Starts mappers and scanner: from here on pages flow.
    pub fn flow(
        &mut self,
        guest: &mut dyn GuestControl,
        settings: &Settings,
        started: Instant,
        orders: Receiver<Order>,
        events: EventSender<Event>,
    ) -> Result<(), MigrationError> {
        let nr_pages = guest.nr_pages();
        let mut batch_ends = Vec::with_capacity(self.lanes.len());
        let mut zero_notes = Vec::with_capacity(self.lanes.len());
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let (producer, batches) = ring(BATCH_RING);
            batch_ends.push(producer);
            let (notes, notes_out) = ring(ZERO_NOTES);
            zero_notes.push(notes_out);
            let Some(parts) = lane.mapper.take() else {
                return Err(MigrationError::Setup("the pipeline was started twice".to_owned()));
            };
            let links = mapper::Links { batches, free: parts.free, filled: parts.filled, zero_notes: notes };
            let mapper = Mapper::new(parts.source, self.mode, links, self.shared.clone(), nr_pages);
            let core = settings.pins.map[index % settings.pins.map.len()];
            lane.mapping =
                Some(spawn(format!("pc-map{index}"), core, self.shared.clone(), move || mapper.run())?);
        }
        let mut log = guest
            .take_dirty_log()
            .map_err(|source| MigrationError::Guest { phase: Phase::Prepare, source })?;
        // Arms the log. Every page is pending anyway, so what it says now is of no interest.
        log.get_and_clear(&mut PageSet::empty(nr_pages))
            .map_err(|source| MigrationError::Guest { phase: Phase::Prepare, source })?;
        let engine = Engine::new(
            settings.policy,
            Config {
                nr_pages,
                downtime_budget: settings.downtime_budget,
                sample_interval: settings.sample_interval,
                max_time: settings.max_time,
                fixed_downtime: FIXED_DOWNTIME.min(settings.downtime_budget / 4),
                on_no_convergence: settings.on_no_convergence,
            },
        );
        let cadence = Cadence { sample_interval: settings.sample_interval, bandwidth: settings.bandwidth };
        let links = scanner::Links { lanes: batch_ends, zero_notes, orders, events };
        let scanner = Scanner::new(log, engine, links, self.shared.clone(), cadence, started);
        self.scanner =
            Some(spawn("pc-scan0".to_owned(), settings.pins.scan, self.shared.clone(), move || {
                scanner.run()
            })?);
        Ok(())
    }

    /// Whether every sender has ended.
    pub fn are_drained(&self) -> bool {
        self.lanes.iter().all(|lane| lane.sender.is_finished())
    }

    /// Waits for all threads.
    pub fn join(&mut self) -> Joined {
        let scanner = self.scanner.take().map(join);
        let mut mappers = Vec::new();
        let mut senders = Ok(Vec::new());
        for lane in self.lanes.drain(..) {
            // A mapper that never started holds ring ends that its sender waits for.
            drop(lane.mapper);
            mappers.extend(lane.mapping.map(join));
            match (join(lane.sender), &mut senders) {
                (Ok(report), Ok(reports)) => reports.push(report),
                (Err(error), Ok(_)) => senders = Err(error),
                (Err(error), Err(SendError::Aborted)) => senders = Err(error),
                (_, Err(_)) => {}
            }
        }
        Joined { scanner, mappers, senders }
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

fn start_sender(
    setup: SenderSetup,
    slots: Vec<Slot>,
    settings: &Settings,
    source: Box<dyn PageSource>,
    shared: Arc<Shared>,
) -> Result<Lane, MigrationError> {
    let capacity = slots.len().next_power_of_two();
    let (mut free_in, free) = ring(capacity);
    let (filled, filled_out) = ring(capacity);
    for slot in slots {
        if free_in.push(slot).is_err() {
            return Err(MigrationError::Setup("the ring of free slots is too small".to_owned()));
        }
    }
    let index = setup.lane;
    let core = settings.pins.send[index % settings.pins.send.len()];
    let (ready, is_ready) = channel();
    let sender = spawn(format!("pc-send{index}"), core, shared.clone(), move || {
        match Sender::new(setup, filled_out, free_in, shared) {
            Ok(sender) => {
                let _ = ready.send(Ok(()));
                sender.run()
            }
            Err(error) => {
                let _ = ready.send(Err(error.to_string()));
                Err(error)
            }
        }
    })?;
    match is_ready.recv() {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => return Err(MigrationError::Setup(reason)),
        Err(_) => return Err(MigrationError::Setup("a sender died at its start".to_owned())),
    }
    Ok(Lane { sender, mapper: Some(MapperParts { source, free, filled }), mapping: None })
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
