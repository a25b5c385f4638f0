//! Progress: a live line on a terminal, plain lines elsewhere, JSON lines on request.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::{json, ms, recording};
use crate::page::PAGE_SIZE;
use crate::pipeline::live::Observer;
use crate::pipeline::outcome::Progress;
use crate::sys::console;
use crate::trace::record::Status;

/// How often each kind of output speaks.
const TERMINAL: Duration = Duration::from_millis(100);
const LINES: Duration = Duration::from_secs(1);
const JSON: Duration = Duration::from_millis(250);

enum Kind {
    Terminal(ProgressBar),
    Lines,
    Json,
}

/// Shows one migration after the other.
pub struct Display {
    kind: Kind,
    last: Option<(Instant, Progress)>,
}

impl Display {
    /// JSON on standard output if `json`; else text on standard error, live if that is a terminal.
    pub fn new(json: bool) -> Self {
        Display { kind: Kind::new(json), last: None }
    }

    /// Ends the display of one migration.
    pub fn done(&mut self) {
        self.kind.done();
        self.last = None;
    }
}

impl Kind {
    fn new(json: bool) -> Self {
        if json {
            Kind::Json
        } else if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{spinner} {msg}").expect("the template is well-formed");
            Kind::Terminal(ProgressBar::new_spinner().with_style(style))
        } else {
            Kind::Lines
        }
    }

    fn interval(&self) -> Duration {
        match self {
            Kind::Terminal(_) => TERMINAL,
            Kind::Lines => LINES,
            Kind::Json => JSON,
        }
    }

    fn done(&self) {
        if let Kind::Terminal(bar) = self {
            bar.finish_and_clear();
            bar.reset();
        }
    }
}

/// Shows a recording.
pub struct RecordingDisplay {
    kind: Kind,
    last: Option<Instant>,
}

impl RecordingDisplay {
    /// As [`Display::new`].
    pub fn new(json: bool) -> Self {
        RecordingDisplay { kind: Kind::new(json), last: None }
    }

    /// Called after each round; speaks now and then.
    pub fn status(&mut self, status: &Status) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < self.kind.interval()) {
            return;
        }
        self.last = Some(now);
        match &self.kind {
            Kind::Terminal(bar) => {
                bar.set_message(recording::line(status));
                bar.tick();
            }
            Kind::Lines => console::complain(format_args!("{}", recording::line(status))),
            Kind::Json => console::say(format_args!("{}", recording::progress(status))),
        }
    }

    /// Ends the display.
    pub fn done(&self) {
        self.kind.done();
    }
}

impl Observer for Display {
    fn progress(&mut self, progress: &Progress) {
        let interval = self.kind.interval();
        let now = Instant::now();
        let same_phase = self.last.as_ref().is_some_and(|(_, last)| last.phase == progress.phase);
        if same_phase && self.last.as_ref().is_some_and(|(at, _)| now - *at < interval) {
            return;
        }
        let speed = self.last.as_ref().map_or(0.0, |(at, last)| {
            progress.bytes_sent.saturating_sub(last.bytes_sent) as f64 / (now - *at).as_secs_f64() / 1e6
        });
        match &self.kind {
            Kind::Terminal(bar) => {
                bar.set_message(line(progress, speed));
                bar.tick();
            }
            Kind::Lines => console::complain(format_args!("{}", line(progress, speed))),
            Kind::Json => {
                console::say(format_args!("{}", json::progress(progress)));
            }
        }
        self.last = Some((now, progress.clone()));
    }
}

fn line(progress: &Progress, megabytes_per_s: f64) -> String {
    let mib = |pages: u64| (pages * PAGE_SIZE as u64) >> 20;
    let slowed = match progress.throttle_percent {
        0 => String::new(),
        percent => format!("  guest slowed down by {percent} %"),
    };
    format!(
        "{:>5.1} s  {:<10}  sent {:>6} pages ({} MiB)  pending {:>6}  deferred {:>6}  {:>5.0} MB/s  \
         dirty {:>6} pages/s  downtime if stopped now {:.0} ms{slowed}",
        progress.elapsed.as_secs_f64(),
        progress.phase.to_string(),
        progress.pages_sent,
        mib(progress.pages_sent),
        progress.pending,
        progress.deferred,
        megabytes_per_s,
        progress.dirty_pages_per_s,
        ms(progress.forecast_downtime).min(999_999.0),
    )
}
