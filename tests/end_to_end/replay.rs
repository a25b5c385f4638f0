//! Replays of recorded traces, checked by a program that shares no code with pagecast.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pagecast::trace::format::{Round, Run, runs_of};
use pagecast::trace::writer::{Heading, TraceWriter};
use serde_json::Value;

use crate::harness::{Folder, pagecast, run};

/// 106,496 pages, 1000 rounds of 50 ms.
fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces/numpy-periodic-2s.pct.zst")
}

/// Four chunks, 300 rounds of 10 ms, uncompressed: a hot chunk, a sweep, and a page now and then.
fn made(folder: &Folder) -> PathBuf {
    let path = folder.path("made.pct");
    let heading = Heading { name: "made".to_owned(), period_us: 10_000 };
    let mut writer = TraceWriter::create(&path, &heading).expect("a fresh folder can be written to");
    for number in 0..300u32 {
        let mut pages: BTreeSet<u32> = (0..100).map(|page| 512 + (page * 7 + number * 13) % 512).collect();
        pages.extend((0..20).map(|page| 1024 + (number * 20 + page) % 1024));
        pages.insert(number * 37 % 512);
        let runs: Vec<Run> = runs_of(pages).collect();
        let round = Round { t_ns: u64::from(number) * 10_000_000, scan_us: 0, dirty: 0, tracked_pages: 2048 };
        writer.round(round, runs).expect("a round can be written");
    }
    writer.finish(&[5, 9, 7, 3]).expect("a trace can be finished");
    path
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("test paths are plain")
}

/// The JSON lines of a run that works.
fn lines(arguments: &[&str]) -> Vec<Value> {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect()
}

fn check(trace: &Path, decisions: &Path, base: &str, start: &str) -> Output {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/check-decisions");
    Command::new("python3")
        .arg(tool)
        .args([trace, decisions])
        .args(["--base", base, "--start", start])
        .output()
        .expect("python3 can be started")
}

fn have(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Says that a test, or a part of it, does not run; past the harness, which hides what a passing test prints.
fn skip(what: &str) {
    writeln!(std::io::stderr(), "SKIPPED: {what}").expect("stderr can be written to");
}

/// Compares one replay with the independent check of its decisions.
fn compare(trace: &Path, folder: &Folder, policy: &str, base: &str, start: &str, order: &str) {
    let what = format!("{policy} base {base} start {start} order {order} over {}", trace.display());
    let decisions = folder.path("decisions");
    let replayed = lines(&[
        "replay",
        path_text(trace),
        "--json",
        "--policy",
        policy,
        "--base",
        base,
        "--starts",
        start,
        "--shuffle",
        order,
        "--decisions",
        path_text(&decisions),
    ]);
    let output = check(trace, &decisions, base, start);
    assert!(output.status.success(), "{what}: {}", text(&output.stderr));
    let checked: Value = serde_json::from_slice(&output.stdout).expect("a JSON object");
    let ours = &replayed[0];
    for name in
        ["pages", "start_round", "stop_round", "pages_sent", "backlog_pages", "pages_wasted", "t_star_rounds"]
    {
        assert_eq!(checked[name], ours[name], "{what}: {name}");
    }
    for name in ["tmt_s", "downtime_s", "rho", "t_star_s", "base_s"] {
        let (theirs, ours) = (checked[name].as_f64(), ours[name].as_f64());
        let same = match (theirs, ours) {
            (Some(theirs), Some(ours)) => (theirs - ours).abs() < 1e-9,
            (theirs, ours) => theirs.is_none() && ours.is_none(),
        };
        assert!(same, "{what}: {name} is {theirs:?} and not {ours:?}");
    }
    // Null where the end of the trace leaves open which it was.
    assert!(checked["converged"].is_null() || checked["converged"] == ours["converged"], "{what}: converged");
}

#[test]
fn an_independent_check_of_the_decisions_finds_what_the_table_says() {
    if !have("python3") {
        return skip("checking decisions: python3 is not here");
    }
    let folder = Folder::new();
    let made = made(&folder);
    for policy in ["xen", "xen:budget", "xen-skip", "xen-skip:own", "paper", "heat", "ar", "ar:budget"] {
        for order in ["none", "5"] {
            for base in ["170ms", "500ms"] {
                compare(&made, &folder, policy, base, "37", order);
            }
        }
    }
    if !have("zstd") {
        return skip("checking decisions on a compressed trace: zstd is not here (Debian: zstd)");
    }
    for policy in ["xen", "xen-skip", "paper", "ar"] {
        compare(&recorded(), &folder, policy, "1.7s", "125", "3");
    }
}

#[test]
fn the_independent_check_refuses_decisions_that_break_a_rule() {
    if !have("python3") {
        return skip("checking decisions: python3 is not here");
    }
    let folder = Folder::new();
    let (made, decisions) = (made(&folder), folder.path("decisions"));
    // 2048 pages in a second: 20.48 a round.
    for (wrong, says) in [
        ("t 50\ns 0 22\nstop 60\n", "where the link carries"),
        ("t 50\ns 0 5\ns 4 5\nstop 60\n", "page 4 is sent twice"),
        ("t 50\ns 2040 9\nstop 60\n", "page 2048 of 2048"),
        ("t 50\ns 0 5\nt 49\nstop 60\n", "round 49 after round 50"),
        ("t 49\ns 0 5\nstop 60\n", "round 49 is not between"),
        ("t 60\ns 0 5\nstop 60\n", "round 60 is not between"),
        ("t 50\ns 0 5\nstop 301\n", "trace's end at 300"),
        ("t 50\ns 0 5\n", "no stop"),
        ("t 50\ns 0 0\nstop 60\n", "line 2: not understood"),
        ("stop 60\nt 61\n", "nothing may follow"),
    ] {
        std::fs::write(&decisions, wrong).expect("a fresh folder can be written to");
        let output = check(&made, &decisions, "1s", "50");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{wrong:?}: {said}");
        assert!(said.contains(says), "{wrong:?}: {said}");
    }
    // Nothing sent: everything is left.
    std::fs::write(&decisions, "stop 60\n").expect("a fresh folder can be written to");
    let checked: Value =
        serde_json::from_slice(&check(&made, &decisions, "1s", "50").stdout).expect("an object");
    assert_eq!((checked["backlog_pages"].as_u64(), checked["tmt_s"].as_f64()), (Some(2048), Some(1.1)));
}

/// Without what differs from run to run.
fn steady(mut line: Value) -> Value {
    line["forecast_ns_per_dirty_page"] = Value::Null;
    line
}

#[test]
fn every_combination_has_a_line_and_their_order_does_not_depend_on_the_cores() {
    let folder = Folder::new();
    let (made, recorded) = (made(&folder), recorded());
    let arguments = |jobs: &'static str| {
        let mut arguments = vec!["replay", path_text(&made), path_text(&recorded), "--json", "--jobs", jobs];
        arguments.extend(["--policy", "all,ar:budget", "--base", "300ms,600ms", "--starts", "1/8,200"]);
        arguments.extend(["--shuffle", "none,4", "--budget", "50ms,300ms"]);
        lines(&arguments).into_iter().map(steady).collect::<Vec<_>>()
    };
    let alone = arguments("1");
    assert_eq!(alone.len(), 2 * 6 * 2 * 2 * 2 * 2);
    assert_eq!(alone, arguments("4"));
    let of = |line: &Value, name: &str| line[name].to_string();
    let names = ["trace", "shuffle", "base_s", "budget_s", "start_round", "policy"];
    let combinations: BTreeSet<Vec<String>> =
        alone.iter().map(|line| names.iter().map(|name| of(line, name)).collect()).collect();
    assert_eq!(combinations.len(), alone.len());
    let starts: BTreeSet<u64> = alone.iter().filter_map(|line| line["start_round"].as_u64()).collect();
    assert_eq!(starts, BTreeSet::from([37, 125, 200]), "an eighth of 300 and of 1000 rounds");
    for line in &alone {
        let (Some(t_star_s), Some(tmt_s)) = (line["t_star_s"].as_f64(), line["tmt_s"].as_f64()) else {
            continue;
        };
        assert!(line["converged"] == false || tmt_s >= t_star_s - 1e-9, "faster than possible: {line}");
    }
}

#[test]
fn the_bound_is_the_one_that_replays_are_measured_by() {
    let recorded = recorded();
    for base in ["500ms", "1500ms", "3s"] {
        let replayed = lines(&["replay", path_text(&recorded), "--json", "--policy", "heat", "--base", base]);
        let bound = lines(&["bound", path_text(&recorded), "--json", "--base", base]);
        for name in
            ["trace", "base_s", "budget_s", "start_round", "pages", "t_star_s", "t_star_rounds", "feasible"]
        {
            assert_eq!(replayed[0][name], bound[0][name], "{name} at {base}");
        }
    }
}

#[test]
fn a_summary_brings_its_own_yardsticks_and_shows_only_what_was_asked_for() {
    let folder = Folder::new();
    let made = made(&folder);
    let common = ["replay", path_text(&made), "--policy", "ar", "--base", "200ms,400ms", "--summary"];
    let mut said = lines(&[&common[..], &["--json"]].concat());
    let summary = said.pop().expect("the summary is last");
    assert_eq!(said.len(), 2);
    assert!(said.iter().all(|line| line["policy"] == "ar"));
    let of = summary["summary"].as_array().expect("a list");
    assert_eq!((of.len(), &of[0]["policy"]), (1, &Value::from("ar")));
    assert!(of[0]["tractable"].is_object(), "{summary}");
}

#[test]
fn pictures_are_written_for_one_replay_many_and_the_bound() {
    let folder = Folder::new();
    let made = made(&folder);
    let (made, out) = (path_text(&made), |name: &str| folder.path(name));
    let (one, many) = (out("one.svg"), out("many.html"));
    let (bound, map) = (out("bound.svg"), out("map.html"));
    for arguments in [
        vec!["replay", made, "--policy", "ar", "--base", "200ms", "--plot", path_text(&one)],
        vec!["replay", made, "--base", "200ms,400ms", "--plot", path_text(&many)],
        vec!["bound", made, "--base", "200ms", "--plot", path_text(&bound), "--heatmap", path_text(&map)],
    ] {
        let output = run(&arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    }
    for (path, says) in [
        (one, vec!["backlog", "held back", "written", "sent", "T*", "[s]", "pages [thousands]"]),
        (many, vec!["xen-skip", "TMT / T*", "rho: transmissions / pages", "<table>"]),
        (bound, vec!["least downtime [s]", "budget", "pages [thousands]", "time before that stop [s]"]),
        (map, vec!["interval [s]", "page by its id in the trace [thousands]", "<table>"]),
    ] {
        let picture = std::fs::read_to_string(&path).expect("the picture is there");
        assert!(picture.contains("<svg") && picture.contains("</svg>"), "{}", path.display());
        for word in says {
            assert!(picture.contains(word), "{word:?} is not in {}", path.display());
        }
    }
}

#[test]
fn what_cannot_be_replayed_is_said_in_one_line() {
    let folder = Folder::new();
    let (made, empty) = (made(&folder), folder.path("empty.pct"));
    std::fs::write(&empty, "").expect("a fresh folder can be written to");
    let made = path_text(&made);
    for (arguments, exit, says) in [
        (vec!["replay"], 2, "<TRACE>"),
        (vec!["replay", "/nowhere.pct"], 1, "/nowhere.pct"),
        (vec!["replay", path_text(&empty)], 1, "not a valid trace"),
        (vec!["replay", made, "--policy", "best"], 2, "xen-skip"),
        (vec!["replay", made, "--policy", "ar:soon"], 2, "ar:budget"),
        (vec!["replay", made, "--starts", "300"], 1, "rounds 0 to 299"),
        (vec!["replay", made, "--starts", "8/8"], 2, "3/8"),
        (vec!["replay", made, "--base", "0s"], 2, "--base"),
        (vec!["replay", made, "--bandwidth", "none"], 2, "2.5Gbit"),
        (vec!["replay", made, "--shuffle", "x"], 2, "none"),
        (vec!["replay", made, "--decisions", "/tmp/d"], 2, "single replay and these are 4"),
        (vec!["replay", made, "--policy", "ar", "--decisions", "/nowhere/d"], 1, "/nowhere/d"),
        (vec!["replay", made, "--plot", "out.png"], 2, ".svg or .html"),
        (vec!["bound", made, "--base", "1s,2s", "--plot", "out.svg"], 2, "2 combinations"),
        (vec!["bound", made, made, "--heatmap", "out.svg"], 2, "one trace"),
    ] {
        let output = run(&arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {said}");
        assert!(said.contains(says) && said.trim_end().lines().count() == 1, "{arguments:?}: {said}");
    }
}

#[test]
fn files_stay_as_they_are_until_there_is_something_to_write() {
    let folder = Folder::new();
    let (made, decisions) = (made(&folder), folder.path("d.txt"));
    let (made, decisions) = (path_text(&made), path_text(&decisions));
    let whole = std::fs::read(made).expect("it was made");
    std::fs::write(decisions, "before").expect("a fresh folder can be written to");
    let one = ["--policy", "ar", "--base", "1s", "--starts", "1/8"];
    for (arguments, exit, says) in [
        (["replay", "/nowhere.pct", "--decisions", decisions], 1, "/nowhere.pct"),
        (["replay", made, "--decisions", made], 2, "would be overwritten"),
        (["replay", made, "--plot", "/nowhere/p.svg"], 1, "/nowhere/p.svg"),
    ] {
        let output = run(&[&arguments[..], &one[..]].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {said}");
        assert!(said.contains(says) && output.stdout.is_empty(), "{arguments:?}: {said}");
    }
    assert_eq!(std::fs::read(made).expect("it is still there"), whole);
    assert_eq!(std::fs::read_to_string(decisions).expect("it is still there"), "before");
}

#[test]
fn what_cannot_be_written_down_is_no_success() {
    let folder = Folder::new();
    let made = made(&folder);
    for command in ["replay", "bound"] {
        let full = std::fs::File::options().write(true).open("/dev/full").expect("it is always full");
        let mut process = pagecast();
        process.args([command, path_text(&made)]).stdout(full);
        let output = process.stderr(Stdio::piped()).output().expect("the program can be started");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("cannot write to standard output"), "{said}");
    }
}

/// What `perf/policies test` shows, as far as it is to stay so: replays do not depend on the machine.
#[test]
fn on_the_test_half_ar_is_ahead_of_heat_and_heat_of_xen_skip() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces/test");
    let traces: Vec<String> = std::fs::read_dir(&folder)
        .expect("the traces are part of the repository")
        .map(|entry| path_text(&entry.expect("a folder can be read").path()).to_owned())
        .filter(|path| path.ends_with(".pct.zst"))
        .collect();
    assert!(traces.len() >= 7, "{traces:?}");
    let mut arguments = vec!["replay"];
    arguments.extend(traces.iter().map(String::as_str));
    arguments.extend("--base 1.5s,3s,6s --starts 1/8,3/8,5/8 --budget 300ms --shuffle none,1".split(' '));
    arguments.extend("--policy xen-skip,heat,ar --json --summary".split(' '));
    let lines = lines(&arguments);
    let summary =
        lines.last().and_then(|line| line["summary"].as_array()).expect("the last line is the summary");
    let figure =
        |policy: usize, group: &str, name: &str| summary[policy][group][name].as_f64().expect("a figure");
    let tractable = |policy| figure(policy, "tractable", "tmt_over_t_star");
    assert!(tractable(2) < tractable(1) && tractable(1) < tractable(0), "{summary:?}");
    assert!(tractable(2) <= 1.135 && figure(2, "tractable", "rho") <= 1.137, "{summary:?}");
    assert!(figure(2, "feasible", "tmt_over_t_star") <= 1.175, "{summary:?}");
    let pairs = figure(2, "tractable", "pairs");
    assert_eq!(figure(2, "tractable", "within_budget"), pairs, "every tractable pair is within the budget");
    assert!(figure(2, "infeasible", "rho_max") <= 2.2, "{summary:?}");
    assert!(figure(2, "infeasible", "downtime_over_xen") < 1.0, "{summary:?}");
}
