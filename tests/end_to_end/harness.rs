//! Starting and watching pagecast's processes.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pagecast::guest::arena::client::ArenaGuest;

/// How long anything may take before a test is taken to hang. Not a measure of speed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The program.
pub fn pagecast() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pagecast"))
}

/// Runs the program to its end.
pub fn run(arguments: &[&str]) -> Output {
    pagecast().args(arguments).stdin(Stdio::null()).output().expect("the program can be started")
}

/// Whether this machine can track dirty pages; if not, says that the test is skipped and why.
pub fn tracking_or_skip(test: &str) -> bool {
    match pagecast::guest::arena::host::try_tracking() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("SKIPPED: {test}: {error}");
            false
        }
    }
}

/// A folder that goes when it is dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pagecast-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a fresh folder");
        Folder(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process of this test, killed when it is dropped.
pub struct Process(pub Child);

impl Process {
    pub fn start(command: &mut Command) -> Self {
        Process(command.stdin(Stdio::null()).process_group(0).spawn().expect("the program can be started"))
    }

    /// The first line that it writes to standard output, which is piped; what it writes there afterwards is lost.
    pub fn first_line(&mut self) -> String {
        let mut line = String::new();
        let output = self.0.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("it says something");
        line
    }

    pub fn kill(&mut self) {
        let _ = self.0.kill();
    }

    pub fn interrupt(&self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("our own process");
    }

    /// Waits for the end; the exit code, if it was not killed, and what it wrote to standard error.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        if let Some(mut errors) = self.0.stderr.take() {
            let _ = errors.read_to_string(&mut said);
        }
        (self.0.wait().expect("our own process").code(), said)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a guest and connects to it, once: whoever says that it runs lets clients in.
pub fn start_guest(socket: &Path, arguments: &[&str]) -> (Process, ArenaGuest) {
    let mut command = pagecast();
    command.arg("guest").arg("--die-with-parent").arg("--socket").arg(socket).args(arguments);
    let mut process = Process::start(command.stdout(Stdio::piped()));
    let line = process.first_line();
    assert!(line.starts_with("guest running, control socket "), "{line}");
    let guest = ArenaGuest::connect(socket).expect("the guest listens");
    (process, guest)
}

/// Starts a receiver and returns where it listens. The guest that it starts is not tied to it.
pub fn start_receiver(socket: &Path, arguments: &[&str]) -> (Process, String) {
    let mut command = pagecast();
    command.arg("receive").arg("--listen").arg("127.0.0.1:0").arg("--socket").arg(socket).args(arguments);
    let mut process = Process::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let line = process.first_line();
    let address = line.trim().strip_prefix("listening on ").expect("the receiver says where it listens");
    (process, address.to_owned())
}

/// Starts a migration.
pub fn start_send(socket: &Path, address: &str, arguments: &[&str]) -> Process {
    let mut command = pagecast();
    command.arg("send").arg("--socket").arg(socket).arg(address).args(arguments);
    Process::start(command.stdout(Stdio::null()).stderr(Stdio::piped()))
}

/// Starts a migration and waits for its first line of progress.
pub fn start_send_with_progress(socket: &Path, address: &str, arguments: &[&str]) -> (Process, String) {
    let mut command = pagecast();
    command.arg("send").arg("--json").arg("--socket").arg(socket).arg(address).args(arguments);
    let mut process = Process::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let line = process.first_line();
    (process, line)
}

/// Whether a guest answers at `socket` and runs.
pub fn runs_at(socket: &Path) -> bool {
    ArenaGuest::connect(socket).and_then(|guest| guest.stats()).is_ok_and(|(_, running)| running)
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "this never came true: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asserts that a running guest goes on with its work and that every page of it is whole.
pub fn assert_sound(guest: &ArenaGuest) {
    let (before, running) = guest.stats().expect("the guest answers");
    assert!(running, "the guest is suspended");
    wait_until("the guest writes on", || guest.stats().expect("the guest answers").0.writes > before.writes);
    let check = guest.check().expect("the guest answers");
    assert!(check.complete && check.errors == 0, "{check:?}");
    let (stats, _) = guest.stats().expect("the guest answers");
    assert_eq!(stats.errors, 0, "{:?}", stats.first_errors);
}
