//! The program as libxl's save helper: pagecast itself where no domain is saved, and elsewhere this very test program, run
//! again by itself as a save helper whose saver follows a script (`scripted`). Libxl is `fake_libxl`.
//!
//! There is no test harness around this, because a save helper wants its process for itself: its standard input and output,
//! its signals, and its first argument.

mod delegation;
mod fake_libxl;
mod saving;
mod scripted;

use std::ffi::OsString;
use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pagecast::libxl;
use pagecast::sys::exec::exec;
use pagecast::sys::signals::SignalWatch;

/// How long a test may take before it is taken to hang. Not a measure of speed.
const PATIENCE: Duration = Duration::from_secs(120);

/// A first argument for this program: to run the rest as a command, with SIGTERM blocked.
pub const MASKED: &str = "--masked";

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    if let Some(invocation) = libxl::recognise(&argv) {
        return libxl::run(&argv, invocation, &mut scripted::save);
    }
    if argv.get(1).is_some_and(|argument| argument == MASKED) {
        let _watch = SignalWatch::start(&[libc::SIGTERM], |_| {}).expect("signals can be blocked");
        panic!("{}", exec(argv[2].as_ref(), &argv[2..]));
    }
    let filter: Vec<&str> =
        argv[1..].iter().filter_map(|word| word.to_str()).filter(|word| !word.starts_with('-')).collect();
    let tests = delegation::TESTS.iter().chain(saving::TESTS);
    let chosen = tests.filter(|(name, _)| filter.is_empty() || filter.iter().any(|part| name.contains(part)));
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in chosen {
        if within_patience(name, *test) {
            passed += 1;
            println!("test {name} ... ok");
        } else {
            failed += 1;
            println!("test {name} ... FAILED");
        }
    }
    println!("\ntest result: {passed} passed; {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

/// Runs a test; one that hangs ends the program.
fn within_patience(name: &'static str, test: fn()) -> bool {
    let (done, wait) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(PATIENCE) {
            println!("test {name} ... HANGS");
            std::process::exit(1);
        }
    });
    let passed = catch_unwind(test).is_ok();
    drop(done);
    watchdog.join().expect("it only waits");
    passed
}
