//! One process, attached to: its userfaultfd and its page map.

use std::io;
use std::time::Duration;

use super::proc::{self, Stat};
use crate::sys::TrackingError;
use crate::sys::pagemap::Pagemap;
use crate::sys::ptrace::{self, BorrowError, Opened, Order};
use crate::sys::userfaultfd::Userfaultfd;

/// How many of a process's threads are asked before it is given up.
const MAX_THREADS: usize = 16;

/// A process whose memory can be tracked. Dropping it ends the tracking; the process does not notice either.
pub struct Attachment {
    /// The process.
    pub pid: i32,
    /// Registers its memory.
    pub uffd: Userfaultfd,
    /// Tells what was written.
    pub pagemap: Pagemap,
    /// As it was when it was attached to.
    pub stat: Stat,
    /// How long one of its threads was stopped for that.
    pub stopped: Duration,
}

impl Attachment {
    /// Attaches to a running process.
    pub fn new(pid: i32) -> Result<Self, TrackingError> {
        if pid == std::process::id() as i32 {
            return Err(TrackingError::Target("pagecast cannot attach to itself".to_owned()));
        }
        let stat = Stat::of(pid).map_err(|error| failed(pid, &error))?;
        if stat.has_ended() {
            return Err(gone(pid));
        }
        let pagemap = Pagemap::of_process(pid).map_err(|error| failed(pid, &error))?;
        let opened = open_userfaultfd(pid)?;
        let uffd = Userfaultfd::adopt(opened.descriptor)?;
        // Had it become another program meanwhile, the page map would be of the one before.
        let now = Stat::of(pid).map_err(|error| failed(pid, &error))?;
        if (now.program, now.start_ticks) != (stat.program, stat.start_ticks) {
            return Err(TrackingError::Target(format!("process {pid} is just becoming another program")));
        }
        Ok(Attachment { pid, uffd, pagemap, stat, stopped: opened.stopped })
    }
}

fn open_userfaultfd(pid: i32) -> Result<Opened, TrackingError> {
    let syscall_at =
        proc::find_syscall_instruction(pid).map_err(|error| failed(pid, &error))?.ok_or_else(|| {
            TrackingError::Target(format!("process {pid} has no system call instruction to borrow"))
        })?;
    let has_seccomp = proc::has_seccomp(pid);
    let mut last = gone(pid);
    for thread in proc::threads_least_disturbed_first(pid).into_iter().take(MAX_THREADS) {
        match ptrace::open_userfaultfd(&Order { pid, thread, syscall_at, has_seccomp }) {
            Ok(opened) => return Ok(opened),
            Err(BorrowError::Gone) => {}
            Err(error) if error.is_of_thread() => {
                last = TrackingError::Target(format!("cannot attach to process {pid}: {error}"));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(last)
}

fn gone(pid: i32) -> TrackingError {
    TrackingError::Target(format!("there is no process {pid}; it may have ended"))
}

fn failed(pid: i32, error: &io::Error) -> TrackingError {
    match error.kind() {
        io::ErrorKind::NotFound => gone(pid),
        io::ErrorKind::PermissionDenied => BorrowError::Rights(pid).into(),
        _ if error.raw_os_error() == Some(libc::ESRCH) => gone(pid),
        _ => TrackingError::Target(format!("cannot read what /proc says of process {pid}: {error}")),
    }
}
