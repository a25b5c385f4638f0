//! Recording: a subject's dirty log, taken round by round on absolute deadlines, into a trace file.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::format::{Round, TraceError, runs_of};
use super::writer::TraceWriter;
use crate::guest::process::tracker::{Toll, Tracker};
use crate::guest::{DirtyLog, GuestControl, GuestError};
use crate::page::CHUNK_PAGES;
use crate::page_set::PageSet;
use crate::sys::cpu;

/// How often the abort flag is looked at while a deadline is awaited.
const LOOK: Duration = Duration::from_millis(20);

/// What can go wrong with a recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The dirty log.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The file.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// It was told to end before there was anything to record.
    #[error("interrupted before anything was recorded")]
    Interrupted,
    /// Something went wrong with it on the way.
    #[error("{error}; what was recorded before is in {}{}", path.display(), and_because(because.as_ref()))]
    CutShort {
        /// What went wrong.
        error: Box<RecordError>,
        /// Why it is not where it belongs, if it is not.
        because: Option<std::io::Error>,
        /// Where the trace is.
        path: PathBuf,
    },
    /// There can be one who tracks.
    #[error("the target's memory is tracked by another userfaultfd already; is another pagecast at it?")]
    Busy,
    /// There was nothing to record.
    #[error(
        "not a page of the target was found; is --min-mapping too large, or is its memory shared (then --shared) or that \
         of its children (then --children)?"
    )]
    Nothing,
}

fn and_because(error: Option<&std::io::Error>) -> String {
    error.map_or_else(String::new, |error| format!(", where it belongs it could not be put: {error}"))
}

/// What is recorded.
pub trait Subject {
    /// Adds to `dirty`, which may grow, the pages written since the last call; in the first all that are populated.
    /// False: the subject has ended, and nothing was added.
    fn sample(&mut self, dirty: &mut PageSet) -> Result<bool, GuestError>;
    /// Size of the id space so far, in pages.
    fn tracked_pages(&self) -> u64;
    /// For each chunk of the id space the address of its first page, shifted right by 21.
    fn va_chunks(&self) -> Vec<u64>;
    /// What the tracking has cost the subject so far, where that is known.
    fn toll(&self) -> Option<Toll>;
}

impl Subject for Tracker {
    fn sample(&mut self, dirty: &mut PageSet) -> Result<bool, GuestError> {
        Ok(self.round(dirty)?.alive > 0)
    }

    fn tracked_pages(&self) -> u64 {
        self.ids().nr_pages()
    }

    fn va_chunks(&self) -> Vec<u64> {
        self.ids().va_chunks().to_vec()
    }

    fn toll(&self) -> Option<Toll> {
        Some(Tracker::toll(self))
    }
}

/// Any guest that can be migrated can be recorded: here addresses are those of its physical memory.
pub struct GuestSubject<'a> {
    control: &'a mut dyn GuestControl,
    log: Box<dyn DirtyLog>,
}

impl<'a> GuestSubject<'a> {
    /// Begins dirty logging; it ends when this is dropped.
    pub fn start(control: &'a mut dyn GuestControl) -> Result<Self, GuestError> {
        let log = control.take_dirty_log()?;
        control.set_log_dirty(true)?;
        Ok(GuestSubject { control, log })
    }
}

impl Drop for GuestSubject<'_> {
    fn drop(&mut self) {
        // A guest that is gone has no log to end any more.
        let _ = self.control.set_log_dirty(false);
    }
}

impl Subject for GuestSubject<'_> {
    fn sample(&mut self, dirty: &mut PageSet) -> Result<bool, GuestError> {
        match self.control.work_done() {
            Err(GuestError::Unreachable { .. }) => return Ok(false),
            other => other?,
        };
        dirty.grow(self.control.nr_pages());
        self.log.get_and_clear(dirty)?;
        Ok(true)
    }

    fn tracked_pages(&self) -> u64 {
        self.control.nr_pages().next_multiple_of(CHUNK_PAGES as u64)
    }

    fn va_chunks(&self) -> Vec<u64> {
        (0..self.tracked_pages() / CHUNK_PAGES as u64).collect()
    }

    fn toll(&self) -> Option<Toll> {
        None
    }
}

/// How to record.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Between two rounds.
    pub period: Duration,
    /// From the first round to the last.
    pub duration: Duration,
}

/// How a recording comes along.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// Since the first round.
    pub elapsed: Duration,
    /// Rounds so far.
    pub rounds: u64,
    /// Size of the id space, in pages.
    pub tracked_pages: u64,
    /// Pages written in the latest round.
    pub dirty_pages: u64,
    /// Between the latest round and the one before.
    pub interval: Duration,
    /// How long the latest scan took.
    pub scan: Duration,
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// Its time was up.
    Duration,
    /// It was told to.
    Interrupted,
    /// The subject ended.
    TargetEnded,
}

/// A finished recording.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Why it ended.
    pub ended: Ended,
    /// From the first round to the last.
    pub elapsed: Duration,
    /// Rounds in the trace.
    pub rounds: u64,
    /// Rounds left out because the one before was not done in time.
    pub missed: u64,
    /// Size of the id space, in pages.
    pub tracked_pages: u64,
    /// Pages populated at the start.
    pub first_pages: u64,
    /// Pages written at least once after that.
    pub touched_pages: u64,
    /// Pages written in each round after the first.
    pub dirty_pages: Spread,
    /// Time between two rounds, in microseconds.
    pub interval_us: Spread,
    /// Time for a scan, in microseconds.
    pub scan_us: Spread,
    /// CPU time that recording took, writing the rounds included.
    pub cpu: Duration,
    /// What it cost the subject.
    pub toll: Option<Toll>,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Spread {
    /// The sum of all.
    pub total: u64,
    /// The arithmetic mean.
    pub mean: u64,
    /// The middle one.
    pub p50: u64,
    /// 99 of 100 are not above this.
    pub p99: u64,
    /// The largest.
    pub max: u64,
}

impl Spread {
    fn of(values: &mut [u64]) -> Self {
        values.sort_unstable();
        let Some(&max) = values.last() else { return Spread::default() };
        let at = |percent: usize| values[((values.len() - 1) * percent).div_ceil(100)];
        let total: u64 = values.iter().sum();
        Spread { total, mean: total / values.len() as u64, p50: at(50), p99: at(99), max }
    }
}

/// Records `subject` with `writer`. `abort` ends it early, with a complete file, and so does whatever goes wrong.
pub fn record(
    subject: &mut dyn Subject,
    settings: &Settings,
    mut writer: TraceWriter,
    abort: &AtomicBool,
    show: &mut dyn FnMut(&Status),
) -> Result<Recording, RecordError> {
    writer.start();
    let mut log = Log::default();
    let cpu_before = cpu::thread_cpu_time();
    let result = rounds(subject, settings, abort, &mut writer, &mut log, show)
        .and_then(|ended| writer.flush().map(|()| ended).map_err(RecordError::from));
    log.cpu = cpu::thread_cpu_time().saturating_sub(cpu_before);
    let va_chunks = subject.va_chunks();
    let is_empty = va_chunks.is_empty() || writer.rounds() == 0;
    let ended = match result {
        Err(error) if is_empty => return Err(error),
        Err(error) => {
            let place = writer.path().to_owned();
            let (path, because) = match writer.finish(&va_chunks) {
                Ok(()) => (place, None),
                Err(TraceError::Kept { kept, source, .. }) => (kept, Some(source)),
                // That is why the trace is lost, and not only why it ended.
                Err(failure) => return Err(failure.into()),
            };
            return Err(RecordError::CutShort { error: Box::new(error), because, path });
        }
        Ok(Ended::Interrupted) if is_empty => return Err(RecordError::Interrupted),
        Ok(_) if is_empty && subject.toll().is_some_and(|toll| toll.busy_mappings > 0) => {
            return Err(RecordError::Busy);
        }
        Ok(_) if is_empty => return Err(RecordError::Nothing),
        Ok(ended) => ended,
    };
    writer.finish(&va_chunks)?;
    Ok(log.finish(ended, subject))
}

/// What is kept of the rounds for the summary.
#[derive(Default)]
struct Log {
    rounds: u64,
    missed: u64,
    first_pages: u64,
    touched: Option<PageSet>,
    elapsed: Duration,
    cpu: Duration,
    dirty_pages: Vec<u64>,
    interval_us: Vec<u64>,
    scan_us: Vec<u64>,
}

impl Log {
    fn add(&mut self, dirty: &PageSet, t: Duration, scan: Duration) -> Duration {
        let interval = t.saturating_sub(self.elapsed);
        if self.rounds == 0 {
            self.first_pages = dirty.len();
        } else {
            let touched = self.touched.get_or_insert_with(|| PageSet::empty(0));
            touched.grow(dirty.nr_pages());
            touched.union(dirty);
            self.dirty_pages.push(dirty.len());
            self.interval_us.push(interval.as_micros() as u64);
            self.scan_us.push(scan.as_micros() as u64);
        }
        self.rounds += 1;
        self.elapsed = t;
        interval
    }

    fn finish(mut self, ended: Ended, subject: &dyn Subject) -> Recording {
        Recording {
            ended,
            elapsed: self.elapsed,
            rounds: self.rounds,
            missed: self.missed,
            tracked_pages: subject.tracked_pages(),
            first_pages: self.first_pages,
            touched_pages: self.touched.map_or(0, |touched| touched.len()),
            dirty_pages: Spread::of(&mut self.dirty_pages),
            interval_us: Spread::of(&mut self.interval_us),
            scan_us: Spread::of(&mut self.scan_us),
            cpu: self.cpu,
            toll: subject.toll(),
        }
    }
}

fn rounds(
    subject: &mut dyn Subject,
    settings: &Settings,
    abort: &AtomicBool,
    writer: &mut TraceWriter,
    log: &mut Log,
    show: &mut dyn FnMut(&Status),
) -> Result<Ended, RecordError> {
    let period_ns = (settings.period.as_nanos() as u64).max(1);
    let last = u64::try_from(settings.duration.as_nanos()).unwrap_or(u64::MAX) / period_ns;
    let mut dirty = PageSet::empty(0);
    let start = Instant::now();
    let mut number = 0;
    while number <= last {
        // No recording lasts 500 years.
        if !await_deadline(start + Duration::from_nanos(period_ns.saturating_mul(number)), abort) {
            return Ok(Ended::Interrupted);
        }
        dirty.clear();
        let t = start.elapsed();
        if !subject.sample(&mut dirty)? {
            return Ok(Ended::TargetEnded);
        }
        let scan = start.elapsed() - t;
        let tracked_pages = subject.tracked_pages();
        let round = Round {
            t_ns: t.as_nanos() as u64,
            scan_us: scan.as_micros() as u32,
            dirty: dirty.len() as u32,
            tracked_pages: tracked_pages as u32,
        };
        writer.round(round, runs_of(dirty.iter().map(|pfn| pfn.0 as u32)))?;
        let interval = log.add(&dirty, t, scan);
        let dirty_pages = dirty.len();
        show(&Status { elapsed: t, rounds: log.rounds, tracked_pages, dirty_pages, interval, scan });
        // The next deadline that is still to come: late rounds are left out and not made up for.
        let next = start.elapsed().as_nanos() as u64 / period_ns + 1;
        log.missed += next.min(last.saturating_add(1)) - number - 1;
        number = next;
    }
    Ok(Ended::Duration)
}

/// False: `abort` was set meanwhile.
fn await_deadline(deadline: Instant, abort: &AtomicBool) -> bool {
    loop {
        if abort.load(Ordering::Acquire) {
            return false;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(LOOK));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Pfn;
    use crate::trace::format::Trace;
    use crate::trace::writer::Heading;
    use std::path::Path;

    /// In which round a guest fails that would live longer.
    const FAILS_AT: u64 = 120;

    /// Writes page `n` in round `n`, is slow in round 2, and ends after `life` rounds.
    struct Fake {
        rounds: u64,
        life: u64,
    }

    impl Subject for Fake {
        fn sample(&mut self, dirty: &mut PageSet) -> Result<bool, GuestError> {
            if self.rounds == self.life {
                return Ok(false);
            }
            if self.rounds == FAILS_AT {
                return Err(GuestError::Refused("it had enough".to_owned()));
            }
            if self.rounds == 2 {
                std::thread::sleep(Duration::from_millis(25));
            }
            dirty.grow(self.tracked_pages());
            dirty.insert(Pfn(self.rounds));
            self.rounds += 1;
            Ok(true)
        }

        fn tracked_pages(&self) -> u64 {
            512
        }

        fn va_chunks(&self) -> Vec<u64> {
            vec![7]
        }

        fn toll(&self) -> Option<Toll> {
            None
        }
    }

    fn writer(path: &Path) -> TraceWriter {
        TraceWriter::create(path, &Heading { name: "fake".to_owned(), period_us: 10_000 }).unwrap()
    }

    fn run(life: u64, duration_ms: u64, abort: bool) -> (Result<Recording, RecordError>, Option<Trace>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.pct.zst");
        let settings =
            Settings { period: Duration::from_millis(10), duration: Duration::from_millis(duration_ms) };
        let mut fake = Fake { rounds: 0, life };
        let result = record(&mut fake, &settings, writer(&path), &AtomicBool::new(abort), &mut |_| {});
        (result, Trace::open(&path).ok())
    }

    #[test]
    fn a_slow_round_costs_rounds_and_the_deadlines_stay_where_they_were() {
        let (recording, trace) = run(100, 100, false);
        let (recording, trace) = (recording.unwrap(), trace.unwrap());
        assert_eq!(recording.ended, Ended::Duration);
        assert!(recording.missed >= 2, "{recording:?}");
        assert_eq!(recording.rounds + recording.missed, 11);
        assert_eq!(trace.rounds().len() as u64, recording.rounds);
        for (number, round) in trace.rounds().iter().enumerate() {
            assert_eq!((round.dirty, trace.runs(number)[0].first as usize), (1, number));
        }
        assert_eq!((recording.first_pages, recording.touched_pages), (1, recording.rounds - 1));
    }

    #[test]
    fn a_subject_that_ends_leaves_a_complete_trace() {
        let (recording, trace) = run(2, 1000, false);
        assert_eq!(recording.unwrap().ended, Ended::TargetEnded);
        assert_eq!(trace.unwrap().rounds().len(), 2);
    }

    #[test]
    fn a_recording_without_a_round_is_an_error_and_no_file() {
        let (recording, trace) = run(5, 1000, true);
        assert!(matches!(recording, Err(RecordError::Interrupted)) && trace.is_none());
        let (recording, trace) = run(0, 1000, false);
        assert!(matches!(recording, Err(RecordError::Nothing)) && trace.is_none());
    }

    #[test]
    fn a_subject_that_fails_leaves_a_trace_of_the_rounds_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.pct.zst");
        let (period, duration) = (Duration::from_millis(10), Duration::from_secs(1 << 33));
        let mut fake = Fake { rounds: 0, life: FAILS_AT + 1 };
        let (settings, abort) = (Settings { period, duration }, AtomicBool::new(false));
        let error = record(&mut fake, &settings, writer(&path), &abort, &mut |_| {}).unwrap_err();
        assert!(matches!(&error, RecordError::CutShort { path: kept, .. } if *kept == path), "{error}");
        assert!(error.to_string().contains("t.pct.zst"), "{error}");
        assert_eq!(Trace::open(&path).unwrap().rounds().len() as u64, FAILS_AT);
    }

    #[test]
    fn a_spread_is_that_of_its_values() {
        let mut values: Vec<u64> = (1..=100).rev().collect();
        let spread = Spread::of(&mut values);
        assert_eq!((spread.total, spread.mean, spread.p50, spread.p99, spread.max), (5050, 50, 51, 100, 100));
        assert_eq!(Spread::of(&mut []), Spread::default());
    }
}
