//! A process for tests to attach to: the test program itself, run again with one test only.
//!
//! It has threads in all kinds of waits, one that computes, a signal handler that runs a thousand times a second, and
//! memory whose pages it writes on request. It counts what goes wrong.

mod regions;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::thread::{NanosleepRelativeResult, nanosleep};
use rustix::time::Timespec;

use crate::page::PAGE_SIZE;

const MODE: &str = "PAGECAST_SPECIMEN";
const PROMPT: &str = "=>";

/// What goes on in a specimen; each has a counter of rounds that went well.
const WORK: [&str; 6] = ["compute", "nanosleep", "poll", "read", "futex", "epoll"];
static ROUNDS: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
static ERRORS: AtomicU64 = AtomicU64::new(0);
/// epoll_wait that ended with EINTR: a stop may do that to it.
static EPOLL_EINTR: AtomicU64 = AtomicU64::new(0);
static SIGNALS: AtomicU64 = AtomicU64::new(0);

/// A running specimen; killed when it is dropped.
pub struct Specimen {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Specimen {
    /// Starts one: `busy` with all its threads, or only with memory to write.
    pub fn start(busy: bool) -> Self {
        let program = std::env::current_exe().expect("the test program");
        let mut child = Command::new(program)
            .args(["--exact", "sys::ptrace::specimen::lives", "--ignored", "--nocapture", "--test-threads=1"])
            .env(MODE, if busy { "busy" } else { "memory" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test program can be run again");
        let to = child.stdin.take().expect("piped");
        let from = BufReader::new(child.stdout.take().expect("piped"));
        let mut specimen = Specimen { child, to, from };
        specimen.answer();
        specimen
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Gives a command and returns the answer: numbers.
    pub fn ask(&mut self, command: &str) -> Vec<u64> {
        writeln!(self.to, "{command}").expect("the specimen listens");
        self.answer()
    }

    fn answer(&mut self) -> Vec<u64> {
        loop {
            let mut line = String::new();
            assert_ne!(self.from.read_line(&mut line).expect("the specimen answers"), 0, "the specimen died");
            // The test runner may have written the start of the line.
            if let Some((_, numbers)) = line.split_once(PROMPT) {
                return numbers
                    .split_ascii_whitespace()
                    .map(|word| word.parse().expect("a number"))
                    .collect();
            }
        }
    }

    /// Asserts that everything in it goes on, and that nothing went wrong.
    pub fn assert_well(&mut self) {
        let before = self.ask("report");
        let since = Instant::now();
        loop {
            let now = self.ask("report");
            assert_eq!(now[0], 0, "errors in the specimen; {now:?}");
            if now[2..].iter().zip(&before[2..]).all(|(now, before)| now > before) {
                return;
            }
            assert!(
                since.elapsed() < Duration::from_secs(60),
                "{WORK:?} do not all go on: {before:?} {now:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Specimen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "other tests run it as the process that they attach to"]
fn lives() {
    let Ok(mode) = std::env::var(MODE) else { return };
    if mode == "busy" {
        start_threads();
    }
    let mut memories: Vec<Vec<u8>> = Vec::new();
    let mut regions = regions::Regions::default();
    println!("{PROMPT}");
    for line in std::io::stdin().lines() {
        let line = line.expect("text");
        let mut words = line.split_ascii_whitespace();
        let command = words.next().unwrap_or("");
        let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
        let mut left = numbers.iter().copied();
        let mut next = || left.next().expect("one more number");
        match command {
            // A mapping of its own, since it is large; zeroes that are not there yet.
            "map" => {
                let memory = vec![0u8; next() * PAGE_SIZE];
                println!("{PROMPT} {}", memory.as_ptr() as u64);
                memories.push(memory);
            }
            // memory, first page, step, how many
            "write" => {
                let (memory, first, step, count) = (next(), next(), next(), next());
                let start = memories[memory].as_ptr().align_offset(PAGE_SIZE);
                for number in 0..count {
                    let at = start + (first + number * step) * PAGE_SIZE;
                    memories[memory][at] = memories[memory][at].wrapping_add(1);
                }
                println!("{PROMPT}");
            }
            "unmap" => {
                memories.remove(next());
                println!("{PROMPT}");
            }
            // Has the kernel kill this process for a userfaultfd call.
            "seccomp" => println!("{PROMPT} {}", u8::from(!forbid_userfaultfd())),
            "report" => {
                let rounds = ROUNDS.iter().map(|rounds| rounds.load(Ordering::Relaxed).to_string());
                let rounds: Vec<String> = rounds.collect();
                println!(
                    "{PROMPT} {} {} {} {}",
                    ERRORS.load(Ordering::Relaxed),
                    EPOLL_EINTR.load(Ordering::Relaxed),
                    SIGNALS.load(Ordering::Relaxed),
                    rounds.join(" ")
                );
            }
            _ => {
                let answer = regions.obey(command, &numbers);
                let answer = answer.unwrap_or_else(|| panic!("what is {command}?"));
                println!("{PROMPT} {}", answer.iter().map(u64::to_string).collect::<Vec<String>>().join(" "));
            }
        }
    }
    std::process::exit(0);
}

fn start_threads() {
    let work: [fn() -> bool; 6] =
        [compute, sleep, wait_in_poll, read_a_pipe, wait_for_condition, wait_in_epoll];
    for (number, work) in work.into_iter().enumerate() {
        let name = WORK[number].to_owned();
        let run = move || loop {
            let counter = if work() { &ROUNDS[number] } else { &ERRORS };
            counter.fetch_add(1, Ordering::Relaxed);
        };
        std::thread::Builder::new().name(name).spawn(run).expect("a thread");
    }
    interrupt_often();
}

/// Any register that changes under its feet changes the result.
fn compute() -> bool {
    let run = || {
        let (mut x, mut y) = (0x9E37_79B9_u64, 1.000_000_1_f64);
        for round in 0..20_000u64 {
            x = (x ^ round).rotate_left(7).wrapping_mul(0xD6E8_FEB8_6659_FD93);
            y = (y * 1.000_001 + x as f64 * 1e-30).sqrt();
        }
        (x, y.to_bits())
    };
    run() == run()
}

fn sleep() -> bool {
    let begun = Instant::now();
    let time = Timespec { tv_sec: 0, tv_nsec: 7_000_000 };
    let result = nanosleep(&time);
    matches!(result, NanosleepRelativeResult::Ok) && begun.elapsed() >= Duration::from_millis(7)
}

fn wait_in_poll() -> bool {
    let (read, _write) = rustix::pipe::pipe().expect("a pipe");
    let time = Timespec { tv_sec: 0, tv_nsec: 9_000_000 };
    let begun = Instant::now();
    let result = poll(&mut [PollFd::new(&read, PollFlags::IN)], Some(&time));
    result == Ok(0) && begun.elapsed() >= Duration::from_millis(9)
}

fn read_a_pipe() -> bool {
    let (read, write) = rustix::pipe::pipe().expect("a pipe");
    let writer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        rustix::io::write(&write, b"whole") == Ok(5)
    });
    let mut bytes = [0; 5];
    let read = rustix::io::read(&read, &mut bytes);
    writer.join().expect("the writer") && read == Ok(5) && &bytes == b"whole"
}

fn wait_for_condition() -> bool {
    let (never, lock) = (std::sync::Condvar::new(), std::sync::Mutex::new(()));
    let begun = Instant::now();
    let guard = lock.lock().expect("nobody panics here");
    let (_guard, result) =
        never.wait_timeout_while(guard, Duration::from_millis(6), |()| true).expect("nobody panics here");
    result.timed_out() && begun.elapsed() >= Duration::from_millis(6)
}

fn wait_in_epoll() -> bool {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll");
    let mut events = Vec::with_capacity(1);
    let time = Timespec { tv_sec: 0, tv_nsec: 8_000_000 };
    match epoll::wait(&set, rustix::buffer::spare_capacity(&mut events), Some(&time)) {
        Ok(count) => count == 0,
        Err(rustix::io::Errno::INTR) => {
            EPOLL_EINTR.fetch_add(1, Ordering::Relaxed);
            true
        }
        Err(_) => false,
    }
}

/// A timer's signal a thousand times a second, to a thread that does nothing but that, so that no call of another thread
/// has a reason to end early.
fn interrupt_often() {
    extern "C" fn count(_: libc::c_int) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    std::thread::spawn(|| {
        // SAFETY: the handler only adds to an atomic; all structures are initialised and outlive the calls. The mask is this
        // thread's own.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int) = count;
            action.sa_sigaction = handler as usize;
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
            loop {
                let this = libc::syscall(libc::SYS_gettid);
                libc::syscall(libc::SYS_tgkill, libc::getpid(), this, libc::SIGUSR1);
                libc::usleep(1000);
            }
        }
    });
}

fn forbid_userfaultfd() -> bool {
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        // The number of the system call; userfaultfd: kill the process; anything else: go on.
        step((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        step((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, libc::SYS_userfaultfd as u32, 0, 1),
        step((libc::BPF_RET | libc::BPF_K) as u16, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
        step((libc::BPF_RET | libc::BPF_K) as u16, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter outlive the calls, which copy them.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    }
}
