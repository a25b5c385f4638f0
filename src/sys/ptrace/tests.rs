use std::time::{Duration, Instant};

use super::specimen::Specimen;
use super::*;
use crate::guest::process::proc::{find_syscall_instruction, has_seccomp, threads};
use crate::sys::userfaultfd::Userfaultfd;

fn order(specimen: &Specimen, thread: i32) -> Order {
    let syscall_at = find_syscall_instruction(specimen.pid()).unwrap().unwrap();
    let patience = Duration::from_secs(2);
    Order { pid: specimen.pid(), thread, syscall_at, has_seccomp: false, patience }
}

/// Attaches; None, with a word, where the machine does not allow it.
fn try_order(order: &Order, test: &str) -> Option<Result<Opened, BorrowError>> {
    match open_userfaultfd(order) {
        Err(BorrowError::Rights(pid)) => {
            eprintln!("SKIPPED: {test}: {}", BorrowError::Rights(pid));
            None
        }
        Err(BorrowError::Refused(pid, error)) => {
            eprintln!("SKIPPED: {test}: {}", BorrowError::Refused(pid, error));
            None
        }
        other => Some(other),
    }
}

fn descriptors_of(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn state_of(pid: i32) -> u8 {
    crate::guest::process::proc::Stat::of(pid).unwrap().state
}

fn wait_for_state(pid: i32, wanted: u8) {
    let since = Instant::now();
    while state_of(pid) != wanted {
        assert!(since.elapsed() < Duration::from_secs(30), "state {}", state_of(pid) as char);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_thread_can_be_borrowed_twenty_times_and_nothing_in_the_target_notices() {
    let test = "every_thread_can_be_borrowed_twenty_times_and_nothing_in_the_target_notices";
    let mut specimen = Specimen::start(true);
    specimen.assert_well();
    let before = descriptors_of(specimen.pid());
    let names = ["compute", "nanosleep", "poll", "futex", "epoll"];
    let wanted: Vec<i32> = threads(specimen.pid())
        .into_iter()
        .filter(|thread| {
            let path = format!("/proc/{}/task/{thread}/comm", specimen.pid());
            let name = std::fs::read_to_string(path).unwrap_or_default();
            *thread == specimen.pid() || names.contains(&name.trim_end())
        })
        .collect();
    assert_eq!(wanted.len(), names.len() + 1, "one thread of each kind, and the main thread in its read");
    for cycle in 0..20 {
        for thread in &wanted {
            let Some(result) = try_order(&order(&specimen, *thread), test) else { return };
            let opened = result.unwrap_or_else(|error| panic!("cycle {cycle}, thread {thread}: {error}"));
            Userfaultfd::adopt(opened.descriptor).unwrap();
        }
    }
    specimen.assert_well();
    // The read of a pipe makes descriptors of its own that come and go.
    assert!(descriptors_of(specimen.pid()).abs_diff(before) <= 6, "the target keeps no descriptor");
}

#[test]
fn a_stopped_target_can_be_borrowed_from_and_stays_stopped() {
    let test = "a_stopped_target_can_be_borrowed_from_and_stays_stopped";
    let mut specimen = Specimen::start(true);
    let pid = rustix::process::Pid::from_raw(specimen.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    wait_for_state(specimen.pid(), b'T');
    for _ in 0..5 {
        let Some(result) = try_order(&order(&specimen, specimen.pid()), test) else { return };
        result.unwrap();
        wait_for_state(specimen.pid(), b'T');
    }
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    specimen.assert_well();
}

#[test]
fn a_signal_that_arrives_meanwhile_is_not_lost() {
    let test = "a_signal_that_arrives_meanwhile_is_not_lost";
    let mut specimen = Specimen::start(true);
    let pid = rustix::process::Pid::from_raw(specimen.pid()).unwrap();
    for _ in 0..50 {
        let stop = std::thread::spawn(move || {
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        });
        let Some(result) = try_order(&order(&specimen, specimen.pid()), test) else { return };
        result.unwrap();
        stop.join().unwrap();
        wait_for_state(specimen.pid(), b'T');
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    }
    specimen.assert_well();
}

#[test]
fn a_filter_that_would_kill_the_target_for_the_call_is_suspended() {
    let test = "a_filter_that_would_kill_the_target_for_the_call_is_suspended";
    let mut specimen = Specimen::start(false);
    if specimen.ask("seccomp") != [0] {
        eprintln!("SKIPPED: {test}: this machine takes no seccomp filter");
        return;
    }
    let filtered = |specimen: &Specimen| {
        threads(specimen.pid()).into_iter().find(|thread| has_seccomp(specimen.pid(), *thread))
    };
    let thread = filtered(&specimen).expect("a thread has the filter");
    let order = Order { has_seccomp: true, ..order(&specimen, thread) };
    for _ in 0..5 {
        match open_userfaultfd(&order) {
            Err(error @ BorrowError::Seccomp(_)) => return eprintln!("SKIPPED: {test}: {error}"),
            other => assert!(other.is_ok(), "{other:?}"),
        }
        specimen.ask("report");
    }
    // And is in force again: not suspended, it does kill.
    let killed = open_userfaultfd(&Order { has_seccomp: false, ..order });
    assert!(matches!(killed, Err(BorrowError::Gone)), "{killed:?}");
}

#[test]
fn what_cannot_be_borrowed_says_why() {
    let specimen = Specimen::start(false);
    let gone = open_userfaultfd(&Order { thread: i32::MAX, ..order(&specimen, 0) });
    assert!(gone.as_ref().is_err_and(BorrowError::is_of_thread), "{gone:?}");
    let nowhere = open_userfaultfd(&Order { syscall_at: 4096, ..order(&specimen, specimen.pid()) });
    assert!(matches!(nowhere, Err(BorrowError::NoInstruction | BorrowError::Rights(_))), "{nowhere:?}");
    // And the specimen goes on.
    let mut specimen = specimen;
    specimen.ask("report");
}
