//! Where connections come in and say what they want. Whoever does not greet as a source does is sent away with one line on
//! standard error, and keeps nobody else waiting.

use std::io::{self, ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use super::ReceiveError;
use crate::sys::{console, socket};
use crate::transport::session::{self, Arriving, Message};

/// How long a connection may take to say what it wants.
const GREETING: Duration = Duration::from_secs(10);

/// How long the other side may take to read why it was sent away.
pub const FAREWELL: Duration = Duration::from_secs(2);

/// Connections that may be at the door at a time. The one that has been there longest makes room for another: a source
/// greets as soon as it is connected.
const MOST_VISITORS: usize = 8;

/// How long a receiver that cannot accept a connection leaves it be.
const SHORTAGE: Duration = Duration::from_millis(100);

/// The most lanes that a migration may have.
pub const MAX_LANES: u16 = 64;

/// A connection that has greeted as a source does.
pub struct Introduced {
    /// The connection, to be waited for without end.
    pub connection: TcpStream,
    /// The migration's identity.
    pub migration: String,
    /// Pages of guest memory.
    pub nr_pages: u64,
    /// Connections in all, 1 to [`MAX_LANES`].
    pub lanes: u16,
    /// Which of them this is.
    pub lane: u16,
    /// It is memory that cannot run here.
    pub image: bool,
}

/// What has come of waiting.
pub enum Knock {
    /// Somebody greeted.
    Greeted(Introduced),
    /// The connection that was watched meanwhile has ended.
    Gone,
    /// The time was up.
    Nobody,
}

/// A listener and those who have connected to it and not yet greeted.
pub struct Door<'l> {
    listener: &'l TcpListener,
    visitors: Vec<Visitor>,
    patience: Duration,
}

impl<'l> Door<'l> {
    /// A door that nobody has come to yet.
    ///
    /// # Errors
    ///
    /// The listener is none.
    pub fn new(listener: &'l TcpListener) -> io::Result<Self> {
        // A connection that has gone again before it is accepted is not to be waited for.
        listener.set_nonblocking(true)?;
        Ok(Door { listener, visitors: Vec::new(), patience: GREETING })
    }

    /// Waits for a greeting, until `until` at most and for as long as `watched` is connected.
    ///
    /// # Errors
    ///
    /// The listener has broken down; that a connection has is nothing to it.
    pub fn next(&mut self, until: Option<Instant>, watched: Option<&TcpStream>) -> io::Result<Knock> {
        loop {
            let woken = self.wait(until, watched)?;
            let listener = woken[0];
            if watched.is_some() && woken.last() == Some(&true) {
                return Ok(Knock::Gone);
            }
            if let Some(greeted) = self.hear(&woken[1..]) {
                return Ok(Knock::Greeted(greeted));
            }
            if listener {
                self.open()?;
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(Knock::Nobody);
            }
        }
    }

    /// Waits until something happens, and says where: at the listener, at each visitor, at `watched`.
    fn wait(&self, until: Option<Instant>, watched: Option<&TcpStream>) -> io::Result<Vec<bool>> {
        let mut events = vec![PollFd::new(self.listener, PollFlags::IN)];
        events.extend(self.visitors.iter().map(|visitor| PollFd::new(&visitor.connection, PollFlags::IN)));
        events.extend(watched.map(|connection| PollFd::new(connection, PollFlags::RDHUP)));
        loop {
            let soonest = self.visitors.iter().map(|visitor| visitor.until).chain(until).min();
            let left = soonest.map(|soonest| soonest.saturating_duration_since(Instant::now()));
            let timeout = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
            match poll(&mut events, timeout.as_ref()) {
                Err(Errno::INTR) => {}
                result => {
                    result?;
                    return Ok(events.iter().map(|event| !event.revents().is_empty()).collect());
                }
            }
        }
    }

    /// Hears the visitors, of whom those have spoken that `spoken` says; the first greeting ends it.
    fn hear(&mut self, spoken: &[bool]) -> Option<Introduced> {
        let mut greeted = None;
        for (visitor, spoken) in std::mem::take(&mut self.visitors).into_iter().zip(spoken) {
            if greeted.is_some() {
                self.visitors.push(visitor);
                continue;
            }
            match visitor.hear(*spoken, self.patience) {
                Heard::Nothing(visitor) => self.visitors.push(visitor),
                Heard::Greeting(introduced) => greeted = Some(introduced),
                Heard::Farewell => {}
            }
        }
        greeted
    }

    /// Lets one more in, if there is one.
    fn open(&mut self) -> io::Result<bool> {
        let (connection, peer) = match self.listener.accept() {
            Ok(accepted) => accepted,
            // It has gone again.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {
                return Ok(false);
            }
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK)) =>
            {
                return Err(error);
            }
            // It was the connection's, or there is nothing left to make one of for now.
            Err(error) => {
                console::complain(format_args!("pagecast receive: cannot accept a connection: {error}"));
                std::thread::sleep(SHORTAGE);
                return Ok(false);
            }
        };
        let prepared = connection
            .set_nonblocking(true)
            .and_then(|()| connection.set_nodelay(true))
            .and_then(|()| socket::watch_for_death(&connection));
        if let Err(error) = prepared {
            complain(peer, &error);
            return Ok(true);
        }
        if self.visitors.len() == MOST_VISITORS {
            let longest = self.visitors.remove(0);
            if matches!(longest.stage, Stage::Greeting(_)) {
                complain(longest.peer, &"it said nothing, and others are waiting");
            }
        }
        let stage = Stage::Greeting(Arriving::default());
        self.visitors.push(Visitor { connection, peer, until: Instant::now() + self.patience, stage });
        Ok(true)
    }

    /// Sends somebody away who has greeted, and who is told `why`.
    pub fn turn_away(&mut self, introduced: Introduced, why: &str) {
        let Introduced { connection, .. } = introduced;
        let Ok(peer) = connection.peer_addr() else { return };
        if connection.set_nonblocking(true).is_ok() {
            let until = Instant::now() + FAREWELL;
            let visitor = Visitor { connection, peer, until, stage: Stage::Leaving };
            if let Heard::Nothing(visitor) = visitor.refuse(&why) {
                self.visitors.push(visitor);
            }
        }
    }

    /// Closes the door. Those who have greeted meanwhile are told `why`, the others are cut off.
    pub fn close(mut self, why: &str) {
        for _ in 0..MOST_VISITORS {
            if !matches!(self.open(), Ok(true)) {
                break;
            }
        }
        for _ in 0..MOST_VISITORS {
            match self.next(Some(Instant::now()), None) {
                Ok(Knock::Greeted(introduced)) => self.turn_away(introduced, why),
                _ => break,
            }
        }
    }
}

/// Says who was sent away, and why.
fn complain(peer: SocketAddr, why: &dyn std::fmt::Display) {
    console::complain(format_args!("pagecast receive: sent {peer} away: {why}"));
}

/// A connection at the door.
struct Visitor {
    connection: TcpStream,
    peer: SocketAddr,
    until: Instant,
    stage: Stage,
}

enum Stage {
    /// It is to say what it wants.
    Greeting(Arriving),
    /// It was told why not, and is to read that before the connection closes under what it still sends.
    Leaving,
}

enum Heard {
    Nothing(Visitor),
    Greeting(Introduced),
    Farewell,
}

impl Visitor {
    /// Hears what has come, if something has.
    fn hear(mut self, spoken: bool, patience: Duration) -> Heard {
        let late = Instant::now() >= self.until;
        let Stage::Greeting(arriving) = &mut self.stage else {
            return if late || spoken && self.has_left() { Heard::Farewell } else { Heard::Nothing(self) };
        };
        let message =
            if spoken { arriving.read(&self.connection) } else { Err(ErrorKind::WouldBlock.into()) };
        match message {
            Ok(message) => self.greet(message),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !late {
                    return Heard::Nothing(self);
                }
                let seconds = patience.as_secs_f64();
                // Not told that the migration is off: nobody knows what it would have asked.
                match arriving.has_begun() {
                    false => complain(self.peer, &format_args!("it said nothing for {seconds} s")),
                    true => {
                        complain(self.peer, &format_args!("it has not said what it wants for {seconds} s"))
                    }
                }
                Heard::Farewell
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => self.refuse(&hello(&error)),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                complain(self.peer, &"the other side broke the connection off");
                Heard::Farewell
            }
            Err(error) => {
                complain(self.peer, &error);
                Heard::Farewell
            }
        }
    }

    fn greet(self, message: Message) -> Heard {
        match message {
            Message::Hello { version, .. } if version != session::VERSION => {
                let ours = session::VERSION;
                self.refuse(&hello(&format_args!("the source speaks version {version}, this is {ours}")))
            }
            Message::Hello { nr_pages, lanes, lane, .. }
                if nr_pages == 0 || lanes == 0 || lanes > MAX_LANES || lane >= lanes =>
            {
                self.refuse(&hello(&format_args!(
                    "{nr_pages} pages over {lanes} lanes, this being lane {lane}"
                )))
            }
            Message::Hello { version: _, migration, nr_pages, lanes, lane, image } => {
                let Visitor { connection, peer, .. } = self;
                // From here on a dead source is noticed by the kernel; a lane may well be silent for long.
                match connection.set_nonblocking(false) {
                    Ok(()) => {
                        Heard::Greeting(Introduced { connection, migration, nr_pages, lanes, lane, image })
                    }
                    Err(error) => {
                        complain(peer, &error);
                        Heard::Farewell
                    }
                }
            }
            // Nothing is known here of any migration that could have come as far as that.
            Message::Resolve { .. } => {
                let _ = session::send(&self.connection, &Message::Unknown);
                Heard::Farewell
            }
            other => self.refuse(&hello(&format_args!("it began with {other:?}"))),
        }
    }

    /// Tells the other side why it is sent away.
    fn refuse(mut self, why: &dyn std::fmt::Display) -> Heard {
        complain(self.peer, why);
        let told = session::send(&self.connection, &Message::Aborted { reason: why.to_string() })
            .and_then(|()| self.connection.shutdown(Shutdown::Write));
        if told.is_err() {
            return Heard::Farewell;
        }
        self.stage = Stage::Leaving;
        self.until = Instant::now() + FAREWELL;
        Heard::Nothing(self)
    }

    /// Reads past what is still being sent; whether that has ended.
    fn has_left(&self) -> bool {
        match (&self.connection).read(&mut [0; 16 << 10]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }
}

fn hello(what: &dyn std::fmt::Display) -> ReceiveError {
    ReceiveError::Hello(what.to_string())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Lets everybody in who has connected, `count` in all.
    fn admit(door: &mut Door, count: usize) {
        while door.visitors.len() < count {
            let listener = PollFd::new(door.listener, PollFlags::IN);
            poll(&mut [listener], None).unwrap();
            door.open().unwrap();
        }
    }

    fn greet(connection: &TcpStream, version: u32, migration: &str) {
        let migration = migration.to_owned();
        let hello = Message::Hello { version, migration, nr_pages: 1, lanes: 1, lane: 0, image: false };
        session::send(connection, &hello).unwrap();
    }

    /// The migration of whoever greets next.
    fn next(door: &mut Door) -> String {
        match door.next(None, None).unwrap() {
            Knock::Greeted(introduced) => introduced.migration,
            Knock::Gone | Knock::Nobody => unreachable!(),
        }
    }

    #[test]
    fn whoever_greets_first_is_let_in_past_those_who_say_nothing() {
        let (listener, address) = listener();
        let mut door = Door::new(&listener).unwrap();
        let connect = || TcpStream::connect(address).unwrap();
        // More than can be at the door at a time.
        let silent: Vec<_> = (0..3 * MOST_VISITORS).map(|_| connect()).collect();
        (&silent[0]).write_all(b"PCS1").unwrap();
        let source = connect();
        greet(&source, session::VERSION, "m");
        assert_eq!(next(&mut door), "m");
        assert!(door.visitors.len() < MOST_VISITORS);
    }

    #[test]
    fn a_greeting_may_come_in_pieces_and_is_waited_for_like_any_other() {
        let (listener, address) = listener();
        let mut door = Door::new(&listener).unwrap();
        let (slow, quick) = (TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap());
        let mut hello = Vec::new();
        let message = Message::Hello {
            version: session::VERSION,
            migration: "slow".to_owned(),
            nr_pages: 1,
            lanes: 1,
            lane: 0,
            image: false,
        };
        session::send(&mut hello, &message).unwrap();
        (&slow).write_all(&hello[..20]).unwrap();
        greet(&quick, session::VERSION, "quick");
        assert_eq!(next(&mut door), "quick");
        (&slow).write_all(&hello[20..]).unwrap();
        assert_eq!(next(&mut door), "slow");
    }

    #[test]
    fn a_source_of_another_version_is_told_so_and_the_next_one_is_let_in() {
        let (listener, address) = listener();
        let mut door = Door::new(&listener).unwrap();
        let (other, source) = (TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap());
        greet(&other, session::VERSION + 1, "other");
        // A stream that nobody reads must not keep it from reading why.
        (&other).write_all(&[0x55; 100_000]).unwrap();
        let told = std::thread::spawn(move || session::receive(&other).unwrap());
        let greeting = std::thread::spawn(move || {
            let Message::Aborted { reason } = told.join().unwrap() else { panic!("no reason") };
            greet(&source, session::VERSION, "m");
            (reason, source)
        });
        assert_eq!(next(&mut door), "m");
        let (reason, _source) = greeting.join().unwrap();
        assert!(reason.contains("the source speaks version 2, this is 1"), "{reason}");
        assert!(reason.contains("`pagecast send` of the same version"), "{reason}");
    }

    #[test]
    fn whoever_says_nothing_is_cut_off_and_not_told_that_a_migration_is_off() {
        let (listener, address) = listener();
        let mut door = Door::new(&listener).unwrap();
        door.patience = Duration::from_millis(20);
        let silent = TcpStream::connect(address).unwrap();
        admit(&mut door, 1);
        while !door.visitors.is_empty() {
            let until = Instant::now() + door.patience;
            assert!(matches!(door.next(Some(until), None), Ok(Knock::Nobody)));
        }
        let mut heard = Vec::new();
        (&silent).read_to_end(&mut heard).unwrap();
        assert!(heard.is_empty());
    }

    #[test]
    fn a_question_after_a_migration_is_answered_at_a_door_where_none_is_known() {
        let (listener, address) = listener();
        let mut door = Door::new(&listener).unwrap();
        let (asking, source) = (TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap());
        session::send(&asking, &Message::Resolve { migration: "gone".to_owned() }).unwrap();
        greet(&source, session::VERSION, "m");
        assert_eq!(next(&mut door), "m");
        assert_eq!(session::receive(&asking).unwrap(), Message::Unknown);
    }

    #[test]
    fn those_who_greet_when_a_migration_has_begun_are_told_so_when_the_door_closes() {
        let (listener, address) = listener();
        let mut door = Door::new(&listener).unwrap();
        let silent = TcpStream::connect(address).unwrap();
        admit(&mut door, 1);
        let source = TcpStream::connect(address).unwrap();
        greet(&source, session::VERSION, "m");
        // It is at the door and not yet let in.
        poll(&mut [PollFd::new(&listener, PollFlags::IN)], None).unwrap();
        door.close("another migration is under way here");
        let Message::Aborted { reason } = session::receive(&source).unwrap() else { panic!("no reason") };
        assert!(reason.contains("under way"), "{reason}");
        let mut heard = Vec::new();
        (&silent).read_to_end(&mut heard).unwrap();
        assert!(heard.is_empty());
    }
}
