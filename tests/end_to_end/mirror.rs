//! Mirroring: the image of a process through the whole pipeline, compared at the stop, and the process left as it was.

use std::process::Stdio;
use std::time::Duration;

use pagecast::guest::process::proc::Stat;
use serde_json::Value;

use crate::harness::{Folder, Process, assert_sound, pagecast, run, start_guest, start_receiver, wait_until};
use crate::record::attaching_or_skip;

/// Mirrors a process and returns the last lines: the migration's report, and what became of the image.
fn mirror(arguments: &[&str]) -> (Value, Value) {
    let all = [&["mirror", "--json", "--shared", "--max-time", "5s"], arguments].concat();
    let output = run(&all);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{all:?}: {said}");
    let lines = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let line = |event: &str| {
        let mut parsed = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        parsed.find(|line| line["event"] == event).expect("a line of each kind")
    };
    (line("report"), line("mirrored"))
}

fn assert_equal(report: &Value, mirrored: &Value) {
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(mirrored["pages_verified"], report["pages"], "{mirrored}");
    assert_eq!(mirrored["mappings_skipped"], 0, "{mirrored}");
    // The guest's 32 MiB, of which a quarter is never touched, and a few pages of the program's own.
    assert!(mirrored["pages_populated"].as_u64() > Some(6000), "{mirrored}");
    let said = mirrored["destination_said"].as_str().expect("a text");
    assert!(said.contains("cannot run here"), "{mirrored}");
}

const BUSY: [&str; 6] = ["--memory", "32MiB", "--workload", "uniform", "--seed", "5"];

#[test]
fn a_running_process_is_mirrored_without_a_differing_page_and_runs_on() {
    if !attaching_or_skip("a_running_process_is_mirrored_without_a_differing_page_and_runs_on") {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &BUSY);
    let pid = process.0.id().to_string();
    for options in [&[][..], &["--lanes", "3"], &["--policy", "xen-skip"], &["--send", "copy"]] {
        let (report, mirrored) = mirror(&[&["--pid", &pid], options].concat());
        assert_equal(&report, &mirrored);
        assert!(report["bytes_staged"].as_u64() > Some(0), "foreign memory cannot be sent from: {report}");
        assert_sound(&guest);
    }
}

#[test]
fn an_image_can_go_to_a_receiver_of_ones_own() {
    if !attaching_or_skip("an_image_can_go_to_a_receiver_of_ones_own") {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &BUSY);
    let (mut receiver, address) = start_receiver(&folder.path("image"), &[]);
    let (report, mirrored) = mirror(&["--pid", &process.0.id().to_string(), "--to", &address]);
    assert_equal(&report, &mirrored);
    assert_eq!(receiver.end().0, Some(0));
    assert_sound(&guest);
}

#[test]
fn a_killed_or_interrupted_mirror_leaves_the_process_running() {
    if !attaching_or_skip("a_killed_or_interrupted_mirror_leaves_the_process_running") {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &BUSY);
    let pid = process.0.id();
    for cycle in 0..16 {
        let mut command = pagecast();
        command.args(["mirror", "--json", "--shared", "--max-time", "200ms", "--pid", &pid.to_string()]);
        // What a killed one leaves behind goes with this.
        command.env("TMPDIR", &folder.0);
        let mut mirror = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
        // From before the attachment to after the end, the stop among it.
        std::thread::sleep(Duration::from_millis(60 * cycle));
        if cycle % 2 == 0 {
            mirror.kill();
        } else {
            mirror.interrupt();
        }
        let _ = mirror.end();
        wait_until("the process is not stopped", || Stat::of(pid as i32).expect("it lives").state != b'T');
    }
    assert_sound(&guest);
    let (report, mirrored) = mirror(&["--pid", &pid.to_string()]);
    assert_equal(&report, &mirrored);
    assert_sound(&guest);
}

#[test]
fn a_receiver_that_dies_leaves_the_process_running() {
    if !attaching_or_skip("a_receiver_that_dies_leaves_the_process_running") {
        return;
    }
    let folder = Folder::new();
    let (process, guest) = start_guest(&folder.path("guest"), &BUSY);
    let (mut receiver, address) = start_receiver(&folder.path("image"), &[]);
    let mut command = pagecast();
    command.args(["mirror", "--shared", "--bandwidth", "10MB", "--to", &address, "--pid"]);
    command.arg(process.0.id().to_string());
    let mut mirror = Process::start(command.stdout(Stdio::null()).stderr(Stdio::piped()));
    std::thread::sleep(Duration::from_millis(700));
    receiver.kill();
    let (code, said) = mirror.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.lines().last().is_some_and(|line| line.contains("runs on")), "{said}");
    assert_sound(&guest);
}
