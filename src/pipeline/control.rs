//! A migration to another pagecast, from the first connection to the hand-over.
//!
//! The phases are those of [`Phase`]. Until the hand-over has begun every way out of here, an error, a signal, the
//! end of this process, leaves the guest running at the source with its dirty log off.

use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::lanes::{Lanes, Wire};
use super::live::{Ending, LOOK, Live, Observer, at};
use super::outcome::{Migration, MigrationError, Phase};
use super::outlet::Outlet;
use super::settings::Settings;
use crate::forecast::OnNoConvergence;
use crate::guest::{HandOver, MovableGuest};
use crate::stream::{DomainHeader, GuestType, RecordType, end, record, stream_head};
use crate::sys::{cpu, socket};
use crate::transport::session::{self, Message};

/// How long a connection may take to be made.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the destination may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long what was sent may stay unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);

/// Migrates `guest` to the receiver at `destination`. `abort` is looked at all the time, until the hand-over.
pub fn migrate<G: MovableGuest + ?Sized>(
    guest: &mut G,
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
    // Before the destination hears of it: it may be waiting for somebody who can have the guest.
    guest.claim().map_err(|source| at(Phase::Prepare, source))?;
    let prepared = prepare(guest, settings, destination, abort);
    let Prepared { migration, connections, mut lanes } = prepared.inspect_err(|_| {
        let _ = guest.resume();
    })?;
    let prepare = begun.elapsed();

    let control_cpu = cpu::thread_cpu_time();
    let live = Live::new(guest, settings, abort, observer);
    let mut run = Run { live, connections, verify_cpu: Duration::ZERO };
    let result = run.migrate(&mut lanes, destination, &migration);
    let cpu = cpu::thread_cpu_time().saturating_sub(control_cpu);
    match result {
        Ok(mut migration) => {
            migration.prepare = prepare;
            migration.cpu.control = cpu.saturating_sub(run.verify_cpu);
            Ok(migration)
        }
        Err(error) => Err(run.call_off(&mut lanes, error)),
    }
}

/// A migration that can begin.
struct Prepared {
    /// Its identity.
    migration: String,
    connections: Vec<Arc<TcpStream>>,
    lanes: Lanes,
}

fn prepare<G: MovableGuest + ?Sized>(
    guest: &mut G,
    settings: &Settings,
    destination: &str,
    abort: &AtomicBool,
) -> Result<Prepared, MigrationError> {
    let migration = session::new_migration()
        .map_err(|error| MigrationError::Setup(format!("no random numbers: {error}")))?;
    let connections = connect(guest, settings, destination, &migration, abort)?;
    let outlets: Vec<_> = connections.iter().cloned().map(Outlet::Socket).collect();
    let lanes = Lanes::start(guest, settings, &outlets, Wire::Pagecast)?;
    Ok(Prepared { migration, connections, lanes })
}

/// Connects all lanes and introduces them.
fn connect<G: MovableGuest + ?Sized>(
    guest: &G,
    settings: &Settings,
    destination: &str,
    migration: &str,
    abort: &AtomicBool,
) -> Result<Vec<Arc<TcpStream>>, MigrationError> {
    let unreachable = |source| MigrationError::Connect { destination: destination.to_owned(), source };
    let mut connections = Vec::with_capacity(settings.lanes);
    for lane in 0..settings.lanes {
        let connection = dial(destination).map_err(unreachable)?;
        if let Some(name) = &settings.congestion {
            socket::set_congestion(&connection, name).map_err(unreachable)?;
        }
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

/// A migration with its connections up.
struct Run<'a, G: MovableGuest + ?Sized> {
    live: Live<'a, G>,
    connections: Vec<Arc<TcpStream>>,
    /// CPU time of this thread that went into verifying, which is no part of a migration.
    verify_cpu: Duration,
}

impl<G: MovableGuest + ?Sized> Run<'_, G> {
    fn migrate(
        &mut self,
        lanes: &mut Lanes,
        destination: &str,
        migration: &str,
    ) -> Result<Migration, MigrationError> {
        let domain = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };
        self.live.guest.set_log_dirty(true).map_err(|source| at(Phase::Prepare, source))?;
        for connection in &self.connections {
            self.write(connection, &stream_head(&domain))?;
        }
        let sent = self.live.run(lanes, true, Instant::now())?;
        let all_sent = sent.sent;

        let settings = self.live.settings;
        let cpu_before = cpu::thread_cpu_time();
        let context = self.live.guest.context(&domain, settings.verify);
        self.verify_cpu = cpu::thread_cpu_time().saturating_sub(cpu_before);
        let digested = Instant::now();
        self.live.enter(Phase::HandOver);
        let (ready, ready_at) = self.finish_stream(&context)?;
        let running = self.hand_over(destination, migration)?;
        // A guest that has moved away may have no log to end any more.
        let _ = self.live.guest.set_log_dirty(false);

        let verify_there = Duration::from_nanos(ready.verify_ns);
        let ending = Ending {
            verify: (digested - all_sent) + verify_there,
            hand_over: (ready_at - digested).saturating_sub(verify_there),
            resume: running - ready_at,
        };
        let mut migration = sent.migration(lanes, settings, &ending);
        migration.congestion = socket::congestion(&self.connections[0]).ok();
        migration.cpu.receive = Duration::from_nanos(ready.cpu_ns);
        migration.verified_pages = ready.verified;
        Ok(migration)
    }

    fn write(&self, mut connection: &TcpStream, bytes: &[u8]) -> Result<(), MigrationError> {
        connection.write_all(bytes).map_err(|error| MigrationError::Send {
            phase: self.live.phase,
            reason: self.reason(&format!("the connection to the destination broke: {error}")),
        })
    }

    fn reason(&self, noticed: &str) -> String {
        said_or(&self.connections, noticed)
    }

    /// Ends the stream on every lane and waits for the destination to accept it all.
    fn finish_stream(&self, context: &[u8]) -> Result<(Accepted, Instant), MigrationError> {
        for connection in &self.connections[1..] {
            self.write(connection, &end())?;
        }
        let first = &self.connections[0];
        self.write(first, &record(RecordType::HVM_CONTEXT, context))?;
        self.write(first, &end())?;
        let phase = self.live.phase;
        let refused = |reason| MigrationError::Destination { phase, reason };
        match await_answer(first, self.live.abort) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                Err(MigrationError::Aborted { phase, reason: "interrupted".to_owned() })
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
        self.live.look_for_abort()?;
        let phase = self.live.phase;
        let connection: OwnedFd = self.connections[0]
            .try_clone()
            .map_err(|error| MigrationError::Setup(format!("cannot pass the connection on: {error}")))?
            .into();
        match self.live.guest.hand_over(connection, migration, destination) {
            Ok(HandOver::Running | HandOver::Mirrored(_)) => Ok(Instant::now()),
            Ok(HandOver::ResumedAtSource(reason)) => Err(MigrationError::Destination { phase, reason }),
            Err(source) => Err(at(phase, source)),
        }
    }

    /// Leaves the guest running at the source, and says why.
    fn call_off(&mut self, lanes: &mut Lanes, error: MigrationError) -> MigrationError {
        let connections = self.connections.clone();
        // The guest's own process ends log and throttle too when this connection to it closes.
        let error = self.live.call_off(lanes, error, &|noticed| said_or(&connections, noticed));
        for connection in &self.connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        error
    }
}

/// What the destination itself said, if it did, and else what was noticed here.
fn said_or(connections: &[Arc<TcpStream>], noticed: &str) -> String {
    for connection in connections {
        let _ = connection.set_read_timeout(Some(Duration::from_millis(200)));
        if let Ok(Message::Aborted { reason }) = session::receive(&**connection) {
            return format!("the destination gave up: {reason}");
        }
    }
    noticed.to_owned()
}

/// What the destination said when it was ready.
struct Accepted {
    cpu_ns: u64,
    verified: u64,
    verify_ns: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::PolicyKind;
    use crate::guest::{DirtyLog, GuestControl, GuestError, PageSource};
    use crate::pipeline::outcome::Progress;
    use crate::pipeline::settings::{Pins, SendMode, SlotPages};

    /// A guest that cannot be slowed down, and that nobody is to touch but to claim it and to let it go again.
    #[derive(Default)]
    struct Untouchable {
        claimed: u32,
        let_go: u32,
    }

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
            self.let_go += 1;
            Ok(())
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
    }

    impl MovableGuest for Untouchable {
        fn claim(&mut self) -> Result<(), GuestError> {
            self.claimed += 1;
            Ok(())
        }
        fn hand_over(&mut self, _: OwnedFd, _: &str, _: &str) -> Result<HandOver, GuestError> {
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

    fn settings(on_no_convergence: OnNoConvergence) -> Settings {
        Settings {
            policy: PolicyKind::Ar,
            downtime_budget: Duration::from_millis(300),
            max_time: Duration::from_secs(60),
            on_no_convergence,
            linger: 0.0,
            sample_interval: Duration::from_millis(50),
            sample_share: None,
            bandwidth: None,
            send: SendMode::Auto,
            congestion: None,
            lanes: 1,
            pins: Pins::among(&[0], 1),
            spin: false,
            slots: 16,
            slot_pages: SlotPages::Auto,
            verify: false,
        }
    }

    /// What a migration that cannot begin says; `address` is where it is to go.
    fn refusal(guest: &mut Untouchable, on_no_convergence: OnNoConvergence, address: &str) -> String {
        let never = AtomicBool::new(false);
        let error = migrate(guest, &settings(on_no_convergence), address, &never, &mut Blind);
        error.expect_err("it cannot begin").to_string()
    }

    #[test]
    fn a_guest_is_let_go_when_the_destination_cannot_be_reached() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut guest = Untouchable::default();
        let said = refusal(&mut guest, OnNoConvergence::Stop, &nobody);
        assert!(said.contains(&nobody), "{said}");
        assert_eq!((guest.claimed, guest.let_go), (1, 1));
    }

    #[test]
    fn a_guest_without_a_throttle_is_refused_before_anything_is_touched() {
        let mut guest = Untouchable::default();
        let said = refusal(&mut guest, OnNoConvergence::Throttle, "nowhere:0");
        assert_eq!((guest.claimed, guest.let_go), (0, 0));
        assert!(said.contains("cannot be slowed down; use --on-no-convergence stop or abort"), "{said}");
        assert!(!said.contains('\n'));
    }
}
