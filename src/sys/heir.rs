//! An heir: a child that has this process's memory together with it, and lives a little longer.
//!
//! Who waits for a process to end waits until its memory is taken apart. Foreign mappings of a guest's pages are slow to
//! take apart (docs/data-path.md has what was measured), and libxl waits for its save helper while the guest stands still.
//! With an heir the memory is not taken apart before the heir ends too, and nobody waits for that.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use libc::{c_int, c_void};

use super::signals;

/// Bytes of the heir's stack: it calls nothing but the kernel.
const STACK_BYTES: usize = 64 << 10;

/// What the heir is given.
struct Testament {
    parent: i32,
    /// Where the heir stands.
    state: AtomicU32,
}

/// The heir's priority: it takes memory apart while others hurry, but not so late that the memory is missed.
const NICE: c_int = 10;

static APPOINTED: AtomicBool = AtomicBool::new(false);

const STARTING: u32 = 0;
const READY: u32 = 1;
const FAILED: u32 = 2;

/// Starts an heir of this process and returns its number. Until this process ends it sleeps, with every signal blocked, none
/// of this process's descriptors and a low priority; then it ends as well. Its stack, 64 KiB, is never freed, and if this
/// process became another program, the heir would keep the memory until that ends: for processes that are to end soon. To be
/// called on the main thread, whose stack and storage last as long as the process.
///
/// Errors: no process is to be had, or the kernel (before Linux 5.9) cannot close descriptors in one go; an heir that kept
/// pipes open would keep others waiting.
pub fn appoint() -> io::Result<i32> {
    let parent = std::process::id() as i32;
    let testament: &'static Testament =
        Box::leak(Box::new(Testament { parent, state: AtomicU32::new(STARTING) }));
    let state = &testament.state;
    let stack: &'static mut [u128] =
        Box::leak(vec![0u128; STACK_BYTES / size_of::<u128>()].into_boxed_slice());
    let top = stack.as_mut_ptr_range().end.cast::<c_void>();
    let argument = std::ptr::from_ref(testament).cast_mut().cast::<c_void>();
    let child = signals::with_all_blocked(|| {
        // SAFETY: the child runs `wait_for_end` on a stack of its own, aligned and never freed, with a pointer to a testament
        // that is never freed either. It neither allocates nor locks nor panics. It uses this thread's storage for errno,
        // which lasts and which nobody looks at until the heir is ready; what it calls after that does not fail.
        match unsafe { libc::clone(wait_for_end, top, libc::CLONE_VM, argument) } {
            child if child < 0 => Err(io::Error::last_os_error()),
            child => Ok(child),
        }
    })??;
    while state.load(Ordering::Acquire) == STARTING {
        if is_over(child) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        std::thread::yield_now();
    }
    if state.load(Ordering::Acquire) == READY {
        APPOINTED.store(true, Ordering::Release);
        return Ok(child);
    }
    while !is_over(child) {
        std::thread::yield_now();
    }
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether this process has an heir: large mappings are then better left than taken apart.
pub fn is_appointed() -> bool {
    APPOINTED.load(Ordering::Acquire)
}

/// Whether the child has ended.
fn is_over(child: i32) -> bool {
    // SAFETY: looks after one child by its number and stores nothing.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) != 0 }
}

/// The heir's whole life. `testament` is a `Testament`.
extern "C" fn wait_for_end(testament: *mut c_void) -> c_int {
    // SAFETY: whoever started this passes a testament that is never freed. The other pointers are to literals and to a local that
    // outlives the call. What is closed are copies, of which this process uses none.
    unsafe {
        let Testament { parent, state } = &*testament.cast::<Testament>();
        libc::prctl(libc::PR_SET_NAME, c"pagecast-heir".as_ptr());
        let closed = libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) == 0;
        let ended = libc::syscall(libc::SYS_pidfd_open, *parent, 0) as c_int;
        // The parent may be gone already, and its number somebody else's.
        if !closed || ended < 0 || libc::getppid() != *parent {
            state.store(FAILED, Ordering::Release);
            return 1;
        }
        state.store(READY, Ordering::Release);
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
        // Readable when the last thread has ended, and has let go of the memory before that.
        let mut ended = libc::pollfd { fd: ended, events: libc::POLLIN, revents: 0 };
        while ended.revents == 0 {
            // Not poll: the C library keeps account of waits in the storage of the thread, which is somebody else's.
            libc::syscall(libc::SYS_ppoll, &raw mut ended, 1, 0, 0, 0);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};

    /// Says in the environment of a test program that it is to be the process that has an heir.
    const SPECIMEN: &str = "PAGECAST_TEST_HEIR";
    const UNSUPPORTED: &str = "no heir here";
    const TESTAMENT_BYTES: usize = 64 << 20;

    #[test]
    fn an_heir_keeps_the_memory_and_nothing_else_and_ends_after_its_parent() {
        if std::env::var_os(SPECIMEN).is_some() {
            return specimen();
        }
        let mut parent = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "sys::heir::tests::an_heir_keeps_the_memory_and_nothing_else_and_ends_after_its_parent",
            ])
            .env(SPECIMEN, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(parent.stdout.take().unwrap());
        let heir = loop {
            let mut line = String::new();
            assert!(said.read_line(&mut line).unwrap() > 0, "the specimen says the number of its heir");
            if line.contains(UNSUPPORTED) {
                eprintln!(
                    "skipped: this kernel cannot close descriptors in one go, or gives no descriptor of a process"
                );
                let _ = parent.wait();
                return;
            }
            if let Some((_, number)) = line.trim().split_once("heir ") {
                break number.to_owned();
            }
        };
        let status = std::fs::read_to_string(format!("/proc/{heir}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(field("Name:"), "pagecast-heir");
        assert_eq!(field("PPid:"), parent.id().to_string());
        assert!(field("VmRSS:").parse::<usize>().unwrap() * 1024 >= TESTAMENT_BYTES, "{status}");
        let blocked = u64::from_str_radix(&field("SigBlk:"), 16).unwrap();
        assert_eq!(blocked & (1 << (libc::SIGTERM - 1)), 1 << (libc::SIGTERM - 1));
        let descriptors = std::fs::read_dir(format!("/proc/{heir}/fd")).unwrap();
        let targets = descriptors.map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap());
        assert_eq!(targets.collect::<Vec<_>>(), [std::path::Path::new("anon_inode:[pidfd]")]);
        drop(parent.stdin.take());
        assert!(parent.wait().unwrap().success());
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        while is_alive(&heir) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Whether there is a process of this number that has not ended.
    fn is_alive(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| !stat.contains("(pagecast-heir) Z"))
    }

    fn specimen() {
        let testament = std::hint::black_box(vec![1u8; TESTAMENT_BYTES]);
        assert!(!super::is_appointed());
        let heir = match super::appoint() {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                return println!("{UNSUPPORTED}");
            }
            other => other.unwrap(),
        };
        assert!(super::is_appointed());
        println!("heir {heir}");
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        assert_eq!(testament[TESTAMENT_BYTES - 1], 1);
    }
}
