//! JSON lines: `{"event":"progress",…}` while a migration runs, `{"event":"report",…}` when one is done.

use serde::Serialize;
use serde_json::{Value, json};

use super::{Report, ms, per_gb};
use crate::forecast::{Convergence, PolicyKind};
use crate::pipeline::latency::Latencies;
use crate::pipeline::outcome::{Migration, Progress};

/// One progress line.
pub fn progress(progress: &Progress) -> Value {
    json!({
        "event": "progress",
        "phase": progress.phase,
        "elapsed_ms": ms(progress.elapsed),
        "pages_sent": progress.pages_sent,
        "bytes_sent": progress.bytes_sent,
        "pages_pending": progress.pending,
        "pages_deferred": progress.deferred,
        "dirty_pages_per_s": progress.dirty_pages_per_s,
        "forecast_downtime_ms": ms(progress.forecast_downtime),
        "throttle_percent": progress.throttle_percent,
    })
}

/// The line of a migration that was not done; where the guest is by now is part of `message`. If it was called off
/// because it did not converge, with what was seen.
pub fn failed(message: &str, seen: Option<&Convergence>) -> Value {
    let mut line = json!({ "event": "failed", "message": message });
    if let Some(seen) = seen {
        line["convergence"] = convergence(seen);
    }
    line
}

/// What was seen of the convergence and what was decided. `*_downtime_ms` is what stopping at that many pages would have
/// cost, at the speed that the link had last; times `*_at_ms` are since the start of dirty logging.
pub fn convergence(seen: &Convergence) -> Value {
    let out_of_reach = seen.out_of_reach.map(|time| {
        json!({
            "since_at_ms": ms(time.since),
            "until_at_ms": ms(time.until),
            "least_bound_pages": time.least_bound,
            "least_bound_downtime_ms": ms(seen.downtime(time.least_bound)),
        })
    });
    let throttle: Vec<_> = seen
        .throttle_steps
        .iter()
        .map(|step| json!({ "at_ms": ms(step.at), "percent": step.percent, "backlog_pages": step.backlog }))
        .collect();
    json!({
        "on_no_convergence": seen.wanted().to_string(),
        "decision": seen.decision.map(|decision| if decision.aborted { "abort" } else { "stop" }),
        "decided_at_ms": seen.decision.map(|decision| ms(decision.at)),
        "reason": seen.decision.map(|decision| decision.reason.to_string()),
        "explanation": seen.to_string(),
        "out_of_reach": out_of_reach,
        "established_at_ms": seen.established_at.map(ms),
        "bound_pages": seen.bound,
        "bound_downtime_ms": ms(seen.downtime(seen.bound)),
        "least_bound_pages": seen.least_bound,
        "least_bound_downtime_ms": ms(seen.downtime(seen.least_bound)),
        "backlog_pages": seen.backlog,
        "backlog_downtime_ms": ms(seen.downtime(seen.backlog)),
        "least_backlog_pages": seen.least_backlog,
        "least_backlog_downtime_ms": ms(seen.downtime(seen.least_backlog)),
        "pages_needed": seen.pages,
        "pages_sent": seen.sent,
        "sent_over_memory": seen.sent_over_memory(),
        "least_unthrottled_backlog_pages": seen.least_unthrottled_backlog,
        "throttle": throttle,
    })
}

/// What is known of a process image besides the migration's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Mirrored {
    /// The process.
    pub pid: i32,
    /// Processes tracked at the stop.
    pub processes: usize,
    /// Descendants that could not be attached to: their private memory is no part of the image.
    pub processes_not_attached: u64,
    /// Mappings that could not be tracked: no part of the image either.
    pub mappings_skipped: u64,
    /// How long a thread was stopped at most to attach to it.
    pub stopped_most_ms: f64,
    /// Pages of the image that were populated at the stop.
    pub pages_populated: u64,
    /// Pages compared at the stop.
    pub pages_verified: u64,
    /// What the destination said of running it.
    pub destination_said: String,
}

/// The line of a finished mirroring, after that of the migration.
pub fn mirrored(mirrored: &Mirrored) -> Value {
    let mut line = json!(mirrored);
    line["event"] = json!("mirrored");
    line
}

/// The line of a finished migration. Times are milliseconds, `pages_*` are pages of 4 KiB, `bytes_*` bytes.
pub fn report(report: &Report) -> Value {
    let m = &report.migration;
    let own = json!({
        "workload": report.workload,
        "seed": report.seed,
        "verified": report.verified(),
        "guest_errors": report.guest.map(|guest| guest.errors),
        "guest_slowdown": report.slowdown(),
        "guest": report.guest,
    });
    joined(figures(report.policy, report.budget_ms, m), own)
}

/// The figures of a migration, whatever the guest is.
pub fn figures(policy: PolicyKind, budget_ms: f64, m: &Migration) -> Value {
    let by = &m.by_send;
    let main = json!({
        "event": "report",
        "policy": policy.to_string(),
        "tmt_ms": ms(m.total),
        "downtime_ms": ms(m.downtime.total()),
        "downtime_budget_ms": budget_ms,
        "t_star_ms": m.t_star.map(|bound| ms(bound.total)),
        "tmt_over_t_star": m.over_t_star(),
        "prepare_ms": ms(m.prepare),
        "pages": m.pages,
        "page_numbers": m.nr_pfns,
        "pages_sent": m.transmissions,
        "rho": m.rho(),
        "pages_wasted": m.wasted(),
        "pages_zero": m.zero_pages,
        "pages_absent": m.absent_pages,
        "pages_final": m.final_pages,
        "pages_deferred_most": m.most_deferred,
        "bytes_sent": m.bytes,
        "bytes_zero_copied": by.zero_copy_bytes - by.copied_bytes,
        "bytes_copied": by.plain_bytes + by.copied_bytes,
        "bytes_copied_in_spite_of_zero_copy": by.copied_bytes,
        "bytes_staged": m.staged_bytes,
        "zero_copy_given_up": m.fell_back,
        "send": m.send,
        "send_calls": m.send_calls,
        "buffers_registered": m.registered,
        "slot_memory": m.slot_backing,
        "congestion_control": m.congestion,
        "stop_reason": m.stop_reason.to_string(),
        "converged": m.converged(budget_ms),
        "samples": m.samples,
        "sampling_ms": ms(m.sampling),
        "link_pages_per_s": m.link_pages_per_s,
        "forecast_bytes": m.forecast_bytes,
    });
    let parts = json!({
        "downtime": {
            "suspend_ms": ms(m.downtime.suspend),
            "final_scan_ms": ms(m.downtime.final_scan),
            "final_send_ms": ms(m.downtime.final_send),
            "hand_over_ms": ms(m.downtime.hand_over),
            "resume_ms": ms(m.downtime.resume),
            "verify_not_counted_ms": ms(m.downtime.verify),
            "page_faults": m.faults_in_downtime,
        },
        "cpu_s_per_gb": {
            "scan": per_gb(m.cpu.scan, m.bytes),
            "map": per_gb(m.cpu.map, m.bytes),
            "send": per_gb(m.cpu.send, m.bytes),
            "control": per_gb(m.cpu.control, m.bytes),
            "receive": per_gb(m.cpu.receive, m.bytes),
        },
        "latency_us": latencies(&m.latencies),
        "convergence": convergence(&m.convergence),
    });
    joined(main, parts)
}

/// How long the stages that ran took, in microseconds. A batch is mapped and a slot is sent; a tick is for all pages.
fn latencies(latencies: &Latencies) -> Value {
    let us = |ns: u64| ns as f64 / 1e3;
    let stages = latencies.seen().map(|(stage, times)| {
        let figures = json!({
            "p50": us(times.value_at_quantile(0.50)),
            "p90": us(times.value_at_quantile(0.90)),
            "p99": us(times.value_at_quantile(0.99)),
            "max": us(times.max()),
            "count": times.len(),
        });
        (stage.name().to_owned(), figures)
    });
    Value::Object(stages.collect())
}

/// One object of two.
pub fn joined(mut line: Value, more: Value) -> Value {
    if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
        line.extend(more);
    }
    line
}
