//! The demonstration, when it is not left to run its course.

use std::path::PathBuf;
use std::process::Stdio;

use crate::harness::{Folder, Process, pagecast, runs_at, tracking_or_skip, wait_until};

/// A demonstration whose folders for sockets are in `folder`.
fn start_demo(folder: &Folder, arguments: &[&str]) -> Process {
    let mut command = pagecast();
    command
        .args(["demo", "--memory=16MiB", "--policy=ar", "--json"])
        .args(arguments)
        .env("TMPDIR", &folder.0);
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
fn ctrl_c_ends_a_demonstration_before_and_after_the_migration() {
    if !tracking_or_skip("ctrl_c_ends_a_demonstration_before_and_after_the_migration") {
        return;
    }
    for (warm_up, at, says) in [
        ("--warm-up=1h", "source", "interrupted before the migration"),
        ("--warm-up=0s", "destination", "interrupted after the migration"),
    ] {
        let folder = Folder::new();
        let mut demo = start_demo(&folder, &[warm_up, "--run-on=1h"]);
        wait_until("the guest runs", || socket(&folder, at).is_some_and(|socket| runs_at(&socket)));
        demo.interrupt();
        let (code, said) = demo.end();
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(says), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert_empty(&folder);
    }
}
