//! The shapes of the workloads' write sets, without any RAM.

use std::collections::BTreeSet;

use super::*;

const PAGES: u64 = 10_000;

/// A workload that runs at this rate.
struct Running {
    pattern: Box<dyn Pattern>,
    registers: Registers,
    rng: Rng,
}

impl Running {
    fn new(workload: Workload, rate: u32) -> Self {
        let spec = Spec { rate: Some(rate), ..Spec::new(workload, 5) };
        let rng = Rng::new(5, Purpose::Operations);
        Self { pattern: build(&spec, PAGES), registers: [0; REGISTERS], rng }
    }

    fn next(&mut self) -> Operation {
        let operation = self.pattern.next(&mut self.registers, &mut self.rng);
        assert!(operation.page < PAGES);
        operation
    }

    fn pages(&mut self, ops: u64) -> Vec<u64> {
        (0..ops).map(|_| self.next().page).collect()
    }
}

fn distinct(pages: &[u64]) -> u64 {
    pages.iter().collect::<BTreeSet<_>>().len() as u64
}

/// Whether each page is the one after the page before it.
fn sequential(pages: &[u64]) -> bool {
    pages.windows(2).all(|pair| pair[1] == (pair[0] + 1) % PAGES)
}

#[test]
fn idle_writes_sixteen_pages() {
    assert_eq!(distinct(&Running::new(Workload::Idle, 100).pages(2000)), 16);
}

#[test]
fn uniform_and_storm_write_all_pages_equally_often() {
    for workload in [Workload::Uniform, Workload::Storm] {
        let pages = Running::new(workload, 0).pages(PAGES);
        // A page is left out with probability 1/e.
        assert!(distinct(&pages).abs_diff(PAGES - 3679) < 200, "{workload}");
    }
}

#[test]
fn kv_writes_few_pages_often_and_most_of_them_rarely() {
    let pages = Running::new(Workload::Kv, 1000).pages(100_000);
    let mut counts = vec![0u64; PAGES as usize];
    pages.iter().for_each(|&page| counts[page as usize] += 1);
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let harmonic: f64 = (1..=8 * PAGES).map(|k| (k as f64).powf(-0.99)).sum();
    let hottest_key = 100_000.0 / harmonic;
    assert!((counts[0] as f64 - hottest_key).abs() < 0.1 * hottest_key, "{} {hottest_key}", counts[0]);
    let hottest_percent: u64 = counts[..100].iter().sum();
    assert!((40_000..60_000).contains(&hottest_percent), "{hottest_percent}");
    assert!(distinct(&pages) > PAGES / 2);
}

#[test]
fn sweep_rewrites_its_region_once_each_period_and_a_small_hot_set_in_between() {
    let mut sweep = Running::new(Workload::Sweep, 3000);
    let mut first_region = None;
    for _ in 0..3 {
        let burst: Vec<Operation> = (0..2500).map(|_| sweep.next()).collect();
        assert!(burst.iter().all(|operation| operation.pace == Pace::faster(4)));
        let region: Vec<u64> = burst.iter().map(|operation| operation.page).collect();
        assert!(sequential(&region) && distinct(&region) == 2500);
        assert_eq!(*first_region.get_or_insert(region.clone()), region);
        let hot = sweep.pages(9000 - 2500);
        assert!((50..=100).contains(&distinct(&hot)));
        assert!(hot.iter().all(|page| !region.contains(page)));
    }
}

#[test]
fn a_slow_sweep_takes_longer_for_its_period() {
    let mut sweep = Running::new(Workload::Sweep, 1);
    assert!(sequential(&sweep.pages(2500)));
    let before = sweep.pages(2500);
    assert!(distinct(&before) <= 100);
    assert!(sequential(&sweep.pages(2500)));
}

#[test]
fn gc_fills_the_young_generation_and_copies_survivors_to_the_old_front() {
    let mut gc = Running::new(Workload::Gc, 1000);
    let mut young_before = None;
    let mut last_survivor = None;
    for _ in 0..3 {
        let program = gc.pages(3000 + 3000 / 7);
        let (updates, allocations): (Vec<_>, Vec<_>) =
            program.iter().enumerate().partition(|(at, _)| at % 8 == 7);
        let young: Vec<u64> = allocations.into_iter().map(|(_, &page)| page).collect();
        assert!(sequential(&young) && young.len() == 3000);
        assert!(updates.iter().all(|(_, page)| !young.contains(page)));
        assert_eq!(*young_before.get_or_insert(young.clone()), young);

        let survivors: Vec<Operation> = (0..300).map(|_| gc.next()).collect();
        assert!(survivors.iter().all(|operation| operation.pace == Pace::faster(4)));
        let copied: Vec<u64> = survivors.iter().map(|operation| operation.page).collect();
        assert!(sequential(&copied) && !young.contains(&copied[0]));
        if let Some(last) = last_survivor {
            assert_eq!(copied[0], (last + 1) % PAGES, "the old front goes on");
        }
        last_survivor = copied.last().copied();
    }
}

#[test]
fn phases_change_every_two_to_four_seconds_and_each_mode_has_its_write_set() {
    let rate = 2000;
    let mut phases = Running::new(Workload::Phases, rate);
    let mut seen = BTreeSet::new();
    let mut next = phases.next();
    for _ in 0..30 {
        let (mode, pace) = (phases.registers[phases::MODE], next.pace);
        let mut pages = Vec::new();
        while phases.registers[phases::MODE] == mode {
            pages.push(next.page);
            next = phases.next();
        }
        let per_s = pace_rate(pace, rate.into());
        let seconds = pages.len() as f64 / per_s;
        assert!((1.9..=4.1).contains(&seconds), "{seconds} s at {per_s}/s");
        match mode {
            0 => assert!(distinct(&pages) <= PAGES / 4 && distinct(&pages) > 500),
            1 => assert!(sequential(&pages)),
            2 => assert!((480..=500).contains(&distinct(&pages))),
            _ => assert!(distinct(&pages) <= 16 && pace == Pace::slower(50)),
        }
        seen.insert(mode);
    }
    assert_eq!(seen.len(), 4);
}

fn pace_rate(pace: Pace, rate: u64) -> f64 {
    1e9 * rate as f64 / pace.stretch(1_000_000_000) as f64
}

#[test]
fn any_registers_name_a_page_there_is() {
    for workload in Workload::ALL {
        let mut running = Running::new(workload, 1000);
        for garbage in [u64::MAX, u64::MAX / 2, PAGES, 1 << 32] {
            running.registers = [garbage; REGISTERS];
            running.pages(10);
        }
    }
}

#[test]
fn a_period_with_a_burst_keeps_to_the_mean() {
    let rest = Pace::rest(Pace::faster(4), 2500, 9000);
    let period = 2500 * Pace::faster(4).stretch(1_000_000) + 6500 * rest.stretch(1_000_000);
    assert!(period.abs_diff(9_000_000_000) < 9_000_000, "{period}");
}
