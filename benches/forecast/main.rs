//! Speed of the forecast for a guest of 64 GiB.
//!
//! `cargo bench --bench forecast` measures with Criterion. `cargo bench --bench forecast -- --ratios [scan|heat|ar]` measures
//! against bare loops over the same memory, alternately in one run, and prints one JSON object a line; `perf/forecast`
//! makes a table of several such runs. What counts there is CPU time of the thread: others may use the machine.

mod bare;
mod guest;
mod ratios;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use guest::{Guest, NR_PAGES, Pattern, Regime, bitmap};
use pagecast::forecast::PolicyKind;
use pagecast::page_set::PageSet;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Ticks after which a guest is made anew: its regime would change.
const TICKS_OF_A_REGIME: u64 = 100;
const SHARES: [f64; 3] = [0.001, 0.01, 0.1];

fn scan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes(NR_PAGES / 8));
    for pattern in [Pattern::Random, Pattern::Runs] {
        for share in [0.0, 0.001, 0.01, 0.1, 0.5] {
            let words = bitmap(NR_PAGES, pattern, share, 1);
            let mut set = PageSet::empty(NR_PAGES);
            group.bench_function(BenchmarkId::new(format!("{pattern:?}"), share), |bencher| {
                bencher.iter(|| {
                    set.clear();
                    set.insert_bitmap(black_box(&words));
                    set.len()
                });
            });
        }
    }
    group.finish();
}

/// Times `part` of so many ticks, and does `rest` of each outside of that.
fn ticks(
    iterations: u64,
    mut make: impl FnMut() -> Guest,
    mut before: impl FnMut(&mut Guest),
    mut part: impl FnMut(&mut Guest),
    mut after: impl FnMut(&mut Guest),
) -> Duration {
    let mut took = Duration::ZERO;
    let mut guest = make();
    for iteration in 1..=iterations {
        before(&mut guest);
        let began = Instant::now();
        part(&mut guest);
        took += began.elapsed();
        after(&mut guest);
        if iteration % TICKS_OF_A_REGIME == 0 && iteration < iterations {
            guest = make();
        }
    }
    took
}

fn forecast(criterion: &mut Criterion) {
    for (name, policy) in [("heat", PolicyKind::Heat), ("ar", PolicyKind::Ar)] {
        for regime in [Regime::Early, Regime::Late] {
            for share in SHARES {
                let id = BenchmarkId::new(format!("{name}/{regime:?}"), share);
                let make = || Guest::new(policy, regime, share, |_| {});
                let mut group = criterion.benchmark_group("update");
                group.throughput(Throughput::Elements((NR_PAGES as f64 * share) as u64));
                group.bench_function(id.clone(), |bencher| {
                    bencher.iter_custom(|n| ticks(n, make, |_| {}, Guest::sample, Guest::send));
                });
                group.finish();
                criterion.benchmark_group("rank").bench_function(id.clone(), |bencher| {
                    bencher.iter_custom(|n| ticks(n, make, Guest::sample, Guest::plan, Guest::send));
                });
                criterion.benchmark_group("tick").bench_function(id, |bencher| {
                    let tick = |guest: &mut Guest| {
                        guest.sample();
                        guest.send();
                    };
                    bencher.iter_custom(|n| ticks(n, make, |_| {}, tick, |_| {}));
                });
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(2));
    targets = scan, forecast
}

fn main() {
    let arguments: Vec<String> = std::env::args().filter(|argument| argument != "--bench").collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--ratios") {
        ratios::print(arguments.get(at + 1).map(String::as_str));
    } else {
        benches();
        Criterion::default().configure_from_args().final_summary();
    }
}
