//! What each stage of the pipeline costs by itself, in nanoseconds of CPU time for a page, beside the bare memory operation
//! that it cannot do without: one JSON object a line. `perf/stages` makes a table of several runs.
//!
//! A stage and its bare operation are measured by turns, on different pages of the same kind, so that neither finds in the
//! cache what the other has left there. CPU time of the thread is what counts: others may use the machine, though they take
//! memory bandwidth and cache from it.

mod data_path;
mod forecast;
mod wire;

use pagecast::sys::cpu::thread_cpu_time;

/// Times that a stage and its bare operation are measured.
const REPEATS: usize = 31;

/// One half of a case: works on so many pages and says what CPU time that took, in nanoseconds.
type Half<'a> = &'a mut dyn FnMut() -> f64;

/// CPU time that `work` takes, in nanoseconds.
fn cpu_ns(work: impl FnOnce()) -> f64 {
    let began = thread_cpu_time();
    work();
    (thread_cpu_time() - began).as_nanos() as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures a stage, and its bare operation if there is one, by turns, and prints the medians. Both work on `pages` pages at a
/// time. The first turn warms up.
fn measure(stage: &str, bare_operation: &str, pages: usize, real: Half, mut bare: Option<Half>) {
    let (mut real_ns, mut bare_ns) = (Vec::new(), Vec::new());
    for turn in 0..=REPEATS {
        let took = real();
        let bare_took = bare.as_mut().map(|bare| bare());
        if turn > 0 {
            real_ns.push(took / pages as f64);
            bare_ns.extend(bare_took.map(|took| took / pages as f64));
        }
    }
    let bare_median = (!bare_ns.is_empty()).then(|| median(&mut bare_ns));
    let line = serde_json::json!({
        "stage": stage,
        "bare": bare_operation,
        "ns_per_page": median(&mut real_ns),
        "bare_ns_per_page": bare_median,
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
        forecast::measure_all();
        data_path::measure_all();
        wire::measure_all();
    }
}
