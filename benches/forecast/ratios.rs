//! The forecast against bare loops over the same memory, alternately in one run; one JSON object a line.

use crate::bare::Bare;
use crate::guest::{Guest, NR_PAGES, Pattern, Regime, bitmap};
use pagecast::forecast::PolicyKind;
use pagecast::page_set::PageSet;
use pagecast::sys::cpu::thread_cpu_time;
use pagecast::sys::simd::{Work, at_best};
use std::hint::black_box;
use std::time::Duration;

/// Ticks of each case, and scans of each bitmap.
const REPEATS: usize = 40;

/// CPU time that `work` takes, in milliseconds.
fn cpu_ms(work: impl FnOnce()) -> f64 {
    let began = thread_cpu_time();
    work();
    (thread_cpu_time() - began).as_secs_f64() * 1e3
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures and prints everything, or only scans or ticks of one policy: `which` is `scan`, `heat` or `ar`.
pub fn print(which: Option<&str>) {
    let wanted = |what| which.is_none_or(|which| which == what);
    if wanted("scan") {
        for mib in [256, 2] {
            clean_scan(mib);
        }
        for share in [0.001, 0.01, 0.1, 0.5] {
            dirty_scan(Pattern::Random, share);
        }
        dirty_scan(Pattern::Runs, 0.1);
    }
    // Bytes of the model of a page, as the assertions in src/forecast/ranked.rs have them.
    for (policy, model_bytes) in [(PolicyKind::Heat, 1), (PolicyKind::Ar, 1)] {
        if !wanted(policy.name()) {
            continue;
        }
        for regime in [Regime::Early, Regime::Late] {
            for share in [0.001, 0.01, 0.1] {
                tick(policy, model_bytes, regime, share);
            }
        }
    }
}

struct Sum<'a>(&'a [u64]);

impl Work for Sum<'_> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        self.0.iter().fold(0, |sum, word| sum.wrapping_add(*word))
    }
}

/// A clean bitmap of so many MiB against adding up its words.
fn clean_scan(mib: u64) {
    let nr_pages = mib << 23;
    let words = vec![0u64; nr_pages as usize / 64];
    // Written, or every page of it would be the kernel's one page of zeros.
    let words: Vec<u64> = words.iter().map(|word| black_box(*word)).collect();
    let mut set = PageSet::empty(nr_pages);
    let scans = (256 / mib) as usize;
    let (mut scan, mut read, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let scan_ms = cpu_ms(|| (0..scans).for_each(|_| set.insert_bitmap(black_box(&words))));
        let read_ms = cpu_ms(|| {
            (0..scans).for_each(|_| {
                black_box(at_best(Sum(black_box(&words))));
            });
        });
        scan.push(scan_ms / scans as f64);
        read.push(read_ms / scans as f64);
        ratio.push(read_ms / scan_ms);
    }
    assert!(set.is_empty());
    let gb_per_s = (mib << 20) as f64 / 1e6 / median(&mut scan);
    println!(
        r#"{{"case":"clean scan, {mib} MiB","ms":{:.4},"bare_ms":{:.4},"gb_per_s":{gb_per_s:.2},"of_read_speed":{:.3}}}"#,
        median(&mut scan),
        median(&mut read),
        median(&mut ratio)
    );
}

/// A bitmap of a 64 GiB guest taken into a set that holds the one before.
fn dirty_scan(pattern: Pattern, share: f64) {
    let words = bitmap(NR_PAGES, pattern, share, 1);
    let mut set = PageSet::empty(NR_PAGES);
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|_| {
            cpu_ms(|| {
                set.clear();
                set.insert_bitmap(black_box(&words));
            })
        })
        .collect();
    let ms = median(&mut times);
    let ns_per_page = ms * 1e6 / set.len() as f64;
    println!(
        r#"{{"case":"scan, {} % dirty, {pattern:?}","ms":{ms:.4},"ns_per_page":{ns_per_page:.2}}}"#,
        share * 100.0
    );
}

/// Ticks of a guest, each followed by the bare loop over the same pages.
fn tick(policy: PolicyKind, model_bytes: usize, regime: Regime, share: f64) {
    let mut bare = Bare::new(model_bytes);
    let mut guest = Guest::new(policy, regime, share, |dirty| bare.note_written(dirty));
    bare.set_pending(guest.engine.pending());
    let looks = regime == Regime::Late;
    let (mut whole, mut samples, mut bares, mut ratio) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut worst = Duration::ZERO;
    for repeat in 0..REPEATS + 2 {
        let log = guest.next_log().to_vec();
        let sample_ms = cpu_ms(|| guest.sample());
        let send_ms = cpu_ms(|| guest.send());
        let bare_ms = cpu_ms(|| {
            black_box(bare.tick(&log, looks, &guest.sent));
        });
        // The first ones find the bare loop's memory cold.
        if repeat >= 2 {
            whole.push(sample_ms + send_ms);
            samples.push(sample_ms);
            bares.push(bare_ms);
            ratio.push((sample_ms + send_ms) / bare_ms);
            worst = worst.max(Duration::from_secs_f64((sample_ms + send_ms) / 1e3));
        }
    }
    let ms = median(&mut whole);
    let huge_mib = guest.engine.huge_bytes() >> 20;
    println!(
        concat!(
            r#"{{"case":"tick, {}, {:?}, {} % dirty","ms":{:.3},"sample_ms":{:.3},"bare_ms":{:.3},"ratio":{:.3},"#,
            r#""worst_ms":{:.3},"ns_per_page":{:.2},"bytes_per_page":{:.3},"huge_mib":{}}}"#
        ),
        policy.name(),
        regime,
        share * 100.0,
        ms,
        median(&mut samples),
        median(&mut bares),
        median(&mut ratio),
        worst.as_secs_f64() * 1e3,
        ms * 1e6 / guest.dirty.len() as f64,
        guest.engine.state_bytes() as f64 / NR_PAGES as f64,
        huge_mib
    );
}
