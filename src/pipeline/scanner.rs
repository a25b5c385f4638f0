//! The scanner: owns the dirty log and the forecast, and hands out the pages to send.
//!
//! It samples the log at a fixed cadence (and when a policy's round ends), and in between keeps the mappers' rings
//! fed with what the policy ranks highest, never further ahead than the link carries in 20 ms (or 1 MiB): what has been
//! handed out can no longer be held back, and has to be waited for at the stop.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use super::batch::{BATCH_PAGES, Batch};
use super::dealer::{Dealer, Obstacle};
use super::latency::{Latencies, Stage};
use super::link_rate::LinkRate;
use super::log_peek::{LogPeek, Peeks};
use super::openings::Openings;
use super::ring::{Consumer, Producer};
use super::shared::Shared;
use crate::forecast::{Convergence, Engine, Link, Next, Sample, StopReason, Verdict};
use crate::guest::{DirtyLog, GuestError};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::cpu;
use crate::transport::stream_out::StreamOut;
use std::sync::atomic::Ordering;

/// How far ahead of the wire the scanner hands pages out.
const WINDOW: Duration = Duration::from_millis(20);

/// Pages that may be ahead of the wire on the slowest of links, 1 MiB: less than [`WINDOW`] from 0.4 Gbit/s on. If it were only
/// the time that counts, a pipeline that takes longer than that from end to end would be measured slower than it is, be given
/// less, and be measured slower still. (Seen on emulated hosts: a third of what the link carries, in batches of 16 pages.)
const LEAST_WINDOW: f64 = 256.0;

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

/// How the scanner is to work.
#[derive(Clone, Copy)]
pub struct Cadence {
    /// There is a pre-copy; else the scanner waits for the order to send everything.
    pub live: bool,
    /// Time between two samples.
    pub sample_interval: Duration,
    /// The share of the time that looks at the log may take: the time between two grows to keep to it, and a policy that
    /// has no use for samples between its rounds gets none.
    pub share: Option<f64>,
    /// The cap on what is sent, in bytes per second.
    pub bandwidth: Option<u64>,
}

impl Cadence {
    /// The least time between two looks at the log that take `took` each.
    pub(super) fn rest(&self, took: Duration) -> Duration {
        self.share.map_or(Duration::ZERO, |share| took.div_f64(share.max(1e-6)))
    }

    /// When the next sample is due after one at `at` that took `took`. Half of the share is kept for samples that are taken
    /// early.
    fn next_sample(&self, at: Duration, took: Duration, engine: &Engine) -> Duration {
        if self.share.is_some() && engine.samples_by_round() {
            return Duration::MAX;
        }
        at + self.sample_interval.max(2 * self.rest(took))
    }

    /// Whether a sample may be taken before it is due, because all that is known to be dirty has been sent: the next one is
    /// then all that the end of pre-copy waits for. `samples` were taken so far, in `sampling`.
    fn may_be_early(&self, since_last: Duration, now: Duration, samples: u64, sampling: Duration) -> bool {
        let Some(share) = self.share else { return false };
        let another = sampling / samples.max(1) as u32;
        since_last >= self.sample_interval && sampling + another <= now.mul_f64(share)
    }
}

/// What joins the scanner to the other threads.
pub struct Links {
    /// To each lane's mapper.
    pub lanes: Vec<Producer<Batch>>,
    /// From each lane's mapper: pages that turned out to be zero.
    pub zero_notes: Vec<Consumer<Batch>>,
    /// The pipe that the only lane goes into, if it is one.
    pub pipe: Option<Arc<StreamOut>>,
    /// From control.
    pub orders: Receiver<Order>,
    /// To control.
    pub events: Sender<Event>,
}

/// The scanner's state.
pub struct Scanner {
    log: Box<dyn DirtyLog>,
    engine: Engine,
    dealer: Dealer,
    zero_notes: Vec<Consumer<Batch>>,
    pipe: Option<Arc<StreamOut>>,
    shared: Arc<Shared>,
    orders: Receiver<Order>,
    events: Sender<Event>,
    cadence: Cadence,
    started: Instant,
    dirty: PageSet,
    chosen: Vec<Pfn>,
    handed_out: u64,
    rate: LinkRate,
    next_sample: Duration,
    peeks: Peeks,
    last_sample: Duration,
    samples: u64,
    sampling: Duration,
    most_deferred: u64,
    latencies: Latencies,
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
    /// A scanner whose dirty log was armed at `started`. With `openings` the first batch of each chunk opens it.
    pub fn new(
        log: Box<dyn DirtyLog>,
        engine: Engine,
        openings: Option<Openings>,
        links: Links,
        shared: Arc<Shared>,
        cadence: Cadence,
        started: Instant,
    ) -> Self {
        let nr_pages = engine.pending().nr_pages();
        let Links { lanes, zero_notes, pipe, orders, events } = links;
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
            pipe,
            shared,
            orders,
            events,
            cadence,
            started,
            dirty: PageSet::empty(nr_pages),
            chosen: Vec::with_capacity(BATCH_PAGES),
            handed_out: 0,
            rate,
            next_sample,
            peeks: Peeks::default(),
            last_sample: Duration::ZERO,
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
        let mut round_over = false;
        let mut stopping = !self.cadence.live;
        let mut idle = self.shared.idle();
        while !self.shared.is_aborted() {
            match self.orders.try_recv() {
                Ok(Order::Final) => return self.finish(),
                Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => {}
            }
            if stopping {
                idle.wait(Duration::from_micros(50));
                continue;
            }
            let now = self.started.elapsed();
            // A round's last sample is taken when all of the round is sent.
            let due = if round_over { self.in_flight() == 0 } else { now >= self.next_sample };
            if due {
                self.sample(false)?;
                round_over = false;
                stopping = self.heed_verdict();
                if stopping {
                    // Until the guest stands still nothing more is handed out, which says nothing about the link.
                    self.rate.note_idle();
                    continue;
                }
            }
            match self.feed(now)? {
                Fed::Pages => {
                    idle.worked();
                    continue;
                }
                Fed::WindowFull => {
                    // Far more than this is on its way; a few long naps cost less than many short ones.
                    idle.sleep((WINDOW / 4).min(self.next_sample.saturating_sub(now)));
                    continue;
                }
                Fed::RingFull => {}
                Fed::RoundEnd => {
                    round_over = true;
                    self.rate.note_idle();
                    idle.wait(Duration::MAX);
                    continue;
                }
                Fed::Nothing => {
                    self.rate.note_idle();
                    let since_last = now.saturating_sub(self.last_sample);
                    if self.cadence.may_be_early(since_last, now, self.samples, self.sampling) {
                        self.next_sample = now;
                        continue;
                    }
                }
            }
            idle.wait(self.next_sample.saturating_sub(self.started.elapsed()));
        }
        Ok(())
    }

    /// Asks the forecast whether to go on, and tells control if anything is to be done; whether pre-copy ends.
    fn heed_verdict(&mut self) -> bool {
        let throttle_percent = self.engine.convergence().throttle_percent();
        // What the link can do must be known before it is told how long it would take for the rest.
        let all_sent_once = self.shared.entries_sent() >= self.engine.pages();
        let pages_per_s = self.rate.proved(all_sent_once);
        let link = Link { pages_per_s, ..self.link_to_the_end() };
        let event = match self.engine.verdict(self.started.elapsed(), &link) {
            Verdict::Throttle(percent) if percent != throttle_percent => Event::Throttle(percent),
            Verdict::Continue | Verdict::Throttle(_) => return false,
            Verdict::Stop(reason) => Event::Stop(reason),
            Verdict::Abort(_) => Event::CallOff(Box::new(self.engine.convergence().clone())),
        };
        let ends = !matches!(event, Event::Throttle(_));
        let _ = self.events.send(event);
        ends
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

    /// The same for a stop: what a pipe holds is still to go then, and comes before the rest.
    fn link_to_the_end(&self) -> Link {
        let buffered = self.pipe.as_ref().map_or(0, |pipe| pipe.buffered());
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
        let at = self.started.elapsed();
        if last {
            self.log.get_and_clear_last(&mut self.dirty)?;
        } else {
            self.log.get_and_clear(&mut self.dirty)?;
        }
        let took = self.started.elapsed() - at;
        self.sampling += took;
        self.samples += 1;
        self.engine.on_sample(&Sample { at, dirty: &self.dirty });
        self.latencies.note(Stage::Tick, self.started.elapsed() - at, 1);
        let interval = at.saturating_sub(self.last_sample);
        self.rate.sample(self.shared.data_pages_sent(), self.shared.entries_sent(), interval);
        self.publish(interval);
        self.last_sample = at;
        self.next_sample = self.cadence.next_sample(at, took, &self.engine);
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
        let mut peek = LogPeek::new(self.log.as_mut(), &mut self.peeks, cadence, now);
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
    fn finish(&mut self) -> Result<(), GuestError> {
        if self.cadence.live {
            self.sample(true)?;
        }
        let last = self.engine.take_pending();
        let _ = self.events.send(Event::FinalSet { pages: last.len() });
        self.handed_out += last.len();
        self.dealer.deal_last(&last, &self.shared);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of a guest that writes nothing.
    struct Silent;

    impl DirtyLog for Silent {
        fn get_and_clear(&mut self, _: &mut PageSet) -> Result<(), GuestError> {
            Ok(())
        }

        fn peek(&mut self, _: std::ops::Range<u64>, _: &mut PageSet) -> Result<(), GuestError> {
            Ok(())
        }
    }

    #[test]
    fn what_waits_for_room_in_a_ring_goes_on_as_soon_as_there_is_some() {
        // A page in each of 600 chunks, all of which have to be opened: a batch for each page, and room for two.
        let mut populated = PageSet::empty(600 * 512);
        for chunk in 0..600 {
            populated.insert(Pfn(chunk * 512));
        }
        let config = crate::forecast::Config {
            nr_pages: populated.nr_pages(),
            pages: populated.len(),
            downtime_budget: Duration::from_millis(300),
            sample_interval: Duration::from_millis(50),
            max_time: Duration::from_secs(3600),
            fixed_downtime: Duration::ZERO,
            on_no_convergence: crate::forecast::OnNoConvergence::Stop,
        };
        let engine = Engine::sparse(crate::forecast::PolicyKind::Xen, config, populated.clone());
        let (to_lane, mut lane) = crate::pipeline::ring::ring(2);
        let (order, orders) = std::sync::mpsc::channel();
        let (events, _seen) = std::sync::mpsc::channel();
        let links = Links { lanes: vec![to_lane], zero_notes: Vec::new(), pipe: None, orders, events };
        let shared = Arc::new(Shared::new(1, false));
        let slow = Cadence {
            live: true,
            sample_interval: Duration::from_millis(50),
            share: None,
            bandwidth: Some(100_000),
        };
        let openings = Some(Openings::new(populated));
        let scanner =
            Scanner::new(Box::new(Silent), engine, openings, links, shared.clone(), slow, Instant::now());
        let scanning = std::thread::spawn(move || scanner.run());
        let mut handed_out = 0;
        while handed_out < 600 {
            match lane.pop() {
                Ok(batch) => {
                    handed_out += batch.pages().len() as u64;
                    shared.lanes[0].entries.store(handed_out, Ordering::Release);
                }
                Err(_) => std::thread::yield_now(),
            }
        }
        drop(order);
        scanning.join().unwrap();
    }

    #[test]
    fn samples_keep_to_their_share_of_the_time_and_some_of_it_is_left_for_the_end() {
        let ms = Duration::from_millis;
        let cadence = Cadence { live: true, sample_interval: ms(50), share: Some(0.02), bandwidth: None };
        assert!(!cadence.may_be_early(ms(400), ms(400), 0, ms(10)), "more than the share is spent");
        // One sample of 10 ms a second leaves half of the share.
        assert!(cadence.may_be_early(ms(500), ms(10_000), 10, ms(100)));
        assert!(!cadence.may_be_early(ms(40), ms(10_000), 10, ms(100)), "sooner than any sample");
        let (mut now, mut samples, mut sampling) = (ms(10_000), 10, ms(100));
        while cadence.may_be_early(ms(50), now, samples, sampling) {
            (now, samples, sampling) = (now + ms(50), samples + 1, sampling + ms(10));
        }
        assert_eq!(samples, 21, "another eleven, since time goes on");
        assert!(sampling <= now.mul_f64(0.02));
        let free = Cadence { share: None, ..cadence };
        assert!(!free.may_be_early(ms(500), ms(10_000), 10, ms(100)), "where it costs nothing none is early");
    }
}
