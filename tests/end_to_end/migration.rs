//! Migrations that go well: every workload, every policy, every way to send.

use serde_json::Value;

use crate::harness::{run, tracking_or_skip};

/// Runs a demonstration and returns its report lines.
fn demo(arguments: &[&str]) -> Vec<Value> {
    let mut all = vec!["demo", "--json", "--memory", "64MiB", "--warm-up", "300ms", "--run-on", "200ms"];
    all.extend(arguments);
    let output = run(&all);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{all:?}: {said}");
    let lines = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let lines =
        lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("one JSON object a line"));
    lines.filter(|line| line["event"] == "report").collect()
}

fn assert_sound(report: &Value) {
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(report["guest_errors"], 0, "{report}");
    let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{key} in {report}"));
    assert_eq!(number("pages_sent"), number("pages") + number("pages_wasted"));
    assert!(number("pages_sent") >= number("pages"));
    for key in ["tmt_ms", "downtime_ms", "rho"] {
        assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{key} in {report}");
    }
    for stage in ["scan", "map", "send", "receive"] {
        assert!(report["cpu_s_per_gb"][stage].as_f64().is_some_and(|value| value >= 0.0), "{report}");
    }
}

#[test]
fn every_workload_is_migrated_whole_and_runs_on() {
    if !tracking_or_skip("every_workload_is_migrated_whole_and_runs_on") {
        return;
    }
    for workload in ["idle", "kv", "uniform", "sweep", "gc", "phases", "storm"] {
        let seed = std::process::id().to_string();
        let reports = demo(&["--workload", workload, "--seed", &seed, "--policy", "ar", "--max-time", "5s"]);
        assert_eq!(reports.len(), 1);
        assert_eq!(reports[0]["workload"], workload);
        assert_sound(&reports[0]);
    }
}

#[test]
fn every_policy_and_every_way_to_send_loses_nothing() {
    if !tracking_or_skip("every_policy_and_every_way_to_send_loses_nothing") {
        return;
    }
    for policy in ["ar", "heat", "paper", "xen-skip", "xen"] {
        assert_sound(&demo(&["--policy", policy, "--bandwidth", "1Gbit"])[0]);
    }
    for send in ["direct", "staged", "staged-copy", "copy", "auto"] {
        let report = &demo(&["--policy", "ar", "--workload", "storm", "--send", send, "--max-time", "3s"])[0];
        assert_sound(report);
        let copied = report["bytes_copied"].as_u64().expect("a count");
        let zero_copied = report["bytes_zero_copied"].as_u64().expect("a count");
        let sent = report["bytes_sent"].as_u64().expect("a count");
        assert_eq!(copied + zero_copied, sent, "every byte is accounted for: {report}");
        assert_eq!(
            report["bytes_staged"].as_u64().expect("a count") > 0,
            send.starts_with("staged"),
            "{report}"
        );
    }
}

#[test]
fn every_stage_that_ran_tells_how_long_it_took_for_every_slot() {
    if !tracking_or_skip("every_stage_that_ran_tells_how_long_it_took_for_every_slot") {
        return;
    }
    for send in ["direct", "staged", "staged-copy", "copy"] {
        let report = &demo(&["--policy", "xen", "--workload", "idle", "--lanes", "2", "--send", send])[0];
        let latencies = report["latency_us"].as_object().expect("an object");
        let count = |stage: &str| latencies.get(stage).map(|times| times["count"].as_u64().expect("a count"));
        let slots = count("send").expect("slots were sent");
        assert!(slots > 0 && count("map") == Some(slots), "{report}");
        assert_eq!(count("copy"), send.starts_with("staged").then_some(slots), "{report}");
        // Of each slot one send goes without copying, and that owes one notification.
        assert_eq!(count("notify"), (!send.ends_with("copy")).then_some(slots), "{report}");
        assert_eq!(count("tick"), report["samples"].as_u64(), "{report}");
        for times in latencies.values() {
            let of = |key: &str| times[key].as_f64().expect("a number");
            assert!(0.0 < of("p50") && of("p50") <= of("p90"), "{report}");
            assert!(of("p90") <= of("p99") && of("p99") <= of("max"), "{report}");
        }
    }
}

#[test]
fn the_report_says_what_the_connections_and_the_slots_are() {
    if !tracking_or_skip("the_report_says_what_the_connections_and_the_slots_are") {
        return;
    }
    // Every Linux has reno, and lets everybody choose it.
    let idle = ["--policy", "xen", "--workload", "idle", "--congestion", "reno"];
    for (send, pages, small) in [("staged", "auto", true), ("staged", "huge", false), ("copy", "small", true)]
    {
        let report = &demo(&[&idle[..], &["--send", send, "--slot-pages", pages]].concat())[0];
        assert_sound(report);
        assert_eq!(report["congestion_control"], "reno", "{report}");
        // Whether there are huge pages is up to the machine.
        assert!(!small || report["slot_memory"] == "4 KiB pages", "{report}");
        assert!(report["downtime"]["page_faults"].is_u64(), "{report}");
    }
}

#[test]
fn several_lanes_carry_one_guest() {
    if !tracking_or_skip("several_lanes_carry_one_guest") {
        return;
    }
    for lanes in ["2", "3"] {
        for send in ["direct", "staged"] {
            assert_sound(&demo(&["--policy", "ar", "--lanes", lanes, "--send", send])[0]);
        }
    }
}

#[test]
fn the_comparison_runs_all_four_policies_on_the_same_guest() {
    if !tracking_or_skip("the_comparison_runs_all_four_policies_on_the_same_guest") {
        return;
    }
    let reports = demo(&["--compare", "--seed", "7", "--bandwidth", "1Gbit"]);
    let policies: Vec<_> = reports.iter().map(|report| report["policy"].clone()).collect();
    assert_eq!(policies, ["ar", "xen-skip", "xen", "paper"]);
    for report in &reports {
        assert_sound(report);
        assert_eq!(report["seed"], 7);
    }
}

#[test]
fn a_bandwidth_cap_is_kept() {
    if !tracking_or_skip("a_bandwidth_cap_is_kept") {
        return;
    }
    let report = &demo(&["--policy", "xen", "--workload", "idle", "--bandwidth", "100MB"])[0];
    let rate =
        report["bytes_sent"].as_f64().expect("a count") / report["tmt_ms"].as_f64().expect("a time") * 1e3;
    // A cap bounds from above whatever the machine does; 10 ms of burst are allowed.
    assert!(rate <= 100e6 * 1.05, "{rate} bytes/s: {report}");
}
