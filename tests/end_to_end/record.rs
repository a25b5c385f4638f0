//! Recording: an embedded guest, a process from the outside, a command.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use pagecast::guest::process::attach::Attachment;
use pagecast::trace::format::Trace;
use serde_json::Value;

use crate::harness::{Folder, Process, assert_sound, pagecast, run, start_guest, tracking_or_skip};

/// Whether this machine lets a process be attached to; if not, says that the test is skipped and why.
pub fn attaching_or_skip(test: &str) -> bool {
    if !tracking_or_skip(test) {
        return false;
    }
    let mut target = Process::start(std::process::Command::new("sleep").arg("100"));
    let attached = Attachment::new(target.0.id() as i32);
    target.kill();
    match attached {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED: {test}: {error}");
            false
        }
    }
}

/// Runs a recording to its end and returns its last line.
fn record(arguments: &[&str], out: &Path) -> Value {
    let out = out.to_str().expect("UTF-8");
    let mut all = vec!["record", "--json", "--out", out];
    all.extend(arguments);
    let output = run(&all);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{all:?}: {said}");
    let lines = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let last: Value = serde_json::from_str(lines.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["event"], "recorded", "{last}");
    last
}

/// Asserts that a trace is what its recording says, and returns it.
fn assert_matches(path: &Path, recorded: &Value) -> Trace {
    let trace = Trace::open(path).expect("a valid trace");
    assert_eq!(recorded["rounds"], trace.rounds().len() as u64, "{recorded}");
    assert_eq!(recorded["pages_tracked"], trace.nr_pages(), "{recorded}");
    let dirty: u64 = trace.rounds().iter().skip(1).map(|round| u64::from(round.dirty)).sum();
    assert_eq!(recorded["pages_dirty"]["total"], dirty, "{recorded}");
    trace
}

const KV: [&str; 6] = ["--memory", "32MiB", "--workload", "kv", "--seed", "3"];

#[test]
fn an_embedded_guest_is_recorded_by_its_own_log_and_from_the_outside_alike() {
    let test = "an_embedded_guest_is_recorded_by_its_own_log_and_from_the_outside_alike";
    if !attaching_or_skip(test) {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &KV);
    let socket = folder.path("guest");
    let inside = folder.path("inside.pct.zst");
    let short = ["--duration", "1s", "--period", "20ms"];
    let recorded = record(&[&["--socket", socket.to_str().expect("UTF-8")], &short[..]].concat(), &inside);
    let trace = assert_matches(&inside, &recorded);
    assert_eq!((trace.nr_pages(), trace.rounds()[0].dirty), (8192, 8192));
    let pid = process.0.id().to_string();
    let outside = folder.path("outside.pct");
    let recorded = record(&[&["--pid", &pid, "--shared"], &short[..]].concat(), &outside);
    let seen = assert_matches(&outside, &recorded);
    // Of the RAM, the same pages in both: the guest writes the same ones again and again.
    let touched = |trace: &Trace| trace.rounds()[1..].iter().map(|round| u64::from(round.dirty)).sum::<u64>();
    assert!(touched(&trace) > 0 && touched(&seen) > 0);
    assert_eq!(recorded["target"]["mappings_skipped"], 0, "{recorded}");
    assert_sound(&guest);
}

#[test]
fn a_killed_recorder_leaves_its_target_running_and_free() {
    let test = "a_killed_recorder_leaves_its_target_running_and_free";
    if !attaching_or_skip(test) {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &KV);
    let pid = process.0.id().to_string();
    let out = folder.path("cut.pct");
    for cycle in 0..20 {
        let mut command = pagecast();
        command.args(["record", "--shared", "--period", "1ms", "--pid", &pid, "--out"]).arg(&out);
        let mut recorder = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
        // From before the attachment to well within the recording.
        std::thread::sleep(Duration::from_millis(2 * cycle));
        recorder.kill();
        let _ = recorder.end();
    }
    assert_sound(&guest);
    let recorded = record(
        &["--pid", &pid, "--shared", "--duration", "200ms", "--period", "10ms"],
        &folder.path("whole.pct"),
    );
    assert_eq!(recorded["target"]["mappings_skipped"], 0, "{recorded}");
    assert!(recorded["pages_dirty"]["total"].as_u64() > Some(0), "{recorded}");
    assert_sound(&guest);
}

#[test]
fn an_interrupted_recording_is_complete() {
    let test = "an_interrupted_recording_is_complete";
    if !attaching_or_skip(test) {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &KV);
    let out = folder.path("short.pct.zst");
    let mut command = pagecast();
    command
        .args([
            "record",
            "--json",
            "--shared",
            "--duration",
            "1h",
            "--pid",
            &process.0.id().to_string(),
            "--out",
        ])
        .arg(&out);
    let mut recorder = Process::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    // After the first round.
    recorder.first_line();
    recorder.interrupt();
    assert_eq!(recorder.end().0, Some(0));
    assert!(!Trace::open(&out).expect("a valid trace").rounds().is_empty());
    assert_sound(&guest);
}

#[test]
fn a_command_is_started_recorded_and_ended_and_one_that_ends_by_itself_is_no_error() {
    let test = "a_command_is_started_recorded_and_ended_and_one_that_ends_by_itself_is_no_error";
    if !attaching_or_skip(test) {
        return;
    }
    let folder = Folder::new();
    let socket = folder.path("guest");
    let program = env!("CARGO_BIN_EXE_pagecast");
    let guest = ["--", program, "guest", "--memory", "8MiB", "--socket", socket.to_str().expect("UTF-8")];
    let options = ["--shared", "--duration", "500ms", "--period", "10ms"];
    let recorded = record(&[&options[..], &guest[..]].concat(), &folder.path("command.pct.zst"));
    assert_eq!(recorded["ended"], "duration", "{recorded}");
    assert_matches(&folder.path("command.pct.zst"), &recorded);
    assert!(!crate::harness::runs_at(&socket), "the command was ended");
    let brief = ["--min-mapping", "4KiB", "--stack", "--period", "10ms", "--", "sleep", "0.3"];
    let recorded = record(&brief, &folder.path("brief.pct"));
    assert_eq!(recorded["ended"], "target-ended", "{recorded}");
    assert_matches(&folder.path("brief.pct"), &recorded);
}

#[test]
fn what_cannot_be_recorded_says_why_in_one_line() {
    let folder = Folder::new();
    let out = folder.path("none.pct");
    let out = out.to_str().expect("UTF-8");
    for (arguments, code, says) in [
        (vec!["--pid", "999999999"], 1, "there is no process"),
        (vec!["--pid", "1", "--period", "1us"], 2, "--period"),
        (vec!["--", "/nonexistent/program"], 1, "cannot start"),
        (vec!["--socket", "/nonexistent/socket"], 1, "does not answer"),
        (vec![], 2, "required"),
    ] {
        let output = run(&[&["record", "--out", out], &arguments[..]].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says) && said.trim_end().lines().count() == 1, "{arguments:?}: {said}");
    }
    // A place where nothing can be written is found out before a command is started for it.
    let (started, folders) = (folder.path("started"), folder.path(""));
    for (out, says) in [("none/t.pct", "none/t.pct.part"), ("", "is a directory")] {
        let (out, started) = (folders.join(out), started.to_str().expect("UTF-8"));
        let output = run(&["record", "--out", out.to_str().expect("UTF-8"), "--", "touch", started]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(says) && said.trim_end().lines().count() == 1, "{said}");
    }
    let left = std::fs::read_dir(&folders).expect("the folder is there").count();
    assert_eq!(left, 0, "no trace, no part of one, and nothing of the commands");
}
