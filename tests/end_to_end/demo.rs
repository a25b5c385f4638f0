//! The demonstration, when it is not left to run its course.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use crate::harness::{Folder, Process, pagecast, runs_at, tracking_or_skip, wait_until};

/// A demonstration whose folders for sockets are in `folder`.
fn start_demo(folder: &Folder, arguments: &[&str]) -> Process {
    let mut command = pagecast();
    command.args(["demo", "--policy=ar", "--json"]).args(arguments).env("TMPDIR", &folder.0);
    Process::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

/// The guest's control socket at one end of a demonstration in `folder`.
fn socket(folder: &Folder, end: &str) -> Option<PathBuf> {
    let own = std::fs::read_dir(&folder.0).expect("it is there").flatten().next()?;
    Some(own.path().join(end))
}

fn assert_empty(folder: &Folder) {
    let left: Vec<_> = std::fs::read_dir(&folder.0).expect("it is there").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_demonstration_that_is_called_off_says_why_and_nothing_else() {
    if !tracking_or_skip("a_demonstration_that_is_called_off_says_why_and_nothing_else") {
        return;
    }
    let folder = Folder::new();
    let storm = ["--workload=storm", "--memory=16MiB", "--rate=15000", "--warm-up=100ms"];
    let link = ["--bandwidth=12500KB", "--budget=200ms", "--on-no-convergence=abort"];
    let (code, said) = start_demo(&folder, &[&storm[..], &link].concat()).end();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("(budget 200 ms)"), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert_empty(&folder);
}

/// Processes that `process` has started.
fn children(process: &Process) -> Vec<i32> {
    let id = process.0.id();
    let listed = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("it runs");
    listed.split_whitespace().map(|child| child.parse().expect("a number")).collect()
}

#[test]
fn a_second_ctrl_c_ends_a_demonstration_that_is_stuck_and_leaves_nothing() {
    if !tracking_or_skip("a_second_ctrl_c_ends_a_demonstration_that_is_stuck_and_leaves_nothing") {
        return;
    }
    let folder = Folder::new();
    let mut demo = start_demo(&folder, &["--warm-up=2s", "--memory=16MiB"]);
    wait_until("the guest runs", || socket(&folder, "source").is_some_and(|socket| runs_at(&socket)));
    for child in children(&demo) {
        let child = rustix::process::Pid::from_raw(child).expect("a number of a process");
        rustix::process::kill_process(child, rustix::process::Signal::STOP).expect("it runs");
    }
    // By then it waits for an answer of its guest's and looks at nothing else.
    std::thread::sleep(Duration::from_secs(3));
    demo.interrupt();
    // Again until it is noticed: on a slow machine the second may be taken for the first.
    while demo.0.try_wait().expect("our own process").is_none() {
        std::thread::sleep(Duration::from_millis(500));
        demo.interrupt();
    }
    let (code, said) = demo.end();
    assert_eq!((code, said.trim_end()), (Some(3), "pagecast: interrupted again: ends at once"));
    assert_empty(&folder);
}

#[test]
fn ctrl_c_ends_a_demonstration_before_and_after_the_migration() {
    if !tracking_or_skip("ctrl_c_ends_a_demonstration_before_and_after_the_migration") {
        return;
    }
    for (warm_up, at, says) in [
        ("--warm-up=1h", "source", "interrupted before the migration"),
        ("--warm-up=0s", "destination", "interrupted after the migration"),
    ] {
        let folder = Folder::new();
        let mut demo = start_demo(&folder, &[warm_up, "--run-on=1h", "--memory=16MiB"]);
        wait_until("the guest runs", || socket(&folder, at).is_some_and(|socket| runs_at(&socket)));
        demo.interrupt();
        let (code, said) = demo.end();
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(says), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert_empty(&folder);
    }
}
