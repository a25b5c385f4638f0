//! One simulated migration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::link::{Link, apply};
use super::machine::{Load, Log, Machine, Pages, lock};
use crate::forecast::{Config, Engine, OnNoConvergence, PolicyKind};
use crate::guest::arena::rng::Rng;
use crate::page::Pfn;
use crate::pipeline::cadence::Cadence;
use crate::pipeline::clock::Clock;
use crate::pipeline::lanes::{Wire, slot_bytes};
use crate::pipeline::mapper::{self, MapMode, Mapper, Way};
use crate::pipeline::openings::Openings;
use crate::pipeline::ring::ring;
use crate::pipeline::scanner::{Event, Links, Order, Scanner, WIRE_BYTES_PER_PAGE};
use crate::pipeline::shared::{Shared, Step};
use crate::pipeline::slots::SlotPool;
use crate::sys::slot_memory::SlotMemory;

/// More steps than any migration may take.
const MOST_STEPS: u64 = 20_000_000;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// The log, after so many clearings.
    LogFails(u32),
    /// The link, after so many records.
    LinkBreaks(u64),
    /// Somebody calls it off after so many steps.
    Abort(u64),
}

/// All that decides how a migration goes.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub load: Load,
    pub policy: PolicyKind,
    pub on_no_convergence: OnNoConvergence,
    pub wire: Wire,
    pub lanes: usize,
    pub link_pages_per_s: u32,
    pub cap_pages_per_s: Option<u32>,
    pub budget_ms: u64,
    pub interval_ms: u64,
    pub max_time_ms: u64,
    /// What a look at the log takes.
    pub look_us: u64,
    pub share_percent: Option<u64>,
    /// Batches in a lane's ring.
    pub ring: usize,
    /// Slots of a lane.
    pub slots: usize,
    pub live: bool,
    pub trouble: Trouble,
}

/// How a migration ended.
#[derive(Debug, PartialEq)]
pub enum Ended {
    /// The guest is at the destination; pages that are not what they were at the source.
    Moved { differing: Vec<Pfn> },
    /// It did not converge, and was not to go on then.
    CalledOff,
    /// Something failed, or somebody called it off.
    Broken,
}

struct Simulation {
    machine: super::machine::Shared,
    now: Arc<AtomicU64>,
    shared: Arc<Shared>,
    scanner: Option<Scanner>,
    mappers: Vec<Option<Mapper>>,
    links: Vec<Option<Link>>,
    orders: Sender<Order>,
    events: Receiver<Event>,
    random: Rng,
    received: Vec<u8>,
    /// When the guest stands still; None while pre-copy goes on.
    suspend_at: Option<Duration>,
    suspended: bool,
    throttle_percent: u8,
    called_off: bool,
}

/// Migrates; panics if that does not end.
pub fn migrate(scenario: &Scenario) -> Ended {
    let mut simulation = Simulation::new(scenario);
    for step in 0..MOST_STEPS {
        if scenario.trouble == Trouble::Abort(step) {
            simulation.shared.abort();
        }
        if simulation.shared.is_aborted() {
            return Ended::Broken;
        }
        if simulation.called_off {
            return Ended::CalledOff;
        }
        if simulation.is_over() {
            return simulation.moved(scenario);
        }
        simulation.step();
    }
    panic!("the migration does not end");
}

impl Simulation {
    fn new(scenario: &Scenario) -> Self {
        let clearings = if let Trouble::LogFails(after) = scenario.trouble { after } else { u32::MAX };
        let machine = Machine::new(&scenario.load, scenario.seed, clearings);
        let populated = machine.populated().clone();
        let nr_pages = populated.nr_pages();
        let machine = Arc::new(Mutex::new(machine));
        let now = Arc::new(AtomicU64::new(0));
        let shared = Arc::new(Shared::new(scenario.lanes, false));
        let (mut lanes, mut zero_notes) = (Vec::new(), Vec::new());
        let (mut mappers, mut links) = (Vec::new(), Vec::new());
        for lane in 0..scenario.lanes {
            let (to_mapper, batches) = ring(scenario.ring);
            let (notes, notes_out) = ring(4);
            let (filled, filled_out) = ring(scenario.slots.next_power_of_two());
            let (mut free, free_out) = ring(scenario.slots.next_power_of_two());
            let memory = SlotMemory::new(scenario.slots * slot_bytes()).unwrap();
            let (_, slots) = SlotPool::new(memory, slot_bytes()).unwrap();
            slots.into_iter().for_each(|slot| assert!(free.push(slot).is_ok()));
            let ends = mapper::Links { batches, free: free_out, filled, zero_notes: notes };
            let way = Way { lane, mode: MapMode::Stage, wire: scenario.wire };
            let source = Box::new(Pages(machine.clone()));
            mappers.push(Some(Mapper::new(source, way, ends, shared.clone(), nr_pages)));
            links.push(Some(Link {
                filled: filled_out,
                free,
                lane,
                pages_per_s: f64::from(
                    scenario.link_pages_per_s.min(scenario.cap_pages_per_s.unwrap_or(u32::MAX)),
                ),
                records_left: if let Trouble::LinkBreaks(after) = scenario.trouble {
                    after
                } else {
                    u64::MAX
                },
                busy_until: Duration::ZERO,
                unnoticed: Vec::new(),
            }));
            lanes.push(to_mapper);
            zero_notes.push(notes_out);
        }
        let (orders, orders_out) = channel();
        if !scenario.live {
            let _ = orders.send(Order::Final);
        }
        let (events_in, events) = channel();
        let (outlets, stages) = (Vec::new(), Vec::new());
        let ends = Links { lanes, zero_notes, outlets, orders: orders_out, events: events_in, stages };
        let log =
            Log { machine: machine.clone(), now: now.clone(), cost: Duration::from_micros(scenario.look_us) };
        let openings = (scenario.wire == Wire::Standard).then(|| Openings::new(populated.clone()));
        let engine = Engine::sparse(scenario.policy, config(scenario, nr_pages, populated.len()), populated);
        let clock = Clock::Simulated(now.clone());
        let scanner =
            Scanner::new(Box::new(log), engine, openings, ends, shared.clone(), cadence(scenario), clock);
        Simulation {
            machine,
            now,
            shared,
            scanner: Some(scanner),
            mappers,
            links,
            orders,
            events,
            random: Rng::at(scenario.seed ^ 1),
            received: Vec::new(),
            suspend_at: None,
            suspended: !scenario.live,
            throttle_percent: 0,
            called_off: false,
        }
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::Relaxed))
    }

    /// Time goes on a little, the guest with it, and somebody takes a step.
    fn step(&mut self) {
        let passes = self.random.below(60_000);
        self.now.fetch_add(passes, Ordering::Relaxed);
        let now = self.now();
        if !self.suspended {
            lock(&self.machine).run_until(now, self.throttle_percent);
        }
        self.control(now);
        let lane = self.random.below(self.mappers.len() as u64) as usize;
        match self.random.below(3) {
            0 => self.scan(),
            1 => {
                if let Some(mapper) = &mut self.mappers[lane]
                    && mapper.step() == Step::Done
                {
                    self.mappers[lane] = None;
                }
            }
            _ => {
                if let Some(link) = &mut self.links[lane]
                    && link.step(now, &self.shared, &mut self.random, &mut self.received) == Step::Done
                {
                    self.links[lane] = None;
                }
            }
        }
    }

    fn scan(&mut self) {
        let Some(scanner) = &mut self.scanner else { return };
        match scanner.step() {
            Ok(Step::Done) => self.scanner = None,
            Ok(_) => {}
            Err(_) => self.shared.abort(),
        }
    }

    fn control(&mut self, now: Duration) {
        match self.events.try_recv() {
            Ok(Event::Stop(_)) => {
                let takes = Duration::from_micros(self.random.below(50_000));
                self.suspend_at = Some(now + takes);
            }
            Ok(Event::CallOff(_)) => self.called_off = true,
            Ok(Event::Throttle(percent)) => self.throttle_percent = percent,
            _ => {}
        }
        if !self.suspended && self.suspend_at.is_some_and(|at| now >= at) {
            self.suspended = true;
            let _ = self.orders.send(Order::Final);
        }
    }

    fn is_over(&self) -> bool {
        self.links.iter().all(Option::is_none)
    }

    /// Compares what the destination holds with the guest, which stands still.
    fn moved(&self, scenario: &Scenario) -> Ended {
        assert!(self.suspended, "nothing more comes, and the guest still runs");
        let machine = lock(&self.machine);
        let held = apply(&self.received, scenario.wire, machine.populated().nr_pages());
        let differs = |pfn: &Pfn| held[pfn.index()] != Some(machine.word(*pfn));
        Ended::Moved { differing: machine.populated().iter().filter(differs).collect() }
    }
}

fn config(scenario: &Scenario, nr_pages: u64, pages: u64) -> Config {
    let downtime_budget = Duration::from_millis(scenario.budget_ms);
    Config {
        nr_pages,
        pages,
        downtime_budget,
        sample_interval: Duration::from_millis(scenario.interval_ms),
        max_time: Duration::from_millis(scenario.max_time_ms),
        fixed_downtime: downtime_budget / 4,
        on_no_convergence: scenario.on_no_convergence,
        linger: 0.25,
    }
}

fn cadence(scenario: &Scenario) -> Cadence {
    let bytes = |pages: u32| (f64::from(pages) * WIRE_BYTES_PER_PAGE) as u64;
    Cadence {
        live: scenario.live,
        sample_interval: Duration::from_millis(scenario.interval_ms),
        share: scenario.share_percent.map(|percent| percent as f64 / 100.0),
        bandwidth: scenario.cap_pages_per_s.map(bytes),
    }
}
