//! The part of a migration that is the same wherever the stream goes: from the first page to the last, through suspend.
//!
//! Who calls this has started the lanes, has written the head of the stream and will write its tail.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::lanes::{FeederReports, Lanes, Line};
use super::latency::Latencies;
use super::mapper::MapperReport;
use super::outcome::{Bound, CpuTimes, Downtime, Migration, MigrationError, Phase, Progress};
use super::scanner::{Event, Order, ScannerReport};
use super::sender::{SendError, SenderReport};
use super::settings::Settings;
use crate::forecast::StopReason;
use crate::guest::{GuestControl, GuestError};
use crate::page::PAGE_SIZE;
use crate::sys::cpu;
use crate::transport::ledger::Counters;

/// How often control looks at the abort flag and shows progress.
pub const LOOK: Duration = Duration::from_millis(20);

/// Who is shown how a migration comes along.
pub trait Observer {
    /// Called every few milliseconds.
    fn progress(&mut self, progress: &Progress);
}

/// What the other end says when a connection breaks; if nothing, what was noticed here.
pub type Reason<'a> = dyn Fn(&str) -> String + 'a;

/// A migration with its lanes up, as the control thread drives it. `G` is the guest, as far as the caller needs it.
pub struct Live<'a, G: GuestControl + ?Sized> {
    /// The guest.
    pub guest: &'a mut G,
    /// How it is to be done.
    pub settings: &'a Settings,
    /// To be looked at all the time.
    pub abort: &'a AtomicBool,
    /// Is shown the progress.
    pub observer: &'a mut dyn Observer,
    /// Where the migration stands.
    pub phase: Phase,
    /// By how much the guest is slowed down now.
    throttle_percent: u8,
}

/// Every page is sent and the guest stands still.
pub struct Sent {
    stopping: Instant,
    suspended: Instant,
    scanned: Instant,
    /// When the last page was on the socket.
    pub sent: Instant,
    started: Instant,
    stop_reason: StopReason,
    final_pages: u64,
    faults: u64,
    live_writes_per_s: Option<f64>,
    scanner: ScannerReport,
    mappers: Vec<MapperReport>,
}

/// The times after the last page, as the caller measured them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ending {
    /// Comparing pages, which is no part of a migration.
    pub verify: Duration,
    /// From the last page to the destination's word that it is ready.
    pub hand_over: Duration,
    /// From "go" to the destination's word that the guest runs.
    pub resume: Duration,
}

/// A failure of the guest in a phase.
pub fn at(phase: Phase, source: GuestError) -> MigrationError {
    MigrationError::Guest { phase, source }
}

impl<'a, G: GuestControl + ?Sized> Live<'a, G> {
    /// At the start.
    pub fn new(
        guest: &'a mut G,
        settings: &'a Settings,
        abort: &'a AtomicBool,
        observer: &'a mut dyn Observer,
    ) -> Self {
        Live { guest, settings, abort, observer, phase: Phase::Precopy, throttle_percent: 0 }
    }

    /// Sends all pages: `live`, with its dirty log on, until the policy wants to stop, and then what is left with the guest
    /// suspended; else all of them with the guest suspended.
    pub fn run(&mut self, lanes: &mut Lanes, live: bool, started: Instant) -> Result<Sent, MigrationError> {
        self.enter(Phase::Precopy);
        let mut stop_reason = StopReason::NotLive;
        let mut live_writes_per_s = None;
        let mut line = None;
        if live {
            let before = self.guest.work_done().map_err(|source| at(Phase::Prepare, source))?;
            let Line { events, .. } = line.insert(lanes.flow(self.guest, self.settings, live, started)?);
            stop_reason = self.precopy(lanes, events, started)?;
            let after = self.guest.work_done().map_err(|source| at(Phase::Precopy, source))?;
            live_writes_per_s = writes_per_s(before, after);
        }
        self.enter(Phase::Suspend);
        let stopping = Instant::now();
        self.guest.suspend().map_err(|source| at(Phase::Suspend, source))?;
        let suspended = Instant::now();
        let faults_before = cpu::page_faults();
        let Line { order, events } = match line {
            Some(line) => line,
            None => lanes.flow(self.guest, self.settings, live, started)?,
        };
        let _ = order.send(Order::Final);
        // It stands still altogether; whoever lets it run again, and wherever, is to find it at full speed.
        self.throttle(0)?;
        self.enter(Phase::FinalSend);
        let (scanned, final_pages) = self.await_final_set(lanes, &events)?;
        let (scanner, mappers) = self.await_sent(lanes, started)?;
        Ok(Sent {
            stopping,
            suspended,
            scanned,
            sent: Instant::now(),
            started,
            stop_reason,
            final_pages,
            faults: cpu::page_faults() - faults_before,
            live_writes_per_s,
            scanner,
            mappers,
        })
    }

    /// Goes over to `phase`, and says so at the USDT probe `pagecast:phase`, with its number from 0: prepare, pre-copy, suspend,
    /// final send, hand-over. Where nobody listens that is one instruction that does nothing.
    pub fn enter(&mut self, phase: Phase) {
        probe::probe!(pagecast, phase, phase as u32);
        self.phase = phase;
    }

    fn show(&mut self, lanes: &Lanes, started: Instant) {
        let shared = &lanes.shared;
        let status = &shared.status;
        self.observer.progress(&Progress {
            phase: self.phase,
            elapsed: started.elapsed(),
            pages_sent: shared.entries_sent(),
            bytes_sent: shared.bytes_sent(),
            pending: status.pending.load(Ordering::Relaxed),
            deferred: status.deferred.load(Ordering::Relaxed),
            dirty_pages_per_s: status.dirty_pages_per_s.load(Ordering::Relaxed),
            forecast_downtime: Duration::from_micros(status.forecast_downtime_us.load(Ordering::Relaxed)),
            throttle_percent: self.throttle_percent,
        });
    }

    /// Watches the live phase until the policy wants to stop.
    fn precopy(
        &mut self,
        lanes: &Lanes,
        events: &Receiver<Event>,
        started: Instant,
    ) -> Result<StopReason, MigrationError> {
        loop {
            match events.recv_timeout(LOOK) {
                Ok(Event::Stop(reason)) => return Ok(reason),
                Ok(Event::CallOff(convergence)) => {
                    return Err(MigrationError::NoConvergence { phase: self.phase, convergence });
                }
                Ok(Event::Throttle(percent)) => self.throttle(percent)?,
                Ok(Event::Failed(source)) => return Err(at(self.phase, source)),
                Ok(Event::FinalSet { .. }) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.broken()),
            }
            self.look(lanes)?;
            self.show(lanes, started);
        }
    }

    /// Slows the guest down by `percent`, if it is not yet.
    pub fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        if percent != self.throttle_percent {
            self.guest.throttle(percent).map_err(|source| at(self.phase, source))?;
            self.throttle_percent = percent;
        }
        Ok(())
    }

    /// Errs when the migration is to end here.
    fn look(&self, lanes: &Lanes) -> Result<(), MigrationError> {
        self.look_for_abort()?;
        if lanes.shared.is_aborted() { Err(self.broken()) } else { Ok(()) }
    }

    /// Errs when somebody wants the migration to end.
    pub fn look_for_abort(&self) -> Result<(), MigrationError> {
        if self.abort.load(Ordering::Acquire) {
            return Err(MigrationError::Aborted { phase: self.phase, reason: "interrupted".to_owned() });
        }
        Ok(())
    }

    /// Some stage has given up; which and why is known once the threads are joined ([`call_off`](Self::call_off)).
    fn broken(&self) -> MigrationError {
        MigrationError::Send { phase: self.phase, reason: "a stage of the pipeline ended early".to_owned() }
    }

    fn await_final_set(
        &self,
        lanes: &Lanes,
        events: &Receiver<Event>,
    ) -> Result<(Instant, u64), MigrationError> {
        loop {
            match events.recv_timeout(LOOK) {
                Ok(Event::FinalSet { pages }) => return Ok((Instant::now(), pages)),
                Ok(Event::Failed(source)) => return Err(at(self.phase, source)),
                Ok(Event::Stop(_) | Event::CallOff(_) | Event::Throttle(_))
                | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.broken()),
            }
            self.look(lanes)?;
        }
    }

    /// Waits until the last page is on the socket.
    fn await_sent(
        &mut self,
        lanes: &mut Lanes,
        started: Instant,
    ) -> Result<(ScannerReport, Vec<MapperReport>), MigrationError> {
        let mut shown = Instant::now();
        while !lanes.shared.all_sent() {
            self.look(lanes)?;
            // Each lane that is done ends this.
            std::thread::park_timeout(LOOK);
            if shown.elapsed() >= LOOK {
                self.show(lanes, started);
                shown = Instant::now();
            }
        }
        let FeederReports { scanner, mappers } = lanes.join_feeders();
        Ok((scanner.ok_or_else(|| self.broken())?, mappers))
    }

    fn send_failed(&self, cause: &SendError, reason: &Reason) -> MigrationError {
        let noticed = cause.to_string();
        let reason = if cause.is_of_connection() { reason(&noticed) } else { noticed };
        MigrationError::Send { phase: self.phase, reason }
    }

    /// Ends all threads, the dirty log and the throttle after `error`, and lets the guest run on. The error that comes back
    /// says what a thread said of it.
    pub fn call_off(&mut self, lanes: &mut Lanes, error: MigrationError, reason: &Reason) -> MigrationError {
        lanes.shared.abort();
        lanes.join_feeders();
        let error = match (error, lanes.join_senders()) {
            (MigrationError::Send { .. }, Err(cause)) if !matches!(cause, SendError::Aborted) => {
                self.send_failed(&cause, reason)
            }
            (error, _) => error,
        };
        let _ = self.throttle(0);
        let _ = self.guest.set_log_dirty(false);
        let _ = self.guest.resume();
        error
    }
}

impl Sent {
    /// What the threads' stages took, taken together.
    fn latencies(&self, senders: &[SenderReport]) -> Latencies {
        let mut all = self.scanner.latencies.clone();
        self.mappers.iter().for_each(|mapper| all.add(&mapper.latencies));
        senders.iter().for_each(|sender| all.add(&sender.latencies));
        all
    }

    /// The figures of the migration that this was the heart of, on `lanes`. It ended as `ending` says. Waits until the kernel has
    /// let go of what was sent.
    pub fn migration(self, lanes: &mut Lanes, settings: &Settings, ending: &Ending) -> Migration {
        // All was received, so that what breaks now takes away figures and nothing else.
        let senders = &lanes.join_senders().unwrap_or_default();
        let Sent { scanner, mappers, .. } = &self;
        let shared = &lanes.shared;
        let downtime = Downtime {
            suspend: self.suspended - self.stopping,
            final_scan: self.scanned - self.suspended,
            final_send: self.sent - self.scanned,
            verify: ending.verify,
            hand_over: ending.hand_over,
            resume: ending.resume,
        };
        Migration {
            prepare: Duration::ZERO,
            total: (self.sent - self.started) + ending.hand_over + ending.resume,
            downtime,
            t_star: bound(settings, scanner, mappers),
            pages: scanner.engine.pages(),
            nr_pfns: scanner.engine.pending().nr_pages(),
            transmissions: shared.entries_sent(),
            zero_pages: mappers.iter().map(|mapper| mapper.zero_pages).sum(),
            absent_pages: shared.absent(),
            final_pages: self.final_pages,
            faults_in_downtime: self.faults,
            most_deferred: scanner.most_deferred,
            bytes: shared.bytes_sent(),
            by_send: senders.iter().fold(Default::default(), |all, sender| add(all, sender.bytes)),
            send_calls: senders.iter().map(|sender| sender.enters).sum(),
            fell_back: senders.iter().any(|sender| sender.fell_back),
            staged_bytes: if lanes.mode.copies() { shared.data_pages_sent() * PAGE_SIZE as u64 } else { 0 },
            slot_backing: lanes.backing.to_string(),
            registered: senders.iter().all(|sender| sender.registered),
            send: lanes.send,
            congestion: None,
            stop_reason: self.stop_reason,
            convergence: scanner.engine.convergence().clone(),
            cpu: CpuTimes {
                scan: scanner.cpu,
                map: mappers.iter().map(|mapper| mapper.cpu).sum(),
                send: senders.iter().map(|sender| sender.cpu).sum(),
                control: Duration::ZERO,
                receive: Duration::ZERO,
            },
            samples: scanner.samples,
            sampling: scanner.sampling,
            link_pages_per_s: scanner.pages_per_s,
            forecast_bytes: scanner.engine.state_bytes(),
            verified_pages: 0,
            latencies: self.latencies(senders),
            live_writes_per_s: self.live_writes_per_s,
        }
    }
}

/// The clairvoyant bound of this run, at the speed the link had.
fn bound(settings: &Settings, scanner: &ScannerReport, mappers: &[MapperReport]) -> Option<Bound> {
    let working_set = scanner.engine.working_set();
    let zero = mappers.iter().flat_map(|mapper| mapper.zero_set.iter());
    let zero_unwritten = zero.filter(|pfn| working_set.last_written(*pfn).is_none()).count() as u64;
    let t_star = working_set.t_star(scanner.pages_per_s, settings.downtime_budget, zero_unwritten)?;
    Some(Bound { total: t_star.total })
}

fn add(all: Counters, more: Counters) -> Counters {
    Counters {
        zero_copy_bytes: all.zero_copy_bytes + more.zero_copy_bytes,
        copied_bytes: all.copied_bytes + more.copied_bytes,
        plain_bytes: all.plain_bytes + more.plain_bytes,
    }
}

fn writes_per_s(before: Option<(u64, Duration)>, after: Option<(u64, Duration)>) -> Option<f64> {
    let ((writes_before, time_before), (writes_after, time_after)) = (before?, after?);
    let time = time_after.checked_sub(time_before)?.as_secs_f64();
    (time > 0.0).then(|| writes_after.saturating_sub(writes_before) as f64 / time)
}
