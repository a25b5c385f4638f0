//! One process, attached to: its userfaultfd and its page map.

use std::io;
use std::time::{Duration, Instant};

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

/// How long a thread may take to stop, if one has to be waited for.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// The same if a recording waits meanwhile.
const BRIEF: Duration = Duration::from_millis(50);

/// How long a process that is just becoming another program may take until that can be attached to.
const EXEC_PATIENCE: Duration = Duration::from_secs(1);

/// Why an attempt to attach failed.
enum Attempt {
    /// The process is within exec: the old program is gone, the new one is not all there.
    InExec,
    Failed(TrackingError),
}

impl From<TrackingError> for Attempt {
    fn from(error: TrackingError) -> Self {
        Attempt::Failed(error)
    }
}

impl Attachment {
    /// Attaches to a running process.
    pub fn new(pid: i32) -> Result<Self, TrackingError> {
        let since = Instant::now();
        loop {
            match Self::attempt(pid, STOP_PATIENCE) {
                Ok(attachment) => return Ok(attachment),
                Err(Attempt::Failed(error)) => return Err(error),
                Err(Attempt::InExec) if since.elapsed() > EXEC_PATIENCE => {
                    return Err(TrackingError::Target(format!(
                        "process {pid} has no system call instruction to borrow, or becomes one program after the other"
                    )));
                }
                Err(Attempt::InExec) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Attaches to a running process if that goes at once; if it is just being loaded, or waits inside the kernel, it does
    /// not.
    pub fn at_once(pid: i32) -> Result<Self, TrackingError> {
        Self::attempt(pid, BRIEF).map_err(|attempt| match attempt {
            Attempt::Failed(error) => error,
            Attempt::InExec => {
                TrackingError::Target(format!("process {pid} is just becoming another program"))
            }
        })
    }

    fn attempt(pid: i32, patience: Duration) -> Result<Self, Attempt> {
        if pid == std::process::id() as i32 {
            return Err(TrackingError::Target("pagecast cannot attach to itself".to_owned()).into());
        }
        let stat = Stat::of(pid).map_err(|error| failed(pid, &error))?;
        if stat.has_ended() {
            return Err(gone(pid).into());
        }
        let pagemap = Pagemap::of_process(pid).map_err(|error| failed(pid, &error))?;
        let opened = open_userfaultfd(pid, patience)?;
        let uffd = Userfaultfd::adopt(opened.descriptor)?;
        // Had it become another program meanwhile, the page map would be of the one before.
        let now = Stat::of(pid).map_err(|error| failed(pid, &error))?;
        if (now.program, now.start_ticks) != (stat.program, stat.start_ticks) {
            return Err(Attempt::InExec);
        }
        Ok(Attachment { pid, uffd, pagemap, stat, stopped: opened.stopped })
    }
}

fn open_userfaultfd(pid: i32, patience: Duration) -> Result<Opened, Attempt> {
    let found = proc::find_syscall_instruction(pid).map_err(|error| failed(pid, &error))?;
    let syscall_at = found.ok_or(Attempt::InExec)?;
    let mut last = gone(pid);
    for thread in proc::threads_least_disturbed_first(pid).into_iter().take(MAX_THREADS) {
        let has_seccomp = proc::has_seccomp(pid, thread);
        match ptrace::open_userfaultfd(&Order { pid, thread, syscall_at, has_seccomp, patience }) {
            Ok(opened) => return Ok(opened),
            Err(BorrowError::Gone) => {}
            Err(BorrowError::NoInstruction) => return Err(Attempt::InExec),
            Err(error) if error.is_of_thread() => {
                last = TrackingError::Target(format!("cannot attach to process {pid}: {error}"));
            }
            Err(error) => return Err(TrackingError::from(error).into()),
        }
    }
    Err(last.into())
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
