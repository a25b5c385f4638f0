//! Something dies at a random moment; the guest always runs on in exactly one place, and every page of it is whole.

use std::io::ErrorKind;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagecast::guest::arena::client::ArenaGuest;
use pagecast::guest::{GuestControl, MovableGuest};

use crate::harness::{
    Folder, Process, assert_sound, runs_at, start_guest, start_receiver, start_send,
    start_send_with_progress, tracking_or_skip, wait_until,
};

const GUEST: [&str; 3] = ["--memory=16MiB", "--workload=kv", "--rate=5000"];

/// Options of a migration, and a time in microseconds in which it is most likely over: a slow link, on which most faults
/// fall into pre-copy, and a fast one, on which many fall into the last milliseconds.
const LINKS: [(&[&str], u64); 3] = [
    (&["--bandwidth=40MB", "--budget=40ms", "--verify"], 700_000),
    (&["--verify"], 150_000),
    (&["--lanes=2", "--send=direct"], 150_000),
];

/// What is done to a migration under way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    KillReceiver,
    KillMigrator,
    CutConnection,
}

const FAULTS: [Fault; 3] = [Fault::KillReceiver, Fault::KillMigrator, Fault::CutConnection];

/// Passes a connection on until it is told to cut it; new connections get through at any time.
struct Proxy {
    address: String,
    connections: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let known = connections.clone();
        std::thread::spawn(move || {
            for inward in listener.incoming().flatten() {
                let Ok(outward) = TcpStream::connect(&target) else { continue };
                let mut known = known.lock().expect("no thread panics with the connections in hand");
                for (from, to) in [(&inward, &outward), (&outward, &inward)] {
                    let (mut from, mut to) = (clone(from), clone(to));
                    known.push(clone(&from));
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Proxy { address, connections }
    }

    fn cut(&self) {
        for connection in
            self.connections.lock().expect("no thread panics with the connections in hand").drain(..)
        {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("a descriptor")
}

/// A generator of random moments; the seed is printed, so that a failure can be looked into.
struct Moments(u64);

impl Moments {
    fn next_below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The guest's home, wherever it is by now.
struct Home {
    socket: PathBuf,
    /// Set while the guest's process is a child of this test.
    _process: Option<Process>,
}

impl Drop for Home {
    /// A guest that has moved is nobody's child: it would outlive a test that fails.
    fn drop(&mut self) {
        let _ = ArenaGuest::connect(&self.socket).and_then(|guest| guest.quit());
    }
}

#[test]
fn whatever_dies_the_guest_runs_on_in_exactly_one_place() {
    if !tracking_or_skip("whatever_dies_the_guest_runs_on_in_exactly_one_place") {
        return;
    }
    let rounds =
        std::env::var("PAGECAST_FAULTS").map_or(50, |text| text.parse().expect("a number of rounds"));
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut moments = Moments(0x9E37_79B9_7F4A_7C15 ^ seed);
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("home"), &GUEST);
    drop(guest);
    let mut home = Home { socket: folder.path("home"), _process: Some(process) };
    let (mut stayed, mut moved) = (0, 0);
    for round in 0..rounds {
        let fault = FAULTS[round % FAULTS.len()];
        let (link, over) = LINKS[round / FAULTS.len() % LINKS.len()];
        let delay = Duration::from_micros(moments.next_below(over));
        let away = folder.path(&format!("away-{round}"));
        disturb(&home.socket, &away, link, fault, delay);
        let places = || (runs_at(&home.socket), runs_at(&away));
        wait_until("the guest runs somewhere", || places() != (false, false));
        match places() {
            (true, false) => stayed += 1,
            (false, true) => {
                moved += 1;
                home = Home { socket: away, _process: None };
            }
            both => panic!("round {round}, {fault:?} after {delay:?}: running here and there: {both:?}"),
        }
        let guest = ArenaGuest::connect(&home.socket).expect("the guest answers");
        assert_sound(&guest);
    }
    println!("{rounds} faults: {stayed} times the guest stayed, {moved} times it moved");
}

/// Migrates the guest at `home` to `away`, with a fault `delay` after the start, and waits until the migrator ends.
fn disturb(home: &Path, away: &Path, link: &[&str], fault: Fault, delay: Duration) {
    let (mut receiver, address) = start_receiver(away, &[]);
    let proxy = Proxy::start(address);
    let mut send = start_send(home, &proxy.address, link);
    std::thread::sleep(delay);
    match fault {
        Fault::KillReceiver => receiver.kill(),
        Fault::KillMigrator => send.kill(),
        Fault::CutConnection => proxy.cut(),
    }
    let (code, said) = send.end();
    // A migrator that was not killed says what became of the guest, and its exit code agrees.
    match code {
        None => assert_eq!(fault, Fault::KillMigrator),
        Some(0) => {}
        Some(1) => assert!(said.contains("the guest runs on at the source"), "{fault:?}: {said}"),
        Some(other) => panic!("{fault:?}: exit code {other}: {said}"),
    }
}

#[test]
fn a_second_migrator_is_refused_and_disturbs_nothing() {
    if !tracking_or_skip("a_second_migrator_is_refused_and_disturbs_nothing") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    let (_first_receiver, first_address) = start_receiver(&folder.path("away"), &["--die-with-parent"]);
    let unwanted = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let second_address = unwanted.local_addr().expect("it is bound").to_string();
    let slow = ["--bandwidth=20MB", "--budget=20ms", "--verify"];
    let (mut first, progress) = start_send_with_progress(&folder.path("home"), &first_address, &slow);
    assert!(progress.contains("precopy"), "{progress}");
    let mut other = ArenaGuest::connect(&folder.path("home")).expect("the guest answers");
    assert!(other.suspend().is_err() && other.resume().is_err(), "it is not for others to say");
    drop(other);
    let (code, said) = start_send(&folder.path("home"), &second_address, &[]).end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another migration of this guest is under way"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    unwanted.set_nonblocking(true).expect("a listener");
    assert_eq!(unwanted.accept().map(drop).map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
    drop(guest);
    let (code, said) = first.end();
    assert_eq!(code, Some(0), "{said}");
    assert_sound(&ArenaGuest::connect(&folder.path("away")).expect("the guest answers"));
}

#[test]
fn a_guest_whose_migration_came_to_nothing_is_free_for_the_next() {
    if !tracking_or_skip("a_guest_whose_migration_came_to_nothing_is_free_for_the_next") {
        return;
    }
    let folder = Folder::new();
    let (_process, mut guest) = start_guest(&folder.path("home"), &GUEST);
    let mut other = ArenaGuest::connect(&folder.path("home")).expect("the guest answers");
    guest.claim().expect("it is free");
    assert!(other.claim().is_err());
    guest.resume().expect("it is ours");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let nobody = listener.local_addr().expect("it is bound").to_string();
    drop(listener);
    let (code, said) = start_send(&folder.path("home"), &nobody, &[]).end();
    assert_eq!(code, Some(1), "{said}");
    wait_until("the guest is free", || other.claim().is_ok());
    assert_sound(&guest);
}

#[test]
fn strangers_at_the_receiver_keep_no_source_from_it() {
    if !tracking_or_skip("strangers_at_the_receiver_keep_no_source_from_it") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    drop(guest);
    let (_receiver, address) = start_receiver(&folder.path("away"), &["--die-with-parent"]);
    let connect = || TcpStream::connect(&address).expect("it listens");
    let _silent = [connect(), connect(), connect()];
    drop(connect());
    let (code, said) = start_send(&folder.path("home"), &address, &["--verify", "--lanes=2"]).end();
    assert_eq!(code, Some(0), "{said}");
    assert_sound(&ArenaGuest::connect(&folder.path("away")).expect("the guest answers"));
}

#[test]
fn a_socket_that_a_dead_guest_left_behind_is_replaced() {
    if !tracking_or_skip("a_socket_that_a_dead_guest_left_behind_is_replaced") {
        return;
    }
    let folder = Folder::new();
    let (mut process, guest) = start_guest(&folder.path("home"), &GUEST);
    drop(guest);
    process.kill();
    process.end();
    assert!(folder.path("home").exists());
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    assert_sound(&guest);
}

#[test]
fn ctrl_c_leaves_the_guest_at_the_source() {
    if !tracking_or_skip("ctrl_c_leaves_the_guest_at_the_source") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    let (_receiver, address) = start_receiver(&folder.path("away"), &[]);
    let mut send = start_send(&folder.path("home"), &address, &["--bandwidth=1MB"]);
    std::thread::sleep(Duration::from_millis(500));
    send.interrupt();
    let (code, said) = send.end();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("interrupted; the guest runs on at the source"), "{said}");
    assert_sound(&guest);
    assert!(!runs_at(&folder.path("away")));

    // The next attempt starts from a full copy and succeeds.
    let (_receiver, address) = start_receiver(&folder.path("away-2"), &["--die-with-parent"]);
    let (code, said) = start_send(&folder.path("home"), &address, &["--verify"]).end();
    assert_eq!(code, Some(0), "{said}");
    assert_sound(&ArenaGuest::connect(&folder.path("away-2")).expect("the guest answers"));
}

#[test]
fn out_of_time_the_guest_stays_if_so_wanted() {
    if !tracking_or_skip("out_of_time_the_guest_stays_if_so_wanted") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &["--memory=16MiB", "--workload=storm"]);
    let (_receiver, address) = start_receiver(&folder.path("away"), &[]);
    let limit = ["--bandwidth=10MB", "--max-time=300ms", "--on-no-convergence=abort"];
    let (code, said) = start_send(&folder.path("home"), &address, &limit).end();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("--max-time") && said.contains("the guest runs on at the source"), "{said}");
    assert_sound(&guest);
}
