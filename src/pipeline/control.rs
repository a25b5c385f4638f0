//! Control: one migration, from the first connection to the hand-over.
//!
//! The phases are those of [`Phase`]. Until the hand-over has begun every way out of here, an error, a signal, the
//! end of this process, leaves the guest running at the source with its dirty log off.

use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::lanes::{Joined, Lanes};
use super::mapper::{MapMode, MapperReport};
use super::outcome::{Bound, CpuTimes, Downtime, Migration, MigrationError, Phase, Progress};
use super::scanner::{Event, Order, ScannerReport};
use super::sender::{SendError, SenderReport};
use super::settings::Settings;
use crate::forecast::{OnNoConvergence, StopReason};
use crate::guest::{GuestControl, GuestError, HandOver};
use crate::page::PAGE_SIZE;
use crate::stream::{DomainHeader, GuestType, RecordType, end, record, stream_head};
use crate::sys::{cpu, socket};
use crate::transport::ledger::Counters;
use crate::transport::session::{self, Message};

/// How long a connection may take to be made.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the destination may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long what was sent may stay unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);

/// How often control looks at the abort flag and shows progress.
const LOOK: Duration = Duration::from_millis(20);

/// Who is shown how a migration comes along.
pub trait Observer {
    /// Called every few milliseconds.
    fn progress(&mut self, progress: &Progress);
}

/// Migrates `guest` to the receiver at `destination`. `abort` is looked at all the time, until the hand-over.
pub fn migrate(
    guest: &mut dyn GuestControl,
    settings: &Settings,
    destination: &str,
    abort: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Migration, MigrationError> {
    let begun = Instant::now();
    if settings.on_no_convergence == OnNoConvergence::Throttle {
        // Changes nothing, and shows whether it can be done.
        guest.throttle(0).map_err(|source| at(Phase::Prepare, source))?;
    }
    let migration = session::new_migration()
        .map_err(|error| MigrationError::Setup(format!("no random numbers: {error}")))?;
    let connections = connect(guest, settings, destination, &migration, abort)?;
    let mut lanes = Lanes::start(guest, settings, &connections)?;
    let prepare = begun.elapsed();

    let control_cpu = cpu::thread_cpu_time();
    let mut run = Run {
        guest,
        settings,
        abort,
        observer,
        connections,
        phase: Phase::Precopy,
        throttle_percent: 0,
        verify_cpu: Duration::ZERO,
    };
    let result = run.live(&mut lanes, destination, &migration);
    let cpu = cpu::thread_cpu_time().saturating_sub(control_cpu);
    match result {
        Ok(mut migration) => {
            migration.prepare = prepare;
            migration.cpu.control = cpu.saturating_sub(run.verify_cpu);
            Ok(migration)
        }
        Err(error) => Err(run.call_off(lanes, error)),
    }
}

/// Connects all lanes and introduces them.
fn connect(
    guest: &dyn GuestControl,
    settings: &Settings,
    destination: &str,
    migration: &str,
    abort: &AtomicBool,
) -> Result<Vec<Arc<TcpStream>>, MigrationError> {
    let unreachable = |source| MigrationError::Connect { destination: destination.to_owned(), source };
    let mut connections = Vec::with_capacity(settings.lanes);
    for lane in 0..settings.lanes {
        let connection = dial(destination).map_err(unreachable)?;
        connection
            .set_nodelay(true)
            .and_then(|()| socket::set_user_timeout(&connection, UNACKNOWLEDGED))
            .and_then(|()| socket::watch_for_death(&connection))
            .map_err(unreachable)?;
        let hello = Message::Hello {
            version: session::VERSION,
            migration: migration.to_owned(),
            nr_pages: guest.nr_pages(),
            lanes: settings.lanes as u16,
            lane: lane as u16,
            image: !guest.can_move(),
        };
        session::send(&connection, &hello).map_err(unreachable)?;
        let refused = |reason| MigrationError::Destination { phase: Phase::Prepare, reason };
        let answer = match await_answer(&connection, abort) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                return Err(MigrationError::Aborted {
                    phase: Phase::Prepare,
                    reason: "interrupted".to_owned(),
                });
            }
            other => other.map_err(unreachable)?,
        };
        match answer {
            Message::Welcome { version } if version == session::VERSION => {}
            Message::Welcome { version } => {
                return Err(refused(format!("it speaks version {version}, this is {}", session::VERSION)));
            }
            Message::Aborted { reason } => return Err(refused(reason)),
            other => return Err(refused(format!("unexpected answer {other:?}"))),
        }
        connections.push(Arc::new(connection));
    }
    Ok(connections)
}

/// Connects to the first of a name's addresses that answers.
fn dial(destination: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in destination.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, DIAL_TIMEOUT) {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Waits for the destination's next message. `ErrorKind::Interrupted`: `abort` was set meanwhile.
fn await_answer(connection: &TcpStream, abort: &AtomicBool) -> io::Result<Message> {
    let since = Instant::now();
    connection.set_read_timeout(Some(LOOK))?;
    loop {
        match connection.peek(&mut [0]) {
            Ok(_) => break,
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
        }
        if abort.load(Ordering::Acquire) {
            return Err(ErrorKind::Interrupted.into());
        }
        if since.elapsed() > ANSWER_TIMEOUT {
            return Err(io::Error::new(ErrorKind::TimedOut, "it has not answered for a minute"));
        }
    }
    // What has begun to arrive is short and arrives whole, or the connection is broken.
    connection.set_read_timeout(Some(UNACKNOWLEDGED))?;
    session::receive(connection)
}

fn at(phase: Phase, source: GuestError) -> MigrationError {
    MigrationError::Guest { phase, source }
}

/// A migration with its connections up.
struct Run<'a> {
    guest: &'a mut dyn GuestControl,
    settings: &'a Settings,
    abort: &'a AtomicBool,
    observer: &'a mut dyn Observer,
    connections: Vec<Arc<TcpStream>>,
    phase: Phase,
    /// By how much the guest is slowed down now.
    throttle_percent: u8,
    /// CPU time of this thread that went into verifying, which is no part of a migration.
    verify_cpu: Duration,
}

impl Run<'_> {
    fn live(
        &mut self,
        lanes: &mut Lanes,
        destination: &str,
        migration: &str,
    ) -> Result<Migration, MigrationError> {
        let domain = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };
        let work_before = self.guest.work_done().map_err(|source| at(Phase::Prepare, source))?;
        self.guest.set_log_dirty(true).map_err(|source| at(Phase::Prepare, source))?;
        for connection in &self.connections {
            self.write(connection, &stream_head(&domain))?;
        }
        let started = Instant::now();
        let (order, orders) = channel();
        let (events_in, events) = channel();
        lanes.flow(self.guest, self.settings, started, orders, events_in)?;

        let stop_reason = self.precopy(lanes, &events, started)?;
        let work_after = self.guest.work_done().map_err(|source| at(Phase::Precopy, source))?;

        self.enter(Phase::Suspend);
        let stopping = Instant::now();
        self.guest.suspend().map_err(|source| at(Phase::Suspend, source))?;
        let suspended = Instant::now();
        let _ = order.send(Order::Final);
        // It stands still altogether; whoever lets it run again, and wherever, is to find it at full speed.
        self.throttle(0)?;
        self.enter(Phase::FinalSend);
        let (scanned, final_pages) = self.await_final_set(lanes, &events)?;
        let (scanner, mappers, senders) = self.await_drained(lanes, started)?;
        let drained = Instant::now();

        let cpu_before = cpu::thread_cpu_time();
        let context = self.guest.context(&domain, self.settings.verify);
        self.verify_cpu = cpu::thread_cpu_time().saturating_sub(cpu_before);
        let digested = Instant::now();
        self.enter(Phase::HandOver);
        let (ready, ready_at) = self.finish_stream(&context)?;
        let running = self.hand_over(destination, migration)?;
        // A guest that has moved away may have no log to end any more.
        let _ = self.guest.set_log_dirty(false);

        let verify_there = Duration::from_nanos(ready.verify_ns);
        let downtime = Downtime {
            suspend: suspended - stopping,
            final_scan: scanned - suspended,
            final_send: drained - scanned,
            verify: (digested - drained) + verify_there,
            hand_over: (ready_at - digested).saturating_sub(verify_there),
            resume: running - ready_at,
        };
        let total = (running - started).saturating_sub(downtime.verify);
        Ok(Migration {
            prepare: Duration::ZERO,
            total,
            downtime,
            t_star: self.bound(&scanner, &mappers),
            pages: self.guest.nr_pages(),
            transmissions: lanes.shared.entries_sent(),
            zero_pages: mappers.iter().map(|mapper| mapper.zero_pages).sum(),
            final_pages,
            most_deferred: scanner.most_deferred,
            bytes: lanes.shared.bytes_sent(),
            by_send: senders.iter().fold(Default::default(), |all, sender| add(all, sender.bytes)),
            fell_back: senders.iter().any(|sender| sender.fell_back),
            staged_bytes: if lanes.mode == MapMode::Stage {
                lanes.shared.data_pages_sent() * PAGE_SIZE as u64
            } else {
                0
            },
            slot_backing: lanes.backing.to_string(),
            registered: senders.iter().all(|sender| sender.registered),
            send: lanes.send,
            stop_reason,
            convergence: scanner.engine.convergence().clone(),
            cpu: CpuTimes {
                scan: scanner.cpu,
                map: mappers.iter().map(|mapper| mapper.cpu).sum(),
                send: senders.iter().map(|sender| sender.cpu).sum(),
                control: Duration::ZERO,
                receive: Duration::from_nanos(ready.cpu_ns),
            },
            samples: scanner.samples,
            sampling: scanner.sampling,
            link_pages_per_s: scanner.pages_per_s,
            forecast_bytes: scanner.engine.state_bytes(),
            verified_pages: ready.verified,
            live_writes_per_s: writes_per_s(work_before, work_after),
        })
    }

    fn enter(&mut self, phase: Phase) {
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
    fn throttle(&mut self, percent: u8) -> Result<(), MigrationError> {
        if percent != self.throttle_percent {
            self.guest.throttle(percent).map_err(|source| at(self.phase, source))?;
            self.throttle_percent = percent;
        }
        Ok(())
    }

    /// Errs when the migration is to end here.
    fn look(&self, lanes: &Lanes) -> Result<(), MigrationError> {
        if self.abort.load(Ordering::Acquire) {
            return Err(self.aborted("interrupted".to_owned()));
        }
        if lanes.shared.is_aborted() { Err(self.broken()) } else { Ok(()) }
    }

    fn aborted(&self, reason: String) -> MigrationError {
        MigrationError::Aborted { phase: self.phase, reason }
    }

    /// Some stage has given up; which and why is known once the threads are joined (`call_off`).
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

    /// Waits until the last page is on the wire and let go.
    #[allow(clippy::type_complexity)]
    fn await_drained(
        &mut self,
        lanes: &mut Lanes,
        started: Instant,
    ) -> Result<(ScannerReport, Vec<MapperReport>, Vec<SenderReport>), MigrationError> {
        let mut shown = Instant::now();
        while !lanes.are_drained() {
            self.look(lanes)?;
            if shown.elapsed() > LOOK {
                self.show(lanes, started);
                shown = Instant::now();
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let Joined { scanner, mappers, senders } = lanes.join();
        match (scanner, senders) {
            (Some(scanner), Ok(senders)) => Ok((scanner, mappers, senders)),
            (_, Err(error)) => Err(self.send_failed(&error)),
            (None, Ok(_)) => Err(self.broken()),
        }
    }

    fn write(&self, mut connection: &TcpStream, bytes: &[u8]) -> Result<(), MigrationError> {
        connection.write_all(bytes).map_err(|error| MigrationError::Send {
            phase: self.phase,
            reason: self.reason(&format!("the connection to the destination broke: {error}")),
        })
    }

    fn send_failed(&self, cause: &SendError) -> MigrationError {
        let noticed = cause.to_string();
        let reason = if cause.is_of_connection() { self.reason(&noticed) } else { noticed };
        MigrationError::Send { phase: self.phase, reason }
    }

    /// What the destination itself said, if it did, and else what was noticed here.
    fn reason(&self, noticed: &str) -> String {
        for connection in &self.connections {
            let _ = connection.set_read_timeout(Some(Duration::from_millis(200)));
            if let Ok(Message::Aborted { reason }) = session::receive(&**connection) {
                return format!("the destination gave up: {reason}");
            }
        }
        noticed.to_owned()
    }

    /// Ends the stream on every lane and waits for the destination to accept it all.
    fn finish_stream(&self, context: &[u8]) -> Result<(Accepted, Instant), MigrationError> {
        for connection in &self.connections[1..] {
            self.write(connection, &end())?;
        }
        let first = &self.connections[0];
        self.write(first, &record(RecordType::HVM_CONTEXT, context))?;
        self.write(first, &end())?;
        let refused = |reason| MigrationError::Destination { phase: self.phase, reason };
        match await_answer(first, self.abort) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                Err(self.aborted("interrupted".to_owned()))
            }
            Ok(Message::Ready { cpu_ns, verified, verify_ns, .. }) => {
                Ok((Accepted { cpu_ns, verified, verify_ns }, Instant::now()))
            }
            Ok(Message::Aborted { reason }) => Err(refused(reason)),
            Ok(other) => Err(refused(format!("unexpected answer {other:?}"))),
            Err(error) => Err(refused(format!("no answer: {error}"))),
        }
    }

    fn hand_over(&mut self, destination: &str, migration: &str) -> Result<Instant, MigrationError> {
        if self.abort.load(Ordering::Acquire) {
            return Err(self.aborted("interrupted".to_owned()));
        }
        let connection: OwnedFd = self.connections[0]
            .try_clone()
            .map_err(|error| MigrationError::Setup(format!("cannot pass the connection on: {error}")))?
            .into();
        match self.guest.hand_over(connection, migration, destination) {
            Ok(HandOver::Running | HandOver::Mirrored(_)) => Ok(Instant::now()),
            Ok(HandOver::ResumedAtSource(reason)) => {
                Err(MigrationError::Destination { phase: self.phase, reason })
            }
            Err(source) => Err(at(self.phase, source)),
        }
    }

    /// The clairvoyant bound of this run, at the speed the link had.
    fn bound(&self, scanner: &ScannerReport, mappers: &[MapperReport]) -> Option<Bound> {
        let working_set = scanner.engine.working_set();
        let zero = mappers.iter().flat_map(|mapper| mapper.zero_set.iter());
        let zero_unwritten = zero.filter(|pfn| working_set.last_written(*pfn).is_none()).count() as u64;
        let t_star =
            working_set.t_star(scanner.pages_per_s, self.settings.downtime_budget, zero_unwritten)?;
        Some(Bound { total: t_star.total })
    }

    /// Leaves the guest running at the source, and says why.
    fn call_off(&mut self, mut lanes: Lanes, error: MigrationError) -> MigrationError {
        lanes.shared.abort();
        let error = match (error, lanes.join().senders) {
            (MigrationError::Send { .. }, Err(cause)) if !matches!(cause, SendError::Aborted) => {
                self.send_failed(&cause)
            }
            (error, _) => error,
        };
        for connection in &self.connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        // The guest's own process does the same when this connection to it closes.
        let _ = self.throttle(0);
        let _ = self.guest.set_log_dirty(false);
        let _ = self.guest.resume();
        error
    }
}

/// What the destination said when it was ready.
struct Accepted {
    cpu_ns: u64,
    verified: u64,
    verify_ns: u64,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::PolicyKind;
    use crate::guest::{DirtyLog, PageSource};
    use crate::pipeline::settings::{Pins, SendMode};

    /// A guest that cannot be slowed down, and that nobody is to touch.
    struct Untouchable;

    impl GuestControl for Untouchable {
        fn nr_pages(&self) -> u64 {
            unreachable!()
        }
        fn set_log_dirty(&mut self, _: bool) -> Result<(), GuestError> {
            unreachable!()
        }
        fn suspend(&mut self) -> Result<(), GuestError> {
            unreachable!()
        }
        fn resume(&mut self) -> Result<(), GuestError> {
            unreachable!()
        }
        fn hand_over(&mut self, _: OwnedFd, _: &str, _: &str) -> Result<HandOver, GuestError> {
            unreachable!()
        }
        fn work_done(&mut self) -> Result<Option<(u64, Duration)>, GuestError> {
            unreachable!()
        }
        fn take_dirty_log(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
            unreachable!()
        }
        fn page_source(&mut self) -> Box<dyn PageSource> {
            unreachable!()
        }
        fn context(&mut self, _: &DomainHeader, _: bool) -> Vec<u8> {
            unreachable!()
        }
    }

    struct Blind;

    impl Observer for Blind {
        fn progress(&mut self, _: &Progress) {
            unreachable!()
        }
    }

    #[test]
    fn a_guest_without_a_throttle_is_refused_before_anything_is_touched() {
        let settings = Settings {
            policy: PolicyKind::Ar,
            downtime_budget: Duration::from_millis(300),
            max_time: Duration::from_secs(60),
            on_no_convergence: OnNoConvergence::Throttle,
            sample_interval: Duration::from_millis(50),
            bandwidth: None,
            send: SendMode::Auto,
            lanes: 1,
            pins: Pins::among(&[0], 1),
            spin: false,
            slots: 16,
            verify: false,
        };
        let never = AtomicBool::new(false);
        let error =
            migrate(&mut Untouchable, &settings, "nowhere:0", &never, &mut Blind).expect_err("no throttle");
        let said = error.to_string();
        assert!(said.contains("cannot be slowed down; use --on-no-convergence stop or abort"), "{said}");
        assert!(!said.contains('\n'));
    }
}
