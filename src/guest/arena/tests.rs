//! The machine as a whole: determinism, take-over, detection, pace.

use std::time::Duration;

use proptest::prelude::*;

use super::cpu::Cpu;
use super::layout::{CPU, Layout, Role};
use super::ram::Page;
use super::*;
use crate::page::{PAGE_SIZE, Pfn};

/// Two chunks, the second of them zero pages.
const PAGES: usize = 1024;

fn blank() -> Vec<u8> {
    vec![0; PAGES * PAGE_SIZE]
}

fn spec(workload: Workload, seed: u64) -> Spec {
    Spec { zero_share_percent: 50, ..Spec::new(workload, seed) }
}

fn page(ram: &mut [u8], pfn: Pfn) -> &mut [u8] {
    &mut ram[pfn.index() * PAGE_SIZE..][..PAGE_SIZE]
}

fn copy_page(to: &mut [u8], from: &[u8], pfn: Pfn) {
    page(to, pfn).copy_from_slice(&from[pfn.index() * PAGE_SIZE..][..PAGE_SIZE]);
}

fn steps(machine: &mut Machine, ops: u32) {
    for _ in 0..ops {
        machine.step();
    }
}

/// The CPU page but for what differs between a machine that was taken over and one that was not.
fn state(ram: &[u8]) -> Cpu {
    let cpu_page: &Page = ram.first_chunk().unwrap();
    Cpu { resumes: 0, ..Cpu::load(cpu_page).unwrap() }
}

fn check(ram: &mut [u8]) -> CheckReport {
    Machine::resume(ram).unwrap().check_all(&mut || true)
}

fn first_error(ram: &mut [u8]) -> Option<(FaultKind, Pfn)> {
    check(ram).first_error.map(|fault| (fault.kind, fault.pfn))
}

/// A machine's RAM at two moments, and the data pages written in between.
fn two_moments() -> (Vec<u8>, Vec<u8>, Vec<Pfn>) {
    let mut old = blank();
    steps(&mut Machine::boot(&mut old, &spec(Workload::Uniform, 3)).unwrap(), 100);
    let mut new = old.clone();
    steps(&mut Machine::resume(&mut new).unwrap(), 100);
    let layout = Layout::new(PAGES as u64, 50, 3).unwrap();
    let written = (0..layout.nr_owned()).map(|at| layout.owned(at));
    let written = written.filter(|&pfn| page(&mut old, pfn) != page(&mut new, pfn)).collect();
    (old, new, written)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_copy_of_ram_goes_on_exactly_as_the_original(
        workload in prop::sample::select(&Workload::ALL[..]),
        seed: u64, before in 0u32..400, after in 0u32..400,
    ) {
        let (mut original, mut first_half) = (blank(), blank());
        steps(&mut Machine::boot(&mut original, &spec(workload, seed)).unwrap(), before + after);
        steps(&mut Machine::boot(&mut first_half, &spec(workload, seed)).unwrap(), before);
        let mut copy = first_half.clone();
        steps(&mut Machine::resume(&mut copy).unwrap(), after);
        prop_assert_eq!(state(&original), state(&copy));
        prop_assert!(original[PAGE_SIZE..] == copy[PAGE_SIZE..]);
        prop_assert_eq!(check(&mut copy).errors, 0);
    }

    #[test]
    fn a_flipped_bit_is_found_and_its_page_named(bit in PAGE_SIZE * 8..PAGES * PAGE_SIZE * 8) {
        let mut ram = blank();
        Machine::boot(&mut ram, &spec(Workload::Kv, 3)).unwrap();
        ram[bit / 8] ^= 1 << (bit % 8);
        let pfn = Pfn((bit / 8 / PAGE_SIZE) as u64);
        let kind = match Layout::new(PAGES as u64, 50, 3).unwrap().role(pfn) {
            Role::Cpu => unreachable!("the CPU page is left out"),
            Role::Table => FaultKind::TornTable,
            Role::Owned(_) => FaultKind::Torn,
            Role::Zero(_) => FaultKind::NotZero,
        };
        prop_assert_eq!(first_error(&mut ram), Some((kind, pfn)));
    }

    #[test]
    fn the_clock_decides_when_operations_run_and_never_which(
        slices in prop::collection::vec(0u64..3_000_000, 1..8),
    ) {
        let (mut paced, mut stepped) = (blank(), blank());
        let mut machine = Machine::boot(&mut paced, &spec(Workload::Phases, 8)).unwrap();
        for nanos in slices {
            machine.advance(Duration::from_nanos(nanos), &mut || true);
        }
        let ops = machine.stats().ops;
        steps(&mut Machine::boot(&mut stepped, &spec(Workload::Phases, 8)).unwrap(), ops as u32);
        prop_assert!(paced[PAGE_SIZE..] == stepped[PAGE_SIZE..]);
        prop_assert_eq!(state(&paced).registers, state(&stepped).registers);
    }
}

#[test]
fn another_seed_is_another_machine() {
    let (mut one, mut other) = (blank(), blank());
    Machine::boot(&mut one, &spec(Workload::Kv, 1)).unwrap();
    Machine::boot(&mut other, &spec(Workload::Kv, 2)).unwrap();
    assert!(one != other);
}

#[test]
fn a_sound_machine_passes_every_check() {
    let (mut old, mut new, written) = two_moments();
    assert!(written.len() > 50);
    for ram in [&mut old, &mut new] {
        let report = check(ram);
        assert_eq!(report, CheckReport { pages: PAGES as u64, errors: 0, first_error: None, complete: true });
    }
    let stats = read_stats(&new).unwrap();
    assert_eq!((stats.ops, stats.errors, stats.resumes), (200, 0, 2));
    assert_eq!(stats.writes, 200 + Machine::resume(&mut new).unwrap().owned_pages());
    assert_eq!(stats.checks, 200 + 200 / 16 + PAGES as u64);
}

#[test]
fn a_stale_page_is_found_and_named() {
    let (old, new, written) = two_moments();
    for pfn in written.into_iter().step_by(4) {
        let mut ram = new.clone();
        copy_page(&mut ram, &old, pfn);
        let report = check(&mut ram);
        assert_eq!(report.errors, 1);
        assert_eq!(report.first_error, Some(Fault { kind: FaultKind::Stale, pfn, op: 200 }));
    }
}

#[test]
fn a_torn_page_is_found_and_named() {
    let (old, new, written) = two_moments();
    for (pfn, cut) in written.into_iter().step_by(4).zip((256..).step_by(256)) {
        let mut ram = new.clone();
        let from = pfn.index() * PAGE_SIZE;
        let cut = cut % PAGE_SIZE;
        ram[from + cut..from + PAGE_SIZE].copy_from_slice(&old[from + cut..from + PAGE_SIZE]);
        let expected = if cut == 0 { FaultKind::Stale } else { FaultKind::Torn };
        assert_eq!(first_error(&mut ram), Some((expected, pfn)), "cut at {cut}");
    }
}

#[test]
fn a_page_that_never_came_or_went_elsewhere_is_found_and_named() {
    let (_, mut new, written) = two_moments();
    page(&mut new, written[1]).fill(0);
    assert_eq!(first_error(&mut new), Some((FaultKind::Missing, written[1])));
    new.copy_within(
        written[0].index() * PAGE_SIZE..written[0].index() * PAGE_SIZE + PAGE_SIZE,
        written[1].index() * PAGE_SIZE,
    );
    assert_eq!(first_error(&mut new), Some((FaultKind::Misplaced, written[1])));
}

#[test]
fn a_stale_table_is_found_and_named() {
    let (old, mut new, _) = two_moments();
    copy_page(&mut new, &old, Pfn(1));
    assert_eq!(first_error(&mut new), Some((FaultKind::StaleTable, Pfn(1))));
}

#[test]
fn a_stale_cpu_page_is_found_and_named() {
    let (old, mut new, _) = two_moments();
    copy_page(&mut new, &old, CPU);
    assert_eq!(first_error(&mut new), Some((FaultKind::StaleCpu, CPU)));
}

#[test]
fn a_cpu_page_ahead_of_all_the_rest_is_found() {
    let (mut old, new, _) = two_moments();
    copy_page(&mut old, &new, CPU);
    assert_eq!(first_error(&mut old), Some((FaultKind::LostWrites, CPU)));
}

#[test]
fn the_workload_notices_a_stale_page_when_it_writes_it() {
    let (old, mut new, written) = two_moments();
    for &pfn in &written {
        copy_page(&mut new, &old, pfn);
    }
    let mut machine = Machine::resume(&mut new).unwrap();
    steps(&mut machine, 100);
    let stats = machine.stats();
    assert!(stats.errors > 4);
    assert_eq!(stats.first_errors.len(), 4);
    for fault in stats.first_errors {
        assert!(fault.kind == FaultKind::Stale && written.contains(&fault.pfn), "{fault}");
        assert!((200..300).contains(&fault.op), "{fault}");
    }
}

#[test]
fn the_scrub_finds_damage_in_pages_that_are_never_written() {
    let mut ram = blank();
    Machine::boot(&mut ram, &spec(Workload::Idle, 1)).unwrap();
    let pfn = Pfn(600);
    page(&mut ram, pfn)[100] = 1;
    let mut machine = Machine::resume(&mut ram).unwrap();
    steps(&mut machine, 599 * 16);
    assert_eq!(machine.stats().errors, 0);
    steps(&mut machine, 16);
    assert_eq!(machine.stats().first_errors, [Fault { kind: FaultKind::NotZero, pfn, op: 600 * 16 }]);
}

#[test]
fn an_interrupted_check_says_so() {
    let mut ram = blank();
    let mut machine = Machine::boot(&mut ram, &spec(Workload::Idle, 1)).unwrap();
    let mut left = 10;
    let report = machine.check_all(&mut || {
        left -= 1;
        left >= 0
    });
    assert_eq!(report, CheckReport { pages: 10, errors: 0, first_error: None, complete: false });
}

#[test]
fn images_that_are_not_of_this_machine_are_refused() {
    let mut ram = blank();
    assert!(matches!(Machine::resume(&mut ram), Err(MachineError::NotAMachine)));
    assert!(matches!(Machine::resume(&mut []), Err(MachineError::NotAMachine)));
    assert!(matches!(Machine::resume(&mut ram[1..]), Err(MachineError::PartPage { .. })));
    Machine::boot(&mut ram, &spec(Workload::Kv, 1)).unwrap();
    let part = &mut ram.clone()[..PAGES / 2 * PAGE_SIZE];
    assert!(matches!(Machine::resume(part), Err(MachineError::Size { stored: 1024, actual: 512 })));
    ram[200] ^= 1;
    assert!(matches!(Machine::resume(&mut ram), Err(MachineError::CpuPageDamaged)));
}

/// Operations in `ms` milliseconds of a clock that is read every `every_ms`, and the machine after that.
fn run(machine: &mut Machine, ms: u64, every_ms: u64) -> u64 {
    let before = machine.stats().ops;
    for _ in 0..ms / every_ms {
        let mut elapsed = Duration::from_millis(every_ms);
        while machine.advance(elapsed, &mut || true).next_due_in.is_zero() {
            elapsed = Duration::ZERO;
        }
    }
    machine.stats().ops - before
}

#[test]
fn each_workload_keeps_to_its_mean_rate() {
    let steady = [Workload::Idle, Workload::Kv, Workload::Uniform, Workload::Sweep, Workload::Gc];
    for workload in steady {
        let mut ram = blank();
        // In 6 s at 500/s sweep goes through two periods and gc through some 16 cycles.
        let spec = Spec { rate: Some(500), ..spec(workload, 1) };
        let ops = run(&mut Machine::boot(&mut ram, &spec).unwrap(), 6000, 3);
        assert!(ops.abs_diff(3000) <= 30, "{workload}: {ops}");
    }
}

#[test]
fn a_pause_is_not_followed_by_a_burst() {
    let mut ram = blank();
    let spec = Spec { rate: Some(10_000), ..spec(Workload::Uniform, 1) };
    let mut machine = Machine::boot(&mut ram, &spec).unwrap();
    run(&mut machine, 20, 1);
    assert!(machine.stats().longest_silence <= Duration::from_millis(1));
    let mut ops = u64::from(machine.advance(Duration::from_secs(2), &mut || true).ops);
    assert_eq!(ops, 256, "a slice");
    ops += run(&mut machine, 1, 1);
    assert!((500..=515).contains(&ops), "{ops}: 50 ms of backlog, 1 ms of operation");
    let silence = machine.stats().longest_silence;
    assert!(silence.abs_diff(Duration::from_secs(2)) <= Duration::from_millis(1), "{silence:?}");
}

#[test]
fn an_unlimited_machine_always_has_an_operation_due() {
    let mut ram = blank();
    let mut machine = Machine::boot(&mut ram, &spec(Workload::Storm, 1)).unwrap();
    for _ in 0..3 {
        let advance = machine.advance(Duration::from_micros(300), &mut || true);
        assert_eq!(advance, Advance { ops: 256, next_due_in: Duration::ZERO });
    }
    let stopped = machine.advance(Duration::from_micros(300), &mut || false);
    assert_eq!(stopped, Advance { ops: 0, next_due_in: Duration::ZERO });
    assert_eq!(machine.stats().longest_silence, Duration::from_micros(300));
}

#[test]
fn what_is_due_while_the_guest_stands_still_is_late_and_not_made_good() {
    let mut ram = blank();
    let spec = Spec { rate: Some(1000), ..spec(Workload::Uniform, 3) };
    let mut machine = Machine::boot(&mut ram, &spec).unwrap();
    let first = machine.advance(Duration::from_millis(10), &mut || true).ops;
    machine.stand_still(Duration::from_millis(40));
    assert_eq!(machine.advance(Duration::ZERO, &mut || true).ops, 0);
    let then = machine.advance(Duration::from_millis(10), &mut || true).ops;
    assert!((9..=11).contains(&first) && (9..=11).contains(&then), "{first}, {then}");
    let stats = machine.stats();
    assert_eq!(stats.guest_time, Duration::from_millis(60), "the time has passed all the same");
    assert!(stats.longest_silence <= Duration::from_millis(10), "{:?}", stats.longest_silence);
}
