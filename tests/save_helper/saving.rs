//! A save helper that saves keeps its word to libxl however the save ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustix::process::Signal;

use crate::delegation::{SAVE, stock, told};
use crate::fake_libxl::{ERROR, Helper, INFO, Said, SigTerm, WARN};
use crate::scripted::{DATA, UNDONE};

pub const TESTS: &[(&str, fn())] = &[
    ("a_save_that_succeeds_is_told_to_libxl_to_its_log_and_to_the_files", a_save_that_succeeds),
    ("files_that_cannot_be_written_only_warn", files_that_cannot_be_written),
    ("a_guest_that_is_not_suspended_fails_the_save", a_guest_that_is_not_suspended),
    ("sigterm_during_suspend_ends_the_save_at_once_and_libxl_in_order", sigterm_during_suspend),
    ("sigterm_during_precopy_ends_the_save_whatever_state_it_found", sigterm_during_precopy),
    ("the_death_of_libxl_ends_the_save", the_death_of_libxl),
    ("a_panic_is_told_to_libxl_after_everything_is_undone", a_panic_is_told),
    ("a_domain_that_is_not_ours_reaches_the_stock_helper_with_everything_as_it_was", not_ours),
    ("a_domain_that_is_found_not_ours_too_late_fails_the_save", not_ours_too_late),
];

fn start(script: &str, environment: &[(&str, &str)], sigterm: SigTerm) -> Helper {
    let mut all = vec![("SCRIPT", script)];
    all.extend(environment);
    Helper::start(&own(), SAVE, &all, sigterm)
}

/// This program: with a script it is a save helper.
fn own() -> PathBuf {
    std::env::current_exe().expect("its own path")
}

fn switch(enable: u32) -> Said {
    Said::SwitchQemuLogdirty { domid: 1, enable }
}

fn a_save_that_succeeds() {
    let folder = tempfile::tempdir().expect("a fresh folder");
    let at = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    let (report, summary) = (at("{domid}.json"), at("{domid}.txt"));
    let environment = [("PAGECAST_REPORT", report.as_str()), ("PAGECAST_SUMMARY", summary.as_str())];
    for live in [true, false] {
        let arguments = if live { SAVE.to_owned() } else { SAVE.replace(" 1 1 136", " 1 0 136") };
        let all = [[("SCRIPT", "whole")].as_slice(), &environment].concat();
        let mut helper = Helper::start(&own(), &arguments, &all, SigTerm::Default);
        helper.expect(switch(1));
        helper.answer(0);
        helper.expect(Said::Progress { doing_what: "memory".to_owned(), done: 1, total: 2 });
        helper.expect(Said::Suspend);
        helper.answer(1);
        assert_eq!(helper.read_stream(DATA.len()), DATA);
        helper.expect(switch(0));
        helper.answer(0);
        helper.hear_log(INFO, &["first line"]);
        helper.hear_log(INFO, &["last line"]);
        helper.expect_complete(0, 0);

        let report = fs::read_to_string(folder.path().join("1.json")).expect("a report");
        let wanted = serde_json::json!({ "event": "report", "domid": 1, "live": live });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&report).expect("JSON"), wanted);
        let summary = folder.path().join("1.txt");
        assert_eq!(fs::read_to_string(&summary).expect("a summary"), "first line\nlast line\n");
        assert_eq!(fs::metadata(&summary).expect("it is there").permissions().mode() & 0o777, 0o600);
    }
}

fn files_that_cannot_be_written() {
    let environment = [("PAGECAST_REPORT", "/nonexistent/{domid}"), ("PAGECAST_SUMMARY", "/dev/null/{time}")];
    let mut helper = start("whole", &environment, SigTerm::Default);
    helper.expect(switch(1));
    helper.answer(0);
    helper.expect(Said::Progress { doing_what: "memory".to_owned(), done: 1, total: 2 });
    helper.expect(Said::Suspend);
    helper.answer(1);
    helper.expect(switch(0));
    helper.answer(0);
    helper.hear_log(INFO, &["first line"]);
    helper.hear_log(INFO, &["last line"]);
    helper.hear_log(WARN, &["cannot write /nonexistent/1"]);
    helper.hear_log(WARN, &["cannot write /dev/null/2", "Not a directory"]);
    helper.expect_complete(0, 0);
}

fn a_guest_that_is_not_suspended() {
    let folder = tempfile::tempdir().expect("a fresh folder");
    let report = folder.path().join("report.json");
    let environment = [("PAGECAST_REPORT", report.to_str().expect("text"))];
    let mut helper = start("whole", &environment, SigTerm::Default);
    helper.expect(switch(1));
    helper.answer(0);
    helper.expect(Said::Progress { doing_what: "memory".to_owned(), done: 1, total: 2 });
    helper.expect(Said::Suspend);
    helper.answer(0);
    helper.expect(switch(0));
    helper.answer(0);
    helper.hear_log(ERROR, &["domain 1 is not saved: the guest was not suspended"]);
    helper.expect_complete(-1, libc::ETIMEDOUT);
    let report: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(report).expect("a report")).expect("JSON");
    assert_eq!(report["event"], "failed");
    assert_eq!(report["message"], "the guest was not suspended");

    // The same when it is qemu that does not do as it is told; its logging may be on all the same.
    let mut helper = start("whole", &[], SigTerm::Default);
    helper.expect(switch(1));
    helper.answer(-1);
    helper.expect(switch(0));
    helper.answer(-1);
    helper.hear_log(WARN, &["could not switch qemu's dirty logging off"]);
    helper.hear_log(ERROR, &["could not switch qemu's dirty logging on"]);
    helper.expect_complete(-1, libc::EIO);
}

fn sigterm_during_suspend() {
    for sigterm in [SigTerm::Default, SigTerm::Blocked, SigTerm::Ignored] {
        let mut helper = start("whole", &[], sigterm);
        helper.expect(switch(1));
        helper.answer(0);
        helper.expect(Said::Progress { doing_what: "memory".to_owned(), done: 1, total: 2 });
        helper.expect(Said::Suspend);
        helper.kill(Signal::TERM);
        // Before libxl answers everything is undone, and nothing is asked until it does.
        assert_eq!(helper.read_stream(UNDONE.len()), UNDONE);
        // Impatience changes nothing: libxl could not stand it if the save helper died now.
        helper.kill(Signal::TERM);
        helper.answer(1);
        helper.expect(switch(0));
        helper.answer(0);
        helper.hear_log(ERROR, &["interrupted by SIGTERM while libxl was to suspend the guest"]);
        helper.kill(Signal::TERM);
        helper.expect_complete(-1, libc::EINTR);
    }
}

fn sigterm_during_precopy() {
    for (sigterm, signal, name) in [
        (SigTerm::Default, Signal::TERM, "SIGTERM"),
        (SigTerm::Blocked, Signal::TERM, "SIGTERM"),
        (SigTerm::Ignored, Signal::TERM, "SIGTERM"),
        (SigTerm::Default, Signal::INT, "SIGINT"),
        (SigTerm::Default, Signal::HUP, "SIGHUP"),
    ] {
        let mut helper = start("precopy", &[], sigterm);
        helper.expect(switch(1));
        helper.answer(0);
        helper.expect(Said::Progress { doing_what: "memory".to_owned(), done: 1, total: 2 });
        helper.kill(signal);
        assert_eq!(helper.read_stream(UNDONE.len()), UNDONE);
        let said = loop {
            match helper.hear() {
                Said::Progress { .. } => {}
                said => break said,
            }
        };
        assert_eq!(said, switch(0));
        helper.answer(0);
        helper.hear_log(ERROR, &["interrupted by", name]);
        helper.expect_complete(-1, libc::EINTR);
    }
}

fn the_death_of_libxl() {
    // While it is asked, and while it is only told.
    for script in ["whole", "precopy"] {
        let mut helper = start(script, &[], SigTerm::Default);
        helper.expect(switch(1));
        helper.answer(0);
        helper.expect(Said::Progress { doing_what: "memory".to_owned(), done: 1, total: 2 });
        if script == "whole" {
            helper.expect(Said::Suspend);
        }
        helper.die();
        assert_eq!(helper.read_stream(UNDONE.len()), UNDONE);
        assert_eq!(helper.exit_code(), Some(1), "{script}");
    }
}

fn a_panic_is_told() {
    let mut helper = start("panic", &[], SigTerm::Default);
    helper.expect(switch(1));
    helper.answer(0);
    helper.expect(switch(0));
    helper.answer(0);
    helper.hear_log(ERROR, &["domain 1 is not saved: this is a bug in pagecast: of 2 eggs"]);
    helper.expect_complete(-1, libc::EIO);
}

fn not_ours() {
    let (_folder, stock) = stock();
    let environment = [("PAGECAST_STOCK_HELPER", stock.to_str().expect("text")), ("SCRIPT", "not ours")];
    for sigterm in [SigTerm::Default, SigTerm::Blocked, SigTerm::Ignored] {
        let without = told(&stock, SAVE, &environment, sigterm);
        assert_eq!(told(&own(), SAVE, &environment, sigterm), without, "{sigterm:?}");
    }
}

fn not_ours_too_late() {
    let (_folder, stock) = stock();
    let environment = [("PAGECAST_STOCK_HELPER", stock.to_str().expect("text"))];
    let mut helper = start("too late", &environment, SigTerm::Default);
    helper.expect(Said::Suspend);
    helper.answer(1);
    helper.hear_log(ERROR, &["this is a bug in pagecast: it found too late that it is a PV guest"]);
    helper.expect_complete(-1, libc::EIO);
}
