//! The switch-over, between the process that owns the guest at the source and the one that will at the
//! destination. No other process has a part in it: migrator and receiver may die at any moment.
//!
//! The rule is that the guest never runs in two places, and that it runs in one as soon as that is known to be
//! safe. Until `Go` has been written the source may take the guest back at will. Once it has been written, only the
//! destination's word settles it: `Running`, or `Aborted`, which is a promise never to start. If the connection
//! breaks in between, the source asks again on a new one for as long as it takes.

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::guest::HandOver;
use crate::sys::console;
use crate::sys::socket;
use crate::transport::session::{self, Message};

/// How long one answer may take before the question is put again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two questions.
const RETRY: Duration = Duration::from_millis(100);

/// How long a destination that gave up is to stay, so that the source can ask it.
pub const LINGER: Duration = Duration::from_secs(120);

/// At the source: says `Go` on `connection` and settles what became of it. `take_back`: somebody who knows that the
/// destination is gone for good says so.
pub fn give(connection: OwnedFd, migration: &str, destination: &str, take_back: &AtomicBool) -> HandOver {
    let connection = TcpStream::from(connection);
    if let Err(error) = connection
        .set_nonblocking(false)
        .and_then(|()| connection.set_read_timeout(Some(ANSWER_TIMEOUT)))
        .and_then(|()| session::send(&connection, &Message::Go))
    {
        // A write that failed as a whole put nothing on the wire that could be acted upon.
        let _ = connection.shutdown(std::net::Shutdown::Both);
        return HandOver::ResumedAtSource(format!("the connection broke before the hand-over: {error}"));
    }
    match session::receive(&connection) {
        Ok(Message::Running) => return HandOver::Running,
        Ok(Message::Aborted { reason }) => return HandOver::ResumedAtSource(reason),
        Ok(_) | Err(_) => drop(connection),
    }
    console::complain(format_args!(
        "pagecast guest: the connection broke during the hand-over; asking {destination} who has the guest"
    ));
    while !take_back.load(Ordering::Acquire) {
        match ask(migration, destination) {
            Ok(Message::Running) => return HandOver::Running,
            Ok(Message::Aborted { reason }) => return HandOver::ResumedAtSource(reason),
            // Somebody else listens there by now, or nobody: that settles nothing.
            Ok(_) | Err(_) => std::thread::sleep(RETRY),
        }
    }
    HandOver::ResumedAtSource("the guest was taken back by hand, with the destination in doubt".to_owned())
}

fn ask(migration: &str, destination: &str) -> io::Result<Message> {
    let address = destination
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| io::Error::other("the destination's name has no address"))?;
    let connection = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT)?;
    connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    session::send(&connection, &Message::Resolve { migration: migration.to_owned() })?;
    session::receive(&connection)
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Waiting,
    Running,
    Aborted,
}

/// At the destination: says `ready` on `connection`, waits for `Go` and calls `start`, and answers questions on
/// `listener` for as long as this process lives. True: the guest runs here. False: it never will; the process stays
/// for [`LINGER`] to say so.
pub fn take(
    connection: OwnedFd,
    listener: OwnedFd,
    migration: &str,
    ready: &Message,
    start: impl FnOnce() -> Result<(), String>,
) -> io::Result<bool> {
    let connection = TcpStream::from(connection);
    let fate = Arc::new(Mutex::new(Fate::Waiting));
    answer_questions(TcpListener::from(listener), migration.to_owned(), fate.clone())?;
    let said = connection
        .set_read_timeout(None)
        .and_then(|()| socket::watch_for_death(&connection))
        .and_then(|()| session::send(&connection, ready))
        .and_then(|()| session::receive(&connection));
    let mut reason = "the source gave up".to_owned();
    let running = {
        let mut fate = fate.lock().expect("nobody panics with the fate in hand");
        if *fate == Fate::Waiting {
            *fate = match matches!(said, Ok(Message::Go)).then(start) {
                Some(Ok(())) => Fate::Running,
                Some(Err(why)) => {
                    reason = why;
                    Fate::Aborted
                }
                None => Fate::Aborted,
            };
        }
        *fate == Fate::Running
    };
    let settled = if running { Message::Running } else { Message::Aborted { reason } };
    let _ = session::send(&connection, &settled);
    Ok(running)
}

/// Answers `Resolve` on threads of its own. A question that comes before `Go` settles the matter: the source has
/// given the connection up, so a `Go` still on its way must not count any more.
fn answer_questions(listener: TcpListener, migration: String, fate: Arc<Mutex<Fate>>) -> io::Result<()> {
    listener.set_nonblocking(false)?;
    std::thread::Builder::new().name("guest-resolve".to_owned()).spawn(move || {
        for connection in listener.incoming() {
            let Ok(connection) = connection else {
                std::thread::sleep(RETRY);
                continue;
            };
            let (migration, fate) = (migration.clone(), fate.clone());
            // A thread for each, so that somebody slow keeps nobody waiting.
            let answered =
                std::thread::Builder::new().spawn(move || answer_question(&connection, &migration, &fate));
            drop(answered);
        }
    })?;
    Ok(())
}

fn answer_question(connection: &TcpStream, migration: &str, fate: &Mutex<Fate>) {
    let _ = connection.set_read_timeout(Some(ANSWER_TIMEOUT));
    let Ok(Message::Resolve { migration: asked }) = session::receive(connection) else { return };
    let answer = if asked == migration {
        let mut fate = fate.lock().expect("nobody panics with the fate in hand");
        match *fate {
            Fate::Running => Message::Running,
            Fate::Waiting | Fate::Aborted => {
                *fate = Fate::Aborted;
                Message::Aborted { reason: "the connection broke before the hand-over".to_owned() }
            }
        }
    } else {
        Message::Unknown
    };
    let _ = session::send(connection, &answer);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair {
        source: TcpStream,
        destination: TcpStream,
        listener: TcpListener,
        address: String,
    }

    fn pair() -> Pair {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let source = TcpStream::connect(&address).unwrap();
        let (destination, _) = listener.accept().unwrap();
        Pair { source, destination, listener, address }
    }

    static NEVER: AtomicBool = AtomicBool::new(false);

    const READY: Message = Message::Ready { pages: 1, cpu_ns: 0, verified: 0, verify_ns: 0 };

    #[test]
    fn go_starts_the_destination_and_settles_the_source() {
        let Pair { source, destination, listener, address } = pair();
        let started = Arc::new(AtomicBool::new(false));
        let seen = started.clone();
        let taker = std::thread::spawn(move || {
            take(destination.into(), listener.into(), "m", &READY, || {
                seen.store(true, Ordering::SeqCst);
                Ok(())
            })
        });
        assert_eq!(session::receive(&source).unwrap(), READY);
        assert_eq!(give(source.into(), "m", &address, &NEVER), HandOver::Running);
        assert!(taker.join().unwrap().unwrap() && started.load(Ordering::SeqCst));
    }

    #[test]
    fn a_lost_answer_is_asked_for_again_and_not_guessed() {
        let Pair { source, destination, listener, address } = pair();
        // The destination hears Go and starts, but its answer is lost with the connection.
        let fate = Arc::new(Mutex::new(Fate::Running));
        answer_questions(listener, "m".to_owned(), fate).unwrap();
        let lost = std::thread::spawn(move || {
            assert_eq!(session::receive(&destination).unwrap(), Message::Go);
        });
        assert_eq!(give(source.into(), "m", &address, &NEVER), HandOver::Running);
        lost.join().unwrap();
    }

    #[test]
    fn a_go_that_never_arrived_lets_the_source_have_its_guest_back_for_good() {
        let Pair { source, destination, listener, address } = pair();
        let fate = Arc::new(Mutex::new(Fate::Waiting));
        answer_questions(listener, "m".to_owned(), fate.clone()).unwrap();
        drop(destination);
        assert!(matches!(give(source.into(), "m", &address, &NEVER), HandOver::ResumedAtSource(_)));
        // Nobody asked when the write itself failed; when somebody did, Go no longer counts.
        let asked = matches!(ask("m", &address), Ok(Message::Aborted { .. }));
        assert!(asked && *fate.lock().unwrap() == Fate::Aborted);
    }

    #[test]
    fn a_destination_that_cannot_start_the_guest_gives_it_back() {
        let Pair { source, destination, listener, address } = pair();
        let taker = std::thread::spawn(move || {
            take(destination.into(), listener.into(), "m", &READY, || Err("no processor".to_owned()))
        });
        assert_eq!(session::receive(&source).unwrap(), READY);
        let given = give(source.into(), "m", &address, &NEVER);
        assert_eq!(given, HandOver::ResumedAtSource("no processor".to_owned()));
        assert!(!taker.join().unwrap().unwrap());
    }

    #[test]
    fn a_stranger_settles_nothing_and_only_a_person_ends_the_doubt() {
        let Pair { source, destination, listener, address } = pair();
        answer_questions(listener, "another".to_owned(), Arc::new(Mutex::new(Fate::Waiting))).unwrap();
        let lost = std::thread::spawn(move || drop(session::receive(&destination)));
        static BY_HAND: AtomicBool = AtomicBool::new(false);
        let giver = std::thread::spawn(move || give(source.into(), "m", &address, &BY_HAND));
        lost.join().unwrap();
        std::thread::sleep(3 * RETRY);
        assert!(!giver.is_finished(), "an unknown migration was taken for an answer");
        BY_HAND.store(true, Ordering::Release);
        assert!(matches!(giver.join().unwrap(), HandOver::ResumedAtSource(_)));
    }
}
