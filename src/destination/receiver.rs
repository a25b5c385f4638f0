//! One migration, from the first connection to the hand-over, as the destination sees it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::ReceiveError;
use super::door::{Door, FAREWELL, Introduced, Knock};
use super::incoming::Incoming;
use super::lane::{Capture, Delivered, Input, LaneReader};
use crate::page::PAGE_SIZE;
use crate::page_set::PageSet;
use crate::stream::arena_context::{ArenaContext, Mismatches, page_digest};
use crate::sys::cpu;
use crate::sys::guest_memory::GuestMemory;
use crate::transport::session::{self, Message};

/// How long a migration's further lanes may take to come.
const JOINING: Duration = Duration::from_secs(30);

/// What others are told meanwhile.
const UNDER_WAY: &str = "another migration is under way here";

/// How to receive.
pub struct Reception {
    /// Where to listen, `HOST:PORT`.
    pub listen: String,
    /// The most guest memory to accept, in bytes.
    pub max_memory: u64,
    /// The control socket of the guest that will run here.
    pub guest_socket: PathBuf,
    /// A file for the stream as it was received.
    pub capture: Option<PathBuf>,
    /// The guest ends when this process does.
    pub die_with_parent: bool,
}

/// A migration that was received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Page entries received.
    pub entries: u64,
    /// Pages compared with the source's digests.
    pub verified: u64,
    /// Whether the guest runs here; if not, the source kept it after all.
    pub running: bool,
    /// It was memory without a machine, which cannot run here.
    pub image: bool,
}

/// A listening receiver.
pub struct Receiver {
    settings: Reception,
    capture: Option<Capture>,
    listener: TcpListener,
}

impl Receiver {
    /// Opens what is to be written and begins to listen.
    pub fn listen(settings: Reception) -> Result<Self, ReceiveError> {
        let capture = settings.capture.as_deref().map(Capture::open).transpose()?;
        let listener = TcpListener::bind(&settings.listen)
            .map_err(|source| ReceiveError::Listen { address: settings.listen.clone(), source })?;
        Ok(Receiver { settings, capture, listener })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr, ReceiveError> {
        self.listener.local_addr().map_err(|error| self.deaf(error))
    }

    /// Receives one migration. Returns when it is settled who runs the guest, with the guest's process if it runs here.
    pub fn receive(mut self) -> Result<(Received, Option<Incoming>), ReceiveError> {
        let capture = self.capture.take();
        let mut door = Door::new(&self.listener).map_err(|error| self.deaf(error))?;
        let first = self.introduce_first(&mut door)?;
        let result = self.receive_from(door, &first, capture);
        if let Err(error) = &result {
            refuse(&first.connection, error);
        }
        result
    }

    /// Waits for the connection that opens a migration; strangers are sent away.
    fn introduce_first(&self, door: &mut Door) -> Result<Introduced, ReceiveError> {
        loop {
            match door.next(None, None).map_err(|error| self.deaf(error))? {
                Knock::Greeted(first) if first.lane == 0 => return Ok(first),
                Knock::Greeted(other) => door.turn_away(other, "no such migration is under way here"),
                Knock::Gone | Knock::Nobody => {}
            }
        }
    }

    /// Waits for a further lane of a migration that has been opened; strangers are sent away.
    fn introduce_lane(
        &self,
        door: &mut Door,
        first: &Introduced,
        lane: u16,
    ) -> Result<Introduced, ReceiveError> {
        let gone = |what: &str| ReceiveError::Hello(format!("lane {lane} never came: {what}"));
        let until = Instant::now() + JOINING;
        loop {
            match door.next(Some(until), Some(&first.connection)).map_err(|error| self.deaf(error))? {
                Knock::Greeted(other) if (&other.migration, other.lane) == (&first.migration, lane) => {
                    return Ok(other);
                }
                Knock::Greeted(other) => door.turn_away(other, UNDER_WAY),
                Knock::Gone => return Err(gone("the source is gone")),
                Knock::Nobody => return Err(gone("the source took too long")),
            }
        }
    }

    /// The listener can no longer be waited at.
    fn deaf(&self, source: io::Error) -> ReceiveError {
        ReceiveError::Listen { address: self.settings.listen.clone(), source }
    }

    fn receive_from(
        &self,
        mut door: Door,
        first: &Introduced,
        capture: Option<Capture>,
    ) -> Result<(Received, Option<Incoming>), ReceiveError> {
        self.check(first)?;
        let memory = GuestMemory::create(first.nr_pages)
            .map_err(|error| ReceiveError::Prepare(format!("no memory: {error}")))?;
        // Fresh memory costs microseconds a page at its first touch: better now than while the stream comes in.
        memory.populate().map_err(|error| ReceiveError::Prepare(format!("no memory: {error}")))?;
        let guest = if first.image {
            None
        } else {
            let guest = Incoming::start(&memory, &self.settings.guest_socket, self.settings.die_with_parent)?;
            guest.mapped()?;
            Some(guest)
        };
        welcome(&first.connection)?;
        let mut others = Vec::new();
        for lane in 1..first.lanes {
            let other = self.introduce_lane(&mut door, first, lane)?;
            welcome(&other.connection)?;
            others.push(other);
        }
        door.close(UNDER_WAY);

        let cpu_before = cpu::process_cpu_time();
        let delivered = self.read_lanes(first, &others, &memory, capture)?;
        let receive_cpu = cpu::process_cpu_time().saturating_sub(cpu_before);
        let verifying = Instant::now();
        let verified = accept(&delivered, &memory)?;
        let entries = delivered.iter().map(|lane| lane.entries).sum();
        let ready = Message::Ready {
            pages: entries,
            cpu_ns: receive_cpu.as_nanos() as u64,
            verified,
            verify_ns: if verified > 0 { verifying.elapsed().as_nanos() as u64 } else { 0 },
        };
        let image = first.image;
        let Some(guest) = guest else {
            forget(&first.connection, &ready)?;
            return Ok((Received { entries, verified, running: false, image }, None));
        };
        let running = guest.arm(&first.migration, ready, &first.connection, &self.listener)?;
        Ok((Received { entries, verified, running, image }, running.then_some(guest)))
    }

    fn check(&self, first: &Introduced) -> Result<(), ReceiveError> {
        let bytes = first.nr_pages.saturating_mul(PAGE_SIZE as u64);
        if bytes > self.settings.max_memory {
            let mib = |bytes: u64| bytes >> 20;
            return Err(ReceiveError::TooLarge {
                guest_mib: mib(bytes),
                limit_mib: mib(self.settings.max_memory),
            });
        }
        if first.lanes > 1 && self.settings.capture.is_some() {
            return Err(ReceiveError::Hello(
                "a stream is captured from one lane; send with --lanes 1".to_owned(),
            ));
        }
        Ok(())
    }

    fn read_lanes(
        &self,
        first: &Introduced,
        others: &[Introduced],
        memory: &GuestMemory,
        mut capture: Option<Capture>,
    ) -> Result<Vec<Delivered>, ReceiveError> {
        let mut writer =
            memory.writer().ok_or_else(|| ReceiveError::Prepare("the memory is in use".to_owned()))?;
        let (results_in, results) = channel();
        std::thread::scope(|scope| {
            let lanes = std::iter::once(first).chain(others);
            for (lane, memory) in lanes.zip(writer.by_lane(usize::from(first.lanes))) {
                let (results, capture) = (results_in.clone(), capture.take());
                scope.spawn(move || {
                    let result = lane
                        .connection
                        .try_clone()
                        .map_err(|error| ReceiveError::Prepare(error.to_string()))
                        .and_then(|connection| Input::new(connection, capture))
                        .and_then(|input| LaneReader { memory, lane: lane.lane }.read(input));
                    let _ = results.send((lane.lane, result));
                });
            }
            drop(results_in);
            let mut delivered = Vec::new();
            // In the order in which they end: the first lane that fails knows why, the others fail because of it.
            for (lane, result) in results {
                match result {
                    Ok(pages) => delivered.push((lane, pages)),
                    Err(error) => {
                        // The others would wait for pages that never come.
                        others.iter().for_each(|other| drop(other.connection.shutdown(Shutdown::Both)));
                        let _ = first.connection.shutdown(Shutdown::Read);
                        return Err(error);
                    }
                }
            }
            delivered.sort_by_key(|(lane, _)| *lane);
            Ok(delivered.into_iter().map(|(_, pages)| pages).collect())
        })
    }
}

fn welcome(connection: &TcpStream) -> Result<(), ReceiveError> {
    session::send(connection, &Message::Welcome { version: session::VERSION })
        .map_err(|error| ReceiveError::Hello(format!("the source is gone: {error}")))
}

/// Says that an image is complete, and, when it is to run, that it cannot.
fn forget(connection: &TcpStream, ready: &Message) -> Result<(), ReceiveError> {
    let broke = |error: std::io::Error| ReceiveError::Hello(format!("the source is gone: {error}"));
    session::send(connection, ready).map_err(broke)?;
    connection.set_read_timeout(Some(FAREWELL)).map_err(broke)?;
    // A source that is content with the comparison may simply go.
    if let Ok(Message::Go) = session::receive(connection) {
        let reason = "it is the memory of a process without the process: it cannot run here".to_owned();
        session::send(connection, &Message::Aborted { reason }).map_err(broke)?;
    }
    Ok(())
}

/// Whether what came is a whole guest. Returns the number of pages compared with the source's digests.
fn accept(delivered: &[Delivered], memory: &GuestMemory) -> Result<u64, ReceiveError> {
    let refused = |reason: String| ReceiveError::Content { lane: 0, reason };
    let mut received = PageSet::empty(memory.nr_pages());
    for lane in delivered {
        received.union(&lane.received);
    }
    if received.len() < memory.nr_pages() {
        let missing = memory.nr_pages() - received.len();
        return Err(refused(format!("{missing} pages of the guest never came")));
    }
    let first = &delivered[0];
    let body =
        first.context.as_deref().ok_or_else(|| refused("the guest's context never came".to_owned()))?;
    let context = ArenaContext::decode(body, &first.domain, memory.nr_pages())
        .map_err(|error| refused(error.to_string()))?;
    if context.nr_pages != memory.nr_pages() {
        return Err(refused(format!("the context is of a guest with {} pages", context.nr_pages)));
    }
    match context.mismatches(|pfn| memory.with_page(pfn, |page| page_digest(pfn, page))) {
        None => Ok(0),
        Some(Mismatches { first: None, .. }) => Ok(context.nr_pages),
        Some(Mismatches { first: Some(pfn), count }) => {
            Err(refused(format!("{count} pages differ from the source's, the first is {pfn}")))
        }
    }
}

/// Tells the source why, and gives it time to read that before the connection closes under what it still sends.
fn refuse(connection: &TcpStream, error: &ReceiveError) {
    let told = session::send(connection, &Message::Aborted { reason: error.to_string() })
        .and_then(|()| connection.shutdown(Shutdown::Write))
        .and_then(|()| connection.set_read_timeout(Some(FAREWELL)));
    let since = Instant::now();
    let mut scratch = vec![0u8; 64 * 1024];
    while told.is_ok() && since.elapsed() < FAREWELL {
        match std::io::Read::read(&mut &*connection, &mut scratch) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
}
