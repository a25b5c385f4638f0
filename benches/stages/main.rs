//! What each stage of the pipeline costs by itself, in nanoseconds of CPU time for a page, beside the bare memory operation
//! that it cannot do without: one JSON object a line. `perf/stages` makes a table of several runs.
//!
//! A stage and its bare operation are measured by turns, on different pages of the same kind, so that neither finds in the
//! cache what the other has left there. CPU time of the thread is what counts: others may use the machine, though they take
//! memory bandwidth and cache from it.

mod counting;
mod data_path;
mod forecast;
mod wire;

use std::ops::Mul;

use counting::allocations;
use pagecast::sys::cpu::thread_cpu_time;

/// Times that a stage and its bare operation are measured.
const REPEATS: usize = 31;

/// One half of a case: works on so many pages and says what that took.
type Half<'a> = &'a mut dyn FnMut() -> Used;

/// What some work took of its thread. Only allocations are those of all threads; the others do nothing meanwhile.
#[derive(Clone, Copy)]
struct Used {
    cpu_ns: f64,
    allocations: f64,
    /// Page faults that needed no disk.
    faults: f64,
}

impl Used {
    fn by(work: impl FnOnce()) -> Used {
        let began = (thread_cpu_time(), allocations(), faults());
        work();
        Used {
            cpu_ns: (thread_cpu_time() - began.0).as_nanos() as f64,
            allocations: (allocations() - began.1) as f64,
            faults: (faults() - began.2) as f64,
        }
    }
}

impl Mul<f64> for Used {
    type Output = Used;

    fn mul(self, by: f64) -> Used {
        Used { cpu_ns: self.cpu_ns * by, allocations: self.allocations * by, faults: self.faults * by }
    }
}

/// Page faults of this thread so far.
fn faults() -> i64 {
    // SAFETY: rusage is plain numbers, and all zero is a value of it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure it is given.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_minflt
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures a stage, and its bare operation if there is one, by turns, and prints the medians. Both work on `pages` pages at a
/// time. The first turn warms up.
fn measure(stage: &str, bare_operation: &str, pages: usize, real: Half, mut bare: Option<Half>) {
    let (mut real_ns, mut bare_ns) = (Vec::new(), Vec::new());
    let (mut allocations, mut faults) = (Vec::new(), Vec::new());
    for turn in 0..=REPEATS {
        let took = real();
        let bare_took = bare.as_mut().map(|bare| bare());
        if turn > 0 {
            real_ns.push(took.cpu_ns / pages as f64);
            allocations.push(took.allocations / pages as f64);
            faults.push(took.faults / pages as f64);
            bare_ns.extend(bare_took.map(|took| took.cpu_ns / pages as f64));
        }
    }
    let bare_median = (!bare_ns.is_empty()).then(|| median(&mut bare_ns));
    let line = serde_json::json!({
        "stage": stage,
        "bare": bare_operation,
        "ns_per_page": median(&mut real_ns),
        "bare_ns_per_page": bare_median,
        "allocations_per_page": median(&mut allocations),
        "faults_per_page": median(&mut faults),
    });
    println!("{line}");
}

/// A number that looks random.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 27)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 32)
}

fn main() {
    // `cargo test --benches` only wants to see that it can be run.
    if std::env::args().any(|argument| argument == "--bench") {
        let one = Used::by(|| drop(std::hint::black_box(Box::new(0u64))));
        assert_eq!(one.allocations, 1.0, "what is allocated is counted");
        forecast::measure_all();
        data_path::measure_all();
        wire::measure_all();
    }
}
