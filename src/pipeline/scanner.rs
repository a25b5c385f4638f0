//! The scanner: owns the dirty log and the forecast, and hands out the pages to send.
//!
//! It samples the log at a fixed cadence (and when a policy's round ends), and in between keeps the mappers' rings
//! fed with what the policy ranks highest, never further ahead than the link carries in 20 ms (or 1 MiB): what has been
//! handed out can no longer be held back, and has to be waited for at the stop.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::Thread;
use std::time::Duration;

use super::batch::{BATCH_PAGES, Batch};
use super::cadence::Cadence;
use super::clock::Clock;
use super::dealer::{Dealer, Obstacle};
use super::lanes::BATCH_RING;
use super::latency::{Latencies, Stage};
use super::link_rate::LinkRate;
use super::live::LOOK;
use super::log_peek::{LogPeek, Peeks};
use super::openings::Openings;
use super::outlet::Outlet;
use super::ring::{Consumer, Producer};
use super::shared::{Shared, Step};
use crate::forecast::{Convergence, Engine, Link, Next, Sample, StopReason, Verdict};
use crate::guest::{DirtyLog, GuestError};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::cpu;
use std::sync::atomic::Ordering;

/// How far ahead of the wire the scanner hands pages out.
const WINDOW: Duration = Duration::from_millis(20);

/// Pages that may be ahead of the wire on the slowest of links, 1 MiB: less than [`WINDOW`] from 0.4 Gbit/s on. If it were only
/// the time that counts, a pipeline that takes longer than that from end to end would be measured slower than it is, be given
/// less, and be measured slower still. (Seen on emulated hosts: a third of what the link carries, in batches of 16 pages.)
const LEAST_WINDOW: f64 = 256.0;

/// How often the scanner looks whether what it has handed out is sent, once it hands out no more.
const STILL_SENDING: Duration = Duration::from_millis(1);

/// What full rings hold may be pages of zeroes, which go much faster than the link is.
const LONGEST_RING_REST: Duration = Duration::from_micros(200);

/// Bytes on the wire for a page with data: itself, its entry, and its share of the record's header.
pub const WIRE_BYTES_PER_PAGE: f64 = PAGE_SIZE as f64 + 8.0 + 16.0 / BATCH_PAGES as f64;

/// What control tells the scanner.
pub enum Order {
    /// The guest is suspended: take the last sample, hand out all that is left, and end.
    Final,
}

/// What the scanner tells control.
#[derive(Debug)]
pub enum Event {
    /// The policy wants to stop and copy.
    Stop(StopReason),
    /// The migration is to be called off, because of this.
    CallOff(Box<Convergence>),
    /// The guest is to stand still for this share of its time, in percent.
    Throttle(u8),
    /// The last sample is taken; so many pages are left to send.
    FinalSet {
        /// Pages in the final set.
        pages: u64,
    },
    /// The dirty log failed.
    Failed(GuestError),
}

/// What the scanner leaves behind.
pub struct ScannerReport {
    /// The forecast, with its working set.
    pub engine: Engine,
    /// Get-and-clears of the log.
    pub samples: u64,
    /// Time they took in all.
    pub sampling: Duration,
    /// The most pages that the forecast held back at a time.
    pub most_deferred: u64,
    /// CPU time of the thread.
    pub cpu: Duration,
    /// The link as last known.
    pub pages_per_s: f64,
    /// How long ticks took.
    pub latencies: Latencies,
}

/// What joins the scanner to the other threads.
pub struct Links {
    /// To each lane's mapper.
    pub lanes: Vec<Producer<Batch>>,
    /// From each lane's mapper: pages that turned out to be zero.
    pub zero_notes: Vec<Consumer<Batch>>,
    /// What the lanes go into.
    pub outlets: Vec<Outlet>,
    /// From control.
    pub orders: Receiver<Order>,
    /// To control.
    pub events: Sender<Event>,
    /// The threads behind the scanner, which it wakes when the guest stands still.
    pub stages: Vec<Thread>,
}

/// The scanner's state.
pub struct Scanner {
    log: Box<dyn DirtyLog>,
    engine: Engine,
    dealer: Dealer,
    zero_notes: Vec<Consumer<Batch>>,
    outlets: Vec<Outlet>,
    shared: Arc<Shared>,
    orders: Receiver<Order>,
    events: Sender<Event>,
    stages: Vec<Thread>,
    cadence: Cadence,
    clock: Clock,
    state: State,
    dirty: PageSet,
    chosen: Vec<Pfn>,
    handed_out: u64,
    rate: LinkRate,
    next_sample: Duration,
    peeks: Peeks,
    last_sample: Duration,
    /// For how long the last sample held the guest up.
    took_last: Duration,
    samples: u64,
    sampling: Duration,
    most_deferred: u64,
    latencies: Latencies,
}

/// What the scanner is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Handing out pages and sampling.
    Sending,
    /// All of a round is handed out; the sample that ends it waits until it is sent.
    RoundOver,
    /// Waiting for the order to send the rest.
    Waiting,
    /// Handing out the rest.
    Finishing,
}

/// What one attempt to hand out pages came to.
enum Fed {
    Pages,
    /// As much is on its way as the link carries in [`WINDOW`].
    WindowFull,
    /// A mapper is behind.
    RingFull,
    RoundEnd,
    Nothing,
}

impl Scanner {
    /// A scanner whose dirty log was armed when `clock` began. With `openings` the first batch of each chunk opens it.
    pub fn new(
        log: Box<dyn DirtyLog>,
        engine: Engine,
        openings: Option<Openings>,
        links: Links,
        shared: Arc<Shared>,
        cadence: Cadence,
        clock: Clock,
    ) -> Self {
        let nr_pages = engine.pending().nr_pages();
        let Links { lanes, zero_notes, outlets, orders, events, stages } = links;
        let rate = LinkRate::new(cadence.bandwidth);
        let all = Link { pages_per_s: rate.pages_per_s(), in_flight: 0, sent: 0 };
        let downtime_us = engine.forecast_downtime(&all).as_micros() as u64;
        shared.status.pending.store(engine.pages(), Ordering::Relaxed);
        let next_sample = cadence.next_sample(Duration::ZERO, Duration::ZERO, &engine);
        shared.status.forecast_downtime_us.store(downtime_us, Ordering::Relaxed);
        Scanner {
            log,
            engine,
            dealer: Dealer::new(lanes, openings),
            zero_notes,
            outlets,
            shared,
            orders,
            events,
            stages,
            cadence,
            clock,
            state: if cadence.live { State::Sending } else { State::Waiting },
            dirty: PageSet::empty(nr_pages),
            chosen: Vec::with_capacity(BATCH_PAGES),
            handed_out: 0,
            rate,
            next_sample,
            peeks: Peeks::default(),
            last_sample: Duration::ZERO,
            took_last: Duration::MAX,
            samples: 0,
            sampling: Duration::ZERO,
            most_deferred: 0,
            latencies: Latencies::of(&[Stage::Tick]),
        }
    }

    /// Runs until the final set is handed out or the migration is aborted.
    pub fn run(mut self) -> ScannerReport {
        if let Err(error) = self.work() {
            self.shared.abort();
            let _ = self.events.send(Event::Failed(error));
        }
        self.report()
    }

    pub(super) fn report(self) -> ScannerReport {
        ScannerReport {
            engine: self.engine,
            samples: self.samples,
            sampling: self.sampling,
            most_deferred: self.most_deferred,
            cpu: cpu::thread_cpu_time(),
            pages_per_s: self.rate.pages_per_s(),
            latencies: self.latencies,
        }
    }

    fn work(&mut self) -> Result<(), GuestError> {
        let mut idle = self.shared.idle();
        while !self.shared.is_aborted() {
            let waits = self.state == State::Waiting && !self.shared.spins();
            let step = if waits { self.await_order()? } else { self.step()? };
            match step {
                Step::Done => break,
                step => idle.follow(step),
            }
        }
        Ok(())
    }

    /// Sleeps until control has an order: the guest is being suspended, and whoever does that may need the core. When what was
    /// handed out is sent, the other stages are left in peace as well.
    fn await_order(&mut self) -> Result<Step, GuestError> {
        let patience = if self.shared.is_quiet() { LOOK } else { STILL_SENDING };
        match self.orders.recv_timeout(patience) {
            Ok(Order::Final) => return self.finish(),
            Err(RecvTimeoutError::Timeout) if self.in_flight() == 0 => self.shared.begin_quiet(),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(Step::Done),
        }
        Ok(Step::Worked)
    }

    /// Does what is to be done now.
    pub(super) fn step(&mut self) -> Result<Step, GuestError> {
        if self.state == State::Finishing {
            return Ok(self.deal_last());
        }
        match self.orders.try_recv() {
            Ok(Order::Final) => return self.finish(),
            Err(TryRecvError::Disconnected) => return Ok(Step::Done),
            Err(TryRecvError::Empty) => {}
        }
        if self.state == State::Waiting {
            // Where there is no thread to put to sleep: in simulations, and when stages spin.
            return Ok(Step::Wait(Duration::from_micros(50)));
        }
        let now = self.clock.elapsed();
        // A round's last sample is taken when all of the round is sent.
        let round_over = self.state == State::RoundOver;
        let due = if round_over { self.in_flight() == 0 } else { now >= self.next_sample };
        if due {
            self.sample(false)?;
            self.state = State::Sending;
            if self.heed_verdict() {
                // Until the guest stands still nothing more is handed out, which says nothing about the link.
                self.rate.note_idle();
                self.state = State::Waiting;
                return Ok(Step::Worked);
            }
        }
        match self.feed(now)? {
            Fed::Pages => return Ok(Step::Worked),
            // Far more than this is on its way; a few long naps cost less than many short ones.
            Fed::WindowFull => return Ok(Step::Rest((WINDOW / 4).min(self.next_sample.saturating_sub(now)))),
            Fed::RingFull => {
                return Ok(Step::Rest(self.ring_rest().min(self.next_sample.saturating_sub(now))));
            }
            Fed::RoundEnd => {
                self.state = State::RoundOver;
                self.rate.note_idle();
                return Ok(Step::Wait(Duration::MAX));
            }
            Fed::Nothing => {
                self.rate.note_idle();
                if self.engine.is_lingering() {
                    if self.link_to_the_end().in_flight == 0 && self.heed_verdict() {
                        self.state = State::Waiting;
                        return Ok(Step::Worked);
                    }
                    return Ok(Step::Wait(self.next_sample.saturating_sub(now)));
                }
                let since_last = now.saturating_sub(self.last_sample);
                if self.cadence.may_be_early(since_last, now, self.samples, self.sampling) {
                    self.next_sample = now;
                    return Ok(Step::Worked);
                }
            }
        }
        Ok(Step::Wait(self.next_sample.saturating_sub(self.clock.elapsed())))
    }

    /// Asks the forecast whether to go on, and tells control if anything is to be done; whether pre-copy ends.
    fn heed_verdict(&mut self) -> bool {
        let throttle_percent = self.engine.convergence().throttle_percent();
        // What the link can do must be known before it is told how long it would take for the rest.
        let all_sent_once = self.shared.entries_sent() >= self.engine.pages();
        let pages_per_s = self.rate.proved(all_sent_once);
        let link = Link { pages_per_s, ..self.link_to_the_end() };
        let event = match self.engine.verdict(self.clock.elapsed(), &link) {
            Verdict::Throttle(percent) if percent != throttle_percent => Event::Throttle(percent),
            Verdict::Continue | Verdict::Throttle(_) => return false,
            Verdict::Stop(reason) => Event::Stop(reason),
            Verdict::Abort(_) => Event::CallOff(Box::new(self.engine.convergence().clone())),
        };
        let ends = !matches!(event, Event::Throttle(_));
        let _ = self.events.send(event);
        ends
    }

    /// How long to leave full rings alone: the mappers have enough to do for four times as long, at the speed of the link.
    fn ring_rest(&self) -> Duration {
        let pages = (BATCH_RING / 4 * BATCH_PAGES) as f64;
        Duration::from_secs_f64(pages / self.rate.pages_per_s().max(1.0)).min(LONGEST_RING_REST)
    }

    /// Pages handed out and not yet sent.
    fn in_flight(&self) -> u64 {
        self.handed_out.saturating_sub(self.shared.entries_sent() + self.shared.absent())
    }

    /// The link as the forecast sees it.
    fn link(&self) -> Link {
        Link {
            pages_per_s: self.rate.pages_per_s(),
            in_flight: self.in_flight(),
            sent: self.shared.data_pages_sent(),
        }
    }

    /// The same for a stop: what pipes and sockets hold is still to go then, and comes before the rest.
    fn link_to_the_end(&self) -> Link {
        let buffered: u64 = self.outlets.iter().map(Outlet::buffered).sum();
        let link = self.link();
        Link { in_flight: link.in_flight + buffered / WIRE_BYTES_PER_PAGE as u64, ..link }
    }

    /// Tells the forecast of pages that cost the link nothing.
    fn note_zero_pages(&mut self) {
        for lane in &mut self.zero_notes {
            while let Ok(batch) = lane.pop() {
                for pfn in batch.pages() {
                    self.engine.note_zero(*pfn);
                }
            }
        }
    }

    /// One get-and-clear of the log, and what follows from it.
    fn sample(&mut self, last: bool) -> Result<(), GuestError> {
        self.dirty.clear();
        // The time before the scan: what is written during the scan may belong to this sample or to the next.
        let at = self.clock.elapsed();
        if last {
            self.log.get_and_clear_last(&mut self.dirty)?;
        } else {
            self.log.get_and_clear(&mut self.dirty)?;
        }
        let took = self.log.held_up().unwrap_or_else(|| self.clock.elapsed() - at);
        self.sampling += took;
        self.samples += 1;
        self.engine.on_sample(&Sample { at, dirty: &self.dirty });
        self.latencies.note(Stage::Tick, self.clock.elapsed() - at, 1);
        probe::probe!(pagecast, sample, self.samples, self.dirty.len());
        let interval = at.saturating_sub(self.last_sample);
        self.rate.sample(self.shared.data_pages_sent(), self.shared.entries_sent(), interval);
        self.publish(interval);
        self.last_sample = at;
        // One that something else held up is no reason to wait long for the next.
        let usual = took.min(std::mem::replace(&mut self.took_last, took));
        self.next_sample = self.cadence.next_sample(at, usual, &self.engine);
        self.peeks.forget();
        Ok(())
    }

    fn publish(&self, interval: Duration) {
        let status = &self.shared.status;
        let rate = self.dirty.len() as f64 / interval.as_secs_f64().max(1e-6);
        let downtime = self.engine.forecast_downtime(&self.link_to_the_end());
        status.pending.store(self.engine.pending().len(), Ordering::Relaxed);
        status.dirty_pages_per_s.store(rate as u64, Ordering::Relaxed);
        status.forecast_downtime_us.store(downtime.as_micros() as u64, Ordering::Relaxed);
    }

    /// Hands out at most one batch.
    fn feed(&mut self, now: Duration) -> Result<Fed, GuestError> {
        // Before the window is looked at: what waits to be passed on is a part of what fills it.
        match self.dealer.make_room() {
            Ok(()) => {}
            Err(Obstacle::Full) => return Ok(Fed::RingFull),
            Err(Obstacle::Closed) => {
                // The mapper is gone, and says why itself.
                self.shared.abort();
                return Ok(Fed::Nothing);
            }
        }
        let window = (self.rate.pages_per_s() * WINDOW.as_secs_f64()).max(LEAST_WINDOW);
        let max = (window / 4.0) as usize;
        if self.in_flight() > window as u64 {
            return Ok(Fed::WindowFull);
        }
        self.note_zero_pages();
        self.chosen.clear();
        let link = self.link();
        let cadence = &self.cadence;
        let mut peek = LogPeek::new(self.log.as_mut(), &mut self.peeks, cadence, &self.clock);
        let next = self.engine.next_batch(now, max.min(BATCH_PAGES), &link, &mut peek, &mut self.chosen);
        if let Some(error) = peek.failed {
            return Err(error);
        }
        let deferred = self.engine.deferred();
        self.shared.status.deferred.store(deferred, Ordering::Relaxed);
        self.most_deferred = self.most_deferred.max(deferred);
        match next {
            Next::Batch => {
                // A record names its pages in ascending order; within a batch the order is of no other use.
                self.chosen.sort_unstable();
                self.handed_out += self.chosen.len() as u64;
                if self.dealer.deal(&self.chosen).is_err() {
                    self.shared.abort();
                }
                Ok(Fed::Pages)
            }
            Next::RoundEnd => Ok(Fed::RoundEnd),
            Next::Idle => Ok(Fed::Nothing),
        }
    }

    /// The guest is suspended: dirty, pending and never sent are all that is left; nothing is added any more.
    fn finish(&mut self) -> Result<Step, GuestError> {
        if self.cadence.live {
            self.sample(true)?;
        }
        let last = self.engine.take_pending();
        let _ = self.events.send(Event::FinalSet { pages: last.len() });
        self.handed_out += last.len();
        self.dealer.begin_last(last);
        self.state = State::Finishing;
        let step = self.deal_last();
        self.shared.end_quiet(&self.stages);
        Ok(step)
    }

    /// Hands out of the last pages what there is room for.
    fn deal_last(&mut self) -> Step {
        match self.dealer.deal_last() {
            Ok(true) => Step::Done,
            Ok(false) => Step::Rest(self.ring_rest()),
            Err(_) => {
                // The mapper says why itself.
                self.shared.abort();
                Step::Done
            }
        }
    }
}

#[cfg(test)]
mod tests;
