//! A guest that writes faster than the link carries: stopped, called off or slowed down, as the user wants it.

use std::path::Path;
use std::process::Stdio;

use pagecast::guest::arena::client::ArenaGuest;
use serde_json::Value;

use crate::harness::{
    Folder, Process, assert_sound, pagecast, runs_at, start_guest, start_receiver, start_send,
    tracking_or_skip, wait_until,
};

/// Five times as many writes as the link carries pages, all over memory: no order of sending can keep up. And so few that a guest
/// makes them also where many others want the processor.
const GUEST: [&str; 3] = ["--memory=16MiB", "--workload=storm", "--rate=15000"];
const LINK: [&str; 3] = ["--bandwidth=12500KB", "--budget=200ms", "--verify"];

/// Migrates the guest at `home` to `address`; exit code, the last line of JSON, what went to standard error.
fn send(home: &Path, address: &str, options: &[&str]) -> (Option<i32>, Value, String) {
    send_by(home, address, &[&LINK[..], options].concat())
}

/// The same with a link of its own.
fn send_by(home: &Path, address: &str, options: &[&str]) -> (Option<i32>, Value, String) {
    let mut command = pagecast();
    command.arg("send").arg("--json").arg("--socket").arg(home).arg(address).args(options);
    let output = command.stdin(Stdio::null()).output().expect("the program can be started");
    let lines = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let last = lines.lines().last().expect("it says something");
    let last = serde_json::from_str(last).expect("one JSON object a line");
    (output.status.code(), last, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The guest, once it runs at `socket`; it is ended with the value.
struct Moved(ArenaGuest);

impl Moved {
    fn to(socket: &Path) -> Self {
        Moved(ArenaGuest::connect(socket).expect("the guest answers"))
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let _ = self.0.quit();
    }
}

fn steps(report: &Value) -> &Vec<Value> {
    report["convergence"]["throttle"].as_array().expect("a list")
}

#[test]
fn a_storm_is_stopped_within_its_limits_and_the_report_says_why() {
    if !tracking_or_skip("a_storm_is_stopped_within_its_limits_and_the_report_says_why") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    drop(guest);
    let (_receiver, address) = start_receiver(&folder.path("away"), &["--die-with-parent"]);
    let (code, report, said) = send(&folder.path("home"), &address, &["--on-no-convergence=stop"]);
    assert_eq!(code, Some(0), "{said}");
    let seen = &report["convergence"];
    assert_eq!((&seen["decision"], &seen["on_no_convergence"]), (&"stop".into(), &"stop".into()), "{report}");
    assert!(seen["explanation"].as_str().is_some_and(|text| text.contains("budget 200 ms")), "{report}");
    assert_eq!(seen["reason"], report["stop_reason"]);
    assert!(steps(&report).is_empty(), "{report}");
    assert!(seen["backlog_downtime_ms"].as_f64().expect("a time") > 200.0, "it does not converge: {report}");
    let sent = seen["sent_over_memory"].as_f64().expect("a ratio");
    assert!(sent <= 2.2, "{report}");
    assert_sound(&Moved::to(&folder.path("away")).0);
}

#[test]
fn a_storm_is_called_off_with_figures_and_the_guest_runs_on_at_the_source() {
    if !tracking_or_skip("a_storm_is_called_off_with_figures_and_the_guest_runs_on_at_the_source") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    let (mut receiver, address) = start_receiver(&folder.path("away"), &["--die-with-parent"]);
    let (code, failed, said) = send(&folder.path("home"), &address, &["--on-no-convergence=abort"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("(budget 200 ms)") && said.contains("the guest runs on at the source"), "{said}");
    assert!(said.contains("converge") && said.contains("--on-no-convergence stop or throttle"), "{said}");
    assert_eq!((&failed["event"], &failed["convergence"]["decision"]), (&"failed".into(), &"abort".into()));
    assert_sound(&guest);
    assert!(!runs_at(&folder.path("away")));
    let (code, said) = receiver.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("lane 0: the source ended the migration (it called it off or went away) at "),
        "{said}"
    );
    assert!(said.contains("(record ") && said.trim_end().lines().count() == 1, "{said}");
}

#[test]
fn a_storm_that_is_slowed_down_converges_and_runs_at_full_speed_at_the_destination() {
    if !tracking_or_skip("a_storm_that_is_slowed_down_converges_and_runs_at_full_speed_at_the_destination") {
        return;
    }
    let folder = Folder::new();
    // It is kept so busy by its writes that in less time it makes fewer of them.
    let busy = ["--memory=64MiB", "--workload=storm", "--rate=60000"];
    let (_process, guest) = start_guest(&folder.path("home"), &busy);
    drop(guest);
    let (_receiver, address) = start_receiver(&folder.path("away"), &["--die-with-parent"]);
    let options = ["--bandwidth=50MB", "--budget=200ms", "--verify", "--on-no-convergence=throttle"];
    let (code, report, said) = send_by(&folder.path("home"), &address, &options);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(report["stop_reason"], "the rest fits the downtime budget", "{report}");
    assert!(report["convergence"]["backlog_downtime_ms"].as_f64().expect("a time") <= 200.0, "{report}");
    assert_eq!(steps(&report)[0]["percent"], 20, "{report}");
    assert!(steps(&report).windows(2).all(|pair| pair[0]["percent"].as_u64() < pair[1]["percent"].as_u64()));
    let moved = Moved::to(&folder.path("away"));
    assert_eq!(moved.0.throttle_percent().expect("the guest answers"), 0);
    assert_sound(&moved.0);
}

#[test]
fn whatever_ends_a_throttled_migration_the_source_is_at_full_speed_again() {
    if !tracking_or_skip("whatever_ends_a_throttled_migration_the_source_is_at_full_speed_again") {
        return;
    }
    // A budget that even the strongest throttle cannot meet.
    let options = ["--bandwidth=50MB", "--budget=1ms", "--on-no-convergence=throttle"];
    let ways: [fn(&mut Process, &mut Process); 3] =
        [|send, _| send.interrupt(), |send, _| send.kill(), |_, receiver| receiver.kill()];
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    for (number, end) in ways.into_iter().enumerate() {
        let away = folder.path(&format!("away-{number}"));
        let (mut receiver, address) = start_receiver(&away, &["--die-with-parent"]);
        let mut send = start_send(&folder.path("home"), &address, &options);
        let throttle = || guest.throttle_percent().expect("the guest answers");
        wait_until("the guest is slowed down", || throttle() > 0);
        let mut other = ArenaGuest::connect(&folder.path("home")).expect("the guest answers");
        let refused =
            [pagecast::guest::GuestControl::throttle(&mut other, 0).is_err(), other.quit().is_err()];
        assert_eq!(refused, [true, true], "it is not for others to say");
        end(&mut send, &mut receiver);
        let (code, said) = send.end();
        assert_eq!(code, [Some(3), None, Some(1)][number], "{said}");
        wait_until("the throttle is off", || throttle() == 0);
        assert_sound(&guest);
    }
}

#[test]
fn at_the_deadline_a_throttled_guest_is_stopped() {
    if !tracking_or_skip("at_the_deadline_a_throttled_guest_is_stopped") {
        return;
    }
    let folder = Folder::new();
    let (_process, guest) = start_guest(&folder.path("home"), &GUEST);
    drop(guest);
    let (_receiver, address) = start_receiver(&folder.path("away"), &["--die-with-parent"]);
    let options = ["--on-no-convergence=throttle", "--budget=1ms", "--max-time=3s"];
    let mut command = pagecast();
    command.arg("send").arg("--json").arg("--socket").arg(folder.path("home")).arg(&address);
    let output = command.arg("--bandwidth=50MB").args(options).output().expect("the program can be started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_str(said.lines().last().expect("a report")).expect("JSON");
    assert_eq!(report["stop_reason"], "the time limit was reached", "{report}");
    assert!(!steps(&report).is_empty(), "{report}");
    let moved = Moved::to(&folder.path("away"));
    assert_eq!(moved.0.throttle_percent().expect("the guest answers"), 0);
    assert_sound(&moved.0);
}
