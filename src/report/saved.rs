//! The report on a domain that was saved into a stream.

use std::fmt::Write;

use serde_json::{Value, json};

use super::json::{figures, joined};
use super::ms;
use crate::forecast::PolicyKind;
use crate::guest::xen::XenCosts;
use crate::pipeline::outcome::Migration;

/// How a domain was saved.
#[derive(Clone, Debug)]
pub struct Saved {
    /// Which policy chose the pages.
    pub policy: PolicyKind,
    /// Whether the domain ran meanwhile.
    pub live: bool,
    /// The downtime budget in milliseconds.
    pub budget_ms: f64,
    /// The pipeline's figures.
    pub migration: Migration,
    /// What it cost Xen and the kernel.
    pub costs: XenCosts,
}

impl Saved {
    /// One object: the figures of every migration, and under `xen` what belongs to a domain.
    pub fn json(&self) -> Value {
        joined(figures(self.policy, self.budget_ms, &self.migration), json!({ "xen": self.costs }))
    }

    /// A few lines for people.
    pub fn summary(&self) -> String {
        let (m, costs) = (&self.migration, &self.costs);
        let mut text = String::new();
        let mut line = |args: std::fmt::Arguments| {
            let _ = writeln!(text, "{args}");
        };
        let how = if self.live { format!("live, policy {}", self.policy) } else { "not live".to_owned() };
        line(format_args!(
            "saved in {:.2} s ({how}): {} pages sent of {} (rho {:.3}), {:.1} MB, {:.1} MB/s",
            m.total.as_secs_f64(),
            m.transmissions,
            m.pages,
            m.rho(),
            m.bytes as f64 / 1e6,
            m.bytes as f64 / 1e6 / m.total.as_secs_f64().max(1e-9)
        ));
        let d = &m.downtime;
        line(format_args!(
            "guest stopped here for {:.0} ms (budget {:.0} ms): suspend {:.0}, last look at the log {:.0}, {} pages {:.0}, \
             state {:.0}; {}",
            ms(d.total()),
            self.budget_ms,
            ms(d.suspend),
            ms(d.final_scan),
            m.final_pages,
            ms(d.final_send),
            ms(d.hand_over),
            m.stop_reason
        ));
        if self.live && !m.convergence.is_plain() {
            line(format_args!("{}", m.convergence));
        }
        if let Some(bound) = m.t_star {
            line(format_args!(
                "least possible on this run (T*): {:.2} s, this took {:.2} times as long; {} sends wasted",
                bound.total.as_secs_f64(),
                m.over_t_star().unwrap_or(0.0),
                m.wasted()
            ));
        }
        line(format_args!(
            "{} samples of {:.1} ms each; {} windows made, {} let go, {} pages mapped; {} absent",
            m.samples,
            ms(m.sampling) / m.samples.max(1) as f64,
            costs.windows.made,
            costs.windows.evicted,
            costs.calls.frames_mapped,
            m.absent_pages
        ));
        line(format_args!(
            "CPU s: scan {:.2}, map {:.2}, send {:.2}, control {:.2}; sent by {}",
            m.cpu.scan.as_secs_f64(),
            m.cpu.map.as_secs_f64(),
            m.cpu.send.as_secs_f64(),
            m.cpu.control.as_secs_f64(),
            m.send
        ));
        text
    }
}
