//! What is said of a recording: a line while it runs, a table or a JSON line when it is done.

use std::time::Duration;

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use super::ms;
use crate::page::PAGE_SIZE;
use crate::trace::record::{Ended, Recording, Status};

/// A line of progress.
pub fn line(status: &Status) -> String {
    format!(
        "{:>5.1} s  recording   {:>6} rounds  {:>7} pages tracked ({} MiB)  dirty {:>6} pages, {:>7.0} pages/s  \
         scan {:.2} ms",
        status.elapsed.as_secs_f64(),
        status.rounds,
        status.tracked_pages,
        mib(status.tracked_pages),
        status.dirty_pages,
        rate(status),
        ms(status.scan),
    )
}

/// The same for programs.
pub fn progress(status: &Status) -> Value {
    json!({
        "event": "recording",
        "elapsed_ms": ms(status.elapsed),
        "rounds": status.rounds,
        "pages_tracked": status.tracked_pages,
        "pages_dirty": status.dirty_pages,
        "dirty_pages_per_s": rate(status).round(),
        "scan_ms": ms(status.scan),
    })
}

fn rate(status: &Status) -> f64 {
    // Round 0 tells what is populated and not what is written.
    if status.rounds < 2 { 0.0 } else { per_s(status.dirty_pages, status.interval) }
}

fn per_s(count: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

fn mib(pages: u64) -> u64 {
    (pages * PAGE_SIZE as u64) >> 20
}

/// What the tracking cost the target, as far as it can be told: one fault for each page written in a round.
fn estimated_fault_time(recording: &Recording, fault_cost: Option<Duration>) -> Option<Duration> {
    Some(fault_cost?.mul_f64(recording.dirty_pages.total as f64))
}

/// The line of a finished recording. Times are milliseconds or, in spreads, microseconds where the name says so.
pub fn report(recording: &Recording, path: &str, bytes: u64, fault_cost: Option<Duration>) -> Value {
    let r = recording;
    let toll = r.toll.map(|toll| {
        json!({
            "processes_attached": toll.attached,
            "processes_not_attached": toll.not_attached,
            "mappings_skipped": toll.skipped_mappings,
            "stopped_ms": ms(toll.stopped),
            "stopped_most_ms": ms(toll.stopped_most),
            "minor_faults": toll.minor_faults,
            "cpu_ms": ms(toll.cpu),
        })
    });
    json!({
        "event": "recorded",
        "file": path,
        "file_bytes": bytes,
        "ended": r.ended,
        "elapsed_ms": ms(r.elapsed),
        "rounds": r.rounds,
        "rounds_missed": r.missed,
        "pages_tracked": r.tracked_pages,
        "pages_first": r.first_pages,
        "pages_touched": r.touched_pages,
        "pages_dirty": r.dirty_pages,
        "dirty_pages_per_s": per_s(r.dirty_pages.total, r.elapsed),
        "interval_us": r.interval_us,
        "scan_us": r.scan_us,
        "cpu_ms": ms(r.cpu),
        "fault_cost_measured_ns": fault_cost.map(|cost| cost.as_nanos() as u64),
        "fault_time_estimated_ms": estimated_fault_time(r, fault_cost).map(ms),
        "target": toll,
    })
}

/// The table of a finished recording.
pub fn table(recording: &Recording, path: &str, bytes: u64, fault_cost: Option<Duration>) -> String {
    let r = recording;
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("trace", format!("{path}, {:.1} MiB", bytes as f64 / 1_048_576.0));
    row("ended because", ended_text(r.ended).to_owned());
    row("recorded", format!("{:.1} s in {} rounds, {} missed", r.elapsed.as_secs_f64(), r.rounds, r.missed));
    let of_interval = |value: u64| value as f64 / 1e3;
    let interval = r.interval_us;
    row(
        "  between rounds, p50 / p99 / max",
        format!(
            "{:.1} / {:.1} / {:.1} ms",
            of_interval(interval.p50),
            of_interval(interval.p99),
            of_interval(interval.max)
        ),
    );
    row("id space", format!("{} pages ({} MiB)", r.tracked_pages, mib(r.tracked_pages)));
    row("  populated at the start", r.first_pages.to_string());
    row("  written at least once since", r.touched_pages.to_string());
    let dirty = r.dirty_pages;
    row("dirty pages per second", format!("{:.0}", per_s(dirty.total, r.elapsed)));
    row(
        "  a round: mean / p50 / p99 / max",
        format!("{} / {} / {} / {}", dirty.mean, dirty.p50, dirty.p99, dirty.max),
    );
    let scan = r.scan_us;
    let share = r.cpu.as_secs_f64() / r.elapsed.as_secs_f64().max(1e-9) * 100.0;
    row(
        "scan: mean / p50 / p99 / max",
        format!(
            "{:.2} / {:.2} / {:.2} / {:.2} ms; recording took {share:.1} % of a core",
            of_interval(scan.mean),
            of_interval(scan.p50),
            of_interval(scan.p99),
            of_interval(scan.max)
        ),
    );
    if let Some(toll) = r.toll {
        row(
            "attached to",
            format!(
                "{} processes, a thread stopped {:.2} ms at most, {:.2} ms in all",
                toll.attached,
                ms(toll.stopped_most),
                ms(toll.stopped)
            ),
        );
        if toll.not_attached > 0 || toll.skipped_mappings > 0 {
            row(
                "  NOT tracked",
                format!("{} processes, {} mappings", toll.not_attached, toll.skipped_mappings),
            );
        }
        row(
            "target meanwhile",
            format!("{} minor faults, {:.2} s of CPU time", toll.minor_faults, toll.cpu.as_secs_f64()),
        );
        if let (Some(time), Some(cost)) = (estimated_fault_time(r, fault_cost), fault_cost) {
            let share = time.as_secs_f64() / toll.cpu.as_secs_f64().max(1e-9) * 100.0;
            row(
                "  of that for the tracking, at least",
                format!(
                    "estimate: {} faults of {:.2} us as measured here, {:.2} s, {share:.0} % of its CPU time",
                    dirty.total,
                    cost.as_nanos() as f64 / 1e3,
                    time.as_secs_f64()
                ),
            );
        }
    }
    table.to_string()
}

fn ended_text(ended: Ended) -> &'static str {
    match ended {
        Ended::Duration => "its time was up",
        Ended::Interrupted => "it was interrupted",
        Ended::TargetEnded => "the target ended",
    }
}
