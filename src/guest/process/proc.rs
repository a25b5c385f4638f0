//! What /proc says of a process. Everything here may be out of date when it is used, and the process may be gone.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::sys::ptrace::SYSCALL_INSTRUCTION;

/// Some fields of /proc/PID/stat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The state's letter: R, S, D, T, t, Z, X, I.
    pub state: u8,
    /// Minor faults of all its threads so far.
    pub minor_faults: u64,
    /// Minor faults of its children that have ended and that it has taken note of.
    pub child_faults: u64,
    /// CPU time of all its threads so far, in user mode and in the kernel.
    pub cpu: Duration,
    /// Its threads, the main one included even if that has ended before the others.
    pub threads: u64,
    /// When it was started, in clock ticks after boot; with the number it names a process for good.
    pub start_ticks: u64,
    /// Where its program and its stack begin: another program after exec has another place for at least one of them.
    pub program: (u64, u64),
}

impl Stat {
    /// Reads it; an error is the end of the process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text, rustix::param::clock_ticks_per_second())
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat makes no sense")))
    }

    fn parse(text: &str, ticks_per_s: u64) -> Option<Self> {
        // The name in brackets may contain anything.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // Numbered as in proc(5), where the state is field 3.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let ticks = number(14)? + number(15)?;
        Some(Stat {
            state: *fields.first()?.as_bytes().first()?,
            minor_faults: number(10)?,
            child_faults: number(11)?,
            cpu: Duration::from_secs_f64(ticks as f64 / ticks_per_s.max(1) as f64),
            threads: number(20)?,
            start_ticks: number(22)?,
            program: (number(26)?, number(28)?),
        })
    }

    /// Whether it has ended and only waits for its parent to notice.
    pub fn has_ended(&self) -> bool {
        self.lacks_main_thread() && self.threads <= 1
    }

    /// Whether its main thread has ended, perhaps before the others. /proc says nothing of its mappings then.
    pub fn lacks_main_thread(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// The name of the program that a process runs.
pub fn name(pid: i32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned())
}

/// The threads of a process.
pub fn threads(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The state of a thread, by its letter; None when it is gone.
pub fn thread_state(pid: i32, thread: i32) -> Option<u8> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
    text.rsplit_once(") ")?.1.bytes().next()
}

/// The children of a process that are there now.
pub fn children(pid: i32) -> Vec<i32> {
    let of_thread = |thread: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/children")).unwrap_or_default();
        text.split_ascii_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<i32>>()
    };
    threads(pid).into_iter().flat_map(of_thread).collect()
}

/// Whether system calls of a thread go through a seccomp filter: each thread may have its own.
pub fn has_seccomp(pid: i32, thread: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).unwrap_or_default();
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() != "0"))
}

/// System calls of x86-64 that a stop ends with EINTR instead of going on afterwards: signal(7), "Interruption of system
/// calls and library functions by stop signals". Calls on sockets with a timeout are not told by their number.
const ENDED_BY_A_STOP: [i64; 9] = [
    65,  // semop
    128, // rt_sigtimedwait
    208, // io_getevents
    220, // semtimedop
    232, // epoll_wait
    281, // epoll_pwait
    333, // io_pgetevents
    426, // io_uring_enter
    441, // epoll_pwait2
];

/// The threads of a process, the least disturbed by a stop first: those that are running, then those in a system call
/// that goes on after the stop, then those whose call would end with EINTR.
pub fn threads_least_disturbed_first(pid: i32) -> Vec<i32> {
    let mut threads = threads(pid);
    threads.sort_by_cached_key(|thread| {
        let call = fs::read_to_string(format!("/proc/{pid}/task/{thread}/syscall")).unwrap_or_default();
        (disturbance(&call), *thread)
    });
    threads
}

fn disturbance(syscall: &str) -> u8 {
    let mut words = syscall.split_ascii_whitespace();
    match words.next() {
        Some("running") => 0,
        Some(number) => match number.parse::<i64>() {
            Ok(number) if ENDED_BY_A_STOP.contains(&number) => 2,
            Ok(_) => 1,
            Err(_) => 3,
        },
        None => 3,
    }
}

/// Where in the memory of a process there is a `syscall` instruction: in the kernel's own `[vdso]`, or else in any
/// executable mapping, files first.
pub fn find_syscall_instruction(pid: i32) -> io::Result<Option<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut places: Vec<(u8, Range<u64>)> = maps.lines().filter_map(executable).collect();
    places.sort_by_key(|(rank, range)| (*rank, range.start));
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    Ok(places.into_iter().find_map(|(_, range)| search(&memory, range)))
}

/// An executable line of /proc/PID/maps with its rank.
fn executable(line: &str) -> Option<(u8, Range<u64>)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
    let permissions = words.next()?;
    let name = words.nth(3).unwrap_or("");
    let rank = match name {
        "[vsyscall]" => return None,
        "[vdso]" => 0,
        file if file.starts_with('/') => 1,
        _ => 2,
    };
    permissions.contains('x').then_some((rank, range))
}

fn search(memory: &File, range: Range<u64>) -> Option<u64> {
    const PIECE: u64 = 64 * 1024;
    let mut piece = vec![0; PIECE as usize];
    let mut at = range.start;
    while at < range.end {
        let len = PIECE.min(range.end - at) as usize;
        let read = memory.read_at(&mut piece[..len], at).ok()?;
        if let Some(found) = piece[..read].windows(2).position(|two| two == SYSCALL_INSTRUCTION) {
            return Some(at + found as u64);
        }
        // One byte again: the instruction may lie across the border.
        at += (read as u64).max(2) - 1;
        if read < 2 {
            return None;
        }
        if at + 1 >= range.end {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_a_stat_line_are_found_behind_a_name_of_any_kind() {
        let tail = "S 1 2 3 4 5 6 700 8 9 10 150 50 13 14 15 16 17 18 4242 20 21 22 111 112 333 27 28";
        for name in ["redis", "a) b (c", ") R 1"] {
            let stat = Stat::parse(&format!("77 ({name}) {tail}\n"), 100).unwrap();
            assert_eq!((stat.state, stat.minor_faults, stat.start_ticks), (b'S', 700, 4242));
            assert_eq!((stat.cpu, stat.program), (Duration::from_secs(2), (111, 333)));
        }
        let without_main = tail.replacen('S', "Z", 1);
        let stat = |tail: &str| Stat::parse(&format!("77 (x) {tail}"), 100).unwrap();
        assert!(!stat(&without_main).has_ended(), "17 threads are left");
        assert!(stat(&without_main.replacen(" 17 ", " 1 ", 1)).has_ended());
        assert_eq!(Stat::parse("77 (cut) S 1 2", 100), None);
        assert_eq!(Stat::parse("nonsense", 100), None);
    }

    #[test]
    fn this_process_has_a_syscall_instruction_and_threads() {
        let own = std::process::id() as i32;
        assert!(find_syscall_instruction(own).unwrap().is_some());
        assert!(threads_least_disturbed_first(own).contains(&own));
        assert!(!Stat::of(own).unwrap().has_ended());
    }

    #[test]
    fn a_running_thread_is_preferred_to_one_whose_call_a_stop_would_end() {
        let mut calls = ["232 0x5 0x7f 0x10", "", "202 0x1 0x80", "running\n", "-1 0x0 0x0"];
        calls.sort_by_key(|call| disturbance(call));
        assert_eq!(calls, ["running\n", "202 0x1 0x80", "-1 0x0 0x0", "232 0x5 0x7f 0x10", ""]);
    }
}
