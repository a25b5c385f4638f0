//! Tables for people.

use comfy_table::{CellAlignment, Table, presets};

use super::{Report, ms, per_gb};
use crate::forecast::Convergence;
use crate::forecast::convergence::ThrottleStep;

/// The table of one migration.
pub fn one(report: &Report) -> String {
    let m = &report.migration;
    let d = &m.downtime;
    let mut table = plain();
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    let seconds = m.total.as_secs_f64();
    row("total migration time", format!("{seconds:.3} s, after {:.0} ms of preparation", ms(m.prepare)));
    row("least possible on this run (T*)", bound_text(report));
    row("downtime", format!("{:.1} ms of {:.0} ms allowed", ms(d.total()), report.budget_ms));
    row("  suspend", format!("{:.1} ms", ms(d.suspend)));
    row("  final scan", format!("{:.1} ms", ms(d.final_scan)));
    row("  final send", format!("{:.1} ms for {} pages", ms(d.final_send), m.final_pages));
    row("  hand-over", format!("{:.1} ms", ms(d.hand_over)));
    row("  resume", format!("{:.1} ms", ms(d.resume)));
    if m.verified_pages > 0 {
        row("  verification, not counted", format!("{:.1} ms", ms(d.verify)));
    }
    row("stopped because", m.stop_reason.to_string());
    if !m.convergence.is_plain() {
        convergence_rows(&m.convergence, &mut row);
    }
    row("pages sent", format!("{} of {}: rho {:.3}", m.transmissions, m.pages, m.rho()));
    row("  wasted (written again later)", m.wasted().to_string());
    row("  zero pages, without data", m.zero_pages.to_string());
    row("  held back at a time, at most", m.most_deferred.to_string());
    row("bytes sent", format!("{:.1} MiB at {:.0} MB/s", mib(m.bytes), m.bytes as f64 / seconds / 1e6));
    let by = &m.by_send;
    row("  zero-copied", format!("{:.1} MiB", mib(by.zero_copy_bytes - by.copied_bytes)));
    row("  copied by the kernel", format!("{:.1} MiB", mib(by.plain_bytes + by.copied_bytes)));
    row("    in spite of zero-copy", zero_copy_text(report));
    row("  staged by the mapper", format!("{:.1} MiB", mib(m.staged_bytes)));
    row("sent how", how_text(report));
    row("CPU seconds per GB", cpu_text(report));
    row(
        "dirty log",
        format!("{} samples, {:.2} ms each", m.samples, ms(m.sampling) / m.samples.max(1) as f64),
    );
    row("forecast state", format!("{} KiB", m.forecast_bytes / 1024));
    if let Some(slowdown) = report.slowdown() {
        row("guest slow-down while live", format!("{:.1} %", slowdown * 100.0));
    }
    row("verified", verified_text(report));
    if let Some(guest) = report.guest {
        row(
            "guest at the destination",
            format!(
                "{} writes since, {} pages checked, {} errors",
                guest.writes_since, guest.checked_pages, guest.errors
            ),
        );
    }
    table.to_string()
}

/// A table of names and values.
pub fn rows(rows: &[(&str, String)]) -> String {
    let mut table = plain();
    for (name, value) in rows {
        table.add_row([*name, value]);
    }
    table.to_string()
}

/// Why it did not simply converge. Downtimes are those of stopping then, at the speed that the link had last.
fn convergence_rows(seen: &Convergence, row: &mut dyn FnMut(&str, String)) {
    let downtime = |pages| format!("{:.0} ms", ms(seen.downtime(pages)));
    let text = seen.to_string();
    let mut parts = text.split("; ");
    row("convergence", parts.next().unwrap_or_default().to_owned());
    parts.for_each(|part| row("", part.to_owned()));
    row("  wanted then", seen.wanted().to_string());
    if let Some(at) = seen.established_at {
        row("  certain after", format!("{:.1} s", at.as_secs_f64()));
    }
    let (least, last) = (downtime(seen.least_bound), downtime(seen.bound));
    row("  downtime, best order possible", format!("{least} at best, {last} in the end"));
    let (least, last) = (downtime(seen.least_backlog), downtime(seen.backlog));
    row("  downtime, this order", format!("{least} at best, {last} in the end"));
    if !seen.throttle_steps.is_empty() {
        let step = |step: &ThrottleStep| format!("{} % at {:.1} s", step.percent, step.at.as_secs_f64());
        for (index, steps) in seen.throttle_steps.chunks(5).enumerate() {
            let name = if index == 0 { "  guest slowed down by" } else { "" };
            row(name, steps.iter().map(step).collect::<Vec<_>>().join(", "));
        }
        row("", "until it was suspended; at full speed at the destination".to_owned());
    }
}

fn bound_text(report: &Report) -> String {
    match (report.migration.t_star, report.migration.over_t_star()) {
        (Some(bound), Some(over)) => {
            format!("{:.3} s; this migration took {over:.2} times as long", bound.total.as_secs_f64())
        }
        _ => "none: no policy could have met the budget by then".to_owned(),
    }
}

fn zero_copy_text(report: &Report) -> String {
    let m = &report.migration;
    let bytes = m.by_send.copied_bytes as f64 / 1_048_576.0;
    if m.fell_back {
        format!("{bytes:.1} MiB; then zero-copy was given up, since this path always copies")
    } else {
        format!("{bytes:.1} MiB")
    }
}

fn how_text(report: &Report) -> String {
    let m = &report.migration;
    let registered = match (m.send, m.registered) {
        ("copy" | "staged-copy", _) => "copying sends",
        (_, true) => "registered buffers",
        (_, false) => "but the buffers cannot be registered (ulimit -l): copying sends",
    };
    let congestion = m.congestion.as_ref().map_or_else(String::new, |name| format!("; TCP {name}"));
    format!("{}, {registered}; slots in {}{congestion}", m.send, m.slot_backing)
}

fn cpu_text(report: &Report) -> String {
    let (m, cpu) = (&report.migration, &report.migration.cpu);
    let by = |time| per_gb(time, m.bytes);
    format!(
        "scan {:.3}, map {:.3}, send {:.3}, control {:.3}, receive {:.3}",
        by(cpu.scan),
        by(cpu.map),
        by(cpu.send),
        by(cpu.control),
        by(cpu.receive)
    )
}

fn verified_text(report: &Report) -> String {
    if report.verified() {
        format!("all {} pages equal to the source's at the switch-over", report.migration.pages)
    } else {
        "not compared (--no-verify)".to_owned()
    }
}

/// Several migrations of the same guest side by side.
pub fn side_by_side(reports: &[Report]) -> String {
    let mut table = plain();
    table.set_header([
        "policy",
        "TMT s",
        "T* s",
        "TMT/T*",
        "downtime ms",
        "pages sent",
        "rho",
        "wasted",
        "MiB sent",
        "stopped because",
    ]);
    for column in 1..9 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for report in reports {
        let m = &report.migration;
        let none = || "-".to_owned();
        let over = if report.migration.converged(report.budget_ms) { "" } else { " !" };
        table.add_row([
            report.policy.to_string(),
            format!("{:.3}", m.total.as_secs_f64()),
            m.t_star.map_or_else(none, |bound| format!("{:.3}", bound.total.as_secs_f64())),
            report.migration.over_t_star().map_or_else(none, |over| format!("{over:.2}")),
            format!("{:.1}{over}", ms(m.downtime.total())),
            m.transmissions.to_string(),
            format!("{:.3}", m.rho()),
            m.wasted().to_string(),
            format!("{:.0}", m.bytes as f64 / 1_048_576.0),
            m.stop_reason.to_string(),
        ]);
    }
    table.to_string()
}

/// What the first report saved against each of the others, a line each. A guest that was slowed down is no measure for one
/// that was not.
pub fn savings(reports: &[Report]) -> String {
    let Some((first, others)) = reports.split_first() else { return String::new() };
    match first.migration.convergence.throttle_percent() {
        0 => {}
        percent => {
            return format!(
                "not to be compared: {} slowed the guest down by up to {percent} %, the others let it write on",
                first.policy
            );
        }
    }
    let saved = |ours: f64, theirs: f64, less: &str| {
        let percent = (1.0 - ours / theirs) * 100.0;
        format!("{:.1} % {}", percent.abs(), if percent >= 0.0 { less } else { "more" })
    };
    let line = |other: &Report| {
        let (ours, theirs) = (&first.migration, &other.migration);
        format!(
            "{} against {}: {} time, {} pages sent, {} sent in vain",
            first.policy,
            other.policy,
            saved(ours.total.as_secs_f64(), theirs.total.as_secs_f64(), "less"),
            saved(ours.transmissions as f64, theirs.transmissions as f64, "fewer"),
            saved(ours.wasted() as f64, (theirs.wasted() as f64).max(1.0), "fewer"),
        )
    };
    others.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn plain() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table
}
